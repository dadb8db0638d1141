//! The plugin host with real components: `plugins/built`, made from `plugins/` by `plugins/build.sh`.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests"
)]

use leeward_policy::model::{Cause, OnFault, Plugin, PluginKind};
use leeward_wasm::{Action, CallAttempt, FailedCall, Fault, Host, Worker};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::LocalSet;

fn built(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../plugins/built")
        .join(name)
}

fn spec(file: &Path) -> Plugin {
    Plugin {
        kind: PluginKind::Fallback,
        file: file.display().to_string().into(),
        sha256: None,
        memory_bytes: 16 << 20,
        call_timeout: Duration::from_millis(200),
        max_instances: 2,
        max_body_bytes: 0,
        on_fault: OnFault::NextRung,
        when: None,
    }
}

fn failed(config: &str) -> FailedCall {
    FailedCall {
        method: "GET".into(),
        path: "/r".into(),
        query: Some("limit=2".into()),
        authority: "shop".into(),
        headers: vec![("x-many".into(), b"1".to_vec()), ("x-many".into(), b"2".to_vec())],
        body: Some(b"hello".to_vec()),
        cause: Cause::Timeout,
        attempts: vec![CallAttempt {
            endpoint: "10.0.0.1:80".into(),
            zone: "a".into(),
            status: Some(503),
            cause: None,
            duration: Duration::from_micros(1500),
        }],
        service: "recommendations".into(),
        route: "shop/0".into(),
        zone: "a".into(),
        config: config.into(),
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// A worker with one plugin.
struct Rig {
    host: Arc<Host>,
    worker: Worker,
    spec: Plugin,
    name: Arc<str>,
}

impl Rig {
    async fn new(file: &str) -> Self {
        let (host, spec) = (Host::new().unwrap(), spec(&built(file)));
        host.load("p", &spec).await.unwrap();
        Self {
            worker: Worker::new(&host),
            host,
            spec,
            name: "p".into(),
        }
    }

    async fn ask(&self, config: &str) -> Result<Action, Fault> {
        self.worker
            .on_failure(&self.name, &self.spec, failed(config), None, &mut |_, _| {})
            .await
    }

    async fn text(&self, config: &str) -> String {
        match self.ask(config).await {
            Ok(Action::Respond { body, .. }) => String::from_utf8(body).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn the_examples_answer_and_decline() {
    let rig = Rig::new("static-json.wasm").await;
    let Ok(Action::Respond {
        status,
        headers,
        body,
    }) = rig.ask(r#"{"status": 203, "body": {"a": 1}}"#).await
    else {
        panic!()
    };
    assert_eq!((status, body.as_slice()), (203, br#"{"a":1}"#.as_slice()));
    assert_eq!(
        headers,
        [("content-type".to_owned(), b"application/json".to_vec())]
    );
    assert_eq!(rig.ask("nonsense").await, Ok(Action::Decline));

    let rig = Rig::new("recommendations-fallback.wasm").await;
    let page = rig.text(r#"{"popular": ["tea", "soap", "rope"]}"#).await;
    assert!(
        page.contains(r#""items":["tea","soap"]"#) && page.contains("too slow"),
        "{page}"
    );
    // No deadline is all the time there is.
    let rerouted = rig.ask(r#"{"popular": [], "service": "lite"}"#).await;
    assert_eq!(rerouted, Ok(Action::Reroute("lite".into())));
}

#[tokio::test]
async fn a_guest_sees_the_failure_whole() {
    let rig = Rig::new("misbehave.wasm").await;
    let seen = rig.text("echo").await;
    for part in [
        "GET /r Some(\"limit=2\") shop",
        "cause Cause::Timeout",
        "10.0.0.1:80 a Some(503) None 1500us",
        "service recommendations route shop/0 zone a",
        "x-many [\"1\", \"2\"]",
        "headers 2",
        "body Some(\"hello\")",
        "left false",
    ] {
        assert!(seen.contains(part), "{part:?} is not in {seen}");
    }
    let deadline = Some(now() + Duration::from_secs(5));
    let call = rig
        .worker
        .on_failure(&rig.name, &rig.spec, failed("echo"), deadline, &mut |_, _| {})
        .await;
    let Ok(Action::Respond { body, .. }) = call else {
        panic!("{call:?}")
    };
    assert!(String::from_utf8(body).unwrap().contains("left true"));
}

#[tokio::test]
async fn every_fault_costs_its_call_and_nothing_else() {
    let rig = Rig::new("misbehave.wasm").await;
    for (config, want) in [
        ("loop", Fault::Time),
        ("memory", Fault::Memory),
        ("panic", Fault::Trap),
        ("stack", Fault::Trap),
        ("bad-status", Fault::BadResponse),
        ("hop-by-hop", Fault::BadResponse),
        ("split", Fault::BadResponse),
        ("ours", Fault::BadResponse),
        ("huge", Fault::BadResponse),
    ] {
        assert_eq!(rig.ask(config).await, Err(want), "{config}");
        assert_eq!(
            rig.text("calls").await,
            "1",
            "after {config} a fresh instance serves"
        );
        // Leave none behind that has served, so that the next fault meets a fresh one too.
        assert_eq!(rig.ask("panic").await, Err(Fault::Trap));
    }
}

#[tokio::test]
async fn instances_are_reused() {
    let rig = Rig::new("misbehave.wasm").await;
    for n in 1..=5 {
        assert_eq!(rig.text("calls").await, n.to_string());
    }
}

#[tokio::test]
async fn a_runaway_guest_holds_nobody_up() {
    let rig = Rig::new("misbehave.wasm").await;
    let began = now();
    let mut longest = Duration::ZERO;
    let other_work = async {
        let mut last = now();
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            longest = longest.max(now() - last);
            last = now();
        }
    };
    let (call, ()) = tokio::join!(rig.ask("loop"), other_work);
    assert_eq!(call, Err(Fault::Time));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(
        longest < Duration::from_millis(150),
        "a timer of the same thread waited {longest:?}"
    );
}

#[tokio::test]
async fn a_call_ends_with_the_request() {
    let mut rig = Rig::new("misbehave.wasm").await;
    rig.spec.call_timeout = Duration::from_secs(10);
    let began = now();
    let deadline = Some(began + Duration::from_millis(50));
    let call = rig
        .worker
        .on_failure(&rig.name, &rig.spec, failed("loop"), deadline, &mut |_, _| {})
        .await;
    assert_eq!(call, Err(Fault::Time));
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn more_calls_than_instances_wait_and_then_give_up() {
    LocalSet::new()
        .run_until(async {
            let mut rig = Rig::new("misbehave.wasm").await;
            rig.spec.max_instances = 1;
            let (first, second) = tokio::join!(rig.ask("loop"), rig.ask("calls"));
            assert_eq!(first, Err(Fault::Time));
            assert!(
                matches!(second, Err(Fault::Busy) | Ok(Action::Respond { .. })),
                "{second:?}"
            );
            rig.spec.call_timeout = Duration::from_millis(100);
            let long = Plugin {
                call_timeout: Duration::from_millis(400),
                ..rig.spec.clone()
            };
            let mut none = |_: &str, _| {};
            let slow = rig
                .worker
                .on_failure(&rig.name, &long, failed("loop"), None, &mut none);
            let deadline = Some(now() + Duration::from_millis(50));
            let mut ignore = |_: &str, _| {};
            let quick = rig
                .worker
                .on_failure(&rig.name, &long, failed("calls"), deadline, &mut ignore);
            let (slow, quick) = tokio::join!(slow, quick);
            assert_eq!((slow, quick), (Err(Fault::Time), Err(Fault::Busy)));
        })
        .await;
}

#[tokio::test]
async fn what_a_guest_counts_is_bounded() {
    let rig = Rig::new("misbehave.wasm").await;
    let mut counted = BTreeMap::new();
    let mut count = |name: &str, by: u64| *counted.entry(name.to_owned()).or_insert(0) += by;
    let flood = rig
        .worker
        .on_failure(&rig.name, &rig.spec, failed("flood"), None, &mut count)
        .await;
    assert_eq!(flood, Ok(Action::Decline));
    assert_eq!(counted.len(), 33, "32 names and the overflow");
    assert_eq!(counted["overflow"], 10_000 - 32);
}

#[tokio::test]
async fn what_cannot_be_used_is_named() {
    let host = Host::new().unwrap();
    let scratch = std::env::temp_dir().join(format!("leeward-wasm-{}.wasm", std::process::id()));
    let load = async |spec: &Plugin| host.load("x", spec).await.unwrap_err().to_string();
    assert!(
        load(&spec(Path::new("/nowhere.wasm")))
            .await
            .contains("can't read /nowhere.wasm")
    );
    std::fs::write(&scratch, b"not wasm").unwrap();
    assert!(
        load(&spec(&scratch))
            .await
            .contains("is not a component of the world leeward:plugin/fallback")
    );
    std::fs::write(&scratch, wat::parse_str("(module)").unwrap()).unwrap();
    assert!(load(&spec(&scratch)).await.contains("--target wasm32-wasip2"));
    std::fs::write(&scratch, b"\0asm\x0d\0\x01\0").unwrap();
    assert!(
        load(&spec(&scratch))
            .await
            .contains("is not a component of the world")
    );
    let wrong = Plugin {
        sha256: Some([7; 32]),
        ..spec(&built("static-json.wasm"))
    };
    assert!(load(&wrong).await.contains("want 0707"));
    std::fs::remove_file(&scratch).unwrap();
    let worker = Worker::new(&host);
    let missing = worker
        .on_failure(&"x".into(), &wrong, failed(""), None, &mut |_, _| {})
        .await;
    assert_eq!(missing, Err(Fault::NotLoaded));
}

#[tokio::test]
async fn a_new_version_takes_over() {
    let rig = Rig::new("misbehave.wasm").await;
    assert_eq!(rig.text("calls").await, "1");
    let next = spec(&built("static-json.wasm"));
    rig.host.load("p", &next).await.unwrap();
    let call = rig
        .worker
        .on_failure(&rig.name, &next, failed(r#"{"body": 5}"#), None, &mut |_, _| {})
        .await;
    assert!(matches!(call, Ok(Action::Respond { body, .. }) if body == b"5"));
    rig.host.retain(&[]);
    let call = rig
        .worker
        .on_failure(&rig.name, &next, failed(""), None, &mut |_, _| {})
        .await;
    assert_eq!(call, Err(Fault::NotLoaded));
}

#[tokio::test]
async fn a_thousand_traps_leave_nothing_behind() {
    let rig = Rig::new("misbehave.wasm").await;
    for _ in 0..50 {
        assert_eq!(rig.ask("panic").await, Err(Fault::Trap));
    }
    let before = resident();
    for _ in 0..1000 {
        assert_eq!(rig.ask("panic").await, Err(Fault::Trap));
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 16 << 20, "grew by {grown} bytes");
}

/// Resident memory of this process, in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

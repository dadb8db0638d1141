//! The world `fallback`, and what holds for every component: real ones, of `tests/guests` and `plugins/built`.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests"
)]

mod support;

use bytes::Bytes;
use leeward_policy::model::{Plugin, PluginKind};
use leeward_wasm::{Action, Fault, Host};
use std::sync::Arc;
use std::time::Duration;
use support::{Rig, body_of, built, failed, guest, headers, now, spec};

async fn rig() -> Rig {
    Rig::new(PluginKind::Fallback, &guest("fallback.wasm")).await
}

async fn rig_with(change: impl FnOnce(&mut Plugin)) -> Rig {
    let file = guest("fallback.wasm");
    let mut spec = spec(PluginKind::Fallback, &file);
    change(&mut spec);
    Rig::with(spec, &file).await
}

#[tokio::test]
async fn plugins_of_the_first_contract_go_on() {
    let rig = Rig::new(PluginKind::Fallback, &built("static-json.wasm")).await;
    let Ok(Action::Respond(reply)) = rig.ask(r#"{"status": 203, "body": {"a": 1}}"#).await else {
        panic!()
    };
    assert_eq!(
        (reply.status.as_u16(), &*reply.body),
        (203, br#"{"a":1}"#.as_slice())
    );
    assert_eq!(reply.headers, headers(&[("content-type", "application/json")]));
    assert_eq!(rig.ask("nonsense").await, Ok(Action::Decline));
}

#[tokio::test]
async fn a_guest_sees_the_failure_whole() {
    let rig = rig().await;
    let seen = rig.text("echo").await;
    for part in [
        "GET /r Some(\"limit=2\") shop",
        "cause Cause::Timeout",
        "10.0.0.1:80 a Some(503) None 1500us",
        "service recommendations route shop/0 zone a peer Some(\"spiffe://mesh/web\")",
        "x-many [\"1\", \"2\"]",
        "headers 2",
        "body Some(\"hello\")",
        "kept Some(\"200 9000 of 5000\")",
        "left true",
    ] {
        assert!(seen.contains(part), "{part:?} is not in {seen}");
    }
    assert!(rig.text("flag f").await.contains("f /r?limit=2 Some(Timeout)"));
    assert_eq!(rig.text("flag none").await, "None");
    assert_eq!(*rig.told.calls.borrow(), [("on-failure", Ok(())); 3]);
}

#[tokio::test]
async fn a_guest_says_what_is_to_be_done() {
    let rig = rig().await;
    assert_eq!(rig.ask("decline").await, Ok(Action::Decline));
    assert_eq!(rig.ask("stale").await, Ok(Action::Stale));
    assert_eq!(rig.ask("reroute lite").await, Ok(Action::Reroute("lite".into())));
    let Ok(Action::Enqueue { queue, reply }) = rig.ask("enqueue orders").await else {
        panic!()
    };
    assert_eq!(
        (&*queue, reply.status.as_u16(), &*reply.body),
        ("orders", 202, b"taken in".as_slice())
    );
}

#[tokio::test]
async fn every_fault_costs_its_call_and_nothing_else() {
    let rig = rig().await;
    for (config, want) in [
        ("loop", Fault::Time),
        ("memory", Fault::Memory),
        ("panic", Fault::Trap),
        ("stack", Fault::Trap),
        ("utf8", Fault::Trap),
        ("exit", Fault::Trap),
        ("hoard 513", Fault::Trap),
        ("bad-status", Fault::BadResponse),
        ("header transfer-encoding chunked", Fault::BadResponse),
        ("header content-length 5", Fault::BadResponse),
        ("header leeward-reason ok", Fault::BadResponse),
        ("header a:b ok", Fault::BadResponse),
        ("split", Fault::BadResponse),
        ("huge-header", Fault::BadResponse),
        ("huge", Fault::BadResponse),
        ("sleep 5000", Fault::Time),
    ] {
        assert_eq!(rig.ask(config).await, Err(want), "{config}");
        assert_eq!(
            rig.told.calls.borrow().last(),
            Some(&("on-failure", Err(want))),
            "{config}"
        );
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
async fn instances_are_reused_unless_policy_says_no() {
    let reused = rig().await;
    let fresh = rig_with(|spec| spec.fresh_instance = true).await;
    for n in 1..=5 {
        assert_eq!(reused.text("calls").await, n.to_string());
        assert_eq!(fresh.text("calls").await, "1");
    }
}

#[tokio::test]
async fn instances_that_nobody_uses_go() {
    let rig = rig().await;
    assert_eq!(rig.text("calls").await, "1");
    rig.host.tend(now() + Duration::from_secs(59));
    assert_eq!(rig.text("calls").await, "2");
    rig.host.tend(now() + Duration::from_secs(61));
    assert_eq!(rig.text("calls").await, "1");
}

#[tokio::test]
async fn there_is_nothing_of_the_node_but_time_and_chance() {
    let rig = rig().await;
    assert_eq!(
        rig.text("node").await,
        "env 0 args 0 dirs 0 stdin false tcp false udp false name false"
    );
    assert_ne!(rig.text("random").await, rig.text("random").await);
    let seconds: u64 = rig.text("clock").await.parse().unwrap();
    assert!(seconds > 1_700_000_000);
    assert_eq!(rig.text("sleep 5").await, "slept");
    assert_eq!(rig.ask("print hello").await, Ok(Action::Decline));
}

#[tokio::test]
async fn a_runaway_guest_holds_nobody_up() {
    let rig = rig().await;
    let began = now();
    let mut turns = 0;
    let other_work = async {
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            turns += 1;
        }
        now()
    };
    let (call, others) = tokio::join!(rig.ask("loop"), other_work);
    assert_eq!(call, Err(Fault::Time));
    assert_eq!(turns, 10);
    assert!(others - began < Duration::from_secs(5), "{:?}", others - began);
}

#[tokio::test]
async fn a_runaway_guest_is_stopped_after_a_rest_too() {
    let rig = rig().await;
    assert_eq!(rig.text("calls").await, "1");
    // Longer than the clock ticks for nobody.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(rig.ask("loop").await, Err(Fault::Time));
}

#[tokio::test]
async fn a_call_ends_with_the_request() {
    for (limit, want) in [(60_000, Fault::Busy), (60, Fault::Time)] {
        let rig = rig_with(|spec| spec.limits.call_timeout = Duration::from_millis(limit)).await;
        for config in ["loop", "sleep 60000"] {
            let began = now();
            let mut call = failed(config);
            call.facts.deadline = Some(began + Duration::from_millis(50));
            // Whether it is the plugin's fault depends on how much time it had.
            assert_eq!(rig.fail(call).await, Err(want), "{config}");
            assert!(began.elapsed() < Duration::from_secs(30));
        }
        let mut late = failed("calls");
        late.facts.deadline = Some(now());
        assert_eq!(rig.fail(late).await, Err(Fault::Busy));
    }
}

#[tokio::test]
async fn a_call_that_is_given_up_takes_its_instance_with_it() {
    let rig = rig().await;
    assert_eq!(rig.text("calls").await, "1");
    let given_up = tokio::time::timeout(Duration::from_millis(20), rig.ask("sleep 5000")).await;
    assert!(given_up.is_err());
    assert_eq!(rig.text("calls").await, "1");
}

#[tokio::test]
async fn more_calls_than_instances_wait_and_then_give_up() {
    let rig = rig_with(|spec| spec.limits.max_instances = 1).await;
    let mut quick = failed("calls");
    quick.facts.deadline = Some(now() + Duration::from_millis(50));
    let (slow, quick) = tokio::join!(rig.ask("loop"), rig.fail(quick));
    assert_eq!((slow, quick), (Err(Fault::Time), Err(Fault::Busy)));
    let (slow, patient) = tokio::join!(rig.ask("sleep 50"), rig.ask("calls"));
    assert_eq!(body_of(slow), "slept");
    assert_eq!(body_of(patient), "2");
}

#[tokio::test]
async fn what_a_guest_floods_is_bounded() {
    let rig = rig_with(|spec| spec.limits.call_timeout = Duration::from_secs(10)).await;
    assert_eq!(rig.ask("flood").await, Ok(Action::Decline));
    let counted = rig.told.counted.take();
    assert_eq!(counted.len(), 33, "32 names and the overflow");
    assert_eq!(counted["overflow"], 10_000 - 32);
    // 1 MiB and 1024 entries: of 10,000 only the last are there.
    assert_eq!(rig.text("get key_0").await, "None");
    assert!(rig.text("get key_9999").await.starts_with("Some"));
}

#[tokio::test]
async fn the_store_is_one_for_all_instances_and_workers() {
    let rig = rig().await;
    assert_eq!(rig.text("set a 1").await, "Ok(())");
    assert_eq!(rig.ask("panic").await, Err(Fault::Trap));
    let other = Rig::on(&rig.host, Plugin::clone(&rig.spec));
    assert_eq!(other.text("get a").await, "Some(\"1\")");
    assert_eq!(other.text("increment a 4").await, "Ok(5)");
    assert_eq!(rig.text("increment a -7").await, "Ok(-2)");
    assert_eq!(rig.text("set ab x").await, "Ok(())");
    assert_eq!(rig.text("keys a").await, "a,ab");
    assert!(rig.text("increment ab 1").await.contains("not-a-number"));
    assert!(rig.text("set-large 2000000").await.contains("too-large"));
    assert_eq!(rig.ask("delete a").await, Ok(Action::Decline));
    assert_eq!(other.text("get a").await, "None");
    assert_eq!(rig.text("set t 1 0").await, "Ok(())");
    assert_eq!(rig.text("get t").await, "None", "it expired at once");
}

#[tokio::test]
async fn a_guest_calls_the_services_that_it_may() {
    let rig = rig().await;
    let called = rig.text_with_mesh("send reviews /top?n=3 - host=shop").await;
    assert_eq!(called, "200 p reviews /top?n=3 Some(\"shop\") 0 whole 0");
    for (config, want) in [
        ("send payments /", "not-allowed"),
        ("send reviews top", "invalid"),
        ("send reviews /a#b", "invalid"),
        ("send reviews / - transfer-encoding=chunked", "invalid"),
        ("send loop /", "loop"),
        ("send reviews /silent 30", "timeout"),
    ] {
        let got = rig.text_with_mesh(config).await;
        assert!(got.contains(want), "{config}: {got}");
    }
    let many = rig.text_with_mesh("send-many reviews /").await;
    assert_eq!(many.matches("200 ").count(), 4, "{many}");
    assert_eq!(many.matches("too-many").count(), 5, "{many}");
}

#[tokio::test]
async fn waiting_for_the_mesh_is_not_held_against_a_guest() {
    let rig = rig_with(|spec| spec.limits.call_timeout = Duration::from_millis(40)).await;
    assert!(
        rig.text_with_mesh("send reviews /silent 300")
            .await
            .contains("timeout")
    );
    let asked = tokio::select! {
        asked = rig.ask("send-loop reviews /silent 100") => asked,
        () = rig.mesh() => unreachable!(),
    };
    assert_eq!(asked, Err(Fault::Time), "what it does then is");
    let began = now();
    let mut call = failed("send reviews /silent 60000");
    call.facts.deadline = Some(began + Duration::from_millis(100));
    let asked = tokio::select! {
        asked = rig.fail(call) => asked,
        () = rig.mesh() => unreachable!(),
    };
    assert!(body_of(asked).contains("timeout"), "there is time left to tell");
    assert!(began.elapsed() < Duration::from_secs(30), "the deadline holds");
}

#[tokio::test]
async fn handles_are_bounded() {
    let rig = rig().await;
    assert_eq!(rig.ask("hoard 250").await, Ok(Action::Decline));
    assert_eq!(rig.ask("hoard 260").await, Err(Fault::Trap));
}

#[tokio::test]
async fn memory_and_tables_are_bounded_from_the_beginning() {
    for change in [
        |spec: &mut Plugin| spec.limits.memory_bytes = 64 << 10,
        |spec: &mut Plugin| spec.limits.table_elements = 1,
    ] {
        assert_eq!(rig_with(change).await.ask("calls").await, Err(Fault::Memory));
    }
}

#[tokio::test]
async fn what_a_guest_prints_is_the_log() {
    let rig = rig_with(|spec| spec.limits.log_lines = 2).await;
    assert_eq!(rig.ask("print of-this-test").await, Ok(Action::Decline));
    let ours = |keep: fn(&str) -> bool| -> Vec<String> {
        let (lines, _) = leeward_wasm::log_lines(Some("p"));
        let texts = lines.iter().map(|line| line.text.to_string());
        texts.filter(|text| keep(text)).collect()
    };
    assert_eq!(
        ours(|text| text == "of-this-test").len(),
        1,
        "a line ends with its call"
    );
    assert_eq!(rig.ask("print a-\nb-\nc-\nd").await, Ok(Action::Decline));
    assert_eq!(ours(|text| text.ends_with('-')), ["a-", "b-"]);
}

#[tokio::test]
async fn a_policy_with_other_bounds_holds_at_once() {
    let mut rig = rig().await;
    assert_eq!(rig.text("calls").await, "1");
    let mut spec = Plugin::clone(&rig.spec);
    spec.limits.call_timeout = Duration::from_millis(100);
    rig.spec = Arc::new(spec.clone());
    assert_eq!(
        rig.text("calls").await,
        "1",
        "instances have the bounds that they were made with"
    );
    rig.spec = Arc::new(spec);
    assert_eq!(
        rig.text("calls").await,
        "2",
        "the same policy is the same, whoever holds it"
    );
}

#[tokio::test]
async fn what_cannot_be_used_is_named() {
    let host = Host::new().unwrap();
    let scratch = std::env::temp_dir().join(format!("leeward-wasm-{}.wasm", std::process::id()));
    let load = async |kind, file: &std::path::Path| {
        let loaded = host.load("x", &spec(kind, file), file.to_owned(), None).await;
        loaded.unwrap_err().to_string()
    };
    let nowhere = load(PluginKind::Fallback, "/nowhere.wasm".as_ref()).await;
    assert!(nowhere.contains("can't read /nowhere.wasm"), "{nowhere}");
    for bad in [
        b"not wasm".to_vec(),
        wat::parse_str("(module)").unwrap(),
        b"\0asm\x0d\0\x01\0".to_vec(),
    ] {
        std::fs::write(&scratch, bad).unwrap();
        let refused = load(PluginKind::Fallback, &scratch).await;
        assert!(refused.contains("for kind Fallback"), "{refused}");
    }
    // What the guest imports of WASI, under a name that nobody has.
    let mut stranger = std::fs::read(guest("fallback.wasm")).unwrap();
    let (from, to) = (b"wasi:cli/environment", b"acme:cli/environment");
    while let Some(at) = stranger.windows(from.len()).position(|bytes| bytes == from) {
        stranger[at..at + to.len()].copy_from_slice(to);
    }
    std::fs::write(&scratch, stranger).unwrap();
    let refused = load(PluginKind::Fallback, &scratch).await;
    assert!(refused.contains("acme:cli/environment"), "{refused}");
    std::fs::remove_file(&scratch).unwrap();
    for (kind, file) in [
        (PluginKind::Filter, "fallback.wasm"),
        (PluginKind::Router, "filter.wasm"),
        (PluginKind::WasiHttp, "router.wasm"),
        (PluginKind::Fallback, "http.wasm"),
        (PluginKind::ProxyWasm, "filter.wasm"),
    ] {
        let refused = load(kind, &guest(file)).await;
        assert!(refused.contains(kind.as_str()), "{refused}");
    }
}

#[tokio::test]
async fn where_there_is_no_room_those_that_nobody_uses_make_some() {
    let file = guest("fallback.wasm");
    let mut spec = spec(PluginKind::Fallback, &file);
    spec.limits.max_instances = 256;
    spec.limits.call_timeout = Duration::from_secs(10);
    let rig = Rig::with(spec, &file).await;
    // As many as the process may have, four workers' worth.
    let workers: Vec<_> = (0..4)
        .map(|_| Rig::on(&rig.host, Plugin::clone(&rig.spec)))
        .collect();
    for worker in &workers {
        let calls = (0..256).map(|_| worker.ask("sleep 100"));
        for call in futures_util::future::join_all(calls).await {
            assert_eq!(body_of(call), "slept");
        }
    }
    assert_eq!(rig.text("calls").await, "1");
    // Of the others a few have gone, those that had waited longest.
    assert_eq!(workers[3].text("calls").await, "2");
}

#[tokio::test]
async fn a_body_that_is_not_there_is_none() {
    let rig = rig().await;
    let mut call = failed("echo");
    call.body = None;
    assert!(body_of(rig.fail(call).await).contains("body None"));
    let mut call = failed("echo");
    call.body = Some(Bytes::new());
    assert!(body_of(rig.fail(call).await).contains("body Some(\"\")"));
}

#[tokio::test]
async fn a_component_whose_exports_have_other_types_is_refused_when_it_is_loaded() {
    let component = |exports: &[&str]| {
        let exports: String = exports
            .iter()
            .map(|name| format!(r#"(export "{name}" (func $f))"#))
            .collect();
        let text = format!(
            r#"(component
                (core module $m (func (export "f") (param i32) (result i32) local.get 0))
                (core instance $i (instantiate $m))
                (func $f (param "x" u32) (result u32) (canon lift (core func $i "f")))
                {exports})"#
        );
        wat::parse_str(text).unwrap()
    };
    let filter = ["on-request", "on-request-body", "on-response", "on-response-body"];
    for (kind, exports) in [
        (PluginKind::Filter, &filter[..]),
        (PluginKind::Router, &["choose"][..]),
        (PluginKind::Fallback, &["on-failure"][..]),
    ] {
        let host = Host::new().unwrap();
        let dir =
            std::env::temp_dir().join(format!("leeward-types-{}-{}", std::process::id(), kind.as_str()));
        std::fs::write(&dir, component(exports)).unwrap();
        let result = host.load("p", &spec(kind, &dir), dir.clone(), None).await;
        std::fs::remove_file(&dir).unwrap();
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("is no module for kind") && error.contains("expected"),
            "{error}"
        );
        assert!(!host.has("p"));
    }
}

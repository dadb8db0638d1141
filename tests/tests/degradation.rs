//! Levels of degradation: what a proxy does by what it sees itself, and what is held for a while.

use anyhow::{Context, ensure};
use leeward_proto::{manifest, v1};
use leeward_testkit::policy::{resilience, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Client, Process, Protocol, Reply, TempDir, binaries, eventually,
};
use serde_json::Value;
use std::time::{Duration, SystemTime};
use tokio::task::JoinHandle;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(20);

/// A proxy by itself, with a policy from files.
struct Alone {
    process: Process,
    client: Client,
    admin: Client,
    dir: TempDir,
}

impl Alone {
    async fn start(policy: &str) -> anyhow::Result<Self> {
        let dir = TempDir::new()?;
        let files = dir.path().join("policy");
        std::fs::create_dir(&files)?;
        std::fs::write(files.join("policy.yaml"), ZONE.to_owned() + policy)?;
        let process = Self::process("alone", &dir).await?;
        let client = Client::new(process.address("outbound")?, Protocol::Http1);
        let admin = Client::new(process.address("admin")?, Protocol::Http1);
        let live = eventually("policy is live", SOON, || async {
            let ready = admin.get("admin", "/readyz").await?;
            ensure!(ready.status == 200, "{ready:?}");
            Ok(())
        });
        live.await
            .with_context(|| process.log().unwrap_or_else(|error| format!("{error:#}")))?;
        Ok(Self {
            process,
            client,
            admin,
            dir,
        })
    }

    /// Starts a process in a directory that has policy; another of these gives way to it.
    async fn process(name: &str, dir: &TempDir) -> anyhow::Result<Process> {
        let (files, place) = (dir.path().join("policy"), dir.path().join("place"));
        let args = [
            ["--zone", "a"],
            ["--name", "a1"],
            ["--policy", &files.display().to_string()],
            ["--outbound", "127.0.0.1:0"],
            ["--admin", "127.0.0.1:0"],
            ["--ofrep", "127.0.0.1:0"],
            ["--handover", &place.display().to_string()],
        ];
        let program = binaries::path("leeward-proxy")?;
        Process::start(name, &program, args.concat(), dir.path()).await
    }

    /// What it says of the one policy there is.
    async fn degradation(&self) -> anyhow::Result<Value> {
        let reply = self.admin.get("admin", "/degradation").await?;
        let said: Value = serde_json::from_slice(&reply.body)?;
        said.pointer("/policies/0").cloned().context("no policy")
    }

    /// Waits until its level is this; what it says of it then.
    async fn until(&self, level: &str, within: Duration) -> anyhow::Result<Value> {
        eventually(level, within, || async {
            let said = self.degradation().await?;
            ensure!(said.get("level").is_some_and(|now| now == level), "{said:#}");
            Ok(said)
        })
        .await
    }

    async fn metric(&self, name: &str, labels: &[&str]) -> anyhow::Result<u64> {
        let metrics = self.admin.get("admin", "/metrics").await?.text();
        let of = |line: &&str| {
            line.strip_prefix(name)
                .is_some_and(|rest| labels.iter().all(|label| rest.contains(label)))
        };
        let value = |line: &str| {
            line.rsplit(' ')
                .next()
                .and_then(|value| value.parse::<u64>().ok())
        };
        Ok(metrics.lines().filter(of).filter_map(value).sum())
    }

    /// Calls a host over and over.
    fn load(&self, host: &'static str) -> anyhow::Result<Load> {
        let to = self.process.address("outbound")?;
        Ok(Load(tokio::spawn(async move {
            let client = Client::new(to, Protocol::Http1);
            loop {
                let _ = client.get(host, "/").await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })))
    }
}

/// Ends when dropped.
struct Load(JoinHandle<()>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.abort();
    }
}

const ZONE: &str = "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {}\n";

const FLAGS: &str = r#"---
apiVersion: leeward.dev/v1
kind: FeatureFlags
metadata: {name: shop}
spec:
  flags:
    recommendations: {state: ENABLED, variants: {"on": true, "off": false}, defaultVariant: "on"}
"#;

/// Levels that take away recommendations and requests of low priority, with one trigger.
fn levels(trigger: &str) -> String {
    let triggers = if trigger.is_empty() {
        String::new()
    } else {
        format!(
            "  triggers:\n    - {{level: core-only, {trigger}, holdFor: 300ms, clearAfter: 1s, minStay: 1s}}\n"
        )
    };
    "---\napiVersion: leeward.dev/v1\nkind: DegradationPolicy\nmetadata: {name: shop}\nspec:\n  levels:\n    \
     - {name: normal}\n    - {name: core-only, flags: {recommendations: \"off\"}, shedBelow: Normal}\n"
        .to_owned()
        + &triggers
}

fn hold(level: &str, length: Duration) -> String {
    #[expect(
        clippy::disallowed_methods,
        reason = "the end of what is held is by the wall clock"
    )]
    let expire_time = SystemTime::now() + length;
    let held = v1::DegradationOverride {
        policy: "shop".to_owned(),
        level: level.to_owned(),
        expire_time: Some(expire_time.into()),
        reason: "an exercise".to_owned(),
        zones: Vec::new(),
    };
    manifest::to_yaml(&v1::Resource {
        metadata: Some(v1::Metadata {
            name: "exercise".to_owned(),
            ..v1::Metadata::default()
        }),
        status: None,
        spec: Some(v1::resource::Spec::DegradationOverride(held)),
    })
}

/// A payment service, and what is asked of the mesh beside it: a page that can wait, and recommendations.
fn shop(pay: &Backend, more: &[&str]) -> String {
    service("pay", &[(pay.address(), "a", "")], more)
        + &route("pay", "pay.example", "pay", &["retry: {maxAttempts: 1}"])
        + &route("page", "page.example", "pay", &["priority: {default: Low}"])
        + &route(
            "recommendations",
            "recommendations.example",
            "pay",
            &["enabled: {flag: recommendations}"],
        )
        + FLAGS
}

fn refusal(reply: &Reply) -> (u16, &str, &str) {
    (
        reply.status.as_u16(),
        reply.header("leeward-reason"),
        reply.header("leeward-limit"),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_take_a_proxy_to_core_only_and_it_comes_back_when_the_service_is_well() -> anyhow::Result<()> {
    let pay = Backend::start("pay")?;
    let trigger = "errorRate: {service: pay, above: 30, window: 1s, minimumCalls: 5}";
    let proxy = Alone::start(&(shop(&pay, &[]) + &levels(trigger))).await?;
    let _load = proxy.load("pay.example")?;
    let normal = proxy.until("normal", SOON).await?;
    assert_eq!(
        (&normal["by"], &normal["triggers"][0]["stage"]),
        (&"trigger".into(), &"idle".into())
    );
    assert_eq!(proxy.client.get("page.example", "/").await?.status, 200);
    assert_eq!(
        proxy.client.get("recommendations.example", "/").await?.status,
        200
    );

    pay.behave(Behave::Answer(Answer::status(500)));
    let began = Instant::now();
    let degraded = proxy.until("core-only", SOON).await?;
    println!("degraded after {:?}", began.elapsed());
    assert!(began.elapsed() >= Duration::from_millis(300), "{degraded:#}");
    assert_eq!(
        (&degraded["by"], &degraded["trigger"]),
        (&"trigger".into(), &0.into())
    );
    let why = degraded["why"].as_str().context("no reason")?;
    assert!(
        why.starts_with("error rate of pay ") && why.ends_with(" %, past 30 %"),
        "{why}"
    );
    assert_eq!(degraded["triggers"][0]["stage"], "active");
    let shed = proxy.client.get("page.example", "/").await?;
    assert_eq!(refusal(&shed), (503, "overloaded", "degradation.shedBelow"));
    let spared = proxy.client.get("recommendations.example", "/").await?;
    assert_eq!(refusal(&spared), (503, "disabled", ""));
    let labels = ["policy=\"shop\"", "level=\"core-only\""];
    assert_eq!(proxy.metric("leeward_degradation_level{", &labels).await?, 1);

    pay.behave(Behave::Answer(Answer::text("fine")));
    let well = Instant::now();
    proxy.until("normal", SOON).await?;
    println!("back after {:?}", well.elapsed());
    assert!(well.elapsed() >= Duration::from_secs(1), "clearAfter is 1s");
    assert_eq!(proxy.client.get("page.example", "/").await?.status, 200);
    assert_eq!(
        proxy.client.get("recommendations.example", "/").await?.status,
        200
    );
    for to in ["core-only", "normal"] {
        let labels = [&*format!("to=\"{to}\""), "by=\"trigger\"", "policy=\"shop\""];
        let changes = proxy
            .metric("leeward_degradation_changes_total{", &labels)
            .await?;
        assert_eq!(changes, 1, "{to}");
    }
    assert_eq!(proxy.metric("leeward_degradation_level{", &labels).await?, 0);
    let log = proxy.process.log()?;
    assert!(log.contains("degradation level changed"), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_level_does_not_flap_when_its_signal_does() -> anyhow::Result<()> {
    let pay = Backend::start("pay")?;
    let trigger = "errorRate: {service: pay, above: 30, window: 1s, minimumCalls: 5}";
    let proxy = Alone::start(&(shop(&pay, &[]) + &levels(trigger))).await?;
    let _load = proxy.load("pay.example")?;
    // Well and not well by turns, for less than clearAfter each.
    pay.behave(Behave::flapping(Duration::from_millis(900), 500));
    proxy.until("core-only", SOON).await?;
    tokio::time::sleep(Duration::from_secs(8)).await;
    let changes = proxy.metric("leeward_degradation_changes_total{", &[]).await?;
    assert_eq!(changes, 1, "{:#}", proxy.degradation().await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_answers_and_an_open_circuit_are_seen_too() -> anyhow::Result<()> {
    for (trigger, ill, saw) in [
        (
            "latency: {service: pay, percentile: 50, above: 100ms, window: 1s, minimumCalls: 3}",
            Behave::Late(Duration::from_millis(150), Answer::text("late")),
            "p50 of pay ",
        ),
        (
            "circuitOpen: pay",
            Behave::Answer(Answer::status(500)),
            "circuit of pay open",
        ),
    ] {
        let pay = Backend::start("pay")?;
        let breaker = resilience(
            "breaker",
            &["circuitBreaker: {consecutiveFailures: 5, openTime: 1s, maxOpenTime: 1s}"],
        );
        let policy = shop(&pay, &["resilience: breaker"]) + &breaker + &levels(trigger);
        let proxy = Alone::start(&policy).await?;
        let _load = proxy.load("pay.example")?;
        proxy.until("normal", SOON).await?;
        pay.behave(ill);
        let degraded = proxy.until("core-only", SOON).await?;
        let why = degraded["why"].as_str().context("no reason")?;
        assert!(why.starts_with(saw), "{why}");
        pay.behave(Behave::Answer(Answer::text("fine")));
        proxy.until("normal", SOON).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_without_endpoints_fails_in_the_eyes_of_triggers() -> anyhow::Result<()> {
    let trigger = "errorRate: {service: pay, above: 30, window: 1s, minimumCalls: 5}";
    let policy = service("pay", &[], &["hold: {maxRequests: 0}"])
        + &route("pay", "pay.example", "pay", &["retry: {maxAttempts: 1}"])
        + FLAGS
        + &levels(trigger);
    let proxy = Alone::start(&policy).await?;
    let refused = proxy.client.get("pay.example", "/").await?;
    assert_eq!(refusal(&refused), (503, "no_endpoint", "hold.maxRequests"));
    let _load = proxy.load("pay.example")?;
    let degraded = proxy.until("core-only", SOON).await?;
    assert_eq!(degraded["why"], "error rate of pay 100.0 %, past 30 %");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_process_begins_at_the_level_of_the_one_before() -> anyhow::Result<()> {
    let pay = Backend::start("pay")?;
    pay.behave(Behave::Answer(Answer::status(500)));
    let trigger = "errorRate: {service: pay, above: 30, window: 1s, minimumCalls: 5}";
    let policy = shop(&pay, &[]) + &levels(trigger).replace("minStay: 1s", "minStay: 1h");
    let mut proxy = Alone::start(&policy).await?;
    let load = proxy.load("pay.example")?;
    proxy.until("core-only", SOON).await?;
    drop(load);
    let next = Alone::process("next", &proxy.dir).await?;
    let mut old = std::mem::replace(&mut proxy.process, next);
    assert!(old.wait(SOON).await?.success());
    proxy.admin = Client::new(proxy.process.address("admin")?, Protocol::Http1);
    proxy.client = Client::new(proxy.process.address("outbound")?, Protocol::Http1);
    let first = proxy.client.get("page.example", "/").await?;
    assert_eq!(refusal(&first), (503, "overloaded", "degradation.shedBelow"));
    let kept = proxy.degradation().await?;
    assert_eq!(kept["level"], "core-only");
    assert_eq!(kept["own"]["why"], "kept from the process before this one");
    // With the hour that it is to stay it is still there when its signal has been clear for long enough.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(proxy.degradation().await?["level"], "core-only");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_level_that_is_held_ends_by_itself() -> anyhow::Result<()> {
    let pay = Backend::start("pay")?;
    let length = Duration::from_secs(6);
    let held = hold("core-only", length);
    let began = Instant::now();
    let proxy = Alone::start(&(shop(&pay, &[]) + &levels("") + "---\n" + &held)).await?;
    let said = proxy.until("core-only", SOON).await?;
    assert!(began.elapsed() < length, "the machine is too slow for this test");
    assert_eq!(
        (&said["by"], &said["why"]),
        (&"override".into(), &"an exercise".into())
    );
    assert!(
        said["until_ms"].as_u64().is_some_and(|left| left <= 6000),
        "{said:#}"
    );
    let shed = proxy.client.get("page.example", "/").await?;
    assert_eq!(refusal(&shed), (503, "overloaded", "degradation.shedBelow"));
    proxy.until("normal", SOON).await?;
    let late = began.elapsed().saturating_sub(length);
    println!("ended {late:?} after its time");
    assert_eq!(proxy.client.get("page.example", "/").await?.status, 200);
    assert!(late < Duration::from_secs(2), "{late:?}");
    let by = proxy
        .metric("leeward_degradation_changes_total{", &["by=\"override\""])
        .await?;
    assert_eq!(by, 1);
    assert!(proxy.dir.path().is_dir());
    Ok(())
}

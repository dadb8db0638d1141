//! Endpoints that are left out, by their checks and by what calls say; and when health is disregarded.

use anyhow::{bail, ensure};
use leeward_testkit::policy::{resilience, route, service};
use leeward_testkit::{Answer, Backend, Behave, Client, Load, Mesh, Node, Protocol, Tally, eventually};
use std::time::Duration;
use tokio::task::JoinSet;

const SOON: Duration = Duration::from_secs(20);
const IN_TURN: &str = "loadBalancer: {policy: RoundRobin, slowStartWindow: 0s}";
const CHECK: &str = "healthCheck: {http: {path: /healthz}, interval: 100ms, unhealthyThreshold: 2}";

fn backends<const N: usize>(names: [&str; N]) -> anyhow::Result<Vec<Backend>> {
    names.into_iter().map(Backend::start).collect()
}

/// `app.example`, whose endpoints are these, in a zone and behind a proxy (empty for none).
fn app(backends: &[Backend], (zone, proxy): (&str, &str), spec: &[&str]) -> String {
    let endpoints: Vec<_> = backends.iter().map(|b| (b.address(), zone, proxy)).collect();
    service("app", &endpoints, spec) + &route("app", "app.example", "app", &[])
}

/// How many of the endpoints with these labels are left out.
async fn out(node: &Node, labels: &[&str]) -> anyhow::Result<f64> {
    node.metric("leeward_endpoint_out", labels).await
}

async fn is_out(node: &Node, labels: &[&str], wanted: f64) -> anyhow::Result<()> {
    eventually("endpoints to be left out, or not", SOON, || async {
        let now = out(node, labels).await?;
        ensure!((now - wanted).abs() < 0.1, "{now} with {labels:?}, not {wanted}");
        Ok(())
    })
    .await
}

async fn ejections(node: &Node) -> anyhow::Result<f64> {
    node.metric("leeward_endpoint_changes_total", &["change=\"ejected\""])
        .await
}

async fn served(load: &Load, more: u64) -> anyhow::Result<Tally> {
    load.take();
    eventually("answers", SOON, || async {
        let tally = load.tally();
        ensure!(tally.sent >= more, "{tally:?}");
        Ok(tally)
    })
    .await
}

async fn check_takes_out_and_back(behind: (&str, &str)) -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let all = backends(["one", "two", "three"])?;
    let [_, two, _] = &all[..] else {
        bail!("there are three");
    };
    mesh.apply(&app(&all, behind, &[IN_TURN, CHECK])).await?;
    let node = mesh.node("a1")?;
    let pause = Duration::from_millis(4);
    let load = Load::start(node.outbound, Protocol::Http1, ("app.example", "/"), 3, pause);
    let before = served(&load, 100).await?;
    assert_eq!(before.by_backend.len(), 3, "{before:?}");

    two.set_health(false);
    is_out(node, &["standing=\"unhealthy\"", "service=\"app\""], 1.0).await?;
    // What was under way when the verdict came has ended by now.
    served(&load, 30).await?;
    let without = served(&load, 150).await?;
    assert!(!without.by_backend.contains_key("two"), "{without:?}");
    assert_eq!((before.failed, without.failed), (0, 0), "{before:?}, {without:?}");
    let checks = two.health_checks();
    assert!(checks >= 2, "{checks} checks");

    two.set_health(true);
    is_out(node, &["service=\"app\""], 0.0).await?;
    served(&load, 30).await?;
    let back = served(&load, 150).await?;
    assert!(back.by_backend.contains_key("two"), "{back:?}");
    assert_eq!(load.stop().await.failed + back.failed, 0, "{back:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checks_take_an_endpoint_out_and_back_without_a_failed_request() -> anyhow::Result<()> {
    check_takes_out_and_back(("a", "")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checks_reach_endpoints_behind_another_proxy() -> anyhow::Result<()> {
    check_takes_out_and_back(("b", "b1")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxys_own_limits_are_held_against_no_endpoint() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let node = mesh.node("a1")?;
    let all = backends(["one", "two"])?;
    for backend in &all {
        backend.behave(Behave::Late(Duration::from_millis(300), Answer::text("late")));
    }
    let strict = "outlierDetection: {consecutive5xx: 1, maxEjectionPercent: 100}";
    for (pool, limit) in [
        ("connectionPool: {maxRequests: 2}", "maxRequests"),
        ("connectionPool: {maxConnections: 2}", "maxConnections"),
    ] {
        mesh.apply(&app(&all, ("a", ""), &[strict, pool])).await?;
        let mut clients = JoinSet::new();
        for _ in 0..30 {
            let outbound = node.outbound;
            clients.spawn(async move {
                Client::new(outbound, Protocol::Http1)
                    .get("app.example", "/")
                    .await
            });
        }
        let mut refused = 0;
        while let Some(reply) = clients.join_next().await {
            let reply = reply??;
            if reply.status != 200 {
                let said = (reply.header("leeward-reason"), reply.header("leeward-limit"));
                assert_eq!(said, ("overflow", limit), "{reply:?}");
                refused += 1;
            }
        }
        assert!(refused >= 20, "{limit}: {refused} of 30 were refused");
        let label = format!("limit=\"{limit}\"");
        let counted = node.metric("leeward_refused_total", &[label.as_str()]).await?;
        assert!(counted >= f64::from(refused), "{limit}: {counted}");
    }
    assert!(ejections(node).await? < 0.5);
    assert!(out(node, &[]).await? < 0.5, "{}", node.metrics().await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_many_fail_some_are_never_ejected() -> anyhow::Result<()> {
    // Row: how many percent of four endpoints may be ejected, and how many are when all of them fail.
    for (percent, most) in [(100, 3.0), (50, 2.0), (10, 1.0), (0, 0.0)] {
        let mesh = Mesh::builder().node("a", "a1").start().await?;
        let node = mesh.node("a1")?;
        let all = backends(["one", "two", "three", "four"])?;
        for backend in &all {
            backend.behave(Behave::Answer(Answer::status(500)));
        }
        let limits = format!(
            "outlierDetection: {{consecutive5xx: 2, baseEjectionTime: 60s, maxEjectionPercent: {percent}}}"
        );
        mesh.apply(&app(&all, ("a", ""), &[IN_TURN, &limits])).await?;
        let client = mesh.workload("a1", Protocol::Http1)?;
        for _ in 0..60 {
            assert_eq!(client.get("app.example", "/").await?.status, 500);
        }
        let ejected = out(
            node,
            &["standing=\"ejected\"", "reason=\"consecutive_5xx\"", "zone=\"a\""],
        )
        .await?;
        assert!((ejected - most).abs() < 0.1, "{percent} %: {ejected}, not {most}");
        assert!((ejections(node).await? - most).abs() < 0.1);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_whose_circuit_is_open_is_left_out_until_a_probe_succeeds() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let all = backends(["one", "two"])?;
    all[0].behave(Behave::Answer(Answer::status(500)));
    let breaker = "endpointCircuitBreaker: {failureRate: 0, consecutiveFailures: 3, openTime: 1s, openJitter: 0, \
                   halfOpenProbes: 1, ramp: 0s}";
    let spec = [IN_TURN, "outlierDetection: {maxEjectionPercent: 0}"];
    mesh.apply(&(resilience("default", &[breaker]) + &app(&all, ("a", ""), &spec)))
        .await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut failed = 0;
    for _ in 0..30 {
        failed += u32::from(client.get("app.example", "/").await?.status == 500);
    }
    // A probe now and then is the one request more.
    assert!((3..=4).contains(&failed), "{failed}");
    all[0].behave(Behave::Answer(Answer::text("well")));
    eventually("it to come back", SOON, || async {
        let reply = client.get("app.example", "/").await?;
        ensure!(reply.backend() == "one", "{reply:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_too_few_are_healthy_all_are_asked() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let node = mesh.node("a1")?;
    let all = backends(["one", "two", "three", "four"])?;
    mesh.apply(&app(&all, ("a", ""), &[IN_TURN, CHECK])).await?;
    let pause = Duration::from_millis(4);
    let load = Load::start(node.outbound, Protocol::Http1, ("app.example", "/"), 3, pause);
    let panic = |wanted: f64| {
        eventually("panic, or its end", SOON, move || async move {
            let panic = node.metric("leeward_service_panic", &["service=\"app\""]).await?;
            ensure!((panic - wanted).abs() < 0.1, "{panic}");
            Ok(())
        })
    };
    // Three of four can carry all, nearly; one of four could not.
    all[0].set_health(false);
    is_out(node, &["standing=\"unhealthy\""], 1.0).await?;
    panic(0.0).await?;
    served(&load, 30).await?;
    let some = served(&load, 120).await?;
    assert!(!some.by_backend.contains_key("one"), "{some:?}");

    all[1].set_health(false);
    all[2].set_health(false);
    panic(1.0).await?;
    served(&load, 30).await?;
    let each = served(&load, 200).await?;
    assert_eq!(each.by_backend.len(), 4, "{each:?}");
    assert!(each.by_backend.values().all(|n| *n >= 30), "{each:?}");

    for backend in &all {
        backend.set_health(true);
    }
    panic(0.0).await?;
    assert_eq!(load.stop().await.failed + some.failed + each.failed, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_lets_requests_time_out_opens_its_circuit() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let all = backends(["hangs", "well"])?;
    all[0].behave(Behave::Hang);
    let breaker = "endpointCircuitBreaker: {failureRate: 0, consecutiveFailures: 3, openTime: 60s}";
    let spec = [IN_TURN, "outlierDetection: {maxEjectionPercent: 0}"];
    let endpoints: Vec<_> = all.iter().map(|b| (b.address(), "a", "")).collect();
    let policy = resilience("default", &[breaker])
        + &service("app", &endpoints, &spec)
        + &route("app", "app.example", "app", &["timeouts: {request: 200ms}"]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut late = 0;
    for _ in 0..20 {
        late += u32::from(client.get("app.example", "/").await?.status == 504);
    }
    assert_eq!((late, all[0].requests()), (3, 3));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_fails_more_than_the_others_is_ejected_and_comes_back_in_time() -> anyhow::Result<()>
{
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let node = mesh.node("a1")?;
    let all = backends(["one", "two", "three", "four", "five"])?;
    // One failure in three is never five in a row for long, and far below the others.
    all[0].behave(Behave::Flaky(3, 500));
    let limits = "outlierDetection: {interval: 500ms, baseEjectionTime: 2s, ejectionJitter: 0, \
                  successRate: {minimumHosts: 5, requestVolume: 10}}";
    mesh.apply(&app(&all, ("a", ""), &[IN_TURN, limits])).await?;
    let pause = Duration::from_millis(2);
    let load = Load::start(node.outbound, Protocol::Http1, ("app.example", "/"), 4, pause);
    is_out(node, &["standing=\"ejected\"", "reason=\"success_rate\""], 1.0).await?;
    all[0].behave(Behave::Answer(Answer::text("well")));
    is_out(node, &[], 0.0).await?;
    served(&load, 20).await?;
    let back = served(&load, 200).await?;
    assert_eq!((back.failed, back.by_backend.len()), (0, 5), "{back:?}");
    load.stop().await;
    Ok(())
}

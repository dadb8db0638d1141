//! The local zone first; another when it can't serve; back when it can.

use anyhow::ensure;
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Backend, Behave, Load, Mesh, Protocol};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);
const CLIENTS: usize = 4;
const PAUSE: Duration = Duration::from_millis(4);
/// How long a link to a proxy that is gone may stay unnoticed (docs/zone-protocol.md).
const DEAD_LINK: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zone_fails_over_without_a_failed_request_after_detection_and_comes_back() -> anyhow::Result<()> {
    fail_over(["", ""]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_through_the_proxies_of_both_zones() -> anyhow::Result<()> {
    fail_over(["a1", "b1"]).await
}

async fn fail_over([proxy_a, proxy_b]: [&str; 2]) -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (here, there) = (Backend::start("here")?, Backend::start("there")?);
    let endpoints = [(here.address(), "a", proxy_a), (there.address(), "b", proxy_b)];
    mesh.apply(&(service("shop", &endpoints, &[]) + &route("shop", "shop.example", "shop", &[])))
        .await?;
    let outbound = mesh.node("a1")?.outbound;
    let load = Load::start(outbound, Protocol::Http1, ("shop.example", "/"), CLIENTS, PAUSE);
    load.answered_by("here", 200, SOON).await?;
    let before = load.take();
    assert_eq!(before.failed, 0, "{before:?}");
    assert!(
        !before.by_backend.contains_key("there"),
        "the local zone comes first: {before:?}"
    );

    here.stop().await;
    load.answered_by("there", 20, SOON).await?;
    let detection = load.take();
    // At most what was under way when the backend died, one request for each client.
    assert!(detection.failed <= CLIENTS as u64, "{detection:?}");
    load.answered_by("there", 500, SOON).await?;
    let after = load.take();
    assert_eq!(after.failed, 0, "after detection: {after:?}");

    here.resume()?;
    load.answered_by("here", 200, SOON).await?;
    let back = load.stop().await;
    assert_eq!(back.failed, 0, "while coming back: {back:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zone_whose_proxy_died_is_left_for_the_next_in_order() -> anyhow::Result<()> {
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "b1")
        .node("c", "c1")
        .start()
        .await?;
    let (second, third) = (Backend::start("second")?, Backend::start("third")?);
    let endpoints = [(second.address(), "b", "b1"), (third.address(), "c", "c1")];
    mesh.apply(&(service("shop", &endpoints, &[]) + &route("shop", "shop.example", "shop", &[])))
        .await?;
    let outbound = mesh.node("a1")?.outbound;
    let load = Load::start(outbound, Protocol::Http2, ("shop.example", "/"), CLIENTS, PAUSE);
    load.answered_by("second", 200, SOON).await?;
    let before = load.take();
    assert!(
        before.failed == 0 && !before.by_backend.contains_key("third"),
        "{before:?}"
    );

    mesh.node_mut("b1")?.process.kill9()?;
    // A dead link is found within two seconds, by each worker for itself.
    tokio::time::sleep(DEAD_LINK).await;
    load.answered_by("third", 20, SOON).await?;
    let detection = load.take();
    assert!(detection.failed <= CLIENTS as u64, "{detection:?}");
    load.answered_by("third", 300, SOON).await?;
    let after = load.stop().await;
    assert_eq!(after.failed, 0, "after detection: {after:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_answers_with_failures_is_ejected() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (here, there) = (Backend::start("here")?, Backend::start("there")?);
    let endpoints = [(here.address(), "a", ""), (there.address(), "b", "")];
    let limits = ["outlierDetection: {consecutive5xx: 3, baseEjectionTime: 60s}"];
    mesh.apply(&(service("shop", &endpoints, &limits) + &route("shop", "shop.example", "shop", &[])))
        .await?;
    here.behave(Behave::Flaky(1, 500));
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut failures = 0;
    while client.get("shop.example", "/").await?.status == 500 {
        failures += 1;
        ensure!(failures < 100, "it is never ejected");
    }
    assert_eq!(failures, 3);
    for _ in 0..50 {
        assert_eq!(client.get("shop.example", "/").await?.backend(), "there");
    }
    let changes = mesh
        .node("a1")?
        .metric("leeward_endpoint_changes_total", &["change=\"ejected\""])
        .await?;
    assert!((changes - 1.0).abs() < 0.1, "{changes}");
    Ok(())
}

//! Which zones serve a service, by policy; and that a proxy which is lost isn't taken for its zone.

use anyhow::{Context, ensure};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Backend, Load, Mesh, Node, Protocol, eventually};
use std::net::SocketAddr;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);
const CLIENTS: usize = 4;
const PAUSE: Duration = Duration::from_millis(4);
/// Quick to leave and to return, so that a test can see both.
const QUICK: &str = "leaveAfter: 1s, returnAfter: 1s, returnInterval: 100ms";

async fn share(node: &Node, zone: &str) -> anyhow::Result<f64> {
    let label = format!("zone=\"{zone}\"");
    node.metric("leeward_zone_share", &["service=\"app\"", label.as_str()])
        .await
}

async fn until(node: &Node, zone: &str, wanted: f64) -> anyhow::Result<()> {
    let what = format!("zone {zone} to have {wanted} of the requests of {}", node.name);
    eventually(&what, SOON, || async {
        let share = share(node, zone).await?;
        ensure!((share - wanted).abs() < 1e-3, "{share}");
        Ok(())
    })
    .await
}

fn app(endpoints: &[(SocketAddr, &str, &str)], failover: &str) -> String {
    let balance = format!(
        "loadBalancer: {{policy: RoundRobin, slowStartWindow: 0s, zoneFailover: {{{QUICK}, {failover}}}}}"
    );
    service("app", endpoints, &[&balance]) + &route("app", "app.example", "app", &[])
}

fn load(node: &Node) -> Load {
    Load::start(
        node.outbound,
        Protocol::Http1,
        ("app.example", "/"),
        CLIENTS,
        PAUSE,
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn active_zones_serve_by_weight_and_for_each_other() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (in_a, in_b) = (Backend::start("in-a")?, Backend::start("in-b")?);
    let endpoints = [(in_a.address(), "a", "a1"), (in_b.address(), "b", "b1")];
    let weights = "activeActive: {zones: [{zone: a, weight: 3}, {zone: b, weight: 1}]}";
    mesh.apply(&app(&endpoints, weights)).await?;
    // The same for the callers of both zones.
    for name in ["a1", "b1"] {
        let client = mesh.workload(name, Protocol::Http1)?;
        let mut by_a = 0;
        for _ in 0..400 {
            by_a += u32::from(client.get("app.example", "/").await?.backend() == "in-a");
        }
        // Of a binomial distribution with 300 on average this is six standard deviations.
        assert!(by_a.abs_diff(300) < 52, "{by_a} from {name}");
    }
    let node = mesh.node("b1")?;
    until(node, "a", 0.75).await?;
    until(node, "b", 0.25).await?;

    let load = load(node);
    in_a.stop().await;
    until(node, "b", 1.0).await?;
    let detection = load.take();
    assert!(detection.failed <= CLIENTS as u64, "{detection:?}");
    load.answered_by("in-b", 200, SOON).await?;
    in_a.resume()?;
    until(node, "a", 0.75).await?;
    load.take();
    // And the one that comes second in a caller's order is found again as well.
    in_b.stop().await;
    let elsewhere = mesh.node("a1")?;
    let others = self::load(elsewhere);
    until(elsewhere, "a", 1.0).await?;
    in_b.resume()?;
    until(elsewhere, "b", 0.25).await?;
    let ended = others.stop().await;
    assert!(ended.failed <= CLIENTS as u64, "{ended:?}");
    let ended = load.stop().await;
    assert!(ended.failed <= CLIENTS as u64, "{ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_passive_zone_serves_when_the_active_one_cannot() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (in_a, in_b) = (Backend::start("in-a")?, Backend::start("in-b")?);
    let endpoints = [(in_a.address(), "a", "a1"), (in_b.address(), "b", "b1")];
    mesh.apply(&app(&endpoints, "activePassive: {zones: [b, a]}"))
        .await?;
    for name in ["a1", "b1"] {
        let client = mesh.workload(name, Protocol::Http1)?;
        for _ in 0..20 {
            assert_eq!(client.get("app.example", "/").await?.backend(), "in-b", "{name}");
        }
    }
    let node = mesh.node("a1")?;
    let load = load(node);
    load.answered_by("in-b", 50, SOON).await?;
    in_b.stop().await;
    until(node, "a", 1.0).await?;
    let detection = load.take();
    assert!(detection.failed <= CLIENTS as u64, "{detection:?}");
    load.answered_by("in-a", 100, SOON).await?;
    in_b.resume()?;
    until(node, "b", 1.0).await?;
    let back = load.stop().await;
    assert_eq!(back.failed, 0, "{back:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn modes_that_cannot_work_are_refused_with_their_field() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let backend = Backend::start("in-a")?;
    let endpoints = [(backend.address(), "a", "a1")];
    for (failover, wanted) in [
        (
            "activeActive: {zones: [{zone: a, weight: 0}, {zone: b, weight: 0}]}",
            "activeActive.zones: has only weights of 0",
        ),
        (
            "activeActive: {zones: [{zone: a}, {zone: a}]}",
            "activeActive.zones[1].zone: a stands at spec.loadBalancer.zoneFailover.activeActive.zones[0] already",
        ),
        (
            "activeActive: {zones: [{zone: a, weight: 1001}]}",
            "activeActive.zones[0].weight: 1001 is out of range; want 0 to 1000",
        ),
        (
            "activeActive: {zones: []}",
            "activeActive.zones: has 0 entries; want 1 to 64",
        ),
        (
            "activePassive: {zones: []}",
            "activePassive.zones: has 0 entries; want 1 to 64",
        ),
        (
            "activePassive: {zones: [a, elsewhere]}",
            "activePassive.zones[1]: there is no Zone/elsewhere",
        ),
        (
            "activePassive: {zones: [b, b]}",
            "activePassive.zones[1]: b stands at",
        ),
        (
            "activePassive: {zones: [a]}, activeActive: {zones: [{zone: a}]}",
            "has more than one of activeActive, activePassive; want one",
        ),
        (
            "within: region, activePassive: {zones: [a]}",
            "activePassive.zones[0]: Zone/a has no label",
        ),
    ] {
        let refused = mesh.apply_only(&app(&endpoints, failover)).await;
        let refused = format!("{:#}", refused.err().with_context(|| failover.to_owned())?);
        assert!(refused.contains(wanted), "{failover}: {refused}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_proxy_is_not_taken_for_its_zone() -> anyhow::Result<()> {
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "b1")
        .node("b", "b2")
        .node("b", "b3")
        .node("b", "b4")
        .node("c", "c1")
        .start()
        .await?;
    let names = ["b1", "b2", "b3", "b4", "c1"];
    let backends = names
        .iter()
        .map(|name| Backend::start(name))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let endpoints: Vec<_> = names
        .iter()
        .zip(&backends)
        .map(|(name, backend)| (backend.address(), &name[..1], *name))
        .collect();
    mesh.apply(&app(&endpoints, "")).await?;
    let load = load(mesh.node("a1")?);
    for name in &names[..4] {
        load.answered_by(name, 20, SOON).await?;
    }
    let before = load.take();
    assert!(
        before.failed == 0 && !before.by_backend.contains_key("c1"),
        "{before:?}"
    );

    // Three of four carry all of it: nothing goes elsewhere, not even for a moment.
    mesh.node_mut("b1")?.process.kill9()?;
    left_out(mesh.node("a1")?, 1.0).await?;
    let detection = load.take();
    // What was under way, and once more for each client that met another worker's link.
    assert!(detection.failed <= 2 * CLIENTS as u64, "{detection:?}");
    settled(&load).await?;
    load.take();
    for name in &names[1..4] {
        load.answered_by(name, 50, SOON).await?;
    }
    let after = load.take();
    assert_eq!(after.failed, 0, "{after:?}");
    assert!(!after.by_backend.contains_key("b1"), "{after:?}");
    assert!(!after.by_backend.contains_key("c1"), "{after:?}");
    until(mesh.node("a1")?, "b", 1.0).await?;

    // Two of four carry 70 %, and go on to, however long it lasts: the rest, and no more, goes to the next zone.
    mesh.node_mut("b2")?.process.kill9()?;
    left_out(mesh.node("a1")?, 2.0).await?;
    until(mesh.node("a1")?, "b", 0.7).await?;
    settled(&load).await?;
    load.take();
    load.answered_by("c1", 150, SOON).await?;
    let after = load.take();
    assert_eq!(after.failed, 0, "{after:?}");
    let of = |name: &str| after.by_backend.get(name).copied().unwrap_or(0);
    assert!(of("b3") > of("c1") / 2 && of("b4") > of("c1") / 2, "{after:?}");
    until(mesh.node("a1")?, "b", 0.7).await?;
    let ended = load.stop().await;
    assert_eq!(ended.failed, 0, "{ended:?}");
    Ok(())
}

/// So many endpoints are left out.
async fn left_out(node: &Node, wanted: f64) -> anyhow::Result<()> {
    eventually("the endpoints of a lost proxy to be left out", SOON, || async {
        let out = node.metric("leeward_endpoint_out", &["service=\"app\""]).await?;
        ensure!((out - wanted).abs() < 0.1, "{out}");
        Ok(())
    })
    .await?;
    Ok(())
}

/// Nobody meets a link any more that isn't known to be dead.
async fn settled(load: &Load) -> anyhow::Result<()> {
    eventually("requests to fail no more", SOON, || async {
        let lately = load.tally();
        if lately.failed > 0 {
            load.take();
        }
        ensure!(lately.failed == 0 && lately.sent > 100, "{lately:?}");
        Ok(())
    })
    .await
}

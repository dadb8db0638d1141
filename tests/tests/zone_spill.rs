//! What the proxies of another zone report of their services, or its gateways for them: it is heeded before a request is
//! lost, and what spills over stays within it.

use anyhow::ensure;
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Answer, Backend, Behave, Load, Mesh, Node, Protocol, Tally, eventually};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(4);

/// What a zone's proxies report to have to spare; `None` if they report nothing.
async fn spare(node: &Node, zone: &str) -> anyhow::Result<Option<f64>> {
    let text = node.metrics().await?;
    let labels = format!("leeward_zone_spare_requests{{service=\"app\",zone=\"{zone}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(labels.as_str()));
    Ok(line.map(str::parse).transpose()?)
}

async fn reported(node: &Node, zone: &str, wanted: impl Fn(f64) -> bool) -> anyhow::Result<()> {
    let what = format!("{} to hear of zone {zone}", node.name);
    eventually(&what, SOON, || async {
        let spare = spare(node, zone).await?;
        ensure!(spare.is_some_and(&wanted), "{spare:?}");
        Ok(())
    })
    .await
}

/// Whether zone b is reached through gateways.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Ways {
    Direct,
    ByGateways,
}

const GATEWAYS: [&str; 2] = ["g1", "g2"];

/// These proxies, each in the zone that its name begins with, and the gateways of zone b.
async fn start(proxies: &[&str], ways: Ways) -> anyhow::Result<Mesh> {
    let mut mesh = Mesh::builder();
    for name in proxies {
        mesh = mesh.node(&name[..1], name);
    }
    if ways == Ways::Direct {
        return mesh.start().await;
    }
    let mesh = GATEWAYS
        .iter()
        .fold(mesh, |mesh, name| mesh.node("b", name))
        .start()
        .await?;
    let proxy = |name: &str| {
        let inbound = mesh.node(name)?.inbound;
        anyhow::Ok(format!("{{name: {name}, address: \"{inbound}\"}}"))
    };
    let [first, second] = GATEWAYS;
    let proxies = [proxy(first)?, proxy(second)?, proxy("b1")?].join(", ");
    let zone = format!(
        "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: b}}\nspec: {{proxies: [{proxies}], gateways: [{{name: {first}}}, {{name: {second}}}]}}\n"
    );
    mesh.apply(&zone).await?;
    Ok(mesh)
}

async fn attempts(node: &Node, zone: &str) -> anyhow::Result<f64> {
    let zone = format!("zone=\"{zone}\"");
    node.metric("leeward_attempts_total", &["service=\"app\"", &zone])
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zone_whose_workloads_are_dead_is_known_before_a_request_is_lost() -> anyhow::Result<()> {
    known_before_a_request_is_lost(Ways::Direct).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_it_is_of_a_zone_behind_gateways() -> anyhow::Result<()> {
    known_before_a_request_is_lost(Ways::ByGateways).await
}

async fn known_before_a_request_is_lost(ways: Ways) -> anyhow::Result<()> {
    let mesh = start(&["a1", "b1", "c1"], ways).await?;
    let (in_b, in_c) = (Backend::start("in-b")?, Backend::start("in-c")?);
    let endpoints = [(in_b.address(), "b", "b1"), (in_c.address(), "c", "c1")];
    let quick = "loadBalancer: {zoneFailover: {leaveAfter: 1s, returnAfter: 1s, returnInterval: 100ms}}";
    mesh.apply(&(service("app", &endpoints, &[quick]) + &route("app", "app.example", "app", &[])))
        .await?;
    let node = mesh.node("a1")?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    assert_eq!(client.get("app.example", "/").await?.backend(), "in-b");
    reported(node, "b", |spare| spare > 0.0).await?;
    reported(node, "c", |spare| spare > 0.0).await?;

    // Only the proxy there finds out, by a request of its own workloads.
    in_b.stop().await;
    let theirs = mesh.workload("b1", Protocol::Http1)?;
    eventually("zone b's own requests to go elsewhere", SOON, || async {
        let reply = theirs.get("app.example", "/").await?;
        ensure!(reply.backend() == "in-c", "{reply:?}");
        Ok(())
    })
    .await?;
    reported(node, "b", |spare| spare == 0.0).await?;
    let before = attempts(node, "b").await?;
    for _ in 0..50 {
        assert_eq!(client.get("app.example", "/").await?.backend(), "in-c");
    }
    let after = attempts(node, "b").await?;
    assert!((after - before).abs() < 0.1, "{before} {after}");

    // Nobody sends anything there, and its proxy finds it again by itself.
    in_b.resume()?;
    reported(node, "b", |spare| spare > 0.0).await?;
    eventually("zone b to serve again", SOON, || async {
        let reply = client.get("app.example", "/").await?;
        ensure!(reply.backend() == "in-b", "{reply:?}");
        Ok(())
    })
    .await?;
    Ok(())
}

/// The requests that zone b bears at once, those of its own, and those of the two callers of zone a each.
const BEARS: usize = 60;
const OWN: usize = 12;
const EACH: usize = 40;

/// Two callers whose own zone has died, and another zone that can't bear all that they want: what it refused, of what came
/// to it in a while, and what became of the requests of its own workloads.
async fn spill(failover: &str, ways: Ways) -> anyhow::Result<(f64, Tally, Mesh)> {
    let mesh = start(&["a1", "a2", "b1"], ways).await?;
    let (in_a, in_b) = (Backend::start("in-a")?, Backend::start("in-b")?);
    for backend in [&in_a, &in_b] {
        backend.behave(Behave::Late(Duration::from_millis(200), Answer::status(200)));
    }
    let endpoints = [(in_a.address(), "a", "a1"), (in_b.address(), "b", "b1")];
    let balance = format!("loadBalancer: {{zoneFailover: {{{failover}}}}}");
    let pool = format!("connectionPool: {{maxRequests: {BEARS}}}");
    // What is refused is seen as it is.
    let more = ["retry: {maxAttempts: 1}"];
    mesh.apply(
        &(service("app", &endpoints, &[&balance, &pool]) + &route("app", "app.example", "app", &more)),
    )
    .await?;
    let (a1, a2, b1) = (mesh.node("a1")?, mesh.node("a2")?, mesh.node("b1")?);
    let load = |node: &Node, clients| {
        Load::start(
            node.outbound,
            Protocol::Http1,
            ("app.example", "/"),
            clients,
            PAUSE,
        )
    };
    let (own, first, second) = (load(b1, OWN), load(a1, EACH), load(a2, EACH));
    if failover.is_empty() {
        for node in [a1, a2] {
            reported(node, "b", |spare| spare > 0.0).await?;
        }
    }
    in_a.stop().await;
    eventually("both callers to be served by zone b", SOON, || async {
        for load in [&first, &second] {
            let tally = load.tally();
            let got = tally.by_backend.get("in-b").copied().unwrap_or(0);
            ensure!(got > 50, "{tally:?}");
        }
        Ok(())
    })
    .await?;
    let refused = async || {
        let mut refused = 0.0;
        for name in ["b1"].into_iter().chain(GATEWAYS) {
            if let Ok(node) = mesh.node(name) {
                let by = ["service=\"app\"", "limit=\"maxRequests\""];
                refused += node.metric("leeward_refused_total", &by).await?;
            }
        }
        anyhow::Ok(refused)
    };
    let before = refused().await?;
    own.take();
    eventually("enough requests to tell", SOON, || async {
        let tally = own.tally();
        ensure!(tally.sent > 600, "{tally:?}");
        Ok(())
    })
    .await?;
    let refused = refused().await? - before;
    let own = own.stop().await;
    first.stop().await;
    second.stop().await;
    Ok((refused, own, mesh))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_spills_over_stays_within_what_the_other_zone_can_spare() -> anyhow::Result<()> {
    stays_within(Ways::Direct).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_stays_within_what_a_zone_behind_gateways_can_spare() -> anyhow::Result<()> {
    stays_within(Ways::ByGateways).await
}

async fn stays_within(ways: Ways) -> anyhow::Result<()> {
    let (refused, own, mesh) = spill("", ways).await?;
    // Its own workloads hardly notice. Without the bound most of what is sent there is refused, see below.
    assert!(refused < 100.0, "{refused} were refused there");
    assert!(own.failed < 100, "{own:?}");
    let held = ["service=\"app\"", "limit=\"spareCapacity\""];
    let kept = mesh.node("a1")?.metric("leeward_refused_total", &held).await?
        + mesh.node("a2")?.metric("leeward_refused_total", &held).await?;
    assert!(kept > 100.0, "{kept}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_reports_are_not_heeded_the_other_zone_refuses_what_it_cannot_bear() -> anyhow::Result<()> {
    let (refused, _, mesh) = spill("remoteReports: false", Ways::Direct).await?;
    assert!(refused > 100.0, "{refused}");
    assert_eq!(spare(mesh.node("a1")?, "b").await?, None);
    let kept = mesh
        .node("a1")?
        .metric("leeward_refused_total", &["limit=\"spareCapacity\""])
        .await?;
    assert!(kept < 0.5, "{kept}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_zone_cannot_spare_goes_to_the_next() -> anyhow::Result<()> {
    let mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "b1")
        .node("c", "c1")
        .start()
        .await?;
    let names = ["in-a", "in-b", "in-c"];
    let backends = names
        .iter()
        .map(|name| Backend::start(name))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for backend in &backends {
        backend.behave(Behave::Late(Duration::from_millis(100), Answer::status(200)));
    }
    let [in_a, in_b, in_c] = &backends[..] else {
        anyhow::bail!("three were started");
    };
    let endpoints = [
        (in_a.address(), "a", "a1"),
        (in_b.address(), "b", "b1"),
        (in_c.address(), "c", "c1"),
    ];
    let pool = "connectionPool: {maxRequests: 40}";
    mesh.apply(&(service("app", &endpoints, &[pool]) + &route("app", "app.example", "app", &[])))
        .await?;
    // Most of what zone b bears is used by its own, which go nowhere else.
    let load = |name: &str, clients| {
        let node = mesh.node(name)?;
        let to = ("app.example", "/");
        anyhow::Ok(Load::start(node.outbound, Protocol::Http1, to, clients, PAUSE))
    };
    let (own, callers) = (load("b1", 30)?, load("a1", 30)?);
    let node = mesh.node("a1")?;
    reported(node, "b", |spare| spare > 0.0).await?;
    reported(node, "c", |spare| spare > 0.0).await?;
    in_a.stop().await;
    eventually(
        "a second in which both zones serve and nothing fails",
        SOON,
        || async {
            callers.take();
            tokio::time::sleep(Duration::from_secs(1)).await;
            let tally = callers.take();
            let of = |name: &str| tally.by_backend.get(name).copied().unwrap_or(0);
            ensure!(
                tally.failed == 0 && of("in-b") > 0 && of("in-c") > of("in-b"),
                "{tally:?}"
            );
            Ok(())
        },
    )
    .await?;
    own.take();
    eventually("enough requests to tell", SOON, || async {
        let tally = own.tally();
        ensure!(tally.sent > 300, "{tally:?}");
        Ok(())
    })
    .await?;
    let own = own.stop().await;
    assert!(own.failed < 10, "{own:?}");
    callers.stop().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_gateway_is_no_lost_zone_and_two_have_no_more_room_than_one() -> anyhow::Result<()> {
    let mut mesh = start(&["a1", "b1", "c1"], Ways::ByGateways).await?;
    let (in_b, in_c) = (Backend::start("in-b")?, Backend::start("in-c")?);
    let endpoints = [(in_b.address(), "b", "b1"), (in_c.address(), "c", "c1")];
    let pool = format!("connectionPool: {{maxRequests: {BEARS}}}");
    let again = ["retry: {retryOn: [ConnectFailure, RefusedStream, Reset]}"];
    mesh.apply(&(service("app", &endpoints, &[&pool]) + &route("app", "app.example", "app", &again)))
        .await?;
    let load = Load::start(
        mesh.node("a1")?.outbound,
        Protocol::Http1,
        ("app.example", "/"),
        4,
        PAUSE,
    );
    // One caller is told half of what is spare, however many tell it: of two it would be all.
    let half = f64::from(u32::try_from(BEARS)?) / 2.0;
    let within = |spare: f64| spare > 0.0 && spare <= half;
    reported(mesh.node("a1")?, "b", within).await?;
    mesh.node_mut("g1")?.process.kill9()?;
    eventually("the lost gateway to be left", SOON, || async {
        let up = mesh
            .node("a1")?
            .metric("leeward_zone_gateway_up", &["gateway=\"g1\""])
            .await?;
        ensure!(up < 0.5, "{up}");
        Ok(())
    })
    .await?;
    load.take();
    let before = attempts(mesh.node("a1")?, "c").await?;
    // Longer than what it has said last counts.
    let (mut least, mut most) = (f64::MAX, 0.0f64);
    for _ in 0..40 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let spare = spare(mesh.node("a1")?, "b").await?;
        let spare = spare.ok_or_else(|| anyhow::anyhow!("zone b is not heard of any more"))?;
        (least, most) = (least.min(spare), most.max(spare));
    }
    assert!(within(least) && within(most), "{least} to {most}");
    let tally = load.stop().await;
    assert_eq!(tally.failed, 0, "{tally:?}");
    assert!(
        tally.by_backend.get("in-b").is_some_and(|got| *got > 500),
        "{tally:?}"
    );
    let elsewhere = attempts(mesh.node("a1")?, "c").await? - before;
    assert!(elsewhere < 0.5, "{elsewhere} went to zone c");
    Ok(())
}

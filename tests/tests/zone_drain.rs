//! A zone is taken out of use for a while; and requests that may not leave the zones of one label.

use anyhow::{Context, ensure};
use leeward_proto::v1;
use leeward_testkit::policy::{fallback, route, service};
use leeward_testkit::{Backend, Load, Mesh, Node, Protocol, eventually, leeward};
use std::cell::Cell;
use std::process::Output;
use std::time::Duration;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(20);
/// What a step is in these tests, and how long it takes.
const STEP: f64 = 0.25;
const INTERVAL: Duration = Duration::from_secs(1);

async fn share(node: &Node, zone: &str) -> anyhow::Result<f64> {
    let label = format!("zone=\"{zone}\"");
    node.metric("leeward_zone_share", &["service=\"app\"", label.as_str()])
        .await
}

async fn has(node: &Node, zone: &str, wanted: f64) -> anyhow::Result<()> {
    let share = share(node, zone).await?;
    ensure!((share - wanted).abs() < 1e-3, "{share}");
    Ok(())
}

async fn until(node: &Node, zone: &str, wanted: f64) -> anyhow::Result<()> {
    let what = format!("zone {zone} to have {wanted} of the requests");
    eventually(&what, SOON, || has(node, zone, wanted)).await
}

/// Waits until a share has been what is wanted for a while. What the checks of this proxy say of an endpoint and what its own
/// zone's say come at different times, and a zone's share may go back and forth in between.
async fn settled(node: &Node, zone: &str, wanted: f64) -> anyhow::Result<()> {
    let what = format!("zone {zone} to have {wanted} of the requests for {INTERVAL:?}");
    let since = Cell::new(Instant::now());
    eventually(&what, SOON, || async {
        has(node, zone, wanted)
            .await
            .inspect_err(|_| since.set(Instant::now()))?;
        ensure!(since.get().elapsed() >= INTERVAL, "not for long enough yet");
        Ok(())
    })
    .await
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

async fn works(mesh: &Mesh, args: &[&str]) -> anyhow::Result<String> {
    let output = leeward(mesh, args).await?;
    ensure!(output.status.success(), "{args:?}: {}", said(&output));
    Ok(said(&output))
}

/// Sets a label of a zone.
async fn label(mesh: &Mesh, zone: &str, key: &str, value: &str) -> anyhow::Result<()> {
    let mut resource = mesh.get(v1::Kind::Zone, zone).await?;
    let Some(v1::resource::Spec::Zone(spec)) = &mut resource.spec else {
        anyhow::bail!("{resource:?}");
    };
    spec.labels.insert(key.to_owned(), value.to_owned());
    let request = v1::ApplyRequest {
        resources: vec![resource],
        dry_run: false,
        ..v1::ApplyRequest::default()
    };
    let applied = mesh.api().apply(request).await.context("apply")?;
    mesh.converge(applied.into_inner().revision).await
}

/// Follows a share until it is what is wanted; it moves no faster than a step each interval.
async fn follow(node: &Node, begun: Instant, from: f64, to: f64) -> anyhow::Result<()> {
    let mut seen = Vec::new();
    while begun.elapsed() < SOON {
        let share = share(node, "a").await?;
        let steps = (begun.elapsed().as_secs_f64() / INTERVAL.as_secs_f64()).floor() + 1.0;
        seen.push((begun.elapsed(), share));
        ensure!((share - from).abs() <= STEP * steps + 1e-6, "{seen:?}");
        if (share - to).abs() < 1e-3 {
            let least = INTERVAL.mul_f64(1.0 / STEP - 1.0);
            ensure!(begun.elapsed() >= least, "too fast: {seen:?}");
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("it never came to {to}: {seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zone_is_drained_step_by_step_and_comes_back_without_a_failed_request() -> anyhow::Result<()> {
    let mut mesh = Mesh::two_zones().await?;
    let (here, there) = (Backend::start("here")?, Backend::start("there")?);
    let spec = |factor: u32| {
        let endpoints = [(here.address(), "a", "a1"), (there.address(), "b", "b1")];
        let balance = format!(
            "loadBalancer: {{zoneFailover: {{overprovisioningFactor: {factor}, leaveAfter: 1s, returnAfter: 1s, \
             returnInterval: 100ms}}, slowStartWindow: 0s}}"
        );
        let check = "healthCheck: {http: {path: /healthz}, interval: 100ms, intervalJitter: 0, \
                     unhealthyThreshold: 1, healthyThreshold: 1}";
        service("app", &endpoints, &[&balance, check]) + &route("app", "app.example", "app", &[])
    };
    mesh.apply(&spec(140)).await?;
    let node = mesh.node("a1")?;
    let pause = Duration::from_millis(5);
    let load = Load::start(node.outbound, Protocol::Http1, ("app.example", "/"), 2, pause);
    until(node, "a", 1.0).await?;

    // Two zones that are alike can't carry each other's load at 140 %, and can at 200 %.
    let dry = ["zone", "drain", "a", "--dry-run"];
    let output = leeward(&mesh, &dry).await?;
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let text = said(&output);
    assert!(
        text.contains("40 %") && text.contains("can't carry all of app"),
        "{text}"
    );
    mesh.apply(&spec(200)).await?;
    let text = works(&mesh, &dry).await?;
    assert!(text.contains("100 %"), "{text}");
    assert!(
        (share(node, "a").await? - 1.0).abs() < 1e-6,
        "a dry run does nothing"
    );
    load.take();

    let begun = Instant::now();
    let drain = [
        "zone",
        "drain",
        "a",
        "--step",
        "25",
        "--interval",
        "1s",
        "--reason",
        "new switches",
    ];
    works(&mesh, &drain).await?;
    follow(node, begun, 1.0, 0.0).await?;
    let moved = load.take();
    assert_eq!(moved.failed, 0, "{moved:?}");
    assert!(moved.by_backend.contains_key("here") && moved.by_backend.contains_key("there"));
    // What was under way at the last step has ended by then.
    tokio::time::sleep(Duration::from_millis(500)).await;
    load.take();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = load.take();
    assert_eq!(after.failed, 0, "{after:?}");
    assert!(!after.by_backend.contains_key("here"), "{after:?}");
    let listed = works(&mesh, &["zone", "list"]).await?;
    assert!(
        listed.contains("0 %") && listed.contains("new switches"),
        "{listed}"
    );

    // The last resort: nobody else is well.
    there.set_health(false);
    until(node, "a", 1.0).await?;
    there.set_health(true);
    settled(node, "a", 0.0).await?;
    let resort = load.take();
    assert_eq!(resort.failed, 0, "{resort:?}");

    let begun = Instant::now();
    works(&mesh, &["zone", "undrain", "a"]).await?;
    follow(node, begun, 0.0, 1.0).await?;

    // It ends by itself, also where no control plane can be reached.
    let drain = [
        "zone",
        "drain",
        "a",
        "--step",
        "50",
        "--interval",
        "1s",
        "--expiry",
        "8s",
    ];
    works(&mesh, &drain).await?;
    until(mesh.node("a1")?, "a", 0.0).await?;
    mesh.kill_control()?;
    until(mesh.node("a1")?, "a", 1.0).await?;
    let back = load.stop().await;
    assert_eq!(back.failed, 0, "{back:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_stay_where_the_label_of_their_zone_holds() -> anyhow::Result<()> {
    let mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "b1")
        .node("c", "c1")
        .start()
        .await?;
    let (dead, us, eu) = (
        Backend::start("dead")?,
        Backend::start("us")?,
        Backend::start("eu")?,
    );
    let two = [(dead.address(), "a", "a1"), (us.address(), "b", "b1")];
    let within = ["loadBalancer: {zoneFailover: {within: region}}"];
    let policy = |endpoints: &[(std::net::SocketAddr, &str, &str)]| {
        service("app", endpoints, &within)
            + &fallback("elsewhere", &["zone: {}"], &[])
            + &route("app", "app.example", "app", &["fallback: elsewhere"])
    };
    let refused = mesh.apply_only(&policy(&two)).await;
    let refused = format!("{:#}", refused.err().context("no zone has such a label")?);
    assert!(refused.contains("is not a label of any zone"), "{refused}");

    label(&mesh, "a", "region", "eu").await?;
    label(&mesh, "b", "region", "us").await?;
    mesh.apply(&policy(&two)).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    assert_eq!(client.get("app.example", "/").await?.backend(), "dead");
    dead.stop().await;
    // Neither failover nor panic nor the zone rung gets there, however long the zone is dead.
    for _ in 0..40 {
        let reply = client.get("app.example", "/").await?;
        assert!((502..=504).contains(&reply.status.as_u16()), "{reply:?}");
        assert_eq!(
            (reply.backend(), reply.header("leeward-reason").is_empty()),
            ("", false),
            "{reply:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(us.requests(), 0);
    let dry = leeward(&mesh, &["zone", "drain", "a", "--dry-run"]).await?;
    assert_eq!(dry.status.code(), Some(1), "{}", said(&dry));
    assert!(said(&dry).contains("another region: b"), "{}", said(&dry));

    // One in the same region helps at once; one without the label doesn't.
    let three = [two[0], two[1], (eu.address(), "c", "c1")];
    mesh.apply(&policy(&three)).await?;
    assert_eq!(client.get("app.example", "/").await?.backend(), "");
    label(&mesh, "c", "region", "eu").await?;
    eventually("the other zone of the region to help", SOON, || async {
        let reply = client.get("app.example", "/").await?;
        ensure!(reply.backend() == "eu", "{reply:?}");
        Ok(())
    })
    .await?;
    // Callers of the other region are served there.
    let theirs = mesh.workload("b1", Protocol::Http1)?;
    assert_eq!(theirs.get("app.example", "/").await?.backend(), "us");
    Ok(())
}

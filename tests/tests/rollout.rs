//! A change that breaks something is stopped at its first proxy and goes back by itself; users of the others see nothing.

#![allow(clippy::indexing_slicing, reason = "a test fails by panicking")]

use anyhow::{Context, ensure};
use leeward_proto::v1;
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Answer, Backend, Behave, Load, Mesh, Protocol, Tally, eventually, leeward};
use serde_json::Value;
use std::process::Output;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);
const NODES: [(&str, &str); 4] = [("a", "a1"), ("a", "a2"), ("b", "b1"), ("b", "b2")];
/// One proxy, one zone, all. The first is watched for long: what is to happen in it is up to the test.
const POLICY: &str = "
---
apiVersion: leeward.dev/v1
kind: RolloutPolicy
metadata: {name: default}
spec:
  stages: [{proxies: 1, hold: 1h}, {zoneCount: 1, hold: 1s}, {hold: 1s}]
";

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

async fn works(mesh: &Mesh, args: &[&str]) -> anyhow::Result<String> {
    let output = leeward(mesh, args).await?;
    ensure!(output.status.success(), "{args:?}: {}", said(&output));
    Ok(said(&output))
}

async fn status(mesh: &Mesh) -> anyhow::Result<Value> {
    let text = works(mesh, &["rollout", "status", "-o", "json"]).await?;
    Ok(serde_json::from_str(&text)?)
}

async fn until_phase(mesh: &Mesh, phase: &str) -> anyhow::Result<Value> {
    eventually(phase, SOON, || async {
        let status = status(mesh).await?;
        ensure!(status["phase"] == phase, "{status:#}");
        Ok(())
    })
    .await?;
    status(mesh).await
}

async fn start() -> anyhow::Result<Mesh> {
    let mut mesh = Mesh::builder();
    for (zone, name) in NODES {
        mesh = mesh.node(zone, name);
    }
    mesh.start().await
}

/// Users at each node.
fn users(mesh: &Mesh) -> anyhow::Result<Vec<(&'static str, Load)>> {
    let pause = Duration::from_millis(10);
    let user = |(_, name): &(&str, &'static str)| {
        let to = mesh.node(name)?.outbound;
        let load = Load::start(to, Protocol::Http1, ("app.example", "/"), 1, pause);
        anyhow::Ok((*name, load))
    };
    NODES.iter().map(user).collect()
}

/// Requests that the service did not answer.
fn lost(tally: &Tally) -> u64 {
    tally.sent - tally.by_backend.get("app").copied().unwrap_or(0)
}

/// A backend that takes its time.
fn slow() -> anyhow::Result<Backend> {
    let backend = Backend::start("app")?;
    backend.behave(Behave::Late(Duration::from_millis(30), Answer::text("app")));
    Ok(backend)
}

fn app(backend: &Backend, more: &[&str]) -> String {
    let endpoints = [(backend.address(), "a", "")];
    service("app", &endpoints, &[]) + &route("app", "app.example", "app", more)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_policy_stops_at_its_first_proxy_and_nobody_else_sees_it() -> anyhow::Result<()> {
    let mesh = start().await?;
    let backend = slow()?;
    mesh.apply(&(app(&backend, &[]) + POLICY)).await?;
    let users = users(&mesh)?;
    for (bad, what) in [
        ("timeouts: {request: 5ms}", "fail with the change"),
        (
            "matches: [{headers: [{name: x-wrong, exact: \"1\"}]}]",
            "outbound requests",
        ),
    ] {
        for (_, load) in &users {
            load.take();
        }
        let revision = mesh.apply_only(&app(&backend, &[bad])).await?;
        let over = until_phase(&mesh, "rolled back").await?;
        ensure!(over["revision"] == revision, "{over:#}");
        let why = over["why"].as_str().context("why")?;
        ensure!(why.contains(what), "{why}");
        let by = over["rolledBackBy"].as_u64().context("rolledBackBy")?;
        mesh.converge(by).await?;
        let seen: Vec<_> = users.iter().map(|(name, load)| (*name, load.take())).collect();
        let hit: Vec<_> = seen
            .iter()
            .filter(|(_, tally)| lost(tally) > 0)
            .map(|(name, _)| *name)
            .collect();
        ensure!(hit.len() == 1, "{seen:?}");
        ensure!(seen.iter().all(|(_, tally)| tally.served > 0), "{seen:?}");
        // From then on, nobody does.
        eventually("requests after it", SOON, || async {
            for (name, load) in &users {
                let tally = load.take();
                ensure!(tally.sent > 0 && lost(&tally) == 0, "{name}: {tally:?}");
            }
            Ok(())
        })
        .await?;
    }
    let history = works(&mesh, &["history"]).await?;
    ensure!(history.contains("takes back"), "{history}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_killed_in_between_goes_on_and_what_is_good_gets_everywhere() -> anyhow::Result<()> {
    let mut mesh = start().await?;
    let backend = slow()?;
    mesh.apply(&(app(&backend, &[]) + POLICY)).await?;
    let users = users(&mesh)?;
    let revision = mesh
        .apply_only(&app(&backend, &["timeouts: {request: 9s}"]))
        .await?;
    let runs = async |mesh: &Mesh| -> anyhow::Result<Vec<String>> {
        let known = mesh.proxies().await?.proxies;
        let run = known
            .into_iter()
            .filter(|p| p.connected && p.generation >= revision);
        Ok(run.map(|proxy| proxy.name).collect())
    };
    eventually("one to have it", SOON, || async {
        let runs = runs(&mesh).await?;
        ensure!(runs.len() == 1, "{runs:?}");
        Ok(())
    })
    .await?;
    let chosen = runs(&mesh).await?;
    let late = leeward(&mesh, &["wait", "--for=99%", "--timeout", "1s"]).await?;
    ensure!(late.status.code() == Some(1), "{}", said(&late));
    ensure!(
        said(&late).contains("1 of 4 proxies run it (25.00 %)"),
        "{}",
        said(&late)
    );

    mesh.kill_control()?;
    mesh.start_control().await?;
    eventually("all to be back", SOON, || async {
        let known = mesh.proxies().await?.proxies;
        ensure!(known.iter().filter(|p| p.connected).count() == 4, "{known:?}");
        Ok(())
    })
    .await?;
    ensure!(runs(&mesh).await? == chosen);
    works(&mesh, &["rollout", "promote"]).await?;
    works(
        &mesh,
        &[
            "wait",
            "--revision",
            &revision.to_string(),
            "--for",
            "100%",
            "--timeout",
            "15s",
        ],
    )
    .await?;
    let over = until_phase(&mesh, "promoted").await?;
    ensure!(over["revision"] == revision, "{over:#}");
    for (name, load) in &users {
        let tally = load.take();
        ensure!(lost(&tally) == 0, "{name}: {tally:?}");
    }

    // Taken back by hand, from history.
    let back = works(&mesh, &["rollback", &(revision - 1).to_string(), "--dry-run"]).await?;
    ensure!(back.contains("Route/app changed") && back.contains("-"), "{back}");
    works(&mesh, &["rollback", &(revision - 1).to_string()]).await?;
    works(&mesh, &["wait", "--for", "100%", "--timeout", "15s"]).await?;
    let route = mesh.get(v1::Kind::Route, "app").await?;
    let Some(v1::resource::Spec::Route(route)) = route.spec else {
        anyhow::bail!("{route:?}");
    };
    ensure!(route.rules[0].timeouts.is_none(), "{route:?}");
    Ok(())
}

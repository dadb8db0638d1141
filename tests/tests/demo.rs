//! The command line: the demo keeps its promises, and the other commands do what they say.

use anyhow::{Context, ensure};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Backend, Mesh, Process, Protocol, binaries, eventually};
use serde_json::Value;
use std::process::{Command, Output};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_keeps_its_promises_in_under_a_minute() -> anyhow::Result<()> {
    let dir = leeward_testkit::TempDir::new()?;
    let mut command = Command::new(binaries::path("leeward")?);
    command.args(["demo", "--json"]);
    let mut demo = Process::spawn("demo", command, dir.path())?;
    let status = demo
        .wait(Duration::from_secs(60))
        .await
        .context("the demo doesn't end")?;
    let log = demo.log()?;
    ensure!(status.success(), "{status}:\n{log}");
    let summary: Value = serde_json::from_str(log.lines().last().context("it said nothing")?)?;
    let phases = summary
        .get("phases")
        .and_then(Value::as_array)
        .context("no phases")?;
    let names: Vec<_> = phases
        .iter()
        .filter_map(|p| p.get("name").and_then(Value::as_str))
        .collect();
    for name in [
        "steady",
        "recommendations switched off",
        "payment stopped",
        "payment back",
        "catalog stopped in both zones",
        "held at core-only",
    ] {
        ensure!(names.contains(&name), "no phase {name}: {summary:#}");
    }
    let count = |of: &Value, key: &str| of.get(key).and_then(Value::as_u64);
    let (mut degraded, mut taken, mut pending) = (0, 0, 0);
    for phase in phases {
        let (served, failed) = (count(phase, "served"), count(phase, "failed"));
        let less = count(phase, "degraded").context("no degraded")?;
        ensure!(
            served.context("no served")? + less > 0 && failed == Some(0),
            "{phase:#}"
        );
        degraded += less;
        taken += count(phase, "orders").context("no orders")?;
        pending += count(phase, "pending").context("no pending")?;
        let zones = phase
            .get("zones")
            .and_then(Value::as_object)
            .context("no zones")?;
        ensure!(zones.len() == 2, "{phase:#}");
    }
    ensure!(degraded > 0, "nothing was ever degraded: {summary:#}");
    ensure!(
        pending > 0,
        "every order was paid for while payment was down: {summary:#}"
    );
    let orders = summary
        .get("orders")
        .and_then(Value::as_array)
        .context("no orders")?;
    let of = |what: &str| {
        let found = orders
            .iter()
            .find(|o| o.get("what").and_then(Value::as_str) == Some(what));
        found.and_then(|o| count(o, "value"))
    };
    ensure!(of("charges that it made") == Some(taken), "{summary:#}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policy_is_applied_read_and_deleted_from_the_command_line() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let backend = Backend::start("app")?;
    let file = mesh.dir().join("policy.yaml");
    let policy =
        service("app", &[(backend.address(), "a", "")], &[]) + &route("app", "app.example", "app", &[]);
    std::fs::write(&file, &policy)?;
    let file = file.to_str().context("not UTF-8")?;
    let client = mesh.workload("a1", Protocol::Http1)?;

    let out = leeward(&mesh, &["apply", "-f", file]).await?;
    ensure!(out.status.success(), "{out:?}");
    eventually("the route", SOON, || async {
        ensure!(client.get("app.example", "/").await?.backend() == "app");
        Ok(())
    })
    .await?;
    let out = leeward(&mesh, &["get", "route", "app"]).await?;
    ensure!(
        out.status.success() && String::from_utf8_lossy(&out.stdout).contains("app"),
        "{out:?}"
    );
    let out = leeward(&mesh, &["proxies"]).await?;
    let text = String::from_utf8_lossy(&out.stdout);
    ensure!(
        out.status.success() && text.contains("a1") && text.contains("b1"),
        "{out:?}"
    );

    // What is wrong is told with its place, and nothing of the file is taken.
    std::fs::write(file, policy.replace("hostnames", "hostname"))?;
    let out = leeward(&mesh, &["apply", "-f", file]).await?;
    let text = String::from_utf8_lossy(&out.stderr);
    ensure!(!out.status.success(), "{out:?}");
    ensure!(
        text.contains("hostname") && text.contains("did you mean hostnames"),
        "{text}"
    );

    let out = leeward(&mesh, &["delete", "route", "app"]).await?;
    ensure!(out.status.success(), "{out:?}");
    eventually("the end of the route", SOON, || async {
        ensure!(client.get("app.example", "/").await?.status == 404);
        Ok(())
    })
    .await
}

/// Runs the command as the user of the mesh.
async fn leeward(mesh: &Mesh, args: &[&str]) -> anyhow::Result<Output> {
    let mut command = tokio::process::Command::new(binaries::path("leeward")?);
    command
        .args(args)
        .env("LEEWARD_CONTROL", mesh.control_address().to_string());
    command
        .env("LEEWARD_IDENTITY", mesh.identity("user"))
        .kill_on_drop(true);
    let ended = tokio::time::timeout(SOON, command.output()).await;
    Ok(ended.with_context(|| format!("leeward {args:?} doesn't end"))??)
}

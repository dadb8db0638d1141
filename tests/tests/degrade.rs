//! Levels that people hold: at every proxy at once, ended by themselves, and written down.

use anyhow::{Context, ensure};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Answer, Backend, Behave, Client, Mesh, Node, Protocol, binaries, eventually, leeward};
use serde_json::Value;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(20);
const SECOND: Duration = Duration::from_secs(1);
const POLICY: &str = "---\napiVersion: leeward.dev/v1\nkind: DegradationPolicy\nmetadata: {name: checkout}\nspec:\n  levels: [{name: normal}, {name: reduced}, {name: core-only}]\n";
const USER: &str = "spiffe://leeward.test/user/test";

/// What a command says that succeeds.
async fn said(mesh: &Mesh, args: &[&str]) -> anyhow::Result<String> {
    let out = leeward(mesh, args).await?;
    ensure!(out.status.success(), "{args:?}: {out:?}");
    Ok(String::from_utf8(out.stdout)?)
}

async fn json(mesh: &Mesh, args: &[&str], field: &str) -> anyhow::Result<Vec<Value>> {
    let args = [args, &["-o", "json"]].concat();
    let answer: Value = serde_json::from_str(&said(mesh, &args).await?)?;
    let entries = answer.get(field).and_then(Value::as_array).cloned();
    entries.with_context(|| format!("{answer:#}"))
}

fn text<'a>(entry: &'a Value, field: &str) -> &'a str {
    entry.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// The level that is in force at a proxy.
async fn level(node: &Node) -> anyhow::Result<String> {
    let client = Client::new(node.admin, Protocol::Http1);
    let answer: Value = serde_json::from_slice(&client.get("admin", "/degradation").await?.body)?;
    let policies = answer.get("policies").and_then(Value::as_array);
    let found = policies
        .into_iter()
        .flatten()
        .find(|policy| text(policy, "policy") == "checkout");
    Ok(text(found.with_context(|| format!("{answer:#}"))?, "level").to_owned())
}

/// Waits until the proxies are at these levels, and says how long that took since `begun`.
async fn reach(mesh: &Mesh, want: &[(&str, &str)], begun: Instant) -> anyhow::Result<Duration> {
    let wait = eventually("the levels", SOON, || async {
        for (node, want) in want {
            let found = level(mesh.node(node)?).await?;
            ensure!(found == *want, "{node} is at {found}, not at {want}");
        }
        Ok(())
    });
    wait.await?;
    Ok(begun.elapsed())
}

/// The newest changes as `zone: from-to by (why)`, the oldest of them first.
async fn audit(mesh: &Mesh) -> anyhow::Result<Vec<String>> {
    let changes = json(mesh, &["degrade", "history", "checkout"], "changes").await?;
    let line = |c: &Value| {
        format!(
            "{}: {}-{} {} ({})",
            text(c, "zone"),
            text(c, "from"),
            text(c, "to"),
            text(c, "by"),
            text(c, "why")
        )
    };
    Ok(changes.iter().rev().map(line).collect())
}

async fn mesh() -> anyhow::Result<(Mesh, Backend)> {
    let mesh = Mesh::two_zones().await?;
    let backend = Backend::start("pay")?;
    let policy = service("pay", &[(backend.address(), "a", "")], &[])
        + &route("pay", "pay.example", "pay", &[])
        + POLICY;
    mesh.apply(&policy).await?;
    Ok((mesh, backend))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_level_holds_at_every_proxy_within_a_second_until_it_is_let_go_of() -> anyhow::Result<()> {
    let (mesh, _backend) = mesh().await?;
    reach(&mesh, &[("a1", "normal"), ("b1", "normal")], Instant::now()).await?;
    let begun = Instant::now();
    let args = [
        "degrade",
        "checkout",
        "core-only",
        "--for",
        "30m",
        "--reason",
        "payment is slow",
    ];
    let setting = tokio::spawn({
        let (control, identity) = (mesh.control_address(), mesh.identity("user"));
        let program = binaries::path("leeward")?;
        async move {
            let mut command = tokio::process::Command::new(program);
            command
                .args(args)
                .env("LEEWARD_CONTROL", control.to_string())
                .env("LEEWARD_IDENTITY", identity)
                .kill_on_drop(true);
            command.output().await
        }
    });
    let took = reach(&mesh, &[("a1", "core-only"), ("b1", "core-only")], begun).await?;
    assert!(took < SECOND, "{took:?}");
    let out = setting.await??;
    let shown = String::from_utf8_lossy(&out.stdout).into_owned();
    for words in [
        "checkout is held at core-only in all zones until ",
        "to end it earlier: leeward degrade checkout auto",
        "2 of 2 proxies run it",
    ] {
        assert!(shown.contains(words), "{words:?} is not in {out:?}");
    }
    let levels = json(&mesh, &["degrade", "list"], "levels").await?;
    let shown: Vec<_> = levels
        .iter()
        .map(|l| [text(l, "zone"), text(l, "level"), text(l, "by"), text(l, "why")])
        .collect();
    let held = |zone| [zone, "core-only", USER, "payment is slow"];
    assert_eq!(shown, [held("a"), held("b")]);

    let begun = Instant::now();
    let shown = said(&mesh, &["degrade", "checkout", "auto"]).await?;
    assert!(shown.starts_with("checkout is left to its triggers"), "{shown}");
    let took = reach(&mesh, &[("a1", "normal"), ("b1", "normal")], begun).await?;
    assert!(took < SECOND, "{took:?}");
    let shown = said(&mesh, &["degrade", "checkout", "auto"]).await?;
    assert!(shown.starts_with("checkout is not held"), "{shown}");

    // In one zone only, and of two the more degraded one.
    said(
        &mesh,
        &["degrade", "checkout", "core-only", "--for", "1h", "--zone", "b"],
    )
    .await?;
    reach(&mesh, &[("a1", "normal"), ("b1", "core-only")], Instant::now()).await?;
    said(&mesh, &["degrade", "checkout", "reduced", "--for", "1h"]).await?;
    reach(&mesh, &[("a1", "reduced"), ("b1", "core-only")], Instant::now()).await?;
    said(&mesh, &["degrade", "checkout", "auto"]).await?;
    reach(&mesh, &[("a1", "normal"), ("b1", "normal")], Instant::now()).await?;
    let by = |line: &str, why: &str| format!("{line} {USER} ({why})");
    let audit = audit(&mesh).await?;
    assert_eq!(
        audit.get(..5),
        Some(
            [
                by(": normal-core-only", "payment is slow"),
                by(": core-only-normal", "payment is slow"),
                by("b: normal-core-only", ""),
                by("a: normal-reduced", ""),
                by("b: core-only-core-only", ""),
            ]
            .as_slice()
        ),
        "{audit:#?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_level_ends_by_itself_though_the_control_plane_was_killed_meanwhile() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh().await?;
    said(
        &mesh,
        &[
            "degrade", "checkout", "reduced", "--for", "2s", "--reason", "drill",
        ],
    )
    .await?;
    let begun = Instant::now();
    reach(&mesh, &[("a1", "reduced"), ("b1", "reduced")], begun).await?;
    mesh.kill_control()?;
    let took = reach(&mesh, &[("a1", "normal"), ("b1", "normal")], begun).await?;
    assert!(took < 2 * SECOND + SECOND / 2, "{took:?}");
    mesh.start_control().await?;
    let ended = ": reduced-normal expiry (drill)".to_owned();
    let wait = eventually("the end to be written down", SOON, || async {
        let audit = audit(&mesh).await?;
        ensure!(audit.last() == Some(&ended) && audit.len() == 2, "{audit:?}");
        Ok(())
    });
    wait.await?;
    let changes = json(&mesh, &["degrade", "history"], "changes").await?;
    let ids: Vec<_> = changes
        .iter()
        .map(|c| c.get("id").and_then(Value::as_u64))
        .collect();
    assert_eq!(ids, [Some(2), Some(1)]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_is_told_with_what_is() -> anyhow::Result<()> {
    let (mesh, _backend) = mesh().await?;
    for (args, want) in [
        (
            ["degrade", "checkout", "off", "--for", "1m"].as_slice(),
            "leeward: checkout has no level off; there are normal, reduced and core-only\n",
        ),
        (
            &["degrade", "basket", "reduced", "--for", "1m"],
            "leeward: there is no DegradationPolicy basket; there is checkout\n",
        ),
        (
            &["degrade", "checkout", "reduced"],
            "leeward: a level is held for a while; say for how long, such as `leeward degrade checkout reduced --for 30m`\n",
        ),
        (
            &["degrade", "checkout", "auto", "--for", "1m"],
            "leeward: auto lets go of checkout everywhere and at once; it takes no --for, --reason or --zone\n",
        ),
    ] {
        let out = leeward(&mesh, args).await?;
        assert_eq!(
            (out.status.code(), String::from_utf8_lossy(&out.stderr).as_ref()),
            (Some(64), want),
            "{args:?}"
        );
    }
    let out = leeward(&mesh, &["degrade", "checkout", "reduced", "--for", "8d"]).await?;
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        out.status.code() == Some(64) && told.contains("want 1s to 7d"),
        "{told}"
    );
    assert_eq!(audit(&mesh).await?, Vec::<String>::new());
    assert_eq!(said(&mesh, &["degrade", "history"]).await?, "no changes\n");
    Ok(())
}

/// Asks the service through a proxy until dropped, as fast as it answers.
fn load(mesh: &Mesh, node: &str) -> anyhow::Result<JoinSet<()>> {
    let client = mesh.workload(node, Protocol::Http1)?;
    let mut asking = JoinSet::new();
    asking.spawn(async move {
        loop {
            // Failures are what is wanted here.
            drop(client.get("pay.example", "/").await);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    Ok(asking)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_zones_proxies_see_is_judged_by_the_control_plane_for_that_zone() -> anyhow::Result<()> {
    let (mut mesh, backend) = mesh().await?;
    let trigger = "  triggers:\n    - level: core-only\n      errorRate: {service: pay, above: 50, window: 2s, minimumCalls: \
                   10}\n      holdFor: 500ms\n      clearAfter: 1s\n      minStay: 1s\n";
    mesh.apply(&(POLICY.to_owned() + trigger)).await?;
    backend.behave(Behave::Answer(Answer::status(500)));
    let asking = load(&mesh, "a1")?;
    reach(&mesh, &[("a1", "core-only"), ("b1", "normal")], Instant::now()).await?;
    let audit = audit(&mesh).await?;
    let newest = audit.last().context("nothing is written down")?;
    ensure!(
        newest.starts_with("a: normal-core-only trigger 0 (error rate of pay 100"),
        "{audit:?}"
    );
    // Cut off, nothing changes by that alone; and the proxy finds out by itself that the service is well.
    mesh.kill_control()?;
    tokio::time::sleep(SECOND).await;
    ensure!(level(mesh.node("a1")?).await? == "core-only");
    backend.behave(Behave::Answer(Answer::text("well")));
    reach(&mesh, &[("a1", "normal"), ("b1", "normal")], Instant::now()).await?;
    drop(asking);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_zone_sees_holds_everywhere_where_policy_looks_at_the_whole_mesh() -> anyhow::Result<()> {
    let (mesh, backend) = mesh().await?;
    let trigger = "  triggers:\n    - level: reduced\n      scope: Mesh\n      errorRate: {service: pay, above: 50, window: 2s, \
                   minimumCalls: 10}\n      holdFor: 500ms\n      clearAfter: 1s\n      minStay: 1s\n";
    mesh.apply(&(POLICY.to_owned() + trigger)).await?;
    backend.behave(Behave::Answer(Answer::status(500)));
    let asking = load(&mesh, "a1")?;
    reach(&mesh, &[("a1", "reduced"), ("b1", "reduced")], Instant::now()).await?;
    backend.behave(Behave::Answer(Answer::text("well")));
    reach(&mesh, &[("a1", "normal"), ("b1", "normal")], Instant::now()).await?;
    drop(asking);
    Ok(())
}

//! Flags from the control plane to the proxies, and from the proxies to whoever wants to know what became of them.

use anyhow::{Context, ensure};
use http::Request;
use leeward_testkit::policy::{fallback, flags, route, rules, service};
use leeward_testkit::{
    Backend, Body, Client, Mesh, Protocol, Receiver, SpanKind, eventually, get, with_header,
};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(30);
/// Half of the keys each, by the key.
const HALVES: &str = r#"{"halves": {"state": "ENABLED", "variants": {"blue": "b", "green": "g"}, "defaultVariant": "blue",
    "targeting": {"fractional": [{"var": "targetingKey"}, ["blue", 50], ["green", 50]]}}}"#;

/// A flag that is true for requests that say so in `x-on`, and else false.
fn asked_for(key: &str) -> String {
    let said = json!({"if": [{"==": [{"var": "headers.x-on"}, "yes"]}, "on", "off"]});
    json!({key: {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off", "targeting": said}})
        .to_string()
}

fn by(host: &str, header: &'static str, value: &str) -> Request<Body> {
    with_header(get(host, "/"), header, value)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_became_of_flags_is_in_the_span_and_in_the_log() -> anyhow::Result<()> {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0000000f";
    let receiver = Receiver::start()?;
    let mesh = Mesh::builder().node("a", "a1").flag("--access-log", "stdout");
    let mesh = mesh
        .flag("--otlp-endpoint", &receiver.grpc_endpoint())
        .start()
        .await?;
    let app = Backend::start("app")?;
    let policy = flags("shop", HALVES)
        + &flags("asked", &asked_for("asked"))
        + &service("app", &[(app.address(), "a", "")], &[])
        + &fallback(
            "ladder",
            &["{static: {status: 200, body: sorry}, when: {flag: asked}}"],
            &[],
        )
        + &rules(
            "app",
            "app.example",
            &[
                &["backendRefs: [{service: app}]", "when: {flag: missing}"],
                &[
                    "backendRefs: [{service: app, when: {flag: halves, variants: [blue, green], targetingKeyHeader: x-user}}]",
                    "enabled: {flag: missing}",
                    "fallback: ladder",
                ],
            ],
        );
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let request = with_header(by("app.example", "x-on", "yes"), "x-user", "ann");
    let reply = client
        .call(with_header(
            request,
            "traceparent",
            &format!("00-{TRACE}-00f067aa0ba902b7-01"),
        ))
        .await?;
    assert_eq!(reply.header("leeward-degraded"), "ladder/0", "{reply:?}");
    let tree = receiver
        .wait_for(TRACE, SOON, |tree| !tree.spans().is_empty())
        .await?;
    let span = tree
        .spans()
        .iter()
        .find(|s| s.kind == SpanKind::Server)
        .context("no SERVER span")?;
    let key = |name: &str| format!("feature_flag.{name}");
    let told: Vec<_> = span
        .events
        .iter()
        .map(|(name, has)| {
            let get = |name: &str| has.get(&key(name)).map(String::as_str).unwrap_or_default();
            assert_eq!(
                (name.as_str(), get("provider.name")),
                ("feature_flag.evaluation", "leeward")
            );
            (get("key"), get("result.variant"), get("result.reason"))
        })
        .collect();
    let half = told.get(1).map(|seen| seen.1).unwrap_or_default();
    assert!(["blue", "green"].contains(&half), "{told:?}");
    // A flag with the same result is told once.
    assert_eq!(
        told,
        [
            ("missing", "", "error"),
            ("halves", half, "targeting_match"),
            ("asked", "on", "targeting_match")
        ]
    );

    let line = eventually("the line in the log", SOON, || async {
        let log = mesh.node("a1")?.process.log()?;
        let line = log.lines().find(|line| line.contains(TRACE)).context("no line")?;
        Ok(serde_json::from_str::<Value>(line)?)
    })
    .await?;
    let want = json!([
        {"key": "missing", "variant": null, "reason": "error", "by": null},
        {"key": "halves", "variant": half, "reason": "targeting_match", "by": null},
        {"key": "asked", "variant": "on", "reason": "targeting_match", "by": null},
    ]);
    assert_eq!(line.get("flags"), Some(&want), "{line:#}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flag_that_is_flipped_takes_effect_everywhere_and_outlives_the_control_plane() -> anyhow::Result<()>
{
    let mut mesh = Mesh::two_zones().await?;
    let app = Backend::start("app")?;
    let flag = |on: &str| {
        flags("app", &json!({"app-on": {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": on}}).to_string())
    };
    let policy = flag("on")
        + &service("app", &[(app.address(), "a", ""), (app.address(), "b", "")], &[])
        + &fallback("ladder", &["static: {status: 200, body: sorry}"], &[])
        + &route(
            "app",
            "app.example",
            "app",
            &["enabled: {flag: app-on}", "fallback: ladder"],
        );
    mesh.apply(&policy).await?;
    let clients = [
        mesh.workload("a1", Protocol::Http1)?,
        mesh.workload("b1", Protocol::Http1)?,
    ];
    let all_say = |rung: &'static str| {
        let clients = &clients;
        async move {
            for client in clients {
                eventually("the flag's new value", SOON, || async {
                    let reply = client.get("app.example", "/").await?;
                    ensure!(reply.header("leeward-degraded") == rung, "{reply:?}");
                    Ok(())
                })
                .await?;
            }
            anyhow::Ok(())
        }
    };
    all_say("").await?;
    let mut slowest = Duration::ZERO;
    for (on, rung) in [("off", "ladder/0"), ("on", ""), ("off", "ladder/0")] {
        let begun = Instant::now();
        mesh.apply_only(&flag(on)).await?;
        all_say(rung).await?;
        slowest = slowest.max(begun.elapsed());
    }
    println!("a flipped flag took effect on two proxies within {slowest:?}");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");

    mesh.kill_control()?;
    let mut longest = Duration::ZERO;
    for _ in 0..200 {
        for client in &clients {
            let begun = Instant::now();
            let reply = client.get("app.example", "/").await?;
            longest = longest.max(begun.elapsed());
            assert_eq!(reply.header("leeward-degraded"), "ladder/0", "{reply:?}");
        }
    }
    println!("without a control plane the slowest of 400 requests took {longest:?}");
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    assert_eq!(
        Client::new(mesh.node("a1")?.outbound, Protocol::Http2)
            .get("app.example", "/")
            .await?
            .text(),
        "sorry"
    );
    // It goes on once there is one again.
    mesh.start_control().await?;
    eventually("both proxies to be back", SOON, || async {
        mesh.apply(&flag("on")).await
    })
    .await?;
    all_say("").await
}

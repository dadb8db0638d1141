//! The ladder of fallbacks: who answers when a call fails, and what a plugin that misbehaves costs.

use anyhow::ensure;
use http::{Method, Request};
use leeward_testkit::binaries::plugin as built;
use leeward_testkit::policy::{fallback, plugin, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Body, Load, Mesh, Protocol, Reply, bytes_body, eventually, get, request,
};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);

fn degraded(reply: &Reply) -> (u16, &str, String) {
    (
        reply.status.as_u16(),
        reply.header("leeward-degraded"),
        reply.text(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_rung_that_answers_is_the_answer() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (app, spare, dead) = (
        Backend::start("app")?,
        Backend::start("spare")?,
        Backend::refusing("dead")?,
    );
    let resets = Backend::start("resets")?;
    resets.behave(Behave::Reset);
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("resets", &[(resets.address(), "a", "")], &[])
        + &service("spare", &[(spare.address(), "b", "b1")], &[])
        + &service("dead", &[(dead.address(), "a", "")], &[])
        + &service("nobody", &[], &[])
        + &plugin("json", &built("static-json"), "NextRung", "callTimeout: 5s")
        + &fallback(
            "ladder",
            &[
                "service: {service: dead}",
                "plugin: {plugin: json, config: not json}",
                "service: {service: spare}",
                "static: {status: 200, body: never}",
            ],
            &["onStatuses: [500]"],
        )
        + &fallback(
            "json",
            &["plugin: {plugin: json, config: '{\"status\": 203, \"body\": {\"items\": []}}'}"],
            &[],
        )
        + &fallback(
            "fixed",
            &["static: {status: 299, headers: [{name: x-why, value: because}], body: \"sorry\"}"],
            &["on: [NoEndpoint]"],
        )
        + &fallback(
            "hidden",
            &["static: {status: 200, body: hush}"],
            &["hideHeader: true"],
        )
        + &route("app", "app.example", "app", &["fallback: ladder"])
        + &route("json", "json.example", "dead", &["fallback: json"])
        + &route("fixed", "fixed.example", "nobody", &["fallback: fixed"])
        + &route("other", "other.example", "resets", &["fallback: fixed"])
        + &route("hidden", "hidden.example", "dead", &["fallback: hidden"]);
    mesh.apply_with_plugins(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        let reply = client.get("app.example", "/").await?;
        assert_eq!((reply.backend(), reply.header("leeward-degraded")), ("app", ""));

        app.behave(Behave::Flaky(1, 500));
        let reply = client.get("app.example", "/").await?;
        assert_eq!(
            (reply.backend(), reply.header("leeward-degraded")),
            ("spare", "ladder/2"),
            "{reply:?}"
        );
        // 501 is a failure of the app's, and none that policy knows.
        app.behave(Behave::Flaky(1, 501));
        let reply = client.get("app.example", "/").await?;
        assert_eq!(
            (
                reply.status.as_u16(),
                reply.backend(),
                reply.header("leeward-degraded")
            ),
            (501, "app", "")
        );
        app.behave(Behave::Answer(Answer::text("app")));

        let reply = client.get("json.example", "/").await?;
        assert_eq!(degraded(&reply), (203, "json/0", r#"{"items":[]}"#.to_owned()));
        assert_eq!(reply.header("content-type"), "application/json");

        let reply = client.get("fixed.example", "/").await?;
        assert_eq!(degraded(&reply), (299, "fixed/0", "sorry".to_owned()));
        assert_eq!(
            (reply.header("x-why"), reply.header("cache-control")),
            ("because", "no-store")
        );
        // Failures that the policy doesn't act on stay what they are.
        let reply = client.get("other.example", "/").await?;
        assert_eq!(
            (reply.status.as_u16(), reply.header("leeward-degraded")),
            (502, ""),
            "{reply:?}"
        );

        let reply = client.get("hidden.example", "/").await?;
        assert_eq!(degraded(&reply), (200, "", "hush".to_owned()));
    }
    let a1 = mesh.node("a1")?;
    assert!(
        a1.metric("leeward_requests_total", &["outcome=\"degraded\""])
            .await?
            >= 8.0
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_service_is_given_up_in_time_for_its_fallback() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let slow = Backend::start("slow")?;
    slow.behave(Behave::Hang);
    let policy = service("slow", &[(slow.address(), "a", "")], &[])
        + &plugin("json", &built("static-json"), "NextRung", "callTimeout: 5s")
        + &fallback(
            "json",
            &["plugin: {plugin: json, config: '{\"body\": \"cached\"}'}"],
            &[],
        )
        + &route(
            "slow",
            "slow.example",
            "slow",
            &["timeouts: {request: 500ms}", "fallback: json"],
        );
    mesh.apply_with_plugins(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let begun = tokio::time::Instant::now();
    let reply = client.get("slow.example", "/").await?;
    assert_eq!(degraded(&reply), (200, "json/0", "\"cached\"".to_owned()));
    let took = begun.elapsed();
    assert!(
        took < Duration::from_millis(900) && took > Duration::from_millis(400),
        "{took:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_was_sent_is_not_sent_to_another_service() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (app, spare) = (Backend::start("app")?, Backend::start("spare")?);
    app.behave(Behave::Reset);
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("spare", &[(spare.address(), "a", "")], &[])
        + &fallback(
            "ladder",
            &["service: {service: spare}", "static: {status: 202, body: later}"],
            &[],
        )
        + &route("app", "app.example", "app", &["fallback: ladder"]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let reply = client.call(order()).await?;
    assert_eq!(degraded(&reply), (202, "ladder/1", "later".to_owned()));
    assert_eq!((app.requests(), spare.requests()), (1, 0));
    // Where no connection could be made nothing was sent.
    app.stop().await;
    spare.behave(Behave::Echo);
    let reply = client.call(order()).await?;
    assert_eq!(degraded(&reply), (200, "ladder/0", "order".to_owned()));
    Ok(())
}

fn order() -> Request<Body> {
    request(Method::POST, "app.example", "/orders", bytes_body("order"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_plugin_does_wrong_costs_its_call_a_rung_and_nobody_else_anything() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (app, dead) = (Backend::start("app")?, Backend::refusing("dead")?);
    let tricks = [
        "panic",
        "loop",
        "memory",
        "stack",
        "bad-status",
        "hop-by-hop",
        "split",
        "ours",
        "huge",
    ];
    let mut policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("dead", &[(dead.address(), "a", "")], &[])
        + &plugin(
            "rogue",
            &built("misbehave"),
            "NextRung",
            "memory: 4MiB, callTimeout: 20ms",
        )
        // Every one of its faults is to be its own.
        + "  quarantine: {faults: 1000}\n"
        + &plugin("strict", &built("misbehave"), "Fail", "callTimeout: 20ms")
        + &route("app", "app.example", "app", &[]);
    for trick in tricks {
        let rung = format!("plugin: {{plugin: rogue, config: {trick}}}");
        policy += &fallback(trick, &[&rung, "static: {status: 200, body: next}"], &[]);
        policy += &route(
            trick,
            &format!("{trick}.example"),
            "dead",
            &[&format!("fallback: {trick}")],
        );
    }
    policy += &fallback(
        "strict",
        &[
            "plugin: {plugin: strict, config: panic}",
            "static: {status: 200, body: never}",
        ],
        &[],
    );
    policy += &route("strict", "strict.example", "dead", &["fallback: strict"]);
    mesh.apply_with_plugins(&policy).await?;

    let outbound = mesh.node("a1")?.outbound;
    let load = Load::start(
        outbound,
        Protocol::Http1,
        ("app.example", "/"),
        4,
        Duration::from_millis(2),
    );
    let client = mesh.workload("a1", Protocol::Http1)?;
    for round in 0..3 {
        for trick in tricks {
            let begun = tokio::time::Instant::now();
            let reply = client.get(&format!("{trick}.example"), "/").await?;
            let want = (200, format!("{trick}/1"), "next".to_owned());
            let (status, rung, text) = degraded(&reply);
            assert_eq!((status, rung.to_owned(), text), want, "round {round}");
            // The limit of a call, and much for a busy machine.
            assert!(
                begun.elapsed() < Duration::from_secs(2),
                "{trick} took {:?}",
                begun.elapsed()
            );
        }
    }
    let reply = client.get("strict.example", "/").await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-reason")),
        (503, "plugin_fault"),
        "{reply:?}"
    );
    eventually("some load beside it", SOON, || async {
        let tally = load.tally();
        ensure!(tally.served > 200, "{tally:?}");
        Ok(())
    })
    .await?;
    let tally = load.stop().await;
    assert_eq!(tally.failed, 0, "other requests: {tally:?}");
    let a1 = mesh.node("a1")?;
    for (fault, times) in [("trap", 6.0), ("time", 3.0)] {
        let counted = a1
            .metric("leeward_plugin_faults_total", &[&format!("fault=\"{fault}\"")])
            .await?;
        assert!(counted >= times, "{fault}: {counted}\n{}", a1.metrics().await?);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_runaway_loops_at_once_leave_other_requests_alone() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (app, dead) = (Backend::start("app")?, Backend::refusing("dead")?);
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("dead", &[(dead.address(), "a", "")], &[])
        + &plugin(
            "rogue",
            &built("misbehave"),
            "NextRung",
            "callTimeout: 50ms, maxInstances: 2",
        )
        + &fallback(
            "spin",
            &[
                "plugin: {plugin: rogue, config: loop}",
                "static: {status: 200, body: next}",
            ],
            &[],
        )
        + &route("app", "app.example", "app", &[])
        + &route("spin", "spin.example", "dead", &["fallback: spin"]);
    mesh.apply_with_plugins(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    let spin = Load::start(
        outbound,
        Protocol::Http2,
        ("spin.example", "/"),
        16,
        Duration::ZERO,
    );
    eventually("loops", SOON, || async {
        ensure!(spin.tally().degraded > 0);
        Ok(())
    })
    .await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        let begun = tokio::time::Instant::now();
        assert_eq!(client.call(get("app.example", "/")).await?.backend(), "app");
        slowest = slowest.max(begun.elapsed());
    }
    let spun = spin.stop().await;
    assert!(spun.failed == 0 && spun.degraded >= 16, "{spun:?}");
    assert!(slowest < Duration::from_secs(1), "a request took {slowest:?}");
    Ok(())
}

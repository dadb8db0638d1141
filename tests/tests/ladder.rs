//! The ladder, rung by rung: which failures and requests each is for, what it answers, and how that is told.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use anyhow::{Context, ensure};
use http::Method;
use leeward_testkit::policy::{fallback, plugin, resilience, route, rules, service};
use leeward_testkit::{
    Answer, Backend, Behave, Body, Client, Content, Mesh, Port, Protocol, Receiver, Reply, Span, SpanKind,
    binaries, empty_body, eventually, get, request, with_header,
};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);
/// The caller's own span, which isn't exported.
const CALLER: &str = "00f067aa0ba902b7";
/// Every cause that may stand in `on`.
const ALL: &str = "on: [ConnectFailure, Timeout, Reset, NoEndpoint, Overflow, CircuitOpen, Overloaded, RateLimited, Disabled]";

fn built(name: &str) -> String {
    let file = binaries::workspace().join("plugins/built").join(name);
    file.with_extension("wasm").display().to_string()
}

fn degraded(reply: &Reply) -> (u16, &str, String) {
    (
        reply.status.as_u16(),
        reply.header("leeward-degraded"),
        reply.text(),
    )
}

async fn one_zone() -> anyhow::Result<Mesh> {
    Mesh::builder().node("a", "a1").start().await
}

/// A call in a trace of its own, and its SERVER span.
async fn traced(
    client: &Client,
    receiver: &Receiver,
    request: http::Request<Body>,
    n: u32,
) -> anyhow::Result<(Reply, Span)> {
    let trace = format!("4bf92f3577b34da6a3ce929d{n:08x}");
    let request = with_header(request, "traceparent", &format!("00-{trace}-{CALLER}-01"));
    let reply = client.call(request).await?;
    // Another proxy on the way has a SERVER span of its own.
    let is_server =
        |span: &&Span| span.kind == SpanKind::Server && span.attribute("leeward.direction") == "outbound";
    let tree = receiver
        .wait_for(&trace, SOON, |tree| tree.spans().iter().any(|s| is_server(&s)))
        .await?;
    let span = tree.spans().iter().find(is_server).context("no SERVER span")?;
    Ok((reply, span.clone()))
}

/// What a span says of the ladder.
fn told(span: &Span) -> [&str; 4] {
    let keys = [
        "leeward.outcome",
        "leeward.fallback",
        "leeward.fallback.kind",
        "leeward.cause",
    ];
    keys.map(|key| span.attribute(key))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_failure_finds_the_rung_that_is_for_it() -> anyhow::Result<()> {
    let receiver = Receiver::start()?;
    let mesh = Mesh::builder().node("a", "a1");
    let mesh = mesh
        .flag("--otlp-endpoint", &receiver.grpc_endpoint())
        .start()
        .await?;
    let (bad, hang, resets) = (
        Backend::start("bad")?,
        Backend::start("hang")?,
        Backend::start("resets")?,
    );
    bad.behave(Behave::Answer(Answer::status(500)));
    hang.behave(Behave::Hang);
    resets.behave(Behave::Reset);
    let dead = Port::reserve()?;
    let at = |address| [(address, "a", "")];
    let rungs = [
        "{static: {status: 200, body: circuit}, causes: [CircuitOpen]}",
        "{static: {status: 200, body: time}, causes: [Timeout], methods: [GET]}",
        "{static: {status: 200, body: post}, causes: [Timeout, Reset], methods: [POST, PUT]}",
        "{static: {status: 200, body: status}, causes: [UpstreamStatus]}",
        "{static: {status: 200, body: nobody}, causes: [NoEndpoint]}",
        "{static: {status: 200, body: full}, causes: [Overflow]}",
        "{static: {status: 200, body: shed}, causes: [Overloaded]}",
        "{static: {status: 200, body: rate}, causes: [RateLimited]}",
        "{static: {status: 200, body: network}, causes: [ConnectFailure, Reset], methods: [GET, HEAD]}",
        "{static: {status: 200, body: never}, causes: [ZoneDown, PluginFault]}",
        "static: {status: 200, body: others}",
    ];
    let (slow, long) = ("timeouts: {request: 400ms}", "timeouts: {request: 60s}");
    let policy = resilience("forced", &["circuitBreaker: {mode: ForceOpen}"])
        + &resilience("shedding", &["loadShedding: {low: 1, normal: 1, high: 1}"])
        + &fallback("causes", &rungs, &[ALL, "onStatuses: [500]"])
        + &service("open", &at(bad.address()), &["resilience: forced"])
        + &service("bad", &at(bad.address()), &[])
        + &service("hang", &at(hang.address()), &[])
        + &service(
            "resets",
            &at(resets.address()),
            &["outlierDetection: {maxEjectionPercent: 0}"],
        )
        + &service("dead", &at(dead.address()), &[])
        + &service("nobody", &[], &["hold: {maxRequests: 0}"])
        + &service(
            "full",
            &at(hang.address()),
            &["connectionPool: {maxRequests: 1, maxPendingRequests: 0}"],
        )
        + &service(
            "busy",
            &at(hang.address()),
            &["connectionPool: {maxRequests: 4}", "resilience: shedding"],
        )
        + &route(
            "limited",
            "limited.example",
            "bad",
            &["fallback: causes", "rateLimits: [{requests: 1, interval: 1h}]"],
        )
        + &route("open", "open.example", "open", &["fallback: causes"])
        + &route("bad", "bad.example", "bad", &["fallback: causes"])
        + &route("hang", "hang.example", "hang", &["fallback: causes", slow])
        + &route("resets", "resets.example", "resets", &["fallback: causes"])
        + &route("dead", "dead.example", "dead", &["fallback: causes"])
        + &route("nobody", "nobody.example", "nobody", &["fallback: causes"])
        + &rules(
            "held",
            "held.example",
            &[
                &[
                    "matches: [{path: {prefix: /full}}]",
                    "backendRefs: [{service: full}]",
                    "fallback: causes",
                    long,
                ],
                &[
                    "backendRefs: [{service: busy}]",
                    "fallback: causes",
                    long,
                    "priority: {default: Low, header: x-priority}",
                ],
            ],
        );
    mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    // What is never shed fills what is full, and what is nearly so.
    let mut filling = tokio::task::JoinSet::new();
    for path in ["/full", "/", "/", "/"] {
        let request = with_header(get("held.example", path), "x-priority", "critical");
        filling.spawn(async move { Client::new(outbound, Protocol::Http1).call(request).await });
    }
    eventually("all of them to be under way", SOON, || async {
        ensure!(hang.requests() == 4);
        Ok(())
    })
    .await?;

    let client = mesh.workload("a1", Protocol::Http1)?;
    assert_eq!(client.get("limited.example", "/").await?.text(), "status");
    let cases = [
        (Method::GET, "open.example", "/", 0, "circuit", "circuit_open"),
        (Method::POST, "open.example", "/", 0, "circuit", "circuit_open"),
        (Method::GET, "hang.example", "/", 1, "time", "timeout"),
        (Method::PUT, "hang.example", "/", 2, "post", "timeout"),
        (Method::DELETE, "hang.example", "/", 10, "others", "timeout"),
        (Method::GET, "bad.example", "/", 3, "status", "upstream_status"),
        (Method::GET, "nobody.example", "/", 4, "nobody", "no_endpoint"),
        (Method::GET, "held.example", "/full", 5, "full", "overflow"),
        (Method::GET, "held.example", "/", 6, "shed", "overloaded"),
        (Method::GET, "limited.example", "/", 7, "rate", "rate_limited"),
        (Method::GET, "dead.example", "/", 8, "network", "connect_failure"),
        (Method::GET, "resets.example", "/", 8, "network", "reset"),
        (Method::POST, "resets.example", "/", 2, "post", "reset"),
        (Method::DELETE, "resets.example", "/", 10, "others", "reset"),
    ];
    for (n, (method, host, path, rung, body, cause)) in (1..).zip(cases) {
        let what = format!("{method} {host}{path}");
        let (reply, span) = traced(&client, &receiver, request(method, host, path, empty_body()), n).await?;
        let rung = format!("causes/{rung}");
        assert_eq!(degraded(&reply), (200, rung.as_str(), body.to_owned()), "{what}");
        assert_eq!(
            told(&span),
            ["degraded", &rung, "static", cause],
            "{what}: {span:?}"
        );
    }
    let counted = mesh
        .node("a1")?
        .metric(
            "leeward_requests_total",
            &["outcome=\"degraded\"", "route=\"resets\""],
        )
        .await?;
    assert!((counted - 3.0).abs() < 0.1, "{counted}");
    filling.abort_all();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_rung_answers_what_it_says_and_is_told_as_what_it_is() -> anyhow::Result<()> {
    let receiver = Receiver::start()?;
    let mesh = Mesh::builder().node("a", "a1").node("b", "b1");
    let mesh = mesh
        .flag("--otlp-endpoint", &receiver.grpc_endpoint())
        .start()
        .await?;
    let (bad, good) = (Backend::start("bad")?, Backend::start("good")?);
    bad.behave(Behave::Answer(Answer::status(503)));
    // An answer that wants to be kept for long.
    let keep_me = [
        ("cache-control", "public, max-age=600"),
        ("expires", "Thu, 01 Dec 2050 16:00:00 GMT"),
        ("cdn-cache-control", "max-age=600"),
    ];
    good.behave(Behave::Answer(Answer {
        status: 200,
        headers: keep_me
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
            .collect(),
        content: Content::Text("good".into()),
    }));
    let [cache_control, expires, cdn] =
        keep_me.map(|(name, value)| format!("{{name: {name}, value: \"{value}\"}}"));
    let fixed = format!(
        "static: {{status: 203, headers: [{cache_control}, {expires}, {cdn}, {{name: x-why, value: because}}], body: fixed}}"
    );
    let json = r#"plugin: {plugin: json, config: '{"headers": {"Cache-Control": "max-age=60", "Expires": "0"}, "body": 1}'}"#;
    let kinds = [
        ("static", fixed.as_str(), 203, "fixed"),
        ("service", "service: {service: good}", 200, "good"),
        ("zone", "zone: {}", 200, "good"),
        ("plugin", json, 200, "1"),
        (
            "redirect",
            "redirect: {location: \"https://status.example/\", status: 302}",
            302,
            "",
        ),
    ];
    let mut policy = plugin("json", &built("static-json"), "NextRung", "callTimeout: 5s")
        + &service(
            "app",
            &[(bad.address(), "a", ""), (good.address(), "b", "b1")],
            &["outlierDetection: {maxEjectionPercent: 0}"],
        )
        + &service("good", &[(good.address(), "b", "b1")], &[]);
    for (kind, rung, ..) in kinds {
        for (name, more) in [
            (kind.to_owned(), "hideHeader: false"),
            (format!("{kind}-hidden"), "hideHeader: true"),
        ] {
            // The position is the policy's, whatever was passed over before.
            let rungs = ["{fail: {}, causes: [RateLimited]}", rung];
            policy += &fallback(&name, &rungs, &["onStatuses: [503]", more]);
            policy += &route(
                &name,
                &format!("{name}.example"),
                "app",
                &[&format!("fallback: {name}")],
            );
        }
    }
    mesh.apply_with_plugins(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        for (n, (kind, _, status, body)) in (1..).zip(kinds) {
            let n = n + if protocol == Protocol::Http1 { 0 } else { 100 };
            let (reply, span) = traced(&client, &receiver, get(&format!("{kind}.example"), "/"), n).await?;
            let rung = format!("{kind}/1");
            assert_eq!(
                degraded(&reply),
                (status, rung.as_str(), body.to_owned()),
                "{reply:?}"
            );
            assert_eq!(
                told(&span),
                ["degraded", &rung, kind, "upstream_status"],
                "{span:?}"
            );
            assert_eq!(span.attribute("leeward.reason"), "ok");
            assert_eq!(
                reply.headers.get_all("cache-control").iter().count(),
                1,
                "{reply:?}"
            );
            assert_eq!(reply.header("cache-control"), "no-store");
            for gone in ["expires", "cdn-cache-control"] {
                assert!(!reply.headers.contains_key(gone), "{kind}: {reply:?}");
            }
            if kind == "redirect" {
                assert_eq!(reply.header("location"), "https://status.example/");
            }
            let hidden = client.get(&format!("{kind}-hidden.example"), "/").await?;
            assert_eq!(degraded(&hidden), (status, "", body.to_owned()), "{hidden:?}");
            assert_eq!(hidden.header("cache-control"), "no-store");
        }
        // HEAD has the same head, and nothing else.
        let request = request(Method::HEAD, "static.example", "/", empty_body());
        let reply = client.call(request).await?;
        assert_eq!(degraded(&reply), (203, "static/1", String::new()), "{protocol:?}");
        assert_eq!(client.get("static.example", "/").await?.text(), "fixed");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rungs_are_tried_in_order_until_one_answers_or_ends_it() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let (bad, worse, good) = (
        Backend::start("bad")?,
        Backend::start("worse")?,
        Backend::start("good")?,
    );
    bad.behave(Behave::Answer(Answer {
        status: 500,
        headers: vec![("leeward-reason".into(), "forged".into())],
        content: Content::Text("bad".into()),
    }));
    worse.behave(Behave::Answer(Answer::status(429)));
    let dead = Port::reserve()?;
    let at = |address| [(address, "a", "")];
    let calm = ["outlierDetection: {maxEjectionPercent: 0}"];
    let services = resilience("default", &["circuitBreaker: {failureRate: 0}"])
        + &service("bad", &at(bad.address()), &calm)
        + &service("worse", &at(worse.address()), &calm)
        + &service("dead", &at(dead.address()), &calm)
        + &service("good", &at(good.address()), &calm)
        + &plugin("rogue", &built("misbehave"), "NextRung", "callTimeout: 5s")
        + &plugin("json", &built("static-json"), "NextRung", "callTimeout: 5s");
    let declining = [
        "service: {service: dead}",
        "service: {service: worse}",
        "zone: {}",
        "stale: {}",
        "plugin: {plugin: json, config: no JSON}",
    ];
    let with = |last: &[&'static str]| [&declining[..], last].concat();
    let ladders = [
        (
            "answered",
            with(&["service: {service: good}", "static: {status: 200, body: never}"]),
            200,
            "answered/5",
            "",
            "good",
        ),
        (
            "ended",
            with(&[
                "{fail: {status: 418}, methods: [GET]}",
                "static: {status: 200, body: never}",
            ]),
            418,
            "",
            "upstream_status",
            "the call failed: upstream_status\n",
        ),
        (
            "original",
            with(&["{fail: {}, methods: [GET]}", "static: {status: 200, body: never}"]),
            500,
            "",
            "",
            "bad",
        ),
        ("exhausted", with(&[]), 500, "", "", "bad"),
        (
            "passed",
            with(&[
                "{fail: {status: 418}, methods: [PUT]}",
                "static: {status: 200, body: last}",
            ]),
            200,
            "passed/6",
            "",
            "last",
        ),
        (
            "fault",
            vec![
                "{static: {status: 200, body: never}, causes: [PluginFault]}",
                "plugin: {plugin: rogue, config: panic}",
                "{static: {status: 299, body: fault}, causes: [PluginFault]}",
            ],
            299,
            "fault/2",
            "",
            "fault",
        ),
        (
            "no-fault",
            vec![
                "plugin: {plugin: json, config: no JSON}",
                "{static: {status: 200, body: never}, causes: [PluginFault]}",
                "static: {status: 299, body: declined}",
            ],
            299,
            "no-fault/2",
            "",
            "declined",
        ),
    ];
    let mut policy = services;
    for (name, rungs, ..) in &ladders {
        policy += &fallback(name, rungs, &["onStatuses: [500]"]);
        policy += &route(
            name,
            &format!("{name}.example"),
            "bad",
            &[&format!("fallback: {name}")],
        );
    }
    policy += &fallback("dead", &["{fail: {}, causes: [Timeout]}", "{fail: {}}"], &[]);
    policy += &route("dead", "dead.example", "dead", &["fallback: dead"]);
    mesh.apply_with_plugins(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        for (name, _, status, rung, reason, body) in &ladders {
            let reply = client.get(&format!("{name}.example"), "/").await?;
            assert_eq!(
                degraded(&reply),
                (*status, *rung, (*body).to_owned()),
                "{name}: {reply:?}"
            );
            assert_eq!(reply.header("leeward-reason"), *reason, "{name}: {reply:?}");
        }
        let reply = client.get("dead.example", "/").await?;
        assert_eq!(
            (reply.status.as_u16(), reply.header("leeward-degraded")),
            (503, ""),
            "{reply:?}"
        );
        let reason = reply.header("leeward-reason");
        assert!(["connect_failure", "no_endpoint"].contains(&reason), "{reason}");
    }
    Ok(())
}

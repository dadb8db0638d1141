//! Faults that policy injects: who they strike, what they look like, and who must not take them for real.

use anyhow::{Context, ensure};
use leeward_testkit::policy::{fallback, resilience, route, service};
use leeward_testkit::{
    Backend, Client, Mesh, Protocol, Receiver, Span, SpanKind, eventually, get, with_header,
};
use serde_json::Value;
use std::time::Duration;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(30);
/// Causes that a fault may have, with the words for them and the status of a request without a ladder.
const ABORTS: [(&str, &str, u16); 6] = [
    ("ConnectFailure", "connect_failure", 503),
    ("Timeout", "timeout", 504),
    ("Reset", "reset", 502),
    ("NoEndpoint", "no_endpoint", 503),
    ("Overloaded", "overloaded", 503),
    ("CircuitOpen", "circuit_open", 503),
];

async fn server_span(
    client: &Client,
    receiver: &Receiver,
    host: &str,
    n: u32,
) -> anyhow::Result<(Span, usize)> {
    let trace = format!("4bf92f3577b34da6a3ce929d{n:08x}");
    let traceparent = format!("00-{trace}-00f067aa0ba902b7-01");
    client
        .call(with_header(get(host, "/"), "traceparent", &traceparent))
        .await?;
    let tree = receiver
        .wait_for(&trace, SOON, |tree| !tree.spans().is_empty())
        .await?;
    let server = tree.spans().iter().find(|span| span.kind == SpanKind::Server);
    Ok((server.context("no SERVER span")?.clone(), tree.spans().len()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_injected_failure_is_like_a_real_one_and_is_told_apart() -> anyhow::Result<()> {
    let receiver = Receiver::start()?;
    let mesh = Mesh::builder().node("a", "a1").flag("--access-log", "stdout");
    let mesh = mesh
        .flag("--otlp-endpoint", &receiver.grpc_endpoint())
        .start()
        .await?;
    let app = Backend::start("app")?;
    // One failure in a row is enough.
    let breaker = "circuitBreaker: {failureRate: 0, consecutiveFailures: 1, openTime: 60s}";
    let mut policy = resilience("default", &[breaker])
        + &service("app", &[(app.address(), "a", "")], &[])
        + &route("well", "well.example", "app", &[]);
    for (cause, ..) in ABORTS {
        let name = cause.to_lowercase();
        let fault = format!("fault: {{abort: {cause}}}");
        let rungs = [
            format!("{{static: {{status: 200, body: \"${{cause}}\", template: true}}, causes: [{cause}]}}"),
            "static: {status: 200, body: never}".to_owned(),
        ];
        policy += &fallback(&name, &rungs.each_ref().map(String::as_str), &[]);
        policy += &route(
            &name,
            &format!("{name}.example"),
            "app",
            &[&fault, &format!("fallback: {name}"), breaker],
        );
        policy += &route(
            &format!("{name}-bare"),
            &format!("{name}-bare.example"),
            "app",
            &[&fault, breaker],
        );
    }
    mesh.apply(&policy).await?;
    let node = mesh.node("a1")?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for (n, (cause, word, status)) in (1..).zip(ABORTS) {
        let name = cause.to_lowercase();
        for _ in 0..3 {
            let reply = client.get(&format!("{name}.example"), "/").await?;
            assert_eq!(reply.header("leeward-degraded"), format!("{name}/0"), "{reply:?}");
            assert_eq!(reply.text(), word);
            let reply = client.get(&format!("{name}-bare.example"), "/").await?;
            assert_eq!(
                (reply.status.as_u16(), reply.header("leeward-reason")),
                (status, word),
                "{reply:?}"
            );
        }
        let (span, spans) = server_span(&client, &receiver, &format!("{name}.example"), n).await?;
        let told = ["leeward.fault", "leeward.cause", "leeward.outcome"].map(|key| span.attribute(key));
        assert_eq!(
            (told, spans),
            (["true", word, "degraded"], 1),
            "no attempt was made: {span:?}"
        );
    }
    assert_eq!(app.requests(), 0);
    // No circuit has counted any of that.
    let changes = node.metric("leeward_circuit_changes_total", &[]).await?;
    assert!(changes.abs() < 0.1, "{changes}");
    assert_eq!(client.get("well.example", "/").await?.backend(), "app");
    let (span, spans) = server_span(&client, &receiver, "well.example", 100).await?;
    assert!(
        spans == 2 && !span.attributes.contains_key("leeward.fault"),
        "{span:?}"
    );

    let (marked, unmarked) = eventually("lines in the log", SOON, || async {
        let log = node.process.log()?;
        let lines: Vec<Value> = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        let of = |host: &str| {
            lines
                .iter()
                .filter(|l| l.get("host").is_some_and(|h| h == host))
                .cloned()
                .collect::<Vec<_>>()
        };
        let (marked, unmarked) = (of("reset.example"), of("well.example"));
        ensure!(marked.len() == 4 && unmarked.len() == 2, "{log}");
        Ok((marked, unmarked))
    })
    .await?;
    assert!(
        marked
            .iter()
            .all(|line| line.get("fault") == Some(&Value::Bool(true))),
        "{marked:?}"
    );
    assert!(
        unmarked.iter().all(|line| line.get("fault").is_none()),
        "{unmarked:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delay_holds_requests_up_and_ends_with_their_time() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let app = Backend::start("app")?;
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &fallback(
            "ladder",
            &["static: {status: 200, body: \"${cause}\", template: true}"],
            &[],
        )
        + &route("late", "late.example", "app", &["fault: {delay: 300ms}"])
        + &route(
            "both",
            "both.example",
            "app",
            &["fault: {delay: 300ms, abort: Reset}", "fallback: ladder"],
        )
        + &route(
            "over",
            "over.example",
            "app",
            &[
                "fault: {delay: 1m}",
                "fallback: ladder",
                "timeouts: {request: 500ms}",
            ],
        );
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for (host, text, least) in [
        ("late.example", "app", 300),
        ("both.example", "reset", 300),
        ("over.example", "timeout", 450),
    ] {
        let begun = Instant::now();
        let reply = client.get(host, "/").await?;
        let took = begun.elapsed();
        assert_eq!(reply.text(), text, "{host}: {reply:?}");
        assert!(
            took >= Duration::from_millis(least) && took < Duration::from_secs(2),
            "{host}: {took:?}"
        );
    }
    assert_eq!(app.requests(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_strikes_its_share_of_requests() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let app = Backend::start("app")?;
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &route(
            "some",
            "some.example",
            "app",
            &["fault: {abort: Reset, percent: 20}"],
        )
        + &route("all", "all.example", "app", &["fault: {abort: Reset}"]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut struck = 0;
    for _ in 0..1000 {
        struck += u32::from(client.get("some.example", "/").await?.status == 502);
        assert_eq!(client.get("all.example", "/").await?.status, 502);
    }
    // 200 are expected, with a standard deviation of 12.6; six of those either way.
    assert!((125..=275).contains(&struck), "{struck} of 1000");
    assert_eq!(app.requests(), u64::from(1000 - struck));
    Ok(())
}

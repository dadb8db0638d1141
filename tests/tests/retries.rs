//! What is tried again, what never is, and how many times at most.

use anyhow::{Context, ensure};
use http::{Method, Request};
use leeward_testkit::policy::{resilience, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Body, Client, Mesh, Node, Port, Protocol, Receiver, Seen, Span, bytes_body,
    eventually, get, request, with_header,
};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(20);
/// Endpoints take turns and none is left out, so that tests know who is asked.
const IN_TURN: &str = "loadBalancer: {policy: RoundRobin, slowStartWindow: 0s}";
const NONE_OUT: &str = "outlierDetection: {maxEjectionPercent: 0}";

async fn one_node() -> anyhow::Result<Mesh> {
    Mesh::builder()
        .node("a", "a1")
        .flag("--workers", "1")
        .start()
        .await
}

/// `app.example`, whose endpoints are these, in zone a.
fn app(backends: &[&Backend], retry: &[&str]) -> String {
    let endpoints: Vec<_> = backends.iter().map(|b| (b.address(), "a", "")).collect();
    service("app", &endpoints, &[IN_TURN, NONE_OUT]) + &route("app", "app.example", "app", retry)
}

async fn refusals(node: &Node, reason: &str) -> anyhow::Result<f64> {
    let label = format!("reason=\"{reason}\"");
    node.metric("leeward_retries_refused_total", &[label.as_str()])
        .await
}

fn post(path: &str, id: &str) -> Request<Body> {
    let order = request(Method::POST, "app.example", path, bytes_body("order"));
    with_header(order, "x-id", id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_fails_now_and_then_is_hidden() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let (one, two, bad) = (
        Backend::start("one")?,
        Backend::start("two")?,
        Backend::start("bad")?,
    );
    bad.behave(Behave::failing(0.3, 500, 7));
    let retry = ["retry: {retryOn: [5xx, Reset], baseInterval: 1ms}"];
    mesh.apply(&app(&[&one, &bad, &two], &retry)).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for n in 0..300 {
        let reply = client.get("app.example", "/").await?;
        assert_eq!(reply.status, 200, "request {n}: {reply:?}");
    }
    let retries = mesh
        .node("a1")?
        .metric("leeward_retries_total", &["kind=\"retry\""])
        .await?;
    assert!(bad.requests() >= 90, "it was asked {} times", bad.requests());
    assert!(
        (15.0..=60.0).contains(&retries),
        "{retries} of {} failed",
        bad.requests()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_have_been_done_is_not_done_again_unless_that_is_safe() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let (good, resets) = (Backend::start("good")?, Backend::start("resets")?);
    resets.behave(Behave::Reset);
    let retry = ["retry: {retryOn: [5xx, Reset], baseInterval: 1ms}"];
    mesh.apply(&app(&[&good, &resets], &retry)).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for backend in [&good, &resets] {
        backend.count_by("x-id");
    }
    let mut broken = 0;
    for n in 0..20 {
        let reply = client.call(post("/", &format!("plain-{n}"))).await?;
        broken += u64::from(reply.status == 502);
    }
    // Each order was seen once, by one of them or the other.
    let seen = both(&good, &resets);
    assert_eq!(seen.len(), 20, "{seen:?}");
    assert!(seen.values().all(|times| *times == 1), "{seen:?}");
    assert_eq!((broken, resets.requests()), (10, 10));
    assert!(refusals(mesh.node("a1")?, "not_idempotent").await? > 9.5);

    // With a key the workload tells the second from the first.
    for n in 0..20 {
        let order = with_header(
            post("/", &format!("keyed-{n}")),
            "idempotency-key",
            &format!("k{n}"),
        );
        let reply = client.call(order).await?;
        assert_eq!(
            (reply.status.as_u16(), reply.backend()),
            (200, "good"),
            "{reply:?}"
        );
    }
    let again = both(&good, &resets).into_iter().filter(|(_, times)| *times == 2);
    assert_eq!(again.count(), 10);
    assert_eq!((good.requests(), resets.requests()), (30, 20));
    Ok(())
}

fn both(one: &Backend, other: &Backend) -> BTreeMap<String, u64> {
    let mut sum = one.counts();
    for (id, times) in other.counts() {
        *sum.entry(id).or_default() += times;
    }
    sum
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_is_kept_is_sent_again_whole_and_a_larger_one_is_not() -> anyhow::Result<()> {
    let receiver = Receiver::start()?;
    let mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--workers", "1")
        .flag("--access-log", "stdout")
        .flag("--otlp-endpoint", &receiver.grpc_endpoint())
        .flag("--trace-ratio", "1")
        .start()
        .await?;
    let (bad, good) = (Backend::start("bad")?, Backend::start("good")?);
    bad.behave(Behave::Late(Duration::from_millis(150), Answer::status(503)));
    good.behave(Behave::Echo);
    let retry = ["retry: {retryOn: [5xx], baseInterval: 1ms, maxBody: 16KiB}"];
    mesh.apply(&app(&[&bad, &good], &retry)).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let body = |length: usize| -> Vec<u8> { b"abcdefghijk".iter().copied().cycle().take(length).collect() };
    for _ in 0..2 {
        let put = request(Method::PUT, "app.example", "/", bytes_body(body(10 << 10)));
        let reply = client.call(put).await?;
        assert_eq!((reply.status.as_u16(), reply.backend()), (200, "good"));
        assert!(
            reply.body == body(10 << 10),
            "{} bytes came back",
            reply.body.len()
        );
    }
    assert_eq!(bad.requests(), 1);

    let mut refused = 0;
    for _ in 0..2 {
        let put = request(Method::PUT, "app.example", "/", bytes_body(body(64 << 10)));
        let reply = client.call(put).await?;
        refused += u32::from(reply.status == 503);
    }
    assert_eq!((refused, bad.requests()), (1, 2));
    let node = mesh.node("a1")?;
    assert!((refusals(node, "body_too_large").await? - 1.0).abs() < 0.1);
    eventually("access log and span to tell why", SOON, || async {
        let spans = receiver.spans();
        let told = |span: &Span| span.attribute("leeward.retry.gave_up") == "body_too_large";
        ensure!(spans.iter().any(told), "{spans:?}");
        let log = node.process.log()?;
        ensure!(log.contains("\"retry_gave_up\":\"body_too_large\""), "{log}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_stay_within_the_budget_when_everything_fails() -> anyhow::Result<()> {
    const REQUESTS: u64 = 2000;
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backends = [
        Backend::start("one")?,
        Backend::start("two")?,
        Backend::start("three")?,
    ];
    for backend in &backends {
        backend.behave(Behave::Answer(Answer::status(503)));
    }
    let retry = ["retry: {maxAttempts: 3, retryOn: [5xx], baseInterval: 1ms, maxInterval: 2ms}"];
    let all: Vec<_> = backends.iter().collect();
    let budget = ["retryBudget: {percent: 20, window: 10s, minPerSecond: 0}"];
    mesh.apply(&(resilience("default", &budget) + &app(&all, &retry)))
        .await?;
    let outbound = mesh.node("a1")?.outbound;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..8 {
        clients.spawn(async move {
            let client = Client::new(outbound, Protocol::Http1);
            for _ in 0..REQUESTS / 8 {
                let reply = client.get("app.example", "/").await?;
                ensure!(reply.status == 503, "{reply:?}");
            }
            Ok(())
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    let attempts: u64 = backends.iter().map(Backend::requests).sum();
    let factor = attempts as f64 / REQUESTS as f64;
    assert!(
        (1.1..=1.25).contains(&factor),
        "{attempts} attempts of {REQUESTS} requests"
    );
    let exhausted = refusals(mesh.node("a1")?, "budget_exhausted").await?;
    assert!(exhausted > 1000.0, "{exhausted}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_that_is_asked_for_is_kept_if_it_is_short_enough() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let (busy, good) = (Backend::start("busy")?, Backend::start("good")?);
    let retry = ["retry: {retryOn: [5xx]}", "timeouts: {request: 8s}"];
    mesh.apply(&app(&[&busy, &good], &retry)).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;

    busy.behave(Behave::Answer(Answer::status(503).header("retry-after", "1")));
    let mut slowest = Duration::ZERO;
    for _ in 0..2 {
        let begun = Instant::now();
        let reply = client.get("app.example", "/").await?;
        assert_eq!(
            (reply.status.as_u16(), reply.backend()),
            (200, "good"),
            "{reply:?}"
        );
        slowest = slowest.max(begun.elapsed());
    }
    assert_eq!(busy.requests(), 1);
    // Up to half as much again, so that not all come back at once.
    assert!(
        slowest >= Duration::from_millis(990) && slowest < Duration::from_secs(4),
        "{slowest:?}"
    );

    busy.behave(Behave::Answer(Answer::status(503).header("retry-after", "60")));
    let begun = Instant::now();
    let mut sent_away = 0;
    for _ in 0..2 {
        sent_away += u32::from(client.get("app.example", "/").await?.status == 503);
    }
    assert_eq!(sent_away, 1);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    let given_up = refusals(mesh.node("a1")?, "retry_after_too_long").await?;
    assert!((given_up - 1.0).abs() < 0.1, "{given_up}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_hangs_costs_one_attempt_and_not_the_request() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let (hangs, good) = (Backend::start("hangs")?, Backend::start("good")?);
    hangs.behave(Behave::Hang);
    let rule = [
        "retry: {retryOn: [Reset], baseInterval: 1ms}",
        "timeouts: {request: 10s, backendRequest: 300ms}",
    ];
    mesh.apply(&app(&[&hangs, &good], &rule)).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for _ in 0..6 {
        let begun = Instant::now();
        let reply = client.get("app.example", "/").await?;
        assert_eq!(
            (reply.status.as_u16(), reply.backend()),
            (200, "good"),
            "{reply:?}"
        );
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    }
    assert_eq!(hangs.requests(), 3);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_comes_to_an_endpoint_twice() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backends = [
        Backend::start("one")?,
        Backend::start("two")?,
        Backend::start("three")?,
    ];
    for backend in &backends {
        backend.behave(Behave::Answer(Answer::status(503)));
        backend.count_by("x-id");
    }
    let all: Vec<_> = backends.iter().collect();
    let retry = ["retry: {maxAttempts: 5, retryOn: [5xx], baseInterval: 1ms}"];
    let budget = ["retryBudget: {percent: 100, minPerSecond: 100000}"];
    mesh.apply(&(resilience("default", &budget) + &app(&all, &retry)))
        .await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for n in 0..20 {
        let reply = client
            .call(with_header(get("app.example", "/"), "x-id", &format!("n{n}")))
            .await?;
        assert_eq!(reply.status, 503);
    }
    for backend in &backends {
        let counts = backend.counts();
        assert!(
            counts.len() == 20 && counts.values().all(|n| *n == 1),
            "{counts:?}"
        );
    }
    assert!((refusals(mesh.node("a1")?, "no_other_endpoint").await? - 20.0).abs() < 0.1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_is_not_retried_where_it_may_have_been_acted_on() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let (bad, worse) = (Backend::start("bad")?, Backend::start("worse")?);
    for backend in [&bad, &worse] {
        backend.behave(Behave::Answer(Answer::status(503)));
    }
    let (good, dead) = (Backend::start("good")?, Port::reserve()?);
    let endpoints = [(dead.address(), "a", ""), (good.address(), "a", "")];
    let policy = app(&[&bad, &worse], &["retry: {retryOn: [5xx], baseInterval: 1ms}"])
        + &service("half", &endpoints, &[IN_TURN])
        + &route("half", "half.example", "half", &["retry: {retryOn: [5xx]}"]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let marked = |host: &str| with_header(get(host, "/"), "tracestate", "vendor=1,leeward=retry");
    let total = || bad.requests() + worse.requests();

    assert_eq!(client.get("app.example", "/").await?.status, 503);
    assert_eq!(total(), 2, "what is no retry is tried again");
    assert_eq!(client.call(marked("app.example")).await?.status, 503);
    assert_eq!(total(), 3, "what is one is not");
    assert!((refusals(mesh.node("a1")?, "already_a_retry").await? - 1.0).abs() < 0.1);
    // The second attempt of the first told whoever comes next.
    let seen = [bad.take_seen(), worse.take_seen()].concat();
    let told = seen.iter().filter(|seen| {
        let state = header(seen, "tracestate");
        state.split(',').any(|member| member == "leeward=retry")
    });
    assert_eq!(told.count(), 2, "{seen:?}");

    // Where nothing can have been done it is another matter.
    for _ in 0..4 {
        let reply = client.call(marked("half.example")).await?;
        assert_eq!(
            (reply.status.as_u16(), reply.backend()),
            (200, "good"),
            "{reply:?}"
        );
    }
    Ok(())
}

fn header<'a>(seen: &'a Seen, name: &str) -> &'a str {
    let value = seen.headers.get(name).and_then(|value| value.to_str().ok());
    value.unwrap_or_default()
}

/// What `leeward-timeout` or `grpc-timeout` said to a backend that was asked once, in milliseconds.
fn time_left(backend: &Backend, name: &str) -> anyhow::Result<u64> {
    let mut seen = backend.take_seen();
    ensure!(seen.len() == 1, "{seen:?}");
    let seen = seen.pop().context("nothing was seen")?;
    let value = header(&seen, name);
    let (digits, unit) = value
        .split_at_checked(value.len().saturating_sub(1))
        .context("no value")?;
    let number: u64 = digits
        .parse()
        .with_context(|| format!("{name}: {value:?}: {seen:?}"))?;
    Ok(match unit {
        "H" => number * 3_600_000,
        "M" => number * 60_000,
        "S" => number * 1000,
        "m" => number,
        "u" => number / 1000,
        "n" => number / 1_000_000,
        other => anyhow::bail!("{name} in {other:?}"),
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_long_the_caller_waits_shortens_the_limit_and_reaches_the_workload() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (plain, grpc) = (Backend::start("plain")?, Backend::start("grpc")?);
    for backend in [&plain, &grpc] {
        backend.behave(Behave::Hang);
    }
    let limit = ["timeouts: {request: 5s}"];
    let policy = service("near", &[(plain.address(), "a", "")], &[])
        + &service("far", &[(plain.address(), "b", "b1")], &[])
        + &service("grpc", &[(grpc.address(), "b", "b1")], &["protocol: HTTP2"])
        + &route("near", "near.example", "near", &limit)
        + &route("far", "far.example", "far", &limit)
        + &route("grpc", "grpc.example", "grpc", &limit);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for host in ["near.example", "far.example"] {
        let begun = Instant::now();
        let reply = client
            .call(with_header(get(host, "/"), "leeward-timeout", "400m"))
            .await?;
        let took = begun.elapsed();
        assert_eq!(
            (reply.status.as_u16(), reply.header("leeward-reason")),
            (504, "timeout")
        );
        assert!(
            took >= Duration::from_millis(390) && took < Duration::from_secs(3),
            "{host}: {took:?}"
        );
        let left = time_left(&plain, "leeward-timeout")?;
        assert!((100..=400).contains(&left), "{host}: {left} ms");
    }

    let call = request(Method::POST, "grpc.example", "/echo.Echo/Talk", bytes_body(""));
    let call = with_header(call, "content-type", "application/grpc");
    let call = with_header(call, "grpc-timeout", "400m");
    let reply = mesh.workload("a1", Protocol::Http2)?.call(call).await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("grpc-status")),
        (200, "4"),
        "{reply:?}"
    );
    let left = time_left(&grpc, "grpc-timeout")?;
    assert!((100..=400).contains(&left), "{left} ms");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_hop_cuts_what_is_left_to_its_own_limits() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let backend = Backend::start("app")?;
    let policy = service("far", &[(backend.address(), "b", "b1")], &[])
        + &route("whole", "whole.example", "far", &["timeouts: {request: 2s}"])
        + &route(
            "each",
            "each.example",
            "far",
            &[
                "timeouts: {request: 9s, backendRequest: 1s}",
                "retry: {maxAttempts: 2}",
            ],
        );
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for (host, most) in [("whole.example", 2000), ("each.example", 1000)] {
        for said in [None, Some("1H")] {
            let request = match said {
                Some(said) => with_header(get(host, "/"), "leeward-timeout", said),
                None => get(host, "/"),
            };
            assert_eq!(client.call(request).await?.status, 200);
            let left = time_left(&backend, "leeward-timeout")?;
            assert!((most / 2..=most).contains(&left), "{host}, {said:?}: {left} ms");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_statuses_are_conditions_and_a_pushback_is_kept() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let (bad, good) = (Backend::start("bad")?, Backend::start("good")?);
    let unavailable = || {
        Answer::status(200)
            .header("content-type", "application/grpc")
            .header("grpc-status", "14")
    };
    bad.behave(Behave::Answer(unavailable()));
    good.behave(Behave::Grpc);
    let endpoints = [(bad.address(), "a", ""), (good.address(), "a", "")];
    let retry = "retry: {retryOn: [GrpcUnavailable], retryNonIdempotent: true, baseInterval: 1ms}";
    let policy = service("app", &endpoints, &[IN_TURN, NONE_OUT, "protocol: HTTP2"])
        + &route("app", "app.example", "app", &[retry]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http2)?;
    let call = async || {
        // One message of three bytes, uncompressed.
        let message = request(
            Method::POST,
            "app.example",
            "/echo.Echo/Say",
            bytes_body(b"\0\0\0\0\x03abc".to_vec()),
        );
        client
            .call(with_header(message, "content-type", "application/grpc"))
            .await
    };
    for _ in 0..4 {
        let reply = call().await?;
        assert_eq!(
            (reply.backend(), &reply.body[..]),
            ("good", &b"\0\0\0\0\x03abc"[..])
        );
    }
    assert_eq!(bad.requests(), 2);

    bad.behave(Behave::Answer(
        unavailable().header("grpc-retry-pushback-ms", "700"),
    ));
    let mut slowest = Duration::ZERO;
    for _ in 0..2 {
        let begun = Instant::now();
        assert_eq!(call().await?.backend(), "good");
        slowest = slowest.max(begun.elapsed());
    }
    assert!(slowest >= Duration::from_millis(690), "{slowest:?}");

    // Less than nothing is "don't" (gRFC A6).
    bad.behave(Behave::Answer(
        unavailable().header("grpc-retry-pushback-ms", "-1"),
    ));
    let mut refused = 0;
    for _ in 0..2 {
        refused += u32::from(call().await?.header("grpc-status") == "14");
    }
    assert_eq!(refused, 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leave_to_try_again_is_given_back() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let (bad, good) = (Backend::start("bad")?, Backend::start("good")?);
    bad.behave(Behave::Answer(Answer::status(503)));
    let endpoints = [(bad.address(), "a", ""), (good.address(), "a", "")];
    let pool = "connectionPool: {maxRetries: 1}";
    let policy = resilience("default", &["retryBudget: {percent: 100, minPerSecond: 1000}"])
        + &service("app", &endpoints, &[IN_TURN, NONE_OUT, pool])
        + &route(
            "app",
            "app.example",
            "app",
            &["retry: {retryOn: [5xx], baseInterval: 1ms}"],
        );
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for n in 0..40 {
        let reply = client.get("app.example", "/").await?;
        assert_eq!(reply.status, 200, "request {n}: {reply:?}");
    }
    assert_eq!(bad.requests(), 20);

    // While one is under way there is no room for another.
    good.behave(Behave::Late(Duration::from_millis(700), Answer::text("late")));
    let outbound = mesh.node("a1")?.outbound;
    let mut many = tokio::task::JoinSet::new();
    for _ in 0..10 {
        many.spawn(async move {
            Client::new(outbound, Protocol::Http1)
                .get("app.example", "/")
                .await
        });
    }
    let mut refused = 0;
    while let Some(reply) = many.join_next().await {
        refused += u32::from(reply??.status == 503);
    }
    assert_eq!(refused, 4, "of five that failed one was tried again");
    assert!((refusals(mesh.node("a1")?, "too_many_retries").await? - 4.0).abs() < 0.1);
    Ok(())
}

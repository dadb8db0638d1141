//! What the mesh says of a request: spans that form one tree at a real receiver, and counters.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::{Context, ensure};
use http::HeaderValue;
use leeward_testkit::policy::{fallback, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Client, Mesh, Port, Protocol, Receiver, Relay, Reply, Span, SpanKind, Tree,
    eventually, get,
};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);
/// The caller's own span, which isn't exported.
const CALLER: &str = "00f067aa0ba902b7";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_through_the_mesh_is_one_tree_over_grpc() -> anyhow::Result<()> {
    let receiver = Receiver::start()?;
    one_tree(&receiver, &receiver.grpc_endpoint(), "grpc").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_through_the_mesh_is_one_tree_over_http() -> anyhow::Result<()> {
    let receiver = Receiver::start()?;
    one_tree(&receiver, &receiver.http_endpoint(), "http").await
}

/// frontend (zone b) calls catalog (zone a): caller -> a1 -> b1 -> frontend -> b1 -> a1 -> catalog.
async fn one_tree(receiver: &Receiver, endpoint: &str, protocol: &str) -> anyhow::Result<()> {
    let mesh = traced(endpoint, protocol).await?;
    let (frontend, catalog) = (Backend::start("frontend")?, Backend::start("catalog")?);
    let via = mesh.node("b1")?.outbound;
    frontend.behave(Behave::Relay(Relay {
        via,
        host: "catalog.example".into(),
        path: "/items?max=3".into(),
    }));
    let policy = service("frontend", &[(frontend.address(), "b", "b1")], &[])
        + &service("catalog", &[(catalog.address(), "a", "a1")], &[])
        + &route("frontend", "frontend.example", "frontend", &[])
        + &route(
            "catalog",
            "catalog.example",
            "catalog",
            &["matches: [{path: {prefix: /items}}]"],
        );
    let revision = mesh.apply(&policy).await?;
    let (trace, reply) = call(&mesh.workload("a1", Protocol::Http1)?, "frontend.example", 1).await?;
    assert_eq!((reply.status.as_u16(), reply.text().as_str()), (200, "catalog"));

    // Four proxies' turns, each with a SERVER and a CLIENT span.
    let tree = receiver
        .wait_for(&trace, SOON, |tree| tree.spans().len() >= 8)
        .await?;
    assert_eq!(tree.spans().len(), 8, "\n{}", tree.drawn());
    let chain = chain(&tree)?;
    let kinds: Vec<SpanKind> = chain.iter().map(|span| span.kind).collect();
    let [server, client] = [SpanKind::Server, SpanKind::Client];
    assert_eq!(
        kinds,
        [server, client, server, client, server, client, server, client],
        "\n{}",
        tree.drawn()
    );
    assert_eq!(chain[0].parent, CALLER);
    let zones: Vec<&str> = chain.iter().map(|span| span.attribute("leeward.zone")).collect();
    assert_eq!(
        zones,
        ["a", "b", "b", "b", "b", "a", "a", "a"],
        "\n{}",
        tree.drawn()
    );
    let directions: Vec<&str> = chain
        .iter()
        .step_by(2)
        .map(|span| span.attribute("leeward.direction"))
        .collect();
    assert_eq!(directions, ["outbound", "inbound", "outbound", "inbound"]);
    for span in &chain {
        assert_eq!(span.attribute("http.request.method"), "GET");
        assert_eq!(span.attribute("http.response.status_code"), "200");
        assert!(!span.error && span.times.0 <= span.times.1, "{span:?}");
        assert!(
            !span.attributes.contains_key("http.request.resend_count"),
            "{span:?}"
        );
        assert_eq!(
            span.resource.get("service.name").map(String::as_str),
            Some("leeward-proxy")
        );
    }
    let first = chain[0];
    assert_eq!(first.attribute("leeward.outcome"), "served");
    assert_eq!(first.attribute("leeward.route"), "frontend");
    assert_eq!(first.attribute("leeward.policy.revision"), revision.to_string());
    assert_eq!(first.attribute("server.address"), "frontend.example");
    assert_eq!(first.attribute("url.path"), "/");
    assert_eq!(first.attribute("url.scheme"), "http");
    assert_eq!(first.attribute("network.protocol.version"), "1.1");
    let third = chain[4];
    assert_eq!(
        (third.attribute("url.path"), third.attribute("url.query")),
        ("/items", "max=3")
    );
    assert!(third.name.starts_with("GET /items"), "{:?}", third.name);
    assert_eq!(
        chain[1].attribute("leeward.endpoint"),
        frontend.address().to_string()
    );
    assert_eq!(
        chain[1].attribute("server.port"),
        frontend.address().port().to_string()
    );
    // A child lies within its parent, but for what clocks and rounding add.
    for pair in chain.windows(2) {
        assert!(
            pair[1].times.0 + 2_000_000 >= pair[0].times.0,
            "\n{}",
            tree.drawn()
        );
    }
    // The workloads were told the span right above them.
    let seen = catalog.take_seen().pop().context("no request at the catalog")?;
    assert_eq!(
        seen.headers["traceparent"],
        format!("00-{trace}-{}-01", chain[7].id)
    );
    assert_eq!(seen.headers["tracestate"], "vendor=opaque");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_attempt_is_a_span_that_says_so() -> anyhow::Result<()> {
    let receiver = Receiver::start()?;
    let mesh = traced(&receiver.grpc_endpoint(), "grpc").await?;
    let (good, dead) = (Backend::start("good")?, Port::reserve()?);
    let policy = service(
        "app",
        &[(dead.address(), "a", ""), (good.address(), "a", "")],
        &["loadBalancer: {policy: RoundRobin}"],
    ) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http2)?;
    // The endpoints take turns, so one of two requests meets the dead one first.
    let mut traces = Vec::new();
    for n in 1..=2 {
        let (trace, reply) = call(&client, "app.example", n).await?;
        assert_eq!(reply.backend(), "good");
        traces.push(trace);
    }
    let mut retried = None;
    for trace in &traces {
        let tree = receiver
            .wait_for(trace, SOON, |tree| tree.spans().len() >= 2)
            .await?;
        if tree.spans().len() == 3 {
            retried = Some(tree);
        }
    }
    let tree = retried.context("no request was tried twice")?;
    let [root] = tree.roots()[..] else {
        panic!("\n{}", tree.drawn())
    };
    let [first, second] = tree.children(root)[..] else {
        panic!("\n{}", tree.drawn())
    };
    assert!(first.error && !second.error && !root.error, "\n{}", tree.drawn());
    assert_eq!(first.attribute("error.type"), "connect_failure");
    assert_eq!(first.attribute("leeward.endpoint"), dead.address().to_string());
    assert!(!first.attributes.contains_key("http.request.resend_count"));
    assert_eq!(second.attribute("http.request.resend_count"), "1");
    assert_eq!(second.attribute("http.response.status_code"), "200");
    assert_eq!(root.attribute("network.protocol.version"), "2");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outcomes_are_told_apart_in_spans_and_metrics() -> anyhow::Result<()> {
    let receiver = Receiver::start()?;
    let mesh = traced(&receiver.grpc_endpoint(), "grpc").await?;
    let (app, dead) = (Backend::start("app")?, Port::reserve()?);
    app.behave(Behave::Answer(Answer::status(500)));
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("dead", &[(dead.address(), "a", "")], &[])
        + &fallback("ladder", &["static: {status: 200, body: sorry}"], &[])
        + &route("app", "app.example", "app", &[])
        + &route("dead", "dead.example", "dead", &["fallback: ladder"]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for (n, host, outcome, reason, status, error) in [
        (1, "app.example", "failed", "upstream_status", "500", "500"),
        (2, "dead.example", "degraded", "ok", "200", ""),
        (3, "nowhere.example", "failed", "no_route", "404", ""),
    ] {
        let (trace, _) = call(&client, host, n).await?;
        let tree = receiver
            .wait_for(&trace, SOON, |tree| !tree.roots().is_empty())
            .await?;
        let root = tree
            .spans()
            .iter()
            .find(|s| s.kind == SpanKind::Server)
            .context("no SERVER span")?;
        let told = [
            "leeward.outcome",
            "leeward.reason",
            "http.response.status_code",
            "error.type",
        ];
        let told = told.map(|key| root.attribute(key));
        // The reason of a degraded answer may name what went wrong instead.
        let reason = if outcome == "degraded" { told[1] } else { reason };
        assert_eq!(told, [outcome, reason, status, error], "\n{}", tree.drawn());
        assert_eq!(root.error, !error.is_empty());
        if outcome == "degraded" {
            assert_eq!(root.attribute("leeward.fallback"), "ladder/0");
            assert_eq!(root.attribute("leeward.cause"), "connect_failure");
        }
    }
    // Counters belong to threads and are added up here.
    eventually("the counters", SOON, || async {
        let node = mesh.node("a1")?;
        for (labels, want) in [
            (
                &["outcome=\"failed\"", "route=\"app\"", "status_class=\"5xx\""][..],
                1.0,
            ),
            (&["outcome=\"degraded\"", "route=\"dead\""][..], 1.0),
            (&["outcome=\"failed\"", "reason=\"no_route\""][..], 1.0),
            (&["outcome=\"served\""][..], 0.0),
        ] {
            let counted = node.metric("leeward_requests_total", labels).await?;
            ensure!((counted - want).abs() < 0.1, "{labels:?}: {counted}");
        }
        let timed = node.metric("leeward_request_duration_seconds_count", &[]).await?;
        ensure!((timed - 3.0).abs() < 0.1, "{timed} timed");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_decided_to_sample_is_obeyed_and_bad_contexts_begin_a_new_trace() -> anyhow::Result<()> {
    let receiver = Receiver::start()?;
    let mesh = traced(&receiver.grpc_endpoint(), "grpc").await?;
    let app = Backend::start("app")?;
    let policy = service("app", &[(app.address(), "a", "")], &[]) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let ask = |traceparent: String| {
        let (client, app) = (&client, &app);
        async move {
            let mut request = get("app.example", "/");
            request
                .headers_mut()
                .insert("traceparent", HeaderValue::try_from(traceparent)?);
            client.call(request).await?;
            let seen = app.take_seen().pop().context("no request came")?;
            Ok::<_, anyhow::Error>(seen.headers["traceparent"].to_str()?.to_owned())
        }
    };
    let unsampled = format!("{:032x}", 77);
    let sent = ask(format!("00-{unsampled}-{CALLER}-00")).await?;
    assert!(
        sent.starts_with(&format!("00-{unsampled}-")) && sent.ends_with("-00"),
        "{sent}"
    );
    assert!(!sent.contains(CALLER), "{sent}");
    let zeros = "0".repeat(32);
    for bad in [
        format!("00-{zeros}-{CALLER}-01"),
        format!("00-{unsampled}-{}-01", "0".repeat(16)),
        format!("ff-{unsampled}-{CALLER}-01"),
        format!("00-{unsampled}-{CALLER}"),
        format!("00-{unsampled}-{CALLER}-01-extra"),
        format!("00-{}-{CALLER}-01", unsampled.to_uppercase().replace('0', "A")),
        "nonsense".to_owned(),
    ] {
        let sent = ask(bad.clone()).await?;
        assert!(
            sent.len() == 55 && !sent.contains(&unsampled) && !sent.contains(&zeros),
            "{bad}: {sent}"
        );
    }
    // A later version is read as far as it is known.
    let later = format!("{:032x}", 78);
    let sent = ask(format!("01-{later}-{CALLER}-01-more")).await?;
    assert!(sent.starts_with(&format!("00-{later}-")), "{sent}");
    receiver
        .wait_for(&later, SOON, |tree| tree.spans().len() == 2)
        .await?;
    assert!(
        receiver.spans().iter().all(|span| span.trace != unsampled),
        "an unsampled trace was exported"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_is_gone_costs_no_request() -> anyhow::Result<()> {
    let nobody = Port::reserve()?;
    let mesh = traced(&format!("http://{}", nobody.address()), "grpc").await?;
    let app = Backend::start("app")?;
    let policy = service("app", &[(app.address(), "a", "")], &[]) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for n in 0..500 {
        let (_, reply) = call(&client, "app.example", n + 1).await?;
        assert_eq!(reply.status, 200);
    }
    Ok(())
}

/// Two zones whose proxies export everything that is sampled.
async fn traced(endpoint: &str, protocol: &str) -> anyhow::Result<Mesh> {
    let mesh = Mesh::builder().node("a", "a1").node("b", "b1");
    mesh.flag("--otlp-endpoint", endpoint)
        .flag("--otlp-protocol", protocol)
        .start()
        .await
}

/// A call in a trace of its own, whose caller has decided that it is sampled.
async fn call(client: &Client, host: &str, n: u32) -> anyhow::Result<(String, Reply)> {
    let trace = format!("4bf92f3577b34da6a3ce929d{n:08x}");
    let mut request = get(host, "/");
    let headers = request.headers_mut();
    headers.insert(
        "traceparent",
        HeaderValue::try_from(format!("00-{trace}-{CALLER}-01"))?,
    );
    headers.insert("tracestate", HeaderValue::from_static("vendor=opaque"));
    Ok((trace, client.call(request).await?))
}

/// The spans from the root down, if each has one child at most.
fn chain(tree: &Tree) -> anyhow::Result<Vec<&Span>> {
    let roots = tree.roots();
    let [root] = roots[..] else {
        anyhow::bail!("{} roots:\n{}", roots.len(), tree.drawn())
    };
    let mut chain = vec![root];
    loop {
        let children = tree.children(chain[chain.len() - 1]);
        match children[..] {
            [] => return Ok(chain),
            [child] => chain.push(child),
            _ => anyhow::bail!("a fork:\n{}", tree.drawn()),
        }
    }
}

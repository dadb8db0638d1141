//! What clients are told.

use crate::{HOST, QUICK, SOON, location, order, plain_order, policy, reaches, reading, state};
use anyhow::ensure;
use http::Method;
use leeward_testkit::{
    Answer, Backend, Behave, Client, Mesh, Protocol, Receiver, Span, SpanKind, bytes_body, empty_body,
    eventually, request,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_is_taken_in_while_its_service_is_away_and_delivered_when_it_is_back() -> anyhow::Result<()>
{
    let receiver = Receiver::start()?;
    let mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--access-log", "stdout")
        .flag("--otlp-endpoint", &receiver.grpc_endpoint())
        .flag("--trace-ratio", "1")
        .start()
        .await?;
    let orders = Backend::refusing("orders")?;
    mesh.apply(&policy(&orders, QUICK, &[], &[])).await?;
    let mut places = Vec::new();
    for (protocol, key) in [(Protocol::Http1, "key-1"), (Protocol::Http2, "key-2")] {
        let client = mesh.workload("a1", protocol)?;
        let reply = client.call(order(key)).await?;
        let place = location(&reply)?;
        let id = place
            .strip_prefix("/.well-known/leeward/queue/")
            .unwrap_or_default();
        assert_eq!(id.len(), 32, "{place}");
        assert_eq!(reply.header("idempotency-key"), key);
        assert_eq!(reply.header("leeward-degraded"), "later/0");
        assert_eq!(reply.header("cache-control"), "no-store");
        assert_eq!(reply.header("content-type"), "application/json");
        let body: Value = serde_json::from_slice(&reply.body)?;
        let want = serde_json::json!({"id": id, "queue": "orders", "state": "waiting", "status_url": place.as_str()});
        assert_eq!(body, want);
        places.push(place);
    }
    // Who has brought no key is given one.
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut made = Vec::new();
    for _ in 0..2 {
        let reply = client.call(plain_order("no key")).await?;
        made.push(reply.header("idempotency-key").to_owned());
        places.push(location(&reply)?);
    }
    assert!(made[0].len() == 32 && made[0] != made[1], "{made:?}");

    about_the_place(&mesh, &client, &places[0]).await?;
    eventually("span and metrics", SOON, || async {
        let spans = receiver.spans();
        let told = |span: &Span| {
            span.kind == SpanKind::Server
                && span.attribute("http.response.status_code") == "202"
                && span.attribute("leeward.fallback") == "later/0"
                && span.attribute("leeward.fallback.kind") == "queue"
                && ["connect_failure", "no_endpoint"].contains(&span.attribute("leeward.cause"))
        };
        ensure!(spans.iter().filter(|span| told(span)).count() == 4, "{spans:?}");
        let node = mesh.node("a1")?;
        for (metric, labels, want) in [
            ("leeward_queue_entries", "queue=\"orders\"", 4.0),
            ("leeward_queue_entries_total", "event=\"accepted\"", 4.0),
            ("leeward_queue_entries_total", "event=\"delivered\"", 0.0),
            ("leeward_queue_available", "queue=\"orders\"", 1.0),
        ] {
            let found = node.metric(metric, &[labels]).await?;
            ensure!((found - want).abs() < 0.1, "{metric} {labels}: {found}");
        }
        Ok(())
    })
    .await?;

    orders.count_by("idempotency-key");
    orders.resume()?;
    for place in &places {
        let told = reaches(&client, place, "delivered").await?;
        assert_eq!(
            (&told["status"], &told["attempts"]),
            (&200.into(), &1.into()),
            "{told}"
        );
    }
    let keys = ["key-1", "key-2", &made[0], &made[1]];
    let want: BTreeMap<String, u64> = keys.iter().map(|key| ((*key).to_owned(), 1)).collect();
    assert_eq!(orders.counts(), want);
    let seen = orders.take_seen();
    for seen in &seen {
        assert_eq!(
            (seen.method.as_str(), seen.target.as_str()),
            ("POST", "/orders?from=shop")
        );
        assert_eq!(seen.headers["host"], HOST);
    }
    let node = mesh.node("a1")?;
    let delivered = node
        .metric("leeward_queue_entries_total", &["event=\"delivered\""])
        .await?;
    assert!((delivered - 4.0).abs() < 0.1, "{delivered}");
    assert_eq!(reading(node).await?["waiting"], 0);
    Ok(())
}

/// Whoever knows where may ask, in the ways that are for asking, and through the listener that is for workloads.
async fn about_the_place(mesh: &Mesh, client: &Client, place: &str) -> anyhow::Result<()> {
    let told = state(client, place).await?;
    assert_eq!(
        (&told["state"], &told["queue"]),
        (&"waiting".into(), &"orders".into())
    );
    // It is the proxy that answers, whatever the host.
    let reply = client.get("elsewhere.example", place).await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("cache-control")),
        (200, "no-store")
    );
    let head = client
        .call(request(Method::HEAD, HOST, place, empty_body()))
        .await?;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
    for method in [Method::POST, Method::DELETE] {
        let reply = client.call(request(method, HOST, place, bytes_body("x"))).await?;
        assert_eq!((reply.status.as_u16(), reply.header("allow")), (405, "GET, HEAD"));
    }
    let unknown = "0".repeat(32);
    for id in [unknown.as_str(), "", "x", "..%2Fqueues"] {
        let reply = client
            .get(HOST, &format!("/.well-known/leeward/queue/{id}"))
            .await?;
        assert_eq!(reply.status, 404, "{id}: {reply:?}");
    }
    // Another proxy is no workload.
    let reply = crate::inbound(mesh, place).await?;
    assert!(reply.starts_with("HTTP/1.1 503 "), "{reply}");
    assert!(reply.contains("unknown_endpoint"), "{reply}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_acts_and_does_not_answer_is_told_the_same_key_again() -> anyhow::Result<()> {
    let mesh = crate::one().await?;
    let orders = Backend::start("orders")?;
    orders.count_by("idempotency-key");
    mesh.apply(&policy(&orders, QUICK, &[], &["timeouts: {request: 500ms}"]))
        .await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    // It is there, and neither queued nor told apart.
    let reply = client.call(plain_order("one")).await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-degraded")),
        (200, "")
    );
    assert_eq!(orders.counts().len(), 1);

    orders.count_by("idempotency-key");
    // Acts, and is late.
    let late = Behave::Late(Duration::from_secs(2), Answer::status(200));
    orders.behave(late);
    let reply = client.call(plain_order("two")).await?;
    let place = location(&reply)?;
    let made = reply.header("idempotency-key").to_owned();
    orders.behave(Behave::Answer(Answer::status(201)));
    let told = reaches(&client, &place, "delivered").await?;
    assert_eq!(told["status"], 201, "{told}");
    let counts = orders.counts();
    assert_eq!(counts.keys().collect::<Vec<_>>(), [&made], "charged once");
    assert!(counts[&made] >= 2, "{counts:?}");
    Ok(())
}

//! The example plugins for rungs, as built, behind real proxies: with their stores, their calls through the mesh, queues, and
//! answers that were kept.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::ensure;
use http::Method;
use leeward_testkit::binaries::plugin as built;
use leeward_testkit::policy::{fallback, plugin_of, queue, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Mesh, Protocol, Reply, bytes_body, eventually, get, request, with_header,
};
use serde_json::{Value, json};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);
const BOTH: [Protocol; 2] = [Protocol::Http1, Protocol::Http2];

fn body(reply: &Reply) -> anyhow::Result<Value> {
    Ok(serde_json::from_slice(&reply.body)?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ordinary_wasi_http_app_answers_and_calls_only_whom_policy_names() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (catalog, vault, dead) = (
        Backend::start("catalog")?,
        Backend::start("vault")?,
        Backend::refusing("dead")?,
    );
    catalog.behave(Behave::Answer(
        Answer::text("tea").header("content-type", "text/tea"),
    ));
    let more = ["limits: {callTimeout: 2s}", "access: {services: [catalog]}"];
    let policy = service("dead", &[(dead.address(), "a", "")], &[])
        // In another zone: what it is asked goes through the mesh.
        + &service("catalog", &[(catalog.address(), "b", "b1")], &[])
        + &service("vault", &[(vault.address(), "b", "b1")], &[])
        + &plugin_of("page", "WasiHttp", &built("wasi-http-app"), "NextRung", &more)
        + &fallback("page", &["plugin: {plugin: page}"], &[])
        + &route("app", "app.example", "dead", &["fallback: page"]);
    mesh.apply_with_plugins(&policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        let reply = client.get("app.example", "/shop?secret=1").await?;
        assert_eq!(
            (reply.status.as_u16(), reply.header("leeward-degraded")),
            (503, "page/0")
        );
        assert!(
            reply.text().contains("/shop can&#39;t") || reply.text().contains("/shop can't"),
            "{reply:?}"
        );
        let reply = client.get("app.example", "/proxy/catalog/items?n=1").await?;
        assert_eq!((reply.status.as_u16(), reply.text().as_str()), (200, "tea"));
        assert_eq!(reply.header("content-type"), "text/tea");
        let seen = catalog.take_seen();
        assert_eq!((seen.len(), seen[0].target.as_str()), (1, "/items?n=1"));
        assert!(
            seen[0].headers.contains_key("traceparent"),
            "its call is part of the request's trace"
        );
        // Neither one that policy has and doesn't name, nor one that there isn't, nor an address.
        let vault_at = vault.address().to_string();
        for other in ["vault", "nobody", &vault_at] {
            let reply = client.get("app.example", &format!("/proxy/{other}/")).await?;
            assert_eq!(reply.status, 502, "{other}: {reply:?}");
            assert!(reply.text().contains("Not there either"), "{reply:?}");
        }
    }
    assert_eq!((vault.requests(), vault.connections()), (0, 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partners_are_hedged_and_then_what_was_kept_is_the_answer() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let app = Backend::start("app")?;
    let (slow, good) = (Backend::start("slow")?, Backend::start("good")?);
    slow.behave(Behave::Hang);
    let more = [
        "limits: {callTimeout: 2s, maxBody: 65536, maxCalls: 2}",
        "access: {services: [slow, good]}",
    ];
    let rung = r#"plugin: {plugin: hedge, config: '{"partners": ["slow", "good"], "patienceMs": 500}'}"#;
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("slow", &[(slow.address(), "a", "")], &[])
        + &service("good", &[(good.address(), "a", "")], &[])
        + &plugin_of("hedge", "Fallback", &built("partner-hedge"), "NextRung", &more)
        + &fallback("hedge", &[rung], &["onStatuses: [500]"])
        + &route("app", "app.example", "app", &["fallback: hedge", "cache: {}"]);
    mesh.apply_with_plugins(&policy).await?;
    let kept = Answer::text("kept").header("cache-control", "max-age=1");
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        let path = format!("/quote/{protocol:?}");
        app.behave(Behave::Answer(kept.clone()));
        assert_eq!(client.get("app.example", &path).await?.text(), "kept");
        app.behave(Behave::Answer(Answer::status(500)));
        eventually("a partner to answer", SOON, || async {
            let reply = client.get("app.example", &path).await?;
            ensure!(
                reply.text() == "good" && reply.header("leeward-degraded") == "hedge/0",
                "{reply:?}"
            );
            Ok(())
        })
        .await?;
        assert!(slow.requests() > 0, "the first partner was asked first");
        // Nobody answers: the last good answer does.
        good.behave(Behave::Answer(Answer::status(500)));
        let reply = client.get("app.example", &path).await?;
        assert_eq!(
            (reply.text().as_str(), reply.header("leeward-degraded")),
            ("kept", "hedge/0"),
            "{reply:?}"
        );
        // And where nothing was kept, the failure is what it was.
        let reply = client.get("app.example", "/never-asked").await?;
        assert_eq!(reply.status, 500, "{reply:?}");
        good.behave(Behave::Answer(Answer::text("good")));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_gets_a_receipt_and_is_delivered_when_it_can_be() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let orders = Backend::refusing("orders")?;
    let more = ["limits: {callTimeout: 2s, maxBody: 65536}"];
    let rung = r#"plugin: {plugin: receipt, config: '{"queue": "orders", "echo": ["items"]}'}"#;
    let policy = service("orders", &[(orders.address(), "a", "")], &[])
        + &queue("orders", &[])
        + &plugin_of("receipt", "Fallback", &built("order-receipt"), "NextRung", &more)
        + &fallback("orders", &[rung, "queue: {queue: orders}"], &[])
        + &route("orders", "orders.example", "orders", &["fallback: orders"]);
    mesh.apply_with_plugins(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let order = |key: &str| {
        let body = r#"{"items": ["tea"], "card": "4111"}"#;
        let order = request(Method::POST, "orders.example", "/orders", bytes_body(body));
        with_header(
            with_header(order, "content-type", "application/json"),
            "idempotency-key",
            key,
        )
    };
    let reply = client.call(order("k-1")).await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-degraded")),
        (202, "orders/0"),
        "{reply:?}"
    );
    assert_eq!(
        body(&reply)?,
        json!({"order": "k-1", "state": "accepted", "by": "orders", "received": {"items": ["tea"]}})
    );
    // What is no order isn't the plugin's, but the queue takes it.
    let other = request(Method::POST, "orders.example", "/orders", bytes_body("tea"));
    let reply = client.call(other).await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-degraded")),
        (202, "orders/1"),
        "{reply:?}"
    );
    orders.behave(Behave::Answer(Answer::status(200)));
    orders.resume()?;
    eventually("the order to be delivered", SOON, || async {
        let seen = orders.take_seen();
        let there = seen.iter().any(|seen| {
            seen.method == "POST"
                && seen
                    .headers
                    .get("idempotency-key")
                    .is_some_and(|key| key == "k-1")
        });
        ensure!(there, "{seen:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_popular_is_read_through_the_mesh_and_kept_on_the_node() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (catalog, dead, next) = (
        Backend::start("catalog")?,
        Backend::refusing("dead")?,
        Backend::start("next")?,
    );
    let list = |items: &str| Behave::Answer(Answer::text(items).header("content-type", "application/json"));
    catalog.behave(list(r#"{"items": ["rope", "soap"]}"#));
    let more = ["limits: {callTimeout: 2s}", "access: {services: [catalog]}"];
    // Longer than the test: the list is read once.
    let refresh = r#""refresh": {"service": "catalog", "path": "/popular", "everyMs": 3600000}"#;
    let rung = |more: &str| format!(r#"plugin: {{plugin: popular, config: '{{"popular": ["tea"]{more}}}'}}"#);
    let policy = service("dead", &[(dead.address(), "a", "")], &[])
        + &service("catalog", &[(catalog.address(), "b", "b1")], &[])
        + &service("next", &[(next.address(), "b", "b1")], &[])
        + &plugin_of(
            "popular",
            "Fallback",
            &built("recommendations-fallback"),
            "NextRung",
            &more,
        )
        + &fallback("plain", &[&rung("")], &[])
        + &fallback("list", &[&rung(&format!(", {refresh}"))], &[])
        + &fallback("next", &[&rung(r#", "service": "next""#)], &[])
        + &route("plain", "plain.example", "dead", &["fallback: plain"])
        + &route("list", "list.example", "dead", &["fallback: list"])
        + &route("next", "next.example", "dead", &["fallback: next"]);
    mesh.apply_with_plugins(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http2)?;
    let reply = client.get("plain.example", "/").await?;
    let shown = body(&reply)?;
    assert_eq!(
        (&shown["items"], &shown["zone"]),
        (&json!(["tea"]), &json!("a")),
        "{shown}"
    );
    assert_eq!(shown["because"], "recommendations can't be reached");

    // It waits for the list for 200 ms only; on a busy machine another plugin's turn may be needed.
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        for _ in 0..10 {
            let shown = body(&client.get("list.example", "/?limit=1").await?)?;
            assert!(
                shown["items"] == json!(["rope"]) || shown["items"] == json!(["tea"]),
                "{shown}"
            );
        }
    }
    assert_eq!(catalog.requests(), 1, "whichever worker asks, the list is one");
    // What was read outlives the catalog, and is all workers'.
    catalog.stop().await;
    let mut newest = 0;
    for _ in 0..20 {
        let fresh = mesh.workload("a1", Protocol::Http1)?;
        let shown = body(&fresh.get("list.example", "/").await?)?;
        newest += usize::from(shown["items"] == json!(["rope", "soap"]));
    }
    assert!(newest == 20 || newest == 0, "{newest} of 20 have the list");
    let again = client
        .call(with_header(get("list.example", "/"), "accept", "text/html"))
        .await?;
    assert_eq!(again.status, 503, "only JSON is answered: {again:?}");

    let reply = client.get("next.example", "/").await?;
    assert_eq!(
        (reply.backend(), reply.header("leeward-degraded")),
        ("next", "next/0"),
        "{reply:?}"
    );
    Ok(())
}

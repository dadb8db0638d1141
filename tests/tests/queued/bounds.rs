//! What is not taken in, and who answers then.

use crate::{HOST, QUICK, SOON, location, one, order, plain_order, policy, reading};
use anyhow::ensure;
use leeward_testkit::raw::Raw;
use leeward_testkit::{Backend, Node, Protocol, Reply, bytes_body, eventually, request, with_header};
use std::time::Duration;

const NEXT: &str = "static: {status: 503, body: not now}";

fn is_next(reply: &Reply) {
    let told = (
        reply.status.as_u16(),
        reply.header("leeward-degraded"),
        reply.text(),
    );
    assert_eq!(told, (503, "later/1", "not now".to_owned()));
}

/// Waits until the access log has a line with all of these.
async fn logged(node: &Node, parts: &[&str]) -> anyhow::Result<()> {
    eventually("a line in the access log", SOON, || async {
        let log = node.process.log()?;
        let found = log
            .lines()
            .any(|line| parts.iter().all(|part| line.contains(part)));
        ensure!(found, "no line with {parts:?} in\n{log}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_finds_the_queue_full_or_is_too_large_for_it_goes_to_the_next_rung() -> anyhow::Result<()> {
    let mesh = one().await?;
    let orders = Backend::refusing("orders")?;
    let lines = [QUICK, &["maxEntries: 3", "maxEntryBytes: 2KiB"]].concat();
    mesh.apply(&policy(&orders, &lines, &[NEXT], &[])).await?;
    let node = mesh.node("a1")?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    // Too large whether it is in the body or in the fields.
    is_next(&client.call(plain_order(&"x".repeat(3 << 10))).await?);
    let limit = "\"limit\":\"maxEntryBytes\"";
    logged(node, &["\"status\":503", "\"fallback\":\"later/1\"", limit]).await?;
    is_next(
        &client
            .call(with_header(plain_order(""), "x-long", &"x".repeat(3 << 10)))
            .await?,
    );
    assert_eq!(reading(node).await?["waiting"], 0);

    for n in 0..3 {
        location(&client.call(order(&format!("k-{n}"))).await?)?;
    }
    is_next(&client.call(order("k-3")).await?);
    let limit = "\"limit\":\"maxEntries\"";
    logged(node, &["\"status\":503", "\"fallback\":\"later/1\"", limit]).await?;
    let refused = node
        .metric("leeward_refused_total", &["limit=\"maxEntries\""])
        .await?;
    assert!(
        (refused - 1.0).abs() < 0.1,
        "{refused}: {}",
        node.metrics().await?
    );
    // What was taken in is not named for it.
    let log = node.process.log()?;
    let taken_in = log.lines().filter(|line| line.contains("\"status\":202"));
    assert!(taken_in.clone().count() == 3 && !taken_in.clone().any(|line| line.contains("\"limit\"")));
    // Room is made by a delivery.
    orders.resume()?;
    crate::emptied(node, SOON).await?;
    orders.stop().await;
    location(&client.call(order("k-4")).await?)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_no_whole_body_or_is_no_plain_request_is_not_taken_in() -> anyhow::Result<()> {
    let mesh = one().await?;
    let orders = Backend::refusing("orders")?;
    mesh.apply(&policy(&orders, QUICK, &[NEXT], &["timeouts: {request: 800ms}"]))
        .await?;
    let node = mesh.node("a1")?;
    // A client that stands still.
    let mut raw = Raw::connect(node.outbound).await?;
    let head = format!("POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 10\r\n\r\nabc");
    raw.write(head.as_bytes()).await?;
    raw.until(b"not now").await?;
    // A client that goes away.
    let mut gone = Raw::connect(node.outbound).await?;
    gone.write(head.as_bytes()).await?;
    drop(gone);
    // A call that waits for an answer of its own kind.
    let client = mesh.workload("a1", Protocol::Http2)?;
    let grpc = request(
        http::Method::POST,
        HOST,
        "/shop.Orders/Place",
        bytes_body("message"),
    );
    let grpc = with_header(grpc, "content-type", "application/grpc");
    is_next(&client.call(with_header(grpc, "te", "trailers")).await?);
    // A change of protocols.
    let mut upgrade = Raw::connect(node.outbound).await?;
    let head = format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n");
    upgrade.write(head.as_bytes()).await?;
    upgrade.until(b"not now").await?;
    // The one that went away may still have been under way.
    eventually("its line in the log", SOON, || async {
        ensure!(node.process.log()?.contains("client_gone"));
        Ok(())
    })
    .await?;
    let now = reading(node).await?;
    assert_eq!(
        (&now["waiting"], &now["accepted_total"]),
        (&0.into(), &0.into()),
        "{now}"
    );
    // A body that comes bit by bit is waited for.
    let mut slow = Raw::connect(node.outbound).await?;
    let head = format!("POST / HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n");
    slow.write(head.as_bytes()).await?;
    tokio::time::sleep(Duration::from_millis(50)).await;
    slow.write(b"2\r\nde\r\n0\r\n\r\n").await?;
    slow.until(b"202 Accepted").await?;
    orders.behave(leeward_testkit::Behave::Echo);
    orders.resume()?;
    crate::emptied(node, SOON).await?;
    assert_eq!(orders.received_bytes(), 5);
    Ok(())
}

//! Time limits, bounds, and when a request is tried again.

use anyhow::{Context, ensure};
use http::Method;
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Backend, Behave, Client, Mesh, Port, Protocol, bytes_body, eventually, get, request};
use std::time::Duration;
use tokio::net::{TcpSocket, TcpStream};

const SOON: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_takes_too_long_is_504_in_time() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let slow = Backend::start("slow")?;
    slow.behave(Behave::Hang);
    let limit = ["timeouts: {request: 300ms}"];
    let policy = service("near", &[(slow.address(), "a", "")], &[])
        + &service("far", &[(slow.address(), "b", "b1")], &[])
        + &service("far2", &[(slow.address(), "b", "b1")], &["protocol: HTTP2"])
        + &route("near", "near.example", "near", &limit)
        + &route("far", "far.example", "far", &limit)
        + &route("far2", "far2.example", "far2", &limit);
    mesh.apply(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        for host in ["near.example", "far.example", "far2.example"] {
            let begun = tokio::time::Instant::now();
            let reply = mesh.workload("a1", protocol)?.get(host, "/").await?;
            let took = begun.elapsed();
            assert_eq!(
                (reply.status.as_u16(), reply.header("leeward-reason")),
                (504, "timeout"),
                "{host}"
            );
            assert!(
                took >= Duration::from_millis(290) && took < Duration::from_secs(1),
                "{host}: {took:?}"
            );
        }
    }
    // The other proxy has let go of them too.
    eventually("requests to end", SOON, || async {
        let active = mesh.node("b1")?.metric("leeward_requests_active", &[]).await?;
        ensure!(active < 0.5, "{active} requests are under way at b1");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_limit_is_for_the_head_and_bodies_take_their_time() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let slow = Backend::start("slow")?;
    slow.behave(Behave::Dribble(5, Duration::from_millis(150)));
    let policy = service("slow", &[(slow.address(), "a", "")], &[])
        + &route("slow", "slow.example", "slow", &["timeouts: {request: 300ms}"]);
    mesh.apply(&policy).await?;
    let reply = mesh
        .workload("a1", Protocol::Http1)?
        .get("slow.example", "/")
        .await?;
    assert_eq!((reply.status.as_u16(), reply.text().as_str()), (200, "....."));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connecting_has_a_limit_of_its_own() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    // A listener that accepts nothing and whose queue is full: the kernel drops what else comes.
    let silent = TcpSocket::new_v4()?;
    silent.bind("127.0.0.1:0".parse()?)?;
    let silent = silent.listen(1)?;
    let address = silent.local_addr()?;
    let mut queue = Vec::new();
    while let Ok(Ok(queued)) =
        tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address)).await
    {
        queue.push(queued);
        ensure!(queue.len() < 100, "its queue is never full");
    }
    let policy = service("silent", &[(address, "a", "")], &["connectTimeout: 250ms"])
        + &route("silent", "silent.example", "silent", &[]);
    mesh.apply(&policy).await?;
    let begun = tokio::time::Instant::now();
    let reply = mesh
        .workload("a1", Protocol::Http1)?
        .get("silent.example", "/")
        .await?;
    let took = begun.elapsed();
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-reason")),
        (503, "connect_failure"),
        "{reply:?}"
    );
    assert!(
        took >= Duration::from_millis(240) && took < Duration::from_secs(1),
        "{took:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_takes_no_more_of_a_proxy_than_its_bound() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (slow, other) = (Backend::start("slow")?, Backend::start("other")?);
    slow.behave(Behave::Hang);
    let policy = service(
        "slow",
        &[(slow.address(), "a", "")],
        &["connectionPool: {maxRequests: 3}"],
    ) + &service("other", &[(other.address(), "a", "")], &[])
        + &route("slow", "slow.example", "slow", &["timeouts: {request: 5s}"])
        + &route("other", "other.example", "other", &[]);
    mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..3 {
        waiting.spawn(async move {
            Client::new(outbound, Protocol::Http1)
                .get("slow.example", "/")
                .await
        });
    }
    eventually("three requests", SOON, || async {
        ensure!(slow.requests() == 3);
        Ok(())
    })
    .await?;
    let client = Client::new(outbound, Protocol::Http1);
    let reply = client.get("slow.example", "/").await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-reason")),
        (503, "overflow"),
        "{reply:?}"
    );
    assert_eq!(client.get("other.example", "/").await?.backend(), "other");
    // Clients that go away give their places back.
    waiting.shutdown().await;
    slow.behave(Behave::Echo);
    eventually("a free place", SOON, || async {
        let reply = client.get("slow.example", "/").await?;
        ensure!(reply.status == 200, "{reply:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_sent_is_tried_elsewhere_and_what_was_sent_is_not() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (good, dead) = (Backend::start("good")?, Port::reserve()?);
    let resets = Backend::start("resets")?;
    resets.behave(Behave::Reset);
    let policy = service(
        "half",
        &[(dead.address(), "a", ""), (good.address(), "a", "")],
        &[],
    ) + &service(
        "far",
        &[(dead.address(), "b", "b1"), (good.address(), "b", "b1")],
        &[],
    ) + &service(
        "once",
        &[(dead.address(), "a", ""), (good.address(), "a", "")],
        &[],
    ) + &service(
        "resets",
        &[(resets.address(), "a", ""), (resets.address(), "b", "b1")],
        &[],
    ) + &route("half", "half.example", "half", &[])
        + &route("far", "far.example", "far", &[])
        + &route("once", "once.example", "once", &["retry: {maxAttempts: 1}"])
        + &route("resets", "resets.example", "resets", &[]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    good.behave(Behave::Echo);
    for _ in 0..10 {
        let order = request(Method::POST, "half.example", "/", bytes_body("order"));
        let reply = client.call(order).await?;
        assert_eq!(
            (reply.status.as_u16(), reply.text().as_str()),
            (200, "order"),
            "{reply:?}"
        );
        // Here another proxy finds the endpoint dead. A body would be spent by then.
        let reply = client.get("far.example", "/").await?;
        assert_eq!(reply.backend(), "good", "{reply:?}");
    }
    // One attempt is one attempt. Each worker takes turns by itself, so ask until it is the dead one's.
    let mut failed = 0;
    for _ in 0..4 {
        failed += u32::from(client.get("once.example", "/").await?.status == 503);
    }
    assert_eq!(failed, 1, "the endpoint is known to be down after one failure");

    // The connection broke after the request was sent: the order may have been taken.
    let reply = client
        .call(request(Method::POST, "resets.example", "/", bytes_body("order")))
        .await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-reason")),
        (502, "reset"),
        "{reply:?}"
    );
    assert_eq!(resets.requests(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_used_again_and_let_go_when_idle() -> anyhow::Result<()> {
    let mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--workers", "1")
        .start()
        .await?;
    let backend = Backend::start("app")?;
    let policy = service(
        "app",
        &[(backend.address(), "a", "")],
        &["connectionPool: {idleTimeout: 1s}"],
    ) + &service(
        "shut",
        &[(backend.address(), "a", "")],
        &["connectionPool: {maxIdlePerEndpoint: 0}"],
    ) + &route("app", "app.example", "app", &[])
        + &route("shut", "shut.example", "shut", &[]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for _ in 0..50 {
        client.get("app.example", "/").await?;
    }
    assert_eq!(backend.connections(), 1);
    for _ in 0..5 {
        client.get("shut.example", "/").await?;
    }
    assert_eq!(backend.connections(), 6);
    // A backend that closes its idle connections just as they are used again costs no request.
    for _ in 0..20 {
        backend.stop().await;
        backend.resume()?;
        let reply = client
            .call(get("app.example", "/"))
            .await
            .context("after a restart")?;
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    Ok(())
}

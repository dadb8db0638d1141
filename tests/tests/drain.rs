//! SIGTERM: nothing that a client was promised is lost.

use anyhow::{Context, bail, ensure};
use http_body_util::BodyExt;
use leeward_testkit::policy::{route, service};
use leeward_testkit::raw::Raw;
use leeward_testkit::{Answer, Backend, Behave, Client, Mesh, Protocol, Unsent, eventually, get};
use rustix::process::Signal;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const SOON: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_under_load_loses_no_request() -> anyhow::Result<()> {
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let mut mesh = Mesh::two_zones().await?;
        let backend = Backend::start("app")?;
        backend.behave(Behave::Late(Duration::from_millis(5), Answer::text("app")));
        let policy =
            service("app", &[(backend.address(), "b", "b1")], &[]) + &route("app", "app.example", "app", &[]);
        mesh.apply(&policy).await?;
        let outbound = mesh.node("a1")?.outbound;
        let answered = Arc::new(AtomicU64::new(0));
        let mut clients = JoinSet::new();
        for _ in 0..8 {
            clients.spawn(until_refused(outbound, protocol, Arc::clone(&answered)));
        }
        eventually("load", SOON, || async {
            ensure!(answered.load(Ordering::Relaxed) > 200);
            Ok(())
        })
        .await?;
        let ended = mesh.node_mut("a1")?.process.term_and_wait(SOON).await?;
        assert!(ended.success(), "{ended}");
        while let Some(client) = tokio::time::timeout(SOON, clients.join_next()).await? {
            client?.with_context(|| format!("{protocol:?}"))?;
        }
    }
    Ok(())
}

/// Sends requests until no connection is made any more. Whatever was sent must be answered.
async fn until_refused(to: SocketAddr, protocol: Protocol, answered: Arc<AtomicU64>) -> anyhow::Result<()> {
    while TcpStream::connect(to).await.is_ok() {
        let client = Client::new(to, protocol);
        for n in 0..1000 {
            match client.get("app.example", "/").await {
                Ok(reply) => {
                    ensure!(reply.status == 200, "{reply:?}");
                    answered.fetch_add(1, Ordering::Relaxed);
                    if reply.header("connection") == "close" {
                        break;
                    }
                }
                // Refused before anything was sent: the door is shut, which is no lost request.
                Err(error) if error.is::<Unsent>() || format!("{error:#}").contains("can't connect") => break,
                Err(error) => bail!("request {n} of a connection: {error:#}"),
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_under_way_ends_and_what_is_idle_is_closed_cleanly() -> anyhow::Result<()> {
    let mut mesh = Mesh::two_zones().await?;
    let backend = Backend::start("app")?;
    let policy =
        service("app", &[(backend.address(), "a", "")], &[]) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    // A connection that has served a request and waits for the next; one that has never said anything.
    let mut idle = Raw::connect(outbound).await?;
    idle.write(b"GET / HTTP/1.1\r\nHost: app.example\r\n\r\n").await?;
    idle.until(b"app").await?;
    let mute = Raw::connect(outbound).await?;

    backend.behave(Behave::Late(Duration::from_secs(1), Answer::text("late")));
    let before = backend.requests();
    let mut under_way = JoinSet::new();
    for protocol in [Protocol::Http1, Protocol::Http2] {
        under_way.spawn(async move { Client::new(outbound, protocol).get("app.example", "/").await });
    }
    eventually("requests to be under way", SOON, || async {
        ensure!(backend.requests() == before + 2);
        Ok(())
    })
    .await?;
    // And an answer that has begun and goes on for longer.
    backend.behave(Behave::Dribble(10, Duration::from_millis(300)));
    let begun = Client::new(outbound, Protocol::Http1)
        .send(get("app.example", "/"))
        .await?;

    mesh.node("a1")?.process.signal(Signal::TERM);
    while let Some(reply) = under_way.join_next().await {
        assert_eq!(reply??.text(), "late");
    }
    let body = tokio::time::timeout(SOON, begun.into_body().collect()).await??;
    assert_eq!(body.to_bytes().len(), 10);
    let idle = tokio::time::timeout(SOON, idle.listen(SOON)).await?;
    assert!(idle.closed && idle.statuses() == [200], "{:?}", idle.text());
    let mute = tokio::time::timeout(SOON, mute.listen(SOON)).await?;
    assert!(mute.closed && mute.bytes.is_empty(), "{:?}", mute.text());
    let ended = mesh.node_mut("a1")?.process.wait(SOON).await?;
    assert!(ended.success(), "{ended}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_proxy_is_not_ready_and_asks_its_clients_to_go() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    let policy =
        service("app", &[(backend.address(), "a", "")], &[]) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    let node = mesh.node("a1")?;
    // Holds the drain open while the rest is looked at.
    backend.behave(Behave::Dribble(10, Duration::from_millis(200)));
    let held = Client::new(node.outbound, Protocol::Http1)
        .send(get("app.example", "/"))
        .await?;
    backend.behave(Behave::Answer(Answer::text("app")));
    let client = Client::new(node.outbound, Protocol::Http1);
    let first = client.get("app.example", "/").await?;
    assert_eq!(first.header("connection"), "");
    node.process.signal(Signal::TERM);
    eventually("an answer that asks to close", SOON, || async {
        let reply = client.get("app.example", "/").await?;
        ensure!(
            reply.status == 200 && reply.header("connection") == "close",
            "{reply:?}"
        );
        Ok(())
    })
    .await?;
    let ready = Client::new(node.admin, Protocol::Http1)
        .get("admin", "/readyz")
        .await?;
    assert_eq!(ready.status, 503, "{}", ready.text());
    assert_eq!(held.into_body().collect().await?.to_bytes().len(), 10);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_has_an_end() -> anyhow::Result<()> {
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--drain-timeout", "3s")
        .start()
        .await?;
    let backend = Backend::start("app")?;
    backend.behave(Behave::Hang);
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &route("app", "app.example", "app", &["timeouts: {request: 0s}"]);
    mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    let stuck = tokio::spawn(async move {
        Client::new(outbound, Protocol::Http1)
            .get("app.example", "/")
            .await
    });
    eventually("the request", SOON, || async {
        ensure!(backend.requests() == 1);
        Ok(())
    })
    .await?;
    let begun = tokio::time::Instant::now();
    mesh.node_mut("a1")?.process.term_and_wait(SOON).await?;
    let took = begun.elapsed();
    assert!(
        took > Duration::from_secs(2) && took < Duration::from_secs(6),
        "{took:?}"
    );
    assert!(
        tokio::time::timeout(SOON, stuck).await??.is_err(),
        "who answered?"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_behind_which_others_send_drains_without_a_lost_request() -> anyhow::Result<()> {
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "b1")
        .node("c", "c1")
        .start()
        .await?;
    let (second, third) = (Backend::start("second")?, Backend::start("third")?);
    for (protocol, version) in [("protocol: HTTP1", 1), ("protocol: HTTP2", 2)] {
        let name = format!("app{version}");
        let endpoints = [(second.address(), "b", "b1"), (third.address(), "c", "c1")];
        let policy =
            service(&name, &endpoints, &[protocol]) + &route(&name, &format!("{name}.example"), &name, &[]);
        mesh.apply(&policy).await?;
    }
    let outbound = mesh.node("a1")?.outbound;
    let load = |host: &'static str| {
        leeward_testkit::Load::start(
            outbound,
            Protocol::Http1,
            (host, "/"),
            4,
            Duration::from_millis(3),
        )
    };
    let loads = [load("app1.example"), load("app2.example")];
    let answers = |of: &'static str, least: u64| {
        let loads = &loads;
        async move {
            eventually("answers", SOON, || async {
                for load in loads {
                    let tally = load.tally();
                    ensure!(
                        tally.by_backend.get(of).is_some_and(|n| *n >= least),
                        "{of}: {tally:?}"
                    );
                }
                Ok(())
            })
            .await
        }
    };
    answers("second", 100).await?;
    let ended = mesh.node_mut("b1")?.process.term_and_wait(SOON).await?;
    assert!(ended.success(), "{ended}");
    answers("third", 100).await?;
    for load in loads {
        let tally = load.stop().await;
        assert_eq!(tally.failed, 0, "{tally:?}");
    }
    Ok(())
}

//! Bodies, trailers and other protocols through both proxies, as streams.

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Method, Version};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame};
use leeward_testkit::policy::{route, service};
use leeward_testkit::raw::Raw;
use leeward_testkit::{
    Answer, Backend, Behave, Mesh, Protocol, WebSocketEcho, bytes_body, call_streaming, channel_body,
    eventually, get, grpc_channel, request, zeros_body,
};
use std::net::SocketAddr;
use std::time::Duration;
use tokio_tungstenite::tungstenite::Message;

const SOON: Duration = Duration::from_secs(20);
const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// A mesh of two zones where `app.example` is in zone b, behind its proxy.
async fn far(address: SocketAddr, more: &[&str], rule: &[&str]) -> anyhow::Result<Mesh> {
    let mesh = Mesh::two_zones().await?;
    let policy = service("app", &[(address, "b", "b1")], more) + &route("app", "app.example", "app", rule);
    mesh.apply(&policy).await?;
    Ok(mesh)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_streams_both_ways_with_trailers_and_status() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    backend.behave(Behave::Grpc);
    let mesh = far(backend.address(), &["protocol: HTTP2"], &[]).await?;
    let channel = grpc_channel(mesh.node("a1")?.outbound, "app.example")?;
    let (sender, response) = call_streaming(channel.clone(), "/echo.Echo/Talk").await?;
    let mut answers = response.into_inner();
    // Each message is answered before the next is sent: nothing on the way waits for an end.
    for i in 0..50u32 {
        let message = Bytes::from(format!("message {i}"));
        sender.send(message.clone()).await?;
        let answer = tokio::time::timeout(SOON, answers.message()).await??;
        assert_eq!(answer, Some(message));
    }
    drop(sender);
    assert_eq!(tokio::time::timeout(SOON, answers.message()).await??, None);
    let trailers = answers.trailers().await?.context("no trailers")?;
    assert_eq!(trailers.get("x-echoed").context("no x-echoed")?, "yes");

    // Whoever passes trailers on asks for no more after them: they are known to be the end, by QUIC as well.
    eventually("twenty to go by QUIC", SOON, || async {
        let (sender, response) = call_streaming(channel.clone(), "/echo.Echo/Talk").await?;
        sender.send(Bytes::from_static(b"hello")).await?;
        drop(sender);
        let mut answers = response.into_inner();
        while answers.message().await?.is_some() {}
        let by_quic = mesh
            .node("a1")?
            .metric("leeward_attempts_total", &["transport=\"quic\""])
            .await?;
        ensure!(by_quic > 19.5, "{by_quic} did");
        Ok(())
    })
    .await?;
    for name in ["a1", "b1"] {
        let mesh = &mesh;
        let ended = |reason: &'static str| async move {
            let node = mesh.node(name)?;
            node.metric("leeward_requests_total", &[reason]).await
        };
        let (ok, gone) = (
            ended("reason=\"ok\"").await?,
            ended("reason=\"client_gone\"").await?,
        );
        assert!(
            ok > 19.5 && gone < 0.5,
            "{name}: {ok} ok, {gone} whose client was gone"
        );
    }

    // Streams side by side on one connection.
    let talks = (0..20).map(|i| {
        let channel = channel.clone();
        async move {
            let (sender, response) = call_streaming(channel, "/echo.Echo/Talk").await?;
            let mut answers = response.into_inner();
            for n in 0..20u32 {
                let message = Bytes::from(vec![i; 1000 * n as usize]);
                sender.send(message.clone()).await?;
                ensure!(answers.message().await? == Some(message), "another answer");
            }
            anyhow::Ok(())
        }
    });
    tokio::time::timeout(SOON, futures_util::future::try_join_all(talks)).await??;
    let seen = backend.take_seen();
    assert!(
        seen.iter()
            .all(|s| s.version == Version::HTTP_2 && s.method == "POST")
    );
    assert_eq!(seen[0].headers["te"], "trailers");

    // A failure is told as gRPC tells it.
    backend.stop().await;
    let refused = call_streaming(channel, "/echo.Echo/Talk")
        .await
        .err()
        .context("who answered?")?;
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gib_streams_both_ways_in_bounded_memory() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    backend.behave(Behave::Echo);
    let mesh = far(backend.address(), &[], &["timeouts: {request: 0s}"]).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    // Once before, so that what every connection needs is there.
    client
        .call(request(Method::POST, "app.example", "/", bytes_body("warm")))
        .await?;
    let mut before = Vec::new();
    for name in ["a1", "b1"] {
        let process = &mesh.node(name)?.process;
        process.reset_peak()?;
        before.push(process.memory()?.resident);
    }
    let echoed = client
        .send(request(Method::POST, "app.example", "/", zeros_body(GIB)))
        .await?;
    ensure!(echoed.status() == 200, "{}", echoed.status());
    let mut body = echoed.into_body();
    let mut length = 0;
    while let Some(frame) = tokio::time::timeout(SOON, body.frame()).await? {
        length += frame?.data_ref().map_or(0, Bytes::len) as u64;
    }
    assert_eq!(length, GIB);
    for (name, before) in ["a1", "b1"].into_iter().zip(before) {
        let peak = mesh.node(name)?.process.memory()?.peak;
        let grown = peak.saturating_sub(before) / MIB;
        assert!(grown < 64, "{name} grew by {grown} MiB");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_stop_hold_back_their_writers_and_nobody_else() -> anyhow::Result<()> {
    let (endless, other) = (Backend::start("endless")?, Backend::start("other")?);
    endless.behave(Behave::Answer(Answer::zeros(GIB)));
    // Between proxies, requests for HTTP/2 services share connections.
    let mesh = far(
        endless.address(),
        &["protocol: HTTP2"],
        &["timeouts: {request: 0s}"],
    )
    .await?;
    let policy = service("other", &[(other.address(), "b", "b1")], &["protocol: HTTP2"])
        + &route("other", "other.example", "other", &[]);
    mesh.apply(&policy).await?;
    // The client's own window for a connection of HTTP/2 is that of four streams.
    for (protocol, readers) in [(Protocol::Http1, 24), (Protocol::Http2, 3)] {
        let client = mesh.workload("a1", protocol)?;
        let mut held = Vec::new();
        for _ in 0..readers {
            let mut response = client.send(get("app.example", "/")).await?;
            let first = tokio::time::timeout(SOON, response.body_mut().frame()).await?;
            ensure!(first.context("no body")??.is_data());
            held.push(response);
        }
        // Nobody reads any more: what is in flight settles, and stays.
        let mut last = 0;
        let resident = eventually("memory to settle", SOON, || {
            let now = mesh
                .node("a1")
                .and_then(|node| Ok(node.process.memory()?.resident / MIB));
            let same = now
                .as_ref()
                .is_ok_and(|now| *now == std::mem::replace(&mut last, *now));
            async move {
                tokio::time::sleep(Duration::from_millis(200)).await;
                ensure!(same, "it still grows");
                now
            }
        })
        .await?;
        // A window and some buffers for each, beside what a proxy needs.
        assert!(
            resident < 200,
            "{protocol:?}: {resident} MiB for {readers} streams that nobody reads"
        );
        // The proxies share their connections among all of these.
        for _ in 0..8 {
            let reply = tokio::time::timeout(SOON, client.get("other.example", "/")).await;
            assert_eq!(
                reply.context("held up by readers that stopped")??.backend(),
                "other"
            );
        }
        drop(held);
    }
    // Connections of readers that went away are let go of.
    eventually("requests to end", SOON, || async {
        let active = mesh.node("a1")?.metric("leeward_requests_active", &[]).await?;
        ensure!(active < 0.5, "{active} requests are under way");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workloads_that_do_not_read_hold_back_their_senders_and_nobody_else() -> anyhow::Result<()> {
    let (stuck, other) = (Backend::start("stuck")?, Backend::start("other")?);
    stuck.behave(Behave::Hang);
    let mesh = far(
        stuck.address(),
        &["protocol: HTTP2"],
        &["timeouts: {request: 0s}"],
    )
    .await?;
    let policy = service("other", &[(other.address(), "b", "b1")], &["protocol: HTTP2"])
        + &route("other", "other.example", "other", &[]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut senders = tokio::task::JoinSet::new();
    for _ in 0..24 {
        let to = mesh.node("a1")?.outbound;
        senders.spawn(async move {
            let client = leeward_testkit::Client::new(to, Protocol::Http1);
            client
                .send(request(Method::POST, "app.example", "/", zeros_body(GIB)))
                .await
                .map(|r| r.status())
        });
    }
    let got = eventually("requests to arrive", SOON, || async {
        ensure!(stuck.requests() == 24, "{} came", stuck.requests());
        Ok(())
    });
    got.await?;
    for _ in 0..8 {
        let reply = tokio::time::timeout(SOON, client.get("other.example", "/")).await;
        assert_eq!(
            reply.context("held up by workloads that don't read")??.backend(),
            "other"
        );
    }
    let resident = mesh.node("a1")?.process.memory()?.resident / MIB;
    assert!(resident < 200, "{resident} MiB for 24 streams that nobody reads");
    senders.shutdown().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn web_sockets_pass_through_both_proxies() -> anyhow::Result<()> {
    let echo = WebSocketEcho::start()?;
    let mesh = far(echo.address(), &[], &[]).await?;
    let stream = tokio::net::TcpStream::connect(mesh.node("a1")?.outbound).await?;
    let connecting = tokio_tungstenite::client_async("ws://app.example/chat?room=1", stream);
    let (mut socket, response) = tokio::time::timeout(SOON, connecting).await??;
    assert_eq!(response.status(), 101);
    for size in [0, 1, 125, 126, 70_000, 1 << 20] {
        let message = Message::binary(vec![7; size]);
        socket.send(message.clone()).await?;
        let answer = tokio::time::timeout(SOON, socket.next())
            .await?
            .context("closed")??;
        assert!(answer == message, "{size} bytes came back as {}", answer.len());
    }
    socket.send(Message::text("h\u{e9}llo")).await?;
    let answer = tokio::time::timeout(SOON, socket.next())
        .await?
        .context("closed")??;
    assert_eq!(answer.into_text()?.as_str(), "h\u{e9}llo");
    socket.close(None).await?;
    while let Some(Ok(_)) = tokio::time::timeout(SOON, socket.next()).await? {}
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_that_is_refused_is_an_answer() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    backend.behave(Behave::Answer(Answer::status(426).header("upgrade", "websocket")));
    let mesh = far(backend.address(), &[], &[]).await?;
    let mut raw = Raw::connect(mesh.node("a1")?.outbound).await?;
    raw.write(b"GET / HTTP/1.1\r\nHost: app.example\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
        .await?;
    raw.until(b"\r\n\r\n").await?;
    assert!(
        raw.heard().starts_with(b"HTTP/1.1 426"),
        "{:?}",
        String::from_utf8_lossy(raw.heard())
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_waits_for_100_continue_gets_it() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    backend.behave(Behave::Echo);
    let mesh = far(backend.address(), &[], &[]).await?;
    let outbound = mesh.node("a1")?.outbound;
    let mut raw = Raw::connect(outbound).await?;
    raw.write(b"POST / HTTP/1.1\r\nHost: app.example\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        .await?;
    raw.until(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    raw.write(b"hello").await?;
    raw.until(b"hello").await?;
    let heard = String::from_utf8_lossy(raw.heard()).into_owned();
    assert!(heard.contains("HTTP/1.1 200 OK"), "{heard:?}");

    // A backend that has heard enough answers at once, and nothing of the body is asked for.
    backend.behave(Behave::Answer(Answer::status(413)));
    let mut raw = Raw::connect(outbound).await?;
    raw.write(b"POST / HTTP/1.1\r\nHost: app.example\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        .await?;
    let heard = raw.listen(Duration::from_millis(300)).await;
    assert_eq!(heard.statuses().last(), Some(&413), "{:?}", heard.text());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_http_meets_either() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (one, two) = (Backend::start("one")?, Backend::start("two")?);
    let mut policy = String::new();
    for (backend, protocol, version) in [(&one, "protocol: HTTP1", "1"), (&two, "protocol: HTTP2", "2")] {
        backend.behave(Behave::Echo);
        for (place, zone, proxy) in [("near", "a", ""), ("far", "b", "b1")] {
            let name = format!("{place}{version}");
            policy += &service(&name, &[(backend.address(), zone, proxy)], &[protocol]);
            policy += &route(&name, &format!("{name}.example"), &name, &[]);
        }
    }
    mesh.apply(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        for (name, backend, version) in [
            ("near1", &one, Version::HTTP_11),
            ("far1", &one, Version::HTTP_11),
            ("near2", &two, Version::HTTP_2),
            ("far2", &two, Version::HTTP_2),
        ] {
            let host = format!("{name}.example");
            for body in ["", "hello", &"x".repeat(300_000)] {
                let sent = request(Method::PUT, &host, "/a?b=c", bytes_body(body.to_owned()));
                let reply = client.call(sent).await?;
                assert_eq!(
                    (reply.status.as_u16(), reply.text() == body),
                    (200, true),
                    "{protocol:?} {name}"
                );
            }
            // And a body of unknown length, with trailers.
            let (sender, body) = channel_body();
            let mut sent = request(Method::POST, &host, "/", body);
            sent.headers_mut()
                .insert("trailer", HeaderValue::from_static("x-sum"));
            sent.headers_mut()
                .insert("te", HeaderValue::from_static("trailers"));
            let sending = async {
                for _ in 0..3 {
                    sender.send(Ok(Frame::data(Bytes::from_static(b"part ")))).await?;
                }
                let mut trailers = HeaderMap::new();
                trailers.insert("x-sum", HeaderValue::from_static("15"));
                sender.send(Ok(Frame::trailers(trailers))).await?;
                drop(sender);
                anyhow::Ok(())
            };
            let (reply, sent) = tokio::join!(client.call(sent), sending);
            sent?;
            let reply = reply?;
            assert_eq!(reply.text(), "part part part ", "{protocol:?} {name}");
            let sum = reply.trailers.as_ref().and_then(|t| t.get("x-sum"));
            assert_eq!(
                sum,
                Some(&HeaderValue::from_static("15")),
                "{protocol:?} {name}: {reply:?}"
            );
            let seen = backend.take_seen();
            assert!(seen.iter().all(|s| s.version == version), "{protocol:?} {name}");
            let target =
                |t: &str| t == "/a?b=c" || t == "http://near2.example/a?b=c" || t.ends_with("/a?b=c");
            assert!(target(&seen[0].target), "{}", seen[0].target);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_breaks_off_is_never_taken_for_whole() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    backend.behave(Behave::CutShort);
    let mesh = Mesh::two_zones().await?;
    let policy = service("near", &[(backend.address(), "a", "")], &[])
        + &service("far", &[(backend.address(), "b", "b1")], &[])
        + &route("near", "near.example", "near", &[])
        + &route("far", "far.example", "far", &[]);
    mesh.apply(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        for host in ["near.example", "far.example"] {
            let response = mesh.workload("a1", protocol)?.send(get(host, "/")).await?;
            assert_eq!(response.status(), 200);
            assert_eq!(response.body().size_hint().exact(), Some(1000));
            let whole = tokio::time::timeout(SOON, response.into_body().collect()).await?;
            assert!(whole.is_err(), "{protocol:?} {host}: {whole:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_comes_as_it_is_made() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    backend.behave(Behave::Dribble(5, Duration::from_millis(100)));
    let mesh = far(backend.address(), &[], &[]).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let mut body = mesh
            .workload("a1", protocol)?
            .send(get("app.example", "/"))
            .await?
            .into_body();
        let begun = tokio::time::Instant::now();
        let first = body.frame().await.context("no body")??;
        assert_eq!(first.into_data().ok(), Some(Bytes::from_static(b".")));
        assert!(
            begun.elapsed() < Duration::from_millis(350),
            "the first byte took {:?}",
            begun.elapsed()
        );
        assert_eq!(body.collect().await?.to_bytes().len(), 4);
    }
    Ok(())
}

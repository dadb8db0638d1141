//! What clients from outside can't do to others.

use crate::kit::{Hello, Rig, SOON, gateway, is};
use anyhow::ensure;
use futures_util::StreamExt;
use http::StatusCode;
use leeward_testkit::policy::service;
use leeward_testkit::{WebSocketEcho, eventually, get, with_header};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_heads_and_handshakes_are_bounded() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example"])?;
    let limits = "limits: {maxConnections: 4, maxHeaderBytes: 8KiB, handshakeTimeout: 5s, idleTimeout: 2s}";
    rig.open(&[rig.https("https", "shop", limits)], &["shop.example"])
        .await?;
    is(&rig.get("shop.example", "/").await?, StatusCode::OK);
    // Four that say nothing take all the places, for as long as a handshake may take.
    eventually("the last client to have gone", SOON, || async {
        let shown = rig.gateways().await?;
        ensure!(rig.shown_port(&shown)?["connections"] == 0, "{shown}");
        Ok(())
    })
    .await?;
    let mut mute = Vec::new();
    for _ in 0..4 {
        mute.push(TcpStream::connect(rig.address()).await?);
    }
    eventually("all places to be taken", SOON, || async {
        let shown = rig.gateways().await?;
        ensure!(rig.shown_port(&shown)?["connections"] == 4, "{shown}");
        Ok(())
    })
    .await?;
    let mut fifth = TcpStream::connect(rig.address()).await?;
    // Closed at once, or reset: it was told nothing.
    let read = tokio::time::timeout(SOON, fifth.read(&mut [0; 16])).await?;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    let node = rig.mesh.node("a1")?;
    assert!(node.metric("leeward_connections_refused_total", &[]).await? >= 1.0);
    for mut stream in mute {
        let read = tokio::time::timeout(SOON, stream.read(&mut [0; 16])).await?;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
    eventually("places to be free again", SOON, || async {
        is(&rig.get("shop.example", "/").await?, StatusCode::OK);
        Ok(())
    })
    .await?;
    // Heads.
    for alpn in ["http/1.1", "h2"] {
        let hello = Hello {
            sni: "shop.example",
            alpn: &[alpn],
            ..Hello::default()
        };
        let large = with_header(get("shop.example", "/"), "x-large", &"a".repeat(9 << 10));
        let reply = eventually("a place", SOON, || rig.ask(&hello, get("shop.example", "/"))).await?;
        is(&reply, StatusCode::OK);
        match rig.ask(&hello, large).await {
            Ok(reply) => is(&reply, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
            // hyper's client is told by the settings beforehand, and doesn't send it.
            Err(error) => assert_eq!(alpn, "h2", "{error:#}"),
        }
    }
    // A connection without a request ends.
    let mut idle = rig
        .tls(&Hello {
            sni: "shop.example",
            alpn: &["http/1.1"],
            ..Hello::default()
        })
        .await?;
    let read = tokio::time::timeout(SOON, idle.read(&mut [0; 16])).await?;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_are_only_reset_end_their_connection_and_no_other() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example"])?;
    rig.open(&[rig.https("https", "shop", "")], &["shop.example"])
        .await?;
    let hello = Hello {
        sni: "shop.example",
        alpn: &["h2"],
        ..Hello::default()
    };
    let io = hyper_util::rt::TokioIo::new(rig.tls(&hello).await?);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), io).await?;
    let connection = tokio::spawn(connection);
    rig.backend.behave(leeward_testkit::Behave::Hang);
    // Dropping what waits for an answer resets its stream.
    let reset = async {
        while !connection.is_finished() {
            if sender.ready().await.is_err() {
                break;
            }
            let before = rig.backend.requests();
            let request = http::Request::get("https://shop.example/").body(leeward_testkit::empty_body())?;
            let answer = std::pin::pin!(sender.send_request(request));
            // hyper doesn't send what is dropped before its connection has had a turn.
            let arrival = std::pin::pin!(async {
                while rig.backend.requests() == before {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
            drop(futures_util::future::select(answer, arrival).await);
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(SOON, reset).await??;
    rig.backend
        .behave(leeward_testkit::Behave::Answer(leeward_testkit::Answer::text(
            "ok",
        )));
    is(&rig.get("shop.example", "/").await?, StatusCode::OK);
    // The mesh's own connections have no such bound, and policy may change it meanwhile.
    rig.mesh
        .apply(&gateway(
            "public",
            &[rig.https("https", "shop", "http3: true")],
            "",
        ))
        .await?;
    is(&rig.get("shop.example", "/").await?, StatusCode::OK);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_web_socket_keeps_its_place_and_ends_when_it_is_silent() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example"])?;
    let echo = WebSocketEcho::start()?;
    rig.mesh
        .apply(&service("shop", &[(echo.address(), "a", "a1")], &[]))
        .await?;
    let limits = "limits: {maxConnections: 1, idleTimeout: 5s}";
    rig.open(&[rig.https("https", "shop", limits)], &["shop.example"])
        .await?;
    let hello = Hello {
        sni: "shop.example",
        alpn: &["http/1.1"],
        ..Hello::default()
    };
    let connecting = tokio_tungstenite::client_async("ws://shop.example/", rig.tls(&hello).await?);
    let (mut socket, response) = tokio::time::timeout(SOON, connecting).await??;
    assert_eq!(response.status(), 101);
    let shown = rig.gateways().await?;
    assert_eq!(rig.shown_port(&shown)?["connections"], 1, "{shown}");
    assert!(rig.tls(&hello).await.is_err(), "the only place is taken");
    let ended = tokio::time::timeout(SOON, socket.next()).await?;
    assert!(!matches!(ended, Some(Ok(_))), "{ended:?}");
    eventually("its place to be free", SOON, || async {
        let shown = rig.gateways().await?;
        ensure!(rig.shown_port(&shown)?["connections"] == 0, "{shown}");
        Ok(())
    })
    .await?;
    Ok(())
}

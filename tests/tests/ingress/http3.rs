//! HTTP/3, by a client in Rust.

use crate::kit::{Hello, Http3, Rig, SOON, gateway, h3_request, is, route_of};
use anyhow::ensure;
use bytes::{Buf, Bytes};
use http::{HeaderMap, StatusCode};
use leeward_testkit::policy::service;
use leeward_testkit::{Answer, Behave, eventually};

async fn rig() -> anyhow::Result<Rig> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example", "late.example"])?;
    rig.certify("other", &["other.example"])?;
    let listeners = [
        rig.https("https", "shop, other", "http3: true"),
        rig.https("tcp", "other", "hostname: tcp.example"),
    ];
    rig.open(
        &listeners,
        &["shop.example", "other.example", "tcp.example", "late.example"],
    )
    .await?;
    Ok(rig)
}

async fn connect(rig: &Rig, sni: &str) -> anyhow::Result<Http3> {
    let hello = Hello {
        sni,
        ..Hello::default()
    };
    eventually("HTTP/3", SOON, || rig.http3(&hello)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_go_the_same_way_with_bodies_and_trailers() -> anyhow::Result<()> {
    let rig = rig().await?;
    let mut http3 = connect(&rig, "shop.example").await?;
    // Those who come by TCP are told where it is, and those who are there aren't.
    let told = rig.get("shop.example", "/").await?;
    assert_eq!(
        told.header("alt-svc"),
        format!("h3=\":{}\"; ma=86400", rig.address().port())
    );
    rig.backend.take_seen();
    let reply = http3.get("shop.example", "/a?b=c").await?;
    is(&reply, StatusCode::OK);
    assert!(!reply.headers.contains_key("alt-svc"));
    let seen = rig.backend.take_seen().pop().unwrap();
    assert_eq!((seen.method.as_str(), seen.target.as_str()), ("GET", "/a?b=c"));
    assert_eq!(seen.headers["host"], "shop.example");
    assert!(!seen.headers.contains_key("transfer-encoding"), "{seen:?}");
    is(
        &http3
            .call(h3_request("HEAD", "shop.example", "/"), &[], None)
            .await?,
        StatusCode::OK,
    );

    // A body both ways, larger than every window, as it comes.
    rig.mesh
        .apply(&service(
            "shop",
            &[(rig.backend.address(), "a", "a1")],
            &["protocol: HTTP2"],
        ))
        .await?;
    rig.backend.behave(Behave::Echo);
    let piece = vec![7u8; 1 << 20];
    let mut stream = http3
        .sender
        .send_request(h3_request("POST", "shop.example", "/echo"))
        .await?;
    let is_first = stream.send_data(Bytes::from_static(b"first"));
    tokio::time::timeout(SOON, is_first).await??;
    let head = tokio::time::timeout(SOON, stream.recv_response()).await??;
    assert_eq!(
        head.status(),
        StatusCode::OK,
        "the answer begins before the request has ended"
    );
    let first = tokio::time::timeout(SOON, stream.recv_data())
        .await??
        .unwrap()
        .copy_to_bytes(5);
    assert_eq!(&*first, b"first");
    let (mut send, mut receive) = stream.split();
    let sending = async {
        for _ in 0..6 {
            send.send_data(Bytes::copy_from_slice(&piece)).await?;
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", "7".parse()?);
        send.send_trailers(trailers).await?;
        send.finish().await?;
        anyhow::Ok(())
    };
    let receiving = async {
        let mut length = 0;
        while let Some(data) = receive.recv_data().await? {
            length += data.remaining();
        }
        anyhow::Ok((length, receive.recv_trailers().await?))
    };
    let both = async { tokio::try_join!(sending, receiving) };
    let ((), (length, trailers)) = tokio::time::timeout(SOON, both).await??;
    assert_eq!(length, 6 << 20);
    assert_eq!(trailers.unwrap()["x-sum"], "7");

    // Hosts, as by TCP.
    is(
        &http3.get("other.example", "/").await?,
        StatusCode::MISDIRECTED_REQUEST,
    );
    is(
        &http3.get("tcp.example", "/").await?,
        StatusCode::MISDIRECTED_REQUEST,
    );
    is(
        &connect(&rig, "other.example")
            .await?
            .get("other.example", "/")
            .await?,
        StatusCode::OK,
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_given_up_is_given_up_everywhere() -> anyhow::Result<()> {
    let rig = rig().await?;
    let mut http3 = connect(&rig, "shop.example").await?;
    rig.mesh
        .apply(&(route_of("late", "late.example", "shop", "{name: public}")))
        .await?;
    rig.backend.behave(Behave::Hang);
    let node = rig.mesh.node("a1")?;
    let active = async || {
        node.metric("leeward_requests_active", &["direction=\"ingress\""])
            .await
    };
    // STOP_SENDING for the answer, and RESET_STREAM for the request.
    let mut stopped = http3
        .sender
        .send_request(h3_request("GET", "shop.example", "/stopped"))
        .await?;
    stopped.finish().await?;
    let mut reset = http3
        .sender
        .send_request(h3_request("POST", "shop.example", "/reset"))
        .await?;
    reset.send_data(Bytes::from_static(b"half")).await?;
    eventually("both to be under way", SOON, || async {
        let active = active().await?;
        ensure!(active >= 2.0, "{active}");
        Ok(())
    })
    .await?;
    stopped.stop_sending(h3::error::Code::H3_REQUEST_CANCELLED);
    reset.stop_stream(h3::error::Code::H3_REQUEST_CANCELLED);
    reset.stop_sending(h3::error::Code::H3_REQUEST_CANCELLED);
    eventually("both to be given up", SOON, || async {
        let active = active().await?;
        ensure!(active < 1.0, "{active}");
        // A request whose body breaks off may end as a failure first.
        let gone = node
            .metric(
                "leeward_requests_total",
                &["direction=\"ingress\"", "reason=\"client_gone\""],
            )
            .await?;
        ensure!(gone >= 1.0, "{gone}");
        Ok(())
    })
    .await?;
    // An answer that breaks off doesn't look whole.
    rig.backend.behave(Behave::CutShort);
    let cut = http3.get("shop.example", "/cut").await;
    assert!(cut.is_err(), "{cut:?}");
    rig.backend.behave(Behave::Answer(Answer::text("ok")));
    is(&http3.get("shop.example", "/").await?, StatusCode::OK);
    Ok(())
}

/// A frame HEADERS (RFC 9114 §7.2.2) with a field of so many bytes, spelled out in QPACK (RFC 9204 §4.5).
fn large_head(length: usize) -> Vec<u8> {
    // No dynamic table; GET, https, the path / and the authority by the static table.
    let mut fields = vec![0, 0, 0xd1, 0xd7, 0xc1, 0x50, 12];
    fields.extend(b"shop.example");
    fields.extend([0x27, 0]);
    fields.extend(b"x-large");
    fields.push(0x7f);
    let mut left = length - 127;
    while left >= 128 {
        fields.push(u8::try_from(left % 128).unwrap() | 128);
        left /= 128;
    }
    fields.push(u8::try_from(left).unwrap());
    fields.extend(std::iter::repeat_n(b'a', length));
    let mut frame = vec![0x01];
    frame.extend((u32::try_from(fields.len()).unwrap() | 0x8000_0000).to_be_bytes());
    frame.extend(fields);
    frame
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_can_make_the_proxy_hold_is_bounded() -> anyhow::Result<()> {
    let rig = rig().await?;
    let mut http3 = connect(&rig, "shop.example").await?;
    // Too large a head is answered.
    let mut large = h3_request("GET", "shop.example", "/");
    large
        .headers_mut()
        .insert("x-large", "a".repeat(70 << 10).parse()?);
    match http3.call(large, &[], None).await {
        Ok(reply) => is(&reply, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
        // A client that has heard of the bound doesn't send it.
        Err(told) => assert!(told.to_string().contains("max size: 65536"), "{told:#}"),
    }
    let (mut send, mut receive) = http3.quic.open_bi().await?;
    send.write_all(&large_head(70 << 10)).await?;
    let mut head = [0; 1];
    tokio::time::timeout(SOON, receive.read_exact(&mut head)).await??;
    assert_eq!(head, [0x01], "an answer, and not a reset");
    // A frame that would be held whole is refused by its length, before it has come.
    let (mut send, mut receive) = http3.quic.open_bi().await?;
    // HEADERS, of a gibibyte.
    send.write_all(&[0x01, 0xc0, 0, 0, 0, 0x40, 0, 0, 0]).await?;
    let refused = tokio::time::timeout(SOON, receive.read(&mut [0; 64])).await?;
    let code = h3::error::Code::H3_EXCESSIVE_LOAD.value();
    let why = format!("{refused:?} {:?}", send.stopped().await);
    assert!(refused.is_err(), "{why}");
    assert!(why.contains(&code.to_string()), "{why}");
    // A body that isn't as long as it says (RFC 9114 §4.1.2).
    for (says, pieces) in [("3", &[&b"four"[..]][..]), ("9", &[&b"four"[..]])] {
        let mut request = h3_request("POST", "shop.example", "/length");
        request.headers_mut().insert("content-length", says.parse()?);
        rig.backend.behave(Behave::AfterBody(Answer::text("taken")));
        let reply = http3.call(request, pieces, None).await;
        assert!(
            !reply.as_ref().is_ok_and(|reply| reply.status == StatusCode::OK),
            "{says}: {reply:?}"
        );
    }
    rig.backend.behave(Behave::Answer(Answer::text("ok")));
    is(
        &connect(&rig, "shop.example")
            .await?
            .get("shop.example", "/")
            .await?,
        StatusCode::OK,
    );

    // Streams that are opened only to be reset (CVE-2023-44487, in HTTP/3): the connection is cut, others go on.
    rig.backend.behave(Behave::Hang);
    let reset = async {
        loop {
            let mut stream = match http3
                .sender
                .send_request(h3_request("GET", "shop.example", "/"))
                .await
            {
                Ok(stream) => stream,
                Err(error) => return error.to_string(),
            };
            stream.stop_stream(h3::error::Code::H3_REQUEST_CANCELLED);
            stream.stop_sending(h3::error::Code::H3_REQUEST_CANCELLED);
        }
    };
    let why = tokio::time::timeout(SOON, reset).await?;
    let closed = http3.quic.close_reason().map(|reason| reason.to_string());
    assert!(
        closed
            .as_ref()
            .is_some_and(|closed| closed.contains(&code.to_string())),
        "{why} {closed:?}"
    );
    rig.backend.behave(Behave::Answer(Answer::text("ok")));
    is(
        &connect(&rig, "shop.example")
            .await?
            .get("shop.example", "/")
            .await?,
        StatusCode::OK,
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_says_goaway_and_serves_what_is_under_way() -> anyhow::Result<()> {
    let mut rig = rig().await?;
    let mut http3 = connect(&rig, "shop.example").await?;
    is(&http3.get("shop.example", "/").await?, StatusCode::OK);
    rig.backend
        .behave(Behave::Dribble(40, std::time::Duration::from_millis(50)));
    let mut slow = http3
        .sender
        .send_request(h3_request("GET", "shop.example", "/slow"))
        .await?;
    slow.finish().await?;
    let head = tokio::time::timeout(SOON, slow.recv_response()).await??;
    assert_eq!(head.status(), StatusCode::OK);
    rig.mesh.node("a1")?.process.signal(rustix::process::Signal::TERM);
    let mut length = 0;
    while let Some(data) = tokio::time::timeout(SOON, slow.recv_data()).await?? {
        length += data.remaining();
    }
    assert_eq!(length, 40, "all of it came");
    drop(slow);
    let late = http3.get("shop.example", "/late").await;
    assert!(late.is_err(), "it was told to go elsewhere: {late:?}");
    let ended = rig.mesh.node_mut("a1")?.process.wait(SOON).await?;
    assert!(ended.success(), "{ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_comes_up_when_the_roots_of_its_clients_do() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example"])?;
    let listener = rig.https(
        "https",
        "",
        "http3: true, tls: {certificateRefs: [shop], clientValidation: {caCertificateRefs: [clients]}}",
    );
    let policy =
        gateway("public", &[listener], "") + &route_of("shop", "shop.example", "shop", "{name: public}");
    rig.mesh.apply(&policy).await?;
    eventually("the roots to be missed", SOON, || async {
        let shown = rig.gateways().await?;
        let port = rig.shown_port(&shown)?;
        ensure!(port["listeners"][0]["problem"].is_string(), "{shown}");
        ensure!(port["http3"] == false, "{shown}");
        Ok(())
    })
    .await?;
    rig.put("clients.pem", &rig.ca.pem)?;
    eventually("HTTP/3 to be listened for", SOON, || async {
        let shown = rig.gateways().await?;
        ensure!(rig.shown_port(&shown)?["http3"] == true, "{shown}");
        Ok(())
    })
    .await?;
    let own = rig.ca.issue(&[])?;
    let hello = Hello {
        sni: "shop.example",
        own: Some(&own),
        ..Hello::default()
    };
    let mut http3 = eventually("HTTP/3", SOON, || rig.http3(&hello)).await?;
    is(&http3.get("shop.example", "/").await?, StatusCode::OK);
    Ok(())
}

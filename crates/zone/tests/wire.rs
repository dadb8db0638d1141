//! Peers that speak QUIC, but not our protocol.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[allow(dead_code, reason = "each test uses its part")]
mod common;

use bytes::Bytes;
use common::{Answers, Domain, Served, run, server};
use leeward_identity::Identity;
use leeward_zone::{ALPN, MAX_DATA};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, ConnectionError, Endpoint, ReadError, VarInt};
use std::sync::Arc;
use std::time::Duration;

async fn connect(identity: &Identity, served: &Served, alpn: &[u8]) -> Result<Connection, ConnectionError> {
    let tls = identity.client_config(&[alpn], &served.id).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connecting = endpoint.connect_with(config, served.address, "leeward").unwrap();
    connecting.await
}

/// What the server answers to bytes on a stream of their own: all that comes, or how it is broken off.
async fn ask(quic: &Connection, bytes: &[u8]) -> Result<Vec<u8>, ReadError> {
    let (mut send, mut recv) = quic.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    let _ = send.finish();
    let mut all = Vec::new();
    while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
        all.extend_from_slice(&chunk.bytes);
    }
    Ok(all)
}

fn reset(result: Result<Vec<u8>, ReadError>) -> u64 {
    match result {
        Err(ReadError::Reset(code)) => code.into_inner(),
        other => panic!("{other:?}"),
    }
}

/// HEAD of `GET http://shop/x`, nothing follows.
const GET: &[u8] = b"\x00\x0d\x01\x03GET\x04shop\x02/x";
/// HEAD of `POST http://shop/x`, a body follows.
const POST: &[u8] = b"\x00\x0e\x00\x04POST\x04shop\x02/x";

#[test]
fn the_bytes_are_as_written_down() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Early).await;
        let quic = connect(&domain.identity("a1"), &served, ALPN).await.unwrap();
        let answer = ask(&quic, GET).await.unwrap();
        // HEAD, its length in four bytes, flags, status 403; DATA of two bytes.
        assert_eq!(answer, b"\x00\x80\x00\x00\x03\x00\x41\x93\x01\x02no");
    });
}

#[test]
fn frames_of_unknown_types_are_skipped() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let quic = connect(&domain.identity("a1"), &served, ALPN).await.unwrap();
        let unknown = b"\x3f\x05later";
        let asked = [unknown, POST, unknown, b"\x01\x02hi", unknown].concat();
        let answer = ask(&quic, &asked).await.unwrap();
        assert!(answer.ends_with(b"\x01\x02hi"), "{answer:?}");
    });
}

#[test]
fn garbage_gives_up_its_own_stream_only() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let quic = connect(&domain.identity("a1"), &served, ALPN).await.unwrap();
        const PROTOCOL: u64 = 6;
        const TOO_LARGE: u64 = 4;
        // No head at all; a head of nonsense; a head that ends in its middle; a body first.
        assert_eq!(reset(ask(&quic, b"").await), PROTOCOL);
        assert_eq!(reset(ask(&quic, b"\x00\x03\xff\xff\xff").await), PROTOCOL);
        assert_eq!(reset(ask(&quic, &GET[..5]).await), PROTOCOL);
        assert_eq!(reset(ask(&quic, b"\x01\x02hi").await), PROTOCOL);
        // A head that is too long, before it has come.
        assert_eq!(reset(ask(&quic, b"\x00\x80\x10\x00\x00").await), TOO_LARGE);
        // In a body: another head, DATA that is too long, and more than content-length says.
        let head = |length: &str| {
            let mut head = b"\x00\x20\x00\x04POST\x04shop\x02/x\x0econtent-length".to_vec();
            head.push(u8::try_from(length.len()).unwrap());
            head.extend_from_slice(length.as_bytes());
            head[1] = u8::try_from(head.len() - 2).unwrap();
            head
        };
        for bad in [
            [POST, POST].concat(),
            [POST, &[1, 0x80, 0x01, 0x00, 0x01][..]].concat(),
            [&head("1")[..], b"\x01\x02hi"].concat(),
            [&head("3")[..], b"\x01\x02hi"].concat(),
        ] {
            ask(&quic, &bad).await.unwrap_err();
        }
        assert_eq!(MAX_DATA, 0x1_0000);
        // Lengths that can't be read are no lengths.
        assert_eq!(reset(ask(&quic, &head("x")).await), PROTOCOL);
        // Others on the same connection have not noticed.
        ask(&quic, GET).await.unwrap();
    });
}

#[test]
fn a_control_stream_that_breaks_the_protocol_ends_the_connection() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let identity = domain.identity("a1");
        // HEALTH before SETTINGS; SETTINGS twice; a head; a setting below its least; an end.
        let cases: [&[u8]; 5] = [
            b"\x11\x00",
            b"\x10\x00\x10\x00",
            b"\x10\x00\x00\x01\x00",
            b"\x10\x02\x02\x01",
            b"\x10\x00",
        ];
        for bytes in cases {
            let quic = connect(&identity, &served, ALPN).await.unwrap();
            let mut control = quic.open_uni().await.unwrap();
            control.write_chunk(Bytes::copy_from_slice(bytes)).await.unwrap();
            control.finish().unwrap();
            let closed = tokio::time::timeout(Duration::from_secs(2), quic.closed()).await;
            let ConnectionError::ApplicationClosed(close) = closed.expect("closed") else {
                panic!("{bytes:?}: not closed by the server");
            };
            assert_eq!(close.error_code, VarInt::from_u32(2), "{bytes:?}");
        }
    });
}

#[test]
fn another_protocol_is_not_spoken() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let refused = connect(&domain.identity("a1"), &served, b"h3").await;
        match refused {
            Err(ConnectionError::ConnectionClosed(close)) => {
                assert!(close.to_string().contains("protocol"), "{close}");
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn nobody_without_a_certificate() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(common::Anyone(provider)))
            .with_no_client_auth();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let connecting = endpoint.connect_with(config, served.address, "leeward").unwrap();
        let closed = match connecting.await {
            Ok(quic) => quic.closed().await,
            Err(error) => error,
        };
        assert!(closed.to_string().contains("certificate"), "{closed}");
        assert_eq!(served.connections.get(), 0);
    });
}

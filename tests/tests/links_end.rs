//! Connections between proxies end with the certificates that they were made with, and no request with them that could have
//! gone by another.

use anyhow::{Context, ensure};
use http::Method;
use leeward_identity::{Identity, SpiffeId};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Client, Load, Mesh, Protocol, empty_body, eventually, request,
};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

const DOMAIN: &str = "leeward.test";
const SOON: Duration = Duration::from_secs(30);
/// How long certificates last here. Files are looked at every 5 s.
const LIFE: Duration = Duration::from_secs(30);
/// How often there are others.
const EVERY: Duration = Duration::from_secs(2);
const NODES: [(&str, &str); 3] = [("a", "a1"), ("a", "a2"), ("b", "b1")];

/// Gives each proxy its next certificate.
fn issue(mesh: &Mesh) -> anyhow::Result<()> {
    let root = mesh.root()?;
    for (zone, name) in NODES {
        root.issue(&SpiffeId::proxy(DOMAIN, zone, name)?, LIFE, &mesh.identity(name))?;
    }
    Ok(())
}

async fn issued(mesh: &Mesh) -> anyhow::Result<()> {
    for (_, name) in NODES {
        let node = mesh.node(name)?;
        eventually("the proxy to have its certificate", SOON, || async {
            let config = node.config().await?;
            let left = config
                .pointer("/identity/seconds_left")
                .and_then(serde_json::Value::as_u64);
            ensure!(left.is_some_and(|left| left <= LIFE.as_secs()), "{left:?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// A client that heeds nothing that it is asked: it keeps its connection, by a certificate that lasts half as long, and says for
/// how long it had it.
async fn stubborn(mesh: &Mesh, to: (&str, &str, SocketAddr)) -> anyhow::Result<Duration> {
    let (zone, name, address) = to;
    let dir = mesh.dir().join("stubborn");
    mesh.root()?
        .issue(&SpiffeId::proxy(DOMAIN, "a", "stubborn")?, LIFE / 2, &dir)?;
    let config = Identity::load(dir)?.client_config(&[b"h2"], &SpiffeId::proxy(DOMAIN, zone, name)?)?;
    let stream = TcpStream::connect(address).await?;
    let mut tls = TlsConnector::from(config)
        .connect(address.ip().into(), stream)
        .await?;
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await?;
    // Settings first, so that it was let in.
    tls.read_u8().await?;
    let began = Instant::now();
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(4 * LIFE, tls.read_to_end(&mut rest)).await;
    drop(ended.context("the connection is still open")?);
    Ok(began.elapsed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_end_with_their_certificates_and_no_request_with_them() -> anyhow::Result<()> {
    let mut builder = Mesh::builder();
    for (zone, name) in NODES {
        builder = builder.node(zone, name);
    }
    let mesh = builder.start().await?;
    issue(&mesh)?;
    issued(&mesh).await?;
    let backend = Backend::start("app")?;
    backend.behave(Behave::ByPath {
        paths: vec![("/hang".to_owned(), Behave::Hang)],
        other: Box::new(Behave::Answer(Answer::text("here"))),
    });
    let at = backend.address();
    // To another zone by QUIC, within the zone by TLS over TCP.
    let ways = [
        ("quic", ("b", "b1"), "protocol: HTTP1"),
        ("http1", ("a", "a2"), "protocol: HTTP1"),
        ("http2", ("a", "a2"), "protocol: HTTP2"),
    ];
    let mut policy = String::new();
    for (name, (zone, proxy), protocol) in ways {
        policy += &service(name, &[(at, zone, proxy)], &[protocol]);
        policy += &route(
            name,
            &format!("{name}.example"),
            name,
            &["timeouts: {request: 300s}"],
        );
    }
    mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    let hosts = ways.map(|(name, ..)| format!("{name}.example"));
    let client = Client::new(outbound, Protocol::Http1);
    for host in &hosts {
        let reply = client.get(host, "/").await?;
        ensure!(reply.status == 200, "{host}: {}", reply.status);
    }
    let loads: Vec<_> = hosts
        .iter()
        .map(|host| {
            Load::start(
                outbound,
                Protocol::Http1,
                (host, "/"),
                3,
                Duration::from_millis(5),
            )
        })
        .collect();
    // One that is under way when its connection ends.
    let began = Instant::now();
    let hanging = hosts.clone().map(|host| {
        tokio::spawn(async move {
            let client = Client::new(outbound, Protocol::Http1);
            // It is not idempotent, so nobody sends it again.
            let hang = request(Method::POST, &host, "/hang", empty_body());
            let answered = client.send(hang).await;
            (
                host,
                answered.map(|reply| reply.status().as_u16()),
                began.elapsed(),
            )
        })
    });
    let b1 = ("b", "b1", mesh.node("b1")?.inbound);
    let lasted = {
        let stubborn = stubborn(&mesh, b1);
        let mut stubborn = std::pin::pin!(stubborn);
        let mut lasted = None;
        let until = Instant::now() + LIFE + LIFE / 2;
        while Instant::now() < until {
            issue(&mesh)?;
            tokio::select! {
                ended = stubborn.as_mut(), if lasted.is_none() => lasted = Some(ended?),
                () = tokio::time::sleep(EVERY) => {}
            }
        }
        lasted.context("the connection has outlived its certificate")?
    };
    ensure!((LIFE / 3..LIFE).contains(&lasted), "{lasted:?}");
    for load in loads {
        let tally = load.stop().await;
        ensure!(tally.failed == 0 && tally.served > 100, "{tally:?}");
    }
    for hanging in hanging {
        let (host, status, after) = hanging.await?;
        // Not when others took another connection, but at the end.
        ensure!(after > LIFE / 2, "{host}: {status:?} after {after:?}");
        ensure!(after < 2 * LIFE, "{host}: {status:?} after {after:?}");
    }
    Ok(())
}

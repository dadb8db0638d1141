//! Zones that are reached through their gateways only: what passes, whose it is taken to be, and what happens when a
//! gateway dies.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::Method;
use leeward_identity::{Identity, SpiffeId};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Client, Load, Mesh, Node, Port, Protocol, WebSocketEcho, bytes_body,
    call_streaming, eventually, grpc_channel, request, with_header, zeros_body,
};
use rustix::process::Signal;
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

const SOON: Duration = Duration::from_secs(30);
const CLIENTS: usize = 8;
const PAUSE: Duration = Duration::from_millis(2);
/// How long a link to a proxy that is gone may stay unnoticed (docs/zone-protocol.md).
const DEAD_LINK: Duration = Duration::from_secs(2);

/// Zones a, c with a proxy each, and b with the gateways g1 and g2, and a proxy b1 behind them.
async fn mesh() -> anyhow::Result<Mesh> {
    Mesh::builder()
        .node("a", "a1")
        .node("b", "g1")
        .node("b", "g2")
        .node("b", "b1")
        .node("c", "c1")
        .flag("--access-log", "stdout")
        .start()
        .await
}

/// Zone b. `gateways` as it stands in YAML; `more` are further fields.
fn zone_b(mesh: &Mesh, gateways: &str, more: &str) -> anyhow::Result<String> {
    let proxy = |name: &str| -> anyhow::Result<String> {
        Ok(format!(
            "{{name: {name}, address: \"{}\"}}",
            mesh.node(name)?.inbound
        ))
    };
    let proxies = [proxy("g1")?, proxy("g2")?, proxy("b1")?].join(", ");
    Ok(format!(
        "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: b}}\nspec: {{proxies: [{proxies}], gateways: [{gateways}]{more}}}\n"
    ))
}

const BOTH: &str = "{name: g1}, {name: g2}";

/// The same, and `app.example` behind b1.
async fn behind(address: SocketAddr, zone: &str, more: &[&str], rule: &[&str]) -> anyhow::Result<Mesh> {
    let mesh = mesh().await?;
    let policy = zone_b(&mesh, BOTH, zone)?
        + &service("app", &[(address, "b", "b1")], more)
        + &route("app", "app.example", "app", rule);
    mesh.apply(&policy).await?;
    Ok(mesh)
}

/// The lines of an access log that are about one path.
fn lines(node: &Node, path: &str) -> anyhow::Result<Vec<Value>> {
    let log = node.process.log()?;
    let lines = log.lines().filter(|line| line.starts_with('{'));
    let mut about = Vec::new();
    for line in lines {
        let line: Value = serde_json::from_str(line)?;
        if line["path"] == path {
            about.push(line);
        }
    }
    Ok(about)
}

/// Waits for so many of them.
async fn lines_soon(node: &Node, path: &str, count: usize) -> anyhow::Result<Vec<Value>> {
    eventually("lines in the log", SOON, || async {
        let lines = lines(node, path)?;
        ensure!(lines.len() >= count, "{} of {count}", lines.len());
        Ok(lines)
    })
    .await
}

/// One request straight to a proxy of zone b, as another proxy. `fields` are header lines.
async fn as_proxy(mesh: &Mesh, who: &str, to: &str, fields: &[&str]) -> anyhow::Result<String> {
    let inbound = mesh.node(to)?.inbound;
    let identity = Identity::load(mesh.identity(who))?;
    let expect = SpiffeId::proxy("leeward.test", "b", to)?;
    let config = identity.client_config(&[b"http/1.1"], &expect)?;
    let stream = TcpStream::connect(inbound).await?;
    let mut stream = tokio_rustls::TlsConnector::from(config)
        .connect(inbound.ip().into(), stream)
        .await?;
    let request = format!(
        "GET /raw HTTP/1.1\r\nHost: app.example\r\nConnection: close\r\n{}\r\n\r\n",
        fields.join("\r\n")
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    tokio::time::timeout(SOON, stream.read_to_string(&mut answer)).await??;
    Ok(answer)
}

#[track_caller]
fn refused(answer: &str, status: u16, reason: &str) {
    let lower = answer.to_ascii_lowercase();
    assert!(
        lower.starts_with(&format!("http/1.1 {status}"))
            && lower.contains(&format!("leeward-reason: {reason}\r\n")),
        "{answer}; want {status} {reason}"
    );
}

/// How often a gateway has passed something on.
async fn passed_on(node: &Node) -> anyhow::Result<f64> {
    node.metric(
        "leeward_requests_total",
        &["direction=\"inbound\"", "outcome=\"served\""],
    )
    .await
}

/// Waits until each of both gateways has passed on more than so many requests: somebody else's, or those of a client.
async fn both_pass(mesh: &Mesh, more_than: f64, client: Option<&Client>) -> anyhow::Result<()> {
    for gateway in ["g1", "g2"] {
        eventually("both gateways to pass requests on", SOON, || async {
            if let Some(client) = client {
                client.get("app.example", "/").await?;
            }
            let passed = passed_on(mesh.node(gateway)?).await?;
            ensure!(passed > more_than, "{gateway}: {passed}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_quic_everything_passes_gateways() -> anyhow::Result<()> {
    everything_passes("Quic").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_tcp_everything_passes_gateways() -> anyhow::Result<()> {
    everything_passes("Tcp").await
}

async fn everything_passes(transport: &str) -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let zone = format!(", transport: {transport}");
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let speaks = match protocol {
            Protocol::Http1 => "protocol: HTTP1",
            Protocol::Http2 => "protocol: HTTP2",
        };
        backend.behave(Behave::Answer(Answer::text("app")));
        let mesh = behind(backend.address(), &zone, &[speaks], &[]).await?;
        let client = mesh.workload("a1", protocol)?;
        // Their sockets for QUIC may be there a little later than they are.
        for gateway in ["g1", "g2"] {
            eventually("both gateways to pass requests on", SOON, || async {
                let reply = client.get("app.example", "/first").await?;
                ensure!(reply.status == 200, "{reply:?}");
                let passed = passed_on(mesh.node(gateway)?).await?;
                ensure!(passed > 0.5, "{gateway}: {passed}");
                Ok(())
            })
            .await?;
        }
        for _ in 0..20 {
            let reply = client.get("app.example", "/plain").await?;
            assert_eq!(
                (reply.status.as_u16(), reply.backend()),
                (200, "app"),
                "{reply:?}"
            );
        }
        // Whoever is last knows the caller, and who has passed it on.
        for line in lines_soon(mesh.node("b1")?, "/plain", 20).await? {
            assert_eq!(line["peer"], "spiffe://leeward.test/zone/a/proxy/a1", "{line}");
            let gateway = line["gateway"].as_str().context("no gateway")?;
            assert!(["g1", "g2"].contains(&gateway), "{line}");
        }
        let by = |line: &Value| line["attempts"][0]["gateway"].as_str().map(str::to_owned);
        let sent = lines_soon(mesh.node("a1")?, "/plain", 20).await?;
        assert!(sent.iter().all(|line| by(line).is_some()), "{sent:?}");
        let (quic, other) = match transport {
            "Quic" => (true, ["h2", "http1"]),
            _ => (false, ["quic", "quic"]),
        };
        for transport in other {
            let by = format!("transport=\"{transport}\"");
            let went = mesh.node("a1")?.metric("leeward_attempts_total", &[&by]).await?;
            assert!(went < 0.5, "{went} went by {transport}");
        }
        let by_quic = mesh
            .node("a1")?
            .metric("leeward_attempts_total", &["transport=\"quic\""])
            .await?;
        assert_eq!(by_quic > 0.5, quic, "{by_quic}");

        // Bodies stream both ways.
        backend.behave(Behave::Echo);
        let sent = request(Method::POST, "app.example", "/bulk", zeros_body(3 << 20));
        assert_eq!(client.call(sent).await?.body.len(), 3 << 20);
        backend.behave(Behave::Dribble(5, Duration::from_millis(20)));
        assert_eq!(client.get("app.example", "/dribble").await?.body.len(), 5);
        if protocol == Protocol::Http2 {
            backend.behave(Behave::Grpc);
            let channel = grpc_channel(mesh.node("a1")?.outbound, "app.example")?;
            let (sender, response) = call_streaming(channel, "/echo.Echo/Talk").await?;
            let mut answers = response.into_inner();
            // Each message is answered before the next is sent: nothing on the way waits for an end.
            for i in 0..20u32 {
                let message = Bytes::from(format!("message {i}"));
                sender.send(message.clone()).await?;
                let answer = tokio::time::timeout(SOON, answers.message()).await??;
                assert_eq!(answer, Some(message));
            }
            drop(sender);
            assert_eq!(tokio::time::timeout(SOON, answers.message()).await??, None);
            let trailers = answers.trailers().await?.context("no trailers")?;
            assert_eq!(trailers.get("x-echoed").context("no x-echoed")?, "yes");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_protocols_passes_a_gateway() -> anyhow::Result<()> {
    let echo = WebSocketEcho::start()?;
    let mesh = behind(echo.address(), ", transport: Quic", &[], &[]).await?;
    let stream = TcpStream::connect(mesh.node("a1")?.outbound).await?;
    let connecting = tokio_tungstenite::client_async("ws://app.example/chat", stream);
    let (mut socket, response) = tokio::time::timeout(SOON, connecting).await??;
    assert_eq!(response.status(), 101);
    socket.send(Message::text("hello")).await?;
    let answer = tokio::time::timeout(SOON, socket.next())
        .await?
        .context("closed")??;
    assert_eq!(answer.into_text()?.as_str(), "hello");
    drop(socket);
    let line = lines_soon(mesh.node("b1")?, "/chat", 1).await?.remove(0);
    assert!(line["gateway"].is_string(), "{line}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_without_a_proxy_and_those_of_a_gateway_are_reached_through_gateways() -> anyhow::Result<()>
{
    let (bare, own) = (Backend::start("bare")?, Backend::start("own")?);
    let mesh = mesh().await?;
    let policy = zone_b(&mesh, BOTH, "")?
        + &service("bare", &[(bare.address(), "b", "")], &[])
        + &service("own", &[(own.address(), "b", "g2")], &[])
        + &route("bare", "bare.example", "bare", &[])
        + &route("own", "own.example", "own", &[]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for (host, backend) in [("bare.example", "bare"), ("own.example", "own")] {
        for _ in 0..10 {
            assert_eq!(client.get(host, "/").await?.backend(), backend);
        }
    }
    let through = |gateway: &str| {
        let lines = lines(mesh.node("a1")?, "/")?;
        let of = lines
            .iter()
            .filter(|line| line["host"] == "own.example" && line["attempts"][0]["gateway"] == *gateway);
        anyhow::Ok(of.count())
    };
    eventually("ten lines", SOON, || async {
        let (first, second) = (through("g1")?, through("g2")?);
        ensure!((first, second) == (0, 10), "{first} {second}");
        Ok(())
    })
    .await?;
    // Within the zone nothing changes.
    let within = mesh.workload("b1", Protocol::Http1)?;
    assert_eq!(within.get("own.example", "/within").await?.backend(), "own");
    let line = lines_soon(mesh.node("g2")?, "/within", 1).await?.remove(0);
    assert!(line["gateway"].is_null(), "{line}");
    Ok(())
}

/// Only callers of zone a may have `app`, and nobody `/no`.
const ONLY_A: &str = "---\napiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {name: only-a}\nspec:\n  services: [app]\n  action: Allow\n  rules: [{from: [{zones: [a]}], to: [{notPaths: [\"/no\"]}]}]\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn authorization_is_about_the_caller_and_not_the_gateway() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let mesh = behind(backend.address(), "", &[], &[]).await?;
    mesh.apply(ONLY_A).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let allowed = mesh.workload("a1", protocol)?.get("app.example", "/").await?;
        assert_eq!(allowed.status, 200, "{allowed:?}");
        // Neither another zone's callers, nor the gateways' own.
        for who in ["c1", "g1", "b1"] {
            let denied = mesh.workload(who, protocol)?.get("app.example", "/").await?;
            assert_eq!(
                (denied.status.as_u16(), denied.header("leeward-reason")),
                (403, "authorization_denied"),
                "{who}: {denied:?}"
            );
        }
    }
    assert_eq!(backend.requests(), 2);
    // The last proxy decides itself, by whom the gateway speaks for.
    let endpoint = format!("Leeward-Endpoint: app/{}@b1", backend.address());
    let caller =
        |zone: &str, name: &str| format!("Leeward-Caller: spiffe://leeward.test/zone/{zone}/proxy/{name}");
    let answer = as_proxy(&mesh, "g1", "b1", &[&endpoint, &caller("a", "a1")]).await?;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let answer = as_proxy(&mesh, "g1", "b1", &[&endpoint, &caller("c", "c1")]).await?;
    refused(&answer, 403, "authorization_denied");
    // So does the gateway, by the certificate of who asks it.
    let answer = as_proxy(&mesh, "c1", "g1", &[&endpoint]).await?;
    refused(&answer, 403, "authorization_denied");
    assert_eq!(backend.requests(), 3);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_a_gateway_of_the_zone_speaks_for_a_caller() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let mesh = behind(backend.address(), "", &[], &[]).await?;
    // Zone c has a gateway, too: which is none of zone b's.
    let zone_c = format!(
        "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: c}}\nspec: {{proxies: [{{name: c1, address: \"{}\"}}], gateways: [{{name: c1}}]}}\n",
        mesh.node("c1")?.inbound
    );
    mesh.apply(&(zone_c + ONLY_A)).await?;
    let before = backend.requests();
    let endpoint = format!("Leeward-Endpoint: app/{}@b1", backend.address());
    let a1 = "Leeward-Caller: spiffe://leeward.test/zone/a/proxy/a1";
    // A caller itself, another zone's gateway, a proxy of the zone that is no gateway: to the last proxy, and to a gateway.
    for (who, to) in [
        ("a1", "b1"),
        ("c1", "b1"),
        ("b1", "b1"),
        ("a1", "g1"),
        ("c1", "g1"),
        ("b1", "g1"),
    ] {
        let answer = as_proxy(&mesh, who, to, &[&endpoint, a1]).await?;
        refused(&answer, 403, "caller_refused");
    }
    // A gateway speaks for proxies of other zones, one at a time.
    let for_others = [
        "Leeward-Caller: spiffe://leeward.test/zone/b/proxy/b1",
        "Leeward-Caller: spiffe://elsewhere.test/zone/a/proxy/a1",
        "Leeward-Caller: spiffe://leeward.test/control",
        "Leeward-Caller: spiffe://leeward.test/zone/a/proxy/a1/x",
        "Leeward-Caller: a1",
        "Leeward-Caller:",
        "Leeward-Caller: spiffe://leeward.test/zone/a/proxy/a1\r\nLeeward-Caller: spiffe://leeward.test/zone/a/proxy/a1",
    ];
    for caller in for_others {
        let answer = as_proxy(&mesh, "g1", "b1", &[&endpoint, caller]).await?;
        refused(&answer, 403, "caller_refused");
    }
    let counted = mesh
        .node("b1")?
        .metric("leeward_requests_total", &["reason=\"caller_refused\""])
        .await?;
    assert!(counted > 9.5, "{counted}");
    // What a workload says is taken out, and changes nothing.
    let says = |host: &str| {
        let request = request(Method::GET, host, "/says", bytes_body(""));
        with_header(request, "leeward-caller", "spiffe://leeward.test/zone/a/proxy/a1")
    };
    for who in ["c1", "b1", "g1"] {
        let denied = mesh
            .workload(who, Protocol::Http1)?
            .call(says("app.example"))
            .await?;
        assert_eq!(
            (denied.status.as_u16(), denied.header("leeward-reason")),
            (403, "authorization_denied"),
            "{who}"
        );
    }
    assert_eq!(backend.requests(), before);
    let passes = mesh
        .workload("a1", Protocol::Http1)?
        .call(says("app.example"))
        .await?;
    assert_eq!(passes.status, 200);
    let seen = backend.take_seen().pop().context("nothing came")?;
    for field in ["leeward-caller", "leeward-endpoint"] {
        assert!(!seen.headers.contains_key(field), "{seen:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_passed_on_once_goes_no_further() -> anyhow::Result<()> {
    let (backend, own) = (Backend::start("app")?, Backend::start("own")?);
    let mesh = behind(backend.address(), "", &[], &[]).await?;
    mesh.apply(&service("own", &[(own.address(), "b", "g2")], &[]))
        .await?;
    let endpoint = format!("Leeward-Endpoint: app/{}@b1", backend.address());
    let a1 = "Leeward-Caller: spiffe://leeward.test/zone/a/proxy/a1";
    // To another gateway, and to itself.
    for to in ["g1", "g2"] {
        let answer = as_proxy(&mesh, "g1", to, &[&endpoint, a1]).await?;
        refused(&answer, 503, "unknown_endpoint");
    }
    // A gateway sends nothing to another: whoever is behind that one is reached there.
    let behind_g2 = format!("Leeward-Endpoint: own/{}@g2", own.address());
    refused(
        &as_proxy(&mesh, "a1", "g1", &[&behind_g2]).await?,
        503,
        "unknown_endpoint",
    );
    // A proxy that is no gateway passes nothing on, and neither does a gateway for its own zone.
    for (who, to) in [("g1", "b1"), ("b1", "g1")] {
        let elsewhere = if to == "b1" { &behind_g2 } else { &endpoint };
        refused(
            &as_proxy(&mesh, who, to, &[elsewhere]).await?,
            503,
            "unknown_endpoint",
        );
    }
    // An endpoint that is named without its proxy is one of the gateway's own, or none.
    let bare = format!("Leeward-Endpoint: app/{}", backend.address());
    refused(
        &as_proxy(&mesh, "a1", "g1", &[&bare]).await?,
        503,
        "unknown_endpoint",
    );
    assert_eq!(backend.requests() + own.requests(), 0);
    // Many hops are a circle, whoever makes it.
    let via = format!("Via: {}", vec!["1.1 leeward-g1.b"; 16].join(", "));
    refused(
        &as_proxy(&mesh, "a1", "g1", &[&endpoint, &via]).await?,
        508,
        "loop_detected",
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_zones_must_come_by_a_gateway_unless_policy_allows_otherwise() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let mesh = behind(backend.address(), "", &[], &[]).await?;
    let endpoint = format!("Leeward-Endpoint: app/{}", backend.address());
    refused(
        &as_proxy(&mesh, "a1", "b1", &[&endpoint]).await?,
        403,
        "gateway_required",
    );
    // The zone's own proxies come as they always did.
    let own = as_proxy(&mesh, "g1", "b1", &[&endpoint]).await?;
    assert!(own.starts_with("HTTP/1.1 200"), "{own}");
    mesh.apply(&zone_b(&mesh, BOTH, ", directCallers: Allow")?)
        .await?;
    let direct = as_proxy(&mesh, "a1", "b1", &[&endpoint]).await?;
    assert!(direct.starts_with("HTTP/1.1 200"), "{direct}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_missing_is_a_failure_and_another_zone_takes_over() -> anyhow::Result<()> {
    let (there, elsewhere) = (Backend::start("there")?, Backend::start("elsewhere")?);
    let mesh = mesh().await?;
    // Ports where nobody listens.
    let nobody = [Port::reserve()?, Port::reserve()?];
    let gone = format!(
        "{{name: g1, address: \"{}\"}}, {{name: g2, address: \"{}\"}}",
        nobody[0].address(),
        nobody[1].address()
    );
    // Neither is a proxy that is there, but isn't who policy names.
    let impostors = format!("{{name: g1, address: \"{}\"}}", mesh.node("b1")?.inbound);
    let apps = service("app", &[(there.address(), "b", "b1")], &[])
        + &service(
            "both",
            &[(there.address(), "b", "b1"), (elsewhere.address(), "c", "c1")],
            &[],
        )
        + &route("app", "app.example", "app", &[])
        + &route("both", "both.example", "both", &[]);
    mesh.apply(&apps).await?;
    for (gateways, more) in [(&gone, ""), (&impostors, ""), (&gone, ", transport: Tcp")] {
        mesh.apply(&zone_b(&mesh, gateways, more)?).await?;
        let client = mesh.workload("a1", Protocol::Http1)?;
        for _ in 0..5 {
            let reply = client.get("app.example", "/").await?;
            assert_eq!(
                (reply.status.as_u16(), reply.header("leeward-reason")),
                (503, "gateway_unavailable"),
                "{reply:?}"
            );
        }
        // Nothing was sent, so that every request may go to the next zone.
        for _ in 0..20 {
            let reply = client.get("both.example", "/").await?;
            assert_eq!(reply.backend(), "elsewhere", "{reply:?}");
        }
        let posted = request(Method::POST, "both.example", "/", bytes_body("x"));
        assert_eq!(client.call(posted).await?.backend(), "elsewhere");
    }
    assert_eq!(there.requests(), 0);
    let a1 = mesh.node("a1")?;
    let up = a1.metric("leeward_zone_gateway_up", &["zone=\"b\""]).await?;
    assert!(up < 0.5, "{up}");
    // None of it is held against anybody behind them.
    let blamed = a1.metric("leeward_endpoint_changes_total", &[]).await?;
    assert!(blamed < 0.5, "{blamed}");
    // They are looked for, and found when they are there.
    mesh.apply(&zone_b(&mesh, BOTH, "")?).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    eventually("zone b to answer", SOON, || async {
        let reply = client.get("app.example", "/").await?;
        ensure!(reply.backend() == "there", "{reply:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_killed_costs_no_idempotent_request_by_quic() -> anyhow::Result<()> {
    killed("Auto").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_killed_costs_no_idempotent_request_by_tcp() -> anyhow::Result<()> {
    killed("Tcp").await
}

async fn killed(transport: &str) -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let zone = format!(", transport: {transport}");
    let again = ["retry: {retryOn: [ConnectFailure, RefusedStream, Reset]}"];
    let mut mesh = behind(backend.address(), &zone, &[], &again).await?;
    let a1 = mesh.node("a1")?.outbound;
    let load = Load::start(a1, Protocol::Http1, ("app.example", "/"), CLIENTS, PAUSE);
    both_pass(&mesh, 100.0, None).await?;
    let before = load.take();
    assert_eq!(before.failed, 0, "{before:?}");
    let address = mesh.node("g1")?.inbound;
    mesh.node_mut("g1")?.process.kill9()?;
    // What was under way is tried again once the link is found dead; nothing new goes there from then on.
    tokio::time::sleep(DEAD_LINK).await;
    let detection = load.take();
    assert_eq!(detection.failed, 0, "{detection:?}");
    more(&load, 500).await?;
    let after = load.take();
    assert_eq!(after.failed, 0, "{after:?}");
    // The gateway is to blame, and not who is behind it.
    let node = mesh.node("a1")?;
    for (gateway, want) in [("g1", 0.0), ("g2", 1.0)] {
        let label = format!("gateway=\"{gateway}\"");
        let up = node.metric("leeward_zone_gateway_up", &[&label]).await?;
        assert!((up - want).abs() < 0.1, "{gateway}: {up}");
    }
    let blamed = node.metric("leeward_endpoint_changes_total", &[]).await?;
    assert!(blamed < 0.5, "{blamed}");
    // Back at its place it is found, and used.
    let again = mesh
        .start_again_with("g1", &[("--inbound", &address.to_string())])
        .await?;
    eventually("the gateway to pass requests on again", SOON, || async {
        let passed = passed_on(&again).await?;
        ensure!(passed > 100.0, "{passed}");
        Ok(())
    })
    .await?;
    let back = load.stop().await;
    assert_eq!(back.failed, 0, "{back:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_falls_silent_is_left_and_nobody_else_is_blamed() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let again = ["retry: {retryOn: [ConnectFailure, RefusedStream, Reset]}"];
    let mesh = behind(backend.address(), "", &[], &again).await?;
    let a1 = mesh.node("a1")?;
    let load = Load::start(a1.outbound, Protocol::Http1, ("app.example", "/"), CLIENTS, PAUSE);
    both_pass(&mesh, 100.0, None).await?;
    // As a node that vanished: nothing is refused, and nothing answered.
    let silent = &mesh.node("g1")?.process;
    silent.signal(Signal::STOP);
    let up = || async { a1.metric("leeward_zone_gateway_up", &["gateway=\"g1\""]).await };
    eventually("the silent gateway to be left", SOON, || async {
        let up = up().await?;
        ensure!(up < 0.5, "{up}");
        Ok(())
    })
    .await?;
    let detection = load.take();
    assert_eq!(detection.failed, 0, "{detection:?}");
    more(&load, 500).await?;
    let after = load.take();
    assert_eq!(after.failed, 0, "{after:?}");
    let blamed = a1.metric("leeward_endpoint_changes_total", &[]).await?;
    assert!(blamed < 0.5, "{blamed}");
    silent.signal(Signal::CONT);
    eventually("it to be found again", SOON, || async {
        let up = up().await?;
        ensure!(up > 0.5, "{up}");
        Ok(())
    })
    .await?;
    let back = load.stop().await;
    assert_eq!(back.failed, 0, "{back:?}");
    Ok(())
}

async fn more(load: &Load, answers: u64) -> anyhow::Result<()> {
    eventually("more answers", SOON, || async {
        let tally = load.tally();
        ensure!(tally.served >= answers, "{tally:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_may_not_be_sent_twice_are_lost_only_on_the_dying_gateway() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let mut mesh = behind(backend.address(), "", &[], &[]).await?;
    let to = mesh.node("a1")?.outbound;
    // Both have links.
    let client = Client::new(to, Protocol::Http1);
    both_pass(&mesh, 10.0, Some(&client)).await?;
    mesh.node_mut("g1")?.process.kill9()?;
    let posts = (0..CLIENTS).map(|_| async {
        let client = Client::new(to, Protocol::Http1);
        let (mut served, mut lost) = (0u32, 0u32);
        let from = tokio::time::Instant::now();
        while served < 20 || from.elapsed() < 2 * DEAD_LINK {
            anyhow::ensure!(from.elapsed() < SOON, "{served} served, {lost} lost");
            let posted = request(Method::POST, "app.example", "/", bytes_body("x"));
            match client.call(posted).await?.status.as_u16() {
                200 => served += 1,
                502 | 503 => lost += 1,
                status => anyhow::bail!("{status}"),
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok((served, lost))
    });
    let all = futures_util::future::try_join_all(posts).await?;
    let (served, lost) = all
        .iter()
        .fold((0, 0), |(s, l), (served, lost)| (s + served, l + lost));
    // What was on its way when it wasn't known yet: one for each client, and once more where that met another worker's link.
    assert!(lost as usize <= 2 * CLIENTS, "{served} {lost}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_told_to_end_costs_nothing() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let mut mesh = behind(backend.address(), "", &[], &[]).await?;
    let to = mesh.node("a1")?.outbound;
    let load = Load::start(to, Protocol::Http1, ("app.example", "/"), CLIENTS, PAUSE);
    more(&load, 200).await?;
    let ended = mesh.node_mut("g1")?.process.term_and_wait(SOON).await?;
    assert!(ended.success(), "{ended}");
    let meanwhile = load.take();
    assert_eq!(meanwhile.failed, 0, "{meanwhile:?}");
    more(&load, 200).await?;
    let after = load.stop().await;
    assert_eq!(after.failed, 0, "{after:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_dies_behind_a_gateway_is_left_and_not_the_gateway() -> anyhow::Result<()> {
    let (first, second) = (Backend::start("first")?, Backend::start("second")?);
    let mesh = mesh().await?;
    let endpoints = [(first.address(), "b", "b1"), (second.address(), "b", "b1")];
    let policy = zone_b(&mesh, BOTH, "")?
        + &service("app", &endpoints, &[])
        + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    first.stop().await;
    for _ in 0..50 {
        // The first is tried once, and nothing was sent to it.
        assert_eq!(client.get("app.example", "/").await?.backend(), "second");
    }
    let a1 = mesh.node("a1")?;
    let up = a1.metric("leeward_zone_gateway_up", &["zone=\"b\""]).await?;
    assert!(up > 1.5, "{up}");
    let lost = a1
        .metric("leeward_endpoint_changes_total", &["change=\"unreachable\""])
        .await?;
    assert!(lost > 0.5, "{lost}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checks_of_health_go_through_gateways() -> anyhow::Result<()> {
    let (first, second) = (Backend::start("first")?, Backend::start("second")?);
    let mut mesh = mesh().await?;
    let endpoints = [(first.address(), "b", "b1"), (second.address(), "b", "b1")];
    let check = "healthCheck: {http: {path: /healthz}, interval: 100ms, timeout: 10s, unhealthyThreshold: 2, healthyThreshold: 1}";
    let policy = zone_b(&mesh, BOTH, "")?
        + &service("app", &endpoints, &[check])
        + &route("app", "app.example", "app", &[])
        + ONLY_A;
    mesh.apply(&policy).await?;
    eventually("both to be asked", SOON, || async {
        ensure!(first.health_checks() > 3 && second.health_checks() > 3, "not yet");
        Ok(())
    })
    .await?;
    first.set_health(false);
    eventually("the first to be left", SOON, || async {
        let a1 = mesh.node("a1")?;
        let out = a1
            .metric("leeward_endpoint_out", &["standing=\"unhealthy\""])
            .await?;
        ensure!(out > 0.5, "{out}");
        Ok(())
    })
    .await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for _ in 0..20 {
        assert_eq!(client.get("app.example", "/").await?.backend(), "second");
    }
    // With one gateway gone, checks go by the other, and nobody is taken to be ill.
    mesh.node_mut("g1")?.process.kill9()?;
    let before = second.health_checks();
    eventually("more checks", SOON, || async {
        ensure!(second.health_checks() > before + 20, "not yet");
        Ok(())
    })
    .await?;
    let out = mesh
        .node("a1")?
        .metric("leeward_endpoint_out", &["standing=\"unhealthy\""])
        .await?;
    assert!(out < 1.5, "{out}");
    Ok(())
}

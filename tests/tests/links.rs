//! From zone to zone by QUIC, and by TCP where that doesn't get through.

use anyhow::{Context, ensure};
use futures_util::{SinkExt, StreamExt};
use http::Method;
use leeward_testkit::policy::{route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Client, Load, Mesh, Node, Protocol, Way, WebSocketEcho, eventually, get,
    request, zeros_body,
};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

const SOON: Duration = Duration::from_secs(20);
const CLIENTS: usize = 8;
const PAUSE: Duration = Duration::from_millis(2);

/// Attempts of a proxy's at zone b, by what they went by.
async fn went_by(node: &Node, transport: &str) -> anyhow::Result<f64> {
    let transport = format!("transport=\"{transport}\"");
    node.metric("leeward_attempts_total", &["zone=\"b\"", &transport])
        .await
}

/// Waits until the far proxy has its UDP sockets: it may be asked to serve before.
async fn linked(mesh: &Mesh, client: &Client) -> anyhow::Result<()> {
    eventually("requests to go by QUIC", SOON, || async {
        client.get("app.example", "/").await?;
        let by_quic = went_by(mesh.node("a1")?, "quic").await?;
        ensure!(by_quic > 0.5, "none has");
        Ok(())
    })
    .await
}

/// A mesh of two zones where `app.example` is in zone b, behind its proxy.
async fn far(address: SocketAddr, more: &[&str]) -> anyhow::Result<Mesh> {
    let mesh = Mesh::two_zones().await?;
    let policy = service("app", &[(address, "b", "b1")], more) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    Ok(mesh)
}

/// Zone b, whose proxy is at this address, and how it is reached.
fn zone_b(at: SocketAddr, transport: &str) -> String {
    let mut text = String::new();
    // A String takes whatever is written to it.
    let _ = write!(
        text,
        "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: b}}\nspec: {{transport: {transport}, proxies: [{{name: b1, address: \"{at}\"}}]}}\n"
    );
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_between_zones_go_by_quic() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    for protocol in ["protocol: HTTP1", "protocol: HTTP2"] {
        let mesh = far(backend.address(), &[protocol]).await?;
        let client = mesh.workload("a1", Protocol::Http1)?;
        linked(&mesh, &client).await?;
        for _ in 0..20 {
            ensure!(client.get("app.example", "/").await?.backend() == "app");
        }
        let a1 = mesh.node("a1")?;
        assert!(went_by(a1, "quic").await? > 19.5);
        // The far proxy sees who asks, as by TCP.
        let b1 = mesh.node("b1")?;
        let inbound = b1
            .metric(
                "leeward_requests_total",
                &["direction=\"inbound\"", "outcome=\"served\""],
            )
            .await?;
        assert!(inbound > 19.5, "{inbound}");
        // What is large goes by TCP.
        backend.behave(Behave::Echo);
        let sent = request(Method::POST, "app.example", "/", zeros_body(2 << 20));
        let reply = client.call(sent).await?;
        assert_eq!(reply.body.len(), 2 << 20);
        let by_tcp = went_by(a1, "h2").await? + went_by(a1, "http1").await?;
        assert!(by_tcp > 0.5, "{by_tcp}");
        backend.behave(Behave::Answer(Answer::text("app")));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policy_chooses_the_transport() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let mesh = far(backend.address(), &[]).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let (a1, at) = (mesh.node("a1")?, mesh.node("b1")?.inbound);
    linked(&mesh, &client).await?;
    mesh.apply(&zone_b(at, "Tcp")).await?;
    let before = went_by(a1, "quic").await?;
    for _ in 0..10 {
        client.get("app.example", "/").await?;
    }
    let after = went_by(a1, "quic").await?;
    assert!((after - before).abs() < 0.5, "{before} {after}");
    assert!(went_by(a1, "http1").await? > 9.5);
    // QUIC only: where there is none, there is no other way.
    let deaf = TcpListener::bind("127.0.0.1:0").await?;
    mesh.apply(&zone_b(deaf.local_addr()?, "Quic")).await?;
    let refused = client.get("app.example", "/").await?;
    assert_eq!(refused.status, 503);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_udp_is_blocked_requests_go_by_tcp_until_it_is_not() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let mesh = far(backend.address(), &[]).await?;
    let mut way = Way::tcp_only(mesh.node("b1")?.inbound).await?;
    mesh.apply(&zone_b(way.at, "Auto")).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let a1 = mesh.node("a1")?;
    let from = Instant::now();
    ensure!(client.get("app.example", "/").await?.backend() == "app");
    // The head start, and a handshake.
    assert!(
        from.elapsed() < Duration::from_millis(1000),
        "{:?}",
        from.elapsed()
    );
    // It is remembered: nobody waits any more.
    let load = Load::start(a1.outbound, Protocol::Http1, ("app.example", "/"), CLIENTS, PAUSE);
    eventually("a thousand answers", SOON, || async {
        let tally = load.tally();
        ensure!(tally.served >= 1000, "{tally:?}");
        Ok(())
    })
    .await?;
    assert!(went_by(a1, "quic").await? < 0.5);
    let fell = a1.metric("leeward_zone_transport_fallbacks_total", &[]).await?;
    assert!(fell > 0.5, "{fell}");
    // The attempt that the first request began goes on for three seconds.
    tokio::time::sleep(Duration::from_secs(4)).await;
    // UDP passes again. It is tried beside requests after a minute, and none of them fails or waits for it.
    way.open_udp().await?;
    eventually(
        "requests to go by QUIC again",
        Duration::from_secs(90),
        || async {
            let by_quic = went_by(a1, "quic").await?;
            ensure!(by_quic > 100.0, "{by_quic} have");
            Ok(())
        },
    )
    .await?;
    let tally = load.stop().await;
    assert_eq!(tally.failed, 0, "{tally:?}");
    drop(way);
    Ok(())
}

/// A proxy whose workload calls a service behind two proxies of another zone, both of which answer by now.
async fn two_under_load(rule: &[&str]) -> anyhow::Result<(Mesh, [Backend; 2], Load)> {
    let mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "b1")
        .node("b", "b2")
        .start()
        .await?;
    let backends = [Backend::start("first")?, Backend::start("second")?];
    let [first, second] = &backends;
    let endpoints = [(first.address(), "b", "b1"), (second.address(), "b", "b2")];
    mesh.apply(&(service("app", &endpoints, &[]) + &route("app", "app.example", "app", rule)))
        .await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    linked(&mesh, &client).await?;
    let outbound = mesh.node("a1")?.outbound;
    let load = Load::start(outbound, Protocol::Http1, ("app.example", "/"), CLIENTS, PAUSE);
    eventually("both to answer", SOON, || async {
        let tally = load.tally();
        ensure!(tally.by_backend.len() == 2 && tally.served > 500, "{tally:?}");
        Ok(())
    })
    .await?;
    Ok((mesh, backends, load))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_is_killed_under_load_costs_no_idempotent_request_after_detection() -> anyhow::Result<()>
{
    let again = ["retry: {retryOn: [ConnectFailure, RefusedStream, Reset]}"];
    let (mut mesh, _backends, load) = two_under_load(&again).await?;
    assert_eq!(load.take().failed, 0);
    mesh.node_mut("b1")?.process.kill9()?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    // What was under way is tried again once its link is found dead.
    let detection = load.take();
    assert_eq!(detection.failed, 0, "{detection:?}");
    eventually("the other to answer", SOON, || async {
        let tally = load.tally();
        ensure!(tally.served >= 500, "{tally:?}");
        Ok(())
    })
    .await?;
    let after = load.stop().await;
    assert_eq!(after.failed, 0, "{after:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_is_told_to_end_lets_links_end_first() -> anyhow::Result<()> {
    let (mut mesh, _backends, load) = two_under_load(&[]).await?;
    let from = Instant::now();
    let ended = mesh.node_mut("b1")?.process.term_and_wait(SOON).await?;
    assert!(ended.success(), "{ended}");
    assert!(from.elapsed() < Duration::from_secs(8), "{:?}", from.elapsed());
    let tally = load.stop().await;
    assert_eq!(tally.failed, 0, "{tally:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_last_link_has_ended_takes_no_packets_from_others() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "b1")
        .flag("--workers", "4")
        .start()
        .await?;
    let policy =
        service("app", &[(backend.address(), "b", "b1")], &[]) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    linked(&mesh, &mesh.workload("a1", Protocol::Http1)?).await?;
    // Enough connections that each worker has one, and so a link of its own. Their answers end one after the other, and
    // with each of them perhaps a worker of the far proxy.
    let mut asking = JoinSet::new();
    for n in 1..=16u32 {
        backend.behave(Behave::Dribble(3 * n, Duration::from_millis(100)));
        let client = Client::new(outbound, Protocol::Http1);
        let response = client.send(get("app.example", "/")).await?;
        asking.spawn(async move {
            let body = http_body_util::BodyExt::collect(response.into_body()).await;
            let length = body.map(|body| body.to_bytes().len()).ok();
            drop(client);
            (3 * n, length)
        });
    }
    let by_tcp = went_by(mesh.node("a1")?, "http1").await?;
    let ended = mesh.node_mut("b1")?.process.term_and_wait(SOON).await?;
    assert!(ended.success(), "{ended}");
    while let Some(answered) = asking.join_next().await {
        let (want, got) = answered?;
        assert_eq!(got, usize::try_from(want).ok(), "{by_tcp} by TCP");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_is_replaced_under_load_without_a_failed_request_from_the_other_zone() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "b1")
        .handover()
        .start()
        .await?;
    let policy =
        service("app", &[(backend.address(), "b", "b1")], &[]) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    linked(&mesh, &mesh.workload("a1", Protocol::Http1)?).await?;
    let outbound = mesh.node("a1")?.outbound;
    let load = Load::start(outbound, Protocol::Http1, ("app.example", "/"), CLIENTS, PAUSE);
    let successor = mesh.start_again("b1").await?;
    let ended = mesh.node_mut("b1")?.process.wait(SOON).await?;
    assert!(ended.success(), "{ended}");
    assert_eq!(successor.inbound, mesh.node("b1")?.inbound);
    // Meanwhile requests went by TCP. The successor has the UDP port as soon as the old process has let go of it.
    let before = went_by(mesh.node("a1")?, "quic").await?;
    eventually("requests to go by QUIC again", SOON, || async {
        let by_quic = went_by(mesh.node("a1")?, "quic").await?;
        ensure!(by_quic > before + 100.0, "{by_quic} have, {before} before");
        Ok(())
    })
    .await?;
    let tally = load.stop().await;
    assert_eq!(tally.failed, 0, "{tally:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_ends_its_request_in_the_other_zone() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let mesh = far(backend.address(), &[]).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    linked(&mesh, &client).await?;
    backend.behave(Behave::Hang);
    let waiting =
        tokio::time::timeout(Duration::from_millis(300), client.send(get("app.example", "/"))).await;
    assert!(waiting.is_err(), "it hangs");
    drop(client);
    eventually("the far proxy to know", SOON, || async {
        let active = mesh.node("b1")?.metric("leeward_requests_active", &[]).await?;
        ensure!(active < 0.5, "{active} are under way");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_protocols_goes_by_tcp() -> anyhow::Result<()> {
    let echo = WebSocketEcho::start()?;
    let mesh = far(echo.address(), &[]).await?;
    // Whatever policy says.
    mesh.apply(&zone_b(mesh.node("b1")?.inbound, "Quic")).await?;
    let stream = TcpStream::connect(mesh.node("a1")?.outbound).await?;
    let connecting = tokio_tungstenite::client_async("ws://app.example/chat", stream);
    let (mut socket, response) = tokio::time::timeout(SOON, connecting).await??;
    assert_eq!(response.status(), 101);
    socket.send(Message::text("hello")).await?;
    let answer = tokio::time::timeout(SOON, socket.next())
        .await?
        .context("closed")??;
    assert_eq!(answer.into_text()?.as_str(), "hello");
    Ok(())
}

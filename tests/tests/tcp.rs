//! TCP services: bytes both ways through real proxies, with the identity, the zones and the limits that requests have.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::float_cmp,
    reason = "a test fails by panicking, and counts are whole"
)]

use anyhow::{Context, ensure};
use leeward_testkit::policy::{resilience, route, service};
use leeward_testkit::{Mesh, Port, Protocol, Receiver, TempDir, eventually, get, with_header};
use sha2::{Digest, Sha256};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

const SOON: Duration = Duration::from_secs(30);

/// What a server does with a connection.
#[derive(Clone, Copy, Debug)]
enum Does {
    /// Says its name, then gives back what it hears, until its client has ended.
    Greet,
    /// Hears its client to the end, and then says the digest of it and as many bytes of its own.
    Digest,
    /// Ends at once, and then hears its client to the end.
    EndFirst,
    /// Nothing, until its client goes away.
    Hush,
}

/// A workload that speaks no HTTP.
struct Server {
    address: SocketAddr,
    /// Connections that it ever had.
    accepted: Arc<AtomicUsize>,
    /// Bytes that it heard on those that ended in order.
    heard: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Server {
    async fn start(name: &'static str, does: Does) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (accepted, heard) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let mut tasks = JoinSet::new();
        let (count, bytes) = (Arc::clone(&accepted), Arc::clone(&heard));
        tasks.spawn(async move {
            let mut serving = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let bytes = Arc::clone(&bytes);
                serving.spawn(async move {
                    // What becomes of a connection its client tells.
                    if let Ok(n) = serve(stream, name, does).await {
                        bytes.fetch_add(n, Ordering::Relaxed);
                    }
                });
            }
        });
        Ok(Self {
            address,
            accepted,
            heard,
            _tasks: tasks,
        })
    }

    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }

    fn heard(&self) -> usize {
        self.heard.load(Ordering::Relaxed)
    }
}

async fn serve(mut stream: TcpStream, name: &str, does: Does) -> anyhow::Result<usize> {
    let mut heard = Vec::new();
    match does {
        Does::Greet => {
            stream.write_all(format!("{name}\n").as_bytes()).await?;
            let mut buffer = [0; 4096];
            loop {
                let n = stream.read(&mut buffer).await?;
                if n == 0 {
                    break;
                }
                heard.extend_from_slice(&buffer[..n]);
                stream.write_all(&buffer[..n]).await?;
            }
        }
        Does::Digest => {
            stream.read_to_end(&mut heard).await?;
            stream.write_all(&Sha256::digest(&heard)).await?;
            stream.write_all(&bytes(heard.len(), 7)).await?;
        }
        Does::EndFirst => {
            stream.write_all(name.as_bytes()).await?;
            stream.shutdown().await?;
            stream.read_to_end(&mut heard).await?;
        }
        Does::Hush => {
            stream.read_to_end(&mut heard).await?;
        }
    }
    stream.shutdown().await?;
    Ok(heard.len())
}

/// Bytes that are another's if one is lost, or stands elsewhere.
fn bytes(n: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..n).map(|_| random.u8(..)).collect()
}

/// Two zones whose proxies listen for one TCP service each.
async fn mesh() -> anyhow::Result<Mesh> {
    let builder = Mesh::builder().node("a", "a1").node("b", "b1");
    builder.flag("--tcp", "127.0.0.1:0").start().await
}

/// A TCP service that a node's workloads call at its proxy. A busy machine may take its time to connect.
fn tcp(
    mesh: &Mesh,
    node: &str,
    endpoints: &[(SocketAddr, &str, &str)],
    more: &[&str],
) -> anyhow::Result<String> {
    let at = format!("addresses: [\"{}\"]", address(mesh, node)?);
    let spec = ["protocol: TCP", "connectTimeout: 20s", &at];
    Ok(service("db", endpoints, &[&spec, more].concat()))
}

/// Where a node's workloads call it.
fn address(mesh: &Mesh, node: &str) -> anyhow::Result<SocketAddr> {
    mesh.node(node)?.process.address("tcp")
}

async fn connect(mesh: &Mesh) -> anyhow::Result<TcpStream> {
    Ok(TcpStream::connect(address(mesh, "a1")?).await?)
}

/// Connects to a server that greets, and hears which one it is.
async fn greeted(mesh: &Mesh) -> anyhow::Result<(TcpStream, String)> {
    let mut stream = connect(mesh).await?;
    let name = line(&mut stream).await?;
    Ok((stream, name))
}

async fn line(stream: &mut TcpStream) -> anyhow::Result<String> {
    let reading = async {
        let mut text = String::new();
        loop {
            match stream.read_u8().await? {
                b'\n' => return anyhow::Ok(text),
                other => text.push(char::from(other)),
            }
        }
    };
    tokio::time::timeout(SOON, reading)
        .await
        .context("it says nothing")?
}

/// Reads to the end of a connection, which must be one in order.
async fn rest(stream: &mut TcpStream) -> anyhow::Result<Vec<u8>> {
    let mut heard = Vec::new();
    tokio::time::timeout(SOON, stream.read_to_end(&mut heard))
        .await
        .context("it doesn't end")??;
    Ok(heard)
}

/// Whether a connection ends in a reset, and not as if all had been said.
async fn is_reset(stream: &mut TcpStream) -> anyhow::Result<()> {
    let mut heard = Vec::new();
    let ended = tokio::time::timeout(SOON, stream.read_to_end(&mut heard)).await;
    let ended = ended.context("it doesn't end")?;
    ensure!(ended.is_err(), "it ended in order, after {} bytes", heard.len());
    Ok(())
}

/// Whether the next connection is reset. That may come before anybody could say that it had come about.
async fn is_refused(mesh: &Mesh) -> anyhow::Result<()> {
    match TcpStream::connect(address(mesh, "a1")?).await {
        Ok(mut stream) => is_reset(&mut stream).await,
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error.into()),
    }
}

async fn metric(mesh: &Mesh, node: &str, name: &str, labels: &[&str], at_least: f64) -> anyhow::Result<()> {
    let node = mesh.node(node)?;
    eventually(&format!("{name} of {labels:?}"), SOON, || async {
        let value = node.metric(name, labels).await?;
        ensure!(value >= at_least, "it is {value}, not {at_least}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_pass_whole_between_zones_and_each_way_ends_by_itself() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let server = Server::start("b", Does::Digest).await?;
    mesh.apply(&tcp(&mesh, "a1", &[(server.address, "b", "b1")], &[])?)
        .await?;
    for (i, n) in [(0, 0), (1, 10_000), (2, 3_000_000)] {
        let said = bytes(n, i);
        let mut stream = connect(&mesh).await?;
        stream.write_all(&said).await?;
        // The answer comes when all has been heard: the end of one way must not be the end of the other.
        stream.shutdown().await?;
        let heard = rest(&mut stream).await?;
        ensure!(heard.len() == 32 + n, "{} bytes of {}", heard.len(), 32 + n);
        ensure!(
            heard[..32] == Sha256::digest(&said)[..],
            "{n} bytes didn't come as they were"
        );
        ensure!(
            heard[32..] == bytes(n, 7)[..],
            "{n} bytes didn't come back as they were"
        );
    }
    let outbound = [
        "direction=\"outbound\"",
        "service=\"db\"",
        "zone=\"b\"",
        "outcome=\"served\"",
        "reason=\"ok\"",
    ];
    metric(&mesh, "a1", "leeward_tcp_connections_total", &outbound, 3.0).await?;
    let inbound = ["direction=\"inbound\"", "service=\"db\"", "outcome=\"served\""];
    metric(&mesh, "b1", "leeward_tcp_connections_total", &inbound, 3.0).await?;
    let sent = ["direction=\"outbound\"", "way=\"sent\""];
    metric(&mesh, "a1", "leeward_tcp_bytes_total", &sent, 3_010_000.0).await?;
    let received = ["direction=\"inbound\"", "way=\"received\""];
    metric(&mesh, "b1", "leeward_tcp_bytes_total", &received, 3_010_000.0).await?;
    // Connections are no requests.
    ensure!(
        mesh.node("a1")?
            .metric("leeward_requests_total", &["service=\"db\""])
            .await?
            == 0.0
    );
    ensure!(
        mesh.node("a1")?
            .metric("leeward_tcp_connections_open", &[])
            .await?
            == 0.0
    );
    ensure!(mesh.node("a1")?.metric("leeward_requests_active", &[]).await? == 0.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_speaks_first_is_heard_and_whoever_ends_first_still_hears() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let greets = Server::start("greets", Does::Greet).await?;
    mesh.apply(&tcp(&mesh, "a1", &[(greets.address, "b", "b1")], &[])?)
        .await?;
    let (mut stream, name) = greeted(&mesh).await?;
    assert_eq!(name, "greets", "before the client has said a word");
    stream.write_all(b"hello\n").await?;
    assert_eq!(line(&mut stream).await?, "hello");
    stream.shutdown().await?;
    assert_eq!(rest(&mut stream).await?, b"");

    let ends = Server::start("ends", Does::EndFirst).await?;
    mesh.apply(&tcp(&mesh, "a1", &[(ends.address, "b", "b1")], &[])?)
        .await?;
    let mut stream = connect(&mesh).await?;
    assert_eq!(rest(&mut stream).await?, b"ends");
    stream.write_all(&bytes(50_000, 1)).await?;
    stream.shutdown().await?;
    eventually("the server to hear the rest", SOON, || async {
        ensure!(ends.heard() == 50_000, "{} bytes", ends.heard());
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_cut_off_never_looks_whole() -> anyhow::Result<()> {
    let mut mesh = mesh().await?;
    let server = Server::start("b", Does::Greet).await?;
    mesh.apply(&tcp(&mesh, "a1", &[(server.address, "b", "b1")], &[])?)
        .await?;
    let (mut stream, _) = greeted(&mesh).await?;
    // The proxy in front of the server dies.
    mesh.node_mut("b1")?.process.kill9()?;
    is_reset(&mut stream).await?;
    let labels = ["outcome=\"failed\"", "reason=\"reset\""];
    metric(&mesh, "a1", "leeward_tcp_connections_total", &labels, 1.0).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_breaks_off_is_told_to_the_server_and_not_held_against_it() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let server = Server::start("b", Does::Hush).await?;
    mesh.apply(&tcp(&mesh, "a1", &[(server.address, "b", "b1")], &[])?)
        .await?;
    let mut stream = connect(&mesh).await?;
    stream.write_all(b"half of ").await?;
    eventually("the server to have the connection", SOON, || async {
        ensure!(server.accepted() == 1);
        Ok(())
    })
    .await?;
    stream.set_zero_linger()?;
    drop(stream);
    let labels = ["reason=\"client_gone\""];
    metric(&mesh, "a1", "leeward_tcp_connections_total", &labels, 1.0).await?;
    metric(&mesh, "b1", "leeward_tcp_connections_total", &labels, 1.0).await?;
    // To it, it wasn't an end in order.
    assert_eq!(server.heard(), 0);
    ensure!(
        mesh.node("a1")?
            .metric("leeward_endpoint_changes_total", &[])
            .await?
            == 0.0
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_endpoint_is_tried_and_a_dead_one_is_left_out() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let (dead, server) = (Port::reserve()?, Server::start("alive", Does::Greet).await?);
    let endpoints = [(dead.address(), "b", "b1"), (server.address, "b", "b1")];
    mesh.apply(&tcp(
        &mesh,
        "a1",
        &endpoints,
        &["loadBalancer: {policy: RoundRobin}"],
    )?)
    .await?;
    for _ in 0..20 {
        let (mut stream, name) = greeted(&mesh).await?;
        assert_eq!(name, "alive");
        stream.shutdown().await?;
        rest(&mut stream).await?;
    }
    let node = mesh.node("a1")?;
    let missed = node
        .metric(
            "leeward_attempts_total",
            &["service=\"db\"", "result=\"connect_failure\""],
        )
        .await?;
    ensure!(missed >= 1.0, "it was never tried");
    ensure!(missed <= 5.0, "it is tried again and again: {missed}");
    ensure!(node.metric("leeward_endpoint_out", &["service=\"db\""]).await? >= 1.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_zone_takes_over_and_gives_back() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let port = Port::reserve()?;
    let there = Server::start("b", Does::Greet).await?;
    let endpoints = [(port.address(), "a", "a1"), (there.address, "b", "b1")];
    let more = ["loadBalancer: {zoneFailover: {returnAfter: 0s, leaveAfter: 0s, returnStep: 100}}"];
    mesh.apply(&tcp(&mesh, "a1", &endpoints, &more)?).await?;
    // Nobody listens in the own zone: no connection fails for that.
    for _ in 0..10 {
        assert_eq!(greeted(&mesh).await?.1, "b");
    }
    let listener = port.listen()?;
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(async move { drop(serve(stream, "a", Does::Greet).await) });
        }
    });
    eventually("the own zone to serve again", SOON, || async {
        let name = greeted(&mesh).await?.1;
        ensure!(name == "a", "it is {name}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_bounded_and_one_that_ends_makes_room() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let server = Server::start("b", Does::Greet).await?;
    let pool = ["connectionPool: {maxConnections: 2}"];
    mesh.apply(&tcp(&mesh, "a1", &[(server.address, "b", "b1")], &pool)?)
        .await?;
    let (first, second) = (greeted(&mesh).await?, greeted(&mesh).await?);
    is_refused(&mesh).await?;
    metric(
        &mesh,
        "a1",
        "leeward_refused_total",
        &["service=\"db\"", "limit=\"maxRequests\""],
        1.0,
    )
    .await?;
    let labels = ["outcome=\"failed\"", "reason=\"overflow\""];
    metric(&mesh, "a1", "leeward_tcp_connections_total", &labels, 1.0).await?;
    drop(first);
    eventually("room for another", SOON, || async {
        greeted(&mesh).await.map(drop)
    })
    .await?;
    drop(second);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_circuit_opens_for_connections() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let dead = Port::reserve()?;
    let breaker = "circuitBreaker: {failureRate: 0, consecutiveFailures: 3, openTime: 60s}";
    let more = ["resilience: strict", "outlierDetection: {maxEjectionPercent: 0}"];
    let policy = resilience("strict", &[breaker]) + &tcp(&mesh, "a1", &[(dead.address(), "b", "b1")], &more)?;
    mesh.apply(&policy).await?;
    eventually("the circuit to open", SOON, || async {
        is_refused(&mesh).await?;
        let node = mesh.node("a1")?;
        let refused = node
            .metric(
                "leeward_refused_total",
                &["service=\"db\"", "limit=\"circuitBreaker\""],
            )
            .await?;
        ensure!(refused >= 1.0);
        Ok(())
    })
    .await?;
    let labels = ["reason=\"circuit_open\""];
    metric(&mesh, "a1", "leeward_tcp_connections_total", &labels, 1.0).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_connection_ends_and_one_that_speaks_does_not() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let server = Server::start("b", Does::Greet).await?;
    // With one proxy in its way, since two would race for who ends it.
    let idle = ["tcp: {idleTimeout: 15s}"];
    mesh.apply(&tcp(&mesh, "a1", &[(server.address, "a", "")], &idle)?)
        .await?;
    let (mut silent, _) = greeted(&mesh).await?;
    let (mut speaking, _) = greeted(&mesh).await?;
    let talking = async {
        loop {
            speaking.write_all(b"x\n").await?;
            ensure!(line(&mut speaking).await? == "x");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let ended: anyhow::Result<()> = tokio::select! {
        failed = talking => failed,
        ended = is_reset(&mut silent) => ended,
    };
    ended?;
    speaking.write_all(b"\nstill\n").await?;
    // What it was in the middle of comes first.
    while line(&mut speaking).await? != "still" {}
    let labels = ["reason=\"idle_timeout\""];
    metric(&mesh, "a1", "leeward_tcp_connections_total", &labels, 1.0).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policy_says_whose_connections_may_pass() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let server = Server::start("b", Does::Greet).await?;
    let db = tcp(&mesh, "a1", &[(server.address, "b", "b1")], &[])?;
    let allow = |from: &str| {
        format!(
            "---\napiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {{name: db}}\nspec: {{services: [db], action: Allow, rules: [{{from: [{{{from}}}]}}]}}\n"
        )
    };
    mesh.apply(&(db + &allow("zones: [b]"))).await?;
    is_refused(&mesh).await?;
    let labels = ["reason=\"authorization_denied\""];
    metric(&mesh, "a1", "leeward_tcp_connections_total", &labels, 1.0).await?;
    assert_eq!(server.accepted(), 0);
    // By the identity in the certificate, at both proxies.
    mesh.apply(&allow("identities: [\"spiffe://leeward.test/zone/a/proxy/a1\"]"))
        .await?;
    assert_eq!(greeted(&mesh).await?.1, "b");
    let decided = ["direction=\"inbound\"", "policy=\"db\"", "decision=\"allow\""];
    metric(
        &mesh,
        "b1",
        "leeward_authorization_decisions_total",
        &decided,
        1.0,
    )
    .await?;

    // A rule about requests matches no connection, whatever it says of them: one that would let everything pass lets none.
    let requests = "---\napiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {name: gets}\nspec: {action: Allow, rules: [{to: [{notMethods: [DELETE]}]}]}\n";
    mesh.delete(leeward_proto::v1::Kind::AuthorizationPolicy, "db")
        .await?;
    mesh.apply(requests).await?;
    is_refused(&mesh).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_for_bytes_is_refused() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let server = Server::start("b", Does::Greet).await?;
    mesh.apply(&tcp(&mesh, "a1", &[(server.address, "b", "b1")], &[])?)
        .await?;
    let refused = async |text: &str, why: &str| {
        let error = mesh.apply_only(text).await.unwrap_err();
        let said = format!("{error:#}");
        ensure!(said.contains(why), "{said}");
        Ok(())
    };
    let to_db = route("db", "db.example", "db", &[]);
    refused(
        &to_db,
        "Service/db is of protocol TCP, to which no request can be sent",
    )
    .await?;
    let http = |more: &str| service("x", &[], &[more]);
    refused(&http("serverNames: [a.example]"), "is only for protocol TCP").await?;
    refused(&http("tcp: {maxConnectAttempts: 2}"), "is only for protocol TCP").await?;
    let bytes = |more: &str| service("x", &[], &["protocol: TCP", more]);
    refused(&bytes("healthCheck: {http: {}}"), "want tcp").await?;
    refused(
        &bytes("loadBalancer: {policy: Maglev, hashKey: {header: x-user}}"),
        "want source",
    )
    .await?;
    refused(&bytes("tcp: {idleTimeout: 10ms}"), "want 1s to 168h").await?;
    refused(&bytes("tcp: {maxConnectAttempts: 11}"), "want 1 to 10").await?;
    refused(&bytes("addresses: [\"10.0.0.1\"]"), "spec.addresses[0]").await?;
    let same = format!("addresses: [\"{}\"]", address(&mesh, "a1")?);
    refused(&bytes(&same), "is Service/db's already").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_a_proxy_asks_for_bytes() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let backend = leeward_testkit::Backend::start("web")?;
    let web =
        service("web", &[(backend.address(), "b", "b1")], &[]) + &route("web", "web.example", "web", &[]);
    mesh.apply(&web).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let ask = with_header(get("web.example", "/"), "connection", "upgrade");
    let reply = client.call(with_header(ask, "upgrade", "leeward-tcp")).await?;
    let refusal = (reply.status.as_u16(), reply.header("leeward-reason"));
    assert_eq!(refusal, (400, "bad_request"));
    assert_eq!(backend.requests(), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checks_of_health_find_a_workload_that_nobody_calls() -> anyhow::Result<()> {
    let mesh = mesh().await?;
    let (dead, alive) = (Port::reserve()?, Server::start("alive", Does::Hush).await?);
    let endpoints = [(dead.address(), "b", "b1"), (alive.address, "b", "b1")];
    let check = ["healthCheck: {tcp: true, interval: 100ms, unhealthyThreshold: 2, healthyThreshold: 1}"];
    mesh.apply(&tcp(&mesh, "a1", &endpoints, &check)?).await?;
    let out = ["service=\"db\"", &format!("endpoint=\"{}\"", dead.address())];
    metric(&mesh, "a1", "leeward_endpoint_out", &out, 1.0).await?;
    let fine = format!("endpoint=\"{}\"", alive.address);
    ensure!(mesh.node("a1")?.metric("leeward_endpoint_out", &[&fine]).await? == 0.0);
    ensure!(alive.accepted() > 0, "it is connected to");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_connections_go_on_for_its_time_and_no_longer() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let log = dir.path().join("access.log");
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--tcp", "127.0.0.1:0")
        .flag("--drain-timeout", "20s")
        .flag("--access-log", &log.display().to_string())
        .start()
        .await?;
    let server = Server::start("a", Does::Greet).await?;
    mesh.apply(&tcp(&mesh, "a1", &[(server.address, "a", "")], &[])?)
        .await?;
    let (mut ends, _) = greeted(&mesh).await?;
    let (mut stays, _) = greeted(&mesh).await?;
    let to = address(&mesh, "a1")?;
    let process = &mut mesh.node_mut("a1")?.process;
    process.signal(rustix::process::Signal::TERM);
    // What is open goes on.
    eventually("no more connections to be taken", SOON, || async {
        ensure!(TcpStream::connect(to).await.is_err());
        Ok(())
    })
    .await?;
    ends.write_all(b"last words\n").await?;
    assert_eq!(line(&mut ends).await?, "last words");
    ends.shutdown().await?;
    assert_eq!(rest(&mut ends).await?, b"");
    // And is let go when the time is up, with the process.
    let mut heard = Vec::new();
    let cut = tokio::time::timeout(SOON, stays.read_to_end(&mut heard)).await;
    drop(cut.context("the connection outlives the drain")?);
    process.wait(SOON).await?;
    let log = std::fs::read_to_string(&log)?;
    let line = log
        .lines()
        .find(|line| line.contains("\"request_bytes\":11"))
        .with_context(|| format!("no connection in {log}"))?;
    let line: serde_json::Value = serde_json::from_str(line)?;
    assert_eq!(line["protocol"], "tcp");
    assert_eq!(line["service"], "db");
    assert_eq!(line["destination"], to.to_string());
    assert_eq!(line["request_bytes"], "last words\n".len());
    assert_eq!(line["attempts"][0]["transport"], "tcp");
    assert!(line.get("method").is_none(), "{line}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_takes_the_next_connections_and_no_open_one_breaks() -> anyhow::Result<()> {
    let builder = Mesh::builder().node("a", "a1").handover();
    let mesh = builder.flag("--tcp", "127.0.0.1:0").start().await?;
    let server = Server::start("a", Does::Greet).await?;
    mesh.apply(&tcp(&mesh, "a1", &[(server.address, "a", "")], &[])?)
        .await?;
    let (mut before, _) = greeted(&mesh).await?;
    let again = mesh.start_again("a1").await?;
    assert_eq!(again.process.address("tcp")?, address(&mesh, "a1")?);
    let (mut after, _) = greeted(&mesh).await?;
    for stream in [&mut before, &mut after] {
        stream.write_all(b"still here\n").await?;
        assert_eq!(line(stream).await?, "still here");
        stream.shutdown().await?;
        assert_eq!(rest(stream).await?, b"");
    }
    eventually("the successor to have served the second", SOON, || async {
        let served = again
            .metric("leeward_tcp_connections_total", &["reason=\"ok\""])
            .await?;
        ensure!((served - 1.0).abs() < 0.1, "{served}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_through_two_proxies_is_one_trace() -> anyhow::Result<()> {
    let receiver = Receiver::start()?;
    let builder = Mesh::builder().node("a", "a1").node("b", "b1");
    let mesh = builder
        .flag("--tcp", "127.0.0.1:0")
        .flag("--otlp-endpoint", &receiver.grpc_endpoint())
        .flag("--trace-ratio", "1")
        .start()
        .await?;
    let server = Server::start("b", Does::Greet).await?;
    mesh.apply(&tcp(&mesh, "a1", &[(server.address, "b", "b1")], &[])?)
        .await?;
    let (mut stream, _) = greeted(&mesh).await?;
    stream.write_all(b"x\n").await?;
    stream.shutdown().await?;
    rest(&mut stream).await?;
    let spans = eventually("the spans of both proxies", SOON, || async {
        let spans = receiver.spans();
        ensure!(spans.len() >= 4, "{spans:?}");
        Ok(spans)
    })
    .await?;
    assert!(spans.iter().all(|span| span.trace == spans[0].trace), "{spans:?}");
    let named = |name: &str| spans.iter().filter(|span| span.name == name).count();
    assert_eq!((named("TCP"), named("TCP connect")), (2, 2), "{spans:?}");
    let root = spans.iter().find(|span| span.parent.is_empty());
    let root = root.with_context(|| format!("no root among {spans:?}"))?;
    assert_eq!(root.attribute("leeward.service"), "db");
    assert_eq!(root.attribute("leeward.outcome"), "served");
    assert_eq!(root.attribute("leeward.tcp.sent.bytes"), "2");
    assert_eq!(root.attribute("http.request.method"), "");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zones_gateway_passes_bytes_on_for_those_that_may_have_the_service() -> anyhow::Result<()> {
    let mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "g1")
        .node("b", "b1")
        .flag("--tcp", "127.0.0.1:0")
        .start()
        .await?;
    let server = Server::start("b", Does::Digest).await?;
    let proxy = |name: &str| -> anyhow::Result<String> {
        let address = mesh.node(name)?.inbound;
        Ok(format!("{{name: {name}, address: \"{address}\"}}"))
    };
    let zone = format!(
        "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: b}}\nspec: {{proxies: [{}, {}], gateways: [{{name: g1}}]}}\n",
        proxy("g1")?,
        proxy("b1")?
    );
    let db = |more: &[&str]| tcp(&mesh, "a1", &[(server.address, "b", "b1")], more);
    mesh.apply(&(zone.clone() + &db(&[])?)).await?;
    let sent: Vec<u8> = (0..100_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let mut stream = connect(&mesh).await?;
    stream.write_all(&sent).await?;
    stream.shutdown().await?;
    let heard = rest(&mut stream).await?;
    assert_eq!(heard.get(..32), Some(&Sha256::digest(&sent)[..]));
    for node in ["g1", "b1"] {
        let served = ["direction=\"inbound\"", "outcome=\"served\""];
        metric(&mesh, node, "leeward_tcp_connections_total", &served, 1.0).await?;
    }
    // Whose zone may not have it gets no connection to it.
    mesh.apply(&(zone + &db(&["exportTo: [\".\"]"])?)).await?;
    is_refused(&mesh).await
}

//! A node whose key was stolen: revoked, it is cut off from everybody at once, whatever is under way, and stays so whoever is
//! down; with a new token it is back.

use anyhow::{Context, ensure};
use leeward_identity::{Identity, NewKey, SpiffeId, channel};
use leeward_proto::v1;
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Answer, Backend, Behave, Client, Mesh, Node, Protocol, eventually};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use v1::identity_client::IdentityClient;

const DOMAIN: &str = "leeward.test";
const SOON: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Runs the command as the mesh's user, and returns what it printed; what it complained of is the error.
async fn leeward(mesh: &Mesh, args: &[&str]) -> anyhow::Result<String> {
    let output = leeward_testkit::leeward(mesh, args).await?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "leeward {args:?}: {told}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Revokes a proxy of zone a, and waits until all that are connected refuse it.
async fn revoke(mesh: &Mesh, name: &str) -> anyhow::Result<()> {
    let id = format!("/zone/a/proxy/{name}");
    let args = ["identity", "revoke", &id, "--reason", "stolen", "--wait"];
    let told = leeward(mesh, &[&args[..], &["--timeout", "15s"]].concat()).await?;
    ensure!(told.contains("proxies that are connected refuse them"), "{told}");
    Ok(())
}

/// A TLS connection to a proxy's inbound listener, by whoever has a copy of the files of another.
async fn connect(
    mesh: &Mesh,
    thief: &str,
    to: (&str, &str, SocketAddr),
) -> anyhow::Result<TlsStream<TcpStream>> {
    let (zone, name, address) = to;
    let identity = Identity::load(mesh.identity(thief))?;
    let config = identity.client_config(&[b"h2"], &SpiffeId::proxy(DOMAIN, zone, name)?)?;
    let stream = TcpStream::connect(address).await?;
    let mut tls = TlsConnector::from(config)
        .connect(address.ip().into(), stream)
        .await?;
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await?;
    // In TLS 1.3 a client hears that it was refused when it first reads: here HTTP/2's settings.
    tls.read_u8().await?;
    Ok(tls)
}

/// Waits until the other side has ended a connection, in whatever way.
async fn ends(mut stream: impl AsyncRead + Unpin) -> anyhow::Result<()> {
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(SOON, stream.read_to_end(&mut rest)).await;
    // In order or not is the same here.
    drop(ended.context("the connection is still open")?);
    Ok(())
}

/// A workload that speaks no HTTP: it gives back what it hears.
async fn echo() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                drop(tokio::io::copy(&mut from, &mut to).await);
            });
        }
    });
    Ok(address)
}

fn app() -> anyhow::Result<Backend> {
    let backend = Backend::start("app")?;
    backend.behave(Behave::ByPath {
        paths: vec![("/hang".to_owned(), Behave::Hang)],
        other: Box::new(Behave::Answer(Answer::text("here"))),
    });
    Ok(backend)
}

async fn reason(client: &Client, host: &str) -> anyhow::Result<(u16, String)> {
    let reply = client.get(host, "/").await?;
    Ok((reply.status.as_u16(), reply.header("leeward-reason").to_owned()))
}

/// Waits until requests to a host are answered with 200.
async fn served(client: &Client, host: &str) -> anyhow::Result<()> {
    eventually("requests to be served", SOON, || async {
        let (status, reason) = reason(client, host).await?;
        ensure!(status == 200, "{status} {reason}");
        Ok(())
    })
    .await
}

/// Asks the control plane for another certificate, with a copy of a node's files.
async fn renew(mesh: &Mesh, identity: &Arc<Identity>) -> Result<(), tonic::Status> {
    let key = NewKey::generate(identity.id()).map_err(|error| tonic::Status::internal(error.to_string()))?;
    let request = v1::IssueRequest {
        request: key.request().to_vec(),
    };
    let channel = channel::connect_lazy(Arc::clone(identity), mesh.control_address());
    IdentityClient::new(channel).issue(request).await.map(|_| ())
}

async fn says(node: &Node, path: &str, wanted: &str) -> anyhow::Result<()> {
    let admin = Client::new(node.admin, Protocol::Http1);
    eventually("the proxy to say it", SOON, || async {
        let told = admin.get("admin", path).await?.text();
        ensure!(told.contains(wanted), "{told}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_node_is_cut_off_both_ways_and_comes_back_with_a_new_token() -> anyhow::Result<()> {
    let builder = Mesh::builder().node("a", "a1").node("b", "b1").authority();
    let mut mesh = builder.flag("--tcp", "127.0.0.1:0").start().await?;
    let (there, back, bytes) = (app()?, Backend::start("back")?, echo().await?);
    let tcp = mesh.node("a1")?.process.address("tcp")?;
    let at = format!("addresses: [\"{tcp}\"]");
    let policy = service("app", &[(there.address(), "b", "b1")], &[])
        + &route("app", "app.example", "app", &[])
        + &service("back", &[(back.address(), "a", "a1")], &[])
        + &route("back", "back.example", "back", &[])
        + &service("db", &[(bytes, "b", "b1")], &["protocol: TCP", &at]);
    mesh.apply(&policy).await?;
    let (of_a, of_b) = (
        mesh.workload("a1", Protocol::Http1)?,
        mesh.workload("b1", Protocol::Http1)?,
    );
    served(&of_a, "app.example").await?;
    served(&of_b, "back.example").await?;
    // What is under way: a request by QUIC, bytes by TCP, and an idle connection of whoever has the key.
    let hanging = {
        let client = mesh.workload("a1", Protocol::Http1)?;
        tokio::spawn(async move { client.get("app.example", "/hang").await })
    };
    eventually("the request to be there", SOON, || async {
        ensure!(there.take_seen().iter().any(|seen| seen.target == "/hang"));
        Ok(())
    })
    .await?;
    let mut stream = TcpStream::connect(tcp).await?;
    stream.write_all(b"x").await?;
    ensure!(stream.read_u8().await? == b'x');
    let b1 = ("b", "b1", mesh.node("b1")?.inbound);
    let idle = connect(&mesh, "a1", b1).await?;
    let stolen = Identity::load(mesh.identity("a1"))?;
    renew(&mesh, &stolen).await?;
    let unused = ["token", "create", "--zone", "a", "--name", "a1"];
    let unused = leeward(&mesh, &unused).await?.trim().to_owned();

    revoke(&mesh, "a1").await?;

    ends(idle).await?;
    ends(stream).await?;
    let reply = hanging.await??;
    ensure!(
        reply.status.is_server_error() && reply.status != 504,
        "{}",
        reply.status
    );
    ensure!(connect(&mesh, "a1", b1).await.is_err(), "the thief is let in");
    ensure!(
        renew(&mesh, &stolen).await.is_err(),
        "the thief has another certificate"
    );
    // The node says why it has no way to others, and others have none to it.
    says(mesh.node("a1")?, "/readyz", "certificate was revoked").await?;
    let refused = reason(&of_a, "app.example").await?;
    ensure!(refused == (503, "identity_not_ready".to_owned()), "{refused:?}");
    let refused = reason(&of_b, "back.example").await?;
    ensure!(refused.0 == 503, "{refused:?}");
    let b = mesh.node("b1")?;
    for event in ["refused", "closed"] {
        let count = b.metric("leeward_identity_revoked_total", &[event]).await?;
        ensure!(count >= 1.0, "{event}: {count}");
    }
    ensure!(b.metric("leeward_identity_revocations", &[]).await? >= 1.0);

    // With a token of before it does not come back. With a new one it does, though its files are what they were.
    mesh.node_mut("a1")?.process.term_and_wait(SOON).await?;
    let old = [("--join-token", unused.as_str()), ("--identity-timeout", "3s")];
    let still = start(&mesh, "a1", &old).await?;
    ensure!(
        still.log()?.contains("was revoked; it needs another"),
        "{}",
        still.log()?
    );
    drop(still);
    let made = ["token", "create", "--zone", "a", "--name", "a1"];
    let made = leeward(&mesh, &made).await?.trim().to_owned();
    let again = mesh
        .start_again_with("a1", &[("--join-token", made.as_str())])
        .await?;
    served(&Client::new(again.outbound, Protocol::Http1), "app.example").await?;
    let fresh = Identity::load(mesh.identity("a1"))?;
    renew(&mesh, &fresh).await?;
    ensure!(renew(&mesh, &stolen).await.is_err());
    ensure!(connect(&mesh, "a1", b1).await.is_ok());
    let log = mesh.control_log()?;
    ensure!(log.contains("audit: certificates revoked"), "{log}");
    Ok(())
}

/// Starts another process of a node that needn't be ready.
async fn start(mesh: &Mesh, node: &str, flags: &[(&str, &str)]) -> anyhow::Result<leeward_testkit::Process> {
    let command = mesh.proxy_command(node, flags)?;
    let (program, args) = command.split_first().context("no command")?;
    leeward_testkit::Process::start(node, program.as_ref(), args, mesh.dir()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_revoked_stays_so_whoever_is_started_again() -> anyhow::Result<()> {
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "b1")
        .authority()
        .start()
        .await?;
    let backend = Backend::start("app")?;
    let policy =
        service("app", &[(backend.address(), "b", "b1")], &[]) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    mesh.root()?.issue(
        &SpiffeId::proxy(DOMAIN, "a", "good")?,
        DAY,
        &mesh.identity("good"),
    )?;
    revoke(&mesh, "a1").await?;

    mesh.kill_control()?;
    mesh.start_control().await?;
    let listed = leeward(&mesh, &["identity", "revoked"]).await?;
    ensure!(
        listed.contains("spiffe://leeward.test/zone/a/proxy/a1") && listed.contains("stolen"),
        "{listed}"
    );
    let stolen = Identity::load(mesh.identity("a1"))?;
    ensure!(renew(&mesh, &stolen).await.is_err());
    let inbound = |node: &Node| ("b", "b1", node.inbound);
    ensure!(connect(&mesh, "a1", inbound(mesh.node("b1")?)).await.is_err());

    // A proxy that starts while there is no control plane knows it, too.
    let state = mesh.data("b1").join("state");
    eventually("the list to be on disk", SOON, || async {
        let bytes = std::fs::read(state.join("revoked"))?;
        ensure!(String::from_utf8_lossy(&bytes).contains("proxy/a1"));
        Ok(())
    })
    .await?;
    mesh.kill_control()?;
    mesh.node_mut("b1")?.process.kill9()?;
    let again = mesh.start_again("b1").await?;
    ensure!(connect(&mesh, "a1", inbound(&again)).await.is_err());
    connect(&mesh, "good", inbound(&again)).await?;

    // What the control plane takes back is taken back everywhere.
    mesh.start_control().await?;
    leeward(&mesh, &["identity", "restore", "/zone/a/proxy/a1"]).await?;
    eventually("the node to be let in again", SOON, || async {
        connect(&mesh, "a1", inbound(&again)).await.map(|_| ())
    })
    .await?;
    let nobody = leeward(&mesh, &["identity", "restore", "/zone/a/proxy/a1"]).await;
    ensure!(nobody.is_err_and(|error| error.to_string().contains("there is no revocation of")));
    Ok(())
}

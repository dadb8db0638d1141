//! A proxy whose control plane is newer, and says of authorization what the proxy can't read.

use anyhow::{Context, ensure};
use leeward_identity::authority::Authority;
use leeward_identity::{Identity, SpiffeId, tls};
use leeward_proto::{manifest, v1};
use leeward_testkit::policy::{fallback, route, service};
use leeward_testkit::{
    Backend, Client, Process, Protocol, Reply, TempDir, binaries, eventually, get, with_header,
};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use v1::control_message::Message as FromControl;
use v1::push_service_server::{PushService, PushServiceServer};

const DOMAIN: &str = "leeward.test";
const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);
/// An action that this build doesn't know.
const NEWER: i32 = 99;

type Outbox = mpsc::Sender<Result<v1::ControlMessage, Status>>;

/// A control plane that says what the test says.
struct Control {
    opened: mpsc::Sender<Outbox>,
}

#[tonic::async_trait]
impl PushService for Control {
    type SubscribeStream = ReceiverStream<Result<v1::ControlMessage, Status>>;

    async fn subscribe(
        &self,
        request: Request<Streaming<v1::ProxyMessage>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let mut said = request.into_inner();
        // Its acks are read, or they would fill the stream.
        tokio::spawn(async move { while let Ok(Some(_)) = said.message().await {} });
        let (outbox, messages) = mpsc::channel(4);
        let gone = |_| Status::unavailable("the test is over");
        self.opened.send(outbox).await.map_err(gone)?;
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

async fn push(to: &Outbox, generation: u64, upserts: Vec<v1::Resource>) -> anyhow::Result<()> {
    let update = v1::Update {
        store_id: "s".to_owned(),
        generation,
        upserts,
        complete: true,
        ..v1::Update::default()
    };
    let message = v1::ControlMessage {
        message: Some(FromControl::Update(update)),
    };
    to.send(Ok(message)).await.context("the proxy is gone")
}

fn resources(text: &str, revision: u64) -> anyhow::Result<Vec<v1::Resource>> {
    let mut resources = manifest::parse("test", text).map_err(|bad| anyhow::anyhow!("{bad:?}"))?;
    for resource in &mut resources {
        resource.metadata.get_or_insert_default().revision = revision;
    }
    Ok(resources)
}

/// A policy for `pay`, whose action is this.
fn guard(revision: u64, action: i32) -> anyhow::Result<Vec<v1::Resource>> {
    let text = "apiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {name: newer}\nspec: {services: [pay], action: Allow, rules: [{}]}\n";
    let mut resources = resources(text, revision)?;
    for resource in &mut resources {
        if let Some(v1::resource::Spec::AuthorizationPolicy(policy)) = &mut resource.spec {
            policy.action = action;
        }
    }
    Ok(resources)
}

async fn listen(dir: &TempDir) -> anyhow::Result<(SocketAddr, mpsc::Receiver<Outbox>)> {
    let authority = Authority::create(&dir.path().join("ca"), DOMAIN)?;
    authority.issue(&SpiffeId::control(DOMAIN)?, HOUR, &dir.path().join("control"))?;
    authority.issue(&SpiffeId::proxy(DOMAIN, "a", "a1")?, HOUR, &dir.path().join("a1"))?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let identity = Identity::load(dir.path().join("control"))?;
    let incoming = ReceiverStream::new(tls::incoming(listener, identity, &[b"h2"]));
    let (opened, streams) = mpsc::channel(4);
    let server = tonic::transport::Server::builder().add_service(PushServiceServer::new(Control { opened }));
    tokio::spawn(server.serve_with_incoming(incoming));
    Ok((address, streams))
}

#[track_caller]
fn refused(reply: &Reply) {
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-reason")),
        (403, "authorization_unknown"),
        "{reply:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_policy_that_cannot_be_read_guards_is_closed() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let (control, mut streams) = listen(&dir).await?;
    let backend = Backend::start("app")?;
    let identity = dir.path().join("a1").display().to_string();
    let control = control.to_string();
    let args = [
        ["--zone", "a"],
        ["--name", "a1"],
        ["--identity", &identity],
        ["--control", &control],
        ["--inbound", "127.0.0.1:0"],
        ["--outbound", "127.0.0.1:0"],
        ["--admin", "127.0.0.1:0"],
        ["--ofrep", "127.0.0.1:0"],
        ["--access-log", "stdout"],
    ];
    let program = binaries::path("leeward-proxy")?;
    let process = Process::start("a1", &program, args.concat(), dir.path()).await?;
    let to = tokio::time::timeout(SOON, streams.recv())
        .await?
        .context("no stream")?;

    let zone = "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {}\n";
    let at = [(backend.address(), "a", "")];
    let mesh = zone.to_owned()
        + &service("pay", &at, &[])
        + &service("open", &at, &[])
        + &fallback(
            "ladder",
            &["static: {status: 200, body: degraded}"],
            &["onStatuses: [403]"],
        )
        + &route("pay", "pay.example", "pay", &["fallback: ladder"])
        + &route("open", "open.example", "open", &[]);
    let mut first = resources(&mesh, 1)?;
    first.extend(guard(1, NEWER)?);
    push(&to, 1, first).await?;
    let client = Client::new(process.address("outbound")?, Protocol::Http1);
    eventually("policy is live", SOON, || async {
        ensure!(client.get("open.example", "/").await?.status == 200, "not yet");
        Ok(())
    })
    .await?;

    let before = backend.requests();
    for _ in 0..3 {
        refused(&client.get("pay.example", "/").await?);
    }
    let grpc = with_header(get("pay.example", "/x.Y/Z"), "content-type", "application/grpc");
    assert_eq!(client.call(grpc).await?.header("grpc-status"), "7");
    assert_eq!(backend.requests(), before, "nothing came to the workload");
    assert_eq!(client.get("open.example", "/").await?.status, 200);
    eventually("a line that names the policy", SOON, || async {
        let log = process.log()?;
        let told = log.lines().any(|line| {
            line.contains("\"reason\":\"authorization_unknown\"")
                && line.contains("\"authorization_policy\":\"newer\"")
        });
        ensure!(told, "{log}");
        Ok(())
    })
    .await?;

    // A version that it can read opens it; one that it can't read after that leaves the good one in force.
    let allow = v1::AuthorizationAction::Allow.into();
    push(&to, 2, guard(2, allow)?).await?;
    eventually("the good version is live", SOON, || async {
        ensure!(client.get("pay.example", "/").await?.status == 200, "not yet");
        Ok(())
    })
    .await?;
    push(&to, 3, guard(3, NEWER)?).await?;
    let later = "apiVersion: leeward.dev/v1\nkind: Route\nmetadata: {name: later}\nspec: {hostnames: [later.example], rules: [{backendRefs: [{service: pay}]}]}\n";
    push(&to, 4, resources(later, 4)?).await?;
    eventually("what came after it is live", SOON, || async {
        ensure!(client.get("later.example", "/").await?.status == 200, "not yet");
        Ok(())
    })
    .await?;
    assert_eq!(client.get("pay.example", "/").await?.status, 200);
    Ok(())
}

//! Processes of a node that are given certificates by its proxy: who gets which, what changes it, and what they aren't good for.

use anyhow::{Context, ensure};
use leeward_identity::authority::Authority;
use leeward_identity::{Given, Identity, SpiffeId, channel};
use leeward_proto::{spiffe, v1};
use leeward_testkit::{Client, Mesh, Node, Process, Protocol, TempDir, binaries, eventually};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

type Api = spiffe::spiffe_workload_api_client::SpiffeWorkloadApiClient<Channel>;

const DOMAIN: &str = "leeward.test";
const SOON: Duration = Duration::from_secs(30);
/// Users that nobody is.
const OTHER: u32 = 54_321;
const NOBODY: u32 = 54_322;

/// A mesh with one node, whose proxy gives certificates to processes.
struct Rig {
    mesh: Mesh,
    dir: TempDir,
    socket: PathBuf,
}

impl Rig {
    async fn start() -> anyhow::Result<Self> {
        Self::of(Mesh::builder()).await
    }

    async fn of(builder: leeward_testkit::MeshBuilder) -> anyhow::Result<Self> {
        let dir = TempDir::new()?;
        // Whatever new directories are here: other users are to come in.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
        let socket = dir.path().join("workload.sock");
        let at = format!("unix:{}", socket.display());
        let builder = builder.node("a", "a1").flag("--workload-api", &at);
        let mesh = builder.authority().start().await?;
        Ok(Self { mesh, dir, socket })
    }

    fn node(&self) -> anyhow::Result<&Node> {
        self.mesh.node("a1")
    }

    /// On a connection of its own.
    fn api(&self) -> Api {
        Api::new(channel::agent_lazy(self.socket.clone()))
    }

    /// What this process is told from now on.
    async fn svids(&self) -> Result<Streaming<spiffe::X509svidResponse>, Status> {
        let stream = self
            .api()
            .fetch_x509svid(call(spiffe::X509svidRequest {}))
            .await?;
        Ok(stream.into_inner())
    }

    /// The ids that this process has.
    async fn ids(&self) -> Result<Vec<String>, Status> {
        let first = self.svids().await?.message().await?;
        Ok(ids(&first.unwrap_or_default()))
    }

    /// Runs `leeward identity workload` as a user.
    async fn as_user(&self, uid: u32, args: &[&str]) -> anyhow::Result<Output> {
        let mut command = tokio::process::Command::new(for_everybody(self.dir.path())?);
        command
            .args(["identity", "workload", "--socket"])
            .arg(format!("unix:{}", self.socket.display()))
            .args(args)
            .current_dir("/")
            .uid(uid)
            .gid(uid)
            .kill_on_drop(true);
        let ended = tokio::time::timeout(SOON, command.output()).await;
        Ok(ended.context("leeward identity workload doesn't end")??)
    }

    async fn leeward(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = leeward_testkit::leeward(&self.mesh, args).await?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "leeward {args:?}: {told}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// The command, where every user may run it.
fn for_everybody(dir: &Path) -> anyhow::Result<PathBuf> {
    let program = binaries::path("leeward")?;
    let may_enter = |dir: &Path| dir.metadata().is_ok_and(|m| m.permissions().mode() & 0o001 != 0);
    if program.ancestors().all(may_enter) {
        return Ok(program);
    }
    let copy = dir.join("leeward");
    if !copy.exists() {
        std::fs::copy(&program, &copy)?;
    }
    Ok(copy)
}

fn call<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let header = MetadataValue::from_static("true");
    request.metadata_mut().insert("workload.spiffe.io", header);
    request
}

fn ids(answer: &spiffe::X509svidResponse) -> Vec<String> {
    answer.svids.iter().map(|svid| svid.spiffe_id.clone()).collect()
}

fn id(name: &str) -> anyhow::Result<SpiffeId> {
    Ok(SpiffeId::workload(DOMAIN, "a", name)?)
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn workload(name: &str, selectors: &str) -> String {
    format!(
        "---\napiVersion: leeward.dev/v1\nkind: Workload\nmetadata: {{name: {name}}}\nspec: {{zone: a, {selectors}}}\n"
    )
}

fn of_user(name: &str, uid: u32) -> String {
    workload(name, &format!("uids: [{uid}]"))
}

/// One that was given, to be used.
fn identity(svid: &spiffe::X509svid) -> anyhow::Result<Arc<Identity>> {
    let place = Path::new("socket");
    let given = Given::parse(place, &svid.x509_svid, &svid.x509_svid_key, &svid.bundle)?;
    Ok(Identity::given(place, given)?)
}

async fn next<T>(stream: &mut Streaming<T>) -> anyhow::Result<T> {
    let next = tokio::time::timeout(2 * SOON, stream.message()).await;
    next.context("nothing more is said")??
        .context("the stream has ended")
}

/// Takes what is said until it is as wanted.
async fn until<T: std::fmt::Debug>(
    stream: &mut Streaming<T>,
    is_it: impl Fn(&T) -> anyhow::Result<bool>,
) -> anyhow::Result<T> {
    loop {
        let said = next(stream).await?;
        if is_it(&said)? {
            return Ok(said);
        }
    }
}

/// A TLS connection of one to the other, at which each knows the other.
async fn meet(server: &Arc<Identity>, client: &Arc<Identity>) -> anyhow::Result<SpiffeId> {
    let (here, there) = tokio::io::duplex(1 << 16);
    let accepting = TlsAcceptor::from(server.server_config(&[b"h2"])?).accept(here);
    let config = client.client_config(&[b"h2"], server.id())?;
    let name = std::net::IpAddr::from([127, 0, 0, 1]).into();
    let connecting = TlsConnector::from(config).connect(name, there);
    let (accepted, connected) = tokio::join!(accepting, connecting);
    connected?;
    let accepted = accepted?;
    let (_, session) = accepted.get_ref();
    Ok(leeward_identity::peer_id(
        session.peer_certificates().unwrap_or_default(),
    )?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_is_given_what_its_user_is() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    let own = own_uid();
    let policy = of_user("shop", own) + &of_user("pay", own) + &of_user("other", OTHER);
    rig.mesh.apply(&policy).await?;
    let mut stream = rig.svids().await?;
    let first = next(&mut stream).await?;
    ensure!(
        ids(&first) == [id("pay")?.to_string(), id("shop")?.to_string()],
        "{first:?}"
    );
    let hints: Vec<&str> = first.svids.iter().map(|svid| svid.hint.as_str()).collect();
    ensure!(hints == ["pay", "shop"], "{hints:?}");
    let (pay, shop) = (identity(&first.svids[0])?, identity(&first.svids[1])?);
    ensure!(meet(&pay, &shop).await? == id("shop")?);
    // The same for everybody who is it, while it lasts; and the roots alone.
    let again = next(&mut rig.svids().await?).await?;
    ensure!(again == first, "another certificate for the same workload");
    let roots = rig
        .api()
        .fetch_x509_bundles(call(spiffe::X509BundlesRequest {}))
        .await?;
    let roots = next(&mut roots.into_inner()).await?;
    let of_domain = roots.bundles.get("spiffe://leeward.test");
    ensure!(of_domain == Some(&first.svids[0].bundle) && roots.bundles.len() == 1);

    // A page in a browser can't send the header. Tokens there are none.
    let bare = rig.api().fetch_x509svid(spiffe::X509svidRequest {}).await;
    ensure!(bare.is_err_and(|status| status.code() == Code::InvalidArgument));
    let mut wrong = call(spiffe::X509BundlesRequest {});
    wrong
        .metadata_mut()
        .append("workload.spiffe.io", MetadataValue::from_static("true"));
    let twice = rig.api().fetch_x509_bundles(wrong).await;
    ensure!(twice.is_err_and(|status| status.code() == Code::InvalidArgument));
    let token = rig
        .api()
        .fetch_jwtsvid(call(spiffe::JwtsvidRequest::default()))
        .await;
    let token = token.err().context("there is a token")?;
    ensure!(
        token.code() == Code::Unimplemented && token.message().contains("no JWT-SVIDs here"),
        "{token}"
    );

    let node = rig.node()?;
    ensure!(node.metric("leeward_workload_svids", &[]).await? >= 2.0);
    ensure!(node.metric("leeward_workload_streams", &[]).await? >= 1.0);
    ensure!(
        node.metric("leeward_workload_svids_issued_total", &["renewed"])
            .await?
            >= 2.0
    );
    ensure!(
        node.metric("leeward_workload_refused_total", &["\"header\""])
            .await?
            >= 2.0
    );
    let reply = Client::new(node.admin, Protocol::Http1)
        .get("admin", "/config")
        .await?;
    ensure!(reply.text().contains("\"workload\": \"pay\""), "{}", reply.text());
    let log = rig.mesh.control_log()?;
    ensure!(log.contains("audit: certificate issued for a workload"), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_user_is_somebody_else_or_nobody() -> anyhow::Result<()> {
    if own_uid() != 0 {
        eprintln!("skipped: only root can be other users");
        return Ok(());
    }
    let rig = Rig::start().await?;
    rig.mesh
        .apply(&(of_user("pay", 0) + &of_user("other", OTHER)))
        .await?;
    let out = rig.dir.path().join("out");
    std::fs::create_dir(&out)?;
    std::os::unix::fs::chown(&out, Some(OTHER), Some(OTHER))?;
    let at = out.display().to_string();
    let other = rig.as_user(OTHER, &["--out", &at]).await?;
    let told = String::from_utf8_lossy(&other.stdout);
    let theirs = id("other")?;
    ensure!(
        other.status.success() && told.starts_with(&format!("{theirs} in {at}, until ")),
        "{other:?}"
    );
    ensure!(*Identity::load(&out)?.id() == theirs);
    let mode = std::fs::metadata(out.join("key.pem"))?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "{mode:o}");
    // Not what is another's.
    let pay = id("pay")?.to_string();
    let refused = rig.as_user(OTHER, &["--id", &pay]).await?;
    let told = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        !refused.status.success() && told.contains(theirs.as_str()),
        "{told}"
    );
    // Who is nothing is told what was seen.
    let refused = rig.as_user(NOBODY, &[]).await?;
    let told = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        !refused.status.success() && told.contains("PermissionDenied") && told.contains("as the user 54322"),
        "{told}"
    );
    ensure!(
        rig.node()?
            .metric("leeward_workload_refused_total", &["no_workload"])
            .await?
            >= 1.0
    );
    // And this process, which runs as root, is what root is.
    ensure!(rig.ids().await? == [pay]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_group_decides_where_policy_says_so() -> anyhow::Result<()> {
    let own = std::fs::read_to_string("/proc/self/cgroup")?;
    let Some(own) = own.lines().find_map(|line| line.strip_prefix("0::")) else {
        eprintln!("skipped: there are no control groups of version 2 here");
        return Ok(());
    };
    let (uid, below) = (own_uid(), own.trim_end_matches('/'));
    let rig = Rig::start().await?;
    let policy = workload("here", &format!("cgroups: [\"{own}\"]"))
        + &workload(
            "here-and-me",
            &format!("cgroups: [\"{own}\", /nowhere], uids: [{uid}]"),
        )
        + &workload(
            "here-and-not-me",
            &format!("cgroups: [\"{own}\"], uids: [{OTHER}]"),
        )
        + &workload("below", &format!("cgroups: [\"{below}/nowhere.slice/*\"]"))
        + &workload("longer", &format!("cgroups: [\"{below}/x\"]"));
    rig.mesh.apply(&policy).await?;
    let got = rig.ids().await?;
    ensure!(
        got == [id("here")?.to_string(), id("here-and-me")?.to_string()],
        "{got:?}"
    );
    rig.mesh.delete(v1::Kind::Workload, "here").await?;
    rig.mesh.delete(v1::Kind::Workload, "here-and-me").await?;
    let refused = rig.ids().await.err().context("it is in no such group")?;
    ensure!(refused.code() == Code::PermissionDenied);
    let group = format!("control group {own:?}");
    ensure!(refused.message().contains(&group), "{refused}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policy_gives_and_takes_on_an_open_stream() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    let own = own_uid();
    let (pay, shop) = (id("pay")?.to_string(), id("shop")?.to_string());
    let refused = rig.ids().await.err().context("there is no Workload")?;
    ensure!(refused.code() == Code::PermissionDenied, "{refused}");
    rig.mesh.apply(&of_user("pay", own)).await?;
    let mut stream = rig.svids().await?;
    let roots = rig
        .api()
        .fetch_x509_bundles(call(spiffe::X509BundlesRequest {}))
        .await?;
    let mut roots = roots.into_inner();
    next(&mut roots).await?;
    ensure!(ids(&next(&mut stream).await?) == std::slice::from_ref(&pay));
    rig.mesh.apply(&of_user("shop", own)).await?;
    ensure!(ids(&next(&mut stream).await?) == [pay, shop.clone()]);
    // One that is for other proxies of the zone, or for other users, is none of this process's.
    let elsewhere = workload("pay", &format!("proxies: [a2], uids: [{own}]"));
    rig.mesh.apply(&elsewhere).await?;
    ensure!(ids(&next(&mut stream).await?) == [shop]);
    rig.mesh.apply(&of_user("shop", OTHER)).await?;
    for ended in [next(&mut stream).await.err(), next(&mut roots).await.err()] {
        let ended = ended.context("it goes on")?;
        let status = ended.downcast_ref::<Status>().context("it has no status")?;
        ensure!(status.code() == Code::PermissionDenied, "{status}");
    }
    // The keys are gone with the policy, too.
    rig.mesh.delete(v1::Kind::Workload, "shop").await?;
    eventually("certificates to go", SOON, || async {
        let left = rig.node()?.metric("leeward_workload_svids", &[]).await?;
        ensure!(left < 1.0, "{left}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_root_brings_other_certificates_on_an_open_stream() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.mesh.apply(&of_user("pay", own_uid())).await?;
    let mut stream = rig.svids().await?;
    let first = next(&mut stream).await?;
    let old = rig.mesh.root()?.fingerprint().to_owned();
    let of = |answer: &spiffe::X509svidResponse| -> anyhow::Result<(Option<String>, usize)> {
        let identity = identity(answer.svids.first().context("no certificate")?)?;
        Ok((identity.facts().root, identity.bundle().roots().len()))
    };
    ensure!(of(&first)? == (Some(old.clone()), 1));
    let root = rig.mesh.dir().join("new-root").display().to_string();
    rig.leeward(&["ca", "init", &root, "--trust-domain", DOMAIN])
        .await?;
    let next_ca = rig.mesh.authority().join("next").display().to_string();
    rig.leeward(&["ca", "intermediate", "--root", &root, "--out", &next_ca])
        .await?;
    let new = Authority::open(Path::new(&root))?.fingerprint().to_owned();

    // First the roots, of the certificate that there is.
    rig.leeward(&["ca", "rotate", "prepare"]).await?;
    let prepared = until(&mut stream, |said| Ok(of(said)?.1 == 2)).await?;
    ensure!(of(&prepared)?.0.as_deref() == Some(old.as_str()));
    ensure!(prepared.svids[0].x509_svid == first.svids[0].x509_svid);
    eventually("the proxy to trust the new root", SOON, || async {
        rig.leeward(&["ca", "rotate", "activate"]).await.map(|_| ())
    })
    .await?;
    // Then, within a tenth of its life, another, of another key.
    let active = until(&mut stream, |said| {
        Ok(of(said)?.0.as_deref() == Some(new.as_str()))
    })
    .await?;
    ensure!(of(&active)?.1 == 2);
    ensure!(active.svids[0].x509_svid_key != first.svids[0].x509_svid_key);
    ensure!(meet(&identity(&active.svids[0])?, &identity(&prepared.svids[0])?).await? == id("pay")?);
    rig.leeward(&["identity", "renew"]).await?;
    eventually("the old root to be out of use", 3 * SOON, || async {
        rig.leeward(&["ca", "rotate", "retire"]).await.map(|_| ())
    })
    .await?;
    let last = until(&mut stream, |said| Ok(of(said)?.1 == 1)).await?;
    ensure!(of(&last)?.0.as_deref() == Some(new.as_str()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_control_plane_what_is_there_goes_on() -> anyhow::Result<()> {
    let mut rig = Rig::start().await?;
    rig.mesh.apply(&of_user("pay", own_uid())).await?;
    rig.mesh.kill_control()?;
    let refused = rig.ids().await.err().context("it was issued by nobody")?;
    ensure!(refused.code() == Code::Unavailable, "{refused}");
    ensure!(
        refused.message().contains("pay: unreachable: "),
        "it doesn't say why: {refused}"
    );
    rig.mesh.start_control().await?;
    let pay = id("pay")?.to_string();
    eventually("the control plane to be asked again", 2 * SOON, || async {
        let got = rig.ids().await?;
        ensure!(got == [pay.clone()], "{got:?}");
        Ok(())
    })
    .await?;
    let mut stream = rig.svids().await?;
    let first = next(&mut stream).await?;
    rig.mesh.kill_control()?;
    eventually("the proxy to be alone", SOON, || async {
        let connected = rig.node()?.metric("leeward_config_connected", &[]).await?;
        ensure!(connected < 1.0);
        Ok(())
    })
    .await?;
    let again = next(&mut rig.svids().await?).await?;
    ensure!(again == first, "what is there is for whoever comes");
    let more = tokio::time::timeout(Duration::from_secs(1), stream.message()).await;
    ensure!(more.is_err(), "the stream goes on: {more:?}");
    Ok(())
}

/// Whether an inbound listener takes who shows an identity: in TLS 1.3 a client hears so when it first reads.
async fn is_let_in(identity: &Arc<Identity>, inbound: SocketAddr) -> anyhow::Result<()> {
    let config = identity.client_config(&[b"h2"], &SpiffeId::proxy(DOMAIN, "a", "a1")?)?;
    let stream = tokio::net::TcpStream::connect(inbound).await?;
    let mut tls = TlsConnector::from(config)
        .connect(inbound.ip().into(), stream)
        .await?;
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await?;
    tls.read_u8().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_is_taken_for_no_proxy() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.mesh.apply(&of_user("a1", own_uid())).await?;
    let given = next(&mut rig.svids().await?).await?;
    let workload = identity(&given.svids[0])?;
    let inbound = rig.node()?.inbound;
    is_let_in(&Identity::load(rig.mesh.identity("a1"))?, inbound).await?;
    let refused = is_let_in(&workload, inbound).await;
    ensure!(refused.is_err(), "it was let in");
    let log = rig.node()?.process.log()?;
    ensure!(
        log.contains("only proxies may use the inbound listener") && log.contains("zone/a/workload/a1"),
        "{log}"
    );
    let channel = channel::connect_lazy(workload, rig.mesh.control_address());
    let mut push = v1::push_service_client::PushServiceClient::new(channel.clone());
    let refused = push.subscribe(tokio_stream::pending::<v1::ProxyMessage>()).await;
    let refused = refused.err().context("it has subscribed")?;
    ensure!(
        refused.code() == Code::PermissionDenied && refused.message().contains("is not a proxy"),
        "{refused}"
    );
    let mut authority = v1::identity_client::IdentityClient::new(channel);
    let refused = authority.issue(v1::IssueRequest::default()).await;
    let refused = refused.err().context("it has renewed its certificate itself")?;
    ensure!(refused.code() == Code::PermissionDenied, "{refused}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_has_as_many_calls_as_it_may() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.mesh.apply(&of_user("pay", own_uid())).await?;
    let mut open = Vec::new();
    for _ in 0..16 {
        let api = rig.api();
        for _ in 0..16 {
            let stream = api
                .clone()
                .fetch_x509svid(call(spiffe::X509svidRequest {}))
                .await?;
            open.push(stream.into_inner());
        }
    }
    let refused = rig.ids().await.err().context("it has one more than it may")?;
    ensure!(refused.code() == Code::ResourceExhausted, "{refused}");
    ensure!(refused.message().contains("256 of this user"), "{refused}");
    drop(open);
    eventually("room for another", SOON, || async {
        rig.ids().await?;
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_goes_on_at_the_same_socket() -> anyhow::Result<()> {
    let mut rig = Rig::of(Mesh::builder().handover()).await?;
    rig.mesh.apply(&of_user("pay", own_uid())).await?;
    let mut stream = rig.svids().await?;
    let first = next(&mut stream).await?;
    let new = rig.mesh.start_again("a1").await?;
    let ended = next(&mut stream).await.err().context("the old stream goes on")?;
    let status = ended.downcast_ref::<Status>().context("it has no status")?;
    ensure!(
        status.code() == Code::Unavailable && status.message().contains("connect again"),
        "{status}"
    );
    let mut old = std::mem::replace(rig.mesh.node_mut("a1")?, new);
    old.process.wait(SOON).await?;
    let second = next(&mut rig.svids().await?).await?;
    ensure!(ids(&second) == ids(&first), "{second:?}");
    ensure!(
        second.svids[0].x509_svid_key != first.svids[0].x509_svid_key,
        "keys are not handed over"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_cant_serve_workloads_says_so() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let policy = dir.path().join("policy");
    std::fs::create_dir(&policy)?;
    let (policy, socket) = (
        policy.display().to_string(),
        format!("unix:{}/s", dir.path().display()),
    );
    let any = "127.0.0.1:0";
    let args = [
        ["--zone", "a"],
        ["--name", "a1"],
        ["--policy", policy.as_str()],
        ["--outbound", any],
        ["--admin", any],
        ["--ofrep", "off"],
        ["--workload-api", socket.as_str()],
    ];
    let program = binaries::path("leeward-proxy")?;
    let refused = Process::start("a1", &program, args.concat(), dir.path()).await;
    let refused = refused.err().context("it serves what it can't")?.to_string();
    ensure!(
        refused.contains("--workload-api needs --identity and --control"),
        "{refused}"
    );
    Ok(())
}

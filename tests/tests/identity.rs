//! Certificates of real proxies: the first by a token, the next at half life, another root under load, and what users and
//! operators are told when one has ended.

use anyhow::{Context, bail, ensure};
use leeward_control::backup::{BackupSettings, Backups};
use leeward_control::ca::Files;
use leeward_control::kv::Kv;
use leeward_control::push::Timing;
use leeward_control::store::{Options, Store};
use leeward_control::{Policy, Server, serve};
use leeward_identity::authority::Authority;
use leeward_identity::{Identity, SpiffeId, channel};
use leeward_proto::{manifest, spiffe, v1};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Backend, Client, Load, Mesh, Process, Protocol, TempDir, binaries, eventually};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{UnixListenerStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

const DOMAIN: &str = "leeward.test";
const SOON: Duration = Duration::from_secs(30);
/// Lines of a service to which the proxies keep no connection: each request shows certificates anew.
const EACH_A_HANDSHAKE: &[&str] = &["connectionPool: {maxIdlePerEndpoint: 0}"];
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A proxy beside a mesh's own, with an identity from wherever `more` says.
async fn proxy(
    dir: &Path,
    control: SocketAddr,
    (zone, name): (&str, &str),
    more: &[(&str, &str)],
) -> anyhow::Result<Process> {
    let control = control.to_string();
    let any = "127.0.0.1:0";
    let mut args = Vec::new();
    let common = [
        ("--zone", zone),
        ("--name", name),
        ("--control", &control),
        ("--outbound", any),
        ("--inbound", any),
        ("--admin", any),
        ("--ofrep", "off"),
    ];
    for (flag, value) in common.iter().chain(more) {
        args.extend([(*flag).to_owned(), (*value).to_owned()]);
    }
    Process::start(name, &binaries::path("leeward-proxy")?, args, dir).await
}

/// What a proxy's admin listener says of its identity.
async fn identity_of(admin: SocketAddr) -> anyhow::Result<serde_json::Value> {
    let reply = Client::new(admin, Protocol::Http1)
        .get("admin", "/config")
        .await?;
    let config: serde_json::Value = serde_json::from_slice(&reply.body)?;
    config
        .get("identity")
        .cloned()
        .context("/config says nothing of the identity")
}

async fn ready(admin: SocketAddr) -> anyhow::Result<()> {
    let client = Client::new(admin, Protocol::Http1);
    eventually("a proxy to be ready", SOON, || async {
        let reply = client.get("admin", "/readyz").await?;
        ensure!(reply.status == 200, "{}", reply.text());
        Ok(())
    })
    .await
}

async fn token(mesh: &Mesh, zone: &str, name: &str) -> anyhow::Result<String> {
    let args = ["token", "create", "--zone", zone, "--name", name, "--ttl", "10m"];
    Ok(leeward(mesh, &args).await?.trim().to_owned())
}

/// Runs the command as the mesh's user, and returns what it printed; what it complained of is the error.
async fn leeward(mesh: &Mesh, args: &[&str]) -> anyhow::Result<String> {
    let output = leeward_testkit::leeward(mesh, args).await?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "leeward {args:?}: {told}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_joins_with_a_token_once_and_comes_back_without() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").authority().start().await?;
    let (dir, control) = (mesh.dir(), mesh.control_address());
    let id_dir = mesh.identity("a2");
    let own = text(&id_dir);
    let made = token(&mesh, "a", "a2").await?;

    // As another it is of no use, and not used up.
    let other = text(&mesh.identity("a3"));
    let flags = [("--identity", other.as_str()), ("--join-token", &made)];
    let refused = proxy(dir, control, ("a", "a3"), &flags).await;
    let refused = refused
        .err()
        .context("a3 has joined with the token of a2")?
        .to_string();
    ensure!(
        refused.contains("identity_not_ready") && refused.contains("for somebody else"),
        "{refused}"
    );

    let file = dir.join("token");
    std::fs::write(&file, format!("{made}\n"))?;
    let flags = [("--identity", own.as_str()), ("--join-token-file", &text(&file))];
    let mut a2 = proxy(dir, control, ("a", "a2"), &flags).await?;
    ready(a2.address("admin")?).await?;
    let mode = std::fs::metadata(id_dir.join("key.pem"))?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "{mode:o}");
    let said = mesh.proxies().await?;
    ensure!(said.proxies.iter().any(|p| p.name == "a2" && p.connected));

    // Started again, it has a certificate; the token is not looked at.
    a2.term_and_wait(SOON).await?;
    let mut a2 = proxy(dir, control, ("a", "a2"), &flags).await?;
    ready(a2.address("admin")?).await?;
    ensure!(a2.log()?.contains("the join token is not used"));

    // Without its certificate it would have to join again, and the token was good once.
    a2.term_and_wait(SOON).await?;
    std::fs::remove_dir_all(&id_dir)?;
    let refused = proxy(dir, control, ("a", "a2"), &flags).await;
    let refused = refused.err().context("the token was good twice")?.to_string();
    ensure!(refused.contains("was used already"), "{refused}");
    ensure!(!id_dir.join("cert.pem").exists());
    let log = mesh.control_log()?;
    for line in [
        "audit: join token made",
        "audit: joined with a token",
        "audit: join refused",
    ] {
        ensure!(log.contains(line), "no {line:?} in {log}");
    }
    let secret = made.split(':').nth(2).context("no secret")?;
    ensure!(
        !log.contains(secret) && !a2.log()?.contains(secret),
        "a secret was logged"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_gets_no_certificate_says_so_and_serves_nothing() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").authority().start().await?;
    let own = text(&mesh.identity("a2"));
    let made = token(&mesh, "a", "a2").await?;
    // Nobody is there.
    let nowhere = leeward_testkit::Port::reserve()?.address();
    let flags = [
        ("--identity", own.as_str()),
        ("--join-token", &made),
        ("--identity-timeout", "1s"),
    ];
    let late = proxy(mesh.dir(), nowhere, ("a", "a2"), &flags).await;
    let late = late.err().context("it has joined nobody")?.to_string();
    ensure!(
        late.contains("identity_not_ready") && late.contains("has not joined within 1s"),
        "{late}"
    );

    // Somebody else is there: known by neither root, and told nothing.
    let stranger = Authority::create(&mesh.dir().join("stranger"), DOMAIN)?;
    let bundle = mesh.dir().join("stranger.pem");
    std::fs::write(&bundle, stranger.roots().to_pem())?;
    let bundle = text(&bundle);
    let flags = [
        ("--identity", own.as_str()),
        ("--join-token", &made),
        ("--identity-timeout", "1s"),
        ("--trust-bundle", &bundle),
    ];
    let late = proxy(mesh.dir(), mesh.control_address(), ("a", "a2"), &flags).await;
    let late = late.err().context("it has trusted a stranger")?.to_string();
    ensure!(late.contains("UnknownIssuer"), "{late}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_has_joined_before_starts_without_anybody_to_join() -> anyhow::Result<()> {
    let mut mesh = Mesh::builder().node("a", "a1").authority().start().await?;
    let made = token(&mesh, "a", "a2").await?;
    let id_dir = mesh.identity("a2");
    let own = text(&id_dir);
    let short = Duration::from_secs(2);
    mesh.root()?
        .issue(&SpiffeId::proxy(DOMAIN, "a", "a2")?, short, &id_dir)?;
    eventually("the certificate to end", SOON, || async {
        let ready = Identity::load(&id_dir)?.ready_now();
        ensure!(ready.is_err(), "it is good still");
        Ok(())
    })
    .await?;
    // Handshakes take it until the end of the second in which it ends.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let flags = [
        ("--identity", own.as_str()),
        ("--join-token", &made),
        ("--identity-timeout", "1s"),
    ];
    mesh.kill_control()?;
    let a2 = proxy(mesh.dir(), mesh.control_address(), ("a", "a2"), &flags).await?;
    ensure!(a2.log()?.contains("going on with a certificate that has ended"));

    // It joins when there is somebody to join: it tries, looks at its files and connects with pauses of up to 30 s.
    mesh.start_control().await?;
    eventually("the proxy to join", 4 * SOON, || async {
        let said = mesh.proxies().await?;
        ensure!(
            said.proxies.iter().any(|p| p.name == "a2" && p.connected),
            "{said:?}"
        );
        Ok(())
    })
    .await?;
    ensure!(Identity::load(&id_dir)?.ready_now().is_ok());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_joins_and_renews() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").authority().start().await?;
    let made = leeward(&mesh, &["token", "create", "--user", "bob"]).await?;
    let out = mesh.identity("bob");
    let dir = text(&out);
    let join = [
        "identity",
        "join",
        "--user",
        "bob",
        "--token",
        made.trim(),
        "--out",
        dir.as_str(),
    ];
    // What gets no answer is asked again with the same key.
    let nowhere = leeward_testkit::Port::reserve()?.address().to_string();
    let late = [&join[..], &["--control", nowhere.as_str()][..]].concat();
    ensure!(leeward(&mesh, &late).await.is_err(), "bob has joined nobody");
    let key = std::fs::read(out.join("joining-key.pem"))?;
    leeward(&mesh, &join).await?;
    ensure!(std::fs::read(out.join("key.pem"))? == key && !out.join("joining-key.pem").exists());
    let first = Identity::load(&out)?.facts();
    leeward(&mesh, &["identity", "renew", "--identity", &dir]).await?;
    let next = Identity::load(&out)?.facts();
    ensure!(first.certificate != next.certificate);
    leeward(&mesh, &["proxies", "--identity", &dir]).await?;
    Ok(())
}

/// A fresh connection from one node's files to another's inbound listener, both as they are now.
async fn shake(mesh: &Mesh, from: &str, zone: &str, to: &str) -> anyhow::Result<()> {
    let identity = Identity::load(mesh.identity(from))?;
    let config = identity.client_config(&[b"h2"], &SpiffeId::proxy(DOMAIN, zone, to)?)?;
    let inbound = mesh.node(to)?.inbound;
    let stream = tokio::net::TcpStream::connect(inbound).await?;
    let tls = tokio_rustls::TlsConnector::from(config).connect(inbound.ip().into(), stream);
    let mut tls = tls.await?;
    // In TLS 1.3 a client hears that it was refused when it first reads: here HTTP/2's settings.
    tokio::io::AsyncWriteExt::write_all(&mut tls, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await?;
    tokio::io::AsyncReadExt::read_u8(&mut tls).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_root_is_replaced_under_load_without_a_failed_request() -> anyhow::Result<()> {
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "b1")
        .authority()
        .start()
        .await?;
    let backend = Backend::start("app")?;
    let policy = service("app", &[(backend.address(), "b", "b1")], EACH_A_HANDSHAKE)
        + &route("app", "app.example", "app", &[]);
    let revision = mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    let host = ("app.example", "/");
    let loads = [
        Load::start(outbound, Protocol::Http1, host, 4, Duration::from_millis(5)),
        Load::start_fresh(outbound, Protocol::Http1, host, 2, Duration::from_millis(20)),
    ];
    let old = mesh.root()?.fingerprint().to_owned();

    let refused = leeward(&mesh, &["ca", "rotate", "activate"]).await;
    ensure!(refused.is_err_and(|error| error.to_string().contains("prepare first")));
    let root = text(&mesh.dir().join("new-root"));
    leeward(&mesh, &["ca", "init", &root, "--trust-domain", DOMAIN]).await?;
    let next = text(&mesh.authority().join("next"));
    leeward(&mesh, &["ca", "intermediate", "--root", &root, "--out", &next]).await?;
    let new = Authority::open(Path::new(&root))?.fingerprint().to_owned();

    leeward(&mesh, &["ca", "rotate", "prepare"]).await?;
    shake(&mesh, "a1", "b", "b1").await.context("prepared")?;
    // Whatever happens to the control plane in between, it goes on from there; of proxies whose certificates came from files it
    // knows once they are back.
    mesh.kill_control()?;
    mesh.start_control().await?;
    mesh.converge(revision).await?;
    // The gate opens when both have the new root.
    eventually("the proxies to trust the new root", SOON, || async {
        leeward(&mesh, &["ca", "rotate", "activate"]).await.map(|_| ())
    })
    .await?;
    for name in ["a1", "b1"] {
        ensure!(
            Identity::load(mesh.identity(name))?.bundle().has(&new),
            "{name} was not ready"
        );
    }
    mesh.kill_control()?;
    mesh.start_control().await?;
    mesh.converge(revision).await?;
    // The user's own, while the old root is still good for it.
    let refused = leeward(&mesh, &["ca", "rotate", "retire"]).await;
    ensure!(refused.is_err_and(|error| error.to_string().contains("leeward identity renew first")));
    leeward(&mesh, &["identity", "renew"]).await?;
    // Proxies spread over a tenth of a certificate's life, 30 s here.
    eventually("the old root to be out of use", 3 * SOON, || async {
        shake(&mesh, "a1", "b", "b1").await?;
        leeward(&mesh, &["ca", "rotate", "retire"]).await.map(|_| ())
    })
    .await?;
    // The gate was shut for as long as one had a certificate of the old root.
    for name in ["a1", "b1"] {
        let root = Identity::load(mesh.identity(name))?.facts().root;
        ensure!(root.as_deref() == Some(new.as_str()), "{name}");
    }
    eventually("the proxies to trust the old root no more", SOON, || async {
        for name in ["a1", "b1"] {
            ensure!(!Identity::load(mesh.identity(name))?.bundle().has(&old), "{name}");
        }
        Ok(())
    })
    .await?;
    for node in ["a1", "b1"] {
        ensure!(
            mesh.node(node)?
                .metric("leeward_identity_renewals_total", &["renewed"])
                .await?
                >= 1.0
        );
    }
    shake(&mesh, "a1", "b", "b1").await.context("retired")?;
    // And policy arrives.
    let user = Identity::load(mesh.identity("user"))?;
    let mut api = v1::policy_service_client::PolicyServiceClient::new(channel::connect_lazy(
        user,
        mesh.control_address(),
    ));
    let said = api.list_proxies(v1::ListProxiesRequest {}).await?.into_inner();
    ensure!(said.proxies.iter().all(|proxy| proxy.connected), "{said:?}");
    for load in loads {
        let tally = load.stop().await;
        ensure!(tally.failed == 0 && tally.served > 100, "{tally:?}");
    }
    Ok(())
}

/// A control plane in this process, whose certificates last for less than an operator can ask for.
struct Short {
    dir: TempDir,
    control: SocketAddr,
    _stop: tokio_util::sync::DropGuard,
}

impl Short {
    async fn start(life: Duration) -> anyhow::Result<Self> {
        let dir = TempDir::new()?;
        let root = Authority::create(&dir.path().join("ca"), DOMAIN)?;
        let authority = dir.path().join("authority");
        root.intermediate(DAY, &authority)?;
        let mut files = Files::open(&authority, life)?;
        let identity = files.identity(&dir.path().join("control"))?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let control = listener.local_addr()?;
        let stop = CancellationToken::new();
        let store = Store::open(Kv::sqlite(&dir.path().join("store"))?, Options::default()).await?;
        let policy = Policy::open(store).await?;
        let server = Server {
            listener,
            admin: None,
            identity,
            ca: Some(files),
            backups: Backups::open(policy.clone(), BackupSettings::default())?,
            policy,
            oidc: None,
            registry_auth: None,
            timing: Timing::DEFAULT,
        };
        tokio::spawn(serve(server, stop.clone()));
        root.issue(&SpiffeId::user(DOMAIN, "test")?, DAY, &dir.path().join("user"))?;
        Ok(Self {
            dir,
            control,
            _stop: stop.drop_guard(),
        })
    }

    /// A proxy whose first certificate is in files, and lasts for `life`.
    async fn node(&self, zone: &str, name: &str, life: Duration) -> anyhow::Result<Process> {
        let dir = self.dir.path().join(name);
        let root = Authority::open(&self.dir.path().join("ca"))?;
        root.issue(&SpiffeId::proxy(DOMAIN, zone, name)?, life, &dir)?;
        let flags = [("--identity", &*text(&dir))];
        proxy(self.dir.path(), self.control, (zone, name), &flags).await
    }

    async fn apply(&self, manifests: &str) -> anyhow::Result<()> {
        let user = Identity::load(self.dir.path().join("user"))?;
        let mut api =
            v1::policy_service_client::PolicyServiceClient::new(channel::connect_lazy(user, self.control));
        let resources = match manifest::parse("test", manifests) {
            Ok(resources) => resources,
            Err(errors) => bail!("{}", errors.iter().map(|e| format!("{e}\n")).collect::<String>()),
        };
        let dry_run = false;
        api.apply(v1::ApplyRequest {
            resources,
            dry_run,
            ..v1::ApplyRequest::default()
        })
        .await?;
        Ok(())
    }

    fn zone(name: &str, proxy: &str, inbound: SocketAddr) -> String {
        format!(
            "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {name}}}\nspec: {{proxies: [{{name: {proxy}, \
             address: \"{inbound}\"}}]}}\n"
        )
    }
}

async fn renewals(admin: SocketAddr) -> anyhow::Result<u64> {
    let reply = Client::new(admin, Protocol::Http1)
        .get("admin", "/metrics")
        .await?;
    let text = reply.text();
    let line = text
        .lines()
        .find(|line| line.starts_with("leeward_identity_renewals_total{outcome=\"renewed\"}"));
    let value = line.and_then(|line| line.rsplit(' ').next()).unwrap_or("0");
    ensure!(
        text.contains("leeward_identity_expiry_seconds "),
        "no expiry in {text}"
    );
    Ok(value.parse::<u64>()?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_renewed_at_half_life_without_a_failed_request() -> anyhow::Result<()> {
    let life = Duration::from_secs(12);
    let mesh = Short::start(life).await?;
    let (a1, b1) = (
        mesh.node("a", "a1", life).await?,
        mesh.node("b", "b1", life).await?,
    );
    let backend = Backend::start("app")?;
    let policy = Short::zone("a", "a1", a1.address("inbound")?)
        + &Short::zone("b", "b1", b1.address("inbound")?)
        + &service("app", &[(backend.address(), "b", "b1")], EACH_A_HANDSHAKE)
        + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    ready(a1.address("admin")?).await?;
    ready(b1.address("admin")?).await?;
    let key = |name: &str| std::fs::read(mesh.dir.path().join(name).join("key.pem"));
    let first = (key("a1")?, identity_of(a1.address("admin")?).await?);
    let client = Client::new(a1.address("outbound")?, Protocol::Http1);
    eventually("the policy", SOON, || async {
        let reply = client.get("app.example", "/").await?;
        ensure!(reply.status == 200, "{}", reply.status);
        Ok(())
    })
    .await?;
    let host = ("app.example", "/");
    let load = Load::start(
        a1.address("outbound")?,
        Protocol::Http1,
        host,
        4,
        Duration::from_millis(5),
    );
    eventually("three renewals of each", 3 * SOON, || async {
        for proxy in [&a1, &b1] {
            let renewed = renewals(proxy.address("admin")?).await?;
            ensure!(renewed >= 3, "{renewed}");
        }
        Ok(())
    })
    .await?;
    let tally = load.stop().await;
    ensure!(tally.failed == 0 && tally.served > 100, "{tally:?}");
    ensure!(first.0 != key("a1")?, "the key is new for each certificate");
    ensure!(first.1 != identity_of(a1.address("admin")?).await?);
    // The first certificates have long ended; what is made now is made with the last.
    let identity = Identity::load(mesh.dir.path().join("a1"))?;
    ensure!(identity.ready_now().is_ok());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_has_ended_is_named_and_nobody_else_is_blamed() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let backend = Backend::start("app")?;
    let policy =
        service("app", &[(backend.address(), "b", "b1")], &[]) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    let id = SpiffeId::proxy(DOMAIN, "a", "a1")?;
    mesh.root()?
        .issue(&id, Duration::from_secs(2), &mesh.identity("a1"))?;
    let admin = Client::new(mesh.node("a1")?.admin, Protocol::Http1);
    eventually(
        "the proxy to know that its certificate has ended",
        SOON,
        || async {
            let reply = admin.get("admin", "/readyz").await?;
            ensure!(
                reply.status == 503 && reply.text().contains("identity_not_ready"),
                "{}",
                reply.text()
            );
            Ok(())
        },
    )
    .await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let reply = client.get("app.example", "/").await?;
    ensure!(reply.status == 503, "{}", reply.status);
    ensure!(
        reply.header("leeward-reason") == "identity_not_ready",
        "{:?}",
        reply.header("leeward-reason")
    );
    // Whoever it shows itself to says whose it is.
    let expired = Identity::load(mesh.identity("a1"))?;
    let mut push = v1::push_service_client::PushServiceClient::new(channel::connect_lazy(
        expired,
        mesh.control_address(),
    ));
    let refused = push.subscribe(tokio_stream::pending::<v1::ProxyMessage>()).await;
    ensure!(refused.is_err());
    let log = mesh.control_log()?;
    ensure!(
        log.contains("claims=spiffe://leeward.test/zone/a/proxy/a1") && log.contains("certificate expired"),
        "{log}"
    );
    // With another everything goes on, at once: no endpoint was held to account.
    mesh.root()?.issue(&id, DAY, &mesh.identity("a1"))?;
    mesh.node("a1")?.wait_ready().await?;
    let reply = client.get("app.example", "/").await?;
    ensure!(
        reply.status == 200,
        "{} {}",
        reply.status,
        reply.header("leeward-reason")
    );
    Ok(())
}

type Outgoing<T> = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

/// An agent of the SPIFFE Workload API that says whatever it was given last.
struct Agent {
    said: watch::Receiver<spiffe::X509svidResponse>,
}

#[tonic::async_trait]
impl spiffe::spiffe_workload_api_server::SpiffeWorkloadApi for Agent {
    type FetchX509SVIDStream = Outgoing<spiffe::X509svidResponse>;
    type FetchX509BundlesStream = Outgoing<spiffe::X509BundlesResponse>;
    type FetchJWTBundlesStream = Outgoing<spiffe::JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<spiffe::X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let header = request.metadata().get("workload.spiffe.io");
        if header.is_none_or(|value| value != "true") {
            return Err(Status::invalid_argument("no workload.spiffe.io: true"));
        }
        let said = WatchStream::new(self.said.clone()).map(Ok);
        Ok(Response::new(Box::pin(said)))
    }

    async fn fetch_x509_bundles(
        &self,
        _: Request<spiffe::X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fetch_jwtsvid(
        &self,
        _: Request<spiffe::JwtsvidRequest>,
    ) -> Result<Response<spiffe::JwtsvidResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fetch_jwt_bundles(
        &self,
        _: Request<spiffe::JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn validate_jwtsvid(
        &self,
        _: Request<spiffe::ValidateJwtsvidRequest>,
    ) -> Result<Response<spiffe::ValidateJwtsvidResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

fn agent(
    socket: &Path,
    said: &watch::Sender<spiffe::X509svidResponse>,
) -> anyhow::Result<tokio::task::JoinHandle<()>> {
    drop(std::fs::remove_file(socket));
    let listener = UnixListener::bind(socket)?;
    let agent = Agent {
        said: said.subscribe(),
    };
    let service = spiffe::spiffe_workload_api_server::SpiffeWorkloadApiServer::new(agent);
    Ok(tokio::spawn(async move {
        let serving = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(UnixListenerStream::new(listener));
        drop(serving.await);
    }))
}

/// What an agent says of one identity that was issued to a directory.
fn svid(dir: PathBuf) -> anyhow::Result<spiffe::X509svidResponse> {
    let der = |file: &str| -> anyhow::Result<Vec<u8>> {
        let text = std::fs::read(dir.join(file))?;
        let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
        Ok(certs?.iter().flat_map(|cert| cert.to_vec()).collect())
    };
    let key = PrivatePkcs8KeyDer::from_pem_slice(&std::fs::read(dir.join("key.pem"))?)?;
    let other = spiffe::X509svid {
        spiffe_id: "spiffe://leeward.test/something/else".to_owned(),
        ..spiffe::X509svid::default()
    };
    let ours = spiffe::X509svid {
        spiffe_id: Identity::load(&dir)?.id().to_string(),
        x509_svid: der("cert.pem")?,
        x509_svid_key: key.secret_pkcs8_der().to_vec(),
        bundle: der("bundle.pem")?,
        ..spiffe::X509svid::default()
    };
    Ok(spiffe::X509svidResponse {
        svids: vec![other, ours],
        ..spiffe::X509svidResponse::default()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_on_the_node_gives_a_proxy_its_certificates() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let root = mesh.root()?;
    let issue = |n: u32| -> anyhow::Result<spiffe::X509svidResponse> {
        let dir = mesh.dir().join(format!("svid-{n}"));
        root.issue(&SpiffeId::proxy(DOMAIN, "a", "a2")?, DAY, &dir)?;
        svid(dir)
    };
    let socket = mesh.dir().join("agent.sock");
    let at = format!("unix:{}", socket.display());
    // Nobody there: it says so, and ends in time.
    let flags = [("--identity", at.as_str()), ("--identity-timeout", "1s")];
    let late = proxy(mesh.dir(), mesh.control_address(), ("a", "a2"), &flags).await;
    let late = late.err().context("it has an identity from nowhere")?.to_string();
    ensure!(
        late.contains("identity_not_ready") && late.contains("gave no certificate within 1s"),
        "{late}"
    );

    let (said, _) = watch::channel(issue(1)?);
    let serving = agent(&socket, &said)?;
    let flags = [("--identity", at.as_str())];
    let a2 = proxy(mesh.dir(), mesh.control_address(), ("a", "a2"), &flags).await?;
    let admin = a2.address("admin")?;
    ready(admin).await?;
    let first = identity_of(admin).await?;
    ensure!(first["id"] == "spiffe://leeward.test/zone/a/proxy/a2", "{first}");
    let changed = |from: serde_json::Value| async move {
        eventually("another certificate", SOON, || async {
            let now = identity_of(admin).await?;
            ensure!(now["certificate"] != from["certificate"]);
            Ok(now)
        })
        .await
    };
    said.send_replace(issue(2)?);
    let second = changed(first).await?;
    // The agent goes away and comes back with the next.
    serving.abort();
    drop(serving.await);
    said.send_replace(issue(3)?);
    let _serving = agent(&socket, &said)?;
    changed(second).await?;
    ready(admin).await
}

//! `leeward-control`: the control plane.

use anyhow::Context;
use clap::{Args, Parser, ValueEnum};
use leeward_control::ca::Files;
use leeward_control::kv::{EtcdSettings, Kv, KvError};
use leeward_control::push::Timing;
use leeward_control::store::{Bounds, Options, Store, StoreError};
use leeward_control::{OidcSettings, Policy, Server, serve};
use leeward_identity::{Identity, watch};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Leeward's control plane: keeps policy, serves its API, pushes it to proxies.
#[derive(Debug, Parser)]
#[command(name = "leeward-control", version)]
struct Settings {
    /// Where to serve gRPC, with mutual TLS.
    #[arg(
        long,
        env = "LEEWARD_LISTEN",
        default_value = "127.0.0.1:15010",
        value_name = "IP:PORT"
    )]
    listen: SocketAddr,
    /// The directory of the store.
    #[arg(long, env = "LEEWARD_DATA", value_name = "DIR")]
    data: PathBuf,
    /// The directory with cert.pem, key.pem and bundle.pem. With --ca they are made there; identity/ in the directory of
    /// --data if not given.
    #[arg(
        long,
        env = "LEEWARD_IDENTITY",
        value_name = "DIR",
        required_unless_present = "ca"
    )]
    identity: Option<PathBuf>,
    /// The directory of a certificate authority, as `leeward ca intermediate` makes it: the control plane issues the
    /// mesh's certificates, and its own. Without it certificates come from somewhere else.
    #[arg(long, env = "LEEWARD_CA", value_name = "DIR")]
    ca: Option<PathBuf>,
    /// How long the certificates last that it issues, 5m to 168h.
    #[arg(long, env = "LEEWARD_CERTIFICATE_LIFE", default_value = "1h", value_name = "DURATION", value_parser = life)]
    certificate_life: Duration,
    /// Where policy is kept: in a file in the directory of --data, for one control plane, or in etcd, for several.
    #[arg(long, env = "LEEWARD_STORE", value_enum, default_value_t = StoreKind::Sqlite)]
    store: StoreKind,
    #[command(flatten)]
    etcd: EtcdFlags,
    /// Where other control planes find this one, as NAME:PORT or IP:PORT; the address of --listen if not given.
    #[arg(long, env = "LEEWARD_ADVERTISE", value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Where to answer /livez, /readyz and /metrics; nowhere if not given.
    #[arg(long, env = "LEEWARD_ADMIN", value_name = "IP:PORT")]
    admin: Option<SocketAddr>,
    /// Write the bound addresses here, as JSON, once everything listens.
    #[arg(long, env = "LEEWARD_ADDRESSES_FILE", value_name = "FILE")]
    addresses_file: Option<PathBuf>,
    /// A file of passwords for OCI registries, as Docker's config.json; read whenever an image is fetched. Credential
    /// helpers that it names are not run.
    #[arg(long, env = "LEEWARD_REGISTRY_AUTH", value_name = "FILE")]
    registry_auth: Option<PathBuf>,
    /// What plugins' modules may take together on disk.
    #[arg(long, env = "LEEWARD_PLUGIN_STORE", default_value = "2GiB", value_name = "SIZE", value_parser = size)]
    plugin_store: u64,
    #[command(flatten)]
    oidc: OidcFlags,
    /// What to log, such as info or leeward_control=debug.
    #[arg(long, env = "LEEWARD_LOG", default_value = "info")]
    log: String,
}

/// Where policy is kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum StoreKind {
    /// In one file.
    Sqlite,
    /// In a cluster.
    Etcd,
}

#[derive(Clone, Debug, Args)]
struct EtcdFlags {
    /// The members of etcd, as https://HOST:PORT; http only on this host.
    #[arg(
        long,
        env = "LEEWARD_ETCD_ENDPOINTS",
        value_name = "URL,…",
        value_delimiter = ',',
        required_if_eq("store", "etcd")
    )]
    etcd_endpoints: Vec<String>,
    /// What all keys in etcd begin with: meshes that share a cluster have one each.
    #[arg(
        long,
        env = "LEEWARD_ETCD_PREFIX",
        value_name = "PREFIX",
        default_value = "/leeward/"
    )]
    etcd_prefix: String,
    /// A file with the certificates, as PEM, that those of etcd's members lead to.
    #[arg(long, env = "LEEWARD_ETCD_CA", value_name = "FILE")]
    etcd_ca: Option<PathBuf>,
    /// A file with the certificate, as PEM, that etcd knows this control plane by.
    #[arg(long, env = "LEEWARD_ETCD_CERT", value_name = "FILE", requires = "etcd_key")]
    etcd_cert: Option<PathBuf>,
    /// A file with its key, as PEM.
    #[arg(long, env = "LEEWARD_ETCD_KEY", value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
    /// Allow http to members on other hosts: whoever is on the way reads and changes policy.
    #[arg(long, env = "LEEWARD_ETCD_DANGER_PLAINTEXT")]
    etcd_danger_plaintext: bool,
}

#[derive(Clone, Debug, Args)]
struct OidcFlags {
    /// Let users come with tokens of this OpenID Connect issuer, in place of certificates: its https URL, as it stands in the
    /// claim iss. What they may do, AccessPolicies say.
    #[arg(
        long,
        env = "LEEWARD_OIDC_ISSUER",
        value_name = "URL",
        requires = "oidc_audience"
    )]
    oidc_issuer: Option<String>,
    /// What must be in the claim aud.
    #[arg(
        long,
        env = "LEEWARD_OIDC_AUDIENCE",
        value_name = "NAME",
        requires = "oidc_issuer"
    )]
    oidc_audience: Option<String>,
    /// The claim that names the user; a JSON pointer where it begins with a slash.
    #[arg(
        long,
        env = "LEEWARD_OIDC_USER_CLAIM",
        value_name = "CLAIM",
        default_value = "sub"
    )]
    oidc_user_claim: String,
    /// The claim with the user's groups, likewise.
    #[arg(
        long,
        env = "LEEWARD_OIDC_GROUPS_CLAIM",
        value_name = "CLAIM",
        default_value = "groups"
    )]
    oidc_groups_claim: String,
}

impl OidcFlags {
    fn settings(self) -> anyhow::Result<Option<OidcSettings>> {
        let (Some(issuer), Some(audience)) = (self.oidc_issuer, self.oidc_audience) else {
            return Ok(None);
        };
        anyhow::ensure!(
            issuer.starts_with("https://")
                || issuer.starts_with("http://127.0.0.1:")
                || issuer.starts_with("http://[::1]:"),
            "--oidc-issuer {issuer:?} is no https URL"
        );
        Ok(Some(OidcSettings {
            issuer,
            audience,
            user_claim: self.oidc_user_claim,
            groups_claim: self.oidc_groups_claim,
        }))
    }
}

fn size(text: &str) -> Result<u64, String> {
    leeward_proto::manifest::parse_size(text).ok_or_else(|| "want a size such as 2GiB, or bytes".to_owned())
}

/// The shortest and the longest life of a certificate.
const LIVES: (Duration, Duration) = (Duration::from_secs(300), Duration::from_secs(7 * 24 * 3600));

fn life(text: &str) -> Result<Duration, String> {
    leeward_proto::manifest::parse_duration(text)
        .filter(|life| (LIVES.0..=LIVES.1).contains(life))
        .ok_or_else(|| "want a duration of 5m to 168h, such as 1h or 24h".to_owned())
}

fn main() -> ExitCode {
    let settings = Settings::parse();
    leeward_telemetry::init_logs(leeward_telemetry::Format::Text, &settings.log);
    match run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(settings: Settings) -> anyhow::Result<()> {
    let own = settings
        .identity
        .clone()
        .unwrap_or_else(|| settings.data.join("identity"));
    let (identity, ca) = match &settings.ca {
        None => (Identity::load(own)?, None),
        Some(dir) => {
            let mut files = Files::open(dir, settings.certificate_life)?;
            (files.identity(&own)?, Some(files))
        }
    };
    raise_file_limit();
    let store = open_store(&settings).await?;
    let policy = Policy::open(store).await?;
    let listener = listen(settings.listen).with_context(|| format!("can't listen on {}", settings.listen))?;
    let admin = match settings.admin {
        Some(address) => Some(
            TcpListener::bind(address)
                .await
                .with_context(|| format!("can't listen on {address}"))?,
        ),
        None => None,
    };
    if let Some(file) = &settings.addresses_file {
        let admin = admin.as_ref().map(|l| l.local_addr()).transpose()?;
        write_addresses(file, listener.local_addr()?, admin)?;
    }
    let advertise = match settings.advertise {
        Some(advertise) => advertise,
        None => listener.local_addr()?.to_string(),
    };
    policy.store().register(advertise);
    tracing::info!(listen = %listener.local_addr()?, id = %identity.id(), revision = policy.revision(), "control plane is up");
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopping.cancel();
    });
    tokio::spawn(watch(Arc::clone(&identity), Duration::from_secs(5)));
    let server = Server {
        listener,
        admin,
        identity,
        ca,
        policy,
        oidc: settings.oidc.settings()?,
        registry_auth: settings.registry_auth,
        timing: Timing::DEFAULT,
    };
    Box::pin(serve(server, stop)).await?;
    tracing::info!("control plane is down");
    Ok(())
}

/// Connections that wait to be accepted; the system may allow fewer (net.core.somaxconn, 4096 by default). After a restart all
/// proxies come within moments, and whoever finds no room tries again only after a second.
const BACKLOG: u32 = 4096;

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // As `TcpListener::bind` does: connections of a predecessor that linger are in nobody's way.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// How long a predecessor that is on its way out may hold the store.
const HANDOVER: Duration = Duration::from_secs(10);

/// Pause between two tries to open a store that is not there yet; a random part of it.
const AGAIN: Duration = Duration::from_secs(2);

async fn open_store(settings: &Settings) -> Result<Store, StoreError> {
    let deadline = tokio::time::Instant::now() + HANDOVER;
    loop {
        match try_open(settings).await {
            Err(StoreError::Kv(KvError::InUse { path })) if tokio::time::Instant::now() < deadline => {
                tracing::warn!(path = %path.display(), "another control plane has the store; waiting for it to end");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(StoreError::Kv(error @ (KvError::Unavailable { .. } | KvError::Unknown { .. })))
                if settings.store == StoreKind::Etcd =>
            {
                tracing::warn!(%error, "the store is not there yet; trying again");
                tokio::time::sleep(AGAIN.mul_f64(0.5 + 0.5 * fastrand::f64())).await;
            }
            opened => return opened,
        }
    }
}

async fn try_open(settings: &Settings) -> Result<Store, StoreError> {
    let kv = match settings.store {
        StoreKind::Sqlite => Kv::sqlite(&settings.data)?,
        StoreKind::Etcd => {
            let etcd = settings.etcd.clone();
            Kv::etcd(EtcdSettings {
                endpoints: etcd.etcd_endpoints,
                prefix: etcd.etcd_prefix,
                ca: etcd.etcd_ca,
                identity: etcd.etcd_cert.zip(etcd.etcd_key),
                allow_plaintext: etcd.etcd_danger_plaintext,
            })?
        }
    };
    let options = Options {
        bounds: Bounds {
            modules: settings.plugin_store,
            ..Bounds::DEFAULT
        },
        ..Options::default()
    };
    Store::open(kv, options).await
}

/// One connection for each proxy: the usual soft limit of 1024 files would be the end of a large mesh.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, current = limit.current, "can't raise the limit of open files");
    }
}

fn write_addresses(file: &Path, listen: SocketAddr, admin: Option<SocketAddr>) -> anyhow::Result<()> {
    let admin = admin.map(|a| format!(",\"admin\":\"{a}\"")).unwrap_or_default();
    let beside = file.with_extension("tmp");
    std::fs::write(&beside, format!("{{\"listen\":\"{listen}\"{admin}}}\n"))
        .and_then(|()| std::fs::rename(&beside, file))
        .with_context(|| format!("can't write {}", file.display()))
}

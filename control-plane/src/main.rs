//! `leeward-control`: the control plane.

use anyhow::Context;
use clap::{Args, Parser, ValueEnum};
use leeward_control::backup::command::{self, Backup, Drill, Told};
use leeward_control::backup::{BackupSettings, Backups, Lead, Standby, StandbySettings, refuse_unfinished};
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
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Leeward's control plane: keeps policy, serves its API, pushes it to proxies.
#[derive(Debug, Parser)]
#[command(
    name = "leeward-control",
    version,
    after_help = "What is done beside serving: leeward-control backup list|verify|restore, leeward-control drill restore."
)]
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
    /// A place for backups, by the name that BackupPolicies call it: NAME=URL, where the URL is a directory, file:///DIR or
    /// s3://BUCKET/PREFIX?region=…&endpoint=…&credentials=FILE. May be given several times.
    #[arg(long, env = "LEEWARD_BACKUP_PLACES", value_name = "NAME=URL", value_delimiter = ' ', value_parser = place)]
    backup_place: Vec<(String, String)>,
    /// A file of age identities with which encrypted backups are opened when they are verified. Without it only their
    /// hashes are compared.
    #[arg(long, env = "LEEWARD_BACKUP_IDENTITY", value_name = "FILE")]
    backup_identity: Option<PathBuf>,
    /// Take writes only while this control plane holds the epoch there, as a URL of --backup-place: for one that has a standby.
    #[arg(
        long,
        env = "LEEWARD_EPOCH",
        value_name = "URL",
        conflicts_with = "standby_of"
    )]
    epoch: Option<String>,
    /// How long an epoch holds without a word from its holder, 3s to 5m. The same for all.
    #[arg(long, env = "LEEWARD_EPOCH_TTL", default_value = "15s", value_name = "DURATION", value_parser = epoch_ttl)]
    epoch_ttl: Duration,
    /// Follow the control plane that backs up there, and take its place when told to.
    #[arg(long, env = "LEEWARD_STANDBY_OF", value_name = "URL")]
    standby_of: Option<String>,
    /// Take its place without being told once nobody has held the epoch for so long.
    #[arg(long, env = "LEEWARD_PROMOTE_AFTER", value_name = "DURATION", value_parser = pause, requires = "standby_of")]
    promote_after: Option<Duration>,
    /// What to log, such as info or leeward_control=debug.
    #[arg(long, env = "LEEWARD_LOG", default_value = "info")]
    log: String,
}

/// What is done beside serving; it takes no settings of serving.
#[derive(Debug, Parser)]
#[command(name = "leeward-control", version)]
enum Beside {
    /// Show, verify and restore backups where they are: no control plane is needed.
    #[command(subcommand)]
    Backup(Backup),
    /// Practise, and measure.
    #[command(subcommand)]
    Drill(Drill),
}

/// The cluster that LEEWARD_ETCD_ENDPOINTS and the other variables of --etcd-... name.
#[derive(Debug, Parser)]
struct EtcdOnly {
    #[arg(long, value_enum, default_value_t = StoreKind::Etcd)]
    store: StoreKind,
    #[command(flatten)]
    etcd: EtcdFlags,
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
    fn settings(&self) -> anyhow::Result<Option<OidcSettings>> {
        let (Some(issuer), Some(audience)) = (self.oidc_issuer.clone(), self.oidc_audience.clone()) else {
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
            user_claim: self.oidc_user_claim.clone(),
            groups_claim: self.oidc_groups_claim.clone(),
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

fn epoch_ttl(text: &str) -> Result<Duration, String> {
    leeward_proto::manifest::parse_duration(text)
        .filter(|ttl| (Duration::from_secs(3)..=Duration::from_secs(300)).contains(ttl))
        .ok_or_else(|| "want a duration of 3s to 5m, such as 15s".to_owned())
}

fn pause(text: &str) -> Result<Duration, String> {
    leeward_proto::manifest::parse_duration(text).ok_or_else(|| "want a duration such as 1m".to_owned())
}

fn place(text: &str) -> Result<(String, String), String> {
    let (name, url) = text
        .split_once('=')
        .ok_or_else(|| "want NAME=URL, such as main=/var/backups/leeward".to_owned())?;
    let name = leeward_policy::Name::parse(name).map_err(|error| format!("{name:?} {error}"))?;
    Ok((name.to_string(), url.to_owned()))
}

fn main() -> ExitCode {
    // By the word itself: variables that settings are taken from must not stand in the way.
    if std::env::args()
        .nth(1)
        .is_some_and(|word| word == "backup" || word == "drill")
    {
        let command = Beside::parse();
        leeward_telemetry::init_logs(leeward_telemetry::Format::Text, "error");
        return beside(command);
    }
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

/// Does what is done beside serving. 1: it failed, or what was measured is not what was wanted.
#[tokio::main]
async fn beside(command: Beside) -> ExitCode {
    use std::io::Write as _;
    let done = match command {
        Beside::Backup(command) => Box::pin(command::backup(command, etcd_of_environment)).await,
        Beside::Drill(command) => Box::pin(command::drill(command)).await,
    };
    match done {
        Ok(Told { text, good }) => {
            // That nobody reads it is no failure.
            let _ = write!(std::io::stdout(), "{text}");
            if good {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "leeward-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(mut settings: Settings) -> anyhow::Result<()> {
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
    anyhow::ensure!(
        settings.store == StoreKind::Sqlite || (settings.epoch.is_none() && settings.standby_of.is_none()),
        "--epoch and --standby-of are for stores in files: control planes that share etcd stand in for each other"
    );
    let oidc = settings.oidc.settings()?;
    raise_file_limit();
    let stop = stopped_by_signals()?;
    if let Some(place) = &settings.standby_of
        && Standby::has_taken_over(place, &settings.data).await?
    {
        tracing::info!("this store has taken over from the one that it followed; it leads on");
        settings.epoch = settings.standby_of.take();
    }
    let (store, mut lead) = if settings.standby_of.is_some() {
        match Box::pin(stand_by(&mut settings, Arc::clone(&identity), &stop)).await? {
            Some((store, lead)) => (store, Some(lead)),
            None => return Ok(()),
        }
    } else {
        (open_store(&settings).await?, None)
    };
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
    if let (None, Some(place)) = (&lead, &settings.epoch) {
        let primary = Lead::primary(place, policy.store().id(), &advertise, settings.epoch_ttl)?;
        primary.guard(policy.store().kv());
        lead = Some(Leading::begin(primary, &stop));
    }
    policy.store().register(advertise);
    tracing::info!(listen = %listener.local_addr()?, id = %identity.id(), revision = policy.revision(), "control plane is up");
    tokio::spawn(watch(Arc::clone(&identity), Duration::from_secs(5)));
    let backups = BackupSettings {
        places: settings.backup_place.into_iter().collect(),
        identity: settings.backup_identity,
        authority: settings.ca,
        scratch: settings.data,
        lead: lead.as_ref().map(|leading| leading.lead.clone()),
    };
    let backups = Backups::open(policy.clone(), backups)?;
    let server = Server {
        listener,
        admin,
        identity,
        ca,
        policy,
        oidc,
        registry_auth: settings.registry_auth,
        backups,
        timing: Timing::DEFAULT,
    };
    Box::pin(serve(server, stop.clone())).await?;
    if let Some(leading) = lead {
        leading.end().await;
    }
    tracing::info!("control plane is down");
    Ok(())
}

fn stopped_by_signals() -> anyhow::Result<CancellationToken> {
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
    Ok(stop)
}

/// An epoch that is held, or asked for.
struct Leading {
    lead: Lead,
    task: JoinHandle<()>,
}

impl Leading {
    fn begin(lead: Lead, stop: &CancellationToken) -> Self {
        let task = tokio::spawn(lead.clone().run(stop.clone()));
        Self { lead, task }
    }

    /// Waits until it is given back, so that another can lead at once; not for long.
    async fn end(self) {
        drop(tokio::time::timeout(GIVING_BACK, self.task).await);
    }
}

/// How long giving an epoch back may take.
const GIVING_BACK: Duration = Duration::from_secs(5);

/// Follows another control plane, and serves what can be served meanwhile: reads, and the push. Returns once this one leads, with
/// its store, or `None` when it is stopped.
async fn stand_by(
    settings: &mut Settings,
    identity: Arc<Identity>,
    stop: &CancellationToken,
) -> anyhow::Result<Option<(Store, Leading)>> {
    let Some(place) = settings.standby_of.clone() else {
        return Ok(None);
    };
    let listener = listen(settings.listen).with_context(|| format!("can't listen on {}", settings.listen))?;
    settings.listen = listener.local_addr()?;
    let admin = match settings.admin {
        Some(address) => {
            let listener = TcpListener::bind(address)
                .await
                .with_context(|| format!("can't listen on {address}"))?;
            settings.admin = Some(listener.local_addr()?);
            Some(listener)
        }
        None => None,
    };
    let advertise = settings.advertise.clone();
    let standby = StandbySettings {
        place,
        identity: settings.backup_identity.clone(),
        address: advertise.unwrap_or_else(|| settings.listen.to_string()),
        ttl: settings.epoch_ttl,
        promote_after: settings.promote_after,
    };
    let standby = Standby::prepare(standby, &settings.data).await?;
    let leading = Leading::begin(standby.lead(), stop);
    let kv = standby.open().await?;
    let store = Store::open(kv.clone(), options(settings)).await?;
    let policy = Policy::open(store).await?;
    let backups = BackupSettings {
        scratch: settings.data.clone(),
        lead: Some(standby.lead()),
        ..BackupSettings::default()
    };
    let backups = Backups::open(policy.clone(), backups)?;
    if let Some(file) = &settings.addresses_file {
        write_addresses(file, settings.listen, settings.admin)?;
    }
    tracing::info!(listen = %settings.listen, revision = policy.revision(), "a standby is up");
    let served = stop.child_token();
    let server = Server {
        listener,
        admin,
        identity,
        ca: None,
        policy,
        oidc: settings.oidc.settings()?,
        registry_auth: None,
        backups,
        timing: Timing::DEFAULT,
    };
    let serving = tokio::spawn(serve(server, served.clone()));
    let leads = standby.follow(kv, stop.clone()).await;
    served.cancel();
    serving.await.context("the standby's task broke down")??;
    if !leads? {
        leading.end().await;
        return Ok(None);
    }
    let kv = standby.take_over().await?;
    Ok(Some((Store::open(kv, options(settings)).await?, leading)))
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
        StoreKind::Etcd => open_etcd(settings.etcd.clone())?,
    };
    refuse_unfinished(&kv).await?;
    Store::open(kv, options(settings)).await
}

fn options(settings: &Settings) -> Options {
    Options {
        bounds: Bounds {
            modules: settings.plugin_store,
            ..Bounds::DEFAULT
        },
        ..Options::default()
    }
}

fn open_etcd(etcd: EtcdFlags) -> Result<Kv, KvError> {
    Kv::etcd(EtcdSettings {
        endpoints: etcd.etcd_endpoints,
        prefix: etcd.etcd_prefix,
        ca: etcd.etcd_ca,
        identity: etcd.etcd_cert.zip(etcd.etcd_key),
        allow_plaintext: etcd.etcd_danger_plaintext,
    })
}

fn etcd_of_environment() -> anyhow::Result<Kv> {
    let EtcdOnly { etcd, .. } = EtcdOnly::try_parse_from(["leeward-control"])
        .context("--etcd takes the cluster from LEEWARD_ETCD_ENDPOINTS and the variables beside it")?;
    anyhow::ensure!(
        !etcd.etcd_endpoints.is_empty(),
        "--etcd takes the cluster from LEEWARD_ETCD_ENDPOINTS and the variables beside it"
    );
    Ok(open_etcd(etcd)?)
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

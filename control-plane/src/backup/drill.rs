//! Restores for practice, and measures: how much would be lost, and how long it takes until a proxy has its policy again.
//!
//! The scratch control plane is a whole one, on a port of this machine, with certificates that are made for the drill; the
//! scratch proxy is a stream of the push's own protocol. Nothing of the mesh knows of either.

use super::catalogue;
use super::content::{self, HEAD};
use super::error::BackupError;
use super::manifest::{rfc3339, sha256, short};
use super::place::Place;
use super::recover::{self, Reader, Restored, Until};
use super::seal::Opener;
use super::verify::Scratch;
use crate::kv::Kv;
use crate::policy::Policy;
use crate::push::Timing;
use crate::server::{Server, serve};
use crate::store::{Clock, Options, Store};
use leeward_identity::authority::Authority;
use leeward_identity::{Identity, SpiffeId, channel};
use leeward_policy::model::RecoveryObjective;
use leeward_proto::v1;
use leeward_proto::v1::control_message::Message as ToProxy;
use leeward_proto::v1::policy_service_client::PolicyServiceClient;
use leeward_proto::v1::proxy_message::Message as FromProxy;
use leeward_proto::v1::push_service_client::PushServiceClient;
use serde::Serialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

/// The trust domain of a drill, which is no mesh's.
const DOMAIN: &str = "drill.leeward.dev";
/// How long its certificates last.
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long the scratch control plane may take for one answer.
const PATIENCE: Duration = Duration::from_secs(120);
/// Largest message, in bytes.
const MAX_MESSAGE: usize = 64 << 20;

/// What the mesh has when a drill begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Live {
    pub(crate) revision: u64,
    /// When that was written, in milliseconds since 1970.
    pub(crate) time_ms: i64,
}

/// What a drill measured.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Report {
    /// When it began, in milliseconds since 1970.
    pub(crate) time_ms: i64,
    /// From where it was restored, and from which backup.
    pub(crate) place: String,
    pub(crate) backup: String,
    /// The mesh's revision; `None` where it could not be asked.
    pub(crate) live_revision: Option<u64>,
    pub(crate) restored_revision: u64,
    /// What would have been lost. Where the mesh could not be asked, revisions are not known, and the time is the most that it
    /// can be: since the last thing that was shipped.
    pub(crate) lost_revisions: u64,
    pub(crate) lost_ms: u64,
    /// From the beginning until a store was there, policy could be read, and a proxy had it.
    pub(crate) restored_after_ms: u64,
    pub(crate) read_after_ms: u64,
    pub(crate) recovery_ms: u64,
    /// Resources that the proxy got.
    pub(crate) pushed: u64,
    /// The objective.
    pub(crate) rpo_ms: u64,
    pub(crate) rto_ms: u64,
    pub(crate) met: bool,
    /// Why the drill failed; empty if it did not.
    pub(crate) error: String,
}

/// What a store has now.
pub(crate) async fn live(store: &Store) -> Option<Live> {
    let head = store.kv().get(HEAD).await.ok()??;
    let head = content::head(&head.value)?;
    Some(Live {
        revision: head.revision,
        time_ms: head.time_ms,
    })
}

/// Makes a drill. What goes wrong is in the report: an objective that can't be measured isn't met.
pub(crate) async fn run(
    place: &Place,
    opener: &Opener,
    within: &Path,
    live: Option<Live>,
    objective: &RecoveryObjective,
) -> Report {
    let begun = Instant::now();
    let mut report = Report {
        time_ms: Clock::System.now_ms(),
        place: place.url().to_owned(),
        live_revision: live.map(|live| live.revision),
        rpo_ms: millis(objective.rpo),
        rto_ms: millis(objective.rto),
        ..Report::default()
    };
    match measure(place, opener, within, live, begun, &mut report).await {
        Ok(()) => report.met = report.lost_ms <= report.rpo_ms && report.recovery_ms <= report.rto_ms,
        Err(error) => report.error = error.chain(),
    }
    report
}

async fn measure(
    place: &Place,
    opener: &Opener,
    within: &Path,
    live: Option<Live>,
    begun: Instant,
    report: &mut Report,
) -> Result<(), BackupError> {
    let plan = recover::plan(&catalogue::list(place).await?, None, Until::Latest)?;
    report.backup = short(&plan.name).unwrap_or_default();
    let scratch = Scratch::new(within)?;
    let reader = Reader { place, opener };
    let kv = Kv::sqlite(&scratch.path().join("data"))?;
    let restored = recover::restore(&kv, &reader, &plan, None).await?;
    report.restored_after_ms = millis(begun.elapsed());
    report.restored_revision = restored.head.revision;
    (report.lost_revisions, report.lost_ms) = match live {
        Some(live) if live.revision > restored.head.revision => (
            live.revision - restored.head.revision,
            u64::try_from(live.time_ms - restored.head.time_ms).unwrap_or(0),
        ),
        Some(_) => (0, 0),
        None => (
            0,
            u64::try_from(report.time_ms - last_word(&reader, &plan, &restored).await?).unwrap_or(0),
        ),
    };
    let site = Site::new(scratch.path())?;
    let stop = CancellationToken::new();
    // However this ends, the scratch control plane does.
    let _ends = stop.clone().drop_guard();
    let address = site.start(kv, stop).await?;
    let served = site.read(address).await?;
    report.read_after_ms = millis(begun.elapsed());
    if served != restored.head.revision {
        return Err(wrong(format!(
            "serves revision {served}, and {} was restored",
            restored.head.revision
        )));
    }
    report.pushed = site.subscribe(address, served).await?;
    report.recovery_ms = millis(begun.elapsed());
    Ok(())
}

/// When the last thing was shipped that was restored.
async fn last_word(
    reader: &Reader<'_>,
    plan: &recover::Plan,
    restored: &Restored,
) -> Result<i64, BackupError> {
    let names = reader.segments(&plan.manifest.store_id).await?;
    let before = names
        .iter()
        .rev()
        .find(|name| super::manifest::segment_after(name).is_some_and(|after| after < restored.position));
    match before {
        Some(name) if restored.position > plan.manifest.position => {
            Ok(super::ship::span(reader.place, name).await?.shipped_ms)
        }
        Some(_) | None => Ok(plan.manifest.ended_ms),
    }
}

fn wrong(what: String) -> BackupError {
    BackupError::Content {
        object: "the scratch control plane".to_owned(),
        what,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A scratch control plane on its way up, and where it will be.
type Starting<'a> = Pin<Box<dyn Future<Output = Result<SocketAddr, BackupError>> + Send + 'a>>;

/// Who takes part in a drill.
struct Site {
    control: Arc<Identity>,
    user: Arc<Identity>,
    proxy: Arc<Identity>,
}

impl Site {
    fn new(dir: &Path) -> Result<Self, BackupError> {
        let failed = |error: &dyn std::fmt::Display| wrong(format!("can't have certificates: {error}"));
        let authority = Authority::create(&dir.join("ca"), DOMAIN).map_err(|e| failed(&e))?;
        let identity = |name: &str, id: Result<SpiffeId, leeward_identity::InvalidSpiffeId>| {
            let id = id.map_err(|e| failed(&e))?;
            let to = dir.join(name);
            authority.issue(&id, LIFE, &to).map_err(|e| failed(&e))?;
            Identity::load(to).map_err(|e| failed(&e))
        };
        Ok(Self {
            control: identity("control", SpiffeId::control(DOMAIN))?,
            user: identity("user", SpiffeId::user(DOMAIN, "drill"))?,
            proxy: identity("proxy", SpiffeId::proxy(DOMAIN, "drill", "drill"))?,
        })
    }

    /// Boxed: what a control plane does has drills in it, and a drill a control plane.
    fn start(&self, kv: Kv, stop: CancellationToken) -> Starting<'_> {
        Box::pin(async move {
            let store = Store::open(kv, Options::default()).await?;
            let policy = Policy::open(store).await.map_err(|e| wrong(e.to_string()))?;
            let backups = super::Backups::open(policy.clone(), super::BackupSettings::default());
            let backups = backups.map_err(|e| wrong(e.to_string()))?;
            let bound = TcpListener::bind("127.0.0.1:0").await;
            let listener = bound.map_err(BackupError::file("listen on", "127.0.0.1"))?;
            let address = listener
                .local_addr()
                .map_err(BackupError::file("listen on", "127.0.0.1"))?;
            let server = Server {
                listener,
                admin: None,
                identity: Arc::clone(&self.control),
                ca: None,
                policy,
                oidc: None,
                registry_auth: None,
                backups,
                timing: Timing::DEFAULT,
            };
            // It ends with `stop`.
            tokio::spawn(serve(server, stop));
            Ok(address)
        })
    }

    /// Reads policy as a person does. Says its revision.
    async fn read(&self, address: SocketAddr) -> Result<u64, BackupError> {
        let channel = channel::connect_lazy(Arc::clone(&self.user), address);
        let mut client = PolicyServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let request = v1::ListRequest {
            page_size: 100,
            ..v1::ListRequest::default()
        };
        let listed = within(client.list(request)).await?;
        Ok(listed.into_inner().revision)
    }

    /// Gets policy as a proxy does. Says how many resources it is, once all are there.
    async fn subscribe(&self, address: SocketAddr, revision: u64) -> Result<u64, BackupError> {
        let channel = channel::connect_lazy(Arc::clone(&self.proxy), address);
        let mut client = PushServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let (out, messages) = tokio::sync::mpsc::channel(4);
        let hello = v1::Hello {
            proxy: "drill".to_owned(),
            zone: "drill".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..v1::Hello::default()
        };
        let hello = v1::ProxyMessage {
            message: Some(FromProxy::Hello(hello)),
        };
        // There is room: it is new.
        let _ = out.try_send(hello);
        let stream = within(client.subscribe(ReceiverStream::new(messages))).await?;
        let mut stream = stream.into_inner();
        let mut pushed = 0;
        loop {
            let message = within(stream.message()).await?;
            match message.and_then(|message| message.message) {
                Some(ToProxy::Update(update)) => {
                    pushed += update.upserts.len() as u64;
                    if update.complete && update.generation >= revision {
                        return Ok(pushed);
                    }
                }
                Some(_) => {}
                None => return Err(wrong("ended the push before all was there".to_owned())),
            }
        }
    }
}

async fn within<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, BackupError> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => Err(wrong(format!("said {}: {}", status.code(), status.message()))),
        Err(_) => Err(wrong(format!("did not answer within {PATIENCE:?}"))),
    }
}

impl Report {
    /// For people.
    pub(crate) fn markdown(&self, json_sha256: &str) -> String {
        let verdict = if self.met { "met" } else { "NOT met" };
        let live = match self.live_revision {
            Some(live) => format!("{live}"),
            None => "not known: the mesh could not be asked".to_owned(),
        };
        let seconds = |ms: u64| format!("{}.{:03} s", ms / 1000, ms % 1000);
        let error = match self.error.as_str() {
            "" => String::new(),
            error => format!("\nThe drill failed: {error}\n"),
        };
        format!(
            "# Restore drill of {time}: objective {verdict}\n{error}\n\
             | | measured | objective |\n|---|---|---|\n\
             | lost (RPO) | {lost}, {revisions} revisions | {rpo} |\n\
             | back after (RTO) | {recovery} | {rto} |\n\n\
             - from: {place}, backup {backup}\n\
             - revision of the mesh: {live}; restored: {restored}\n\
             - a store was there after {stored}, policy was read after {read}, a proxy had all {pushed} resources after {recovery}\n\n\
             SHA-256 of the report in JSON: {json_sha256}\n",
            time = rfc3339(self.time_ms),
            lost = seconds(self.lost_ms),
            revisions = self.lost_revisions,
            rpo = seconds(self.rpo_ms),
            recovery = seconds(self.recovery_ms),
            rto = seconds(self.rto_ms),
            place = self.place,
            backup = self.backup,
            restored = self.restored_revision,
            stored = seconds(self.restored_after_ms),
            read = seconds(self.read_after_ms),
            pushed = self.pushed,
        )
    }

    /// Writes it into a directory, as JSON and Markdown, and says where.
    pub(crate) fn write(&self, dir: &Path) -> Result<PathBuf, BackupError> {
        std::fs::create_dir_all(dir).map_err(BackupError::file("make", dir))?;
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        let stem = format!("drill-{}", super::manifest::stamp(self.time_ms));
        let path = dir.join(format!("{stem}.json"));
        std::fs::write(&path, &json).map_err(BackupError::file("write", &path))?;
        let beside = dir.join(format!("{stem}.md"));
        std::fs::write(&beside, self.markdown(&sha256(&json)))
            .map_err(BackupError::file("write", &beside))?;
        Ok(path)
    }
}

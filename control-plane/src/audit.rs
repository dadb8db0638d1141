//! The audit log: who did what, from where, and what was refused.
//!
//! What changes policy stands in policy's own log, in the transaction that changed it, with what there is to say of the call.
//! The rest has keys of its own: `audit/done/…` and `audit/refused/…`, newest first. They are apart so that nobody can push
//! out what was done by being refused often enough.

mod list;
mod service;

pub(crate) use service::Service;

use crate::access::Caller;
use crate::kv::{Kv, Txn};
use crate::policy::timestamp;
use crate::store::{Author, Store};
use leeward_policy::Key;
use leeward_proto::v1;
use prost::Message;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tonic::{Code, Status};

/// Entries that are kept: of what was done, and of what was refused.
const DONE: (&str, usize) = ("audit/done/", 100_000);
const REFUSED: (&str, usize) = ("audit/refused/", 20_000);
/// How long an entry is kept.
const AGE: Duration = Duration::from_secs(90 * 24 * 3600);
/// Entries that wait to be written; more are lost, and counted.
const WAITING: usize = 1024;
/// Entries of one transaction.
const BATCH: usize = 50;
/// How long a call waits for its entry to be written.
const PATIENCE: Duration = Duration::from_secs(2);
/// Refusals that are kept, in a second and at once. The rest is in the log alone.
const REFUSALS: (f64, f64) = (10.0, 100.0);
/// How often, and after how many entries, it is looked for what is too old or too much.
const TIDY: (Duration, u64) = (Duration::from_secs(3600), 1000);
/// Keys on a page, and deletions of one transaction.
const PAGE: usize = 1000;
const DELETES: usize = 90;
/// The longest message that is kept, in bytes.
const MAX_MESSAGE: usize = 500;

/// Labels of a record of policy that say what the call was.
pub(crate) const METHOD: &str = "method";
pub(crate) const AGENT: &str = "agent";
pub(crate) const REASON: &str = "reason";
pub(crate) const BREAKGLASS: &str = "breakglass";

/// What became of a call.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    Done,
    Failed { code: Code, message: String },
}

impl Outcome {
    pub(crate) fn of(status: &Status) -> Self {
        let message = status.message();
        let end = message.floor_char_boundary(MAX_MESSAGE);
        Self::Failed {
            code: status.code(),
            message: message.get(..end).unwrap_or_default().to_owned(),
        }
    }

    /// The code's name, as google.rpc.Code has it.
    fn word(&self) -> &'static str {
        let Self::Failed { code, .. } = self else {
            return "OK";
        };
        match code {
            Code::Ok => "OK",
            Code::Cancelled => "CANCELLED",
            Code::Unknown => "UNKNOWN",
            Code::InvalidArgument => "INVALID_ARGUMENT",
            Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Code::NotFound => "NOT_FOUND",
            Code::AlreadyExists => "ALREADY_EXISTS",
            Code::PermissionDenied => "PERMISSION_DENIED",
            Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Code::FailedPrecondition => "FAILED_PRECONDITION",
            Code::Aborted => "ABORTED",
            Code::OutOfRange => "OUT_OF_RANGE",
            Code::Unimplemented => "UNIMPLEMENTED",
            Code::Internal => "INTERNAL",
            Code::Unavailable => "UNAVAILABLE",
            Code::DataLoss => "DATA_LOSS",
            Code::Unauthenticated => "UNAUTHENTICATED",
        }
    }
}

/// What a call changed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Written {
    pub(crate) revision: u64,
    /// Resources with their revisions before and after; 0 for none.
    pub(crate) changes: Vec<(Key, u64, u64)>,
}

/// The author of what a call writes to policy's log, with what the audit log says of the call.
pub(crate) fn author(caller: &Caller, breakglass: bool) -> Author {
    let mut labels = std::collections::BTreeMap::from([(METHOD.to_owned(), caller.method().to_owned())]);
    if !caller.agent().is_empty() {
        labels.insert(AGENT.to_owned(), caller.agent().to_owned());
    }
    if breakglass {
        labels.insert(BREAKGLASS.to_owned(), "true".to_owned());
    }
    if let Some(reason) = caller.reason() {
        labels.insert(REASON.to_owned(), reason.to_owned());
    }
    Author {
        who: caller.who().to_owned(),
        from: caller.from().to_owned(),
        message: caller.reason().unwrap_or_default().to_owned(),
        labels,
    }
}

/// An entry of a call.
pub(crate) fn entry(
    caller: &Caller,
    breakglass: bool,
    outcome: &Outcome,
    written: Written,
    now_ms: i64,
) -> v1::AuditEntry {
    let message = match outcome {
        Outcome::Done => String::new(),
        Outcome::Failed { message, .. } => message.clone(),
    };
    let change = |(key, before, after): (Key, u64, u64)| v1::AuditChange {
        r#ref: Some(leeward_proto::render_key(&key)),
        before,
        after,
    };
    v1::AuditEntry {
        time: Some(timestamp(now_ms)),
        who: caller.who().to_owned(),
        method: caller.method().to_owned(),
        from: caller.from().to_owned(),
        user_agent: caller.agent().to_owned(),
        outcome: outcome.word().to_owned(),
        message,
        reason: caller.reason().unwrap_or_default().to_owned(),
        breakglass,
        changes: written.changes.into_iter().map(change).collect(),
        revision: written.revision,
    }
}

/// Where an entry is kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    /// It stands in policy's log.
    Policy,
    Done,
    Refused,
}

/// Puts entries down. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Audit {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    queue: mpsc::Sender<Queued>,
    /// Refusals that may still be kept, and when that was so. Poison is harmless: it is a number.
    refusals: Mutex<(f64, Instant)>,
    lost: AtomicU64,
}

#[derive(Debug)]
struct Queued {
    place: Place,
    entry: v1::AuditEntry,
    written: oneshot::Sender<()>,
}

impl Audit {
    /// Its writer ends when nobody is left who could put an entry down, and what waited is written.
    pub(crate) fn new(store: Store) -> Self {
        let (queue, queued) = mpsc::channel(WAITING);
        // Its owners are the clones of this: it ends with the last.
        tokio::spawn(write(store.clone(), queued));
        Self {
            shared: Arc::new(Shared {
                store,
                queue,
                refusals: Mutex::new((REFUSALS.1, Instant::now())),
                lost: AtomicU64::new(0),
            }),
        }
    }

    /// Entries that could not be kept since the start.
    pub(crate) fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }

    pub(crate) fn now_ms(&self) -> i64 {
        self.shared.store.now_ms()
    }

    /// Puts an entry down: in the log at once, and where it is kept. What was done waits for that, a while; what was refused
    /// doesn't. That it can't be kept fails nothing: it was done.
    pub(crate) async fn put(&self, place: Place, entry: v1::AuditEntry) {
        tell(&entry);
        if place == Place::Policy || (place == Place::Refused && !self.keeps_refusal()) {
            return;
        }
        let (written, done) = oneshot::channel();
        let queued = Queued {
            place,
            entry,
            written,
        };
        let is_written = match self.shared.queue.try_send(queued) {
            Ok(()) if place == Place::Refused => return,
            Ok(()) => matches!(tokio::time::timeout(PATIENCE, done).await, Ok(Ok(()))),
            Err(_) => false,
        };
        if !is_written {
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
            tracing::error!("an entry of the audit log is not kept yet, and may be in this log alone");
        }
    }

    fn keeps_refusal(&self) -> bool {
        let mut left = self
            .shared
            .refusals
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let since = now.saturating_duration_since(left.1).as_secs_f64();
        *left = ((left.0 + since * REFUSALS.0).min(REFUSALS.1), now);
        if left.0 < 1.0 {
            return false;
        }
        left.0 -= 1.0;
        true
    }
}

/// Says it in the log, as one object of JSON.
fn tell(entry: &v1::AuditEntry) {
    let changes: Vec<_> = entry
        .changes
        .iter()
        .map(|change| {
            let key = change.r#ref.clone().unwrap_or_default();
            let kind = leeward_proto::kind_of(key.kind()).map_or("-", leeward_policy::Kind::as_str);
            serde_json::json!({"resource": format!("{kind}/{}", key.name), "before": change.before, "after": change.after})
        })
        .collect();
    let json = serde_json::json!({
        "time": entry.time.map(|time| time.to_string()), "who": entry.who, "method": entry.method, "from": entry.from,
        "userAgent": entry.user_agent, "outcome": entry.outcome, "message": entry.message, "reason": entry.reason,
        "breakglass": entry.breakglass, "revision": entry.revision, "changes": changes,
    });
    if entry.breakglass {
        tracing::warn!(target: "audit", "{json}");
    } else {
        tracing::info!(target: "audit", "{json}");
    }
}

/// The part of a key that says when: what is later comes first.
fn before(ms: i64) -> String {
    format!("{:016x}", u64::MAX - u64::try_from(ms).unwrap_or(0))
}

async fn write(store: Store, mut queue: mpsc::Receiver<Queued>) {
    let kv = store.kv();
    let mut tidied: Option<Instant> = None;
    let mut since_tidied = 0;
    loop {
        let mut batch = Vec::new();
        let got = queue.recv_many(&mut batch, BATCH).await;
        if got == 0 {
            return;
        }
        let mut txn = Txn::default();
        for queued in &batch {
            let (prefix, _) = if queued.place == Place::Refused {
                REFUSED
            } else {
                DONE
            };
            let ms = queued
                .entry
                .time
                .map_or(0, |time| time.seconds * 1000 + i64::from(time.nanos / 1_000_000));
            let key = format!("{prefix}{}-{:016x}", before(ms), fastrand::u64(..));
            txn = txn.put(key, queued.entry.encode_to_vec());
        }
        match kv.txn(txn).await {
            Ok(_) => {
                for queued in batch {
                    // Whoever waited for it may be gone.
                    let _ = queued.written.send(());
                }
            }
            Err(error) => tracing::error!(%error, "the audit log can't be written"),
        }
        since_tidied += got as u64;
        let is_due = tidied.is_none_or(|at| at.elapsed() >= TIDY.0) || since_tidied >= TIDY.1;
        if is_due {
            tidied = Some(Instant::now());
            since_tidied = 0;
            for (prefix, most) in [DONE, REFUSED] {
                if let Err(error) = tidy(kv, prefix, most, store.now_ms()).await {
                    tracing::warn!(%error, "what is too old in the audit log can't be forgotten; it is tried again");
                }
            }
        }
    }
}

/// Forgets what is too old, and what is too much. Several control planes may do it at once.
async fn tidy(kv: &Kv, prefix: &str, most: usize, now_ms: i64) -> Result<(), crate::kv::KvError> {
    let age = i64::try_from(AGE.as_millis()).unwrap_or(i64::MAX);
    let too_old = format!("{prefix}{}", before(now_ms.saturating_sub(age)));
    let mut after: Option<String> = None;
    let mut seen = 0;
    loop {
        let page = kv.keys(prefix, after.as_deref(), PAGE).await?;
        let mut gone = Vec::new();
        for entry in &page.entries {
            seen += 1;
            if seen > most || entry.key >= too_old {
                gone.push(entry.key.clone());
            }
        }
        for keys in gone.chunks(DELETES) {
            kv.txn(
                keys.iter()
                    .fold(Txn::default(), |txn, key| txn.delete(key.clone())),
            )
            .await?;
        }
        after = page.entries.last().map(|entry| entry.key.clone());
        if !page.more || after.is_none() {
            return Ok(());
        }
    }
}

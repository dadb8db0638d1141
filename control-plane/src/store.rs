//! Resources and their revisions, levels and their audit, modules, tokens and certificates: what a mesh is.
//!
//! Policy is a log of revisions in a [`Kv`]: each write is one record, with what it changes before and after, and one small
//! transaction moves `head` to it. Whoever loses the race for a number looks at its preconditions anew, and tries the next.
//! Everything at head is also in memory ([`mirror`]): reads never wait for a disk or a cluster. The mirror follows what other
//! control planes write (`follow`), and [`Store::settle`] waits until it has seen all that was acknowledged.
//!
//! Keys: `meta`, `head`, `rev/N` and `lev/N` (records of policy and of levels), `log/…` (large records in parts),
//! `snapshots/N` and `snap/…` (everything at a revision), `compacted`, `lead/JOB`, `members/ID`, `modules/…`, `chunks/…`,
//! `tokens/…`, `certificates/…`, `revoked/…`. Other tables have prefixes of their own.
//!
//! Invariants:
//! - Revisions are dense: head is the number of the last write, and every number up to it was acknowledged or is the outcome of
//!   a write whose answer was lost.
//! - Nothing that is correct hangs on a wall clock: order is by numbers, leases end by monotonic time.
//! - A write is refused if its [`Fence`] does not hold in the very transaction that would do it.

mod certificates;
mod error;
mod follow;
mod format;
mod history;
mod keep;
mod lead;
pub(crate) mod legacy;
mod levels;
mod mirror;
mod modules;
mod revocations;
mod snapshot;
mod write;

pub use certificates::{IssuedRow, NewToken, TokenUse};
pub use error::StoreError;
pub(crate) use format::wire;
pub use history::{Author, Record, ResourceChange};
pub use lead::{Fence, Leadership, Member};
pub use levels::{Hold, Judged, LevelChange, LevelWrites, Place};
pub use modules::{CHUNK, StoredModule};
pub use revocations::RevocationRow;
pub use write::{Change, Write};

use crate::kv::{Kv, KvError};
use bytes::Bytes;
use leeward_policy::{Key, Kind};
use mirror::Mirror;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

/// A resource as it is stored.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Stored {
    /// Its name.
    pub key: Key,
    /// The revision of its last change.
    pub revision: u64,
    /// What was applied, as protobuf.
    pub payload: Bytes,
    /// When it was first applied, in milliseconds since 1970.
    pub created_ms: i64,
    /// When it last changed, likewise.
    pub updated_ms: i64,
}

/// What changed from one revision to another.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Up to and with this revision.
    pub to: u64,
    /// Created or changed, by revision.
    pub upserts: Vec<Stored>,
    /// Deleted, with the revision of the deletion.
    pub deletes: Vec<(u64, Key)>,
}

/// How much of everything is kept. The defaults are what a mesh has; tests have less.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Resources there may be.
    pub resources: usize,
    /// Deletions that are remembered. A proxy that has been away for more gets everything anew.
    pub tombstones: usize,
    /// Records of policy that are kept.
    pub records: u64,
    /// How long a record is kept at most.
    pub age: Duration,
    /// Records of policy that are kept in memory, and their payloads' bytes.
    pub recent: (usize, usize),
    /// Records, and bytes of them, from one snapshot to the next.
    pub snapshot_every: (u64, usize),
    /// Snapshots that are kept.
    pub snapshots: usize,
    /// Lines of the audit of levels that are kept.
    pub lines: usize,
    /// What modules may take together, in bytes.
    pub modules: u64,
}

impl Bounds {
    /// What a mesh has.
    pub const DEFAULT: Self = Self {
        resources: 200_000,
        tombstones: 100_000,
        records: 100_000,
        age: Duration::from_secs(90 * 24 * 3600),
        recent: (10_000, 64 << 20),
        snapshot_every: (1_000, 16 << 20),
        snapshots: 4,
        lines: 100_000,
        modules: 2 << 30,
    };
}

/// What a store is opened with.
#[derive(Clone, Debug)]
pub struct Options {
    /// How much of everything is kept.
    pub bounds: Bounds,
    /// What the time is for people, and for what people let end at a time.
    pub clock: Clock,
    /// How often a silent watch is looked after, and housekeeping is done.
    pub every: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bounds: Bounds::DEFAULT,
            clock: Clock::System,
            every: Duration::from_secs(5),
        }
    }
}

/// A wall clock. It may jump: records' times never go back, and nothing else hangs on it.
#[derive(Clone, Debug)]
pub enum Clock {
    /// The system's.
    System,
    /// One that is set by hand, in milliseconds since 1970.
    Set(Arc<AtomicU64>),
}

impl Clock {
    /// Milliseconds since 1970.
    pub fn now_ms(&self) -> i64 {
        let ms = match self {
            Self::System => {
                #[expect(clippy::disallowed_methods, reason = "for people: when something changed")]
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
            }
            // Relaxed: it is one value.
            Self::Set(ms) => ms.load(Ordering::Relaxed),
        };
        i64::try_from(ms).unwrap_or(i64::MAX)
    }
}

/// The version of what is written; see the key `meta`.
pub const SCHEMA: u64 = 1;
/// The first version whose builds can read what is written.
pub const READABLE_FROM: u64 = 1;

/// The store. Cheap to clone; it is closed when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
    /// Ends the tasks that follow and keep house, which have `inner` too.
    _end: Arc<DropGuard>,
}

#[derive(Debug)]
struct Inner {
    kv: Kv,
    id: String,
    /// The revision of `meta` in the kv, which every write compares: a build that brings the schema forward keeps those
    /// that don't know it from writing.
    meta: AtomicU64,
    /// A later schema that this build can read, but not write.
    read_only: Option<u64>,
    bounds: Bounds,
    clock: Clock,
    every: Duration,
    /// This control plane.
    member: String,
    // Poison is harmless: a record is applied without a way to fail.
    mirror: RwLock<Mirror>,
    /// Held while the mirror is brought up to date.
    following: Mutex<()>,
    /// Held by one writer at a time of this process: they would only race with each other.
    writing: Mutex<()>,
    revision: watch::Sender<u64>,
    levels: watch::Sender<u64>,
    stop: CancellationToken,
}

impl Store {
    /// Opens what is in a key-value store, and begins it if there is nothing.
    ///
    /// # Errors
    ///
    /// If it can't be reached, is of a later schema, or is damaged.
    pub async fn open(kv: Kv, options: Options) -> Result<Self, StoreError> {
        let opened = follow::meta(&kv).await?;
        let stop = CancellationToken::new();
        let inner = Inner {
            id: opened.id,
            meta: AtomicU64::new(opened.modified),
            read_only: opened.read_only,
            bounds: options.bounds,
            clock: options.clock,
            every: options.every,
            member: token(),
            mirror: RwLock::new(Mirror::new(options.bounds)),
            following: Mutex::default(),
            writing: Mutex::default(),
            revision: watch::Sender::new(0),
            levels: watch::Sender::new(0),
            stop: stop.clone(),
            kv,
        };
        let inner = Arc::new(inner);
        inner.reload().await?;
        let store = Self {
            _end: Arc::new(stop.drop_guard()),
            inner,
        };
        tokio::spawn(follow::run(Arc::clone(&store.inner)));
        tokio::spawn(keep::run(Arc::clone(&store.inner)));
        Ok(store)
    }

    /// Distinguishes this store from every other.
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// This control plane's name among those that share the store; another after each start.
    pub fn member(&self) -> &str {
        &self.inner.member
    }

    /// The revision that is in memory.
    pub fn revision(&self) -> u64 {
        *self.inner.revision.borrow()
    }

    /// Tells of every revision.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.inner.revision.subscribe()
    }

    /// Tells of every change of levels.
    pub fn watch_levels(&self) -> watch::Receiver<u64> {
        self.inner.levels.subscribe()
    }

    /// For tables of one's own, under a prefix of one's own.
    pub fn kv(&self) -> &Kv {
        &self.inner.kv
    }

    /// Milliseconds since 1970, by the store's clock.
    pub fn now_ms(&self) -> i64 {
        self.inner.clock.now_ms()
    }

    /// Waits until what is in memory has everything that was acknowledged before this was called, and returns its revision.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached: what is in memory may be behind then.
    pub async fn settle(&self) -> Result<u64, StoreError> {
        self.inner.settle().await?;
        Ok(self.revision())
    }

    /// One resource.
    pub fn get(&self, key: &Key) -> Option<Stored> {
        self.inner.mirror().get(key)
    }

    /// Resources of a kind, or of all, by kind and name, from after a place; and the revision that this shows.
    pub fn list(&self, kind: Option<Kind>, after: Option<&Key>, limit: usize) -> (Vec<Stored>, u64) {
        self.inner.mirror().list(kind, after, limit)
    }

    /// What changed after a revision; `None` if deletions that old are forgotten.
    pub fn changes_since(&self, after: u64) -> Option<Changes> {
        self.inner.mirror().changes_since(after)
    }

    /// What leads from the state at one revision to that at another, which may be an earlier one; `None` if the records between
    /// are not in memory, or are of revisions that there are not: see [`Store::at`] then.
    pub fn changes_between(&self, from: u64, to: u64) -> Option<Changes> {
        self.inner.mirror().changes_between(from, to)
    }

    /// Everything there is, and every deletion that is remembered.
    pub fn everything(&self) -> Changes {
        self.inner.mirror().everything()
    }
}

impl Inner {
    fn mirror(&self) -> RwLockReadGuard<'_, Mirror> {
        self.mirror.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn mirror_mut(&self) -> RwLockWriteGuard<'_, Mirror> {
        self.mirror.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets everybody know where the mirror is.
    fn tell(&self) {
        let (revision, levels) = {
            let mirror = self.mirror();
            (mirror.head.revision, mirror.head.levels)
        };
        let to = |value: u64| move |last: &mut u64| std::mem::replace(last, value) != value;
        self.revision.send_if_modified(to(revision));
        self.levels.send_if_modified(to(levels));
    }
}

/// A name that nobody else has.
fn token() -> String {
    format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..))
}

/// A number as it stands in keys, so that their order is that of numbers.
fn digits(number: u64) -> String {
    format!("{number:016x}")
}

fn unknown(error: &StoreError) -> bool {
    matches!(error, StoreError::Kv(KvError::Unknown { .. }))
}

#[cfg(test)]
pub(crate) mod tests;

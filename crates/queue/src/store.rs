//! The two places where queues are kept, behind one face.

use crate::codec;
use crate::entry::{EntryDetail, EntryId, EntryState, EntrySummary, Listing, Refused, StoredRequest, Which};
use crate::jetstream::JetStream;
use crate::schedule::Row;
use crate::sqlite::Sqlite;
use crate::verdict::Settlement;
use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use leeward_policy::model::Queue;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Places of discarded entries that are remembered for the deliveries.
const MAX_REMOVED: usize = 1024;

/// What a store said, for people.
pub(crate) type Why = Arc<str>;

/// A queue's store. What each function does is said here once for both.
#[derive(Debug)]
pub(crate) enum Store {
    Sqlite(Sqlite),
    JetStream(Box<JetStream>),
    /// It can't be had, for a reason that lasts as long as the settings do.
    Absent(Why),
}

/// An entry that is not yet stored.
#[derive(Clone, Debug)]
pub(crate) struct NewEntry {
    pub(crate) id: EntryId,
    pub(crate) service: Arc<str>,
    pub(crate) route: Arc<str>,
    pub(crate) key: Option<Arc<str>>,
    pub(crate) method: String,
    pub(crate) target: String,
    /// The whole request.
    pub(crate) bytes: Bytes,
}

impl NewEntry {
    pub(crate) fn new(id: EntryId, request: &StoredRequest) -> Self {
        Self {
            id,
            service: Arc::clone(&request.service),
            route: Arc::clone(&request.route),
            key: request.key.clone(),
            method: request.method.clone(),
            target: request.target.clone(),
            bytes: codec::encode(request),
        }
    }

    /// What it takes of a queue's bounds, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// What is in a store.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Totals {
    pub(crate) waiting: u64,
    pub(crate) bytes: u64,
    pub(crate) dead: u64,
    /// Since when the oldest waits, in milliseconds since 1970.
    pub(crate) oldest_ms: Option<u64>,
}

/// Entries as they are in the store.
#[derive(Debug)]
pub(crate) struct Fetched {
    /// Changes when everything that was fetched before is void.
    pub(crate) generation: u64,
    pub(crate) rows: Vec<Row>,
}

/// Why an entry's request could not be had.
#[derive(Debug)]
pub(crate) enum LoadError {
    /// The store doesn't answer.
    Unavailable(Why),
    /// It is there, and no request.
    Unreadable(Why),
}

/// What a queue's store, its deliveries and those who ask for it have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) name: Arc<str>,
    queue: ArcSwap<Queue>,
    pub(crate) health: HealthCell,
    /// As of the store's last look.
    pub(crate) totals: ArcSwapOption<Totals>,
    pub(crate) counters: Counters,
    /// Something has changed that the deliveries should look at.
    changed: Notify,
    /// Places of entries that were discarded while they waited. Poison is harmless: they are pushed and taken.
    removed: Mutex<Vec<u64>>,
}

/// Since the process began. Relaxed everywhere: nothing hangs on them.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) accepted: AtomicU64,
    pub(crate) delivered: AtomicU64,
    pub(crate) dead: AtomicU64,
    pub(crate) expired: AtomicU64,
}

impl Shared {
    pub(crate) fn new(name: Arc<str>, queue: Arc<Queue>) -> Self {
        Self {
            name,
            queue: ArcSwap::new(queue),
            health: HealthCell::default(),
            totals: ArcSwapOption::empty(),
            counters: Counters::default(),
            changed: Notify::new(),
            removed: Mutex::default(),
        }
    }

    /// What policy says now.
    pub(crate) fn queue(&self) -> Arc<Queue> {
        self.queue.load_full()
    }

    pub(crate) fn set_queue(&self, queue: Arc<Queue>) {
        self.queue.store(queue);
        self.wake();
    }

    /// Has the deliveries look at the store.
    pub(crate) fn wake(&self) {
        self.changed.notify_one();
    }

    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(crate) fn removed(&self, seq: u64) {
        let mut removed = self.removed.lock().unwrap_or_else(PoisonError::into_inner);
        // Beyond this, and where nobody takes them, they are missed when their turn comes.
        if removed.len() < MAX_REMOVED {
            removed.push(seq);
        }
        drop(removed);
        self.wake();
    }

    pub(crate) fn take_removed(&self) -> Vec<u64> {
        std::mem::take(&mut *self.removed.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Whether a store can be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Health {
    /// Not yet known.
    Opening,
    Ready,
    Unavailable(Why),
}

/// The [`Health`] of a store, and what has happened to it.
#[derive(Debug)]
pub(crate) struct HealthCell {
    now: ArcSwap<Health>,
    set_aside: ArcSwapOption<PathBuf>,
}

impl Default for HealthCell {
    fn default() -> Self {
        Self {
            now: ArcSwap::from_pointee(Health::Opening),
            set_aside: ArcSwapOption::empty(),
        }
    }
}

impl HealthCell {
    pub(crate) fn set(&self, health: Health) {
        if **self.now.load() != health {
            self.now.store(Arc::new(health));
        }
    }

    pub(crate) fn is_ready(&self) -> bool {
        **self.now.load() == Health::Ready
    }

    pub(crate) fn set_aside(&self, path: PathBuf) {
        self.set_aside.store(Some(Arc::new(path)));
    }

    /// Why it can't be used, if it can't.
    pub(crate) fn why(&self) -> Why {
        match &**self.now.load() {
            Health::Opening => "it is being opened".into(),
            Health::Ready => "it has just been opened".into(),
            Health::Unavailable(why) => why.clone(),
        }
    }

    /// For people.
    pub(crate) fn text(&self, delivering: bool) -> String {
        let now = match &**self.now.load() {
            Health::Opening => "being opened".to_owned(),
            Health::Ready if delivering => "delivering".to_owned(),
            Health::Ready => "accepting; delivered from elsewhere".to_owned(),
            Health::Unavailable(why) => format!("unavailable: {why}"),
        };
        match &*self.set_aside.load() {
            Some(path) => format!("{now}; a corrupt file was set aside as {}", path.display()),
            None => now,
        }
    }
}

impl Store {
    /// Makes an entry durable.
    pub(crate) async fn accept(&self, new: NewEntry) -> Result<(), Refused> {
        match self {
            Self::Sqlite(store) => store.accept(new).await,
            Self::JetStream(store) => store.accept(new).await,
            Self::Absent(why) => Err(Refused::Unavailable { why: why.clone() }),
        }
    }

    /// Where an entry is on its way, if it is known.
    pub(crate) async fn state(&self, id: EntryId) -> Result<Option<EntryState>, Why> {
        match self {
            Self::Sqlite(store) => store.state(id).await,
            Self::JetStream(store) => store.state(id).await,
            Self::Absent(why) => Err(why.clone()),
        }
    }

    /// An entry that waits or is dead.
    pub(crate) async fn detail(&self, id: EntryId) -> Result<Option<EntryDetail>, Why> {
        match self {
            Self::Sqlite(store) => store.detail(id).await,
            Self::JetStream(store) => store.detail(id).await,
            Self::Absent(why) => Err(why.clone()),
        }
    }

    pub(crate) async fn list(&self, what: Listing) -> Result<Vec<EntrySummary>, Why> {
        match self {
            Self::Sqlite(store) => store.list(what).await,
            Self::JetStream(store) => store.list(what).await,
            Self::Absent(why) => Err(why.clone()),
        }
    }

    /// Makes dead letters wait again. How many, and the bound that stopped it.
    pub(crate) async fn retry(&self, which: Which) -> Result<(u64, Option<&'static str>), Why> {
        match self {
            Self::Sqlite(store) => store.retry(which).await,
            Self::JetStream(store) => store.retry(which).await,
            Self::Absent(why) => Err(why.clone()),
        }
    }

    /// Drops entries. How many.
    pub(crate) async fn discard(&self, which: Which) -> Result<u64, Why> {
        match self {
            Self::Sqlite(store) => store.discard(which).await,
            Self::JetStream(store) => store.discard(which).await,
            Self::Absent(why) => Err(why.clone()),
        }
    }

    /// Becomes the one that delivers, or stays it. False if another is.
    pub(crate) async fn lead(&self) -> Result<bool, Why> {
        match self {
            Self::Sqlite(store) => store.lead().await,
            Self::JetStream(store) => store.lead().await,
            Self::Absent(why) => Err(why.clone()),
        }
    }

    /// How long to wait before [`Self::lead`] is asked again.
    pub(crate) const fn lead_again(&self) -> Duration {
        match self {
            // A lock costs nothing to try, and a successor waits for it.
            Self::Sqlite(_) | Self::Absent(_) => Duration::from_millis(100),
            Self::JetStream(store) => store.lead_again(),
        }
    }

    /// Does what the store needs done beside what it is asked, for as long as it is polled.
    pub(crate) async fn tend(&self) {
        match self {
            Self::Sqlite(_) | Self::Absent(_) => std::future::pending().await,
            Self::JetStream(store) => store.tend().await,
        }
    }

    /// Ends when this is no longer the one that delivers, though it did not resign.
    pub(crate) async fn deposed(&self) {
        match self {
            // The system takes no lock away.
            Self::Sqlite(_) | Self::Absent(_) => std::future::pending().await,
            Self::JetStream(store) => store.deposed().await,
        }
    }

    /// Lets another deliver.
    pub(crate) async fn resign(&self) {
        match self {
            Self::Sqlite(store) => store.resign(),
            Self::JetStream(store) => store.resign().await,
            Self::Absent(_) => {}
        }
    }

    /// Entries after a place, in order, at most `limit`; fewer mean that there are no more.
    pub(crate) async fn fetch(&self, after: u64, limit: usize) -> Result<Fetched, Why> {
        match self {
            Self::Sqlite(store) => store.fetch(after, limit).await,
            Self::JetStream(store) => store.fetch(after, limit).await,
            Self::Absent(why) => Err(why.clone()),
        }
    }

    /// An entry's request, if it still waits.
    pub(crate) async fn load(&self, seq: u64, id: EntryId) -> Result<Option<StoredRequest>, LoadError> {
        match self {
            Self::Sqlite(store) => store.load(seq, id).await,
            Self::JetStream(store) => store.load(seq, id).await,
            Self::Absent(why) => Err(LoadError::Unavailable(why.clone())),
        }
    }

    /// Makes durable what became of an entry. One that no longer waits changes nothing.
    pub(crate) async fn settle(&self, place: (u64, EntryId), settlement: Settlement) -> Result<(), Why> {
        match self {
            Self::Sqlite(store) => store.settle(place, settlement).await,
            Self::JetStream(store) => store.settle(place, settlement).await,
            Self::Absent(why) => Err(why.clone()),
        }
    }
}

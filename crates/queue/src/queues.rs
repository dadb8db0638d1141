//! All queues of one proxy.

use crate::clock::Clock;
use crate::deliver;
use crate::entry::{
    Accepted, Deliver, EntryDetail, EntryId, EntryStatus, EntrySummary, Listing, QueueError, Refused,
    StoredRequest, Which,
};
use crate::jetstream::JetStream;
use crate::sqlite::Sqlite;
use crate::store::{Health, NewEntry, Shared, Store, Why};
use leeward_policy::model::{Queue, QueueStore};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

/// The pause before deliveries begin again that have ended by a panic.
const AGAIN: Duration = Duration::from_secs(1);
/// For how long a request waits for its queue to be there.
const OPENING: Duration = Duration::from_secs(1);

/// What queues need to know of their proxy.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The directory for data; `None` makes queues on disk unavailable.
    pub data: Option<PathBuf>,
    /// The proxy's name.
    pub proxy: Arc<str>,
    /// Its zone.
    pub zone: Arc<str>,
}

/// All queues of one proxy.
pub struct Queues {
    settings: Settings,
    deliver: Arc<dyn Deliver>,
    clock: Clock,
    /// Poison is harmless: queues are put in and taken out whole.
    table: RwLock<BTreeMap<Arc<str>, Arc<Handle>>>,
    /// The table has other queues than before.
    changed: Notify,
    /// The same, for those who wait for a queue.
    reconciled: watch::Sender<()>,
    /// Deliveries are to end.
    closing: watch::Sender<bool>,
    /// [`Self::run`] is under way.
    running: watch::Sender<bool>,
}

/// One queue.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) shared: Arc<Shared>,
    pub(crate) store: Store,
    pub(crate) clock: Clock,
    /// This process delivers from it. Relaxed: only shown.
    pub(crate) leading: AtomicBool,
    /// There is a task for it. Relaxed: only [`Queues::run`] reads it.
    pub(crate) tended: AtomicBool,
    stop: watch::Sender<bool>,
}

/// A queue as it is now.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct QueueReading {
    /// Its name.
    pub queue: Arc<str>,
    /// Where it is kept: `sqlite` or `jetstream`.
    pub store: &'static str,
    /// For people: whether it can be used, and if not, why.
    pub state: String,
    /// Whether it can be used.
    pub available: bool,
    /// Whether this process delivers from it.
    pub delivering: bool,
    /// Entries that wait.
    pub waiting: u64,
    /// Their size together, in bytes.
    pub bytes: u64,
    /// Dead letters.
    pub dead: u64,
    /// For how long the oldest entry has waited; zero if there is none.
    pub oldest: Duration,
    /// Entries that were accepted here since the process began.
    pub accepted_total: u64,
    /// Entries that were delivered from here, since then.
    pub delivered_total: u64,
    /// Entries that became dead letters here, since then, those that expired included.
    pub dead_total: u64,
    /// Entries that expired here, since then.
    pub expired_total: u64,
}

impl fmt::Debug for Queues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queues")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Queues {
    /// None yet: [`Self::reconcile`] opens them, and [`Self::run`] delivers from them by `deliver`.
    pub fn new(settings: Settings, deliver: Arc<dyn Deliver>) -> Arc<Self> {
        Arc::new(Self {
            settings,
            deliver,
            clock: Clock::new(),
            table: RwLock::default(),
            changed: Notify::new(),
            reconciled: watch::Sender::new(()),
            closing: watch::Sender::new(false),
            running: watch::Sender::new(false),
        })
    }

    /// Opens the queues that policy names and closes the others, whose entries stay where they are. Changed settings
    /// hold at once. Doesn't wait: a queue that can't be opened has a state that says why, and is tried again.
    pub fn reconcile(&self, queues: Vec<(Arc<str>, Arc<Queue>)>) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::take(&mut *table);
        for (name, queue) in queues {
            let kept = before.remove(&name).filter(|handle| {
                let same = handle.shared.queue().store == queue.store;
                if !same {
                    handle.stop.send_replace(true);
                }
                same
            });
            let handle = match kept {
                Some(handle) => {
                    handle.shared.set_queue(queue);
                    handle
                }
                None => self.open(Arc::clone(&name), queue),
            };
            table.insert(name, handle);
        }
        drop(table);
        for handle in before.into_values() {
            handle.stop.send_replace(true);
        }
        self.changed.notify_one();
        self.reconciled.send_replace(());
    }

    fn open(&self, name: Arc<str>, queue: Arc<Queue>) -> Arc<Handle> {
        let shared = Arc::new(Shared::new(Arc::clone(&name), Arc::clone(&queue)));
        let store = match &queue.store {
            QueueStore::Sqlite => match &self.settings.data {
                Some(data) => Sqlite::open(data, &name, Arc::clone(&shared), self.clock).map(Store::Sqlite),
                None => Err(Why::from("the proxy has no directory for data (--data)")),
            },
            QueueStore::JetStream { .. } => {
                let owner = format!("{}/{}", self.settings.zone, self.settings.proxy);
                let store = JetStream::new(owner, Arc::clone(&shared), self.clock);
                Ok(Store::JetStream(Box::new(store)))
            }
        };
        let store = store.unwrap_or_else(|why| {
            shared.health.set(Health::Unavailable(why.clone()));
            Store::Absent(why)
        });
        Arc::new(Handle {
            shared,
            store,
            clock: self.clock,
            leading: AtomicBool::new(false),
            tended: AtomicBool::new(false),
            stop: watch::Sender::new(false),
        })
    }

    /// Takes a request in: it is durable once this returns. Dropping the future before that leaves open whether it was
    /// taken in. Requests follow new policy a moment before [`Self::reconcile`] does: a queue that isn't there yet is
    /// waited for, a second at most.
    ///
    /// # Errors
    ///
    /// [`Refused`] says why it was not.
    pub async fn accept(&self, queue: &str, request: StoredRequest) -> Result<Accepted, Refused> {
        let handle = self.awaited(queue).await.ok_or(Refused::NoSuchQueue)?;
        let id = EntryId::random().map_err(|error| Refused::Unavailable {
            why: format!("there is no randomness: {error}").into(),
        })?;
        let new = NewEntry::new(id, &request);
        if new.size() > handle.shared.queue().max_entry_bytes {
            return Err(Refused::Full {
                limit: "maxEntryBytes",
            });
        }
        handle.store.accept(new).await?;
        handle.shared.counters.accepted.fetch_add(1, Ordering::Relaxed);
        handle.shared.wake();
        Ok(Accepted { id })
    }

    async fn awaited(&self, queue: &str) -> Option<Arc<Handle>> {
        let mut reconciled = self.reconciled.subscribe();
        let there = async {
            loop {
                if let Some(handle) = self.find(queue) {
                    return Some(handle);
                }
                reconciled.changed().await.ok()?;
            }
        };
        tokio::time::timeout(OPENING, there).await.ok()?
    }

    /// What became of an entry of any queue; `None` if there is none of this id, or no longer, or it is in a store that
    /// can't be read just now.
    pub async fn status(&self, id: &EntryId) -> Option<EntryStatus> {
        for handle in self.all() {
            if let Ok(Some(state)) = handle.store.state(*id).await {
                let queue = Arc::clone(&handle.shared.name);
                return Some(EntryStatus {
                    id: *id,
                    queue,
                    state,
                });
            }
        }
        None
    }

    /// Entries in order.
    ///
    /// # Errors
    ///
    /// [`QueueError`] says why they can't be read.
    pub async fn list(&self, queue: &str, what: Listing) -> Result<Vec<EntrySummary>, QueueError> {
        let handle = self.named(queue)?;
        handle
            .store
            .list(what)
            .await
            .map_err(|why| handle.unavailable(why))
    }

    /// All of an entry that waits or is dead; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`QueueError`] says why it can't be read.
    pub async fn show(&self, queue: &str, id: &EntryId) -> Result<Option<EntryDetail>, QueueError> {
        let handle = self.named(queue)?;
        handle
            .store
            .detail(*id)
            .await
            .map_err(|why| handle.unavailable(why))
    }

    /// Makes dead letters wait again, at the end of the queue, as if they had just come: attempts and age begin anew.
    /// How many these were: as many as there was room for.
    ///
    /// # Errors
    ///
    /// [`QueueError`] if there was none that could.
    pub async fn retry(&self, queue: &str, which: Which) -> Result<u64, QueueError> {
        let handle = self.named(queue)?;
        let done = handle.store.retry(which).await;
        let (moved, full) = done.map_err(|why| handle.unavailable(why))?;
        handle.shared.wake();
        match full {
            Some(limit) if moved == 0 => Err(QueueError::Full {
                queue: Arc::clone(&handle.shared.name),
                limit,
            }),
            Some(_) | None => Ok(moved),
        }
    }

    /// Drops dead letters, or one entry, be it dead or waiting. How many. An attempt that is under way is not called
    /// back.
    ///
    /// # Errors
    ///
    /// [`QueueError`] says why they can't be dropped.
    pub async fn discard(&self, queue: &str, which: Which) -> Result<u64, QueueError> {
        let handle = self.named(queue)?;
        handle
            .store
            .discard(which)
            .await
            .map_err(|why| handle.unavailable(why))
    }

    /// Every queue as it is now, by name. Numbers are up to a second old where another process has changed them.
    pub fn readings(&self) -> Vec<QueueReading> {
        let now_ms = self.clock.now_ms();
        self.all().iter().map(|handle| handle.reading(now_ms)).collect()
    }

    /// Delivers until [`Self::close`] has ended it, or it is dropped, which cuts off what is under way. To be called
    /// once, on a runtime with time and I/O.
    pub async fn run(self: Arc<Self>) {
        self.running.send_replace(true);
        let _ends = Ends(&self.running);
        let mut closing = self.closing.subscribe();
        let mut tasks = JoinSet::new();
        loop {
            if !*closing.borrow() {
                for handle in self.all() {
                    if !*handle.stop.borrow() && !handle.tended.swap(true, Ordering::Relaxed) {
                        let stop = handle.stop.subscribe();
                        tasks.spawn(deliver::run(handle, Arc::clone(&self.deliver), stop));
                    }
                }
            } else if tasks.is_empty() {
                return;
            }
            tokio::select! {
                () = self.changed.notified() => {}
                () = deliver::stopped(&mut closing), if !*self.closing.borrow() => {}
                Some(ended) = tasks.join_next() => {
                    // A panic there costs what was under way. The pause is for one that comes each time.
                    if let Err(error) = ended {
                        tracing::error!(%error, "a queue's deliveries ended, and begin again");
                        tokio::time::sleep(AGAIN).await;
                    }
                }
            }
        }
    }

    /// Ends delivering in order: nothing new is sent, what is under way ends and is written down, and another process
    /// may deliver. Entries are still accepted.
    pub async fn close(&self) {
        self.closing.send_replace(true);
        for handle in self.all() {
            handle.stop.send_replace(true);
        }
        // The sender is ours.
        let _ = self.running.subscribe().wait_for(|running| !running).await;
    }

    fn all(&self) -> Vec<Arc<Handle>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.values().cloned().collect()
    }

    pub(crate) fn find(&self, queue: &str) -> Option<Arc<Handle>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.get(queue).cloned()
    }

    fn named(&self, queue: &str) -> Result<Arc<Handle>, QueueError> {
        self.find(queue).ok_or_else(|| QueueError::NoSuchQueue {
            queue: queue.chars().take(64).collect(),
        })
    }
}

impl Handle {
    fn unavailable(&self, why: Why) -> QueueError {
        QueueError::Unavailable {
            queue: Arc::clone(&self.shared.name),
            why,
        }
    }

    fn reading(&self, now_ms: u64) -> QueueReading {
        let totals = self.shared.totals.load().as_deref().copied().unwrap_or_default();
        let counters = &self.shared.counters;
        let delivering = self.leading.load(Ordering::Relaxed);
        let age_ms = totals.oldest_ms.map_or(0, |since| now_ms.saturating_sub(since));
        QueueReading {
            queue: Arc::clone(&self.shared.name),
            store: match self.shared.queue().store {
                QueueStore::Sqlite => "sqlite",
                QueueStore::JetStream { .. } => "jetstream",
            },
            state: self.shared.health.text(delivering),
            available: self.shared.health.is_ready(),
            delivering,
            waiting: totals.waiting,
            bytes: totals.bytes,
            dead: totals.dead,
            oldest: Duration::from_millis(age_ms),
            accepted_total: counters.accepted.load(Ordering::Relaxed),
            delivered_total: counters.delivered.load(Ordering::Relaxed),
            dead_total: counters.dead.load(Ordering::Relaxed),
            expired_total: counters.expired.load(Ordering::Relaxed),
        }
    }
}

/// Says that it has ended, however it has.
struct Ends<'a>(&'a watch::Sender<bool>);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

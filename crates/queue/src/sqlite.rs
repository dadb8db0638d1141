//! A queue in one file of SQLite.
//!
//! One thread writes: what comes together shares a transaction and its fsync. Reads go to connections of their own,
//! which WAL lets see the last commit while the next is on its way. Two processes may have a file open, as while one
//! takes over from the other: both accept, and the one that holds the lock beside it delivers.

mod file;
mod tables;
mod writer;

use crate::clock::Clock;
use crate::entry::{EntryDetail, EntryId, EntryState, EntrySummary, Listing, Refused, StoredRequest, Which};
use crate::schedule::Row;
use crate::store::{Fetched, NewEntry, Shared, Totals, Why};
use crate::verdict::Settlement;
use crate::{codec, store};
use file::Place;
use rusqlite::Connection;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use tables::Chosen;
use tokio::sync::{Semaphore, oneshot};
use writer::{Call, Write};

/// Writes that wait for the thread at most; more are refused.
const WRITES: usize = 1024;
/// Bytes of entries that wait for the thread at most; more are refused.
const BYTES: usize = 64 << 20;
/// Reads under way at once; more wait. As many connections are kept.
const READS: usize = 4;

/// A queue's file.
#[derive(Debug)]
pub(crate) struct Sqlite {
    inner: Arc<Inner>,
    writes: mpsc::SyncSender<Box<dyn Write>>,
    reads: Arc<Semaphore>,
    /// Bytes in `writes`.
    pending: Arc<AtomicUsize>,
}

/// What the thread and the rest share.
#[derive(Debug)]
struct Inner {
    place: Place,
    shared: Arc<Shared>,
    clock: Clock,
    /// Counts the files that were opened in this place. Relaxed: a reader that sees an old one reads an old file,
    /// which is what it would have done a moment before.
    generation: AtomicU64,
    /// A reader has met corruption. Relaxed: it is only a hint to look.
    suspect: AtomicBool,
    /// Idle connections for reading, of one generation. Poison is harmless: they are pushed and popped.
    readers: Mutex<(u64, Vec<Connection>)>,
    /// Held while this process delivers. Poison is harmless: it is only ever replaced.
    lock: Mutex<Option<File>>,
}

impl Sqlite {
    /// Opens the file of a queue in `data`, on a thread of its own, which makes it if there is none.
    ///
    /// # Errors
    ///
    /// If the thread can't be started.
    pub(crate) fn open(data: &Path, queue: &str, shared: Arc<Shared>, clock: Clock) -> Result<Self, Why> {
        let (writes, received) = mpsc::sync_channel(WRITES);
        let inner = Arc::new(Inner {
            place: Place::new(data, queue),
            shared,
            clock,
            generation: AtomicU64::new(0),
            suspect: AtomicBool::new(false),
            readers: Mutex::default(),
            lock: Mutex::default(),
        });
        let of_thread = Arc::clone(&inner);
        // It ends when `writes` is dropped, after the writes that were in it.
        std::thread::Builder::new()
            .name(format!("queue {queue}"))
            .spawn(move || writer::run(&of_thread, &received))
            .map_err(|error| format!("can't start a thread: {error}"))?;
        Ok(Self {
            inner,
            writes,
            reads: Arc::new(Semaphore::new(READS)),
            pending: Arc::default(),
        })
    }

    pub(crate) async fn accept(&self, new: NewEntry) -> Result<(), Refused> {
        let size = new.bytes.len();
        let pending = Pending::take(&self.pending, size).ok_or_else(|| Refused::Unavailable {
            why: format!("{BYTES} bytes wait to be written").into(),
        })?;
        let (shared, clock) = (Arc::clone(&self.inner.shared), self.inner.clock);
        let done = self
            .write(move |db| {
                // Given back when this is dropped, which is when it has been written.
                let _ = &pending;
                tables::accept(db, &new, &shared.queue(), clock.now_ms())
            })
            .await;
        match done {
            Ok(Ok(())) => Ok(()),
            Ok(Err(limit)) => Err(Refused::Full { limit }),
            Err(why) => Err(Refused::Unavailable { why }),
        }
    }

    pub(crate) async fn state(&self, id: EntryId) -> Result<Option<EntryState>, Why> {
        let (shared, now_ms) = (Arc::clone(&self.inner.shared), self.inner.clock.now_ms());
        self.read(move |db| tables::state(db, id, &shared.queue(), now_ms))
            .await
    }

    pub(crate) async fn detail(&self, id: EntryId) -> Result<Option<EntryDetail>, Why> {
        self.read(move |db| tables::detail(db, id)).await
    }

    pub(crate) async fn list(&self, what: Listing) -> Result<Vec<EntrySummary>, Why> {
        self.read(move |db| tables::list(db, what)).await
    }

    pub(crate) async fn retry(&self, which: Which) -> Result<(u64, Option<&'static str>), Why> {
        let (chosen, mut all) = (self.chosen(which).await?, 0);
        loop {
            let (shared, now_ms) = (Arc::clone(&self.inner.shared), self.inner.clock.now_ms());
            let (moved, full) = self
                .write(move |db| tables::retry(db, chosen, &shared.queue(), now_ms))
                .await?;
            all += moved;
            if full.is_some() || moved < tables::CHUNK {
                return Ok((all, full));
            }
        }
    }

    pub(crate) async fn discard(&self, which: Which) -> Result<u64, Why> {
        let (chosen, mut all) = (self.chosen(which).await?, 0);
        loop {
            let (gone, waited) = self.write(move |db| tables::discard(db, chosen)).await?;
            all += gone;
            if let Some(seq) = waited {
                self.inner.shared.removed(seq);
            }
            if gone < tables::CHUNK {
                return Ok(all);
            }
        }
    }

    async fn chosen(&self, which: Which) -> Result<Chosen, Why> {
        match which {
            Which::One(id) => Ok(Chosen::One(id)),
            Which::AllDead => {
                let last = self.read(tables::last_dead).await?;
                Ok(Chosen::Dead { last })
            }
        }
    }

    /// Becomes the one that delivers. False if another process, or an older queue of this name, still does.
    pub(crate) async fn lead(&self) -> Result<bool, Why> {
        let inner = Arc::clone(&self.inner);
        let locked = tokio::task::spawn_blocking(move || inner.try_lock());
        match locked.await {
            Ok(Ok(locked)) => Ok(locked),
            Ok(Err(error)) => {
                Err(format!("can't lock {}: {error}", self.inner.place.lock().display()).into())
            }
            Err(error) => Err(format!("can't lock: {error}").into()),
        }
    }

    /// Lets another deliver.
    pub(crate) fn resign(&self) {
        *self.inner.lock.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) async fn fetch(&self, after: u64, limit: usize) -> Result<Fetched, Why> {
        let generation = self.inner.generation.load(Ordering::Relaxed);
        let rows: Vec<Row> = self.read(move |db| tables::fetch(db, after, limit)).await?;
        // Opened, or replaced, in between: by the number of before, all that is sent of this would be void to the next fetch,
        // and be sent once more.
        if self.inner.generation.load(Ordering::Relaxed) != generation {
            return Err(self.inner.shared.health.why());
        }
        Ok(Fetched { generation, rows })
    }

    pub(crate) async fn load(
        &self,
        seq: u64,
        id: EntryId,
    ) -> Result<Option<StoredRequest>, store::LoadError> {
        let bytes = self.read(move |db| tables::load(db, seq, id)).await;
        let bytes = bytes.map_err(store::LoadError::Unavailable)?;
        bytes
            .map(|bytes| {
                codec::decode(bytes).map_err(|error| store::LoadError::Unreadable(error.to_string().into()))
            })
            .transpose()
    }

    pub(crate) async fn settle(&self, place: (u64, EntryId), settlement: Settlement) -> Result<(), Why> {
        let (shared, clock) = (Arc::clone(&self.inner.shared), self.inner.clock);
        self.write(move |db| tables::settle(db, place, &settlement, &shared.queue(), clock.now_ms()))
            .await
            .map(drop)
    }

    /// Does it in the next transaction, and answers once that is durable.
    async fn write<T: Send + 'static>(
        &self,
        work: impl Fn(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Why> {
        let (reply, answer) = oneshot::channel();
        self.writes
            .try_send(Box::new(Call::new(work, reply)))
            .map_err(|error| match error {
                mpsc::TrySendError::Full(_) => format!("{WRITES} writes wait for the disk"),
                mpsc::TrySendError::Disconnected(_) => "its thread has ended".to_owned(),
            })?;
        answer
            .await
            .unwrap_or_else(|_| Err("its thread has ended".into()))
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Why> {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.reads).acquire_owned().await;
        let inner = Arc::clone(&self.inner);
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            inner.read(work)
        });
        done.await
            .unwrap_or_else(|error| Err(format!("reading failed: {error}").into()))
    }
}

impl Inner {
    fn try_lock(&self) -> std::io::Result<bool> {
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if held.is_some() {
            return Ok(true);
        }
        let file = self.place.open_lock()?;
        match file.try_lock() {
            Ok(()) => {
                *held = Some(file);
                Ok(true)
            }
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn read<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, Why> {
        let generation = self.generation.load(Ordering::Relaxed);
        if generation == 0 {
            return Err(self.shared.health.why());
        }
        let idle = {
            let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
            if readers.0 != generation {
                *readers = (generation, Vec::new());
            }
            readers.1.pop()
        };
        let opened = idle.map_or_else(|| self.place.open_reader(), Ok);
        let done = opened.and_then(|reader| work(&reader).map(|value| (reader, value)));
        match done {
            Ok((reader, value)) => {
                let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
                if readers.0 == generation && readers.1.len() < READS {
                    readers.1.push(reader);
                }
                Ok(value)
            }
            Err(error) => {
                if file::is_corrupt(&error) {
                    self.suspect.store(true, Ordering::Relaxed);
                }
                Err(file::explain(&error))
            }
        }
    }

    fn set_totals(&self, totals: Totals) {
        self.shared.totals.store(Some(Arc::new(totals)));
    }
}

/// Bytes that wait to be written, until dropped.
#[derive(Debug)]
struct Pending {
    all: Arc<AtomicUsize>,
    size: usize,
}

impl Pending {
    fn take(all: &Arc<AtomicUsize>, size: usize) -> Option<Self> {
        // Relaxed: only the number counts. Once above the bound it is given back by the drop below.
        let before = all.fetch_add(size, Ordering::Relaxed);
        let taken = Self {
            all: Arc::clone(all),
            size,
        };
        (before == 0 || before + size <= BYTES).then_some(taken)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.all.fetch_sub(self.size, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::model::Queue;
    use std::time::Duration;

    #[tokio::test]
    async fn what_is_fetched_while_the_file_is_being_opened_is_of_no_other_file() {
        let name = format!("leeward-queue-{}-opening", std::process::id());
        let dir = std::env::temp_dir().join(name);
        let shared = Arc::new(Shared::new("orders".into(), Arc::new(Queue::DEFAULT)));
        let store = Sqlite::open(&dir, "orders", shared, Clock::new()).unwrap();
        let opened = async {
            while store.fetch(0, 1).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), opened)
            .await
            .unwrap();
        let now = store.inner.generation.swap(0, Ordering::Relaxed);
        let all = u32::try_from(READS).unwrap();
        // It is opened between the look at which file it is and the read of it.
        let readers = Arc::clone(&store.reads).acquire_many_owned(all).await.unwrap();
        let open = async {
            store.inner.generation.store(now, Ordering::Relaxed);
            drop(readers);
        };
        let (fetched, ()) = tokio::join!(biased; store.fetch(0, 1), open);
        assert!(
            !fetched.as_ref().is_ok_and(|fetched| fetched.generation != now),
            "{fetched:?}"
        );
        drop(store);
        std::fs::remove_dir_all(dir).unwrap();
    }
}

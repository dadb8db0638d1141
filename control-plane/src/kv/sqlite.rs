//! One file with SQLite, for one control plane.

use super::{
    BoxFuture, Compare, Entry, Event, Gate, KvError, LeaseId, Op, Page, Txn, WatchError, prefix_end,
};
use crate::store::legacy;
use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Row, Transaction, params};
use std::collections::{HashMap, VecDeque};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// The version of the file's own tables. Those up to 4 had a table for each kind of thing.
const SCHEMA: i64 = 5;
/// The last version with a table for each kind of thing.
const LAST_LEGACY: i64 = 4;
/// Connections for reading that are kept.
const READERS: usize = 4;
/// Changes that are kept for watches that lag.
const MAX_EVENTS: usize = 10_000;
/// The same in bytes of values.
const MAX_EVENT_BYTES: usize = 16 << 20;
/// Space that a write ahead log gives back once it is not needed, in bytes above this.
const WAL_KEPT: u32 = 64 << 20;

const TABLES: &str = "
    CREATE TABLE kv (
        key BLOB NOT NULL UNIQUE, value BLOB NOT NULL, created INTEGER NOT NULL, modified INTEGER NOT NULL,
        lease INTEGER NOT NULL
    );
    CREATE INDEX kv_by_lease ON kv (lease) WHERE lease <> 0;
    CREATE TABLE kv_revision (revision INTEGER NOT NULL);
    INSERT INTO kv_revision VALUES (1);";

/// The file, and what is known of it in memory.
#[derive(Debug)]
pub struct Sqlite {
    path: PathBuf,
    /// Held as long as the file is open: another writer would give out the same revisions. The system releases it however
    /// the process ends.
    _lock: File,
    writer: Mutex<Connection>,
    readers: Mutex<Vec<Connection>>,
    /// No other lock is taken while this is held.
    leases: Mutex<Leases>,
    ring: Mutex<Ring>,
    gate: OnceLock<Gate>,
    /// The revision of the last write.
    revision: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Leases {
    last: i64,
    held: HashMap<i64, Lease>,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    ttl: Duration,
    ends: Instant,
}

/// The last changes.
#[derive(Debug)]
struct Ring {
    events: VecDeque<(u64, Event)>,
    bytes: usize,
    /// Everything after this revision is there.
    after: u64,
}

impl Sqlite {
    /// Opens the file in a directory, and makes it if there is none.
    pub(super) fn open(dir: &Path) -> Result<Self, KvError> {
        std::fs::create_dir_all(dir).map_err(|error| directory(dir, &error))?;
        let lock = lock(dir)?;
        let path = dir.join("leeward.db");
        let failed = |act| move |error| failed(&dir.join("leeward.db"), act, &error);
        let mut writer = Connection::open(&path).map_err(failed("open"))?;
        // WAL with synchronous=FULL: readers don't wait for the writer, and a commit that returned survives
        // kill -9 and a power cut.
        writer
            .execute_batch(&format!(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA busy_timeout=5000;
                 PRAGMA journal_size_limit={WAL_KEPT};"
            ))
            .map_err(failed("set up"))?;
        migrate(&mut writer, &path)?;
        // Their holders were of the process before.
        writer
            .execute("DELETE FROM kv WHERE lease <> 0", [])
            .map_err(failed("end leases"))?;
        let revision = writer
            .query_row("SELECT revision FROM kv_revision", [], |row| row.get(0))
            .map(unsigned)
            .map_err(failed("read its revision"))?;
        Ok(Self {
            path,
            _lock: lock,
            writer: Mutex::new(writer),
            readers: Mutex::default(),
            leases: Mutex::default(),
            ring: Mutex::new(Ring {
                events: VecDeque::new(),
                bytes: 0,
                after: revision,
            }),
            gate: OnceLock::new(),
            revision: watch::Sender::new(revision),
        })
    }

    pub(super) async fn get(self: &Arc<Self>, key: String) -> Result<Option<Entry>, KvError> {
        self.expire().await?;
        self.blocking(move |kv| {
            kv.read("read", |db| {
                db.query_row(
                    "SELECT key, value, created, modified FROM kv WHERE key=?1",
                    [key.as_bytes()],
                    entry,
                )
                .optional()
            })
        })
        .await
    }

    pub(super) async fn range(
        self: &Arc<Self>,
        prefix: String,
        after: Option<String>,
        limit: usize,
        keys_only: bool,
    ) -> Result<Page, KvError> {
        self.expire().await?;
        self.blocking(move |kv| {
            kv.read("read", |db| {
                let tx = db.transaction()?;
                let value = if keys_only { "x''" } else { "value" };
                let mut query = tx.prepare_cached(&format!(
                    "SELECT key, {value}, created, modified FROM kv
                     WHERE key >= ?1 AND key > ?2 AND key < ?3 ORDER BY key LIMIT ?4"
                ))?;
                let after = after.unwrap_or_default();
                let end = match prefix.as_str() {
                    "" => vec![u8::MAX],
                    prefix => prefix_end(prefix),
                };
                let most = i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1);
                let rows = query.query_map(params![prefix.as_bytes(), after.as_bytes(), end, most], entry)?;
                let mut entries = rows.collect::<Result<Vec<_>, _>>()?;
                let more = entries.len() > limit;
                entries.truncate(limit);
                let revision = tx.query_row("SELECT revision FROM kv_revision", [], |row| row.get(0))?;
                Ok(Page {
                    entries,
                    more,
                    revision: unsigned(revision),
                })
            })
        })
        .await
    }

    pub(super) async fn txn(self: &Arc<Self>, txn: Txn) -> Result<Option<u64>, KvError> {
        let Some(gate) = self.gate.get() else {
            return self.txn_unguarded(txn).await;
        };
        let place = self.path.display().to_string();
        if let Err(reason) = gate.ask() {
            return Err(KvError::Unavailable { place, reason });
        }
        let done = self.txn_unguarded(txn).await?;
        // It may have taken long: whoever was let by then may be nobody now.
        match gate.ask() {
            Err(reason) if done.is_some() => Err(KvError::Unknown { place, reason }),
            Ok(()) | Err(_) => Ok(done),
        }
    }

    pub(super) async fn txn_unguarded(self: &Arc<Self>, txn: Txn) -> Result<Option<u64>, KvError> {
        self.expire().await?;
        self.blocking(move |kv| kv.commit(&txn)).await
    }

    pub(super) fn guard(&self, gate: Gate) {
        // The first stays.
        let _ = self.gate.set(gate);
    }

    fn commit(&self, txn: &Txn) -> Result<Option<u64>, KvError> {
        let failed = |act| move |error| failed(&self.path, act, &error);
        let mut writer = locked(&self.writer);
        let tx = writer.transaction().map_err(failed("begin"))?;
        for compare in &txn.compares {
            let (key, column, wanted) = match compare {
                Compare::Modified(key, wanted) => (key, "modified", *wanted),
                Compare::Created(key, wanted) => (key, "created", *wanted),
            };
            let found: Option<i64> = tx
                .query_row(
                    &format!("SELECT {column} FROM kv WHERE key=?1"),
                    [key.as_bytes()],
                    |row| row.get(0),
                )
                .optional()
                .map_err(failed("compare"))?;
            if found.map_or(0, unsigned) != wanted {
                return Ok(None);
            }
        }
        let last = *self.revision.borrow();
        if txn.ops.is_empty() {
            return Ok(Some(last));
        }
        let revision = last + 1;
        let mut events = Vec::with_capacity(txn.ops.len());
        for op in &txn.ops {
            let lease = match op {
                Op::Put { lease, .. } => *lease,
                Op::Delete(_) | Op::DeletePrefix(_) => None,
            };
            if let Some(LeaseId(id)) = lease
                && !locked(&self.leases).held.contains_key(&id)
            {
                return Err(KvError::Failed {
                    place: self.path.display().to_string(),
                    act: "write with a lease",
                    reason: "the lease has ended".to_owned(),
                });
            }
            apply(&tx, op, revision, &mut events).map_err(failed("write"))?;
        }
        tx.execute("UPDATE kv_revision SET revision=?1", [signed(revision)])
            .map_err(failed("write"))?;
        tx.commit().map_err(|error| {
            // What could not be synced may be on disk all the same; what could not be written isn't.
            let code = error.sqlite_error().map(|error| error.extended_code);
            let is_unknown = code == Some(rusqlite::ffi::SQLITE_IOERR_FSYNC);
            let error = failed("commit")(error);
            if let (true, KvError::Unavailable { place, reason }) = (is_unknown, &error) {
                let (place, reason) = (place.clone(), reason.clone());
                return KvError::Unknown { place, reason };
            }
            error
        })?;
        // Still under the writer's lock, so that events are in the order of revisions.
        let mut ring = locked(&self.ring);
        for event in events {
            ring.push(revision, event);
        }
        drop(ring);
        self.revision.send_replace(revision);
        drop(writer);
        Ok(Some(revision))
    }

    pub(super) fn grant(&self, ttl: Duration) -> LeaseId {
        let mut leases = locked(&self.leases);
        leases.last += 1;
        let (id, ends) = (leases.last, Instant::now() + ttl);
        leases.held.insert(id, Lease { ttl, ends });
        LeaseId(id)
    }

    pub(super) async fn keep_alive(self: &Arc<Self>, LeaseId(id): LeaseId) -> Result<bool, KvError> {
        self.expire().await?;
        let mut leases = locked(&self.leases);
        Ok(match leases.held.get_mut(&id) {
            Some(lease) => {
                lease.ends = Instant::now() + lease.ttl;
                true
            }
            None => false,
        })
    }

    pub(super) async fn revoke(self: &Arc<Self>, LeaseId(id): LeaseId) -> Result<(), KvError> {
        if let Some(lease) = locked(&self.leases).held.get_mut(&id) {
            lease.ends = Instant::now();
        }
        self.expire().await
    }

    /// Ends leases whose time is over, with their keys.
    async fn expire(self: &Arc<Self>) -> Result<(), KvError> {
        let now = Instant::now();
        if !locked(&self.leases).held.values().any(|lease| lease.ends <= now) {
            return Ok(());
        }
        self.blocking(move |kv| kv.end_leases(now)).await
    }

    fn end_leases(&self, now: Instant) -> Result<(), KvError> {
        // First, so that nothing more is written with them; where their keys can't be deleted, they are tried again.
        let over: Vec<(i64, Lease)> = {
            let mut leases = locked(&self.leases);
            let over: Vec<_> = leases
                .held
                .iter()
                .filter(|(_, lease)| lease.ends <= now)
                .map(|(id, lease)| (*id, *lease))
                .collect();
            for (id, _) in &over {
                leases.held.remove(id);
            }
            over
        };
        let mut txn = Txn::default();
        let found = self.read("read leases", |db| {
            let mut query = db.prepare_cached("SELECT key FROM kv WHERE lease=?1")?;
            let mut keys = Vec::new();
            for (id, _) in &over {
                for key in query.query_map([id], |row| row.get::<_, Vec<u8>>(0))? {
                    keys.push(String::from_utf8_lossy(&key?).into_owned());
                }
            }
            Ok(keys)
        });
        let done = found.and_then(|keys| {
            txn.ops.extend(keys.into_iter().map(Op::Delete));
            self.commit(&txn)
        });
        if let Err(error) = done {
            locked(&self.leases).held.extend(over);
            return Err(error);
        }
        Ok(())
    }

    pub(super) fn compact(&self, revision: u64) {
        let mut ring = locked(&self.ring);
        while ring.events.front().is_some_and(|(at, _)| *at <= revision) {
            ring.pop();
        }
        ring.after = ring.after.max(revision.min(*self.revision.borrow()));
    }

    pub(super) fn watch(this: &Arc<Self>, prefix: &str, from: u64) -> Tail {
        Tail {
            revisions: this.revision.subscribe(),
            kv: Arc::clone(this),
            prefix: prefix.to_owned(),
            from,
        }
    }

    fn read<T>(
        &self,
        act: &'static str,
        query: impl FnOnce(&mut Connection) -> rusqlite::Result<T>,
    ) -> Result<T, KvError> {
        let failed = |act| move |error| failed(&self.path, act, &error);
        let idle = locked(&self.readers).pop();
        let mut reader = match idle {
            Some(reader) => reader,
            None => {
                let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
                let reader = Connection::open_with_flags(&self.path, flags).map_err(failed("open"))?;
                reader
                    .execute_batch("PRAGMA busy_timeout=5000;")
                    .map_err(failed("set up"))?;
                reader
            }
        };
        let result = query(&mut reader).map_err(failed(act))?;
        let mut readers = locked(&self.readers);
        if readers.len() < READERS {
            readers.push(reader);
        }
        Ok(result)
    }

    /// Off the runtime, and to the end: a task of this kind can't be cancelled.
    fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        act: impl FnOnce(&Self) -> Result<T, KvError> + Send + 'static,
    ) -> BoxFuture<Result<T, KvError>> {
        let kv = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || act(&kv));
        let place = self.path.display().to_string();
        Box::pin(async move {
            task.await.unwrap_or_else(|error| {
                Err(KvError::Unknown {
                    place,
                    reason: format!("the task that did it broke down: {error}"),
                })
            })
        })
    }
}

impl Ring {
    fn push(&mut self, revision: u64, event: Event) {
        self.bytes += size(&event);
        self.events.push_back((revision, event));
        while self.events.len() > MAX_EVENTS || self.bytes > MAX_EVENT_BYTES {
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some((revision, event)) = self.events.pop_front() {
            self.bytes -= size(&event);
            self.after = self.after.max(revision);
        }
    }
}

fn size(event: &Event) -> usize {
    match event {
        Event::Put(entry) => entry.key.len() + entry.value.len(),
        Event::Delete { key, .. } => key.len(),
    }
}

/// The changes of a prefix from a revision on.
#[derive(Debug)]
pub(super) struct Tail {
    kv: Arc<Sqlite>,
    prefix: String,
    from: u64,
    revisions: watch::Receiver<u64>,
}

impl Tail {
    pub(super) async fn next(&mut self) -> Result<Vec<Event>, WatchError> {
        loop {
            let current = *self.revisions.borrow_and_update();
            let events = self.events(current)?;
            self.from = self.from.max(current + 1);
            if !events.is_empty() {
                return Ok(events);
            }
            // The sender is in `kv`.
            if self.revisions.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn events(&self, current: u64) -> Result<Vec<Event>, WatchError> {
        let ring = locked(&self.kv.ring);
        if self.from <= ring.after {
            return Err(WatchError::Compacted(ring.after));
        }
        let news = ring.events.iter().rev();
        // Those that came after `current` was read are told next time.
        let news = news
            .skip_while(|(revision, _)| *revision > current)
            .take_while(|(revision, _)| *revision >= self.from);
        let mut events: Vec<Event> = news
            .filter(|(_, event)| match event {
                Event::Put(entry) => entry.key.starts_with(&self.prefix),
                Event::Delete { key, .. } => key.starts_with(&self.prefix),
            })
            .map(|(_, event)| event.clone())
            .collect();
        events.reverse();
        Ok(events)
    }
}

/// Writes a key inside a transaction of the file; for a migration.
pub(crate) fn put_raw(tx: &Transaction<'_>, key: &str, value: &[u8], revision: u64) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO kv (key, value, created, modified, lease) VALUES (?1, ?2, ?3, ?3, 0)
         ON CONFLICT (key) DO UPDATE SET value=?2, modified=?3",
    )?
    .execute(params![key.as_bytes(), value, signed(revision)])
    .map(drop)
}

fn apply(tx: &Transaction<'_>, op: &Op, revision: u64, events: &mut Vec<Event>) -> rusqlite::Result<()> {
    match op {
        Op::Put { key, value, lease } => {
            let lease = lease.map_or(0, |LeaseId(id)| id);
            let created: i64 = tx
                .prepare_cached(
                    "INSERT INTO kv (key, value, created, modified, lease) VALUES (?1, ?2, ?3, ?3, ?4)
                     ON CONFLICT (key) DO UPDATE SET value=?2, modified=?3, lease=?4 RETURNING created",
                )?
                .query_row(
                    params![key.as_bytes(), value.as_ref(), signed(revision), lease],
                    |row| row.get(0),
                )?;
            events.push(Event::Put(Entry {
                key: key.clone(),
                value: value.clone(),
                created: unsigned(created),
                modified: revision,
            }));
        }
        Op::Delete(key) => {
            let deleted = tx.execute("DELETE FROM kv WHERE key=?1", [key.as_bytes()])?;
            if deleted > 0 {
                events.push(Event::Delete {
                    key: key.clone(),
                    modified: revision,
                });
            }
        }
        Op::DeletePrefix(prefix) => {
            let mut query = tx.prepare_cached("DELETE FROM kv WHERE key >= ?1 AND key < ?2 RETURNING key")?;
            let rows = query.query_map(params![prefix.as_bytes(), prefix_end(prefix)], |row| {
                row.get::<_, Vec<u8>>(0)
            })?;
            for key in rows {
                events.push(Event::Delete {
                    key: String::from_utf8_lossy(&key?).into_owned(),
                    modified: revision,
                });
            }
        }
    }
    Ok(())
}

fn migrate(db: &mut Connection, path: &Path) -> Result<(), KvError> {
    let failed = |error| failed(path, "migrate", &error);
    let tx = db.transaction().map_err(failed)?;
    let found: i64 = tx
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(failed)?;
    if found > SCHEMA {
        return Err(KvError::Schema {
            path: path.to_owned(),
            found,
            known: SCHEMA,
        });
    }
    if found < SCHEMA {
        tx.execute_batch(TABLES).map_err(failed)?;
        if (1..=LAST_LEGACY).contains(&found) {
            tracing::info!(path = %path.display(), from = found, to = SCHEMA, "the store is brought up to date");
            legacy::migrate(&tx, found).map_err(failed)?;
        }
        tx.execute_batch(&format!("PRAGMA user_version = {SCHEMA};"))
            .map_err(failed)?;
    }
    tx.commit().map_err(failed)
}

fn lock(dir: &Path) -> Result<File, KvError> {
    let path = dir.join("leeward.lock");
    let file = File::create(&path).map_err(|error| directory(&path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(KvError::InUse { path }),
        Err(TryLockError::Error(error)) => Err(directory(&path, &error)),
    }
}

fn directory(path: &Path, error: &std::io::Error) -> KvError {
    KvError::Directory {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

fn failed(path: &Path, act: &'static str, error: &rusqlite::Error) -> KvError {
    let place = path.display().to_string();
    let reason = error.to_string();
    // What is of the machine and passes, and what is of the file and stays.
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => KvError::Full { place, reason },
        Some(
            ErrorCode::SystemIoFailure
            | ErrorCode::CannotOpen
            | ErrorCode::ReadOnly
            | ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::OutOfMemory
            | ErrorCode::PermissionDenied,
        ) => KvError::Unavailable { place, reason },
        Some(_) | None => KvError::Failed { place, act, reason },
    }
}

fn entry(row: &Row<'_>) -> rusqlite::Result<Entry> {
    Ok(Entry {
        key: String::from_utf8_lossy(row.get_ref(0)?.as_blob()?).into_owned(),
        value: Bytes::from(row.get::<_, Vec<u8>>(1)?),
        created: unsigned(row.get(2)?),
        modified: unsigned(row.get(3)?),
    })
}

/// SQLite's integers are signed; revisions stay far below the difference.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

// Poison is harmless: what is guarded is replaced whole, and a transaction that was not committed is undone.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Resources and their revisions, on disk.
//!
//! A revisioned key-value store: one counter for all writes, compare-and-swap on a resource's own revision,
//! and the changes since any revision, deletions included. Behind it is SQLite in one file.

mod certificates;
mod levels;
mod modules;

pub use certificates::{IssuedRow, NewToken, TokenUse};
pub use levels::{Hold, Judged, LevelChange, LevelWrites, Place};
pub use modules::{CHUNK, StoredModule};

use leeward_policy::{Key, Kind};
use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, params};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// Why the store could not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database said no.
    #[error("the store failed to {act}: {source}")]
    Database {
        /// What was being done.
        act: &'static str,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The data directory can't be used.
    #[error("can't use {path}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another process has it open.
    #[error("{path} is in use by another control plane; a store has one at a time")]
    InUse {
        /// The lock's file.
        path: PathBuf,
    },
    /// Written by a later version.
    #[error("{path} has schema {found}, and this build knows up to {SCHEMA}: use a later build")]
    Schema {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: i64,
    },
    /// A revision precondition failed.
    #[error("{key} is at revision {found}, not {wanted}")]
    Conflict {
        /// The resource.
        key: Key,
        /// The revision that was expected.
        wanted: u64,
        /// The revision that is there; 0 for none.
        found: u64,
    },
    /// There is no room for another module.
    #[error("the module has {size} bytes, and the modules that are kept take {used} of {limit} in {count}")]
    Full {
        /// The module's size in bytes.
        size: u64,
        /// What the others take.
        used: u64,
        /// What all may take.
        limit: u64,
        /// How many there are.
        count: u64,
    },
    /// A module is signed by more keys than anybody has.
    #[error("the module has {0} signatures already")]
    Signatures(u64),
    /// There are as many join tokens as may be.
    #[error("{0} join tokens wait to be used already; let some end, or use them")]
    Tokens(u64),
}

/// A resource as it is stored.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Stored {
    /// Its name.
    pub key: Key,
    /// The revision of its last change.
    pub revision: u64,
    /// What was applied, as protobuf.
    pub payload: Vec<u8>,
    /// When it was first applied, in milliseconds since 1970.
    pub created_ms: i64,
    /// When it last changed, likewise.
    pub updated_ms: i64,
}

/// One write of a transaction.
#[derive(Clone, Debug)]
pub struct Write {
    /// The resource.
    pub key: Key,
    /// What it becomes; `None` deletes it.
    pub payload: Option<Vec<u8>>,
    /// The revision that must be there; 0 for any.
    pub expect: u64,
}

/// What changed after a revision.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Up to and with this revision.
    pub to: u64,
    /// Created or changed, by revision.
    pub upserts: Vec<Stored>,
    /// Deleted, with the revision of the deletion.
    pub deletes: Vec<(u64, Key)>,
}

/// The version of the tables below.
const SCHEMA: i64 = 4;
/// Deletions that are remembered. A proxy that has been away for more gets everything anew.
const MAX_TOMBSTONES: u64 = 100_000;
/// Connections for reading that are kept.
const READERS: usize = 4;

/// The store. All its functions block: call them where that is allowed.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    id: String,
    /// Held as long as the store is open: a second writer would give out the same revisions. The system
    /// releases it however the process ends.
    _lock: File,
    writer: Mutex<Connection>,
    readers: Mutex<Vec<Connection>>,
    revision: watch::Sender<u64>,
    /// What modules may take together, in bytes.
    modules_limit: u64,
}

impl Store {
    /// Opens the store in a directory, and makes it if there is none.
    ///
    /// # Errors
    ///
    /// If the directory or the file can't be used.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(dir).map_err(|source| StoreError::Directory {
            path: dir.to_owned(),
            source,
        })?;
        let lock = lock(dir)?;
        let path = dir.join("leeward.db");
        let mut writer = Connection::open(&path).map_err(failed("open"))?;
        // WAL with synchronous=FULL: readers don't wait for the writer, and a commit that returned survives
        // kill -9 and a power cut.
        writer
            .execute_batch("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA busy_timeout=5000;")
            .map_err(failed("set up"))?;
        let id = migrate(&mut writer, &path)?;
        let revision = meta(&writer, "revision")
            .map_err(failed("read its revision"))?
            .unwrap_or(0);
        Ok(Self {
            path,
            id,
            _lock: lock,
            writer: Mutex::new(writer),
            readers: Mutex::default(),
            revision: watch::Sender::new(revision),
            modules_limit: modules::DEFAULT_LIMIT,
        })
    }

    /// With another bound for what modules may take together, in bytes. What is there already stays.
    #[must_use]
    pub const fn with_modules_limit(mut self, bytes: u64) -> Self {
        self.modules_limit = bytes;
        self
    }

    /// Distinguishes this store from every other.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The revision of the last write.
    pub fn revision(&self) -> u64 {
        *self.revision.borrow()
    }

    /// Tells of every write.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Does all writes, or none. Returns the revision of what was written.
    ///
    /// # Errors
    ///
    /// [`StoreError::Conflict`] if a precondition fails; nothing is written then.
    pub fn write(&self, writes: &[Write]) -> Result<u64, StoreError> {
        self.write_with(writes, &LevelWrites::default())
    }

    /// The same, together with what the writes mean for degradation levels.
    ///
    /// # Errors
    ///
    /// As for [`Store::write`].
    pub fn write_with(&self, writes: &[Write], levels: &LevelWrites) -> Result<u64, StoreError> {
        if writes.is_empty() {
            if !levels.is_empty() {
                self.write_levels(levels)?;
            }
            return Ok(self.revision());
        }
        let mut writer = self.writer();
        let tx = writer.transaction().map_err(failed("begin"))?;
        let revision = self.revision() + 1;
        let now = now_ms();
        for write in writes {
            let (kind, name) = (code(write.key.kind), write.key.name.as_str());
            let found: u64 = tx
                .query_row(
                    "SELECT revision FROM resources WHERE kind=?1 AND name=?2",
                    params![kind, name],
                    |row| row.get::<_, i64>(0),
                )
                .optional()
                .map_err(failed("read"))?
                .map_or(0, unsigned);
            if write.expect != 0 && write.expect != found {
                return Err(StoreError::Conflict {
                    key: write.key.clone(),
                    wanted: write.expect,
                    found,
                });
            }
            match &write.payload {
                Some(payload) => {
                    tx.execute(
                        "INSERT INTO resources (kind, name, revision, payload, created_ms, updated_ms)
                         VALUES (?1, ?2, ?3, ?4, ?5, ?5)
                         ON CONFLICT (kind, name) DO UPDATE SET revision=?3, payload=?4, updated_ms=?5",
                        params![kind, name, signed(revision), payload, now],
                    )
                    .map_err(failed("write"))?;
                    // It is back; a tombstone beside it would delete it again for those who come late.
                    tx.execute(
                        "DELETE FROM tombstones WHERE kind=?1 AND name=?2",
                        params![kind, name],
                    )
                    .map_err(failed("write"))?;
                }
                None => {
                    tx.execute(
                        "DELETE FROM resources WHERE kind=?1 AND name=?2",
                        params![kind, name],
                    )
                    .map_err(failed("delete"))?;
                    tx.execute(
                        "INSERT OR REPLACE INTO tombstones (kind, name, revision) VALUES (?1, ?2, ?3)",
                        params![kind, name, signed(revision)],
                    )
                    .map_err(failed("delete"))?;
                }
            }
        }
        if writes.iter().any(|write| write.payload.is_none()) {
            compact(&tx).map_err(failed("compact"))?;
        }
        levels.write(&tx, now).map_err(failed("write levels"))?;
        set_meta(&tx, "revision", revision).map_err(failed("write"))?;
        tx.commit().map_err(failed("commit"))?;
        drop(writer);
        self.revision.send_replace(revision);
        Ok(revision)
    }

    /// One resource.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn get(&self, key: &Key) -> Result<Option<Stored>, StoreError> {
        self.read("read", |db| {
            db.query_row(
                "SELECT kind, name, revision, payload, created_ms, updated_ms FROM resources WHERE kind=?1 AND name=?2",
                params![code(key.kind), key.name.as_str()],
                stored,
            )
            .optional()
        })
    }

    /// Resources of a kind, or of all, by kind and name, from after a place; and the revision that this shows.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn list(
        &self,
        kind: Option<Kind>,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<(Vec<Stored>, u64), StoreError> {
        self.read("list", |db| {
            let tx = db.transaction()?;
            let (from_kind, from_name) = after.map_or((-1, ""), |key| (code(key.kind), key.name.as_str()));
            let mut query = tx.prepare(
                "SELECT kind, name, revision, payload, created_ms, updated_ms FROM resources
                 WHERE (?1 IS NULL OR kind=?1) AND (kind, name) > (?2, ?3) ORDER BY kind, name LIMIT ?4",
            )?;
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let rows = query.query_map(params![kind.map(code), from_kind, from_name, limit], stored)?;
            let rows = rows.collect::<Result<Vec<_>, _>>()?;
            let revision = meta(&tx, "revision")?.unwrap_or(0);
            Ok((rows, revision))
        })
    }

    /// What changed after a revision; `None` if deletions that old are forgotten.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn changes_since(&self, after: u64) -> Result<Option<Changes>, StoreError> {
        self.read("read changes", |db| {
            let tx = db.transaction()?;
            if after < meta(&tx, "compacted")?.unwrap_or(0) {
                return Ok(None);
            }
            changes(&tx, after).map(Some)
        })
    }

    /// Everything there is, and every deletion that is remembered.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn everything(&self) -> Result<Changes, StoreError> {
        self.read("read everything", |db| changes(&db.transaction()?, 0))
    }

    fn writer(&self) -> MutexGuard<'_, Connection> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read<T>(
        &self,
        act: &'static str,
        query: impl FnOnce(&mut Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let idle = self.readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
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
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if readers.len() < READERS {
            readers.push(reader);
        }
        Ok(result)
    }
}

fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("leeward.lock");
    let file = File::create(&path).map_err(|source| StoreError::Directory {
        path: path.clone(),
        source,
    })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse { path }),
        Err(TryLockError::Error(source)) => Err(StoreError::Directory { path, source }),
    }
}

fn changes(tx: &Transaction<'_>, after: u64) -> rusqlite::Result<Changes> {
    let mut query = tx.prepare(
        "SELECT kind, name, revision, payload, created_ms, updated_ms FROM resources WHERE revision > ?1 ORDER BY revision",
    )?;
    let upserts = query
        .query_map([signed(after)], stored)?
        .collect::<Result<Vec<_>, _>>()?;
    let mut query =
        tx.prepare("SELECT revision, kind, name FROM tombstones WHERE revision > ?1 ORDER BY revision")?;
    let deletes = query
        .query_map([signed(after)], |row| {
            Ok((
                unsigned(row.get(0)?),
                key(row.get(1)?, &row.get::<_, String>(2)?)?,
            ))
        })?
        .collect::<Result<Vec<_>, _>>()?;
    let to = meta(tx, "revision")?.unwrap_or(0);
    Ok(Changes { to, upserts, deletes })
}

/// Makes the tables, or brings older ones up to date. Returns the store's id.
fn migrate(db: &mut Connection, path: &Path) -> Result<String, StoreError> {
    let tx = db.transaction().map_err(failed("migrate"))?;
    let found: i64 = tx
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(failed("read its schema"))?;
    if found > SCHEMA {
        return Err(StoreError::Schema {
            path: path.to_owned(),
            found,
        });
    }
    if found < 1 {
        tx.execute_batch(
            "CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
             CREATE TABLE resources (
                 kind INTEGER NOT NULL, name TEXT NOT NULL, revision INTEGER NOT NULL, payload BLOB NOT NULL,
                 created_ms INTEGER NOT NULL, updated_ms INTEGER NOT NULL, PRIMARY KEY (kind, name)
             ) WITHOUT ROWID;
             CREATE INDEX resources_by_revision ON resources (revision);
             CREATE TABLE tombstones (
                 kind INTEGER NOT NULL, name TEXT NOT NULL, revision INTEGER NOT NULL, PRIMARY KEY (kind, name)
             ) WITHOUT ROWID;
             CREATE INDEX tombstones_by_revision ON tombstones (revision);
             INSERT INTO meta VALUES ('id', lower(hex(randomblob(16))));
             PRAGMA user_version = 1;",
        )
        .map_err(failed("migrate"))?;
    }
    if found < 2 {
        tx.execute_batch(levels::TABLES)
            .and_then(|()| tx.execute_batch("PRAGMA user_version = 2;"))
            .map_err(failed("migrate"))?;
    }
    if found < 3 {
        tx.execute_batch(modules::TABLES)
            .and_then(|()| tx.execute_batch("PRAGMA user_version = 3;"))
            .map_err(failed("migrate"))?;
    }
    if found < 4 {
        tx.execute_batch(certificates::TABLES)
            .and_then(|()| tx.execute_batch("PRAGMA user_version = 4;"))
            .map_err(failed("migrate"))?;
    }
    let id = tx
        .query_row("SELECT value FROM meta WHERE key='id'", [], |row| row.get(0))
        .map_err(failed("read its id"))?;
    tx.commit().map_err(failed("migrate"))?;
    Ok(id)
}

/// Forgets the oldest deletions beyond the bound, and remembers up to where.
fn compact(tx: &Transaction<'_>) -> rusqlite::Result<()> {
    let count: i64 = tx.query_row("SELECT count(*) FROM tombstones", [], |row| row.get(0))?;
    let excess = unsigned(count).saturating_sub(MAX_TOMBSTONES);
    if excess == 0 {
        return Ok(());
    }
    let upto: i64 = tx.query_row(
        "SELECT revision FROM tombstones ORDER BY revision LIMIT 1 OFFSET ?1",
        [signed(excess - 1)],
        |row| row.get(0),
    )?;
    tx.execute("DELETE FROM tombstones WHERE revision <= ?1", [upto])?;
    set_meta(tx, "compacted", unsigned(upto))
}

fn meta(db: &Connection, key: &str) -> rusqlite::Result<Option<u64>> {
    let value = db
        .query_row("SELECT value FROM meta WHERE key=?1", [key], |row| {
            row.get::<_, i64>(0)
        })
        .optional()?;
    Ok(value.map(unsigned))
}

fn set_meta(db: &Connection, key: &str, value: u64) -> rusqlite::Result<()> {
    db.execute(
        "INSERT OR REPLACE INTO meta VALUES (?1, ?2)",
        params![key, signed(value)],
    )?;
    Ok(())
}

fn stored(row: &rusqlite::Row<'_>) -> rusqlite::Result<Stored> {
    Ok(Stored {
        key: key(row.get(0)?, &row.get::<_, String>(1)?)?,
        revision: unsigned(row.get(2)?),
        payload: row.get(3)?,
        created_ms: row.get(4)?,
        updated_ms: row.get(5)?,
    })
}

/// The kinds' numbers on disk, which never change; they keep a snapshot's order.
const fn code(kind: Kind) -> i64 {
    match kind {
        Kind::Zone => 10,
        Kind::Plugin => 20,
        Kind::FeatureFlags => 22,
        Kind::Queue => 24,
        Kind::ResiliencePolicy => 25,
        Kind::Service => 30,
        Kind::FallbackPolicy => 40,
        Kind::Gateway => 45,
        Kind::Route => 50,
        Kind::CircuitOverride => 60,
        Kind::DegradationPolicy => 65,
        Kind::DegradationOverride => 70,
        Kind::AuthorizationPolicy => 75,
        Kind::AccessPolicy => 80,
    }
}

fn key(kind: i64, name: &str) -> rusqlite::Result<Key> {
    let known = Kind::ALL.into_iter().find(|k| code(*k) == kind);
    let name = leeward_policy::Name::parse(name).ok();
    match (known, name) {
        (Some(kind), Some(name)) => Ok(Key { kind, name }),
        _ => Err(rusqlite::Error::InvalidQuery),
    }
}

/// SQLite's integers are signed; revisions stay far below the difference.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

fn failed(act: &'static str) -> impl Fn(rusqlite::Error) -> StoreError {
    move |source| StoreError::Database { act, source }
}

fn now_ms() -> i64 {
    #[expect(clippy::disallowed_methods, reason = "for people: when something changed")]
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use leeward_policy::Name;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// A directory that goes when the test ends.
    pub(crate) struct Scratch(pub(crate) PathBuf);

    impl Scratch {
        pub(crate) fn new() -> Self {
            use std::sync::atomic::{AtomicU64, Ordering};
            static NEXT: AtomicU64 = AtomicU64::new(0);
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            Self(std::env::temp_dir().join(format!("leeward-store-{}-{n}", std::process::id())))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn key(text: &str) -> Key {
        Key {
            kind: Kind::Service,
            name: Name::parse(text).unwrap(),
        }
    }

    fn put(name: &str, payload: &str, expect: u64) -> Write {
        Write {
            key: key(name),
            payload: Some(payload.into()),
            expect,
        }
    }

    fn delete(name: &str) -> Write {
        Write {
            key: key(name),
            payload: None,
            expect: 0,
        }
    }

    #[test]
    fn kinds_numbers_keep_a_snapshots_order() {
        let numbers = Kind::ALL.map(code);
        assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    }

    #[test]
    fn what_was_written_is_there_after_a_restart() {
        let dir = Scratch::new();
        let (id, revision) = {
            let store = Store::open(&dir.0).unwrap();
            store.write(&[put("a", "1", 0)]).unwrap();
            (
                store.id().to_owned(),
                store.write(&[put("b", "2", 0), delete("a")]).unwrap(),
            )
        };
        let store = Store::open(&dir.0).unwrap();
        assert_eq!((store.id(), store.revision()), (id.as_str(), revision));
        assert_eq!(store.get(&key("b")).unwrap().unwrap().payload, b"2");
        assert!(store.get(&key("a")).unwrap().is_none());
    }

    #[test]
    fn a_failed_precondition_writes_nothing() {
        let dir = Scratch::new();
        let store = Store::open(&dir.0).unwrap();
        let first = store.write(&[put("a", "1", 0)]).unwrap();
        let error = store
            .write(&[put("b", "x", 0), put("a", "2", first + 5)])
            .unwrap_err();
        assert_eq!(error.to_string(), "Service/a is at revision 1, not 6");
        assert!(store.get(&key("b")).unwrap().is_none());
        assert_eq!(store.revision(), first);
        store.write(&[put("a", "2", first)]).unwrap();
    }

    #[test]
    fn a_store_has_one_writer() {
        let dir = Scratch::new();
        let first = Store::open(&dir.0).unwrap();
        assert!(matches!(Store::open(&dir.0), Err(StoreError::InUse { .. })));
        drop(first);
        Store::open(&dir.0).unwrap();
    }

    #[test]
    fn a_schema_of_a_later_build_is_left_alone() {
        let dir = Scratch::new();
        drop(Store::open(&dir.0).unwrap());
        let db = Connection::open(dir.0.join("leeward.db")).unwrap();
        db.execute_batch("PRAGMA user_version = 99;").unwrap();
        drop(db);
        let error = Store::open(&dir.0).unwrap_err().to_string();
        assert!(
            error.contains("has schema 99, and this build knows up to 4"),
            "{error}"
        );
    }

    #[test]
    fn forgotten_deletions_are_said_to_be_forgotten() {
        let dir = Scratch::new();
        let store = Store::open(&dir.0).unwrap();
        let names: Vec<String> = (0..1000).map(|i| format!("n{i}")).collect();
        for round in 0..=MAX_TOMBSTONES / 1000 {
            let deletes: Vec<_> = names.iter().map(|n| delete(&format!("{n}-{round}"))).collect();
            store.write(&deletes).unwrap();
        }
        assert!(store.changes_since(0).unwrap().is_none());
        assert!(store.changes_since(1).unwrap().is_some());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Whoever was in step at any revision, and applies the changes since, is in step again.
        #[test]
        fn changes_bring_any_revision_up_to_date(
            steps in prop::collection::vec((0usize..4, any::<bool>(), 0u8..9), 1..24),
        ) {
            let dir = Scratch::new();
            let store = Store::open(&dir.0).unwrap();
            let names = ["a", "b", "c", "d"];
            let mut worlds: Vec<BTreeMap<Key, Vec<u8>>> = vec![BTreeMap::new()];
            for (which, remove, value) in steps {
                let write = if remove { delete(names[which]) } else { put(names[which], &value.to_string(), 0) };
                store.write(std::slice::from_ref(&write)).unwrap();
                let mut world = worlds.last().unwrap().clone();
                match write.payload {
                    Some(payload) => world.insert(write.key, payload),
                    None => world.remove(&write.key),
                };
                worlds.push(world);
            }
            let now = worlds.last().unwrap();
            for (revision, world) in worlds.iter().enumerate() {
                let changes = store.changes_since(revision as u64).unwrap().unwrap();
                let mut world = world.clone();
                for (_, key) in changes.deletes {
                    world.remove(&key);
                }
                for stored in changes.upserts {
                    world.insert(stored.key, stored.payload);
                }
                prop_assert_eq!(&world, now);
            }
        }
    }
}

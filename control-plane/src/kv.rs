//! Where the store keeps its keys: an ordered key-value store with one counter for all writes, transactions, watches and
//! leases. What etcd v3 has, and SQLite in one file is made to have.
//!
//! Invariants:
//! - A transaction is done whole or not at all, and one that was acknowledged survives whatever becomes of the process.
//! - A read sees every write that was acknowledged before it began, whoever wrote.
//! - Something may have been written after [`KvError::Unknown`], and after [`KvError::Full`] of etcd; after no other error.

mod etcd;
mod sqlite;

pub use etcd::{Etcd, EtcdSettings};
pub use sqlite::Sqlite;
pub(crate) use sqlite::put_raw as sqlite_put;

use bytes::Bytes;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// Longest value, in bytes.
pub const MAX_VALUE: usize = 1 << 20;
/// Most compares and operations of a transaction: etcd takes 128.
pub const MAX_OPS: usize = 100;
/// Largest transaction, in bytes of keys and values: etcd takes 1.5 MiB.
pub const MAX_TXN: usize = MAX_VALUE + (64 << 10);
/// Longest key, in bytes.
const MAX_KEY: usize = 4096;
/// Times that an update of one key is tried against others who write it.
const MAX_TRIES: u32 = 100;

/// Why something was not done.
#[derive(Clone, Debug, thiserror::Error)]
pub enum KvError {
    /// It can't be reached, or has no quorum. Nothing was written.
    #[error("{place} is not available: {reason}")]
    Unavailable {
        /// Which file or endpoint.
        place: String,
        /// What it said, or didn't.
        reason: String,
    },
    /// The answer to a write was lost: it may have been done.
    #[error("{place} did not say what became of a write: {reason}")]
    Unknown {
        /// Which file or endpoint.
        place: String,
        /// What happened.
        reason: String,
    },
    /// No room. Nothing was written, but that etcd does the very write that uses up its quota, and says this of it.
    #[error("{place} is full: {reason}")]
    Full {
        /// Which file or endpoint.
        place: String,
        /// What it said.
        reason: String,
    },
    /// A key, a value or a transaction is larger than may be.
    #[error("{what} has {size}; want at most {limit}")]
    TooLarge {
        /// What.
        what: String,
        /// How much it has.
        size: usize,
        /// How much it may have.
        limit: usize,
    },
    /// It answered what can't be, or refuses us.
    #[error("{place} failed to {act}: {reason}")]
    Failed {
        /// Which file or endpoint.
        place: String,
        /// What was being done.
        act: &'static str,
        /// What it said.
        reason: String,
    },
    /// The data directory can't be used.
    #[error("can't use {path}: {reason}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// Another process has it open.
    #[error("{path} is in use by another control plane; a store in a file has one at a time")]
    InUse {
        /// The lock's file.
        path: PathBuf,
    },
    /// A file of a later build.
    #[error("{path} has schema {found}, and this build knows up to {known}: use a later build")]
    Schema {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// The last that is known.
        known: i64,
    },
    /// Others wrote the same key again and again.
    #[error("{0} was changed by others {MAX_TRIES} times in a row; try again")]
    Contended(String),
}

/// A key and its value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Bytes,
    /// The revision of the write that made it, after it was not there.
    pub created: u64,
    /// The revision of its last write.
    pub modified: u64,
}

/// A page of a range.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// In the order of keys.
    pub entries: Vec<Entry>,
    /// Whether there are more after the last.
    pub more: bool,
    /// The revision that this shows.
    pub revision: u64,
}

/// A lease: its keys go when it ends.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct LeaseId(pub(crate) i64);

/// What must be so for a transaction to be done.
#[derive(Clone, Debug)]
pub enum Compare {
    /// A key was last written at this revision; 0: it is not there.
    Modified(String, u64),
    /// A key was made at this revision, and has been there since; 0: it is not there.
    Created(String, u64),
}

/// What a transaction does.
#[derive(Clone, Debug)]
pub enum Op {
    /// Writes a key.
    Put {
        /// The key.
        key: String,
        /// Its value.
        value: Bytes,
        /// What it goes with.
        lease: Option<LeaseId>,
    },
    /// Deletes a key.
    Delete(String),
    /// Deletes all keys that begin so.
    DeletePrefix(String),
}

/// A transaction. A key stands in it once.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Txn {
    /// All must be so.
    pub compares: Vec<Compare>,
    /// Done in one step then.
    pub ops: Vec<Op>,
}

impl Txn {
    /// Only if a key was last written at a revision; 0: if it is not there.
    pub fn when(mut self, key: impl Into<String>, modified: u64) -> Self {
        self.compares.push(Compare::Modified(key.into(), modified));
        self
    }

    /// Only if a key was made at a revision, and has been there since.
    pub fn when_created(mut self, key: impl Into<String>, created: u64) -> Self {
        self.compares.push(Compare::Created(key.into(), created));
        self
    }

    /// Writes a key.
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        let (key, value) = (key.into(), value.into());
        self.ops.push(Op::Put {
            key,
            value,
            lease: None,
        });
        self
    }

    /// Writes a key that goes when a lease ends.
    pub fn put_leased(mut self, key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        let (key, value) = (key.into(), value.into());
        self.ops.push(Op::Put {
            key,
            value,
            lease: Some(lease),
        });
        self
    }

    /// Deletes a key.
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.ops.push(Op::Delete(key.into()));
        self
    }

    /// Deletes all keys that begin so.
    pub fn delete_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.ops.push(Op::DeletePrefix(prefix.into()));
        self
    }

    fn check(&self) -> Result<(), KvError> {
        let count = self.compares.len() + self.ops.len();
        if count > MAX_OPS {
            return Err(too_large("a transaction (operations)", count, MAX_OPS));
        }
        let mut bytes = 0;
        for op in &self.ops {
            if let Op::Put { key, value, .. } = op {
                if value.len() > MAX_VALUE {
                    return Err(too_large(&format!("the value of {key}"), value.len(), MAX_VALUE));
                }
                if key.len() > MAX_KEY {
                    return Err(too_large("a key", key.len(), MAX_KEY));
                }
                bytes += key.len() + value.len();
            }
        }
        if bytes > MAX_TXN {
            return Err(too_large("a transaction (bytes)", bytes, MAX_TXN));
        }
        Ok(())
    }
}

fn too_large(what: &str, size: usize, limit: usize) -> KvError {
    let what = what.to_owned();
    KvError::TooLarge { what, size, limit }
}

/// What a watch tells.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// A key was written.
    Put(Entry),
    /// A key has gone.
    Delete {
        /// The key.
        key: String,
        /// The revision of its end.
        modified: u64,
    },
}

/// Why a watch tells no more.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WatchError {
    /// What happened since the revision that it was to begin at is no longer known up to this one: read everything, and
    /// watch from there.
    #[error("what was written up to revision {0} is no longer known")]
    Compacted(u64),
    /// It broke: watch again.
    #[error(transparent)]
    Lost(#[from] KvError),
}

/// Changes of keys, as they happen.
#[derive(Debug)]
pub struct Watch(Source);

#[derive(Debug)]
enum Source {
    Sqlite(sqlite::Tail),
    Etcd(etcd::Tail),
}

impl Watch {
    /// The next changes, in order. May be dropped at any point without losing any.
    ///
    /// # Errors
    ///
    /// Why there are no more.
    pub async fn next(&mut self) -> Result<Vec<Event>, WatchError> {
        match &mut self.0 {
            Source::Sqlite(tail) => tail.next().await,
            Source::Etcd(tail) => tail.next().await,
        }
    }
}

/// What is to become of a key that was read.
#[derive(Debug)]
pub enum Step<T> {
    /// This is written.
    Put(Vec<u8>, T),
    /// It goes.
    Delete(T),
    /// It stays as it is.
    Leave(T),
}

/// A key-value store. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Kv {
    /// In one file.
    Sqlite(Arc<Sqlite>),
    /// In a cluster.
    Etcd(Arc<Etcd>),
}

impl Kv {
    /// Opens the file in a directory, and makes it if there is none; one of an earlier build is brought up to date. Blocks.
    ///
    /// # Errors
    ///
    /// If the directory or the file can't be used.
    pub fn sqlite(dir: &Path) -> Result<Self, KvError> {
        Ok(Self::Sqlite(Arc::new(Sqlite::open(dir)?)))
    }

    /// Uses a cluster. Nothing is asked of it yet: it may come up later.
    ///
    /// # Errors
    ///
    /// If the settings are bad.
    pub fn etcd(settings: EtcdSettings) -> Result<Self, KvError> {
        Ok(Self::Etcd(Arc::new(Etcd::new(settings)?)))
    }

    /// Whether more than one control plane may use it.
    pub const fn is_shared(&self) -> bool {
        matches!(self, Self::Etcd(_))
    }

    /// A key's value now.
    ///
    /// # Errors
    ///
    /// [`KvError`].
    pub async fn get(&self, key: &str) -> Result<Option<Entry>, KvError> {
        match self {
            Self::Sqlite(kv) => kv.get(key.to_owned()).await,
            Self::Etcd(kv) => kv.get(key).await,
        }
    }

    /// Keys that begin with `prefix` and come after `after` (a whole key), at most so many.
    ///
    /// # Errors
    ///
    /// [`KvError`].
    pub async fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, KvError> {
        match self {
            Self::Sqlite(kv) => {
                kv.range(prefix.to_owned(), after.map(str::to_owned), limit, false)
                    .await
            }
            Self::Etcd(kv) => kv.range(prefix, after, limit, false).await,
        }
    }

    /// The same, without values.
    ///
    /// # Errors
    ///
    /// [`KvError`].
    pub async fn keys(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, KvError> {
        match self {
            Self::Sqlite(kv) => {
                kv.range(prefix.to_owned(), after.map(str::to_owned), limit, true)
                    .await
            }
            Self::Etcd(kv) => kv.range(prefix, after, limit, true).await,
        }
    }

    /// Every key that begins so, however many pages it takes. For prefixes whose size is bounded.
    ///
    /// # Errors
    ///
    /// [`KvError`].
    pub async fn all(&self, prefix: &str) -> Result<Vec<Entry>, KvError> {
        const PAGE: usize = 500;
        let mut all: Vec<Entry> = Vec::new();
        loop {
            let after = all.last().map(|entry| entry.key.clone());
            let page = self.range(prefix, after.as_deref(), PAGE).await?;
            all.extend(page.entries);
            if !page.more {
                return Ok(all);
            }
        }
    }

    /// Does a transaction. Returns the revision it has, or `None` if what must be so is not: nothing is written then.
    ///
    /// # Errors
    ///
    /// [`KvError`]; after [`KvError::Unknown`] it may have been done.
    pub async fn txn(&self, txn: Txn) -> Result<Option<u64>, KvError> {
        txn.check()?;
        match self {
            Self::Sqlite(kv) => kv.txn(txn).await,
            Self::Etcd(kv) => kv.txn(txn).await,
        }
    }

    /// Reads a key, and writes what `step` makes of it, again if somebody else wrote in between. What is written should
    /// differ from what anybody else writes, where that matters: after a lost answer it is by the value that one's own
    /// write is known again.
    ///
    /// # Errors
    ///
    /// [`KvError`].
    pub async fn update<T>(
        &self,
        key: &str,
        mut step: impl FnMut(Option<&Bytes>) -> Step<T> + Send,
    ) -> Result<T, KvError> {
        for _ in 0..MAX_TRIES {
            let found = self.get(key).await?;
            let modified = found.as_ref().map_or(0, |entry| entry.modified);
            let (txn, wanted, done) = match step(found.as_ref().map(|entry| &entry.value)) {
                Step::Leave(done) => return Ok(done),
                Step::Put(value, done) => {
                    let value = Bytes::from(value);
                    let txn = Txn::default().when(key, modified).put(key, value.clone());
                    (txn, Some(value), done)
                }
                Step::Delete(done) => (Txn::default().when(key, modified).delete(key), None, done),
            };
            match self.txn(txn).await {
                Ok(Some(_)) => return Ok(done),
                Ok(None) => {}
                Err(error @ (KvError::Unknown { .. } | KvError::Full { .. })) => {
                    let now = self.get(key).await?;
                    let is_new = now.as_ref().map_or(0, |entry| entry.modified) != modified;
                    if is_new && now.map(|entry| entry.value) == wanted {
                        return Ok(done);
                    }
                    if matches!(error, KvError::Full { .. }) {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Err(KvError::Contended(key.to_owned()))
    }

    /// Deletes all keys that begin so, however many.
    ///
    /// # Errors
    ///
    /// [`KvError`]; some may be gone then.
    pub async fn delete_prefix(&self, prefix: &str) -> Result<(), KvError> {
        self.txn(Txn::default().delete_prefix(prefix)).await.map(drop)
    }

    /// Changes of the keys that begin so, from a revision on.
    pub fn watch(&self, prefix: &str, from: u64) -> Watch {
        Watch(match self {
            Self::Sqlite(kv) => Source::Sqlite(Sqlite::watch(kv, prefix, from)),
            Self::Etcd(kv) => Source::Etcd(Etcd::watch(kv, prefix, from)),
        })
    }

    /// A new lease, which ends after `ttl` if it is not kept alive. The time that counts is not the wall clock's.
    ///
    /// # Errors
    ///
    /// [`KvError`].
    pub async fn grant(&self, ttl: Duration) -> Result<LeaseId, KvError> {
        match self {
            Self::Sqlite(kv) => Ok(kv.grant(ttl)),
            Self::Etcd(kv) => kv.grant(ttl).await,
        }
    }

    /// Lets a lease last for its `ttl` from now; `false` if it has ended.
    ///
    /// # Errors
    ///
    /// [`KvError`].
    pub async fn keep_alive(&self, lease: LeaseId) -> Result<bool, KvError> {
        match self {
            Self::Sqlite(kv) => kv.keep_alive(lease).await,
            Self::Etcd(kv) => kv.keep_alive(lease).await,
        }
    }

    /// Ends a lease.
    ///
    /// # Errors
    ///
    /// [`KvError`].
    pub async fn revoke(&self, lease: LeaseId) -> Result<(), KvError> {
        match self {
            Self::Sqlite(kv) => kv.revoke(lease).await,
            Self::Etcd(kv) => kv.revoke(lease).await,
        }
    }

    /// Lets what was before a revision be forgotten: watches can't begin there any more.
    ///
    /// # Errors
    ///
    /// [`KvError`].
    pub async fn compact(&self, revision: u64) -> Result<(), KvError> {
        match self {
            Self::Sqlite(kv) => {
                kv.compact(revision);
                Ok(())
            }
            Self::Etcd(kv) => kv.compact(revision).await,
        }
    }
}

/// The first key after all that begin so.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // etcd's sign for the end of all keys.
    vec![0]
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

//! Why the store did not do as asked.

use super::SCHEMA;
use crate::kv::KvError;
use leeward_policy::Key;

/// Why the store could not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The key-value store said no.
    #[error("the store failed: {0}")]
    Kv(#[from] KvError),
    /// Written by a later version.
    #[error(
        "the store has schema {found}, readable from builds that know {readable_from} on, and this build knows up to {SCHEMA}: use a later build"
    )]
    Schema {
        /// Its schema.
        found: u64,
        /// What a build must know to read it.
        readable_from: u64,
    },
    /// Written by a later version, which this build can only read.
    #[error("the store has schema {0}, which this build can read but not write: use a later build")]
    ReadOnly(u64),
    /// What is stored is not what was written.
    #[error("the store is damaged: {0}")]
    Damaged(String),
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
    /// Somebody else wrote since what the write was checked against.
    #[error("the store is at revision {found}, not {wanted}; somebody else has written")]
    Moved {
        /// What the write was checked against.
        wanted: u64,
        /// Where the store is.
        found: u64,
    },
    /// The writer doesn't hold its lease any more.
    #[error("the lease on {0} is lost; another control plane may hold it")]
    Fenced(String),
    /// There are as many resources as may be.
    #[error("there would be {count} resources; want at most {limit}")]
    Resources {
        /// How many there would be.
        count: usize,
        /// How many there may be.
        limit: usize,
    },
    /// One write is too large.
    #[error("a write has {size} bytes, with what it replaces; want at most {limit}")]
    TooLarge {
        /// Its size.
        size: usize,
        /// How large it may be.
        limit: usize,
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
    /// There are as many revocations as may be.
    #[error(
        "{0} ids are revoked already, which is all that may be; take some back that are needed no more, or rotate to another root"
    )]
    Revocations(u64),
}

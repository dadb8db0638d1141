//! Requests that were accepted and wait for their service.

use std::time::Duration;

/// A queue.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Queue {
    /// Where it is kept.
    pub store: QueueStore,
    /// Entries that wait, at most.
    pub max_entries: u64,
    /// Their size together, in bytes, at most.
    pub max_bytes: u64,
    /// Size of one, in bytes, at most.
    pub max_entry_bytes: u64,
    /// Older ones are dead letters.
    pub max_age: Duration,
    /// Failed answers after which one is a dead letter; 0 is no bound.
    pub max_attempts: u32,
    /// The header, lower case, whose value is an entry's key.
    pub key_header: Option<Box<str>>,
    /// The pause after the n-th failure is drawn from 0 to this times 2^n.
    pub base_interval: Duration,
    /// The longest pause.
    pub max_interval: Duration,
    /// Deliveries under way at once.
    pub max_concurrency: u32,
    /// Deliveries in a second.
    pub max_rate: u32,
    /// How long it is told what became of an entry.
    pub keep_results: Duration,
    /// Dead letters that are kept.
    pub max_dead_letters: u64,
}

impl Queue {
    /// On the node's disk, with every default.
    pub const DEFAULT: Self = Self {
        store: QueueStore::Sqlite,
        max_entries: 100_000,
        max_bytes: 256 << 20,
        max_entry_bytes: 1 << 20,
        max_age: Duration::from_secs(24 * 3600),
        max_attempts: 20,
        key_header: None,
        base_interval: Duration::from_secs(1),
        max_interval: Duration::from_secs(60),
        max_concurrency: 8,
        max_rate: 100,
        keep_results: Duration::from_secs(3600),
        max_dead_letters: 10_000,
    };
}

/// Where a queue is kept.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum QueueStore {
    /// On the node's disk.
    Sqlite,
    /// In NATS.
    JetStream {
        /// URLs with the scheme nats or tls; at least one.
        servers: Vec<Box<str>>,
        /// Copies of each entry, 1 to 5.
        replicas: u32,
        /// Absolute path of a credentials file.
        credentials_file: Option<Box<str>>,
    },
}

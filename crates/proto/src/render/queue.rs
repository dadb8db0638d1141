//! Queues, on the wire, with their defaults written out.

use super::{duration, text};
use crate::v1;
use leeward_policy::model::{Queue, QueueStore};

pub(super) fn queue(queue: &Queue) -> v1::Queue {
    let store = match &queue.store {
        QueueStore::Sqlite => v1::queue::Store::Sqlite(v1::SqliteStore {}),
        QueueStore::JetStream {
            servers,
            replicas,
            credentials_file,
        } => v1::queue::Store::Jetstream(v1::JetStreamStore {
            servers: servers.iter().map(|server| server.to_string()).collect(),
            replicas: *replicas,
            credentials_file: text(credentials_file.as_deref()),
        }),
    };
    v1::Queue {
        store: Some(store),
        max_entries: queue.max_entries,
        max_bytes: queue.max_bytes,
        max_entry_bytes: queue.max_entry_bytes,
        max_age: duration(queue.max_age),
        max_attempts: Some(queue.max_attempts),
        key_header: text(queue.key_header.as_deref()),
        base_interval: duration(queue.base_interval),
        max_interval: duration(queue.max_interval),
        max_concurrency: queue.max_concurrency,
        max_rate: queue.max_rate,
        keep_results: duration(queue.keep_results),
        max_dead_letters: queue.max_dead_letters,
    }
}

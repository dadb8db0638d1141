//! Requests that were accepted and wait for their service.

use super::text::{absolute_path, authority, optional_key_header};
use super::{DAY, HOUR, MS, SECOND};
use crate::field::{Fields, Section};
use crate::v1;
use leeward_policy::model::{Queue, QueueStore};
use std::time::Duration;

pub(super) fn queue(f: &mut Fields, wire: &v1::Queue) -> Queue {
    let mut s = f.section("spec");
    let default = Queue::DEFAULT;
    let store = match &wire.store {
        None | Some(v1::queue::Store::Sqlite(_)) => QueueStore::Sqlite,
        Some(v1::queue::Store::Jetstream(wire)) => jetstream(&mut s.section("jetstream"), wire),
    };
    let max_bytes = s.number("maxBytes", wire.max_bytes, default.max_bytes, 64 << 10..=1 << 40);
    let base_interval = s.duration(
        "baseInterval",
        wire.base_interval.as_ref(),
        default.base_interval,
        10 * MS..=HOUR,
    );
    let key_header = s.at("keyHeader");
    Queue {
        store,
        max_entries: s.number(
            "maxEntries",
            wire.max_entries,
            default.max_entries,
            1..=10_000_000,
        ),
        max_bytes,
        // One entry can't be larger than all of them may be.
        max_entry_bytes: s.number(
            "maxEntryBytes",
            wire.max_entry_bytes,
            default.max_entry_bytes.min(max_bytes),
            1 << 10..=max_bytes.clamp(64 << 10, 16 << 20),
        ),
        max_age: s.duration(
            "maxAge",
            wire.max_age.as_ref(),
            default.max_age,
            SECOND..=30 * DAY,
        ),
        max_attempts: s.optional("maxAttempts", wire.max_attempts, default.max_attempts, 0..=10_000),
        key_header: optional_key_header(s.fields(), &key_header, &wire.key_header),
        base_interval,
        max_interval: s.duration(
            "maxInterval",
            wire.max_interval.as_ref(),
            default.max_interval.max(base_interval),
            base_interval.min(DAY)..=DAY,
        ),
        max_concurrency: s.small(
            "maxConcurrency",
            wire.max_concurrency,
            default.max_concurrency,
            1..=1000,
        ),
        max_rate: s.small("maxRate", wire.max_rate, default.max_rate, 1..=1_000_000),
        keep_results: s.duration(
            "keepResults",
            wire.keep_results.as_ref(),
            default.keep_results,
            Duration::ZERO..=30 * DAY,
        ),
        max_dead_letters: s.number(
            "maxDeadLetters",
            wire.max_dead_letters,
            default.max_dead_letters,
            1..=10_000_000,
        ),
    }
}

fn jetstream(s: &mut Section<'_>, wire: &v1::JetStreamStore) -> QueueStore {
    let path = s.at("servers");
    let f = s.fields();
    f.count(&path, wire.servers.len(), 1..=16);
    let mut servers: Vec<Box<str>> = Vec::new();
    for (i, text) in wire.servers.iter().enumerate() {
        servers.extend(server(f, &format!("{path}[{i}]"), text));
    }
    f.unique(&path, "", &servers);
    let credentials_file = match wire.credentials_file.as_str() {
        "" => None,
        text => {
            let at = s.at("credentialsFile");
            absolute_path(s.fields(), &at, text, "/etc/leeward/nats.creds")
        }
    };
    QueueStore::JetStream {
        servers,
        replicas: s.small("replicas", wire.replicas, 1, 1..=5),
        credentials_file: credentials_file.map(Box::from),
    }
}

/// The URL of a NATS server; one without a scheme has nats.
fn server(f: &mut Fields, path: &str, text: &str) -> Option<Box<str>> {
    let (scheme, host_and_port) = text.split_once("://").unwrap_or(("nats", text));
    // Only a URL may leave the port to its scheme.
    let port_is_optional = host_and_port.len() < text.len();
    if ["nats", "tls"].contains(&scheme)
        && authority(host_and_port).is_some_and(|(_, port)| port.is_some() || port_is_optional)
    {
        return Some(format!("{scheme}://{host_and_port}").into());
    }
    f.reject(
        path,
        format!(
            "{:?} is not a NATS server; want HOST:PORT, nats://HOST:PORT or tls://HOST:PORT, without a user or a path",
            text.chars().take(80).collect::<String>()
        ),
    )
}

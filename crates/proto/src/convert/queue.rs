//! Requests that were accepted and wait for their service.

use super::text::{absolute_path, is_host, optional_key_header};
use super::{DAY, HOUR, MS, SECOND};
use crate::field::{Fields, Section};
use crate::v1;
use leeward_policy::model::{Queue, QueueStore};
use std::net::{IpAddr, Ipv6Addr};
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
    let (scheme, authority) = text.split_once("://").unwrap_or(("nats", text));
    if ["nats", "tls"].contains(&scheme) && is_authority(authority, authority.len() < text.len()) {
        return Some(format!("{scheme}://{authority}").into());
    }
    f.reject(
        path,
        format!(
            "{:?} is not a NATS server; want HOST:PORT, nats://HOST:PORT or tls://HOST:PORT, without a user or a path",
            text.chars().take(80).collect::<String>()
        ),
    )
}

/// A host, and a port, which only a URL may leave to its scheme.
fn is_authority(text: &str, port_is_optional: bool) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        Some(_) | None => (text, None),
    };
    let port_ok = match port {
        None => port_is_optional,
        // A sign is no part of a port, though it can be parsed.
        Some(port) => {
            port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port != 0)
        }
    };
    let address = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => is_host(host) || host.parse::<IpAddr>().is_ok_and(|address| address.is_ipv4()),
    };
    port_ok && address
}

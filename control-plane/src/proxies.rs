//! What is known of the proxies: one watermark and a short list for each.

use leeward_policy::Key;
use leeward_proto::{parse_key, v1};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The proxies that are connected or were lately.
#[derive(Debug, Default)]
pub struct Proxies {
    // Poison is harmless: entries are replaced whole.
    known: Mutex<BTreeMap<(String, String), Known>>,
}

#[derive(Clone, Debug)]
struct Known {
    status: v1::ProxyStatus,
    heard: Instant,
    /// Which stream it is on; an older one that ends late changes nothing.
    stream: u64,
}

/// How long a proxy that is gone is remembered.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// Proxies that are remembered; past that the ones gone longest are forgotten first.
const MAX_PROXIES: usize = 100_000;
/// Refusals that a resource's status names.
const MAX_REFUSALS: usize = 100;

impl Proxies {
    /// A proxy has opened a stream.
    pub fn connected(&self, hello: &v1::Hello, stream: u64, now: Instant) {
        let mut known = self.locked();
        known.retain(|_, k| k.status.connected || now.saturating_duration_since(k.heard) < REMEMBERED);
        if known.len() >= MAX_PROXIES {
            let oldest = known
                .iter()
                .filter(|(_, k)| !k.status.connected)
                .min_by_key(|(_, k)| k.heard);
            if let Some(id) = oldest.map(|(id, _)| id.clone()) {
                known.remove(&id);
            }
        }
        let status = v1::ProxyStatus {
            name: hello.proxy.clone(),
            zone: hello.zone.clone(),
            version: hello.version.clone(),
            connected: true,
            last_seen: Some(wall()),
            ..v1::ProxyStatus::default()
        };
        known.insert(
            (hello.zone.clone(), hello.proxy.clone()),
            Known {
                status,
                heard: now,
                stream,
            },
        );
    }

    /// A proxy has said what is live on it, or only that it is there.
    pub fn heard(&self, hello: &v1::Hello, stream: u64, ack: Option<v1::Ack>, now: Instant) {
        let mut known = self.locked();
        let Some(proxy) = known.get_mut(&(hello.zone.clone(), hello.proxy.clone())) else {
            return;
        };
        if proxy.stream != stream {
            return;
        }
        proxy.heard = now;
        proxy.status.last_seen = Some(wall());
        if let Some(ack) = ack {
            proxy.status.generation = ack.generation;
            proxy.status.quarantined = ack.quarantined;
            proxy.status.orphans = ack.orphans;
        }
    }

    /// A proxy's stream has ended.
    pub fn gone(&self, hello: &v1::Hello, stream: u64) {
        let mut known = self.locked();
        if let Some(proxy) = known.get_mut(&(hello.zone.clone(), hello.proxy.clone()))
            && proxy.stream == stream
        {
            proxy.status.connected = false;
        }
    }

    /// All of them, by zone and name.
    pub fn list(&self) -> Vec<v1::ProxyStatus> {
        self.locked().values().map(|known| known.status.clone()).collect()
    }

    /// Where a resource stands.
    pub fn status_of(&self, key: &Key, revision: u64) -> v1::Status {
        let known = self.locked();
        let mut status = v1::Status::default();
        for proxy in known.values().map(|k| &k.status).filter(|s| s.connected) {
            status.proxies += 1;
            let refusal = proxy.quarantined.iter().find(|q| {
                q.r#ref
                    .as_ref()
                    .is_some_and(|r| parse_key(r).is_ok_and(|k| k == *key))
                    && q.revision >= revision
            });
            match refusal {
                Some(q) if status.refusals.len() < MAX_REFUSALS => status.refusals.push(v1::Refusal {
                    proxy: proxy.name.clone(),
                    revision: q.revision,
                    reason: q.reason.clone(),
                    running_revision: q.running_revision,
                }),
                Some(_) => {}
                None if proxy.generation >= revision => status.live += 1,
                None => {}
            }
        }
        status
    }

    /// Proxies connected, and the lowest watermark among them.
    pub fn summary(&self) -> (usize, Option<u64>) {
        let known = self.locked();
        let connected = known.values().filter(|k| k.status.connected);
        (
            connected.clone().count(),
            connected.map(|k| k.status.generation).min(),
        )
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<(String, String), Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wall() -> prost_types::Timestamp {
    #[expect(clippy::disallowed_methods, reason = "for people: when a proxy was last seen")]
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    crate::policy::timestamp(i64::try_from(now.as_millis()).unwrap_or(i64::MAX))
}

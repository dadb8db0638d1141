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

/// Where the mesh stands at one moment, arranged so that any number of resources can be looked up in it.
#[derive(Debug, Default)]
pub struct Standing {
    /// The watermarks of the connected proxies, sorted.
    generations: Vec<u64>,
    /// What they refuse, by resource, each with the watermark of the proxy that refuses it.
    refusals: BTreeMap<Key, Vec<(u64, v1::Refusal)>>,
}

/// How long a proxy that is gone is remembered.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// Proxies that are remembered; past that the ones gone longest are forgotten first.
const MAX_PROXIES: usize = 100_000;
/// Refusals that a resource's status names.
const MAX_REFUSALS: usize = 100;
/// Refusals that are taken from one proxy, as push.proto says.
const MAX_QUARANTINED: usize = 1000;

impl Proxies {
    /// A proxy has opened a stream. `generation` is what it runs of this store; 0 for nothing.
    pub fn connected(&self, hello: &v1::Hello, generation: u64, stream: u64, now: Instant) {
        let mut known = self.locked();
        if known.len() >= MAX_PROXIES {
            let gone = known.iter().filter(|(_, k)| !k.status.connected);
            let oldest = gone.min_by_key(|(_, k)| k.heard).map(|(id, _)| id.clone());
            if let Some(id) = oldest {
                known.remove(&id);
            }
        }
        let status = v1::ProxyStatus {
            name: hello.proxy.clone(),
            zone: hello.zone.clone(),
            version: hello.version.clone(),
            connected: true,
            generation,
            last_seen: Some(wall()),
            ..v1::ProxyStatus::default()
        };
        let heard = now;
        known.insert(
            id_of(hello),
            Known {
                status,
                heard,
                stream,
            },
        );
    }

    /// A proxy has said what is live on it, or only that it is there.
    pub fn heard(&self, hello: &v1::Hello, stream: u64, ack: Option<v1::Ack>, now: Instant) {
        let mut known = self.locked();
        let Some(proxy) = known.get_mut(&id_of(hello)).filter(|p| p.stream == stream) else {
            return;
        };
        proxy.heard = now;
        proxy.status.last_seen = Some(wall());
        if let Some(mut ack) = ack {
            ack.quarantined.truncate(MAX_QUARANTINED);
            proxy.status.generation = ack.generation;
            proxy.status.quarantined = ack.quarantined;
            proxy.status.orphans = ack.orphans;
        }
    }

    /// A proxy's stream has ended.
    pub fn gone(&self, hello: &v1::Hello, stream: u64) {
        let mut known = self.locked();
        if let Some(proxy) = known.get_mut(&id_of(hello)).filter(|p| p.stream == stream) {
            proxy.status.connected = false;
        }
    }

    /// Forgets the proxies that have been gone for an hour. Costs a look at each.
    pub fn forget(&self, now: Instant) {
        let lately = |k: &Known| now.saturating_duration_since(k.heard) < REMEMBERED;
        self.locked().retain(|_, k| k.status.connected || lately(k));
    }

    /// All of them, by zone and name.
    pub fn list(&self) -> Vec<v1::ProxyStatus> {
        self.locked().values().map(|known| known.status.clone()).collect()
    }

    /// Where the mesh stands now.
    pub fn standing(&self) -> Standing {
        let known = self.locked();
        let mut standing = Standing::default();
        for proxy in known.values().map(|k| &k.status).filter(|s| s.connected) {
            standing.generations.push(proxy.generation);
            for refused in &proxy.quarantined {
                let Some(Ok(key)) = refused.r#ref.as_ref().map(parse_key) else {
                    continue;
                };
                let refusal = v1::Refusal {
                    proxy: proxy.name.clone(),
                    revision: refused.revision,
                    reason: refused.reason.clone(),
                    running_revision: refused.running_revision,
                };
                let refusals = standing.refusals.entry(key).or_default();
                refusals.push((proxy.generation, refusal));
            }
        }
        drop(known);
        standing.generations.sort_unstable();
        standing
    }

    /// The zones of all of them, each with whether one of its proxies is connected.
    pub fn zones(&self) -> BTreeMap<String, bool> {
        let mut zones = BTreeMap::new();
        for proxy in self.locked().values().map(|known| &known.status) {
            match zones.get_mut(&proxy.zone) {
                Some(connected) => *connected |= proxy.connected,
                None => drop(zones.insert(proxy.zone.clone(), proxy.connected)),
            }
        }
        zones
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

impl Standing {
    /// Where a revision of a resource stands: two binary searches and a look at its refusals.
    pub fn of(&self, key: &Key, revision: u64) -> v1::Status {
        let behind = self
            .generations
            .partition_point(|generation| *generation < revision);
        let mut live = self.generations.len() - behind;
        let mut refusals = Vec::new();
        let refused = self.refusals.get(key).into_iter().flatten();
        for (generation, refusal) in refused.filter(|(_, refusal)| refusal.revision >= revision) {
            if *generation >= revision {
                live = live.saturating_sub(1);
            }
            if refusals.len() < MAX_REFUSALS {
                refusals.push(refusal.clone());
            }
        }
        v1::Status {
            live: count(live),
            proxies: count(self.generations.len()),
            refusals,
        }
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn id_of(hello: &v1::Hello) -> (String, String) {
    (hello.zone.clone(), hello.proxy.clone())
}

fn wall() -> prost_types::Timestamp {
    #[expect(clippy::disallowed_methods, reason = "for people: when a proxy was last seen")]
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    crate::policy::timestamp(i64::try_from(now.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::{Kind, Name};

    fn hello(proxy: &str) -> v1::Hello {
        v1::Hello {
            proxy: proxy.into(),
            zone: "a".into(),
            ..v1::Hello::default()
        }
    }

    fn key() -> Key {
        let name = Name::parse("p").unwrap();
        Key {
            kind: Kind::Plugin,
            name,
        }
    }

    fn ack(generation: u64, refused: Option<u64>) -> v1::Ack {
        let quarantined = refused.map(|revision| v1::Quarantined {
            r#ref: Some(leeward_proto::render_key(&key())),
            revision,
            reason: "no file".into(),
            running_revision: 1,
        });
        v1::Ack {
            generation,
            quarantined: quarantined.into_iter().collect(),
            orphans: 0,
        }
    }

    fn now() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    #[test]
    fn a_status_counts_those_that_run_it_and_names_those_that_refuse() {
        let proxies = Proxies::default();
        for (name, generation, refused) in [("p1", 5, None), ("p2", 5, Some(5)), ("p3", 3, None)] {
            proxies.connected(&hello(name), 0, 1, now());
            proxies.heard(&hello(name), 1, Some(ack(generation, refused)), now());
        }
        let status = proxies.standing().of(&key(), 5);
        assert_eq!((status.live, status.proxies), (1, 3));
        assert_eq!(status.refusals.len(), 1);
        assert_eq!(status.refusals[0].proxy, "p2");
        // A refusal of an older revision says nothing of a newer one.
        let newer = proxies.standing().of(&key(), 6);
        assert_eq!((newer.live, newer.refusals.len()), (0, 0));
    }

    #[test]
    fn a_stream_that_ends_late_does_not_end_its_successor() {
        let (proxies, hello) = (Proxies::default(), hello("p1"));
        proxies.connected(&hello, 0, 1, now());
        proxies.connected(&hello, 0, 2, now());
        proxies.heard(&hello, 1, Some(ack(9, None)), now());
        proxies.gone(&hello, 1);
        let [status] = &proxies.list()[..] else { panic!() };
        assert!(status.connected);
        assert_eq!(status.generation, 0, "the older stream's word counts no more");
    }

    #[test]
    fn the_gone_are_forgotten_after_an_hour_and_the_connected_never() {
        let (proxies, start) = (Proxies::default(), now());
        proxies.connected(&hello("stays"), 0, 1, start);
        proxies.connected(&hello("goes"), 0, 2, start);
        proxies.gone(&hello("goes"), 2);
        proxies.forget(start + REMEMBERED - Duration::from_secs(1));
        assert_eq!(proxies.list().len(), 2);
        proxies.forget(start + REMEMBERED);
        assert_eq!(proxies.list().len(), 1);
    }
}

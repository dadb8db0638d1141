//! What the proxies of other zones report of their services, and how that bounds what is sent there.

use crate::chance::Chance;
use crate::registry::Registry;
use crate::service::ServiceState;
use leeward_identity::{Identity, SpiffeId};
use leeward_policy::model::ZoneTransport;
use leeward_policy::{Snapshot, Via};
use leeward_resilience::{Draw, FRESH_FOR, Headroom, LOOK_EVERY, Usage};
use leeward_zone::{Client, Congestion, Link, ServiceHealth};
use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What is known of a service behind one proxy of another zone: what this process has under way there, and what that
/// proxy said last. Shared by all workers.
#[derive(Debug)]
pub(crate) struct Reported {
    /// The zone that it is in.
    pub(crate) zone: Arc<str>,
    /// Requests under way, in the low half; those begun so far, in the high one.
    usage: AtomicU64,
    /// How many may be under way.
    bound: AtomicU32,
    /// Endpoints that take requests.
    healthy: AtomicU32,
    /// Requests that each caller may have beside those that it has.
    spare: AtomicU32,
}

/// Of a number that is not known.
const UNKNOWN: u32 = u32::MAX;

impl Reported {
    pub(crate) const fn new(zone: Arc<str>) -> Self {
        Self {
            zone,
            usage: AtomicU64::new(0),
            bound: AtomicU32::new(UNKNOWN),
            healthy: AtomicU32::new(UNKNOWN),
            spare: AtomicU32::new(UNKNOWN),
        }
    }

    /// A request is under way from now on.
    pub(crate) fn begin(&self) {
        self.usage.fetch_add(1 << 32 | 1, Ordering::Relaxed);
    }

    /// One has ended.
    pub(crate) fn end(&self) {
        self.usage.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether one more may be under way. Workers that ask at once may pass the bound by one each.
    pub(crate) fn has_room(&self) -> bool {
        let bound = self.bound.load(Ordering::Relaxed);
        bound == UNKNOWN || self.usage().under_way < bound
    }

    /// How many may be under way, if that is known.
    pub(crate) fn bound(&self) -> Option<u32> {
        known(&self.bound)
    }

    /// How many endpoints take requests, if that is known.
    pub(crate) fn healthy(&self) -> Option<u32> {
        known(&self.healthy)
    }

    /// How many more requests each caller may have under way, if that is known.
    pub(crate) fn spare(&self) -> Option<u32> {
        known(&self.spare)
    }

    fn usage(&self) -> Usage {
        let both = self.usage.load(Ordering::Relaxed);
        #[expect(clippy::cast_possible_truncation, reason = "each half has 32 bits")]
        Usage {
            under_way: both as u32,
            begun: (both >> 32) as u32,
        }
    }

    /// Takes in what was said; whether another number of endpoints is healthy.
    pub(crate) fn set(&self, said: Option<ServiceHealth>, bound: Option<u32>) -> bool {
        let number = |value: Option<u32>| value.map_or(UNKNOWN, |value| value.min(UNKNOWN - 1));
        self.bound.store(number(bound), Ordering::Relaxed);
        self.spare
            .store(number(said.map(|said| said.spare)), Ordering::Relaxed);
        let healthy = number(said.map(|said| said.healthy));
        self.healthy.swap(healthy, Ordering::Relaxed) != healthy
    }
}

fn known(number: &AtomicU32) -> Option<u32> {
    Some(number.load(Ordering::Relaxed)).filter(|number| *number != UNKNOWN)
}

/// Keeps a link to each proxy of another zone that has endpoints of services that this process calls, hears what it
/// reports, and bounds by that what is sent there. What the links of workers hear is the same; this one is there before a
/// request is.
///
/// A peer's word counts for the endpoints behind that peer only.
pub struct Reports {
    registry: Arc<Registry>,
    identity: Arc<Identity>,
    client: Rc<Client>,
    peers: HashMap<(SocketAddr, SpiffeId), Peer>,
    connecting: Rc<()>,
}

/// A proxy that is listened to.
struct Peer {
    to: SocketAddr,
    id: SpiffeId,
    link: Rc<RefCell<State>>,
    /// When it was last heard.
    heard: Option<Instant>,
    services: Vec<Told>,
}

enum State {
    /// There is none. The next attempt is made at a time, after so many in a row that failed.
    None {
        at: Option<Instant>,
        failed: u32,
    },
    Connecting,
    /// Since when.
    Open(Link, Instant),
}

/// A service of which a peer tells.
struct Told {
    state: Arc<ServiceState>,
    reported: Arc<Reported>,
    headroom: Headroom,
    /// How many proxies could call, this one among them.
    others: u32,
}

/// A service of which a peer is to tell.
struct Wanted {
    state: Arc<ServiceState>,
    reported: Arc<Reported>,
    others: u32,
}

/// Peers that are listened to; what more would say is not known, as of those that say nothing.
pub const MAX_HEARD: usize = 256;
/// How long a service counts as called after the last call.
const CALLED_FOR: Duration = Duration::from_secs(600);
/// How often policy, and which services are called, is looked at.
const LOOK_ROUND: Duration = Duration::from_secs(1);
/// Longest attempt to make a link.
const ATTEMPT: Duration = Duration::from_secs(3);
/// Attempts at once.
const MAX_CONNECTING: usize = 16;
/// First and longest pause after an attempt that failed.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl Reports {
    /// Listens as `identity`.
    pub fn new(identity: Arc<Identity>, registry: Arc<Registry>) -> Self {
        Self {
            registry,
            client: Rc::new(Client::new(Arc::clone(&identity), Congestion::default())),
            identity,
            peers: HashMap::new(),
            connecting: Rc::new(()),
        }
    }

    /// Listens until dropped, by the policy in force. Call on the thread of a `LocalSet`.
    pub async fn run(mut self, snapshot: impl Fn() -> Arc<Snapshot>) {
        let mut looked_at: Option<Instant> = None;
        loop {
            let pause = if self.peers.is_empty() {
                LOOK_ROUND
            } else {
                LOOK_EVERY
            };
            tokio::time::sleep(pause).await;
            let now = tokio::time::Instant::now().into_std();
            if looked_at.is_none_or(|at| now.saturating_duration_since(at) >= LOOK_ROUND) {
                looked_at = Some(now);
                self.follow(&snapshot(), now);
            }
            for peer in self.peers.values_mut() {
                peer.look(now);
                if peer.wants_link(now) && Rc::strong_count(&self.connecting) <= MAX_CONNECTING {
                    peer.connect(&self.client, &self.connecting);
                }
            }
        }
    }

    /// Listens to those that policy and the calls of late make worth it, and no longer to others.
    fn follow(&mut self, snapshot: &Snapshot, now: Instant) {
        let mut wanted: HashMap<(SocketAddr, SpiffeId), Vec<Wanted>> = HashMap::new();
        for view in snapshot.services() {
            if !view.spec.balance.zones.remote_reports {
                continue;
            }
            let called = self.registry.called(&view.name);
            let Some(state) = called.filter(|state| state.called_within(CALLED_FOR, now)) else {
                continue;
            };
            for endpoint in view.endpoints.iter() {
                let Via::Proxy { address, zone, name } = &endpoint.key.via else {
                    continue;
                };
                if **zone == *snapshot.viewer.zone.as_str() || endpoint.transport == ZoneTransport::Tcp {
                    continue;
                }
                let Ok(id) = SpiffeId::proxy(self.identity.id().trust_domain(), zone, name) else {
                    continue;
                };
                let key = (*address, id);
                if !wanted.contains_key(&key) && wanted.len() >= MAX_HEARD {
                    continue;
                }
                let services = wanted.entry(key).or_default();
                // Services are gone through one after the other.
                if services
                    .last()
                    .is_none_or(|last| !Arc::ptr_eq(&last.state, &state))
                {
                    services.push(Wanted {
                        reported: state.reported(zone, name),
                        others: snapshot.proxies_outside(zone),
                        state: Arc::clone(&state),
                    });
                }
            }
        }
        self.peers.retain(|key, peer| {
            let stays = wanted.contains_key(key);
            if !stays {
                peer.follow(Vec::new());
            }
            stays
        });
        for ((to, id), services) in wanted {
            let peer = self.peers.entry((to, id.clone()));
            peer.or_insert_with(|| Peer::new(to, id)).follow(services);
        }
    }
}

impl std::fmt::Debug for Reports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reports")
            .field("peers", &self.peers.len())
            .finish_non_exhaustive()
    }
}

impl Peer {
    fn new(to: SocketAddr, id: SpiffeId) -> Self {
        Self {
            to,
            id,
            link: Rc::new(RefCell::new(State::None { at: None, failed: 0 })),
            heard: None,
            services: Vec::new(),
        }
    }

    /// Goes on with the services that are still wanted, and lets go of what was said of the others.
    fn follow(&mut self, services: Vec<Wanted>) {
        let mut before = std::mem::take(&mut self.services);
        for Wanted {
            state,
            reported,
            others,
        } in services
        {
            let known = before
                .iter()
                .position(|told| Arc::ptr_eq(&told.reported, &reported));
            self.services.push(match known {
                Some(at) => Told {
                    others,
                    ..before.swap_remove(at)
                },
                None => {
                    // What is known already is news of it.
                    self.heard = None;
                    Told {
                        state,
                        reported,
                        headroom: Headroom::default(),
                        others,
                    }
                }
            });
        }
        for mut gone in before {
            gone.headroom.forget();
            gone.tell(None, None);
        }
    }

    /// Takes in what is under way, and what the peer has said since.
    fn look(&mut self, now: Instant) {
        let report = match &*self.link.borrow() {
            State::Open(link, _) => link.report(),
            State::None { .. } | State::Connecting => None,
        };
        let news = report.filter(|report| self.heard != Some(report.heard));
        if let Some(news) = &news {
            self.heard = Some(news.heard);
        }
        for told in &mut self.services {
            let usage = told.reported.usage();
            told.headroom.look(usage, told.others, now, &mut Chance);
            let said = match &news {
                None => told.said(),
                Some(news) => {
                    let said = news.health.get(told.state.name());
                    match said {
                        Some(said) => told
                            .headroom
                            .report(said.spare, told.others, news.heard, &mut Chance),
                        None => told.headroom.forget(),
                    }
                    said
                }
            };
            let bound = told.headroom.bound(now);
            told.tell(said.filter(|_| bound.is_some()), bound);
        }
    }

    fn wants_link(&self, now: Instant) -> bool {
        let mut link = self.link.borrow_mut();
        // One that has gone says nothing any more, and a link without requests doesn't notice.
        let silent = |since: Instant| {
            let last = self.heard.map_or(since, |heard| heard.max(since));
            now.saturating_duration_since(last) >= FRESH_FOR
        };
        if let State::Open(open, since) = &*link
            && (!open.is_usable() || silent(*since))
        {
            *link = State::None { at: None, failed: 0 };
        }
        match &*link {
            State::None { at, .. } => at.is_none_or(|at| now >= at),
            State::Connecting | State::Open(..) => false,
        }
    }

    fn connect(&self, client: &Rc<Client>, connecting: &Rc<()>) {
        let before = self.link.replace(State::Connecting);
        let failed = match before {
            State::None { failed, .. } => failed,
            State::Connecting | State::Open(..) => 0,
        };
        let (link, to, id) = (Rc::clone(&self.link), self.to, self.id.clone());
        let (client, held) = (Rc::clone(client), Rc::clone(connecting));
        // It ends within its time.
        tokio::task::spawn_local(async move {
            let made = tokio::time::timeout(ATTEMPT, client.connect(to, &id)).await;
            drop(held);
            let next = match made {
                Ok(Ok(made)) => State::Open(made, tokio::time::Instant::now().into_std()),
                failure @ (Ok(Err(_)) | Err(_)) => {
                    tracing::debug!(%to, peer = %id, ?failure, "a proxy's reports are not heard");
                    let pause = FIRST_PAUSE
                        .saturating_mul(1 << failed.min(6))
                        .min(LONGEST_PAUSE)
                        .mul_f64(0.75 + Chance.unit() / 2.0);
                    State::None {
                        at: Some(tokio::time::Instant::now().into_std() + pause),
                        failed: failed.saturating_add(1),
                    }
                }
            };
            link.replace(next);
        });
    }
}

impl Told {
    /// What was said last, as far as it is needed.
    fn said(&self) -> Option<ServiceHealth> {
        Some(ServiceHealth {
            healthy: self.reported.healthy()?,
            total: 0,
            spare: self.reported.spare()?,
        })
    }

    fn tell(&self, said: Option<ServiceHealth>, bound: Option<u32>) {
        if self.reported.set(said, bound) {
            self.state.changed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_bounds_nothing() {
        let reported = Reported::new("b".into());
        assert!(reported.has_room() && reported.healthy().is_none() && reported.bound().is_none());
        let said = |healthy, spare| {
            Some(ServiceHealth {
                healthy,
                total: 3,
                spare,
            })
        };
        assert!(reported.set(said(2, 7), Some(1)));
        assert_eq!((reported.healthy(), reported.spare()), (Some(2), Some(7)));
        assert!(reported.has_room());
        reported.begin();
        assert!(!reported.has_room(), "one is under way");
        reported.end();
        assert!(reported.has_room());
        assert_eq!(
            reported.usage(),
            Usage {
                under_way: 0,
                begun: 1
            }
        );
        assert!(!reported.set(said(2, 9), Some(0)), "as many are healthy");
        assert!(!reported.has_room());
        // Numbers that make no sense are large ones.
        reported.set(said(u32::MAX, u32::MAX), Some(u32::MAX));
        assert_eq!(reported.healthy(), Some(UNKNOWN - 1));
        assert!(reported.has_room());
        reported.set(None, None);
        assert!(reported.has_room() && reported.spare().is_none());
    }

    #[test]
    fn requests_begun_wrap_around_alone() {
        let reported = Reported::new("b".into());
        reported
            .usage
            .store(u64::from(UNKNOWN) << 32 | 5, Ordering::Relaxed);
        reported.begin();
        assert_eq!(
            reported.usage(),
            Usage {
                under_way: 6,
                begun: 0
            }
        );
    }
}

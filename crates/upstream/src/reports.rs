//! What the proxies of other zones report of their services, and how that bounds what is sent there.

use crate::chance::Chance;
use crate::registry::Registry;
use crate::service::ServiceState;
use leeward_identity::{Identity, SpiffeId};
use leeward_policy::model::ZoneTransport;
use leeward_policy::{EndpointView, GatewayView, Snapshot, Via};
use leeward_resilience::{Draw, FRESH_FOR, Headroom, LOOK_EVERY, Usage, Word};
use leeward_zone::{Client, Congestion, Link, Report, ServiceHealth};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What is known of a service behind one proxy of another zone, or behind the gateways of one: what this process has under
/// way there, and what was said last. Shared by all workers.
#[derive(Debug)]
pub(crate) struct Reported {
    /// Requests under way, in the low half; those begun so far, in the high one.
    usage: AtomicU64,
    /// How many may be under way.
    bound: AtomicU32,
    /// Endpoints that take requests.
    healthy: AtomicU32,
    /// Requests that each caller may have beside those that it has.
    spare: AtomicU32,
}

/// Who tells of a service elsewhere.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Teller {
    /// The proxy of another zone in front of its endpoints: the zone, and the proxy's name.
    Proxy(Arc<str>, Arc<str>),
    /// The gateways of another zone, for all endpoints there.
    Gateways(Arc<str>),
    /// To a gateway, another proxy of its own zone: what it says is passed on, and bounds nothing here.
    Mate(Arc<str>),
}

impl Teller {
    /// The zone, if it is another one.
    pub(crate) const fn zone(&self) -> Option<&Arc<str>> {
        match self {
            Self::Proxy(zone, _) | Self::Gateways(zone) => Some(zone),
            Self::Mate(_) => None,
        }
    }
}

/// Of a number that is not known.
const UNKNOWN: u32 = u32::MAX;

impl Default for Reported {
    fn default() -> Self {
        Self {
            usage: AtomicU64::new(0),
            bound: AtomicU32::new(UNKNOWN),
            healthy: AtomicU32::new(UNKNOWN),
            spare: AtomicU32::new(UNKNOWN),
        }
    }
}

impl Reported {
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

    /// What was said, if that is known.
    pub(crate) fn word(&self) -> Option<Word> {
        Some(Word {
            healthy: self.healthy()?,
            spare: known(&self.spare)?,
        })
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
    pub(crate) fn set(&self, said: Option<Word>, bound: Option<u32>) -> bool {
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
/// request is. Of zones that are reached through gateways it is these that are listened to. A gateway listens to the
/// proxies of its own zone as well, for what it says of them to others.
///
/// A peer's word counts for the endpoints behind that peer only.
pub struct Reports {
    registry: Arc<Registry>,
    identity: Arc<Identity>,
    client: Rc<Client>,
    peers: HashMap<Whom, Peer>,
    told: Vec<Told>,
    connecting: Rc<()>,
}

/// A proxy, by where it is reached and whose certificate it has.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Whom {
    to: SocketAddr,
    id: SpiffeId,
}

/// A proxy that is listened to.
struct Peer {
    whom: Whom,
    link: Rc<RefCell<State>>,
    /// When it was last heard.
    heard: Option<Instant>,
    /// What it has said since the last look.
    news: Option<Report>,
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

/// A service behind one proxy, or behind the gateways of a zone.
struct Told {
    state: Arc<ServiceState>,
    reported: Arc<Reported>,
    headroom: Headroom,
    /// What the headroom goes by.
    word: Option<Word>,
    /// How many proxies could call, this one among them.
    others: u32,
    /// Who tells: one proxy, or each of the gateways.
    by: Vec<Source>,
}

/// Somebody who tells of a service.
struct Source {
    whom: Whom,
    /// If it is a gateway.
    gateway: Option<GatewayView>,
    /// What it has said last, and when that was heard.
    said: Option<(Word, Instant)>,
}

/// A service of which somebody is to tell.
struct Wanted {
    teller: Teller,
    state: Arc<ServiceState>,
    others: u32,
    by: Vec<Source>,
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
            told: Vec::new(),
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
            self.look(now);
            for peer in self.peers.values() {
                if peer.wants_link(now) && Rc::strong_count(&self.connecting) <= MAX_CONNECTING {
                    peer.connect(&self.client, &self.connecting);
                }
            }
        }
    }

    /// Takes in what is under way, and what peers have said since.
    fn look(&mut self, now: Instant) {
        for peer in self.peers.values_mut() {
            peer.hear();
        }
        let is_open = |gateway: &GatewayView| self.registry.is_gateway_open(gateway, now);
        for told in &mut self.told {
            told.look(|whom| self.peers.get(whom)?.news.as_ref(), is_open, now);
        }
        // Whoever holds on to it makes its link copy all of it for the next.
        for peer in self.peers.values_mut() {
            peer.news = None;
        }
    }

    /// Listens to those that policy and the calls of late make worth it, and no longer to others.
    fn follow(&mut self, snapshot: &Snapshot, now: Instant) {
        let wanted = self.wanted(snapshot, now);
        let mut before: HashMap<*const Reported, Told> = std::mem::take(&mut self.told)
            .into_iter()
            .map(|told| (Arc::as_ptr(&told.reported), told))
            .collect();
        let mut peers = HashMap::new();
        for wanted in wanted {
            let reported = wanted.state.reported(wanted.teller.clone());
            let known = before.remove(&Arc::as_ptr(&reported));
            let mut told = known.unwrap_or_else(|| Told::new(&wanted, reported));
            told.others = wanted.others;
            let is_new = told.follow(wanted.by);
            for source in &told.by {
                let known = self.peers.remove(&source.whom);
                let peer: &mut Peer = peers
                    .entry(source.whom.clone())
                    .or_insert_with(|| known.unwrap_or_else(|| Peer::new(source.whom.clone())));
                if is_new {
                    // What is known already is news of it.
                    peer.heard = None;
                }
            }
            self.told.push(told);
        }
        self.peers = peers;
        for gone in before.into_values() {
            gone.tell(None, None);
        }
    }

    fn wanted(&self, snapshot: &Snapshot, now: Instant) -> Vec<Wanted> {
        let here = snapshot.viewer.zone.as_str();
        let mut known = HashSet::new();
        let mut wanted: Vec<Wanted> = Vec::new();
        for view in snapshot.services() {
            let called = self.registry.called(&view.name);
            let called = called.filter(|state| state.called_within(CALLED_FOR, now));
            let heeds = called.is_some() && view.spec.balance.zones.remote_reports;
            if !heeds && !snapshot.gateways().is_one {
                continue;
            }
            let mut state = called;
            let first = wanted.len();
            let mut seen = HashSet::new();
            for endpoint in view.endpoints.iter().filter(|&e| seen.insert(&e.key.via)) {
                let elsewhere = *endpoint.zone != *here;
                let listens = if elsewhere {
                    heeds && endpoint.transport != ZoneTransport::Tcp
                } else {
                    snapshot.gateways().is_one
                };
                if !listens {
                    continue;
                }
                let Some((teller, by)) = self.sources(endpoint, elsewhere) else {
                    continue;
                };
                let by = by.into_iter().filter(|Source { whom, .. }| {
                    let may = known.len() < MAX_HEARD || known.contains(whom);
                    if may {
                        known.insert(whom.clone());
                    }
                    may
                });
                // Behind several proxies of a zone there may be the same gateways, and others.
                let same = wanted.iter_mut().skip(first).find(|told| told.teller == teller);
                if let Some(same) = same {
                    for source in by {
                        if same.by.iter().all(|known| known.whom != source.whom) {
                            same.by.push(source);
                        }
                    }
                    continue;
                }
                wanted.push(Wanted {
                    by: by.collect(),
                    teller,
                    state: Arc::clone(state.get_or_insert_with(|| self.registry.service(&view.name))),
                    others: snapshot.proxies_outside(&endpoint.zone),
                });
            }
        }
        wanted
    }

    /// Who tells of an endpoint, if anybody does.
    fn sources(&self, endpoint: &EndpointView, elsewhere: bool) -> Option<(Teller, Vec<Source>)> {
        let domain = self.identity.id().trust_domain();
        let source = |to: SocketAddr, zone: &str, name: &str, gateway: Option<&GatewayView>| {
            let id = SpiffeId::proxy(domain, zone, name).ok()?;
            Some(Source {
                whom: Whom { to, id },
                gateway: gateway.cloned(),
                said: None,
            })
        };
        match &endpoint.key.via {
            Via::Direct => None,
            Via::Proxy { address, zone, name } => {
                let teller = if elsewhere {
                    Teller::Proxy(Arc::clone(zone), Arc::clone(name))
                } else {
                    Teller::Mate(Arc::clone(name))
                };
                Some((teller, vec![source(*address, zone, name, None)?]))
            }
            Via::Gateway { zone, .. } => {
                let views = endpoint.gateways.iter().flat_map(|views| views.iter());
                let by = views
                    .filter_map(|view| source(view.address, &view.zone, &view.name, Some(view)))
                    .collect();
                Some((Teller::Gateways(Arc::clone(zone)), by))
            }
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
    fn new(whom: Whom) -> Self {
        Self {
            whom,
            link: Rc::new(RefCell::new(State::None { at: None, failed: 0 })),
            heard: None,
            news: None,
        }
    }

    /// Takes what it has said since the last look.
    fn hear(&mut self) {
        let report = match &*self.link.borrow() {
            State::Open(link, _) => link.report(),
            State::None { .. } | State::Connecting => None,
        };
        self.news = report.filter(|report| self.heard != Some(report.heard));
        if let Some(news) = &self.news {
            self.heard = Some(news.heard);
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
        let (link, Whom { to, id }) = (Rc::clone(&self.link), self.whom.clone());
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
    fn new(wanted: &Wanted, reported: Arc<Reported>) -> Self {
        Self {
            state: Arc::clone(&wanted.state),
            reported,
            headroom: match &wanted.teller {
                Teller::Gateways(_) => Headroom::relayed(),
                Teller::Proxy(..) | Teller::Mate(_) => Headroom::default(),
            },
            word: None,
            others: wanted.others,
            by: Vec::new(),
        }
    }

    /// Goes on with those that tell of it now; whether any of them is new.
    fn follow(&mut self, by: Vec<Source>) -> bool {
        let before = std::mem::replace(&mut self.by, by);
        let mut is_new = false;
        for source in &mut self.by {
            match before.iter().find(|known| known.whom == source.whom) {
                Some(known) => source.said = known.said,
                None => is_new = true,
            }
        }
        is_new
    }

    fn look<'a>(
        &mut self,
        news: impl Fn(&Whom) -> Option<&'a Report>,
        is_open: impl Fn(&GatewayView) -> bool,
        now: Instant,
    ) {
        self.headroom
            .look(self.reported.usage(), self.others, now, &mut Chance);
        let mut is_news = false;
        for source in &mut self.by {
            if let Some(news) = news(&source.whom) {
                is_news = true;
                let said = news.health.get(self.state.name());
                source.said = said.map(|said| {
                    let ServiceHealth { healthy, spare, .. } = said;
                    (Word { healthy, spare }, news.heard)
                });
            }
        }
        // A gateway that can't be reached speaks for nobody, and one that is silent not for long.
        let counts = |source: &&Source| {
            let is_fresh = |(_, at): (Word, Instant)| now.saturating_duration_since(at) < FRESH_FOR;
            source.gateway.as_ref().is_none_or(&is_open) && source.said.is_some_and(is_fresh)
        };
        let said: Vec<(Word, Instant)> = self.by.iter().filter(counts).filter_map(|s| s.said).collect();
        let word = Word::agreed(said.iter().map(|(word, _)| *word));
        if is_news || word != self.word {
            self.word = word;
            match word.zip(said.iter().map(|(_, at)| *at).max()) {
                Some((word, heard)) => self.headroom.report(word.spare, self.others, heard, &mut Chance),
                None => self.headroom.forget(),
            }
        }
        let bound = self.headroom.bound(now);
        self.tell(word.filter(|_| bound.is_some()), bound);
    }

    fn tell(&self, said: Option<Word>, bound: Option<u32>) {
        if self.reported.set(said, bound) {
            self.state.changed();
        }
    }
}

#[cfg(test)]
mod tests;

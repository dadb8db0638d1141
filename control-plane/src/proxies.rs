//! What is known of the proxies: one watermark and a short list for each, counted as they change, so that a question costs no
//! look at every one.

use crate::rollout::reach::{Census, Reach, rank};
use leeward_policy::Key;
use leeward_proto::{parse_key, v1};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The proxies that are connected or were lately.
#[derive(Debug, Default)]
pub struct Proxies {
    // Poison is harmless: the worst is a count that is one off.
    book: Mutex<Book>,
}

/// A proxy's zone and name.
type Id = (String, String);

/// What proxies refuse, by resource and proxy, each with the watermark of the proxy that refuses it.
type Refusals = BTreeMap<Key, BTreeMap<Id, (Mark, v1::Refusal)>>;

#[derive(Debug, Default)]
struct Book {
    known: BTreeMap<Id, Known>,
    /// The connected ones, by what they run.
    marks: BTreeMap<Mark, usize>,
    /// The same, those that are furthest behind first.
    order: BTreeSet<(u64, Id)>,
    gone: BTreeSet<Id>,
    /// Proxies by zone: connected, and all.
    zones: BTreeMap<String, (usize, usize)>,
    refusals: Arc<Refusals>,
    /// The revision that a rollout holds back.
    held: Option<u64>,
}

#[derive(Clone, Debug)]
struct Known {
    status: v1::ProxyStatus,
    heard: Instant,
    /// Which stream it is on; an older one that ends late changes nothing.
    stream: u64,
    mark: Mark,
    /// When it began to run what it runs.
    since: prost_types::Timestamp,
    /// Its rank in the last rollout that asked.
    rank: Option<(u64, u64)>,
    /// Whether it had a rollout's change when it last told of its requests.
    told: Option<(u64, bool)>,
}

/// How far a proxy is.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
struct Mark {
    /// Everything up to here is live, but for what is quarantined.
    generation: u64,
    /// The same, but for what a rollout holds back.
    through: u64,
    /// The first revision of which something is quarantined; 0 for none.
    refuses: u64,
}

impl Mark {
    const fn up_to(self, watermark: u64) -> u64 {
        if self.refuses == 0 || self.refuses > watermark {
            watermark
        } else {
            self.refuses - 1
        }
    }

    /// Everything up to here is live, and nothing of it quarantined.
    const fn running(self) -> u64 {
        self.up_to(self.generation)
    }

    /// Whether a revision is live. One after `held`, which a rollout holds back, may be where that isn't.
    const fn has(self, revision: u64, held: Option<u64>) -> bool {
        self.generation >= revision
            || matches!(held, Some(held) if revision > held && self.through >= revision)
    }

    /// Whether everything up to a revision is, as far as it isn't held back, and nothing of it quarantined.
    const fn runs(self, revision: u64, held: Option<u64>) -> bool {
        self.has(revision, held) && (self.refuses == 0 || self.refuses > revision)
    }
}

/// Where the mesh stands at one moment, arranged so that any number of resources can be looked up in it.
#[derive(Debug, Default)]
pub struct Standing {
    marks: Vec<(Mark, usize)>,
    refusals: Arc<Refusals>,
    held: Option<u64>,
}

/// How long a proxy that is gone is remembered.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// How long one counts that is connected to no control plane.
pub(crate) const COUNTS_FOR: Duration = Duration::from_secs(300);
/// Proxies that are remembered; past that the ones gone longest are forgotten first.
const MAX_PROXIES: usize = 100_000;
/// Refusals that a resource's status names.
const MAX_REFUSALS: usize = 100;
/// Refusals that are taken from one proxy, as push.proto says.
const MAX_QUARANTINED: usize = 1000;
/// Laggards that are named.
pub(crate) const MAX_LAGGARDS: usize = 100;
/// Bytes of a reason that is told of a laggard.
const MAX_REASON: usize = 300;
/// Gone ones that are named to other control planes.
const MAX_GONE: usize = 1000;

impl Book {
    /// Counts one, or no longer.
    fn count(&mut self, id: &Id, comes: bool) {
        let Some(known) = self.known.get(id) else { return };
        let (mark, connected) = (known.mark, known.status.connected);
        let zone = self.zones.entry(id.0.clone()).or_default();
        let place = (mark.running(), id.clone());
        if comes {
            zone.1 += 1;
        } else {
            zone.1 = zone.1.saturating_sub(1);
        }
        if !connected {
            if comes {
                self.gone.insert(id.clone());
            } else {
                self.gone.remove(id);
            }
        } else if comes {
            zone.0 += 1;
            *self.marks.entry(mark).or_default() += 1;
            self.order.insert(place);
        } else {
            zone.0 = zone.0.saturating_sub(1);
            if let Some(count) = self.marks.get_mut(&mark) {
                *count -= 1;
                if *count == 0 {
                    self.marks.remove(&mark);
                }
            }
            self.order.remove(&place);
        }
        if zone.1 == 0 {
            self.zones.remove(&id.0);
        }
        if known.status.quarantined.is_empty() || !connected {
            return;
        }
        let refusals = Arc::make_mut(&mut self.refusals);
        for refused in &known.status.quarantined {
            let Some(Ok(key)) = refused.r#ref.as_ref().map(parse_key) else {
                continue;
            };
            if comes {
                let refusal = v1::Refusal {
                    proxy: id.1.clone(),
                    revision: refused.revision,
                    reason: refused.reason.clone(),
                    running_revision: refused.running_revision,
                };
                refusals
                    .entry(key)
                    .or_default()
                    .insert(id.clone(), (mark, refusal));
            } else if let Some(of_key) = refusals.get_mut(&key) {
                of_key.remove(id);
                if of_key.is_empty() {
                    refusals.remove(&key);
                }
            }
        }
    }

    /// Puts one in place of what was known of it.
    fn put(&mut self, id: Id, known: Known) {
        self.count(&id, false);
        self.known.insert(id.clone(), known);
        self.count(&id, true);
    }

    fn remove(&mut self, id: &Id) {
        self.count(id, false);
        self.known.remove(id);
    }

    /// Changes what is known of one, if it is on this stream.
    fn change(&mut self, id: &Id, stream: u64, change: impl FnOnce(&mut Known)) {
        if self.known.get(id).is_none_or(|known| known.stream != stream) {
            return;
        }
        self.count(id, false);
        if let Some(known) = self.known.get_mut(id) {
            change(known);
        }
        self.count(id, true);
    }
}

impl Known {
    fn laggard(&self, id: &Id) -> v1::Laggard {
        let refused = self.status.quarantined.iter();
        let first = refused.min_by_key(|refused| refused.revision);
        let named = |refused: &v1::Quarantined| {
            let key = refused.r#ref.as_ref().and_then(|key| parse_key(key).ok());
            let key = key.map_or_else(|| "a resource".to_owned(), |key| key.to_string());
            let reason = refused.reason.as_str();
            let reason = reason
                .get(..reason.floor_char_boundary(MAX_REASON))
                .unwrap_or_default();
            format!("{key} of revision {}: {reason}", refused.revision)
        };
        v1::Laggard {
            zone: id.0.clone(),
            proxy: id.1.clone(),
            running: self.mark.running(),
            since: Some(self.since),
            connected: self.status.connected,
            refuses: first.map(named).unwrap_or_default(),
        }
    }
}

impl Proxies {
    /// A proxy has opened a stream. `generation` is what it runs of this store; 0 for nothing.
    pub fn connected(&self, hello: &v1::Hello, generation: u64, stream: u64, now: Instant) {
        let mut book = self.locked();
        if book.known.len() >= MAX_PROXIES {
            let gone = book
                .gone
                .iter()
                .filter_map(|id| Some((id, book.known.get(id)?.heard)));
            let oldest = gone.min_by_key(|(_, heard)| *heard).map(|(id, _)| id.clone());
            if let Some(id) = oldest {
                book.remove(&id);
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
        let known = Known {
            status,
            heard: now,
            stream,
            mark: Mark {
                generation,
                through: generation,
                refuses: 0,
            },
            since: wall(),
            rank: None,
            told: None,
        };
        book.put(id_of(hello), known);
    }

    /// A proxy has said what is live on it, or only that it is there.
    pub fn heard(&self, hello: &v1::Hello, stream: u64, ack: Option<v1::Ack>, now: Instant) {
        let mut book = self.locked();
        let id = id_of(hello);
        let Some(mut ack) = ack else {
            // Nothing that is counted changes.
            if let Some(known) = book.known.get_mut(&id).filter(|known| known.stream == stream) {
                known.heard = now;
                known.status.last_seen = Some(wall());
            }
            return;
        };
        ack.quarantined.truncate(MAX_QUARANTINED);
        book.change(&id, stream, |known| {
            known.heard = now;
            known.status.last_seen = Some(wall());
            let before = known.mark.running();
            let refused = ack.quarantined.iter().map(|refused| refused.revision.max(1));
            known.mark = Mark {
                generation: ack.generation,
                through: ack.through.max(ack.generation),
                refuses: refused.min().unwrap_or(0),
            };
            if known.mark.running() != before {
                known.since = wall();
            }
            known.status.generation = ack.generation;
            known.status.quarantined = ack.quarantined;
            known.status.orphans = ack.orphans;
        });
    }

    /// A proxy's stream has ended.
    pub fn gone(&self, hello: &v1::Hello, stream: u64) {
        self.locked()
            .change(&id_of(hello), stream, |known| known.status.connected = false);
    }

    /// Forgets the proxies that have been gone for an hour. Costs a look at each that is gone.
    pub fn forget(&self, now: Instant) {
        let mut book = self.locked();
        let old = |id: &&Id| {
            let heard = book.known.get(*id).map(|known| known.heard);
            heard.is_none_or(|heard| now.saturating_duration_since(heard) >= REMEMBERED)
        };
        let old: Vec<Id> = book.gone.iter().filter(old).cloned().collect();
        old.iter().for_each(|id| book.remove(id));
    }

    /// All of them, by zone and name.
    pub fn list(&self) -> Vec<v1::ProxyStatus> {
        let book = self.locked();
        book.known.values().map(|known| known.status.clone()).collect()
    }

    /// A rollout holds a revision back, or none does.
    pub(crate) fn hold(&self, revision: Option<u64>) {
        self.locked().held = revision;
    }

    /// Where the mesh stands now.
    pub fn standing(&self) -> Standing {
        let book = self.locked();
        Standing {
            marks: book.marks.iter().map(|(mark, count)| (*mark, *count)).collect(),
            refusals: Arc::clone(&book.refusals),
            held: book.held,
        }
    }

    /// The same for other control planes and for people: how many run what, and who is behind a revision (0: nobody is
    /// named). Of `seek`, those are named that are connected.
    pub(crate) fn tell(&self, laggards_of: u64, seek: &[String], now: Instant) -> v1::Standing {
        let book = self.locked();
        let held = book.held;
        let mut counts: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        for (mark, count) in &book.marks {
            let place = (mark.running(), mark.up_to(mark.through));
            *counts.entry(place).or_default() += *count as u64;
        }
        // Those that are furthest behind come first.
        let behind = book
            .order
            .iter()
            .take_while(|(running, _)| *running < laggards_of);
        let behind = behind.filter_map(|(_, id)| {
            let known = book.known.get(id)?;
            (!known.mark.runs(laggards_of, held)).then(|| known.laggard(id))
        });
        let lately = book.gone.iter().filter_map(|id| {
            let known = book.known.get(id)?;
            (now.saturating_duration_since(known.heard) < COUNTS_FOR).then_some((id, known))
        });
        let is_here = |text: &&String| {
            let (zone, proxy) = text.split_once('/').unwrap_or_default();
            let known = book.known.get(&(zone.to_owned(), proxy.to_owned()));
            known.is_some_and(|known| known.status.connected)
        };
        v1::Standing {
            counts: counts
                .into_iter()
                .map(|((running, through), proxies)| v1::RunningCount {
                    running,
                    through,
                    proxies,
                })
                .collect(),
            laggards: behind.take(MAX_LAGGARDS).collect(),
            more_gone: (lately.clone().count() as u64).saturating_sub(MAX_GONE as u64),
            gone: lately
                .take(MAX_GONE)
                .map(|(id, known)| known.laggard(id))
                .collect(),
            found: seek.iter().take(MAX_GONE).filter(is_here).cloned().collect(),
            ..v1::Standing::default()
        }
    }

    /// Who there is for a rollout, whom it has reached, and how they are with what it `changed`. Costs a look at each proxy.
    pub(crate) fn count(
        &self,
        rollout: u64,
        reach: &Reach,
        changed: &BTreeSet<Key>,
    ) -> (Census, v1::RolloutCount) {
        let mut book = self.locked();
        let (mut census, mut count) = (Census::default(), v1::RolloutCount::default());
        for (id, known) in book.known.iter_mut().filter(|(_, known)| known.status.connected) {
            let rank = match known.rank {
                Some((of, rank)) if of == rollout => rank,
                Some(_) | None => rank(rollout, &id.0, &id.1),
            };
            known.rank = Some((rollout, rank));
            match census.zones.get_mut(&id.0) {
                Some(zone) => zone.add(rank),
                None => census.zones.entry(id.0.clone()).or_default().add(rank),
            }
            if !reach.has(&id.0, rank) {
                continue;
            }
            count.members += 1;
            if known.mark.generation >= rollout {
                count.running += 1;
            } else if count.laggard.is_empty() {
                count.laggard = format!("{} in zone {} runs {}", id.1, id.0, known.mark.running());
            }
            let refused = known.status.quarantined.iter().find(|refused| {
                let key = refused.r#ref.as_ref().and_then(|key| parse_key(key).ok());
                refused.revision >= rollout && key.is_some_and(|key| changed.contains(&key))
            });
            if let Some(refused) = refused.filter(|_| count.refusal.is_empty()) {
                let key = refused.r#ref.as_ref().and_then(|key| parse_key(key).ok());
                let key = key.map(|key| key.to_string()).unwrap_or_default();
                count.refusal = format!("{} in zone {}: {key}: {}", id.1, id.0, refused.reason);
            }
        }
        (census, count)
    }

    /// Whether a proxy that tells of its requests has a rollout's change; `None` if that has changed since it last told, and
    /// what it tells is of both.
    pub(crate) fn side(&self, hello: &v1::Hello, stream: u64, rollout: u64) -> Option<bool> {
        let mut book = self.locked();
        let known = book.known.get_mut(&id_of(hello))?;
        if known.stream != stream {
            return None;
        }
        let side = (rollout, known.mark.generation >= rollout);
        let before = known.told.replace(side);
        (before == Some(side)).then_some(side.1)
    }

    /// The zones of all of them, each with whether one of its proxies is connected.
    pub fn zones(&self) -> BTreeMap<String, bool> {
        let book = self.locked();
        let zones = book.zones.iter();
        zones
            .map(|(zone, (connected, _))| (zone.clone(), *connected > 0))
            .collect()
    }

    /// Proxies connected, and the lowest watermark among them.
    pub fn summary(&self) -> (usize, Option<u64>) {
        let book = self.locked();
        let lowest = book.marks.keys().map(|mark| mark.generation).min();
        (book.marks.values().sum(), lowest)
    }

    /// Proxies connected by how many revisions they are behind: none, up to 10, 100, 1000, and more; and those that refuse
    /// something.
    pub(crate) fn lag(&self, head: u64) -> ([u64; 5], u64) {
        let (mut buckets, mut refusing) = ([0; 5], 0);
        for (mark, count) in &self.locked().marks {
            let bucket = match head.saturating_sub(mark.through) {
                0 => 0,
                1..=10 => 1,
                11..=100 => 2,
                101..=1000 => 3,
                _ => 4,
            };
            if let Some(sum) = buckets.get_mut(bucket) {
                *sum += *count as u64;
            }
            if mark.refuses > 0 {
                refusing += *count as u64;
            }
        }
        (buckets, refusing)
    }

    fn locked(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Standing {
    /// Where a revision of a resource stands: a look at each watermark that there is, and at its refusals.
    pub fn of(&self, key: &Key, revision: u64) -> v1::Status {
        let has = |mark: &Mark| mark.has(revision, self.held);
        let proxies = self.marks.iter().map(|(_, count)| count).sum();
        let running = self.marks.iter().filter(|(mark, _)| has(mark));
        let mut live: usize = running.map(|(_, count)| count).sum();
        let mut refusals = Vec::new();
        let refused = self.refusals.get(key).into_iter().flat_map(BTreeMap::values);
        for (mark, refusal) in refused.filter(|(_, refusal)| refusal.revision >= revision) {
            if has(mark) {
                live = live.saturating_sub(1);
            }
            if refusals.len() < MAX_REFUSALS {
                refusals.push(refusal.clone());
            }
        }
        v1::Status {
            live: count(live),
            proxies: count(proxies),
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
    use proptest::prelude::*;

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
            ..v1::Ack::default()
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

    /// What is counted as it changes, counted anew.
    fn recount(book: &Book) {
        let mut anew = Book::default();
        for (id, known) in &book.known {
            anew.put(id.clone(), known.clone());
        }
        assert_eq!(book.marks, anew.marks);
        assert_eq!(book.order, anew.order);
        assert_eq!(book.gone, anew.gone);
        assert_eq!(book.zones, anew.zones);
        let keys = |refusals: &Refusals| -> Vec<(Key, Vec<Id>)> {
            let of = refusals.iter();
            of.map(|(key, of_key)| (key.clone(), of_key.keys().cloned().collect()))
                .collect()
        };
        assert_eq!(keys(&book.refusals), keys(&anew.refusals));
    }

    #[derive(Clone, Debug)]
    enum Event {
        Connected(u64),
        Acked(u64, u64, Option<u64>),
        Gone(u64),
        Forget,
    }

    fn event() -> impl Strategy<Value = (usize, Event)> {
        let event = prop_oneof![
            (0..4u64).prop_map(Event::Connected),
            (0..4u64, 0..9u64, prop::option::of(1..9u64)).prop_map(|(s, g, r)| Event::Acked(s, g, r)),
            (0..4u64).prop_map(Event::Gone),
            Just(Event::Forget),
        ];
        (0..6usize, event)
    }

    proptest! {
        #[test]
        fn counts_that_are_kept_are_those_of_a_look_at_each(events in prop::collection::vec(event(), 1..60)) {
            let (proxies, mut now) = (Proxies::default(), now());
            for (i, event) in events {
                now += Duration::from_secs(600);
                let hello = hello(&format!("p{i}"));
                match event {
                    Event::Connected(stream) => proxies.connected(&hello, stream, stream, now),
                    Event::Acked(stream, generation, refused) => {
                        proxies.heard(&hello, stream, Some(ack(generation, refused)), now);
                    }
                    Event::Gone(stream) => proxies.gone(&hello, stream),
                    Event::Forget => proxies.forget(now),
                }
                recount(&proxies.locked());
            }
        }
    }

    #[test]
    fn those_behind_are_named_and_the_gone_age_out() {
        let (proxies, start) = (Proxies::default(), now());
        for (name, generation, refused) in [
            ("p1", 9, None),
            ("p2", 9, Some(7)),
            ("p3", 4, None),
            ("p4", 9, None),
        ] {
            proxies.connected(&hello(name), 0, 1, start);
            proxies.heard(&hello(name), 1, Some(ack(generation, refused)), start);
        }
        proxies.gone(&hello("p4"), 1);
        let told = proxies.tell(9, &["a/p1".into(), "a/p4".into(), "b/p1".into()], start);
        let named: Vec<_> = told
            .laggards
            .iter()
            .map(|l| (l.proxy.as_str(), l.running))
            .collect();
        assert_eq!(named, [("p3", 4), ("p2", 6)]);
        assert!(
            told.laggards[1]
                .refuses
                .contains("Plugin/p of revision 7: no file")
        );
        assert_eq!(told.gone.len(), 1);
        assert_eq!(told.found, ["a/p1"]);
        let later = proxies.tell(9, &[], start + COUNTS_FOR);
        assert!(later.gone.is_empty());
        // An older revision is run by whoever refuses a later one.
        assert_eq!(proxies.tell(5, &[], start).laggards.len(), 1);
    }

    /// What a question costs is told, not asserted: it is for the page on rollouts.
    #[test]
    fn a_question_about_ten_thousand_is_answered_from_counts() {
        let (proxies, start) = (Proxies::default(), now());
        for i in 0..10_000u32 {
            let hello = hello(&format!("p{i}"));
            proxies.connected(&hello, 0, 1, start);
            let generation = if i % 100 == 0 { 8 } else { 9 };
            proxies.heard(&hello, 1, Some(ack(generation, None)), start);
        }
        assert_eq!(proxies.locked().marks.len(), 2);
        let began = now();
        for _ in 0..100 {
            let told = proxies.tell(9, &[], start);
            assert_eq!((told.counts.len(), told.laggards.len()), (2, 100));
        }
        let each = began.elapsed() / 100;
        let began = now();
        let (census, count) = proxies.count(9, &Reach::everybody(), &BTreeSet::new());
        assert_eq!(
            (census.live(), count.members, count.running),
            (10_000, 10_000, 9_900)
        );
        eprintln!(
            "a question: {each:?}; a look at each for a rollout: {:?}",
            began.elapsed()
        );
    }
}

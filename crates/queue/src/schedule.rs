//! Which entry is sent next: order within keys, pauses, gates of services, bounds on what is under way, age.

use crate::clock::millis;
use crate::entry::EntryId;
use crate::gate::{Gate, Pass};
use leeward_policy::model::{Queue, RateLimit, RateLimitKey};
use leeward_resilience::{Draw, Gcra, Rate};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

/// Entries that are known at once, some 200 bytes each. Those behind them in the queue are looked at when there is
/// room, so a queue with more entries than this, all held back, holds back what comes after them.
pub(crate) const WINDOW: usize = 100_000;

/// What there is to know of an entry to send it in time.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// Its place in the order of the queue; unique, above 0.
    pub(crate) seq: u64,
    pub(crate) id: EntryId,
    pub(crate) service: Arc<str>,
    pub(crate) key: Option<Arc<str>>,
    /// Attempts that were answered.
    pub(crate) attempts: u32,
    /// Since when it waits, in milliseconds since 1970.
    pub(crate) since_ms: u64,
    /// Not before this, in milliseconds since 1970.
    pub(crate) due_ms: u64,
}

/// An entry that is to be sent now. It is under way until it is given back.
#[derive(Clone, Debug)]
pub(crate) struct Sending {
    pub(crate) seq: u64,
    pub(crate) id: EntryId,
    /// Attempts before this that were answered.
    pub(crate) attempts: u32,
    /// Failures before this since it was read, answered or not.
    pub(crate) failures: u32,
    pass: Pass,
}

/// What to do.
#[derive(Clone, Debug)]
pub(crate) enum Next {
    /// Send this.
    Send(Sending),
    /// Nothing before this time, in milliseconds since 1970, unless something changes.
    Wait(u64),
}

/// The entries of one queue that wait or are under way.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    items: HashMap<u64, Item>,
    /// The entries of each key, in order: only the first may be sent.
    keys: HashMap<Arc<str>, BTreeSet<u64>>,
    services: BTreeMap<Arc<str>, Service>,
    /// Entries that pause, by the end of their pause.
    pausing: BTreeSet<(u64, u64)>,
    /// All entries that are not under way, by the time since when they wait.
    ages: BTreeSet<(u64, u64)>,
    under_way: u32,
    /// The service that was served last; the next one in order is asked first.
    turn: Option<Arc<str>>,
    rate: Gcra,
    rate_of: u32,
}

#[derive(Debug)]
struct Item {
    id: EntryId,
    service: Arc<str>,
    key: Option<Arc<str>>,
    attempts: u32,
    failures: u32,
    since_ms: u64,
    due_ms: u64,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// Behind another of its key.
    Held,
    /// Until it is due.
    Pausing,
    Ready,
    UnderWay,
}

#[derive(Debug)]
struct Service {
    gate: Gate,
    ready: BTreeSet<u64>,
    /// The entry that was tried last of those that closed the gate or left it closed: while the gate isn't open the
    /// next in order has its turn, so that one that never gets through doesn't hold back those that would.
    tried: u64,
    /// Its entries in the schedule.
    entries: usize,
    under_way: u32,
}

impl Service {
    /// The entry to be sent now: the oldest, or while the gate isn't open the one whose turn it is.
    fn take_ready(&mut self) -> Option<u64> {
        if self.gate == Gate::Open {
            return self.ready.pop_first();
        }
        let later = (Bound::Excluded(self.tried), Bound::Unbounded);
        let seq = *self.ready.range(later).next().or_else(|| self.ready.first())?;
        self.ready.remove(&seq);
        self.tried = seq;
        Some(seq)
    }
}

impl Schedule {
    /// Entries known.
    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// Takes an entry in. One that is known already changes nothing.
    pub(crate) fn add(&mut self, row: Row, now_ms: u64, queue: &Queue) {
        if self.items.contains_key(&row.seq) {
            return;
        }
        // A pause that was written down by a clock that went ahead must not last longer than a pause can.
        let longest = queue.max_interval.max(Duration::from_secs(3600));
        let due_ms = row.due_ms.min(now_ms.saturating_add(millis(longest)));
        let service = match self.services.get_key_value(&row.service) {
            Some((name, _)) => Arc::clone(name),
            None => Arc::clone(&row.service),
        };
        self.services
            .entry(Arc::clone(&service))
            .or_insert_with(|| Service {
                gate: Gate::Open,
                ready: BTreeSet::new(),
                tried: 0,
                entries: 0,
                under_way: 0,
            })
            .entries += 1;
        if let Some(key) = &row.key {
            self.keys.entry(Arc::clone(key)).or_default().insert(row.seq);
        }
        self.ages.insert((row.since_ms, row.seq));
        let item = Item {
            id: row.id,
            service,
            key: row.key,
            attempts: row.attempts,
            failures: row.attempts,
            since_ms: row.since_ms,
            due_ms,
            stage: Stage::Held,
        };
        self.items.insert(row.seq, item);
        self.settle_in(row.seq, now_ms);
    }

    /// What to do now. `nanos` is the time of the rate limit, from any origin that stays the same.
    pub(crate) fn next(&mut self, now_ms: u64, nanos: u64, queue: &Queue) -> Next {
        while let Some(&(due_ms, seq)) = self.pausing.first()
            && due_ms <= now_ms
        {
            self.pausing.pop_first();
            self.make_ready(seq);
        }
        let wake = self.pausing.first().map_or(u64::MAX, |(due_ms, _)| *due_ms);
        if self.under_way >= queue.max_concurrency.max(1) {
            return Next::Wait(u64::MAX);
        }
        let Some(name) = self.whose_turn(now_ms) else {
            let gates = self.services.values().filter(|s| !s.ready.is_empty());
            let opens = gates.filter_map(|s| s.gate.opens_at()).min();
            return Next::Wait(wake.min(opens.unwrap_or(u64::MAX)));
        };
        if self.rate_of != queue.max_rate {
            (self.rate, self.rate_of) = (Gcra::new(), queue.max_rate);
        }
        if let Err(wait) = self.rate.admit(nanos, rate(queue.max_rate)) {
            return Next::Wait(now_ms.saturating_add(millis(wait)));
        }
        let sending = self.services.get_mut(&name).and_then(|service| {
            let seq = service.take_ready()?;
            let item = self.items.get_mut(&seq)?;
            item.stage = Stage::UnderWay;
            service.under_way += 1;
            self.under_way += 1;
            self.ages.remove(&(item.since_ms, seq));
            Some(Sending {
                seq,
                id: item.id,
                attempts: item.attempts,
                failures: item.failures,
                pass: service.gate.pass(),
            })
        });
        self.turn = Some(name);
        // There is always one: whose turn it is has something ready, and what is ready is known.
        sending.map_or_else(|| Next::Wait(now_ms.saturating_add(1)), Next::Send)
    }

    /// An entry that has waited too long, as one that is under way: it is to be ended with [`Self::end`].
    pub(crate) fn expired(&mut self, now_ms: u64, queue: &Queue) -> Option<(u64, EntryId, u32)> {
        let &(since_ms, seq) = self.ages.first()?;
        if now_ms < since_ms.saturating_add(millis(queue.max_age)) {
            return None;
        }
        self.ages.pop_first();
        self.withdraw(seq);
        let item = self.items.get_mut(&seq)?;
        item.stage = Stage::UnderWay;
        if let Some(service) = self.services.get_mut(&item.service) {
            service.under_way += 1;
        }
        self.under_way += 1;
        Some((seq, item.id, item.attempts))
    }

    /// When the first entry will have waited too long.
    pub(crate) fn expires_at(&self, queue: &Queue) -> u64 {
        let oldest = self.ages.first();
        oldest.map_or(u64::MAX, |(since, _)| since.saturating_add(millis(queue.max_age)))
    }

    /// Whether it has been given out and not yet given back.
    pub(crate) fn is_under_way(&self, seq: u64) -> bool {
        let item = self.items.get(&seq);
        item.is_some_and(|item| item.stage == Stage::UnderWay)
    }

    /// The delivery has reached the service.
    pub(crate) fn reached(&mut self, sending: &Sending, queue: &Queue) {
        if let Some(gate) = self.gate(sending.seq) {
            gate.reached(queue.max_concurrency);
        }
    }

    /// It has not reached the service, and waits again in its old place.
    pub(crate) fn missed(
        &mut self,
        sending: &Sending,
        retry_after: Option<Duration>,
        queue: &Queue,
        now_ms: u64,
        draw: &mut impl Draw,
    ) {
        if let Some(service) = self.service(sending.seq) {
            let gate = &mut service.gate;
            if gate.missed(sending.pass, retry_after, queue, now_ms, draw) {
                service.tried = sending.seq;
            }
        }
        self.land(sending.seq);
        self.settle_in(sending.seq, now_ms);
    }

    /// It failed, and is tried again when it is due.
    pub(crate) fn again(&mut self, seq: u64, attempts: u32, due_ms: u64, now_ms: u64) {
        self.land(seq);
        if let Some(item) = self.items.get_mut(&seq) {
            item.attempts = attempts;
            item.failures = item.failures.saturating_add(1);
            item.due_ms = due_ms;
        }
        self.settle_in(seq, now_ms);
    }

    /// Nothing was sent, nor ever will be: it stays under way until it is ended.
    pub(crate) fn spoilt(&mut self, sending: &Sending) {
        if let Some(gate) = self.gate(sending.seq) {
            gate.unused(sending.pass);
        }
    }

    /// Nothing was sent, since the entry could not be had. It waits until it is due, or is to be ended.
    pub(crate) fn unused(&mut self, sending: &Sending, due_ms: u64, now_ms: u64) {
        if let Some(gate) = self.gate(sending.seq) {
            gate.unused(sending.pass);
        }
        self.land(sending.seq);
        if let Some(item) = self.items.get_mut(&sending.seq) {
            item.due_ms = due_ms;
        }
        self.settle_in(sending.seq, now_ms);
    }

    /// Forgets an entry, whether it is under way or not, and lets the next of its key go on.
    pub(crate) fn end(&mut self, seq: u64, now_ms: u64) {
        self.land(seq);
        self.withdraw(seq);
        let Some(item) = self.items.remove(&seq) else {
            return;
        };
        self.ages.remove(&(item.since_ms, seq));
        if let Some(service) = self.services.get_mut(&item.service) {
            service.entries -= 1;
            if service.entries == 0 {
                self.services.remove(&item.service);
            }
        }
        let Some(key) = item.key else { return };
        let Some(of_key) = self.keys.get_mut(&key) else {
            return;
        };
        of_key.remove(&seq);
        match of_key.first().copied() {
            Some(head) => self.settle_in(head, now_ms),
            None => {
                self.keys.remove(&key);
            }
        }
    }

    /// Entries at the head of their keys whose pause ends after `ms`, at most `limit`: they hold others back, so
    /// whether they still exist is worth a look.
    pub(crate) fn long_pauses(&self, ms: u64, limit: usize) -> Vec<(u64, EntryId)> {
        let late = self
            .pausing
            .range((Bound::Excluded((ms, u64::MAX)), Bound::Unbounded));
        late.filter_map(|(_, seq)| {
            let item = self.items.get(seq)?;
            let of_key = self.keys.get(item.key.as_ref()?)?;
            (of_key.len() > 1).then_some((*seq, item.id))
        })
        .take(limit)
        .collect()
    }

    /// The service to send to next, the first after the last that has something ready and whose gate lets it.
    fn whose_turn(&self, now_ms: u64) -> Option<Arc<str>> {
        let after = match &self.turn {
            Some(turn) => Bound::Excluded(Arc::clone(turn)),
            None => Bound::Unbounded,
        };
        let rest = self.services.range((after, Bound::Unbounded));
        let mut in_order = rest.chain(self.services.iter());
        let (name, _) = in_order.find(|(_, s)| !s.ready.is_empty() && s.gate.admits(s.under_way, now_ms))?;
        Some(Arc::clone(name))
    }

    fn gate(&mut self, seq: u64) -> Option<&mut Gate> {
        Some(&mut self.service(seq)?.gate)
    }

    fn service(&mut self, seq: u64) -> Option<&mut Service> {
        let item = self.items.get(&seq)?;
        self.services.get_mut(&item.service)
    }

    /// It is no longer under way, if it was. Its stage is none of the waiting ones yet.
    fn land(&mut self, seq: u64) {
        if let Some(item) = self.items.get_mut(&seq)
            && item.stage == Stage::UnderWay
        {
            item.stage = Stage::Held;
            self.under_way -= 1;
            self.ages.insert((item.since_ms, seq));
            if let Some(service) = self.services.get_mut(&item.service) {
                service.under_way -= 1;
            }
        }
    }

    /// Takes it out of where it waits.
    fn withdraw(&mut self, seq: u64) {
        if let Some(item) = self.items.get_mut(&seq) {
            match item.stage {
                Stage::Held | Stage::UnderWay => {}
                Stage::Pausing => {
                    self.pausing.remove(&(item.due_ms, seq));
                }
                Stage::Ready => {
                    if let Some(service) = self.services.get_mut(&item.service) {
                        service.ready.remove(&seq);
                    }
                }
            }
            if item.stage != Stage::UnderWay {
                item.stage = Stage::Held;
            }
        }
    }

    /// Puts one that is held where it belongs.
    fn settle_in(&mut self, seq: u64, now_ms: u64) {
        let Some(item) = self.items.get_mut(&seq) else {
            return;
        };
        let of_key = item.key.as_ref().and_then(|key| self.keys.get(key));
        let is_head = of_key.is_none_or(|of_key| of_key.first() == Some(&seq));
        if item.stage != Stage::Held || !is_head {
            return;
        }
        if item.due_ms > now_ms {
            item.stage = Stage::Pausing;
            self.pausing.insert((item.due_ms, seq));
        } else {
            self.make_ready(seq);
        }
    }

    fn make_ready(&mut self, seq: u64) {
        if let Some(item) = self.items.get_mut(&seq) {
            item.stage = Stage::Ready;
            if let Some(service) = self.services.get_mut(&item.service) {
                service.ready.insert(seq);
            }
        }
    }
}

/// Of a second's deliveries, a fiftieth may come at once: timers are not exact to less than a few milliseconds.
fn rate(max_rate: u32) -> Rate {
    Rate::of(&RateLimit {
        requests: max_rate,
        interval: Duration::from_secs(1),
        burst: (max_rate / 50).max(1),
        key: RateLimitKey::Rule,
    })
}

#[cfg(test)]
mod probes;
#[cfg(test)]
mod tests;

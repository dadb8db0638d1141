//! What was seen of one service over time.

use leeward_policy::model::Signal;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Buckets that times to the head of an answer are counted in.
pub const LATENCY_BUCKETS: usize = 64;

/// What one proxy has seen of a service since its last sample.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SignalSample {
    /// Its circuit is open there: calls are refused, but for probes.
    pub circuit_open: bool,
    /// Calls that ended.
    pub calls: u64,
    /// Those of them that failed: 5xx, 429, no answer.
    pub failures: u64,
    /// Calls by the time to the answer's head, see [`latency_bucket`].
    pub latencies: [u64; LATENCY_BUCKETS],
    /// Requests under way, queued and held on average, in thousandths.
    pub demand: u64,
    /// How many there may be.
    pub limit: u64,
}

impl Default for SignalSample {
    fn default() -> Self {
        Self {
            circuit_open: false,
            calls: 0,
            failures: 0,
            latencies: [0; LATENCY_BUCKETS],
            demand: 0,
            limit: 0,
        }
    }
}

/// What was seen of one service, by one proxy or by many, in bounded memory.
///
/// Calls of all proxies add up, as do demand and limits. Of the circuits and of demand only the latest sample of
/// each proxy counts, and only for 5 s: a proxy that fell silent says nothing any more.
///
/// Time is cut into slots: of 200 ms for windows of up to 10 s, 1 s for those of up to 10 min, and 1 min beyond. A
/// window counts everything that was added within it, and nothing that was added more than a slot before it. Slots
/// are kept only for the windows that the signals have that the log is for: with windows of 30 s it takes 2 KiB, and
/// 10 KiB if one is for latencies; with ones of 10 min and of 6 h at most 50 KiB, and 200 KiB with latencies.
#[derive(Clone, Debug)]
pub struct SignalLog {
    origin: Instant,
    tiers: [Tier; TIERS],
    proxies: HashMap<Box<str>, Latest>,
}

/// Slots of one length, the latest last.
#[derive(Clone, Debug)]
struct Tier {
    slot: Duration,
    /// How many slots are kept; 0 for none.
    keep: u64,
    /// In how many of them latencies are.
    keep_latencies: u64,
    slots: VecDeque<Slot>,
}

#[derive(Clone, Debug)]
struct Slot {
    /// Slots since the origin.
    at: u64,
    counts: Counts,
    latencies: Option<Box<[u32; LATENCY_BUCKETS]>>,
}

/// Calls, and those of them that failed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Counts {
    pub(super) calls: u64,
    pub(super) failures: u64,
}

/// The last that a proxy said.
#[derive(Clone, Copy, Debug)]
struct Latest {
    at: Instant,
    called: Option<Instant>,
    circuit_open: bool,
    demand: u64,
    limit: u64,
}

const TIERS: usize = 3;
/// The lengths of slots, and the longest windows that they are for.
const SHAPES: [(Duration, Duration); TIERS] = [
    (Duration::from_millis(200), Duration::from_secs(10)),
    (Duration::from_secs(1), Duration::from_secs(600)),
    (Duration::from_secs(60), Duration::from_secs(6 * 3600)),
];
/// How long a proxy's last word counts.
const FRESH: Duration = Duration::from_secs(5);
/// How long after its last call a proxy whose circuit is closed has a say in whether the circuit is open.
const USES: Duration = Duration::from_secs(60);
/// Proxies whose circuits and demand are known. Calls of more are counted all the same.
const MAX_PROXIES: usize = 4096;

impl SignalLog {
    /// Has seen nothing yet. `signals` are those that will be read.
    pub fn new<'a>(signals: impl IntoIterator<Item = &'a Signal>, now: Instant) -> Self {
        let mut log = Self {
            origin: now,
            tiers: SHAPES.map(|(slot, _)| Tier {
                slot,
                keep: 0,
                keep_latencies: 0,
                slots: VecDeque::new(),
            }),
            proxies: HashMap::new(),
        };
        log.keep_for(signals);
        log
    }

    /// Other signals are read from now on. What they need and the others didn't is counted from now on only.
    pub fn keep_for<'a>(&mut self, signals: impl IntoIterator<Item = &'a Signal>) {
        for tier in &mut self.tiers {
            (tier.keep, tier.keep_latencies) = (0, 0);
        }
        for signal in signals {
            match *signal {
                Signal::ErrorRate { window, .. } => self.keep(window, false),
                Signal::Latency { window, .. } => self.keep(window, true),
                Signal::BurnRate {
                    long_window,
                    short_window,
                    ..
                } => {
                    self.keep(long_window, false);
                    self.keep(short_window, false);
                }
                Signal::CircuitOpen { .. } | Signal::Saturation { .. } => {}
            }
        }
        for tier in &mut self.tiers {
            tier.trim(None);
        }
    }

    fn keep(&mut self, window: Duration, latencies: bool) {
        let Some(tier) = self.tiers.get_mut(tier_of(window)) else {
            return;
        };
        let slots = tier.slots_of(window);
        tier.keep = tier.keep.max(slots);
        if latencies {
            tier.keep_latencies = tier.keep_latencies.max(slots);
        }
    }

    /// Takes what a proxy has seen since its last sample. Times that go back count as the latest that was told.
    pub fn add(&mut self, proxy: &str, sample: &SignalSample, now: Instant) {
        let since = now.saturating_duration_since(self.origin);
        for tier in &mut self.tiers {
            tier.add(sample, since);
        }
        let known = self.proxies.get(proxy);
        let called = match (sample.calls, known) {
            (0, Some(known)) => known.called,
            (0, None) => None,
            (_, _) => Some(now),
        };
        let latest = Latest {
            at: now,
            called,
            circuit_open: sample.circuit_open,
            demand: sample.demand,
            limit: sample.limit,
        };
        if let Some(known) = self.proxies.get_mut(proxy) {
            *known = latest;
            return;
        }
        if self.proxies.len() >= MAX_PROXIES {
            self.proxies.retain(|_, known| known.is_fresh(now));
        }
        if self.proxies.len() < MAX_PROXIES {
            self.proxies.insert(proxy.into(), latest);
        }
    }

    /// Calls of the last `window`.
    pub(super) fn counts(&self, window: Duration, now: Instant) -> Counts {
        let mut sum = Counts::default();
        for slot in self.slots(window, now) {
            sum.calls = sum.calls.saturating_add(slot.counts.calls);
            sum.failures = sum.failures.saturating_add(slot.counts.failures);
        }
        sum
    }

    /// The time within which this many percent of the answers' heads of the last `window` came, and of how many. As
    /// all that is known of them is their buckets, it is interpolated in its own: it is off by less than 25 %.
    pub(super) fn percentile(&self, percent: u32, window: Duration, now: Instant) -> Option<(Duration, u64)> {
        let mut sums = [0u64; LATENCY_BUCKETS];
        for latencies in self.slots(window, now).filter_map(|slot| slot.latencies.as_ref()) {
            for (sum, count) in sums.iter_mut().zip(latencies.iter()) {
                *sum += u64::from(*count);
            }
        }
        let total: u64 = sums.iter().sum();
        if total == 0 {
            return None;
        }
        let rank = total
            .saturating_mul(u64::from(percent.min(100)))
            .div_ceil(100)
            .max(1);
        let mut before = 0;
        for (bucket, count) in sums.iter().enumerate() {
            if before + count >= rank {
                let share = ratio(rank - before, *count);
                return Some((within(bucket, share), total));
            }
            before += count;
        }
        None
    }

    /// Whether the circuit is open at half or more of the proxies that have a say: their last word is not older than
    /// 5 s, and either it is open there or they called the service in the last minute. `None` if there are none whose
    /// last word counts.
    pub(super) fn circuit_open(&self, now: Instant) -> Option<bool> {
        let mut heard = false;
        let (mut open, mut closed) = (0usize, 0usize);
        for latest in self.proxies.values().filter(|latest| latest.is_fresh(now)) {
            heard = true;
            let uses = |at: Instant| now.saturating_duration_since(at) <= USES;
            if latest.circuit_open {
                open += 1;
            } else if latest.called.is_some_and(uses) {
                closed += 1;
            }
        }
        heard.then_some(open > 0 && open >= closed)
    }

    /// Demand over limit, in percent, of the proxies whose last word is not older than 5 s.
    pub(super) fn saturation(&self, now: Instant) -> Option<f64> {
        let (mut demand, mut limit) = (0u64, 0u64);
        for latest in self.proxies.values().filter(|latest| latest.is_fresh(now)) {
            demand = demand.saturating_add(latest.demand);
            limit = limit.saturating_add(latest.limit);
        }
        // Demand is in thousandths.
        (limit > 0).then(|| ratio(demand, limit) / 10.0)
    }

    /// How many slots there are, and in how many of them latencies are.
    #[cfg(test)]
    pub(super) fn held(&self) -> (usize, usize) {
        let slots = || self.tiers.iter().flat_map(|tier| &tier.slots);
        (
            slots().count(),
            slots().filter(|slot| slot.latencies.is_some()).count(),
        )
    }

    #[cfg(test)]
    pub(super) fn proxies(&self) -> usize {
        self.proxies.len()
    }

    /// The slots of a window, the latest first.
    fn slots(&self, window: Duration, now: Instant) -> impl Iterator<Item = &Slot> {
        let since = now.saturating_duration_since(self.origin);
        self.tiers.get(tier_of(window)).into_iter().flat_map(move |tier| {
            let first = (tier.at(since) + 1).saturating_sub(tier.slots_of(window));
            tier.slots.iter().rev().take_while(move |slot| slot.at >= first)
        })
    }
}

impl Tier {
    fn at(&self, since: Duration) -> u64 {
        u64::try_from(since.as_nanos() / self.slot.as_nanos().max(1)).unwrap_or(u64::MAX - 1)
    }

    /// Slots of a window: one more than fit, as the last is not full yet.
    fn slots_of(&self, window: Duration) -> u64 {
        let full = window.as_nanos().div_ceil(self.slot.as_nanos().max(1));
        u64::try_from(full).unwrap_or(u64::MAX - 1) + 1
    }

    fn add(&mut self, sample: &SignalSample, since: Duration) {
        if self.keep == 0 || sample.calls == 0 && sample.latencies.iter().all(|count| *count == 0) {
            return;
        }
        let at = self.at(since);
        if self.slots.back().is_none_or(|last| last.at < at) {
            self.slots.push_back(Slot {
                at,
                counts: Counts::default(),
                latencies: None,
            });
            self.trim(Some(at));
        }
        let Some(slot) = self.slots.back_mut() else {
            return;
        };
        slot.counts.calls = slot.counts.calls.saturating_add(sample.calls);
        let failures = sample.failures.min(sample.calls);
        slot.counts.failures = slot.counts.failures.saturating_add(failures);
        if self.keep_latencies > 0 {
            let counts = slot
                .latencies
                .get_or_insert_with(|| Box::new([0; LATENCY_BUCKETS]));
            for (count, more) in counts.iter_mut().zip(&sample.latencies) {
                *count = count.saturating_add(u32::try_from(*more).unwrap_or(u32::MAX));
            }
        }
    }

    /// Drops what no window reaches any more, as of the slot `at` or else of the last.
    fn trim(&mut self, at: Option<u64>) {
        let Some(at) = at.or_else(|| self.slots.back().map(|last| last.at)) else {
            return;
        };
        let (keep, keep_latencies) = (self.keep, self.keep_latencies);
        while self.slots.front().is_some_and(|first| first.at + keep <= at) {
            self.slots.pop_front();
        }
        // One slot grows too old for latencies at a time, but for after a pause or other settings.
        for slot in &mut self.slots {
            if slot.at + keep_latencies > at {
                break;
            }
            slot.latencies = None;
        }
    }
}

impl Latest {
    fn is_fresh(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) <= FRESH
    }
}

fn tier_of(window: Duration) -> usize {
    let fits = SHAPES.iter().position(|(_, longest)| window <= *longest);
    fits.unwrap_or(TIERS - 1)
}

/// The bucket that counts a time: the n-th those of at least 1.25^n ms and less than 1.25^(n+1) ms, the first
/// everything faster, too, and the last everything slower.
pub fn latency_bucket(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    let upper = UPPER_MICROS.get(..LATENCY_BUCKETS - 1).unwrap_or_default();
    upper.partition_point(|upper| *upper <= micros)
}

/// Where a bucket ends: the time, to the microsecond, that its own are all shorter than. The last has no end, and is
/// given one by its lower end like the others; there is none beyond it.
pub fn latency_upper(bucket: usize) -> Duration {
    let upper = UPPER_MICROS.get(bucket).or(UPPER_MICROS.last());
    Duration::from_micros(upper.copied().unwrap_or_default())
}

/// A place in a bucket, 0 for its lower end and 1 for its upper one. The last is all at its lower end.
fn within(bucket: usize, share: f64) -> Duration {
    let lower = bucket.checked_sub(1).map_or(Duration::ZERO, latency_upper);
    if bucket >= LATENCY_BUCKETS - 1 {
        return lower;
    }
    let width = latency_upper(bucket).saturating_sub(lower);
    lower + width.mul_f64(share.clamp(0.0, 1.0))
}

/// 1.25^(n+1) ms in microseconds, rounded.
const UPPER_MICROS: [u64; LATENCY_BUCKETS] = upper_micros();

#[expect(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "worked out by the compiler, and at most 1.6e9"
)]
const fn upper_micros() -> [u64; LATENCY_BUCKETS] {
    let mut bounds = [0; LATENCY_BUCKETS];
    let mut bound = 1000.0;
    let mut n = 0;
    while n < LATENCY_BUCKETS {
        bound *= 1.25;
        bounds[n] = (bound + 0.5) as u64;
        n += 1;
    }
    bounds
}

#[expect(
    clippy::cast_precision_loss,
    reason = "exact up to 2^53, and then near enough"
)]
pub(super) fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / (whole.max(1)) as f64
}

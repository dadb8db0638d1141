//! Whether requests fare worse at proxies with a change than at those without it.

use leeward_policy::model::{ErrorGate, LatencyGate, RolloutPolicy};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Upper bounds of the buckets of times, in microseconds, as push.proto has them; the last bucket is of what is slower.
pub(crate) const BOUNDS_US: [u64; 18] = [
    500, 1_000, 2_500, 3_500, 5_000, 10_000, 25_000, 50_000, 75_000, 100_000, 250_000, 500_000, 750_000,
    1_000_000, 2_500_000, 5_000_000, 7_500_000, 10_000_000,
];
/// Buckets of times.
pub(crate) const BUCKETS: usize = BOUNDS_US.len() + 1;
/// Routes that are told apart; of more, the rest counts in the sum only.
pub(crate) const MAX_ROUTES: usize = 2000;
/// The name of requests that no route is for.
pub(crate) const UNROUTED: &str = "-";

/// How sure a difference must be, in standard deviations: gates are asked each second, of each route.
const SURE: f64 = 4.0;
/// Failures without which there is no saying.
const LEAST_FAILURES: u64 = 5;
/// How much is looked at besides the whole stage, so that what begins late isn't drowned in what went well before.
const SLICE: Duration = Duration::from_secs(10);
/// In so many pieces.
const SLICES: usize = 6;

/// Requests of one route.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Tally {
    /// Requests that ended.
    pub(crate) requests: u64,
    /// Those of them that failed.
    pub(crate) failures: u64,
    /// All by their time.
    pub(crate) times: [u64; BUCKETS],
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.failures = self.failures.saturating_add(other.failures);
        for (sum, more) in self.times.iter_mut().zip(other.times) {
            *sum = sum.saturating_add(more);
        }
    }

    /// What came since an earlier state of the same counters.
    fn since(&self, earlier: &Self) -> Self {
        let mut times = self.times;
        for (time, before) in times.iter_mut().zip(earlier.times) {
            *time = time.saturating_sub(before);
        }
        Self {
            requests: self.requests.saturating_sub(earlier.requests),
            failures: self.failures.saturating_sub(earlier.failures),
            times,
        }
    }
}

/// Where a request went: its direction and its route.
pub(crate) type Way = (String, String);

/// Requests of a group of proxies, by direction and route.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Figures {
    routes: BTreeMap<Way, Tally>,
    sums: BTreeMap<String, Tally>,
}

impl Figures {
    pub(crate) fn add(&mut self, direction: &str, route: &str, tally: &Tally) {
        self.sums.entry(direction.to_owned()).or_default().add(tally);
        let way = (direction.to_owned(), route.to_owned());
        if self.routes.len() < MAX_ROUTES || self.routes.contains_key(&way) {
            self.routes.entry(way).or_default().add(tally);
        }
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        for ((direction, route), tally) in &other.routes {
            self.add(direction, route, tally);
        }
    }

    /// What came since an earlier state of the same counters.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let mut new = Self::default();
        for (way, tally) in &self.routes {
            let tally = earlier
                .routes
                .get(way)
                .map_or_else(|| tally.clone(), |e| tally.since(e));
            if tally != Tally::default() {
                new.add(&way.0, &way.1, &tally);
            }
        }
        new
    }

    pub(crate) fn routes(&self) -> impl Iterator<Item = (&Way, &Tally)> {
        self.routes.iter()
    }

    /// All requests.
    pub(crate) fn total(&self) -> Tally {
        let mut total = Tally::default();
        self.sums.values().for_each(|sum| total.add(sum));
        total
    }
}

/// The figures of the proxies with a change, and of those without it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pair {
    pub(crate) with: Figures,
    pub(crate) without: Figures,
}

impl Pair {
    fn merge(&mut self, other: &Self) {
        self.with.merge(&other.with);
        self.without.merge(&other.without);
    }
}

/// What was seen since a stage began, and lately.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watched {
    whole: Pair,
    slices: VecDeque<(Duration, Pair)>,
    /// What those without it did in the stages before: all that there is to compare with once everybody has it.
    before: Figures,
}

impl Watched {
    /// Takes in what came lately. `now` is the time since any one moment.
    pub(crate) fn add(&mut self, new: &Pair, now: Duration) {
        self.whole.merge(new);
        match self.slices.back_mut() {
            Some((began, slice)) if now.saturating_sub(*began) < SLICE => slice.merge(new),
            Some(_) | None => self.slices.push_back((now, new.clone())),
        }
        while self.slices.len() > SLICES {
            self.slices.pop_front();
        }
    }

    /// Begins another stage.
    pub(crate) fn turn(&mut self) {
        let Pair { without, .. } = std::mem::take(&mut self.whole);
        self.slices.clear();
        if without.total().requests >= self.before.total().requests {
            self.before = without;
        } else {
            // Of a moment there is little to be learnt.
            self.before.merge(&without);
        }
    }

    /// What got worse, if anything did.
    pub(crate) fn judge(&self, policy: &RolloutPolicy) -> Option<String> {
        let mut recent = Pair::default();
        self.slices.iter().for_each(|(_, slice)| recent.merge(slice));
        [&self.whole, &recent]
            .into_iter()
            .find_map(|pair| worse(pair, &self.before, policy))
    }
}

/// What got worse, if anything did; `before` stands in where there is too little without the change.
fn worse(pair: &Pair, before: &Figures, policy: &RolloutPolicy) -> Option<String> {
    let Pair { with, without } = pair;
    let least = u64::from(policy.errors.minimum_requests);
    let enough = |tally: &&Tally, least: u64| tally.requests >= least;
    for (direction, sum) in &with.sums {
        let theirs = |least| {
            let now = without.sums.get(direction).filter(|t| enough(t, least));
            now.map(|tally| (tally, without))
                .or_else(|| Some((before.sums.get(direction).filter(|t| enough(t, least))?, before)))
        };
        let what = format!("{direction} requests");
        if let Some((other, figures)) = theirs(least) {
            if let Some(why) = more_failures(&what, sum, other, &policy.errors) {
                return Some(why);
            }
            // They all fail, so that there are more of them is what counts.
            let way = (direction.clone(), UNROUTED.to_owned());
            let unrouted = |figures: &Figures, sum: &Tally| Tally {
                requests: sum.requests,
                failures: figures.routes.get(&way).map_or(0, |tally| tally.failures),
                ..Tally::default()
            };
            let (ours, others) = (unrouted(with, sum), unrouted(figures, other));
            let what = format!("{direction} requests without a route");
            if let Some(why) = more_failures(&what, &ours, &others, &policy.errors) {
                return Some(why);
            }
        }
        if let Some((other, _)) = theirs(u64::from(policy.latency.minimum_requests))
            && let Some(why) = slower(&what, sum, other, &policy.latency)
        {
            return Some(why);
        }
    }
    for (way, tally) in with.routes.iter().filter(|((_, route), _)| route != UNROUTED) {
        let theirs = |least| {
            let now = without.routes.get(way).filter(|t| enough(t, least));
            now.or_else(|| before.routes.get(way).filter(|t| enough(t, least)))
        };
        let what = format!("{} requests of route {}", way.0, way.1);
        let failing = theirs(least).and_then(|other| more_failures(&what, tally, other, &policy.errors));
        let slow = || {
            let other = theirs(u64::from(policy.latency.minimum_requests))?;
            slower(&what, tally, other, &policy.latency)
        };
        if let Some(why) = failing.or_else(slow) {
            return Some(why);
        }
    }
    None
}

#[expect(
    clippy::cast_precision_loss,
    reason = "requests that are counted stay far below 2^52"
)]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

#[expect(clippy::cast_precision_loss, reason = "as above")]
fn more_failures(what: &str, with: &Tally, without: &Tally, gate: &ErrorGate) -> Option<String> {
    let least = u64::from(gate.minimum_requests);
    if with.requests < least || without.requests < least || with.failures < LEAST_FAILURES {
        return None;
    }
    let (ours, theirs) = (
        share(with.failures, with.requests),
        share(without.failures, without.requests),
    );
    let allowed =
        (theirs + f64::from(gate.max_increase) / 10_000.0).max(theirs * f64::from(gate.max_ratio) / 100.0);
    if ours <= allowed {
        return None;
    }
    // Two proportions, pooled, with a correction for that failures come whole.
    let pooled = share(with.failures + without.failures, with.requests + without.requests);
    let (n, m) = (with.requests as f64, without.requests as f64);
    let deviation = (pooled * (1.0 - pooled) * (1.0 / n + 1.0 / m)).sqrt();
    if ours - theirs - 0.5 / n < SURE * deviation {
        return None;
    }
    Some(format!(
        "{what}: {:.2} % of {} fail with the change and {:.2} % of {} without it; want at most {:.2} %",
        ours * 100.0,
        with.requests,
        theirs * 100.0,
        without.requests,
        allowed * 100.0
    ))
}

#[expect(clippy::cast_precision_loss, reason = "as above")]
fn slower(what: &str, with: &Tally, without: &Tally, gate: &LatencyGate) -> Option<String> {
    let least = u64::from(gate.minimum_requests);
    if with.requests < least || without.requests < least {
        return None;
    }
    let theirs = Duration::from_micros(quantile(&without.times, gate.percentile)?);
    let allowed = (theirs + gate.min_increase).max(theirs * gate.max_ratio / 100);
    // Of as many may be slower as the percentile leaves; those that surely are, are counted.
    let allowed_us = u64::try_from(allowed.as_micros()).unwrap_or(u64::MAX);
    let at_least = [0].iter().chain(&BOUNDS_US);
    let times = with.times.iter().zip(at_least);
    let slow: u64 = times
        .filter(|(_, least)| **least >= allowed_us)
        .map(|(n, _)| n)
        .sum();
    let all: u64 = with.times.iter().sum();
    let (ours, expected) = (share(slow, all), 1.0 - f64::from(gate.percentile) / 100.0);
    let n = all as f64;
    let deviation = (expected * (1.0 - expected) / n).sqrt();
    if all < least || ours - expected - 0.5 / n < SURE * deviation {
        return None;
    }
    Some(format!(
        "{what}: {:.2} % of {all} take more than {allowed:?} with the change, and p{} of {} without it is at most {theirs:?}",
        ours * 100.0,
        gate.percentile,
        without.requests
    ))
}

/// The upper bound of the bucket that a percentile is in; `None` if it is in the last, which has none.
fn quantile(times: &[u64; BUCKETS], percentile: u32) -> Option<u64> {
    let all: u64 = times.iter().sum();
    let rank = (all * u64::from(percentile)).div_ceil(100).max(1);
    let mut below = 0;
    let buckets = times.iter().zip(BOUNDS_US);
    for (n, bound) in buckets {
        below += n;
        if below >= rank {
            return Some(bound);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::model::OnFailure;

    fn policy() -> RolloutPolicy {
        RolloutPolicy {
            stages: RolloutPolicy::default_stages(),
            errors: ErrorGate::DEFAULT,
            latency: LatencyGate::DEFAULT,
            on_failure: OnFailure::Rollback,
            progress_deadline: RolloutPolicy::PROGRESS_DEADLINE,
        }
    }

    fn tally(requests: u64, failures: u64, slow: u64) -> Tally {
        let mut times = [0; BUCKETS];
        times[4] = requests - slow;
        times[9] = slow;
        Tally {
            requests,
            failures,
            times,
        }
    }

    fn pair(with: &[(&str, Tally)], without: &[(&str, Tally)]) -> Pair {
        let figures = |routes: &[(&str, Tally)]| {
            let mut figures = Figures::default();
            for (route, tally) in routes {
                figures.add("outbound", route, tally);
            }
            figures
        };
        Pair {
            with: figures(with),
            without: figures(without),
        }
    }

    #[track_caller]
    fn check(pair: &Pair, want: Option<&str>) {
        let why = worse(pair, &Figures::default(), &policy());
        match want {
            None => assert_eq!(why, None),
            Some(want) => assert!(why.as_ref().is_some_and(|why| why.contains(want)), "{why:?}"),
        }
    }

    #[test]
    fn what_fails_more_is_seen_and_what_fails_everywhere_is_not_blamed() {
        let many = || [("r", tally(10_000, 100, 0))];
        check(
            &pair(&[("r", tally(60, 60, 0))], &many()),
            Some("100.00 % of 60 fail"),
        );
        check(&pair(&[("r", tally(600, 6, 0))], &many()), None);
        check(&pair(&[("r", tally(49, 49, 0))], &many()), None);
        check(
            &pair(&[("r", tally(600, 300, 0))], &[("r", tally(10_000, 5_000, 0))]),
            None,
        );
        // More, but not by a point.
        check(&pair(&[("r", tally(1_000_000, 19_000, 0))], &many()), None);
    }

    #[test]
    fn one_route_of_many_is_enough() {
        let others: Vec<_> = (0..200).map(|i| format!("r{i}")).collect();
        let mut with: Vec<_> = others.iter().map(|r| (r.as_str(), tally(1000, 0, 0))).collect();
        let without = with.clone();
        with[7].1 = tally(1000, 100, 0);
        check(&pair(&with, &without), Some("route r7: 10.00 %"));
    }

    #[test]
    fn requests_that_no_route_takes_any_more_are_seen() {
        let without = [("r", tally(9_900, 0, 0)), ("-", tally(100, 100, 0))];
        check(
            &pair(&[("r", tally(500, 0, 0)), ("-", tally(500, 500, 0))], &without),
            Some("requests: 50.00 %"),
        );
        check(
            &pair(&[("r", tally(990, 0, 0)), ("-", tally(10, 10, 0))], &without),
            None,
        );
    }

    #[test]
    fn what_takes_longer_is_seen() {
        let without = [("r", tally(10_000, 0, 0))];
        check(
            &pair(&[("r", tally(400, 0, 200))], &without),
            Some("take more than 15ms"),
        );
        check(&pair(&[("r", tally(400, 0, 5))], &without), None);
        // It takes that long everywhere.
        check(
            &pair(&[("r", tally(400, 0, 200))], &[("r", tally(10_000, 0, 5_000))]),
            None,
        );
    }

    #[test]
    fn once_everybody_has_it_what_was_before_is_compared_with() {
        let mut watched = Watched::default();
        let at = Duration::from_secs;
        watched.add(
            &pair(&[("r", tally(60, 0, 0))], &[("r", tally(5_000, 5, 0))]),
            at(0),
        );
        watched.turn();
        watched.add(&pair(&[("r", tally(5_000, 10, 0))], &[]), at(30));
        assert_eq!(watched.judge(&policy()), None);
        watched.add(&pair(&[("r", tally(5_000, 2_000, 0))], &[]), at(31));
        assert!(watched.judge(&policy()).is_some());
    }

    #[test]
    fn what_begins_late_is_not_drowned() {
        let mut watched = Watched::default();
        let good = pair(&[("r", tally(100, 0, 0))], &[("r", tally(10_000, 0, 0))]);
        for second in 0..10_000 {
            watched.add(&good, Duration::from_secs(second));
        }
        let bad = pair(&[("r", tally(100, 50, 0))], &[("r", tally(10_000, 0, 0))]);
        for second in 10_000..10_020 {
            watched.add(&bad, Duration::from_secs(second));
        }
        assert!(watched.judge(&policy()).is_some());
    }

    #[test]
    fn counters_that_only_rise_are_told_apart_by_time() {
        let mut one = Figures::default();
        one.add("outbound", "r", &tally(10, 1, 0));
        let mut two = one.clone();
        two.add("outbound", "r", &tally(5, 2, 1));
        two.add("outbound", "s", &tally(1, 0, 0));
        let mut want = Figures::default();
        want.add("outbound", "r", &tally(5, 2, 1));
        want.add("outbound", "s", &tally(1, 0, 0));
        assert_eq!(two.since(&one), want);
        assert_eq!(two.since(&Figures::default()), two);
    }

    /// A control plane asks each second for an hour, and nothing is wrong.
    #[test]
    fn chance_alone_stops_nothing() {
        let mut stopped = 0;
        for seed in 0..40 {
            let mut chance = fastrand::Rng::with_seed(seed);
            let mut draw = |requests: u64, failing: f64, slow: f64| {
                let mut sum = Tally::default();
                for _ in 0..requests {
                    let failed = u64::from(chance.f64() < failing);
                    let is_slow = u64::from(chance.f64() < slow);
                    sum.add(&tally(1, failed, is_slow));
                }
                sum
            };
            let mut watched = Watched::default();
            let rate = [0.0, 0.001, 0.01, 0.2][usize::try_from(seed % 4).unwrap()];
            for second in 0..300 {
                let with = draw(5, rate, 0.012);
                let without = draw(40, rate, 0.012);
                watched.add(
                    &pair(&[("r", with)], &[("r", without)]),
                    Duration::from_secs(second),
                );
                if watched.judge(&policy()).is_some() {
                    stopped += 1;
                    break;
                }
            }
        }
        assert_eq!(stopped, 0, "of 40 rollouts");
    }
}

use super::*;
use crate::Seeded;
use proptest::prelude::*;

/// Opens at half of 4 calls, for 1 s and up to 30 s; two probes, 10 s of ramp, no jitter.
const LIMITS: CircuitBreaker = CircuitBreaker {
    minimum_calls: 4,
    open_time: Duration::from_secs(1),
    max_open_time: Duration::from_secs(30),
    open_jitter: 0,
    half_open_probes: 2,
    ..CircuitBreaker::DEFAULT
};
const SUCCESS: CallEnd = CallEnd {
    ended: Ended::Succeed,
    took: Duration::ZERO,
};
const FAILURE: CallEnd = CallEnd {
    ended: Ended::Fail,
    ..SUCCESS
};
const SLOW: CallEnd = CallEnd {
    took: Duration::from_secs(1),
    ..SUCCESS
};
const ABANDONED: CallEnd = CallEnd {
    ended: Ended::Abandon,
    ..SUCCESS
};
const HALF_FAILED: Counts = Counts {
    calls: 4,
    failures: 2,
    slow: 0,
};

#[expect(
    clippy::disallowed_methods,
    reason = "an arbitrary origin; only differences matter"
)]
fn origin() -> Instant {
    Instant::now()
}

/// A breaker, its time, its chance.
struct Bench {
    breaker: Breaker,
    now: Instant,
    limits: CircuitBreaker,
    draw: Seeded,
}

impl Bench {
    fn new(limits: CircuitBreaker) -> Self {
        Self {
            breaker: Breaker::NEW,
            now: origin(),
            limits,
            draw: Seeded(7),
        }
    }

    fn wait(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
    }

    fn ask(&mut self) -> (Verdict, Option<Transition>) {
        self.breaker.ask(self.now, &self.limits, &mut self.draw)
    }

    #[track_caller]
    fn pass(&mut self) -> Ticket {
        match self.ask().0 {
            Verdict::Pass(ticket) => ticket,
            Verdict::Refuse { .. } => panic!("refused in {:?}", self.breaker),
        }
    }

    fn is_refused(&mut self) -> bool {
        matches!(self.ask().0, Verdict::Refuse { .. })
    }

    fn settle(&mut self, ticket: Ticket, end: &CallEnd, counts: &Counts) -> Option<Transition> {
        self.breaker
            .settle(ticket, end, counts, self.now, &self.limits, &mut self.draw)
    }

    fn state(&self) -> CircuitState {
        self.breaker.state(self.now, &self.limits)
    }

    /// Opens it by failures, and returns for how long.
    #[track_caller]
    fn trip(&mut self) -> Duration {
        let ticket = self.pass();
        let transition = self.settle(ticket, &FAILURE, &HALF_FAILED);
        assert_eq!(transition.map(|t| t.to), Some(CircuitState::Open));
        self.breaker.next_probe().unwrap() - self.now
    }

    /// Has both probes succeed.
    #[track_caller]
    fn recover(&mut self) {
        self.now = self.breaker.next_probe().unwrap();
        let (first, second) = (self.pass(), self.pass());
        assert_eq!(self.settle(first, &SUCCESS, &Counts::default()), None);
        let transition = self.settle(second, &SUCCESS, &Counts::default());
        assert_eq!(transition.map(|t| t.why), Some(CircuitWhy::ProbesSucceeded));
    }
}

#[test]
fn rates_open_it_once_there_are_enough_calls() {
    let check = |limits: CircuitBreaker, end, calls, failures, slow, why| {
        let mut bench = Bench::new(limits);
        let ticket = bench.pass();
        let counts = Counts {
            calls,
            failures,
            slow,
        };
        let transition = bench.settle(ticket, &end, &counts);
        assert_eq!(transition.map(|t| t.why), why, "{counts:?}");
    };
    let rate = |percent, calls| Some(CircuitWhy::FailureRate { percent, calls });
    check(LIMITS, FAILURE, 3, 3, 0, None);
    check(LIMITS, FAILURE, 4, 2, 0, rate(50, 4));
    check(LIMITS, FAILURE, 1000, 499, 0, None);
    check(LIMITS, FAILURE, 1000, 666, 0, rate(66, 1000));
    check(LIMITS, SUCCESS, 4, 4, 0, None);
    check(LIMITS, SLOW, 4, 0, 4, None);
    let slow = CircuitBreaker {
        slow_call_rate: 75,
        failure_rate: 0,
        ..LIMITS
    };
    check(slow, SLOW, 4, 0, 2, None);
    check(
        slow,
        SLOW,
        4,
        0,
        3,
        Some(CircuitWhy::SlowCallRate {
            percent: 75,
            calls: 4,
        }),
    );
    check(slow, FAILURE, 4, 4, 0, None);
}

#[test]
fn failures_in_a_row_open_it_whatever_the_rate() {
    let mut bench = Bench::new(CircuitBreaker {
        consecutive_failures: 3,
        ..LIMITS
    });
    let few = Counts {
        calls: 1000,
        failures: 5,
        slow: 0,
    };
    let ticket = bench.pass();
    for end in [FAILURE, FAILURE, SUCCESS, FAILURE, ABANDONED, FAILURE] {
        assert_eq!(bench.settle(ticket, &end, &few), None);
    }
    assert!(!bench.breaker.is_clean(), "successes are to be told");
    let why = bench.settle(ticket, &FAILURE, &few).map(|t| t.why);
    assert_eq!(why, Some(CircuitWhy::ConsecutiveFailures { failures: 3 }));
}

#[test]
fn it_opens_probes_ramps_and_closes() {
    let mut bench = Bench::new(LIMITS);
    assert!(bench.breaker.is_clean());
    let epoch = bench.breaker.closed_epoch(&bench.limits);
    assert_eq!(Some(bench.pass()), epoch.map(Ticket::closed));
    let length = bench.trip();
    let until = bench.now + length;
    assert_eq!(bench.ask().0, Verdict::Refuse { until: Some(until) });
    bench.wait(999);
    assert!(bench.is_refused());
    assert_eq!(bench.state(), CircuitState::Open);
    bench.wait(1);
    assert_eq!(bench.state(), CircuitState::HalfOpen);
    let (verdict, transition) = bench.ask();
    assert!(matches!(verdict, Verdict::Pass(_)));
    assert_eq!(
        transition.map(|t| (t.to, t.why)),
        Some((CircuitState::HalfOpen, CircuitWhy::TimeUp))
    );
    let Verdict::Pass(first) = verdict else { panic!() };
    let second = bench.pass();
    assert_eq!(
        bench.ask().0,
        Verdict::Refuse { until: None },
        "two probes at once"
    );
    bench.settle(first, &SUCCESS, &Counts::default());
    let transition = bench.settle(second, &SUCCESS, &Counts::default());
    assert_eq!(transition.map(|t| t.to), Some(CircuitState::Ramping));
    assert!(transition.unwrap().is_fresh());
    let ramping = bench.breaker.epoch;
    assert_eq!(bench.breaker.closed_epoch(&bench.limits), None);
    bench.wait(9_999);
    assert_eq!(bench.state(), CircuitState::Ramping);
    bench.wait(1);
    let (_, transition) = bench.ask();
    assert_eq!(
        transition.map(|t| (t.to, t.why)),
        Some((CircuitState::Closed, CircuitWhy::RampDone))
    );
    assert!(!transition.unwrap().is_fresh());
    assert_eq!(
        bench.breaker.closed_epoch(&bench.limits),
        Some(ramping),
        "calls of the ramp still count"
    );
    assert!(bench.breaker.is_clean());
}

#[test]
fn a_share_passes_that_grows_over_the_ramp() {
    let mut bench = Bench::new(LIMITS);
    bench.trip();
    bench.recover();
    let start = bench.now;
    for (ms, share) in [(0, 0.1), (2_500, 0.325), (5_000, 0.55), (9_000, 0.91)] {
        bench.now = start + Duration::from_millis(ms);
        let passed = (0..10_000).filter(|_| !bench.is_refused()).count();
        let passed = passed as f64 / 10_000.0;
        // Standard deviation at most 0.005.
        assert!((passed - share).abs() < 0.03, "{passed} after {ms} ms");
    }
}

#[test]
fn without_a_ramp_it_closes_at_once() {
    let mut bench = Bench::new(CircuitBreaker {
        ramp: Duration::ZERO,
        ..LIMITS
    });
    bench.trip();
    bench.recover();
    assert_eq!(bench.state(), CircuitState::Closed);
    assert_eq!(bench.trip(), Duration::from_secs(1), "and starts anew");
}

#[test]
fn it_stays_open_twice_as_long_each_time_until_it_is_through_its_ramp() {
    let mut bench = Bench::new(LIMITS);
    let mut lengths = vec![bench.trip()];
    for _ in 0..6 {
        bench.now = bench.breaker.next_probe().unwrap();
        let probe = bench.pass();
        let transition = bench.settle(probe, &FAILURE, &Counts::default());
        assert_eq!(transition.map(|t| t.why), Some(CircuitWhy::ProbeFailed));
        lengths.push(bench.breaker.next_probe().unwrap() - bench.now);
    }
    assert_eq!(lengths, [1, 2, 4, 8, 16, 30, 30].map(Duration::from_secs));
    bench.recover();
    // In the ramp, it is not forgotten.
    bench.wait(9_999);
    while bench.is_refused() {}
    assert_eq!(bench.trip(), Duration::from_secs(30));
    bench.recover();
    bench.wait(10_000);
    assert_eq!(bench.trip(), Duration::from_secs(1));
}

#[test]
fn the_end_of_a_ramp_that_only_a_failure_saw_still_counts() {
    let mut bench = Bench::new(LIMITS);
    bench.trip();
    bench.recover();
    let mut ticket = None;
    while ticket.is_none() {
        ticket = match bench.ask().0 {
            Verdict::Pass(ticket) => Some(ticket),
            Verdict::Refuse { .. } => None,
        };
    }
    bench.wait(10_000);
    let transition = bench.settle(ticket.unwrap(), &FAILURE, &HALF_FAILED);
    assert_eq!(transition.map(|t| t.to), Some(CircuitState::Open));
    assert_eq!(
        bench.breaker.next_probe(),
        Some(bench.now + Duration::from_secs(1))
    );
}

#[test]
fn where_slow_calls_count_a_slow_probe_fails() {
    for (rate, to) in [(0, None), (50, Some(CircuitState::Open))] {
        let mut bench = Bench::new(CircuitBreaker {
            slow_call_rate: rate,
            ..LIMITS
        });
        bench.trip();
        bench.wait(1_000);
        let probe = bench.pass();
        let transition = bench.settle(probe, &SLOW, &Counts::default());
        assert_eq!(transition.map(|t| t.to), to);
    }
}

#[test]
fn an_abandoned_probe_frees_its_place_and_a_lost_one_is_not_waited_for() {
    let mut bench = Bench::new(LIMITS);
    bench.trip();
    bench.wait(1_000);
    let (first, lost) = (bench.pass(), bench.pass());
    assert!(bench.is_refused());
    assert_eq!(bench.settle(first, &ABANDONED, &Counts::default()), None);
    let again = bench.pass();
    assert!(bench.is_refused());
    bench.wait(59_999);
    assert!(bench.is_refused());
    bench.wait(1);
    bench.pass();
    bench.pass();
    assert!(bench.is_refused());
    let before = bench.breaker;
    for straggler in [lost, again] {
        assert_eq!(bench.settle(straggler, &FAILURE, &HALF_FAILED), None);
    }
    assert_eq!(bench.breaker, before);
}

#[test]
fn every_length_within_the_jitter_is_as_likely() {
    let mut bench = Bench::new(CircuitBreaker {
        open_jitter: 40,
        ..LIMITS
    });
    let mut quarters = [0; 4];
    for _ in 0..4000 {
        bench.breaker = Breaker::NEW;
        let extra = bench.trip() - Duration::from_secs(1);
        assert!(extra <= Duration::from_millis(400));
        let quarter = (extra.as_micros() / 100_001) as usize;
        quarters[quarter] += 1;
    }
    // 1000 expected, standard deviation 27.
    assert!(quarters.iter().all(|n| (850..1150).contains(n)), "{quarters:?}");
}

fn limits() -> impl Strategy<Value = CircuitBreaker> {
    (
        (0u32..=100, 0u32..=100, 0u32..5, 1u32..10),
        (10u64..5_000, 1u32..20, 0u32..=100),
        (1u32..5, 0u64..20_000),
    )
        .prop_map(
            |((failure_rate, slow_call_rate, consecutive_failures, minimum_calls), open, probes)| {
                let (open_time, longest, open_jitter) = open;
                let open_time = Duration::from_millis(open_time);
                let (half_open_probes, ramp) = probes;
                CircuitBreaker {
                    failure_rate,
                    slow_call_rate,
                    consecutive_failures,
                    minimum_calls,
                    open_time,
                    max_open_time: open_time * longest,
                    open_jitter,
                    half_open_probes,
                    ramp: Duration::from_millis(ramp),
                    ..CircuitBreaker::DEFAULT
                }
            },
        )
}

/// Some time passes, then a call asks, or one of those under way ends.
#[derive(Clone, Debug)]
struct Step {
    ms: u64,
    ask: bool,
    which: prop::sample::Index,
    end: CallEnd,
    counts: Counts,
}

fn step() -> impl Strategy<Value = Step> {
    let end = prop_oneof![Just(SUCCESS), Just(FAILURE), Just(SLOW), Just(ABANDONED)];
    let ms = prop_oneof![8 => 0u64..3_000, 1 => 0u64..100_000];
    (
        ms,
        any::<bool>(),
        any::<prop::sample::Index>(),
        end,
        (1u64..20, 0u64..20, 0u64..20),
    )
        .prop_map(|(ms, ask, which, end, (calls, failures, slow))| Step {
            ms,
            ask,
            which,
            end,
            counts: Counts {
                calls,
                failures: failures.min(calls),
                slow: slow.min(calls),
            },
        })
}

/// The longest that nobody may pass, with those limits.
fn longest_refusal(limits: &CircuitBreaker) -> Duration {
    let open = limits.max_open_time * (100 + limits.open_jitter) / 100;
    open.max(patience(limits)).max(limits.ramp)
}

proptest! {
    #[test]
    fn for_every_history_probes_are_bounded_stragglers_are_ignored_and_it_is_never_stuck(
        limits in limits(), steps in prop::collection::vec(step(), 1..200), seed: u64,
    ) {
        let mut bench = Bench::new(limits);
        bench.draw = Seeded(seed);
        let mut under_way: Vec<Ticket> = Vec::new();
        for step in steps {
            bench.wait(step.ms);
            let before = bench.breaker;
            if step.ask || under_way.is_empty() {
                let state = bench.state();
                match bench.ask() {
                    (Verdict::Pass(ticket), _) => {
                        prop_assert!(state != CircuitState::Open);
                        under_way.push(ticket);
                    }
                    (Verdict::Refuse { until }, transition) => {
                        prop_assert!(state != CircuitState::Closed);
                        prop_assert_eq!(transition, None);
                        prop_assert_eq!(bench.breaker, before, "a refusal changes nothing");
                        prop_assert_eq!(until.is_some(), state == CircuitState::Open);
                        let mut later = bench.breaker;
                        let then = until.unwrap_or_else(|| bench.now + longest_refusal(&limits));
                        prop_assert!(then <= bench.now + longest_refusal(&limits));
                        let verdict = later.ask(then, &limits, &mut bench.draw).0;
                        prop_assert!(matches!(verdict, Verdict::Pass(_)), "it is never stuck");
                    }
                }
            } else {
                let ticket = under_way.swap_remove(step.which.index(under_way.len()));
                let counted = bench.breaker.is_counted(ticket, &limits);
                let transition = bench.settle(ticket, &step.end, &step.counts);
                let probing = matches!(before.state, State::HalfOpen { .. });
                if !counted || (step.end.ended == Ended::Abandon && !probing) {
                    prop_assert_eq!(bench.breaker, before);
                }
                if step.end.ended == Ended::Abandon {
                    prop_assert_eq!(transition, None);
                    prop_assert_eq!(bench.breaker.epoch, before.epoch);
                }
                if let Some(transition) = transition {
                    prop_assert_eq!(bench.breaker.epoch != before.epoch, transition.is_fresh());
                    prop_assert_eq!(transition.to, bench.state());
                }
            }
            if let Some(epoch) = bench.breaker.closed_epoch(&limits) {
                let mut asked = bench.breaker;
                let passed = (Verdict::Pass(Ticket::closed(epoch)), None);
                prop_assert_eq!(asked.ask(bench.now, &limits, &mut bench.draw), passed);
                prop_assert_eq!(asked, bench.breaker, "while closed, calls needn't ask");
            }
            if bench.breaker.is_clean() {
                let mut settled = bench.breaker;
                let ticket = Ticket::closed(settled.epoch);
                settled.settle(ticket, &SUCCESS, &step.counts, bench.now, &limits, &mut bench.draw);
                prop_assert_eq!(settled, bench.breaker, "successes of a clean one needn't be told");
            }
            if matches!(bench.breaker.state, State::HalfOpen { .. }) {
                let probes = under_way.iter().filter(|ticket| bench.breaker.is_counted(**ticket, &limits)).count();
                prop_assert!(probes <= limits.half_open_probes as usize);
            }
        }
    }

    #[test]
    fn observing_refuses_nothing_and_goes_through_the_same_states(
        limits in limits(), steps in prop::collection::vec(step(), 1..200), seed: u64,
    ) {
        let mut real = Bench::new(limits);
        let mut observed = Bench::new(CircuitBreaker { mode: BreakerMode::Observe, ..limits });
        observed.now = real.now;
        (real.draw, observed.draw) = (Seeded(seed), Seeded(seed));
        let mut under_way: Vec<Ticket> = Vec::new();
        for step in steps {
            real.wait(step.ms);
            observed.wait(step.ms);
            if step.ask || under_way.is_empty() {
                let (verdict, transition) = real.ask();
                let (other, same) = observed.ask();
                prop_assert_eq!(transition, same);
                let Verdict::Pass(ticket) = other else {
                    return Err(TestCaseError::fail("it observes only"));
                };
                match verdict {
                    Verdict::Pass(real) => {
                        prop_assert_eq!(real, ticket);
                        under_way.push(real);
                    }
                    Verdict::Refuse { .. } => {
                        prop_assert!(ticket.would_be_refused());
                        prop_assert_eq!(observed.settle(ticket, &step.end, &step.counts), None);
                    }
                }
            } else {
                let ticket = under_way.swap_remove(step.which.index(under_way.len()));
                let transition = real.settle(ticket, &step.end, &step.counts);
                prop_assert_eq!(observed.settle(ticket, &step.end, &step.counts), transition);
            }
            prop_assert_eq!(real.breaker, observed.breaker);
            prop_assert_eq!(real.state(), observed.state());
        }
    }

    #[test]
    fn a_forced_circuit_obeys_in_every_state_and_leaves_it_as_it_was(
        limits in limits(), steps in prop::collection::vec(step(), 1..50), seed: u64,
    ) {
        let mut bench = Bench::new(limits);
        bench.draw = Seeded(seed);
        let mut ticket = Ticket::closed(0);
        for step in steps {
            bench.wait(step.ms);
            let before = bench.breaker;
            bench.limits.mode = BreakerMode::ForceOpen;
            prop_assert_eq!(bench.ask(), (Verdict::Refuse { until: None }, None));
            prop_assert_eq!(bench.state(), CircuitState::Open);
            prop_assert_eq!(bench.settle(ticket, &step.end, &step.counts), None);
            bench.limits.mode = BreakerMode::ForceClosed;
            let forced = bench.pass();
            prop_assert_eq!(bench.breaker.closed_epoch(&bench.limits), None);
            prop_assert_eq!(bench.state(), CircuitState::Closed);
            prop_assert_eq!(bench.settle(forced, &step.end, &step.counts), None);
            bench.limits.mode = BreakerMode::Enforce;
            prop_assert_eq!(bench.settle(forced, &step.end, &step.counts), None);
            prop_assert_eq!(bench.breaker, before);
            if let (Verdict::Pass(passed), _) = bench.ask() {
                ticket = passed;
            }
            bench.settle(ticket, &step.end, &step.counts);
        }
    }
}

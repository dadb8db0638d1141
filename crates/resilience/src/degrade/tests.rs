use super::*;
use leeward_policy::Name;
use leeward_policy::model::{DegradationLevel, DegradationPolicy, DegradationTrigger, Scope, Signal};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

#[expect(
    clippy::disallowed_methods,
    reason = "an arbitrary origin; only differences matter"
)]
fn origin() -> Instant {
    Instant::now()
}

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn error_rate(window: Duration) -> Signal {
    Signal::ErrorRate {
        service: name("payment"),
        above: 20,
        clear_below: 10,
        window,
        minimum_calls: 10,
    }
}

fn latency() -> Signal {
    Signal::Latency {
        service: name("payment"),
        percentile: 95,
        above: millis(100),
        clear_below: millis(80),
        window: secs(30),
        minimum_calls: 10,
    }
}

fn burn_rate() -> Signal {
    Signal::BurnRate {
        service: name("payment"),
        objective: 99_900,
        above: 144,
        clear_below: 72,
        long_window: secs(3600),
        short_window: secs(300),
        minimum_calls: 20,
    }
}

fn circuit_open() -> Signal {
    Signal::CircuitOpen {
        service: name("payment"),
    }
}

fn saturation() -> Signal {
    Signal::Saturation {
        service: name("payment"),
        above: 100,
        clear_below: 80,
    }
}

fn calls(calls: u64, failures: u64) -> SignalSample {
    SignalSample {
        calls,
        failures,
        limit: 100,
        ..SignalSample::default()
    }
}

fn trigger(level: usize) -> DegradationTrigger {
    DegradationTrigger {
        level,
        signal: error_rate(secs(10)),
        hold_for: secs(10),
        clear_after: secs(60),
        min_stay: secs(60),
        max_stay: None,
        scope: Scope::Zone,
    }
}

fn policy(triggers: Vec<DegradationTrigger>) -> DegradationPolicy {
    let level = |text| DegradationLevel {
        name: name(text),
        flags: BTreeMap::new(),
        shed_below: None,
    };
    DegradationPolicy {
        levels: ["normal", "reduced", "core-only"].map(level).into(),
        routes: Vec::new(),
        triggers,
    }
}

const PAST: Option<Reading> = Some(Reading {
    value: 50.0,
    past: true,
    clear: false,
});
const BETWEEN: Option<Reading> = Some(Reading {
    value: 15.0,
    past: false,
    clear: false,
});
const CLEAR: Option<Reading> = Some(Reading {
    value: 0.0,
    past: false,
    clear: true,
});

/// A judge whose triggers all read the same.
struct Run {
    judge: Judge,
    policy: DegradationPolicy,
    now: Instant,
}

impl Run {
    fn new(triggers: Vec<DegradationTrigger>) -> Self {
        Self {
            judge: Judge::new(),
            policy: policy(triggers),
            now: origin(),
        }
    }

    fn judge(&mut self, reading: Option<Reading>) -> Option<Change> {
        self.judge.judge(&self.policy, |_, _| reading, self.now)
    }

    /// Every second for so long, and all that came of it.
    fn during(&mut self, length: Duration, reading: Option<Reading>) -> Vec<Change> {
        let end = self.now + length;
        let mut changes = Vec::new();
        while self.now < end {
            self.now += secs(1);
            changes.extend(self.judge(reading));
        }
        changes
    }
}

#[test]
fn the_buckets_are_as_the_wire_has_them() {
    assert_eq!(latency_bucket(Duration::ZERO), 0);
    assert_eq!(latency_bucket(Duration::from_micros(1249)), 0);
    assert_eq!(latency_bucket(Duration::from_micros(1250)), 1);
    for bucket in 1..LATENCY_BUCKETS {
        let lower = latency_upper(bucket - 1);
        assert_eq!(latency_bucket(lower), bucket);
        assert_eq!(latency_bucket(lower - Duration::from_micros(1)), bucket - 1);
        let exact = 1.25f64.powi(i32::try_from(bucket).unwrap());
        assert!((lower.as_secs_f64() * 1000.0 - exact).abs() < 0.001, "{bucket}");
    }
    assert_eq!(latency_bucket(secs(86400)), 63);
    assert!(latency_upper(62) > secs(21 * 60) && latency_upper(62) < secs(22 * 60));
}

#[test]
fn an_error_rate_is_that_of_its_window_over_all_proxies() {
    let start = origin();
    let signal = error_rate(secs(10));
    let mut log = SignalLog::new([&signal], start);
    assert_eq!(reading(&log, &signal, start), None);
    log.add("a", &calls(5, 2), start);
    let few = reading(&log, &signal, start).unwrap();
    assert_eq!((few.value, few.past, few.clear), (40.0, false, false));
    log.add("b", &calls(15, 2), start + secs(1));
    let now = reading(&log, &signal, start + secs(1)).unwrap();
    assert_eq!((now.value, now.past), (20.0, true), "at the mark is past it");
    assert_eq!(now.describe(&signal), "error rate of payment 20.0 %, past 20 %");
    // The first sample is no longer in the window, then the second.
    let later = reading(&log, &signal, start + millis(10_400)).unwrap();
    assert!((later.value - 13.3).abs() < 0.1, "{later:?}");
    assert!(!later.past && !later.clear);
    assert_eq!(reading(&log, &signal, start + millis(11_400)), None);
}

#[test]
fn few_calls_that_still_fail_do_not_clear() {
    let start = origin();
    let signal = error_rate(secs(10));
    let mut log = SignalLog::new([&signal], start);
    log.add("a", &calls(3, 3), start);
    let seen = reading(&log, &signal, start).unwrap();
    assert!(!seen.past && !seen.clear);
}

#[test]
fn a_mark_of_nothing_clears_when_there_is_nothing() {
    let start = origin();
    let signal = Signal::ErrorRate {
        service: name("payment"),
        above: 1,
        clear_below: 0,
        window: secs(10),
        minimum_calls: 1,
    };
    let mut log = SignalLog::new([&signal], start);
    log.add("a", &calls(100, 0), start);
    assert!(reading(&log, &signal, start).unwrap().clear);
}

#[test]
fn windows_of_hours_reach_back_and_forget() {
    let start = origin();
    let signal = burn_rate();
    let mut log = SignalLog::new([&signal], start);
    let mut now = start;
    // An hour of 2 % errors: twenty times what an objective of 99.9 % lets fail.
    for _ in 0..3600 {
        now += secs(1);
        log.add("a", &calls(50, 1), now);
    }
    let burning = reading(&log, &signal, now).unwrap();
    assert!((burning.value - 20.0).abs() < 0.01 && burning.past, "{burning:?}");
    // What goes on for five minutes is over in the short window, though not in the long one.
    for _ in 0..302 {
        now += secs(1);
        log.add("a", &calls(50, 0), now);
    }
    let over = reading(&log, &signal, now).unwrap();
    assert!(over.clear && over.value < 0.01, "{over:?}");
    // A burst is past the mark in the short window only.
    for _ in 0..20 {
        now += secs(1);
        log.add("a", &calls(500, 500), now);
    }
    let mut burst = SignalLog::new([&signal], start);
    burst.add("a", &calls(100_000, 0), now - secs(1800));
    burst.add("a", &calls(100, 100), now);
    assert!(!reading(&burst, &signal, now).unwrap().past);
}

#[test]
fn memory_is_bounded_whatever_comes() {
    let start = origin();
    let signals = [burn_rate(), latency(), error_rate(secs(600))];
    let mut log = SignalLog::new(&signals, start);
    let mut sample = calls(1, 1);
    sample.latencies[7] = 1;
    for second in 0..30_000u64 {
        log.add("a", &sample, start + millis(second * 700));
    }
    let (slots, with_latencies) = log.held();
    assert!(slots <= 601 + 61, "{slots}");
    assert!((20..=31).contains(&with_latencies), "{with_latencies}");
    for proxy in 0..10_000u32 {
        log.add(&proxy.to_string(), &sample, start + secs(40_000));
    }
    assert_eq!(log.proxies(), 4096);
    log.add("another", &sample, start + secs(40_010));
    assert_eq!(log.proxies(), 1, "those that fell silent make room");
}

#[test]
fn a_log_keeps_what_its_signals_look_back_on_and_no_more() {
    let start = origin();
    let (short, long) = (error_rate(secs(5)), error_rate(secs(60)));
    let mut log = SignalLog::new([&short], start);
    log.add("a", &calls(20, 20), start);
    log.keep_for([&short, &long]);
    assert!(reading(&log, &short, start).is_some());
    assert_eq!(reading(&log, &long, start), None);
    log.add("a", &calls(20, 20), start + secs(1));
    assert!(reading(&log, &long, start + secs(1)).is_some());
    log.keep_for([]);
    assert_eq!(log.held(), (0, 0));
}

#[test]
fn a_circuit_is_open_where_half_of_those_who_use_the_service_say_so() {
    let start = origin();
    let signal = circuit_open();
    let mut log = SignalLog::new([&signal], start);
    let open = SignalSample {
        circuit_open: true,
        ..calls(0, 0)
    };
    let is_open = |log: &SignalLog, now| reading(log, &signal, now).map(|reading| reading.past);
    assert_eq!(is_open(&log, start), None);
    log.add("a", &open, start);
    log.add("bystander", &calls(0, 0), start);
    log.add("another", &calls(0, 0), start);
    assert_eq!(is_open(&log, start), Some(true), "who doesn't call has no say");
    log.add("b", &calls(1, 0), start);
    assert_eq!(is_open(&log, start), Some(true));
    log.add("c", &calls(1, 0), start);
    assert_eq!(is_open(&log, start), Some(false));
    log.add("a", &open, start + secs(5));
    assert_eq!(is_open(&log, start + secs(6)), Some(true), "b and c fell silent");
    assert_eq!(is_open(&log, start + secs(11)), None);
}

#[test]
fn demand_and_limits_of_all_proxies_add_up() {
    let start = origin();
    let signal = saturation();
    let mut log = SignalLog::new([&signal], start);
    let busy = |demand, limit| SignalSample {
        demand,
        limit,
        ..SignalSample::default()
    };
    log.add("a", &busy(150_000, 100), start);
    let alone = reading(&log, &signal, start).unwrap();
    assert!(alone.past && (alone.value - 150.0).abs() < 1e-9, "{alone:?}");
    log.add("b", &busy(0, 100), start);
    let both = reading(&log, &signal, start).unwrap();
    assert!(both.clear && (both.value - 75.0).abs() < 1e-9, "{both:?}");
    log.add("a", &busy(150_000, 100), start + secs(4));
    assert!(reading(&log, &signal, start + secs(6)).unwrap().past);
}

#[test]
fn it_begins_after_hold_for_and_ends_after_clear_after_and_min_stay() {
    let mut run = Run::new(vec![trigger(1)]);
    assert_eq!(run.during(secs(10), PAST), []);
    let begun = run.during(secs(1), PAST);
    assert_eq!((begun[0].from, begun[0].to), (0, 1));
    assert_eq!(begun[0].why.trigger, Some(0));
    assert_eq!(begun[0].why.text, "error rate of payment 50.0 %, past 20 %");
    assert_eq!(run.during(secs(100), BETWEEN), []);
    assert_eq!(run.during(secs(60), CLEAR), []);
    let ended = run.during(secs(1), CLEAR);
    assert_eq!((ended[0].from, ended[0].to), (1, 0));
    assert_eq!(ended[0].why.text, "error rate of payment 0.0 %, below 10 %");
}

#[test]
fn a_stay_is_at_least_min_stay_though_the_signal_is_clear() {
    let mut run = Run::new(vec![DegradationTrigger {
        hold_for: Duration::ZERO,
        clear_after: Duration::ZERO,
        min_stay: secs(300),
        ..trigger(1)
    }]);
    assert!(run.judge(PAST).is_some());
    assert_eq!(run.during(secs(299), CLEAR), []);
    assert_eq!(run.during(secs(1), CLEAR).len(), 1);
}

#[test]
fn a_service_that_nobody_calls_ends_a_level() {
    let mut run = Run::new(vec![trigger(1)]);
    run.during(secs(11), PAST);
    assert_eq!(run.judge.level(), 1);
    let ended = run.during(secs(61), None);
    assert_eq!(ended.len(), 1);
    assert_eq!(ended[0].why.text, "nothing is seen of payment");
}

#[test]
fn max_stay_ends_it_until_the_signal_has_cleared() {
    let mut run = Run::new(vec![DegradationTrigger {
        max_stay: Some(secs(120)),
        ..trigger(2)
    }]);
    run.during(secs(11), PAST);
    let changes = run.during(secs(1000), PAST);
    assert_eq!(changes.len(), 1);
    assert_eq!((changes[0].from, changes[0].to), (2, 0));
    assert_eq!(changes[0].why.text, "held for 120s, as long as it may");
    assert!(matches!(
        run.judge.stage(0),
        Some(Stage::Spent { clearing: None })
    ));
    run.during(secs(30), CLEAR);
    run.during(secs(1), BETWEEN);
    run.during(secs(61), CLEAR);
    assert_eq!(run.judge.stage(0), Some(Stage::Idle));
    assert_eq!(run.during(secs(11), PAST).len(), 1);
}

#[test]
fn the_most_degraded_level_that_is_asked_for_holds() {
    let quick = DegradationTrigger {
        hold_for: secs(5),
        ..trigger(1)
    };
    let mut run = Run::new(vec![quick, trigger(2)]);
    let rises = run.during(secs(20), PAST);
    assert_eq!(
        rises
            .iter()
            .map(|change| (change.from, change.to))
            .collect::<Vec<_>>(),
        [(0, 1), (1, 2)]
    );
    assert_eq!(rises[1].why.trigger, Some(1));
}

#[test]
fn a_change_of_policy_keeps_what_stayed_the_same() {
    let mut run = Run::new(vec![trigger(1)]);
    run.during(secs(5), PAST);
    // Another one before it, and the levels are the same: it has been past its mark for 5 s already.
    run.policy = policy(vec![trigger(2), trigger(1)]);
    assert_eq!(run.during(secs(6), PAST).first().map(|change| change.to), Some(1));
    run.policy = policy(vec![trigger(2)]);
    let gone = run.during(secs(1), BETWEEN);
    assert_eq!((gone[0].from, gone[0].to, gone[0].why.trigger), (1, 0, None));
}

#[test]
fn a_seeded_judge_changes_nothing_by_itself_and_goes_on_with_what_it_sees() {
    let mut run = Run::new(vec![trigger(1), trigger(2)]);
    run.judge.seed(&run.policy, 1, run.now);
    assert_eq!(run.judge.level(), 1);
    assert_eq!(run.judge(CLEAR), None);
    assert_eq!(run.during(secs(59), CLEAR), []);
    assert_eq!(
        run.during(secs(2), CLEAR).len(),
        1,
        "as if it had begun when seeded"
    );
    // What it saw and the other did not is to hold anew.
    run.during(secs(11), PAST);
    assert_eq!(run.judge.level(), 2);
    run.judge.seed(&run.policy, 0, run.now);
    assert_eq!(run.judge.level(), 0);
    assert_eq!(run.during(secs(9), PAST), []);
    assert_eq!(run.during(secs(1), PAST).len(), 1);
}

#[test]
fn a_square_wave_changes_the_level_once_in_an_hour() {
    let signal = error_rate(secs(10));
    let start = origin();
    let mut log = SignalLog::new([&signal], start);
    let policy = policy(vec![DegradationTrigger {
        hold_for: secs(1),
        ..trigger(1)
    }]);
    let mut judge = Judge::new();
    let mut changes = 0;
    for tick in 0..3600 * 5u64 {
        let now = start + millis(tick * 200);
        // 0.2 Hz: 2.5 s good, 2.5 s bad.
        let bad = tick % 25 >= 12;
        log.add("a", &calls(10, if bad { 10 } else { 0 }), now);
        let change = judge.judge(&policy, |_, signal| reading(&log, signal, now), now);
        changes += usize::from(change.is_some());
    }
    assert_eq!((changes, judge.level()), (1, 1));
}

fn any_reading() -> impl Strategy<Value = Option<Reading>> {
    prop_oneof![Just(PAST), Just(BETWEEN), Just(CLEAR), Just(None)]
}

fn any_trigger() -> impl Strategy<Value = DegradationTrigger> {
    let max_stay = prop::option::of(1u64..200);
    (1usize..3, 0u64..30, 0u64..100, 0u64..100, max_stay).prop_map(|(level, hold, clear, min, max)| {
        DegradationTrigger {
            hold_for: secs(hold),
            clear_after: secs(clear),
            min_stay: secs(min),
            max_stay: max.map(secs),
            ..trigger(level)
        }
    })
}

proptest! {
    #[test]
    fn the_level_is_one_that_an_active_trigger_asks_for(
        triggers in prop::collection::vec(any_trigger(), 0..5),
        steps in prop::collection::vec((prop::collection::vec(any_reading(), 5), 1u64..40), 1..200),
    ) {
        let policy = policy(triggers);
        let mut judge = Judge::new();
        let mut now = origin();
        for (readings, pause) in steps {
            now += secs(pause);
            let before = judge.level();
            let change = judge.judge(&policy, |at, _| readings[at], now);
            let active = policy.triggers.iter().enumerate().filter(|(at, _)| {
                matches!(judge.stage(*at), Some(Stage::Active { .. }))
            });
            prop_assert_eq!(judge.level(), active.map(|(_, trigger)| trigger.level).max().unwrap_or(0));
            match change {
                None => prop_assert_eq!(judge.level(), before),
                Some(change) => {
                    prop_assert_eq!((change.from, change.to), (before, judge.level()));
                    prop_assert!(before != judge.level());
                    prop_assert!(change.why.trigger.is_some() && !change.why.text.is_empty());
                }
            }
        }
    }

    #[test]
    fn a_stay_is_as_long_as_policy_says(
        trigger in any_trigger(),
        steps in prop::collection::vec((any_reading(), 1u64..20), 1..300),
    ) {
        let mut run = Run::new(vec![trigger.clone()]);
        let mut begun: Option<Instant> = None;
        let mut past_since: Option<Instant> = None;
        let mut clear_since: Option<Instant> = None;
        for (reading, pause) in steps {
            run.now += secs(pause);
            let now = run.now;
            let past = reading.is_some_and(|reading| reading.past);
            let clear = reading.is_none_or(|reading| reading.clear);
            past_since = past.then(|| past_since.unwrap_or(now));
            clear_since = clear.then(|| clear_since.unwrap_or(now));
            match run.judge(reading) {
                Some(change) if change.to > change.from => {
                    prop_assert!(now - past_since.unwrap() >= trigger.hold_for);
                    begun = Some(now);
                }
                Some(_) => {
                    let stay = now - begun.take().unwrap();
                    let time_up = trigger.max_stay.is_some_and(|max| stay >= max);
                    let over = clear_since.is_some_and(|at| now - at >= trigger.clear_after);
                    prop_assert!(time_up || (over && stay >= trigger.min_stay));
                }
                None => {
                    if let (Some(begun), Some(max_stay)) = (begun, trigger.max_stay) {
                        prop_assert!(now - begun < max_stay);
                    }
                }
            }
        }
    }

    #[test]
    fn a_signal_that_flaps_changes_the_level_no_more_than_once_per_stay(
        hold in 0u64..10,
        clear in 1u64..60,
        min in 0u64..60,
        bad in 1u64..120,
        good in 1u64..120,
    ) {
        let mut run = Run::new(vec![DegradationTrigger {
            hold_for: secs(hold),
            clear_after: secs(clear),
            min_stay: secs(min),
            ..trigger(1)
        }]);
        let mut changes: Vec<(Instant, Change)> = Vec::new();
        for tick in 0..3600 {
            run.now += secs(1);
            let reading = if tick % (bad + good) < bad { PAST } else { CLEAR };
            changes.extend(run.judge(reading).map(|change| (run.now, change)));
        }
        if bad <= hold {
            prop_assert_eq!(changes.len(), 0, "never past its mark for long enough");
        } else if good <= clear {
            prop_assert_eq!(changes.len(), 1, "never clear for long enough");
        }
        for pair in changes.windows(2) {
            if pair[0].1.to == 1 {
                prop_assert!(pair[1].0 - pair[0].0 >= secs(min.max(clear)));
            } else {
                prop_assert!(pair[1].0 - pair[0].0 >= secs(hold));
            }
        }
    }

    #[test]
    fn a_percentile_is_within_its_bucket(
        micros in prop::collection::vec(0u64..3_000_000, 1..200),
        percent in 1u32..=99,
    ) {
        let start = origin();
        let signal = Signal::Latency {
            service: name("payment"),
            percentile: percent,
            above: millis(1),
            clear_below: millis(1),
            window: secs(30),
            minimum_calls: 1,
        };
        let mut log = SignalLog::new([&signal], start);
        for micros in &micros {
            let mut sample = SignalSample { calls: 1, ..SignalSample::default() };
            sample.latencies[latency_bucket(Duration::from_micros(*micros))] = 1;
            log.add("a", &sample, start);
        }
        let mut sorted = micros;
        sorted.sort_unstable();
        let rank = (sorted.len() * percent as usize).div_ceil(100);
        let exact = latency_bucket(Duration::from_micros(sorted[rank - 1]));
        let value = reading(&log, &signal, start).unwrap().value;
        let upper = latency_upper(exact).as_secs_f64() * 1000.0;
        let lower = exact.checked_sub(1).map_or(0.0, |below| latency_upper(below).as_secs_f64() * 1000.0);
        prop_assert!(lower <= value && value <= upper + 1e-6, "{lower} <= {value} <= {upper}");
    }
}

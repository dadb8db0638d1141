use super::*;
use crate::Seeded;
use proptest::prelude::*;

const SETTINGS: AdaptiveConcurrency = AdaptiveConcurrency::DEFAULT;

#[expect(
    clippy::disallowed_methods,
    reason = "an arbitrary origin; only differences matter"
)]
fn origin() -> Instant {
    // Far enough from the clock's own origin that a request can have begun before it.
    Instant::now() + Duration::from_secs(3600)
}

/// A request that took so long while the limit was all in use.
fn full(took: Duration) -> Sample {
    Sample {
        took,
        under_way: u32::MAX,
    }
}

/// A service that does `workers` requests at once, each in `service_time`, and lets the others queue; as many
/// requests as the limit allows, up to `offered`, are always under way.
struct Service {
    gradient: Gradient,
    now: Instant,
    workers: u32,
    service_time: Duration,
    offered: u32,
}

impl Service {
    fn new(workers: u32, offered: u32) -> Self {
        let now = origin();
        Self {
            gradient: Gradient::new(&SETTINGS, now),
            now,
            workers,
            service_time: Duration::from_millis(10),
            offered,
        }
    }

    fn run(&mut self, time: Duration) {
        let mut draw = Seeded(1);
        let end = self.now + time;
        while self.now < end {
            let under_way = self.gradient.limit(&SETTINGS).min(self.offered);
            let rounds = f64::from(under_way) / f64::from(self.workers);
            let took = self.service_time.mul_f64(rounds.max(1.0));
            self.now += took;
            for _ in 0..under_way {
                let sample = Sample { took, under_way };
                self.gradient.sample(sample, self.now, &SETTINGS, &mut draw);
            }
        }
    }

    fn limit(&self) -> u32 {
        self.gradient.limit(&SETTINGS)
    }
}

#[test]
fn the_limit_converges_to_capacity_and_the_headroom() {
    let mut service = Service::new(20, 10_000);
    service.run(Duration::from_secs(30));
    // Where limit * gradient = 20 * 1.25, and the root of that is added: 25 + 5, but for the histogram's 3 %.
    assert!((28..=32).contains(&service.limit()), "{}", service.limit());
}

#[test]
fn the_limit_falls_when_latency_doubles_and_recovers_with_it() {
    let mut service = Service::new(20, 10_000);
    service.run(Duration::from_secs(30));
    let before = service.limit();
    service.service_time *= 2;
    service.run(Duration::from_secs(5));
    let during = service.limit();
    assert!(during * 3 < before * 2, "{before}, then {during}");
    service.service_time /= 2;
    service.run(Duration::from_secs(5));
    let after = service.limit();
    assert!(after * 10 >= before * 9, "{before}, {during}, then {after}");
}

#[test]
fn the_limit_grows_while_latency_stays() {
    let mut service = Service::new(10_000, 10_000);
    service.run(Duration::from_secs(30));
    assert_eq!(service.limit(), SETTINGS.max_limit);
}

#[test]
fn a_limit_that_is_not_used_does_not_grow() {
    let mut service = Service::new(10_000, 40);
    service.run(Duration::from_secs(30));
    assert!(
        (80..=90).contains(&service.limit()),
        "about twice what is under way: {}",
        service.limit()
    );
}

#[test]
fn a_minimum_that_is_out_of_date_does_not_hold_the_limit_down_for_good() {
    let mut service = Service::new(20, 10_000);
    service.run(Duration::from_secs(30));
    service.service_time *= 10;
    service.run(Duration::from_secs(30));
    for _ in 0..20 {
        service.run(Duration::from_millis(100));
        // Now latency is as long as the interval, so that each update answers the limit before the last one,
        // and the limit swings; but never below what keeps the workers busy.
        assert!((20..=45).contains(&service.limit()), "{}", service.limit());
    }
}

#[test]
fn only_requests_that_began_while_measuring_count_for_the_minimum() {
    let now = origin();
    let mut draw = Seeded(1);
    let mut gradient = Gradient::new(&SETTINGS, now);
    for _ in 0..1000 {
        gradient.sample(full(Duration::from_secs(1)), now, &SETTINGS, &mut draw);
    }
    assert!(gradient.is_measuring());
    let later = now + Duration::from_secs(1);
    for _ in 0..SETTINGS.min_rtt_requests {
        assert_eq!(gradient.limit(&SETTINGS), SETTINGS.min_limit);
        gradient.sample(full(Duration::from_secs(1)), later, &SETTINGS, &mut draw);
    }
    assert!(!gradient.is_measuring());
}

#[test]
fn a_quiet_hour_counts_as_one_interval_and_one_measurement() {
    let mut service = Service::new(20, 10_000);
    service.run(Duration::from_secs(30));
    let before = service.limit();
    let mut draw = Seeded(1);
    let took = service.service_time;
    service.now += Duration::from_secs(3600);
    service
        .gradient
        .sample(full(took), service.now, &SETTINGS, &mut draw);
    assert!(service.gradient.is_measuring());
    service.now += took;
    for _ in 0..SETTINGS.min_rtt_requests {
        service
            .gradient
            .sample(full(took), service.now, &SETTINGS, &mut draw);
    }
    let after = service.limit();
    assert!(after.abs_diff(before) * 4 < before, "{before}, then {after}");
}

#[test]
fn the_minimum_is_measured_at_intervals_that_vary_by_the_jitter() {
    let settings = AdaptiveConcurrency {
        min_rtt_requests: 1,
        ..SETTINGS
    };
    let took = Duration::from_millis(1);
    let mut lengths = Vec::new();
    for seed in 0..20 {
        let mut draw = Seeded(seed);
        let begun = origin();
        let mut now = begun;
        let mut gradient = Gradient::new(&settings, now - took);
        loop {
            gradient.sample(full(took), now, &settings, &mut draw);
            if gradient.is_measuring() {
                break;
            }
            now += Duration::from_millis(100);
        }
        lengths.push(now - begun);
    }
    let shortest = lengths.iter().min().unwrap();
    let longest = lengths.iter().max().unwrap();
    assert!(*shortest >= settings.min_rtt_interval, "{shortest:?}");
    assert!(*longest <= settings.min_rtt_interval.mul_f64(1.16), "{longest:?}");
    assert!(*longest - *shortest > Duration::from_secs(3), "they vary");
}

prop_compose! {
    fn any_settings()(
        percentile in 1u32..=99,
        update_ms in 10u64..=10_000,
        max_limit in prop_oneof![1u32..20, 1u32..=1_000_000],
        min_rtt_s in 1u64..=3600,
        min_rtt_requests in prop_oneof![1u32..=5, 1u32..=10_000],
        min_rtt_jitter in 0u32..=100,
        min_limit in prop_oneof![1u32..20, 1u32..=1000],
        buffer in 0u32..=1000,
    ) -> AdaptiveConcurrency {
        AdaptiveConcurrency {
            percentile,
            update_interval: Duration::from_millis(update_ms),
            max_limit,
            min_rtt_interval: Duration::from_secs(min_rtt_s),
            min_rtt_requests,
            min_rtt_jitter,
            min_limit,
            buffer,
        }
    }
}

proptest! {
    #[test]
    fn the_limit_stays_within_its_bounds_whatever_comes(
        first in any_settings(),
        second in any_settings(),
        steps in prop::collection::vec(
            (
                prop_oneof![Just(0u64), 0u64..100_000, 0u64..20_000_000_000],
                prop_oneof![Just(0u64), 0u64..100_000, 0u64..u64::MAX],
                prop_oneof![0u32..100, 0u32..=u32::MAX],
            ),
            1..500,
        ),
        seed: u64,
    ) {
        let mut draw = Seeded(seed);
        let mut now = origin();
        let mut gradient = Gradient::new(&first, now);
        let half = steps.len() / 2;
        for (n, (gap, took, under_way)) in steps.into_iter().enumerate() {
            // The settings change on the way.
            let settings = if n < half { &first } else { &second };
            now += Duration::from_micros(gap);
            gradient.sample(Sample { took: Duration::from_micros(took), under_way }, now, settings, &mut draw);
            let limit = gradient.limit(settings);
            prop_assert!(limit >= 1 && limit <= settings.max_limit);
            prop_assert!(limit >= settings.min_limit.min(settings.max_limit));
        }
    }

    #[test]
    fn one_interval_moves_the_limit_by_half_or_double_and_the_root_at_most(
        before_us in 100u64..1_000_000,
        after_us in 100u64..100_000_000,
    ) {
        let mut draw = Seeded(1);
        let mut now = origin();
        let mut gradient = Gradient::new(&SETTINGS, now);
        let mut last = gradient.limit(&SETTINGS);
        for n in 0..400u64 {
            now += Duration::from_millis(100);
            let took = if n < 200 { before_us } else { after_us };
            let measured = gradient.is_measuring();
            gradient.sample(full(Duration::from_micros(took)), now, &SETTINGS, &mut draw);
            let limit = gradient.limit(&SETTINGS);
            if !measured && !gradient.is_measuring() {
                prop_assert!(f64::from(limit) <= 2.0 * f64::from(last) + f64::from(2 * last).sqrt());
                prop_assert!(f64::from(limit) + 1.0 >= f64::from(last) / 2.0);
            }
            last = limit;
        }
    }
}

use super::*;
use proptest::prelude::*;

const FAILOVER: ZoneFailover = ZoneFailover::DEFAULT;
/// How often the caller looks.
const TICK: Duration = Duration::from_millis(250);

/// The zones of a service over time, by percent of healthy endpoints, 100 in each zone.
struct Service {
    zones: Zones<usize>,
    now: Instant,
    panic_threshold: u32,
}

impl Service {
    #[expect(
        clippy::disallowed_methods,
        reason = "an arbitrary origin; only differences matter"
    )]
    fn new() -> Self {
        Self {
            zones: Zones::new(),
            now: Instant::now(),
            panic_threshold: 0,
        }
    }

    fn look_at(&mut self, zones: &[(f64, f64)]) -> Shares {
        let zones: Vec<_> = zones
            .iter()
            .enumerate()
            .map(|(zone, (healthy, total))| (zone, ZoneHealth::new(*healthy, *total)))
            .collect();
        self.zones
            .update(&zones, self.now, &FAILOVER, self.panic_threshold)
    }

    fn look(&mut self, percent: &[u32]) -> Shares {
        let zones: Vec<_> = percent.iter().map(|p| (f64::from(*p), 100.0)).collect();
        self.look_at(&zones)
    }

    /// Looks every [`TICK`] for so long; what was seen each time.
    fn hold(&mut self, percent: &[u32], length: Duration) -> Vec<Shares> {
        let mut seen = Vec::new();
        let end = self.now + length;
        while self.now < end {
            seen.push(self.look(percent));
            self.now += TICK;
        }
        seen
    }
}

fn secs(n: f64) -> Duration {
    Duration::from_secs_f64(n)
}

#[track_caller]
fn check(shares: &Shares, expected: &[f64]) {
    let close = shares.of.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(
        close && shares.of.len() == expected.len(),
        "{shares:?} is not {expected:?}"
    );
}

/// How often a zone went from one stage to another.
fn changes(seen: &[Shares], from: Stage, to: Stage) -> usize {
    seen.windows(2)
        .filter(|w| w[0].stages[0] == from && w[1].stages[0] == to)
        .count()
}

/// How often the first zone's share came to rise after it had been steady or falling.
fn rises(seen: &[Shares]) -> usize {
    let mut rising = false;
    let mut rises = 0;
    for pair in seen.windows(2) {
        let (before, after) = (pair[0].of[0], pair[1].of[0]);
        if after > before + 1e-9 && !rising {
            rises += 1;
            rising = true;
        } else if after < before - 1e-9 {
            rising = false;
        }
    }
    rises
}

#[test]
fn the_first_zone_serves_what_it_can_and_the_next_the_rest() {
    check(&Service::new().look(&[100, 100, 100]), &[1.0, 0.0, 0.0]);
    check(&Service::new().look(&[72, 100, 100]), &[1.0, 0.0, 0.0]);
    check(&Service::new().look(&[50, 100, 100]), &[0.7, 0.3, 0.0]);
    check(&Service::new().look(&[50, 10, 100]), &[0.7, 0.14, 0.16]);
    check(&Service::new().look(&[0, 0, 100]), &[0.0, 0.0, 1.0]);
    check(&Service::new().look_at(&[(0.0, 0.0), (3.0, 3.0)]), &[0.0, 1.0]);
}

#[test]
fn what_is_more_than_all_can_carry_is_shared_alike() {
    check(&Service::new().look(&[50, 10]), &[0.7 / 0.84, 0.14 / 0.84]);
    check(&Service::new().look(&[10]), &[1.0]);
    check(&Service::new().look(&[0, 0]), &[0.0, 0.0]);
    check(&Service::new().look(&[]), &[]);
}

#[test]
fn panic_disregards_health_unless_the_zones_left_can_carry_everything() {
    let panicking = |zones: &[(f64, f64)], panic_threshold| {
        let mut service = Service {
            panic_threshold,
            ..Service::new()
        };
        service.look_at(zones)
    };
    let shares = panicking(&[(0.0, 0.0), (2.0, 5.0), (0.0, 1.0)], 50);
    assert_eq!(shares.panic, Panic::Yes);
    check(&shares, &[0.0, 1.0, 0.0]);
    assert_eq!(panicking(&[(0.0, 2.0)], 50).panic, Panic::Yes);
    assert_eq!(
        panicking(&[(5.0, 10.0)], 50).panic,
        Panic::No,
        "no fewer than that"
    );
    assert_eq!(panicking(&[(0.0, 2.0)], 0).panic, Panic::No);
    assert_eq!(
        panicking(&[(0.0, 0.0)], 50).panic,
        Panic::No,
        "of nothing, nothing fails"
    );
    let lost = panicking(&[(0.0, 4.0), (3.0, 3.0)], 50);
    assert_eq!(lost.panic, Panic::No);
    check(&lost, &[0.0, 1.0]);
}

#[test]
fn a_short_dip_ends_once_the_zone_has_been_well_for_as_long_as_a_dip_may_last() {
    let mut service = Service::new();
    service.hold(&[100, 100], secs(5.0));
    let dip = service.hold(&[0, 100], secs(5.0));
    check(&dip[0], &[0.0, 1.0]);
    let after = service.hold(&[100, 100], secs(20.0));
    let back = after.iter().position(|s| s.of[0] > 0.0).unwrap();
    assert_eq!(TICK * u32::try_from(back).unwrap(), FAILOVER.leave_after);
    check(&after[back], &[1.0, 0.0]);
    assert_eq!(changes(&after, Stage::Dipped, Stage::Steady), 1);
}

#[test]
fn a_dip_that_does_not_end_is_leaving_after_twice_as_long() {
    let first_left = |phases: &[(u32, f64)]| {
        let mut service = Service::new();
        let mut seen = Vec::new();
        for (percent, length) in phases {
            seen.extend(service.hold(&[*percent, 100], secs(*length)));
        }
        let left = seen.iter().position(|s| s.stages[0] == Stage::Left);
        left.map(|ticks| TICK * u32::try_from(ticks).unwrap())
    };
    let comes_and_goes = [(0, 4.0), (100, 2.0)].repeat(5);
    assert_eq!(
        first_left(&comes_and_goes),
        Some(secs(20.0)),
        "in the middle of being down"
    );
    let hardly_better = [(50, 5.0), (75, 30.0)];
    assert_eq!(first_left(&hardly_better), Some(secs(20.0)));
    let well_too_late = [(50, 5.0), (75, 7.0), (100, 30.0)];
    assert_eq!(first_left(&well_too_late), Some(secs(20.0)));
    let well_in_time = [(50, 5.0), (75, 4.5), (100, 30.0)];
    assert_eq!(first_left(&well_in_time), None);
    assert_eq!(first_left(&[(50, 30.0)]), Some(FAILOVER.leave_after));
}

#[test]
fn a_second_dip_soon_after_is_leaving() {
    let mut service = Service::new();
    service.hold(&[100, 100], secs(5.0));
    service.hold(&[0, 100], secs(5.0));
    assert_eq!(
        service.hold(&[100, 100], secs(20.0)).last().unwrap().stages[0],
        Stage::Steady
    );
    assert_eq!(service.look(&[0, 100]).stages[0], Stage::Left);
}

#[test]
fn a_zone_that_was_left_returns_step_by_step_once_it_has_been_well_for_long() {
    let mut service = Service::new();
    service.hold(&[100, 100], secs(5.0));
    let dead = service.hold(&[0, 100], secs(30.0));
    assert_eq!(dead.last().unwrap().stages[0], Stage::Left);
    let well = service.hold(&[100, 100], secs(200.0));
    for (shares, tick) in well.iter().zip(0u32..) {
        let elapsed = TICK * tick;
        let steps = match elapsed.checked_sub(FAILOVER.return_after) {
            None => 0.0,
            Some(returning) => (returning.as_secs_f64() / 10.0).floor() + 1.0,
        };
        let expected = f64::min(steps / 10.0, 1.0);
        assert!(
            (shares.of[0] - expected).abs() < 1e-6,
            "{expected} after {elapsed:?}"
        );
    }
    assert_eq!(changes(&well, Stage::Returning, Stage::Steady), 1);
}

#[test]
fn a_zone_that_falls_while_it_returns_is_left_again() {
    let mut service = Service::new();
    service.hold(&[100, 100], secs(1.0));
    service.hold(&[0, 100], secs(20.0));
    let well = service.hold(&[100, 100], secs(85.0));
    check(well.last().unwrap(), &[0.3, 0.7]);
    let again = service.look(&[60, 100]);
    assert_eq!(again.stages[0], Stage::Left);
    check(&again, &[0.3, 0.7]);
    let well = service.hold(&[100, 100], secs(60.0));
    assert!(
        well.iter().all(|s| s.of[0] < 0.31),
        "it has to be well for long anew"
    );
}

#[test]
fn bounds_are_lifted_as_far_as_nobody_else_can_serve() {
    let mut service = Service::new();
    service.hold(&[100, 100], secs(1.0));
    let alone = service.hold(&[0, 0], secs(30.0));
    check(alone.last().unwrap(), &[0.0, 0.0]);
    let back = service.look(&[100, 0]);
    assert_eq!(back.stages[0], Stage::Left);
    check(&back, &[1.0, 0.0]);
    let mut service = Service::new();
    service.hold(&[0, 50], secs(30.0));
    check(&service.look(&[100, 50]), &[0.3, 0.7]);
}

#[test]
fn time_passes_for_a_caller_that_looks_seldom() {
    let mut service = Service::new();
    service.look(&[0, 100]);
    service.now += secs(11.0);
    assert_eq!(service.look(&[100, 100]).stages[0], Stage::Left);
    service.now += secs(61.0);
    assert_eq!(service.look(&[100, 100]).stages[0], Stage::Returning);
    service.now += secs(100.0);
    assert_eq!(service.look(&[100, 100]).stages[0], Stage::Steady);
    service.look(&[0, 100]);
    service.now += secs(9.0);
    service.look(&[100, 100]);
    service.now += secs(12.0);
    let recovered = service.look(&[100, 100]);
    assert_eq!(recovered.stages[0], Stage::Steady, "it was well in time");
}

#[test]
fn a_zone_that_loses_its_endpoints_has_dipped_and_one_that_never_had_any_has_not() {
    let mut service = Service::new();
    check(&service.look_at(&[(0.0, 0.0), (3.0, 3.0)]), &[0.0, 1.0]);
    check(&service.look_at(&[(3.0, 3.0), (3.0, 3.0)]), &[1.0, 0.0]);
    // Gone from the list, and back.
    let mut zones = Zones::new();
    let full = ZoneHealth::new(3.0, 3.0);
    let (both, other) = ([("a", full), ("b", full)], [("b", full)]);
    let mut now = service.now;
    let mut look = |zones: &mut Zones<&'static str>, list: &[(&'static str, ZoneHealth)], pause| {
        now += pause;
        zones.update(list, now, &FAILOVER, 50)
    };
    check(&look(&mut zones, &both, TICK), &[1.0, 0.0]);
    check(&look(&mut zones, &other, TICK), &[1.0]);
    let back = look(&mut zones, &both, TICK);
    assert_eq!(back.stages, [Stage::Dipped, Stage::Steady]);
    // One that stays away for long is forgotten.
    look(&mut zones, &other, TICK);
    look(&mut zones, &other, FAILOVER.return_after);
    assert_eq!(zones.known.len(), 1);
}

mod drained;
mod modes;
mod room;

proptest! {
    #[test]
    fn shares_are_whole_and_the_unhealthy_get_none(
        zones in prop::collection::vec((0u32..6, 0u32..6), 1..6),
        steps in prop::collection::vec((0usize..6, 0u32..6, 0u64..40_000), 0..60),
        panic_threshold in prop_oneof![Just(0u32), Just(50)],
    ) {
        let mut service = Service { panic_threshold, ..Service::new() };
        let mut healths: Vec<(f64, f64)> =
            zones.iter().map(|(a, b)| (f64::from(*a.min(b)), f64::from(*b))).collect();
        for (zone, healthy, pause) in steps {
            if let Some(health) = healths.get_mut(zone) {
                health.0 = f64::from(healthy).min(health.1);
            }
            service.now += Duration::from_millis(pause);
            let shares = service.look_at(&healths);
            let sum: f64 = shares.of.iter().sum();
            let any = healths.iter().any(|h| h.0 > 0.0);
            let expected = if any || shares.panic == Panic::Yes { 1.0 } else { 0.0 };
            prop_assert!((sum - expected).abs() < 1e-6, "{shares:?} of {healths:?}");
            for (share, (healthy, total)) in shares.of.iter().zip(&healths) {
                prop_assert!(*share >= 0.0);
                let may = *healthy > 0.0 || (shares.panic == Panic::Yes && *total > 0.0);
                prop_assert!(may || *share < 1e-9, "{shares:?} of {healths:?}");
            }
        }
    }

    #[test]
    fn a_share_never_rises_while_the_zone_is_left_or_dipped(
        steps in prop::collection::vec((0u32..=100, 1u64..40_000), 1..100),
    ) {
        let mut service = Service::new();
        let mut last = service.look(&[100, 100]);
        for (percent, pause) in steps {
            service.now += Duration::from_millis(pause);
            let shares = service.look(&[percent, 100]);
            if matches!(shares.stages[0], Stage::Left | Stage::Dipped) {
                prop_assert!(shares.of[0] <= last.of[0] + 1e-9, "{shares:?} after {last:?}");
            }
            last = shares;
        }
    }

    #[test]
    fn a_zone_that_comes_and_goes_is_left_once_and_stays_so(phase in 0u64..5000) {
        let mut service = Service::new();
        let mut seen = service.hold(&[100, 100], Duration::from_millis(phase));
        for _ in 0..60 {
            seen.extend(service.hold(&[0, 100], secs(2.5)));
            seen.extend(service.hold(&[100, 100], secs(2.5)));
        }
        prop_assert_eq!(rises(&seen), 0, "nothing comes back in five minutes");
        prop_assert_eq!(changes(&seen, Stage::Dipped, Stage::Left), 1);
        prop_assert_eq!(seen.last().unwrap().stages[0], Stage::Left);
    }

    #[test]
    fn traffic_comes_back_at_most_once_a_minute_however_a_zone_comes_and_goes(
        phases in prop::collection::vec((1u64..30_000, 1u64..30_000), 1..16),
    ) {
        let mut service = Service::new();
        let mut seen = service.hold(&[100, 100], secs(1.0));
        for (down, up) in phases {
            seen.extend(service.hold(&[0, 100], Duration::from_millis(down)));
            seen.extend(service.hold(&[100, 100], Duration::from_millis(up)));
        }
        for minute in seen.windows(240) {
            prop_assert!(rises(minute) <= 1);
        }
    }

    #[test]
    fn health_at_the_edge_makes_a_zone_left_at_most_once(
        percents in prop::collection::vec(69u32..=72, 1..400), ticks in 1u32..40,
    ) {
        let mut service = Service::new();
        let mut seen = service.hold(&[100, 100], secs(1.0));
        for percent in percents {
            seen.extend(service.hold(&[percent, 100], TICK * ticks));
        }
        let leaves = changes(&seen, Stage::Dipped, Stage::Left) + changes(&seen, Stage::Steady, Stage::Left);
        prop_assert!(leaves <= 1);
        let steady = seen.iter().take_while(|s| s.stages[0] == Stage::Steady).count();
        prop_assert_eq!(rises(&seen[steady..]), 0);
    }
}

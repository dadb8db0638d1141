//! Zones that serve at once, by weight.

use super::*;

/// Zones by percent of healthy endpoints and weight.
fn weighed(zones: &[(u32, u32)]) -> Vec<(usize, ZoneHealth)> {
    let of = |(healthy, weight): &(u32, u32)| ZoneHealth {
        weight: Some(*weight),
        ..ZoneHealth::new(f64::from(*healthy), 100.0)
    };
    zones.iter().map(of).enumerate().collect()
}

fn shares(zones: &[(u32, u32)]) -> Shares {
    Zones::new().update(&weighed(zones), Service::new().now, &FAILOVER, 0)
}

#[test]
fn each_zone_has_its_part_by_weight() {
    check(&shares(&[(100, 1), (100, 3)]), &[0.25, 0.75]);
    check(&shares(&[(100, 1), (72, 1), (100, 0)]), &[0.5, 0.5, 0.0]);
    assert_eq!(
        shares(&[(100, 1), (100, 1), (100, 0)]).spills,
        [Spill::Others, Spill::Others, Spill::All]
    );
    // One without endpoints isn't there.
    let mut gone = weighed(&[(100, 1), (100, 1), (100, 2)]);
    gone[2].1 = ZoneHealth {
        weight: Some(2),
        ..ZoneHealth::new(0.0, 0.0)
    };
    let shares = Zones::new().update(&gone, Service::new().now, &FAILOVER, 0);
    check(&shares, &[0.5, 0.5, 0.0]);
}

#[test]
fn what_one_cannot_carry_goes_to_those_that_carry_all_of_theirs_by_weight() {
    check(&shares(&[(0, 2), (100, 1), (100, 1)]), &[0.0, 0.5, 0.5]);
    check(&shares(&[(50, 2), (100, 1), (100, 1)]), &[0.35, 0.325, 0.325]);
    // Not to one that gives up some itself.
    check(&shares(&[(50, 1), (0, 1), (100, 2)]), &[0.175, 0.0, 0.825]);
    assert_eq!(
        shares(&[(50, 1), (0, 1), (100, 2)]).spills,
        [Spill::Others, Spill::Others, Spill::All]
    );
}

#[test]
fn then_those_that_stand_by_serve_in_order() {
    check(&shares(&[(100, 0), (0, 1), (100, 0)]), &[1.0, 0.0, 0.0]);
    check(&shares(&[(50, 0), (0, 1), (100, 0)]), &[0.7, 0.0, 0.3]);
    check(&shares(&[(50, 1), (50, 1), (100, 0)]), &[0.35, 0.35, 0.3]);
    // And what is more than all can carry is shared alike.
    check(&shares(&[(50, 1), (0, 1)]), &[1.0, 0.0]);
    check(&shares(&[(0, 1), (0, 0)]), &[0.0, 0.0]);
}

#[test]
fn a_drained_zone_gives_its_part_to_the_others_by_weight() {
    let mut zones = weighed(&[(100, 2), (100, 1), (100, 1), (100, 0)]);
    zones[0].1.kept = 0.5;
    let shares = |zones: &[(usize, ZoneHealth)]| Zones::new().update(zones, Service::new().now, &FAILOVER, 0);
    check(&shares(&zones), &[0.25, 0.375, 0.375, 0.0]);
    zones[1].1.healthy = 0.0;
    check(&shares(&zones), &[1.0 / 3.0, 0.0, 2.0 / 3.0, 0.0]);
    zones[2].1.healthy = 0.0;
    check(&shares(&zones), &[0.5, 0.0, 0.0, 0.5]);
}

#[test]
fn a_zone_that_was_left_returns_to_its_part_step_by_step() {
    let mut zones = Zones::new();
    let mut now = Service::new().now;
    let mut hold = |percent: u32, length: f64| {
        let end = now + secs(length);
        let mut last = None;
        while now < end {
            last = Some(zones.update(&weighed(&[(percent, 1), (100, 1)]), now, &FAILOVER, 0));
            now += TICK;
        }
        last.unwrap()
    };
    check(&hold(100, 5.0), &[0.5, 0.5]);
    check(&hold(0, 30.0), &[0.0, 1.0]);
    check(&hold(100, 59.0), &[0.0, 1.0]);
    check(&hold(100, 5.0), &[0.05, 0.95]);
    check(&hold(100, 10.0), &[0.1, 0.9]);
    check(&hold(100, 100.0), &[0.5, 0.5]);
}

proptest! {
    #[test]
    fn shares_stay_whole_and_follow_the_weights(
        zones in prop::collection::vec((0u32..=100, 0u32..5, 0u32..=100), 1..6),
    ) {
        let with: Vec<_> = zones.iter().map(|(healthy, weight, _)| (*healthy, *weight)).collect();
        let mut drained = weighed(&with);
        for ((_, health), (_, _, kept)) in drained.iter_mut().zip(&zones) {
            health.kept = f64::from(*kept) / 100.0;
        }
        let total: u32 = with.iter().map(|(_, weight)| weight).sum();
        let plain = shares(&with);
        let all_well = with.iter().all(|(healthy, _)| *healthy >= 72);
        for zones in [plain.clone(), Zones::new().update(&drained, Service::new().now, &FAILOVER, 0)] {
            let sum: f64 = zones.of.iter().sum();
            let any = with.iter().any(|(healthy, _)| *healthy > 0);
            prop_assert!((sum - if any { 1.0 } else { 0.0 }).abs() < 1e-6, "{zones:?}");
            for (share, (healthy, _)) in zones.of.iter().zip(&with) {
                prop_assert!(*share >= -1e-9 && (*healthy > 0 || *share < 1e-9), "{zones:?}");
            }
        }
        for (share, (_, weight)) in plain.of.iter().zip(&with) {
            let part = f64::from(*weight) / f64::from(total.max(1));
            prop_assert!(!all_well || total == 0 || (share - part).abs() < 1e-6, "{plain:?}");
        }
    }
}

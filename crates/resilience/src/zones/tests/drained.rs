//! Zones that are taken out of use.

use super::*;

/// Shares of zones by percent of healthy endpoints and of what is kept.
fn shares(zones: &[(u32, u32)]) -> Shares {
    let zones: Vec<_> = zones
        .iter()
        .enumerate()
        .map(|(zone, (healthy, kept))| {
            let health = ZoneHealth {
                kept: f64::from(*kept) / 100.0,
                ..ZoneHealth::new(f64::from(*healthy), 100.0)
            };
            (zone, health)
        })
        .collect();
    Zones::new().update(&zones, Service::new().now, &FAILOVER, 0)
}

#[test]
fn what_a_zone_gives_up_goes_where_it_would_if_the_zone_were_lost() {
    check(&shares(&[(100, 100), (100, 100)]), &[1.0, 0.0]);
    check(&shares(&[(100, 90), (100, 100)]), &[0.9, 0.1]);
    check(&shares(&[(100, 0), (100, 100), (100, 100)]), &[0.0, 1.0, 0.0]);
    check(&shares(&[(100, 0), (50, 100), (100, 100)]), &[0.0, 0.7, 0.3]);
    // A zone that isn't turned to gives up nothing, nor one that is turned to for the rest.
    check(&shares(&[(100, 100), (100, 0)]), &[1.0, 0.0]);
    check(&shares(&[(50, 100), (100, 0), (100, 100)]), &[0.7, 0.0, 0.3]);
    // Or half of it.
    check(&shares(&[(50, 100), (100, 50), (100, 100)]), &[0.7, 0.15, 0.15]);
}

#[test]
fn what_the_others_cannot_carry_stays() {
    check(&shares(&[(100, 0)]), &[1.0]);
    check(&shares(&[(100, 0), (0, 100)]), &[1.0, 0.0]);
    check(&shares(&[(100, 0), (50, 100)]), &[0.3, 0.7]);
    check(&shares(&[(100, 0), (10, 100), (10, 100)]), &[0.72, 0.14, 0.14]);
    check(&shares(&[(0, 0), (0, 100)]), &[0.0, 0.0]);
}

#[test]
fn where_every_zone_is_drained_those_serve_that_keep_most() {
    check(&shares(&[(100, 0), (100, 90)]), &[0.0, 1.0]);
    check(&shares(&[(100, 0), (50, 90)]), &[0.3, 0.7]);
    check(&shares(&[(100, 0), (100, 0)]), &[1.0, 0.0]);
}

#[test]
fn a_panic_is_first_met_where_nothing_is_drained() {
    let zone = |name, kept| {
        let health = ZoneHealth {
            kept,
            ..ZoneHealth::new(0.0, 4.0)
        };
        (name, health)
    };
    let panicking =
        |zones: &[(&'static str, ZoneHealth)]| Zones::new().update(zones, Service::new().now, &FAILOVER, 50);
    check(&panicking(&[zone("a", 0.0), zone("b", 1.0)]), &[0.0, 1.0]);
    check(&panicking(&[zone("a", 0.0), zone("b", 0.0)]), &[1.0, 0.0]);
}

proptest! {
    #[test]
    fn shares_stay_whole_and_only_drained_zones_give(
        zones in prop::collection::vec((0u32..=100, prop_oneof![Just(100u32), 0u32..=100]), 1..6),
    ) {
        let undrained: Vec<_> = zones.iter().map(|(healthy, _)| (*healthy, 100)).collect();
        let (before, after) = (shares(&undrained).of, shares(&zones).of);
        let sums = (before.iter().sum::<f64>(), after.iter().sum::<f64>());
        prop_assert!((sums.0 - sums.1).abs() < 1e-6, "{before:?} {after:?}");
        for ((before, after), (healthy, kept)) in before.iter().zip(&after).zip(&zones) {
            prop_assert!(*after >= -1e-9);
            prop_assert!(*kept < 100 || after >= &(before - 1e-9), "{before:?} {after:?}");
            prop_assert!(*healthy > 0 || *after < 1e-9, "an unhealthy zone got some");
        }
        let carried = zones.iter().any(|(healthy, kept)| *kept == 100 && *healthy >= 72);
        for (after, (_, kept)) in after.iter().zip(&zones) {
            prop_assert!(!carried || *kept > 0 || *after < 1e-9, "{after} is left in a drained zone");
        }
    }

    #[test]
    fn a_step_moves_at_most_a_step(
        (healths, kept, step) in (prop::collection::vec(0u32..=100, 2..5), 0u32..=100, 0u32..=100),
    ) {
        let zones = |kept: u32| -> Vec<_> {
            healths.iter().enumerate().map(|(i, h)| (*h, if i == 0 { kept } else { 100 })).collect()
        };
        let next = kept.saturating_sub(step);
        let (before, after) = (shares(&zones(kept)).of, shares(&zones(next)).of);
        for (before, after) in before.iter().zip(&after) {
            prop_assert!((before - after).abs() <= f64::from(kept - next) / 100.0 + 1e-9);
        }
        prop_assert!(after[0] <= before[0] + 1e-9, "it keeps less and gets more");
    }
}

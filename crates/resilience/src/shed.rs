//! Load shedding: what matters least is refused first.

use crate::Draw;
use leeward_policy::model::{LoadShedding, Priority};

/// Whether a request of this priority is refused while this share of the service's limit is in use.
///
/// `utilisation` is 0 for idle and 1 for a limit that is all in use; it may be more, and what isn't a number
/// counts as 0. Count the request itself as in use, so that the last place of a small limit is kept for what
/// matters more. The probability grows with it from 0 at the priority's mark to 1 halfway from there to the whole, so
/// that a priority is gone before its limit is, and its traffic thins out rather than stops. Critical requests
/// are never refused.
pub fn sheds(priority: Priority, utilisation: f64, settings: &LoadShedding, draw: &mut impl Draw) -> bool {
    let probability = probability(priority, utilisation, settings);
    probability > 0.0 && draw.unit() < probability
}

fn probability(priority: Priority, utilisation: f64, settings: &LoadShedding) -> f64 {
    let mark = match priority {
        Priority::Low => settings.low,
        Priority::Normal => settings.normal,
        Priority::High => settings.high,
        Priority::Critical => return 0.0,
    };
    let mark = f64::from(mark.min(100)) / 100.0;
    let excess = utilisation - mark;
    let room = (1.0 - mark) / 2.0;
    if excess > 0.0 {
        (excess / room).min(1.0)
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Seeded;
    use proptest::prelude::*;

    #[track_caller]
    fn check(priority: Priority, utilisation: f64, expected: f64) {
        let found = probability(priority, utilisation, &LoadShedding::DEFAULT);
        assert!((found - expected).abs() < 1e-9, "{found} instead of {expected}");
    }

    #[test]
    fn it_grows_from_the_mark_to_halfway_from_there() {
        check(Priority::Low, 0.6, 0.0);
        check(Priority::Low, 0.7, 0.5);
        check(Priority::Low, 0.8, 1.0);
        check(Priority::Normal, 0.8, 0.0);
        check(Priority::Normal, 0.85, 0.5);
        check(Priority::High, 0.9, 0.0);
        check(Priority::High, 1.0, 1.0);
        check(Priority::High, 7.0, 1.0);
        check(Priority::Low, f64::NAN, 0.0);
        check(Priority::Critical, 7.0, 0.0);
    }

    #[test]
    fn draws_follow_the_probability() {
        let mut draw = Seeded(7);
        let shed = (0..10_000)
            .filter(|_| sheds(Priority::Low, 0.65, &LoadShedding::DEFAULT, &mut draw))
            .count();
        assert!((2_300..2_700).contains(&shed), "a quarter of 10000, not {shed}");
    }

    proptest! {
        #[test]
        fn a_lower_priority_is_never_shed_less_and_a_critical_request_never(
            marks in prop::array::uniform3(1u32..=100),
            utilisation in prop_oneof![0.0f64..=1.2, 0.9f64..=1.0],
            seed: u64,
        ) {
            let mut marks = marks;
            marks.sort_unstable();
            let [low, normal, high] = marks;
            let settings = LoadShedding { low, normal, high };
            let mut shed = Priority::ALL
                .map(|priority| sheds(priority, utilisation, &settings, &mut Seeded(seed)));
            prop_assert!(!shed[3]);
            shed.reverse();
            prop_assert!(shed.is_sorted(), "by the same draw: {:?}", shed);
        }
    }
}

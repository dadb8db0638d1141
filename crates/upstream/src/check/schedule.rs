//! When an endpoint is asked. Chance is an argument.

use std::time::Duration;

/// Longest wait for the first check of an endpoint: short enough that what is down when a proxy starts is soon
/// known, long enough that a restart does not ask a thousand endpoints at once.
const FIRST_WITHIN: Duration = Duration::from_secs(1);

/// How long after it becomes known an endpoint is asked for the first time. `draw` is in `0.0..1.0`; what is
/// outside counts as the nearest of these.
pub(super) fn first(interval: Duration, draw: f64) -> Duration {
    interval.min(FIRST_WITHIN).mul_f64(unit(draw))
}

/// From the start of one check to that of the next: `interval`, shorter or longer by up to `jitter_percent`
/// (at most 100), evenly. `draw` is in `0.0..1.0`; what is outside counts as the nearest of these.
pub(super) fn next(interval: Duration, jitter_percent: u32, draw: f64) -> Duration {
    let jitter = f64::from(jitter_percent.min(100)) / 100.0;
    let factor = 1.0 + jitter * (2.0 * unit(draw) - 1.0);
    Duration::try_from_secs_f64(interval.as_secs_f64() * factor).unwrap_or(interval)
}

fn unit(draw: f64) -> f64 {
    if draw.is_nan() { 0.0 } else { draw.clamp(0.0, 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn jitter_goes_both_ways() {
        assert_eq!(next(10 * SECOND, 10, 0.0), 9 * SECOND);
        assert_eq!(next(10 * SECOND, 10, 0.5), 10 * SECOND);
        assert_eq!(next(10 * SECOND, 10, 1.0), 11 * SECOND);
        assert_eq!(next(10 * SECOND, 0, 0.9), 10 * SECOND);
    }

    #[test]
    fn the_first_check_is_within_a_second_or_the_interval() {
        assert_eq!(first(3600 * SECOND, 0.5), SECOND / 2);
        assert_eq!(first(SECOND / 10, 0.5), SECOND / 20);
        assert_eq!(first(SECOND, 0.0), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn every_draw_is_within_the_bounds(
            ms in 1u64..4_000_000,
            jitter in any::<u32>(),
            draw in prop::num::f64::ANY,
        ) {
            let interval = Duration::from_millis(ms);
            prop_assert!(first(interval, draw) <= interval.min(SECOND));
            let percent = jitter.min(100);
            let (least, most) = (interval * (100 - percent) / 100, interval * (100 + percent) / 100);
            let slack = Duration::from_micros(1);
            let got = next(interval, jitter, draw);
            prop_assert!(got + slack >= least && got <= most + slack, "{got:?}");
        }

        #[test]
        fn larger_draws_come_later(ms in 1u64..4_000_000, jitter in 0u32..=50, a in 0.0..1.0, b in 0.0..1.0) {
            let interval = Duration::from_millis(ms);
            let (low, high) = if a < b { (a, b) } else { (b, a) };
            prop_assert!(first(interval, low) <= first(interval, high));
            prop_assert!(next(interval, jitter, low) <= next(interval, jitter, high));
        }
    }
}

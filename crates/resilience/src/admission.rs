//! Client-side throttling: a caller that is mostly failed stops most of its requests itself.

use leeward_policy::model::AdmissionControl;
use std::time::Duration;

/// The probability with which the next request should be refused here, from 0 to the settings' maximum, given
/// what the last `elapsed` of the window saw: `total` requests that ended, of which `successes` succeeded.
///
/// Requests that were refused here are not to be counted, nor are those that are under way. Google's formula counts
/// the former, with a K of 2. With a threshold as high as 95 % the share let through would then grow by a
/// twentieth in each window at best, however well the service is; so Envoy doesn't count them, and
/// neither do we. What keeps a service that fails everything from being cut off for good is the maximum: some
/// requests are always let through, and their success ends the refusals.
///
/// `((total - successes / threshold) / (total + 1)) ^ (1 / aggression)`: Envoy's admission control, after Google's
/// SRE book, chapter 21 ("Client-Side Throttling").
///
/// Below the settings' requests a second it is 0, and so it is for no request at all. `elapsed` is the length of
/// the window, or the time since it began where that is less; below one second it counts as one, since a rate
/// over less is noise.
pub fn rejection_probability(
    total: u64,
    successes: u64,
    elapsed: Duration,
    settings: &AdmissionControl,
) -> f64 {
    let total = float(total);
    if total / elapsed.as_secs_f64().max(1.0) < f64::from(settings.rps_threshold) {
        return 0.0;
    }
    let threshold = f64::from(settings.success_threshold.max(1)) / 100.0;
    let aggression = f64::from(settings.aggression.max(1)) / 100.0;
    let missing = total - float(successes) / threshold;
    if missing <= 0.0 {
        return 0.0;
    }
    (missing / (total + 1.0))
        .powf(1.0 / aggression)
        .min(f64::from(settings.max_rejection_probability) / 100.0)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a count past 2^53 is off by less than a rate shows"
)]
fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WINDOW: Duration = Duration::from_secs(30);

    #[track_caller]
    fn check(total: u64, successes: u64, settings: &AdmissionControl, expected: f64) {
        let found = rejection_probability(total, successes, WINDOW, settings);
        assert!((found - expected).abs() < 1e-9, "{found} instead of {expected}");
    }

    #[test]
    fn the_formula_holds_at_numbers_done_by_hand() {
        let settings = AdmissionControl::DEFAULT;
        check(0, 0, &settings, 0.0);
        check(100, 100, &settings, 0.0);
        check(1, 1, &settings, 0.0);
        check(100, 95, &settings, 0.0);
        // (100 - 38 / 0.95) / 101 = 60 / 101.
        check(100, 38, &settings, 60.0 / 101.0);
        check(1000, 0, &settings, 0.8);
        let meek = AdmissionControl {
            aggression: 50,
            ..settings
        };
        check(100, 38, &meek, (60.0_f64 / 101.0).powi(2));
    }

    #[test]
    fn nothing_is_refused_below_the_threshold_of_requests() {
        let settings = AdmissionControl {
            rps_threshold: 10,
            ..AdmissionControl::DEFAULT
        };
        check(299, 0, &settings, 0.0);
        check(300, 0, &settings, 0.8);
        let young = rejection_probability(9, 0, Duration::from_millis(1), &settings);
        assert!(
            young.abs() < 1e-9,
            "nine requests are no high rate, however young the window"
        );
    }

    prop_compose! {
        fn settings()(
            success_threshold in 1u32..=100,
            aggression in 10u32..=1000,
            rps_threshold in prop_oneof![Just(0u32), 0u32..1000],
            max_rejection_probability in 1u32..=100,
        ) -> AdmissionControl {
            AdmissionControl {
                window: WINDOW,
                success_threshold,
                aggression,
                rps_threshold,
                max_rejection_probability,
            }
        }
    }

    proptest! {
        #[test]
        fn more_failures_never_refuse_less_and_never_more_than_the_maximum(
            settings in settings(),
            total in prop_oneof![0u64..200, 0u64..=u64::MAX],
            share in 0.0f64..1.0,
            seconds in 0u64..600,
        ) {
            let elapsed = Duration::from_secs(seconds);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss,
                reason = "a draw of a count"
            )]
            let successes = ((total as f64 * share) as u64).min(total);
            let most = f64::from(settings.max_rejection_probability) / 100.0;
            let worse = rejection_probability(total, successes / 2, elapsed, &settings);
            let better = rejection_probability(total, successes, elapsed, &settings);
            prop_assert!(0.0 <= better && better <= worse && worse <= most);
        }
    }
}

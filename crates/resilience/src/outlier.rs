//! Which endpoints fail far more often than they should.

use crate::health::EjectionReason;
use leeward_policy::model::OutlierDetection;

/// What an endpoint that isn't ejected did in the last interval.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tally {
    /// The endpoint's position in its service.
    pub endpoint: usize,
    /// Requests that ended.
    pub requests: u64,
    /// Those that failed.
    pub failures: u64,
}

impl Tally {
    /// In 0.0..=1.0; 1.0 of no requests.
    fn success_rate(&self) -> f64 {
        if self.requests == 0 {
            return 1.0;
        }
        1.0 - self.failures.min(self.requests) as f64 / self.requests as f64
    }
}

/// Rates nearer than this are the same; so much and more is lost in computing a mean.
const SAME: f64 = 1e-9;

/// The endpoints to eject, worst success rate first, each once with the first reason that holds. How many of
/// them may be ejected is for [`may_eject`](crate::may_eject) to say, one after the other.
///
/// The rules and their numbers are Envoy's ("Outlier detection", success rate and failure percentage):
///
/// - Of the endpoints with at least `success_rate.request_volume` requests, if they are at least
///   `success_rate.minimum_hosts`, those whose success rate is below
///   `mean - stdev * stdev_factor / 1000`. Mean and (population) standard deviation are of those endpoints'
///   rates, the endpoint's own among them: of n endpoints, a single bad one is sqrt(n - 1) deviations below
///   the mean, however bad it is, so that the usual factor of 1.9 takes five.
/// - Of the endpoints with enough requests by `failure_percentage`, if there are enough, those that failed
///   at least `threshold` percent of them.
///
/// O(n log n).
pub fn outliers(tallies: &[Tally], settings: &OutlierDetection) -> Vec<(usize, EjectionReason)> {
    let threshold = success_rate_threshold(tallies, settings);
    let percentage = settings
        .failure_percentage
        .filter(|percentage| enough(tallies, percentage.request_volume, percentage.minimum_hosts));
    let mut found: Vec<_> = tallies
        .iter()
        .filter_map(|tally| {
            let rate = tally.success_rate();
            let volume = settings.success_rate.request_volume;
            if let Some(threshold) = threshold
                && has_volume(tally, volume)
                && rate < threshold - SAME
            {
                let why = EjectionReason::SuccessRate {
                    rate: hundredths(rate),
                    threshold: hundredths(threshold),
                };
                return Some((rate, tally.endpoint, why));
            }
            let percentage = percentage?;
            let failed = tally.failures.saturating_mul(100).checked_div(tally.requests)?;
            if !has_volume(tally, percentage.request_volume) || failed < u64::from(percentage.threshold) {
                return None;
            }
            let why = EjectionReason::FailurePercentage {
                percent: u32::try_from(failed).unwrap_or(100),
                requests: tally.requests,
            };
            Some((rate, tally.endpoint, why))
        })
        .collect();
    found.sort_by(|(a, ..), (b, ..)| a.total_cmp(b));
    found
        .into_iter()
        .map(|(_, endpoint, why)| (endpoint, why))
        .collect()
}

/// The success rate below which an endpoint is an outlier. `None`: that is off, or there are too few.
fn success_rate_threshold(tallies: &[Tally], settings: &OutlierDetection) -> Option<f64> {
    let rule = settings.success_rate;
    if rule.stdev_factor == 0 || !enough(tallies, rule.request_volume, rule.minimum_hosts) {
        return None;
    }
    let rates = || {
        tallies
            .iter()
            .filter(|tally| has_volume(tally, rule.request_volume))
            .map(Tally::success_rate)
    };
    let n = rates().count() as f64;
    let mean = rates().sum::<f64>() / n;
    let variance = rates().map(|rate| (rate - mean).powi(2)).sum::<f64>() / n;
    Some(mean - variance.sqrt() * f64::from(rule.stdev_factor) / 1000.0)
}

fn has_volume(tally: &Tally, volume: u32) -> bool {
    tally.requests >= u64::from(volume)
}

/// Whether there are enough endpoints with enough requests; none are never enough.
fn enough(tallies: &[Tally], volume: u32, hosts: u32) -> bool {
    let have = tallies.iter().filter(|tally| has_volume(tally, volume)).count();
    have > 0 && u32::try_from(have).unwrap_or(u32::MAX) >= hosts
}

/// A rate in hundredths of a percent.
fn hundredths(rate: f64) -> u32 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=10000"
    )]
    let hundredths = (rate * 10_000.0).round().clamp(0.0, 10_000.0) as u32;
    hundredths
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::model::FailurePercentageDetection;
    use proptest::prelude::*;

    fn tallies(all: &[(u64, u64)]) -> Vec<Tally> {
        all.iter()
            .enumerate()
            .map(|(endpoint, &(requests, failures))| Tally {
                endpoint,
                requests,
                failures,
            })
            .collect()
    }

    #[track_caller]
    fn check(all: &[(u64, u64)], settings: &OutlierDetection, expect: &[usize]) {
        let found = outliers(&tallies(all), settings);
        let endpoints: Vec<_> = found.iter().map(|(endpoint, _)| *endpoint).collect();
        assert_eq!(endpoints, expect, "{found:?}");
    }

    #[test]
    fn far_below_the_others_is_an_outlier_among_enough() {
        let settings = OutlierDetection::DEFAULT;
        let bad_third = [(100, 1), (100, 1), (100, 40), (100, 1), (100, 1)];
        check(&bad_third, &settings, &[2]);
        check(&bad_third[..4], &settings, &[]);
        // Twenty endpoints of which two are bad: the deviation that they cause themselves hides neither.
        let mut two = vec![(1000, 10); 20];
        two[3] = (1000, 500);
        two[7] = (1000, 600);
        check(&two, &settings, &[7, 3]);
        // Those with few requests neither count nor are judged.
        check(
            &[(100, 1), (100, 1), (99, 99), (100, 1), (100, 1)],
            &settings,
            &[],
        );
    }

    #[test]
    fn the_threshold_is_told() {
        let found = outliers(
            &tallies(&[(100, 0), (100, 0), (100, 50), (100, 0), (100, 0)]),
            &OutlierDetection::DEFAULT,
        );
        // Mean 0.9, deviation 0.2: below 0.9 - 1.9 * 0.2.
        let why = EjectionReason::SuccessRate {
            rate: 5000,
            threshold: 5200,
        };
        assert_eq!(found, [(2, why)]);
    }

    #[test]
    fn failing_most_is_an_outlier_even_if_the_others_do_too() {
        let mut settings = OutlierDetection::DEFAULT;
        let all = [(50, 43), (50, 50), (50, 42), (49, 49), (200, 180), (60, 0)];
        check(&all, &settings, &[]);
        settings.failure_percentage = Some(FailurePercentageDetection::DEFAULT);
        check(&all, &settings, &[1, 4, 0]);
        settings.failure_percentage = Some(FailurePercentageDetection {
            minimum_hosts: 6,
            ..FailurePercentageDetection::DEFAULT
        });
        check(&all, &settings, &[]);
    }

    fn any_settings() -> impl Strategy<Value = OutlierDetection> {
        (0u32..4000, 1u32..8, 1u32..200, prop::option::of(1u32..=100)).prop_map(
            |(factor, hosts, volume, threshold)| {
                let mut settings = OutlierDetection::DEFAULT;
                settings.success_rate.stdev_factor = factor;
                settings.success_rate.minimum_hosts = hosts;
                settings.success_rate.request_volume = volume;
                settings.failure_percentage = threshold.map(|threshold| FailurePercentageDetection {
                    threshold,
                    minimum_hosts: hosts,
                    request_volume: volume,
                });
                settings
            },
        )
    }

    proptest! {
        #[test]
        fn each_at_most_once_worst_first_and_only_with_enough_requests(
            all in prop::collection::vec((0u64..400, 0u64..400), 0..20), settings in any_settings(),
        ) {
            let all: Vec<_> = all.into_iter().map(|(requests, failures)| (requests, failures.min(requests))).collect();
            let found = outliers(&tallies(&all), &settings);
            let rate = |endpoint: usize| 1.0 - all[endpoint].1 as f64 / all[endpoint].0 as f64;
            for pair in found.windows(2) {
                prop_assert!(pair[0].0 != pair[1].0);
                prop_assert!(rate(pair[0].0) <= rate(pair[1].0));
            }
            for (endpoint, _) in &found {
                prop_assert!(all[*endpoint].0 >= u64::from(settings.success_rate.request_volume));
            }
        }

        #[test]
        fn no_success_rate_is_an_outlier_among_its_equals(
            n in 1usize..200, requests in 100u64..1_000_000, share in 0u64..100, mut settings in any_settings(),
        ) {
            settings.failure_percentage = None;
            let failures = requests * share / 100;
            prop_assert!(outliers(&tallies(&vec![(requests, failures); n]), &settings).is_empty());
        }
    }
}

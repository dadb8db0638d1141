//! How slow an endpoint is: a moving average that is quick to believe the worst.

use leeward_policy::model::Ewma;
use std::time::Duration;

/// The moving average of one endpoint's latency, sensitive to peaks: a slower answer counts at once, faster
/// ones little by little. While there are none it falls towards zero, so that an endpoint that was slow is
/// tried again. One that was never called starts with the default of its settings, and falls likewise.
///
/// It fits in 64 bits, for threads to share in one atomic: each loads, observes and stores, with relaxed
/// ordering. Two that do so at once may lose one of two observations, which the next ones make good.
///
/// Times are milliseconds since an origin that the caller chooses once. They may wrap around: only
/// differences count, up to 24 days; an endpoint that was not called for longer may count as called
/// just now.
///
/// Source: Finagle's `PeakEwma` and Linkerd's, whose numbers the settings have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PeakEwma {
    /// Seconds, as of `at_ms`.
    cost: f32,
    at_ms: u32,
}

/// No estimate is smaller: 1 µs. Requests under way are multiplied by it, and must count for something
/// where nothing was heard of an endpoint for long.
const SHORTEST: f64 = 1e-6;

impl PeakEwma {
    /// Of an endpoint that was never called, first seen at `now_ms`.
    pub fn new(now_ms: u32, settings: &Ewma) -> Self {
        Self {
            cost: settings.default_rtt.as_secs_f32(),
            at_ms: now_ms,
        }
    }

    /// To be stored; see [`Self::from_bits`].
    pub fn to_bits(self) -> u64 {
        (u64::from(self.cost.to_bits()) << 32) | u64::from(self.at_ms)
    }

    /// The inverse of [`Self::to_bits`]. Any value is accepted; 0 is an endpoint known to be fast.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "each half is taken apart on purpose"
    )]
    pub fn from_bits(bits: u64) -> Self {
        Self {
            cost: f32::from_bits((bits >> 32) as u32),
            at_ms: bits as u32,
        }
    }

    /// Takes in that a call which ended at `now_ms` took `rtt`, or is to count as if it had (a failure).
    #[must_use]
    pub fn observe(self, rtt: Duration, now_ms: u32, settings: &Ewma) -> Self {
        let rtt = rtt.as_secs_f32();
        // Written so that a cost that isn't a number is replaced.
        let cost = if rtt < self.cost {
            let kept = self.kept(now_ms, settings);
            self.cost * kept + rtt * (1.0 - kept)
        } else {
            rtt
        };
        // A thread that was held up must not set the clock back.
        let at_ms = if since(self.at_ms, now_ms) == 0 {
            self.at_ms
        } else {
            now_ms
        };
        Self { cost, at_ms }
    }

    /// The estimate at `now_ms`, in seconds, at least 1 µs.
    pub fn estimate(self, now_ms: u32, settings: &Ewma) -> f64 {
        f64::from(self.cost * self.kept(now_ms, settings)).max(SHORTEST)
    }

    /// What share of the cost is left at `now_ms`: exp(-elapsed / decay time).
    fn kept(self, now_ms: u32, settings: &Ewma) -> f32 {
        let elapsed = since(self.at_ms, now_ms);
        if elapsed == 0 {
            return 1.0;
        }
        let decay = settings.decay_time.as_secs_f32();
        (elapsed as f32 / -1000.0 / decay).exp()
    }
}

/// Milliseconds from one time to the other; 0 if the second is the earlier.
fn since(then: u32, now: u32) -> u32 {
    let elapsed = now.wrapping_sub(then);
    if elapsed > u32::MAX / 2 { 0 } else { elapsed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SETTINGS: Ewma = Ewma::DEFAULT;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-4 * b.abs() + 1e-9
    }

    #[test]
    fn an_endpoint_never_called_starts_with_the_default_and_falls() {
        let new = PeakEwma::new(5, &SETTINGS);
        assert!(close(new.estimate(5, &SETTINGS), 0.030));
        let later = new.estimate(10_005, &SETTINGS);
        assert!(close(later, 0.030 * (-1.0f64).exp()), "{later}");
    }

    #[test]
    fn a_peak_counts_at_once_and_is_forgotten_with_the_decay_time() {
        let slow = PeakEwma::new(0, &SETTINGS).observe(ms(5000), 100, &SETTINGS);
        assert!(close(slow.estimate(100, &SETTINGS), 5.0));
        // Ten seconds of answers of 10 ms, ten each second.
        let after = (1..=100).fold(slow, |e, i| e.observe(ms(10), 100 + i * 100, &SETTINGS));
        let expected = 0.010 + (5.0 - 0.010) * (-1.0f64).exp();
        let got = after.estimate(10_100, &SETTINGS);
        assert!((got - expected).abs() < 0.01, "{got} is not {expected}");
    }

    #[test]
    fn what_was_slow_and_is_not_called_becomes_attractive_again() {
        let slow = PeakEwma::new(0, &SETTINGS).observe(ms(5000), 0, &SETTINGS);
        assert!(slow.estimate(90_000, &SETTINGS) < 0.001);
        assert!(
            slow.estimate(10_000_000, &SETTINGS) >= 1e-6,
            "but requests under way still count"
        );
    }

    #[test]
    fn the_clock_may_wrap_and_threads_may_be_late() {
        let before = PeakEwma::new(u32::MAX - 4999, &SETTINGS).observe(ms(100), u32::MAX - 4999, &SETTINGS);
        assert!(close(before.estimate(5000, &SETTINGS), 0.1 * (-1.0f64).exp()));
        let late = before.observe(ms(1), u32::MAX - 6000, &SETTINGS);
        assert_eq!(late, before, "no time has passed in which to forget");
    }

    proptest! {
        #[test]
        fn bits_are_the_whole_state(steps in prop::collection::vec((0u64..10_000, 0u32..100_000), 0..20)) {
            let mut now = 0u32;
            let mut ewma = PeakEwma::new(0, &SETTINGS);
            for (rtt, pause) in steps {
                now = now.wrapping_add(pause);
                ewma = ewma.observe(ms(rtt), now, &SETTINGS);
                prop_assert_eq!(PeakEwma::from_bits(ewma.to_bits()), ewma);
            }
        }

        #[test]
        fn an_observation_lands_between_itself_and_what_was_believed(
            first in 1u64..300_000, second in 1u64..300_000, pause in 0u32..1_000_000,
        ) {
            let one = PeakEwma::new(0, &SETTINGS).observe(ms(first), 0, &SETTINGS);
            let believed = one.estimate(0, &SETTINGS);
            let got = one.observe(ms(second), pause, &SETTINGS).estimate(pause, &SETTINGS);
            let rtt = ms(second).as_secs_f64();
            if rtt >= believed {
                prop_assert!(close(got, rtt), "a peak is believed at once");
            } else {
                prop_assert!(got >= rtt * 0.9999 && got <= believed * 1.0001);
            }
        }

        #[test]
        fn without_calls_it_never_rises(cost in 0u64..300_000, mut times in prop::collection::vec(0u32..2_000_000_000, 2..20)) {
            times.sort_unstable();
            let ewma = PeakEwma::new(0, &SETTINGS).observe(ms(cost), 0, &SETTINGS);
            let estimates: Vec<f64> = times.iter().map(|t| ewma.estimate(*t, &SETTINGS)).collect();
            prop_assert!(estimates.windows(2).all(|w| w[1] <= w[0]));
        }

        #[test]
        fn any_bits_have_an_estimate(bits: u64, now: u32, rtt in 0u64..1000) {
            let ewma = PeakEwma::from_bits(bits);
            prop_assert!(!ewma.estimate(now, &SETTINGS).is_nan());
            prop_assert!(!ewma.observe(ms(rtt), now, &SETTINGS).estimate(now, &SETTINGS).is_nan());
        }
    }
}

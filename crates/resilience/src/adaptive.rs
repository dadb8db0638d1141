//! Adaptive concurrency: how many requests at once a service bears, found from its latency.

mod histogram;

use crate::Draw;
use histogram::Histogram;
use leeward_policy::model::AdaptiveConcurrency;
use std::time::{Duration, Instant};

/// The gradient controller of Envoy's adaptive concurrency filter, for one service at one proxy.
///
/// It knows two latencies: that of the service when hardly anything is under way (the minimum), and that of
/// the last interval. While they are alike the limit grows by its square root each interval; once requests
/// queue, the second exceeds the first and the limit shrinks with their ratio. The minimum is measured anew
/// from time to time, with the limit at its smallest meanwhile; requests that began before don't count for it.
/// A limit that stays at its smallest for [`STUCK`] intervals says that the minimum is out of date, and starts
/// that, too (Envoy's rule).
///
/// A limit that isn't used says nothing about what the service bears, so it doesn't grow while less than half of
/// it is under way (as in Netflix' concurrency-limits, and unlike Envoy). Otherwise it would be at its largest
/// whenever the load is low, and a sudden overload would have filled the service's queues before it has shrunk.
///
/// Nothing happens between samples: what was due meanwhile happens once, at the next sample. A pause in
/// traffic so leaves the limit as it was. Where requests take longer than the interval, an update answers a limit
/// that is no longer in force, and the limit swings around what it would settle at: choose an interval of at
/// least the service's usual latency.
#[derive(Clone, Debug)]
pub struct Gradient {
    limit: u32,
    phase: Phase,
    /// Samples of this interval, or of this measurement.
    samples: Histogram,
    /// The most requests under way at once that this interval's samples tell of.
    peak: u32,
}

/// What a request that ends tells of the service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Sample {
    /// From when it was sent until it ended.
    pub took: Duration,
    /// Requests that are under way as it ends, itself included.
    pub under_way: u32,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Measuring the minimum by requests that began at or after `since`.
    Measuring { since: Instant },
    /// Following the gradient.
    Following {
        minimum: Duration,
        /// When the minimum is measured anew.
        stale_at: Instant,
        /// When the interval ends.
        update_at: Instant,
        /// Updates in a row that left the limit at its smallest.
        stuck: u32,
    },
}

/// Updates in a row at the smallest limit after which the minimum is measured anew; Envoy's number.
pub const STUCK: u32 = 5;

/// What the gradient may do to the limit in one interval; Envoy's numbers.
const STEEPEST: (f64, f64) = (0.5, 2.0);

impl Gradient {
    /// Begins with measuring the minimum, and so with the smallest limit.
    pub fn new(settings: &AdaptiveConcurrency, now: Instant) -> Self {
        Self {
            limit: smallest(settings),
            phase: Phase::Measuring { since: now },
            samples: Histogram::new(),
            peak: 0,
        }
    }

    /// Requests that may be under way at once: at least 1, within the settings' bounds as of the last sample.
    pub fn limit(&self, settings: &AdaptiveConcurrency) -> u32 {
        match self.phase {
            Phase::Measuring { .. } => smallest(settings),
            Phase::Following { .. } => self.limit.clamp(smallest(settings), largest(settings)),
        }
    }

    /// Whether the minimum is being measured, so that a low limit is no sign of overload.
    pub const fn is_measuring(&self) -> bool {
        matches!(self.phase, Phase::Measuring { .. })
    }

    /// Takes in what a request that ends at `now` tells.
    ///
    /// Only what the service worked on may count: answers, and requests that the caller gave up on at their
    /// deadline, with the time they had. A refusal or a failed connection is fast and would raise the limit.
    pub fn sample(
        &mut self,
        sample: Sample,
        now: Instant,
        settings: &AdaptiveConcurrency,
        draw: &mut impl Draw,
    ) {
        if let Phase::Following {
            stale_at, update_at, ..
        } = self.phase
        {
            if now >= update_at {
                self.update(now, settings);
            }
            if now >= stale_at {
                self.measure(now);
            }
        }
        match self.phase {
            Phase::Measuring { since } => {
                if now.checked_sub(sample.took).is_none_or(|began| began < since) {
                    return;
                }
                self.samples.add(sample.took);
                if self.samples.count() >= settings.min_rtt_requests.max(1) {
                    let interval = settings.min_rtt_interval;
                    let jitter = interval.mul_f64(f64::from(settings.min_rtt_jitter) / 100.0 * draw.unit());
                    self.phase = Phase::Following {
                        minimum: self.take_percentile(settings),
                        stale_at: now + interval + jitter,
                        update_at: now + settings.update_interval,
                        stuck: 0,
                    };
                }
            }
            Phase::Following { .. } => {
                self.samples.add(sample.took);
                self.peak = self.peak.max(sample.under_way);
            }
        }
    }

    /// Moves the limit by the gradient, at the end of an interval.
    fn update(&mut self, now: Instant, settings: &AdaptiveConcurrency) {
        let Phase::Following {
            minimum,
            stale_at,
            stuck,
            ..
        } = self.phase
        else {
            return;
        };
        let before = self.limit;
        if self.samples.count() > 0 {
            let latency = self.take_percentile(settings);
            let tolerated = minimum.as_secs_f64() * (1.0 + f64::from(settings.buffer) / 100.0);
            let (least, most) = STEEPEST;
            let gradient = (tolerated / latency.as_secs_f64()).clamp(least, most);
            let shrunk = f64::from(before) * gradient;
            let limit = whole(shrunk + shrunk.sqrt()).clamp(smallest(settings), largest(settings));
            if limit < before || self.peak >= before / 2 {
                self.limit = limit;
            }
        }
        self.peak = 0;
        let at_smallest = before == smallest(settings) && self.limit == before && before < largest(settings);
        let stuck = if at_smallest { stuck + 1 } else { 0 };
        self.phase = Phase::Following {
            minimum,
            stale_at: if stuck >= STUCK { now } else { stale_at },
            update_at: now + settings.update_interval,
            stuck,
        };
    }

    /// Begins to measure the minimum; the limit before is kept for afterwards.
    fn measure(&mut self, now: Instant) {
        self.samples.clear();
        self.peak = 0;
        self.phase = Phase::Measuring { since: now };
    }

    /// The percentile of the samples, which must not be none, and never zero. Forgets them.
    fn take_percentile(&mut self, settings: &AdaptiveConcurrency) -> Duration {
        let found = self.samples.percentile(settings.percentile);
        self.samples.clear();
        found
    }
}

/// The smallest limit, where the two bounds contradict each other, too.
fn smallest(settings: &AdaptiveConcurrency) -> u32 {
    settings.min_limit.clamp(1, largest(settings))
}

fn largest(settings: &AdaptiveConcurrency) -> u32 {
    settings.max_limit.max(1)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "from a float it saturates, and rounding down is meant"
)]
fn whole(limit: f64) -> u32 {
    limit as u32
}

#[cfg(test)]
mod tests;

//! Durations counted by size, in bounded memory.

use std::time::Duration;

/// Counts durations in buckets that are a sixteenth of a power of two wide, so that what is read back is off by
/// 3 % at most, from 1 µs to over an hour; what is longer counts as that. It takes 2 KiB.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    buckets: Box<[u32; BUCKETS]>,
    count: u32,
}

/// Buckets for each power of two, as a power of two.
const BITS: u32 = 4;
/// Buckets for each power of two. Durations below as many microseconds have one each.
const STEPS: u64 = 1 << BITS;
/// Longer durations count as this: 2^32 µs, or 71 minutes.
const LONGEST: u64 = (1 << 32) - 1;
/// The place of [`LONGEST`] is the last.
const BUCKETS: usize = 29 << BITS;

impl Histogram {
    pub(super) fn new() -> Self {
        Self {
            buckets: Box::new([0; BUCKETS]),
            count: 0,
        }
    }

    pub(super) const fn count(&self) -> u32 {
        self.count
    }

    pub(super) fn clear(&mut self) {
        self.buckets.fill(0);
        self.count = 0;
    }

    pub(super) fn add(&mut self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros())
            .unwrap_or(LONGEST)
            .min(LONGEST);
        if self.count < u32::MAX
            && let Some(bucket) = self.buckets.get_mut(place(micros))
        {
            *bucket += 1;
            self.count += 1;
        }
    }

    /// The smallest duration that this many percent are no longer than, at least 1 µs; 1 µs if there is none.
    pub(super) fn percentile(&self, percent: u32) -> Duration {
        let rank = (u64::from(self.count) * u64::from(percent.min(100)))
            .div_ceil(100)
            .max(1);
        let mut seen = 0;
        for (place, count) in self.buckets.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= rank {
                return Duration::from_micros(middle(place).max(1));
            }
        }
        Duration::from_micros(1)
    }
}

/// Which bucket counts so many microseconds.
fn place(micros: u64) -> usize {
    let place = if micros < STEPS {
        micros
    } else {
        let octave = micros.ilog2() - BITS;
        u64::from(octave) * STEPS + (micros >> octave)
    };
    usize::try_from(place).unwrap_or(usize::MAX)
}

/// The middle of a bucket, in microseconds.
fn middle(place: usize) -> u64 {
    let place = u64::try_from(place).unwrap_or(LONGEST);
    if place < 2 * STEPS {
        return place;
    }
    let octave = place / STEPS - 1;
    let lowest = (place % STEPS + STEPS) << octave;
    lowest + (1 << octave) / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_longest_has_the_last_place() {
        assert_eq!(place(LONGEST), BUCKETS - 1);
        assert_eq!(place(0), 0);
    }

    proptest! {
        #[test]
        fn a_percentile_is_that_of_the_sorted_samples_within_three_percent(
            micros in prop::collection::vec(prop_oneof![0u64..100, 0u64..1_000_000, 0u64..LONGEST], 1..200),
            percent in 1u32..=99,
        ) {
            let mut histogram = Histogram::new();
            for micros in &micros {
                histogram.add(Duration::from_micros(*micros));
            }
            let mut sorted = micros;
            sorted.sort_unstable();
            let rank = (sorted.len() * percent as usize).div_ceil(100);
            let exact = sorted[rank - 1].max(1);
            let found = u64::try_from(histogram.percentile(percent).as_micros()).unwrap();
            prop_assert!(found.abs_diff(exact) * 32 <= exact, "{found} instead of {exact}");
            histogram.clear();
            prop_assert_eq!(histogram.percentile(percent), Duration::from_micros(1));
        }
    }
}

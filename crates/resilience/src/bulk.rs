//! Bulk: what is so large that it is better off by TCP.

/// How large answers are lately: a mean over about the last 32, and what follows from it, with hysteresis.
///
/// A mean, since what an answer costs grows with its bytes, by TCP more slowly: the bytes decide, however they are spread over
/// answers. By answers and not by time, since a rule that is not called has learnt nothing new.
///
/// It fits in 64 bits, for threads to share in one atomic, as [`PeakEwma`](crate::PeakEwma) does: of two that observe at
/// once one may be lost.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct AnswerSize {
    /// The mean times [`MEMORY`].
    sum: u32,
    large: bool,
}

/// Answers that the mean is of, roughly: each takes the place of the 32nd part of what was known before.
const MEMORY: u32 = 32;
/// As how many bytes an answer counts at most. So one that is out of proportion adds 32 KiB, which by itself makes no answers
/// large that weren't nearly so, and is forgotten in time.
const MOST: u32 = 1 << 20;
/// From this mean on answers are large. Measured (docs/zone-protocol.md, Figures): at 64 KiB both proxies take 200 us by QUIC
/// and 110 us by HTTP/1.1 over TLS.
const LARGE: u32 = 64 << 10;
/// Below this they are small again: at 16 KiB it is 80 us and 60 us, so being late on the way back costs little.
const SMALL: u32 = 16 << 10;

impl AnswerSize {
    /// To be stored; see [`Self::from_bits`].
    pub fn to_bits(self) -> u64 {
        u64::from(self.sum) << 1 | u64::from(self.large)
    }

    /// The inverse of [`Self::to_bits`]. Any value is accepted; 0 is where no answer was seen.
    pub fn from_bits(bits: u64) -> Self {
        let most = MEMORY * MOST;
        Self {
            sum: u32::try_from(bits >> 1).map_or(most, |sum| sum.min(most)),
            large: bits & 1 == 1,
        }
    }

    /// Takes in that an answer had so many bytes.
    #[must_use]
    pub fn observe(self, bytes: u64) -> Self {
        let bytes = u32::try_from(bytes).map_or(MOST, |bytes| bytes.min(MOST));
        let sum = (self.sum - self.sum / MEMORY) + bytes;
        let mean = sum / MEMORY;
        Self {
            sum,
            large: mean >= LARGE || self.large && mean >= SMALL,
        }
    }

    /// Bytes of an answer, by what was seen.
    pub fn mean(self) -> u32 {
        self.sum / MEMORY
    }

    /// Whether they are so large that the next is better off by TCP.
    pub fn is_large(self) -> bool {
        self.large
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn after(sizes: &[u64]) -> AnswerSize {
        let seen = sizes.iter();
        seen.fold(AnswerSize::default(), |size, bytes| size.observe(*bytes))
    }

    #[test]
    fn a_few_large_answers_are_enough_and_small_ones_bring_it_back() {
        assert!(!after(&[]).is_large());
        assert!(!after(&[1 << 30]).is_large(), "one is no habit");
        let large = after(&[1 << 20; 3]);
        assert!(large.is_large(), "{large:?}");
        let full = after(&[1 << 20; 1000]);
        assert_eq!(full.mean(), MOST);
        let mut back = full;
        let mut answers = 0;
        while back.is_large() {
            back = back.observe(1 << 10);
            answers += 1;
        }
        assert!((43..=150).contains(&answers), "{answers}");
    }

    proptest! {
        #[test]
        fn the_mean_lies_between_what_was_known_and_what_came(
            sizes in prop::collection::vec(0u64..4 << 20, 0..100), bytes in 0u64..u64::MAX,
        ) {
            let before = after(&sizes);
            let counted = u32::try_from(bytes).map_or(MOST, |bytes| bytes.min(MOST));
            let mean = before.observe(bytes).mean();
            let (low, high) = (before.mean().min(counted), before.mean().max(counted));
            prop_assert!((low..=high + 1).contains(&mean), "{before:?} {bytes} {mean}");
        }

        #[test]
        fn no_single_answer_makes_small_ones_large(
            sizes in prop::collection::vec(0..u64::from(LARGE) / 2, 0..100), bytes: u64,
        ) {
            prop_assert!(!after(&sizes).observe(bytes).is_large());
        }

        #[test]
        fn it_does_not_flap(sizes in prop::collection::vec(0u64..2 << 20, 0..2000)) {
            let mut size = AnswerSize::default();
            let mut changes = 0;
            for bytes in &sizes {
                let next = size.observe(*bytes);
                changes += usize::from(next.is_large() != size.is_large());
                size = next;
            }
            // From 64 KiB to 16 takes 43 answers of nothing, and two of the largest lead back.
            prop_assert!(changes <= 2 * (sizes.len() / 45 + 1), "{changes} in {}", sizes.len());
        }

        #[test]
        fn answers_of_one_size_settle_it(before in prop::collection::vec(0u64..8 << 20, 0..100), bytes in 0u64..2 << 20) {
            let mut size = after(&before);
            // The last byte of what was before takes the longest: the mean comes nearer by a 32nd part of the rest, rounded down.
            for _ in 0..1000 {
                size = size.observe(bytes);
            }
            if bytes < u64::from(SMALL) - 4096 {
                prop_assert!(!size.is_large());
            }
            if bytes > u64::from(LARGE) + 4096 {
                prop_assert!(size.is_large());
            }
            let settled = size.is_large();
            for _ in 0..100 {
                size = size.observe(bytes);
                prop_assert_eq!(size.is_large(), settled);
            }
        }

        #[test]
        fn bits_are_the_whole_state(sizes in prop::collection::vec(0u64..4 << 20, 0..100)) {
            let size = after(&sizes);
            prop_assert_eq!(AnswerSize::from_bits(size.to_bits()), size);
        }

        #[test]
        fn any_bits_can_be_gone_on_from(bits: u64, bytes: u64) {
            let size = AnswerSize::from_bits(bits).observe(bytes);
            prop_assert!(size.mean() <= MOST);
        }
    }
}

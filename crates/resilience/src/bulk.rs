//! Bulk: what is so large that it is better off by TCP, and when the path says otherwise.

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

/// What share of a link's packets is lost lately, from counts that only grow; and whether that is much, with hysteresis.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Losses {
    /// The link's counts as last seen.
    seen: (u64, u64),
    /// Packets lately, older ones counting less.
    sent: u64,
    lost: u64,
    high: bool,
}

/// What is counted is halved when it has come to so many packets.
const REMEMBER: u64 = 1024;
/// Fewer say nothing: one lost would be a large share of them.
const FEWEST: u64 = 128;
/// One packet in so many: from there on much is lost. TCP's throughput is bounded by the round trip and the loss (Mathis et
/// al., CCR 27(3), 1997): at 1 % and 20 ms to 7 Mbit/s for a connection.
const HIGH: u64 = 100;
/// Little is lost again below one in so many.
const LOW: u64 = 400;

impl Losses {
    /// Takes in what the link has counted since it was made: packets sent, and those of them that were lost.
    #[must_use]
    pub fn observe(self, sent: u64, lost: u64) -> Self {
        let mut now = Self {
            seen: (sent, lost),
            sent: self.sent.saturating_add(sent.saturating_sub(self.seen.0)),
            lost: self.lost.saturating_add(lost.saturating_sub(self.seen.1)),
            high: self.high,
        };
        while now.sent > REMEMBER {
            now.sent /= 2;
            now.lost /= 2;
        }
        if now.sent >= FEWEST {
            let one_in = |packets: u64| now.lost.saturating_mul(packets) >= now.sent;
            now.high = one_in(HIGH) || self.high && one_in(LOW);
        }
        now
    }

    /// Another link has taken the place of the one that was counted; the path is the same.
    #[must_use]
    pub fn anew(self) -> Self {
        Self { seen: (0, 0), ..self }
    }

    /// Whether much is lost.
    pub fn is_high(self) -> bool {
        self.high
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

    #[test]
    fn what_is_lost_on_the_path_is_seen_and_forgotten() {
        let mut path = Losses::default();
        let (mut sent, mut lost) = (0, 0);
        let mut pass = |path: Losses, packets: u64, of_them: u64| {
            sent += packets;
            lost += of_them;
            path.observe(sent, lost)
        };
        path = pass(path, 100, 10);
        assert!(!path.is_high(), "too few to tell: {path:?}");
        path = pass(path, 900, 20);
        assert!(path.is_high(), "{path:?}");
        // Half a percent is neither much nor little.
        for _ in 0..20 {
            path = pass(path, 200, 1);
        }
        assert!(path.is_high(), "{path:?}");
        for _ in 0..20 {
            path = pass(path, 200, 0);
        }
        assert!(!path.is_high(), "{path:?}");
    }

    #[test]
    fn another_link_counts_from_its_own_beginning() {
        let path = Losses::default().observe(1_000, 0).anew().observe(500, 50);
        assert!(path.is_high(), "{path:?}");
        let path = Losses::default().observe(1_000, 100).anew().observe(0, 0);
        assert!(path.is_high(), "it is the same path: {path:?}");
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
            for _ in 0..200 {
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

        #[test]
        fn where_nothing_is_lost_nothing_is_seen(steps in prop::collection::vec(0u64..10_000, 0..50)) {
            let mut sent = 0;
            let mut path = Losses::default();
            for packets in steps {
                sent += packets;
                path = path.observe(sent, 0);
                prop_assert!(!path.is_high());
            }
        }

        #[test]
        fn steady_loss_is_judged_by_its_share(one_in in 20u64..2_000, step in 400u64..5_000) {
            let mut path = Losses::default();
            for round in 1..100 {
                let sent = round * step;
                path = path.observe(sent, sent / one_in);
            }
            // Rounding takes a packet or two of what is halved.
            if one_in <= HIGH / 2 {
                prop_assert!(path.is_high(), "{path:?}");
            }
            if one_in >= LOW * 2 {
                prop_assert!(!path.is_high(), "{path:?}");
            }
        }

        #[test]
        fn any_counts_are_borne(counts in prop::collection::vec((any::<u64>(), any::<u64>()), 0..20)) {
            let mut path = Losses::default();
            for (sent, lost) in counts {
                path = path.observe(sent, lost);
                prop_assert!(path.sent <= REMEMBER);
            }
        }
    }
}

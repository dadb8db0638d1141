//! What share of packets a path loses.

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
/// One packet in so many: that is no path that loses some packets, but one that doesn't take them. Where packets are sent twice
/// (see `twice`), those of which both were lost count among those that were sent once: so one in twelve is what a path seems to
/// lose that loses nearly one in twenty.
const MOST: u64 = 12;

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

    /// Whether so much is lost that to send more can't be what helps.
    pub fn is_extreme(self) -> bool {
        self.lost.saturating_mul(MOST) >= self.sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
    fn a_path_that_takes_little_is_told_from_one_that_loses_some() {
        assert!(!Losses::default().observe(1_000, 50).is_extreme());
        let path = Losses::default().observe(1_000, 100);
        assert!(path.is_high() && path.is_extreme(), "{path:?}");
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

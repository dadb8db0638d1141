//! When a child that has ended is started again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// First bound of the pause; it doubles with each end in a row.
const FIRST: Duration = Duration::from_millis(100);
/// Last bound of the pause.
const LONGEST: Duration = Duration::from_secs(30);
/// A child that has run for so long did well: its end is the first in a row.
const WELL: Duration = Duration::from_secs(60);
/// Ends in a row that are called a crash loop.
pub(crate) const LOOP: u32 = 3;

/// How often a child may be started again, in which time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    /// Starts that are allowed, at least 1.
    pub(crate) restarts: u32,
    /// The time up to now in which they are counted.
    pub(crate) within: Duration,
}

/// What is done about an end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Next {
    /// The child is started again.
    Again {
        /// When.
        after: Duration,
        /// Ends in a row, this one included, none of them after a child that did well.
        in_a_row: u32,
    },
    /// The limit is reached, and somebody else must decide: whoever started the supervisor. As in Erlang's
    /// supervisors ("maximum restart intensity"), from which this rule is.
    GiveUp,
}

/// The ends of one child.
#[derive(Debug)]
pub(crate) struct Restarts {
    limit: Option<Limit>,
    in_a_row: u32,
    /// Starts within the limit's time, oldest first; as many as the limit has at most.
    lately: VecDeque<Instant>,
}

impl Restarts {
    /// Without an end so far. No limit means that a child is started again for ever.
    pub(crate) fn new(limit: Option<Limit>) -> Self {
        Self {
            limit,
            in_a_row: 0,
            lately: VecDeque::new(),
        }
    }

    /// The child has ended at `now`, after having run for `ran`. `draw` is a random number from 0 to 1.
    ///
    /// The pause has full jitter over an exponential bound ("Exponential Backoff And Jitter", AWS Architecture
    /// Blog, 2015), so that children that failed together don't come back together.
    pub(crate) fn ended(&mut self, ran: Duration, now: Instant, draw: f64) -> Next {
        if ran >= WELL {
            self.in_a_row = 0;
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        if let Some(limit) = self.limit {
            let old = |at: &Instant| now.saturating_duration_since(*at) > limit.within;
            while self.lately.front().is_some_and(old) {
                self.lately.pop_front();
            }
            if self.lately.len() >= usize::try_from(limit.restarts).unwrap_or(usize::MAX) {
                return Next::GiveUp;
            }
            self.lately.push_back(now);
        }
        // 2^16 times the first is far above the longest.
        let doublings = (self.in_a_row - 1).min(16);
        let bound = FIRST.saturating_mul(1 << doublings).min(LONGEST);
        Next::Again {
            after: bound.mul_f64(draw.clamp(0.0, 1.0)),
            in_a_row: self.in_a_row,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn origin() -> Instant {
        #[expect(
            clippy::disallowed_methods,
            reason = "an arbitrary origin; only differences matter"
        )]
        Instant::now()
    }

    fn after(next: Next) -> Duration {
        match next {
            Next::Again { after, .. } => after,
            Next::GiveUp => panic!("gave up"),
        }
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_begin_anew_after_a_good_run() {
        let mut restarts = Restarts::new(None);
        let mut pauses = Vec::new();
        for _ in 0..11 {
            pauses.push(after(restarts.ended(Duration::from_secs(1), origin(), 1.0)).as_millis());
        }
        assert_eq!(
            pauses,
            [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]
        );
        assert_eq!(after(restarts.ended(WELL, origin(), 1.0)), FIRST);
        assert_eq!(
            after(restarts.ended(Duration::ZERO, origin(), 0.0)),
            Duration::ZERO
        );
    }

    #[test]
    fn a_limit_counts_what_was_lately_and_nothing_else() {
        let limit = Limit {
            restarts: 2,
            within: Duration::from_secs(10),
        };
        let mut restarts = Restarts::new(Some(limit));
        let begin = origin();
        let mut at = |seconds| restarts.ended(Duration::ZERO, begin + Duration::from_secs(seconds), 1.0);
        assert_ne!(at(0), Next::GiveUp);
        assert_ne!(at(1), Next::GiveUp);
        // The first is older than ten seconds now.
        assert_ne!(at(11), Next::GiveUp);
        assert_eq!(at(11), Next::GiveUp);
    }

    proptest! {
        #[test]
        fn without_a_limit_a_child_always_comes_back_and_soon_enough(
            ends in proptest::collection::vec((0u64..200, 0.0..=1.0f64), 1..100)
        ) {
            let mut restarts = Restarts::new(None);
            let (mut now, mut row) = (origin(), 0);
            for (ran, draw) in ends {
                let ran = Duration::from_secs(ran);
                now += ran;
                row = if ran >= WELL { 1 } else { row + 1 };
                match restarts.ended(ran, now, draw) {
                    Next::Again { after, in_a_row } => {
                        prop_assert!(after <= LONGEST);
                        prop_assert!(row > 1 || after <= FIRST);
                        prop_assert_eq!(in_a_row, row);
                    }
                    Next::GiveUp => prop_assert!(false, "gave up without a limit"),
                }
            }
        }

        #[test]
        fn no_more_starts_than_the_limit_in_any_such_time(
            limit in 1u32..10,
            steps in proptest::collection::vec(0u64..20, 1..100)
        ) {
            let within = Duration::from_secs(30);
            let mut restarts = Restarts::new(Some(Limit { restarts: limit, within }));
            let (mut now, mut starts) = (origin(), Vec::new());
            for step in steps {
                now += Duration::from_secs(step);
                let lately = starts.iter().filter(|at| now.saturating_duration_since(**at) <= within).count();
                match restarts.ended(Duration::from_secs(step), now, 0.5) {
                    Next::Again { .. } => {
                        prop_assert!(lately < limit as usize);
                        starts.push(now);
                    }
                    Next::GiveUp => prop_assert!(lately >= limit as usize),
                }
            }
        }
    }
}

//! Whether a child that runs is alive.

use std::time::Duration;

/// How much is borne from a child.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Patience {
    /// From its start on, what it fails to answer doesn't count.
    pub(crate) grace: Duration,
    /// How often it is asked.
    pub(crate) every: Duration,
    /// How long an answer may take.
    pub(crate) timeout: Duration,
    /// Failures in a row that mean that it hangs, at least 1.
    pub(crate) failures: u32,
}

impl Patience {
    /// Three failures, five seconds apart, half a minute after the start.
    pub(crate) const DEFAULT: Self = Self {
        grace: Duration::from_secs(30),
        every: Duration::from_secs(5),
        timeout: Duration::from_secs(3),
        failures: 3,
    };
}

/// What follows from an answer, or from none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    /// It is alive, or may still be starting.
    Alive,
    /// It has failed so often in a row, which is not often enough.
    Failing(u32),
    /// It hangs.
    Hung,
}

/// The answers of one child.
#[derive(Debug)]
pub(crate) struct Liveness {
    patience: Patience,
    failures: u32,
}

impl Liveness {
    /// Of a child that was never asked.
    pub(crate) fn new(patience: Patience) -> Self {
        Self {
            patience,
            failures: 0,
        }
    }

    /// The child was asked `age` after its start, and was well or not.
    pub(crate) fn heard(&mut self, age: Duration, well: bool) -> Verdict {
        if well || age < self.patience.grace {
            self.failures = 0;
            return Verdict::Alive;
        }
        self.failures = self.failures.saturating_add(1);
        if self.failures >= self.patience.failures {
            Verdict::Hung
        } else {
            Verdict::Failing(self.failures)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn failures_count_in_a_row_and_after_the_grace_only() {
        let mut liveness = Liveness::new(Patience::DEFAULT);
        let mut heard = |second, well| liveness.heard(Duration::from_secs(second), well);
        for second in 0..30 {
            assert_eq!(heard(second, false), Verdict::Alive);
        }
        assert_eq!(heard(30, false), Verdict::Failing(1));
        assert_eq!(heard(35, false), Verdict::Failing(2));
        assert_eq!(heard(40, true), Verdict::Alive);
        assert_eq!(heard(45, false), Verdict::Failing(1));
        assert_eq!(heard(50, false), Verdict::Failing(2));
        assert_eq!(heard(55, false), Verdict::Hung);
    }

    proptest! {
        #[test]
        fn a_child_hangs_exactly_when_its_last_answers_all_failed(
            failures in 1u32..6,
            answers in proptest::collection::vec(any::<bool>(), 1..60)
        ) {
            let patience = Patience { grace: Duration::ZERO, failures, ..Patience::DEFAULT };
            let mut liveness = Liveness::new(patience);
            for (i, well) in answers.iter().enumerate() {
                let verdict = liveness.heard(Duration::from_secs(i as u64), *well);
                let row = answers[..=i].iter().rev().take_while(|well| !**well).count();
                prop_assert_eq!(verdict == Verdict::Hung, row >= failures as usize);
                prop_assert_eq!(verdict == Verdict::Alive, row == 0);
            }
        }
    }
}

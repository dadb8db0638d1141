//! From single checks to a verdict: enough of the same in a row.

/// When a streak becomes a verdict; from the policy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thresholds {
    /// Failures in a row that make an endpoint unhealthy. 0 counts as 1.
    pub(super) unhealthy: u32,
    /// Passes in a row that make it healthy again. 0 counts as 1.
    pub(super) healthy: u32,
}

/// How one check ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Outcome {
    /// The endpoint is well.
    Pass,
    /// It is not.
    Fail,
}

/// What checks say of an endpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Standing {
    /// It may serve.
    Healthy,
    /// It is left out.
    Unhealthy,
}

/// The checks of one endpoint so far, as far as they matter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Streak(State);

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Nothing is decided yet, and the endpoint stands as it did before; so many failures in a row.
    Undecided { before: Standing, failures: u32 },
    /// Healthy; so many failures in a row.
    Healthy { failures: u32 },
    /// Unhealthy; so many passes in a row.
    Unhealthy { passes: u32 },
}

impl Streak {
    /// No checks yet. Until they say something the endpoint stands as it did `before`: healthy where nothing
    /// is known, since else every start of a proxy would be an outage.
    pub(super) const fn new(before: Standing) -> Self {
        Self(State::Undecided { before, failures: 0 })
    }

    /// How the endpoint stands.
    pub(super) const fn standing(self) -> Standing {
        match self.0 {
            State::Undecided { before, .. } => before,
            State::Healthy { .. } => Standing::Healthy,
            State::Unhealthy { .. } => Standing::Unhealthy,
        }
    }

    /// Takes in how a check ended. The second value is a verdict that has just been reached: the first one,
    /// or one that differs from the last.
    ///
    /// The very first pass is enough to be healthy, as in Envoy: an endpoint that is well need not wait.
    #[must_use]
    pub(super) fn on(self, outcome: Outcome, thresholds: Thresholds) -> (Self, Option<Standing>) {
        let healthy = State::Healthy { failures: 0 };
        let state = match (self.0, outcome) {
            (State::Undecided { .. }, Outcome::Pass) => {
                return (Self(healthy), Some(Standing::Healthy));
            }
            (State::Healthy { .. }, Outcome::Pass) => healthy,
            (State::Unhealthy { .. }, Outcome::Fail) => State::Unhealthy { passes: 0 },
            (State::Undecided { failures, .. } | State::Healthy { failures }, Outcome::Fail)
                if failures + 1 >= thresholds.unhealthy =>
            {
                let unhealthy = State::Unhealthy { passes: 0 };
                return (Self(unhealthy), Some(Standing::Unhealthy));
            }
            (State::Undecided { before, failures }, Outcome::Fail) => State::Undecided {
                before,
                failures: failures + 1,
            },
            (State::Healthy { failures }, Outcome::Fail) => State::Healthy {
                failures: failures + 1,
            },
            (State::Unhealthy { passes }, Outcome::Pass) if passes + 1 >= thresholds.healthy => {
                return (Self(healthy), Some(Standing::Healthy));
            }
            (State::Unhealthy { passes }, Outcome::Pass) => State::Unhealthy { passes: passes + 1 },
        };
        (Self(state), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const THRESHOLDS: Thresholds = Thresholds {
        unhealthy: 3,
        healthy: 2,
    };

    /// The verdicts of checks whose outcomes are written as `+` and `-`, each verdict after its check.
    fn verdicts(before: Standing, checks: &str) -> String {
        let mut streak = Streak::new(before);
        let mut told = String::new();
        for check in checks.chars() {
            let outcome = if check == '+' {
                Outcome::Pass
            } else {
                Outcome::Fail
            };
            let (next, verdict) = streak.on(outcome, THRESHOLDS);
            streak = next;
            told.push(check);
            told.push_str(match verdict {
                Some(Standing::Healthy) => "H",
                Some(Standing::Unhealthy) => "U",
                None => "",
            });
        }
        told
    }

    #[test]
    fn the_first_pass_after_the_start_is_enough() {
        assert_eq!(verdicts(Standing::Healthy, "++"), "+H+");
        assert_eq!(verdicts(Standing::Healthy, "--+"), "--+H");
        assert_eq!(verdicts(Standing::Unhealthy, "+"), "+H");
    }

    #[test]
    fn verdicts_take_as_many_in_a_row_as_the_policy_says() {
        assert_eq!(
            verdicts(Standing::Healthy, "---+-++"),
            "---U+-++H",
            "from the start"
        );
        assert_eq!(verdicts(Standing::Healthy, "+--+---"), "+H--+---U", "later");
        assert_eq!(verdicts(Standing::Unhealthy, "---"), "---U");
    }

    #[test]
    fn before_any_verdict_an_endpoint_stands_as_before() {
        for before in [Standing::Healthy, Standing::Unhealthy] {
            let (streak, verdict) = Streak::new(before).on(Outcome::Fail, THRESHOLDS);
            assert_eq!((streak.standing(), verdict), (before, None));
        }
    }

    proptest! {
        #[test]
        fn a_verdict_is_always_backed_by_the_checks_before_it(
            checks in prop::collection::vec(any::<bool>(), 1..200),
            unhealthy in 0u32..8,
            healthy in 0u32..8,
        ) {
            let thresholds = Thresholds { unhealthy, healthy };
            let mut streak = Streak::new(Standing::Healthy);
            let mut last = None;
            for (at, &passed) in checks.iter().enumerate() {
                let outcome = if passed { Outcome::Pass } else { Outcome::Fail };
                let before = streak.standing();
                let (next, verdict) = streak.on(outcome, thresholds);
                streak = next;
                let row = checks[..=at].iter().rev().take_while(|&&c| c == passed).count();
                let need = match (passed, last) {
                    (true, None) => 1,
                    (true, Some(_)) => usize::try_from(healthy.max(1)).unwrap(),
                    (false, _) => usize::try_from(unhealthy.max(1)).unwrap(),
                };
                let stands = if passed { Standing::Healthy } else { Standing::Unhealthy };
                // A verdict comes with the check that completes the row, and only if it is news.
                let due = row >= need && last != Some(stands);
                prop_assert_eq!(verdict, due.then_some(stands));
                prop_assert_eq!(streak.standing(), verdict.unwrap_or(before));
                last = verdict.or(last);
            }
        }
    }
}

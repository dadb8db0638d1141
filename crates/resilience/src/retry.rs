//! Whether to try again: the decision is data with a reason, the loop only obeys.

use std::time::Instant;

/// May the request be sent again without risk of doing its work twice?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Replay {
    /// No byte reached an upstream, or the method is idempotent and there is no body.
    Safe,
    /// The upstream may have acted on it, or the body is gone.
    Unsafe,
}

/// What to do after a failed attempt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// Give up, and say why.
    GiveUp(Why),
    /// Try another endpoint now.
    Retry,
}

/// Why no further attempt is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Why {
    /// The policy's attempt count is used up.
    AttemptsSpent,
    /// The request's deadline has passed.
    DeadlinePassed,
    /// A second send might do the work twice.
    NotReplayable,
}

impl Why {
    /// The word used in traces and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AttemptsSpent => "attempts_spent",
            Self::DeadlinePassed => "deadline_passed",
            Self::NotReplayable => "not_replayable",
        }
    }
}

/// All that the decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Attempts made so far, at least 1.
    pub made: u8,
    /// Attempts allowed, at least 1.
    pub allowed: u8,
    /// Whether a further send is harmless.
    pub replay: Replay,
    /// When the client stops waiting; `None` is never.
    pub deadline: Option<Instant>,
}

/// Decides, most certain refusal first, so that the reason reported is the real one.
pub fn after_failure(facts: &Facts, now: Instant) -> Next {
    if facts.replay == Replay::Unsafe {
        return Next::GiveUp(Why::NotReplayable);
    }
    if facts.made >= facts.allowed {
        return Next::GiveUp(Why::AttemptsSpent);
    }
    if facts.deadline.is_some_and(|deadline| now >= deadline) {
        return Next::GiveUp(Why::DeadlinePassed);
    }
    Next::Retry
}

/// Whether sending a request with this method twice has the effect of sending it once (RFC 9110 §9.2.2).
pub fn is_idempotent(method: &str) -> bool {
    matches!(method, "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_reason_is_the_real_one() {
        #[expect(
            clippy::disallowed_methods,
            reason = "an arbitrary origin; only differences matter"
        )]
        let now = Instant::now();
        let facts = Facts {
            made: 1,
            allowed: 3,
            replay: Replay::Safe,
            deadline: None,
        };
        assert_eq!(after_failure(&facts, now), Next::Retry);
        let spent = Facts { made: 3, ..facts };
        assert_eq!(after_failure(&spent, now), Next::GiveUp(Why::AttemptsSpent));
        assert_eq!(
            after_failure(
                &Facts {
                    replay: Replay::Unsafe,
                    ..spent
                },
                now
            ),
            Next::GiveUp(Why::NotReplayable)
        );
        let late = Facts {
            deadline: Some(now),
            ..facts
        };
        assert_eq!(
            after_failure(&late, now + Duration::from_millis(1)),
            Next::GiveUp(Why::DeadlinePassed)
        );
    }
}

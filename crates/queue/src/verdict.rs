//! What an attempt's outcome means for its entry.

use crate::clock::millis;
use crate::entry::{Delivered, may_succeed_later};
use crate::gate::backoff;
use leeward_policy::model::Queue;
use leeward_resilience::Draw;
use std::sync::Arc;
use std::time::Duration;

/// What becomes of an entry that was under way.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Settlement {
    /// The service has it.
    Delivered { status: u16, attempts: u32 },
    /// It is not sent again.
    Dead { reason: Arc<str>, attempts: u32 },
    /// It waits.
    Again {
        attempts: u32,
        due_ms: u64,
        why: Arc<str>,
    },
}

/// The reason of dead letters that waited too long.
pub(crate) const EXPIRED: &str = "expired";

/// What is to be written down, or `Err` with the pause that was asked for if nothing was sent.
pub(crate) fn judge(
    delivered: Delivered,
    before: Before,
    queue: &Queue,
    now_ms: u64,
    draw: &mut impl Draw,
) -> Result<Settlement, Option<Duration>> {
    let (why, status, retry_after) = match delivered {
        Delivered::NotSent { retry_after, .. } => return Err(retry_after),
        Delivered::Answered { status } if may_succeed_later(status) => (answered(status), Some(status), None),
        Delivered::Answered { status } => {
            let attempts = before.attempts.saturating_add(1);
            return Ok(if matches!(status, 200..=399) {
                Settlement::Delivered { status, attempts }
            } else {
                let reason = answered(status);
                Settlement::Dead { reason, attempts }
            });
        }
        Delivered::Failed {
            why,
            status,
            retry_after,
        } => (why, status, retry_after),
    };
    let attempts = before.attempts.saturating_add(u32::from(status.is_some()));
    if status.is_some() && queue.max_attempts > 0 && attempts >= queue.max_attempts {
        let reason = format!("{why}, the last of {attempts} attempts").into();
        return Ok(Settlement::Dead { reason, attempts });
    }
    let pause = backoff(queue, before.failures, retry_after, draw);
    Ok(Settlement::Again {
        attempts,
        due_ms: now_ms.saturating_add(millis(pause)),
        why,
    })
}

/// What an entry has been through.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Before {
    /// Attempts that were answered.
    pub(crate) attempts: u32,
    /// Attempts that failed, answered or not.
    pub(crate) failures: u32,
}

fn answered(status: u16) -> Arc<str> {
    format!("status {status}").into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_resilience::Seeded;

    const NEW: Before = Before {
        attempts: 0,
        failures: 0,
    };

    fn after(delivered: Delivered, attempts: u32) -> Result<Settlement, Option<Duration>> {
        let before = Before {
            attempts,
            failures: attempts,
        };
        judge(delivered, before, &Queue::DEFAULT, 1000, &mut Seeded(1))
    }

    #[test]
    fn an_answer_ends_an_entry_unless_it_says_to_come_again() {
        for status in [200, 201, 204, 303, 399] {
            let got = after(Delivered::Answered { status }, 2);
            assert_eq!(got, Ok(Settlement::Delivered { status, attempts: 3 }));
        }
        for status in [400, 404, 409, 422, 499, 100, 600] {
            let got = after(Delivered::Answered { status }, 0);
            let reason = format!("status {status}").into();
            assert_eq!(got, Ok(Settlement::Dead { reason, attempts: 1 }));
        }
        for status in [408, 425, 429, 500, 503, 599] {
            let got = after(Delivered::Answered { status }, 0);
            assert!(
                matches!(got, Ok(Settlement::Again { attempts: 1, .. })),
                "{got:?}"
            );
        }
    }

    #[test]
    fn only_what_was_answered_counts() {
        let failed = |status| Delivered::Failed {
            why: "it did not work".into(),
            status,
            retry_after: None,
        };
        let last = after(failed(Some(503)), 19);
        let reason = "it did not work, the last of 20 attempts".into();
        assert_eq!(last, Ok(Settlement::Dead { reason, attempts: 20 }));
        let unanswered = after(failed(None), 19);
        assert!(
            matches!(unanswered, Ok(Settlement::Again { attempts: 19, .. })),
            "{unanswered:?}"
        );
    }

    #[test]
    fn without_a_bound_on_attempts_it_is_sent_for_ever() {
        let queue = Queue {
            max_attempts: 0,
            ..Queue::DEFAULT
        };
        let before = Before {
            attempts: u32::MAX,
            failures: u32::MAX,
        };
        let got = judge(
            Delivered::Answered { status: 500 },
            before,
            &queue,
            0,
            &mut Seeded(1),
        );
        assert!(matches!(got, Ok(Settlement::Again { .. })), "{got:?}");
    }

    #[test]
    fn what_was_not_sent_changes_nothing() {
        let asked = Some(Duration::from_secs(3));
        let not_sent = Delivered::NotSent {
            why: "circuit open".into(),
            retry_after: asked,
        };
        assert_eq!(
            judge(not_sent, NEW, &Queue::DEFAULT, 0, &mut Seeded(1)),
            Err(asked)
        );
    }

    #[test]
    fn the_service_is_given_the_time_it_asks_for() {
        let failed = Delivered::Failed {
            why: "status 503".into(),
            status: Some(503),
            retry_after: Some(Duration::from_secs(60)),
        };
        let Ok(Settlement::Again { due_ms, .. }) = after(failed, 0) else {
            panic!("it waits");
        };
        assert!(due_ms >= 61_000);
    }
}

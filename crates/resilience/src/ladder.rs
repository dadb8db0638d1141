//! A ladder of fallbacks: which rung is next, and how long it may take.

use std::time::{Duration, Instant};

/// A walk over the rungs of a ladder, each once at most and in order, within a request's time.
#[derive(Clone, Copy, Debug)]
pub struct Ladder {
    next: usize,
    rungs: usize,
    deadline: Option<Instant>,
}

/// What is to be known of a rung before it is tried.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Terms {
    /// Its share of the time that is left, in percent, 1 to 100.
    pub percent: u32,
    /// Whether it takes time. One that doesn't is tried even when none is left.
    pub takes_time: bool,
}

/// A rung to be tried.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Step {
    /// Its position.
    pub rung: usize,
    /// When it must have answered; `None` is never.
    pub until: Option<Instant>,
}

impl Ladder {
    /// A ladder of so many rungs, for a request that must be answered by `deadline`.
    pub const fn new(rungs: usize, deadline: Option<Instant>) -> Self {
        Self {
            next: 0,
            rungs,
            deadline,
        }
    }

    /// The next rung that has terms for this request (`terms` gives `None` for one that isn't for it), and time.
    pub fn next(&mut self, now: Instant, mut terms: impl FnMut(usize) -> Option<Terms>) -> Option<Step> {
        while self.next < self.rungs {
            let rung = self.next;
            self.next += 1;
            let Some(terms) = terms(rung) else { continue };
            let until = self.deadline.map(|deadline| share(now, deadline, terms.percent));
            if terms.takes_time && until.is_some_and(|until| until <= now) {
                continue;
            }
            return Some(Step { rung, until });
        }
        None
    }
}

fn share(now: Instant, deadline: Instant, percent: u32) -> Instant {
    let left = deadline.saturating_duration_since(now);
    if percent >= 100 {
        return deadline;
    }
    now + left
        .checked_mul(percent)
        .map_or(Duration::ZERO, |part| part / 100)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[expect(clippy::disallowed_methods, reason = "an arbitrary beginning of time")]
    fn epoch() -> Instant {
        Instant::now()
    }

    const fn terms(percent: u32, takes_time: bool) -> Terms {
        Terms { percent, takes_time }
    }

    #[test]
    fn a_rung_has_its_share_of_what_is_left() {
        let start = epoch();
        let mut ladder = Ladder::new(2, Some(start + Duration::from_secs(1)));
        let first = ladder.next(start, |_| Some(terms(60, true))).unwrap();
        assert_eq!(first.until, Some(start + Duration::from_millis(600)));
        let later = start + Duration::from_millis(600);
        let second = ladder.next(later, |_| Some(terms(50, true))).unwrap();
        assert_eq!(
            second,
            Step {
                rung: 1,
                until: Some(start + Duration::from_millis(800))
            }
        );
        assert_eq!(ladder.next(later, |_| Some(terms(100, true))), None);
    }

    #[test]
    fn when_time_is_up_only_what_takes_none_is_tried() {
        let start = epoch();
        let mut ladder = Ladder::new(3, Some(start));
        let step = ladder.next(start, |rung| Some(terms(100, rung != 1))).unwrap();
        assert_eq!(step.rung, 1);
        assert_eq!(ladder.next(start, |rung| Some(terms(100, rung != 1))), None);
    }

    proptest! {
        /// Whatever the rungs do with the time that they have, they are tried once and in order, and the whole ends
        /// by the deadline.
        #[test]
        fn it_ends_in_time_and_tries_each_rung_once(
            rungs in prop::collection::vec((1u32..=100, any::<bool>(), any::<bool>(), 0u64..3_000), 1..16),
            left in 0u64..5_000,
        ) {
            let start = epoch();
            let deadline = start + Duration::from_millis(left);
            let mut ladder = Ladder::new(rungs.len(), Some(deadline));
            let mut now = start;
            let mut tried = Vec::new();
            let of = |rung: usize| {
                let (percent, takes_time, is_for, _) = rungs[rung];
                is_for.then_some(terms(percent, takes_time))
            };
            while let Some(step) = ladder.next(now, of) {
                tried.push(step.rung);
                let (_, takes_time, is_for, wants) = rungs[step.rung];
                prop_assert!(is_for);
                if takes_time {
                    prop_assert!(step.until.unwrap() > now);
                    now = step.until.unwrap().min(now + Duration::from_millis(wants));
                }
            }
            prop_assert!(now <= deadline.max(start));
            prop_assert!(tried.is_sorted_by(|a, b| a < b), "{:?}", tried);
            let instant = rungs.iter().enumerate().filter(|(_, r)| r.2 && !r.1).map(|(i, _)| i);
            for rung in instant {
                prop_assert!(tried.contains(&rung), "a rung that takes no time is never passed over");
            }
        }
    }
}

//! When a version of a plugin is left alone: it faulted too often of late.
//!
//! Closed, every call is let through. So many faults in so much time, and it is quarantined: no call is. When its time is
//! over, one request tries it again; what that comes to decides.

use leeward_policy::model::Quarantine;
use std::collections::VecDeque;
use std::time::Instant;

/// The breaker of one version. Its settings are passed at each call, since policy may change them.
#[derive(Debug)]
pub(crate) struct Breaker {
    state: State,
    /// Times that it was quarantined: tells tries of now from those of then.
    round: u64,
}

/// How a call is let through.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Admits {
    /// As any is.
    Freely,
    /// As a try.
    Try(u64),
}

#[derive(Debug)]
enum State {
    /// With the times of the last faults, at most as many as it takes.
    Closed(VecDeque<Instant>),
    Quarantined {
        until: Instant,
    },
    /// A call tries it. Should that never end, because whoever asked for it has gone, another may from then on.
    Trying {
        until: Instant,
    },
}

/// What an end of a call, or its beginning, has changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Change {
    Quarantined,
    Closed,
}

/// How things stand, for people.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Standing {
    Closed,
    Quarantined { until: Instant },
    Trying,
}

impl Breaker {
    pub(crate) const fn new() -> Self {
        Self {
            state: State::Closed(VecDeque::new()),
            round: 0,
        }
    }

    /// Whether a call may be made.
    pub(crate) fn admits(&mut self, settings: &Quarantine, now: Instant) -> Option<Admits> {
        match &self.state {
            State::Closed(_) => Some(Admits::Freely),
            State::Quarantined { until } | State::Trying { until } if now < *until => None,
            State::Quarantined { .. } | State::Trying { .. } => {
                self.state = State::Trying {
                    until: now + settings.duration,
                };
                Some(Admits::Try(self.round))
            }
        }
    }

    /// A call ended with a fault of the code.
    pub(crate) fn fault(&mut self, settings: &Quarantine, now: Instant) -> Option<Change> {
        let enough = match &mut self.state {
            State::Closed(faults) => {
                // Workers look at their clocks before they come here, so that the times may be a little out of order.
                faults.retain(|at| now.saturating_duration_since(*at) < settings.window);
                faults.push_back(now);
                faults.len() >= usize::try_from(settings.faults).unwrap_or(usize::MAX)
            }
            State::Trying { .. } => true,
            // A call that began before.
            State::Quarantined { .. } => false,
        };
        if enough {
            self.round += 1;
            self.state = State::Quarantined {
                until: now + settings.duration,
            };
        }
        enough.then_some(Change::Quarantined)
    }

    /// A try is over; `well` if it was asked, and ended each of its calls well. Any fault of it has been told.
    pub(crate) fn tried(&mut self, round: u64, well: bool, now: Instant) -> Option<Change> {
        if round != self.round || !matches!(self.state, State::Trying { .. }) {
            return None;
        }
        if !well {
            self.unsettled(now);
            return None;
        }
        self.state = State::Closed(VecDeque::new());
        Some(Change::Closed)
    }

    /// A call ended in a way that says nothing about the code.
    pub(crate) fn unsettled(&mut self, now: Instant) {
        if let State::Trying { .. } = self.state {
            self.state = State::Quarantined { until: now };
        }
    }

    pub(crate) const fn standing(&self) -> Standing {
        match self.state {
            State::Closed(_) => Standing::Closed,
            State::Quarantined { until } => Standing::Quarantined { until },
            State::Trying { .. } => Standing::Trying,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    const SETTINGS: Quarantine = Quarantine {
        faults: 3,
        window: Duration::from_secs(60),
        duration: Duration::from_secs(30),
    };

    fn start() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// Quarantined at second 2 after the start.
    fn quarantined(t0: Instant) -> Breaker {
        let mut breaker = Breaker::new();
        for n in 0..3 {
            breaker.fault(&SETTINGS, t0 + seconds(n));
        }
        breaker
    }

    #[test]
    fn faults_within_the_window_quarantine() {
        let (mut breaker, t0) = (Breaker::new(), start());
        assert_eq!(breaker.fault(&SETTINGS, t0), None);
        assert_eq!(breaker.fault(&SETTINGS, t0 + seconds(1)), None);
        // The first is too old to count.
        assert_eq!(breaker.fault(&SETTINGS, t0 + seconds(60)), None);
        assert!(breaker.admits(&SETTINGS, t0 + seconds(60)).is_some());
        let third = breaker.fault(&SETTINGS, t0 + seconds(60));
        assert_eq!(third, Some(Change::Quarantined));
        assert!(breaker.admits(&SETTINGS, t0 + seconds(89)).is_none());
        let until = t0 + seconds(90);
        assert_eq!(breaker.standing(), Standing::Quarantined { until });
    }

    #[test]
    fn one_call_tries_it_and_decides() {
        let t0 = start();
        let mut breaker = quarantined(t0);
        assert!(breaker.admits(&SETTINGS, t0 + seconds(32)).is_some());
        assert!(
            breaker.admits(&SETTINGS, t0 + seconds(32)).is_none(),
            "one, not two"
        );
        let again = breaker.fault(&SETTINGS, t0 + seconds(33));
        assert_eq!(again, Some(Change::Quarantined));
        assert!(breaker.admits(&SETTINGS, t0 + seconds(62)).is_none());
        assert!(breaker.admits(&SETTINGS, t0 + seconds(63)).is_some());
        assert_eq!(breaker.tried(2, true, t0 + seconds(33)), Some(Change::Closed));
        assert!(breaker.admits(&SETTINGS, t0 + seconds(63)).is_some());
        let first = breaker.fault(&SETTINGS, t0 + seconds(64));
        assert_eq!(first, None, "it begins anew");
    }

    #[test]
    fn a_call_that_began_before_decides_nothing() {
        let t0 = start();
        let mut breaker = quarantined(t0);
        assert_eq!(breaker.tried(1, true, t0 + seconds(20)), None);
        assert_eq!(breaker.fault(&SETTINGS, t0 + seconds(20)), None);
        assert!(breaker.admits(&SETTINGS, t0 + seconds(31)).is_none());
        assert!(
            breaker.admits(&SETTINGS, t0 + seconds(32)).is_some(),
            "nor does it prolong"
        );
    }

    #[test]
    fn a_try_that_says_nothing_is_made_again() {
        let t0 = start();
        let mut breaker = quarantined(t0);
        assert!(breaker.admits(&SETTINGS, t0 + seconds(32)).is_some());
        breaker.unsettled(t0 + seconds(33));
        assert!(breaker.admits(&SETTINGS, t0 + seconds(33)).is_some());
        assert_eq!(breaker.tried(1, true, t0 + seconds(33)), Some(Change::Closed));
        breaker.unsettled(t0 + seconds(34));
        assert_eq!(breaker.standing(), Standing::Closed);
    }

    #[test]
    fn of_a_request_that_tries_it_every_call_counts() {
        let t0 = start();
        let mut breaker = quarantined(t0);
        assert_eq!(breaker.admits(&SETTINGS, t0 + seconds(32)), Some(Admits::Try(1)));
        // Its first call went well, and a later one didn't.
        assert_eq!(
            breaker.fault(&SETTINGS, t0 + seconds(33)),
            Some(Change::Quarantined)
        );
        assert_eq!(breaker.tried(1, true, t0 + seconds(33)), None);
        assert_eq!(breaker.admits(&SETTINGS, t0 + seconds(63)), Some(Admits::Try(2)));
        assert_eq!(
            breaker.tried(1, true, t0 + seconds(64)),
            None,
            "a try of long ago"
        );
        assert!(breaker.admits(&SETTINGS, t0 + seconds(64)).is_none());
        // One that came to nothing leaves it to the next.
        assert_eq!(breaker.tried(2, false, t0 + seconds(65)), None);
        assert_eq!(breaker.admits(&SETTINGS, t0 + seconds(65)), Some(Admits::Try(2)));
    }

    #[test]
    fn a_try_that_never_ends_is_replaced() {
        let t0 = start();
        let mut breaker = quarantined(t0);
        assert!(breaker.admits(&SETTINGS, t0 + seconds(32)).is_some());
        assert!(breaker.admits(&SETTINGS, t0 + seconds(61)).is_none());
        assert!(breaker.admits(&SETTINGS, t0 + seconds(62)).is_some());
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Ask,
        Fault,
        Success,
    }

    proptest! {
        #[test]
        fn it_is_bounded_and_lets_few_through(
            steps in prop::collection::vec(
                (prop_oneof![Just(Step::Ask), Just(Step::Fault), Just(Step::Success)], 0u64..20),
                1..200,
            )
        ) {
            let (mut breaker, mut now) = (Breaker::new(), start());
            let mut faults: Vec<Instant> = Vec::new();
            let mut tried: Option<Instant> = None;
            for (step, pause) in steps {
                now += seconds(pause);
                match step {
                    Step::Ask => {
                        let before = breaker.standing();
                        let admitted = breaker.admits(&SETTINGS, now).is_some();
                        match before {
                            Standing::Closed => prop_assert!(admitted),
                            Standing::Quarantined { until } => prop_assert_eq!(admitted, now >= until),
                            Standing::Trying => {
                                let since = now - tried.unwrap();
                                prop_assert_eq!(admitted, since >= SETTINGS.duration);
                            }
                        }
                        if admitted && before != Standing::Closed {
                            tried = Some(now);
                        }
                    }
                    Step::Fault => {
                        let before = breaker.standing();
                        let change = breaker.fault(&SETTINGS, now);
                        if before == Standing::Closed {
                            faults.push(now);
                            faults.retain(|at| now - *at < SETTINGS.window);
                            prop_assert_eq!(change.is_some(), faults.len() >= 3);
                        }
                        if change.is_some() {
                            faults.clear();
                            prop_assert!(breaker.admits(&SETTINGS, now).is_none());
                        }
                    }
                    Step::Success => {
                        let round = breaker.round;
                        if breaker.tried(round, true, now) == Some(Change::Closed) {
                            prop_assert!(breaker.admits(&SETTINGS, now).is_some());
                        }
                    }
                }
                if let State::Closed(times) = &breaker.state {
                    prop_assert!(times.len() < 3);
                }
            }
            // However it stands, it is not for ever.
            prop_assert!(breaker.admits(&SETTINGS, now + SETTINGS.duration).is_some());
        }
    }
}

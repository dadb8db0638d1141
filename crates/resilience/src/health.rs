//! What the calls themselves say about an endpoint.

use std::time::{Duration, Instant};

/// The health of one endpoint, as one proxy sees it.
///
/// Two things are told apart. An endpoint that *can't be reached* (a connection failed) is known to be
/// down: it gets single probes, 100 ms apart at first and then every 2 s. An endpoint that answers
/// with failures is *ejected* for a while that grows, but serves again at once when nothing better is left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Health {
    state: State,
    /// Times in a row that it was ejected; forgotten at the first success after.
    streak: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Serving; `failures` counts those since the last success.
    In { failures: u32 },
    /// Left out until a time.
    Ejected { until: Instant },
    /// No connection could be made; `failures` in a row, the next probe at a time.
    Unreachable { probe_at: Instant, failures: u32 },
}

/// When failures have consequences; from the policy.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Failures in a row that eject, at least 1.
    pub consecutive_failures: u32,
    /// Length of the first ejection; the n-th in a row lasts n times that.
    pub base_ejection: Duration,
    /// Longest ejection.
    pub max_ejection: Duration,
}

/// What happened to a call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event {
    /// It was answered, and not with a failure of the server.
    Succeed,
    /// It was answered with a failure of the server, reset, or timed out.
    Fail,
    /// No connection could be made.
    FailToConnect,
}

/// How an endpoint stands for a choice now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Standing {
    /// Give it calls.
    Healthy,
    /// It answers, badly: only when nothing is healthy.
    Ejected,
    /// Only this call may try it (see [`Health::probe`]), and only when nothing is healthy.
    ProbeDue,
    /// Don't.
    Unreachable,
}

/// A change worth an event.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// It was left out for this long.
    Ejected(Duration),
    /// It can't be reached.
    Lost,
    /// It serves again.
    Back,
}

/// First pause between probes of an endpoint that can't be reached.
const FIRST_PROBE: Duration = Duration::from_millis(100);
/// Longest pause between probes.
const MAX_PROBE: Duration = Duration::from_secs(2);

impl Health {
    /// No history.
    pub const NEW: Self = Self {
        state: State::In { failures: 0 },
        streak: 0,
    };

    /// How the endpoint stands at `now`.
    pub fn standing(&self, now: Instant) -> Standing {
        match self.state {
            State::In { .. } => Standing::Healthy,
            State::Ejected { until } if now >= until => Standing::Healthy,
            State::Ejected { .. } => Standing::Ejected,
            // Once the pause is over it is a candidate for one call, so that it comes back by itself even
            // where healthy ones take all the load.
            State::Unreachable { probe_at, .. } if now >= probe_at => Standing::ProbeDue,
            State::Unreachable { .. } => Standing::Unreachable,
        }
    }

    /// Whether nothing at all is held against it, so that a success changes nothing.
    pub fn is_clean(&self) -> bool {
        *self == Self::NEW
    }

    /// Takes the probe that is due: true for one caller, until the next pause is over.
    pub fn probe(&mut self, now: Instant) -> bool {
        match self.state {
            State::Unreachable { probe_at, failures } if now >= probe_at => {
                self.state = State::Unreachable {
                    probe_at: now + pause(failures),
                    failures,
                };
                true
            }
            State::In { .. } | State::Ejected { .. } | State::Unreachable { .. } => false,
        }
    }

    /// Takes in how a call ended.
    #[must_use]
    pub fn on(self, event: Event, now: Instant, limits: &Limits) -> (Self, Option<Change>) {
        match (self.state, event) {
            (State::In { .. }, Event::Succeed) => (Self::NEW, None),
            // A call that was sent before the ejection, or into it for want of better: it stays out, so
            // that one good answer of a bad endpoint doesn't end every ejection.
            (State::Ejected { until }, Event::Succeed) if now < until => (self, None),
            (State::Ejected { .. } | State::Unreachable { .. }, Event::Succeed) => {
                (Self::NEW, Some(Change::Back))
            }
            (State::In { failures }, Event::Fail) if failures + 1 < limits.consecutive_failures => (
                Self {
                    state: State::In {
                        failures: failures + 1,
                    },
                    ..self
                },
                None,
            ),
            (State::Ejected { until }, Event::Fail) if now < until => (self, None),
            // It accepts connections again, so it is no longer unreachable; whether it works is to be seen.
            (State::Unreachable { .. }, Event::Fail) => (
                Self {
                    state: State::In { failures: 1 },
                    streak: self.streak,
                },
                Some(Change::Back),
            ),
            (State::In { .. } | State::Ejected { .. }, Event::Fail) => self.eject(now, limits),
            (State::In { .. } | State::Ejected { .. }, Event::FailToConnect) => {
                let state = State::Unreachable {
                    probe_at: now + FIRST_PROBE,
                    failures: 1,
                };
                (Self { state, ..self }, Some(Change::Lost))
            }
            (State::Unreachable { failures, .. }, Event::FailToConnect) => {
                let failures = failures.saturating_add(1);
                (
                    Self {
                        state: State::Unreachable {
                            probe_at: now + pause(failures),
                            failures,
                        },
                        ..self
                    },
                    None,
                )
            }
        }
    }

    fn eject(self, now: Instant, limits: &Limits) -> (Self, Option<Change>) {
        let streak = self.streak.saturating_add(1);
        let length = limits
            .base_ejection
            .saturating_mul(streak)
            .min(limits.max_ejection);
        (
            Self {
                state: State::Ejected { until: now + length },
                streak,
            },
            Some(Change::Ejected(length)),
        )
    }
}

/// The pause after so many failures to connect: doubling from [`FIRST_PROBE`] to [`MAX_PROBE`].
fn pause(failures: u32) -> Duration {
    FIRST_PROBE
        .saturating_mul(1 << failures.saturating_sub(1).min(10))
        .min(MAX_PROBE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits {
        consecutive_failures: 3,
        base_ejection: Duration::from_secs(10),
        max_ejection: Duration::from_secs(25),
    };

    #[expect(
        clippy::disallowed_methods,
        reason = "an arbitrary origin; only differences matter"
    )]
    fn origin() -> Instant {
        Instant::now()
    }

    fn after(mut health: Health, now: Instant, events: &[Event]) -> Health {
        for event in events {
            health = health.on(*event, now, &LIMITS).0;
        }
        health
    }

    #[test]
    fn failures_in_a_row_eject_for_longer_each_time() {
        let now = origin();
        let health = after(
            Health::NEW,
            now,
            &[Event::Fail, Event::Fail, Event::Succeed, Event::Fail, Event::Fail],
        );
        assert_eq!(
            health.standing(now),
            Standing::Healthy,
            "a success in between forgives"
        );
        let (health, change) = health.on(Event::Fail, now, &LIMITS);
        assert_eq!(change, Some(Change::Ejected(Duration::from_secs(10))));
        let later = now + Duration::from_secs(10);
        assert_eq!(health.standing(later), Standing::Healthy);
        let (health, change) = health.on(Event::Fail, later, &LIMITS);
        assert_eq!(change, Some(Change::Ejected(Duration::from_secs(20))));
        let (_, change) = health.on(Event::Fail, later + Duration::from_secs(20), &LIMITS);
        assert_eq!(change, Some(Change::Ejected(Duration::from_secs(25))), "bounded");
    }

    #[test]
    fn an_unreachable_endpoint_gets_one_probe_at_a_time() {
        let now = origin();
        let mut health = after(Health::NEW, now, &[Event::FailToConnect]);
        assert_eq!(health.standing(now), Standing::Unreachable);
        let due = now + FIRST_PROBE;
        assert_eq!(health.standing(due), Standing::ProbeDue);
        assert!(health.probe(due));
        assert!(!health.probe(due), "one caller only");
        let (health, change) = health.on(Event::Succeed, due, &LIMITS);
        assert_eq!(change, Some(Change::Back));
        assert!(health.is_clean());
    }

    proptest! {
        #[test]
        fn never_out_for_longer_than_the_limits(
            steps in prop::collection::vec((0u64..40_000, 0usize..4), 1..200),
        ) {
            let mut now = origin();
            let mut health = Health::NEW;
            for (ms, what) in steps {
                now += Duration::from_millis(ms);
                let before = health.standing(now);
                match [Some(Event::Succeed), Some(Event::Fail), Some(Event::FailToConnect), None][what] {
                    Some(event) => health = health.on(event, now, &LIMITS).0,
                    None => { health.probe(now); }
                }
                let soon = health.standing(now + LIMITS.max_ejection);
                prop_assert!(matches!(soon, Standing::Healthy | Standing::ProbeDue));
                if what == 0 {
                    prop_assert_eq!(health.is_clean(), before != Standing::Ejected, "a success forgives but an ejection");
                }
            }
        }
    }
}

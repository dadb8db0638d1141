//! Circuit breaker: refuses calls while a service fails, and lets them back bit by bit.
//!
//! Words as in the literature: *closed* passes calls, *open* refuses them, *half-open* lets a few probes
//! through, and a *ramp* lets a growing share pass once the probes succeeded.

use crate::Draw;
use crate::jitter::lengthen;
use leeward_policy::model::{BreakerMode, CircuitBreaker};
use std::time::{Duration, Instant};

#[cfg(test)]
mod tests;

/// One circuit: a value driven by the calls that ask to pass and that end.
///
/// The caller keeps it in a mutex, next to a [`Window`](crate::Window) of three counters that [`Counts`] are
/// read from, and serves most calls without taking the mutex:
///
/// - It mirrors [`closed_epoch`](Self::closed_epoch) and [`is_clean`](Self::is_clean) in one atomic word,
///   written under the mutex after each call of a method, and when the mode changes. While there is such
///   an epoch, a call needn't [`ask`](Self::ask): its ticket is [`Ticket::closed`]. While it is also clean,
///   a call that succeeds and isn't slow needn't [`settle`](Self::settle) either. It is only added to the
///   window.
/// - A call is added to the window when it ends, before it is settled, unless it was abandoned or its
///   ticket isn't [`counted`](Self::is_counted) any longer.
/// - The window is cleared at each [`Transition`] that is [`fresh`](Transition::is_fresh), so that what
///   opened the circuit doesn't open it again once the service has recovered.
///
/// A success alone never opens a circuit, even if it is the call that makes the window's calls enough:
/// that way it makes no difference whether successes are settled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Breaker {
    state: State,
    /// Bumped by every change after which earlier calls say nothing.
    epoch: u32,
    /// Times that it opened since it was last closed and through its ramp.
    openings: u32,
}

/// Each variant holds only what that state needs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Passing; `failures` in a row.
    Closed { failures: u32 },
    /// Refusing until a time.
    Open { until: Instant },
    /// Probing. Probes that are under way at `lost_at` won't be waited for.
    HalfOpen {
        under_way: u32,
        succeeded: u32,
        lost_at: Instant,
    },
    /// Passing a share that grows from a time on; `failures` in a row.
    Ramping { since: Instant, failures: u32 },
}

/// How a circuit stands.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum CircuitState {
    /// Every call passes.
    Closed,
    /// No call passes.
    Open,
    /// A few calls pass, as probes.
    HalfOpen,
    /// A share of calls passes.
    Ramping,
}

impl CircuitState {
    /// The word used in logs, events and the admin API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
            Self::Ramping => "ramping",
        }
    }

    /// The number used in metrics and atomics: from 0, in the order of the variants.
    pub const fn code(self) -> u8 {
        match self {
            Self::Closed => 0,
            Self::Open => 1,
            Self::HalfOpen => 2,
            Self::Ramping => 3,
        }
    }
}

/// What the circuit's window counts, since it was last cleared.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Calls that ended, the abandoned left out.
    pub calls: u64,
    /// Those that failed.
    pub failures: u64,
    /// Those that were slow, failed or not.
    pub slow: u64,
}

/// How a call ended, for the circuit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CallEnd {
    /// With what.
    pub ended: Ended,
    /// After how long.
    pub took: Duration,
}

/// With what a call ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// It was answered, and not with a failure.
    Succeed,
    /// It failed, or the service asked for less (429).
    Fail,
    /// Its caller went away, or this proxy refused it for a limit of its own. It says nothing.
    Abandon,
}

impl CallEnd {
    /// Whether the call counts as slow. Always false for a call that was abandoned.
    pub fn is_slow(&self, limits: &CircuitBreaker) -> bool {
        self.ended != Ended::Abandon && self.took >= limits.slow_call_duration
    }
}

/// Proof of having passed, and when; settle it exactly once, however the call ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ticket {
    epoch: u32,
    kind: TicketKind,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum TicketKind {
    /// How the call ends counts, while the epoch lasts.
    Counted,
    /// It passed because the mode is to observe.
    Overruled,
    /// It passed because the circuit is forced closed.
    Forced,
}

impl Ticket {
    /// That of a call that didn't ask, as there was a [`Breaker::closed_epoch`].
    pub const fn closed(epoch: u32) -> Self {
        Self {
            epoch,
            kind: TicketKind::Counted,
        }
    }

    /// Whether the call would have been refused, were the mode not to observe.
    pub const fn would_be_refused(&self) -> bool {
        matches!(self.kind, TicketKind::Overruled)
    }
}

/// The answer to a call that asks to pass.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// Send it, and settle the ticket.
    Pass(Ticket),
    /// Don't send it.
    Refuse {
        /// When the next probe may pass. `None`: that isn't known, and may be any moment; for a circuit
        /// that is forced open, not before the force ends.
        until: Option<Instant>,
    },
}

/// A change of state, worth an event.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Transition {
    /// The new state.
    pub to: CircuitState,
    /// What led to it.
    pub why: CircuitWhy,
}

impl Transition {
    /// Whether calls counted so far say nothing about the new state, so that the window is to be cleared.
    /// It is false only at the end of a ramp.
    pub const fn is_fresh(&self) -> bool {
        !matches!(self.why, CircuitWhy::RampDone)
    }
}

/// CircuitWhy a circuit changed its state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CircuitWhy {
    /// Too large a share of calls failed.
    FailureRate {
        /// The share, rounded down.
        percent: u32,
        /// Of this many calls.
        calls: u64,
    },
    /// Too large a share of calls was slow.
    SlowCallRate {
        /// The share, rounded down.
        percent: u32,
        /// Of this many calls.
        calls: u64,
    },
    /// Too many calls failed in a row.
    ConsecutiveFailures {
        /// So many.
        failures: u32,
    },
    /// A probe failed or, where slow calls open the circuit, was slow.
    ProbeFailed,
    /// Enough probes succeeded.
    ProbesSucceeded,
    /// All traffic is back.
    RampDone,
    /// It was open for long enough.
    TimeUp,
}

impl CircuitWhy {
    /// The word used in logs, events and the admin API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::FailureRate { .. } => "failure_rate",
            Self::SlowCallRate { .. } => "slow_call_rate",
            Self::ConsecutiveFailures { .. } => "consecutive_failures",
            Self::ProbeFailed => "probe_failed",
            Self::ProbesSucceeded => "probes_succeeded",
            Self::RampDone => "ramp_done",
            Self::TimeUp => "time_up",
        }
    }
}

/// Share that passes at the start of a ramp.
const FIRST_SHARE: f64 = 0.1;
/// How long probes are waited for at least: as long as most requests may take.
const PROBE_PATIENCE: Duration = Duration::from_secs(60);

impl Breaker {
    /// Closed, with no history.
    pub const NEW: Self = Self {
        state: State::Closed { failures: 0 },
        epoch: 0,
        openings: 0,
    };

    /// Asks for a call to pass. Time alone may also have led to a transition.
    ///
    /// A probe that is never settled holds its place. Once all places are taken and the last was taken
    /// longer ago than `open_time`, or a minute if that is more, all of them are given to new probes, and
    /// the old ones become stragglers: whatever its callers forget, a circuit is never stuck for longer.
    ///
    /// In [`BreakerMode::Observe`] the circuit goes through its states as if it refused what it should; the
    /// calls that pass all the same change nothing. While the mode is a forced one, it stays as it was.
    pub fn ask(
        &mut self,
        now: Instant,
        limits: &CircuitBreaker,
        draw: &mut impl Draw,
    ) -> (Verdict, Option<Transition>) {
        match limits.mode {
            BreakerMode::ForceOpen => return (Verdict::Refuse { until: None }, None),
            BreakerMode::ForceClosed => return (Verdict::Pass(self.ticket(TicketKind::Forced)), None),
            BreakerMode::Enforce | BreakerMode::Observe => {}
        }
        let transition = self.pass_time(now, limits);
        let passes = match &mut self.state {
            State::Closed { .. } => true,
            State::Open { .. } => false,
            State::HalfOpen {
                under_way, lost_at, ..
            } => {
                let free = *under_way < limits.half_open_probes;
                if free {
                    *under_way += 1;
                    *lost_at = now + patience(limits);
                }
                free
            }
            State::Ramping { since, .. } => {
                draw.unit() < share(now.saturating_duration_since(*since), limits)
            }
        };
        let verdict = if passes {
            Verdict::Pass(self.ticket(TicketKind::Counted))
        } else if limits.mode == BreakerMode::Observe {
            Verdict::Pass(self.ticket(TicketKind::Overruled))
        } else {
            Verdict::Refuse {
                until: self.next_probe(),
            }
        };
        (verdict, transition)
    }

    /// Takes in how a call that passed ended. `counts` are the window's, with this call in it.
    ///
    /// A straggler changes nothing: a call that passed before the circuit opened, or before other probes
    /// took its place. One that is abandoned gives its place as a probe back, and changes nothing else.
    pub fn settle(
        &mut self,
        ticket: Ticket,
        end: &CallEnd,
        counts: &Counts,
        now: Instant,
        limits: &CircuitBreaker,
        draw: &mut impl Draw,
    ) -> Option<Transition> {
        if !self.is_counted(ticket, limits) {
            return None;
        }
        if end.ended == Ended::Abandon {
            if let State::HalfOpen { under_way, .. } = &mut self.state {
                *under_way = under_way.saturating_sub(1);
            }
            return None;
        }
        let ramp_done = self.end_ramp(now, limits);
        let slow = limits.slow_call_rate > 0 && end.is_slow(limits);
        let failed = end.ended == Ended::Fail;
        match &mut self.state {
            // No ticket carries the epoch of an open circuit.
            State::Open { .. } => ramp_done,
            State::HalfOpen { .. } if failed || slow => {
                Some(self.open(CircuitWhy::ProbeFailed, now, limits, draw))
            }
            State::HalfOpen {
                under_way, succeeded, ..
            } => {
                *under_way = under_way.saturating_sub(1);
                *succeeded = succeeded.saturating_add(1);
                if *succeeded < limits.half_open_probes {
                    return None;
                }
                Some(self.close(now, limits))
            }
            State::Closed { failures } | State::Ramping { failures, .. } => {
                *failures = match end.ended {
                    Ended::Fail if limits.consecutive_failures > 0 => failures.saturating_add(1),
                    Ended::Fail | Ended::Succeed | Ended::Abandon => 0,
                };
                let failures = *failures;
                if (failed || slow)
                    && let Some(why) = why_open(failures, counts, limits)
                {
                    return Some(self.open(why, now, limits, draw));
                }
                ramp_done
            }
        }
    }

    /// How the circuit stands at `now`. One whose time is up is half-open, whether or not a call came yet.
    pub fn state(&self, now: Instant, limits: &CircuitBreaker) -> CircuitState {
        match (limits.mode, self.state) {
            (BreakerMode::ForceOpen, _) => CircuitState::Open,
            (BreakerMode::ForceClosed, _) => CircuitState::Closed,
            (BreakerMode::Enforce | BreakerMode::Observe, state) => match state {
                State::Closed { .. } => CircuitState::Closed,
                State::Open { until } if now < until => CircuitState::Open,
                State::Open { .. } | State::HalfOpen { .. } => CircuitState::HalfOpen,
                State::Ramping { since, .. } if now.saturating_duration_since(since) < limits.ramp => {
                    CircuitState::Ramping
                }
                State::Ramping { .. } => CircuitState::Closed,
            },
        }
    }

    /// When an open circuit lets its first probe pass; `None` in other states.
    pub fn next_probe(&self) -> Option<Instant> {
        match self.state {
            State::Open { until } => Some(until),
            State::Closed { .. } | State::HalfOpen { .. } | State::Ramping { .. } => None,
        }
    }

    /// Whether it is closed and no failures in a row are held against it, so that a success that isn't slow
    /// changes nothing. The mode doesn't matter.
    pub fn is_clean(&self) -> bool {
        self.state == State::Closed { failures: 0 }
    }

    /// What calls carry in their tickets, while every call passes and counts, so that none needs to ask.
    /// It comes again after 2^32 transitions.
    pub const fn closed_epoch(&self, limits: &CircuitBreaker) -> Option<u32> {
        match (limits.mode, self.state) {
            (BreakerMode::Enforce | BreakerMode::Observe, State::Closed { .. }) => Some(self.epoch),
            (
                BreakerMode::Enforce
                | BreakerMode::Observe
                | BreakerMode::ForceOpen
                | BreakerMode::ForceClosed,
                State::Closed { .. } | State::Open { .. } | State::HalfOpen { .. } | State::Ramping { .. },
            ) => None,
        }
    }

    /// Whether how this call ends counts, for the window too.
    pub fn is_counted(&self, ticket: Ticket, limits: &CircuitBreaker) -> bool {
        match limits.mode {
            BreakerMode::Enforce | BreakerMode::Observe => ticket == self.ticket(TicketKind::Counted),
            BreakerMode::ForceOpen | BreakerMode::ForceClosed => false,
        }
    }

    const fn ticket(&self, kind: TicketKind) -> Ticket {
        Ticket {
            epoch: self.epoch,
            kind,
        }
    }

    /// Does what time alone does.
    fn pass_time(&mut self, now: Instant, limits: &CircuitBreaker) -> Option<Transition> {
        match &mut self.state {
            State::Open { until } if now >= *until => {
                self.enter(State::HalfOpen {
                    under_way: 0,
                    succeeded: 0,
                    lost_at: now + patience(limits),
                });
                Some(Transition {
                    to: CircuitState::HalfOpen,
                    why: CircuitWhy::TimeUp,
                })
            }
            State::HalfOpen {
                under_way, lost_at, ..
            } if *under_way >= limits.half_open_probes && now >= *lost_at => {
                *under_way = 0;
                self.epoch = self.epoch.wrapping_add(1);
                None
            }
            State::Ramping { .. } => self.end_ramp(now, limits),
            State::Closed { .. } | State::Open { .. } | State::HalfOpen { .. } => None,
        }
    }

    /// Ends a ramp that is over. The epoch stays: calls that passed during the ramp still count.
    fn end_ramp(&mut self, now: Instant, limits: &CircuitBreaker) -> Option<Transition> {
        match self.state {
            State::Ramping { since, failures } if now.saturating_duration_since(since) >= limits.ramp => {
                self.state = State::Closed { failures };
                self.openings = 0;
                Some(Transition {
                    to: CircuitState::Closed,
                    why: CircuitWhy::RampDone,
                })
            }
            State::Closed { .. } | State::Open { .. } | State::HalfOpen { .. } | State::Ramping { .. } => {
                None
            }
        }
    }

    fn close(&mut self, now: Instant, limits: &CircuitBreaker) -> Transition {
        let why = CircuitWhy::ProbesSucceeded;
        if limits.ramp.is_zero() {
            self.enter(State::Closed { failures: 0 });
            self.openings = 0;
            return Transition {
                to: CircuitState::Closed,
                why,
            };
        }
        self.enter(State::Ramping {
            since: now,
            failures: 0,
        });
        Transition {
            to: CircuitState::Ramping,
            why,
        }
    }

    fn open(
        &mut self,
        why: CircuitWhy,
        now: Instant,
        limits: &CircuitBreaker,
        draw: &mut impl Draw,
    ) -> Transition {
        // 10 ms doubled 24 times is past a day, the longest that may be set.
        let length = limits
            .open_time
            .saturating_mul(1 << self.openings.min(24))
            .min(limits.max_open_time);
        self.openings = self.openings.saturating_add(1);
        self.enter(State::Open {
            until: now + lengthen(length, limits.open_jitter, draw),
        });
        Transition {
            to: CircuitState::Open,
            why,
        }
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.epoch = self.epoch.wrapping_add(1);
    }
}

/// How long probes are waited for, counted from the latest.
fn patience(limits: &CircuitBreaker) -> Duration {
    limits.open_time.max(PROBE_PATIENCE)
}

/// The share of calls that passes so long after the start of a ramp.
fn share(elapsed: Duration, limits: &CircuitBreaker) -> f64 {
    FIRST_SHARE + (1.0 - FIRST_SHARE) * elapsed.div_duration_f64(limits.ramp)
}

/// Whether a call that failed or was slow opens the circuit, most telling reason first.
fn why_open(failures: u32, counts: &Counts, limits: &CircuitBreaker) -> Option<CircuitWhy> {
    if limits.consecutive_failures > 0 && failures >= limits.consecutive_failures {
        return Some(CircuitWhy::ConsecutiveFailures { failures });
    }
    let calls = counts.calls;
    if calls < u64::from(limits.minimum_calls) {
        return None;
    }
    let reached = |limit: u32, part: u64| {
        let percent = part.saturating_mul(100).checked_div(calls)?;
        // Rounding down keeps this exact: a share is at least n % just if its whole part is.
        let percent = u32::try_from(percent).unwrap_or(u32::MAX);
        (limit > 0 && percent >= limit).then_some(percent)
    };
    if let Some(percent) = reached(limits.failure_rate, counts.failures) {
        return Some(CircuitWhy::FailureRate { percent, calls });
    }
    reached(limits.slow_call_rate, counts.slow).map(|percent| CircuitWhy::SlowCallRate { percent, calls })
}

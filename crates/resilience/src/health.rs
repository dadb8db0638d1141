//! What the calls, and the checks, say about an endpoint.

use crate::Draw;
use crate::jitter::lengthen;
use leeward_policy::model::OutlierDetection;
use std::time::{Duration, Instant};

#[cfg(test)]
mod tests;

/// The health of one endpoint, as one proxy sees it.
///
/// Three things are told apart. An endpoint that *can't be reached* (a connection failed) is known to be
/// down: it gets single probes, 100 ms apart at first and then every 2 s. An endpoint that answers
/// with failures is *ejected* for a while that grows, but serves again at once when nothing better is left.
/// An endpoint that fails its *active checks* is out until it passes them, whatever calls say; passing them
/// shows that it can be reached, but ends no ejection: that is for calls to say, as in Envoy.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Health {
    state: State,
    /// What its active checks said last; `None` where there are none, or not yet.
    checked: Option<Checked>,
    /// How many base lengths the latest ejection lasted, before any limit, and when it ends or ended. One is
    /// forgotten for each interval that passed since (see [`OutlierDetection::interval`]).
    ejections: Option<(u32, Instant)>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Serving.
    In(InARow),
    /// Left out for a while.
    Ejected(Ejection),
    /// No connection could be made; `failures` in a row, the next probe at a time.
    Unreachable { probe_at: Instant, failures: u32 },
}

/// Failures since the last success.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct InARow {
    all: u32,
    /// Those of the gateway kind since the last answer that wasn't one.
    gateway: u32,
}

impl InARow {
    const NONE: Self = Self { all: 0, gateway: 0 };
}

/// What happened to a call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event {
    /// It was answered, and not with a failure of the server.
    Succeed,
    /// It was answered with a failure of the server, reset, or timed out.
    Fail(FailureKind),
    /// No connection could be made.
    FailToConnect,
}

/// Which failures in a row a failure counts for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FailureKind {
    /// A 5xx answer that isn't of the other kind: for `consecutive_5xx`.
    Server5xx,
    /// 502, 503 or 504, a reset or a timeout: for `consecutive_gateway_failure` as well.
    Gateway,
}

/// What an endpoint's active checks say, their thresholds applied.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Checked {
    /// It serves.
    Passing,
    /// It doesn't.
    Failing,
}

/// How an endpoint stands for a choice now.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Standing {
    /// Give it calls.
    Healthy,
    /// It answers, badly: only when nothing is healthy.
    Ejected,
    /// Only this call may try it (see [`Health::probe`]), and only when nothing is healthy.
    ProbeDue,
    /// Don't.
    Unreachable,
    /// Its active checks fail.
    Unhealthy,
}

/// An ejection, with its evidence.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ejection {
    /// When it began.
    pub since: Instant,
    /// When it ends.
    pub until: Instant,
    /// What for.
    pub why: EjectionReason,
}

impl Ejection {
    /// How long it lasts.
    pub fn length(&self) -> Duration {
        self.until.saturating_duration_since(self.since)
    }
}

/// Why an endpoint was ejected.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EjectionReason {
    /// Failures in a row.
    Consecutive5xx {
        /// So many. Where it failed at once after an ejection for the same reason, those before are counted.
        failures: u32,
    },
    /// Gateway failures in a row.
    ConsecutiveGatewayFailure {
        /// So many, likewise.
        failures: u32,
    },
    /// Its success rate was far below the others'. In hundredths of a percent.
    SuccessRate {
        /// Its own.
        rate: u32,
        /// What it had to reach.
        threshold: u32,
    },
    /// It failed too large a share.
    FailurePercentage {
        /// The share, rounded down.
        percent: u32,
        /// Of this many requests.
        requests: u64,
    },
}

impl EjectionReason {
    /// The word used in metrics, events and the admin API; the settings' names.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Consecutive5xx { .. } => "consecutive_5xx",
            Self::ConsecutiveGatewayFailure { .. } => "consecutive_gateway_failure",
            Self::SuccessRate { .. } => "success_rate",
            Self::FailurePercentage { .. } => "failure_percentage",
        }
    }
}

/// A change worth an event.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// It is left out for a while.
    Ejected(Ejection),
    /// It can't be reached.
    Lost,
    /// It serves again, after an ejection or not being reachable. Told at the first call, or check, that
    /// says so.
    Back,
    /// Its active checks began to fail.
    ChecksFailed,
    /// They pass again.
    ChecksPassed,
}

/// First pause between probes of an endpoint that can't be reached.
const FIRST_PROBE: Duration = Duration::from_millis(100);
/// Longest pause between probes.
const MAX_PROBE: Duration = Duration::from_secs(2);

impl Health {
    /// No history.
    pub const NEW: Self = Self {
        state: State::In(InARow::NONE),
        checked: None,
        ejections: None,
    };

    /// How the endpoint stands at `now`.
    pub fn standing(&self, now: Instant) -> Standing {
        if self.checked == Some(Checked::Failing) {
            return Standing::Unhealthy;
        }
        match self.state {
            State::In { .. } => Standing::Healthy,
            State::Ejected(ejection) if now >= ejection.until => Standing::Healthy,
            State::Ejected(_) => Standing::Ejected,
            // Once the pause is over it is a candidate for one call, so that it comes back by itself even
            // where healthy ones take all the load.
            State::Unreachable { probe_at, .. } if now >= probe_at => Standing::ProbeDue,
            State::Unreachable { .. } => Standing::Unreachable,
        }
    }

    /// Whether a call that succeeds changes nothing: it isn't out, and the last call succeeded too. What its
    /// checks say, and how long it was ejected before, doesn't matter.
    pub fn is_clean(&self) -> bool {
        self.state == State::In(InARow::NONE)
    }

    /// The ejection that it is in at `now`: what for, and until when.
    pub fn ejection(&self, now: Instant) -> Option<&Ejection> {
        match &self.state {
            State::Ejected(ejection) if now < ejection.until => Some(ejection),
            State::In(_) | State::Ejected(_) | State::Unreachable { .. } => None,
        }
    }

    /// When it may be probed next, if it can't be reached.
    pub fn next_probe(&self) -> Option<Instant> {
        match self.state {
            State::Unreachable { probe_at, .. } => Some(probe_at),
            State::In(_) | State::Ejected(_) => None,
        }
    }

    /// What its active checks said last.
    pub const fn checked(&self) -> Option<Checked> {
        self.checked
    }

    /// Takes the probe that is due: true for one caller, until the next pause is over. Never while its
    /// checks fail; they find out when it is back.
    pub fn probe(&mut self, now: Instant) -> bool {
        if self.checked == Some(Checked::Failing) {
            return false;
        }
        match self.state {
            State::Unreachable { probe_at, failures } if now >= probe_at => {
                self.state = State::Unreachable {
                    probe_at: now + pause(failures),
                    failures,
                };
                true
            }
            State::In(_) | State::Ejected(_) | State::Unreachable { .. } => false,
        }
    }

    /// Takes in how a call ended.
    ///
    /// `may_eject` is asked only if the endpoint is to be ejected; see [`may_eject`]. If it says no, the
    /// endpoint goes on serving, and its next failure asks again.
    ///
    /// The n-th ejection in a row lasts n base lengths, up to the longest, and up to the jitter longer. One
    /// is forgotten for each interval that passes without: as in Envoy, so that an endpoint that fails now
    /// and then isn't out for longer and longer, and one that succeeds once in between doesn't start anew.
    ///
    /// After an ejection for failures in a row, the endpoint is on trial: one more such failure before a
    /// success ejects it again.
    #[must_use]
    pub fn on(
        self,
        event: Event,
        now: Instant,
        settings: &OutlierDetection,
        may_eject: impl FnOnce() -> bool,
        draw: &mut impl Draw,
    ) -> (Self, Option<Change>) {
        match event {
            // A call that was sent before the ejection, or into it for want of better: it stays out, so
            // that one good answer of a bad endpoint doesn't end every ejection.
            Event::Succeed | Event::Fail(_) if self.ejection(now).is_some() => (self, None),
            Event::Succeed => match self.state {
                State::In(_) => (self.serving(InARow::NONE), None),
                State::Ejected(_) | State::Unreachable { .. } => {
                    (self.serving(InARow::NONE), Some(Change::Back))
                }
            },
            Event::Fail(kind) => {
                let (before, back) = match self.state {
                    State::In(before) => (before, None),
                    State::Ejected(ejection) => (on_trial(ejection.why, settings), Some(Change::Back)),
                    // It accepts connections again, so it is no longer unreachable; whether it works is to
                    // be seen.
                    State::Unreachable { .. } => (InARow::NONE, Some(Change::Back)),
                };
                let in_a_row = before.and(kind);
                match in_a_row.ejects(settings) {
                    Some(why) if may_eject() => self.eject(why, now, settings, draw),
                    Some(_) | None => (self.serving(in_a_row), back),
                }
            }
            Event::FailToConnect => {
                let (failures, change) = match self.state {
                    State::In(_) | State::Ejected(_) => (1, Some(Change::Lost)),
                    State::Unreachable { failures, .. } => (failures.saturating_add(1), None),
                };
                let state = State::Unreachable {
                    probe_at: now + pause(failures),
                    failures,
                };
                (Self { state, ..self }, change)
            }
        }
    }

    /// Ejects it, as [`outliers`](crate::outliers) demands. The caller has asked [`may_eject`]. Nothing
    /// happens if it is ejected, or can't be reached, already.
    #[must_use]
    pub fn eject(
        self,
        why: EjectionReason,
        now: Instant,
        settings: &OutlierDetection,
        draw: &mut impl Draw,
    ) -> (Self, Option<Change>) {
        if self.ejection(now).is_some() || self.next_probe().is_some() {
            return (self, None);
        }
        let before = self.ejections.map_or(0, |(lengths, end)| {
            let passed = now.saturating_duration_since(end).as_nanos() / settings.interval.as_nanos().max(1);
            lengths.saturating_sub(u32::try_from(passed).unwrap_or(u32::MAX))
        });
        let base = settings.base_ejection_time;
        // No more than the longest takes, or it would take as many intervals to forget them.
        let lengths = if base.saturating_mul(before) < settings.max_ejection_time {
            before.saturating_add(1)
        } else {
            before
        };
        let length = base.saturating_mul(lengths).min(settings.max_ejection_time);
        let ejection = Ejection {
            since: now,
            until: now + lengthen(length, settings.ejection_jitter, draw),
            why,
        };
        let out = Self {
            state: State::Ejected(ejection),
            ejections: Some((lengths, ejection.until)),
            ..self
        };
        (out, Some(Change::Ejected(ejection)))
    }

    /// Takes in what its active checks say now. Checks that pass also end its not being reachable.
    #[must_use]
    pub fn check(self, says: Checked) -> (Self, Option<Change>) {
        let checked = Self {
            checked: Some(says),
            ..self
        };
        match (says, self.checked) {
            (Checked::Failing, Some(Checked::Failing)) => (self, None),
            (Checked::Failing, Some(Checked::Passing) | None) => (checked, Some(Change::ChecksFailed)),
            (Checked::Passing, before) => {
                let lost = self.next_probe().is_some();
                let change = match before {
                    Some(Checked::Failing) => Some(Change::ChecksPassed),
                    Some(Checked::Passing) | None if lost => Some(Change::Back),
                    Some(Checked::Passing) | None => None,
                };
                let now = if lost {
                    checked.serving(InARow::NONE)
                } else {
                    checked
                };
                (now, change)
            }
        }
    }

    const fn serving(self, in_a_row: InARow) -> Self {
        Self {
            state: State::In(in_a_row),
            ..self
        }
    }
}

impl InARow {
    /// With another failure.
    const fn and(self, kind: FailureKind) -> Self {
        Self {
            all: self.all.saturating_add(1),
            gateway: match kind {
                FailureKind::Server5xx => 0,
                FailureKind::Gateway => self.gateway.saturating_add(1),
            },
        }
    }

    /// Whether these are reason to eject; the narrower one if both are.
    const fn ejects(self, settings: &OutlierDetection) -> Option<EjectionReason> {
        let gateway = settings.consecutive_gateway_failure;
        if gateway > 0 && self.gateway >= gateway {
            return Some(EjectionReason::ConsecutiveGatewayFailure {
                failures: self.gateway,
            });
        }
        if self.all >= settings.consecutive_5xx {
            return Some(EjectionReason::Consecutive5xx { failures: self.all });
        }
        None
    }
}

/// The failures held against an endpoint when its ejection is over.
const fn on_trial(why: EjectionReason, settings: &OutlierDetection) -> InARow {
    let all = settings.consecutive_5xx.saturating_sub(1);
    let gateway = settings.consecutive_gateway_failure.saturating_sub(1);
    match why {
        EjectionReason::Consecutive5xx { .. } => InARow { all, gateway: 0 },
        EjectionReason::ConsecutiveGatewayFailure { .. } => InARow { all: 0, gateway },
        // One failure says nothing about a rate.
        EjectionReason::SuccessRate { .. } | EjectionReason::FailurePercentage { .. } => InARow::NONE,
    }
}

/// Whether one more endpoint of a service may be ejected, of `total` of which `ejected` are already: up to
/// `max_percent` of them, but one in any case, and never the last that is left. None at 0 percent.
pub fn may_eject(ejected: u32, total: u32, max_percent: u32) -> bool {
    let then = u64::from(ejected) + 1;
    let within = then * 100 <= u64::from(total) * u64::from(max_percent);
    max_percent > 0 && then < u64::from(total) && (ejected == 0 || within)
}

/// The pause after so many failures to connect: doubling from [`FIRST_PROBE`] to [`MAX_PROBE`].
fn pause(failures: u32) -> Duration {
    FIRST_PROBE
        .saturating_mul(1 << failures.saturating_sub(1).min(10))
        .min(MAX_PROBE)
}

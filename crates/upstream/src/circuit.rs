//! A circuit as all workers share it: the breaker behind a lock, and one word that spares most calls the lock.

use leeward_policy::model::{BreakerMode, CircuitBreaker};
use leeward_resilience::{
    Breaker, CallEnd, CircuitState, CircuitWhy as Why, Counts, Draw, Ended, Ticket, Transition, Verdict,
    Window,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Whose circuit it is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum CircuitKind {
    /// A service's.
    Service,
    /// That of a route's rule.
    Route,
    /// An endpoint's.
    Endpoint,
}

impl CircuitKind {
    /// The word used in logs, metrics and the admin API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Route => "route",
            Self::Endpoint => "endpoint",
        }
    }
}

/// One circuit. Its settings never change: other settings make another circuit.
#[derive(Debug)]
pub struct Circuit {
    kind: CircuitKind,
    name: Arc<str>,
    limits: CircuitBreaker,
    /// State (2 bits), whether the breaker is clean (1 bit), and epoch, as of the last change under the lock.
    /// Relaxed is enough: a worker that reads a stale word is one call late.
    mirror: AtomicU64,
    window: Window<3>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    breaker: Breaker,
    /// The last change, for people.
    last: Option<Transition>,
}

/// A call that passed. Settle it; one that is dropped counts as abandoned.
#[derive(Debug)]
#[must_use = "dropping a pass abandons the call"]
pub struct Pass {
    circuit: Arc<Circuit>,
    ticket: Ticket,
    since: Instant,
    settled: bool,
}

/// A call that must not be sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Blocked {
    /// How long it makes no sense to ask again, where that is known.
    pub retry_after: Option<Duration>,
}

/// How a circuit stands, for people.
#[derive(Clone, Debug)]
pub struct CircuitReading {
    /// Whose circuit it is.
    pub kind: CircuitKind,
    /// The service, `ROUTE/RULE`, or `SERVICE/IP:PORT`.
    pub name: Arc<str>,
    /// How it stands.
    pub state: CircuitState,
    /// What is done with that.
    pub mode: BreakerMode,
    /// What led there.
    pub why: Option<Why>,
    /// Until the next probe, while it is open.
    pub until: Option<Duration>,
    /// What its window counts.
    pub counts: Counts,
}

const CALLS: usize = 0;
const FAILURES: usize = 1;
const SLOW: usize = 2;
const CLEAN: u64 = 0b100;

impl Circuit {
    /// A closed circuit.
    pub fn new(kind: CircuitKind, name: Arc<str>, limits: CircuitBreaker, now: Instant) -> Self {
        let breaker = Breaker::NEW;
        Self {
            kind,
            name,
            mirror: AtomicU64::new(mirror(&breaker, now, &limits)),
            window: Window::new(limits.window, now),
            inner: Mutex::new(Inner { breaker, last: None }),
            limits,
        }
    }

    /// What it was made from.
    pub const fn limits(&self) -> &CircuitBreaker {
        &self.limits
    }

    /// Whose circuit it is, and its name.
    pub const fn names(&self) -> (CircuitKind, &Arc<str>) {
        (self.kind, &self.name)
    }

    /// Asks for a call to pass. `forced`: somebody holds the circuit for a while.
    ///
    /// # Errors
    ///
    /// When it must not be sent.
    pub fn ask(
        self: &Arc<Self>,
        forced: Option<BreakerMode>,
        now: Instant,
        draw: &mut impl Draw,
        changed: &mut impl FnMut(&Self, Transition),
    ) -> Result<Pass, Blocked> {
        let seen = self.mirror.load(Ordering::Relaxed);
        let pass = |ticket| Pass {
            circuit: Arc::clone(self),
            ticket,
            since: now,
            settled: false,
        };
        let free = matches!(self.limits.mode, BreakerMode::Enforce | BreakerMode::Observe);
        if forced.is_none() && free && state_of(seen) == CircuitState::Closed {
            return Ok(pass(Ticket::closed(epoch_of(seen))));
        }
        let limits = CircuitBreaker {
            mode: forced.unwrap_or(self.limits.mode),
            ..self.limits
        };
        let (verdict, transition) = self.step(now, |inner| inner.breaker.ask(now, &limits, draw));
        self.tell(transition, changed);
        match verdict {
            Verdict::Pass(ticket) => Ok(pass(ticket)),
            Verdict::Refuse { until } => Err(Blocked {
                retry_after: until.map(|until| until.saturating_duration_since(now)),
            }),
        }
    }

    /// Whether a call would pass as things are, without taking a probe's place: for choosing among endpoints.
    pub(crate) fn standing(&self, now: Instant) -> CircuitStanding {
        let seen = self.mirror.load(Ordering::Relaxed);
        match (self.limits.mode, state_of(seen)) {
            (BreakerMode::ForceOpen, _) => CircuitStanding::Shut,
            (BreakerMode::ForceClosed | BreakerMode::Observe, _) | (_, CircuitState::Closed) => {
                CircuitStanding::Passing
            }
            (BreakerMode::Enforce, CircuitState::Ramping) => CircuitStanding::Ramping,
            (BreakerMode::Enforce, CircuitState::HalfOpen) => CircuitStanding::Probing,
            (BreakerMode::Enforce, CircuitState::Open) => {
                let due = self.locked().breaker.next_probe().is_none_or(|at| now >= at);
                if due {
                    CircuitStanding::Probing
                } else {
                    CircuitStanding::Shut
                }
            }
        }
    }

    pub(crate) fn is_shut(&self, now: Instant) -> bool {
        self.standing(now) == CircuitStanding::Shut
    }

    /// Whether it is closed, with nothing to remember.
    pub(crate) fn is_at_rest(&self) -> bool {
        let seen = self.mirror.load(Ordering::Relaxed);
        state_of(seen) == CircuitState::Closed && seen & CLEAN != 0
    }

    /// How it stands, for people.
    pub fn reading(&self, now: Instant) -> CircuitReading {
        let counts = self.counts(now);
        let inner = self.locked();
        let state = inner.breaker.state(now, &self.limits);
        let until = inner.breaker.next_probe().filter(|_| state == CircuitState::Open);
        CircuitReading {
            kind: self.kind,
            name: Arc::clone(&self.name),
            state,
            mode: self.limits.mode,
            why: inner.last.map(|last| last.why),
            until: until.map(|until| until.saturating_duration_since(now)),
            counts,
        }
    }

    fn counts(&self, now: Instant) -> Counts {
        let [calls, failures, slow] = self.window.sums(now);
        Counts {
            calls,
            failures,
            slow,
        }
    }

    fn settle(
        &self,
        ticket: Ticket,
        end: &CallEnd,
        now: Instant,
        draw: &mut impl Draw,
    ) -> Option<Transition> {
        let seen = self.mirror.load(Ordering::Relaxed);
        let slow = self.limits.slow_call_rate > 0 && end.is_slow(&self.limits);
        let abandoned = end.ended == Ended::Abandon;
        let fast = ticket == Ticket::closed(epoch_of(seen)) && state_of(seen) == CircuitState::Closed;
        if fast && abandoned {
            return None;
        }
        if fast && seen & CLEAN != 0 && end.ended == Ended::Succeed && !slow {
            self.window.add(CALLS, 1, now);
            return None;
        }
        self.step(now, |inner| {
            if !abandoned && inner.breaker.is_counted(ticket, &self.limits) {
                self.window.add(CALLS, 1, now);
                if end.ended == Ended::Fail {
                    self.window.add(FAILURES, 1, now);
                }
                if slow {
                    self.window.add(SLOW, 1, now);
                }
            }
            let counts = self.counts(now);
            inner
                .breaker
                .settle(ticket, end, &counts, now, &self.limits, draw)
        })
    }

    /// Changes the breaker under the lock, and mirrors what came of it.
    fn step<T: HasTransition>(&self, now: Instant, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.locked();
        let out = change(&mut inner);
        if let Some(transition) = out.transition() {
            inner.last = Some(transition);
            if transition.is_fresh() {
                self.window.clear();
            }
        }
        let word = mirror(&inner.breaker, now, &self.limits);
        self.mirror.store(word, Ordering::Relaxed);
        out
    }

    fn tell(&self, transition: Option<Transition>, changed: &mut impl FnMut(&Self, Transition)) {
        if let Some(transition) = transition {
            changed(self, transition);
        }
    }

    fn locked(&self) -> MutexGuard<'_, Inner> {
        // Poison is harmless: a breaker is a plain value, and every step leaves a valid one.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a circuit stands for a choice among endpoints.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum CircuitStanding {
    /// Calls pass.
    Passing,
    /// A growing share of calls passes.
    Ramping,
    /// A probe may pass.
    Probing,
    /// No call passes.
    Shut,
}

impl Pass {
    /// The call begins only now: it had to wait here, which is not the upstream's doing.
    pub const fn begin_at(&mut self, now: Instant) {
        self.since = now;
    }

    /// Whether the circuit would have refused the call, were it not only observing.
    pub const fn would_be_refused(&self) -> bool {
        self.ticket.would_be_refused()
    }

    /// Says how the call ended.
    pub fn settle(
        mut self,
        ended: Ended,
        now: Instant,
        draw: &mut impl Draw,
        changed: &mut impl FnMut(&Circuit, Transition),
    ) {
        self.settled = true;
        let took = now.saturating_duration_since(self.since);
        let transition = self
            .circuit
            .settle(self.ticket, &CallEnd { ended, took }, now, draw);
        self.circuit.tell(transition, changed);
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if !self.settled {
            let end = CallEnd {
                ended: Ended::Abandon,
                took: Duration::ZERO,
            };
            // What was abandoned changes no state, so neither the time nor chance is looked at.
            let transition = self.circuit.settle(self.ticket, &end, self.since, &mut Never);
            debug_assert!(transition.is_none(), "{transition:?}");
        }
    }
}

/// For where nothing is drawn.
struct Never;

impl Draw for Never {
    fn below(&mut self, _: u64) -> u64 {
        0
    }

    fn unit(&mut self) -> f64 {
        0.0
    }
}

trait HasTransition {
    fn transition(&self) -> Option<Transition>;
}

impl HasTransition for Option<Transition> {
    fn transition(&self) -> Option<Transition> {
        *self
    }
}

impl HasTransition for (Verdict, Option<Transition>) {
    fn transition(&self) -> Option<Transition> {
        self.1
    }
}

fn mirror(breaker: &Breaker, now: Instant, limits: &CircuitBreaker) -> u64 {
    let clean = if breaker.is_clean() { CLEAN } else { 0 };
    match (breaker.closed_epoch(limits), breaker.state(now, limits)) {
        (Some(epoch), _) => u64::from(epoch) << 32 | clean,
        // Its ramp is over, which the next call that asks finds out.
        (None, CircuitState::Closed) => u64::from(CircuitState::Ramping.code()),
        (None, state) => u64::from(state.code()),
    }
}

const fn state_of(mirror: u64) -> CircuitState {
    match mirror & 0b11 {
        0 => CircuitState::Closed,
        1 => CircuitState::Open,
        2 => CircuitState::HalfOpen,
        _ => CircuitState::Ramping,
    }
}

const fn epoch_of(mirror: u64) -> u32 {
    (mirror >> 32) as u32
}

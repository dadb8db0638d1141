//! What all workers share about one service: who is under way, budgets, limits, zones.

use crate::answers::Answers;
use crate::bulkhead::{Bulkhead, NoPlace, Place, Wait};
use crate::callers::Callers;
use crate::chance::Chance;
use crate::circuit::{Circuit, CircuitKind};
use crate::meter::Meter;
use crate::registry::millis;
use crate::reports::{Reported, Teller};
use crate::slots::{ConnectionSlot, Connections};
use dashmap::DashMap;
use leeward_policy::ServiceView;
use leeward_policy::model::{
    AdaptiveConcurrency, AdmissionControl, CircuitBreaker, ConnectionPool, PerCaller, Priority,
    ResiliencePolicy, RetryBudget,
};
use leeward_resilience::degrade::SignalSample;
use leeward_resilience::{
    Budget, CALLER_FOR, Draw, Gradient, Sample, Window, Word, Zones, rejection_probability, sheds,
    spare_for_each,
};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One service on one proxy.
#[derive(Debug)]
pub struct ServiceState {
    name: Arc<str>,
    origin: Instant,
    bulkhead: Arc<Bulkhead>,
    callers: DashMap<u64, u32>,
    /// Other proxies that call endpoints behind this one.
    remote_callers: Callers,
    remote_callers_turned: Mutex<Option<Instant>>,
    /// When an endpoint was last chosen, in milliseconds since the origin; 0 if none was.
    called_at: AtomicU64,
    reported: Mutex<HashMap<Teller, Arc<Reported>>>,
    connections: Arc<Connections>,
    retries: AtomicU32,
    held: AtomicU32,
    /// Requests that a limit refused, and those that came, since the start.
    refused: AtomicU64,
    offered: AtomicU64,
    /// Changes of its endpoints' health; a worker that sees another number looks at them anew.
    pub(crate) changes: AtomicU32,
    pub(crate) zones: Mutex<HashMap<Arc<str>, Zones<Arc<str>>>>,
    parts: Mutex<Parts>,
    demand: Mutex<Demand>,
    pub(crate) meter: Meter,
    /// How large the answers are that come from other proxies for requests by no rule.
    pub answers: Arc<Answers>,
    /// When rates were last looked at.
    looked_at: Mutex<Option<Instant>>,
}

/// What hangs on settings, each with the settings that it was made from: a change of policy makes anew only what
/// it is about.
#[derive(Debug, Default)]
struct Parts {
    retry: Option<(RetryBudget, Arc<Budget>)>,
    hedge: Option<(RetryBudget, Arc<Budget>)>,
    admission: Option<(AdmissionControl, Arc<Admission>)>,
    adaptive: Option<(AdaptiveConcurrency, Arc<Adaptive>)>,
    circuit: Option<(CircuitBreaker, Arc<Circuit>)>,
    /// What was made last.
    last: Option<Guards>,
    /// As last told: for metrics.
    pool: Option<ConnectionPool>,
    zones: Vec<(Arc<str>, f64)>,
    panic: bool,
}

/// The parts of a service's state that a worker uses, resolved for the policy in force.
#[derive(Clone, Debug)]
pub struct Guards {
    /// Bounds retries.
    pub retry: Arc<Budget>,
    /// Bounds hedges.
    pub hedge: Arc<Budget>,
    /// The service's circuit.
    pub circuit: Option<Arc<Circuit>>,
    /// Successes and requests of the last while.
    admission: Option<Arc<Admission>>,
    adaptive: Option<Arc<Adaptive>>,
    policy: Arc<ResiliencePolicy>,
}

/// What admission control looks back on.
#[derive(Debug)]
struct Admission {
    window: Window<2>,
    since: Instant,
}

/// The concurrency that a service bears.
#[derive(Debug)]
struct Adaptive {
    limit: AtomicU32,
    gradient: Mutex<Gradient>,
}

/// Mean demand of the last seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Demand {
    last: Option<Instant>,
    active: f64,
    wanted: f64,
    shed: f64,
    refused: u64,
    offered: u64,
}

/// How a service stands with its limits: for metrics. Formulas are in the metric catalogue.
#[derive(Clone, Debug)]
pub struct ServiceReading {
    /// The service.
    pub name: Arc<str>,
    /// Mean requests under way over the limit.
    pub utilization: f64,
    /// Mean requests under way, queued and held over the limit.
    pub saturation: f64,
    /// Share of requests refused.
    pub shed_ratio: f64,
    /// Requests held now.
    pub held: u32,
    /// Whether health is disregarded.
    pub panic: bool,
    /// Shares of the zones.
    pub zones: Vec<(Arc<str>, f64)>,
    /// How many more requests of this proxy's other zones report to have room for, those that do.
    pub spare: Vec<(Arc<str>, f64)>,
}

/// Leave to be under way at a service; given up when dropped.
#[derive(Debug)]
#[must_use = "dropping a permit gives it back"]
pub struct ServicePermit {
    _place: Place,
    _caller: Option<CallerPlace>,
}

/// A request that is under way.
#[derive(Debug)]
pub struct Entered {
    /// Its leave.
    pub permit: ServicePermit,
    /// Whether it had to wait.
    pub waited: bool,
}

/// One caller's place.
#[derive(Debug)]
struct CallerPlace {
    service: Arc<ServiceState>,
    caller: u64,
}

/// Leave to make one more attempt beside others; given up when dropped.
#[derive(Debug)]
pub struct RetryPermit(Arc<ServiceState>);

/// Leave to wait until the service has an endpoint; given up when dropped.
#[derive(Debug)]
pub struct HoldPermit(Arc<ServiceState>);

/// Why a request was refused here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// A bound of the connection pool.
    Overflow(&'static str),
    /// What spares the service.
    Overloaded(&'static str),
}

impl Refusal {
    /// The limit's name, as policy has it.
    pub const fn limit(self) -> &'static str {
        match self {
            Self::Overflow(limit) | Self::Overloaded(limit) => limit,
        }
    }
}

/// A request that asks to be under way.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Bounds of the service.
    pub pool: &'a ConnectionPool,
    /// How important it is.
    pub priority: Priority,
    /// A hash of who calls, where callers are bounded.
    pub caller: Option<u64>,
    /// When its time is up.
    pub until: Option<Instant>,
    /// How short of memory the process is, 0 to 1.
    pub pressure: f64,
}

const SUCCESSES: usize = 0;
const TOTAL: usize = 1;
/// What demand is averaged over.
const DEMAND_SPAN: Duration = Duration::from_secs(10);

impl ServiceState {
    pub(crate) fn new(name: Arc<str>, now: Instant) -> Self {
        Self {
            name,
            origin: now,
            bulkhead: Arc::default(),
            callers: DashMap::new(),
            remote_callers: Callers::default(),
            remote_callers_turned: Mutex::default(),
            called_at: AtomicU64::new(0),
            reported: Mutex::default(),
            connections: Arc::default(),
            retries: AtomicU32::new(0),
            held: AtomicU32::new(0),
            refused: AtomicU64::new(0),
            offered: AtomicU64::new(0),
            changes: AtomicU32::new(0),
            zones: Mutex::default(),
            parts: Mutex::default(),
            demand: Mutex::default(),
            meter: Meter::default(),
            answers: Arc::default(),
            looked_at: Mutex::default(),
        }
    }

    /// What the policy in force makes of the service. State whose settings are as they were is kept. Unless the
    /// caller has the `newest` policy it gets what that has made: a request that began before a change must not
    /// undo it for all others.
    pub(crate) fn guards(
        &self,
        policy: &Arc<ResiliencePolicy>,
        pool: &ConnectionPool,
        newest: bool,
        now: Instant,
    ) -> Guards {
        let mut parts = self.parts();
        if let (false, Some(last)) = (newest, &parts.last) {
            return last.clone();
        }
        self.bulkhead.resize(pool.max_requests);
        parts.pool = Some(pool.clone());
        let budget = |settings: &RetryBudget| Budget::new(settings, now);
        let guards = Guards {
            retry: keep(&mut parts.retry, &policy.retry_budget, || {
                budget(&policy.retry_budget)
            }),
            hedge: keep(&mut parts.hedge, &policy.hedge_budget, || {
                budget(&policy.hedge_budget)
            }),
            circuit: keep_some(&mut parts.circuit, policy.circuit_breaker.as_ref(), |settings| {
                Circuit::new(CircuitKind::Service, Arc::clone(&self.name), *settings, now)
            }),
            admission: keep_some(
                &mut parts.admission,
                policy.admission_control.as_ref(),
                |settings| Admission {
                    window: Window::new(settings.window, now),
                    since: now,
                },
            ),
            adaptive: keep_some(
                &mut parts.adaptive,
                policy.adaptive_concurrency.as_ref(),
                |settings| {
                    let gradient = Gradient::new(settings, now);
                    Adaptive {
                        limit: AtomicU32::new(gradient.limit(settings)),
                        gradient: Mutex::new(gradient),
                    }
                },
            ),
            policy: Arc::clone(policy),
        };
        parts.last = Some(guards.clone());
        guards
    }

    /// Asks for a request to be under way; waits in the queue where policy lets it.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    ///
    /// The limit that refuses it.
    pub async fn enter(
        self: &Arc<Self>,
        guards: &Guards,
        ask: &Ask<'_>,
        now: Instant,
        draw: &mut impl Draw,
    ) -> Result<Entered, Refusal> {
        self.offered.fetch_add(1, Ordering::Relaxed);
        let entered = match guards.spare(self.bulkhead.active(), ask, now, draw) {
            Err(refusal) => Err(refusal),
            Ok(()) => self.place(ask, now).await,
        };
        if entered.is_err() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        entered
    }

    async fn place(self: &Arc<Self>, ask: &Ask<'_>, now: Instant) -> Result<Entered, Refusal> {
        let caller = match (&ask.pool.per_caller, ask.caller) {
            (Some(bounds), Some(caller)) => Some(
                self.caller(caller, bounds)
                    .ok_or(Refusal::Overflow("perCaller.maxRequests"))?,
            ),
            (None, _) | (_, None) => None,
        };
        let mut waited = false;
        let place = match self.bulkhead.try_enter() {
            Some(place) => place,
            None => {
                let patience = now + ask.pool.pending_timeout;
                let wait = Wait {
                    max_waiting: ask.pool.max_pending_requests,
                    priority: ask.priority,
                    until: ask.until.map_or(patience, |until| until.min(patience)),
                };
                waited = true;
                // Rare, so it doesn't belong in the size of every request's future.
                let entered = Box::pin(self.bulkhead.enter(Some(wait))).await;
                entered.map_err(|why| {
                    Refusal::Overflow(match why {
                        NoPlace::Full => "maxRequests",
                        NoPlace::QueueFull => "maxPendingRequests",
                        NoPlace::TimedOut => "pendingTimeout",
                    })
                })?
            }
        };
        Ok(Entered {
            permit: ServicePermit {
                _place: place,
                _caller: caller,
            },
            waited,
        })
    }

    fn caller(self: &Arc<Self>, caller: u64, bounds: &PerCaller) -> Option<CallerPlace> {
        let mut active = self.callers.entry(caller).or_default();
        if *active >= bounds.max_requests {
            return None;
        }
        *active += 1;
        Some(CallerPlace {
            service: Arc::clone(self),
            caller,
        })
    }

    /// Leave for one more retry or hedge beside others.
    pub fn retry(self: &Arc<Self>, max: u32) -> Option<RetryPermit> {
        claim(&self.retries, max).then(|| RetryPermit(Arc::clone(self)))
    }

    /// Leave to wait for an endpoint.
    pub fn hold(self: &Arc<Self>, max: u32) -> Option<HoldPermit> {
        claim(&self.held, max).then(|| HoldPermit(Arc::clone(self)))
    }

    /// Room for one more connection.
    pub(crate) fn connection(&self, max: u32) -> Option<ConnectionSlot> {
        self.connections.open(max)
    }

    /// Closes a connection that is idle, whichever worker has it, so that another endpoint can have one. It is
    /// gone a moment later. False if none is idle.
    pub fn close_one_idle(&self) -> bool {
        self.connections.close_one_idle()
    }

    /// Requests under way.
    pub fn active(&self) -> u32 {
        self.bulkhead.active()
    }

    /// Requests under way and waiting.
    pub(crate) fn wanted(&self) -> u32 {
        self.bulkhead.active().saturating_add(self.bulkhead.waiting())
    }

    /// Another proxy, which is known by a hash, calls an endpoint behind this one.
    pub fn called_by(&self, proxy: u64) {
        self.remote_callers.note(proxy);
    }

    /// How many more requests each other proxy that calls now may have under way here: by what this one would let
    /// be under way, fewer of `max_requests` and the limit that was found from latency, less the most that was since the
    /// last call, and what waits. For one who calls about once a second.
    pub fn take_spare(&self, max_requests: u32) -> u32 {
        let adaptive = self
            .parts()
            .adaptive
            .as_ref()
            .map(|(_, adaptive)| adaptive.limit());
        let limit = adaptive.unwrap_or(u32::MAX).min(max_requests);
        let taken = self.bulkhead.take_peak().saturating_add(self.bulkhead.waiting());
        let (spare, callers) = (limit.saturating_sub(taken), self.remote_callers.count());
        match spare_for_each(spare, callers) {
            // Less than one for each is one for each now and then: else what is there would be nobody's for good.
            0 if spare > 0 => u32::from(Chance.below(u64::from(callers) * 2) < u64::from(spare)),
            each => each,
        }
    }

    /// An endpoint is chosen.
    pub(crate) fn is_called(&self, now: Instant) {
        let now = millis(self.origin, now).max(1);
        self.called_at.store(now, Ordering::Relaxed);
    }

    /// Whether one was chosen lately.
    pub(crate) fn called_within(&self, time: Duration, now: Instant) -> bool {
        let at = self.called_at.load(Ordering::Relaxed);
        let since = Duration::from_millis(millis(self.origin, now).saturating_sub(at));
        at > 0 && since < time
    }

    /// What is known of the service by what somebody tells, made at the first call.
    pub(crate) fn reported(&self, teller: Teller) -> Arc<Reported> {
        let mut reported = self.told();
        Arc::clone(reported.entry(teller).or_default())
    }

    /// What another proxy of a gateway's zone says of it, if that was heard lately.
    pub fn word_of(&self, proxy: &Arc<str>) -> Option<Word> {
        let teller = Teller::Mate(Arc::clone(proxy));
        self.told().get(&teller)?.word()
    }

    /// What each zone reports to have to spare for this proxy, of those that report.
    fn spare_elsewhere(&self) -> Vec<(Arc<str>, f64)> {
        let reported = self.told();
        let mut zones: BTreeMap<&Arc<str>, f64> = BTreeMap::new();
        for (teller, known) in &*reported {
            if let Some((zone, word)) = teller.zone().zip(known.word()) {
                *zones.entry(zone).or_default() += f64::from(word.spare);
            }
        }
        zones
            .into_iter()
            .map(|(zone, spare)| (Arc::clone(zone), spare))
            .collect()
    }

    fn told(&self) -> std::sync::MutexGuard<'_, HashMap<Teller, Arc<Reported>>> {
        self.reported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets proxies that no endpoint is behind any more.
    pub(crate) fn forget_reports(&self) {
        let mut reported = self.told();
        // One count is the map's own.
        reported.retain(|_, known| Arc::strong_count(known) > 1);
    }

    /// The zones' shares as they were last computed.
    pub(crate) fn tell_shares(&self, zones: Vec<(Arc<str>, f64)>, panic: bool) {
        let mut parts = self.parts();
        parts.zones = zones;
        parts.panic = panic;
    }

    pub(crate) fn circuit(&self) -> Option<Arc<Circuit>> {
        self.parts()
            .circuit
            .as_ref()
            .map(|(_, circuit)| Arc::clone(circuit))
    }

    /// Takes a sample of demand; call about once a second.
    pub(crate) fn sample(&self, now: Instant) {
        self.turn_callers(now);
        let mut demand = self.demand.lock().unwrap_or_else(PoisonError::into_inner);
        let (refused, offered) = (
            self.refused.load(Ordering::Relaxed),
            self.offered.load(Ordering::Relaxed),
        );
        let elapsed = demand.last.map(|last| now.saturating_duration_since(last));
        // The share of the old mean that is left: an exponential average over DEMAND_SPAN.
        let left = elapsed.map_or(0.0, |elapsed| {
            (-elapsed.as_secs_f64() / DEMAND_SPAN.as_secs_f64()).exp()
        });
        let mix = |old: f64, new: f64| old.mul_add(left, new * (1.0 - left));
        let active = f64::from(self.bulkhead.active());
        let wanted =
            active + f64::from(self.bulkhead.waiting()) + f64::from(self.held.load(Ordering::Relaxed));
        let came = offered.saturating_sub(demand.offered);
        #[expect(clippy::cast_precision_loss, reason = "requests of a second are few")]
        let shed = if came == 0 {
            0.0
        } else {
            // One that was refused after a wait came in an earlier second.
            (refused.saturating_sub(demand.refused) as f64 / came as f64).min(1.0)
        };
        *demand = Demand {
            last: Some(now),
            active: mix(demand.active, active),
            wanted: mix(demand.wanted, wanted),
            shed: mix(demand.shed, shed),
            refused,
            offered,
        };
    }

    fn turn_callers(&self, now: Instant) {
        let mut turned = self
            .remote_callers_turned
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let last = *turned.get_or_insert(now);
        if now.saturating_duration_since(last) >= CALLER_FOR {
            *turned = Some(now);
            self.remote_callers.turn();
        }
    }

    /// Forgets the zones of subsets that no route names any longer.
    pub(crate) fn forget_subsets(&self, view: &ServiceView) {
        let mut zones = self.zones.lock().unwrap_or_else(PoisonError::into_inner);
        zones.retain(|id, _| id.is_empty() || view.subsets.iter().any(|subset| subset.id == *id));
    }

    /// Whether rates are to be looked at: once in each interval, the first time a whole one after the start.
    pub(crate) fn outlier_round(&self, interval: Duration, now: Instant) -> bool {
        let mut looked_at = self.looked_at.lock().unwrap_or_else(PoisonError::into_inner);
        let last = *looked_at.get_or_insert(now);
        let due = now.saturating_duration_since(last) >= interval;
        if due {
            *looked_at = Some(now);
        }
        due
    }

    /// A call has ended: what that says to the triggers of degradation. Calls that were refused here are none. `took`
    /// is the time to the answer's head, or until it was given up.
    pub fn ended(&self, failed: bool, took: Option<Duration>) {
        self.meter.ended(failed, took);
    }

    /// What triggers look at, since the last time, but for the circuit; `None` if policy has none for the service.
    pub(crate) fn signals(&self) -> Option<SignalSample> {
        let sample = self.meter.drain()?;
        let demand = *self.demand.lock().unwrap_or_else(PoisonError::into_inner);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a mean of counts is neither negative nor large, and a cast saturates"
        )]
        let wanted = (demand.wanted * 1000.0).round() as u64;
        Some(SignalSample {
            demand: wanted,
            limit: self.parts().limit().into(),
            ..sample
        })
    }

    /// How the service stands with its limits.
    pub(crate) fn reading(&self) -> ServiceReading {
        let demand = *self.demand.lock().unwrap_or_else(PoisonError::into_inner);
        let parts = self.parts();
        let limit = f64::from(parts.limit());
        ServiceReading {
            name: Arc::clone(&self.name),
            utilization: demand.active / limit,
            saturation: demand.wanted / limit,
            shed_ratio: demand.shed,
            held: self.held.load(Ordering::Relaxed),
            panic: parts.panic,
            zones: parts.zones.clone(),
            spare: self.spare_elsewhere(),
        }
    }

    /// The service's name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(crate) const fn origin(&self) -> Instant {
        self.origin
    }

    /// Its endpoints' health has changed.
    pub(crate) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Relaxed);
    }

    /// The circuit of one of its endpoints has changed.
    pub fn circuit_changed(&self) {
        self.changed();
    }

    fn parts(&self) -> std::sync::MutexGuard<'_, Parts> {
        // Poison is harmless: each part is replaced whole.
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Parts {
    /// How many requests may be under way, 1 at least.
    fn limit(&self) -> u32 {
        let bound = self
            .pool
            .as_ref()
            .map_or(ConnectionPool::DEFAULT.max_requests, |pool| pool.max_requests);
        let adaptive = self.adaptive.as_ref().map(|(_, adaptive)| adaptive.limit());
        adaptive.unwrap_or(bound).min(bound).max(1)
    }
}

impl Guards {
    /// Whether the service is to be spared this request.
    fn spare(&self, active: u32, ask: &Ask<'_>, now: Instant, draw: &mut impl Draw) -> Result<(), Refusal> {
        let adaptive = self.adaptive.as_ref().map(|adaptive| adaptive.limit());
        if let Some(marks) = &self.policy.load_shedding {
            let limit = adaptive.unwrap_or(u32::MAX).min(ask.pool.max_requests).max(1);
            // As it will be with this request.
            let utilisation = (f64::from(active.saturating_add(1)) / f64::from(limit)).max(ask.pressure);
            if sheds(ask.priority, utilisation, marks, draw) {
                return Err(Refusal::Overloaded("loadShedding"));
            }
        }
        if adaptive.is_some_and(|limit| active >= limit) {
            return Err(Refusal::Overloaded("adaptiveConcurrency"));
        }
        if let (Some(admission), Some(settings)) = (&self.admission, &self.policy.admission_control) {
            let [successes, total] = admission.window.sums(now);
            let elapsed = now
                .saturating_duration_since(admission.since)
                .min(settings.window);
            let refused = rejection_probability(total, successes, elapsed, settings);
            if refused > 0.0 && draw.unit() < refused {
                return Err(Refusal::Overloaded("admissionControl"));
            }
        }
        Ok(())
    }

    /// A call has ended: what that says of admission and, if the service worked on it, of the concurrency that it
    /// bears.
    pub fn ended(&self, success: bool, sample: Option<Sample>, now: Instant, draw: &mut impl Draw) {
        if let Some(admission) = &self.admission {
            // Only what ended counts: refusals made here say nothing of the service, and would keep it from
            // coming back.
            admission.window.add(TOTAL, 1, now);
            if success {
                admission.window.add(SUCCESSES, 1, now);
            }
        }
        if let (Some(adaptive), Some(settings), Some(sample)) =
            (&self.adaptive, &self.policy.adaptive_concurrency, sample)
        {
            // Poison is harmless: the worst is a limit that is one sample late.
            let mut gradient = adaptive.gradient.lock().unwrap_or_else(PoisonError::into_inner);
            gradient.sample(sample, now, settings, draw);
            adaptive.limit.store(gradient.limit(settings), Ordering::Relaxed);
        }
    }
}

impl Adaptive {
    fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }
}

/// What is there for these settings, or is made for them.
fn keep<S: Clone + PartialEq, T>(
    slot: &mut Option<(S, Arc<T>)>,
    settings: &S,
    make: impl FnOnce() -> T,
) -> Arc<T> {
    if let Some((known, part)) = slot
        && known == settings
    {
        return Arc::clone(part);
    }
    let part = Arc::new(make());
    *slot = Some((settings.clone(), Arc::clone(&part)));
    part
}

fn keep_some<S: Clone + PartialEq, T>(
    slot: &mut Option<(S, Arc<T>)>,
    settings: Option<&S>,
    make: impl FnOnce(&S) -> T,
) -> Option<Arc<T>> {
    match settings {
        Some(settings) => Some(keep(slot, settings, || make(settings))),
        None => {
            *slot = None;
            None
        }
    }
}

/// One more, unless there are as many as may be.
fn claim(count: &AtomicU32, max: u32) -> bool {
    let free = |n: u32| (n < max).then_some(n + 1);
    count
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, free)
        .is_ok()
}

impl Drop for CallerPlace {
    fn drop(&mut self) {
        self.service.callers.remove_if_mut(&self.caller, |_, active| {
            *active = active.saturating_sub(1);
            *active == 0
        });
    }
}

impl Drop for RetryPermit {
    fn drop(&mut self) {
        self.0.retries.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for HoldPermit {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
    }
}

//! What all workers share about endpoints and services.

use crate::answers::Answers;
use crate::circuit::{Circuit, CircuitKind, CircuitReading};
use crate::gateways::GatewayState;
use crate::plain::{Owned, ends};
use crate::reports::{Reported, Teller};
use crate::service::{ServiceReading, ServiceState};
use dashmap::DashMap;
use leeward_policy::model::{BreakerMode, CircuitBreaker, Ewma, OutlierDetection};
use leeward_policy::{EndpointKey, GatewayView, Held, RuleView, ServiceView, Snapshot, Via};
use leeward_resilience::degrade::SignalSample;
use leeward_resilience::{
    AnswerSize, Change, Checked, CircuitState, Draw, EjectionReason, Event, Health, PeakEwma, Standing,
    Tally, may_eject, outliers,
};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Run-time state by stable id. It survives every change of policy that leaves the id in place.
#[derive(Debug)]
pub struct Registry {
    origin: Instant,
    endpoints: DashMap<EndpointKey, Arc<EndpointState>>,
    services: DashMap<Arc<str>, Arc<ServiceState>>,
    rules: DashMap<Arc<str>, Arc<Circuit>>,
    /// By rule, as many as policy has.
    answers: DashMap<Arc<str>, Arc<Answers>>,
    gateways: DashMap<GatewayView, Arc<GatewayState>>,
    /// What changes of gateways are counted by. There is no service of this name.
    of_gateways: Arc<ServiceState>,
    /// Where the connections come from that this process has made for others' bytes.
    own: Arc<Owned>,
}

/// How one endpoint that is left out stands, for people and metrics.
#[derive(Clone, Debug)]
pub struct EndpointReading {
    /// Which.
    pub key: EndpointKey,
    /// How it stands.
    pub standing: Standing,
    /// Why it was ejected.
    pub why: Option<EjectionReason>,
    /// Until the end of its ejection, or its next probe.
    pub until: Option<Duration>,
}

impl Registry {
    /// Nothing known yet.
    pub fn new(now: Instant) -> Self {
        Self {
            origin: now,
            endpoints: DashMap::new(),
            services: DashMap::new(),
            rules: DashMap::new(),
            answers: DashMap::new(),
            gateways: DashMap::new(),
            of_gateways: Arc::new(ServiceState::new(Arc::from(""), now)),
            own: Arc::default(),
        }
    }

    /// The state of a gateway of another zone, made at the first call.
    pub(crate) fn gateway(&self, view: &GatewayView, now: Instant) -> Arc<GatewayState> {
        let made = || {
            let health = EndpointState::new(Arc::clone(&self.of_gateways), now);
            Arc::new(GatewayState::new(view.clone(), Arc::new(health)))
        };
        Arc::clone(&self.gateways.entry(view.clone()).or_insert_with(made))
    }

    /// Whether a gateway may be asked, as far as that is known.
    pub(crate) fn is_gateway_open(&self, view: &GatewayView, now: Instant) -> bool {
        self.gateways.get(view).is_none_or(|state| state.is_open(now))
    }

    /// What counts changes of all gateways' health.
    pub(crate) const fn of_gateways(&self) -> &Arc<ServiceState> {
        &self.of_gateways
    }

    /// Each gateway that policy names for other zones, if it was used, and how it stands.
    pub fn gateways(&self, snapshot: &Snapshot, now: Instant) -> Vec<(GatewayView, Standing)> {
        let named = snapshot.services().iter().flat_map(|view| view.endpoints.iter());
        let named = named
            .filter_map(|endpoint| endpoint.gateways.as_deref())
            .flatten();
        let mut seen = HashSet::new();
        named
            .filter(|view| seen.insert(*view))
            .filter_map(|view| {
                let known = self.gateways.get(view)?;
                Some((view.clone(), known.health.standing(now)))
            })
            .collect()
    }

    pub(crate) const fn own(&self) -> &Arc<Owned> {
        &self.own
    }

    /// Whether a connection between these addresses is one that this process has made itself, for bytes of another: were
    /// it captured and sent on, it would go in a circle.
    pub fn is_own(&self, from: SocketAddr, to: SocketAddr) -> bool {
        self.own.contains(&ends(from, to))
    }

    /// What is known of where policy knows nobody, for one client: nothing, and nothing is remembered.
    pub(crate) fn apart(&self, name: &Arc<str>, now: Instant) -> (Arc<ServiceState>, Arc<EndpointState>) {
        let service = Arc::new(ServiceState::new(Arc::clone(name), self.origin));
        let endpoint = Arc::new(EndpointState::new(Arc::clone(&service), now));
        (service, endpoint)
    }

    /// The state of an endpoint, made at the first call.
    pub fn endpoint(&self, key: &EndpointKey, now: Instant) -> Arc<EndpointState> {
        if let Some(state) = self.endpoints.get(key) {
            return Arc::clone(&state);
        }
        let service = self.service(&key.service);
        let made = || {
            let behind = match &key.via {
                Via::Proxy { zone, name, .. } => {
                    Some(service.reported(Teller::Proxy(Arc::clone(zone), Arc::clone(name))))
                }
                Via::Gateway { zone, .. } => Some(service.reported(Teller::Gateways(Arc::clone(zone)))),
                Via::Direct => None,
            };
            let mut state = EndpointState::new(service, now);
            state.behind = behind;
            Arc::new(state)
        };
        Arc::clone(&self.endpoints.entry(key.clone()).or_insert_with(made))
    }

    /// The state of a service, made at the first call.
    pub fn service(&self, name: &Arc<str>) -> Arc<ServiceState> {
        if let Some(state) = self.services.get(name) {
            return Arc::clone(&state);
        }
        let made = || Arc::new(ServiceState::new(Arc::clone(name), self.origin));
        Arc::clone(&self.services.entry(Arc::clone(name)).or_insert_with(made))
    }

    /// The state of a service that there is.
    pub(crate) fn called(&self, name: &str) -> Option<Arc<ServiceState>> {
        self.services.get(name).map(|state| Arc::clone(&state))
    }

    /// The circuit of a rule that has one. Other settings make another circuit, but only for who sees the newest
    /// policy: a request that still runs under an older one takes what there is.
    pub fn rule(&self, rule: &RuleView, limits: CircuitBreaker, newest: bool, now: Instant) -> Arc<Circuit> {
        let made = || {
            let circuit = Circuit::new(CircuitKind::Route, Arc::clone(&rule.id), limits, now);
            Arc::new(circuit)
        };
        // Under the entry's lock, so that workers that come at once share one.
        let mut known = self.rules.entry(Arc::clone(&rule.id)).or_insert_with(made);
        if newest && *known.limits() != limits {
            *known = made();
        }
        Arc::clone(&known)
    }

    /// How large a rule's answers are, made at the first call.
    pub(crate) fn answers(&self, rule: &RuleView) -> Arc<Answers> {
        Arc::clone(&self.answers.entry(Arc::clone(&rule.id)).or_default())
    }

    /// How large answers from other proxies are: those of each rule of the policy in force, and those of each service that
    /// come by no rule, where there was any.
    pub fn answer_sizes(&self, snapshot: &Snapshot) -> Vec<(&'static str, Arc<str>, AnswerSize)> {
        let of_rules = snapshot.rules().iter().filter_map(|rule| {
            let size = self.answers.get(&rule.id)?.size();
            Some(("route", Arc::clone(&rule.id), size))
        });
        let of_services = snapshot.services().iter().filter_map(|view| {
            let size = self.services.get(&view.name)?.answers.size();
            Some(("service", Arc::clone(&view.name), size))
        });
        of_rules
            .chain(of_services)
            .filter(|(_, _, size)| *size != AnswerSize::default())
            .collect()
    }

    /// Takes in what an endpoint's active checks say.
    pub fn checked(&self, key: &EndpointKey, checked: Checked, now: Instant) -> Option<Change> {
        self.endpoint(key, now).check(checked, now)
    }

    /// A check has passed that changes no verdict: it shows all the same that the endpoint can be reached.
    pub fn reached(&self, key: &EndpointKey, now: Instant) -> Option<Change> {
        let state = self.endpoints.get(key).map(|state| Arc::clone(&state))?;
        let fine = state.clean.load(Ordering::Relaxed) || state.failing.load(Ordering::Relaxed);
        if fine {
            return None;
        }
        state.check(Checked::Passing, now)
    }

    /// Looks at rates, and at demand. Call about once a second. `changed` is told of what was ejected.
    pub fn tend(
        &self,
        snapshot: &Snapshot,
        now: Instant,
        draw: &mut impl Draw,
        mut changed: impl FnMut(&EndpointKey, Change),
    ) {
        for view in snapshot.services() {
            let Some(state) = self.services.get(&view.name).map(|s| Arc::clone(&s)) else {
                continue;
            };
            state.sample(now);
            self.eject_outliers(view, &state, now, draw, &mut changed);
        }
    }

    fn eject_outliers(
        &self,
        view: &ServiceView,
        state: &ServiceState,
        now: Instant,
        draw: &mut impl Draw,
        changed: &mut impl FnMut(&EndpointKey, Change),
    ) {
        let settings = &view.spec.outlier;
        if !state.outlier_round(settings.interval, now) {
            return;
        }
        let states: Vec<_> = view
            .endpoints
            .iter()
            .map(|e| self.endpoint(&e.key, now))
            .collect();
        let tallies: Vec<Tally> = states
            .iter()
            .enumerate()
            .map(|(endpoint, state)| state.take_tally(endpoint))
            .filter(|tally| tally.requests > 0)
            .collect();
        for (endpoint, why) in outliers(&tallies, settings) {
            let (Some(state), Some(seen)) = (states.get(endpoint), view.endpoints.get(endpoint)) else {
                continue;
            };
            let ejected = states.iter().filter(|s| s.is_ejected(now)).count();
            let allowed = may_eject(
                u32::try_from(ejected).unwrap_or(u32::MAX),
                u32::try_from(states.len()).unwrap_or(u32::MAX),
                settings.max_ejection_percent,
            );
            if allowed && let Some(change) = state.eject(why, now, settings, draw) {
                changed(&seen.key, change);
            }
        }
    }

    /// Forgets what no worker refers to any more. Call now and then; endpoints under the current policy
    /// that were not called since lose only a clean slate.
    pub fn sweep(&self, snapshot: &Snapshot) {
        self.endpoints
            .retain(|_, state| Arc::strong_count(state) > 1 || !state.is_at_rest());
        self.gateways.retain(|_, state| Arc::strong_count(state) > 1);
        for view in snapshot.services() {
            if let Some(state) = self.services.get(&view.name) {
                state.forget_subsets(view);
                state.forget_reports();
            }
        }
        self.services
            .retain(|name, state| Arc::strong_count(state) > 1 || snapshot.service_named(name).is_some());
        let rules: HashMap<&str, bool> = snapshot
            .rules()
            .iter()
            .map(|rule| (&*rule.id, rule.circuit_breaker.is_some()))
            .collect();
        self.rules
            .retain(|id, _| rules.get(&**id).copied().unwrap_or(false));
        // One that a worker has may be of a policy that came after this one.
        self.answers
            .retain(|id, answers| Arc::strong_count(answers) > 1 || rules.contains_key(&**id));
    }

    /// Endpoints of the policy in force that are left out, with the reason.
    pub fn left_out(&self, snapshot: &Snapshot, now: Instant) -> Vec<EndpointReading> {
        let of = snapshot.services().iter().flat_map(|view| view.endpoints.iter());
        of.filter_map(|seen| {
            let state = self.endpoints.get(&seen.key).map(|s| Arc::clone(&s))?;
            state.reading(&seen.key, now)
        })
        .collect()
    }

    /// Every circuit of the policy in force, and those without a breaker that somebody holds. `wall` is the time
    /// by which that ends.
    pub fn circuits(&self, snapshot: &Snapshot, now: Instant, wall: SystemTime) -> Vec<CircuitReading> {
        let mut circuits = Vec::new();
        for view in snapshot.services() {
            let own = self.services.get(&view.name).and_then(|state| state.circuit());
            let own = own.map(|circuit| circuit.reading(now));
            circuits.extend(held(own, CircuitKind::Service, &view.name, view.held, wall));
            for seen in view.endpoints.iter() {
                let circuit = self.endpoints.get(&seen.key).and_then(|state| state.circuit());
                circuits.extend(circuit.map(|circuit| circuit.reading(now)));
            }
        }
        for rule in snapshot.rules() {
            let own = self.rules.get(&rule.id).map(|circuit| circuit.reading(now));
            circuits.extend(held(own, CircuitKind::Route, &rule.id, rule.held, wall));
        }
        circuits
    }

    /// Counts calls from now on of the services that a policy's triggers look at, and of no others. Call whenever
    /// policy has changed.
    pub fn watch_signals(&self, snapshot: &Snapshot) {
        let watched = watched(snapshot);
        for service in &self.services {
            service.meter.turn(watched.contains(service.name()));
        }
        for name in watched {
            self.service(name).meter.turn(true);
        }
    }

    /// What was seen of the services that a policy's triggers look at, since the last time, in the order of their
    /// names. An open circuit is one that refuses calls, also while it lets probes through. `wall` is the time by
    /// which somebody's hold on a circuit ends.
    pub fn signals(
        &self,
        snapshot: &Snapshot,
        now: Instant,
        wall: SystemTime,
    ) -> Vec<(Arc<str>, SignalSample)> {
        let of = |name: &Arc<str>| {
            let state = self.services.get(name).map(|state| Arc::clone(&state))?;
            let view = snapshot
                .service_named(name)
                .and_then(|idx| snapshot.service(idx))?;
            let own = state.circuit().map(|circuit| circuit.reading(now));
            let circuit = held(own, CircuitKind::Service, name, view.held, wall);
            let sample = SignalSample {
                circuit_open: circuit.is_some_and(|circuit| refuses(&circuit)),
                ..state.signals()?
            };
            Some((Arc::clone(name), sample))
        };
        watched(snapshot).into_iter().filter_map(of).collect()
    }

    /// How every service of the policy in force stands with its limits.
    pub fn demand(&self, snapshot: &Snapshot) -> Vec<ServiceReading> {
        let views = snapshot.services().iter();
        views
            .filter_map(|view| Some(self.services.get(&view.name)?.reading()))
            .collect()
    }
}

/// The services that triggers look at, but for those that policy hasn't.
fn watched(snapshot: &Snapshot) -> BTreeSet<&Arc<str>> {
    let triggers = snapshot
        .degradations()
        .iter()
        .flat_map(|view| &view.spec.triggers);
    triggers
        .filter_map(|trigger| {
            let idx = snapshot.service_named(trigger.signal.service().as_str())?;
            Some(&snapshot.service(idx)?.name)
        })
        .collect()
}

/// Whether calls are refused but for probes. A circuit that only observes, or is held closed, refuses none.
const fn refuses(circuit: &CircuitReading) -> bool {
    match (circuit.mode, circuit.state) {
        (BreakerMode::ForceOpen, _) | (BreakerMode::Enforce, CircuitState::Open | CircuitState::HalfOpen) => {
            true
        }
        (BreakerMode::Enforce, CircuitState::Closed | CircuitState::Ramping)
        | (BreakerMode::Observe | BreakerMode::ForceClosed, _) => false,
    }
}

/// A circuit as it is while somebody holds it.
fn held(
    own: Option<CircuitReading>,
    kind: CircuitKind,
    name: &Arc<str>,
    held: Option<Held>,
    wall: SystemTime,
) -> Option<CircuitReading> {
    let Some((held, left)) = held.and_then(|held| Some((held, held.until.duration_since(wall).ok()?))) else {
        return own;
    };
    let open = held.mode == BreakerMode::ForceOpen;
    Some(CircuitReading {
        kind,
        name: Arc::clone(name),
        state: if open {
            CircuitState::Open
        } else {
            CircuitState::Closed
        },
        mode: held.mode,
        why: None,
        until: Some(left),
        counts: own.map(|own| own.counts).unwrap_or_default(),
    })
}

/// What is known of one endpoint.
#[derive(Debug)]
pub struct EndpointState {
    service: Arc<ServiceState>,
    /// What is known of the service behind the proxy in front of it, or behind the gateways of its zone, if there are such.
    behind: Option<Arc<Reported>>,
    /// True while nothing is held against the endpoint, which is nearly always: the lock is for the rest.
    /// Relaxed is enough: a worker that reads a stale value is one request late.
    clean: AtomicBool,
    /// Its checks fail.
    failing: AtomicBool,
    active: AtomicU32,
    /// A [`PeakEwma`]; 0 until there is a guess. Threads may overwrite each other's samples, which costs a
    /// sample.
    latency: AtomicU64,
    /// Until when it asked to be left alone, in milliseconds since the origin.
    pushed_back: AtomicU64,
    /// When it was first seen, or came back, likewise.
    since: AtomicU64,
    /// Until when it is ejected, likewise. Beside `health`, since whoever asks how many endpoints are ejected
    /// holds the lock of one, and must not wait for another's.
    ejected_until: AtomicU64,
    /// Requests and failures since rates were last looked at: 32 bits each.
    tally: AtomicU64,
    health: Mutex<Health>,
    circuit: Mutex<Option<Arc<Circuit>>>,
}

/// A request's place among those under way at an endpoint; given up when dropped.
#[derive(Debug)]
pub struct UnderWay(Arc<EndpointState>);

/// The longest pause that an endpoint can ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// What an endpoint that asked to be left alone counts as, in seconds: more than any latency.
const PUSHED_BACK: f64 = 300.0;

impl EndpointState {
    fn new(service: Arc<ServiceState>, now: Instant) -> Self {
        let since = millis(service.origin(), now);
        Self {
            service,
            behind: None,
            clean: AtomicBool::new(true),
            failing: AtomicBool::new(false),
            active: AtomicU32::new(0),
            latency: AtomicU64::new(0),
            pushed_back: AtomicU64::new(0),
            since: AtomicU64::new(since),
            ejected_until: AtomicU64::new(0),
            tally: AtomicU64::new(0),
            health: Mutex::new(Health::NEW),
            circuit: Mutex::default(),
        }
    }

    /// How the endpoint stands.
    pub fn standing(&self, now: Instant) -> Standing {
        if self.is_clean() {
            Standing::Healthy
        } else {
            self.health().standing(now)
        }
    }

    /// Whether it is ejected. Takes no lock.
    pub(crate) fn is_ejected(&self, now: Instant) -> bool {
        self.ejected_until.load(Ordering::Relaxed) > millis(self.service.origin(), now)
    }

    /// Takes the probe that is due; true for one caller.
    pub fn probe(&self, now: Instant) -> bool {
        self.change(|health| health.probe(now))
    }

    /// Writes down how a call ended. `may_eject` is asked before the endpoint is ejected, and must take no
    /// endpoint's lock.
    pub fn note(
        &self,
        event: Event,
        now: Instant,
        settings: &OutlierDetection,
        may_eject: impl FnOnce() -> bool,
        draw: &mut impl Draw,
    ) -> Option<Change> {
        if event == Event::Succeed && self.clean.load(Ordering::Relaxed) {
            return None;
        }
        let change = self.change(|health| {
            let (next, change) = health.on(event, now, settings, may_eject, draw);
            *health = next;
            change
        });
        self.changed(change, now);
        change
    }

    /// Counts a call for the rates.
    pub fn count(&self, failed: bool) {
        let by = if failed { 1 << 32 | 1 } else { 1 << 32 };
        self.tally.fetch_add(by, Ordering::Relaxed);
    }

    /// A request is under way from now on.
    pub fn begin(self: &Arc<Self>) -> UnderWay {
        self.active.fetch_add(1, Ordering::Relaxed);
        if let Some(behind) = &self.behind {
            behind.begin();
        }
        UnderWay(Arc::clone(self))
    }

    /// What is known of the service behind the proxy in front of it, or behind the gateways of its zone.
    pub(crate) const fn behind(&self) -> Option<&Arc<Reported>> {
        self.behind.as_ref()
    }

    /// Whether the proxy in front of it, or its zone, would take one more request.
    pub(crate) fn has_room(&self) -> bool {
        self.behind.as_ref().is_none_or(|behind| behind.has_room())
    }

    /// Requests under way.
    pub fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }

    /// Takes in how long a call took, or is to count as.
    pub fn took(&self, took: Duration, now: Instant, settings: &Ewma) {
        let now = wrapping_millis(self.service.origin(), now);
        let before = PeakEwma::from_bits(self.latency.load(Ordering::Relaxed));
        let after = before.observe(took, now, settings);
        self.latency.store(after.to_bits(), Ordering::Relaxed);
    }

    /// Takes in that a call was given up after so long. It would have taken longer, so that this can only raise
    /// what is known.
    pub fn outlasted(&self, patience: Duration, now: Instant, settings: &Ewma) {
        let known = self.latency(millis(self.service.origin(), now), settings);
        if patience.as_secs_f64() > known {
            self.took(patience, now, settings);
        }
    }

    /// What is assumed of it before its first call. The guess fades like what was measured, so that it is tried
    /// among fast ones.
    pub(crate) fn guess(&self, now: Instant, settings: &Ewma) {
        let guess = PeakEwma::new(wrapping_millis(self.service.origin(), now), settings).to_bits();
        // Whoever was called before, or guessed, was first.
        let _ = self
            .latency
            .compare_exchange(0, guess, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// It asked to be left alone for so long; for five minutes at most.
    pub fn push_back(&self, length: Duration, now: Instant) {
        let until = millis(self.service.origin(), now + length.min(LONGEST_PAUSE));
        self.pushed_back.fetch_max(until, Ordering::Relaxed);
    }

    /// Its latency in seconds.
    pub(crate) fn latency(&self, now: u64, settings: &Ewma) -> f64 {
        if self.pushed_back.load(Ordering::Relaxed) > now {
            return PUSHED_BACK;
        }
        PeakEwma::from_bits(self.latency.load(Ordering::Relaxed)).estimate(wrap(now), settings)
    }

    /// How long ago it was first seen, or came back.
    pub(crate) fn age(&self, now: u64) -> Duration {
        Duration::from_millis(now.saturating_sub(self.since.load(Ordering::Relaxed)))
    }

    /// The endpoint's circuit with these settings.
    pub(crate) fn circuit_for(
        &self,
        limits: Option<&CircuitBreaker>,
        name: impl FnOnce() -> Arc<str>,
        newest: bool,
        now: Instant,
    ) -> Option<Arc<Circuit>> {
        let mut slot = self.circuit.lock().unwrap_or_else(PoisonError::into_inner);
        if !newest && slot.is_some() {
            return slot.clone();
        }
        *slot = limits.map(|limits| match &*slot {
            Some(circuit) if circuit.limits() == limits => Arc::clone(circuit),
            Some(_) | None => Arc::new(Circuit::new(CircuitKind::Endpoint, name(), *limits, now)),
        });
        slot.clone()
    }

    fn circuit(&self) -> Option<Arc<Circuit>> {
        self.circuit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn check(&self, checked: Checked, now: Instant) -> Option<Change> {
        let change = self.change(|health| {
            let (next, change) = health.check(checked);
            *health = next;
            change
        });
        self.failing.store(checked == Checked::Failing, Ordering::Relaxed);
        self.changed(change, now);
        change
    }

    fn eject(
        &self,
        why: EjectionReason,
        now: Instant,
        settings: &OutlierDetection,
        draw: &mut impl Draw,
    ) -> Option<Change> {
        let change = self.change(|health| {
            let (next, change) = health.eject(why, now, settings, draw);
            *health = next;
            change
        });
        self.changed(change, now);
        change
    }

    fn changed(&self, change: Option<Change>, now: Instant) {
        match change {
            None => return,
            Some(Change::Back) => {
                let now = millis(self.service.origin(), now);
                self.since.store(now, Ordering::Relaxed);
                self.ejected_until.store(0, Ordering::Relaxed);
            }
            Some(Change::ChecksPassed) => {
                let now = millis(self.service.origin(), now);
                self.since.store(now, Ordering::Relaxed);
            }
            Some(Change::Ejected(ejection)) => {
                let until = millis(self.service.origin(), ejection.until);
                self.ejected_until.store(until, Ordering::Relaxed);
            }
            Some(Change::Lost) => self.ejected_until.store(0, Ordering::Relaxed),
            Some(Change::ChecksFailed) => {}
        }
        self.service.changed();
    }

    fn take_tally(&self, endpoint: usize) -> Tally {
        let both = self.tally.swap(0, Ordering::Relaxed);
        Tally {
            endpoint,
            requests: both >> 32,
            failures: both & u64::from(u32::MAX),
        }
    }

    fn reading(&self, key: &EndpointKey, now: Instant) -> Option<EndpointReading> {
        let health = *self.health();
        let standing = health.standing(now);
        let ejection = health.ejection(now);
        let until = ejection.map(|e| e.until).or_else(|| health.next_probe());
        (standing != Standing::Healthy).then(|| EndpointReading {
            key: key.clone(),
            standing,
            why: ejection.map(|e| e.why),
            until: until.map(|until| until.saturating_duration_since(now)),
        })
    }

    fn is_clean(&self) -> bool {
        self.clean.load(Ordering::Relaxed) && !self.failing.load(Ordering::Relaxed)
    }

    /// Whether there is nothing to remember of it.
    fn is_at_rest(&self) -> bool {
        self.is_clean() && self.circuit().is_none_or(|circuit| circuit.is_at_rest())
    }

    fn change<T>(&self, act: impl FnOnce(&mut Health) -> T) -> T {
        let mut health = self.health();
        let out = act(&mut health);
        self.clean.store(health.is_clean(), Ordering::Relaxed);
        out
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        // Poison is harmless: a health is `Copy` and replaced in one assignment.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
        if let Some(behind) = &self.0.behind {
            behind.end();
        }
    }
}

/// Milliseconds since an origin.
pub(crate) fn millis(origin: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(origin).as_millis()).unwrap_or(u64::MAX)
}

/// The same as [`PeakEwma`] has it: it wraps around every 50 days, and only differences count.
fn wrapping_millis(origin: Instant, now: Instant) -> u32 {
    wrap(millis(origin, now))
}

#[expect(clippy::cast_possible_truncation, reason = "it wraps around on purpose")]
const fn wrap(millis: u64) -> u32 {
    millis as u32
}

#[cfg(test)]
mod tests;

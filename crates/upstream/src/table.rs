//! A worker's endpoints, in step with the snapshot that a request has pinned.

use crate::answers::Answers;
use crate::chance::Chance;
use crate::circuit::Circuit;
use crate::connect::Connector;
use crate::endpoint::{Connection, Endpoint, Wants};
use crate::field::{Choice, Field, Seen};
use crate::gateways::{Gateway, Gateways, LEAST_WAIT};
use crate::registry::Registry;
use crate::service::{Guards, ServiceState};
use bytes::Bytes;
use http_body::Body;
use leeward_policy::model::{BalancePolicy, BreakerMode, ConnectionPool};
use leeward_policy::{
    EndpointKey, EndpointView, GatewayView, Held, RuleIdx, ServiceIdx, ServiceView, Snapshot, Via,
};
use leeward_resilience::{Change, Event, may_eject};
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

/// Everything that one worker has open.
pub struct Upstreams<B> {
    registry: Arc<Registry>,
    connector: Rc<Connector>,
    endpoints: RefCell<HashMap<EndpointKey, Rc<Endpoint<B>>>>,
    current: RefCell<Option<Rc<Table<B>>>>,
}

/// The services of one snapshot, each resolved when it is first used.
pub struct Table<B> {
    snapshot: Arc<Snapshot>,
    services: Vec<OnceCell<Rc<ServiceAtWork<B>>>>,
    rules: Vec<OnceCell<RuleAtWork>>,
    /// Whether no newer snapshot was seen before it. What is resolved from an older one, for a request that has
    /// it pinned, must not take the place of what the newest has made.
    newest: bool,
}

/// A rule, as one worker uses it.
#[derive(Debug)]
pub struct RuleAtWork {
    /// Its own circuit.
    pub circuit: Option<Arc<Circuit>>,
    /// How large the answers are that come for it from other proxies.
    pub answers: Arc<Answers>,
    hold: HeldCircuit,
}

/// A service as one worker uses it.
pub struct ServiceAtWork<B> {
    /// What all workers know of it.
    pub state: Arc<ServiceState>,
    /// Budgets and limits.
    pub guards: Guards,
    /// In the order of the snapshot's [`ServiceView::endpoints`].
    pub endpoints: Vec<Rc<Endpoint<B>>>,
    /// The endpoints' circuits, likewise; empty if they have none.
    circuits: Vec<Arc<Circuit>>,
    hold: HeldCircuit,
    /// Whether calls are counted for rates: with fewer endpoints than rates need, none is.
    counts_rates: bool,
    /// All endpoints, then each subset.
    fields: Vec<RefCell<Field>>,
    /// Whose turn it is.
    turn: Cell<u64>,
    /// What counts changes of gateways, if endpoints are behind some.
    gateways: Option<Arc<ServiceState>>,
}

/// A circuit that is held for a while: by the wall clock, which is looked at now and then.
#[derive(Debug)]
struct HeldCircuit {
    held: Option<Held>,
    looked_at: Cell<Option<Instant>>,
    mode: Cell<Option<BreakerMode>>,
}

/// How often the wall clock is looked at.
const LOOK: Duration = Duration::from_millis(250);

impl<B> Upstreams<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Nothing open yet.
    pub fn new(registry: Arc<Registry>, connector: Connector) -> Self {
        let connector = connector.among(Arc::clone(registry.own()));
        Self {
            registry,
            connector: Rc::new(connector),
            endpoints: RefCell::default(),
            current: RefCell::default(),
        }
    }

    /// The table that goes with `snapshot`. Made anew when the snapshot is another one than at the last
    /// call, in time proportional to the number of services and rules; connections carry over.
    pub fn table(&self, snapshot: &Arc<Snapshot>) -> Rc<Table<B>> {
        let mut current = self.current.borrow_mut();
        if let Some(table) = &*current
            && Arc::ptr_eq(&table.snapshot, snapshot)
        {
            return Rc::clone(table);
        }
        let newer = |table: &Rc<Table<B>>| table.snapshot.sequence > snapshot.sequence;
        let newest = !current.as_ref().is_some_and(newer);
        let table = Rc::new(Table {
            snapshot: Arc::clone(snapshot),
            services: snapshot.services().iter().map(|_| OnceCell::new()).collect(),
            rules: snapshot.rules().iter().map(|_| OnceCell::new()).collect(),
            newest,
        });
        if newest {
            *current = Some(Rc::clone(&table));
        }
        table
    }

    /// The way to an address of which policy says nothing, for one client: its connections end with it.
    pub fn apart(&self, address: SocketAddr, now: Instant) -> Rc<Endpoint<B>> {
        let name = Arc::from("-");
        let (service, endpoint) = self.registry.apart(&name, now);
        let key = EndpointKey {
            service: name,
            address,
            via: Via::Direct,
        };
        let pool = ConnectionPool::DEFAULT;
        let connector = Rc::clone(&self.connector);
        Rc::new(Endpoint::new(key, endpoint, service, connector, &pool))
    }

    /// Whether a connection between these addresses is one that this process has made.
    pub fn is_own(&self, from: SocketAddr, to: SocketAddr) -> bool {
        self.registry.is_own(from, to)
    }

    /// A service of a table.
    pub fn service(&self, table: &Table<B>, idx: ServiceIdx, now: Instant) -> Option<Rc<ServiceAtWork<B>>> {
        let view = table.snapshot.service(idx)?;
        let slot = table.services.get(idx.position())?;
        Some(Rc::clone(
            slot.get_or_init(|| Rc::new(self.resolve(view, table.newest, now))),
        ))
    }

    /// A rule of a table.
    pub fn rule<'a>(&self, table: &'a Table<B>, idx: RuleIdx, now: Instant) -> Option<&'a RuleAtWork> {
        let view = table.snapshot.rule(idx)?;
        let slot = table.rules.get(idx.position())?;
        Some(slot.get_or_init(|| {
            RuleAtWork {
                circuit: view
                    .circuit_breaker
                    .map(|limits| self.registry.rule(view, limits, table.newest, now)),
                answers: self.registry.answers(view),
                hold: HeldCircuit::new(view.held),
            }
        }))
    }

    fn resolve(&self, view: &ServiceView, newest: bool, now: Instant) -> ServiceAtWork<B> {
        let state = self.registry.service(&view.name);
        let mut known = self.endpoints.borrow_mut();
        let endpoints: Vec<_> = view
            .endpoints
            .iter()
            .map(|endpoint| {
                let known = known.entry(endpoint.key.clone());
                let is_new = matches!(known, Entry::Vacant(_));
                let entry = known.or_insert_with(|| {
                    let made = Endpoint::new(
                        endpoint.key.clone(),
                        self.registry.endpoint(&endpoint.key, now),
                        Arc::clone(&state),
                        Rc::clone(&self.connector),
                        &view.spec.pool,
                    );
                    Rc::new(match &endpoint.gateways {
                        None => made,
                        Some(_) => made.by_gateways(Gateways::new(probe(view, endpoint))),
                    })
                });
                if newest || is_new {
                    entry.rebound(&view.spec.pool);
                    self.redirect(entry, view, endpoint, now);
                }
                Rc::clone(entry)
            })
            .collect();
        if let BalancePolicy::PeakEwma(settings) = &view.spec.balance.policy {
            for endpoint in &endpoints {
                endpoint.state.guess(now, settings);
            }
        }
        let limits = view.resilience.endpoint_circuit_breaker.as_ref();
        let circuits = endpoints
            .iter()
            .zip(view.endpoints.iter())
            .filter_map(|(endpoint, seen)| {
                let name = || format!("{}/{}", view.name, seen.address_text).into();
                endpoint.state.circuit_for(limits, name, newest, now)
            })
            .collect();
        let by_gateways = view.endpoints.iter().any(|endpoint| endpoint.gateways.is_some());
        let outlier = &view.spec.outlier;
        let hosts = |minimum: u32| endpoints.len() >= minimum as usize;
        ServiceAtWork {
            guards: state.guards(&view.resilience, &view.spec.pool, newest, now),
            state,
            counts_rates: outlier.success_rate.stdev_factor > 0 && hosts(outlier.success_rate.minimum_hosts)
                || outlier.failure_percentage.is_some_and(|f| hosts(f.minimum_hosts)),
            endpoints,
            circuits,
            hold: HeldCircuit::new(view.held),
            fields: (0..=view.subsets.len()).map(|_| RefCell::default()).collect(),
            // Workers that all began with the first endpoint would go on in step.
            turn: Cell::new(fastrand::u64(..1 << 20)),
            gateways: by_gateways.then(|| Arc::clone(self.registry.of_gateways())),
        }
    }

    /// Tells an endpoint by which gateways it is reached now.
    fn redirect(&self, to: &Rc<Endpoint<B>>, view: &ServiceView, seen: &EndpointView, now: Instant) {
        let (Some(gateways), Some(views)) = (&to.gateways, &seen.gateways) else {
            return;
        };
        let mut make = |gateway: &GatewayView| {
            let state = self.registry.gateway(gateway, now);
            let made = Endpoint::new(
                EndpointKey {
                    service: Arc::clone(&view.name),
                    address: seen.key.address,
                    via: Via::Proxy {
                        address: gateway.address,
                        zone: Arc::clone(&gateway.zone),
                        name: Arc::clone(&gateway.name),
                    },
                },
                Arc::clone(&state.health),
                self.registry.service(&view.name),
                Rc::clone(&self.connector),
                &view.spec.pool,
            );
            Gateway::new(state, Rc::new(made.named(self.connector.name_of(gateway))))
        };
        gateways
            .borrow_mut()
            .update(views, probe(view, seen), &view.spec.pool, &mut make);
    }

    /// Closes what has been idle for too long and forgets endpoints that policy no longer has.
    pub fn sweep(&self, now: Instant) {
        let current = self.current.borrow();
        let table = current.as_ref();
        let in_use = |endpoint: &Rc<Endpoint<B>>| {
            // One count is the map's own.
            Rc::strong_count(endpoint) > 1 && table.is_some()
        };
        self.endpoints
            .borrow_mut()
            .retain(|_, endpoint| !endpoint.sweep(now) || in_use(endpoint));
        if let Some(peers) = self.connector.peers() {
            peers.sweep(now);
        }
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.connector.open()
    }
}

/// What a connection to a gateway is tried with, when no request wants one.
fn probe(view: &ServiceView, endpoint: &EndpointView) -> Wants {
    Wants {
        protocol: view.spec.protocol,
        connection: Connection::New,
        transport: endpoint.transport,
        upgrade: false,
        length: None,
        large_answer: false,
        limit: view.spec.connect_timeout.max(LEAST_WAIT),
    }
}

impl HeldCircuit {
    const fn new(held: Option<Held>) -> Self {
        Self {
            held,
            looked_at: Cell::new(None),
            mode: Cell::new(None),
        }
    }

    fn mode(&self, now: Instant) -> Option<BreakerMode> {
        let held = self.held?;
        let due = |at: Instant| now.saturating_duration_since(at) >= LOOK;
        if self.looked_at.get().is_none_or(due) {
            #[expect(
                clippy::disallowed_methods,
                reason = "people say by the wall clock until when"
            )]
            let wall = SystemTime::now();
            self.looked_at.set(Some(now));
            self.mode.set((wall < held.until).then_some(held.mode));
        }
        self.mode.get()
    }
}

impl RuleAtWork {
    /// How somebody holds its circuit now.
    pub fn forced(&self, now: Instant) -> Option<BreakerMode> {
        self.hold.mode(now)
    }
}

impl<B> ServiceAtWork<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// How somebody holds its circuit now.
    pub fn forced(&self, now: Instant) -> Option<BreakerMode> {
        self.hold.mode(now)
    }

    /// Whether circuits are why there is nobody to ask: an endpoint's is open.
    pub fn is_shut(&self, now: Instant) -> bool {
        self.circuits.iter().any(|circuit| circuit.is_shut(now))
    }

    /// Whether the service's own circuit lets nothing through.
    pub fn refuses(&self, now: Instant) -> bool {
        match self.forced(now) {
            Some(BreakerMode::ForceOpen) => true,
            Some(BreakerMode::ForceClosed) => false,
            Some(BreakerMode::Enforce | BreakerMode::Observe) | None => self
                .guards
                .circuit
                .as_ref()
                .is_some_and(|circuit| circuit.is_shut(now)),
        }
    }

    /// Whether an endpoint can't be asked since no gateway of its zone can.
    pub fn lacks_gateway(&self, now: Instant) -> bool {
        self.gateways.is_some() && self.endpoints.iter().any(|endpoint| !endpoint.has_way(now))
    }

    /// The circuit of an endpoint.
    pub fn endpoint_circuit(&self, endpoint: usize) -> Option<&Arc<Circuit>> {
        self.circuits.get(endpoint)
    }

    /// Chooses the endpoint for the next attempt. `hash` is that of what names the request, where policy hashes.
    pub fn choose(
        &self,
        view: &ServiceView,
        subset: Option<usize>,
        hash: Option<u64>,
        tried: &[usize],
        now: Instant,
    ) -> Option<Choice> {
        let turn = self.turn.get();
        // A further attempt takes no turn: else one failure in two would bring the next request to the same
        // endpoint again.
        if tried.is_empty() {
            self.turn.set(turn.wrapping_add(1));
        }
        let field = self.fields.get(subset.map_or(0, |subset| subset + 1))?;
        let mut field = field.borrow_mut();
        let seen = Seen {
            view,
            state: &self.state,
            now,
            endpoints: &|i| self.endpoints.get(i).map(|e| &e.state),
            circuits: &|i| self.circuits.get(i),
            has_way: &|i| self.endpoints.get(i).is_some_and(|e| e.has_way(now)),
            gateway_changes: self
                .gateways
                .as_ref()
                .map_or(0, |gateways| gateways.changes.load(Ordering::Relaxed)),
        };
        field.refresh(&seen, subset);
        field.choose(&seen, turn, hash, tried, &mut Chance)
    }

    /// Whether room in other zones is why there is nobody to ask: what they report to have to spare is used up.
    pub fn lacks_room(&self, subset: Option<usize>, tried: &[usize]) -> bool {
        let field = self.fields.get(subset.map_or(0, |subset| subset + 1));
        let has_room = |i: usize| self.endpoints.get(i).is_none_or(|e| e.state.has_room());
        field.is_some_and(|field| field.borrow().lacks_room(has_room, tried))
    }

    /// Writes down how a call at an endpoint ended.
    pub fn note(&self, view: &ServiceView, endpoint: usize, event: Event, now: Instant) -> Option<Change> {
        let noted = self.endpoints.get(endpoint)?;
        if self.counts_rates {
            noted.state.count(event != Event::Succeed);
        }
        let settings = &view.spec.outlier;
        let allowed = || {
            let out = |e: &&Rc<Endpoint<B>>| e.state.is_ejected(now);
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            may_eject(
                count(self.endpoints.iter().filter(out).count()),
                count(self.endpoints.len()),
                settings.max_ejection_percent,
            )
        };
        noted.state.note(event, now, settings, allowed, &mut Chance)
    }
}

impl<B> std::fmt::Debug for Upstreams<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstreams").finish_non_exhaustive()
    }
}

impl<B> std::fmt::Debug for Table<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table")
            .field("generation", &self.snapshot.generation)
            .finish_non_exhaustive()
    }
}

impl<B> std::fmt::Debug for ServiceAtWork<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServiceAtWork")
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

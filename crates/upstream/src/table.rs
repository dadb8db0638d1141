//! A worker's endpoints, in step with the snapshot that a request has pinned.

use crate::connect::Connector;
use crate::endpoint::Endpoint;
use crate::registry::{Registry, ServiceState};
use http_body::Body;
use leeward_policy::{EndpointKey, ServiceIdx, ServiceView, Snapshot};
use leeward_resilience::{Choice, Limits, pick};
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

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
}

/// A service as one worker uses it.
pub struct ServiceAtWork<B> {
    /// What all workers know of it.
    pub state: Arc<ServiceState>,
    /// When failures have consequences.
    pub limits: Limits,
    /// In the order of the snapshot's [`ServiceView::endpoints`].
    pub endpoints: Vec<Rc<Endpoint<B>>>,
    /// Whose turn it is.
    turn: Cell<usize>,
}

impl<B> Upstreams<B>
where
    B: Body + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Nothing open yet.
    pub fn new(registry: Arc<Registry>, connector: Connector) -> Self {
        Self {
            registry,
            connector: Rc::new(connector),
            endpoints: RefCell::default(),
            current: RefCell::default(),
        }
    }

    /// The table that goes with `snapshot`. Made anew when the snapshot is another one than at the last
    /// call, in time proportional to the number of services; connections carry over.
    pub fn table(&self, snapshot: &Arc<Snapshot>) -> Rc<Table<B>> {
        let mut current = self.current.borrow_mut();
        if let Some(table) = &*current
            && Arc::ptr_eq(&table.snapshot, snapshot)
        {
            return Rc::clone(table);
        }
        let services = snapshot.services().iter().map(|_| OnceCell::new()).collect();
        let table = Rc::new(Table {
            snapshot: Arc::clone(snapshot),
            services,
        });
        *current = Some(Rc::clone(&table));
        table
    }

    /// A service of a table.
    pub fn service(&self, table: &Table<B>, idx: ServiceIdx) -> Option<Rc<ServiceAtWork<B>>> {
        let view = table.snapshot.service(idx)?;
        let slot = table.services.get(idx.position())?;
        Some(Rc::clone(slot.get_or_init(|| Rc::new(self.resolve(view)))))
    }

    fn resolve(&self, view: &ServiceView) -> ServiceAtWork<B> {
        let mut known = self.endpoints.borrow_mut();
        let endpoints = view
            .endpoints
            .iter()
            .map(|endpoint| {
                let entry = known.entry(endpoint.key.clone()).or_insert_with(|| {
                    let state = self.registry.endpoint(&endpoint.key);
                    let connector = Rc::clone(&self.connector);
                    Rc::new(Endpoint::new(
                        endpoint.key.clone(),
                        state,
                        connector,
                        view.spec.pool,
                    ))
                });
                entry.rebound(view.spec.pool);
                Rc::clone(entry)
            })
            .collect();
        ServiceAtWork {
            state: self.registry.service(&view.name),
            limits: Limits {
                consecutive_failures: view.spec.outlier.consecutive_5xx,
                base_ejection: view.spec.outlier.base_ejection_time,
                max_ejection: view.spec.outlier.max_ejection_time,
            },
            endpoints,
            // Workers that all began with the first endpoint would go on in step.
            turn: Cell::new(fastrand::usize(..1 << 20)),
        }
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
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.connector.open()
    }
}

impl<B> ServiceAtWork<B> {
    /// Chooses the endpoint for the next attempt; see [`pick`].
    pub fn choose(&self, view: &ServiceView, tried: &[usize], now: Instant) -> Option<Choice> {
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));
        let state = |i: usize| self.endpoints.get(i).map(|endpoint| &endpoint.state);
        pick(
            view.tiers.iter().map(|tier| tier.endpoints.as_slice()),
            turn,
            |i| state(i).map_or(leeward_resilience::Standing::Unreachable, |s| s.standing(now)),
            |i| tried.contains(&i),
            |i| state(i).is_some_and(|s| s.probe(now)),
        )
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

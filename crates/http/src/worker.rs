//! What one worker thread has: its view of policy, its connections, its counters.

use crate::body::RequestBody;
use crate::courier::{self, Courier, Job};
use crate::facts::Evaluator;
use crate::gateway::Door;
use crate::idle::{House, TICK};
use crate::keyring::Keyring;
use crate::mesh;
use crate::pressure::Pressure;
use crate::rates::Rates;
use crate::tokens::Tokens;
use crate::watch::Watch;
use arc_swap::{ArcSwap, ArcSwapOption, Cache};
use http::{HeaderMap, HeaderValue};
use leeward_cache::Caches;
use leeward_flags::FlagSet;
use leeward_identity::Identity;
use leeward_policy::model::{Retry, RetryOn};
use leeward_policy::{Levels, Snapshot};
use leeward_queue::Queues;
use leeward_telemetry::{Hub, Recorder};
use leeward_upstream::{Connector, Registry, Upstreams};
use leeward_wasm::{Called, Events, MeshCall};
use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};

/// What every worker of a proxy is made from.
#[derive(Clone)]
pub struct Node {
    /// The published policy.
    pub live: Arc<ArcSwap<Snapshot>>,
    /// The levels of degradation that hold.
    pub levels: Arc<ArcSwap<Levels>>,
    /// The flags of the node's own file.
    pub file_flags: Arc<ArcSwapOption<FlagSet>>,
    /// What the workers share about endpoints.
    pub registry: Arc<Registry>,
    /// Who this proxy is; without it there is no inbound listener and no way to other proxies.
    pub identity: Option<Arc<Identity>>,
    /// The plugin host.
    pub plugins: Arc<leeward_wasm::Host>,
    /// Where counters and records go.
    pub hub: Arc<Hub>,
    /// Rate limits, shared by the workers.
    pub rates: Arc<Rates>,
    /// How short of memory the process is.
    pub pressure: Arc<Pressure>,
    /// Answers that are kept, shared by the workers.
    pub caches: Arc<Caches>,
    /// Requests that wait for their services.
    pub queues: Arc<Queues>,
    /// Brings queued requests to the workers.
    pub courier: Arc<Courier>,
    /// The keys of the issuers of tokens.
    pub keyring: Arc<Keyring>,
}

/// One worker's half of the data plane. Everything in it belongs to one thread.
pub struct Worker {
    live: RefCell<Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
    levels: RefCell<Cache<Arc<ArcSwap<Levels>>, Arc<Levels>>>,
    file_flags: Arc<ArcSwapOption<FlagSet>>,
    /// What evaluates flags for plugins, as things were at the last request that had one.
    evaluator: RefCell<Option<Arc<Evaluator>>>,
    pub(crate) upstreams: Upstreams<RequestBody>,
    pub(crate) plugins: leeward_wasm::Worker,
    pub(crate) recorder: Recorder,
    pub(crate) identity: Option<Arc<Identity>>,
    /// This proxy's part of a Via field.
    pub(crate) via: HeaderValue,
    /// This proxy's zone.
    pub(crate) zone: Arc<str>,
    /// For requests of other proxies: not another endpoint, but another connection, should an idle one close
    /// just as it is used.
    pub(crate) again_here: Arc<Retry>,
    /// For requests that go to another service in place of their own.
    pub(crate) once: Arc<Retry>,
    /// The bodies that wait.
    pub(crate) house: Rc<House>,
    /// Rate limits, shared by the workers.
    pub(crate) rates: Arc<Rates>,
    /// How short of memory the process is.
    pub(crate) pressure: Arc<Pressure>,
    /// Answers that are kept, shared by the workers.
    pub(crate) caches: Arc<Caches>,
    /// Requests that wait for their services.
    pub(crate) queues: Arc<Queues>,
    /// This proxy's name.
    pub(crate) proxy: Arc<str>,
    /// For calls that plugins make.
    pub(crate) of_plugins: Arc<Retry>,
    /// What a call carries that is part of no request.
    pub(crate) no_origin: Arc<HeaderMap>,
    /// The keys of the issuers of tokens.
    pub(crate) keyring: Arc<Keyring>,
    /// Tokens that were found to be valid.
    pub(crate) tokens: Tokens,
    mesh: Cell<Option<UnboundedReceiver<MeshCall>>>,
    jobs: Cell<Option<Receiver<Job>>>,
    pub(crate) connections: Connections,
    drain: Cell<Drain>,
}

/// How far a worker has gone in ending.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Drain {
    /// Not at all.
    No,
    /// Answers ask clients to go elsewhere.
    Asking,
    /// Connections without a request are closed.
    Closing,
}

/// The client connections of a worker.
#[derive(Default)]
pub(crate) struct Connections {
    open: RefCell<Vec<Rc<Connection>>>,
    held: Cell<usize>,
}

/// One client connection, as the sweeper sees it.
#[derive(Debug, Default)]
pub(crate) struct Connection {
    /// When it began.
    entered: Cell<Option<Instant>>,
    /// Requests under way on it.
    requests: Cell<usize>,
    /// Requests that it brought in all.
    served: Cell<u64>,
    /// `served` at the last sweep.
    served_before: Cell<u64>,
    /// Sweeps in a row without a request.
    quiet: Cell<u32>,
    /// Sweeps in a row with a part of a head.
    partial: Cell<u32>,
    /// Silent or slow for too long.
    overdue: Cell<bool>,
    /// The door that it came in by, if it is from outside.
    door: RefCell<Option<Arc<Door>>>,
    /// How long it may be without a request, if it is from outside.
    idle: Cell<Option<Duration>>,
    /// A proxy in front that is believed brings requests of many clients by it.
    of_many: Cell<bool>,
    /// It speaks HTTP/3.
    http3: Cell<bool>,
    /// The door is no more, or its certificates end soon: it is to end, as soon as no request is under way.
    leaving: Cell<bool>,
    /// When it is asked to end, and when it does, whatever is under way: a certificate of one side ends.
    ends: Cell<Option<(Instant, Instant)>>,
    /// It is over.
    ended: Cell<bool>,
    /// Requests that the client began and gave up before they had ended, less what is normal.
    given_up: Cell<u32>,
    /// What its bytes show.
    pub(crate) watch: Arc<Watch>,
    /// Asked to end.
    pub(crate) close: Notify,
}

/// How long a client that has just connected to an ending worker has to send its request.
const FIRST_REQUEST: Duration = Duration::from_millis(500);
/// How often connections are looked at.
const SWEEP: Duration = TICK;
/// How many sweeps a client may take to send a request's head.
const HEAD_SWEEPS: u32 = 30;
/// How many sweeps a client connection may stay without a request; an hour, as in Envoy.
const IDLE_SWEEPS: u32 = 3600;
/// Requests of a client from outside that it gave up before they had ended, on one connection: so many at once, and so many
/// in each sweep, are a person's. A browser that leaves a page gives up as many as there are streams, 128. More are an attack
/// (CVE-2023-44487).
const GIVE_UP_BURST: u32 = 200;
const GIVE_UP_RATE: u32 = 10;
/// When another proxy is asked to make another connection, as a share of how long this one may last. It does so by itself
/// before (`leeward-upstream`).
const ASKED_AT: f64 = 0.875;
/// Longer than any connection lasts.
const LONG: Duration = Duration::from_secs(365 * 24 * 3600);

impl Worker {
    /// A worker of `node`. Call on the thread that it will run on.
    pub fn new(node: &Node) -> Rc<Self> {
        let snapshot = node.live.load();
        let viewer = &snapshot.viewer;
        let (calls, mesh) = tokio::sync::mpsc::unbounded_channel();
        let seen = Rc::new(Seen(Recorder::new(&node.hub)));
        let via = format!("1.1 leeward-{}.{}", viewer.proxy, viewer.zone);
        Rc::new(Self {
            live: RefCell::new(Cache::new(Arc::clone(&node.live))),
            levels: RefCell::new(Cache::new(Arc::clone(&node.levels))),
            file_flags: Arc::clone(&node.file_flags),
            evaluator: RefCell::default(),
            upstreams: Upstreams::new(Arc::clone(&node.registry), Connector::new(node.identity.clone())),
            plugins: leeward_wasm::Worker::new(&node.plugins, seen, calls),
            recorder: Recorder::new(&node.hub),
            identity: node.identity.clone(),
            // Names are DNS labels, so this never falls back.
            via: HeaderValue::try_from(via).unwrap_or(HeaderValue::from_static("1.1 leeward-proxy")),
            zone: viewer.zone.to_shared(),
            again_here: Arc::new(Retry {
                max_attempts: 2,
                on: vec![RetryOn::RefusedStream],
                ..Retry::standard()
            }),
            once: Arc::new(Retry {
                max_attempts: 1,
                ..Retry::standard()
            }),
            house: Rc::default(),
            rates: Arc::clone(&node.rates),
            pressure: Arc::clone(&node.pressure),
            caches: Arc::clone(&node.caches),
            queues: Arc::clone(&node.queues),
            proxy: viewer.proxy.to_shared(),
            of_plugins: Arc::new(Retry::standard()),
            no_origin: Arc::default(),
            keyring: Arc::clone(&node.keyring),
            tokens: Tokens::default(),
            mesh: Cell::new(Some(mesh)),
            jobs: Cell::new(Some(node.courier.enlist())),
            connections: Connections::default(),
            drain: Cell::new(Drain::No),
        })
    }

    /// The levels of degradation that hold now.
    pub(crate) fn levels(&self) -> Arc<Levels> {
        Arc::clone(self.levels.borrow_mut().load())
    }

    /// The flags of the node's own file.
    pub(crate) fn file_flags(&self) -> Option<Arc<FlagSet>> {
        self.file_flags.load_full()
    }

    /// What evaluates flags for a plugin's request, by what holds now.
    pub(crate) fn evaluator(&self, snapshot: &Arc<Snapshot>) -> Arc<Evaluator> {
        let mut levels = self.levels.borrow_mut();
        let levels = levels.load();
        let file = self.file_flags.load();
        let mut evaluator = self.evaluator.borrow_mut();
        match &*evaluator {
            Some(known) if known.is_of(snapshot, levels, file.as_ref()) => Arc::clone(known),
            Some(_) | None => {
                Arc::clone(evaluator.insert(Arc::new(Evaluator::new(snapshot, levels, file.as_ref()))))
            }
        }
    }

    /// What evaluates flags by what holds no more isn't kept for requests that may not come.
    fn forget_evaluator(&self) {
        let (snapshot, levels) = (self.pin(), self.levels());
        let file = self.file_flags.load();
        self.evaluator
            .borrow_mut()
            .take_if(|known| !known.is_of(&snapshot, &levels, file.as_ref()));
    }

    /// The policy that a request beginning now sees to its end.
    pub(crate) fn pin(&self) -> Arc<Snapshot> {
        Arc::clone(self.live.borrow_mut().load())
    }

    pub(crate) fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }

    /// Whether answers should ask clients to go elsewhere.
    pub(crate) fn is_draining(&self) -> bool {
        self.drain.get() >= Drain::Asking
    }

    /// From now on every answer asks its client to close the connection, and HTTP/2 clients are told to go
    /// away. Nothing is cut.
    pub fn begin_drain(&self) {
        self.enter(Drain::Asking);
    }

    /// Ends connections that have no request under way.
    pub fn close_idle(&self) {
        self.enter(Drain::Closing);
    }

    fn enter(&self, drain: Drain) {
        self.drain.set(drain);
        for connection in self.connections.open.borrow().iter() {
            connection.close.notify_one();
        }
    }

    /// Whether an HTTP/1.1 connection without a request may be closed under its client.
    pub(crate) fn closes(&self, connection: &Connection) -> bool {
        let ending = || match connection.entered.get() {
            // Whoever has just connected is about to say why.
            Some(at) if connection.served.get() == 0 => {
                self.now().saturating_duration_since(at) > FIRST_REQUEST
            }
            Some(_) | None => true,
        };
        let told = connection.leaving.get() || self.drain.get() >= Drain::Closing;
        connection.overdue.get() || told && ending()
    }

    /// A door is no more: its connections are asked to end.
    pub(crate) fn leave_door(&self, address: SocketAddr) {
        self.leave(address, |_| true);
    }

    /// A door takes no more HTTP/3.
    pub(crate) fn leave_udp(&self, address: SocketAddr) {
        self.leave(address, |connection| connection.http3.get());
    }

    fn leave(&self, address: SocketAddr, which: impl Fn(&Connection) -> bool) {
        for connection in self.connections.open.borrow().iter() {
            let by_it = connection
                .door
                .borrow()
                .as_ref()
                .is_some_and(|door| door.address == address);
            if by_it && which(connection) {
                connection.leaving.set(true);
                connection.close.notify_one();
            }
        }
    }

    /// Client connections and tunnels that are open.
    pub fn busy(&self) -> usize {
        self.connections.held.get()
    }

    /// Connections to upstreams that are open.
    pub fn open_upstream(&self) -> usize {
        self.upstreams.open()
    }

    /// Sends queued requests until dropped.
    pub async fn deliver(self: Rc<Self>) {
        if let Some(jobs) = self.jobs.take() {
            courier::run(&self, jobs).await;
        }
    }

    /// Makes the calls of plugins until dropped.
    pub async fn call_for_plugins(self: Rc<Self>) {
        if let Some(calls) = self.mesh.take() {
            mesh::run(&self, calls).await;
        }
    }

    /// Looks after idle connections until dropped.
    pub async fn keep_house(&self) {
        let mut ticks = tokio::time::interval(SWEEP);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.house.tick();
            let now = self.now();
            for connection in self.connections.open.borrow().iter() {
                if connection.comes_to_its_end(now) {
                    connection.close.notify_one();
                } else if connection.is_overdue() {
                    connection.overdue.set(true);
                    connection.close.notify_one();
                } else if connection.leaving.get() {
                    // It was let stay for its first request.
                    connection.close.notify_one();
                }
            }
            self.upstreams.sweep(now);
            self.forget_evaluator();
        }
    }
}

/// Writes down what is to be seen of plugins.
struct Seen(Recorder);

impl Events for Seen {
    fn count(&self, plugin: &Arc<str>, name: &str, by: u64) {
        self.0.plugin_count(plugin, name, by);
    }

    fn gauge(&self, plugin: &Arc<str>, name: &str, value: f64) {
        self.0.plugin_gauge(plugin, name, value);
    }

    fn observe(&self, plugin: &Arc<str>, name: &str, value: f64) {
        // What is negative or no number is 0, what is too large is the largest.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the cast saturates"
        )]
        self.0.plugin_observe(plugin, name, value as u64);
    }

    fn called(&self, call: &Called<'_>) {
        let outcome = match call.outcome {
            Ok(()) => "ok",
            Err(fault) => fault.as_str(),
        };
        self.0
            .plugin_called(call.plugin, call.function, outcome, call.took);
    }
}

impl Connections {
    /// Shows a connection to the sweeper until the returned guard is dropped.
    pub(crate) fn enter(worker: &Rc<Worker>) -> Entered {
        let connection = Rc::<Connection>::default();
        connection.entered.set(Some(worker.now()));
        worker.connections.open.borrow_mut().push(Rc::clone(&connection));
        Entered {
            worker: Rc::clone(worker),
            connection,
        }
    }

    /// Counts a connection, from the moment that it is accepted, or a tunnel, until the guard is dropped: the
    /// worker doesn't end before.
    pub(crate) fn hold(worker: &Rc<Worker>) -> Held {
        let held = &worker.connections.held;
        held.set(held.get() + 1);
        Held(Rc::clone(worker))
    }
}

/// A connection that the sweeper sees.
pub(crate) struct Entered {
    pub(crate) worker: Rc<Worker>,
    pub(crate) connection: Rc<Connection>,
}

impl Entered {
    /// Waits for what a client has to do before its first request, unless the connection is to end first.
    pub(crate) async fn unless_closed<T>(&self, step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        let mut step = pin!(step);
        loop {
            tokio::select! {
                biased;
                done = step.as_mut() => return done,
                () = self.connection.close.notified() => {
                    if self.worker.closes(&self.connection) {
                        return Err(io::ErrorKind::ConnectionAborted.into());
                    }
                }
            }
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.worker
            .connections
            .open
            .borrow_mut()
            .retain(|c| !Rc::ptr_eq(c, &self.connection));
    }
}

/// A connection or a tunnel that is counted.
pub(crate) struct Held(Rc<Worker>);

impl Drop for Held {
    fn drop(&mut self) {
        let held = &self.0.connections.held;
        held.set(held.get().saturating_sub(1));
    }
}

impl Connection {
    /// A request's head is here. True if the connection can't be used for another.
    pub(crate) fn request_began(&self) -> bool {
        self.requests.set(self.requests.get() + 1);
        self.served.set(self.served.get() + 1);
        self.watch.request_began()
    }

    /// It came in from outside, by a door, and may be without a request for so long. `of_many`: a proxy in front that is
    /// believed brings requests of many clients by it.
    pub(crate) fn came_by(&self, door: &Arc<Door>, idle: Duration, of_many: bool) {
        *self.door.borrow_mut() = Some(Arc::clone(door));
        self.idle.set(Some(idle));
        self.of_many.set(of_many);
        // One that waited in another worker, or in the kernel, has missed that the door was closed.
        if door.is_closed() && !self.leaving.replace(true) {
            self.close.notify_one();
        }
    }

    /// It is another proxy's, and may last for so long: then a certificate of one side ends.
    pub(crate) fn lasts(&self, lasts: Duration, now: Instant) {
        let lasts = lasts.min(LONG);
        self.ends.set(Some((now + lasts.mul_f64(ASKED_AT), now + lasts)));
    }

    /// Looks whether it is to be asked to end, which it is once, or whether it has ended.
    fn comes_to_its_end(&self, now: Instant) -> bool {
        let Some((asked, end)) = self.ends.get() else {
            return false;
        };
        if now >= end {
            self.ended.set(true);
            return true;
        }
        now >= asked && !self.leaving.replace(true)
    }

    /// Whether it is over, whatever is under way.
    pub(crate) fn is_over(&self) -> bool {
        self.ended.get()
    }

    /// How long it may be without a request, if it is from outside.
    pub(crate) fn idle_limit(&self) -> Option<Duration> {
        self.idle.get()
    }

    /// It speaks HTTP/3.
    pub(crate) fn speaks_http3(&self) {
        self.http3.set(true);
    }

    /// Whether the door that it came in by is no more.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.get()
    }

    /// The client has given up a request before it had ended.
    pub(crate) fn gave_up(&self) {
        // Of many clients, the many that give up are not the one that attacks.
        if self.idle.get().is_none() || self.of_many.get() {
            return;
        }
        self.given_up.set(self.given_up.get().saturating_add(1));
        if self.is_abusive() {
            self.close.notify_one();
        }
    }

    /// Whether it does nothing but make work.
    pub(crate) fn is_abusive(&self) -> bool {
        self.given_up.get() > GIVE_UP_BURST
    }

    pub(crate) fn request_ended(&self) {
        self.requests.set(self.requests.get().saturating_sub(1));
        self.watch.request_ended();
    }

    /// Looks at the connection once per sweep: whether it has been silent, or slow, for too long. Counting
    /// sweeps spares every request a look at the clock.
    fn is_overdue(&self) -> bool {
        let served = self.served.get();
        let active = self.requests.get() > 0 || self.served_before.replace(served) != served;
        let count = |cell: &Cell<u32>, on: bool| {
            cell.set(if on { cell.get().saturating_add(1) } else { 0 });
            cell.get()
        };
        if !self.is_abusive() {
            self.given_up
                .set(self.given_up.get().saturating_sub(GIVE_UP_RATE));
        }
        let quiet = count(&self.quiet, !active);
        let partial = count(&self.partial, !active && self.watch.head_is_partial());
        let idle_sweeps = self.idle.get().map_or(IDLE_SWEEPS, |idle| {
            u32::try_from(idle.as_millis().div_ceil(SWEEP.as_millis())).unwrap_or(u32::MAX)
        });
        quiet > idle_sweeps || partial > HEAD_SWEEPS
    }
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("busy", &self.busy())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::door_in_the_clear;

    fn give_up(connection: &Connection) {
        for _ in 0..=GIVE_UP_BURST {
            connection.gave_up();
        }
    }

    #[test]
    fn giving_up_is_held_against_one_client_and_not_against_many() {
        let door = door_in_the_clear();
        for (of_many, abusive) in [(false, true), (true, false)] {
            let connection = Connection::default();
            connection.came_by(&door, TICK, of_many);
            give_up(&connection);
            assert_eq!(connection.is_abusive(), abusive, "{of_many}");
        }
        let of_the_mesh = Connection::default();
        give_up(&of_the_mesh);
        assert!(!of_the_mesh.is_abusive());
    }

    #[test]
    fn whoever_comes_by_a_door_that_was_closed_meanwhile_is_to_leave() {
        let door = door_in_the_clear();
        let connection = Connection::default();
        connection.came_by(&door, TICK, false);
        assert!(!connection.is_leaving());
        door.close();
        let late = Connection::default();
        late.came_by(&door, TICK, false);
        assert!(late.is_leaving());
    }

    #[test]
    fn a_connection_is_asked_to_end_once_and_then_ends() {
        let connection = Connection::default();
        let now = tokio::time::Instant::now().into_std();
        let at = |seconds| now + Duration::from_secs(seconds);
        assert!(!connection.comes_to_its_end(at(1_000_000)), "a workload's");
        connection.lasts(Duration::from_secs(80), now);
        assert!(!connection.comes_to_its_end(at(69)));
        assert!(connection.comes_to_its_end(at(70)) && connection.is_leaving());
        assert!(!connection.comes_to_its_end(at(79)) && !connection.is_over());
        assert!(connection.comes_to_its_end(at(80)) && connection.is_over());
        assert!(connection.comes_to_its_end(at(81)), "until it is gone");
        connection.lasts(Duration::MAX, now);
    }
}

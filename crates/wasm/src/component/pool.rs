//! The instances of one plugin on one worker: made when they are needed, reused, never shared.

use super::code::{Code, Guest};
use super::shelf::Shelf;
use super::slots::{Slot, Slots};
use super::state::{Memory, State, Subject};
use super::waits::Waits;
use crate::call::Facts;
use crate::clock::now;
use crate::fault::Fault;
use crate::host::Host;
use crate::memory::Lease;
use crate::mesh::MeshSender;
use crate::version::{self, Shared, Version};
use crate::worker::{Chosen, Events};
use http::HeaderMap;
use leeward_policy::model::Plugin;
use std::mem;
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use wasmtime::{Engine, PoolConcurrencyLimitError, Store, Trap};

/// The instances of a version of a plugin under a policy.
pub(crate) struct Pool {
    host: Arc<Host>,
    events: Rc<dyn Events>,
    mesh: MeshSender,
    plugin: Arc<str>,
    pub(crate) spec: Arc<Plugin>,
    pub(crate) version: Arc<Version>,
    idle: Arc<Shelf>,
    slots: Slots,
}

/// One instance.
pub(crate) struct Instance {
    store: Store<State>,
    /// Large, and instances are handed about for each call.
    guest: Box<Guest>,
    /// The store's, at hand while that is lent to a call.
    waits: Arc<Waits>,
    /// When it was last used.
    pub(crate) used: Instant,
    /// Its parts of what the process may have; given back after the store is gone.
    _lease: Arc<Mutex<Lease>>,
    _room: OwnedSemaphorePermit,
}

/// What a call has of its request.
pub(crate) struct Brief {
    /// When the request's answer must have begun; `None` for a call that is about what comes after that.
    pub(crate) deadline: Option<Instant>,
    pub(crate) origin: Arc<HeaderMap>,
}

impl From<&Facts> for Brief {
    fn from(facts: &Facts) -> Self {
        Self {
            deadline: facts.deadline,
            origin: Arc::clone(&facts.origin),
        }
    }
}

/// How long an instance may take to be made that only shows what a component exports.
const CHECK: Duration = Duration::from_secs(1);

impl Brief {
    /// Of a call for which the request's deadline says nothing: its answer may have begun.
    pub(crate) fn untimed(facts: &Facts) -> Self {
        Self {
            deadline: None,
            ..Self::from(facts)
        }
    }
}

/// Least that a guest may hand over in one call, in bytes: an answer of the largest size and what comes with it.
const MIN_HANDED: usize = 4 << 20;

/// An instance in the middle of a call. However that ends, what the call is about goes back to where it came from.
struct Turn<'a> {
    /// There until the end.
    instance: Option<Instance>,
    home: &'a mut Subject,
}

impl<'a> Turn<'a> {
    fn begin(mut instance: Instance, home: &'a mut Subject) -> Self {
        instance.store.data_mut().subject = mem::take(home);
        Self {
            instance: Some(instance),
            home,
        }
    }

    /// Ends it; what the guest changed is kept as `well` says.
    fn end(mut self, well: bool) -> Option<Instance> {
        let mut instance = self.instance.take()?;
        give_back(&mut instance, self.home, well);
        Some(instance)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(instance) = &mut self.instance {
            give_back(instance, self.home, false);
        }
    }
}

fn give_back(instance: &mut Instance, home: &mut Subject, well: bool) {
    let state = instance.store.data_mut();
    *home = mem::take(&mut state.subject);
    if let Subject::Passing(passing) = home {
        if well {
            passing.keep();
        } else {
            passing.undo();
        }
    }
    state.end();
}

impl Pool {
    pub(crate) fn new(host: &Arc<Host>, events: &Rc<dyn Events>, mesh: &MeshSender, chosen: &Chosen) -> Self {
        let max = usize::try_from(chosen.spec.limits.max_instances).unwrap_or(usize::MAX);
        let idle = Arc::default();
        host.shelves().add(&idle);
        Self {
            host: Arc::clone(host),
            events: Rc::clone(events),
            mesh: mesh.clone(),
            plugin: Arc::clone(&chosen.name),
            spec: Arc::clone(&chosen.spec),
            version: Arc::clone(&chosen.version),
            idle,
            slots: Slots::new(max),
        }
    }

    /// Whether it has no instance that could be used again.
    pub(crate) fn is_empty(&self) -> bool {
        self.idle.is_empty()
    }

    /// Has an instance carry out a call about `subject`, which comes back: as the guest changed it if all went well, else as
    /// it was. The call gives an error that is a trap, or what is wrong with the plugin's answer.
    pub(crate) async fn call<R>(
        &self,
        function: &'static str,
        brief: Brief,
        subject: &mut Subject,
        call: impl AsyncFnOnce(&mut Store<State>, &Guest) -> wasmtime::Result<Result<R, String>>,
    ) -> Result<R, Fault> {
        let began = now();
        let limit = began + self.spec.limits.call_timeout;
        let until = brief.deadline.map_or(limit, |deadline| deadline.min(limit));
        let result = self.attempt(brief, subject, call, began, until).await;
        self.report(function, result.as_ref().err().copied(), now() - began);
        result
    }

    /// A call has ended.
    pub(crate) fn report(&self, function: &'static str, fault: Option<Fault>, took: Duration) {
        let outcome = fault.map_or(Ok(()), Err);
        self.version.ended(&*self.events, function, outcome, took);
    }

    async fn attempt<R>(
        &self,
        brief: Brief,
        subject: &mut Subject,
        call: impl AsyncFnOnce(&mut Store<State>, &Guest) -> wasmtime::Result<Result<R, String>>,
        began: Instant,
        until: Instant,
    ) -> Result<R, Fault> {
        let (_slot, began) = self.slot(began, until).await?;
        let _running = self.host.run();
        let instance = self.instance(&brief, began, until).await?;
        let mut turn = Turn::begin(instance, subject);
        let result = match &mut turn.instance {
            None => return Err(Fault::Busy),
            Some(instance) => self.carry_out(instance, call).await,
        };
        if let Some(mut instance) = turn.end(result.is_ok()) {
            for (counter, by) in instance.store.data_mut().counts.drain(..) {
                self.events.count(&self.plugin, &counter, by);
            }
            if result.is_ok() && !self.spec.fresh_instance && instance.store.data_mut().is_tidy() {
                instance.used = began;
                self.idle.put(instance);
            }
        }
        result
    }

    async fn carry_out<R>(
        &self,
        instance: &mut Instance,
        call: impl AsyncFnOnce(&mut Store<State>, &Guest) -> wasmtime::Result<Result<R, String>>,
    ) -> Result<R, Fault> {
        let Instance {
            store, guest, waits, ..
        } = instance;
        let called = waits.run(pin!(call(store, guest))).await;
        match called {
            None => Err(self.time_is_up(waits)),
            Some(Ok(Ok(result))) => Ok(result),
            Some(Ok(Err(reason))) => {
                tracing::warn!(plugin = %self.plugin, reason, "plugin answer refused");
                Err(Fault::BadResponse)
            }
            Some(Err(error)) => {
                tracing::debug!(plugin = %self.plugin, error = %format!("{error:#}"), "plugin fault");
                let fault = fault(&error, store);
                Err(if fault == Fault::Time {
                    self.time_is_up(waits)
                } else {
                    fault
                })
            }
        }
    }

    /// What it means that a call didn't end in time. Where the request left it little, that tells nothing of the plugin: it
    /// is when all else is slow that plugins are needed.
    fn time_is_up(&self, waits: &Waits) -> Fault {
        if waits.own(now()) < self.spec.limits.call_timeout / 2 {
            Fault::Busy
        } else {
            Fault::Time
        }
    }

    /// The right to one of the plugin's instances, and when it was had.
    async fn slot(&self, began: Instant, until: Instant) -> Result<(Slot<'_>, Instant), Fault> {
        if until <= began {
            return Err(Fault::Busy);
        }
        if let Some(slot) = self.slots.try_take() {
            return Ok((slot, began));
        }
        match Box::pin(tokio::time::timeout_at(until.into(), self.slots.wait())).await {
            Ok(slot) => Ok((slot, now())),
            Err(_) => Err(Fault::Busy),
        }
    }

    /// An instance, told of the call. If the process has no room for a new one, those that nobody uses make room.
    async fn instance(&self, brief: &Brief, began: Instant, until: Instant) -> Result<Instance, Fault> {
        if !self.spec.fresh_instance
            && let Some(mut instance) = self.idle.take()
        {
            instance.begin(&self.spec, brief, began, until);
            return Ok(instance);
        }
        loop {
            // Rare, so it doesn't belong in the size of every call's future.
            let made = Box::pin(self.instantiate(brief, began, until)).await;
            // Others may have taken the room that was made; but it ends, since each turn ends an instance.
            if !matches!(made, Err(Fault::Busy)) || !self.host.shelves().make_room() {
                return made;
            }
        }
    }

    async fn instantiate(&self, brief: &Brief, began: Instant, until: Instant) -> Result<Instance, Fault> {
        let version::Code::Component(code) = &*self.version.code else {
            return Err(Fault::NotLoaded);
        };
        let room = self.host.room().ok_or(Fault::Busy)?;
        let lease = Arc::new(Mutex::new(self.host.lease(&self.version.shared)));
        let state = State::new(
            &self.plugin,
            &self.spec,
            &self.version.shared,
            Memory::new(&self.spec, Arc::clone(&lease), self.host.shelves()),
            self.mesh.clone(),
            began,
        );
        let mut store = store(self.host.engine(), &self.spec, state);
        store.data_mut().begin(&self.spec, brief, began, until);
        store.set_epoch_deadline(1);
        let waits = Arc::clone(&store.data().waits);
        let made = waits.run(pin!(code.instantiate(&mut store))).await;
        let guest = match made {
            Some(Ok(guest)) => guest,
            Some(Err(error)) => {
                tracing::debug!(plugin = %self.plugin, error = %format!("{error:#}"), "no plugin instance");
                let fault = fault(&error, &store);
                return Err(if fault == Fault::Time {
                    self.time_is_up(&waits)
                } else {
                    fault
                });
            }
            None => return Err(self.time_is_up(&waits)),
        };
        Ok(Instance {
            store,
            guest: Box::new(guest),
            waits,
            used: began,
            _lease: lease,
            _room: room,
        })
    }
}

/// A store for one instance, within its plugin's bounds.
fn store(engine: &Engine, spec: &Plugin, state: State) -> Store<State> {
    let mut store = Store::new(engine, state);
    store.limiter(|state| &mut state.memory);
    // A list may name the same bytes a thousand times: copies of them are bounded as the guest's memory is.
    let memory = usize::try_from(spec.limits.memory_bytes).unwrap_or(usize::MAX);
    store.set_hostcall_fuel(memory.max(MIN_HANDED));
    store.epoch_deadline_callback(|context| Ok(context.data().waits.tick()));
    store
}

/// Checks what a component exports, on an instance that is used for nothing else. Not for a worker's thread.
///
/// # Errors
///
/// [`Code::check`].
pub(crate) async fn check(
    host: &Arc<Host>,
    spec: &Arc<Plugin>,
    shared: &Arc<Shared>,
    code: &Code,
) -> wasmtime::Result<()> {
    let Some(_room) = host.room() else {
        return Ok(());
    };
    let lease = Arc::new(Mutex::new(host.lease(shared)));
    let (began, until) = (now(), now() + CHECK);
    let memory = Memory::new(spec, lease, host.shelves());
    // Nobody makes its calls.
    let (mesh, _) = mpsc::unbounded_channel();
    let state = State::new(&shared.name, spec, shared, memory, mesh, began);
    let mut store = store(host.engine(), spec, state);
    let brief = Brief {
        deadline: None,
        origin: Arc::default(),
    };
    store.data_mut().begin(spec, &brief, began, until);
    store.set_epoch_deadline(1);
    let _running = host.run();
    let waits = Arc::clone(&store.data().waits);
    let checked = waits.run(pin!(code.check(&mut store))).await;
    checked.unwrap_or(Ok(()))
}

impl Instance {
    fn begin(&mut self, spec: &Plugin, brief: &Brief, began: Instant, until: Instant) {
        self.store.data_mut().begin(spec, brief, began, until);
        self.store.set_epoch_deadline(1);
    }
}

fn fault(error: &wasmtime::Error, store: &Store<State>) -> Fault {
    if error.is::<PoolConcurrencyLimitError>() {
        return Fault::Busy;
    }
    match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => Fault::Time,
        // There was no memory for it in the process: that isn't the plugin's fault.
        _ if store.data().memory.starved => Fault::Busy,
        // An allocator that was refused memory aborts, which is a trap like any other.
        _ if store.data().memory.denied => Fault::Memory,
        _ => Fault::Trap,
    }
}

//! One virtual machine: started when the first request comes, gone when its guest faults, and then started anew.

use super::calls::Heard;
use super::context::{Context, Http, Root};
use super::exports::{Exports, Pick};
use super::shared::{Marked, Ready};
use super::state::{Starting, State};
use super::{callouts, wasi};
use crate::call::Facts;
use crate::clock::now;
use crate::component::Memory as Limits;
use crate::fault::Fault;
use crate::host::Host;
use crate::memory::Lease;
use crate::mesh::MeshSender;
use crate::version::{Code, Version};
use crate::worker::{Chosen, Events};
use futures_util::StreamExt;
use futures_util::future::{AbortHandle, Abortable};
use futures_util::stream::{self, FuturesUnordered};
use leeward_policy::model::Plugin;
use std::collections::{HashMap, VecDeque};
use std::mem;
use std::pin::{Pin, pin};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit, mpsc};
use tokio::time::MissedTickBehavior;
use wasmtime::{PoolConcurrencyLimitError, Store, Trap, WasmParams, WasmResults};

/// Something that is done beside requests.
pub(crate) type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Root contexts of a machine.
const MAX_ROOTS: usize = 256;
/// Requests that are over, and that the guest hasn't said that it is done with.
const MAX_LINGERING: usize = 1024;
/// How long starting may take at least: runtimes of languages have much to set up.
const START: Duration = Duration::from_secs(1);
/// How long a request without a deadline waits for those before it.
const PATIENCE: Duration = Duration::from_secs(1);
/// Ticks of the clock after which a call lets others in for the first time: a whole one, since most have ended by then.
const TICKS: u64 = 2;
/// Items of queues that a machine is told of and hasn't read.
const READY: usize = 1024;

/// The place of a version's virtual machine on one worker.
pub(crate) struct Machine {
    host: Arc<Host>,
    events: Rc<dyn Events>,
    mesh: MeshSender,
    pub(crate) plugin: Arc<str>,
    pub(crate) spec: Arc<Plugin>,
    pub(crate) version: Arc<Version>,
    slot: Arc<Mutex<Slot>>,
    /// To what attends to all that goes on beside requests. There is at most one of each call of a guest that is under
    /// way, each request that ends, and each timer.
    tasks: mpsc::UnboundedSender<Task>,
}

/// The right to a machine.
pub(crate) type Turn = OwnedMutexGuard<Slot>;

/// What is in the place of a machine.
pub(crate) struct Slot {
    vm: Option<Vm>,
    /// The number of the last context. No other has it, whatever machine it is in.
    last: u32,
    /// Requests whose machine is gone; they have yet to be told.
    lost: HashMap<u32, Box<Http>>,
    /// Another version has taken its place: it ends when its last request does.
    retired: bool,
}

/// A machine that runs.
struct Vm {
    store: Store<State>,
    exports: Exports,
    /// By their configuration; `None` for one that the guest has refused.
    roots: HashMap<Arc<str>, Option<u32>>,
    /// The guest has been told that it starts.
    started: bool,
    /// It has refused to.
    refused: bool,
    timers: HashMap<u32, AbortHandle>,
    lingering: VecDeque<u32>,
    /// Its part of the process's memory, and of what the process may have; given back after the store is gone.
    _lease: Arc<std::sync::Mutex<Lease>>,
    _room: OwnedSemaphorePermit,
}

impl Machine {
    pub(crate) fn new(
        host: &Arc<Host>,
        events: &Rc<dyn Events>,
        mesh: &MeshSender,
        chosen: &Chosen,
    ) -> Rc<Self> {
        let (tasks, inbox) = mpsc::unbounded_channel();
        tokio::task::spawn_local(attend(inbox));
        Rc::new(Self {
            host: Arc::clone(host),
            events: Rc::clone(events),
            mesh: mesh.clone(),
            plugin: Arc::clone(&chosen.name),
            spec: Arc::clone(&chosen.spec),
            version: Arc::clone(&chosen.version),
            slot: Arc::new(Mutex::new(Slot {
                vm: None,
                last: 0,
                lost: HashMap::new(),
                retired: false,
            })),
            tasks,
        })
    }

    /// Waits for those before, at most until the request's deadline.
    pub(crate) async fn turn(&self, deadline: Option<Instant>) -> Result<Turn, Fault> {
        if let Some(turn) = self.try_turn() {
            return Ok(turn);
        }
        let until = deadline.unwrap_or_else(|| now() + PATIENCE);
        let turn = tokio::time::timeout_at(until.into(), Arc::clone(&self.slot).lock_owned());
        turn.await.map_err(|_| Fault::Busy)
    }

    /// The right to the machine, if nobody has it.
    pub(crate) fn try_turn(&self) -> Option<Turn> {
        Arc::clone(&self.slot).try_lock_owned().ok()
    }

    /// Waits for those before, however long that takes.
    pub(crate) async fn any_turn(&self) -> Turn {
        Arc::clone(&self.slot).lock_owned().await
    }

    /// Has something done beside requests.
    pub(crate) fn attend(&self, task: Task) {
        // Only once the worker is gone is there nobody to do it.
        let _ = self.tasks.send(task);
    }

    /// Whether the process still has this version.
    pub(crate) fn is_current(&self) -> bool {
        self.host.serves(&self.plugin, &self.version)
    }

    /// Ends it once its last request has.
    pub(crate) fn retire(self: &Rc<Self>) {
        let machine = Rc::clone(self);
        self.attend(Box::pin(async move {
            let mut slot = machine.any_turn().await;
            slot.retired = true;
            slot.tidy(&machine).await;
        }));
    }

    fn report(&self, function: &'static str, outcome: Result<(), Fault>, took: Duration) {
        self.version.ended(&*self.events, function, outcome, took);
    }

    fn export(&self, state: &mut State) {
        for mark in state.marks.drain(..) {
            #[expect(clippy::cast_precision_loss, reason = "metrics are numbers of 53 bits")]
            match mark.what {
                Marked::Count(by) => self.events.count(&self.plugin, &mark.name, by),
                Marked::Gauge(value) => self.events.gauge(&self.plugin, &mark.name, value as f64),
                Marked::Observe(value) => self.events.observe(&self.plugin, &mark.name, value as f64),
            }
        }
    }

    /// Calls the root context again and again.
    fn tick(self: &Rc<Self>, root: u32, period: Duration) -> AbortHandle {
        let (abort, registration) = AbortHandle::new_pair();
        let mut interval = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ticks = stream::unfold(interval, |mut interval| async {
            interval.tick().await;
            Some(((), interval))
        });
        let machine = Rc::downgrade(self);
        self.attend(Box::pin(async move {
            // What is given up is waiting, never a call of the guest.
            let mut ticks = pin!(Abortable::new(ticks, registration));
            while ticks.next().await.is_some() {
                let Some(machine) = Weak::upgrade(&machine) else {
                    break;
                };
                let mut slot = machine.any_turn().await;
                if !machine.is_current() {
                    slot.retired = true;
                }
                if slot.has(root) {
                    // A fault has been reported, and there is nobody else to tell.
                    let _ = slot
                        .call(&machine, "proxy_on_tick", root, |e| &e.on_tick, root)
                        .await;
                }
                slot.tidy(&machine).await;
            }
        }));
        abort
    }

    /// Tells root contexts of what there is in queues.
    fn read(self: &Rc<Self>, mut ready: mpsc::Receiver<Ready>) {
        let machine = Rc::downgrade(self);
        self.attend(Box::pin(async move {
            while let Some(Ready { root, queue }) = ready.recv().await {
                let Some(machine) = Weak::upgrade(&machine) else {
                    break;
                };
                let mut slot = machine.any_turn().await;
                if !machine.is_current() {
                    slot.retired = true;
                }
                if slot.has(root) {
                    let _ = slot
                        .call(
                            &machine,
                            "proxy_on_queue_ready",
                            root,
                            |e| &e.on_queue_ready,
                            (root, queue),
                        )
                        .await;
                }
                slot.tidy(&machine).await;
            }
        }));
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("Machine");
        out.field("plugin", &self.plugin)
            .field("version", &self.version.short);
        if let Ok(slot) = self.slot.try_lock() {
            let contexts = slot.vm.as_ref().map_or(0, |vm| vm.store.data().contexts.len());
            out.field("contexts", &contexts).field("lost", &slot.lost.len());
        }
        out.finish_non_exhaustive()
    }
}

/// Does what there is to do, all of it at once.
async fn attend(mut inbox: mpsc::UnboundedReceiver<Task>) {
    let mut tasks = FuturesUnordered::new();
    loop {
        tokio::select! {
            task = inbox.recv() => match task {
                Some(task) => tasks.push(task),
                None => break,
            },
            Some(()) = tasks.next() => {}
        }
    }
}

impl Slot {
    /// Whether there is a machine that has this context.
    pub(crate) fn has(&self, context: u32) -> bool {
        let contexts = self.vm.as_ref().map(|vm| &vm.store.data().contexts);
        contexts.is_some_and(|contexts| contexts.contains_key(&context))
    }

    pub(crate) fn exports(&self) -> Option<&Exports> {
        self.vm.as_ref().map(|vm| &vm.exports)
    }

    pub(crate) fn state(&mut self) -> Option<&mut State> {
        self.vm.as_mut().map(|vm| vm.store.data_mut())
    }

    /// A request that is on its way.
    pub(crate) fn http(&mut self, context: u32) -> Option<&mut Http> {
        match self.state()?.contexts.get_mut(&context) {
            Some(Context::Http(http)) => Some(http),
            Some(Context::Root(_)) | None => None,
        }
    }

    /// A request whose machine is gone.
    pub(crate) fn lost(&mut self, context: u32) -> Option<&mut Http> {
        self.lost.get_mut(&context).map(|http| &mut **http)
    }

    /// Its request has been told.
    pub(crate) fn forget_lost(&mut self, context: u32) {
        self.lost.remove(&context);
    }

    /// A new context for a request, in the root context of its configuration; the machine is started if it isn't there.
    pub(crate) async fn enter(&mut self, machine: &Rc<Machine>, facts: &Facts) -> Result<u32, Fault> {
        if self.vm.is_none() {
            self.start(machine).await?;
        }
        let known = self
            .vm
            .as_ref()
            .and_then(|vm| vm.roots.get(&facts.config).copied());
        let root = match known {
            Some(root) => root,
            None => self.add_root(machine, facts).await?,
        };
        let root = root.ok_or(Fault::NotLoaded)?;
        let context = self.number();
        let vm = self.vm.as_mut().ok_or(Fault::Trap)?;
        let http = Context::Http(Box::new(Http::new(root, facts.clone())));
        vm.store.data_mut().contexts.insert(context, http);
        let created = self.call(
            machine,
            "proxy_on_context_create",
            context,
            |e| &e.on_context_create,
            (context, root),
        );
        if let Err(fault) = created.await {
            // Its request is told by this, and has no number to be told by later.
            self.forget_lost(context);
            return Err(fault);
        }
        Ok(context)
    }

    /// The next number. It would take a machine with four billion requests to come round.
    fn number(&mut self) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1);
            if self.last != 0 && !self.has(self.last) && !self.lost.contains_key(&self.last) {
                return self.last;
            }
        }
    }

    async fn start(&mut self, machine: &Rc<Machine>) -> Result<(), Fault> {
        let began = now();
        let started = Vm::start(machine, began).await;
        machine.report(
            "start",
            started.as_ref().map(|_| ()).map_err(|fault| *fault),
            now() - began,
        );
        self.vm = Some(started?);
        Ok(())
    }

    /// A root context for a configuration: its number, if the guest takes the configuration.
    async fn add_root(&mut self, machine: &Rc<Machine>, facts: &Facts) -> Result<Option<u32>, Fault> {
        self.make_room(machine).await?;
        let root = self.number();
        let vm = self.vm.as_mut().ok_or(Fault::Trap)?;
        if vm.refused {
            return Ok(None);
        }
        let first = !vm.started;
        let config = Arc::clone(&facts.config);
        let context = Context::Root(Root {
            config,
            period: None,
            period_changed: false,
        });
        let state = vm.store.data_mut();
        state.contexts.insert(root, context);
        state.starting = if first { Starting::Machine } else { Starting::Root };
        let (vm_len, len) = (len(&machine.spec.config), len(&facts.config));
        self.call(
            machine,
            "proxy_on_context_create",
            root,
            |e| &e.on_context_create,
            (root, 0),
        )
        .await?;
        let mut good = true;
        if first {
            let started = self.call(
                machine,
                "proxy_on_vm_start",
                root,
                |e| &e.on_vm_start,
                (root, vm_len),
            );
            good = started.await? != Some(0);
        }
        if let Some(vm) = &mut self.vm {
            (vm.started, vm.refused) = (true, !good);
            vm.store.data_mut().starting = Starting::Root;
        }
        if good {
            let configured = self.call(
                machine,
                "proxy_on_configure",
                root,
                |e| &e.on_configure,
                (root, len),
            );
            good = configured.await? != Some(0);
        }
        let vm = self.vm.as_mut().ok_or(Fault::Trap)?;
        vm.store.data_mut().starting = Starting::No;
        if !good {
            tracing::warn!(plugin = %machine.plugin, "the plugin refuses its configuration");
        }
        let root = good.then_some(root);
        vm.roots.insert(Arc::clone(&facts.config), root);
        Ok(root)
    }

    /// If there are as many root contexts as there may be, one goes that has no request.
    async fn make_room(&mut self, machine: &Rc<Machine>) -> Result<(), Fault> {
        let Some(vm) = &self.vm else { return Ok(()) };
        if vm.roots.len() < MAX_ROOTS {
            return Ok(());
        }
        let contexts = &vm.store.data().contexts;
        let in_use = |root: u32| {
            let is_of = |context: &Context| matches!(context, Context::Http(http) if http.root == root);
            contexts.values().any(is_of)
        };
        let idle = vm
            .roots
            .iter()
            .find(|(_, root)| root.is_none_or(|root| !in_use(root)));
        let (config, root) = idle
            .map(|(config, root)| (Arc::clone(config), *root))
            .ok_or(Fault::Busy)?;
        if let Some(root) = root {
            self.end_root(machine, root).await?;
        }
        if let Some(vm) = &mut self.vm {
            vm.roots.remove(&config);
        }
        Ok(())
    }

    async fn end_root(&mut self, machine: &Rc<Machine>, root: u32) -> Result<(), Fault> {
        self.call(machine, "proxy_on_done", root, |e| &e.on_done, root)
            .await?;
        self.call(machine, "proxy_on_delete", root, |e| &e.on_delete, root)
            .await?;
        if let Some(vm) = &mut self.vm {
            let state = vm.store.data_mut();
            state.contexts.remove(&root);
            state.calls.end_all(root);
            if let Some(timer) = vm.timers.remove(&root) {
                timer.abort();
            }
        }
        Ok(())
    }

    /// A request is over.
    pub(crate) async fn finish(&mut self, machine: &Rc<Machine>, context: u32) -> Result<(), Fault> {
        self.lost.remove(&context);
        let Some(http) = self.http(context) else {
            return Ok(());
        };
        http.ended = Some(now());
        let done = self.call(machine, "proxy_on_done", context, |e| &e.on_done, context);
        if done.await? != Some(0) {
            return self.delete(machine, context).await;
        }
        if let Some(http) = self.http(context) {
            http.lingers = true;
        }
        let Some(vm) = &mut self.vm else { return Ok(()) };
        vm.lingering.push_back(context);
        if vm.lingering.len() > MAX_LINGERING
            && let Some(oldest) = vm.lingering.pop_front()
        {
            self.delete(machine, oldest).await?;
        }
        Ok(())
    }

    /// The guest is done with a request.
    async fn delete(&mut self, machine: &Rc<Machine>, context: u32) -> Result<(), Fault> {
        self.call(machine, "proxy_on_log", context, |e| &e.on_log, context)
            .await?;
        self.call(machine, "proxy_on_delete", context, |e| &e.on_delete, context)
            .await?;
        if let Some(state) = self.state() {
            state.contexts.remove(&context);
        }
        Ok(())
    }

    /// Does what the guest's calls have left to do: to be called after each that is about no request's own.
    pub(crate) async fn tidy(&mut self, machine: &Rc<Machine>) {
        while let Some(context) = self.state().and_then(|state| state.done.pop()) {
            if let Some(vm) = &mut self.vm {
                vm.lingering.retain(|lingering| *lingering != context);
            }
            if self.delete(machine, context).await.is_err() {
                break;
            }
        }
        if self.retired && self.vm.as_ref().is_some_and(|vm| !vm.has_requests()) {
            let roots: Vec<_> = self
                .vm
                .iter()
                .flat_map(|vm| vm.roots.values())
                .flatten()
                .copied()
                .collect();
            for root in roots {
                if self.end_root(machine, root).await.is_err() {
                    break;
                }
            }
            self.vm = None;
        }
    }

    /// Has the guest called, with something to tell it of an answer.
    pub(crate) async fn tell<P: WasmParams + Sync, R: WasmResults + Sync>(
        &mut self,
        machine: &Rc<Machine>,
        function: &'static str,
        heard: Heard,
        (root, pick): (u32, Pick<P, R>),
        params: P,
    ) {
        if !self.has(root) {
            return;
        }
        if let Some(state) = self.state() {
            state.calls.heard = heard;
        }
        // A fault has been reported, and there is nobody else to tell.
        let _ = self.call(machine, function, root, pick, params).await;
        if let Some(state) = self.state() {
            state.calls.heard = Heard::default();
        }
        self.tidy(machine).await;
    }

    /// Calls a function of the guest, if it has it. After a fault the machine is gone.
    pub(crate) async fn call<P: WasmParams + Sync, R: WasmResults + Sync>(
        &mut self,
        machine: &Rc<Machine>,
        function: &'static str,
        context: u32,
        pick: Pick<P, R>,
        params: P,
    ) -> Result<Option<R>, Fault> {
        let vm = self.vm.as_mut().ok_or(Fault::Trap)?;
        if pick(&vm.exports).is_none() {
            return Ok(None);
        }
        let began = now();
        let limit = match vm.store.data().starting {
            Starting::No => machine.spec.limits.call_timeout,
            Starting::Machine | Starting::Root => machine.spec.limits.call_timeout.max(START),
        };
        let running = machine.host.run();
        let called = vm.call(context, (began, began + limit), pick, params).await;
        drop(running);
        machine.report(
            function,
            called.as_ref().map(|_| ()).map_err(|fault| *fault),
            now() - began,
        );
        let state = vm.store.data_mut();
        machine.export(state);
        match called {
            Ok(result) => {
                state.commit();
                vm.settle(machine);
                Ok(result)
            }
            Err(fault) => {
                self.kill();
                Err(fault)
            }
        }
    }

    /// Ends the machine. Its requests are told when they come next.
    fn kill(&mut self) {
        let Some(vm) = self.vm.take() else { return };
        for timer in vm.timers.values() {
            timer.abort();
        }
        for (number, context) in vm.store.into_data().contexts {
            if let Context::Http(mut http) = context
                && http.ended.is_none()
            {
                http.undo();
                http.wake();
                self.lost.insert(number, http);
            }
        }
    }
}

impl Vm {
    async fn start(machine: &Rc<Machine>, began: Instant) -> Result<Self, Fault> {
        loop {
            let started = Self::try_start(machine, began).await;
            // Instances of components that nobody uses make room. That ends, since each turn ends one.
            if !matches!(started, Err(Fault::Busy)) || !machine.host.shelves().make_room() {
                return started;
            }
        }
    }

    async fn try_start(machine: &Rc<Machine>, began: Instant) -> Result<Self, Fault> {
        let Code::ProxyWasm(code) = &*machine.version.code else {
            return Err(Fault::NotLoaded);
        };
        let room = machine.host.room().ok_or(Fault::Busy)?;
        let lease = Arc::new(std::sync::Mutex::new(machine.host.lease(&machine.version.shared)));
        let (ready, receiver) = mpsc::channel(READY);
        let state = State::new(
            &machine.plugin,
            &machine.spec,
            &machine.version.shared,
            code.version,
            machine.mesh.clone(),
            ready,
            Limits::new(&machine.spec, Arc::clone(&lease), machine.host.shelves()),
            began,
        );
        let mut store = Store::new(machine.host.engine(), state);
        store.limiter(|state| &mut state.limits);
        store.epoch_deadline_callback(|context| Ok(context.data().waits.tick()));
        let until = began + machine.spec.limits.call_timeout.max(START);
        store.data_mut().begin(0, began, until);
        let waits = Arc::clone(&store.data().waits);
        store.set_epoch_deadline(TICKS);
        let _running = machine.host.run();
        let exports = async {
            let (start, exports) = code.instantiate(&mut store).await?;
            if let Some(run) = &start.run {
                wasi::ended_well(run.call_async(&mut store, ()).await)?;
            }
            if let Some(main) = &start.main {
                main.call_async(&mut store, (0, 0)).await?;
            }
            Ok(exports)
        };
        let called = waits.run(pin!(exports)).await;
        let exports = match called {
            Some(Ok(exports)) => exports,
            Some(Err(error)) => return Err(fault(&machine.plugin, &error, &store)),
            None => return Err(Fault::Time),
        };
        machine.read(receiver);
        Ok(Self {
            store,
            exports,
            roots: HashMap::new(),
            started: false,
            refused: false,
            timers: HashMap::new(),
            lingering: VecDeque::new(),
            _lease: lease,
            _room: room,
        })
    }

    async fn call<P: WasmParams + Sync, R: WasmResults + Sync>(
        &mut self,
        context: u32,
        (began, until): (Instant, Instant),
        pick: Pick<P, R>,
        params: P,
    ) -> Result<Option<R>, Fault> {
        let Some(function) = pick(&self.exports) else {
            return Ok(None);
        };
        self.store.data_mut().begin(context, began, until);
        self.store.set_epoch_deadline(TICKS);
        let waits = Arc::clone(&self.store.data().waits);
        let called = waits
            .run(pin!(function.call_async(&mut self.store, params)))
            .await;
        called
            .ok_or(Fault::Time)?
            .map(Some)
            .map_err(|error| fault(&self.store.data().plugin, &error, &self.store))
    }

    /// Attends to what the guest has begun in its call.
    fn settle(&mut self, machine: &Rc<Machine>) {
        let state = self.store.data_mut();
        for begun in mem::take(&mut state.calls.begun) {
            machine.attend(callouts::attend(machine, begun));
        }
        if mem::take(&mut state.periods_changed) {
            self.set_timers(machine);
        }
    }

    fn set_timers(&mut self, machine: &Rc<Machine>) {
        for (number, context) in &mut self.store.data_mut().contexts {
            let Context::Root(root) = context else { continue };
            if !mem::take(&mut root.period_changed) {
                continue;
            }
            if let Some(timer) = self.timers.remove(number) {
                timer.abort();
            }
            if let Some(period) = root.period {
                self.timers.insert(*number, machine.tick(*number, period));
            }
        }
    }

    fn has_requests(&self) -> bool {
        let mut contexts = self.store.data().contexts.values();
        contexts.any(|context| matches!(context, Context::Http(_)))
    }
}

fn fault(plugin: &str, error: &wasmtime::Error, store: &Store<State>) -> Fault {
    tracing::debug!(plugin, error = %format!("{error:#}"), "plugin fault");
    if error.is::<PoolConcurrencyLimitError>() {
        return Fault::Busy;
    }
    match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => Fault::Time,
        // There was no memory for it in the process: that isn't the plugin's fault.
        _ if store.data().limits.starved => Fault::Busy,
        // An allocator that was refused memory aborts, which is a trap like any other.
        _ if store.data().limits.denied => Fault::Memory,
        _ => Fault::Trap,
    }
}

fn len(text: &str) -> u32 {
    u32::try_from(text.len()).unwrap_or(u32::MAX)
}

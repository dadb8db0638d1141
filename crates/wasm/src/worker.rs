//! One for each worker thread: instances, kept and reused.

use crate::answer::check;
use crate::bindings::Fallback;
use crate::bindings::leeward::plugin::types;
use crate::guest::{FailedCall, FailedRequest, MAX_LINES, State};
use crate::host::{Host, Loaded};
use leeward_policy::model::Plugin;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wasmtime::{PoolConcurrencyLimitError, Store, Trap, UpdateDeadline};

/// What a plugin wants done.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Action {
    /// Answer with this; it has been checked.
    Respond {
        /// 200 to 599.
        status: u16,
        /// Valid fields, none of which is for one hop.
        headers: Vec<(String, Vec<u8>)>,
        /// The body.
        body: Vec<u8>,
    },
    /// Send the request to this service instead.
    Reroute(String),
    /// Nothing to offer.
    Decline,
}

/// Why a call gave no action. A fault is the plugin's, never the request's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// The guest trapped.
    Trap,
    /// It was still running when its time was up.
    Time,
    /// It asked for more memory than it may have.
    Memory,
    /// Its answer is not one that may be given.
    BadResponse,
    /// There is no such plugin here.
    NotLoaded,
    /// All its instances were busy until the time was up, or the process has as many as it may.
    Busy,
}

impl Fault {
    /// The word used in traces, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Time => "time",
            Self::Memory => "memory",
            Self::BadResponse => "bad_response",
            Self::NotLoaded => "not_loaded",
            Self::Busy => "busy",
        }
    }
}

/// One worker's instances.
pub struct Worker {
    host: Arc<Host>,
    pools: RefCell<HashMap<Box<str>, Rc<Pool>>>,
    seen: Cell<u64>,
}

/// The instances of one plugin on one worker.
struct Pool {
    loaded: Arc<Loaded>,
    spec: Plugin,
    idle: RefCell<Vec<Instance>>,
    slots: Rc<Semaphore>,
}

struct Instance {
    store: Store<State>,
    guest: Fallback,
    /// Its part of what the process may have; given back after the store is gone.
    _room: OwnedSemaphorePermit,
}

/// Least that a guest may hand over in one call, in bytes: an answer of the largest size and what comes with it.
const MIN_HANDED: usize = 4 << 20;

/// Takes what a guest counted: the plugin's counter, and by how much.
type Count<'a> = &'a mut dyn FnMut(&str, u64);

impl Worker {
    /// A worker of `host`, with no instances yet.
    pub fn new(host: &Arc<Host>) -> Self {
        Self {
            host: Arc::clone(host),
            pools: RefCell::default(),
            seen: Cell::new(0),
        }
    }

    /// Asks a plugin what to do about a failed call. Ends within the plugin's time limit, and before
    /// `deadline`. What the guest counts goes to `count`, also when it then faults.
    ///
    /// Dropping the future ends the call; its instance is thrown away.
    ///
    /// # Errors
    ///
    /// [`Fault`]; the instance is gone, and the next call gets another.
    pub async fn on_failure(
        &self,
        name: &Arc<str>,
        spec: &Plugin,
        call: FailedCall,
        deadline: Option<Instant>,
        count: Count<'_>,
    ) -> Result<Action, Fault> {
        let now = tokio::time::Instant::now().into_std();
        let limit = now + spec.call_timeout;
        let until = deadline.map_or(limit, |deadline| deadline.min(limit));
        let pool = self.pool(name, spec).ok_or(Fault::NotLoaded)?;
        let slot = tokio::time::timeout_at(until.into(), pool.slots.acquire()).await;
        let Ok(Ok(_slot)) = slot else {
            return Err(Fault::Busy);
        };
        let _running = self.host.run();
        let idle = pool.idle.borrow_mut().pop();
        let mut instance = match idle {
            Some(instance) => instance,
            None => self.instantiate(name, &pool, until).await?,
        };
        let result = instance.call(call, deadline, until).await;
        for (counter, by) in instance.store.data_mut().counts.drain() {
            count(&counter, by);
        }
        let action = result?;
        pool.idle.borrow_mut().push(instance);
        Ok(action)
    }

    fn pool(&self, name: &Arc<str>, spec: &Plugin) -> Option<Rc<Pool>> {
        let mut pools = self.pools.borrow_mut();
        let generation = self.host.generation();
        if self.seen.replace(generation) != generation {
            // Instances of what was replaced or removed go, but for those in the middle of a call.
            pools.retain(|name, pool| {
                self.host
                    .loaded(name)
                    .is_some_and(|loaded| loaded.serial == pool.loaded.serial)
            });
        }
        if let Some(pool) = pools.get(&**name)
            && pool.spec == *spec
        {
            return Some(Rc::clone(pool));
        }
        let max = usize::try_from(spec.max_instances).unwrap_or(usize::MAX);
        let pool = Rc::new(Pool {
            loaded: self.host.loaded(name)?,
            spec: spec.clone(),
            idle: RefCell::default(),
            slots: Rc::new(Semaphore::new(max.min(Semaphore::MAX_PERMITS))),
        });
        pools.insert((&**name).into(), Rc::clone(&pool));
        Some(pool)
    }

    /// An instance; if the process has no room for more, for one of this worker's that nobody uses.
    async fn instantiate(&self, name: &Arc<str>, pool: &Pool, until: Instant) -> Result<Instance, Fault> {
        match self.try_instantiate(name, pool, until).await {
            Err(Fault::Busy) if self.discard_idle() => self.try_instantiate(name, pool, until).await,
            made => made,
        }
    }

    async fn try_instantiate(&self, name: &Arc<str>, pool: &Pool, until: Instant) -> Result<Instance, Fault> {
        let room = self.host.room().ok_or(Fault::Busy)?;
        let memory = usize::try_from(pool.spec.memory_bytes).unwrap_or(usize::MAX);
        let counters = Arc::clone(&pool.loaded.counters);
        let state = State::new(Arc::clone(name), counters, memory, until);
        let mut store = Store::new(self.host.engine(), state);
        store.limiter(|state| state);
        // A list may name the same bytes a thousand times: copies of them are bounded as the guest's memory is.
        store.set_hostcall_fuel(memory.max(MIN_HANDED));
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(|context| {
            let now = tokio::time::Instant::now().into_std();
            Ok(if now >= context.data().until {
                UpdateDeadline::Interrupt
            } else {
                // Tokio's own way to yield lets timers and sockets in; wasmtime's goes to the end of the queue,
                // which they are looked at only every 61st time.
                UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now()))
            })
        });
        match pool.loaded.pre.instantiate_async(&mut store).await {
            Ok(guest) => Ok(Instance {
                store,
                guest,
                _room: room,
            }),
            Err(error) => Err(fault(&error, &store)),
        }
    }

    /// Ends every instance of this worker that nobody uses; whether there were any.
    fn discard_idle(&self) -> bool {
        let pools = self.pools.borrow();
        let mut any = false;
        for pool in pools.values() {
            any |= !std::mem::take(&mut *pool.idle.borrow_mut()).is_empty();
        }
        any
    }
}

impl Instance {
    async fn call(
        &mut self,
        call: FailedCall,
        deadline: Option<Instant>,
        until: Instant,
    ) -> Result<Action, Fault> {
        let state = self.store.data_mut();
        state.until = until;
        state.memory_denied = false;
        state.lines = MAX_LINES;
        let Ok(request) = state.table.push(FailedRequest { call, deadline }) else {
            return Err(Fault::Trap);
        };
        let rep = request.rep();
        let borrowed = wasmtime::component::Resource::new_borrow(rep);
        self.store.set_epoch_deadline(1);
        let action = match self.guest.call_on_failure(&mut self.store, borrowed).await {
            Ok(action) => action,
            Err(error) => {
                tracing::debug!(plugin = %self.store.data().plugin, error = %format!("{error:#}"), "plugin fault");
                return Err(fault(&error, &self.store));
            }
        };
        if self.store.data_mut().table.delete(request).is_err() {
            return Err(Fault::Trap);
        }
        match action {
            types::Action::Decline => Ok(Action::Decline),
            types::Action::Reroute(service) => Ok(Action::Reroute(service)),
            types::Action::Respond(response) => {
                if let Err(reason) = check(&response) {
                    tracing::warn!(plugin = %self.store.data().plugin, reason, "plugin answer refused");
                    return Err(Fault::BadResponse);
                }
                let types::Response {
                    status,
                    headers,
                    body,
                } = response;
                let headers = headers.into_iter().map(|h| (h.name, h.value)).collect();
                Ok(Action::Respond {
                    status,
                    headers,
                    body,
                })
            }
        }
    }
}

fn fault(error: &wasmtime::Error, store: &Store<State>) -> Fault {
    if error.is::<PoolConcurrencyLimitError>() {
        return Fault::Busy;
    }
    match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => Fault::Time,
        // An allocator that was refused memory aborts, which is a trap like any other.
        _ if store.data().memory_denied => Fault::Memory,
        _ => Fault::Trap,
    }
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("plugins", &self.pools.borrow().len())
            .finish_non_exhaustive()
    }
}

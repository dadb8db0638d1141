//! Components: the worlds of `leeward:plugin`, and `wasi:http`.
//!
//! Instances are pooled for each plugin on each worker, and reused; one that faulted is never used again.

use crate::call::{Action, Facts, FailedCall, RequestHead, Target};
use crate::fault::Fault;
use crate::host::Host;
use crate::known::ByAddress;
use crate::mesh::MeshSender;
use crate::worker::{Chosen, Events};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method};
use leeward_policy::model::Plugin;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use wasmtime::Error;
use wasmtime::component::Resource;

mod bindings;
mod calls;
mod code;
mod convert;
mod failure;
mod filter;
mod handler;
mod names;
mod passing;
mod pool;
mod shelf;
mod slots;
mod state;
mod stdio;
mod waits;

pub(crate) use code::Code;
pub(crate) use filter::Filter;
pub(crate) use pool::check;
pub(crate) use shelf::Shelves;
pub(crate) use state::Memory;
pub(crate) use waits::Waits;

use code::Guest;
use passing::{Message, Passing, THIS};
use pool::{Brief, Pool};
use state::Subject;

/// One worker's instances of components.
pub(crate) struct Pools {
    host: Arc<Host>,
    events: Rc<dyn Events>,
    mesh: MeshSender,
    /// By version.
    pools: RefCell<ByAddress<Held>>,
}

/// The instances of a version of a plugin.
struct Held {
    pool: Rc<Pool>,
    /// The policy of the last request, which is equal to the pool's and may be another object.
    spec: Arc<Plugin>,
}

impl Pools {
    pub(crate) fn new(host: &Arc<Host>, events: Rc<dyn Events>, mesh: MeshSender) -> Self {
        Self {
            host: Arc::clone(host),
            events,
            mesh,
            pools: RefCell::default(),
        }
    }

    pub(crate) async fn on_failure(&self, chosen: &Chosen, call: FailedCall) -> Result<Action, Fault> {
        let pool = self.pool(chosen);
        let brief = Brief::from(&call.facts);
        if let crate::version::Code::Component(Code::WasiHttp(_)) = &*chosen.version.code {
            let mut nothing = Subject::None;
            let handled = pool.call("handle", brief, &mut nothing, async |store, guest| {
                let Guest::WasiHttp(guest) = guest else {
                    return Err(Error::msg("it has no incoming-handler"));
                };
                handler::handle(store, guest, call).await
            });
            // Few plugins are of this kind, and it is large.
            return Box::pin(handled).await;
        }
        let mut subject = Subject::Failure(Box::new(call));
        let asked = pool.call("on-failure", brief, &mut subject, async |store, guest| {
            let request = Resource::new_borrow(THIS);
            let action = match guest {
                Guest::Fallback(guest) => guest.call_on_failure(store, request).await?,
                Guest::First(guest) => guest.call_on_failure(store, request).await?.into(),
                Guest::Filter(_) | Guest::Router(_) | Guest::WasiHttp(_) => {
                    return Err(Error::msg("it is not a fallback"));
                }
            };
            Ok(failure::action(action))
        });
        asked.await
    }

    pub(crate) async fn route(
        &self,
        chosen: &Chosen,
        head: RequestHead,
        facts: &Facts,
        targets: Vec<Target>,
    ) -> (RequestHead, Result<Option<usize>, Fault>) {
        let pool = self.pool(chosen);
        let passing = Passing::new(facts.clone(), Message::new(head, false));
        let mut subject = Subject::Passing(Box::new(passing));
        let asked = pool.call(
            "choose",
            Brief::from(facts),
            &mut subject,
            async |store, guest| {
                let Guest::Router(guest) = guest else {
                    return Err(Error::msg("it is not a router"));
                };
                let targets: Vec<_> = targets.iter().map(Into::into).collect();
                let request = Resource::new_borrow(THIS);
                let chosen = guest.call_choose(store, request, &targets).await?;
                let chosen = chosen.and_then(|at| usize::try_from(at).ok());
                Ok(Ok(chosen.filter(|at| *at < targets.len())))
            },
        );
        let result = asked.await;
        let head = match subject {
            Subject::Passing(passing) => passing.request.head,
            // What a call is about always comes back.
            Subject::None | Subject::Failure(_) => RequestHead {
                method: Method::GET,
                scheme: "http",
                authority: "".into(),
                path: PathAndQuery::from_static("/"),
                headers: HeaderMap::new(),
            },
        };
        (head, result)
    }

    pub(crate) fn filter(&self, chosen: &Chosen, facts: Facts) -> Filter {
        Filter::new(self.pool(chosen), facts)
    }

    /// The instances of a version under a policy.
    fn pool(&self, chosen: &Chosen) -> Rc<Pool> {
        let mut pools = self.pools.borrow_mut();
        let at = Arc::as_ptr(&chosen.version).addr();
        if let Some(held) = pools.get_mut(&at) {
            if Arc::ptr_eq(&held.spec, &chosen.spec) {
                return Rc::clone(&held.pool);
            }
            if held.spec == chosen.spec {
                held.spec = Arc::clone(&chosen.spec);
                return Rc::clone(&held.pool);
            }
        }
        // It is rare that there is another: a time to see which are of no use any more. Calls under way hold their own.
        pools.retain(|_, held| !held.pool.is_empty() || Rc::strong_count(&held.pool) > 1);
        let pool = Rc::new(Pool::new(&self.host, &self.events, &self.mesh, chosen));
        let held = Held {
            pool: Rc::clone(&pool),
            spec: Arc::clone(&chosen.spec),
        };
        // The same version under other policy takes the place of what it was.
        pools.insert(at, held);
        pool
    }
}

impl From<&Target> for bindings::router::Target {
    fn from(target: &Target) -> Self {
        Self {
            service: target.service.to_string(),
            weight: target.weight,
            healthy: target.healthy,
            endpoints: target.endpoints,
            circuit_open: target.circuit_open,
            under_way: target.under_way,
        }
    }
}

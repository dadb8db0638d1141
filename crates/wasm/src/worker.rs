//! One for each worker thread: what runs its plugins.

use crate::call::{Action, Facts, FailedCall, RequestHead, Target};
use crate::component;
use crate::fault::Fault;
use crate::filter::{Filter, Kind};
use crate::host::Host;
use crate::known::Known;
use crate::mesh::MeshSender;
use crate::proxy_wasm;
use crate::version::{Admitted, Code, Probe, Version};
use leeward_policy::model::Plugin;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Takes what is to be seen of plugins by people.
pub trait Events {
    /// A plugin counts.
    fn count(&self, plugin: &Arc<str>, name: &str, by: u64);
    /// A plugin's gauge stands at this.
    fn gauge(&self, plugin: &Arc<str>, name: &str, value: f64);
    /// A plugin's histogram gets this.
    fn observe(&self, plugin: &Arc<str>, name: &str, value: f64);
    /// A call has ended.
    fn called(&self, call: &Called<'_>);
}

/// A call that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Called<'a> {
    /// The plugin.
    pub plugin: &'a Arc<str>,
    /// The version, as the first 12 hex digits of its module's SHA-256.
    pub version: &'a Arc<str>,
    /// What was called, by the name in its contract.
    pub function: &'static str,
    /// How it ended.
    pub outcome: Result<(), Fault>,
    /// How long it took.
    pub took: Duration,
}

/// One worker's plugins.
pub struct Worker {
    host: Arc<Host>,
    known: RefCell<Known>,
    components: component::Pools,
    modules: proxy_wasm::Machines,
}

/// A version of a plugin that a request has got.
#[derive(Clone)]
pub struct Chosen {
    pub(crate) name: Arc<str>,
    pub(crate) spec: Arc<Plugin>,
    pub(crate) version: Arc<Version>,
    /// The request tries it.
    pub(crate) probe: Option<Arc<Probe>>,
}

impl Chosen {
    /// The version, as the first 12 hex digits of its module's SHA-256.
    pub fn version(&self) -> &Arc<str> {
        &self.version.short
    }

    fn went_well(&self) {
        if let Some(probe) = &self.probe {
            probe.went_well();
        }
    }
}

impl Worker {
    /// A worker of `host`, with no instances yet. Must be called on the thread that it is for.
    pub fn new(host: &Arc<Host>, events: Rc<dyn Events>, mesh: MeshSender) -> Self {
        Self {
            host: Arc::clone(host),
            known: RefCell::default(),
            components: component::Pools::new(host, Rc::clone(&events), mesh.clone()),
            modules: proxy_wasm::Machines::new(host, events, mesh),
        }
    }

    /// The version of a plugin for a request that has the policy `spec`; `canary` says that it gets the canary, if there is a good one.
    ///
    /// # Errors
    ///
    /// [`Fault::NotLoaded`] and [`Fault::Quarantined`].
    pub fn choose(&self, name: &Arc<str>, spec: &Arc<Plugin>, canary: bool) -> Result<Chosen, Fault> {
        let mut known = self.known.borrow_mut();
        let loaded = known.loaded(&self.host, name, spec).ok_or(Fault::NotLoaded)?;
        let Admitted { version, probe } = self.host.choose(name, spec, loaded, canary)?;
        Ok(Chosen {
            name: Arc::clone(name),
            spec: Arc::clone(spec),
            version,
            probe,
        })
    }

    /// Asks a plugin what to do about a failed call. Ends within the plugin's time limit, and before the deadline.
    ///
    /// Dropping the future ends the call; its instance is thrown away.
    ///
    /// # Errors
    ///
    /// [`Fault`]; the instance is gone, and the next call gets another.
    pub async fn on_failure(&self, chosen: &Chosen, call: FailedCall) -> Result<Action, Fault> {
        let asked = self.components.on_failure(chosen, call).await;
        if asked.is_ok() {
            chosen.went_well();
        }
        asked
    }

    /// Asks a router which of the targets a request goes to: its position, or `None` for the weights. The head
    /// comes back as it was.
    pub async fn route(
        &self,
        chosen: &Chosen,
        head: RequestHead,
        facts: &Facts,
        targets: Vec<Target>,
    ) -> (RequestHead, Result<Option<usize>, Fault>) {
        let (head, asked) = self.components.route(chosen, head, facts, targets).await;
        if asked.is_ok() {
            chosen.went_well();
        }
        (head, asked)
    }

    /// A filter for a request.
    ///
    /// # Errors
    ///
    /// [`Fault`], if its virtual machine can't be had.
    pub async fn filter(&self, chosen: &Chosen, facts: Facts) -> Result<Filter, Fault> {
        let kind = match &*chosen.version.code {
            Code::Component(_) => Kind::Component(Box::new(self.components.filter(chosen, facts))),
            // Not a part of what a component's filter takes.
            Code::ProxyWasm(_) => {
                let stream = Box::pin(self.modules.stream(chosen, &facts)).await?;
                Kind::ProxyWasm(Box::new(stream))
            }
        };
        Ok(Filter(kind, chosen.probe.clone()))
    }
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("modules", &self.modules)
            .finish_non_exhaustive()
    }
}

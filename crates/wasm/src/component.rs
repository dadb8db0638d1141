//! Components: the worlds of `leeward:plugin`, and `wasi:http`.
//!
//! Instances are pooled for each plugin on each worker, and reused; one that faulted is never used again.

use crate::call::{Action, Facts, FailedCall, RequestHead, Target};
use crate::fault::Fault;
use crate::host::Host;
use crate::mesh::MeshSender;
use crate::worker::{Chosen, Events};
use leeward_policy::model::PluginKind;
use std::rc::Rc;
use std::sync::Arc;
use wasmtime::Engine;
use wasmtime::component::Component;

mod filter;

pub(crate) use filter::Filter;

/// A component that is linked to what its kind may have.
pub(crate) struct Code {}

impl Code {
    /// Links a component.
    ///
    /// # Errors
    ///
    /// If it is not of the kind, or imports what it can't have.
    pub(crate) fn new(engine: &Engine, kind: PluginKind, component: &Component) -> wasmtime::Result<Self> {
        let _ = (engine, kind, component);
        Ok(Self {})
    }
}

/// One worker's instances of components.
pub(crate) struct Pools {}

impl Pools {
    pub(crate) fn new(host: &Arc<Host>, events: Rc<dyn Events>, mesh: MeshSender) -> Self {
        let _ = (host, events, mesh);
        Self {}
    }

    pub(crate) async fn on_failure(&self, chosen: &Chosen, call: FailedCall) -> Result<Action, Fault> {
        let _ = (chosen, call);
        Err(Fault::NotLoaded)
    }

    pub(crate) async fn route(
        &self,
        chosen: &Chosen,
        head: RequestHead,
        facts: &Facts,
        targets: Vec<Target>,
    ) -> (RequestHead, Result<Option<usize>, Fault>) {
        let _ = (chosen, facts, targets);
        (head, Err(Fault::NotLoaded))
    }

    pub(crate) fn filter(&self, chosen: &Chosen, facts: &Facts) -> Filter {
        let _ = (chosen, facts);
        Filter::default()
    }
}

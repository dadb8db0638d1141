//! proxy-wasm modules, ABI 0.1.0, 0.2.0 and 0.2.1: one long-lived virtual machine for each plugin on each worker.
//!
//! The machine has a root context for each configuration, and a context for each request. It does one thing at a time: a
//! call of the guest, within the plugin's time, while others wait for their turn. A guest that faults takes its machine with
//! it: each request that is in there fails at its next step, and the next one starts a new machine. What is kept for
//! longer (shared data, queues, metrics) is the plugin's, whatever machine it is in.
//!
//! What the ABI has for TCP connections is never called, and answers that it isn't there.
//!
//! Read first: [`Stream`], then `turns`, then `machine`.

use crate::call::Facts;
use crate::fault::Fault;
use crate::host::Host;
use crate::mesh::MeshSender;
use crate::worker::{Chosen, Events};
use machine::Machine;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use tokio::sync::watch;

mod abi;
mod callouts;
mod calls;
mod context;
mod exports;
mod fields;
mod grpc;
mod imports;
mod machine;
mod properties;
mod shared;
mod state;
mod stream;
mod turns;
mod upstream;
mod wasi;

pub(crate) use exports::Code;
pub(crate) use shared::Shared;
pub(crate) use stream::Stream;

/// One worker's virtual machines.
pub(crate) struct Machines {
    host: Arc<Host>,
    events: Rc<dyn Events>,
    mesh: MeshSender,
    known: Rc<Known>,
    /// Somebody ends machines that are of no use any more.
    tended: Cell<bool>,
}

/// Machines by the name of their plugin: one for each version.
type Known = RefCell<HashMap<Arc<str>, Vec<Rc<Machine>>>>;

impl Machines {
    pub(crate) fn new(host: &Arc<Host>, events: Rc<dyn Events>, mesh: MeshSender) -> Self {
        Self {
            host: Arc::clone(host),
            events,
            mesh,
            known: Rc::default(),
            tended: Cell::new(false),
        }
    }

    /// An HTTP context for a request; the virtual machine is started if it isn't there once the head comes.
    pub(crate) async fn stream(&self, chosen: &Chosen, facts: &Facts) -> Result<Stream, Fault> {
        Ok(Stream::new(self.machine(chosen), facts))
    }

    fn machine(&self, chosen: &Chosen) -> Rc<Machine> {
        if !self.tended.replace(true) {
            tokio::task::spawn_local(tend(Rc::downgrade(&self.known), self.host.changes()));
        }
        let mut machines = self.known.borrow_mut();
        if let Some(known) = machines.get(&chosen.name) {
            let fits = known.iter().find(|machine| {
                Arc::ptr_eq(&machine.version, &chosen.version)
                    && (Arc::ptr_eq(&machine.spec, &chosen.spec) || machine.spec == chosen.spec)
            });
            if let Some(machine) = fits {
                return Rc::clone(machine);
            }
        }
        let machine = Machine::new(&self.host, &self.events, &self.mesh, chosen);
        let of_plugin = machines.entry(Arc::clone(&chosen.name)).or_default();
        // The same version under other policy takes the place of what it was.
        of_plugin.retain(|machine| keep(machine, !Arc::ptr_eq(&machine.version, &chosen.version)));
        of_plugin.push(Rc::clone(&machine));
        machine
    }
}

/// Ends the machines of versions that requests don't get any more, whether or not a request comes.
async fn tend(known: Weak<Known>, mut changes: watch::Receiver<()>) {
    while changes.changed().await.is_ok() {
        let Some(known) = known.upgrade() else { break };
        known.borrow_mut().retain(|_, machines| {
            machines.retain(|machine| keep(machine, machine.is_current()));
            !machines.is_empty()
        });
    }
}

/// Has a machine that isn't kept end with its last request.
fn keep(machine: &Rc<Machine>, keep: bool) -> bool {
    if !keep {
        machine.retire();
    }
    keep
}

impl std::fmt::Debug for Machines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.known.borrow().values().flatten())
            .finish()
    }
}

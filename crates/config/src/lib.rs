//! Policy from a control plane or from files to the snapshot that requests read; and the proxy's certificates, from the
//! first ([`join`]) to the next ([`Keeper`]), or from an agent on the node ([`from_agent`]); and those of the node's workloads
//! ([`Workloads`]).
//!
//! In the path of policy: bytes arrive, `leeward-proto` parses them, plugins are made ready, a
//! [`leeward_policy::World`] keeps what is good, a snapshot is compiled and published, and the control plane
//! is told what is live and what is not.
//!
//! This crate does not know what plugins are made of (see [`Warm`]), and serves no request.
//!
//! Read first: [`Live`], then [`Subscription`].
//!
//! Invariants:
//! - Nothing is deleted but by a tombstone.
//! - A plugin's new revision is live when it is ready; its first one after a moment, whether it is or not. Nothing else
//!   waits for longer.
//! - A process is given what policy says that it is, looked up for each answer; its certificates are kept in memory alone.
//! - While no control plane answers, what is known stays, for as long as it takes; and what is kept in a [`StateDir`] comes back
//!   when the process does.

mod address;
mod agent;
mod apply;
mod certificates;
mod due;
mod files;
mod join;
mod live;
mod modules;
mod revoked;
mod rota;
mod state;
mod subscribe;
mod warming;
mod workloads;

pub use address::{Control, ControlAddress, InvalidControlAddress, Order};
pub use agent::{Agent, AgentError, from_agent};
pub use apply::Warm;
pub use certificates::{Keeper, Renewal};
pub use files::{FilesError, load_dir};
pub use join::{Join, JoinError, join};
pub use live::{Contact, ControlLevel, Live, PolicySource, Status, Trouble};
pub use modules::{FetchError, Incoming, Modules, Want};
pub use revoked::recall_revoked;
pub use rota::{Parting, Rota, Timing, Turn};
pub use state::{Blob, StateDir, StateReport};
pub use subscribe::{Settings, Subscription};
pub use workloads::{WorkloadCounts, WorkloadStanding, Workloads};

//! The plugin host on wasmtime.
//!
//! In the path: when a call failed and policy's ladder asks a plugin, the worker hands the failure over as a
//! [`FailedCall`] and gets an [`Action`], or a [`Fault`] that costs that call its fallback and nothing else.
//!
//! This crate knows no HTTP type and no policy but a plugin's own settings. A guest gets nothing but what
//! `plugins/wit` says: what else its standard library imports is there only to link, and traps if called.
//!
//! Read first: [`Host`], then [`Worker`].
//!
//! Invariants:
//! - An instance that faulted is never used again.
//! - No call outlives its time, and while one runs the worker's other work goes on.
//! - Code is compiled off the workers, before policy that needs it is published.

mod answer;
mod bindings;
mod clock;
mod guest;
mod host;
mod worker;

pub use guest::{CallAttempt, FailedCall};
pub use host::{Host, HostError, LoadError};
pub use worker::{Action, Fault, Worker};

//! The plugin host on wasmtime.
//!
//! In the path: the worker hands over a call that failed, and gets an [`Action`]; a request, to be routed; or a message,
//! head and body, to a [`Filter`] that it passes. Or it gets a [`Fault`], which costs that call its plugin and nothing else.
//!
//! This crate opens no connection and knows no policy but a plugin's own. Calls that plugins make are handed to the data
//! path ([`MeshSender`]). A component gets what `plugins/wit` says, and of WASI 0.2 clocks, random numbers, and what is
//! empty: environment, arguments, files, standard input. Its standard output is the log, it can make no socket, and its
//! `wasi:http` requests go through the mesh, to services that policy names. Imports of any other name are refused when it
//! is loaded.
//!
//! Read first: [`Host`], then [`Worker`].
//!
//! Invariants:
//! - An instance that faulted is never used again.
//! - No call outlives its time, and while one runs the worker's other work goes on, its timers and sockets too.
//! - Code is compiled off the workers, one module at a time, and never twice while it can be kept.

mod call;
mod clock;
mod component;
mod counters;
mod engine;
mod fault;
mod filter;
mod health;
mod host;
mod known;
mod load;
mod log;
mod memory;
mod mesh;
mod precompiled;
mod proxy_wasm;
mod quarantine;
mod releases;
mod report;
mod store;
mod version;
mod worker;

pub use call::{
    Action, Authority, CallAttempt, Facts, FailedCall, FlagValue, Flags, KeptAnswer, Reply, RequestHead,
    ResponseHead, Target,
};
pub use fault::Fault;
pub use filter::{Filter, Step, Wake, Way};
pub use host::{Host, HostError, Settings};
pub use load::LoadError;
pub use log::{LogLine, LogTail, log_lines};
pub use mesh::{AnswerPiece, AnswerTo, CallBody, CallError, MAX_ANSWER, MeshAnswer, MeshCall, MeshSender};
pub use report::{PluginReport, Progress, VersionReport, VersionState};
pub use worker::{Called, Chosen, Events, Worker};

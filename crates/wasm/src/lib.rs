//! The plugin host on wasmtime.
//!
//! In the path: when a call failed and policy's ladder asks a plugin, the worker hands the failure over as a
//! [`FailedCall`] and gets an [`Action`], or a [`Fault`] that costs that call its fallback and nothing else.
//!
//! This crate knows no HTTP type and no policy but a plugin's own settings. A guest gets nothing but what
//! `plugins/wit` says.
//!
//! A component built for `wasm32-wasip2` imports a few `wasi:` interfaces because Rust's standard library does,
//! though the plugin uses none. They are defined so that it links, and there is nothing behind them: a call of
//! any is a [`Fault::Trap`]. What a plugin meets of this in practice is `HashMap`, which asks for random numbers
//! (`BTreeMap` doesn't), and clocks, environment, files and standard output, none of which it has. Imports of
//! any other name are refused when it is loaded.
//!
//! Read first: [`Host`], then [`Worker`].
//!
//! Invariants:
//! - An instance that faulted is never used again.
//! - No call outlives its time, and while one runs the worker's other work goes on, its timers and sockets too.
//! - Code is compiled off the workers, before policy that needs it is published.

mod call;
mod clock;
mod component;
mod counters;
mod fault;
mod filter;
mod host;
mod mesh;
mod proxy_wasm;
mod store;
mod version;
mod worker;

pub use call::{
    Action, CallAttempt, Facts, FailedCall, FlagValue, Flags, KeptAnswer, Reply, RequestHead, ResponseHead,
    Target,
};
pub use fault::Fault;
pub use filter::{Filter, Step};
pub use host::{Host, HostError, LoadError};
pub use mesh::{AnswerPiece, AnswerTo, CallBody, CallError, MAX_ANSWER, MeshAnswer, MeshCall, MeshSender};
pub use worker::{Called, Chosen, Events, Worker};

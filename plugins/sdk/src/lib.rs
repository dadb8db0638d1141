//! Write plugins for Leeward in Rust.
//!
//! A plugin is a type that implements one of three traits, exported once by the macro of the same name:
//!
//! | trait | macro | world | is asked |
//! |---|---|---|---|
//! | [`Fallback`] | [`fallback!`] | `fallback` | for an answer when a call failed |
//! | [`Filter`] | [`filter!`] | `filter` | what becomes of requests and answers on their way |
//! | [`Router`] | [`router!`] | `router` | which of a rule's backends gets a request |
//!
//! ```no_run
//! use leeward_plugin::{Action, FailedRequest, Fallback, Response};
//!
//! struct Sorry;
//!
//! impl Fallback for Sorry {
//!     fn on_failure(request: &FailedRequest) -> Action {
//!         if request.method() != "GET" {
//!             return Action::Decline;
//!         }
//!         Action::Respond(Response::new(200).header("content-type", "text/plain").body("back soon"))
//!     }
//! }
//!
//! leeward_plugin::fallback!(Sorry);
//! # fn main() {}
//! ```
//!
//! The crate is a `cdylib`. Build it with `cargo build --release --target wasm32-wasip2`, and name the file in a
//! Plugin resource:
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: sorry}
//! spec:
//!   kind: Fallback
//!   source: {file: /var/lib/leeward/sorry.wasm}
//!   onFault: NextRung
//! ---
//! kind: FallbackPolicy
//! metadata: {name: catalog}
//! spec:
//!   ladder:
//!     - plugin: {plugin: sorry}
//! ```
//!
//! At any time a plugin may [`log()`] and [`count()`], ask for a [`flag()`] and for the [`time_left()`], keep things in
//! its [`store`], and call services through the [`mesh`].
//!
//! # Bounds
//!
//! A call that takes longer than Plugin.limits.callTimeout, needs more than Plugin.limits.memory, or panics, ends
//! in a fault: the instance is thrown away, and Plugin.onFault says what becomes of the request. Every other bound is
//! an error that the plugin sees; it stands with the function that gives it.
//!
//! Instances are reused: what a call leaves in statics, a later one on the same worker may see, if policy doesn't ask
//! for a fresh instance each time. An instance can go at any time, so what has to be there belongs into the [`store`].
//!
//! Clocks and random numbers of the standard library are real, environment, arguments and files are empty, standard
//! output is the log, and there are no sockets.
//!
//! # Tests
//!
//! Off WebAssembly what the host offers isn't there, and calling it panics. Keep decisions in functions of plain
//! values, and test those with `cargo test`, as the examples beside this crate do.

#[doc(hidden)]
pub mod bindings;
mod fallback;
mod filter;
mod host;
mod memo;
pub mod mesh;
mod response;
mod router;
pub mod store;

#[doc(hidden)]
pub use wit_bindgen;

include!(concat!(env!("OUT_DIR"), "/worlds.rs"));

pub use bindings::leeward::plugin::types::{Attempt, Cause, EditError, Header, KeptResponse, Response};
pub use fallback::{Action, FailedRequest, Fallback, Receipt};
pub use filter::{
    BodyMode, BodyVerdict, Filter, Interest, RequestHead, RequestVerdict, ResponseHead, ResponseVerdict,
};
pub use host::{FlagValue, Level, count, fault, flag, log, time_left};
pub use memo::Memo;
pub use router::{Router, Target};

//! The request path: listeners, the stages of a request, the fallback ladder, responses.
//!
//! In the path: everything between an accepted connection and the end of an answer. `serve` is the list of
//! stages; each stage is a file named after it:
//!
//! | stage | file | decides |
//! |---|---|---|
//! | accept | `listener`, `connection`, `links`, `gateway` | which worker, which protocol, who the peer is |
//! | admit | `admit` | whether the request is well-formed; pins the snapshot |
//! | route | `route` | rule, service, deadline |
//! | filtered | `filtered`, `flow`, `router` | what plugins make of the request, and of its answer; which backend |
//! | cached | `cached` | whether an answer is there already, or on its way |
//! | degrade | `degrade`, `flags` | whether the call is switched off, and faults that are injected |
//! | hold | `hold` | whether to wait for a service to get an endpoint |
//! | guard | `guard` | whether rate limits, circuits, overload and bulkhead let it through |
//! | attempts | `attempts`, `outgoing`, `judge`, `race` | endpoint, connection, whether to try again, or beside |
//! | fallback | `fallback`, `plugin`, `enqueue`, `template` | what answers instead of a failure |
//! | respond | `respond` | what the client sees |
//! | record | `exchange` | what is written down, when the body ends or is dropped |
//!
//! Connections that are no HTTP go through `tcp`, in the same order; those that their clients meant for somewhere else
//! come by `captured`, which says by their first bytes (`detect`) what they are. What policy knows nothing of is `passed`.
//!
//! Queued requests come back by `courier` and `errand`, and go through the same stages.
//!
//! This crate names no wasmtime and no quinn type, knows no control plane, and reads no environment.
//!
//! Read first: `serve`, then [`Worker`].
//!
//! Invariants:
//! - A request pins one snapshot and never sees another.
//! - No call is made, and no fallback and no cache answers, before policy was asked whether it may be.
//! - Every exchange is recorded exactly once, however it ends.
//! - A failure becomes a response in `respond` and nowhere else.

mod admit;
mod attempts;
mod authorize;
mod body;
mod cached;
mod captured;
mod connection;
mod courier;
mod degrade;
mod detect;
mod enqueue;
mod errand;
mod exchange;
mod facts;
mod failure;
mod fallback;
mod filtered;
mod flags;
mod flow;
mod gateway;
mod guard;
mod headers;
mod hold;
mod idle;
mod inbound;
mod judge;
mod keyring;
mod links;
mod listener;
mod mesh;
mod outgoing;
mod passed;
mod plugin;
mod pressure;
mod race;
mod rates;
mod relay;
mod respond;
mod route;
mod router;
mod serve;
mod tcp;
mod template;
mod tokens;
mod turns;
mod upgrade;
mod watch;
mod worker;

pub use courier::Courier;
pub use gateway::{Door, DoorNews, DoorSettings, Doors, PortTls};
pub use judge::words;
pub use keyring::{Keyring, Source};
pub use links::Links;
pub use listener::{Listeners, Loads, Port, Role, Taking, bind, bind_alone};
pub use pressure::Pressure;
pub use rates::Rates;
pub use worker::{Node, Worker};

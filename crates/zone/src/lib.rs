//! Requests between proxies over QUIC: one stream for each, with a thin framing of our own.
//!
//! In the path: `leeward-upstream` sends requests to other proxies by a [`Link`]; `leeward-http` takes them from a
//! [`Server`]. The protocol is written down in docs/zone-protocol.md.
//!
//! This crate knows no policy, no routes and no pools: who is connected to, when, and what else is tried is decided by
//! whoever uses it.
//!
//! Read first: [`Client`], [`Link`], then [`Server`]; `frame` and `head` are the bytes.
//!
//! Invariants:
//! - No peer without a certificate of the trust domain; a server must be exactly who was expected, a client a proxy.
//! - [`SendError`] never calls a request unsent or refused that may have been acted upon.
//! - A dead path is found within two seconds while requests are under way; connections without any cost nothing.
//! - Everything of a connection belongs to one thread. Dropping a request's future or body gives up what it holds.

mod client;
mod congestion;
mod control;
mod core;
mod error;
mod frame;
mod head;
mod incoming;
mod losses;
mod outgoing;
mod path;
mod server;
mod transport;
mod twice;
mod varint;

pub use self::core::Report;
pub use client::{Client, Link};
pub use control::{Health, MAX_SERVICES, Reports, ServiceHealth, Settings};
pub use error::{AcceptError, BoxError, Code, ConnectError, Lost, SendError, StreamError};
pub use frame::{MAX_DATA, MAX_FIELDS, MAX_HEAD, Violation};
pub use incoming::Incoming;
pub use losses::Losses;
pub use server::{Arriving, Caller, Exchange, Responder, Server, ServerLink, bind};
pub use transport::{ALPN, Congestion};

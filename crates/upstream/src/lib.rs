//! Endpoints at run time: what is known of them, and the connections to them.
//!
//! In the path: `leeward-http` chooses an endpoint with `leeward-resilience` and leases a connection here.
//!
//! Two scopes. What all workers share (health, requests under way) is in the [`Registry`], keyed by stable
//! ids, and outlives every snapshot. Connections belong to one worker and are in its [`Upstreams`]: no lock
//! is taken on the way of a request, except to write down a failure.
//!
//! This crate does not know routes, retries or fallbacks, and decides nothing: it reports what happened.

mod answers;
mod bulkhead;
mod callers;
mod chance;
mod check;
mod circuit;
mod coalesce;
mod connect;
mod endpoint;
mod field;
mod gateways;
mod incoming;
mod meter;
mod peers;
mod plain;
mod registry;
mod reports;
mod service;
mod slots;
mod table;

pub use answers::{Answers, Counted};
pub use chance::Chance;
pub use check::{CheckFailure, Checker, MAX_UNDER_WAY, ProxyReason, Subject, Verdicts};
pub use circuit::{Blocked, Circuit, CircuitKind, CircuitReading, Pass};
pub use coalesce::{Coalesced, Flushed, Flusher, coalesce};
pub use connect::{ConnectError, Connector};
pub use endpoint::{Connection, Endpoint, Keep, Lease, SendError, SendFault, Sent, Wants};
pub use field::Choice;
pub use gateways::{Fault, GatewayState, Passage};
pub use incoming::{IncomingBody, Transport};
pub use plain::{Plain, TCP_UPGRADE, reset};
pub use registry::{EndpointReading, EndpointState, Registry, UnderWay};
pub use reports::{MAX_HEARD, Reports};
pub use service::{
    Ask, Entered, Guards, HoldPermit, Refusal, RetryPermit, ServicePermit, ServiceReading, ServiceState,
};
pub use table::{RuleAtWork, ServiceAtWork, Table, Upstreams};

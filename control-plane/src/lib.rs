//! The control plane: the store of policy and of plugins' modules, the API for people, the push to proxies, the levels
//! of degradation, the certificate authority.
//!
//! It runs the same parse and the same checks as the proxies (`leeward-proto`, `leeward-policy`), so that what
//! can't work is refused when it is written. It knows nothing of the data path.
//!
//! Read first: [`kv`], then [`store`], then [`Policy`], then [`push`].
//!
//! Invariants:
//! - An acknowledged write is on disk: in a file, or on most members of a cluster.
//! - Every write has a revision; revisions only grow, one at a time.
//! - What a proxy costs in memory does not depend on how slow it is: a proxy that lags is read for from the
//!   store, nothing is queued for it.
//! - Several control planes may share a store. What only one of them may do hangs on a lease, and is fenced.

mod access;
pub mod admin;
pub mod api;
mod audit;
pub mod backup;
pub mod ca;
mod degradation;
mod explain;
mod http;
mod images;
pub mod kv;
mod modules;
mod policy;
pub mod proxies;
pub mod push;
mod refusal;
mod rollout;
pub mod server;
pub mod store;

pub use access::OidcSettings;
pub use policy::{Applied, Apply, Policy, Prune, Refused, RolledBack, Way};
pub use refusal::{DOMAIN, Reason};
pub use server::{Server, serve};

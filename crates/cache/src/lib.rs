//! A shared HTTP cache for each rule that has one (RFC 9111, RFC 5861).
//!
//! In the path: `leeward-http` gives each request to [`RuleCache::look`] and, where that has nothing to give, to
//! [`RuleCache::join`], which makes it the one that asks the service, with a [`Fill`], or one that waits for that
//! one, with a [`Waiter`]. The `stale` rung asks [`RuleCache::stale`].
//!
//! This crate knows no I/O and no clock, and not how an answer is fetched. Time is an argument. Wall time it is, since
//! `Date` and `Expires` are: where the clock is set back, what is kept seems younger by as much.
//!
//! Invariants:
//! - What a rule keeps, with what is on its way in, never takes more than `max_bytes`.
//! - An answer is given only to requests whose fields are those that its `Vary` names, each with the same lines.
//! - An answer that may be about who asked is given to nobody else: see [`RuleCache`].
//! - An answer is fresh no longer than it says, or, where it doesn't say, than policy says; none is invented from
//!   `Last-Modified`.
//! - Nobody waits for a request that was given up, or whose answer can't be theirs.

mod answer;
mod asked;
mod caches;
mod directives;
mod fill;
mod flight;
mod kept;
mod rule;
mod storable;
mod store;

pub use asked::{Asked, MAX_KEY_BYTES};
pub use caches::{CacheReading, Caches};
pub use fill::{Fill, Head};
pub use flight::Waiter;
pub use kept::Kept;
pub use rule::{Joined, Look, PASS_FOR, RuleCache};
pub use store::MAX_VARIANTS;

//! Pure machines of reliability: what an endpoint's failures mean, which zone and which endpoint is next,
//! whether to try again.
//!
//! In the path: `leeward-upstream` keeps one [`Health`] and one [`PeakEwma`] for each endpoint, and [`Zones`]
//! for each service; it asks a [`Group`] for each attempt. `leeward-http` asks [`after_failure`].
//!
//! This crate knows no I/O, no clock and no source of randomness: time and draws come in as arguments.
//!
//! Invariants:
//! - [`Group::pick`] never chooses an endpoint that was tried.
//! - [`Zones::update`] gives an unhealthy zone nothing while a healthy one can carry the requests.
//! - An endpoint that is out is never out for longer than its limits say.

mod balance;
mod draw;
mod ewma;
mod hash;
mod health;
mod retry;
mod zones;

pub use balance::{Group, Load, Member, slow_start};
pub use draw::{Draw, Seeded};
pub use ewma::PeakEwma;
pub use hash::hash_of;
pub use health::{Change, Event, Health, Limits, Standing};
pub use retry::{Facts, Next, Replay, Why, after_failure, is_idempotent};
pub use zones::{Panic, Shares, Stage, ZoneHealth, Zones};

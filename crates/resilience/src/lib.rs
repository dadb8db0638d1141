//! Pure machines of reliability: what an endpoint's failures mean, which endpoint is next, whether to try
//! again.
//!
//! In the path: `leeward-upstream` keeps one [`Health`] for each endpoint, `leeward-http` asks [`pick`] and
//! [`after_failure`].
//!
//! This crate knows no I/O, no clock and no source of randomness: time and draws come in as arguments.
//!
//! Invariants:
//! - [`pick`] never chooses an endpoint that was tried, nor an unhealthy one while a healthy one is left.
//! - An endpoint that is out is never out for longer than its limits say.

mod adaptive;
mod admission;
mod balance;
mod draw;
mod ewma;
mod hash;
mod health;
mod pick;
mod rate;
mod retry;
mod shed;
mod sync;

pub use adaptive::{Gradient, STUCK, Sample};
pub use admission::rejection_probability;
pub use balance::{Group, Load, Member, slow_start};
pub use draw::{Draw, Seeded};
pub use ewma::PeakEwma;
pub use hash::hash_of;
pub use health::{Change, Event, Health, Limits, Standing};
pub use pick::{Choice, Panic, pick};
pub use rate::{Gcra, Rate};
pub use retry::{Facts, Next, Replay, Why, after_failure, is_idempotent};
pub use shed::sheds;

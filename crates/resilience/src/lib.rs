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

mod breaker;
mod budget;
pub mod deadline;
mod draw;
mod health;
mod jitter;
mod outlier;
mod pick;
mod retry;
mod sync;
mod window;

pub use breaker::{Breaker, CallEnd, CircuitState, CircuitWhy, Counts, Ended, Ticket, Transition, Verdict};
pub use budget::Budget;
pub use draw::{Draw, Seeded};
pub use health::{
    Change, Checked, Ejection, EjectionReason, Event, FailureKind, Health, Standing, may_eject,
};
pub use outlier::{Tally, outliers};
pub use pick::{Choice, Panic, pick};
pub use retry::{Facts, Next, Replay, Why, after_failure, is_idempotent};
pub use window::Window;

//! Pure machines of reliability: what failures mean, which zone and which endpoint is next, whether to try
//! again, and what to refuse before it is too much.
//!
//! In the path: `leeward-upstream` keeps a [`Health`] and a [`PeakEwma`] for each endpoint, and [`Zones`], a
//! [`Breaker`], a [`Budget`], a [`Gradient`] and the like for each service, and asks a [`Group`] for each
//! attempt. It keeps a [`Headroom`] for each proxy of another zone that reports, and one for the gateways of a zone, whose
//! reports are one [`Word`], and an [`AnswerSize`] for each rule. `leeward-http` asks [`after_failure`].
//!
//! This crate knows no I/O, no clock and no source of randomness: time and draws come in as arguments.
//!
//! Invariants:
//! - [`Group::pick`] never chooses an endpoint that was tried.
//! - [`Zones::update`] gives an unhealthy zone nothing while a healthy one can carry the requests, and no zone more than
//!   it has room for, on top of its own part.
//! - An endpoint that is out is never out for longer than its limits say.
//! - A circuit that refuses calls lets one pass in bounded time, whatever its callers forget.
//! - A level of degradation is never left before its least stay, nor held past its longest, whatever the signal does.
//! - Retries never exceed their share of requests, whatever the threads do.

mod adaptive;
mod admission;
mod balance;
mod breaker;
mod budget;
mod bulk;
pub mod deadline;
pub mod degrade;
mod draw;
mod ewma;
mod hash;
mod headroom;
mod health;
mod jitter;
mod ladder;
mod outlier;
mod rate;
mod retry;
mod shed;
mod sync;
mod window;
mod word;
mod zones;

pub use adaptive::{Gradient, STUCK, Sample};
pub use admission::rejection_probability;
pub use balance::{Group, Load, Member, slow_start};
pub use breaker::{Breaker, CallEnd, CircuitState, CircuitWhy, Counts, Ended, Ticket, Transition, Verdict};
pub use budget::Budget;
pub use bulk::AnswerSize;
pub use draw::{Draw, Seeded};
pub use ewma::PeakEwma;
pub use hash::hash_of;
pub use headroom::{CALLER_FOR, FRESH_FOR, Headroom, LOOK_EVERY, Usage, spare_for_each};
pub use health::{
    Change, Checked, Ejection, EjectionReason, Event, FailureKind, Health, Standing, may_eject,
};
pub use ladder::{Ladder, Step, Terms};
pub use outlier::{Tally, outliers};
pub use rate::{Gcra, Rate};
pub use retry::{
    Body, Facts, Missed, Next, Room, Why, after_failure, grpc_retry_pushback, hedge_at, holds, is_idempotent,
    retry_after,
};
pub use shed::sheds;
pub use window::Window;
pub use word::{Part, Word};
pub use zones::{Panic, Shares, Spill, Stage, ZoneHealth, Zones};

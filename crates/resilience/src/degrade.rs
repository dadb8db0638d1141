//! Levels of degradation: what is seen of services, how a signal reads, and which level that asks for.
//!
//! A [`SignalLog`] for each service takes the [`SignalSample`]s of proxies, [`reading`] makes of it what a signal is
//! now, and a [`Judge`] for each policy in each place decides on the level.

mod judge;
mod log;
mod reading;

pub use judge::{Change, Judge, Stage, Why};
pub use log::{LATENCY_BUCKETS, SignalLog, SignalSample, latency_bucket, latency_upper};
pub use reading::{Reading, reading};

#[cfg(test)]
mod tests;

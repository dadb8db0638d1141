//! Queues as a proxy uses them, on both stores.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says on stderr what it leaves out"
)]

mod bench;
mod broken;
mod figures;
mod kills;
mod nats;
mod order;
mod suite;

/// Every place where a queue can be.
mod fixtures {
    pub(crate) use crate::bench::OnDisk;
    pub(crate) use crate::nats::InNats;
}

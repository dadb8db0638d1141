//! The atomics that shared machines are built on.
//!
//! They are named in one place so that a test can put loom's in theirs: `tests/loom_rate.rs` includes
//! `rate.rs` beside a `sync` of its own.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};

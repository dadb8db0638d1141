//! The atomics and locks of this crate, in one place so that tests can put others in their stead.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
pub(crate) use std::sync::{Mutex, PoisonError};

//! The time of day, for what is on disk, as a clock that never jumps.

use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// Milliseconds since 1970: the wall's when it was made, and from there on the monotonic clock's. A wall clock that
/// is set back or forth while the proxy runs neither delivers nor expires anything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    origin: Instant,
    origin_ms: u64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self {
            origin: Instant::now(),
            origin_ms: wall_ms(),
        }
    }

    /// Now, in milliseconds since 1970.
    pub(crate) fn now_ms(&self) -> u64 {
        self.origin_ms.saturating_add(millis(self.origin.elapsed()))
    }

    /// Now, in nanoseconds since this clock was made.
    pub(crate) fn nanos(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Whole milliseconds of a length, rounded up, so that waiting them is waiting long enough.
pub(crate) fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

#[expect(
    clippy::disallowed_methods,
    reason = "entries outlive the process, and so must their times"
)]
fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis)
}

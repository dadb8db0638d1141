//! Chance in lengths of time, so that what waits at many proxies doesn't come back at one moment.

use crate::Draw;
use std::time::Duration;

/// Lengthens by up to `percent`, every length in between being as likely. Never shorter than `length`.
pub(crate) fn lengthen(length: Duration, percent: u32, draw: &mut impl Draw) -> Duration {
    let most = length.saturating_mul(percent) / 100;
    length.saturating_add(up_to(most, draw))
}

/// A length from zero to `most`, both included, every one as likely: "full jitter" (Brooker, "Exponential
/// backoff and jitter", AWS Architecture Blog, 2015). To the nanosecond up to 584 years.
pub(crate) fn up_to(most: Duration, draw: &mut impl Draw) -> Duration {
    let nanos = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(draw.below(nanos.saturating_add(1)))
}

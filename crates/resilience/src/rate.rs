//! Rate limits: a token bucket that all threads of a proxy share.

use crate::sync::{AtomicU64, Ordering};
use leeward_policy::model::RateLimit;
use std::time::Duration;

/// How fast tokens come, and how many a bucket holds: what [`Gcra::admit`] needs of a [`RateLimit`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rate {
    /// Nanoseconds from one token to the next, at least 1.
    token: u64,
    /// Nanoseconds that it takes to fill the bucket, at least one token's.
    full: u64,
}

impl Rate {
    /// Of a limit. The time for a token is rounded up to a nanosecond, so that a bucket never lets more
    /// through than it should.
    pub fn of(limit: &RateLimit) -> Self {
        let interval = u64::try_from(limit.interval.as_nanos()).unwrap_or(u64::MAX);
        let token = interval.div_ceil(u64::from(limit.requests.max(1))).max(1);
        Self {
            token,
            full: token.saturating_mul(u64::from(limit.burst.max(1))),
        }
    }
}

/// A token bucket in one word, by the generic cell rate algorithm (ITU-T I.371, Annex A).
///
/// Instead of tokens and the time when they were last counted, it holds one time: when the bucket will be full
/// again. A request moves it on by one token's time, and is refused if that would be further ahead than a whole
/// bucket. One compare-and-swap admits, a refusal writes nothing, and threads never wait for each other.
///
/// A bucket goes with one rate. After new settings take a new one, since what was taken from the old at a slow
/// rate may keep it empty for hours at a fast one.
#[derive(Debug)]
pub struct Gcra {
    /// When the bucket is full, in nanoseconds since the caller's origin.
    ///
    /// Relaxed everywhere: the word is the whole state, so there is nothing else that its readers must see.
    full_at: AtomicU64,
}

impl Default for Gcra {
    fn default() -> Self {
        Self::new()
    }
}

impl Gcra {
    /// A full bucket.
    pub fn new() -> Self {
        Self {
            full_at: AtomicU64::new(0),
        }
    }

    /// Takes one token at `now`, in nanoseconds since an origin that must be the same for all calls: good for
    /// 584 years. A `now` that is earlier than another thread's is fine.
    ///
    /// # Errors
    /// How long it is until the next token, which is above zero, if there is none.
    pub fn admit(&self, now: u64, rate: Rate) -> Result<(), Duration> {
        let furthest = now.saturating_add(rate.full);
        let mut seen = self.full_at.load(Ordering::Relaxed);
        loop {
            let full_at = seen.max(now).saturating_add(rate.token);
            if full_at > furthest {
                return Err(Duration::from_nanos(full_at - furthest));
            }
            match self
                .full_at
                .compare_exchange_weak(seen, full_at, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return Ok(()),
                Err(newer) => seen = newer,
            }
        }
    }

    /// Whether the bucket is full at `now`, so that forgetting it changes nothing.
    pub fn is_full(&self, now: u64) -> bool {
        self.full_at.load(Ordering::Relaxed) <= now
    }
}

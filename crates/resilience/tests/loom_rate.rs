//! The token bucket under every interleaving of a few threads.
//!
//! `rate.rs` is included with loom's atomics in place of the standard ones, so what is tested is the code that
//! runs, without a special build.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../src/rate.rs"]
#[expect(
    unreachable_pub,
    dead_code,
    reason = "a library's file, of which a test uses a part"
)]
mod rate;

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
}

use leeward_policy::model::{RateLimit, RateLimitKey};
use loom::sync::Arc;
use rate::{Gcra, Rate};
use std::time::Duration;

/// One token a microsecond.
fn rate(burst: u32) -> Rate {
    Rate::of(&RateLimit {
        requests: 1_000,
        interval: Duration::from_millis(1),
        burst,
        key: RateLimitKey::Rule,
    })
}

/// Runs one thread for each list of times, and returns how many requests were admitted in all.
fn admitted(burst: u32, threads: &[&'static [u64]]) -> usize {
    let bucket = Arc::new(Gcra::new());
    let threads: Vec<_> = threads
        .iter()
        .map(|times| {
            let (bucket, times) = (Arc::clone(&bucket), *times);
            loom::thread::spawn(move || {
                times
                    .iter()
                    .filter(|now| bucket.admit(**now, rate(burst)).is_ok())
                    .count()
            })
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).sum()
}

#[test]
fn threads_share_a_burst_and_no_token_is_given_twice_or_lost() {
    loom::model(|| {
        assert_eq!(admitted(3, &[&[5, 5], &[5, 5]]), 3);
    });
}

#[test]
fn three_threads_that_race_for_the_last_token_leave_one_winner() {
    loom::model(|| {
        assert_eq!(admitted(1, &[&[9], &[9], &[9]]), 1);
    });
}

#[test]
fn clocks_that_disagree_admit_no_more_than_the_span_allows() {
    loom::model(|| {
        // From 0 to 1000 ns one token comes; the bucket holds two.
        let count = admitted(2, &[&[0, 1_000], &[1_000, 1_000]]);
        assert!((2..=3).contains(&count), "{count}");
    });
}

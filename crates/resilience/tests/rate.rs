//! The token bucket, on one thread. It stands here and not in `rate.rs`, since `loom_rate.rs` includes that
//! file with atomics that work only inside a model.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use leeward_policy::model::{RateLimit, RateLimitKey};
use leeward_resilience::{Gcra, Rate};
use proptest::prelude::*;
use std::time::Duration;

fn rate(requests: u32, interval: Duration, burst: u32) -> Rate {
    Rate::of(&RateLimit {
        requests,
        interval,
        burst,
        key: RateLimitKey::Rule,
    })
}

#[test]
fn a_full_bucket_lets_a_burst_through_and_then_one_for_each_token() {
    let bucket = Gcra::new();
    let rate = rate(10, Duration::from_secs(1), 3);
    let now = 1_000_000_000_000;
    for _ in 0..3 {
        assert_eq!(bucket.admit(now, rate), Ok(()));
    }
    assert_eq!(bucket.admit(now, rate), Err(Duration::from_millis(100)));
    assert_eq!(
        bucket.admit(now + 60_000_000, rate),
        Err(Duration::from_millis(40)),
        "a refusal takes nothing"
    );
    assert_eq!(bucket.admit(now + 100_000_000, rate), Ok(()));
    assert!(!bucket.is_full(now + 399_999_999));
    assert!(bucket.is_full(now + 400_000_000));
}

proptest! {
    #[test]
    fn no_span_sees_more_than_the_rate_and_a_burst(
        requests in 1u32..2_000,
        interval_ms in 10u64..10_000,
        burst in 1u32..50,
        gaps in prop::collection::vec(0u64..200_000_000, 1..300),
    ) {
        let bucket = Gcra::new();
        let interval = Duration::from_millis(interval_ms);
        let rate = rate(requests, interval, burst);
        let mut now = 7;
        let mut admitted = Vec::new();
        for gap in gaps {
            now += gap;
            if bucket.admit(now, rate).is_ok() {
                admitted.push(now);
            }
        }
        for (first, from) in admitted.iter().enumerate() {
            for (count, until) in (1u64..).zip(&admitted[first..]) {
                let span = u128::from(until - from);
                let earned = span * u128::from(requests) / interval.as_nanos();
                prop_assert!(u128::from(count) <= earned + u128::from(burst));
            }
        }
    }

    #[test]
    fn a_steady_rate_below_the_limit_is_never_refused(
        requests in 1u32..1_000_000,
        interval_ms in 10u64..10_000,
        burst in 1u32..5,
        start in 0u64..1_000_000_000_000,
        slower in 1u64..1_000,
    ) {
        let bucket = Gcra::new();
        let interval = Duration::from_millis(interval_ms);
        let rate = rate(requests, interval, burst);
        let step = u64::try_from(interval.as_nanos()).unwrap() / u64::from(requests) + slower;
        for n in 0..500 {
            prop_assert_eq!(bucket.admit(start + n * step, rate), Ok(()));
        }
    }

    #[test]
    fn who_waits_as_told_is_admitted(
        requests in 1u32..1_000,
        burst in 1u32..10,
        gaps in prop::collection::vec(0u64..20_000_000, 1..200),
    ) {
        let bucket = Gcra::new();
        let rate = rate(requests, Duration::from_secs(1), burst);
        let mut now = 0;
        for gap in gaps {
            now += gap;
            if let Err(wait) = bucket.admit(now, rate) {
                prop_assert!(!wait.is_zero());
                now += u64::try_from(wait.as_nanos()).unwrap();
                prop_assert_eq!(bucket.admit(now, rate), Ok(()));
            }
        }
    }
}

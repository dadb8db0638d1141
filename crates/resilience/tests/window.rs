//! What a window counts, by way of its public face: its own file is also compiled by `tests/loom.rs`, where
//! these tests would not run.

use leeward_resilience::Window;
use proptest::prelude::*;
use std::time::{Duration, Instant};

#[expect(
    clippy::disallowed_methods,
    reason = "an arbitrary origin; only differences matter"
)]
fn origin() -> Instant {
    Instant::now()
}

const LENGTH: Duration = Duration::from_secs(10);

#[test]
fn counters_are_told_apart_and_forgotten_together() {
    let now = origin();
    let window = Window::<3>::new(LENGTH, now);
    window.add(0, 1, now);
    window.add(2, 5, now);
    assert_eq!(window.sums(now), [1, 0, 5]);
    window.clear();
    assert_eq!(window.sums(now), [0, 0, 0]);
    window.add(2, 1, now);
    assert_eq!(window.sums(now), [0, 0, 1]);
}

#[test]
fn a_time_before_the_origin_is_the_origin() {
    let now = origin() + LENGTH;
    let window = Window::<1>::new(LENGTH, now);
    window.add(0, 1, now - LENGTH);
    assert_eq!(window.sums(now - LENGTH), [1]);
    assert_eq!(window.sums(now), [1]);
}

#[test]
fn idling_for_as_long_as_it_likes_loses_no_later_count() {
    let origin = origin();
    let at = |ticks| origin + Duration::from_secs(ticks);
    // Marks come again after 2^24 ticks, of a second here; a tick's cell after 10.
    for idle in [10, 1 << 23, (1 << 24) - 1006, (1 << 24) + 4, 5 << 24, 123_456_780] {
        for start in [0, 7, (1 << 24) - 50] {
            let window = Window::<1>::new(LENGTH, origin);
            window.add(0, 1, at(start));
            assert_eq!(window.sums(at(start)), [1], "{start}");
            let then = at(start + idle);
            window.add(0, 10, then);
            let [sum] = window.sums(then);
            if idle == 5 << 24 {
                assert_eq!(sum, 11, "only then are they taken for one");
            } else {
                assert_eq!(sum, 10, "{start} and {idle}");
            }
        }
    }
}

#[test]
fn a_count_that_is_full_stays_full() {
    let now = origin();
    let window = Window::<1>::new(LENGTH, now);
    for _ in 0..300 {
        window.add(0, u32::MAX, now);
    }
    let [full] = window.sums(now);
    assert!((1 << 39..1 << 40).contains(&full), "{full}");
}

#[test]
fn threads_lose_nothing() {
    let now = origin();
    let window = Window::<1>::new(LENGTH, now);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..9_000).for_each(|ms| window.add(0, 1, now + Duration::from_millis(ms))));
        }
    });
    assert_eq!(window.sums(now + Duration::from_millis(9_000)), [36_000]);
}

proptest! {
    #[test]
    fn what_is_younger_than_nine_tenths_counts_and_what_is_older_than_the_length_does_not(
        length in 1u64..60_000,
        steps in prop::collection::vec((0u64..8_000, 0u32..100), 1..100),
    ) {
        let origin = origin();
        let length = Duration::from_millis(length);
        let window = Window::<1>::new(length, origin);
        let (mut now, mut added) = (origin, Vec::new());
        for (ms, by) in steps {
            now += Duration::from_millis(ms).mul_f64(length.as_secs_f64() / 10.0);
            window.add(0, by, now);
            added.push((now, by));
            let since = |age: Duration| -> u64 {
                added.iter().filter(|(at, _)| now - *at < age).map(|(_, by)| u64::from(*by)).sum()
            };
            let [sum] = window.sums(now);
            prop_assert!(sum >= since(length * 9 / 10) && sum <= since(length));
        }
    }
}

//! Every interleaving of a few threads, with loom's atomics and locks in the place of the standard library's.

#[expect(unreachable_pub, reason = "it is public in the crate that it is a part of")]
#[path = "../src/budget.rs"]
mod budget;
#[expect(
    dead_code,
    unreachable_pub,
    reason = "as above; and not all of it is used here"
)]
#[path = "../src/window.rs"]
mod window;

/// What the crate's own module of this name has, from loom.
mod sync {
    pub(crate) use loom::sync::Mutex;
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
    pub(crate) use std::sync::PoisonError;
}

use budget::Budget;
use leeward_policy::model::RetryBudget;
use loom::sync::Arc;
use loom::thread;
use std::time::{Duration, Instant};
use window::Window;

const LENGTH: Duration = Duration::from_secs(10);

#[expect(
    clippy::disallowed_methods,
    reason = "an arbitrary origin; only differences matter"
)]
fn origin() -> Instant {
    Instant::now()
}

/// Adds from two threads and from this one at the same tick, after `old` was added a window before.
fn adds_at_once(old: u32) {
    let origin = origin();
    loom::model(move || {
        let window = Arc::new(Window::<1>::new(LENGTH, origin));
        if old > 0 {
            window.add(0, old, origin);
        }
        let now = origin + LENGTH;
        let threads: Vec<_> = [1, 10]
            .map(|by| {
                let window = window.clone();
                thread::spawn(move || window.add(0, by, now))
            })
            .into_iter()
            .collect();
        window.add(0, 100, now);
        for thread in threads {
            assert!(thread.join().is_ok());
        }
        assert_eq!(window.sums(now), [111]);
    });
}

#[test]
fn adds_in_one_tick_lose_nothing() {
    adds_at_once(0);
}

#[test]
fn adds_in_one_tick_take_the_place_of_old_counts_once() {
    adds_at_once(7);
}

#[test]
fn a_thread_whose_time_is_behind_takes_nothing_from_others() {
    let origin = origin();
    loom::model(move || {
        let window = Arc::new(Window::<1>::new(LENGTH, origin));
        let late = {
            let window = window.clone();
            thread::spawn(move || window.add(0, 1, origin))
        };
        let now = origin + LENGTH;
        window.add(0, 10, now);
        late.join().unwrap();
        let [sum] = window.sums(now);
        assert!(sum == 10 || sum == 11, "{sum}");
    });
}

#[test]
fn spending_at_once_never_overshoots() {
    let origin = origin();
    let settings = RetryBudget {
        percent: 50,
        window: LENGTH,
        min_per_second: 0,
    };
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let budget = Arc::new(Budget::new(&settings, origin));
        // Room for one.
        budget.note_request(origin);
        budget.note_request(origin);
        let other = {
            let budget = budget.clone();
            // Its time is a tick ahead.
            thread::spawn(move || budget.try_spend(origin + Duration::from_secs(2), &settings))
        };
        let here = budget.try_spend(origin, &settings);
        assert!(here ^ other.join().unwrap(), "exactly one");
    });
}

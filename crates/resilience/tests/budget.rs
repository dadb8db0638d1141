//! What a budget allows, by way of its public face; see `tests/window.rs`.

use leeward_policy::model::RetryBudget;
use leeward_resilience::Budget;
use proptest::prelude::*;
use std::time::{Duration, Instant};

#[expect(
    clippy::disallowed_methods,
    reason = "an arbitrary origin; only differences matter"
)]
fn origin() -> Instant {
    Instant::now()
}

const SETTINGS: RetryBudget = RetryBudget {
    percent: 20,
    window: Duration::from_secs(10),
    min_per_second: 1,
};

fn spend_all(budget: &Budget, now: Instant) -> usize {
    (0..1000).take_while(|_| budget.try_spend(now, &SETTINGS)).count()
}

#[test]
fn the_larger_of_share_and_minimum_may_be_spent_and_comes_back() {
    let now = origin();
    let budget = Budget::new(&SETTINGS, now);
    assert_eq!(spend_all(&budget, now), 10, "the minimum");
    for _ in 0..100 {
        budget.note_request(now);
    }
    assert_eq!(budget.left(now, &SETTINGS), 10);
    assert_eq!(spend_all(&budget, now), 10, "a fifth of 100");
    assert_eq!(spend_all(&budget, now + Duration::from_millis(9_900)), 0);
    assert_eq!(
        spend_all(&budget, now + Duration::from_secs(12)),
        10,
        "the minimum"
    );
}

#[test]
fn a_budget_of_nothing_allows_nothing() {
    let now = origin();
    let nothing = RetryBudget {
        percent: 0,
        min_per_second: 0,
        ..SETTINGS
    };
    let budget = Budget::new(&nothing, now);
    budget.note_request(now);
    assert!(!budget.try_spend(now, &nothing));
}

#[test]
fn threads_never_spend_more_than_there_is() {
    let now = origin();
    let budget = Budget::new(&SETTINGS, now);
    for _ in 0..5_000 {
        budget.note_request(now);
    }
    let spent: usize = std::thread::scope(|scope| {
        // Each with a time of its own, as threads have; all within the window.
        let spend = |ms| {
            let (budget, now) = (&budget, now + Duration::from_millis(ms));
            scope.spawn(move || (0..1000).filter(|_| budget.try_spend(now, &SETTINGS)).count())
        };
        let threads: Vec<_> = [0, 2_000, 4_000, 8_000].map(spend).into_iter().collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(spent, 1000);
}

proptest! {
    #[test]
    fn retries_of_a_window_never_exceed_their_share_of_its_requests(
        percent in 0u32..=100,
        min_per_second in 0u32..4,
        steps in prop::collection::vec((0u64..1_500, any::<bool>()), 1..300),
    ) {
        let settings = RetryBudget { percent, min_per_second, ..SETTINGS };
        let origin = origin();
        let budget = Budget::new(&settings, origin);
        let (mut now, mut requests, mut retries) = (origin, Vec::new(), Vec::new());
        for (ms, retry) in steps {
            now += Duration::from_millis(ms);
            if retry {
                if budget.try_spend(now, &settings) {
                    retries.push(now);
                    let of_window = |all: &[Instant]| all.iter().filter(|at| now - **at < SETTINGS.window).count();
                    let share = of_window(&requests) * percent as usize / 100;
                    prop_assert!(of_window(&retries) <= share.max(10 * min_per_second as usize));
                }
            } else {
                budget.note_request(now);
                requests.push(now);
            }
        }
    }
}

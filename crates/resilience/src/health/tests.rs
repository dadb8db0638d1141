use super::*;
use crate::Seeded;
use proptest::prelude::*;

const FAIL: Event = Event::Fail(FailureKind::Server5xx);
const GATEWAY: Event = Event::Fail(FailureKind::Gateway);

/// Three failures in a row, 10 s, at most 25 s, no jitter.
const SETTINGS: OutlierDetection = OutlierDetection {
    consecutive_5xx: 3,
    base_ejection_time: Duration::from_secs(10),
    max_ejection_time: Duration::from_secs(25),
    ejection_jitter: 0,
    ..OutlierDetection::DEFAULT
};
const RATE: EjectionReason = EjectionReason::SuccessRate {
    rate: 5000,
    threshold: 9000,
};

#[expect(
    clippy::disallowed_methods,
    reason = "an arbitrary origin; only differences matter"
)]
fn origin() -> Instant {
    Instant::now()
}

fn on(health: Health, event: Event, now: Instant, settings: &OutlierDetection) -> (Health, Option<Change>) {
    health.on(event, now, settings, || true, &mut Seeded(1))
}

fn after(mut health: Health, now: Instant, events: &[Event]) -> Health {
    for event in events {
        health = on(health, *event, now, &SETTINGS).0;
    }
    health
}

/// The length of the ejection that a change is.
#[track_caller]
fn ejected(change: Option<Change>) -> Duration {
    match change {
        Some(Change::Ejected(ejection)) => ejection.length(),
        other => panic!("{other:?} is no ejection"),
    }
}

#[test]
fn failures_in_a_row_eject_for_longer_each_time() {
    let now = origin();
    let health = after(Health::NEW, now, &[FAIL, FAIL, Event::Succeed, FAIL, FAIL]);
    assert_eq!(
        health.standing(now),
        Standing::Healthy,
        "a success in between forgives"
    );
    let (health, change) = on(health, FAIL, now, &SETTINGS);
    assert_eq!(ejected(change), Duration::from_secs(10));
    let later = now + Duration::from_secs(10);
    assert_eq!(health.standing(later), Standing::Healthy);
    let (health, change) = on(health, FAIL, later, &SETTINGS);
    assert_eq!(
        ejected(change),
        Duration::from_secs(20),
        "on trial, the first failure ejects"
    );
    let (_, change) = on(health, FAIL, later + Duration::from_secs(20), &SETTINGS);
    assert_eq!(ejected(change), Duration::from_secs(25), "bounded");
}

#[test]
fn an_ejection_is_forgotten_with_each_interval_not_with_a_success() {
    let now = origin();
    let secs = |n| now + Duration::from_secs(n);
    let health = after(Health::NEW, now, &[FAIL, FAIL, FAIL]);
    let health = after(health, secs(10), &[FAIL]);
    // Out until 30 s, with two base lengths.
    let back = after(health, secs(30), &[Event::Succeed]);
    let eject_at = |at| on(after(back, secs(at), &[FAIL, FAIL]), FAIL, secs(at), &SETTINGS).1;
    assert_eq!(ejected(eject_at(30)), Duration::from_secs(25));
    assert_eq!(ejected(eject_at(40)), Duration::from_secs(20));
    assert_eq!(ejected(eject_at(50)), Duration::from_secs(10));
    assert_eq!(ejected(eject_at(5000)), Duration::from_secs(10));
}

#[test]
fn gateway_failures_count_on_their_own_where_that_is_on() {
    let now = origin();
    let settings = OutlierDetection {
        consecutive_gateway_failure: 2,
        ..SETTINGS
    };
    let run = |events: &[Event]| {
        let step = |(health, _), event: &Event| on(health, *event, now, &settings);
        match events.iter().fold((Health::NEW, None), step).1 {
            Some(Change::Ejected(ejection)) => Some(ejection.why),
            _ => None,
        }
    };
    assert_eq!(run(&[GATEWAY]), None);
    let gateway = Some(EjectionReason::ConsecutiveGatewayFailure { failures: 2 });
    assert_eq!(run(&[GATEWAY, GATEWAY]), gateway);
    assert_eq!(run(&[FAIL, GATEWAY, GATEWAY]), gateway, "the narrower reason");
    assert_eq!(
        run(&[GATEWAY, FAIL, GATEWAY]),
        Some(EjectionReason::Consecutive5xx { failures: 3 }),
        "they count for both"
    );
    let off = after(Health::NEW, now, &[GATEWAY, GATEWAY]);
    assert_eq!(off.standing(now), Standing::Healthy, "0 is off");
}

#[test]
fn an_endpoint_that_may_not_be_ejected_serves_and_is_judged_again() {
    let now = origin();
    let health = after(Health::NEW, now, &[FAIL, FAIL]);
    let (health, change) = health.on(FAIL, now, &SETTINGS, || false, &mut Seeded(1));
    assert_eq!((health.standing(now), change), (Standing::Healthy, None));
    let (health, change) = on(health, FAIL, now, &SETTINGS);
    assert_eq!(health.standing(now), Standing::Ejected);
    assert_eq!(ejected(change), Duration::from_secs(10));
}

#[test]
fn one_failure_after_an_ejection_for_a_rate_is_not_held_against_it() {
    let now = origin();
    let (health, change) = Health::NEW.eject(RATE, now, &SETTINGS, &mut Seeded(1));
    assert_eq!(ejected(change), Duration::from_secs(10));
    assert_eq!(
        health.eject(RATE, now, &SETTINGS, &mut Seeded(1)),
        (health, None),
        "once"
    );
    let later = now + Duration::from_secs(10);
    let (health, change) = on(health, FAIL, later, &SETTINGS);
    assert_eq!(
        (health.standing(later), change),
        (Standing::Healthy, Some(Change::Back))
    );
}

#[test]
fn people_can_see_why_and_until_when_it_is_out() {
    let now = origin();
    let health = after(Health::NEW, now, &[FAIL, FAIL, FAIL]);
    let ejection = Ejection {
        since: now,
        until: now + Duration::from_secs(10),
        why: EjectionReason::Consecutive5xx { failures: 3 },
    };
    assert_eq!(health.ejection(now), Some(&ejection));
    assert_eq!(ejection.why.as_str(), "consecutive_5xx");
    assert_eq!(health.ejection(ejection.until), None);
}

#[test]
fn an_unreachable_endpoint_gets_one_probe_at_a_time() {
    let now = origin();
    let mut health = after(Health::NEW, now, &[Event::FailToConnect]);
    assert_eq!(health.standing(now), Standing::Unreachable);
    let due = now + FIRST_PROBE;
    assert_eq!(health.standing(due), Standing::ProbeDue);
    assert!(health.probe(due));
    assert!(!health.probe(due), "one caller only");
    let (health, change) = on(health, Event::Succeed, due, &SETTINGS);
    assert_eq!(change, Some(Change::Back));
    assert!(health.is_clean());
}

#[test]
fn checks_that_fail_keep_it_out_whatever_calls_say() {
    let now = origin();
    let (health, change) = Health::NEW.check(Checked::Failing);
    assert_eq!(change, Some(Change::ChecksFailed));
    assert_eq!(health.check(Checked::Failing), (health, None), "told once");
    let mut health = after(health, now, &[Event::Succeed, Event::FailToConnect]);
    let later = now + Duration::from_secs(3600);
    assert_eq!(health.standing(later), Standing::Unhealthy);
    assert!(!health.probe(later));
    let (health, change) = health.check(Checked::Passing);
    assert_eq!(change, Some(Change::ChecksPassed));
    assert_eq!(health.standing(later), Standing::Healthy);
}

#[test]
fn checks_that_pass_end_not_being_reachable_but_no_ejection() {
    let now = origin();
    let lost = after(Health::NEW, now, &[Event::FailToConnect]);
    let (health, change) = lost.check(Checked::Passing);
    assert_eq!(
        (health.standing(now), change),
        (Standing::Healthy, Some(Change::Back))
    );
    let out = after(Health::NEW, now, &[FAIL, FAIL, FAIL]);
    let (health, change) = out.check(Checked::Passing);
    assert_eq!((health.standing(now), change), (Standing::Ejected, None));
}

#[test]
fn one_may_be_ejected_but_never_the_last() {
    assert!(may_eject(0, 2, 1), "one, whatever the percentage");
    assert!(!may_eject(0, 2, 0), "none at 0");
    assert!(!may_eject(0, 1, 100) && !may_eject(0, 0, 100));
    assert!(!may_eject(1, 10, 10) && may_eject(1, 20, 10));
    assert!(may_eject(8, 10, 100) && !may_eject(9, 10, 100));
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Succeed),
        Just(FAIL),
        Just(GATEWAY),
        Just(Event::FailToConnect)
    ]
}

proptest! {
    #[test]
    fn never_out_for_longer_than_the_limits(
        steps in prop::collection::vec((0u64..40_000, prop::option::of(event()), any::<bool>()), 1..200),
        gateway in 0u32..5,
        jitter in 0u32..=100,
        seed: u64,
    ) {
        let settings = OutlierDetection { consecutive_gateway_failure: gateway, ejection_jitter: jitter, ..SETTINGS };
        let longest = settings.max_ejection_time * (100 + jitter) / 100;
        let mut draw = Seeded(seed);
        let mut now = origin();
        let mut health = Health::NEW;
        for (ms, what, allowed) in steps {
            now += Duration::from_millis(ms);
            let before = health.standing(now);
            match what {
                Some(event) => {
                    let (next, change) = health.on(event, now, &settings, || allowed, &mut draw);
                    health = next;
                    if let Some(Change::Ejected(ejection)) = change {
                        prop_assert!(allowed);
                        prop_assert!(ejection.length() >= settings.base_ejection_time && ejection.length() <= longest);
                    }
                }
                None => { health.probe(now); }
            }
            let soon = health.standing(now + longest);
            prop_assert!(matches!(soon, Standing::Healthy | Standing::ProbeDue));
            if what == Some(Event::Succeed) {
                prop_assert_eq!(health.is_clean(), before != Standing::Ejected, "a success forgives but an ejection");
            }
        }
    }

    #[test]
    fn a_success_changes_nothing_of_a_clean_endpoint(
        steps in prop::collection::vec((0u64..40_000, event()), 0..50),
    ) {
        let mut now = origin();
        let mut health = Health::NEW;
        for (ms, event) in steps {
            now += Duration::from_millis(ms);
            health = on(health, event, now, &SETTINGS).0;
            if health.is_clean() {
                prop_assert_eq!(on(health, Event::Succeed, now, &SETTINGS), (health, None));
            }
        }
    }

    #[test]
    fn the_share_that_is_ejected_is_bounded(total in 0u32..5000, percent in 0u32..=100) {
        let mut ejected = 0;
        while may_eject(ejected, total, percent) {
            ejected += 1;
        }
        prop_assert!(ejected == 0 || ejected < total, "one is left");
        prop_assert!(ejected <= 1 || ejected * 100 <= total * percent);
        prop_assert_eq!(ejected > 0, percent > 0 && total > 1);
    }
}

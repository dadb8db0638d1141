use super::*;
use crate::Seeded;
use proptest::prelude::*;

#[expect(
    clippy::disallowed_methods,
    reason = "an arbitrary origin; only differences matter"
)]
fn origin() -> Instant {
    Instant::now()
}

const ALL: [RetryOn; 12] = [
    RetryOn::ConnectFailure,
    RetryOn::RefusedStream,
    RetryOn::Reset,
    RetryOn::GatewayError,
    RetryOn::FiveXx,
    RetryOn::RetriableStatusCodes,
    RetryOn::Retriable4xx,
    RetryOn::GrpcCancelled,
    RetryOn::GrpcDeadlineExceeded,
    RetryOn::GrpcInternal,
    RetryOn::GrpcResourceExhausted,
    RetryOn::GrpcUnavailable,
];

fn retry(on: &[RetryOn]) -> Retry {
    Retry {
        on: on.to_vec(),
        status_codes: vec![425, 429],
        ..Retry::standard()
    }
}

const fn answer(status: u16) -> Missed {
    Missed::Answer {
        status,
        grpc_status: None,
    }
}

const fn grpc(status: u8) -> Missed {
    Missed::Answer {
        status: 200,
        grpc_status: Some(status),
    }
}

/// A request that may be tried again.
fn facts(retry: &Retry) -> Facts<'_> {
    Facts {
        made: 1,
        retry,
        missed: answer(503),
        may_have_acted: true,
        idempotent: true,
        body: Body::Whole,
        is_retry_of_hop_before: false,
        other_endpoint: true,
        deadline: None,
        retry_after: None,
    }
}

fn decide(facts: &Facts<'_>, now: Instant) -> Next {
    after_failure(facts, now, &mut Seeded(1), || Room::Taken)
}

#[test]
fn each_condition_holds_for_what_it_names() {
    let check = |missed, expect: &[RetryOn]| {
        let held: Vec<_> = ALL
            .into_iter()
            .filter(|on| holds(&retry(&[*on]), missed))
            .collect();
        assert_eq!(held, expect, "{missed:?}");
        assert_eq!(holds(&retry(&ALL), missed), !expect.is_empty());
        assert!(!holds(&retry(&[]), missed));
    };
    use RetryOn as On;
    check(Missed::ConnectFailure, &[On::ConnectFailure, On::FiveXx]);
    check(Missed::Refused, &[On::RefusedStream, On::FiveXx]);
    check(
        Missed::Unsent,
        &[On::ConnectFailure, On::RefusedStream, On::Reset, On::FiveXx],
    );
    check(Missed::Reset, &[On::Reset, On::FiveXx]);
    check(Missed::AttemptTimeout, &[On::Reset, On::FiveXx]);
    check(answer(200), &[]);
    check(answer(409), &[On::Retriable4xx]);
    check(answer(429), &[On::RetriableStatusCodes]);
    check(answer(499), &[]);
    check(answer(500), &[On::FiveXx]);
    check(answer(501), &[On::FiveXx]);
    for status in [502, 503, 504] {
        check(answer(status), &[On::GatewayError, On::FiveXx]);
    }
    check(answer(505), &[On::FiveXx]);
    check(answer(600), &[]);
    check(grpc(0), &[]);
    check(grpc(1), &[On::GrpcCancelled]);
    check(grpc(4), &[On::GrpcDeadlineExceeded]);
    check(grpc(8), &[On::GrpcResourceExhausted]);
    check(grpc(13), &[On::GrpcInternal]);
    check(grpc(14), &[On::GrpcUnavailable]);
}

#[test]
fn the_reason_is_the_real_one() {
    let now = origin();
    let (retry, other) = (retry(&[RetryOn::GatewayError]), retry(&[RetryOn::ConnectFailure]));
    // Each step adds a reason that is more certain than all before it.
    let mut facts = facts(&retry);
    let why = |facts: &Facts<'_>, room| match after_failure(facts, now, &mut Seeded(1), || room) {
        Next::GiveUp(why) => why.as_str(),
        Next::Retry { .. } => "retry",
    };
    assert_eq!(why(&facts, Room::Taken), "retry");
    assert_eq!(why(&facts, Room::BudgetExhausted), "budget_exhausted");
    assert_eq!(why(&facts, Room::TooManyRetries), "too_many_retries");
    facts.retry_after = Some(Duration::from_secs(301));
    assert_eq!(why(&facts, Room::TooManyRetries), "retry_after_too_long");
    facts.other_endpoint = false;
    assert_eq!(why(&facts, Room::TooManyRetries), "no_other_endpoint");
    facts.deadline = Some(now);
    assert_eq!(why(&facts, Room::TooManyRetries), "deadline_passed");
    facts.made = 3;
    assert_eq!(why(&facts, Room::TooManyRetries), "attempts_spent");
    facts.body = Body::Gone;
    assert_eq!(why(&facts, Room::TooManyRetries), "body_gone");
    facts.body = Body::TooLarge;
    assert_eq!(why(&facts, Room::TooManyRetries), "body_too_large");
    facts.is_retry_of_hop_before = true;
    assert_eq!(why(&facts, Room::TooManyRetries), "already_a_retry");
    facts.idempotent = false;
    assert_eq!(why(&facts, Room::TooManyRetries), "not_idempotent");
    facts.retry = &other;
    assert_eq!(why(&facts, Room::TooManyRetries), "no_condition");
}

#[test]
fn what_cannot_have_acted_is_retried_whatever_the_method_and_the_hops_before() {
    let now = origin();
    let retry = retry(&ALL);
    let facts = Facts {
        missed: Missed::Refused,
        may_have_acted: false,
        idempotent: false,
        is_retry_of_hop_before: true,
        ..facts(&retry)
    };
    assert_eq!(decide(&facts, now), Next::Retry { wait: Duration::ZERO });
    let acted = Facts {
        may_have_acted: true,
        is_retry_of_hop_before: false,
        ..facts
    };
    assert_eq!(decide(&acted, now), Next::GiveUp(Why::NotIdempotent));
    let allowed = Retry {
        non_idempotent: true,
        ..retry.clone()
    };
    let told = Facts {
        retry: &allowed,
        ..acted
    };
    assert!(matches!(decide(&told, now), Next::Retry { .. }));
}

#[test]
fn a_pause_that_does_not_fit_is_not_begun() {
    let now = origin();
    let retry = retry(&ALL);
    let deadline = |ms| Some(now + Duration::from_millis(ms));
    let mut facts = Facts {
        deadline: deadline(10_000),
        retry_after: Some(Duration::from_secs(10)),
        ..facts(&retry)
    };
    assert_eq!(decide(&facts, now), Next::GiveUp(Why::RetryAfterTooLong));
    facts.deadline = deadline(15_001);
    assert!(matches!(decide(&facts, now), Next::Retry { .. }));
    facts.deadline = None;
    facts.retry_after = Some(grpc_retry_pushback("-1"));
    assert_eq!(decide(&facts, now), Next::GiveUp(Why::RetryAfterTooLong));
    let slow = Retry {
        base_interval: Duration::from_secs(60),
        max_interval: Duration::from_secs(60),
        ..retry.clone()
    };
    facts = Facts {
        retry: &slow,
        deadline: Some(now + Duration::from_nanos(1)),
        retry_after: None,
        ..facts
    };
    assert_eq!(decide(&facts, now), Next::GiveUp(Why::DeadlinePassed));
    facts.missed = Missed::ConnectFailure;
    assert_eq!(decide(&facts, now), Next::Retry { wait: Duration::ZERO });
}

#[test]
fn methods_are_known_by_their_effect() {
    for method in ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"] {
        assert!(is_idempotent(method));
    }
    for method in ["POST", "PATCH", "CONNECT", "get", ""] {
        assert!(!is_idempotent(method));
    }
}

#[test]
fn hedges_follow_one_another_and_are_only_sent_where_two_do_no_harm() {
    let now = origin();
    let hedge = Hedge {
        delay: Duration::from_millis(50),
        max_hedges: 2,
    };
    let at = |sent| hedge_at(&hedge, sent, now, true, Body::Whole).map(|at| at - now);
    assert_eq!(at(0), Some(Duration::from_millis(50)));
    assert_eq!(at(1), Some(Duration::from_millis(100)));
    assert_eq!(at(2), None);
    assert_eq!(hedge_at(&hedge, 0, now, false, Body::Whole), None);
    assert_eq!(hedge_at(&hedge, 0, now, true, Body::Gone), None);
    assert_eq!(hedge_at(&hedge, 0, now, true, Body::TooLarge), None);
}

/// The pauses that many draws give.
fn pauses(facts: &Facts<'_>, seed: u64) -> Vec<Duration> {
    let (now, mut draw) = (origin(), Seeded(seed));
    let pause = |_| match after_failure(facts, now, &mut draw, || Room::Taken) {
        Next::Retry { wait } => wait,
        Next::GiveUp(why) => panic!("{why:?}"),
    };
    (0..2000).map(pause).collect()
}

/// Whether all lie between the two, and their mean in the middle: of 2000 its standard deviation is 0.0065 of
/// the width.
#[track_caller]
fn check_uniform(pauses: &[Duration], low: Duration, high: Duration) {
    assert!(pauses.iter().all(|pause| (low..=high).contains(pause)));
    let total: Duration = pauses.iter().map(|pause| *pause - low).sum();
    let mean = total.as_secs_f64() / pauses.len() as f64 / (high - low).as_secs_f64();
    assert!((0.46..0.54).contains(&mean), "{mean} of the way");
}

fn missed() -> impl Strategy<Value = Missed> {
    prop_oneof![
        Just(Missed::ConnectFailure),
        Just(Missed::Refused),
        Just(Missed::Unsent),
        Just(Missed::Reset),
        Just(Missed::AttemptTimeout),
        (200u16..600, prop::option::of(0u8..17))
            .prop_map(|(status, grpc_status)| Missed::Answer { status, grpc_status }),
    ]
}

proptest! {
    #[test]
    fn a_backoff_is_drawn_from_the_whole_of_its_range(
        made in 1u8..10, base in 1u64..60_000, times in 1u64..20, seed: u64,
    ) {
        let base = Duration::from_millis(base);
        let longest = Duration::from_millis(300_000).min(base * u32::try_from(times).unwrap());
        let retry = Retry { max_attempts: 10, base_interval: base, max_interval: longest, ..retry(&ALL) };
        let most = (base * (2u32.pow(u32::from(made)) - 1)).min(longest);
        check_uniform(&pauses(&Facts { made, ..facts(&retry) }, seed), Duration::ZERO, most);
    }

    #[test]
    fn what_the_upstream_asks_for_is_waited_for_and_up_to_half_as_much_again(ms in 1u64..=300_000, seed: u64) {
        let (asked, retry) = (Duration::from_millis(ms), retry(&ALL));
        let facts = Facts { retry_after: Some(asked), ..facts(&retry) };
        check_uniform(&pauses(&facts, seed), asked, asked * 3 / 2);
    }

    #[test]
    fn a_retry_is_safe_in_time_and_paid_for_exactly_once(
        made in 1u8..12,
        on in prop::sample::subsequence(ALL.to_vec(), 0..12),
        missed in missed(),
        [may_have_acted, idempotent, non_idempotent, is_retry_of_hop_before, other_endpoint] in any::<[bool; 5]>(),
        body in prop::sample::select(vec![Body::Whole, Body::TooLarge, Body::Gone]),
        left in prop::option::of(0u64..2000),
        asked in prop::option::of(0u64..1000),
        room in prop::sample::select(vec![Room::Taken, Room::TooManyRetries, Room::BudgetExhausted]),
        seed: u64,
    ) {
        let now = origin();
        let retry = Retry { non_idempotent, ..retry(&on) };
        let facts = Facts {
            made, retry: &retry, missed, may_have_acted, idempotent, body, is_retry_of_hop_before, other_endpoint,
            deadline: left.map(|ms| now + Duration::from_millis(ms)),
            retry_after: asked.map(Duration::from_secs),
        };
        let mut taken = false;
        let next = after_failure(&facts, now, &mut Seeded(seed), || {
            taken = true;
            room
        });
        match next {
            Next::Retry { wait } => {
                prop_assert!(taken && room == Room::Taken);
                prop_assert!(made < retry.max_attempts && holds(&retry, missed) && other_endpoint);
                prop_assert!(body == Body::Whole);
                prop_assert!(!may_have_acted || ((idempotent || non_idempotent) && !is_retry_of_hop_before));
                prop_assert!(facts.deadline.is_none_or(|deadline| now + wait < deadline));
                prop_assert!(facts.retry_after.is_none_or(|asked| wait >= asked));
            }
            Next::GiveUp(why) => {
                let shared = matches!(why, Why::TooManyRetries | Why::BudgetExhausted);
                prop_assert_eq!(taken, shared, "nothing is taken for a retry that isn't made");
            }
        }
    }
}

//! Whether to try again: the decision is data with a reason, the loop only obeys.

use crate::Draw;
use crate::jitter::{lengthen, up_to};
use leeward_policy::model::{Hedge, Retry, RetryOn};
use std::time::{Duration, Instant};

mod after;
#[cfg(test)]
mod tests;

pub use after::{grpc_retry_pushback, retry_after};

/// How an attempt failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Missed {
    /// No connection could be made.
    ConnectFailure,
    /// The upstream refused it unprocessed (HTTP/2 `REFUSED_STREAM`, `GOAWAY`).
    Refused,
    /// The connection turned out to be closed before a byte of the request was written to it.
    Unsent,
    /// The connection or stream ended early, with no answer.
    Reset,
    /// The attempt's own time was up, with no answer.
    AttemptTimeout,
    /// It may not be made, wherever it is sent.
    Forbidden,
    /// It was answered.
    Answer {
        /// The HTTP status.
        status: u16,
        /// The gRPC status, where the head of the answer has one.
        grpc_status: Option<u8>,
    },
}

impl Missed {
    /// Whether it is certain that no workload saw the request, so that waiting for one spares nobody.
    const fn is_before_any_work(self) -> bool {
        match self {
            Self::ConnectFailure | Self::Refused | Self::Unsent | Self::Forbidden => true,
            Self::Reset | Self::AttemptTimeout | Self::Answer { .. } => false,
        }
    }

    const fn status(self) -> Option<u16> {
        match self {
            Self::Answer { status, .. } => Some(status),
            Self::ConnectFailure
            | Self::Refused
            | Self::Unsent
            | Self::Forbidden
            | Self::Reset
            | Self::AttemptTimeout => None,
        }
    }

    fn has_grpc_status(self, wanted: u8) -> bool {
        match self {
            Self::Answer { grpc_status, .. } => grpc_status == Some(wanted),
            Self::ConnectFailure
            | Self::Refused
            | Self::Unsent
            | Self::Forbidden
            | Self::Reset
            | Self::AttemptTimeout => false,
        }
    }
}

/// What is left of a request's body for another attempt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Body {
    /// All of it: it was kept, there is none, or none of it was sent.
    Whole,
    /// Not all, as it is larger than what may be kept.
    TooLarge,
    /// Not all, as nothing was kept.
    Gone,
}

/// What to do after a failed attempt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// Give up, and say why.
    GiveUp(Why),
    /// Try another endpoint.
    Retry {
        /// After this long; it ends before the deadline.
        wait: Duration,
    },
}

/// Why no further attempt is made.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Why {
    /// The policy doesn't retry what failed so.
    NoCondition,
    /// A second send might do the work twice.
    NotIdempotent,
    /// A hop before is retrying already, and this attempt may have reached a workload: if every hop tried
    /// three times, a workload would see 3^hops requests.
    AlreadyARetry,
    /// The body was larger than what is kept.
    BodyTooLarge,
    /// The body was sent and not kept.
    BodyGone,
    /// The policy's attempt count is used up.
    AttemptsSpent,
    /// The request's deadline has passed, or will have before the pause is over.
    DeadlinePassed,
    /// Every endpoint that may be tried was.
    NoOtherEndpoint,
    /// The upstream asked for a pause that is longer than we, or the request, wait; or for no retry.
    RetryAfterTooLong,
    /// Too many retries are under way.
    TooManyRetries,
    /// The destination's retry budget is used up.
    BudgetExhausted,
}

impl Why {
    /// The word used in traces and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoCondition => "no_condition",
            Self::NotIdempotent => "not_idempotent",
            Self::AlreadyARetry => "already_a_retry",
            Self::BodyTooLarge => "body_too_large",
            Self::BodyGone => "body_gone",
            Self::AttemptsSpent => "attempts_spent",
            Self::DeadlinePassed => "deadline_passed",
            Self::NoOtherEndpoint => "no_other_endpoint",
            Self::RetryAfterTooLong => "retry_after_too_long",
            Self::TooManyRetries => "too_many_retries",
            Self::BudgetExhausted => "budget_exhausted",
        }
    }
}

/// Whether what is shared with other requests has room for a retry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Room {
    /// It has, and it was taken.
    Taken,
    /// As many retries as may be are under way.
    TooManyRetries,
    /// The budget is used up.
    BudgetExhausted,
}

/// All that the decision depends on, but for what is shared with other requests.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Attempts made so far, at least 1.
    pub made: u8,
    /// The rule's settings.
    pub retry: &'a Retry,
    /// How the latest attempt failed.
    pub missed: Missed,
    /// Whether that attempt may have reached a workload. It can't if no connection was made; it may if the
    /// upstream reset it; and a proxy in between says so in its answer.
    pub may_have_acted: bool,
    /// Whether the request may be sent twice: its method is [idempotent](is_idempotent), or it has an
    /// Idempotency-Key.
    pub idempotent: bool,
    /// What is left of the body.
    pub body: Body,
    /// Whether the request is itself a retry that a hop before makes.
    pub is_retry_of_hop_before: bool,
    /// Whether an endpoint is left that this request hasn't tried.
    pub other_endpoint: bool,
    /// When the client stops waiting; `None` is never.
    pub deadline: Option<Instant>,
    /// The pause that the upstream asked for ([`retry_after`], [`grpc_retry_pushback`]).
    pub retry_after: Option<Duration>,
}

/// The longest pause that an upstream may ask for; as long as Envoy's `rate_limited_retry_back_off` waits.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);
/// Percent by which a pause that was asked for is longer at most, so that the upstream doesn't meet all of
/// those that it sent away at one moment. Envoy's number.
const RETRY_AFTER_JITTER: u32 = 50;

/// Decides whether to try again after an attempt that failed.
///
/// The most certain refusal comes first, so that the reason reported is the real one: first what no other
/// attempt of this request could change, then what time changes, and last what other requests take, which
/// `take_room` asks for. That is called at most once, and only if a retry follows where it has room: nothing
/// is taken for a retry that isn't made.
///
/// The pause before the n-th retry is drawn from 0 to `base_interval * (2^n - 1)` or `max_interval`, whichever
/// is less: Envoy's exponential backoff with full jitter. A failure before any work is not waited after:
/// another endpoint is left, and nothing was asked of it yet.
pub fn after_failure(
    facts: &Facts<'_>,
    now: Instant,
    draw: &mut impl Draw,
    take_room: impl FnOnce() -> Room,
) -> Next {
    if let Some(why) = never(facts) {
        return Next::GiveUp(why);
    }
    if facts.deadline.is_some_and(|deadline| now >= deadline) {
        return Next::GiveUp(Why::DeadlinePassed);
    }
    if !facts.other_endpoint {
        return Next::GiveUp(Why::NoOtherEndpoint);
    }
    let (wait, too_long) = match facts.retry_after {
        Some(asked) if asked > MAX_RETRY_AFTER => return Next::GiveUp(Why::RetryAfterTooLong),
        Some(asked) => (lengthen(asked, RETRY_AFTER_JITTER, draw), Why::RetryAfterTooLong),
        None => (backoff(facts, draw), Why::DeadlinePassed),
    };
    if facts.deadline.is_some_and(|deadline| deadline <= now + wait) {
        return Next::GiveUp(too_long);
    }
    match take_room() {
        Room::Taken => Next::Retry { wait },
        Room::TooManyRetries => Next::GiveUp(Why::TooManyRetries),
        Room::BudgetExhausted => Next::GiveUp(Why::BudgetExhausted),
    }
}

/// What rules out another attempt whatever happens next.
fn never(facts: &Facts<'_>) -> Option<Why> {
    if !holds(facts.retry, facts.missed) {
        return Some(Why::NoCondition);
    }
    if facts.may_have_acted {
        if !facts.idempotent && !facts.retry.non_idempotent {
            return Some(Why::NotIdempotent);
        }
        if facts.is_retry_of_hop_before {
            return Some(Why::AlreadyARetry);
        }
    }
    match facts.body {
        Body::Whole => {}
        Body::TooLarge => return Some(Why::BodyTooLarge),
        Body::Gone => return Some(Why::BodyGone),
    }
    (facts.made >= facts.retry.max_attempts).then_some(Why::AttemptsSpent)
}

/// Whether policy tries again after this, as far as conditions go: any one that holds is enough.
///
/// A connection that was closed before a byte was written is all of a connection that couldn't be made, a
/// refusal, and a reset. What may not be made isn't made again, whatever policy says.
pub fn holds(retry: &Retry, missed: Missed) -> bool {
    if missed == Missed::Forbidden {
        return false;
    }
    let status = missed.status();
    retry.on.iter().any(|on| match on {
        RetryOn::ConnectFailure => matches!(missed, Missed::ConnectFailure | Missed::Unsent),
        RetryOn::RefusedStream => matches!(missed, Missed::Refused | Missed::Unsent),
        RetryOn::Reset => matches!(missed, Missed::Reset | Missed::AttemptTimeout | Missed::Unsent),
        RetryOn::GatewayError => status.is_some_and(|status| (502..=504).contains(&status)),
        RetryOn::FiveXx => status.is_none_or(|status| (500..=599).contains(&status)),
        RetryOn::RetriableStatusCodes => {
            status.is_some_and(|status| retry.status_codes.binary_search(&status).is_ok())
        }
        RetryOn::Retriable4xx => status == Some(409),
        // The numbers are gRPC's ("Status codes and their use in gRPC").
        RetryOn::GrpcCancelled => missed.has_grpc_status(1),
        RetryOn::GrpcDeadlineExceeded => missed.has_grpc_status(4),
        RetryOn::GrpcResourceExhausted => missed.has_grpc_status(8),
        RetryOn::GrpcInternal => missed.has_grpc_status(13),
        RetryOn::GrpcUnavailable => missed.has_grpc_status(14),
    })
}

/// The pause that nobody asked for.
fn backoff(facts: &Facts<'_>, draw: &mut impl Draw) -> Duration {
    if facts.missed.is_before_any_work() {
        return Duration::ZERO;
    }
    let retry = facts.retry;
    // The most that 1 ms times this reaches is past any longest pause.
    let times = (1 << facts.made.clamp(1, 20)) - 1;
    let most = retry.base_interval.saturating_mul(times).min(retry.max_interval);
    up_to(most, draw)
}

/// Whether sending a request with this method twice has the effect of sending it once (RFC 9110 §9.2.2).
pub fn is_idempotent(method: &str) -> bool {
    matches!(method, "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
}

/// When to send the next request beside the one that was sent at `started`, if there is no answer by then;
/// `sent` were sent beside it already. `None`: no more, or never, as two of them could do the work twice or
/// the body can't be sent twice.
pub fn hedge_at(hedge: &Hedge, sent: u8, started: Instant, idempotent: bool, body: Body) -> Option<Instant> {
    if !idempotent || body != Body::Whole || sent >= hedge.max_hedges {
        return None;
    }
    let delay = hedge.delay.saturating_mul(u32::from(sent) + 1);
    started.checked_add(delay)
}

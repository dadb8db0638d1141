//! ResiliencePolicies, CircuitOverrides, and what rules of routes have of the same kind.

use super::text::{bounded, key_header, optional_key_header};
use super::{DAY, HOUR, MINUTE, MS, SECOND};
use crate::field::{Fields, Section};
use crate::v1;
use leeward_policy::model::{
    AdaptiveConcurrency, AdmissionControl, BreakerMode, CircuitBreaker, CircuitOverride, Hedge, LoadShedding,
    OverrideTarget, Priority, RateLimit, RateLimitKey, RequestPriority, ResiliencePolicy, Retry, RetryBudget,
    RetryOn,
};
use std::time::{Duration, SystemTime};

/// The last second that RFC 3339 can write, 9999-12-31T23:59:59Z, since 1970.
const LAST_SECOND: i64 = 253_402_300_799;

pub(super) fn resilience_policy(f: &mut Fields, wire: &v1::ResiliencePolicy) -> ResiliencePolicy {
    let mut s = f.section("spec");
    let default = ResiliencePolicy::DEFAULT;
    ResiliencePolicy {
        circuit_breaker: wire
            .circuit_breaker
            .as_ref()
            .map(|wire| circuit_breaker(&mut s.section("circuitBreaker"), wire)),
        endpoint_circuit_breaker: wire
            .endpoint_circuit_breaker
            .as_ref()
            .map(|wire| circuit_breaker(&mut s.section("endpointCircuitBreaker"), wire)),
        retry_budget: budget(
            &mut s.section("retryBudget"),
            wire.retry_budget.as_ref(),
            default.retry_budget,
        ),
        hedge_budget: budget(
            &mut s.section("hedgeBudget"),
            wire.hedge_budget.as_ref(),
            default.hedge_budget,
        ),
        adaptive_concurrency: wire
            .adaptive_concurrency
            .as_ref()
            .map(|wire| adaptive(&mut s.section("adaptiveConcurrency"), wire)),
        admission_control: wire
            .admission_control
            .as_ref()
            .map(|wire| admission(&mut s.section("admissionControl"), wire)),
        load_shedding: wire
            .load_shedding
            .as_ref()
            .map(|wire| shedding(&mut s.section("loadShedding"), wire)),
    }
}

pub(super) fn circuit_breaker(s: &mut Section<'_>, wire: &v1::CircuitBreaker) -> CircuitBreaker {
    let default = CircuitBreaker::DEFAULT;
    let open_time = s.duration(
        "openTime",
        wire.open_time.as_ref(),
        default.open_time,
        10 * MS..=HOUR,
    );
    CircuitBreaker {
        failure_rate: s.optional("failureRate", wire.failure_rate, default.failure_rate, 0..=100),
        slow_call_rate: s.small(
            "slowCallRate",
            wire.slow_call_rate,
            default.slow_call_rate,
            0..=100,
        ),
        slow_call_duration: s.duration(
            "slowCallDuration",
            wire.slow_call_duration.as_ref(),
            default.slow_call_duration,
            MS..=HOUR,
        ),
        consecutive_failures: s.small(
            "consecutiveFailures",
            wire.consecutive_failures,
            default.consecutive_failures,
            0..=10_000,
        ),
        minimum_calls: s.small(
            "minimumCalls",
            wire.minimum_calls,
            default.minimum_calls,
            1..=1_000_000,
        ),
        window: s.duration(
            "window",
            wire.window.as_ref(),
            default.window,
            SECOND..=10 * MINUTE,
        ),
        open_time,
        max_open_time: s.duration(
            "maxOpenTime",
            wire.max_open_time.as_ref(),
            default.max_open_time.max(open_time),
            open_time.min(DAY)..=DAY,
        ),
        open_jitter: s.optional("openJitter", wire.open_jitter, default.open_jitter, 0..=100),
        half_open_probes: s.small(
            "halfOpenProbes",
            wire.half_open_probes,
            default.half_open_probes,
            1..=1000,
        ),
        ramp: s.duration("ramp", wire.ramp.as_ref(), default.ramp, Duration::ZERO..=HOUR),
        mode: match v1::BreakerMode::try_from(wire.mode) {
            Ok(v1::BreakerMode::Unspecified | v1::BreakerMode::Enforce) => BreakerMode::Enforce,
            Ok(v1::BreakerMode::Observe) => BreakerMode::Observe,
            Ok(v1::BreakerMode::ForceOpen) => BreakerMode::ForceOpen,
            Ok(v1::BreakerMode::ForceClosed) => BreakerMode::ForceClosed,
            Err(_) => s
                .reject(
                    "mode",
                    format!(
                        "{} is not known; want Enforce, Observe, ForceOpen or ForceClosed",
                        wire.mode
                    ),
                )
                .unwrap_or(default.mode),
        },
    }
}

fn budget(s: &mut Section<'_>, wire: Option<&v1::RetryBudget>, default: RetryBudget) -> RetryBudget {
    let Some(wire) = wire else { return default };
    RetryBudget {
        percent: s.optional("percent", wire.percent, default.percent, 0..=100),
        window: s.duration("window", wire.window.as_ref(), default.window, SECOND..=MINUTE),
        min_per_second: s.optional(
            "minPerSecond",
            wire.min_per_second,
            default.min_per_second,
            0..=1_000_000,
        ),
    }
}

fn adaptive(s: &mut Section<'_>, wire: &v1::AdaptiveConcurrency) -> AdaptiveConcurrency {
    let default = AdaptiveConcurrency::DEFAULT;
    let max_limit = s.small("maxLimit", wire.max_limit, default.max_limit, 1..=1_000_000);
    AdaptiveConcurrency {
        percentile: s.small("percentile", wire.percentile, default.percentile, 1..=99),
        update_interval: s.duration(
            "updateInterval",
            wire.update_interval.as_ref(),
            default.update_interval,
            10 * MS..=10 * SECOND,
        ),
        max_limit,
        min_rtt_interval: s.duration(
            "minRttInterval",
            wire.min_rtt_interval.as_ref(),
            default.min_rtt_interval,
            SECOND..=HOUR,
        ),
        min_rtt_requests: s.small(
            "minRttRequests",
            wire.min_rtt_requests,
            default.min_rtt_requests,
            1..=10_000,
        ),
        min_rtt_jitter: s.optional(
            "minRttJitter",
            wire.min_rtt_jitter,
            default.min_rtt_jitter,
            0..=100,
        ),
        // The smallest limit can't be above the largest.
        min_limit: s.small(
            "minLimit",
            wire.min_limit,
            default.min_limit.min(max_limit),
            1..=1000.min(max_limit),
        ),
        buffer: s.optional("buffer", wire.buffer, default.buffer, 0..=1000),
    }
}

fn admission(s: &mut Section<'_>, wire: &v1::AdmissionControl) -> AdmissionControl {
    let default = AdmissionControl::DEFAULT;
    AdmissionControl {
        window: s.duration(
            "window",
            wire.window.as_ref(),
            default.window,
            SECOND..=10 * MINUTE,
        ),
        success_threshold: s.small(
            "successThreshold",
            wire.success_threshold,
            default.success_threshold,
            1..=100,
        ),
        aggression: s.small("aggression", wire.aggression, default.aggression, 10..=1000),
        rps_threshold: s.small(
            "rpsThreshold",
            wire.rps_threshold,
            default.rps_threshold,
            0..=1_000_000,
        ),
        max_rejection_probability: s.small(
            "maxRejectionProbability",
            wire.max_rejection_probability,
            default.max_rejection_probability,
            1..=100,
        ),
    }
}

fn shedding(s: &mut Section<'_>, wire: &v1::LoadShedding) -> LoadShedding {
    let default = LoadShedding::DEFAULT;
    // Each mark is at least as large as the one before.
    let low = s.small("low", wire.low, default.low, 1..=100);
    let normal = s.small(
        "normal",
        wire.normal,
        default.normal.max(low),
        low.clamp(1, 100)..=100,
    );
    let high = s.small(
        "high",
        wire.high,
        default.high.max(normal),
        normal.clamp(1, 100)..=100,
    );
    LoadShedding { low, normal, high }
}

pub(super) fn circuit_override(f: &mut Fields, wire: &v1::CircuitOverride) -> Option<CircuitOverride> {
    let service = f.optional_name("spec.service", &wire.service);
    let route = f.optional_name("spec.route", &wire.route);
    let target = match (wire.service.is_empty(), wire.route.is_empty()) {
        (true, true) => f.reject("spec", "names no circuit; want one of service, route"),
        (false, false) => f.reject("spec.route", "stands beside service; want one of them"),
        (false, true) => service.map(OverrideTarget::Service),
        (true, false) => route.map(OverrideTarget::Route),
    };
    let mode = match v1::BreakerMode::try_from(wire.mode) {
        Ok(v1::BreakerMode::ForceOpen) => Some(BreakerMode::ForceOpen),
        Ok(v1::BreakerMode::ForceClosed) => Some(BreakerMode::ForceClosed),
        Ok(v1::BreakerMode::Unspecified) => {
            f.reject("spec.mode", "is missing; want ForceOpen or ForceClosed")
        }
        Ok(v1::BreakerMode::Enforce) => f.reject(
            "spec.mode",
            "Enforce holds nothing; want ForceOpen or ForceClosed",
        ),
        Ok(v1::BreakerMode::Observe) => f.reject(
            "spec.mode",
            "Observe holds nothing; want ForceOpen or ForceClosed",
        ),
        Err(_) => f.reject(
            "spec.mode",
            format!("{} is not known; want ForceOpen or ForceClosed", wire.mode),
        ),
    };
    let expire_time = expire_time(f, wire.expire_time);
    bounded(f, "spec.reason", &wire.reason, 256);
    Some(CircuitOverride {
        target: target?,
        mode: mode?,
        expire_time: expire_time?,
        reason: wire.reason.as_str().into(),
    })
}

/// When something that people hold ends.
pub(super) fn expire_time(f: &mut Fields, wire: Option<prost_types::Timestamp>) -> Option<SystemTime> {
    time(f, "spec.expireTime", "ends", wire)
}

/// A time that must be said; `does` is what happens then.
pub(super) fn time(
    f: &mut Fields,
    path: &str,
    does: &str,
    wire: Option<prost_types::Timestamp>,
) -> Option<SystemTime> {
    let Some(time) = wire else {
        return f.reject(
            path,
            format!("is missing; say when it {does}, such as 2026-11-24T22:00:00Z"),
        );
    };
    instant(time).or_else(|| {
        f.reject(
            path,
            format!(
                "{}s {}ns since 1970 is not a time from 1970 to 9999",
                time.seconds, time.nanos
            ),
        )
    })
}

fn instant(time: prost_types::Timestamp) -> Option<SystemTime> {
    let plausible = (0..=LAST_SECOND).contains(&time.seconds) && (0..1_000_000_000).contains(&time.nanos);
    plausible.then(|| SystemTime::try_from(time).ok()).flatten()
}

pub(super) fn retry(s: &mut Section<'_>, wire: &v1::RouteRetry) -> Retry {
    let default = Retry::standard();
    let max_attempts = s.small(
        "maxAttempts",
        wire.max_attempts,
        default.max_attempts.into(),
        1..=10,
    );
    let on = retry_on(s, &wire.retry_on);
    let at = s.at("retriableStatusCodes");
    let status_codes = s
        .fields()
        .statuses(&at, &wire.retriable_status_codes, 64, 400..=599);
    let by_status = on.contains(&RetryOn::RetriableStatusCodes);
    if by_status && wire.retriable_status_codes.is_empty() {
        s.reject::<()>(
            "retriableStatusCodes",
            "is empty, and retryOn names RetriableStatusCodes; list the statuses",
        );
    }
    if !by_status && !wire.retriable_status_codes.is_empty() {
        s.reject::<()>(
            "retriableStatusCodes",
            "has no effect; name RetriableStatusCodes in retryOn, too, or leave it out",
        );
    }
    let base_interval = s.duration(
        "baseInterval",
        wire.base_interval.as_ref(),
        default.base_interval,
        MS..=MINUTE,
    );
    let max_interval = s.duration(
        "maxInterval",
        wire.max_interval.as_ref(),
        default.max_interval.max(base_interval),
        base_interval.min(5 * MINUTE)..=5 * MINUTE,
    );
    let max_body_bytes = match wire.max_body_bytes {
        None => default.max_body_bytes,
        Some(bytes) => {
            let at = s.at("maxBody");
            s.fields().number(&at, bytes, bytes, 0..=1 << 20)
        }
    };
    let hedge = match &wire.hedge {
        None => None,
        Some(wire) => hedge(&mut s.section("hedge"), wire),
    };
    Retry {
        max_attempts: u8::try_from(max_attempts).unwrap_or(u8::MAX),
        on,
        status_codes,
        base_interval,
        max_interval,
        non_idempotent: wire.retry_non_idempotent,
        max_body_bytes,
        hedge,
    }
}

fn retry_on(s: &mut Section<'_>, wire: &[i32]) -> Vec<RetryOn> {
    let at = s.at("retryOn");
    let f = s.fields();
    f.count(&at, wire.len(), 0..=16);
    let mut on = Vec::new();
    for (i, number) in wire.iter().enumerate() {
        match v1::RetryOn::try_from(*number).ok().and_then(condition) {
            Some(condition) if on.contains(&condition) => {
                f.reject::<()>(
                    format!("{at}[{i}]"),
                    "stands twice; each condition must stand once",
                );
            }
            Some(condition) => on.push(condition),
            None => {
                f.reject::<()>(
                    format!("{at}[{i}]"),
                    format!(
                        "{number} is not known; want ConnectFailure, RefusedStream, Reset, GatewayError, 5xx, RetriableStatusCodes, Retriable4xx, GrpcCancelled, GrpcDeadlineExceeded, GrpcInternal, GrpcResourceExhausted or GrpcUnavailable"
                    ),
                );
            }
        }
    }
    if wire.is_empty() { Retry::default_on() } else { on }
}

const fn condition(wire: v1::RetryOn) -> Option<RetryOn> {
    match wire {
        v1::RetryOn::Unspecified => None,
        v1::RetryOn::ConnectFailure => Some(RetryOn::ConnectFailure),
        v1::RetryOn::RefusedStream => Some(RetryOn::RefusedStream),
        v1::RetryOn::Reset => Some(RetryOn::Reset),
        v1::RetryOn::GatewayError => Some(RetryOn::GatewayError),
        v1::RetryOn::FiveXx => Some(RetryOn::FiveXx),
        v1::RetryOn::RetriableStatusCodes => Some(RetryOn::RetriableStatusCodes),
        v1::RetryOn::Retriable4xx => Some(RetryOn::Retriable4xx),
        v1::RetryOn::GrpcCancelled => Some(RetryOn::GrpcCancelled),
        v1::RetryOn::GrpcDeadlineExceeded => Some(RetryOn::GrpcDeadlineExceeded),
        v1::RetryOn::GrpcInternal => Some(RetryOn::GrpcInternal),
        v1::RetryOn::GrpcResourceExhausted => Some(RetryOn::GrpcResourceExhausted),
        v1::RetryOn::GrpcUnavailable => Some(RetryOn::GrpcUnavailable),
    }
}

fn hedge(s: &mut Section<'_>, wire: &v1::Hedge) -> Option<Hedge> {
    let max_hedges = s.small("maxHedges", wire.max_hedges, 1, 1..=4);
    if wire.delay.is_none() {
        return s.reject("delay", "is missing; want 1ms to 1m");
    }
    Some(Hedge {
        delay: s.duration("delay", wire.delay.as_ref(), MS, MS..=MINUTE),
        max_hedges: u8::try_from(max_hedges).unwrap_or(u8::MAX),
    })
}

pub(super) fn rate_limits(f: &mut Fields, path: &str, wire: &[v1::RateLimit]) -> Vec<RateLimit> {
    f.count(path, wire.len(), 0..=8);
    let limits = wire.iter().enumerate();
    limits
        .filter_map(|(i, limit)| rate_limit(&mut f.section(format!("{path}[{i}]")), limit))
        .collect()
}

fn rate_limit(s: &mut Section<'_>, wire: &v1::RateLimit) -> Option<RateLimit> {
    let requests = s.required("requests", wire.requests, 1..=1_000_000_000);
    let interval = s.duration("interval", wire.interval.as_ref(), SECOND, 10 * MS..=DAY);
    let burst = s.small("burst", wire.burst, requests, 1..=1_000_000_000);
    let key = match &wire.key {
        None => Some(RateLimitKey::Rule),
        Some(wire) => rate_limit_key(&mut s.section("key"), wire),
    };
    Some(RateLimit {
        requests,
        interval,
        burst,
        key: key?,
    })
}

fn rate_limit_key(s: &mut Section<'_>, wire: &v1::RateLimitKey) -> Option<RateLimitKey> {
    let Some(kind) = &wire.kind else {
        if wire.max_keys != 0 {
            s.reject::<()>(
                "maxKeys",
                "has no effect without one of caller, header; add one, or leave it out",
            );
        }
        return Some(RateLimitKey::Rule);
    };
    let max_keys = s.small("maxKeys", wire.max_keys, 10_000, 1..=1_000_000);
    match kind {
        v1::rate_limit_key::Kind::Caller(true) => Some(RateLimitKey::Caller { max_keys }),
        v1::rate_limit_key::Kind::Caller(false) => {
            s.reject("caller", "is false; want true, or leave it out for one bucket")
        }
        v1::rate_limit_key::Kind::Header(name) => {
            let at = s.at("header");
            let name = key_header(s.fields(), &at, name)?;
            Some(RateLimitKey::Header { name, max_keys })
        }
    }
}

pub(super) fn priority(s: &mut Section<'_>, wire: &v1::RequestPriority) -> RequestPriority {
    let default = one_priority(s, "default", wire.default).unwrap_or_default();
    let at = s.at("header");
    RequestPriority {
        default,
        header: optional_key_header(s.fields(), &at, &wire.header),
    }
}

/// A priority; `None` for one that isn't said.
pub(super) fn one_priority(s: &mut Section<'_>, field: &str, wire: i32) -> Option<Priority> {
    match v1::Priority::try_from(wire) {
        Ok(v1::Priority::Unspecified) => None,
        Ok(v1::Priority::Critical) => Some(Priority::Critical),
        Ok(v1::Priority::High) => Some(Priority::High),
        Ok(v1::Priority::Normal) => Some(Priority::Normal),
        Ok(v1::Priority::Low) => Some(Priority::Low),
        Err(_) => s.reject(
            field,
            format!("{wire} is not known; want Critical, High, Normal or Low"),
        ),
    }
}

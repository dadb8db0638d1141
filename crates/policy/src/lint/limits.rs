//! LW5xx: breakers, bulkheads, ejection and rate limits that never act, or always do.

use super::mesh::{Mesh, key, related};
use super::text::duration;
use super::{Related, Rule, Severity, Sink};
use crate::model::{
    BreakerMode, CircuitBreaker, OutlierDetection, RateLimit, RateLimitKey, ResiliencePolicy, Service,
    SuccessRateDetection,
};
use crate::{Key, Kind, Name};
use std::time::Duration;

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW501",
        severity: Severity::Warning,
        title: "a circuit breaker can never trip",
        why: "None of its conditions is on, or so many calls as `minimumCalls` wants can't come within the window, by the rate limits of the rule.",
        check: never_trips,
    },
    Rule {
        code: "LW502",
        severity: Severity::Warning,
        title: "no call can be slow",
        why: "`slowCallDuration` is at least the time that a call may take: it is cut off, and counts as failed, before it counts as slow.",
        check: never_slow,
    },
    Rule {
        code: "LW503",
        severity: Severity::Warning,
        title: "a single failure opens a circuit",
        why: "One failed call is no sign of an outage; with every proxy doing so, a service that fails now and then is cut off most of the time.",
        check: trips_at_once,
    },
    Rule {
        code: "LW504",
        severity: Severity::Warning,
        title: "a circuit is held for good",
        why: "`mode: ForceOpen` or `ForceClosed` in a policy has no end. A CircuitOverride has one.",
        check: held,
    },
    Rule {
        code: "LW505",
        severity: Severity::Warning,
        title: "a queue longer than what it waits for",
        why: "More requests may wait (`maxPendingRequests`) than may be under way (`maxRequests`): those at its end wait for several rounds, mostly longer than `pendingTimeout`.",
        check: queue,
    },
    Rule {
        code: "LW506",
        severity: Severity::Warning,
        title: "a bound that another one reaches first",
        why: "`perCaller.maxRequests` not below `maxRequests` lets one caller take all; an adaptive limit that can't go below `maxRequests` never acts.",
        check: bounds,
    },
    Rule {
        code: "LW507",
        severity: Severity::Warning,
        title: "ejection by statistics with too few endpoints",
        why: "`minimumHosts` endpoints must have enough requests, and the service has fewer.",
        check: too_few,
    },
    Rule {
        code: "LW508",
        severity: Severity::Warning,
        title: "ejection is configured and switched off",
        why: "With `maxEjectionPercent: 0` no endpoint is ever ejected.",
        check: no_ejection,
    },
    Rule {
        code: "LW509",
        severity: Severity::Info,
        title: "ejection of a single endpoint",
        why: "The last endpoint of a service is never ejected.",
        check: single,
    },
    Rule {
        code: "LW510",
        severity: Severity::Warning,
        title: "a rate limit that another one reaches first",
        why: "Two limits of a rule have the same key, and one lets less pass in the long run and at once.",
        check: rates,
    },
];

/// A breaker with its place, and the rate limits in front of it.
struct Breaker<'a> {
    on: Key,
    path: String,
    breaker: &'a CircuitBreaker,
    limits: &'a [RateLimit],
}

fn breakers<'a>(mesh: &Mesh<'a>) -> Vec<Breaker<'a>> {
    let mut all = Vec::new();
    for (name, policy) in &mesh.resilience {
        let of = [
            ("spec.circuitBreaker", &policy.circuit_breaker),
            ("spec.endpointCircuitBreaker", &policy.endpoint_circuit_breaker),
        ];
        all.extend(of.into_iter().filter_map(|(path, breaker)| {
            Some(Breaker {
                on: key(Kind::ResiliencePolicy, name),
                path: path.to_owned(),
                breaker: breaker.as_ref()?,
                limits: &[],
            })
        }));
    }
    for placed in mesh.rules() {
        all.extend(placed.rule.circuit_breaker.as_ref().map(|breaker| Breaker {
            on: placed.key(),
            path: placed.at("circuitBreaker"),
            breaker,
            limits: &placed.rule.rate_limits,
        }));
    }
    all
}

/// Whether a breaker looks at a share of calls.
const fn by_rate(breaker: &CircuitBreaker) -> bool {
    breaker.failure_rate > 0 || breaker.slow_call_rate > 0
}

const fn is_off(breaker: &CircuitBreaker) -> bool {
    !by_rate(breaker) && breaker.consecutive_failures == 0
}

/// Requests that a limit lets pass within some time, at most.
fn passes(limit: &RateLimit, time: Duration) -> u128 {
    let refilled = u128::from(limit.requests) * time.as_nanos() / limit.interval.as_nanos().max(1);
    refilled + u128::from(limit.burst)
}

fn never_trips(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for Breaker {
        on,
        path,
        breaker,
        limits,
    } in breakers(mesh)
    {
        if matches!(breaker.mode, BreakerMode::ForceOpen | BreakerMode::ForceClosed) {
            continue;
        }
        if is_off(breaker) {
            sink.add(
                &on,
                path,
                "failureRate, slowCallRate and consecutiveFailures are all 0".to_owned(),
                "set one of them, or take the breaker out",
            );
            continue;
        }
        let whole = limits.iter().filter(|limit| limit.key == RateLimitKey::Rule);
        let most = whole.map(|limit| passes(limit, breaker.window)).min();
        if let Some(most) = most.filter(|most| *most < breaker.minimum_calls.into())
            && breaker.consecutive_failures == 0
        {
            sink.add(
                &on,
                format!("{path}.minimumCalls"),
                format!(
                    "wants {} calls in {}, and rateLimits let {most} pass",
                    breaker.minimum_calls,
                    duration(breaker.window)
                ),
                format!("want at most {most}, or a longer window"),
            );
        }
    }
}

/// The longest that a call of a service may take, by the rules that lead to it; `None` if there is none, or one has no limit.
fn longest(mesh: &Mesh<'_>, services: &[&Name]) -> Option<(Duration, Related)> {
    let mut found: Option<(Duration, Related)> = None;
    for placed in services.iter().flat_map(|name| mesh.rules_to(name)) {
        let time = mesh.attempts_time(placed.rule)?;
        if found.as_ref().is_none_or(|(known, _)| *known < time) {
            found = Some((time, placed.related("timeouts")));
        }
    }
    found
}

fn never_slow(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    let mut check =
        |on: &Key, path: String, breaker: &CircuitBreaker, longest: Option<(Duration, Related)>| {
            let Some((time, by)) = longest else { return };
            if breaker.slow_call_rate > 0 && breaker.slow_call_duration >= time {
                sink.add_with(
                    on,
                    format!("{path}.slowCallDuration"),
                    format!(
                        "is {}, and no call takes longer than {}",
                        duration(breaker.slow_call_duration),
                        duration(time)
                    ),
                    format!("want less than {}", duration(time)),
                    vec![by],
                );
            }
        };
    for (name, policy) in &mesh.resilience {
        let users = mesh.services.iter();
        let users: Vec<&Name> = users
            .filter(|(_, service)| mesh.resilience_of(service).0 == Some(*name))
            .map(|(service, _)| *service)
            .collect();
        let on = key(Kind::ResiliencePolicy, name);
        for (field, breaker) in [
            ("circuitBreaker", &policy.circuit_breaker),
            ("endpointCircuitBreaker", &policy.endpoint_circuit_breaker),
        ] {
            if let Some(breaker) = breaker.as_ref().filter(|breaker| breaker.slow_call_rate > 0) {
                check(&on, format!("spec.{field}"), breaker, longest(mesh, &users));
            }
        }
    }
    for placed in mesh.rules() {
        if let (Some(breaker), Some(time)) = (&placed.rule.circuit_breaker, mesh.attempts_time(placed.rule)) {
            let by = placed.related("timeouts");
            check(
                &placed.key(),
                placed.at("circuitBreaker"),
                breaker,
                Some((time, by)),
            );
        }
    }
}

fn trips_at_once(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for Breaker {
        on, path, breaker, ..
    } in breakers(mesh)
    {
        let field = if breaker.consecutive_failures == 1 {
            "consecutiveFailures"
        } else if breaker.failure_rate > 0 && breaker.minimum_calls == 1 {
            "minimumCalls"
        } else {
            continue;
        };
        sink.add(
            &on,
            format!("{path}.{field}"),
            "is 1, so that one failed call opens the circuit".to_owned(),
            "want several, such as 5",
        );
    }
}

fn held(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for Breaker {
        on, path, breaker, ..
    } in breakers(mesh)
    {
        let (mode, effect) = match breaker.mode {
            BreakerMode::ForceOpen => ("ForceOpen", "every call is refused"),
            BreakerMode::ForceClosed => ("ForceClosed", "no call is ever refused"),
            BreakerMode::Enforce | BreakerMode::Observe => continue,
        };
        sink.add(
            &on,
            format!("{path}.mode"),
            format!("is {mode}: {effect}, until somebody changes it"),
            "hold it by a CircuitOverride, which ends (leeward circuit open|close), and want Enforce or Observe here",
        );
    }
}

fn queue(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        let pool = &service.pool;
        if pool.max_pending_requests > pool.max_requests {
            sink.add(
                &key(Kind::Service, name),
                "spec.connectionPool.maxPendingRequests",
                format!(
                    "{} may wait for {} places, for {} at most",
                    pool.max_pending_requests,
                    pool.max_requests,
                    duration(pool.pending_timeout)
                ),
                format!("want at most {}", pool.max_requests),
            );
        }
    }
}

fn bounds(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        let most = service.pool.max_requests;
        let on = key(Kind::Service, name);
        if let Some(caller) = service
            .pool
            .per_caller
            .as_ref()
            .filter(|caller| caller.max_requests >= most)
        {
            sink.add(
                &on,
                "spec.connectionPool.perCaller.maxRequests",
                format!(
                    "is {}, and all callers together may have {most}",
                    caller.max_requests
                ),
                format!("want less than {most}"),
            );
        }
        let (policy, resilience) = mesh.resilience_of(service);
        if let (Some(policy), Some(adaptive)) = (policy, &resilience.adaptive_concurrency)
            && adaptive.min_limit >= most
        {
            sink.add_with(
                &on,
                "spec.connectionPool.maxRequests",
                format!(
                    "is {most}, and adaptiveConcurrency of ResiliencePolicy/{policy} never goes below {}",
                    adaptive.min_limit
                ),
                format!("want more than {}, or a lower minLimit", adaptive.min_limit),
                vec![related(
                    Kind::ResiliencePolicy,
                    policy,
                    "spec.adaptiveConcurrency.minLimit",
                )],
            );
        }
    }
}

fn too_few(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        let there = service.endpoints.len();
        let outlier = &service.outlier;
        let asked = [
            (
                "successRate",
                (outlier.success_rate != SuccessRateDetection::DEFAULT
                    && outlier.success_rate.stdev_factor > 0)
                    .then_some(outlier.success_rate.minimum_hosts),
            ),
            (
                "failurePercentage",
                outlier.failure_percentage.map(|f| f.minimum_hosts),
            ),
        ];
        for (field, minimum) in asked {
            let Some(minimum) = minimum else { continue };
            // One that has none now may have any number.
            if there > 0 && usize::try_from(minimum).is_ok_and(|minimum| minimum > there) {
                sink.add(
                    &key(Kind::Service, name),
                    format!("spec.outlierDetection.{field}.minimumHosts"),
                    format!("is {minimum}, and the service has {there}"),
                    format!("want at most {there}"),
                );
            }
        }
    }
}

/// Whether somebody has said how endpoints are ejected.
fn says(service: &Service) -> bool {
    let same = OutlierDetection {
        max_ejection_percent: OutlierDetection::DEFAULT.max_ejection_percent,
        ..service.outlier
    };
    same != OutlierDetection::DEFAULT
}

fn no_ejection(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        if service.outlier.max_ejection_percent == 0 && says(service) {
            sink.add(
                &key(Kind::Service, name),
                "spec.outlierDetection.maxEjectionPercent",
                "is 0, so that what else outlierDetection says has no effect".to_owned(),
                "want more than 0, or nothing else there",
            );
        }
    }
}

fn single(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        if service.endpoints.len() == 1 && says(service) && service.outlier.max_ejection_percent > 0 {
            sink.add(
                &key(Kind::Service, name),
                "spec.outlierDetection",
                "has no effect on the only endpoint".to_owned(),
                "take it out, or add endpoints",
            );
        }
    }
}

fn rates(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        let limits = &placed.rule.rate_limits;
        for (i, limit) in limits.iter().enumerate() {
            let rate = |l: &RateLimit, other: &RateLimit| u128::from(l.requests) * other.interval.as_nanos();
            let stricter = |(j, other): &(usize, &RateLimit)| {
                let (theirs, ours) = (rate(other, limit), rate(limit, other));
                let same = theirs == ours && other.burst == limit.burst;
                *j != i
                    && other.key == limit.key
                    && theirs <= ours
                    && other.burst <= limit.burst
                    && (!same || *j < i)
            };
            if let Some((j, _)) = limits.iter().enumerate().find(stricter) {
                sink.add(
                    &placed.key(),
                    placed.at(&format!("rateLimits[{i}]")),
                    format!("never refuses anything: rateLimits[{j}] has the same key and lets less pass"),
                    "take it out, or give it another key",
                );
            }
        }
    }
}

/// Whether a service has a breaker that somebody could wait for.
pub(super) fn has_breaker(resilience: &ResiliencePolicy) -> bool {
    let all = [&resilience.circuit_breaker, &resilience.endpoint_circuit_breaker];
    all.into_iter().flatten().any(|breaker| !is_off(breaker))
}

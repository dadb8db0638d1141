//! LW40x: times that don't add up.

use super::mesh::{Mesh, key, related};
use super::text::duration;
use super::{Rule, Severity, Sink};
use crate::model::{Act, Hold, Retry, RetryOn, Rung};
use crate::{Kind, Name};
use std::collections::BTreeSet;
use std::time::Duration;

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW401",
        severity: Severity::Warning,
        title: "a rule has no limit on time",
        why: "With `timeouts.request: 0s` a request that is never answered waits for ever, and so does whoever sent it.",
        check: endless,
    },
    Rule {
        code: "LW402",
        severity: Severity::Warning,
        title: "attempts and pauses don't fit into the request's time",
        why: "`maxAttempts` times `backendRequest`, with the longest pauses between, is more than `request` less what the ladder keeps (`reservePercent`): the last attempts can't be made, or are cut short. (What doesn't fit even without pauses and with the default reserve is refused.)",
        check: attempts,
    },
    Rule {
        code: "LW403",
        severity: Severity::Warning,
        title: "a connection may take all of the time",
        why: "`connectTimeout` of the service is at least the time of one attempt or of all: an address that doesn't answer counts as a timeout, not as a failure to connect, and no retry is made of it.",
        check: connecting,
    },
    Rule {
        code: "LW404",
        severity: Severity::Warning,
        title: "a hedge is never sent",
        why: "Its `delay` is at least the time of an attempt, or of all.",
        check: hedges,
    },
    Rule {
        code: "LW405",
        severity: Severity::Warning,
        title: "waiting for room takes all of the time",
        why: "`pendingTimeout` of a service with a queue is at least the time of the requests that come to it: when their turn comes, nobody waits for them any more.",
        check: pending,
    },
    Rule {
        code: "LW406",
        severity: Severity::Warning,
        title: "a request is held for longer than it may take",
        why: "`hold.maxWait` is at least the rule's time, so that the hold ends with the request and not when it should.",
        check: holding,
    },
    Rule {
        code: "LW407",
        severity: Severity::Warning,
        title: "a health check may take longer than the pause between two",
        why: "`timeout` is at least `interval`: a slow endpoint is asked again before it has answered, and found ill later than `unhealthyThreshold` times `interval`.",
        check: health,
    },
    Rule {
        code: "LW408",
        severity: Severity::Warning,
        title: "a rung has no time",
        why: "When all attempts have used up their time, what is kept for the ladder is less than the rung needs, or earlier rungs take all of it (`deadlinePercent` is 100 where it isn't said).",
        check: rungs,
    },
    Rule {
        code: "LW409",
        severity: Severity::Info,
        title: "a gateway closes idle connections before the proxy in front of it does",
        why: "Load balancers keep idle connections for 60 s and more. If the gateway closes one first, a request that is just then sent on it is lost.",
        check: keep_alive,
    },
    Rule {
        code: "LW410",
        severity: Severity::Warning,
        title: "retries on gRPC statuses of a service that can't speak gRPC",
        why: "gRPC needs HTTP/2, and all backends of the rule have protocol HTTP1.",
        check: grpc,
    },
    Rule {
        code: "LW411",
        severity: Severity::Warning,
        title: "retries or hedges without a budget",
        why: "With `percent: 0` and `minPerSecond: 0` none is ever made, whatever the rule says.",
        check: budgets,
    },
];

/// What load balancers keep an idle connection for, at least.
const KEPT_IN_FRONT: Duration = Duration::from_secs(60);
/// Less than this is no time.
const MOMENT: Duration = Duration::from_millis(1);

/// The longest pauses between all attempts of a rule.
pub(crate) fn pauses_of(retry: &Retry) -> Duration {
    let longest = |n: u32| {
        let steps = 2u32.saturating_pow(n).saturating_sub(1);
        retry.base_interval.saturating_mul(steps).min(retry.max_interval)
    };
    let retries = u32::from(retry.max_attempts.saturating_sub(1));
    (1..=retries)
        .map(longest)
        .fold(Duration::ZERO, Duration::saturating_add)
}

/// Whether a rung takes time of its own.
pub(crate) const fn takes_time(act: &Act) -> bool {
    match act {
        Act::Plugin { .. } | Act::Service { .. } | Act::Zone { .. } | Act::Queue { .. } => true,
        Act::Static(_) | Act::Stale { .. } | Act::Redirect(_) | Act::Fail { .. } => false,
    }
}

fn endless(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh
        .rules()
        .filter(|placed| placed.rule.request_timeout.is_none())
    {
        sink.add(
            &placed.key(),
            placed.at("timeouts.request"),
            "a request may take for ever".to_owned(),
            "set a time; for long answers it is enough that the head comes in time, idle bounds the rest",
        );
    }
}

fn attempts(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        let rule = placed.rule;
        let (Some(attempt), Some(left)) = (rule.attempt_timeout, mesh.attempts_time(rule)) else {
            continue;
        };
        let count = u32::from(rule.retry.max_attempts);
        let pauses = pauses_of(&rule.retry);
        let all = attempt.saturating_mul(count).saturating_add(pauses);
        // Pauses are drawn, and mostly shorter: what is cut short by a tenth is none of it.
        if all <= left + attempt / 10 {
            continue;
        }
        let fits = left.saturating_sub(pauses) / count.max(1);
        let kept = match mesh.reserve(rule) {
            Duration::ZERO => String::new(),
            kept => format!(" without the {} kept for the ladder", duration(kept)),
        };
        sink.add_with(
            &placed.key(),
            placed.at("timeouts.backendRequest"),
            format!(
                "{count} attempts of {} with pauses of up to {} take {}, and request leaves {}{kept}",
                duration(attempt),
                duration(pauses),
                duration(all),
                duration(left)
            ),
            format!(
                "want at most {}, fewer attempts, or a longer request",
                duration(fits)
            ),
            rule.fallback
                .iter()
                .map(|ladder| related(Kind::FallbackPolicy, ladder, "spec.reservePercent"))
                .collect(),
        );
    }
}

fn connecting(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        let rule = placed.rule;
        // Who tries once has nothing to lose by it.
        if rule.retry.max_attempts < 2 {
            continue;
        }
        let limits = [
            ("backendRequest", rule.attempt_timeout),
            ("the time for attempts", mesh.attempts_time(rule)),
        ];
        let limit = limits
            .into_iter()
            .filter_map(|(what, limit)| Some((limit?, what)))
            .min();
        let Some((limit, what)) = limit else { continue };
        let mut told = BTreeSet::new();
        for (_, name) in placed.weighty().filter(|(_, name)| told.insert(*name)) {
            let Some(service) = mesh.services.get(name) else {
                continue;
            };
            if service.connect_timeout >= limit {
                sink.add_with(
                    &placed.key(),
                    placed.at("timeouts"),
                    format!(
                        "connectTimeout of Service/{name} is {}, and {what} {}: an address that doesn't answer is never left for another",
                        duration(service.connect_timeout),
                        duration(limit)
                    ),
                    format!("want connectTimeout well below {}, such as {}", duration(limit), duration(limit / 4)),
                    vec![related(Kind::Service, name, "spec.connectTimeout")],
                );
            }
        }
    }
}

fn hedges(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        let rule = placed.rule;
        let Some(hedge) = &rule.retry.hedge else { continue };
        let limits = [rule.attempt_timeout, mesh.attempts_time(rule)];
        let Some(limit) = limits.into_iter().flatten().min() else {
            continue;
        };
        if hedge.delay >= limit {
            sink.add(
                &placed.key(),
                placed.at("retry.hedge.delay"),
                format!(
                    "a hedge after {} comes too late for an attempt of {}",
                    duration(hedge.delay),
                    duration(limit)
                ),
                "want about the 95th percentile of the service's latency",
            );
        }
    }
}

fn pending(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        if service.pool.max_pending_requests == 0 {
            continue;
        }
        let wait = service.pool.pending_timeout;
        let short = mesh
            .rules_to(name)
            .filter_map(|placed| Some((mesh.attempts_time(placed.rule)?, placed)));
        let short = short
            .min_by_key(|(time, _)| *time)
            .filter(|(time, _)| wait >= *time);
        if let Some((time, placed)) = short {
            sink.add_with(
                &key(Kind::Service, name),
                "spec.connectionPool.pendingTimeout",
                format!(
                    "requests wait for up to {}, and those of {} have {}",
                    duration(wait),
                    placed.key(),
                    duration(time)
                ),
                format!("want less than {}", duration(time)),
                vec![placed.related("timeouts.request")],
            );
        }
    }
}

fn holding(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        let Some(time) = mesh.attempts_time(placed.rule) else {
            continue;
        };
        let mut told = BTreeSet::new();
        for (_, name) in placed.weighty().filter(|(_, name)| told.insert(*name)) {
            let Some(service) = mesh.services.get(name) else {
                continue;
            };
            // Who has said nothing of it and has endpoints doesn't count on it.
            let meant = service.hold != Hold::DEFAULT || service.endpoints.is_empty();
            if meant && service.hold.max_requests > 0 && service.hold.max_wait >= time {
                sink.add_with(
                    &placed.key(),
                    placed.at("timeouts.request"),
                    format!(
                        "Service/{name} holds requests for up to {}, and those of this rule have {}",
                        duration(service.hold.max_wait),
                        duration(time)
                    ),
                    format!(
                        "want more than {}, or a shorter hold.maxWait",
                        duration(service.hold.max_wait)
                    ),
                    vec![related(Kind::Service, name, "spec.hold.maxWait")],
                );
            }
        }
    }
}

fn health(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        let Some(check) = &service.health_check else {
            continue;
        };
        if check.timeout >= check.interval {
            sink.add(
                &key(Kind::Service, name),
                "spec.healthCheck.timeout",
                format!(
                    "is {}, and interval {}",
                    duration(check.timeout),
                    duration(check.interval)
                ),
                "want a timeout below the interval",
            );
        }
    }
}

/// Whether nothing keeps a rung from being tried before the next.
const fn is_for_all(rung: &Rung) -> bool {
    rung.causes.is_empty() && rung.methods.is_empty() && rung.when.is_none()
}

fn rungs(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    let mut told: BTreeSet<(&Name, usize)> = BTreeSet::new();
    for placed in mesh.rules() {
        let Some(name) = &placed.rule.fallback else {
            continue;
        };
        let (Some(ladder), Some(whole)) = (mesh.ladders.get(name), placed.rule.request_timeout) else {
            continue;
        };
        let kept = mesh.reserve(placed.rule);
        let mut left = kept;
        for (j, rung) in ladder
            .rungs
            .iter()
            .enumerate()
            .filter(|(_, rung)| takes_time(&rung.act))
        {
            let share = left * rung.deadline_percent.min(100) / 100;
            let call = mesh.plugin_of(&rung.act).map(|plugin| plugin.limits.call_timeout);
            let short = share < MOMENT || call.is_some_and(|call| share < call);
            if short && told.insert((name, j)) {
                let needs = call.map_or_else(String::new, |call| {
                    format!(", and its plugin may take {}", duration(call))
                });
                sink.add_with(
                    &key(Kind::FallbackPolicy, name),
                    format!("spec.rungs[{j}]"),
                    format!(
                        "has {} at worst{needs}: {} has {}, of which {} are kept for the ladder",
                        duration(share),
                        placed.key(),
                        duration(whole),
                        duration(kept)
                    ),
                    "raise reservePercent, set deadlinePercent of the rungs before it, or take it before them",
                    vec![placed.related("timeouts.request")],
                );
            }
            if is_for_all(rung) {
                left = left.saturating_sub(call.map_or(share, |call| call.min(share)));
            }
        }
    }
}

fn keep_alive(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, gateway) in &mesh.gateways {
        if gateway.trusted_hops == 0 {
            continue;
        }
        for (i, listener) in gateway.listeners.iter().enumerate() {
            if listener.limits.idle_timeout < KEPT_IN_FRONT {
                sink.add(
                    &key(Kind::Gateway, name),
                    format!("spec.listeners[{i}].limits.idleTimeout"),
                    format!(
                        "is {}, and the proxies in front (trustedHops: {}) keep connections for longer, as a rule",
                        duration(listener.limits.idle_timeout),
                        gateway.trusted_hops
                    ),
                    "want more than they have",
                );
            }
        }
    }
}

const fn is_grpc(on: RetryOn) -> bool {
    match on {
        RetryOn::GrpcCancelled
        | RetryOn::GrpcDeadlineExceeded
        | RetryOn::GrpcInternal
        | RetryOn::GrpcResourceExhausted
        | RetryOn::GrpcUnavailable => true,
        RetryOn::ConnectFailure
        | RetryOn::RefusedStream
        | RetryOn::Reset
        | RetryOn::GatewayError
        | RetryOn::FiveXx
        | RetryOn::RetriableStatusCodes
        | RetryOn::Retriable4xx => false,
    }
}

fn grpc(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        if !placed.rule.retry.on.iter().copied().any(is_grpc) {
            continue;
        }
        let http1 = |(_, name): (usize, &Name)| {
            let service = mesh.services.get(name);
            service.is_some_and(|service| service.protocol == crate::model::Protocol::Http1)
        };
        if placed.weighty().all(http1) {
            let also = placed
                .weighty()
                .map(|(_, name)| related(Kind::Service, name, "spec.protocol"));
            sink.add_with(
                &placed.key(),
                placed.at("retry.retryOn"),
                "names gRPC statuses, and no backend speaks HTTP/2".to_owned(),
                "set protocol: HTTP2 of the services, or name other conditions",
                also.collect(),
            );
        }
    }
}

fn budgets(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        let retry = &placed.rule.retry;
        let mut told = BTreeSet::new();
        for (_, name) in placed.weighty().filter(|(_, name)| told.insert(*name)) {
            let Some(service) = mesh.services.get(name) else {
                continue;
            };
            let (policy, resilience) = mesh.resilience_of(service);
            let Some(policy) = policy else { continue };
            let none = |budget: &crate::model::RetryBudget| budget.percent == 0 && budget.min_per_second == 0;
            let lost = [
                (
                    "retryBudget",
                    retry.max_attempts > 1 && none(&resilience.retry_budget),
                ),
                (
                    "hedgeBudget",
                    retry.hedge.is_some() && none(&resilience.hedge_budget),
                ),
            ];
            for (field, _) in lost.iter().filter(|(_, lost)| *lost) {
                // Three attempts are the default: who has none in the budget has said so on purpose.
                if *field == "retryBudget" && *retry == Retry::standard() {
                    continue;
                }
                sink.add_with(
                    &placed.key(),
                    placed.at("retry"),
                    format!(
                        "{field} of ResiliencePolicy/{policy}, which protects Service/{name}, allows none"
                    ),
                    "give it a budget, or set maxAttempts: 1 and no hedge",
                    vec![related(Kind::ResiliencePolicy, policy, format!("spec.{field}"))],
                );
            }
        }
    }
}

/// The same of a rung whose references are resolved.
pub(crate) const fn takes_own_time(act: &crate::ActView) -> bool {
    use crate::ActView;
    match act {
        ActView::Plugin { .. } | ActView::Service(_) | ActView::Zone { .. } | ActView::Queue(_) => true,
        ActView::Static(_) | ActView::Stale { .. } | ActView::Redirect(_) | ActView::Fail { .. } => false,
    }
}

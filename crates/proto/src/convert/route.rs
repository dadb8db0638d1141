//! Routes: what their rules match, and what becomes of requests that match.

use super::degradation::{cache, fault, flag_condition};
use super::gateway::parents;
use super::plugin::{filters, router};
use super::resilience::{circuit_breaker, priority, rate_limits, retry};
use super::text::{header_name, header_value, is_host, method, path_text};
use super::{HOUR, MS, SECOND};
use crate::field::{Fields, Section};
use crate::manifest::duration_text;
use crate::v1;
use leeward_policy::model::{
    Backend, HeaderMatch, HostMatch, PathMatch, RequestPriority, Retry, Route, RouteMatch, RouteRule,
    ValueMatch,
};
use std::time::Duration;

pub(super) fn route(f: &mut Fields, wire: &v1::Route) -> Option<Route> {
    f.count("spec.hostnames", wire.hostnames.len(), 1..=64);
    f.count("spec.rules", wire.rules.len(), 1..=128);
    let mut hostnames = Vec::new();
    for (i, host) in wire.hostnames.iter().enumerate() {
        hostnames.extend(hostname(f, &format!("spec.hostnames[{i}]"), host));
    }
    f.unique("spec.hostnames", "", &wire.hostnames);
    let mut rules = Vec::new();
    for (i, rule) in wire.rules.iter().enumerate() {
        rules.extend(route_rule(f, &format!("spec.rules[{i}]"), rule));
    }
    Some(Route {
        hostnames,
        rules,
        parents: parents(f, &wire.parent_refs),
    })
}

pub(super) fn hostname(f: &mut Fields, path: &str, text: &str) -> Option<HostMatch> {
    let lower = text.to_ascii_lowercase();
    if lower == "*" {
        return Some(HostMatch::Any);
    }
    let (wild, labels) = match lower.strip_prefix("*.") {
        Some(rest) => (true, rest),
        None => (false, lower.as_str()),
    };
    let address = labels.parse::<std::net::IpAddr>().is_ok()
        || labels
            .strip_prefix('[')
            .and_then(|l| l.strip_suffix(']'))
            .is_some_and(|l| l.parse::<std::net::Ipv6Addr>().is_ok());
    match (wild, address, is_host(labels)) {
        (true, false, true) => Some(HostMatch::Suffix(format!(".{labels}").into())),
        (false, true, _) | (false, _, true) => Some(HostMatch::Exact(lower.into())),
        _ => f.reject(
            path,
            format!("{text:?} is not a host; want one such as shop.example, *.example or *, without a port"),
        ),
    }
}

fn route_rule(f: &mut Fields, path: &str, wire: &v1::RouteRule) -> Option<RouteRule> {
    f.count(&format!("{path}.matches"), wire.matches.len(), 0..=64);
    let mut matches = Vec::new();
    for (i, on) in wire.matches.iter().enumerate() {
        matches.extend(route_match(f, &format!("{path}.matches[{i}]"), on));
    }
    if wire.matches.is_empty() {
        matches.push(RouteMatch {
            path: PathMatch::Prefix("".into()),
            method: None,
            headers: Vec::new(),
        });
    }
    f.count(&format!("{path}.backendRefs"), wire.backend_refs.len(), 1..=32);
    let mut backends = Vec::new();
    for (i, backend) in wire.backend_refs.iter().enumerate() {
        let at = format!("{path}.backendRefs[{i}]");
        let service = f.name(&format!("{at}.service"), &backend.service);
        let weight = f.optional(&format!("{at}.weight"), backend.weight, 1, 0..=1_000_000);
        let subset = f.labels(&format!("{at}.subset"), &backend.subset);
        let when = flag_condition(&mut f.section(format!("{at}.when")), backend.when.as_ref());
        backends.extend(service.map(|service| Backend {
            service,
            weight,
            subset,
            when,
        }));
    }
    if !wire.backend_refs.is_empty() && wire.backend_refs.iter().all(|b| b.weight == Some(0)) {
        f.reject::<()>(
            format!("{path}.backendRefs"),
            "all have weight 0; want one above 0 at least",
        );
    }
    let fallback = f.optional_name(&format!("{path}.fallback"), &wire.fallback);
    let retry = match &wire.retry {
        None => Retry::standard(),
        Some(wire) => retry(&mut f.section(format!("{path}.retry")), wire),
    };
    let wanted = wire.timeouts.unwrap_or_default();
    let mut timeouts = f.section(format!("{path}.timeouts"));
    let request_timeout = timeouts.limit("request", wanted.request.as_ref(), Some(15 * SECOND), MS..=HOUR);
    let attempt_timeout = timeouts.limit("backendRequest", wanted.backend_request.as_ref(), None, MS..=HOUR);
    let idle_timeout = timeouts.limit("idle", wanted.idle.as_ref(), Some(300 * SECOND), MS..=HOUR);
    if let (Some(request), Some(attempt)) = (request_timeout, attempt_timeout) {
        attempts_fit(&mut timeouts, request, attempt, &retry, !wire.fallback.is_empty());
    }
    Some(RouteRule {
        matches,
        backends,
        request_timeout,
        attempt_timeout,
        idle_timeout,
        retry,
        fallback,
        circuit_breaker: wire
            .circuit_breaker
            .as_ref()
            .map(|wire| circuit_breaker(&mut f.section(format!("{path}.circuitBreaker")), wire)),
        rate_limits: rate_limits(f, &format!("{path}.rateLimits"), &wire.rate_limits),
        priority: match &wire.priority {
            None => RequestPriority::default(),
            Some(wire) => priority(&mut f.section(format!("{path}.priority")), wire),
        },
        when: flag_condition(&mut f.section(format!("{path}.when")), wire.when.as_ref()),
        enabled: flag_condition(&mut f.section(format!("{path}.enabled")), wire.enabled.as_ref()),
        cache: wire
            .cache
            .as_ref()
            .map(|wire| cache(&mut f.section(format!("{path}.cache")), wire)),
        fault: wire
            .fault
            .as_ref()
            .and_then(|wire| fault(&mut f.section(format!("{path}.fault")), wire)),
        filters: filters(f, &format!("{path}.filters"), &wire.filters),
        router: wire
            .router
            .as_ref()
            .and_then(|wire| router(&mut f.section(format!("{path}.router")), wire)),
    })
}

/// All attempts, each as long as it may be, must fit into the request's time, of which a rule with a fallback
/// keeps a tenth for that. Otherwise the last of them could never be made. What the FallbackPolicy says of its
/// reserve stands in another resource, which may change later and is not seen here.
fn attempts_fit(s: &mut Section<'_>, request: Duration, attempt: Duration, retry: &Retry, fallback: bool) {
    let attempts = u32::from(retry.max_attempts);
    let kept = if fallback { request / 10 } else { Duration::ZERO };
    let left = request.saturating_sub(kept);
    if attempt.saturating_mul(attempts) <= left {
        return;
    }
    let reserve = if fallback {
        format!(" without the {} kept for the fallback", duration_text(kept))
    } else {
        String::new()
    };
    s.reject::<()>(
        "backendRequest",
        format!(
            "{attempts} attempts of {} take {}, but request leaves {}{reserve}; want at most {}, or fewer attempts",
            duration_text(attempt),
            duration_text(attempt.saturating_mul(attempts)),
            duration_text(left),
            duration_text(left / attempts.max(1)),
        ),
    );
}

fn route_match(f: &mut Fields, path: &str, wire: &v1::RouteMatch) -> Option<RouteMatch> {
    let at = |kind: &str| format!("{path}.path.{kind}");
    let path_match = match wire.path.as_ref().and_then(|p| p.kind.as_ref()) {
        None => Some(PathMatch::Prefix("".into())),
        Some(v1::path_match::Kind::Exact(text)) => {
            path_text(f, &at("exact"), text).map(|t| PathMatch::Exact(t.into()))
        }
        Some(v1::path_match::Kind::Prefix(text)) => {
            path_text(f, &at("prefix"), text).map(|t| PathMatch::Prefix(t.trim_end_matches('/').into()))
        }
    };
    let on_method = match wire.method.as_str() {
        "" => None,
        text => method(f, &format!("{path}.method"), text).map(Box::from),
    };
    f.count(&format!("{path}.headers"), wire.headers.len(), 0..=16);
    let mut headers = Vec::new();
    for (i, header) in wire.headers.iter().enumerate() {
        headers.extend(header_match(f, &format!("{path}.headers[{i}]"), header));
    }
    Some(RouteMatch {
        path: path_match?,
        method: on_method,
        headers,
    })
}

fn header_match(f: &mut Fields, path: &str, wire: &v1::HeaderMatch) -> Option<HeaderMatch> {
    let name = header_name(f, &format!("{path}.name"), &wire.name);
    let value = match &wire.kind {
        None => f.reject(
            path,
            "says nothing of the value; want one of exact, prefix, present",
        ),
        Some(v1::header_match::Kind::Exact(text)) => {
            header_value(f, &format!("{path}.exact"), text).map(|t| ValueMatch::Exact(t.into()))
        }
        Some(v1::header_match::Kind::Prefix(text)) => {
            header_value(f, &format!("{path}.prefix"), text).map(|t| ValueMatch::Prefix(t.into()))
        }
        Some(v1::header_match::Kind::Present(true)) => Some(ValueMatch::Present),
        Some(v1::header_match::Kind::Present(false)) => Some(ValueMatch::Absent),
    };
    Some(HeaderMatch {
        name: name?,
        value: value?,
    })
}

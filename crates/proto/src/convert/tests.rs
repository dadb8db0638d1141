//! What is valid survives every way there and back; what isn't is refused by name.

mod arbitrary;
mod authorization;
mod between;
mod degradation;
mod gateway;
mod plugin;
mod rollout;
mod workload;

use crate::manifest::{parse as read, to_yaml};
use crate::{parse, render};
use leeward_policy::model::{
    AdaptiveConcurrency, AdmissionControl, Backend, CircuitBreaker, HostMatch, LoadShedding, PathMatch,
    ResiliencePolicy, Route, RouteMatch, RouteRule, Service,
};
use leeward_policy::{Name, Resource, Spec};
use proptest::prelude::*;
use std::collections::BTreeMap;

proptest! {
    #[test]
    fn whatever_is_valid_survives_the_wire_and_yaml(name in arbitrary::name(), revision in any::<u32>(), spec in arbitrary::spec()) {
        let resource = Resource { name, revision: revision.into(), labels: BTreeMap::new(), spec };
        let wire = render(&resource);
        prop_assert_eq!(parse(&wire), Ok(resource));
        let text = to_yaml(&wire);
        prop_assert_eq!(read("again", &text), Ok(vec![wire]), "{}", text);
    }
}

proptest! {
    /// The linter looks at whatever is valid, and says the same of it each time.
    #[test]
    fn whatever_is_valid_can_be_looked_at(
        specs in proptest::collection::vec((arbitrary::name(), arbitrary::spec()), 0..12),
    ) {
        let resources: Vec<Resource> = specs
            .into_iter()
            .map(|(name, spec)| Resource { name, revision: 1, labels: BTreeMap::new(), spec })
            .collect();
        let now = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_796_083_200);
        let look = || {
            let report = leeward_policy::lint::lint(&resources, now);
            report.findings.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let found = look();
        prop_assert!(found.iter().all(|text| !text.ends_with("; ")), "{:?}", found);
        prop_assert_eq!(look(), found);
    }
}

/// What is said of a spec, line by line, without places.
#[track_caller]
fn check(kind: &str, spec: &str, want: &[&str]) {
    let text = format!("apiVersion: leeward.dev/v1\nkind: {kind}\nmetadata: {{name: a}}\nspec: {spec}\n");
    let errors = read("f", &text).err().unwrap_or_default();
    let mut lines: Vec<_> = errors
        .iter()
        .map(|e| format!("{}: {}", e.path, e.reason))
        .collect();
    lines.sort();
    assert_eq!(lines, want, "{spec}");
}

/// The same of a rule of a route.
#[track_caller]
fn check_rule(rule: &str, want: &[&str]) {
    let spec = format!("{{hostnames: [a], rules: [{{backendRefs: [{{service: s}}], {rule}}}]}}");
    let want: Vec<_> = want.iter().map(|line| format!("spec.rules[0].{line}")).collect();
    check(
        "Route",
        &spec,
        &want.iter().map(String::as_str).collect::<Vec<_>>(),
    );
}

#[test]
fn attempts_that_do_not_fit_into_their_requests_time_are_refused_with_the_figures() {
    check_rule("timeouts: {request: 9s, backendRequest: 3s}", &[]);
    check_rule(
        "timeouts: {request: 9s, backendRequest: 3s}, fallback: f",
        &[
            "timeouts.backendRequest: 3 attempts of 3s take 9s, but request leaves 8.1s without the 900ms kept for the fallback; want at most 2.7s, or fewer attempts",
        ],
    );
    check_rule("timeouts: {request: 9s, backendRequest: 2.7s}, fallback: f", &[]);
    check_rule(
        "timeouts: {backendRequest: 4s}, retry: {maxAttempts: 4}",
        &[
            "timeouts.backendRequest: 4 attempts of 4s take 16s, but request leaves 15s; want at most 3.75s, or fewer attempts",
        ],
    );
    check_rule(
        "timeouts: {request: 0s, backendRequest: 1h}, retry: {maxAttempts: 10}",
        &[],
    );
    check_rule("timeouts: {request: 1s, backendRequest: 0s}", &[]);
}

#[test]
fn a_time_that_is_bounded_by_another_is_never_smaller() {
    check(
        "Service",
        "{outlierDetection: {baseEjectionTime: 10m, maxEjectionTime: 5m}}",
        &["spec.outlierDetection.maxEjectionTime: 5m is out of range; want 10m to 24h"],
    );
    // The default of the bound grows with what it bounds.
    check("Service", "{outlierDetection: {baseEjectionTime: 10m}}", &[]);
    check(
        "ResiliencePolicy",
        "{circuitBreaker: {openTime: 2m, maxOpenTime: 1m}, loadShedding: {low: 50, normal: 40, high: 45}}",
        &[
            "spec.circuitBreaker.maxOpenTime: 1m is out of range; want 2m to 24h",
            "spec.loadShedding.normal: 40 is out of range; want 50 to 100",
        ],
    );
    check(
        "ResiliencePolicy",
        "{endpointCircuitBreaker: {openTime: 30m}}",
        &[],
    );
    check_rule(
        "retry: {baseInterval: 1s, maxInterval: 500ms}",
        &["retry.maxInterval: 500ms is out of range; want 1s to 5m"],
    );
    check_rule("retry: {baseInterval: 1m}", &[]);
    check(
        "Service",
        "{loadBalancer: {zoneFailover: {leaveBelow: 80, returnAbove: 75}}}",
        &["spec.loadBalancer.zoneFailover.returnAbove: 75 is out of range; want 80 to 100"],
    );
    check("Service", "{loadBalancer: {zoneFailover: {leaveBelow: 95}}}", &[]);
    check(
        "ResiliencePolicy",
        "{adaptiveConcurrency: {maxLimit: 5, minLimit: 6}}",
        &["spec.adaptiveConcurrency.minLimit: 6 is out of range; want 1 to 5"],
    );
}

#[test]
fn what_a_balancing_policy_needs_is_there_and_what_it_has_no_use_for_is_not() {
    let stray = |field: &str, whose: &str| {
        format!("spec.loadBalancer.{field}: is only for {whose}; leave it out, or choose another policy")
    };
    check(
        "Service",
        "{loadBalancer: {hashKey: {source: true}, hashBalanceFactor: 0, minimumRingSize: 2000, tableSize: 251}}",
        &[
            &stray("hashBalanceFactor", "RingHash and Maglev"),
            &stray("hashKey", "RingHash and Maglev"),
            &stray("minimumRingSize", "RingHash"),
            &stray("tableSize", "Maglev"),
        ],
    );
    check(
        "Service",
        "{loadBalancer: {policy: RoundRobin, failurePenalty: 1s, defaultRtt: 1s, decayTime: 1s}}",
        &[
            &stray("decayTime", "PeakEwma"),
            &stray("defaultRtt", "PeakEwma"),
            &stray("failurePenalty", "PeakEwma and LeastRequest"),
        ],
    );
    check(
        "Service",
        "{loadBalancer: {policy: RingHash, slowStartWindow: 1s}}",
        &[
            "spec.loadBalancer.hashKey: is missing; RingHash and Maglev want one of header, cookie, source",
            &stray("slowStartWindow", "PeakEwma, LeastRequest, RoundRobin and Random"),
        ],
    );
    check(
        "Service",
        "{loadBalancer: {policy: Maglev, hashKey: {source: false}, tableSize: 65536, hashBalanceFactor: 99}}",
        &[
            "spec.loadBalancer.hashBalanceFactor: 99 is out of range; want 100 to 1000, or 0 for no bound",
            "spec.loadBalancer.hashKey.source: is false; want true, or another kind of key",
            "spec.loadBalancer.tableSize: 65536 is not a prime; want one, such as 65537",
        ],
    );
    check(
        "Service",
        "{loadBalancer: {policy: Maglev, hashKey: {cookie: {name: 'a b', path: x}}}}",
        &[
            "spec.loadBalancer.hashKey.cookie.name: \"a b\" is not a cookie's name; want one such as shop-user",
            "spec.loadBalancer.hashKey.cookie.path: \"x\" is not a cookie's path; want one that begins with '/', of at most 1024 bytes, without ';'",
        ],
    );
}

#[test]
fn headers_that_policy_goes_by_are_not_the_proxys_own() {
    let own = |path: &str, name: &str| {
        format!("{path}: {name} is set by the proxy; want a header that callers set, such as x-user")
    };
    check(
        "Service",
        "{loadBalancer: {policy: RingHash, hashKey: {header: Leeward-Zone}}, connectionPool: {perCaller: {maxRequests: 1, header: Connection}}}",
        &[
            &own("spec.connectionPool.perCaller.header", "connection"),
            &own("spec.loadBalancer.hashKey.header", "leeward-zone"),
        ],
    );
    check_rule(
        "rateLimits: [{requests: 1, key: {header: leeward-x}}], priority: {header: 'x y'}",
        &[
            "priority.header: \"x y\" is not a header name; want one such as x-user",
            &own("rateLimits[0].key.header", "leeward-x"),
        ],
    );
}

#[test]
fn what_has_no_default_must_be_said() {
    check(
        "Service",
        "{connectionPool: {perCaller: {}}, healthCheck: {}}",
        &[
            "spec.connectionPool.perCaller.maxRequests: is missing; want 1 to 1000000",
            "spec.healthCheck: says nothing of how to ask; want one of http, grpc, tcp",
        ],
    );
    check_rule(
        "rateLimits: [{}], retry: {hedge: {}}",
        &[
            "rateLimits[0].requests: is missing; want 1 to 1000000000",
            "retry.hedge.delay: is missing; want 1ms to 1m",
        ],
    );
    check(
        "CircuitOverride",
        "{}",
        &[
            "spec.expireTime: is missing; say when it ends, such as 2026-11-24T22:00:00Z",
            "spec.mode: is missing; want ForceOpen or ForceClosed",
            "spec: names no circuit; want one of service, route",
        ],
    );
    check(
        "CircuitOverride",
        "{service: a, route: b, mode: Observe, expireTime: 1900-01-01T00:00:00Z}",
        &[
            "spec.expireTime: -2208988800s 0ns since 1970 is not a time from 1970 to 9999",
            "spec.mode: Observe holds nothing; want ForceOpen or ForceClosed",
            "spec.route: stands beside service; want one of them",
        ],
    );
    check(
        "CircuitOverride",
        "{service: a, mode: ForceOpen, expireTime: tomorrow}",
        &["spec.expireTime: \"tomorrow\" is not a time; want one such as 2026-11-24T22:00:00Z"],
    );
}

#[test]
fn conditions_and_statuses_of_retries_belong_together() {
    check_rule(
        "retry: {retryOn: [RetriableStatusCodes]}",
        &["retry.retriableStatusCodes: is empty, and retryOn names RetriableStatusCodes; list the statuses"],
    );
    check_rule(
        "retry: {retryOn: [Reset, Reset], retriableStatusCodes: [429, 399], maxBody: 2MiB, maxAttempts: 11}",
        &[
            "retry.maxAttempts: 11 is out of range; want 1 to 10",
            "retry.maxBody: 2097152 is out of range; want 0 to 1048576",
            "retry.retriableStatusCodes: has no effect; name RetriableStatusCodes in retryOn, too, or leave it out",
            "retry.retriableStatusCodes[1]: 399 is out of range; want 400 to 599",
            "retry.retryOn[1]: stands twice; each condition must stand once",
        ],
    );
}

#[test]
fn keys_of_rate_limits_say_whose_bucket_it_is() {
    check_rule(
        "rateLimits: [{requests: 1, key: {caller: false}}, {requests: 1, key: {maxKeys: 3}}, {requests: 1, key: {caller: true, header: x}}]",
        &["rateLimits[2].key: has more than one of caller, header; want one"],
    );
    check_rule(
        "rateLimits: [{requests: 1, key: {caller: false}}, {requests: 1, key: {maxKeys: 3}}]",
        &[
            "rateLimits[0].key.caller: is false; want true, or leave it out for one bucket",
            "rateLimits[1].key.maxKeys: has no effect without one of caller, header; add one, or leave it out",
        ],
    );
}

#[test]
fn defaults_are_the_ones_that_the_model_names() {
    let text = "apiVersion: leeward.dev/v1\nkind: KIND\nmetadata: {name: a}\nspec: SPEC\n";
    let spec = |kind: &str, spec: &str| {
        let wire = read("f", &text.replace("KIND", kind).replace("SPEC", spec)).unwrap();
        parse(&wire[0]).unwrap().spec
    };
    let (service, other) = (
        Service::new(Vec::new()),
        "{loadBalancer: {}, outlierDetection: {successRate: {}}, connectionPool: {}, hold: {}}",
    );
    assert_eq!(spec("Service", "{}"), Spec::Service(service.clone()));
    assert_eq!(spec("Service", other), Spec::Service(service));
    let policy = ResiliencePolicy {
        circuit_breaker: Some(CircuitBreaker::DEFAULT),
        endpoint_circuit_breaker: Some(CircuitBreaker::DEFAULT),
        adaptive_concurrency: Some(AdaptiveConcurrency::DEFAULT),
        admission_control: Some(AdmissionControl::DEFAULT),
        load_shedding: Some(LoadShedding::DEFAULT),
        ..ResiliencePolicy::DEFAULT
    };
    let whole = "{circuitBreaker: {}, endpointCircuitBreaker: {}, retryBudget: {}, hedgeBudget: {}, adaptiveConcurrency: {}, admissionControl: {}, loadShedding: {}}";
    assert_eq!(
        spec("ResiliencePolicy", "{}"),
        Spec::ResiliencePolicy(ResiliencePolicy::DEFAULT)
    );
    assert_eq!(spec("ResiliencePolicy", whole), Spec::ResiliencePolicy(policy));
    for more in ["", ", timeouts: {}, retry: {}, priority: {}"] {
        let route = format!("{{hostnames: ['*'], rules: [{{backendRefs: [{{service: s}}]{more}}}]}}");
        let matches = vec![RouteMatch {
            path: PathMatch::Prefix("".into()),
            method: None,
            headers: Vec::new(),
        }];
        let backends = vec![Backend::new(Name::parse("s").unwrap(), 1)];
        let rules = vec![RouteRule::new(matches, backends)];
        assert_eq!(
            spec("Route", &route),
            Spec::Route(Route {
                hostnames: vec![HostMatch::Any],
                rules,
                parents: Vec::new(),
            })
        );
    }
}

#[test]
fn a_zone_that_is_drained_says_since_when_and_until_when() {
    let times = "startTime: \"2026-11-24T22:00:00Z\", expireTime: \"2026-11-24T23:00:00Z\"";
    check("Zone", &format!("{{drain: {{{times}}}}}"), &[]);
    check(
        "Zone",
        "{drain: {}}",
        &[
            "spec.drain.expireTime: is missing; say when it ends, such as 2026-11-24T22:00:00Z",
            "spec.drain.startTime: is missing; say when it begins, such as 2026-11-24T22:00:00Z",
        ],
    );
    check(
        "Zone",
        &format!("{{drain: {{{times}, step: 101, interval: 2h}}}}"),
        &[
            "spec.drain.interval: 2h is out of range; want 1s to 1h",
            "spec.drain.step: 101 is out of range; want 1 to 100",
        ],
    );
    let long = "k".repeat(64);
    check(
        "Service",
        &format!("{{loadBalancer: {{zoneFailover: {{within: {long}}}}}}}"),
        &["spec.loadBalancer.zoneFailover.within: has 64 bytes; want the key of a label, of 1 to 63"],
    );
}

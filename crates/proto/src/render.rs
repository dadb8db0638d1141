//! From policy back to wire messages.

mod access;
mod authorization;
mod backup;
mod degradation;
mod explain;
mod fallback;
mod gateway;
mod lint;
mod plugin;
mod queue;
mod resilience;
mod rollout;
mod workload;

pub use explain::{explain, parse_question, render_explanation};
pub use lint::render_finding;

use crate::convert::NONE;
use crate::v1;
use leeward_policy::model::{
    Capture, DirectCallers, HeaderMatch, HostMatch, PathMatch, Protocol, RouteMatch, RouteRule, Selection,
    Service, UnknownDestination, ValueMatch, Zone, ZoneDrain, ZoneGateway, ZoneTransport,
};
use leeward_policy::{Key, Kind, Name, Resource, Spec};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// A resource as it goes on the wire, without status and times.
pub fn render(resource: &Resource) -> v1::Resource {
    let spec = match &resource.spec {
        Spec::Zone(zone) => v1::resource::Spec::Zone(v1::Zone {
            proxies: zone
                .proxies
                .iter()
                .map(|p| v1::ZoneProxy {
                    name: p.name.to_string(),
                    address: p.address.to_string(),
                })
                .collect(),
            failover: names(&zone.failover),
            transport: transport(zone.transport).into(),
            transport_within: transport(zone.transport_within).into(),
            labels: labels(&zone.labels),
            drain: zone.drain.as_ref().map(drain),
            gateways: zone.gateways.iter().map(gateway).collect(),
            direct_callers: direct_callers(zone).into(),
            imports: selection(&zone.imports),
            capture: Some(capture(&zone.capture)),
        }),
        Spec::Service(service) => v1::resource::Spec::Service(render_service(service)),
        Spec::Route(route) => v1::resource::Spec::Route(v1::Route {
            hostnames: route.hostnames.iter().map(hostname).collect(),
            rules: route.rules.iter().map(rule).collect(),
            parent_refs: route.parents.iter().map(gateway::parent).collect(),
        }),
        Spec::FallbackPolicy(policy) => v1::resource::Spec::FallbackPolicy(fallback::policy(policy)),
        Spec::Plugin(plugin) => v1::resource::Spec::Plugin(plugin::plugin(plugin)),
        Spec::ResiliencePolicy(policy) => {
            v1::resource::Spec::ResiliencePolicy(resilience::resilience_policy(policy))
        }
        Spec::CircuitOverride(held) => {
            v1::resource::Spec::CircuitOverride(resilience::circuit_override(held))
        }
        Spec::FeatureFlags(flags) => v1::resource::Spec::FeatureFlags(v1::FeatureFlags {
            document: flags.set.document().to_owned(),
        }),
        Spec::DegradationPolicy(policy) => v1::resource::Spec::DegradationPolicy(degradation::policy(policy)),
        Spec::DegradationOverride(held) => v1::resource::Spec::DegradationOverride(degradation::held(held)),
        Spec::Queue(wanted) => v1::resource::Spec::Queue(queue::queue(wanted)),
        Spec::AuthorizationPolicy(policy) => {
            v1::resource::Spec::AuthorizationPolicy(authorization::policy(policy))
        }
        Spec::Gateway(wanted) => v1::resource::Spec::Gateway(gateway::gateway(wanted)),
        Spec::RolloutPolicy(policy) => v1::resource::Spec::RolloutPolicy(rollout::policy(policy)),
        Spec::AccessPolicy(policy) => v1::resource::Spec::AccessPolicy(access::policy(policy)),
        Spec::BackupPolicy(policy) => v1::resource::Spec::BackupPolicy(backup::policy(policy)),
        Spec::RecoveryObjective(wanted) => v1::resource::Spec::RecoveryObjective(backup::objective(wanted)),
        Spec::Workload(wanted) => v1::resource::Spec::Workload(workload::workload(wanted)),
    };
    let metadata = v1::Metadata {
        name: resource.name.to_string(),
        revision: resource.revision,
        labels: resource
            .labels
            .iter()
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect(),
        create_time: None,
        update_time: None,
        manager: String::new(),
    };
    v1::Resource {
        metadata: Some(metadata),
        status: None,
        spec: Some(spec),
    }
}

/// The name of a resource on the wire.
pub fn render_key(key: &Key) -> v1::ResourceRef {
    v1::ResourceRef {
        kind: render_kind(key.kind).into(),
        name: key.name.to_string(),
    }
}

/// A kind on the wire.
pub fn render_kind(kind: Kind) -> v1::Kind {
    match kind {
        Kind::Zone => v1::Kind::Zone,
        Kind::Service => v1::Kind::Service,
        Kind::Route => v1::Kind::Route,
        Kind::FallbackPolicy => v1::Kind::FallbackPolicy,
        Kind::Plugin => v1::Kind::Plugin,
        Kind::ResiliencePolicy => v1::Kind::ResiliencePolicy,
        Kind::CircuitOverride => v1::Kind::CircuitOverride,
        Kind::FeatureFlags => v1::Kind::FeatureFlags,
        Kind::DegradationPolicy => v1::Kind::DegradationPolicy,
        Kind::DegradationOverride => v1::Kind::DegradationOverride,
        Kind::Queue => v1::Kind::Queue,
        Kind::AuthorizationPolicy => v1::Kind::AuthorizationPolicy,
        Kind::Gateway => v1::Kind::Gateway,
        Kind::RolloutPolicy => v1::Kind::RolloutPolicy,
        Kind::AccessPolicy => v1::Kind::AccessPolicy,
        Kind::BackupPolicy => v1::Kind::BackupPolicy,
        Kind::RecoveryObjective => v1::Kind::RecoveryObjective,
        Kind::Workload => v1::Kind::Workload,
    }
}

fn duration(value: Duration) -> Option<prost_types::Duration> {
    // Every duration of the model is at most a year, far from where a conversion fails.
    prost_types::Duration::try_from(value).ok()
}

/// A limit that is not there is zero.
fn limit(limit: Option<Duration>) -> Option<prost_types::Duration> {
    duration(limit.unwrap_or_default())
}

/// A text that is not there is empty.
fn text(value: Option<&str>) -> String {
    value.unwrap_or_default().to_owned()
}

const fn transport(transport: ZoneTransport) -> v1::ZoneTransport {
    match transport {
        ZoneTransport::Auto => v1::ZoneTransport::Auto,
        ZoneTransport::Quic => v1::ZoneTransport::Quic,
        ZoneTransport::Tcp => v1::ZoneTransport::Tcp,
    }
}

fn gateway(gateway: &ZoneGateway) -> v1::ZoneGateway {
    v1::ZoneGateway {
        name: gateway.name.to_string(),
        address: gateway
            .address
            .map(|address| address.to_string())
            .unwrap_or_default(),
    }
}

/// Only zones with gateways say it.
const fn direct_callers(zone: &Zone) -> v1::DirectCallers {
    match zone.direct_callers {
        _ if zone.gateways.is_empty() => v1::DirectCallers::Unspecified,
        DirectCallers::Refuse => v1::DirectCallers::Refuse,
        DirectCallers::Allow => v1::DirectCallers::Allow,
    }
}

fn selection(selection: &Selection) -> Vec<String> {
    match selection {
        Selection::All => Vec::new(),
        Selection::Only(none) if none.is_empty() => vec![NONE.to_owned()],
        Selection::Only(some) => names(some),
    }
}

fn drain(drain: &ZoneDrain) -> v1::ZoneDrain {
    v1::ZoneDrain {
        start_time: Some(drain.start_time.into()),
        step: drain.step,
        interval: duration(drain.interval),
        expire_time: Some(drain.expire_time.into()),
        reason: drain.reason.to_string(),
    }
}

fn names(names: &[Name]) -> Vec<String> {
    names.iter().map(Name::to_string).collect()
}

/// A reference that is not there is empty.
fn name(name: Option<&Name>) -> String {
    name.map(Name::to_string).unwrap_or_default()
}

fn render_service(service: &Service) -> v1::Service {
    let endpoints = service.endpoints.iter().map(|e| v1::Endpoint {
        address: e.address.to_string(),
        zone: e.zone.to_string(),
        proxy: name(e.proxy.as_ref()),
        weight: e.weight,
        labels: labels(&e.labels),
    });
    v1::Service {
        protocol: match service.protocol {
            Protocol::Http1 => v1::Protocol::Http1.into(),
            Protocol::Http2 => v1::Protocol::Http2.into(),
            Protocol::Tcp => v1::Protocol::Tcp.into(),
        },
        endpoints: endpoints.collect(),
        connect_timeout: duration(service.connect_timeout),
        outlier_detection: Some(resilience::outlier(&service.outlier)),
        connection_pool: Some(resilience::pool(&service.pool)),
        load_balancer: Some(resilience::load_balancer(&service.balance)),
        health_check: service.health_check.as_ref().map(resilience::health_check),
        resilience: name(service.resilience.as_ref()),
        hold: Some(resilience::hold(&service.hold)),
        export_to: selection(&service.export_to),
        addresses: service.addresses.iter().map(ToString::to_string).collect(),
        server_names: service.server_names.iter().map(hostname).collect(),
        tcp: (service.protocol == Protocol::Tcp).then(|| v1::TcpSettings {
            idle_timeout: limit(service.tcp.idle_timeout),
            max_connect_attempts: service.tcp.max_connect_attempts.into(),
        }),
    }
}

fn capture(capture: &Capture) -> v1::Capture {
    v1::Capture {
        unknown: match capture.unknown {
            UnknownDestination::Pass => v1::UnknownDestination::Pass.into(),
            UnknownDestination::Refuse => v1::UnknownDestination::Refuse.into(),
        },
        detect_timeout: duration(capture.detect_timeout),
        idle_timeout: limit(capture.idle_timeout),
    }
}

fn labels(labels: &BTreeMap<Box<str>, Box<str>>) -> HashMap<String, String> {
    labels
        .iter()
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect()
}

fn hostname(host: &HostMatch) -> String {
    host.to_string()
}

fn rule(rule: &RouteRule) -> v1::RouteRule {
    let backends = rule
        .backends
        .iter()
        .map(|b| v1::BackendRef {
            service: b.service.to_string(),
            weight: Some(b.weight),
            subset: labels(&b.subset),
            when: b.when.as_ref().map(degradation::condition),
        })
        .collect();
    v1::RouteRule {
        matches: rule.matches.iter().map(route_match).collect(),
        backend_refs: backends,
        timeouts: Some(v1::RouteTimeouts {
            request: limit(rule.request_timeout),
            backend_request: limit(rule.attempt_timeout),
            idle: limit(rule.idle_timeout),
        }),
        retry: Some(resilience::retry(&rule.retry)),
        fallback: name(rule.fallback.as_ref()),
        circuit_breaker: rule.circuit_breaker.as_ref().map(resilience::circuit_breaker),
        rate_limits: rule.rate_limits.iter().map(resilience::rate_limit).collect(),
        priority: Some(resilience::priority(&rule.priority)),
        when: rule.when.as_ref().map(degradation::condition),
        enabled: rule.enabled.as_ref().map(degradation::condition),
        cache: rule.cache.as_ref().map(degradation::cache),
        fault: rule.fault.as_ref().map(degradation::fault),
        filters: rule.filters.iter().map(plugin::filter).collect(),
        router: rule.router.as_ref().map(plugin::router),
    }
}

fn route_match(on: &RouteMatch) -> v1::RouteMatch {
    let path = match &on.path {
        PathMatch::Exact(path) => v1::path_match::Kind::Exact(path.to_string()),
        PathMatch::Prefix(prefix) if prefix.is_empty() => v1::path_match::Kind::Prefix("/".to_owned()),
        PathMatch::Prefix(prefix) => v1::path_match::Kind::Prefix(prefix.to_string()),
    };
    v1::RouteMatch {
        path: Some(v1::PathMatch { kind: Some(path) }),
        method: on.method.as_deref().unwrap_or_default().to_owned(),
        headers: on.headers.iter().map(header_match).collect(),
    }
}

fn header_match(on: &HeaderMatch) -> v1::HeaderMatch {
    let kind = match &on.value {
        ValueMatch::Exact(value) => v1::header_match::Kind::Exact(value.to_string()),
        ValueMatch::Prefix(value) => v1::header_match::Kind::Prefix(value.to_string()),
        ValueMatch::Present => v1::header_match::Kind::Present(true),
        ValueMatch::Absent => v1::header_match::Kind::Present(false),
    };
    v1::HeaderMatch {
        name: on.name.to_string(),
        kind: Some(kind),
    }
}

//! From wire messages to what people read.

mod access;
mod authorization;
mod backup;
mod degradation;
mod fallback;
mod gateway;
mod plugin;
mod resilience;
mod rollout;
mod workload;

use super::words::{self, word};
use super::{API_VERSION, duration_text};
use crate::v1;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::time::Duration;

/// A resource as JSON, in the shape of its YAML, with status and times where it has them.
pub fn to_json(resource: &v1::Resource) -> Value {
    let metadata = resource.metadata.clone().unwrap_or_default();
    let (kind, spec) = match &resource.spec {
        None => ("", Value::Null),
        Some(v1::resource::Spec::Zone(spec)) => ("Zone", zone(spec)),
        Some(v1::resource::Spec::Service(spec)) => ("Service", service(spec)),
        Some(v1::resource::Spec::Route(spec)) => ("Route", route(spec)),
        Some(v1::resource::Spec::FallbackPolicy(spec)) => ("FallbackPolicy", fallback::policy(spec)),
        Some(v1::resource::Spec::Plugin(spec)) => ("Plugin", plugin::plugin(spec)),
        Some(v1::resource::Spec::ResiliencePolicy(spec)) => {
            ("ResiliencePolicy", resilience::resilience_policy(spec))
        }
        Some(v1::resource::Spec::CircuitOverride(spec)) => {
            ("CircuitOverride", resilience::circuit_override(spec))
        }
        Some(v1::resource::Spec::FeatureFlags(spec)) => ("FeatureFlags", degradation::flags(spec)),
        Some(v1::resource::Spec::DegradationPolicy(spec)) => ("DegradationPolicy", degradation::policy(spec)),
        Some(v1::resource::Spec::DegradationOverride(spec)) => {
            ("DegradationOverride", degradation::held(spec))
        }
        Some(v1::resource::Spec::Queue(spec)) => ("Queue", degradation::queue(spec)),
        Some(v1::resource::Spec::AuthorizationPolicy(spec)) => {
            ("AuthorizationPolicy", authorization::policy(spec))
        }
        Some(v1::resource::Spec::Gateway(spec)) => ("Gateway", gateway::gateway(spec)),
        Some(v1::resource::Spec::RolloutPolicy(spec)) => ("RolloutPolicy", rollout::policy(spec)),
        Some(v1::resource::Spec::AccessPolicy(spec)) => ("AccessPolicy", access::policy(spec)),
        Some(v1::resource::Spec::BackupPolicy(spec)) => ("BackupPolicy", backup::policy(spec)),
        Some(v1::resource::Spec::RecoveryObjective(spec)) => ("RecoveryObjective", backup::objective(spec)),
        Some(v1::resource::Spec::Workload(spec)) => ("Workload", workload::workload(spec)),
    };
    let status = resource.status.as_ref().filter(|s| **s != v1::Status::default()).map(|s| {
        let refusals: Vec<_> = s
            .refusals
            .iter()
            .map(|r| json!({"proxy": r.proxy, "revision": r.revision, "reason": r.reason, "runningRevision": r.running_revision}))
            .collect();
        fields([("live", json!(s.live)), ("proxies", json!(s.proxies)), ("refusals", json!(refusals))])
    });
    fields([
        ("apiVersion", json!(API_VERSION)),
        ("kind", json!(kind)),
        (
            "metadata",
            fields([
                ("name", json!(metadata.name)),
                ("revision", json!(metadata.revision)),
                ("labels", labels(&metadata.labels)),
                ("manager", json!(metadata.manager)),
                ("createTime", json!(metadata.create_time.map(|t| t.to_string()))),
                ("updateTime", json!(metadata.update_time.map(|t| t.to_string()))),
            ]),
        ),
        ("spec", spec),
        ("status", status.unwrap_or(Value::Null)),
    ])
}

/// A resource as a YAML document, which [`super::parse`] reads again.
pub fn to_yaml(resource: &v1::Resource) -> String {
    let mut out = String::new();
    let mut value = to_json(resource);
    if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
        metadata.remove("createTime");
        metadata.remove("updateTime");
    }
    emit(&mut out, &value, 0);
    out
}

/// An object without the fields that say nothing. An object in it that says nothing stays: that it is there
/// can mean much, as `circuitBreaker: {}` does.
fn fields<const N: usize>(entries: [(&str, Value); N]) -> Value {
    let says = |v: &Value| match v {
        Value::Null => false,
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(_) => true,
        Value::Number(n) => n.as_u64() != Some(0),
        Value::Bool(b) => *b,
    };
    Value::Object(
        entries
            .into_iter()
            .filter(|(_, v)| says(v))
            .map(|(k, v)| (k.to_owned(), v))
            .collect(),
    )
}

fn duration(wire: Option<&prost_types::Duration>) -> Value {
    wire.and_then(|d| Duration::try_from(*d).ok())
        .map_or(Value::Null, |d| json!(duration_text(d)))
}

/// Labels in order; nothing for none.
fn labels(labels: &HashMap<String, String>) -> Value {
    if labels.is_empty() {
        return Value::Null;
    }
    json!(labels.iter().collect::<BTreeMap<_, _>>())
}

fn zone(zone: &v1::Zone) -> Value {
    let proxies: Vec<_> = zone
        .proxies
        .iter()
        .map(|p| json!({"name": p.name, "address": p.address}))
        .collect();
    let gateways: Vec<_> = zone
        .gateways
        .iter()
        .map(|g| fields([("name", json!(g.name)), ("address", json!(g.address))]))
        .collect();
    let drain = zone.drain.as_ref().map(|drain| {
        fields([
            ("startTime", json!(drain.start_time.map(|t| t.to_string()))),
            ("step", json!(drain.step)),
            ("interval", duration(drain.interval.as_ref())),
            ("expireTime", json!(drain.expire_time.map(|t| t.to_string()))),
            ("reason", json!(drain.reason)),
        ])
    });
    fields([
        ("proxies", json!(proxies)),
        ("failover", json!(zone.failover)),
        ("transport", json!(word(words::TRANSPORT, zone.transport))),
        (
            "transportWithin",
            json!(word(words::TRANSPORT, zone.transport_within)),
        ),
        ("labels", labels(&zone.labels)),
        ("drain", json!(drain)),
        ("gateways", json!(gateways)),
        (
            "directCallers",
            json!(word(words::DIRECT_CALLERS, zone.direct_callers)),
        ),
        ("imports", json!(zone.imports)),
        ("capture", json!(zone.capture.as_ref().map(capture))),
    ])
}

fn capture(capture: &v1::Capture) -> Value {
    let unknown = word(words::UNKNOWN_DESTINATION, capture.unknown);
    fields([
        ("unknown", json!(unknown)),
        ("detectTimeout", duration(capture.detect_timeout.as_ref())),
        ("idleTimeout", duration(capture.idle_timeout.as_ref())),
    ])
}

fn tcp(tcp: &v1::TcpSettings) -> Value {
    fields([
        ("idleTimeout", duration(tcp.idle_timeout.as_ref())),
        ("maxConnectAttempts", json!(tcp.max_connect_attempts)),
    ])
}

fn service(service: &v1::Service) -> Value {
    let endpoints: Vec<_> = service
        .endpoints
        .iter()
        .map(|e| {
            fields([
                ("address", json!(e.address)),
                ("zone", json!(e.zone)),
                ("proxy", json!(e.proxy)),
                ("weight", json!(e.weight)),
                ("labels", labels(&e.labels)),
            ])
        })
        .collect();
    fields([
        ("protocol", json!(word(words::PROTOCOL, service.protocol))),
        ("endpoints", json!(endpoints)),
        ("connectTimeout", duration(service.connect_timeout.as_ref())),
        (
            "outlierDetection",
            json!(service.outlier_detection.as_ref().map(resilience::outlier)),
        ),
        (
            "connectionPool",
            json!(service.connection_pool.as_ref().map(resilience::pool)),
        ),
        (
            "loadBalancer",
            json!(service.load_balancer.as_ref().map(resilience::load_balancer)),
        ),
        (
            "healthCheck",
            json!(service.health_check.as_ref().map(resilience::health_check)),
        ),
        ("resilience", json!(service.resilience)),
        ("hold", json!(service.hold.as_ref().map(resilience::hold))),
        ("exportTo", json!(service.export_to)),
        ("addresses", json!(service.addresses)),
        ("serverNames", json!(service.server_names)),
        ("tcp", json!(service.tcp.as_ref().map(tcp))),
    ])
}

/// Sets a field of which 0 or false says something.
fn said(object: &mut Value, field: &str, value: Option<impl Into<Value>>) {
    if let (Value::Object(object), Some(value)) = (object, value) {
        object.insert(field.to_owned(), value.into());
    }
}

fn route(route: &v1::Route) -> Value {
    let rules: Vec<_> = route
        .rules
        .iter()
        .map(|r| {
            let backends: Vec<_> = r
                .backend_refs
                .iter()
                .map(|b| {
                    let mut backend = fields([
                        ("service", json!(b.service)),
                        ("subset", labels(&b.subset)),
                        ("when", degradation::condition(b.when.as_ref())),
                    ]);
                    said(&mut backend, "weight", b.weight);
                    backend
                })
                .collect();
            fields([
                (
                    "matches",
                    json!(r.matches.iter().map(route_match).collect::<Vec<_>>()),
                ),
                ("backendRefs", json!(backends)),
                ("timeouts", json!(r.timeouts.as_ref().map(timeouts))),
                ("retry", json!(r.retry.as_ref().map(resilience::retry))),
                ("fallback", json!(r.fallback)),
                (
                    "circuitBreaker",
                    json!(r.circuit_breaker.as_ref().map(resilience::circuit_breaker)),
                ),
                (
                    "rateLimits",
                    json!(
                        r.rate_limits
                            .iter()
                            .map(resilience::rate_limit)
                            .collect::<Vec<_>>()
                    ),
                ),
                ("priority", json!(r.priority.as_ref().map(resilience::priority))),
                ("when", degradation::condition(r.when.as_ref())),
                ("enabled", degradation::condition(r.enabled.as_ref())),
                ("cache", json!(r.cache.as_ref().map(degradation::cache))),
                ("fault", json!(r.fault.as_ref().map(degradation::fault))),
                (
                    "filters",
                    json!(r.filters.iter().map(plugin::filter).collect::<Vec<_>>()),
                ),
                ("router", json!(r.router.as_ref().map(plugin::router))),
            ])
        })
        .collect();
    let parents: Vec<_> = route.parent_refs.iter().map(gateway::parent).collect();
    fields([
        ("hostnames", json!(route.hostnames)),
        ("rules", json!(rules)),
        ("parentRefs", json!(parents)),
    ])
}

fn timeouts(timeouts: &v1::RouteTimeouts) -> Value {
    fields([
        ("request", duration(timeouts.request.as_ref())),
        ("backendRequest", duration(timeouts.backend_request.as_ref())),
        ("idle", duration(timeouts.idle.as_ref())),
    ])
}

fn route_match(on: &v1::RouteMatch) -> Value {
    let path = on
        .path
        .as_ref()
        .and_then(|p| p.kind.as_ref())
        .map(|kind| match kind {
            v1::path_match::Kind::Exact(path) => json!({"exact": path}),
            v1::path_match::Kind::Prefix(path) => json!({"prefix": path}),
        });
    let headers: Vec<_> = on
        .headers
        .iter()
        .map(|h| {
            let mut map = Map::from_iter([("name".to_owned(), json!(h.name))]);
            match &h.kind {
                None => {}
                Some(v1::header_match::Kind::Exact(value)) => {
                    map.insert("exact".to_owned(), json!(value));
                }
                Some(v1::header_match::Kind::Prefix(value)) => {
                    map.insert("prefix".to_owned(), json!(value));
                }
                Some(v1::header_match::Kind::Present(value)) => {
                    map.insert("present".to_owned(), json!(value));
                }
            }
            Value::Object(map)
        })
        .collect();
    fields([
        ("path", json!(path)),
        ("method", json!(on.method)),
        ("headers", json!(headers)),
    ])
}

/// Writes a value as block YAML. Texts that could be read as something else are quoted as in JSON, whose
/// strings are YAML's double-quoted ones.
fn emit(out: &mut String, value: &Value, depth: usize) {
    let pad = "  ".repeat(depth);
    // Writing to a String does not fail.
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let key = scalar(&json!(key));
                if inline(value) {
                    let _ = writeln!(out, "{pad}{key}: {}", scalar(value));
                } else {
                    let _ = writeln!(out, "{pad}{key}:");
                    emit(out, value, depth + 1);
                }
            }
        }
        Value::Array(items) => {
            for item in items {
                if inline(item) {
                    let _ = writeln!(out, "{pad}- {}", scalar(item));
                } else {
                    let mut block = String::new();
                    emit(&mut block, item, depth + 1);
                    let rest = block.get(pad.len() + 2..).unwrap_or_default();
                    let _ = write!(out, "{pad}- {rest}");
                }
            }
        }
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) => {
            let _ = writeln!(out, "{pad}{}", scalar(other));
        }
    }
}

fn inline(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    }
}

fn scalar(value: &Value) -> String {
    let Value::String(text) = value else {
        return value.to_string();
    };
    let words = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b))
        && !words.contains(&text.to_lowercase().as_str());
    if plain { text.clone() } else { value.to_string() }
}

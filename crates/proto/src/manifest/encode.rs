//! From wire messages to what people read.

use super::{API_VERSION, duration_text};
use crate::v1;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::time::Duration;

/// A resource as JSON, in the shape of its YAML, with status and times where it has them.
pub fn to_json(resource: &v1::Resource) -> Value {
    let metadata = resource.metadata.clone().unwrap_or_default();
    let labels: std::collections::BTreeMap<_, _> = metadata.labels.into_iter().collect();
    let (kind, spec) = match &resource.spec {
        None => ("", Value::Null),
        Some(v1::resource::Spec::Zone(spec)) => ("Zone", zone(spec)),
        Some(v1::resource::Spec::Service(spec)) => ("Service", service(spec)),
        Some(v1::resource::Spec::Route(spec)) => ("Route", route(spec)),
        Some(v1::resource::Spec::FallbackPolicy(spec)) => ("FallbackPolicy", fallback(spec)),
        Some(v1::resource::Spec::Plugin(spec)) => ("Plugin", plugin(spec)),
    };
    let status = resource.status.as_ref().map(|s| {
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
                ("labels", json!(labels)),
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

/// An object without the fields that say nothing.
fn fields<const N: usize>(entries: [(&str, Value); N]) -> Value {
    let says = |v: &Value| match v {
        Value::Null => false,
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
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

fn zone(zone: &v1::Zone) -> Value {
    let proxies: Vec<_> = zone
        .proxies
        .iter()
        .map(|p| json!({"name": p.name, "address": p.address}))
        .collect();
    fields([("proxies", json!(proxies)), ("failover", json!(zone.failover))])
}

fn service(service: &v1::Service) -> Value {
    let protocol = match service.protocol() {
        v1::Protocol::Unspecified => "",
        v1::Protocol::Http1 => "HTTP1",
        v1::Protocol::Http2 => "HTTP2",
    };
    let endpoints: Vec<_> = service
        .endpoints
        .iter()
        .map(|e| {
            fields([
                ("address", json!(e.address)),
                ("zone", json!(e.zone)),
                ("proxy", json!(e.proxy)),
            ])
        })
        .collect();
    let outlier = service.outlier_detection.as_ref().map(|o| {
        fields([
            ("consecutive5xx", json!(o.consecutive_5xx)),
            ("baseEjectionTime", duration(o.base_ejection_time.as_ref())),
            ("maxEjectionTime", duration(o.max_ejection_time.as_ref())),
        ])
    });
    let pool = service.connection_pool.as_ref().map(|p| {
        let mut pool = fields([
            ("maxRequests", json!(p.max_requests)),
            ("idleTimeout", duration(p.idle_timeout.as_ref())),
        ]);
        said(&mut pool, "maxIdlePerEndpoint", p.max_idle_per_endpoint);
        pool
    });
    fields([
        ("protocol", json!(protocol)),
        ("endpoints", json!(endpoints)),
        ("connectTimeout", duration(service.connect_timeout.as_ref())),
        ("outlierDetection", json!(outlier)),
        ("connectionPool", json!(pool)),
    ])
}

/// Sets a field whose 0 says something.
fn said(object: &mut Value, field: &str, value: Option<u32>) {
    if let (Value::Object(object), Some(value)) = (object, value) {
        object.insert(field.to_owned(), json!(value));
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
                    let mut backend = fields([("service", json!(b.service))]);
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
                (
                    "timeouts",
                    json!(
                        r.timeouts
                            .as_ref()
                            .map(|t| fields([("request", duration(t.request.as_ref()))]))
                    ),
                ),
                (
                    "retry",
                    json!(
                        r.retry
                            .as_ref()
                            .map(|t| fields([("maxAttempts", json!(t.max_attempts))]))
                    ),
                ),
                ("fallback", json!(r.fallback)),
            ])
        })
        .collect();
    fields([("hostnames", json!(route.hostnames)), ("rules", json!(rules))])
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

fn fallback(policy: &v1::FallbackPolicy) -> Value {
    let on: Vec<_> = policy
        .on
        .iter()
        .filter_map(|cause| match v1::Cause::try_from(*cause).ok()? {
            v1::Cause::ConnectFailure => Some("ConnectFailure"),
            v1::Cause::Timeout => Some("Timeout"),
            v1::Cause::Reset => Some("Reset"),
            v1::Cause::NoEndpoint => Some("NoEndpoint"),
            v1::Cause::Overflow => Some("Overflow"),
            v1::Cause::UpstreamStatus | v1::Cause::Unspecified => None,
        })
        .collect();
    let rungs: Vec<_> = policy
        .rungs
        .iter()
        .map(|rung| match &rung.kind {
            None => json!({}),
            Some(v1::rung::Kind::Plugin(r)) => {
                json!({"plugin": fields([("plugin", json!(r.plugin)), ("config", json!(r.config))])})
            }
            Some(v1::rung::Kind::Service(r)) => json!({"service": {"service": r.service}}),
            Some(v1::rung::Kind::Static(r)) => {
                let headers: Vec<_> =
                    r.headers.iter().map(|h| json!({"name": h.name, "value": h.value})).collect();
                json!({"static": fields([("status", json!(r.status)), ("headers", json!(headers)), ("body", json!(r.body))])})
            }
        })
        .collect();
    fields([
        ("on", json!(on)),
        ("onStatuses", json!(policy.on_statuses)),
        ("rungs", json!(rungs)),
        ("hideHeader", json!(policy.hide_header)),
    ])
}

fn plugin(plugin: &v1::Plugin) -> Value {
    let kind = match plugin.kind() {
        v1::PluginKind::Unspecified => "",
        v1::PluginKind::Fallback => "Fallback",
    };
    let on_fault = match plugin.on_fault() {
        v1::OnFault::Unspecified => "",
        v1::OnFault::NextRung => "NextRung",
        v1::OnFault::Fail => "Fail",
    };
    let source = plugin
        .source
        .as_ref()
        .map(|s| fields([("file", json!(s.file)), ("sha256", json!(s.sha256))]));
    let limits = plugin.limits.as_ref().map(|l| {
        fields([
            ("memory", json!(l.memory_bytes)),
            ("callTimeout", duration(l.call_timeout.as_ref())),
            ("maxInstances", json!(l.max_instances)),
            ("maxBody", json!(l.max_body_bytes)),
        ])
    });
    fields([
        ("kind", json!(kind)),
        ("source", json!(source)),
        ("limits", json!(limits)),
        ("onFault", json!(on_fault)),
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

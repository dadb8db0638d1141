//! From wire messages to policy: everything is checked here, once.

use crate::field::{BadField, Fields};
use crate::v1;
use leeward_policy::model::{
    Backend, Cause, ConnectionPool, Endpoint, FallbackPolicy, HeaderMatch, HostMatch, OnFault,
    OutlierDetection, PathMatch, Plugin, PluginKind, Protocol, Route, RouteMatch, RouteRule, Rung, Service,
    StaticAnswer, ValueMatch, Zone, ZoneProxy,
};
use leeward_policy::{Key, Kind, Name, Resource, Spec, may_be_in_an_answer};
use std::sync::Arc;
use std::time::Duration;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
const KIB: usize = 1 << 10;

/// Checks a resource.
///
/// # Errors
///
/// Every bad field, with its path.
pub fn parse(wire: &v1::Resource) -> Result<Resource, Vec<BadField>> {
    let mut f = Fields::default();
    let empty = v1::Metadata::default();
    let metadata = wire.metadata.as_ref().unwrap_or(&empty);
    let name = f.name("metadata.name", &metadata.name);
    f.count("metadata.labels", metadata.labels.len(), 0..=64);
    for (key, value) in &metadata.labels {
        if key.is_empty() || key.len() > 63 || value.len() > 63 {
            f.reject::<()>(
                format!("metadata.labels.{}", key.chars().take(63).collect::<String>()),
                "has a key or value that is too long; want keys of 1 to 63 bytes and values of up to 63",
            );
        }
    }
    let spec = match &wire.spec {
        None => f.reject(
            "spec",
            "is missing; want the spec of a Zone, Service, Route, FallbackPolicy or Plugin",
        ),
        Some(v1::resource::Spec::Zone(spec)) => zone(&mut f, spec, name.as_ref()).map(Spec::Zone),
        Some(v1::resource::Spec::Service(spec)) => service(&mut f, spec).map(Spec::Service),
        Some(v1::resource::Spec::Route(spec)) => route(&mut f, spec).map(Spec::Route),
        Some(v1::resource::Spec::FallbackPolicy(spec)) => fallback(&mut f, spec).map(Spec::FallbackPolicy),
        Some(v1::resource::Spec::Plugin(spec)) => plugin(&mut f, spec).map(Spec::Plugin),
    };
    let labels = metadata
        .labels
        .iter()
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    let resource = name.zip(spec).map(|(name, spec)| Resource {
        name,
        revision: metadata.revision,
        labels,
        spec,
    });
    f.finish(resource)
}

/// Checks the name of a resource.
///
/// # Errors
///
/// The field that is bad.
pub fn parse_key(wire: &v1::ResourceRef) -> Result<Key, BadField> {
    let bad = |path: &str, reason: String| BadField {
        path: path.to_owned(),
        reason,
    };
    let kind = kind_of(wire.kind()).ok_or_else(|| {
        bad(
            "kind",
            "is missing; want ZONE, SERVICE, ROUTE, FALLBACK_POLICY or PLUGIN".to_owned(),
        )
    })?;
    let name = Name::parse(&wire.name).map_err(|e| bad("name", format!("{:?} {e}", wire.name)))?;
    Ok(Key { kind, name })
}

/// The kind that a wire value names; `None` for none.
pub fn kind_of(wire: v1::Kind) -> Option<Kind> {
    match wire {
        v1::Kind::Unspecified => None,
        v1::Kind::Zone => Some(Kind::Zone),
        v1::Kind::Service => Some(Kind::Service),
        v1::Kind::Route => Some(Kind::Route),
        v1::Kind::FallbackPolicy => Some(Kind::FallbackPolicy),
        v1::Kind::Plugin => Some(Kind::Plugin),
    }
}

fn zone(f: &mut Fields, wire: &v1::Zone, own: Option<&Name>) -> Option<Zone> {
    f.count("spec.proxies", wire.proxies.len(), 0..=4096);
    let mut proxies = Vec::new();
    for (i, proxy) in wire.proxies.iter().enumerate() {
        let name = f.name(&format!("spec.proxies[{i}].name"), &proxy.name);
        let address = f.address(&format!("spec.proxies[{i}].address"), &proxy.address);
        proxies.extend(
            name.zip(address)
                .map(|(name, address)| ZoneProxy { name, address }),
        );
    }
    let names: Vec<_> = wire.proxies.iter().map(|p| p.name.as_str()).collect();
    f.unique("spec.proxies", ".name", &names);
    f.count("spec.failover", wire.failover.len(), 0..=4096);
    let mut failover = Vec::new();
    for (i, zone) in wire.failover.iter().enumerate() {
        let path = format!("spec.failover[{i}]");
        let zone = f.name(&path, zone);
        if zone.is_some() && zone.as_ref() == own {
            f.reject::<()>(path, "is the zone itself; want other zones");
        }
        failover.extend(zone);
    }
    f.unique("spec.failover", "", &wire.failover);
    Some(Zone { proxies, failover })
}

fn service(f: &mut Fields, wire: &v1::Service) -> Option<Service> {
    let protocol = match v1::Protocol::try_from(wire.protocol) {
        Ok(v1::Protocol::Unspecified | v1::Protocol::Http1) => Some(Protocol::Http1),
        Ok(v1::Protocol::Http2) => Some(Protocol::Http2),
        Err(_) => f.reject(
            "spec.protocol",
            format!("{} is not known; want HTTP1 or HTTP2", wire.protocol),
        ),
    };
    f.count("spec.endpoints", wire.endpoints.len(), 0..=4096);
    let mut endpoints = Vec::new();
    for (i, endpoint) in wire.endpoints.iter().enumerate() {
        let path = format!("spec.endpoints[{i}]");
        let address = f.address(&format!("{path}.address"), &endpoint.address);
        let zone = f.name(&format!("{path}.zone"), &endpoint.zone);
        let proxy = f.optional_name(&format!("{path}.proxy"), &endpoint.proxy);
        endpoints.extend(
            address
                .zip(zone)
                .map(|(address, zone)| Endpoint { address, zone, proxy }),
        );
    }
    let places: Vec<_> = wire
        .endpoints
        .iter()
        .map(|e| format!("{} in zone {} behind {:?}", e.address, e.zone, e.proxy))
        .collect();
    f.unique("spec.endpoints", "", &places);
    let connect_timeout = f.duration(
        "spec.connectTimeout",
        wire.connect_timeout.as_ref(),
        SECOND,
        MS..=60 * SECOND,
    );
    Some(Service {
        protocol: protocol?,
        endpoints,
        connect_timeout,
        outlier: outlier(f, wire.outlier_detection.as_ref()),
        pool: pool(f, wire.connection_pool.as_ref()),
    })
}

fn outlier(f: &mut Fields, wire: Option<&v1::OutlierDetection>) -> OutlierDetection {
    let default = OutlierDetection::DEFAULT;
    let Some(wire) = wire else { return default };
    let at = "spec.outlierDetection";
    let base = f.duration(
        &format!("{at}.baseEjectionTime"),
        wire.base_ejection_time.as_ref(),
        default.base_ejection_time,
        10 * MS..=HOUR,
    );
    let longest = f.duration(
        &format!("{at}.maxEjectionTime"),
        wire.max_ejection_time.as_ref(),
        default.max_ejection_time.max(base),
        base.min(24 * HOUR)..=24 * HOUR,
    );
    OutlierDetection {
        consecutive_5xx: f.small(
            &format!("{at}.consecutive5xx"),
            wire.consecutive_5xx,
            default.consecutive_5xx,
            1..=1000,
        ),
        base_ejection_time: base,
        max_ejection_time: longest,
    }
}

fn pool(f: &mut Fields, wire: Option<&v1::ConnectionPool>) -> ConnectionPool {
    let default = ConnectionPool::DEFAULT;
    let Some(wire) = wire else { return default };
    let at = "spec.connectionPool";
    ConnectionPool {
        max_requests: f.small(
            &format!("{at}.maxRequests"),
            wire.max_requests,
            default.max_requests,
            1..=1_000_000,
        ),
        max_idle_per_endpoint: match wire.max_idle_per_endpoint {
            None => default.max_idle_per_endpoint,
            Some(n) => f.small(&format!("{at}.maxIdlePerEndpoint"), n, n, 0..=10_000),
        },
        idle_timeout: f.duration(
            &format!("{at}.idleTimeout"),
            wire.idle_timeout.as_ref(),
            default.idle_timeout,
            SECOND..=HOUR,
        ),
    }
}

fn route(f: &mut Fields, wire: &v1::Route) -> Option<Route> {
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
    Some(Route { hostnames, rules })
}

fn hostname(f: &mut Fields, path: &str, text: &str) -> Option<HostMatch> {
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
    let label_ok = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_host = labels.len() <= 253 && labels.split('.').all(label_ok);
    match (wild, address, is_host) {
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
        let weight = f.number(
            &format!("{at}.weight"),
            backend.weight.unwrap_or(1).into(),
            1,
            0..=1_000_000,
        );
        let weight = u32::try_from(weight).unwrap_or(u32::MAX);
        backends.extend(service.map(|service| Backend { service, weight }));
    }
    if !wire.backend_refs.is_empty() && wire.backend_refs.iter().all(|b| b.weight == Some(0)) {
        f.reject::<()>(
            format!("{path}.backendRefs"),
            "all have weight 0; want one above 0 at least",
        );
    }
    let timeout = wire.timeouts.as_ref().and_then(|t| t.request.as_ref());
    let zero = timeout.is_some_and(|t| t.seconds == 0 && t.nanos == 0);
    let request_timeout = if zero {
        None
    } else {
        Some(f.duration(
            &format!("{path}.timeouts.request"),
            timeout,
            15 * SECOND,
            MS..=HOUR,
        ))
    };
    let attempts = wire.retry.as_ref().map_or(0, |r| r.max_attempts);
    let max_attempts = f.small(&format!("{path}.retry.maxAttempts"), attempts, 3, 1..=10);
    let fallback = f.optional_name(&format!("{path}.fallback"), &wire.fallback);
    Some(RouteRule {
        matches,
        backends,
        request_timeout,
        max_attempts: u8::try_from(max_attempts).unwrap_or(u8::MAX),
        fallback,
    })
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
    let method = match wire.method.as_str() {
        "" => None,
        text if is_token(text) && !text.bytes().any(|b| b.is_ascii_lowercase()) => Some(Box::from(text)),
        text => f.reject(
            format!("{path}.method"),
            format!("{text:?} is not a method; want upper case, such as GET"),
        ),
    };
    f.count(&format!("{path}.headers"), wire.headers.len(), 0..=16);
    let mut headers = Vec::new();
    for (i, header) in wire.headers.iter().enumerate() {
        headers.extend(header_match(f, &format!("{path}.headers[{i}]"), header));
    }
    Some(RouteMatch {
        path: path_match?,
        method,
        headers,
    })
}

fn path_text<'a>(f: &mut Fields, path: &str, text: &'a str) -> Option<&'a str> {
    let plain = |b: u8| b.is_ascii_graphic() && b != b'?' && b != b'#';
    if text.starts_with('/') && text.len() <= 4096 && text.bytes().all(plain) {
        return Some(text);
    }
    f.reject(path, format!("{text:?} is not a path; want one that begins with '/', of at most 4096 bytes, without query and spaces"))
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

fn header_name(f: &mut Fields, path: &str, text: &str) -> Option<Box<str>> {
    if is_token(text) && text.len() <= 256 {
        return Some(text.to_ascii_lowercase().into());
    }
    f.reject(
        path,
        format!("{text:?} is not a header name; want one such as x-user"),
    )
}

fn header_value<'a>(f: &mut Fields, path: &str, text: &'a str) -> Option<&'a str> {
    let visible = |b: u8| (b' '..=b'~').contains(&b) || b == b'\t' || b >= 0x80;
    if text.len() <= 8 * KIB && text.bytes().all(visible) && text.trim() == text {
        return Some(text);
    }
    f.reject(path, "is not a header value; want at most 8 KiB with no line breaks, no control characters and no spaces at its ends")
}

/// RFC 9110 §5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn fallback(f: &mut Fields, wire: &v1::FallbackPolicy) -> Option<FallbackPolicy> {
    let mut on = Vec::new();
    for (i, cause) in wire.on.iter().enumerate() {
        let path = format!("spec.on[{i}]");
        let cause = match v1::Cause::try_from(*cause) {
            Ok(v1::Cause::ConnectFailure) => Some(Cause::ConnectFailure),
            Ok(v1::Cause::Timeout) => Some(Cause::Timeout),
            Ok(v1::Cause::Reset) => Some(Cause::Reset),
            Ok(v1::Cause::NoEndpoint) => Some(Cause::NoEndpoint),
            Ok(v1::Cause::Overflow) => Some(Cause::Overflow),
            Ok(v1::Cause::UpstreamStatus) => f.reject(
                path,
                "UpstreamStatus is set by onStatuses; list the statuses there",
            ),
            Ok(v1::Cause::Unspecified) | Err(_) => f.reject(
                path,
                format!("{cause} is not known; want ConnectFailure, Timeout, Reset, NoEndpoint or Overflow"),
            ),
        };
        match cause {
            Some(cause) if on.contains(&cause) => {
                f.reject::<()>(
                    format!("spec.on[{i}]"),
                    "stands twice; each cause must stand once",
                );
            }
            cause => on.extend(cause),
        }
    }
    if wire.on.is_empty() {
        on.extend(Cause::DEFAULT);
    }
    f.count("spec.onStatuses", wire.on_statuses.len(), 0..=64);
    let mut on_statuses = Vec::new();
    for (i, status) in wire.on_statuses.iter().enumerate() {
        match u16::try_from(*status) {
            Ok(status @ 400..=599) => on_statuses.push(status),
            Ok(_) | Err(_) => {
                f.reject::<()>(
                    format!("spec.onStatuses[{i}]"),
                    format!("{status} is out of range; want 400 to 599"),
                );
            }
        }
    }
    on_statuses.sort_unstable();
    on_statuses.dedup();
    f.count("spec.rungs", wire.rungs.len(), 1..=16);
    let mut rungs = Vec::new();
    for (i, rung) in wire.rungs.iter().enumerate() {
        rungs.extend(parse_rung(f, &format!("spec.rungs[{i}]"), rung));
    }
    Some(FallbackPolicy {
        on,
        on_statuses,
        rungs,
        hide_header: wire.hide_header,
    })
}

fn parse_rung(f: &mut Fields, path: &str, wire: &v1::Rung) -> Option<Rung> {
    match &wire.kind {
        None => f.reject(path, "is empty; want one of plugin, static, service"),
        Some(v1::rung::Kind::Plugin(rung)) => {
            let plugin = f.name(&format!("{path}.plugin.plugin"), &rung.plugin);
            if rung.config.len() > 64 * KIB {
                f.reject::<()>(
                    format!("{path}.plugin.config"),
                    format!("is {} bytes long; want at most 65536", rung.config.len()),
                );
            }
            Some(Rung::Plugin {
                plugin: plugin?,
                config: Arc::from(rung.config.as_str()),
            })
        }
        Some(v1::rung::Kind::Static(rung)) => static_answer(f, &format!("{path}.static"), rung),
        Some(v1::rung::Kind::Service(rung)) => f
            .name(&format!("{path}.service.service"), &rung.service)
            .map(|service| Rung::Service { service }),
    }
}

fn static_answer(f: &mut Fields, path: &str, wire: &v1::StaticRung) -> Option<Rung> {
    let status = f.small(&format!("{path}.status"), wire.status, 0, 200..=599);
    f.count(&format!("{path}.headers"), wire.headers.len(), 0..=64);
    let mut headers = Vec::new();
    for (i, header) in wire.headers.iter().enumerate() {
        let at = format!("{path}.headers[{i}]");
        let name = header_name(f, &format!("{at}.name"), &header.name);
        let value = header_value(f, &format!("{at}.value"), &header.value);
        if let Some(name) = &name
            && !may_be_in_an_answer(name)
        {
            f.reject::<()>(
                format!("{at}.name"),
                format!("{name} is set by the proxy; leave it out"),
            );
        }
        headers.extend(name.zip(value.map(Box::from)));
    }
    if wire.body.len() > 64 * KIB {
        f.reject::<()>(
            format!("{path}.body"),
            format!("is {} bytes long; want at most 65536", wire.body.len()),
        );
    }
    Some(Rung::Static(Arc::new(StaticAnswer {
        status: u16::try_from(status).unwrap_or(0),
        headers,
        body: wire.body.as_str().into(),
    })))
}

fn plugin(f: &mut Fields, wire: &v1::Plugin) -> Option<Plugin> {
    let kind = match v1::PluginKind::try_from(wire.kind) {
        Ok(v1::PluginKind::Fallback) => Some(PluginKind::Fallback),
        Ok(v1::PluginKind::Unspecified) => f.reject("spec.kind", "is missing; want Fallback"),
        Err(_) => f.reject("spec.kind", format!("{} is not known; want Fallback", wire.kind)),
    };
    let (file, sha256) = wire
        .source
        .as_ref()
        .map(|s| (s.file.as_str(), s.sha256.as_str()))
        .unwrap_or_default();
    if !file.starts_with('/') || file.len() > 4096 || file.contains('\0') {
        f.reject::<()>(
            "spec.source.file",
            format!("{file:?} is not an absolute path, such as /etc/leeward/p.wasm"),
        );
    }
    let sha256 = match sha256 {
        "" => None,
        text => match from_hex(text) {
            Some(digest) => Some(digest),
            None => f.reject(
                "spec.source.sha256",
                format!("{text:?} is not a SHA-256; want 64 hex digits"),
            ),
        },
    };
    let limits = wire.limits.unwrap_or_default();
    let on_fault = match v1::OnFault::try_from(wire.on_fault) {
        Ok(v1::OnFault::NextRung) => Some(OnFault::NextRung),
        Ok(v1::OnFault::Fail) => Some(OnFault::Fail),
        Ok(v1::OnFault::Unspecified) | Err(_) => f.reject(
            "spec.onFault",
            "is missing; say whether a fault of the plugin means NextRung or Fail",
        ),
    };
    Some(Plugin {
        kind: kind?,
        file: file.into(),
        sha256,
        memory_bytes: f.number(
            "spec.limits.memory",
            limits.memory_bytes,
            16 << 20,
            64 << 10..=256 << 20,
        ),
        call_timeout: f.duration(
            "spec.limits.callTimeout",
            limits.call_timeout.as_ref(),
            50 * MS,
            MS..=10 * SECOND,
        ),
        max_instances: f.small("spec.limits.maxInstances", limits.max_instances, 8, 1..=256),
        max_body_bytes: f.number("spec.limits.maxBody", limits.max_body_bytes, 0, 0..=1 << 20),
        on_fault: on_fault?,
    })
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0u8; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    // from_str_radix takes a sign, which hex digits don't have.
    text.bytes().all(|b| b.is_ascii_hexdigit()).then_some(out)
}

//! From wire messages to policy: everything is checked here, once.

mod resilience;
mod route;
mod service;
mod text;

use crate::field::{BadField, Fields};
use crate::v1;
use leeward_policy::model::{
    Cause, FallbackPolicy, OnFault, Plugin, PluginKind, Rung, StaticAnswer, Zone, ZoneProxy,
};
use leeward_policy::{Key, Kind, Name, Resource, Spec, may_be_in_an_answer};
use resilience::{circuit_override, resilience_policy};
use route::route;
use service::service;
use std::sync::Arc;
use std::time::Duration;
use text::{header_name, header_value};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
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
        f.label("metadata.labels", key, value);
    }
    let spec = match &wire.spec {
        None => f.reject(
            "spec",
            "is missing; want the spec of a Zone, Service, Route, FallbackPolicy, Plugin, ResiliencePolicy or CircuitOverride",
        ),
        Some(v1::resource::Spec::Zone(spec)) => zone(&mut f, spec, name.as_ref()).map(Spec::Zone),
        Some(v1::resource::Spec::Service(spec)) => service(&mut f, spec).map(Spec::Service),
        Some(v1::resource::Spec::Route(spec)) => route(&mut f, spec).map(Spec::Route),
        Some(v1::resource::Spec::FallbackPolicy(spec)) => fallback(&mut f, spec).map(Spec::FallbackPolicy),
        Some(v1::resource::Spec::Plugin(spec)) => plugin(&mut f, spec).map(Spec::Plugin),
        Some(v1::resource::Spec::ResiliencePolicy(spec)) => {
            Some(Spec::ResiliencePolicy(resilience_policy(&mut f, spec)))
        }
        Some(v1::resource::Spec::CircuitOverride(spec)) => {
            circuit_override(&mut f, spec).map(Spec::CircuitOverride)
        }
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
            "is missing; want ZONE, SERVICE, ROUTE, FALLBACK_POLICY, PLUGIN, RESILIENCE_POLICY or CIRCUIT_OVERRIDE"
                .to_owned(),
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
        v1::Kind::ResiliencePolicy => Some(Kind::ResiliencePolicy),
        v1::Kind::CircuitOverride => Some(Kind::CircuitOverride),
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
            Ok(v1::Cause::CircuitOpen) => Some(Cause::CircuitOpen),
            Ok(v1::Cause::Overloaded) => Some(Cause::Overloaded),
            Ok(v1::Cause::RateLimited) => Some(Cause::RateLimited),
            Ok(v1::Cause::UpstreamStatus) => f.reject(
                path,
                "UpstreamStatus is set by onStatuses; list the statuses there",
            ),
            Ok(v1::Cause::Unspecified) | Err(_) => f.reject(
                path,
                format!(
                    "{cause} is not known; want ConnectFailure, Timeout, Reset, NoEndpoint, Overflow, CircuitOpen, Overloaded or RateLimited"
                ),
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
    let on_statuses = f.statuses("spec.onStatuses", &wire.on_statuses, 64, 400..=599);
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

#[cfg(test)]
mod tests;

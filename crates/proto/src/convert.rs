//! From wire messages to policy: everything is checked here, once.

mod access;
mod authorization;
mod backup;
mod between;
mod capture;
mod degradation;
mod drain;
mod fallback;
mod gateway;
mod plugin;
mod queue;
mod resilience;
mod rollout;
mod route;
mod service;
mod text;
mod workload;

use crate::field::{BadField, Fields};
use crate::v1;
use access::access_policy;
use authorization::authorization_policy;
pub use authorization::guards;
use backup::{backup_policy, recovery_objective};
pub(crate) use between::NONE;
use between::{direct_callers, gateways, selection};
use capture::capture;
use degradation::{degradation_override, degradation_policy, feature_flags};
use drain::drain;
use fallback::fallback;
use gateway::gateway;
use leeward_policy::model::{Zone, ZoneProxy, ZoneTransport};
use leeward_policy::{Key, Kind, Name, Resource, Spec};
use plugin::plugin;
use queue::queue;
use resilience::{circuit_override, resilience_policy};
use rollout::rollout_policy;
use route::route;
use service::service;
use std::time::Duration;
use workload::workload;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
const KIB: usize = 1 << 10;
/// Longest name of a manager, in bytes.
pub const MAX_MANAGER: usize = 253;

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
    if metadata.manager.len() > MAX_MANAGER || metadata.manager.contains(char::is_control) {
        f.reject::<()>(
            "metadata.manager",
            "is too long, or has control characters; want up to 253 bytes",
        );
    }
    let spec = match &wire.spec {
        None => f.reject(
            "spec",
            "is missing; want the spec of a Zone, Service, Route, FallbackPolicy, Plugin, ResiliencePolicy, CircuitOverride, FeatureFlags, DegradationPolicy, DegradationOverride, Queue, AuthorizationPolicy, Gateway, RolloutPolicy, AccessPolicy, BackupPolicy, RecoveryObjective or Workload",
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
        Some(v1::resource::Spec::FeatureFlags(spec)) => feature_flags(&mut f, spec).map(Spec::FeatureFlags),
        Some(v1::resource::Spec::DegradationPolicy(spec)) => {
            Some(Spec::DegradationPolicy(degradation_policy(&mut f, spec)))
        }
        Some(v1::resource::Spec::DegradationOverride(spec)) => {
            degradation_override(&mut f, spec).map(Spec::DegradationOverride)
        }
        Some(v1::resource::Spec::Queue(spec)) => Some(Spec::Queue(queue(&mut f, spec))),
        Some(v1::resource::Spec::AuthorizationPolicy(spec)) => {
            authorization_policy(&mut f, spec).map(Spec::AuthorizationPolicy)
        }
        Some(v1::resource::Spec::Gateway(spec)) => Some(Spec::Gateway(gateway(&mut f, spec))),
        Some(v1::resource::Spec::RolloutPolicy(spec)) => {
            rollout_policy(&mut f, spec).map(Spec::RolloutPolicy)
        }
        Some(v1::resource::Spec::AccessPolicy(spec)) => access_policy(&mut f, spec).map(Spec::AccessPolicy),
        Some(v1::resource::Spec::BackupPolicy(spec)) => backup_policy(&mut f, spec).map(Spec::BackupPolicy),
        Some(v1::resource::Spec::RecoveryObjective(spec)) => {
            recovery_objective(&mut f, spec).map(Spec::RecoveryObjective)
        }
        Some(v1::resource::Spec::Workload(spec)) => workload(&mut f, spec).map(Spec::Workload),
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
            "is missing; want ZONE, SERVICE, ROUTE, FALLBACK_POLICY, PLUGIN, RESILIENCE_POLICY, CIRCUIT_OVERRIDE, FEATURE_FLAGS, DEGRADATION_POLICY, DEGRADATION_OVERRIDE, QUEUE, AUTHORIZATION_POLICY, GATEWAY, ROLLOUT_POLICY, ACCESS_POLICY, BACKUP_POLICY, RECOVERY_OBJECTIVE or WORKLOAD"
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
        v1::Kind::FeatureFlags => Some(Kind::FeatureFlags),
        v1::Kind::DegradationPolicy => Some(Kind::DegradationPolicy),
        v1::Kind::DegradationOverride => Some(Kind::DegradationOverride),
        v1::Kind::Queue => Some(Kind::Queue),
        v1::Kind::AuthorizationPolicy => Some(Kind::AuthorizationPolicy),
        v1::Kind::Gateway => Some(Kind::Gateway),
        v1::Kind::RolloutPolicy => Some(Kind::RolloutPolicy),
        v1::Kind::AccessPolicy => Some(Kind::AccessPolicy),
        v1::Kind::BackupPolicy => Some(Kind::BackupPolicy),
        v1::Kind::RecoveryObjective => Some(Kind::RecoveryObjective),
        v1::Kind::Workload => Some(Kind::Workload),
    }
}

/// The kind of a resource's spec; `None` if it has none.
pub fn spec_kind(wire: &v1::Resource) -> Option<Kind> {
    use v1::resource::Spec;
    Some(match wire.spec.as_ref()? {
        Spec::Zone(_) => Kind::Zone,
        Spec::Service(_) => Kind::Service,
        Spec::Route(_) => Kind::Route,
        Spec::FallbackPolicy(_) => Kind::FallbackPolicy,
        Spec::Plugin(_) => Kind::Plugin,
        Spec::ResiliencePolicy(_) => Kind::ResiliencePolicy,
        Spec::CircuitOverride(_) => Kind::CircuitOverride,
        Spec::FeatureFlags(_) => Kind::FeatureFlags,
        Spec::DegradationPolicy(_) => Kind::DegradationPolicy,
        Spec::DegradationOverride(_) => Kind::DegradationOverride,
        Spec::Queue(_) => Kind::Queue,
        Spec::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
        Spec::Gateway(_) => Kind::Gateway,
        Spec::RolloutPolicy(_) => Kind::RolloutPolicy,
        Spec::AccessPolicy(_) => Kind::AccessPolicy,
        Spec::BackupPolicy(_) => Kind::BackupPolicy,
        Spec::RecoveryObjective(_) => Kind::RecoveryObjective,
        Spec::Workload(_) => Kind::Workload,
    })
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
    let labels = f.labels("spec.labels", &wire.labels);
    let drain = wire.drain.as_ref().map(|wire| drain(f, wire));
    let transport = zone_transport(f, "spec.transport", wire.transport, ZoneTransport::Auto);
    let within = zone_transport(
        f,
        "spec.transportWithin",
        wire.transport_within,
        ZoneTransport::Tcp,
    );
    let gateways = gateways(f, &wire.gateways, &names);
    let direct_callers = direct_callers(f, wire);
    let imports = selection(f, "spec.imports", &wire.imports, "services");
    let capture = capture(f, wire.capture.as_ref());
    Some(Zone {
        gateways,
        direct_callers: direct_callers?,
        imports,
        proxies,
        failover,
        transport: transport?,
        transport_within: within?,
        labels,
        drain: match drain {
            None => None,
            Some(drain) => Some(drain?),
        },
        capture: capture?,
    })
}

fn zone_transport(f: &mut Fields, path: &str, wire: i32, default: ZoneTransport) -> Option<ZoneTransport> {
    match v1::ZoneTransport::try_from(wire) {
        Ok(v1::ZoneTransport::Unspecified) => Some(default),
        Ok(v1::ZoneTransport::Auto) => Some(ZoneTransport::Auto),
        Ok(v1::ZoneTransport::Quic) => Some(ZoneTransport::Quic),
        Ok(v1::ZoneTransport::Tcp) => Some(ZoneTransport::Tcp),
        Err(_) => f.reject(path, format!("{wire} is not known; want Auto, Quic or Tcp")),
    }
}

#[cfg(test)]
mod tests;

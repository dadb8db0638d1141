//! What is captured, and what is no HTTP.

use super::route::hostname;
use super::{DAY, MINUTE, MS, SECOND};
use crate::field::{Fields, Section};
use crate::v1;
use leeward_policy::model::{
    BalancePolicy, Capture, CheckKind, HashKey, HostMatch, Protocol, Service, TcpSettings, UnknownDestination,
};
use prost_types::Duration as WireDuration;
use std::net::SocketAddr;
use std::time::Duration;

pub(super) fn capture(f: &mut Fields, wire: Option<&v1::Capture>) -> Option<Capture> {
    let default = Capture::DEFAULT;
    let Some(wire) = wire else { return Some(default) };
    let mut s = f.section("spec.capture");
    let unknown = match v1::UnknownDestination::try_from(wire.unknown) {
        Ok(v1::UnknownDestination::Unspecified) => Some(default.unknown),
        Ok(v1::UnknownDestination::Pass) => Some(UnknownDestination::Pass),
        Ok(v1::UnknownDestination::Refuse) => Some(UnknownDestination::Refuse),
        Err(_) => s.reject(
            "unknown",
            format!("{} is not known; want Pass or Refuse", wire.unknown),
        ),
    };
    let detect_timeout = s.duration(
        "detectTimeout",
        wire.detect_timeout.as_ref(),
        default.detect_timeout,
        10 * MS..=MINUTE,
    );
    let idle_timeout = idle_timeout(&mut s, wire.idle_timeout.as_ref(), default.idle_timeout);
    Some(Capture {
        unknown: unknown?,
        detect_timeout,
        idle_timeout,
    })
}

/// The longest silence of a connection; zero is no limit.
fn idle_timeout(
    s: &mut Section<'_>,
    wire: Option<&WireDuration>,
    default: Option<Duration>,
) -> Option<Duration> {
    let Some(wire) = wire else { return default };
    if wire.seconds == 0 && wire.nanos == 0 {
        return None;
    }
    Some(s.duration("idleTimeout", Some(wire), SECOND, SECOND..=7 * DAY))
}

/// Where workloads call a service that know nothing of the mesh.
pub(super) fn addresses(f: &mut Fields, wire: &[String]) -> Vec<SocketAddr> {
    f.count("spec.addresses", wire.len(), 0..=256);
    let mut addresses = Vec::new();
    for (i, text) in wire.iter().enumerate() {
        addresses.extend(f.address(&format!("spec.addresses[{i}]"), text));
    }
    f.unique("spec.addresses", "", &addresses);
    addresses
}

/// What TLS clients call a service.
pub(super) fn server_names(f: &mut Fields, wire: &[String], protocol: Option<Protocol>) -> Vec<HostMatch> {
    if !wire.is_empty() && protocol != Some(Protocol::Tcp) {
        f.reject::<()>(
            "spec.serverNames",
            "is only for protocol TCP; requests are told apart by the hostnames of Routes",
        );
    }
    f.count("spec.serverNames", wire.len(), 0..=64);
    let mut names = Vec::new();
    for (i, text) in wire.iter().enumerate() {
        let path = format!("spec.serverNames[{i}]");
        match hostname(f, &path, text) {
            Some(HostMatch::Any) => {
                f.reject::<()>(path, "is every name; want a host, or *.SUFFIX");
            }
            Some(name) => names.push(name),
            None => {}
        }
    }
    f.unique("spec.serverNames", "", wire);
    names
}

pub(super) fn tcp(f: &mut Fields, wire: Option<&v1::TcpSettings>, protocol: Option<Protocol>) -> TcpSettings {
    let default = TcpSettings::DEFAULT;
    let Some(wire) = wire else { return default };
    let mut s = f.section("spec.tcp");
    if protocol != Some(Protocol::Tcp) {
        s.reject_here::<()>("is only for protocol TCP; leave it out, or change the protocol");
    }
    let idle_timeout = idle_timeout(&mut s, wire.idle_timeout.as_ref(), default.idle_timeout);
    let attempts = s.small(
        "maxConnectAttempts",
        wire.max_connect_attempts,
        default.max_connect_attempts.into(),
        1..=10,
    );
    TcpSettings {
        idle_timeout,
        max_connect_attempts: u8::try_from(attempts).unwrap_or(default.max_connect_attempts),
    }
}

/// What only requests have is nothing to go by where there are only bytes.
pub(super) fn check_bytes(f: &mut Fields, service: &Service) {
    if service.protocol != Protocol::Tcp {
        return;
    }
    if let BalancePolicy::RingHash { key, .. } | BalancePolicy::Maglev { key, .. } = &service.balance.policy
        && *key != HashKey::Source
    {
        f.reject::<()>(
            "spec.loadBalancer.hashKey",
            "is of requests, of which a TCP service has none; want source",
        );
    }
    let kind = service.health_check.as_ref().map(|check| &check.kind);
    if let Some(CheckKind::Http { .. } | CheckKind::Grpc { .. }) = kind {
        f.reject::<()>(
            "spec.healthCheck",
            "asks in HTTP, which a TCP service doesn't speak; want tcp",
        );
    }
    let caller = service.pool.per_caller.as_ref();
    if caller.is_some_and(|bounds| bounds.header.is_some()) {
        f.reject::<()>(
            "spec.connectionPool.perCaller.header",
            "is of requests, of which a TCP service has none; leave it out to tell callers apart by identity or address",
        );
    }
}

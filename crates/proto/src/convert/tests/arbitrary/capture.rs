//! Of what is captured, and of what is no HTTP.

use super::{HOUR, MINUTE, SECOND, limit, within};
use leeward_policy::model::{
    BalancePolicy, Capture, CheckKind, HashKey, HostMatch, Protocol, Service, TcpSettings, UnknownDestination,
};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use proptest::sample::select;
use std::net::SocketAddr;

pub(super) fn capture() -> impl Strategy<Value = Capture> {
    let unknown = select(vec![UnknownDestination::Pass, UnknownDestination::Refuse]);
    let parts = (unknown, within(10, MINUTE), limit(SECOND, 168 * HOUR));
    parts.prop_map(|(unknown, detect_timeout, idle_timeout)| Capture {
        unknown,
        detect_timeout,
        idle_timeout,
    })
}

/// What a service speaks, and by what it is called.
pub(super) fn spoken() -> impl Strategy<Value = (Protocol, Vec<SocketAddr>, Vec<HostMatch>, TcpSettings)> {
    let addresses = btree_set((any::<[u8; 4]>(), 1..=u16::MAX).prop_map(SocketAddr::from), 0..4);
    let name = prop_oneof![
        "[a-z]{1,9}\\.example".prop_map(|name| HostMatch::Exact(name.into())),
        "\\.[a-z]{1,9}\\.example".prop_map(|name| HostMatch::Suffix(name.into())),
    ];
    let tcp = (limit(SECOND, 168 * HOUR), 1..=10u8);
    let tcp = tcp.prop_map(|(idle_timeout, max_connect_attempts)| TcpSettings {
        idle_timeout,
        max_connect_attempts,
    });
    let protocol = select(vec![Protocol::Http1, Protocol::Http2, Protocol::Tcp]);
    let parts = (protocol, addresses, vec(name, 0..4), tcp);
    parts.prop_map(|(protocol, addresses, mut names, tcp)| {
        names.sort_by_key(|name| format!("{name:?}"));
        names.dedup();
        (protocol, addresses.into_iter().collect(), names, tcp)
    })
}

/// Without what its protocol can't have.
pub(super) fn sensible(mut service: Service) -> Service {
    if service.protocol != Protocol::Tcp {
        service.server_names.clear();
        service.tcp = TcpSettings::DEFAULT;
        return service;
    }
    if let BalancePolicy::RingHash { key, .. } | BalancePolicy::Maglev { key, .. } =
        &mut service.balance.policy
    {
        *key = HashKey::Source;
    }
    if let Some(check) = &mut service.health_check {
        check.kind = CheckKind::Tcp;
    }
    if let Some(bounds) = &mut service.pool.per_caller {
        bounds.header = None;
    }
    service
}

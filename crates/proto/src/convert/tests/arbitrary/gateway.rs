//! Gateways, at random.

use super::degradation::names;
use super::{HOUR, MINUTE, SECOND, name, within};
use leeward_policy::model::{
    Gateway, GatewayLimits, GatewayListener, GatewayProtocol, GatewayTls, HostMatch, HttpsRedirect, Parent,
    TlsVersion,
};
use leeward_policy::{Name, Spec};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use std::net::SocketAddr;

fn some_names() -> impl Strategy<Value = Vec<Name>> {
    names(3).prop_filter("names one", |names| !names.is_empty())
}

fn protocol() -> impl Strategy<Value = GatewayProtocol> {
    let redirect = (select(&[301u16, 308]), 1u16..).prop_map(|(status, port)| HttpsRedirect { status, port });
    let tls = (
        some_names(),
        select(&[TlsVersion::Tls12, TlsVersion::Tls13]),
        option::of(some_names()),
        any::<bool>(),
    );
    prop_oneof![
        option::of(redirect).prop_map(|redirect| GatewayProtocol::Http { redirect }),
        tls.prop_map(
            |(certificates, min_version, client_roots, http3)| GatewayProtocol::Https {
                tls: GatewayTls {
                    certificates,
                    min_version,
                    client_roots,
                },
                http3,
            }
        ),
    ]
}

fn listener() -> impl Strategy<Value = GatewayListener> {
    let address = prop_oneof![
        any::<[u8; 4]>().prop_map(Into::into),
        any::<[u8; 16]>().prop_map(Into::into)
    ];
    let hostname = prop_oneof![
        Just(HostMatch::Any),
        "[a-z]{1,5}\\.example".prop_map(|host| HostMatch::Exact(host.into())),
        "\\.[a-z]{1,5}\\.example".prop_map(|host| HostMatch::Suffix(host.into())),
    ];
    let limits = (
        1u32..=1_000_000,
        8u32 << 10..=1 << 20,
        within(SECOND, 24 * HOUR),
        within(100, MINUTE),
    );
    let limits = limits.prop_map(
        |(max_connections, max_header_bytes, idle_timeout, handshake_timeout)| GatewayLimits {
            max_connections,
            max_header_bytes,
            idle_timeout,
            handshake_timeout,
        },
    );
    (name(), address, 1u16.., hostname, protocol(), limits).prop_map(
        |(name, ip, port, hostname, protocol, limits)| GatewayListener {
            name,
            address: SocketAddr::new(ip, port),
            hostname,
            protocol,
            limits,
        },
    )
}

pub(super) fn gateway() -> impl Strategy<Value = Spec> {
    (some_names(), names(3), vec(listener(), 1..4), 0u32..=16).prop_map(
        |(zones, proxies, all, trusted_hops)| {
            let mut listeners: Vec<GatewayListener> = Vec::new();
            for listener in all {
                let stands =
                    |other: &GatewayListener| other.name == listener.name || other.clash(&listener).is_some();
                if !listeners.iter().any(stands) {
                    listeners.push(listener);
                }
            }
            Spec::Gateway(Gateway {
                zones,
                proxies,
                listeners,
                trusted_hops,
            })
        },
    )
}

pub(super) fn parents() -> impl Strategy<Value = Vec<Parent>> {
    let gateway =
        (name(), option::of(name())).prop_map(|(gateway, listener)| Parent::Gateway { gateway, listener });
    vec(prop_oneof![Just(Parent::Mesh), gateway], 0..3).prop_map(|mut parents| {
        parents.dedup();
        if parents.first() == parents.last() {
            parents.truncate(1);
        }
        parents
    })
}

//! Gateways, on the wire, with their defaults written out.

use super::{duration, hostname, names};
use crate::v1;
use leeward_policy::model::{
    Gateway, GatewayListener, GatewayProtocol, GatewayTls, HostMatch, HttpsRedirect, Parent, TlsVersion,
};

pub(super) fn gateway(gateway: &Gateway) -> v1::Gateway {
    v1::Gateway {
        zones: names(&gateway.zones),
        proxies: names(&gateway.proxies),
        listeners: gateway.listeners.iter().map(listener).collect(),
        trusted_hops: gateway.trusted_hops,
    }
}

fn listener(listener: &GatewayListener) -> v1::GatewayListener {
    let (protocol, tls, http3, redirect) = match &listener.protocol {
        GatewayProtocol::Http { redirect } => (v1::GatewayProtocol::Http, None, false, redirect.as_ref()),
        GatewayProtocol::Https { tls, http3 } => (v1::GatewayProtocol::Https, Some(tls), *http3, None),
    };
    let limits = &listener.limits;
    v1::GatewayListener {
        name: listener.name.to_string(),
        address: listener.address.ip().to_string(),
        port: listener.address.port().into(),
        protocol: protocol.into(),
        hostname: match &listener.hostname {
            HostMatch::Any => String::new(),
            host @ (HostMatch::Exact(_) | HostMatch::Suffix(_)) => hostname(host),
        },
        tls: tls.map(self::tls),
        http3,
        https_redirect: redirect.map(|HttpsRedirect { status, port }| v1::HttpsRedirect {
            status_code: (*status).into(),
            port: (*port).into(),
        }),
        limits: Some(v1::GatewayLimits {
            max_connections: limits.max_connections,
            max_header_bytes: limits.max_header_bytes.into(),
            idle_timeout: duration(limits.idle_timeout),
            handshake_timeout: duration(limits.handshake_timeout),
        }),
    }
}

fn tls(tls: &GatewayTls) -> v1::GatewayTls {
    v1::GatewayTls {
        mode: v1::GatewayTlsMode::Terminate.into(),
        certificate_refs: names(&tls.certificates),
        min_version: match tls.min_version {
            TlsVersion::Tls12 => v1::TlsVersion::TlsVersion12.into(),
            TlsVersion::Tls13 => v1::TlsVersion::TlsVersion13.into(),
        },
        client_validation: tls.client_roots.as_ref().map(|roots| v1::ClientValidation {
            ca_certificate_refs: names(roots),
        }),
    }
}

pub(super) fn parent(parent: &Parent) -> v1::ParentRef {
    match parent {
        Parent::Mesh => v1::ParentRef {
            kind: "Mesh".to_owned(),
            ..v1::ParentRef::default()
        },
        Parent::Gateway { gateway, listener } => v1::ParentRef {
            kind: "Gateway".to_owned(),
            name: gateway.to_string(),
            section_name: super::name(listener.as_ref()),
        },
    }
}

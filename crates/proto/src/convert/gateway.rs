//! Gateways, and what routes hang on them.

use super::route::hostname;
use super::{HOUR, MINUTE, MS, SECOND};
use crate::field::{Fields, Section};
use crate::v1;
use leeward_policy::Name;
use leeward_policy::model::{
    Gateway, GatewayLimits, GatewayListener, GatewayProtocol, GatewayTls, HostMatch, HttpsRedirect, Parent,
    TlsVersion,
};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

pub(super) fn gateway(f: &mut Fields, wire: &v1::Gateway) -> Gateway {
    f.count("spec.zones", wire.zones.len(), 1..=64);
    let zones = f.section("spec").names("zones", &wire.zones, 64);
    let proxies = f.section("spec").names("proxies", &wire.proxies, 256);
    f.count("spec.listeners", wire.listeners.len(), 1..=64);
    let names: Vec<_> = wire.listeners.iter().map(|listener| &listener.name).collect();
    f.unique("spec.listeners", ".name", &names);
    let mut listeners: Vec<(usize, GatewayListener)> = Vec::new();
    for (i, wire) in wire.listeners.iter().enumerate().take(64) {
        let path = format!("spec.listeners[{i}]");
        let Some(read) = listener(&mut f.section(&path), wire) else {
            continue;
        };
        if let Some(why) = listeners.iter().find_map(|(_, other)| read.clash(other)) {
            f.reject::<()>(path, why);
        }
        listeners.push((i, read));
    }
    Gateway {
        zones,
        proxies,
        listeners: listeners.into_iter().map(|(_, listener)| listener).collect(),
        trusted_hops: f.small("spec.trustedHops", wire.trusted_hops, 0, 0..=16),
    }
}

fn listener(s: &mut Section<'_>, wire: &v1::GatewayListener) -> Option<GatewayListener> {
    let name = s.name("name", &wire.name);
    let ip = match wire.address.as_str() {
        "" => Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        text => match text.parse() {
            Ok(ip) => Some(ip),
            Err(_) => s.reject(
                "address",
                format!("{text:?} is not an IP address, such as 0.0.0.0"),
            ),
        },
    };
    let port = s.required("port", wire.port, 1..=65_535);
    let host = match wire.hostname.as_str() {
        "" => Some(HostMatch::Any),
        "*" => s.reject(
            "hostname",
            "\"*\" is every host; want none at all for that, or a host",
        ),
        text => {
            let at = s.at("hostname");
            hostname(s.fields(), &at, text)
        }
    };
    let protocol = protocol(s, wire);
    let limits = limits(&mut s.section("limits"), wire.limits.as_ref());
    Some(GatewayListener {
        name: name?,
        address: SocketAddr::new(ip?, u16::try_from(port).ok()?),
        hostname: host?,
        protocol: protocol?,
        limits,
    })
}

fn protocol(s: &mut Section<'_>, wire: &v1::GatewayListener) -> Option<GatewayProtocol> {
    let redirect = wire
        .https_redirect
        .as_ref()
        .map(|wire| redirect(&mut s.section("httpsRedirect"), wire));
    match v1::GatewayProtocol::try_from(wire.protocol) {
        Ok(v1::GatewayProtocol::Http) => {
            if wire.tls.is_some() {
                s.reject::<()>("tls", "is for protocol HTTPS; want none, or that protocol");
            }
            if wire.http3 {
                s.reject::<()>("http3", "is for protocol HTTPS; want none, or that protocol");
            }
            Some(GatewayProtocol::Http {
                redirect: match redirect {
                    None => None,
                    Some(redirect) => Some(redirect?),
                },
            })
        }
        Ok(v1::GatewayProtocol::Https) => {
            if redirect.is_some() {
                s.reject::<()>(
                    "httpsRedirect",
                    "is for protocol HTTP; want none, or that protocol",
                );
            }
            let Some(wire_tls) = &wire.tls else {
                return s.reject(
                    "tls",
                    "is missing, and HTTPS needs it; want certificateRefs at least",
                );
            };
            Some(GatewayProtocol::Https {
                tls: tls(&mut s.section("tls"), wire_tls)?,
                http3: wire.http3,
            })
        }
        Ok(v1::GatewayProtocol::Unspecified) => s.reject("protocol", "is missing; want HTTP or HTTPS"),
        Err(_) => s.reject(
            "protocol",
            format!("{} is not known; want HTTP or HTTPS", wire.protocol),
        ),
    }
}

fn tls(s: &mut Section<'_>, wire: &v1::GatewayTls) -> Option<GatewayTls> {
    match v1::GatewayTlsMode::try_from(wire.mode) {
        Ok(v1::GatewayTlsMode::Unspecified | v1::GatewayTlsMode::Terminate) => {}
        Err(_) => {
            return s.reject("mode", format!("{} is not known; want Terminate", wire.mode));
        }
    }
    let certificates = some_names(s, "certificateRefs", &wire.certificate_refs);
    let client_roots = wire.client_validation.as_ref().map(|wire| {
        some_names(
            &mut s.section("clientValidation"),
            "caCertificateRefs",
            &wire.ca_certificate_refs,
        )
    });
    let min_version = match v1::TlsVersion::try_from(wire.min_version) {
        Ok(v1::TlsVersion::Unspecified | v1::TlsVersion::TlsVersion12) => TlsVersion::Tls12,
        Ok(v1::TlsVersion::TlsVersion13) => TlsVersion::Tls13,
        Err(_) => {
            return s.reject(
                "minVersion",
                format!("{} is not known; want \"1.2\" or \"1.3\"", wire.min_version),
            );
        }
    };
    Some(GatewayTls {
        certificates,
        min_version,
        client_roots,
    })
}

/// 1 to 16 names, each once.
fn some_names(s: &mut Section<'_>, field: &str, texts: &[String]) -> Vec<Name> {
    if texts.is_empty() {
        s.reject::<()>(field, "has 0 entries; want 1 to 16");
    }
    s.names(field, texts, 16)
}

fn redirect(s: &mut Section<'_>, wire: &v1::HttpsRedirect) -> Option<HttpsRedirect> {
    let status = match wire.status_code {
        0 | 301 => 301,
        308 => 308,
        other => {
            return s.reject(
                "statusCode",
                format!("{other} is no such redirect; want 301 or 308"),
            );
        }
    };
    let port = s.small("port", wire.port, 443, 1..=65_535);
    Some(HttpsRedirect {
        status,
        port: u16::try_from(port).ok()?,
    })
}

fn limits(s: &mut Section<'_>, wire: Option<&v1::GatewayLimits>) -> GatewayLimits {
    let default = GatewayLimits::DEFAULT;
    let Some(wire) = wire else { return default };
    let head = s.number(
        "maxHeaderBytes",
        wire.max_header_bytes,
        default.max_header_bytes.into(),
        8 << 10..=1 << 20,
    );
    GatewayLimits {
        max_connections: s.small(
            "maxConnections",
            wire.max_connections,
            default.max_connections,
            1..=1_000_000,
        ),
        max_header_bytes: u32::try_from(head).unwrap_or(default.max_header_bytes),
        idle_timeout: s.duration(
            "idleTimeout",
            wire.idle_timeout.as_ref(),
            default.idle_timeout,
            SECOND..=24 * HOUR,
        ),
        handshake_timeout: s.duration(
            "handshakeTimeout",
            wire.handshake_timeout.as_ref(),
            default.handshake_timeout,
            100 * MS..=MINUTE,
        ),
    }
}

/// What a route hangs on.
pub(super) fn parents(f: &mut Fields, wire: &[v1::ParentRef]) -> Vec<Parent> {
    f.count("spec.parentRefs", wire.len(), 0..=32);
    let mut parents = Vec::new();
    for (i, wire) in wire.iter().enumerate().take(32) {
        parents.extend(parent(&mut f.section(format!("spec.parentRefs[{i}]")), wire));
    }
    f.unique("spec.parentRefs", "", &parents);
    parents
}

fn parent(s: &mut Section<'_>, wire: &v1::ParentRef) -> Option<Parent> {
    match wire.kind.as_str() {
        "" | "Gateway" => {
            let gateway = s.name("name", &wire.name);
            let listener = match wire.section_name.as_str() {
                "" => None,
                text => Some(s.name("sectionName", text)?),
            };
            Some(Parent::Gateway {
                gateway: gateway?,
                listener,
            })
        }
        "Mesh" => {
            for (field, text) in [("name", &wire.name), ("sectionName", &wire.section_name)] {
                if !text.is_empty() {
                    s.reject::<()>(
                        field,
                        format!("{text:?} says nothing beside kind Mesh; want none"),
                    );
                }
            }
            Some(Parent::Mesh)
        }
        other => s.reject("kind", format!("{other:?} is not known; want Gateway or Mesh")),
    }
}

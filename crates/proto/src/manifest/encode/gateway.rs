//! Listeners for clients from outside.

use super::super::words::{self, word};
use super::{duration, fields};
use crate::v1;
use serde_json::{Value, json};

pub(super) fn gateway(gateway: &v1::Gateway) -> Value {
    let listeners: Vec<_> = gateway.listeners.iter().map(listener).collect();
    fields([
        ("zones", json!(gateway.zones)),
        ("proxies", json!(gateway.proxies)),
        ("listeners", json!(listeners)),
        ("trustedHops", json!(gateway.trusted_hops)),
    ])
}

fn listener(listener: &v1::GatewayListener) -> Value {
    let redirect = listener.https_redirect.as_ref().map(|redirect| {
        fields([
            ("statusCode", json!(redirect.status_code)),
            ("port", json!(redirect.port)),
        ])
    });
    let limits = listener.limits.as_ref().map(|limits| {
        fields([
            ("maxConnections", json!(limits.max_connections)),
            ("maxHeaderBytes", json!(limits.max_header_bytes)),
            ("idleTimeout", duration(limits.idle_timeout.as_ref())),
            ("handshakeTimeout", duration(limits.handshake_timeout.as_ref())),
        ])
    });
    fields([
        ("name", json!(listener.name)),
        ("address", json!(listener.address)),
        ("port", json!(listener.port)),
        (
            "protocol",
            json!(word(words::GATEWAY_PROTOCOL, listener.protocol)),
        ),
        ("hostname", json!(listener.hostname)),
        ("tls", json!(listener.tls.as_ref().map(tls))),
        ("http3", json!(listener.http3)),
        ("httpsRedirect", json!(redirect)),
        ("limits", json!(limits)),
    ])
}

fn tls(tls: &v1::GatewayTls) -> Value {
    let validation = tls
        .client_validation
        .as_ref()
        .map(|validation| fields([("caCertificateRefs", json!(validation.ca_certificate_refs))]));
    fields([
        ("mode", json!(word(words::TLS_MODE, tls.mode))),
        ("certificateRefs", json!(tls.certificate_refs)),
        ("minVersion", json!(word(words::TLS_VERSION, tls.min_version))),
        ("clientValidation", json!(validation)),
    ])
}

pub(super) fn parent(parent: &v1::ParentRef) -> Value {
    fields([
        ("kind", json!(parent.kind)),
        ("name", json!(parent.name)),
        ("sectionName", json!(parent.section_name)),
    ])
}

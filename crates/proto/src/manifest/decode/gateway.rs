//! Listeners for clients from outside.

use super::super::words;
use super::fields::Fields;
use crate::v1;

pub(super) fn gateway(f: &mut Fields<'_>) -> v1::Gateway {
    v1::Gateway {
        zones: f.text_list("zones"),
        proxies: f.some_texts("proxies"),
        listeners: f.list("listeners", |f| v1::GatewayListener {
            name: f.text("name"),
            address: f.text("address"),
            port: f.small("port"),
            protocol: f.choice("protocol", words::GATEWAY_PROTOCOL),
            hostname: f.text("hostname"),
            tls: f.object("tls", |f| v1::GatewayTls {
                mode: f.choice("mode", words::TLS_MODE),
                certificate_refs: f.text_list("certificateRefs"),
                min_version: f.choice("minVersion", words::TLS_VERSION),
                client_validation: f.object("clientValidation", |f| v1::ClientValidation {
                    ca_certificate_refs: f.text_list("caCertificateRefs"),
                }),
            }),
            http3: f.optional_bool("http3").unwrap_or_default(),
            https_redirect: f.object("httpsRedirect", |f| v1::HttpsRedirect {
                status_code: f.small("statusCode"),
                port: f.small("port"),
            }),
            limits: f.object("limits", |f| v1::GatewayLimits {
                max_connections: f.small("maxConnections"),
                max_header_bytes: f.some_size("maxHeaderBytes"),
                idle_timeout: f.duration("idleTimeout"),
                handshake_timeout: f.duration("handshakeTimeout"),
            }),
        }),
        trusted_hops: f.or_zero("trustedHops"),
    }
}

pub(super) fn parent(f: &mut Fields<'_>) -> v1::ParentRef {
    v1::ParentRef {
        kind: f.text("kind"),
        name: f.text("name"),
        section_name: f.text("sectionName"),
    }
}

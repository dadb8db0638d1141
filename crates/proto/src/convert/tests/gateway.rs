//! What a gateway may say.

use super::check;

/// The same of a gateway with these listeners.
#[track_caller]
fn check_listeners(listeners: &str, want: &[&str]) {
    check(
        "Gateway",
        &format!("{{zones: [a], listeners: [{listeners}]}}"),
        want,
    );
}

#[test]
fn a_listener_says_what_its_protocol_needs_and_nothing_else() {
    check_listeners(
        "{name: a, port: 80, protocol: HTTP}, {name: b, port: 443, protocol: HTTPS, tls: {certificateRefs: [c]}}",
        &[],
    );
    check_listeners(
        "{name: a, port: 80, protocol: HTTP, tls: {certificateRefs: [c]}, http3: true}",
        &[
            "spec.listeners[0].http3: is for protocol HTTPS; want none, or that protocol",
            "spec.listeners[0].tls: is for protocol HTTPS; want none, or that protocol",
        ],
    );
    check_listeners(
        "{name: a, port: 443, protocol: HTTPS, httpsRedirect: {}}",
        &[
            "spec.listeners[0].httpsRedirect: is for protocol HTTP; want none, or that protocol",
            "spec.listeners[0].tls: is missing, and HTTPS needs it; want certificateRefs at least",
        ],
    );
    check_listeners(
        "{name: a, port: 443, protocol: HTTPS, tls: {certificateRefs: [../c], clientValidation: {}}}",
        &[
            "spec.listeners[0].tls.certificateRefs[0]: \"../c\" has '.' at byte 0; a name is a-z, 0-9 and '-', with no '-' at either end",
            "spec.listeners[0].tls.clientValidation.caCertificateRefs: has 0 entries; want 1 to 16",
        ],
    );
    check_listeners(
        "{name: a, address: localhost, port: 70000, hostname: \"*\", httpsRedirect: {statusCode: 302}}",
        &[
            "spec.listeners[0].address: \"localhost\" is not an IP address, such as 0.0.0.0",
            "spec.listeners[0].hostname: \"*\" is every host; want none at all for that, or a host",
            "spec.listeners[0].httpsRedirect.statusCode: 302 is no such redirect; want 301 or 308",
            "spec.listeners[0].port: 70000 is out of range; want 1 to 65535",
            "spec.listeners[0].protocol: is missing; want HTTP or HTTPS",
        ],
    );
}

#[test]
fn listeners_of_a_port_can_be_told_apart() {
    check_listeners(
        "{name: a, port: 80, protocol: HTTP, hostname: x.example}, {name: b, port: 80, protocol: HTTP, hostname: X.example}",
        &[
            "spec.listeners[1]: is for the same address, port and hostname as the listener a; want another hostname or port",
        ],
    );
    check_listeners(
        "{name: a, port: 80, protocol: HTTP}, {name: a, port: 81, protocol: HTTP}",
        &["spec.listeners[1].name: a stands at spec.listeners[0] already; each must stand once"],
    );
}

#[test]
fn a_route_hangs_on_gateways_or_the_mesh() {
    let route = |parents: &str| {
        format!("{{hostnames: [a], rules: [{{backendRefs: [{{service: s}}]}}], parentRefs: [{parents}]}}")
    };
    check(
        "Route",
        &route("{name: g}, {kind: Mesh}, {kind: Gateway, name: g, sectionName: l}"),
        &[],
    );
    check(
        "Route",
        &route("{kind: Mesh, name: g}, {kind: Service, name: s}, {sectionName: l}"),
        &[
            "spec.parentRefs[0].name: \"g\" says nothing beside kind Mesh; want none",
            "spec.parentRefs[1].kind: \"Service\" is not known; want Gateway or Mesh",
            "spec.parentRefs[2].name: is missing; a name is 1 to 63 bytes of a-z, 0-9 and '-'",
        ],
    );
    check(
        "Route",
        &route("{name: g}, {name: g}"),
        &["spec.parentRefs[1]: Gateway/g stands at spec.parentRefs[0] already; each must stand once"],
    );
}

//! Authorization, gateways, plugins.

use super::Example;

const GATEWAY: &str = "Zone a {}
         Service s {}
         Gateway g {zones: [a], listeners: [{name: web, port: 80, protocol: HTTP, hostname: '*.example'}]}
         Route r {hostnames: [x.example], parentRefs: [{name: g}], rules: [{backendRefs: [{service: s}]}]}";

pub(super) const ALL: &[Example] = &[
    (
        "LW801",
        "spec.rules[0].to",
        "AuthorizationPolicy p {action: Deny, rules: [{to: [{paths: [/admin/users], notPaths: ['/admin/*']}]}]}",
        "AuthorizationPolicy p {action: Deny, rules: [{to: [{paths: ['/admin/*'], notPaths: [/admin/users]}]}]}",
    ),
    (
        "LW801",
        "spec.rules[0].from",
        r#"Zone b {}
         AuthorizationPolicy p {action: Deny, rules: [{from: [{identities: ["spiffe://mesh.example/zone/a/*"], zones: [b]}]}]}"#,
        r#"Zone a {}
         AuthorizationPolicy p {action: Deny, rules: [{from: [{identities: ["spiffe://mesh.example/zone/a/*"], zones: [a]}]}]}"#,
    ),
    (
        "LW802",
        "spec.rules[0].to[0].routes",
        "Service s {}
         Service t {}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s}]}]}
         AuthorizationPolicy p {services: [t], action: Deny, rules: [{to: [{routes: [r]}]}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s}]}]}
         AuthorizationPolicy p {services: [s], action: Deny, rules: [{to: [{routes: [r]}]}]}",
    ),
    (
        "LW803",
        "spec.rules[0].from[0].identities[0]",
        r#"Zone east {}
         AuthorizationPolicy p {action: Allow, rules: [{from: [{identities: ["spiffe://mesh.example/zone/eats/*"]}]}]}"#,
        r#"Zone east {}
         AuthorizationPolicy p {action: Allow, rules: [{from: [{identities: ["spiffe://mesh.example/zone/east/*"]}]}]}"#,
    ),
    (
        "LW803",
        "spec.rules[0].from[0].identities[0]",
        r#"Zone east {proxies: [{name: one, address: "10.0.0.1:1"}]}
         AuthorizationPolicy p {action: Allow, rules: [{from: [{identities: ["spiffe://mesh.example/zone/east/proxy/two"]}]}]}"#,
        r#"Zone east {proxies: [{name: one, address: "10.0.0.1:1"}]}
         AuthorizationPolicy p {action: Allow, rules: [{from: [{identities: ["spiffe://mesh.example/zone/east/proxy/one"]}]}]}"#,
    ),
    (
        "LW804",
        "spec.rules[1]",
        "AuthorizationPolicy p {action: Allow, rules: [{}, {to: [{methods: [GET]}]}]}",
        "AuthorizationPolicy p {action: Allow, rules: [{to: [{methods: [PUT]}]}, {to: [{methods: [GET]}]}]}",
    ),
    (
        "LW805",
        "spec.rules",
        "Service s {}
         AuthorizationPolicy allow {services: [s], action: Allow, rules: [{to: [{methods: [GET]}]}]}
         AuthorizationPolicy deny {action: Deny, rules: [{}]}",
        "Service s {}
         AuthorizationPolicy allow {services: [s], action: Allow, rules: [{to: [{methods: [GET]}]}]}
         AuthorizationPolicy deny {action: Deny, rules: [{to: [{methods: [PUT]}]}]}",
    ),
    (
        "LW806",
        "spec.rules[0].backendRefs[0].service",
        "Service s {}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s}]}]}
         AuthorizationPolicy none {action: Allow}",
        "Service s {}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s}]}]}
         AuthorizationPolicy none {action: Allow}
         AuthorizationPolicy all {services: [s], action: Allow, rules: [{}]}",
    ),
    (
        "LW807",
        "spec.rules[0].backendRefs[0].service",
        "Zone a {}
         Service s {}
         Gateway g {zones: [a], listeners: [{name: web, port: 80, protocol: HTTP}]}
         Route r {hostnames: [x.example], parentRefs: [{name: g}], rules: [{backendRefs: [{service: s}]}]}
         AuthorizationPolicy p {services: [s], action: Allow, rules: [{from: [{zones: [a]}]}]}",
        "Zone a {}
         Service s {}
         Gateway g {zones: [a], listeners: [{name: web, port: 80, protocol: HTTP}]}
         Route r {hostnames: [x.example], parentRefs: [{name: g}], rules: [{backendRefs: [{service: s}]}]}
         AuthorizationPolicy p {services: [s], action: Allow, rules: [{from: [{zones: [a]}]}, {to: [{routes: [r]}]}]}",
    ),
    (
        "LW901",
        "spec.listeners[0]",
        "Zone a {}
         Gateway g {zones: [a], listeners: [{name: web, port: 80, protocol: HTTP}]}
         Gateway h {zones: [a], listeners: [{name: web, port: 80, protocol: HTTP}]}",
        "Zone a {}
         Gateway g {zones: [a], listeners: [{name: web, port: 80, protocol: HTTP}]}
         Gateway h {zones: [a], listeners: [{name: web, port: 81, protocol: HTTP}]}",
    ),
    (
        "LW902",
        "spec.listeners[0]",
        "Zone a {}
         Gateway g {zones: [a], listeners: [{name: web, port: 80, protocol: HTTP}]}",
        GATEWAY,
    ),
    (
        "LW903",
        "spec.proxies[0]",
        r#"Zone a {proxies: [{name: edge, address: "10.0.0.1:1"}]}
         Gateway g {zones: [a], proxies: [egde], listeners: [{name: web, port: 80, protocol: HTTP}]}"#,
        r#"Zone a {proxies: [{name: edge, address: "10.0.0.1:1"}]}
         Gateway g {zones: [a], proxies: [edge], listeners: [{name: web, port: 80, protocol: HTTP}]}"#,
    ),
    (
        "LW904",
        "spec.hostnames[0]",
        "Zone a {}
         Service s {}
         Gateway g {zones: [a], listeners: [{name: web, port: 80, protocol: HTTP, hostname: '*.example'}]}
         Route r {hostnames: [x.test], parentRefs: [{name: g}], rules: [{backendRefs: [{service: s}]}]}",
        GATEWAY,
    ),
    (
        "LW911",
        "spec.limits",
        "Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung}",
        "Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung, limits: {callTimeout: 20ms}}",
    ),
    (
        "LW912",
        "spec.limits.maxCalls",
        "Service s {}
         Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung, limits: {maxCalls: 0}, access: {services: [s]}}",
        "Service s {}
         Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung, limits: {maxCalls: 1}, access: {services: [s]}}",
    ),
    (
        "LW913",
        "spec.canary.percent",
        "Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung, canary: {source: {file: /q}, percent: 100}}",
        "Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung, canary: {source: {file: /q}, percent: 5}}",
    ),
    (
        "LW914",
        "spec.source",
        "Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung}",
        "Plugin p {kind: Fallback, source: {file: /p, sha256: abababababababababababababababababababababababababababababababab}, onFault: NextRung}",
    ),
    (
        "LW921",
        "spec.proxies[0]",
        r#"Zone a {proxies: [{name: a1, address: "10.0.0.1:1"}]}
         Workload w {zone: a, proxies: [al], uids: [1000]}"#,
        r#"Zone a {proxies: [{name: a1, address: "10.0.0.1:1"}]}
         Workload w {zone: a, proxies: [a1], uids: [1000]}"#,
    ),
    (
        "LW922",
        "spec.rules[0].from[0].identities[0]",
        r#"Zone a {proxies: [{name: a1, address: "10.0.0.1:1"}]}
         AuthorizationPolicy p {action: Deny, rules: [{from: [{identities: ["spiffe://td/zone/a/workload/w"]}]}]}"#,
        r#"Zone a {proxies: [{name: a1, address: "10.0.0.1:1"}]}
         AuthorizationPolicy p {action: Deny, rules: [{from: [{identities: ["spiffe://td/zone/a/proxy/a1"]}]}]}"#,
    ),
];

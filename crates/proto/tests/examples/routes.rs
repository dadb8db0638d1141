//! References, routes, ladders.

use super::Example;

const RULE: &str = "Service s {}";

pub(super) const ALL: &[Example] = &[
    (
        "LW101",
        "spec.rules[0].backendRefs[0].service",
        "Service cart {}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: crat}]}]}",
        "Service cart {}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: cart}]}]}",
    ),
    (
        "LW102",
        "spec.rungs[0].plugin.plugin",
        "Plugin p {kind: Filter, source: {file: /p}, onFault: FailOpen}
         FallbackPolicy f {rungs: [{plugin: {plugin: p}}]}",
        "Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung}
         FallbackPolicy f {rungs: [{plugin: {plugin: p}}]}",
    ),
    (
        "LW102",
        "spec.rules[0].backendRefs[0].service",
        "Service s {protocol: TCP}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s}]}]}",
        RULE,
    ),
    (
        "LW103",
        "spec.endpoints[0].proxy",
        r#"Zone a {proxies: [{name: a1, address: "10.0.0.1:1"}]}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a, proxy: a2}]}"#,
        r#"Zone a {proxies: [{name: a1, address: "10.0.0.1:1"}]}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a, proxy: a1}]}"#,
    ),
    (
        "LW104",
        "spec.parentRefs[0].sectionName",
        "Zone a {}
         Service s {}
         Gateway g {zones: [a], listeners: [{name: web, port: 80, protocol: HTTP}]}
         Route r {hostnames: [a], parentRefs: [{name: g, sectionName: wbe}], rules: [{backendRefs: [{service: s}]}]}",
        "Zone a {}
         Service s {}
         Gateway g {zones: [a], listeners: [{name: web, port: 80, protocol: HTTP}]}
         Route r {hostnames: [a], parentRefs: [{name: g, sectionName: web}], rules: [{backendRefs: [{service: s}]}]}",
    ),
    (
        "LW105",
        "spec.level",
        r#"DegradationPolicy d {levels: [{name: normal}, {name: less, shedBelow: High}]}
         DegradationOverride o {policy: d, level: more, expireTime: "2026-12-02T00:00:00Z"}"#,
        r#"DegradationPolicy d {levels: [{name: normal}, {name: less, shedBelow: High}]}
         DegradationOverride o {policy: d, level: less, expireTime: "2026-12-02T00:00:00Z"}"#,
    ),
    (
        "LW106",
        "spec.addresses[0]",
        r#"Service s {addresses: ["10.0.0.1:80"]}
         Service t {addresses: ["10.0.0.1:80"]}"#,
        r#"Service s {addresses: ["10.0.0.1:80"]}
         Service t {addresses: ["10.0.0.1:81"]}"#,
    ),
    (
        "LW107",
        "spec.loadBalancer.zoneFailover.within",
        "Zone a {labels: {regoin: eu}}
         Service s {loadBalancer: {zoneFailover: {within: region}}}",
        "Zone a {labels: {region: eu}}
         Service s {loadBalancer: {zoneFailover: {within: region}}}",
    ),
    (
        "LW111",
        "metadata.name",
        "Service s {}",
        "Service s {}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s}]}]}",
    ),
    (
        "LW112",
        "spec.expireTime",
        r#"Service s {}
         CircuitOverride o {service: s, mode: ForceOpen, expireTime: "2026-11-30T00:00:00Z"}"#,
        r#"Service s {}
         CircuitOverride o {service: s, mode: ForceOpen, expireTime: "2026-12-02T00:00:00Z"}"#,
    ),
    (
        "LW201",
        "spec.rules[0].matches[0]",
        "Service s {}
         Route a {hostnames: [x.example], rules: [{backendRefs: [{service: s}]}]}
         Route b {hostnames: [x.example], rules: [{backendRefs: [{service: s}]}]}",
        "Service s {}
         Route a {hostnames: [x.example], rules: [{matches: [{method: GET}], backendRefs: [{service: s}]}]}
         Route b {hostnames: [x.example], rules: [{backendRefs: [{service: s}]}]}
         Route c {hostnames: ['*.example'], rules: [{backendRefs: [{service: s}]}]}",
    ),
    (
        "LW202",
        "spec.rules[1].matches[0]",
        "Service s {}
         Route r {hostnames: [a], rules: [{matches: [{headers: [{name: x, prefix: a}]}], backendRefs: [{service: s}]}, {matches: [{headers: [{name: x, exact: ab}]}], backendRefs: [{service: s}]}]}",
        "Service s {}
         FeatureFlags f {flags: {on: {state: ENABLED, variants: {y: true, n: false}, defaultVariant: y}}}
         Route r {hostnames: [a], rules: [{when: {flag: on}, backendRefs: [{service: s}]}, {backendRefs: [{service: s}]}, {matches: [{path: {prefix: /x}}], backendRefs: [{service: s}]}]}",
    ),
    (
        "LW203",
        "spec.rules[0].matches[0].headers[0]",
        "Service s {}
         Route r {hostnames: [a], rules: [{matches: [{headers: [{name: x, exact: a}, {name: x, present: false}]}], backendRefs: [{service: s}]}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{matches: [{headers: [{name: x, exact: a}, {name: y, present: false}]}], backendRefs: [{service: s}]}]}",
    ),
    (
        "LW204",
        "spec.rules[0].backendRefs[1].weight",
        "Service s {}
         Service t {}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s}, {service: t, weight: 0}]}]}",
        "Service s {}
         Service t {}
         Plugin p {kind: Router, source: {file: /p}, onFault: FailOpen}
         Route r {hostnames: [a], rules: [{router: {plugin: p}, backendRefs: [{service: s}, {service: t, weight: 0}]}]}",
    ),
    (
        "LW205",
        "spec.rules[0].backendRefs[0].subset",
        r#"Zone a {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a, labels: {version: v1}}]}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s, subset: {version: v2}}]}]}"#,
        r#"Zone a {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a, labels: {version: v1}}]}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s, subset: {version: v1}}]}]}"#,
    ),
    (
        "LW206",
        "spec.rules[0].backendRefs[0].service",
        "Service s {hold: {maxRequests: 0}}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s}]}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s}]}]}",
    ),
    (
        "LW207",
        "spec.rules[0].backendRefs",
        "Service s {}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s, when: {flag: f}}]}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s, when: {flag: f}}, {service: s}]}]}",
    ),
    (
        "LW208",
        "spec.rules[0].cache",
        "Service s {}
         Route r {hostnames: [a], rules: [{matches: [{method: POST}], cache: {}, backendRefs: [{service: s}]}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{matches: [{method: POST}, {method: GET}], cache: {}, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW301",
        "spec.rungs[1]",
        "FallbackPolicy f {rungs: [{static: {status: 200}}, {stale: {}}]}",
        "FallbackPolicy f {rungs: [{static: {status: 200}, methods: [GET]}, {stale: {}}]}",
    ),
    (
        "LW302",
        "spec.rungs[0].causes",
        "FallbackPolicy f {rungs: [{stale: {}, causes: [UpstreamStatus]}, {static: {status: 503}}]}",
        "FallbackPolicy f {onStatuses: [503], rungs: [{stale: {}, causes: [UpstreamStatus]}, {static: {status: 503}}]}",
    ),
    (
        "LW302",
        "spec.rungs[0].causes",
        "FallbackPolicy f {rungs: [{stale: {}, causes: [PluginFault]}, {static: {status: 503}}]}",
        "Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung}
         FallbackPolicy f {rungs: [{plugin: {plugin: p}}, {stale: {}, causes: [PluginFault]}, {static: {status: 503}}]}",
    ),
    (
        "LW303",
        "spec.rungs[0]",
        "Service s {}
         Queue q {}
         FallbackPolicy f {rungs: [{queue: {queue: q}}]}
         Route r {hostnames: [a], rules: [{fallback: f, backendRefs: [{service: s}]}]}",
        "Service s {}
         Queue q {}
         FallbackPolicy f {rungs: [{queue: {queue: q}, methods: [POST]}]}
         Route r {hostnames: [a], rules: [{fallback: f, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW304",
        "spec.rules[0].fallback",
        "Service s {}
         FallbackPolicy f {rungs: [{stale: {}}]}
         Route r {hostnames: [a], rules: [{fallback: f, backendRefs: [{service: s}]}]}",
        "Service s {}
         FallbackPolicy f {rungs: [{stale: {}}]}
         Route r {hostnames: [a], rules: [{fallback: f, cache: {}, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW305",
        "spec.rules[0].fallback",
        r#"Zone a {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}]}
         FallbackPolicy f {rungs: [{zone: {}}]}
         Route r {hostnames: [a], rules: [{fallback: f, backendRefs: [{service: s}]}]}"#,
        r#"Zone a {}
         Zone b {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}]}
         FallbackPolicy f {rungs: [{zone: {}}]}
         Route r {hostnames: [a], rules: [{fallback: f, backendRefs: [{service: s}]}]}"#,
    ),
    (
        "LW306",
        "spec.rules[0].fallback",
        "Service s {}
         FallbackPolicy f {rungs: [{service: {service: s}}]}
         Route r {hostnames: [a], rules: [{fallback: f, backendRefs: [{service: s}]}]}",
        "Service s {}
         Service t {}
         FallbackPolicy f {rungs: [{service: {service: t}}]}
         Route r {hostnames: [a], rules: [{fallback: f, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW307",
        "spec.rungs[0].methods",
        "Service s {}
         FallbackPolicy f {rungs: [{stale: {}, methods: [GET]}]}
         Route r {hostnames: [a], rules: [{matches: [{method: POST}], fallback: f, backendRefs: [{service: s}]}]}",
        "Service s {}
         FallbackPolicy f {rungs: [{stale: {}, methods: [GET]}]}
         Route r {hostnames: [a], rules: [{matches: [{method: POST}, {method: GET}], fallback: f, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW307",
        "spec.rungs[0].when",
        "Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung, when: {flag: f, variants: [a]}}
         FallbackPolicy l {rungs: [{plugin: {plugin: p}, when: {flag: f, variants: [b]}}]}",
        "Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung, when: {flag: f, variants: [a]}}
         FallbackPolicy l {rungs: [{plugin: {plugin: p}, when: {flag: f, variants: [a, b]}}]}",
    ),
    (
        "LW308",
        "spec.on",
        "Service s {}
         FallbackPolicy f {on: [Timeout, RateLimited], rungs: [{static: {status: 503}}]}
         Route r {hostnames: [a], rules: [{fallback: f, backendRefs: [{service: s}]}]}",
        "Service s {}
         FallbackPolicy f {on: [Timeout, RateLimited], rungs: [{static: {status: 503}}]}
         Route r {hostnames: [a], rules: [{fallback: f, rateLimits: [{requests: 1}], backendRefs: [{service: s}]}]}",
    ),
];

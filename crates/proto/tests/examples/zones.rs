//! Zones, flags, levels.

use super::Example;

const FLAG: &str = "FeatureFlags f {flags: {reviews: {state: ENABLED, variants: {on: true, off: false}, defaultVariant: on}}}
         Service s {}
         Route r {hostnames: [a], rules: [{enabled: {flag: reviews}, backendRefs: [{service: s}]}]}";

pub(super) const ALL: &[Example] = &[
    (
        "LW601",
        "spec.loadBalancer.zoneFailover.within",
        r#"Zone a {labels: {region: eu}}
         Zone b {labels: {region: us}}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}, {address: "10.0.0.2:80", zone: b}], loadBalancer: {zoneFailover: {within: region}}}"#,
        r#"Zone a {labels: {region: eu}}
         Zone b {labels: {region: eu}}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}, {address: "10.0.0.2:80", zone: b}], loadBalancer: {zoneFailover: {within: region}}}"#,
    ),
    (
        "LW602",
        "spec.endpoints",
        r#"Zone a {drain: {startTime: "2026-11-30T00:00:00Z", expireTime: "2026-12-02T00:00:00Z"}}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}]}"#,
        r#"Zone a {drain: {startTime: "2026-11-28T00:00:00Z", expireTime: "2026-11-30T00:00:00Z"}}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}]}"#,
    ),
    (
        "LW603",
        "spec.endpoints",
        r#"Zone a {drain: {startTime: "2026-11-30T00:00:00Z", expireTime: "2026-12-02T00:00:00Z"}}
         Zone b {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}, {address: "10.0.0.2:80", zone: a}, {address: "10.0.0.3:80", zone: b}]}"#,
        r#"Zone a {drain: {startTime: "2026-11-30T00:00:00Z", expireTime: "2026-12-02T00:00:00Z"}}
         Zone b {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}, {address: "10.0.0.3:80", zone: b}]}"#,
    ),
    (
        "LW604",
        "spec.exportTo[0]",
        "Zone a {imports: [t]}
         Service s {exportTo: [a]}
         Service t {exportTo: [a]}",
        "Zone a {imports: [s]}
         Service s {exportTo: [a]}",
    ),
    (
        "LW604",
        "spec.imports[0]",
        r#"Zone a {imports: [s]}
         Zone b {}
         Service s {exportTo: [b], endpoints: [{address: "10.0.0.1:80", zone: b}]}"#,
        r#"Zone a {imports: [s]}
         Zone b {}
         Service s {exportTo: [a], endpoints: [{address: "10.0.0.1:80", zone: b}]}"#,
    ),
    (
        "LW605",
        "spec.imports[0]",
        "Zone a {imports: [crat]}
         Service cart {}",
        "Zone a {imports: [cart]}
         Service cart {}",
    ),
    (
        "LW606",
        "spec.loadBalancer.zoneFailover.activePassive.zones[1]",
        r#"Zone a {}
         Zone b {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}], loadBalancer: {zoneFailover: {activePassive: {zones: [a, b]}}}}"#,
        r#"Zone a {}
         Zone b {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}, {address: "10.0.0.2:80", zone: b}], loadBalancer: {zoneFailover: {activePassive: {zones: [a, b]}}}}"#,
    ),
    (
        "LW607",
        "spec.directCallers",
        r#"Zone a {proxies: [{name: p, address: "10.0.0.1:1"}], gateways: [{name: p}], directCallers: Allow}"#,
        r#"Zone a {proxies: [{name: p, address: "10.0.0.1:1"}], gateways: [{name: p}]}"#,
    ),
    (
        "LW701",
        "spec.rules[0].enabled.flag",
        "Service s {}
         FeatureFlags f {flags: {reviews: {state: ENABLED, variants: {on: true, off: false}, defaultVariant: on}}}
         Route r {hostnames: [a], rules: [{enabled: {flag: reveiws}, backendRefs: [{service: s}]}]}",
        FLAG,
    ),
    (
        "LW702",
        "spec.rules[0].enabled.variants[0]",
        "Service s {}
         FeatureFlags f {flags: {reviews: {state: ENABLED, variants: {on: true, off: false}, defaultVariant: on}}}
         Route r {hostnames: [a], rules: [{enabled: {flag: reviews, variants: [no]}, backendRefs: [{service: s}]}]}",
        FLAG,
    ),
    (
        "LW702",
        "spec.rules[0].enabled.flag",
        "Service s {}
         FeatureFlags f {flags: {reviews: {state: ENABLED, variants: {few: 1, many: 2}, defaultVariant: few}}}
         Route r {hostnames: [a], rules: [{enabled: {flag: reviews}, backendRefs: [{service: s}]}]}",
        FLAG,
    ),
    (
        "LW703",
        "spec.levels[1].flags.reviews",
        "FeatureFlags f {flags: {reviews: {state: ENABLED, variants: {on: true, off: false}, defaultVariant: on}}}
         DegradationPolicy d {levels: [{name: normal}, {name: less, flags: {reviews: no}}]}",
        "FeatureFlags f {flags: {reviews: {state: ENABLED, variants: {on: true, off: false}, defaultVariant: on}}}
         DegradationPolicy d {levels: [{name: normal}, {name: less, flags: {reviews: off}}]}",
    ),
    (
        "LW704",
        "spec.levels[1]",
        "DegradationPolicy d {levels: [{name: normal}, {name: less}]}",
        "DegradationPolicy d {levels: [{name: normal}, {name: less, shedBelow: High}]}",
    ),
    (
        "LW705",
        "spec.levels[1].shedBelow",
        "Service s {}
         Route r {hostnames: [a], rules: [{priority: {default: High}, backendRefs: [{service: s}]}]}
         DegradationPolicy d {routes: [r], levels: [{name: normal}, {name: less, shedBelow: High}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{priority: {default: Low}, backendRefs: [{service: s}]}]}
         DegradationPolicy d {routes: [r], levels: [{name: normal}, {name: less, shedBelow: High}]}",
    ),
    (
        "LW706",
        "spec.triggers[0].circuitOpen",
        "Service s {}
         DegradationPolicy d {levels: [{name: normal}, {name: less, shedBelow: High}], triggers: [{level: less, circuitOpen: s}]}",
        "ResiliencePolicy default {circuitBreaker: {}}
         Service s {}
         DegradationPolicy d {levels: [{name: normal}, {name: less, shedBelow: High}], triggers: [{level: less, circuitOpen: s}]}",
    ),
    (
        "LW706",
        "spec.triggers[0].latency.above",
        "Service s {}
         Route r {hostnames: [a], rules: [{timeouts: {request: 1s}, backendRefs: [{service: s}]}]}
         DegradationPolicy d {levels: [{name: normal}, {name: less, shedBelow: High}], triggers: [{level: less, latency: {service: s, percentile: 95, above: 2s}}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{timeouts: {request: 1s}, backendRefs: [{service: s}]}]}
         DegradationPolicy d {levels: [{name: normal}, {name: less, shedBelow: High}], triggers: [{level: less, latency: {service: s, percentile: 95, above: 500ms}}]}",
    ),
    (
        "LW707",
        "spec.levels[1].flags.x",
        "DegradationPolicy a {levels: [{name: normal}, {name: less, flags: {x: off}}]}
         DegradationPolicy b {levels: [{name: normal}, {name: less, flags: {x: low}}]}",
        "DegradationPolicy a {levels: [{name: normal}, {name: less, flags: {x: off}}]}
         DegradationPolicy b {levels: [{name: normal}, {name: less, flags: {x: off}}]}",
    ),
    (
        "LW708",
        "spec.flags.reviews",
        "FeatureFlags f {flags: {reviews: {state: ENABLED, variants: {on: true, off: false}, defaultVariant: on}}}",
        FLAG,
    ),
];

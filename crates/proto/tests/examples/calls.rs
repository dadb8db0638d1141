//! Times, retries, limits.

use super::Example;

pub(super) const ALL: &[Example] = &[
    (
        "LW401",
        "spec.rules[0].timeouts.request",
        "Service s {}
         Route r {hostnames: [a], rules: [{timeouts: {request: 0s}, backendRefs: [{service: s}]}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{timeouts: {request: 1h}, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW402",
        "spec.rules[0].timeouts.backendRequest",
        "Service s {}
         FallbackPolicy f {reservePercent: 50, rungs: [{static: {status: 503}}]}
         Route r {hostnames: [a], rules: [{timeouts: {request: 10s, backendRequest: 3s}, fallback: f, backendRefs: [{service: s}]}]}",
        "Service s {}
         FallbackPolicy f {reservePercent: 5, rungs: [{static: {status: 503}}]}
         Route r {hostnames: [a], rules: [{timeouts: {request: 10s, backendRequest: 3s}, fallback: f, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW403",
        "spec.rules[0].timeouts",
        "Service s {connectTimeout: 2s}
         Route r {hostnames: [a], rules: [{timeouts: {request: 2s}, backendRefs: [{service: s}]}]}",
        "Service s {connectTimeout: 500ms}
         Route r {hostnames: [a], rules: [{timeouts: {request: 2s}, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW404",
        "spec.rules[0].retry.hedge.delay",
        "Service s {}
         Route r {hostnames: [a], rules: [{timeouts: {backendRequest: 200ms}, retry: {hedge: {delay: 300ms}}, backendRefs: [{service: s}]}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{timeouts: {backendRequest: 200ms}, retry: {hedge: {delay: 100ms}}, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW405",
        "spec.connectionPool.pendingTimeout",
        "Service s {connectionPool: {maxPendingRequests: 5, pendingTimeout: 3s}}
         Route r {hostnames: [a], rules: [{timeouts: {request: 2s}, backendRefs: [{service: s}]}]}",
        "Service s {connectionPool: {maxPendingRequests: 5, pendingTimeout: 1s}}
         Route r {hostnames: [a], rules: [{timeouts: {request: 2s}, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW406",
        "spec.rules[0].timeouts.request",
        "Service s {hold: {maxWait: 60s}}
         Route r {hostnames: [a], rules: [{backendRefs: [{service: s}]}]}",
        "Service s {hold: {maxWait: 60s}}
         Route r {hostnames: [a], rules: [{timeouts: {request: 90s}, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW407",
        "spec.healthCheck.timeout",
        "Service s {healthCheck: {tcp: true, interval: 1s, timeout: 2s}}",
        "Service s {healthCheck: {tcp: true, interval: 2s, timeout: 1s}}",
    ),
    (
        "LW408",
        "spec.rungs[1]",
        r#"Zone a {}
         Zone b {}
         Service s {}
         Service t {}
         FallbackPolicy f {rungs: [{zone: {}}, {service: {service: t}}]}
         Route r {hostnames: [a], rules: [{fallback: f, backendRefs: [{service: s}]}]}"#,
        r#"Zone a {}
         Zone b {}
         Service s {}
         Service t {}
         FallbackPolicy f {rungs: [{zone: {}, deadlinePercent: 50}, {service: {service: t}}]}
         Route r {hostnames: [a], rules: [{fallback: f, backendRefs: [{service: s}]}]}"#,
    ),
    (
        "LW408",
        "spec.rungs[0]",
        "Service s {}
         Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung, limits: {callTimeout: 200ms}}
         FallbackPolicy f {rungs: [{plugin: {plugin: p}}]}
         Route r {hostnames: [a], rules: [{timeouts: {request: 1s}, fallback: f, backendRefs: [{service: s}]}]}",
        "Service s {}
         Plugin p {kind: Fallback, source: {file: /p}, onFault: NextRung, limits: {callTimeout: 50ms}}
         FallbackPolicy f {rungs: [{plugin: {plugin: p}}]}
         Route r {hostnames: [a], rules: [{timeouts: {request: 1s}, fallback: f, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW409",
        "spec.listeners[0].limits.idleTimeout",
        "Zone a {}
         Gateway g {zones: [a], trustedHops: 1, listeners: [{name: web, port: 80, protocol: HTTP, limits: {idleTimeout: 30s}}]}",
        "Zone a {}
         Gateway g {zones: [a], listeners: [{name: web, port: 80, protocol: HTTP, limits: {idleTimeout: 30s}}]}",
    ),
    (
        "LW410",
        "spec.rules[0].retry.retryOn",
        "Service s {}
         Route r {hostnames: [a], rules: [{retry: {retryOn: [GrpcUnavailable]}, backendRefs: [{service: s}]}]}",
        "Service s {protocol: HTTP2}
         Route r {hostnames: [a], rules: [{retry: {retryOn: [GrpcUnavailable]}, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW411",
        "spec.rules[0].retry",
        "ResiliencePolicy default {retryBudget: {percent: 0, minPerSecond: 0}}
         Service s {}
         Route r {hostnames: [a], rules: [{retry: {retryOn: [Reset]}, backendRefs: [{service: s}]}]}",
        "ResiliencePolicy default {retryBudget: {percent: 1, minPerSecond: 0}}
         Service s {}
         Route r {hostnames: [a], rules: [{retry: {retryOn: [Reset]}, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW421",
        "spec.rules[0].retry",
        r#"Service a!"lint.leeward.dev/calls":"b" {}
         Service b!"lint.leeward.dev/calls":"c" {}
         Service c {}
         Route a {hostnames: [a], rules: [{retry: {maxAttempts: 5}, backendRefs: [{service: a}]}]}
         Route b {hostnames: [b], rules: [{retry: {maxAttempts: 5}, backendRefs: [{service: b}]}]}
         Route c {hostnames: [c], rules: [{retry: {maxAttempts: 5}, backendRefs: [{service: c}]}]}"#,
        r#"Service a!"lint.leeward.dev/calls":"b" {}
         Service b!"lint.leeward.dev/calls":"c" {}
         Service c {}
         Route a {hostnames: [a], rules: [{retry: {maxAttempts: 1}, backendRefs: [{service: a}]}]}
         Route b {hostnames: [b], rules: [{retry: {maxAttempts: 1}, backendRefs: [{service: b}]}]}
         Route c {hostnames: [c], rules: [{retry: {maxAttempts: 5}, backendRefs: [{service: c}]}]}"#,
    ),
    (
        "LW421",
        "spec.rules[0].retry",
        r#"ResiliencePolicy default {retryBudget: {percent: 60}}
         Zone z {proxies: [{name: p, address: "10.0.0.1:1"}]}
         Service a {endpoints: [{address: "10.0.0.1:80", zone: z, proxy: p}]}
         Service b {endpoints: [{address: "10.0.0.1:81", zone: z}]}
         AuthorizationPolicy who {services: [b], action: Allow, rules: [{from: [{identities: ["spiffe://mesh.example/zone/z/proxy/p"]}]}]}
         Route a {hostnames: [a], rules: [{backendRefs: [{service: a}]}]}
         Route b {hostnames: [b], rules: [{backendRefs: [{service: b}]}]}"#,
        r#"ResiliencePolicy default {retryBudget: {percent: 60}}
         Zone z {proxies: [{name: p, address: "10.0.0.1:1"}]}
         Service a {endpoints: [{address: "10.0.0.1:80", zone: z, proxy: p}]}
         Service b {endpoints: [{address: "10.0.0.1:81", zone: z}]}
         Route a {hostnames: [a], rules: [{backendRefs: [{service: a}]}]}
         Route b {hostnames: [b], rules: [{backendRefs: [{service: b}]}]}"#,
    ),
    (
        "LW422",
        "spec.rules[0].timeouts.request",
        r#"Service a!"lint.leeward.dev/calls":"b" {}
         Service b {}
         Route a {hostnames: [a], rules: [{timeouts: {request: 2s}, backendRefs: [{service: a}]}]}
         Route b {hostnames: [b], rules: [{timeouts: {request: 5s}, backendRefs: [{service: b}]}]}"#,
        r#"Service a!"lint.leeward.dev/calls":"b" {}
         Service b {}
         Route a {hostnames: [a], rules: [{timeouts: {request: 5s}, backendRefs: [{service: a}]}]}
         Route b {hostnames: [b], rules: [{timeouts: {request: 2s}, backendRefs: [{service: b}]}]}"#,
    ),
    (
        "LW423",
        "metadata.labels",
        r#"Service a!"lint.leeward.dev/calls":"crat" {}
         Service cart {}"#,
        r#"Service a!"lint.leeward.dev/calls":"cart" {}
         Service cart {}"#,
    ),
    (
        "LW501",
        "spec.circuitBreaker",
        "ResiliencePolicy p {circuitBreaker: {failureRate: 0}}",
        "ResiliencePolicy p {circuitBreaker: {failureRate: 0, consecutiveFailures: 5}}",
    ),
    (
        "LW501",
        "spec.rules[0].circuitBreaker.minimumCalls",
        "Service s {}
         Route r {hostnames: [a], rules: [{rateLimits: [{requests: 1, burst: 1}], circuitBreaker: {minimumCalls: 100, window: 10s}, backendRefs: [{service: s}]}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{rateLimits: [{requests: 1, burst: 1}], circuitBreaker: {minimumCalls: 11, window: 10s}, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW502",
        "spec.rules[0].circuitBreaker.slowCallDuration",
        "Service s {}
         Route r {hostnames: [a], rules: [{timeouts: {request: 2s}, circuitBreaker: {slowCallRate: 50, slowCallDuration: 2s}, backendRefs: [{service: s}]}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{timeouts: {request: 2s}, circuitBreaker: {slowCallRate: 50, slowCallDuration: 1s}, backendRefs: [{service: s}]}]}",
    ),
    (
        "LW503",
        "spec.circuitBreaker.consecutiveFailures",
        "ResiliencePolicy p {circuitBreaker: {consecutiveFailures: 1}}",
        "ResiliencePolicy p {circuitBreaker: {consecutiveFailures: 2}}",
    ),
    (
        "LW504",
        "spec.circuitBreaker.mode",
        "ResiliencePolicy p {circuitBreaker: {mode: ForceOpen}}",
        "ResiliencePolicy p {circuitBreaker: {mode: Observe}}",
    ),
    (
        "LW505",
        "spec.connectionPool.maxPendingRequests",
        "Service s {connectionPool: {maxRequests: 10, maxPendingRequests: 11}}",
        "Service s {connectionPool: {maxRequests: 10, maxPendingRequests: 10}}",
    ),
    (
        "LW506",
        "spec.connectionPool.perCaller.maxRequests",
        "Service s {connectionPool: {maxRequests: 10, perCaller: {maxRequests: 10}}}",
        "Service s {connectionPool: {maxRequests: 10, perCaller: {maxRequests: 9}}}",
    ),
    (
        "LW506",
        "spec.connectionPool.maxRequests",
        "ResiliencePolicy default {adaptiveConcurrency: {minLimit: 20}}
         Service s {connectionPool: {maxRequests: 20}}",
        "ResiliencePolicy default {adaptiveConcurrency: {minLimit: 20}}
         Service s {connectionPool: {maxRequests: 21}}",
    ),
    (
        "LW507",
        "spec.outlierDetection.failurePercentage.minimumHosts",
        r#"Zone a {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}], outlierDetection: {failurePercentage: {minimumHosts: 2}}}"#,
        r#"Zone a {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}, {address: "10.0.0.2:80", zone: a}], outlierDetection: {failurePercentage: {minimumHosts: 2}}}"#,
    ),
    (
        "LW508",
        "spec.outlierDetection.maxEjectionPercent",
        "Service s {outlierDetection: {consecutive5xx: 3, maxEjectionPercent: 0}}",
        "Service s {outlierDetection: {consecutive5xx: 3}}",
    ),
    (
        "LW509",
        "spec.outlierDetection",
        r#"Zone a {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}], outlierDetection: {consecutive5xx: 3}}"#,
        r#"Zone a {}
         Service s {endpoints: [{address: "10.0.0.1:80", zone: a}]}"#,
    ),
    (
        "LW510",
        "spec.rules[0].rateLimits[1]",
        "Service s {}
         Route r {hostnames: [a], rules: [{rateLimits: [{requests: 10}, {requests: 1000, interval: 60s}], backendRefs: [{service: s}]}]}",
        "Service s {}
         Route r {hostnames: [a], rules: [{rateLimits: [{requests: 10}, {requests: 100, interval: 60s, burst: 100}], backendRefs: [{service: s}]}]}",
    ),
];

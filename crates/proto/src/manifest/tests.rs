use super::*;

const GOOD: &str = r#"
apiVersion: leeward.dev/v1
kind: Service
metadata: {name: cart, labels: {team: web}}
spec:
  protocol: HTTP2
  endpoints:
    - {address: "127.0.0.1:8080", zone: a, proxy: a1}
  connectTimeout: 250ms
  connectionPool: {maxIdlePerEndpoint: 0}
---
apiVersion: leeward.dev/v1
kind: FallbackPolicy
metadata: {name: feed}
spec:
  on: [Timeout]
  onStatuses: [503, 500]
  rungs:
    - plugin: {plugin: popular, config: '{"items": [1, 2]}'}
    - static: {status: 200, headers: [{name: X-A, value: "1"}], body: "no\nfeed"}
    - service: {service: cart}
---
---
apiVersion: leeward.dev/v1
kind: Route
metadata: {name: shop, revision: 7}
spec:
  hostnames: ["Shop.example", "*.shop.example", "*"]
  rules:
    - matches:
        - path: {prefix: /api/}
          method: GET
          headers: [{name: X-User, exact: "true"}, {name: x-b, present: false}]
      backendRefs: [{service: cart, weight: 0}, {service: cart2}]
      timeouts: {request: 0s}
      retry: {maxAttempts: 1}
      fallback: feed
---
apiVersion: leeward.dev/v1
kind: Plugin
metadata: {name: popular}
spec:
  kind: Fallback
  source: {file: /p.wasm}
  limits: {memory: 2MiB, callTimeout: 5ms}
  onFault: NextRung
---
apiVersion: leeward.dev/v1
kind: Zone
metadata: {name: a}
spec:
  failover: [b]
  proxies: [{name: a1, address: "127.0.0.1:15008"}]
  labels: {region: eu, power: ""}
  drain: {startTime: "2026-11-24T22:00:00Z", step: 20, interval: 30s, expireTime: "2026-11-24T23:00:00Z", reason: new switches}
---
apiVersion: leeward.dev/v1
kind: Zone
metadata: {name: far}
spec: {transport: Quic, transportWithin: Auto}
---
apiVersion: leeward.dev/v1
kind: Service
metadata: {name: whole}
spec:
  endpoints:
    - {address: "127.0.0.1:8080", zone: a, weight: 3, labels: {version: "2", tier: ""}}
  resilience: strict
  hold: {maxRequests: 0, maxWait: 10m}
  outlierDetection:
    consecutiveGatewayFailure: 3
    interval: 5s
    maxEjectionPercent: 0
    ejectionJitter: 0
    successRate: {minimumHosts: 3, requestVolume: 10, stdevFactor: 0}
    failurePercentage: {}
  connectionPool:
    maxPendingRequests: 10
    pendingTimeout: 20ms
    maxConnections: 7
    maxRetries: 2
    perCaller: {maxRequests: 4, header: X-Tenant}
  loadBalancer:
    policy: Maglev
    hashKey: {cookie: {name: session, ttl: 0s, path: /cart}}
    tableSize: 251
    hashBalanceFactor: 0
    panicThreshold: 0
    zoneFailover: {leaveBelow: 90, returnStep: 100, returnAfter: 0s, within: region}
  healthCheck: {http: {}, intervalJitter: 0}
---
apiVersion: leeward.dev/v1
kind: Service
metadata: {name: bare}
spec: {loadBalancer: {policy: RingHash, hashKey: {source: true}}, healthCheck: {tcp: true}}
---
apiVersion: leeward.dev/v1
kind: Service
metadata: {name: empty}
spec: {}
---
apiVersion: leeward.dev/v1
kind: Route
metadata: {name: careful}
spec:
  hostnames: ["a.example"]
  rules:
    - backendRefs: [{service: whole, subset: {version: "2"}}]
      timeouts: {request: 10s, backendRequest: 3s, idle: 0s}
      retry:
        maxAttempts: 3
        retryOn: [5xx, RetriableStatusCodes, Retriable4xx, GrpcUnavailable]
        retriableStatusCodes: [429]
        baseInterval: 10ms
        maxInterval: 1s
        retryNonIdempotent: true
        maxBody: 0
        hedge: {delay: 50ms}
      fallback: feed
      circuitBreaker: {}
      rateLimits:
        - {requests: 10}
        - {requests: 10, interval: 1m, burst: 20, key: {caller: true, maxKeys: 5}}
        - {requests: 10, key: {header: X-Key}}
        - {requests: 10, key: {}}
      priority: {default: High, header: X-Priority}
---
apiVersion: leeward.dev/v1
kind: ResiliencePolicy
metadata: {name: strict}
spec:
  circuitBreaker:
    failureRate: 0
    slowCallRate: 30
    slowCallDuration: 200ms
    consecutiveFailures: 5
    minimumCalls: 4
    window: 1m
    openTime: 2m
    maxOpenTime: 3h
    openJitter: 0
    halfOpenProbes: 1
    ramp: 0s
    mode: Observe
  endpointCircuitBreaker: {}
  retryBudget: {percent: 0, window: 30s, minPerSecond: 0}
  hedgeBudget: {}
  adaptiveConcurrency: {minRttJitter: 0, buffer: 0, maxLimit: 2}
  admissionControl: {rpsThreshold: 5}
  loadShedding: {low: 95}
---
apiVersion: leeward.dev/v1
kind: ResiliencePolicy
metadata: {name: default}
spec: {}
---
apiVersion: leeward.dev/v1
kind: CircuitOverride
metadata: {name: route-shop}
spec: {route: shop, mode: ForceOpen, expireTime: 2026-11-24T22:00:00.5Z, reason: "the till is on fire"}
---
apiVersion: leeward.dev/v1
kind: FeatureFlags
metadata: {name: shop}
spec:
  flags:
    recommendations:
      state: ENABLED
      variants: {on: true, off: false}
      defaultVariant: on
      targeting: {fractional: [[on, 90], [off, 10.5]]}
  $evaluators: {staff: {ends_with: [{var: peer}, /staff]}}
---
apiVersion: leeward.dev/v1
kind: Route
metadata: {name: degrades}
spec:
  hostnames: ["*"]
  rules:
    - when: {flag: new, variants: [on, half], targetingKeyHeader: X-User}
      enabled: {flag: recommendations, default: true}
      backendRefs: [{service: cart, when: {flag: canary}}, {service: whole}]
      cache: {defaultTtl: 5s, staleIfError: 0s, staleWhileRevalidate: 1s, maxBytes: 1MiB, maxObjectBytes: 2KiB, coalesce: false}
      fault: {percent: 10, delay: 20ms, abort: CircuitOpen, when: {flag: chaos}}
---
apiVersion: leeward.dev/v1
kind: FallbackPolicy
metadata: {name: ladder}
spec:
  on: [Disabled, CircuitOpen]
  reservePercent: 30
  rungs:
    - zone: {}
      causes: [ZoneDown, UpstreamStatus]
      deadlinePercent: 40
    - zone: {zones: [b]}
    - stale: {}
      methods: [GET]
    - stale: {maxStale: 1h}
    - plugin: {plugin: popular}
      when: {flag: popular}
    - static: {status: 200, template: true, headers: [{name: X-Of, value: "${request.path}"}], body: "{\"cause\": \"${cause}\"}"}
      causes: [PluginFault]
    - queue: {queue: orders}
      methods: [POST, PUT]
    - redirect: {location: "https://status.example/?of=${request.path}", status: 303}
    - fail: {status: 503}
---
apiVersion: leeward.dev/v1
kind: DegradationPolicy
metadata: {name: shop}
spec:
  levels:
    - {name: normal}
    - {name: reduced, flags: {recommendations: off}}
    - {name: core-only, flags: {recommendations: off}, shedBelow: High}
  routes: [shop]
  triggers:
    - {level: reduced, circuitOpen: cart}
    - {level: reduced, errorRate: {service: cart, above: 20, clearBelow: 0}, holdFor: 0s, scope: Mesh}
    - {level: core-only, latency: {service: cart, above: 1s}, minStay: 0s, maxStay: 1h}
    - {level: core-only, saturation: {service: cart, above: 120, clearBelow: 0}, clearAfter: 0s}
    - {level: core-only, burnRate: {service: cart, objective: 99900, clearBelow: 0}}
---
apiVersion: leeward.dev/v1
kind: DegradationOverride
metadata: {name: shop}
spec: {policy: shop, level: core-only, expireTime: 2026-11-24T22:00:00Z, reason: sale, zones: [a]}
---
apiVersion: leeward.dev/v1
kind: Queue
metadata: {name: orders}
spec: {}
---
apiVersion: leeward.dev/v1
kind: Queue
metadata: {name: orders2}
spec: {sqlite: {}, maxEntries: 5, maxBytes: 1TiB, maxEntryBytes: 1KiB, maxAge: 1s, maxAttempts: 0, keyHeader: X-User, baseInterval: 10ms, maxInterval: 20ms, maxConcurrency: 1, maxRate: 2, keepResults: 0s, maxDeadLetters: 3}
---
apiVersion: leeward.dev/v1
kind: Queue
metadata: {name: far}
spec: {jetstream: {servers: ["tls://nats.example:4222"], replicas: 3, credentialsFile: /etc/nats.creds}}
---
apiVersion: leeward.dev/v1
kind: Plugin
metadata: {name: auth}
spec:
  kind: Filter
  source: {oci: {image: "localhost:5000/shop/auth:1", refresh: 1m, insecure: true}, minisignKey: RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3}
  config: '{"realm": "shop"}'
  limits: {memory: 1MiB, callTimeout: 2ms, maxInstances: 4, maxBody: 64KiB, tableElements: 100, maxCalls: 0, logLines: 0, storeBytes: 0, storeEntries: 0}
  access: {services: [cart], imports: ["wasi:random/random", "leeward:plugin/*"]}
  onFault: FailClosed
  quarantine: {faults: 3, window: 10s, duration: 1m}
  freshInstance: true
  when: {flag: auth, default: true}
  canary: {source: {sha256: "0000000000000000000000000000000000000000000000000000000000000000"}, percent: 5, when: {flag: next}}
---
apiVersion: leeward.dev/v1
kind: Plugin
metadata: {name: old}
spec:
  kind: ProxyWasm
  source: {file: /old.wasm}
  access: {imports: [env.proxy_log, "env.*"]}
  onFault: FailOpen
  canary: {source: {file: /new.wasm}}
---
apiVersion: leeward.dev/v1
kind: Route
metadata: {name: filtered}
spec:
  hostnames: ["*"]
  rules:
    - backendRefs: [{service: cart}, {service: whole}]
      filters:
        - {plugin: auth}
        - {plugin: old, config: '{"a": 1}', when: {flag: old}}
      router: {plugin: nearest, config: "true"}
"#;

#[track_caller]
fn check(text: &str, want: &[&str]) {
    let errors = parse("f.yaml", text).unwrap_err();
    let lines: Vec<_> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(lines, want);
}

#[test]
fn what_is_written_is_read_and_can_be_written_again() {
    let resources = parse("f.yaml", GOOD).unwrap();
    assert_eq!(resources.len(), 24);
    for resource in resources {
        let text = to_yaml(&resource);
        assert_eq!(parse("again", &text), Ok(vec![resource.clone()]), "{text}");
        let model = crate::parse(&resource).unwrap();
        assert_eq!(crate::parse(&crate::render(&model)), Ok(model.clone()));
        let text = to_yaml(&crate::render(&model));
        let again = parse("again", &text).unwrap();
        assert_eq!(crate::parse(&again[0]), Ok(model), "{text}");
    }
}

#[test]
fn errors_name_place_field_value_and_remedy() {
    check(
        "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {name: Cart}\nspec:\n  conectTimeout: 5s\n",
        &["f.yaml:5:3: spec.conectTimeout: there is no such field; did you mean connectTimeout?"],
    );
    check(
        "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {name: Cart}\nspec:\n  connectTimeout: 5h\n",
        &[
            "f.yaml:3:12: metadata.name: \"Cart\" has 'C' at byte 0; a name is a-z, 0-9 and '-', with no '-' at either end",
            "f.yaml:5:3: spec.connectTimeout: 5h is out of range; want 1ms to 1m",
        ],
    );
    check(
        "apiVersion: leeward.dev/v1\nkind: Servce\nmetadata: {name: a}\nspec: {}\n",
        &["f.yaml:1:1: kind: \"Servce\" is not known; did you mean Service?"],
    );
    check(
        "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {transport: Quik}\n",
        &["f.yaml:4:19: spec.transport: \"Quik\" is not known; did you mean Quic?"],
    );
    check(
        "apiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {name: a}\nspec: {kind: Fallback, source: {file: /x}}\n",
        &["f.yaml:4:1: spec.onFault: is missing; say whether a fault of the plugin means NextRung or Fail"],
    );
    check(
        "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {name: a}\nspec:\n  connectTimeout: 5\n  endpoints: {}\n",
        &[
            "f.yaml:5:19: spec.connectTimeout: 5 has no unit; want one such as 250ms, 1.5s or 2m",
            "f.yaml:6:14: spec.endpoints: is a mapping; want a list",
        ],
    );
    check(
        "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {name: a}\nspec:\n  outlierDetection: {consecutive5xx: 0}\n",
        &["f.yaml:5:38: spec.outlierDetection.consecutive5xx: 0 is out of range; want at least 1"],
    );
}

#[test]
fn what_is_not_yaml_is_an_error_with_a_place() {
    let errors = parse("f.yaml", "a: [1\nb: 2").unwrap_err();
    assert!(errors[0].to_string().starts_with("f.yaml:2:"), "{}", errors[0]);
    assert!(
        parse("f.yaml", "a: 1\na: 2").unwrap_err()[0]
            .reason
            .contains("duplicated key")
    );
    assert_eq!(parse("f.yaml", ""), Ok(vec![]));
    assert_eq!(
        parse("f.yaml", "just text").unwrap_err()[0].reason,
        "is a text; want a mapping"
    );
}

#[test]
fn durations_are_read_as_they_are_written() {
    for text in ["0s", "1ms", "250ms", "1.5s", "90s", "2m", "1h", "0.0005s"] {
        assert_eq!(duration_text(parse_duration(text).unwrap()), text);
    }
    for bad in [
        "",
        "5",
        "s",
        "-1s",
        "1.s.s",
        "1 s",
        "1d",
        "9999999999999s",
        "1.1234567890s",
    ] {
        assert_eq!(parse_duration(bad), None, "{bad}");
    }
    assert_eq!(parse_size("16MiB"), Some(16 << 20));
    assert_eq!(parse_size("1TiB"), Some(1 << 40));
    assert_eq!(parse_size("99999999999TiB"), None);
    assert_eq!(parse_size("16MB"), None);
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,200}") {
            let _ = parse("f", &text);
        }

        #[test]
        fn no_document_makes_it_panic(
            kind in prop_oneof![Just("Zone"), Just("Service"), Just("Route"), Just("FallbackPolicy"), Just("Plugin"), Just("ResiliencePolicy"), Just("CircuitOverride"), Just("FeatureFlags"), Just("DegradationPolicy"), Just("DegradationOverride"), Just("Queue"), Just("AuthorizationPolicy"), Just("Gateway"), Just("RolloutPolicy"), Just("AccessPolicy"), Just("Workload")],
            field in "[a-zA-Z]{1,12}",
            value in "[-a-zA-Z0-9{}\\[\\]: ,\"']{0,40}",
        ) {
            let _ = parse("f", &format!("apiVersion: leeward.dev/v1\nkind: {kind}\nmetadata: {{name: a}}\nspec:\n  {field}: {value}\n"));
        }
    }
}

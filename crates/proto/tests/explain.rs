//! What is told of a request, from policy as people write it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use leeward_policy::{Staged, Viewer, World};
use leeward_proto::{explain, parse, v1};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

const POLICY: &str = r#"
{apiVersion: leeward.dev/v1, kind: Zone, metadata: {name: a}, spec: {failover: [b], proxies: [{name: a1, address: "10.0.0.1:1"}, {name: edge, address: "10.0.0.2:1"}]}}
---
{apiVersion: leeward.dev/v1, kind: Zone, metadata: {name: b}, spec: {proxies: [{name: b1, address: "10.1.0.1:1"}]}}
---
{apiVersion: leeward.dev/v1, kind: Service, metadata: {name: cart}, spec: {connectTimeout: 100ms, endpoints: [{address: "10.0.1.1:80", zone: a, proxy: a1}, {address: "10.1.1.1:80", zone: b, proxy: b1}], connectionPool: {maxRequests: 50}}}
---
{apiVersion: leeward.dev/v1, kind: Service, metadata: {name: cart-next}, spec: {connectTimeout: 100ms, endpoints: [{address: "10.0.1.2:80", zone: a}]}}
---
{apiVersion: leeward.dev/v1, kind: FeatureFlags, metadata: {name: f}, spec: {flags: {carts: {state: ENABLED, variants: {on: true, off: false}, defaultVariant: on, targeting: {if: [{"==": [{var: headers.x-drill}, "yes"]}, "off", null]}}}}}
---
{apiVersion: leeward.dev/v1, kind: DegradationPolicy, metadata: {name: shop}, spec: {routes: [cart], levels: [{name: normal}, {name: core, shedBelow: High}]}}
---
{apiVersion: leeward.dev/v1, kind: FallbackPolicy, metadata: {name: kept}, spec: {onStatuses: [503], reservePercent: 20, rungs: [{zone: {}, deadlinePercent: 50, methods: [GET]}, {static: {status: 200, body: "[]"}}]}}
---
{apiVersion: leeward.dev/v1, kind: Gateway, metadata: {name: web}, spec: {zones: [a], proxies: [edge], listeners: [{name: plain, port: 80, protocol: HTTP, hostname: shop.example}, {name: old, port: 81, protocol: HTTP, httpsRedirect: {port: 443}}]}}
---
{apiVersion: leeward.dev/v1, kind: Route, metadata: {name: cart}, spec: {hostnames: [cart.shop], rules: [{matches: [{path: {prefix: /items}, method: GET}], enabled: {flag: carts}, backendRefs: [{service: cart, weight: 3}, {service: cart-next}], timeouts: {request: 1s, backendRequest: 200ms}, rateLimits: [{requests: 10}], circuitBreaker: {}, fallback: kept}, {backendRefs: [{service: cart}]}]}}
---
{apiVersion: leeward.dev/v1, kind: Route, metadata: {name: shop}, spec: {hostnames: [shop.example], parentRefs: [{name: web}], rules: [{backendRefs: [{service: cart}]}]}}
---
{apiVersion: leeward.dev/v1, kind: AuthorizationPolicy, metadata: {name: carts}, spec: {services: [cart], action: Allow, rules: [{from: [{zones: [a]}]}]}}
"#;

fn ask(question: v1::Question) -> Result<v1::Explanation, String> {
    ask_with("", question)
}

fn ask_with(more: &str, question: v1::Question) -> Result<v1::Explanation, String> {
    let wire = leeward_proto::manifest::parse("policy", &format!("{POLICY}{more}"))
        .unwrap_or_else(|bad| panic!("{:?}", bad));
    let mut world = World::default();
    world.commit(Staged {
        upserts: wire.iter().map(|wire| Arc::new(parse(wire).unwrap())).collect(),
        ..Staged::default()
    });
    assert_eq!(
        world.quarantined().is_empty(),
        more.is_empty(),
        "{:?}",
        world.quarantined()
    );
    let own = |viewer: &Viewer| {
        Some(format!(
            "spiffe://mesh.example/zone/{}/proxy/{}",
            viewer.zone, viewer.proxy
        ))
    };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_796_083_200);
    explain(&world, &question, 7, now, own).map_err(|bad| format!("{}: {}", bad.path, bad.reason))
}

fn question(method: &str, host: &str, path: &str) -> v1::Question {
    v1::Question {
        method: method.to_owned(),
        host: host.to_owned(),
        path: path.to_owned(),
        ..v1::Question::default()
    }
}

fn lines(steps: &[v1::Step], out: &mut Vec<String>) {
    for step in steps {
        out.push(format!(
            "{}: {} [{} {}]",
            step.stage, step.says, step.resource, step.path
        ));
        lines(&step.steps, out);
    }
}

#[track_caller]
fn says(told: &v1::Explanation, wanted: &[&str]) {
    let mut all = Vec::new();
    lines(&told.steps, &mut all);
    for wanted in wanted {
        assert!(
            all.iter().any(|line| line.contains(wanted)),
            "{wanted} is not in {all:#?}"
        );
    }
}

fn fact<'a>(told: &'a v1::Explanation, stage: &str, name: &str) -> &'a str {
    let step = told.steps.iter().find(|step| step.stage == stage).unwrap();
    &step.facts.iter().find(|fact| fact.name == name).unwrap().value
}

#[test]
fn a_request_of_the_mesh_is_followed_to_its_end() {
    let told = ask(question("GET", "Cart.Shop:8080", "/items/7?full=1")).unwrap();
    assert_eq!((told.revision, &*told.zone, &*told.proxy), (7, "a", "a1"));
    assert_eq!(
        told.summary,
        "GET cart.shop/items/7 goes to cart (75 %), cart-next (25 %), by Route/cart rules[0]; answered within 1s at worst"
    );
    says(
        &told,
        &[
            "route: takes rules[0] of Route/cart [Route/cart spec.rules[0]]",
            "rule: not rules[1] of Route/cart: matches, too",
            "policy: allow: rules[0] of AuthorizationPolicy/carts matches [AuthorizationPolicy/carts spec.rules[0]]",
            "everybody may call Service/cart-next",
            "enabled: calls are made",
            "levels: no level sheds requests of priority normal",
            "rateLimit: at most 10 in 1s",
            "circuit: circuit of the rule opens after 50 % failed of 20 calls at least in 10s",
            "bulkhead: at most 50 under way",
            "Service/cart is asked in a, then b",
            "zone: zone a: 1 endpoints, straight",
            "zone: zone b: 1 endpoints, by the proxies in front of them",
            "retry: up to 3 attempts",
            "rung: rungs[0] one more attempt in another zone",
            "rung: rungs[1] answers 200 with 2 bytes [FallbackPolicy/kept spec.rungs[1]]",
        ],
    );
    // 3 attempts of 200 ms and pauses of 25 and 75 ms at most; a fifth of the second is the ladder's.
    assert_eq!(fact(&told, "worstCase", "attemptsTake"), "700ms");
    assert_eq!(fact(&told, "worstCase", "ladderHas"), "200ms");
    assert_eq!(fact(&told, "worstCase", "latency"), "1s");
}

#[test]
fn headers_flags_and_levels_count() {
    let mut drill = question("GET", "cart.shop", "/items");
    drill.headers.push(v1::QuestionHeader {
        name: "X-Drill".to_owned(),
        value: "yes".to_owned(),
    });
    let told = ask(drill.clone()).unwrap();
    assert!(
        told.summary
            .contains("is refused, unless the ladder answers: no call is made"),
        "{}",
        told.summary
    );
    drill.flags.insert("carts".to_owned(), "on".to_owned());
    assert!(ask(drill.clone()).unwrap().summary.contains("goes to cart"));
    drill.levels.insert("shop".to_owned(), "core".to_owned());
    let told = ask(drill.clone()).unwrap();
    assert!(
        told.summary
            .contains("shed: shop/core refuses requests of priority normal"),
        "{}",
        told.summary
    );
    drill.levels.insert("shop".to_owned(), "none".to_owned());
    assert_eq!(
        ask(drill).unwrap_err(),
        "levels: \"none\" is not a level of shop; want one of normal, core"
    );
}

#[test]
fn who_asks_decides() {
    let mut other = question("GET", "cart.shop", "/x");
    other.identity = "spiffe://mesh.example/zone/b/proxy/b1".to_owned();
    let told = ask(other.clone()).unwrap();
    assert!(
        told.summary
            .contains("is refused: 403, may not call Service/cart"),
        "{}",
        told.summary
    );
    says(
        &told,
        &["policy: deny: no rule of AuthorizationPolicy/carts matches"],
    );
    // The proxy of another zone has its own identity.
    let mut there = question("GET", "cart.shop", "/x");
    there.zone = "b".to_owned();
    let told = ask(there).unwrap();
    assert!(told.summary.contains("is refused"), "{}", told.summary);
    says(&told, &["Service/cart is asked in b, then a"]);
}

#[test]
fn a_client_from_outside_comes_by_a_gateway() {
    let mut outside = question("GET", "shop.example", "/");
    outside.gateway = "web/plain".to_owned();
    let told = ask(outside.clone()).unwrap();
    assert_eq!((&*told.zone, &*told.proxy), ("a", "edge"));
    says(
        &told,
        &[
            "listener: comes to web/plain",
            "may not call Service/cart without an identity",
        ],
    );
    assert!(told.summary.contains("401"), "{}", told.summary);
    assert!(
        told.findings.iter().any(|found| found.code == "LW807"),
        "{:?}",
        told.findings
    );
    // By the mesh it isn't reached.
    let told = ask(question("GET", "shop.example", "/")).unwrap();
    assert!(told.summary.contains("404"), "{}", told.summary);
    says(
        &told,
        &["not rules[0] of Route/shop: its route isn't for where the request comes in"],
    );
    outside.gateway = "web/old".to_owned();
    let told = ask(outside.clone()).unwrap();
    assert!(
        told.summary.contains("308 to https") || told.summary.contains("301 to https"),
        "{}",
        told.summary
    );
    outside.gateway = "web/none".to_owned();
    assert_eq!(
        ask(outside).unwrap_err(),
        "gateway: \"none\" is not a listener of Gateway/web; want one of plain, old"
    );
}

#[test]
fn a_bad_question_names_its_field() {
    let mut bad = question("GET", "cart.shop", "/");
    bad.claims = "[]".to_owned();
    assert_eq!(
        ask(bad).unwrap_err(),
        "claims: is not a JSON object, such as {\"sub\": \"ada\"}"
    );
    let mut bad = question("GET", "cart.shop", "/");
    bad.zone = "c".to_owned();
    assert_eq!(
        ask(bad).unwrap_err(),
        "zone: there is no Zone that fits \"c\"; want one of a, b"
    );
    let mut bad = question("GET", "cart.shop", "/");
    bad.path = "x".repeat(20_000);
    assert_eq!(
        ask(bad).unwrap_err(),
        "path: is 20000 bytes long; want at most 16384"
    );
}

#[test]
fn what_proxies_would_set_aside_is_told() {
    let more = "---\n{apiVersion: leeward.dev/v1, kind: Route, metadata: {name: a}, spec: {hostnames: [cart.shop], rules: [{backendRefs: [{service: gone}]}]}}\n";
    let told = ask_with(more, question("GET", "cart.shop", "/x")).unwrap();
    assert!(
        told.summary.contains("by Route/cart rules[1]"),
        "{}",
        told.summary
    );
    says(
        &told,
        &[
            "quarantined: 1 resources are refused",
            "Route/a: spec.rules[0].backendRefs[0].service: there is no Service/gone",
        ],
    );
}

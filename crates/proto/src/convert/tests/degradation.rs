//! What is refused of flags, ladders, levels and queues, and what it means where nothing is said.

use super::{check, check_rule};
use crate::manifest::{parse as read, to_json, to_yaml};
use crate::{parse, v1};
use leeward_policy::model::{
    Act, Cache, Cause, DegradationPolicy, FallbackPolicy, Fault, FlagCondition, Queue, QueueStore, Route,
    Rung, RungCause, Scope, Signal,
};
use leeward_policy::{Name, Spec};
use std::time::Duration;

const WANT_ON: &str = "want ConnectFailure, Timeout, Reset, NoEndpoint, Overflow, CircuitOpen, Overloaded, RateLimited, Disabled, AuthorizationDenied, IdentityMissing or AuthorizationUnknown";
const WANT_ABORT: &str = "want ConnectFailure, Timeout, Reset, NoEndpoint, Overloaded or CircuitOpen";

/// What is said of the rungs of a FallbackPolicy.
#[track_caller]
fn check_rungs(rungs: &str, want: &[&str]) {
    let want: Vec<_> = want.iter().map(|line| format!("spec.{line}")).collect();
    let want: Vec<_> = want.iter().map(String::as_str).collect();
    check("FallbackPolicy", &format!("{{rungs: [{rungs}]}}"), &want);
}

#[track_caller]
fn spec(kind: &str, spec: &str) -> Spec {
    let text = format!("apiVersion: leeward.dev/v1\nkind: {kind}\nmetadata: {{name: a}}\nspec: {spec}\n");
    parse(&read("f", &text).unwrap()[0]).unwrap().spec
}

#[test]
fn a_condition_names_a_flag_and_variants_each_once() {
    let long = "k".repeat(129);
    check_rule(
        &format!(
            "when: {{}}, enabled: {{flag: {long}, variants: [a, a, ''], targetingKeyHeader: leeward-x}}"
        ),
        &[
            "enabled.flag: is 129 bytes long; want a flag's key, 1 to 128 bytes",
            "enabled.targetingKeyHeader: leeward-x is set by the proxy; want a header that callers set, such as x-user",
            "enabled.variants[1]: a stands at spec.rules[0].enabled.variants[0] already; each must stand once",
            "enabled.variants[2]: is missing; want a variant's name, 1 to 128 bytes",
            "when.flag: is missing; want a flag's key, 1 to 128 bytes",
        ],
    );
    let many: Vec<_> = (0..33).map(|i| format!("v{i}")).collect();
    check_rule(
        &format!("when: {{flag: a, variants: [{}]}}", many.join(", ")),
        &["when.variants: has 33 entries; want 0 to 32"],
    );
    check(
        "Plugin",
        "{kind: Fallback, source: {file: /x}, onFault: Fail, when: {default: true}}",
        &["spec.when.flag: is missing; want a flag's key, 1 to 128 bytes"],
    );
}

#[test]
fn a_cache_is_bounded() {
    check_rule(
        "cache: {maxBytes: 1KiB, defaultTtl: 25h, staleIfError: 169h, staleWhileRevalidate: 25h}",
        &[
            "cache.defaultTtl: 25h is out of range; want 0s to 24h",
            "cache.maxBytes: 1024 is out of range; want 65536 to 4294967296",
            "cache.staleIfError: 169h is out of range; want 0s to 168h",
            "cache.staleWhileRevalidate: 25h is out of range; want 0s to 24h",
        ],
    );
    check_rule(
        "cache: {maxBytes: 64KiB, maxObjectBytes: 65KiB}",
        &["cache.maxObjectBytes: 66560 is out of range; want 1024 to 65536"],
    );
    check_rule(
        "cache: {maxBytes: 0, maxObjectBytes: 0}",
        &[
            "cache.maxBytes: 0 is out of range; want at least 1",
            "cache.maxObjectBytes: 0 is out of range; want at least 1",
        ],
    );
    check_rule("cache: {maxBytes: 64KiB}", &[]);
}

#[test]
fn a_fault_does_something_that_a_call_can_run_into() {
    check_rule(
        "fault: {percent: 50}",
        &["fault: does nothing; want one of delay, abort, or both"],
    );
    check_rule(
        "fault: {percent: 101, delay: 61m, abort: PluginFault, when: {}}",
        &[
            &format!("fault.abort: PluginFault can't be injected; {WANT_ABORT}"),
            "fault.delay: 61m is out of range; want 1ms to 1h",
            "fault.percent: 101 is out of range; want 1 to 100",
            "fault.when.flag: is missing; want a flag's key, 1 to 128 bytes",
        ],
    );
    for cause in [
        "Overflow",
        "UpstreamStatus",
        "RateLimited",
        "Disabled",
        "ZoneDown",
    ] {
        check_rule(
            &format!("fault: {{abort: {cause}}}"),
            &[&format!("fault.abort: {cause} can't be injected; {WANT_ABORT}")],
        );
    }
}

#[test]
fn what_leads_to_a_ladder_is_less_than_what_a_rung_is_for() {
    check(
        "FallbackPolicy",
        "{on: [ZoneDown, PluginFault, UpstreamStatus, Disabled, Disabled], reservePercent: 91, rungs: [{fail: {}}]}",
        &[
            &format!("spec.on[0]: ZoneDown is only for a rung's causes; {WANT_ON}"),
            &format!("spec.on[1]: PluginFault is only for a rung's causes; {WANT_ON}"),
            "spec.on[2]: UpstreamStatus is set by onStatuses; list the statuses there",
            "spec.on[4]: stands twice; each cause must stand once",
            "spec.reservePercent: 91 is out of range; want 1 to 90",
        ],
    );
    check_rungs(
        "{fail: {}, causes: [UpstreamStatus, ZoneDown, PluginFault, Disabled]}",
        &[],
    );
    check_rungs(
        "{fail: {}, causes: [Timeout, Timeout], methods: [get, PUT, PUT], deadlinePercent: 101, when: {}}",
        &[
            "rungs[0].causes[1]: stands twice; each cause must stand once",
            "rungs[0].deadlinePercent: 101 is out of range; want 1 to 100",
            "rungs[0].methods[0]: \"get\" is not a method; want upper case, such as GET",
            "rungs[0].methods[2]: PUT stands at spec.rungs[0].methods[1] already; each must stand once",
            "rungs[0].when.flag: is missing; want a flag's key, 1 to 128 bytes",
        ],
    );
}

#[test]
fn each_rung_does_one_thing_that_can_be_done() {
    check_rungs(
        "{}",
        &["rungs[0]: is empty; want one of plugin, static, service, zone, stale, queue, redirect, fail"],
    );
    check_rungs(
        "{stale: {}, fail: {}}",
        &[
            "rungs[0]: has more than one of plugin, static, service, zone, stale, queue, redirect, fail; want one",
        ],
    );
    check_rungs(
        "{zone: {zones: [b, B, b]}}, {stale: {maxStale: 500ms}}, {queue: {}}, {service: {}}, {fail: {status: 200}}",
        &[
            "rungs[0].zone.zones[1]: \"B\" has 'B' at byte 0; a name is a-z, 0-9 and '-', with no '-' at either end",
            "rungs[0].zone.zones[2]: b stands at spec.rungs[0].zone.zones[0] already; each must stand once",
            "rungs[1].stale.maxStale: 500ms is out of range; want 1s to 168h",
            "rungs[2].queue.queue: is missing; a name is 1 to 63 bytes of a-z, 0-9 and '-'",
            "rungs[3].service.service: is missing; a name is 1 to 63 bytes of a-z, 0-9 and '-'",
            "rungs[4].fail.status: 200 is out of range; want 400 to 599",
        ],
    );
}

#[test]
fn what_comes_after_a_rung_that_ends_every_ladder_is_refused() {
    check_rungs(
        "{fail: {}}, {stale: {}}",
        &[
            "rungs[0].fail: ends the ladder for every request, so that later rungs are never tried; want it last, or with causes, methods or when",
        ],
    );
    check_rungs("{stale: {}}, {fail: {}}", &[]);
    for some in ["causes: [Timeout]", "methods: [POST]", "when: {flag: a}"] {
        check_rungs(&format!("{{fail: {{}}, {some}}}, {{stale: {{}}}}"), &[]);
    }
}

#[test]
fn templates_are_read_and_their_fixed_parts_fit_where_they_stand() {
    let unknown = "want request.method, request.path, request.query, request.host, request.header.NAME, cause, route, service or zone";
    check_rungs(
        r#"{static: {status: 200, template: true, body: "${request.body}", headers: [{name: x-a, value: "a $ b"}, {name: x-b, value: "${cause"}, {name: x-c, value: "a\n${cause}"}, {name: leeward-x, value: "${cause} "}]}}"#,
        &[
            &format!("rungs[0].static.body: ${{request.body}} is not known; {unknown}"),
            "rungs[0].static.headers[0].value: has a single $; want $$ for a dollar sign",
            "rungs[0].static.headers[1].value: has ${ without its }",
            "rungs[0].static.headers[2].value: is not a header value; want at most 8 KiB with no line breaks, no control characters and no spaces at its ends",
            "rungs[0].static.headers[3].name: leeward-x is set by the proxy; leave it out",
            "rungs[0].static.headers[3].value: is not a header value; want at most 8 KiB with no line breaks, no control characters and no spaces at its ends",
        ],
    );
    // Without `template` nothing is one.
    check_rungs(
        r#"{static: {status: 200, body: "${request.body}", headers: [{name: x-a, value: "5 $"}]}}"#,
        &[],
    );
    check_rungs(
        r#"{redirect: {}}, {redirect: {location: "https://a.example/a b", status: 304}}, {redirect: {location: "${request.path}"}}, {redirect: {location: "ftp://a.example"}}, {redirect: {location: "https://${request.host}/"}}, {redirect: {location: "https://a.example${request.query}"}}, {redirect: {location: "/${request.path}"}}, {redirect: {location: "//a.example/"}}, {redirect: {location: "/x?${request.body}"}}"#,
        &[
            "rungs[0].redirect.location: is missing; want a path or a URL, such as https://status.example/",
            "rungs[1].redirect.location: \"https://a.example/a b\" is not a path or a URL; want at most 8 KiB of the characters that a URL has, others percent-encoded",
            "rungs[1].redirect.status: 304 is not a redirection; want 301, 302, 303, 307 or 308",
            "rungs[2].redirect.location: \"${request.path}\" leaves open where it leads; want one that begins with /PATH, http://HOST/ or https://HOST/",
            "rungs[3].redirect.location: \"ftp://a.example\" leaves open where it leads; want one that begins with /PATH, http://HOST/ or https://HOST/",
            "rungs[4].redirect.location: \"https://${request.host}/\" leaves open where it leads; want one that begins with /PATH, http://HOST/ or https://HOST/",
            "rungs[5].redirect.location: \"https://a.example${request.query}\" leaves open where it leads; want one that begins with /PATH, http://HOST/ or https://HOST/",
            "rungs[6].redirect.location: \"/${request.path}\" leaves open where it leads; want one that begins with /PATH, http://HOST/ or https://HOST/",
            "rungs[7].redirect.location: \"//a.example/\" leaves open where it leads; want one that begins with /PATH, http://HOST/ or https://HOST/",
            &format!("rungs[8].redirect.location: ${{request.body}} is not known; {unknown}"),
        ],
    );
    check_rungs(
        r#"{redirect: {location: "/sorry?of=${request.path}"}}, {redirect: {location: "https://a.example${request.path}"}}"#,
        &[],
    );
}

#[test]
fn levels_are_some_and_triggers_ask_for_one_of_them() {
    check(
        "DegradationPolicy",
        "{levels: [{name: normal}]}",
        &["spec.levels: has 1 entries; want 2 to 8"],
    );
    check(
        "DegradationPolicy",
        "{levels: [{name: normal}, {name: normal}, {name: b, flags: {x: ''}, shedBelow: Nrmal}], routes: [r, r]}",
        &["spec.levels[2].shedBelow: \"Nrmal\" is not known; did you mean Normal?"],
    );
    check(
        "DegradationPolicy",
        "{levels: [{name: normal}, {name: normal}, {name: b, flags: {x: ''}}], routes: [r, r]}",
        &[
            "spec.levels[1].name: normal stands at spec.levels[0] already; each must stand once",
            "spec.levels[2].flags.x: is missing; want a variant's name, 1 to 128 bytes",
            "spec.routes[1]: r stands at spec.routes[0] already; each must stand once",
        ],
    );
    check(
        "DegradationPolicy",
        "{levels: [{name: normal}, {name: reduced}, {name: core-only}], triggers: [{circuitOpen: s}, {level: normal, circuitOpen: s}, {level: redced, circuitOpen: s}, {level: reduced}]}",
        &[
            "spec.triggers[0].level: is missing; want reduced or core-only",
            "spec.triggers[1].level: normal is the level that holds when nothing is wrong; want reduced or core-only",
            "spec.triggers[2].level: \"redced\" is not one of spec.levels; want reduced or core-only",
            "spec.triggers[3]: looks at nothing; want one of circuitOpen, errorRate, latency, saturation, burnRate",
        ],
    );
    check(
        "DegradationPolicy",
        "{levels: [{name: a}, {name: b}], triggers: [{level: b, circuitOpen: s, saturation: {service: s, above: 1}}]}",
        &[
            "spec.triggers[0]: has more than one of circuitOpen, errorRate, latency, saturation, burnRate; want one",
        ],
    );
}

/// What is said of a trigger.
#[track_caller]
fn check_trigger(trigger: &str, want: &[&str]) {
    let spec = format!("{{levels: [{{name: a}}, {{name: b}}], triggers: [{{level: b, {trigger}}}]}}");
    let want: Vec<_> = want
        .iter()
        .map(|line| format!("spec.triggers[0].{line}"))
        .collect();
    check(
        "DegradationPolicy",
        &spec,
        &want.iter().map(String::as_str).collect::<Vec<_>>(),
    );
}

#[test]
fn a_signal_clears_at_or_below_its_mark() {
    check_trigger(
        "errorRate: {service: S, window: 11m, minimumCalls: 1000001}",
        &[
            "errorRate.above: is missing; want 1 to 100",
            "errorRate.minimumCalls: 1000001 is out of range; want 1 to 1000000",
            "errorRate.service: \"S\" has 'S' at byte 0; a name is a-z, 0-9 and '-', with no '-' at either end",
            "errorRate.window: 11m is out of range; want 1s to 10m",
        ],
    );
    check_trigger(
        "errorRate: {service: s, above: 20, clearBelow: 21}",
        &["errorRate.clearBelow: 21 is out of range; want 0 to 20"],
    );
    check_trigger("errorRate: {service: s, above: 20, clearBelow: 20}", &[]);
    check_trigger(
        "latency: {service: s, percentile: 100}",
        &[
            "latency.above: is missing; want 1ms to 1h",
            "latency.percentile: 100 is out of range; want 1 to 99",
        ],
    );
    check_trigger(
        "latency: {service: s, above: 1s, clearBelow: 1.1s}",
        &["latency.clearBelow: 1.1s is out of range; want 0s to 1s"],
    );
    check_trigger(
        "saturation: {service: s, above: 1001, clearBelow: 1002}",
        &[
            "saturation.above: 1001 is out of range; want 1 to 1000",
            "saturation.clearBelow: 1002 is out of range; want 0 to 1000",
        ],
    );
    check_trigger(
        "burnRate: {service: s, above: 9, longWindow: 7h, shortWindow: 500ms}",
        &[
            "burnRate.above: 9 is out of range; want 10 to 10000",
            "burnRate.longWindow: 7h is out of range; want 1m to 6h",
            "burnRate.objective: is missing; want 50000 to 99999",
            "burnRate.shortWindow: 500ms is out of range; want 1s to 6h",
        ],
    );
    check_trigger(
        "burnRate: {service: s, objective: 99900, longWindow: 10m, shortWindow: 11m}",
        &["burnRate.shortWindow: 11m is out of range; want 1s to 10m"],
    );
    check_trigger(
        "circuitOpen: s, holdFor: 61m, clearAfter: 25h, minStay: 25h, maxStay: 169h, scope: Zne",
        &["scope: \"Zne\" is not known; did you mean Zone?"],
    );
    check_trigger(
        "circuitOpen: s, holdFor: 61m, clearAfter: 25h, minStay: 25h, maxStay: 169h",
        &[
            "clearAfter: 25h is out of range; want 0s to 24h",
            "holdFor: 61m is out of range; want 0s to 1h",
            "maxStay: 169h is out of range; want 1s to 168h",
            "minStay: 25h is out of range; want 0s to 24h",
        ],
    );
}

#[test]
fn an_override_says_what_how_long_and_where() {
    check(
        "DegradationOverride",
        &format!("{{zones: [a, a], reason: {}}}", "r".repeat(257)),
        &[
            "spec.expireTime: is missing; say when it ends, such as 2026-11-24T22:00:00Z",
            "spec.level: is missing; a name is 1 to 63 bytes of a-z, 0-9 and '-'",
            "spec.policy: is missing; a name is 1 to 63 bytes of a-z, 0-9 and '-'",
            "spec.reason: is 257 bytes long; want at most 256",
            "spec.zones[1]: a stands at spec.zones[0] already; each must stand once",
        ],
    );
}

#[test]
fn a_queue_is_bounded_and_its_servers_are_named() {
    check(
        "Queue",
        "{maxEntries: 10000001, maxBytes: 2TiB, maxEntryBytes: 17MiB, maxAge: 721h, maxAttempts: 10001, keyHeader: leeward-x, maxConcurrency: 1001, maxRate: 1000001, keepResults: 721h, maxDeadLetters: 10000001}",
        &[
            "spec.keepResults: 721h is out of range; want 0s to 720h",
            "spec.keyHeader: leeward-x is set by the proxy; want a header that callers set, such as x-user",
            "spec.maxAge: 721h is out of range; want 1s to 720h",
            "spec.maxAttempts: 10001 is out of range; want 0 to 10000",
            "spec.maxBytes: 2199023255552 is out of range; want 65536 to 1099511627776",
            "spec.maxConcurrency: 1001 is out of range; want 1 to 1000",
            "spec.maxDeadLetters: 10000001 is out of range; want 1 to 10000000",
            "spec.maxEntries: 10000001 is out of range; want 1 to 10000000",
            "spec.maxEntryBytes: 17825792 is out of range; want 1024 to 16777216",
            "spec.maxRate: 1000001 is out of range; want 1 to 1000000",
        ],
    );
    check(
        "Queue",
        "{maxBytes: 64KiB, maxEntryBytes: 65KiB, baseInterval: 2m, maxInterval: 1m, jetstream: {}}",
        &[
            "spec.jetstream.servers: has 0 entries; want 1 to 16",
            "spec.maxEntryBytes: 66560 is out of range; want 1024 to 65536",
            "spec.maxInterval: 1m is out of range; want 2m to 24h",
        ],
    );
    check(
        "Queue",
        "{maxEntries: 0}",
        &["spec.maxEntries: 0 is out of range; want at least 1"],
    );
    check(
        "Queue",
        "{sqlite: {}, jetstream: {}}",
        &["spec: has more than one of sqlite, jetstream; want one"],
    );
    let server = |i: usize, text: &str| {
        format!(
            "spec.jetstream.servers[{i}]: {text:?} is not a NATS server; want HOST:PORT, nats://HOST:PORT or tls://HOST:PORT, without a user or a path"
        )
    };
    check(
        "Queue",
        "{jetstream: {servers: ['http://a:1', 'a', 'a:0', 'nats://me:secret@a:1', 'nats://a:1/x', 'nats://', 'a:+1', '[::1:1'], replicas: 6, credentialsFile: creds}}",
        &[
            "spec.jetstream.credentialsFile: \"creds\" is not an absolute path, such as /etc/leeward/nats.creds",
            "spec.jetstream.replicas: 6 is out of range; want 1 to 5",
            &server(0, "http://a:1"),
            &server(1, "a"),
            &server(2, "a:0"),
            &server(3, "nats://me:secret@a:1"),
            &server(4, "nats://a:1/x"),
            &server(5, "nats://"),
            &server(6, "a:+1"),
            &server(7, "[::1:1"),
        ],
    );
    check(
        "Queue",
        "{jetstream: {servers: ['a:1', 'nats://a:1']}}",
        &[
            "spec.jetstream.servers[1]: nats://a:1 stands at spec.jetstream.servers[0] already; each must stand once",
        ],
    );
}

#[test]
fn servers_without_a_scheme_have_that_of_nats() {
    let read = spec(
        "Queue",
        "{jetstream: {servers: ['a.example:4222', '[::1]:4222', '10.0.0.1:1', 'tls://a.example']}}",
    );
    let Spec::Queue(queue) = read else { unreachable!() };
    let QueueStore::JetStream {
        servers, replicas, ..
    } = queue.store
    else {
        unreachable!()
    };
    let want = [
        "nats://a.example:4222",
        "nats://[::1]:4222",
        "nats://10.0.0.1:1",
        "tls://a.example",
    ];
    assert_eq!(servers, want.map(Box::from));
    assert_eq!(replicas, 1);
}

#[test]
fn what_is_not_said_is_what_the_contract_says() {
    assert_eq!(spec("Queue", "{}"), Spec::Queue(Queue::DEFAULT));
    assert_eq!(spec("Queue", "{sqlite: {}}"), Spec::Queue(Queue::DEFAULT));

    let rule = "{hostnames: ['*'], rules: [{backendRefs: [{service: s}], cache: {}, fault: {delay: 1s}, when: {flag: f}}]}";
    let Spec::Route(Route { rules, .. }) = spec("Route", rule) else {
        unreachable!()
    };
    assert_eq!(rules[0].cache, Some(Cache::DEFAULT));
    assert_eq!(rules[0].when, Some(FlagCondition::is_true("f")));
    let fault = Fault {
        percent: 100,
        delay: Some(Duration::from_secs(1)),
        abort: None,
        when: None,
    };
    assert_eq!(rules[0].fault, Some(fault));

    let Spec::FallbackPolicy(policy) = spec("FallbackPolicy", "{rungs: [{fail: {}}]}") else {
        unreachable!()
    };
    assert_eq!(policy.on, Cause::DEFAULT);
    assert!(policy.on.contains(&Cause::Disabled));
    assert_eq!(policy.reserve_percent, FallbackPolicy::RESERVE_PERCENT);
    assert_eq!(policy.rungs, [Rung::new(Act::Fail { status: None })]);

    let text = "{levels: [{name: normal}, {name: reduced}], triggers: [
        {level: reduced, errorRate: {service: s, above: 25}},
        {level: reduced, latency: {service: s, above: 1s}},
        {level: reduced, saturation: {service: s, above: 90}},
        {level: reduced, burnRate: {service: s, objective: 99900}}]}";
    let Spec::DegradationPolicy(DegradationPolicy { triggers, .. }) = spec("DegradationPolicy", text) else {
        unreachable!()
    };
    let seconds = Duration::from_secs;
    let service = Name::parse("s").unwrap();
    let signals: Vec<_> = triggers.iter().map(|trigger| trigger.signal.clone()).collect();
    let want = [
        Signal::ErrorRate {
            service: service.clone(),
            above: 25,
            clear_below: 12,
            window: seconds(30),
            minimum_calls: 20,
        },
        Signal::Latency {
            service: service.clone(),
            percentile: 95,
            above: seconds(1),
            clear_below: Duration::from_millis(800),
            window: seconds(30),
            minimum_calls: 20,
        },
        Signal::Saturation {
            service: service.clone(),
            above: 90,
            clear_below: 72,
        },
        Signal::BurnRate {
            service,
            objective: 99_900,
            above: 144,
            clear_below: 72,
            long_window: seconds(3600),
            short_window: seconds(300),
            minimum_calls: 20,
        },
    ];
    assert_eq!(signals, want);
    let first = &triggers[0];
    assert_eq!((first.level, first.scope, first.max_stay), (1, Scope::Zone, None));
    let times = (first.hold_for, first.clear_after, first.min_stay);
    assert_eq!(times, (seconds(10), seconds(60), seconds(60)));
}

#[test]
fn words_that_only_the_wire_can_get_wrong_are_refused_as_well() {
    let rung = v1::Rung {
        kind: Some(v1::rung::Kind::Fail(v1::FailRung::default())),
        causes: vec![99],
        ..v1::Rung::default()
    };
    let policy = v1::FallbackPolicy {
        on: vec![0],
        rungs: vec![rung],
        ..v1::FallbackPolicy::default()
    };
    let wire = v1::Resource {
        metadata: Some(v1::Metadata {
            name: "a".to_owned(),
            ..v1::Metadata::default()
        }),
        spec: Some(v1::resource::Spec::FallbackPolicy(policy)),
        ..v1::Resource::default()
    };
    let lines: Vec<_> = parse(&wire)
        .unwrap_err()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        lines,
        [
            format!("spec.on[0]: 0 is not known; {WANT_ON}"),
            "spec.rungs[0].causes[0]: 99 is not known; want ConnectFailure, Timeout, Reset, NoEndpoint, Overflow, UpstreamStatus, CircuitOpen, Overloaded, RateLimited, Disabled, ZoneDown, PluginFault, AuthorizationDenied, IdentityMissing or AuthorizationUnknown".to_owned(),
        ]
    );
}

#[test]
fn a_broken_document_of_flags_is_told_field_by_field() {
    check(
        "FeatureFlags",
        "{flags: {a: {state: ON, variants: {on: true}}, b: {state: ENABLED, variants: {on: true}, defaultVariant: off}, c.d: 5}}",
        &[
            r#"spec.flags.a.state: is "ON"; expected "ENABLED" or "DISABLED""#,
            r#"spec.flags.b.defaultVariant: is "off"; expected one of the variants, on, or null"#,
            "spec.flags.c.d: is a number; expected an object",
        ],
    );
    check(
        "FeatureFlags",
        "{}",
        &["spec.flags: is missing; expected an object of flags"],
    );
    check("FeatureFlags", "[]", &["spec: is a list; want a mapping"]);
    check(
        "FeatureFlags",
        "{flags: {}, metadata: {ratio: .inf}}",
        &["spec.metadata.ratio: inf is not a number of JSON; want a finite one"],
    );
    check(
        "FeatureFlags",
        "{flags: {a: {state: ENABLED, variants: {true: 1}}}}",
        &["spec.flags.a.variants: has a key that is not a text; put it in quotes"],
    );
}

#[test]
fn a_mistake_in_flags_has_its_place_in_the_file() {
    let text = "apiVersion: leeward.dev/v1\nkind: FeatureFlags\nmetadata: {name: a}\nspec:\n  flags:\n    x.y:\n      state: ENABLED\n      variants: {on: true}\n      defaultVariant: off\n";
    let errors = read("f.yaml", text).unwrap_err();
    let lines: Vec<_> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        ["f.yaml:9:7: spec.flags.x.y.defaultVariant: is \"off\"; expected one of the variants, on, or null"]
    );
}

#[test]
fn flags_keep_every_kind_of_value_in_both_shapes() {
    let text = "apiVersion: leeward.dev/v1
kind: FeatureFlags
metadata: {name: a}
spec:
  $schema: https://flagd.dev/schema/v0/flags.json
  flags:
    limits:
      state: ENABLED
      variants: {low: {rate: 0.5, burst: 2, hosts: [a, null], soft: true}, none: {}}
      defaultVariant: low
      targeting: {if: [{'==': [{var: zone}, b]}, none, null]}
";
    let document = r#"{"$schema":"https://flagd.dev/schema/v0/flags.json","flags":{"limits":{"defaultVariant":"low","state":"ENABLED","targeting":{"if":[{"==":[{"var":"zone"},"b"]},"none",null]},"variants":{"low":{"burst":2,"hosts":["a",null],"rate":0.5,"soft":true},"none":{}}}}}"#;
    let wire = read("f", text).unwrap();
    let Some(v1::resource::Spec::FeatureFlags(flags)) = &wire[0].spec else {
        unreachable!()
    };
    assert_eq!(flags.document, document);
    let shown = &to_json(&wire[0])["spec"];
    assert_eq!(shown["flags"]["limits"]["variants"]["low"]["rate"], 0.5);
    assert_eq!(shown.to_string(), document);
    assert_eq!(read("again", &to_yaml(&wire[0])), Ok(wire));
}

#[test]
fn a_document_that_is_no_json_or_too_large_is_refused() {
    let parsed = |document: &str| {
        let wire = v1::Resource {
            metadata: Some(v1::Metadata {
                name: "a".to_owned(),
                ..v1::Metadata::default()
            }),
            spec: Some(v1::resource::Spec::FeatureFlags(v1::FeatureFlags {
                document: document.to_owned(),
            })),
            ..v1::Resource::default()
        };
        parse(&wire)
            .unwrap_err()
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        parsed("{"),
        ["spec.document: is no JSON: EOF while parsing an object at line 1 column 1"]
    );
    assert_eq!(
        parsed(&" ".repeat((1 << 20) + 1)),
        ["spec.document: is 1048577 bytes long; at most 1048576 are read"]
    );
}

#[test]
fn a_rung_may_be_for_what_does_not_lead_to_a_ladder() {
    let text = "{rungs: [{zone: {}, causes: [ZoneDown, UpstreamStatus]}]}";
    let Spec::FallbackPolicy(policy) = spec("FallbackPolicy", text) else {
        unreachable!()
    };
    assert_eq!(
        policy.rungs[0].causes,
        [RungCause::ZoneDown, RungCause::Of(Cause::UpstreamStatus)]
    );
}

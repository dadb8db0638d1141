//! What is read of cases, and what is refused.

use super::*;

fn read_text(text: &str, kind: PluginKind) -> Result<Vec<Case>, Bad> {
    yaml::parse(text, |root| cases(root, kind))
}

#[test]
fn a_case_is_read_as_it_is_written() {
    let text = r#"
config: {a: 1}
services: [catalog]
limits: {memory: 4MiB, callTimeout: 20ms}
context: {zone: z, timeLeft: 1s}
cases:
  - name: one
    request: {method: POST, path: /a?b=c, headers: {x-many: ["1", "2"]}, json: {n: 1}}
    failure:
      cause: UpstreamStatus
      attempts: [{endpoint: "10.0.0.1:80", status: 503, duration: 2ms}, {cause: Timeout}]
      stale: {status: 203, body: old, age: 9s}
    flags: {on: true, n: 1.5, s: text, o: {a: b}}
    store: {list: [1], text: abc}
    calls: [{service: catalog, delay: 1ms, error: Timeout}, {service: catalog, json: []}]
    context: {peer: null, address: "10.0.0.9:1"}
    expect: {decline: true, maxTime: 1ms, maxMemory: 2MiB, counters: {n: 1}, calls: []}
  - {name: two, config: plain, services: [], expect: {stale: true}}
"#;
    let cases = read_text(text, PluginKind::Fallback).unwrap();
    let [one, two] = cases.as_slice() else {
        panic!("{cases:?}")
    };
    assert_eq!(one.setup.config, r#"{"a":1}"#);
    assert_eq!(one.setup.limits.memory_bytes, 4 << 20);
    assert_eq!(one.setup.limits.call_timeout, Duration::from_millis(20));
    assert_eq!(one.request.method, Method::POST);
    assert_eq!(one.request.headers.get_all("x-many").iter().count(), 2);
    assert_eq!(one.request.body.concat(), br#"{"n":1}"#);
    assert_eq!(one.failure.cause, Cause::UpstreamStatus);
    assert_eq!(one.failure.attempts[0].status, Some(503));
    assert_eq!(one.failure.attempts[1].cause, Some(Cause::Timeout));
    let kept = one.failure.kept.as_ref().unwrap();
    assert_eq!((kept.reply.status.as_u16(), kept.age.as_secs()), (203, 9));
    assert_eq!(one.flags["on"], FlagValue::Boolean(true));
    assert_eq!(one.flags["o"], FlagValue::Structure(r#"{"a":"b"}"#.to_owned()));
    assert_eq!(
        one.store,
        [
            ("list".to_owned(), "[1]".into()),
            ("text".to_owned(), "abc".into())
        ]
    );
    assert!(matches!(one.calls[0].answer, Err(CallError::Timeout)));
    assert_eq!(
        (one.context.zone.as_str(), one.context.peer.as_deref()),
        ("z", None)
    );
    assert_eq!(one.expect.calls.as_ref().unwrap().len(), 0);
    assert_eq!(one.expect.max_memory, Some(2 << 20));
    assert_eq!(two.setup.config, "plain");
    assert_eq!(two.context.time_left, Duration::from_secs(1));
}

#[test]
fn what_is_wrong_is_named_with_its_line_its_case_and_its_field() {
    use PluginKind::{Fallback, Filter, Router, WasiHttp};
    for (kind, text, line, why) in [
        (Fallback, "cases: [", 2, "is not YAML"),
        (Fallback, "case: []", 1, "case: is no field; want module, config"),
        (Fallback, "module: x", 1, "want cases, a list"),
        (Fallback, "cases: []", 1, "cases: want 1 to 1000 cases"),
        (Fallback, "cases:\n  - {}", 2, "cases[0]: want a name"),
        (Fallback, "cases:\n  - {name: a}", 2, "case \"a\": want expect"),
        (
            Fallback,
            "cases:\n  - name: a\n    expect: {}",
            3,
            "case \"a\": expect: want one of respond, decline",
        ),
        (
            Fallback,
            "cases:\n  - name: a\n    expect: {decline: true, stale: true}",
            3,
            "expect: want one of",
        ),
        (
            Fallback,
            "cases:\n  - name: a\n    expect: {decline: false}",
            3,
            "expect.decline: want true",
        ),
        (
            Fallback,
            "cases:\n  - name: a\n    expect:\n      respond: {status: 700}",
            4,
            "case \"a\": expect.respond.status: want a whole number from 200 to 599",
        ),
        (
            Fallback,
            "cases:\n  - name: a\n    expect:\n      respond: {stauts: 200}",
            4,
            "expect.respond.stauts: is no field; want status, path",
        ),
        (
            Fallback,
            "cases:\n  - name: a\n    failure: {cause: Slow}\n    expect: {decline: true}",
            3,
            "failure.cause: \"Slow\" is unknown; want ConnectFailure, Timeout",
        ),
        (
            Fallback,
            "cases:\n  - name: a\n    calls: [{service: b}]\n    expect: {decline: true}",
            3,
            "calls[0].service: the plugin may not call \"b\"; want services: [b]",
        ),
        (
            Fallback,
            "cases:\n  - name: a\n    request: {path: x}\n    expect: {decline: true}",
            3,
            "request.path: \"x\" is no path; want one that begins with /",
        ),
        (
            Fallback,
            "cases:\n  - name: a\n    response: {}\n    expect: {decline: true}",
            3,
            "response: is for filters; this module is of kind Fallback",
        ),
        (
            Filter,
            "cases:\n  - name: a\n    expect: {decline: true}",
            3,
            "expect.decline: is for fallbacks; this module is of kind Filter",
        ),
        (
            WasiHttp,
            "cases:\n  - name: a\n    expect: {}",
            3,
            "expect: want one of respond or fault",
        ),
        (
            Router,
            "cases:\n  - name: a\n    expect: {choose: b}",
            2,
            "case \"a\": want backends",
        ),
        (
            Fallback,
            "cases:\n  - {name: a, expect: {fault: trip}}",
            2,
            "expect.fault: \"trip\" is unknown; want trap, time",
        ),
        (
            Fallback,
            "cases:\n  - {name: a, expect: {decline: true}}\n  - {name: a, expect: {decline: true}}",
            3,
            "a second case is called \"a\"",
        ),
        (
            Fallback,
            "cases:\n  - {name: a, expect: {decline: true, maxTime: 5}}",
            2,
            "expect.maxTime: want a duration",
        ),
        (
            Fallback,
            "cases:\n  - {name: a, request: {body: x, json: x}, expect: {decline: true}}",
            2,
            "request.body: there is json, too",
        ),
        (
            Filter,
            "cases:\n  - {name: a, expect: {request: {headers: {X-A: b}}}}",
            2,
            "names of fields are in lower case",
        ),
    ] {
        let (at, said) = read_text(text, kind).unwrap_err();
        assert!(said.contains(why), "{text:?}: {said}");
        assert_eq!(at, line, "{text:?}: {said}");
    }
}

//! What hangs on a flag: rules, backends, whole calls, rungs, plugins and faults.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use anyhow::ensure;
use http::{Method, Request};
use leeward_testkit::policy::{fallback, flags, plugin, route, rules, service};
use leeward_testkit::{Backend, Body, Mesh, Port, Protocol, binaries, empty_body, get, request, with_header};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Half of the keys each, by the key.
const HALVES: &str = r#"{"halves": {"state": "ENABLED", "variants": {"blue": "b", "green": "g"}, "defaultVariant": "blue",
    "targeting": {"fractional": [{"var": "targetingKey"}, ["blue", 50], ["green", 50]]}}}"#;
const KEYS: u32 = 2000;

/// A flag that is true for requests that say so in `x-on`, and else false.
fn asked_for(key: &str) -> String {
    let said = json!({"if": [{"==": [{"var": "headers.x-on"}, "yes"]}, "on", "off"]});
    json!({key: {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off", "targeting": said}})
        .to_string()
}

fn by(host: &str, header: &'static str, value: &str) -> Request<Body> {
    with_header(get(host, "/"), header, value)
}

async fn one_zone() -> anyhow::Result<Mesh> {
    Mesh::builder().node("a", "a1").start().await
}

/// Each key's backend, asked for twice: by both protocols, and so on any of the proxy's workers.
async fn split(mesh: &Mesh, host: &str) -> anyhow::Result<BTreeMap<String, u32>> {
    let (first, second) = (
        mesh.workload("a1", Protocol::Http1)?,
        mesh.workload("a1", Protocol::Http2)?,
    );
    let mut shares = BTreeMap::new();
    for n in 0..KEYS {
        let key = format!("user-{n}");
        let reply = first.call(by(host, "x-user", &key)).await?;
        let again = second.call(by(host, "x-user", &key)).await?;
        ensure!(
            reply.status == 200 && reply.backend() == again.backend(),
            "{key}: {reply:?}, {again:?}"
        );
        *shares.entry(reply.backend().to_owned()).or_default() += 1;
    }
    Ok(shares)
}

/// Within a twentieth of the keys.
#[track_caller]
fn assert_halves(shares: &BTreeMap<String, u32>) {
    let off = KEYS / 20;
    assert!(
        shares.len() == 2 && shares.values().all(|n| n.abs_diff(KEYS / 2) <= off),
        "{shares:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rule_serves_those_for_whom_its_flag_holds() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let (new, old) = (Backend::start("new")?, Backend::start("old")?);
    let policy = flags("shop", HALVES)
        + &flags("asked", &asked_for("asked"))
        + &service("new", &[(new.address(), "a", "")], &[])
        + &service("old", &[(old.address(), "a", "")], &[])
        + &rules("shop", "shop.example", &[
            &["backendRefs: [{service: new}]", "when: {flag: halves, variants: [green], targetingKeyHeader: x-user}"],
            &["backendRefs: [{service: old}]"],
        ])
        // The better match first; passed over, the next one serves.
        + &rules("paths", "paths.example", &[
            &["matches: [{path: {prefix: /a}}]", "backendRefs: [{service: old}]"],
            &["matches: [{path: {prefix: /a/b}}]", "backendRefs: [{service: new}]", "when: {flag: asked}"],
        ])
        + &rules("only", "only.example", &[&["backendRefs: [{service: new}]", "when: {flag: asked}"]]);
    mesh.apply(&policy).await?;
    assert_halves(&split(&mesh, "shop.example").await?);
    // Without a key nobody is divided.
    let client = mesh.workload("a1", Protocol::Http1)?;
    let none = client.get("shop.example", "/").await?.backend().to_owned();
    for _ in 0..20 {
        assert_eq!(client.get("shop.example", "/").await?.backend(), none);
    }
    for (path, said, want) in [
        ("/a/b", "yes", "new"),
        ("/a/b", "no", "old"),
        ("/a/c", "yes", "old"),
    ] {
        let reply = client
            .call(with_header(get("paths.example", path), "x-on", said))
            .await?;
        assert_eq!(reply.backend(), want, "{path} {said}: {reply:?}");
    }
    assert_eq!(
        client.call(by("only.example", "x-on", "yes")).await?.backend(),
        "new"
    );
    let reply = client.get("only.example", "/").await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-reason")),
        (404, "no_route")
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_have_their_share_of_those_for_whom_a_flag_holds() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let (blue, green, old) = (
        Backend::start("blue")?,
        Backend::start("green")?,
        Backend::start("old")?,
    );
    let color = json!({"color": {
        "state": "ENABLED", "variants": {"blue": 1, "green": 2, "none": 3}, "defaultVariant": "none",
        "targeting": {"var": "headers.x-color"},
    }});
    let at = |backend: &Backend| [(backend.address(), "a", "")];
    let policy = flags("shop", HALVES)
        + &flags("color", &color.to_string())
        + &service("blue", &at(&blue), &[])
        + &service("green", &at(&green), &[])
        + &service("old", &at(&old), &[])
        + &rules(
            "halves",
            "halves.example",
            &[&[
                "backendRefs: [{service: blue, when: {flag: halves, variants: [blue], targetingKeyHeader: x-user}}, \
            {service: green, when: {flag: halves, variants: [green], targetingKeyHeader: x-user}}]",
            ]],
        )
        + &rules(
            "color",
            "color.example",
            &[&[
                "backendRefs: [{service: blue, when: {flag: color, variants: [blue]}}, \
            {service: green, when: {flag: color, variants: [green]}}, {service: old, weight: 0}]",
            ]],
        )
        + &rules(
            "canary",
            "canary.example",
            &[&[
                "backendRefs: [{service: old}, {service: green, weight: 3, when: {flag: color, variants: [green]}}]",
            ]],
        );
    mesh.apply(&policy).await?;
    assert_halves(&split(&mesh, "halves.example").await?);
    let client = mesh.workload("a1", Protocol::Http1)?;
    for _ in 0..20 {
        for color in ["blue", "green"] {
            assert_eq!(
                client
                    .call(by("color.example", "x-color", color))
                    .await?
                    .backend(),
                color
            );
        }
        let reply = client.call(by("color.example", "x-color", "none")).await?;
        assert_eq!(
            (reply.status.as_u16(), reply.header("leeward-reason")),
            (503, "no_endpoint")
        );
        assert_eq!(
            client
                .call(by("canary.example", "x-color", "blue"))
                .await?
                .backend(),
            "old"
        );
    }
    let mut there = 0;
    for _ in 0..400 {
        there += u32::from(
            client
                .call(by("canary.example", "x-color", "green"))
                .await?
                .backend()
                == "green",
        );
    }
    // 300 is expected, with a standard deviation of 8.7; six of those either way.
    assert!((248..=352).contains(&there), "{there} of 400");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_a_flag_has_switched_off_reaches_no_service() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let pay = Backend::start("pay")?;
    let rungs = [
        "{static: {status: 200, body: never}, causes: [Timeout]}",
        "{static: {status: 202, body: \"${cause}\", template: true}, causes: [Disabled]}",
    ];
    let policy = flags("pay", &asked_for("pay-on"))
        + &service("pay", &[(pay.address(), "a", "")], &[])
        + &fallback("ladder", &rungs, &[])
        + &route(
            "pay",
            "pay.example",
            "pay",
            &["enabled: {flag: pay-on}", "fallback: ladder"],
        )
        + &route("bare", "bare.example", "pay", &["enabled: {flag: pay-on}"]);
    mesh.apply(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        let before = pay.requests();
        for _ in 0..20 {
            let reply = client.get("pay.example", "/").await?;
            assert_eq!(
                (reply.status.as_u16(), reply.header("leeward-degraded")),
                (202, "ladder/1"),
                "{reply:?}"
            );
            assert_eq!(reply.text(), "disabled");
            let reply = client.get("bare.example", "/").await?;
            assert_eq!(
                (reply.status.as_u16(), reply.header("leeward-reason")),
                (503, "disabled"),
                "{reply:?}"
            );
        }
        assert_eq!(pay.requests(), before);
        for host in ["pay.example", "bare.example"] {
            assert_eq!(client.call(by(host, "x-on", "yes")).await?.backend(), "pay");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rungs_plugins_and_faults_are_for_those_for_whom_a_flag_holds() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let (app, dead) = (Backend::start("app")?, Port::reserve()?);
    let built = binaries::workspace().join("plugins/built/static-json.wasm");
    let json = plugin(
        "json",
        &built.display().to_string(),
        "NextRung",
        "callTimeout: 5s",
    ) + "  when: {flag: asked}\n";
    let for_reset = json!({"for-reset": {
        "state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off",
        "targeting": {"if": [{"==": [{"var": "cause"}, "reset"]}, "on", "off"]},
    }});
    let policy = flags("asked", &asked_for("asked"))
        + &flags("cause", &for_reset.to_string())
        + &json
        + &service("app", &[(app.address(), "a", "")], &[])
        + &service("dead", &[(dead.address(), "a", "")], &[])
        + &fallback(
            "rung",
            &[
                "{static: {status: 200, body: asked}, when: {flag: asked}}",
                "static: {status: 200, body: others}",
            ],
            &[],
        )
        + &fallback(
            "cause",
            &[
                "{static: {status: 200, body: reset}, when: {flag: for-reset}}",
                "static: {status: 200, body: others}",
            ],
            &[],
        )
        + &fallback(
            "plugin",
            &[
                "plugin: {plugin: json, config: '{\"body\": \"asked\"}'}",
                "static: {status: 200, body: others}",
            ],
            &[],
        )
        + &route("rung", "rung.example", "dead", &["fallback: rung"])
        + &route(
            "cause",
            "cause.example",
            "app",
            &["fallback: cause", "fault: {abort: Reset}"],
        )
        + &route("plugin", "plugin.example", "dead", &["fallback: plugin"])
        + &route(
            "fault",
            "fault.example",
            "app",
            &["fallback: rung", "fault: {abort: Timeout, when: {flag: asked}}"],
        );
    mesh.apply_with_plugins(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        for (host, said, rung, body) in [
            ("rung.example", "yes", "rung/0", "asked"),
            ("rung.example", "no", "rung/1", "others"),
            ("cause.example", "no", "cause/0", "reset"),
            ("plugin.example", "yes", "plugin/0", "\"asked\""),
            ("plugin.example", "no", "plugin/1", "others"),
            ("fault.example", "yes", "rung/0", "asked"),
            ("fault.example", "no", "", "app"),
        ] {
            let reply = client.call(by(host, "x-on", said)).await?;
            assert_eq!(
                (reply.header("leeward-degraded"), reply.text().as_str()),
                (rung, body),
                "{host} {said}"
            );
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flags_see_what_a_request_has() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let (on, off) = (Backend::start("on")?, Backend::start("off")?);
    let attributes = [
        ("method", json!("PUT")),
        ("path", json!("/a/b")),
        ("host", json!("attributes.example")),
        ("zone", json!("a")),
        ("proxy", json!("a1")),
        ("route", json!("attributes")),
        ("address", json!("127.0.0.1")),
        ("targetingKey", json!("127.0.0.1")),
        ("headers.x-user", json!("ann")),
        ("headers.x-none", Value::Null),
        ("peer", Value::Null),
        ("cause", Value::Null),
    ];
    // One flag for all of them, and one for each, to see which isn't.
    let all: Vec<Value> = attributes
        .iter()
        .map(|(name, is)| json!({"==": [{"var": name}, is]}))
        .collect();
    let flag = |targeting: Value| {
        json!({
            "state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off",
            "targeting": {"if": [targeting, "on", "off"]},
        })
    };
    let mut set = serde_json::Map::new();
    set.insert("all".to_owned(), flag(json!({"and": &all})));
    let mut rule_lines = Vec::new();
    for (i, one) in all.iter().enumerate() {
        set.insert(format!("one-{i}"), flag(one.clone()));
        rule_lines.push([
            format!("matches: [{{path: {{exact: /a/b}}, headers: [{{name: x-only, exact: \"{i}\"}}]}}]"),
            "backendRefs: [{service: \"on\"}]".to_owned(),
            format!("when: {{flag: one-{i}}}"),
        ]);
    }
    let rule_lines: Vec<Vec<&str>> = rule_lines
        .iter()
        .map(|lines| lines.iter().map(String::as_str).collect())
        .collect();
    let mut list: Vec<&[&str]> = rule_lines.iter().map(Vec::as_slice).collect();
    list.push(&[
        "matches: [{path: {prefix: /a}}]",
        "backendRefs: [{service: \"on\"}]",
        "when: {flag: all}",
    ]);
    list.push(&["backendRefs: [{service: \"off\"}]"]);
    let policy = flags("attributes", &Value::Object(set).to_string())
        + &service("\"on\"", &[(on.address(), "a", "")], &[])
        + &service("\"off\"", &[(off.address(), "a", "")], &[])
        + &rules("attributes", "attributes.example", &list);
    mesh.apply(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        let ask = |method: Method, path: &str, user: &str, only: &str| {
            let request = request(method, "Attributes.example:80", path, empty_body());
            let request = with_header(with_header(request, "x-user", user), "x-only", only);
            with_header(request, "x-user", "second value")
        };
        for (i, (name, _)) in attributes.iter().enumerate() {
            let reply = client
                .call(ask(Method::PUT, "/a/b", "ann", &i.to_string()))
                .await?;
            assert_eq!(reply.backend(), "on", "{name}");
        }
        assert_eq!(
            client
                .call(ask(Method::PUT, "/a/b?q", "ann", ""))
                .await?
                .backend(),
            "on"
        );
        for other in [
            ask(Method::POST, "/a/b", "ann", ""),
            ask(Method::PUT, "/a/c", "ann", ""),
            ask(Method::PUT, "/a/b", "bob", ""),
            with_header(ask(Method::PUT, "/a/b", "ann", ""), "x-none", "some"),
        ] {
            assert_eq!(client.call(other).await?.backend(), "off");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_evaluated_is_as_the_condition_says() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let app = Backend::start("app")?;
    let on_off = json!({"on": true, "off": false});
    let set = json!({
        "switched-off": {"state": "DISABLED", "variants": &on_off, "defaultVariant": "on"},
        "broken": {"state": "ENABLED", "variants": &on_off, "defaultVariant": "on", "targeting": {"var": "headers.x-on"}},
        "no-truth": {"state": "ENABLED", "variants": {"on": "true"}, "defaultVariant": "on"},
    });
    let mut policy = flags("set", &set.to_string()) + &service("app", &[(app.address(), "a", "")], &[]);
    for flag in ["missing", "switched-off", "broken"] {
        for default in [true, false] {
            let name = format!("{flag}-{default}");
            let enabled = format!("enabled: {{flag: {flag}, default: {default}}}");
            policy += &route(&name, &format!("{name}.example"), "app", &[&enabled]);
        }
    }
    policy += &route(
        "no-truth",
        "no-truth.example",
        "app",
        &["enabled: {flag: no-truth, default: true}"],
    );
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for flag in ["missing", "switched-off", "broken"] {
        for (default, want) in [(true, 200), (false, 503)] {
            let reply = client
                .call(by(&format!("{flag}-{default}.example"), "x-on", "no variant"))
                .await?;
            assert_eq!(reply.status, want, "{flag}, by default {default}: {reply:?}");
        }
    }
    // It can be evaluated, and is no truth.
    let reply = client.get("no-truth.example", "/").await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-reason")),
        (503, "disabled"),
        "{reply:?}"
    );
    Ok(())
}

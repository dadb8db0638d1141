//! A request stays with its rule, and with what its router chose, whatever plugins have made of it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use anyhow::ensure;
use http::{Method, Request};
use leeward_testkit::policy::{fallback, flags, queue, rules, service};
use leeward_testkit::{
    Answer, Backend, Behave, Body, Mesh, Protocol, binaries, bytes_body, eventually, get, request,
    with_header,
};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);
const HOST: &str = "app.example";

fn plugin(name: &str, kind: &str, config: &str) -> String {
    let file = binaries::plugin(name);
    // Time isn't what is tested: on a busy machine the default of 5 ms is no time at all.
    format!(
        "---\napiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {{name: {name}}}\nspec:\n  kind: {kind}\n  \
         source: {{file: \"{file}\"}}\n  config: '{config}'\n  onFault: FailClosed\n  limits: {{callTimeout: 5s}}\n"
    )
}

/// What matches the rule is gone when the filter has seen the request; answers are marked.
fn renames() -> String {
    let config =
        r#"{"request": {"rename": {"x-user": "x-customer"}}, "response": {"set": {"x-filtered": "yes"}}}"#;
    plugin("header-rewrite", "Filter", config)
}

const BY_USER: &str = "matches: [{headers: [{name: x-user, exact: ada}]}]";
const FILTERED: &str = "filters: [{plugin: header-rewrite}]";

async fn one_zone() -> anyhow::Result<Mesh> {
    Mesh::builder().node("a", "a1").start().await
}

fn ada(request: Request<Body>) -> Request<Body> {
    with_header(request, "x-user", "ada")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_see_a_request_that_no_backend_is_for() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let app = Backend::start("app")?;
    let never =
        r#"{"never": {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off"}}"#;
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &flags("all", never)
        + &renames()
        + &fallback("sorry", &["static: {status: 200, body: sorry}"], &[])
        + &rules(
            "app",
            HOST,
            &[&[
                "backendRefs: [{service: app, when: {flag: never}}]",
                FILTERED,
                "fallback: sorry",
            ]],
        );
    mesh.apply_with_plugins(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let reply = mesh.workload("a1", protocol)?.get(HOST, "/").await?;
        assert_eq!(
            (reply.text().as_str(), reply.header("x-filtered")),
            ("sorry", "yes")
        );
    }
    assert_eq!(app.requests(), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_is_asked_where_no_weight_is_left() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let (stable, next) = (Backend::start("stable")?, Backend::start("next")?);
    let never =
        r#"{"never": {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off"}}"#;
    let policy = service("stable", &[(stable.address(), "a", "")], &[])
        + &service("next", &[(next.address(), "a", "")], &[])
        + &flags("all", never)
        + &plugin("canary-router", "Router", r#"{"canary": "next", "percent": 0}"#)
        + &rules(
            "app",
            HOST,
            &[&[
                "backendRefs: [{service: stable, when: {flag: never}}, {service: next, weight: 0}]",
                "router: {plugin: canary-router}",
            ]],
        );
    mesh.apply_with_plugins(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let always = with_header(get(HOST, "/"), "x-canary", "always");
    assert_eq!(client.call(always).await?.backend(), "next");
    let nobody = client.get(HOST, "/").await?;
    assert_eq!(
        (nobody.status.as_u16(), nobody.header("leeward-reason")),
        (503, "no_endpoint")
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_was_held_goes_on_by_its_rule() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let app = Backend::start("app")?;
    let hold = ["hold: {maxWait: 60s}"];
    let rule = rules(
        "app",
        HOST,
        &[&[
            BY_USER,
            "backendRefs: [{service: app}]",
            "timeouts: {request: 60s}",
            FILTERED,
        ]],
    );
    mesh.apply_with_plugins(&(service("app", &[], &hold) + &renames() + &rule))
        .await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let held = tokio::spawn(async move { client.call(ada(get(HOST, "/"))).await });
    let node = mesh.node("a1")?;
    eventually("the filter to have seen the request", SOON, || async {
        let calls = node
            .metric("leeward_plugin_calls_total", &["plugin=\"header-rewrite\""])
            .await?;
        ensure!(calls > 0.0, "no call yet");
        Ok(())
    })
    .await?;
    mesh.apply_with_plugins(&service("app", &[(app.address(), "a", "")], &hold))
        .await?;
    let reply = held.await??;
    assert_eq!((reply.backend(), reply.header("x-filtered")), ("app", "yes"));
    assert_eq!(app.take_seen()[0].headers["x-customer"], "ada");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queued_request_is_delivered_by_its_rule() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let (orders, other) = (Backend::start("orders")?, Backend::start("other")?);
    let policy = service("orders", &[(orders.address(), "a", "")], &[])
        + &service("other", &[(other.address(), "a", "")], &[])
        + &renames()
        + &queue("orders", &["baseInterval: 20ms", "maxInterval: 200ms"])
        + &fallback("later", &["queue: {queue: orders}"], &[])
        + &rules(
            "orders",
            HOST,
            &[
                &[
                    BY_USER,
                    "backendRefs: [{service: orders}]",
                    "fault: {abort: ConnectFailure}",
                    "fallback: later",
                    FILTERED,
                ],
                &["backendRefs: [{service: other}]"],
            ],
        );
    mesh.apply_with_plugins(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let order = request(Method::POST, HOST, "/orders", bytes_body("an order"));
    let reply = client.call(ada(order)).await?;
    assert_eq!(reply.status, 202, "{reply:?}");
    eventually("the order to be delivered", SOON, || async {
        ensure!(orders.requests() + other.requests() > 0, "nothing came");
        Ok(())
    })
    .await?;
    let seen = orders.take_seen();
    assert_eq!((seen.len(), other.requests()), (1, 0));
    assert_eq!(seen[0].headers["x-customer"], "ada");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cache_keeps_apart_what_a_router_keeps_apart() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let (stable, next) = (Backend::start("stable")?, Backend::start("next")?);
    for backend in [&stable, &next] {
        let answer = Answer::text(backend.name()).header("cache-control", "max-age=600");
        backend.behave(Behave::Answer(answer));
    }
    let policy = service("stable", &[(stable.address(), "a", "")], &[])
        + &service("next", &[(next.address(), "a", "")], &[])
        + &plugin("canary-router", "Router", r#"{"canary": "next", "percent": 0}"#)
        + &rules(
            "app",
            HOST,
            &[&[
                "backendRefs: [{service: stable}, {service: next, weight: 0}]",
                "router: {plugin: canary-router}",
                "cache: {}",
            ]],
        );
    mesh.apply_with_plugins(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for _ in 0..3 {
        let always = with_header(get(HOST, "/"), "x-canary", "always");
        assert_eq!(client.call(always).await?.text(), "next");
        assert_eq!(client.get(HOST, "/").await?.text(), "stable");
    }
    assert_eq!((stable.requests(), next.requests()), (1, 1), "each was kept");
    Ok(())
}

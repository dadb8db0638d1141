//! What a cache must keep apart: a fallback's words from the service's, its own conditions from its clients', one rule
//! from another, and the callers of one backend from those of another.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use http::Request;
use leeward_testkit::policy::{fallback, flags, route, service};
use leeward_testkit::{Answer, Backend, Behave, Body, Mesh, Protocol, get, with_header};

const HOST: &str = "app.example";

async fn started(policy: &str) -> anyhow::Result<Mesh> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    mesh.apply(policy).await?;
    Ok(mesh)
}

fn answer(text: &str, control: &str) -> Answer {
    Answer::text(text).header("cache-control", control)
}

fn with(name: &'static str, value: &str) -> Request<Body> {
    with_header(get(HOST, "/"), name, value)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_fallback_says_is_never_kept_as_the_services_word() -> anyhow::Result<()> {
    let app = Backend::start("app")?;
    // A failure that a cache may keep, and that policy answers itself, with a body of the same length.
    app.behave(Behave::Answer(answer("gone!", "max-age=60").with_status(404)));
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &fallback(
            "app",
            &["static: {status: 200, body: \"stand\"}"],
            &["onStatuses: [404]"],
        )
        + &route("app", HOST, "app", &["cache: {}", "fallback: app"]);
    let mesh = started(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for _ in 0..2 {
        let reply = client.get(HOST, "/").await?;
        assert_eq!((reply.status.as_u16(), reply.text()), (200, "stand".to_owned()));
        assert_eq!(reply.header("leeward-degraded"), "app/0");
    }
    app.behave(Behave::Answer(answer("well", "no-store")));
    let reply = client.get(HOST, "/").await?;
    assert_eq!((reply.status.as_u16(), reply.text()), (200, "well".to_owned()));
    assert_eq!(reply.header("cache-status"), "");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rung_does_not_get_the_caches_own_conditions() -> anyhow::Result<()> {
    let (app, other) = (Backend::start("app")?, Backend::start("other")?);
    app.behave(Behave::Answer(
        answer("first", "max-age=0, must-revalidate").header("etag", "\"v1\""),
    ));
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("other", &[(other.address(), "a", "")], &[])
        + &fallback("app", &["service: {service: other}"], &["onStatuses: [503]"])
        + &route("app", HOST, "app", &["cache: {}", "fallback: app"]);
    let mesh = started(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    assert_eq!(client.get(HOST, "/").await?.text(), "first");
    // Now it is to be confirmed, and isn't.
    app.behave(Behave::Answer(Answer::status(503)));
    let reply = client.get(HOST, "/").await?;
    assert_eq!(reply.header("leeward-degraded"), "app/0");
    let asked = other.take_seen().pop().unwrap();
    assert!(!asked.headers.contains_key("if-none-match"), "{asked:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rule_that_takes_anothers_place_gets_nothing_of_what_that_one_kept() -> anyhow::Result<()> {
    let (old, new) = (Backend::start("old")?, Backend::start("new")?);
    old.behave(Behave::Answer(answer("old", "max-age=60")));
    new.behave(Behave::Answer(answer("new", "max-age=60")));
    let services =
        service("old", &[(old.address(), "a", "")], &[]) + &service("new", &[(new.address(), "a", "")], &[]);
    let mesh = started(&(services.clone() + &route("app", HOST, "old", &["cache: {}"]))).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for _ in 0..2 {
        assert_eq!(client.get(HOST, "/").await?.text(), "old");
    }
    mesh.apply(&(services + &route("app", HOST, "new", &["cache: {}"])))
        .await?;
    let reply = client.get(HOST, "/").await?;
    assert_eq!(
        (reply.text(), reply.header("cache-status")),
        ("new".to_owned(), "")
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_conditional_backend_says_is_not_for_the_callers_of_another() -> anyhow::Result<()> {
    let (stable, beta) = (Backend::start("stable")?, Backend::start("beta")?);
    stable.behave(Behave::Answer(answer("stable", "max-age=60")));
    beta.behave(Behave::Answer(answer("beta", "max-age=60")));
    let testers =
        r#"{"tester": {"state": "ENABLED", "variants": {"yes": true, "no": false}, "defaultVariant": "no",
        "targeting": {"if": [{"==": [{"var": "headers.x-tester"}, "1"]}, "yes", "no"]}},
        "public": {"state": "ENABLED", "variants": {"yes": true, "no": false}, "defaultVariant": "yes",
        "targeting": {"if": [{"==": [{"var": "headers.x-tester"}, "1"]}, "no", "yes"]}}}"#
            .replace('\n', " ");
    let rule = "---\napiVersion: leeward.dev/v1\nkind: Route\nmetadata: {name: app}\nspec:\n  hostnames: [app.example]\n  \
         rules:\n    - cache: {}\n      backendRefs:\n        - {service: beta, when: {flag: tester}}\n        - {service: \
         stable, when: {flag: public}}\n";
    let policy = flags("testers", &testers)
        + &service("stable", &[(stable.address(), "a", "")], &[])
        + &service("beta", &[(beta.address(), "a", "")], &[])
        + rule;
    let mesh = started(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for _ in 0..2 {
        assert_eq!(client.call(with("x-tester", "1")).await?.text(), "beta");
        assert_eq!(client.get(HOST, "/").await?.text(), "stable");
    }
    assert_eq!(
        (beta.requests(), stable.requests()),
        (1, 1),
        "each was kept, apart"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_no_backends_condition_holds_the_ladder_answers() -> anyhow::Result<()> {
    let app = Backend::start("app")?;
    let off =
        r#"{"never": {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off"}}"#;
    let rule = "---\napiVersion: leeward.dev/v1\nkind: Route\nmetadata: {name: app}\nspec:\n  hostnames: [app.example]\n  \
         rules:\n    - fallback: app\n      backendRefs: [{service: app, when: {flag: never}}]\n";
    let policy = flags("off", off)
        + &service("app", &[(app.address(), "a", "")], &[])
        + &fallback("app", &["static: {status: 200, body: stand-in}"], &[])
        + rule;
    let mesh = started(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let reply = client.get(HOST, "/").await?;
    assert_eq!(
        (reply.status.as_u16(), reply.text()),
        (200, "stand-in".to_owned())
    );
    assert_eq!((reply.header("leeward-degraded"), app.requests()), ("app/0", 0));
    Ok(())
}

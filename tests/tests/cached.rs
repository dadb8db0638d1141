//! The cache of a rule on real proxies: what it answers, what it asks the service, and what it never does (RFC 9111,
//! RFC 5861).

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::ensure;
use http::{Method, Request};
use leeward_testkit::policy::{fallback, route, service};
use leeward_testkit::raw::Raw;
use leeward_testkit::{
    Answer, Backend, Behave, Body, Client, Mesh, Protocol, Reply, bytes_body, empty_body, eventually, get,
    request, with_header,
};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::task::JoinSet;

const SOON: Duration = Duration::from_secs(30);
const HOST: &str = "app.example";

/// One proxy with two workers, and a service behind a rule with a cache.
async fn mesh(app: &Backend, cache: &str, rule: &[&str]) -> anyhow::Result<Mesh> {
    let mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--workers", "2")
        .start()
        .await?;
    mesh.apply(&policy(app, cache, rule)).await?;
    Ok(mesh)
}

fn policy(app: &Backend, cache: &str, rule: &[&str]) -> String {
    let cache = format!("cache: {cache}");
    let rule: Vec<&str> = std::iter::once(cache.as_str())
        .chain(rule.iter().copied())
        .collect();
    service("app", &[(app.address(), "a", "")], &[]) + &route("app", HOST, "app", &rule)
}

fn answer(text: &str, control: &str) -> Answer {
    Answer::text(text).header("cache-control", control)
}

fn with(name: &'static str, value: &str) -> Request<Body> {
    with_header(get(HOST, "/"), name, value)
}

/// Status, body and what the cache says of its part.
fn told(reply: &Reply) -> (u16, String, &str) {
    (reply.status.as_u16(), reply.text(), reply.header("cache-status"))
}

/// So many clients at once, half of them with HTTP/2.
fn many(outbound: SocketAddr, clients: u32) -> JoinSet<anyhow::Result<Reply>> {
    (0..clients)
        .map(|n| {
            let protocol = if n % 2 == 0 {
                Protocol::Http1
            } else {
                Protocol::Http2
            };
            async move { Client::new(outbound, protocol).get(HOST, "/").await }
        })
        .collect()
}

const HIT: &str = "leeward; hit";

async fn counted(mesh: &Mesh, metric: &str, result: &str) -> anyhow::Result<f64> {
    let label = format!("result=\"{result}\"");
    let labels: &[&str] = if result.is_empty() { &[] } else { &[&label] };
    mesh.node("a1")?.metric(metric, labels).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fresh_answer_is_given_again_without_asking_the_service() -> anyhow::Result<()> {
    let app = Backend::start("app")?;
    app.behave(Behave::Answer(
        answer("first", "max-age=60")
            .header("etag", "\"v1\"")
            .header("x-extra", "kept"),
    ));
    let mesh = mesh(&app, "{}", &[]).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let only = with("cache-control", "only-if-cached");
    assert_eq!(client.call(only).await?.status, 504);
    assert_eq!(app.requests(), 0);
    let reply = client.get(HOST, "/").await?;
    assert_eq!(told(&reply), (200, "first".to_owned(), ""));
    app.behave(Behave::Answer(answer("second", "max-age=60")));
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        // Connections are dealt to both workers.
        for _ in 0..4 {
            let client = Client::new(mesh.node("a1")?.outbound, protocol);
            let reply = client.get(HOST, "/").await?;
            assert_eq!(told(&reply), (200, "first".to_owned(), HIT));
            assert!(reply.header("age").parse::<u64>()? < 60, "{reply:?}");
            assert_eq!(
                (reply.header("x-extra"), reply.header("leeward-degraded")),
                ("kept", "")
            );
        }
        let head = client
            .call(request(Method::HEAD, HOST, "/", empty_body()))
            .await?;
        assert_eq!(told(&head), (200, String::new(), HIT));
        assert_eq!(head.header("content-length"), "5");
        let same = client.call(with("if-none-match", "\"v0\", W/\"v1\"")).await?;
        assert_eq!(told(&same), (304, String::new(), HIT));
        assert_eq!((same.header("etag"), same.header("x-extra")), ("\"v1\"", ""));
        let other = client.call(with("if-none-match", "\"v0\"")).await?;
        assert_eq!(told(&other), (200, "first".to_owned(), HIT));
        let only = client.call(with("cache-control", "only-if-cached")).await?;
        assert_eq!(told(&only), (200, "first".to_owned(), HIT));
    }
    assert_eq!(app.requests(), 1);
    // The host's case and other targets.
    assert_eq!(told(&client.get("APP.example", "/").await?).2, HIT);
    assert_eq!(
        told(&client.get(HOST, "/?x").await?),
        (200, "second".to_owned(), "")
    );
    // Who wants it anew gets it anew.
    let anew = client.call(with("cache-control", "no-cache")).await?;
    assert_eq!(told(&anew), (200, "second".to_owned(), ""));
    assert_eq!(
        told(&client.get(HOST, "/").await?),
        (200, "second".to_owned(), HIT)
    );
    assert!(counted(&mesh, "leeward_cache_requests_total", "hit").await? >= 14.0);
    assert!((counted(&mesh, "leeward_cache_entries", "").await? - 2.0).abs() < 0.1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_for_one_caller_is_not_given_to_another() -> anyhow::Result<()> {
    let app = Backend::start("app")?;
    let mesh = mesh(&app, "{defaultTtl: 60s}", &[]).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut path = 0;
    for (control, extra, asked, kept) in [
        ("max-age=60", None, None, true),
        ("max-age=60", None, Some(("authorization", "Bearer ann")), false),
        (
            "max-age=60, public",
            None,
            Some(("authorization", "Bearer ann")),
            true,
        ),
        ("max-age=60", None, Some(("cookie", "who=ann")), false),
        ("max-age=60", Some(("set-cookie", "who=ann")), None, false),
        ("private, max-age=60", None, None, false),
        ("Private=\"x\", max-age=60", None, None, false),
        ("no-store, max-age=60", None, None, false),
        ("max-age=60", Some(("vary", "*")), None, false),
        ("max-age=60", None, Some(("cache-control", "no-store")), false),
        ("max-age=60", Some(("leeward-degraded", "x/0")), None, false),
    ] {
        path += 1;
        let target = format!("/{path}");
        let mut given = answer("for ann", control);
        if let Some((name, value)) = extra {
            given = given.header(name, value);
        }
        app.behave(Behave::Answer(given));
        let mut first = get(HOST, &target);
        if let Some((name, value)) = asked {
            first = with_header(first, name, value);
        }
        assert_eq!(client.call(first).await?.text(), "for ann");
        app.behave(Behave::Answer(answer("for bob", "max-age=60")));
        let reply = client.get(HOST, &target).await?;
        let want = if kept { "for ann" } else { "for bob" };
        assert_eq!(reply.text(), want, "{control} {extra:?} {asked:?}");
    }
    // What is kept for all is not for whoever shows who he is, unless it says so.
    app.behave(Behave::Answer(answer("for ann", "max-age=60")));
    let reply = client
        .call(with_header(get(HOST, "/1"), "authorization", "Bearer ann"))
        .await?;
    assert_eq!(told(&reply), (200, "for ann".to_owned(), ""));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_told_apart_by_vary_and_forgotten_by_a_change() -> anyhow::Result<()> {
    let app = Backend::start("app")?;
    let mesh = mesh(&app, "{}", &[]).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for language in ["de", "fr"] {
        let given = answer(language, "max-age=60").header("vary", "Accept-Language");
        app.behave(Behave::Answer(given));
        let reply = client.call(with("accept-language", language)).await?;
        assert_eq!(told(&reply), (200, language.to_owned(), ""));
    }
    for language in ["de", "fr", "de"] {
        let reply = client.call(with("accept-language", language)).await?;
        assert_eq!(told(&reply), (200, language.to_owned(), HIT));
    }
    assert_eq!(app.requests(), 2);
    // An unsafe method that succeeded changes what is there; one that failed, or is for another target, does not.
    for (method, path, status, forgotten) in [
        (Method::POST, "/", 500, false),
        (Method::POST, "/other", 200, false),
        (Method::POST, "/", 201, true),
        (Method::DELETE, "/", 204, true),
    ] {
        let given = answer("new", "max-age=60").header("vary", "Accept-Language");
        app.behave(Behave::Answer(given));
        client.call(with("accept-language", "de")).await?;
        app.behave(Behave::Answer(Answer::status(status)));
        let change = request(method.clone(), HOST, path, bytes_body("a change"));
        assert_eq!(client.call(change).await?.status, status);
        let before = app.requests();
        let given = answer("newer", "max-age=60").header("vary", "Accept-Language");
        app.behave(Behave::Answer(given));
        client.call(with("accept-language", "de")).await?;
        assert_eq!(app.requests() > before, forgotten, "{method} {path} {status}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_longer_fresh_is_confirmed_by_the_service() -> anyhow::Result<()> {
    let app = Backend::start("app")?;
    let mesh = mesh(&app, "{}", &[]).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        let target = format!("/{protocol:?}");
        app.behave(Behave::Answer(
            answer("whole", "no-cache").header("etag", "\"v1\""),
        ));
        assert_eq!(client.get(HOST, &target).await?.text(), "whole");
        app.take_seen();
        app.behave(Behave::Answer(
            Answer::status(304)
                .header("etag", "\"v1\"")
                .header("cache-control", "no-cache")
                .header("x-new", "yes"),
        ));
        for _ in 0..2 {
            let reply = client.get(HOST, &target).await?;
            assert_eq!(told(&reply), (200, "whole".to_owned(), HIT), "{reply:?}");
            assert_eq!(reply.header("x-new"), "yes");
        }
        // The client's own condition gets its own answer.
        let asks = with_header(get(HOST, &target), "if-none-match", "\"v1\"");
        assert_eq!(client.call(asks).await?.status, 304);
        let seen = app.take_seen();
        assert_eq!(seen.len(), 3);
        assert!(
            seen.iter().all(|seen| seen.headers["if-none-match"] == "\"v1\""),
            "{seen:?}"
        );
        app.behave(Behave::Answer(
            answer("changed", "max-age=60").header("etag", "\"v2\""),
        ));
        assert_eq!(
            told(&client.get(HOST, &target).await?),
            (200, "changed".to_owned(), "")
        );
        assert_eq!(
            told(&client.get(HOST, &target).await?),
            (200, "changed".to_owned(), HIT)
        );
    }
    // A 304 leaves its connection free for the next request of the same worker.
    assert!(app.connections() <= 4, "{} connections", app.connections());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_answer_stands_in_for_a_failure_where_it_may() -> anyhow::Result<()> {
    let app = Backend::start("app")?;
    let mesh = mesh(&app, "{staleIfError: 60s}", &[]).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let forbidden = [
        "must-revalidate",
        "proxy-revalidate",
        "no-cache",
        "s-maxage=1",
        "stale-if-error=0",
    ];
    // By its age each is stale from the beginning, and has something to be confirmed by.
    let old = |control: &str| {
        answer("old", control)
            .header("etag", "\"v1\"")
            .header("age", "61")
    };
    for control in forbidden {
        app.behave(Behave::Answer(old(&format!("max-age=60, {control}"))));
        client.get(HOST, &format!("/{control}")).await?;
    }
    app.behave(Behave::Answer(old("max-age=60")));
    for path in ["/", "/status"] {
        client.get(HOST, path).await?;
    }
    // The service's own failure, then none at all.
    for (status, degraded) in [(503, true), (500, true), (404, false), (429, false)] {
        app.behave(Behave::Answer(Answer::status(status)));
        let reply = client.get(HOST, "/status").await?;
        let rung = if degraded { "stale-if-error" } else { "" };
        assert_eq!(reply.header("leeward-degraded"), rung, "{status}: {reply:?}");
        assert_eq!(reply.status.as_u16(), if degraded { 200 } else { status });
    }
    app.stop().await;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        let reply = client.get(HOST, "/").await?;
        assert_eq!(told(&reply), (200, "old".to_owned(), HIT));
        assert_eq!(
            (reply.header("leeward-degraded"), reply.header("cache-control")),
            ("stale-if-error", "no-store")
        );
        assert!(reply.header("age").parse::<u64>()? >= 61, "{reply:?}");
        for control in forbidden {
            let reply = client.get(HOST, &format!("/{control}")).await?;
            assert_eq!(reply.status, 503, "{control}: {reply:?}");
        }
        assert_eq!(client.get(HOST, "/never-asked").await?.status, 503);
    }
    // As the ladder has it, which may be for longer.
    let ladder = fallback(
        "ladder",
        &[
            "stale: {maxStale: 1h}",
            "static: {status: 200, body: nothing kept}",
        ],
        &[],
    );
    mesh.apply(&(policy(&app, "{staleIfError: 0s}", &["fallback: ladder"]) + &ladder))
        .await?;
    let reply = client.get(HOST, "/").await?;
    assert_eq!(
        (told(&reply).1.as_str(), reply.header("leeward-degraded")),
        ("old", "ladder/0")
    );
    assert_eq!(reply.header("cache-control"), "no-store");
    for path in ["/must-revalidate", "/never-asked"] {
        let reply = client.get(HOST, path).await?;
        assert_eq!(
            (reply.text().as_str(), reply.header("leeward-degraded")),
            ("nothing kept", "ladder/1")
        );
    }
    let node = mesh.node("a1")?;
    let outcomes = node
        .metric("leeward_requests_total", &["outcome=\"degraded\""])
        .await?;
    assert!(outcomes >= 7.0, "{outcomes}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_answer_is_given_while_one_request_fetches_a_fresh_one() -> anyhow::Result<()> {
    let app = Backend::start("app")?;
    app.behave(Behave::Answer(
        answer("old", "max-age=60, stale-while-revalidate=60").header("age", "61"),
    ));
    let mesh = mesh(&app, "{}", &[]).await?;
    let outbound = mesh.node("a1")?.outbound;
    let client = mesh.workload("a1", Protocol::Http1)?;
    assert_eq!(client.get(HOST, "/").await?.text(), "old");
    app.behave(Behave::Late(
        Duration::from_millis(700),
        answer("fresh", "max-age=60"),
    ));
    let mut clients = many(outbound, 20);
    while let Some(reply) = clients.join_next().await {
        let reply = reply??;
        assert_eq!(
            (told(&reply).1.as_str(), reply.header("leeward-degraded")),
            ("old", "")
        );
    }
    eventually("the fresh answer", SOON, || async {
        ensure!(client.get(HOST, "/").await?.text() == "fresh");
        Ok(())
    })
    .await?;
    assert_eq!(app.requests(), 2, "fetched once");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_for_the_same_thing_make_one_call() -> anyhow::Result<()> {
    let app = Backend::start("app")?;
    app.behave(Behave::Late(Duration::from_secs(2), answer("once", "max-age=60")));
    let mesh = mesh(&app, "{}", &[]).await?;
    let outbound = mesh.node("a1")?.outbound;
    let mut clients = many(outbound, 50);
    while let Some(reply) = clients.join_next().await {
        assert_eq!(reply??.text(), "once");
    }
    assert_eq!(app.requests(), 1);
    // What turns out to be for nobody else makes each its own call, side by side.
    app.behave(Behave::Late(
        Duration::from_millis(500),
        answer("each", "private"),
    ));
    let mut clients = JoinSet::new();
    for _ in 0..20 {
        clients.spawn(async move { Client::new(outbound, Protocol::Http1).get(HOST, "/private").await });
    }
    let begun = tokio::time::Instant::now();
    while let Some(reply) = clients.join_next().await {
        assert_eq!(reply??.text(), "each");
    }
    assert_eq!(app.requests(), 21);
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_another_is_served_when_that_one_goes_away() -> anyhow::Result<()> {
    let app = Backend::start("app")?;
    app.behave(Behave::Hang);
    let mesh = mesh(&app, "{}", &[]).await?;
    let outbound = mesh.node("a1")?.outbound;
    let mut leader = Raw::connect(outbound).await?;
    leader
        .write(format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n").as_bytes())
        .await?;
    eventually("the first to ask", SOON, || async {
        ensure!(app.requests() == 1);
        Ok(())
    })
    .await?;
    let mut others = JoinSet::new();
    for n in 0..10 {
        let protocol = if n % 2 == 0 {
            Protocol::Http1
        } else {
            Protocol::Http2
        };
        others.spawn(async move { Client::new(outbound, protocol).get(HOST, "/").await });
    }
    eventually("the others to wait", SOON, || async {
        let missed = counted(&mesh, "leeward_cache_requests_total", "miss").await?;
        ensure!(missed > 10.5, "{missed}");
        Ok(())
    })
    .await?;
    assert_eq!(app.requests(), 1);
    app.behave(Behave::Answer(answer("here", "max-age=60")));
    drop(leader);
    while let Some(reply) = others.join_next().await {
        assert_eq!(reply??.text(), "here");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_is_kept_than_fits_and_nothing_that_broke_off() -> anyhow::Result<()> {
    const OBJECT: u64 = 20 << 10;
    let app = Backend::start("app")?;
    let mesh = mesh(
        &app,
        "{maxBytes: 64KiB, maxObjectBytes: 24KiB, defaultTtl: 60s}",
        &[],
    )
    .await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    app.behave(Behave::Answer(Answer::zeros(OBJECT)));
    for n in 0..12 {
        let reply = client.get(HOST, &format!("/{n}")).await?;
        assert_eq!(reply.body.len() as u64, OBJECT);
        let bytes = counted(&mesh, "leeward_cache_bytes", "").await?;
        assert!(bytes <= 65_536.0, "{bytes}");
    }
    assert!(counted(&mesh, "leeward_cache_requests_total", "evicted").await? >= 9.0);
    let before = app.requests();
    assert_eq!(told(&client.get(HOST, "/11").await?).2, HIT);
    assert_eq!(told(&client.get(HOST, "/0").await?).2, "");
    assert_eq!(app.requests(), before + 1);
    // Larger than any may be.
    app.behave(Behave::Answer(Answer::zeros(30 << 10)));
    for _ in 0..2 {
        assert_eq!(told(&client.get(HOST, "/large").await?).2, "");
    }
    assert_eq!(app.requests(), before + 3);

    app.behave(Behave::CutShort);
    let broken = client.get(HOST, "/cut").await;
    assert!(broken.is_err(), "{broken:?}");
    app.behave(Behave::Answer(Answer::text("whole")));
    assert_eq!(
        told(&client.get(HOST, "/cut").await?),
        (200, "whole".to_owned(), "")
    );
    assert_eq!(
        told(&client.get(HOST, "/cut").await?),
        (200, "whole".to_owned(), HIT)
    );
    // A client that goes away in the middle leaves no half, either.
    app.behave(Behave::Dribble(40, Duration::from_millis(25)));
    let mut gone = Raw::connect(mesh.node("a1")?.outbound).await?;
    gone.write(format!("GET /slow HTTP/1.1\r\nHost: {HOST}\r\n\r\n").as_bytes())
        .await?;
    gone.until(b"\r\n\r\n1\r\n.").await?;
    drop(gone);
    app.behave(Behave::Answer(Answer::text("whole")));
    eventually("the whole answer", SOON, || async {
        let reply = client.get(HOST, "/slow").await?;
        ensure!(
            !reply.body.is_empty() && (reply.text() == "whole" || reply.body.len() == 40),
            "{reply:?}"
        );
        ensure!(told(&reply).2 == HIT);
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_kept_outlives_a_change_of_policy_and_answers_while_calls_are_switched_off()
-> anyhow::Result<()> {
    let app = Backend::start("app")?;
    app.behave(Behave::Answer(answer("kept", "max-age=60")));
    let mesh = mesh(&app, "{}", &[]).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    client.get(HOST, "/").await?;
    app.behave(Behave::Answer(answer("new", "max-age=60")));
    // Something else changes; then the cache's own settings; then calls are switched off.
    let other = service("other", &[(app.address(), "a", "")], &[]);
    mesh.apply(&other).await?;
    assert_eq!(told(&client.get(HOST, "/").await?), (200, "kept".to_owned(), HIT));
    mesh.apply(&policy(&app, "{staleIfError: 5s, maxBytes: 1MiB}", &[]))
        .await?;
    assert_eq!(told(&client.get(HOST, "/").await?), (200, "kept".to_owned(), HIT));
    let off = ["enabled: {flag: no-such-flag}"];
    mesh.apply(&policy(&app, "{}", &off)).await?;
    assert_eq!(told(&client.get(HOST, "/").await?), (200, "kept".to_owned(), HIT));
    let reply = client.get(HOST, "/other").await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-reason")),
        (503, "disabled")
    );
    assert_eq!(app.requests(), 1);
    // Without a cache nothing is kept any more.
    let plain = service("app", &[(app.address(), "a", "")], &[]) + &route("app", HOST, "app", &[]);
    mesh.apply(&plain).await?;
    for _ in 0..2 {
        assert_eq!(told(&client.get(HOST, "/").await?), (200, "new".to_owned(), ""));
    }
    assert_eq!(app.requests(), 3);
    Ok(())
}

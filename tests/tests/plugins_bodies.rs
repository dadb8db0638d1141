//! Bodies on their way past filters of real proxies: who waits for whom, what is held, and what becomes of it when a filter, a
//! service or a client doesn't come to an end.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::BodyExt;
use hyper::body::Frame;
use leeward_testkit::policy::{fallback, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Body, Client, Mesh, Protocol, Reply, Seen, binaries, bytes_body, channel_body,
    eventually, get, request, with_header,
};
use serde_json::Value;
use std::fmt::Write;
use std::time::Duration;

/// Less than a filter may hold up a message that has no deadline.
const SOON: Duration = Duration::from_secs(40);
const BOTH: [Protocol; 2] = [Protocol::Http1, Protocol::Http2];
const CACHED: &str = "public, max-age=60";

async fn one_node() -> anyhow::Result<Mesh> {
    Mesh::builder()
        .node("a", "a1")
        .flag("--access-log", "stdout")
        .start()
        .await
}

/// A filter of this kind, with as much time as a busy machine needs.
fn filter(name: &str, kind: &str, built: &str, on_fault: &str, config: &str) -> String {
    let file = binaries::workspace().join(format!("plugins/built/{built}.wasm"));
    let mut text =
        format!("---\napiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {{name: {name}}}\nspec:\n");
    // A String takes whatever is written to it.
    let _ = write!(
        text,
        "  kind: {kind}\n  source: {{file: \"{}\"}}\n  onFault: {on_fault}\n  config: '{config}'\n  \
         limits: {{callTimeout: 2s, maxBody: 65536}}\n  quarantine: {{faults: 1000}}\n",
        file.display()
    );
    text
}

/// A component that does what its configuration says, see `plugins/misbehave/filter`.
fn rogue(name: &str, on_fault: &str, list: &str) -> String {
    filter(name, "Filter", "misbehave-filter", on_fault, list)
}

/// A proxy-wasm module that does, see `plugins/pw-misbehave`.
fn pw_rogue(name: &str, on_fault: &str, list: &str) -> String {
    filter(name, "ProxyWasm", "pw-misbehave", on_fault, list)
}

/// A route to the service `app` through filters, at the host `NAME.example`.
fn through(name: &str, filters: &[&str], more: &[&str]) -> String {
    let filters: Vec<_> = filters.iter().map(|f| format!("{{plugin: {f}}}")).collect();
    let filters = format!("filters: [{}]", filters.join(", "));
    let more: Vec<_> = std::iter::once(filters.as_str())
        .chain(more.iter().copied())
        .collect();
    route(name, &format!("{name}.example"), "app", &more)
}

/// Applies policy, and waits until the proxy has its plugins.
async fn apply(mesh: &Mesh, policy: &str) -> anyhow::Result<()> {
    mesh.apply(policy).await?;
    let admin = Client::new(mesh.node("a1")?.admin, Protocol::Http1);
    eventually("the plugins to be there", Duration::from_secs(120), || async {
        let reply = admin.get("admin", "/plugins").await?;
        let all: Vec<Value> = serde_json::from_slice(&reply.body)?;
        let late = all.iter().find(|plugin| plugin["state"] != "ready");
        ensure!(late.is_none() && !all.is_empty(), "{late:?}");
        Ok(())
    })
    .await
}

fn post(host: &str, body: Body) -> Request<Body> {
    request(Method::POST, host, "/", body)
}

async fn call(client: &Client, request: Request<Body>) -> anyhow::Result<Reply> {
    let what = format!("{:?}", request.uri());
    tokio::time::timeout(SOON, client.call(request))
        .await
        .with_context(|| format!("{what}: no answer"))?
}

fn seen(backend: &Backend) -> anyhow::Result<Seen> {
    let seen = backend.take_seen().pop();
    seen.with_context(|| format!("{} has seen nothing", backend.name()))
}

fn reason(reply: &Reply) -> (u16, &str) {
    (reply.status.as_u16(), reply.header("leeward-reason"))
}

/// Lines of the access log for a host.
async fn lines(mesh: &Mesh, host: &str, count: usize) -> anyhow::Result<Vec<Value>> {
    eventually("lines in the log", SOON, || async {
        let log = mesh.node("a1")?.process.log()?;
        let lines = log.lines().filter_map(|line| serde_json::from_str(line).ok());
        let lines: Vec<Value> = lines.filter(|line: &Value| line["host"] == host).collect();
        ensure!(lines.len() >= count, "{} lines for {host}", lines.len());
        Ok(lines)
    })
    .await
}

async fn faults(mesh: &Mesh, plugin: &str) -> anyhow::Result<f64> {
    let label = format!("plugin=\"{plugin}\"");
    let node = mesh.node("a1")?;
    node.metric("leeward_plugin_faults_total", &[&label]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_a_filter_holds_up_when_its_call_fails_keeps_nobody_waiting() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    // A module that never lets the end go, and a component in the middle of its call.
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &pw_rogue("pauses", "FailClosed", "request_body:pause")
        + &rogue("sleeps", "FailClosed", "request-body:sleep 1500;response:calls")
        + &through("paused", &["pauses"], &["timeouts: {request: 1s}"])
        + &through("reset", &["pauses"], &[])
        + &through("asleep", &["sleeps"], &[]);
    apply(&mesh, &policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        backend.behave(Behave::Hang);
        let reply = call(&client, post("paused.example", bytes_body("some"))).await?;
        assert_eq!(reason(&reply), (504, "timeout"), "{protocol:?}");
        backend.behave(Behave::Reset);
        for host in ["reset.example", "asleep.example"] {
            let reply = call(&client, post(host, bytes_body("some"))).await?;
            assert_eq!(reason(&reply), (502, "reset"), "{protocol:?} {host}");
        }
        // The head of an answer passes a filter that still holds the request.
        backend.behave(Behave::Echo);
        let answer = client.send(post("reset.example", bytes_body("some")));
        assert_eq!(tokio::time::timeout(SOON, answer).await??.status(), 200);
    }
    assert!(faults(&mesh, "pauses").await?.abs() < 0.1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_a_filter_holds_lets_its_request_pass_the_same_filter() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    // It sends its head at once, and its body as the request's comes.
    backend.behave(Behave::Echo);
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &rogue("both", "FailClosed", "request-body:calls")
        + &rogue("held", "FailClosed", "response-body:calls;whole")
        + &filter(
            "sees",
            "ProxyWasm",
            "pw-misbehave",
            "FailClosed",
            "response_body:calls",
        )
        + &through("echo", &["held", "sees", "both"], &[]);
    apply(&mesh, &policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        let (sender, body) = channel_body();
        let asked = post("echo.example", body);
        let answer = tokio::spawn(async move { call(&client, asked).await });
        for piece in ["one ", "two ", "three"] {
            sender
                .send(Ok(Frame::data(Bytes::from_static(piece.as_bytes()))))
                .await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        drop(sender);
        let reply = answer.await??;
        assert_eq!(reply.text(), "one two three", "{protocol:?}");
        assert_eq!(reply.header("content-length"), "13");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_without_a_body_share_connections_and_kept_answers() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &pw_rogue("sees", "FailClosed", "")
        + &rogue(
            "whole",
            "FailClosed",
            "request-body:calls;response-body:calls;whole",
        )
        + &through("plain", &["sees"], &[])
        + &through("whole", &["whole"], &[])
        + &through("cached", &["sees"], &["cache: {}"]);
    apply(&mesh, &policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    backend.behave(Behave::Answer(
        Answer::text("kept").header("cache-control", CACHED),
    ));
    for n in 0..10 {
        let reply = call(&client, get("plain.example", "/")).await?;
        assert_eq!(reply.text(), "kept", "{n}");
        let seen = seen(&backend)?;
        assert!(!seen.headers.contains_key("content-length"), "a GET has no body");
    }
    assert_eq!(backend.connections(), 1, "requests without a body");
    for n in 0..10 {
        let reply = call(&client, post("whole.example", bytes_body("body"))).await?;
        assert_eq!(reply.text(), "kept", "{n}");
        assert_eq!(seen(&backend)?.headers["content-length"], "4");
    }
    assert_eq!(backend.connections(), 1, "requests that were held whole");
    let before = backend.requests();
    for _ in 0..5 {
        assert_eq!(call(&client, get("cached.example", "/")).await?.text(), "kept");
    }
    assert_eq!(backend.requests(), before + 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_was_held_whole_can_be_sent_again() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    backend.behave(Behave::Answer(Answer::status(503)));
    let spare = Backend::start("spare")?;
    spare.behave(Behave::Echo);
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &service("spare", &[(spare.address(), "a", "")], &[])
        + &rogue("whole", "FailClosed", "request-body:calls;whole")
        + &fallback("spare", &["service: {service: spare}"], &["onStatuses: [503]"])
        + &through(
            "app",
            &["whole"],
            &["fallback: spare", "retry: {retryOn: [5xx], maxBody: 16KiB}"],
        );
    apply(&mesh, &policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        let asked = request(Method::PUT, "app.example", "/", bytes_body("all of it"));
        let reply = call(&client, asked).await?;
        assert_eq!((reply.status.as_u16(), reply.text().as_str()), (200, "all of it"));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_for_too_long_is_not_lost() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &rogue(
            "whole",
            "FailOpen",
            "request-body:calls;response-body:calls;whole",
        )
        + &rogue("pieces", "FailClosed", "response-body:calls")
        + &pw_rogue("head", "FailOpen", "response_headers:pause")
        + &through("whole", &["whole"], &["timeouts: {request: 1s}"])
        + &through("pieces", &["pieces"], &["timeouts: {request: 1s}"])
        + &through("head", &["head"], &["timeouts: {request: 1s}"]);
    apply(&mesh, &policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        // The deadline is for the head of an answer, however long a filter waits for its body.
        backend.behave(Behave::Dribble(10, Duration::from_millis(200)));
        let reply = call(&client, get("whole.example", "/")).await?;
        assert_eq!(
            (reply.status.as_u16(), reply.body.len()),
            (200, 10),
            "{protocol:?}"
        );
        assert_eq!(reply.header("content-length"), "10");
        let reply = call(&client, get("pieces.example", "/")).await?;
        assert_eq!(
            (reply.status.as_u16(), reply.body.len()),
            (200, 10),
            "{protocol:?}"
        );
        // A failure at the deadline passes filters as any other answer does.
        backend.behave(Behave::Hang);
        let reply = call(&client, get("pieces.example", "/")).await?;
        assert_eq!(reason(&reply), (504, "timeout"), "{protocol:?}");
        // A client that is slow is no fault of the filter's.
        let (sender, body) = channel_body();
        sender.send(Ok(Frame::data(Bytes::from_static(b"some")))).await?;
        let reply = call(&client, post("whole.example", body)).await?;
        assert_eq!(reason(&reply), (504, "timeout"), "{protocol:?}");
        drop(sender);
        // The proxy closes a connection whose request never ended.
        let client = mesh.workload("a1", protocol)?;
        // A head that a filter never lets go comes with all that was in it.
        let answer = Answer::text("all of it").header("x-own", "1");
        backend.behave(Behave::Answer(answer));
        let reply = call(&client, get("head.example", "/")).await?;
        assert_eq!((reply.status.as_u16(), reply.text().as_str()), (200, "all of it"));
        assert_eq!(
            (reply.header("x-own"), reply.backend()),
            ("1", "app"),
            "{protocol:?}"
        );
    }
    assert!(faults(&mesh, "whole").await?.abs() < 0.1);
    assert!(faults(&mesh, "pieces").await?.abs() < 0.1);
    assert!(faults(&mesh, "head").await? >= 2.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_filter_says_at_the_end_of_an_answer_is_told_as_ever() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &rogue("panics", "FailClosed", "response-body:panic;whole")
        + &rogue("open", "FailOpen", "response-body:panic;whole")
        + &rogue("replies", "FailClosed", "response-body:hoarded;whole")
        + &rogue("whole", "FailClosed", "response-body:calls;whole")
        + &rogue("breaks", "FailClosed", "response-body:panic")
        + &rogue("asks", "FailOpen", "request-body:panic")
        + &through("panics", &["panics"], &[])
        + &through("open", &["open"], &[])
        + &through("replies", &["replies"], &[])
        + &through("whole", &["whole"], &[])
        + &through("breaks", &["breaks"], &[])
        + &through("asks", &["asks"], &[]);
    apply(&mesh, &policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        backend.behave(Behave::Answer(Answer::text("answer")));
        let reply = call(&client, get("panics.example", "/")).await?;
        assert_eq!(reason(&reply), (503, "plugin_fault"), "{protocol:?}");
        let asked = with_header(
            post("panics.example", bytes_body("")),
            "content-type",
            "application/grpc",
        );
        let reply = call(&client, with_header(asked, "te", "trailers")).await?;
        assert_eq!((reply.status.as_u16(), reply.header("grpc-status")), (200, "14"));
        let reply = call(&client, get("open.example", "/")).await?;
        assert_eq!(reply.text(), "answer");
        assert_eq!(call(&client, get("replies.example", "/")).await?.backend(), "");
        let reply = call(&client, post("asks.example", bytes_body("some"))).await?;
        assert_eq!(reply.text(), "answer");
        // Of a streamed one the head has gone.
        if let Ok(response) = client.send(get("breaks.example", "/")).await {
            assert_eq!(response.status(), 200);
            assert!(response.into_body().collect().await.is_err());
        }
        // The service may break off while a filter waits for the rest.
        backend.behave(Behave::CutShort);
        let reply = call(&client, get("whole.example", "/")).await?;
        assert_eq!(reason(&reply), (502, "reset"), "{protocol:?}");
    }
    let told = |line: &Value| {
        let text = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
        (
            line["status"].as_u64().unwrap_or_default(),
            text("reason"),
            text("plugin_fault"),
        )
    };
    for (host, count, want) in [
        ("panics.example", 4, (503, "plugin_fault", "trap")),
        ("open.example", 2, (200, "ok", "trap")),
        ("replies.example", 2, (200, "ok", "")),
        ("asks.example", 2, (200, "ok", "trap")),
        ("breaks.example", 2, (200, "plugin_fault", "trap")),
        ("whole.example", 2, (502, "reset", "")),
    ] {
        for line in lines(&mesh, host, count).await? {
            let (status, reason, fault) = told(&line);
            assert_eq!((status, reason.as_str(), fault.as_str()), want, "{line}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filters_word_on_the_body_of_a_request_is_the_answer_and_no_ladder_is_climbed() -> anyhow::Result<()>
{
    let mesh = one_node().await?;
    let app = Backend::start("app")?;
    app.behave(Behave::Hang);
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &rogue("replies", "FailClosed", "request-body:hoarded")
        + &rogue("panics", "FailClosed", "request-body:panic")
        + &filter("json", "Fallback", "static-json", "NextRung", "{\"body\": 1}")
        + &fallback(
            "ladder",
            &["plugin: {plugin: json}", "static: {status: 200}"],
            &[],
        )
        + &through("replies", &["replies"], &["fallback: ladder"])
        + &through("panics", &["panics"], &["fallback: ladder"]);
    apply(&mesh, &policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        let reply = call(&client, post("replies.example", bytes_body("some"))).await?;
        assert_eq!(
            (reply.status.as_u16(), reply.text().as_str()),
            (200, "0"),
            "{protocol:?}"
        );
        assert_eq!(reply.header("leeward-degraded"), "");
        let reply = call(&client, post("panics.example", bytes_body("some"))).await?;
        assert_eq!(reason(&reply), (503, "plugin_fault"), "{protocol:?}");
    }
    let calls = mesh
        .node("a1")?
        .metric("leeward_plugin_calls_total", &["plugin=\"json\""])
        .await?;
    assert!(calls.abs() < 0.1, "{calls} calls of the ladder's plugin");
    for (host, fault) in [("replies.example", None), ("panics.example", Some("trap"))] {
        for line in lines(&mesh, host, 2).await? {
            assert_eq!(line["plugin_fault"].as_str(), fault, "{line}");
            assert!(line["fallback"].is_null(), "{line}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_length_comes_back_whichever_filter_held_the_body() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let list = "request-body:calls;response-body:calls;whole";
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &rogue("whole", "FailClosed", list)
        + &rogue("idle", "FailClosed", "")
        + &through("first", &["whole", "idle"], &[])
        + &through("last", &["idle", "whole"], &[])
        + &through("both", &["whole", "idle", "whole"], &[]);
    apply(&mesh, &policy).await?;
    backend.behave(Behave::Answer(Answer::text("answer")));
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        for name in ["first", "last", "both"] {
            let reply = call(&client, post(&format!("{name}.example"), bytes_body("some"))).await?;
            assert_eq!(reply.header("content-length"), "6", "{protocol:?} {name}");
            assert_eq!(reply.text(), "answer");
            let seen = seen(&backend)?;
            assert_eq!(seen.headers["content-length"], "4", "{protocol:?} {name}");
        }
    }
    Ok(())
}

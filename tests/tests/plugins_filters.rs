//! Filters in the way of real requests: what they may do to heads, bodies and answers, and what they may not.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::BodyExt;
use hyper::body::Frame;
use leeward_proto::v1;
use leeward_testkit::binaries::plugin as built;
use leeward_testkit::policy::{fallback, plugin_of, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Body, Client, Mesh, Protocol, Reply, Seen, WebSocketEcho, bytes_body,
    call_streaming, channel_body, get, grpc_channel, request, with_header,
};
use std::time::Duration;
use tokio_tungstenite::tungstenite::Message;

const SOON: Duration = Duration::from_secs(30);
const BOTH: [Protocol; 2] = [Protocol::Http1, Protocol::Http2];
/// What the plugin `rogue` is told to do, see `plugins/misbehave/filter`.
const MISBEHAVE: &str = "x-misbehave";

async fn one_node() -> anyhow::Result<Mesh> {
    Mesh::builder().node("a", "a1").start().await
}

/// A plugin that edits heads.
fn rewrite(name: &str, config: &str) -> String {
    let config = format!("config: '{config}'");
    plugin_of(name, "Filter", &built("header-rewrite"), "FailClosed", &[&config])
}

/// A plugin that does as the request says, with as much body at once as `max`.
fn rogue(name: &str, on_fault: &str, max: u32) -> String {
    let limits = format!("limits: {{callTimeout: 2s, maxBody: {max}}}");
    // Every one of its faults is to be its own.
    let more = [limits.as_str(), "quarantine: {faults: 1000}"];
    plugin_of(name, "Filter", &built("misbehave-filter"), on_fault, &more)
}

fn misbehave(request: Request<Body>, list: &str) -> Request<Body> {
    with_header(request, MISBEHAVE, list)
}

/// On a connection of its own: a proxy that answers before it has had all of a body closes the one that it came on.
async fn call(mesh: &Mesh, protocol: Protocol, request: Request<Body>) -> anyhow::Result<Reply> {
    mesh.workload("a1", protocol)?.call(request).await
}

fn seen(backend: &Backend) -> anyhow::Result<Seen> {
    backend
        .take_seen()
        .pop()
        .with_context(|| format!("{} has seen nothing", backend.name()))
}

fn values<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    let values = headers.get_all(name).iter();
    values.map(|value| value.to_str().unwrap()).collect()
}

fn post(host: &str, body: Body) -> Request<Body> {
    request(Method::POST, host, "/", body)
}

/// A body in pieces, without a Content-Length.
fn pieces(pieces: &'static [&'static str]) -> Body {
    let (sender, body) = channel_body();
    // Ends with the body.
    tokio::spawn(async move {
        for piece in pieces {
            let piece = Frame::data(Bytes::from_static(piece.as_bytes()));
            if sender.send(Ok(piece)).await.is_err() {
                return;
            }
        }
    });
    body
}

fn faulted(reply: &Reply) -> bool {
    (reply.status.as_u16(), reply.header("leeward-reason")) == (503, "plugin_fault")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_are_rewritten_both_ways_in_the_order_of_policy_and_back() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let backend = Backend::start("app")?;
    let edits = r#"{"request": {"rename": {"x-user": "x-customer"}, "remove": ["x-debug"], "add": {"x-order": "1"}}, "response": {"remove": ["server"], "set": {"x-frame-options": "DENY"}, "add": {"x-order": "1"}}}"#;
    let second = r#"{"request": {"add": {"x-order": "2"}}, "response": {"add": {"x-order": "2"}}}"#;
    let by_rule = r#"{"request": {"add": {"x-order": "3"}}, "response": {"add": {"x-order": "3"}}}"#;
    let policy = service("app", &[(backend.address(), "b", "b1")], &[])
        + &rewrite("first", edits)
        + &rewrite("second", second)
        + &route(
            "app",
            "app.example",
            "app",
            &[&format!(
                "filters: [{{plugin: first}}, {{plugin: second}}, {{plugin: second, config: '{by_rule}'}}]"
            )],
        );
    mesh.apply_with_plugins(&policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        for (method, status, text) in [
            (Method::GET, 200, "whole"),
            (Method::HEAD, 200, ""),
            (Method::GET, 204, ""),
            (Method::GET, 304, ""),
            (Method::GET, 404, ""),
            (Method::DELETE, 500, ""),
        ] {
            let answer = if status == 200 {
                Answer::text("whole")
            } else {
                Answer::status(status)
            };
            backend.behave(Behave::Answer(answer.header("server", "secret/1.0")));
            let what = format!("{protocol:?} {method} {status}");
            let asked = request(method, "app.example", "/a?b=c", leeward_testkit::empty_body());
            let asked = with_header(with_header(asked, "x-user", "u1"), "x-debug", "1");
            let reply = client.call(asked).await?;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (status, text),
                "{what}"
            );
            assert_eq!(reply.header("x-frame-options"), "DENY", "{what}");
            assert_eq!(reply.header("server"), "", "{what}");
            assert_eq!(values(&reply.headers, "x-order"), ["3", "2", "1"], "{what}");
            let seen = seen(&backend)?;
            assert_eq!(seen.headers["x-customer"], "u1", "{what}");
            assert!(!seen.headers.contains_key("x-user") && !seen.headers.contains_key("x-debug"));
            assert_eq!(values(&seen.headers, "x-order"), ["1", "2", "3"], "{what}");
            assert_eq!(seen.target, "/a?b=c");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn json_is_redacted_whole_however_it_comes() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let more = [
        "limits: {callTimeout: 2s, maxBody: 4096}",
        r#"config: '{"fields": ["card"], "request": true}'"#,
    ];
    let open = ["limits: {callTimeout: 2s, maxBody: 4096}", more[1]];
    let is_json = r#"{"response": {"set": {"content-type": "application/json"}}}"#;
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &plugin_of("redact", "Filter", &built("json-redactor"), "FailClosed", &more)
        + &plugin_of("lenient", "Filter", &built("json-redactor"), "FailOpen", &open)
        + &rewrite("is-json", is_json)
        + &route("app", "app.example", "app", &["filters: [{plugin: redact}]"])
        + &route(
            "echo",
            "echo.example",
            "app",
            &["filters: [{plugin: redact}, {plugin: is-json}]"],
        )
        + &route(
            "open",
            "open.example",
            "app",
            &["filters: [{plugin: lenient}, {plugin: is-json}]"],
        );
    mesh.apply_with_plugins(&policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        // With a length, which is another one then.
        let body = r#"{"card": "4111", "items": [{"card": 1, "n": 2}]}"#;
        let answer = Answer::text(body).header("content-type", "application/json");
        backend.behave(Behave::Answer(answer.clone().header("etag", "\"1\"")));
        let reply = client.get("app.example", "/").await?;
        let want = r#"{"card":"***","items":[{"card":"***","n":2}]}"#;
        let json: serde_json::Value = serde_json::from_slice(&reply.body)?;
        assert_eq!(json, serde_json::from_str::<serde_json::Value>(want)?);
        assert_eq!(reply.header("content-length"), reply.body.len().to_string());
        assert_eq!(reply.header("etag"), "", "it was that of another body");
        // Of HEAD nothing is known, so nothing is said.
        let head = request(Method::HEAD, "app.example", "/", leeward_testkit::empty_body());
        let head = client.call(head).await?;
        assert_eq!((head.status.as_u16(), head.header("content-length")), (200, ""));
        // A body that isn't JSON passes as it is.
        backend.behave(Behave::Answer(Answer::text("card: 4111")));
        assert_eq!(client.get("app.example", "/").await?.text(), "card: 4111");
        // What says that it is JSON and isn't is refused.
        backend.behave(Behave::Answer(
            Answer::text("{card").header("content-type", "application/json"),
        ));
        assert_eq!(client.get("app.example", "/").await?.status, 502);

        // Streamed in both directions, each way cut where it is worst.
        backend.behave(Behave::Echo);
        let sent = pieces(&["{\"ca", "rd\": \"41", "11\", \"n\"", ": 1}"]);
        let sent = with_header(post("echo.example", sent), "content-type", "application/json");
        let reply = client.call(sent).await?;
        let json: serde_json::Value = serde_json::from_slice(&reply.body)?;
        assert_eq!(json, serde_json::json!({"card": "***", "n": 1}), "{protocol:?}");
        let length = reply.body.len().to_string();
        assert_eq!(reply.header("content-length"), length, "{protocol:?}");
        let sent = pieces(&["{\"ca", "rd\": 1}"]);
        let sent = with_header(post("app.example", sent), "content-type", "application/json");
        let reply = client.call(sent).await?;
        assert_eq!(reply.text(), r#"{"card": "***"}"#, "{protocol:?}");
        assert_eq!(seen(&backend)?.headers["content-length"], "15");

        // What is larger than the plugin may have: refused, or let through as it came.
        let large = || bytes_body(vec![b' '; 5000]);
        let sent = with_header(post("echo.example", large()), "content-type", "application/json");
        let reply = client.call(sent).await?;
        assert!(faulted(&reply), "{protocol:?} {reply:?}");
        assert!(backend.take_seen().is_empty(), "{protocol:?}");
        // Not JSON on its way there, but on the way back.
        let reply = client.call(post("echo.example", large())).await?;
        assert!(faulted(&reply), "{protocol:?} {reply:?}");
        for json in [true, false] {
            let mut sent = post("open.example", large());
            if json {
                sent = with_header(sent, "content-type", "application/json");
            }
            let reply = client.call(sent).await?;
            assert_eq!(
                (reply.status.as_u16(), reply.body.len()),
                (200, 5000),
                "{protocol:?}"
            );
        }
        backend.take_seen();
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_pass_in_pieces_and_whole() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &rogue("rogue", "FailClosed", 1000)
        + &route("app", "app.example", "app", &["filters: [{plugin: rogue}]"]);
    mesh.apply_with_plugins(&policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        // Piece by piece: what has come goes on before the rest is there.
        backend.behave(Behave::Echo);
        let (sender, body) = channel_body();
        let asked = misbehave(
            post("app.example", body),
            "request-body:swell 2;response-body:swell 2",
        );
        let sending = async {
            sender.send(Ok(Frame::data(Bytes::from_static(b"ab")))).await?;
            anyhow::Ok(())
        };
        let (response, sent) = tokio::join!(client.send(asked), sending);
        let (mut response, ()) = (response?, sent?);
        let first = tokio::time::timeout(SOON, response.body_mut().frame()).await?;
        let first = first.context("no body")??.into_data().ok().context("no data")?;
        assert!(!first.is_empty() && b"abababab".starts_with(&first), "{first:?}");
        sender.send(Ok(Frame::data(Bytes::from_static(b"c")))).await?;
        drop(sender);
        let rest = tokio::time::timeout(SOON, response.into_body().collect()).await??;
        assert_eq!([first, rest.to_bytes()].concat(), b"ababababcccc");

        // Whole: with a length again, however it came.
        let list = "request-body:replace hello;response-body:replace bye;whole";
        let reply = client
            .call(misbehave(post("app.example", pieces(&["a", "b"])), list))
            .await?;
        assert_eq!(reply.text(), "bye", "{protocol:?}");
        assert_eq!(reply.header("content-length"), "3", "{protocol:?}");
        // The first of the two is that of the request before.
        assert_eq!(seen(&backend)?.headers["content-length"], "5");
        // To nothing, and from nothing.
        let list = "request-body:replace ;response-body:replace ;whole";
        let reply = client
            .call(misbehave(post("app.example", bytes_body("abc")), list))
            .await?;
        assert_eq!((reply.status.as_u16(), reply.text().as_str()), (200, ""));
        backend.behave(Behave::Answer(Answer::status(200)));
        let reply = client.call(misbehave(get("app.example", "/"), list)).await?;
        assert_eq!((reply.status.as_u16(), reply.text().as_str()), (200, ""));

        // An answer that breaks off on its way to a filter that wants all of it is no answer.
        backend.behave(Behave::CutShort);
        let reply = client
            .call(misbehave(get("app.example", "/"), "response-body:calls;whole"))
            .await?;
        assert_eq!(
            (reply.status.as_u16(), reply.header("leeward-reason")),
            (502, "reset")
        );
        // And one that passes in pieces breaks off at the client.
        let cut = client.call(misbehave(get("app.example", "/"), "response-body:pass"));
        assert!(
            cut.await.is_err(),
            "{protocol:?}: half an answer was given for the whole"
        );
        backend.take_seen();
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_that_answers_itself_ends_the_request_there() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    // Whoever answers first is what the client gets: a service that doesn't read may be faster than the filter.
    backend.behave(Behave::AfterBody(Answer::text("app")));
    let mark = |name: &str| {
        let edits = format!(
            r#"{{"request": {{"set": {{"x-{name}": "1"}}}}, "response": {{"set": {{"x-{name}": "1"}}}}}}"#
        );
        rewrite(name, &edits)
    };
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &mark("before")
        + &mark("after")
        + &rogue("rogue", "FailClosed", 1000)
        + &route(
            "app",
            "app.example",
            "app",
            &["filters: [{plugin: before}, {plugin: rogue}, {plugin: after}]"],
        );
    mesh.apply_with_plugins(&policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        for list in [
            "request:hoarded",
            "request-body:hoarded",
            "request-body:hoarded;whole",
        ] {
            let sent = misbehave(post("app.example", bytes_body("some")), list);
            let reply = client.call(sent).await?;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, "0"),
                "{list}"
            );
            assert_eq!(reply.header("x-before"), "1", "{list}");
            assert_eq!(reply.backend(), "", "{list}");
            if list == "request:hoarded" {
                assert_eq!(reply.header("x-after"), "", "it never saw the request");
                assert!(backend.take_seen().is_empty(), "{list}");
            }
            backend.take_seen();
        }
        for list in ["response:hoarded", "response-body:hoarded;whole"] {
            let reply = client.call(misbehave(get("app.example", "/"), list)).await?;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, "0"),
                "{list}"
            );
            assert_eq!(reply.backend(), "", "{list}: in the service's place");
            assert_eq!(seen(&backend)?.headers["x-after"], "1");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_end_a_request_or_let_it_pass_as_policy_says() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &rogue("open", "FailOpen", 1000)
        + &rogue("closed", "FailClosed", 1000)
        + &route("open", "open.example", "app", &["filters: [{plugin: open}]"])
        + &route(
            "closed",
            "closed.example",
            "app",
            &["filters: [{plugin: closed}]"],
        );
    mesh.apply_with_plugins(&policy).await?;
    let all = [
        "request:panic",
        "request-body:panic",
        "request-body:panic;whole",
        "response:panic",
        "response-body:panic",
        "response-body:panic;whole",
    ];
    for protocol in BOTH {
        for list in all {
            let what = format!("{protocol:?} {list}");
            backend.behave(if list == "request-body:panic" {
                // Else the answer may have begun before the first piece has come, and would only break off.
                Behave::AfterBody(Answer::text("some"))
            } else {
                Behave::Echo
            });
            let reply = call(
                &mesh,
                protocol,
                misbehave(post("open.example", pieces(&["so", "me"])), list),
            )
            .await
            .context(what.clone())?;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, "some"),
                "{what}"
            );
            let reply = call(
                &mesh,
                protocol,
                misbehave(post("closed.example", pieces(&["so", "me"])), list),
            )
            .await;
            if list == "response-body:panic" {
                // Its head has gone.
                assert!(reply.is_err(), "{what}: {reply:?}");
            } else {
                let reply = reply.context(what.clone())?;
                assert!(faulted(&reply), "{what}: {reply:?}");
            }
            // One bad request never poisons the next.
            backend.behave(Behave::Echo);
            let reply = call(&mesh, protocol, post("closed.example", bytes_body("fine"))).await?;
            assert_eq!(reply.text(), "fine", "{what}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trailers_grpc_and_upgrades_pass() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let (app, grpc) = (Backend::start("app")?, Backend::start("grpc")?);
    let echo = WebSocketEcho::start()?;
    app.behave(Behave::Echo);
    grpc.behave(Behave::Grpc);
    let sets = r#"{"request": {"set": {"x-seen": "1"}}, "response": {"set": {"x-seen": "1"}}}"#;
    let filters = "filters: [{plugin: rogue}, {plugin: rewrite}, {plugin: open}]";
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("grpc", &[(grpc.address(), "a", "")], &["protocol: HTTP2"])
        + &service("echo", &[(echo.address(), "a", "")], &[])
        + &rogue("rogue", "FailClosed", 1000)
        + &rogue("open", "FailOpen", 1000)
        + &rewrite("rewrite", sets)
        + &route("app", "app.example", "app", &[filters])
        + &route("grpc", "grpc.example", "grpc", &[filters])
        + &route("echo", "echo.example", "echo", &[filters]);
    mesh.apply_with_plugins(&policy).await?;

    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        // Unseen, in pieces, and whole.
        for list in [
            "",
            "request-body:calls;response-body:calls",
            "request-body:calls;response-body:calls;whole",
        ] {
            let (sender, body) = channel_body();
            // Ends with the body.
            tokio::spawn(async move {
                let mut trailers = HeaderMap::new();
                trailers.insert("x-sum", HeaderValue::from_static("7"));
                drop(sender.send(Ok(Frame::data(Bytes::from_static(b"data")))).await);
                drop(sender.send(Ok(Frame::trailers(trailers))).await);
            });
            let sent = with_header(post("app.example", body), "te", "trailers");
            let sent = misbehave(with_header(sent, "trailer", "x-sum"), list);
            let reply = client.call(sent).await?;
            assert_eq!(reply.text(), "data", "{protocol:?} {list}");
            let trailers = reply
                .trailers
                .with_context(|| format!("{protocol:?} {list}: no trailers"))?;
            assert_eq!(trailers["x-sum"], "7");
        }
    }

    let channel = grpc_channel(mesh.node("a1")?.outbound, "grpc.example")?;
    let (sender, response) = call_streaming(channel, "/echo.Echo/Talk").await?;
    assert_eq!(response.metadata().get("x-seen").context("not seen")?, "1");
    let mut answers = response.into_inner();
    for i in 0..20u32 {
        let message = Bytes::from(format!("message {i}"));
        sender.send(message.clone()).await?;
        let answer = tokio::time::timeout(SOON, answers.message()).await??;
        assert_eq!(answer, Some(message));
    }
    drop(sender);
    assert_eq!(tokio::time::timeout(SOON, answers.message()).await??, None);
    let trailers = answers.trailers().await?.context("no trailers")?;
    assert_eq!(trailers.get("x-echoed").context("no x-echoed")?, "yes");

    let stream = tokio::net::TcpStream::connect(mesh.node("a1")?.outbound).await?;
    let connecting = tokio_tungstenite::client_async("ws://echo.example/chat", stream);
    let (mut socket, response) = tokio::time::timeout(SOON, connecting).await??;
    assert_eq!(response.status(), 101);
    for size in [1, 70_000] {
        let message = Message::binary(vec![7; size]);
        socket.send(message.clone()).await?;
        let answer = tokio::time::timeout(SOON, socket.next()).await?;
        assert_eq!(answer.context("closed")??, message);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_at_the_end_of_a_grpc_answer_keeps_its_status() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let grpc = Backend::start("grpc")?;
    grpc.behave(Behave::Grpc);
    let mut policy = service("grpc", &[(grpc.address(), "a", "")], &["protocol: HTTP2"])
        + &rogue("open", "FailOpen", 1000);
    for (host, config) in [
        ("pieces", "response-body:panic"),
        ("whole", "response-body:panic;whole"),
    ] {
        let filters = format!("filters: [{{plugin: open, config: '{config}'}}]");
        policy += &route(host, &format!("{host}.example"), "grpc", &[&filters]);
    }
    mesh.apply_with_plugins(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http2)?;
    for host in ["pieces.example", "whole.example"] {
        let sent = with_header(post(host, bytes_body("\0\0\0\0\x03one")), "te", "trailers");
        let sent = with_header(sent, "content-type", "application/grpc");
        let reply = client.call(sent).await?;
        assert_eq!(reply.text(), "\0\0\0\0\x03one", "{host}");
        let trailers = reply.trailers.with_context(|| format!("{host}: no trailers"))?;
        assert_eq!(trailers["grpc-status"], "0", "{host}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_answers_passes_the_filters() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let (spare, dead) = (Backend::start("spare")?, Backend::refusing("dead")?);
    let marks = r#"{"request": {"set": {"x-in": "1"}}, "response": {"set": {"x-out": "1"}}}"#;
    let filters = "filters: [{plugin: mark}]";
    let never = "backendRefs: [{service: spare, when: {flag: absent}}]";
    let policy = service("dead", &[(dead.address(), "a", "")], &[])
        + &service("nobody", &[], &[])
        + &service("spare", &[(spare.address(), "a", "")], &[])
        + &rewrite("mark", marks)
        + &plugin_of("json", "Fallback", &built("static-json"), "NextRung", &[])
        + &fallback("static", &["static: {status: 200, body: still}"], &[])
        + &fallback(
            "plugin",
            &["plugin: {plugin: json, config: '{\"body\": 1}'}"],
            &[],
        )
        + &fallback("other", &["service: {service: spare}"], &[])
        + &route("bare", "bare.example", "dead", &[filters])
        + &route("nobody", "nobody.example", "nobody", &[filters])
        + &route("static", "static.example", "dead", &[filters, "fallback: static"])
        + &route("plugin", "plugin.example", "dead", &[filters, "fallback: plugin"])
        + &route("other", "other.example", "dead", &[filters, "fallback: other"])
        + &leeward_testkit::policy::rules("never", "never.example", &[&[never, filters, "fallback: static"]]);
    mesh.apply_with_plugins(&policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        for (host, status, degraded) in [
            ("bare", 503, ""),
            ("nobody", 503, ""),
            ("static", 200, "static/0"),
            ("plugin", 200, "plugin/0"),
            ("other", 200, "other/0"),
            ("never", 200, "static/0"),
        ] {
            let reply = client.get(&format!("{host}.example"), "/").await?;
            assert_eq!(reply.status.as_u16(), status, "{protocol:?} {host} {reply:?}");
            assert_eq!(reply.header("leeward-degraded"), degraded, "{host}");
            assert_eq!(reply.header("x-out"), "1", "{protocol:?} {host} {reply:?}");
        }
        assert_eq!(seen(&spare)?.headers["x-in"], "1");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_filter_can_smuggle_through_a_head() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &rogue("rogue", "FailClosed", 1000)
        + &route("app", "app.example", "app", &["filters: [{plugin: rogue}]"]);
    mesh.apply_with_plugins(&policy).await?;
    let edits = [
        ("edit-split", "invalid"),
        ("edit-name", "invalid"),
        ("edit-bytes", "invalid"),
        ("edit-length", "forbidden"),
        ("edit-hop", "forbidden"),
        ("edit-host", "forbidden"),
        ("edit-pseudo", "forbidden"),
        ("edit-huge", "too-large"),
    ];
    let answers = [
        "bad-status",
        "informational",
        "hop-by-hop",
        "length",
        "split",
        "split-name",
        "bytes",
        "pseudo",
        "ours",
        "huge-header",
        "many-headers",
        "alias",
        "huge",
    ];
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        for (edit, told) in edits {
            let what = format!("{protocol:?} {edit}");
            let sent = misbehave(
                post("app.example", bytes_body("0123456789")),
                &format!("request:{edit}"),
            );
            let reply = client.call(sent).await?;
            assert_eq!((reply.status.as_u16(), reply.backend()), (200, "app"), "{what}");
            let seen = seen(&backend)?;
            assert_eq!(seen.headers["x-edit"], told, "{what}");
            assert!(!seen.headers.contains_key("set-cookie"), "{what}");
            assert_eq!(seen.headers["host"], "app.example", "{what}");
            assert_eq!(values(&seen.headers, "content-length"), ["10"], "{what}");
            assert!(!seen.headers.contains_key("transfer-encoding"), "{what}");

            let reply = client
                .call(misbehave(get("app.example", "/"), &format!("response:{edit}")))
                .await?;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, "app"),
                "{what}"
            );
            assert_eq!(reply.header("x-edit"), told, "{what}");
            assert!(!reply.headers.contains_key("set-cookie"), "{what}");
        }
        for answer in answers {
            for at in ["request", "response"] {
                let list = format!("{at}:{answer}");
                let reply = client.call(misbehave(get("app.example", "/"), &list)).await?;
                assert!(faulted(&reply), "{protocol:?} {list} {reply:?}");
                assert!(!reply.headers.contains_key("set-cookie"), "{list}");
            }
        }
        assert_next_is_fine(&client).await?;
    }
    let faults = mesh
        .node("a1")?
        .metric(
            "leeward_plugin_faults_total",
            &["plugin=\"rogue\"", "fault=\"bad_response\""],
        )
        .await?;
    ensure!(faults >= 2.0 * 2.0 * 10.0, "{faults} bad responses");
    Ok(())
}

async fn assert_next_is_fine(client: &Client) -> anyhow::Result<()> {
    let reply = client.get("app.example", "/").await?;
    ensure!(reply.backend() == "app", "{reply:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_that_has_vanished_from_a_proxys_policy_lets_nothing_pass() -> anyhow::Result<()> {
    let mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let none = mesh.dir().join("none.wasm");
    std::fs::write(&none, "no module")?;
    let guard = |more: &str, plugin: &str| {
        route(
            "filtered",
            "filtered.example",
            "app",
            &[&format!("filters: [{{plugin: {plugin}}}]")],
        ) + &route(
            "routed",
            "routed.example",
            "app",
            &[&format!("router: {{plugin: {plugin}-r}}")],
        ) + more
    };
    // Even one that lets requests pass when it fails: that was its resource's to say.
    let good = plugin_of("good", "Filter", &built("misbehave-filter"), "FailOpen", &[])
        + &plugin_of(
            "good-r",
            "Router",
            &built("canary-router"),
            "FailOpen",
            &[r#"config: '{"canary": "x", "percent": 0}'"#],
        );
    let bad = plugin_of("bad", "Filter", &none.display().to_string(), "FailOpen", &[])
        + &plugin_of("bad-r", "Router", &none.display().to_string(), "FailOpen", &[]);
    mesh.apply_with_plugins(
        &(service("app", &[(backend.address(), "a", "")], &[]) + &good + &guard("", "good")),
    )
    .await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for host in ["filtered.example", "routed.example"] {
        assert_eq!(client.get(host, "/").await?.backend(), "app");
    }
    // The proxy can't have the routes' next revisions, since what those name can't be loaded, and goes on with the last; of
    // which the control plane knows nothing any more.
    mesh.apply(&guard(&bad, "bad")).await?;
    for host in ["filtered.example", "routed.example"] {
        assert_eq!(
            client.get(host, "/").await?.backend(),
            "app",
            "the last good revision stays"
        );
    }
    for plugin in ["good", "good-r"] {
        mesh.delete(v1::Kind::Plugin, plugin).await?;
    }
    let before = backend.requests();
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        for host in ["filtered.example", "routed.example"] {
            let reply = client.get(host, "/").await?;
            assert!(faulted(&reply), "{host}: {reply:?}");
        }
    }
    assert_eq!(backend.requests(), before);
    for plugin in ["good", "good-r"] {
        let labels = [format!("plugin=\"{plugin}\""), "fault=\"not_loaded\"".to_owned()];
        let counted = mesh
            .node("a1")?
            .metric("leeward_plugin_faults_total", &[&labels[0], &labels[1]])
            .await?;
        assert!(counted >= 2.0, "{plugin}: {counted}");
    }
    Ok(())
}

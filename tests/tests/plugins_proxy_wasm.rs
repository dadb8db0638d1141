//! proxy-wasm modules, as built for Envoy, behind real proxies.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request};
use hyper::body::Frame;
use leeward_testkit::binaries::plugin as built;
use leeward_testkit::policy::{plugin_of, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Body, Client, Mesh, Node, Protocol, Reply, Seen, bytes_body, channel_body,
    eventually, get, request, with_header,
};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);
const BOTH: [Protocol; 2] = [Protocol::Http1, Protocol::Http2];

fn seen(backend: &Backend) -> anyhow::Result<Seen> {
    let seen = backend.take_seen().pop();
    seen.with_context(|| format!("{} has seen nothing", backend.name()))
}

fn post(host: &str, body: Body) -> Request<Body> {
    request(Method::POST, host, "/orders", body)
}

/// One that needs longer than a module waits for it is no matter of this test, on a busy machine.
async fn let_in(client: &Client, token: &'static str) -> anyhow::Result<Reply> {
    eventually("to be let in", SOON, || async {
        let reply = client
            .call(with_header(get("demo.example", "/a?b=c"), "authorization", token))
            .await?;
        ensure!(reply.status == 200, "{reply:?}");
        Ok(reply)
    })
    .await
}

async fn custom(node: &Node, metric: &str, name: &str) -> anyhow::Result<f64> {
    node.metric(metric, &["plugin=\"demo\"", &format!("name=\"{name}\"")])
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_field_is_read_and_another_set() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let backend = Backend::start("app")?;
    let policy = service("app", &[(backend.address(), "b", "b1")], &[])
        + &plugin_of("headers", "ProxyWasm", &built("pw-headers"), "FailClosed", &[])
        + &route("app", "app.example", "app", &["filters: [{plugin: headers}]"]);
    mesh.apply_with_plugins(&policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        for (sent, want) in [(Some("this"), "this"), (None, "none")] {
            let mut asked = get("app.example", "/");
            if let Some(sent) = sent {
                asked = with_header(asked, "x-bench-in", sent);
            }
            assert_eq!(client.call(asked).await?.backend(), "app");
            assert_eq!(seen(&backend)?.headers["x-bench-out"], want, "{protocol:?}");
        }
        for (method, status) in [(Method::HEAD, 200), (Method::GET, 204), (Method::GET, 304)] {
            backend.behave(Behave::Answer(Answer::status(status)));
            let reply = client
                .call(request(method, "app.example", "/", leeward_testkit::empty_body()))
                .await?;
            assert_eq!(reply.status.as_u16(), status);
            assert_eq!(seen(&backend)?.headers["x-bench-out"], "none");
        }
        // The body and the trailers behind it pass untouched.
        backend.behave(Behave::Echo);
        let (sender, body) = channel_body();
        // Ends with the body.
        tokio::spawn(async move {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", HeaderValue::from_static("7"));
            drop(sender.send(Ok(Frame::data(Bytes::from_static(b"data")))).await);
            drop(sender.send(Ok(Frame::trailers(trailers))).await);
        });
        let sent = with_header(post("app.example", body), "te", "trailers");
        let reply = client.call(with_header(sent, "trailer", "x-sum")).await?;
        assert_eq!(reply.text(), "data");
        assert_eq!(reply.trailers.context("no trailers")?["x-sum"], "7");
        backend.take_seen();
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_as_for_envoy_asks_counts_reports_and_rewrites() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (app, auth, audit) = (
        Backend::start("app")?,
        Backend::start("auth")?,
        Backend::start("audit")?,
    );
    audit.behave(Behave::Grpc);
    auth.behave(Behave::Answer(Answer::text("yes").header("x-user", "ada")));
    let config = r#"{"auth": {"cluster": "auth", "path": "/check"}, "audit": {"cluster": "outbound|80||audit.default.svc.cluster.local", "service": "demo.Audit", "method": "Report"}, "tickMs": 50, "requestBody": {"from": "secret", "to": "*"}, "responseBody": {"from": "card", "to": "++++"}}"#;
    let more = [
        "limits: {callTimeout: 2s, maxBody: 65536}",
        "access: {services: [auth, audit]}",
    ];
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("auth", &[(auth.address(), "a", "")], &[])
        + &service("audit", &[(audit.address(), "a", "")], &["protocol: HTTP2"])
        + &plugin_of("demo", "ProxyWasm", &built("pw-demo"), "FailClosed", &more)
        + &route(
            "demo",
            "demo.example",
            "app",
            &[&format!("filters: [{{plugin: demo, config: '{config}'}}]")],
        );
    mesh.apply_with_plugins(&policy).await?;
    let node = mesh.node("a1")?;
    let mut last = 0;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        // An HTTP callout, a property, and a number that all workers share.
        app.behave(Behave::Answer(Answer::text("app")));
        for _ in 0..5 {
            let reply = let_in(&client, "Bearer t").await?;
            assert_eq!(reply.text(), "app");
            let at_app = seen(&app)?;
            assert_eq!(at_app.headers["x-auth-user"], "ada");
            assert_eq!(at_app.headers["x-pw-source"], reply_source(&at_app)?);
            let count: u64 = at_app.headers["x-pw-count"].to_str()?.parse()?;
            assert!(count > last, "{count} after {last}");
            last = count;
            assert!(!reply.header("x-pw-demo").is_empty(), "{reply:?}");
            let at_auth = seen(&auth)?;
            assert_eq!(at_auth.headers["authorization"], "Bearer t");
            assert_eq!(at_auth.headers["x-for-path"], "/a?b=c");
            assert_eq!(at_auth.target, "/check");
        }
        // Bodies, whole, both ways.
        app.behave(Behave::Echo);
        let reply = eventually("to be let in", SOON, || async {
            let reply = client
                .call(post("demo.example", bytes_body("my secret card")))
                .await?;
            ensure!(reply.status == 200, "{reply:?}");
            Ok(reply)
        })
        .await?;
        assert_eq!(reply.text(), "my * ++++", "{protocol:?}");

        // A local reply, which is the module's own, and no request at the service.
        app.take_seen();
        auth.behave(Behave::Answer(Answer::status(401)));
        let reply = eventually("to be refused", SOON, || async {
            let reply = client.get("demo.example", "/private").await?;
            ensure!(reply.status == 403, "{reply:?}");
            Ok(reply)
        })
        .await?;
        assert_eq!(
            (reply.text().as_str(), reply.header("x-pw-demo")),
            ("not allowed\n", "refused")
        );
        assert!(app.take_seen().is_empty());
        // Nobody to ask.
        auth.stop().await;
        let reply = client.get("demo.example", "/").await?;
        assert_eq!(
            (reply.status.as_u16(), reply.header("x-pw-demo")),
            (503, "refused"),
            "{reply:?}"
        );
        auth.resume()?;
        auth.behave(Behave::Answer(Answer::text("yes").header("x-user", "ada")));
    }
    // Timers and gRPC callouts; a queue that is read by whoever has the timer; metrics of all three kinds.
    eventually("reports and metrics", SOON, || async {
        ensure!(
            audit
                .take_seen()
                .iter()
                .any(|seen| seen.target.ends_with("/demo.Audit/Report"))
        );
        for (metric, name, least) in [
            ("leeward_plugin_custom_total", "pw_demo_requests", 16.0),
            ("leeward_plugin_custom_total", "pw_demo_refused", 4.0),
            ("leeward_plugin_custom_total", "pw_demo_audited", 1.0),
            ("leeward_plugin_custom", "pw_demo_total", 16.0),
            ("leeward_plugin_custom_values_count", "pw_demo_auth_ms", 12.0),
        ] {
            let value = custom(node, metric, name).await?;
            ensure!(value >= least, "{metric} {name} is {value}");
        }
        Ok(())
    })
    .await?;
    let metrics = node.metrics().await?;
    for line in [
        "# TYPE leeward_plugin_custom gauge",
        "# TYPE leeward_plugin_custom_values histogram",
        "leeward_plugin_custom_values_bucket{plugin=\"demo\",name=\"pw_demo_auth_ms\",le=\"+Inf\"}",
    ] {
        assert!(metrics.contains(line), "{line} isn't in {metrics}");
    }
    // A gauge is one number, whichever workers have set it.
    let gauges = metrics
        .lines()
        .filter(|line| line.starts_with("leeward_plugin_custom{"));
    assert_eq!(gauges.count(), 1);
    let logs = Client::new(node.admin, Protocol::Http1)
        .get("admin", "/plugins/logs?plugin=demo")
        .await?
        .text();
    assert!(logs.contains("refused: /private"), "{logs}");
    Ok(())
}

/// Where the test is seen from: some port of this machine.
fn reply_source(seen: &Seen) -> anyhow::Result<HeaderValue> {
    let source = seen.headers.get("x-pw-source").context("no source")?;
    ensure!(source.to_str()?.starts_with("127.0.0.1:"), "{source:?}");
    Ok(source.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_module_may_not_do_is_refused() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (app, other) = (Backend::start("app")?, Backend::start("other")?);
    let more = ["quarantine: {faults: 1000}", "access: {services: [app]}"];
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("other", &[(other.address(), "a", "")], &[])
        + &plugin_of("rogue", "ProxyWasm", &built("pw-misbehave"), "FailClosed", &more)
        + &route("app", "app.example", "app", &["filters: [{plugin: rogue}]"]);
    mesh.apply_with_plugins(&policy).await?;
    let node = mesh.node("a1")?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        let misbehave = |list: &str| {
            let request = with_header(post("app.example", bytes_body("0123456789")), "x-misbehave", list);
            client.call(request)
        };
        for word in ["split", "bytes", "name", "length", "hop", "huge-header"] {
            for callback in ["request_headers", "response_headers"] {
                let list = format!("{callback}:{word}");
                let reply = misbehave(&list).await?;
                assert_eq!(
                    (reply.status.as_u16(), reply.text().as_str()),
                    (200, "app"),
                    "{list}"
                );
                let at_app = seen(&app)?;
                assert!(
                    !at_app.headers.contains_key("set-cookie") && !reply.headers.contains_key("set-cookie")
                );
                // The module may change the body, so that its length isn't known before it is there.
                let framing: Vec<_> = ["content-length", "transfer-encoding"]
                    .iter()
                    .flat_map(|name| at_app.headers.get_all(*name))
                    .collect();
                assert_eq!(framing.len(), 1, "{list}: {framing:?}");
                assert!(
                    framing[0] == "10" || framing[0] == "chunked",
                    "{list}: {framing:?}"
                );
                let told = if callback == "request_headers" {
                    at_app.headers.get("x-edit").cloned()
                } else {
                    reply.headers.get("x-edit").cloned()
                };
                // Framing is not said to be refused, since modules as for Envoy set it; it is only not set.
                let told = told.with_context(|| list.clone())?;
                assert!(told != "0" || matches!(word, "length" | "hop"), "{list}");
            }
        }
        for (word, want) in [("reply", "reply"), ("reply-twice", "first")] {
            let reply = misbehave(&format!("request_headers:{word}")).await?;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, want),
                "{word}"
            );
            assert!(app.take_seen().is_empty(), "{word}");
            let reply = misbehave(&format!("response_headers:{word}")).await?;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, want),
                "{word}"
            );
            app.take_seen();
        }
        for word in ["reply-status", "reply-split", "reply-huge"] {
            let reply = misbehave(&format!("request_headers:{word}")).await?;
            assert!(!reply.headers.contains_key("set-cookie"), "{word}: {reply:?}");
            assert!(
                reply.backend() == "app" || reply.status == 503,
                "{word}: {reply:?}"
            );
        }
        for word in [
            "pointers",
            "pairs",
            "context",
            "offsets",
            "foreign",
            "grpc nobody",
            "call other",
        ] {
            for callback in [
                "request_headers",
                "request_body",
                "response_headers",
                "response_body",
            ] {
                let reply = misbehave(&format!("{callback}:{word}")).await?;
                assert_eq!(
                    (reply.status.as_u16(), reply.text().as_str()),
                    (200, "app"),
                    "{callback}:{word}"
                );
            }
        }
        assert_eq!(other.requests(), 0, "a service that policy doesn't name");
        // More calls than it may have under way.
        let reply = misbehave("request_headers:call-flood app").await?;
        assert_eq!(reply.backend(), "app");
        app.take_seen();
    }
    let logs = Client::new(node.admin, Protocol::Http1)
        .get("admin", "/plugins/logs?plugin=rogue")
        .await?
        .text();
    assert!(!logs.contains("BUG"), "{logs}");
    assert!(logs.contains("4 calls were made"), "{logs}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_held_up_ends_with_its_time() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let app = Backend::start("app")?;
    let more = ["quarantine: {faults: 1000}"];
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &plugin_of("rogue", "ProxyWasm", &built("pw-misbehave"), "FailClosed", &more)
        + &route(
            "app",
            "app.example",
            "app",
            &["filters: [{plugin: rogue}]", "timeouts: {request: 500ms}"],
        );
    mesh.apply_with_plugins(&policy).await?;
    for protocol in BOTH {
        let client = mesh.workload("a1", protocol)?;
        for callback in ["request_headers", "response_headers"] {
            let list = format!("{callback}:pause");
            let paused = with_header(post("app.example", bytes_body("some")), "x-misbehave", &list);
            let reply = client.call(paused).await?;
            assert!(
                reply.status.is_server_error(),
                "{protocol:?} {callback} {reply:?}"
            );
            let reply = client.get("app.example", "/").await?;
            assert_eq!(reply.backend(), "app", "{callback}: the next");
        }
    }
    Ok(())
}

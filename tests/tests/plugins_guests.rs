//! Hostile guests behind real proxies: whatever one does, its own request gets what policy says, people are told, and
//! nobody else is hurt.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::{Context, ensure};
use http::{Method, Request};
use leeward_testkit::binaries::plugin as built;
use leeward_testkit::policy::{fallback, plugin_of, route, service};
use leeward_testkit::{
    Backend, Behave, Body, Client, Load, Mesh, Node, Protocol, Receiver, Reply, Tally, bytes_body,
    eventually, get, request, with_header,
};
use serde_json::Value;
use std::time::Duration;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(60);
/// What hostile guests are told to do, see `plugins/misbehave` and `plugins/pw-misbehave`.
const MISBEHAVE: &str = "x-misbehave";
/// Enough for a good call on a busy machine, and little for a loop.
const LIMITS: &str = "limits: {memory: 4MiB, callTimeout: 100ms, maxBody: 65536}";

fn hostile(name: &str, kind: &str, guest: &str, on_fault: &str, more: &[&str]) -> String {
    // Every one of its faults is to be its own.
    let more = [&[LIMITS, "quarantine: {faults: 1000}"], more].concat();
    plugin_of(name, kind, &built(guest), on_fault, &more)
}

fn misbehave(request: Request<Body>, list: &str) -> Request<Body> {
    with_header(request, MISBEHAVE, list)
}

fn post(host: &str, path: &str) -> Request<Body> {
    request(Method::POST, host, path, bytes_body("some"))
}

/// On a connection of its own: a proxy that answers before it has had all of a body closes the one that it came on.
async fn call(mesh: &Mesh, protocol: Protocol, request: Request<Body>) -> anyhow::Result<Reply> {
    mesh.workload("a1", protocol)?.call(request).await
}

fn faulted(reply: &Reply) -> bool {
    (reply.status.as_u16(), reply.header("leeward-reason")) == (503, "plugin_fault")
}

async fn faults(node: &Node, plugin: &str, fault: &str) -> anyhow::Result<f64> {
    let labels = [format!("plugin=\"{plugin}\""), format!("fault=\"{fault}\"")];
    node.metric("leeward_plugin_faults_total", &[&labels[0], &labels[1]])
        .await
}

/// The access log's line of a request that has a path of its own.
async fn line(node: &Node, path: &str) -> anyhow::Result<Value> {
    eventually(&format!("a log line of {path}"), SOON, || async {
        let log = node.process.log()?;
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines
            .into_iter()
            .find(|line| line["path"] == path)
            .with_context(|| format!("no line of {path}"))
    })
    .await
}

/// Requests of another route that go on all the while.
fn beside(node: &Node, protocol: Protocol) -> Load {
    Load::start(
        node.outbound,
        protocol,
        ("beside.example", "/"),
        2,
        Duration::from_millis(5),
    )
}

async fn none_failed(load: Load) -> anyhow::Result<Tally> {
    let tally = load.stop().await;
    ensure!(
        tally.failed == 0 && tally.served > 0,
        "requests beside it: {tally:?}"
    );
    Ok(tally)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_component_does_wrong_is_told_and_costs_one_request() -> anyhow::Result<()> {
    let receiver = Receiver::start()?;
    let mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--access-log", "stdout")
        .flag("--otlp-endpoint", &receiver.grpc_endpoint())
        .flag("--otlp-protocol", "grpc")
        .flag("--trace-ratio", "1")
        .start()
        .await?;
    let app = Backend::start("app")?;
    app.behave(Behave::Echo);
    let filters = "filters: [{plugin: rogue}]";
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &hostile("rogue", "Filter", "misbehave-filter", "FailClosed", &[])
        + &route("app", "app.example", "app", &[filters])
        + &route("beside", "beside.example", "app", &[]);
    mesh.apply_with_plugins(&policy).await?;
    let node = mesh.node("a1")?;
    let loads = [Protocol::Http1, Protocol::Http2].map(|protocol| beside(node, protocol));
    let tricks = [
        ("panic", "trap"),
        ("loop", "time"),
        ("memory", "memory"),
        ("stack", "trap"),
        ("utf8", "trap"),
        ("exit", "trap"),
        ("sleep 5000", "time"),
        ("split", "bad_response"),
        ("huge-header", "bad_response"),
    ];
    for protocol in [Protocol::Http1, Protocol::Http2] {
        for callback in ["request", "request-body", "response", "response-body"] {
            for (trick, fault) in tricks {
                let what = format!("{protocol:?} {callback} {trick}");
                let before = faults(node, "rogue", fault).await?;
                let path = format!("/{protocol:?}/{callback}/{}", trick.replace(' ', "-"));
                // Whole, so that there is a head to give another answer with.
                let list = format!("{callback}:{trick};whole");
                let reply = call(&mesh, protocol, misbehave(post("app.example", &path), &list)).await?;
                assert!(faulted(&reply), "{what}: {reply:?}");
                let reply = call(&mesh, protocol, post("app.example", "/next")).await?;
                assert_eq!(reply.text(), "some", "{what}: the next request");
                let after = faults(node, "rogue", fault).await?;
                assert!((after - before - 1.0).abs() < 0.1, "{what}: {before} {after}");
                let line = line(node, &path).await?;
                assert_eq!(line["plugin_fault"], fault, "{what}: {line}");
                assert_eq!(line["plugin_faults"][0]["plugin"], "rogue", "{what}");
                assert_eq!(
                    (&line["status"], &line["reason"]),
                    (&503.into(), &"plugin_fault".into()),
                    "{what}: {line}"
                );
            }
        }
    }
    eventually("an event for each fault", SOON, || async {
        let spans = receiver.spans();
        for fault in ["trap", "time", "memory", "bad_response"] {
            let told = spans.iter().any(|span| {
                span.attribute("leeward.plugin.fault") == fault
                    && span.events.iter().any(|(name, attributes)| {
                        name == "leeward.plugin.fault"
                            && attributes
                                .get("leeward.plugin.name")
                                .is_some_and(|n| n == "rogue")
                            && attributes.get("leeward.plugin.fault").is_some_and(|f| f == fault)
                    })
            });
            ensure!(told, "no span tells of {fault}");
        }
        Ok(())
    })
    .await?;
    for load in loads {
        none_failed(load).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_host_calls_stays_within_bounds() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (app, dead) = (Backend::start("app")?, Backend::refusing("dead")?);
    let limits =
        ["limits: {memory: 4MiB, callTimeout: 10s, logLines: 10, storeBytes: 65536, storeEntries: 20}"];
    let flood = |name: &str, kind: &str, guest: &str, on_fault: &str| {
        plugin_of(name, kind, &built(guest), on_fault, &limits)
    };
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("dead", &[(dead.address(), "a", "")], &[])
        + &flood("filter", "Filter", "misbehave-filter", "FailClosed")
        + &flood("module", "ProxyWasm", "pw-misbehave", "FailClosed")
        + &flood("rung", "Fallback", "misbehave", "NextRung")
        + &fallback(
            "rung",
            &[
                "plugin: {plugin: rung, config: flood}",
                "static: {status: 200, body: next}",
            ],
            &[],
        )
        + &route(
            "filter",
            "filter.example",
            "app",
            &["filters: [{plugin: filter}]"],
        )
        + &route(
            "module",
            "module.example",
            "app",
            &["filters: [{plugin: module}]"],
        )
        + &route("rung", "rung.example", "dead", &["fallback: rung"])
        + &route("beside", "beside.example", "app", &[]);
    mesh.apply_with_plugins(&policy).await?;
    let node = mesh.node("a1")?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for host in ["filter.example", "module.example"] {
        client.get(host, "/").await?;
    }
    let load = beside(node, Protocol::Http1);
    let before = node.process.memory()?.resident;
    for _ in 0..3 {
        let reply = client
            .call(misbehave(get("filter.example", "/"), "request:flood"))
            .await?;
        assert_eq!(reply.backend(), "app", "{reply:?}");
        // What the SDK takes a refusal for is a panic.
        let reply = client
            .call(misbehave(get("module.example", "/"), "request_headers:flood"))
            .await?;
        assert!(reply.backend() == "app" || faulted(&reply), "{reply:?}");
        assert_eq!(client.get("rung.example", "/").await?.text(), "next");
    }
    none_failed(load).await?;
    let grown = node.process.memory()?.resident.saturating_sub(before) >> 20;
    assert!(grown < 64, "it grew by {grown} MiB");
    let metrics = node.metrics().await?;
    for plugin in ["filter", "module", "rung"] {
        let names = metrics
            .lines()
            .filter(|line| {
                line.starts_with("leeward_plugin_custom") && line.contains(&format!("plugin=\"{plugin}\""))
            })
            .count();
        assert!(names <= 103, "{plugin} has {names} names");
    }
    // What it logs can't forge a line, and is bounded.
    let admin = Client::new(node.admin, Protocol::Http1);
    let logs = admin.get("admin", "/plugins/logs?plugin=filter").await?.text();
    ensure!(
        !logs.is_empty() && logs.lines().count() <= 30,
        "{} lines",
        logs.lines().count()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_module_does_wrong_is_told_and_costs_its_machine() -> anyhow::Result<()> {
    let mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--access-log", "stdout")
        .start()
        .await?;
    let app = Backend::start("app")?;
    app.behave(Behave::Echo);
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &hostile(
            "rogue",
            "ProxyWasm",
            "pw-misbehave",
            "FailClosed",
            &["access: {services: [app]}"],
        )
        + &route("app", "app.example", "app", &["filters: [{plugin: rogue}]"])
        + &route("beside", "beside.example", "app", &[]);
    mesh.apply_with_plugins(&policy).await?;
    let node = mesh.node("a1")?;
    let loads = [Protocol::Http1, Protocol::Http2].map(|protocol| beside(node, protocol));
    for protocol in [Protocol::Http1, Protocol::Http2] {
        for callback in ["request_headers", "response_headers", "call_response"] {
            for (trick, fault) in [
                ("panic", "trap"),
                ("loop", "time"),
                ("memory", "memory"),
                ("stack", "trap"),
            ] {
                let what = format!("{protocol:?} {callback} {trick}");
                // A request that waits learns that its machine has ended, and not of what.
                let fault = if callback == "call_response" {
                    "trap"
                } else {
                    fault
                };
                let before = faults(node, "rogue", fault).await?;
                let path = format!("/{protocol:?}/{callback}/{trick}");
                let first = if callback == "call_response" {
                    "request_headers:call app;"
                } else {
                    ""
                };
                let list = format!("{first}{callback}:{trick}");
                let reply = call(&mesh, protocol, misbehave(post("app.example", &path), &list)).await?;
                assert!(faulted(&reply), "{what}: {reply:?}");
                let reply = call(&mesh, protocol, post("app.example", "/next")).await?;
                assert_eq!(reply.text(), "some", "{what}: the next request");
                let after = faults(node, "rogue", fault).await?;
                let line = line(node, &path).await?;
                assert_eq!(line["plugin_fault"], fault, "{what}: {line}");
                assert!((after - before - 1.0).abs() < 0.1, "{what}: {before} {after}");
            }
        }
        // The answer's head may have gone when a body comes; what comes after the answer costs it nothing.
        for (callback, whole) in [
            ("request_body", false),
            ("response_body", false),
            ("done", true),
            ("log", true),
            ("delete", true),
        ] {
            for (trick, fault) in [("panic", "trap"), ("loop", "time")] {
                let what = format!("{protocol:?} {callback} {trick}");
                let list = format!("{callback}:{trick}");
                let reply = call(&mesh, protocol, misbehave(post("app.example", "/late"), &list)).await;
                match reply {
                    Ok(reply) => assert!(
                        whole && reply.text() == "some" || faulted(&reply),
                        "{what}: {reply:?}"
                    ),
                    Err(error) => assert!(!whole, "{what}: {error:#}"),
                }
                eventually("the fault", SOON, || async {
                    let calls = node
                        .metric(
                            "leeward_plugin_calls_total",
                            &["plugin=\"rogue\"", &format!("outcome=\"{fault}\"")],
                        )
                        .await?;
                    ensure!(calls > 0.0);
                    Ok(())
                })
                .await?;
                let reply = call(&mesh, protocol, post("app.example", "/next")).await?;
                assert_eq!(reply.text(), "some", "{what}: the next request");
            }
        }
    }
    for load in loads {
        none_failed(load).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_that_cannot_even_begin_or_dies_by_itself_hurts_nobody_else() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let app = Backend::start("app")?;
    let mut policy =
        service("app", &[(app.address(), "a", "")], &[]) + &route("beside", "beside.example", "app", &[]);
    let begins = [
        "vm_start:panic",
        "vm_start:loop",
        "vm_start:pause",
        "configure:panic",
        "configure:pause",
        "create:panic",
    ];
    let dies = ["tick:panic", "tick:loop", "tick:memory", "queue:stack"];
    for (n, config) in begins.iter().chain(&dies).enumerate() {
        let config = format!("config: '{config}'");
        for (name, on_fault) in [("open", "FailOpen"), ("closed", "FailClosed")] {
            let (name, host) = (format!("{name}-{n}"), format!("{name}-{n}.example"));
            policy += &hostile(&name, "ProxyWasm", "pw-misbehave", on_fault, &[&config]);
            policy += &route(&name, &host, "app", &[&format!("filters: [{{plugin: {name}}}]")]);
        }
    }
    mesh.apply_with_plugins(&policy).await?;
    let node = mesh.node("a1")?;
    let load = beside(node, Protocol::Http1);
    let client = mesh.workload("a1", Protocol::Http2)?;
    for (n, what) in begins.iter().enumerate() {
        for _ in 0..3 {
            let reply = client.get(&format!("open-{n}.example"), "/").await?;
            assert_eq!(reply.backend(), "app", "{what}: {reply:?}");
            let reply = client.get(&format!("closed-{n}.example"), "/").await?;
            assert!(faulted(&reply), "{what}: {reply:?}");
        }
    }
    for (n, what) in dies.iter().enumerate().map(|(n, what)| (n + begins.len(), what)) {
        eventually("it to die", SOON, || async {
            // Each request gets a new machine where the last has died.
            let reply = client.get(&format!("open-{n}.example"), "/").await?;
            ensure!(reply.backend() == "app", "{what}: {reply:?}");
            let closed = client.get(&format!("closed-{n}.example"), "/").await?;
            ensure!(
                closed.backend() == "app" || faulted(&closed),
                "{what}: {closed:?}"
            );
            let plugin = format!("plugin=\"open-{n}\"");
            let calls = node.metric("leeward_plugin_calls_total", &[&plugin]).await?;
            let ok = node
                .metric("leeward_plugin_calls_total", &[&plugin, "outcome=\"ok\""])
                .await?;
            ensure!(calls > ok, "{what}: {calls} calls, {ok} good ones");
            Ok(())
        })
        .await?;
    }
    none_failed(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_that_calls_itself_through_the_mesh_is_stopped() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (app, dead) = (Backend::start("app")?, Backend::refusing("dead")?);
    let node = mesh.node("a1")?;
    // A service that is this very proxy: what is sent to it comes back by the route of its name.
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &service("dead", &[(dead.address(), "a", "")], &[])
        + &service("again", &[(node.outbound, "a", "")], &[])
        + &service("rung", &[(node.outbound, "a", "")], &[])
        + &hostile(
            "calls",
            "Filter",
            "misbehave-filter",
            "FailClosed",
            &["access: {services: [again]}"],
        )
        + &hostile(
            "ladder",
            "Fallback",
            "misbehave",
            "NextRung",
            &["access: {services: [rung]}"],
        )
        + &fallback("ladder", &["plugin: {plugin: ladder, config: call rung/x}"], &[])
        + &route(
            "again",
            "again",
            "app",
            &["filters: [{plugin: calls, config: 'request:call again/x'}]"],
        )
        + &route("rung", "rung", "dead", &["fallback: ladder"])
        + &route("beside", "beside.example", "app", &[]);
    mesh.apply_with_plugins(&policy).await?;
    let load = beside(node, Protocol::Http1);
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        for host in ["again", "rung"] {
            let before = node
                .metric("leeward_requests_total", &["service=\"again\""])
                .await?;
            let reply = client.get(host, "/").await?;
            assert_eq!(reply.status, 200, "{reply:?}");
            let text = reply.text();
            assert!(
                text.starts_with("200 200 ") && text.ends_with("loop"),
                "{host}: {text:?}"
            );
            let after = node
                .metric("leeward_requests_total", &["service=\"again\""])
                .await?;
            assert!(after - before < 20.0, "{before} {after}");
        }
    }
    none_failed(load).await?;
    Ok(())
}

/// Times of requests, sorted.
async fn times(client: &Client, requests: usize) -> anyhow::Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(requests);
    for _ in 0..requests {
        let began = Instant::now();
        let reply = client.get("beside.example", "/").await?;
        times.push(began.elapsed());
        ensure!(reply.backend() == "app", "{reply:?}");
    }
    times.sort();
    Ok(times)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_at_full_cpu_costs_the_route_beside_it_no_request() -> anyhow::Result<()> {
    const REQUESTS: usize = 400;
    // One worker, so that there is no other to be served by.
    let mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--workers", "1")
        .start()
        .await?;
    let app = Backend::start("app")?;
    let spin = |name: &str, kind: &str, guest: &str| {
        let more = [
            "limits: {callTimeout: 1s, maxInstances: 2}",
            "quarantine: {faults: 1000}",
        ];
        plugin_of(name, kind, &built(guest), "FailOpen", &more)
    };
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &spin("component", "Filter", "misbehave-filter")
        + &spin("module", "ProxyWasm", "pw-misbehave")
        + &route(
            "component",
            "component.example",
            "app",
            &["filters: [{plugin: component, config: 'request:loop'}]"],
        )
        + &route(
            "module",
            "module.example",
            "app",
            &["filters: [{plugin: module, config: 'request_headers:loop'}]"],
        )
        + &route("beside", "beside.example", "app", &[]);
    mesh.apply_with_plugins(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        times(&client, 50).await?;
        let quiet = times(&client, REQUESTS).await?;
        for host in ["component.example", "module.example"] {
            let looping = Load::start(outbound, Protocol::Http1, (host, "/"), 2, Duration::ZERO);
            eventually("the loop", SOON, || async {
                ensure!(looping.tally().sent > 0);
                Ok(())
            })
            .await?;
            let before = looping.tally().sent;
            let busy = times(&client, REQUESTS).await?;
            let spun = looping.stop().await;
            let at = |times: &[Duration], percent: usize| times[times.len() * percent / 100];
            println!(
                "{protocol:?} beside {host}: p50 {:?} p99 {:?}; without the loop p50 {:?} p99 {:?}",
                at(&busy, 50),
                at(&busy, 99),
                at(&quiet, 50),
                at(&quiet, 99)
            );
            assert!(spun.failed == 0 && spun.sent > before, "{spun:?}");
            // A second is what one loop takes: were it waited for, most would show it.
            assert!(
                at(&busy, 50) < Duration::from_millis(500),
                "p50 {:?}",
                at(&busy, 50)
            );
        }
    }
    Ok(())
}

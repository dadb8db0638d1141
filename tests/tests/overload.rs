//! Too much, or nobody there yet: who waits, who is refused, and who is served all the same.

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::BodyExt;
use hyper::body::Frame;
use leeward_testkit::policy::{resilience, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Body, Client, Load, Mesh, Node, Protocol, Reply, channel_body, eventually, get,
    request, with_header,
};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(20);

fn late(millis: u64) -> Behave {
    Behave::Late(Duration::from_millis(millis), Answer::text("late"))
}

/// Status, reason and limit.
fn said(reply: &Reply) -> (u16, &str, &str) {
    (
        reply.status.as_u16(),
        reply.header("leeward-reason"),
        reply.header("leeward-limit"),
    )
}

/// `app.example` at this backend, with these lines in its service and its rule.
fn app(backend: &Backend, spec: &[&str], rule: &[&str]) -> String {
    service("app", &[(backend.address(), "a", "")], spec) + &route("app", "app.example", "app", rule)
}

/// Sends a request on a connection of its own.
fn send(to: SocketAddr, request: Request<Body>) -> JoinHandle<anyhow::Result<Reply>> {
    tokio::spawn(async move { Client::new(to, Protocol::Http1).call(request).await })
}

fn tagged(name: &'static str, value: &str) -> Request<Body> {
    with_header(get("app.example", "/"), name, value)
}

async fn has_requests(backend: &Backend, wanted: u64) -> anyhow::Result<()> {
    eventually("requests at the backend", SOON, || async {
        let now = backend.requests();
        ensure!(now == wanted, "{now}, not {wanted}");
        Ok(())
    })
    .await
}

async fn is(node: &Node, metric: &str, wanted: f64) -> anyhow::Result<()> {
    eventually(metric, SOON, || async {
        let now = node.metric(metric, &["service=\"app\""]).await?;
        ensure!((now - wanted).abs() < 0.1, "{now}, not {wanted}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_wait_for_a_service_without_endpoints_and_are_served_once_it_has_one() -> anyhow::Result<()>
{
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let node = mesh.node("a1")?;
    let backend = Backend::start("app")?;
    let hold = ["hold: {maxRequests: 3, maxWait: 10s}"];
    let rule = route("app", "app.example", "app", &[]);
    mesh.apply(&(service("app", &[], &hold) + &rule)).await?;
    let held: Vec<_> = (0..3)
        .map(|_| send(node.outbound, get("app.example", "/")))
        .collect();
    is(node, "leeward_held_requests", 3.0).await?;
    // There is room for three; the next is told at once.
    let client = mesh.workload("a1", Protocol::Http1)?;
    let begun = Instant::now();
    let reply = client.get("app.example", "/").await?;
    assert_eq!(said(&reply), (503, "no_endpoint", "hold.maxRequests"));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(held.iter().all(|held| !held.is_finished()));

    tokio::time::sleep(Duration::from_millis(500)).await;
    mesh.apply(&service("app", &[(backend.address(), "a", "")], &hold))
        .await?;
    for held in held {
        let reply = held.await??;
        assert_eq!(
            (reply.status.as_u16(), reply.backend()),
            (200, "app"),
            "{reply:?}"
        );
    }
    assert_eq!(backend.requests(), 3);
    is(node, "leeward_held_requests", 0.0).await?;

    // Nobody waits for longer than policy says.
    mesh.apply(&service("app", &[], &["hold: {maxWait: 300ms}"]))
        .await?;
    let begun = Instant::now();
    let reply = client.get("app.example", "/").await?;
    assert_eq!(said(&reply), (503, "no_endpoint", "hold.maxWait"));
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_millis(290) && took < Duration::from_secs(3),
        "{took:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_matters_most_leaves_the_queue_first_and_nobody_waits_for_long() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    let outbound = mesh.node("a1")?.outbound;
    let priority = ["priority: {default: Low, header: x-priority}"];
    let pool = ["connectionPool: {maxRequests: 1, maxPendingRequests: 4, pendingTimeout: 20s}"];
    mesh.apply(&app(&backend, &pool, &priority)).await?;
    backend.behave(late(1500));
    let mut under_way = vec![send(outbound, tagged("x-priority", "first"))];
    has_requests(&backend, 1).await?;
    for waiting in ["low", "", "high", "Critical"] {
        under_way.push(send(outbound, tagged("x-priority", waiting)));
        // Each is in the queue before the next comes.
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    assert_eq!(backend.requests(), 1);
    let client = mesh.workload("a1", Protocol::Http1)?;
    let reply = client.get("app.example", "/").await?;
    assert_eq!(said(&reply), (503, "overflow", "maxPendingRequests"));
    backend.behave(late(20));
    for reply in under_way {
        let reply = reply.await??;
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    let order: Vec<String> = backend
        .take_seen()
        .iter()
        .filter_map(|seen| Some(seen.headers.get("x-priority")?.to_str().ok()?.to_owned()))
        .collect();
    assert_eq!(order, ["first", "Critical", "high", "low", ""]);

    let short = ["connectionPool: {maxRequests: 1, maxPendingRequests: 4, pendingTimeout: 250ms}"];
    mesh.apply(&app(&backend, &short, &priority)).await?;
    backend.behave(Behave::Hang);
    let hanging = send(outbound, get("app.example", "/"));
    has_requests(&backend, 6).await?;
    let begun = Instant::now();
    let reply = client.get("app.example", "/").await?;
    assert_eq!(said(&reply), (503, "overflow", "pendingTimeout"));
    assert!(
        begun.elapsed() >= Duration::from_millis(240),
        "{:?}",
        begun.elapsed()
    );
    hanging.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_noisy_caller_does_not_keep_others_from_being_served() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    let outbound = mesh.node("a1")?.outbound;
    let pool = ["connectionPool: {maxRequests: 10, perCaller: {maxRequests: 2, header: x-tenant}}"];
    mesh.apply(&app(&backend, &pool, &[])).await?;
    backend.behave(Behave::Hang);
    let noisy: Vec<_> = (0..2)
        .map(|_| send(outbound, tagged("x-tenant", "noisy")))
        .collect();
    has_requests(&backend, 2).await?;
    backend.behave(Behave::Answer(Answer::text("well")));
    let client = mesh.workload("a1", Protocol::Http1)?;
    for n in 0..20 {
        let reply = client.call(tagged("x-tenant", "noisy")).await?;
        assert_eq!(said(&reply), (503, "overflow", "perCaller.maxRequests"));
        let reply = client.call(tagged("x-tenant", &format!("quiet-{n}"))).await?;
        assert_eq!(reply.status, 200, "{reply:?}");
        // Without a name it is known by its address, which nobody else here is bound by.
        assert_eq!(client.get("app.example", "/").await?.status, 200);
    }
    for noisy in noisy {
        noisy.abort();
    }
    eventually("a place for it again", SOON, || async {
        let reply = client.call(tagged("x-tenant", "noisy")).await?;
        ensure!(reply.status == 200, "{reply:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_saturation_what_can_wait_is_refused_and_what_cannot_is_served() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let node = mesh.node("a1")?;
    let backend = Backend::start("app")?;
    backend.behave(late(50));
    let policy = resilience("default", &["loadShedding: {low: 40}"])
        + &app(
            &backend,
            &["connectionPool: {maxRequests: 20}"],
            &["priority: {header: x-priority}"],
        );
    mesh.apply(&policy).await?;
    let load = |headers: &[(&'static str, &'static str)], clients| {
        let pause = Duration::from_millis(10);
        let target = ("app.example", "/");
        Load::start_with(node.outbound, Protocol::Http1, target, headers, clients, pause)
    };
    let low = load(&[("x-priority", "low")], 40);
    let critical = load(&[("x-priority", "critical")], 4);
    eventually("load of both kinds", Duration::from_secs(60), || async {
        let (low, critical) = (low.tally(), critical.tally());
        ensure!(low.sent >= 1000 && critical.sent >= 150, "{low:?} {critical:?}");
        Ok(())
    })
    .await?;
    let (low, critical) = (low.stop().await, critical.stop().await);
    assert!(critical.served * 100 >= critical.sent * 99, "{critical:?}");
    assert!(low.failed * 4 >= low.sent && low.served > 0, "{low:?}");
    assert!(
        low.failures.iter().all(|failure| failure.contains("overloaded")),
        "{low:?}"
    );
    let shed = node
        .metric("leeward_refused_total", &["limit=\"loadShedding\""])
        .await?;
    assert!(shed >= low.failed as f64 - 0.5, "{shed}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_important_a_request_is_holds_at_the_proxy_of_the_endpoint_too() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let outbound = mesh.node("a1")?.outbound;
    let backend = Backend::start("app")?;
    backend.behave(late(1500));
    // 8 of 10 under way are too many for what is normal, and not for what is critical.
    let policy = resilience("default", &["loadShedding: {low: 1, normal: 20, high: 30}"])
        + &service(
            "app",
            &[(backend.address(), "b", "b1")],
            &["connectionPool: {maxRequests: 10}"],
        )
        + &route("app", "app.example", "app", &["priority: {header: x-priority}"]);
    mesh.apply(&policy).await?;
    let mut critical = JoinSet::new();
    for _ in 0..8 {
        critical.spawn(send(outbound, tagged("x-priority", "critical")));
    }
    while let Some(reply) = critical.join_next().await {
        let reply = reply???;
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    // What says so is for proxies only.
    let told = backend.take_seen();
    assert!(
        told.iter()
            .all(|seen| !seen.headers.contains_key("leeward-priority")),
        "{told:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rates_are_limited_by_rule_by_header_and_by_caller() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    let outbound = mesh.node("a1")?.outbound;
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &route(
            "rule",
            "rule.example",
            "app",
            &["rateLimits: [{requests: 5, interval: 1h}]"],
        )
        + &route(
            "header",
            "header.example",
            "app",
            &["rateLimits: [{requests: 3, interval: 1h, key: {header: x-tenant}}]"],
        )
        + &route(
            "caller",
            "caller.example",
            "app",
            &["rateLimits: [{requests: 2, interval: 1h, key: {caller: true}}]"],
        )
        + &route(
            "soon",
            "soon.example",
            "app",
            &["rateLimits: [{requests: 1, interval: 700ms}]"],
        );
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let statuses = async |request: &dyn Fn() -> Request<Body>, times: u32| {
        let mut statuses = Vec::new();
        for _ in 0..times {
            statuses.push(client.call(request()).await?.status.as_u16());
        }
        anyhow::Ok(statuses)
    };
    let by_rule = statuses(&|| get("rule.example", "/"), 7).await?;
    assert_eq!(by_rule, [200, 200, 200, 200, 200, 429, 429]);
    let reply = client.get("rule.example", "/").await?;
    assert_eq!(said(&reply), (429, "rate_limited", "rateLimits"));
    // 3600 s over 5 requests.
    let wait: u64 = reply.header("retry-after").parse()?;
    assert!((600..=720).contains(&wait), "{wait}");

    for tenant in ["one", "two"] {
        let of = || with_header(get("header.example", "/"), "x-tenant", tenant);
        assert_eq!(statuses(&of, 4).await?, [200, 200, 200, 429], "{tenant}");
    }

    for (from, want) in [("127.0.0.2", [200, 200, 429]), ("127.0.0.3", [200, 200, 429])] {
        let mut got = Vec::new();
        for _ in 0..3 {
            got.push(from_address(from, outbound).await?);
        }
        assert_eq!(got, want, "{from}");
    }

    assert_eq!(client.get("soon.example", "/").await?.status, 200);
    let reply = client.get("soon.example", "/").await?;
    assert_eq!((reply.status.as_u16(), reply.header("retry-after")), (429, "1"));
    eventually("its time", SOON, || async {
        let reply = client.get("soon.example", "/").await?;
        ensure!(reply.status == 200, "{reply:?}");
        Ok(())
    })
    .await?;
    // What was refused has not come through.
    assert_eq!(backend.requests(), 5 + 2 * 3 + 2 * 2 + 2);
    Ok(())
}

/// The status of a request that comes from this address.
async fn from_address(from: &str, to: SocketAddr) -> anyhow::Result<u16> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(format!("{from}:0").parse()?)?;
    let mut stream = socket.connect(to).await?;
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: caller.example\r\nconnection: close\r\n\r\n")
        .await?;
    let mut answer = String::new();
    tokio::time::timeout(SOON, stream.read_to_string(&mut answer)).await??;
    let status = answer.split(' ').nth(1).context("no status")?;
    Ok(status.parse()?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_queues_is_given_less_at_once() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let node = mesh.node("a1")?;
    let backend = Backend::start("app")?;
    backend.behave(late(20));
    let adaptive = "adaptiveConcurrency: {updateInterval: 50ms, minRttRequests: 10, minRttInterval: 1h}";
    let policy = resilience("default", &[adaptive]) + &app(&backend, &[], &[]);
    mesh.apply(&policy).await?;
    // It learns what fast is from few at once.
    let few = Load::start(
        node.outbound,
        Protocol::Http1,
        ("app.example", "/"),
        2,
        Duration::ZERO,
    );
    eventually("a measure of what is fast", SOON, || async {
        ensure!(few.tally().served >= 60, "{:?}", few.tally());
        Ok(())
    })
    .await?;
    assert_eq!(few.stop().await.failed, 0);

    backend.behave(late(400));
    let many = Load::start(
        node.outbound,
        Protocol::Http1,
        ("app.example", "/"),
        60,
        Duration::from_millis(50),
    );
    eventually("the limit to fall", SOON, || async {
        let refused = node
            .metric("leeward_refused_total", &["limit=\"adaptiveConcurrency\""])
            .await?;
        ensure!(refused >= 200.0, "{refused}");
        let active = node.metric("leeward_requests_active", &[]).await?;
        ensure!(active < 30.0, "{active} of 60 are under way");
        Ok(())
    })
    .await?;
    let many = many.stop().await;
    assert!(many.served > 0, "{many:?}");
    assert!(
        many.failures.iter().all(|failure| failure.contains("overloaded")),
        "{many:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_fails_most_is_asked_less() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    backend.behave(Behave::Answer(Answer::status(500)));
    let spec = ["outlierDetection: {maxEjectionPercent: 0}"];
    let policy = resilience("default", &["admissionControl: {window: 10s}"]) + &app(&backend, &spec, &[]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut refused = 0;
    for _ in 0..300 {
        let reply = client.get("app.example", "/").await?;
        if reply.status == 503 {
            assert_eq!(said(&reply), (503, "overloaded", "admissionControl"));
            refused += 1;
        }
    }
    assert_eq!(backend.requests(), 300 - refused);
    // At most four of five are, so that it is noticed when the service is well again.
    assert!((100..=270).contains(&refused), "{refused} of 300");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_stands_still_is_cut_and_a_slow_one_is_not() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (slow, stalled) = (Backend::start("slow")?, Backend::start("stalled")?);
    slow.behave(Behave::Dribble(7, Duration::from_millis(600)));
    stalled.behave(Behave::Dribble(2, Duration::from_secs(30)));
    let idle = ["timeouts: {request: 1s, idle: 2s}"];
    let policy = app(&slow, &[], &idle)
        + &service("stalled", &[(stalled.address(), "a", "")], &[])
        + &route("stalled", "stalled.example", "stalled", &idle);
    mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    let mut both = JoinSet::new();
    for host in ["app.example", "stalled.example"] {
        both.spawn(async move {
            let begun = Instant::now();
            let reply = Client::new(outbound, Protocol::Http1).get(host, "/").await;
            (host, reply, begun.elapsed())
        });
    }
    while let Some(ended) = both.join_next().await {
        let (host, reply, took) = ended?;
        if host == "app.example" {
            assert_eq!(reply?.text(), ".......");
            assert!(took > Duration::from_secs(4), "{took:?}");
        } else {
            assert!(reply.is_err(), "{reply:?}");
            assert!(
                took >= Duration::from_millis(1500) && took < Duration::from_secs(10),
                "{took:?}"
            );
        }
    }
    let cut = mesh
        .node("a1")?
        .metric("leeward_requests_total", &["reason=\"idle_timeout\""])
        .await?;
    assert!((cut - 1.0).abs() < 0.1, "{cut}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_goes_away_while_waiting_takes_no_place() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let node = mesh.node("a1")?;
    let backend = Backend::start("app")?;
    let pool = ["connectionPool: {maxRequests: 1, maxPendingRequests: 3, pendingTimeout: 30s}"];
    mesh.apply(
        &(app(&backend, &pool, &[])
            + &service("none", &[], &[])
            + &route("none", "none.example", "none", &[])),
    )
    .await?;
    backend.behave(Behave::Hang);
    let first = send(node.outbound, get("app.example", "/"));
    has_requests(&backend, 1).await?;
    // Three of these four have a place in the queue.
    let waiting: Vec<_> = (0..4)
        .map(|_| send(node.outbound, get("app.example", "/")))
        .collect();
    eventually("a full queue", SOON, || async {
        ensure!(waiting.iter().any(JoinHandle::is_finished));
        Ok(())
    })
    .await?;
    for waiting in waiting {
        waiting.abort();
    }
    backend.behave(Behave::Answer(Answer::text("well")));
    first.abort();
    let client = mesh.workload("a1", Protocol::Http1)?;
    let reply = client.get("app.example", "/").await?;
    assert_eq!(reply.status, 200, "{reply:?}");
    let refused = node
        .metric("leeward_refused_total", &["limit=\"maxPendingRequests\""])
        .await?;
    assert!((refused - 1.0).abs() < 0.1, "{refused}");

    // The same where a service has no endpoint.
    let held = send(node.outbound, get("none.example", "/"));
    let is_held = |wanted: f64| {
        eventually("a request to be held, or not", SOON, move || async move {
            let held = node
                .metric("leeward_held_requests", &["service=\"none\""])
                .await?;
            ensure!((held - wanted).abs() < 0.1, "{held}");
            Ok(())
        })
    };
    is_held(1.0).await?;
    held.abort();
    is_held(0.0).await?;

    // Nobody is held for longer than the caller waits.
    let begun = Instant::now();
    let hurried = with_header(get("none.example", "/"), "leeward-timeout", "300m");
    let reply = client.call(hurried).await?;
    assert!(reply.status.is_server_error(), "{reply:?}");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_stands_still_is_cut_too() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    backend.behave(Behave::Echo);
    mesh.apply(&app(&backend, &[], &["timeouts: {request: 1s, idle: 1s}"]))
        .await?;
    let (sender, body) = channel_body();
    let upload = request(Method::POST, "app.example", "/", body);
    sender.send(Ok(Frame::data(Bytes::from_static(b"some")))).await?;
    let begun = Instant::now();
    let client = mesh.workload("a1", Protocol::Http1)?;
    let answered = client.send(upload).await?;
    let whole = tokio::time::timeout(SOON, answered.into_body().collect()).await?;
    assert!(whole.is_err(), "{whole:?}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    drop(sender);
    Ok(())
}

//! Circuits: what opens them, what that spares, and how they close.

use anyhow::{Context, ensure};
use leeward_testkit::policy::{fallback, resilience, route, rules, service};
use leeward_testkit::{Answer, Backend, Behave, Client, Mesh, Node, Protocol, Reply, eventually, leeward};
use serde_json::Value;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(20);

fn late(millis: u64) -> Behave {
    Behave::Late(Duration::from_millis(millis), Answer::text("late"))
}

fn refusal(reply: &Reply) -> (u16, &str, &str) {
    (
        reply.status.as_u16(),
        reply.header("leeward-reason"),
        reply.header("leeward-limit"),
    )
}

/// What the proxy says of a circuit.
async fn circuit(node: &Node, kind: &str) -> anyhow::Result<Value> {
    let client = Client::new(node.admin, Protocol::Http1);
    let answer: Value = serde_json::from_slice(&client.get("admin", "/circuits").await?.body)?;
    let circuits = answer
        .get("circuits")
        .and_then(Value::as_array)
        .context("no list")?;
    let found = circuits.iter().find(|c| c.get("kind").is_some_and(|k| k == kind));
    found.cloned().with_context(|| format!("{answer:#}"))
}

async fn state(node: &Node, kind: &str) -> anyhow::Result<String> {
    let circuit = circuit(node, kind).await?;
    let state = circuit.get("state").and_then(Value::as_str).context("no state")?;
    Ok(state.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_route_is_cut_off_and_the_rest_of_its_service_is_not() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    backend.behave(Behave::ByPath {
        paths: vec![("/slow".to_owned(), late(600))],
        other: Box::new(Behave::Answer(Answer::text("fast"))),
    });
    let breaker = "circuitBreaker: {failureRate: 0, slowCallRate: 50, slowCallDuration: 200ms, minimumCalls: 6, \
                   openTime: 60s}";
    let slow = [
        "matches: [{path: {prefix: /slow}}]",
        "backendRefs: [{service: app}]",
        breaker,
        "fallback: sorry",
    ];
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &fallback("sorry", &["static: {status: 200, body: sorry}"], &[])
        + &rules("app", "app.example", &[&slow, &["backendRefs: [{service: app}]"]]);
    mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    let mut first = JoinSet::new();
    for _ in 0..6 {
        first.spawn(async move {
            Client::new(outbound, Protocol::Http1)
                .get("app.example", "/slow")
                .await
        });
    }
    while let Some(reply) = first.join_next().await {
        assert_eq!(reply??.text(), "late");
    }
    let client = Client::new(outbound, Protocol::Http1);
    let before = backend.requests();
    let begun = Instant::now();
    for _ in 0..10 {
        let reply = client.get("app.example", "/slow").await?;
        assert_eq!(reply.text(), "sorry");
        assert_eq!(reply.header("leeward-degraded"), "sorry/0", "{reply:?}");
    }
    // Ten degraded answers come in less time than one of the service's.
    assert!(
        begun.elapsed() < Duration::from_millis(600),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(backend.requests(), before, "an open circuit sends nothing");
    for _ in 0..20 {
        let reply = client.get("app.example", "/fast").await?;
        assert_eq!((reply.status.as_u16(), reply.text().as_str()), (200, "fast"));
    }

    // People see which, and why.
    let admin = mesh.node("a1")?.admin.to_string();
    let out = leeward(&mesh, &["circuit", "list", "--admin", &admin]).await?;
    let shown = String::from_utf8_lossy(&out.stdout).into_owned();
    let line = shown.lines().find(|line| line.contains("route/app/0"));
    let line = line.with_context(|| format!("{out:?}"))?;
    for word in ["open", "slow_call_rate 100 % of 6 calls"] {
        assert!(line.contains(word), "{word:?} is not in {line:?}");
    }
    let metric = mesh
        .node("a1")?
        .metric("leeward_circuit_state", &["kind=\"route\"", "name=\"app/0\""])
        .await?;
    assert!((metric - 2.0).abs() < 0.1, "{metric}");
    Ok(())
}

/// `app.example` behind a breaker of the service with these settings.
async fn guarded(breaker: &str) -> anyhow::Result<(Mesh, Backend)> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    let endpoints = [(backend.address(), "a", "")];
    let policy = resilience("default", &[&format!("circuitBreaker: {{{breaker}}}")])
        + &service("app", &endpoints, &["outlierDetection: {maxEjectionPercent: 0}"])
        + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    Ok((mesh, backend))
}

async fn fail(client: &Client, backend: &Backend, times: u32) -> anyhow::Result<()> {
    backend.behave(Behave::Answer(Answer::status(500)));
    for _ in 0..times {
        assert_eq!(client.get("app.example", "/").await?.status, 500);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_circuit_lets_a_few_probes_through_and_then_more_and_more() -> anyhow::Result<()> {
    const PROBES: u64 = 2;
    let (mesh, backend) = guarded(
        "failureRate: 0, consecutiveFailures: 5, openTime: 700ms, openJitter: 0, halfOpenProbes: 2, ramp: 6s",
    )
    .await?;
    let node = mesh.node("a1")?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    fail(&client, &backend, 5).await?;
    let reply = client.get("app.example", "/").await?;
    assert_eq!(refusal(&reply), (503, "circuit_open", "circuitBreaker"));
    assert!(!reply.header("retry-after").is_empty(), "{reply:?}");
    assert_eq!(backend.requests(), 5);

    // However many come, two of them are probes while those are under way.
    backend.behave(late(1500));
    eventually("the time of the first probe", SOON, || async {
        ensure!(state(node, "service").await? == "half_open");
        Ok(())
    })
    .await?;
    let outbound = node.outbound;
    let mut many = JoinSet::new();
    for _ in 0..30 {
        many.spawn(async move {
            Client::new(outbound, Protocol::Http1)
                .get("app.example", "/")
                .await
        });
    }
    let mut replies = Vec::new();
    while let Some(reply) = many.join_next().await {
        replies.push(reply??);
    }
    let passed = replies.iter().filter(|reply| reply.status == 200).count() as u64;
    let refused = replies
        .iter()
        .filter(|r| r.header("leeward-reason") == "circuit_open");
    assert_eq!((passed, refused.count()), (PROBES, 28));
    assert_eq!(backend.requests(), 5 + PROBES);

    // They succeeded: a growing share passes, then all.
    backend.behave(Behave::Answer(Answer::text("well")));
    assert_eq!(state(node, "service").await?, "ramping");
    let mut early = 0;
    for _ in 0..100 {
        early += u32::from(client.get("app.example", "/").await?.status == 200);
    }
    assert!(early > 0 && early < 80, "{early} of 100 passed early in the ramp");
    eventually("the end of the ramp", SOON, || async {
        ensure!(state(node, "service").await? == "closed");
        Ok(())
    })
    .await?;
    for _ in 0..50 {
        assert_eq!(client.get("app.example", "/").await?.status, 200);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_probe_that_fails_opens_the_circuit_for_longer() -> anyhow::Result<()> {
    let (mesh, backend) =
        guarded("failureRate: 0, consecutiveFailures: 3, openTime: 500ms, openJitter: 0, halfOpenProbes: 1")
            .await?;
    let node = mesh.node("a1")?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    fail(&client, &backend, 3).await?;
    eventually("the probe", SOON, || async {
        client.get("app.example", "/").await?;
        ensure!(backend.requests() == 4);
        Ok(())
    })
    .await?;
    let circuit = circuit(node, "service").await?;
    let until = circuit
        .get("until_ms")
        .and_then(Value::as_u64)
        .context("no time")?;
    assert_eq!(circuit.get("why"), Some(&Value::from("probe_failed")));
    assert!(until > 500 && until <= 1000, "{circuit:#}");
    let opened = node
        .metric(
            "leeward_circuit_changes_total",
            &["to=\"open\"", "kind=\"service\""],
        )
        .await?;
    assert!((opened - 2.0).abs() < 0.1, "{opened}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_breaker_that_observes_refuses_nothing_and_tells() -> anyhow::Result<()> {
    let (mesh, backend) = guarded("minimumCalls: 10, openTime: 60s, mode: Observe").await?;
    let node = mesh.node("a1")?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    fail(&client, &backend, 40).await?;
    assert_eq!(backend.requests(), 40);
    let circuit = circuit(node, "service").await?;
    let field = |name: &str| circuit.get(name).and_then(Value::as_str).map(str::to_owned);
    assert_eq!(field("mode").as_deref(), Some("observe"));
    assert_eq!(field("state").as_deref(), Some("open"), "{circuit:#}");
    let opened = node
        .metric(
            "leeward_circuit_changes_total",
            &["to=\"open\"", "reason=\"failure_rate\""],
        )
        .await?;
    assert!(opened > 0.5, "{opened}");
    // What it would have refused is counted as that: all but the ten that opened it.
    let refused = node.metric("leeward_refused_total", &[]).await?;
    let observed = node.metric("leeward_circuit_would_refuse_total", &[]).await?;
    assert!(
        refused.abs() < 0.1 && (observed - 30.0).abs() < 0.1,
        "{refused}, {observed}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_circuit_is_held_open_for_a_while_at_every_proxy_and_ends_by_itself() -> anyhow::Result<()> {
    let mut mesh = Mesh::two_zones().await?;
    let backend = Backend::start("app")?;
    let endpoints = [(backend.address(), "a", ""), (backend.address(), "b", "")];
    let policy = service("app", &endpoints, &[])
        + &route("shop", "shop.example", "app", &[])
        + &route("other", "other.example", "app", &[]);
    mesh.apply(&policy).await?;
    let clients = [
        mesh.workload("a1", Protocol::Http1)?,
        mesh.workload("b1", Protocol::Http1)?,
    ];
    let refused = |within: Duration| {
        let clients = &clients;
        async move {
            for client in clients {
                eventually("a refusal", within, || async {
                    let reply = client.get("shop.example", "/").await?;
                    ensure!(reply.header("leeward-reason") == "circuit_open", "{reply:?}");
                    Ok(())
                })
                .await?;
            }
            anyhow::Ok(())
        }
    };
    let served = || async {
        for client in &clients {
            let reply = client.get("shop.example", "/").await?;
            ensure!(reply.status == 200, "{reply:?}");
        }
        Ok(())
    };
    served().await?;

    let out = leeward(
        &mesh,
        &["circuit", "open", "shop", "--ttl", "60s", "--reason", "drill"],
    )
    .await?;
    ensure!(out.status.success(), "{out:?}");
    refused(Duration::from_secs(1)).await?;
    for client in &clients {
        let reply = client.get("other.example", "/").await?;
        assert_eq!(reply.status, 200, "a route that nobody holds: {reply:?}");
    }
    let out = leeward(&mesh, &["circuit", "auto", "shop"]).await?;
    ensure!(out.status.success(), "{out:?}");
    eventually("both to serve again", SOON, served).await?;

    let held = Instant::now();
    let out = leeward(&mesh, &["circuit", "open", "shop", "--ttl", "5s"]).await?;
    ensure!(out.status.success(), "{out:?}");
    refused(Duration::from_secs(1)).await?;
    mesh.kill_control()?;
    refused(Duration::from_secs(1)).await?;
    eventually("the override to end without a control plane", SOON, served).await?;
    let took = held.elapsed();
    assert!(
        took >= Duration::from_secs(4) && took < Duration::from_secs(10),
        "{took:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policy_that_changes_elsewhere_leaves_circuits_and_ejections_as_they_are() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (down, bad, good) = (
        Backend::start("down")?,
        Backend::start("bad")?,
        Backend::start("good")?,
    );
    for backend in [&down, &bad] {
        backend.behave(Behave::Answer(Answer::status(500)));
    }
    let policy = |budget: &str, pool: &str| {
        let breaker = "circuitBreaker: {failureRate: 0, consecutiveFailures: 3, openTime: 60s}";
        resilience("strict", &[breaker, budget])
            + &service(
                "down",
                &[(down.address(), "a", "")],
                &[
                    "resilience: strict",
                    "outlierDetection: {maxEjectionPercent: 0}",
                    pool,
                ],
            )
            + &service(
                "pair",
                &[(bad.address(), "a", ""), (good.address(), "a", "")],
                &[
                    "loadBalancer: {policy: RoundRobin}",
                    "outlierDetection: {consecutive5xx: 2, baseEjectionTime: 60s}",
                    pool,
                ],
            )
            + &route("down", "down.example", "down", &[])
            + &route("pair", "pair.example", "pair", &[])
    };
    mesh.apply(&policy("retryBudget: {percent: 20}", "connectTimeout: 1s"))
        .await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for _ in 0..3 {
        client.get("down.example", "/").await?;
    }
    eventually("the ejection", SOON, || async {
        client.get("pair.example", "/").await?;
        ensure!(bad.requests() >= 2);
        Ok(())
    })
    .await?;
    let (seen_down, seen_bad) = (down.requests(), bad.requests());
    for (budget, pool) in [
        ("retryBudget: {percent: 20}", "connectTimeout: 2s"),
        ("retryBudget: {percent: 30}", "connectTimeout: 2s"),
        ("retryBudget: {percent: 30}", "connectionPool: {maxRequests: 77}"),
    ] {
        mesh.apply(&policy(budget, pool)).await?;
        for _ in 0..10 {
            let reply = client.get("down.example", "/").await?;
            assert_eq!(
                refusal(&reply).1,
                "circuit_open",
                "after {budget}, {pool}: {reply:?}"
            );
            let reply = client.get("pair.example", "/").await?;
            assert_eq!(reply.backend(), "good", "after {budget}, {pool}: {reply:?}");
        }
    }
    assert_eq!((down.requests(), bad.requests()), (seen_down, seen_bad));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_probe_whose_caller_goes_away_leaves_its_place_to_the_next() -> anyhow::Result<()> {
    let (mesh, backend) = guarded(
        "failureRate: 0, consecutiveFailures: 3, openTime: 300ms, openJitter: 0, halfOpenProbes: 1, ramp: 0s",
    )
    .await?;
    let node = mesh.node("a1")?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    fail(&client, &backend, 3).await?;
    backend.behave(Behave::Hang);
    let outbound = node.outbound;
    eventually("the time of the probe", SOON, || async {
        ensure!(state(node, "service").await? == "half_open");
        Ok(())
    })
    .await?;
    let probe = tokio::spawn(async move {
        Client::new(outbound, Protocol::Http1)
            .get("app.example", "/")
            .await
    });
    eventually("the probe", SOON, || async {
        ensure!(backend.requests() == 4);
        Ok(())
    })
    .await?;
    assert_eq!(refusal(&client.get("app.example", "/").await?).1, "circuit_open");
    backend.behave(Behave::Answer(Answer::text("well")));
    probe.abort();
    eventually("the next probe", SOON, || async {
        let reply = client.get("app.example", "/").await?;
        ensure!(reply.status == 200, "{reply:?}");
        Ok(())
    })
    .await?;
    assert_eq!(state(node, "service").await?, "closed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_circuit_can_be_held_closed() -> anyhow::Result<()> {
    let (mesh, backend) = guarded("failureRate: 0, consecutiveFailures: 3, openTime: 60s").await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    fail(&client, &backend, 3).await?;
    backend.behave(Behave::Answer(Answer::text("well")));
    assert_eq!(refusal(&client.get("app.example", "/").await?).1, "circuit_open");
    let out = leeward(&mesh, &["circuit", "close", "service/app", "--ttl", "60s"]).await?;
    ensure!(out.status.success(), "{out:?}");
    eventually("the service to be asked", SOON, || async {
        let reply = client.get("app.example", "/").await?;
        ensure!(reply.status == 200, "{reply:?}");
        Ok(())
    })
    .await?;
    for _ in 0..20 {
        assert_eq!(client.get("app.example", "/").await?.status, 200);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rule_that_fails_is_cut_off_and_another_of_the_same_service_is_not() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    backend.behave(Behave::ByPath {
        paths: vec![("/bad".to_owned(), Behave::failing(0.8, 503, 3))],
        other: Box::new(Behave::Answer(Answer::text("well"))),
    });
    let bad = [
        "matches: [{path: {prefix: /bad}}]",
        "backendRefs: [{service: app}]",
        "circuitBreaker: {failureRate: 50, minimumCalls: 20, openTime: 60s}",
    ];
    let spec = ["outlierDetection: {maxEjectionPercent: 0}"];
    let policy = service("app", &[(backend.address(), "a", "")], &spec)
        + &rules("app", "app.example", &[&["backendRefs: [{service: app}]"], &bad]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut refused = 0;
    for _ in 0..60 {
        let reply = client.get("app.example", "/bad").await?;
        refused += u32::from(refusal(&reply) == (503, "circuit_open", "route.circuitBreaker"));
        assert_eq!(client.get("app.example", "/").await?.text(), "well");
    }
    // Rates count once there were twenty calls, and at the next failure.
    assert!((30..=40).contains(&refused), "{refused} of 60");
    Ok(())
}

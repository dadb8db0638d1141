//! One more attempt in another zone: when it is made, and when it had better not be.

use anyhow::ensure;
use http::{Method, Request};
use leeward_testkit::policy::{fallback, resilience, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Body, Mesh, Protocol, Reply, bytes_body, empty_body, eventually, request,
    with_header,
};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);
const CALM: &str = "outlierDetection: {maxEjectionPercent: 0}";
const LADDER: [&str; 2] = ["zone: {}", "static: {status: 200, body: sorry}"];

fn said(reply: &Reply) -> (&str, &str) {
    (reply.header("leeward-degraded"), reply.backend())
}

fn ask(method: Method, host: &str) -> Request<Body> {
    request(method, host, "/", empty_body())
}

/// A backend that says 503 to all.
fn failing(name: &str) -> anyhow::Result<Backend> {
    let backend = Backend::start(name)?;
    backend.behave(Behave::Answer(Answer::status(503)));
    Ok(backend)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_zone_answers_while_the_circuit_is_open_for_what_this_one_did() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (here, there) = (failing("here")?, Backend::start("there")?);
    let policy = resilience(
        "quick",
        &["circuitBreaker: {failureRate: 0, consecutiveFailures: 3, openTime: 60s}"],
    ) + &service(
        "shop",
        &[(here.address(), "a", "a1"), (there.address(), "b", "b1")],
        &[CALM, "resilience: quick"],
    ) + &fallback("ladder", &LADDER, &["onStatuses: [503]"])
        + &route("shop", "shop.example", "shop", &["fallback: ladder"]);
    mesh.apply(&policy).await?;
    let node = mesh.node("a1")?;
    for (protocol, answered) in [(Protocol::Http1, 3), (Protocol::Http2, 0)] {
        let client = mesh.workload("a1", protocol)?;
        let before = here.requests();
        for _ in 0..10 {
            let reply = client.call(ask(Method::GET, "shop.example")).await?;
            assert_eq!(said(&reply), ("ladder/0", "there"), "{reply:?}");
            assert_eq!(reply.status, 200);
            assert!(!reply.headers.contains_key("leeward-limit"), "{reply:?}");
        }
        assert_eq!(here.requests() - before, answered, "an open circuit spares it");
    }
    let open = node
        .metric("leeward_circuit_state", &["kind=\"service\"", "name=\"shop\""])
        .await?;
    assert!((open - 2.0).abs() < 0.1, "{open}");
    // Nothing was sent yet, so that even what must not be sent twice can go.
    let order = request(Method::POST, "shop.example", "/", bytes_body("order"));
    let reply = mesh.workload("a1", Protocol::Http1)?.call(order).await?;
    assert_eq!(said(&reply), ("ladder/0", "there"), "{reply:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_have_acted_is_not_sent_to_another_zone_unless_it_may_be() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (here, there) = (failing("here")?, Backend::start("there")?);
    let policy = resilience("default", &["circuitBreaker: {mode: ForceClosed}"])
        + &service(
            "shop",
            &[(here.address(), "a", ""), (there.address(), "b", "b1")],
            &[CALM],
        )
        + &fallback("ladder", &LADDER, &["onStatuses: [503]"])
        + &route("shop", "shop.example", "shop", &["fallback: ladder"]);
    mesh.apply(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        for behave in [Behave::Answer(Answer::status(503)), Behave::Reset] {
            here.behave(behave);
            let before = there.requests();
            for method in [Method::POST, Method::PATCH] {
                let reply = client.call(ask(method, "shop.example")).await?;
                assert_eq!(said(&reply), ("ladder/1", ""), "{reply:?}");
            }
            assert_eq!(there.requests(), before);
            for method in [Method::GET, Method::PUT] {
                let reply = client.call(ask(method, "shop.example")).await?;
                assert_eq!(said(&reply), ("ladder/0", "there"), "{reply:?}");
            }
            let keyed = with_header(ask(Method::POST, "shop.example"), "idempotency-key", "k1");
            let reply = client.call(keyed).await?;
            assert_eq!(said(&reply), ("ladder/0", "there"), "{reply:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_budget_for_retries_no_other_zone_is_tried() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (here, there) = (failing("here")?, Backend::start("there")?);
    let policy = resilience(
        "default",
        &[
            "circuitBreaker: {mode: ForceClosed}",
            "retryBudget: {percent: 0, minPerSecond: 1}",
        ],
    ) + &service(
        "shop",
        &[(here.address(), "a", ""), (there.address(), "b", "")],
        &[CALM],
    ) + &fallback("ladder", &LADDER, &["onStatuses: [503]"])
        + &route("shop", "shop.example", "shop", &["fallback: ladder"]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut declined = 0;
    // One in each second of the window of ten.
    for _ in 0..60 {
        let reply = client.call(ask(Method::GET, "shop.example")).await?;
        match said(&reply) {
            ("ladder/1", "") => {
                declined += 1;
                assert!(!reply.headers.contains_key("leeward-limit"), "{reply:?}");
            }
            told => assert_eq!(told, ("ladder/0", "there"), "{reply:?}"),
        }
    }
    assert!(
        (30..60).contains(&declined) && there.requests() == 60 - declined,
        "{declined} declined"
    );
    let node = mesh.node("a1")?;
    let refused = node
        .metric("leeward_refused_total", &["limit=\"retryBudget\""])
        .await?;
    assert!(refused > 29.0, "{refused}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zone_that_was_tried_is_not_tried_again_and_those_named_are_the_choice() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").node("b", "b1").node("c", "c1");
    let mesh = mesh.start().await?;
    let (here, second, third) = (failing("here")?, failing("second")?, Backend::start("third")?);
    let endpoints = [
        (here.address(), "a", ""),
        (second.address(), "b", "b1"),
        (third.address(), "c", "c1"),
    ];
    let policy = resilience("default", &["circuitBreaker: {mode: ForceClosed}"])
        + &service("shop", &endpoints, &[CALM])
        + &service("spare", &endpoints[1..2], &[CALM])
        + &fallback(
            "in-turn",
            &["zone: {zones: [b]}", "zone: {zones: [b]}", "zone: {}"],
            &["onStatuses: [503]"],
        )
        + &fallback(
            "named",
            &["zone: {zones: [a]}", "zone: {zones: [c]}"],
            &["onStatuses: [503]"],
        )
        + &fallback(
            "after-spare",
            &["service: {service: spare}", "zone: {zones: [b, c]}"],
            &["onStatuses: [503]"],
        )
        + &route("in-turn", "in-turn.example", "shop", &["fallback: in-turn"])
        + &route("named", "named.example", "shop", &["fallback: named"])
        + &route(
            "after-spare",
            "after-spare.example",
            "shop",
            &["fallback: after-spare"],
        );
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for (host, rung, at_second) in [
        ("in-turn.example", "in-turn/2", 1),
        ("named.example", "named/1", 0),
    ] {
        let before = second.requests();
        let reply = client.call(ask(Method::GET, host)).await?;
        assert_eq!(said(&reply), (rung, "third"), "{reply:?}");
        assert_eq!(second.requests() - before, at_second, "{host}");
    }
    // What another service's rung met in a zone says nothing of this service there.
    second.behave(Behave::Flaky(2, 503));
    let mut there = 0;
    for _ in 0..20 {
        let reply = client.call(ask(Method::GET, "after-spare.example")).await?;
        there += u32::from(said(&reply) == ("after-spare/1", "second"));
    }
    assert!(
        there > 0,
        "zone b is left out since another service has failed there"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zone_is_down_when_none_of_its_endpoints_is_healthy() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (here, there) = (failing("here")?, failing("there")?);
    let elsewhere = Backend::start("elsewhere")?;
    elsewhere.behave(Behave::Answer(Answer::status(503)));
    let rungs = [
        "{static: {status: 200, body: down}, causes: [ZoneDown]}",
        "static: {status: 200, body: up}",
    ];
    let policy = resilience("default", &["circuitBreaker: {mode: ForceClosed}"])
        + &service(
            "shop",
            &[(here.address(), "a", ""), (there.address(), "b", "b1")],
            &[CALM],
        )
        + &service("far", &[(elsewhere.address(), "b", "")], &[CALM])
        + &fallback("ladder", &rungs, &["onStatuses: [503]"])
        + &route("shop", "shop.example", "shop", &["fallback: ladder"])
        + &route("far", "far.example", "far", &["fallback: ladder"]);
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let reply = client.call(ask(Method::GET, "shop.example")).await?;
    assert_eq!(reply.header("leeward-degraded"), "ladder/1", "{reply:?}");
    here.stop().await;
    eventually("the zone to be down", SOON, || async {
        let reply = client.call(ask(Method::GET, "shop.example")).await?;
        ensure!(reply.header("leeward-degraded") == "ladder/0", "{reply:?}");
        Ok(())
    })
    .await?;
    // A service that has no endpoint here isn't down here.
    let reply = client.call(ask(Method::GET, "far.example")).await?;
    assert_eq!(reply.header("leeward-degraded"), "ladder/1", "{reply:?}");
    here.resume()?;
    here.behave(Behave::Answer(Answer::status(503)));
    eventually("the zone to be back", SOON, || async {
        let reply = client.call(ask(Method::GET, "shop.example")).await?;
        ensure!(reply.header("leeward-degraded") == "ladder/1", "{reply:?}");
        Ok(())
    })
    .await
}

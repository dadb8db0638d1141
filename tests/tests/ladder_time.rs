//! The time that a ladder has, and what it takes.

#![allow(clippy::indexing_slicing, reason = "a test fails by panicking")]

use anyhow::ensure;
use http::Method;
use leeward_testkit::policy::{fallback, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Client, Load, Mesh, Protocol, Reply, bytes_body, eventually, get, request,
};
use std::time::Duration;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(30);

fn degraded(reply: &Reply) -> (u16, &str, String) {
    (
        reply.status.as_u16(),
        reply.header("leeward-degraded"),
        reply.text(),
    )
}

/// `app.example` leads to `app`, whose only endpoint is this backend, and falls back to `ladder`.
fn app(backend: &Backend, rule: &[&str]) -> String {
    let rule = [&["fallback: ladder"], rule].concat();
    service(
        "app",
        &[(backend.address(), "a", "")],
        &["outlierDetection: {maxEjectionPercent: 0}"],
    ) + &route("app", "app.example", "app", &rule)
}

async fn one_zone() -> anyhow::Result<Mesh> {
    Mesh::builder().node("a", "a1").start().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rung_has_its_share_of_the_time_and_the_whole_ends_within_the_requests() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let (bad, hang, late) = (
        Backend::start("app")?,
        Backend::start("hang")?,
        Backend::start("late")?,
    );
    bad.behave(Behave::Answer(Answer::status(500)));
    hang.behave(Behave::Hang);
    late.behave(Behave::Late(Duration::from_millis(200), Answer::text("late")));
    let at = |address| [(address, "a", "")];
    let policy = service("hang", &at(hang.address()), &[])
        + &service("late", &at(late.address()), &[])
        + &app(&bad, &["timeouts: {request: 2s}"])
        + &fallback(
            "ladder",
            &[
                "{service: {service: hang}, deadlinePercent: 50}",
                "{service: {service: late}, deadlinePercent: 5}",
                "service: {service: late}",
            ],
            &["onStatuses: [500]"],
        )
        + &fallback(
            "greedy",
            &[
                "service: {service: hang}",
                "service: {service: late}",
                "static: {status: 200, body: in time}",
            ],
            &["onStatuses: [500]"],
        )
        + &route(
            "greedy",
            "greedy.example",
            "app",
            &["fallback: greedy", "timeouts: {request: 1s}"],
        );
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let begun = Instant::now();
    let reply = client.get("app.example", "/").await?;
    let took = begun.elapsed();
    // The second has a twentieth of the second that is left, which is too little for it.
    assert_eq!(
        (reply.header("leeward-degraded"), reply.backend()),
        ("ladder/2", "late"),
        "{reply:?}"
    );
    assert_eq!((hang.requests(), late.requests()), (1, 2));
    assert!(
        took >= Duration::from_millis(1150) && took < Duration::from_secs(2),
        "{took:?}"
    );
    // Nothing is left for those that take time; what takes none answers all the same.
    let begun = Instant::now();
    let reply = client.get("greedy.example", "/").await?;
    let took = begun.elapsed();
    assert_eq!(degraded(&reply), (200, "greedy/2", "in time".to_owned()));
    assert_eq!((hang.requests(), late.requests()), (2, 2));
    assert!(
        took >= Duration::from_millis(900) && took < Duration::from_secs(2),
        "{took:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_is_kept_for_the_ladder_as_policy_says() -> anyhow::Result<()> {
    let mesh = one_zone().await?;
    let (hang, late) = (Backend::start("hang")?, Backend::start("late")?);
    hang.behave(Behave::Hang);
    late.behave(Behave::Late(Duration::from_millis(600), Answer::text("late")));
    let rungs = ["service: {service: late}", "static: {status: 200, body: fixed}"];
    let policy = app(&hang, &["timeouts: {request: 2s}"])
        + &service("late", &[(late.address(), "a", "")], &[])
        + &fallback("ladder", &rungs, &["reservePercent: 60"])
        + &fallback("usual", &rungs, &[])
        + &route(
            "usual",
            "usual.example",
            "app",
            &["fallback: usual", "timeouts: {request: 2s}"],
        );
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for (host, rung, body, least) in [
        ("app.example", "ladder/0", "late", 1400),
        ("usual.example", "usual/1", "fixed", 1990),
    ] {
        let begun = Instant::now();
        let reply = client.get(host, "/").await?;
        let took = begun.elapsed();
        assert_eq!(degraded(&reply), (200, rung, body.to_owned()));
        assert!(
            took >= Duration::from_millis(least) && took < Duration::from_secs(3),
            "{host}: {took:?}"
        );
    }
    // A body that is on its way to the first service can't go to another.
    let order = request(Method::POST, "app.example", "/", bytes_body("order"));
    let reply = client.call(order).await?;
    assert_eq!(degraded(&reply), (200, "ladder/1", "fixed".to_owned()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_killed_upstream_costs_no_request_its_declared_answer() -> anyhow::Result<()> {
    const REQUESTS: usize = 2000;
    const CLIENTS: usize = 4;
    let mesh = one_zone().await?;
    let backend = Backend::start("app")?;
    let policy = app(&backend, &[]) + &fallback("ladder", &["static: {status: 200, body: declared}"], &[]);
    mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    // Under load at the moment of its death: whoever is not served any more gets the declared answer.
    let load = Load::start(
        outbound,
        Protocol::Http1,
        ("app.example", "/"),
        CLIENTS,
        Duration::ZERO,
    );
    eventually("load", SOON, || async {
        ensure!(load.tally().served > 200);
        Ok(())
    })
    .await?;
    backend.stop().await;
    eventually("degraded answers", SOON, || async {
        ensure!(load.tally().degraded > 200);
        Ok(())
    })
    .await?;
    let tally = load.stop().await;
    assert_eq!(tally.failed, 0, "{tally:?}");

    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(async move {
            let client = Client::new(outbound, Protocol::Http1);
            let mut times = Vec::new();
            for n in 0..REQUESTS / CLIENTS {
                let begun = Instant::now();
                let reply = client.call(get("app.example", &format!("/{n}"))).await?;
                times.push(begun.elapsed());
                ensure!(
                    degraded(&reply) == (200, "ladder/0", "declared".to_owned()),
                    "{reply:?}"
                );
            }
            anyhow::Ok(times)
        });
    }
    let mut times = Vec::new();
    while let Some(of_one) = clients.join_next().await {
        times.extend(of_one??);
    }
    times.sort_unstable();
    assert_eq!(times.len(), REQUESTS);
    let at = |percent: usize| times[REQUESTS * percent / 100 - 1];
    println!(
        "{REQUESTS} of {REQUESTS} degraded as declared: p50 {:?}, p99 {:?}, slowest {:?}",
        at(50),
        at(99),
        at(100)
    );
    Ok(())
}

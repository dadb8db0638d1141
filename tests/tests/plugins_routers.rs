//! Routers: plugins that choose among a rule's backends, behind real proxies.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::ensure;
use leeward_testkit::binaries::plugin as built;
use leeward_testkit::policy::{plugin_of, rules, service};
use leeward_testkit::{Backend, Mesh, Protocol, eventually, get, with_header};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);

fn ruled(name: &str, backends: &str, router: &str) -> String {
    let host = format!("{name}.example");
    rules(name, &host, &[&[backends, router]])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_sends_callers_to_a_backend_of_no_weight() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (stable, next) = (Backend::start("stable")?, Backend::start("next")?);
    let backends = "backendRefs: [{service: stable, weight: 100}, {service: next, weight: 0}]";
    let router = |percent: u8| {
        format!(r#"router: {{plugin: canary, config: '{{"canary": "next", "percent": {percent}}}'}}"#)
    };
    let policy = service("stable", &[(stable.address(), "a", "")], &[])
        + &service("next", &[(next.address(), "a", "")], &[])
        + &plugin_of("canary", "Router", &built("canary-router"), "FailClosed", &[])
        + &ruled("half", backends, &router(50))
        + &ruled("none", backends, &router(0));
    mesh.apply_with_plugins(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        let by = |host: &str, header: &'static str, value: &str| with_header(get(host, "/"), header, value);
        // Whoever comes again gets the same.
        let mut chosen = Vec::new();
        for n in 0..40 {
            let customer = format!("c-{n}");
            let first = client.call(by("half.example", "x-customer", &customer)).await?;
            let again = client.call(by("half.example", "x-customer", &customer)).await?;
            assert_eq!(first.backend(), again.backend(), "{customer}");
            chosen.push(first.backend().to_owned());
        }
        let to_next = chosen.iter().filter(|backend| *backend == "next").count();
        assert!((5..35).contains(&to_next), "{to_next} of 40 at 50 %");
        for host in ["half.example", "none.example"] {
            assert_eq!(
                client.call(by(host, "x-canary", "always")).await?.backend(),
                "next"
            );
            assert_eq!(
                client.call(by(host, "x-canary", "never")).await?.backend(),
                "stable"
            );
        }
        assert_eq!(client.get("none.example", "/").await?.backend(), "stable");
    }
    // A backend that isn't well is none to choose.
    next.stop().await;
    let client = mesh.workload("a1", Protocol::Http1)?;
    eventually("the weights to decide", SOON, || async {
        let reply = client
            .call(with_header(get("half.example", "/"), "x-canary", "always"))
            .await?;
        ensure!(reply.backend() == "stable", "{reply:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_faults_leaves_it_to_the_weights_or_ends_the_request() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (stable, next) = (Backend::start("stable")?, Backend::start("next")?);
    let backends = "backendRefs: [{service: stable, weight: 1}, {service: next, weight: 0}]";
    let of = |name: &str, on_fault: &str| {
        let more = ["quarantine: {faults: 5, window: 60s, duration: 3600s}"];
        plugin_of(name, "Router", &built("canary-router"), on_fault, &more)
    };
    // What it can't read is a trap.
    let policy = service("stable", &[(stable.address(), "a", "")], &[])
        + &service("next", &[(next.address(), "a", "")], &[])
        + &of("open", "FailOpen")
        + &of("closed", "FailClosed")
        + &ruled("open", backends, "router: {plugin: open, config: not json}")
        + &ruled("closed", backends, "router: {plugin: closed, config: not json}");
    mesh.apply_with_plugins(&policy).await?;
    let node = mesh.node("a1")?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        for _ in 0..5 {
            assert_eq!(client.get("open.example", "/").await?.backend(), "stable");
            let reply = client.get("closed.example", "/").await?;
            assert_eq!(
                (reply.status.as_u16(), reply.header("leeward-reason")),
                (503, "plugin_fault"),
                "{reply:?}"
            );
        }
    }
    assert_eq!(next.requests(), 0);
    for plugin in ["open", "closed"] {
        let plugin = format!("plugin=\"{plugin}\"");
        for (fault, times) in [("trap", 5.0), ("quarantined", 5.0)] {
            let counted = node
                .metric(
                    "leeward_plugin_faults_total",
                    &[&plugin, &format!("fault=\"{fault}\"")],
                )
                .await?;
            assert!((counted - times).abs() < 0.1, "{plugin} {fault}: {counted}");
        }
    }
    Ok(())
}

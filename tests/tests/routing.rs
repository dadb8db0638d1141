//! Requests go where policy says, and policy takes effect when it is applied.

use anyhow::{Context, ensure};
use http::Method;
use leeward_proto::v1;
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Backend, Client, Mesh, Protocol, empty_body, eventually, get, request};
use std::collections::BTreeMap;
use std::time::Duration;
use tonic::Code;

const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_go_by_host_path_method_and_header() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let names = ["front", "api", "exact", "writes", "beta", "wild", "catchall"];
    let backends: Vec<Backend> = names
        .iter()
        .map(|name| Backend::start(name))
        .collect::<Result<_, _>>()?;
    let mut policy = String::new();
    for backend in &backends {
        policy += &service(backend.name(), &[(backend.address(), "a", "")], &[]);
    }
    policy += r#"
---
apiVersion: leeward.dev/v1
kind: Route
metadata: {name: shop}
spec:
  hostnames: [shop.example]
  rules:
    - backendRefs: [{service: front}]
    - matches: [{path: {prefix: /api}}]
      backendRefs: [{service: api}]
    - matches: [{path: {prefix: /api}, method: POST}]
      backendRefs: [{service: writes}]
    - matches: [{path: {exact: /api/status}}]
      backendRefs: [{service: exact}]
    - matches: [{path: {prefix: /api}, headers: [{name: X-Beta, exact: "1"}]}]
      backendRefs: [{service: beta}]
"#;
    policy += &route("wild", "*.shop.example", "wild", &[]);
    policy += &route("all", "*", "catchall", &[]);
    mesh.apply(&policy).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = mesh.workload("a1", protocol)?;
        for (method, host, path, header, want) in [
            ("GET", "shop.example", "/", "", "front"),
            ("GET", "SHOP.example:80", "/apis", "", "front"),
            ("GET", "shop.example", "/api", "", "api"),
            ("GET", "shop.example", "/api/x?y=z", "", "api"),
            ("GET", "shop.example", "/api/status", "1", "exact"),
            ("GET", "shop.example", "/api/status/", "", "api"),
            ("POST", "shop.example", "/api/x", "", "writes"),
            ("GET", "shop.example", "/api/x", "1", "beta"),
            ("GET", "shop.example", "/api/x", "2", "api"),
            ("GET", "a.b.shop.example", "/api", "", "wild"),
            ("GET", "elsewhere.example", "/api", "", "catchall"),
        ] {
            let mut request = request(Method::try_from(method)?, host, path, empty_body());
            if !header.is_empty() {
                request.headers_mut().insert("x-beta", header.parse()?);
            }
            let reply = client.call(request).await?;
            assert_eq!(
                reply.backend(),
                want,
                "{method} {host}{path} x-beta {header:?}: {}",
                reply.status
            );
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_take_turns_and_weights_are_shares() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backends: Vec<_> = ["one", "two", "three"]
        .iter()
        .map(|n| Backend::start(n))
        .collect::<Result<_, _>>()?;
    let endpoints: Vec<_> = backends.iter().map(|b| (b.address(), "a", "")).collect();
    let policy = service("all", &endpoints, &["loadBalancer: {policy: RoundRobin}"])
        + &service("first", &endpoints[..1], &[])
        + &service("second", &endpoints[1..2], &[])
        + &route("turns", "turns.example", "all", &[])
        + r#"
---
apiVersion: leeward.dev/v1
kind: Route
metadata: {name: shares}
spec:
  hostnames: [shares.example]
  rules:
    - backendRefs: [{service: first, weight: 9}, {service: second, weight: 1}, {service: all, weight: 0}]
"#;
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let turns = tally(&client, "turns.example", 300).await?;
    // Each worker keeps turns of its own, so the shares are equal but for a few.
    for name in ["one", "two", "three"] {
        assert!((95..=105).contains(&turns[name]), "{turns:?}");
    }
    let shares = tally(&client, "shares.example", 1000).await?;
    // 900 is expected, with a standard deviation of 9.5; six of those either way.
    assert!(
        (843..=957).contains(&shares["one"]) && !shares.contains_key("three"),
        "{shares:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_takes_effect_within_a_second_and_a_delete_takes_only_what_it_names() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (old, new) = (Backend::start("old")?, Backend::start("new")?);
    let policy = service("old", &[(old.address(), "a", "")], &[])
        + &service("new", &[(new.address(), "b", "")], &[])
        + &route("app", "app.example", "old", &[])
        + &route("other", "other.example", "old", &[]);
    mesh.apply(&policy).await?;
    let (a, b) = (
        mesh.workload("a1", Protocol::Http1)?,
        mesh.workload("b1", Protocol::Http1)?,
    );
    assert_eq!(a.get("app.example", "/").await?.backend(), "old");

    let begun = tokio::time::Instant::now();
    mesh.apply_only(&route("app", "app.example", "new", &[])).await?;
    for client in [&a, &b] {
        eventually("the new route", SOON, || async {
            ensure!(client.get("app.example", "/").await?.backend() == "new");
            Ok(())
        })
        .await?;
    }
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "it took {:?}",
        begun.elapsed()
    );

    mesh.delete(v1::Kind::Route, "app").await?;
    let gone = a.get("app.example", "/").await?;
    assert_eq!(
        (gone.status.as_u16(), gone.header("leeward-reason")),
        (404, "no_route")
    );
    assert_eq!(
        a.get("other.example", "/").await?.backend(),
        "old",
        "nothing else is gone"
    );

    // What others refer to stays.
    let named = v1::ResourceRef {
        kind: v1::Kind::Service.into(),
        name: "old".into(),
    };
    let refused = mesh
        .api()
        .delete(v1::DeleteRequest {
            r#ref: Some(named),
            revision: 0,
        })
        .await;
    let refused = refused.err().context("a service in use was deleted")?;
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert_eq!(a.get("other.example", "/").await?.backend(), "old");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_refused_whole_and_named() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("it")?;
    let good = service("it", &[(backend.address(), "a", "")], &[]);
    let dangling = route("app", "app.example", "nowhere", &[]);
    let refused = mesh
        .apply_only(&(good.clone() + &dangling))
        .await
        .err()
        .context("it was taken")?;
    assert!(format!("{refused:?}").contains("nowhere"), "{refused:?}");
    let refused = mesh
        .get(v1::Kind::Service, "it")
        .await
        .err()
        .context("half of it was taken")?;
    let status = refused.downcast_ref::<tonic::Status>().map(tonic::Status::code);
    assert_eq!(status, Some(Code::NotFound), "{refused:?}");

    // A precondition on the revision that is not the stored one.
    mesh.apply(&good).await?;
    let stored = mesh.get(v1::Kind::Service, "it").await?;
    let revision = stored.metadata.as_ref().context("no metadata")?.revision;
    let mut stale = stored.clone();
    stale.metadata.as_mut().context("no metadata")?.revision = revision + 1;
    let request = v1::ApplyRequest {
        resources: vec![stale],
        dry_run: false,
        ..v1::ApplyRequest::default()
    };
    let refused = mesh
        .api()
        .apply(request)
        .await
        .err()
        .context("a stale write was taken")?;
    assert_eq!(refused.code(), Code::Aborted, "{refused}");
    // The same again changes nothing.
    let request = v1::ApplyRequest {
        resources: vec![stored],
        dry_run: false,
        ..v1::ApplyRequest::default()
    };
    let answer = mesh.api().apply(request).await?.into_inner();
    assert_eq!(answer.changed, [false]);
    Ok(())
}

async fn tally(client: &Client, host: &str, requests: u32) -> anyhow::Result<BTreeMap<String, u32>> {
    let mut by_backend = BTreeMap::new();
    for _ in 0..requests {
        let reply = client.call(get(host, "/")).await?;
        *by_backend.entry(reply.backend().to_owned()).or_default() += 1;
    }
    Ok(by_backend)
}

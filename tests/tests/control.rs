//! The control plane may die, and policy may be partly bad: what works goes on working.

use anyhow::{Context, ensure};
use leeward_identity::{Identity, channel};
use leeward_proto::v1;
use leeward_testkit::policy::{fallback, plugin, route, service};
use leeward_testkit::{Backend, Load, Mesh, Protocol, binaries, eventually};
use std::time::Duration;
use tonic::Code;
use v1::policy_service_client::PolicyServiceClient;

const SOON: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_plane_is_killed_and_restarted_under_load_without_a_failed_request() -> anyhow::Result<()>
{
    let mut mesh = Mesh::two_zones().await?;
    let (old, new) = (Backend::start("old")?, Backend::start("new")?);
    let policy = service("old", &[(old.address(), "b", "b1")], &[])
        + &service("new", &[(new.address(), "b", "b1")], &[])
        + &route("app", "app.example", "old", &[])
        + &route("gone", "gone.example", "old", &[]);
    mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    let load = Load::start(
        outbound,
        Protocol::Http1,
        ("app.example", "/"),
        4,
        Duration::from_millis(3),
    );
    served(&load, 100).await?;

    mesh.kill_control()?;
    served(&load, 300).await?;
    mesh.start_control().await?;
    // Proxies find it again by themselves, and take up where they were.
    mesh.converge(1).await?;
    served(&load, 100).await?;
    let during = load.take();
    assert_eq!(during.failed, 0, "{during:?}");
    assert_eq!(during.by_backend.keys().collect::<Vec<_>>(), ["old"]);

    // What was stored is there, and changes and deletes arrive.
    assert!(mesh.get(v1::Kind::Service, "old").await.is_ok());
    mesh.apply(&route("app", "app.example", "new", &[])).await?;
    mesh.delete(v1::Kind::Route, "gone").await?;
    load.take();
    served(&load, 100).await?;
    let after = load.stop().await;
    assert_eq!(after.failed, 0, "{after:?}");
    assert!(after.by_backend.contains_key("new"), "{after:?}");
    let gone = mesh
        .workload("a1", Protocol::Http1)?
        .get("gone.example", "/")
        .await?;
    assert_eq!(gone.status, 404);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_while_a_proxy_is_cut_off_arrives_when_it_is_back() -> anyhow::Result<()> {
    let mut mesh = Mesh::two_zones().await?;
    let backend = Backend::start("app")?;
    let policy = service("app", &[(backend.address(), "a", "")], &[])
        + &route("one", "one.example", "app", &[])
        + &route("two", "two.example", "app", &[]);
    mesh.apply(&policy).await?;
    // The proxy of zone a misses a delete and a create, being dead.
    mesh.node_mut("a1")?.process.kill9()?;
    mesh.apply_only(&route("three", "three.example", "app", &[]))
        .await?;
    let named = v1::ResourceRef {
        kind: v1::Kind::Route.into(),
        name: "one".into(),
    };
    let request = v1::DeleteRequest {
        r#ref: Some(named),
        ..v1::DeleteRequest::default()
    };
    let revision = mesh.api().delete(request).await?.into_inner().revision;
    let again = mesh.start_again("a1").await?;
    *mesh.node_mut("a1")? = again;
    // It begins with what it had; what it missed comes.
    mesh.converge(revision).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let statuses = |host: &'static str| {
        let client = &client;
        async move { anyhow::Ok(client.get(host, "/").await?.status.as_u16()) }
    };
    let got = [
        statuses("one.example").await?,
        statuses("two.example").await?,
        statuses("three.example").await?,
    ];
    assert_eq!(got, [404, 200, 200]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_resource_of_a_thousand_leaves_999_live_and_one_on_its_last_good_version()
-> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (old, new, dead) = (
        Backend::start("old")?,
        Backend::start("new")?,
        Backend::refusing("dead")?,
    );
    let good = binaries::workspace()
        .join("plugins/built/static-json.wasm")
        .display()
        .to_string();
    let bad = mesh.dir().join("bad.wasm").display().to_string();
    std::fs::write(&bad, "this is not a component")?;
    // 499 services and as many routes to them, a fallback and its plugin: 1,000 with the zones' two.
    let thousand = |backend: &Backend, file: &str| {
        let mut policy = plugin("json", file, "NextRung", "");
        policy += &fallback(
            "ladder",
            &["plugin: {plugin: json, config: '{\"body\": \"v1\"}'}"],
            &[],
        );
        for i in 0..498 {
            policy += &service(&format!("s{i}"), &[(backend.address(), "a", "")], &[]);
            policy += &route(&format!("r{i}"), &format!("h{i}.example"), &format!("s{i}"), &[]);
        }
        policy += &service("dead", &[(dead.address(), "a", "")], &[]);
        policy + &route("dead", "dead.example", "dead", &["fallback: ladder"])
    };
    mesh.apply(&thousand(&old, &good)).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    assert_eq!(
        client.get("dead.example", "/").await?.header("leeward-degraded"),
        "ladder/0"
    );
    let before = revision_of(&mesh, "json").await?;

    // Every service changes, and the plugin's file is no component.
    let revision = mesh.apply(&thousand(&new, &bad)).await?;
    for i in 0..498 {
        let reply = client.get(&format!("h{i}.example"), "/").await?;
        assert_eq!(reply.backend(), "new", "h{i}.example: {}", reply.status);
    }
    let reply = client.get("dead.example", "/").await?;
    assert_eq!(
        (reply.header("leeward-degraded"), reply.text().as_str()),
        ("ladder/0", "\"v1\"")
    );

    // The status says so, for the resource and for each proxy.
    let plugin = mesh.get(v1::Kind::Plugin, "json").await?;
    let status = plugin.status.context("no status")?;
    assert_eq!(
        (status.proxies, status.live, status.refusals.len()),
        (2, 0, 2),
        "{status:?}"
    );
    for refusal in &status.refusals {
        assert_eq!(
            (refusal.revision, refusal.running_revision),
            (revision, before),
            "{refusal:?}"
        );
        assert!(!refusal.reason.is_empty(), "{refusal:?}");
    }
    let other = mesh
        .get(v1::Kind::Service, "s7")
        .await?
        .status
        .context("no status")?;
    assert_eq!(
        (other.proxies, other.live, other.refusals.len()),
        (2, 2, 0),
        "{other:?}"
    );
    for proxy in mesh.proxies().await?.proxies {
        assert_eq!(proxy.generation, revision, "{proxy:?}");
        let [quarantined] = &proxy.quarantined[..] else {
            panic!("{proxy:?}")
        };
        assert_eq!(quarantined.r#ref.as_ref().map(|r| r.name.as_str()), Some("json"));
        assert_eq!(
            (quarantined.revision, quarantined.running_revision),
            (revision, before)
        );
    }
    let gauge = mesh.node("a1")?.metric("leeward_config_quarantined", &[]).await?;
    assert!((gauge - 1.0).abs() < 0.1, "{gauge}");

    // Repaired, it is live everywhere.
    mesh.apply(&thousand(&new, &good)).await?;
    let plugin = mesh.get(v1::Kind::Plugin, "json").await?;
    let status = plugin.status.context("no status")?;
    assert_eq!(
        (status.proxies, status.live, status.refusals.len()),
        (2, 2, 0),
        "{status:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_may_not_write_policy_and_users_may_not_subscribe() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let as_proxy = Identity::load(mesh.identity("a1"))?;
    let mut api = PolicyServiceClient::new(channel::connect_lazy(as_proxy, mesh.control_address()));
    let refused = api
        .list(v1::ListRequest::default())
        .await
        .err()
        .context("a proxy may read policy")?;
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");

    let hello = |proxy: &str, zone: &str| {
        let hello = v1::Hello {
            proxy: proxy.into(),
            zone: zone.into(),
            ..v1::Hello::default()
        };
        v1::ProxyMessage {
            message: Some(v1::proxy_message::Message::Hello(hello)),
        }
    };
    // A user; a proxy that says it is another; one that says it is of another zone.
    for (who, name, zone) in [("user", "a1", "a"), ("a1", "a2", "a"), ("a1", "a1", "b")] {
        let identity = Identity::load(mesh.identity(who))?;
        let channel = channel::connect_lazy(identity, mesh.control_address());
        let mut push = v1::push_service_client::PushServiceClient::new(channel);
        let opened = push.subscribe(tokio_stream::iter([hello(name, zone)])).await;
        let refused = match opened {
            Err(refused) => refused,
            Ok(stream) => stream
                .into_inner()
                .message()
                .await
                .err()
                .context("it was told policy")?,
        };
        assert_eq!(
            refused.code(),
            Code::PermissionDenied,
            "{who} as {name} of {zone}: {refused}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_tells_every_change_and_delete_in_order() -> anyhow::Result<()> {
    use v1::watch_event::Event;
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    mesh.apply(&service("app", &[(backend.address(), "a", "")], &[]))
        .await?;
    let mut api = mesh.api();
    let mut watch = api.watch(v1::WatchRequest::default()).await?.into_inner();
    let mut told = Vec::new();
    let mut changed = false;
    while !told.contains(&"deleted app".to_owned()) {
        let event = tokio::time::timeout(SOON, watch.message())
            .await??
            .context("the watch ended")?;
        match event.event.context("no event")? {
            Event::Put(resource) => told.push(format!("put {}", resource.metadata.unwrap_or_default().name)),
            Event::Deleted(named) => told.push(format!("deleted {}", named.name)),
            Event::Synced(_) if !changed => {
                changed = true;
                mesh.apply(&service("app", &[], &[])).await?;
                mesh.delete(v1::Kind::Service, "app").await?;
            }
            Event::Synced(_) => {}
        }
    }
    assert_eq!(told.iter().filter(|t| *t == "put app").count(), 2, "{told:?}");
    assert_eq!(told.first().map(String::as_str), Some("put a"), "{told:?}");
    Ok(())
}

async fn revision_of(mesh: &Mesh, plugin: &str) -> anyhow::Result<u64> {
    let resource = mesh.get(v1::Kind::Plugin, plugin).await?;
    Ok(resource.metadata.context("no metadata")?.revision)
}

/// Waits for so many more requests that were served.
async fn served(load: &Load, more: u64) -> anyhow::Result<()> {
    let before = load.tally().served;
    eventually("the load to go on", SOON, || async {
        let tally = load.tally();
        ensure!(tally.served >= before + more, "{tally:?}");
        Ok(())
    })
    .await
}

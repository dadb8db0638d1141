//! A proxy whose certificate others don't believe any more, as in the moment of a root's rotation: what it sends them on a
//! connection that it has just made is not done, so that it goes to others, whatever it is.

use anyhow::{Context, ensure};
use http::Method;
use leeward_identity::SpiffeId;
use leeward_identity::authority::Authority;
use leeward_testkit::policy::{route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Client, Mesh, Protocol, Reply, empty_body, eventually, request,
};
use std::path::Path;
use std::time::Duration;

const DOMAIN: &str = "leeward.test";
/// Files are looked at every 5 s.
const SOON: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// To each kind of proxy in turn, so that half of them would fail.
const REQUESTS: usize = 20;
/// Its name, the zone, who believes a1 no more, who does, and how they are spoken to.
const WAYS: [(&str, &str, &str, &str, &str); 3] = [
    ("quic", "b", "b1", "b2", "HTTP1"),
    ("http1", "a", "a2", "a3", "HTTP1"),
    ("http2", "a", "a2", "a3", "HTTP2"),
];
const BALANCE: &str = "loadBalancer: {policy: RoundRobin, slowStartWindow: 0s}";

fn backend(name: &str) -> anyhow::Result<Backend> {
    let backend = Backend::start(name)?;
    backend.behave(Behave::Answer(Answer::text(name)));
    Ok(backend)
}

/// The roots that a proxy has in use.
async fn bundle(mesh: &Mesh, name: &str) -> anyhow::Result<String> {
    let config = mesh.node(name)?.config().await?;
    let bundle = config
        .pointer("/identity/bundle")
        .and_then(serde_json::Value::as_str);
    Ok(bundle.context("no bundle")?.to_owned())
}

/// Changes the files of a proxy, and waits until it has others in use.
async fn change(
    mesh: &Mesh,
    name: &str,
    change: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let before = bundle(mesh, name).await?;
    change(&mesh.identity(name))?;
    eventually("the proxy to have its files", SOON, || async {
        ensure!(bundle(mesh, name).await? != before, "{name} has what it had");
        Ok(())
    })
    .await
}

async fn post(client: &Client, host: &str) -> anyhow::Result<Reply> {
    client.call(request(Method::POST, host, "/", empty_body())).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sent_to_who_refuses_the_certificate_goes_to_others() -> anyhow::Result<()> {
    let mut builder = Mesh::builder();
    for (zone, name) in [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("b", "b2")] {
        builder = builder.node(zone, name);
    }
    let mesh = builder.start().await?;
    let (refuses, takes) = (backend("refuses")?, backend("takes")?);
    let mut policy = String::new();
    for (way, zone, strict, other, protocol) in WAYS {
        let protocol = format!("protocol: {protocol}");
        let more = [&*protocol, BALANCE];
        let strict = (refuses.address(), zone, strict);
        let (alone, host) = (format!("{way}-alone"), format!("{way}.example"));
        policy += &service(way, &[strict, (takes.address(), zone, other)], &more);
        policy += &route(way, &host, way, &[]);
        policy += &service(&alone, &[strict], &more);
        policy += &route(&alone, &format!("alone.{host}"), &alone, &[]);
    }
    mesh.apply(&policy).await?;

    let (old, new) = (mesh.root()?, Authority::create(&mesh.dir().join("new"), DOMAIN)?);
    let both = old.roots().with(new.roots())?.to_pem();
    change(&mesh, "a1", |dir| {
        Ok(std::fs::write(dir.join("bundle.pem"), both)?)
    })
    .await?;
    for (zone, name) in [("a", "a2"), ("b", "b1")] {
        let id = SpiffeId::proxy(DOMAIN, zone, name)?;
        change(&mesh, name, |dir| Ok(new.issue(&id, DAY, dir)?)).await?;
    }

    let node = mesh.node("a1")?;
    let client = Client::new(node.outbound, Protocol::Http1);
    for (way, ..) in WAYS {
        for n in 0..REQUESTS {
            // It is not idempotent, and by default nothing is sent again that may have been acted upon.
            let reply = post(&client, &format!("{way}.example")).await?;
            let reason = reply.header("leeward-reason");
            ensure!(reply.status == 200, "{way} {n}: {} {reason}", reply.status);
            ensure!(reply.text() == "takes", "{way} {n}: {}", reply.text());
        }
        let label = format!("service=\"{way}\"");
        let retries = node
            .metric("leeward_retries_total", &[&label, "kind=\"retry\""])
            .await?;
        ensure!(retries >= 3.0, "{way}: {retries}");
    }
    for (way, ..) in WAYS {
        let host = format!("alone.{way}.example");
        // Once it is ejected nobody is asked any more; before, somebody was.
        let reply = post(&client, &host).await?;
        let reason = reply.header("leeward-reason");
        ensure!(
            (reply.status.as_u16(), reason) == (503, "connect_failure"),
            "{way}: {} {reason}",
            reply.status
        );
    }
    ensure!(refuses.requests() == 0, "{}", refuses.requests());

    // With a certificate that they believe it is let in.
    let id = SpiffeId::proxy(DOMAIN, "a", "a1")?;
    change(&mesh, "a1", |dir| Ok(new.issue(&id, DAY, dir)?)).await?;
    for (way, ..) in WAYS {
        let host = format!("alone.{way}.example");
        eventually("it to be let in", SOON, || async {
            let reply = post(&client, &host).await?;
            ensure!(reply.status == 200, "{way}: {}", reply.status);
            Ok(())
        })
        .await?;
    }
    Ok(())
}

//! Modules of plugins on their way: from a file to the control plane, or from a registry, to the proxies, and what holds
//! when one of these is away, broken, or not to be trusted.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod checked;
mod images;
mod kept;
mod registry;

use anyhow::{Context, ensure};
use leeward_identity::{Identity, channel};
use leeward_proto::v1;
use leeward_proto::v1::plugin_service_client::PluginServiceClient;
use leeward_testkit::policy::{fallback, route, service};
use leeward_testkit::{Client, Mesh, Node, Protocol, binaries, eventually, leeward};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;
use tonic::transport::Channel;

const SOON: Duration = Duration::from_secs(60);
const HOST: &str = "shop.example";

fn built(name: &str) -> Vec<u8> {
    let file = binaries::workspace()
        .join("plugins/built")
        .join(format!("{name}.wasm"));
    std::fs::read(file).unwrap()
}

/// `static-json`, with a section that nothing reads, which makes it another module.
fn variant(n: u8) -> Vec<u8> {
    let mut module = built("static-json");
    module.extend([0, 3, 1, b'v', n]);
    module
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A file in the mesh's directory.
fn file(mesh: &Mesh, name: &str, bytes: &[u8]) -> anyhow::Result<PathBuf> {
    let path = mesh.dir().join(name);
    std::fs::write(&path, bytes)?;
    Ok(path)
}

/// The Plugin `json`, with lines of its spec beside source and kind.
fn plugin(name: &str, source: &str, more: &str) -> String {
    format!(
        "---\napiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {{name: {name}}}\nspec:\n  kind: Fallback\n  source: {source}\n  onFault: NextRung\n{more}"
    )
}

/// A route to a service without endpoints, for which a plugin answers with `body`.
fn answered_by(plugin: &str, host: &str, body: &str) -> String {
    let rung = format!("plugin: {{plugin: {plugin}, config: '{{\"body\": \"{body}\"}}'}}");
    service(plugin, &[], &[])
        + &fallback(plugin, &[&rung], &["on: [NoEndpoint]"])
        + &route(plugin, host, plugin, &[&format!("fallback: {plugin}")])
}

/// Waits until a plugin answers a node's workloads.
async fn answers(node: &Node, host: &str, body: &str) -> anyhow::Result<()> {
    let client = Client::new(node.outbound, Protocol::Http1);
    let want = format!("\"{body}\"");
    eventually(&format!("{} to answer {want}", node.name), SOON, || async {
        let reply = client.get(host, "/").await?;
        ensure!(
            reply.status == 200 && reply.text() == want,
            "{reply:?}; {:?}",
            told(node).await
        );
        Ok(())
    })
    .await
}

/// What a proxy says of its plugins.
async fn told(node: &Node) -> anyhow::Result<Value> {
    let reply = Client::new(node.admin, Protocol::Http1)
        .get("admin", "/plugins")
        .await?;
    Ok(serde_json::from_slice(&reply.body)?)
}

async fn plugin_of(node: &Node, name: &str) -> anyhow::Result<Value> {
    let told = told(node).await?;
    let found = told
        .as_array()
        .context("no list")?
        .iter()
        .find(|plugin| plugin["plugin"] == name);
    found.cloned().with_context(|| format!("no {name} in {told}"))
}

/// Waits until a proxy runs this module as a plugin.
async fn runs(node: &Node, name: &str, sha256: &str) -> anyhow::Result<()> {
    eventually(&format!("{} to run {sha256}", node.name), SOON, || async {
        let plugin = plugin_of(node, name).await?;
        ensure!(plugin["stable"]["sha256"] == sha256, "{plugin}");
        Ok(())
    })
    .await
}

/// Runs the command, which should succeed. Returns what it says.
async fn says(mesh: &Mesh, args: &[&str]) -> anyhow::Result<String> {
    let out = leeward(mesh, args).await?;
    ensure!(out.status.success(), "{args:?}: {out:?}");
    Ok(String::from_utf8(out.stdout)?)
}

async fn push(mesh: &Mesh, name: &str, bytes: &[u8]) -> anyhow::Result<String> {
    let path = file(mesh, name, bytes)?.display().to_string();
    says(mesh, &["plugin", "push", &path]).await
}

/// Runs the command, which should end with this code. Returns what it complains of.
async fn refused(mesh: &Mesh, args: &[&str], code: i32) -> anyhow::Result<String> {
    let out: Output = leeward(mesh, args).await?;
    ensure!(out.status.code() == Some(code), "{args:?}: {out:?}");
    Ok(String::from_utf8(out.stderr)?)
}

/// The control plane's modules, to whoever has this identity.
fn modules(mesh: &Mesh, identity: &str) -> anyhow::Result<PluginServiceClient<Channel>> {
    let identity = Identity::load(mesh.identity(identity))?;
    let channel = channel::connect_lazy(identity, mesh.control_address());
    Ok(PluginServiceClient::new(channel))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_pushed_answers_at_every_proxy_and_stays_while_it_is_named() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let module = built("static-json");
    let name = sha256(&module);
    let shown = push(&mesh, "static-json.wasm", &module).await?;
    for words in [&*name, "Fallback 0.2", "leeward:plugin/", "signatures  0"] {
        ensure!(shown.contains(words), "no {words:?} in {shown}");
    }
    // Once more is no other.
    push(&mesh, "again.wasm", &module).await?;
    mesh.apply(&(plugin("json", &format!("{{sha256: {name}}}"), "") + &answered_by("json", HOST, "v1")))
        .await?;
    for node in ["a1", "b1"] {
        answers(mesh.node(node)?, HOST, "v1").await?;
        let kept = mesh.data(node).join("plugins").join(format!("{name}.wasm"));
        assert_eq!(std::fs::read(kept)?, module, "{node}");
        runs(mesh.node(node)?, "json", &name).await?;
    }

    let list: Value = serde_json::from_str(&says(&mesh, &["plugin", "list", "-o", "json"]).await?)?;
    let listed = list["modules"].as_array().context("no modules")?;
    assert_eq!(listed.len(), 1, "{list}");
    assert_eq!(listed[0]["sha256"], *name);
    assert_eq!(listed[0]["size"], module.len());
    assert_eq!(listed[0]["used_by"][0], "Plugin/json (spec.source)");
    assert_eq!(list["size"], module.len());
    let table = says(&mesh, &["plugin", "list"]).await?;
    for words in [
        &*name,
        "Fallback",
        "94.3 KiB",
        "Plugin/json (spec.source)",
        "of 2.0 GiB used",
    ] {
        ensure!(table.contains(words), "no {words:?} in {table}");
    }

    let error = refused(&mesh, &["plugin", "delete", &name], 1).await?;
    ensure!(error.contains("Plugin/json (spec.source)"), "{error}");
    let other = push(&mesh, "other.wasm", &variant(1)).await?;
    let other_name = sha256(&variant(1));
    ensure!(other.contains(&other_name), "{other}");
    let error = refused(&mesh, &["plugin", "delete", &other_name[..7]], 64).await?;
    ensure!(error.contains("at least the first 8"), "{error}");
    let error = refused(&mesh, &["plugin", "delete", "00000000"], 1).await?;
    ensure!(error.contains("begins with 00000000"), "{error}");
    let said = says(&mesh, &["plugin", "delete", &other_name[..8]]).await?;
    assert_eq!(said, format!("module {other_name} deleted\n"));
    let error = refused(&mesh, &["plugin", "delete", &other_name], 1).await?;
    ensure!(error.contains(&other_name), "{error}");
    // What it named is free when the Plugin is gone.
    mesh.apply(&route("json", HOST, "json", &[])).await?;
    mesh.delete(v1::Kind::FallbackPolicy, "json").await?;
    mesh.delete(v1::Kind::Plugin, "json").await?;
    says(&mesh, &["plugin", "delete", &name[..12]]).await?;
    let table = says(&mesh, &["plugin", "list"]).await?;
    ensure!(table.starts_with("the control plane has no modules"), "{table}");
    Ok(())
}

//! Modules from a registry: the control plane takes them from there, and proxies from it.

use crate::registry::{Layout, Registry};
use crate::{HOST, SOON, answered_by, answers, plugin, runs, says, sha256, variant};
use anyhow::{Context, ensure};
use leeward_proto::v1;
use leeward_testkit::{Mesh, eventually};
use minisign::KeyPair;
use serde_json::Value;

/// A source in a registry without TLS, with further fields of `oci` and of the source.
fn source(image: &str, oci: &str, more: &str) -> String {
    format!("{{oci: {{image: \"{image}\", insecure: true{oci}}}{more}}}")
}

/// What the command says of a Plugin's image.
async fn image(mesh: &Mesh, plugin: &str) -> anyhow::Result<Value> {
    let list: Value = serde_json::from_str(&says(mesh, &["plugin", "list", "-o", "json"]).await?)?;
    let field = format!("Plugin/{plugin} (spec.source)");
    let found = list["images"]
        .as_array()
        .context("no images")?
        .iter()
        .find(|image| image["field"] == *field);
    found.cloned().with_context(|| format!("no {field} in {list}"))
}

async fn is(mesh: &Mesh, plugin: &str, state: &str, why: &str) -> anyhow::Result<()> {
    eventually(&format!("the image of {plugin} to be {state}"), SOON, || async {
        let image = image(mesh, plugin).await?;
        ensure!(image["state"] == state, "{image}");
        ensure!(
            image["error"].as_str().unwrap_or_default().contains(why),
            "{image}"
        );
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_layout_is_taken_and_a_signature_in_the_manifest_reaches_the_proxies() -> anyhow::Result<()> {
    let registry = Registry::start()?;
    let mesh = Mesh::two_zones().await?;
    let pair = KeyPair::generate_unencrypted_keypair()?;
    let mut policy = String::new();
    let layouts = [
        ("wasm", Layout::Wasm),
        ("content", Layout::Content),
        ("container", Layout::Container),
    ];
    for (n, (name, layout)) in (1u8..).zip(layouts) {
        registry.push((name, "v1"), layout, &variant(n), None);
        let source = source(&registry.image(name, "v1"), "", "");
        policy += &(plugin(name, &source, "") + &answered_by(name, &format!("{name}.example"), name));
    }
    let module = variant(9);
    let signature = minisign::sign(Some(&pair.pk), &pair.sk, &module[..], None, None)?.into_string();
    let digest = registry.push(("signed", "v1"), Layout::Wasm, &module, Some(&signature));
    let key = format!(
        ", minisignKey: {}, sha256: {}",
        pair.pk.to_base64(),
        sha256(&module)
    );
    let signed = source(&registry.pinned("signed", &digest), "", &key);
    policy += &(plugin("signed", &signed, "") + &answered_by("signed", "signed.example", "signed"));
    mesh.apply(&policy).await?;
    for node in ["a1", "b1"] {
        let node = mesh.node(node)?;
        for (n, (name, _)) in (1u8..).zip(layouts) {
            answers(node, &format!("{name}.example"), name).await?;
            runs(node, name, &sha256(&variant(n))).await?;
        }
        answers(node, "signed.example", "signed").await?;
        runs(node, "signed", &sha256(&module)).await?;
    }
    is(&mesh, "signed", "current", "").await?;

    // Unsigned, or by another's key: the Plugin is there, and nothing runs.
    let other = KeyPair::generate_unencrypted_keypair()?;
    let key = format!(", minisignKey: {}", other.pk.to_base64());
    let unsigned = plugin("unsigned", &source(&registry.image("wasm", "v1"), "", &key), "");
    let forged = plugin("forged", &source(&registry.image("signed", "v1"), "", &key), "");
    mesh.apply(&(unsigned + &forged)).await?;
    is(&mesh, "unsigned", "failed", "no annotation dev.leeward.minisig").await?;
    is(&mesh, "forged", "failed", "signed by another key").await?;
    for name in ["unsigned", "forged"] {
        let plugin = crate::plugin_of(mesh.node("a1")?, name).await?;
        assert_eq!(
            (&plugin["state"], &plugin["stable"]),
            (&"fetching".into(), &Value::Null),
            "{plugin}"
        );
        let reason = plugin["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("has not fetched"), "{plugin}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_tag_means_is_followed_and_what_was_fetched_outlives_the_registry() -> anyhow::Result<()> {
    let mut registry = Registry::start()?;
    let mut mesh = Mesh::builder().node("a", "a1").start().await?;
    let modules = [variant(1), variant(2), variant(3)];
    let names = modules.each_ref().map(|module| sha256(module));
    registry.push(("shop", "stable"), Layout::Wasm, &modules[0], None);
    let followed = |image: &str| plugin("json", &source(image, ", refresh: 10s", ""), "");
    let tag = registry.image("shop", "stable");
    mesh.apply(&(followed(&tag) + &answered_by("json", HOST, "on")))
        .await?;
    runs(mesh.node("a1")?, "json", &names[0]).await?;
    answers(mesh.node("a1")?, HOST, "on").await?;

    // The tag moves, and policy says nothing.
    registry.push(("shop", "stable"), Layout::Container, &modules[1], None);
    runs(mesh.node("a1")?, "json", &names[1]).await?;
    answers(mesh.node("a1")?, HOST, "on").await?;

    // Policy names another image, by its digest.
    let digest = registry.push(("shop", "next"), Layout::Content, &modules[2], None);
    mesh.apply(&followed(&registry.pinned("shop", &digest))).await?;
    runs(mesh.node("a1")?, "json", &names[2]).await?;

    // The registry is gone: nothing changes, whoever starts.
    registry.down();
    let asked = registry.asked();
    is(&mesh, "json", "failed", "").await?;
    assert_eq!(image(&mesh, "json").await?["sha256"], *names[2]);
    mesh.kill_control()?;
    mesh.start_control().await?;
    mesh.node_mut("a1")?.process.kill9()?;
    std::fs::remove_dir_all(mesh.data("a1"))?;
    let again = mesh.start_again("a1").await?;
    runs(&again, "json", &names[2]).await?;
    answers(&again, HOST, "on").await?;
    // What can't be had now leaves what there is, and comes when it can.
    registry.push(("shop", "late"), Layout::Wasm, &modules[0], None);
    mesh.apply_only(&followed(&registry.image("shop", "late")))
        .await?;
    is(&mesh, "json", "failed", "").await?;
    answers(&again, HOST, "on").await?;
    assert_eq!(registry.asked(), asked);
    registry.up()?;
    runs(&again, "json", &names[0]).await?;
    is(&mesh, "json", "current", "").await?;
    answers(&again, HOST, "on").await?;
    let resource = mesh.get(v1::Kind::Plugin, "json").await?;
    ensure!(resource.status.context("no status")?.refusals.is_empty());
    Ok(())
}

//! What a proxy has on disk: used when nobody is there to ask, never used when it isn't what it should be.

use crate::{HOST, SOON, answered_by, answers, built, file, plugin, plugin_of, push, runs, sha256, variant};
use anyhow::ensure;
use leeward_testkit::policy::service;
use leeward_testkit::{Mesh, Node, Process, binaries, eventually};
use std::path::Path;

/// A proxy that has policy from files, and nobody to ask.
async fn alone(dir: &Path, name: &str, data: &Path) -> anyhow::Result<Node> {
    let text = |path: &Path| path.display().to_string();
    let args = [
        ["--zone".to_owned(), "a".to_owned()],
        ["--name".to_owned(), name.to_owned()],
        ["--policy".to_owned(), text(&dir.join("policy"))],
        ["--data".to_owned(), text(data)],
        ["--outbound".to_owned(), "127.0.0.1:0".to_owned()],
        ["--admin".to_owned(), "127.0.0.1:0".to_owned()],
        ["--ofrep".to_owned(), "off".to_owned()],
    ];
    let process = Process::start(name, &binaries::path("leeward-proxy")?, args.concat(), dir).await?;
    Ok(Node {
        name: name.to_owned(),
        zone: "a".to_owned(),
        outbound: process.address("outbound")?,
        inbound: process.address("outbound")?,
        admin: process.address("admin")?,
        ofrep: process.address("admin")?,
        process,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_starts_cold_with_nobody_to_ask_has_its_modules() -> anyhow::Result<()> {
    let mut mesh = Mesh::builder().node("a", "a1").start().await?;
    let module = built("static-json");
    let name = sha256(&module);
    push(&mesh, "static-json.wasm", &module).await?;
    let policy = plugin("json", &format!("{{sha256: {name}}}"), "") + &answered_by("json", HOST, "kept");
    mesh.apply(&policy).await?;
    answers(mesh.node("a1")?, HOST, "kept").await?;

    mesh.kill_control()?;
    answers(mesh.node("a1")?, HOST, "kept").await?;
    mesh.node_mut("a1")?.process.kill9()?;
    // Compiled code alone would do; the module itself must, too.
    std::fs::remove_dir_all(mesh.data("a1").join("compiled"))?;
    let zone = "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {proxies: []}\n";
    std::fs::create_dir(mesh.dir().join("policy"))?;
    std::fs::write(mesh.dir().join("policy/all.yaml"), zone.to_owned() + &policy)?;
    let cold = alone(mesh.dir(), "cold", &mesh.data("a1")).await?;
    answers(&cold, HOST, "kept").await?;
    runs(&cold, "json", &name).await?;

    // One that never had the module says what is missing, and doesn't serve without it as if nothing were.
    let mut bare = alone(mesh.dir(), "bare", &mesh.dir().join("bare-data")).await?;
    let ended = bare.process.wait(SOON).await?;
    ensure!(!ended.success(), "{ended}");
    let error = bare.process.log()?;
    for words in ["spec.source: module", &name, "no control plane to take it from"] {
        ensure!(error.contains(words), "no {words:?} in {error}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_that_was_tampered_with_is_set_aside_and_fetched_again() -> anyhow::Result<()> {
    let mut mesh = Mesh::builder().node("a", "a1").start().await?;
    let module = built("static-json");
    let name = sha256(&module);
    push(&mesh, "static-json.wasm", &module).await?;
    mesh.apply(&(plugin("json", &format!("{{sha256: {name}}}"), "") + &answered_by("json", HOST, "good")))
        .await?;
    answers(mesh.node("a1")?, HOST, "good").await?;
    mesh.node_mut("a1")?.process.kill9()?;

    let dir = mesh.data("a1").join("plugins");
    let kept = dir.join(format!("{name}.wasm"));
    // It would answer, were it used.
    std::fs::write(&kept, variant(9))?;
    let torn = dir.join(format!("{name}.1-0.tmp"));
    std::fs::write(&torn, &module[..1000])?;
    let again = mesh.start_again("a1").await?;
    answers(&again, HOST, "good").await?;
    runs(&again, "json", &name).await?;
    assert_eq!(std::fs::read(&kept)?, module);
    assert_eq!(std::fs::read(dir.join(format!("{name}.corrupt")))?, variant(9));
    ensure!(!torn.exists(), "what a killed process left is still there");
    let log = again.process.log()?;
    ensure!(
        log.contains("it is set aside") && log.contains(&format!("{name}.corrupt")),
        "{log}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_fetched_now_is_fetched_later_and_the_last_good_one_serves() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let (old, new) = (variant(1), variant(2));
    push(&mesh, "old.wasm", &old).await?;
    push(&mesh, "new.wasm", &new).await?;
    let json = |module: &[u8]| plugin("json", &format!("{{sha256: {}}}", sha256(module)), "");
    mesh.apply(&(json(&old) + &answered_by("json", HOST, "on")))
        .await?;
    let a1 = mesh.node("a1")?;
    runs(a1, "json", &sha256(&old)).await?;

    // A directory in its place: it can't be opened as a file, nor can one be moved there.
    let place = mesh
        .data("a1")
        .join("plugins")
        .join(format!("{}.wasm", sha256(&new)));
    std::fs::create_dir(&place)?;
    file(&mesh, "in-the-way", b"")?;
    std::fs::write(place.join("it"), b"is not empty")?;
    mesh.apply(&(json(&new) + &service("later", &[], &[]))).await?;
    let (before, after) = (sha256(&old), sha256(&new));
    eventually("the proxy to say what is wrong", SOON, || async {
        let plugin = plugin_of(a1, "json").await?;
        ensure!(plugin["state"] == "fetching", "{plugin}");
        ensure!(
            plugin["reason"].as_str().unwrap_or_default().contains(&after),
            "{plugin}"
        );
        ensure!(plugin["stable"]["sha256"] == *before, "{plugin}");
        Ok(())
    })
    .await?;
    answers(a1, HOST, "on").await?;
    std::fs::remove_dir_all(&place)?;
    runs(a1, "json", &after).await?;
    answers(a1, HOST, "on").await
}

//! Versions of plugins in real proxies: quarantined and tried again, tried on some, swapped under load, taken back, and kept
//! compiled.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::{Context, ensure};
use leeward_testkit::binaries::plugin as built;
use leeward_testkit::policy::{flags, plugin_of, route, service};
use leeward_testkit::{
    Backend, Client, Load, Mesh, Node, Port, Protocol, Reply, eventually, get, with_header,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);
const MISBEHAVE: &str = "x-misbehave";

/// The same plugin with another hash: a custom section (core specification §5.5.3) changes nothing of what it does.
fn version(dir: &Path, guest: &str, n: u8) -> anyhow::Result<String> {
    let mut bytes = std::fs::read(built(guest))?;
    // Section 0, of four bytes: a name of two, and one of content.
    bytes.extend([0, 4, 2, b'v', b'n', n]);
    let file = dir.join(format!("{guest}-{n}.wasm"));
    std::fs::write(&file, bytes)?;
    Ok(file.display().to_string())
}

/// What the proxy says of a plugin.
async fn told(node: &Node, plugin: &str) -> anyhow::Result<Value> {
    let admin = Client::new(node.admin, Protocol::Http1);
    let all: Vec<Value> = serde_json::from_slice(&admin.get("admin", "/plugins").await?.body)?;
    let of = all.into_iter().find(|told| told["plugin"] == plugin);
    of.with_context(|| format!("nothing is said of {plugin}"))
}

fn faulted(reply: &Reply) -> bool {
    (reply.status.as_u16(), reply.header("leeward-reason")) == (503, "plugin_fault")
}

async fn misbehave(client: &Client, list: &str) -> anyhow::Result<Reply> {
    client
        .call(with_header(get("app.example", "/"), MISBEHAVE, list))
        .await
}

fn app(backend: &Backend) -> String {
    service("app", &[(backend.address(), "a", "")], &[])
        + &route("app", "app.example", "app", &["filters: [{plugin: p}]"])
}

async fn ready(node: &Node, plugin: &str) -> anyhow::Result<Value> {
    eventually(&format!("{plugin} to be ready"), SOON, || async {
        let told = told(node, plugin).await?;
        ensure!(told["state"] == "ready", "{told}");
        Ok(told)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_faults_quarantine_a_plugin_until_one_call_has_tried_it() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    let quarantine = "quarantine: {faults: 5, window: 60s, duration: 2s}";
    let plugin = plugin_of(
        "p",
        "Filter",
        &built("misbehave-filter"),
        "FailClosed",
        &[quarantine],
    );
    mesh.apply_with_plugins(&(app(&backend) + &plugin)).await?;
    let node = mesh.node("a1")?;
    ready(node, "p").await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for n in 0..5 {
        assert_eq!(
            misbehave(&client, "").await?.backend(),
            "app",
            "{n}: it is asked yet"
        );
        assert!(faulted(&misbehave(&client, "request:panic").await?));
    }
    // Good ones are refused, too, and the plugin isn't asked.
    let calls = told(node, "p").await?["stable"]["calls"].clone();
    let reply = misbehave(&client, "").await?;
    assert!(faulted(&reply), "{reply:?}");
    let now = told(node, "p").await?;
    assert_eq!(now["stable"]["state"], "quarantined", "{now}");
    assert_eq!(now["stable"]["calls"], calls, "{now}");
    assert_eq!(now["stable"]["quarantines"], 1, "{now}");
    let quarantined = node
        .metric("leeward_plugin_state", &["plugin=\"p\"", "state=\"quarantined\""])
        .await?;
    assert!((quarantined - 1.0).abs() < 0.1);
    // A call that tries it and faults leaves it where it is.
    eventually("a try", SOON, || async {
        assert!(faulted(&misbehave(&client, "request:panic").await?));
        let now = told(node, "p").await?;
        ensure!(now["stable"]["calls"] != calls, "{now}");
        Ok(())
    })
    .await?;
    let now = told(node, "p").await?;
    assert_eq!(now["stable"]["state"], "quarantined", "{now}");
    eventually("it to recover", SOON, || async {
        let reply = misbehave(&client, "").await?;
        ensure!(reply.backend() == "app", "{reply:?}");
        Ok(())
    })
    .await?;
    assert_eq!(told(node, "p").await?["stable"]["state"], "ready");
    let events = node
        .metric(
            "leeward_plugin_events_total",
            &["plugin=\"p\"", "event=\"quarantined\""],
        )
        .await?;
    assert!(events >= 1.0);
    let faults = node
        .metric(
            "leeward_plugin_faults_total",
            &["plugin=\"p\"", "fault=\"quarantined\""],
        )
        .await?;
    assert!(faults >= 1.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_canary_gets_its_share_and_those_that_a_flag_names() -> anyhow::Result<()> {
    const REQUESTS: u64 = 300;
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    let next = version(mesh.dir(), "misbehave-filter", 1)?;
    let flag = r#"{"testers": {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off", "targeting": {"if": [{"==": [{"var": "headers.x-tester"}, "yes"]}, "on", "off"]}}}"#;
    let with = |canary: &str| {
        let canary = format!("canary: {{source: {{file: \"{next}\"}}, {canary}}}");
        let more = [canary.as_str(), "quarantine: {faults: 5, duration: 60s}"];
        plugin_of("p", "Filter", &built("misbehave-filter"), "FailOpen", &more)
    };
    mesh.apply_with_plugins(&(app(&backend) + &flags("flags", flag) + &with("percent: 30")))
        .await?;
    let node = mesh.node("a1")?;
    let first = ready(node, "p").await?;
    assert_ne!(first["stable"]["sha256"], first["canary"]["sha256"]);
    let client = mesh.workload("a1", Protocol::Http2)?;
    let calls = |told: &Value, role: &str| told[role]["calls"].as_u64().unwrap_or(0);
    for _ in 0..REQUESTS {
        assert_eq!(client.get("app.example", "/").await?.backend(), "app");
    }
    let after = told(node, "p").await?;
    let (stable, canary) = (calls(&after, "stable"), calls(&after, "canary"));
    assert_eq!(stable + canary, REQUESTS, "{after}");
    // Ten standard deviations.
    assert!((10..170).contains(&canary), "{canary} of {REQUESTS} at 30 %");

    // By flag, whatever the share.
    mesh.apply_with_plugins(&with("when: {flag: testers}")).await?;
    ready(node, "p").await?;
    let before = told(node, "p").await?;
    for n in 0..20 {
        let request = get("app.example", "/");
        let request = if n % 2 == 0 {
            with_header(request, "x-tester", "yes")
        } else {
            request
        };
        assert_eq!(client.call(request).await?.backend(), "app");
    }
    let after = told(node, "p").await?;
    assert_eq!(
        calls(&after, "canary") - calls(&before, "canary"),
        10,
        "{before} {after}"
    );
    assert_eq!(
        calls(&after, "stable") - calls(&before, "stable"),
        10,
        "{before} {after}"
    );

    // A canary that faults too often is left alone, and its requests get the plugin itself.
    for _ in 0..5 {
        let request = with_header(get("app.example", "/"), "x-tester", "yes");
        let reply = client
            .call(with_header(request, MISBEHAVE, "request:panic"))
            .await?;
        assert_eq!(reply.backend(), "app", "{reply:?}");
    }
    let sick = told(node, "p").await?;
    assert_eq!(
        (&sick["canary"]["state"], &sick["stable"]["state"]),
        (&"quarantined".into(), &"ready".into())
    );
    let request = with_header(get("app.example", "/"), "x-tester", "yes");
    client.call(request).await?;
    let after = told(node, "p").await?;
    assert_eq!(calls(&after, "canary"), calls(&sick, "canary"));
    assert_eq!(calls(&after, "stable"), calls(&sick, "stable") + 1);
    let role = node
        .metric(
            "leeward_plugin_version_calls_total",
            &["plugin=\"p\"", "role=\"canary\"", "outcome=\"trap\""],
        )
        .await?;
    assert!((role - 5.0).abs() < 0.1, "{role}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_are_swapped_under_load_and_no_request_fails() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    let more = [r#"config: '{"request": {"set": {"x-by": "p"}}, "response": {"set": {"x-by": "p"}}}'"#];
    let limits = ["limits: {callTimeout: 2s}"];
    let both = service("app", &[(backend.address(), "a", "")], &[])
        + &route(
            "app",
            "app.example",
            "app",
            &["filters: [{plugin: p}, {plugin: q}]"],
        );
    let version_of = |n: u8| {
        let component = version(mesh.dir(), "header-rewrite", n)?;
        let module = version(mesh.dir(), "pw-headers", n)?;
        anyhow::Ok(
            plugin_of("p", "Filter", &component, "FailClosed", &more)
                + &plugin_of("q", "ProxyWasm", &module, "FailClosed", &limits),
        )
    };
    mesh.apply_with_plugins(&(both + &version_of(0)?)).await?;
    let node = mesh.node("a1")?;
    let (p, q) = (ready(node, "p").await?, ready(node, "q").await?);
    let loads = [Protocol::Http1, Protocol::Http2].map(|protocol| {
        Load::start(
            node.outbound,
            protocol,
            ("app.example", "/"),
            4,
            Duration::from_millis(2),
        )
    });
    let mut digests = vec![p["stable"]["sha256"].clone(), q["stable"]["sha256"].clone()];
    for n in 1..=4 {
        let sent: Vec<u64> = loads.iter().map(|load| load.tally().sent).collect();
        mesh.apply_with_plugins(&version_of(n)?).await?;
        eventually("the new versions", SOON, || async {
            for plugin in ["p", "q"] {
                let told = told(node, plugin).await?;
                ensure!(
                    told["state"] == "ready" && !digests.contains(&told["stable"]["sha256"]),
                    "{told}"
                );
            }
            Ok(())
        })
        .await?;
        for plugin in ["p", "q"] {
            digests.push(told(node, plugin).await?["stable"]["sha256"].clone());
        }
        eventually("load on them", SOON, || async {
            for (load, before) in loads.iter().zip(&sent) {
                ensure!(load.tally().sent > before + 50);
            }
            for plugin in ["p", "q"] {
                ensure!(told(node, plugin).await?["stable"]["calls"].as_u64() > Some(20));
            }
            Ok(())
        })
        .await?;
    }
    for load in loads {
        let tally = load.stop().await;
        assert!(tally.failed == 0 && tally.served > 200, "{tally:?}");
    }
    let seen = backend.take_seen();
    assert!(
        seen.iter().all(|seen| seen.headers["x-by"] == "p"),
        "a request went past the filter"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_version_that_traps_is_taken_back() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    // What the first does nothing with is nothing that the second can read.
    let more = [
        "config: 'nothing:x'",
        "quarantine: {faults: 5, window: 60s, duration: 3600s}",
    ];
    let of = |file: &str| plugin_of("p", "Filter", file, "FailClosed", &more);
    mesh.apply_with_plugins(&(app(&backend) + &of(&built("misbehave-filter"))))
        .await?;
    let node = mesh.node("a1")?;
    let good = ready(node, "p").await?["stable"]["sha256"].clone();
    let client = mesh.workload("a1", Protocol::Http1)?;
    assert_eq!(client.get("app.example", "/").await?.backend(), "app");

    mesh.apply_with_plugins(&of(&built("header-rewrite"))).await?;
    let bad = eventually("the new version", SOON, || async {
        let told = told(node, "p").await?;
        ensure!(
            told["state"] == "ready" && told["stable"]["sha256"] != good,
            "{told}"
        );
        Ok(told["stable"]["sha256"].clone())
    })
    .await?;
    for n in 0..5 {
        let reply = client.get("app.example", "/").await?;
        assert!(faulted(&reply), "{n}: {reply:?}");
    }
    // By itself, with the very next request.
    let reply = client.get("app.example", "/").await?;
    assert_eq!(reply.backend(), "app", "{reply:?}");
    let back = told(node, "p").await?;
    assert_eq!(back["stable"]["sha256"], good, "{back}");
    assert_eq!(
        (&back["returned_from"], &back["returns"]),
        (&bad, &1.into()),
        "{back}"
    );
    let events = node
        .metric(
            "leeward_plugin_events_total",
            &["plugin=\"p\"", "event=\"returned\""],
        )
        .await?;
    assert!((events - 1.0).abs() < 0.1);

    // Named again it is not tried again; another one is.
    let again = ["config: 'nothing:y'", more[1]];
    mesh.apply_with_plugins(&plugin_of(
        "p",
        "Filter",
        &built("header-rewrite"),
        "FailClosed",
        &again,
    ))
    .await?;
    ready(node, "p").await?;
    assert_eq!(client.get("app.example", "/").await?.backend(), "app");
    assert_eq!(told(node, "p").await?["stable"]["sha256"], good);
    let third = version(mesh.dir(), "misbehave-filter", 3)?;
    mesh.apply_with_plugins(&of(&third)).await?;
    eventually("the third version", SOON, || async {
        let told = told(node, "p").await?;
        ensure!(
            told["returned_from"].is_null() && told["stable"]["sha256"] != good,
            "{told}"
        );
        Ok(())
    })
    .await?;
    assert_eq!(client.get("app.example", "/").await?.backend(), "app");
    Ok(())
}

/// Files below a directory that have some size.
fn files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else if path.metadata()?.len() > 10_000 {
            found.push(path);
        }
    }
    Ok(found)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_compiled_once_is_used_again_unless_it_is_broken() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backend = Backend::start("app")?;
    let both = service("app", &[(backend.address(), "a", "")], &[])
        + &route(
            "app",
            "app.example",
            "app",
            &["filters: [{plugin: p}, {plugin: q}]"],
        )
        + &plugin_of("p", "Filter", &built("misbehave-filter"), "FailClosed", &[])
        + &plugin_of("q", "ProxyWasm", &built("pw-headers"), "FailClosed", &[]);
    mesh.apply_with_plugins(&both).await?;
    let before = |node: &Node| {
        let admin = node.admin;
        async move {
            let node_says = async |plugin: &str| {
                let admin = Client::new(admin, Protocol::Http1);
                let all: Vec<Value> = serde_json::from_slice(&admin.get("admin", "/plugins").await?.body)?;
                let told = all.into_iter().find(|told| told["plugin"] == plugin);
                let told = told.with_context(|| format!("nothing is said of {plugin}"))?;
                ensure!(told["state"] == "ready", "{told}");
                anyhow::Ok(told["stable"]["compiled_before"].clone())
            };
            eventually("plugins to be ready", SOON, || async {
                Ok([node_says("p").await?, node_says("q").await?])
            })
            .await
        }
    };
    assert_eq!(before(mesh.node("a1")?).await?, [false, false]);
    let compiled = mesh.data("a1").join("compiled");
    assert_eq!(files(&compiled)?.len(), 2, "{:?}", files(&compiled)?);

    let second = mesh.start_again("a1").await?;
    assert_eq!(before(&second).await?, [true, true]);
    drop(second);

    // A byte that is another one, and a file that ends too early.
    let broken = files(&compiled)?;
    let mut bytes = std::fs::read(&broken[0])?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(&broken[0], bytes)?;
    let bytes = std::fs::read(&broken[1])?;
    std::fs::write(&broken[1], &bytes[..bytes.len() / 2])?;
    let third = mesh.start_again("a1").await?;
    assert_eq!(before(&third).await?, [false, false], "compiled anew");
    let client = Client::new(third.outbound, Protocol::Http2);
    assert_eq!(client.get("app.example", "/").await?.backend(), "app");
    drop(third);
    let fourth = mesh.start_again("a1").await?;
    assert_eq!(before(&fourth).await?, [true, true], "and kept");
    Ok(())
}

/// A file that gives nothing until somebody writes to it: a plugin that takes as long to be had as the test wants.
fn slow_file(dir: &Path) -> anyhow::Result<PathBuf> {
    let path = dir.join("slow.wasm");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode)?;
    Ok(path)
}

/// A mesh whose proxy is down, with a policy that the next one begins with.
async fn about_to_start(on_fault: &str) -> anyhow::Result<(Mesh, Backend, PathBuf)> {
    // Without what the first one has kept, which the next one would serve at once.
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--state", "off")
        .start()
        .await?;
    let backend = Backend::start("app")?;
    mesh.node_mut("a1")?.process.kill9()?;
    let slow = slow_file(mesh.dir())?;
    let plugin = plugin_of("p", "Filter", &slow.display().to_string(), on_fault, &[]);
    mesh.apply_only(&(app(&backend) + &plugin)).await?;
    Ok((mesh, backend, slow))
}

/// What a proxy that starts says of whether it is ready.
async fn readiness(admin: &Client) -> anyhow::Result<(u16, String)> {
    let reply = admin.get("admin", "/readyz").await?;
    Ok((reply.status.as_u16(), reply.text()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_starts_is_ready_when_its_filters_are() -> anyhow::Result<()> {
    let (mesh, _backend, slow) = about_to_start("FailClosed").await?;
    let admin_at = Port::reserve()?;
    let admin = admin_at.address().to_string();
    let flags = [("--admin", admin.as_str())];
    let starting = mesh.start_again_with("a1", &flags);
    let watching = async {
        let admin = Client::new(admin_at.address(), Protocol::Http1);
        eventually("it to wait for the plugin", SOON, || async {
            let (status, text) = readiness(&admin).await?;
            ensure!(
                status == 503 && text.contains("not loaded yet"),
                "{status} {text}"
            );
            Ok(())
        })
        .await?;
        // Who reads has the pipe open; whoever reads again finds the file itself.
        let (pipe, file) = (slow.with_extension("pipe"), slow.with_extension("file"));
        std::fs::hard_link(&slow, &pipe)?;
        std::fs::copy(built("misbehave-filter"), &file)?;
        std::fs::rename(&file, &slow)?;
        let written = std::fs::read(&slow)?;
        tokio::task::spawn_blocking(move || std::fs::write(pipe, written)).await??;
        anyhow::Ok(())
    };
    let (node, watched) = tokio::join!(starting, watching);
    watched?;
    let node = node?;
    // From the first moment on nothing is refused.
    let client = Client::new(node.outbound, Protocol::Http1);
    let reply = client.get("app.example", "/").await?;
    assert_eq!(reply.backend(), "app", "{reply:?} {}", told(&node, "p").await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_starts_waits_for_no_plugin_forever() -> anyhow::Result<()> {
    let (mesh, _backend, _slow) = about_to_start("FailClosed").await?;
    let began = tokio::time::Instant::now();
    let node = mesh.start_again("a1").await?;
    assert!(began.elapsed() > Duration::from_secs(10), "it didn't wait");
    let client = Client::new(node.outbound, Protocol::Http1);
    let reply = client.get("app.example", "/").await?;
    assert!(faulted(&reply), "{reply:?}");
    let log = node.process.log()?;
    assert!(
        log.contains("ready without plugins that aren't loaded yet"),
        "{log}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_starts_waits_for_no_plugin_that_requests_can_do_without() -> anyhow::Result<()> {
    let (mesh, _backend, _slow) = about_to_start("FailOpen").await?;
    let node = mesh.start_again("a1").await?;
    assert_eq!(
        told(&node, "p").await?["state"],
        "compiling",
        "it is on its way yet"
    );
    let client = Client::new(node.outbound, Protocol::Http1);
    assert_eq!(client.get("app.example", "/").await?.backend(), "app");
    Ok(())
}

//! Proxies on their own: the control plane is gone for good, or one of several is, and proxies die and start meanwhile.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::{Context, ensure};
use http::Method;
use leeward_identity::{Identity, channel};
use leeward_proto::{manifest, v1};
use leeward_testkit::policy::{fallback, flags, route, service};
use leeward_testkit::{
    Backend, Client, Load, Mesh, Node, Port, Process, Protocol, binaries, bytes_body, eventually, leeward,
    request,
};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use v1::policy_service_client::PolicyServiceClient;

const SOON: Duration = Duration::from_secs(60);
const ROUTES: usize = 1000;

fn state(mesh: &Mesh) -> PathBuf {
    mesh.data("a1").join("state")
}

async fn one_node() -> anyhow::Result<Mesh> {
    Mesh::builder().node("a", "a1").start().await
}

/// A thousand routes; one more that a plugin from the control plane's store answers for; and a flag.
async fn policy(mesh: &Mesh, backend: &Backend) -> anyhow::Result<String> {
    let file = binaries::workspace().join("plugins/built/static-json.wasm");
    let pushed = leeward(mesh, &["plugin", "push", &file.display().to_string()]).await?;
    ensure!(pushed.status.success(), "{pushed:?}");
    let said = String::from_utf8(pushed.stdout)?;
    let is_hash = |word: &&str| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit());
    let words = said.split(|c: char| !c.is_ascii_alphanumeric());
    let sha256 = words.clone().find(is_hash).context("no hash")?;
    let mut policy = format!(
        "---\napiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {{name: json}}\nspec: {{kind: Fallback, source: {{sha256: {sha256}}}, onFault: NextRung}}\n"
    );
    policy += &fallback(
        "ladder",
        &[
            "plugin: {plugin: json, config: '{\"body\": \"from the plugin\"}'}",
            "static: {status: 200, body: 'the last rung'}",
        ],
        &["on: [NoEndpoint]"],
    );
    policy += &service("nobody", &[], &[]);
    policy += &route("nobody", "nobody.example", "nobody", &["fallback: ladder"]);
    policy += &flags(
        "f",
        "{colour: {state: ENABLED, variants: {red: '#f00', blue: '#00f'}, defaultVariant: blue}}",
    );
    policy += &service("app", &[(backend.address(), "a", "")], &[]);
    for i in 0..ROUTES {
        policy += &route(&format!("r{i}"), &format!("h{i}.example"), "app", &[]);
    }
    Ok(policy)
}

async fn kept(mesh: &Mesh, revision: u64) -> anyhow::Result<()> {
    // What is written last names the revision; the files are small enough to be looked through.
    eventually("the state to be on disk", SOON, || async {
        let node = mesh.node("a1")?;
        ensure!(node.metric("leeward_state_writes_total", &["written"]).await? > 0.0);
        let said = node.config().await?;
        ensure!(said["generation"].as_u64() >= Some(revision), "{said}");
        Ok(())
    })
    .await?;
    // At most one more write is on its way, a second after the last.
    let writes = mesh
        .node("a1")?
        .metric("leeward_state_writes_total", &["written"])
        .await?;
    let quiet = eventually("another write", Duration::from_millis(1500), || async {
        let now = mesh
            .node("a1")?
            .metric("leeward_state_writes_total", &["written"])
            .await?;
        ensure!(now > writes);
        Ok(())
    });
    drop(quiet.await);
    Ok(())
}

/// Everything of [`policy`] is served.
async fn serves_all(node: &Node) -> anyhow::Result<()> {
    let client = Client::new(node.outbound, Protocol::Http1);
    for i in 0..ROUTES {
        let reply = client.get(&format!("h{i}.example"), "/").await?;
        ensure!(
            reply.status == 200 && reply.backend() == "app",
            "h{i}.example: {reply:?}"
        );
    }
    rung(node, "\"from the plugin\"").await?;
    let asked = request(
        Method::POST,
        "ofrep",
        "/ofrep/v1/evaluate/flags/colour",
        bytes_body("{\"context\": {}}"),
    );
    let flag: Value =
        serde_json::from_slice(&Client::new(node.ofrep, Protocol::Http1).call(asked).await?.body)?;
    ensure!(flag["variant"] == "blue", "{flag}");
    Ok(())
}

async fn rung(node: &Node, wanted: &str) -> anyhow::Result<()> {
    let client = Client::new(node.outbound, Protocol::Http1);
    eventually("the rung", SOON, || async {
        let reply = client.get("nobody.example", "/").await?;
        ensure!(reply.text() == wanted, "{reply:?}");
        Ok(())
    })
    .await
}

async fn ready(node: &Node) -> anyhow::Result<String> {
    let reply = Client::new(node.admin, Protocol::Http1)
        .get("admin", "/readyz")
        .await?;
    ensure!(reply.status == 200, "{reply:?}");
    Ok(reply.text())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_starts_with_no_control_plane_serves_what_it_served() -> anyhow::Result<()> {
    let mut mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let policy = policy(&mesh, &backend).await?;
    let revision = mesh.apply_with_plugins(&policy).await?;
    kept(&mesh, revision).await?;
    serves_all(mesh.node("a1")?).await?;
    assert_eq!(ready(mesh.node("a1")?).await?, "ok\n");
    assert!(
        mesh.node("a1")?
            .metric("leeward_config_source", &["control"])
            .await?
            > 0.5
    );

    // In the middle of a change, both die: the control plane for good.
    mesh.apply_only(&policy.replace("h999.example", "other.example"))
        .await?;
    mesh.kill_control()?;
    mesh.node_mut("a1")?.process.kill9()?;
    for round in 0..2 {
        let began = tokio::time::Instant::now();
        let line = mesh.proxy_command("a1", &[])?;
        let process = Process::start("a1", Path::new(&line[0]), &line[1..], mesh.dir()).await?;
        let client = Client::new(process.address("outbound")?, Protocol::Http1);
        let first = eventually("the first answer", SOON, || async {
            let reply = client.get("h0.example", "/").await?;
            ensure!(reply.status == 200, "{reply:?}");
            Ok(began.elapsed())
        });
        let first = first.await?;
        let size = std::fs::metadata(state(&mesh).join("policy"))?.len();
        println!(
            "cold start {round} with {ROUTES} routes ({size} bytes of state, debug build): first answer after {first:?}"
        );
        let node = mesh.node_mut("a1")?;
        (node.outbound, node.inbound) = (process.address("outbound")?, process.address("inbound")?);
        (node.admin, node.ofrep) = (process.address("admin")?, process.address("ofrep")?);
        node.process = process;
        let node = mesh.node("a1")?;
        node.wait_ready().await?;
        let said = ready(node).await?;
        assert!(
            said.starts_with("ok, stale: policy is from this proxy's disk"),
            "{said}"
        );
        assert!(node.metric("leeward_config_source", &["disk"]).await? > 0.5);
        assert!(node.metric("leeward_config_connected", &[]).await? < 0.5);
        // One of the two that were live.
        let client = Client::new(node.outbound, Protocol::Http1);
        let old = client.get("h999.example", "/").await?.status;
        let new = client.get("other.example", "/").await?.status;
        let (old, new) = (old.as_u16(), new.as_u16());
        assert!(
            (old, new) == (200, 404) || (old, new) == (404, 200),
            "{old} {new}"
        );
        if old == 200 {
            serves_all(node).await?;
        }
        rung(node, "\"from the plugin\"").await?;
        let said = node.config().await?;
        assert_eq!(
            (&said["source"], &said["connected"]),
            (&Value::from("disk"), &Value::from(false))
        );
        assert!(said["quarantined"].as_array().unwrap().is_empty(), "{said}");
        mesh.node_mut("a1")?.process.kill9()?;
    }

    // When it is back, everything goes on from there.
    mesh.start_control().await?;
    let again = mesh.start_again("a1").await?;
    *mesh.node_mut("a1")? = again;
    let newer = mesh.apply(&route("later", "later.example", "app", &[])).await?;
    assert!(newer > revision);
    let client = mesh.workload("a1", Protocol::Http1)?;
    assert_eq!(client.get("later.example", "/").await?.status, 200);
    assert_eq!(client.get("other.example", "/").await?.status, 200);
    let said = mesh.node("a1")?.config().await?;
    assert_eq!(
        (&said["source"], &said["orphans"]),
        (&Value::from("control"), &Value::from(0))
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_damaged_on_disk_costs_itself_and_nothing_else() -> anyhow::Result<()> {
    let mut mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let policy = policy(&mesh, &backend).await?;
    let revision = mesh.apply_with_plugins(&policy).await?;
    kept(&mesh, revision).await?;
    mesh.kill_control()?;
    mesh.node_mut("a1")?.process.kill9()?;

    // A byte of a record in the middle.
    let file = state(&mesh).join("policy");
    let mut bytes = std::fs::read(&file)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, &bytes)?;
    let mut again = mesh.start_again("a1").await?;
    let log = again.process.log()?;
    assert!(log.contains("policy.corrupt-1"), "{log}");
    assert!(again.metric("leeward_state_corrupt_total", &["policy"]).await? > 0.5);
    let said = again.config().await?;
    let lost = said["quarantined"].as_array().unwrap();
    assert_eq!(lost.len(), 1, "{said}");
    assert!(
        lost[0]["reason"].as_str().unwrap().contains("on disk is damaged"),
        "{said}"
    );
    let client = Client::new(again.outbound, Protocol::Http1);
    let mut served = 0;
    for i in 0..ROUTES {
        served += usize::from(client.get(&format!("h{i}.example"), "/").await?.status == 200);
    }
    assert_eq!(served, ROUTES - 1);
    rung(&again, "\"from the plugin\"").await?;
    again.process.kill9()?;

    // The plugin's module: the ladder goes on to its next rung, and the rest is as it was.
    for dir in ["plugins", "compiled"] {
        for entry in std::fs::read_dir(mesh.data("a1").join(dir))? {
            let path = entry?.path();
            if path.is_file() {
                let mut bytes = std::fs::read(&path)?;
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                std::fs::write(&path, &bytes)?;
            }
        }
    }
    // And what is nothing at all.
    std::fs::write(state(&mesh).join("levels"), "")?;
    let mut again = mesh.start_again("a1").await?;
    rung(&again, "the last rung").await?;
    let client = Client::new(again.outbound, Protocol::Http1);
    assert_eq!(client.get("h1.example", "/").await?.status, 200);
    assert!(again.metric("leeward_state_corrupt_total", &["levels"]).await? > 0.5);
    again.process.kill9()?;

    // Nothing left of it: it starts, and is not ready.
    std::fs::write(&file, "")?;
    let line = mesh.proxy_command("a1", &[])?;
    let mut process = Process::start("a1", Path::new(&line[0]), &line[1..], mesh.dir()).await?;
    let admin = Client::new(process.address("admin")?, Protocol::Http1);
    let reply = admin.get("admin", "/readyz").await?;
    assert_eq!(
        (reply.status.as_u16(), reply.text().as_str()),
        (503, "no policy yet\n")
    );
    process.kill9()?;

    // A control plane mends all of it.
    mesh.start_control().await?;
    let again = mesh.start_again("a1").await?;
    mesh.converge(revision).await?;
    serves_all(&again).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_time_a_proxy_starts_with_a_policy_that_was_live() -> anyhow::Result<()> {
    let mut mesh = one_node().await?;
    let (old, new) = (Backend::start("old")?, Backend::start("new")?);
    let services =
        service("old", &[(old.address(), "a", "")], &[]) + &service("new", &[(new.address(), "a", "")], &[]);
    // Both routes and a third resource change together, each time.
    let change = |round: u64| {
        let to = if round.is_multiple_of(2) { "old" } else { "new" };
        route("x", "x.example", to, &[])
            + &route("y", "y.example", to, &[])
            + &route("n", &format!("n{round}.example"), to, &[])
    };
    let mut latest = mesh.apply(&(services + &change(0))).await?;
    kept(&mesh, latest).await?;
    let nowhere = Port::reserve()?;
    let nowhere = nowhere.address().to_string();
    let (mut round, mut seen) = (0, std::collections::BTreeSet::new());
    for kill_after in [3, 40, 250, 700, 1100, 1600, 90, 1300] {
        let until = tokio::time::Instant::now() + Duration::from_millis(kill_after);
        while tokio::time::Instant::now() < until {
            round += 1;
            latest = mesh.apply_only(&change(round)).await?;
        }
        mesh.node_mut("a1")?.process.kill9()?;
        let mut alone = mesh.start_again_with("a1", &[("--control", &nowhere)]).await?;
        let client = Client::new(alone.outbound, Protocol::Http1);
        let (x, y) = (
            client.get("x.example", "/").await?,
            client.get("y.example", "/").await?,
        );
        assert_eq!(
            (x.status.as_u16(), x.backend()),
            (200, y.backend()),
            "half a change is live"
        );
        let said = alone.config().await?;
        assert!(said["quarantined"].as_array().unwrap().is_empty(), "{said}");
        let generation = said["generation"].as_u64().unwrap();
        assert!(generation <= latest, "{said}");
        seen.insert(generation);
        alone.process.kill9()?;
        let again = mesh.start_again("a1").await?;
        *mesh.node_mut("a1")? = again;
        mesh.converge(latest).await?;
    }
    println!("{round} changes, started with the generations {seen:?}");
    let aside = std::fs::read_dir(state(&mesh))?.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name().into_string().unwrap();
        name.contains("corrupt")
    });
    assert_eq!(aside.count(), 0, "being killed is no damage");
    Ok(())
}

/// Another control plane, with the same identity and a store of its own.
async fn another(mesh: &Mesh, name: &str, listen: SocketAddr, policy: &str) -> anyhow::Result<Process> {
    let mut line = mesh.control_command()?;
    let data = mesh.dir().join(name);
    std::fs::create_dir_all(&data)?;
    for (flag, value) in [
        ("--listen", listen.to_string()),
        ("--data", data.display().to_string()),
    ] {
        let at = line.iter().position(|arg| arg == flag).context("no such flag")?;
        line[at + 1] = value;
    }
    let process = Process::start(name, Path::new(&line[0]), &line[1..], mesh.dir()).await?;
    let user = Identity::load(mesh.identity("user"))?;
    let mut client = PolicyServiceClient::new(channel::connect_lazy(user, listen));
    let resources = manifest::parse("test", policy).map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    client
        .apply(v1::ApplyRequest {
            resources,
            dry_run: false,
            ..v1::ApplyRequest::default()
        })
        .await?;
    Ok(process)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_planes_are_killed_in_turn_and_no_request_fails() -> anyhow::Result<()> {
    let mut mesh = one_node().await?;
    let backend = Backend::start("app")?;
    let policy =
        service("app", &[(backend.address(), "a", "")], &[]) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    let zone = "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {}\n".to_owned();
    let ports = [Port::reserve()?, Port::reserve()?];
    let mut others = Vec::new();
    for (i, port) in ports.iter().enumerate() {
        others.push(
            another(
                &mesh,
                &format!("control-{i}"),
                port.address(),
                &(zone.clone() + &policy),
            )
            .await?,
        );
    }
    let all = [mesh.control_address(), ports[0].address(), ports[1].address()];
    let all = all.map(|address| address.to_string()).join(",");
    mesh.node_mut("a1")?.process.kill9()?;
    let flags = [("--control", all.as_str()), ("--control-order", "preferred")];
    let again = mesh.start_again_with("a1", &flags).await?;
    *mesh.node_mut("a1")? = again;
    let node = mesh.node("a1")?;
    let load = Load::start(
        node.outbound,
        Protocol::Http1,
        ("app.example", "/"),
        2,
        Duration::from_millis(5),
    );
    let connected = async |mesh: &Mesh, to: &str, before: &Value| {
        let node = mesh.node("a1")?;
        let served = load.tally().served;
        eventually(&format!("a stream from {to}"), SOON, || async {
            let said = node.config().await?;
            ensure!(said["connected"] == true && said["source"] == "control", "{said}");
            // A stream is there before its policy is.
            ensure!(said["store_id"] != before["store_id"], "{said}");
            ensure!(load.tally().served > served + 50);
            Ok(said)
        })
        .await
    };
    let first = connected(&mesh, "the first", &Value::Null).await?;
    // Killed: the next one has a store of its own, and the same in it.
    mesh.kill_control()?;
    let lost = "not connected to a control plane";
    let losses = |mesh: &Mesh| anyhow::Ok(mesh.node("a1")?.process.log()?.matches(lost).count());
    eventually("the loss", SOON, || async {
        ensure!(losses(&mesh)? > 0);
        Ok(())
    })
    .await?;
    let second = connected(&mesh, "the second", &first).await?;
    assert_eq!(second["orphans"], 0, "{second}");
    // Stopped in order: it says goodbye.
    let ended = others[0].term_and_wait(SOON).await?;
    assert!(ended.success(), "{ended}");
    eventually("the goodbye", SOON, || async {
        ensure!(
            mesh.node("a1")?
                .process
                .log()?
                .contains("the control plane is being stopped")
        );
        Ok(())
    })
    .await?;
    let third = connected(&mesh, "the third", &second).await?;
    // None is left; and then the first is there again.
    others[1].kill9()?;
    eventually("the loss", SOON, || async {
        let said = mesh.node("a1")?.config().await?;
        ensure!(said["connected"] == false, "{said}");
        Ok(())
    })
    .await?;
    assert!(ready(mesh.node("a1")?).await?.contains("stale"));
    mesh.start_control().await?;
    let back = connected(&mesh, "the first again", &third).await?;
    assert_eq!(first["store_id"], back["store_id"]);
    let tally = load.stop().await;
    assert_eq!(tally.failed, 0, "{tally:?}");
    println!("{} requests, none failed", tally.sent);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_needs_no_control_plane_to_take_over() -> anyhow::Result<()> {
    let mut mesh = Mesh::builder().node("a", "a1").handover().start().await?;
    let backend = Backend::start("app")?;
    let policy =
        service("app", &[(backend.address(), "a", "")], &[]) + &route("app", "app.example", "app", &[]);
    let revision = mesh.apply(&policy).await?;
    mesh.kill_control()?;
    let outbound = mesh.node("a1")?.outbound;
    let load = Load::start(
        outbound,
        Protocol::Http1,
        ("app.example", "/"),
        2,
        Duration::from_millis(5),
    );
    for _ in 0..2 {
        let new = mesh.start_again("a1").await?;
        let mut old = std::mem::replace(mesh.node_mut("a1")?, new);
        let ended = old.process.wait(SOON).await?;
        assert!(ended.success(), "{ended}");
        let said = eventually("the new process to answer", SOON, || async {
            let node = mesh.node("a1")?;
            let said = node.config().await?;
            ensure!(said["pid"] == node.process.id(), "{said}");
            Ok(said)
        });
        let said = said.await?;
        // Never older than what the old process had.
        assert_eq!(said["generation"].as_u64(), Some(revision));
        assert_eq!(said["source"], "disk");
    }
    load.answered_by("app", 50, SOON).await?;
    let tally = load.stop().await;
    assert_eq!(tally.failed, 0, "{tally:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_can_be_switched_off() -> anyhow::Result<()> {
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--state", "off")
        .start()
        .await?;
    mesh.kill_control()?;
    mesh.node_mut("a1")?.process.kill9()?;
    assert!(!state(&mesh).exists());
    let line = mesh.proxy_command("a1", &[])?;
    let mut process = Process::start("a1", Path::new(&line[0]), &line[1..], mesh.dir()).await?;
    let admin = Client::new(process.address("admin")?, Protocol::Http1);
    assert_eq!(admin.get("admin", "/readyz").await?.text(), "no policy yet\n");
    process.kill9()?;
    Ok(())
}

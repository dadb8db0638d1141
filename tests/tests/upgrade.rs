//! A proxy is replaced by another process: nothing is lost when that goes well, and nothing when it doesn't.

use anyhow::{Context, bail, ensure};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Backend, Client, Load, Mesh, Node, Port, Process, Protocol, eventually};
use rustix::process::Signal;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);
const HOST: (&str, &str) = ("app.example", "/");

/// Two zones whose proxies hand over, with a backend behind the second.
async fn mesh(workers: &str) -> anyhow::Result<(Mesh, Backend)> {
    let mesh = Mesh::builder()
        .node("a", "a1")
        .node("b", "b1")
        .flag("--workers", workers)
        .flag("--drain-timeout", "10s")
        .handover()
        .start()
        .await?;
    let backend = Backend::start("app")?;
    let policy =
        service("app", &[(backend.address(), "b", "b1")], &[]) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    Ok((mesh, backend))
}

/// Clients of both protocols, with connections that they keep and with one for each request.
struct Loads(Vec<Load>);

impl Loads {
    fn start(to: SocketAddr) -> Self {
        let pause = Duration::from_millis(10);
        let of = |protocol| {
            [
                Load::start(to, protocol, HOST, 3, pause),
                Load::start_fresh(to, protocol, HOST, 3, pause),
            ]
        };
        Self(
            [of(Protocol::Http1), of(Protocol::Http2)]
                .into_iter()
                .flatten()
                .collect(),
        )
    }

    /// Waits until each of the loads has had `more` further answers.
    async fn go_on(&self, more: u64) -> anyhow::Result<()> {
        let before: Vec<u64> = self.0.iter().map(|load| load.tally().sent).collect();
        eventually("answers", SOON, || async {
            for (load, before) in self.0.iter().zip(&before) {
                let sent = load.tally().sent;
                ensure!(sent >= before + more, "{} of {more}", sent - before);
            }
            Ok(())
        })
        .await
    }

    async fn none_failed(self) -> anyhow::Result<()> {
        for load in self.0 {
            let tally = load.stop().await;
            ensure!(tally.failed == 0 && tally.served > 0, "{tally:?}");
        }
        Ok(())
    }
}

/// The process that answers at an admin port.
async fn answering(node: &Node) -> anyhow::Result<u64> {
    let config = node.config().await?;
    config
        .get("pid")
        .and_then(serde_json::Value::as_u64)
        .context("/config names no process")
}

/// Replaces a node's proxy, waits until the old one has ended in order, and checks that the new one answers.
async fn replace(mesh: &mut Mesh, name: &str, flags: &[(&str, &str)]) -> anyhow::Result<()> {
    let new = mesh.start_again_with(name, flags).await?;
    let node = mesh.node_mut(name)?;
    ensure!(
        (new.outbound, new.inbound, new.admin, new.ofrep)
            == (node.outbound, node.inbound, node.admin, node.ofrep),
        "the same addresses"
    );
    let mut old = std::mem::replace(node, new);
    let ended = old.process.wait(SOON).await?;
    ensure!(ended.success(), "{ended}");
    let node = mesh.node(name)?;
    ensure!(answering(node).await? == u64::from(node.process.id()));
    Ok(())
}

/// Starts a proxy that can't be ready, since there is no control plane where it looks for one, and nothing on disk.
async fn start_unready(mesh: &Mesh, node: &str, limit: &str) -> anyhow::Result<(Process, Port)> {
    let nowhere = Port::reserve()?;
    let control = nowhere.address().to_string();
    let flags = [
        ("--control", control.as_str()),
        ("--state", "off"),
        ("--handover-timeout", limit),
    ];
    let successor = start_successor(mesh, node, "unready", &flags).await?;
    Ok((successor, nowhere))
}

/// Starts a proxy and waits until it has the sockets of the one before.
async fn start_successor(
    mesh: &Mesh,
    node: &str,
    name: &str,
    flags: &[(&str, &str)],
) -> anyhow::Result<Process> {
    let line = mesh.proxy_command(node, flags)?;
    let (program, args) = line.split_first().context("no program")?;
    let mut command = Command::new(program);
    command.args(args);
    let mut successor = Process::spawn(name, command, mesh.dir())?;
    let log = mesh.dir().join(format!("{name}.log"));
    eventually("the sockets to be handed over", SOON, || {
        let text = std::fs::read_to_string(&log);
        async move {
            ensure!(text?.contains("sockets received"));
            Ok(())
        }
    })
    .await
    .with_context(|| successor.log().unwrap_or_default())
    .inspect_err(|_| drop(successor.kill9()))?;
    Ok(successor)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_is_replaced_again_and_again_under_load_without_a_failed_request() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh("2").await?;
    let loads = Loads::start(mesh.node("a1")?.outbound);
    loads.go_on(50).await?;
    for _ in 0..3 {
        replace(&mut mesh, "a1", &[]).await?;
        loads.go_on(50).await?;
    }
    // And the one that the other zone's requests come in by.
    replace(&mut mesh, "b1", &[]).await?;
    loads.go_on(50).await?;
    loads.none_failed().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_may_have_more_workers_or_fewer() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh("2").await?;
    let loads = Loads::start(mesh.node("a1")?.outbound);
    loads.go_on(20).await?;
    for workers in ["1", "3", "2"] {
        replace(&mut mesh, "a1", &[("--workers", workers)]).await?;
        loads.go_on(50).await?;
    }
    loads.none_failed().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_is_never_ready_takes_nothing() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh("2").await?;
    let loads = Loads::start(mesh.node("a1")?.outbound);
    // It loses patience itself.
    let (mut unready, _nowhere) = start_unready(&mesh, "a1", "1s").await?;
    let ended = unready.wait(SOON).await?;
    assert!(!ended.success(), "{ended}");
    let log = unready.log()?;
    assert!(log.contains("not ready after 1s: no policy yet"), "{log}");
    // What it is given is no policy.
    let bad = mesh.dir().join("policy");
    std::fs::create_dir(&bad)?;
    std::fs::write(bad.join("bad.yaml"), "kind: Nonsense\n")?;
    let line = mesh.proxy_command("a1", &[])?;
    let control = line
        .iter()
        .position(|arg| arg == "--control")
        .context("no --control")?;
    let mut command = Command::new(&line[0]);
    command.args(&line[1..control]).args(&line[control + 2..]);
    command.arg("--policy").arg(&bad);
    let ended = Process::spawn("bad", command, mesh.dir())?.wait(SOON).await?;
    assert!(!ended.success(), "{ended}");
    // The old one loses patience.
    replace(&mut mesh, "a1", &[("--handover-timeout", "1s")]).await?;
    let (mut unready, _nowhere) = start_unready(&mesh, "a1", "60s").await?;
    let ended = unready.wait(SOON).await?;
    assert!(!ended.success(), "{ended}");
    let log = unready.log()?;
    assert!(
        log.contains("the old process refuses: it was not ready within 1s"),
        "{log}"
    );
    loads.go_on(50).await?;
    let node = mesh.node("a1")?;
    assert_eq!(answering(node).await?, u64::from(node.process.id()));
    loads.none_failed().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_is_killed_on_its_way_takes_nothing() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh("2").await?;
    let loads = Loads::start(mesh.node("a1")?.outbound);
    for end in [Signal::KILL, Signal::TERM] {
        let (mut unready, _nowhere) = start_unready(&mesh, "a1", "60s").await?;
        loads.go_on(20).await?;
        unready.signal(end);
        unready.wait(SOON).await?;
        loads.go_on(50).await?;
    }
    let node = mesh.node("a1")?;
    assert_eq!(answering(node).await?, u64::from(node.process.id()));
    // The next one is none the worse for it.
    replace(&mut mesh, "a1", &[]).await?;
    loads.go_on(50).await?;
    loads.none_failed().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_successor_at_a_time() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh("1").await?;
    let loads = Loads::start(mesh.node("a1")?.outbound);
    let (mut first, _nowhere) = start_unready(&mesh, "a1", "60s").await?;
    let second = match mesh.start_again("a1").await {
        Ok(_) => bail!("two successors at once"),
        Err(error) => format!("{error:#}"),
    };
    assert!(
        second.contains("another process is taking over already"),
        "{second}"
    );
    first.kill9()?;
    replace(&mut mesh, "a1", &[]).await?;
    loads.go_on(20).await?;
    loads.none_failed().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_serves_at_once_when_the_old_process_dies_first() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh("2").await?;
    let (successor, _nowhere) = start_unready(&mesh, "a1", "60s").await?;
    mesh.node_mut("a1")?.process.kill9()?;
    let node = mesh.node("a1")?;
    eventually("the successor to answer", SOON, || async {
        let pid = answering(node).await?;
        ensure!(pid == u64::from(successor.id()));
        Ok(())
    })
    .await?;
    let ready = Client::new(node.admin, Protocol::Http1)
        .get("admin", "/readyz")
        .await?;
    assert_eq!(
        (ready.status.as_u16(), ready.text().as_str()),
        (503, "no policy yet\n")
    );
    // And is itself taken over from.
    replace_dead(&mut mesh, "a1").await?;
    let reply = Client::new(mesh.node("a1")?.outbound, Protocol::Http1)
        .get("app.example", "/")
        .await?;
    assert_eq!(reply.status, 200);
    Ok(())
}

/// Starts a proxy in place of one that is not the mesh's own.
async fn replace_dead(mesh: &mut Mesh, name: &str) -> anyhow::Result<()> {
    let new = mesh.start_again(name).await?;
    *mesh.node_mut(name)? = new;
    let node = mesh.node(name)?;
    eventually("the new process to answer", SOON, || async {
        ensure!(answering(node).await? == u64::from(node.process.id()));
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_told_to_end_waits_for_the_successor_on_its_way() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh("2").await?;
    let loads = Loads::start(mesh.node("a1")?.outbound);
    loads.go_on(20).await?;
    mesh.kill_control()?;
    let successor = start_successor(&mesh, "a1", "successor", &[]).await?;
    mesh.node("a1")?.process.signal(Signal::TERM);
    loads.go_on(20).await?;
    mesh.start_control().await?;
    let ended = mesh.node_mut("a1")?.process.wait(SOON).await?;
    assert!(ended.success(), "{ended}");
    loads.go_on(50).await?;
    let node = mesh.node("a1")?;
    assert_eq!(answering(node).await?, u64::from(successor.id()));
    loads.none_failed().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_end_without_a_successor_the_next_process_begins_anew() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh("1").await?;
    for end in [Signal::TERM, Signal::KILL] {
        let node = mesh.node_mut("a1")?;
        node.process.signal(end);
        node.process.wait(SOON).await?;
        let new = mesh.start_again("a1").await?;
        *mesh.node_mut("a1")? = new;
        let client = Client::new(mesh.node("a1")?.outbound, Protocol::Http1);
        assert_eq!(client.get("app.example", "/").await?.status, 200);
    }
    Ok(())
}

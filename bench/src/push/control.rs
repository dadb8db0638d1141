//! The control plane under test: a process of its own, its API, and what it costs.

use anyhow::{Context, ensure};
use leeward_identity::authority::Authority;
use leeward_identity::{Identity, SpiffeId, channel};
use leeward_proto::v1;
use leeward_testkit::{Port, Process};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::Channel;
use v1::policy_service_client::PolicyServiceClient;
use v1::rollout_service_client::RolloutServiceClient;

/// The trust domain.
pub(super) const DOMAIN: &str = "bench.test";
/// How long certificates of the control plane and its user last.
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// Resources in one call, at most; and bytes of them, about.
const BATCH: (usize, usize) = (10_000, 8 << 20);
/// Largest answer that is taken, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// How often the metrics are asked for something that is waited for.
const EVERY: Duration = Duration::from_millis(20);

/// What it takes to start one.
pub(super) struct Place<'a> {
    pub(super) program: &'a Path,
    pub(super) dir: &'a Path,
    pub(super) authority: &'a Authority,
}

/// A control plane that runs.
pub(super) struct Control {
    program: PathBuf,
    dir: PathBuf,
    name: String,
    /// Stays the same when it is started again.
    port: Port,
    process: Process,
    client: PolicyServiceClient<Channel>,
    rollouts: RolloutServiceClient<Channel>,
}

impl Control {
    /// Starts one on a new store.
    pub(super) async fn start(place: &Place<'_>, name: &str) -> anyhow::Result<Self> {
        let dir = place.dir.join(name);
        std::fs::create_dir_all(&dir)?;
        let issue = |id: &SpiffeId, name: &str| place.authority.issue(id, LIFE, &dir.join(name));
        issue(&SpiffeId::control(DOMAIN)?, "identity")?;
        issue(&SpiffeId::user(DOMAIN, "bench")?, "user")?;
        let port = Port::reserve()?;
        let process = start(place.program, &dir, name, port.address()).await?;
        let user = Identity::load(dir.join("user"))?;
        let channel = channel::connect_lazy(user, port.address());
        let rollouts = RolloutServiceClient::new(channel.clone());
        let client = PolicyServiceClient::new(channel)
            .max_decoding_message_size(MAX_ANSWER)
            .max_encoding_message_size(MAX_ANSWER);
        Ok(Self {
            program: place.program.to_owned(),
            dir,
            name: name.to_owned(),
            port,
            process,
            client,
            rollouts,
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// `kill -9`, and the next one on the same store and port.
    pub(super) async fn restart(&mut self) -> anyhow::Result<()> {
        self.process.kill9()?;
        self.process = start(&self.program, &self.dir, &self.name, self.port.address()).await?;
        Ok(())
    }

    /// Applies resources, in as many calls as they need. Returns the revision of the last.
    pub(super) async fn apply(&mut self, resources: Vec<v1::Resource>) -> anyhow::Result<u64> {
        let (mut batch, mut bytes, mut revision) = (Vec::new(), 0, 0);
        let mut rest = resources.into_iter().peekable();
        while let Some(resource) = rest.next() {
            bytes += prost::Message::encoded_len(&resource);
            batch.push(resource);
            if batch.len() == BATCH.0 || bytes > BATCH.1 || rest.peek().is_none() {
                let request = v1::ApplyRequest {
                    resources: std::mem::take(&mut batch),
                    ..v1::ApplyRequest::default()
                };
                revision = self.client.apply(request).await?.into_inner().revision;
                bytes = 0;
            }
        }
        Ok(revision)
    }

    /// Takes policy back to what it was at a revision. Returns the revision that does it.
    pub(super) async fn roll_back(&mut self, revision: u64) -> anyhow::Result<u64> {
        let request = v1::RollbackRequest {
            revision,
            ..v1::RollbackRequest::default()
        };
        Ok(self.rollouts.rollback(request).await?.into_inner().revision)
    }

    /// Every proxy's status; and the bytes of the answer.
    pub(super) async fn proxies(&mut self) -> anyhow::Result<(usize, usize)> {
        let answer = self.client.list_proxies(v1::ListProxiesRequest {}).await?;
        let answer = answer.into_inner();
        Ok((answer.proxies.len(), prost::Message::encoded_len(&answer)))
    }

    /// CPU time that it has used, of all of its threads, those that have ended included.
    pub(super) fn cpu(&self) -> anyhow::Result<Duration> {
        cpu(self.process.id())
    }

    /// Bytes in memory.
    pub(super) fn resident(&self) -> anyhow::Result<u64> {
        Ok(self.process.memory()?.resident)
    }

    /// The most that it was since the last call.
    pub(super) fn peak(&self) -> anyhow::Result<u64> {
        let peak = self.process.memory()?.peak;
        self.process.reset_peak()?;
        Ok(peak)
    }

    /// Waits until it knows that so many proxies are connected, and every one of them has acknowledged a generation.
    pub(super) async fn knows(
        &self,
        proxies: usize,
        generation: u64,
        within: Duration,
    ) -> anyhow::Result<()> {
        let until = tokio::time::Instant::now() + within;
        loop {
            let (connected, lowest) = self.standing().await?;
            if connected >= proxies as u64 && lowest >= generation {
                return Ok(());
            }
            ensure!(
                tokio::time::Instant::now() < until,
                "after {within:?} the control plane knows of {connected} proxies, with {lowest} at least"
            );
            tokio::time::sleep(EVERY).await;
        }
    }

    /// Proxies connected, and the lowest generation of them.
    pub(super) async fn standing(&self) -> anyhow::Result<(u64, u64)> {
        let mut stream = TcpStream::connect(self.process.address("admin")?).await?;
        let request = b"GET /metrics HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let value = line.and_then(|line| line.trim().parse().ok());
            value.with_context(|| format!("no {name} in the metrics"))
        };
        Ok((
            value("leeward_control_proxies_connected ")?,
            value("leeward_control_lowest_generation ")?,
        ))
    }
}

async fn start(program: &Path, dir: &Path, name: &str, listen: SocketAddr) -> anyhow::Result<Process> {
    let path = |name: &str| dir.join(name).display().to_string();
    let args = [
        "--listen",
        &listen.to_string(),
        "--admin",
        "127.0.0.1:0",
        "--data",
        &path("store"),
        "--identity",
        &path("identity"),
        // A line for each proxy that comes and goes is what the default writes, and part of what it costs.
        "--log",
        "info",
    ];
    Process::start(name, program, args, dir).await
}

/// The unit of time in /proc/PID/stat: USER_HZ is 100 on every architecture that this runs on.
const TICK: Duration = Duration::from_millis(10);

/// CPU time of a process, as /proc/PID/stat counts it.
pub(super) fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may have spaces; what follows its closing parenthesis doesn't: proc_pid_stat(5), fields 14 and 15.
    let mut fields = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(11);
    let mut ticks = || fields.next().and_then(|n| n.parse::<u64>().ok());
    let (user, system) = ticks().zip(ticks()).context("no CPU time in /proc/PID/stat")?;
    Ok(TICK * u32::try_from(user + system)?)
}

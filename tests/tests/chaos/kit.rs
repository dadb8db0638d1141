//! A mesh with three control planes on three members of etcd, processes that share a job by a lease, and traffic.

use anyhow::{Context, ensure};
use leeward_identity::authority::Authority;
use leeward_identity::{Identity, SpiffeId, channel};
use leeward_proto::v1;
use leeward_testkit::{EtcdCluster, EtcdVersion, Node, Port, Process, TempDir, binaries, eventually};
use rustix::process::Signal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tonic::transport::Channel;
use v1::policy_service_client::PolicyServiceClient;

const DOMAIN: &str = "leeward.test";
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// The users who write, read and watch.
pub const USERS: [&str; 8] = ["w0", "w1", "w2", "w3", "r0", "r1", "watch", "test"];
/// Processes that share a job.
const HOLDERS: usize = 3;
/// Longer than anything here takes on a busy machine.
pub const SOON: Duration = Duration::from_secs(90);

/// Everything that runs.
pub struct World {
    // Dropped in this order.
    pub proxies: Vec<Node>,
    pub controls: Vec<Control>,
    pub holders: Vec<Process>,
    pub etcd: EtcdCluster,
    dir: TempDir,
}

/// One control plane.
pub struct Control {
    pub process: Option<Process>,
    port: Port,
}

impl Control {
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }
}

impl World {
    /// Starts it; `None` where there is no etcd of this version.
    pub async fn start(version: EtcdVersion) -> anyhow::Result<Option<Self>> {
        let Some(etcd) = EtcdCluster::start_with_ways(version, 3).await? else {
            return Ok(None);
        };
        let dir = TempDir::new()?;
        let root = Authority::create(&dir.path().join("ca"), DOMAIN)?;
        root.intermediate(10 * LIFE, &dir.path().join("authority"))?;
        let mut world = Self {
            proxies: Vec::new(),
            controls: Vec::new(),
            holders: Vec::new(),
            etcd,
            dir,
        };
        for user in USERS {
            root.issue(&SpiffeId::user(DOMAIN, user)?, LIFE, &world.identity(user))?;
        }
        for place in 0..3 {
            let port = Port::reserve()?;
            world.controls.push(Control { process: None, port });
            world.start_control(place).await?;
        }
        for (zone, name) in [("a", "a1"), ("b", "b1")] {
            root.issue(&SpiffeId::proxy(DOMAIN, zone, name)?, LIFE, &world.identity(name))?;
            let node = world.start_proxy(zone, name).await?;
            world.proxies.push(node);
        }
        for place in 0..HOLDERS {
            let holder = world.spawn_holder(place)?;
            world.holders.push(holder);
        }
        Ok(Some(world))
    }

    fn identity(&self, name: &str) -> PathBuf {
        self.dir.path().join("identity").join(name)
    }

    /// Starts a control plane, at the same address as before.
    pub async fn start_control(&mut self, place: usize) -> anyhow::Result<()> {
        let name = format!("control{place}");
        let text = |path: PathBuf| path.display().to_string();
        let listen = self.controls[place].address().to_string();
        let args = [
            ["--listen".to_owned(), listen],
            ["--data".to_owned(), text(self.dir.path().join(&name))],
            ["--identity".to_owned(), text(self.identity(&name))],
            ["--admin".to_owned(), "127.0.0.1:0".to_owned()],
            ["--ca".to_owned(), text(self.dir.path().join("authority"))],
            // The shortest there is, so that certificates are renewed meanwhile.
            ["--certificate-life".to_owned(), "5m".to_owned()],
            ["--store".to_owned(), "etcd".to_owned()],
            ["--etcd-endpoints".to_owned(), self.etcd.endpoints().join(",")],
        ];
        let program = binaries::path("leeward-control")?;
        let started = Process::start(&name, &program, args.concat(), self.dir.path()).await?;
        self.controls[place].process = Some(started);
        Ok(())
    }

    async fn start_proxy(&self, zone: &str, name: &str) -> anyhow::Result<Node> {
        let controls: Vec<String> = self
            .controls
            .iter()
            .map(|control| control.address().to_string())
            .collect();
        let text = |path: PathBuf| path.display().to_string();
        let args = [
            ["--zone".to_owned(), zone.to_owned()],
            ["--name".to_owned(), name.to_owned()],
            ["--identity".to_owned(), text(self.identity(name))],
            ["--control".to_owned(), controls.join(",")],
            ["--data".to_owned(), text(self.dir.path().join(name))],
            ["--outbound".to_owned(), "127.0.0.1:0".to_owned()],
            ["--inbound".to_owned(), "127.0.0.1:0".to_owned()],
            ["--admin".to_owned(), "127.0.0.1:0".to_owned()],
            ["--ofrep".to_owned(), "127.0.0.1:0".to_owned()],
        ];
        let program = binaries::path("leeward-proxy")?;
        let process = Process::start(name, &program, args.concat(), self.dir.path()).await?;
        Ok(Node {
            name: name.to_owned(),
            zone: zone.to_owned(),
            outbound: process.address("outbound")?,
            inbound: process.address("inbound")?,
            admin: process.address("admin")?,
            ofrep: process.address("ofrep")?,
            process,
        })
    }

    /// Starts one that shares a job.
    pub fn spawn_holder(&self, place: usize) -> anyhow::Result<Process> {
        crate::lease::spawn(&format!("holder{place}"), &self.etcd, self.dir.path(), true)
    }

    /// The log of a holder; it goes on where the process was started again.
    pub fn holder_log(&self, place: usize) -> anyhow::Result<String> {
        self.holders[place].log()
    }

    /// Clients of all control planes' APIs, as a user.
    pub fn apis(&self, user: &str) -> anyhow::Result<Vec<PolicyServiceClient<Channel>>> {
        let identity = Identity::load(self.identity(user))?;
        let to = |control: &Control| {
            let channel = channel::connect_lazy(identity.clone(), control.address());
            PolicyServiceClient::new(channel)
        };
        Ok(self.controls.iter().map(to).collect())
    }

    pub fn signal_control(&self, place: usize, signal: Signal) -> anyhow::Result<()> {
        let process = self.controls[place].process.as_ref();
        process.context("it doesn't run")?.signal(signal);
        Ok(())
    }

    /// Waits until every proxy is connected somewhere, and runs a revision.
    pub async fn converged(&self, revision: u64) -> anyhow::Result<()> {
        let apis = self.apis("test")?;
        eventually("every proxy to run the last revision", SOON, || async {
            let mut known = Vec::new();
            for mut api in apis.clone() {
                known.extend(
                    api.list_proxies(v1::ListProxiesRequest {})
                        .await?
                        .into_inner()
                        .proxies,
                );
            }
            for node in &self.proxies {
                let runs =
                    |p: &v1::ProxyStatus| p.name == node.name && p.connected && p.generation >= revision;
                ensure!(
                    known.iter().any(runs),
                    "{} doesn't run {revision}: {known:?}",
                    node.name
                );
            }
            Ok(())
        })
        .await
    }
}

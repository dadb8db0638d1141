//! A mesh of real processes: a control plane, and proxies in zones.

use crate::binaries;
use crate::client::{Client, Protocol};
use crate::dir::TempDir;
use crate::hosts::{Hosts, Place};
use crate::port::Port;
use crate::process::Process;
use crate::wait::eventually;
use anyhow::{Context, bail, ensure};
use leeward_identity::authority::Authority;
use leeward_identity::{Identity, SpiffeId, channel};
use leeward_proto::{manifest, v1};
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::Channel;
use v1::policy_service_client::PolicyServiceClient;

/// The trust domain of every mesh here.
pub(crate) const DOMAIN: &str = "leeward.test";
/// How long the certificates of a mesh last.
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// Longest wait for proxies to run what was applied.
const CONVERGE: Duration = Duration::from_secs(30);
/// Longest wait for proxies to load their plugins; a compiler that is a debug build is slow.
const COMPILE: Duration = Duration::from_secs(120);

/// What a mesh is to be made of.
#[derive(Debug, Default)]
pub struct MeshBuilder {
    nodes: Vec<(String, String)>,
    proxy: ProxyFlags,
    authority: bool,
    hosts: Option<Arc<Hosts>>,
}

/// How every proxy of a mesh is started.
#[derive(Clone, Debug, Default)]
struct ProxyFlags {
    flags: Vec<(String, String)>,
    /// With a handover socket, in the mesh's directory.
    handover: bool,
    /// Without a directory for data.
    no_data: bool,
}

/// A running mesh. Its processes end when it is dropped.
#[derive(Debug)]
pub struct Mesh {
    // Fields are dropped in this order: the proxies before what they talk to, the files last.
    nodes: Vec<Node>,
    control: Option<Process>,
    control_port: Port,
    client: PolicyServiceClient<Channel>,
    proxy: ProxyFlags,
    hosts: Option<Arc<Hosts>>,
    dir: TempDir,
}

/// One node's proxy.
#[derive(Debug)]
pub struct Node {
    /// The proxy.
    pub process: Process,
    /// Its name.
    pub name: String,
    /// Its zone.
    pub zone: String,
    /// Where the node's workloads send their requests.
    pub outbound: SocketAddr,
    /// Where other proxies send theirs.
    pub inbound: SocketAddr,
    /// Where its health and metrics are.
    pub admin: SocketAddr,
    /// Where the node's workloads ask for feature flags.
    pub ofrep: SocketAddr,
}

impl MeshBuilder {
    /// With a node: a proxy of this name in this zone.
    #[must_use]
    pub fn node(mut self, zone: &str, name: &str) -> Self {
        self.nodes.push((zone.to_owned(), name.to_owned()));
        self
    }

    /// With a flag and its value for every proxy.
    #[must_use]
    pub fn flag(mut self, flag: &str, value: &str) -> Self {
        self.proxy.set(flag, value);
        self
    }

    /// With proxies that hand over to a successor, which [`Mesh::start_again`] starts.
    #[must_use]
    pub fn handover(mut self) -> Self {
        self.proxy.handover = true;
        self
    }

    /// With a control plane that is the certificate authority, by an intermediate of the root that the first certificates
    /// are from.
    #[must_use]
    pub fn authority(mut self) -> Self {
        self.authority = true;
        self
    }

    /// With each node on the host of its zone, and the control plane on its own. The test must be there, too: see
    /// [`crate::on_hosts`].
    #[must_use]
    pub fn on(mut self, hosts: &Arc<Hosts>) -> Self {
        self.hosts = Some(Arc::clone(hosts));
        self
    }

    /// With proxies that have no directory for data.
    #[must_use]
    pub fn without_data(mut self) -> Self {
        self.proxy.no_data = true;
        self
    }

    /// Starts everything, and waits until every proxy runs a policy that knows the zones.
    ///
    /// # Errors
    ///
    /// If a process doesn't come up; with the end of its log.
    pub async fn start(self) -> anyhow::Result<Mesh> {
        let dir = TempDir::new()?;
        let authority = Authority::create(&dir.path().join("ca"), DOMAIN)?;
        let issue = |id: SpiffeId, name: &str| authority.issue(&id, LIFE, &identity_dir(dir.path(), name));
        issue(SpiffeId::control(DOMAIN)?, "control")?;
        issue(SpiffeId::user(DOMAIN, "test")?, "user")?;
        for (zone, name) in &self.nodes {
            issue(SpiffeId::proxy(DOMAIN, zone, name)?, name)?;
        }
        if self.authority {
            authority.intermediate(10 * LIFE, &authority_dir(dir.path()))?;
        }
        let (hosts, proxy) = (self.hosts, self.proxy);
        let place = hosts.as_ref().map_or(Place::HERE, |hosts| hosts.control());
        let control_port = Port::reserve_at(place.between.into())?;
        let control = start_control(dir.path(), control_port.address()).await?;
        let user = Identity::load(identity_dir(dir.path(), "user"))?;
        let client = PolicyServiceClient::new(channel::connect_lazy(user, control_port.address()));
        let starting = self.nodes.iter().map(async |(zone, name)| {
            let place = place_of(hosts.as_deref(), zone)?;
            start_proxy(dir.path(), control_port.address(), (zone, name), &proxy, place).await
        });
        let nodes = futures_util::future::try_join_all(starting).await?;
        let mesh = Mesh {
            nodes,
            control: Some(control),
            control_port,
            client,
            proxy,
            hosts,
            dir,
        };
        mesh.apply(&mesh.zones()).await?;
        for node in &mesh.nodes {
            node.wait_ready().await?;
        }
        Ok(mesh)
    }
}

impl Mesh {
    /// An empty one.
    pub fn builder() -> MeshBuilder {
        MeshBuilder::default()
    }

    /// Two zones, `a` and `b`, with one proxy each, `a1` and `b1`.
    ///
    /// # Errors
    ///
    /// What [`MeshBuilder::start`] says.
    pub async fn two_zones() -> anyhow::Result<Self> {
        Self::builder().node("a", "a1").node("b", "b1").start().await
    }

    /// A node by the name of its proxy.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn node(&self, name: &str) -> anyhow::Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .with_context(|| format!("there is no node {name}"))
    }

    /// The same, to be changed.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn node_mut(&mut self, name: &str) -> anyhow::Result<&mut Node> {
        let found = self.nodes.iter_mut().find(|node| node.name == name);
        found.with_context(|| format!("there is no node {name}"))
    }

    /// A client that is a workload of a node.
    ///
    /// # Errors
    ///
    /// If there is no such node.
    pub fn workload(&self, node: &str, protocol: Protocol) -> anyhow::Result<Client> {
        Ok(Client::new(self.node(node)?.outbound, protocol))
    }

    /// The policy API, as the user `test`.
    pub fn api(&self) -> PolicyServiceClient<Channel> {
        self.client.clone()
    }

    /// Applies manifests, and waits until every connected proxy runs them. Returns the revision.
    ///
    /// # Errors
    ///
    /// If they are refused, or don't arrive.
    pub async fn apply(&self, manifests: &str) -> anyhow::Result<u64> {
        let revision = self.apply_only(manifests).await?;
        self.converge(revision).await?;
        Ok(revision)
    }

    /// The same, and waits until every proxy has loaded its plugins, which takes longer than a change of policy does.
    ///
    /// # Errors
    ///
    /// If they are refused, or don't arrive, or a plugin can't be loaded.
    pub async fn apply_with_plugins(&self, manifests: &str) -> anyhow::Result<u64> {
        let revision = self.apply(manifests).await?;
        for node in &self.nodes {
            node.wait_plugins().await?;
        }
        Ok(revision)
    }

    /// Applies manifests. Returns the revision.
    ///
    /// # Errors
    ///
    /// If they are refused.
    pub async fn apply_only(&self, manifests: &str) -> anyhow::Result<u64> {
        let resources = match manifest::parse("test", manifests) {
            Ok(resources) => resources,
            Err(errors) => bail!("{}", errors.iter().map(|e| format!("{e}\n")).collect::<String>()),
        };
        let request = v1::ApplyRequest {
            resources,
            dry_run: false,
            ..v1::ApplyRequest::default()
        };
        Ok(self
            .api()
            .apply(request)
            .await
            .context("apply")?
            .into_inner()
            .revision)
    }

    /// Deletes a resource, and waits until every connected proxy has let go of it.
    ///
    /// # Errors
    ///
    /// If it is refused, or doesn't arrive.
    pub async fn delete(&self, kind: v1::Kind, name: &str) -> anyhow::Result<u64> {
        let r#ref = v1::ResourceRef {
            kind: kind.into(),
            name: name.to_owned(),
        };
        let request = v1::DeleteRequest {
            r#ref: Some(r#ref),
            revision: 0,
            ..v1::DeleteRequest::default()
        };
        let revision = self
            .api()
            .delete(request)
            .await
            .context("delete")?
            .into_inner()
            .revision;
        self.converge(revision).await?;
        Ok(revision)
    }

    /// A resource as the control plane has it.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub async fn get(&self, kind: v1::Kind, name: &str) -> anyhow::Result<v1::Resource> {
        let r#ref = v1::ResourceRef {
            kind: kind.into(),
            name: name.to_owned(),
        };
        Ok(self
            .api()
            .get(v1::GetRequest { r#ref: Some(r#ref) })
            .await
            .context("get")?
            .into_inner())
    }

    /// What the control plane knows of the proxies.
    ///
    /// # Errors
    ///
    /// If it doesn't say.
    pub async fn proxies(&self) -> anyhow::Result<v1::ListProxiesResponse> {
        Ok(self
            .api()
            .list_proxies(v1::ListProxiesRequest {})
            .await
            .context("list proxies")?
            .into_inner())
    }

    /// Waits until every node's proxy is connected and has acknowledged `revision`.
    ///
    /// # Errors
    ///
    /// If one doesn't in time.
    pub async fn converge(&self, revision: u64) -> anyhow::Result<()> {
        let wait = eventually("every proxy to run the policy", CONVERGE, || async {
            let known = self.proxies().await?;
            for node in &self.nodes {
                let proxy = known
                    .proxies
                    .iter()
                    .find(|p| p.name == node.name && p.zone == node.zone);
                let proxy = proxy.with_context(|| format!("{} has never connected", node.name))?;
                ensure!(proxy.connected, "{} is not connected", node.name);
                ensure!(
                    proxy.generation >= revision,
                    "{} runs {}, not yet {revision}",
                    node.name,
                    proxy.generation
                );
            }
            Ok(())
        });
        wait.await
    }

    /// `kill -9` for the control plane.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn kill_control(&mut self) -> anyhow::Result<()> {
        self.control.take().context("there is no control plane")?.kill9()
    }

    /// Starts the control plane again, at the same address and with the same data.
    ///
    /// # Errors
    ///
    /// If it doesn't come up.
    pub async fn start_control(&mut self) -> anyhow::Result<()> {
        self.control = Some(start_control(self.dir.path(), self.control_port.address()).await?);
        Ok(())
    }

    /// Starts another proxy of a node, beside or after the first, and returns it.
    ///
    /// # Errors
    ///
    /// If it doesn't come up.
    pub async fn start_again(&self, node: &str) -> anyhow::Result<Node> {
        self.start_again_with(node, &[]).await
    }

    /// The same, with flags and their values in place of those of the mesh.
    ///
    /// # Errors
    ///
    /// If it doesn't come up.
    pub async fn start_again_with(&self, node: &str, flags: &[(&str, &str)]) -> anyhow::Result<Node> {
        let node = self.node(node)?;
        let control = self.control_port.address();
        let proxy = self.proxy.with(flags);
        let who = (&*node.zone, &*node.name);
        let place = place_of(self.hosts.as_deref(), &node.zone)?;
        let again = start_proxy(self.dir.path(), control, who, &proxy, place).await?;
        again.wait_ready().await?;
        Ok(again)
    }

    /// The command line of another proxy of a node, with flags and their values in place of those of the mesh.
    ///
    /// # Errors
    ///
    /// If there is no such node, or no program.
    pub fn proxy_command(&self, node: &str, flags: &[(&str, &str)]) -> anyhow::Result<Vec<String>> {
        let node = self.node(node)?;
        let program = binaries::path("leeward-proxy")?;
        let control = self.control_port.address();
        let place = place_of(self.hosts.as_deref(), &node.zone)?;
        let (who, proxy) = ((&*node.zone, &*node.name), self.proxy.with(flags));
        let args = proxy_args(self.dir.path(), control, who, &proxy, &place);
        let (program, args) = place.command(program, args);
        Ok([vec![program.display().to_string()], args].concat())
    }

    /// The command line of the control plane, at its address and with its data.
    ///
    /// # Errors
    ///
    /// If there is no program.
    pub fn control_command(&self) -> anyhow::Result<Vec<String>> {
        let program = binaries::path("leeward-control")?;
        let args = control_args(self.dir.path(), self.control_port.address())?;
        Ok([vec![program.display().to_string()], args].concat())
    }

    /// The directory of this mesh, for files that go with it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The directory of an identity: a proxy's name, `control` or `user`.
    pub fn identity(&self, name: &str) -> PathBuf {
        identity_dir(self.dir.path(), name)
    }

    /// The directory that a node's proxy has for its data, unless a flag says otherwise.
    pub fn data(&self, node: &str) -> PathBuf {
        data_dir(self.dir.path(), node)
    }

    /// The root that the first certificates are from.
    ///
    /// # Errors
    ///
    /// If it can't be opened.
    pub fn root(&self) -> anyhow::Result<Authority> {
        Ok(Authority::open(&self.dir.path().join("ca"))?)
    }

    /// The directory of the control plane's authority.
    pub fn authority(&self) -> PathBuf {
        authority_dir(self.dir.path())
    }

    /// What the control plane has logged.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn control_log(&self) -> anyhow::Result<String> {
        self.control.as_ref().context("there is no control plane")?.log()
    }

    /// Where the control plane is.
    pub fn control_address(&self) -> SocketAddr {
        self.control_port.address()
    }

    fn zones(&self) -> String {
        let mut zones: Vec<&str> = self.nodes.iter().map(|node| node.zone.as_str()).collect();
        zones.sort_unstable();
        zones.dedup();
        let mut text = String::new();
        for zone in zones {
            let proxies: Vec<_> = self
                .nodes
                .iter()
                .filter(|node| node.zone == zone)
                .map(|node| format!("{{name: {}, address: \"{}\"}}", node.name, node.inbound))
                .collect();
            let proxies = proxies.join(", ");
            // A String takes whatever is written to it.
            let _ = write!(
                text,
                "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {zone}}}\nspec: {{proxies: [{proxies}]}}\n"
            );
        }
        text
    }
}

impl Node {
    /// Waits until the proxy says that it is ready.
    ///
    /// # Errors
    ///
    /// If it doesn't in time.
    pub async fn wait_ready(&self) -> anyhow::Result<()> {
        let client = Client::new(self.admin, Protocol::Http1);
        let what = format!("{} to be ready", self.name);
        let ready = eventually(&what, CONVERGE, || async {
            let reply = client.get("admin", "/readyz").await?;
            ensure!(
                reply.status == 200,
                "/readyz says {} {}",
                reply.status,
                reply.text()
            );
            Ok(())
        });
        ready.await
    }

    /// Waits until the proxy has loaded all of its plugins.
    ///
    /// # Errors
    ///
    /// If it doesn't in time.
    pub async fn wait_plugins(&self) -> anyhow::Result<()> {
        let what = format!("{} to have its plugins", self.name);
        let loaded = eventually(&what, COMPILE, || async {
            let all = self.plugins().await?;
            let late = all
                .iter()
                .find(|plugin| plugin.get("state").is_none_or(|state| state != "ready"));
            ensure!(late.is_none(), "{late:?}");
            Ok(())
        });
        loaded.await
    }

    /// What the proxy says of its plugins.
    ///
    /// # Errors
    ///
    /// If it doesn't.
    pub async fn plugins(&self) -> anyhow::Result<Vec<serde_json::Value>> {
        Ok(serde_json::from_value(self.says("/plugins").await?)?)
    }

    /// What the proxy says of itself: its process, its policy, its identity.
    ///
    /// # Errors
    ///
    /// If it doesn't.
    pub async fn config(&self) -> anyhow::Result<serde_json::Value> {
        self.says("/config").await
    }

    async fn says(&self, path: &str) -> anyhow::Result<serde_json::Value> {
        let admin = Client::new(self.admin, Protocol::Http1);
        Ok(serde_json::from_slice(&admin.get("admin", path).await?.body)?)
    }

    /// The proxy's metrics, in Prometheus' text format.
    ///
    /// # Errors
    ///
    /// If they can't be had.
    pub async fn metrics(&self) -> anyhow::Result<String> {
        let reply = Client::new(self.admin, Protocol::Http1)
            .get("admin", "/metrics")
            .await?;
        ensure!(reply.status == 200, "/metrics says {}", reply.status);
        Ok(reply.text())
    }

    /// The sum of a metric over all series that have all of these labels, such as `outcome="served"`.
    ///
    /// # Errors
    ///
    /// If the metrics can't be had or read.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> anyhow::Result<f64> {
        let text = self.metrics().await?;
        let mut sum = 0.0;
        for line in text.lines() {
            let Some(rest) = line.strip_prefix(name) else {
                continue;
            };
            if rest.starts_with(['{', ' ']) && labels.iter().all(|label| rest.contains(label)) {
                let value = rest.rsplit(' ').next().unwrap_or_default();
                sum += value
                    .parse::<f64>()
                    .with_context(|| format!("can't read {line:?}"))?;
            }
        }
        Ok(sum)
    }
}

/// Where the proxies of a zone are.
fn place_of(hosts: Option<&Hosts>, zone: &str) -> anyhow::Result<Place> {
    hosts.map_or(Ok(Place::HERE), |hosts| hosts.zone(zone))
}

async fn start_control(dir: &Path, listen: SocketAddr) -> anyhow::Result<Process> {
    let program = binaries::path("leeward-control")?;
    Process::start("control", &program, control_args(dir, listen)?, dir).await
}

fn control_args(dir: &Path, listen: SocketAddr) -> anyhow::Result<Vec<String>> {
    let data = dir.join("data");
    std::fs::create_dir_all(&data)?;
    let text = |path: PathBuf| path.display().to_string();
    let args = [
        ["--listen".to_owned(), listen.to_string()],
        ["--data".to_owned(), text(data)],
        ["--identity".to_owned(), text(identity_dir(dir, "control"))],
        ["--admin".to_owned(), "127.0.0.1:0".to_owned()],
    ];
    let mut args = args.concat();
    let authority = authority_dir(dir);
    if authority.exists() {
        args.extend(["--ca".to_owned(), text(authority)]);
        // The shortest that there is, so that changes are soon everywhere.
        args.extend(["--certificate-life".to_owned(), "5m".to_owned()]);
    }
    Ok(args)
}

async fn start_proxy(
    dir: &Path,
    control: SocketAddr,
    (zone, name): (&str, &str),
    proxy: &ProxyFlags,
    place: Place,
) -> anyhow::Result<Node> {
    let args = proxy_args(dir, control, (zone, name), proxy, &place);
    let (program, args) = place.command(binaries::path("leeward-proxy")?, args);
    let process = Process::start(name, &program, args, dir).await?;
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

fn proxy_args(
    dir: &Path,
    control: SocketAddr,
    (zone, name): (&str, &str),
    proxy: &ProxyFlags,
    place: &Place,
) -> Vec<String> {
    let text = |path: PathBuf| path.display().to_string();
    let (within, between) = (format!("{}:0", place.within), format!("{}:0", place.between));
    let mut flags = ProxyFlags::default();
    for (flag, value) in [
        ("--zone", zone),
        ("--name", name),
        ("--identity", &text(identity_dir(dir, name))),
        ("--control", &control.to_string()),
        ("--outbound", &within),
        ("--inbound", &between),
        ("--admin", &within),
        ("--ofrep", &within),
    ] {
        flags.set(flag, value);
    }
    if !proxy.no_data {
        flags.set("--data", &text(data_dir(dir, name)));
    }
    if proxy.handover {
        flags.set("--handover", &text(dir.join(format!("{name}.handover"))));
    }
    for (flag, value) in &proxy.flags {
        flags.set(flag, value);
    }
    flags
        .flags
        .into_iter()
        .flat_map(|(flag, value)| [flag, value])
        .collect()
}

impl ProxyFlags {
    fn set(&mut self, flag: &str, value: &str) {
        self.flags.retain(|(set, _)| set != flag);
        self.flags.push((flag.to_owned(), value.to_owned()));
    }

    fn with(&self, flags: &[(&str, &str)]) -> Self {
        let mut with = self.clone();
        for (flag, value) in flags {
            with.set(flag, value);
        }
        with
    }
}

fn data_dir(dir: &Path, name: &str) -> PathBuf {
    dir.join("proxies").join(name)
}

fn authority_dir(dir: &Path) -> PathBuf {
    dir.join("authority")
}

fn identity_dir(dir: &Path, name: &str) -> PathBuf {
    dir.join("identity").join(name)
}

//! The demo's processes: a control plane, two proxies, two shops.

use crate::Connection;
use crate::api::client;
use anyhow::Context;
use leeward_identity::SpiffeId;
use leeward_identity::authority::Authority;
use leeward_proto::{manifest, v1};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

/// The zones.
pub(super) const ZONES: [&str; 2] = ["a", "b"];
/// The services of the shop, and the zones that they are in: payment has one book, so there is one of it.
const INSTANCES: [(&str, &str); 9] = [
    ("frontend", "a"),
    ("frontend", "b"),
    ("catalog", "a"),
    ("catalog", "b"),
    ("recommendations", "a"),
    ("recommendations", "b"),
    ("checkout", "a"),
    ("checkout", "b"),
    ("payment", "a"),
];
/// The policy, with places for addresses.
const POLICY: &str = include_str!("../../../../examples/shop/policy/shop.yaml");
/// The plugin that stands in for recommendations.
const PLUGIN: &[u8] = include_bytes!("../../../../plugins/built/recommendations-fallback.wasm");
/// The trust domain.
const DOMAIN: &str = "demo.leeward.local";
/// How long a process may take to listen, or a proxy to be ready.
pub(super) const START: Duration = Duration::from_secs(20);
/// How long processes may take to end.
const END: Duration = Duration::from_secs(4);
/// How long certificates last: a demo that is kept may be kept for a day.
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// How often something that is awaited is looked for.
const LOOK: Duration = Duration::from_millis(10);

/// The processes, and where they are reached.
pub(crate) struct Mesh {
    dir: PathBuf,
    programs: PathBuf,
    children: BTreeMap<String, Child>,
    addresses: BTreeMap<String, SocketAddr>,
}

impl Mesh {
    /// Finds the programs and makes a directory, identities included.
    pub(crate) fn prepare() -> anyhow::Result<Self> {
        let programs = std::env::current_exe()?
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default();
        for program in ["leeward-control", "leeward-proxy", "leeward-shop"] {
            let path = programs.join(program);
            anyhow::ensure!(
                path.exists(),
                "{} is not there: run `cargo build --release` first",
                path.display()
            );
        }
        let dir = std::env::temp_dir().join(format!("leeward-demo-{}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| format!("can't make {}", dir.display()))?;
        let authority = Authority::create(&dir.join("authority"), DOMAIN)?;
        authority.issue(&SpiffeId::control(DOMAIN)?, LIFE, &dir.join("control"))?;
        authority.issue(&SpiffeId::user(DOMAIN, "demo")?, LIFE, &dir.join("user"))?;
        for zone in ZONES {
            let id = SpiffeId::proxy(DOMAIN, zone, &format!("proxy-{zone}"))?;
            authority.issue(&id, LIFE, &dir.join(format!("proxy-{zone}")))?;
        }
        std::fs::write(dir.join("popular.wasm"), PLUGIN)?;
        Ok(Self {
            dir,
            programs,
            children: BTreeMap::new(),
            addresses: BTreeMap::new(),
        })
    }

    /// Starts everything, applies the policy, and waits until every proxy runs it.
    pub(crate) async fn start(&mut self) -> anyhow::Result<()> {
        self.spawn_control("127.0.0.1:0").await?;
        let control = self.address("control", "listen")?;
        for zone in ZONES {
            let name = format!("proxy-{zone}");
            let identity = self.dir.join(&name);
            let mut command = self.program("leeward-proxy");
            command
                .args(["--zone", zone, "--name", &name, "--workers", "1"])
                .args([
                    "--outbound",
                    "127.0.0.1:0",
                    "--inbound",
                    "127.0.0.1:0",
                    "--admin",
                    "127.0.0.1:0",
                    "--ofrep",
                    "127.0.0.1:0",
                ])
                .args(["--drain-timeout", "2s", "--control", &control.to_string()])
                .arg("--identity")
                .arg(identity)
                .arg("--data")
                .arg(self.dir.join(format!("{name}.data")));
            // A receiver of traces, should there be one.
            if let Some(endpoint) = std::env::var_os("OTEL_EXPORTER_OTLP_ENDPOINT") {
                command
                    .arg("--otlp-endpoint")
                    .arg(endpoint)
                    .args(["--trace-ratio", "1"]);
            }
            self.spawn(&name, command).await?;
        }
        for (service, zone) in INSTANCES {
            self.spawn_service(service, zone, "127.0.0.1:0").await?;
        }
        let revision = self.apply(&self.policy()?).await?;
        self.wait_for(revision).await
    }

    async fn spawn_control(&mut self, listen: &str) -> anyhow::Result<()> {
        let mut command = self.program("leeward-control");
        command
            .args(["--listen", listen])
            .arg("--data")
            .arg(self.dir.join("store"));
        command.arg("--identity").arg(self.dir.join("control"));
        self.spawn("control", command).await
    }

    async fn spawn_service(&mut self, service: &str, zone: &str, listen: &str) -> anyhow::Result<()> {
        let mesh = self.address(&format!("proxy-{zone}"), "outbound")?.to_string();
        let mut command = self.program("leeward-shop");
        command.args([service, "--zone", zone, "--listen", listen, "--mesh", &mesh]);
        if service == "payment" {
            command.arg("--book").arg(self.dir.join("book"));
        }
        self.spawn(&format!("{service}-{zone}"), command).await
    }

    fn program(&self, name: &str) -> Command {
        Command::new(self.programs.join(name))
    }

    /// Starts a process and waits until it listens.
    async fn spawn(&mut self, name: &str, mut command: Command) -> anyhow::Result<()> {
        let file = self.dir.join(format!("{name}.addresses"));
        // One of an earlier life would be taken for this one's.
        drop(std::fs::remove_file(&file));
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.join(format!("{name}.log")))?;
        let child = command
            .arg("--addresses-file")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("can't start {name}"))?;
        self.children.insert(name.to_owned(), child);
        let deadline = tokio::time::Instant::now() + START;
        loop {
            if let Ok(text) = std::fs::read_to_string(&file) {
                let found: BTreeMap<String, Value> = serde_json::from_str(&text)?;
                for (port, address) in found {
                    if let Some(address) = address.as_str() {
                        self.addresses.insert(format!("{name}/{port}"), address.parse()?);
                    }
                }
                return Ok(());
            }
            if let Some(status) = self
                .children
                .get_mut(name)
                .map(Child::try_wait)
                .transpose()?
                .flatten()
            {
                let log = std::fs::read_to_string(self.dir.join(format!("{name}.log"))).unwrap_or_default();
                anyhow::bail!(
                    "{name} ended at once ({status}): {}",
                    log.lines().last().unwrap_or_default()
                );
            }
            anyhow::ensure!(
                tokio::time::Instant::now() < deadline,
                "{name} does not listen after {START:?}"
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    pub(super) fn address(&self, name: &str, port: &str) -> anyhow::Result<SocketAddr> {
        let address = self.addresses.get(&format!("{name}/{port}")).copied();
        address.with_context(|| format!("{name} has no address {port}"))
    }

    /// Where users of each zone come in.
    pub(crate) fn outbound(&self) -> Vec<(&'static str, SocketAddr)> {
        let of = |zone: &'static str| Some((zone, self.address(&format!("proxy-{zone}"), "outbound").ok()?));
        ZONES.into_iter().filter_map(of).collect()
    }

    /// The shop's policy with this run's addresses.
    pub(super) fn policy(&self) -> anyhow::Result<String> {
        let mut text = POLICY.to_owned();
        for zone in ZONES {
            let inbound = self.address(&format!("proxy-{zone}"), "inbound")?;
            text = text.replace(
                &format!("${{INBOUND_{}}}", zone.to_uppercase()),
                &inbound.to_string(),
            );
        }
        for (service, zone) in INSTANCES {
            let place = format!("${{{}_{}}}", service.to_uppercase(), zone.to_uppercase());
            let listen = self.address(&format!("{service}-{zone}"), "listen")?;
            text = text.replace(&place, &listen.to_string());
        }
        let plugin = self.dir.join("popular.wasm").display().to_string();
        Ok(text.replace("${PLUGIN}", &plugin).replace(
            "${PLUGIN_SHA256}",
            include_str!(concat!(env!("OUT_DIR"), "/plugin.sha256")),
        ))
    }

    pub(super) fn connection(&self) -> anyhow::Result<Connection> {
        Ok(Connection {
            control: self.address("control", "listen")?,
            identity: self.dir.join("user"),
            token_file: None,
            bundle: None,
            breakglass: None,
        })
    }

    async fn apply(&self, yaml: &str) -> anyhow::Result<u64> {
        self.apply_all(parsed(yaml)?).await
    }

    pub(super) async fn apply_all(&self, resources: Vec<v1::Resource>) -> anyhow::Result<u64> {
        let mut client = client(&self.connection()?).map_err(plain)?;
        let request = v1::ApplyRequest {
            resources,
            dry_run: false,
            ..v1::ApplyRequest::default()
        };
        Ok(tokio::time::timeout(START, client.apply(request))
            .await??
            .into_inner()
            .revision)
    }

    /// Waits until every proxy has a revision live, with nothing quarantined.
    pub(super) async fn wait_for(&self, revision: u64) -> anyhow::Result<()> {
        let mut client = client(&self.connection()?).map_err(plain)?;
        let deadline = tokio::time::Instant::now() + START;
        loop {
            let proxies = client
                .list_proxies(v1::ListProxiesRequest {})
                .await?
                .into_inner()
                .proxies;
            let live =
                |p: &v1::ProxyStatus| p.connected && p.generation >= revision && p.quarantined.is_empty();
            if proxies.iter().filter(|p| live(p)).count() == ZONES.len() {
                return Ok(());
            }
            if let Some(refused) = proxies.iter().find_map(|p| p.quarantined.first()) {
                anyhow::bail!("a proxy refuses policy: {}", refused.reason);
            }
            anyhow::ensure!(
                tokio::time::Instant::now() < deadline,
                "not every proxy runs revision {revision} after {START:?}"
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Ends processes without warning.
    pub(crate) async fn kill(&mut self, names: &[&str]) {
        for name in names {
            if let Some(mut child) = self.children.remove(*name) {
                // One that has ended by itself is as dead.
                drop(child.kill().await);
            }
        }
    }

    /// Starts again what was killed, where it was.
    pub(crate) async fn restore(&mut self) -> anyhow::Result<()> {
        if !self.children.contains_key("control") {
            let listen = self.address("control", "listen")?.to_string();
            self.spawn_control(&listen).await?;
            // The proxies come back by themselves, each in its own time.
            self.wait_for(0).await?;
        }
        for (service, zone) in INSTANCES {
            let name = format!("{service}-{zone}");
            if !self.children.contains_key(&name) {
                let listen = self.address(&name, "listen")?.to_string();
                self.spawn_service(service, zone, &listen).await?;
            }
        }
        Ok(())
    }

    /// Applies a route for a host that had none, and waits until both proxies serve it.
    pub(crate) async fn change_a_route(&self, patience: Duration) -> anyhow::Result<Duration> {
        const ROUTE: &str = "
apiVersion: leeward.dev/v1
kind: Route
metadata: {name: hello}
spec:
  hostnames: [hello.shop]
  rules:
    - matches: [{path: {exact: /healthz}}]
      backendRefs: [{service: catalog}]
";
        let proxies: Vec<SocketAddr> = self.outbound().into_iter().map(|(_, address)| address).collect();
        for proxy in &proxies {
            let status = status_of(*proxy).await?;
            anyhow::ensure!(status == 404, "hello.shop answers {status} before it has a route");
        }
        let began = tokio::time::Instant::now();
        self.apply(ROUTE).await?;
        for proxy in proxies {
            while status_of(proxy).await? != 200 {
                anyhow::ensure!(
                    began.elapsed() < patience,
                    "the new route is not in effect after {patience:?}"
                );
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        Ok(began.elapsed())
    }

    /// Addresses and commands, for a mesh that is kept.
    pub(crate) fn how_to_reach(&self) -> String {
        let control = self
            .address("control", "listen")
            .map(|a| a.to_string())
            .unwrap_or_default();
        let admin = |zone| {
            self.address(&format!("proxy-{zone}"), "admin")
                .map(|a| a.to_string())
                .unwrap_or_default()
        };
        let mut lines = vec!["\nthe mesh stays up; interrupt to end it\n".to_owned()];
        for (zone, outbound) in self.outbound() {
            lines.push(format!(
                "  curl -H 'Host: frontend.shop' http://{outbound}/feed      # as a user in zone {zone}"
            ));
            lines.push(format!(
                "  curl http://{}/metrics                               # of the proxy of zone {zone}",
                admin(zone)
            ));
        }
        lines.push(format!(
            "\n  export LEEWARD_CONTROL={control} LEEWARD_IDENTITY={}",
            self.dir.join("user").display()
        ));
        let leeward = self.programs.join("leeward").display().to_string();
        lines.push(format!(
            "  {leeward} get all; {leeward} proxies; {leeward} get route catalog -o yaml"
        ));
        lines.push(format!(
            "  {leeward} degrade shop core-only --for 1m; {leeward} degrade list; {leeward} queue list --admin {}",
            admin("a")
        ));
        lines.join("\n")
    }

    /// Ends every process, in order where that is possible.
    pub(crate) async fn end(&mut self) {
        for child in self.children.values() {
            if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
                // One that has ended by itself needs no signal.
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        let deadline = tokio::time::Instant::now() + END;
        for (_, mut child) in std::mem::take(&mut self.children) {
            if tokio::time::timeout_at(deadline, child.wait()).await.is_err() {
                drop(child.kill().await);
            }
        }
    }

    /// Where the processes' logs are.
    pub(crate) fn logs(&self) -> &Path {
        &self.dir
    }

    /// Removes what the demo wrote.
    pub(crate) fn tidy(&self) {
        drop(std::fs::remove_dir_all(&self.dir));
    }
}

pub(super) fn parsed(yaml: &str) -> anyhow::Result<Vec<v1::Resource>> {
    manifest::parse("shop.yaml", yaml).map_err(|errors| {
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        anyhow::anyhow!(lines.join("\n"))
    })
}

fn plain(failure: crate::output::Failure) -> anyhow::Error {
    match failure {
        crate::output::Failure::BadInput(lines) => anyhow::anyhow!(lines),
        crate::output::Failure::Failed(error) => error,
        crate::output::Failure::Told
        | crate::output::Failure::Status(_)
        | crate::output::Failure::Untold(_) => {
            anyhow::anyhow!("it failed as was told")
        }
    }
}

/// The status that hello.shop answers at a proxy.
async fn status_of(proxy: SocketAddr) -> anyhow::Result<u16> {
    let mut stream = TcpStream::connect(proxy).await?;
    stream
        .write_all(b"GET /healthz HTTP/1.1\r\nhost: hello.shop\r\nconnection: close\r\n\r\n")
        .await?;
    let mut head = Vec::new();
    stream.take(4096).read_to_end(&mut head).await?;
    let text = String::from_utf8_lossy(&head);
    let status = text.split(' ').nth(1).and_then(|s| s.parse().ok());
    status.with_context(|| format!("not an HTTP answer: {text:?}"))
}

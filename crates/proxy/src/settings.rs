//! What an operator can say on the command line or in the environment; nothing else reads either.

use crate::side::Side;
use anyhow::Context;
use clap::{Parser, ValueEnum};
use leeward_config::{Control, ControlAddress, Order};
use leeward_http::{Port, Role};
use leeward_identity::{InvalidToken, JoinToken};
use leeward_policy::Name;
use leeward_telemetry::{Protocol, TraceSettings};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Leeward's proxy: takes a node's requests to where policy says, and says what became of them.
#[derive(Debug, Parser)]
#[command(name = "leeward-proxy", version)]
pub(crate) struct Settings {
    /// The zone that this node is in.
    #[arg(long, env = "LEEWARD_ZONE", value_parser = name)]
    pub(crate) zone: Name,
    /// The proxy's name, unique in its zone.
    #[arg(long, env = "LEEWARD_NAME", value_parser = name)]
    pub(crate) name: Name,
    /// The directory with cert.pem, key.pem and bundle.pem; or unix:PATH, the socket of an agent that has the SPIFFE
    /// Workload API, such as SPIRE's. Without it there is no inbound listener, no way to other proxies and no control
    /// plane. Where a control plane is an authority, certificates in a directory are renewed there.
    #[arg(long, env = "LEEWARD_IDENTITY", value_name = "DIR|unix:PATH", value_parser = identity)]
    pub(crate) identity: Option<IdentityAt>,
    /// A token of `leeward token create`, for the first certificate. Used only while there is none that is good in the
    /// directory of --identity.
    #[arg(long, env = "LEEWARD_JOIN_TOKEN", value_name = "TOKEN", hide_env_values = true, value_parser = token)]
    pub(crate) join_token: Option<JoinToken>,
    /// A file with that token.
    #[arg(
        long,
        env = "LEEWARD_JOIN_TOKEN_FILE",
        value_name = "FILE",
        conflicts_with = "join_token"
    )]
    pub(crate) join_token_file: Option<PathBuf>,
    /// A file of roots by which the control plane is known when this proxy joins, in place of the one that the token
    /// names.
    #[arg(long, env = "LEEWARD_TRUST_BUNDLE", value_name = "FILE")]
    pub(crate) trust_bundle: Option<PathBuf>,
    /// How long the first certificate may take to come, from a control plane or an agent. After that the proxy ends.
    #[arg(long, env = "LEEWARD_IDENTITY_TIMEOUT", default_value = "60s", value_name = "DURATION", value_parser = duration)]
    pub(crate) identity_timeout: Duration,
    /// Leave certificate and roots in the directory of --identity to whoever puts them there.
    #[arg(long, env = "LEEWARD_NO_RENEW")]
    pub(crate) no_renew: bool,
    /// Where processes of this node are given certificates of their own, by the SPIFFE Workload API: unix:PATH, a socket in a
    /// directory that not everybody may write. Policy's Workloads say which process gets which; a control plane that is an
    /// authority issues them. Nowhere if not given.
    #[arg(long, env = "LEEWARD_WORKLOAD_API", value_name = "unix:PATH", value_parser = socket)]
    pub(crate) workload_api: Option<PathBuf>,
    /// The control planes. A name is looked up again at each turn, and each of its addresses has turns.
    #[arg(
        long,
        env = "LEEWARD_CONTROL",
        value_name = "IP:PORT|NAME:PORT",
        value_delimiter = ','
    )]
    control: Vec<ControlAddress>,
    /// Which control plane is asked first: random, each proxy in an order of its own, so that they spread; or preferred, in
    /// the order in which they are named.
    #[arg(
        long,
        env = "LEEWARD_CONTROL_ORDER",
        default_value = "random",
        value_name = "ORDER"
    )]
    control_order: ControlOrder,
    /// Where to keep what this proxy runs, so that it starts as it was while no control plane answers; or off. It is made if it
    /// isn't there. If not given it is state in the directory of --data, or else in that of --identity; off where policy is
    /// from files.
    #[arg(long, env = "LEEWARD_STATE", value_name = "DIR|off", value_parser = state_at)]
    state: Option<StateAt>,
    /// Past which age policy is warned about that no control plane has said is the newest. It goes on to be used.
    #[arg(long, env = "LEEWARD_STATE_WARN_AGE", default_value = "24h", value_name = "DURATION", value_parser = duration)]
    pub(crate) state_warn_age: Duration,
    /// A directory of policy files, in place of a control plane. Read once.
    #[arg(long, env = "LEEWARD_POLICY", value_name = "DIR", conflicts_with = "control")]
    policy: Option<PathBuf>,
    /// Where to listen for the node's workloads: HTTP/1.1, and HTTP/2 with prior knowledge.
    #[arg(
        long,
        env = "LEEWARD_OUTBOUND",
        default_value = "127.0.0.1:15001",
        value_name = "IP:PORT"
    )]
    pub(crate) outbound: SocketAddr,
    /// Where to listen for other proxies: mutual TLS with HTTP/1.1 and HTTP/2 over TCP, and QUIC on the same UDP port.
    #[arg(
        long,
        env = "LEEWARD_INBOUND",
        default_value = "0.0.0.0:15008",
        value_name = "IP:PORT"
    )]
    pub(crate) inbound: SocketAddr,
    /// Where to listen for connections of the node's workloads that the kernel brings here, as `leeward capture` has it do:
    /// 127.0.0.1:15006, and [::1]:15006 for IPv6. Nowhere if not given.
    #[arg(long, env = "LEEWARD_CAPTURE", value_name = "IP:PORT", value_delimiter = ',')]
    pub(crate) capture: Vec<SocketAddr>,
    /// Where to listen for connections of the node's workloads to Services that have this address among their
    /// `addresses`. Nowhere if not given.
    #[arg(long, env = "LEEWARD_TCP", value_name = "IP:PORT", value_delimiter = ',')]
    pub(crate) tcp: Vec<SocketAddr>,
    /// The directory of certificates for clients from outside, as policy's Gateways name them: NAME.pem, and NAME.key for its
    /// private key; NAME.pem for roots of clients' certificates. They are looked at once a second.
    #[arg(long, env = "LEEWARD_GATEWAY_CERTIFICATES", value_name = "DIR")]
    pub(crate) gateway_certificates: Option<PathBuf>,
    /// Where to answer /livez, /readyz, /metrics and /config.
    #[arg(
        long,
        env = "LEEWARD_ADMIN",
        default_value = "127.0.0.1:15020",
        value_name = "IP:PORT"
    )]
    pub(crate) admin: SocketAddr,
    /// Where to answer feature flags for the node's workloads, by the OpenFeature Remote Evaluation Protocol; or
    /// off.
    #[arg(
        long,
        env = "LEEWARD_OFREP",
        default_value = "127.0.0.1:8016",
        value_name = "IP:PORT",
        value_parser = ofrep
    )]
    pub(crate) ofrep: OfrepAt,
    /// A file of feature flags in flagd's format, which go before policy's. Looked at twice a second; while it is
    /// broken, what it was before holds.
    #[arg(long, env = "LEEWARD_FLAGS", value_name = "FILE")]
    pub(crate) flags: Option<PathBuf>,
    /// Worker threads, 1 to 256; as many as cores if not given.
    #[arg(long, env = "LEEWARD_WORKERS", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
    /// Where to send spans, such as http://127.0.0.1:4317; nowhere if not given.
    #[arg(long, env = "LEEWARD_OTLP_ENDPOINT", value_name = "URL")]
    otlp_endpoint: Option<String>,
    /// How the receiver of spans is spoken to.
    #[arg(long, env = "LEEWARD_OTLP_PROTOCOL", default_value = "grpc")]
    otlp_protocol: Otlp,
    /// Share of the traces that begin here to be sampled, 0 to 1. Where a caller has decided, that holds.
    #[arg(long, env = "LEEWARD_TRACE_RATIO", default_value = "0.01", value_parser = ratio)]
    pub(crate) trace_ratio: f64,
    /// A directory for what must outlive the process: requests that were queued, plugins that were
    /// fetched, and what they were compiled to. It is made if it isn't there. Without it there are no queues on disk, and
    /// plugins are in the directory of --state; without that, too, there are none but from files.
    #[arg(long, env = "LEEWARD_DATA", value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Where to write a line for each request: off, stdout, or a file.
    #[arg(long, env = "LEEWARD_ACCESS_LOG", default_value = "off", value_parser = log)]
    pub(crate) access_log: Log,
    /// How long requests under way may take to end after SIGTERM, such as 30s.
    #[arg(long, env = "LEEWARD_DRAIN_TIMEOUT", default_value = "30s", value_parser = duration)]
    pub(crate) drain_timeout: Duration,
    /// A Unix socket through which another leeward-proxy with the same settings can take this one's place
    /// without a lost request; its directory must exist. A proxy that starts takes over from the one that it
    /// finds there. Off if not given.
    #[arg(long, env = "LEEWARD_HANDOVER", value_name = "PATH")]
    pub(crate) handover: Option<PathBuf>,
    /// How long a proxy that takes over may take to be ready, such as 60s. After that it ends, and the old one
    /// goes on.
    #[arg(long, env = "LEEWARD_HANDOVER_TIMEOUT", default_value = "60s", value_parser = duration)]
    pub(crate) handover_timeout: Duration,
    /// Memory that the proxy should stay below, such as 512MiB, or 0 for no limit: as it comes near, services
    /// with load shedding refuse what matters least. Its control group's limit if not given.
    #[arg(long, env = "LEEWARD_MEMORY_LIMIT", value_name = "SIZE", value_parser = size, default_value_t = group_limit(), hide_default_value = true)]
    pub(crate) memory_limit: u64,
    /// Linear memory that the instances of all plugins may have together, such as 1GiB.
    #[arg(long, env = "LEEWARD_PLUGIN_MEMORY", value_name = "SIZE", value_parser = size, default_value_t = 1 << 30, hide_default_value = true)]
    pub(crate) plugin_memory: u64,
    /// Disk that fetched modules of plugins may have, beside those that policy names, such as 1GiB; what was used
    /// longest ago goes first.
    #[arg(long, env = "LEEWARD_PLUGIN_DISK", value_name = "SIZE", value_parser = size, default_value_t = 1 << 30, hide_default_value = true)]
    pub(crate) plugin_disk: u64,
    /// Write the bound addresses here, as JSON, once everything listens; after a handover, once this process
    /// is the one that serves.
    #[arg(long, env = "LEEWARD_ADDRESSES_FILE", value_name = "FILE")]
    pub(crate) addresses_file: Option<PathBuf>,
    /// What to log, such as info or leeward_http=debug.
    #[arg(long, env = "LEEWARD_LOG", default_value = "info")]
    pub(crate) log: String,
}

/// Where policy comes from.
pub(crate) enum Source {
    Control(Control),
    Files(PathBuf),
}

impl Source {
    /// The control planes; none where policy is from files.
    pub(crate) fn control(&self) -> Control {
        match self {
            Self::Control(control) => control.clone(),
            Self::Files(_) => Control::none(),
        }
    }
}

/// Where state is kept.
#[derive(Clone, Debug)]
enum StateAt {
    Off,
    Dir(PathBuf),
}

/// Which control plane is asked first.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ControlOrder {
    Random,
    Preferred,
}

/// Where the proxy's certificate comes from.
#[derive(Clone, Debug)]
pub(crate) enum IdentityAt {
    /// Files in a directory.
    Dir(PathBuf),
    /// The socket of an agent.
    Socket(PathBuf),
}

/// Where access log lines go.
#[derive(Clone, Debug)]
pub(crate) enum Log {
    Off,
    Stdout,
    File(PathBuf),
}

/// Where feature flags are answered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OfrepAt {
    Off,
    Address(SocketAddr),
}

/// How a receiver of spans is spoken to.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Otlp {
    Grpc,
    Http,
}

impl Settings {
    pub(crate) fn source(&self) -> anyhow::Result<Source> {
        match (&self.policy, self.control.is_empty()) {
            (Some(dir), _) => Ok(Source::Files(dir.clone())),
            (None, false) => {
                let order = match self.control_order {
                    ControlOrder::Random => Order::Random,
                    ControlOrder::Preferred => Order::Preferred,
                };
                let control = Control::new(self.control.clone(), order, fastrand::u64(..));
                Ok(Source::Control(control))
            }
            (None, true) => anyhow::bail!("one of --control and --policy must be given"),
        }
    }

    /// Where what this proxy runs is kept, if it is.
    pub(crate) fn state(&self) -> Option<PathBuf> {
        match (&self.state, &self.policy) {
            (Some(StateAt::Off), _) => None,
            (Some(StateAt::Dir(dir)), _) => Some(dir.clone()),
            // They are on disk.
            (None, Some(_)) => None,
            (None, None) => {
                let identity = match &self.identity {
                    Some(IdentityAt::Dir(dir)) => Some(dir),
                    Some(IdentityAt::Socket(_)) | None => None,
                };
                let beside = self.data.as_ref().or(identity);
                beside.map(|dir| dir.join("state"))
            }
        }
    }

    pub(crate) fn workers(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.map_or_else(cores, usize::from)
    }

    pub(crate) fn traces(&self) -> Option<TraceSettings> {
        let protocol = match self.otlp_protocol {
            Otlp::Grpc => Protocol::Grpc,
            Otlp::Http => Protocol::Http,
        };
        self.otlp_endpoint
            .clone()
            .map(|endpoint| TraceSettings { endpoint, protocol })
    }
}

#[expect(clippy::unnecessary_wraps, reason = "the form that clap wants")]
fn identity(text: &str) -> Result<IdentityAt, String> {
    Ok(match socket(text) {
        Ok(path) => IdentityAt::Socket(path),
        Err(_) => IdentityAt::Dir(text.into()),
    })
}

fn socket(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix:");
    let path = path.ok_or_else(|| "want unix:PATH, such as unix:/run/leeward/workload.sock".to_owned())?;
    // unix:///PATH is how the standard writes it.
    Ok(path.strip_prefix("//").unwrap_or(path).into())
}

#[expect(clippy::unnecessary_wraps, reason = "the form that clap wants")]
fn state_at(text: &str) -> Result<StateAt, String> {
    Ok(match text {
        "off" => StateAt::Off,
        dir => StateAt::Dir(dir.into()),
    })
}

fn token(text: &str) -> Result<JoinToken, String> {
    text.parse().map_err(|error: InvalidToken| error.to_string())
}

fn name(text: &str) -> Result<Name, String> {
    Name::parse(text).map_err(|error| format!("it {error}"))
}

fn ratio(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|r| (0.0..=1.0).contains(r))
        .ok_or_else(|| "want a number from 0 to 1".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    leeward_proto::manifest::parse_duration(text)
        .ok_or_else(|| "want a duration such as 500ms, 30s or 2m".to_owned())
}

fn size(text: &str) -> Result<u64, String> {
    leeward_proto::manifest::parse_size(text).ok_or_else(|| "want a size such as 512MiB, or bytes".to_owned())
}

/// What the control group lets the process have, in bytes; 0 where there is no limit, or none is told.
fn group_limit() -> u64 {
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").unwrap_or_default();
    limit.trim().parse().unwrap_or(0)
}

fn ofrep(text: &str) -> Result<OfrepAt, String> {
    match text {
        "off" => Ok(OfrepAt::Off),
        address => address
            .parse()
            .map(OfrepAt::Address)
            .map_err(|_| "want an address such as 127.0.0.1:8016, or off".to_owned()),
    }
}

#[expect(clippy::unnecessary_wraps, reason = "the form that clap wants")]
fn log(text: &str) -> Result<Log, String> {
    Ok(match text {
        "off" => Log::Off,
        "stdout" => Log::Stdout,
        path => Log::File(path.into()),
    })
}

/// What is listened on.
pub(crate) struct Addresses {
    outbound: Option<SocketAddr>,
    inbound: Option<SocketAddr>,
    capture: Vec<SocketAddr>,
    tcp: Vec<SocketAddr>,
    admin: SocketAddr,
    ofrep: Option<SocketAddr>,
}

impl Addresses {
    pub(crate) fn of(ports: &[Port], admin: &Side, ofrep: Option<&Side>) -> std::io::Result<Self> {
        let all = |role| {
            let of = ports.iter().filter(move |p| p.role == role);
            of.map(|p| p.address).collect::<Vec<_>>()
        };
        let address = |role| all(role).first().copied();
        Ok(Self {
            outbound: address(Role::Outbound),
            inbound: address(Role::Inbound),
            capture: all(Role::Capture),
            tcp: all(Role::Tcp),
            admin: admin.address()?,
            ofrep: ofrep.map(Side::address).transpose()?,
        })
    }

    /// Every address.
    pub(crate) fn all(&self) -> Vec<SocketAddr> {
        let some = [self.outbound, self.inbound, Some(self.admin), self.ofrep];
        some.into_iter().flatten().collect()
    }

    /// Writes them to a file, if one is wanted: whole or not at all.
    pub(crate) fn write(&self, file: Option<&Path>) -> anyhow::Result<()> {
        let Some(file) = file else { return Ok(()) };
        let text = |address: Option<SocketAddr>| address.map(|a| a.to_string());
        let mut json = serde_json::json!({
            "outbound": text(self.outbound),
            "inbound": text(self.inbound),
            "admin": text(Some(self.admin)),
            "ofrep": text(self.ofrep),
        });
        for (name, addresses) in [("capture", &self.capture), ("tcp", &self.tcp)] {
            for (i, address) in addresses.iter().enumerate() {
                // The first has the plain name.
                let name = if i == 0 {
                    name.to_owned()
                } else {
                    format!("{name}-{i}")
                };
                if let Some(object) = json.as_object_mut() {
                    object.insert(name, address.to_string().into());
                }
            }
        }
        let beside = file.with_extension("tmp");
        std::fs::write(&beside, format!("{json}\n"))
            .and_then(|()| std::fs::rename(&beside, file))
            .with_context(|| format!("can't write {}", file.display()))
    }
}

//! What a hop from zone to zone costs: two proxies in a row, with mutual TLS between them.

use crate::measure::{Bench, Load, Run, end, free_port, measure, median, pause, spawn, wait_until};
use crate::peers::{Peer, Protocol, envoy_cluster, envoy_listener, envoy_quic_listener, here};
use leeward_identity::SpiffeId;
use leeward_identity::authority::Authority;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType,
};
use std::io::{Write, stdout};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

/// Who carries the requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum By {
    /// By which of the others is left to the proxy: `Auto`.
    Auto,
    Quic,
    Http2,
    Http1,
    Envoy,
    EnvoyHttp3,
}

impl By {
    const ALL: [Self; 6] = [
        Self::Auto,
        Self::Quic,
        Self::Http2,
        Self::Http1,
        Self::Envoy,
        Self::EnvoyHttp3,
    ];

    /// Those that are on this machine.
    pub(crate) fn here() -> Vec<Self> {
        let all = Self::ALL.into_iter();
        all.filter(|by| !by.is_envoy() || Peer::Envoy.is_here()).collect()
    }

    const fn is_envoy(self) -> bool {
        matches!(self, Self::Envoy | Self::EnvoyHttp3)
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Auto => "leeward, chosen by size",
            Self::Quic => "leeward, QUIC",
            Self::Http2 => "leeward, HTTP/2 over TLS",
            Self::Http1 => "leeward, HTTP/1.1 over TLS",
            Self::Envoy => "envoy, HTTP/2 over TLS",
            Self::EnvoyHttp3 => "envoy, HTTP/3",
        }
    }

    /// What the backend speaks, which is what goes between the zones by TCP.
    pub(crate) const fn protocol(self) -> Protocol {
        match self {
            Self::Http2 => Protocol::Http2,
            Self::Auto | Self::Quic | Self::Http1 | Self::Envoy | Self::EnvoyHttp3 => Protocol::Http1,
        }
    }
}

const LOADS: [Load; 2] = [
    Load {
        name: "1 KiB, 64 at once, flat out",
        ..Load::FLAT_OUT
    },
    Load {
        name: "1 MiB, 8 at once, flat out",
        clients: 8,
        path: "/1m",
        ..Load::FLAT_OUT
    },
];

/// How long certificates last here.
const LIFE: Duration = Duration::from_secs(24 * 3600);
pub(crate) const DOMAIN: &str = "leeward.local";

/// Two proxies, the first of which takes the load.
pub(crate) struct Pair {
    processes: [Child; 2],
    /// Where the load is taken.
    pub(crate) port: u16,
    /// Where the second takes what the first sends.
    pub(crate) between: SocketAddr,
}

/// Where the two run: what stands before commands that are for the host of each, nothing for this one, and the address
/// that the first reaches the second at.
pub(crate) struct Way {
    pub(crate) near: Vec<String>,
    pub(crate) far: Vec<String>,
    pub(crate) between: IpAddr,
}

impl Way {
    /// Both on this machine.
    pub(crate) const HERE: Self = Self {
        near: Vec::new(),
        far: Vec::new(),
        between: IpAddr::V4(Ipv4Addr::LOCALHOST),
    };
}

impl Pair {
    /// Waits until both listen, as far as TCP tells.
    pub(crate) fn wait(&self, by: By) -> anyhow::Result<()> {
        let far = (by != By::EnvoyHttp3).then_some(self.between);
        for at in far.into_iter().chain([here(self.port)]) {
            wait_until(|| std::net::TcpStream::connect(at).ok())?;
        }
        Ok(())
    }

    /// The process id of the second.
    pub(crate) fn far(&self) -> u32 {
        let [far, _] = &self.processes;
        far.id()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for process in &mut self.processes {
            end(process);
        }
        pause(Duration::from_millis(300));
    }
}

impl Bench<'_> {
    pub(crate) fn zones(&self) -> anyhow::Result<()> {
        self.issue()?;
        let all = By::here();
        let mut out = stdout();
        for load in LOADS {
            let mut runs: Vec<Vec<Run>> = vec![Vec::new(); all.len()];
            for _ in 0..self.rounds {
                for (by, runs) in all.iter().zip(&mut runs) {
                    let pair = self.pair(*by, &Way::HERE)?;
                    pair.wait(*by)?;
                    pause(Duration::from_millis(700));
                    let pids = pair.processes.each_ref().map(Child::id);
                    runs.push(measure(&pids, pair.port, load, self.seconds)?);
                }
            }
            writeln!(
                out,
                "\nTwo proxies in a row, HTTP/1.1 from the client, {} ({} rounds)",
                load.name, self.rounds
            )?;
            writeln!(
                out,
                "  {:<28} {:>20} {:>34}",
                "", "CPU us/req of both", "part of Envoy's by HTTP/2 that round"
            )?;
            let envoy = all.iter().position(|by| *by == By::Envoy);
            let envoy = envoy.and_then(|at| runs.get(at)).cloned().unwrap_or_default();
            for (by, runs) in all.iter().zip(&runs) {
                let shares = runs.iter().zip(&envoy).map(|(own, envoy)| Run {
                    cpu_us: own.cpu_us / envoy.cpu_us,
                    ..*own
                });
                let shares: Vec<Run> = shares.collect();
                let us = median(runs).cpu_us;
                let share = if shares.is_empty() {
                    "-".to_owned()
                } else {
                    format!("{:.2}", median(&shares).cpu_us)
                };
                writeln!(out, "  {:<28} {us:>20.1} {share:>34}", by.name())?;
            }
        }
        Ok(())
    }

    /// Certificates for both, of an authority of their own.
    pub(crate) fn issue(&self) -> anyhow::Result<()> {
        let authority = Authority::create(&self.dir.join("ca"), DOMAIN)?;
        for (zone, name) in [("a", "a1"), ("b", "b1")] {
            let id = SpiffeId::proxy(DOMAIN, zone, name)?;
            authority.issue(&id, LIFE, &self.dir.join(name))?;
        }
        named(self.dir)
    }

    /// Starts two proxies. They may not listen yet when this returns.
    pub(crate) fn pair(&self, by: By, way: &Way) -> anyhow::Result<Pair> {
        let port = free_port()?;
        let between = SocketAddr::new(way.between, free_port()?);
        let backend = self.backend.port(by.protocol());
        let processes = if by.is_envoy() {
            let program = Peer::Envoy.program().unwrap_or_else(|| PathBuf::from("envoy"));
            let far = self.envoy("b1", &envoy_far(by, self.dir, between, backend))?;
            let near = self.envoy("a1", &envoy_near(by, self.dir, port, between))?;
            [
                self.spawn(&way.far, "b1", &program, &far)?,
                self.spawn(&way.near, "a1", &program, &near)?,
            ]
        } else {
            let policy = self.dir.join("policy");
            std::fs::create_dir_all(&policy)?;
            std::fs::write(policy.join("zones.yaml"), leeward(by, between, backend))?;
            let args = |zone: &str, name: &str, outbound: SocketAddr, inbound: SocketAddr| {
                let identity = self.dir.join(name).display().to_string();
                let policy = policy.display().to_string();
                let (outbound, inbound) = (outbound.to_string(), inbound.to_string());
                [
                    "--zone",
                    zone,
                    "--name",
                    name,
                    "--workers",
                    "1",
                    "--ofrep",
                    "off",
                    "--trace-ratio",
                    "0",
                    "--admin",
                    "127.0.0.1:0",
                    "--identity",
                    &identity,
                    "--policy",
                    &policy,
                    "--outbound",
                    &outbound,
                    "--inbound",
                    &inbound,
                ]
                .map(str::to_owned)
            };
            [
                self.spawn(&way.far, "b1", self.proxy, &args("b", "b1", here(0), between))?,
                self.spawn(&way.near, "a1", self.proxy, &args("a", "a1", here(port), here(0)))?,
            ]
        };
        Ok(Pair {
            processes,
            port,
            between,
        })
    }

    fn spawn(&self, host: &[String], name: &str, program: &Path, args: &[String]) -> anyhow::Result<Child> {
        spawn(host, program, args, &self.dir.join(format!("{name}.log")))
    }

    fn envoy(&self, name: &str, config: &str) -> anyhow::Result<Vec<String>> {
        let yaml = self.dir.join(format!("{name}.yaml"));
        std::fs::write(&yaml, config)?;
        let yaml = yaml.display().to_string();
        let args = [
            "-c",
            &yaml,
            "--concurrency",
            "1",
            "-l",
            "error",
            "--disable-hot-restart",
        ];
        Ok(args.map(str::to_owned).to_vec())
    }
}

fn leeward(by: By, between: SocketAddr, backend: u16) -> String {
    let transport = match by {
        By::Auto => "Auto",
        By::Quic => "Quic",
        By::Http2 | By::Http1 | By::Envoy | By::EnvoyHttp3 => "Tcp",
    };
    let protocol = match by.protocol() {
        Protocol::Http1 => "HTTP1",
        Protocol::Http2 => "HTTP2",
    };
    format!(
        "apiVersion: leeward.dev/v1
kind: Zone
metadata: {{name: a}}
spec: {{}}
---
apiVersion: leeward.dev/v1
kind: Zone
metadata: {{name: b}}
spec:
  proxies: [{{name: b1, address: \"{between}\"}}]
  transport: {transport}
---
apiVersion: leeward.dev/v1
kind: Service
metadata: {{name: backend}}
spec:
  protocol: {protocol}
  endpoints: [{{address: \"127.0.0.1:{backend}\", zone: b, proxy: b1}}]
---
apiVersion: leeward.dev/v1
kind: Route
metadata: {{name: bench}}
spec:
  hostnames: [\"127.0.0.1\"]
  rules: [{{backendRefs: [{{service: backend}}]}}]
"
    )
}

/// Certificates as both have them, of an authority of its own, but with a DNS name too: Envoy knows the other side by that
/// where it goes by QUIC.
fn named(dir: &Path) -> anyhow::Result<()> {
    let mut authority = CertificateParams::default();
    authority.distinguished_name = DistinguishedName::new();
    authority.distinguished_name.push(DnType::CommonName, "root");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    let root = authority.self_signed(&key)?.pem();
    let issuer = Issuer::new(authority, key);
    for (zone, name) in [("a", "a1"), ("b", "b1")] {
        let dir = dir.join(format!("{name}-named"));
        std::fs::create_dir_all(&dir)?;
        let mut params = CertificateParams::new([name.to_owned()])?;
        params.distinguished_name = DistinguishedName::new();
        let id = SpiffeId::proxy(DOMAIN, zone, name)?.to_string();
        params
            .subject_alt_names
            .push(SanType::URI(id.as_str().try_into()?));
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate()?;
        std::fs::write(dir.join("cert.pem"), params.signed_by(&key, &issuer)?.pem())?;
        std::fs::write(dir.join("key.pem"), key.serialize_pem())?;
        std::fs::write(dir.join("bundle.pem"), &root)?;
    }
    Ok(())
}

/// The certificates of one side, and which protocols it offers, as Envoy has them.
fn envoy_tls(dir: &Path, alpn: &str) -> String {
    let file = |file: &str| dir.join(file).display().to_string();
    format!(
        "common_tls_context:
          tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
          alpn_protocols: [{alpn}]
          tls_certificates: [{{certificate_chain: {{filename: \"{}\"}}, private_key: {{filename: \"{}\"}}}}]
          validation_context: {{trusted_ca: {{filename: \"{}\"}}}}",
        file("cert.pem"),
        file("key.pem"),
        file("bundle.pem")
    )
}

/// What Envoy's types are all under.
const TYPES: &str = "type.googleapis.com/envoy.extensions.transport_sockets";

fn envoy_near(by: By, dir: &Path, listen: u16, next: SocketAddr) -> String {
    let (http, socket) = if by == By::EnvoyHttp3 {
        let tls = envoy_tls(&dir.join("a1-named"), "h3").replace("\n", "\n  ");
        let socket = format!(
            "    transport_socket:
      name: envoy.transport_sockets.quic
      typed_config:
        \"@type\": {TYPES}.quic.v3.QuicUpstreamTransport
        upstream_tls_context:
          sni: b1
          {tls}
"
        );
        ("http3_protocol_options: {}", socket)
    } else {
        let tls = envoy_tls(&dir.join("a1"), "h2");
        let socket = format!(
            "    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        \"@type\": {TYPES}.tls.v3.UpstreamTlsContext
        {tls}
"
        );
        ("http2_protocol_options: {}", socket)
    };
    envoy_listener(here(listen), "", "") + &envoy_cluster(next, http, &socket)
}

fn envoy_far(by: By, dir: &Path, listen: SocketAddr, backend: u16) -> String {
    let cluster = envoy_cluster(here(backend), "http_protocol_options: {}", "");
    if by == By::EnvoyHttp3 {
        let tls = envoy_tls(&dir.join("b1-named"), "h3").replace("\n", "\n    ");
        let socket = format!(
            "      transport_socket:
        name: envoy.transport_sockets.quic
        typed_config:
          \"@type\": {TYPES}.quic.v3.QuicDownstreamTransport
          downstream_tls_context:
            require_client_certificate: true
            {tls}
"
        );
        return envoy_quic_listener(listen, &socket) + &cluster;
    }
    let tls = envoy_tls(&dir.join("b1"), "h2, http/1.1").replace("\n", "\n  ");
    let socket = format!(
        "      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          \"@type\": {TYPES}.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          {tls}
"
    );
    envoy_listener(listen, "", &socket) + &cluster
}

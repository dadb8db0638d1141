//! What a hop from zone to zone costs: two proxies in a row, with mutual TLS between them.

use crate::measure::{Bench, Load, Run, end, free_port, measure, median, pause, spawn, wait_until};
use crate::peers::{Peer, Protocol, envoy_cluster, envoy_listener};
use leeward_identity::SpiffeId;
use leeward_identity::authority::Authority;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

/// Who carries the requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum By {
    Quic,
    Http2,
    Http1,
    Envoy,
}

impl By {
    const ALL: [Self; 4] = [Self::Quic, Self::Http2, Self::Http1, Self::Envoy];

    const fn name(self) -> &'static str {
        match self {
            Self::Quic => "leeward, QUIC",
            Self::Http2 => "leeward, HTTP/2 over TLS",
            Self::Http1 => "leeward, HTTP/1.1 over TLS",
            Self::Envoy => "envoy, HTTP/2 over TLS",
        }
    }

    /// What the backend speaks, which is what goes between the zones by TCP.
    const fn protocol(self) -> Protocol {
        match self {
            Self::Http2 => Protocol::Http2,
            Self::Quic | Self::Http1 | Self::Envoy => Protocol::Http1,
        }
    }
}

const LOADS: [Load; 2] = [
    Load {
        name: "1 KiB, 64 at once, flat out",
        protocol: Protocol::Http1,
        clients: 64,
        streams: 1,
        rate: 0,
        field: None,
        path: "/1k",
    },
    Load {
        name: "1 MiB, 8 at once, flat out",
        protocol: Protocol::Http1,
        clients: 8,
        streams: 1,
        rate: 0,
        field: None,
        path: "/1m",
    },
];

/// How long certificates last here.
const LIFE: Duration = Duration::from_secs(24 * 3600);
const DOMAIN: &str = "leeward.local";

/// Two proxies, the first of which takes the load.
struct Pair {
    processes: [Child; 2],
    port: u16,
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
        let authority = Authority::create(&self.dir.join("ca"), DOMAIN)?;
        for (zone, name) in [("a", "a1"), ("b", "b1")] {
            let id = SpiffeId::proxy(DOMAIN, zone, name)?;
            authority.issue(&id, LIFE, &self.dir.join(name))?;
        }
        let all = By::ALL;
        let here: Vec<_> = all
            .into_iter()
            .filter(|by| *by != By::Envoy || Peer::Envoy.is_here())
            .collect();
        let mut out = stdout();
        for load in LOADS {
            let mut runs: Vec<Vec<Run>> = vec![Vec::new(); here.len()];
            for _ in 0..self.rounds {
                for (by, runs) in here.iter().zip(&mut runs) {
                    let pair = self.start(*by)?;
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
            writeln!(out, "  {:<28} {:>24}", "", "CPU us/req of both")?;
            for (by, runs) in here.iter().zip(runs) {
                writeln!(out, "  {:<28} {:>24.1}", by.name(), median(&runs).cpu_us)?;
            }
        }
        Ok(())
    }

    fn start(&self, by: By) -> anyhow::Result<Pair> {
        let (port, between) = (free_port()?, free_port()?);
        let backend = self.backend.port(by.protocol());
        let processes = if by == By::Envoy {
            let program = Peer::Envoy.program().unwrap_or_else(|| PathBuf::from("envoy"));
            let far = self.envoy("b1", &envoy_far(self.dir, between, backend))?;
            let near = self.envoy("a1", &envoy_near(self.dir, port, between))?;
            [
                self.spawn("b1", &program, &far)?,
                self.spawn("a1", &program, &near)?,
            ]
        } else {
            let policy = self.dir.join("policy");
            std::fs::create_dir_all(&policy)?;
            std::fs::write(policy.join("zones.yaml"), leeward(by, between, backend))?;
            let args = |zone: &str, name: &str, outbound: u16, inbound: u16| {
                let identity = self.dir.join(name).display().to_string();
                let policy = policy.display().to_string();
                let (outbound, inbound) = (format!("127.0.0.1:{outbound}"), format!("127.0.0.1:{inbound}"));
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
                self.spawn("b1", self.proxy, &args("b", "b1", 0, between))?,
                self.spawn("a1", self.proxy, &args("a", "a1", port, 0))?,
            ]
        };
        let pair = Pair { processes, port };
        for port in [port, between] {
            wait_until(|| std::net::TcpStream::connect(("127.0.0.1", port)).ok())?;
        }
        Ok(pair)
    }

    fn spawn(&self, name: &str, program: &Path, args: &[String]) -> anyhow::Result<Child> {
        spawn(program, args, &self.dir.join(format!("{name}.log")))
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

fn leeward(by: By, between: u16, backend: u16) -> String {
    let transport = if by == By::Quic { "Quic" } else { "Tcp" };
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
  proxies: [{{name: b1, address: \"127.0.0.1:{between}\"}}]
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

/// The certificates of one side, as Envoy has them.
fn envoy_tls(dir: &Path, name: &str) -> String {
    let dir = dir.join(name);
    let file = |file: &str| dir.join(file).display().to_string();
    format!(
        "common_tls_context:
          tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
          alpn_protocols: [h2]
          tls_certificates: [{{certificate_chain: {{filename: \"{}\"}}, private_key: {{filename: \"{}\"}}}}]
          validation_context: {{trusted_ca: {{filename: \"{}\"}}}}",
        file("cert.pem"),
        file("key.pem"),
        file("bundle.pem")
    )
}

fn envoy_near(dir: &Path, listen: u16, next: u16) -> String {
    let tls = format!(
        "    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        {}
",
        envoy_tls(dir, "a1")
    );
    envoy_listener(listen, "", "") + &envoy_cluster(next, "http2_protocol_options: {}", &tls)
}

fn envoy_far(dir: &Path, listen: u16, backend: u16) -> String {
    let tls = format!(
        "      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          {}
",
        envoy_tls(dir, "b1").replace("\n          ", "\n            ")
    );
    envoy_listener(listen, "", &tls) + &envoy_cluster(backend, "http_protocol_options: {}", "")
}

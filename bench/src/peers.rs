//! The proxies that are compared, each set up to do the same: one host, one backend, connections kept.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// What both sides speak.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

/// Where a peer listens, and what is behind it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    pub(crate) listen: u16,
    pub(crate) admin: u16,
    pub(crate) backend: u16,
}

/// What a peer does beside passing requests on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Setup {
    /// More documents of Leeward's policy.
    pub(crate) documents: String,
    /// The rules of its route, in YAML's flow style; empty: one that passes everything on.
    pub(crate) rules: String,
    /// A proxy-wasm module that Envoy runs as a filter.
    pub(crate) wasm: Option<PathBuf>,
}

/// One proxy.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    Leeward(PathBuf),
    Nginx,
    Haproxy,
    Envoy,
}

/// Places where Debian puts servers, which are not on everyone's path.
const PLACES: [&str; 3] = ["/usr/sbin", "/usr/bin", "/usr/local/bin"];

impl Peer {
    pub(crate) fn all(proxy: &Path) -> Vec<Self> {
        vec![
            Self::Leeward(proxy.to_owned()),
            Self::Nginx,
            Self::Haproxy,
            Self::Envoy,
        ]
    }

    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Leeward(_) => "leeward",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
        }
    }

    /// nginx has no HTTP/2 to its backends.
    pub(crate) fn serves(&self, protocol: Protocol) -> bool {
        protocol == Protocol::Http1 || !matches!(self, Self::Nginx)
    }

    pub(crate) fn is_here(&self) -> bool {
        self.program().is_some()
    }

    pub(crate) fn program(&self) -> Option<PathBuf> {
        if let Self::Leeward(path) = self {
            return Some(path.clone());
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let places = std::env::split_paths(&path).chain(PLACES.map(PathBuf::from));
        let found = places.map(|dir| dir.join(self.name())).find(|p| p.exists())?;
        // What PyPI puts on the path is a script that starts the real one as a child; measure that.
        if matches!(self, Self::Envoy) {
            Some(real_envoy().unwrap_or(found))
        } else {
            Some(found)
        }
    }

    /// Writes the peer's configuration; returns what to start.
    pub(crate) fn command(
        &self,
        dir: &Path,
        protocol: Protocol,
        ports: Ports,
        setup: &Setup,
    ) -> anyhow::Result<(PathBuf, Vec<String>)> {
        let Ports {
            listen,
            admin,
            backend,
        } = ports;
        let program = self
            .program()
            .ok_or_else(|| anyhow::anyhow!("{} is not on this machine", self.name()))?;
        let file = dir.join(format!("{}.conf", self.name()));
        let path = file.display().to_string();
        let text = |args: &[&str]| args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
        let (config, args) = match self {
            Self::Leeward(_) => {
                let policy = dir.join("policy");
                std::fs::create_dir_all(&policy)?;
                std::fs::write(policy.join("bench.yaml"), leeward(protocol, backend, setup))?;
                let outbound = format!("127.0.0.1:{listen}");
                let admin = format!("127.0.0.1:{admin}");
                let policy = policy.display().to_string();
                let args = [
                    "--zone",
                    "a",
                    "--name",
                    "bench",
                    "--workers",
                    "1",
                    "--admin",
                    &admin,
                    "--ofrep",
                    "off",
                    "--trace-ratio",
                    "0",
                    "--outbound",
                    &outbound,
                    "--policy",
                    &policy,
                ];
                return Ok((program, text(&args)));
            }
            Self::Nginx => (nginx(dir, listen, backend), text(&["-c", &path])),
            Self::Haproxy => (haproxy(protocol, listen, backend), text(&["-db", "-f", &path])),
            Self::Envoy => {
                let yaml = dir.join("envoy.yaml");
                std::fs::write(&yaml, envoy(protocol, listen, backend, setup))?;
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
                return Ok((program, text(&args)));
            }
        };
        std::fs::write(&file, config)?;
        Ok((program, args))
    }
}

fn real_envoy() -> Option<PathBuf> {
    let output = std::process::Command::new("python3")
        .args([
            "-c",
            "import envoy, os; print(os.path.join(os.path.dirname(envoy.__file__), '_bin', 'envoy'))",
        ])
        .output()
        .ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    path.exists().then_some(path)
}

fn leeward(protocol: Protocol, backend: u16, setup: &Setup) -> String {
    let documents = &setup.documents;
    let rules = match setup.rules.as_str() {
        "" => "{backendRefs: [{service: backend}]}",
        rules => rules,
    };
    let protocol = match protocol {
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
kind: Service
metadata: {{name: backend}}
spec:
  protocol: {protocol}
  endpoints: [{{address: \"127.0.0.1:{backend}\", zone: a}}]
---
apiVersion: leeward.dev/v1
kind: Route
metadata: {{name: bench}}
spec:
  hostnames: [\"127.0.0.1\"]
  rules: [{rules}]
{documents}"
    )
}

fn nginx(dir: &Path, listen: u16, backend: u16) -> String {
    let dir = dir.display();
    format!(
        "daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/nginx.error;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  upstream backend {{ server 127.0.0.1:{backend}; keepalive 128; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{listen};
    location / {{ proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection \"\"; }}
  }}
}}
"
    )
}

fn haproxy(protocol: Protocol, listen: u16, backend: u16) -> String {
    let proto = match protocol {
        Protocol::Http1 => "",
        Protocol::Http2 => " proto h2",
    };
    format!(
        "global
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  http-reuse always
frontend in
  bind 127.0.0.1:{listen}{proto}
  default_backend out
backend out
  server s 127.0.0.1:{backend}{proto}
"
    )
}

fn envoy(protocol: Protocol, listen: u16, backend: u16, setup: &Setup) -> String {
    let wasm = setup.wasm.as_ref().map_or_else(String::new, |module| {
        format!(
            "
          - name: envoy.filters.http.wasm
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm
              config:
                name: bench
                vm_config:
                  runtime: envoy.wasm.runtime.v8
                  code: {{local: {{filename: \"{}\"}}}}",
            module.display()
        )
    });
    let upstream = match protocol {
        Protocol::Http1 => "http_protocol_options: {}",
        Protocol::Http2 => "http2_protocol_options: {}",
    };
    envoy_listener(here(listen), &wasm, "") + &envoy_cluster(here(backend), upstream, "")
}

/// A port of this machine.
pub(crate) fn here(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// An address as Envoy writes it.
fn envoy_address(at: SocketAddr) -> String {
    format!("{{address: {}, port_value: {}}}", at.ip(), at.port())
}

/// What Envoy listens with: filters before its router, and how connections come if not plain.
pub(crate) fn envoy_listener(at: SocketAddr, filters: &str, socket: &str) -> String {
    let at = envoy_address(at);
    format!(
        "static_resources:
  listeners:
  - address: {{socket_address: {at}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          codec_type: AUTO
          route_config:
            virtual_hosts:
            - name: all
              domains: [\"*\"]
              routes: [{{match: {{prefix: /}}, route: {{cluster: backend}}}}]
          http_filters:{filters}
          - name: envoy.filters.http.router
            typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
{socket}"
    )
}

/// The same for HTTP/3.
pub(crate) fn envoy_quic_listener(at: SocketAddr, socket: &str) -> String {
    let quic = "protocol: UDP}}
    udp_listener_config: {quic_options: {}, downstream_socket_config: {prefer_gro: true}}
";
    envoy_listener(at, "", socket)
        .replace("}}\n    filter_chains", &format!(", {quic}    filter_chains"))
        .replace(
            "codec_type: AUTO",
            "codec_type: HTTP3\n          http3_protocol_options: {}",
        )
}

/// Where Envoy sends to: which HTTP, and how connections are made if not plain.
pub(crate) fn envoy_cluster(at: SocketAddr, http: &str, socket: &str) -> String {
    let at = envoy_address(at);
    format!(
        "  clusters:
  - name: backend
    type: STATIC
    circuit_breakers: {{thresholds: [{{max_connections: 4096, max_pending_requests: 4096, max_requests: 4096}}]}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{{http}}}
    load_assignment:
      cluster_name: backend
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {at}}}}}}}]}}]
{socket}"
    )
}

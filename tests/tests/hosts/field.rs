//! Three zones that serve each other, under load.

use crate::traffic::{Flow, ID, Kind, Phase, Traffic};
use anyhow::{Context, ensure};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Backend, Behave, Hosts, Mesh, Node, ZONES, eventually};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

/// Longest wait for anything.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// Services, and the zones that have them: each zone lacks one, and goes to the others for it.
pub(crate) const SERVICES: [(&str, [&str; 2]); 3] =
    [("alpha", ["b", "c"]), ("beta", ["a", "c"]), ("gamma", ["a", "b"])];
/// The zone that may have gateways.
pub(crate) const GATED: &str = "b";
/// Requests of each kind that make a phase.
const ENOUGH: u64 = 300;
/// What may be sent again, and when.
const RULE: &[&str] = &["retry: {retryOn: [ConnectFailure, RefusedStream, Reset]}"];

/// A mesh on hosts, with a proxy and backends in each zone.
pub(crate) struct Field {
    pub(crate) hosts: Arc<Hosts>,
    pub(crate) mesh: Mesh,
    backends: Vec<(&'static str, Backend)>,
    pub(crate) traffic: Traffic,
    /// Names of the phases, the first but for settling.
    phases: Vec<(&'static str, usize)>,
    /// Flows that can't be served while it is broken, since nobody is left who could.
    lost: fn(&Flow) -> bool,
}

/// How a field differs from others.
#[derive(Clone, Copy)]
pub(crate) struct Make {
    /// With a control plane that issues certificates.
    pub(crate) authority: bool,
    /// What requests between zones go by, as the Zone's `transport` says.
    pub(crate) transport: &'static str,
    /// Further lines of each service.
    pub(crate) service: &'static [&'static str],
    /// Gateways that zone b is reached through, beside its proxy.
    pub(crate) gateways: &'static [&'static str],
    /// Flows that can't be served while it is broken.
    pub(crate) lost: fn(&Flow) -> bool,
}

impl Make {
    /// As it comes.
    pub(crate) const USUAL: Self = Self {
        authority: false,
        transport: "Auto",
        service: &[],
        gateways: &[],
        lost: |_| false,
    };
}

impl Field {
    /// Starts everything, and waits until all are served.
    pub(crate) async fn start(hosts: Hosts, make: Make) -> anyhow::Result<Self> {
        let hosts = Arc::new(hosts);
        let mut mesh = Mesh::builder().on(&hosts);
        for zone in ZONES {
            mesh = mesh.node(zone, &proxy(zone));
        }
        for gateway in make.gateways {
            mesh = mesh.node(GATED, gateway);
        }
        if make.authority {
            mesh = mesh.authority();
        }
        let mesh = mesh.start().await?;
        let mut policy = String::new();
        for zone in ZONES {
            let gateways = if zone == GATED { make.gateways } else { &[] };
            let (mut proxies, mut passing) = (String::new(), String::new());
            for name in [&*proxy(zone)].iter().chain(gateways) {
                let inbound = mesh.node(name)?.inbound;
                // A String takes whatever is written to it.
                let _ = write!(proxies, "{{name: {name}, address: \"{inbound}\"}}, ");
            }
            for name in gateways {
                let _ = write!(passing, "{{name: {name}}}, ");
            }
            let transport = make.transport;
            let _ = write!(
                policy,
                "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {zone}}}\nspec: {{transport: {transport}, \
                 proxies: [{proxies}], gateways: [{passing}]}}\n"
            );
        }
        let mut backends = Vec::new();
        for (name, zones) in SERVICES {
            let mut endpoints = Vec::new();
            for zone in zones {
                let backend = Backend::start_at(&format!("{name}-{zone}"), hosts.workloads(zone)?.into())?;
                backend.behave(Behave::Tell(ID.to_owned()));
                backend.count_by(ID);
                endpoints.push((backend.address(), zone, proxy(zone)));
                backends.push((name, backend));
            }
            let endpoints: Vec<_> = endpoints
                .iter()
                .map(|(at, zone, by)| (*at, *zone, &**by))
                .collect();
            policy += &service(name, &endpoints, make.service);
            policy += &route(name, &format!("{name}.example"), name, RULE);
        }
        mesh.apply(&policy).await?;
        let outbound = |zone| anyhow::Ok((zone, mesh.node(&proxy(zone))?.outbound));
        let proxies = ZONES
            .into_iter()
            .map(outbound)
            .collect::<anyhow::Result<Vec<_>>>()?;
        let traffic = Traffic::start(&proxies, &SERVICES.map(|(name, _)| name));
        let field = Self {
            hosts,
            mesh,
            backends,
            traffic,
            phases: Vec::new(),
            lost: make.lost,
        };
        // The first requests may come before all proxies have their sockets.
        let settled = eventually("every zone to be served", SOON, || async {
            let all = field.traffic.phase(0);
            for from in ZONES {
                for (to, _) in SERVICES {
                    let count = all.count(|flow| flow.from == from && flow.to == to);
                    ensure!(
                        count.served > 20,
                        "{from} to {to}: {count:?} {:?}",
                        all.failures()
                    );
                }
                let by = if make.transport == "Tcp" { "http1" } else { "quic" };
                let by = format!("transport=\"{by}\"");
                let node = field.node(from)?;
                let across = node.metric("leeward_attempts_total", &[&by]).await?;
                ensure!(across > 0.5, "no request of {from} has left it as it should");
            }
            Ok(())
        });
        settled.await?;
        Ok(field)
    }

    pub(crate) fn node(&self, zone: &str) -> anyhow::Result<&Node> {
        self.mesh.node(&proxy(zone))
    }

    /// A phase begins, under this name, and goes on until the next does.
    pub(crate) fn begin(&mut self, name: &'static str) {
        let number = self.traffic.next();
        self.phases.push((name, number));
    }

    /// Waits until enough requests that can be served have been, in the phase of now.
    pub(crate) async fn enough(&self) -> anyhow::Result<()> {
        let (name, number) = *self.phases.last().context("no phase has begun")?;
        eventually(&format!("enough requests {name}"), SOON, || async {
            let phase = self.traffic.phase(number);
            for kind in [Kind::Get, Kind::Post] {
                let count = phase.count(|flow| flow.kind == kind && !(self.lost)(flow));
                ensure!(
                    count.served >= ENOUGH,
                    "{kind:?}: {count:?} {:?}",
                    phase.failures()
                );
            }
            Ok(())
        })
        .await
    }

    /// Waits until the proxy of a zone has found that an endpoint of a service is out.
    pub(crate) async fn is_out(&self, zone: &str, service: &str) -> anyhow::Result<()> {
        self.out(zone, service, 1.0).await
    }

    /// Waits until all endpoints of a service are in again, as a zone's proxy sees it.
    pub(crate) async fn is_back(&self, zone: &str, service: &str) -> anyhow::Result<()> {
        self.out(zone, service, 0.0).await
    }

    /// Waits until a zone's proxy uses a gateway of another zone, or has left it.
    pub(crate) async fn uses(&self, zone: &str, gateway: &str, is_up: bool) -> anyhow::Result<()> {
        let node = self.node(zone)?;
        let label = format!("gateway=\"{gateway}\"");
        eventually(&format!("{zone} to see {gateway} up: {is_up}"), SOON, || async {
            let up = node.metric("leeward_zone_gateway_up", &[&label]).await?;
            ensure!((up > 0.5) == is_up, "{up}");
            Ok(())
        })
        .await
    }

    /// Waits until requests from a zone to a service are served, in the phase of now. One endpoint is enough for that: while
    /// it does well, nobody asks whether those of zones that are farther away are back.
    pub(crate) async fn is_served(&self, from: &str, to: &str) -> anyhow::Result<()> {
        let (name, number) = *self.phases.last().context("no phase has begun")?;
        eventually(&format!("{from} to be served by {to} {name}"), SOON, || async {
            let phase = self.traffic.phase(number);
            for kind in [Kind::Get, Kind::Post] {
                let count = phase.count(|flow| flow.from == from && flow.to == to && flow.kind == kind);
                ensure!(count.served > 0, "{kind:?}: {count:?} {:?}", phase.failures());
            }
            Ok(())
        })
        .await
    }

    async fn out(&self, zone: &str, service: &str, want: f64) -> anyhow::Result<()> {
        let node = self.node(zone)?;
        let label = format!("service=\"{service}\"");
        eventually(
            &format!("{zone} to see {want} of {service} out"),
            SOON,
            || async {
                let out = node.metric("leeward_endpoint_out", &[&label]).await?;
                ensure!((out - want).abs() < 0.1, "{out} are");
                Ok(())
            },
        )
        .await
    }

    /// Ends, says what became of the requests, and checks it: nothing misdelivered, nothing that may not be sent twice
    /// delivered twice, and from the second phase on no idempotent request failed that could be served.
    pub(crate) async fn end(self, scenario: &str) -> anyhow::Result<()> {
        let Self {
            backends,
            traffic,
            phases: names,
            lost,
            mesh: _mesh,
            hosts: _hosts,
        } = self;
        let (phases, misdelivered) = traffic.stop().await;
        let seen: Vec<_> = backends
            .iter()
            .map(|(name, backend)| (*name, backend.counts()))
            .collect();
        let twice = delivered_twice(&seen);
        let strayed = strayed(&seen);
        let mut row = format!("| {scenario} |");
        for (name, number) in &names {
            let phase = phases.get(*number).cloned().unwrap_or_default();
            let [get, post] = [Kind::Get, Kind::Post].map(|kind| told(&phase, kind, lost));
            let _ = write!(row, " {name}: {get}, {post} |");
        }
        let _ = writeln!(row, " {} | {} |", misdelivered.len() + strayed.len(), twice.len());
        std::io::stdout().write_all(row.as_bytes())?;
        ensure!(misdelivered.is_empty(), "misdelivered: {misdelivered:?}");
        ensure!(strayed.is_empty(), "at backends of another service: {strayed:?}");
        ensure!(twice.is_empty(), "delivered twice: {twice:?}");
        for (name, number) in names.iter().skip(1) {
            let phase = phases.get(*number).context("a phase is gone")?;
            let get = phase.count(|flow| flow.kind == Kind::Get && !lost(flow));
            ensure!(
                get.failed == 0 && get.served > 0,
                "{name}: {get:?} {:?}",
                phase.failures()
            );
        }
        Ok(())
    }
}

/// The one proxy of a zone.
fn proxy(zone: &str) -> String {
    format!("{zone}1")
}

/// How many requests of a kind failed, of those that could be served.
fn told(phase: &Phase, kind: Kind, lost: fn(&Flow) -> bool) -> String {
    let count = phase.count(|flow| flow.kind == kind && !lost(flow));
    let kind = match kind {
        Kind::Get => "GET",
        Kind::Post => "POST",
    };
    format!(
        "{} of {} {kind} failed",
        count.failed,
        count.failed + count.served
    )
}

type Counts = BTreeMap<String, u64>;

/// Ids of requests that may not be sent twice and that backends have seen more than once.
fn delivered_twice(seen: &[(&str, Counts)]) -> Vec<String> {
    let mut all = Counts::new();
    for (id, count) in seen.iter().flat_map(|(_, counts)| counts) {
        *all.entry(id.clone()).or_default() += count;
    }
    let post = format!("{:?}/", Kind::Post);
    let twice = all
        .into_iter()
        .filter(|(id, count)| id.starts_with(&post) && *count > 1);
    twice.map(|(id, _)| id).collect()
}

/// Ids that a backend has seen which is of another service.
fn strayed(seen: &[(&str, Counts)]) -> Vec<String> {
    let ids = seen
        .iter()
        .flat_map(|(name, counts)| counts.keys().map(move |id| (name, id)));
    let stray = ids.filter(|(name, id)| id.split('/').nth(2) != Some(**name));
    stray.map(|(_, id)| id.clone()).collect()
}

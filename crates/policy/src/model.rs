//! The policy, validated: what can be built here can be executed.
//!
//! Field by field this is `proto/leeward/v1/resources.proto` with defaults filled in; units, ranges and
//! meanings are documented there and enforced by `leeward-proto`, the only place that makes these values
//! from outside input.

use crate::Name;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// The kinds of resource, in the order in which a snapshot is built from them.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// A failure domain and its proxies.
    Zone,
    /// A WebAssembly plugin.
    Plugin,
    /// A named set of endpoints.
    Service,
    /// What answers when a call can't be served.
    FallbackPolicy,
    /// Which requests go where.
    Route,
}

impl Kind {
    /// Every kind, in order.
    pub const ALL: [Self; 5] = [
        Self::Zone,
        Self::Plugin,
        Self::Service,
        Self::FallbackPolicy,
        Self::Route,
    ];

    /// The name as YAML's `kind` has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Zone => "Zone",
            Self::Plugin => "Plugin",
            Self::Service => "Service",
            Self::FallbackPolicy => "FallbackPolicy",
            Self::Route => "Route",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Names one resource.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Key {
    /// Its kind.
    pub kind: Kind,
    /// Its name, unique within the kind.
    pub name: Name,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.name)
    }
}

/// One resource with its metadata.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Resource {
    /// Its name.
    pub name: Name,
    /// The store's revision of its last change; 0 for one that was never stored.
    pub revision: u64,
    /// Labels, for people and selectors.
    pub labels: BTreeMap<String, String>,
    /// What it says.
    pub spec: Spec,
}

impl Resource {
    /// Its kind and name.
    pub fn key(&self) -> Key {
        Key {
            kind: self.spec.kind(),
            name: self.name.clone(),
        }
    }
}

/// What a resource says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Spec {
    /// A failure domain and its proxies.
    Zone(Zone),
    /// A named set of endpoints.
    Service(Service),
    /// Which requests go where.
    Route(Route),
    /// What answers when a call can't be served.
    FallbackPolicy(FallbackPolicy),
    /// A WebAssembly plugin.
    Plugin(Plugin),
}

impl Spec {
    /// The kind of resource that this is the spec of.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Zone(_) => Kind::Zone,
            Self::Service(_) => Kind::Service,
            Self::Route(_) => Kind::Route,
            Self::FallbackPolicy(_) => Kind::FallbackPolicy,
            Self::Plugin(_) => Kind::Plugin,
        }
    }

    /// Every resource that this one names, with the path of the field that does.
    pub fn references(&self) -> Vec<(String, Key)> {
        let key = |kind, name: &Name| Key {
            kind,
            name: name.clone(),
        };
        let mut refs = Vec::new();
        match self {
            Self::Zone(zone) => {
                for (i, name) in zone.failover.iter().enumerate() {
                    refs.push((format!("spec.failover[{i}]"), key(Kind::Zone, name)));
                }
            }
            Self::Service(service) => {
                for (i, endpoint) in service.endpoints.iter().enumerate() {
                    refs.push((
                        format!("spec.endpoints[{i}].zone"),
                        key(Kind::Zone, &endpoint.zone),
                    ));
                }
            }
            Self::Route(route) => {
                for (i, rule) in route.rules.iter().enumerate() {
                    for (j, backend) in rule.backends.iter().enumerate() {
                        refs.push((
                            format!("spec.rules[{i}].backendRefs[{j}].service"),
                            key(Kind::Service, &backend.service),
                        ));
                    }
                    if let Some(fallback) = &rule.fallback {
                        refs.push((
                            format!("spec.rules[{i}].fallback"),
                            key(Kind::FallbackPolicy, fallback),
                        ));
                    }
                }
            }
            Self::FallbackPolicy(policy) => {
                for (i, rung) in policy.rungs.iter().enumerate() {
                    match rung {
                        Rung::Plugin { plugin, .. } => {
                            refs.push((
                                format!("spec.rungs[{i}].plugin.plugin"),
                                key(Kind::Plugin, plugin),
                            ));
                        }
                        Rung::Service { service } => {
                            refs.push((
                                format!("spec.rungs[{i}].service.service"),
                                key(Kind::Service, service),
                            ));
                        }
                        Rung::Static(_) => {}
                    }
                }
            }
            Self::Plugin(_) => {}
        }
        refs
    }
}

/// A failure domain and the proxies that accept traffic for its workloads.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Zone {
    /// The zone's proxies, each name once.
    pub proxies: Vec<ZoneProxy>,
    /// Where callers of this zone turn to, first choice first.
    pub failover: Vec<Name>,
}

/// A node's proxy, as others reach it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ZoneProxy {
    /// As in the proxy's certificate.
    pub name: Name,
    /// Its inbound listener.
    pub address: SocketAddr,
}

/// A named set of endpoints.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Service {
    /// How its endpoints are spoken to.
    pub protocol: Protocol,
    /// Each address once.
    pub endpoints: Vec<Endpoint>,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// When an endpoint that fails is left out.
    pub outlier: OutlierDetection,
    /// What the service may take of one proxy.
    pub pool: ConnectionPool,
}

/// How an endpoint is spoken to.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
}

/// One workload.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Endpoint {
    /// Where it listens, as its own node reaches it.
    pub address: SocketAddr,
    /// The zone that it is in.
    pub zone: Name,
    /// The proxy of that zone in front of it.
    pub proxy: Option<Name>,
}

/// Passive health: consecutive failures eject an endpoint for a time that grows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OutlierDetection {
    /// Failures in a row that eject.
    pub consecutive_5xx: u32,
    /// Length of the first ejection.
    pub base_ejection_time: Duration,
    /// Longest ejection, at least the first.
    pub max_ejection_time: Duration,
}

impl OutlierDetection {
    /// Envoy's numbers.
    pub const DEFAULT: Self = Self {
        consecutive_5xx: 5,
        base_ejection_time: Duration::from_secs(30),
        max_ejection_time: Duration::from_secs(300),
    };
}

/// Bounds for each proxy.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ConnectionPool {
    /// Requests under way at once.
    pub max_requests: u32,
    /// Idle HTTP/1.1 connections kept for each endpoint and worker.
    pub max_idle_per_endpoint: u32,
    /// How long an idle connection is kept.
    pub idle_timeout: Duration,
}

impl ConnectionPool {
    /// 1024 requests as in Envoy; 128 idle connections for a minute.
    pub const DEFAULT: Self = Self {
        max_requests: 1024,
        max_idle_per_endpoint: 128,
        idle_timeout: Duration::from_secs(60),
    };
}

/// Which requests go where.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Route {
    /// At least one.
    pub hostnames: Vec<HostMatch>,
    /// At least one.
    pub rules: Vec<RouteRule>,
}

/// A host that a route serves, lower case.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum HostMatch {
    /// Every host.
    Any,
    /// This host.
    Exact(Box<str>),
    /// Any host with at least one label before this suffix, which starts with a dot (".example").
    Suffix(Box<str>),
}

/// One rule of a route.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RouteRule {
    /// Any of these selects the rule; never empty (the parser puts the default in).
    pub matches: Vec<RouteMatch>,
    /// Where requests go; at least one with a weight above 0.
    pub backends: Vec<Backend>,
    /// From the request's head to the response's head; `None` is no limit.
    pub request_timeout: Option<Duration>,
    /// Attempts in all, at least 1.
    pub max_attempts: u8,
    /// What answers requests that fail.
    pub fallback: Option<Name>,
}

/// All that is set must hold.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RouteMatch {
    /// On the path.
    pub path: PathMatch,
    /// On the method.
    pub method: Option<Box<str>>,
    /// On headers.
    pub headers: Vec<HeaderMatch>,
}

/// A match on the path, without the query.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PathMatch {
    /// Byte for byte.
    Exact(Box<str>),
    /// Whole segments; stored without a trailing slash, so "/" is "".
    Prefix(Box<str>),
}

/// A match on one header, whose name is lower case.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HeaderMatch {
    /// Lower-case field name.
    pub name: Box<str>,
    /// What its value must be.
    pub value: ValueMatch,
}

/// A match on a header's value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ValueMatch {
    /// One of the values is this.
    Exact(Box<str>),
    /// One of the values starts with this.
    Prefix(Box<str>),
    /// The header is there.
    Present,
    /// The header is not there.
    Absent,
}

/// A service and its share.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Backend {
    /// The service's name.
    pub service: Name,
    /// Relative to the others; 0 sends nothing.
    pub weight: u32,
}

/// What answers when a call can't be served.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FallbackPolicy {
    /// The causes that lead here; never empty unless `on_statuses` isn't.
    pub on: Vec<Cause>,
    /// Upstream statuses that lead here too, sorted.
    pub on_statuses: Vec<u16>,
    /// Tried in order; at least one.
    pub rungs: Vec<Rung>,
    /// Leave out the header that says the answer is degraded.
    pub hide_header: bool,
}

/// Why a call failed.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Cause {
    /// No connection could be made.
    ConnectFailure,
    /// The deadline passed.
    Timeout,
    /// The upstream closed the connection early.
    Reset,
    /// No endpoint was healthy.
    NoEndpoint,
    /// A limit of the proxy was hit.
    Overflow,
    /// The upstream's status counts as failed.
    UpstreamStatus,
}

impl Cause {
    /// What a FallbackPolicy that names none acts on.
    pub const DEFAULT: [Self; 5] = [
        Self::ConnectFailure,
        Self::Timeout,
        Self::Reset,
        Self::NoEndpoint,
        Self::Overflow,
    ];

    /// The word used in traces, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ConnectFailure => "connect_failure",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::NoEndpoint => "no_endpoint",
            Self::Overflow => "overflow",
            Self::UpstreamStatus => "upstream_status",
        }
    }
}

/// One rung of the ladder.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Rung {
    /// Ask a plugin.
    Plugin {
        /// The plugin's name.
        plugin: Name,
        /// Handed to it as it stands.
        config: Arc<str>,
    },
    /// Answer with this.
    Static(Arc<StaticAnswer>),
    /// Send the request to another service.
    Service {
        /// The service's name.
        service: Name,
    },
}

/// A fixed answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StaticAnswer {
    /// 200 to 599.
    pub status: u16,
    /// Valid HTTP, no hop-by-hop fields, no Content-Length.
    pub headers: Vec<(Box<str>, Box<str>)>,
    /// The body.
    pub body: Box<str>,
}

/// A WebAssembly plugin.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Plugin {
    /// What it is for.
    pub kind: PluginKind,
    /// Absolute path of the component on the node.
    pub file: Box<str>,
    /// What the component must hash to.
    pub sha256: Option<[u8; 32]>,
    /// Linear memory of one instance, in bytes.
    pub memory_bytes: u64,
    /// Longest time of one call.
    pub call_timeout: Duration,
    /// Instances alive at once on one worker.
    pub max_instances: u32,
    /// Request body handed over, at most, in bytes; 0 hands none.
    pub max_body_bytes: u64,
    /// What a fault means for the request.
    pub on_fault: OnFault,
}

/// What a plugin is for.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PluginKind {
    /// Answers when a call failed.
    Fallback,
}

/// What a plugin's fault means.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum OnFault {
    /// The next rung is tried.
    NextRung,
    /// The ladder ends.
    Fail,
}

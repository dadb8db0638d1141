//! The policy, validated: what can be built here can be executed.
//!
//! Field by field this is `proto/leeward/v1/resources.proto` with defaults filled in; units, ranges and
//! meanings are documented there and enforced by `leeward-proto`, the only place that makes these values
//! from outside input.

mod access;
mod authorization;
mod backup;
mod between;
mod capture;
mod degradation;
mod drain;
mod fallback;
mod gateway;
mod kind;
mod plugin;
mod queue;
mod resilience;
mod rollout;
mod template;
mod workload;

pub use access::{AccessBinding, AccessPolicy, AccessRole, AccessSubject, SubjectPattern};
pub use authorization::{
    AuthorizationAction, AuthorizationCondition, AuthorizationMode, AuthorizationPolicy, AuthorizationRule,
    AuthorizationSource, AuthorizationSubject, AuthorizationTarget, JwksSource, JwtIssuer, ValuePattern,
};
pub use backup::{BackupPolicy, BackupRetention, RecoveryObjective};
pub use between::{DirectCallers, Selection, ZoneGateway};
pub use capture::{Capture, TcpSettings, UnknownDestination};
pub use degradation::{
    Cache, DegradationLevel, DegradationOverride, DegradationPolicy, DegradationTrigger, Fault, FeatureFlags,
    FlagCondition, Scope, Signal,
};
pub use drain::ZoneDrain;
pub use fallback::{Act, Cause, FallbackPolicy, Redirect, Rung, RungCause, StaticAnswer};
pub use gateway::{
    Gateway, GatewayLimits, GatewayListener, GatewayProtocol, GatewayTls, HttpsRedirect, Parent, TlsVersion,
};
pub use kind::Kind;
pub use plugin::{
    FilterRef, OnFault, Plugin, PluginAccess, PluginCanary, PluginFrom, PluginKind, PluginLimits,
    PluginPlace, PluginSource, Quarantine, RouterRef,
};
pub use queue::{Queue, QueueStore};
pub use rollout::{ErrorGate, LatencyGate, OnFailure, RolloutPolicy, RolloutStage, StageAmount, StageZones};
pub use template::{InvalidTemplate, Piece, Template, TemplateField};
pub use workload::{CgroupPattern, InvalidCgroup, Process, Workload};

pub use resilience::{
    AdaptiveConcurrency, AdmissionControl, BalancePolicy, BreakerMode, CheckKind, CircuitBreaker,
    CircuitOverride, ConnectionPool, Ewma, FailurePercentageDetection, HashKey, HealthCheck, Hedge, Hold,
    LoadBalancer, LoadShedding, OutlierDetection, OverrideTarget, PerCaller, Priority, RateLimit,
    RateLimitKey, RequestPriority, ResiliencePolicy, Retry, RetryBudget, RetryOn, SuccessRateDetection,
    ZoneFailover, ZoneMode,
};

use crate::Name;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

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
    /// Listeners for clients from outside.
    Gateway(Gateway),
    /// A WebAssembly plugin.
    Plugin(Plugin),
    /// What protects services from overload and failure.
    ResiliencePolicy(ResiliencePolicy),
    /// Holds a circuit open or closed.
    CircuitOverride(CircuitOverride),
    /// Feature flags.
    FeatureFlags(FeatureFlags),
    /// What a part of the mesh gives up, and when.
    DegradationPolicy(DegradationPolicy),
    /// Holds a level of a DegradationPolicy.
    DegradationOverride(DegradationOverride),
    /// Requests that were accepted and wait for their service.
    Queue(Queue),
    /// Who may do what with services.
    AuthorizationPolicy(AuthorizationPolicy),
    /// Which processes of a node get a certificate of their own.
    Workload(Workload),
    /// How a change goes out to proxies in steps.
    RolloutPolicy(RolloutPolicy),
    /// Who may do what with the control plane.
    AccessPolicy(AccessPolicy),
    /// When backups of the store are made.
    BackupPolicy(BackupPolicy),
    /// How much of the store may be lost, and how long it may take to be back.
    RecoveryObjective(RecoveryObjective),
}

impl Spec {
    /// The kind of resource that this is the spec of.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Zone(_) => Kind::Zone,
            Self::Service(_) => Kind::Service,
            Self::Route(_) => Kind::Route,
            Self::FallbackPolicy(_) => Kind::FallbackPolicy,
            Self::Gateway(_) => Kind::Gateway,
            Self::Plugin(_) => Kind::Plugin,
            Self::ResiliencePolicy(_) => Kind::ResiliencePolicy,
            Self::CircuitOverride(_) => Kind::CircuitOverride,
            Self::FeatureFlags(_) => Kind::FeatureFlags,
            Self::DegradationPolicy(_) => Kind::DegradationPolicy,
            Self::DegradationOverride(_) => Kind::DegradationOverride,
            Self::Queue(_) => Kind::Queue,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::Workload(_) => Kind::Workload,
            Self::RolloutPolicy(_) => Kind::RolloutPolicy,
            Self::AccessPolicy(_) => Kind::AccessPolicy,
            Self::BackupPolicy(_) => Kind::BackupPolicy,
            Self::RecoveryObjective(_) => Kind::RecoveryObjective,
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
                for (i, zone) in service.export_to.names().iter().enumerate() {
                    refs.push((format!("spec.exportTo[{i}]"), key(Kind::Zone, zone)));
                }
                for (i, endpoint) in service.endpoints.iter().enumerate() {
                    refs.push((
                        format!("spec.endpoints[{i}].zone"),
                        key(Kind::Zone, &endpoint.zone),
                    ));
                }
                for (path, zone) in service.balance.mode.zones() {
                    let path = format!("spec.loadBalancer.zoneFailover.{path}");
                    refs.push((path, key(Kind::Zone, zone)));
                }
                if let Some(policy) = &service.resilience {
                    refs.push(("spec.resilience".to_owned(), key(Kind::ResiliencePolicy, policy)));
                }
            }
            Self::Gateway(gateway) => {
                for (i, zone) in gateway.zones.iter().enumerate() {
                    refs.push((format!("spec.zones[{i}]"), key(Kind::Zone, zone)));
                }
            }
            Self::Route(route) => {
                for (i, parent) in route.parents.iter().enumerate() {
                    if let Parent::Gateway { gateway, .. } = parent {
                        refs.push((format!("spec.parentRefs[{i}].name"), key(Kind::Gateway, gateway)));
                    }
                }
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
                    match &rung.act {
                        Act::Service { service } => {
                            refs.push((
                                format!("spec.rungs[{i}].service.service"),
                                key(Kind::Service, service),
                            ));
                        }
                        Act::Queue { queue } => {
                            refs.push((format!("spec.rungs[{i}].queue.queue"), key(Kind::Queue, queue)));
                        }
                        Act::Zone { zones } => {
                            for (j, zone) in zones.iter().enumerate() {
                                let path = format!("spec.rungs[{i}].zone.zones[{j}]");
                                refs.push((path, key(Kind::Zone, zone)));
                            }
                        }
                        Act::Plugin { .. }
                        | Act::Static(_)
                        | Act::Stale { .. }
                        | Act::Redirect(_)
                        | Act::Fail { .. } => {}
                    }
                }
            }
            Self::CircuitOverride(held) => match &held.target {
                OverrideTarget::Service(name) => {
                    refs.push(("spec.service".to_owned(), key(Kind::Service, name)));
                }
                OverrideTarget::Route(name) => {
                    refs.push(("spec.route".to_owned(), key(Kind::Route, name)));
                }
            },
            Self::DegradationPolicy(policy) => {
                for (i, route) in policy.routes.iter().enumerate() {
                    refs.push((format!("spec.routes[{i}]"), key(Kind::Route, route)));
                }
                for (i, trigger) in policy.triggers.iter().enumerate() {
                    let field = match trigger.signal {
                        Signal::CircuitOpen { .. } => "circuitOpen",
                        Signal::ErrorRate { .. } => "errorRate.service",
                        Signal::Latency { .. } => "latency.service",
                        Signal::Saturation { .. } => "saturation.service",
                        Signal::BurnRate { .. } => "burnRate.service",
                    };
                    let service = trigger.signal.service();
                    refs.push((format!("spec.triggers[{i}].{field}"), key(Kind::Service, service)));
                }
            }
            Self::DegradationOverride(held) => {
                refs.push((
                    "spec.policy".to_owned(),
                    key(Kind::DegradationPolicy, &held.policy),
                ));
                for (i, zone) in held.zones.iter().enumerate() {
                    refs.push((format!("spec.zones[{i}]"), key(Kind::Zone, zone)));
                }
            }
            Self::Plugin(plugin) => {
                for (i, service) in plugin.access.services.iter().enumerate() {
                    refs.push((format!("spec.access.services[{i}]"), key(Kind::Service, service)));
                }
            }
            Self::AuthorizationPolicy(policy) => {
                for (i, service) in policy.services.iter().enumerate() {
                    refs.push((format!("spec.services[{i}]"), key(Kind::Service, service)));
                }
                for (path, source) in policy.sources() {
                    for (field, zones) in [("zones", &source.zones), ("notZones", &source.not_zones)] {
                        let zones = zones.iter().enumerate();
                        refs.extend(
                            zones.map(|(k, zone)| (format!("{path}.{field}[{k}]"), key(Kind::Zone, zone))),
                        );
                    }
                }
                for (path, target) in policy.targets() {
                    for (field, routes) in [("routes", &target.routes), ("notRoutes", &target.not_routes)] {
                        let routes = routes.iter().enumerate();
                        refs.extend(
                            routes
                                .map(|(k, route)| (format!("{path}.{field}[{k}]"), key(Kind::Route, route))),
                        );
                    }
                }
            }
            Self::Workload(workload) => {
                refs.push(("spec.zone".to_owned(), key(Kind::Zone, &workload.zone)));
            }
            Self::ResiliencePolicy(_)
            | Self::FeatureFlags(_)
            | Self::Queue(_)
            | Self::RolloutPolicy(_)
            | Self::AccessPolicy(_)
            | Self::BackupPolicy(_)
            | Self::RecoveryObjective(_) => {}
        }
        let plugins = self.plugins().into_iter();
        refs.extend(plugins.map(|(path, name, _)| (path, key(Kind::Plugin, name))));
        refs
    }

    /// Every plugin that it names, with the path of the field that does, and the kind of place that this is.
    pub fn plugins(&self) -> Vec<(String, &Name, PluginPlace)> {
        let mut named = Vec::new();
        match self {
            Self::Route(route) => {
                for (i, rule) in route.rules.iter().enumerate() {
                    for (j, filter) in rule.filters.iter().enumerate() {
                        let path = format!("spec.rules[{i}].filters[{j}].plugin");
                        named.push((path, &filter.plugin, PluginPlace::Filter));
                    }
                    if let Some(router) = &rule.router {
                        let path = format!("spec.rules[{i}].router.plugin");
                        named.push((path, &router.plugin, PluginPlace::Router));
                    }
                }
            }
            Self::FallbackPolicy(policy) => {
                for (i, rung) in policy.rungs.iter().enumerate() {
                    if let Act::Plugin { plugin, .. } = &rung.act {
                        named.push((
                            format!("spec.rungs[{i}].plugin.plugin"),
                            plugin,
                            PluginPlace::Rung,
                        ));
                    }
                }
            }
            Self::Zone(_)
            | Self::Service(_)
            | Self::Gateway(_)
            | Self::Plugin(_)
            | Self::ResiliencePolicy(_)
            | Self::CircuitOverride(_)
            | Self::FeatureFlags(_)
            | Self::DegradationPolicy(_)
            | Self::DegradationOverride(_)
            | Self::Queue(_)
            | Self::AuthorizationPolicy(_)
            | Self::Workload(_)
            | Self::RolloutPolicy(_)
            | Self::AccessPolicy(_)
            | Self::BackupPolicy(_)
            | Self::RecoveryObjective(_) => {}
        }
        named
    }
}

/// A failure domain and the proxies that accept traffic for its workloads.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Zone {
    /// The zone's proxies, each name once.
    pub proxies: Vec<ZoneProxy>,
    /// Where callers of this zone turn to, first choice first.
    pub failover: Vec<Name>,
    /// How proxies of other zones reach this zone's.
    pub transport: ZoneTransport,
    /// How this zone's proxies reach each other.
    pub transport_within: ZoneTransport,
    /// What it is like: where it is, whose laws hold there.
    pub labels: BTreeMap<Box<str>, Box<str>>,
    /// It is taken out of use for a while.
    pub drain: Option<ZoneDrain>,
    /// The proxies by which other zones reach it, each once; none: they reach every proxy themselves.
    pub gateways: Vec<ZoneGateway>,
    /// Requests of other zones that come by no gateway, where there are gateways.
    pub direct_callers: DirectCallers,
    /// The services that its callers may have from other zones. Names that no service has say nothing.
    pub imports: Selection,
    /// What its proxies do with captured connections.
    pub capture: Capture,
}

impl Zone {
    /// A zone of which nothing else is said.
    pub const fn new(proxies: Vec<ZoneProxy>, failover: Vec<Name>) -> Self {
        Self {
            proxies,
            failover,
            transport: ZoneTransport::Auto,
            transport_within: ZoneTransport::Tcp,
            labels: BTreeMap::new(),
            drain: None,
            gateways: Vec::new(),
            direct_callers: DirectCallers::Refuse,
            imports: Selection::All,
            capture: Capture::DEFAULT,
        }
    }

    /// A proxy of the zone.
    pub fn proxy(&self, name: &Name) -> Option<&ZoneProxy> {
        self.proxies.iter().find(|proxy| proxy.name == *name)
    }

    /// Whether both have a label of this key, with the same value.
    pub fn is_like(&self, other: &Self, key: &str) -> bool {
        let value = self.labels.get(key);
        value.is_some() && value == other.labels.get(key)
    }
}

/// How requests get from proxy to proxy.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ZoneTransport {
    /// QUIC, and TCP where that doesn't get through or is better.
    Auto,
    /// QUIC, but for changes of protocols.
    Quic,
    /// TCP.
    Tcp,
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
    /// Which endpoint gets a request.
    pub balance: LoadBalancer,
    /// Ask the endpoints how they are; `None` doesn't.
    pub health_check: Option<HealthCheck>,
    /// The ResiliencePolicy; `None` for the one that is named "default", or its defaults.
    pub resilience: Option<Name>,
    /// Requests that come while there is no endpoint.
    pub hold: Hold,
    /// The zones whose callers may have it from another zone.
    pub export_to: Selection,
    /// Where workloads call it that know nothing of the mesh, each once.
    pub addresses: Vec<SocketAddr>,
    /// What TLS clients call it; none of a service that isn't TCP.
    pub server_names: Vec<HostMatch>,
    /// If it is TCP.
    pub tcp: TcpSettings,
}

impl Service {
    /// A service with these endpoints and every default.
    pub fn new(endpoints: Vec<Endpoint>) -> Self {
        Self {
            protocol: Protocol::Http1,
            endpoints,
            connect_timeout: Duration::from_secs(1),
            outlier: OutlierDetection::DEFAULT,
            pool: ConnectionPool::DEFAULT,
            balance: LoadBalancer::DEFAULT,
            health_check: None,
            resilience: None,
            hold: Hold::DEFAULT,
            export_to: Selection::All,
            addresses: Vec::new(),
            server_names: Vec::new(),
            tcp: TcpSettings::DEFAULT,
        }
    }
}

/// How an endpoint is spoken to.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// Bytes.
    Tcp,
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
    /// Its share relative to the others, at least 1.
    pub weight: u32,
    /// What a subset is chosen by.
    pub labels: BTreeMap<Box<str>, Box<str>>,
}

impl Endpoint {
    /// A workload with no proxy in front of it, and every default.
    pub const fn new(address: SocketAddr, zone: Name) -> Self {
        Self {
            address,
            zone,
            proxy: None,
            weight: 1,
            labels: BTreeMap::new(),
        }
    }
}

/// Which requests go where.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Route {
    /// At least one.
    pub hostnames: Vec<HostMatch>,
    /// At least one.
    pub rules: Vec<RouteRule>,
    /// Who may send requests here; empty is the mesh alone.
    pub parents: Vec<Parent>,
}

impl Route {
    /// Whether workloads of the mesh may.
    pub fn is_for_mesh(&self) -> bool {
        self.parents.is_empty() || self.parents.contains(&Parent::Mesh)
    }

    /// Whether clients from outside may, by some gateway.
    pub fn is_for_gateways(&self) -> bool {
        self.parents.iter().any(|parent| *parent != Parent::Mesh)
    }
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
    /// Longest attempt; `None` is no limit of its own.
    pub attempt_timeout: Option<Duration>,
    /// Longest silence of a body; `None` is no limit.
    pub idle_timeout: Option<Duration>,
    /// When a failed attempt is made again.
    pub retry: Retry,
    /// What answers requests that fail.
    pub fallback: Option<Name>,
    /// A circuit of the rule's own.
    pub circuit_breaker: Option<CircuitBreaker>,
    /// All must let a request pass.
    pub rate_limits: Vec<RateLimit>,
    /// How important its requests are.
    pub priority: RequestPriority,
    /// The rule is passed over unless this holds.
    pub when: Option<FlagCondition>,
    /// Calls are made only while this holds.
    pub enabled: Option<FlagCondition>,
    /// Keep answers.
    pub cache: Option<Cache>,
    /// Make requests fail.
    pub fault: Option<Fault>,
    /// Plugins that its requests pass.
    pub filters: Vec<FilterRef>,
    /// The plugin that chooses among its backends.
    pub router: Option<RouterRef>,
}

impl RouteRule {
    /// A rule with every default.
    pub fn new(matches: Vec<RouteMatch>, backends: Vec<Backend>) -> Self {
        Self {
            matches,
            backends,
            request_timeout: Some(Duration::from_secs(15)),
            attempt_timeout: None,
            idle_timeout: Some(Duration::from_secs(300)),
            retry: Retry::standard(),
            fallback: None,
            circuit_breaker: None,
            rate_limits: Vec::new(),
            priority: RequestPriority::default(),
            when: None,
            enabled: None,
            cache: None,
            fault: None,
            filters: Vec::new(),
            router: None,
        }
    }
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
    /// Character for character, in any spelling.
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
    /// Only endpoints with all of these labels.
    pub subset: BTreeMap<Box<str>, Box<str>>,
    /// It has its share only of requests for which this holds.
    pub when: Option<FlagCondition>,
}

impl Backend {
    /// Every endpoint of a service.
    pub const fn new(service: Name, weight: u32) -> Self {
        Self {
            service,
            weight,
            subset: BTreeMap::new(),
            when: None,
        }
    }
}

//! What requests read: immutable, indexed, consistent with itself.

mod authorization;
mod destination;
mod gateway;
mod ladder;
mod plugin;
mod ports;
mod service;
mod tier;
mod way;
mod workload;

pub use authorization::{Asking, AuthorizationView, Decision, Denied, path_pattern, zone_of};
pub use destination::canonical;
pub use gateway::{GatewayView, Gateways};
pub use ladder::{ActView, DegradationView, FallbackView, HeldLevel, QueueView, RungView};
pub use plugin::{FilterView, PluginView, RouterView};
pub use ports::{ListenerView, PortView};
pub use service::{ServiceView, Subset};
pub use tier::{ExportedTo, Tier};
pub use way::{EndpointKey, EndpointView, Via};
pub use workload::Workloads;

pub(crate) use self::authorization::identity_matches;

use self::authorization::PolicyView;
use self::destination::Destinations;
use self::ladder::resolve;
use self::plugin::Plugins;
use self::ports::Ports;
use self::way::{Ways, own_gateways};
use crate::model::{
    Act, Backend, BreakerMode, Cache, Capture, CircuitBreaker, CircuitOverride, DegradationOverride, Fault,
    FlagCondition, OverrideTarget, PluginPlace, RateLimit, RequestPriority, ResiliencePolicy, Retry,
    RouteRule, Spec, Zone,
};
use crate::routes::{Head, RouteTable};
use crate::{Kind, Name, Resource};
use leeward_flags::FlagSet;
use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Whose snapshot it is: the local zone and the local endpoints depend on it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Viewer {
    /// The proxy's zone.
    pub zone: Name,
    /// The proxy's name.
    pub proxy: Name,
}

/// Everything a request may consult.
#[derive(Debug)]
pub struct Snapshot {
    /// The store's revision that this shows.
    pub generation: u64,
    /// The place among those that this proxy has published: a store that begins anew counts revisions from 1.
    pub sequence: u64,
    /// Whose it is.
    pub viewer: Viewer,
    table: RouteTable,
    rules: Vec<RuleView>,
    services: Vec<ServiceView>,
    service_by_name: HashMap<Arc<str>, ServiceIdx>,
    destinations: Destinations,
    capture: Capture,
    fallbacks: Vec<FallbackView>,
    plugins: Vec<PluginView>,
    queues: Vec<QueueView>,
    flags: FlagSet,
    degradations: Vec<DegradationView>,
    ports: Vec<PortView>,
    /// How many proxies each zone has.
    proxies: BTreeMap<Arc<str>, u32>,
    zones: Vec<Arc<str>>,
    /// The same with what is said of them: what was made of services holds for as long as they stay as they are.
    zones_seen: Arc<BTreeMap<Name, Zone>>,
    gateways: Gateways,
    workloads: Workloads,
}

macro_rules! index {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub struct $name(u32);

        impl $name {
            pub(crate) fn new(position: usize) -> Self {
                // A snapshot is bounded far below 2^32 entries; past that the index names nothing.
                Self(u32::try_from(position).unwrap_or(u32::MAX))
            }

            /// The position, for tables that run beside the snapshot's.
            pub const fn position(self) -> usize {
                self.0 as usize
            }
        }
    };
}

index! {
    /// Position of a rule in one snapshot.
    RuleIdx
}
index! {
    /// Position of a service in one snapshot.
    ServiceIdx
}
index! {
    /// Position of a fallback policy in one snapshot.
    FallbackIdx
}
index! {
    /// Position of a plugin in one snapshot.
    PluginIdx
}
index! {
    /// Position of a queue in one snapshot.
    QueueIdx
}

/// One rule of a route, ready to run.
#[derive(Debug)]
pub struct RuleView {
    /// The route's name.
    pub route: Arc<str>,
    /// The rule's position in its route.
    pub position: u32,
    /// The path of the rule's first match, as `http.route` has it in traces.
    pub pattern: Arc<str>,
    /// From the request's head to the response's head; `None` is no limit.
    pub request_timeout: Option<Duration>,
    /// Longest attempt; `None` is no limit of its own.
    pub attempt_timeout: Option<Duration>,
    /// Longest silence of a body; `None` is no limit.
    pub idle_timeout: Option<Duration>,
    /// When a failed attempt is made again.
    pub retry: Arc<Retry>,
    /// What answers requests that fail.
    pub fallback: Option<FallbackIdx>,
    /// Names the rule's own state (`ROUTE/POSITION`) across snapshots.
    pub id: Arc<str>,
    /// A circuit of the rule's own.
    pub circuit_breaker: Option<CircuitBreaker>,
    /// Its circuit is held for a while.
    pub held: Option<Held>,
    /// All must let a request pass.
    pub rate_limits: Arc<[RateLimit]>,
    /// How important its requests are.
    pub priority: RequestPriority,
    /// Calls are made only while this holds.
    pub enabled: Option<FlagCondition>,
    /// Keep answers.
    pub cache: Option<Cache>,
    /// Names what is kept across snapshots: [`Self::id`], and a hash of what the rule matches and where its requests
    /// go, so that another rule that comes to stand in its place gets nothing of it. Empty without a cache.
    pub cache_id: Arc<str>,
    /// Make requests fail.
    pub fault: Option<Arc<Fault>>,
    /// Whether flags, levels, a cache, a fault or a queue have a part in its requests.
    pub extras: bool,
    /// Plugins that its requests pass in this order, and its answers in the opposite one.
    pub filters: Arc<[FilterView]>,
    /// The plugin that chooses among its backends.
    pub router: Option<RouterView>,
    /// Whether it has filters or a router.
    pub has_plugins: bool,
    /// Whether workloads of the mesh may use it, and not only clients of gateways.
    pub for_mesh: bool,
    /// Whether clients of gateways may.
    pub for_gateways: bool,
    /// The rule is passed over unless this holds.
    pub when: Option<FlagCondition>,
    /// Each with the sum of the weights up to its own.
    backends: Vec<(u64, Target)>,
    /// The same with their own weights and conditions.
    choices: Vec<(u64, Target, Option<FlagCondition>)>,
    /// Whether one of them has a condition.
    conditional: bool,
}

/// Where a request goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Target {
    /// The service.
    pub service: ServiceIdx,
    /// Position in its [`ServiceView::subsets`]; `None` is every endpoint.
    pub subset: Option<usize>,
}

/// A circuit that somebody holds open or closed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Held {
    /// `ForceOpen` or `ForceClosed`.
    pub mode: BreakerMode,
    /// When it ends.
    pub until: SystemTime,
}

impl RuleView {
    /// Sum of the backends' weights, at least 1.
    pub fn total_weight(&self) -> u64 {
        self.backends.last().map_or(1, |&(upto, _)| upto)
    }

    /// The backend whose share contains `draw`, a number in `0..total_weight()`.
    pub fn backend(&self, draw: u64) -> Option<Target> {
        let at = self.backends.partition_point(|&(upto, _)| upto <= draw);
        self.backends.get(at).map(|&(_, target)| target)
    }

    /// Some backend, whatever its condition.
    pub fn any_backend(&self) -> Option<Target> {
        let weighty = self.backends.iter().find(|&&(upto, _)| upto > 0);
        weighty.map(|&(_, target)| target)
    }

    /// Whether a backend hangs on a flag; [`Self::backend_when`] chooses then.
    pub const fn has_conditional_backends(&self) -> bool {
        self.conditional
    }

    /// What a router chooses among: every backend, in the order of policy, with its weight (which may be 0: it gets only
    /// what a router gives it) and its condition.
    pub fn choices(&self) -> impl Iterator<Item = (u64, Target, Option<&FlagCondition>)> {
        let choices = self.choices.iter();
        choices.map(|(weight, target, when)| (*weight, *target, when.as_ref()))
    }

    /// A backend of those whose condition holds; `draw` gives a number below its argument, which is at least 1.
    pub fn backend_when(
        &self,
        holds: &mut dyn FnMut(&FlagCondition) -> bool,
        draw: &mut dyn FnMut(u64) -> u64,
    ) -> Option<Target> {
        let mut able: Vec<(u64, Target)> = Vec::with_capacity(self.choices.len());
        let mut total = 0u64;
        for (weight, target, when) in self.choices() {
            if when.is_none_or(&mut *holds) {
                total += weight;
                able.push((total, target));
            }
        }
        let drawn = draw(total.max(1));
        able.iter()
            .find(|(upto, _)| drawn < *upto)
            .map(|(_, target)| *target)
    }
}

impl Snapshot {
    /// A snapshot with nothing in it, before the first policy arrives.
    pub fn empty(viewer: Viewer) -> Self {
        Self::compile(viewer, 0, std::iter::empty())
    }

    /// Indexes resources. References that name nothing are left out (a backend that doesn't exist gets no
    /// requests, an endpoint behind an unknown proxy isn't reachable): a [`crate::World`] keeps such
    /// resources away from here, so this is only the last line of defence and never fails.
    pub fn compile<'a>(
        viewer: Viewer,
        generation: u64,
        resources: impl IntoIterator<Item = &'a Resource>,
    ) -> Self {
        Self::compile_after(None, viewer, generation, resources)
    }

    /// The same, and what was made of services that are as they were in `previous` is shared with it: neither to make nor to
    /// drop a snapshot costs as much as the endpoints of a large mesh then. It equals what [`Self::compile`] makes.
    pub fn compile_after<'a>(
        previous: Option<&Self>,
        viewer: Viewer,
        generation: u64,
        resources: impl IntoIterator<Item = &'a Resource>,
    ) -> Self {
        let mut by_kind: BTreeMap<Kind, BTreeMap<&Name, &Resource>> = BTreeMap::new();
        for resource in resources {
            by_kind
                .entry(resource.spec.kind())
                .or_default()
                .insert(&resource.name, resource);
        }
        let of = |kind| by_kind.get(&kind).into_iter().flatten();

        let zones: BTreeMap<&Name, &Zone> = of(Kind::Zone)
            .filter_map(|(name, r)| {
                if let Spec::Zone(zone) = &r.spec {
                    Some((*name, zone))
                } else {
                    None
                }
            })
            .collect();
        let ways = Ways::new(&viewer, &zones);
        let previous = previous.filter(|previous| previous.viewer == viewer && previous.has_seen(&zones));

        let plugins = Plugins::new(of(Kind::Plugin));
        let mut queues = Vec::new();
        let mut queue_by_name = HashMap::new();
        for (name, resource) in of(Kind::Queue) {
            if let Spec::Queue(queue) = &resource.spec {
                queue_by_name.insert(*name, QueueIdx::new(queues.len()));
                queues.push(QueueView {
                    name: name.to_shared(),
                    spec: Arc::new(queue.clone()),
                });
            }
        }
        let flags = FlagSet::merge(of(Kind::FeatureFlags).filter_map(|(_, r)| {
            if let Spec::FeatureFlags(flags) = &r.spec {
                Some(&*flags.set)
            } else {
                None
            }
        }));
        let held_levels: Vec<&DegradationOverride> = of(Kind::DegradationOverride)
            .filter_map(|(_, r)| {
                if let Spec::DegradationOverride(held) = &r.spec {
                    Some(held)
                } else {
                    None
                }
            })
            .collect();
        let degradations: Vec<_> = of(Kind::DegradationPolicy)
            .filter_map(|(name, r)| {
                if let Spec::DegradationPolicy(policy) = &r.spec {
                    Some(DegradationView::new(name, policy, &held_levels, &viewer.zone))
                } else {
                    None
                }
            })
            .collect();
        let has_degradations = !degradations.is_empty();
        let overrides: Vec<&CircuitOverride> = of(Kind::CircuitOverride)
            .filter_map(|(_, r)| {
                if let Spec::CircuitOverride(held) = &r.spec {
                    Some(held)
                } else {
                    None
                }
            })
            .collect();
        let policies: HashMap<&str, Arc<ResiliencePolicy>> = of(Kind::ResiliencePolicy)
            .filter_map(|(name, r)| {
                if let Spec::ResiliencePolicy(policy) = &r.spec {
                    Some((name.as_str(), Arc::new(policy.clone())))
                } else {
                    None
                }
            })
            .collect();
        let default = policies
            .get(ResiliencePolicy::DEFAULT_NAME)
            .cloned()
            .unwrap_or_else(|| Arc::new(ResiliencePolicy::DEFAULT));
        let authorizations: Vec<_> = of(Kind::AuthorizationPolicy)
            .filter_map(|(name, r)| PolicyView::of(name, &r.spec))
            .collect();
        let mut services = Vec::new();
        let mut service_by_name = HashMap::new();
        for (name, resource) in of(Kind::Service) {
            if let Spec::Service(service) = &resource.spec {
                service_by_name.insert(name.to_shared(), ServiceIdx::new(services.len()));
                let named = service
                    .resilience
                    .as_ref()
                    .and_then(|policy| policies.get(policy.as_str()));
                let same = previous.and_then(|previous| previous.made_of(name, service));
                let mut view = same.map_or_else(
                    || ServiceView::new(name, service, &viewer, &ways),
                    ServiceView::again,
                );
                view.resilience = Arc::clone(named.unwrap_or(&default));
                view.held = held(
                    &overrides,
                    |t| matches!(t, OverrideTarget::Service(s) if s == *name),
                );
                view.authorization = AuthorizationView::of(name, service.protocol, &authorizations);
                services.push(view);
            }
        }
        let service_of = |name: &Name| service_by_name.get(name.as_str()).copied();

        let mut fallbacks = Vec::new();
        let mut fallback_by_name = HashMap::new();
        for (name, resource) in of(Kind::FallbackPolicy) {
            if let Spec::FallbackPolicy(policy) = &resource.spec {
                fallback_by_name.insert(*name, FallbackIdx::new(fallbacks.len()));
                let queue_of = |queue: &Name| queue_by_name.get(queue).copied();
                let plugin_of = |name: &_, config: &_| plugins.find(PluginPlace::Rung, name, config);
                let resolve = |act: &Act| resolve(act, &plugin_of, &service_of, &queue_of);
                let entry_bytes = |idx: QueueIdx| {
                    queues
                        .get(idx.position())
                        .map_or(0, |q: &QueueView| q.spec.max_entry_bytes)
                };
                fallbacks.push(FallbackView::new(name, policy, &resolve, &entry_bytes));
            }
        }

        let mut table = RouteTable::default();
        let mut ports = Ports::new(of(Kind::Gateway).map(|(name, r)| (*name, *r)), &viewer);
        let mut rules = Vec::new();
        for (name, resource) in of(Kind::Route) {
            let Spec::Route(route) = &resource.spec else {
                continue;
            };
            for (position, rule) in (0..).zip(&route.rules) {
                let idx = RuleIdx::new(rules.len());
                for host in &route.hostnames {
                    for on in &rule.matches {
                        if route.is_for_mesh() {
                            table.add(host, on, idx, rule.when.is_some());
                        }
                        ports.add(&route.parents, (host, on), idx, rule.when.is_some());
                    }
                }
                let choices = weigh(&rule.backends, &service_of, &mut services);
                let fallback = rule
                    .fallback
                    .as_ref()
                    .and_then(|f| fallback_by_name.get(f).copied());
                let held = held(
                    &overrides,
                    |t| matches!(t, OverrideTarget::Route(r) if r == *name),
                );
                let mut view = RuleView::new(name, position, rule, choices, fallback, held);
                view.take_plugins(rule, &plugins);
                view.for_mesh = route.is_for_mesh();
                view.for_gateways = route.is_for_gateways();
                view.extras |= has_degradations
                    || fallback
                        .and_then(|idx: FallbackIdx| fallbacks.get(idx.position()))
                        .is_some_and(|ladder| ladder.queued_bytes > 0);
                rules.push(view);
            }
        }
        table.finish();
        let capture = zones
            .get(&viewer.zone)
            .map_or(Capture::DEFAULT, |zone| zone.capture);
        Self {
            generation,
            sequence: 0,
            zones: zones.keys().map(|zone| zone.to_shared()).collect(),
            zones_seen: previous.map_or_else(
                || {
                    let zones = zones.iter();
                    Arc::new(
                        zones
                            .map(|(name, zone)| ((*name).clone(), (*zone).clone()))
                            .collect(),
                    )
                },
                |previous| Arc::clone(&previous.zones_seen),
            ),
            gateways: own_gateways(&viewer, &zones),
            workloads: Workloads::new(&viewer, of(Kind::Workload).map(|(name, r)| (*name, *r))),
            viewer,
            table,
            rules,
            destinations: Destinations::of(&services),
            capture,
            services,
            service_by_name,
            fallbacks,
            plugins: plugins.views,
            queues,
            flags,
            degradations,
            ports: ports.finish(),
            proxies: zones
                .iter()
                .map(|(name, zone)| {
                    let count = u32::try_from(zone.proxies.len()).unwrap_or(u32::MAX);
                    (name.to_shared(), count)
                })
                .collect(),
        }
    }

    /// The rule for a request of the mesh.
    pub fn route(&self, head: &impl Head) -> Option<(RuleIdx, &RuleView)> {
        let idx = self.table.find(head)?;
        Some((idx, self.rules.get(idx.position())?))
    }

    /// The rule at an index of this snapshot.
    pub fn rule(&self, idx: RuleIdx) -> Option<&RuleView> {
        self.rules.get(idx.position())
    }

    /// The rule that [`RuleView::id`] names. It looks at one after the other.
    pub fn rule_with_id(&self, id: &str) -> Option<(RuleIdx, &RuleView)> {
        let mut rules = self.rules.iter().enumerate();
        let (position, rule) = rules.find(|(_, rule)| *rule.id == *id)?;
        Some((RuleIdx::new(position), rule))
    }

    /// Every rule, by index.
    pub fn rules(&self) -> &[RuleView] {
        &self.rules
    }

    /// The service at an index of this snapshot.
    pub fn service(&self, idx: ServiceIdx) -> Option<&ServiceView> {
        self.services.get(idx.position())
    }

    /// Every service, by index.
    pub fn services(&self) -> &[ServiceView] {
        &self.services
    }

    /// A service by its name.
    pub fn service_named(&self, name: &str) -> Option<ServiceIdx> {
        self.service_by_name.get(name).copied()
    }

    /// The service that workloads call by an address.
    pub fn service_at(&self, address: SocketAddr) -> Option<ServiceIdx> {
        self.destinations.at(address)
    }

    /// The service that TLS clients call by a name, in any case.
    pub fn service_called(&self, server_name: &str) -> Option<ServiceIdx> {
        self.destinations.called(server_name)
    }

    /// What is done with captured connections.
    pub const fn capture(&self) -> &Capture {
        &self.capture
    }

    /// The queue of a name.
    pub fn queue_named(&self, name: &str) -> Option<QueueIdx> {
        let at = self.queues.iter().position(|queue| *queue.name == *name);
        at.map(QueueIdx::new)
    }

    /// The fallback policy at an index of this snapshot.
    pub fn fallback(&self, idx: FallbackIdx) -> Option<&FallbackView> {
        self.fallbacks.get(idx.position())
    }

    /// The plugin at an index of this snapshot.
    pub fn plugin(&self, idx: PluginIdx) -> Option<&PluginView> {
        self.plugins.get(idx.position())
    }

    /// The queue at an index of this snapshot.
    pub fn queue(&self, idx: QueueIdx) -> Option<&QueueView> {
        self.queues.get(idx.position())
    }

    /// Every queue, by index.
    pub fn queues(&self) -> &[QueueView] {
        &self.queues
    }

    /// How many proxies all other zones have than this one.
    pub fn proxies_outside(&self, zone: &str) -> u32 {
        let others = self.proxies.iter().filter(|(name, _)| ***name != *zone);
        others.map(|(_, count)| *count).fold(0, u32::saturating_add)
    }

    /// The flags of policy.
    pub fn flags(&self) -> &FlagSet {
        &self.flags
    }

    /// What parts of the mesh give up, by name.
    pub fn degradations(&self) -> &[DegradationView] {
        &self.degradations
    }

    /// The names of all zones, sorted.
    pub fn zones(&self) -> &[Arc<str>] {
        &self.zones
    }

    /// The gateways of this proxy's zone.
    pub fn gateways(&self) -> &Gateways {
        &self.gateways
    }

    /// The workloads that this proxy attests.
    pub fn workloads(&self) -> &Workloads {
        &self.workloads
    }

    /// Every plugin, by index.
    pub fn plugins(&self) -> &[PluginView] {
        &self.plugins
    }
}

impl RuleView {
    fn new(
        route: &Name,
        position: u32,
        rule: &RouteRule,
        choices: Vec<(u64, Target, Option<FlagCondition>)>,
        fallback: Option<FallbackIdx>,
        held: Option<Held>,
    ) -> Self {
        let mut upto = 0u64;
        let cumulated = choices.iter().map(|(weight, target, _)| {
            upto += weight;
            (upto, *target)
        });
        let backends = cumulated.collect();
        Self {
            route: route.to_shared(),
            position,
            pattern: pattern(rule.matches.first().map(|m| &m.path)),
            request_timeout: rule.request_timeout,
            attempt_timeout: rule.attempt_timeout,
            idle_timeout: rule.idle_timeout,
            retry: Arc::new(rule.retry.clone()),
            fallback,
            id: format!("{route}/{position}").into(),
            circuit_breaker: rule.circuit_breaker,
            held,
            rate_limits: rule.rate_limits.as_slice().into(),
            priority: rule.priority.clone(),
            enabled: rule.enabled.clone(),
            cache: rule.cache,
            cache_id: rule
                .cache
                .map_or_else(|| Arc::from(""), |_| cache_id(route, position, rule)),
            fault: rule.fault.clone().map(Arc::new),
            extras: rule.enabled.is_some() || rule.cache.is_some() || rule.fault.is_some(),
            filters: Arc::default(),
            router: None,
            has_plugins: false,
            for_mesh: true,
            for_gateways: false,
            when: rule.when.clone(),
            backends,
            conditional: choices
                .iter()
                .any(|(weight, _, when)| *weight > 0 && when.is_some()),
            choices,
        }
    }
}

/// See [`RuleView::cache_id`]. It means something only within one process.
fn cache_id(route: &Name, position: u32, rule: &RouteRule) -> Arc<str> {
    let mut hasher = DefaultHasher::new();
    let RouteRule {
        matches,
        backends,
        when,
        router,
        ..
    } = rule;
    format!("{matches:?} {backends:?} {when:?} {router:?}").hash(&mut hasher);
    format!("{route}/{position}#{:016x}", hasher.finish()).into()
}

/// The override that ends last, of those for a target.
fn held(overrides: &[&CircuitOverride], target: impl Fn(&OverrideTarget) -> bool) -> Option<Held> {
    let of = overrides.iter().filter(|o| target(&o.target));
    of.max_by_key(|o| o.expire_time).map(|o| Held {
        mode: o.mode,
        until: o.expire_time,
    })
}

/// The local zone, then its failover list, then every other zone by name.
fn weigh(
    backends: &[Backend],
    service_of: &impl Fn(&Name) -> Option<ServiceIdx>,
    services: &mut [ServiceView],
) -> Vec<(u64, Target, Option<FlagCondition>)> {
    backends
        .iter()
        .filter_map(|backend| {
            let service = service_of(&backend.service)?;
            let subset = services.get_mut(service.position())?.subset(&backend.subset);
            let target = Target { service, subset };
            Some((u64::from(backend.weight), target, backend.when.clone()))
        })
        .collect()
}

fn pattern(path: Option<&crate::model::PathMatch>) -> Arc<str> {
    match path {
        Some(crate::model::PathMatch::Exact(path)) => Arc::from(&**path),
        Some(crate::model::PathMatch::Prefix(prefix)) => Arc::from(format!("{prefix}/*")),
        None => Arc::from("/*"),
    }
}

#[cfg(test)]
mod tests;

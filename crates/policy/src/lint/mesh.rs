//! A policy as rules look at it: everything by kind and name, and who uses what.

use super::{IGNORE_LABEL, Related};
use crate::model::{
    Act, AuthorizationPolicy, CircuitOverride, DegradationOverride, DegradationPolicy, FallbackPolicy,
    FeatureFlags, FlagCondition, Gateway, Plugin, Queue, ResiliencePolicy, Route, RouteRule, Service,
    Workload, Zone,
};
use crate::{Key, Kind, Name, Resource, Spec};
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

/// What there is of one kind.
pub(super) type Of<'a, T> = BTreeMap<&'a Name, &'a T>;

/// All resources of a policy.
pub(super) struct Mesh<'a> {
    pub(super) all: BTreeMap<Key, &'a Resource>,
    pub(super) zones: Of<'a, Zone>,
    pub(super) services: Of<'a, Service>,
    pub(super) routes: Of<'a, Route>,
    pub(super) ladders: Of<'a, FallbackPolicy>,
    pub(super) gateways: Of<'a, Gateway>,
    pub(super) plugins: Of<'a, Plugin>,
    pub(super) resilience: Of<'a, ResiliencePolicy>,
    pub(super) flags: Of<'a, FeatureFlags>,
    pub(super) queues: Of<'a, Queue>,
    pub(super) degradations: Of<'a, DegradationPolicy>,
    pub(super) held_levels: Of<'a, DegradationOverride>,
    pub(super) held_circuits: Of<'a, CircuitOverride>,
    pub(super) authorizations: Of<'a, AuthorizationPolicy>,
    pub(super) workloads: Of<'a, Workload>,
    /// The rules that have requests for each service.
    to: BTreeMap<&'a Name, Vec<Placed<'a>>>,
    /// The rules with each ladder.
    with: BTreeMap<&'a Name, Vec<Placed<'a>>>,
    pub(super) now: SystemTime,
}

/// A rule of a route, with its place.
#[derive(Clone, Copy)]
pub(super) struct Placed<'a> {
    pub(super) route: &'a Name,
    pub(super) whole: &'a Route,
    pub(super) position: usize,
    pub(super) rule: &'a RouteRule,
}

pub(super) fn key(kind: Kind, name: &Name) -> Key {
    Key {
        kind,
        name: name.clone(),
    }
}

/// What has a name, by that as it is written somewhere.
pub(super) fn find<'a, T>(all: &Of<'a, T>, name: &str) -> Option<(&'a Name, &'a T)> {
    let (name, it) = all.get_key_value(&Name::parse(name).ok()?)?;
    Some((*name, *it))
}

pub(super) fn related(kind: Kind, name: &Name, path: impl Into<String>) -> Related {
    Related {
        key: key(kind, name),
        path: path.into(),
    }
}

impl<'a> Placed<'a> {
    fn is(&self, other: &Self) -> bool {
        self.route == other.route && self.position == other.position
    }

    pub(super) fn key(&self) -> Key {
        key(Kind::Route, self.route)
    }

    /// The path of a field of the rule; the rule's own for an empty one.
    pub(super) fn at(&self, field: &str) -> String {
        match field {
            "" => format!("spec.rules[{}]", self.position),
            field => format!("spec.rules[{}].{field}", self.position),
        }
    }

    pub(super) fn related(&self, field: &str) -> Related {
        related(Kind::Route, self.route, self.at(field))
    }

    /// The backends that get a share of requests, with their places.
    pub(super) fn weighty(&self) -> impl Iterator<Item = (usize, &'a Name)> + use<'a> {
        let backends = self.rule.backends.iter().enumerate();
        backends
            .filter(|(_, backend)| backend.weight > 0)
            .map(|(i, backend)| (i, &backend.service))
    }

    /// The methods that its requests have; `None` is any.
    pub(super) fn methods(&self) -> Option<Vec<&'a str>> {
        self.rule.matches.iter().map(|on| on.method.as_deref()).collect()
    }
}

impl<'a> Mesh<'a> {
    pub(super) fn new(resources: impl IntoIterator<Item = &'a Resource>, now: SystemTime) -> Self {
        let mut mesh = Self {
            all: BTreeMap::new(),
            zones: BTreeMap::new(),
            services: BTreeMap::new(),
            routes: BTreeMap::new(),
            ladders: BTreeMap::new(),
            gateways: BTreeMap::new(),
            plugins: BTreeMap::new(),
            resilience: BTreeMap::new(),
            flags: BTreeMap::new(),
            queues: BTreeMap::new(),
            degradations: BTreeMap::new(),
            held_levels: BTreeMap::new(),
            held_circuits: BTreeMap::new(),
            authorizations: BTreeMap::new(),
            workloads: BTreeMap::new(),
            to: BTreeMap::new(),
            with: BTreeMap::new(),
            now,
        };
        for resource in resources {
            mesh.all.insert(resource.key(), resource);
            mesh.sort_in(&resource.name, &resource.spec);
        }
        let (mut to, mut with) = (BTreeMap::new(), BTreeMap::new());
        for placed in mesh.rules() {
            for (_, name) in placed.weighty() {
                let rules: &mut Vec<Placed<'a>> = to.entry(name).or_default();
                if rules.last().is_none_or(|last| !last.is(&placed)) {
                    rules.push(placed);
                }
            }
            if let Some(ladder) = &placed.rule.fallback {
                let rules: &mut Vec<Placed<'a>> = with.entry(ladder).or_default();
                rules.push(placed);
            }
        }
        (mesh.to, mesh.with) = (to, with);
        mesh
    }

    fn sort_in(&mut self, name: &'a Name, spec: &'a Spec) {
        match spec {
            Spec::Zone(it) => drop(self.zones.insert(name, it)),
            Spec::Service(it) => drop(self.services.insert(name, it)),
            Spec::Route(it) => drop(self.routes.insert(name, it)),
            Spec::FallbackPolicy(it) => drop(self.ladders.insert(name, it)),
            Spec::Gateway(it) => drop(self.gateways.insert(name, it)),
            Spec::Plugin(it) => drop(self.plugins.insert(name, it)),
            Spec::ResiliencePolicy(it) => drop(self.resilience.insert(name, it)),
            Spec::CircuitOverride(it) => drop(self.held_circuits.insert(name, it)),
            Spec::FeatureFlags(it) => drop(self.flags.insert(name, it)),
            Spec::DegradationPolicy(it) => drop(self.degradations.insert(name, it)),
            Spec::DegradationOverride(it) => drop(self.held_levels.insert(name, it)),
            Spec::Queue(it) => drop(self.queues.insert(name, it)),
            Spec::AuthorizationPolicy(it) => drop(self.authorizations.insert(name, it)),
            Spec::Workload(it) => drop(self.workloads.insert(name, it)),
            // Nothing of the data plane hangs on them.
            Spec::RolloutPolicy(_)
            | Spec::AccessPolicy(_)
            | Spec::BackupPolicy(_)
            | Spec::RecoveryObjective(_) => {}
        }
    }

    /// The plugin that a rung calls, if it calls one that is there.
    pub(super) fn plugin_of(&self, act: &Act) -> Option<&'a Plugin> {
        match act {
            Act::Plugin { plugin, .. } => self.plugins.get(plugin).copied(),
            Act::Static(_)
            | Act::Service { .. }
            | Act::Zone { .. }
            | Act::Stale { .. }
            | Act::Queue { .. }
            | Act::Redirect(_)
            | Act::Fail { .. } => None,
        }
    }

    /// Whether a resource's labels say that a rule isn't to look at it.
    pub(super) fn ignores(&self, key: &Key, code: &str) -> bool {
        let labels = self.all.get(key).map(|resource| &resource.labels);
        let codes = labels.and_then(|labels| labels.get(IGNORE_LABEL));
        codes.is_some_and(|codes| codes.split(',').any(|one| one.trim() == code))
    }

    pub(super) fn has(&self, key: &Key) -> bool {
        self.all.contains_key(key)
    }

    /// The names of a kind.
    pub(super) fn names(&self, kind: Kind) -> impl Iterator<Item = &str> {
        let of = self.all.keys().filter(move |key| key.kind == kind);
        of.map(|key| key.name.as_str())
    }

    /// Every rule of every route.
    pub(super) fn rules(&self) -> impl Iterator<Item = Placed<'a>> + '_ {
        self.routes.iter().flat_map(|(route, whole)| {
            let rules = whole.rules.iter().enumerate();
            rules.map(|(position, rule)| Placed {
                route,
                whole,
                position,
                rule,
            })
        })
    }

    /// The rules that have requests for a service.
    pub(super) fn rules_to(&self, service: &Name) -> impl Iterator<Item = Placed<'a>> + use<'a, '_> {
        self.to.get(service).into_iter().flatten().copied()
    }

    /// The rules with this ladder.
    pub(super) fn rules_with(&self, ladder: &Name) -> impl Iterator<Item = Placed<'a>> + use<'a, '_> {
        self.with.get(ladder).into_iter().flatten().copied()
    }

    /// The policy that protects a service, with its name if it has one.
    pub(super) fn resilience_of(&self, service: &Service) -> (Option<&'a Name>, &'a ResiliencePolicy) {
        let named = service.resilience.as_ref();
        let default = || find(&self.resilience, ResiliencePolicy::DEFAULT_NAME);
        let found = named.and_then(|name| find(&self.resilience, name.as_str()));
        match found.or_else(default) {
            Some((name, policy)) => (Some(name), policy),
            None => (None, &ResiliencePolicy::DEFAULT),
        }
    }

    /// The ladder of a rule.
    pub(super) fn ladder_of(&self, rule: &RouteRule) -> Option<&'a FallbackPolicy> {
        self.ladders.get(rule.fallback.as_ref()?).copied()
    }

    /// The time that a rule has for attempts: what its ladder doesn't keep. `None` is no limit.
    pub(super) fn attempts_time(&self, rule: &RouteRule) -> Option<Duration> {
        let whole = rule.request_timeout?;
        Some(whole - self.reserve(rule))
    }

    /// The time that is kept for a rule's ladder.
    pub(super) fn reserve(&self, rule: &RouteRule) -> Duration {
        let percent = self
            .ladder_of(rule)
            .map_or(0, |ladder| ladder.reserve_percent.min(100));
        rule.request_timeout
            .map_or(Duration::ZERO, |whole| whole * percent / 100)
    }

    /// Every condition on a flag: where it stands, and what it is.
    pub(super) fn conditions(&self) -> Vec<(Key, String, &'a FlagCondition)> {
        let mut found = Vec::new();
        for placed in self.rules() {
            let rule = placed.rule;
            let mut add = |field: String, condition: &'a Option<FlagCondition>| {
                found.extend(condition.as_ref().map(|it| (placed.key(), placed.at(&field), it)));
            };
            add("when".to_owned(), &rule.when);
            add("enabled".to_owned(), &rule.enabled);
            for (i, backend) in rule.backends.iter().enumerate() {
                add(format!("backendRefs[{i}].when"), &backend.when);
            }
            for (i, filter) in rule.filters.iter().enumerate() {
                add(format!("filters[{i}].when"), &filter.when);
            }
            if let Some(fault) = &rule.fault {
                add("fault.when".to_owned(), &fault.when);
            }
        }
        for (name, ladder) in &self.ladders {
            for (i, rung) in ladder.rungs.iter().enumerate() {
                let at = format!("spec.rungs[{i}].when");
                found.extend(
                    rung.when
                        .as_ref()
                        .map(|it| (key(Kind::FallbackPolicy, name), at, it)),
                );
            }
        }
        for (name, plugin) in &self.plugins {
            let on = key(Kind::Plugin, name);
            found.extend(
                plugin
                    .when
                    .as_ref()
                    .map(|it| (on.clone(), "spec.when".to_owned(), it)),
            );
            let canary = plugin.canary.as_ref().and_then(|canary| canary.when.as_ref());
            found.extend(canary.map(|it| (on.clone(), "spec.canary.when".to_owned(), it)));
        }
        found
    }
}

//! LW11x: what nothing uses, or what is over.

use super::mesh::{Mesh, key};
use super::{Rule, Severity, Sink};
use crate::model::ResiliencePolicy;
use crate::{Key, Kind};
use std::collections::BTreeSet;

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW111",
        severity: Severity::Info,
        title: "nothing uses a resource",
        why: "A Service that no route, ladder, plugin or address leads to, or a FallbackPolicy, Plugin, Queue or ResiliencePolicy that nothing names, has no effect. A plugin may name queues and services by itself, which can't be seen here.",
        check: unused,
    },
    Rule {
        code: "LW112",
        severity: Severity::Info,
        title: "an override has ended",
        why: "A CircuitOverride or DegradationOverride whose expireTime has passed holds nothing any more.",
        check: ended,
    },
];

fn unused(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    let mut used: BTreeSet<Key> = BTreeSet::new();
    for resource in mesh.all.values() {
        // What only guards, measures or holds something is no use of it.
        let uses = matches!(
            resource.spec.kind(),
            Kind::Route | Kind::FallbackPolicy | Kind::Plugin | Kind::Service
        );
        if uses {
            used.extend(resource.spec.references().into_iter().map(|(_, to)| to));
        }
    }
    for on in mesh.all.keys().filter(|on| !used.contains(*on)) {
        let fix = match on.kind {
            Kind::Service => {
                let called = mesh
                    .services
                    .get(&on.name)
                    .is_some_and(|service| !service.addresses.is_empty() || !service.server_names.is_empty());
                if called {
                    continue;
                }
                "name it in backendRefs of a Route, give it addresses, or delete it"
            }
            Kind::FallbackPolicy => "name it in fallback of a rule, or delete it",
            Kind::Plugin => "name it in a rule or a rung, or delete it",
            Kind::Queue => "name it in a queue rung, or delete it",
            Kind::ResiliencePolicy if on.name.as_str() == ResiliencePolicy::DEFAULT_NAME => continue,
            Kind::ResiliencePolicy => "name it in resilience of a Service, or delete it",
            Kind::Zone
            | Kind::Workload
            | Kind::RolloutPolicy
            | Kind::AccessPolicy
            | Kind::BackupPolicy
            | Kind::RecoveryObjective
            | Kind::FeatureFlags
            | Kind::Gateway
            | Kind::Route
            | Kind::CircuitOverride
            | Kind::DegradationPolicy
            | Kind::DegradationOverride
            | Kind::AuthorizationPolicy => continue,
        };
        sink.add(on, "metadata.name", "nothing uses it".to_owned(), fix);
    }
}

fn ended(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    let circuits = mesh.held_circuits.iter();
    let circuits = circuits.map(|(name, held)| (key(Kind::CircuitOverride, name), held.expire_time));
    let levels = mesh.held_levels.iter();
    let levels = levels.map(|(name, held)| (key(Kind::DegradationOverride, name), held.expire_time));
    for (on, end) in circuits.chain(levels) {
        if end <= mesh.now {
            sink.add(
                &on,
                "spec.expireTime",
                "it has ended and holds nothing".to_owned(),
                "delete it",
            );
        }
    }
}

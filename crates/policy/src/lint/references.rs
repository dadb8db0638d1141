//! LW10x: what names nothing, or what can't be there. A control plane refuses all of this.

use super::mesh::{Mesh, key, related};
use super::similar::did_you_mean;
use super::text::list;
use super::{Rule, Severity, Sink};
use crate::model::HostMatch;
use crate::{Key, Kind, Name, Spec};
use std::collections::BTreeMap;

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW101",
        severity: Severity::Error,
        title: "a reference names nothing",
        why: "A resource that names what isn't there is refused by the control plane, and left out by proxies.",
        check: dangling,
    },
    Rule {
        code: "LW102",
        severity: Severity::Error,
        title: "what is named can't be there",
        why: "A plugin runs only where its kind (its world) fits, and no request can be sent to a TCP service.",
        check: misfits,
    },
    Rule {
        code: "LW103",
        severity: Severity::Error,
        title: "an endpoint's proxy is not in its zone",
        why: "A proxy leaves out an endpoint whose hop it doesn't know: it is never gone around.",
        check: hops,
    },
    Rule {
        code: "LW104",
        severity: Severity::Error,
        title: "a route hangs on a listener that its gateway hasn't",
        why: "Nobody can come to the route by it.",
        check: sections,
    },
    Rule {
        code: "LW105",
        severity: Severity::Error,
        title: "a held level is not one of its policy",
        why: "A DegradationOverride whose level isn't there holds nothing.",
        check: levels,
    },
    Rule {
        code: "LW106",
        severity: Severity::Error,
        title: "two resources claim the same",
        why: "Which of two sets of flags holds a flag, or which of two services an address or server name is, would be for their names to decide.",
        check: claims,
    },
    Rule {
        code: "LW107",
        severity: Severity::Error,
        title: "the label that keeps requests at home is none of the zones'",
        why: "With `zoneFailover.within` requests go only to zones with the same value of a label. If no zone has it, every caller is bound to its own zone.",
        check: residency,
    },
];

fn dangling(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (on, resource) in &mesh.all {
        for (path, to) in resource.spec.references() {
            if !mesh.has(&to) {
                let near = did_you_mean(to.name.as_str(), mesh.names(to.kind));
                sink.add(
                    on,
                    path,
                    format!("there is no {to}"),
                    format!("add it, or name one that is there{near}"),
                );
            }
        }
    }
}

fn misfits(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (on, resource) in &mesh.all {
        let protocol_of = |name: &Name| Some(mesh.services.get(name)?.protocol);
        for (path, to, why) in resource.spec.tcp_misfits(protocol_of) {
            let (problem, fix) = why.split_once("; ").unwrap_or((why, "name another"));
            sink.add_with(
                on,
                path,
                format!("{to} {problem}"),
                fix,
                vec![super::Related {
                    key: to,
                    path: "spec.protocol".to_owned(),
                }],
            );
        }
        for (path, name, place) in resource.spec.plugins() {
            let Some(misfit) = mesh
                .plugins
                .get(name)
                .and_then(|plugin| place.misfit(plugin.kind))
            else {
                continue;
            };
            let (problem, fix) = misfit.split_once("; ").unwrap_or((&misfit, "name another"));
            let to = key(Kind::Plugin, name);
            let also = vec![related(Kind::Plugin, name, "spec.kind")];
            sink.add_with(on, path, format!("{to} {problem}"), fix, also);
        }
    }
}

fn hops(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        for (i, endpoint) in service.endpoints.iter().enumerate() {
            let (Some(proxy), Some(zone)) = (&endpoint.proxy, mesh.zones.get(&endpoint.zone)) else {
                continue;
            };
            if zone.proxy(proxy).is_some() {
                continue;
            }
            let known = zone.proxies.iter().map(|known| known.name.as_str());
            let near = did_you_mean(proxy.as_str(), known);
            sink.add_with(
                &key(Kind::Service, name),
                format!("spec.endpoints[{i}].proxy"),
                format!("{:?} is not a proxy of Zone/{}", proxy.as_str(), endpoint.zone),
                format!("add it to spec.proxies of that zone, or name one of its proxies{near}"),
                vec![related(Kind::Zone, &endpoint.zone, "spec.proxies")],
            );
        }
    }
}

fn sections(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, route) in &mesh.routes {
        let gateway = |name: &Name| mesh.gateways.get(name).copied();
        if let Some((i, why)) = route.missing_listener(gateway) {
            let (problem, fix) = why
                .split_once("; ")
                .unwrap_or((&why, "name one of its listeners"));
            sink.add(
                &key(Kind::Route, name),
                format!("spec.parentRefs[{i}].sectionName"),
                problem.to_owned(),
                fix,
            );
        }
    }
}

fn levels(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, held) in &mesh.held_levels {
        let Some(policy) = mesh.degradations.get(&held.policy) else {
            continue;
        };
        if policy.level(held.level.as_str()).is_none() {
            sink.add_with(
                &key(Kind::DegradationOverride, name),
                "spec.level",
                format!(
                    "{:?} is not a level of DegradationPolicy/{}",
                    held.level.as_str(),
                    held.policy
                ),
                format!(
                    "want one of {}",
                    list(policy.levels.iter().map(|level| &level.name))
                ),
                vec![related(Kind::DegradationPolicy, &held.policy, "spec.levels")],
            );
        }
    }
}

fn claims(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    let mut owners: BTreeMap<(Kind, String), Key> = BTreeMap::new();
    for (on, resource) in &mesh.all {
        let claimed: Vec<(String, String)> = match &resource.spec {
            Spec::FeatureFlags(flags) => {
                let keys = flags.set.keys();
                keys.map(|flag| (format!("spec.flags.{flag}"), format!("flag {flag:?}")))
                    .collect()
            }
            Spec::Service(service) => {
                let addresses = service.addresses.iter().enumerate();
                let addresses = addresses.map(|(i, a)| (format!("spec.addresses[{i}]"), a.to_string()));
                let names = service.server_names.iter().enumerate();
                let names = names
                    .map(|(i, n): (usize, &HostMatch)| (format!("spec.serverNames[{i}]"), n.to_string()));
                addresses.chain(names).collect()
            }
            Spec::Zone(_)
            | Spec::Route(_)
            | Spec::FallbackPolicy(_)
            | Spec::Gateway(_)
            | Spec::Plugin(_)
            | Spec::ResiliencePolicy(_)
            | Spec::CircuitOverride(_)
            | Spec::DegradationPolicy(_)
            | Spec::DegradationOverride(_)
            | Spec::Workload(_)
            | Spec::RolloutPolicy(_)
            | Spec::AccessPolicy(_)
            | Spec::BackupPolicy(_)
            | Spec::RecoveryObjective(_)
            | Spec::Queue(_)
            | Spec::AuthorizationPolicy(_) => continue,
        };
        for (path, what) in claimed {
            match owners.get(&(on.kind, what.clone())) {
                Some(owner) => sink.add_with(
                    on,
                    path,
                    format!("{what} is {owner}'s already"),
                    format!("want it in one {} only", on.kind),
                    vec![super::Related {
                        key: owner.clone(),
                        path: String::new(),
                    }],
                ),
                None => drop(owners.insert((on.kind, what), on.clone())),
            }
        }
    }
}

fn residency(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        let Some(label) = &service.balance.within else {
            continue;
        };
        let on = key(Kind::Service, name);
        if !mesh.zones.values().any(|zone| zone.labels.contains_key(label)) {
            let known: Vec<&str> = mesh
                .zones
                .values()
                .flat_map(|zone| zone.labels.keys())
                .map(|k| &**k)
                .collect();
            let near = did_you_mean(label, known.into_iter());
            sink.add(
                &on,
                "spec.loadBalancer.zoneFailover.within",
                format!("{label:?} is not a label of any zone, so that none could help another"),
                format!("add it to spec.labels of the zones{near}"),
            );
        }
        for (path, zone) in service.balance.mode.zones() {
            let lacks = mesh
                .zones
                .get(zone)
                .is_some_and(|zone| !zone.labels.contains_key(label));
            if lacks {
                sink.add_with(
                    &on,
                    format!("spec.loadBalancer.zoneFailover.{path}"),
                    format!("Zone/{zone} has no label {label:?}, which requests are bound to, so that it could serve nobody but its own callers"),
                    "add the label to it, or take it out of the list",
                    vec![related(Kind::Zone, zone, "spec.labels")],
                );
            }
        }
    }
}

//! LW6xx: zones that can't help each other, or don't take what they are given.

use super::mesh::{Mesh, key, related};
use super::similar::did_you_mean;
use super::text::list;
use super::{Rule, Severity, Sink};
use crate::model::{DirectCallers, Selection, Service, Zone};
use crate::{Kind, Name};
use std::collections::BTreeSet;

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW601",
        severity: Severity::Warning,
        title: "data residency leaves callers alone",
        why: "With `zoneFailover.within` requests stay in zones with the same value of a label. Callers of a zone that no other zone with endpoints is like have no failover, or nobody to serve them at all.",
        check: alone,
    },
    Rule {
        code: "LW602",
        severity: Severity::Warning,
        title: "a drained zone whose requests nobody can take",
        why: "All endpoints of the service are in zones that are drained.",
        check: drained,
    },
    Rule {
        code: "LW603",
        severity: Severity::Warning,
        title: "a drain leaves too few endpoints",
        why: "Less than half of the endpoints, by weight, are in zones that stay: each gets more than twice of what it had.",
        check: crowded,
    },
    Rule {
        code: "LW604",
        severity: Severity::Warning,
        title: "exports and imports contradict each other",
        why: "A service goes to a zone only if `exportTo` has that zone and the zone's `imports` have the service. Here one of them names the other, and the other doesn't.",
        check: contradicting,
    },
    Rule {
        code: "LW605",
        severity: Severity::Warning,
        title: "a zone imports a service that isn't there",
        why: "Such a name says nothing, and the service that was meant stays out.",
        check: unknown_imports,
    },
    Rule {
        code: "LW606",
        severity: Severity::Warning,
        title: "a zone is to serve and has no endpoints",
        why: "`activeActive` or `activePassive` lists a zone where the service has none: its share goes to the others.",
        check: hollow,
    },
    Rule {
        code: "LW607",
        severity: Severity::Info,
        title: "a zone's gateways can be gone around",
        why: "`directCallers: Allow` is for while gateways are brought in or taken out.",
        check: open,
    },
];

/// The zones where a service has endpoints.
fn homes(service: &Service) -> BTreeSet<&Name> {
    service.endpoints.iter().map(|endpoint| &endpoint.zone).collect()
}

fn alone(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        let Some(label) = &service.balance.within else {
            continue;
        };
        let homes = homes(service);
        // That no zone has it is another finding.
        if homes.len() < 2 || !mesh.zones.values().any(|zone| zone.labels.contains_key(label)) {
            continue;
        }
        let (mut without, mut bound) = (Vec::new(), Vec::new());
        for (zone, _) in mesh
            .zones
            .iter()
            .filter(|(_, zone)| !zone.proxies.is_empty() || zone.labels.contains_key(label))
        {
            let mut reachable = homes
                .iter()
                .filter(|home| service.is_at_home(zone, home, &mesh.zones));
            match (reachable.next(), reachable.next()) {
                (None, _) => without.push(*zone),
                (Some(only), None) if only == zone => bound.push(*zone),
                (Some(_), _) => {}
            }
        }
        let path = "spec.loadBalancer.zoneFailover.within";
        let on = key(Kind::Service, name);
        let tell = |zones: &[&Name]| {
            zones
                .iter()
                .map(|zone| related(Kind::Zone, zone, "spec.labels"))
                .collect()
        };
        if !without.is_empty() {
            sink.add_with(
                &on,
                path,
                format!("callers in {} can't have the service at all, since no zone with endpoints has the same {label:?}", list(&without)),
                "add endpoints in a zone like theirs, or correct the label",
                tell(&without),
            );
        }
        if !bound.is_empty() {
            sink.add_with(
                &on,
                path,
                format!("callers in {} have only their own zone, since no other with endpoints has the same {label:?}", list(&bound)),
                "add endpoints in another zone like it, or be sure that failing there is better than leaving it",
                tell(&bound),
            );
        }
    }
}

fn is_draining(mesh: &Mesh<'_>, zone: &Zone) -> bool {
    // One that is to begin counts: whoever plans it wants to know.
    zone.drain
        .as_ref()
        .is_some_and(|drain| drain.expire_time > mesh.now)
}

/// The weight of endpoints in zones that are drained and in those that stay.
fn weights(mesh: &Mesh<'_>, service: &Service) -> (u64, u64) {
    let weight = |wanted: bool| {
        let of = service.endpoints.iter().filter(|endpoint| {
            let drains = mesh
                .zones
                .get(&endpoint.zone)
                .is_some_and(|zone| is_draining(mesh, zone));
            drains == wanted
        });
        of.map(|endpoint| u64::from(endpoint.weight)).sum()
    };
    (weight(true), weight(false))
}

fn draining<'a>(mesh: &Mesh<'a>, service: &Service) -> Vec<&'a Name> {
    let homes = homes(service);
    let zones = mesh.zones.iter().filter(|(_, zone)| is_draining(mesh, zone));
    zones
        .map(|(name, _)| *name)
        .filter(|name| homes.contains(name))
        .collect()
}

fn drained(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        let (leaving, staying) = weights(mesh, service);
        if leaving > 0 && staying == 0 {
            let zones = draining(mesh, service);
            sink.add_with(
                &key(Kind::Service, name),
                "spec.endpoints",
                format!("all are in {}, which is drained", list(&zones)),
                "add endpoints in another zone before the drain, or don't drain it",
                zones
                    .iter()
                    .map(|zone| related(Kind::Zone, zone, "spec.drain"))
                    .collect(),
            );
        }
    }
}

fn crowded(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        let (leaving, staying) = weights(mesh, service);
        if leaving > staying && staying > 0 {
            let zones = draining(mesh, service);
            let factor = (leaving + staying) * 10 / staying;
            sink.add_with(
                &key(Kind::Service, name),
                "spec.endpoints",
                format!(
                    "with {} drained the others get {}.{} times of what they had",
                    list(&zones),
                    factor / 10,
                    factor % 10
                ),
                "add endpoints in the other zones, or drain less at once",
                zones
                    .iter()
                    .map(|zone| related(Kind::Zone, zone, "spec.drain"))
                    .collect(),
            );
        }
    }
}

fn contradicting(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        for (i, to) in service.export_to.names().iter().enumerate() {
            let Some(zone) = mesh.zones.get(to) else { continue };
            if !zone.imports.has(name.as_str()) {
                sink.add_with(
                    &key(Kind::Service, name),
                    format!("spec.exportTo[{i}]"),
                    format!("Zone/{to} doesn't import it"),
                    "add it to spec.imports of the zone, or take the zone out here",
                    vec![related(Kind::Zone, to, "spec.imports")],
                );
            }
        }
    }
    for (name, zone) in &mesh.zones {
        for (i, wanted) in zone.imports.names().iter().enumerate() {
            let Some(service) = mesh.services.get(wanted) else {
                continue;
            };
            let elsewhere = homes(service).into_iter().any(|home| home != *name);
            if elsewhere && !service.export_to.has(name.as_str()) {
                sink.add_with(
                    &key(Kind::Zone, name),
                    format!("spec.imports[{i}]"),
                    format!("Service/{wanted} isn't exported to this zone"),
                    "add the zone to spec.exportTo of the service, or take the service out here",
                    vec![related(Kind::Service, wanted, "spec.exportTo")],
                );
            }
        }
    }
}

fn unknown_imports(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, zone) in &mesh.zones {
        let Selection::Only(wanted) = &zone.imports else {
            continue;
        };
        for (i, service) in wanted.iter().enumerate() {
            if !mesh.services.contains_key(service) {
                let near = did_you_mean(service.as_str(), mesh.names(Kind::Service));
                sink.add(
                    &key(Kind::Zone, name),
                    format!("spec.imports[{i}]"),
                    format!("there is no Service/{service}"),
                    format!("name one that is there, or take it out{near}"),
                );
            }
        }
    }
}

fn hollow(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, service) in &mesh.services {
        let homes = homes(service);
        if homes.is_empty() {
            continue;
        }
        for (path, zone) in service.balance.mode.zones() {
            if !homes.contains(zone) {
                sink.add(
                    &key(Kind::Service, name),
                    format!("spec.loadBalancer.zoneFailover.{path}"),
                    format!("the service has no endpoints in {zone}"),
                    "add some, or take the zone out of the list",
                );
            }
        }
    }
}

fn open(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, zone) in &mesh.zones {
        if !zone.gateways.is_empty() && zone.direct_callers == DirectCallers::Allow {
            sink.add(
                &key(Kind::Zone, name),
                "spec.directCallers",
                "is Allow, so that other zones come past the gateways".to_owned(),
                "want Refuse once all callers go by them",
            );
        }
    }
}

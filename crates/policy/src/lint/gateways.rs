//! LW90x: gateways whose listeners conflict, or that nobody comes by.

use super::mesh::{Mesh, key, related};
use super::similar::did_you_mean;
use super::text::list;
use super::{Rule, Severity, Sink};
use crate::model::{Gateway, GatewayListener, GatewayProtocol, HostMatch, Parent};
use crate::{Kind, Name};

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW901",
        severity: Severity::Error,
        title: "listeners conflict",
        why: "Two gateways that share a proxy have listeners that can't stand beside each other.",
        check: clashes,
    },
    Rule {
        code: "LW902",
        severity: Severity::Warning,
        title: "a listener without routes",
        why: "All that comes to it is answered with 404. A route hangs on it by `parentRefs`.",
        check: idle,
    },
    Rule {
        code: "LW903",
        severity: Severity::Warning,
        title: "a gateway is to be on proxies that aren't there",
        why: "None of its zones has a proxy of this name, so that nothing listens there. (Proxies that are no hop for others need not be listed in a Zone.)",
        check: nowhere,
    },
    Rule {
        code: "LW904",
        severity: Severity::Warning,
        title: "a route's hosts and its listeners' have nothing in common",
        why: "A request comes to a listener by its host; none that comes is for the route.",
        check: apart,
    },
];

fn clashes(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, gateway) in &mesh.gateways {
        for (other, theirs) in mesh.gateways.range::<&Name, _>(..name) {
            if let Some((i, why)) = gateway.clash(theirs) {
                let (problem, fix) = why.split_once("; ").unwrap_or((&why, "want another port"));
                sink.add_with(
                    &key(Kind::Gateway, name),
                    format!("spec.listeners[{i}]"),
                    format!("{problem} of Gateway/{other}"),
                    fix,
                    vec![related(Kind::Gateway, other, "spec.listeners")],
                );
            }
        }
    }
}

/// Whether a route hangs on a listener.
fn hangs(placed: &[Parent], gateway: &Name, listener: &GatewayListener) -> bool {
    placed.iter().any(|parent| match parent {
        Parent::Mesh => false,
        Parent::Gateway {
            gateway: name,
            listener: section,
        } => name == gateway && section.as_ref().is_none_or(|section| *section == listener.name),
    })
}

fn idle(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, gateway) in &mesh.gateways {
        for (i, listener) in gateway.listeners.iter().enumerate() {
            let redirects = matches!(listener.protocol, GatewayProtocol::Http { redirect: Some(_) });
            let any = mesh
                .routes
                .values()
                .any(|route| hangs(&route.parents, name, listener));
            if !redirects && !any {
                sink.add(
                    &key(Kind::Gateway, name),
                    format!("spec.listeners[{i}]"),
                    format!("no route hangs on {}", listener.name),
                    format!(
                        "name it in parentRefs of a Route (name: {name}, sectionName: {}), or take it out",
                        listener.name
                    ),
                );
            }
        }
    }
}

fn nowhere(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, gateway) in &mesh.gateways {
        let zones = gateway.zones.iter().filter_map(|zone| mesh.zones.get(zone));
        let known: Vec<&str> = zones
            .flat_map(|zone| &zone.proxies)
            .map(|proxy| proxy.name.as_str())
            .collect();
        // Zones that list none say nothing of who is there.
        if known.is_empty() {
            continue;
        }
        for (i, proxy) in gateway.proxies.iter().enumerate() {
            if !known.contains(&proxy.as_str()) {
                let near = did_you_mean(proxy.as_str(), known.iter().copied());
                sink.add(
                    &key(Kind::Gateway, name),
                    format!("spec.proxies[{i}]"),
                    format!("{:?} is not a proxy of {}", proxy.as_str(), list(&gateway.zones)),
                    format!("name one that is there{near}"),
                );
            }
        }
    }
}

/// Whether some host fits both.
fn meet(one: &HostMatch, other: &HostMatch) -> bool {
    match (one, other) {
        (HostMatch::Any, _) | (_, HostMatch::Any) => true,
        (HostMatch::Exact(one), HostMatch::Exact(other)) => one == other,
        (HostMatch::Exact(host), suffix @ HostMatch::Suffix(_))
        | (suffix @ HostMatch::Suffix(_), HostMatch::Exact(host)) => suffix.fit(host).is_some(),
        (HostMatch::Suffix(one), HostMatch::Suffix(other)) => {
            one.ends_with(&**other) || other.ends_with(&**one)
        }
    }
}

fn listeners<'a>(mesh: &Mesh<'a>, parents: &[Parent]) -> Vec<(&'a Name, &'a GatewayListener)> {
    let all = mesh
        .gateways
        .iter()
        .flat_map(|(name, gateway): (&&'a Name, &&'a Gateway)| {
            gateway.listeners.iter().map(move |listener| (*name, listener))
        });
    all.filter(|(name, listener)| hangs(parents, name, listener))
        .collect()
}

fn apart(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, route) in &mesh.routes {
        let listeners = listeners(mesh, &route.parents);
        if route.is_for_mesh() || listeners.is_empty() {
            continue;
        }
        for (i, host) in route.hostnames.iter().enumerate() {
            if !listeners
                .iter()
                .any(|(_, listener)| meet(host, &listener.hostname))
            {
                let hosts = listeners.iter().map(|(gateway, listener)| {
                    format!("{gateway}/{} has {}", listener.name, listener.hostname)
                });
                sink.add_with(
                    &key(Kind::Route, name),
                    format!("spec.hostnames[{i}]"),
                    format!(
                        "nobody comes to {host} by the listeners that the route hangs on: {}",
                        list(hosts)
                    ),
                    "change the hostname here or there, or hang the route on another listener",
                    listeners
                        .iter()
                        .map(|(gateway, _)| related(Kind::Gateway, gateway, "spec.listeners"))
                        .collect(),
                );
            }
        }
    }
}

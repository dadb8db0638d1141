//! LW2xx: routes whose requests go elsewhere, or nowhere.

use super::mesh::{Mesh, Placed, related};
use super::text::list;
use super::{Related, Rule, Severity, Sink};
use crate::model::{Act, HeaderMatch, HostMatch, Parent, PathMatch, Protocol, RouteMatch, ValueMatch};
use crate::{Kind, Name, path};
use std::cmp::Reverse;
use std::collections::BTreeMap;

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW201",
        severity: Severity::Warning,
        title: "two routes own the same requests",
        why: "Among matches of the same host and path, one with a method goes before one without, then the one with more headers, then the route whose name is first. The other one gets none of these requests.",
        check: overlapping,
    },
    Rule {
        code: "LW202",
        severity: Severity::Warning,
        title: "an earlier rule takes every request of a match",
        why: "A match that another rule of the same route subsumes is never reached: same path, same method or none, and every header that the other wants. A rule with `when` hides nothing, since it is passed over while its flag is off.",
        check: shadowed,
    },
    Rule {
        code: "LW203",
        severity: Severity::Warning,
        title: "a match can never hold",
        why: "It wants a header to be there and not to be there.",
        check: contradictory,
    },
    Rule {
        code: "LW204",
        severity: Severity::Info,
        title: "a backend gets no requests",
        why: "Its weight is 0, and the rule has no router that could choose it all the same.",
        check: weightless,
    },
    Rule {
        code: "LW205",
        severity: Severity::Warning,
        title: "a subset has no endpoint",
        why: "No endpoint of the service has these labels: its share of the requests is held for `hold.maxWait`, and fails then.",
        check: subsets,
    },
    Rule {
        code: "LW206",
        severity: Severity::Warning,
        title: "a rule leads to a service without endpoints",
        why: "And the service holds no requests until it has some, so that all of them fail.",
        check: empty,
    },
    Rule {
        code: "LW207",
        severity: Severity::Info,
        title: "all backends hang on flags",
        why: "A request for which none of the conditions holds has nowhere to go.",
        check: conditional,
    },
    Rule {
        code: "LW208",
        severity: Severity::Warning,
        title: "a cache keeps nothing",
        why: "Only answers to GET are kept, and the rule has no GET or HEAD.",
        check: uncacheable,
    },
];

/// Pairs of a host and a match that are compared; what is beyond isn't looked at.
const MAX_ENTRIES: usize = 500_000;
/// Matches of one path that one is compared with.
const MAX_COMPARED: usize = 256;

/// Where requests come in.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Door<'a> {
    Mesh,
    Listener(&'a Name, &'a Name),
}

impl Door<'_> {
    fn name(self) -> String {
        match self {
            Self::Mesh => "in the mesh".to_owned(),
            Self::Listener(gateway, listener) => format!("at Gateway/{gateway}/{listener}"),
        }
    }
}

/// A match at one door and host.
#[derive(Clone, Copy)]
struct Entry<'a> {
    placed: Placed<'a>,
    position: usize,
    on: &'a RouteMatch,
}

/// Which table of the data plane a match is in.
type Bucket<'a> = (Door<'a>, String, bool, String);

/// How it fares there.
struct Hidden<'a> {
    entry: Entry<'a>,
    /// Hosts and doors where it stands.
    stands: usize,
    /// Where another takes everything: that one, the door, and the host.
    by: Vec<(Entry<'a>, Door<'a>, &'a HostMatch)>,
}

fn doors<'a>(mesh: &Mesh<'a>, parents: &'a [Parent], for_mesh: bool) -> Vec<Door<'a>> {
    let mut doors = Vec::new();
    if for_mesh {
        doors.push(Door::Mesh);
    }
    for parent in parents {
        let Parent::Gateway { gateway, listener } = parent else {
            continue;
        };
        let listeners = mesh.gateways.get(gateway).into_iter().flat_map(|g| &g.listeners);
        let named = listeners.filter(|known| listener.as_ref().is_none_or(|name| *name == known.name));
        doors.extend(named.map(|known| Door::Listener(gateway, &known.name)));
    }
    doors.sort_unstable();
    doors.dedup();
    doors
}

/// Every match that another takes requests of, by the order in which proxies look at them.
fn hidden<'a>(mesh: &Mesh<'a>) -> Vec<Hidden<'a>> {
    let mut all: Vec<Hidden<'a>> = Vec::new();
    let mut buckets: BTreeMap<Bucket<'a>, Vec<(usize, &'a HostMatch)>> = BTreeMap::new();
    let mut entries = 0;
    'rules: for placed in mesh.rules() {
        let doors = doors(mesh, &placed.whole.parents, placed.whole.is_for_mesh());
        for (position, on) in placed.rule.matches.iter().enumerate() {
            let entry = Entry { placed, position, on };
            let idx = all.len();
            all.push(Hidden {
                entry,
                stands: 0,
                by: Vec::new(),
            });
            let (exact, text) = match &on.path {
                PathMatch::Exact(text) => (true, text),
                PathMatch::Prefix(text) => (false, text),
            };
            for door in &doors {
                for host in &placed.whole.hostnames {
                    let bucket = (*door, host.to_string(), exact, path::of_policy(text).into_owned());
                    buckets.entry(bucket).or_default().push((idx, host));
                    entries += 1;
                    if entries >= MAX_ENTRIES {
                        break 'rules;
                    }
                }
            }
        }
    }
    for ((door, ..), mut bucket) in buckets {
        let at = |idx: usize| all.get(idx).map(|hidden| hidden.entry);
        // As proxies sort them: stable, so that the order of names and rules decides between equals.
        bucket.sort_by_key(|(idx, _)| at(*idx).map(|e| Reverse((e.on.method.is_some(), e.on.headers.len()))));
        let mut found = Vec::new();
        for (place, (idx, host)) in bucket.iter().enumerate() {
            let Some(entry) = at(*idx) else { continue };
            // The first of those that are looked at.
            let before = bucket.iter().take(place).skip(place.saturating_sub(MAX_COMPARED));
            let taker = before
                .filter_map(|(idx, _)| at(*idx))
                .find(|earlier| earlier.placed.rule.when.is_none() && subsumes(earlier.on, entry.on));
            found.push((*idx, *host, taker));
        }
        for (idx, host, taker) in found {
            if let Some(hidden) = all.get_mut(idx) {
                hidden.stands += 1;
                hidden.by.extend(taker.map(|taker| (taker, door, host)));
            }
        }
    }
    all.retain(|hidden| !hidden.by.is_empty());
    all
}

/// Whether the one holds whenever the other does, on the same path.
fn subsumes(one: &RouteMatch, other: &RouteMatch) -> bool {
    let method = one.method.is_none() || one.method == other.method;
    method
        && one
            .headers
            .iter()
            .all(|wanted| other.headers.iter().any(|has| implies(has, wanted)))
}

/// Whether a header that holds makes another hold.
fn implies(has: &HeaderMatch, wanted: &HeaderMatch) -> bool {
    if has.name != wanted.name {
        return false;
    }
    match (&has.value, &wanted.value) {
        (ValueMatch::Absent, ValueMatch::Absent) => true,
        (ValueMatch::Absent, _) | (_, ValueMatch::Absent) => false,
        (_, ValueMatch::Present) => true,
        (ValueMatch::Exact(has), ValueMatch::Exact(wanted)) => has == wanted,
        (ValueMatch::Exact(has) | ValueMatch::Prefix(has), ValueMatch::Prefix(wanted)) => {
            has.starts_with(&**wanted)
        }
        (ValueMatch::Prefix(_) | ValueMatch::Present, ValueMatch::Exact(_)) => false,
        (ValueMatch::Present, ValueMatch::Prefix(_)) => false,
    }
}

fn told_of(entry: &Entry<'_>) -> Related {
    entry.placed.related(&format!("matches[{}]", entry.position))
}

fn overlapping(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for Hidden { entry, stands, by } in hidden(mesh) {
        let others: Vec<_> = by
            .iter()
            .filter(|(taker, ..)| taker.placed.route != entry.placed.route)
            .collect();
        let Some((taker, door, _)) = others.first() else {
            continue;
        };
        let mut hosts: Vec<String> = others.iter().map(|(_, _, host)| host.to_string()).collect();
        hosts.sort_unstable();
        hosts.dedup();
        hosts.truncate(5);
        let (winner, place) = (taker.placed.key(), taker.placed.position);
        let why = if taker.on.headers.len() == entry.on.headers.len() {
            "its name is first"
        } else {
            "it wants more headers, of which this match has all"
        };
        let share = if by.len() == stands {
            "every request"
        } else {
            "requests"
        };
        let host = list(&hosts);
        sink.add_with(
            &entry.placed.key(),
            entry.placed.at(&format!("matches[{}]", entry.position)),
            format!(
                "{share} for {host} that it is for {} to {winner} (rules[{place}]) {}, since {why}",
                if by.len() == stands { "goes" } else { "go" },
                door.name(),
            ),
            "give them other hostnames or matches, or delete one",
            vec![told_of(taker)],
        );
    }
}

fn shadowed(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for Hidden { entry, stands, by } in hidden(mesh) {
        let own = by
            .iter()
            .filter(|(taker, ..)| taker.placed.route == entry.placed.route);
        // A rule that says the same twice harms nobody.
        let mut earlier = own.filter(|(taker, ..)| taker.placed.position != entry.placed.position);
        let Some((taker, ..)) = earlier.next() else {
            continue;
        };
        if by.len() < stands {
            continue;
        }
        let first = taker.placed.position;
        sink.add_with(
            &entry.placed.key(),
            entry.placed.at(&format!("matches[{}]", entry.position)),
            format!("is never reached: rules[{first}] matches all that it does and goes first"),
            format!(
                "put what is more special into the match, merge the rules, or take it before rules[{first}]"
            ),
            vec![told_of(taker)],
        );
    }
}

fn contradictory(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        for (i, on) in placed.rule.matches.iter().enumerate() {
            let absent = |name: &str| {
                let of = |h: &&HeaderMatch| *h.name == *name && h.value == ValueMatch::Absent;
                on.headers.iter().any(|h| of(&h))
            };
            let both = on
                .headers
                .iter()
                .position(|header| header.value != ValueMatch::Absent && absent(&header.name));
            if let Some(j) = both {
                let name = on.headers.get(j).map_or("", |header| &*header.name);
                sink.add(
                    &placed.key(),
                    placed.at(&format!("matches[{i}].headers[{j}]")),
                    format!(
                        "wants the header {name:?}, and another of the same match wants it not to be there"
                    ),
                    "keep one of them, or make two matches of it",
                );
            }
        }
    }
}

fn weightless(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules().filter(|placed| placed.rule.router.is_none()) {
        for (i, backend) in placed.rule.backends.iter().enumerate() {
            if backend.weight == 0 {
                sink.add(
                    &placed.key(),
                    placed.at(&format!("backendRefs[{i}].weight")),
                    format!(
                        "Service/{} has weight 0 and gets no requests of this rule",
                        backend.service
                    ),
                    "give it a weight, or take it out",
                );
            }
        }
    }
}

fn subsets(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        for (i, backend) in placed.rule.backends.iter().enumerate() {
            let Some(service) = mesh.services.get(&backend.service) else {
                continue;
            };
            let fits = |labels: &BTreeMap<Box<str>, Box<str>>| {
                backend.subset.iter().all(|(k, v)| labels.get(k) == Some(v))
            };
            let any = service.endpoints.iter().any(|endpoint| fits(&endpoint.labels));
            // Without any endpoint the subset has nothing to do with it.
            if backend.subset.is_empty() || service.endpoints.is_empty() || any {
                continue;
            }
            let wanted = list(backend.subset.iter().map(|(k, v)| format!("{k}={v}")));
            let known = service.endpoints.iter().flat_map(|endpoint| &endpoint.labels);
            let mut known: Vec<String> = known.map(|(k, v)| format!("{k}={v}")).collect();
            known.sort_unstable();
            known.dedup();
            known.truncate(8);
            let known = if known.is_empty() {
                "no labels at all".to_owned()
            } else {
                list(known)
            };
            sink.add_with(
                &placed.key(),
                placed.at(&format!("backendRefs[{i}].subset")),
                format!(
                    "no endpoint of Service/{} has {wanted}; they have {known}",
                    backend.service
                ),
                "change the subset, or label endpoints",
                vec![related(Kind::Service, &backend.service, "spec.endpoints")],
            );
        }
    }
}

fn empty(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        for (i, name) in placed.weighty() {
            let Some(service) = mesh.services.get(name) else {
                continue;
            };
            let lost = service.endpoints.is_empty() && service.hold.max_requests == 0;
            if lost && service.protocol != Protocol::Tcp {
                sink.add_with(
                    &placed.key(),
                    placed.at(&format!("backendRefs[{i}].service")),
                    format!("Service/{name} has no endpoints, and holds no requests until it has"),
                    "add endpoints, or set hold.maxRequests above 0 if it is started on demand",
                    vec![related(Kind::Service, name, "spec.endpoints")],
                );
            }
        }
    }
}

fn conditional(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        let mut weighty = placed.rule.backends.iter().filter(|backend| backend.weight > 0);
        if weighty.all(|backend| backend.when.is_some()) {
            sink.add(
                &placed.key(),
                placed.at("backendRefs"),
                "each backend with a weight has a condition, so that a request for which none holds has nowhere to go".to_owned(),
                "take the condition from one of them, as what is left",
            );
        }
    }
}

fn uncacheable(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules().filter(|placed| placed.rule.cache.is_some()) {
        let Some(methods) = placed.methods() else { continue };
        if !methods.iter().any(|method| matches!(*method, "GET" | "HEAD")) {
            let mut methods = methods;
            methods.sort_unstable();
            methods.dedup();
            sink.add(
                &placed.key(),
                placed.at("cache"),
                format!("keeps answers to GET, and the rule is for {} only", list(methods)),
                "take the cache out, or match GET",
            );
        }
    }
}

/// Whether a route of this name leads to a service, by its backends or a rung.
pub(super) fn leads_to(mesh: &Mesh<'_>, route: &Name, service: &Name) -> bool {
    let mut rules = mesh.routes.get(route).into_iter().flat_map(|route| &route.rules);
    rules.any(|rule| {
        let rungs = mesh.ladder_of(rule).into_iter().flat_map(|ladder| &ladder.rungs);
        rule.backends.iter().any(|backend| backend.service == *service)
            || rungs
                .into_iter()
                .any(|rung| matches!(&rung.act, Act::Service { service: to } if to == service))
    })
}

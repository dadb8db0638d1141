//! LW8xx: who may do what, where it can't be meant so.

use super::mesh::{Mesh, find, key, related};
use super::routes::leads_to;
use super::similar::did_you_mean;
use super::text::list;
use super::{Rule, Severity, Sink};
use crate::model::{
    AuthorizationAction, AuthorizationMode, AuthorizationPolicy, AuthorizationRule, AuthorizationSource,
    AuthorizationTarget, HostMatch,
};
use crate::snapshot::identity_matches;
use crate::{Kind, Name};
use std::collections::BTreeSet;

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW801",
        severity: Severity::Warning,
        title: "an authorization rule can never match",
        why: "What it wants it also excludes: each of the identities, zones, methods, paths, hosts, routes or values.",
        check: contradictory,
    },
    Rule {
        code: "LW802",
        severity: Severity::Warning,
        title: "an authorization rule is for routes that don't lead to its services",
        why: "No request to the policy's services comes by any of these routes.",
        check: strangers,
    },
    Rule {
        code: "LW803",
        severity: Severity::Warning,
        title: "an identity that no proxy has",
        why: "Proxies are `spiffe://DOMAIN/zone/ZONE/proxy/NAME`; the pattern names a zone, or a proxy of a zone, that isn't there.",
        check: nobody,
    },
    Rule {
        code: "LW804",
        severity: Severity::Warning,
        title: "an authorization rule that another one of its policy covers",
        why: "The other is the same, or for every request. It has no effect.",
        check: covered,
    },
    Rule {
        code: "LW805",
        severity: Severity::Warning,
        title: "what is allowed is denied for everybody",
        why: "Denials go first, and one of action Deny matches every request to the service.",
        check: denied,
    },
    Rule {
        code: "LW806",
        severity: Severity::Warning,
        title: "a route to a service that nobody may call",
        why: "Policies of action Allow are for the service, and none of their rules can match: what no rule allows is refused.",
        check: closed,
    },
    Rule {
        code: "LW807",
        severity: Severity::Warning,
        title: "a gateway's clients may not pass",
        why: "Clients from outside have no identity of the mesh, and every rule that allows something at the service goes by identities or zones.",
        check: outside,
    },
];

/// Whether each of what is wanted is excluded, too.
fn all_excluded<T: PartialEq>(wanted: &[T], excluded: &[T]) -> bool {
    !wanted.is_empty() && wanted.iter().all(|one| excluded.contains(one))
}

/// Whether each of some patterns of segments is within one that is excluded.
fn all_within(wanted: &[Box<str>], excluded: &[Box<str>]) -> bool {
    // A pattern is within another if that matches it as if it were a text: a `*` is a segment like any.
    !wanted.is_empty()
        && wanted
            .iter()
            .all(|one| excluded.iter().any(|not| identity_matches(not, one)))
}

/// The same of hosts.
fn hosts_within(wanted: &[HostMatch], excluded: &[HostMatch]) -> bool {
    let covers = |not: &HostMatch, one: &HostMatch| match (not, one) {
        (HostMatch::Any, _) => true,
        (not, HostMatch::Exact(host)) => not.fit(host).is_some(),
        (HostMatch::Suffix(not), HostMatch::Suffix(one)) => one.ends_with(&**not),
        (HostMatch::Exact(_) | HostMatch::Suffix(_), HostMatch::Any)
        | (HostMatch::Exact(_), HostMatch::Suffix(_)) => false,
    };
    let within = |one: &HostMatch| excluded.iter().any(|not| covers(not, one));
    excluded.contains(&HostMatch::Any) || !wanted.is_empty() && wanted.iter().all(within)
}

fn source_is_empty(source: &AuthorizationSource) -> Option<&'static str> {
    if all_within(&source.identities, &source.not_identities) {
        return Some("notIdentities");
    }
    let only_in = |identity: &str| zone_of_pattern(identity).map(str::to_owned);
    let zones: Option<BTreeSet<String>> = source.identities.iter().map(|id| only_in(id)).collect();
    let zones = zones.filter(|zones| !zones.is_empty());
    if let Some(zones) = &zones
        && !source.zones.is_empty()
        && !source.zones.iter().any(|zone| zones.contains(zone.as_str()))
    {
        return Some("zones");
    }
    if let Some(zones) = &zones
        && zones
            .iter()
            .all(|zone| source.not_zones.iter().any(|not| not.as_str() == zone))
    {
        return Some("notZones");
    }
    all_excluded(&source.zones, &source.not_zones).then_some("notZones")
}

fn target_is_empty(target: &AuthorizationTarget) -> Option<&'static str> {
    if all_excluded(&target.methods, &target.not_methods) {
        Some("notMethods")
    } else if all_within(&target.paths, &target.not_paths)
        || target.not_paths.iter().any(|path| &**path == "/*")
    {
        Some("notPaths")
    } else if hosts_within(&target.hostnames, &target.not_hostnames) {
        Some("notHostnames")
    } else if all_excluded(&target.routes, &target.not_routes) {
        Some("notRoutes")
    } else {
        None
    }
}

/// Why a rule can match nothing: the field, and the one that excludes what it wants.
fn impossible(rule: &AuthorizationRule) -> Option<(String, &'static str)> {
    let sources: Option<Vec<_>> = rule.from.iter().map(source_is_empty).collect();
    if let Some(first) = sources.as_ref().and_then(|all| all.first()) {
        return Some(("from".to_owned(), first));
    }
    let targets: Option<Vec<_>> = rule.to.iter().map(target_is_empty).collect();
    if let Some(first) = targets.as_ref().and_then(|all| all.first()) {
        return Some(("to".to_owned(), first));
    }
    let mut conditions = rule.when.iter();
    let at = conditions.position(|condition| all_excluded(&condition.values, &condition.not_values))?;
    Some((format!("when[{at}]"), "notValues"))
}

fn contradictory(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, policy) in &mesh.authorizations {
        for (i, rule) in policy.rules.iter().enumerate() {
            if let Some((field, by)) = impossible(rule) {
                sink.add(
                    &key(Kind::AuthorizationPolicy, name),
                    format!("spec.rules[{i}].{field}"),
                    format!("can never match: {by} excludes all that is wanted"),
                    "take out what is wanted or what is excluded",
                );
            }
        }
    }
}

fn strangers(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, policy) in &mesh.authorizations {
        if policy.services.is_empty() {
            continue;
        }
        for (path, target) in policy.targets() {
            let known: Vec<&Name> = target
                .routes
                .iter()
                .filter(|route| mesh.routes.contains_key(route))
                .collect();
            let leads = |route: &&Name| {
                policy
                    .services
                    .iter()
                    .any(|service| leads_to(mesh, route, service))
            };
            if !known.is_empty() && known.len() == target.routes.len() && !known.iter().any(leads) {
                let right: BTreeSet<&Name> = policy
                    .services
                    .iter()
                    .flat_map(|service| mesh.rules_to(service))
                    .map(|placed| placed.route)
                    .collect();
                let right = if right.is_empty() {
                    "no route does".to_owned()
                } else {
                    format!("those that do are {}", list(right))
                };
                sink.add_with(
                    &key(Kind::AuthorizationPolicy, name),
                    format!("{path}.routes"),
                    format!(
                        "{} {} to {}",
                        list(&known),
                        if known.len() == 1 {
                            "doesn't lead"
                        } else {
                            "don't lead"
                        },
                        list(&policy.services)
                    ),
                    format!("name a route that does; {right}"),
                    known
                        .iter()
                        .map(|route| related(Kind::Route, route, "spec.rules"))
                        .collect(),
                );
            }
        }
    }
}

/// The zone that a pattern of identities names, if it names one.
fn zone_of_pattern(pattern: &str) -> Option<&str> {
    let mut segments = pattern.strip_prefix("spiffe://")?.split('/').skip(1);
    let zone = (segments.next() == Some("zone"))
        .then(|| segments.next())
        .flatten()?;
    (zone != "*").then_some(zone)
}

fn proxy_of_pattern(pattern: &str) -> Option<&str> {
    let segments: Vec<&str> = pattern.strip_prefix("spiffe://")?.split('/').collect();
    let ["zone", _, "proxy", proxy] = segments.get(1..)? else {
        return None;
    };
    (*proxy != "*").then_some(*proxy)
}

fn nobody(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, policy) in &mesh.authorizations {
        let on = key(Kind::AuthorizationPolicy, name);
        for (path, source) in policy.sources() {
            for (i, pattern) in source.identities.iter().enumerate() {
                let Some(zone) = zone_of_pattern(pattern) else {
                    continue;
                };
                let at = format!("{path}.identities[{i}]");
                let Some((in_zone, known)) = find(&mesh.zones, zone) else {
                    let near = did_you_mean(zone, mesh.names(Kind::Zone));
                    let fix = format!("name a zone that is there{near}");
                    sink.add(
                        &on,
                        at,
                        format!("{pattern:?} is of the zone {zone:?}, and there is no Zone/{zone}"),
                        fix,
                    );
                    continue;
                };
                let Some(proxy) = proxy_of_pattern(pattern) else {
                    continue;
                };
                if !known.proxies.iter().any(|p| p.name.as_str() == proxy) {
                    let near = did_you_mean(proxy, known.proxies.iter().map(|p| p.name.as_str()));
                    sink.add_with(
                        &on,
                        at,
                        format!("{pattern:?} names a proxy that Zone/{zone} doesn't list"),
                        format!("add it to spec.proxies of the zone, or name one that is there{near}"),
                        vec![related(Kind::Zone, in_zone, "spec.proxies")],
                    );
                }
            }
        }
    }
}

/// Whether a rule is for every request.
fn is_for_all(rule: &AuthorizationRule) -> bool {
    let anybody = rule.from.is_empty() || rule.from.contains(&AuthorizationSource::default());
    let anything = rule.to.is_empty() || rule.to.contains(&AuthorizationTarget::default());
    // A source that says nothing says nothing of who asks.
    anybody && anything && rule.when.is_empty()
}

fn covered(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, policy) in &mesh.authorizations {
        let rules = &policy.rules;
        for (i, rule) in rules.iter().enumerate() {
            let covers = |(j, other): &(usize, &AuthorizationRule)| {
                *j != i && (is_for_all(other) && (!is_for_all(rule) || *j < i) || *other == rule && *j < i)
            };
            if let Some((j, _)) = rules.iter().enumerate().find(covers) {
                sink.add(
                    &key(Kind::AuthorizationPolicy, name),
                    format!("spec.rules[{i}]"),
                    format!("rules[{j}] matches all that it does"),
                    format!(
                        "take one of them out; if rules[{j}] isn't to be for every request, say for which"
                    ),
                );
            }
        }
    }
}

/// The policies of a kind that are enforced for a service.
fn enforced<'a>(
    mesh: &Mesh<'a>,
    service: &Name,
    action: AuthorizationAction,
) -> Vec<(&'a Name, &'a AuthorizationPolicy)> {
    let all = mesh.authorizations.iter().map(|(name, policy)| (*name, *policy));
    let of = all.filter(|(_, policy)| {
        policy.action == action
            && policy.mode == AuthorizationMode::Enforce
            && (policy.services.is_empty() || policy.services.contains(service))
    });
    of.collect()
}

/// What denies every request to a service: the policy, and the rule's position.
fn denial<'a>(mesh: &Mesh<'a>, service: &Name) -> Option<(&'a Name, usize)> {
    let denials = enforced(mesh, service, AuthorizationAction::Deny);
    denials
        .into_iter()
        .find_map(|(deny, policy)| Some((deny, policy.rules.iter().position(is_for_all)?)))
}

fn denied(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, policy) in &mesh.authorizations {
        if policy.action != AuthorizationAction::Allow
            || policy.mode != AuthorizationMode::Enforce
            || policy.rules.is_empty()
        {
            continue;
        }
        let of = |service: &&Name| policy.services.is_empty() || policy.services.contains(service);
        let services: Vec<&Name> = mesh.services.keys().copied().filter(of).collect();
        let by: Option<Vec<(&Name, usize)>> = services.iter().map(|service| denial(mesh, service)).collect();
        if let Some((deny, at)) = by.and_then(|by| by.first().copied()) {
            sink.add_with(
                &key(Kind::AuthorizationPolicy, name),
                "spec.rules",
                format!("allow nothing: rules[{at}] of AuthorizationPolicy/{deny} denies every request to {}", list(services)),
                "say in the denial for which requests it is; what no policy allows is refused without it, too",
                vec![related(Kind::AuthorizationPolicy, deny, format!("spec.rules[{at}]"))],
            );
        }
    }
}

fn closed(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules() {
        for (i, service) in placed.weighty() {
            let allows: Vec<_> = enforced(mesh, service, AuthorizationAction::Allow);
            let none = |(_, policy): &(&Name, &AuthorizationPolicy)| {
                policy.rules.iter().all(|rule| impossible(rule).is_some())
            };
            if !allows.is_empty() && allows.iter().all(none) {
                let policies = allows
                    .iter()
                    .map(|(name, _)| related(Kind::AuthorizationPolicy, name, "spec.rules"));
                sink.add_with(
                    &placed.key(),
                    placed.at(&format!("backendRefs[{i}].service")),
                    format!(
                        "nobody may call Service/{service}: {} {} nothing",
                        list(
                            allows
                                .iter()
                                .map(|(name, _)| format!("AuthorizationPolicy/{name}"))
                        ),
                        if allows.len() == 1 { "allows" } else { "allow" }
                    ),
                    "add a policy of action Allow that names the service and who may call it",
                    policies.collect(),
                );
            }
        }
    }
}

fn outside(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for placed in mesh.rules().filter(|placed| placed.whole.is_for_gateways()) {
        for (i, service) in placed.weighty() {
            let allows: Vec<_> = enforced(mesh, service, AuthorizationAction::Allow);
            let mut rules = allows
                .iter()
                .flat_map(|(_, policy)| policy.rules.iter())
                .peekable();
            if rules.peek().is_none() {
                continue;
            }
            let by_identity = |rule: &AuthorizationRule| {
                !rule.from.is_empty()
                    && rule
                        .from
                        .iter()
                        .all(|source| *source != AuthorizationSource::default())
            };
            if rules.all(by_identity) {
                sink.add_with(
                    &placed.key(),
                    placed.at(&format!("backendRefs[{i}].service")),
                    format!("every rule that allows something at Service/{service} goes by identities or zones, which clients from outside haven't"),
                    "add a rule that goes by routes, paths or tokens (to, when), or take the gateway from parentRefs",
                    allows
                        .iter()
                        .map(|(name, _)| related(Kind::AuthorizationPolicy, name, "spec.rules"))
                        .collect(),
                );
            }
        }
    }
}

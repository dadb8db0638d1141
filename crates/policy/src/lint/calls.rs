//! LW42x: what one request may become on its way through services that call others.
//!
//! Who calls whom is known of gateways (by their routes), of services whose proxies an AuthorizationPolicy lets call another
//! service, and of services that say it in the label [`CALLS_LABEL`].

use super::mesh::{Mesh, Placed, find, key};
use super::similar::did_you_mean;
use super::text::{duration, list};
use super::{Related, Rule, Severity, Sink};
use crate::model::{AuthorizationAction, AuthorizationMode, AuthorizationPolicy, Retry, Service};
use crate::{Kind, Name};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW421",
        severity: Severity::Warning,
        title: "retries multiply along a chain of calls",
        why: "If each hop may try several times, the last one may see the product of them for one request. A proxy doesn't retry what is a retry of the hop before, but only where services pass `tracestate` on. Retry budgets bound what that adds to the load. It is found where more than 100 attempts, or more than twice the load, can come of one request.",
        check: amplification,
    },
    Rule {
        code: "LW422",
        severity: Severity::Warning,
        title: "a call may take longer than whoever waits for it",
        why: "The caller's own time is up while the service that it calls still works, for nobody. (Services should send on what is left of `leeward-timeout`; nothing does that for them.)",
        check: longer,
    },
    Rule {
        code: "LW423",
        severity: Severity::Warning,
        title: "a declared call leads nowhere",
        why: "The label `lint.leeward.dev/calls` of a Service names services that it calls, apart by commas.",
        check: declared,
    },
];

/// The label of a Service that names the services which it calls, apart by commas.
pub const CALLS_LABEL: &str = "lint.leeward.dev/calls";

/// Attempts of one request, at the end of a chain, that are too many.
const MAX_ATTEMPTS: u64 = 100;
/// What retries may add to the load at the end of a chain, in percent of it.
const MAX_LOAD: u64 = 200;
/// The longest chain that is followed.
const MAX_HOPS: usize = 8;

/// How a service is called.
#[derive(Clone, Copy, Debug)]
struct Hop {
    /// Attempts and hedges of one call.
    attempts: u64,
    /// What budgets let it become, in percent.
    load: u64,
}

/// A chain of calls to a service.
#[derive(Clone, Debug)]
struct Chain<'a> {
    attempts: u64,
    load: u64,
    path: Vec<&'a Name>,
    /// Whether a client from outside is at its beginning.
    outside: bool,
}

/// Who calls whom.
fn graph<'a>(mesh: &Mesh<'a>) -> BTreeMap<&'a Name, BTreeSet<&'a Name>> {
    let mut calls: BTreeMap<&'a Name, BTreeSet<&'a Name>> = BTreeMap::new();
    for (name, called) in declared_calls(mesh) {
        if let Some((called, _)) = find(&mesh.services, called) {
            calls.entry(name).or_default().insert(called);
        }
    }
    for policy in mesh.authorizations.values() {
        for caller in callers(mesh, policy) {
            let called = policy.services.iter().filter(|name| *name != caller);
            calls.entry(caller).or_default().extend(called);
        }
    }
    calls
}

/// The calls that labels declare.
fn declared_calls<'a>(mesh: &Mesh<'a>) -> Vec<(&'a Name, &'a str)> {
    let labelled = mesh.services.keys().filter_map(|name| {
        let resource = mesh.all.get(&key(Kind::Service, name))?;
        Some((*name, resource.labels.get(CALLS_LABEL)?))
    });
    labelled
        .flat_map(|(name, calls)| calls.split(',').map(move |called| (name, called.trim())))
        .filter(|(_, called)| !called.is_empty())
        .collect()
}

/// Services all of whose proxies a policy names as those who may.
fn callers<'a>(mesh: &Mesh<'a>, policy: &AuthorizationPolicy) -> Vec<&'a Name> {
    if policy.action != AuthorizationAction::Allow
        || policy.mode != AuthorizationMode::Enforce
        || policy.services.is_empty()
    {
        return Vec::new();
    }
    let patterns: Vec<(&str, &str)> = policy
        .sources()
        .flat_map(|(_, source)| &source.identities)
        .filter_map(|pattern| proxy_of(pattern))
        .collect();
    if patterns.is_empty() {
        return Vec::new();
    }
    let fits = |wanted: &str, name: &Name| wanted == "*" || wanted == name.as_str();
    let named = |service: &Service| {
        !service.endpoints.is_empty()
            && service.endpoints.iter().all(|endpoint| {
                endpoint.proxy.as_ref().is_some_and(|proxy| {
                    let mut patterns = patterns.iter();
                    patterns.any(|(zone, name)| fits(zone, &endpoint.zone) && fits(name, proxy))
                })
            })
    };
    let services = mesh.services.iter().filter(|(_, service)| named(service));
    services.map(|(name, _)| *name).collect()
}

/// The zone and the proxy that a pattern of identities names; the zone may be `*`. One that names no proxy says nothing of who
/// is behind it.
fn proxy_of(pattern: &str) -> Option<(&str, &str)> {
    let mut segments = pattern.strip_prefix("spiffe://")?.split('/').skip(1);
    let mut next = |wanted: &str| {
        (segments.next() == Some(wanted))
            .then(|| segments.next())
            .flatten()
    };
    let (zone, proxy) = (next("zone")?, next("proxy")?);
    (proxy != "*").then_some((zone, proxy))
}

/// How a service is called by the rule that tries most; by every default where no rule leads to it.
fn hop(mesh: &Mesh<'_>, name: &Name, rules: &[Placed<'_>]) -> Hop {
    let standard = Retry::standard();
    let budgets = mesh
        .services
        .get(name)
        .map(|service| mesh.resilience_of(service).1);
    let of = |retry: &Retry| {
        let hedges = retry
            .hedge
            .as_ref()
            .map_or(0, |hedge| u64::from(hedge.max_hedges));
        let tries = u64::from(retry.max_attempts);
        let percent = |budget: Option<u32>, tries: u64| {
            tries
                .min(1)
                .saturating_mul(budget.unwrap_or(0).into())
                .min(tries * 100)
        };
        let more = percent(budgets.map(|b| b.retry_budget.percent), tries.saturating_sub(1))
            + percent(budgets.map(|b| b.hedge_budget.percent), hedges);
        Hop {
            attempts: tries + hedges,
            load: 100 + more,
        }
    };
    let most = rules.iter().map(|placed| of(&placed.rule.retry));
    most.max_by_key(|hop| (hop.attempts, hop.load))
        .unwrap_or_else(|| of(&standard))
}

fn amplification(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    let calls = graph(mesh);
    if calls.is_empty() {
        return;
    }
    let to = |name: &Name| mesh.rules_to(name).collect::<Vec<_>>();
    let called: BTreeSet<&Name> = calls.values().flatten().copied().collect();
    let mut chains: Vec<Chain<'_>> = Vec::new();
    for name in calls.keys().copied() {
        let rules = to(name);
        let outside: Vec<_> = rules
            .iter()
            .copied()
            .filter(|placed| placed.whole.is_for_gateways())
            .collect();
        if outside.is_empty() && called.contains(name) {
            continue;
        }
        let first = hop(mesh, name, if outside.is_empty() { &rules } else { &outside });
        chains.push(Chain {
            attempts: first.attempts,
            load: first.load,
            path: vec![name],
            outside: !outside.is_empty(),
        });
    }
    let mut told: BTreeSet<&Name> = BTreeSet::new();
    for _ in 1..MAX_HOPS {
        // Of the chains to one service only the worst goes on: the others can't become worse than it.
        let mut next: BTreeMap<&Name, Chain<'_>> = BTreeMap::new();
        for chain in &chains {
            let Some(last) = chain.path.last() else { continue };
            for callee in calls.get(last).into_iter().flatten().copied() {
                if chain.path.contains(&callee) {
                    continue;
                }
                let rules = to(callee);
                let hop = hop(mesh, callee, &rules);
                let mut longer = chain.clone();
                longer.attempts = chain.attempts.saturating_mul(hop.attempts);
                longer.load = chain.load.saturating_mul(hop.load) / 100;
                longer.path.push(callee);
                let worse = next
                    .get(callee)
                    .is_none_or(|known| known.attempts < longer.attempts);
                if longer.attempts > MAX_ATTEMPTS || longer.load > MAX_LOAD {
                    // What follows on it is the same chain.
                    if told.insert(callee) {
                        tell(sink, &longer, rules.first());
                    }
                } else if worse {
                    next.insert(callee, longer);
                }
            }
        }
        chains = next.into_values().collect();
        if chains.is_empty() {
            return;
        }
    }
}

fn tell(sink: &mut Sink<'_>, chain: &Chain<'_>, rule: Option<&Placed<'_>>) {
    let Some(end) = chain.path.last() else { return };
    let begin = if chain.outside { "a client, " } else { "" };
    let way: Vec<&str> = chain.path.iter().map(|name| name.as_str()).collect();
    let problem = format!(
        "one request to Service/{} may become {} attempts here, by {begin}{}; within the budgets the load grows to {}.{:02} times of what it was",
        way.first().copied().unwrap_or_default(),
        chain.attempts,
        way.join(", "),
        chain.load / 100,
        chain.load % 100
    );
    let fix = "retry at one hop only (maxAttempts: 1 at the others), or lower the budgets";
    let services = chain.path.iter().map(|name| Related {
        key: key(Kind::Service, name),
        path: String::new(),
    });
    let services = services.collect();
    match rule {
        Some(placed) => sink.add_with(&placed.key(), placed.at("retry"), problem, fix, services),
        None => sink.add_with(&key(Kind::Service, end), "metadata.name", problem, fix, services),
    }
}

fn longer(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (caller, called) in graph(mesh) {
        let time = |placed: &Placed<'_>| placed.rule.request_timeout.unwrap_or(Duration::MAX);
        let Some(waiting) = mesh.rules_to(caller).max_by_key(time) else {
            continue;
        };
        let patience = time(&waiting);
        let mut slow: BTreeMap<(&Name, usize), (Placed<'_>, &Name)> = BTreeMap::new();
        for callee in called {
            for placed in mesh.rules_to(callee).filter(|placed| time(placed) > patience) {
                slow.entry((placed.route, placed.position))
                    .or_insert((placed, callee));
            }
        }
        for (placed, callee) in slow.into_values() {
            let may = match placed.rule.request_timeout {
                Some(time) => duration(time),
                None => "for ever".to_owned(),
            };
            sink.add_with(
                &placed.key(),
                placed.at("timeouts.request"),
                format!(
                    "Service/{caller} calls Service/{callee}, which may take {may}, and requests to it have {}",
                    duration(patience)
                ),
                format!("want less than {} here, or more there", duration(patience)),
                vec![waiting.related("timeouts.request")],
            );
        }
    }
}

fn declared(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    let mut wrong: BTreeMap<&Name, Vec<&str>> = BTreeMap::new();
    for (name, called) in declared_calls(mesh) {
        if find(&mesh.services, called).is_none() {
            wrong.entry(name).or_default().push(called);
        }
    }
    for (name, called) in wrong {
        let near = called.first().map_or_else(String::new, |first| {
            did_you_mean(first, mesh.names(Kind::Service))
        });
        sink.add(
            &key(Kind::Service, name),
            "metadata.labels",
            format!(
                "{CALLS_LABEL} names {}, and there is no such Service",
                list(called)
            ),
            format!("name services that are there{near}"),
        );
    }
}

//! LW3xx: rungs of ladders that are never tried, or can't answer.

use super::mesh::{Mesh, Placed, key, related};
use super::text::list;
use super::{Rule, Severity, Sink};
use crate::model::{Act, Cause, FallbackPolicy, FlagCondition, Rung, RungCause};
use crate::{Kind, Name};

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW301",
        severity: Severity::Warning,
        title: "a rung after one that always answers",
        why: "`static`, `redirect` and `fail` always end the ladder. A rung behind one that is for the same failures, methods and flags is never tried.",
        check: unreachable,
    },
    Rule {
        code: "LW302",
        severity: Severity::Warning,
        title: "a rung for causes that never come to it",
        why: "The ladder acts on the causes in `on`, and on UpstreamStatus if it has `onStatuses`; PluginFault only comes after a rung with a plugin.",
        check: causeless,
    },
    Rule {
        code: "LW303",
        severity: Severity::Warning,
        title: "a queue rung takes requests that only read",
        why: "A queued request is answered with 202 and a place to ask, which is nothing to whoever wanted to read.",
        check: queued_reads,
    },
    Rule {
        code: "LW304",
        severity: Severity::Warning,
        title: "a stale rung where nothing is kept",
        why: "It gives what the rule's cache kept, and the rule has no `cache`.",
        check: nothing_kept,
    },
    Rule {
        code: "LW305",
        severity: Severity::Warning,
        title: "a zone rung without another zone",
        why: "It is one more attempt at the same service in another zone, and no backend of the rule has an endpoint there.",
        check: nowhere_else,
    },
    Rule {
        code: "LW306",
        severity: Severity::Warning,
        title: "a service rung asks the service that failed",
        why: "The fallback is the only backend of the rule itself: it fails with it. `zone` is the rung for one more attempt elsewhere.",
        check: itself,
    },
    Rule {
        code: "LW307",
        severity: Severity::Warning,
        title: "a rung's conditions exclude those of the rules that use it",
        why: "No request that comes to the ladder has a method that the rung is for, or the same flag would have to have two values.",
        check: excluded,
    },
    Rule {
        code: "LW308",
        severity: Severity::Info,
        title: "a ladder acts on what doesn't happen",
        why: "RateLimited only comes of a rule with `rateLimits`, and denials only where an AuthorizationPolicy is for the service.",
        check: idle,
    },
];

/// The causes that lead to a ladder.
fn leading(ladder: &FallbackPolicy) -> Vec<Cause> {
    let statuses = (!ladder.on_statuses.is_empty()).then_some(Cause::UpstreamStatus);
    ladder.on.iter().copied().chain(statuses).collect()
}

/// The word of YAML for a cause.
fn word(cause: Cause) -> &'static str {
    match cause {
        Cause::ConnectFailure => "ConnectFailure",
        Cause::Timeout => "Timeout",
        Cause::Reset => "Reset",
        Cause::NoEndpoint => "NoEndpoint",
        Cause::Overflow => "Overflow",
        Cause::UpstreamStatus => "UpstreamStatus",
        Cause::CircuitOpen => "CircuitOpen",
        Cause::Overloaded => "Overloaded",
        Cause::RateLimited => "RateLimited",
        Cause::Disabled => "Disabled",
        Cause::AuthorizationDenied => "AuthorizationDenied",
        Cause::IdentityMissing => "IdentityMissing",
        Cause::AuthorizationUnknown => "AuthorizationUnknown",
    }
}

/// Whether a rung ends the ladder whenever it is tried.
const fn always_ends(act: &Act) -> bool {
    match act {
        Act::Static(_) | Act::Redirect(_) | Act::Fail { .. } => true,
        Act::Plugin { .. }
        | Act::Service { .. }
        | Act::Zone { .. }
        | Act::Stale { .. }
        | Act::Queue { .. } => false,
    }
}

/// Whether a rung is tried for all that another is for. What a zone's health or a plugin's fault has to do with can change
/// from one rung to the next, so that nothing is said of it.
fn covers(one: &Rung, other: &Rung, leading: &[Cause]) -> bool {
    let has = |cause: &Cause| one.causes.contains(&RungCause::Of(*cause));
    let every = one.causes.is_empty() || leading.iter().all(has);
    let named = !other.causes.is_empty()
        && other.causes.iter().all(|cause| match cause {
            RungCause::Of(cause) => has(cause),
            RungCause::ZoneDown | RungCause::PluginFault => false,
        });
    let methods = one.methods.is_empty()
        || !other.methods.is_empty() && other.methods.iter().all(|method| one.methods.contains(method));
    (every || named) && methods && (one.when.is_none() || one.when == other.when)
}

fn unreachable(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, ladder) in &mesh.ladders {
        let leading = leading(ladder);
        for (j, rung) in ladder.rungs.iter().enumerate() {
            let ending =
                |(_, earlier): &(usize, &Rung)| always_ends(&earlier.act) && covers(earlier, rung, &leading);
            if let Some((i, _)) = ladder.rungs.iter().enumerate().take(j).find(ending) {
                sink.add(
                    &key(Kind::FallbackPolicy, name),
                    format!("spec.rungs[{j}]"),
                    format!("is never tried: rungs[{i}] always answers whatever this one is for"),
                    format!("take it before rungs[{i}], or give that one causes, methods or when"),
                );
            }
        }
    }
}

fn causeless(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, ladder) in &mesh.ladders {
        let leading = leading(ladder);
        for (j, rung) in ladder.rungs.iter().enumerate() {
            let faults = ladder
                .rungs
                .iter()
                .take(j)
                .any(|rung| matches!(rung.act, Act::Plugin { .. }));
            let comes = |cause: &RungCause| match cause {
                RungCause::Of(cause) => leading.contains(cause),
                RungCause::PluginFault => faults,
                RungCause::ZoneDown => true,
            };
            let never: Vec<&'static str> = rung
                .causes
                .iter()
                .filter(|cause| !comes(cause))
                .map(|cause| match cause {
                    RungCause::Of(cause) => word(*cause),
                    RungCause::PluginFault => "PluginFault",
                    RungCause::ZoneDown => "ZoneDown",
                })
                .collect();
            if never.is_empty() {
                continue;
            }
            let all = never.len() == rung.causes.len();
            let effect = if all {
                "so that it is never tried"
            } else {
                "so that it has no effect"
            };
            let fix = match (never.contains(&"PluginFault"), never.contains(&"UpstreamStatus")) {
                (true, _) => "put a rung with a plugin before it, or take the cause out",
                (false, true) => "list statuses in onStatuses, or take the cause out",
                (false, false) => "add it to spec.on, or take it out here",
            };
            sink.add(
                &key(Kind::FallbackPolicy, name),
                format!("spec.rungs[{j}].causes"),
                format!("{} never leads to this rung, {effect}", list(never)),
                fix,
            );
        }
    }
}

const fn only_reads(method: &str) -> bool {
    matches!(method.as_bytes(), b"GET" | b"HEAD" | b"OPTIONS" | b"TRACE")
}

/// Methods with which requests come to a rung; `None` is any.
fn methods_at<'a>(placed: &Placed<'a>, rung: &'a Rung) -> Option<Vec<&'a str>> {
    let of_rung: Option<Vec<&str>> =
        (!rung.methods.is_empty()).then(|| rung.methods.iter().map(|method| &**method).collect());
    match (placed.methods(), of_rung) {
        (None, of) => of,
        (of, None) => of,
        (Some(rule), Some(rung)) => Some(rule.into_iter().filter(|method| rung.contains(method)).collect()),
    }
}

fn queued_reads(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, ladder) in &mesh.ladders {
        for (j, rung) in ladder.rungs.iter().enumerate() {
            if !matches!(rung.act, Act::Queue { .. }) {
                continue;
            }
            let reads = |placed: &Placed<'_>| {
                methods_at(placed, rung).is_none_or(|methods| methods.into_iter().any(only_reads))
            };
            if let Some(placed) = mesh.rules_with(name).find(reads) {
                sink.add_with(
                    &key(Kind::FallbackPolicy, name),
                    format!("spec.rungs[{j}]"),
                    format!(
                        "queues requests that only read, since neither it nor {} ({}) is bound to methods that write",
                        placed.key(),
                        placed.at("")
                    ),
                    "set methods of the rung, such as [POST, PUT, PATCH, DELETE]",
                    vec![placed.related("")],
                );
            }
        }
    }
}

/// Every rung of every rule that has a ladder.
fn climbed<'a>(mesh: &'a Mesh<'a>) -> impl Iterator<Item = (Placed<'a>, &'a Name, usize, &'a Rung)> {
    mesh.rules().flat_map(|placed| {
        let named = placed.rule.fallback.as_ref();
        let found = named.and_then(|name| Some((name, mesh.ladders.get(name)?)));
        found.into_iter().flat_map(move |(name, ladder)| {
            let rungs = ladder.rungs.iter().enumerate();
            rungs.map(move |(j, rung)| (placed, name, j, rung))
        })
    })
}

fn nothing_kept(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (placed, name, j, rung) in climbed(mesh) {
        if matches!(rung.act, Act::Stale { .. }) && placed.rule.cache.is_none() {
            sink.add_with(
                &placed.key(),
                placed.at("fallback"),
                format!("rungs[{j}] of FallbackPolicy/{name} gives kept answers, and this rule keeps none"),
                "give the rule a cache, or another ladder",
                vec![related(
                    Kind::FallbackPolicy,
                    name,
                    format!("spec.rungs[{j}].stale"),
                )],
            );
        }
    }
}

fn nowhere_else(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (placed, name, j, rung) in climbed(mesh) {
        let Act::Zone { zones } = &rung.act else { continue };
        let possible = placed.weighty().any(|(_, service)| {
            let Some(service) = mesh.services.get(service) else {
                return true;
            };
            let mut there: Vec<&Name> = service.endpoints.iter().map(|endpoint| &endpoint.zone).collect();
            there.sort_unstable();
            there.dedup();
            let listed = |zone: &&&Name| zones.is_empty() || zones.contains(zone);
            // A caller's own zone is never one of them, and some caller may be in any.
            match there.len() {
                0 => true,
                1 => there
                    .iter()
                    .any(|zone| listed(&zone) && mesh.zones.keys().any(|other| other != zone)),
                _ => there.iter().any(|zone| listed(&zone)),
            }
        });
        if !possible {
            let wanted = if zones.is_empty() {
                "any other zone".to_owned()
            } else {
                list(zones)
            };
            sink.add_with(
                &placed.key(),
                placed.at("fallback"),
                format!("rungs[{j}] of FallbackPolicy/{name} tries {wanted}, where no backend of this rule has endpoints"),
                "add endpoints there, or another rung",
                vec![related(Kind::FallbackPolicy, name, format!("spec.rungs[{j}].zone"))],
            );
        }
    }
}

fn itself(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (placed, name, j, rung) in climbed(mesh) {
        let Act::Service { service } = &rung.act else {
            continue;
        };
        let mut backends = placed.weighty();
        if backends.all(|(_, backend)| backend == service) {
            sink.add_with(
                &placed.key(),
                placed.at("fallback"),
                format!(
                    "rungs[{j}] of FallbackPolicy/{name} asks Service/{service}, which is what has failed"
                ),
                "name another service, or use a zone rung",
                vec![related(
                    Kind::FallbackPolicy,
                    name,
                    format!("spec.rungs[{j}].service"),
                )],
            );
        }
    }
}

/// Whether a flag would have to have two values at once.
fn exclude(one: Option<&FlagCondition>, other: Option<&FlagCondition>) -> bool {
    let (Some(one), Some(other)) = (one, other) else {
        return false;
    };
    one.flag == other.flag
        && one.targeting_key_header == other.targeting_key_header
        && (!one.default || !other.default)
        && !one.variants.is_empty()
        && !other.variants.is_empty()
        && one
            .variants
            .iter()
            .all(|variant| !other.variants.contains(variant))
}

fn excluded(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, ladder) in &mesh.ladders {
        let on = key(Kind::FallbackPolicy, name);
        for (j, rung) in ladder.rungs.iter().enumerate() {
            let users: Vec<Placed<'_>> = mesh.rules_with(name).collect();
            let no_method =
                |placed: &Placed<'_>| methods_at(placed, rung).is_some_and(|methods| methods.is_empty());
            if !users.is_empty() && users.iter().all(no_method) {
                let also = users.iter().take(5).map(|placed| placed.related("matches"));
                sink.add_with(
                    &on,
                    format!("spec.rungs[{j}].methods"),
                    format!(
                        "no rule with this ladder has requests with {}",
                        list(&rung.methods)
                    ),
                    "change the methods, or take the rung out",
                    also.collect(),
                );
                continue;
            }
            let of_plugin = mesh.plugin_of(&rung.act).and_then(|plugin| plugin.when.as_ref());
            let when = rung.when.as_ref();
            let by_rules = !users.is_empty()
                && users
                    .iter()
                    .all(|placed| exclude(when, placed.rule.when.as_ref()));
            if exclude(when, of_plugin) || by_rules {
                let whose = if by_rules {
                    "every rule with this ladder"
                } else {
                    "its plugin"
                };
                let flag = when.map_or("", |when| &*when.flag);
                sink.add(
                    &on,
                    format!("spec.rungs[{j}].when"),
                    format!("wants variants of the flag {flag:?} that exclude those that {whose} wants"),
                    "change one of the conditions, or take the rung out",
                );
            }
        }
    }
}

fn idle(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, ladder) in &mesh.ladders {
        let users: Vec<Placed<'_>> = mesh.rules_with(name).collect();
        if users.is_empty() {
            continue;
        }
        let limited = users.iter().any(|placed| !placed.rule.rate_limits.is_empty());
        let guarded = users.iter().any(|placed| {
            placed.weighty().any(|(_, service)| {
                let mut all = mesh.authorizations.values();
                all.any(|policy| policy.services.is_empty() || policy.services.contains(service))
            })
        });
        let idle = |cause: &Cause| match cause {
            Cause::RateLimited => !limited,
            Cause::AuthorizationDenied | Cause::IdentityMissing | Cause::AuthorizationUnknown => !guarded,
            Cause::ConnectFailure
            | Cause::Timeout
            | Cause::Reset
            | Cause::NoEndpoint
            | Cause::Overflow
            | Cause::UpstreamStatus
            | Cause::CircuitOpen
            | Cause::Overloaded
            | Cause::Disabled => false,
        };
        let never: Vec<_> = ladder
            .on
            .iter()
            .filter(|cause| idle(cause))
            .map(|cause| word(*cause))
            .collect();
        if !never.is_empty() {
            sink.add(
                &key(Kind::FallbackPolicy, name),
                "spec.on",
                format!("{} can't happen to any rule with this ladder", list(never)),
                "take it out, or add what refuses such requests",
            );
        }
    }
}

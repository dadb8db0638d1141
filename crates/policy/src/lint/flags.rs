//! LW7xx: flags that aren't there, and levels of degradation that change nothing.

use super::limits::has_breaker;
use super::mesh::{Mesh, key, related};
use super::similar::did_you_mean;
use super::text::{duration, list};
use super::{Rule, Severity, Sink};
use crate::model::{DegradationPolicy, Priority, Signal};
use crate::{Kind, Name};
use leeward_flags::Flag;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW701",
        severity: Severity::Warning,
        title: "a condition on a flag that isn't there",
        why: "The condition then always is its `default`. A node's own file of flags may have it, which can't be seen here.",
        check: unknown,
    },
    Rule {
        code: "LW702",
        severity: Severity::Warning,
        title: "a condition that a flag can't fulfil",
        why: "It names variants that the flag hasn't, or wants the value `true` of a flag none of whose variants is.",
        check: unfulfillable,
    },
    Rule {
        code: "LW703",
        severity: Severity::Warning,
        title: "a level forces a flag or variant that isn't there",
        why: "Nothing happens to it when the level holds.",
        check: forced,
    },
    Rule {
        code: "LW704",
        severity: Severity::Warning,
        title: "a level without effect",
        why: "It forces and sheds what the level before it does.",
        check: same,
    },
    Rule {
        code: "LW705",
        severity: Severity::Warning,
        title: "nothing is shed",
        why: "No rule of the policy's routes has requests of so low a priority; or routes are listed, and no level sheds.",
        check: unshed,
    },
    Rule {
        code: "LW706",
        severity: Severity::Warning,
        title: "a trigger that can't fire",
        why: "It waits for the circuit of a service that has no breaker, or for a latency that no request reaches before its time is up.",
        check: dead,
    },
    Rule {
        code: "LW707",
        severity: Severity::Warning,
        title: "two policies force the same flag",
        why: "While both hold a level that forces it, the one with the first name has its way.",
        check: twice,
    },
    Rule {
        code: "LW708",
        severity: Severity::Info,
        title: "no rule or level has to do with a flag",
        why: "Services may read it by OFREP, which can't be seen here.",
        check: unread,
    },
];

fn flag<'a>(mesh: &Mesh<'a>, key: &str) -> Option<&'a Flag> {
    mesh.flags.values().find_map(|flags| flags.set.get(key))
}

fn known<'a>(mesh: &Mesh<'a>) -> impl Iterator<Item = &'a str> + use<'a> {
    let sets: Vec<_> = mesh.flags.values().copied().collect();
    sets.into_iter().flat_map(|flags| flags.set.keys())
}

fn unknown(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (on, path, condition) in mesh.conditions() {
        if flag(mesh, &condition.flag).is_none() {
            let near = did_you_mean(&condition.flag, known(mesh));
            sink.add(
                &on,
                format!("{path}.flag"),
                format!(
                    "no FeatureFlags has {:?}, so that the condition is always {}",
                    &*condition.flag, condition.default
                ),
                format!("add the flag, or name one that is there{near}"),
            );
        }
    }
}

fn unfulfillable(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (on, path, condition) in mesh.conditions() {
        let Some(flag) = flag(mesh, &condition.flag) else {
            continue;
        };
        let variants: Vec<&str> = flag.variants().collect();
        if condition.variants.is_empty() {
            let can = variants
                .iter()
                .any(|name| flag.forced(name).and_then(|e| e.value) == Some(&Value::Bool(true)));
            if !can {
                sink.add(
                    &on,
                    format!("{path}.flag"),
                    format!(
                        "wants the value true, and no variant of {:?} has it",
                        &*condition.flag
                    ),
                    format!("name variants ({})", list(variants)),
                );
            }
            continue;
        }
        for (i, wanted) in condition.variants.iter().enumerate() {
            if !variants.contains(&&**wanted) {
                let near = did_you_mean(wanted, variants.iter().copied());
                sink.add(
                    &on,
                    format!("{path}.variants[{i}]"),
                    format!("{:?} has no variant {wanted:?}", &*condition.flag),
                    format!("want one of {}{near}", list(&variants)),
                );
            }
        }
    }
}

fn forced(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, policy) in &mesh.degradations {
        let on = key(Kind::DegradationPolicy, name);
        for (i, level) in policy.levels.iter().enumerate() {
            for (key, variant) in &level.flags {
                let path = format!("spec.levels[{i}].flags.{key}");
                match flag(mesh, key) {
                    None => {
                        let near = did_you_mean(key, known(mesh));
                        let fix = format!("add the flag, or name one that is there{near}");
                        sink.add(&on, path, format!("no FeatureFlags has {key:?}"), fix);
                    }
                    Some(flag) if flag.forced(variant).is_none() => {
                        let near = did_you_mean(variant, flag.variants());
                        let fix = format!("want one of {}{near}", list(flag.variants()));
                        sink.add(&on, path, format!("{key:?} has no variant {variant:?}"), fix);
                    }
                    Some(_) => {}
                }
            }
        }
    }
}

fn same(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, policy) in &mesh.degradations {
        for (i, pair) in policy.levels.windows(2).enumerate() {
            let [before, level] = pair else { continue };
            if before.flags == level.flags && before.shed_below == level.shed_below {
                sink.add(
                    &key(Kind::DegradationPolicy, name),
                    format!("spec.levels[{}]", i + 1),
                    format!("{} does no more than {}", level.name, before.name),
                    "have it force flags or shed, or take it out",
                );
            }
        }
    }
}

/// Whether some request of a policy's routes is of a lower priority.
fn sheds(mesh: &Mesh<'_>, policy: &DegradationPolicy, below: Priority) -> bool {
    mesh.rules()
        .filter(|placed| policy.routes.is_empty() || policy.routes.contains(placed.route))
        .any(|placed| placed.rule.priority.header.is_some() || placed.rule.priority.default < below)
}

fn unshed(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, policy) in &mesh.degradations {
        let on = key(Kind::DegradationPolicy, name);
        if !policy.routes.is_empty() && policy.levels.iter().all(|level| level.shed_below.is_none()) {
            sink.add(
                &on,
                "spec.routes",
                "has no effect, since no level has shedBelow (flags are everybody's)".to_owned(),
                "add shedBelow to a level, or take routes out",
            );
        }
        for (i, level) in policy.levels.iter().enumerate() {
            if let Some(below) = level.shed_below.filter(|below| !sheds(mesh, policy, *below)) {
                let routes: Vec<_> = policy
                    .routes
                    .iter()
                    .map(|route| related(Kind::Route, route, "spec.rules"))
                    .collect();
                sink.add_with(
                    &on,
                    format!("spec.levels[{i}].shedBelow"),
                    format!(
                        "no rule of its routes has requests of a priority below {}",
                        below.as_str()
                    ),
                    "give rules a priority (Normal is the default), or shed below a higher one",
                    routes,
                );
            }
        }
    }
}

fn dead(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, policy) in &mesh.degradations {
        let on = key(Kind::DegradationPolicy, name);
        for (i, trigger) in policy.triggers.iter().enumerate() {
            let service = trigger.signal.service();
            let Some(spec) = mesh.services.get(service) else {
                continue;
            };
            match &trigger.signal {
                Signal::CircuitOpen { .. } => {
                    let held = mesh.held_circuits.values().any(|held| {
                        matches!(&held.target, crate::model::OverrideTarget::Service(name) if name == service)
                    });
                    if !held && !has_breaker(mesh.resilience_of(spec).1) {
                        sink.add_with(
                            &on,
                            format!("spec.triggers[{i}].circuitOpen"),
                            format!("Service/{service} has no circuit breaker that could open"),
                            "give it a ResiliencePolicy with circuitBreaker, or use another signal",
                            vec![related(Kind::Service, service, "spec.resilience")],
                        );
                    }
                }
                Signal::Latency { above, .. } => {
                    let times: Option<Vec<_>> = mesh
                        .rules_to(service)
                        .map(|placed| mesh.attempts_time(placed.rule))
                        .collect();
                    let longest = times.and_then(|times| times.into_iter().max());
                    if let Some(longest) = longest.filter(|longest| above >= longest) {
                        sink.add(
                            &on,
                            format!("spec.triggers[{i}].latency.above"),
                            format!(
                                "is {}, and no call takes longer than {}",
                                duration(*above),
                                duration(longest)
                            ),
                            format!("want less than {}", duration(longest)),
                        );
                    }
                }
                Signal::ErrorRate { .. } | Signal::Saturation { .. } | Signal::BurnRate { .. } => {}
            }
        }
    }
}

fn twice(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    let mut owners: BTreeMap<&str, (&Name, &str)> = BTreeMap::new();
    for (name, policy) in &mesh.degradations {
        for (i, level) in policy.levels.iter().enumerate() {
            for (flag, variant) in &level.flags {
                let (owner, theirs) = *owners.entry(flag).or_insert((name, variant));
                if owner != *name && theirs != &**variant {
                    sink.add_with(
                        &key(Kind::DegradationPolicy, name),
                        format!("spec.levels[{i}].flags.{flag}"),
                        format!(
                            "DegradationPolicy/{owner} forces it to {theirs:?}, and goes first by its name"
                        ),
                        "have one policy force it, or both to the same variant",
                        vec![related(Kind::DegradationPolicy, owner, "spec.levels")],
                    );
                }
            }
        }
    }
}

fn unread(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    let mut read: BTreeSet<&str> = mesh
        .conditions()
        .into_iter()
        .map(|(_, _, condition)| &*condition.flag)
        .collect();
    let levels = mesh.degradations.values().flat_map(|policy| &policy.levels);
    read.extend(levels.flat_map(|level| level.flags.keys()).map(|flag| &**flag));
    for (name, flags) in &mesh.flags {
        for flag in flags.set.keys().filter(|flag| !read.contains(flag)) {
            sink.add(
                &key(Kind::FeatureFlags, name),
                format!("spec.flags.{flag}"),
                "no rule, rung, plugin or level has to do with it".to_owned(),
                "take it out, unless services read it",
            );
        }
    }
}

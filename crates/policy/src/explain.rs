//! What policy would make of a request: what a proxy decides, in its order, and what it goes by.
//!
//! It is the proxy's own snapshot and matchers that decide. What proxies have seen (health, circuits, budgets that are used
//! up) has no part in it.

mod asked;
mod calls;
mod doors;
mod guards;
mod ladder;
mod routes;

use crate::lint::text::duration;
use crate::model::{FlagCondition, Zone};
use crate::path;
use crate::{Key, Kind, Levels, Name, RuleView, Snapshot, Spec, Viewer, World};
use asked::Asked;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

/// A request that somebody may send.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// The method, upper case; empty for GET.
    pub method: String,
    /// The path, maybe with a query; empty for `/`.
    pub path: String,
    /// Whom it is for, maybe with a port.
    pub host: String,
    /// Header fields.
    pub headers: Vec<(String, String)>,
    /// The SPIFFE id of whoever asks; `None` of nobody in the mesh.
    pub identity: Option<String>,
    /// The gateway that a client from outside comes in by, and the listener.
    pub gateway: Option<(Name, Option<Name>)>,
    /// Variants that flags are to have.
    pub flags: BTreeMap<String, String>,
    /// Levels that DegradationPolicies are to have.
    pub levels: BTreeMap<String, String>,
    /// The claims of a token that every issuer has signed.
    pub claims: Option<Map<String, Value>>,
}

/// What is wrong with a question.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct BadQuestion {
    /// The field.
    pub field: &'static str,
    /// What is wrong, and what would be right.
    pub reason: String,
}

/// One decision, and what it goes by.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Step {
    /// A word for what is decided.
    pub stage: &'static str,
    /// What comes of it, for people.
    pub says: String,
    /// What decides.
    pub resource: Option<Key>,
    /// The field of it; empty for the whole.
    pub path: String,
    /// The values that it goes by.
    pub facts: Vec<(&'static str, String)>,
    /// What it is made up of, or was chosen from.
    pub steps: Vec<Self>,
}

/// What becomes of a request.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The proxy that is asked.
    pub viewer: Viewer,
    /// In a sentence.
    pub summary: String,
    /// What is decided, in order.
    pub steps: Vec<Step>,
    /// The resources that have a part in it.
    pub involved: BTreeSet<Key>,
    /// The route and the rule of it that the request takes.
    pub rule: Option<(Name, usize)>,
}

impl Step {
    fn new(stage: &'static str, says: impl Into<String>) -> Self {
        Self {
            stage,
            says: says.into(),
            ..Self::default()
        }
    }

    fn by(mut self, key: Key, path: impl Into<String>) -> Self {
        self.resource = Some(key);
        self.path = path.into();
        self
    }

    fn fact(mut self, name: &'static str, value: impl ToString) -> Self {
        self.facts.push((name, value.to_string()));
        self
    }

    fn with(mut self, steps: Vec<Self>) -> Self {
        self.steps = steps;
        self
    }
}

fn key(kind: Kind, name: &str) -> Option<Key> {
    let name = Name::parse(name).ok()?;
    Some(Key { kind, name })
}

fn bad(field: &'static str, reason: impl Into<String>) -> BadQuestion {
    BadQuestion {
        field,
        reason: reason.into(),
    }
}

/// The proxy to ask, where a question names zone, proxy or gateway, or none of them.
///
/// # Errors
///
/// If there is no such zone or proxy, or none at all.
pub fn viewer(world: &World, zone: &str, proxy: &str, gateway: Option<&Name>) -> Result<Viewer, BadQuestion> {
    let on = gateway.and_then(|name| {
        let key = Key {
            kind: Kind::Gateway,
            name: name.clone(),
        };
        let Spec::Gateway(gateway) = &world.get(&key)?.spec else {
            return None;
        };
        Some(gateway)
    });
    let zones: Vec<(&Name, &Zone)> = world
        .resources()
        .filter_map(|resource| {
            let Spec::Zone(zone) = &resource.spec else {
                return None;
            };
            Some((&resource.name, zone))
        })
        .collect();
    let listens = |zone: &Name| on.is_none_or(|gateway| gateway.zones.contains(zone));
    let found = if zone.is_empty() {
        let with = |(name, of): &&(&Name, &Zone)| match proxy {
            "" => listens(name),
            proxy => of.proxies.iter().any(|known| known.name.as_str() == proxy),
        };
        let mut fit = zones.iter().filter(with);
        let first = fit.clone().find(|(_, of)| !of.proxies.is_empty());
        first
            .or_else(|| fit.next())
            .or_else(|| zones.first().filter(|_| on.is_none()))
    } else {
        zones.iter().find(|(name, _)| name.as_str() == zone)
    };
    let Some((name, of)) = found else {
        let known: Vec<&str> = zones.iter().map(|(name, _)| name.as_str()).collect();
        let known = if known.is_empty() {
            "there is none".to_owned()
        } else {
            format!("want one of {}", known.join(", "))
        };
        return Err(bad(
            "zone",
            format!("there is no Zone that fits {zone:?}; {known}"),
        ));
    };
    let proxy = match proxy {
        "" => {
            let of_gateway = on.and_then(|gateway| gateway.proxies.first());
            let first = of.proxies.iter().map(|known| &known.name).find(|name| {
                on.is_none_or(|gateway| gateway.proxies.is_empty() || gateway.proxies.contains(name))
            });
            // A proxy that is no hop for others need not be listed.
            first.or(of_gateway).cloned().unwrap_or_else(|| (*name).clone())
        }
        // Likewise.
        text => Name::parse(text).map_err(|error| bad("proxy", format!("{text:?} {error}")))?,
    };
    Ok(Viewer {
        zone: (*name).clone(),
        proxy,
    })
}

/// Answers a question from a world, as one of its proxies would; `now` is the wall clock's.
///
/// # Errors
///
/// If the question can't be one about a request.
pub fn explain(
    world: &World,
    viewer: &Viewer,
    generation: u64,
    question: &Question,
    now: SystemTime,
) -> Result<Explanation, BadQuestion> {
    let snapshot = world.snapshot(viewer.clone(), generation);
    let levels = levels(&snapshot, question, now)?;
    let asked = Asked::new(&snapshot, &levels, question, now)?;
    let mut told = Telling {
        world,
        snapshot: &snapshot,
        asked: &asked,
        levels: &levels,
        now,
        steps: Vec::new(),
        involved: BTreeSet::new(),
    };
    told.involve(Kind::Zone, viewer.zone.as_str());
    let (summary, rule) = told.tell()?;
    Ok(Explanation {
        viewer: viewer.clone(),
        summary,
        steps: told.steps,
        involved: told.involved,
        rule,
    })
}

/// The levels that hold: as asked, as somebody holds them, or the normal ones.
fn levels(snapshot: &Snapshot, question: &Question, now: SystemTime) -> Result<Levels, BadQuestion> {
    let mut standing = Vec::new();
    for policy in snapshot.degradations() {
        let at = match question.levels.get(&*policy.name) {
            None => policy.held_at(now).map_or(0, |held| held.level),
            Some(level) => policy.spec.level(level).ok_or_else(|| {
                let known: Vec<&str> = policy
                    .spec
                    .levels
                    .iter()
                    .map(|level| level.name.as_str())
                    .collect();
                bad(
                    "levels",
                    format!(
                        "{level:?} is not a level of {}; want one of {}",
                        policy.name,
                        known.join(", ")
                    ),
                )
            })?,
        };
        standing.push((&policy.name, &*policy.spec, at));
    }
    let named = |name: &String| {
        snapshot
            .degradations()
            .iter()
            .any(|policy| *policy.name == **name)
    };
    match question.levels.keys().find(|name| !named(name)) {
        Some(name) => Err(bad("levels", format!("there is no DegradationPolicy/{name}"))),
        None => Ok(Levels::new(standing)),
    }
}

/// An explanation while it is made.
struct Telling<'a> {
    world: &'a World,
    snapshot: &'a Snapshot,
    asked: &'a Asked<'a>,
    levels: &'a Levels,
    now: SystemTime,
    steps: Vec<Step>,
    involved: BTreeSet<Key>,
}

/// Refused resources that are told of.
const MAX_QUARANTINED: usize = 20;

/// What is told in a sentence, and the rule that is taken.
type Taken = (String, Option<(Name, usize)>);

impl Telling<'_> {
    fn involve(&mut self, kind: Kind, name: &str) {
        self.involved
            .extend(key(kind, name).filter(|key| self.world.get(key).is_some()));
    }

    fn tell(&mut self) -> Result<Taken, BadQuestion> {
        self.quarantined();
        if let Some(summary) = self.bad_path() {
            return Ok((summary, None));
        }
        let listener = match self.door()? {
            doors::Came::In(listener) => listener,
            doors::Came::Answered(summary) => return Ok((summary, None)),
        };
        let Some(rule) = self.route(listener) else {
            let text = format!("{} gets 404: no route is for it", self.asked.told());
            return Ok((text, None));
        };
        let name = Name::parse(&rule.route).ok();
        let taken = name.map(|name| (name, usize::try_from(rule.position).unwrap_or(usize::MAX)));
        self.involve(Kind::Route, &rule.route);
        let targets = self.backends(rule);
        let denied = self.authorize(rule, &targets);
        let refused = self.gate(rule);
        self.admit(rule, &targets);
        self.fault(rule);
        self.plugins(rule);
        self.cache(rule);
        for target in &targets {
            self.zones(target);
        }
        self.attempts(rule, &targets);
        self.ladder(rule);
        let worst = self.worst(rule);
        self.telemetry();
        let way = targets.iter().map(|(share, view)| match targets.len() {
            1 => view.name.to_string(),
            _ => format!("{} ({share})", view.name),
        });
        let way: Vec<String> = way.collect();
        let goes = match (denied, refused) {
            (Some(why), _) | (None, Some(why)) => {
                let ladder = if rule.fallback.is_some() {
                    ", unless the ladder answers"
                } else {
                    ""
                };
                format!("is refused{ladder}: {why}")
            }
            (None, None) if way.is_empty() => "has no backend".to_owned(),
            (None, None) => format!("goes to {}", way.join(", ")),
        };
        let text = format!(
            "{} {goes}, by Route/{} rules[{}]; {worst}",
            self.asked.told(),
            rule.route,
            rule.position
        );
        Ok((text, taken))
    }

    /// What proxies would set aside: it has no part in what follows, though somebody may think so.
    fn quarantined(&mut self) {
        let all = self.world.quarantined();
        let steps = all.iter().take(MAX_QUARANTINED).map(|(key, why)| {
            let runs = match why.running {
                Some(_) => "its version before stays",
                None => "it has no part in this",
            };
            Step::new("resource", format!("{key}: {}; {runs}", why.reason)).by(key.clone(), "")
        });
        let steps: Vec<Step> = steps.collect();
        if !steps.is_empty() {
            let says = format!("{} resources are refused by proxies", all.len());
            self.steps.push(Step::new("quarantined", says).with(steps));
        }
    }

    /// Why a proxy wouldn't even look at the path.
    fn bad_path(&mut self) -> Option<String> {
        let error = path::normalise(self.asked.raw_path()).err()?;
        self.steps
            .push(Step::new("path", format!("refused with 400: {error}")));
        Some(format!("{} gets 400: {error}", self.asked.told()))
    }

    /// A condition, and how it stands for this request.
    fn condition(&self, condition: &FlagCondition, route: Option<&str>) -> (bool, String) {
        let resolved = self.asked.evaluate(condition, route, None);
        let holds = condition.holds(&resolved.evaluation);
        let wanted = match condition.variants.as_slice() {
            [] => "true".to_owned(),
            variants => variants.join(" or "),
        };
        let is = match (resolved.evaluation.variant, resolved.evaluation.error) {
            (Some(variant), _) => format!("is {variant} ({})", resolved.evaluation.reason.as_str()),
            (None, Some(error)) => format!(
                "has no value ({}), so the default {} counts",
                error.as_str(),
                condition.default
            ),
            (None, None) => format!("has no value, so the default {} counts", condition.default),
        };
        let by = resolved
            .by
            .map_or_else(String::new, |by| format!(", forced by {by}"));
        (
            holds,
            format!("flag {:?} {is}{by}; wanted: {wanted}", &*condition.flag),
        )
    }

    fn telemetry(&mut self) {
        // Policy has no settings for telemetry; every proxy records the same of each request.
        let says = "counted, and recorded in the access log; traced if the caller's trace is sampled or the proxy's own settings say so";
        self.steps.push(Step::new("record", says));
    }
}

fn limit(limit: Option<std::time::Duration>) -> String {
    limit.map_or_else(|| "no limit".to_owned(), duration)
}

fn at(rule: &RuleView, field: &str) -> String {
    match field {
        "" => format!("spec.rules[{}]", rule.position),
        field => format!("spec.rules[{}].{field}", rule.position),
    }
}

#[cfg(test)]
mod tests;

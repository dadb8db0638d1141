//! Which rule a request takes, and why not another.

use super::{Step, Telling, at, key};
use crate::lint::text::list;
use crate::model::{HeaderMatch, HostMatch, Parent, PathMatch, Route, RouteMatch, RouteRule, ValueMatch};
use crate::{Kind, ListenerView, Name, RuleView, ServiceView, Spec, path};
use std::cmp::Reverse;

/// Rules that are told of, beside the one that is taken.
const MAX_OTHERS: usize = 20;

/// How closely a match fits, as proxies compare them: host, path, method, headers, and then the order.
type Rank = (usize, usize, bool, usize, Reverse<usize>);

/// A rule that isn't taken, and why.
struct Other<'a> {
    route: &'a Name,
    position: usize,
    /// How near it was to be taken.
    near: u8,
    why: String,
}

impl<'a> Telling<'a> {
    /// The rule, as the data plane finds it.
    pub(super) fn route(&mut self, listener: Option<&ListenerView>) -> Option<&'a RuleView> {
        let found = match listener {
            None => self.snapshot.route(self.asked),
            Some(listener) => self.snapshot.route_at(listener, self.asked),
        };
        let found = found.map(|(_, rule)| rule);
        let (best, others) = self.others(listener, found);
        let says = match found {
            None => format!("no route is for {}", self.asked.told()),
            Some(rule) => format!("takes rules[{}] of Route/{}", rule.position, rule.route),
        };
        let mut step = Step::new("route", says).with(others);
        if let Some(rule) = found {
            if let Some(key) = key(Kind::Route, &rule.route) {
                step = step.by(key, at(rule, ""));
            }
            if let Some((host, on)) = best {
                step = step.fact("host", host).fact("match", describe(on));
            }
            step = step.fact("priority", rule.priority.default.as_str());
            if let Some(condition) = &rule.when {
                step = step.fact("when", self.condition(condition, Some(&rule.route)).1);
            }
        }
        self.steps.push(step);
        found
    }

    /// The match by which the rule is taken, and the rules that aren't.
    fn others(
        &self,
        listener: Option<&ListenerView>,
        taken: Option<&RuleView>,
    ) -> (Option<(&'a HostMatch, &'a RouteMatch)>, Vec<Step>) {
        let mut best: Option<(Rank, (&'a HostMatch, &'a RouteMatch))> = None;
        let mut others: Vec<Other<'a>> = Vec::new();
        let mut order = 0;
        for resource in self.world.resources() {
            let Spec::Route(route) = &resource.spec else {
                continue;
            };
            let open = opens(route, listener);
            let host = route.hostnames.iter();
            let host = host
                .filter_map(|host| Some((host.fit(self.asked.host())?, host)))
                .max_by_key(|(fit, _)| *fit);
            for (position, rule) in route.rules.iter().enumerate() {
                order += 1;
                let is_taken = taken.is_some_and(|taken| {
                    *taken.route == *resource.name.as_str() && usize::try_from(taken.position) == Ok(position)
                });
                if is_taken {
                    let found = route.hostnames.iter().flat_map(|host| {
                        rule.matches
                            .iter()
                            .filter_map(move |on| Some((self.rank(host, on, order)?, (host, on))))
                    });
                    best = found.max_by_key(|(rank, _)| *rank).or(best);
                    continue;
                }
                let Some((_, host)) = host else { continue };
                let (near, why) = self.why_not(&resource.name, rule, host, open);
                others.push(Other {
                    route: &resource.name,
                    position,
                    near,
                    why,
                });
            }
        }
        others.sort_by_key(|other| Reverse(other.near));
        let all = others.len();
        let mut steps: Vec<Step> = others.into_iter().take(MAX_OTHERS).filter_map(told).collect();
        if all > MAX_OTHERS {
            steps.push(Step::new(
                "rule",
                format!("{} more rules of this host are not taken", all - MAX_OTHERS),
            ));
        }
        (best.map(|(_, found)| found), steps)
    }

    /// How closely a match fits, if it does.
    fn rank(&self, host: &HostMatch, on: &RouteMatch, order: usize) -> Option<Rank> {
        let host = host.fit(self.asked.host())?;
        let path = self.path_fit(&on.path)?;
        let holds = self.method_holds(on) && on.headers.iter().all(|header| self.header_holds(header));
        holds.then_some((host, path, on.method.is_some(), on.headers.len(), Reverse(order)))
    }

    fn path_fit(&self, on: &PathMatch) -> Option<usize> {
        match on {
            PathMatch::Exact(exact) => (*path::of_policy(exact) == *self.asked.path()).then_some(usize::MAX),
            PathMatch::Prefix(prefix) => {
                let prefix = path::of_policy(prefix);
                let rest = self.asked.path().strip_prefix(&*prefix)?;
                (rest.is_empty() || rest.starts_with('/')).then_some(prefix.len())
            }
        }
    }

    fn method_holds(&self, on: &RouteMatch) -> bool {
        on.method
            .as_deref()
            .is_none_or(|method| method == self.asked.method())
    }

    fn header_holds(&self, on: &HeaderMatch) -> bool {
        let has = |test: &mut dyn FnMut(&[u8]) -> bool| self.asked.has(&on.name, test);
        match &on.value {
            ValueMatch::Exact(want) => has(&mut |got| got == want.as_bytes()),
            ValueMatch::Prefix(want) => has(&mut |got| got.starts_with(want.as_bytes())),
            ValueMatch::Present => has(&mut |_| true),
            ValueMatch::Absent => !has(&mut |_| true),
        }
    }

    /// Why a rule whose host fits is not taken, and how near it was.
    fn why_not(&self, route: &Name, rule: &RouteRule, host: &HostMatch, open: bool) -> (u8, String) {
        if !open {
            return (
                0,
                "its route isn't for where the request comes in (parentRefs)".to_owned(),
            );
        }
        let mut nearest: Option<(u8, String)> = None;
        for on in &rule.matches {
            let found = if self.path_fit(&on.path).is_none() {
                (1, format!("path: wants {}", describe_path(&on.path)))
            } else if !self.method_holds(on) {
                (
                    2,
                    format!("method: wants {}", on.method.as_deref().unwrap_or_default()),
                )
            } else if let Some(header) = on.headers.iter().find(|header| !self.header_holds(header)) {
                (3, format!("header: wants {}", describe_header(header)))
            } else if let Some((false, why)) = rule
                .when
                .as_ref()
                .map(|when| self.condition(when, Some(route.as_str())))
            {
                (4, format!("when: {why}"))
            } else {
                (
                    5,
                    format!(
                        "matches, too, by {host} and {}, but less closely, or behind the one that is taken",
                        describe(on)
                    ),
                )
            };
            if nearest.as_ref().is_none_or(|(near, _)| *near < found.0) {
                nearest = Some(found);
            }
        }
        nearest.unwrap_or_else(|| (0, "it matches nothing".to_owned()))
    }

    /// The services that the request may go to, each with its share.
    pub(super) fn backends(&mut self, rule: &'a RuleView) -> Vec<(String, &'a ServiceView)> {
        let mut able = Vec::new();
        let mut steps = Vec::new();
        for (weight, target, when) in rule.choices() {
            let Some(view) = self.snapshot.service(target.service) else {
                continue;
            };
            self.involve(Kind::Service, &view.name);
            let (holds, why) = match when {
                None => (true, None),
                Some(condition) => {
                    let (holds, why) = self.condition(condition, Some(&rule.route));
                    (holds, Some(why))
                }
            };
            let subset = view.subset_id(target.subset);
            let mut step = Step::new("backend", format!("Service/{}, weight {weight}", view.name))
                .fact("weight", weight);
            if !subset.is_empty() {
                step = step.fact("subset", &subset);
            }
            if let Some(why) = why {
                step = step.fact("when", why);
            }
            steps.push(step);
            if holds && weight > 0 {
                able.push((weight, view));
            }
        }
        let total: u64 = able.iter().map(|(weight, _)| weight).sum();
        let mut targets: Vec<(String, &'a ServiceView)> = Vec::new();
        for (weight, view) in able {
            // In tenths of a percent.
            let share = weight * 1000 / total.max(1);
            let share = if share.is_multiple_of(10) {
                format!("{} %", share / 10)
            } else {
                format!("{}.{} %", share / 10, share % 10)
            };
            targets.push((share, view));
        }
        let says = match targets.as_slice() {
            [] => "no backend has a share of it".to_owned(),
            targets => list(
                targets
                    .iter()
                    .map(|(share, view)| format!("{share} to Service/{}", view.name)),
            ),
        };
        let says = match &rule.router {
            Some(router) => format!("Plugin/{} chooses; without a word of its: {says}", router.name),
            None => says,
        };
        let mut step = Step::new("backends", says).with(steps);
        if let Some(key) = key(Kind::Route, &rule.route) {
            step = step.by(key, at(rule, "backendRefs"));
        }
        self.steps.push(step);
        targets
    }
}

fn told(other: Other<'_>) -> Option<Step> {
    let of = key(Kind::Route, other.route.as_str())?;
    let says = format!(
        "not rules[{}] of Route/{}: {}",
        other.position, other.route, other.why
    );
    Some(Step::new("rule", says).by(of, format!("spec.rules[{}]", other.position)))
}

/// Whether a route is for where a request comes in.
fn opens(route: &Route, listener: Option<&ListenerView>) -> bool {
    let Some(listener) = listener else {
        return route.is_for_mesh();
    };
    route.parents.iter().any(|parent| match parent {
        Parent::Mesh => false,
        Parent::Gateway {
            gateway,
            listener: section,
        } => {
            *gateway.as_str() == *listener.gateway
                && section
                    .as_ref()
                    .is_none_or(|section| *section == listener.spec.name)
        }
    })
}

fn describe_path(on: &PathMatch) -> String {
    match on {
        PathMatch::Exact(exact) => format!("exactly {exact}"),
        PathMatch::Prefix(prefix) if prefix.is_empty() => "any path".to_owned(),
        PathMatch::Prefix(prefix) => format!("{prefix}/*"),
    }
}

fn describe_header(on: &HeaderMatch) -> String {
    match &on.value {
        ValueMatch::Exact(value) => format!("{}: {value}", on.name),
        ValueMatch::Prefix(value) => format!("{}: {value}*", on.name),
        ValueMatch::Present => format!("{} to be there", on.name),
        ValueMatch::Absent => format!("{} not to be there", on.name),
    }
}

fn describe(on: &RouteMatch) -> String {
    let path = describe_path(&on.path);
    let method = on.method.iter().map(|method| format!("method {method}"));
    let headers = on
        .headers
        .iter()
        .map(|header| format!("header {}", describe_header(header)));
    list(std::iter::once(path).chain(method).chain(headers))
}

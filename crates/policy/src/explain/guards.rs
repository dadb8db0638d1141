//! What may keep a request out: authorization, flags, levels, limits, faults.

use super::asked::ByRoute;
use super::{Step, Telling, at, key, limit};
use crate::lint::text::{duration, list};
use crate::model::{CircuitBreaker, Priority, RateLimitKey};
use crate::{Decision, Denied, Held, Kind, RuleView, ServiceView, path};
use std::sync::Arc;

type Targets<'a> = [(String, &'a ServiceView)];

impl<'a> Telling<'a> {
    /// Why the request may not pass to one of its services, if so.
    pub(super) fn authorize(&mut self, rule: &RuleView, targets: &Targets<'a>) -> Option<String> {
        let who = match self.asked.question.identity.as_deref() {
            Some(identity) => format!("as {identity}"),
            None => "without an identity".to_owned(),
        };
        let mut denied = None;
        for (_, view) in targets {
            let Some(policies) = &view.authorization else {
                let says = format!(
                    "everybody may call Service/{}: no AuthorizationPolicy is for it",
                    view.name
                );
                self.steps
                    .push(Step::new("authorize", says).fact("decision", "allow"));
                continue;
            };
            let ambiguous = policies
                .looks_at_paths
                .then(|| path::ambiguity(self.asked.path()))
                .flatten();
            if let Some(what) = ambiguous {
                let says = format!(
                    "refused with 400: {what}, and rules of Service/{} look at paths",
                    view.name
                );
                self.steps
                    .push(Step::new("authorize", says.clone()).fact("decision", "deny"));
                denied = denied.or(Some(says));
                continue;
            }
            let asking = ByRoute {
                asked: self.asked,
                route: &rule.route,
            };
            let mut notes: Vec<(Arc<str>, Option<u32>, Decision)> = Vec::new();
            let decided = policies.decide(&asking, &mut |policy, rule, decision| {
                notes.push((Arc::clone(policy), rule, decision));
            });
            let steps: Vec<Step> = notes
                .iter()
                .map(|(policy, rule, decision)| {
                    let by = match rule {
                        Some(rule) => format!("rules[{rule}] of AuthorizationPolicy/{policy} matches"),
                        None => format!("no rule of AuthorizationPolicy/{policy} matches"),
                    };
                    let step = Step::new("policy", format!("{}: {by}", decision.as_str()));
                    let path =
                        rule.map_or_else(|| "spec.rules".to_owned(), |rule| format!("spec.rules[{rule}]"));
                    match key(Kind::AuthorizationPolicy, policy) {
                        Some(key) => step.by(key, path),
                        None => step,
                    }
                })
                .collect();
            for (policy, ..) in &notes {
                self.involve(Kind::AuthorizationPolicy, policy);
            }
            let (says, decision) = match decided {
                Ok(()) => (format!("may call Service/{} {who}", view.name), "allow"),
                Err(why) => {
                    let (status, why) = match why {
                        Denied::ByPolicy => (403, "a policy denies it, or none allows it"),
                        Denied::NoIdentity => {
                            (401, "what would allow it goes by identity, and there is none")
                        }
                        Denied::NoPolicy => (403, "a policy that might refuse it can't be used"),
                    };
                    let says = format!("may not call Service/{} {who}: {why}", view.name);
                    denied = denied.or_else(|| Some(format!("{status}, {says}")));
                    (says, "deny")
                }
            };
            let mut step = Step::new("authorize", says)
                .fact("decision", decision)
                .fact("service", &view.name)
                .with(steps);
            if !policies.issuers.is_empty() {
                let claims = if self.asked.question.claims.is_some() {
                    "those that were given"
                } else {
                    "none, as without a token"
                };
                step = step.fact("claims", claims);
            }
            self.steps.push(step);
        }
        denied
    }

    /// Why no call is made at all: a flag, or a level.
    pub(super) fn gate(&mut self, rule: &RuleView) -> Option<String> {
        let mut refused = None;
        if let Some(condition) = &rule.enabled {
            let (holds, why) = self.condition(condition, Some(&rule.route));
            let says = if holds {
                format!("calls are made: {why}")
            } else {
                format!("no call is made (disabled): {why}")
            };
            refused = (!holds).then(|| says.clone());
            let step = Step::new("enabled", says).fact("holds", holds);
            self.steps.push(match key(Kind::Route, &rule.route) {
                Some(key) => step.by(key, at(rule, "enabled")),
                None => step,
            });
        }
        if self.snapshot.degradations().is_empty() {
            return refused;
        }
        let priority = self.priority(rule);
        let standing = self.levels.standing.iter();
        let standing: Vec<Step> = standing
            .map(|level| {
                Step::new(
                    "level",
                    format!("DegradationPolicy/{} is at {}", level.policy, level.id),
                )
                .fact("level", &level.id)
            })
            .collect();
        let shed = self.levels.sheds(&rule.route, priority);
        let says = match shed {
            Some(by) => format!("shed: {by} refuses requests of priority {}", priority.as_str()),
            None => format!("no level sheds requests of priority {}", priority.as_str()),
        };
        for policy in self.snapshot.degradations() {
            self.involve(Kind::DegradationPolicy, &policy.name);
        }
        let shed = shed.map(|_| says.clone());
        self.steps.push(
            Step::new("levels", says)
                .fact("priority", priority.as_str())
                .with(standing),
        );
        refused.or(shed)
    }

    fn priority(&self, rule: &RuleView) -> Priority {
        let named = rule
            .priority
            .header
            .as_deref()
            .and_then(|header| self.asked.header(header));
        let of = named.and_then(|word| {
            Priority::ALL
                .into_iter()
                .find(|priority| word.trim().eq_ignore_ascii_case(priority.as_str()))
        });
        of.unwrap_or(rule.priority.default)
    }

    /// Limits and circuits, in the order in which they are asked.
    pub(super) fn admit(&mut self, rule: &RuleView, targets: &Targets<'a>) {
        let of_rule = |step: Step, field: &str| match key(Kind::Route, &rule.route) {
            Some(key) => step.by(key, at(rule, field)),
            None => step,
        };
        for (i, bound) in rule.rate_limits.iter().enumerate() {
            let whose = match &bound.key {
                RateLimitKey::Rule => "all requests of the rule".to_owned(),
                RateLimitKey::Caller { .. } => "each caller".to_owned(),
                RateLimitKey::Header { name, .. } => match self.asked.header(name) {
                    Some(value) => format!("requests with {name}: {value}"),
                    None => format!("each value of {name}, which this request hasn't"),
                },
            };
            let says = format!(
                "at most {} in {}, {} at once, for {whose}, on each proxy",
                bound.requests,
                duration(bound.interval),
                bound.burst
            );
            self.steps
                .push(of_rule(Step::new("rateLimit", says), &format!("rateLimits[{i}]")));
        }
        if let Some(breaker) = &rule.circuit_breaker {
            self.steps
                .push(of_rule(circuit("circuit of the rule", breaker), "circuitBreaker"));
        }
        if let Some(held) = self.held(rule.held.as_ref(), "circuit of the rule") {
            self.steps.push(held);
        }
        for (_, view) in targets {
            self.protect(view);
        }
    }

    fn held(&self, held: Option<&Held>, whose: &str) -> Option<Step> {
        let held = held.filter(|held| held.until > self.now)?;
        let left = held.until.duration_since(self.now).unwrap_or_default();
        let left = std::time::Duration::from_secs(left.as_secs());
        Some(Step::new(
            "held",
            format!("{whose} is held: {:?} for another {}", held.mode, duration(left)),
        ))
    }

    fn protect(&mut self, view: &ServiceView) {
        let service = key(Kind::Service, &view.name);
        let policy = view.spec.resilience.clone().or_else(|| {
            let default = crate::model::ResiliencePolicy::DEFAULT_NAME;
            crate::Name::parse(default).ok()
        });
        let policy = policy.and_then(|name| key(Kind::ResiliencePolicy, name.as_str()));
        let policy = policy.filter(|key| self.world.get(key).is_some());
        self.involved.extend(policy.clone());
        let by = |step: Step, path: &str| match &policy {
            Some(key) => step.by(key.clone(), path),
            None => step,
        };
        let resilience = &view.resilience;
        let mut steps = Vec::new();
        if let Some(breaker) = &resilience.circuit_breaker {
            steps.push(by(
                circuit("circuit of the service", breaker),
                "spec.circuitBreaker",
            ));
        }
        steps.extend(self.held(view.held.as_ref(), "circuit of the service"));
        if let Some(shedding) = &resilience.load_shedding {
            let says = format!(
                "refuses low priority from {} % of the service's limits on, normal from {} %, high from {} %",
                shedding.low, shedding.normal, shedding.high
            );
            steps.push(by(Step::new("loadShedding", says), "spec.loadShedding"));
        }
        if let Some(adaptive) = &resilience.adaptive_concurrency {
            let says = format!(
                "as many under way as latency allows, {} to {}",
                adaptive.min_limit, adaptive.max_limit
            );
            steps.push(by(
                Step::new("adaptiveConcurrency", says),
                "spec.adaptiveConcurrency",
            ));
        }
        if let Some(admission) = &resilience.admission_control {
            let says = format!(
                "refuses some here when less than {} % succeed over {}",
                admission.success_threshold,
                duration(admission.window)
            );
            steps.push(by(Step::new("admissionControl", says), "spec.admissionControl"));
        }
        if let Some(breaker) = &resilience.endpoint_circuit_breaker {
            steps.push(by(
                circuit("circuit of each endpoint", breaker),
                "spec.endpointCircuitBreaker",
            ));
        }
        let pool = &view.spec.pool;
        let wait = match pool.max_pending_requests {
            0 => "none waits".to_owned(),
            waiting => format!("{waiting} more wait for up to {}", duration(pool.pending_timeout)),
        };
        let mut bulkhead = Step::new(
            "bulkhead",
            format!(
                "at most {} under way and {} connections on each proxy; {wait}",
                pool.max_requests, pool.max_connections
            ),
        )
        .fact("maxRequests", pool.max_requests)
        .fact("maxPendingRequests", pool.max_pending_requests)
        .fact("maxConnections", pool.max_connections);
        if let Some(caller) = &pool.per_caller {
            bulkhead = bulkhead.fact("perCaller", caller.max_requests);
        }
        steps.push(match &service {
            Some(key) => bulkhead.by(key.clone(), "spec.connectionPool"),
            None => bulkhead,
        });
        if view.endpoints.is_empty() {
            let hold = &view.spec.hold;
            let says = format!(
                "no endpoints: up to {} requests wait for one, for up to {}",
                hold.max_requests,
                duration(hold.max_wait)
            );
            steps.push(Step::new("hold", says));
        }
        let whose = policy
            .as_ref()
            .map_or_else(|| "defaults".to_owned(), ToString::to_string);
        let step = Step::new(
            "protect",
            format!("Service/{} is protected by {whose}", view.name),
        )
        .with(steps);
        self.steps.push(match service {
            Some(key) => step.by(key, ""),
            None => step,
        });
    }

    /// Faults that are injected.
    pub(super) fn fault(&mut self, rule: &RuleView) {
        let Some(fault) = &rule.fault else { return };
        let on = fault
            .when
            .as_ref()
            .map(|condition| self.condition(condition, Some(&rule.route)));
        let does = [
            fault
                .delay
                .map(|delay| format!("held up for {}", duration(delay))),
            fault.abort.map(|cause| format!("failed with {}", cause.as_str())),
        ];
        let does = list(does.into_iter().flatten());
        let says = match &on {
            Some((false, why)) => format!("none: {why}"),
            Some((true, why)) => format!("{} % of requests are {does}: {why}", fault.percent),
            None => format!("{} % of requests are {does}", fault.percent),
        };
        let step = Step::new("fault", says).fact("percent", fault.percent);
        self.steps.push(match key(Kind::Route, &rule.route) {
            Some(key) => step.by(key, at(rule, "fault")),
            None => step,
        });
    }

    /// Plugins on the way.
    pub(super) fn plugins(&mut self, rule: &RuleView) {
        for (i, filter) in rule.filters.iter().enumerate() {
            self.involve(Kind::Plugin, &filter.name);
            let view = filter.plugin.and_then(|idx| self.snapshot.plugin(idx));
            let conditions = filter
                .when
                .iter()
                .chain(view.and_then(|view| view.spec.when.as_ref()));
            let conditions: Vec<_> = conditions
                .map(|condition| self.condition(condition, Some(&rule.route)))
                .collect();
            let says = match conditions.iter().find(|(holds, _)| !holds) {
                Some((_, why)) => format!("doesn't pass Plugin/{}: {why}", filter.name),
                None => format!("passes Plugin/{}", filter.name),
            };
            let mut step = Step::new("filter", says);
            if let Some(view) = view {
                step = step
                    .fact("callTimeout", duration(view.spec.limits.call_timeout))
                    .fact("onFault", format!("{:?}", view.spec.on_fault));
            }
            self.steps.push(match key(Kind::Route, &rule.route) {
                Some(key) => step.by(key, at(rule, &format!("filters[{i}]"))),
                None => step,
            });
        }
        if let Some(router) = &rule.router {
            self.involve(Kind::Plugin, &router.name);
        }
    }

    /// What may be answered from a cache.
    pub(super) fn cache(&mut self, rule: &RuleView) {
        let Some(cache) = &rule.cache else { return };
        let says = match self.asked.method() {
            "GET" | "HEAD" => format!(
                "may be answered from the cache: fresh for {} where the answer doesn't say, and for {} more in place of a failure",
                duration(cache.default_ttl),
                duration(cache.stale_if_error)
            ),
            method => format!("{method} isn't answered from the cache"),
        };
        let step = Step::new("cache", says);
        self.steps.push(match key(Kind::Route, &rule.route) {
            Some(key) => step.by(key, at(rule, "cache")),
            None => step,
        });
    }
}

fn circuit(whose: &str, breaker: &CircuitBreaker) -> Step {
    let rate = |rate: u32, what: String| {
        (rate > 0).then(|| format!("{rate} % {what} of {} calls at least", breaker.minimum_calls))
    };
    let row = (breaker.consecutive_failures > 0)
        .then(|| format!("{} failures in a row", breaker.consecutive_failures));
    let opens = [
        rate(breaker.failure_rate, "failed".to_owned()),
        rate(
            breaker.slow_call_rate,
            format!("slower than {}", duration(breaker.slow_call_duration)),
        ),
        row,
    ];
    let opens = list(opens.into_iter().flatten());
    let opens = if opens.is_empty() {
        "never".to_owned()
    } else {
        format!("after {opens} in {}", duration(breaker.window))
    };
    Step::new(
        "circuit",
        format!(
            "{whose} opens {opens}, for {} to {}",
            duration(breaker.open_time),
            duration(breaker.max_open_time)
        ),
    )
    .fact("mode", format!("{:?}", breaker.mode))
    .fact("failureRate", breaker.failure_rate)
    .fact("minimumCalls", breaker.minimum_calls)
    .fact("window", duration(breaker.window))
    .fact("openTime", limit(Some(breaker.open_time)))
}

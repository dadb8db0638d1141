//! Where attempts go, how many there are, and how long they take.

use super::{Step, Telling, at, key, limit};
use crate::lint::text::{duration, list};
use crate::lint::time::pauses_of;
use crate::{Kind, RuleView, ServiceView, Via};
use std::time::Duration;

impl<'a> Telling<'a> {
    /// The zones of a service, in the order in which this proxy turns to them.
    pub(super) fn zones(&mut self, (share, view): &(String, &'a ServiceView)) {
        let mut steps = Vec::new();
        let mut order = Vec::new();
        for tier in view.tiers.iter() {
            self.involve(Kind::Zone, &tier.zone);
            let endpoints = tier.endpoints.iter().filter_map(|at| view.endpoints.get(*at));
            let weight: u64 = endpoints.clone().map(|endpoint| u64::from(endpoint.weight)).sum();
            let way = match endpoints.clone().next().map(|endpoint| &endpoint.key.via) {
                Some(Via::Proxy { .. }) => "by the proxies in front of them",
                Some(Via::Gateway { .. }) => "by the gateways of the zone",
                Some(Via::Direct) | None => "straight",
            };
            let drained = tier.drain.as_ref().filter(|drain| drain.is_on(self.now));
            let mut says = format!("zone {}: {} endpoints, {way}", tier.zone, tier.endpoints.len());
            if let Some(drain) = drained {
                says.push_str(&format!(
                    "; drained, keeps {:.0} % of its share",
                    drain.kept(self.now) * 100.0
                ));
            }
            if let Some(weight) = tier.weight {
                says.push_str(&format!("; weight {weight}"));
            }
            order.push(tier.zone.to_string());
            let shown = list(endpoints.take(16).map(|endpoint| &endpoint.address_text));
            let mut step = Step::new("zone", says)
                .fact("zone", &tier.zone)
                .fact("endpoints", tier.endpoints.len())
                .fact("weight", weight)
                .fact("addresses", shown);
            step.resource = key(Kind::Zone, &tier.zone);
            steps.push(step);
        }
        let balance = &view.spec.balance;
        let at_once = view.tiers.iter().any(|tier| tier.weight.is_some());
        let says = match order.as_slice() {
            [] => format!("Service/{} has no endpoint that this proxy may go to", view.name),
            [only] => format!("Service/{} is in {only} alone", view.name),
            zones if at_once => format!(
                "Service/{} is served by {} at once, by weight",
                view.name,
                zones.join(", ")
            ),
            zones => format!(
                "Service/{} is asked in {}; each takes what those before it can't",
                view.name,
                zones.join(", then ")
            ),
        };
        let mut step = Step::new("zones", says)
            .fact("service", &view.name)
            .fact("share", share)
            .fact("policy", policy_word(view))
            .fact("leaveBelow", format!("{} %", balance.zones.leave_below))
            .fact("panicThreshold", format!("{} %", balance.panic_threshold))
            .with(steps);
        if let Some(label) = &balance.within {
            step = step.fact("within", label);
        }
        self.steps.push(match key(Kind::Service, &view.name) {
            Some(key) => step.by(key, "spec.loadBalancer"),
            None => step,
        });
    }

    /// What is kept for the ladder.
    pub(super) fn reserve(&self, rule: &RuleView) -> Duration {
        let ladder = rule.fallback.and_then(|idx| self.snapshot.fallback(idx));
        let percent = ladder.map_or(0, |ladder| ladder.reserve_percent.min(100));
        rule.request_timeout
            .map_or(Duration::ZERO, |whole| whole / 100 * percent)
    }

    /// The longest that the attempts may take; `None` is no limit.
    pub(super) fn attempts_take(&self, rule: &RuleView) -> Option<Duration> {
        let by_request = rule
            .request_timeout
            .map(|whole| whole.saturating_sub(self.reserve(rule)));
        let by_attempts = rule.attempt_timeout.map(|attempt| {
            attempt
                .saturating_mul(u32::from(rule.retry.max_attempts))
                .saturating_add(pauses_of(&rule.retry))
        });
        [by_request, by_attempts].into_iter().flatten().min()
    }

    pub(super) fn attempts(&mut self, rule: &RuleView, targets: &[(String, &'a ServiceView)]) {
        let of_rule = |step: Step, field: &str| match key(Kind::Route, &rule.route) {
            Some(key) => step.by(key, at(rule, field)),
            None => step,
        };
        let retry = &rule.retry;
        let connect = targets.iter().map(|(_, view)| view.spec.connect_timeout).max();
        let times = format!(
            "{} for the request, {} for each attempt, {} for a connection, {} of silence in bodies",
            limit(rule.request_timeout),
            limit(rule.attempt_timeout),
            limit(connect),
            limit(rule.idle_timeout)
        );
        let step = Step::new("timeouts", times)
            .fact("request", limit(rule.request_timeout))
            .fact("backendRequest", limit(rule.attempt_timeout))
            .fact("connectTimeout", limit(connect))
            .fact("idle", limit(rule.idle_timeout))
            .fact("attempts", limit(self.attempts_take(rule)))
            .fact("kept", duration(self.reserve(rule)));
        self.steps.push(of_rule(step, "timeouts"));
        let on = list(retry.on.iter().map(|on| format!("{on:?}")));
        let idempotent = matches!(
            self.asked.method(),
            "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE"
        ) || self.asked.header("idempotency-key").is_some();
        let budgets = targets.iter().map(|(_, view)| {
            let budget = &view.resilience.retry_budget;
            format!(
                "{} % of requests and {}/s for Service/{}",
                budget.percent, budget.min_per_second, view.name
            )
        });
        let budgets: Vec<String> = budgets.collect();
        let twice = match (idempotent, retry.non_idempotent) {
            (true, _) => "and may be sent twice",
            (false, true) => "and is sent twice though that may do its work twice",
            (false, false) => "and is sent again only where it can't have reached a workload",
        };
        let says = match retry.max_attempts {
            1 => "one attempt".to_owned(),
            most => format!(
                "up to {most} attempts, on {on}, {twice}; pauses of up to {} in all",
                duration(pauses_of(retry))
            ),
        };
        let mut step = Step::new("retry", says)
            .fact("maxAttempts", retry.max_attempts)
            .fact("retryOn", on)
            .fact("idempotent", idempotent)
            .fact("pauses", duration(pauses_of(retry)))
            .fact("budget", budgets.join("; "));
        if let Some(hedge) = &retry.hedge {
            step = step.fact(
                "hedge",
                format!("{} more, each after {}", hedge.max_hedges, duration(hedge.delay)),
            );
        }
        self.steps.push(of_rule(step, "retry"));
    }

    /// The longest that the client waits, in a few words.
    pub(super) fn worst(&mut self, rule: &RuleView) -> String {
        let attempts = self.attempts_take(rule);
        let kept = self.reserve(rule);
        let whole = match (attempts, rule.request_timeout) {
            (None, _) => None,
            // The ladder has what is left of the request's time, and never more.
            (Some(_), Some(whole)) if rule.fallback.is_some() => Some(whole),
            (Some(attempts), _) => Some(attempts),
        };
        let says = match whole {
            None => "no limit on how long it takes".to_owned(),
            Some(whole) => format!("answered within {} at worst", duration(whole)),
        };
        let step = Step::new("worstCase", says.clone())
            .fact(
                "attempts",
                u32::from(rule.retry.max_attempts)
                    + rule.retry.hedge.map_or(0, |hedge| u32::from(hedge.max_hedges)),
            )
            .fact("attemptsTake", limit(attempts))
            .fact("ladderHas", duration(kept))
            .fact("latency", limit(whole));
        self.steps.push(step);
        says
    }
}

fn policy_word(view: &ServiceView) -> &'static str {
    use crate::model::BalancePolicy;
    match view.spec.balance.policy {
        BalancePolicy::PeakEwma(_) => "PeakEwma",
        BalancePolicy::LeastRequest => "LeastRequest",
        BalancePolicy::RoundRobin => "RoundRobin",
        BalancePolicy::Random => "Random",
        BalancePolicy::RingHash { .. } => "RingHash",
        BalancePolicy::Maglev { .. } => "Maglev",
    }
}

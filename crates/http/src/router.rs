//! Router: a plugin chooses among a rule's backends.

use crate::admit::Received;
use crate::exchange::Exchange;
use crate::facts::{facts, put_back, take_head};
use crate::failure::Failure;
use crate::filtered::{lets_go_on, missing, version_for};
use crate::flags::holds;
use crate::respond::Outcome;
use crate::route::Plan;
use leeward_policy::{RouterView, RuleView};
use leeward_resilience::Standing;
use leeward_wasm::Target;
use std::rc::Rc;
use std::sync::Arc;

/// Asks a rule's router; without a word of its, the weights' choice stays.
pub(crate) async fn choose(
    exchange: &mut Exchange,
    plan: &mut Plan,
    request: &mut Received,
    rule: &RuleView,
    router: &RouterView,
) -> Result<(), Outcome> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let Some(view) = router.plugin.and_then(|idx| snapshot.plugin(idx)) else {
        return Err(missing(exchange, &router.name));
    };
    if let Some(condition) = &view.spec.when
        && !holds(exchange, request, condition, None)
    {
        return Ok(());
    }
    let choices: Vec<_> = rule
        .choices()
        .filter(|(_, _, when)| when.is_none_or(|condition| holds(exchange, request, condition, None)))
        .map(|(weight, target, _)| (weight, target))
        .collect();
    let targets = choices
        .iter()
        .map(|(weight, target)| describe(exchange, *weight, *target))
        .collect();
    let chosen = match version_for(exchange, request, view) {
        Ok(version) => {
            let facts = facts(exchange, request, &router.config, view);
            let worker = Rc::clone(exchange.worker());
            let head = take_head(request);
            let (head, chosen) = worker.plugins.route(&version, head, &facts, targets).await;
            put_back(request, head);
            chosen
        }
        Err(fault) => Err(fault),
    };
    match chosen {
        Ok(chosen) => {
            if let Some((_, target)) = chosen.and_then(|at| choices.get(at)) {
                (plan.service, plan.subset, plan.refused) = (target.service, target.subset, None);
                exchange.record.service = snapshot.service(plan.service).map(|view| Arc::clone(&view.name));
                plan.again(exchange, request);
            }
            Ok(())
        }
        Err(fault) => {
            exchange.plugin_fault(&view.name, fault.as_str());
            if lets_go_on(view) {
                Ok(())
            } else {
                Err(Outcome::Failed(Failure::Plugin))
            }
        }
    }
}

/// A backend as a router sees it.
fn describe(exchange: &Exchange, weight: u64, target: leeward_policy::Target) -> Target {
    let worker = exchange.worker();
    let now = worker.now();
    let snapshot = &exchange.snapshot;
    let table = worker.upstreams.table(snapshot);
    let view = snapshot.service(target.service);
    let at_work = worker.upstreams.service(&table, target.service, now);
    let mut described = Target {
        service: view.map_or_else(|| Arc::from(""), |view| Arc::clone(&view.name)),
        weight: u32::try_from(weight).unwrap_or(u32::MAX),
        healthy: 0,
        endpoints: 0,
        circuit_open: false,
        under_way: 0,
    };
    let (Some(view), Some(at_work)) = (view, at_work) else {
        return described;
    };
    let endpoints = view
        .tiers_of(target.subset)
        .iter()
        .flat_map(|tier| &tier.endpoints);
    for endpoint in endpoints.filter_map(|at| at_work.endpoints.get(*at)) {
        described.endpoints += 1;
        described.healthy += u32::from(endpoint.state.standing(now) == Standing::Healthy);
        described.under_way = described.under_way.saturating_add(endpoint.state.active());
    }
    described.circuit_open = at_work.refuses(now);
    described
}

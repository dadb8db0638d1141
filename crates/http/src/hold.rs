//! Hold: a request for a service without endpoints waits for policy to bring one.

use crate::admit::Received;
use crate::connection::Client;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers::retry_seconds;
use crate::route::{Choice, Plan, route, route_as};
use leeward_policy::{ServiceView, Snapshot};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How often policy is looked at while a request is held. They are few, and a look costs next to nothing.
const LOOK: Duration = Duration::from_millis(20);

/// Waits until the service that a request is for has an endpoint, for as long as policy holds requests. A request
/// that was held goes on under the policy that ended its wait, as if it had just come: it has seen nothing of
/// the one before but that there was nobody to serve it; where plugins have seen it, its rule stays the same.
pub(crate) async fn hold(
    exchange: &mut Exchange,
    client: &Client,
    request: &Received,
    plan: Plan,
) -> Result<Plan, Failure> {
    if is_served(&exchange.snapshot, &plan) {
        return Ok(plan);
    }
    // Rare, so it doesn't belong in the size of every request's future.
    Box::pin(wait(exchange, client, request, plan)).await
}

async fn wait(
    exchange: &mut Exchange,
    client: &Client,
    request: &Received,
    mut plan: Plan,
) -> Result<Plan, Failure> {
    let worker = Rc::clone(exchange.worker());
    let snapshot = Arc::clone(&exchange.snapshot);
    let Some(view) = snapshot.service(plan.service) else {
        return Ok(plan);
    };
    let now = worker.now();
    let table = worker.upstreams.table(&snapshot);
    let state = worker
        .upstreams
        .service(&table, plan.service, now)
        .map(|s| Arc::clone(&s.state));
    let Some(_held) = state.and_then(|state| state.hold(view.spec.hold.max_requests)) else {
        refuse(exchange, view, "hold.maxRequests");
        return Ok(plan);
    };
    let choice = Choice::of(exchange, &plan);
    let until = now + view.spec.hold.max_wait;
    let until = plan.attempts_until.map_or(until, |end| until.min(end));
    while worker.now() < until {
        tokio::time::sleep(LOOK).await;
        let snapshot = worker.pin();
        if Arc::ptr_eq(&snapshot, &exchange.snapshot) {
            continue;
        }
        exchange.record.generation = snapshot.generation;
        exchange.snapshot = snapshot;
        exchange.authorized = None;
        plan = match &choice {
            Some(choice) => route_as(exchange, request, choice)?,
            None => route(exchange, client, request)?,
        };
        if is_served(&exchange.snapshot, &plan) {
            return Ok(plan);
        }
    }
    refuse(exchange, view, "hold.maxWait");
    Ok(plan)
}

fn refuse(exchange: &mut Exchange, view: &ServiceView, limit: &'static str) {
    exchange.retry_after = Some(retry_seconds(view.spec.hold.max_wait));
    exchange.refused_by(limit, Some(&view.name));
}

fn is_served(snapshot: &Snapshot, plan: &Plan) -> bool {
    let view = snapshot.service(plan.service);
    view.is_none_or(|view| plan.only.is_some() || !view.tiers_of(plan.subset).is_empty())
}

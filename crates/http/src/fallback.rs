//! Fallback: when a call failed and policy has a ladder for it, each rung in turn until one answers.

use crate::admit::Received;
use crate::attempts::{Called, call};
use crate::body::Supply;
use crate::cached;
use crate::enqueue::enqueue;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::filtered;
use crate::flags::holds;
use crate::guard::is_failure;
use crate::plugin::ask_plugin;
use crate::respond::{Outcome, Own};
use crate::route::Plan;
use crate::template::{Escape, fill, locate};
use bytes::Bytes;
use http::{Response, header};
use leeward_policy::model::{Cause, Redirect, RungCause, StaticAnswer};
use leeward_policy::{ActView, FallbackView, RungView, ServiceIdx, Snapshot};
use leeward_resilience::{Ladder, Standing, Terms};
use leeward_upstream::IncomingBody;
use std::cell::{Cell, RefCell};
use std::sync::Arc;

/// The original failure, to be given if no rung answers.
struct Original {
    cause: Cause,
    /// The upstream's answer, where that is the failure.
    response: Option<Response<IncomingBody>>,
}

/// A way up the ladder: what its rungs share.
pub(crate) struct Climb<'a> {
    pub(crate) plan: &'a Plan,
    /// Why the call failed.
    pub(crate) cause: Cause,
    /// The zones in which the plan's own service was tried. What a rung for another service met says nothing of it.
    tried: RefCell<Vec<Arc<str>>>,
    /// Whether a rung's plugin had a fault. What filters and a router had before is no rung's.
    pub(crate) faulted: Cell<bool>,
}

/// The zones of a request's attempts from this one on.
fn zones_from(exchange: &Exchange, first: usize) -> impl Iterator<Item = Arc<str>> + '_ {
    let attempts = exchange.record.attempts.iter().skip(first);
    attempts.map(|attempt| Arc::clone(&attempt.zone))
}

/// How a rung ended.
pub(crate) enum Tried {
    Answered(Outcome),
    Declined,
    /// A plugin's fault that policy lets end the ladder.
    PluginFault,
    /// Policy ends the ladder here, with the original failure or with this status.
    Ended(Option<u16>),
}

/// Looks at how the call ended, and climbs the ladder if policy says that this is a failure.
pub(crate) async fn fall_back(
    exchange: &mut Exchange,
    plan: &Plan,
    request: Box<Received>,
    called: Called,
) -> Outcome {
    let snapshot = Arc::clone(&exchange.snapshot);
    let policy = plan.fallback.and_then(|idx| snapshot.fallback(idx));
    let (original, ladder) = match called {
        Ok(response) => {
            let ladder = policy.filter(|policy| policy.acts_on_status(response.status().as_u16()));
            if ladder.is_none() && !(plan.extras && is_gateway_failure(&response)) {
                return Outcome::Served(response, request.upgrade);
            }
            let original = Original {
                cause: Cause::UpstreamStatus,
                response: Some(response),
            };
            (original, ladder)
        }
        Err(cause) => {
            let original = Original {
                cause,
                response: None,
            };
            (original, policy.filter(|policy| policy.acts_on(cause)))
        }
    };
    let Some(policy) = ladder else {
        return give(exchange, plan, &request, original);
    };
    // Rare, so it doesn't belong in the size of every request's future.
    Box::pin(climb(exchange, plan, policy, request, original)).await
}

/// The answers that `stale-if-error` speaks of (RFC 5861 §4).
fn is_gateway_failure(response: &Response<IncomingBody>) -> bool {
    matches!(response.status().as_u16(), 500 | 502 | 503 | 504)
}

/// The original failure as the answer; or, where a cache has one that may stand in for it, that.
fn give(exchange: &mut Exchange, plan: &Plan, request: &Received, original: Original) -> Outcome {
    if plan.extras
        && !original.cause.is_denial()
        && original.response.as_ref().is_none_or(is_gateway_failure)
        && let Some(outcome) = cached::stale(exchange, plan, request, None)
    {
        exchange.let_go();
        exchange.record.cause = Some(original.cause.as_str());
        exchange.record.fallback = Some(Arc::from("stale-if-error"));
        exchange.record.fallback_kind = Some("stale");
        return outcome;
    }
    match original.response {
        Some(response) => Outcome::Served(response, None),
        None => Outcome::Failed(Failure::Call(original.cause)),
    }
}

async fn climb(
    exchange: &mut Exchange,
    plan: &Plan,
    policy: &FallbackView,
    mut request: Box<Received>,
    original: Original,
) -> Outcome {
    // What answers now is not what the service says.
    exchange.fill = None;
    exchange.record.cause = Some(original.cause.as_str());
    let climb = Climb {
        plan,
        cause: original.cause,
        tried: RefCell::new(zones_from(exchange, 0).collect()),
        faulted: Cell::new(false),
    };
    let deadline = exchange.deadline;
    let mut ladder = Ladder::new(policy.rungs.len(), deadline);
    loop {
        let now = exchange.worker().now();
        let step = ladder.next(now, |rung| {
            let rung = policy.rungs.get(rung)?;
            is_for(exchange, &climb, rung, &request).then(|| Terms {
                percent: rung.deadline_percent,
                takes_time: takes_time(&rung.act),
            })
        });
        let Some((step, rung)) = step.and_then(|step| Some((step, policy.rungs.get(step.rung)?))) else {
            return give(exchange, plan, &request, original);
        };
        exchange.deadline = step.until;
        let tried = try_rung(exchange, &climb, rung, &mut request).await;
        exchange.deadline = deadline;
        if let Some(outcome) = filtered::broken_off(exchange) {
            return outcome;
        }
        match tried {
            Tried::Answered(outcome) => {
                exchange.record.fallback = Some(format!("{}/{}", policy.name, rung.position).into());
                exchange.record.fallback_kind = Some(kind(&rung.act));
                exchange.hide_degraded = policy.hide_header;
                return outcome;
            }
            Tried::Declined => {}
            Tried::PluginFault => return Outcome::Failed(Failure::Plugin),
            Tried::Ended(None) => return give(exchange, plan, &request, original),
            Tried::Ended(Some(status)) => {
                return Outcome::Failed(Failure::Ended {
                    status,
                    cause: original.cause,
                });
            }
        }
    }
}

async fn try_rung(
    exchange: &mut Exchange,
    climb: &Climb<'_>,
    rung: &RungView,
    request: &mut Received,
) -> Tried {
    let own = |own| Tried::Answered(Outcome::Fallback(own));
    match &rung.act {
        ActView::Static(answer) => own(fixed(answer, exchange, request, climb.cause)),
        ActView::Redirect(redirect) => own(redirected(redirect, exchange, request, climb.cause)),
        ActView::Fail { status } => Tried::Ended(*status),
        ActView::Plugin { plugin, config } => ask_plugin(exchange, climb, (*plugin, config), request).await,
        ActView::Service(service) => reroute(exchange, climb, *service, request).await,
        ActView::Zone { zones } => another_zone(exchange, climb, zones, request).await,
        // It is the service's, and whoever may not ask that gets nothing of it.
        ActView::Stale { .. } if climb.cause.is_denial() => Tried::Declined,
        ActView::Stale { max_stale } => match cached::stale(exchange, climb.plan, request, *max_stale) {
            Some(outcome) => Tried::Answered(outcome),
            None => Tried::Declined,
        },
        ActView::Queue(queue) => enqueue(exchange, climb, *queue, request).await,
    }
}

/// Whether a rung is for this request and this failure.
fn is_for(exchange: &mut Exchange, climb: &Climb<'_>, rung: &RungView, request: &Received) -> bool {
    let snapshot = Arc::clone(&exchange.snapshot);
    let by_cause = rung.causes.is_empty()
        || rung.causes.iter().any(|cause| match cause {
            RungCause::Of(cause) => *cause == climb.cause,
            RungCause::PluginFault => climb.faulted.get(),
            RungCause::ZoneDown => zone_is_down(exchange, climb.plan),
        });
    let mut conditions = rung.when.iter().chain(plugin_condition(&snapshot, rung));
    by_cause
        && rung.is_for(request.parts.method.as_str())
        && conditions.all(|condition| holds(exchange, request, condition, Some(climb.cause)))
}

fn plugin_condition<'a>(
    snapshot: &'a Snapshot,
    rung: &RungView,
) -> Option<&'a leeward_policy::model::FlagCondition> {
    match rung.act {
        ActView::Plugin { plugin, .. } => snapshot.plugin(plugin)?.spec.when.as_ref(),
        ActView::Static(_)
        | ActView::Service(_)
        | ActView::Zone { .. }
        | ActView::Stale { .. }
        | ActView::Queue(_)
        | ActView::Redirect(_)
        | ActView::Fail { .. } => None,
    }
}

/// Whether the service has endpoints in this proxy's zone, and none of them is healthy.
fn zone_is_down(exchange: &Exchange, plan: &Plan) -> bool {
    let worker = exchange.worker();
    let now = worker.now();
    let snapshot = &exchange.snapshot;
    let table = worker.upstreams.table(snapshot);
    let (Some(view), Some(service)) = (
        snapshot.service(plan.service),
        worker.upstreams.service(&table, plan.service, now),
    ) else {
        return false;
    };
    let own = view
        .tiers_of(plan.subset)
        .iter()
        .find(|tier| *tier.zone == *worker.zone);
    own.is_some_and(|own| {
        let healthy = |endpoint: &usize| {
            let state = service.endpoints.get(*endpoint).map(|e| e.state.standing(now));
            state == Some(Standing::Healthy)
        };
        !own.endpoints.iter().any(healthy)
    })
}

const fn takes_time(act: &ActView) -> bool {
    match act {
        ActView::Plugin { .. } | ActView::Service(_) | ActView::Zone { .. } | ActView::Queue(_) => true,
        ActView::Static(_) | ActView::Stale { .. } | ActView::Redirect(_) | ActView::Fail { .. } => false,
    }
}

/// The word used in traces and logs.
const fn kind(act: &ActView) -> &'static str {
    match act {
        ActView::Plugin { .. } => "plugin",
        ActView::Static(_) => "static",
        ActView::Service(_) => "service",
        ActView::Zone { .. } => "zone",
        ActView::Stale { .. } => "stale",
        ActView::Queue(_) => "queue",
        ActView::Redirect(_) => "redirect",
        ActView::Fail { .. } => "fail",
    }
}

fn fixed(answer: &StaticAnswer, exchange: &Exchange, request: &Received, cause: Cause) -> Own {
    let headers: Vec<_> = answer
        .headers
        .iter()
        .map(|(name, value)| {
            let value = fill(value, exchange, request, cause, Escape::Header);
            (name.to_string(), value.into_bytes())
        })
        .collect();
    let content_type = headers
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(header::CONTENT_TYPE.as_str()))
        .and_then(|(_, value)| std::str::from_utf8(value).ok());
    let body = match answer.body.as_fixed() {
        Some(body) => Bytes::copy_from_slice(body.as_bytes()),
        None => {
            let escape = Escape::of_type(content_type);
            fill(&answer.body, exchange, request, cause, escape).into()
        }
    };
    Own {
        status: answer.status,
        headers,
        body,
    }
}

fn redirected(redirect: &Redirect, exchange: &Exchange, request: &Received, cause: Cause) -> Own {
    let location = locate(&redirect.location, exchange, request, cause);
    Own {
        status: redirect.status,
        headers: vec![(header::LOCATION.to_string(), location.into_bytes())],
        body: Bytes::new(),
    }
}

/// One attempt at another service, if the request can still be sent.
pub(crate) async fn reroute(
    exchange: &mut Exchange,
    climb: &Climb<'_>,
    service: ServiceIdx,
    request: &mut Received,
) -> Tried {
    // A body that has gone out to a service that may have acted on it doesn't go to another.
    let sent = exchange.intake.touched() && !exchange.intake.is_empty();
    if sent && !climb.plan.idempotent && may_have_acted(exchange) {
        return Tried::Declined;
    }
    let plan = climb.plan.reroute(service, exchange);
    call_again(exchange, &plan, request).await
}

/// One attempt in another zone, if the request may be sent once more.
async fn another_zone(
    exchange: &mut Exchange,
    climb: &Climb<'_>,
    zones: &[Arc<str>],
    request: &mut Received,
) -> Tried {
    if !climb.plan.idempotent && may_have_acted(exchange) {
        return Tried::Declined;
    }
    let elsewhere = climb.plan.elsewhere(zones, &climb.tried.borrow(), exchange);
    let Some(plan) = elsewhere else {
        return Tried::Declined;
    };
    let first = exchange.record.attempts.len();
    let tried = call_again(exchange, &plan, request).await;
    climb.tried.borrow_mut().extend(zones_from(exchange, first));
    tried
}

/// Whether an attempt has reached a workload, or can have.
fn may_have_acted(exchange: &Exchange) -> bool {
    let harmless = [
        Cause::ConnectFailure,
        Cause::Overflow,
        Cause::CircuitOpen,
        Cause::Overloaded,
    ];
    exchange.record.attempts.iter().any(|attempt| {
        let cause = attempt.cause;
        !harmless.iter().any(|harmless| cause == Some(harmless.as_str()))
    })
}

async fn call_again(exchange: &mut Exchange, plan: &Plan, request: &mut Received) -> Tried {
    if exchange.intake.supply() != Supply::Whole || request.upgrade.is_some() {
        return Tried::Declined;
    }
    exchange.let_go();
    // What refuses it there is not why the request failed, and who answers there not whose answer may be given yet.
    let refused = (exchange.record.limit, exchange.retry_after);
    let from_peer = exchange.from_peer;
    match call(exchange, plan, request).await {
        Ok(response) if !is_failure(&response) => Tried::Answered(Outcome::Rerouted(response)),
        Ok(_) | Err(_) => {
            exchange.let_go();
            (exchange.record.limit, exchange.retry_after) = refused;
            exchange.from_peer = from_peer;
            Tried::Declined
        }
    }
}

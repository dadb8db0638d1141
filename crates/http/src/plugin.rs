//! A plugin's turn on the ladder.

use crate::admit::Received;
use crate::attempts::attempt_cause;
use crate::cached;
use crate::enqueue::enqueue_with;
use crate::exchange::Exchange;
use crate::facts::{facts, head_of};
use crate::fallback::{Climb, Tried, reroute};
use crate::filtered::{response, version_for};
use crate::respond::Outcome;
use leeward_policy::model::OnFault;
use leeward_policy::{PluginIdx, PluginView};
use leeward_telemetry::Outcome as Told;
use leeward_wasm::{Action, CallAttempt, FailedCall};
use std::rc::Rc;
use std::sync::Arc;

/// Asks a plugin.
pub(crate) async fn ask_plugin(
    exchange: &mut Exchange,
    climb: &Climb<'_>,
    (plugin, config): (PluginIdx, &Arc<str>),
    request: &mut Received,
) -> Tried {
    let snapshot = Arc::clone(&exchange.snapshot);
    let Some(view) = snapshot.plugin(plugin) else {
        return Tried::Declined;
    };
    let chosen = match version_for(exchange, request, view) {
        Ok(chosen) => chosen,
        Err(error) => return fault(exchange, climb, view, error.as_str()),
    };
    let worker = Rc::clone(exchange.worker());
    let body = kept_body(exchange, view.spec.limits.max_body_bytes).await;
    let failed = describe(exchange, climb, request, (view, config), body);
    match worker.plugins.on_failure(&chosen, failed).await {
        Ok(Action::Respond(reply)) => {
            Tried::Answered(Outcome::Local(response(exchange, reply), Told::Degraded))
        }
        Ok(Action::Reroute(service)) => match snapshot.service_named(&service) {
            Some(service) => reroute(exchange, climb, service, request).await,
            None => {
                tracing::warn!(plugin = %view.name, service, "plugin reroutes to a service that policy doesn't have");
                fault(exchange, climb, view, "unknown_service")
            }
        },
        Ok(Action::Decline) => Tried::Declined,
        Ok(Action::Stale) => match cached::stale(exchange, climb.plan, request, None) {
            Some(outcome) => Tried::Answered(outcome),
            None => Tried::Declined,
        },
        Ok(Action::Enqueue { queue, reply }) => match snapshot.queue_named(&queue) {
            Some(queue) => enqueue_with(exchange, climb, queue, request, Some(reply)).await,
            None => {
                tracing::warn!(plugin = %view.name, queue, "plugin names a queue that policy doesn't have");
                fault(exchange, climb, view, "unknown_queue")
            }
        },
        Err(error) => fault(exchange, climb, view, error.as_str()),
    }
}

fn fault(exchange: &mut Exchange, climb: &Climb<'_>, view: &PluginView, what: &'static str) -> Tried {
    climb.faulted.set(true);
    exchange.plugin_fault(&view.name, what);
    match view.spec.on_fault {
        OnFault::NextRung | OnFault::FailOpen => Tried::Declined,
        OnFault::Fail | OnFault::FailClosed => Tried::PluginFault,
    }
}

/// The request's body for a plugin that is to see it: what passed, or, if none of it was asked for yet, what
/// the client sends within the deadline.
async fn kept_body(exchange: &Exchange, limit: u64) -> Option<Vec<u8>> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    if limit == 0 {
        return None;
    }
    if !exchange.intake.touched() {
        exchange.take_body_in(limit).await;
    }
    // More may have been kept, to be sent again, than this plugin is to have.
    exchange.intake.whole().filter(|body| body.len() <= limit)
}

fn describe(
    exchange: &Exchange,
    climb: &Climb<'_>,
    request: &Received,
    (view, config): (&PluginView, &Arc<str>),
    body: Option<Vec<u8>>,
) -> FailedCall {
    let attempts = exchange.record.attempts.iter().map(|attempt| CallAttempt {
        endpoint: Arc::clone(&attempt.endpoint),
        zone: Arc::clone(&attempt.zone),
        status: attempt.status,
        cause: attempt_cause(attempt),
        duration: attempt.duration,
    });
    FailedCall {
        head: head_of(request),
        facts: facts(exchange, request, config, view),
        body: body.map(Into::into),
        cause: climb.cause,
        attempts: attempts.collect(),
        // Whoever may not ask the service gets nothing of it.
        kept: if climb.cause.is_denial() {
            None
        } else {
            cached::last_good(exchange, climb.plan, request)
        },
    }
}

//! A plugin's turn on the ladder.

use crate::admit::Received;
use crate::attempts::attempt_cause;
use crate::exchange::Exchange;
use crate::fallback::{Climb, Tried, reroute};
use crate::respond::{Outcome, Own};
use leeward_policy::PluginIdx;
use leeward_policy::model::OnFault;
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
    let worker = Rc::clone(exchange.worker());
    let body = kept_body(exchange, view.spec.max_body_bytes).await;
    let failed = describe(exchange, climb, request, config, body);
    let mut count = |counter: &str, by| worker.recorder.plugin_count(&view.name, counter, by);
    match worker
        .plugins
        .on_failure(&view.name, &view.spec, failed, exchange.deadline, &mut count)
        .await
    {
        Ok(Action::Respond {
            status,
            headers,
            body,
        }) => Tried::Answered(Outcome::Fallback(Own {
            status,
            headers,
            body: body.into(),
        })),
        Ok(Action::Reroute(service)) => match snapshot.service_named(&service) {
            Some(service) => reroute(exchange, climb, service, request).await,
            None => {
                tracing::warn!(plugin = %view.name, service, "plugin reroutes to a service that policy doesn't have");
                fault(exchange, "unknown_service", view.spec.on_fault)
            }
        },
        Ok(Action::Decline) => Tried::Declined,
        Err(error) => {
            tracing::warn!(plugin = %view.name, fault = error.as_str(), "plugin fault");
            worker.recorder.plugin_fault(&view.name, error.as_str());
            fault(exchange, error.as_str(), view.spec.on_fault)
        }
    }
}

fn fault(exchange: &mut Exchange, what: &'static str, on_fault: OnFault) -> Tried {
    exchange.record.plugin_fault = Some(what);
    match on_fault {
        OnFault::NextRung => Tried::Declined,
        OnFault::Fail => Tried::PluginFault,
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
    config: &Arc<str>,
    body: Option<Vec<u8>>,
) -> FailedCall {
    let record = &exchange.record;
    let uri = &request.parts.uri;
    let name = |idx| exchange.snapshot.service(idx).map(|view| Arc::clone(&view.name));
    let attempts = record
        .attempts
        .iter()
        .map(|attempt| CallAttempt {
            endpoint: Arc::clone(&attempt.endpoint),
            zone: Arc::clone(&attempt.zone),
            status: attempt.status,
            cause: attempt_cause(attempt),
            duration: attempt.duration,
        })
        .collect();
    FailedCall {
        method: request.parts.method.to_string(),
        path: uri.path().to_owned(),
        query: uri.query().map(ToOwned::to_owned),
        authority: request.authority().to_owned(),
        headers: request
            .parts
            .headers
            .iter()
            .map(|(name, value)| (name.as_str().into(), value.as_bytes().to_vec()))
            .collect(),
        body,
        cause: climb.cause,
        attempts,
        service: name(climb.plan.service).unwrap_or_else(|| Arc::from("")),
        route: format!("{}/{}", record.route.as_deref().unwrap_or_default(), record.rule).into(),
        zone: Arc::clone(&exchange.worker().zone),
        config: Arc::clone(config),
    }
}

//! Fallback: when a call failed and policy has a ladder for it, each rung in turn until one answers.

use crate::admit::Received;
use crate::attempts::{Called, attempt_cause, call};
use crate::body::Supply;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::guard::is_failure;
use crate::respond::{Outcome, Own};
use crate::route::Plan;
use bytes::Bytes;
use http::{Response, StatusCode};
use hyper::body::Incoming;
use leeward_policy::model::{Cause, OnFault, StaticAnswer};
use leeward_policy::{FallbackView, PluginIdx, RungView, ServiceIdx};
use leeward_wasm::{Action, CallAttempt, FailedCall};
use std::rc::Rc;
use std::sync::Arc;

/// The original failure, to be given if no rung answers.
struct Original {
    cause: Cause,
    /// The upstream's answer, where that is the failure.
    response: Option<Response<Incoming>>,
}

/// How a rung ended.
enum Rung {
    Answered(Outcome),
    Declined,
    /// A fault that policy lets end the ladder.
    Over,
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
    let (original, policy) = match (called, policy) {
        (Ok(response), Some(policy)) if policy.acts_on_status(response.status().as_u16()) => (
            Original {
                cause: Cause::UpstreamStatus,
                response: Some(response),
            },
            policy,
        ),
        (Ok(response), _) => return Outcome::Served(response, request.upgrade),
        (Err(cause), Some(policy)) if policy.acts_on(cause) => (
            Original {
                cause,
                response: None,
            },
            policy,
        ),
        (Err(cause), _) => return Outcome::Failed(Failure::Call(cause)),
    };
    // Rare, so it doesn't belong in the size of every request's future.
    Box::pin(climb(exchange, plan, policy, request, original)).await
}

async fn climb(
    exchange: &mut Exchange,
    plan: &Plan,
    policy: &FallbackView,
    mut request: Box<Received>,
    original: Original,
) -> Outcome {
    exchange.record.cause = Some(original.cause.as_str());
    for (position, rung) in policy.rungs.iter().enumerate() {
        let tried = match rung {
            RungView::Static(answer) => Rung::Answered(Outcome::Fallback(fixed(answer))),
            RungView::Plugin { plugin, config } => {
                ask_plugin(exchange, plan, *plugin, config, &mut request, original.cause).await
            }
            RungView::Service(service) => reroute(exchange, plan, *service, &mut request).await,
        };
        match tried {
            Rung::Answered(outcome) => {
                exchange.record.fallback = Some(format!("{}/{position}", policy.name).into());
                exchange.hide_degraded = policy.hide_header;
                return outcome;
            }
            Rung::Declined => {}
            Rung::Over => return Outcome::Failed(Failure::Plugin),
        }
    }
    match original.response {
        Some(response) => Outcome::Served(response, None),
        None => Outcome::Failed(Failure::Call(original.cause)),
    }
}

fn fixed(answer: &StaticAnswer) -> Own {
    let headers = answer
        .headers
        .iter()
        .map(|(n, v)| (n.to_string(), v.as_bytes().to_vec()))
        .collect();
    Own {
        status: answer.status,
        headers,
        body: Bytes::copy_from_slice(answer.body.as_bytes()),
    }
}

/// One attempt at another service, if the request can still be sent.
async fn reroute(exchange: &mut Exchange, plan: &Plan, service: ServiceIdx, request: &mut Received) -> Rung {
    if exchange.intake.supply() != Supply::Whole || request.upgrade.is_some() {
        return Rung::Declined;
    }
    exchange.let_go();
    // What refuses it there is not why the request failed.
    let refused = (exchange.record.limit, exchange.retry_after);
    let plan = plan.reroute(service, exchange);
    match call(exchange, &plan, request).await {
        Ok(response) if !is_failure(&response) => Rung::Answered(Outcome::Rerouted(response)),
        Ok(_) | Err(_) => {
            exchange.let_go();
            (exchange.record.limit, exchange.retry_after) = refused;
            Rung::Declined
        }
    }
}

async fn ask_plugin(
    exchange: &mut Exchange,
    plan: &Plan,
    plugin: PluginIdx,
    config: &Arc<str>,
    request: &mut Received,
    cause: Cause,
) -> Rung {
    let snapshot = Arc::clone(&exchange.snapshot);
    let Some(view) = snapshot.plugin(plugin) else {
        return Rung::Declined;
    };
    let worker = Rc::clone(exchange.worker());
    let body = kept_body(exchange, view.spec.max_body_bytes).await;
    let failed = describe(exchange, plan, request, config, cause, body);
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
        }) => Rung::Answered(Outcome::Fallback(Own {
            status,
            headers,
            body: body.into(),
        })),
        Ok(Action::Reroute(service)) => match snapshot.service_named(&service) {
            Some(service) => reroute(exchange, plan, service, request).await,
            None => {
                tracing::warn!(plugin = %view.name, service, "plugin reroutes to a service that policy doesn't have");
                fault(exchange, "unknown_service", view.spec.on_fault)
            }
        },
        Ok(Action::Decline) => Rung::Declined,
        Err(error) => {
            tracing::warn!(plugin = %view.name, fault = error.as_str(), "plugin fault");
            worker.recorder.plugin_fault(&view.name, error.as_str());
            fault(exchange, error.as_str(), view.spec.on_fault)
        }
    }
}

fn fault(exchange: &mut Exchange, what: &'static str, on_fault: OnFault) -> Rung {
    exchange.record.plugin_fault = Some(what);
    match on_fault {
        OnFault::NextRung => Rung::Declined,
        OnFault::Fail => Rung::Over,
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
        exchange.intake.keep(limit);
        let filled = exchange.intake.fill();
        match exchange.deadline {
            Some(at) => drop(tokio::time::timeout_at(at.into(), filled).await),
            None => filled.await,
        }
    }
    // More may have been kept, to be sent again, than this plugin is to have.
    exchange.intake.whole().filter(|body| body.len() <= limit)
}

fn describe(
    exchange: &Exchange,
    plan: &Plan,
    request: &Received,
    config: &Arc<str>,
    cause: Cause,
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
        cause,
        attempts,
        service: name(plan.service).unwrap_or_else(|| Arc::from("")),
        route: format!("{}/{}", record.route.as_deref().unwrap_or_default(), record.rule).into(),
        zone: Arc::clone(&exchange.worker().zone),
        config: Arc::clone(config),
    }
}

impl Own {
    /// As an HTTP response; what isn't valid HTTP is left out (the parser of policy and the plugin host have
    /// both refused it before).
    pub(crate) fn into_response(self) -> Response<Bytes> {
        let mut response = Response::new(self.body);
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        for (name, value) in self.headers {
            if let (Ok(name), Ok(value)) = (
                http::HeaderName::try_from(name),
                http::HeaderValue::try_from(value),
            ) {
                response.headers_mut().append(name, value);
            }
        }
        response
    }
}

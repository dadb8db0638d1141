//! The way of a request, from top to bottom.

use crate::admit::{Received, admit};
use crate::attempts::call;
use crate::authorize::{authorize, check_path};
use crate::body::ResponseBody;
use crate::cached::{self, Cached, Filled};
use crate::connection::Client;
use crate::degrade::{gate, inject};
use crate::enqueue::{self, STATUS_PATH, give_key};
use crate::exchange::Exchange;
use crate::fallback::fall_back;
use crate::filtered;
use crate::hold::hold;
use crate::passed;
use crate::respond::{Outcome, respond};
use crate::route::{Plan, route};
use crate::worker::Worker;
use http::{Request, Response};
use leeward_telemetry::Direction;
use leeward_upstream::IncomingBody;
use std::convert::Infallible;
use std::rc::Rc;

/// Serves one request. A failure becomes a response, never an error.
///
/// Dropped before it is done (the client went away), it gives up what it holds and writes the record.
pub(crate) async fn serve(
    worker: Rc<Worker>,
    client: Rc<Client>,
    request: Request<IncomingBody>,
) -> Result<Response<ResponseBody>, Infallible> {
    let (mut exchange, request) = admit(&worker, &client, request);
    let outcome = run(&mut exchange, &client, request).await;
    let Some(chain) = exchange.filters.clone() else {
        return Ok(respond(exchange, outcome));
    };
    let outcome = filtered::broken_off(&mut exchange).unwrap_or(outcome);
    if !matches!(outcome, Outcome::Served(..) | Outcome::Rerouted(_)) {
        // Nobody sends the request's body on, and a filter that has it is not to be waited for.
        exchange.intake.close();
    }
    let response = respond(exchange, outcome);
    if chain.is_done() {
        return Ok(response);
    }
    Ok(Box::pin(filtered::after(chain, response)).await)
}

async fn run(exchange: &mut Exchange, client: &Client, mut request: Box<Received>) -> Outcome {
    if let Err(failure) = request.check() {
        return Outcome::Failed(failure);
    }
    if let Some(edge) = &client.edge
        && let Some(outcome) = edge.enter(exchange, &request)
    {
        return outcome;
    }
    if is_about_queue(exchange, client, &request) {
        return Box::pin(enqueue::status(exchange, client, &request)).await;
    }
    let mut plan = match route(exchange, client, &request) {
        Ok(plan) => plan,
        Err(failure) => return passed::on(exchange, client, &mut request, failure).await,
    };
    if plan.has_plugins
        && let Err(outcome) = Box::pin(filtered::before(exchange, &mut plan, &mut request)).await
    {
        return outcome;
    }
    // What plugins have made of the request is what would be sent, so it is what is decided about; before anything is said
    // of the service, by its fallbacks or from what is kept of it.
    if let Err(failure) = check_path(exchange, plan.service, &request) {
        return Outcome::Failed(failure);
    }
    let refused = match authorize(exchange, plan.service, &request).await {
        Ok(()) => plan.refused,
        Err(cause) => Some(cause),
    };
    if let Some(cause) = refused {
        return fall_back(exchange, &plan, request, Err(cause)).await;
    }
    if plan.extras {
        // Few rules have any of that, and the others are not to pay for it.
        return Box::pin(run_with_extras(exchange, client, request, plan)).await;
    }
    let plan = match hold(exchange, client, &request, plan).await {
        Ok(plan) => plan,
        Err(failure) => return Outcome::Failed(failure),
    };
    let called = call(exchange, &plan, &mut request).await;
    if let Some(outcome) = filtered::broken_off(exchange) {
        // That is the answer, whatever the ladder would say.
        return outcome;
    }
    fall_back(exchange, &plan, request, called).await
}

/// Whether a request asks what became of one that was queued. From outside that can only be asked where requests are queued.
fn is_about_queue(exchange: &Exchange, client: &Client, request: &Received) -> bool {
    !exchange.snapshot.queues().is_empty()
        && client.direction != Direction::Inbound
        && request.parts.uri.path().starts_with(STATUS_PATH)
        && client
            .edge
            .as_ref()
            .is_none_or(|edge| edge.queues(&exchange.snapshot, request, None))
}

/// The same for rules on which flags, levels of degradation, a cache, an injected fault or a queue hang.
async fn run_with_extras(
    exchange: &mut Exchange,
    client: &Client,
    mut request: Box<Received>,
    plan: Plan,
) -> Outcome {
    let ladder = plan.fallback.and_then(|idx| exchange.snapshot.fallback(idx));
    if !exchange.grpc && ladder.is_some_and(|ladder| ladder.queues(request.parts.method.as_str())) {
        give_key(&mut request);
    }
    let fill = match cached::look(exchange, &plan, &mut request).await {
        Ok(Cached::Answer(outcome)) => return outcome,
        Ok(Cached::Ask(fill)) => fill,
        Err(cause) => return fall_back(exchange, &plan, request, Err(cause)).await,
    };
    let passed = match gate(exchange, &plan, &request) {
        Ok(()) => inject(exchange, &plan, &request).await,
        Err(cause) => Err(cause),
    };
    let conditional = fill.as_ref().is_some_and(|fill| !fill.conditions().is_empty());
    if let Err(cause) = passed {
        // Who waits for this answer need not wait for the ladder, too.
        drop(fill);
        if conditional {
            cached::without_conditions(&mut request.parts.headers);
        }
        return fall_back(exchange, &plan, request, Err(cause)).await;
    }
    let before = cached::cache_id(exchange, &plan);
    let plan = match hold(exchange, client, &request, plan).await {
        Ok(plan) => plan,
        Err(failure) => return Outcome::Failed(failure),
    };
    // Policy may have changed meanwhile; what another rule answers is not what others wait for.
    let fill = fill.filter(|_| cached::cache_id(exchange, &plan) == before);
    let called = call(exchange, &plan, &mut request).await;
    if let Some(outcome) = filtered::broken_off(exchange) {
        // That is the answer, whatever the ladder would say.
        return outcome;
    }
    if conditional {
        // They were the cache's, and not for whoever is asked next.
        cached::without_conditions(&mut request.parts.headers);
    }
    let called = match cached::filled(exchange, &plan, &request, fill, called) {
        Filled::Called(called) => called,
        Filled::Answer(outcome) => return outcome,
        Filled::Again => call(exchange, &plan, &mut request).await,
    };
    fall_back(exchange, &plan, request, called).await
}

//! Errands: requests that the proxy makes by itself, through the same stages as everybody's.

use crate::admit::{Path, Received};
use crate::attempts::call;
use crate::authorize::{authorize, check_path};
use crate::body::{Intake, ResponseBody};
use crate::cached::{Filled, cache_id, filled};
use crate::connection::Client;
use crate::degrade::gate;
use crate::exchange::Exchange;
use crate::failure::{Failure, answer};
use crate::headers::look;
use crate::hold::hold;
use crate::idle::Stall;
use crate::judge::pause_asked_for;
use crate::respond::{Outcome, respond};
use crate::route::{Choice, Plan, route, route_as};
use crate::worker::{Connections, Worker};
use http::{Response, StatusCode, request};
use http_body_util::BodyExt;
use leeward_cache::Fill;
use leeward_policy::model::Cause;
use leeward_telemetry::{Direction, Peer};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// What an errand is sent with.
pub(crate) struct Errand {
    pub(crate) parts: request::Parts,
    pub(crate) body: Vec<u8>,
    /// On whose behalf.
    pub(crate) peer: Peer,
    /// Whether that is a client from outside.
    pub(crate) from_outside: bool,
    /// Where its answer is kept.
    pub(crate) fill: Option<(Arc<str>, Fill)>,
    /// By which rule it came: it goes by that again if plugins of the rule may have changed it, and in any case, or not at
    /// all, if it is from outside.
    pub(crate) choice: Option<Choice>,
}

/// How it came back.
#[derive(Debug)]
pub(crate) enum Returned {
    /// The service answered, and its answer has come whole.
    Answered {
        status: StatusCode,
        retry_after: Option<Duration>,
    },
    /// It didn't. `not_sent`: nobody's request would have reached it just now.
    Failed {
        why: &'static str,
        not_sent: bool,
        retry_after: Option<Duration>,
    },
}

/// Carries an errand out, without a fallback: by the route that is policy's now.
pub(crate) async fn carry_out(worker: Rc<Worker>, errand: Errand) -> Returned {
    // The worker doesn't end before.
    let _held = Connections::hold(&worker);
    let client = Rc::new(Client::new(Direction::Outbound, errand.peer, Rc::default()));
    let snapshot = worker.pin();
    let found = look(&errand.parts.headers);
    let record = worker.recorder.start(
        client.direction,
        &errand.parts,
        &client.peer,
        snapshot.generation,
        worker.now(),
    );
    let intake = Intake::stored(&errand.body, Stall::new(&worker.house));
    let mut exchange = Exchange::new(Rc::clone(&worker), Rc::clone(&client), record, snapshot, intake);
    // Said by whoever took it in: the rule may be another one by now.
    exchange.from_outside = errand.from_outside;
    let mut request = Received {
        parts: errand.parts,
        found,
        upgrade: None,
        own_key: false,
        prepared: false,
        path: Path::Unknown,
    };
    let (fill, choice) = (errand.fill, errand.choice);
    let called = send(&mut exchange, &client, &mut request, fill, choice).await;
    let retry_after = exchange.retry_after;
    let by_level = exchange.record.level.is_some();
    let reached = exchange.record.attempts.iter().any(|attempt| {
        attempt.status.is_some() && attempt.cause.is_none()
            || [Cause::Timeout, Cause::Reset]
                .iter()
                .any(|c| attempt.cause == Some(c.as_str()))
    });
    if let Outcome::Failed(Failure::Call(cause)) = &called
        && cause.is_denial()
    {
        // As final as if the service had said so.
        let response = respond(exchange, called);
        return Returned::Answered {
            status: response.status(),
            retry_after: None,
        };
    }
    if let Outcome::Failed(failure) = called {
        let why = answer(&failure).reason.as_str();
        let not_sent = !reached && !by_level && is_about_service(&failure);
        drop(respond(exchange, Outcome::Failed(failure)));
        return Returned::Failed {
            why,
            not_sent,
            retry_after,
        };
    }
    let response = respond(exchange, called);
    let status = response.status();
    let retry_after = pause_asked_for(response.headers());
    match drain(response).await {
        Ok(()) => Returned::Answered { status, retry_after },
        Err(()) => Returned::Failed {
            why: "reset",
            not_sent: false,
            retry_after: None,
        },
    }
}

async fn send(
    exchange: &mut Exchange,
    client: &Client,
    request: &mut Received,
    fill: Option<(Arc<str>, Fill)>,
    choice: Option<Choice>,
) -> Outcome {
    let planned = async {
        request.settle_path()?;
        let outside = exchange.from_outside;
        let plan = match choice.filter(|choice| choice.holds(&exchange.snapshot, outside)) {
            Some(choice) => route_as(exchange, request, &choice)?,
            // Routes of the mesh are closed to it, and where it came in is no longer known.
            None if outside => return Err(Failure::NoRoute),
            None => route(exchange, client, request)?,
        };
        check_path(exchange, plan.service, request)?;
        authorize(exchange, plan.service, request)
            .await
            .map_err(Failure::Call)?;
        if plan.extras {
            gate(exchange, &plan, request).map_err(Failure::Call)?;
        }
        hold(exchange, client, request, plan).await
    };
    let plan = match planned.await {
        // The queue has its own pauses, and counts what is sent.
        Ok(plan) => Plan {
            retry: Arc::clone(&exchange.worker().once),
            ..plan
        },
        Err(failure) => return Outcome::Failed(failure),
    };
    let called = call(exchange, &plan, request).await;
    // What another rule answers is not what was to be freshened.
    let fill = fill.filter(|(id, _)| cache_id(exchange, &plan).as_ref() == Some(id));
    match filled(exchange, &plan, request, fill.map(|(_, fill)| fill), called) {
        Filled::Called(Ok(response)) => Outcome::Served(response, None),
        Filled::Called(Err(cause)) => Outcome::Failed(Failure::Call(cause)),
        Filled::Answer(outcome) => outcome,
        // The next request for it asks without conditions.
        Filled::Again => Outcome::Failed(Failure::Call(Cause::UpstreamStatus)),
    }
}

/// Whether a failure would meet every request for the service, and not only this one.
const fn is_about_service(failure: &Failure) -> bool {
    match failure {
        Failure::Call(cause) => match cause {
            Cause::ConnectFailure
            | Cause::NoEndpoint
            | Cause::Overflow
            | Cause::CircuitOpen
            | Cause::Overloaded => true,
            Cause::Timeout
            | Cause::Reset
            | Cause::UpstreamStatus
            | Cause::RateLimited
            | Cause::Disabled
            | Cause::AuthorizationDenied
            | Cause::IdentityMissing
            | Cause::AuthorizationUnknown => false,
        },
        Failure::BadRequest(_)
        | Failure::NotImplemented
        | Failure::Loop(_)
        | Failure::NoRoute
        | Failure::Misdirected
        | Failure::UnknownEndpoint
        | Failure::Ended { .. }
        | Failure::NotExported
        | Failure::GatewayRequired
        | Failure::CallerRefused
        | Failure::Plugin => false,
    }
}

/// Takes an answer's body in to its end, so that its connection can be used again.
async fn drain(response: Response<ResponseBody>) -> Result<(), ()> {
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        frame.map_err(drop)?;
    }
    Ok(())
}

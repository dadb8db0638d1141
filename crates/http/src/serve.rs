//! The way of a request, from top to bottom.

use crate::admit::{Received, admit};
use crate::attempts::call;
use crate::body::ResponseBody;
use crate::connection::Client;
use crate::exchange::Exchange;
use crate::fallback::fall_back;
use crate::hold::hold;
use crate::respond::{Outcome, respond};
use crate::route::route;
use crate::worker::Worker;
use http::{Request, Response};
use hyper::body::Incoming;
use std::convert::Infallible;
use std::rc::Rc;

/// Serves one request. A failure becomes a response, never an error.
///
/// Dropped before it is done (the client went away), it gives up what it holds and writes the record.
pub(crate) async fn serve(
    worker: Rc<Worker>,
    client: Rc<Client>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let (mut exchange, request) = admit(&worker, &client, request);
    let outcome = run(&mut exchange, &client, request).await;
    Ok(respond(exchange, outcome))
}

async fn run(exchange: &mut Exchange, client: &Client, mut request: Box<Received>) -> Outcome {
    if let Err(failure) = request.check() {
        return Outcome::Failed(failure);
    }
    let plan = match route(exchange, client, &request) {
        Ok(plan) => plan,
        Err(failure) => return Outcome::Failed(failure),
    };
    let plan = match hold(exchange, client, &request, plan).await {
        Ok(plan) => plan,
        Err(failure) => return Outcome::Failed(failure),
    };
    let called = call(exchange, &plan, &mut request).await;
    fall_back(exchange, &plan, request, called).await
}

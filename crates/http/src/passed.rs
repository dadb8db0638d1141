//! Passed: what no route is for, to where its client meant it to go, if policy lets it.

use crate::admit::Received;
use crate::body::RequestBody;
use crate::connection::Client;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::outgoing::address;
use crate::respond::Outcome;
use crate::worker::Worker;
use http::Request;
use leeward_policy::model::{Cause, Protocol, UnknownDestination, ZoneTransport};
use leeward_resilience::is_idempotent;
use leeward_upstream::{Connection, Endpoint, SendError, Wants};
use std::cell::OnceCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How long a connection may take to come about to where policy knows nobody; Envoy's connect timeout.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The zone of what is in none.
pub(crate) const NOWHERE: &str = "-";

/// Where a client meant to go that doesn't know that it is here.
pub(crate) struct Original {
    address: SocketAddr,
    may_pass: bool,
    /// The way there, if it was ever taken. It ends with the client's connection.
    way: OnceCell<Rc<Endpoint<RequestBody>>>,
}

impl Original {
    /// `may_pass`: it was captured on its way there, so that there is such a place.
    pub(crate) fn new(address: SocketAddr, may_pass: bool) -> Self {
        Self {
            address,
            may_pass,
            way: OnceCell::new(),
        }
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    fn way(&self, worker: &Worker) -> Rc<Endpoint<RequestBody>> {
        let made = || worker.upstreams.apart(self.address, worker.now());
        Rc::clone(self.way.get_or_init(made))
    }
}

/// What becomes of a request that can't be routed.
pub(crate) async fn on(
    exchange: &mut Exchange,
    client: &Client,
    request: &mut Received,
    failure: Failure,
) -> Outcome {
    let Some(original) = &client.original else {
        return Outcome::Failed(failure);
    };
    let passes = original.may_pass && exchange.snapshot.capture().unknown == UnknownDestination::Pass;
    if failure != Failure::NoRoute || !passes {
        return Outcome::Failed(failure);
    }
    // Rare, so it doesn't belong in the size of every request's future.
    Box::pin(pass(exchange, original, request)).await
}

/// Sends a request on as it came, but for what is not for the next hop.
async fn pass(exchange: &mut Exchange, original: &Original, request: &mut Received) -> Outcome {
    let worker = Rc::clone(exchange.worker());
    let endpoint = original.way(&worker);
    let protocol = if exchange.http1 {
        Protocol::Http1
    } else {
        Protocol::Http2
    };
    exchange
        .intake
        .stall
        .limit(exchange.snapshot.capture().idle_timeout);
    request
        .found
        .strip(&mut request.parts.headers, request.upgrade.is_some());
    let idempotent = is_idempotent(request.parts.method.as_str());
    let mut connection = Connection::Any;
    loop {
        let now = worker.now();
        let (at, nowhere) = (original.address.to_string().into(), Arc::from(NOWHERE));
        let (position, _) = exchange.record.begin_attempt(&at, &nowhere, false, now);
        let wants = Wants {
            protocol,
            connection,
            transport: ZoneTransport::Tcp,
            upgrade: exchange.wants_upgrade,
            length: exchange.intake.length(),
            large_answer: false,
            limit: CONNECT_TIMEOUT,
        };
        let mut parts = request.head();
        let addressed = address(&mut parts, request, protocol);
        let (Ok(()), Some(body)) = (addressed, exchange.intake.send()) else {
            return ended(exchange, position, Cause::Reset);
        };
        let lease = match endpoint.lease(wants, None).await {
            Ok(lease) => lease,
            Err(error) => {
                tracing::debug!(%error, "no connection to where a captured request was to go");
                return ended(exchange, position, Cause::ConnectFailure);
            }
        };
        exchange.record.went_by(position, lease.transport().as_str());
        match lease.send(Box::new(Request::from_parts(parts, body))).await {
            Ok(sent) => {
                let status = sent.response.status().as_u16();
                exchange
                    .record
                    .end_attempt(position, worker.now(), Some(status), None);
                exchange.keep = sent.keep;
                return Outcome::Served(sent.response, request.upgrade.take());
            }
            // The peer closed an idle connection just as it was used again (RFC 9112 §9.3.1).
            Err(SendError::Unsent(_) | SendError::Broken { reused: true, .. })
                if connection == Connection::Any && idempotent =>
            {
                connection = Connection::New;
                ended(exchange, position, Cause::Reset);
            }
            Err(_) => return ended(exchange, position, Cause::Reset),
        }
    }
}

fn ended(exchange: &mut Exchange, position: usize, cause: Cause) -> Outcome {
    let now = exchange.worker().now();
    exchange
        .record
        .end_attempt(position, now, None, Some(cause.as_str()));
    Outcome::Failed(Failure::Call(cause))
}

//! TCP: connections of services that speak no HTTP, from their first byte to their last.
//!
//! The stages are those of a request, less what only a request has: the connection is admitted, authorized, guarded, and
//! attempts are made at endpoints; then bytes are carried both ways to their ends. What takes the place of the request
//! from proxy to proxy is one that asks for a change of protocol.

use crate::admit::{Path, Received};
use crate::attempts::call;
use crate::body::Intake;
use crate::connection::Client;
use crate::exchange::Exchange;
use crate::failure::{Failure, answer};
use crate::guard::Octets;
use crate::headers::Found;
use crate::idle::Stall;
use crate::passed::{CONNECT_TIMEOUT, NOWHERE};
use crate::route::Plan;
use crate::upgrade::{Beyond, Far, carry};
use crate::worker::Entered;
use http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use leeward_policy::model::{Cause, HashKey, Protocol, Retry, RetryOn, UnknownDestination, ZoneTransport};
use leeward_policy::{ServiceIdx, ServiceView, Snapshot};
use leeward_resilience::hash_of;
use leeward_telemetry::{Direction, Outcome, Peer, Reason, Tcp};
use leeward_upstream::{Connection, IncomingBody, TCP_UPGRADE, Wants, reset};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use tokio::net::TcpStream;

/// A connection of a workload's.
pub(crate) struct Arrived {
    pub(crate) entered: Entered,
    pub(crate) stream: TcpStream,
    pub(crate) peer: Peer,
    /// Where its client meant it to go.
    pub(crate) destination: SocketAddr,
    /// The name by which its client calls the server, in TLS.
    pub(crate) server_name: Option<Arc<str>>,
}

/// Serves a connection of a TCP service to its end.
pub(crate) async fn serve_tcp(mut arrived: Arrived, snapshot: Arc<Snapshot>, service: ServiceIdx) {
    let Some(view) = snapshot.service(service) else {
        return reset(&arrived.stream);
    };
    let (mut exchange, mut request) = admit(&arrived, &snapshot, &view.name);
    exchange.record.service = Some(Arc::clone(&view.name));
    let plan = plan(&exchange, view, service);
    let called = Box::pin(call(&mut exchange, &plan, &mut request)).await;
    let far = match called {
        Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
            Beyond::of(response).1.ready().await.map_err(|error| {
                tracing::debug!(service = %view.name, %error, "protocol change failed");
                Reason::Reset
            })
        }
        Ok(response) => {
            tracing::debug!(service = %view.name, status = %response.status(), "the proxy in front of it doesn't connect");
            Err(Reason::UpstreamStatus)
        }
        Err(cause) => {
            let unconnected = exchange.unconnected.filter(|_| cause == Cause::ConnectFailure);
            Err(unconnected.unwrap_or_else(|| answer(&Failure::Call(cause)).reason))
        }
    };
    finish(exchange, &mut arrived.stream, far).await;
}

/// Serves a connection of which policy knows nothing: to where it was meant to go, if there is such a place and policy lets
/// it.
pub(crate) async fn serve_unknown(mut arrived: Arrived, snapshot: Arc<Snapshot>, may_pass: bool) {
    let (mut exchange, _) = admit(&arrived, &snapshot, NOWHERE);
    let far = if may_pass && snapshot.capture().unknown == UnknownDestination::Pass {
        pass(&mut exchange, arrived.destination).await
    } else {
        Err(Reason::NoRoute)
    };
    finish(exchange, &mut arrived.stream, far).await;
}

async fn finish(mut exchange: Box<Exchange>, client: &mut TcpStream, far: Result<Far, Reason>) {
    let whole = match far {
        Ok(far) => {
            exchange.record.outcome = Outcome::Served;
            carry(exchange, client, far).await == crate::relay::End::Whole
        }
        Err(reason) => {
            tracing::debug!(reason = reason.as_str(), "connection failed");
            exchange.refused(reason);
            false
        }
    };
    if !whole {
        // An end in order would say that there was no more to come.
        reset(client);
    }
}

/// Begins the exchange, with what is sent to the proxy in front of an endpoint.
fn admit(arrived: &Arrived, snapshot: &Arc<Snapshot>, host: &str) -> (Box<Exchange>, Box<Received>) {
    let worker = Rc::clone(&arrived.entered.worker);
    let connection = Rc::clone(&arrived.entered.connection);
    let client = Rc::new(Client::new(Direction::Outbound, arrived.peer.clone(), connection));
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.method = Method::GET;
    parts.uri = Uri::from_static("/");
    // Names are DNS labels, so this never falls back.
    let host = HeaderValue::from_str(host).unwrap_or(HeaderValue::from_static(NOWHERE));
    parts.headers.insert(header::HOST, host);
    parts
        .headers
        .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    parts
        .headers
        .insert(header::UPGRADE, HeaderValue::from_static(TCP_UPGRADE));
    let mut record = worker.recorder.start(
        client.direction,
        &parts,
        &client.peer,
        snapshot.generation,
        worker.now(),
    );
    let tcp = Tcp {
        destination: Some(arrived.destination),
        server_name: arrived.server_name.clone(),
    };
    worker.recorder.is_tcp(&mut record, tcp);
    let intake = Intake::stored(&[], Stall::new(&worker.house));
    let mut exchange = Exchange::new(worker, client, record, Arc::clone(snapshot), intake);
    exchange.wants_upgrade = true;
    let request = Received {
        parts,
        found: Found::default(),
        upgrade: None,
        own_key: true,
        prepared: true,
        path: Path::Same,
    };
    (exchange, Box::new(request))
}

/// What is to be done with a connection. Nothing of its client's is sent before there is one to an endpoint, so that every
/// attempt may be made again.
fn plan(exchange: &Exchange, view: &ServiceView, service: ServiceIdx) -> Plan {
    let spec = &view.spec;
    let retry = Retry {
        max_attempts: spec.tcp.max_connect_attempts,
        on: vec![
            RetryOn::ConnectFailure,
            RetryOn::RefusedStream,
            RetryOn::Reset,
            RetryOn::GatewayError,
        ],
        ..Retry::standard()
    };
    let hash = match spec.balance.policy.hash_key() {
        Some(HashKey::Source) => Some(hash_of(Octets::of(exchange.record.peer.address.ip()).as_bytes())),
        Some(HashKey::Header(_) | HashKey::Cookie { .. }) | None => None,
    };
    Plan {
        retry: Arc::new(retry),
        // To the proxy in front of an endpoint, and from there.
        attempt_timeout: Some(spec.connect_timeout.saturating_mul(2)),
        hash,
        idempotent: true,
        ..Plan::to(service, exchange.worker())
    }
}

/// A connection to where policy knows nobody.
async fn pass(exchange: &mut Exchange, to: SocketAddr) -> Result<Far, Reason> {
    let worker = Rc::clone(exchange.worker());
    let endpoint = worker.upstreams.apart(to, worker.now());
    let (at, nowhere) = (to.to_string().into(), Arc::from(NOWHERE));
    let (position, _) = exchange.record.begin_attempt(&at, &nowhere, false, worker.now());
    let wants = Wants {
        protocol: Protocol::Tcp,
        connection: Connection::New,
        transport: ZoneTransport::Tcp,
        upgrade: true,
        length: None,
        large_answer: false,
        limit: CONNECT_TIMEOUT,
    };
    let connected = match endpoint.lease(wants, None).await {
        Ok(lease) => {
            exchange.record.went_by(position, lease.transport().as_str());
            match exchange.intake.send() {
                Some(body) => lease.send(Box::new(Request::new(body))).await.ok(),
                None => None,
            }
        }
        Err(error) => {
            tracing::debug!(%error, "no connection to where a captured one was to go");
            None
        }
    };
    let now = worker.now();
    match connected.map(|sent| sent.response.into_body()) {
        Some(IncomingBody::Plain(plain)) => {
            exchange.record.end_attempt(position, now, None, None);
            Ok(Far::Plain(plain))
        }
        Some(
            IncomingBody::Http(_) | IncomingBody::Zone(_) | IncomingBody::Http3(_) | IncomingBody::Counted(_),
        )
        | None => {
            let cause = Cause::ConnectFailure.as_str();
            exchange.record.end_attempt(position, now, None, Some(cause));
            Err(Reason::ConnectFailure)
        }
    }
}

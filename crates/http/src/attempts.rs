//! Attempts: choose an endpoint, lease a connection, send, judge; again where it is safe and allowed.

use crate::admit::Received;
use crate::body::RequestBody;
use crate::exchange::Exchange;
use crate::failure::from_peer;
use crate::headers::{ENDPOINT, REASON, has_other_coding};
use crate::route::Plan;
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version, header, request, uri};
use hyper::body::Incoming;
use leeward_policy::model::{Cause, Protocol};
use leeward_policy::{EndpointView, ServiceView, Via};
use leeward_resilience::{Change, Event, Facts, Next, Replay, after_failure, is_idempotent};
use leeward_telemetry::Attempt;
use leeward_upstream::{Connection, SendError, Sent, ServiceAtWork};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

/// How a call ended.
pub(crate) type Called = Result<Response<Incoming>, Cause>;

/// The attempts of one call: what they share.
struct Call<'a> {
    service: &'a ServiceAtWork<RequestBody>,
    view: &'a ServiceView,
    plan: &'a Plan,
    /// Attempts made.
    made: u8,
    /// The endpoints that failed.
    tried: Vec<usize>,
    /// An idle connection turned out to be closing: the next attempt makes a new one.
    connection: Connection,
}

/// Why one attempt failed, and what may be done about it.
struct Missed {
    cause: Cause,
    replay: Replay,
}

/// Calls the service of a plan. On success the exchange holds the connection that the body comes on.
pub(crate) async fn call(exchange: &mut Exchange, plan: &Plan, request: &mut Received) -> Called {
    let worker = Rc::clone(exchange.worker());
    let snapshot = Arc::clone(&exchange.snapshot);
    let table = worker.upstreams.table(&snapshot);
    let (Some(service), Some(view)) = (
        worker.upstreams.service(&table, plan.service),
        snapshot.service(plan.service),
    ) else {
        return Err(Cause::NoEndpoint);
    };
    exchange.permit = service.state.admit(view.spec.pool.max_requests);
    if exchange.permit.is_none() {
        return Err(Cause::Overflow);
    }
    let mut call = Call {
        service: &service,
        view,
        plan,
        made: 0,
        tried: Vec::new(),
        connection: Connection::Any,
    };
    let attempts = call.run(exchange, request);
    let outcome = match plan.attempts_until {
        None => attempts.await,
        Some(at) => match tokio::time::timeout_at(at.into(), attempts).await {
            Ok(outcome) => outcome,
            Err(_) => {
                call.timed_out(exchange);
                Err(Cause::Timeout)
            }
        },
    };
    if outcome.is_err() {
        exchange.permit = None;
    }
    outcome
}

impl Call<'_> {
    async fn run(&mut self, exchange: &mut Exchange, request: &mut Received) -> Called {
        let mut last = Cause::NoEndpoint;
        loop {
            let now = exchange.worker().now();
            let Some(chosen) = self.choose(now) else {
                return Err(last);
            };
            self.tried.push(chosen);
            self.made = self.made.saturating_add(1);
            let missed = match self.attempt(exchange, request, chosen, now).await {
                Ok(response) => return Ok(response),
                Err(missed) => missed,
            };
            last = missed.cause;
            let facts = Facts {
                made: self.made,
                allowed: self.plan.max_attempts,
                replay: missed.replay,
                deadline: self.plan.attempts_until,
            };
            if let Next::GiveUp(why) = after_failure(&facts, exchange.worker().now()) {
                exchange.record.gave_up = Some(why.as_str());
                return Err(last);
            }
        }
    }

    fn choose(&self, now: Instant) -> Option<usize> {
        match self.plan.only {
            Some(only) => (!self.tried.contains(&only)).then_some(only),
            None => self
                .service
                .choose(self.view, &self.tried, now)
                .map(|choice| choice.endpoint),
        }
    }

    /// One send, or one failure to connect.
    async fn attempt(
        &mut self,
        exchange: &mut Exchange,
        request: &mut Received,
        chosen: usize,
        now: Instant,
    ) -> Result<Response<Incoming>, Missed> {
        let (Some(endpoint), Some(seen)) = (
            self.service.endpoints.get(chosen),
            self.view.endpoints.get(chosen),
        ) else {
            return Err(Missed {
                cause: Cause::NoEndpoint,
                replay: Replay::Safe,
            });
        };
        let span = exchange.record.begin_attempt(&seen.address_text, &seen.zone, now);
        let protocol = self.view.spec.protocol;
        let limit = self.view.spec.connect_timeout;
        let lease = match endpoint.lease(protocol, self.connection, limit).await {
            Ok(lease) => lease,
            Err(error) => {
                tracing::debug!(endpoint = %seen.address_text, error = %error, "no connection");
                return Err(self.missed(exchange, chosen, Cause::ConnectFailure, Replay::Safe));
            }
        };
        let (outgoing, spare) = self.outgoing(exchange, request, seen, span)?;
        match lease.send(outgoing).await {
            Ok(Sent { response, keep }) => {
                exchange.keep = keep;
                exchange.from_peer = matches!(seen.key.via, Via::Proxy { .. });
                self.judge(exchange, request, seen, chosen, response, spare)
            }
            Err(SendError::Unsent(back)) => {
                request.take_back(*back);
                // The connection closed before it was used: nothing is held against the endpoint.
                Err(self.missed_quietly(exchange, Cause::Reset, Replay::Safe))
            }
            Err(SendError::Refused(_)) => {
                let replay = request.restore(spare, exchange);
                Err(self.missed_quietly(exchange, Cause::Reset, replay))
            }
            Err(SendError::Broken { error, reused }) => {
                tracing::debug!(endpoint = %seen.address_text, error = %error, "no answer");
                let idempotent = is_idempotent(request.parts.method.as_str());
                let replay = match request.restore(spare, exchange) {
                    // The peer closed an idle connection just as it was used again (RFC 9112 §9.3.1).
                    Replay::Safe if reused && idempotent => Replay::Safe,
                    Replay::Safe | Replay::Unsafe => Replay::Unsafe,
                };
                if reused && replay == Replay::Safe {
                    return Err(self.missed_quietly(exchange, Cause::Reset, replay));
                }
                Err(self.missed(exchange, chosen, Cause::Reset, replay))
            }
        }
    }

    /// The request as this endpoint gets it, and a copy of what is needed to send it again: the head, if
    /// there is no body (a body can't be had twice).
    fn outgoing(
        &self,
        exchange: &Exchange,
        request: &mut Received,
        seen: &EndpointView,
        span: [u8; 8],
    ) -> Result<(Request<RequestBody>, bool), Missed> {
        let Some(body) = request.body.take() else {
            return Err(Missed {
                cause: Cause::Reset,
                replay: Replay::Unsafe,
            });
        };
        let spare = body.is_none();
        let mut parts = request.head(&exchange.worker().via);
        exchange.record.trace.write(&mut parts.headers, span);
        if let Via::Proxy { .. } = seen.key.via {
            let target = format!("{}/{}", seen.key.service, seen.address_text);
            // A DNS label and an address: always a valid value.
            if let Ok(target) = HeaderValue::try_from(target) {
                parts.headers.insert(ENDPOINT, target);
            }
        }
        if address(&mut parts, request, self.view.spec.protocol).is_err() {
            request.body = Some(body);
            return Err(Missed {
                cause: Cause::Reset,
                replay: Replay::Unsafe,
            });
        }
        Ok((Request::from_parts(parts, body), spare))
    }

    /// What an answer means: mostly that it is one.
    fn judge(
        &self,
        exchange: &mut Exchange,
        request: &mut Received,
        seen: &EndpointView,
        chosen: usize,
        response: Response<Incoming>,
        spare: bool,
    ) -> Result<Response<Incoming>, Missed> {
        let now = exchange.worker().now();
        let status = response.status();
        if let Via::Proxy { .. } = seen.key.via
            && let Some((cause, acted)) = response
                .headers()
                .get(REASON)
                .and_then(|r| from_peer(r.as_bytes()))
        {
            exchange.keep = None;
            let replay = match request.restore(spare, exchange) {
                Replay::Safe if !acted => Replay::Safe,
                Replay::Safe | Replay::Unsafe => Replay::Unsafe,
            };
            exchange
                .record
                .end_attempt(now, Some(status.as_u16()), Some(cause.as_str()));
            self.note(exchange, chosen, event_of(cause), now);
            return Err(Missed { cause, replay });
        }
        let unasked = status == StatusCode::SWITCHING_PROTOCOLS && request.upgrade.is_none();
        if unasked || has_other_coding(response.headers()) {
            exchange.keep = None;
            return Err(self.missed(exchange, chosen, Cause::Reset, Replay::Unsafe));
        }
        exchange.record.end_attempt(now, Some(status.as_u16()), None);
        let event = if status.is_server_error() {
            Event::Fail
        } else {
            Event::Succeed
        };
        self.note(exchange, chosen, Some(event), now);
        if spare {
            // What a fallback may need, should this status count as a failure.
            request.restore(spare, exchange);
        }
        Ok(response)
    }

    fn missed(&self, exchange: &mut Exchange, chosen: usize, cause: Cause, replay: Replay) -> Missed {
        let now = exchange.worker().now();
        exchange.record.end_attempt(now, None, Some(cause.as_str()));
        self.note(exchange, chosen, event_of(cause), now);
        Missed { cause, replay }
    }

    /// A failure of the connection that says nothing about the endpoint, which may be tried again.
    fn missed_quietly(&mut self, exchange: &mut Exchange, cause: Cause, replay: Replay) -> Missed {
        let now = exchange.worker().now();
        exchange.record.end_attempt(now, None, Some(cause.as_str()));
        self.tried.pop();
        self.connection = Connection::New;
        Missed { cause, replay }
    }

    /// The time was up in the middle of an attempt.
    fn timed_out(&self, exchange: &mut Exchange) {
        let Some(&chosen) = self.tried.last() else {
            return;
        };
        let now = exchange.worker().now();
        exchange
            .record
            .end_attempt(now, None, Some(Cause::Timeout.as_str()));
        // A client that is slow to send its body says nothing about the endpoint.
        if exchange.meter.ended() {
            self.note(exchange, chosen, event_of(Cause::Timeout), now);
        }
    }

    fn note(&self, exchange: &Exchange, chosen: usize, event: Option<Event>, now: Instant) {
        let (Some(event), Some(endpoint)) = (event, self.service.endpoints.get(chosen)) else {
            return;
        };
        let Some(change) = endpoint.state.note(event, now, &self.service.limits) else {
            return;
        };
        let (service, address) = (&*self.view.name, endpoint.key.address);
        exchange
            .worker()
            .recorder
            .endpoint_changed(&self.view.name, word(change));
        match change {
            Change::Ejected(length) => tracing::warn!(service, %address, ?length, "endpoint ejected"),
            Change::Lost => tracing::warn!(service, %address, "endpoint can't be reached"),
            Change::Back => tracing::info!(service, %address, "endpoint is back"),
        }
    }
}

const fn word(change: Change) -> &'static str {
    match change {
        Change::Ejected(_) => "ejected",
        Change::Lost => "unreachable",
        Change::Back => "back",
    }
}

/// What a failed attempt says about the endpoint; a proxy's own limits say nothing.
const fn event_of(cause: Cause) -> Option<Event> {
    match cause {
        Cause::ConnectFailure => Some(Event::FailToConnect),
        Cause::Timeout | Cause::Reset | Cause::UpstreamStatus => Some(Event::Fail),
        Cause::NoEndpoint | Cause::Overflow => None,
    }
}

/// Puts target and Host as the endpoint's protocol wants them (RFC 9112 §3.2.1, RFC 9113 §8.3.1).
fn address(parts: &mut request::Parts, request: &Received, protocol: Protocol) -> Result<(), http::Error> {
    match protocol {
        Protocol::Http1 => {
            if parts.uri.authority().is_some() || parts.uri.scheme().is_some() {
                let host = HeaderValue::from_str(request.authority())?;
                parts.headers.insert(header::HOST, host);
                let path = parts.uri.path_and_query().cloned();
                parts.uri = path.map_or_else(|| Uri::from_static("/"), Uri::from);
            }
            if parts.version >= Version::HTTP_2 {
                request.found.join_cookies(&mut parts.headers);
            }
            parts.version = Version::HTTP_11;
        }
        Protocol::Http2 => {
            for name in [header::HOST, header::CONNECTION, header::UPGRADE] {
                parts.headers.remove(name);
            }
            let mut target = uri::Parts::default();
            target.scheme = Some(uri::Scheme::HTTP);
            target.authority = Some(request.authority().parse::<uri::Authority>()?);
            target.path_and_query = Some(
                parts
                    .uri
                    .path_and_query()
                    .cloned()
                    .unwrap_or(uri::PathAndQuery::from_static("/")),
            );
            parts.uri = Uri::from_parts(target)?;
            parts.version = Version::HTTP_2;
        }
    }
    Ok(())
}

impl Received {
    /// A copy of the head, for one attempt. What is not for the next hop is taken out once, at the first.
    fn head(&mut self, via: &HeaderValue) -> request::Parts {
        if !self.prepared {
            self.prepared = true;
            self.found.strip(&mut self.parts.headers, self.upgrade.is_some());
            self.parts.headers.append(header::VIA, via.clone());
            // A place for the attempt's own, so that no copy has to grow.
            self.parts
                .headers
                .entry("traceparent")
                .or_insert(HeaderValue::from_static(""));
        }
        let (mut parts, ()) = Request::new(()).into_parts();
        parts.method = self.parts.method.clone();
        parts.uri = self.parts.uri.clone();
        parts.version = self.parts.version;
        parts.headers = self.parts.headers.clone();
        parts
    }

    /// A request that was not sent comes back.
    fn take_back(&mut self, request: Request<RequestBody>) {
        self.body = Some(request.into_body());
    }

    /// Makes the request ready to be sent once more, if it had no body.
    fn restore(&mut self, spare: bool, exchange: &Exchange) -> Replay {
        if spare {
            self.body = Some(RequestBody::none(&exchange.meter));
            Replay::Safe
        } else {
            Replay::Unsafe
        }
    }
}

/// What the record has of an attempt, for a plugin.
pub(crate) fn attempt_cause(attempt: &Attempt) -> Option<Cause> {
    let all = [
        Cause::ConnectFailure,
        Cause::Timeout,
        Cause::Reset,
        Cause::NoEndpoint,
        Cause::Overflow,
        Cause::UpstreamStatus,
    ];
    all.into_iter()
        .find(|cause| attempt.cause == Some(cause.as_str()))
}

//! Attempts: choose an endpoint, lease a connection, send, judge; again where it is safe and allowed.

use crate::admit::Received;
use crate::body::{RequestBody, Supply};
use crate::exchange::Exchange;
use crate::failure::from_peer;
use crate::guard::{self, grpc_status, is_failure, tell};
use crate::headers::{ENDPOINT, GRPC_TIMEOUT, PRIORITY, REASON, TIMEOUT, has_other_coding};
use crate::race::race;
use crate::route::Plan;
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, Version, header, request, uri,
};
use hyper::body::Incoming;
use leeward_policy::model::{BalancePolicy, Cause, Priority, Protocol};
use leeward_policy::{EndpointView, ServiceView, Via};
use leeward_resilience::deadline::format;
use leeward_resilience::{
    Body, Change, Ended, Event, Facts, FailureKind, Missed, Next, Panic, Room, Why, after_failure,
    grpc_retry_pushback, retry_after,
};
use leeward_telemetry::{Attempt as Told, TraceContext};
use leeward_upstream::{
    Chance, ConnectError, Connection, Endpoint, Keep, Pass, RetryPermit, SendError, ServiceAtWork, UnderWay,
};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// How a call ended.
pub(crate) type Called = Result<Response<Incoming>, Cause>;
/// A service as this worker uses it.
pub(crate) type Service = ServiceAtWork<RequestBody>;

/// The attempts of one call: what they share.
pub(crate) struct Call<'a> {
    pub(crate) service: &'a Rc<Service>,
    pub(crate) view: &'a ServiceView,
    pub(crate) plan: &'a Plan,
    /// Attempts made.
    pub(crate) made: u8,
    /// The endpoints that failed, or are under way.
    tried: Vec<usize>,
    /// An idle connection turned out to be closing: the next attempt makes a new one.
    connection: Connection,
    /// Attempts under way, should the time be up.
    flying: Vec<Flying>,
}

/// What is known of an attempt whose future may be dropped at any time.
struct Flying {
    endpoint: usize,
    /// In the record.
    position: usize,
    started: Instant,
    /// The endpoint's circuit; dropped, it learns nothing.
    pass: Option<Pass>,
}

/// One attempt that has begun.
pub(crate) struct Attempt {
    endpoint: usize,
    position: usize,
    started: Instant,
    under_way: UnderWay,
    /// Leave to be one more than the first.
    extra: Option<RetryPermit>,
}

/// What it takes to send it.
pub(crate) struct Order {
    service: Rc<Service>,
    endpoint: Rc<Endpoint<RequestBody>>,
    protocol: Protocol,
    connection: Connection,
    connect_timeout: Duration,
    attempt_timeout: Option<Duration>,
    request: Request<RequestBody>,
}

/// What came of sending it.
pub(crate) enum Sending {
    Answer(Response<Incoming>, Option<Keep<RequestBody>>),
    NoConnection(ConnectError),
    /// The connection closed before a byte was written.
    Unsent,
    Refused,
    /// It may have been written, wholly or in part. `reused`: on a connection that had served before.
    Broken {
        reused: bool,
    },
    TimedOut,
}

/// What an attempt came to.
pub(crate) enum Judged {
    /// An answer to give.
    Answer(Response<Incoming>),
    /// A failure, which may be an answer too.
    Failed(Failed),
}

/// A failed attempt.
pub(crate) struct Failed {
    cause: Cause,
    response: Option<Response<Incoming>>,
    missed: Missed,
    may_have_acted: bool,
    retry_after: Option<Duration>,
}

/// Calls the service of a plan. On success the exchange holds the connection that the body comes on.
pub(crate) async fn call(exchange: &mut Exchange, plan: &Plan, request: &mut Received) -> Called {
    let worker = Rc::clone(exchange.worker());
    let snapshot = Arc::clone(&exchange.snapshot);
    let table = worker.upstreams.table(&snapshot);
    let (Some(service), Some(view)) = (
        worker.upstreams.service(&table, plan.service, worker.now()),
        snapshot.service(plan.service),
    ) else {
        return Err(Cause::NoEndpoint);
    };
    let passage = guard::pass(exchange, plan, request, &service, view).await?;
    let mut call = Call {
        service: &service,
        view,
        plan,
        made: 0,
        tried: Vec::new(),
        connection: Connection::Any,
        flying: Vec::new(),
    };
    let attempts = call.run(exchange, request);
    let called = match plan.attempts_until {
        None => attempts.await,
        Some(at) => match tokio::time::timeout_at(at.into(), attempts).await {
            Ok(called) => called,
            Err(_) => {
                call.timed_out(exchange);
                Err(Cause::Timeout)
            }
        },
    };
    passage.settle(exchange, &service, &called, call.made.into());
    if called.is_err() {
        exchange.let_go();
    }
    called
}

impl Call<'_> {
    async fn run(&mut self, exchange: &mut Exchange, request: &mut Received) -> Called {
        let mut last = Cause::NoEndpoint;
        let mut extra = None;
        loop {
            let Some((attempt, order)) = self.begin(exchange, request, extra.take(), false) else {
                return Err(last);
            };
            let judged = match &self.plan.retry.hedge {
                // Rare, so it doesn't belong in the size of every request's future.
                Some(hedge) => Box::pin(race(self, exchange, request, hedge, (attempt, order))).await,
                None => {
                    let sending = send(order).await;
                    self.judge(exchange, attempt, sending)
                }
            };
            let failed = match judged {
                Judged::Answer(response) => {
                    // What refused an earlier attempt doesn't matter any more.
                    exchange.record.limit = None;
                    return Ok(response);
                }
                Judged::Failed(failed) => failed,
            };
            last = failed.cause;
            match self.next(exchange, &failed) {
                (Next::Retry { wait }, permit) => {
                    exchange.keep = None;
                    exchange.under_way = None;
                    extra = permit;
                    exchange.worker().recorder.tried_again(&self.view.name, "retry");
                    drop(failed);
                    if !wait.is_zero() {
                        tokio::time::sleep(wait).await;
                    }
                }
                (Next::GiveUp(why), _) => return self.give_up(exchange, failed, why),
            }
        }
    }

    fn give_up(&self, exchange: &mut Exchange, failed: Failed, why: Why) -> Called {
        let failure = failed.response.as_ref().is_none_or(is_failure);
        if failure {
            exchange.record.gave_up = Some(why.as_str());
            exchange
                .worker()
                .recorder
                .not_tried_again(&self.view.name, why.as_str());
        }
        failed.response.ok_or(failed.cause)
    }

    /// Whether to try again, and leave to do so.
    fn next(&self, exchange: &Exchange, failed: &Failed) -> (Next, Option<RetryPermit>) {
        let now = exchange.worker().now();
        let facts = Facts {
            made: self.made,
            retry: &self.plan.retry,
            missed: failed.missed,
            may_have_acted: failed.may_have_acted,
            idempotent: self.plan.idempotent,
            body: body_left(exchange),
            is_retry_of_hop_before: exchange.record.trace.retry,
            other_endpoint: self.has_other(),
            deadline: self.plan.attempts_until,
            retry_after: failed.retry_after,
        };
        let mut permit = None;
        let room = || {
            let (room, taken) = self.room(now);
            permit = taken;
            room
        };
        let next = after_failure(&facts, now, &mut Chance, room);
        (next, permit)
    }

    fn room(&self, now: Instant) -> (Room, Option<RetryPermit>) {
        let Some(permit) = self.service.state.retry(self.view.spec.pool.max_retries) else {
            return (Room::TooManyRetries, None);
        };
        let settings = &self.view.resilience.retry_budget;
        if self.service.guards.retry.try_spend(now, settings) {
            (Room::Taken, Some(permit))
        } else {
            (Room::BudgetExhausted, None)
        }
    }

    fn has_other(&self) -> bool {
        match self.plan.only {
            Some(only) => !self.tried.contains(&only),
            None => {
                let tiers = self.view.tiers_of(self.plan.subset).iter();
                tiers
                    .flat_map(|tier| &tier.endpoints)
                    .any(|e| !self.tried.contains(e))
            }
        }
    }

    /// Chooses an endpoint and makes the request ready for it. `None`: there is nobody left to ask.
    pub(crate) fn begin(
        &mut self,
        exchange: &mut Exchange,
        request: &mut Received,
        extra: Option<RetryPermit>,
        hedge: bool,
    ) -> Option<(Attempt, Order)> {
        let now = exchange.worker().now();
        let (chosen, pass) = self.choose(exchange, now)?;
        let (endpoint, seen) = (
            self.service.endpoints.get(chosen)?,
            self.view.endpoints.get(chosen)?,
        );
        self.tried.push(chosen);
        self.made = self.made.saturating_add(1);
        let (position, span) = exchange
            .record
            .begin_attempt(&seen.address_text, &seen.zone, hedge, now);
        self.flying.push(Flying {
            endpoint: chosen,
            position,
            started: now,
            pass,
        });
        // What policy has checked, and the parser of requests, makes a head that can be sent.
        let request = self.outgoing(exchange, request, seen, span, now).ok()?;
        let attempt = Attempt {
            endpoint: chosen,
            position,
            started: now,
            under_way: endpoint.state.begin(),
            extra,
        };
        let order = Order {
            service: Rc::clone(self.service),
            endpoint: Rc::clone(endpoint),
            protocol: self.view.spec.protocol,
            connection: self.connection,
            connect_timeout: self.view.spec.connect_timeout,
            attempt_timeout: self.plan.attempt_timeout,
            request,
        };
        Some((attempt, order))
    }

    /// An endpoint that wasn't tried and whose circuit lets a call pass.
    fn choose(&mut self, exchange: &mut Exchange, now: Instant) -> Option<(usize, Option<Pass>)> {
        if let Some(only) = self.plan.only {
            return (!self.tried.contains(&only)).then_some((only, None));
        }
        let tried = self.tried.len();
        let chosen = loop {
            let choice = self
                .service
                .choose(self.view, self.plan.subset, self.plan.hash, &self.tried, now);
            let Some(choice) = choice else { break None };
            exchange.record.panic |= choice.panic == Panic::Yes;
            let Some(circuit) = self.service.endpoint_circuit(choice.endpoint) else {
                break Some((choice.endpoint, None));
            };
            let asked = circuit.ask(None, now, &mut Chance, &mut |circuit, change| {
                self.service.state.circuit_changed();
                tell(exchange, circuit, change);
            });
            match asked {
                Ok(pass) => break Some((choice.endpoint, Some(pass))),
                // As if it had been tried, for this choice.
                Err(_) => self.tried.push(choice.endpoint),
            }
        };
        self.tried.truncate(tried);
        chosen
    }

    /// The request as this endpoint gets it.
    fn outgoing(
        &self,
        exchange: &Exchange,
        request: &mut Received,
        seen: &EndpointView,
        span: [u8; 8],
        now: Instant,
    ) -> Result<Request<RequestBody>, http::Error> {
        let left = self.time_left(now);
        let timeout = if exchange.grpc { GRPC_TIMEOUT } else { TIMEOUT };
        let mut parts = request.head(&exchange.worker().via, left.map(|_| &timeout));
        exchange.record.trace.write(&mut parts.headers, span);
        if self.made > 1 {
            TraceContext::mark_retry(&mut parts.headers);
        }
        if let Via::Proxy { .. } = seen.key.via {
            let target = format!("{}/{}", seen.key.service, seen.address_text);
            // A DNS label and an address: always a valid value.
            if let Ok(target) = HeaderValue::try_from(target) {
                parts.headers.insert(ENDPOINT, target);
            }
            if self.plan.priority != Priority::Normal {
                let priority = HeaderValue::from_static(self.plan.priority.as_str());
                parts.headers.insert(PRIORITY, priority);
            }
        }
        // Tells the next hop how long its answer is waited for.
        let left = left.and_then(|left| HeaderValue::try_from(format(left)).ok());
        if let Some(left) = left {
            parts.headers.insert(timeout, left);
        }
        address(&mut parts, request, self.view.spec.protocol)?;
        Ok(Request::from_parts(parts, exchange.intake.send()))
    }

    /// What the next hop has at most.
    fn time_left(&self, now: Instant) -> Option<Duration> {
        let until = self.plan.attempts_until;
        let left = until.map(|until| until.saturating_duration_since(now));
        leeward_resilience::deadline::cut(left, self.plan.attempt_timeout)
    }

    /// What sending an attempt came to: mostly an answer.
    pub(crate) fn judge(&mut self, exchange: &mut Exchange, attempt: Attempt, sending: Sending) -> Judged {
        match sending {
            Sending::Answer(response, keep) => self.judge_answer(exchange, attempt, response, keep),
            Sending::NoConnection(ConnectError::Full { .. }) => {
                exchange.record.limit = Some("maxConnections");
                exchange
                    .worker()
                    .recorder
                    .refused(&self.view.name, "maxConnections");
                self.failed(exchange, attempt, Cause::Overflow, Missed::Refused)
            }
            Sending::NoConnection(error) => {
                tracing::debug!(service = %self.view.name, %error, "no connection");
                self.failed(exchange, attempt, Cause::ConnectFailure, Missed::ConnectFailure)
            }
            Sending::Unsent => self.quietly(exchange, attempt, Missed::Unsent),
            Sending::Refused => self.quietly(exchange, attempt, Missed::Refused),
            // The peer closed an idle connection just as it was used again (RFC 9112 §9.3.1).
            Sending::Broken { reused: true } if self.plan.idempotent => {
                let mut judged = self.quietly(exchange, attempt, Missed::Unsent);
                if let Judged::Failed(failed) = &mut judged {
                    failed.may_have_acted = true;
                }
                judged
            }
            Sending::Broken { .. } => self.failed(exchange, attempt, Cause::Reset, Missed::Reset),
            Sending::TimedOut => self.failed(exchange, attempt, Cause::Timeout, Missed::AttemptTimeout),
        }
    }

    fn judge_answer(
        &mut self,
        exchange: &mut Exchange,
        attempt: Attempt,
        response: Response<Incoming>,
        keep: Option<Keep<RequestBody>>,
    ) -> Judged {
        let seen = self.view.endpoints.get(attempt.endpoint);
        let from_proxy = seen.is_some_and(|seen| matches!(seen.key.via, Via::Proxy { .. }));
        if from_proxy
            && let Some((cause, acted)) = response
                .headers()
                .get(REASON)
                .and_then(|reason| from_peer(reason.as_bytes()))
        {
            let missed = match cause {
                Cause::ConnectFailure => Missed::ConnectFailure,
                Cause::Timeout => Missed::AttemptTimeout,
                Cause::Reset => Missed::Reset,
                Cause::NoEndpoint
                | Cause::Overflow
                | Cause::UpstreamStatus
                | Cause::CircuitOpen
                | Cause::Overloaded
                | Cause::RateLimited => Missed::Refused,
            };
            let status = Some(response.status().as_u16());
            return self.failed_as(exchange, attempt, (cause, missed, acted), status);
        }
        let unasked = response.status() == StatusCode::SWITCHING_PROTOCOLS && !exchange.wants_upgrade;
        if unasked || has_other_coding(response.headers()) {
            return self.failed(exchange, attempt, Cause::Reset, Missed::Reset);
        }
        exchange.keep = keep;
        exchange.from_peer = from_proxy;
        self.answered(exchange, attempt, response)
    }

    /// An answer of the workload's.
    fn answered(
        &mut self,
        exchange: &mut Exchange,
        attempt: Attempt,
        response: Response<Incoming>,
    ) -> Judged {
        let now = exchange.worker().now();
        let status = response.status();
        let took = now.saturating_duration_since(attempt.started);
        exchange
            .record
            .end_attempt(attempt.position, now, Some(status.as_u16()), None);
        let failure = is_failure(&response);
        let asked = if failure {
            pause_asked_for(response.headers())
        } else {
            None
        };
        self.note(exchange, attempt.endpoint, event_of_answer(&response), now);
        self.weigh(attempt.endpoint, failure, took, asked, now);
        let pass = self.land(attempt.position);
        self.settle(exchange, pass, failure, now);
        exchange.under_way = Some(attempt.under_way);
        exchange.extra = attempt.extra;
        // Conditions may name statuses that are no failures of the service, and a few of those that are.
        if status.as_u16() < 400 && !failure {
            return Judged::Answer(response);
        }
        Judged::Failed(Failed {
            cause: Cause::UpstreamStatus,
            missed: Missed::Answer {
                status: status.as_u16(),
                grpc_status: grpc_status(&response),
            },
            response: Some(response),
            may_have_acted: true,
            retry_after: asked,
        })
    }

    /// No answer, and the endpoint is to blame for it.
    fn failed(&mut self, exchange: &mut Exchange, attempt: Attempt, cause: Cause, missed: Missed) -> Judged {
        let acted = match missed {
            Missed::ConnectFailure | Missed::Refused | Missed::Unsent => false,
            Missed::Reset | Missed::AttemptTimeout | Missed::Answer { .. } => true,
        };
        self.failed_as(exchange, attempt, (cause, missed, acted), None)
    }

    fn failed_as(
        &mut self,
        exchange: &mut Exchange,
        attempt: Attempt,
        (cause, missed, may_have_acted): (Cause, Missed, bool),
        status: Option<u16>,
    ) -> Judged {
        let now = exchange.worker().now();
        exchange
            .record
            .end_attempt(attempt.position, now, status, Some(cause.as_str()));
        let pass = self.land(attempt.position);
        // A client that is slow to send its body says nothing about the endpoint.
        let blamed = cause != Cause::Timeout || exchange.intake.ended();
        if let Some(event) = event_of(cause).filter(|_| blamed) {
            let took = now.saturating_duration_since(attempt.started);
            self.note(exchange, attempt.endpoint, event, now);
            self.weigh(attempt.endpoint, true, took, None, now);
            self.settle(exchange, pass, true, now);
        }
        Judged::Failed(Failed {
            cause,
            response: None,
            missed,
            may_have_acted,
            retry_after: None,
        })
    }

    /// A failure of the connection that says nothing about the endpoint, which may be tried again.
    fn quietly(&mut self, exchange: &mut Exchange, attempt: Attempt, missed: Missed) -> Judged {
        let now = exchange.worker().now();
        let cause = Cause::Reset;
        exchange
            .record
            .end_attempt(attempt.position, now, None, Some(cause.as_str()));
        drop(self.land(attempt.position));
        self.tried.retain(|tried| *tried != attempt.endpoint);
        self.connection = Connection::New;
        Judged::Failed(Failed {
            cause,
            response: None,
            missed,
            may_have_acted: false,
            retry_after: None,
        })
    }

    /// An attempt is no longer under way.
    fn land(&mut self, position: usize) -> Option<Pass> {
        let at = self
            .flying
            .iter()
            .position(|flying| flying.position == position)?;
        self.flying.swap_remove(at).pass
    }

    /// Attempts whose answer nobody waits for any more: another came first.
    pub(crate) fn abandon(&mut self, exchange: &mut Exchange) {
        let now = exchange.worker().now();
        for flying in self.flying.drain(..) {
            exchange.record.end_attempt(flying.position, now, None, None);
        }
    }

    /// The time was up in the middle of an attempt.
    fn timed_out(&mut self, exchange: &mut Exchange) {
        let now = exchange.worker().now();
        for flying in std::mem::take(&mut self.flying) {
            let cause = Some(Cause::Timeout.as_str());
            exchange.record.end_attempt(flying.position, now, None, cause);
            // A client that is slow to send its body says nothing about the endpoint.
            if exchange.intake.ended() {
                let took = now.saturating_duration_since(flying.started);
                self.note(exchange, flying.endpoint, Event::Fail(FailureKind::Gateway), now);
                self.weigh(flying.endpoint, true, took, None, now);
                self.settle(exchange, flying.pass, true, now);
            }
        }
        exchange.record.gave_up = Some(Why::DeadlinePassed.as_str());
    }

    /// What a call says about an endpoint's share of the next ones.
    fn weigh(&self, endpoint: usize, failure: bool, took: Duration, asked: Option<Duration>, now: Instant) {
        let balance = &self.view.spec.balance;
        let (BalancePolicy::PeakEwma(settings), Some(endpoint)) =
            (&balance.policy, self.service.endpoints.get(endpoint))
        else {
            return;
        };
        let counts_as = if failure {
            took.max(balance.failure_penalty)
        } else {
            took
        };
        endpoint.state.took(counts_as, now, settings);
        if let Some(asked) = asked {
            endpoint.state.push_back(asked, now);
        }
    }

    fn settle(&self, exchange: &Exchange, pass: Option<Pass>, failure: bool, now: Instant) {
        let Some(pass) = pass else { return };
        let ended = if failure { Ended::Fail } else { Ended::Succeed };
        pass.settle(ended, now, &mut Chance, &mut |circuit, change| {
            self.service.state.circuit_changed();
            tell(exchange, circuit, change);
        });
    }

    fn note(&self, exchange: &Exchange, endpoint: usize, event: Event, now: Instant) {
        let Some(change) = self.service.note(self.view, endpoint, event, now) else {
            return;
        };
        let Some(seen) = self.view.endpoints.get(endpoint) else {
            return;
        };
        let (word, reason) = words(change);
        exchange
            .worker()
            .recorder
            .endpoint_changed(&self.view.name, word, reason);
        let (service, address, zone) = (&*self.view.name, &*seen.address_text, &*seen.zone);
        match change {
            Change::Ejected(ejection) => {
                tracing::warn!(service, address, zone, reason, length = ?ejection.length(), evidence = ?ejection.why, "endpoint ejected");
            }
            Change::Lost => tracing::warn!(service, address, zone, "endpoint can't be reached"),
            Change::ChecksFailed => tracing::warn!(service, address, zone, "endpoint fails its checks"),
            Change::Back | Change::ChecksPassed => tracing::info!(service, address, zone, "endpoint is back"),
        }
    }
}

/// The words for a change of an endpoint, and for its reason.
pub const fn words(change: Change) -> (&'static str, &'static str) {
    match change {
        Change::Ejected(ejection) => ("ejected", ejection.why.as_str()),
        Change::Lost => ("unreachable", "connect_failure"),
        Change::Back => ("back", "-"),
        Change::ChecksFailed => ("unhealthy", "health_check"),
        Change::ChecksPassed => ("back", "health_check"),
    }
}

/// Sends a request: gets a connection, and waits for the head of the answer.
///
/// Dropping the future abandons the request.
pub(crate) async fn send(order: Order) -> Sending {
    match order.attempt_timeout {
        None => sent(order).await,
        Some(limit) => match tokio::time::timeout(limit, sent(order)).await {
            Ok(sending) => sending,
            Err(_) => Sending::TimedOut,
        },
    }
}

async fn sent(order: Order) -> Sending {
    let Order {
        service,
        endpoint,
        protocol,
        connection,
        connect_timeout,
        request,
        ..
    } = order;
    let mut lease = endpoint.lease(protocol, connection, connect_timeout).await;
    if matches!(lease, Err(ConnectError::Full { .. })) && service.close_one_idle() {
        // Its task ends at its next turn.
        tokio::task::yield_now().await;
        lease = Box::pin(endpoint.lease(protocol, connection, connect_timeout)).await;
    }
    let lease = match lease {
        Ok(lease) => lease,
        Err(error) => return Sending::NoConnection(error),
    };
    match lease.send(request).await {
        Ok(sent) => Sending::Answer(sent.response, sent.keep),
        Err(SendError::Unsent(_)) => Sending::Unsent,
        Err(SendError::Refused(_)) => Sending::Refused,
        Err(SendError::Broken { error, reused }) => {
            tracing::debug!(endpoint = %endpoint.key.address, %error, "no answer");
            Sending::Broken { reused }
        }
    }
}

/// What is left of the body for another attempt.
pub(crate) fn body_left(exchange: &Exchange) -> Body {
    match exchange.intake.supply() {
        Supply::Whole => Body::Whole,
        Supply::TooLarge => Body::TooLarge,
        Supply::Gone => Body::Gone,
    }
}

/// How long an upstream asks to be left alone.
fn pause_asked_for(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(pushback) = text("grpc-retry-pushback-ms") {
        return Some(grpc_retry_pushback(pushback));
    }
    #[expect(clippy::disallowed_methods, reason = "a date is by the wall clock")]
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_secs())
    };
    text("retry-after").and_then(|value| retry_after(value, now()))
}

/// What an answer says about the endpoint. In gRPC the status says it, where the head has it; one that asks for
/// less (RESOURCE_EXHAUSTED, like 429) is no failure of the endpoint.
fn event_of_answer(response: &Response<Incoming>) -> Event {
    match (response.status().as_u16(), grpc_status(response)) {
        (502..=504, _) | (_, Some(4 | 14)) => Event::Fail(FailureKind::Gateway),
        (500.., _) | (_, Some(2 | 13 | 15)) => Event::Fail(FailureKind::Server5xx),
        _ => Event::Succeed,
    }
}

/// What a failed attempt says about the endpoint; a proxy's own limits say nothing.
const fn event_of(cause: Cause) -> Option<Event> {
    match cause {
        Cause::ConnectFailure => Some(Event::FailToConnect),
        Cause::Timeout | Cause::Reset => Some(Event::Fail(FailureKind::Gateway)),
        Cause::NoEndpoint
        | Cause::Overflow
        | Cause::UpstreamStatus
        | Cause::CircuitOpen
        | Cause::Overloaded
        | Cause::RateLimited => None,
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
    fn head(&mut self, via: &HeaderValue, timeout: Option<&HeaderName>) -> request::Parts {
        if !self.prepared {
            self.prepared = true;
            self.found.strip(&mut self.parts.headers, self.upgrade.is_some());
            self.parts.headers.append(header::VIA, via.clone());
            // Places for the attempt's own, so that no copy has to grow.
            for name in [Some(&TRACEPARENT), timeout].into_iter().flatten() {
                let empty = HeaderValue::from_static("");
                self.parts.headers.entry(name).or_insert(empty);
            }
        }
        let (mut parts, ()) = Request::new(()).into_parts();
        parts.method = self.parts.method.clone();
        parts.uri = self.parts.uri.clone();
        parts.version = self.parts.version;
        parts.headers = self.parts.headers.clone();
        parts
    }
}

/// What the record has of an attempt, for a plugin.
pub(crate) fn attempt_cause(attempt: &Told) -> Option<Cause> {
    Cause::ALL
        .into_iter()
        .find(|cause| attempt.cause == Some(cause.as_str()))
}

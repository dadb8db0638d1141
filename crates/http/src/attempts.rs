//! Attempts: choose an endpoint, lease a connection, send, judge; again where it is safe and allowed.

use crate::admit::Received;
use crate::authorize::authorize;
use crate::body::{RequestBody, Supply};
use crate::exchange::Exchange;
use crate::guard::{self, is_failure, tell};
use crate::race::race;
use crate::route::Plan;
use http::{Method, Request, Response};
use leeward_policy::model::{Cause, Protocol, ZoneTransport};
use leeward_policy::{EndpointView, ServiceView, Via};
use leeward_resilience::{Body, Facts, Missed, Next, Panic, Room, Why, after_failure, holds};
use leeward_telemetry::{Attempt as Told, Reason};
use leeward_upstream::{
    Answers, Chance, ConnectError, Connection, Endpoint, IncomingBody, Keep, Pass, Passage, RetryPermit,
    SendError, ServiceAtWork, Transport, UnderWay, Wants,
};
use smallvec::SmallVec;
use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often room is made for a connection that finds none, and the pause for it: somebody else may take it.
const FULL_TRIES: u32 = 20;
const FULL_PAUSE: Duration = Duration::from_millis(1);

/// How a call ended.
pub(crate) type Called = Result<Response<IncomingBody>, Cause>;
/// A service as this worker uses it.
pub(crate) type Service = ServiceAtWork<RequestBody>;

/// The attempts of one call: what they share.
pub(crate) struct Call<'a> {
    pub(crate) service: &'a Rc<Service>,
    pub(crate) view: &'a ServiceView,
    pub(crate) plan: &'a Plan,
    /// How large the answers are that come for the rule, or for the service where there is no rule.
    answers: &'a Arc<Answers>,
    /// Attempts made.
    pub(crate) made: u8,
    /// The endpoints that failed, or are under way.
    pub(crate) tried: SmallVec<[usize; 4]>,
    /// An idle connection turned out to be closing: the next attempt makes a new one.
    pub(crate) connection: Connection,
    /// Attempts under way, should the time be up.
    pub(crate) flying: SmallVec<[Flying; 1]>,
}

/// What is known of an attempt whose future may be dropped at any time.
pub(crate) struct Flying {
    pub(crate) endpoint: usize,
    /// In the record.
    pub(crate) position: usize,
    pub(crate) started: Instant,
    /// The endpoint's circuit; dropped, it learns nothing.
    pub(crate) pass: Option<Pass>,
    /// The gateway that it goes by, if it goes by one.
    pub(crate) passage: Option<Rc<Passage>>,
}

/// One attempt that has begun.
pub(crate) struct Attempt {
    pub(crate) endpoint: usize,
    pub(crate) position: usize,
    pub(crate) started: Instant,
    pub(crate) under_way: UnderWay,
    /// Leave to be one more than the first.
    pub(crate) extra: Option<RetryPermit>,
    /// The gateway that it goes by, if it goes by one.
    pub(crate) passage: Option<Rc<Passage>>,
}

/// What it takes to send it.
pub(crate) struct Order {
    service: Rc<Service>,
    endpoint: Rc<Endpoint<RequestBody>>,
    wants: Wants,
    passage: Option<Rc<Passage>>,
    attempt_timeout: Option<Duration>,
    /// On the heap for itself: it goes through several futures more than the rest of this.
    request: Box<Request<RequestBody>>,
    /// Where the size of the answer is noted, if another request may go by it.
    answers: Option<Arc<Answers>>,
}

/// What came of an order.
pub(crate) struct Outcome {
    pub(crate) sending: Sending,
    /// What it went by, if it came as far as a connection.
    pub(crate) transport: Option<Transport>,
    /// It went by TCP, since QUIC did not get through.
    pub(crate) fell_back: bool,
}

/// What came of sending it.
pub(crate) enum Sending {
    Answer(Response<IncomingBody>, Option<Keep<RequestBody>>),
    NoConnection(ConnectError),
    /// The connection closed before a byte was written.
    Unsent,
    Refused,
    /// The proxy at the other end refused this one's certificate, and has not looked at the request.
    NotLetIn,
    /// No proxy takes a head like this.
    TooLarge,
    /// It may have been written, wholly or in part. `reused`: on a connection that had served before; `lost`: the connection
    /// is known to be gone.
    Broken {
        reused: bool,
        lost: bool,
    },
    TimedOut,
}

/// What an attempt came to.
pub(crate) enum Judged {
    /// An answer to give.
    Answer(Response<IncomingBody>),
    /// A failure, which may be an answer too.
    Failed(Failed),
}

/// A failed attempt.
pub(crate) struct Failed {
    pub(crate) cause: Cause,
    pub(crate) response: Option<Response<IncomingBody>>,
    pub(crate) missed: Missed,
    pub(crate) may_have_acted: bool,
    pub(crate) retry_after: Option<Duration>,
}

/// Calls the service of a plan. On success the exchange holds the connection that the body comes on.
pub(crate) async fn call(exchange: &mut Exchange, plan: &Plan, request: &mut Received) -> Called {
    let worker = Rc::clone(exchange.worker());
    let snapshot = Arc::clone(&exchange.snapshot);
    let table = worker.upstreams.table(&snapshot);
    let now = worker.now();
    let (Some(service), Some(view)) = (
        worker.upstreams.service(&table, plan.service, now),
        snapshot.service(plan.service),
    ) else {
        return Err(Cause::NoEndpoint);
    };
    // Bytes are not for who speaks HTTP, nor requests for who doesn't. Policy has seen to that, but for what it was when a
    // request began.
    if (view.spec.protocol == Protocol::Tcp) != exchange.record.tcp.is_some() {
        return Err(Cause::NoEndpoint);
    }
    // Whichever way a call has come here.
    authorize(exchange, plan.service, request).await?;
    let passage = guard::pass(exchange, plan, request, (&service, view), now).await?;
    let rule = plan.rule.and_then(|idx| worker.upstreams.rule(&table, idx, now));
    let mut call = Call {
        service: &service,
        view,
        plan,
        answers: rule.map_or(&service.state.answers, |rule| &rule.answers),
        made: 0,
        tried: plan.excluded.as_slice().into(),
        connection: Connection::Any,
        flying: SmallVec::new(),
    };
    let called = {
        // In its place at once: it is large, and would be moved into what bounds its time.
        let attempts = pin!(call.run(exchange, request));
        match plan.attempts_until {
            None => Some(attempts.await),
            Some(at) => tokio::time::timeout_at(at.into(), attempts).await.ok(),
        }
    };
    let called = called.unwrap_or_else(|| {
        call.timed_out(exchange);
        Err(Cause::Timeout)
    });
    passage.settle(exchange, &service, &called, call.made.into());
    if called.is_err() {
        exchange.let_go();
    }
    called
}

impl Call<'_> {
    async fn run(&mut self, exchange: &mut Exchange, request: &mut Received) -> Called {
        let extra = exchange.extra.take();
        let Some(mut begun) = self.begin(exchange, request, extra, false) else {
            return Err(self.nobody(exchange));
        };
        loop {
            let judged = match &self.plan.retry.hedge {
                // Rare, so it doesn't belong in the size of every request's future.
                Some(hedge) => Box::pin(race(self, exchange, request, hedge, begun)).await,
                None => {
                    let (attempt, order) = begun;
                    let outcome = send(order).await;
                    self.judge(exchange, attempt, outcome)
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
            let (wait, permit) = match self.next(exchange, &failed) {
                (Next::Retry { wait }, permit) => (wait, permit),
                (Next::GiveUp(why), _) => return self.give_up(exchange, failed, why),
            };
            // The body is the next attempt's: what the last one still sent of it would be lost to that.
            exchange.intake.recall();
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            begun = match self.begin(exchange, request, permit, false) {
                Some(next) => next,
                // Some are left, but none of them may be asked now: the answer there is will have to do.
                None => return self.give_up(exchange, failed, Why::NoOtherEndpoint),
            };
            exchange.keep = None;
            exchange.under_way = None;
            exchange.worker().recorder.tried_again(&self.view.name, "retry");
        }
    }

    /// Why there is nobody to ask.
    fn nobody(&self, exchange: &mut Exchange) -> Cause {
        if self.service.is_shut(exchange.worker().now()) {
            exchange.record.limit = Some("endpointCircuitBreaker");
            return Cause::CircuitOpen;
        }
        if self.service.lacks_room(self.plan.subset, &self.tried) {
            exchange.refused_by("spareCapacity", Some(&self.view.name));
            return Cause::Overflow;
        }
        if self.service.lacks_gateway(exchange.worker().now()) {
            exchange.unconnected = Some(Reason::GatewayUnavailable);
            exchange.gateway_failed = true;
            return Cause::ConnectFailure;
        }
        Cause::NoEndpoint
    }

    fn give_up(&self, exchange: &mut Exchange, failed: Failed, why: Why) -> Called {
        let failure = !failed.cause.is_denial() && failed.response.as_ref().is_none_or(is_failure);
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
    fn next(&self, exchange: &mut Exchange, failed: &Failed) -> (Next, Option<RetryPermit>) {
        let now = exchange.worker().now();
        // One that retries already goes on with the leave that it has.
        let mut held = exchange.extra.take();
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
            let (room, taken) = self.room(held.take(), now);
            permit = taken;
            room
        };
        let next = after_failure(&facts, now, &mut Chance, room);
        (next, permit)
    }

    fn room(&self, held: Option<RetryPermit>, now: Instant) -> (Room, Option<RetryPermit>) {
        let max = self.view.spec.pool.max_retries;
        let Some(permit) = held.or_else(|| self.service.state.retry(max)) else {
            return (Room::TooManyRetries, None);
        };
        let settings = &self.view.resilience.retry_budget;
        if self.service.guards.retry.try_spend(now, settings) {
            (Room::Taken, Some(permit))
        } else {
            (Room::BudgetExhausted, None)
        }
    }

    pub(crate) fn has_other(&self) -> bool {
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
    ) -> Option<(Attempt, Box<Order>)> {
        let now = exchange.worker().now();
        let (chosen, pass) = self.choose(exchange, now)?;
        let (endpoint, seen) = (
            self.service.endpoints.get(chosen)?,
            self.view.endpoints.get(chosen)?,
        );
        exchange.record.limit = None;
        // Whatever becomes of this one is its own.
        exchange.gateway_failed = false;
        self.tried.push(chosen);
        self.made = self.made.saturating_add(1);
        let (position, span) = exchange
            .record
            .begin_attempt(&seen.address_text, &seen.zone, hedge, now);
        let passage = endpoint.passage();
        self.flying.push(Flying {
            endpoint: chosen,
            position,
            started: now,
            pass,
            passage: passage.clone(),
        });
        let answers = self.sizes(exchange, request, seen);
        let large = answers.as_ref().is_some_and(|answers| answers.size().is_large());
        let request = self.outgoing(exchange, request, seen, span, now)?;
        let attempt = Attempt {
            endpoint: chosen,
            position,
            started: now,
            under_way: endpoint.state.begin(),
            extra,
            passage: passage.clone(),
        };
        // On the heap, since what it takes to send goes through several futures, each of which would have room
        // for it, and a request's future is moved whole.
        let order = Box::new(Order {
            service: Rc::clone(self.service),
            endpoint: Rc::clone(endpoint),
            wants: Wants {
                protocol: self.view.spec.protocol,
                connection: self.connection,
                transport: seen.transport,
                upgrade: exchange.wants_upgrade,
                length: exchange.intake.length(),
                large_answer: large && self.may_go_by_tcp(exchange),
                limit: self.view.spec.connect_timeout,
            },
            passage,
            attempt_timeout: self.plan.attempt_timeout,
            request,
            answers,
        });
        Some((attempt, order))
    }

    /// Where it is known how large answers are, if that has a say in how the request goes: to another proxy, where policy leaves
    /// the choice, and if its answer will have a body.
    fn sizes(&self, exchange: &Exchange, request: &Received, seen: &EndpointView) -> Option<Arc<Answers>> {
        let chooses = seen.transport == ZoneTransport::Auto
            && seen.key.via != Via::Direct
            && !exchange.wants_upgrade
            && request.parts.method != Method::HEAD;
        chooses.then(|| Arc::clone(self.answers))
    }

    /// An idle connection of HTTP/1.1 may turn out to be closing when the request has gone: what would not be sent again then
    /// would fail for that, which by QUIC it doesn't. HTTP/2 says what was not done.
    fn may_go_by_tcp(&self, exchange: &Exchange) -> bool {
        let retry = &self.plan.retry;
        self.view.spec.protocol == Protocol::Http2
            || self.plan.idempotent
                && !exchange.record.trace.retry
                && exchange.intake.is_empty()
                && self.made < retry.max_attempts
                && holds(retry, Missed::Unsent)
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
}

/// Sends a request: gets a connection, and waits for the head of the answer.
///
/// Dropping the future abandons the request.
pub(crate) async fn send(order: Box<Order>) -> Outcome {
    let way = Cell::new((None, false));
    let limit = order.attempt_timeout;
    let sent = pin!(sent(order, &way));
    let sending = match limit {
        None => sent.await,
        Some(limit) => tokio::time::timeout(limit, sent)
            .await
            .unwrap_or(Sending::TimedOut),
    };
    let (transport, fell_back) = way.get();
    Outcome {
        sending,
        transport,
        fell_back,
    }
}

async fn sent(order: Box<Order>, way: &Cell<(Option<Transport>, bool)>) -> Sending {
    let Order {
        service,
        endpoint,
        wants,
        request,
        passage,
        answers,
        ..
    } = *order;
    let passage = passage.as_deref();
    let mut lease = endpoint.lease(wants, passage).await;
    for _ in 0..FULL_TRIES {
        if !matches!(lease, Err(ConnectError::Full { .. })) || !service.state.close_one_idle() {
            break;
        }
        // Its task, which may be another worker's, ends at its next turn.
        tokio::time::sleep(FULL_PAUSE).await;
        lease = Box::pin(endpoint.lease(wants, passage)).await;
    }
    let lease = match lease {
        Ok(lease) => lease,
        Err(error) => return Sending::NoConnection(error),
    };
    way.set((Some(lease.transport()), lease.fell_back()));
    match lease.send(request).await {
        Ok(sent) => {
            let response = match answers {
                Some(answers) => answers.count(sent.response),
                None => sent.response,
            };
            Sending::Answer(response, sent.keep)
        }
        Err(SendError::Unsent(_)) => Sending::Unsent,
        Err(SendError::Refused(_)) => Sending::Refused,
        Err(SendError::NotLetIn(error)) => {
            tracing::debug!(endpoint = %endpoint.key.address, %error, "this proxy's certificate was refused");
            Sending::NotLetIn
        }
        Err(SendError::TooLarge(error)) => {
            tracing::debug!(endpoint = %endpoint.key.address, %error, "not sent");
            Sending::TooLarge
        }
        Err(SendError::Broken { error, reused }) => {
            tracing::debug!(endpoint = %endpoint.key.address, %error, "no answer");
            Sending::Broken {
                reused,
                lost: error.is_of_connection(),
            }
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

/// What the record has of an attempt, for a plugin.
pub(crate) fn attempt_cause(attempt: &Told) -> Option<Cause> {
    Cause::ALL
        .into_iter()
        .find(|cause| attempt.cause == Some(cause.as_str()))
}

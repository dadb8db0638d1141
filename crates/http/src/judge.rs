//! Judge: what an attempt came to, and what that says about the endpoint.

use crate::attempts::{Attempt, Call, Failed, Judged, Outcome, Sending};
use crate::body::RequestBody;
use crate::exchange::Exchange;
use crate::failure::{from_peer, is_gateways_own};
use crate::guard::{fails, grpc_status, tell};
use crate::headers::{REASON, has_other_coding};
use http::{HeaderMap, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use leeward_policy::Via;
use leeward_policy::model::{BalancePolicy, Cause};
use leeward_resilience::{Change, Ended, Event, FailureKind, Missed, Why, grpc_retry_pushback, retry_after};
use leeward_telemetry::Reason;
use leeward_upstream::{Chance, ConnectError, Connection, Fault, IncomingBody, Keep, Pass, Passage};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

impl Call<'_> {
    /// What sending an attempt came to: mostly an answer.
    pub(crate) fn judge(&mut self, exchange: &mut Exchange, attempt: Attempt, outcome: Outcome) -> Judged {
        exchange.unconnected = None;
        exchange.gateway_failed = false;
        if let Some(gateway) = attempt.passage.as_ref().and_then(|passage| passage.gateway()) {
            exchange.record.through(attempt.position, gateway);
        }
        if let Some(transport) = outcome.transport {
            exchange.record.went_by(attempt.position, transport.as_str());
        }
        if outcome.fell_back
            && let Some(seen) = self.view.endpoints.get(attempt.endpoint)
        {
            exchange.worker().recorder.fell_back(&seen.zone);
        }
        match outcome.sending {
            Sending::Answer(response, keep) => self.judge_answer(exchange, attempt, response, keep),
            Sending::NoConnection(ConnectError::Full { .. }) => {
                exchange.refused_by("maxConnections", Some(&self.view.name));
                self.failed(exchange, attempt, Cause::Overflow, Missed::Refused)
            }
            // Said of this proxy, so that nobody looks for it at the other end.
            Sending::NoConnection(error @ ConnectError::Identity { .. }) => {
                tracing::debug!(service = %self.view.name, %error, "no connection");
                exchange.unconnected = Some(Reason::IdentityNotReady);
                self.unblamed(exchange, attempt)
            }
            // Nor is there anything to be said of who is behind the gateways.
            Sending::NoConnection(error @ ConnectError::NoGateway { .. }) => {
                tracing::debug!(service = %self.view.name, %error, "no connection");
                exchange.unconnected = Some(Reason::GatewayUnavailable);
                exchange.gateway_failed = true;
                self.unblamed(exchange, attempt)
            }
            Sending::NoConnection(error) => {
                tracing::debug!(service = %self.view.name, %error, "no connection");
                self.failed(exchange, attempt, Cause::ConnectFailure, Missed::ConnectFailure)
            }
            Sending::Unsent => self.quietly(exchange, attempt, Missed::Unsent),
            Sending::Refused => self.refused(exchange, attempt),
            Sending::NotLetIn => self.not_let_in(exchange, attempt),
            // The endpoint has nothing to do with it, and no other takes it.
            Sending::TooLarge => self.failed(exchange, attempt, Cause::Overflow, Missed::Forbidden),
            // What broke is what the client sent.
            Sending::Broken { .. } if exchange.intake.failed() => {
                self.failed_as(exchange, attempt, (Cause::Reset, Missed::Reset, true), None)
            }
            // The peer closed an idle connection just as it was used again (RFC 9112 §9.3.1).
            Sending::Broken { reused: true, .. } if self.plan.idempotent => {
                let mut judged = self.quietly(exchange, attempt, Missed::Unsent);
                if let Judged::Failed(failed) = &mut judged {
                    failed.may_have_acted = true;
                }
                judged
            }
            Sending::Broken { lost, .. } => match attempt.passage.clone() {
                None => self.failed(exchange, attempt, Cause::Reset, Missed::Reset),
                // A gateway tells what became of a request behind it.
                Some(passage) => {
                    let fault = if lost { Fault::Lost } else { Fault::Failed };
                    passage.failed(fault, exchange.worker().now());
                    self.astray(exchange, attempt, (Cause::Reset, Missed::Reset, true), None)
                }
            },
            Sending::TimedOut if was_lost(exchange, attempt.passage.as_deref()) => {
                let how = (Cause::Timeout, Missed::AttemptTimeout, true);
                self.astray(exchange, attempt, how, None)
            }
            Sending::TimedOut => self.failed(exchange, attempt, Cause::Timeout, Missed::AttemptTimeout),
        }
    }

    fn judge_answer(
        &mut self,
        exchange: &mut Exchange,
        attempt: Attempt,
        response: Response<IncomingBody>,
        keep: Option<Keep<RequestBody>>,
    ) -> Judged {
        let seen = self.view.endpoints.get(attempt.endpoint);
        let from_proxy = seen.is_some_and(|seen| seen.key.via != Via::Direct);
        let reason = response.headers().get(REASON);
        if let Some(passage) = attempt.passage.clone() {
            let now = exchange.worker().now();
            // Where no other would do better, the endpoints behind it are out of reach, and their zone is to be left.
            if reason.is_some_and(|reason| is_gateways_own(reason.as_bytes())) && passage.has_other(now) {
                passage.failed(Fault::Failed, now);
                let status = Some(response.status().as_u16());
                give_back(exchange, response, keep);
                let how = (Cause::ConnectFailure, Missed::ConnectFailure, false);
                return self.astray(exchange, attempt, how, status);
            }
            passage.answered(now);
        }
        if from_proxy && let Some((cause, acted)) = reason.and_then(|reason| from_peer(reason.as_bytes())) {
            let missed = match cause {
                Cause::ConnectFailure => Missed::ConnectFailure,
                Cause::Timeout => Missed::AttemptTimeout,
                Cause::Reset => Missed::Reset,
                Cause::NoEndpoint
                | Cause::Overflow
                | Cause::UpstreamStatus
                | Cause::CircuitOpen
                | Cause::Overloaded
                | Cause::RateLimited
                | Cause::Disabled => Missed::Refused,
                Cause::AuthorizationDenied | Cause::IdentityMissing | Cause::AuthorizationUnknown => {
                    Missed::Forbidden
                }
            };
            let status = Some(response.status().as_u16());
            give_back(exchange, response, keep);
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
        response: Response<IncomingBody>,
    ) -> Judged {
        let now = exchange.worker().now();
        exchange.answered_at = Some(now);
        let status = response.status();
        let took = now.saturating_duration_since(attempt.started);
        exchange
            .record
            .end_attempt(attempt.position, now, Some(status.as_u16()), None);
        let grpc = if exchange.grpc {
            grpc_status(&response)
        } else {
            None
        };
        let failure = fails(status, grpc);
        exchange.answer_failed = failure;
        let asked = if failure {
            pause_asked_for(response.headers())
        } else {
            None
        };
        self.note(exchange, attempt.endpoint, event_of_answer(status, grpc), now);
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
                grpc_status: grpc,
            },
            response: Some(response),
            may_have_acted: true,
            retry_after: asked,
        })
    }

    /// No answer, and the endpoint is to blame for it.
    fn failed(&mut self, exchange: &mut Exchange, attempt: Attempt, cause: Cause, missed: Missed) -> Judged {
        let acted = match missed {
            Missed::ConnectFailure | Missed::Refused | Missed::Unsent | Missed::Forbidden => false,
            Missed::Reset | Missed::AttemptTimeout | Missed::Answer { .. } => true,
        };
        self.failed_as(exchange, attempt, (cause, missed, acted), None)
    }

    fn failed_as(
        &mut self,
        exchange: &mut Exchange,
        attempt: Attempt,
        how: (Cause, Missed, bool),
        status: Option<u16>,
    ) -> Judged {
        let (cause, now) = (how.0, exchange.worker().now());
        let (judged, pass) = self.lost(exchange, attempt.position, how, status);
        // A client that is slow to send its body, or breaks off, says nothing about the endpoint.
        let blamed =
            !exchange.intake.failed() && (cause != Cause::Timeout || !exchange.intake.waits_for_client());
        if let Some(event) = event_of(cause).filter(|_| blamed) {
            let attempted = (attempt.endpoint, attempt.started);
            self.blame(exchange, attempted, event, pass, now);
        }
        judged
    }

    /// The endpoint has as much to do as it takes on. Others may have less; it comes again only where there are
    /// none.
    fn refused(&mut self, exchange: &mut Exchange, attempt: Attempt) -> Judged {
        let (endpoint, now) = (attempt.endpoint, exchange.worker().now());
        if attempt.passage.is_some() {
            // That was the gateway.
            return self.quietly(exchange, attempt, Missed::Refused);
        }
        let others = self.has_other();
        let judged = self.quietly(exchange, attempt, Missed::Refused);
        if others {
            self.tried.push(endpoint);
        }
        self.weigh(endpoint, true, Duration::ZERO, None, now);
        judged
    }

    /// The proxy at the other end refused this one's certificate. Whoever was given a newer one is let in, as in the moment
    /// of a root's rotation; so the same endpoint is asked again where there is no other, and is not out of reach for it.
    fn not_let_in(&mut self, exchange: &mut Exchange, attempt: Attempt) -> Judged {
        let (endpoint, now) = (attempt.endpoint, exchange.worker().now());
        let how = (Cause::ConnectFailure, Missed::ConnectFailure, false);
        if let Some(passage) = attempt.passage.clone() {
            passage.failed(Fault::Failed, now);
            return self.astray(exchange, attempt, how, None);
        }
        self.connection = Connection::New;
        if !self.has_other() {
            self.tried.retain(|tried| *tried != endpoint);
        }
        let (judged, pass) = self.lost(exchange, attempt.position, how, None);
        let event = Event::Fail(FailureKind::Gateway);
        self.blame(exchange, (endpoint, attempt.started), event, pass, now);
        judged
    }

    /// No connection, for a reason of this proxy's own: nothing was sent, and the endpoint has nothing to do with it.
    fn unblamed(&mut self, exchange: &mut Exchange, attempt: Attempt) -> Judged {
        let how = (Cause::ConnectFailure, Missed::ConnectFailure, false);
        self.lost(exchange, attempt.position, how, None).0
    }

    /// A gateway has failed, and the request with it. The endpoint has nothing to do with it: it may be asked again, through
    /// another gateway.
    fn astray(
        &mut self,
        exchange: &mut Exchange,
        attempt: Attempt,
        how: (Cause, Missed, bool),
        status: Option<u16>,
    ) -> Judged {
        self.tried.retain(|tried| *tried != attempt.endpoint);
        exchange.gateway_failed = true;
        self.lost(exchange, attempt.position, how, status).0
    }

    /// A failure of the connection that says nothing about the endpoint, which may be tried again.
    fn quietly(&mut self, exchange: &mut Exchange, attempt: Attempt, missed: Missed) -> Judged {
        self.tried.retain(|tried| *tried != attempt.endpoint);
        self.connection = Connection::New;
        let how = (Cause::Reset, missed, false);
        self.lost(exchange, attempt.position, how, None).0
    }

    /// An attempt has come to nothing: it is written down, and no longer under way. Returns the pass of its endpoint's
    /// circuit, for who holds it against the endpoint; dropped, it learns nothing.
    fn lost(
        &mut self,
        exchange: &mut Exchange,
        position: usize,
        (cause, missed, may_have_acted): (Cause, Missed, bool),
        status: Option<u16>,
    ) -> (Judged, Option<Pass>) {
        let now = exchange.worker().now();
        exchange
            .record
            .end_attempt(position, now, status, Some(cause.as_str()));
        let judged = Judged::Failed(Failed {
            cause,
            response: None,
            missed,
            may_have_acted,
            retry_after: None,
        });
        (judged, self.land(position))
    }

    /// An attempt is no longer under way.
    fn land(&mut self, position: usize) -> Option<Pass> {
        let at = self
            .flying
            .iter()
            .position(|flying| flying.position == position)?;
        self.flying.swap_remove(at).pass
    }

    /// Attempts whose answer nobody waits for any more: another came first. How long they were waited for is all
    /// that is known of their endpoints, and enough to send the next requests elsewhere.
    pub(crate) fn abandon(&mut self, exchange: &mut Exchange) {
        let now = exchange.worker().now();
        for flying in self.flying.drain(..) {
            exchange.record.end_attempt(flying.position, now, None, None);
            if let (BalancePolicy::PeakEwma(settings), Some(endpoint)) = (
                &self.view.spec.balance.policy,
                self.service.endpoints.get(flying.endpoint),
            ) {
                let took = now.saturating_duration_since(flying.started);
                endpoint.state.outlasted(took, now, settings);
            }
        }
    }

    /// The time was up in the middle of an attempt.
    pub(crate) fn timed_out(&mut self, exchange: &mut Exchange) {
        let now = exchange.worker().now();
        let under_way = std::mem::take(&mut self.flying);
        let (all, mut lost) = (under_way.len(), 0);
        for flying in under_way {
            let cause = Some(Cause::Timeout.as_str());
            exchange.record.end_attempt(flying.position, now, None, cause);
            // A client that is slow to send its body says nothing about the endpoint.
            if !exchange.intake.waits_for_client() {
                if was_lost(exchange, flying.passage.as_deref()) {
                    lost += 1;
                    continue;
                }
                let attempted = (flying.endpoint, flying.started);
                let event = Event::Fail(FailureKind::Gateway);
                self.blame(exchange, attempted, event, flying.pass, now);
            }
        }
        // With none under way it is as the last one left it.
        if all > 0 {
            exchange.gateway_failed = lost == all;
        }
        let why = Why::DeadlinePassed.as_str();
        exchange.record.gave_up = Some(why);
        exchange.worker().recorder.not_tried_again(&self.view.name, why);
    }

    /// An attempt at an endpoint, which began at a time, is held against it.
    fn blame(
        &self,
        exchange: &Exchange,
        (endpoint, began): (usize, Instant),
        event: Event,
        pass: Option<Pass>,
        now: Instant,
    ) {
        let took = now.saturating_duration_since(began);
        self.note(exchange, endpoint, event, now);
        self.weigh(endpoint, true, took, None, now);
        self.settle(exchange, pass, true, now);
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

/// Whether no answer came in time since a gateway is gone, which is then held against it. Over TCP, where a gateway that
/// gives no answer at all can't be told from endpoints that give none, both are.
fn was_lost(exchange: &Exchange, passage: Option<&Passage>) -> bool {
    let Some(passage) = passage.filter(|passage| passage.was_silent()) else {
        return false;
    };
    if exchange.intake.waits_for_client() {
        return false;
    }
    passage.failed(Fault::Failed, exchange.worker().now());
    passage.is_by_link()
}

/// Another proxy's refusal is short: once it is read, its connection serves the next request.
fn give_back(exchange: &Exchange, response: Response<IncomingBody>, keep: Option<Keep<RequestBody>>) {
    /// Longer than any refusal.
    const SHORT: usize = 4096;
    if !exchange.intake.ended() {
        return;
    }
    let Some(keep) = keep else { return };
    // Its owner is the worker; it ends with the connection at the latest.
    tokio::task::spawn_local(async move {
        if Limited::new(response.into_body(), SHORT).collect().await.is_ok() {
            keep.give_back(tokio::time::Instant::now().into_std());
        }
    });
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

/// How long an answer asks to be left alone.
pub(crate) fn pause_asked_for(headers: &HeaderMap) -> Option<Duration> {
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
fn event_of_answer(status: StatusCode, grpc: Option<u8>) -> Event {
    match (status.as_u16(), grpc) {
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
        | Cause::RateLimited
        | Cause::Disabled
        | Cause::AuthorizationDenied
        | Cause::IdentityMissing
        | Cause::AuthorizationUnknown => None,
    }
}

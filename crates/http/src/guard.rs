//! Guard: what a rule and a service let through, before anything is sent.

use crate::admit::Received;
use crate::attempts::Service;
use crate::exchange::Exchange;
use crate::headers::{CHECK, retry_seconds};
use crate::rates::Who;
use crate::route::Plan;
use http::{HeaderName, Response, StatusCode};
use leeward_policy::model::{BreakerMode, Cause};
use leeward_policy::{RuleView, ServiceView, zone_of};
use leeward_resilience::{Ended, Sample, Transition, hash_of};
use leeward_upstream::{Ask, Blocked, Chance, Circuit, IncomingBody, Pass, Refusal};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

/// A call that passed. Dropped before it is settled, it says nothing of the circuits.
pub(crate) struct Passage {
    rule: Option<Pass>,
    service: Option<Pass>,
    /// Whether it is counted for triggers: the caller's proxy counts what comes in from it.
    counts: bool,
    since: Instant,
}

/// Asks rule and service for a call to pass: rate limits, the rule's circuit, the service's, what spares it from
/// overload, and its bulkhead, in which it may wait.
pub(crate) async fn pass(
    exchange: &mut Exchange,
    plan: &Plan,
    request: &Received,
    (service, view): (&Service, &ServiceView),
    now: Instant,
) -> Result<Passage, Cause> {
    let worker = Rc::clone(exchange.worker());
    let snapshot = Arc::clone(&exchange.snapshot);
    let rule = plan.rule.and_then(|idx| Some((idx, snapshot.rule(idx)?)));
    let mut passage = Passage {
        rule: None,
        service: None,
        counts: plan.only.is_none(),
        since: now,
    };
    if let Some((idx, rule)) = rule {
        limit_rate(exchange, rule, request, now)?;
        if rule.circuit_breaker.is_some() || rule.held.is_some() {
            let table = worker.upstreams.table(&snapshot);
            if let Some(at_work) = worker.upstreams.rule(&table, idx, now) {
                let circuit = at_work.circuit.as_ref();
                passage.rule = through(
                    exchange,
                    circuit,
                    at_work.forced(now),
                    now,
                    "route.circuitBreaker",
                )?;
            }
        }
    }
    if plan.again {
        // It is the same call once more, elsewhere: the circuit may be open for what it met before, but what all such
        // attempts add to the load stays within the budget.
        spend(exchange, (service, view), now)?;
    } else if plan.only.is_none() {
        // The caller's proxy has asked its circuit for what comes in from it.
        let circuit = service.guards.circuit.as_ref();
        passage.service = through(exchange, circuit, service.forced(now), now, "circuitBreaker")?;
    }
    let ask = Ask {
        pool: &view.spec.pool,
        priority: plan.priority,
        // The caller's proxy has bounded it; here all of its node's would count as one.
        caller: plan
            .only
            .is_none()
            .then(|| caller(exchange, request, view))
            .flatten(),
        until: plan.attempts_until,
        pressure: worker.pressure.utilisation(),
    };
    // Spare capacity is told to callers of other zones, and a health check takes none.
    if let (Some(_), Some(proxy)) = (plan.only, exchange.record.peer.identity.as_deref())
        && zone_of(proxy).is_some_and(|zone| *zone != *worker.zone)
        && !request.parts.headers.contains_key(CHECK)
    {
        service.state.called_by(hash_of(proxy.as_bytes()));
    }
    match service.state.enter(&service.guards, &ask, now, &mut Chance).await {
        Ok(entered) => {
            exchange.permit = Some(entered.permit);
            if entered.waited {
                passage.begin_at(worker.now());
            }
        }
        Err(refusal) => return Err(refuse(exchange, view, refusal)),
    }
    if !plan.again {
        service.guards.retry.note_request(passage.since);
    }
    if plan.retry.hedge.is_some() {
        service.guards.hedge.note_request(passage.since);
    }
    Ok(passage)
}

/// Takes leave for one more attempt, as a retry does.
fn spend(
    exchange: &mut Exchange,
    (service, view): (&Service, &ServiceView),
    now: Instant,
) -> Result<(), Cause> {
    let Some(permit) = service.state.retry(view.spec.pool.max_retries) else {
        exchange.refused_by("maxRetries", Some(&view.name));
        return Err(Cause::Overflow);
    };
    if !service.guards.retry.try_spend(now, &view.resilience.retry_budget) {
        exchange.refused_by("retryBudget", Some(&view.name));
        return Err(Cause::Overflow);
    }
    exchange.extra = Some(permit);
    Ok(())
}

fn limit_rate(
    exchange: &mut Exchange,
    rule: &RuleView,
    request: &Received,
    now: Instant,
) -> Result<(), Cause> {
    if rule.rate_limits.is_empty() {
        return Ok(());
    }
    let worker = Rc::clone(exchange.worker());
    let address = Octets::of(exchange.record.peer.address.ip());
    let who = Caller {
        identity: exchange.record.peer.identity.as_deref(),
        address: &address,
        request,
    };
    worker.rates.admit(rule, &who, now).map_err(|wait| {
        exchange.retry_after = Some(retry_seconds(wait));
        exchange.refused_by("rateLimits", exchange.record.service.clone().as_ref());
        Cause::RateLimited
    })
}

/// Asks one circuit, or whoever holds it.
fn through(
    exchange: &mut Exchange,
    circuit: Option<&Arc<Circuit>>,
    forced: Option<BreakerMode>,
    now: Instant,
    name: &'static str,
) -> Result<Option<Pass>, Cause> {
    let blocked = match (circuit, forced) {
        (Some(circuit), forced) => {
            match circuit.ask(forced, now, &mut Chance, &mut |circuit, change| {
                tell(exchange, circuit, change);
            }) {
                Ok(pass) => {
                    if pass.would_be_refused()
                        && let Some(service) = exchange.record.service.clone()
                    {
                        exchange.worker().recorder.would_be_refused(&service);
                    }
                    return Ok(Some(pass));
                }
                Err(blocked) => blocked,
            }
        }
        // It has no breaker, but somebody holds it open all the same.
        (None, Some(BreakerMode::ForceOpen)) => Blocked { retry_after: None },
        (None, Some(BreakerMode::Enforce | BreakerMode::Observe | BreakerMode::ForceClosed) | None) => {
            return Ok(None);
        }
    };
    exchange.retry_after = blocked.retry_after.map(retry_seconds);
    exchange.refused_by(name, exchange.record.service.clone().as_ref());
    Err(Cause::CircuitOpen)
}

fn refuse(exchange: &mut Exchange, view: &ServiceView, refusal: Refusal) -> Cause {
    exchange.refused_by(refusal.limit(), Some(&view.name));
    match refusal {
        Refusal::Overflow(_) => Cause::Overflow,
        Refusal::Overloaded(_) => Cause::Overloaded,
    }
}

/// Writes down that a circuit changed.
pub(crate) fn tell(exchange: &Exchange, circuit: &Circuit, change: Transition) {
    let (kind, name) = circuit.names();
    let (kind, to, why) = (kind.as_str(), change.to.as_str(), change.why.as_str());
    exchange.worker().recorder.circuit_changed(kind, name, to, why);
    tracing::warn!(kind, %name, to, why, evidence = ?change.why, "circuit changed");
}

impl Passage {
    /// The call begins only now: it had to wait here.
    fn begin_at(&mut self, now: Instant) {
        self.since = now;
        for pass in [&mut self.rule, &mut self.service].into_iter().flatten() {
            pass.begin_at(now);
        }
    }

    /// Says how the call ended, to the circuits and to what watches the service's load.
    pub(crate) fn settle(
        self,
        exchange: &Exchange,
        service: &Service,
        called: &Result<Response<IncomingBody>, Cause>,
        attempts: usize,
    ) {
        // The head's arrival is the end of a call that is answered.
        let now = match called {
            Ok(_) => exchange.answered_at.unwrap_or_else(|| exchange.worker().now()),
            Err(_) => exchange.worker().now(),
        };
        let ended = match called {
            Ok(_) if exchange.answer_failed => Ended::Fail,
            Ok(_) => Ended::Succeed,
            // A client that breaks off, or is slow to send, says nothing about the service.
            Err(_) if exchange.intake.failed() => Ended::Abandon,
            Err(Cause::Timeout) if exchange.intake.waits_for_client() => Ended::Abandon,
            // A zone's gateways are many services'.
            Err(_) if exchange.gateway_failed => Ended::Abandon,
            Err(Cause::ConnectFailure | Cause::Timeout | Cause::Reset) if attempts > 0 => Ended::Fail,
            Err(
                Cause::ConnectFailure
                | Cause::Timeout
                | Cause::Reset
                | Cause::NoEndpoint
                | Cause::Overflow
                | Cause::UpstreamStatus
                | Cause::CircuitOpen
                | Cause::Overloaded
                | Cause::RateLimited
                | Cause::Disabled
                | Cause::AuthorizationDenied
                | Cause::IdentityMissing
                | Cause::AuthorizationUnknown,
            ) => Ended::Abandon,
        };
        for pass in [self.rule, self.service].into_iter().flatten() {
            pass.settle(ended, now, &mut Chance, &mut |circuit, change| {
                tell(exchange, circuit, change);
            });
        }
        // To whoever calls, a service without endpoints fails, though there is none whose circuit could tell.
        let unanswered = matches!(called, Err(Cause::NoEndpoint)) && !exchange.intake.failed();
        if self.counts && unanswered {
            service.state.ended(true, None);
        }
        if ended != Ended::Abandon {
            // A fast failure would pass for a service with nothing to do.
            let worked = ended == Ended::Succeed || matches!(called, Err(Cause::Timeout));
            if self.counts {
                let answered = called.is_ok() || worked;
                let took = answered.then(|| now.saturating_duration_since(self.since));
                service.state.ended(ended == Ended::Fail, took);
            }
            let sample = worked.then(|| Sample {
                took: now.saturating_duration_since(self.since),
                under_way: service.state.active(),
            });
            service
                .guards
                .ended(ended == Ended::Succeed, sample, now, &mut Chance);
        }
    }
}

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Whether an answer is a failure of the service, or says that it has too much to do. In gRPC that is said in
/// the status, where the head has it; what the caller did wrong, or may not do, is no failure.
pub(crate) fn is_failure(response: &Response<IncomingBody>) -> bool {
    fails(response.status(), grpc_status(response))
}

/// The same, of statuses.
pub(crate) fn fails(status: StatusCode, grpc: Option<u8>) -> bool {
    let status = status.as_u16();
    status >= 500 || status == 429 || matches!(grpc, Some(2 | 4 | 8 | 13 | 14 | 15))
}

/// The gRPC status of an answer that is nothing but trailers.
pub(crate) fn grpc_status(response: &Response<IncomingBody>) -> Option<u8> {
    let status = response.headers().get(GRPC_STATUS)?;
    status.to_str().ok()?.parse().ok()
}

/// A hash of who calls, where policy bounds callers.
fn caller(exchange: &Exchange, request: &Received, view: &ServiceView) -> Option<u64> {
    let bounds = view.spec.pool.per_caller.as_ref()?;
    let mut hasher = DefaultHasher::new();
    let address = Octets::of(exchange.record.peer.address.ip());
    let who = Caller {
        identity: exchange.record.peer.identity.as_deref(),
        address: &address,
        request,
    };
    let named = bounds.header.as_deref().and_then(|name| who.header(name));
    named.unwrap_or_else(|| who.caller()).hash(&mut hasher);
    Some(hasher.finish())
}

/// An address as bytes.
pub(crate) struct Octets([u8; 16]);

impl Octets {
    pub(crate) const fn of(address: IpAddr) -> Self {
        Self(match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        })
    }

    pub(crate) const fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

struct Caller<'a> {
    identity: Option<&'a str>,
    address: &'a Octets,
    request: &'a Received,
}

impl Who for Caller<'_> {
    fn caller(&self) -> &[u8] {
        match self.identity {
            Some(identity) => identity.as_bytes(),
            None => self.address.as_bytes(),
        }
    }

    fn header(&self, name: &str) -> Option<&[u8]> {
        let value = self.request.parts.headers.get(name)?;
        Some(value.as_bytes())
    }
}

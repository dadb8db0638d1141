//! Cached: answers that are kept for a rule, and requests for the same thing that wait for one another.

use crate::admit::Received;
use crate::attempts::Called;
use crate::errand::{Errand, carry_out};
use crate::exchange::Exchange;
use crate::respond::Outcome;
use crate::route::{Choice, Plan};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use leeward_cache::{Asked, Fill, Head, Joined, Kept, Look, RuleCache};
use leeward_policy::model::Cause;
use leeward_telemetry::Outcome as Told;
use leeward_wasm::{KeptAnswer, Reply};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// What the cache has for a request.
pub(crate) enum Cached {
    /// An answer.
    Answer(Outcome),
    /// Nothing: the service is to be asked. Its answer may be kept by way of the fill.
    Ask(Option<Fill>),
}

/// What the service's answer means to the cache.
pub(crate) enum Filled {
    /// It is the client's, as it is; it may be kept as its body passes.
    Called(Called),
    /// What is kept is still right, and is the answer.
    Answer(Outcome),
    /// It confirms something that is not what is kept: ask again, without conditions.
    Again,
}

/// Looks for an answer; waits where another request is about to bring one.
///
/// # Errors
///
/// [`Cause::Timeout`]: the time for attempts went by in waiting.
pub(crate) async fn look(
    exchange: &mut Exchange,
    plan: &Plan,
    request: &mut Received,
) -> Result<Cached, Cause> {
    let Some(cache) = cache_of(exchange, plan) else {
        return Ok(Cached::Ask(None));
    };
    if request.upgrade.is_some() || !exchange.intake.is_empty() {
        return Ok(Cached::Ask(None));
    }
    let now = wall();
    let authority = scope(exchange, plan, request);
    let about = asked(request, &authority);
    let found = match cache.look(&about, now) {
        Look::Bypass => return Ok(Cached::Ask(None)),
        Look::Fresh(kept) => Some((kept, "hit")),
        Look::Revalidate { kept, refresh } => {
            if let Some(fill) = refresh {
                freshen(exchange, plan, request, fill);
            }
            Some((kept, "stale_while_revalidate"))
        }
        Look::Validate { .. } | Look::Miss => None,
    };
    if let Some((kept, how)) = found {
        return Ok(Cached::Answer(hit(exchange, kept, how, Some(&about))));
    }
    if about.only_if_cached() {
        return Ok(Cached::Answer(not_there()));
    }
    let mut waiter = match cache.join(&about, now) {
        Joined::Fresh(kept) => {
            return Ok(Cached::Answer(hit(exchange, kept, "hit", Some(&about))));
        }
        Joined::Lead(fill) => {
            let conditions = fill.conditions();
            exchange.record.cache = Some(if conditions.is_empty() { "miss" } else { "validate" });
            request.parts.headers.extend(conditions);
            return Ok(Cached::Ask(Some(fill)));
        }
        Joined::Wait(waiter) => waiter,
    };
    match plan.attempts_until {
        None => waiter.head().await,
        Some(until) => match tokio::time::timeout_at(until.into(), waiter.head()).await {
            Ok(()) => {}
            Err(_) => return Err(Cause::Timeout),
        },
    }
    // The rest comes as fast as another client reads it, for which nobody else is to wait long.
    match tokio::time::timeout(PATIENCE, waiter.wait()).await {
        Ok(Some(kept)) => Ok(Cached::Answer(hit(exchange, kept, "coalesced", Some(&about)))),
        Ok(None) => Ok(Cached::Ask(None)),
        Err(_) => {
            waiter.leave();
            Ok(Cached::Ask(None))
        }
    }
}

/// How long a body is waited for that another request brings, from its head on.
const PATIENCE: Duration = Duration::from_secs(1);

/// Looks at the service's answer.
pub(crate) fn filled(
    exchange: &mut Exchange,
    plan: &Plan,
    request: &Received,
    fill: Option<Fill>,
    called: Called,
) -> Filled {
    let Ok(response) = called else {
        return Filled::Called(called);
    };
    let Some(mut fill) = fill else {
        if let Some(cache) = cache_of(exchange, plan) {
            let authority = scope(exchange, plan, request);
            cache.invalidate(&asked(request, &authority), response.status());
        }
        return Filled::Called(Ok(response));
    };
    match fill.head(response.status(), response.headers(), wall()) {
        Head::Pass => Filled::Called(Ok(response)),
        Head::Keep => {
            exchange.fill = Some(fill);
            Filled::Called(Ok(response))
        }
        Head::Freshened(kept) => {
            free_connection(exchange);
            // The conditions were the cache's own; the client has none, and wants it all.
            Filled::Answer(hit(exchange, kept, "validated", None))
        }
        Head::Again => {
            free_connection(exchange);
            Filled::Again
        }
    }
}

/// Takes the cache's conditions out again.
pub(crate) fn without_conditions(headers: &mut HeaderMap) {
    for name in [header::IF_NONE_MATCH, header::IF_MODIFIED_SINCE] {
        headers.remove(name);
    }
}

/// An answer that is no longer fresh, in place of a failure.
pub(crate) fn stale(
    exchange: &mut Exchange,
    plan: &Plan,
    request: &Received,
    max_stale: Option<Duration>,
) -> Option<Outcome> {
    let cache = cache_of(exchange, plan)?;
    let authority = scope(exchange, plan, request);
    let kept = cache.stale(&asked(request, &authority), max_stale, wall())?;
    exchange.record.cache = Some("stale_if_error");
    Some(Outcome::Local(response(kept), Told::Degraded))
}

/// The answer that the cache has in place of a failure, for a plugin to look at.
pub(crate) fn last_good(exchange: &Exchange, plan: &Plan, request: &Received) -> Option<KeptAnswer> {
    let cache = cache_of(exchange, plan)?;
    let authority = scope(exchange, plan, request);
    let kept = cache.stale(&asked(request, &authority), None, wall())?;
    let seconds = |name| {
        kept.headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok()?.parse().ok())
    };
    let age = seconds(header::AGE).map_or(Duration::ZERO, Duration::from_secs);
    let fresh = kept
        .headers
        .get(header::CACHE_CONTROL)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| {
            value
                .split(',')
                .find_map(|part| part.trim().strip_prefix("max-age="))
        })
        .and_then(|seconds| seconds.parse().ok())
        .map_or(Duration::ZERO, Duration::from_secs);
    Some(KeptAnswer {
        reply: Reply {
            status: kept.status,
            headers: kept.headers,
            body: kept.body,
            grpc_status: None,
        },
        age,
        fresh,
    })
}

/// The cache of the rule that a request is by, if policy gives it one.
fn cache_of(exchange: &Exchange, plan: &Plan) -> Option<Arc<RuleCache>> {
    let rule = exchange.snapshot.rule(plan.rule?)?;
    let settings = rule.cache.as_ref()?;
    Some(exchange.worker().caches.rule(&rule.cache_id, settings))
}

/// The authority that answers are kept under. Where it hangs on a flag or a router which backend a request goes to,
/// what one backend says is not for those that go to another.
fn scope(exchange: &Exchange, plan: &Plan, request: &Received) -> String {
    let mut scope = request.authority().to_ascii_lowercase();
    let snapshot = &exchange.snapshot;
    let rule = plan.rule.and_then(|idx| snapshot.rule(idx));
    if rule.is_some_and(|rule| rule.has_conditional_backends() || rule.router.is_some())
        && let Some(view) = snapshot.service(plan.service)
    {
        // Neither can be in an authority.
        scope.push('/');
        scope.push_str(&view.name);
        scope.push('/');
        scope.push_str(&view.subset_id(plan.subset));
    }
    scope
}

/// What names the cache of a rule: another rule in its place has another one.
pub(crate) fn cache_id(exchange: &Exchange, plan: &Plan) -> Option<Arc<str>> {
    let rule = exchange.snapshot.rule(plan.rule?)?;
    rule.cache.as_ref().map(|_| Arc::clone(&rule.cache_id))
}

fn asked<'a>(request: &'a Received, authority: &'a str) -> Asked<'a> {
    Asked {
        method: &request.parts.method,
        authority,
        uri: &request.parts.uri,
        headers: &request.parts.headers,
    }
}

/// An answer from the cache that is as good as one of the service's; 304 where the client's own conditions say so.
fn hit(exchange: &mut Exchange, kept: Kept, how: &'static str, about: Option<&Asked<'_>>) -> Outcome {
    exchange.record.cache = Some(how);
    let unchanged = about.is_some_and(|about| kept.not_modified(about));
    let kept = if unchanged { kept.into_not_modified() } else { kept };
    Outcome::Local(response(kept), Told::Served)
}

/// As a response; Cache-Status is RFC 9211's.
fn response(kept: Kept) -> Response<Bytes> {
    let mut response = Response::new(kept.body);
    *response.status_mut() = kept.status;
    *response.headers_mut() = kept.headers;
    let hit = HeaderValue::from_static("leeward; hit");
    response.headers_mut().append("cache-status", hit);
    response
}

/// For a client that wants nothing but what is kept (RFC 9111 §5.2.1.7).
fn not_there() -> Outcome {
    let mut response = Response::new(Bytes::from_static(b"nothing fresh is kept\n"));
    *response.status_mut() = StatusCode::GATEWAY_TIMEOUT;
    Outcome::Local(response, Told::Served)
}

/// Nothing comes after the head of a 304, so its connection is free again.
fn free_connection(exchange: &mut Exchange) {
    if let Some(keep) = exchange.keep.take() {
        keep.give_back(exchange.worker().now());
    }
    exchange.let_go();
}

/// Fetches a fresh answer while the client has the old one.
fn freshen(exchange: &Exchange, plan: &Plan, request: &Received, fill: Fill) {
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.uri = request.parts.uri.clone();
    parts.version = request.parts.version;
    parts.headers = request.parts.headers.clone();
    without_conditions(&mut parts.headers);
    parts.headers.extend(fill.conditions());
    let errand = Errand {
        parts,
        body: Vec::new(),
        peer: exchange.record.peer.clone(),
        from_outside: exchange.from_outside,
        fill: cache_id(exchange, plan).map(|id| (id, fill)),
        choice: Choice::of(exchange, plan),
    };
    let worker = Rc::clone(exchange.worker());
    // Its owner is the worker, which counts it and ends with its runtime.
    tokio::task::spawn_local(async move {
        let returned = carry_out(worker, errand).await;
        tracing::debug!(?returned, "freshened an answer");
    });
}

#[expect(
    clippy::disallowed_methods,
    reason = "freshness is by the wall clock, as HTTP has it, and targeting may ask for the time of day"
)]
pub(crate) fn wall() -> SystemTime {
    SystemTime::now()
}

//! Cached: answers that are kept for a rule, and requests for the same thing that wait for one another.

use crate::admit::Received;
use crate::attempts::Called;
use crate::errand::{Errand, carry_out};
use crate::exchange::Exchange;
use crate::respond::Outcome;
use crate::route::Plan;
use http::{HeaderValue, Method, Response, StatusCode, header};
use leeward_cache::{Asked, Fill, Head, Joined, Kept, Look, RuleCache};
use leeward_policy::model::Cause;
use leeward_telemetry::Outcome as Told;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// What the cache has for a request.
pub(crate) enum Cached {
    /// An answer.
    Answer(Outcome),
    /// Nothing: the service is to be asked. Its answer may be kept by way of the fill.
    Ask(Option<Box<Fill>>),
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
    let authority = request.authority().to_ascii_lowercase();
    let looked = cache.look(&asked(request, &authority), now);
    let conditions = match looked {
        Look::Bypass => return Ok(Cached::Ask(None)),
        Look::Fresh(kept) => return Ok(Cached::Answer(hit(exchange, kept, request, "hit"))),
        Look::Revalidate { kept, refresh } => {
            if let Some(fill) = refresh {
                freshen(exchange, request, &kept, fill);
            }
            return Ok(Cached::Answer(hit(
                exchange,
                kept,
                request,
                "stale_while_revalidate",
            )));
        }
        Look::Validate { conditions, .. } => Some(conditions),
        Look::Miss => None,
    };
    // What comes for a HEAD is not what a GET wants.
    if request.parts.method != Method::GET {
        return Ok(Cached::Ask(None));
    }
    match cache.join(&asked(request, &authority), now) {
        Joined::Wait(waiter) => {
            let waited = match plan.attempts_until {
                None => waiter.wait().await,
                Some(until) => match tokio::time::timeout_at(until.into(), waiter.wait()).await {
                    Ok(waited) => waited,
                    Err(_) => return Err(Cause::Timeout),
                },
            };
            Ok(match waited {
                Some(kept) => Cached::Answer(hit(exchange, kept, request, "coalesced")),
                None => Cached::Ask(None),
            })
        }
        Joined::Lead(fill) => {
            for (name, value) in conditions.iter().flatten() {
                request.parts.headers.insert(name, value.clone());
            }
            exchange.record.cache = Some(if conditions.is_some() { "validate" } else { "miss" });
            Ok(Cached::Ask(Some(Box::new(fill))))
        }
    }
}

/// Looks at the service's answer: keeps it as its body passes, where it may be kept.
pub(crate) fn filled(
    exchange: &mut Exchange,
    plan: &Plan,
    request: &Received,
    fill: Option<Box<Fill>>,
    called: Called,
) -> Result<Called, Outcome> {
    let Ok(response) = called else { return Ok(called) };
    if is_unsafe(&request.parts.method)
        && !response.status().is_client_error()
        && !response.status().is_server_error()
    {
        if let Some(cache) = cache_of(exchange, plan) {
            let authority = request.authority().to_ascii_lowercase();
            cache.invalidate(&asked(request, &authority));
        }
        return Ok(Ok(response));
    }
    let Some(mut fill) = fill else {
        return Ok(Ok(response));
    };
    match fill.head(response.status(), response.headers(), wall()) {
        Head::Pass => Ok(Ok(response)),
        Head::Keep => {
            exchange.fill = Some(fill);
            Ok(Ok(response))
        }
        Head::Freshened(kept) => {
            // Nothing comes after the head of a 304, so the connection is free again.
            if let Some(keep) = exchange.keep.take() {
                keep.give_back(exchange.worker().now());
            }
            exchange.let_go();
            Err(hit(exchange, kept, request, "validated"))
        }
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
    let authority = request.authority().to_ascii_lowercase();
    let kept = cache.stale(&asked(request, &authority), max_stale, wall())?;
    exchange.record.cache = Some("stale_if_error");
    Some(Outcome::Local(response(kept), Told::Degraded))
}

/// The cache of the rule that a request is by, if policy gives it one.
fn cache_of(exchange: &Exchange, plan: &Plan) -> Option<Arc<RuleCache>> {
    let rule = exchange.snapshot.rule(plan.rule?)?;
    let settings = rule.cache.as_ref()?;
    Some(exchange.worker().caches.rule(&rule.id, settings))
}

fn asked<'a>(request: &'a Received, authority: &'a str) -> Asked<'a> {
    Asked {
        method: &request.parts.method,
        authority,
        uri: &request.parts.uri,
        headers: &request.parts.headers,
    }
}

/// An answer from the cache that is as good as one of the service's.
fn hit(exchange: &mut Exchange, kept: Kept, request: &Received, how: &'static str) -> Outcome {
    exchange.record.cache = Some(how);
    let authority = request.authority().to_ascii_lowercase();
    let unchanged = kept.not_modified(&asked(request, &authority));
    let mut response = response(kept);
    if unchanged {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        *response.body_mut() = bytes::Bytes::new();
        for name in [
            header::CONTENT_LENGTH,
            header::CONTENT_TYPE,
            header::CONTENT_ENCODING,
        ] {
            response.headers_mut().remove(name);
        }
    }
    Outcome::Local(response, Told::Served)
}

/// As a response; Cache-Status is RFC 9211's.
fn response(kept: Kept) -> Response<bytes::Bytes> {
    let mut response = Response::new(kept.body);
    *response.status_mut() = kept.status;
    *response.headers_mut() = kept.headers;
    let hit = HeaderValue::from_static("leeward; hit");
    response.headers_mut().append("cache-status", hit);
    response
}

/// Fetches a fresh answer while the client has the old one.
fn freshen(exchange: &Exchange, request: &Received, kept: &Kept, fill: Fill) {
    let (mut parts, ()) = http::Request::new(()).into_parts();
    parts.method = request.parts.method.clone();
    parts.uri = request.parts.uri.clone();
    parts.version = request.parts.version;
    parts.headers = request.parts.headers.clone();
    for (name, value) in fill.conditions(kept).iter() {
        parts.headers.insert(name, value.clone());
    }
    let errand = Errand {
        parts,
        body: Vec::new(),
        peer: exchange.record.peer.clone(),
        fill: Some(Box::new(fill)),
    };
    let worker = Rc::clone(exchange.worker());
    // Its owner is the worker, which counts it and ends with its runtime.
    tokio::task::spawn_local(async move {
        let returned = carry_out(worker, errand).await;
        tracing::debug!(?returned, "freshened an answer");
    });
}

/// Whether the method can change something (RFC 9110 §9.2.1).
fn is_unsafe(method: &Method) -> bool {
    !matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE
    )
}

#[expect(
    clippy::disallowed_methods,
    reason = "freshness is by the wall clock, as HTTP has it"
)]
fn wall() -> SystemTime {
    SystemTime::now()
}

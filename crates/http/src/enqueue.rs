//! Enqueue: a request that is taken in now and sent when its service is back, and what became of it.

use crate::admit::Received;
use crate::body::Supply;
use crate::connection::Client;
use crate::exchange::Exchange;
use crate::fallback::{Climb, Tried};
use crate::filtered::response;
use crate::headers::{GRPC_TIMEOUT, IDEMPOTENCY_KEY, is_ours};
use crate::respond::{Outcome, Own};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use leeward_policy::QueueIdx;
use leeward_queue::{Accepted, EntryId, EntryState, EntryStatus, Queues, Refused, StoredRequest, Which};
use leeward_telemetry::Outcome as Told;
use leeward_wasm::Reply;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::sync::Arc;
use tokio::sync::oneshot;

/// Where it is told what became of a request; the entry's id follows.
pub(crate) const STATUS_PATH: &str = "/.well-known/leeward/queue/";

const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Gives a request that may come to be queued its key before it is first sent: what the service does at the first
/// attempt and what it gets later are then known to be the same.
pub(crate) fn give_key(request: &mut Received) {
    if request.parts.method.is_safe() {
        return;
    }
    let headers = &mut request.parts.headers;
    if !headers.contains_key(IDEMPOTENCY_KEY)
        && let Ok(key) = HeaderValue::try_from(random_key())
    {
        headers.insert(IDEMPOTENCY_KEY, key);
        request.own_key = true;
    }
}

/// Takes a request in, durably.
pub(crate) async fn enqueue(
    exchange: &mut Exchange,
    climb: &Climb<'_>,
    queue: QueueIdx,
    request: &Received,
) -> Tried {
    enqueue_with(exchange, climb, queue, request, None).await
}

/// The same; the client is told so in a plugin's words.
pub(crate) async fn enqueue_with(
    exchange: &mut Exchange,
    climb: &Climb<'_>,
    queue: QueueIdx,
    request: &Received,
    receipt: Option<Reply>,
) -> Tried {
    let snapshot = Arc::clone(&exchange.snapshot);
    let Some(view) = snapshot.queue(queue) else {
        return Tried::Declined;
    };
    // A 202 is no answer to a gRPC call or a change of protocols.
    if exchange.grpc || request.upgrade.is_some() {
        return Tried::Declined;
    }
    let limit = view.spec.max_entry_bytes;
    let Some(body) = whole_body(exchange, limit).await else {
        if exchange.intake.bytes() > limit {
            exchange.refused_by("maxEntryBytes", exchange.record.service.clone().as_ref());
        }
        return Tried::Declined;
    };
    let stored = store(exchange, climb, request, view.spec.key_header.as_deref(), body);
    let key = stored.idempotency_key.clone();
    match accept(exchange, &view.name, stored).await {
        Some(Ok(accepted)) => {
            let own = taken_in(&view.name, &accepted.id, &key);
            Tried::Answered(match receipt {
                None => Outcome::Fallback(own),
                Some(receipt) => {
                    let mut told = response(exchange, receipt);
                    for (name, value) in own.into_response().headers() {
                        if name != header::CONTENT_TYPE {
                            told.headers_mut().insert(name, value.clone());
                        }
                    }
                    Outcome::Local(told, Told::Degraded)
                }
            })
        }
        Some(Err(Refused::Full { limit })) => {
            exchange.refused_by(limit, exchange.record.service.clone().as_ref());
            Tried::Declined
        }
        Some(Err(refused)) => {
            tracing::warn!(queue = %view.name, %refused, "a request can't be queued");
            Tried::Declined
        }
        None => Tried::Declined,
    }
}

/// Hands a request to the queue. `None`: it took longer than there is time. It is taken out again then, since its
/// client is told otherwise.
async fn accept(
    exchange: &Exchange,
    queue: &Arc<str>,
    stored: StoredRequest,
) -> Option<Result<Accepted, Refused>> {
    let queues = Arc::clone(&exchange.worker().queues);
    let queue = Arc::clone(queue);
    let (tell, told) = oneshot::channel();
    // Its owner is the worker, with whose runtime it ends. Not a part of the request's future: what was written must
    // be known to have been, whatever becomes of the client.
    tokio::task::spawn_local(async move {
        let accepted = queues.accept(&queue, stored).await;
        if let Err(Ok(accepted)) = tell.send(accepted) {
            take_out(&queues, &queue, accepted.id).await;
        }
    });
    match exchange.deadline {
        None => told.await.ok(),
        Some(until) => tokio::time::timeout_at(until.into(), told).await.ok()?.ok(),
    }
}

async fn take_out(queues: &Queues, queue: &str, id: EntryId) {
    if let Err(error) = queues.discard(queue, Which::One(id)).await {
        tracing::warn!(queue, %error, "a request whose client has gone stays in the queue");
    }
}

/// The whole body; what the client has yet to send of it is waited for. `None`: it can't be had, or is too large.
async fn whole_body(exchange: &Exchange, limit: u64) -> Option<Vec<u8>> {
    let intake = &exchange.intake;
    if intake.supply() != Supply::Whole {
        return None;
    }
    if !intake.ended() {
        exchange
            .take_body_in(usize::try_from(limit).unwrap_or(usize::MAX))
            .await;
    }
    intake.whole()
}

fn store(
    exchange: &Exchange,
    climb: &Climb<'_>,
    request: &Received,
    key_header: Option<&str>,
    body: Vec<u8>,
) -> StoredRequest {
    let record = &exchange.record;
    let mut headers = request.parts.headers.clone();
    for name in [
        header::VIA,
        header::HOST,
        header::CONTENT_LENGTH,
        header::EXPECT,
        TRACESTATE,
        GRPC_TIMEOUT,
    ] {
        headers.remove(name);
    }
    request.found.strip(&mut headers, false);
    // The delivery belongs to the trace of the request.
    record.trace.write(&mut headers, record.trace.span_id);
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(ToOwned::to_owned)
    };
    let snapshot = &exchange.snapshot;
    let service = snapshot
        .service(climb.plan.service)
        .map(|view| Arc::clone(&view.name));
    StoredRequest {
        service: service.unwrap_or_else(|| Arc::from("")),
        route: format!("{}/{}", record.route.as_deref().unwrap_or_default(), record.rule).into(),
        key: key_header.and_then(text).map(Into::into),
        idempotency_key: text(IDEMPOTENCY_KEY.as_str()).unwrap_or_else(random_key).into(),
        method: request.parts.method.to_string(),
        target: request
            .parts
            .uri
            .path_and_query()
            .map_or("/", |target| target.as_str())
            .to_owned(),
        authority: request.authority().to_owned(),
        client: record.peer.address,
        identity: record.peer.identity.clone(),
        from_outside: exchange.from_outside,
        headers: pairs(&headers),
        body: body.into(),
        priority: climb.plan.priority,
    }
}

fn pairs(headers: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    let of_client = headers.iter().filter(|(name, _)| !is_ours(name));
    of_client
        .map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()))
        .collect()
}

/// 202, and where to ask what became of it (RFC 9110 §15.3.3).
fn taken_in(queue: &str, id: &EntryId, key: &str) -> Own {
    let location = format!("{STATUS_PATH}{id}");
    let body = json!({"id": id.to_string(), "queue": queue, "state": "waiting", "status_url": location});
    let text = |name: HeaderName, value: &str| (name.to_string(), value.as_bytes().to_vec());
    Own {
        status: 202,
        headers: vec![
            text(header::CONTENT_TYPE, "application/json"),
            text(header::LOCATION, &location),
            text(IDEMPOTENCY_KEY, key),
        ],
        body: format!("{body}\n").into(),
    }
}

/// What became of an entry. Its id is a secret that only whoever queued it was told; clients from outside hear of no queue that
/// nothing of theirs comes to.
pub(crate) async fn status(exchange: &Exchange, client: &Client, request: &Received) -> Outcome {
    let id = request
        .parts
        .uri
        .path()
        .strip_prefix(STATUS_PATH)
        .unwrap_or_default();
    let (status, body) = match request.parts.method {
        Method::GET | Method::HEAD => {
            let queues = &exchange.worker().queues;
            let known = match id.parse::<EntryId>() {
                Ok(id) => queues.status(&id).await,
                Err(_) => None,
            };
            let known = known.filter(|known| {
                let edge = client.edge.as_ref();
                edge.is_none_or(|edge| edge.queues(&exchange.snapshot, request, Some(&known.queue)))
            });
            match known {
                Some(known) => (StatusCode::OK, told(&known)),
                None => (
                    StatusCode::NOT_FOUND,
                    json!({"error": "there is no such entry, or what became of it is no longer known"}),
                ),
            }
        }
        _ => (StatusCode::METHOD_NOT_ALLOWED, json!({"error": "want GET"})),
    };
    let mut response = Response::new(Bytes::from(format!("{body}\n")));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Outcome::Local(response, Told::Served)
}

fn told(known: &EntryStatus) -> Value {
    let (id, queue) = (known.id.to_string(), &*known.queue);
    match &known.state {
        EntryState::Waiting {
            since_ms,
            attempts,
            last_error,
        } => json!({
            "id": id, "queue": queue, "state": "waiting", "since_unix_ms": since_ms, "attempts": attempts,
            "last_error": last_error.as_deref(),
        }),
        EntryState::Delivered {
            status,
            at_ms,
            attempts,
        } => json!({
            "id": id, "queue": queue, "state": "delivered", "status": status, "at_unix_ms": at_ms,
            "attempts": attempts,
        }),
        EntryState::Dead {
            reason,
            at_ms,
            attempts,
        } => json!({
            "id": id, "queue": queue, "state": "dead", "reason": &**reason, "at_unix_ms": at_ms,
            "attempts": attempts,
        }),
    }
}

/// 128 bits at random, in hex.
fn random_key() -> String {
    let mut key = String::with_capacity(32);
    // Writing to a string can't fail.
    let _ = write!(key, "{:032x}", fastrand::u128(..));
    key
}

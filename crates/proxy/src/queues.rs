//! Queued requests: kept in step with policy, and shown to people.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use leeward_config::Live;
use leeward_policy::Snapshot;
use leeward_queue::{
    EntryDetail, EntryId, EntryState, EntrySummary, Listed, Listing, QueueError, QueueReading, Queues, Which,
};
use leeward_telemetry::Reading;
use leeward_telemetry::catalogue::{
    QUEUE_AVAILABLE, QUEUE_BYTES, QUEUE_DEAD, QUEUE_OLDEST, QUEUE_TOTAL, QUEUE_WAITING,
};
use serde_json::{Value, json};
use std::sync::Arc;

/// Entries on a page, where the request doesn't say, and at most.
const PAGE: usize = 100;
const MAX_PAGE: usize = 1000;
/// Bytes of a body that are shown.
const SHOWN: usize = 4 << 10;
/// Fields whose values are shown; others may hold what is nobody's business.
const HARMLESS: [&str; 10] = [
    "accept",
    "accept-encoding",
    "accept-language",
    "content-encoding",
    "content-type",
    "date",
    "idempotency-key",
    "traceparent",
    "user-agent",
    "x-request-id",
];

/// Opens and closes queues as policy says, until dropped.
pub(crate) async fn follow(queues: Arc<Queues>, live: Live) {
    let mut changes = live.watch();
    let mut known: Option<Arc<Snapshot>> = None;
    loop {
        let snapshot = live.snapshot().load_full();
        if !known.as_ref().is_some_and(|known| Arc::ptr_eq(known, &snapshot)) {
            let wanted = snapshot.queues().iter();
            let wanted = wanted.map(|queue| (Arc::clone(&queue.name), Arc::clone(&queue.spec)));
            queues.reconcile(wanted.collect());
            known = Some(snapshot);
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Gauges, as of now.
pub(crate) fn readings(queues: &Queues) -> Vec<Reading> {
    let mut readings = Vec::new();
    for queue in queues.readings() {
        let name = || vec![Arc::clone(&queue.queue)];
        let event = |event: &str| vec![Arc::clone(&queue.queue), event.into()];
        let mut add = |metric, labels, value| {
            readings.push(Reading {
                metric,
                labels,
                value,
            });
        };
        add(QUEUE_WAITING, name(), float(queue.waiting));
        add(QUEUE_BYTES, name(), float(queue.bytes));
        add(QUEUE_DEAD, name(), float(queue.dead));
        add(QUEUE_OLDEST, name(), queue.oldest.as_secs_f64());
        add(QUEUE_AVAILABLE, name(), f64::from(u8::from(queue.available)));
        for (what, count) in [
            ("accepted", queue.accepted_total),
            ("delivered", queue.delivered_total),
            ("dead", queue.dead_total),
            ("expired", queue.expired_total),
        ] {
            add(QUEUE_TOTAL, event(what), float(count));
        }
    }
    readings
}

#[expect(clippy::cast_precision_loss, reason = "a metric's value; exact to 2^53")]
const fn float(count: u64) -> f64 {
    count as f64
}

/// `/queues`, and what is below it.
///
/// | request | does |
/// |---|---|
/// | `GET /queues` | how each queue is |
/// | `GET /queues/NAME?state=waiting\|dead&after=N&limit=N` | its entries, a page at a time |
/// | `GET /queues/NAME/ID` | one entry, its body cut to 4 KiB |
/// | `POST /queues/NAME/retry?id=ID` | sends a dead letter again; with `all=true` all of them |
/// | `POST /queues/NAME/drop?id=ID` | drops an entry; with `all=true` all dead letters |
pub(crate) async fn answer<B>(queues: &Queues, request: &Request<B>) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    let rest = path.strip_prefix("/queues").unwrap_or_default();
    let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
    let get = matches!(*request.method(), Method::GET | Method::HEAD);
    let post = *request.method() == Method::POST;
    let answered = match parts.as_slice() {
        [] if get => Ok(json!({"queues": queues.readings().iter().map(reading).collect::<Vec<_>>()})),
        [queue] if get => list(queues, queue, request).await,
        [queue, id] if get => show(queues, queue, id).await,
        [queue, "retry"] if post => act(queues, queue, request, Act::Retry).await,
        [queue, "drop"] if post => act(queues, queue, request, Act::Drop).await,
        [] | [_] | [_, _] => Err(Refusal::of(
            StatusCode::METHOD_NOT_ALLOWED,
            "want GET, or POST to …/retry and …/drop",
        )),
        [_, _, ..] => Err(Refusal::of(StatusCode::NOT_FOUND, "there is nothing here")),
    };
    let (status, body) = match answered {
        Ok(body) => (StatusCode::OK, body),
        Err(Refusal { status, why }) => (status, json!({"error": why})),
    };
    let mut response = Response::new(Full::new(Bytes::from(format!("{body:#}\n"))));
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

/// What is done to entries.
#[derive(Clone, Copy)]
enum Act {
    Retry,
    Drop,
}

struct Refusal {
    status: StatusCode,
    why: String,
}

impl Refusal {
    fn of(status: StatusCode, why: impl Into<String>) -> Self {
        Self {
            status,
            why: why.into(),
        }
    }
}

impl From<QueueError> for Refusal {
    fn from(error: QueueError) -> Self {
        let status = match error {
            QueueError::NoSuchQueue { .. } => StatusCode::NOT_FOUND,
            QueueError::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
            QueueError::Full { .. } => StatusCode::CONFLICT,
        };
        Self::of(status, error.to_string())
    }
}

async fn list<B>(queues: &Queues, queue: &str, request: &Request<B>) -> Result<Value, Refusal> {
    let bad = |why: String| Refusal::of(StatusCode::BAD_REQUEST, why);
    let kind = match parameter(request, "state") {
        None | Some("waiting") => Listed::Waiting,
        Some("dead") => Listed::Dead,
        Some(other) => {
            return Err(bad(format!(
                "state: {other:?} is not known; want waiting or dead"
            )));
        }
    };
    let number = |name: &str, default: u64| match parameter(request, name) {
        None => Ok(default),
        Some(text) => text
            .parse()
            .map_err(|_| bad(format!("{name}: {text:?} is not a number"))),
    };
    let after = number("after", 0)?;
    let limit = number("limit", PAGE as u64)?;
    let limit = usize::try_from(limit).unwrap_or(MAX_PAGE).clamp(1, MAX_PAGE);
    let entries = queues.list(queue, Listing { kind, after, limit }).await?;
    let next = entries
        .last()
        .filter(|_| entries.len() == limit)
        .map(|last| last.place);
    Ok(json!({"entries": entries.iter().map(summary).collect::<Vec<_>>(), "next": next}))
}

async fn show(queues: &Queues, queue: &str, id: &str) -> Result<Value, Refusal> {
    let id = parse(id)?;
    let missing = || {
        Refusal::of(
            StatusCode::NOT_FOUND,
            format!("queue {queue:?} has no entry {id}"),
        )
    };
    let found = queues.show(queue, &id).await?.ok_or_else(missing)?;
    Ok(detail(&found))
}

async fn act<B>(queues: &Queues, queue: &str, request: &Request<B>, act: Act) -> Result<Value, Refusal> {
    let query = request.uri().query().unwrap_or_default();
    // Nothing that was mistyped may mean all of them.
    let which = match (query, parameter(request, "id")) {
        ("all=true", _) => Which::AllDead,
        (query, Some(id)) if !query.contains('&') => Which::One(parse(id)?),
        _ => {
            return Err(Refusal::of(
                StatusCode::BAD_REQUEST,
                format!("query: {query:?} names no entry; want id=ID, or all=true for all dead letters"),
            ));
        }
    };
    let entries = match act {
        Act::Retry => queues.retry(queue, which).await?,
        Act::Drop => queues.discard(queue, which).await?,
    };
    if entries == 0
        && let Which::One(id) = which
    {
        let what = match act {
            Act::Retry => "dead letter",
            Act::Drop => "entry",
        };
        return Err(Refusal::of(
            StatusCode::NOT_FOUND,
            format!("queue {queue:?} has no {what} {id}"),
        ));
    }
    Ok(json!({"entries": entries}))
}

fn parse(id: &str) -> Result<EntryId, Refusal> {
    id.parse()
        .map_err(|error| Refusal::of(StatusCode::BAD_REQUEST, format!("id: {error}")))
}

/// A parameter of the query. Names and values here need no decoding.
fn parameter<'a, B>(request: &'a Request<B>, name: &str) -> Option<&'a str> {
    let pairs = request.uri().query().unwrap_or_default().split('&');
    pairs
        .filter_map(|pair| pair.split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

fn reading(queue: &QueueReading) -> Value {
    json!({
        "queue": &*queue.queue,
        "store": queue.store,
        "state": queue.state,
        "available": queue.available,
        "delivering": queue.delivering,
        "waiting": queue.waiting,
        "bytes": queue.bytes,
        "dead": queue.dead,
        "oldest_seconds": queue.oldest.as_secs(),
        "accepted_total": queue.accepted_total,
        "delivered_total": queue.delivered_total,
        "dead_total": queue.dead_total,
        "expired_total": queue.expired_total,
    })
}

fn summary(entry: &EntrySummary) -> Value {
    let (state, attempts, why) = match &entry.state {
        EntryState::Waiting {
            attempts, last_error, ..
        } => ("waiting", *attempts, last_error.as_deref()),
        EntryState::Delivered { attempts, .. } => ("delivered", *attempts, None),
        EntryState::Dead { reason, attempts, .. } => ("dead", *attempts, Some(&**reason)),
    };
    json!({
        "id": entry.id.to_string(),
        "state": state,
        "attempts": attempts,
        "why": why,
        "service": &*entry.service,
        "route": &*entry.route,
        "key": entry.key.as_deref(),
        "method": entry.method,
        "target": entry.target,
        "bytes": entry.size,
        "accepted_unix_ms": entry.accepted_ms,
    })
}

fn detail(entry: &EntryDetail) -> Value {
    let request = &entry.request;
    let headers: Vec<Value> = request
        .headers
        .iter()
        .map(|(name, value)| {
            let shown = if HARMLESS.contains(&name.as_str()) {
                String::from_utf8_lossy(value)
            } else {
                "(not shown)".into()
            };
            json!({"name": name, "value": shown})
        })
        .collect();
    let body = request
        .body
        .get(..request.body.len().min(SHOWN))
        .unwrap_or_default();
    let mut shown = summary(&entry.summary);
    if let Value::Object(fields) = &mut shown {
        fields.insert("authority".to_owned(), json!(request.authority));
        fields.insert("idempotency_key".to_owned(), json!(&*request.idempotency_key));
        fields.insert("headers".to_owned(), json!(headers));
        fields.insert("body".to_owned(), json!(String::from_utf8_lossy(body)));
        fields.insert("body_bytes".to_owned(), json!(request.body.len()));
    }
    shown
}

//! The access log: a JSON object on a line for each request, written off the workers.

use crate::hub::Hub;
use crate::record::Record;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Lines that may wait; past that they are dropped and counted.
const QUEUE: usize = 65_536;

/// Where access log lines go.
#[derive(Debug)]
pub struct AccessLog {
    queue: SyncSender<String>,
    dropped: Arc<AtomicU64>,
}

impl AccessLog {
    /// Writes lines to `out` from a thread of its own, which ends when the log is dropped.
    ///
    /// # Errors
    ///
    /// If the thread can't be started.
    pub fn start(out: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (queue, lines) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&dropped);
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write(&lines, std::io::BufWriter::new(out), &counted))?;
        Ok(Self { queue, dropped })
    }

    pub(crate) fn write(&self, line: String) {
        match self.queue.try_send(line) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

fn write(lines: &Receiver<String>, mut out: impl Write, dropped: &AtomicU64) {
    while let Ok(first) = lines.recv() {
        // As many as are waiting, then one flush: a quiet log is written at once, a busy one in blocks.
        for line in std::iter::once(first).chain(lines.try_iter()) {
            if writeln!(out, "{line}").is_err() {
                dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        if out.flush().is_err() {
            dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// One request, under the names that its span has.
pub(crate) fn line(record: &Record, duration: Duration, hub: &Hub) -> String {
    #[expect(clippy::disallowed_methods, reason = "a log carries the wall clock's time")]
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let host = record
        .host
        .as_ref()
        .and_then(|h| h.to_str().ok())
        .or_else(|| record.uri.authority().map(http::uri::Authority::as_str));
    let attempts: Vec<Value> = record
        .attempts
        .iter()
        .map(|a| {
            let mut told = json!({
                "endpoint": &*a.endpoint, "zone": &*a.zone, "status": a.status, "cause": a.cause,
                "duration_us": micros(a.duration), "hedge": a.hedge, "transport": a.transport,
            });
            if let (Some(gateway), Some(told)) = (&a.gateway, told.as_object_mut()) {
                told.insert("gateway".to_owned(), json!(&**gateway));
            }
            told
        })
        .collect();
    let mut fields = Map::new();
    let mut set = |key: &str, value: Value| {
        if !value.is_null() {
            fields.insert(key.to_owned(), value);
        }
    };
    set(
        "time_unix_ms",
        json!(u64::try_from(now.as_millis()).unwrap_or(u64::MAX)),
    );
    set("direction", json!(record.direction.as_str()));
    if let Some(tcp) = &record.tcp {
        set("protocol", json!("tcp"));
        set("destination", json!(tcp.destination.map(|to| to.to_string())));
        set("server_name", json!(tcp.server_name.as_deref()));
    } else {
        set("method", json!(record.method.as_str()));
        set("host", json!(host));
        set("path", json!(record.uri.path()));
        set("status", json!(record.status));
    }
    set("outcome", json!(record.outcome.as_str()));
    set("reason", json!(record.reason.as_str()));
    set("duration_us", json!(micros(duration)));
    set("request_bytes", json!(record.request_bytes));
    set("response_bytes", json!(record.response_bytes));
    set("client", json!(record.peer.address.to_string()));
    set("peer", json!(record.peer.identity.as_deref()));
    set("gateway", json!(record.gateway.as_deref()));
    set("proxy", json!(&*hub.settings().proxy));
    set("zone", json!(&*hub.settings().zone));
    set("route", json!(record.route.as_deref()));
    set("service", json!(record.service.as_deref()));
    set("cause", json!(record.cause));
    set("fallback", json!(record.fallback.as_deref()));
    set("fallback_kind", json!(record.fallback_kind));
    set("plugin", json!(record.plugin.as_deref()));
    let faults: Vec<Value> = record
        .plugin_faults
        .iter()
        .map(|f| json!({"plugin": &*f.plugin, "fault": f.fault}))
        .collect();
    if let Some(last) = record.plugin_faults.last() {
        set("plugin_fault", json!(last.fault));
        set("plugin_faults", json!(faults));
    }
    set("cache", json!(record.cache));
    set("level", json!(record.level.as_deref()));
    set("fault", if record.fault { json!(true) } else { Value::Null });
    if let Some(authorized) = &record.authorization {
        set("authorization", json!(authorized.decision));
        set("authorization_policy", json!(authorized.by()));
    }
    if !record.audited.is_empty() {
        set(
            "authorization_audit",
            json!(record.audited.iter().map(|by| &**by).collect::<Vec<_>>()),
        );
    }
    set("authorization_token", json!(record.token));
    let flags: Vec<Value> = record
        .flags
        .iter()
        .map(|flag| {
            json!({
                "key": &*flag.key, "variant": flag.variant, "reason": flag.reason, "by": flag.by.as_deref(),
            })
        })
        .collect();
    set(
        "flags",
        if flags.is_empty() {
            Value::Null
        } else {
            json!(flags)
        },
    );
    set("retry_gave_up", json!(record.gave_up));
    set("limit", json!(record.limit));
    set("panic", if record.panic { json!(true) } else { Value::Null });
    set("policy_revision", json!(record.generation));
    set("attempts", json!(attempts));
    set("trace_id", json!(hex(&record.trace.trace_id)));
    set("span_id", json!(hex(&record.trace.span_id)));
    Value::Object(fields).to_string()
}

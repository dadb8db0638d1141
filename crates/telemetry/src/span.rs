//! From a record to spans: one SERVER span for the request, one CLIENT span for each attempt, named and
//! attributed as OpenTelemetry's stable HTTP conventions say.

use crate::hub::Hub;
use crate::reason::{Outcome, Reason};
use crate::record::{Attempt, Record, Tcp};
use http::Version;
use opentelemetry::trace::{Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, Value};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The spans of one request. Built when it has ended, so that unsampled ones cost nothing.
pub(crate) fn spans(record: &Record, duration: Duration, hub: &Hub) -> Vec<SpanData> {
    #[expect(clippy::disallowed_methods, reason = "spans carry the wall clock's time")]
    let ended = SystemTime::now();
    let started = ended.checked_sub(duration).unwrap_or(ended);
    let mut spans = vec![server(record, started, ended, hub)];
    for (resent, attempt) in record.attempts.iter().enumerate() {
        spans.push(client(record, attempt, resent, started));
    }
    spans
}

fn server(record: &Record, start_time: SystemTime, end_time: SystemTime, hub: &Hub) -> SpanData {
    let mut set = Attributes(common(record));
    match &record.tcp {
        Some(tcp) => of_connection(&mut set, tcp),
        None => of_request(&mut set, record),
    }
    set.text("client.address", &record.peer.address.ip().to_string());
    set.text("network.peer.address", &record.peer.address.ip().to_string());
    set.number("network.peer.port", record.peer.address.port().into());
    set.shared("leeward.peer", record.peer.identity.as_ref());
    set.shared("leeward.gateway", record.gateway.as_ref());
    let (sent, received) = if record.tcp.is_some() {
        ("leeward.tcp.sent.bytes", "leeward.tcp.received.bytes")
    } else {
        ("http.request.body.size", "http.response.body.size")
    };
    set.number(sent, clamp(record.request_bytes));
    set.number(received, clamp(record.response_bytes));
    set.text("leeward.direction", record.direction.as_str());
    set.shared("leeward.zone", Some(&hub.settings().zone));
    set.shared("leeward.proxy", Some(&hub.settings().proxy));
    set.shared("leeward.route", record.route.as_ref());
    set.shared("leeward.service", record.service.as_ref());
    set.text("leeward.outcome", record.outcome.as_str());
    set.text("leeward.reason", record.reason.as_str());
    set.number("leeward.policy.revision", clamp(record.generation));
    set.shared("leeward.fallback", record.fallback.as_ref());
    set.shared("leeward.plugin.name", record.plugin.as_ref());
    let words = [
        ("leeward.cause", record.cause),
        ("leeward.retry.gave_up", record.gave_up),
        ("leeward.limit", record.limit),
        (
            "leeward.plugin.fault",
            record.plugin_faults.last().map(|fault| fault.fault),
        ),
        ("leeward.fallback.kind", record.fallback_kind),
        ("leeward.cache", record.cache),
    ];
    for (key, word) in words {
        if let Some(word) = word {
            set.text(key, word);
        }
    }
    set.shared("leeward.degradation.level", record.level.as_ref());
    if let Some(authorized) = &record.authorization {
        set.text("leeward.authorization.decision", authorized.decision);
        set.shared("leeward.authorization.policy", Some(&authorized.policy));
        if let Some(rule) = authorized.rule {
            set.number("leeward.authorization.rule", rule.into());
        }
    }
    if !record.audited.is_empty() {
        set.text("leeward.authorization.audit", &record.audited.join(","));
    }
    if let Some(token) = record.token {
        set.text("leeward.authorization.token", token);
    }
    if record.panic {
        set.flag("leeward.panic");
    }
    if record.fault {
        set.flag("leeward.fault");
    }
    // A SERVER span is in error for a 5xx or for what never got a status; a 4xx is the client's matter.
    let status = match record.outcome {
        Outcome::Failed if record.status >= 500 || record.status == 0 => {
            set.text(
                "error.type",
                if record.reason == Reason::UpstreamStatus {
                    "5xx"
                } else {
                    record.reason.as_str()
                },
            );
            if record.reason == Reason::UpstreamStatus {
                set.replace("error.type", &record.status.to_string());
            }
            Status::error("")
        }
        Outcome::Served | Outcome::Degraded | Outcome::Failed => Status::Unset,
    };
    let name = match (&record.pattern, &record.tcp) {
        (_, Some(_)) => Cow::Borrowed("TCP"),
        (Some(pattern), None) => Cow::Owned(format!("{} {pattern}", record.method)),
        (None, None) => Cow::Owned(record.method.to_string()),
    };
    let trace = &record.trace;
    let parent = trace.parent.map_or(SpanId::INVALID, SpanId::from_bytes);
    SpanData {
        parent_span_is_remote: trace.parent.is_some(),
        events: events(record, start_time),
        ..span(
            record,
            trace.span_id,
            parent,
            SpanKind::Server,
            name,
            (start_time, end_time),
            set.0,
            status,
        )
    }
}

/// What only a request has.
fn of_request(set: &mut Attributes, record: &Record) {
    let uri = &record.uri;
    set.text("url.path", uri.path());
    if let Some(query) = uri.query() {
        set.text("url.query", query);
    }
    set.text("url.scheme", "http");
    if let Some(agent) = record.user_agent.as_ref().and_then(|a| a.to_str().ok()) {
        set.text("user_agent.original", agent);
    }
    if let Some((host, port)) = authority(record) {
        set.text("server.address", &host);
        if let Some(port) = port {
            set.number("server.port", port.into());
        }
    }
    set.shared("http.route", record.pattern.as_ref());
    if record.status > 0 {
        set.number("http.response.status_code", record.status.into());
    }
}

/// What a TCP connection has in its place.
fn of_connection(set: &mut Attributes, tcp: &Tcp) {
    set.text("network.transport", "tcp");
    if let Some(to) = tcp.destination {
        set.text("server.address", &to.ip().to_string());
        set.number("server.port", to.port().into());
    }
    set.shared("tls.client.server_name", tcp.server_name.as_ref());
}

/// What became of flags (OpenTelemetry's conventions for feature flags), and plugins' faults.
fn events(record: &Record, timestamp: SystemTime) -> SpanEvents {
    let mut events = SpanEvents::default();
    for flag in &record.flags {
        let mut set = Attributes(Vec::with_capacity(5));
        set.shared("feature_flag.key", Some(&flag.key));
        set.text("feature_flag.provider.name", "leeward");
        set.text("feature_flag.result.reason", flag.reason);
        if let Some(variant) = &flag.variant {
            set.text("feature_flag.result.variant", variant);
        }
        set.shared("leeward.degradation.level", flag.by.as_ref());
        events
            .events
            .push(Event::new("feature_flag.evaluation", timestamp, set.0, 0));
    }
    for fault in &record.plugin_faults {
        let mut set = Attributes(Vec::with_capacity(2));
        set.shared("leeward.plugin.name", Some(&fault.plugin));
        set.text("leeward.plugin.fault", fault.fault);
        let at = timestamp + fault.at.saturating_duration_since(record.started);
        events
            .events
            .push(Event::new("leeward.plugin.fault", at, set.0, 0));
    }
    events
}

fn client(record: &Record, attempt: &Attempt, resent: usize, started: SystemTime) -> SpanData {
    let mut set = Attributes(common(record));
    if let Some((host, port)) = attempt.endpoint.rsplit_once(':') {
        set.text("server.address", host);
        set.text("network.peer.address", host);
        if let Ok(port) = port.parse::<i64>() {
            set.number("server.port", port);
            set.number("network.peer.port", port);
        }
    }
    if record.tcp.is_none() {
        let host = record
            .host
            .as_ref()
            .and_then(|h| h.to_str().ok())
            .or_else(|| record.uri.authority().map(http::uri::Authority::as_str));
        set.text(
            "url.full",
            &format!("http://{}{}", host.unwrap_or_default(), record.uri.path()),
        );
    }
    if resent > 0 {
        set.number(
            "http.request.resend_count",
            i64::try_from(resent).unwrap_or(i64::MAX),
        );
    }
    if let Some(transport) = attempt.transport {
        // HTTP's own versions by the conventions' names; ours has a name of its own.
        let (transport, protocol, version) = match transport {
            "quic" => ("quic", "leeward-zone", "1"),
            "h2" => ("tcp", "http", "2"),
            "tcp" => ("tcp", "tcp", "1"),
            _ => ("tcp", "http", "1.1"),
        };
        set.text("network.transport", transport);
        set.text("network.protocol.name", protocol);
        set.text("network.protocol.version", version);
    }
    set.shared("leeward.zone", Some(&attempt.zone));
    set.shared("leeward.endpoint", Some(&attempt.endpoint));
    set.shared("leeward.gateway", attempt.gateway.as_ref());
    set.shared("leeward.service", record.service.as_ref());
    if attempt.hedge {
        set.flag("leeward.hedge");
    }
    let mut status = Status::Unset;
    if let Some(code) = attempt.status.filter(|_| record.tcp.is_none()) {
        set.number("http.response.status_code", code.into());
        if code >= 400 {
            set.text("error.type", &code.to_string());
            status = Status::error("");
        }
    }
    if let Some(cause) = attempt.cause {
        set.replace("error.type", cause);
        status = Status::error("");
    }
    let begun = started + attempt.started.saturating_duration_since(record.started);
    let parent = SpanId::from_bytes(record.trace.span_id);
    let name = match record.tcp {
        Some(_) => Cow::Borrowed("TCP connect"),
        None => Cow::Owned(record.method.to_string()),
    };
    let times = (begun, begun + attempt.duration);
    span(
        record,
        attempt.span_id,
        parent,
        SpanKind::Client,
        name,
        times,
        set.0,
        status,
    )
}

#[expect(
    clippy::too_many_arguments,
    reason = "the fields of a span, named where it is built"
)]
fn span(
    record: &Record,
    id: [u8; 8],
    parent: SpanId,
    span_kind: SpanKind,
    name: Cow<'static, str>,
    (start_time, end_time): (SystemTime, SystemTime),
    attributes: Vec<KeyValue>,
    status: Status,
) -> SpanData {
    let trace = TraceId::from_bytes(record.trace.trace_id);
    SpanData {
        span_context: SpanContext::new(
            trace,
            SpanId::from_bytes(id),
            TraceFlags::SAMPLED,
            false,
            TraceState::default(),
        ),
        parent_span_id: parent,
        parent_span_is_remote: false,
        span_kind,
        name,
        start_time,
        end_time,
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status,
        instrumentation_scope: InstrumentationScope::builder("leeward").build(),
    }
}

fn common(record: &Record) -> Vec<KeyValue> {
    let mut set = Attributes(Vec::with_capacity(24));
    if record.tcp.is_some() {
        return set.0;
    }
    set.text("http.request.method", record.method.as_str());
    let version = match record.version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    };
    set.text("network.protocol.version", version);
    set.0
}

fn authority(record: &Record) -> Option<(String, Option<u16>)> {
    let text = match record.uri.authority() {
        Some(authority) => authority.as_str(),
        None => record.host.as_ref()?.to_str().ok()?,
    };
    let authority: http::uri::Authority = text.parse().ok()?;
    Some((authority.host().to_owned(), authority.port_u16()))
}

fn clamp(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The attributes of one span.
struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn text(&mut self, key: &'static str, value: &str) {
        self.0.push(KeyValue::new(key, value.to_owned()));
    }

    fn replace(&mut self, key: &'static str, value: &str) {
        self.0.retain(|known| known.key.as_str() != key);
        self.text(key, value);
    }

    fn shared(&mut self, key: &'static str, value: Option<&Arc<str>>) {
        if let Some(value) = value {
            self.0
                .push(KeyValue::new(key, Value::String(Arc::clone(value).into())));
        }
    }

    fn flag(&mut self, key: &'static str) {
        self.0.push(KeyValue::new(key, true));
    }

    fn number(&mut self, key: &'static str, value: i64) {
        self.0.push(KeyValue::new(key, value));
    }
}

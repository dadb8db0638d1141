//! A receiver of OpenTelemetry spans, over gRPC and over HTTP.

use crate::port::Port;
use anyhow::bail;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use prost::Message;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What a span is of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SpanKind {
    /// A request received.
    Server,
    /// A request sent.
    Client,
    /// Anything else.
    Other,
}

/// A span as it arrived.
#[derive(Clone, Debug)]
pub struct Span {
    /// The trace, 32 hex digits.
    pub trace: String,
    /// The span, 16 hex digits.
    pub id: String,
    /// The parent, 16 hex digits; empty for none.
    pub parent: String,
    /// What it is of.
    pub kind: SpanKind,
    /// Its name.
    pub name: String,
    /// Its attributes, and their values as text.
    pub attributes: BTreeMap<String, String>,
    /// The attributes of the process that made it.
    pub resource: BTreeMap<String, String>,
    /// Its events, in order: their names and attributes.
    pub events: Vec<(String, BTreeMap<String, String>)>,
    /// Whether its status says that it is in error.
    pub error: bool,
    /// Start and end, in nanoseconds since 1970.
    pub times: (u64, u64),
}

/// The spans of one trace.
#[derive(Clone, Debug)]
pub struct Tree {
    spans: Vec<Span>,
}

/// A receiver with a port for each protocol. Ends when dropped.
#[derive(Debug)]
pub struct Receiver {
    grpc: Port,
    http: Port,
    kept: Arc<Kept>,
    token: CancellationToken,
}

#[derive(Debug)]
struct Kept {
    spans: Mutex<Vec<Span>>,
    arrived: watch::Sender<usize>,
}

/// Spans kept; what comes after is thrown away.
const MOST: usize = 100_000;

impl Receiver {
    /// Starts one.
    ///
    /// # Errors
    ///
    /// If no port is free.
    pub fn start() -> anyhow::Result<Self> {
        let kept = Arc::new(Kept {
            spans: Mutex::default(),
            arrived: watch::Sender::new(0),
        });
        let (grpc, http, token) = (Port::reserve()?, Port::reserve()?, CancellationToken::new());
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(Service(Arc::clone(&kept))))
            .serve_with_incoming(TcpListenerStream::new(grpc.listen()?));
        tokio::spawn(token.clone().run_until_cancelled_owned(server));
        let server = serve_http(http.listen()?, Arc::clone(&kept), token.clone());
        tokio::spawn(token.clone().run_until_cancelled_owned(server));
        Ok(Self {
            grpc,
            http,
            kept,
            token,
        })
    }

    /// The endpoint to export to with gRPC.
    pub fn grpc_endpoint(&self) -> String {
        format!("http://{}", self.grpc.address())
    }

    /// The endpoint to export to with HTTP: the base, to which exporters add `/v1/traces`.
    pub fn http_endpoint(&self) -> String {
        format!("http://{}", self.http.address())
    }

    /// Every span so far.
    pub fn spans(&self) -> Vec<Span> {
        self.kept
            .spans
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The trace, once `enough` says that it is whole.
    ///
    /// # Errors
    ///
    /// If that isn't so within `within`; with the spans that came.
    pub async fn wait_for(
        &self,
        trace: &str,
        within: Duration,
        enough: impl Fn(&Tree) -> bool,
    ) -> anyhow::Result<Tree> {
        let mut arrived = self.kept.arrived.subscribe();
        let until = tokio::time::Instant::now() + within;
        loop {
            let spans = self
                .spans()
                .into_iter()
                .filter(|span| span.trace == trace)
                .collect();
            let tree = Tree { spans };
            if enough(&tree) {
                return Ok(tree);
            }
            // The sender lives as long as the receiver, so an error can only be the time.
            if tokio::time::timeout_at(until, arrived.changed()).await.is_err() {
                bail!(
                    "waited {within:?} for the trace {trace}; it has:\n{}",
                    tree.drawn()
                );
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.token.cancel();
    }
}

struct Service(Arc<Kept>);

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.take(request.into_inner());
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn serve_http(listener: TcpListener, kept: Arc<Kept>, token: CancellationToken) {
    let tasks = TaskTracker::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let kept = Arc::clone(&kept);
        let service = service_fn(move |request| export(request, Arc::clone(&kept)));
        let serving =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        tasks.spawn(token.clone().run_until_cancelled_owned(serving));
    }
}

/// OTLP/HTTP with binary protobuf.
async fn export(request: Request<Incoming>, kept: Arc<Kept>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let is_traces = request.uri().path() == "/v1/traces" && request.method() == http::Method::POST;
    let body = request.into_body().collect().await?.to_bytes();
    let mut response = Response::new(Full::new(Bytes::from(
        ExportTraceServiceResponse::default().encode_to_vec(),
    )));
    let protobuf = http::HeaderValue::from_static("application/x-protobuf");
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, protobuf);
    match ExportTraceServiceRequest::decode(body) {
        Ok(request) if is_traces => kept.take(request),
        Ok(_) => *response.status_mut() = StatusCode::NOT_FOUND,
        Err(_) => *response.status_mut() = StatusCode::BAD_REQUEST,
    }
    Ok(response)
}

impl Kept {
    fn take(&self, request: ExportTraceServiceRequest) {
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        for group in request.resource_spans {
            let resource = attributes(group.resource.map(|r| r.attributes).unwrap_or_default());
            for span in group.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                if spans.len() < MOST {
                    spans.push(Span {
                        trace: hex(&span.trace_id),
                        id: hex(&span.span_id),
                        parent: hex(&span.parent_span_id),
                        kind: match span.kind {
                            2 => SpanKind::Server,
                            3 => SpanKind::Client,
                            _ => SpanKind::Other,
                        },
                        name: span.name,
                        attributes: attributes(span.attributes),
                        resource: resource.clone(),
                        events: span
                            .events
                            .into_iter()
                            .map(|event| (event.name, attributes(event.attributes)))
                            .collect(),
                        error: span.status.is_some_and(|status| status.code == 2),
                        times: (span.start_time_unix_nano, span.end_time_unix_nano),
                    });
                }
            }
        }
        self.arrived.send_modify(|n| *n += 1);
    }
}

fn attributes(list: Vec<KeyValue>) -> BTreeMap<String, String> {
    list.into_iter()
        .map(|pair| (pair.key, pair.value.map(text).unwrap_or_default()))
        .collect()
}

fn text(value: AnyValue) -> String {
    match value.value {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(truth)) => truth.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // A String takes whatever is written to it.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

impl Span {
    /// An attribute; empty if it isn't there.
    pub fn attribute(&self, key: &str) -> &str {
        self.attributes.get(key).map(String::as_str).unwrap_or_default()
    }
}

impl Tree {
    /// All spans.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Spans whose parent is not among them: one, if it is a tree.
    pub fn roots(&self) -> Vec<&Span> {
        self.spans
            .iter()
            .filter(|span| self.spans.iter().all(|other| other.id != span.parent))
            .collect()
    }

    /// Spans right below one, the earliest first.
    pub fn children(&self, of: &Span) -> Vec<&Span> {
        let mut children: Vec<_> = self.spans.iter().filter(|span| span.parent == of.id).collect();
        children.sort_by_key(|span| span.times.0);
        children
    }

    /// The trace as indented lines.
    pub fn drawn(&self) -> String {
        let mut lines = String::new();
        let mut todo: Vec<(usize, &Span)> = self.roots().into_iter().map(|root| (0, root)).collect();
        while let Some((depth, span)) = todo.pop() {
            if depth > 64 {
                continue;
            }
            let proxy = span
                .resource
                .get("service.instance.id")
                .or_else(|| span.resource.get("leeward.proxy"));
            let line = format!("{:?} {} {:?} {:?}", span.kind, span.name, proxy, span.attributes);
            // A String takes whatever is written to it.
            let _ = writeln!(lines, "{:width$}{line}", "", width = depth * 2);
            todo.extend(
                self.children(span)
                    .into_iter()
                    .rev()
                    .map(|child| (depth + 1, child)),
            );
        }
        lines
    }
}

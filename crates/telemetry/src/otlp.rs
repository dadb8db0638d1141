//! Spans on their way to an OpenTelemetry backend, off the workers.

use crate::hub::{Settings, TraceSettings};
use bytes::Bytes;
use http::{Request, Response, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use opentelemetry::KeyValue;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter as OtlpExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

/// How a receiver is spoken to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// OTLP over gRPC, usually port 4317.
    Grpc,
    /// OTLP as protobuf over HTTP, usually port 4318; `/v1/traces` is added to an endpoint without a path.
    Http,
}

/// Why spans can't be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Not a URL that this can talk to.
    #[error("{endpoint:?} is not an OTLP endpoint: want http://HOST:PORT")]
    Endpoint {
        /// As given.
        endpoint: String,
    },
    /// The exporter could not be made.
    #[error("no OTLP exporter for {endpoint:?}")]
    Exporter {
        /// As given.
        endpoint: String,
        /// What the library said.
        #[source]
        source: opentelemetry_otlp::ExporterBuildError,
    },
}

/// Requests' spans that may wait; past that they are dropped and counted.
const QUEUE: usize = 4096;
/// Most spans in one export.
const BATCH: usize = 512;
/// Longest wait of a span for others to go with it.
const LINGER: Duration = Duration::from_millis(500);
/// Longest export.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer of a receiver that is read, in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// Takes spans from any thread and exports them on a runtime.
#[derive(Debug)]
pub(crate) struct Exporter {
    queue: mpsc::Sender<Work>,
    dropped: Arc<AtomicU64>,
}

enum Work {
    Spans(Vec<SpanData>),
    Flush(oneshot::Sender<()>),
}

impl Exporter {
    pub(crate) fn start(traces: &TraceSettings, settings: &Settings) -> Result<Self, ExportError> {
        let bad = || ExportError::Endpoint {
            endpoint: traces.endpoint.clone(),
        };
        let uri: Uri = traces.endpoint.parse().map_err(|_| bad())?;
        if uri.scheme_str() != Some("http") || uri.host().is_none() {
            return Err(bad());
        }
        let resource = Resource::builder_empty()
            .with_service_name("leeward-proxy")
            .with_attributes([
                KeyValue::new("service.version", settings.version.to_string()),
                KeyValue::new("service.instance.id", settings.proxy.to_string()),
                KeyValue::new("cloud.availability_zone", settings.zone.to_string()),
            ])
            .build();
        let failed = |source| ExportError::Exporter {
            endpoint: traces.endpoint.clone(),
            source,
        };
        let mut exporter = match traces.protocol {
            Protocol::Grpc => OtlpExporter::builder()
                .with_tonic()
                .with_endpoint(&traces.endpoint)
                .with_timeout(EXPORT_TIMEOUT)
                .build()
                .map_err(failed)?,
            Protocol::Http => {
                let path = if uri.path().len() > 1 { "" } else { "/v1/traces" };
                OtlpExporter::builder()
                    .with_http()
                    .with_http_client(Plain)
                    .with_endpoint(format!("{}{path}", traces.endpoint.trim_end_matches('/')))
                    .with_timeout(EXPORT_TIMEOUT)
                    .build()
                    .map_err(failed)?
            }
        };
        exporter.set_resource(&resource);
        let (queue, work) = mpsc::channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        // Its owner is the queue: it ends when the hub is gone.
        Handle::current().spawn(run(exporter, work, Arc::clone(&dropped)));
        Ok(Self { queue, dropped })
    }

    pub(crate) fn export(&self, spans: Vec<SpanData>) {
        if let Err(
            mpsc::error::TrySendError::Full(Work::Spans(lost))
            | mpsc::error::TrySendError::Closed(Work::Spans(lost)),
        ) = self.queue.try_send(Work::Spans(spans))
        {
            self.dropped.fetch_add(lost.len() as u64, Ordering::Relaxed);
        }
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub(crate) fn flush(&self, limit: Duration) {
        let (done, flushed) = oneshot::channel();
        if self.queue.try_send(Work::Flush(done)).is_ok() {
            let (tx, rx) = std::sync::mpsc::channel();
            // A thread of its own, since this may be called where no runtime turns any more.
            std::thread::spawn(move || tx.send(flushed.blocking_recv().is_ok()));
            // Late or never, the process is ending.
            let _ = rx.recv_timeout(limit);
        }
    }
}

async fn run(exporter: OtlpExporter, mut work: mpsc::Receiver<Work>, dropped: Arc<AtomicU64>) {
    while let Some(first) = work.recv().await {
        let mut batch = Vec::new();
        let mut flushed = Vec::new();
        let mut take = |next: Work, batch: &mut Vec<SpanData>| match next {
            Work::Spans(spans) => batch.extend(spans),
            Work::Flush(done) => flushed.push(done),
        };
        take(first, &mut batch);
        let linger = tokio::time::sleep(LINGER);
        tokio::pin!(linger);
        while batch.len() < BATCH {
            tokio::select! {
                biased;
                next = work.recv() => match next {
                    Some(next @ Work::Flush(_)) => { take(next, &mut batch); break; }
                    Some(next) => take(next, &mut batch),
                    None => break,
                },
                () = &mut linger => break,
            }
        }
        let count = batch.len() as u64;
        if count > 0 {
            let export = exporter.export(batch);
            let outcome = tokio::time::timeout(EXPORT_TIMEOUT, export).await;
            if let Err(error) = outcome.unwrap_or(Err(OTelSdkError::Timeout(EXPORT_TIMEOUT))) {
                dropped.fetch_add(count, Ordering::Relaxed);
                tracing::debug!(%error, count, "spans could not be exported");
            }
        }
        for done in flushed {
            // Whoever asked may have stopped waiting.
            let _ = done.send(());
        }
    }
}

/// An HTTP client for a receiver on this node or beside it: one connection for each export.
#[derive(Debug)]
struct Plain;

impl HttpClient for Plain {
    fn send_bytes<'a, 'f>(
        &'a self,
        request: Request<Bytes>,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'f>>
    where
        'a: 'f,
        Self: 'f,
    {
        Box::pin(send(request))
    }
}

async fn send(mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let authority = request
        .uri()
        .authority()
        .ok_or("no host in the OTLP endpoint")?
        .clone();
    let port = authority.port_u16().unwrap_or(80);
    let stream = TcpStream::connect((authority.host(), port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = path.map_or_else(|| Uri::from_static("/"), Uri::from);
    request
        .headers_mut()
        .insert(header::HOST, authority.as_str().parse()?);
    let answer = async {
        let (parts, body) = sender.send_request(request.map(Full::new)).await?.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await?.to_bytes();
        Ok(Response::from_parts(parts, body))
    }
    .await;
    connection.abort();
    answer
}

//! One check: a connection, at most one request, and what the answer says of the endpoint.

use super::failure::{CheckFailure, ProxyReason};
use super::{Subject, grpc};
use crate::chance::Chance;
use crate::plain::TCP_UPGRADE;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use leeward_identity::{Identity, SpiffeId};
use leeward_policy::Via;
use leeward_policy::model::{CheckKind, Protocol};
use leeward_resilience::Draw;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;

/// What a check that did not fail has found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Finding {
    /// The endpoint is well.
    Pass,
    /// Nothing: a limit of the proxy in front of it kept the request from the endpoint, or this proxy has no certificate
    /// that is good.
    Nothing,
}

/// Who asks, for those who read a workload's access log.
const USER_AGENT: HeaderValue = HeaderValue::from_static("leeward-health-check");
/// Names the endpoint to the proxy in front of it, as `SERVICE/IP:PORT`, or to a gateway, as `SERVICE/IP:PORT@PROXY`.
const ENDPOINT: &str = "leeward-endpoint";
/// Says that it is a check, which policy about callers doesn't hold for. Proxies let no workload set it.
const CHECK: &str = "leeward-check";
/// On answers that a proxy made itself: why. Proxies let no workload set it.
const REASON: &str = "leeward-reason";

/// Asks once, on a connection that is made for it and then closed: one that was kept would show only that
/// what accepted it once is still there, not that the workload takes new ones.
///
/// The endpoint's whole time is `check.timeout`, from the first packet of the connection to the end of what
/// must be read of the answer.
///
/// Cancel-safe: dropping the future closes the connection.
pub(super) async fn ask(subject: &Subject, identity: Option<&Identity>) -> Result<Finding, CheckFailure> {
    let limit = subject.check.timeout;
    match tokio::time::timeout(limit, Box::pin(put(subject, identity))).await {
        Ok(ended) => ended,
        Err(_) => Err(CheckFailure::Timeout { limit }),
    }
}

async fn put(subject: &Subject, identity: Option<&Identity>) -> Result<Finding, CheckFailure> {
    let protocol = match subject.check.kind {
        // gRPC is always HTTP/2, whatever else the service speaks.
        CheckKind::Grpc { .. } => Protocol::Http2,
        CheckKind::Http { .. } | CheckKind::Tcp => subject.protocol,
    };
    match (&subject.key.via, &subject.check.kind) {
        (Via::Direct, CheckKind::Tcp) => {
            connect(subject.key.address).await?;
            Ok(Finding::Pass)
        }
        (Via::Direct, CheckKind::Http { .. } | CheckKind::Grpc { .. }) => {
            let question = question(subject, protocol)?;
            let stream = connect(subject.key.address).await?;
            exchange(stream, protocol, question, subject).await
        }
        // What this side can't show says nothing of the other.
        (Via::Proxy { .. } | Via::Gateway { .. }, _)
            if identity.is_some_and(|identity| identity.ready_now().is_err()) =>
        {
            Ok(Finding::Nothing)
        }
        (Via::Proxy { address, zone, name }, _) => {
            let question = question(subject, protocol)?;
            let peer = Peer {
                address: *address,
                zone,
                name,
            };
            let stream = secure(connect(*address).await?, &peer, protocol, identity).await?;
            exchange(stream, protocol, question, subject).await
        }
        (Via::Gateway { .. }, _) => {
            let question = question(subject, protocol)?;
            match through_gateway(subject, protocol, identity).await {
                Some(stream) => exchange(stream, protocol, question, subject).await,
                // A gateway that is gone says nothing of who is behind it.
                None => Ok(Finding::Nothing),
            }
        }
    }
}

/// Gateways that one check tries, each for an equal share of its time, the answer's among them.
const GATEWAYS: usize = 3;

/// A connection to a gateway of the endpoint's zone, from a random one on.
async fn through_gateway(
    subject: &Subject,
    protocol: Protocol,
    identity: Option<&Identity>,
) -> Option<TlsStream<TcpStream>> {
    let count = subject.gateways.len().min(GATEWAYS);
    let limit = subject.check.timeout / u32::try_from(count + 1).unwrap_or(u32::MAX);
    let first = usize::try_from(Chance.below(subject.gateways.len().max(1) as u64)).unwrap_or(0);
    for gateway in subject.gateways.iter().cycle().skip(first).take(count) {
        let peer = Peer {
            address: gateway.address,
            zone: &gateway.zone,
            name: &gateway.name,
        };
        let made = async { secure(connect(gateway.address).await?, &peer, protocol, identity).await };
        match tokio::time::timeout(limit, made).await {
            Ok(Ok(stream)) => return Some(stream),
            Ok(Err(error)) => {
                tracing::debug!(gateway = %gateway.name, %error, "no check through a zone gateway");
            }
            Err(_) => tracing::debug!(gateway = %gateway.name, "a zone gateway doesn't answer a check"),
        }
    }
    None
}

async fn connect(to: SocketAddr) -> Result<TcpStream, CheckFailure> {
    let connecting = async {
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        // On one machine a port that nobody listens on may be given to the very connection that asks for it,
        // which then is with itself.
        if stream.local_addr()? == to {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(stream)
    };
    connecting
        .await
        .map_err(|source| CheckFailure::Connect { to, source })
}

/// The proxy in front of an endpoint.
struct Peer<'a> {
    address: SocketAddr,
    zone: &'a str,
    name: &'a str,
}

async fn secure(
    stream: TcpStream,
    peer: &Peer<'_>,
    protocol: Protocol,
    identity: Option<&Identity>,
) -> Result<TlsStream<TcpStream>, CheckFailure> {
    let failed = |source| CheckFailure::Tls {
        to: peer.address,
        peer: format!("zone/{}/proxy/{}", peer.zone, peer.name).into(),
        source,
    };
    let none = || io::Error::new(io::ErrorKind::NotFound, "this proxy has no identity to present");
    let identity = identity.ok_or_else(|| failed(none()))?;
    let expect = SpiffeId::proxy(identity.id().trust_domain(), peer.zone, peer.name)
        .map_err(|e| failed(io::Error::new(io::ErrorKind::InvalidInput, e)))?;
    let alpn: &[&[u8]] = match protocol {
        Protocol::Http1 | Protocol::Tcp => &[b"http/1.1"],
        Protocol::Http2 => &[b"h2"],
    };
    let config = identity
        .client_config(alpn, &expect)
        .map_err(|e| failed(io::Error::other(e)))?;
    // Peers are known by SPIFFE id, so the name is not looked at; an address sends no SNI.
    TlsConnector::from(config)
        .connect(ServerName::from(peer.address.ip()), stream)
        .await
        .map_err(failed)
}

/// The request that the check makes.
fn question(subject: &Subject, protocol: Protocol) -> Result<Request<Full<Bytes>>, CheckFailure> {
    build(subject, protocol).map_err(|source| CheckFailure::Request { source })
}

fn build(subject: &Subject, protocol: Protocol) -> Result<Request<Full<Bytes>>, http::Error> {
    let service = &*subject.key.service;
    let (method, host, path, body) = match &subject.check.kind {
        CheckKind::Http { path, host, .. } => (
            Method::GET,
            host.as_deref().unwrap_or(service),
            &**path,
            Bytes::new(),
        ),
        CheckKind::Grpc { service: about } => (Method::POST, service, grpc::PATH, grpc::request(about)),
        CheckKind::Tcp if protocol == Protocol::Tcp => (Method::GET, service, "/", Bytes::new()),
        CheckKind::Tcp => (Method::HEAD, service, "/", Bytes::new()),
    };
    let uri = Uri::builder().path_and_query(path);
    let request = Request::builder().method(method);
    let request = match protocol {
        Protocol::Http1 => request
            .uri(uri.build()?)
            .header(header::HOST, host)
            .header(header::CONNECTION, "close"),
        // The proxy in front of it connects, and says so.
        Protocol::Tcp => request
            .uri(uri.build()?)
            .header(header::HOST, host)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, TCP_UPGRADE),
        Protocol::Http2 => request.uri(uri.scheme(uri::Scheme::HTTP).authority(host).build()?),
    };
    let mut request = request
        .header(header::USER_AGENT, USER_AGENT)
        .body(Full::new(body))?;
    let headers = request.headers_mut();
    if let CheckKind::Grpc { .. } = subject.check.kind {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if subject.key.via != Via::Direct {
        let endpoint = match &subject.key.via {
            Via::Gateway {
                proxy: Some(proxy), ..
            } => format!("{service}/{}@{proxy}", subject.address_text),
            Via::Gateway { proxy: None, .. } | Via::Proxy { .. } | Via::Direct => {
                format!("{service}/{}", subject.address_text)
            }
        };
        let endpoint = HeaderValue::try_from(endpoint)?;
        headers.insert(ENDPOINT, endpoint);
        headers.insert(CHECK, HeaderValue::from_static("1"));
    }
    Ok(request)
}

async fn exchange<T>(
    stream: T,
    protocol: Protocol,
    question: Request<Full<Bytes>>,
    subject: &Subject,
) -> Result<Finding, CheckFailure>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let reset = |source| CheckFailure::Reset { source };
    let io = TokioIo::new(stream);
    let tasks = Tasks::default();
    let _end = EndTasks(tasks.clone());
    // A connection that ends with an error ends the request on it with that error; there is nobody else to
    // tell. The sending half is kept until the answer is read, since the connection ends with it.
    match protocol {
        Protocol::Http1 | Protocol::Tcp => {
            let (mut sender, connection) = http1::handshake(io).await.map_err(reset)?;
            tasks.spawn(async move { drop(connection.await) });
            judge(sender.send_request(question).await.map_err(reset)?, subject).await
        }
        Protocol::Http2 => {
            let (mut sender, connection) = http2::Builder::new(tasks.clone())
                .handshake(io)
                .await
                .map_err(reset)?;
            tasks.spawn(async move { drop(connection.await) });
            judge(sender.send_request(question).await.map_err(reset)?, subject).await
        }
    }
}

/// What an answer says of the endpoint.
async fn judge(answer: Response<Incoming>, subject: &Subject) -> Result<Finding, CheckFailure> {
    if subject.key.via != Via::Direct
        && let Some(word) = answer.headers().get(REASON)
    {
        return by_proxy(word.as_bytes(), &subject.check.kind);
    }
    match &subject.check.kind {
        CheckKind::Http {
            expected_statuses, ..
        } => by_status(answer.status(), expected_statuses),
        CheckKind::Grpc { .. } => by_health_service(answer).await,
        CheckKind::Tcp
            if subject.protocol == Protocol::Tcp && answer.status() != StatusCode::SWITCHING_PROTOCOLS =>
        {
            Err(CheckFailure::Status(answer.status().as_u16()))
        }
        CheckKind::Tcp => Ok(Finding::Pass),
    }
}

fn by_proxy(word: &[u8], kind: &CheckKind) -> Result<Finding, CheckFailure> {
    match (ProxyReason::read(word), kind) {
        (None, _) => Ok(Finding::Nothing),
        (Some(reason), CheckKind::Tcp) if reason.connected() => Ok(Finding::Pass),
        (Some(reason), _) => Err(CheckFailure::ByProxy(reason)),
    }
}

fn by_status(status: StatusCode, expected: &[u16]) -> Result<Finding, CheckFailure> {
    let passes = match expected {
        [] => status.is_success(),
        some => some.binary_search(&status.as_u16()).is_ok(),
    };
    if passes {
        Ok(Finding::Pass)
    } else {
        Err(CheckFailure::Status(status.as_u16()))
    }
}

async fn by_health_service(answer: Response<Incoming>) -> Result<Finding, CheckFailure> {
    if answer.status() != StatusCode::OK {
        return Err(CheckFailure::Status(answer.status().as_u16()));
    }
    let (head, mut body) = answer.into_parts();
    // A failure may come without a message, its status in the head ("trailers-only").
    let mut grpc_status = grpc_status(&head.headers)?;
    let mut message = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|source| CheckFailure::Reset { source })?;
        match frame.into_data() {
            Ok(data) if message.len() + data.len() > grpc::MAX_ANSWER => {
                return Err(CheckFailure::Malformed("it is too long"));
            }
            Ok(data) => message.extend_from_slice(&data),
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    grpc_status = self::grpc_status(&trailers)?.or(grpc_status);
                }
            }
        }
    }
    match grpc_status {
        None => Err(CheckFailure::Malformed("it has no grpc-status")),
        Some(0) => match grpc::status(&message).map_err(CheckFailure::Malformed)? {
            grpc::SERVING => Ok(Finding::Pass),
            other => Err(CheckFailure::NotServing(other)),
        },
        Some(status) => Err(CheckFailure::GrpcStatus(status)),
    }
}

fn grpc_status(headers: &HeaderMap) -> Result<Option<u32>, CheckFailure> {
    let Some(value) = headers.get("grpc-status") else {
        return Ok(None);
    };
    let status = value.to_str().ok().and_then(|text| text.parse().ok());
    status
        .map(Some)
        .ok_or(CheckFailure::Malformed("its grpc-status is no number"))
}

/// The tasks of one connection. HTTP/2's spawn others, so they are kept where those can be reached too.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Tasks {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.locked(|tasks| drop(tasks.spawn(task)));
    }

    /// Nothing that runs under the lock can panic half-way, so a poisoned one is as good.
    fn locked(&self, act: impl FnOnce(&mut JoinSet<()>)) {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        self.spawn(future);
    }
}

/// Ends the tasks of a connection, which hold each other and so would outlive their last user.
struct EndTasks(Tasks);

impl Drop for EndTasks {
    fn drop(&mut self) {
        self.0.locked(JoinSet::abort_all);
    }
}

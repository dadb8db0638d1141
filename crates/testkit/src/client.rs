//! An HTTP client that does what a test says and nothing more: no retries, no redirects.

use crate::body::{Body, empty_body};
use anyhow::{Context, bail};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;

/// How a client speaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
}

/// A client of one address, such as a proxy's outbound listener. Connections are kept and used again.
#[derive(Debug)]
pub struct Client {
    to: SocketAddr,
    protocol: Protocol,
    idle: Mutex<Vec<http1::SendRequest<Body>>>,
    shared: tokio::sync::Mutex<Option<http2::SendRequest<Body>>>,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status.
    pub status: StatusCode,
    /// The header fields.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// The trailer fields, if there were any.
    pub trailers: Option<HeaderMap>,
}

/// Longest wait for a whole answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A GET without a body. `host` may have a port.
pub fn get(host: &str, path: &str) -> Request<Body> {
    request(Method::GET, host, path, empty_body())
}

/// Any request. What is no host or path makes a request that no server takes.
pub fn request(method: Method, host: &str, path: &str, body: Body) -> Request<Body> {
    let mut request = Request::new(body);
    *request.method_mut() = method;
    *request.uri_mut() = Uri::try_from(format!("http://{host}{path}")).unwrap_or_default();
    request
}

/// The same request with one more header field. What is no value is left out.
#[must_use]
pub fn with_header(mut request: Request<Body>, name: &'static str, value: &str) -> Request<Body> {
    if let Ok(value) = HeaderValue::from_str(value) {
        request
            .headers_mut()
            .append(http::HeaderName::from_static(name), value);
    }
    request
}

impl Client {
    /// A client of `to`. Nothing is connected yet.
    pub fn new(to: SocketAddr, protocol: Protocol) -> Self {
        Self {
            to,
            protocol,
            idle: Mutex::default(),
            shared: tokio::sync::Mutex::default(),
        }
    }

    /// GET, and the whole answer.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub async fn get(&self, host: &str, path: &str) -> anyhow::Result<Reply> {
        self.call(get(host, path)).await
    }

    /// Sends a request and takes in the whole answer.
    ///
    /// # Errors
    ///
    /// If there is none, or it doesn't end.
    pub async fn call(&self, request: Request<Body>) -> anyhow::Result<Reply> {
        let what = format!("{} {}", request.method(), request.uri());
        let call = async {
            let (response, connection) = self.start(request).await?;
            let (parts, body) = response.into_parts();
            let body = body.collect().await.context("the answer's body broke off")?;
            if let Some(connection) = connection {
                self.idle
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(connection);
            }
            let trailers = body.trailers().cloned();
            let reply = Reply {
                status: parts.status,
                headers: parts.headers,
                body: body.to_bytes(),
                trailers,
            };
            anyhow::Ok(reply)
        };
        match tokio::time::timeout(PATIENCE, call).await {
            Ok(reply) => reply.with_context(|| what),
            Err(_) => bail!("{what}: no whole answer within {PATIENCE:?}"),
        }
    }

    /// Sends a request and returns the answer's head. Its connection is not used again, in HTTP/1.1.
    ///
    /// # Errors
    ///
    /// If there is no answer.
    pub async fn send(&self, request: Request<Body>) -> anyhow::Result<Response<Incoming>> {
        let what = format!("{} {}", request.method(), request.uri());
        match tokio::time::timeout(PATIENCE, self.start(request)).await {
            Ok(started) => Ok(started.context(what)?.0),
            Err(_) => bail!("{what}: no answer within {PATIENCE:?}"),
        }
    }

    async fn start(
        &self,
        request: Request<Body>,
    ) -> anyhow::Result<(Response<Incoming>, Option<http1::SendRequest<Body>>)> {
        match self.protocol {
            Protocol::Http1 => {
                let mut sender = self.http1().await?;
                let response = sender
                    .try_send_request(to_origin_form(request)?)
                    .await
                    .map_err(told)?;
                Ok((response, Some(sender)))
            }
            Protocol::Http2 => {
                let mut sender = self.http2().await?;
                Ok((sender.try_send_request(request).await.map_err(told)?, None))
            }
        }
    }

    async fn http1(&self) -> anyhow::Result<http1::SendRequest<Body>> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut idle) = idle else { break };
            // Ready as soon as the last exchange is done; closed ones are not, ever.
            if idle.ready().await.is_ok() {
                return Ok(idle);
            }
        }
        let (sender, connection) = http1::handshake(TokioIo::new(self.connect().await?)).await?;
        // Ends with the connection.
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }

    async fn http2(&self) -> anyhow::Result<http2::SendRequest<Body>> {
        let mut shared = self.shared.lock().await;
        if let Some(sender) = shared.as_ref()
            && !sender.is_closed()
        {
            return Ok(sender.clone());
        }
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20);
        let (sender, connection) = builder.handshake(TokioIo::new(self.connect().await?)).await?;
        // Ends with the connection.
        tokio::spawn(connection);
        *shared = Some(sender.clone());
        Ok(sender)
    }

    async fn connect(&self) -> anyhow::Result<TcpStream> {
        let stream = TcpStream::connect(self.to)
            .await
            .with_context(|| format!("can't connect to {}", self.to))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl Reply {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// A header field's value; empty if it isn't there.
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    /// The backend that answered; empty if it was none.
    pub fn backend(&self) -> &str {
        self.header("x-backend")
    }
}

/// A request that was not sent, or that the peer has said to have passed over. Nothing is lost: a client that
/// has more patience may send it elsewhere.
#[derive(Debug)]
pub struct Unsent;

impl std::fmt::Display for Unsent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the connection closed before the request was sent")
    }
}

impl std::error::Error for Unsent {}

fn told(mut error: hyper::client::conn::TrySendError<Request<Body>>) -> anyhow::Error {
    let unsent = error.take_message().is_some();
    let error = anyhow::Error::from(error.into_error());
    // A peer that goes away in order names the last stream that it serves; the error is of those after that,
    // and of those that were about to be opened (RFC 9113 §6.8).
    let passed_over = error
        .chain()
        .filter_map(|e| e.downcast_ref::<h2::Error>())
        .any(|e| e.is_go_away() && e.is_remote() && e.reason() == Some(h2::Reason::NO_ERROR));
    if unsent || passed_over {
        error.context(Unsent)
    } else {
        error
    }
}

/// Moves the authority to Host, as requests to an origin have it (RFC 9112 §3.2.1).
fn to_origin_form(mut request: Request<Body>) -> anyhow::Result<Request<Body>> {
    if let Some(authority) = request.uri().authority() {
        let host = HeaderValue::from_str(authority.as_str())?;
        let path = request
            .uri()
            .path_and_query()
            .map_or("/", |p| p.as_str())
            .to_owned();
        request.headers_mut().entry(header::HOST).or_insert(host);
        *request.uri_mut() = path.parse()?;
    }
    Ok(request)
}

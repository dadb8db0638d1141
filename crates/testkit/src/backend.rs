//! A real HTTP backend that does as it is told.

mod chance;
mod health;
#[cfg(test)]
mod tests;

use crate::body::{Body, Echo, bytes_body, channel_body, empty_body, zeros_body};
use crate::client::{Client, Protocol};
use crate::port::Port;
use bytes::Bytes;
use health::Health;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What a backend does with requests. May change at any time; requests under way go on as they began.
#[derive(Clone, Debug)]
pub enum Behave {
    /// Answers.
    Answer(Answer),
    /// Answers after a while.
    Late(Duration, Answer),
    /// Answers when it has the request's body to its end, and never if that breaks off.
    AfterBody(Answer),
    /// Sends the body back as it comes, and its trailers.
    Echo,
    /// Answers 200 with the value of this header field.
    Tell(String),
    /// As a gRPC server that echoes messages: trailers with `grpc-status: 0` at the end.
    Grpc,
    /// Takes the request and never answers.
    Hang,
    /// Resets the connection (RST) when a request comes.
    Reset,
    /// Answers 200 at once, then sends this many bytes, one at a time, with this pause before each.
    Dribble(u32, Duration),
    /// Answers 200 and part of the body that it promised, then resets the connection.
    CutShort,
    /// Answers every n-th request (n at least 1) with this status, the others with 200.
    Flaky(u64, u16),
    /// Calls on through a proxy, as a workload that has work for others, and gives that answer.
    Relay(Relay),
    /// Answers after a while of any length between these, each as likely.
    LateBetween {
        /// Shortest.
        least: Duration,
        /// Longest.
        most: Duration,
        /// The same seed draws the same lengths.
        seed: u64,
        /// The answer.
        answer: Answer,
    },
    /// Does either of two things with each request, at random.
    Mixed {
        /// Probability of the first, 0 to 1.
        share: f64,
        /// The same seed picks the same requests, counted from when the backend was told this.
        seed: u64,
        /// With that probability.
        bad: Box<Self>,
        /// Otherwise.
        good: Box<Self>,
    },
    /// Does two things in turn, beginning when the backend is told this.
    Flap {
        /// How long each lasts; never the second if zero.
        every: Duration,
        /// First, third and so on.
        first: Box<Self>,
        /// Second, fourth and so on.
        then: Box<Self>,
    },
    /// Does what depends on the path.
    ByPath {
        /// Paths in whole, without the query, with what is done there.
        paths: Vec<(String, Self)>,
        /// Everywhere else.
        other: Box<Self>,
    },
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Header fields, besides `x-backend`.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub content: Content,
}

/// A body of an answer.
#[derive(Clone, Debug)]
pub enum Content {
    /// This text.
    Text(String),
    /// As many zeros.
    Zeros(u64),
}

/// A call to somewhere else in the mesh. The trace context of the request goes with it.
#[derive(Clone, Debug)]
pub struct Relay {
    /// The outbound listener of the caller's proxy.
    pub via: SocketAddr,
    /// The host to ask for.
    pub host: String,
    /// The path to ask for.
    pub path: String,
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The method.
    pub method: String,
    /// The target as the backend got it.
    pub target: String,
    /// HTTP's version.
    pub version: Version,
    /// The header fields.
    pub headers: HeaderMap,
}

/// A backend on a port of its own, speaking HTTP/1.1 and HTTP/2 with prior knowledge. Ends when dropped.
#[derive(Debug)]
pub struct Backend {
    port: Port,
    shared: Arc<Shared>,
    serving: Mutex<Option<CancellationToken>>,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct Shared {
    name: String,
    told: Mutex<Told>,
    health: Health,
    counts: Mutex<Option<Counts>>,
    requests: AtomicU64,
    connections: AtomicU64,
    received: Arc<AtomicU64>,
    seen: Mutex<VecDeque<Seen>>,
}

/// What a backend was told to do.
#[derive(Clone, Debug)]
struct Told {
    behave: Behave,
    /// When.
    since: Instant,
    /// Requests that had come before.
    after: u64,
}

/// Requests by the value of a header.
#[derive(Debug)]
struct Counts {
    header: HeaderName,
    by_value: BTreeMap<String, u64>,
}

/// Requests that are remembered; older ones are forgotten.
const REMEMBERED: usize = 4096;

impl Behave {
    /// This status for a share of requests, 0 to 1, and 200 for the others.
    pub fn failing(share: f64, status: u16, seed: u64) -> Self {
        Self::Mixed {
            share,
            seed,
            bad: Box::new(Self::Answer(Answer::status(status))),
            good: Box::new(Self::Answer(Answer::status(200))),
        }
    }

    /// Answers 200 for a while, then with this status for as long, and so on.
    pub fn flapping(every: Duration, status: u16) -> Self {
        Self::Flap {
            every,
            first: Box::new(Self::Answer(Answer::status(200))),
            then: Box::new(Self::Answer(Answer::status(status))),
        }
    }
}

impl Answer {
    /// 200 with this text.
    pub fn text(text: &str) -> Self {
        Self {
            status: 200,
            headers: Vec::new(),
            content: Content::Text(text.to_owned()),
        }
    }

    /// This status and nothing else.
    pub fn status(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            content: Content::Text(String::new()),
        }
    }

    /// 200 with so many zeros.
    pub fn zeros(length: u64) -> Self {
        Self {
            status: 200,
            headers: Vec::new(),
            content: Content::Zeros(length),
        }
    }

    /// With another status.
    #[must_use]
    pub const fn with_status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    /// With one more header field.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    fn into_response(self) -> Response<Body> {
        let body = match self.content {
            Content::Text(text) => bytes_body(text),
            Content::Zeros(length) => zeros_body(length),
        };
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::NOT_IMPLEMENTED);
        for (name, value) in self.headers {
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                response.headers_mut().append(name, value);
            }
        }
        response
    }
}

impl Backend {
    /// Starts one that answers 200 with its name.
    ///
    /// # Errors
    ///
    /// If no port is free.
    pub fn start(name: &str) -> anyhow::Result<Self> {
        Self::start_at(name, Ipv4Addr::LOCALHOST.into())
    }

    /// The same, at an address of this host.
    ///
    /// # Errors
    ///
    /// If no port is free there, or there is no such address.
    pub fn start_at(name: &str, address: IpAddr) -> anyhow::Result<Self> {
        let backend = Self::new(name, Port::reserve_at(address)?);
        backend.listen()?;
        Ok(backend)
    }

    /// One whose port refuses connections, until [`Self::resume`].
    ///
    /// # Errors
    ///
    /// If no port is free.
    pub fn refusing(name: &str) -> anyhow::Result<Self> {
        Ok(Self::new(name, Port::reserve()?))
    }

    fn new(name: &str, port: Port) -> Self {
        let shared = Shared {
            name: name.to_owned(),
            told: Mutex::new(Told {
                behave: Behave::Answer(Answer::text(name)),
                since: Instant::now(),
                after: 0,
            }),
            health: Health::default(),
            counts: Mutex::default(),
            requests: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            received: Arc::default(),
            seen: Mutex::default(),
        };
        Self {
            port,
            shared: Arc::new(shared),
            serving: Mutex::new(None),
            tasks: TaskTracker::new(),
        }
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// Its name, which its answers carry in `x-backend`.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Says what to do with requests from now on.
    pub fn behave(&self, behave: Behave) {
        *self.shared.told.lock().unwrap_or_else(PoisonError::into_inner) = Told {
            behave,
            since: Instant::now(),
            after: self.requests(),
        };
    }

    /// Says how to answer health checks from now on: GET `/healthz` with 200 or 503, and
    /// `grpc.health.v1.Health/Check` with SERVING or NOT_SERVING. It is healthy until told otherwise, whatever
    /// it does with requests.
    pub fn set_health(&self, healthy: bool) {
        self.shared.health.set(healthy);
    }

    /// Health checks that came so far. They are not among the requests.
    pub fn health_checks(&self) -> u64 {
        self.shared.health.checks()
    }

    /// Counts requests by the value of this header from now on, and forgets what was counted before. A name
    /// that is none counts nothing.
    pub fn count_by(&self, header: &str) {
        let counts = HeaderName::try_from(header).ok().map(|header| Counts {
            header,
            by_value: BTreeMap::new(),
        });
        *self.counted() = counts;
    }

    /// What [`Self::count_by`] has counted so far. Requests without the header are under the empty text.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        self.counted()
            .as_ref()
            .map(|counts| counts.by_value.clone())
            .unwrap_or_default()
    }

    fn counted(&self) -> std::sync::MutexGuard<'_, Option<Counts>> {
        self.shared.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens again, after [`Self::stop`].
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn resume(&self) -> anyhow::Result<()> {
        Ok(self.listen()?)
    }

    fn listen(&self) -> io::Result<()> {
        let listener = self.port.listen()?;
        let token = CancellationToken::new();
        let accept = accept(
            listener,
            Arc::clone(&self.shared),
            token.clone(),
            self.tasks.clone(),
        );
        self.tasks.spawn(token.clone().run_until_cancelled_owned(accept));
        if let Some(before) = self.serving().replace(token) {
            before.cancel();
        }
        Ok(())
    }

    /// Stops as a process that died: every connection ends, new ones are refused. That is so when this
    /// returns.
    pub async fn stop(&self) {
        self.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.tasks.reopen();
    }

    fn cancel(&self) {
        if let Some(token) = self.serving().take() {
            token.cancel();
        }
    }

    /// Requests that came so far, without health checks.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Connections that were accepted so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Bytes of bodies that were echoed or relayed so far.
    pub fn received_bytes(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    /// The latest requests, the oldest first. They are forgotten here.
    pub fn take_seen(&self) -> Vec<Seen> {
        self.shared
            .seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .drain(..)
            .collect()
    }

    fn serving(&self) -> std::sync::MutexGuard<'_, Option<CancellationToken>> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.cancel();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, token: CancellationToken, tasks: TaskTracker) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        shared.connections.fetch_add(1, Ordering::Relaxed);
        let serve = serve(stream, Arc::clone(&shared));
        tasks.spawn(token.clone().run_until_cancelled_owned(serve));
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    // Answers must not wait for acknowledgements, or the figures are the kernel's.
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let (Ok(http2), Ok(handle)) = (speaks_http2(&stream).await, stream.as_fd().try_clone_to_owned()) else {
        return;
    };
    let reset = CancellationToken::new();
    let service = {
        let reset = reset.clone();
        service_fn(move |request| {
            let (shared, reset) = (Arc::clone(&shared), reset.clone());
            async move { Ok::<_, Infallible>(shared.answer(request, &reset).await) }
        })
    };
    let io = TokioIo::new(stream);
    // A connection that ends badly is the other side's business, and what some tests want.
    if http2 {
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20);
        let serving = pin!(builder.serve_connection(io, service));
        drop(reset.run_until_cancelled(serving).await);
    } else {
        let serving = hyper::server::conn::http1::Builder::new().serve_connection(io, service);
        let serving = pin!(serving.with_upgrades());
        drop(reset.run_until_cancelled(serving).await);
    }
    if reset.is_cancelled() {
        send_reset(handle);
    }
}

/// Whether the first bytes are HTTP/2's preface (RFC 9113 §3.4).
async fn speaks_http2(stream: &TcpStream) -> io::Result<bool> {
    let mut start = [0; 4];
    loop {
        let n = stream.peek(&mut start).await?;
        let seen = start.get(..n).unwrap_or_default();
        if n == start.len() || n == 0 || !b"PRI ".starts_with(seen) {
            return Ok(seen == b"PRI ");
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Closes the last handle of a socket so that the peer gets RST instead of FIN.
fn send_reset(handle: OwnedFd) {
    // If the socket is gone already, so is what the peer would have got.
    let _ = rustix::net::sockopt::set_socket_linger(&handle, Some(Duration::ZERO));
    drop(handle);
}

impl Shared {
    async fn answer(&self, request: Request<Incoming>, reset: &CancellationToken) -> Response<Body> {
        if let Some(answer) = self.health.answer(&request) {
            return answer;
        }
        let count = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        self.remember(&request);
        let Told { behave, since, after } = self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let nth = count.saturating_sub(after);
        let mut behave = behave;
        let mut response = loop {
            behave = match behave {
                Behave::Answer(answer) => break answer.into_response(),
                Behave::Late(pause, answer) => {
                    tokio::time::sleep(pause).await;
                    break answer.into_response();
                }
                Behave::AfterBody(answer) => {
                    if request.into_body().collect().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                    break answer.into_response();
                }
                Behave::LateBetween {
                    least,
                    most,
                    seed,
                    answer,
                } => {
                    tokio::time::sleep(chance::between(least, most, chance::draw(seed, nth))).await;
                    break answer.into_response();
                }
                Behave::Echo => break self.echo(request, None),
                Behave::Tell(name) => {
                    let value = request.headers().get(&name);
                    let value = value.and_then(|value| value.to_str().ok()).unwrap_or_default();
                    break Answer::text(value).into_response();
                }
                Behave::Grpc => break self.grpc(request),
                Behave::Hang => std::future::pending().await,
                Behave::Reset => {
                    reset.cancel();
                    std::future::pending().await
                }
                Behave::Dribble(bytes, pause) => break self.dribble(bytes, pause),
                Behave::CutShort => break cut_short(reset.clone()),
                Behave::Flaky(n, status) if count.is_multiple_of(n.max(1)) => {
                    break Answer::status(status).into_response();
                }
                Behave::Flaky(..) => break Answer::text(&self.name).into_response(),
                Behave::Relay(relay) => break relay_on(&relay, &request).await,
                Behave::Mixed {
                    share,
                    seed,
                    bad,
                    good,
                } => {
                    *if chance::draw(seed, nth) < share {
                        bad
                    } else {
                        good
                    }
                }
                Behave::Flap { every, first, then } => {
                    *if chance::turn(every, since.elapsed()).is_multiple_of(2) {
                        first
                    } else {
                        then
                    }
                }
                Behave::ByPath { paths, other } => {
                    let path = request.uri().path();
                    match paths.into_iter().find(|(at, _)| at == path) {
                        Some((_, behave)) => behave,
                        None => *other,
                    }
                }
            };
        };
        if let Ok(name) = HeaderValue::from_str(&self.name) {
            response.headers_mut().append("x-backend", name);
        }
        response
    }

    fn remember(&self, request: &Request<Incoming>) {
        if let Some(counts) = &mut *self.counts.lock().unwrap_or_else(PoisonError::into_inner) {
            let value = request.headers().get(&counts.header);
            let value = value.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
            *counts.by_value.entry(value.unwrap_or_default()).or_default() += 1;
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() == REMEMBERED {
            seen.pop_front();
        }
        seen.push_back(Seen {
            method: request.method().to_string(),
            target: request.uri().to_string(),
            version: request.version(),
            headers: request.headers().clone(),
        });
    }

    fn echo(&self, request: Request<Incoming>, trailers: Option<HeaderMap>) -> Response<Body> {
        let trailer = request.headers().get(http::header::TRAILER).cloned();
        let body = Echo {
            from: request.into_body(),
            trailers,
            received: Arc::clone(&self.received),
        };
        let mut response = Response::new(body.boxed_unsync());
        if let Some(trailer) = trailer {
            response.headers_mut().insert(http::header::TRAILER, trailer);
        }
        response
    }

    fn grpc(&self, request: Request<Incoming>) -> Response<Body> {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        trailers.insert("x-echoed", HeaderValue::from_static("yes"));
        let mut response = self.echo(request, Some(trailers));
        let grpc = HeaderValue::from_static("application/grpc");
        response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
        response
    }

    fn dribble(&self, bytes: u32, pause: Duration) -> Response<Body> {
        let (sender, body) = channel_body();
        // Ends when the body is dropped, or complete.
        tokio::spawn(async move {
            for _ in 0..bytes {
                tokio::time::sleep(pause).await;
                if sender
                    .send(Ok(Frame::data(Bytes::from_static(b"."))))
                    .await
                    .is_err()
                {
                    return;
                }
            }
        });
        Response::new(body)
    }
}

fn cut_short(reset: CancellationToken) -> Response<Body> {
    let (sender, body) = channel_body();
    // Ends by itself shortly.
    tokio::spawn(async move {
        // If nobody reads it there is nothing to cut.
        drop(sender.send(Ok(Frame::data(Bytes::from_static(b"some")))).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
        reset.cancel();
        drop(sender);
    });
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert(http::header::CONTENT_LENGTH, HeaderValue::from_static("1000"));
    response
}

async fn relay_on(relay: &Relay, request: &Request<Incoming>) -> Response<Body> {
    let client = Client::new(relay.via, Protocol::Http1);
    let mut onward = crate::client::get(&relay.host, &relay.path);
    for name in ["traceparent", "tracestate"] {
        if let Some(value) = request.headers().get(name) {
            onward.headers_mut().insert(name, value.clone());
        }
    }
    match client.call(onward).await {
        Ok(reply) => {
            let mut response = Response::new(bytes_body(reply.body));
            *response.status_mut() = reply.status;
            response
        }
        Err(_) => {
            let mut response = Response::new(empty_body());
            *response.status_mut() = StatusCode::BAD_GATEWAY;
            response
        }
    }
}

//! Connections and requests of clients.

use crate::body::Incoming;
use crate::streams::{Both, Quic, Sending, Stopped};
use bytes::Bytes;
use h3::error::Code;
use h3::server::{RequestResolver, RequestStream};
use http::{HeaderMap, HeaderName, Method, Request, Response, header};
use http_body::Body;
use quinn::crypto::rustls::{HandshakeData, NoInitialCipherSuite, QuicServerConfig};
use quinn::{Endpoint, EndpointConfig, IdleTimeout, TokioRuntime, TransportConfig, VarInt};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

/// The protocol's name in the TLS handshake.
pub const ALPN: &[u8] = b"h3";

/// Requests under way at once on one connection. RFC 9114 §6.1 wants 100 at least.
const MAX_STREAMS: u32 = 128;
/// Streams of one direction: three are HTTP/3's own, and some for what a client greases with.
const MAX_UNI: u32 = 8;
/// Bytes that one body has on its way, and those of one connection: what a client can make the proxy hold.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Bytes of answers that are sent and not acknowledged.
const SEND_WINDOW: u64 = 8 << 20;
/// A client that says nothing for this long is gone; one that is there answers [`KEEP_ALIVE`].
const SILENCE: Duration = Duration::from_secs(60);
/// How often a silent client is asked whether it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Handshakes under way at once, of one socket; more are refused.
const MAX_HANDSHAKES: usize = 1024;
/// From this many on, a client has to show that it gets what is sent to its address before it costs a handshake.
const CHECK_ADDRESS_FROM: usize = 256;
/// How long a client may take for a head, once it has opened a stream.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// How long a request of a kind that has no body is waited for to show that it has none.
const BODY_WITHIN: Duration = Duration::from_millis(250);
/// How long the last packets of connections that are closed may take to be sent.
const FAREWELL: Duration = Duration::from_millis(200);
/// How long a client may take to give leave for a few bytes more. One that doesn't has broken RFC 9114 §6.2.
const GOAWAY_WITHIN: Duration = Duration::from_secs(1);
/// GOAWAY that rules nothing out yet: requests that are on their way are still served.
const ANY_REQUEST: usize = usize::MAX;

/// Takes connections on one UDP socket. Belongs to one thread, as do its connections.
#[derive(Debug)]
pub struct Server {
    endpoint: Endpoint,
    configs: Rc<Configs>,
    handshakes: Rc<Cell<usize>>,
}

/// The configuration that is made of one of TLS, kept for as long as that stays the same.
#[derive(Debug)]
struct Configs {
    transport: Arc<TransportConfig>,
    known: RefCell<Option<(Arc<rustls::ServerConfig>, Arc<quinn::ServerConfig>)>>,
}

/// A connection whose handshake is under way.
#[derive(Debug)]
pub struct Arriving {
    incoming: quinn::Incoming,
    configs: Rc<Configs>,
    _counted: Counted,
}

/// Bounds of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The largest head of a request, in bytes; a larger one is answered 431.
    pub head: u32,
    /// Longest handshake.
    pub handshake: Duration,
}

/// A connection from a client. Dropped, it is closed, with what was being sent.
pub struct Connection {
    h3: h3::server::Connection<Quic, Bytes>,
    quic: quinn::Connection,
    latest: Rc<RefCell<Option<Stopped>>>,
    under_way: Rc<()>,
    accepted: bool,
    told: bool,
}

/// A request that has begun.
pub struct Exchange {
    resolver: RequestResolver<Quic, Bytes>,
    stopped: Stopped,
    under_way: Rc<()>,
}

/// Sends the answer to one request. Dropped, it tells the client that something failed here.
pub struct Responder {
    stream: RequestStream<Sending, Bytes>,
    stopped: Option<Stopped>,
    /// Whether a body would be sent with the answer.
    bodiless: bool,
    done: bool,
    _under_way: Rc<()>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// TLS is set up so that QUIC can't be spoken.
    #[error("TLS without a cipher suite for QUIC")]
    Suite(#[source] NoInitialCipherSuite),
    /// The handshake failed, or took too long.
    #[error("the handshake with {from} failed: {why}")]
    Handshake {
        /// Where from.
        from: SocketAddr,
        /// Why.
        why: String,
    },
}

/// Why a request can't be read, or its answer not be sent.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// It breaks HTTP's rules.
    #[error("malformed: {0}")]
    Malformed(&'static str),
    /// The head took too long.
    #[error("the head took too long")]
    Late,
    /// The client doesn't want the answer any more, or is gone.
    #[error("the client has stopped it")]
    Stopped,
    /// What answers broke off.
    #[error("the answer broke off")]
    Body,
    /// HTTP/3 or QUIC failed.
    #[error("{0}")]
    Protocol(String),
}

impl From<h3::error::StreamError> for StreamError {
    fn from(error: h3::error::StreamError) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// Counts a handshake under way until dropped.
#[derive(Debug)]
struct Counted(Rc<Cell<usize>>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

impl Configs {
    fn new() -> Self {
        let mut transport = TransportConfig::default();
        transport
            .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
            .max_concurrent_uni_streams(VarInt::from_u32(MAX_UNI))
            .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
            .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
            .send_window(SEND_WINDOW)
            .max_idle_timeout(IdleTimeout::try_from(SILENCE).ok())
            .keep_alive_interval(Some(KEEP_ALIVE))
            // Nothing here uses datagrams.
            .datagram_receive_buffer_size(None);
        Self {
            transport: Arc::new(transport),
            known: RefCell::new(None),
        }
    }

    fn of(&self, tls: &Arc<rustls::ServerConfig>) -> Result<Arc<quinn::ServerConfig>, NoInitialCipherSuite> {
        let mut known = self.known.borrow_mut();
        if let Some((of, config)) = &*known
            && Arc::ptr_eq(of, tls)
        {
            return Ok(Arc::clone(config));
        }
        let crypto = QuicServerConfig::try_from(Arc::clone(tls))?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config
            .transport_config(Arc::clone(&self.transport))
            .max_incoming(MAX_HANDSHAKES)
            .migration(true);
        let config = Arc::new(config);
        *known = Some((Arc::clone(tls), Arc::clone(&config)));
        Ok(config)
    }
}

impl Server {
    /// A server on a socket. `tls` is what connections are accepted with that say nothing else; it must have TLS 1.3 and
    /// the ALPN name [`ALPN`]. Call on the thread of a `LocalSet`.
    ///
    /// # Errors
    ///
    /// If the socket can't be registered with the runtime, or TLS is set up otherwise.
    pub fn new(socket: UdpSocket, tls: &Arc<rustls::ServerConfig>) -> io::Result<Self> {
        let configs = Configs::new();
        let first = configs.of(tls).map_err(io::Error::other)?;
        let endpoint = Endpoint::new(
            EndpointConfig::default(),
            Some((*first).clone()),
            socket,
            Arc::new(TokioRuntime),
        )?;
        Ok(Self {
            endpoint,
            configs: Rc::new(configs),
            handshakes: Rc::default(),
        })
    }

    /// The next connection; `None` after [`Self::close`]. Handshakes are the caller's to run side by side.
    ///
    /// Cancel-safe.
    pub async fn accept(&self) -> Option<Arriving> {
        loop {
            let incoming = self.endpoint.accept().await?;
            let under_way = self.handshakes.get();
            if under_way >= MAX_HANDSHAKES {
                incoming.refuse();
                continue;
            }
            if under_way >= CHECK_ADDRESS_FROM && !incoming.remote_address_validated() && incoming.may_retry()
            {
                // It fails only if it may not, which was just asked.
                let _ = incoming.retry();
                continue;
            }
            self.handshakes.set(under_way + 1);
            return Some(Arriving {
                incoming,
                configs: Rc::clone(&self.configs),
                _counted: Counted(Rc::clone(&self.handshakes)),
            });
        }
    }

    /// Closes all connections, and waits until the clients have been told, for a moment at most.
    pub async fn close(&self) {
        self.endpoint.close(code(Code::H3_NO_ERROR), b"");
        // Longer only if nobody hears it.
        let _ = tokio::time::timeout(FAREWELL, self.endpoint.wait_idle()).await;
    }
}

impl Arriving {
    /// Says at once that there is no connection to be had, so that the client goes elsewhere.
    pub fn refuse(self) {
        self.incoming.refuse();
    }

    /// Where from.
    pub fn peer(&self) -> SocketAddr {
        self.incoming.remote_address()
    }

    /// Finishes the handshake, with this configuration of TLS.
    ///
    /// # Errors
    ///
    /// [`AcceptError`].
    pub async fn handshake(
        self,
        tls: &Arc<rustls::ServerConfig>,
        limits: Limits,
    ) -> Result<Connection, AcceptError> {
        let from = self.peer();
        let failed = |why: String| AcceptError::Handshake { from, why };
        let config = self.configs.of(tls).map_err(AcceptError::Suite)?;
        let connecting = self
            .incoming
            .accept_with(config)
            .map_err(|error| failed(error.to_string()))?;
        let greeting = async {
            let quic = connecting.await.map_err(|error| failed(error.to_string()))?;
            // What is larger than any head may be isn't taken in; what is only too large is answered.
            let (adapter, latest) = Quic::new(quic.clone(), 2 * u64::from(limits.head));
            let h3 = h3::server::builder()
                .max_field_section_size(limits.head.into())
                .build(adapter)
                .await
                .map_err(|error| failed(error.to_string()))?;
            Ok(Connection {
                h3,
                quic,
                latest,
                under_way: Rc::default(),
                accepted: false,
                told: false,
            })
        };
        let greeted = tokio::time::timeout(limits.handshake, greeting).await;
        greeted.unwrap_or_else(|_| Err(failed("it took too long".to_owned())))
    }
}

impl Connection {
    /// Where from.
    pub fn peer(&self) -> SocketAddr {
        self.quic.remote_address()
    }

    /// The host that the client asked for in the handshake.
    pub fn server_name(&self) -> Option<String> {
        let data = self.quic.handshake_data()?.downcast::<HandshakeData>().ok()?;
        data.server_name
    }

    /// The next request; `None` when the connection has ended. After [`Self::go_away`], requests that were sent before the
    /// client knew still come.
    ///
    /// Cancel-safe.
    pub async fn accept(&mut self) -> Option<Exchange> {
        let resolver = match self.h3.accept().await {
            Ok(resolver) => resolver?,
            Err(error) => {
                tracing::debug!(peer = %self.peer(), %error, "an HTTP/3 connection has ended");
                return None;
            }
        };
        self.accepted = true;
        let stopped = self.latest.borrow_mut().take()?;
        Some(Exchange {
            resolver,
            stopped,
            under_way: Rc::clone(&self.under_way),
        })
    }

    /// Tells the client to send new requests elsewhere (RFC 9114 §5.2). One that has sent none yet isn't told: its first is
    /// perhaps on its way, and would be taken for refused. Doesn't wait for one that doesn't let itself be told.
    pub async fn go_away(&mut self) {
        if !self.accepted || std::mem::replace(&mut self.told, true) {
            return;
        }
        match tokio::time::timeout(GOAWAY_WITHIN, self.h3.shutdown(ANY_REQUEST)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(peer = %self.peer(), %error, "an HTTP/3 connection has ended"),
            Err(_) => tracing::debug!(peer = %self.peer(), "a client doesn't take GOAWAY in"),
        }
    }

    /// Waits until no request is under way and for a while nothing has come from the client: of answers that are still on
    /// their way to it there would be acknowledgements. After `limit`, which begins when this is first polled, what comes
    /// without a request doesn't count: a client can go on with that for ever.
    pub fn silent_for(&self, time: Duration, limit: Duration) -> impl Future<Output = ()> + use<> {
        let (quic, under_way) = (self.quic.clone(), Rc::downgrade(&self.under_way));
        async move {
            let heard = || quic.stats().udp_rx.datagrams;
            let until = tokio::time::Instant::now() + limit;
            let mut before = heard();
            loop {
                tokio::time::sleep(time).await;
                let now = heard();
                let silent = std::mem::replace(&mut before, now) == now;
                // The connection has one itself.
                if under_way.strong_count() <= 1 && (silent || tokio::time::Instant::now() >= until) {
                    return;
                }
            }
        }
    }

    /// Ends it at once, since the client does nothing but make work.
    pub fn cut(&self) {
        self.quic.close(code(Code::H3_EXCESSIVE_LOAD), b"");
    }
}

impl Exchange {
    /// Reads the request's head.
    ///
    /// # Errors
    ///
    /// If it breaks off, is none, or takes too long; the client has been told.
    pub async fn read(self) -> Result<(Request<Incoming>, Responder), StreamError> {
        let head = tokio::time::timeout(HEAD_WITHIN, self.resolver.resolve_request()).await;
        let (request, stream) = head.map_err(|_| StreamError::Late)??;
        let stream: RequestStream<Both, Bytes> = stream;
        let (send, receive) = stream.split();
        let (parts, ()) = request.into_parts();
        let responder = Responder {
            stream: send,
            stopped: Some(self.stopped),
            bodiless: parts.method == Method::HEAD,
            done: false,
            _under_way: self.under_way,
        };
        let mut body = Incoming::new(receive, &parts.headers)?;
        let mut begin = pin!(poll_fn(|cx| body.poll_begin(cx)));
        let begun = poll_fn(|cx| Poll::Ready(begin.as_mut().poll(cx))).await;
        match begun {
            Poll::Ready(begun) => begun?,
            Poll::Pending if may_be_bodiless(&parts.method, &parts.headers) => {
                if let Ok(begun) = tokio::time::timeout(BODY_WITHIN, begin).await {
                    begun?;
                }
            }
            Poll::Pending => {}
        }
        Ok((Request::from_parts(parts, body), responder))
    }
}

/// Whether most requests of this kind have no body.
fn may_be_bodiless(method: &Method, headers: &HeaderMap) -> bool {
    let kind = [Method::GET, Method::HEAD, Method::OPTIONS, Method::DELETE].contains(method);
    kind && !headers.contains_key(header::CONTENT_LENGTH)
}

impl Responder {
    /// Waits for an answer to be made, unless the client doesn't want it any more, or is gone. Drop what makes it then.
    ///
    /// # Errors
    ///
    /// That it was stopped.
    pub async fn unless_stopped<F: Future>(&mut self, make: Pin<&mut F>) -> Result<F::Output, StreamError> {
        let Some(stopped) = &mut self.stopped else {
            return Ok(make.await);
        };
        tokio::select! {
            biased;
            made = make => Ok(made),
            _ = stopped.as_mut() => {
                self.stopped = None;
                Err(StreamError::Stopped)
            }
        }
    }

    /// Sends an answer, to its end.
    ///
    /// # Errors
    ///
    /// If it was not sent whole; the client has been told.
    pub async fn respond<B>(mut self, answer: Response<B>) -> Result<(), StreamError>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let (mut parts, mut body) = answer.into_parts();
        for name in OF_CONNECTIONS {
            parts.headers.remove(name);
        }
        let has_body = !self.bodiless && !body.is_end_stream();
        self.stream.send_response(Response::from_parts(parts, ())).await?;
        if has_body {
            self.send_body(&mut body).await?;
        }
        self.stream.finish().await?;
        self.done = true;
        Ok(())
    }
}

impl Responder {
    async fn send_body<B>(&mut self, body: &mut B) -> Result<(), StreamError>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        loop {
            let mut next = pin!(poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)));
            let frame = match self.unless_stopped(next.as_mut()).await? {
                None => return Ok(()),
                Some(Ok(frame)) => frame,
                Some(Err(_)) => return Err(StreamError::Body),
            };
            match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => self.stream.send_data(data).await?,
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        self.stream.send_trailers(trailers).await?;
                    }
                    return Ok(());
                }
            }
        }
    }
}

/// What may not be in a message of HTTP/3 (RFC 9114 §4.2).
const OF_CONNECTIONS: [HeaderName; 5] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.done {
            self.stream.stop_stream(Code::H3_INTERNAL_ERROR);
        }
    }
}

fn code(code: Code) -> VarInt {
    VarInt::from_u64(code.value()).unwrap_or(VarInt::MAX)
}

macro_rules! opaque {
    ($($name:ident),*) => {
        $(impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        })*
    };
}

opaque!(Connection, Exchange, Responder);

//! One endpoint as one worker uses it: its idle connections, and the lease of one for a request.

mod bulk;

use self::bulk::tried;
use crate::connect::{ConnectError, Connector, Sender, To};
use crate::gateways::{Gateways, Passage};
use crate::incoming::{IncomingBody, Transport};
use crate::peers::{HEAD_START, Path, Peer};
use crate::plain::{Plain, TCP_UPGRADE};
use crate::registry::EndpointState;
use crate::service::ServiceState;
use crate::slots::{ConnectionSlot, Slot};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::Body;
use hyper::client::conn::{http1, http2};
use leeward_policy::EndpointKey;
use leeward_policy::Via;
use leeward_policy::model::{ConnectionPool, Protocol, ZoneTransport};
use leeward_resilience::Standing;
use leeward_zone::{Link, StreamError};
use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use tokio_rustls::rustls::pki_types::ServerName;

/// One endpoint and this worker's connections to it.
pub struct Endpoint<B> {
    /// Its identity.
    pub key: EndpointKey,
    /// What all workers know of it.
    pub state: Arc<EndpointState>,
    service: Arc<ServiceState>,
    connector: Rc<Connector>,
    idle: RefCell<Vec<Idle<B>>>,
    bounds: Cell<Bounds>,
    shared: RefCell<Option<Shared<B>>>,
    /// Sweeps since the shared connection was asked for.
    quiet: Cell<u32>,
    /// Held while the shared connection is made, so that it is made once.
    making: Mutex<()>,
    /// A connection by TCP is made that nobody waits for.
    making_spare: Cell<bool>,
    /// The proxy in front of it, once it was asked for by QUIC.
    peer: OnceCell<Rc<Peer>>,
    /// The gateways by which alone it is reached, if it is so. Connections are theirs, then, and none is its own.
    pub(crate) gateways: Option<Box<RefCell<Gateways<B>>>>,
    /// The name that is sent to who is in front of it.
    server_name: Option<Box<ServerName<'static>>>,
}

/// Bounds on connections; see [`ConnectionPool`].
#[derive(Clone, Copy)]
struct Bounds {
    max_connections: u32,
    max_idle: usize,
    idle_timeout: Duration,
}

impl From<&ConnectionPool> for Bounds {
    fn from(pool: &ConnectionPool) -> Self {
        Self {
            max_connections: pool.max_connections,
            max_idle: usize::try_from(pool.max_idle_per_endpoint).unwrap_or(usize::MAX),
            idle_timeout: pool.idle_timeout,
        }
    }
}

struct Idle<B> {
    sender: http1::SendRequest<B>,
    slot: Arc<Slot>,
    since: Instant,
}

/// The connection that all requests by HTTP/2 share.
struct Shared<B> {
    sender: http2::SendRequest<B>,
    slot: Arc<Slot>,
}

/// Which connection is wanted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Connection {
    /// An idle one, or a new one.
    Any,
    /// A new one.
    New,
}

/// What a request wants of its connection.
#[derive(Clone, Copy, Debug)]
pub struct Wants {
    /// How the workload is spoken to, and proxies over TCP.
    pub protocol: Protocol,
    /// Whether an idle connection will do.
    pub connection: Connection,
    /// How the proxy in front of the endpoint is reached, if there is one.
    pub transport: ZoneTransport,
    /// It asks to change protocols, which only HTTP/1.1 over TCP can.
    pub upgrade: bool,
    /// Bytes of its body, where that is known.
    pub length: Option<u64>,
    /// Its answer is likely to be large, by those before; see [`Answers`](crate::Answers).
    pub large_answer: bool,
    /// Longest wait for a new connection.
    pub limit: Duration,
}

/// Bodies of this size and more go by TCP, where policy leaves the choice: the kernel takes larger pieces of it, which
/// costs less than half as much. Measured for two proxies in a row: 2.7 ms by QUIC, 1.05 ms by HTTP/1.1 over TLS.
const BULK: u64 = 1 << 20;

impl Wants {
    /// Whether QUIC may be tried for it.
    pub(crate) fn is_for_quic(&self) -> bool {
        !self.upgrade && self.transport != ZoneTransport::Tcp
    }

    /// Whether its body is known to be so large that it is worth waiting for a connection by TCP, where policy leaves the
    /// choice.
    fn is_large(&self) -> bool {
        self.transport == ZoneTransport::Auto && self.length.is_some_and(|length| length >= BULK)
    }

    /// Whether it is better off by TCP, where policy leaves the choice.
    fn is_bulk(&self) -> bool {
        self.is_large() || self.transport == ZoneTransport::Auto && self.large_answer
    }
}

/// A connection for one request.
pub struct Lease<B> {
    sender: Sender<B>,
    reused: bool,
    /// It is by TCP, since QUIC did not get through.
    fell_back: bool,
    /// It is by TCP, but could have gone by QUIC to this peer.
    instead_of: Option<Rc<Peer>>,
    endpoint: Rc<Endpoint<B>>,
}

/// An answer, and the connection that it comes on.
pub struct Sent<B> {
    /// The answer; its body is still coming.
    pub response: Response<IncomingBody>,
    /// Keep it until the body has ended.
    pub keep: Option<Keep<B>>,
}

/// An HTTP/1.1 connection whose answer is still coming. Give it back with [`Keep::give_back`] once the body
/// has been read to its end; dropped, the connection is closed.
pub struct Keep<B> {
    sender: http1::SendRequest<B>,
    slot: Arc<Slot>,
    endpoint: Rc<Endpoint<B>>,
}

/// What broke a request off, by transport.
#[derive(Debug, thiserror::Error)]
pub enum SendFault {
    /// HTTP over TCP.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// Another proxy, by QUIC.
    #[error(transparent)]
    Zone(#[from] StreamError),
}

impl SendFault {
    /// Whether the connection itself is gone, by what is known of it, and not only the request on it.
    pub const fn is_of_connection(&self) -> bool {
        match self {
            Self::Zone(StreamError::Lost(_)) => true,
            Self::Zone(StreamError::Reset(_) | StreamError::Body | StreamError::Violation(_))
            | Self::Http(_) => false,
        }
    }
}

/// Why a request got no answer.
pub enum SendError<B> {
    /// Not a byte of it was written; here it is again.
    Unsent(Box<Request<B>>),
    /// The peer refused it unprocessed (HTTP/2 REFUSED_STREAM or GOAWAY, or the zone protocol's REFUSED), so another
    /// try is safe.
    Refused(SendFault),
    /// Another proxy refused this one's certificate when it may have been on its way: nobody has looked at it, but of its body
    /// something may be gone.
    NotLetIn(SendFault),
    /// Its head is larger than what a proxy takes, or has more fields; nothing was written. No other proxy will take it.
    TooLarge(SendFault),
    /// It was written, wholly or in part. `reused`: on a connection that had served before, which the
    /// peer may have been closing.
    Broken {
        /// What it was.
        error: SendFault,
        /// Whether the connection had served before.
        reused: bool,
    },
}

impl<B> Endpoint<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    pub(crate) fn new(
        key: EndpointKey,
        state: Arc<EndpointState>,
        service: Arc<ServiceState>,
        connector: Rc<Connector>,
        bounds: &ConnectionPool,
    ) -> Self {
        Self {
            key,
            state,
            service,
            connector,
            idle: RefCell::default(),
            bounds: Cell::new(bounds.into()),
            shared: RefCell::default(),
            quiet: Cell::new(0),
            making: Mutex::new(()),
            making_spare: Cell::new(false),
            peer: OnceCell::new(),
            gateways: None,
            server_name: None,
        }
    }

    /// One that is reached through gateways, which [`Gateways::update`] names.
    pub(crate) fn by_gateways(mut self, gateways: Gateways<B>) -> Self {
        self.gateways = Some(Box::new(RefCell::new(gateways)));
        self
    }

    /// One whose front shows by a name, in TLS over TCP, which it is.
    pub(crate) fn named(mut self, name: Option<ServerName<'static>>) -> Self {
        self.server_name = name.map(Box::new);
        self
    }

    /// Whether there is a way to it, as far as gateways go.
    pub(crate) fn has_way(&self, now: Instant) -> bool {
        match &self.gateways {
            None => true,
            Some(gateways) => gateways.borrow().is_open(now),
        }
    }

    /// What is to tell of the gateway that an attempt goes by, if it goes by one.
    pub fn passage(&self) -> Option<Rc<Passage>> {
        self.gateways.as_ref().map(|_| Rc::default())
    }

    pub(crate) fn rebound(&self, bounds: &ConnectionPool) {
        self.bounds.set(bounds.into());
    }

    /// Room for one more connection, while the service has less than `max`.
    fn slot(&self, max: u32) -> Result<ConnectionSlot, ConnectError> {
        self.service
            .connection(max)
            .ok_or(ConnectError::Full { to: self.key.address })
    }

    /// A connection: one that is idle, if that is wanted, or a new one within `limit`. HTTP/2 connections that
    /// are closing are known to be, so there it makes no difference.
    ///
    /// Cancel-safe: dropping the future gives up the attempt to connect.
    ///
    /// # Errors
    ///
    /// [`ConnectError`]; nothing was sent.
    pub async fn lease(
        self: &Rc<Self>,
        wants: Wants,
        passage: Option<&Passage>,
    ) -> Result<Lease<B>, ConnectError> {
        match &self.gateways {
            None => self.lease_itself(wants).await,
            Some(gateways) => {
                let gateways = gateways.borrow().clone();
                // Not every endpoint's, so it doesn't belong in the size of every request's future.
                Box::pin(async move { gateways.lease(wants, passage).await }).await
            }
        }
    }

    /// The same, of one that is reached through no gateway.
    pub(crate) async fn lease_itself(self: &Rc<Self>, wants: Wants) -> Result<Lease<B>, ConnectError> {
        let Some(peer) = self.by_quic(wants)? else {
            return self.lease_tcp(wants).await;
        };
        if wants.is_bulk() && peer.prefers_tcp(now()) {
            let mut lease = self.lease_ready(wants);
            // Without a link QUIC has to be waited for as well, and how long that takes says nothing of TCP.
            if lease.is_none() && wants.is_large() && peer.usable().is_some() {
                // Rare, so it doesn't belong in the size of every request's future.
                lease = Box::pin(self.lease_while_patient(peer, wants)).await;
            }
            if let Some(mut lease) = lease {
                lease.instead_of = Some(Rc::clone(peer));
                return Ok(lease);
            }
            self.make_spare(peer, wants);
        }
        if let Some(link) = peer.usable() {
            return Ok(self.leased(Sender::Zone(link), false));
        }
        // Rare, so it doesn't belong in the size of every request's future.
        Box::pin(self.lease_new_link(peer, wants)).await
    }

    /// The proxy in front of the endpoint, if the request goes there by QUIC.
    fn by_quic(&self, wants: Wants) -> Result<Option<&Rc<Peer>>, ConnectError> {
        let wanted = wants.is_for_quic();
        let (Via::Proxy { address, zone, name }, true, Some(peers)) =
            (&self.key.via, wanted, self.connector.peers())
        else {
            return Ok(None);
        };
        let peer = match self.peer.get() {
            Some(peer) => peer,
            None => {
                let peer = peers.peer(*address, zone, name)?;
                self.peer.get_or_init(|| peer)
            }
        };
        Ok(Some(peer))
    }

    /// Waits for a new link; and, if policy leaves the choice, for a connection by TCP after a while: what is there
    /// first is taken. If that is TCP, this worker goes on with it for a while, and looks for QUIC beside it.
    async fn lease_new_link(
        self: &Rc<Self>,
        peer: &Rc<Peer>,
        wants: Wants,
    ) -> Result<Lease<B>, ConnectError> {
        let Some(peers) = self.connector.peers() else {
            return self.lease_tcp(wants).await;
        };
        self.connector.until_ready(peer.address(), wants.limit).await?;
        let linked = |link: Link| Ok(self.leased(Sender::Zone(link), false));
        if wants.transport == ZoneTransport::Quic {
            let mut going = peers.attempt(peer);
            return match tokio::time::timeout(wants.limit, peer.made(&mut going)).await {
                Ok(Ok(link)) => linked(link),
                Ok(Err(failed)) => Err(failed.into_error(peer.address())),
                Err(_) => Err(ConnectError::Timeout {
                    to: peer.address(),
                    limit: wants.limit,
                }),
            };
        }
        match peer.path(now()) {
            Path::Open => {}
            Path::Blocked => return self.lease_tcp(wants).await,
            Path::Forgotten => {
                // Nobody waits for it. Whoever comes while it goes on takes TCP as well.
                peers.attempt(peer);
                return self.lease_tcp(wants).await;
            }
        }
        let fallen_back = |lease: Result<Lease<B>, ConnectError>, refused: bool| {
            let mut lease = lease?;
            peer.block(now(), refused);
            lease.fell_back = true;
            Ok(lease)
        };
        let mut going = peers.attempt(peer);
        let made = tokio::time::timeout(peer.head_start(), peer.made(&mut going)).await;
        match made {
            Ok(Ok(link)) => return linked(link),
            Ok(Err(failed)) => return fallen_back(self.lease_tcp(wants).await, failed.was_answered()),
            Err(_) => {}
        }
        let mut tcp = std::pin::pin!(self.lease_tcp(wants));
        tokio::select! {
            biased;
            made = peer.made(&mut going) => match made {
                Ok(link) => linked(link),
                Err(failed) => fallen_back(tcp.await, failed.was_answered()),
            },
            lease = &mut tcp => {
                let more = match &lease {
                    // A bound of this side's on TCP.
                    Err(ConnectError::Full { .. }) => wants.limit,
                    // What another found by TCP may have been a while ago, but the peer may be gone, too.
                    Err(ConnectError::JustFailed { .. }) => HEAD_START,
                    // A peer that refuses TCP is not there: its QUIC is not waited for.
                    Ok(_) | Err(_) => return fallen_back(lease, false),
                };
                match tokio::time::timeout(more, peer.made(&mut going)).await {
                    Ok(Ok(link)) => linked(link),
                    Ok(Err(_)) | Err(_) => lease,
                }
            }
        }
    }

    fn lease_tcp(self: &Rc<Self>, wants: Wants) -> impl Future<Output = Result<Lease<B>, ConnectError>> {
        self.lease_tcp_within(wants, self.bounds.get().max_connections)
    }

    /// The same, where a new one is made only while the service has less than `max`.
    async fn lease_tcp_within(self: &Rc<Self>, wants: Wants, max: u32) -> Result<Lease<B>, ConnectError> {
        let Wants {
            protocol,
            connection: wanted,
            limit,
            ..
        } = wants;
        match protocol {
            Protocol::Http1 | Protocol::Tcp => {
                if wanted == Connection::Any
                    && let Some((sender, slot)) = self.pop_idle()
                {
                    return Ok(self.leased(Sender::Http1(sender, slot), true));
                }
                // Rare, so it doesn't belong in the size of every request's future.
                let connect = self
                    .connector
                    .connect(self.place(), protocol, self.slot(max)?, limit);
                Ok(self.leased(Box::pin(connect).await?, false))
            }
            Protocol::Http2 => match self.open_shared() {
                // What may be tried again on a new connection, since the peer may have been closing an idle one
                // (RFC 9112 §9.3.1), is HTTP/1.1's matter: HTTP/2 says so itself.
                Some(sender) => Ok(self.leased(Sender::Http2(sender), false)),
                None => Box::pin(self.make_shared(limit, max)).await,
            },
        }
    }

    async fn make_shared(self: &Rc<Self>, limit: Duration, max: u32) -> Result<Lease<B>, ConnectError> {
        let waited = self.making.try_lock().is_err();
        let _making = self.making.lock().await;
        if let Some(sender) = self.open_shared() {
            return Ok(self.leased(Sender::Http2(sender), false));
        }
        // The one that was waited for failed: its verdict is this one's, or a crowd of waiters would try
        // one after the other.
        if waited && self.state.standing(now()) != Standing::Healthy {
            return Err(ConnectError::JustFailed { to: self.key.address });
        }
        let place = self.slot(max)?;
        let slot = Arc::clone(place.slot());
        let sender = self
            .connector
            .connect(self.place(), Protocol::Http2, place, limit)
            .await?;
        if let Sender::Http2(sender) = &sender {
            let sender = sender.clone();
            *self.shared.borrow_mut() = Some(Shared { sender, slot });
        }
        Ok(self.leased(sender, false))
    }

    fn place(&self) -> To<'_> {
        To {
            address: self.key.address,
            via: &self.key.via,
            server_name: self.server_name.as_deref(),
        }
    }

    fn leased(self: &Rc<Self>, sender: Sender<B>, reused: bool) -> Lease<B> {
        Lease {
            sender,
            reused,
            fell_back: false,
            instead_of: None,
            endpoint: Rc::clone(self),
        }
    }

    /// The one used last, since the peer is least likely to be closing it.
    fn pop_idle(&self) -> Option<(http1::SendRequest<B>, Arc<Slot>)> {
        let mut idle = self.idle.borrow_mut();
        std::iter::from_fn(|| idle.pop())
            .find(|idle| !idle.sender.is_closed() && idle.slot.take())
            .map(|idle| (idle.sender, idle.slot))
    }

    fn open_shared(&self) -> Option<http2::SendRequest<B>> {
        self.quiet.set(0);
        let mut shared = self.shared.borrow_mut();
        shared.take_if(|shared| shared.sender.is_closed());
        shared.as_ref().map(|shared| shared.sender.clone())
    }

    /// Closes connections that are idle for too long, or whose certificates end; call about once a second. A shared one whose
    /// certificates end goes on with the streams that it has, and others take another. True if none is left that is
    /// used: a shared one that nobody asked for in a while ends with the streams that it has, once the endpoint is
    /// forgotten.
    pub(crate) fn sweep(&self, now: Instant) -> bool {
        if let Some(gateways) = &self.gateways {
            return gateways.borrow().sweep(now);
        }
        let limit = self.bounds.get().idle_timeout;
        let quiet = self.quiet.get().saturating_add(1);
        self.quiet.set(quiet);
        self.shared.borrow_mut().take_if(|shared| shared.slot.is_due(now));
        let forgotten = self.shared.borrow().is_none() || u64::from(quiet) > limit.as_secs();
        let mut idle = self.idle.borrow_mut();
        idle.retain(|idle| {
            let is_fresh = now.saturating_duration_since(idle.since) < limit && !idle.slot.is_due(now);
            !idle.sender.is_closed() && is_fresh
        });
        idle.is_empty() && forgotten
    }
}

impl<B> Lease<B> {
    /// The link, if it goes by QUIC.
    pub(crate) const fn link(&self) -> Option<&Link> {
        match &self.sender {
            Sender::Zone(link) => Some(link),
            Sender::Http1(..) | Sender::Http2(_) | Sender::Plain(_) => None,
        }
    }

    /// What it goes by.
    pub const fn transport(&self) -> Transport {
        match &self.sender {
            Sender::Http1(..) => Transport::Http1,
            Sender::Http2(_) => Transport::Http2,
            Sender::Zone(_) => Transport::Quic,
            Sender::Plain(_) => Transport::Tcp,
        }
    }

    /// Whether TCP had to do, since QUIC did not get through: told by the lease that found it out, not by those after it.
    pub const fn fell_back(&self) -> bool {
        self.fell_back
    }

    /// Nothing is sent on it now. What is shared is kept already.
    fn give_back(self, now: Instant) {
        if let Sender::Http1(sender, slot) = self.sender {
            let keep = Keep {
                sender,
                slot,
                endpoint: self.endpoint,
            };
            keep.give_back(now);
        }
    }
}

impl<B> Lease<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Sends a request and waits for the head of the answer.
    ///
    /// Dropping the future abandons the request: an HTTP/1.1 connection is closed, an HTTP/2 stream reset.
    ///
    /// # Errors
    ///
    /// [`SendError`] tells what may have reached the peer.
    pub async fn send(self, request: Box<Request<B>>) -> Result<Sent<B>, SendError<B>> {
        let Self {
            sender,
            reused,
            endpoint,
            instead_of,
            ..
        } = self;
        // How long a body takes says nothing of the path.
        let on_trial = instead_of.filter(|_| request.body().is_end_stream());
        match on_trial {
            None => transmit(sender, reused, endpoint, request).await,
            // Not every request's, so it doesn't belong in the size of every request's future.
            Some(peer) => Box::pin(tried(peer, transmit(sender, reused, endpoint, request))).await,
        }
    }
}

/// Sends a request on a connection, and waits for the head of the answer.
async fn transmit<B>(
    sender: Sender<B>,
    reused: bool,
    endpoint: Rc<Endpoint<B>>,
    request: Box<Request<B>>,
) -> Result<Sent<B>, SendError<B>>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match sender {
        Sender::Http1(mut sender, slot) => {
            // A connection whose last body has just ended may need one more turn of its task.
            if !sender.is_ready() && sender.ready().await.is_err() {
                return Err(SendError::Unsent(request));
            }
            match sender.try_send_request(*request).await {
                Ok(response) => Ok(Sent {
                    response: response.map(IncomingBody::Http),
                    keep: Some(Keep {
                        sender,
                        slot,
                        endpoint,
                    }),
                }),
                Err(error) => Err(failed(error, &endpoint.key.via, reused)),
            }
        }
        Sender::Http2(mut sender) => match sender.try_send_request(*request).await {
            Ok(response) => Ok(Sent {
                response: response.map(IncomingBody::Http),
                keep: None,
            }),
            Err(error) => Err(failed(error, &endpoint.key.via, reused)),
        },
        Sender::Plain(plain) => Ok(Sent {
            response: opened(plain),
            keep: None,
        }),
        Sender::Zone(link) => match link.send(request).await {
            Ok(response) => Ok(Sent {
                response: response.map(|body| IncomingBody::Zone(Box::new(body))),
                keep: None,
            }),
            Err(leeward_zone::SendError::Unsent(request)) => Err(SendError::Unsent(request)),
            Err(leeward_zone::SendError::Refused(error @ StreamError::Violation(_))) => {
                Err(SendError::TooLarge(error.into()))
            }
            Err(leeward_zone::SendError::Refused(error @ StreamError::Lost(_))) => {
                Err(SendError::NotLetIn(error.into()))
            }
            Err(leeward_zone::SendError::Refused(error)) => Err(SendError::Refused(error.into())),
            Err(leeward_zone::SendError::Broken(error)) => Err(SendError::Broken {
                error: error.into(),
                // Whether a link has served before says nothing about its end, as for HTTP/2.
                reused: false,
            }),
        },
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// What a connection of a TCP service has for an answer: the one that a proxy in front of it would give.
fn opened(plain: Box<Plain>) -> Response<IncomingBody> {
    let mut response = Response::new(IncomingBody::Plain(plain));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let protocol = HeaderValue::from_static(TCP_UPGRADE);
    response.headers_mut().insert(header::UPGRADE, protocol);
    response
}

fn failed<B>(
    mut error: hyper::client::conn::TrySendError<Request<B>>,
    via: &Via,
    reused: bool,
) -> SendError<B> {
    if let Some(request) = error.take_message() {
        return SendError::Unsent(Box::new(request));
    }
    let error = error.into_error();
    if is_refusal(&error) {
        SendError::Refused(error.into())
    } else if *via != Via::Direct && is_not_let_in(&error) {
        SendError::NotLetIn(error.into())
    } else {
        SendError::Broken {
            error: error.into(),
            reused,
        }
    }
}

/// Whether the peer said that it did not process the request (RFC 9113 §8.7).
fn is_refusal(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            return h2.reason() == Some(h2::Reason::REFUSED_STREAM)
                || h2.is_go_away() && h2.is_remote() && h2.reason() == Some(h2::Reason::NO_ERROR);
        }
        source = cause.source();
    }
    false
}

/// Whether the peer refused this side's certificate, which [`leeward_identity::Tied`] tells by its kind.
fn is_not_let_in(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    // The kernel's own is another.
    source.is_some_and(|cause| {
        cause.kind() == std::io::ErrorKind::PermissionDenied && cause.raw_os_error().is_none()
    })
}

impl<B> Keep<B> {
    /// Gives the connection back for the next request, if it is still open and there is room.
    pub fn give_back(self, now: Instant) {
        if self.sender.is_closed() || self.slot.is_due(now) {
            return;
        }
        let mut idle = self.endpoint.idle.borrow_mut();
        if idle.len() < self.endpoint.bounds.get().max_idle {
            self.slot.rest();
            idle.push(Idle {
                sender: self.sender,
                slot: self.slot,
                since: now,
            });
        }
    }
}

impl<B> std::fmt::Debug for Endpoint<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

//! Making connections: TCP to a workload, TLS with a known identity to another proxy.

use crate::coalesce::{Flushed, Flusher, coalesce};
use crate::peers::Peers;
use crate::plain::{Own, Owned, Plain};
use crate::slots::{ConnectionSlot, Slot};
use bytes::Bytes;
use http_body::Body;
use hyper::client::conn::{http1, http2};
use hyper::rt::{Read, Write};
use hyper_util::rt::TokioIo;
use leeward_identity::{Identity, InvalidSpiffeId, NotReady, SpiffeId, Tied};
use leeward_policy::model::Protocol;
use leeward_policy::{GatewayView, Via};
use leeward_zone::Link;
use socket2::{SockRef, TcpKeepalive};
use std::cell::Cell;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

/// Why there is no connection. Nothing of a request was sent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The system could not connect.
    #[error("cannot connect to {to}")]
    Tcp {
        /// Where to.
        to: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The peer is not who it should be, or does not speak our TLS.
    #[error("no TLS session with {peer} at {to}")]
    Tls {
        /// Where to.
        to: SocketAddr,
        /// Who should be there.
        peer: Box<str>,
        /// What the TLS library said.
        #[source]
        source: io::Error,
    },
    /// This proxy can't show who it is, so that no peer is to blame.
    #[error("no connection to {to}, since {source}")]
    Identity {
        /// Where to.
        to: SocketAddr,
        /// Why not.
        source: NotReady,
    },
    /// The HTTP handshake failed.
    #[error("no HTTP connection to {to}")]
    Http {
        /// Where to.
        to: SocketAddr,
        /// What hyper said.
        #[source]
        source: hyper::Error,
    },
    /// It took longer than the service's connect timeout.
    #[error("no connection to {to} within {limit:?}")]
    Timeout {
        /// Where to.
        to: SocketAddr,
        /// The limit.
        limit: Duration,
    },
    /// The service has as many connections as it may.
    #[error("no room for a connection to {to}: the service has as many as it may")]
    Full {
        /// Where to.
        to: SocketAddr,
    },
    /// The proxy's name can't stand in a SPIFFE id.
    #[error("{name} at {to} is no proxy that can be known")]
    Peer {
        /// Where to.
        to: SocketAddr,
        /// Who should be there.
        name: Box<str>,
        /// What is wrong.
        #[source]
        source: InvalidSpiffeId,
    },
    /// There is no link by QUIC, and policy wants no other.
    #[error("no link to {to}")]
    Quic {
        /// Where to.
        to: SocketAddr,
        /// What became of the attempt.
        #[source]
        source: Arc<leeward_zone::ConnectError>,
    },
    /// The endpoint is reached through gateways of its zone only, and none of them can be.
    #[error("no gateway of the zone can be reached")]
    NoGateway {
        /// What came of the last that was tried; `None`: none was, since all were found unreachable before.
        #[source]
        source: Option<Box<Self>>,
    },
    /// Another request of this worker has just found the endpoint unreachable.
    #[error("{to} was just found unreachable")]
    JustFailed {
        /// Where to.
        to: SocketAddr,
    },
}

/// Flow-control windows of HTTP/2: a stream's bounds what one slow reader can make the proxy hold.
const STREAM_WINDOW: u32 = 1 << 20;
/// A connection's bounds nothing of its own: many requests share it, and were it used up by readers that
/// stopped, all others would wait for them.
const CONNECTION_WINDOW: u32 = 1 << 30;

/// How long a connection waits for this proxy's own certificate to be good, as when the next is on its way.
const IDENTITY_WAIT: Duration = Duration::from_secs(1);

/// When the kernel asks a silent peer whether it is there, how often, and how long what was sent may stay
/// unanswered: a node that vanished closes nothing. HTTP/2's own pings would cost every frame a look at the clock.
const SILENT_AFTER: Duration = Duration::from_secs(15);
const ASK_EVERY: Duration = Duration::from_secs(5);
const UNANSWERED: Duration = Duration::from_secs(20);

/// Makes connections for one worker.
#[derive(Debug)]
pub struct Connector {
    identity: Option<Arc<Identity>>,
    peers: Option<Rc<Peers>>,
    open: Rc<Cell<usize>>,
    own: Arc<Owned>,
}

/// Where a connection goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct To<'a> {
    /// The workload.
    pub(crate) address: SocketAddr,
    /// Who is in front of it.
    pub(crate) via: &'a Via,
    /// The name by which who is in front of it may be told apart before its certificate is seen (SNI).
    pub(crate) server_name: Option<&'a ServerName<'static>>,
}

/// The sending half of an HTTP connection, by protocol.
pub(crate) enum Sender<B> {
    Http1(http1::SendRequest<B>, Arc<Slot>),
    Http2(http2::SendRequest<B>),
    Zone(Link),
    Plain(Box<Plain>),
}

/// Spawns on the worker's own thread what an HTTP/2 connection is made of. Its owner is the connection, which
/// ends it.
struct Local<T> {
    /// For the first future, which is the one that writes.
    flusher: Rc<Cell<Option<Flusher<T>>>>,
}

impl<T> Local<T> {
    fn new(flusher: Flusher<T>) -> Self {
        Self {
            flusher: Rc::new(Cell::new(Some(flusher))),
        }
    }
}

impl<T> Clone for Local<T> {
    fn clone(&self) -> Self {
        Self {
            flusher: Rc::clone(&self.flusher),
        }
    }
}

impl<F, T> hyper::rt::Executor<F> for Local<T>
where
    F: Future<Output = ()> + 'static,
    T: AsyncWrite + Unpin + 'static,
{
    fn execute(&self, future: F) {
        match self.flusher.take() {
            Some(flusher) => drop(tokio::task::spawn_local(Flushed::new(future, flusher))),
            None => drop(tokio::task::spawn_local(future)),
        }
    }
}

/// Counts an open connection, and holds its place among its service's, until it is dropped.
#[derive(Debug)]
pub(crate) struct Open {
    count: Rc<Cell<usize>>,
    slot: ConnectionSlot,
    _own: Own,
}

impl Open {
    /// Runs a connection to its end, or until it is to be closed.
    async fn run<E>(&self, connection: impl Future<Output = Result<(), E>>) -> Result<(), E> {
        let slot = self.slot.slot();
        let mut connection = std::pin::pin!(connection);
        let mut known = false;
        std::future::poll_fn(|cx| {
            // A task's waker stays the same.
            if !std::mem::replace(&mut known, true) {
                slot.wake_with(cx.waker());
            }
            if slot.is_closing() {
                return std::task::Poll::Ready(Ok(()));
            }
            connection.as_mut().poll(cx)
        })
        .await
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.count.set(self.count.get().saturating_sub(1));
    }
}

fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(tcp);
    let alive = TcpKeepalive::new()
        .with_time(SILENT_AFTER)
        .with_interval(ASK_EVERY);
    socket.set_tcp_keepalive(&alive)?;
    socket.set_tcp_user_timeout(Some(UNANSWERED))
}

impl Connector {
    /// A connector that presents `identity` to other proxies. Without one, endpoints behind another proxy
    /// can't be reached.
    pub fn new(identity: Option<Arc<Identity>>) -> Self {
        Self {
            peers: identity.clone().map(|identity| Rc::new(Peers::new(identity))),
            identity,
            open: Rc::new(Cell::new(0)),
            own: Arc::default(),
        }
    }

    /// The same, one of several of a process.
    pub(crate) fn among(self, own: Arc<Owned>) -> Self {
        Self { own, ..self }
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.open.get() + self.peers.as_ref().map_or(0, |peers| peers.open())
    }

    /// The proxies that can be reached by QUIC: all, if this one has an identity.
    pub(crate) const fn peers(&self) -> Option<&Rc<Peers>> {
        self.peers.as_ref()
    }

    /// The name by which a gateway may be told apart before its certificate is seen: `NAME.ZONE.TRUST-DOMAIN`, if that can
    /// be one.
    pub(crate) fn name_of(&self, gateway: &GatewayView) -> Option<ServerName<'static>> {
        let domain = self.identity.as_ref()?.id().trust_domain().to_owned();
        ServerName::try_from(format!("{}.{}.{domain}", gateway.name, gateway.zone)).ok()
    }

    /// Connects, within `limit`.
    pub(crate) async fn connect<B>(
        &self,
        place: To<'_>,
        protocol: Protocol,
        slot: ConnectionSlot,
        limit: Duration,
    ) -> Result<Sender<B>, ConnectError>
    where
        B: Body<Data = Bytes> + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let to = match place.via {
            Via::Direct => place.address,
            Via::Proxy { address, .. } => *address,
            // To one of its gateways, or not at all.
            Via::Gateway { .. } => return Err(ConnectError::NoGateway { source: None }),
        };
        if let Via::Proxy { .. } = place.via {
            self.until_ready(to, limit).await?;
        }
        match tokio::time::timeout(limit, self.establish(to, place, protocol, slot)).await {
            Ok(result) => result,
            Err(_) => Err(ConnectError::Timeout { to, limit }),
        }
    }

    /// Waits for this proxy's own certificate to be good, for a moment.
    pub(crate) async fn until_ready(&self, to: SocketAddr, limit: Duration) -> Result<(), ConnectError> {
        let Some(identity) = &self.identity else {
            return Ok(());
        };
        let Err(source) = identity.ready_now() else {
            return Ok(());
        };
        let wait = limit.min(IDENTITY_WAIT);
        let is_ready = tokio::time::timeout(wait, identity.wait_ready()).await.is_ok();
        if is_ready {
            Ok(())
        } else {
            Err(ConnectError::Identity { to, source })
        }
    }

    async fn establish<B>(
        &self,
        to: SocketAddr,
        place: To<'_>,
        protocol: Protocol,
        slot: ConnectionSlot,
    ) -> Result<Sender<B>, ConnectError>
    where
        B: Body<Data = Bytes> + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let tcp = TcpStream::connect(to)
            .await
            .map_err(|source| ConnectError::Tcp { to, source })?;
        tune(&tcp).map_err(|source| ConnectError::Tcp { to, source })?;
        let own = Own::of(&tcp, &self.own);
        if protocol == Protocol::Tcp && *place.via == Via::Direct {
            // On one machine a port that nobody listens on may be given to the very connection that asks for it,
            // which then is with itself.
            if tcp.local_addr().is_ok_and(|own| own == to) {
                let source = io::ErrorKind::ConnectionRefused.into();
                return Err(ConnectError::Tcp { to, source });
            }
            let open = self.counted(slot, own);
            return Ok(Sender::Plain(Box::new(Plain::new(tcp, open))));
        }
        let Via::Proxy { zone, name, .. } = place.via else {
            let open = self.counted(slot, own);
            return self.handshake(tcp, to, protocol, open).await;
        };
        let tls_error = |source| ConnectError::Tls {
            to,
            peer: format!("zone/{zone}/proxy/{name}").into(),
            source,
        };
        let identity = self.identity.as_ref().ok_or_else(|| {
            tls_error(io::Error::new(
                io::ErrorKind::NotFound,
                "this proxy has no identity to present",
            ))
        })?;
        let expect = SpiffeId::proxy(identity.id().trust_domain(), zone, name)
            .map_err(|e| tls_error(io::Error::new(io::ErrorKind::InvalidInput, e)))?;
        let alpn: &[&[u8]] = match protocol {
            Protocol::Http1 | Protocol::Tcp => &[b"http/1.1"],
            Protocol::Http2 => &[b"h2"],
        };
        let mut config = identity
            .client_config(alpn, &expect)
            .map_err(|e| tls_error(io::Error::other(e)))?;
        if place.server_name.is_some() {
            let mut named = (*config).clone();
            named.enable_sni = true;
            config = Arc::new(named);
        }
        let connector = TlsConnector::from(config);
        // Peers are known by SPIFFE id, so the name is not looked at; an address sends no SNI.
        let name = place
            .server_name
            .map_or_else(|| ServerName::from(to.ip()), ServerName::clone);
        let tls = connector.connect(name, tcp).await.map_err(tls_error)?;
        let shown = tls.get_ref().1.peer_certificates().unwrap_or_default();
        let tie = identity.tie(shown).map_err(|e| tls_error(io::Error::other(e)))?;
        let now = tokio::time::Instant::now().into_std();
        slot.slot().lasts(tie.lasts(), now);
        let open = self.counted(slot, own);
        self.handshake(Tied::new(tls, tie), to, protocol, open).await
    }

    fn counted(&self, slot: ConnectionSlot, own: Own) -> Open {
        self.open.set(self.open.get() + 1);
        Open {
            count: Rc::clone(&self.open),
            slot,
            _own: own,
        }
    }

    async fn handshake<T, B>(
        &self,
        io: T,
        to: SocketAddr,
        protocol: Protocol,
        open: Open,
    ) -> Result<Sender<B>, ConnectError>
    where
        T: tokio::io::AsyncRead + AsyncWrite + Unpin + Send + 'static,
        TokioIo<T>: Read + Write,
        B: Body<Data = Bytes> + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let failed = |source| ConnectError::Http { to, source };
        // A connection that ends with an error ends the requests on it with that error; there is nobody
        // else to tell.
        match protocol {
            // A request that asks for a change of protocols goes before the bytes.
            Protocol::Http1 | Protocol::Tcp => {
                let (sender, connection) = http1::Builder::new()
                    .handshake(TokioIo::new(io))
                    .await
                    .map_err(failed)?;
                let slot = Arc::clone(open.slot.slot());
                tokio::task::spawn_local(async move {
                    if let Err(error) = open.run(connection.with_upgrades()).await {
                        tracing::debug!(%to, %error, "upstream connection ended");
                    }
                });
                Ok(Sender::Http1(sender, slot))
            }
            Protocol::Http2 => {
                let (io, flusher) = coalesce(io);
                let (sender, connection) = http2::Builder::new(Local::new(flusher))
                    .initial_stream_window_size(STREAM_WINDOW)
                    .initial_connection_window_size(CONNECTION_WINDOW)
                    .max_header_list_size(64 << 10)
                    .handshake(TokioIo::new(io))
                    .await
                    .map_err(failed)?;
                tokio::task::spawn_local(async move {
                    let _open = open;
                    if let Err(error) = connection.await {
                        tracing::debug!(%to, %error, "upstream connection ended");
                    }
                });
                Ok(Sender::Http2(sender))
            }
        }
    }
}

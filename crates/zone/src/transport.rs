//! How QUIC is set up, and why so.

use crate::congestion::TolerantConfig;
use crate::error::ConnectError;
use leeward_identity::{Identity, IdentityError, SpiffeId};
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{IdleTimeout, TransportConfig, VarInt};
use rustls::pki_types::CertificateDer;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

/// The protocol's name in the TLS handshake.
pub const ALPN: &[u8] = b"leeward-zone/1";

/// How the rate of sending follows the path.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Congestion {
    /// By loss (RFC 9438), but for a few packets that are lost while there is no queue: those were lost for other reasons
    /// than load. On a path that is full this is Cubic.
    #[default]
    Tolerant,
    /// By all loss. What TCP does.
    Cubic,
    /// By measured bandwidth and delay: better on long paths that lose packets for other reasons than load, and
    /// experimental.
    Bbr,
}

/// Requests under way at once on one connection. Others wait for one to end.
pub(crate) const MAX_STREAMS: u32 = 1024;
/// Streams of one direction that a peer may open: one for control, and some for later revisions.
const MAX_UNI: u32 = 4;
/// What may be on its way at 1 Gbit/s and 100 ms, 12.5 MB, rounded up: bytes that are sent and not acknowledged.
const SEND_WINDOW: u64 = 16 << 20;
/// What one slow reader can make the proxy hold, as in HTTP/2 here; it takes up to three times as much memory, since
/// packets are kept as they came. Also the most that one body has on its way, 80 Mbit/s at 100 ms: thirteen such fill
/// 1 Gbit/s. Large bodies, where that is known beforehand, go by TCP (docs/zone-protocol.md).
const STREAM_WINDOW: u32 = 1 << 20;
/// Of a connection: not what the path holds, but so much that readers which stopped, 256 of them with all that they may
/// hold, don't keep others waiting.
const CONNECTION_WINDOW: u32 = 256 << 20;
/// A connection on which nothing comes is forgotten after this. Those in use are watched far more closely, and clients
/// close unused ones before: see `core`.
const IDLE: Duration = Duration::from_secs(60);
/// What the round trip is taken for until it is known. The default of a third of a second would have a lost first
/// packet sent again only after a second.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// The kernel's buffers for a worker's UDP socket. What it gives may be less (net.core.rmem_max, wmem_max).
const SOCKET_BUFFER: usize = 4 << 20;
/// Connections waiting for their handshake, of one worker; more are refused.
pub(crate) const MAX_HANDSHAKES: usize = 1024;
/// From this many on, a client has to show that it gets what is sent to its address before it costs a handshake.
pub(crate) const CHECK_ADDRESS_FROM: usize = 256;

/// The transport, as both sides have it.
pub(crate) fn transport(congestion: Congestion) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(MAX_UNI))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(SEND_WINDOW)
        .max_idle_timeout(IdleTimeout::try_from(IDLE).ok())
        .initial_rtt(INITIAL_RTT)
        // Nothing here uses datagrams.
        .datagram_receive_buffer_size(None);
    match congestion {
        Congestion::Tolerant => config.congestion_controller_factory(Arc::new(TolerantConfig::default())),
        Congestion::Cubic => {
            config.congestion_controller_factory(Arc::new(quinn::congestion::CubicConfig::default()))
        }
        Congestion::Bbr => {
            config.congestion_controller_factory(Arc::new(quinn::congestion::BbrConfig::default()))
        }
    };
    Arc::new(config)
}

/// A UDP socket of one worker. With `share`, others may be bound to the same address, and the kernel deals senders
/// out among them.
pub(crate) fn socket(address: SocketAddr, share: bool) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if share {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    let socket = UdpSocket::from(socket);
    enlarge(&socket);
    Ok(socket)
}

/// Asks for larger buffers. What the kernel gives is what there is: less means packets lost under load, not more.
fn enlarge(socket: &UdpSocket) {
    let socket = SockRef::from(socket);
    for set in [
        socket.set_recv_buffer_size(SOCKET_BUFFER),
        socket.set_send_buffer_size(SOCKET_BUFFER),
    ] {
        if let Err(error) = set {
            tracing::debug!(%error, "a UDP socket keeps its small buffers");
        }
    }
}

/// The certificates that a peer has shown in the handshake.
pub(crate) fn shown(quic: &quinn::Connection) -> Vec<CertificateDer<'static>> {
    quic.peer_identity()
        .and_then(|certs| certs.downcast::<Vec<CertificateDer<'static>>>().ok())
        .map(|certs| *certs)
        .unwrap_or_default()
}

/// Client configurations, kept for as long as the identity that they are from is the current one.
#[derive(Debug)]
pub(crate) struct ClientConfigs {
    identity: Arc<Identity>,
    transport: Arc<TransportConfig>,
    known: RefCell<HashMap<SpiffeId, (Arc<rustls::ClientConfig>, quinn::ClientConfig)>>,
}

/// Peers whose configuration is kept; past that all are made anew.
const MAX_CONFIGS: usize = 16_384;

impl ClientConfigs {
    pub(crate) fn new(identity: Arc<Identity>, congestion: Congestion) -> Self {
        Self {
            identity,
            transport: transport(congestion),
            known: RefCell::default(),
        }
    }

    /// Whose they are.
    pub(crate) const fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// How to connect to exactly this peer, with the identity of now.
    pub(crate) fn towards(&self, peer: &SpiffeId) -> Result<quinn::ClientConfig, ConnectError> {
        let tls = self
            .identity
            .client_config(&[ALPN], peer)
            .map_err(ConnectError::Identity)?;
        let mut known = self.known.borrow_mut();
        if let Some((of, config)) = known.get(peer)
            && Arc::ptr_eq(of, &tls)
        {
            return Ok(config.clone());
        }
        let crypto = QuicClientConfig::try_from(Arc::clone(&tls)).map_err(ConnectError::Suite)?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::clone(&self.transport));
        if known.len() >= MAX_CONFIGS {
            known.clear();
        }
        known.insert(peer.clone(), (tls, config.clone()));
        Ok(config)
    }
}

/// The server's configuration, kept likewise.
#[derive(Debug)]
pub(crate) struct ServerConfigs {
    identity: Arc<Identity>,
    transport: Arc<TransportConfig>,
    known: RefCell<Option<(Arc<rustls::ServerConfig>, Arc<quinn::ServerConfig>)>>,
}

/// Why there is no configuration for accepting.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoServerConfig {
    #[error("no identity")]
    Identity(#[source] IdentityError),
    #[error("no cipher suite")]
    Suite(#[source] NoInitialCipherSuite),
}

impl ServerConfigs {
    pub(crate) fn new(identity: Arc<Identity>, congestion: Congestion) -> Self {
        Self {
            identity,
            transport: transport(congestion),
            known: RefCell::new(None),
        }
    }

    /// Whose they are.
    pub(crate) const fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// How to accept, with the identity of now.
    pub(crate) fn current(&self) -> Result<Arc<quinn::ServerConfig>, NoServerConfig> {
        let tls = self
            .identity
            .server_config(&[ALPN])
            .map_err(NoServerConfig::Identity)?;
        let mut known = self.known.borrow_mut();
        if let Some((of, config)) = &*known
            && Arc::ptr_eq(of, &tls)
        {
            return Ok(Arc::clone(config));
        }
        let crypto = QuicServerConfig::try_from(Arc::clone(&tls)).map_err(NoServerConfig::Suite)?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config
            .transport_config(Arc::clone(&self.transport))
            .max_incoming(MAX_HANDSHAKES)
            .migration(true);
        let config = Arc::new(config);
        *known = Some((tls, Arc::clone(&config)));
        Ok(config)
    }
}

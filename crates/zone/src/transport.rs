//! How QUIC is set up, and why so.

use crate::congestion::TolerantConfig;
use crate::error::ConnectError;
use leeward_identity::{Identity, IdentityError, SpiffeId};
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustls::pki_types::CertificateDer;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
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
/// What IPv6 and UDP take of a packet.
const HEADERS: u16 = 40 + 8;
/// The largest payload of a packet over Ethernet.
const ETHERNET: u16 = 1500 - HEADERS;
/// The largest payload that is tried at all: that of a jumbo frame, as networks within a data centre have them. Six times
/// fewer packets are six times less work for each byte.
pub(crate) const JUMBO: u16 = 9000 - HEADERS;
/// The smallest difference that is tried for.
const LEAST_CHANGE: u16 = 20;
/// What every path of QUIC takes (RFC 9000, section 14).
const LEAST: u16 = 1200;
/// Connections waiting for their handshake, of one worker; more are refused.
pub(crate) const MAX_HANDSHAKES: usize = 1024;
/// From this many on, a client has to show that it gets what is sent to its address before it costs a handshake.
pub(crate) const CHECK_ADDRESS_FROM: usize = 256;

/// An endpoint, as both sides have it.
pub(crate) fn endpoint() -> io::Result<EndpointConfig> {
    let mut config = EndpointConfig::default();
    config
        .max_udp_payload_size(JUMBO)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    Ok(config)
}

/// The largest payload that may get through to an address, by what the system knows of the way there: the MTU of the link that it
/// goes out by, or less where a router has said so. What does get through is found by trying it.
fn largest_payload(to: SocketAddr) -> u16 {
    let mtu = path_mtu(to).unwrap_or_default();
    if mtu == 0 {
        return ETHERNET;
    }
    let payload = u16::try_from(mtu).unwrap_or(u16::MAX).saturating_sub(HEADERS);
    payload.clamp(LEAST, JUMBO)
}

#[cfg(target_os = "linux")]
fn path_mtu(to: SocketAddr) -> io::Result<u32> {
    // Sockets for both families know IPv4's by addresses of IPv6.
    let mut to = to;
    to.set_ip(to.ip().to_canonical());
    let any = match to {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = UdpSocket::bind(any)?;
    // Nothing is sent.
    socket.connect(to)?;
    Ok(match to {
        SocketAddr::V4(_) => rustix::net::sockopt::ip_mtu(&socket)?,
        SocketAddr::V6(_) => rustix::net::sockopt::ipv6_mtu(&socket)?,
    })
}

#[cfg(not(target_os = "linux"))]
fn path_mtu(_: SocketAddr) -> io::Result<u32> {
    Err(io::ErrorKind::Unsupported.into())
}

/// The transport, as both sides have it, for paths that may take packets up to `largest`.
fn transport(congestion: Congestion, largest: u16) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery
        .upper_bound(largest)
        // The larger they are the less is it worth to find the last byte: six probes for jumbo frames, and 1441 where the link takes
        // these and the way only what Ethernet does.
        .minimum_change((largest.saturating_sub(LEAST) / 36).max(LEAST_CHANGE));
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(MAX_UNI))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(SEND_WINDOW)
        .max_idle_timeout(IdleTimeout::try_from(IDLE).ok())
        .initial_rtt(INITIAL_RTT)
        .mtu_discovery_config(Some(discovery))
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
    transports: Transports,
    known: RefCell<HashMap<SpiffeId, (Arc<rustls::ClientConfig>, quinn::ClientConfig)>>,
}

/// Peers whose configuration is kept; past that all are made anew.
const MAX_CONFIGS: usize = 16_384;

impl ClientConfigs {
    pub(crate) fn new(identity: Arc<Identity>, congestion: Congestion) -> Self {
        Self {
            identity,
            transports: Transports::new(congestion),
            known: RefCell::default(),
        }
    }

    /// Whose they are.
    pub(crate) const fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// How to connect to exactly this peer at this address, with the identity of now.
    pub(crate) fn towards(
        &self,
        to: SocketAddr,
        peer: &SpiffeId,
    ) -> Result<quinn::ClientConfig, ConnectError> {
        let mut config = self.crypto(peer)?;
        config.transport_config(self.transports.towards(to));
        Ok(config)
    }

    fn crypto(&self, peer: &SpiffeId) -> Result<quinn::ClientConfig, ConnectError> {
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
        let config = quinn::ClientConfig::new(Arc::new(crypto));
        if known.len() >= MAX_CONFIGS {
            known.clear();
        }
        known.insert(peer.clone(), (tls, config.clone()));
        Ok(config)
    }
}

/// The transports for paths of each size that there is: one for Ethernet's, and perhaps one for each kind of network that has
/// another.
#[derive(Debug)]
struct Transports {
    congestion: Congestion,
    known: RefCell<BTreeMap<u16, Arc<TransportConfig>>>,
}

impl Transports {
    fn new(congestion: Congestion) -> Self {
        Self {
            congestion,
            known: RefCell::default(),
        }
    }

    fn towards(&self, to: SocketAddr) -> Arc<TransportConfig> {
        let largest = largest_payload(to);
        let mut known = self.known.borrow_mut();
        let made = known
            .entry(largest)
            .or_insert_with(|| transport(self.congestion, largest));
        Arc::clone(made)
    }
}

/// The server's configuration, kept likewise.
#[derive(Debug)]
pub(crate) struct ServerConfigs {
    identity: Arc<Identity>,
    transports: Transports,
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
            transports: Transports::new(congestion),
            known: RefCell::new(None),
        }
    }

    /// Whose they are.
    pub(crate) const fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// How to accept a client at this address, with the identity of now.
    pub(crate) fn towards(&self, from: SocketAddr) -> Result<Arc<quinn::ServerConfig>, NoServerConfig> {
        let mut config = (*self.current()?).clone();
        config.transport_config(self.transports.towards(from));
        Ok(Arc::new(config))
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
        config.max_incoming(MAX_HANDSHAKES).migration(true);
        let config = Arc::new(config);
        *known = Some((tls, Arc::clone(&config)));
        Ok(config)
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_system_knows_what_its_links_take() {
        // The loopback takes 64 KiB, which is more than is tried; and IPv4 is the same by addresses of IPv6.
        for to in ["127.0.0.1:1", "[::ffff:127.0.0.1]:1"] {
            assert_eq!(largest_payload(to.parse().unwrap()), JUMBO, "{to}");
        }
    }
}

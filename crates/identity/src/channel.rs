//! The way to a control plane.

use crate::bundle::Bundle;
use crate::identity::Identity;
use crate::join::{Joining, guest_config};
use crate::spiffe::SpiffeId;
use crate::verify::{PeerError, peer_id};
use hyper_util::rt::TokioIo;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::transport::{Channel, Endpoint, Uri};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a silent control plane is asked whether it is there.
const PING_EVERY: Duration = Duration::from_secs(10);
/// How long it may take to say so.
const PONG_WITHIN: Duration = Duration::from_secs(20);

/// A channel to the control plane at an address. It connects when it is first used, and again after a
/// connection was lost; the peer must be the trust domain's control plane.
pub fn connect_lazy(identity: Arc<Identity>, control: SocketAddr) -> Channel {
    endpoint().connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let identity = Arc::clone(&identity);
        async move {
            let expect = SpiffeId::control(identity.id().trust_domain()).map_err(io::Error::other)?;
            let config = identity
                .client_config(&[b"h2"], &expect)
                .map_err(io::Error::other)?;
            connect(config, control).await
        }
    }))
}

/// A channel to the control plane at an address, for one that has no certificate yet: it is good for joining only.
pub fn join_lazy(joining: Joining, control: SocketAddr) -> Channel {
    endpoint().connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let joining = joining.clone();
        async move {
            let config = joining.client_config().map_err(io::Error::other)?;
            connect(config, control).await
        }
    }))
}

/// A channel to the control plane at an address, for one that shows no certificate: its calls carry tokens. The control plane
/// is known by roots of its trust domain.
///
/// # Errors
///
/// If the roots name no trust domain.
pub fn guest_lazy(roots: Bundle, control: SocketAddr) -> Result<Channel, PeerError> {
    let root = roots.roots().first().map(|root| root.cert.clone());
    let domain = peer_id(root.as_slice())?;
    let expect = SpiffeId::control(domain.trust_domain())?;
    Ok(
        endpoint().connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let config = guest_config(roots.clone(), expect.clone(), &[b"h2"]);
            async move { connect(config.map_err(io::Error::other)?, control).await }
        })),
    )
}

/// A channel to an agent on this node, at a Unix socket. Whoever may write there is asked, and the system tells it who asks.
pub fn agent_lazy(socket: PathBuf) -> Channel {
    endpoint().connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    }))
}

fn endpoint() -> Endpoint {
    // The name is not looked at: peers are known by SPIFFE id.
    Endpoint::from(Uri::from_static("http://leeward-control"))
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PONG_WITHIN)
        .keep_alive_while_idle(true)
}

async fn connect(
    config: Arc<ClientConfig>,
    control: SocketAddr,
) -> io::Result<TokioIo<tokio_rustls::client::TlsStream<TcpStream>>> {
    let stream = TcpStream::connect(control).await?;
    stream.set_nodelay(true)?;
    let stream = TlsConnector::from(config)
        .connect(ServerName::from(control.ip()), stream)
        .await?;
    Ok(TokioIo::new(stream))
}

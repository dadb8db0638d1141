//! Accepting connections from other parts of the mesh, for servers that tonic runs.

use crate::identity::Identity;
use crate::spiffe::SpiffeId;
use crate::verify::peer_id;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

/// Who is at the other end.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// Its verified id.
    pub id: SpiffeId,
    /// Where from.
    pub address: SocketAddr,
}

/// An accepted connection that knows its peer.
#[derive(Debug)]
pub struct Accepted {
    stream: TlsStream<TcpStream>,
    peer: PeerInfo,
}

/// Makes the provider of cryptography that this crate uses that of every TLS connection of the process, for libraries
/// that take it from there. Idempotent.
pub fn install_provider() {
    // Who came first has installed one.
    let _ = aws_lc_rs::default_provider().install_default();
}

/// Handshakes under way at once; more wait in the kernel's queue.
const HANDSHAKES: usize = 256;
/// Longest handshake.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Accepts connections until the receiver is dropped. Handshakes run side by side, so that a slow client
/// holds up nobody.
pub fn incoming(
    listener: TcpListener,
    identity: Arc<Identity>,
    alpn: &'static [&'static [u8]],
) -> mpsc::Receiver<io::Result<Accepted>> {
    let (ready, accepted) = mpsc::channel(HANDSHAKES);
    // Its owner is the receiver: it ends when that is dropped.
    tokio::spawn(async move {
        let slots = Arc::new(Semaphore::new(HANDSHAKES));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return;
            };
            let (stream, address) = tokio::select! {
                () = ready.closed() => return,
                next = listener.accept() => match next {
                    Ok(next) => next,
                    Err(error) => {
                        tracing::warn!(%error, "can't accept");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            let (identity, ready) = (Arc::clone(&identity), ready.clone());
            tokio::spawn(async move {
                match accept(stream, address, &identity, alpn).await {
                    // A receiver that is gone wants no more connections.
                    Ok(accepted) => drop(ready.send(Ok(accepted)).await),
                    Err(error) => tracing::warn!(%address, %error, "connection refused"),
                }
                drop(slot);
            });
        }
    });
    accepted
}

async fn accept(
    stream: TcpStream,
    address: SocketAddr,
    identity: &Identity,
    alpn: &[&[u8]],
) -> io::Result<Accepted> {
    stream.set_nodelay(true)?;
    let config = identity.server_config(alpn).map_err(io::Error::other)?;
    let stream = tokio::time::timeout(TIMEOUT, TlsAcceptor::from(config).accept(stream)).await??;
    let certs = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let id = peer_id(certs).map_err(io::Error::other)?;
    Ok(Accepted {
        stream,
        peer: PeerInfo { id, address },
    })
}

impl Accepted {
    /// Who is at the other end.
    pub fn peer(&self) -> &PeerInfo {
        &self.peer
    }
}

impl Connected for Accepted {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

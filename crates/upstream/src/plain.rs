//! A connection of a TCP service: bytes, and its place among the service's connections.

use crate::connect::Open;
use leeward_policy::canonical;
use socket2::SockRef;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Says in the upgrade of a request between proxies that bytes follow, for a workload that speaks no HTTP.
pub const TCP_UPGRADE: &str = "leeward-tcp";

/// A TCP connection to a workload, or to where a workload meant to go.
#[derive(Debug)]
pub struct Plain {
    stream: TcpStream,
    _open: Open,
}

/// One of this process's own connections, while it is there: what is captured of it is the proxy's.
#[derive(Debug)]
pub(crate) struct Own {
    ends: Option<Ends>,
    all: Arc<Owned>,
}

/// Where a connection comes from, and where it was meant to go. Either alone is no name: a system gives a port to several
/// connections that go to different places.
pub(crate) type Ends = (SocketAddr, SocketAddr);

/// This process's TCP connections.
pub(crate) type Owned = dashmap::DashSet<Ends>;

/// As sockets of either family have them.
pub(crate) fn ends(from: SocketAddr, to: SocketAddr) -> Ends {
    (canonical(from), canonical(to))
}

impl Own {
    pub(crate) fn of(stream: &TcpStream, all: &Arc<Owned>) -> Self {
        let ends = stream
            .local_addr()
            .and_then(|from| Ok(ends(from, stream.peer_addr()?)))
            .ok();
        if let Some(ends) = ends {
            all.insert(ends);
        }
        Self {
            ends,
            all: Arc::clone(all),
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(ends) = &self.ends {
            self.all.remove(ends);
        }
    }
}

impl Plain {
    pub(crate) const fn new(stream: TcpStream, open: Open) -> Self {
        Self { stream, _open: open }
    }

    /// Lets it end in a reset, and not as if all had been said.
    pub fn reset(&self) {
        reset(&self.stream);
    }
}

/// Lets a connection end in a reset once it is dropped.
pub fn reset(stream: &TcpStream) {
    // One that is gone already needs none.
    drop(SockRef::from(stream).set_linger(Some(Duration::ZERO)));
}

impl AsyncRead for Plain {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Plain {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

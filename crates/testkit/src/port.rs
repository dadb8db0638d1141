//! Ports that stay a test's own while nothing listens on them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use tokio::net::{TcpListener, TcpSocket};

/// A port, of 127.0.0.1 unless it was asked for elsewhere, that is reserved: connections to it are refused until something listens there, and no
/// other process is given it by chance.
#[derive(Debug)]
pub struct Port {
    // Bound and never listening; every listener beside it is bound with SO_REUSEADDR too.
    _reserved: TcpSocket,
    address: SocketAddr,
}

/// Connections waiting to be accepted.
const BACKLOG: u32 = 1024;

impl Port {
    /// Reserves a free port.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn reserve() -> io::Result<Self> {
        Self::reserve_at(Ipv4Addr::LOCALHOST.into())
    }

    /// Reserves a free port of an address of this host.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn reserve_at(address: IpAddr) -> io::Result<Self> {
        let reserved = bound(SocketAddr::from((address, 0)))?;
        let address = reserved.local_addr()?;
        Ok(Self {
            _reserved: reserved,
            address,
        })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Listens on it.
    ///
    /// # Errors
    ///
    /// What the system says, such as that something listens there already.
    pub fn listen(&self) -> io::Result<TcpListener> {
        bound(self.address)?.listen(BACKLOG)
    }
}

fn bound(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

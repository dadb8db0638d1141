//! Accepting connections from other parts of the mesh, for servers that tonic runs.

use crate::identity::Identity;
use crate::revoked::Tied;
use crate::spiffe::SpiffeId;
use crate::validity::Validity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::server::Acceptor;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor};
use tonic::transport::server::Connected;

/// The protocol of those who have no certificate yet and want to join. Nothing else is asked in it.
pub const JOIN_ALPN: &[u8] = b"leeward-join/1";

/// Who is at the other end.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// Its verified id.
    pub id: SpiffeId,
    /// Where from.
    pub address: SocketAddr,
    /// From when on its certificate is good.
    pub not_before: SystemTime,
    /// When its certificate ends, which may be before the connection does.
    pub not_after: SystemTime,
    /// Its certificates as it showed them. Whether they still count is to be asked where that matters: the connection may
    /// have outlived their root.
    pub chain: Arc<[CertificateDer<'static>]>,
}

/// Who is at the other end of a connection for joining: anybody.
#[derive(Clone, Debug)]
pub struct StrangerInfo {
    /// Where from.
    pub address: SocketAddr,
}

/// Who is at the other end of a connection without a certificate: whoever its requests show to be there.
#[derive(Clone, Debug)]
pub struct GuestInfo {
    /// Where from.
    pub address: SocketAddr,
}

/// An accepted connection that knows its peer, and breaks off when its certificate is revoked.
#[derive(Debug)]
pub struct Accepted {
    stream: Tied<TlsStream<TcpStream>>,
    peer: PeerInfo,
}

/// An accepted connection from somebody who has no certificate.
#[derive(Debug)]
pub struct Stranger {
    stream: TlsStream<TcpStream>,
    address: SocketAddr,
    /// Its place among those that there may be.
    _place: OwnedSemaphorePermit,
}

/// An accepted connection from somebody who shows no certificate, and is to say in each request who it is.
#[derive(Debug)]
pub struct Guest {
    stream: TlsStream<TcpStream>,
    address: SocketAddr,
    /// Its place among those that there may be.
    _place: OwnedSemaphorePermit,
}

/// Who is let in beside peers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Others {
    /// Those who ask for [`JOIN_ALPN`].
    pub strangers: bool,
    /// Those who show no certificate and ask for what peers ask for.
    pub guests: bool,
}

/// Accepted connections. Those of strangers and of guests come apart, so that no service can take one for a peer's. Where they
/// aren't let in, none ever comes.
#[derive(Debug)]
pub struct Incoming {
    /// From peers.
    pub peers: mpsc::Receiver<io::Result<Accepted>>,
    /// From strangers.
    pub strangers: mpsc::Receiver<io::Result<Stranger>>,
    /// From guests.
    pub guests: mpsc::Receiver<io::Result<Guest>>,
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
/// Connections of strangers at once; more are closed.
const STRANGERS: usize = 64;
/// Connections of guests at once; more are closed.
const GUESTS: usize = 256;

/// Accepts connections of peers until the receiver is dropped. Handshakes run side by side, so that a slow client
/// holds up nobody.
pub fn incoming(
    listener: TcpListener,
    identity: Arc<Identity>,
    alpn: &'static [&'static [u8]],
) -> mpsc::Receiver<io::Result<Accepted>> {
    let (peers, accepted) = mpsc::channel(HANDSHAKES);
    let doors = Doors {
        identity,
        alpn,
        peers,
        strangers: None,
        guests: None,
    };
    // Its owner is the receiver: it ends when that is dropped.
    tokio::spawn(doors.open(listener));
    accepted
}

/// The same, and of others, until the peers' receiver is dropped.
pub fn incoming_with(
    listener: TcpListener,
    identity: Arc<Identity>,
    alpn: &'static [&'static [u8]],
    others: Others,
) -> Incoming {
    let (peers, accepted) = mpsc::channel(HANDSHAKES);
    let (strangers, unknown) = mpsc::channel(STRANGERS);
    let (guests, unshown) = mpsc::channel(GUESTS);
    let doors = Doors {
        identity,
        alpn,
        peers,
        strangers: others.strangers.then(|| Side::new(strangers, STRANGERS)),
        guests: others.guests.then(|| Side::new(guests, GUESTS)),
    };
    // Its owner is the receiver, as above.
    tokio::spawn(doors.open(listener));
    Incoming {
        peers: accepted,
        strangers: unknown,
        guests: unshown,
    }
}

/// Where connections go.
#[derive(Clone)]
struct Doors {
    identity: Arc<Identity>,
    alpn: &'static [&'static [u8]],
    peers: mpsc::Sender<io::Result<Accepted>>,
    strangers: Option<Side<Stranger>>,
    guests: Option<Side<Guest>>,
}

/// A door beside that of peers.
struct Side<T> {
    ready: mpsc::Sender<io::Result<T>>,
    places: Arc<Semaphore>,
}

impl<T> Clone for Side<T> {
    fn clone(&self) -> Self {
        Self {
            ready: self.ready.clone(),
            places: Arc::clone(&self.places),
        }
    }
}

impl<T> Side<T> {
    fn new(ready: mpsc::Sender<io::Result<T>>, places: usize) -> Self {
        let places = Arc::new(Semaphore::new(places));
        Self { ready, places }
    }

    fn place(&self, why: &'static str) -> io::Result<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.places).try_acquire_owned();
        place.map_err(|_| io::Error::other(why))
    }
}

impl Doors {
    async fn open(self, listener: TcpListener) {
        let slots = Arc::new(Semaphore::new(HANDSHAKES));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return;
            };
            let (stream, address) = tokio::select! {
                () = self.peers.closed() => return,
                next = listener.accept() => match next {
                    Ok(next) => next,
                    Err(error) => {
                        tracing::warn!(%error, "can't accept");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            let doors = self.clone();
            tokio::spawn(async move {
                let let_in = tokio::time::timeout(TIMEOUT, doors.let_in(stream, address)).await;
                if let Err(error) = let_in.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    tracing::warn!(%address, %error, "connection refused");
                }
                drop(slot);
            });
        }
    }

    async fn let_in(&self, stream: TcpStream, address: SocketAddr) -> io::Result<()> {
        stream.set_nodelay(true)?;
        // Who has waited for longer than it would is gone again. A handshake for nobody would keep those waiting who are
        // there, until they go as well.
        stream.readable().await?;
        if has_left(&stream) {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "it has left before its turn",
            ));
        }
        let config = match &self.guests {
            None => self.identity.server_config(self.alpn),
            Some(_) => self.identity.open_server_config(self.alpn),
        };
        let config = config.map_err(io::Error::other)?;
        let stream = match &self.strangers {
            None => TlsAcceptor::from(config).accept(stream).await?,
            Some(strangers) => {
                let started = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
                let hello = started.client_hello();
                let joins = hello
                    .alpn()
                    .is_some_and(|mut names| names.any(|name| name == JOIN_ALPN));
                if joins {
                    let place = strangers.place("too many that join at once; it may try again")?;
                    let config = self.identity.join_config().map_err(io::Error::other)?;
                    let stream = started.into_stream(config).await?;
                    let stranger = Stranger {
                        stream,
                        address,
                        _place: place,
                    };
                    // A receiver that is gone wants no more connections.
                    drop(strangers.ready.send(Ok(stranger)).await);
                    return Ok(());
                }
                started.into_stream(config).await?
            }
        };
        let certs = stream.get_ref().1.peer_certificates().unwrap_or_default();
        if let Some(guests) = self.guests.as_ref().filter(|_| certs.is_empty()) {
            let place = guests.place("too many without a certificate at once; it may try again")?;
            let guest = Guest {
                stream,
                address,
                _place: place,
            };
            // As above.
            drop(guests.ready.send(Ok(guest)).await);
            return Ok(());
        }
        let tie = self.identity.tie(certs).map_err(io::Error::other)?;
        let Validity {
            not_before,
            not_after,
        } = tie.validity();
        let peer = PeerInfo {
            id: tie.id().clone(),
            address,
            not_before,
            not_after,
            chain: certs.iter().map(|cert| cert.clone().into_owned()).collect(),
        };
        let stream = Tied::new(stream, tie);
        // As above.
        drop(self.peers.send(Ok(Accepted { stream, peer })).await);
        Ok(())
    }
}

/// Whether a client has closed its end, whatever it said before.
fn has_left(stream: &TcpStream) -> bool {
    let mut looked_at = [PollFd::new(stream, PollFlags::RDHUP)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // Where that can't be seen, the handshake will show it.
    poll(&mut looked_at, Some(&at_once)).is_ok_and(|found| found > 0)
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

impl Connected for Stranger {
    type ConnectInfo = StrangerInfo;

    fn connect_info(&self) -> StrangerInfo {
        let address = self.address;
        StrangerInfo { address }
    }
}

impl Connected for Guest {
    type ConnectInfo = GuestInfo;

    fn connect_info(&self) -> GuestInfo {
        let address = self.address;
        GuestInfo { address }
    }
}

macro_rules! through_its_stream {
    ($connection:ty) => {
        impl AsyncRead for $connection {
            fn poll_read(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                Pin::new(&mut self.stream).poll_read(cx, buf)
            }
        }

        impl AsyncWrite for $connection {
            fn poll_write(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &[u8],
            ) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.stream).poll_write(cx, buf)
            }

            fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.stream).poll_flush(cx)
            }

            fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.stream).poll_shutdown(cx)
            }
        }
    };
}

through_its_stream!(Accepted);
through_its_stream!(Stranger);
through_its_stream!(Guest);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Authority;
    use crate::scratch::Scratch;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn no_handshake_is_made_for_one_who_has_left_before_its_turn() {
        let scratch = Scratch::new();
        let authority = Authority::create(&scratch.dir("ca"), "leeward.test").unwrap();
        let id = SpiffeId::control("leeward.test").unwrap();
        let life = Duration::from_secs(60);
        authority.issue(&id, life, &scratch.dir("control")).unwrap();
        let (peers, _accepted) = mpsc::channel(1);
        let doors = Doors {
            identity: Identity::load(scratch.dir("control")).unwrap(),
            alpn: &[b"h2"],
            peers,
            strangers: None,
            guests: None,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // What it says is nothing that a handshake would take; so that it isn't looked at is seen by the error.
        for says in [b"".as_slice(), b"a hello"] {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(says).await.unwrap();
            drop(client);
            let (stream, from) = listener.accept().await.unwrap();
            let error = doors.let_in(stream, from).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{error}");
        }
    }
}

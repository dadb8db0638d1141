//! What the two processes say to each other: one JSON object in each packet, with sockets beside it.

use crate::degrade::Handed;
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt,
};
use serde::{Deserialize, Serialize};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// The version of this protocol. Processes of different versions don't hand over to each other.
pub(super) const VERSION: u32 = 1;
/// Largest packet, in bytes; the largest in use is a refusal.
const MAX_PACKET: usize = 16 << 10;
/// Levels in an offer, at most, so that it fits a packet: names have 63 bytes.
pub(super) const MAX_LEVELS: usize = 64;
/// Sockets in one packet, at most; the kernel's limit is 253 (SCM_MAX_FD).
pub(super) const MAX_SOCKETS: usize = 64;

/// One packet.
#[derive(Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// From the successor, first.
    Hello { version: u32, pid: u32, build: String },
    /// From the predecessor at any time: nothing is handed over, for this reason.
    Refused { reason: String },
    /// From the predecessor, in answer to a hello.
    Offer(Offer),
    /// From the predecessor, after the offer, as often as that says: sockets of one kind are beside it.
    Sockets(Of),
    /// From the successor: it accepts from the sockets, and serves as policy wants.
    Ready {},
    /// From the predecessor: it has let go of them.
    Yours {},
}

/// What a successor is to match, and what it gets.
#[derive(Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Offer {
    pub(super) version: u32,
    pub(super) pid: u32,
    pub(super) build: String,
    /// The generation of the policy in force; `None` for no policy.
    pub(super) generation: Option<u64>,
    /// The store that it is from; empty for files.
    pub(super) store_id: String,
    /// How many packets with sockets follow.
    pub(super) packets: usize,
    /// The levels of degradation past the normal ones, at most [`MAX_LEVELS`]. Builds that don't know them yet say
    /// nothing, and hear nothing of them.
    #[serde(default)]
    pub(super) levels: Vec<Handed>,
}

/// What sockets are for.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Of {
    Outbound,
    Inbound,
    Capture,
    Tcp,
    Admin,
    Ofrep,
    /// Those of gateways, each at its own address. Builds that don't know them don't take over while there are some.
    Gateway,
    /// Where processes of the node are given certificates. Builds that don't know it don't take over while there is one.
    Workloads,
    /// The place where the next successor asks.
    Place,
}

/// A connection between the two. The type is of a stream, but the socket keeps packets apart (SOCK_SEQPACKET):
/// sockets that are sent beside a packet come with that one, and there is nothing to frame.
#[derive(Debug)]
pub(super) struct Channel(UnixStream);

/// Why a packet can't be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// The other side has closed the connection, or is gone.
    #[error("the other process closed the connection")]
    Closed,
    /// The connection failed.
    #[error("the connection to the other process failed")]
    Io(#[source] io::Error),
    /// What came is no message.
    #[error("the other process sent what is no message of version {VERSION}: {0}")]
    Nonsense(String),
}

impl Channel {
    /// Over a connected socket that doesn't block.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        UnixStream::from_std(StdUnixStream::from(socket)).map(Self)
    }

    /// The same, accepted by a listener that keeps packets apart.
    pub(super) fn accepted(socket: UnixStream) -> Self {
        Self(socket)
    }

    /// Whether the process at the other end may have this one's traffic: it runs as the same user, or as root.
    pub(super) fn check_peer(&self) -> io::Result<()> {
        let peer = sockopt::socket_peercred(&self.0)?;
        if peer.uid.is_root() || peer.uid == rustix::process::geteuid() {
            return Ok(());
        }
        let uid = peer.uid.as_raw();
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("the other process runs as user {uid}, which is neither this one's nor root"),
        ))
    }

    /// Sends a message with at most [`MAX_SOCKETS`] sockets beside it. Cancel-safe.
    pub(super) async fn send(&self, message: &Message, sockets: &[BorrowedFd<'_>]) -> Result<(), Broken> {
        let packet = serde_json::to_vec(message).map_err(|error| Broken::Io(error.into()))?;
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
            let mut beside = SendAncillaryBuffer::new(&mut space);
            if !sockets.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(sockets)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            sendmsg(
                &self.0,
                &[IoSlice::new(&packet)],
                &mut beside,
                SendFlags::NOSIGNAL,
            )?;
            Ok(())
        };
        match self.0.async_io(Interest::WRITABLE, send).await {
            Ok(()) => Ok(()),
            Err(error) => Err(broken(error)),
        }
    }

    /// Sends a message, and receives the next. What the other side said before it closed the connection is
    /// received also when it doesn't hear this any more.
    pub(super) async fn ask(&self, message: &Message) -> Result<(Message, Vec<OwnedFd>), Broken> {
        match self.send(message, &[]).await {
            Ok(()) | Err(Broken::Closed) => self.receive().await,
            Err(broken) => Err(broken),
        }
    }

    /// The next message, and the sockets beside it. Cancel-safe: a packet is taken whole or not at all.
    pub(super) async fn receive(&self) -> Result<(Message, Vec<OwnedFd>), Broken> {
        let mut packet = vec![0; MAX_PACKET];
        let mut sockets = Vec::new();
        let mut receive_once = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
            let mut beside = RecvAncillaryBuffer::new(&mut space);
            let got = recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut packet)],
                &mut beside,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            for message in beside.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    sockets.extend(rights);
                }
            }
            Ok((got.bytes, got.flags))
        };
        let receive = || match receive_once() {
            // Told once, and before what the other side said last: it closed without having read everything.
            Err(Errno::CONNRESET) => Ok(receive_once()?),
            received => Ok(received?),
        };
        let (length, flags) = self
            .0
            .async_io(Interest::READABLE, receive)
            .await
            .map_err(broken)?;
        if length == 0 {
            // No message is empty, so this is the end.
            return Err(Broken::Closed);
        }
        if flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(Broken::Nonsense("a packet that is too large".to_owned()));
        }
        let packet = packet.get(..length).unwrap_or_default();
        let message = serde_json::from_slice(packet).map_err(|error| Broken::Nonsense(error.to_string()))?;
        Ok((message, sockets))
    }
}

fn broken(error: io::Error) -> Broken {
    let closed = [Errno::PIPE, Errno::CONNRESET, Errno::NOTCONN];
    if closed
        .iter()
        .any(|e| error.raw_os_error() == Some(e.raw_os_error()))
    {
        Broken::Closed
    } else {
        Broken::Io(error)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    /// Two ends of a connection.
    pub(crate) fn pair() -> (Channel, Channel) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Channel::new(one).unwrap(), Channel::new(other).unwrap())
    }

    #[tokio::test]
    async fn messages_keep_their_bounds_and_their_sockets() {
        let (one, other) = pair();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hello = Message::Hello {
            version: VERSION,
            pid: 7,
            build: "b".into(),
        };
        one.send(&hello, &[]).await.unwrap();
        let many = [listener.as_fd(); MAX_SOCKETS];
        one.send(&Message::Sockets(Of::Outbound), &many).await.unwrap();
        let (first, none) = other.receive().await.unwrap();
        assert_eq!((first, none.len()), (hello, 0));
        let (second, sockets) = other.receive().await.unwrap();
        assert_eq!(
            (second, sockets.len()),
            (Message::Sockets(Of::Outbound), MAX_SOCKETS)
        );
        // A socket that came over is the same one: it accepts what was sent to the first's address.
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        drop(listener);
        let came = TcpListener::from(sockets.into_iter().next().unwrap());
        assert_eq!(came.accept().unwrap().1, client.local_addr().unwrap());
        drop(one);
        assert!(matches!(other.receive().await, Err(Broken::Closed)));
        assert!(matches!(
            other.send(&Message::Ready {}, &[]).await,
            Err(Broken::Closed)
        ));
    }

    #[tokio::test]
    async fn last_words_are_heard_also_by_who_has_spoken_meanwhile() {
        let (one, other) = pair();
        other.send(&Message::Ready {}, &[]).await.unwrap();
        let reason = "late".to_owned();
        one.send(&Message::Refused { reason }, &[]).await.unwrap();
        drop(one);
        assert!(other.send(&Message::Ready {}, &[]).await.is_err());
        let (last, _) = other.receive().await.unwrap();
        assert!(matches!(last, Message::Refused { .. }), "{last:?}");
        assert!(matches!(other.receive().await, Err(Broken::Closed)));
    }

    #[tokio::test]
    async fn a_hello_of_a_later_version_can_still_be_read() {
        let (one, other) = pair();
        let text = br#"{"hello":{"version":2,"pid":1,"build":"next","more":{"x":1}}}"#;
        rustix::net::send(&one.0, text, SendFlags::empty()).unwrap();
        let (message, _) = other.receive().await.unwrap();
        assert!(
            matches!(message, Message::Hello { version: 2, .. }),
            "{message:?}"
        );
        rustix::net::send(&one.0, b"GET / HTTP/1.1", SendFlags::empty()).unwrap();
        assert!(matches!(other.receive().await, Err(Broken::Nonsense(_))));
    }

    #[test]
    fn an_offer_is_understood_with_levels_and_without() {
        let older =
            r#"{"offer":{"version":1,"pid":1,"build":"b","generation":7,"store_id":"s","packets":0}}"#;
        let Ok(Message::Offer(mut offer)) = serde_json::from_str(older) else {
            panic!("no offer")
        };
        assert_eq!(offer.levels, []);
        // The largest one goes into a packet.
        let longest = "x".repeat(63);
        let level = format!(
            r#"{{"policy":"{longest}","level":"{longest}","age_ms":{}}}"#,
            u64::MAX
        );
        let level: Handed = serde_json::from_str(&level).unwrap();
        offer.levels = vec![level; MAX_LEVELS];
        offer.store_id = longest;
        let packet = serde_json::to_vec(&Message::Offer(offer)).unwrap();
        assert!(packet.len() <= MAX_PACKET, "{}", packet.len());
    }

    #[tokio::test]
    async fn the_own_user_is_trusted() {
        let (one, other) = pair();
        one.check_peer().unwrap();
        other.check_peer().unwrap();
    }
}

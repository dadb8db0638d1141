//! What can go wrong, and what that means for a request.

use crate::frame::Violation;
use http::Request;
use leeward_identity::{IdentityError, PeerError, SpiffeId};
use quinn::VarInt;
use std::fmt;
use std::io;
use std::net::SocketAddr;

/// What an error in somebody else's hands is.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why one side gave up a stream (RESET_STREAM and STOP_SENDING).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Code {
    /// Nothing is wrong: the rest isn't needed.
    Enough,
    /// Nothing was done with the request: it may be sent elsewhere.
    Refused,
    /// Whoever asked doesn't want the answer any more, or broke off its body.
    Cancelled,
    /// Something failed here.
    Internal,
    /// Something has a bound, and is larger.
    TooLarge,
    /// It took too long.
    Timeout,
    /// The other side broke the protocol.
    Protocol,
    /// A code of a later revision.
    Unknown(u64),
}

impl Code {
    pub(crate) const fn number(self) -> u64 {
        match self {
            Self::Enough => 0,
            Self::Refused => 1,
            Self::Cancelled => 2,
            Self::Internal => 3,
            Self::TooLarge => 4,
            Self::Timeout => 5,
            Self::Protocol => 6,
            Self::Unknown(number) => number,
        }
    }

    pub(crate) fn var(self) -> VarInt {
        VarInt::from_u64(self.number()).unwrap_or(VarInt::MAX)
    }
}

impl From<VarInt> for Code {
    fn from(code: VarInt) -> Self {
        match code.into_inner() {
            0 => Self::Enough,
            1 => Self::Refused,
            2 => Self::Cancelled,
            3 => Self::Internal,
            4 => Self::TooLarge,
            5 => Self::Timeout,
            6 => Self::Protocol,
            number => Self::Unknown(number),
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enough => f.write_str("enough"),
            Self::Refused => f.write_str("refused"),
            Self::Cancelled => f.write_str("cancelled"),
            Self::Internal => f.write_str("internal error"),
            Self::TooLarge => f.write_str("too large"),
            Self::Timeout => f.write_str("timeout"),
            Self::Protocol => f.write_str("protocol broken"),
            Self::Unknown(number) => write!(f, "code {number}"),
        }
    }
}

/// Why a whole connection was closed (CONNECTION_CLOSE of the application).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Close {
    /// Nobody uses it any more.
    Done,
    /// This side ends.
    Leaving,
    /// The peer broke the protocol.
    Protocol,
    /// The peer doesn't answer.
    Silent,
    /// The peer may not use this service, or not any more.
    Unwelcome,
    /// A certificate that it was made with has ended.
    Ended,
}

impl Close {
    pub(crate) fn var(self) -> VarInt {
        VarInt::from_u32(match self {
            Self::Done => 0,
            Self::Leaving => 1,
            Self::Protocol => 2,
            Self::Silent => 3,
            Self::Unwelcome => 4,
            Self::Ended => 5,
        })
    }
}

/// Why a stream didn't go to its end.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer gave it up.
    #[error("the peer gave the request up: {0}")]
    Reset(Code),
    /// Its connection is gone.
    #[error("the connection between proxies is gone")]
    Lost(#[source] Lost),
    /// What came or was to be sent is not what the protocol allows.
    #[error("the protocol between proxies was broken")]
    Violation(#[from] Violation),
    /// The body that was to be sent broke off.
    #[error("the body to be sent broke off")]
    Body,
}

/// Why a connection is gone. Opaque: what it can be told by is its text, and [`Lost::is_silence`].
#[derive(Clone, Debug, thiserror::Error)]
#[error(transparent)]
pub struct Lost(#[from] pub(crate) quinn::ConnectionError);

impl Lost {
    /// Whether the peer did not answer any more: it may have died, or the path to it.
    pub fn is_silence(&self) -> bool {
        match &self.0 {
            quinn::ConnectionError::TimedOut | quinn::ConnectionError::Reset => true,
            // Only this side's own watch closes a connection that has requests under way, but for a peer whose
            // certificate is revoked: that one is as good as gone.
            quinn::ConnectionError::LocallyClosed => true,
            quinn::ConnectionError::VersionMismatch
            | quinn::ConnectionError::TransportError(_)
            | quinn::ConnectionError::ConnectionClosed(_)
            | quinn::ConnectionError::ApplicationClosed(_)
            | quinn::ConnectionError::CidsExhausted => false,
        }
    }

    /// Whether the peer closed it by a TLS alert (CRYPTO_ERROR; RFC 9000, section 20.1).
    pub(crate) fn is_alert(&self) -> bool {
        let quinn::ConnectionError::ConnectionClosed(close) = &self.0 else {
            return false;
        };
        (0x100..0x200).contains(&u64::from(close.error_code))
    }
}

impl From<quinn::ConnectionError> for StreamError {
    fn from(error: quinn::ConnectionError) -> Self {
        Self::Lost(Lost(error))
    }
}

impl From<quinn::ReadError> for StreamError {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::Reset(code) => Self::Reset(code.into()),
            quinn::ReadError::ConnectionLost(error) => error.into(),
            // None of these is done here: no unordered reads, nothing after the end, no 0-RTT.
            quinn::ReadError::ClosedStream
            | quinn::ReadError::IllegalOrderedRead
            | quinn::ReadError::ZeroRttRejected => Self::Reset(Code::Internal),
        }
    }
}

impl From<quinn::WriteError> for StreamError {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::Stopped(code) => Self::Reset(code.into()),
            quinn::WriteError::ConnectionLost(error) => error.into(),
            quinn::WriteError::ClosedStream | quinn::WriteError::ZeroRttRejected => {
                Self::Reset(Code::Internal)
            }
        }
    }
}

/// Why a request got no answer.
#[derive(Debug)]
pub enum SendError<B> {
    /// The connection takes no more requests; not a byte was written, and here it is again.
    Unsent(Box<Request<B>>),
    /// The request can't have been acted upon, but of its body something may be gone.
    Refused(StreamError),
    /// It was sent, wholly or in part, and may have been acted upon.
    Broken(StreamError),
}

impl<B> fmt::Display for SendError<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsent(_) => f.write_str("the connection takes no more requests"),
            Self::Refused(_) => f.write_str("the request was refused"),
            Self::Broken(_) => f.write_str("the request broke off"),
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// This side has no usable identity.
    #[error("this proxy's identity can't be used for QUIC")]
    Identity(#[source] IdentityError),
    /// The cryptography lacks what QUIC begins with.
    #[error("the TLS provider has no TLS13_AES_128_GCM_SHA256, which QUIC begins with")]
    Suite(#[source] quinn::crypto::rustls::NoInitialCipherSuite),
    /// There is no socket.
    #[error("no UDP socket towards {to}")]
    Socket {
        /// Where to.
        to: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The attempt could not begin.
    #[error("can't begin to connect to {to} by QUIC")]
    Begin {
        /// Where to.
        to: SocketAddr,
        /// What the library said.
        #[source]
        source: quinn::ConnectError,
    },
    /// The handshake failed: nobody there, or not who should be.
    #[error("no QUIC connection with {peer} at {to}")]
    Handshake {
        /// Where to.
        to: SocketAddr,
        /// Who should be there.
        peer: SpiffeId,
        /// What became of it.
        #[source]
        source: Lost,
    },
    /// Its certificate doesn't say who it is.
    #[error("who is at {to} is not known")]
    Peer {
        /// Where to.
        to: SocketAddr,
        /// What is wrong.
        #[source]
        source: PeerError,
    },
}

impl ConnectError {
    /// Whether somebody answered, and it was a refusal: of the handshake, or of who this is.
    pub fn was_answered(&self) -> bool {
        match self {
            Self::Handshake { source, .. } => !source.is_silence(),
            Self::Peer { .. } => true,
            Self::Identity(_) | Self::Suite(_) | Self::Socket { .. } | Self::Begin { .. } => false,
        }
    }
}

/// Why an accepted connection came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// This side has no usable identity.
    #[error("this proxy's identity can't be used for QUIC")]
    Identity(#[source] IdentityError),
    /// The cryptography lacks what QUIC begins with.
    #[error("the TLS provider has no TLS13_AES_128_GCM_SHA256, which QUIC begins with")]
    Suite(#[source] quinn::crypto::rustls::NoInitialCipherSuite),
    /// The handshake failed.
    #[error("no QUIC handshake with {from}")]
    Handshake {
        /// Where from.
        from: SocketAddr,
        /// What became of it.
        #[source]
        source: Lost,
    },
    /// Its certificate doesn't say who it is.
    #[error("who is at {from} is not known")]
    Peer {
        /// Where from.
        from: SocketAddr,
        /// What is wrong.
        #[source]
        source: PeerError,
    },
    /// It is known, and no proxy.
    #[error("{id} at {from} is no proxy, and only proxies may send requests")]
    Role {
        /// Who it is.
        id: SpiffeId,
        /// Where from.
        from: SocketAddr,
    },
}

//! A body that comes in, with a request or with an answer, by whichever transport it comes.

use crate::answers::Counted;
use crate::plain::Plain;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};

/// What an error of a body is.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of a client's request or of an upstream's answer.
#[derive(Debug)]
pub enum IncomingBody {
    /// By HTTP over TCP.
    Http(hyper::body::Incoming),
    /// From another proxy, by QUIC.
    Zone(Box<leeward_zone::Incoming>),
    /// No body, but a connection of a TCP service.
    Plain(Box<Plain>),
    /// From a client outside of the mesh, by HTTP/3.
    Http3(Box<leeward_h3::Incoming>),
    /// One of these that is counted.
    Counted(Box<Counted>),
}

/// How an attempt went.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    /// HTTP/1.1 over TCP.
    Http1,
    /// HTTP/2 over TCP.
    Http2,
    /// The zone protocol over QUIC.
    Quic,
    /// Nothing but TCP.
    Tcp,
}

impl Transport {
    /// The word for it, in records and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Http2 => "h2",
            Self::Quic => "quic",
            Self::Tcp => "tcp",
        }
    }
}

impl Body for IncomingBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::Http(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Self::Zone(body) => Pin::new(&mut **body).poll_frame(cx).map_err(Into::into),
            Self::Plain(_) => Poll::Ready(None),
            Self::Http3(body) => Pin::new(&mut **body).poll_frame(cx).map_err(Into::into),
            Self::Counted(body) => Pin::new(&mut **body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http(body) => body.is_end_stream(),
            Self::Zone(body) => body.is_end_stream(),
            Self::Plain(_) => true,
            Self::Http3(body) => body.is_end_stream(),
            Self::Counted(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http(body) => body.size_hint(),
            Self::Zone(body) => body.size_hint(),
            Self::Plain(_) => SizeHint::with_exact(0),
            Self::Http3(body) => body.size_hint(),
            Self::Counted(body) => body.size_hint(),
        }
    }
}

//! Bodies that tests send and answer with.

use bytes::Bytes;
use http::HeaderMap;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming, SizeHint};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Any body.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// No body.
pub fn empty_body() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// These bytes.
pub fn bytes_body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// So many zeros, made as they are asked for.
pub fn zeros_body(length: u64) -> Body {
    Zeros { left: length }.boxed_unsync()
}

/// A body that is sent bit by bit; it ends when the sender is dropped. An error cuts it short.
pub fn channel_body() -> (mpsc::Sender<io::Result<Frame<Bytes>>>, Body) {
    let (sender, receiver) = mpsc::channel(1);
    (
        sender,
        StreamBody::new(ReceiverStream::new(receiver)).boxed_unsync(),
    )
}

struct Zeros {
    left: u64,
}

static BLOCK: [u8; 64 << 10] = [0; 64 << 10];

impl hyper::body::Body for Zeros {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let n = usize::try_from(self.left).unwrap_or(usize::MAX).min(BLOCK.len());
        self.left -= n as u64;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&BLOCK).slice(..n)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// Gives a request's body back as it comes, with its trailers; then trailers of the backend's own.
pub(crate) struct Echo {
    pub(crate) from: Incoming,
    /// Sent at the end, together with what the request had.
    pub(crate) trailers: Option<HeaderMap>,
    /// Bytes seen.
    pub(crate) received: Arc<AtomicU64>,
}

impl hyper::body::Body for Echo {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = &mut *self;
        match Pin::new(&mut this.from).poll_frame(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(frame))) => match frame.into_trailers() {
                Ok(mut theirs) => {
                    theirs.extend(this.trailers.take().unwrap_or_default());
                    Poll::Ready(Some(Ok(Frame::trailers(theirs))))
                }
                Err(frame) => {
                    let n = frame.data_ref().map_or(0, Bytes::len);
                    this.received.fetch_add(n as u64, Ordering::Relaxed);
                    Poll::Ready(Some(Ok(frame)))
                }
            },
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(io::Error::other(error)))),
            Poll::Ready(None) => Poll::Ready(this.trailers.take().map(|own| Ok(Frame::trailers(own)))),
        }
    }
}

//! A request's body, as it comes.

use crate::server::StreamError;
use crate::streams::Receiving;
use bytes::{Buf, Bytes};
use h3::error::Code;
use h3::server::RequestStream;
use http::{HeaderMap, HeaderValue, header};
use http_body::{Body, Frame, SizeHint};
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// A body from a client. Dropped before its end, it tells the client to stop.
pub struct Incoming {
    stream: RequestStream<Receiving, Bytes>,
    state: State,
    /// What was there already when the head was read.
    first: Option<Bytes>,
    /// What content-length leaves to come, if it says.
    left: Option<u64>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Data,
    Trailers,
    Ended,
    Broken,
}

impl Incoming {
    /// The body that follows a head.
    pub(crate) fn new(
        stream: RequestStream<Receiving, Bytes>,
        headers: &HeaderMap,
    ) -> Result<Self, StreamError> {
        let mut body = Self {
            stream,
            state: State::Data,
            first: None,
            left: None,
        };
        let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
        if let Some(length) = lengths.next() {
            // More than one is refused with every other request of that kind.
            match read_length(length) {
                Some(length) => body.left = Some(length),
                None => return Err(body.malformed("content-length")),
            }
        }
        Ok(body)
    }

    /// Looks whether the body has ended already, or has begun, without waiting. Whether it has a body isn't said in a
    /// request's head (RFC 9114 §4.1), but nearly always comes with it.
    pub(crate) fn poll_begin(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        match ready!(self.poll_next(cx)) {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    // It is counted when it is given.
                    if let Some(left) = &mut self.left {
                        *left += data.len() as u64;
                    }
                    self.first = Some(data);
                    Poll::Ready(Ok(()))
                }
                // Trailers without a body: nothing of them can be of use.
                Err(_) => Poll::Ready(Ok(())),
            },
            Some(Err(error)) => Poll::Ready(Err(error)),
            None => Poll::Ready(Ok(())),
        }
    }

    fn malformed(&mut self, what: &'static str) -> StreamError {
        self.state = State::Broken;
        self.stream.stop_sending(Code::H3_MESSAGE_ERROR);
        StreamError::Malformed(what)
    }

    fn count(&mut self, data: &Bytes) -> Result<(), StreamError> {
        let Some(left) = self.left else { return Ok(()) };
        match left.checked_sub(data.len() as u64) {
            Some(left) => {
                self.left = Some(left);
                Ok(())
            }
            // RFC 9114 §4.1.2.
            None => Err(self.malformed("a body longer than content-length")),
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(self.count(&first).map(|()| Frame::data(first))));
        }
        if self.state == State::Data {
            let data = ready!(self.stream.poll_recv_data(cx));
            match data.map(|data| data.map(|mut data| data.copy_to_bytes(data.remaining()))) {
                Ok(Some(data)) => return Poll::Ready(Some(self.count(&data).map(|()| Frame::data(data)))),
                Ok(None) if self.left.is_some_and(|left| left > 0) => {
                    return Poll::Ready(Some(Err(self.malformed("a body shorter than content-length"))));
                }
                Ok(None) => self.state = State::Trailers,
                Err(error) => return self.broke(error),
            }
        }
        if self.state == State::Trailers {
            match ready!(self.stream.poll_recv_trailers(cx)) {
                Ok(Some(trailers)) => {
                    self.state = State::Ended;
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
                Ok(None) => self.state = State::Ended,
                Err(error) => return self.broke(error),
            }
        }
        Poll::Ready(None)
    }

    fn broke(&mut self, error: h3::error::StreamError) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        self.state = State::Broken;
        Poll::Ready(Some(Err(error.into())))
    }
}

fn read_length(value: &HeaderValue) -> Option<u64> {
    let text = value.to_str().ok()?;
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())?
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = StreamError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        self.get_mut().poll_next(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.state == State::Ended
    }

    fn size_hint(&self) -> SizeHint {
        match self.left {
            _ if self.is_end_stream() => SizeHint::with_exact(0),
            Some(left) => SizeHint::with_exact(left),
            None => SizeHint::default(),
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        match self.state {
            // RFC 9114 §4.1: what is left of a request that was answered isn't needed.
            State::Data | State::Trailers => self.stream.stop_sending(Code::H3_NO_ERROR),
            State::Ended | State::Broken => {}
        }
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

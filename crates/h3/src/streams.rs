//! QUIC as the `h3` crate wants it, by quinn.

use crate::guard::Guard;
use bytes::{Buf, Bytes};
use h3::error::Code;
use h3::quic::{self, ConnectionErrorIncoming, StreamErrorIncoming, StreamId, WriteBuf};
use quinn::{ReadError, VarInt, WriteError};
use std::cell::RefCell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

type Later<T> = Pin<Box<dyn Future<Output = Result<T, quinn::ConnectionError>>>>;
/// Ends when the peer doesn't want a stream any more, or has all of it.
pub(crate) type Stopped = Pin<Box<dyn Future<Output = Result<Option<VarInt>, quinn::StoppedError>>>>;

/// A connection.
pub(crate) struct Quic {
    connection: quinn::Connection,
    accepting: Option<Later<(quinn::SendStream, quinn::RecvStream)>>,
    accepting_uni: Option<Later<quinn::RecvStream>>,
    opener: Opener,
    /// Of the stream that was accepted last.
    latest: Rc<RefCell<Option<Stopped>>>,
    largest_frame: u64,
}

/// What opens streams.
pub(crate) struct Opener {
    connection: quinn::Connection,
    opening: Option<Later<(quinn::SendStream, quinn::RecvStream)>>,
    opening_uni: Option<Later<quinn::SendStream>>,
    largest_frame: u64,
}

/// Both directions of a stream.
pub(crate) struct Both {
    send: Sending,
    receive: Receiving,
}

/// What is sent on a stream. Dropped before anything was, it is reset.
pub(crate) struct Sending {
    stream: quinn::SendStream,
    writing: Option<WriteBuf<Bytes>>,
    untouched: bool,
}

/// What comes on a stream.
pub(crate) struct Receiving {
    stream: quinn::RecvStream,
    guard: Guard,
}

impl Quic {
    /// A connection, and where the end of its latest stream can be taken from.
    pub(crate) fn new(
        connection: quinn::Connection,
        largest_frame: u64,
    ) -> (Self, Rc<RefCell<Option<Stopped>>>) {
        let latest = Rc::<RefCell<Option<Stopped>>>::default();
        let quic = Self {
            opener: Opener::new(&connection, largest_frame),
            connection,
            accepting: None,
            accepting_uni: None,
            latest: Rc::clone(&latest),
            largest_frame,
        };
        (quic, latest)
    }
}

impl Opener {
    fn new(connection: &quinn::Connection, largest_frame: u64) -> Self {
        Self {
            connection: connection.clone(),
            opening: None,
            opening_uni: None,
            largest_frame,
        }
    }
}

/// What a future comes to that is made when there is none.
fn drive<T>(
    place: &mut Option<Later<T>>,
    make: impl FnOnce() -> Later<T>,
    cx: &mut Context<'_>,
) -> Poll<Result<T, quinn::ConnectionError>> {
    let done = ready!(place.get_or_insert_with(make).as_mut().poll(cx));
    *place = None;
    Poll::Ready(done)
}

impl quic::Connection<Bytes> for Quic {
    type RecvStream = Receiving;
    type OpenStreams = Opener;

    fn poll_accept_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Receiving, ConnectionErrorIncoming>> {
        let connection = &self.connection;
        let make = || -> Later<_> {
            let connection = connection.clone();
            Box::pin(async move { connection.accept_uni().await })
        };
        let stream = ready!(drive(&mut self.accepting_uni, make, cx)).map_err(of_connection)?;
        Poll::Ready(Ok(Receiving {
            stream,
            guard: Guard::of_uni(self.largest_frame),
        }))
    }

    fn poll_accept_bidi(&mut self, cx: &mut Context<'_>) -> Poll<Result<Both, ConnectionErrorIncoming>> {
        let connection = &self.connection;
        let make = || -> Later<_> {
            let connection = connection.clone();
            Box::pin(async move { connection.accept_bi().await })
        };
        let streams = ready!(drive(&mut self.accepting, make, cx)).map_err(of_connection)?;
        *self.latest.borrow_mut() = Some(Box::pin(streams.0.stopped()));
        Poll::Ready(Ok(Both::new(streams, self.largest_frame)))
    }

    fn opener(&self) -> Opener {
        Opener::new(&self.connection, self.largest_frame)
    }
}

impl quic::OpenStreams<Bytes> for Quic {
    type BidiStream = Both;
    type SendStream = Sending;

    fn poll_open_bidi(&mut self, cx: &mut Context<'_>) -> Poll<Result<Both, StreamErrorIncoming>> {
        self.opener.poll_open_bidi(cx)
    }

    fn poll_open_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<Sending, StreamErrorIncoming>> {
        self.opener.poll_open_send(cx)
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        self.opener.close(code, reason);
    }
}

impl quic::OpenStreams<Bytes> for Opener {
    type BidiStream = Both;
    type SendStream = Sending;

    fn poll_open_bidi(&mut self, cx: &mut Context<'_>) -> Poll<Result<Both, StreamErrorIncoming>> {
        let connection = &self.connection;
        let make = || -> Later<_> {
            let connection = connection.clone();
            Box::pin(async move { connection.open_bi().await })
        };
        let streams = ready!(drive(&mut self.opening, make, cx)).map_err(lost)?;
        Poll::Ready(Ok(Both::new(streams, self.largest_frame)))
    }

    fn poll_open_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<Sending, StreamErrorIncoming>> {
        let connection = &self.connection;
        let make = || -> Later<_> {
            let connection = connection.clone();
            Box::pin(async move { connection.open_uni().await })
        };
        let stream = ready!(drive(&mut self.opening_uni, make, cx)).map_err(lost)?;
        Poll::Ready(Ok(Sending::new(stream)))
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        self.connection.close(number(code.value()), reason);
    }
}

impl Both {
    fn new((send, receive): (quinn::SendStream, quinn::RecvStream), largest_frame: u64) -> Self {
        Self {
            send: Sending::new(send),
            receive: Receiving {
                stream: receive,
                guard: Guard::of_request(largest_frame),
            },
        }
    }
}

impl quic::BidiStream<Bytes> for Both {
    type SendStream = Sending;
    type RecvStream = Receiving;

    fn split(self) -> (Sending, Receiving) {
        (self.send, self.receive)
    }
}

impl quic::RecvStream for Both {
    type Buf = Bytes;

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        self.receive.poll_data(cx)
    }

    fn stop_sending(&mut self, error_code: u64) {
        self.receive.stop_sending(error_code);
    }

    fn recv_id(&self) -> StreamId {
        self.receive.recv_id()
    }
}

impl quic::SendStream<Bytes> for Both {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.send.poll_ready(cx)
    }

    fn send_data<T: Into<WriteBuf<Bytes>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        self.send.send_data(data)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.send.poll_finish(cx)
    }

    fn reset(&mut self, reset_code: u64) {
        self.send.reset(reset_code);
    }

    fn send_id(&self) -> StreamId {
        self.send.send_id()
    }
}

impl quic::RecvStream for Receiving {
    type Buf = Bytes;

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        // It keeps nothing between polls but what is in the stream.
        let read = pin!(self.stream.read_chunk(usize::MAX, true)).poll(cx);
        let chunk = ready!(read).map_err(of_reading)?.map(|chunk| chunk.bytes);
        if let Some(bytes) = &chunk
            && self.guard.see(bytes).is_err()
        {
            let code = Code::H3_EXCESSIVE_LOAD.value();
            self.stop_sending(code);
            return Poll::Ready(Err(StreamErrorIncoming::StreamTerminated { error_code: code }));
        }
        Poll::Ready(Ok(chunk))
    }

    fn stop_sending(&mut self, error_code: u64) {
        // It fails only if it has ended, and then there is nothing to stop.
        let _ = self.stream.stop(number(error_code));
    }

    fn recv_id(&self) -> StreamId {
        id(self.stream.id())
    }
}

impl Sending {
    const fn new(stream: quinn::SendStream) -> Self {
        Self {
            stream,
            writing: None,
            untouched: true,
        }
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if self.untouched {
            // quinn would end it in order, which looks like an answer.
            quic::SendStream::reset(self, Code::H3_INTERNAL_ERROR.value());
        }
    }
}

impl quic::SendStream<Bytes> for Sending {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        while let Some(data) = &mut self.writing {
            if !data.has_remaining() {
                self.writing = None;
                break;
            }
            let written =
                ready!(Pin::new(&mut self.stream).poll_write(cx, data.chunk())).map_err(of_writing)?;
            data.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    fn send_data<T: Into<WriteBuf<Bytes>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        if self.writing.is_some() {
            return Err(StreamErrorIncoming::ConnectionErrorIncoming {
                connection_error: ConnectionErrorIncoming::InternalError(
                    "sent before it was ready".to_owned(),
                ),
            });
        }
        self.untouched = false;
        self.writing = Some(data.into());
        Ok(())
    }

    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.untouched = false;
        let finished = self.stream.finish();
        Poll::Ready(finished.map_err(|error| StreamErrorIncoming::Unknown(Box::new(error))))
    }

    fn reset(&mut self, reset_code: u64) {
        self.untouched = false;
        // It fails only if it has ended already.
        let _ = self.stream.reset(number(reset_code));
    }

    fn send_id(&self) -> StreamId {
        id(self.stream.id())
    }
}

fn number(code: u64) -> VarInt {
    VarInt::from_u64(code).unwrap_or(VarInt::MAX)
}

#[expect(clippy::expect_used, reason = "both are the numbers below 2^62")]
fn id(id: quinn::StreamId) -> StreamId {
    u64::from(VarInt::from(id)).try_into().expect("a stream of QUIC")
}

fn of_connection(error: quinn::ConnectionError) -> ConnectionErrorIncoming {
    match error {
        quinn::ConnectionError::ApplicationClosed(close) => ConnectionErrorIncoming::ApplicationClose {
            error_code: close.error_code.into(),
        },
        quinn::ConnectionError::TimedOut => ConnectionErrorIncoming::Timeout,
        quinn::ConnectionError::VersionMismatch
        | quinn::ConnectionError::Reset
        | quinn::ConnectionError::LocallyClosed
        | quinn::ConnectionError::CidsExhausted
        | quinn::ConnectionError::TransportError(_)
        | quinn::ConnectionError::ConnectionClosed(_) => ConnectionErrorIncoming::Undefined(Arc::new(error)),
    }
}

fn lost(error: quinn::ConnectionError) -> StreamErrorIncoming {
    StreamErrorIncoming::ConnectionErrorIncoming {
        connection_error: of_connection(error),
    }
}

fn of_reading(error: ReadError) -> StreamErrorIncoming {
    match error {
        ReadError::Reset(code) => StreamErrorIncoming::StreamTerminated {
            error_code: code.into_inner(),
        },
        ReadError::ConnectionLost(error) => lost(error),
        ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
            StreamErrorIncoming::Unknown(Box::new(error))
        }
    }
}

fn of_writing(error: WriteError) -> StreamErrorIncoming {
    match error {
        WriteError::Stopped(code) => StreamErrorIncoming::StreamTerminated {
            error_code: code.into_inner(),
        },
        WriteError::ConnectionLost(error) => lost(error),
        WriteError::ClosedStream | WriteError::ZeroRttRejected => {
            StreamErrorIncoming::Unknown(Box::new(error))
        }
    }
}

//! What is sent: a head with as much of its body as is there already, then the rest as it comes.

use crate::core::Core;
use crate::error::{BoxError, Code, StreamError};
use crate::frame::{Kind, MAX_DATA, Violation, put_frame, put_header};
use crate::head::{Limits, put_trailers};
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use quinn::SendStream;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

/// A stream that is reset unless it was finished: left to itself, the transport would take it for finished.
#[derive(Debug)]
pub(crate) struct Writer {
    stream: SendStream,
    finished: bool,
    /// What the peer is told if this is dropped.
    unfinished: Code,
}

impl Writer {
    pub(crate) fn new(stream: SendStream, unfinished: Code) -> Self {
        Self {
            stream,
            finished: false,
            unfinished,
        }
    }

    pub(crate) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<quinn::VarInt>, quinn::StoppedError>> + use<> {
        self.stream.stopped()
    }

    pub(crate) fn finish(&mut self) {
        self.finished = true;
        // It fails only if the peer has stopped the stream, or the connection is gone: nothing is left to finish.
        let _ = self.stream.finish();
    }

    pub(crate) fn reset(&mut self, why: Code) {
        if !std::mem::replace(&mut self.finished, true) {
            let _ = self.stream.reset(why.var());
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.reset(self.unfinished);
    }
}

/// A body on its way out.
pub(crate) struct Sending<B> {
    writer: Writer,
    body: B,
    core: Rc<Core>,
    /// What is to be written next.
    ready: Vec<Bytes>,
    /// How many of these are written.
    written: usize,
    /// Bytes of them.
    gathered: usize,
    ended: bool,
}

/// How far sending has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Progress {
    /// All is sent.
    Whole,
    /// The body goes on.
    Part,
}

/// Does what needs a task's context and waits for nothing.
pub(crate) fn at_once<T>(make: impl FnOnce(&mut Context<'_>) -> T) -> impl Future<Output = T> {
    let mut make = Some(make);
    poll_fn(move |cx| match make.take() {
        Some(make) => Poll::Ready(make(cx)),
        None => Poll::Pending,
    })
}

/// Bytes that are gathered before they are written: one DATA frame, and what came with it.
const GATHER: usize = MAX_DATA;
/// Pieces of a body up to this size are copied to where the head is: cheaper than to be kept track of.
const COPY: usize = 512;

impl<B> Sending<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    pub(crate) fn new(writer: Writer, body: B, core: Rc<Core>) -> Self {
        Self {
            writer,
            body,
            core,
            ready: Vec::new(),
            written: 0,
            gathered: 0,
            ended: false,
        }
    }

    /// Sends the head, and in the same packet, if it fits, what of the body is there already. Without waiting: the answer
    /// has to be read even if not all of this can be sent before.
    pub(crate) fn begin(
        &mut self,
        cx: &mut Context<'_>,
        head: impl FnOnce(&mut BytesMut, bool, Limits) -> Result<(), Violation>,
    ) -> Result<Progress, StreamError> {
        self.ended = self.body.is_end_stream();
        let (end, limits) = (self.ended, self.core.limits());
        let core = Rc::clone(&self.core);
        let encoded: Result<Bytes, Violation> = core.scratch(|buf| {
            put_frame(buf, Kind::Head, |buf| head(buf, end, limits))?;
            Ok(buf.split().freeze())
        });
        self.queue(encoded?);
        self.gather(cx)?;
        match self.poll_flush(cx) {
            Poll::Ready(flushed) => flushed,
            Poll::Pending => Ok(Progress::Part),
        }
    }

    /// Sends the rest, to the end.
    pub(crate) async fn go_on(&mut self) -> Result<(), StreamError> {
        poll_fn(|cx| {
            loop {
                if ready!(self.poll_flush(cx))? == Progress::Whole {
                    return Poll::Ready(Ok(()));
                }
                self.gather(cx)?;
                if self.ready.is_empty() && !self.ended {
                    return Poll::Pending;
                }
            }
        })
        .await
    }

    /// Whether the peer wants no more of it.
    pub(crate) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<quinn::VarInt>, quinn::StoppedError>> + use<B> {
        self.writer.stopped()
    }

    pub(crate) fn reset(&mut self, why: Code) {
        self.writer.reset(why);
    }

    /// Writes what was gathered; and the stream's end, once that is known.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<Progress, StreamError>> {
        while let Some(rest) = self.ready.get_mut(self.written..).filter(|rest| !rest.is_empty()) {
            let writing = pin!(self.writer.stream.write_chunks(rest));
            // Whole chunks are empty now; of one that was written in part the rest is left in its place.
            self.written += ready!(writing.poll(cx))?.chunks;
        }
        // The memory is used again.
        self.ready.clear();
        (self.written, self.gathered) = (0, 0);
        if self.ended {
            self.writer.finish();
            return Poll::Ready(Ok(Progress::Whole));
        }
        Poll::Ready(Ok(Progress::Part))
    }

    fn queue(&mut self, bytes: Bytes) {
        self.gathered += bytes.len();
        self.ready.push(bytes);
    }

    /// Takes from the body what is there, without waiting for more.
    fn gather(&mut self, cx: &mut Context<'_>) -> Result<(), StreamError> {
        while !self.ended && self.gathered < GATHER {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(None) => self.ended = true,
                Poll::Ready(Some(Ok(frame))) => {
                    self.take(frame)?;
                    self.ended |= self.body.is_end_stream();
                }
                Poll::Ready(Some(Err(error))) => {
                    let error: BoxError = error.into();
                    tracing::debug!(%error, "a body to be sent broke off");
                    return Err(StreamError::Body);
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, frame: Frame<Bytes>) -> Result<(), StreamError> {
        let core = Rc::clone(&self.core);
        match frame.into_data() {
            Ok(mut data) => {
                while !data.is_empty() {
                    let piece = data.split_to(data.len().min(MAX_DATA));
                    let copied = piece.len() <= COPY;
                    let header = core.scratch(|buf| {
                        put_header(buf, Kind::Data, piece.len());
                        if copied {
                            buf.extend_from_slice(&piece);
                        }
                        buf.split().freeze()
                    });
                    self.queue(header);
                    if !copied {
                        self.queue(piece);
                    }
                }
            }
            Err(frame) => {
                if let Ok(fields) = frame.into_trailers() {
                    let limits = core.limits();
                    let trailers: Result<Bytes, Violation> = core.scratch(|buf| {
                        put_frame(buf, Kind::Trailers, |buf| put_trailers(buf, &fields, limits))?;
                        Ok(buf.split().freeze())
                    });
                    self.queue(trailers?);
                    self.ended = true;
                }
            }
        }
        Ok(())
    }
}

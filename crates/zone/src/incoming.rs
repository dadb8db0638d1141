//! What comes: a head, then a body that is read as it comes.

use crate::core::UnderWay;
use crate::error::{Code, StreamError};
use crate::frame::{Deframer, Kind, Piece, Violation};
use crate::head;
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use quinn::RecvStream;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use tokio::task::AbortHandle;

/// A body from the peer. Dropped before its end, it tells the peer to stop.
#[derive(Debug)]
pub struct Incoming {
    stream: RecvStream,
    frames: Deframer,
    state: State,
    /// What content-length leaves to come, if it says.
    left: Option<u64>,
    /// What content-length said.
    length: u64,
    /// What the peer is told if nobody reads on.
    unread: Code,
    /// What came of looking ahead, to be told next.
    failed: Option<StreamError>,
    /// What was read beside what was taken, to be taken next.
    ahead: Option<Result<Bytes, StreamError>>,
    hold: Hold,
}

/// What lives as long as a body.
#[derive(Debug, Default)]
#[expect(dead_code, reason = "they are there to be dropped")]
pub(crate) struct Hold {
    /// Its place among the requests under way.
    pub(crate) under_way: Option<UnderWay>,
    /// The other direction, which has no use without this one.
    pub(crate) sending: Option<Abort>,
}

/// Ends a task when dropped.
#[derive(Debug)]
pub(crate) struct Abort(pub(crate) AbortHandle);

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// The body may go on.
    Open,
    /// Nothing but the end may come.
    Trailed,
    /// All of it is here.
    Ended,
    /// It was told to stop, or broke off.
    Broken,
}

/// Chunks that are taken from the transport at once, and joined to pieces that are worth passing on: where no jumbo frames go, a
/// packet holds little more than a kilobyte.
const CHUNKS: usize = 16;
/// Chunks that most messages come in.
const FEW: usize = 2;
/// Chunks of this size are passed on as they are.
const LARGE: usize = 8 << 10;

impl Incoming {
    pub(crate) fn new(stream: RecvStream, unread: Code) -> Self {
        Self {
            stream,
            frames: Deframer::default(),
            state: State::Open,
            left: None,
            length: 0,
            unread,
            failed: None,
            ahead: None,
            hold: Hold::default(),
        }
    }

    /// Waits for the head's bytes.
    pub(crate) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, StreamError>> {
        loop {
            match self.frames.next()? {
                Some(Piece::Whole(Kind::Head, payload)) => return Poll::Ready(Ok(payload)),
                Some(piece) => {
                    let number = piece.kind().number();
                    return Poll::Ready(Err(Violation::Misplaced {
                        number,
                        place: "before the head",
                    }
                    .into()));
                }
                None => {}
            }
            if !ready!(self.poll_more(cx))? {
                let place = "before there was a head";
                return Poll::Ready(Err(Violation::Truncated { place }.into()));
            }
        }
    }

    /// The head has been read; `end` if there is no body, `length` if it is known how long it is.
    pub(crate) fn begin(&mut self, end: bool, length: Option<u64>) -> Result<(), Violation> {
        self.left = length;
        self.length = length.unwrap_or_default();
        if end {
            self.check_length()?;
            self.state = State::Ended;
            // Lets the transport forget the stream. Should its end not be here yet, dropping it does.
            let mut read = pin!(self.stream.read_chunk(usize::MAX, true));
            let _ = read
                .as_mut()
                .poll(&mut Context::from_waker(std::task::Waker::noop()));
        }
        Ok(())
    }

    pub(crate) fn hold(&mut self, hold: Hold) {
        self.hold = hold;
    }

    /// Tells the peer that no more is wanted, and why.
    pub(crate) fn stop(&mut self, why: Code) {
        if matches!(self.state, State::Open | State::Trailed) {
            self.state = State::Broken;
            // It fails only if the stream has ended already.
            let _ = self.stream.stop(why.var());
        }
    }

    /// Takes what has come to the frames. False at the stream's end.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, StreamError>> {
        if let Some(ahead) = self.ahead.take() {
            self.frames.push(ahead?);
            return Poll::Ready(Ok(true));
        }
        let mut few: [Bytes; FEW] = Default::default();
        let read = pin!(self.stream.read_chunks(&mut few)).as_mut().poll(cx);
        let Some(count) = ready!(read)? else {
            return Poll::Ready(Ok(false));
        };
        let [first, second] = few;
        if count < FEW {
            self.frames.push(first);
        } else if first.len() >= LARGE {
            self.frames.push(first);
            self.ahead = Some(Ok(second));
        } else {
            self.join(first, second, cx);
        }
        Poll::Ready(Ok(true))
    }

    /// Takes two chunks to the frames as one, and more of them if there are more. Of the stream's end whoever reads next is told
    /// again.
    fn join(&mut self, first: Bytes, second: Bytes, cx: &mut Context<'_>) {
        let mut more: [Bytes; CHUNKS - FEW] = Default::default();
        let read = pin!(self.stream.read_chunks(&mut more)).as_mut().poll(cx);
        if let Poll::Ready(Err(error)) = read {
            // That it was reset is told once.
            self.ahead = Some(Err(error.into()));
        }
        // Those that nothing was read into are empty.
        let chunks = [&first, &second].into_iter().chain(&more);
        let mut joined = BytesMut::with_capacity(chunks.clone().map(Bytes::len).sum());
        chunks.for_each(|chunk| joined.extend_from_slice(chunk));
        self.frames.push(joined.freeze());
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame<Bytes>>, StreamError>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        loop {
            match self.frames.next()? {
                Some(Piece::Data(bytes)) if self.state == State::Open => {
                    self.count(bytes.len())?;
                    if self.frames.is_drained() {
                        self.look_ahead(cx);
                    }
                    return Poll::Ready(Ok(Some(Frame::data(bytes))));
                }
                Some(Piece::Whole(Kind::Trailers, payload)) if self.state == State::Open => {
                    self.check_length()?;
                    let fields = head::fields(payload)?;
                    self.state = State::Trailed;
                    if self.frames.is_drained() {
                        self.look_ahead(cx);
                    }
                    return Poll::Ready(Ok(Some(Frame::trailers(fields))));
                }
                Some(piece) => {
                    let place = match self.state {
                        State::Trailed => "after the trailers",
                        State::Open | State::Ended | State::Broken => "in a body",
                    };
                    let number = piece.kind().number();
                    return Poll::Ready(Err(Violation::Misplaced { number, place }.into()));
                }
                None => {}
            }
            if !ready!(self.poll_more(cx))? {
                self.check_end()?;
                self.end();
                return Poll::Ready(Ok(None));
            }
        }
    }

    /// Whether this was the last of it is often known already. Whoever passes it on can then say so in one go.
    fn look_ahead(&mut self, cx: &mut Context<'_>) {
        match self.poll_more(cx) {
            Poll::Ready(Ok(false)) => match self.check_end() {
                Ok(()) => self.end(),
                Err(violation) => self.failed = Some(violation.into()),
            },
            Poll::Ready(Err(error)) => self.failed = Some(error),
            Poll::Ready(Ok(true)) | Poll::Pending => {}
        }
    }

    /// Whether the stream may end here.
    fn check_end(&self) -> Result<(), Violation> {
        if !self.frames.is_between() {
            let place = "in the middle of a frame";
            return Err(Violation::Truncated { place });
        }
        self.check_length()
    }

    fn count(&mut self, len: usize) -> Result<(), Violation> {
        let Some(left) = &mut self.left else { return Ok(()) };
        match left.checked_sub(len as u64) {
            Some(rest) => *left = rest,
            None => {
                let got = self.length - *left + len as u64;
                return Err(Violation::Length {
                    got,
                    want: self.length,
                });
            }
        }
        Ok(())
    }

    fn check_length(&self) -> Result<(), Violation> {
        match self.left {
            None | Some(0) => Ok(()),
            Some(left) => Err(Violation::Length {
                got: self.length - left,
                want: self.length,
            }),
        }
    }

    fn end(&mut self) {
        self.state = State::Ended;
        self.hold = Hold::default();
    }
}

impl Piece {
    fn kind(&self) -> Kind {
        match self {
            Self::Whole(kind, _) => *kind,
            Self::Data(_) => Kind::Data,
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = StreamError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        if matches!(self.state, State::Ended | State::Broken) {
            return Poll::Ready(None);
        }
        let next = ready!(self.poll_next(cx));
        if let Err(error) = &next {
            let why = if matches!(error, StreamError::Violation(_)) {
                Code::Protocol
            } else {
                Code::Cancelled
            };
            self.stop(why);
            self.state = State::Broken;
        }
        Poll::Ready(next.transpose())
    }

    /// Trailers are the end, though the stream's may come in a packet of its own: whoever has them may not ask again.
    fn is_end_stream(&self) -> bool {
        match self.state {
            State::Ended => true,
            State::Trailed => self.failed.is_none() && self.ahead.is_none() && self.frames.is_drained(),
            State::Open | State::Broken => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        if self.is_end_stream() {
            return SizeHint::with_exact(0);
        }
        self.left.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // With nothing but the end to come, the transport says by itself that nothing is wrong (ENOUGH).
        if !self.is_end_stream() {
            self.stop(self.unread);
        }
    }
}

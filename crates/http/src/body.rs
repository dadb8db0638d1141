//! Bodies on their way through: counted, and kept only as far as policy may want to send them again.

use crate::exchange::Exchange;
use crate::flow::{Broke, FlowBody, Lost};
use crate::idle::{Parked, Side, Stall};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use leeward_upstream::IncomingBody;
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// What a body ends in when its source fails.
pub(crate) type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// A request's body as it comes in. Shared by the exchange and by what each attempt sends, so that an attempt
/// that fails early loses nothing of it.
pub(crate) struct Intake {
    source: RefCell<Option<Source>>,
    /// Its length, where that is known.
    length: Cell<Option<u64>>,
    bytes: Cell<u64>,
    touched: Cell<bool>,
    ended: Cell<bool>,
    /// The client broke off, or stood still for too long: what came is not the whole, and never will be.
    failed: Cell<bool>,
    /// The client was asked for more, and had nothing yet.
    waiting: Cell<bool>,
    kept: RefCell<Kept>,
    /// The attempt that may read on; a body of an earlier one breaks off.
    turn: Cell<u32>,
    pub(crate) stall: Rc<Stall>,
}

/// Where a request's body comes from.
pub(crate) enum Source {
    /// The client.
    Client(IncomingBody),
    /// What something makes of nothing.
    Made(Pin<Box<dyn Body<Data = Bytes, Error = BodyError>>>),
    /// What filters let pass of another.
    Filtered(Box<FlowBody>),
}

impl Body for Source {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Client(body) => Pin::new(body).poll_frame(cx),
            Self::Made(body) => body.as_mut().poll_frame(cx),
            Self::Filtered(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Client(body) => body.is_end_stream(),
            Self::Made(body) => body.is_end_stream(),
            Self::Filtered(body) => body.is_end_stream(),
        }
    }
}

/// The first bytes of a body.
#[derive(Debug, Default)]
struct Kept {
    /// A copy, in one piece: frames may be of one byte each, and hold on to more than they show.
    data: Vec<u8>,
    limit: usize,
    /// There was more than the limit, or something else than data.
    over: bool,
}

/// Whether a request's body can be sent, or sent again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Supply {
    /// There is none, or all of it can be had.
    Whole,
    /// A part of it has gone, and it was more than is kept.
    TooLarge,
    /// A part of it has gone, and nothing was kept.
    Gone,
}

impl Intake {
    /// The client's body; one that has ended already is held to be none.
    pub(crate) fn new(source: IncomingBody, stall: Rc<Stall>) -> Rc<Self> {
        let length = source.size_hint().exact();
        let source = (!source.is_end_stream()).then_some(Source::Client(source));
        Self::of(source, length, stall)
    }

    /// A body that something makes as it goes.
    pub(crate) fn made(
        body: Pin<Box<dyn Body<Data = Bytes, Error = BodyError>>>,
        stall: Rc<Stall>,
    ) -> Rc<Self> {
        Self::of(Some(Source::Made(body)), None, stall)
    }

    fn of(source: Option<Source>, length: Option<u64>, stall: Rc<Stall>) -> Rc<Self> {
        Rc::new(Self {
            ended: Cell::new(source.is_none()),
            source: RefCell::new(source),
            length: Cell::new(length),
            bytes: Cell::new(0),
            touched: Cell::new(false),
            failed: Cell::new(false),
            waiting: Cell::new(false),
            kept: RefCell::default(),
            turn: Cell::new(0),
            stall,
        })
    }

    /// A body that is here already, whole.
    pub(crate) fn stored(body: &[u8], stall: Rc<Stall>) -> Rc<Self> {
        Rc::new(Self {
            ended: Cell::new(true),
            source: RefCell::new(None),
            length: Cell::new(Some(body.len() as u64)),
            bytes: Cell::new(body.len() as u64),
            touched: Cell::new(true),
            failed: Cell::new(false),
            waiting: Cell::new(false),
            kept: RefCell::new(Kept {
                data: body.to_vec(),
                limit: body.len(),
                over: false,
            }),
            turn: Cell::new(0),
            stall,
        })
    }

    /// Takes the source of a body away of which nothing has been read.
    pub(crate) fn take_source(&self) -> Option<Source> {
        self.source.borrow_mut().take()
    }

    /// Gives it back.
    pub(crate) fn put_source(&self, source: Source) {
        self.source.replace(Some(source));
    }

    /// Puts what filters let pass of it in its place; `length` where that is known.
    pub(crate) fn put_filtered(&self, body: FlowBody, length: Option<u64>) {
        self.length.set(length);
        self.ended.set(body.is_end_stream());
        self.source
            .replace((!body.is_end_stream()).then(|| Source::Filtered(Box::new(body))));
    }

    /// Nobody reads on for now. Filters end the turn that they have.
    fn set_aside(&self) {
        if let Some(Source::Filtered(body)) = &mut *self.source.borrow_mut() {
            body.set_aside();
        }
    }

    /// Nobody will read on, or may: filters give up what they have of it.
    pub(crate) fn close(&self) {
        self.recall();
        self.source
            .borrow_mut()
            .take_if(|source| matches!(source, Source::Filtered(_)));
    }

    /// How long it is, where that is known.
    pub(crate) fn length(&self) -> Option<u64> {
        self.length.get()
    }

    /// Keeps the body as it passes, up to `limit` bytes. Has no effect on what has passed.
    pub(crate) fn keep(&self, limit: usize) {
        let mut kept = self.kept.borrow_mut();
        if !self.touched.get() {
            kept.limit = kept.limit.max(limit);
        }
    }

    /// Whether there is no body, or it was of no bytes.
    pub(crate) fn is_empty(&self) -> bool {
        self.ended.get() && self.bytes.get() == 0
    }

    /// Whether the body can be sent once more.
    pub(crate) fn supply(&self) -> Supply {
        let kept = self.kept.borrow();
        if self.failed.get() {
            Supply::Gone
        } else if !self.touched.get() || self.is_empty() {
            Supply::Whole
        } else if kept.over {
            Supply::TooLarge
        } else if kept.limit == 0 {
            Supply::Gone
        } else {
            Supply::Whole
        }
    }

    /// The body for one more attempt, from its beginning, if all of it can be had. What an earlier attempt still
    /// holds breaks off.
    pub(crate) fn send(self: &Rc<Self>) -> Option<RequestBody> {
        (self.supply() == Supply::Whole).then(|| self.body())
    }

    fn body(self: &Rc<Self>) -> RequestBody {
        self.recall();
        RequestBody {
            intake: Rc::clone(self),
            turn: self.turn.get(),
            position: 0,
            sent: 0,
        }
    }

    /// Takes the body away from whoever reads it, so that nothing of it passes until it is sent again.
    pub(crate) fn recall(&self) {
        self.turn.set(self.turn.get().wrapping_add(1));
        self.set_aside();
    }

    /// Whether the client broke its body off.
    pub(crate) fn failed(&self) -> bool {
        self.failed.get()
    }

    /// Whether an upstream waits for the client to go on.
    pub(crate) fn waits_for_client(&self) -> bool {
        self.waiting.get() && !self.ended.get()
    }

    /// Reads the body to its end, or until more than what is kept has come.
    pub(crate) async fn fill(self: &Rc<Self>) {
        let mut body = self.body();
        while !self.kept.borrow().over
            && let Some(Ok(_)) = body.frame().await
        {}
    }

    /// Bytes that passed.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Whether anything was read from the client's body.
    pub(crate) fn touched(&self) -> bool {
        self.touched.get()
    }

    /// The whole body, if it has ended and was kept.
    pub(crate) fn whole(&self) -> Option<Vec<u8>> {
        let kept = self.kept.borrow();
        (self.ended.get() && !kept.over && (kept.limit > 0 || self.is_empty())).then(|| kept.data.clone())
    }

    /// Counts bytes that passed beside the body.
    pub(crate) fn add(&self, bytes: u64) {
        self.bytes.set(self.bytes.get().saturating_add(bytes));
    }

    /// Whether the whole body has passed.
    pub(crate) fn ended(&self) -> bool {
        self.ended.get()
    }

    fn poll_source(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.failed.get() {
            // What is left after a failure would look like an end.
            return Poll::Ready(Some(Err("the client's body broke off".into())));
        }
        let mut source = self.source.borrow_mut();
        let Some(body) = &mut *source else {
            return Poll::Ready(None);
        };
        self.touched.set(true);
        let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) else {
            self.waiting.set(true);
            return match self.stall.park(Side::Request, cx) {
                Parked::Waiting => Poll::Pending,
                Parked::Expired => {
                    self.failed.set(true);
                    Poll::Ready(Some(Err("the client's body stands still".into())))
                }
            };
        };
        self.waiting.set(false);
        self.stall.touch();
        match &frame {
            Some(Ok(frame)) => {
                self.pass(frame);
                if body.is_end_stream() {
                    self.ended.set(true);
                }
            }
            Some(Err(_)) => self.failed.set(true),
            None => self.ended.set(true),
        }
        Poll::Ready(frame)
    }

    fn pass(&self, frame: &Frame<Bytes>) {
        let mut kept = self.kept.borrow_mut();
        let Some(data) = frame.data_ref() else {
            kept.over = true;
            return;
        };
        self.add(data.len() as u64);
        if kept.limit == 0 || kept.over {
            return;
        }
        if kept.data.len() + data.len() > kept.limit {
            kept.over = true;
            kept.data = Vec::new();
        } else {
            kept.data.extend_from_slice(data);
        }
    }
}

/// A request's body on its way to an upstream: what was kept of it, then what comes.
pub(crate) struct RequestBody {
    intake: Rc<Intake>,
    turn: u32,
    /// Bytes sent of those kept.
    position: usize,
    /// Bytes sent.
    sent: u64,
}

impl RequestBody {
    fn next_kept(&mut self) -> Option<Bytes> {
        let kept = self.intake.kept.borrow();
        let rest = kept.data.get(self.position..).filter(|rest| !rest.is_empty())?;
        self.position = kept.data.len();
        Some(Bytes::copy_from_slice(rest))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if let Some(data) = this.next_kept() {
            this.sent += data.len() as u64;
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if this.intake.ended.get()
            && this
                .intake
                .source
                .borrow()
                .as_ref()
                .is_none_or(Body::is_end_stream)
        {
            return Poll::Ready(None);
        }
        if this.turn != this.intake.turn.get() {
            return Poll::Ready(Some(Err("another attempt sends the body".into())));
        }
        let frame = std::task::ready!(this.intake.poll_source(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            this.sent += data.len() as u64;
            // It was kept just now, and must not be sent twice.
            this.position = this.intake.kept.borrow().data.len();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        !self.intake.failed.get()
            && self.position >= self.intake.kept.borrow().data.len()
            && self
                .intake
                .source
                .borrow()
                .as_ref()
                .is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        match self.intake.length.get() {
            Some(all) => SizeHint::with_exact(all.saturating_sub(self.sent)),
            None => SizeHint::default(),
        }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if self.turn == self.intake.turn.get() {
            self.intake.set_aside();
        }
    }
}

/// A response's body on its way to the client. Its end, or its being dropped, ends the exchange: that is
/// when the connection is given back, the permit returned and the record written.
pub(crate) struct ResponseBody {
    source: Answer,
    exchange: Option<Box<Exchange>>,
}

enum Answer {
    Upstream(IncomingBody),
    Own(Option<Bytes>),
    /// What filters let pass of another answer; and how much is to come yet, where that is known.
    Filtered(Box<FlowBody>, Option<u64>),
}

impl ResponseBody {
    /// An upstream's body.
    pub(crate) fn upstream(body: IncomingBody, exchange: Box<Exchange>) -> Self {
        let mut this = Self {
            source: Answer::Upstream(body),
            exchange: Some(exchange),
        };
        // Filters may have a word yet.
        if this
            .exchange
            .as_ref()
            .is_some_and(|exchange| exchange.filters.is_none())
        {
            this.settle();
        }
        this
    }

    /// A body of the proxy's own making.
    pub(crate) fn own(body: Bytes, exchange: Box<Exchange>) -> Self {
        let source = Answer::Own(Some(body).filter(|b| !b.is_empty()));
        Self {
            source,
            exchange: Some(exchange),
        }
    }

    /// No body, and no exchange that hangs on it.
    pub(crate) fn none() -> Self {
        Self {
            source: Answer::Own(None),
            exchange: None,
        }
    }

    /// What filters let pass of another body, whose exchange ends with this one.
    pub(crate) fn filtered(body: FlowBody, length: Option<u64>, exchange: Box<Exchange>) -> Self {
        let mut this = Self {
            source: Answer::Filtered(Box::new(body), length),
            exchange: Some(exchange),
        };
        this.settle();
        this
    }

    /// Gives the exchange back that was taken; nothing of the body may have been read meanwhile.
    pub(crate) fn take_back(&mut self, exchange: Box<Exchange>) {
        self.exchange = Some(exchange);
        self.settle();
    }

    /// Nothing may be polled of a body that is empty, so its end is now.
    fn settle(&mut self) {
        if self.is_end_stream() {
            self.finish();
        }
    }

    /// Takes the exchange, for another body to end it.
    pub(crate) const fn give_up(&mut self) -> Option<Box<Exchange>> {
        self.exchange.take()
    }

    /// The upstream has nothing to give now.
    fn wait(&mut self, cx: &Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(exchange) = &self.exchange else {
            return Poll::Pending;
        };
        match exchange.intake.stall.park(Side::Response, cx) {
            Parked::Waiting => Poll::Pending,
            Parked::Expired => {
                self.fail(Broke::Lost(Lost::Late));
                Poll::Ready(Some(Err("the answer stands still".into())))
            }
        }
    }

    fn finish(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            exchange.complete();
        }
    }

    fn fail(&mut self, why: Broke) {
        let Some(exchange) = self.exchange.take() else {
            return;
        };
        match why {
            Broke::Lost(Lost::Gone) => exchange.cut_short_by_upstream(),
            Broke::Lost(Lost::Late) => exchange.stood_still(),
            Broke::Filter => exchange.cut_short_by_filter(),
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let frame = match &mut this.source {
            Answer::Upstream(body) => match Pin::new(body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Some(exchange) = &this.exchange {
                        exchange.intake.stall.touch();
                    }
                    Some(Ok(frame))
                }
                Poll::Ready(Some(Err(error))) => {
                    this.fail(Broke::Lost(Lost::Gone));
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(None) => None,
                Poll::Pending => return this.wait(cx),
            },
            Answer::Own(body) => body.take().map(|body| Ok(Frame::data(body))),
            Answer::Filtered(body, left) => {
                let frame = Pin::new(&mut **body).poll_frame(cx);
                if body.has_come()
                    && let Some(exchange) = &mut this.exchange
                {
                    exchange.has_come();
                }
                let frame = std::task::ready!(frame);
                if let Some(why) = body.broke() {
                    this.fail(why);
                    return Poll::Ready(frame);
                }
                if let (Some(Ok(frame)), Some(left)) = (&frame, left)
                    && let Some(data) = frame.data_ref()
                {
                    *left = left.saturating_sub(data.len() as u64);
                }
                frame
            }
        };
        if let (Some(Ok(frame)), Some(exchange)) = (&frame, &mut this.exchange)
            && let Some(data) = frame.data_ref()
        {
            exchange.record.response_bytes = exchange.record.response_bytes.saturating_add(data.len() as u64);
            if let Some(fill) = &mut exchange.fill {
                fill.data(data);
            }
        }
        if frame.is_none() || this.is_end_stream() {
            this.finish();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Answer::Upstream(body) => body.is_end_stream(),
            Answer::Own(body) => body.is_none(),
            Answer::Filtered(body, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Answer::Upstream(body) => body.size_hint(),
            Answer::Own(body) => SizeHint::with_exact(body.as_ref().map_or(0, |b| b.len() as u64)),
            Answer::Filtered(_, left) => left.map_or_else(SizeHint::default, SizeHint::with_exact),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            // A body that ended without being polled to its end (nothing was left, or a HEAD request) is
            // complete all the same.
            if self.is_end_stream() || matches!(self.source, Answer::Own(_)) {
                exchange.complete();
            }
        }
    }
}

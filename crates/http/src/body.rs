//! Bodies on their way through: counted, never buffered whole.

use crate::exchange::Exchange;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// What a body ends in when its source fails.
pub(crate) type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// A request's body on its way to an upstream.
pub(crate) struct RequestBody {
    source: Option<Incoming>,
    meter: Rc<Meter>,
}

/// What has passed of a request's body; shared by the body and the request's exchange.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    bytes: Cell<u64>,
    touched: Cell<bool>,
    ended: Cell<bool>,
    tee: RefCell<Option<Tee>>,
}

/// The first bytes of a body, kept for a plugin.
#[derive(Debug)]
struct Tee {
    kept: Vec<u8>,
    limit: usize,
    /// It ended within the limit.
    whole: bool,
    /// It was longer.
    over: bool,
}

impl Meter {
    /// Keeps a copy of the body as it passes, up to `limit` bytes.
    pub(crate) fn keep(&self, limit: usize) {
        *self.tee.borrow_mut() = Some(Tee {
            kept: Vec::new(),
            limit,
            whole: false,
            over: false,
        });
    }

    /// Bytes that passed.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Whether anything was read from the client's body.
    pub(crate) fn touched(&self) -> bool {
        self.touched.get()
    }

    /// The whole body, if it was kept and was within the limit.
    pub(crate) fn kept(&self) -> Option<Vec<u8>> {
        self.tee
            .borrow()
            .as_ref()
            .filter(|tee| tee.whole && !tee.over)
            .map(|tee| tee.kept.clone())
    }

    /// Counts bytes that passed beside the body.
    pub(crate) fn add(&self, bytes: u64) {
        self.bytes.set(self.bytes.get().saturating_add(bytes));
    }

    fn pass(&self, data: &[u8]) {
        self.add(data.len() as u64);
        if let Some(tee) = &mut *self.tee.borrow_mut() {
            if tee.kept.len() + data.len() > tee.limit {
                tee.over = true;
                tee.kept = Vec::new();
                tee.limit = 0;
            } else {
                tee.kept.extend_from_slice(data);
            }
        }
    }

    /// Whether the whole body has passed.
    pub(crate) fn ended(&self) -> bool {
        self.ended.get()
    }

    fn end(&self) {
        self.ended.set(true);
        if let Some(tee) = &mut *self.tee.borrow_mut() {
            tee.whole = true;
        }
    }
}

impl RequestBody {
    /// The client's body; one that has ended already is held to be none, and can be sent again.
    pub(crate) fn new(source: Incoming, meter: &Rc<Meter>) -> Self {
        let source = (!source.is_end_stream()).then_some(source);
        if source.is_none() {
            meter.end();
        }
        Self {
            source,
            meter: Rc::clone(meter),
        }
    }

    /// No body, as in a request that is sent once more.
    pub(crate) fn none(meter: &Rc<Meter>) -> Self {
        Self {
            source: None,
            meter: Rc::clone(meter),
        }
    }

    /// Whether there is no body.
    pub(crate) fn is_none(&self) -> bool {
        self.source.is_none()
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
        let Some(source) = &mut this.source else {
            return Poll::Ready(None);
        };
        this.meter.touched.set(true);
        let frame = std::task::ready!(Pin::new(source).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.meter.pass(data);
                }
            }
            Some(Err(_)) => {}
            None => this.meter.end(),
        }
        if this.source.as_ref().is_some_and(Body::is_end_stream) {
            this.meter.end();
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.source.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.source
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

/// A response's body on its way to the client. Its end, or its being dropped, ends the exchange: that is
/// when the connection is given back, the permit returned and the record written.
pub(crate) struct ResponseBody {
    source: Source,
    exchange: Option<Box<Exchange>>,
}

enum Source {
    Upstream(Incoming),
    Own(Option<Bytes>),
}

impl ResponseBody {
    /// An upstream's body.
    pub(crate) fn upstream(body: Incoming, exchange: Box<Exchange>) -> Self {
        let mut this = Self {
            source: Source::Upstream(body),
            exchange: Some(exchange),
        };
        // Nothing may be polled of a body that is empty, so its end is now.
        if this.is_end_stream() {
            this.finish();
        }
        this
    }

    /// A body of the proxy's own making.
    pub(crate) fn own(body: Bytes, exchange: Box<Exchange>) -> Self {
        let source = Source::Own(Some(body).filter(|b| !b.is_empty()));
        Self {
            source,
            exchange: Some(exchange),
        }
    }

    /// No body, and no exchange that hangs on it.
    pub(crate) fn none() -> Self {
        Self {
            source: Source::Own(None),
            exchange: None,
        }
    }

    fn finish(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            exchange.complete();
        }
    }

    fn fail(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            exchange.cut_short_by_upstream();
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
            Source::Upstream(body) => match std::task::ready!(Pin::new(body).poll_frame(cx)) {
                Some(Ok(frame)) => Some(Ok(frame)),
                Some(Err(error)) => {
                    this.fail();
                    return Poll::Ready(Some(Err(error.into())));
                }
                None => None,
            },
            Source::Own(body) => body.take().map(|body| Ok(Frame::data(body))),
        };
        if let (Some(Ok(frame)), Some(exchange)) = (&frame, &mut this.exchange)
            && let Some(data) = frame.data_ref()
        {
            exchange.record.response_bytes = exchange.record.response_bytes.saturating_add(data.len() as u64);
        }
        if frame.is_none() || this.is_end_stream() {
            this.finish();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Upstream(body) => body.is_end_stream(),
            Source::Own(body) => body.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Upstream(body) => body.size_hint(),
            Source::Own(body) => SizeHint::with_exact(body.as_ref().map_or(0, |b| b.len() as u64)),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            // A body that ended without being polled to its end (nothing was left, or a HEAD request) is
            // complete all the same.
            if self.is_end_stream() || matches!(self.source, Source::Own(_)) {
                exchange.complete();
            }
        }
    }
}

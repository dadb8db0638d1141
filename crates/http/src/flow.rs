//! A message's body on its way past filters: piece by piece, each filter given what the one before it lets go on.

use crate::body::{BodyError, ResponseBody, Source, Tail};
use crate::exchange::Exchange;
use crate::filtered::{Passer, Stopped};
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use http_body_util::{BodyExt, StreamBody};
use leeward_wasm::{Fault, Filter, Step};
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long a filter may hold a message up that has no deadline.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which of a request's two messages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Way {
    Request,
    Response,
}

/// Where a body comes from.
pub(crate) enum Raw {
    /// The client.
    Client(Source),
    /// The service, or whatever answers in its place.
    Answer(ResponseBody),
    /// Nowhere: there is no more.
    Ended,
}

impl Raw {
    async fn frame(&mut self) -> Option<Result<Frame<Bytes>, BodyError>> {
        match self {
            Self::Client(body) => body.frame().await,
            Self::Answer(body) => body.frame().await,
            Self::Ended => None,
        }
    }
}

/// A piece of a body between two filters.
enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
}

impl Piece {
    /// The same, if it ends the body.
    fn end(&self) -> Option<Self> {
        match self {
            Self::Data(_) => None,
            Self::Trailers(trailers) => Some(Self::Trailers(trailers.clone())),
            Self::End => Some(Self::End),
        }
    }
}

/// A body and the filters that it passes, in the order in which it passes them.
pub(crate) struct Flow {
    raw: Raw,
    way: Way,
    passers: Vec<Rc<Passer>>,
    /// What waits before each filter; the last is what has passed all of them.
    before: Vec<VecDeque<Piece>>,
    until: Option<Instant>,
    bodiless: bool,
    /// Of an answer that has come whole.
    tail: Tail,
}

/// Why a head that a filter holds up can't go on.
pub(crate) enum Held {
    /// The filter's own fault.
    Fault(Fault),
    /// An earlier filter ends the message.
    Stopped(Stopped),
    /// Whoever sends the body has gone.
    Gone,
}

impl From<Fault> for Held {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// How a wait for a filter ended.
enum Waited {
    Filter(Result<Step, Fault>),
    Frame(Option<Result<Frame<Bytes>, BodyError>>),
}

impl Flow {
    pub(crate) fn new(raw: Raw, way: Way, passers: Vec<Rc<Passer>>, until: Option<Instant>) -> Self {
        let before = (0..=passers.len()).map(|_| VecDeque::new()).collect();
        Self {
            raw,
            way,
            passers,
            before,
            until,
            bodiless: false,
            tail: Tail::default(),
        }
    }

    /// Waits until a filter that holds a head up lets it go. Meanwhile it is given the body, as it wants it.
    pub(crate) async fn hold(&mut self, at: usize, filter: &mut Filter) -> Result<Step, Held> {
        let until = self.until.unwrap_or_else(|| in_a_while(PATIENCE));
        let held = async {
            loop {
                if !self.wants_body(filter) || self.has_ended(at) {
                    return Ok(filter.resumed().await?);
                }
                // What earlier filters have let go on comes first.
                self.advance(at).await.map_err(Held::Stopped)?;
                let given = match self.before.get_mut(at).and_then(VecDeque::pop_front) {
                    Some(piece) => Some(piece),
                    None => {
                        let waited = tokio::select! {
                            biased;
                            step = filter.resumed() => Waited::Filter(step),
                            frame = self.raw.frame() => Waited::Frame(frame),
                        };
                        match waited {
                            Waited::Filter(step) => return Ok(step?),
                            Waited::Frame(frame) => {
                                self.take_in(frame).map_err(|_| Held::Gone)?;
                                None
                            }
                        }
                    }
                };
                let Some(piece) = given else { continue };
                let end = piece.end();
                let step = match self.give(at, filter, piece).await {
                    Ok(step) => step,
                    Err(fault) => {
                        // Where policy lets the message go on, what it held does, and its end.
                        self.collect(at, filter);
                        if let Some(end) = end {
                            self.put(at + 1, end);
                        }
                        return Err(fault.into());
                    }
                };
                if step != Step::Wait {
                    return Ok(step);
                }
            }
        };
        match tokio::time::timeout_at(until.into(), held).await {
            Ok(step) => step,
            Err(_) => Err(Held::Fault(Fault::Time)),
        }
    }

    /// Gives a filter a piece; what it lets go on waits before the next one.
    async fn give(&mut self, at: usize, filter: &mut Filter, piece: Piece) -> Result<Step, Fault> {
        match piece {
            Piece::Data(data) => {
                let step = match self.way {
                    Way::Request => filter.request_body(data, false).await?,
                    Way::Response => filter.response_body(data, false).await?,
                };
                if step == Step::Go {
                    self.collect(at, filter);
                }
                Ok(step)
            }
            Piece::End => {
                let step = match self.way {
                    Way::Request => filter.request_body(Bytes::new(), true).await?,
                    Way::Response => filter.response_body(Bytes::new(), true).await?,
                };
                self.ended(at, step, filter, Piece::End).await
            }
            Piece::Trailers(trailers) => {
                let (step, trailers) = match self.way {
                    Way::Request => filter.request_trailers(trailers).await?,
                    Way::Response => filter.response_trailers(trailers).await?,
                };
                self.ended(at, step, filter, Piece::Trailers(trailers)).await
            }
        }
    }

    /// The end goes on when the filter lets it.
    async fn ended(
        &mut self,
        at: usize,
        mut step: Step,
        filter: &mut Filter,
        end: Piece,
    ) -> Result<Step, Fault> {
        if step == Step::Wait {
            let until = self.until.unwrap_or_else(|| in_a_while(PATIENCE));
            step = match tokio::time::timeout_at(until.into(), filter.resumed()).await {
                Ok(step) => step?,
                Err(_) => return Err(Fault::Time),
            };
        }
        if step == Step::Go {
            self.collect(at, filter);
            self.put(at + 1, end);
        }
        Ok(step)
    }

    /// What a filter has let go on.
    pub(crate) fn collect(&mut self, at: usize, filter: &mut Filter) {
        let data = match self.way {
            Way::Request => filter.take_request_body(),
            Way::Response => filter.take_response_body(),
        };
        if !data.is_empty() {
            self.put(at + 1, Piece::Data(data));
        }
    }

    fn put(&mut self, before: usize, piece: Piece) {
        if let Some(queue) = self.before.get_mut(before) {
            queue.push_back(piece);
        }
    }

    fn wants_body(&self, filter: &mut Filter) -> bool {
        match self.way {
            Way::Request => filter.wants_request_body(),
            Way::Response => filter.wants_response_body(),
        }
    }

    /// Whether nothing more can come to the filter at this place.
    fn has_ended(&self, at: usize) -> bool {
        self.bodiless
            || matches!(self.raw, Raw::Ended) && self.before.iter().take(at + 1).all(VecDeque::is_empty)
    }

    /// There is no body; its end was told with the head.
    pub(crate) const fn has_no_body(&mut self) {
        self.bodiless = true;
    }

    /// Does something to the exchange of an answer.
    pub(crate) fn tell(&mut self, tell: impl FnOnce(&mut Exchange)) {
        match (&mut self.raw, &mut *self.tail.borrow_mut()) {
            (_, Some(exchange)) => tell(exchange),
            (Raw::Answer(body), None) => {
                if let Some(exchange) = body.exchange() {
                    tell(exchange);
                }
            }
            (Raw::Client(_) | Raw::Ended, None) => {}
        }
    }

    /// The exchange of an answer that goes no further.
    pub(crate) fn give_up(&mut self) -> Option<Box<Exchange>> {
        let tail = self.tail.borrow_mut().take();
        match &mut self.raw {
            Raw::Answer(body) => tail.or_else(|| body.give_up()),
            Raw::Client(_) | Raw::Ended => tail,
        }
    }

    /// Where the exchange of an answer is, once that has come whole.
    pub(crate) fn tail(&self) -> Tail {
        Rc::clone(&self.tail)
    }

    /// Goes on with a source that was taken back.
    pub(crate) fn resume(&mut self, raw: Raw) {
        self.raw = raw;
    }

    /// What came from the source goes before the first filter.
    fn take_in(&mut self, frame: Option<Result<Frame<Bytes>, BodyError>>) -> Result<(), BodyError> {
        let piece = match frame {
            None => Piece::End,
            Some(Err(error)) => return Err(error),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => Piece::Data(data),
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => Piece::Trailers(trailers),
                    Err(_) => return Ok(()),
                },
            },
        };
        if !matches!(piece, Piece::Data(_))
            && let Raw::Answer(body) = std::mem::replace(&mut self.raw, Raw::Ended)
        {
            self.tail.replace(body.ended());
        }
        self.put(0, piece);
        Ok(())
    }

    /// Brings what waits forward as far as to the place before the filter `upto`.
    async fn advance(&mut self, upto: usize) -> Result<(), Stopped> {
        for at in 0..upto {
            let Some(passer) = self.passers.get(at).cloned() else {
                break;
            };
            while let Some(piece) = self.before.get_mut(at).and_then(VecDeque::pop_front) {
                self.pass(at, &passer, piece).await?;
            }
        }
        Ok(())
    }

    /// One piece past one filter, by whatever policy makes of its faults.
    async fn pass(&mut self, at: usize, passer: &Passer, piece: Piece) -> Result<(), Stopped> {
        if !passer.is_there() {
            self.put(at + 1, piece);
            return Ok(());
        }
        let mut filter = passer.filter.lock().await;
        if !self.wants_body(&mut filter) {
            self.put(at + 1, piece);
            return Ok(());
        }
        // A fault may cost the piece that it is about, which goes on as it is where policy lets it.
        let again = match &piece {
            Piece::Data(data) => Piece::Data(data.clone()),
            Piece::Trailers(trailers) => Piece::Trailers(trailers.clone()),
            Piece::End => Piece::End,
        };
        match self.give(at, &mut filter, piece).await {
            Ok(Step::Go | Step::Wait) => Ok(()),
            Ok(Step::Respond(reply)) => Err(Stopped::Reply(passer.name(), reply)),
            Err(fault) => {
                let held_before = match self.way {
                    Way::Request => filter.take_request_body(),
                    Way::Response => filter.take_response_body(),
                };
                passer.faulted(fault)?;
                // What it held, which has the piece in it, unless it gave nothing back.
                match again {
                    Piece::Data(data) if held_before.is_empty() => self.put(at + 1, Piece::Data(data)),
                    Piece::Data(_) => self.put(at + 1, Piece::Data(held_before)),
                    end @ (Piece::Trailers(_) | Piece::End) => {
                        if !held_before.is_empty() {
                            self.put(at + 1, Piece::Data(held_before));
                        }
                        self.put(at + 1, end);
                    }
                }
                Ok(())
            }
        }
    }

    /// The next frame that has passed every filter.
    async fn next(&mut self) -> Option<Result<Frame<Bytes>, BodyError>> {
        let last = self.passers.len();
        loop {
            if let Err(stopped) = self.advance(last).await {
                return Some(Err(self.stop(stopped)));
            }
            match self.before.get_mut(last).and_then(VecDeque::pop_front) {
                Some(Piece::Data(data)) => return Some(Ok(Frame::data(data))),
                Some(Piece::Trailers(trailers)) => return Some(Ok(Frame::trailers(trailers))),
                Some(Piece::End) => return None,
                None => {}
            }
            if matches!(self.raw, Raw::Ended) {
                return None;
            }
            let frame = self.raw.frame().await;
            if let Err(error) = self.take_in(frame) {
                if let Some(exchange) = self.give_up() {
                    exchange.cut_short_by_upstream();
                }
                return Some(Err(error));
            }
        }
    }

    fn stop(&mut self, stopped: Stopped) -> BodyError {
        if let Some(exchange) = self.give_up() {
            exchange.cut_short_by_plugin();
        }
        self.raw = Raw::Ended;
        for queue in &mut self.before {
            queue.clear();
        }
        if let Some(passer) = self.passers.first() {
            passer.stop(stopped);
        }
        "a filter ended the message".into()
    }

    /// How many bytes have passed every filter, if that is all there is.
    pub(crate) fn length(&mut self) -> Option<u64> {
        if !matches!(self.raw, Raw::Ended) {
            return None;
        }
        let (last, earlier) = self.before.split_last()?;
        if !earlier.iter().all(VecDeque::is_empty) {
            return None;
        }
        let mut bytes = 0;
        for piece in last {
            match piece {
                Piece::Data(data) => bytes += data.len() as u64,
                Piece::Trailers(_) => return None,
                Piece::End => {}
            }
        }
        Some(bytes)
    }

    /// Takes the source back, if nothing of it was touched.
    pub(crate) fn untouched(&mut self) -> Option<Raw> {
        let idle = self.before.iter().all(VecDeque::is_empty);
        (idle && !matches!(self.raw, Raw::Ended)).then(|| std::mem::replace(&mut self.raw, Raw::Ended))
    }

    /// As a body.
    pub(crate) fn into_body(mut self) -> Pin<Box<dyn Body<Data = Bytes, Error = BodyError>>> {
        // The deadline is for the head.
        self.until = None;
        let frames = futures_util::stream::unfold(Some(self), |flow| async move {
            let mut flow = flow?;
            match flow.next().await? {
                Ok(frame) => Some((Ok(frame), Some(flow))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Box::pin(StreamBody::new(frames))
    }
}

pub(crate) fn in_a_while(wait: Duration) -> Instant {
    tokio::time::Instant::now().into_std() + wait
}

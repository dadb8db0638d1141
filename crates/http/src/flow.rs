//! A message's body on its way past filters: piece by piece, each filter given what the one before it lets go on.
//!
//! A filter is had for one turn at a time, never while anything is waited for: the answer's head may come past it while it
//! holds up the end of the request's body, and what the service needs to answer may have to pass it first.

use crate::body::{BodyError, ResponseBody, Source};
use crate::cached::wall;
use crate::filtered::{Passer, Stopped};
use crate::idle::{Parked, Side, Stall};
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use leeward_cache::Fill;
use leeward_wasm::{Fault, Filter, Step, Wake, Way};
use std::collections::VecDeque;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// How long a filter may hold a message up that has no deadline.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long it may hold an answer's head up at least, however late that comes.
const LEAST: Duration = Duration::from_secs(1);

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
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self {
            Self::Client(body) => Pin::new(body).poll_frame(cx),
            Self::Answer(body) => Pin::new(body).poll_frame(cx),
            Self::Ended => Poll::Ready(None),
        }
    }

    fn has_ended(&self) -> bool {
        match self {
            Self::Client(body) => body.is_end_stream(),
            Self::Answer(body) => body.is_end_stream(),
            Self::Ended => true,
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
    /// Another of the same.
    fn again(&self) -> Self {
        match self {
            Self::Data(data) => Self::Data(data.clone()),
            Self::Trailers(trailers) => Self::Trailers(trailers.clone()),
            Self::End => Self::End,
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
    stall: Rc<Stall>,
    /// Where the body is kept as it comes, before filters change it.
    fill: Option<Fill>,
    until: Option<Instant>,
    bodiless: bool,
    /// Something of the body has come.
    touched: bool,
}

/// Why a head that a filter holds up can't go on.
pub(crate) enum Held {
    /// The filter's own fault.
    Fault(Fault),
    /// An earlier filter ends the message.
    Stopped(Stopped),
    /// Whoever sends the body has gone, or stands still.
    Lost(Lost),
}

/// What becomes of whoever sends a body.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Lost {
    /// It broke off.
    Gone,
    /// It wasn't in time.
    Late,
}

impl From<Fault> for Held {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// How a wait ended.
enum Waited {
    /// The filter may have something to say.
    Woken,
    Frame(Result<Option<Frame<Bytes>>, Lost>),
    TimeIsUp,
}

impl Flow {
    pub(crate) fn new(
        raw: Raw,
        way: Way,
        passers: Vec<Rc<Passer>>,
        stall: &Rc<Stall>,
        until: Option<Instant>,
    ) -> Self {
        let before = (0..=passers.len()).map(|_| VecDeque::new()).collect();
        Self {
            raw,
            way,
            passers,
            before,
            stall: Rc::clone(stall),
            fill: None,
            until,
            bodiless: false,
            touched: false,
        }
    }

    /// Keeps the body there as it comes.
    pub(crate) fn keep(&mut self, fill: Option<Fill>) {
        self.fill = fill;
    }

    /// Waits until a filter that holds a head up lets it go. Meanwhile it is given the body, as it wants it.
    ///
    /// A filter that waits for something of its own has until the request's deadline. One that waits for the body has as long
    /// as its sender has: that isn't the filter's fault.
    pub(crate) async fn hold(&mut self, at: usize, passer: &Passer) -> Result<Step, Held> {
        let until = match (self.until, self.way) {
            (None, _) => in_a_while(PATIENCE),
            (Some(until), Way::Request) => until,
            // A failure comes at the deadline, and passes filters all the same.
            (Some(until), Way::Response) => until.max(in_a_while(LEAST)),
        };
        loop {
            let (wants, wake) = {
                let mut filter = passer.filter.lock().await;
                (wants_body(self.way, &mut filter), filter.wake(self.way))
            };
            let feeds = wants && !self.has_ended(at);
            if feeds {
                // What earlier filters have let go on comes first.
                self.advance(at).await.map_err(Held::Stopped)?;
                if let Some(piece) = self.before.get_mut(at).and_then(VecDeque::pop_front) {
                    match self.give(at, passer, piece, until).await? {
                        Step::Wait => continue,
                        step @ (Step::Go | Step::Respond(_)) => return Ok(step),
                    }
                }
            }
            let is_own = wake.is_some() || !feeds;
            let limit = match self.way {
                Way::Request => is_own.then_some(until).or(self.until),
                // The deadline is for the head, which has come.
                Way::Response => is_own.then_some(until),
            };
            match self.wait(wake, feeds, limit).await {
                Waited::Woken => match passer.filter.lock().await.resume(self.way).await? {
                    Step::Wait => {}
                    step @ (Step::Go | Step::Respond(_)) => return Ok(step),
                },
                Waited::Frame(frame) => self.take_in(frame.map_err(Held::Lost)?),
                Waited::TimeIsUp if is_own => {
                    passer.filter.lock().await.give_up(self.way).await;
                    return Err(Held::Fault(Fault::Time));
                }
                Waited::TimeIsUp => return Err(Held::Lost(Lost::Late)),
            }
        }
    }

    /// Waits for a filter, or for more of the body.
    async fn wait(&mut self, wake: Option<Wake>, feeds: bool, limit: Option<Instant>) -> Waited {
        let woken = woken(wake);
        let frame = poll_fn(|cx| if feeds { self.poll_raw(cx) } else { Poll::Pending });
        let waited = async {
            tokio::select! {
                biased;
                () = woken => Waited::Woken,
                frame = frame => Waited::Frame(frame),
            }
        };
        match limit {
            None => waited.await,
            Some(limit) => tokio::time::timeout_at(limit.into(), waited)
                .await
                .unwrap_or(Waited::TimeIsUp),
        }
    }

    /// Gives a filter a piece; what it lets go on waits before the next one. At the end that is waited for.
    ///
    /// After a fault what the filter has of the body waits there, too, with the piece, to go on if policy lets it.
    async fn give(
        &mut self,
        at: usize,
        passer: &Passer,
        piece: Piece,
        until: Instant,
    ) -> Result<Step, Fault> {
        let again = piece.again();
        let is_end = !matches!(piece, Piece::Data(_));
        let step = match self.turn(passer, piece).await {
            Ok(Step::Wait) if is_end => self.resumed(passer, until).await,
            step => step,
        };
        if matches!(step, Ok(Step::Respond(_))) {
            return step;
        }
        let (data, trailers) = {
            let mut filter = passer.filter.lock().await;
            (take_body(self.way, &mut filter), filter.take_trailers(self.way))
        };
        let nothing = data.is_empty();
        if !nothing {
            self.put(at + 1, Piece::Data(data));
        }
        match again {
            // All that it had should be there, and the piece with it; unless nothing is.
            Piece::Data(data) if nothing && step.is_err() => self.put(at + 1, Piece::Data(data)),
            Piece::Data(_) => {}
            Piece::Trailers(again) => self.put(at + 1, Piece::Trailers(trailers.unwrap_or(again))),
            Piece::End => self.put(at + 1, Piece::End),
        }
        step
    }

    async fn turn(&self, passer: &Passer, piece: Piece) -> Result<Step, Fault> {
        let mut filter = passer.filter.lock().await;
        match (self.way, piece) {
            (Way::Request, Piece::Data(data)) => filter.request_body(data, false).await,
            (Way::Request, Piece::Trailers(trailers)) => filter.request_trailers(trailers).await,
            (Way::Request, Piece::End) => filter.request_body(Bytes::new(), true).await,
            (Way::Response, Piece::Data(data)) => filter.response_body(data, false).await,
            (Way::Response, Piece::Trailers(trailers)) => filter.response_trailers(trailers).await,
            (Way::Response, Piece::End) => filter.response_body(Bytes::new(), true).await,
        }
    }

    /// Waits until a filter goes on by itself.
    async fn resumed(&self, passer: &Passer, until: Instant) -> Result<Step, Fault> {
        loop {
            let wake = passer.filter.lock().await.wake(self.way);
            if tokio::time::timeout_at(until.into(), woken(wake)).await.is_err() {
                passer.filter.lock().await.give_up(self.way).await;
                return Err(Fault::Time);
            }
            match passer.filter.lock().await.resume(self.way).await? {
                Step::Wait => {}
                step @ (Step::Go | Step::Respond(_)) => return Ok(step),
            }
        }
    }

    /// What a filter has let go on.
    pub(crate) fn collect(&mut self, at: usize, data: Bytes) {
        if !data.is_empty() {
            self.put(at + 1, Piece::Data(data));
        }
    }

    fn put(&mut self, before: usize, piece: Piece) {
        if let Some(queue) = self.before.get_mut(before) {
            queue.push_back(piece);
        }
    }

    /// Whether nothing more can come to the filter at this place.
    fn has_ended(&self, at: usize) -> bool {
        self.bodiless || self.has_come() && self.before.iter().take(at + 1).all(VecDeque::is_empty)
    }

    /// There is no body; its end was told with the head.
    pub(crate) const fn has_no_body(&mut self) {
        self.bodiless = true;
    }

    /// Whether all of the body has come, however much of it filters have yet.
    pub(crate) const fn has_come(&self) -> bool {
        matches!(self.raw, Raw::Ended)
    }

    /// Whether it has come, and all of it has passed and been given.
    fn is_over(&self) -> bool {
        let is_end = |piece: &Piece| matches!(piece, Piece::End);
        self.before.split_last().is_none_or(|(last, earlier)| {
            self.has_come() && earlier.iter().all(VecDeque::is_empty) && last.iter().all(is_end)
        })
    }

    /// More of the body, from where it comes.
    fn poll_raw(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame<Bytes>>, Lost>> {
        match self.raw.poll_frame(cx) {
            Poll::Ready(frame) => {
                self.stall.touch();
                Poll::Ready(frame.transpose().map_err(|_| Lost::Gone))
            }
            Poll::Pending => {
                let side = match self.way {
                    Way::Request => Side::Request,
                    Way::Response => Side::Response,
                };
                match self.stall.park(side, cx) {
                    Parked::Waiting => Poll::Pending,
                    Parked::Expired => Poll::Ready(Err(Lost::Late)),
                }
            }
        }
    }

    /// What came from the source goes before the first filter.
    fn take_in(&mut self, frame: Option<Frame<Bytes>>) {
        self.touched = true;
        let piece = match frame.map(Frame::into_data) {
            None => Piece::End,
            Some(Ok(data)) => {
                if let Some(fill) = &mut self.fill {
                    fill.data(&data);
                }
                Piece::Data(data)
            }
            Some(Err(frame)) => match frame.into_trailers() {
                Ok(trailers) => Piece::Trailers(trailers),
                Err(_) => return,
            },
        };
        let is_data = matches!(piece, Piece::Data(_));
        self.put(0, piece);
        if is_data {
            if !self.raw.has_ended() {
                return;
            }
            self.put(0, Piece::End);
        }
        self.raw = Raw::Ended;
        if let Some(fill) = self.fill.take() {
            fill.finish(wall());
        }
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
        if !passer.is_there() || !wants_body(self.way, &mut *passer.filter.lock().await) {
            self.put(at + 1, piece);
            return Ok(());
        }
        match self.give(at, passer, piece, in_a_while(PATIENCE)).await {
            Ok(Step::Go | Step::Wait) => Ok(()),
            Ok(Step::Respond(reply)) => Err(Stopped::Reply(passer.name(), reply)),
            Err(fault) => passer.faulted(fault),
        }
    }

    /// Whether something waits before a filter.
    fn has_work(&self) -> bool {
        let earlier = self.before.split_last().map(|(_, earlier)| earlier);
        earlier.is_some_and(|earlier| !earlier.iter().all(VecDeque::is_empty))
    }

    /// What has passed every filter.
    fn passed(&mut self) -> Option<Piece> {
        self.before.last_mut()?.pop_front()
    }

    /// Brings all forward past filters that don't want the body.
    async fn skip(&mut self) {
        for at in 0..self.passers.len() {
            let Some(passer) = self.passers.get(at) else { break };
            if passer.is_there() && wants_body(self.way, &mut *passer.filter.lock().await) {
                continue;
            }
            let waiting = self.before.get_mut(at).map(std::mem::take).unwrap_or_default();
            if let Some(next) = self.before.get_mut(at + 1) {
                next.extend(waiting);
            }
        }
    }

    /// How many bytes have passed every filter, if that is all there is.
    fn length(&self) -> Option<u64> {
        let (last, earlier) = self.before.split_last()?;
        if !self.has_come() || !earlier.iter().all(VecDeque::is_empty) {
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

    /// Whether a filter that is there still is to have the body, or what comes of it.
    pub(crate) async fn is_wanted(&self) -> bool {
        for passer in &self.passers {
            if passer.is_there() && wants_body(self.way, &mut *passer.filter.lock().await) {
                return true;
            }
        }
        false
    }

    /// Whether nothing has come, and no filter has put anything in its place.
    pub(crate) fn is_untouched(&self) -> bool {
        !self.touched && self.before.iter().all(VecDeque::is_empty)
    }

    /// Where the body comes from, and where it is kept.
    pub(crate) fn into_raw(self) -> (Raw, Option<Fill>) {
        (self.raw, self.fill)
    }

    /// As a body; and its length, if that is known.
    pub(crate) async fn into_body(mut self) -> (FlowBody, Option<u64>) {
        self.skip().await;
        let length = self.length();
        (FlowBody::new(self), length)
    }
}

fn wants_body(way: Way, filter: &mut Filter) -> bool {
    match way {
        Way::Request => filter.wants_request_body(),
        Way::Response => filter.wants_response_body(),
    }
}

fn take_body(way: Way, filter: &mut Filter) -> Bytes {
    match way {
        Way::Request => filter.take_request_body(),
        Way::Response => filter.take_response_body(),
    }
}

async fn woken(wake: Option<Wake>) {
    match wake {
        Some(wake) => wake.woken().await,
        None => pending().await,
    }
}

fn in_a_while(wait: Duration) -> Instant {
    tokio::time::Instant::now().into_std() + wait
}

/// What filters let pass of a body, as a body.
pub(crate) struct FlowBody {
    state: State,
    broke: Option<Broke>,
}

/// Why it broke off.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Broke {
    /// With its source.
    Lost(Lost),
    /// A filter ended it.
    Filter,
}

/// The flow, and whether it goes on.
type Advanced = (Box<Flow>, Result<(), Stopped>);

enum State {
    /// No filter has its turn.
    Idle(Box<Flow>),
    /// One has, and is driven by whoever reads.
    Turn(Pin<Box<dyn Future<Output = Advanced>>>),
    /// The same, but nobody reads at the moment.
    Aside(tokio::task::JoinHandle<Advanced>),
    Over,
}

impl FlowBody {
    fn new(flow: Flow) -> Self {
        Self {
            state: State::Idle(Box::new(flow)),
            broke: None,
        }
    }

    /// Nobody reads for a while: a filter that has its turn is driven to the end of that all the same, since others wait
    /// for what it holds. What comes of it is there when the body is read again.
    pub(crate) fn set_aside(&mut self) {
        if matches!(self.state, State::Turn(_))
            && tokio::runtime::Handle::try_current().is_ok()
            && let State::Turn(turn) = std::mem::replace(&mut self.state, State::Over)
        {
            self.state = State::Aside(tokio::task::spawn_local(turn));
        }
    }

    /// Why it broke off, if it did.
    pub(crate) const fn broke(&self) -> Option<Broke> {
        self.broke
    }

    /// Whether all has come from where the body comes from.
    pub(crate) const fn has_come(&self) -> bool {
        match &self.state {
            State::Idle(flow) => flow.has_come(),
            State::Turn(_) | State::Aside(_) => false,
            State::Over => true,
        }
    }

    fn break_off(&mut self, why: Broke) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.state = State::Over;
        self.broke = Some(why);
        let said = match why {
            Broke::Lost(Lost::Gone) => "the body broke off",
            Broke::Lost(Lost::Late) => "the body stands still",
            Broke::Filter => "a filter ended the message",
        };
        Poll::Ready(Some(Err(said.into())))
    }
}

impl Body for FlowBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        loop {
            let advanced = match &mut this.state {
                State::Idle(flow) => match flow.passed() {
                    Some(Piece::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                    Some(Piece::Trailers(trailers)) => {
                        return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                    }
                    Some(Piece::End) => None,
                    None if flow.has_work() => {
                        let State::Idle(mut flow) = std::mem::replace(&mut this.state, State::Over) else {
                            continue;
                        };
                        this.state = State::Turn(Box::pin(async move {
                            let went = flow.advance(flow.passers.len()).await;
                            (flow, went)
                        }));
                        continue;
                    }
                    None if flow.has_come() => None,
                    None => match std::task::ready!(flow.poll_raw(cx)) {
                        Ok(frame) => {
                            flow.take_in(frame);
                            continue;
                        }
                        Err(lost) => return this.break_off(Broke::Lost(lost)),
                    },
                },
                State::Turn(turn) => Some(std::task::ready!(turn.as_mut().poll(cx))),
                State::Aside(turn) => match std::task::ready!(Pin::new(turn).poll(cx)) {
                    Ok(advanced) => Some(advanced),
                    // It panicked, or the worker ends.
                    Err(_) => return this.break_off(Broke::Filter),
                },
                State::Over => return Poll::Ready(None),
            };
            match advanced {
                None => {
                    this.state = State::Over;
                    return Poll::Ready(None);
                }
                Some((flow, Ok(()))) => this.state = State::Idle(flow),
                Some((flow, Err(stopped))) => {
                    if let Some(passer) = flow.passers.first() {
                        passer.stop(stopped);
                    }
                    return this.break_off(Broke::Filter);
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.state {
            State::Idle(flow) => flow.is_over(),
            State::Turn(_) | State::Aside(_) => false,
            State::Over => self.broke.is_none(),
        }
    }
}

impl Drop for FlowBody {
    fn drop(&mut self) {
        if let State::Aside(turn) = &self.state {
            turn.abort();
        }
    }
}

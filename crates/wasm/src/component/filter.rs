//! The world `filter`: one request's way past a component.

use super::bindings::filter::leeward::plugin::passing::{
    BodyMode, BodyVerdict, Interest, RequestVerdict, ResponseVerdict,
};
use super::code::Guest;
use super::convert;
use super::passing::{Message, Passing, THIS};
use super::pool::{Brief, Pool};
use super::state::Subject;
use crate::call::{Facts, Reply, RequestHead, ResponseHead};
use crate::fault::Fault;
use crate::filter::{Step, Wake, Way};
use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use std::mem;
use std::rc::Rc;
use std::time::Duration;
use wasmtime::Error;
use wasmtime::component::Resource;

/// A component as a filter of one request.
pub(crate) struct Filter {
    pool: Rc<Pool>,
    /// Until the head has come.
    facts: Option<Facts>,
    /// The request on its way.
    subject: Subject,
    request: Flow,
    response: Flow,
    wants_response: bool,
    /// It asked for the answer's body, whether there was one or not.
    asked: bool,
    /// An answer that it hasn't asked for, or not any more.
    unseen: Option<ResponseHead>,
}

/// A body on its way.
#[derive(Debug)]
struct Flow {
    /// How what is still to come is handed over.
    mode: BodyMode,
    /// What has come of a body that is handed over whole.
    held: Vec<Bytes>,
    /// What goes on.
    out: Bytes,
    /// Behind it.
    trailers: Option<HeaderMap>,
}

/// What is called with a body.
const fn function(way: Way) -> &'static str {
    match way {
        Way::Request => "on-request-body",
        Way::Response => "on-response-body",
    }
}

/// What a call came to: it goes on, or there is an answer.
enum Verdict<T> {
    Go(T),
    Respond(Reply),
}

impl<T> Verdict<T> {
    fn respond(reply: Result<Reply, String>) -> Result<Self, String> {
        reply.map(Self::Respond)
    }
}

impl Flow {
    const fn new() -> Self {
        Self {
            mode: BodyMode::None,
            held: Vec::new(),
            out: Bytes::new(),
            trailers: None,
        }
    }

    fn wants(&self) -> bool {
        !matches!(self.mode, BodyMode::None)
    }

    /// All that has come, in one piece.
    fn whole(&mut self) -> Bytes {
        let mut held = mem::take(&mut self.held);
        if held.len() <= 1 {
            return held.pop().unwrap_or_default();
        }
        let mut whole = BytesMut::with_capacity(held.iter().map(Bytes::len).sum());
        for piece in held {
            whole.extend_from_slice(&piece);
        }
        whole.freeze()
    }
}

impl Filter {
    pub(crate) const fn new(pool: Rc<Pool>, facts: Facts) -> Self {
        Self {
            pool,
            facts: Some(facts),
            subject: Subject::None,
            request: Flow::new(),
            response: Flow::new(),
            wants_response: false,
            asked: false,
            unseen: None,
        }
    }

    /// Takes the head at once: it is large, and no part of the future.
    pub(crate) fn request(
        &mut self,
        head: RequestHead,
        end: bool,
    ) -> impl Future<Output = Result<Step, Fault>> {
        let brief = self.facts.take().map(|facts| {
            let brief = Brief::from(&facts);
            self.subject = Subject::Passing(Box::new(Passing::new(facts, Message::new(head, true))));
            brief
        });
        self.requested(brief, end)
    }

    async fn requested(&mut self, brief: Option<Brief>, end: bool) -> Result<Step, Fault> {
        let brief = brief.ok_or(Fault::Trap)?;
        let verdict = self
            .pool
            .call("on-request", brief, &mut self.subject, async |store, guest| {
                let filter = filter(guest)?;
                Ok(
                    match filter.call_on_request(store, Resource::new_borrow(THIS)).await? {
                        RequestVerdict::Proceed(interest) => Ok(Verdict::Go(interest)),
                        RequestVerdict::Respond(response) => Verdict::respond(convert::reply(response)),
                    },
                )
            })
            .await?;
        match verdict {
            Verdict::Respond(reply) => Ok(Step::Respond(Box::new(reply))),
            Verdict::Go(Interest {
                request_body,
                response,
            }) => {
                self.wants_response = response;
                self.request.mode = if end { BodyMode::None } else { request_body };
                Ok(self.go_or_hold(Way::Request))
            }
        }
    }

    pub(crate) fn take_request(&mut self) -> Option<RequestHead> {
        if self.wants_response || self.request.wants() {
            // It is still read.
            let Subject::Passing(passing) = &mut self.subject else {
                return None;
            };
            passing.request.here = false;
            return Some(passing.request.head.clone());
        }
        match mem::take(&mut self.subject) {
            Subject::Passing(passing) => Some(passing.request.head),
            Subject::None | Subject::Failure(_) => None,
        }
    }

    pub(crate) fn wants_request_body(&mut self) -> bool {
        self.request.wants()
    }

    pub(crate) async fn request_body(&mut self, data: Bytes, end: bool) -> Result<Step, Fault> {
        self.body(Way::Request, data, end).await
    }

    pub(crate) fn take_request_body(&mut self) -> Bytes {
        mem::take(&mut self.request.out)
    }

    pub(crate) fn wants_response(&mut self) -> bool {
        self.wants_response
    }

    pub(crate) async fn response(&mut self, head: ResponseHead, end: bool) -> Result<Step, Fault> {
        let passing = match &mut self.subject {
            Subject::Passing(passing) if self.wants_response => passing,
            Subject::Passing(_) | Subject::None | Subject::Failure(_) => {
                self.unseen = Some(head);
                return Ok(Step::Go);
            }
        };
        passing.response = Some(Message::new(head, true));
        let brief = Brief::untimed(&passing.facts);
        let verdict = self
            .pool
            .call("on-response", brief, &mut self.subject, async |store, guest| {
                let (request, response) = (Resource::new_borrow(THIS), Resource::new_borrow(THIS));
                Ok(
                    match filter(guest)?.call_on_response(store, request, response).await? {
                        ResponseVerdict::Proceed(mode) => Ok(Verdict::Go(mode)),
                        ResponseVerdict::Respond(response) => Verdict::respond(convert::reply(response)),
                    },
                )
            })
            .await;
        match verdict {
            Err(fault) => Err(self.fault(fault)),
            Ok(Verdict::Respond(reply)) => Ok(Step::Respond(Box::new(reply))),
            Ok(Verdict::Go(mode)) => {
                self.asked = !matches!(mode, BodyMode::None);
                self.response.mode = if end { BodyMode::None } else { mode };
                Ok(self.go_or_hold(Way::Response))
            }
        }
    }

    pub(crate) fn take_response(&mut self) -> Option<ResponseHead> {
        if let Some(head) = self.unseen.take() {
            return Some(head);
        }
        let Subject::Passing(passing) = &mut self.subject else {
            return None;
        };
        if self.response.wants() {
            let response = passing.response.as_mut()?;
            response.here = false;
            return Some(response.head.clone());
        }
        Some(passing.response.take()?.head)
    }

    pub(crate) fn wants_response_body(&mut self) -> bool {
        self.response.wants()
    }

    pub(crate) const fn asked_for_response_body(&self) -> bool {
        self.asked
    }

    pub(crate) async fn response_body(&mut self, data: Bytes, end: bool) -> Result<Step, Fault> {
        self.body(Way::Response, data, end).await
    }

    pub(crate) fn take_response_body(&mut self) -> Bytes {
        mem::take(&mut self.response.out)
    }

    /// It never sees them; but a body that has some ends before them.
    pub(crate) async fn trailers(&mut self, way: Way, trailers: HeaderMap) -> Result<Step, Fault> {
        self.flow(way).trailers = Some(trailers);
        if self.flow(way).wants() {
            self.body(way, Bytes::new(), true).await
        } else {
            Ok(Step::Go)
        }
    }

    pub(crate) const fn take_trailers(&mut self, way: Way) -> Option<HeaderMap> {
        self.flow(way).trailers.take()
    }

    /// What goes on by itself is a module with timers and callbacks; a component isn't one.
    #[expect(clippy::unused_self, reason = "the same for either kind")]
    pub(crate) const fn wake(&self, _: Way) -> Option<Wake> {
        None
    }

    #[expect(clippy::unused_async, reason = "the same for either kind")]
    pub(crate) async fn resume(&self, _: Way) -> Result<Step, Fault> {
        Ok(Step::Wait)
    }

    #[expect(clippy::unused_async, reason = "the same for either kind")]
    pub(crate) async fn give_up(&mut self, way: Way) {
        let flow = self.flow(way);
        flow.out = flow.whole();
        self.fault(Fault::Time);
    }

    pub(crate) fn version(&self) -> &str {
        &self.pool.version.short
    }

    const fn flow(&mut self, way: Way) -> &mut Flow {
        match way {
            Way::Request => &mut self.request,
            Way::Response => &mut self.response,
        }
    }

    /// A head whose body is handed over whole goes on with it.
    fn go_or_hold(&mut self, way: Way) -> Step {
        if matches!(self.flow(way).mode, BodyMode::Whole) {
            return Step::Wait;
        }
        self.head_goes(way);
        Step::Go
    }

    /// The head can't be changed any more.
    fn head_goes(&mut self, way: Way) {
        if let Subject::Passing(passing) = &mut self.subject {
            match way {
                Way::Request => passing.request.here = false,
                Way::Response => {
                    if let Some(response) = &mut passing.response {
                        response.here = false;
                    }
                }
            }
        }
    }

    /// Nothing more is asked of it.
    fn fault(&mut self, fault: Fault) -> Fault {
        self.wants_response = false;
        self.request.mode = BodyMode::None;
        self.response.mode = BodyMode::None;
        fault
    }

    async fn body(&mut self, way: Way, data: Bytes, end: bool) -> Result<Step, Fault> {
        let max = self.pool.spec.limits.max_body_bytes;
        let flow = self.flow(way);
        let data = match flow.mode {
            BodyMode::None => {
                flow.out = data;
                return Ok(Step::Go);
            }
            BodyMode::Pieces => data,
            BodyMode::Whole => {
                if !data.is_empty() {
                    flow.held.push(data);
                }
                let bytes: usize = flow.held.iter().map(Bytes::len).sum();
                if u64::try_from(bytes).is_ok_and(|bytes| bytes > max) {
                    flow.out = flow.whole();
                    self.pool
                        .report(function(way), Some(Fault::BodyTooLarge), Duration::ZERO);
                    return Err(self.fault(Fault::BodyTooLarge));
                }
                if !end {
                    return Ok(Step::Wait);
                }
                flow.whole()
            }
        };
        // What it faults on can still be taken.
        flow.out = data.clone();
        if end {
            flow.mode = BodyMode::None;
        }
        let verdict = self.ask(way, &data, end).await;
        match verdict {
            Err(fault) => Err(self.fault(fault)),
            Ok(Verdict::Respond(reply)) => Ok(Step::Respond(Box::new(reply))),
            Ok(Verdict::Go(replaced)) => {
                if let Some(replaced) = replaced {
                    self.flow(way).out = replaced;
                }
                self.head_goes(way);
                Ok(Step::Go)
            }
        }
    }

    /// Hands a piece of a body over, for what goes on in its place.
    async fn ask(&mut self, way: Way, data: &[u8], end: bool) -> Result<Verdict<Option<Bytes>>, Fault> {
        let Subject::Passing(passing) = &self.subject else {
            return Err(Fault::Trap);
        };
        // A request whose head has gone on may have its answer already, and its body goes on for as long as it likes.
        let brief = if way == Way::Request && passing.request.here {
            Brief::from(&passing.facts)
        } else {
            Brief::untimed(&passing.facts)
        };
        self.pool
            .call(function(way), brief, &mut self.subject, async |store, guest| {
                let filter = filter(guest)?;
                let request = Resource::new_borrow(THIS);
                let verdict = match way {
                    Way::Request => filter.call_on_request_body(store, request, data, end).await?,
                    Way::Response => {
                        let response = Resource::new_borrow(THIS);
                        filter
                            .call_on_response_body(store, request, response, data, end)
                            .await?
                    }
                };
                Ok(match verdict {
                    BodyVerdict::Pass => Ok(Verdict::Go(None)),
                    BodyVerdict::Replace(data) => Ok(Verdict::Go(Some(data.into()))),
                    BodyVerdict::Respond(response) => Verdict::respond(convert::reply(response)),
                })
            })
            .await
    }
}

fn filter(guest: &Guest) -> wasmtime::Result<&super::bindings::filter::Filter> {
    match guest {
        Guest::Filter(filter) => Ok(filter),
        Guest::Fallback(_) | Guest::First(_) | Guest::Router(_) | Guest::WasiHttp(_) => {
            Err(Error::msg("it is not a filter"))
        }
    }
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filter")
            .field("version", &self.version())
            .field("request", &self.request)
            .field("response", &self.response)
            .finish_non_exhaustive()
    }
}

//! A filter in the way of one request: the same for components and proxy-wasm modules.
//!
//! The data path gives it the head of the request and takes it back with [`Filter::take_request`] once a [`Step::Go`]
//! says so; then the body, piece by piece, if [`Filter::wants_request_body`]. The answer goes the same way. A
//! [`Step::Wait`] holds the message up: meanwhile the filter may be given more of the body, and is asked again with
//! [`Filter::resume`] each time that its [`Wake`] says so.
//!
//! Each method is one turn of the plugin's, bounded by its limits; whoever has the filter can let it go between them. The
//! future of a turn may be dropped: what has begun is brought to its end, or undone.
//!
//! After a fault nothing more is asked of it. What it was given can still be taken: the head as it was before the
//! call that faulted, and all of the body that it hadn't let go on, with the piece that it faulted on.

use crate::call::{Reply, RequestHead, ResponseHead};
use crate::component;
use crate::fault::Fault;
use crate::proxy_wasm;
use crate::version::Probe;
use bytes::Bytes;
use futures_util::TryFutureExt;
use futures_util::future::Either;
use http::HeaderMap;
use std::sync::Arc;
use tokio::sync::Notify;

/// What becomes of a message.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// It goes on: what was given can be taken.
    Go,
    /// It is held up.
    Wait,
    /// This is the answer.
    Respond(Box<Reply>),
}

/// Which of a request's two messages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// The request.
    Request,
    /// The answer.
    Response,
}

/// Tells when a filter may let a message go that it holds up. One at a time can wait for it.
#[derive(Clone, Debug)]
pub struct Wake(pub(crate) Arc<Notify>);

impl Wake {
    /// Waits until there is something new.
    pub async fn woken(&self) {
        self.0.notified().await;
    }
}

/// One filter of one request.
#[derive(Debug)]
pub struct Filter(
    pub(crate) Kind,
    /// The request tries its version.
    pub(crate) Option<Arc<Probe>>,
);

/// By which contract.
#[derive(Debug)]
pub(crate) enum Kind {
    Component(Box<component::Filter>),
    ProxyWasm(Box<proxy_wasm::Stream>),
}

/// Calls the same method of whatever it is.
macro_rules! of {
    ($self:ident, $method:ident($($argument:expr),*)) => {
        match &mut $self.0 {
            Kind::Component(filter) => filter.$method($($argument),*),
            Kind::ProxyWasm(filter) => filter.$method($($argument),*),
        }
    };
    ($self:ident, $method:ident($($argument:expr),*).await) => {
        match &mut $self.0 {
            Kind::Component(filter) => filter.$method($($argument),*).await,
            // Large, and components' calls are not to be the size of it.
            Kind::ProxyWasm(filter) => Box::pin(filter.$method($($argument),*)).await,
        }
    };
}

impl Filter {
    /// The head of the request has come; `end` if it has no body.
    ///
    /// # Errors
    ///
    /// The plugin's fault.
    pub fn request(&mut self, head: RequestHead, end: bool) -> impl Future<Output = Result<Step, Fault>> {
        let Self(kind, probe) = self;
        let probe = probe.as_deref();
        let asked = match kind {
            Kind::Component(filter) => Either::Left(filter.request(head, end)),
            Kind::ProxyWasm(filter) => Either::Right(Box::pin(filter.request(head, end))),
        };
        asked.inspect_ok(move |_| {
            // Should it fault later, that is told before this is heard.
            if let Some(probe) = probe {
                probe.went_well();
            }
        })
    }

    /// The head of the request, to go on with.
    pub fn take_request(&mut self) -> Option<RequestHead> {
        of!(self, take_request())
    }

    /// Whether it is to be given the request's body.
    pub fn wants_request_body(&mut self) -> bool {
        of!(self, wants_request_body())
    }

    /// A piece of the request's body; `end` with the last, which may be empty. While [`Step::Wait`] holds, it keeps
    /// what it is given, up to its bound.
    ///
    /// # Errors
    ///
    /// The plugin's fault.
    pub async fn request_body(&mut self, data: Bytes, end: bool) -> Result<Step, Fault> {
        of!(self, request_body(data, end).await)
    }

    /// The trailers of the request, after its body.
    ///
    /// # Errors
    ///
    /// The plugin's fault.
    pub async fn request_trailers(&mut self, trailers: HeaderMap) -> Result<Step, Fault> {
        of!(self, trailers(Way::Request, trailers).await)
    }

    /// What of the request's body goes on now; may be empty.
    pub fn take_request_body(&mut self) -> Bytes {
        of!(self, take_request_body())
    }

    /// Whether it is to be given the answer.
    pub fn wants_response(&mut self) -> bool {
        of!(self, wants_response())
    }

    /// The head of the answer has come; `end` if it has no body.
    ///
    /// # Errors
    ///
    /// The plugin's fault.
    pub async fn response(&mut self, head: ResponseHead, end: bool) -> Result<Step, Fault> {
        of!(self, response(head, end).await)
    }

    /// The head of the answer, to go on with.
    pub fn take_response(&mut self) -> Option<ResponseHead> {
        of!(self, take_response())
    }

    /// Whether it is to be given the answer's body; its Content-Length then holds no more.
    pub fn wants_response_body(&mut self) -> bool {
        of!(self, wants_response_body())
    }

    /// Whether it asked for the answer's body, also where there was none: that of an answer to GET would have another length
    /// than it had before.
    pub fn asked_for_response_body(&mut self) -> bool {
        of!(self, asked_for_response_body())
    }

    /// A piece of the answer's body; `end` with the last, which may be empty.
    ///
    /// # Errors
    ///
    /// The plugin's fault.
    pub async fn response_body(&mut self, data: Bytes, end: bool) -> Result<Step, Fault> {
        of!(self, response_body(data, end).await)
    }

    /// The trailers of the answer, after its body.
    ///
    /// # Errors
    ///
    /// The plugin's fault.
    pub async fn response_trailers(&mut self, trailers: HeaderMap) -> Result<Step, Fault> {
        of!(self, trailers(Way::Response, trailers).await)
    }

    /// What of the answer's body goes on now; may be empty.
    pub fn take_response_body(&mut self) -> Bytes {
        of!(self, take_response_body())
    }

    /// The trailers of a message, to go on with.
    pub fn take_trailers(&mut self, way: Way) -> Option<HeaderMap> {
        of!(self, take_trailers(way))
    }

    /// What tells when a message that is held up may go on; `None` if nothing but more of it makes it go on.
    pub fn wake(&mut self, way: Way) -> Option<Wake> {
        of!(self, wake(way))
    }

    /// Looks whether the filter lets a message go that it holds up.
    ///
    /// # Errors
    ///
    /// The plugin's fault.
    pub async fn resume(&mut self, way: Way) -> Result<Step, Fault> {
        of!(self, resume(way).await)
    }

    /// Takes a message away from a filter that has held it up for too long. As after a fault, what the filter has of it can
    /// be taken then.
    pub async fn give_up(&mut self, way: Way) {
        of!(self, give_up(way).await);
    }

    /// The version that it is, as the first 12 hex digits of its module's SHA-256.
    pub fn version(&self) -> &str {
        match &self.0 {
            Kind::Component(filter) => filter.version(),
            Kind::ProxyWasm(filter) => filter.version(),
        }
    }
}

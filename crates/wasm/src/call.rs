//! What the data path hands over, and what it gets.

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use leeward_policy::model::Cause;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The head of a request.
#[derive(Clone, Debug)]
pub struct RequestHead {
    /// The method.
    pub method: Method,
    /// `http` or `https`, as the client came in.
    pub scheme: &'static str,
    /// Host and port as the client sent them.
    pub authority: Authority,
    /// Path and query.
    pub path: PathAndQuery,
    /// The fields.
    pub headers: HeaderMap,
}

/// Host and port of a request. Few plugins ask for them, so they are left where they are.
#[derive(Clone, Debug)]
pub enum Authority {
    /// Of the request's target.
    Target(http::uri::Authority),
    /// Of a Host field; one that is no text is as none.
    Field(HeaderValue),
    /// Of neither.
    Text(Box<str>),
}

impl Deref for Authority {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Self::Target(authority) => authority.as_str(),
            Self::Field(value) => value.to_str().unwrap_or_default(),
            Self::Text(text) => text,
        }
    }
}

impl From<&str> for Authority {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

/// The head of an answer.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    /// The status.
    pub status: StatusCode,
    /// The fields.
    pub headers: HeaderMap,
}

/// What holds for a request from its beginning to its end.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The service that is called.
    pub service: Arc<str>,
    /// The route and rule that matched, as `ROUTE/RULE`.
    pub route: Arc<str>,
    /// The name of the route, if one matched.
    pub route_name: Option<Arc<str>>,
    /// The zone of this proxy.
    pub zone: Arc<str>,
    /// The name of this proxy.
    pub proxy: Arc<str>,
    /// The SPIFFE id of the caller, if it has one.
    pub peer: Option<Arc<str>>,
    /// Where the caller is.
    pub address: Option<SocketAddr>,
    /// HTTP version of the client, as in `HTTP/1.1`.
    pub protocol: &'static str,
    /// The configuration of the rung or rule, or the plugin's own.
    pub config: Arc<str>,
    /// When the answer must have begun.
    pub deadline: Option<Instant>,
    /// When the request came in.
    pub began: Instant,
    /// What evaluates flags.
    pub flags: Arc<dyn Flags>,
    /// What calls through the mesh carry to be seen as part of this request: trace context, and how deep in calls of
    /// plugins it is.
    pub origin: Arc<HeaderMap>,
}

/// Evaluates feature flags for requests.
pub trait Flags: std::fmt::Debug + Send + Sync {
    /// The value of a flag for a request; `None` if there is no such flag, or it is disabled.
    fn value(&self, key: &str, facts: &Facts, head: &RequestHead, cause: Option<Cause>) -> Option<FlagValue>;
}

/// A flag's value.
#[derive(Clone, Debug, PartialEq)]
pub enum FlagValue {
    /// A boolean.
    Boolean(bool),
    /// A string.
    Text(String),
    /// A number.
    Number(f64),
    /// A structure, as JSON text.
    Structure(String),
}

/// A failed call.
#[derive(Clone, Debug)]
pub struct FailedCall {
    /// The request.
    pub head: RequestHead,
    /// What else is known of it.
    pub facts: Facts,
    /// Its body, if policy hands it over and all of it is there.
    pub body: Option<Bytes>,
    /// Why the call failed.
    pub cause: Cause,
    /// Every attempt made, in order.
    pub attempts: Vec<CallAttempt>,
    /// The answer that the proxy kept.
    pub kept: Option<KeptAnswer>,
}

/// One try to reach an endpoint.
#[derive(Clone, Debug)]
pub struct CallAttempt {
    /// IP:PORT of the endpoint.
    pub endpoint: Arc<str>,
    /// Its zone.
    pub zone: Arc<str>,
    /// The status of its answer, if it answered.
    pub status: Option<u16>,
    /// What went wrong, if anything.
    pub cause: Option<Cause>,
    /// How long it took.
    pub duration: Duration,
}

/// An answer that the proxy kept.
#[derive(Clone, Debug)]
pub struct KeptAnswer {
    /// What was answered.
    pub reply: Reply,
    /// How old it is.
    pub age: Duration,
    /// How long it was to be fresh.
    pub fresh: Duration,
}

/// An answer that is there whole. One of a plugin's has been checked: valid HTTP, and nothing that frames a message
/// or is the mesh's to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// 200 to 599.
    pub status: StatusCode,
    /// The fields.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// Only a proxy-wasm guest of a gRPC call says it: the status goes into the trailers.
    pub grpc_status: Option<u32>,
}

/// What a plugin wants done about a failed call.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Answer with this.
    Respond(Reply),
    /// Send the request to this service instead.
    Reroute(String),
    /// Nothing to offer.
    Decline,
    /// Answer with what was kept.
    Stale,
    /// Take the request in, and answer with this.
    Enqueue {
        /// The queue.
        queue: String,
        /// What the client gets.
        reply: Reply,
    },
}

/// A backend that a router may choose.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Target {
    /// The service.
    pub service: Arc<str>,
    /// Its weight.
    pub weight: u32,
    /// Endpoints that are healthy.
    pub healthy: u32,
    /// All endpoints.
    pub endpoints: u32,
    /// Its circuit is open here.
    pub circuit_open: bool,
    /// Requests of this proxy that are under way there.
    pub under_way: u32,
}

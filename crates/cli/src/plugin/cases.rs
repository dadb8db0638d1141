//! What a plugin is to do with what: cases, as people write them in `cases.yaml`.

mod expect;
mod read;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, StatusCode};
use leeward_policy::Name;
use leeward_policy::model::{Cause, PluginLimits};
use leeward_wasm::{CallAttempt, CallError, FlagValue, KeptAnswer, Target};
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

pub(crate) use read::{for_serving, module_of, read};

/// The file that is looked for beside a module or in a project.
pub(crate) const FILE: &str = "cases.yaml";

/// One thing that a plugin is asked, and what it is to come to.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// What it is called.
    pub(crate) name: String,
    /// How the plugin is set up.
    pub(crate) setup: Setup,
    /// What comes in.
    pub(crate) request: Request,
    /// What is known of the request beside its head.
    pub(crate) context: Context,
    /// The service behind a filter.
    pub(crate) response: Behind,
    /// Why the call failed, for fallbacks.
    pub(crate) failure: Failed,
    /// What a router chooses from.
    pub(crate) backends: Vec<Target>,
    /// The values of flags; all others aren't there.
    pub(crate) flags: BTreeMap<String, FlagValue>,
    /// What its store has before.
    pub(crate) store: Vec<(String, Bytes)>,
    /// What services answer it through the mesh.
    pub(crate) calls: Vec<Canned>,
    /// What is to be.
    pub(crate) expect: Expect,
}

/// The part of a Plugin resource that tells here.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// Handed to it as it stands.
    pub(crate) config: String,
    /// Its bounds.
    pub(crate) limits: PluginLimits,
    /// Services that it may call.
    pub(crate) services: Vec<Name>,
    /// What it may import; empty for whatever its kind may have.
    pub(crate) imports: Vec<Box<str>>,
}

/// A request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: Method,
    pub(crate) scheme: &'static str,
    pub(crate) authority: String,
    pub(crate) path: PathAndQuery,
    pub(crate) headers: HeaderMap,
    /// The pieces in which its body comes; none for no body.
    pub(crate) body: Vec<Bytes>,
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    /// As of [`Request::body`].
    pub(crate) body: Vec<Bytes>,
}

/// What a service behind a filter answers.
#[derive(Clone, Debug)]
pub(crate) enum Behind {
    /// This.
    Answer(Message),
    /// What it was asked, as the filter let it go on.
    Echo,
}

/// What is known of a request beside its head.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) service: String,
    pub(crate) route: String,
    pub(crate) zone: String,
    pub(crate) peer: Option<String>,
    pub(crate) address: Option<SocketAddr>,
    /// Until the request's deadline.
    pub(crate) time_left: Duration,
}

/// Why a call failed.
#[derive(Clone, Debug)]
pub(crate) struct Failed {
    pub(crate) cause: Cause,
    pub(crate) attempts: Vec<CallAttempt>,
    pub(crate) kept: Option<KeptAnswer>,
}

/// What a service answers through the mesh.
#[derive(Clone, Debug)]
pub(crate) struct Canned {
    /// The service.
    pub(crate) service: String,
    /// Only this method.
    pub(crate) method: Option<Method>,
    /// Only this path and query.
    pub(crate) path: Option<String>,
    /// How long it takes.
    pub(crate) delay: Duration,
    /// What it is.
    pub(crate) answer: Result<Message, CallError>,
}

/// What is to be. What isn't said is not looked at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Expect {
    /// What the call comes to.
    pub(crate) end: Option<WantedEnd>,
    /// The request that goes on past a filter.
    pub(crate) request: Option<WantedMessage>,
    /// The answer that goes on past it.
    pub(crate) response: Option<WantedMessage>,
    /// What the store has after; `None` for a key that isn't there.
    pub(crate) store: Vec<(String, Option<WantedBody>)>,
    /// Texts, each of which a log line has in it.
    pub(crate) log: Vec<String>,
    /// Counters, and what they came to.
    pub(crate) counters: Vec<(String, u64)>,
    /// Calls through the mesh, all of them, in order.
    pub(crate) calls: Option<Vec<WantedCall>>,
    /// Longest time.
    pub(crate) max_time: Option<Duration>,
    /// Most memory, in bytes.
    pub(crate) max_memory: Option<u64>,
}

/// What a call is to come to.
#[derive(Clone, Debug)]
pub(crate) enum WantedEnd {
    /// An answer of the plugin's own.
    Respond(WantedMessage),
    /// Nothing.
    Decline,
    /// What the proxy kept.
    Stale,
    /// Another service.
    Reroute(String),
    /// A queue takes the request in.
    Enqueue(String, WantedMessage),
    /// A fault, by its word.
    Fault(&'static str),
    /// A backend; `None` for the weights.
    Choose(Option<String>),
}

/// A message that is to be.
#[derive(Clone, Debug, Default)]
pub(crate) struct WantedMessage {
    pub(crate) status: Option<u16>,
    pub(crate) path: Option<String>,
    /// The values of a field; none for a field that isn't there.
    pub(crate) headers: Vec<(String, Vec<String>)>,
    /// It has no other fields than those.
    pub(crate) only_headers: bool,
    pub(crate) body: Vec<WantedBody>,
}

/// A body that is to be.
#[derive(Clone, Debug)]
pub(crate) enum WantedBody {
    /// This text.
    Text(String),
    /// Something with this in it.
    Contains(String),
    /// This JSON, however it is written.
    Json(Value),
    /// JSON with at least this in it.
    JsonContains(Value),
}

/// A call that is to be made.
#[derive(Clone, Debug)]
pub(crate) struct WantedCall {
    pub(crate) service: String,
    pub(crate) method: Option<String>,
    pub(crate) message: WantedMessage,
}

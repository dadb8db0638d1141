//! Calls of a plugin to other services: handed to the data path, which makes them as it makes all calls.

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, StatusCode};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};

/// A call that a plugin wants made. Whoever drops it without an answer has failed it.
#[derive(Debug)]
pub struct MeshCall {
    /// Who calls.
    pub plugin: Arc<str>,
    /// The service; the plugin may call it.
    pub service: Box<str>,
    /// The method.
    pub method: Method,
    /// The authority, if the plugin names one; else the service's.
    pub authority: Option<Box<str>>,
    /// Path and query.
    pub path: PathAndQuery,
    /// The fields; valid, none for one hop.
    pub headers: HeaderMap,
    /// The request's body.
    pub body: CallBody,
    /// When there must be an answer.
    pub until: Instant,
    /// [`crate::Facts::origin`] of the request in hand; empty where there is none (a timer).
    pub origin: Arc<HeaderMap>,
    /// Where the answer goes.
    pub answer: AnswerTo,
}

/// The body of a plugin's call.
#[derive(Debug)]
pub enum CallBody {
    /// All of it.
    Whole(Bytes),
    /// Piece by piece; ends when the sender is dropped.
    Pieces(mpsc::Receiver<Bytes>),
}

/// Where the answer to a plugin's call goes.
#[derive(Debug)]
pub enum AnswerTo {
    /// In one piece; at most [`MAX_ANSWER`] bytes.
    Whole(oneshot::Sender<Result<MeshAnswer, CallError>>),
    /// As it comes.
    Pieces(mpsc::Sender<AnswerPiece>),
}

/// Largest body of an answer that is handed over in one piece, in bytes.
pub const MAX_ANSWER: usize = 1 << 20;

/// A whole answer.
#[derive(Clone, Debug)]
pub struct MeshAnswer {
    /// The status.
    pub status: StatusCode,
    /// The fields.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// The trailers.
    pub trailers: HeaderMap,
}

/// A piece of an answer.
#[derive(Debug)]
pub enum AnswerPiece {
    /// First, unless it failed.
    Head(StatusCode, HeaderMap),
    /// Some of the body.
    Data(Bytes),
    /// The trailers; the last piece.
    Trailers(HeaderMap),
    /// It failed; the last piece.
    Failed(CallError),
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CallError {
    /// Policy doesn't let the plugin call that service, or has no such service.
    NotAllowed,
    /// It is not valid HTTP, or too large.
    Invalid,
    /// So many were made already.
    TooMany,
    /// Plugins call each other through the mesh.
    Loop,
    /// Not in time.
    Timeout,
    /// The service can't be reached, or broke off.
    Failed,
    /// The answer is too large.
    TooLarge,
}

/// Takes calls to the data path's half of the worker. What may be under way is bounded by `maxCalls` and the
/// instances that there are.
pub type MeshSender = mpsc::UnboundedSender<MeshCall>;

//! Calls of other services, from when a guest begins them until it is told of the answer.

use super::abi::{Pair, Status};
use super::context::Context;
use super::fields;
use super::grpc;
use super::state::State;
use super::upstream;
use crate::component::Memory as Limits;
use crate::memory::Lease;
use crate::mesh::{AnswerPiece, AnswerTo, CallBody, CallError, MAX_ANSWER, MeshAnswer, MeshCall, MeshSender};
use bytes::Bytes;
use futures_util::future::{AbortHandle, AbortRegistration};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// The calls of a virtual machine.
pub(crate) struct Calls {
    mesh: MeshSender,
    last: u32,
    under_way: HashMap<u32, Call>,
    /// Begun in the call of the guest that is under way, those too that it has given up since; whoever made that attends to
    /// them.
    pub(crate) begun: Vec<Begun>,
    /// What the call of the guest that is under way tells it of an answer.
    pub(crate) heard: Heard,
    /// Bytes of streams' messages that wait to be sent.
    queued: Arc<AtomicUsize>,
}

/// Bytes that a guest has handed over and that are still here. They count as its own memory until they are sent, or until
/// nobody wants them any more.
struct Outgoing {
    data: Vec<u8>,
    lease: Arc<Mutex<Lease>>,
    /// Where messages that wait are counted.
    queued: Option<Arc<AtomicUsize>>,
}

impl Outgoing {
    /// `None` if the process has no memory for them.
    fn bytes(data: Vec<u8>, limits: &Limits, queued: Option<Arc<AtomicUsize>>) -> Option<Bytes> {
        if data.is_empty() {
            return Some(Bytes::new());
        }
        let lease = limits.extend(data.len())?;
        if let Some(queued) = &queued {
            queued.fetch_add(data.len(), Ordering::Relaxed);
        }
        Some(Bytes::from_owner(Self { data, lease, queued }))
    }
}

impl AsRef<[u8]> for Outgoing {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let mut lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        lease.give_back(self.data.len());
        if let Some(queued) = &self.queued {
            queued.fetch_sub(self.data.len(), Ordering::Relaxed);
        }
    }
}

/// A call under way.
struct Call {
    /// On whose behalf.
    context: u32,
    kind: Kind,
    /// Ends waiting for the answer, and with that the call.
    abort: AbortHandle,
}

enum Kind {
    Http,
    Grpc,
    /// A stream; no sender once the guest has said its last.
    Stream(Option<mpsc::Sender<Bytes>>),
}

/// A call that was begun, and where its answer comes.
pub(crate) struct Begun {
    pub(crate) number: u32,
    /// On whose behalf.
    context: u32,
    /// The root context that is told.
    pub(crate) root: u32,
    pub(crate) until: Instant,
    pub(crate) answer: Answer,
    pub(crate) abort: AbortRegistration,
}

/// Where the answer comes.
pub(crate) enum Answer {
    Http(oneshot::Receiver<Result<MeshAnswer, CallError>>),
    Grpc(oneshot::Receiver<Result<MeshAnswer, CallError>>),
    Stream(mpsc::Receiver<AnswerPiece>),
}

/// What a guest is told of an answer.
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) head: Option<(StatusCode, HeaderMap)>,
    pub(crate) body: Option<Bytes>,
    pub(crate) trailers: Option<HeaderMap>,
    pub(crate) initial: Option<HeaderMap>,
    pub(crate) trailing: Option<HeaderMap>,
    pub(crate) message: Option<Bytes>,
    pub(crate) status: u32,
    pub(crate) status_message: Bytes,
}

impl Heard {
    /// No more than a status.
    pub(crate) fn status(status: u32, text: impl Into<Bytes>) -> Self {
        Self {
            status,
            status_message: text.into(),
            ..Self::default()
        }
    }
}

/// Calls of a virtual machine, those of requests that are over among them.
const MAX_UNDER_WAY: usize = 1024;
/// How long a call may take for which the guest has no limit, and at most.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same for a stream.
const STREAM: Duration = Duration::from_secs(3600);
/// Messages of a stream that wait to be sent.
const MESSAGES: usize = 64;
/// Bytes of messages of all of a machine's streams that wait to be sent. A message that is larger is alone.
const MAX_QUEUED: usize = 1 << 20;
/// Pieces of a stream's answer that are under way.
const PIECES: usize = 8;

impl Calls {
    pub(crate) fn new(mesh: MeshSender) -> Self {
        Self {
            mesh,
            last: 0,
            under_way: HashMap::new(),
            begun: Vec::new(),
            heard: Heard::default(),
            queued: Arc::default(),
        }
    }

    /// Whether a call is under way: the guest is still to be told of it.
    pub(crate) fn is_under_way(&self, number: u32) -> bool {
        self.under_way.contains_key(&number)
    }

    /// A call has ended. Nobody waits for it any more.
    pub(crate) fn end(&mut self, number: u32) {
        self.under_way.remove(&number);
    }

    /// A context is gone, and with it what was begun on its behalf.
    pub(crate) fn end_all(&mut self, context: u32) {
        self.under_way.retain(|_, call| call.context != context);
    }

    /// Calls on behalf of a context, and all of them. One that was begun in the call of the guest that is under way counts
    /// until that is over, whatever has become of it: it is sent already.
    fn count(&self, context: u32) -> (usize, usize) {
        let begun = |number: &u32| self.begun.iter().any(|begun| begun.number == *number);
        let before = self.under_way.iter().filter(|(number, _)| !begun(number));
        let before = before.map(|(_, call)| call.context);
        let all = before.chain(self.begun.iter().map(|begun| begun.context));
        all.fold((0, 0), |(own, all), of| {
            (own + usize::from(of == context), all + 1)
        })
    }

    fn next(&mut self) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1);
            if self.last != 0 && !self.under_way.contains_key(&self.last) {
                return self.last;
            }
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

/// What is sent.
struct Request {
    method: Method,
    path: PathAndQuery,
    authority: Option<Box<str>>,
    headers: HeaderMap,
    body: CallBody,
}

impl State {
    /// Sends a request; the number that the guest is told its answer by.
    pub(crate) fn call_http(
        &mut self,
        upstream: &[u8],
        pairs: &[Pair<'_>],
        body: &[u8],
        timeout_ms: u32,
        now: Instant,
    ) -> Result<u32, Status> {
        let bad = Status::BadArgument;
        let (mut method, mut path, mut authority) = (None, None, None);
        for (name, value) in pairs {
            let text = str::from_utf8(value);
            match *name {
                b":method" => method = Method::from_bytes(value).ok(),
                b":path" => path = text.ok().and_then(fields::path),
                b":authority" => authority = Some(text.unwrap_or_default()),
                _ => {}
            }
        }
        let request = Request {
            method: method.filter(|method| *method != Method::CONNECT).ok_or(bad)?,
            path: path.ok_or(bad)?,
            // Some guests say the name of the cluster again, which is no host: then it is the service's own.
            authority: Some(authority.ok_or(bad)?)
                .filter(|text| text.parse::<Authority>().is_ok())
                // Whom a call is for says nothing about who makes it.
                .map(|text| {
                    if text.contains('@') {
                        Err(bad)
                    } else {
                        Ok(text.into())
                    }
                })
                .transpose()?,
            headers: headers(pairs)?,
            body: self.whole(body.to_vec(), body.len())?,
        };
        let (to, answer) = oneshot::channel();
        let service = self.service(upstream).ok_or(bad)?;
        let until = now + timeout(timeout_ms);
        self.send(
            service,
            request,
            until,
            AnswerTo::Whole(to),
            Kind::Http,
            Answer::Http(answer),
        )
    }

    /// Calls a method of gRPC.
    pub(crate) fn call_grpc(
        &mut self,
        upstream: &[u8],
        (service, method): (&[u8], &[u8]),
        metadata: &[Pair<'_>],
        message: &[u8],
        timeout_ms: u32,
        now: Instant,
    ) -> Result<u32, Status> {
        let whole = self.whole(grpc::frame(message), message.len())?;
        let request = grpc_request(service, method, metadata, whole)?;
        let (to, answer) = oneshot::channel();
        let service = self.service(upstream).ok_or(Status::ParseFailure)?;
        let until = now + timeout(timeout_ms);
        self.send(
            service,
            request,
            until,
            AnswerTo::Whole(to),
            Kind::Grpc,
            Answer::Grpc(answer),
        )
    }

    /// Opens a stream of gRPC.
    pub(crate) fn open_stream(
        &mut self,
        upstream: &[u8],
        (service, method): (&[u8], &[u8]),
        metadata: &[Pair<'_>],
        now: Instant,
    ) -> Result<u32, Status> {
        let (messages, sent) = mpsc::channel(MESSAGES);
        let request = grpc_request(service, method, metadata, CallBody::Pieces(sent))?;
        let (to, answer) = mpsc::channel(PIECES);
        let service = self.service(upstream).ok_or(Status::ParseFailure)?;
        let (until, kind) = (now + STREAM, Kind::Stream(Some(messages)));
        self.send(
            service,
            request,
            until,
            AnswerTo::Pieces(to),
            kind,
            Answer::Stream(answer),
        )
    }

    /// Sends a message on a stream; `end` if it is the last.
    pub(crate) fn send_message(&mut self, number: u32, message: &[u8], end: bool) -> Result<(), Status> {
        if message.len() > MAX_ANSWER {
            return Err(Status::BadArgument);
        }
        let call = self.calls.under_way.get_mut(&number).ok_or(Status::NotFound)?;
        let Kind::Stream(messages) = &mut call.kind else {
            return Err(Status::BadArgument);
        };
        let sender = messages.as_ref().ok_or(Status::BadArgument)?;
        // Many wait already, or there is no memory. The ABI has no word for that, and guests take a word that they don't know
        // badly.
        let frame = grpc::frame(message);
        let queued = self.calls.queued.load(Ordering::Relaxed);
        if queued > 0 && queued + frame.len() > MAX_QUEUED {
            return Err(Status::BadArgument);
        }
        let frame = Outgoing::bytes(frame, &self.limits, Some(Arc::clone(&self.calls.queued)));
        sender
            .try_send(frame.ok_or(Status::BadArgument)?)
            .map_err(|_| Status::BadArgument)?;
        if end {
            *messages = None;
        }
        Ok(())
    }

    /// Gives a call or a stream of gRPC up.
    pub(crate) fn cancel(&mut self, number: u32) -> Result<(), Status> {
        match self.calls.under_way.get(&number).map(|call| &call.kind) {
            None => Err(Status::NotFound),
            Some(Kind::Http) => Err(Status::BadArgument),
            Some(Kind::Grpc | Kind::Stream(_)) => {
                self.calls.end(number);
                Ok(())
            }
        }
    }

    /// Says the last on a stream; what comes of its answer still does. A call is given up.
    pub(crate) fn close_call(&mut self, number: u32) -> Result<(), Status> {
        match self.calls.under_way.get_mut(&number).map(|call| &mut call.kind) {
            Some(Kind::Stream(messages)) => {
                *messages = None;
                Ok(())
            }
            Some(Kind::Http | Kind::Grpc) | None => self.cancel(number),
        }
    }

    /// The body of a call, whose message has `len` bytes.
    fn whole(&self, body: Vec<u8>, len: usize) -> Result<CallBody, Status> {
        if len > MAX_ANSWER {
            return Err(Status::BadArgument);
        }
        let body = Outgoing::bytes(body, &self.limits, None);
        body.map(CallBody::Whole).ok_or(Status::InternalFailure)
    }

    fn service(&self, upstream: &[u8]) -> Option<Box<str>> {
        let service = upstream::service(upstream, &self.spec.access.services)?;
        Some(service.as_str().into())
    }

    fn send(
        &mut self,
        service: Box<str>,
        request: Request,
        until: Instant,
        to: AnswerTo,
        kind: Kind,
        answer: Answer,
    ) -> Result<u32, Status> {
        let root = self.root().ok_or(Status::BadArgument)?;
        let context = self.effective();
        let (own, all) = self.calls.count(context);
        if own >= self.spec.limits.max_calls as usize || all >= MAX_UNDER_WAY {
            return Err(Status::InternalFailure);
        }
        let origin = match self.contexts.get(&context) {
            Some(Context::Http(http)) => Arc::clone(&http.facts.origin),
            Some(Context::Root(_)) | None => Arc::default(),
        };
        let sent = self.calls.mesh.send(MeshCall {
            plugin: Arc::clone(&self.plugin),
            service,
            method: request.method,
            authority: request.authority,
            path: request.path,
            headers: request.headers,
            body: request.body,
            until,
            origin,
            answer: to,
        });
        sent.map_err(|_| Status::InternalFailure)?;
        let number = self.calls.next();
        let (abort, registration) = AbortHandle::new_pair();
        let call = Call { context, kind, abort };
        self.calls.under_way.insert(number, call);
        self.calls.begun.push(Begun {
            number,
            context,
            root,
            until,
            answer,
            abort: registration,
        });
        Ok(number)
    }
}

fn timeout(milliseconds: u32) -> Duration {
    match milliseconds {
        0 => PATIENCE,
        milliseconds => Duration::from_millis(milliseconds.into()).min(PATIENCE),
    }
}

/// The fields of a call. Those that frame a message or are for one hop are left out: guests hand over what a request had.
fn headers(pairs: &[Pair<'_>]) -> Result<HeaderMap, Status> {
    let mut headers = HeaderMap::with_capacity(pairs.len());
    for (name, value) in pairs {
        if name.first() == Some(&b':') {
            continue;
        }
        let name = HeaderName::from_bytes(name).map_err(|_| Status::BadArgument)?;
        let value = HeaderValue::from_bytes(value).map_err(|_| Status::BadArgument)?;
        if leeward_policy::may_be_in_an_answer(name.as_str()) && name != header::HOST {
            headers.append(name, value);
        }
    }
    Ok(headers)
}

fn grpc_request(
    service: &[u8],
    method: &[u8],
    metadata: &[Pair<'_>],
    body: CallBody,
) -> Result<Request, Status> {
    let text = |bytes| str::from_utf8(bytes).map_err(|_| Status::BadArgument);
    let path = format!("/{}/{}", text(service)?, text(method)?);
    let mut headers = headers(metadata)?;
    headers.insert(header::CONTENT_TYPE, grpc::CONTENT_TYPE);
    Ok(Request {
        method: Method::POST,
        path: fields::path(&path).ok_or(Status::BadArgument)?,
        authority: None,
        headers,
        body,
    })
}

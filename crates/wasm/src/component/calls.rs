//! Calls of other services: by the contract's own words, and by `wasi:http`.

use super::bindings::fallback::leeward::plugin::{mesh, types};
use super::convert::{self, MAX_BODY};
use super::pool::Brief;
use super::waits::{Waiting, Waits};
use crate::clock::now;
use crate::log;
use crate::mesh::{AnswerPiece, AnswerTo, CallBody, CallError, MeshAnswer, MeshCall, MeshSender};
use bytes::Bytes;
use futures_util::future::{Either, select};
use futures_util::stream;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode, header};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, StreamBody};
use leeward_policy::model::Plugin;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tracing::Level;
use wasmtime_wasi_http::{DEFAULT_FORBIDDEN_HEADERS, Error, RequestOptions, WasiBody, WasiHttpHooks};

/// How long a call may take for which neither the plugin nor the request has a limit.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is left of a request's time when a call gives up, for the guest to make something of that.
const LEFT: Duration = Duration::from_millis(10);
/// Bytes that a guest hands over at once of a body of `wasi:http`.
const MAX_CHUNK: usize = 64 << 10;
/// Pieces of a body that are under way.
const PIECES: usize = 2;

/// The calls that an instance may make.
pub(crate) struct Calls {
    plugin: Arc<str>,
    spec: Arc<Plugin>,
    mesh: MeshSender,
    waits: Arc<Waits>,
    /// Left in this call.
    left: u32,
    deadline: Option<Instant>,
    origin: Arc<HeaderMap>,
    /// Answers of this call of the plugin's that may be on their way.
    answers: Vec<Weak<Mutex<Answer>>>,
}

/// What comes of an answer.
type Answer = mpsc::Receiver<AnswerPiece>;

/// The next of it.
async fn next(answer: &Mutex<Answer>) -> Option<AnswerPiece> {
    // Poison is harmless: a receiver is whole whatever became of its last use.
    poll_fn(|context| {
        answer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .poll_recv(context)
    })
    .await
}

impl Calls {
    pub(crate) fn new(plugin: &Arc<str>, spec: &Arc<Plugin>, mesh: MeshSender, waits: &Arc<Waits>) -> Self {
        Self {
            plugin: Arc::clone(plugin),
            spec: Arc::clone(spec),
            mesh,
            waits: Arc::clone(waits),
            left: 0,
            deadline: None,
            origin: Arc::default(),
            answers: Vec::new(),
        }
    }

    /// A call of the plugin begins.
    pub(crate) fn begin(&mut self, brief: &Brief) {
        self.left = self.spec.limits.max_calls;
        self.deadline = brief.deadline;
        // Of plugins that may call nobody it is always the same.
        if !Arc::ptr_eq(&self.origin, &brief.origin) {
            self.origin = Arc::clone(&brief.origin);
        }
    }

    /// It has ended, and with it what it hasn't heard the end of: an answer that the guest keeps a handle of is nobody's.
    pub(crate) fn end(&mut self) {
        for answer in self.answers.drain(..).filter_map(|answer| answer.upgrade()) {
            answer.lock().unwrap_or_else(PoisonError::into_inner).close();
        }
    }

    fn may_call(&self, service: &str) -> bool {
        let services = &self.spec.access.services;
        services.iter().any(|name| name.as_str() == service)
    }

    /// Counts a call of a service, and says when it must have ended.
    fn admit(&mut self, service: &str, timeout: Option<Duration>) -> Result<(Instant, Waiting), CallError> {
        if !self.may_call(service) {
            return Err(CallError::NotAllowed);
        }
        self.left = self.left.checked_sub(1).ok_or(CallError::TooMany)?;
        let now = now();
        let until = now + timeout.map_or(PATIENCE, |timeout| timeout.min(PATIENCE));
        let deadline = self
            .deadline
            .map(|deadline| deadline.checked_sub(LEFT).unwrap_or(deadline));
        let until = deadline.map_or(until, |deadline| deadline.min(until));
        if until <= now {
            return Err(CallError::Timeout);
        }
        Ok((until, self.waits.enter(until)))
    }

    /// Sends a request and waits for the whole answer.
    pub(crate) async fn send(&mut self, call: mesh::Call) -> Result<types::Response, CallError> {
        let timeout = call.timeout_ms.map(Duration::from_millis);
        let (until, _waiting) = self.admit(&call.service, timeout)?;
        let (answer, answered) = oneshot::channel();
        let sent = self.mesh.send(request(self, call, until, answer)?);
        sent.map_err(|_| CallError::Failed)?;
        let answer = match tokio::time::timeout_at(until.into(), answered).await {
            Ok(Ok(answer)) => answer?,
            Ok(Err(_)) => return Err(CallError::Failed),
            Err(_) => return Err(CallError::Timeout),
        };
        if answer.body.len() > crate::mesh::MAX_ANSWER {
            return Err(CallError::TooLarge);
        }
        Ok(types::Response {
            status: answer.status.as_u16(),
            headers: convert::headers(&answer.headers),
            body: answer.body.to_vec(),
        })
    }
}

/// A call as the data path makes it.
fn request(
    calls: &Calls,
    call: mesh::Call,
    until: Instant,
    answer: oneshot::Sender<Result<MeshAnswer, CallError>>,
) -> Result<MeshCall, CallError> {
    // The plugin is told that it is wrong, and its author, in its log, what is.
    let invalid = |reason: String| {
        let line = format!("the call of {} is invalid: {reason}", call.service);
        log::line(&calls.plugin, Level::WARN, &line);
        CallError::Invalid
    };
    let method = Method::from_bytes(call.method.as_bytes()).map_err(|_| CallError::Invalid)?;
    let path = path(&call.path).ok_or(CallError::Invalid)?;
    let mut headers = convert::fields(call.headers).map_err(invalid)?;
    if method == Method::CONNECT || call.body.len() > MAX_BODY {
        return Err(CallError::Invalid);
    }
    let authority = match headers.remove(header::HOST) {
        None => None,
        Some(host) => Some(host.to_str().map_err(|_| CallError::Invalid)?.into()),
    };
    Ok(MeshCall {
        plugin: Arc::clone(&calls.plugin),
        service: call.service.into(),
        method,
        authority,
        path,
        headers,
        body: CallBody::Whole(call.body.into()),
        until,
        origin: Arc::clone(&calls.origin),
        answer: AnswerTo::Whole(answer),
    })
}

/// Path and query, if this is one that can be sent as it is.
pub(crate) fn path(text: &str) -> Option<PathAndQuery> {
    // What follows a "#" would be dropped without a word.
    let sent_as_it_is = text.starts_with('/') && !text.contains('#');
    sent_as_it_is.then(|| text.parse().ok()).flatten()
}

impl WasiHttpHooks for Calls {
    fn is_forbidden_header(&mut self, name: &HeaderName) -> bool {
        DEFAULT_FORBIDDEN_HEADERS.contains(name)
    }

    fn default_scheme(&mut self) -> Option<Scheme> {
        Some(Scheme::HTTP)
    }

    fn set_host_header(&mut self) -> bool {
        false
    }

    fn p2_outgoing_body_chunk_size(&mut self) -> usize {
        MAX_CHUNK
    }

    fn send_request(
        &mut self,
        request: Request<WasiBody>,
        options: Option<RequestOptions>,
        _: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Box<dyn Future<Output = Result<Answered, Error>> + Send> {
        match self.outgoing(request, options) {
            Ok(sent) => Box::new(sent.answered()),
            Err(error) => Box::new(std::future::ready(Err(error))),
        }
    }
}

/// An answer, and what goes on beside it: the rest of the request's body.
type Answered = (
    Response<WasiBody>,
    Box<dyn Future<Output = Result<(), Error>> + Send>,
);

/// A request of `wasi:http` on its way.
struct Sent {
    /// Before the body, so that a call that is given up is not seen to end well.
    answer: Arc<Mutex<Answer>>,
    body: Pin<Box<dyn Future<Output = ()> + Send>>,
    waiting: Waiting,
    until: Instant,
}

impl Calls {
    fn outgoing(
        &mut self,
        request: Request<WasiBody>,
        options: Option<RequestOptions>,
    ) -> Result<Sent, Error> {
        let (parts, body) = request.into_parts();
        if parts.uri.scheme() != Some(&Scheme::HTTP) {
            // The mesh does TLS, and the plugin has to say which service it means.
            return Err(Error::HttpRequestDenied);
        }
        if parts.method == Method::CONNECT {
            return Err(Error::HttpRequestMethodInvalid);
        }
        let service = self.service_of(parts.uri.host().unwrap_or_default());
        let service = service.ok_or(Error::DestinationNotFound)?;
        let timeout = options.and_then(|options| options.first_byte_timeout);
        let (until, waiting) = self.admit(&service, timeout).map_err(error)?;
        let path = match parts.uri.path_and_query() {
            None => PathAndQuery::from_static("/"),
            Some(path) => self::path(path.as_str()).ok_or(Error::HttpRequestUriInvalid)?,
        };
        let mut headers = parts.headers;
        for name in [header::CONTENT_LENGTH, header::TE, header::TRAILER] {
            headers.remove(name);
        }
        if headers
            .keys()
            .any(|name| !leeward_policy::may_be_in_an_answer(name.as_str()))
        {
            return Err(Error::HttpRequestDenied);
        }
        let (body, rest) = if body.is_end_stream() {
            (CallBody::Whole(Bytes::new()), None)
        } else {
            let (pieces, sent) = mpsc::channel(PIECES);
            (CallBody::Pieces(sent), Some(forward(body, pieces)))
        };
        let (answer, answered) = mpsc::channel(PIECES);
        let call = MeshCall {
            plugin: Arc::clone(&self.plugin),
            service,
            method: parts.method,
            authority: None,
            path,
            headers,
            body,
            until,
            origin: Arc::clone(&self.origin),
            answer: AnswerTo::Pieces(answer),
        };
        self.mesh.send(call).map_err(|_| Error::ConnectionTerminated)?;
        let rest = async {
            if let Some(rest) = rest {
                rest.await;
            }
        };
        let answered = Arc::new(Mutex::new(answered));
        self.answers.push(Arc::downgrade(&answered));
        Ok(Sent {
            body: Box::pin(rest),
            answer: answered,
            waiting,
            until,
        })
    }

    /// The service that a host means: of its name, or of the name before its first dot.
    fn service_of(&self, host: &str) -> Option<Box<str>> {
        let first = host.split('.').next().unwrap_or_default();
        [host, first]
            .into_iter()
            .find(|name| self.may_call(name))
            .map(Into::into)
    }
}

/// The guest's body, piece by piece, for as long as anybody wants it. One that breaks off never ends here, since its end
/// would make it whole; the call then ends with its time, or when the guest gives it up.
async fn forward(mut body: WasiBody, pieces: mpsc::Sender<Bytes>) {
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            return pieces.closed().await;
        };
        if let Ok(data) = frame.into_data()
            && pieces.send(data).await.is_err()
        {
            return;
        }
    }
}

impl Sent {
    async fn answered(mut self) -> Result<Answered, Error> {
        let head = tokio::time::timeout_at(self.until.into(), next(&self.answer));
        let (head, rest) = match select(pin!(head), self.body.as_mut()).await {
            Either::Left((head, _)) => (head, true),
            Either::Right(((), head)) => (head.await, false),
        };
        let (status, headers) = match head {
            Ok(Some(AnswerPiece::Head(status, headers))) => (status, headers),
            Ok(Some(AnswerPiece::Failed(failed))) => return Err(error(failed)),
            Ok(Some(AnswerPiece::Data(_) | AnswerPiece::Trailers(_)) | None) => {
                return Err(Error::ConnectionTerminated);
            }
            Err(_) => return Err(Error::HttpResponseTimeout),
        };
        let body = answer_body(self.answer, self.waiting);
        let response = response(status, headers, body);
        let rest: Box<dyn Future<Output = _> + Send> = if rest {
            let body = self.body;
            Box::new(async {
                body.await;
                Ok(())
            })
        } else {
            Box::new(std::future::ready(Ok(())))
        };
        Ok((response, rest))
    }
}

fn response(status: StatusCode, headers: HeaderMap, body: WasiBody) -> Response<WasiBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// What comes of an answer's body. While it comes, the guest waits for the mesh.
fn answer_body(answer: Arc<Mutex<Answer>>, waiting: Waiting) -> WasiBody {
    let frames = stream::unfold(Some((answer, waiting)), |answer| async {
        let (answer, waiting) = answer?;
        Some(match next(&answer).await {
            Some(AnswerPiece::Data(data)) => (Ok(Frame::data(data)), Some((answer, waiting))),
            Some(AnswerPiece::Trailers(trailers)) if trailers.is_empty() => return None,
            Some(AnswerPiece::Trailers(trailers)) => (Ok(Frame::trailers(trailers)), None),
            Some(AnswerPiece::Failed(failed)) => (Err(error(failed)), None),
            Some(AnswerPiece::Head(..)) | None => (Err(Error::HttpResponseIncomplete), None),
        })
    });
    StreamBody::new(frames).boxed_unsync()
}

fn error(error: CallError) -> Error {
    match error {
        CallError::NotAllowed => Error::DestinationNotFound,
        CallError::Invalid => Error::HttpProtocolError,
        CallError::TooMany => Error::ConnectionLimitReached,
        CallError::Loop => Error::LoopDetected,
        CallError::Timeout => Error::HttpResponseTimeout,
        CallError::Failed => Error::DestinationUnavailable,
        CallError::TooLarge => Error::HttpResponseBodySize(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Empty;
    use leeward_policy::model::{
        OnFault, PluginAccess, PluginFrom, PluginKind, PluginLimits, PluginSource, Quarantine,
    };

    fn calls() -> (Calls, mpsc::UnboundedReceiver<MeshCall>) {
        let spec = Plugin {
            kind: PluginKind::WasiHttp,
            source: PluginSource {
                from: PluginFrom::Store,
                sha256: None,
                minisign_key: None,
            },
            config: "".into(),
            limits: PluginLimits::of(PluginKind::WasiHttp),
            access: PluginAccess {
                services: vec!["reviews".parse().unwrap()],
                imports: Vec::new(),
            },
            on_fault: OnFault::NextRung,
            quarantine: Quarantine::default(),
            fresh_instance: false,
            when: None,
            canary: None,
        };
        let (mesh, sent) = mpsc::unbounded_channel();
        let waits = Arc::new(Waits::new(now()));
        let mut calls = Calls::new(&"p".into(), &Arc::new(spec), mesh, &waits);
        calls.begin(&Brief {
            deadline: None,
            origin: Arc::default(),
        });
        (calls, sent)
    }

    fn request(method: Method) -> Request<WasiBody> {
        let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = "http://reviews/".parse().unwrap();
        request
    }

    #[tokio::test]
    async fn an_answer_ends_with_the_call_of_the_plugin_that_began_it() {
        let (mut calls, mut mesh) = calls();
        let sent = calls.outgoing(request(Method::GET), None).unwrap();
        let AnswerTo::Pieces(answer) = mesh.recv().await.unwrap().answer else {
            panic!()
        };
        answer
            .try_send(AnswerPiece::Head(StatusCode::OK, HeaderMap::new()))
            .unwrap();
        // The guest keeps what it has got of it.
        let (response, _) = sent.answered().await.unwrap();
        assert!(!answer.is_closed());
        calls.end();
        assert!(answer.is_closed());
        assert!(response.into_body().collect().await.is_err());
    }

    #[tokio::test]
    async fn a_tunnel_is_no_call() {
        let (mut calls, mut mesh) = calls();
        let refused = calls.outgoing(request(Method::CONNECT), None);
        assert!(matches!(refused, Err(Error::HttpRequestMethodInvalid)));
        assert!(mesh.try_recv().is_err());
    }
}

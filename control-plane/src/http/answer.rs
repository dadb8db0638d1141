//! From a service's answer to what goes back over HTTP.

use super::{descriptors, with_type};
use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt, Full};
use prost::Message as _;
use prost_reflect::{DynamicMessage, MessageDescriptor, MethodDescriptor, SerializeOptions};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tonic::body::Body;
use tonic::{Code, Status};

const JSON: &str = "application/json";
const LINES: &str = "application/x-ndjson";

/// Largest message of an answer, in bytes; the services' own bound is lower.
const MAX_MESSAGE: usize = 64 << 20;

/// What is answered: the result of this method, as one message or as many.
pub(super) struct Answer {
    pub(super) method: MethodDescriptor,
    pub(super) stream: bool,
}

impl Answer {
    pub(super) async fn of(&self, response: Response<Body>) -> Response<Body> {
        if let Some(status) = Status::from_header_map(response.headers())
            && status.code() != Code::Ok
        {
            return refusal(&status);
        }
        let (mut parts, body) = response.into_parts();
        parts.headers.remove(CONTENT_TYPE);
        parts.headers.remove(CONTENT_LENGTH);
        parts.headers.remove("grpc-status");
        if self.stream {
            let body = Downward {
                from: body,
                come: BytesMut::new(),
                of: self.method.output(),
                ended: false,
            };
            return with_type(Response::from_parts(parts, Body::new(body)), LINES);
        }
        match self.only(body).await {
            Ok(json) => with_type(Response::from_parts(parts, Body::new(Full::from(json))), JSON),
            Err(status) => refusal(&status),
        }
    }

    /// The only message of an answer, in JSON.
    async fn only(&self, body: Body) -> Result<Bytes, Status> {
        let collected = http_body_util::Limited::new(body, MAX_MESSAGE + 5)
            .collect()
            .await
            .map_err(|error| Status::internal(format!("the answer broke off: {error}")))?;
        if let Some(status) = collected.trailers().and_then(failed) {
            return Err(status);
        }
        let mut come = BytesMut::from(collected.to_bytes().as_ref());
        match next(&mut come)? {
            Some(message) => json(&self.method.output(), &message),
            None => Err(Status::internal("the answer has no message")),
        }
    }
}

fn failed(trailers: &HeaderMap) -> Option<Status> {
    Status::from_header_map(trailers).filter(|status| status.code() != Code::Ok)
}

/// The next message, once it is there whole.
fn next(come: &mut BytesMut) -> Result<Option<Bytes>, Status> {
    let Some([compressed, a, b, c, d]) = come.first_chunk::<5>().copied() else {
        return Ok(None);
    };
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if compressed != 0 || length > MAX_MESSAGE {
        return Err(Status::internal("the answer has a message that can't be read"));
    }
    if come.len() < length + 5 {
        return Ok(None);
    }
    come.advance(5);
    Ok(Some(come.split_to(length).freeze()))
}

fn json(of: &MessageDescriptor, message: &[u8]) -> Result<Bytes, Status> {
    let unreadable =
        |error: &dyn std::fmt::Display| Status::internal(format!("can't show the answer: {error}"));
    let message = DynamicMessage::decode(of.clone(), message).map_err(|error| unreadable(&error))?;
    let mut text = Vec::new();
    let options = SerializeOptions::new();
    message
        .serialize_with_options(&mut serde_json::Serializer::new(&mut text), &options)
        .map_err(|error| unreadable(&error))?;
    Ok(text.into())
}

/// A refusal as `google.rpc.Status` in JSON.
pub(super) fn refusal(status: &Status) -> Response<Body> {
    let mut response = Response::new(Body::new(Full::from(status_json(status))));
    *response.status_mut() = code(status.code());
    if status.code() == Code::Unauthenticated {
        let challenge = HeaderValue::from_static("Bearer");
        response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    }
    with_type(response, JSON)
}

fn status_json(status: &Status) -> Bytes {
    // The details are a whole google.rpc.Status; without them there is one that says the same.
    let plain = tonic_types::pb::Status {
        code: status.code() as i32,
        message: status.message().to_owned(),
        details: Vec::new(),
    }
    .encode_to_vec();
    let shown = |bytes: &[u8]| {
        let of = descriptors().get_message_by_name("google.rpc.Status")?;
        json(&of, bytes).ok()
    };
    let details = Some(status.details()).filter(|details| !details.is_empty());
    details
        .and_then(shown)
        .or_else(|| shown(&plain))
        .unwrap_or_default()
}

/// The HTTP status that stands for a code, as google.rpc.Code has it.
const fn code(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable | Code::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Messages on lines, `{"result": MESSAGE}` each; the last may be `{"error": STATUS}`.
struct Downward {
    from: Body,
    come: BytesMut,
    of: MessageDescriptor,
    ended: bool,
}

impl Downward {
    fn error(&mut self, status: &Status) -> Frame<Bytes> {
        self.ended = true;
        line("error", &status_json(status))
    }
}

fn line(what: &str, json: &[u8]) -> Frame<Bytes> {
    let mut line = format!("{{\"{what}\":").into_bytes();
    line.extend_from_slice(json);
    line.extend_from_slice(b"}\n");
    Frame::data(line.into())
}

impl HttpBody for Downward {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if this.ended {
                return Poll::Ready(None);
            }
            let message = next(&mut this.come).and_then(|message| {
                let shown = message.map(|message| json(&this.of, &message));
                shown.transpose()
            });
            match message {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(line("result", &message)))),
                Ok(None) => {}
                Err(status) => return Poll::Ready(Some(Ok(this.error(&status)))),
            }
            match ready!(Pin::new(&mut this.from).poll_frame(cx)) {
                None => this.ended = true,
                Some(Err(status)) => return Poll::Ready(Some(Ok(this.error(&status)))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.come.extend_from_slice(&data),
                    Err(frame) => {
                        if let Some(status) = frame.trailers_ref().and_then(failed) {
                            return Poll::Ready(Some(Ok(this.error(&status))));
                        }
                    }
                },
            }
        }
    }
}

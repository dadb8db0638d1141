//! Waits for the answers to a guest's calls, and tells it.

use super::calls::{Answer, Begun, Heard};
use super::exports::Pick;
use super::fields::Fields;
use super::grpc::{self, Frames};
use super::machine::{Machine, Task};
use crate::mesh::{AnswerPiece, CallError, MAX_ANSWER, MeshAnswer};
use bytes::Bytes;
use futures_util::future::{AbortRegistration, Abortable};
use futures_util::{StreamExt, stream};
use http::{HeaderMap, StatusCode};
use std::rc::{Rc, Weak};
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};
use wasmtime::{WasmParams, WasmResults};

/// What a guest is told of a call that has no answer: the ABI's number for a connection that broke.
const BROKEN: u32 = 11;

/// A call that the guest is told of.
struct Told {
    machine: Weak<Machine>,
    number: u32,
    root: u32,
}

/// Waits for the answer to a call, and tells the guest. What is given up when the guest gives the call up is waiting, never a
/// call of the guest.
pub(crate) fn attend(machine: &Rc<Machine>, begun: Begun) -> Task {
    let told = Told {
        machine: Rc::downgrade(machine),
        number: begun.number,
        root: begun.root,
    };
    let (until, abort) = (begun.until, begun.abort);
    match begun.answer {
        Answer::Http(answer) => Box::pin(async move {
            if let Some(answer) = whole(answer, until, abort).await {
                told.http(answer).await;
            }
        }),
        Answer::Grpc(answer) => Box::pin(async move {
            if let Some(answer) = whole(answer, until, abort).await {
                told.grpc(answer).await;
            }
        }),
        Answer::Stream(pieces) => Box::pin(told.stream(pieces, until, abort)),
    }
}

/// The answer; `None` if nobody waits for it any more.
async fn whole(
    answer: oneshot::Receiver<Result<MeshAnswer, CallError>>,
    until: Instant,
    abort: AbortRegistration,
) -> Option<Result<MeshAnswer, CallError>> {
    let answer = Abortable::new(tokio::time::timeout_at(until.into(), answer), abort).await;
    Some(match answer.ok()? {
        Err(_) => Err(CallError::Timeout),
        Ok(Err(_)) => Err(CallError::Failed),
        Ok(Ok(answer)) => answer.and_then(|answer| {
            let fits = answer.body.len() <= MAX_ANSWER;
            if fits {
                Ok(answer)
            } else {
                Err(CallError::TooLarge)
            }
        }),
    })
}

fn grpc_status(error: CallError) -> u32 {
    match error {
        CallError::Timeout => grpc::DEADLINE_EXCEEDED,
        CallError::TooMany | CallError::TooLarge => grpc::RESOURCE_EXHAUSTED,
        CallError::Invalid => grpc::INTERNAL,
        CallError::NotAllowed | CallError::Loop | CallError::Failed => grpc::UNAVAILABLE,
    }
}

/// In words, for the guest.
const fn word(error: CallError) -> &'static str {
    match error {
        CallError::NotAllowed => "not allowed",
        CallError::Invalid => "invalid",
        CallError::TooMany => "too many calls",
        CallError::Loop => "plugins call each other",
        CallError::Timeout => "timeout",
        CallError::Failed => "reset",
        CallError::TooLarge => "the answer is too large",
    }
}

fn len(bytes: &Bytes) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

fn count(fields: &HeaderMap) -> u32 {
    Fields::Plain(fields).count()
}

impl Told {
    async fn http(self, answer: Result<MeshAnswer, CallError>) {
        let (heard, (fields, body, trailers)) = match answer {
            Ok(answer) => {
                let fields = Fields::Response(&answer.status, &answer.headers).count();
                let params = (fields, len(&answer.body), count(&answer.trailers));
                let heard = Heard {
                    head: Some((answer.status, answer.headers)),
                    body: Some(answer.body),
                    trailers: Some(answer.trailers),
                    ..Heard::default()
                };
                (heard, params)
            }
            Err(error) => (Heard::status(BROKEN, word(error)), (0, 0, 0)),
        };
        let params = (self.root, self.number, fields, body, trailers);
        self.tell(
            true,
            "proxy_on_http_call_response",
            heard,
            |e| &e.on_http_call_response,
            params,
        )
        .await;
    }

    async fn grpc(self, answer: Result<MeshAnswer, CallError>) {
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return self.close(grpc_status(error), word(error)).await,
        };
        let (status, text) = status(&answer);
        if status != grpc::OK {
            return self.close(status, text).await;
        }
        let mut frames = Frames::default();
        frames.push(&answer.body);
        let Ok(Some(message)) = frames.next(MAX_ANSWER) else {
            return self.close(grpc::INTERNAL, "the answer is no message").await;
        };
        self.message(true, message).await;
    }

    async fn stream(self, mut pieces: mpsc::Receiver<AnswerPiece>, until: Instant, abort: AbortRegistration) {
        let pieces = stream::poll_fn(move |context| pieces.poll_recv(context));
        let mut pieces = Abortable::new(pieces, abort);
        let mut frames = Frames::default();
        loop {
            let piece = tokio::time::timeout_at(until.into(), pieces.next()).await;
            if pieces.is_aborted() {
                return;
            }
            let error = match piece {
                Ok(Some(AnswerPiece::Head(status, headers))) => match grpc::status(&headers) {
                    // All there is, in one head.
                    Some((status, text)) => return self.trailers(headers, status, text).await,
                    None if status == StatusCode::OK => {
                        self.initial(headers).await;
                        continue;
                    }
                    None => return self.close(grpc::of_http(status), "it is no answer of gRPC").await,
                },
                Ok(Some(AnswerPiece::Data(data))) => {
                    frames.push(&data);
                    loop {
                        match frames.next(MAX_ANSWER) {
                            Ok(None) => break,
                            Ok(Some(message)) => self.message(false, message).await,
                            Err(grpc::Unreadable) => {
                                return self.close(grpc::INTERNAL, "a message can't be read").await;
                            }
                        }
                    }
                    continue;
                }
                Ok(Some(AnswerPiece::Trailers(trailers))) => {
                    let (status, text) = grpc::status(&trailers).unwrap_or((grpc::UNKNOWN, Bytes::new()));
                    return self.trailers(trailers, status, text).await;
                }
                Ok(Some(AnswerPiece::Failed(error))) => error,
                Ok(None) => CallError::Failed,
                Err(_) => CallError::Timeout,
            };
            return self.close(grpc_status(error), word(error)).await;
        }
    }

    async fn initial(&self, metadata: HeaderMap) {
        let params = (self.root, self.number, count(&metadata));
        let heard = Heard {
            initial: Some(metadata),
            ..Heard::default()
        };
        let function = "proxy_on_grpc_receive_initial_metadata";
        self.tell(
            false,
            function,
            heard,
            |e| &e.on_grpc_receive_initial_metadata,
            params,
        )
        .await;
    }

    async fn message(&self, last: bool, message: Bytes) {
        let params = (self.root, self.number, len(&message));
        let heard = Heard {
            message: Some(message),
            ..Heard::default()
        };
        self.tell(
            last,
            "proxy_on_grpc_receive",
            heard,
            |e| &e.on_grpc_receive,
            params,
        )
        .await;
    }

    async fn trailers(&self, metadata: HeaderMap, status: u32, text: Bytes) {
        let params = (self.root, self.number, count(&metadata));
        let heard = Heard {
            trailing: Some(metadata),
            ..Heard::default()
        };
        let function = "proxy_on_grpc_receive_trailing_metadata";
        self.tell(
            false,
            function,
            heard,
            |e| &e.on_grpc_receive_trailing_metadata,
            params,
        )
        .await;
        self.close(status, text).await;
    }

    async fn close(&self, status: u32, text: impl Into<Bytes>) {
        let params = (self.root, self.number, status);
        let heard = Heard::status(status, text);
        self.tell(true, "proxy_on_grpc_close", heard, |e| &e.on_grpc_close, params)
            .await;
    }

    /// Tells the guest something of its call, if it hasn't given it up; `last` if there is no more to be told.
    async fn tell<P: WasmParams + Sync, R: WasmResults + Sync>(
        &self,
        last: bool,
        function: &'static str,
        heard: Heard,
        pick: Pick<P, R>,
        params: P,
    ) {
        let Some(machine) = self.machine.upgrade() else {
            return;
        };
        let mut slot = machine.any_turn().await;
        let Some(state) = slot.state().filter(|state| state.calls.is_under_way(self.number)) else {
            return;
        };
        if last {
            state.calls.end(self.number);
        }
        slot.tell(&machine, function, heard, (self.root, pick), params)
            .await;
    }
}

/// Status and message of an answer.
fn status(answer: &MeshAnswer) -> (u32, Bytes) {
    let told = grpc::status(&answer.trailers).or_else(|| grpc::status(&answer.headers));
    told.unwrap_or_else(|| {
        let status = if answer.status == StatusCode::OK {
            grpc::UNKNOWN
        } else {
            grpc::of_http(answer.status)
        };
        (status, Bytes::new())
    })
}

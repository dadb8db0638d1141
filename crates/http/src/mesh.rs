//! Mesh: calls that plugins make to other services, sent as everybody's are.

use crate::admit::{Path, Received};
use crate::attempts::call;
use crate::body::{Intake, ResponseBody};
use crate::connection::Client;
use crate::exchange::Exchange;
use crate::facts::depth;
use crate::failure::Failure;
use crate::headers::{MAX_DEPTH, look};
use crate::idle::Stall;
use crate::respond::{Outcome, respond};
use crate::route::Plan;
use crate::worker::{Connections, Worker};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, Uri, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use leeward_policy::model::Cause;
use leeward_resilience::is_idempotent;
use leeward_telemetry::{Direction, Peer};
use leeward_wasm::{AnswerPiece, AnswerTo, CallBody, CallError, MAX_ANSWER, MeshAnswer, MeshCall};
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Carries out what plugins ask for, until dropped.
pub(crate) async fn run(worker: &Rc<Worker>, mut calls: mpsc::UnboundedReceiver<MeshCall>) {
    while let Some(call) = calls.recv().await {
        let worker = Rc::clone(worker);
        // Its owner is the worker, which counts it and ends with its runtime.
        tokio::task::spawn_local(carry_out(worker, call));
    }
}

async fn carry_out(worker: Rc<Worker>, call: MeshCall) {
    // The worker doesn't end before.
    let _held = Connections::hold(&worker);
    let MeshCall { answer, .. } = &call;
    let until = call.until;
    match answer {
        AnswerTo::Whole(_) => {
            let (call, answer) = split(call);
            let AnswerTo::Whole(mut answer) = answer else {
                return;
            };
            let answered = tokio::select! {
                biased;
                // Whoever asked has gone.
                () = answer.closed() => return,
                answered = tokio::time::timeout_at(until.into(), whole(&worker, call)) => answered,
            };
            // Whoever asked may have gone just now.
            let _ = answer.send(answered.unwrap_or(Err(CallError::Timeout)));
        }
        AnswerTo::Pieces(_) => {
            let (call, answer) = split(call);
            let AnswerTo::Pieces(answer) = answer else { return };
            tokio::select! {
                biased;
                () = answer.closed() => {}
                () = pieces(&worker, call, &answer) => {}
            }
        }
    }
}

/// What is to be sent, and where the answer goes.
struct Sent {
    plugin: Arc<str>,
    service: Box<str>,
    request: Request<CallBody>,
    until: std::time::Instant,
}

fn split(call: MeshCall) -> (Result<Sent, CallError>, AnswerTo) {
    let answer = call.answer;
    let mut request = Request::new(call.body);
    *request.method_mut() = call.method;
    *request.headers_mut() = call.headers;
    // In place of what a plugin has copied of its request.
    for name in call.origin.keys() {
        request.headers_mut().remove(name);
    }
    for (name, value) in &*call.origin {
        request.headers_mut().append(name, value.clone());
    }
    let authority = call.authority.unwrap_or_else(|| call.service.clone());
    let uri = Uri::builder()
        .scheme("http")
        .authority(&*authority)
        .path_and_query(call.path)
        .build();
    let host = HeaderValue::from_str(&authority);
    let (Ok(uri), Ok(host)) = (uri, host) else {
        return (Err(CallError::Invalid), answer);
    };
    *request.uri_mut() = uri;
    request.headers_mut().insert(header::HOST, host);
    let sent = Sent {
        plugin: call.plugin,
        service: call.service,
        request,
        until: call.until,
    };
    (Ok(sent), answer)
}

async fn whole(worker: &Rc<Worker>, sent: Result<Sent, CallError>) -> Result<MeshAnswer, CallError> {
    let response = send(worker, sent?).await?;
    let (parts, mut body) = response.into_parts();
    let mut data = Vec::new();
    let mut trailers = http::HeaderMap::new();
    while let Some(frame) = body.frame().await {
        match frame.map_err(|_| CallError::Failed)?.into_data() {
            Ok(piece) if data.len() + piece.len() > MAX_ANSWER => return Err(CallError::TooLarge),
            Ok(piece) => data.extend_from_slice(&piece),
            Err(frame) => trailers.extend(frame.into_trailers().unwrap_or_default()),
        }
    }
    Ok(MeshAnswer {
        status: parts.status,
        headers: parts.headers,
        body: data.into(),
        trailers,
    })
}

async fn pieces(worker: &Rc<Worker>, sent: Result<Sent, CallError>, answer: &mpsc::Sender<AnswerPiece>) {
    let failed = |error| answer.send(AnswerPiece::Failed(error));
    let (until, sent) = match sent {
        Ok(sent) => (sent.until, sent),
        Err(error) => return drop(failed(error).await),
    };
    let response = match tokio::time::timeout_at(until.into(), send(worker, sent)).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => return drop(failed(error).await),
        Err(_) => return drop(failed(CallError::Timeout).await),
    };
    let (parts, mut body) = response.into_parts();
    if answer
        .send(AnswerPiece::Head(parts.status, parts.headers))
        .await
        .is_err()
    {
        return;
    }
    let mut trailers = http::HeaderMap::new();
    while let Some(frame) = body.frame().await {
        let told = match frame.map(Frame::into_data) {
            Ok(Ok(data)) => answer.send(AnswerPiece::Data(data)).await,
            Ok(Err(frame)) => {
                trailers.extend(frame.into_trailers().unwrap_or_default());
                Ok(())
            }
            Err(_) => return drop(failed(CallError::Failed).await),
        };
        if told.is_err() {
            return;
        }
    }
    drop(answer.send(AnswerPiece::Trailers(trailers)).await);
}

/// One call, by the policy of its service.
async fn send(worker: &Rc<Worker>, sent: Sent) -> Result<Response<ResponseBody>, CallError> {
    let (parts, body) = sent.request.into_parts();
    if depth(&parts.headers) >= MAX_DEPTH {
        return Err(CallError::Loop);
    }
    let peer = Peer {
        address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        identity: None,
    };
    let client = Rc::new(Client::new(Direction::Outbound, peer, Rc::default()));
    let snapshot = worker.pin();
    let service = snapshot
        .service_named(&sent.service)
        .ok_or(CallError::NotAllowed)?;
    let found = look(&parts.headers);
    found.check(parts.version, &parts.uri).map_err(|failure| {
        if matches!(failure, Failure::Loop(_)) {
            CallError::Loop
        } else {
            CallError::Invalid
        }
    })?;
    let mut record = worker.recorder.start(
        client.direction,
        &parts,
        &client.peer,
        snapshot.generation,
        worker.now(),
    );
    record.plugin = Some(Arc::clone(&sent.plugin));
    record.service = Some(Arc::from(&*sent.service));
    let stall = Stall::new(&worker.house);
    let intake = match body {
        CallBody::Whole(body) => Intake::stored(&body, stall),
        CallBody::Pieces(pieces) => Intake::made(Box::pin(StreamBody::new(frames(pieces))), stall),
    };
    let mut exchange = Exchange::new(Rc::clone(worker), client, record, snapshot, intake);
    exchange.deadline = Some(sent.until);
    let plan = Plan {
        retry: Arc::clone(&worker.of_plugins),
        attempts_until: exchange.deadline,
        idempotent: is_idempotent(parts.method.as_str()),
        ..Plan::to(service, worker)
    };
    let mut request = Received {
        parts,
        found,
        upgrade: None,
        own_key: false,
        prepared: false,
        path: Path::Unknown,
    };
    if let Err(failure) = request.settle_path() {
        drop(respond(exchange, Outcome::Failed(failure)));
        return Err(CallError::Invalid);
    }
    match call(&mut exchange, &plan, &mut request).await {
        Ok(response) => Ok(respond(exchange, Outcome::Served(response, None))),
        Err(cause) => {
            drop(respond(exchange, Outcome::Failed(Failure::Call(cause))));
            Err(if cause == Cause::Timeout {
                CallError::Timeout
            } else {
                CallError::Failed
            })
        }
    }
}

fn frames(
    pieces: mpsc::Receiver<Bytes>,
) -> impl futures_util::Stream<Item = Result<Frame<Bytes>, crate::body::BodyError>> {
    futures_util::stream::unfold(pieces, |mut pieces| async move {
        let data = pieces.recv().await?;
        Some((Ok(Frame::data(data)), pieces))
    })
}

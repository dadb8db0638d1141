//! Has a plugin do what a case says, as a proxy would, and sees what comes of it.

use super::cases::{Behind, Case, Message, Request};
use super::rig::{Plugged, Rig, SeenCall};
use crate::output::Failure;
use bytes::{Bytes, BytesMut};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use leeward_policy::model::PluginPlace;
use leeward_wasm::{Action, Facts, FailedCall, Fault, Filter, Reply, RequestHead, ResponseHead, Step, Way};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What a case came to.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) end: End,
    /// Why it faulted, in the host's words.
    pub(crate) reasons: Vec<String>,
    pub(crate) store: BTreeMap<String, Bytes>,
    pub(crate) log: Vec<String>,
    pub(crate) counters: BTreeMap<String, u64>,
    pub(crate) calls: Vec<SeenCall>,
    /// In the plugin, with what it waited for services.
    pub(crate) time: Duration,
    /// Linear memory, in bytes.
    pub(crate) memory: u64,
}

/// What a call, or all the calls of a filter for one request, came to.
#[derive(Clone, Debug)]
pub(crate) enum End {
    /// A fallback's word.
    Action(Action),
    /// What went on past a filter.
    Passed(Box<Passed>),
    /// What a router chose.
    Chosen(Option<String>),
    /// A fault.
    Fault(Fault),
}

/// What went on past a filter.
#[derive(Clone, Debug)]
pub(crate) struct Passed {
    /// The request; none that was answered or broke off.
    pub(crate) request: Option<PassedMessage>,
    /// The answer that a client gets; of its own if the filter answered.
    pub(crate) response: Option<PassedMessage>,
    /// The filter answered by itself.
    pub(crate) local: bool,
}

/// A message that went on.
#[derive(Clone, Debug)]
pub(crate) struct PassedMessage {
    pub(crate) path: Option<PathAndQuery>,
    pub(crate) status: Option<StatusCode>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// Runs a case with a plugin that is set up for it and no other.
pub(crate) async fn run(rig: &Rig, case: &Case) -> Result<(Plugged, Seen), Failure> {
    let plugged = rig.plug(case, false).await?;
    let end = once(rig, &plugged, case).await;
    let seen = Seen {
        end,
        reasons: Rig::reasons(&plugged),
        store: rig.store(&plugged),
        log: Rig::log(&plugged),
        counters: rig.counters(&plugged),
        calls: rig.calls_of(&plugged),
        time: rig.took(&plugged),
        memory: rig.memory(&plugged),
    };
    Ok((plugged, seen))
}

/// Asks a plugin once.
pub(crate) async fn once(rig: &Rig, plugged: &Plugged, case: &Case) -> End {
    let asked = ask(rig, plugged, case);
    rig.with_mesh(plugged, Box::pin(asked))
        .await
        .unwrap_or_else(End::Fault)
}

/// Asks a plugin once, while somebody answers what it asks of the mesh.
pub(crate) async fn ask(rig: &Rig, plugged: &Plugged, case: &Case) -> Result<End, Fault> {
    let (chosen, facts) = (rig.chosen(plugged)?, Rig::facts(case));
    match rig.kind.place() {
        PluginPlace::Rung => {
            let body = case.request.body.concat();
            let handed = !body.is_empty() && body.len() as u64 <= case.setup.limits.max_body_bytes;
            let call = FailedCall {
                head: case.request.head(),
                facts,
                body: handed.then(|| body.into()),
                cause: case.failure.cause,
                attempts: case.failure.attempts.clone(),
                kept: case.failure.kept.clone(),
            };
            rig.worker.on_failure(&chosen, call).await.map(End::Action)
        }
        PluginPlace::Filter => {
            let mut filter = rig.worker.filter(&chosen, facts.clone()).await?;
            let passed = pass(&mut filter, &facts, &case.request, &case.response).await?;
            Ok(End::Passed(Box::new(passed)))
        }
        PluginPlace::Router => {
            let routed = rig
                .worker
                .route(&chosen, case.request.head(), &facts, case.backends.clone());
            let at = routed.await.1?;
            let service = at.and_then(|at| case.backends.get(at));
            Ok(End::Chosen(service.map(|target| target.service.to_string())))
        }
    }
}

impl Request {
    pub(crate) fn head(&self) -> RequestHead {
        RequestHead {
            method: self.method.clone(),
            scheme: self.scheme,
            authority: self.authority.as_str().into(),
            path: self.path.clone(),
            headers: self.headers.clone(),
        }
    }
}

/// A message whose head a filter has been given.
struct Flow<'a> {
    filter: &'a mut Filter,
    way: Way,
    until: Option<Instant>,
}

/// A request and its answer past a filter.
pub(crate) async fn pass(
    filter: &mut Filter,
    facts: &Facts,
    request: &Request,
    behind: &Behind,
) -> Result<Passed, Fault> {
    let until = facts.deadline;
    let step = filter.request(request.head(), request.body.is_empty()).await?;
    let mut flow = Flow {
        filter: &mut *filter,
        way: Way::Request,
        until,
    };
    let body = match flow.run(step, &request.body).await? {
        Ok(body) => body,
        Err(reply) => return Ok(Passed::local(None, *reply)),
    };
    let head = filter.take_request().ok_or(Fault::BadResponse)?;
    let method = head.method;
    let request = PassedMessage {
        path: Some(head.path),
        status: None,
        headers: head.headers,
        body,
    };
    let response = match behind {
        Behind::Answer(message) => message.clone(),
        Behind::Echo => request.echo(&method),
    };
    let head = ResponseHead {
        status: response.status,
        headers: response.headers.clone(),
    };
    if !filter.wants_response() {
        let response = PassedMessage::response(head, response.body.concat().into());
        return Ok(Passed::by(request, response));
    }
    let step = filter.response(head, response.body.is_empty()).await?;
    let mut flow = Flow {
        filter: &mut *filter,
        way: Way::Response,
        until,
    };
    let body = match flow.run(step, &response.body).await? {
        Ok(body) => body,
        Err(reply) => return Ok(Passed::local(Some(request), *reply)),
    };
    let head = filter.take_response().ok_or(Fault::BadResponse)?;
    Ok(Passed::by(request, PassedMessage::response(head, body)))
}

impl Flow<'_> {
    /// The rest of a message, after its head; an answer of the filter's own ends it.
    async fn run(&mut self, mut step: Step, pieces: &[Bytes]) -> Result<Result<Bytes, Box<Reply>>, Fault> {
        let mut passed = BytesMut::new();
        for (at, piece) in pieces.iter().enumerate() {
            if let Step::Respond(reply) = step {
                return Ok(Err(reply));
            }
            if !self.wants_body() {
                // What it waits for isn't the body.
                step = self.resumed(step).await?;
                passed.extend_from_slice(&self.take_body());
                if !self.wants_body() {
                    if let Step::Respond(reply) = step {
                        return Ok(Err(reply));
                    }
                    passed.extend_from_slice(piece);
                    continue;
                }
            }
            let end = at + 1 == pieces.len();
            let given = match self.way {
                Way::Request => self.filter.request_body(piece.clone(), end).await?,
                Way::Response => self.filter.response_body(piece.clone(), end).await?,
            };
            step = given;
            if step == Step::Go {
                passed.extend_from_slice(&self.take_body());
            }
        }
        step = self.resumed(step).await?;
        passed.extend_from_slice(&self.take_body());
        Ok(match step {
            Step::Respond(reply) => Err(reply),
            Step::Go | Step::Wait => Ok(passed.freeze()),
        })
    }

    /// What it does after it has waited, if it does.
    async fn resumed(&mut self, step: Step) -> Result<Step, Fault> {
        if step != Step::Wait {
            return Ok(step);
        }
        while let Some(wake) = self.filter.wake(self.way) {
            let woken = wake.woken();
            match self.until {
                None => woken.await,
                Some(until) => {
                    if tokio::time::timeout_at(until.into(), woken).await.is_err() {
                        self.filter.give_up(self.way).await;
                        return Err(Fault::Time);
                    }
                }
            }
            let step = self.filter.resume(self.way).await?;
            if step != Step::Wait {
                return Ok(step);
            }
        }
        Ok(Step::Wait)
    }

    fn wants_body(&mut self) -> bool {
        match self.way {
            Way::Request => self.filter.wants_request_body(),
            Way::Response => self.filter.wants_response_body(),
        }
    }

    fn take_body(&mut self) -> Bytes {
        match self.way {
            Way::Request => self.filter.take_request_body(),
            Way::Response => self.filter.take_response_body(),
        }
    }
}

impl Passed {
    const fn by(request: PassedMessage, response: PassedMessage) -> Self {
        Self {
            request: Some(request),
            response: Some(response),
            local: false,
        }
    }

    fn local(request: Option<PassedMessage>, reply: Reply) -> Self {
        let head = ResponseHead {
            status: reply.status,
            headers: reply.headers,
        };
        Self {
            request,
            response: Some(PassedMessage::response(head, reply.body)),
            local: true,
        }
    }
}

impl PassedMessage {
    /// An answer that says what was asked.
    fn echo(&self, method: &Method) -> Message {
        let fields = self.headers.iter();
        let fields: Map<String, Value> = fields
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into()))
            .collect();
        let told = json!({
            "method": method.as_str(),
            "path": self.path.as_ref().map(PathAndQuery::as_str),
            "headers": fields,
            "body": String::from_utf8_lossy(&self.body),
        });
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Message {
            status: StatusCode::OK,
            headers,
            body: vec![format!("{told:#}\n").into()],
        }
    }

    fn response(head: ResponseHead, body: Bytes) -> Self {
        Self {
            path: None,
            status: Some(head.status),
            headers: head.headers,
            body,
        }
    }
}

//! Filtered: plugins in a rule's way see requests and answers, and a router chooses among its backends.

use crate::admit::Received;
use crate::body::ResponseBody;
use crate::exchange::Exchange;
use crate::facts::{facts, put_back, take_head};
use crate::failure::Failure;
use crate::flags::holds;
use crate::flow::{Flow, Held, Lost, Raw};
use crate::headers::look;
use crate::respond::{Outcome, respond};
use crate::route::Plan;
use crate::turns::Turns;
use crate::worker::Worker;
use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use leeward_policy::model::{Cause, OnFault};
use leeward_policy::{FilterView, PluginView, Snapshot};
use leeward_telemetry::Outcome as Told;
use leeward_wasm::{Chosen, Fault, Filter, Reply, ResponseHead, Step, Way};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

/// The filters of one request.
pub(crate) struct Chain {
    passers: Vec<Rc<Passer>>,
    said: Rc<Said>,
}

/// What filters say while bodies pass and nobody has the exchange at hand.
#[derive(Default)]
struct Said {
    /// Why a body broke off.
    stop: RefCell<Option<Stopped>>,
    /// Faults: whose, which, and when.
    faults: RefCell<Vec<(Arc<str>, &'static str, Instant)>>,
}

impl Chain {
    /// Whether no filter wants anything of the answer, nor anything more of the request, and nothing is left to be told.
    pub(crate) fn is_done(&self) -> bool {
        let passed = |passer: &Rc<Passer>| {
            !passer.is_there()
                || passer
                    .filter
                    .try_lock()
                    .is_some_and(|mut filter| !filter.wants_response() && !filter.wants_request_body())
        };
        self.passers.iter().all(passed) && !self.has_faults()
    }

    /// Whether there are faults that nobody has written down yet.
    pub(crate) fn has_faults(&self) -> bool {
        !self.said.faults.borrow().is_empty()
    }

    /// The faults that nobody has written down yet.
    pub(crate) fn take_faults(&self) -> Vec<(Arc<str>, &'static str, Instant)> {
        self.said.faults.take()
    }
}

/// One filter, and what policy says of it.
pub(crate) struct Passer {
    /// Held for one turn, and not while anything is waited for: a request's body can still be on its way when the answer
    /// comes.
    pub(crate) filter: Turns<Filter>,
    plugin: Arc<str>,
    fail_open: bool,
    there: Cell<bool>,
    said: Rc<Said>,
    worker: Rc<Worker>,
}

/// Why a message goes no further.
pub(crate) enum Stopped {
    /// A plugin answers in its place.
    Reply(Arc<str>, Box<Reply>),
    /// A plugin's fault that policy doesn't let pass.
    Fault,
}

impl Passer {
    pub(crate) fn is_there(&self) -> bool {
        self.there.get()
    }

    pub(crate) fn name(&self) -> Arc<str> {
        Arc::clone(&self.plugin)
    }

    /// The filter is asked nothing more; an error ends the message, too.
    pub(crate) fn faulted(&self, fault: Fault) -> Result<(), Stopped> {
        self.worker.recorder.plugin_fault(&self.plugin, fault.as_str());
        // Once for each filter, since it is asked nothing more.
        let fault = (Arc::clone(&self.plugin), fault.as_str(), self.worker.now());
        self.said.faults.borrow_mut().push(fault);
        self.there.set(false);
        if self.fail_open {
            Ok(())
        } else {
            Err(Stopped::Fault)
        }
    }

    /// Writes down why a body broke off.
    pub(crate) fn stop(&self, stopped: Stopped) {
        self.said.stop.replace(Some(stopped));
    }
}

/// The plugins' part of a request, before its call is made. An outcome ends it.
pub(crate) async fn before(
    exchange: &mut Exchange,
    plan: &mut Plan,
    request: &mut Received,
) -> Result<(), Outcome> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let Some(rule) = plan.rule.and_then(|idx| snapshot.rule(idx)) else {
        return Ok(());
    };
    if !rule.filters.is_empty() {
        let filters = Arc::clone(&rule.filters);
        let chain = choose(exchange, &snapshot, &filters, request).await?;
        if !chain.passers.is_empty() {
            let chain = Rc::new(chain);
            exchange.filters = Some(Rc::clone(&chain));
            let ran = run(exchange, &chain, request).await;
            exchange.note_faults();
            ran?;
            plan.again(exchange, request);
        }
    }
    if let Some(router) = &rule.router {
        Box::pin(crate::router::choose(exchange, plan, request, rule, router)).await?;
    }
    Ok(())
}

/// Whether a plugin's fault lets a request go on.
pub(crate) fn lets_go_on(view: &PluginView) -> bool {
    match view.spec.on_fault {
        OnFault::FailOpen | OnFault::NextRung => true,
        OnFault::FailClosed | OnFault::Fail => false,
    }
}

/// Policy names a plugin that isn't there, and what was to be done then has gone with it: nothing passes.
pub(crate) fn missing(exchange: &mut Exchange, plugin: &Arc<str>) -> Outcome {
    exchange.plugin_fault(plugin, Fault::NotLoaded.as_str());
    Outcome::Failed(Failure::Plugin)
}

/// The version of a plugin for a request; `None` if its condition keeps it from the request.
pub(crate) fn version_for(
    exchange: &mut Exchange,
    request: &Received,
    view: &PluginView,
) -> Result<Chosen, Fault> {
    let canary = view.spec.canary.as_ref().is_some_and(|canary| {
        let by_flag = |condition| holds(exchange, request, condition, None);
        canary.when.as_ref().is_some_and(by_flag)
            || canary.percent > 0 && fastrand::u32(..100) < canary.percent
    });
    exchange.worker().plugins.choose(&view.name, &view.spec, canary)
}

async fn choose(
    exchange: &mut Exchange,
    snapshot: &Snapshot,
    filters: &[FilterView],
    request: &Received,
) -> Result<Chain, Outcome> {
    let said = Rc::<Said>::default();
    let mut passers = Vec::with_capacity(filters.len());
    for of in filters {
        let view = of.plugin.and_then(|idx| snapshot.plugin(idx));
        let own = view.and_then(|view| view.spec.when.as_ref());
        let mut conditions = of.when.iter().chain(own);
        if !conditions.all(|condition| holds(exchange, request, condition, None)) {
            continue;
        }
        let Some(view) = view else {
            return Err(missing(exchange, &of.name));
        };
        let filter = match version_for(exchange, request, view) {
            Ok(chosen) => {
                let facts = facts(exchange, request, &of.config, view);
                let worker = Rc::clone(exchange.worker());
                worker.plugins.filter(&chosen, facts).await
            }
            Err(fault) => Err(fault),
        };
        match filter {
            Ok(filter) => passers.push(Rc::new(Passer {
                filter: Turns::new(filter),
                plugin: Arc::clone(&view.name),
                fail_open: lets_go_on(view),
                there: Cell::new(true),
                said: Rc::clone(&said),
                worker: Rc::clone(exchange.worker()),
            })),
            Err(fault) => {
                exchange.plugin_fault(&view.name, fault.as_str());
                if !lets_go_on(view) {
                    return Err(Outcome::Failed(Failure::Plugin));
                }
            }
        }
    }
    Ok(Chain { passers, said })
}

/// The request's head past every filter, and its body on the way.
async fn run(exchange: &mut Exchange, chain: &Rc<Chain>, request: &mut Received) -> Result<(), Outcome> {
    let end = exchange.intake.ended();
    // Only there once the body is somebody's concern, which with most filters it never is.
    let mut flow = None;
    let mut head = take_head(request);
    for (at, passer) in chain.passers.iter().enumerate() {
        let step = passer.filter.lock().await.request(head, end).await;
        let step = match step {
            Ok(Step::Wait) => {
                let flow = flow.get_or_insert_with(|| request_flow(exchange, chain, end));
                // Rare, so it doesn't belong in the size of every request's future.
                Box::pin(flow.hold(at, passer)).await
            }
            step => step.map_err(Held::Fault),
        };
        let ended = match step {
            Ok(Step::Respond(reply)) => Some(Stopped::Reply(passer.name(), reply)),
            Ok(Step::Go | Step::Wait) => None,
            Err(Held::Fault(fault)) => passer.faulted(fault).err(),
            Err(Held::Stopped(stopped)) => Some(stopped),
            Err(Held::Lost(Lost::Gone)) => {
                return Err(Outcome::Failed(Failure::BadRequest("the body broke off")));
            }
            // The client has taken too long.
            Err(Held::Lost(Lost::Late)) => return Err(Outcome::Failed(Failure::Call(Cause::Timeout))),
        };
        let mut filter = passer.filter.lock().await;
        let taken = filter.take_request();
        if let Some(stopped) = ended {
            // Those that haven't seen the request don't see its answer.
            for later in chain.passers.iter().skip(at + 1) {
                later.there.set(false);
            }
            if let Some(taken) = taken {
                put_back(request, taken);
            }
            return Err(outcome(exchange, stopped));
        }
        let data = filter.take_request_body();
        if !data.is_empty() || filter.wants_request_body() {
            let flow = flow.get_or_insert_with(|| request_flow(exchange, chain, end));
            flow.collect(at, data);
        }
        head = match taken {
            Some(taken) => taken,
            // It has lost what it was given: there is nothing left to send.
            None => return Err(Outcome::Failed(Failure::Plugin)),
        };
    }
    put_back(request, head);
    request.found = look(&request.parts.headers);
    request.settle_path().map_err(Outcome::Failed)?;
    if let Some(flow) = flow {
        if !flow.is_untouched() || flow.is_wanted().await && !end {
            Box::pin(restore(exchange, request, flow)).await;
        } else if let (Raw::Client(source), _) = flow.into_raw() {
            exchange.intake.put_source(source);
        }
    }
    Ok(())
}

/// The request's body, to pass the filters.
fn request_flow(exchange: &mut Exchange, chain: &Chain, end: bool) -> Flow {
    let raw = exchange.intake.take_source().map_or(Raw::Ended, Raw::Client);
    let (stall, deadline) = (Rc::clone(&exchange.intake.stall), exchange.deadline);
    let mut flow = Flow::new(raw, Way::Request, chain.passers.clone(), &stall, deadline);
    if end {
        flow.has_no_body();
    }
    flow
}

/// What has passed the filters is the request's body from here on.
async fn restore(exchange: &Exchange, request: &mut Received, flow: Flow) {
    request.parts.headers.remove(header::CONTENT_LENGTH);
    let (body, length) = flow.into_body().await;
    exchange.intake.put_filtered(body, length);
}

/// What a plugin's word makes of a request.
fn outcome(exchange: &mut Exchange, stopped: Stopped) -> Outcome {
    match stopped {
        Stopped::Fault => Outcome::Failed(Failure::Plugin),
        Stopped::Reply(plugin, reply) => {
            exchange.record.plugin = Some(plugin);
            Outcome::Local(response(exchange, *reply), Told::Served)
        }
    }
}

/// A plugin's reply as a response; told in gRPC's way where the request is gRPC and the plugin says a status.
pub(crate) fn response(exchange: &Exchange, reply: Reply) -> Response<Bytes> {
    let mut response = Response::new(reply.body);
    *response.status_mut() = reply.status;
    *response.headers_mut() = reply.headers;
    if let (true, Some(status)) = (exchange.grpc, reply.grpc_status) {
        *response.status_mut() = StatusCode::OK;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(status));
    }
    response
}

/// What a filter's word about the request's body makes of a call that it broke off.
pub(crate) fn broken_off(exchange: &mut Exchange) -> Option<Outcome> {
    let chain = exchange.filters.clone()?;
    let stopped = chain.said.stop.borrow_mut().take()?;
    exchange.let_go();
    exchange.note_faults();
    // A rung that answers meanwhile isn't heard.
    let record = &mut exchange.record;
    (record.cause, record.fallback, record.fallback_kind) = (None, None, None);
    Some(outcome(exchange, stopped))
}

/// What is given in place of an answer.
fn instead(
    mut exchange: Box<Exchange>,
    outcome: impl FnOnce(&mut Exchange) -> Outcome,
) -> Response<ResponseBody> {
    exchange.let_go();
    exchange.note_faults();
    let outcome = outcome(&mut exchange);
    respond(exchange, outcome)
}

/// The answer past every filter, in the opposite order.
pub(crate) async fn after(chain: Rc<Chain>, response: Response<ResponseBody>) -> Response<ResponseBody> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return response;
    }
    let passers: Vec<_> = chain.passers.iter().rev().cloned().collect();
    let (mut parts, mut body) = response.into_parts();
    let end = http_body::Body::is_end_stream(&body);
    let Some(mut exchange) = body.give_up() else {
        return Response::from_parts(parts, body);
    };
    let (stall, deadline) = (Rc::clone(&exchange.intake.stall), exchange.deadline);
    let mut flow = Flow::new(
        Raw::Answer(body),
        Way::Response,
        passers.clone(),
        &stall,
        deadline,
    );
    flow.keep(exchange.fill.take());
    if end {
        flow.has_no_body();
    }
    for (at, passer) in passers.iter().enumerate() {
        if !passer.is_there() {
            continue;
        }
        let mut filter = passer.filter.lock().await;
        if !filter.wants_response() {
            continue;
        }
        let head = ResponseHead {
            status: parts.status,
            headers: std::mem::take(&mut parts.headers),
        };
        let step = filter.response(head, end).await;
        drop(filter);
        let step = match step {
            Ok(Step::Wait) => flow.hold(at, passer).await,
            step => step.map_err(Held::Fault),
        };
        let ended = match step {
            Ok(Step::Respond(reply)) => Some(Stopped::Reply(passer.name(), reply)),
            Ok(Step::Go | Step::Wait) => None,
            Err(Held::Fault(fault)) => passer.faulted(fault).err(),
            Err(Held::Stopped(stopped)) => Some(stopped),
            Err(Held::Lost(lost)) => {
                let cause = match lost {
                    Lost::Gone => Cause::Reset,
                    Lost::Late => Cause::Timeout,
                };
                return instead(exchange, |_| Outcome::Failed(Failure::Call(cause)));
            }
        };
        if let Some(stopped) = ended {
            return instead(exchange, |exchange| outcome(exchange, stopped));
        }
        let mut filter = passer.filter.lock().await;
        flow.collect(at, filter.take_response_body());
        let Some(head) = filter.take_response() else {
            // It has lost what it was given.
            return instead(exchange, |exchange| outcome(exchange, Stopped::Fault));
        };
        (parts.status, parts.headers) = (head.status, head.headers);
    }
    exchange.note_faults();
    exchange.record.status = parts.status.as_u16();
    if end && has_other_length(&parts) && asked(&passers).await {
        parts.headers.remove(header::CONTENT_LENGTH);
    }
    if flow.is_untouched() && (end || !flow.is_wanted().await) {
        let (raw, fill) = flow.into_raw();
        exchange.fill = fill;
        let mut body = match raw {
            Raw::Answer(body) => body,
            Raw::Client(_) | Raw::Ended => ResponseBody::none(),
        };
        body.take_back(exchange);
        return Response::from_parts(parts, body);
    }
    parts.headers.remove(header::CONTENT_LENGTH);
    let (body, length) = flow.into_body().await;
    Response::from_parts(parts, ResponseBody::filtered(body, length, exchange))
}

/// Whether an answer without a body tells the length of one, as that to HEAD does.
fn has_other_length(parts: &http::response::Parts) -> bool {
    let length = parts.headers.get(header::CONTENT_LENGTH);
    length.is_some_and(|length| length != "0")
}

/// Whether a filter would have had the body that an answer to GET has: its length is another then (RFC 9110 §8.6).
async fn asked(passers: &[Rc<Passer>]) -> bool {
    for passer in passers.iter().filter(|passer| passer.is_there()) {
        if passer.filter.lock().await.asked_for_response_body() {
            return true;
        }
    }
    false
}

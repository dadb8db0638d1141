//! One request from its head to the end of its answer: what it holds, and what is written down of it.

use crate::body::{Intake, RequestBody};
use crate::cached::wall;
use crate::connection::Client;
use crate::filtered::Chain;
use crate::worker::Worker;
use http::HeaderValue;
use leeward_cache::Fill;
use leeward_policy::{ServiceIdx, Snapshot};
use leeward_telemetry::{Outcome, Reason, Record};
use leeward_upstream::{Keep, RetryPermit, ServicePermit, UnderWay};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A request under way. Its record is written when it is dropped, however that comes about; a request that
/// nobody brought to an end was given up by its client.
pub(crate) struct Exchange {
    pub(crate) record: Record,
    /// Pinned at the start; the request never sees another.
    pub(crate) snapshot: Arc<Snapshot>,
    /// When the client's answer must have begun; `None` is never.
    pub(crate) deadline: Option<Instant>,
    /// The request's body.
    pub(crate) intake: Rc<Intake>,
    /// Whether failures are told in gRPC's way.
    pub(crate) grpc: bool,
    /// Whether the client speaks HTTP/1.x.
    pub(crate) http1: bool,
    /// Whether the client asks to change protocols.
    pub(crate) wants_upgrade: bool,
    /// Whether the connection must close after the answer.
    pub(crate) close: bool,
    /// Whether the answer came through another proxy, whose own fields count.
    pub(crate) from_peer: bool,
    /// Why there was no connection for the last attempt, where no endpoint is to blame: this proxy has no certificate that
    /// is good, or a zone no gateway.
    pub(crate) unconnected: Option<Reason>,
    /// Whether the last attempt, or all that were under way when the time was up, failed through a gateway's fault, whoever is
    /// behind it.
    pub(crate) gateway_failed: bool,
    /// Don't tell the client that an answer is degraded.
    pub(crate) hide_degraded: bool,
    /// The connection that the answer comes on.
    pub(crate) keep: Option<Keep<RequestBody>>,
    /// Leave to be under way at the service.
    pub(crate) permit: Option<ServicePermit>,
    /// Leave to be a retry or a hedge.
    pub(crate) extra: Option<RetryPermit>,
    /// Its place among the requests under way at the endpoint.
    pub(crate) under_way: Option<UnderWay>,
    /// Whether the answer is a failure of the service's.
    pub(crate) answer_failed: bool,
    /// When the head of the answer came.
    pub(crate) answered_at: Option<Instant>,
    /// When it makes sense to ask again, for the client.
    pub(crate) retry_after: Option<Duration>,
    /// Where the answer's body is kept as it passes.
    pub(crate) fill: Option<Fill>,
    /// A cookie that names an endpoint, for the client.
    pub(crate) cookie: Option<HeaderValue>,
    /// The plugins in its way.
    pub(crate) filters: Option<Rc<Chain>>,
    /// The rule that it is by, as `ROUTE/RULE`.
    pub(crate) rule_id: Option<Arc<str>>,
    /// The service that policy lets it pass to.
    pub(crate) authorized: Option<ServiceIdx>,
    /// Whether it is on behalf of a client from outside, who has no identity of the mesh.
    pub(crate) from_outside: bool,
    ended: bool,
    completed_at: Option<Instant>,
    worker: Rc<Worker>,
    client: Rc<Client>,
}

impl Exchange {
    pub(crate) fn new(
        worker: Rc<Worker>,
        client: Rc<Client>,
        record: Record,
        snapshot: Arc<Snapshot>,
        intake: Rc<Intake>,
    ) -> Box<Self> {
        let close = client.connection.request_began();
        Box::new(Self {
            record,
            snapshot,
            deadline: None,
            intake,
            grpc: false,
            http1: true,
            wants_upgrade: false,
            close,
            from_peer: false,
            unconnected: None,
            gateway_failed: false,
            hide_degraded: false,
            keep: None,
            permit: None,
            extra: None,
            under_way: None,
            answer_failed: false,
            answered_at: None,
            retry_after: None,
            fill: None,
            cookie: None,
            filters: None,
            rule_id: None,
            authorized: None,
            from_outside: client.edge.is_some(),
            ended: false,
            completed_at: None,
            worker,
            client,
        })
    }

    pub(crate) fn worker(&self) -> &Rc<Worker> {
        &self.worker
    }

    /// Whether the client's connection is to end when it can.
    pub(crate) fn client_is_leaving(&self) -> bool {
        self.client.connection.is_leaving()
    }

    /// How long the client's connection may be idle, if it is from outside.
    pub(crate) fn client_idle_limit(&self) -> Option<Duration> {
        self.client.connection.idle_limit()
    }

    /// Where the client finds HTTP/3, if there is any for it and it doesn't speak that already.
    pub(crate) fn alt_svc(&self) -> Option<HeaderValue> {
        self.client.edge.as_ref()?.alt_svc()
    }

    /// The answer has been handed over whole.
    pub(crate) fn complete(mut self: Box<Self>) {
        self.ended = true;
        if let Some(fill) = self.fill.take() {
            fill.finish(wall());
        }
        self.completed_at = Some(self.worker.now());
        self.has_come();
    }

    /// All of the answer has come, though not all of it may have been handed over.
    pub(crate) fn has_come(&mut self) {
        // An answer can overtake its request; a connection that is still sending one can't carry another.
        if let Some(keep) = self.keep.take()
            && self.intake.ended()
        {
            keep.give_back(self.worker.now());
        }
        self.permit = None;
        self.extra = None;
        self.under_way = None;
    }

    /// Writes down which limit of this proxy refuses a request, or an attempt, for a service.
    pub(crate) fn refused_by(&mut self, limit: &'static str, service: Option<&Arc<str>>) {
        self.record.limit = Some(limit);
        if let Some(service) = service {
            self.worker.recorder.refused(service, limit);
        }
    }

    /// Counts a plugin's fault, and writes it down.
    pub(crate) fn plugin_fault(&mut self, plugin: &Arc<str>, fault: &'static str) {
        self.worker.recorder.plugin_fault(plugin, fault);
        self.record.faulted(plugin, fault, self.worker.now());
    }

    /// Takes the request's body in to its end, as far as `limit` bytes and its time go.
    pub(crate) async fn take_body_in(&self, limit: usize) {
        self.intake.keep(limit);
        let filled = self.intake.fill();
        match self.deadline {
            Some(until) => drop(tokio::time::timeout_at(until.into(), filled).await),
            None => filled.await,
        }
    }

    /// Writes down the faults that filters had, since nobody has the exchange at hand while bodies pass.
    pub(crate) fn note_faults(&mut self) {
        let chain = self.filters.as_ref().filter(|chain| chain.has_faults());
        let Some(chain) = chain else {
            return;
        };
        for (plugin, fault, at) in chain.take_faults() {
            self.record.faulted(&plugin, fault, at);
        }
    }

    /// Gives up what a call holds, before another one.
    pub(crate) fn let_go(&mut self) {
        self.intake.recall();
        self.keep = None;
        self.permit = None;
        self.extra = None;
        self.under_way = None;
        self.fill = None;
    }

    /// There was no way to serve it, and nobody to tell but whoever reads the record.
    pub(crate) fn refused(mut self: Box<Self>, reason: Reason) {
        self.ended = true;
        self.record.reason = reason;
        self.record.outcome = Outcome::Failed;
    }

    /// Neither body has moved for as long as policy lets them.
    pub(crate) fn stood_still(mut self: Box<Self>) {
        self.ended = true;
        self.record.reason = Reason::IdleTimeout;
        self.record.outcome = Outcome::Failed;
    }

    /// The upstream ended its answer early, after its head had gone to the client.
    pub(crate) fn cut_short_by_upstream(mut self: Box<Self>) {
        self.ended = true;
        self.record.reason = Reason::Reset;
        self.record.outcome = Outcome::Failed;
    }

    /// A filter ended the answer, after its head had gone to the client.
    pub(crate) fn cut_short_by_filter(mut self: Box<Self>) {
        self.ended = true;
        self.record.reason = Reason::PluginFault;
        self.record.outcome = Outcome::Failed;
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.ended {
            self.record.reason = Reason::ClientGone;
            self.client.connection.gave_up();
        }
        self.record.request_bytes = self.intake.bytes();
        self.note_faults();
        let now = self.completed_at.unwrap_or_else(|| self.worker.now());
        self.worker.recorder.finish(&mut self.record, now);
        self.client.connection.request_ended();
    }
}

//! Inbound: whose request it is, and whether and where in this zone it goes.
//!
//! The proxy that sent it has chosen the endpoint. Mostly it is a workload of this node; where this proxy is a gateway of
//! its zone, and the caller one of another, it may be behind another proxy of the zone. What a gateway passes on says whose
//! it is, and is never passed on again, so that no request can go in a circle.

use crate::admit::Received;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers::{CALLER, CHECK, ENDPOINT, PRIORITY, ROUTE};
use crate::route::{Plan, asks_for_bytes, callers_timeout, may_be_sent_twice, said_priority};
use http::{HeaderMap, HeaderValue};
use leeward_identity::{Role, SpiffeId};
use leeward_policy::model::Protocol;
use leeward_policy::{EndpointView, ServiceView, Via, zone_of};
use leeward_telemetry::Tcp;
use std::rc::Rc;
use std::sync::Arc;

/// What a gateway passes on beside the request.
#[derive(Debug)]
pub(crate) struct Forward {
    /// Whose it is.
    caller: HeaderValue,
    /// As the caller said.
    route: Option<HeaderValue>,
    /// Likewise.
    check: Option<HeaderValue>,
}

impl Forward {
    fn new(caller: &str, request: &Received) -> Option<Rc<Self>> {
        let headers = &request.parts.headers;
        Some(Rc::new(Self {
            caller: HeaderValue::from_str(caller).ok()?,
            route: headers.get(ROUTE).cloned(),
            check: headers.get(CHECK).cloned(),
        }))
    }

    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        headers.insert(CALLER, self.caller.clone());
        for (name, value) in [(ROUTE, &self.route), (CHECK, &self.check)] {
            if let Some(value) = value {
                headers.insert(name, value.clone());
            }
        }
    }
}

/// How a request came to this proxy.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Came {
    /// From the caller's own proxy.
    Itself,
    /// From a gateway of this zone, which has passed it on.
    ByGateway,
}

/// Finds what to do with a request of another proxy.
pub(crate) fn to_endpoint(exchange: &mut Exchange, request: &Received) -> Result<Plan, Failure> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let came = if request.found.has_caller() {
        let (caller, gateway) = vouched(exchange, request).ok_or(Failure::CallerRefused)?;
        // All that is decided here is decided about the caller.
        exchange.record.peer.identity = Some(caller);
        exchange.record.gateway = Some(gateway);
        Came::ByGateway
    } else {
        Came::Itself
    };
    let here = &*exchange.worker().zone;
    if came == Came::Itself && snapshot.gateways().required && from(exchange) != Some(here) {
        return Err(Failure::GatewayRequired);
    }
    let wanted = request
        .parts
        .headers
        .get(ENDPOINT)
        .and_then(|value| value.to_str().ok());
    let (service, at) = wanted
        .and_then(|w| w.split_once('/'))
        .ok_or(Failure::UnknownEndpoint)?;
    let service = snapshot.service_named(service).ok_or(Failure::UnknownEndpoint)?;
    let view = snapshot.service(service).ok_or(Failure::UnknownEndpoint)?;
    let is_tcp = view.spec.protocol == Protocol::Tcp;
    if is_tcp != (request.upgrade.is_some() && asks_for_bytes(request)) {
        // The calling proxy has other policy than this one.
        return Err(Failure::UnknownEndpoint);
    }
    if !view.exported_to.is_all() {
        let may_have = |zone: &str| zone == here || view.exported_to.has(zone);
        if !from(exchange).is_some_and(may_have) {
            exchange.record.service = Some(Arc::clone(&view.name));
            return Err(Failure::NotExported);
        }
    }
    let only = find(view, here, at).ok_or(Failure::UnknownEndpoint)?;
    let forward = match view.endpoints.get(only).map(|endpoint| &endpoint.key.via) {
        Some(Via::Direct) => None,
        Some(Via::Proxy { name, .. })
            if snapshot.gateways().is_one
                && came == Came::Itself
                && from(exchange) != Some(here)
                && !snapshot.gateways().has(name) =>
        {
            let caller = exchange.record.peer.identity.as_deref();
            let forward = caller.and_then(|caller| Forward::new(caller, request));
            Some(forward.ok_or(Failure::UnknownEndpoint)?)
        }
        Some(Via::Proxy { .. } | Via::Gateway { .. }) | None => return Err(Failure::UnknownEndpoint),
    };
    exchange.record.service = Some(Arc::clone(&view.name));
    if is_tcp {
        let worker = Rc::clone(exchange.worker());
        worker.recorder.is_tcp(&mut exchange.record, Tcp::default());
    }
    // The time limit is the calling proxy's; it says what is left, and ends the stream when it is up.
    let limit = callers_timeout(exchange.grpc, request);
    let until = limit.and_then(|limit| exchange.record.started.checked_add(limit));
    exchange.deadline = until;
    Ok(Plan {
        only: Some(only),
        attempts_until: until,
        priority: said_priority(request, PRIORITY.as_str()).unwrap_or_default(),
        idempotent: may_be_sent_twice(request),
        forward,
        ..Plan::bare(service, Arc::clone(&exchange.worker().again_here))
    })
}

/// The zone of the caller.
fn from(exchange: &Exchange) -> Option<&str> {
    exchange.record.peer.identity.as_deref().and_then(zone_of)
}

/// The endpoint in this zone: one that this proxy reaches itself, by its address; or any, by its id.
fn find(view: &ServiceView, here: &str, at: &str) -> Option<usize> {
    let by_id = at.contains('@');
    let is_it = |endpoint: &EndpointView| {
        *endpoint.zone == *here
            && if by_id {
                *endpoint.id == *at
            } else {
                *endpoint.address_text == *at && endpoint.key.via == Via::Direct
            }
    };
    view.endpoints.iter().position(is_it)
}

/// The caller whom a gateway of this zone speaks for, and the gateway. `None`: whoever says so is no such gateway, or speaks
/// for nobody for whom it may.
fn vouched(exchange: &Exchange, request: &Received) -> Option<(Arc<str>, Arc<str>)> {
    let here = &*exchange.worker().zone;
    let own = exchange.worker().identity.as_ref()?;
    let peer = SpiffeId::parse(exchange.record.peer.identity.as_deref()?).ok()?;
    let Role::Proxy { zone, name: gateway } = peer.role() else {
        return None;
    };
    if *zone != *here || !exchange.snapshot.gateways().has(&gateway) {
        return None;
    }
    let mut said = request.parts.headers.get_all(CALLER).iter();
    let (Some(caller), None) = (said.next(), said.next()) else {
        return None;
    };
    let caller = SpiffeId::parse(caller.to_str().ok()?).ok()?;
    let Role::Proxy { zone, .. } = caller.role() else {
        return None;
    };
    let is_elsewhere = *zone != *here && caller.trust_domain() == own.id().trust_domain();
    is_elsewhere.then(|| (caller.as_str().into(), (*gateway).into()))
}

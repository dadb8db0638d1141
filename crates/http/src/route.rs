//! Route: from the request's head to a service and the limits of its rule.

use crate::admit::Received;
use crate::connection::Client;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers::ENDPOINT;
use http::{HeaderName, request};
use leeward_policy::{FallbackIdx, Head, ServiceIdx, Via};
use leeward_telemetry::Direction;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

/// What is to be done with a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) service: ServiceIdx,
    /// This endpoint of the service and no other; `None` lets the balancer choose.
    pub(crate) only: Option<usize>,
    /// Attempts in all, at least 1.
    pub(crate) max_attempts: u8,
    pub(crate) fallback: Option<FallbackIdx>,
    /// When the attempts must be over.
    pub(crate) attempts_until: Option<Instant>,
}

/// A request's head as the route table reads it.
struct HeadView<'a> {
    host: Cow<'a, str>,
    parts: &'a request::Parts,
}

impl Head for HeadView<'_> {
    fn host(&self) -> &str {
        &self.host
    }

    fn path(&self) -> &str {
        self.parts.uri.path()
    }

    fn method(&self) -> &str {
        self.parts.method.as_str()
    }

    fn any_value(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        // Policy has checked the name, and nearly all are known statically.
        let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else {
            return false;
        };
        self.parts
            .headers
            .get_all(name)
            .iter()
            .any(|value| test(value.as_bytes()))
    }
}

/// Finds what to do with a request.
pub(crate) fn route(exchange: &mut Exchange, client: &Client, request: &Received) -> Result<Plan, Failure> {
    let host = check_authority(request.authority())?;
    match client.direction {
        Direction::Outbound => by_rule(exchange, host, request),
        Direction::Inbound => to_local_endpoint(exchange, request),
    }
}

/// Outbound: policy's routes decide.
fn by_rule(exchange: &mut Exchange, host: &str, request: &Received) -> Result<Plan, Failure> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let head = HeadView {
        host: lower_case(host),
        parts: &request.parts,
    };
    let (_, rule) = snapshot.route(&head).ok_or(Failure::NoRoute)?;
    let record = &mut exchange.record;
    record.route = Some(Arc::clone(&rule.route));
    record.rule = rule.position;
    record.pattern = Some(Arc::clone(&rule.pattern));
    let draw = match rule.total_weight() {
        0 | 1 => 0,
        total => fastrand::u64(..total),
    };
    let service = rule
        .backend(draw)
        .ok_or(Failure::Call(leeward_policy::model::Cause::NoEndpoint))?;
    record.service = snapshot.service(service).map(|view| Arc::clone(&view.name));
    let started = record.started;
    exchange.deadline = rule.request_timeout.map(|limit| started + limit);
    // The ladder needs time of its own, or a timeout could never be answered: a tenth of the request's.
    let attempts_until = rule.request_timeout.map(|limit| match rule.fallback {
        Some(_) => started + limit - limit / 10,
        None => started + limit,
    });
    Ok(Plan {
        service,
        only: None,
        max_attempts: rule.max_attempts,
        fallback: rule.fallback,
        attempts_until,
    })
}

/// Inbound: the proxy that sent it has chosen; this one only serves its own workloads.
fn to_local_endpoint(exchange: &mut Exchange, request: &Received) -> Result<Plan, Failure> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let wanted = request
        .parts
        .headers
        .get(ENDPOINT)
        .and_then(|value| value.to_str().ok());
    let (service, address) = wanted
        .and_then(|w| w.split_once('/'))
        .ok_or(Failure::UnknownEndpoint)?;
    let service = snapshot.service_named(service).ok_or(Failure::UnknownEndpoint)?;
    let view = snapshot.service(service).ok_or(Failure::UnknownEndpoint)?;
    let here = &*exchange.worker().zone;
    let only = view
        .endpoints
        .iter()
        .position(|e| *e.address_text == *address && e.key.via == Via::Direct && *e.zone == *here)
        .ok_or(Failure::UnknownEndpoint)?;
    exchange.record.service = Some(Arc::clone(&view.name));
    // The time limit is the calling proxy's, which ends the stream when it is up.
    Ok(Plan {
        service,
        only: Some(only),
        // Not another endpoint, but another connection, should an idle one close just as it is used.
        max_attempts: 2,
        fallback: None,
        attempts_until: None,
    })
}

/// The host of an authority that is one (RFC 3986 §3.2), without its port.
fn check_authority(authority: &str) -> Result<&str, Failure> {
    const BAD: Failure = Failure::BadRequest("Host is not an authority");
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._~:[]%!$&'()*+,;=".contains(&b);
    if authority.is_empty() || !authority.bytes().all(allowed) {
        return Err(BAD);
    }
    let (host, port) = match authority.rfind(']') {
        Some(end) => authority.split_at(end + 1),
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let port = port.strip_prefix(':').unwrap_or(port);
    if host.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
        return Err(BAD);
    }
    Ok(host)
}

fn lower_case(host: &str) -> Cow<'_, str> {
    if host.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(host.to_ascii_lowercase())
    } else {
        Cow::Borrowed(host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_without_their_ports() {
        assert_eq!(check_authority("a.example:80"), Ok("a.example"));
        assert_eq!(check_authority("a.example:"), Ok("a.example"));
        assert_eq!(check_authority("[::1]:80"), Ok("[::1]"));
        assert_eq!(lower_case("A.Example"), "a.example");
        for bad in ["", ":80", "a/b", "a b", "u@h", "a:80:80", "a:x", "h\u{e9}"] {
            assert!(check_authority(bad).is_err(), "{bad:?}");
        }
    }
}

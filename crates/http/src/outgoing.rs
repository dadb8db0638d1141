//! Outgoing: the request as an endpoint gets it.

use crate::admit::Received;
use crate::attempts::Call;
use crate::body::RequestBody;
use crate::exchange::Exchange;
use crate::headers::{ENDPOINT, GRPC_TIMEOUT, PRIORITY, ROUTE, TIMEOUT};
use http::{HeaderMap, HeaderValue, Request, Uri, Version, header, request, uri};
use leeward_policy::model::{Priority, Protocol};
use leeward_policy::{EndpointView, Via};
use leeward_resilience::deadline::{cut, format};
use leeward_telemetry::TraceContext;
use std::time::{Duration, Instant};

impl Call<'_> {
    /// The request as this endpoint gets it. `None` if its body can't be had any more.
    pub(crate) fn outgoing(
        &self,
        exchange: &Exchange,
        request: &mut Received,
        seen: &EndpointView,
        span: [u8; 8],
        now: Instant,
    ) -> Option<Box<Request<RequestBody>>> {
        request.prepare(&exchange.worker().via);
        // What is another attempt's own is written over by the next: so that only one map is ever added to, and
        // the copy that is sent need not grow.
        let headers = &mut request.parts.headers;
        exchange.record.trace.write(headers, span);
        if self.made > 1 {
            TraceContext::mark_retry(headers);
        }
        tell_time_left(headers, exchange.grpc, self.time_left(now));
        let mut parts = request.head();
        if seen.key.via != Via::Direct {
            let forward = self.plan.forward.as_deref();
            // To a gateway, and from one on, the proxy in front is named as well.
            let at = match &seen.key.via {
                Via::Gateway { .. } => &seen.id,
                Via::Proxy { .. } | Via::Direct if forward.is_some() => &seen.id,
                Via::Proxy { .. } | Via::Direct => &seen.address_text,
            };
            let target = [&*seen.key.service, "/", at].concat();
            // A DNS label and an address: always a valid value.
            if let Ok(target) = HeaderValue::try_from(target) {
                parts.headers.insert(ENDPOINT, target);
            }
            let policies = self.view.authorization.as_ref();
            if policies.is_some_and(|policies| policies.looks_at_routes)
                && let Some(route) = &exchange.record.route
                && let Ok(route) = HeaderValue::from_str(route)
            {
                parts.headers.insert(ROUTE, route);
            }
            if let Some(forward) = forward {
                forward.write(&mut parts.headers);
            }
            if self.plan.priority != Priority::Normal {
                let priority = HeaderValue::from_static(self.plan.priority.as_str());
                parts.headers.insert(PRIORITY, priority);
            }
        }
        // What the parser of requests has let through makes a head that can be sent.
        address(&mut parts, request, self.view.spec.protocol).ok()?;
        Some(Box::new(Request::from_parts(parts, exchange.intake.send()?)))
    }

    /// What the next hop has at most.
    fn time_left(&self, now: Instant) -> Option<Duration> {
        let until = self.plan.attempts_until;
        let left = until.map(|until| until.saturating_duration_since(now));
        cut(left, self.plan.attempt_timeout)
    }
}

/// Puts target and Host as the endpoint's protocol wants them (RFC 9112 §3.2.1, RFC 9113 §8.3.1).
pub(crate) fn address(
    parts: &mut request::Parts,
    request: &Received,
    protocol: Protocol,
) -> Result<(), http::Error> {
    match protocol {
        Protocol::Http1 | Protocol::Tcp => {
            if parts.uri.authority().is_some() || parts.uri.scheme().is_some() {
                let host = HeaderValue::from_str(request.authority())?;
                parts.headers.insert(header::HOST, host);
                let path = parts.uri.path_and_query().cloned();
                parts.uri = path.map_or_else(|| Uri::from_static("/"), Uri::from);
            }
            if parts.version >= Version::HTTP_2 {
                request.found.join_cookies(&mut parts.headers);
            }
            parts.version = Version::HTTP_11;
        }
        Protocol::Http2 => {
            for name in [header::HOST, header::CONNECTION, header::UPGRADE] {
                parts.headers.remove(name);
            }
            let mut target = uri::Parts::default();
            target.scheme = Some(uri::Scheme::HTTP);
            target.authority = Some(request.authority().parse::<uri::Authority>()?);
            target.path_and_query = Some(
                parts
                    .uri
                    .path_and_query()
                    .cloned()
                    .unwrap_or(uri::PathAndQuery::from_static("/")),
            );
            parts.uri = Uri::from_parts(target)?;
            parts.version = Version::HTTP_2;
        }
    }
    Ok(())
}

/// Tells the next hop how long its answer is waited for. From a second on to the millisecond: nearly all requests
/// then say the same, which HTTP/2 sends as one byte.
fn tell_time_left(headers: &mut HeaderMap, grpc: bool, left: Option<Duration>) {
    let name = if grpc { GRPC_TIMEOUT } else { TIMEOUT };
    let left = left.map(|left| match left.as_secs() {
        0 => left,
        secs => Duration::from_secs(secs) + Duration::from_millis(left.subsec_millis().into()),
    });
    match left.and_then(|left| HeaderValue::from_bytes(format(left).as_bytes()).ok()) {
        Some(left) => drop(headers.insert(name, left)),
        None => drop(headers.remove(name)),
    }
}

impl Received {
    /// Takes out what is not for the next hop, once, before the first attempt.
    fn prepare(&mut self, via: &HeaderValue) {
        if !std::mem::replace(&mut self.prepared, true) {
            self.found.strip(&mut self.parts.headers, self.upgrade.is_some());
            self.parts.headers.append(header::VIA, via.clone());
        }
    }

    /// A copy of the head, for one attempt.
    pub(crate) fn head(&self) -> request::Parts {
        let (mut parts, ()) = Request::new(()).into_parts();
        parts.method = self.parts.method.clone();
        parts.uri = self.parts.uri.clone();
        parts.version = self.parts.version;
        parts.headers = self.parts.headers.clone();
        parts
    }
}

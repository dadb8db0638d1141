//! Outgoing: the request as an endpoint gets it.

use crate::admit::Received;
use crate::attempts::Call;
use crate::body::RequestBody;
use crate::exchange::Exchange;
use crate::headers::{ENDPOINT, GRPC_TIMEOUT, PRIORITY, TIMEOUT};
use http::{HeaderName, HeaderValue, Request, Uri, Version, header, request, uri};
use leeward_policy::model::{Priority, Protocol};
use leeward_policy::{EndpointView, Via};
use leeward_resilience::deadline::{cut, format};
use leeward_telemetry::TraceContext;
use std::time::{Duration, Instant};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

impl Call<'_> {
    /// The request as this endpoint gets it. `None` if its body can't be had any more.
    pub(crate) fn outgoing(
        &self,
        exchange: &Exchange,
        request: &mut Received,
        seen: &EndpointView,
        span: [u8; 8],
        now: Instant,
    ) -> Option<Request<RequestBody>> {
        let left = self.time_left(now);
        let timeout = if exchange.grpc { GRPC_TIMEOUT } else { TIMEOUT };
        let mut parts = request.head(&exchange.worker().via, left.map(|_| &timeout));
        exchange.record.trace.write(&mut parts.headers, span);
        if self.made > 1 {
            TraceContext::mark_retry(&mut parts.headers);
        }
        if let Via::Proxy { .. } = seen.key.via {
            let target = format!("{}/{}", seen.key.service, seen.address_text);
            // A DNS label and an address: always a valid value.
            if let Ok(target) = HeaderValue::try_from(target) {
                parts.headers.insert(ENDPOINT, target);
            }
            if self.plan.priority != Priority::Normal {
                let priority = HeaderValue::from_static(self.plan.priority.as_str());
                parts.headers.insert(PRIORITY, priority);
            }
        }
        // Tells the next hop how long its answer is waited for.
        let left = left.and_then(|left| HeaderValue::try_from(format(left)).ok());
        if let Some(left) = left {
            parts.headers.insert(timeout, left);
        }
        // What the parser of requests has let through makes a head that can be sent.
        address(&mut parts, request, self.view.spec.protocol).ok()?;
        Some(Request::from_parts(parts, exchange.intake.send()?))
    }

    /// What the next hop has at most.
    fn time_left(&self, now: Instant) -> Option<Duration> {
        let until = self.plan.attempts_until;
        let left = until.map(|until| until.saturating_duration_since(now));
        cut(left, self.plan.attempt_timeout)
    }
}

/// Puts target and Host as the endpoint's protocol wants them (RFC 9112 §3.2.1, RFC 9113 §8.3.1).
fn address(parts: &mut request::Parts, request: &Received, protocol: Protocol) -> Result<(), http::Error> {
    match protocol {
        Protocol::Http1 => {
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

impl Received {
    /// A copy of the head, for one attempt. What is not for the next hop is taken out once, at the first.
    fn head(&mut self, via: &HeaderValue, timeout: Option<&HeaderName>) -> request::Parts {
        if !self.prepared {
            self.prepared = true;
            self.found.strip(&mut self.parts.headers, self.upgrade.is_some());
            self.parts.headers.append(header::VIA, via.clone());
            // Places for the attempt's own, so that no copy has to grow.
            for name in [Some(&TRACEPARENT), timeout].into_iter().flatten() {
                let empty = HeaderValue::from_static("");
                self.parts.headers.entry(name).or_insert(empty);
            }
        }
        let (mut parts, ()) = Request::new(()).into_parts();
        parts.method = self.parts.method.clone();
        parts.uri = self.parts.uri.clone();
        parts.version = self.parts.version;
        parts.headers = self.parts.headers.clone();
        parts
    }
}

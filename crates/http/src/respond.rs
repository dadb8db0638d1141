//! Respond: what the client sees, whatever happened.

use crate::body::ResponseBody;
use crate::exchange::Exchange;
use crate::failure::{Answer, Failure, answer};
use crate::headers::{DEGRADED, LIMIT, REASON, strip_response};
use crate::upgrade::{Beyond, tunnel};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version, header};
use hyper::upgrade::OnUpgrade;
use leeward_telemetry::{Outcome as Told, Reason};
use leeward_upstream::IncomingBody;

/// How a request ended.
pub(crate) enum Outcome {
    /// The service answered; with the client's half of a change of protocol, if it asked for one.
    Served(Response<IncomingBody>, Option<OnUpgrade>),
    /// Another service answered in its place.
    Rerouted(Response<IncomingBody>),
    /// A fallback answered.
    Fallback(Own),
    /// An answer that this proxy had or knew, as good as one of the service's; or, told so, in place of one.
    Local(Response<Bytes>, Told),
    /// Nothing did.
    Failed(Failure),
}

/// An answer of the proxy's own making.
pub(crate) struct Own {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, Vec<u8>)>,
    pub(crate) body: Bytes,
}

impl Own {
    /// As an HTTP response; what isn't valid HTTP is left out (the parser of policy and the plugin host have
    /// both refused it before).
    pub(crate) fn into_response(self) -> Response<Bytes> {
        let mut response = Response::new(self.body);
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        for (name, value) in self.headers {
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                response.headers_mut().append(name, value);
            }
        }
        response
    }
}

/// Makes the response, and gives it the exchange to end.
pub(crate) fn respond(mut exchange: Box<Exchange>, outcome: Outcome) -> Response<ResponseBody> {
    let alt_svc = exchange.alt_svc();
    let mut response = match outcome {
        Outcome::Served(mut upstream, upgrade) => {
            if upstream.status() == StatusCode::SWITCHING_PROTOCOLS
                && let Some(client) = upgrade
            {
                return switch(exchange, upstream, client);
            }
            pass(&mut exchange, &mut upstream, Told::Served);
            hand_cookie(&mut exchange, upstream.headers_mut());
            upstream.map(|body| ResponseBody::upstream(body, exchange))
        }
        Outcome::Rerouted(mut upstream) => {
            pass(&mut exchange, &mut upstream, Told::Degraded);
            mark_degraded(&exchange, upstream.headers_mut());
            upstream.map(|body| ResponseBody::upstream(body, exchange))
        }
        Outcome::Fallback(own) => {
            let mut response = own.into_response();
            mark_degraded(&exchange, response.headers_mut());
            tell(&mut exchange, Told::Degraded, response.status());
            closing(&exchange, response.headers_mut(), false);
            end_with(response, exchange)
        }
        Outcome::Local(mut response, told) => {
            if told == Told::Degraded {
                mark_degraded(&exchange, response.headers_mut());
            }
            tell(&mut exchange, told, response.status());
            closing(&exchange, response.headers_mut(), false);
            end_with(response, exchange)
        }
        Outcome::Failed(failure) => fail(exchange, &failure),
    };
    if let Some(alt_svc) = alt_svc {
        // What a workload says of its own other ways is nothing for clients of this one.
        response.headers_mut().insert(header::ALT_SVC, alt_svc);
    }
    *response.version_mut() = Version::HTTP_11;
    response
}

/// An answer of this proxy's, as a response that ends the exchange. One to HEAD has no body, and hyper leaves it to us
/// in HTTP/2 to see to that (RFC 9110 §9.3.2).
fn end_with(mut response: Response<Bytes>, exchange: Box<Exchange>) -> Response<ResponseBody> {
    if exchange.record.method == Method::HEAD && !response.body().is_empty() {
        let length = HeaderValue::from(response.body().len());
        response
            .headers_mut()
            .entry(header::CONTENT_LENGTH)
            .or_insert(length);
        *response.body_mut() = Bytes::new();
    }
    response.map(|body| ResponseBody::own(body, exchange))
}

/// The cookie that names an endpoint, for a client that had none.
fn hand_cookie(exchange: &mut Exchange, headers: &mut HeaderMap) {
    if let Some(cookie) = exchange.cookie.take() {
        headers.append(header::SET_COOKIE, cookie);
    }
}

/// An upstream's answer on its way through.
fn pass(exchange: &mut Exchange, upstream: &mut Response<IncomingBody>, told: Told) {
    strip_response(upstream.headers_mut(), exchange.from_peer);
    tell(exchange, told, upstream.status());
    if told == Told::Served && upstream.status().is_server_error() {
        exchange.record.outcome = Told::Failed;
        exchange.record.reason = Reason::UpstreamStatus;
    }
    closing(exchange, upstream.headers_mut(), false);
}

fn tell(exchange: &mut Exchange, told: Told, status: StatusCode) {
    exchange.record.outcome = told;
    exchange.record.status = status.as_u16();
}

/// Asks an HTTP/1.1 client to close after this answer (hyper does not write the field in HTTP/2, where
/// GOAWAY says it).
fn closing(exchange: &Exchange, headers: &mut HeaderMap, must: bool) {
    if exchange.http1
        && (must || exchange.close || exchange.worker().is_draining() || exchange.client_is_leaving())
    {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
}

/// What caches of some kinds obey in place of Cache-Control (RFC 9213, and Edge Architecture's older field).
const TARGETED: [HeaderName; 2] = [
    HeaderName::from_static("cdn-cache-control"),
    HeaderName::from_static("surrogate-control"),
];

fn mark_degraded(exchange: &Exchange, headers: &mut HeaderMap) {
    // A degraded answer must not be taken for a good one later, whatever it says itself.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.remove(header::EXPIRES);
    for name in TARGETED {
        headers.remove(name);
    }
    if exchange.hide_degraded {
        return;
    }
    let rung = exchange
        .record
        .fallback
        .as_deref()
        .and_then(|rung| HeaderValue::from_str(rung).ok());
    if let Some(rung) = rung {
        headers.insert(DEGRADED, rung);
    }
}

fn fail(mut exchange: Box<Exchange>, failure: &Failure) -> Response<ResponseBody> {
    let Answer {
        status,
        grpc_status,
        reason,
        close,
    } = answer(failure);
    // The cause is what policy goes by; the reason is for people.
    let reason = match exchange.unconnected {
        Some(why) if reason == Reason::ConnectFailure => why,
        Some(_) | None => reason,
    };
    tracing::debug!(reason = reason.as_str(), %failure, "request failed");
    let mut response = Response::new(Bytes::new());
    let headers = response.headers_mut();
    headers.insert(REASON, HeaderValue::from_static(reason.as_str()));
    if let Some(limit) = exchange.record.limit {
        headers.insert(LIMIT, HeaderValue::from_static(limit));
    }
    if let Some(wait) = exchange.retry_after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs()));
    }
    if exchange.grpc {
        // gRPC tells failures in trailers, here at once with the head ("trailers-only").
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(u16::from(grpc_status)));
        headers.insert("grpc-message", HeaderValue::from_static(reason.as_str()));
    } else {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        *response.body_mut() = format!("{failure}\n").into();
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    }
    closing(&exchange, response.headers_mut(), close);
    exchange.record.outcome = Told::Failed;
    exchange.record.reason = reason;
    exchange.record.status = status;
    end_with(response, exchange)
}

/// The protocol changes: from here on bytes pass unread.
fn switch(
    mut exchange: Box<Exchange>,
    upstream: Response<IncomingBody>,
    client: OnUpgrade,
) -> Response<ResponseBody> {
    let protocol = upstream.headers().get(header::UPGRADE).cloned();
    let (mut parts, far) = Beyond::of(upstream);
    strip_response(&mut parts.headers, exchange.from_peer);
    parts
        .headers
        .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        parts.headers.insert(header::UPGRADE, protocol);
    }
    tell(&mut exchange, Told::Served, StatusCode::SWITCHING_PROTOCOLS);
    tunnel(exchange, client, far);
    Response::from_parts(parts, ResponseBody::none())
}

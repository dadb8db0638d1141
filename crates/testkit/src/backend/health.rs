//! How a backend answers health checks, whatever it does with requests.

use crate::body::{Body, bytes_body, empty_body};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Whether it says that it is well.
#[derive(Debug, Default)]
pub(super) struct Health {
    unwell: AtomicBool,
    checks: AtomicU64,
}

/// `HealthCheckResponse`s as gRPC messages: no compression, two bytes, field 1 as a varint.
const SERVING: &[u8] = &[0, 0, 0, 0, 2, 8, 1];
const NOT_SERVING: &[u8] = &[0, 0, 0, 0, 2, 8, 2];

impl Health {
    pub(super) fn set(&self, healthy: bool) {
        self.unwell.store(!healthy, Ordering::Relaxed);
    }

    pub(super) fn checks(&self) -> u64 {
        self.checks.load(Ordering::Relaxed)
    }

    /// The answer to a health check. `None` for what is none.
    pub(super) fn answer<B>(&self, request: &Request<B>) -> Option<Response<Body>> {
        let answer: fn(bool) -> Response<Body> = match request.uri().path() {
            "/healthz" => over_http,
            "/grpc.health.v1.Health/Check" => over_grpc,
            _ => return None,
        };
        self.checks.fetch_add(1, Ordering::Relaxed);
        Some(answer(!self.unwell.load(Ordering::Relaxed)))
    }
}

fn over_http(healthy: bool) -> Response<Body> {
    let mut response = Response::new(empty_body());
    if !healthy {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

fn over_grpc(healthy: bool) -> Response<Body> {
    let message = Bytes::from_static(if healthy { SERVING } else { NOT_SERVING });
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let body = bytes_body(message).with_trailers(async { Some(Ok(trailers)) });
    let mut response = Response::new(body.boxed_unsync());
    let grpc = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(header::CONTENT_TYPE, grpc);
    response
}

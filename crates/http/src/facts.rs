//! Facts: a request as plugins see it.

use crate::admit::Received;
use crate::cached::wall;
use crate::exchange::Exchange;
use crate::flags::Targeted;
use crate::headers::{MAX_DEPTH, PLUGIN_DEPTH, strip_ours};
use crate::route::lower_case;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Uri, Version, header};
use leeward_flags::FlagSet;
use leeward_policy::model::Cause;
use leeward_policy::{FlagsInForce, Levels, PluginView, Snapshot};
use leeward_telemetry::Peer;
use leeward_wasm::{Authority, Facts, FlagValue, Flags, RequestHead};
use serde_json::Value;
use std::sync::Arc;

/// What plugins are told of a request, whichever they are.
pub(crate) fn facts(exchange: &Exchange, request: &Received, config: &Arc<str>, view: &PluginView) -> Facts {
    let record = &exchange.record;
    let worker = exchange.worker();
    let none = || Arc::from("");
    Facts {
        service: record.service.clone().unwrap_or_else(none),
        route: exchange.rule_id.clone().unwrap_or_else(none),
        route_name: record.route.clone(),
        zone: Arc::clone(&worker.zone),
        proxy: Arc::clone(&worker.proxy),
        peer: record.peer.identity.clone(),
        address: Some(record.peer.address),
        protocol: protocol(record.version),
        config: Arc::clone(config),
        deadline: exchange.deadline,
        began: record.started,
        flags: worker.evaluator(&exchange.snapshot),
        origin: if view.spec.access.services.is_empty() {
            Arc::clone(&worker.no_origin)
        } else {
            Arc::new(origin(exchange, &request.parts.headers))
        },
    }
}

const fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2",
        Version::HTTP_3 => "HTTP/3",
        _ => "HTTP/1.1",
    }
}

/// What makes a plugin's calls part of the request: its trace, the proxies that it passed, and how deep in plugins'
/// calls it is.
fn origin(exchange: &Exchange, headers: &HeaderMap) -> HeaderMap {
    let mut origin = HeaderMap::with_capacity(4);
    let trace = &exchange.record.trace;
    trace.write(&mut origin, trace.span_id);
    for via in headers.get_all(header::VIA) {
        origin.append(header::VIA, via.clone());
    }
    origin.insert(PLUGIN_DEPTH, HeaderValue::from(depth(headers).saturating_add(1)));
    origin
}

/// How deep in plugins' calls a request is.
pub(crate) fn depth(headers: &HeaderMap) -> u16 {
    let said = headers.get(PLUGIN_DEPTH);
    said.and_then(|depth| depth.to_str().ok()?.parse().ok())
        .map_or(0, |depth: u16| depth.min(MAX_DEPTH))
}

/// Takes a request's head, for a filter to have; [`put_back`] gives it back.
pub(crate) fn take_head(request: &mut Received) -> RequestHead {
    let headers = std::mem::take(&mut request.parts.headers);
    head_with(request, headers)
}

/// A copy of a request's head, without what an attempt tells the next proxy.
pub(crate) fn head_of(request: &Received) -> RequestHead {
    let mut headers = request.parts.headers.clone();
    strip_ours(&mut headers);
    headers.remove(PLUGIN_DEPTH);
    head_with(request, headers)
}

fn head_with(request: &Received, headers: HeaderMap) -> RequestHead {
    let authority = match request.parts.uri.authority() {
        Some(authority) => Authority::Target(authority.clone()),
        None => headers
            .get(header::HOST)
            .map_or_else(|| Authority::from(""), |host| Authority::Field(host.clone())),
    };
    RequestHead {
        method: request.parts.method.clone(),
        scheme: "http",
        authority,
        path: path_of(&request.parts.uri),
        headers,
    }
}

fn path_of(uri: &Uri) -> PathAndQuery {
    let path = uri.path_and_query().cloned();
    path.unwrap_or(PathAndQuery::from_static("/"))
}

/// Gives a request its head again. What a filter may change of it is path and fields.
pub(crate) fn put_back(request: &mut Received, head: RequestHead) {
    request.parts.headers = head.headers;
    if request.parts.uri.path_and_query() != Some(&head.path) {
        let mut parts = std::mem::take(&mut request.parts.uri).into_parts();
        parts.path_and_query = Some(head.path);
        // Scheme and authority are as they were, and the path is one.
        request.parts.uri = Uri::from_parts(parts).unwrap_or_default();
    }
}

/// Evaluates flags for plugins. What doesn't change from request to request is made once, since few plugins ask.
pub(crate) struct Evaluator {
    snapshot: Arc<Snapshot>,
    levels: Arc<Levels>,
    file: Option<Arc<FlagSet>>,
}

impl Evaluator {
    pub(crate) fn new(snapshot: &Arc<Snapshot>, levels: &Arc<Levels>, file: Option<&Arc<FlagSet>>) -> Self {
        Self {
            snapshot: Arc::clone(snapshot),
            levels: Arc::clone(levels),
            file: file.map(Arc::clone),
        }
    }

    /// Whether these are what it evaluates by.
    pub(crate) fn is_of(
        &self,
        snapshot: &Arc<Snapshot>,
        levels: &Arc<Levels>,
        file: Option<&Arc<FlagSet>>,
    ) -> bool {
        let same_file = match (&self.file, file) {
            (Some(own), Some(file)) => Arc::ptr_eq(own, file),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        same_file && Arc::ptr_eq(&self.snapshot, snapshot) && Arc::ptr_eq(&self.levels, levels)
    }
}

impl Flags for Evaluator {
    fn value(&self, key: &str, facts: &Facts, head: &RequestHead, cause: Option<Cause>) -> Option<FlagValue> {
        let flags = FlagsInForce {
            levels: &self.levels,
            file: self.file.as_deref(),
            policy: self.snapshot.flags(),
        };
        let authority = &*head.authority;
        let host = authority
            .rsplit_once(':')
            .filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()))
            .map_or(authority, |(host, _)| host);
        let peer = Peer {
            // Each request of the proxy's has one.
            address: facts.address?,
            identity: facts.peer.clone(),
        };
        let about = Targeted {
            viewer: &self.snapshot.viewer,
            method: &head.method,
            path: head.path.path(),
            headers: &head.headers,
            peer: &peer,
            host: &lower_case(host),
            route: facts.route_name.as_deref(),
            cause,
            key_header: None,
        };
        let resolved = flags.evaluate(key, &about, wall());
        Some(match resolved.evaluation.value? {
            Value::Bool(value) => FlagValue::Boolean(*value),
            Value::String(value) => FlagValue::Text(value.clone()),
            Value::Number(value) => FlagValue::Number(value.as_f64()?),
            value @ (Value::Object(_) | Value::Array(_)) => FlagValue::Structure(value.to_string()),
            Value::Null => return None,
        })
    }
}

impl std::fmt::Debug for Evaluator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Evaluator")
            .field("file", &self.file.is_some())
            .finish_non_exhaustive()
    }
}

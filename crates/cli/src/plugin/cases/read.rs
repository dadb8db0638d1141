//! From YAML to cases. What is wrong is told with its line, its case, its field, and what would be right.

use super::expect::expect;
use super::{Behind, Canned, Case, Context, Failed, Message, Request, Setup};
use crate::output::Failure;
use crate::yaml::{self, Bad, Node};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use leeward_policy::Name;
use leeward_policy::model::{Cause, PluginKind, PluginLimits};
use leeward_wasm::{CallAttempt, CallError, FlagValue, KeptAnswer, Reply, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Cases in a file.
const MAX_CASES: usize = 1000;
/// Time for one call, where a case doesn't say: tests are for what a plugin does, on machines that are busy with other
/// things. How long it took is told.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Time until the request's deadline, where a case doesn't say.
const TIME_LEFT: Duration = Duration::from_secs(10);
/// The largest body that is handed over, where a case doesn't say.
const MAX_BODY: u64 = 1 << 20;

/// The module that a file of cases names, if it names one.
pub(crate) fn module_of(file: &Path) -> Result<Option<PathBuf>, Failure> {
    let module = yaml::read(file, |root| {
        let [module, ..] = top(root)?;
        module.map(|module| module.text()).transpose()
    })?;
    Ok(module.map(|module| file.parent().unwrap_or_else(|| Path::new("")).join(module)))
}

/// Reads the cases of a file, for a plugin of a kind.
pub(crate) fn read(file: &Path, kind: PluginKind) -> Result<Vec<Case>, Failure> {
    yaml::read(file, |root| cases(root, kind))
}

/// What a plugin is asked with where requests come from outside: as the first case has it, with the answers of all.
pub(crate) fn for_serving(cases: &[Case], kind: PluginKind) -> Case {
    let mut case = cases.first().cloned().unwrap_or_else(|| Case::plain(kind));
    case.calls = cases.iter().flat_map(|case| &case.calls).cloned().collect();
    case.response = Behind::Echo;
    case.store = Vec::new();
    case.expect = super::Expect::default();
    case
}

fn top<'a>(root: &Node<'a>) -> Result<[Option<Node<'a>>; 7], Bad> {
    root.fields([
        "module", "config", "limits", "services", "imports", "context", "cases",
    ])
}

pub(super) fn cases(root: &Node<'_>, kind: PluginKind) -> Result<Vec<Case>, Bad> {
    let [_, config, limits, services, imports, context, list] = top(root)?;
    let mut setup = Setup::of(kind);
    set_up(&mut setup, [config, limits, services])?;
    if let Some(imports) = imports {
        setup.imports = imports.texts()?.into_iter().map(Into::into).collect();
    }
    let common = in_context(&Context::usual(), context)?;
    let list = list.ok_or_else(|| root.bad("want cases, a list"))?;
    let nodes = list.list()?;
    if nodes.is_empty() || nodes.len() > MAX_CASES {
        return Err(list.bad(&format!("want 1 to {MAX_CASES} cases, not {}", nodes.len())));
    }
    let mut names = BTreeSet::new();
    let mut cases = Vec::with_capacity(nodes.len());
    for node in &nodes {
        let case = case(node, kind, &setup, &common)?;
        if !names.insert(case.name.clone()) {
            return Err(node.bad(&format!("a second case is called {:?}", case.name)));
        }
        cases.push(case);
    }
    Ok(cases)
}

/// Which fields a case has.
const FIELDS: [&str; 13] = [
    "name", "config", "limits", "services", "context", "request", "response", "failure", "backends", "flags",
    "store", "calls", "expect",
];

fn case(node: &Node<'_>, kind: PluginKind, setup: &Setup, common: &Context) -> Result<Case, Bad> {
    let [name, ..] = node.fields(FIELDS)?;
    let name = name.ok_or_else(|| node.bad("want a name"))?.text()?;
    if name.is_empty() || name.chars().any(char::is_control) {
        return Err(node.bad("want a name of one line"));
    }
    named(&node.as_root(), &name, kind, setup, common)
        .map_err(|(line, why)| (line, format!("case {name:?}: {why}")))
}

fn named(
    node: &Node<'_>,
    name: &str,
    kind: PluginKind,
    setup: &Setup,
    common: &Context,
) -> Result<Case, Bad> {
    let [
        _,
        config,
        limits,
        services,
        context,
        request,
        response,
        failure,
        backends,
        flags,
        store,
        calls,
        wanted,
    ] = node.fields(FIELDS)?;
    for (given, fits, what) in [
        (&failure, kind.is_rung(), "fallbacks and wasi:http applications"),
        (&response, kind.is_filter(), "filters"),
        (&backends, kind == PluginKind::Router, "routers"),
    ] {
        if let Some(given) = given.as_ref().filter(|_| !fits) {
            return Err(given.bad(&format!(
                "is for {what}; this module is of kind {}",
                kind.as_str()
            )));
        }
    }
    let mut setup = setup.clone();
    set_up(&mut setup, [config, limits, services])?;
    let wanted = wanted.ok_or_else(|| node.bad("want expect, a mapping"))?;
    Ok(Case {
        name: name.to_owned(),
        request: incoming(request)?,
        context: in_context(common, context)?,
        response: match response {
            Some(node) => Behind::Answer(message(&node)?),
            None => Behind::Answer(Message::empty(StatusCode::OK)),
        },
        failure: failed(failure)?,
        backends: match backends {
            Some(node) => targets(&node)?,
            None if kind == PluginKind::Router => return Err(node.bad("want backends, a list")),
            None => Vec::new(),
        },
        flags: flags.map_or_else(|| Ok(BTreeMap::new()), |node| flag_values(&node))?,
        store: stored(store)?,
        calls: canned(calls, &setup)?,
        expect: expect(&wanted, kind)?,
        setup,
    })
}

fn set_up(setup: &mut Setup, [config, limits, services]: [Option<Node<'_>>; 3]) -> Result<(), Bad> {
    if let Some(config) = config {
        setup.config = text_or_json(&config)?;
    }
    if let Some(services) = services {
        setup.services = Vec::new();
        for node in services.list()? {
            let name = node.text()?;
            let name = Name::parse(&name).map_err(|error| node.bad(&error.to_string()))?;
            setup.services.push(name);
        }
    }
    if let Some(limits) = limits {
        set_limits(&mut setup.limits, &limits)?;
    }
    Ok(())
}

fn set_limits(limits: &mut PluginLimits, node: &Node<'_>) -> Result<(), Bad> {
    let [
        memory,
        call_timeout,
        max_body,
        max_calls,
        log_lines,
        store_bytes,
        store_entries,
        table_elements,
    ] = node.fields([
        "memory",
        "callTimeout",
        "maxBody",
        "maxCalls",
        "logLines",
        "storeBytes",
        "storeEntries",
        "tableElements",
    ])?;
    let size = |node: Option<Node<'_>>, to: &mut u64| {
        if let Some(node) = node {
            *to = node.size()?;
        }
        Ok(())
    };
    size(memory, &mut limits.memory_bytes)?;
    size(max_body, &mut limits.max_body_bytes)?;
    size(store_bytes, &mut limits.store_bytes)?;
    let number = |node: Option<Node<'_>>, to: &mut u32| {
        if let Some(node) = node {
            *to = node.number(0, 10_000_000)?;
        }
        Ok(())
    };
    number(max_calls, &mut limits.max_calls)?;
    number(log_lines, &mut limits.log_lines)?;
    number(store_entries, &mut limits.store_entries)?;
    number(table_elements, &mut limits.table_elements)?;
    if let Some(node) = call_timeout {
        limits.call_timeout = node.duration()?;
    }
    Ok(())
}

fn in_context(common: &Context, node: Option<Node<'_>>) -> Result<Context, Bad> {
    let mut context = common.clone();
    let Some(node) = node else { return Ok(context) };
    let [service, route, zone, peer, address, time_left] =
        node.fields(["service", "route", "zone", "peer", "address", "timeLeft"])?;
    for (node, to) in [
        (service, &mut context.service),
        (route, &mut context.route),
        (zone, &mut context.zone),
    ] {
        if let Some(node) = node {
            *to = node.text()?;
        }
    }
    if let Some(node) = peer {
        context.peer = if node.is_null() { None } else { Some(node.text()?) };
    }
    if let Some(node) = address {
        let address = node.text()?.parse();
        context.address = Some(address.map_err(|_| node.bad("want IP:PORT, such as 10.0.0.9:4000"))?);
    }
    if let Some(node) = time_left {
        context.time_left = node.duration()?;
    }
    Ok(context)
}

fn incoming(node: Option<Node<'_>>) -> Result<Request, Bad> {
    let mut request = Request::usual();
    let Some(node) = node else { return Ok(request) };
    let [method, scheme, authority, path, headers, body, json] =
        node.fields(["method", "scheme", "authority", "path", "headers", "body", "json"])?;
    if let Some(node) = method {
        request.method = a_method(&node)?;
    }
    if let Some(node) = scheme {
        request.scheme = node.one_of([("http".to_owned(), "http"), ("https".to_owned(), "https")])?;
    }
    if let Some(node) = authority {
        request.authority = node.text()?;
    }
    if let Some(node) = path {
        let text = node.text()?;
        let path = text.parse().ok().filter(|_| text.starts_with('/'));
        request.path =
            path.ok_or_else(|| node.bad(&format!("{text:?} is no path; want one that begins with /")))?;
    }
    if let Some(node) = headers {
        request.headers = fields_of(&node)?;
    }
    request.body = body_of(body, json)?;
    Ok(request)
}

pub(super) fn a_method(node: &Node<'_>) -> Result<Method, Bad> {
    let text = node.text()?;
    text.parse()
        .map_err(|_| node.bad(&format!("{text:?} is no method; want one such as GET")))
}

fn message(node: &Node<'_>) -> Result<Message, Bad> {
    let [status, headers, body, json] = node.fields(["status", "headers", "body", "json"])?;
    message_of([status, headers, body, json])
}

fn message_of([status, headers, body, json]: [Option<Node<'_>>; 4]) -> Result<Message, Bad> {
    let mut message = Message::empty(StatusCode::OK);
    if let Some(node) = status {
        message.status = a_status(&node)?;
    }
    if let Some(node) = headers {
        message.headers = fields_of(&node)?;
    }
    message.body = body_of(body, json)?;
    Ok(message)
}

pub(super) fn a_status(node: &Node<'_>) -> Result<StatusCode, Bad> {
    let status = node.number(200, 599)?;
    let status = u16::try_from(status)
        .ok()
        .and_then(|s| StatusCode::from_u16(s).ok());
    status.ok_or_else(|| node.bad("want a status from 200 to 599"))
}

/// The pieces of a body: a text, a list of texts, or JSON.
fn body_of(body: Option<Node<'_>>, json: Option<Node<'_>>) -> Result<Vec<Bytes>, Bad> {
    match (body, json) {
        (None, None) => Ok(Vec::new()),
        (Some(body), None) => Ok(body.texts()?.into_iter().map(Bytes::from).collect()),
        (None, Some(json)) => Ok(vec![json.json()?.to_string().into()]),
        (Some(body), Some(_)) => Err(body.bad("there is json, too; want one of them")),
    }
}

/// Header fields: a text, or a list of texts, by name.
fn fields_of(node: &Node<'_>) -> Result<HeaderMap, Bad> {
    let mut headers = HeaderMap::new();
    for (name, node) in node.map()? {
        let parsed: HeaderName = name
            .parse()
            .map_err(|_| node.bad(&format!("{name:?} is no name of a field")))?;
        for text in node.texts()? {
            let value = HeaderValue::from_bytes(text.as_bytes())
                .map_err(|_| node.bad(&format!("{text:?} is no value of a field")))?;
            headers.append(&parsed, value);
        }
    }
    Ok(headers)
}

pub(super) fn text_or_json(node: &Node<'_>) -> Result<String, Bad> {
    let json = node.json()?;
    Ok(json.as_str().map_or_else(|| json.to_string(), ToOwned::to_owned))
}

/// A word as the WIT and policy write it: `ConnectFailure`.
fn camel(word: &str) -> String {
    let mut out = String::with_capacity(word.len());
    for part in word.split('_') {
        let mut chars = part.chars();
        out.extend(chars.next().map(|first| first.to_ascii_uppercase()));
        out.push_str(chars.as_str());
    }
    out
}

fn a_cause(node: &Node<'_>) -> Result<Cause, Bad> {
    node.one_of(Cause::ALL.map(|cause| (camel(cause.as_str()), cause)))
}

fn failed(node: Option<Node<'_>>) -> Result<Failed, Bad> {
    let mut failed = Failed::usual();
    let Some(node) = node else { return Ok(failed) };
    let [cause, attempts, stale] = node.fields(["cause", "attempts", "stale"])?;
    if let Some(node) = cause {
        failed.cause = a_cause(&node)?;
    }
    for node in attempts.map_or_else(|| Ok(Vec::new()), |node| node.list())? {
        failed.attempts.push(attempt(&node)?);
    }
    if let Some(node) = stale {
        let [status, headers, body, json, age, fresh] =
            node.fields(["status", "headers", "body", "json", "age", "fresh"])?;
        let message = message_of([status, headers, body, json])?;
        let duration = |node: Option<Node<'_>>, or| node.map_or(Ok(or), |node| node.duration());
        failed.kept = Some(KeptAnswer {
            reply: Reply {
                status: message.status,
                headers: message.headers,
                body: message.body.concat().into(),
                grpc_status: None,
            },
            age: duration(age, Duration::from_secs(60))?,
            fresh: duration(fresh, Duration::from_secs(30))?,
        });
    }
    Ok(failed)
}

fn attempt(node: &Node<'_>) -> Result<CallAttempt, Bad> {
    let [endpoint, zone, status, cause, duration] =
        node.fields(["endpoint", "zone", "status", "cause", "duration"])?;
    let text = |node: Option<Node<'_>>, or: &str| node.map_or_else(|| Ok(or.to_owned()), |node| node.text());
    Ok(CallAttempt {
        endpoint: text(endpoint, "10.0.0.1:8080")?.into(),
        zone: text(zone, "a")?.into(),
        status: status
            .map(|node| a_status(&node))
            .transpose()?
            .map(|s| s.as_u16()),
        cause: cause.map(|node| a_cause(&node)).transpose()?,
        duration: duration.map_or(Ok(Duration::from_millis(1)), |node| node.duration())?,
    })
}

fn targets(node: &Node<'_>) -> Result<Vec<Target>, Bad> {
    let mut targets = Vec::new();
    for node in node.list()? {
        let [service, weight, healthy, endpoints, circuit_open, under_way] = node.fields([
            "service",
            "weight",
            "healthy",
            "endpoints",
            "circuitOpen",
            "underWay",
        ])?;
        let number = |node: Option<Node<'_>>, or| node.map_or(Ok(or), |node| node.number(0, u32::MAX));
        let endpoints = number(endpoints, 1)?;
        targets.push(Target {
            service: service.ok_or_else(|| node.bad("want a service"))?.text()?.into(),
            weight: number(weight, 1)?,
            healthy: number(healthy, endpoints)?,
            endpoints,
            circuit_open: circuit_open.map_or(Ok(false), |node| node.boolean())?,
            under_way: number(under_way, 0)?,
        });
    }
    Ok(targets)
}

fn flag_values(node: &Node<'_>) -> Result<BTreeMap<String, FlagValue>, Bad> {
    let entries = node.map()?.into_iter();
    let values = entries.map(|(key, node)| {
        let value = match node.json()? {
            serde_json::Value::Bool(truth) => FlagValue::Boolean(truth),
            serde_json::Value::String(text) => FlagValue::Text(text),
            serde_json::Value::Number(number) => FlagValue::Number(number.as_f64().unwrap_or(f64::NAN)),
            other @ (serde_json::Value::Object(_) | serde_json::Value::Array(_)) => {
                FlagValue::Structure(other.to_string())
            }
            serde_json::Value::Null => {
                return Err(node.bad("want a value; leave out a flag that isn't there"));
            }
        };
        Ok((key, value))
    });
    values.collect()
}

fn stored(node: Option<Node<'_>>) -> Result<Vec<(String, Bytes)>, Bad> {
    let Some(node) = node else { return Ok(Vec::new()) };
    let entries = node.map()?.into_iter();
    entries
        .map(|(key, node)| Ok((key, text_or_json(&node)?.into())))
        .collect()
}

/// Words for what keeps a call from its answer.
const ERRORS: [(&str, CallError); 4] = [
    ("Timeout", CallError::Timeout),
    ("Failed", CallError::Failed),
    ("Loop", CallError::Loop),
    ("TooLarge", CallError::TooLarge),
];

fn canned(node: Option<Node<'_>>, setup: &Setup) -> Result<Vec<Canned>, Bad> {
    let Some(node) = node else { return Ok(Vec::new()) };
    let mut calls = Vec::new();
    for node in node.list()? {
        let [service, method, path, delay, error, status, headers, body, json] = node.fields([
            "service", "method", "path", "delay", "error", "status", "headers", "body", "json",
        ])?;
        let service = service.ok_or_else(|| node.bad("want a service"))?;
        let name = service.text()?;
        if !setup.services.iter().any(|known| known.as_str() == name) {
            return Err(service.bad(&format!(
                "the plugin may not call {name:?}; want services: [{name}] beside config, as Plugin.access.services has it"
            )));
        }
        calls.push(Canned {
            service: name,
            method: method.map(|node| a_method(&node)).transpose()?,
            path: path.map(|node| node.text()).transpose()?,
            delay: delay.map_or(Ok(Duration::ZERO), |node| node.duration())?,
            answer: match error {
                Some(node) => Err(node.one_of(ERRORS.map(|(word, error)| (word.to_owned(), error)))?),
                None => Ok(message_of([status, headers, body, json])?),
            },
        });
    }
    Ok(calls)
}

impl Setup {
    fn of(kind: PluginKind) -> Self {
        Self {
            config: String::new(),
            limits: PluginLimits {
                call_timeout: CALL_TIMEOUT,
                max_body_bytes: MAX_BODY,
                ..PluginLimits::of(kind)
            },
            services: Vec::new(),
            imports: Vec::new(),
        }
    }
}

impl Case {
    /// One of which nothing was said.
    fn plain(kind: PluginKind) -> Self {
        Self {
            name: String::new(),
            setup: Setup::of(kind),
            request: Request::usual(),
            context: Context::usual(),
            response: Behind::Echo,
            failure: Failed::usual(),
            backends: Vec::new(),
            flags: BTreeMap::new(),
            store: Vec::new(),
            calls: Vec::new(),
            expect: super::Expect::default(),
        }
    }
}

impl Request {
    fn usual() -> Self {
        Self {
            method: Method::GET,
            scheme: "http",
            authority: "shop.example".to_owned(),
            path: http::uri::PathAndQuery::from_static("/"),
            headers: HeaderMap::new(),
            body: Vec::new(),
        }
    }
}

impl Failed {
    const fn usual() -> Self {
        Self {
            cause: Cause::ConnectFailure,
            attempts: Vec::new(),
            kept: None,
        }
    }
}

impl Context {
    fn usual() -> Self {
        Self {
            service: "service".to_owned(),
            route: "route/0".to_owned(),
            zone: "a".to_owned(),
            peer: Some("spiffe://mesh/client".to_owned()),
            address: None,
            time_left: TIME_LEFT,
        }
    }
}

impl Message {
    fn empty(status: StatusCode) -> Self {
        Self {
            status,
            headers: HeaderMap::new(),
            body: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;

//! What is to be, from YAML.

use super::read::{a_method, a_status, text_or_json};
use super::{Expect, WantedBody, WantedCall, WantedEnd, WantedMessage};
use crate::yaml::{Bad, Node};
use leeward_policy::model::PluginKind;
use leeward_wasm::Fault;

pub(super) fn expect(node: &Node<'_>, kind: PluginKind) -> Result<Expect, Bad> {
    let [
        respond,
        decline,
        stale,
        reroute,
        enqueue,
        fault,
        choose,
        request,
        response,
        store,
        log,
        counters,
        calls,
        max_time,
        max_memory,
    ] = node.fields([
        "respond",
        "decline",
        "stale",
        "reroute",
        "enqueue",
        "fault",
        "choose",
        "request",
        "response",
        "store",
        "log",
        "counters",
        "calls",
        "maxTime",
        "maxMemory",
    ])?;
    let is_router = kind == PluginKind::Router;
    for (given, fits, what) in [
        (&respond, !is_router, "fallbacks and filters"),
        (&decline, kind == PluginKind::Fallback, "fallbacks"),
        (&stale, kind == PluginKind::Fallback, "fallbacks"),
        (&reroute, kind == PluginKind::Fallback, "fallbacks"),
        (&enqueue, kind == PluginKind::Fallback, "fallbacks"),
        (&choose, is_router, "routers"),
        (&request, kind.is_filter(), "filters"),
        (&response, kind.is_filter(), "filters"),
    ] {
        if let Some(given) = given.as_ref().filter(|_| !fits) {
            return Err(given.bad(&format!(
                "is for {what}; this module is of kind {}",
                kind.as_str()
            )));
        }
    }
    let mut ends = Vec::new();
    if let Some(node) = &respond {
        ends.push(WantedEnd::Respond(wanted(node)?));
    }
    for (flag, end) in [(&decline, WantedEnd::Decline), (&stale, WantedEnd::Stale)] {
        match flag {
            Some(node) if node.boolean()? => ends.push(end),
            Some(node) => return Err(node.bad("want true, or leave it out")),
            None => {}
        }
    }
    if let Some(node) = &reroute {
        ends.push(WantedEnd::Reroute(node.text()?));
    }
    if let Some(node) = &enqueue {
        ends.push(enqueued(node)?);
    }
    if let Some(node) = &fault {
        let words = Fault::ALL.map(|fault| (fault.as_str().to_owned(), fault.as_str()));
        ends.push(WantedEnd::Fault(node.one_of(words)?));
    }
    if let Some(node) = &choose {
        ends.push(WantedEnd::Choose(if node.is_null() {
            None
        } else {
            Some(node.text()?)
        }));
    }
    let words = match kind {
        PluginKind::Fallback => "respond, decline, stale, reroute, enqueue or fault",
        PluginKind::WasiHttp => "respond or fault",
        PluginKind::Filter | PluginKind::ProxyWasm => "request and response, or respond or fault",
        PluginKind::Router => "choose (a service, or null for the weights) or fault",
    };
    let asked_of_passing = request.is_some() || response.is_some();
    if ends.len() > 1 || ends.is_empty() && !asked_of_passing {
        return Err(node.bad(&format!("want one of {words}")));
    }
    let message = |node: Option<Node<'_>>| node.map(|node| wanted(&node)).transpose();
    Ok(Expect {
        end: ends.pop(),
        request: message(request)?,
        response: message(response)?,
        store: stored(store)?,
        log: log.map_or_else(|| Ok(Vec::new()), |node| node.texts())?,
        counters: counted(counters)?,
        calls: calls.map(|node| called(&node)).transpose()?,
        max_time: max_time.map(|node| node.duration()).transpose()?,
        max_memory: max_memory.map(|node| node.size()).transpose()?,
    })
}

fn enqueued(node: &Node<'_>) -> Result<WantedEnd, Bad> {
    let [queue, respond] = node.fields(["queue", "respond"])?;
    let queue = queue.ok_or_else(|| node.bad("want a queue"))?.text()?;
    let message = respond.map_or_else(|| Ok(WantedMessage::default()), |node| wanted(&node))?;
    Ok(WantedEnd::Enqueue(queue, message))
}

/// The fields of a message that is to be.
const MESSAGE: [&str; 8] = [
    "status",
    "path",
    "headers",
    "onlyHeaders",
    "body",
    "contains",
    "json",
    "jsonContains",
];

fn wanted(node: &Node<'_>) -> Result<WantedMessage, Bad> {
    wanted_of(node.fields(MESSAGE)?)
}

fn wanted_of(
    [status, path, headers, only, body, contains, json, json_contains]: [Option<Node<'_>>; 8],
) -> Result<WantedMessage, Bad> {
    let mut message = WantedMessage {
        status: status
            .map(|node| a_status(&node))
            .transpose()?
            .map(|s| s.as_u16()),
        path: path.map(|node| node.text()).transpose()?,
        only_headers: only.map_or(Ok(false), |node| node.boolean())?,
        ..WantedMessage::default()
    };
    if let Some(node) = headers {
        for (name, node) in node.map()? {
            if name.bytes().any(|b| b.is_ascii_uppercase()) {
                return Err(node.bad("names of fields are in lower case here"));
            }
            let values = if node.is_null() { Vec::new() } else { node.texts()? };
            message.headers.push((name, values));
        }
    }
    if let Some(node) = body {
        message.body.push(WantedBody::Text(node.text()?));
    }
    for text in contains.map_or_else(|| Ok(Vec::new()), |node| node.texts())? {
        message.body.push(WantedBody::Contains(text));
    }
    if let Some(node) = json {
        message.body.push(WantedBody::Json(node.json()?));
    }
    if let Some(node) = json_contains {
        message.body.push(WantedBody::JsonContains(node.json()?));
    }
    Ok(message)
}

fn stored(node: Option<Node<'_>>) -> Result<Vec<(String, Option<WantedBody>)>, Bad> {
    let Some(node) = node else { return Ok(Vec::new()) };
    let entries = node.map()?.into_iter();
    let entries = entries.map(|(key, node)| {
        let value = match node.json()? {
            serde_json::Value::Null => None,
            json @ (serde_json::Value::Object(_) | serde_json::Value::Array(_)) => {
                Some(WantedBody::Json(json))
            }
            serde_json::Value::Bool(_) | serde_json::Value::Number(_) | serde_json::Value::String(_) => {
                Some(WantedBody::Text(text_or_json(&node)?))
            }
        };
        Ok((key, value))
    });
    entries.collect()
}

fn counted(node: Option<Node<'_>>) -> Result<Vec<(String, u64)>, Bad> {
    let Some(node) = node else { return Ok(Vec::new()) };
    let entries = node.map()?.into_iter();
    entries
        .map(|(name, node)| Ok((name, node.number(0, u32::MAX)?.into())))
        .collect()
}

fn called(node: &Node<'_>) -> Result<Vec<WantedCall>, Bad> {
    let mut calls = Vec::new();
    for node in node.list()? {
        let [
            service,
            method,
            path,
            headers,
            only,
            body,
            contains,
            json,
            json_contains,
        ] = node.fields([
            "service",
            "method",
            "path",
            "headers",
            "onlyHeaders",
            "body",
            "contains",
            "json",
            "jsonContains",
        ])?;
        calls.push(WantedCall {
            service: service.ok_or_else(|| node.bad("want a service"))?.text()?,
            method: method
                .map(|node| a_method(&node))
                .transpose()?
                .map(|m| m.to_string()),
            message: wanted_of([None, path, headers, only, body, contains, json, json_contains])?,
        });
    }
    Ok(calls)
}

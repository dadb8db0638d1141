//! What answers when a call can't be served.

use super::super::words::{self, word};
use super::degradation::condition;
use super::{duration, fields};
use crate::v1;
use serde_json::{Value, json};

pub(super) fn policy(policy: &v1::FallbackPolicy) -> Value {
    fields([
        ("on", causes(&policy.on)),
        ("onStatuses", json!(policy.on_statuses)),
        ("rungs", json!(policy.rungs.iter().map(rung).collect::<Vec<_>>())),
        ("hideHeader", json!(policy.hide_header)),
        ("reservePercent", json!(policy.reserve_percent)),
    ])
}

fn causes(causes: &[i32]) -> Value {
    let words = causes.iter().map(|cause| word(words::CAUSE, *cause));
    words.filter(|word| !word.is_empty()).collect()
}

fn rung(rung: &v1::Rung) -> Value {
    let (kind, act) = match &rung.kind {
        None => ("", Value::Null),
        Some(v1::rung::Kind::Plugin(r)) => (
            "plugin",
            fields([("plugin", json!(r.plugin)), ("config", json!(r.config))]),
        ),
        Some(v1::rung::Kind::Static(r)) => ("static", static_answer(r)),
        Some(v1::rung::Kind::Service(r)) => ("service", json!({"service": r.service})),
        Some(v1::rung::Kind::Zone(r)) => ("zone", fields([("zones", json!(r.zones))])),
        Some(v1::rung::Kind::Stale(r)) => ("stale", fields([("maxStale", duration(r.max_stale.as_ref()))])),
        Some(v1::rung::Kind::Queue(r)) => ("queue", json!({"queue": r.queue})),
        Some(v1::rung::Kind::Redirect(r)) => (
            "redirect",
            fields([("location", json!(r.location)), ("status", json!(r.status))]),
        ),
        Some(v1::rung::Kind::Fail(r)) => ("fail", fields([("status", json!(r.status))])),
    };
    fields([
        (kind, act),
        ("causes", causes(&rung.causes)),
        ("methods", json!(rung.methods)),
        ("when", condition(rung.when.as_ref())),
        ("deadlinePercent", json!(rung.deadline_percent)),
    ])
}

fn static_answer(answer: &v1::StaticRung) -> Value {
    let headers: Vec<_> = answer
        .headers
        .iter()
        .map(|h| json!({"name": h.name, "value": h.value}))
        .collect();
    fields([
        ("status", json!(answer.status)),
        ("headers", json!(headers)),
        ("body", json!(answer.body)),
        ("template", json!(answer.template)),
    ])
}

//! Whether what came of a case is what was to come of it.

use super::cases::{Case, Expect, WantedBody, WantedEnd, WantedMessage};
use super::run::{End, Passed, PassedMessage, Seen};
use http::HeaderMap;
use leeward_wasm::{Action, Reply};
use serde_json::Value;
use std::time::Duration;

/// Something that is not as it was to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Difference {
    /// What it is about, as `cases.yaml` has it.
    pub(crate) field: String,
    pub(crate) want: String,
    pub(crate) got: String,
}

/// What is different. Empty if all is well.
pub(crate) fn check(case: &Case, seen: &Seen) -> Vec<Difference> {
    let mut found = Found::default();
    found.end(&case.expect, seen);
    for (key, want) in &case.expect.store {
        found.stored(key, want.as_ref(), seen);
    }
    for want in &case.expect.log {
        if !seen.log.iter().any(|line| line.contains(want.as_str())) {
            found.differs("log", format!("a line with {want:?}"), shown_list(&seen.log));
        }
    }
    for (name, want) in &case.expect.counters {
        let got = seen.counters.get(name).copied().unwrap_or_default();
        found.same(&format!("counters.{name}"), want, &got);
    }
    if let Some(wanted) = &case.expect.calls {
        found.calls(wanted, seen);
    }
    if let Some(max) = case.expect.max_time.filter(|max| seen.time > *max) {
        found.differs(
            "maxTime",
            format!("at most {}", duration(max)),
            duration(seen.time),
        );
    }
    if let Some(max) = case.expect.max_memory.filter(|max| seen.memory > *max) {
        found.differs("maxMemory", format!("at most {}", size(max)), size(seen.memory));
    }
    found.0
}

/// A time in one unit.
pub(crate) fn duration(duration: Duration) -> String {
    let micros = duration.as_secs_f64() * 1e6;
    match micros {
        ..1e3 => format!("{micros:.1}us"),
        ..1e6 => format!("{:.1}ms", micros / 1e3),
        _ => format!("{:.1}s", micros / 1e6),
    }
}

/// A size in one unit.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        ..1024 => format!("{bytes}B"),
        1024..1_048_576 => format!("{:.1}KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1}MiB", bytes as f64 / 1_048_576.0),
    }
}

/// What a case came to, in a few words.
pub(crate) fn outcome(seen: &Seen) -> String {
    outcome_of(&seen.end)
}

/// The same, of a call's end.
pub(crate) fn outcome_of(end: &End) -> String {
    match end {
        End::Action(Action::Respond(reply)) => format!("respond {}", reply.status.as_u16()),
        End::Action(Action::Reroute(service)) => format!("reroute {service}"),
        End::Action(Action::Decline) => "decline".to_owned(),
        End::Action(Action::Stale) => "stale".to_owned(),
        End::Action(Action::Enqueue { queue, reply }) => {
            format!("enqueue {queue} {}", reply.status.as_u16())
        }
        End::Passed(passed) if passed.local => {
            let status = passed.response.as_ref().and_then(|response| response.status);
            format!("respond {}", status.map_or(0, |status| status.as_u16()))
        }
        End::Passed(_) => "pass".to_owned(),
        End::Chosen(Some(service)) => format!("choose {service}"),
        End::Chosen(None) => "choose by the weights".to_owned(),
        End::Fault(fault) => format!("fault {}", fault.as_str()),
    }
}

#[derive(Default)]
struct Found(Vec<Difference>);

impl Found {
    fn differs(&mut self, field: &str, want: String, got: String) {
        let field = field.to_owned();
        self.0.push(Difference { field, want, got });
    }

    fn same<T: PartialEq + ToString>(&mut self, field: &str, want: &T, got: &T) {
        if want != got {
            self.differs(field, want.to_string(), got.to_string());
        }
    }

    fn end(&mut self, expect: &Expect, seen: &Seen) {
        match (&expect.end, &seen.end) {
            (Some(WantedEnd::Respond(want)), End::Action(Action::Respond(reply))) => {
                self.message("respond", want, &of_reply(reply));
            }
            (Some(WantedEnd::Respond(want)), End::Passed(passed)) if passed.local => {
                if let Some(response) = &passed.response {
                    self.message("respond", want, response);
                }
                self.passed(expect, passed);
            }
            (Some(WantedEnd::Decline), End::Action(Action::Decline))
            | (Some(WantedEnd::Stale), End::Action(Action::Stale)) => {}
            (Some(WantedEnd::Reroute(want)), End::Action(Action::Reroute(got))) => {
                self.same("reroute", want, got);
            }
            (Some(WantedEnd::Enqueue(want, message)), End::Action(Action::Enqueue { queue, reply })) => {
                self.same("enqueue.queue", want, queue);
                self.message("enqueue.respond", message, &of_reply(reply));
            }
            (Some(WantedEnd::Choose(want)), End::Chosen(got)) => {
                let word = |chosen: &Option<String>| chosen.clone().unwrap_or_else(|| "null".to_owned());
                self.same("choose", &word(want), &word(got));
            }
            (Some(WantedEnd::Fault(want)), End::Fault(got)) => {
                self.same("fault", &(*want).to_owned(), &got.as_str().to_owned());
            }
            (None, End::Passed(passed)) if !passed.local => self.passed(expect, passed),
            (want, _) => {
                let want = want.as_ref().map_or("pass", WantedEnd::word);
                let mut got = outcome(seen);
                for reason in &seen.reasons {
                    got.push_str("\n  ");
                    got.push_str(reason);
                }
                self.differs("expect", want.to_owned(), got);
            }
        }
    }

    fn passed(&mut self, expect: &Expect, passed: &Passed) {
        let messages = [
            ("request", &expect.request, &passed.request),
            ("response", &expect.response, &passed.response),
        ];
        for (at, want, got) in messages {
            match (want, got) {
                (Some(want), Some(got)) => self.message(at, want, got),
                (Some(_), None) => {
                    self.differs(at, "goes on".to_owned(), "answered by the plugin".to_owned());
                }
                (None, _) => {}
            }
        }
    }

    fn message(&mut self, at: &str, want: &WantedMessage, got: &PassedMessage) {
        if let Some(want) = want.status {
            let got = got.status.map_or(0, |status| status.as_u16());
            self.same(&format!("{at}.status"), &want, &got);
        }
        if let Some(want) = &want.path {
            let got = got.path.as_ref().map_or("", |path| path.as_str());
            self.same(&format!("{at}.path"), want, &got.to_owned());
        }
        self.headers(at, want, &got.headers);
        for body in &want.body {
            self.body(at, body, &got.body);
        }
    }

    fn headers(&mut self, at: &str, want: &WantedMessage, got: &HeaderMap) {
        for (name, values) in &want.headers {
            let there = got.get_all(name).iter();
            let there: Vec<String> = there
                .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
                .collect();
            if *values != there {
                let shown = |values: &[String]| match values {
                    [] => "not there".to_owned(),
                    values => values.join("\n"),
                };
                self.differs(&format!("{at}.headers.{name}"), shown(values), shown(&there));
            }
        }
        if !want.only_headers {
            return;
        }
        for name in got.keys() {
            if !want.headers.iter().any(|(known, _)| known == name.as_str()) {
                self.differs(
                    &format!("{at}.headers.{name}"),
                    "not there".to_owned(),
                    got.get(name).map_or_else(String::new, |value| {
                        String::from_utf8_lossy(value.as_bytes()).into_owned()
                    }),
                );
            }
        }
    }

    fn body(&mut self, at: &str, want: &WantedBody, got: &[u8]) {
        let text = || String::from_utf8_lossy(got).into_owned();
        match want {
            WantedBody::Text(want) if want.as_bytes() == got => {}
            WantedBody::Text(want) => self.differs(&format!("{at}.body"), want.clone(), text()),
            WantedBody::Contains(want) => {
                let found =
                    want.is_empty() || got.windows(want.len()).any(|window| window == want.as_bytes());
                if !found {
                    self.differs(&format!("{at}.contains"), want.clone(), text());
                }
            }
            WantedBody::Json(want) => match serde_json::from_slice::<Value>(got) {
                Ok(got) if got == *want => {}
                Ok(got) => self.differs(&format!("{at}.json"), format!("{want:#}"), format!("{got:#}")),
                Err(_) => self.differs(&format!("{at}.json"), format!("{want:#}"), text()),
            },
            WantedBody::JsonContains(want) => match serde_json::from_slice::<Value>(got) {
                Ok(got) if has(&got, want) => {}
                Ok(got) => self.differs(
                    &format!("{at}.jsonContains"),
                    format!("{want:#}"),
                    format!("{got:#}"),
                ),
                Err(_) => self.differs(&format!("{at}.jsonContains"), format!("{want:#}"), text()),
            },
        }
    }

    fn stored(&mut self, key: &str, want: Option<&WantedBody>, seen: &Seen) {
        let at = format!("store.{key}");
        match (want, seen.store.get(key)) {
            (None, None) => {}
            (None, Some(got)) => {
                self.differs(
                    &at,
                    "not there".to_owned(),
                    String::from_utf8_lossy(got).into_owned(),
                );
            }
            (Some(want), None) => {
                let want = match want {
                    WantedBody::Text(text) | WantedBody::Contains(text) => text.clone(),
                    WantedBody::Json(json) | WantedBody::JsonContains(json) => format!("{json:#}"),
                };
                self.differs(&at, want, "not there".to_owned());
            }
            (Some(want), Some(got)) => self.body(&at, want, got),
        }
    }

    fn calls(&mut self, wanted: &[super::cases::WantedCall], seen: &Seen) {
        let line = |method: &str, service: &str, path: &str| format!("{method} {service}{path}");
        let made: Vec<String> = seen
            .calls
            .iter()
            .map(|call| line(&call.method, &call.service, &call.path))
            .collect();
        let fit = |(want, got): (&super::cases::WantedCall, &super::rig::SeenCall)| {
            want.service == got.service
                && want.method.as_ref().is_none_or(|method| *method == got.method)
                && want.message.path.as_ref().is_none_or(|path| *path == got.path)
        };
        if wanted.len() != seen.calls.len() || !wanted.iter().zip(&seen.calls).all(fit) {
            let wanted: Vec<String> = wanted
                .iter()
                .map(|want| {
                    let (method, path) = (want.method.as_deref(), want.message.path.as_deref());
                    line(method.unwrap_or("*"), &want.service, path.unwrap_or("*"))
                })
                .collect();
            self.differs("calls", shown_list(&wanted), shown_list(&made));
            return;
        }
        for (at, (want, got)) in wanted.iter().zip(&seen.calls).enumerate() {
            let message = PassedMessage {
                path: None,
                status: None,
                headers: got.headers.clone(),
                body: got.body.clone(),
            };
            let rest = WantedMessage {
                path: None,
                ..want.message.clone()
            };
            self.message(&format!("calls[{at}]"), &rest, &message);
        }
    }
}

fn shown_list(lines: &[String]) -> String {
    match lines {
        [] => "none".to_owned(),
        lines => lines.join("\n"),
    }
}

fn of_reply(reply: &Reply) -> PassedMessage {
    PassedMessage {
        path: None,
        status: Some(reply.status),
        headers: reply.headers.clone(),
        body: reply.body.clone(),
    }
}

/// Whether JSON has at least what another has: objects their fields, lists their items in place.
fn has(got: &Value, want: &Value) -> bool {
    match (got, want) {
        (Value::Object(got), Value::Object(want)) => want
            .iter()
            .all(|(key, want)| got.get(key).is_some_and(|got| has(got, want))),
        (Value::Array(got), Value::Array(want)) => {
            got.len() == want.len() && got.iter().zip(want).all(|(got, want)| has(got, want))
        }
        (got, want) => got == want,
    }
}

impl WantedEnd {
    const fn word(&self) -> &'static str {
        match self {
            Self::Respond(_) => "respond",
            Self::Decline => "decline",
            Self::Stale => "stale",
            Self::Reroute(_) => "reroute",
            Self::Enqueue(..) => "enqueue",
            Self::Fault(_) => "fault",
            Self::Choose(_) => "choose",
        }
    }
}

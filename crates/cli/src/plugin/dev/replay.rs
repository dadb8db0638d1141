//! Requests that were recorded, asked again of each build.

use super::super::cases::Request;
use super::super::check::outcome_of;
use super::super::diff;
use super::super::run::{End, PassedMessage};
use super::serve::Serving;
use crate::output::{Failure, say};
use http::{HeaderMap, HeaderName, HeaderValue};
use leeward_wasm::Action;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Largest file, in bytes.
const MAX_BYTES: u64 = 64 << 20;
/// Requests in it.
const MAX_REQUESTS: usize = 10_000;

/// Recorded requests, and what the build before answered.
pub(super) struct Replay {
    requests: Vec<Request>,
    before: Vec<String>,
}

impl Replay {
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let bad = |why: String| Failure::BadInput(format!("--replay: {}{why}", path.display()));
        let len = std::fs::metadata(path)
            .map_err(|error| bad(format!(": {error}")))?
            .len();
        if len > MAX_BYTES {
            return Err(bad(format!(": has {len} bytes; want at most {MAX_BYTES}")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| bad(format!(": {error}")))?;
        let mut requests = Vec::new();
        for (at, line) in text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
        {
            let request = request(line).map_err(|why| bad(format!(":{}: {why}", at + 1)))?;
            requests.push(request);
            if requests.len() > MAX_REQUESTS {
                return Err(bad(format!(": has more than {MAX_REQUESTS} requests")));
            }
        }
        Ok(Self {
            requests,
            before: Vec::new(),
        })
    }

    /// Asks all of them, and shows what is different.
    pub(super) async fn run(&mut self, serving: &Serving) {
        let (mut now, mut changed) = (Vec::with_capacity(self.requests.len()), 0);
        for (at, request) in self.requests.iter().enumerate() {
            let answered = shown(&serving.ask(request.clone()).await);
            if let Some(before) = self.before.get(at).filter(|before| **before != answered) {
                changed += 1;
                say(&format!(
                    "replay {}: {} {} (- before, + now):",
                    at + 1,
                    request.method,
                    request.path
                ));
                for line in diff::lines(before, &answered) {
                    say(&format!("  {line}"));
                }
            }
            now.push(answered);
        }
        say(&if self.before.is_empty() {
            format!("replay: {} requests asked", now.len())
        } else {
            format!(
                "replay: {changed} of {} answered otherwise than before",
                now.len()
            )
        });
        self.before = now;
    }
}

/// A request as it is written down.
pub(super) fn line_of(request: &Request) -> Value {
    let mut headers = Map::new();
    for name in request.headers.keys() {
        let values = request.headers.get_all(name).iter();
        let values: Vec<Value> = values
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into())
            .collect();
        headers.insert(name.to_string(), Value::Array(values));
    }
    json!({
        "method": request.method.as_str(),
        "authority": request.authority,
        "path": request.path.as_str(),
        "headers": headers,
        "body": String::from_utf8_lossy(&request.body.concat()),
    })
}

fn request(line: &str) -> Result<Request, String> {
    let line: Value = serde_json::from_str(line).map_err(|error| format!("is no JSON: {error}"))?;
    let Value::Object(line) = line else {
        return Err("want an object with method, path, headers and body".to_owned());
    };
    let text = |field: &str, or: &str| match line.get(field) {
        None | Some(Value::Null) => Ok(or.to_owned()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("{field}: want a text")),
    };
    let (method, path) = (text("method", "GET")?, text("path", "/")?);
    let body = text("body", "")?;
    Ok(Request {
        method: method
            .parse()
            .map_err(|_| format!("method: {method:?} is none; want one such as GET"))?,
        scheme: "http",
        authority: text("authority", "shop.example")?,
        path: path
            .parse()
            .ok()
            .filter(|_| path.starts_with('/'))
            .ok_or_else(|| format!("path: {path:?} is none; want one that begins with /"))?,
        headers: headers(line.get("headers"))?,
        body: if body.is_empty() {
            Vec::new()
        } else {
            vec![body.into()]
        },
    })
}

fn headers(fields: Option<&Value>) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    let fields = match fields {
        None | Some(Value::Null) => return Ok(headers),
        Some(Value::Object(fields)) => fields,
        Some(_) => return Err("headers: want an object".to_owned()),
    };
    for (name, values) in fields {
        let values = values
            .as_array()
            .map_or_else(|| std::slice::from_ref(values), Vec::as_slice);
        let bad = || format!("headers.{name}: want a field's name and a text, or a list of texts");
        let name: HeaderName = name.parse().map_err(|_| bad())?;
        for value in values {
            let value = value.as_str().and_then(|text| HeaderValue::from_str(text).ok());
            headers.append(&name, value.ok_or_else(bad)?);
        }
    }
    Ok(headers)
}

/// What a plugin did, in all that can be seen of it.
fn shown(end: &End) -> String {
    let mut text = outcome_of(end);
    let mut add = |what: &str, headers: &HeaderMap, body: &[u8]| {
        text.push_str(what);
        for (name, value) in headers {
            text.push_str(&format!(
                "\n{name}: {}",
                String::from_utf8_lossy(value.as_bytes())
            ));
        }
        text.push_str(&format!("\n\n{}", String::from_utf8_lossy(body)));
    };
    let mut message = |what: &str, message: &Option<PassedMessage>| {
        if let Some(message) = message {
            add(what, &message.headers, &message.body);
        }
    };
    match end {
        End::Action(Action::Respond(reply) | Action::Enqueue { reply, .. }) => {
            add("", &reply.headers, &reply.body);
        }
        End::Passed(passed) => {
            message("\nrequest:", &passed.request);
            message("\nresponse:", &passed.response);
        }
        End::Action(Action::Decline | Action::Stale | Action::Reroute(_))
        | End::Chosen(_)
        | End::Fault(_) => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_is_read_again() {
        let line =
            r#"{"method": "POST", "path": "/a?b", "headers": {"x-a": ["1", "2"], "x-b": "3"}, "body": "c"}"#;
        let read = request(line).unwrap();
        assert_eq!((read.method.as_str(), read.path.as_str()), ("POST", "/a?b"));
        assert_eq!(read.headers.len(), 3);
        let again = request(&line_of(&read).to_string()).unwrap();
        assert_eq!(again.headers, read.headers);
        assert_eq!(again.body, read.body);
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for (line, why) in [
            ("{", "is no JSON"),
            ("[]", "want an object"),
            (r#"{"method": "G T"}"#, "method: \"G T\" is none"),
            (r#"{"path": "a"}"#, "path: \"a\" is none"),
            (r#"{"headers": {"a b": "c"}}"#, "headers.a b: want"),
            (r#"{"body": 1}"#, "body: want a text"),
        ] {
            let said = request(line).unwrap_err();
            assert!(said.contains(why), "{line}: {said}");
        }
    }
}

//! Replaces the values of named JSON fields, at any depth, by a mask: in answers, and by choice in requests.
//!
//! The configuration is a JSON object: `fields` (names, as they are written), `mask` (default `***`), `response` (default
//! true) and `request` (default false). A body whose Content-Type isn't JSON passes.
//!
//! It never lets through what it couldn't look into: a body that says it is JSON but isn't, or is compressed, is
//! refused, with 400 for a request and 502 for an answer. So that answers don't come compressed, Accept-Encoding is taken
//! out of requests. Policy should say `onFault: FailClosed`, and `maxBody` bounds what can pass.
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: json-redactor}
//! spec:
//!   kind: Filter
//!   source: {file: /var/lib/leeward/json-redactor.wasm}
//!   limits: {maxBody: 1048576}
//!   config: '{"fields": ["password", "card"], "request": true}'
//!   onFault: FailClosed
//! ---
//! kind: Route
//! metadata: {name: accounts}
//! spec:
//!   hostnames: [accounts.example]
//!   rules:
//!     - backendRefs: [{service: accounts}]
//!       filters: [{plugin: json-redactor}]
//! ```

mod redact;

use leeward_plugin::{
    BodyMode, BodyVerdict, Filter, Interest, Level, Memo, RequestHead, RequestVerdict, Response,
    ResponseHead, ResponseVerdict, count, fault, log,
};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::rc::Rc;

struct JsonRedactor;

/// The filter's configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    fields: BTreeSet<String>,
    #[serde(default = "stars")]
    mask: String,
    #[serde(default = "yes")]
    response: bool,
    #[serde(default)]
    request: bool,
}

/// What a body can be, by its head.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Json,
    /// It can't be looked into.
    Encoded,
    Other,
}

/// What the body's own digests and validators are called: they don't hold for another body.
const OF_THE_BODY: [&str; 5] = ["etag", "content-md5", "digest", "content-digest", "repr-digest"];

fn stars() -> String {
    "***".to_owned()
}

const fn yes() -> bool {
    true
}

thread_local! {
    static CONFIG: Memo<Config> = const { Memo::new() };
}

impl Filter for JsonRedactor {
    fn on_request(request: &RequestHead) -> RequestVerdict {
        let config = config(request);
        let interest = if config.response {
            if let Err(error) = request.remove_header("accept-encoding") {
                fault(&format!("accept-encoding stays: {}", error.name()));
            }
            Interest::RESPONSE
        } else {
            Interest::NOTHING
        };
        let kind = if config.request {
            kind(
                &request.header("content-type"),
                &request.header("content-encoding"),
            )
        } else {
            Kind::Other
        };
        match kind {
            Kind::Json => RequestVerdict::Proceed(interest.with_request_body(BodyMode::Whole)),
            Kind::Encoded => RequestVerdict::Respond(
                Response::new(415)
                    .header("accept-encoding", "identity")
                    .body("JSON is taken only uncompressed\n"),
            ),
            Kind::Other => RequestVerdict::Proceed(interest),
        }
    }

    fn on_request_body(request: &RequestHead, data: Vec<u8>, _: bool) -> BodyVerdict {
        match redact(&config(request), &data) {
            Ok(None) => BodyVerdict::Pass,
            Ok(Some(body)) => {
                for name in OF_THE_BODY {
                    // The head of a body that is whole can always be changed.
                    let _ = request.remove_header(name);
                }
                BodyVerdict::Replace(body)
            }
            Err(error) => {
                BodyVerdict::Respond(Response::new(400).body(format!("the body is no JSON: {error}\n")))
            }
        }
    }

    fn on_response(_: &RequestHead, response: &ResponseHead) -> ResponseVerdict {
        match kind(
            &response.header("content-type"),
            &response.header("content-encoding"),
        ) {
            Kind::Json => ResponseVerdict::Proceed(BodyMode::Whole),
            Kind::Encoded => {
                log(
                    Level::Warn,
                    "an answer in JSON is compressed though nobody asked for that",
                );
                ResponseVerdict::Respond(refusal())
            }
            Kind::Other => ResponseVerdict::Proceed(BodyMode::None),
        }
    }

    fn on_response_body(
        request: &RequestHead,
        response: &ResponseHead,
        data: Vec<u8>,
        _: bool,
    ) -> BodyVerdict {
        match redact(&config(request), &data) {
            Ok(None) => BodyVerdict::Pass,
            Ok(Some(body)) => {
                for name in OF_THE_BODY {
                    let _ = response.remove_header(name);
                }
                BodyVerdict::Replace(body)
            }
            Err(error) => {
                log(
                    Level::Warn,
                    &format!("an answer says it is JSON, but isn't: {error}"),
                );
                BodyVerdict::Respond(refusal())
            }
        }
    }
}

fn config(request: &RequestHead) -> Rc<Config> {
    CONFIG
        .with(|memo| memo.get(&request.config(), |text| serde_json::from_str(text)))
        .unwrap_or_else(|error| fault(&format!("the filter's config is wrong: {error}")))
}

/// What goes on in a body's place; none if nothing in it is to be replaced. HEAD and 304 have no body.
fn redact(config: &Config, body: &[u8]) -> Result<Option<Vec<u8>>, String> {
    if body.is_empty() {
        return Ok(None);
    }
    let redacted = redact::redact(body, &config.fields, &config.mask)?;
    if redacted.is_some() {
        count("redacted", 1);
    }
    Ok(redacted)
}

fn kind(content_type: &[Vec<u8>], content_encoding: &[Vec<u8>]) -> Kind {
    let json = content_type.iter().any(|value| {
        let value = String::from_utf8_lossy(value).to_ascii_lowercase();
        let essence = value.split(';').next().unwrap_or_default().trim();
        essence == "application/json" || essence == "text/json" || essence.ends_with("+json")
    });
    let encoded = content_encoding
        .iter()
        .any(|value| !value.is_empty() && !value.eq_ignore_ascii_case(b"identity"));
    match (json, encoded) {
        (false, _) => Kind::Other,
        (true, false) => Kind::Json,
        (true, true) => Kind::Encoded,
    }
}

fn refusal() -> Response {
    Response::new(502).body("the answer can't be shown\n")
}

leeward_plugin::filter!(JsonRedactor);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_known_by_its_type() {
        let kind_of = |content_type: &str, encoding: &str| kind(&[content_type.into()], &[encoding.into()]);
        assert_eq!(kind_of("application/json", ""), Kind::Json);
        assert_eq!(
            kind_of("Application/Problem+JSON; charset=utf-8", "identity"),
            Kind::Json
        );
        assert_eq!(kind_of("application/json", "gzip"), Kind::Encoded);
        assert_eq!(kind_of("text/html", "gzip"), Kind::Other);
        assert_eq!(kind(&[], &[]), Kind::Other);
    }

    #[test]
    fn the_configuration_has_defaults() {
        let config: Config = serde_json::from_str(r#"{"fields": ["card"]}"#).unwrap();
        assert!(config.response && !config.request && config.mask == "***");
        assert!(serde_json::from_str::<Config>(r#"{"field": []}"#).is_err());
    }
}

//! Answers with what the rung's configuration says.
//!
//! The configuration is a JSON object: `status` (default 200), `body` (any JSON), `headers` (an object of
//! texts; `content-type` is `application/json` unless it says otherwise). What it can't read, it declines, and
//! says so in the log. It needs no access to anything.
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: static-json}
//! spec:
//!   kind: Fallback
//!   source: {file: /var/lib/leeward/static-json.wasm}
//!   onFault: NextRung
//! ---
//! kind: FallbackPolicy
//! metadata: {name: basket}
//! spec:
//!   rungs:
//!     - plugin: {plugin: static-json, config: '{"body": {"items": []}, "headers": {"cache-control": "no-store"}}'}
//! ```

use leeward_plugin::{Action, FailedRequest, Fallback, Level, Response, log};
use serde::Deserialize;
use serde_json::{Map, Value};

struct StaticJson;

/// The rung's configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    #[serde(default = "ok")]
    status: u16,
    #[serde(default)]
    headers: Map<String, Value>,
    body: Value,
}

const fn ok() -> u16 {
    200
}

impl Fallback for StaticJson {
    fn on_failure(request: &FailedRequest) -> Action {
        match answer(&request.config()) {
            Ok(response) => Action::Respond(response),
            Err(error) => {
                log(Level::Error, &error);
                Action::Decline
            }
        }
    }
}

fn answer(config: &str) -> Result<Response, String> {
    let config: Config =
        serde_json::from_str(config).map_err(|e| format!("the rung's config is wrong: {e}"))?;
    if !(200..=599).contains(&config.status) {
        return Err(format!(
            "status {} is out of range; want 200 to 599",
            config.status
        ));
    }
    let mut response = Response::new(config.status);
    if !config
        .headers
        .keys()
        .any(|name| name.eq_ignore_ascii_case("content-type"))
    {
        response = response.header("content-type", "application/json");
    }
    for (name, value) in &config.headers {
        let value = value
            .as_str()
            .ok_or_else(|| format!("headers.{name} is not a text"))?;
        response = response.header(name, value);
    }
    Ok(response.body(config.body.to_string()))
}

leeward_plugin::fallback!(StaticJson);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_the_answer() {
        let response = answer(r#"{"status": 203, "body": {"a": [1]}, "headers": {"X-A": "b"}}"#).unwrap();
        assert_eq!(
            (response.status, response.body.as_slice()),
            (203, br#"{"a":[1]}"#.as_slice())
        );
        let names: Vec<_> = response.headers.iter().map(|h| h.name.as_str()).collect();
        assert_eq!(names, ["content-type", "x-a"]);
    }

    #[test]
    fn the_configuration_may_say_which_json_it_is() {
        let response =
            answer(r#"{"body": 1, "headers": {"Content-Type": "application/problem+json"}}"#).unwrap();
        assert_eq!(response.headers.len(), 1);
        assert_eq!(response.headers[0].value, b"application/problem+json");
    }

    #[test]
    fn what_it_cannot_read_it_names() {
        assert!(answer("").unwrap_err().contains("config is wrong"));
        assert!(
            answer(r#"{"body": 1, "sttus": 2}"#)
                .unwrap_err()
                .contains("sttus")
        );
        assert!(answer(r#"{"body": 1, "status": 99}"#).unwrap_err().contains("99"));
        assert!(
            answer(r#"{"body": 1, "headers": {"a": 1}}"#)
                .unwrap_err()
                .contains("headers.a")
        );
    }
}

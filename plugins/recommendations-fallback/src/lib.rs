//! The feed stays when recommendations are down: in their place stands what is popular with everybody.
//!
//! The configuration is a JSON object:
//!
//! - `popular`: a list of items to show while nothing newer is known.
//! - `refresh`: where the list is read anew, at most every `everyMs` (default a minute): `{"service": "catalog", "path":
//!   "/popular"}`. The answer is a list, or an object with a list `items`. It is kept in the plugin's store, and if
//!   the service doesn't answer, the last one goes on being shown.
//! - `service`: another service to send the request to first, while at least half a second is left.
//!
//! Only GET and HEAD are answered, since others could have had an effect, and only where the request accepts JSON.
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: popular}
//! spec:
//!   kind: Fallback
//!   source: {file: /var/lib/leeward/recommendations-fallback.wasm}
//!   access: {services: [catalog]}
//!   onFault: NextRung
//! ---
//! kind: FallbackPolicy
//! metadata: {name: recommendations}
//! spec:
//!   rungs:
//!     - plugin:
//!         plugin: popular
//!         config: '{"popular": ["tea", "soap"], "refresh": {"service": "catalog", "path": "/popular"}}'
//! ```

mod accept;

use leeward_plugin::mesh::Call;
use leeward_plugin::{Action, Cause, FailedRequest, Fallback, Level, Response, count, log, store, time_left};
use serde::Deserialize;
use serde_json::{Value, json};
use std::time::Duration;

struct Popular;

/// The rung's configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    popular: Vec<Value>,
    #[serde(default)]
    refresh: Option<Refresh>,
    #[serde(default)]
    service: Option<String>,
}

/// Where the list is read anew.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Refresh {
    service: String,
    path: String,
    #[serde(default = "minute")]
    every_ms: u64,
}

/// What the decision depends on.
struct Facts<'a> {
    method: &'a str,
    query: Option<&'a str>,
    cause: Cause,
    zone: &'a str,
    time_left: Duration,
    /// The values of Accept.
    accept: &'a [Vec<u8>],
}

/// Less time than this is not worth another service's while.
const REROUTE_NEEDS: Duration = Duration::from_millis(500);
/// Longer than this nobody waits for a newer list.
const REFRESH_TAKES: Duration = Duration::from_millis(200);
/// Items shown where the request doesn't say.
const LIMIT: usize = 5;
/// The list that was read last, as JSON.
const LIST: &str = "list";
/// How often the list was to be read since it last was; gone when it is time again.
const ASKED: &str = "asked";

const fn minute() -> u64 {
    60_000
}

impl Fallback for Popular {
    fn on_failure(request: &FailedRequest) -> Action {
        let (method, query, zone) = (request.method(), request.query(), request.zone());
        let accept = request.header("accept");
        let facts = Facts {
            method: &method,
            query: query.as_deref(),
            cause: request.cause(),
            zone: &zone,
            time_left: time_left(),
            accept: &accept,
        };
        match decide(&request.config(), &facts, newest) {
            Ok(action) => {
                if matches!(action, Action::Respond(_)) {
                    count("answers", 1);
                }
                action
            }
            Err(error) => {
                log(Level::Error, &error);
                Action::Decline
            }
        }
    }
}

fn decide(
    config: &str,
    facts: &Facts<'_>,
    newest: impl FnOnce(&Refresh) -> Option<Vec<Value>>,
) -> Result<Action, String> {
    if !matches!(facts.method, "GET" | "HEAD") {
        return Ok(Action::Decline);
    }
    let config: Config =
        serde_json::from_str(config).map_err(|e| format!("the rung's config is wrong: {e}"))?;
    if let Some(service) = config.service
        && facts.time_left >= REROUTE_NEEDS
    {
        return Ok(Action::Reroute(service));
    }
    if !accept::json(facts.accept) {
        return Ok(Action::Decline);
    }
    let limit = facts.query.and_then(limit_of).unwrap_or(LIMIT);
    let popular = config.refresh.as_ref().and_then(newest).unwrap_or(config.popular);
    let items: Vec<_> = popular.into_iter().take(limit).collect();
    let body = json!({
        "items": items,
        "source": "popular",
        "because": because(facts.cause),
        "zone": facts.zone,
    });
    let response = Response::new(200).header("cache-control", "no-store").json(&body);
    response
        .map(Action::Respond)
        .map_err(|e| format!("the list can't be written: {e}"))
}

/// The list as it was last read, read again first if it is time. The call that finds the count at its beginning reads;
/// others meanwhile show what there is.
fn newest(refresh: &Refresh) -> Option<Vec<Value>> {
    let every = Duration::from_millis(refresh.every_ms);
    if store::increment(ASKED, 1, Some(every)) == Ok(1) {
        match read(refresh) {
            Ok(list) => {
                if let Err(error) = store::set(LIST, &list, None) {
                    log(
                        Level::Warn,
                        &format!("the popular list can't be kept: {}", error.name()),
                    );
                }
            }
            Err(error) => log(Level::Warn, &format!("the popular list stays as it was: {error}")),
        }
    }
    store::get(LIST).and_then(|list| items(&list))
}

/// Reads the list from its service.
fn read(refresh: &Refresh) -> Result<Vec<u8>, String> {
    let Refresh { service, path, .. } = refresh;
    let answer = Call::get(service, path)
        .header("accept", "application/json")
        .timeout(REFRESH_TAKES.min(time_left() / 2))
        .send()
        .map_err(|e| format!("{service}{path}: {}", e.name()))?;
    if answer.status != 200 {
        return Err(format!("{service}{path} answered {}; want 200", answer.status));
    }
    match items(&answer.body) {
        Some(_) => Ok(answer.body),
        None => Err(format!(
            "{service}{path} answered with neither a list nor an object with a list `items`"
        )),
    }
}

/// The items in an answer.
fn items(body: &[u8]) -> Option<Vec<Value>> {
    match serde_json::from_slice(body).ok()? {
        Value::Array(items) => Some(items),
        Value::Object(mut object) => match object.remove("items") {
            Some(Value::Array(items)) => Some(items),
            _ => None,
        },
        _ => None,
    }
}

fn limit_of(query: &str) -> Option<usize> {
    query
        .split('&')
        .find_map(|pair| pair.strip_prefix("limit="))
        .and_then(|n| n.parse().ok())
}

const fn because(cause: Cause) -> &'static str {
    match cause {
        Cause::ConnectFailure => "recommendations can't be reached",
        Cause::Timeout => "recommendations are too slow",
        Cause::Reset => "recommendations broke off",
        Cause::NoEndpoint => "there are no recommendations",
        Cause::Overflow | Cause::Overloaded | Cause::RateLimited => "recommendations have too much to do",
        Cause::UpstreamStatus | Cause::CircuitOpen => "recommendations are failing",
        Cause::Disabled => "recommendations are switched off",
    }
}

leeward_plugin::fallback!(Popular);

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts<'static> = Facts {
        method: "GET",
        query: None,
        cause: Cause::Timeout,
        zone: "a",
        time_left: Duration::from_secs(1),
        accept: &[],
    };

    fn ask(config: &str, facts: &Facts<'_>) -> Result<Action, String> {
        decide(config, facts, |_| None)
    }

    fn body(action: Action) -> Value {
        let Action::Respond(response) = action else {
            panic!("{action:?}")
        };
        assert_eq!(response.status, 200);
        response.read_json().unwrap()
    }

    #[test]
    fn shows_what_is_popular_and_says_why() {
        let facts = Facts {
            query: Some("a=b&limit=2"),
            ..FACTS
        };
        let body = body(ask(r#"{"popular": ["tea", "soap", "rope"]}"#, &facts).unwrap());
        assert_eq!(body["items"], json!(["tea", "soap"]));
        assert_eq!(body["because"], "recommendations are too slow");
    }

    #[test]
    fn a_newer_list_goes_before_that_of_the_configuration() {
        let config = r#"{"popular": ["tea"], "refresh": {"service": "catalog", "path": "/popular"}}"#;
        let newer = decide(config, &FACTS, |refresh| {
            assert_eq!((refresh.service.as_str(), refresh.every_ms), ("catalog", 60_000));
            items(br#"{"items": ["rope"]}"#)
        });
        assert_eq!(body(newer.unwrap())["items"], json!(["rope"]));
        assert_eq!(body(ask(config, &FACTS).unwrap())["items"], json!(["tea"]));
        assert!(items(br#"["a"]"#).is_some() && items(br#"{"items": 1}"#).is_none() && items(b"<").is_none());
    }

    #[test]
    fn another_service_is_asked_while_there_is_time() {
        let config = r#"{"popular": [], "service": "recommendations-lite"}"#;
        assert!(matches!(ask(config, &FACTS), Ok(Action::Reroute(s)) if s == "recommendations-lite"));
        let late = Facts {
            time_left: Duration::from_millis(1),
            ..FACTS
        };
        assert!(matches!(ask(config, &late), Ok(Action::Respond(_))));
    }

    #[test]
    fn writes_are_declined() {
        let post = Facts {
            method: "POST",
            ..FACTS
        };
        assert!(matches!(ask("", &post), Ok(Action::Decline)));
        assert!(ask("{}", &FACTS).is_err());
    }

    #[test]
    fn another_service_may_have_what_is_wanted_where_json_is_not() {
        let html = [b"text/html".to_vec()];
        let facts = Facts {
            accept: &html,
            ..FACTS
        };
        assert!(matches!(ask(r#"{"popular": []}"#, &facts), Ok(Action::Decline)));
        let other = ask(r#"{"popular": [], "service": "lite"}"#, &facts);
        assert!(matches!(other, Ok(Action::Reroute(_))));
    }
}

//! The feed stays when recommendations are down: in their place stands what is popular with everybody.
//!
//! The configuration is a JSON object: `popular`, a list of items to show, and optionally `service`, the
//! name of another service to ask first while at least half a second is left. Only GET and HEAD are answered,
//! since others could have had an effect, and only where the request accepts JSON.

use leeward_plugin::{Action, Cause, FailedRequest, Fallback, Level, Response, count, log};
use serde::Deserialize;
use serde_json::{Value, json};

struct Popular;

/// The rung's configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    popular: Vec<Value>,
    #[serde(default)]
    service: Option<String>,
}

/// What the decision depends on.
struct Facts<'a> {
    method: &'a str,
    query: Option<&'a str>,
    cause: Cause,
    zone: &'a str,
    time_left_us: u64,
    /// The values of Accept.
    accept: &'a [Vec<u8>],
}

/// Less time than this is not worth another service's while.
const REROUTE_NEEDS_US: u64 = 500_000;
/// Items shown where the request doesn't say.
const LIMIT: usize = 5;

impl Fallback for Popular {
    fn on_failure(request: &FailedRequest) -> Action {
        let (method, query, zone) = (request.method(), request.query(), request.zone());
        let accept = request.header("accept");
        let facts = Facts {
            method: &method,
            query: query.as_deref(),
            cause: request.cause(),
            zone: &zone,
            time_left_us: request.time_left_us(),
            accept: &accept,
        };
        match decide(&request.config(), &facts) {
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

fn decide(config: &str, facts: &Facts<'_>) -> Result<Action, String> {
    if !matches!(facts.method, "GET" | "HEAD") {
        return Ok(Action::Decline);
    }
    let config: Config =
        serde_json::from_str(config).map_err(|e| format!("the rung's config is wrong: {e}"))?;
    if let Some(service) = config.service
        && facts.time_left_us >= REROUTE_NEEDS_US
    {
        return Ok(Action::Reroute(service));
    }
    if !accepts_json(facts.accept) {
        return Ok(Action::Decline);
    }
    let limit = facts.query.and_then(limit_of).unwrap_or(LIMIT);
    let items: Vec<_> = config.popular.into_iter().take(limit).collect();
    let body = json!({
        "items": items,
        "source": "popular",
        "because": because(facts.cause),
        "zone": facts.zone,
    });
    Ok(Action::Respond(
        Response::new(200)
            .header("content-type", "application/json")
            .header("cache-control", "no-store")
            .body(body.to_string()),
    ))
}

fn limit_of(query: &str) -> Option<usize> {
    query
        .split('&')
        .find_map(|pair| pair.strip_prefix("limit="))
        .and_then(|n| n.parse().ok())
}

/// Whether an answer in JSON is acceptable (RFC 9110 section 12.5.1): the most specific range that covers it
/// decides, and without any Accept all is.
fn accepts_json(accept: &[Vec<u8>]) -> bool {
    let mut best = None;
    let mut any = false;
    let values = accept.iter().filter_map(|value| std::str::from_utf8(value).ok());
    for range in values
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|range| !range.is_empty())
    {
        any = true;
        let mut parts = range.split(';').map(str::trim);
        let specific = match parts.next().unwrap_or_default().to_ascii_lowercase().as_str() {
            "application/json" => 3,
            "application/*" => 2,
            "*/*" => 1,
            _ => continue,
        };
        let quality = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
        let refused = quality
            .and_then(|q| q.trim().parse::<f32>().ok())
            .is_some_and(|q| q <= 0.0);
        best = best.max(Some((specific, !refused)));
    }
    !any || best.is_some_and(|(_, accepted)| accepted)
}

const fn because(cause: Cause) -> &'static str {
    match cause {
        Cause::ConnectFailure => "recommendations can't be reached",
        Cause::Timeout => "recommendations are too slow",
        Cause::Reset => "recommendations broke off",
        Cause::NoEndpoint => "there are no recommendations",
        Cause::Overflow => "recommendations have too much to do",
        Cause::UpstreamStatus => "recommendations are failing",
    }
}

leeward_plugin::export!(Popular);

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts<'static> = Facts {
        method: "GET",
        query: None,
        cause: Cause::Timeout,
        zone: "a",
        time_left_us: 1_000_000,
        accept: &[],
    };

    fn body(action: Action) -> Value {
        let Action::Respond(response) = action else {
            panic!("{action:?}")
        };
        assert_eq!(response.status, 200);
        serde_json::from_slice(&response.body).unwrap()
    }

    #[test]
    fn shows_what_is_popular_and_says_why() {
        let body = body(
            decide(
                r#"{"popular": ["tea", "soap", "rope"]}"#,
                &Facts {
                    query: Some("a=b&limit=2"),
                    ..FACTS
                },
            )
            .unwrap(),
        );
        assert_eq!(body["items"], json!(["tea", "soap"]));
        assert_eq!(body["because"], "recommendations are too slow");
    }

    #[test]
    fn another_service_is_asked_while_there_is_time() {
        let config = r#"{"popular": [], "service": "recommendations-lite"}"#;
        assert!(matches!(decide(config, &FACTS), Ok(Action::Reroute(s)) if s == "recommendations-lite"));
        assert!(matches!(
            decide(
                config,
                &Facts {
                    time_left_us: 1000,
                    ..FACTS
                }
            ),
            Ok(Action::Respond(_))
        ));
    }

    #[test]
    fn writes_are_declined() {
        assert!(matches!(
            decide(
                "",
                &Facts {
                    method: "POST",
                    ..FACTS
                }
            ),
            Ok(Action::Decline)
        ));
        assert!(decide("{}", &FACTS).is_err());
    }
    #[test]
    fn json_is_given_to_those_who_take_it() {
        for accept in [
            "",
            "*/*",
            "application/*;q=0.1",
            "text/html, Application/JSON",
            "text/*, */*;q=0.5",
        ] {
            assert!(accepts_json(&[accept.into()]), "{accept}");
        }
        for accept in [
            "text/html",
            "application/json;q=0",
            "application/json; q=0.0, */*",
            "application/xml",
        ] {
            assert!(!accepts_json(&[accept.into()]), "{accept}");
        }
        assert!(
            accepts_json(&[b"text/html".to_vec(), b"application/json".to_vec()]),
            "several fields are one list"
        );
        let html = [b"text/html".to_vec()];
        let facts = Facts {
            accept: &html,
            ..FACTS
        };
        assert!(matches!(
            decide(r#"{"popular": []}"#, &facts),
            Ok(Action::Decline)
        ));
        let other = decide(r#"{"popular": [], "service": "lite"}"#, &facts);
        assert!(
            matches!(other, Ok(Action::Reroute(_))),
            "another service may have what is wanted"
        );
    }
}

//! Hedges with partners: a request that failed is sent to one after the other, each for a bounded time, and the first good
//! answer is the answer. If none has one, what was kept is, however stale.
//!
//! The configuration is a JSON object: `partners` (services, in order, at most four), `patienceMs` (how long each is
//! waited for, default 150; never more than an even share of the time that is left), and `writes` (whether requests
//! that may have had an effect are sent, too; default false).
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: partner-hedge}
//! spec:
//!   kind: Fallback
//!   source: {file: /var/lib/leeward/partner-hedge.wasm}
//!   limits: {maxBody: 65536, maxCalls: 2}
//!   access: {services: [partner-a, partner-b]}
//!   onFault: NextRung
//! ---
//! kind: FallbackPolicy
//! metadata: {name: quotes}
//! spec:
//!   rungs:
//!     - plugin: {plugin: partner-hedge, config: '{"partners": ["partner-a", "partner-b"], "patienceMs": 100}'}
//! ```

use leeward_plugin::mesh::Call;
use leeward_plugin::{Action, FailedRequest, Fallback, Header, Level, Memo, Response, count, log, time_left};
use serde::Deserialize;
use std::time::Duration;

struct PartnerHedge;

/// The rung's configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Config {
    partners: Vec<String>,
    #[serde(default = "patience")]
    patience_ms: u64,
    #[serde(default)]
    writes: bool,
}

const fn patience() -> u64 {
    150
}

/// Most partners that are asked.
const PARTNERS: usize = 4;
/// What is left for the answer's own way back.
const RESERVE: Duration = Duration::from_millis(5);
/// Fields that hold for one hop, or that the proxy sets itself.
const OF_THE_HOP: [&str; 10] = [
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

thread_local! {
    static CONFIG: Memo<Config> = const { Memo::new() };
}

impl Fallback for PartnerHedge {
    fn on_failure(request: &FailedRequest) -> Action {
        let config = match CONFIG.with(|memo| memo.get(&request.config(), parse)) {
            Ok(config) => config,
            Err(error) => {
                log(Level::Error, &error);
                return Action::Decline;
            }
        };
        if !may_be_sent(&request.method(), config.writes) {
            return Action::Decline;
        }
        for (nth, partner) in config.partners.iter().enumerate() {
            let Some(wait) = wait(&config, time_left(), config.partners.len() - nth) else {
                break;
            };
            match ask(request, partner, wait) {
                Ok(response) => {
                    count("answered", 1);
                    return Action::Respond(passed_on(response, partner));
                }
                Err(why) => log(Level::Info, &format!("{partner}: {why}")),
            }
        }
        if request.kept().is_some() {
            Action::Stale
        } else {
            Action::Decline
        }
    }
}

fn parse(text: &str) -> Result<Config, String> {
    let config: Config =
        serde_json::from_str(text).map_err(|e| format!("the rung's config is wrong: {e}"))?;
    let n = config.partners.len();
    if !(1..=PARTNERS).contains(&n) {
        return Err(format!(
            "the rung's config is wrong: partners has {n} names; want 1 to {PARTNERS}"
        ));
    }
    Ok(config)
}

/// RFC 9110 section 9.2.1: what is safe can be sent anywhere.
fn may_be_sent(method: &str, writes: bool) -> bool {
    writes || matches!(method, "GET" | "HEAD" | "OPTIONS")
}

/// How long to wait for the next of so many partners; none if there is no time to speak of.
fn wait(config: &Config, left: Duration, partners: usize) -> Option<Duration> {
    let share = left.checked_sub(RESERVE)? / u32::try_from(partners).unwrap_or(u32::MAX).max(1);
    let wait = Duration::from_millis(config.patience_ms).min(share);
    (wait >= Duration::from_millis(1)).then_some(wait)
}

fn ask(request: &FailedRequest, partner: &str, wait: Duration) -> Result<Response, String> {
    let mut call = Call::new(&request.method(), partner, &request.path_and_query()).timeout(wait);
    call.headers = of_the_message(request.headers());
    if let Some(body) = request.body() {
        call = call.body(body);
    }
    let response = call.send().map_err(|e| e.name().to_owned())?;
    match response.status {
        200..=499 => Ok(response),
        status => Err(format!("answered {status}")),
    }
}

/// The fields that are the message's and not the connection's.
fn of_the_message(mut headers: Vec<Header>) -> Vec<Header> {
    headers.retain(|header| {
        !header.name.starts_with(':')
            && OF_THE_HOP
                .iter()
                .all(|name| !header.name.eq_ignore_ascii_case(name))
    });
    headers
}

fn passed_on(response: Response, partner: &str) -> Response {
    Response {
        headers: of_the_message(response.headers),
        ..response
    }
    .header("x-answered-by", partner)
}

leeward_plugin::fallback!(PartnerHedge);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_partner_gets_its_share_of_the_time() {
        let config = parse(r#"{"partners": ["a", "b"]}"#).unwrap();
        let ms = Duration::from_millis;
        assert_eq!(wait(&config, ms(1000), 2), Some(ms(150)));
        assert_eq!(wait(&config, ms(105), 2), Some(ms(50)));
        assert_eq!(wait(&config, ms(105), 1), Some(ms(100)));
        assert_eq!(wait(&config, ms(4), 1), None, "the way back takes the rest");
    }

    #[test]
    fn an_answer_is_passed_on_without_what_was_the_connections() {
        let answer = Response::new(200)
            .header("content-length", "3")
            .header("Connection", "close")
            .header("etag", "\"1\"")
            .body("abc");
        let passed = passed_on(answer, "partner-a");
        let names: Vec<_> = passed.headers.iter().map(|h| h.name.as_str()).collect();
        assert_eq!(names, ["etag", "x-answered-by"]);
        assert_eq!(passed.body, b"abc");
    }

    #[test]
    fn writes_are_sent_only_where_that_is_wanted() {
        assert!(may_be_sent("GET", false) && may_be_sent("POST", true));
        assert!(!may_be_sent("POST", false) && !may_be_sent("DELETE", false));
    }

    #[test]
    fn a_wrong_configuration_is_named() {
        assert!(parse(r#"{"partners": []}"#).err().unwrap().contains("0 names"));
        assert!(parse(r#"{"partner": ["a"]}"#).err().unwrap().contains("partner"));
    }
}

//! Does what a fallback plugin must not, as the rung's configuration says: a word of [`misbehave_tricks`], and what it is
//! about, with a space between them.

use leeward_plugin::{Action, FailedRequest, Fallback, Receipt, Response, count, time_left};
use misbehave_tricks as tricks;
use std::time::Duration;

struct Misbehave;

impl Fallback for Misbehave {
    fn on_failure(request: &FailedRequest) -> Action {
        let calls = tricks::calls();
        let config = request.config();
        let (word, about) = config.split_once(' ').unwrap_or((&config, ""));
        if tricks::act(word, about) {
            return Action::Decline;
        }
        if let Some(response) = tricks::answer(word, about) {
            return Action::Respond(response);
        }
        match word {
            "random" => {
                Action::Respond(Response::new(200).body(wasip2::random::random::get_random_u64().to_string()))
            }
            "name" => {
                count(&format!("call_{calls}"), 1);
                Action::Decline
            }
            "reroute" => Action::Reroute(if about.is_empty() { "somewhere" } else { about }.to_owned()),
            "enqueue" => Action::Enqueue(Receipt {
                queue: about.to_owned(),
                response: Response::new(202).body("taken in"),
            }),
            "stale" => Action::Stale,
            "calls" => Action::Respond(Response::new(200).body(calls.to_string())),
            "echo" => Action::Respond(Response::new(200).body(echo(request))),
            _ => Action::Decline,
        }
    }
}

/// Everything that a plugin can see, as text.
fn echo(request: &FailedRequest) -> String {
    let attempts: Vec<_> = request
        .attempts()
        .iter()
        .map(|a| {
            format!(
                "{} {} {:?} {:?} {}us",
                a.endpoint, a.zone, a.status, a.cause, a.duration_us
            )
        })
        .collect();
    format!(
        "{} {} {:?} {}\ncause {:?}\nattempts {attempts:?}\nservice {} route {} zone {}\nx-many {:?}\nheaders {}\nbody {:?}\nleft {}",
        request.method(),
        request.path(),
        request.query(),
        request.authority(),
        request.cause(),
        request.service(),
        request.route(),
        request.zone(),
        request
            .header("x-many")
            .iter()
            .map(|v| String::from_utf8_lossy(v).into_owned())
            .collect::<Vec<_>>(),
        request.headers().len(),
        request.body().map(|b| String::from_utf8_lossy(&b).into_owned()),
        time_left() <= Duration::from_secs(10),
    )
}

leeward_plugin::fallback!(Misbehave);

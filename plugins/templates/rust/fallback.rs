//! Answers reads with what its configuration says while the service doesn't.

use leeward_plugin::{Action, FailedRequest, Fallback, Level, Response, count, log};

struct Plugin;

impl Fallback for Plugin {
    fn on_failure(request: &FailedRequest) -> Action {
        log(Level::Info, &format!("{} failed: {:?}", request.service(), request.cause()));
        // Others could have had an effect.
        if !matches!(request.method().as_str(), "GET" | "HEAD") {
            return Action::Decline;
        }
        count("answers", 1);
        let response = Response::new(200)
            .header("content-type", "application/json")
            .header("cache-control", "no-store")
            .body(request.config());
        Action::Respond(response)
    }
}

leeward_plugin::fallback!(Plugin);

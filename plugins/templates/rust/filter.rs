//! Says in requests who sent them on, and takes out of answers what made them.

use leeward_plugin::{
    BodyMode, Filter, Interest, RequestHead, RequestVerdict, Response, ResponseHead, ResponseVerdict, count,
    fault,
};

const MARK: &str = "x-sent-on-by";

struct Plugin;

impl Filter for Plugin {
    fn on_request(request: &RequestHead) -> RequestVerdict {
        count("requests", 1);
        if !request.header(MARK).is_empty() {
            return RequestVerdict::Respond(Response::new(508).body("sent on already"));
        }
        if let Err(error) = request.set_header(MARK, request.config().as_bytes()) {
            fault(&format!("{MARK}: {}", error.name()));
        }
        RequestVerdict::Proceed(Interest {
            request_body: BodyMode::None,
            response: true,
        })
    }

    fn on_response(_: &RequestHead, response: &ResponseHead) -> ResponseVerdict {
        if let Err(error) = response.remove_header("server") {
            fault(&format!("server: {}", error.name()));
        }
        ResponseVerdict::Proceed(BodyMode::None)
    }
}

leeward_plugin::filter!(Plugin);

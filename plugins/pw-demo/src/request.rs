//! What is done for one request.

use crate::config::{Config, Replace};
use crate::{Metrics, bump, count_shared};
use log::{debug, warn};
use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

/// How long the service that decides is waited for.
const AUTH_PATIENCE: Duration = Duration::from_millis(200);

pub(crate) struct Request {
    config: Rc<Config>,
    metrics: Metrics,
    /// Where refused requests are told of.
    queue: Option<u32>,
    path: String,
    asked: Option<SystemTime>,
    /// As much of the body as waits for its end, which are trailers where there are some.
    held: usize,
}

impl Request {
    pub(crate) fn new(config: Rc<Config>, metrics: Metrics, queue: Option<u32>) -> Self {
        Self {
            config,
            metrics,
            queue,
            path: String::new(),
            asked: None,
            held: 0,
        }
    }

    fn refuse(&self, status: u32, why: &str) {
        if let Some(queue) = self.queue
            && let Err(status) = self.enqueue_shared_queue(queue, Some(self.path.as_bytes()))
        {
            warn!("a refused request isn't told of: {status:?}");
        }
        let body = format!("{why}\n");
        self.send_http_response(
            status,
            vec![("content-type", "text/plain"), ("x-pw-demo", "refused")],
            Some(body.as_bytes()),
        );
    }

    fn rewrite_request(&mut self) {
        let held = std::mem::take(&mut self.held);
        let rewritten = rewritten(
            self.config.request_body.as_ref(),
            self.get_http_request_body(0, held),
        );
        if let Some(body) = rewritten {
            self.set_http_request_body(0, held, &body);
        }
    }

    fn rewrite_response(&mut self) {
        let held = std::mem::take(&mut self.held);
        let rewritten = rewritten(
            self.config.response_body.as_ref(),
            self.get_http_response_body(0, held),
        );
        if let Some(body) = rewritten {
            self.set_http_response_body(0, held, &body);
        }
    }

    /// A property that is a text, if it is there.
    fn property(&self, path: Vec<&str>) -> Option<String> {
        self.get_property(path)
            .and_then(|bytes| String::from_utf8(bytes).ok())
    }
}

impl Context for Request {
    fn on_http_call_response(&mut self, _: u32, headers: usize, body: usize, _: usize) {
        if let Some(asked) = self.asked.take() {
            let took = self.get_current_time().duration_since(asked).unwrap_or_default();
            let _ = hostcalls::record_metric(
                self.metrics.auth_ms,
                u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            );
        }
        // A call that came to nothing has no answer.
        let status = (headers > 0)
            .then(|| self.get_http_call_response_header(":status"))
            .flatten();
        match status.as_deref() {
            Some("200") => {
                let user = self.get_http_call_response_header("x-user");
                self.set_http_request_header("x-auth-user", user.as_deref());
                self.resume_http_request();
            }
            Some(status) => {
                let why = self
                    .get_http_call_response_body(0, body.min(200))
                    .unwrap_or_default();
                debug!("auth says {status}: {}", String::from_utf8_lossy(&why));
                self.refuse(403, "not allowed");
            }
            None => self.refuse(503, "nobody can say whether this is allowed"),
        }
    }
}

impl HttpContext for Request {
    fn on_http_request_headers(&mut self, _: usize, end: bool) -> Action {
        bump(self.metrics.requests, 1);
        let before = count_shared();
        self.path = self.get_http_request_header(":path").unwrap_or_default();
        // Nobody says who they are but the service that is asked.
        self.set_http_request_header("x-auth-user", None);
        self.set_http_request_header("x-pw-count", Some(&(before + 1).to_string()));
        let source = self.property(vec!["source", "address"]);
        self.set_http_request_header("x-pw-source", source.as_deref());
        if self.config.request_body.is_some() && !end {
            self.set_http_request_header("content-length", None);
        }
        let Some(auth) = &self.config.auth else {
            return Action::Continue;
        };
        let method = self.get_http_request_header(":method").unwrap_or_default();
        let token = self.get_http_request_header("authorization").unwrap_or_default();
        let asked = self.dispatch_http_call(
            &auth.cluster,
            vec![
                (":method", "GET"),
                (":path", &auth.path),
                (":authority", &auth.cluster),
                ("authorization", &token),
                ("x-for-method", &method),
                ("x-for-path", &self.path),
            ],
            None,
            Vec::new(),
            AUTH_PATIENCE,
        );
        match asked {
            Ok(_) => self.asked = Some(self.get_current_time()),
            Err(status) => {
                warn!("auth can't be asked: {status:?}");
                self.refuse(503, "nobody can say whether this is allowed");
            }
        }
        Action::Pause
    }

    fn on_http_request_body(&mut self, size: usize, end: bool) -> Action {
        if self.config.request_body.is_none() {
            return Action::Continue;
        }
        self.held = size;
        if !end {
            return Action::Pause;
        }
        self.rewrite_request();
        Action::Continue
    }

    fn on_http_request_trailers(&mut self, _: usize) -> Action {
        self.rewrite_request();
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        // Replies of this filter's own come by here, too.
        if self.get_http_response_header("x-pw-demo").is_none() {
            let route = self.property(vec!["route_name"]);
            self.set_http_response_header("x-pw-demo", Some(route.as_deref().unwrap_or("passed")));
        }
        if self.config.response_body.is_some() {
            self.set_http_response_header("content-length", None);
        }
        Action::Continue
    }

    fn on_http_response_body(&mut self, size: usize, end: bool) -> Action {
        if self.config.response_body.is_none() {
            return Action::Continue;
        }
        self.held = size;
        if !end {
            return Action::Pause;
        }
        self.rewrite_response();
        Action::Continue
    }

    fn on_http_response_trailers(&mut self, _: usize) -> Action {
        self.rewrite_response();
        Action::Continue
    }

    fn on_log(&mut self) {
        let status = self.get_http_response_header(":status").unwrap_or_default();
        let plugin = self.property(vec!["plugin_name"]).unwrap_or_default();
        debug!("{plugin}: {} came to {status}", self.path);
    }
}

/// The body with what is to be replaced replaced; none if it stays as it is.
fn rewritten(replace: Option<&Replace>, body: Option<Vec<u8>>) -> Option<Vec<u8>> {
    replace?.apply(&body?)
}

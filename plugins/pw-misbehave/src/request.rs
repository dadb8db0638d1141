//! The context of one request.

use crate::tricks::{Kind, List, act};
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

pub(crate) struct Request {
    list: List,
}

impl Request {
    pub(crate) const fn new(list: List) -> Self {
        Self { list }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        act(&self.list, "delete", Kind::Request);
    }
}

impl Context for Request {
    fn on_http_call_response(&mut self, _: u32, _: usize, _: usize, _: usize) {
        if act(&self.list, "call_response", Kind::Request) == Action::Continue {
            self.resume_http_request();
        }
    }

    fn on_grpc_call_response(&mut self, _: u32, _: u32, _: usize) {
        if act(&self.list, "grpc_response", Kind::Request) == Action::Continue {
            self.resume_http_request();
        }
    }

    fn on_done(&mut self) -> bool {
        act(&self.list, "done", Kind::Request) != Action::Pause
    }
}

impl HttpContext for Request {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        if let Some(list) = self.get_http_request_header_bytes("x-misbehave") {
            self.list = List::of(Some(list));
        }
        act(&self.list, "request_headers", Kind::Request)
    }

    fn on_http_request_body(&mut self, _: usize, _: bool) -> Action {
        act(&self.list, "request_body", Kind::Request)
    }

    fn on_http_request_trailers(&mut self, _: usize) -> Action {
        act(&self.list, "request_trailers", Kind::Request)
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        act(&self.list, "response_headers", Kind::Response)
    }

    fn on_http_response_body(&mut self, _: usize, _: bool) -> Action {
        act(&self.list, "response_body", Kind::Response)
    }

    fn on_http_response_trailers(&mut self, _: usize) -> Action {
        act(&self.list, "response_trailers", Kind::Response)
    }

    fn on_log(&mut self) {
        act(&self.list, "log", Kind::Response);
    }
}

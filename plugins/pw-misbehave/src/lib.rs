//! Does what a proxy-wasm plugin must not, in each of its callbacks: for the tests of the host.
//!
//! What is to be done is a list, separated by `;`, of `CALLBACK:WORD` or `CALLBACK:WORD ABOUT`: of the VM's configuration for
//! `vm_start`; of the plugin's for `configure`, `tick`, `queue` and `root_*`; of the request's field `x-misbehave`, or else
//! the plugin's, for the rest. Callbacks: `vm_start`, `configure`, `tick`, `queue`, `root_call_response`, `create`,
//! `request_headers`, `request_body`, `request_trailers`, `response_headers`, `response_body`, `response_trailers`,
//! `call_response`, `grpc_response`, `done`, `log`, `delete`. Words: see [`act`](tricks::act).
//!
//! What a host function gave back that it shouldn't have is logged as an error that begins with `BUG`.

mod request;
mod tricks;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};
use request::Request;
use std::time::Duration;
use tricks::{Kind, List};

#[derive(Default)]
struct Root {
    list: List,
}

impl Context for Root {
    fn on_http_call_response(&mut self, _: u32, _: usize, _: usize, _: usize) {
        tricks::act(&self.list, "root_call_response", Kind::Root);
    }

    fn on_done(&mut self) -> bool {
        tricks::act(&self.list, "root_done", Kind::Root) != Action::Pause
    }
}

impl RootContext for Root {
    fn on_vm_start(&mut self, _: usize) -> bool {
        let list = List::of(self.get_vm_configuration());
        tricks::act(&list, "vm_start", Kind::Root) != Action::Pause
    }

    fn on_configure(&mut self, _: usize) -> bool {
        self.list = List::of(self.get_plugin_configuration());
        if self.list.has("tick") {
            self.set_tick_period(Duration::from_millis(20));
        }
        if self.list.has("queue") {
            let queue = self.register_shared_queue("pw-misbehave");
            let _ = self.enqueue_shared_queue(queue, Some(b"1"));
        }
        tricks::act(&self.list, "configure", Kind::Root) != Action::Pause
    }

    fn on_tick(&mut self) {
        tricks::act(&self.list, "tick", Kind::Root);
    }

    fn on_queue_ready(&mut self, _: u32) {
        tricks::act(&self.list, "queue", Kind::Root);
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        tricks::act(&self.list, "create", Kind::Root);
        Some(Box::new(Request::new(self.list.clone())))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

//! A proxy-wasm filter that reads one field of a request and sets another: what the benchmark measures, here and in Envoy.
//!
//! `x-bench-in` goes on as `x-bench-out`, or `none`.
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: pw-headers}
//! spec:
//!   kind: ProxyWasm
//!   source: {file: /var/lib/leeward/pw-headers.wasm}
//!   onFault: FailOpen
//! ```

use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

struct Headers;

impl Context for Headers {}

impl HttpContext for Headers {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let read = self.get_http_request_header_bytes("x-bench-in");
        self.set_http_request_header_bytes("x-bench-out", Some(read.as_deref().unwrap_or(b"none")));
        Action::Continue
    }
}

proxy_wasm::main! {{
    proxy_wasm::set_http_context(|_, _| Box::new(Headers));
}}

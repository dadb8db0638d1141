//! A filter that reads one field of a request and sets another: what the benchmark measures, beside the same as a
//! proxy-wasm module.
//!
//! `x-bench-in` goes on as `x-bench-out`, or `none`.
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: headers}
//! spec:
//!   kind: Filter
//!   source: {file: /var/lib/leeward/headers.wasm}
//!   onFault: FailOpen
//! ```

use leeward_plugin::{Filter, Interest, RequestHead, RequestVerdict, fault};

struct Headers;

impl Filter for Headers {
    fn on_request(request: &RequestHead) -> RequestVerdict {
        let read = request.header("x-bench-in");
        let value = read.first().map_or(b"none".as_slice(), Vec::as_slice);
        if let Err(error) = request.set_header("x-bench-out", value) {
            fault(error.name());
        }
        RequestVerdict::Proceed(Interest::NOTHING)
    }
}

leeward_plugin::filter!(Headers);

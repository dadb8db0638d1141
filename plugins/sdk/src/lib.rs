//! Write plugins for Leeward in Rust.
//!
//! A fallback plugin is a type that implements [`Fallback`], exported once:
//!
//! ```ignore
//! use leeward_plugin::{Action, FailedRequest, Fallback, Response};
//!
//! struct Sorry;
//!
//! impl Fallback for Sorry {
//!     fn on_failure(request: &FailedRequest) -> Action {
//!         if request.method() != "GET" {
//!             return Action::Decline;
//!         }
//!         Action::Respond(Response::new(200).header("content-type", "text/plain").body("back soon"))
//!     }
//! }
//!
//! leeward_plugin::export!(Sorry);
//! ```
//!
//! Build it with `cargo build --release --target wasm32-wasip2` and name the file in a Plugin resource.
//!
//! Instances are reused: what a call leaves in statics, the next one on the same worker may see. A panic, a
//! call that takes longer than its limit, or memory beyond its limit costs that call its fallback and the
//! instance its life, and nothing else.
//!
//! A plugin has no network, files, environment, clock, standard output or random numbers, though the standard
//! library offers them: a call that needs one traps. Note that a `HashMap` asks for random numbers on
//! `wasm32-wasip2`; use a `BTreeMap`. Write to the proxy's log with [`log()`].

#[doc(hidden)]
pub mod bindings {
    wit_bindgen::generate!({
        path: "../wit-0.1",
        world: "fallback",
        pub_export_macro: true,
        default_bindings_module: "leeward_plugin::bindings",
        export_macro_name: "export_world",
    });
}

pub use bindings::leeward::plugin::host::Level;
pub use bindings::leeward::plugin::types::{Action, Attempt, Cause, FailedRequest, Header, Response};

/// What a fallback plugin does.
pub trait Fallback {
    /// Called once for each failed request that reaches the plugin's rung.
    fn on_failure(request: &FailedRequest) -> Action;
}

/// Writes a line to the proxy's log, under the plugin's name. At most 1 KiB of it is kept, and at most 100
/// lines for each call.
pub fn log(level: Level, message: &str) {
    bindings::leeward::plugin::host::log(level, message);
}

/// Adds to a counter of the plugin's own: `leeward_plugin_custom_total{plugin,name}`. Names are
/// `[a-z0-9_]`, at most 63 bytes, at most 32 for each plugin.
pub fn count(name: &str, by: u64) {
    bindings::leeward::plugin::host::count(name, by);
}

impl Response {
    /// An answer with a status (200 to 599) and nothing else.
    pub fn new(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    /// Adds a field.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push(Header {
            name: name.to_owned(),
            value: value.as_bytes().to_vec(),
        });
        self
    }

    /// Sets the body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }
}

impl FailedRequest {
    /// The first value of a header (by its lower-case name), if it is there and is UTF-8.
    pub fn header_text(&self, name: &str) -> Option<String> {
        self.header(name)
            .into_iter()
            .next()
            .and_then(|value| String::from_utf8(value).ok())
    }
}

/// Makes a type that implements [`Fallback`] the plugin of this crate.
#[macro_export]
macro_rules! export {
    ($plugin:ty) => {
        const _: () = {
            struct Exported;

            impl $crate::bindings::Guest for Exported {
                fn on_failure(request: &$crate::FailedRequest) -> $crate::Action {
                    <$plugin as $crate::Fallback>::on_failure(request)
                }
            }

    $crate::bindings::export_world!(Exported with_types_in $crate::bindings);
        };
    };
}

//! Calls of other services through the mesh: by the service's policy (endpoints, retries, circuit, mTLS), without a
//! route and a fallback.
//!
//! ```no_run
//! use leeward_plugin::mesh::{Call, CallError};
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), CallError> {
//! let answer = Call::get("catalog", "/items?limit=5")
//!     .header("accept", "application/json")
//!     .timeout(Duration::from_millis(50))
//!     .send()?;
//! if answer.status == 200 {
//!     // ...
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Policy names the services that a plugin may call: Plugin.access.services. The time that a call waits isn't counted
//! against the plugin's time limit, but the request's deadline holds.

pub use crate::bindings::leeward::plugin::mesh::{Call, CallError};
use crate::bindings::leeward::plugin::{mesh, types::Header};
use crate::host::millis;
use crate::response::Response;
use std::time::Duration;

impl Call {
    /// A call of a service, with a method, and a path with its query, which begins with "/".
    pub fn new(method: &str, service: &str, path: &str) -> Self {
        Self {
            service: service.to_owned(),
            method: method.to_owned(),
            path: path.to_owned(),
            headers: Vec::new(),
            body: Vec::new(),
            timeout_ms: None,
        }
    }

    /// A GET of a service's path.
    pub fn get(service: &str, path: &str) -> Self {
        Self::new("GET", service, path)
    }

    /// A POST to a service's path.
    pub fn post(service: &str, path: &str) -> Self {
        Self::new("POST", service, path)
    }

    /// Adds a field. At most 64 KiB of them are sent. Host is the service's own unless it is given.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.headers.push(Header::new(name, value));
        self
    }

    /// Sets the body, of at most 1 MiB.
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// Sets the body to a value as JSON, and says so in Content-Type.
    ///
    /// # Errors
    ///
    /// If the value can't be JSON, as a map whose keys aren't texts.
    #[cfg(feature = "json")]
    pub fn json(self, value: &impl serde::Serialize) -> serde_json::Result<Self> {
        let body = serde_json::to_vec(value)?;
        Ok(self.header("content-type", "application/json").body(body))
    }

    /// How long to wait at most; never longer than the time that is left for the request.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout_ms = Some(millis(timeout));
        self
    }

    /// Sends it and waits for the whole answer, whatever its status.
    ///
    /// # Errors
    ///
    /// [`CallError`] says why there is no answer: the plugin may not call that service, the call isn't valid HTTP, the
    /// plugin has made Plugin.limits.maxCalls calls already, plugins call each other in a loop, the time is up, the
    /// service can't be reached, or its answer has more than 1 MiB.
    pub fn send(&self) -> Result<Response, CallError> {
        mesh::send(self)
    }
}

//! Answers.

use crate::bindings::leeward::plugin::types::Header;
pub(crate) use crate::bindings::leeward::plugin::types::Response;

impl Header {
    /// A field. Names that are sent are written in lower case.
    pub fn new(name: &str, value: impl AsRef<[u8]>) -> Self {
        Self {
            name: name.to_ascii_lowercase(),
            value: value.as_ref().to_vec(),
        }
    }
}

/// ```no_run
/// use leeward_plugin::Response;
///
/// let text = Response::new(503).header("retry-after", "30").body("back soon");
/// let json = Response::new(200).json(&["tea", "soap"]);
/// ```
impl Response {
    /// An answer with a status (200 to 599) and nothing else.
    pub fn new(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    /// Adds a field; at most 64 KiB of them. Hop-by-hop fields, Content-Length, and what isn't valid HTTP count as a
    /// fault of the plugin.
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

    /// Sets the body to a value as JSON, and says so in Content-Type, unless that is there.
    ///
    /// # Errors
    ///
    /// If the value can't be JSON, as a map whose keys aren't texts.
    #[cfg(feature = "json")]
    pub fn json(self, value: &impl serde::Serialize) -> serde_json::Result<Self> {
        let body = serde_json::to_vec(value)?;
        let named = if self.first("content-type").is_some() {
            self
        } else {
            self.header("content-type", "application/json")
        };
        Ok(named.body(body))
    }

    /// Reads the body as JSON.
    ///
    /// # Errors
    ///
    /// If it is not JSON, or not what is wanted.
    #[cfg(feature = "json")]
    pub fn read_json<T: serde::de::DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_slice(&self.body)
    }

    /// The first value of a field, whatever the case of its name.
    pub fn first(&self, name: &str) -> Option<&[u8]> {
        self.headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case(name))
            .map(|header| header.value.as_slice())
    }
}

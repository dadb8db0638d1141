//! What a guest sees and may do: the host's half of `plugins/wit`.

use crate::bindings::leeward::plugin::{host, types};
use crate::counters::Counters;
use leeward_policy::model::Cause;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wasmtime::component::{Resource, ResourceTable};
use wasmtime::{Error, ResourceLimiter};

/// A call that failed, as it is told to a plugin.
#[derive(Clone, Debug)]
pub struct FailedCall {
    /// The method.
    pub method: String,
    /// The path without the query.
    pub path: String,
    /// The query without "?".
    pub query: Option<String>,
    /// Host and port as the client sent them.
    pub authority: String,
    /// All headers, names in lower case.
    pub headers: Vec<(Box<str>, Vec<u8>)>,
    /// The body, if policy hands it over and all of it is there.
    pub body: Option<Vec<u8>>,
    /// Why the call failed.
    pub cause: Cause,
    /// Every attempt made, in order.
    pub attempts: Vec<CallAttempt>,
    /// The service that was called.
    pub service: Arc<str>,
    /// The route and rule that matched, as `ROUTE/RULE`.
    pub route: Arc<str>,
    /// The zone of this proxy.
    pub zone: Arc<str>,
    /// The rung's configuration.
    pub config: Arc<str>,
}

/// One try to reach an endpoint.
#[derive(Clone, Debug)]
pub struct CallAttempt {
    /// IP:PORT of the endpoint.
    pub endpoint: Arc<str>,
    /// Its zone.
    pub zone: Arc<str>,
    /// The status of its answer, if it answered.
    pub status: Option<u16>,
    /// What went wrong, if anything.
    pub cause: Option<Cause>,
    /// How long it took.
    pub duration: Duration,
}

/// What stands behind a guest's handle of the failed request.
#[derive(Debug)]
#[allow(unreachable_pub, reason = "the generated bindings re-export it")]
pub struct FailedRequest {
    pub(crate) call: FailedCall,
    pub(crate) deadline: Option<Instant>,
}

/// The state of one instance.
pub(crate) struct State {
    pub(crate) plugin: Arc<str>,
    pub(crate) table: ResourceTable,
    /// When the call under way must end.
    pub(crate) until: Instant,
    /// Linear memory allowed, in bytes.
    pub(crate) memory_limit: usize,
    /// Linear memory in use.
    memory: usize,
    /// Growth was refused during this call.
    pub(crate) memory_denied: bool,
    /// Log lines left in this call.
    pub(crate) lines: u32,
    /// What the guest counted in this call.
    pub(crate) counts: HashMap<String, u64>,
    /// What it may count under.
    counters: Arc<Counters>,
}

/// Log lines of one call.
pub(crate) const MAX_LINES: u32 = 100;
/// Bytes of a log line that are kept.
const MAX_LINE: usize = 1024;
/// Where counts go that found no room.
const OVERFLOW: &str = "overflow";
/// Elements of a table; what compilers emit is far below.
pub(crate) const MAX_TABLE: usize = 20_000;
/// Core instances, memories and tables that a component is made of. One from a linker has one memory, and a
/// handful of the others to tie its parts together.
const MAX_PARTS: usize = 16;

impl State {
    pub(crate) fn new(
        plugin: Arc<str>,
        counters: Arc<Counters>,
        memory_limit: usize,
        until: Instant,
    ) -> Self {
        Self {
            plugin,
            table: ResourceTable::new(),
            until,
            memory_limit,
            memory: 0,
            memory_denied: false,
            lines: MAX_LINES,
            counts: HashMap::new(),
            counters,
        }
    }
}

impl ResourceLimiter for State {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> Result<bool, Error> {
        let total = self.memory.saturating_add(desired.saturating_sub(current));
        let allowed = total <= self.memory_limit;
        if allowed {
            self.memory = total;
        } else {
            self.memory_denied = true;
        }
        Ok(allowed)
    }

    fn memory_grow_failed(&mut self, _: Error) -> Result<(), Error> {
        // Refused further down: by the module's own maximum, the pool's, or the system.
        self.memory_denied = true;
        Ok(())
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> Result<bool, Error> {
        Ok(desired <= MAX_TABLE)
    }

    fn instances(&self) -> usize {
        MAX_PARTS
    }

    fn memories(&self) -> usize {
        MAX_PARTS
    }

    fn tables(&self) -> usize {
        MAX_PARTS
    }
}

impl types::Host for State {}

impl host::Host for State {
    fn log(&mut self, level: host::Level, message: String) -> Result<(), Error> {
        if self.lines == 0 {
            return Ok(());
        }
        self.lines -= 1;
        let end = message.floor_char_boundary(MAX_LINE);
        // A line break would let a guest write what looks like a line of the proxy's own.
        let message = printable(message.get(..end).unwrap_or_default());
        let (plugin, message) = (&*self.plugin, &*message);
        match level {
            host::Level::Debug => tracing::debug!(plugin, message),
            host::Level::Info => tracing::info!(plugin, message),
            host::Level::Warn => tracing::warn!(plugin, message),
            host::Level::Error => tracing::error!(plugin, message),
        }
        Ok(())
    }

    fn count(&mut self, name: String, by: u64) -> Result<(), Error> {
        let admitted = self.counts.contains_key(&name) || self.counters.admit(&name);
        let name = if admitted { name } else { OVERFLOW.to_owned() };
        let count = self.counts.entry(name).or_default();
        *count = count.saturating_add(by);
        Ok(())
    }
}

/// `text` with its control characters written out.
fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

impl State {
    fn request(&self, handle: &Resource<FailedRequest>) -> Result<&FailedRequest, Error> {
        Ok(self.table.get(handle)?)
    }
}

impl types::HostFailedRequest for State {
    fn method(&mut self, this: Resource<FailedRequest>) -> Result<String, Error> {
        Ok(self.request(&this)?.call.method.clone())
    }

    fn path(&mut self, this: Resource<FailedRequest>) -> Result<String, Error> {
        Ok(self.request(&this)?.call.path.clone())
    }

    fn query(&mut self, this: Resource<FailedRequest>) -> Result<Option<String>, Error> {
        Ok(self.request(&this)?.call.query.clone())
    }

    fn authority(&mut self, this: Resource<FailedRequest>) -> Result<String, Error> {
        Ok(self.request(&this)?.call.authority.clone())
    }

    fn header(&mut self, this: Resource<FailedRequest>, name: String) -> Result<Vec<Vec<u8>>, Error> {
        let headers = &self.request(&this)?.call.headers;
        Ok(headers
            .iter()
            .filter(|(n, _)| **n == *name)
            .map(|(_, value)| value.clone())
            .collect())
    }

    fn headers(&mut self, this: Resource<FailedRequest>) -> Result<Vec<types::Header>, Error> {
        let header = |(name, value): &(Box<str>, Vec<u8>)| types::Header {
            name: name.to_string(),
            value: value.clone(),
        };
        Ok(self.request(&this)?.call.headers.iter().map(header).collect())
    }

    fn body(&mut self, this: Resource<FailedRequest>) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.request(&this)?.call.body.clone())
    }

    fn cause(&mut self, this: Resource<FailedRequest>) -> Result<types::Cause, Error> {
        Ok(cause(self.request(&this)?.call.cause))
    }

    fn attempts(&mut self, this: Resource<FailedRequest>) -> Result<Vec<types::Attempt>, Error> {
        let attempt = |a: &CallAttempt| types::Attempt {
            endpoint: a.endpoint.to_string(),
            zone: a.zone.to_string(),
            status: a.status,
            cause: a.cause.map(cause),
            duration_us: u64::try_from(a.duration.as_micros()).unwrap_or(u64::MAX),
        };
        Ok(self.request(&this)?.call.attempts.iter().map(attempt).collect())
    }

    fn service(&mut self, this: Resource<FailedRequest>) -> Result<String, Error> {
        Ok(self.request(&this)?.call.service.to_string())
    }

    fn route(&mut self, this: Resource<FailedRequest>) -> Result<String, Error> {
        Ok(self.request(&this)?.call.route.to_string())
    }

    fn zone(&mut self, this: Resource<FailedRequest>) -> Result<String, Error> {
        Ok(self.request(&this)?.call.zone.to_string())
    }

    fn time_left_us(&mut self, this: Resource<FailedRequest>) -> Result<u64, Error> {
        let now = tokio::time::Instant::now().into_std();
        let left =
            |at: Instant| u64::try_from(at.saturating_duration_since(now).as_micros()).unwrap_or(u64::MAX);
        Ok(self.request(&this)?.deadline.map_or(u64::MAX, left))
    }

    fn config(&mut self, this: Resource<FailedRequest>) -> Result<String, Error> {
        Ok(self.request(&this)?.call.config.to_string())
    }

    fn drop(&mut self, this: Resource<FailedRequest>) -> Result<(), Error> {
        // Guests only borrow it, so this is a handle that the host made.
        self.table.delete(this)?;
        Ok(())
    }
}

const fn cause(cause: Cause) -> types::Cause {
    match cause {
        Cause::ConnectFailure => types::Cause::ConnectFailure,
        Cause::Timeout => types::Cause::Timeout,
        Cause::Reset => types::Cause::Reset,
        Cause::NoEndpoint => types::Cause::NoEndpoint,
        Cause::Overflow => types::Cause::Overflow,
        Cause::UpstreamStatus => types::Cause::UpstreamStatus,
        // Version 0.1 of the contract has one word for all that the proxy itself refuses; more words would be
        // another type, which components that were built against it don't fit.
        Cause::CircuitOpen | Cause::Overloaded | Cause::RateLimited | Cause::Disabled => {
            types::Cause::Overflow
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logged_text_stays_on_its_line() {
        assert_eq!(printable("plain \u{e9}"), "plain \u{e9}");
        assert_eq!(printable("a\nERROR b\u{1b}[31m"), "a\\nERROR b\\u{1b}[31m");
    }
}

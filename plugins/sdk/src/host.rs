//! What a plugin may ask at any time.

use crate::bindings::leeward::plugin::host;
pub use host::{FlagValue, Level};
use std::time::Duration;

/// Writes a line to the proxy's log, under the plugin's name. At most 1 KiB of it is kept, and at most
/// Plugin.limits.logLines lines for each call; control characters are written out.
///
/// ```no_run
/// leeward_plugin::log(leeward_plugin::Level::Warn, "the catalogue has no prices");
/// ```
pub fn log(level: Level, message: &str) {
    host::log(level, message);
}

/// Adds to a counter of the plugin's own: `leeward_plugin_custom_total{plugin,name}`. Names are `[a-z0-9_]`, at most
/// 63 bytes, and at most 32 for each plugin; others are counted as `overflow`.
///
/// ```no_run
/// leeward_plugin::count("answers", 1);
/// ```
pub fn count(name: &str, by: u64) {
    host::count(name, by);
}

/// Ends the call in a fault, with a line in the log that says why: Plugin.onFault decides what becomes of the request. For
/// what a plugin must not pass over, such as a configuration that it can't read.
pub fn fault(message: &str) -> ! {
    log(Level::Error, message);
    panic!("{message}")
}

/// Evaluates a feature flag for the request in hand, as policy's conditions do. None if there is no such flag, or it
/// is disabled.
///
/// ```no_run
/// use leeward_plugin::{FlagValue, flag};
///
/// let strict = flag("strict-checks").and_then(|value| value.as_bool()).unwrap_or(true);
/// ```
pub fn flag(key: &str) -> Option<FlagValue> {
    host::flag(key)
}

/// Time left until the call's time limit or the request's deadline, whichever is sooner.
///
/// ```no_run
/// use std::time::Duration;
///
/// if leeward_plugin::time_left() > Duration::from_millis(100) {
///     // There is time to ask another service.
/// }
/// ```
pub fn time_left() -> Duration {
    Duration::from_micros(host::time_left_us())
}

impl FlagValue {
    /// The value, if it is a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Boolean(value) => Some(*value),
            Self::Text(_) | Self::Number(_) | Self::Structure(_) => None,
        }
    }

    /// The value, if it is a string.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(value) => Some(value),
            Self::Boolean(_) | Self::Number(_) | Self::Structure(_) => None,
        }
    }

    /// The value, if it is a number.
    pub fn as_number(&self) -> Option<f64> {
        match self {
            Self::Number(value) => Some(*value),
            Self::Boolean(_) | Self::Text(_) | Self::Structure(_) => None,
        }
    }
}

/// A duration as the contract has it; what doesn't fit is as long as can be.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The first value that is UTF-8.
pub(crate) fn text(values: Vec<Vec<u8>>) -> Option<String> {
    values
        .into_iter()
        .next()
        .and_then(|value| String::from_utf8(value).ok())
}

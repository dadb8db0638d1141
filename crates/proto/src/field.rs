//! Fields: where they are, what is wrong with them.

use leeward_policy::Name;
use prost_types::Duration as WireDuration;
use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

/// One rejected field: its path, and what is wrong with its value.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct BadField {
    /// The path as it stands in YAML, such as `spec.rules[0].timeouts.request`.
    pub path: String,
    /// What is wrong, the value, and what would be right.
    pub reason: String,
}

/// Collects what is wrong while a message is read.
#[derive(Debug, Default)]
pub(crate) struct Fields {
    bad: Vec<BadField>,
}

impl Fields {
    /// Notes a bad field; returns `None` so that it can end a `filter_map` or a `match`.
    pub(crate) fn reject<T>(&mut self, path: impl Into<String>, reason: impl Display) -> Option<T> {
        self.bad.push(BadField {
            path: path.into(),
            reason: reason.to_string(),
        });
        None
    }

    /// The value, unless anything was bad.
    pub(crate) fn finish<T>(self, value: Option<T>) -> Result<T, Vec<BadField>> {
        match value {
            Some(value) if self.bad.is_empty() => Ok(value),
            Some(_) => Err(self.bad),
            None if self.bad.is_empty() => Err(vec![BadField {
                path: String::new(),
                reason: "can't be read".to_owned(),
            }]),
            None => Err(self.bad),
        }
    }

    pub(crate) fn name(&mut self, path: &str, text: &str) -> Option<Name> {
        if text.is_empty() {
            return self.reject(path, "is missing; a name is 1 to 63 bytes of a-z, 0-9 and '-'");
        }
        Name::parse(text)
            .or_else(|e| self.reject(path, format!("{text:?} {e}")).ok_or(()))
            .ok()
    }

    pub(crate) fn optional_name(&mut self, path: &str, text: &str) -> Option<Name> {
        if text.is_empty() {
            None
        } else {
            self.name(path, text)
        }
    }

    pub(crate) fn address(&mut self, path: &str, text: &str) -> Option<SocketAddr> {
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() != 0 => Some(address),
            Ok(_) => self.reject(path, format!("{text:?} has port 0; want a port from 1 to 65535")),
            Err(_) if text.is_empty() => self.reject(path, "is missing; want IP:PORT, such as 10.0.0.7:8080"),
            Err(_) => self.reject(path, format!("{text:?} is not IP:PORT, such as 10.0.0.7:8080")),
        }
    }

    pub(crate) fn count(&mut self, path: &str, len: usize, range: RangeInclusive<usize>) {
        if !range.contains(&len) {
            let (low, high) = (range.start(), range.end());
            self.reject::<()>(path, format!("has {len} entries; want {low} to {high}"));
        }
    }

    pub(crate) fn number(&mut self, path: &str, value: u64, default: u64, range: RangeInclusive<u64>) -> u64 {
        let value = if value == 0 && !range.contains(&0) {
            default
        } else {
            value
        };
        if !range.contains(&value) {
            let (low, high) = (range.start(), range.end());
            self.reject::<()>(path, format!("{value} is out of range; want {low} to {high}"));
        }
        value
    }

    pub(crate) fn small(&mut self, path: &str, value: u32, default: u32, range: RangeInclusive<u32>) -> u32 {
        let wide = u64::from(*range.start())..=u64::from(*range.end());
        let value = self.number(path, value.into(), default.into(), wide);
        u32::try_from(value).unwrap_or(u32::MAX)
    }

    pub(crate) fn duration(
        &mut self,
        path: &str,
        value: Option<&WireDuration>,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        let Some(value) = value else { return default };
        let Ok(duration) = Duration::try_from(*value) else {
            self.reject::<()>(path, "is negative or too long for a duration");
            return default;
        };
        if !range.contains(&duration) {
            let text = |d: &Duration| crate::manifest::duration_text(*d);
            let (low, high) = (text(range.start()), text(range.end()));
            self.reject::<()>(
                path,
                format!("{} is out of range; want {low} to {high}", text(&duration)),
            );
        }
        duration
    }

    pub(crate) fn unique<T: PartialEq + Display>(&mut self, path: &str, field: &str, values: &[T]) {
        for (i, value) in values.iter().enumerate() {
            if let Some(first) = values.iter().take(i).position(|earlier| earlier == value) {
                self.reject::<()>(
                    format!("{path}[{i}]{field}"),
                    format!("{value} stands at {path}[{first}] already; each must stand once"),
                );
            }
        }
    }
}

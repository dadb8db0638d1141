//! Fields: where they are, what is wrong with them.

use leeward_policy::Name;
use prost_types::Duration as WireDuration;
use std::collections::{BTreeMap, HashMap};
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

/// The fields of one message, which share the beginning of their paths.
#[derive(Debug)]
pub(crate) struct Section<'a> {
    fields: &'a mut Fields,
    path: String,
}

impl Section<'_> {
    /// The path of one of its fields.
    pub(crate) fn at(&self, field: &str) -> String {
        format!("{}.{field}", self.path)
    }

    /// What collects the errors.
    pub(crate) fn fields(&mut self) -> &mut Fields {
        self.fields
    }

    /// A message in it.
    pub(crate) fn section(&mut self, field: &str) -> Section<'_> {
        let path = self.at(field);
        self.fields.section(path)
    }

    /// See [`Fields::reject`].
    pub(crate) fn reject<T>(&mut self, field: &str, reason: impl Display) -> Option<T> {
        self.fields.reject(self.at(field), reason)
    }

    /// Notes that the message itself is bad.
    pub(crate) fn reject_here<T>(&mut self, reason: impl Display) -> Option<T> {
        self.fields.reject(self.path.clone(), reason)
    }

    /// See [`Fields::small`].
    pub(crate) fn small(&mut self, field: &str, value: u32, default: u32, range: RangeInclusive<u32>) -> u32 {
        self.fields.small(&self.at(field), value, default, range)
    }

    /// See [`Fields::optional`].
    pub(crate) fn optional(
        &mut self,
        field: &str,
        value: Option<u32>,
        default: u32,
        range: RangeInclusive<u32>,
    ) -> u32 {
        self.fields.optional(&self.at(field), value, default, range)
    }

    /// See [`Fields::required`].
    pub(crate) fn required(&mut self, field: &str, value: u32, range: RangeInclusive<u32>) -> u32 {
        self.fields.required(&self.at(field), value, range)
    }

    /// See [`Fields::duration`].
    pub(crate) fn duration(
        &mut self,
        field: &str,
        value: Option<&WireDuration>,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        self.fields.duration(&self.at(field), value, default, range)
    }

    /// A duration that is none where it isn't said.
    pub(crate) fn optional_duration(
        &mut self,
        field: &str,
        value: Option<&WireDuration>,
        range: RangeInclusive<Duration>,
    ) -> Option<Duration> {
        value.map(|value| self.duration(field, Some(value), Duration::ZERO, range))
    }

    /// See [`Fields::number`].
    pub(crate) fn number(
        &mut self,
        field: &str,
        value: u64,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> u64 {
        self.fields.number(&self.at(field), value, default, range)
    }

    /// See [`Fields::name`].
    pub(crate) fn name(&mut self, field: &str, text: &str) -> Option<Name> {
        self.fields.name(&self.at(field), text)
    }

    /// Names, each once.
    pub(crate) fn names(&mut self, field: &str, texts: &[String], most: usize) -> Vec<Name> {
        let path = self.at(field);
        self.fields.count(&path, texts.len(), 0..=most);
        let mut names = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            names.extend(self.fields.name(&format!("{path}[{i}]"), text));
        }
        self.fields.unique(&path, "", texts);
        names
    }

    /// A limit of which zero says that there is none.
    pub(crate) fn limit(
        &mut self,
        field: &str,
        value: Option<&WireDuration>,
        default: Option<Duration>,
        range: RangeInclusive<Duration>,
    ) -> Option<Duration> {
        match value {
            None => default,
            Some(value) if value.seconds == 0 && value.nanos == 0 => None,
            Some(_) => Some(self.duration(field, value, Duration::ZERO, range)),
        }
    }
}

impl Fields {
    /// The fields of one message.
    pub(crate) fn section(&mut self, path: impl Into<String>) -> Section<'_> {
        Section {
            fields: self,
            path: path.into(),
        }
    }

    /// Notes a bad field; returns `None` so that it can end a `filter_map` or a `match`.
    pub(crate) fn reject<T>(&mut self, path: impl Into<String>, reason: impl Display) -> Option<T> {
        self.bad.push(BadField {
            path: path.into(),
            reason: reason.to_string(),
        });
        None
    }

    /// Notes bad fields that were found elsewhere.
    pub(crate) fn extend(&mut self, bad: impl IntoIterator<Item = BadField>) {
        self.bad.extend(bad);
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

    /// A number that is its default when it isn't said, and of which 0 says something.
    pub(crate) fn optional(
        &mut self,
        path: &str,
        value: Option<u32>,
        default: u32,
        range: RangeInclusive<u32>,
    ) -> u32 {
        value.map_or(default, |value| self.small(path, value, value, range))
    }

    /// A number without a default.
    pub(crate) fn required(&mut self, path: &str, value: u32, range: RangeInclusive<u32>) -> u32 {
        if value == 0 {
            let (low, high) = (range.start(), range.end());
            self.reject::<()>(path, format!("is missing; want {low} to {high}"));
            return *range.start();
        }
        self.small(path, value, 0, range)
    }

    /// A list of statuses, sorted, each once.
    pub(crate) fn statuses(
        &mut self,
        path: &str,
        values: &[u32],
        most: usize,
        range: RangeInclusive<u16>,
    ) -> Vec<u16> {
        self.count(path, values.len(), 0..=most);
        let mut statuses = Vec::new();
        for (i, value) in values.iter().enumerate() {
            match u16::try_from(*value) {
                Ok(status) if range.contains(&status) => statuses.push(status),
                Ok(_) | Err(_) => {
                    let (low, high) = (range.start(), range.end());
                    self.reject::<()>(
                        format!("{path}[{i}]"),
                        format!("{value} is out of range; want {low} to {high}"),
                    );
                }
            }
        }
        statuses.sort_unstable();
        statuses.dedup();
        statuses
    }

    /// At most 16 labels with keys of 1 to 63 bytes and values of up to 63.
    pub(crate) fn labels(
        &mut self,
        path: &str,
        labels: &HashMap<String, String>,
    ) -> BTreeMap<Box<str>, Box<str>> {
        self.count(path, labels.len(), 0..=16);
        // In order of the keys, so that the same mistakes are told in the same order.
        let labels: BTreeMap<Box<str>, Box<str>> = labels
            .iter()
            .map(|(k, v)| (k.as_str().into(), v.as_str().into()))
            .collect();
        for (key, value) in &labels {
            self.label(path, key, value);
        }
        labels
    }

    /// One label.
    pub(crate) fn label(&mut self, path: &str, key: &str, value: &str) {
        if key.is_empty() || key.len() > 63 || value.len() > 63 {
            self.reject::<()>(
                format!("{path}.{}", key.chars().take(63).collect::<String>()),
                "has a key or value that is too long; want keys of 1 to 63 bytes and values of up to 63",
            );
        }
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
        // No list may be longer; one that is was refused for it, and each with each takes time.
        for (i, value) in values.iter().enumerate().take(4096) {
            if let Some(first) = values.iter().take(i).position(|earlier| earlier == value) {
                self.reject::<()>(
                    format!("{path}[{i}]{field}"),
                    format!("{value} stands at {path}[{first}] already; each must stand once"),
                );
            }
        }
    }
}

//! Taking the fields out of a mapping, each as what it should be.

use super::super::{ManifestError, Place, parse_duration, parse_size};
use crate::yaml::{Node, Value};
use std::collections::HashMap;

/// A mapping whose fields are taken out one by one; what is left over is unknown.
pub(super) struct Fields<'a> {
    path: String,
    place: Place,
    entries: Vec<(String, Place, Node)>,
    asked: Vec<&'static str>,
    errors: &'a mut Vec<ManifestError>,
}

pub(super) type Errors = Vec<ManifestError>;
/// A field, and what its text becomes.
pub(super) type Named<T> = (&'static str, fn(String) -> T);

pub(super) fn object<T>(
    node: Node,
    errors: &mut Errors,
    read: impl FnOnce(&mut Fields<'_>) -> T,
) -> Option<T> {
    let Node { path, place, value } = node;
    match value {
        Value::Map(entries) => {
            let mut fields = Fields {
                path,
                place,
                entries,
                asked: Vec::new(),
                errors,
            };
            let object = read(&mut fields);
            fields.finish();
            Some(object)
        }
        other @ (Value::Null
        | Value::Bool(_)
        | Value::Integer(_)
        | Value::Float(_)
        | Value::Text(_)
        | Value::List(_)) => {
            errors.push(ManifestError::new(
                place,
                &path,
                format!("is {}; want a mapping", other.what()),
            ));
            None
        }
    }
}

/// The known word that a misspelt one is closest to, if it is close at all.
pub(super) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let score = |k: &str| strsim::jaro_winkler(&word.to_lowercase(), &k.to_lowercase());
    known
        .iter()
        .copied()
        .map(|k| (score(k), k))
        .filter(|(s, _)| *s > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

impl Fields<'_> {
    fn take(&mut self, field: &'static str) -> Option<Node> {
        self.asked.push(field);
        let at = self.entries.iter().position(|(key, _, _)| key == field)?;
        let (_, _, node) = self.entries.remove(at);
        (!matches!(node.value, Value::Null)).then_some(node)
    }

    pub(super) fn ignore(&mut self, field: &'static str) {
        drop(self.take(field));
    }

    pub(super) fn reject(&mut self, field: &str, reason: String) {
        let path = if self.path.is_empty() {
            field.to_owned()
        } else {
            format!("{}.{field}", self.path)
        };
        self.errors.push(ManifestError::new(self.place, &path, reason));
    }

    pub(super) fn reject_here(&mut self, reason: String) {
        self.errors
            .push(ManifestError::new(self.place, &self.path.clone(), reason));
    }

    fn wrong(&mut self, node: &Node, want: &str) {
        let reason = format!("is {}; want {want}", node.value.what());
        self.errors
            .push(ManifestError::new(node.place, &node.path, reason));
    }

    /// Names what was not asked for.
    fn finish(&mut self) {
        for (key, place, node) in std::mem::take(&mut self.entries) {
            let meant = nearest(&key, &self.asked).map(|k| format!("did you mean {k}?"));
            let hint = meant.unwrap_or_else(|| format!("want one of {}", self.asked.join(", ")));
            self.errors.push(ManifestError::new(
                place,
                &node.path,
                format!("there is no such field; {hint}"),
            ));
        }
    }

    fn as_text(&mut self, node: Node) -> Option<String> {
        match node.value {
            Value::Text(text) => Some(text),
            // What looks like a number or a boolean and stands for a text, such as a header's value.
            Value::Integer(value) => Some(value.to_string()),
            Value::Bool(value) => Some(value.to_string()),
            Value::Null | Value::Float(_) | Value::List(_) | Value::Map(_) => {
                self.wrong(&node, "a text");
                None
            }
        }
    }

    pub(super) fn text(&mut self, field: &'static str) -> String {
        self.take(field)
            .and_then(|node| self.as_text(node))
            .unwrap_or_default()
    }

    pub(super) fn number(&mut self, field: &'static str) -> u64 {
        self.take(field)
            .and_then(|node| self.as_number(&node))
            .unwrap_or_default()
    }

    fn as_number(&mut self, node: &Node) -> Option<u64> {
        if let Value::Integer(value) = node.value
            && let Ok(value) = u64::try_from(value)
        {
            return Some(value);
        }
        self.wrong(node, "a whole number that is not negative");
        None
    }

    fn as_small(&mut self, node: &Node) -> Option<u32> {
        let value = self.as_number(node)?;
        let small = u32::try_from(value).ok();
        if small.is_none() {
            let reason = format!("{value} is out of range; want at most {}", u32::MAX);
            self.errors
                .push(ManifestError::new(node.place, &node.path, reason));
        }
        small
    }

    /// A number of which 0 is never meant: on the wire 0 is "not said", and a 0 that was said must not become
    /// the default.
    pub(super) fn small(&mut self, field: &'static str) -> u32 {
        let Some(node) = self.take(field) else { return 0 };
        let value = self.as_small(&node);
        self.some(&node, value)
    }

    /// [`Fields::small`], for a larger number.
    pub(super) fn large(&mut self, field: &'static str) -> u64 {
        let Some(node) = self.take(field) else { return 0 };
        let value = self.as_number(&node);
        self.some(&node, value)
    }

    /// [`Fields::small`], for a size.
    pub(super) fn some_size(&mut self, field: &'static str) -> u64 {
        let Some(node) = self.take(field) else { return 0 };
        let value = self.as_size(&node);
        self.some(&node, value)
    }

    fn some<T: Default + PartialEq>(&mut self, node: &Node, value: Option<T>) -> T {
        if value == Some(T::default()) {
            self.errors.push(ManifestError::new(
                node.place,
                &node.path,
                "0 is out of range; want at least 1".to_owned(),
            ));
        }
        value.unwrap_or_default()
    }

    /// A number of which 0 is the default, too.
    pub(super) fn or_zero(&mut self, field: &'static str) -> u32 {
        self.optional_small(field).unwrap_or_default()
    }

    /// A number of which 0 is something else than the default.
    pub(super) fn optional_small(&mut self, field: &'static str) -> Option<u32> {
        let node = self.take(field)?;
        self.as_small(&node)
    }

    pub(super) fn optional_bool(&mut self, field: &'static str) -> Option<bool> {
        let node = self.take(field)?;
        if let Value::Bool(value) = node.value {
            return Some(value);
        }
        self.wrong(&node, "true or false");
        None
    }

    pub(super) fn duration(&mut self, field: &'static str) -> Option<prost_types::Duration> {
        let node = self.take(field)?;
        let parsed = match &node.value {
            Value::Text(text) => parse_duration(text),
            Value::Null
            | Value::Bool(_)
            | Value::Integer(_)
            | Value::Float(_)
            | Value::List(_)
            | Value::Map(_) => None,
        };
        match parsed.and_then(|d| prost_types::Duration::try_from(d).ok()) {
            Some(duration) => Some(duration),
            None => {
                let got = match &node.value {
                    Value::Text(text) => format!("{text:?} is not a duration"),
                    Value::Integer(value) => format!("{value} has no unit"),
                    other @ (Value::Null
                    | Value::Bool(_)
                    | Value::Float(_)
                    | Value::List(_)
                    | Value::Map(_)) => {
                        format!("is {}", other.what())
                    }
                };
                let reason = format!("{got}; want one such as 250ms, 1.5s or 2m");
                self.errors
                    .push(ManifestError::new(node.place, &node.path, reason));
                None
            }
        }
    }

    /// A time as RFC 3339 has it.
    pub(super) fn time(&mut self, field: &'static str) -> Option<prost_types::Timestamp> {
        let node = self.take(field)?;
        let Value::Text(text) = &node.value else {
            self.wrong(&node, "a time such as 2026-11-24T22:00:00Z");
            return None;
        };
        let time = text.parse().ok();
        if time.is_none() {
            let reason = format!("{text:?} is not a time; want one such as 2026-11-24T22:00:00Z");
            self.errors
                .push(ManifestError::new(node.place, &node.path, reason));
        }
        time
    }

    pub(super) fn size(&mut self, field: &'static str) -> u64 {
        self.optional_size(field).unwrap_or_default()
    }

    pub(super) fn optional_size(&mut self, field: &'static str) -> Option<u64> {
        let node = self.take(field)?;
        self.as_size(&node)
    }

    fn as_size(&mut self, node: &Node) -> Option<u64> {
        let parsed = match &node.value {
            Value::Integer(value) => u64::try_from(*value).ok(),
            Value::Text(text) => parse_size(text),
            Value::Null | Value::Bool(_) | Value::Float(_) | Value::List(_) | Value::Map(_) => None,
        };
        if parsed.is_none() {
            self.wrong(node, "a size such as 65536, 64KiB or 16MiB");
        }
        parsed
    }

    /// A mapping as JSON, whatever it has; its keys are sorted.
    pub(super) fn json(&mut self, field: &'static str) -> Option<String> {
        let node = self.take(field)?;
        if !matches!(node.value, Value::Map(_)) {
            self.wrong(&node, "a mapping");
            return None;
        }
        Some(self.as_json(node)?.to_string())
    }

    fn as_json(&mut self, node: Node) -> Option<serde_json::Value> {
        use serde_json::Value as Json;
        Some(match node.value {
            Value::Null => Json::Null,
            Value::Bool(value) => value.into(),
            Value::Integer(value) => value.into(),
            Value::Float(value) => match serde_json::Number::from_f64(value) {
                Some(number) => Json::Number(number),
                None => {
                    let reason = format!("{value} is not a number of JSON; want a finite one");
                    self.errors
                        .push(ManifestError::new(node.place, &node.path, reason));
                    return None;
                }
            },
            Value::Text(text) => Json::String(text),
            Value::List(items) => items.into_iter().filter_map(|item| self.as_json(item)).collect(),
            Value::Map(entries) => entries
                .into_iter()
                .filter_map(|(key, _, value)| Some((key, self.as_json(value)?)))
                .collect(),
        })
    }

    pub(super) fn object<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&mut Fields<'_>) -> T,
    ) -> Option<T> {
        let node = self.take(field)?;
        object(node, self.errors, read)
    }

    fn items(&mut self, field: &'static str) -> Vec<Node> {
        let Some(node) = self.take(field) else {
            return Vec::new();
        };
        match node.value {
            Value::List(items) => items,
            Value::Null
            | Value::Bool(_)
            | Value::Integer(_)
            | Value::Float(_)
            | Value::Text(_)
            | Value::Map(_) => {
                self.wrong(&node, "a list");
                Vec::new()
            }
        }
    }

    pub(super) fn list<T>(
        &mut self,
        field: &'static str,
        mut read: impl FnMut(&mut Fields<'_>) -> T,
    ) -> Vec<T> {
        let items = self.items(field);
        items
            .into_iter()
            .filter_map(|item| object(item, self.errors, &mut read))
            .collect()
    }

    pub(super) fn text_list(&mut self, field: &'static str) -> Vec<String> {
        let items = self.items(field);
        items.into_iter().filter_map(|item| self.as_text(item)).collect()
    }

    /// A list that says something: on the wire an empty one is "not said", which is the opposite of nothing.
    fn says_something(&mut self, field: &str) {
        let empty = self.entries.iter().find(|(key, _, node)| {
            key == field && matches!(&node.value, Value::List(items) if items.is_empty())
        });
        if let Some((_, place, node)) = empty {
            let reason =
                "is empty, which would be as if it weren't there; leave it out, or say what is meant";
            self.errors
                .push(ManifestError::new(*place, &node.path, reason.to_owned()));
        }
    }

    /// [`Fields::text_list`], not empty where it is there.
    pub(super) fn some_texts(&mut self, field: &'static str) -> Vec<String> {
        self.says_something(field);
        self.text_list(field)
    }

    /// [`Fields::list`], not empty where it is there.
    pub(super) fn some_list<T>(
        &mut self,
        field: &'static str,
        read: impl FnMut(&mut Fields<'_>) -> T,
    ) -> Vec<T> {
        self.says_something(field);
        self.list(field, read)
    }

    /// [`Fields::numbers`], not empty where it is there.
    pub(super) fn some_numbers(&mut self, field: &'static str) -> Vec<u32> {
        self.says_something(field);
        self.numbers(field)
    }

    pub(super) fn numbers(&mut self, field: &'static str) -> Vec<u32> {
        let items = self.items(field);
        items.iter().filter_map(|item| self.as_small(item)).collect()
    }

    pub(super) fn texts(&mut self, field: &'static str) -> HashMap<String, String> {
        let Some(node) = self.take(field) else {
            return HashMap::new();
        };
        let Value::Map(entries) = node.value else {
            self.wrong(&node, "a mapping of texts");
            return HashMap::new();
        };
        entries
            .into_iter()
            .filter_map(|(key, _, value)| Some((key, self.as_text(value)?)))
            .collect()
    }

    pub(super) fn one_of<T>(&mut self, kinds: [Named<T>; 2]) -> Option<T> {
        let mut found = None;
        for (field, make) in kinds {
            if let Some(text) = self.take(field).and_then(|node| self.as_text(node)) {
                if found.is_some() {
                    self.reject(
                        field,
                        "stands beside another of its kind; want one of them".to_owned(),
                    );
                }
                found = Some(make(text));
            }
        }
        found
    }

    /// The one that is there of several kinds of the same thing.
    pub(super) fn exclusive<T, const N: usize>(&mut self, names: &str, kinds: [Option<T>; N]) -> Option<T> {
        let mut kinds = kinds.into_iter().flatten();
        let kind = kinds.next();
        if kinds.next().is_some() {
            self.reject_here(format!("has more than one of {names}; want one"));
        }
        kind
    }

    pub(super) fn choice(&mut self, field: &'static str, known: &[(&'static str, i32)]) -> i32 {
        self.take(field)
            .and_then(|node| self.as_choice(node, known))
            .unwrap_or_default()
    }

    pub(super) fn choices(&mut self, field: &'static str, known: &[(&'static str, i32)]) -> Vec<i32> {
        let items = self.items(field);
        items
            .into_iter()
            .filter_map(|item| self.as_choice(item, known))
            .collect()
    }

    fn as_choice(&mut self, node: Node, known: &[(&'static str, i32)]) -> Option<i32> {
        let (place, path) = (node.place, node.path.clone());
        let text = self.as_text(node)?;
        if let Some((_, value)) = known.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let words: Vec<_> = known.iter().map(|(word, _)| *word).collect();
        let meant = nearest(&text, &words).map(|k| format!("did you mean {k}?"));
        let hint = meant.unwrap_or_else(|| format!("want one of {}", words.join(", ")));
        self.errors.push(ManifestError::new(
            place,
            &path,
            format!("{text:?} is not known; {hint}"),
        ));
        None
    }
}

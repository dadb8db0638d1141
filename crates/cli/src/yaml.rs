//! YAML as people write it for this command: every value knows its path and its line.

use crate::output::Failure;
use saphyr::{LoadableYamlNode, MarkedYaml, Scalar, YamlData};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// Largest file, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// Deepest nesting of what is taken as JSON.
const MAX_DEPTH: usize = 64;

/// A value, with the path that leads to it.
pub(crate) struct Node<'a> {
    path: String,
    yaml: &'a MarkedYaml<'a>,
}

/// What is wrong, and in which line.
pub(crate) type Bad = (usize, String);

/// Reads a file that has one document. An error names the file, the line, the field and what would be right.
pub(crate) fn read<T>(
    path: &Path,
    parse_root: impl FnOnce(&Node<'_>) -> Result<T, Bad>,
) -> Result<T, Failure> {
    let bad = |why: String| Failure::BadInput(format!("{}{why}", path.display()));
    let size = std::fs::metadata(path).map(|m| m.len());
    let text = match size {
        Ok(size) if size > MAX_BYTES => {
            return Err(bad(format!(": is {size} bytes long; want at most {MAX_BYTES}")));
        }
        Ok(_) => std::fs::read_to_string(path),
        Err(error) => Err(error),
    };
    let text = text.map_err(|error| bad(format!(": can't be read: {error}")))?;
    parse(&text, parse_root).map_err(|(line, why)| bad(format!(":{line}: {why}")))
}

/// Reads a text that has one document.
pub(crate) fn parse<T>(text: &str, root: impl FnOnce(&Node<'_>) -> Result<T, Bad>) -> Result<T, Bad> {
    let documents = MarkedYaml::load_from_str(text)
        .map_err(|error| (error.marker().line(), format!("is not YAML: {}", error.info())))?;
    let [document] = documents.as_slice() else {
        return Err((1, format!("want one document, not {}", documents.len())));
    };
    root(&Node {
        path: String::new(),
        yaml: document,
    })
}

impl<'a> Node<'a> {
    /// The same value as the beginning of paths.
    pub(crate) const fn as_root(&self) -> Self {
        Self {
            path: String::new(),
            yaml: self.yaml,
        }
    }

    pub(crate) fn bad(&self, why: &str) -> Bad {
        let line = self.line();
        match self.path.as_str() {
            "" => (line, why.to_owned()),
            path => (line, format!("{path}: {why}")),
        }
    }

    pub(crate) fn line(&self) -> usize {
        self.yaml.span.start.line()
    }

    pub(crate) fn map(&self) -> Result<Vec<(String, Self)>, Bad> {
        let YamlData::Mapping(entries) = &self.yaml.data else {
            return Err(self.bad("want a mapping"));
        };
        let mut map = Vec::with_capacity(entries.len());
        for (key, yaml) in entries {
            let YamlData::Value(Scalar::String(key)) = &key.data else {
                return Err(self.bad("has a key that is not a text"));
            };
            let path = match self.path.as_str() {
                "" => key.to_string(),
                path => format!("{path}.{key}"),
            };
            map.push((key.to_string(), Node { path, yaml }));
        }
        Ok(map)
    }

    /// The fields of a mapping that has no others.
    pub(crate) fn fields<const N: usize>(&self, names: [&str; N]) -> Result<[Option<Self>; N], Bad> {
        let mut found = [const { None }; N];
        for (key, node) in self.map()? {
            let slot = names.iter().position(|name| *name == key);
            match slot.and_then(|i| found.get_mut(i)) {
                Some(slot) => *slot = Some(node),
                None => return Err(node.bad(&format!("is no field; want {}", names.join(", ")))),
            }
        }
        Ok(found)
    }

    pub(crate) fn list(&self) -> Result<Vec<Self>, Bad> {
        let YamlData::Sequence(items) = &self.yaml.data else {
            return Err(self.bad("want a list"));
        };
        let node = |(i, yaml)| Node {
            path: format!("{}[{i}]", self.path),
            yaml,
        };
        Ok(items.iter().enumerate().map(node).collect())
    }

    pub(crate) const fn is_list(&self) -> bool {
        matches!(self.yaml.data, YamlData::Sequence(_))
    }

    pub(crate) const fn is_null(&self) -> bool {
        matches!(self.yaml.data, YamlData::Value(Scalar::Null))
    }

    /// A text, or a whole number or a boolean as it is written: people don't quote ports.
    pub(crate) fn text(&self) -> Result<String, Bad> {
        match &self.yaml.data {
            YamlData::Value(Scalar::String(text)) => Ok(text.to_string()),
            YamlData::Value(Scalar::Integer(number)) => Ok(number.to_string()),
            YamlData::Value(Scalar::Boolean(truth)) => Ok(truth.to_string()),
            YamlData::Value(Scalar::Null | Scalar::FloatingPoint(_))
            | YamlData::Sequence(_)
            | YamlData::Mapping(_)
            | YamlData::Tagged(..)
            | YamlData::Representation(..)
            | YamlData::Alias(_)
            | YamlData::BadValue => Err(self.bad("want a text")),
        }
    }

    /// Each text of a list, or the only one.
    pub(crate) fn texts(&self) -> Result<Vec<String>, Bad> {
        if self.is_list() {
            self.list()?.iter().map(Node::text).collect()
        } else {
            Ok(vec![self.text()?])
        }
    }

    pub(crate) fn boolean(&self) -> Result<bool, Bad> {
        if let YamlData::Value(Scalar::Boolean(truth)) = self.yaml.data {
            Ok(truth)
        } else {
            Err(self.bad("want true or false"))
        }
    }

    pub(crate) fn duration(&self) -> Result<Duration, Bad> {
        leeward_proto::manifest::parse_duration(&self.text()?)
            .ok_or_else(|| self.bad("want a duration such as 500ms, 30s or 2m"))
    }

    pub(crate) fn size(&self) -> Result<u64, Bad> {
        leeward_proto::manifest::parse_size(&self.text()?)
            .ok_or_else(|| self.bad("want a size such as 65536, 64KiB or 16MiB"))
    }

    /// A whole number within bounds.
    pub(crate) fn number(&self, least: u32, most: u32) -> Result<u32, Bad> {
        let number = self.text()?.parse().ok().filter(|n| (least..=most).contains(n));
        number.ok_or_else(|| self.bad(&format!("want a whole number from {least} to {most}")))
    }

    /// The word of a closed set that the text is.
    pub(crate) fn one_of<T: Copy>(&self, words: impl IntoIterator<Item = (String, T)>) -> Result<T, Bad> {
        let text = self.text()?;
        let mut known = Vec::new();
        for (word, value) in words {
            if word == text {
                return Ok(value);
            }
            known.push(word);
        }
        Err(self.bad(&format!("{text:?} is unknown; want {}", known.join(", "))))
    }

    /// Whatever it is, as JSON.
    pub(crate) fn json(&self) -> Result<Value, Bad> {
        self.json_within(MAX_DEPTH)
    }

    fn json_within(&self, depth: usize) -> Result<Value, Bad> {
        let Some(deeper) = depth.checked_sub(1) else {
            return Err(self.bad("is nested too deep"));
        };
        Ok(match &self.yaml.data {
            YamlData::Value(Scalar::Null) => Value::Null,
            YamlData::Value(Scalar::Boolean(truth)) => Value::from(*truth),
            YamlData::Value(Scalar::Integer(number)) => Value::from(*number),
            YamlData::Value(Scalar::FloatingPoint(number)) => Value::from(number.0),
            YamlData::Value(Scalar::String(text)) => Value::from(text.to_string()),
            YamlData::Sequence(_) => {
                let items = self.list()?;
                let items: Result<_, _> = items.iter().map(|item| item.json_within(deeper)).collect();
                Value::Array(items?)
            }
            YamlData::Mapping(_) => {
                let entries = self.map()?.into_iter();
                let entries: Result<_, _> = entries
                    .map(|(key, node)| Ok((key, node.json_within(deeper)?)))
                    .collect();
                Value::Object(entries?)
            }
            YamlData::Tagged(..) | YamlData::Representation(..) | YamlData::Alias(_) | YamlData::BadValue => {
                return Err(self.bad("can't be read; want plain YAML without tags and aliases"));
            }
        })
    }
}

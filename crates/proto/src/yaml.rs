//! YAML as a tree whose every node knows its path and its place.

use crate::manifest::{ManifestError, Place};
use saphyr::{LoadableYamlNode, MarkedYaml, Scalar, YamlData};

/// A value and where it stands.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) path: String,
    pub(crate) place: Place,
    pub(crate) value: Value,
}

#[derive(Debug)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(String, Place, Node)>),
}

/// Largest file, in bytes.
const MAX_BYTES: usize = 16 << 20;
/// Deepest nesting; policy needs 9.
const MAX_DEPTH: usize = 64;
/// Most documents in a file.
const MAX_DOCUMENTS: usize = 10_000;

impl Value {
    /// What it is, for people.
    pub(crate) const fn what(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "a boolean",
            Self::Integer(_) | Self::Float(_) => "a number",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

/// Reads the documents of a text.
pub(crate) fn read(text: &str) -> Result<Vec<Node>, ManifestError> {
    let start = Place { line: 1, column: 1 };
    if text.len() > MAX_BYTES {
        let reason = format!("is {} bytes long; want at most {MAX_BYTES}", text.len());
        return Err(ManifestError::new(start, "", reason));
    }
    // The parser recurses for each level; flow collections nest deepest for their length.
    let documents = MarkedYaml::load_from_str(text).map_err(|error| {
        let at = error.marker();
        let place = Place {
            line: at.line(),
            column: at.col() + 1,
        };
        ManifestError::new(place, "", format!("is not YAML: {}", error.info()))
    })?;
    if documents.len() > MAX_DOCUMENTS {
        let reason = format!("has {} documents; want at most {MAX_DOCUMENTS}", documents.len());
        return Err(ManifestError::new(start, "", reason));
    }
    documents
        .iter()
        .map(|document| node(document, String::new(), 0))
        .collect()
}

fn node(yaml: &MarkedYaml<'_>, path: String, depth: usize) -> Result<Node, ManifestError> {
    let place = Place {
        line: yaml.span.start.line(),
        column: yaml.span.start.col() + 1,
    };
    let bad = |reason: &str| Err(ManifestError::new(place, &path, reason.to_owned()));
    if depth > MAX_DEPTH {
        return bad("is nested too deep");
    }
    let value = match &yaml.data {
        YamlData::Value(scalar) => match scalar {
            Scalar::Null => Value::Null,
            Scalar::Boolean(value) => Value::Bool(*value),
            Scalar::Integer(value) => Value::Integer(*value),
            Scalar::FloatingPoint(value) => Value::Float(value.0),
            Scalar::String(text) => Value::Text(text.to_string()),
        },
        YamlData::Sequence(items) => {
            let items = items.iter().enumerate();
            let items: Result<_, _> = items
                .map(|(i, item)| node(item, format!("{path}[{i}]"), depth + 1))
                .collect();
            Value::List(items?)
        }
        YamlData::Mapping(entries) => {
            let mut map = Vec::with_capacity(entries.len());
            for (key, value) in entries {
                let at = Place {
                    line: key.span.start.line(),
                    column: key.span.start.col() + 1,
                };
                let YamlData::Value(Scalar::String(key)) = &key.data else {
                    return Err(ManifestError::new(
                        at,
                        &path,
                        "has a key that is not a text; put it in quotes".to_owned(),
                    ));
                };
                let below = if path.is_empty() {
                    key.to_string()
                } else {
                    format!("{path}.{key}")
                };
                map.push((key.to_string(), at, node(value, below, depth + 1)?));
            }
            Value::Map(map)
        }
        YamlData::Tagged(..) => return bad("has a YAML tag; want plain values"),
        YamlData::Representation(..) | YamlData::Alias(_) | YamlData::BadValue => {
            return bad("can't be read");
        }
    };
    Ok(Node { path, place, value })
}

//! Reading a document.

use crate::targeting::{Targeting, shown};
use crate::{Flag, FlagSet, InvalidFlag};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The most values that the rules of a document may have in all, with what they refer to in place: what they take of
/// memory is many times what the document takes.
const MAX_NODES: usize = 250_000;
/// The longest key of a flag, and the longest name of a variant, in bytes.
const MAX_NAME: usize = 512;
/// The most mistakes that are told.
const MAX_ERRORS: usize = 100;

type Metadata = Map<String, Value>;
type Flags = BTreeMap<Box<str>, Arc<Flag>>;

pub(crate) fn document(text: &str) -> Result<(Flags, Arc<Metadata>), Vec<InvalidFlag>> {
    if text.len() > FlagSet::MAX_BYTES {
        return Err(vec![invalid(
            "document",
            format!(
                "is {} bytes long; at most {} are read",
                text.len(),
                FlagSet::MAX_BYTES
            ),
        )]);
    }
    let document: Value = serde_json::from_str(text)
        .map_err(|error| vec![invalid("document", format!("is no JSON: {error}"))])?;
    let mut errors = Vec::new();
    let metadata = Arc::new(metadata("metadata", document.get("metadata"), &mut errors));
    let none = Map::new();
    let evaluators = match document.get("$evaluators") {
        None | Some(Value::Null) => &none,
        Some(Value::Object(evaluators)) => evaluators,
        Some(other) => {
            errors.push(invalid(
                "$evaluators",
                format!("is {}; expected an object of rules", kind(other)),
            ));
            &none
        }
    };
    let mut flags = Flags::new();
    match document.get("flags") {
        Some(Value::Object(definitions)) if definitions.len() > FlagSet::MAX_FLAGS => {
            errors.push(invalid(
                "flags",
                format!(
                    "are {}; at most {} are read",
                    definitions.len(),
                    FlagSet::MAX_FLAGS
                ),
            ));
        }
        Some(Value::Object(definitions)) => {
            let mut reading = Reading {
                evaluators,
                set: &metadata,
                nodes: MAX_NODES,
                errors: &mut errors,
            };
            for (key, definition) in definitions {
                if let Some(flag) = reading.flag(key, definition) {
                    flags.insert(key.as_str().into(), Arc::new(flag));
                }
                if reading.errors.len() >= MAX_ERRORS {
                    break;
                }
            }
        }
        Some(other) => errors.push(invalid(
            "flags",
            format!("is {}; expected an object of flags", kind(other)),
        )),
        None => errors.push(invalid("flags", "is missing; expected an object of flags")),
    }
    if errors.is_empty() {
        Ok((flags, metadata))
    } else {
        Err(errors)
    }
}

/// A document's flags being read.
struct Reading<'a> {
    evaluators: &'a Map<String, Value>,
    set: &'a Arc<Metadata>,
    nodes: usize,
    errors: &'a mut Vec<InvalidFlag>,
}

impl Reading<'_> {
    /// A flag; where it is broken, what comes back is not used, since there are errors then.
    fn flag(&mut self, key: &str, definition: &Value) -> Option<Flag> {
        let path = format!("flags.{key}");
        if key.is_empty() || key.len() > MAX_NAME {
            self.wrong(
                &path,
                format!("has a key of {} bytes; expected 1 to {MAX_NAME}", key.len()),
            );
        }
        let Value::Object(definition) = definition else {
            self.wrong(&path, format!("is {}; expected an object", kind(definition)));
            return None;
        };
        let enabled = match definition.get("state").map(|state| (state, state.as_str())) {
            Some((_, Some("ENABLED"))) => true,
            Some((_, Some("DISABLED"))) => false,
            Some((other, _)) => {
                self.wrong(
                    &format!("{path}.state"),
                    format!("is {}; expected \"ENABLED\" or \"DISABLED\"", shown(other)),
                );
                return None;
            }
            None => {
                self.wrong(
                    &format!("{path}.state"),
                    "is missing; expected \"ENABLED\" or \"DISABLED\"",
                );
                return None;
            }
        };
        let variants = self.variants(&format!("{path}.variants"), definition.get("variants"))?;
        let default = match definition.get("defaultVariant") {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) if variants.contains_key(name.as_str()) => Some(name.as_str().into()),
            Some(other) => {
                let names: Vec<&str> = variants.keys().map(|name| &**name).collect();
                let expected = format!(
                    "is {}; expected one of the variants, {}, or null",
                    shown(other),
                    names.join(", ")
                );
                self.wrong(&format!("{path}.defaultVariant"), expected);
                return None;
            }
        };
        let rule = definition.get("targeting").unwrap_or(&Value::Null);
        let targeting = match Targeting::compile(rule, self.evaluators, &mut self.nodes) {
            Ok(targeting) => targeting,
            Err(reason) => {
                self.wrong(&format!("{path}.targeting"), reason);
                return None;
            }
        };
        let mut own = metadata(
            &format!("{path}.metadata"),
            definition.get("metadata"),
            self.errors,
        );
        let metadata = if own.is_empty() {
            Arc::clone(self.set)
        } else {
            for (key, value) in self.set.iter() {
                own.entry(key).or_insert_with(|| value.clone());
            }
            Arc::new(own)
        };
        Some(Flag {
            key: key.into(),
            enabled,
            variants,
            default,
            targeting,
            metadata,
        })
    }

    fn variants(&mut self, path: &str, variants: Option<&Value>) -> Option<BTreeMap<Box<str>, Value>> {
        let variants = match variants {
            Some(Value::Object(variants)) => variants,
            Some(other) => {
                self.wrong(
                    path,
                    format!("is {}; expected an object of names and values", kind(other)),
                );
                return None;
            }
            None => {
                self.wrong(path, "is missing; expected an object of names and values");
                return None;
            }
        };
        let mut first: Option<&Value> = None;
        for (name, value) in variants {
            if name.is_empty() || name.len() > MAX_NAME {
                self.wrong(
                    path,
                    format!("has a name of {} bytes; expected 1 to {MAX_NAME}", name.len()),
                );
                return None;
            }
            if value.is_null() {
                self.wrong(
                    &format!("{path}.{name}"),
                    "is null; expected a boolean, a text, a number or an object",
                );
                return None;
            }
            let expected = *first.get_or_insert(value);
            if kind(expected) != kind(value) {
                self.wrong(
                    &format!("{path}.{name}"),
                    format!(
                        "is {}; expected {}, as the variant before it",
                        kind(value),
                        kind(expected)
                    ),
                );
                return None;
            }
        }
        let variants = variants
            .iter()
            .map(|(name, value)| (name.as_str().into(), value.clone()));
        Some(variants.collect())
    }

    fn wrong(&mut self, path: &str, reason: impl Into<String>) {
        self.errors.push(invalid(path, reason));
    }
}

/// Metadata, without what is null.
fn metadata(path: &str, value: Option<&Value>, errors: &mut Vec<InvalidFlag>) -> Metadata {
    let mut metadata = Metadata::new();
    match value {
        None | Some(Value::Null) => {}
        Some(Value::Object(fields)) => {
            for (name, value) in fields {
                match value {
                    Value::Bool(_) | Value::Number(_) | Value::String(_) => {
                        metadata.insert(name.clone(), value.clone());
                    }
                    Value::Null => {}
                    Value::Array(_) | Value::Object(_) => errors.push(invalid(
                        &format!("{path}.{name}"),
                        format!("is {}; expected a text, a number or a boolean", kind(value)),
                    )),
                }
            }
        }
        Some(other) => errors.push(invalid(path, format!("is {}; expected an object", kind(other)))),
    }
    metadata
}

fn invalid(path: &str, reason: impl Into<String>) -> InvalidFlag {
    InvalidFlag {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

/// What a value is, for messages. Arrays and objects are one type of variants, which flagd calls JSON.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) | Value::Object(_) => "an object or an array",
    }
}

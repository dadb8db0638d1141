//! The context of an evaluation: only that part of it which a flag's targeting reads.

use bumpalo::Bump;
use bumpalo::collections::Vec as BumpVec;
use datalogic_rs::DataValue;
use serde_json::{Map, Value};
use std::borrow::Cow;

/// Deeper values of a context are null.
const MAX_DEPTH: usize = 64;

/// What targeting may ask of a request, or of whatever a flag is evaluated for.
pub trait Attributes {
    /// The value at a path such as `targetingKey` or `headers.x-user`; `None` where there is none.
    ///
    /// Dots lead from an object to its parts, so that `headers` alone is no attribute.
    fn attribute(&self, path: &str) -> Option<Cow<'_, str>>;

    /// All paths and their values, as far as they can be listed. Asked for only by targeting that reads a path which
    /// it computes, or the whole context at once.
    fn all(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}

/// Where the values come from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    Attributes(&'a dyn Attributes),
    Json(&'a Value),
}

impl<'a> Source<'a> {
    fn at(self, path: &str, arena: &'a Bump) -> Option<DataValue<'a>> {
        match self {
            Self::Attributes(about) => Some(DataValue::String(match about.attribute(path)? {
                Cow::Borrowed(text) => text,
                Cow::Owned(text) => arena.alloc_str(&text),
            })),
            Self::Json(context) => {
                let step = |value: &'a Value, name: &str| match value {
                    Value::Object(object) => object.get(name),
                    Value::Array(array) => array.get(name.parse::<usize>().ok()?),
                    Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
                };
                let value = path.split('.').try_fold(context, step)?;
                Some(converted(value, arena, MAX_DEPTH))
            }
        }
    }

    /// The whole context.
    fn whole(self, arena: &'a Bump) -> Vec<(&'a str, DataValue<'a>)> {
        match self {
            Self::Attributes(about) => {
                let mut tree = Value::Object(Map::new());
                for (path, text) in about.all() {
                    plant(&mut tree, &path, text);
                }
                let Value::Object(tree) = tree else {
                    return Vec::new();
                };
                // Slow and rare, so that two copies don't matter: the tree dies here, and its parts must not.
                tree.iter()
                    .map(|(key, value)| (&*arena.alloc_str(key), copied(value, arena)))
                    .collect()
            }
            Self::Json(context) => context
                .as_object()
                .into_iter()
                .flatten()
                .map(|(key, value)| (key.as_str(), converted(value, arena, MAX_DEPTH)))
                .collect(),
        }
    }
}

/// The paths that a targeting reads.
#[derive(Debug, Default)]
pub(crate) struct Paths {
    /// It reads the whole context, or paths that it computes.
    pub(crate) whole: bool,
    nodes: Vec<Node>,
}

/// A part of a path, and of all the others that begin alike.
#[derive(Debug)]
struct Node {
    name: Box<str>,
    /// From the root to here.
    path: Box<str>,
    /// Whether targeting reads what is here, not only what is below.
    read: bool,
    below: Vec<Self>,
}

impl Paths {
    /// Adds a path. The parts that this crate provides itself are not the source's.
    pub(crate) fn add(&mut self, path: &str) {
        if path == "$flagd" || path.starts_with("$flagd.") {
            return;
        }
        let mut nodes = &mut self.nodes;
        let mut end = 0;
        for name in path.split('.') {
            end += name.len();
            let at = nodes
                .iter()
                .position(|node| *node.name == *name)
                .unwrap_or_else(|| {
                    nodes.push(Node {
                        name: name.into(),
                        path: path.get(..end).unwrap_or(path).into(),
                        read: false,
                        below: Vec::new(),
                    });
                    nodes.len() - 1
                });
            let Some(node) = nodes.get_mut(at) else { return };
            node.read |= end == path.len();
            nodes = &mut node.below;
            end += 1;
        }
    }

    /// The context that targeting is evaluated in: what it reads of the source, and `$flagd`.
    pub(crate) fn context<'a>(
        &'a self,
        flag: &'a str,
        source: Source<'a>,
        seconds: i64,
        arena: &'a Bump,
    ) -> &'a DataValue<'a> {
        let flagd = arena.alloc([
            ("flagKey", DataValue::String(flag)),
            ("timestamp", DataValue::from_i64(seconds)),
        ]);
        let mut fields = BumpVec::with_capacity_in(self.nodes.len() + 1, arena);
        fields.push(("$flagd", DataValue::Object(flagd)));
        if self.whole {
            fields.extend(
                source
                    .whole(arena)
                    .into_iter()
                    .filter(|(key, _)| *key != "$flagd"),
            );
        }
        for node in &self.nodes {
            if fields.iter().any(|(key, _)| *key == &*node.name) {
                continue;
            }
            if let Some(value) = node.value(source, arena) {
                fields.push((&node.name, value));
            }
        }
        arena.alloc(DataValue::Object(fields.into_bump_slice()))
    }
}

impl Node {
    fn value<'a>(&'a self, source: Source<'a>, arena: &'a Bump) -> Option<DataValue<'a>> {
        if self.read
            && let Some(value) = source.at(&self.path, arena)
        {
            return Some(value);
        }
        let mut fields = BumpVec::with_capacity_in(self.below.len(), arena);
        for node in &self.below {
            if let Some(value) = node.value(source, arena) {
                fields.push((&*node.name, value));
            }
        }
        (!fields.is_empty()).then(|| DataValue::Object(fields.into_bump_slice()))
    }
}

/// Puts a text at a path into a tree of objects. Where a text is already on the way, the longer path is left out.
fn plant(tree: &mut Value, path: &str, text: String) {
    let mut at = tree;
    for name in path.split('.').take(MAX_DEPTH) {
        let Value::Object(object) = at else { return };
        at = object.entry(name).or_insert_with(|| Value::Object(Map::new()));
    }
    if at.as_object().is_some_and(Map::is_empty) {
        *at = Value::String(text);
    }
}

/// A value as targeting takes it; texts stay where they are.
fn converted<'a>(value: &'a Value, arena: &'a Bump, depth: usize) -> DataValue<'a> {
    match value {
        Value::Bool(truth) => DataValue::Bool(*truth),
        Value::Number(number) => number.as_i64().map_or_else(
            || number.as_f64().map_or(DataValue::Null, DataValue::from_f64),
            DataValue::from_i64,
        ),
        Value::String(text) => DataValue::String(text),
        Value::Array(items) if depth > 0 => DataValue::Array(
            arena.alloc_slice_fill_iter(items.iter().map(|item| converted(item, arena, depth - 1))),
        ),
        Value::Object(object) if depth > 0 => {
            let field =
                |(key, value): (&'a String, &'a Value)| (key.as_str(), converted(value, arena, depth - 1));
            DataValue::Object(arena.alloc_slice_fill_iter(object.iter().map(field)))
        }
        Value::Null | Value::Array(_) | Value::Object(_) => DataValue::Null,
    }
}

/// A tree of texts and objects, copied into the arena.
fn copied<'a>(value: &Value, arena: &'a Bump) -> DataValue<'a> {
    match value {
        Value::String(text) => DataValue::String(arena.alloc_str(text)),
        Value::Object(object) => {
            let field = |(key, value): (&String, &Value)| (&*arena.alloc_str(key), copied(value, arena));
            DataValue::Object(arena.alloc_slice_fill_iter(object.iter().map(field)))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => DataValue::Null,
    }
}

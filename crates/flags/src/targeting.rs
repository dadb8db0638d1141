//! The rule that chooses a variant: checked and compiled once, evaluated for each request.

use crate::context::{Paths, Source};
use crate::operators::{ENGINE, OURS, is_ours};
use bumpalo::Bump;
use datalogic_rs::{DataValue, Logic};
use serde_json::{Map, Value};
use std::cell::Cell;
use std::slice;

/// The deepest nesting of a rule, in arrays and objects, with what it refers to in place.
const MAX_DEPTH: usize = 100;
/// The most values of which a rule may consist, with what it refers to in place.
const MAX_NODES: usize = 10_000;
/// What a thread keeps of the memory that evaluations take.
const KEPT_BYTES: usize = 64 * 1024;

/// What JSONLogic's reference has, without its `log` and `method`, and what flagd adds.
const OPERATORS: &[&str] = &[
    "var",
    "missing",
    "missing_some",
    "if",
    "?:",
    "==",
    "===",
    "!=",
    "!==",
    "!",
    "!!",
    "or",
    "and",
    ">",
    ">=",
    "<",
    "<=",
    "max",
    "min",
    "+",
    "-",
    "*",
    "/",
    "%",
    "map",
    "filter",
    "reduce",
    "all",
    "none",
    "some",
    "merge",
    "in",
    "cat",
    "substr",
    "fractional",
    "sem_ver",
    "starts_with",
    "ends_with",
    "lower",
    "upper",
];

/// A rule.
#[derive(Debug)]
pub(crate) struct Targeting {
    logic: Logic,
    paths: Paths,
}

/// What a rule came to.
#[derive(Debug)]
pub(crate) enum Choice<'a> {
    /// Null.
    Nothing,
    /// The name of a variant, if there is one of that name.
    Variant(&'a str),
    /// It can't be evaluated.
    Failed,
}

thread_local! {
    /// Taken out while it is in use, so that an evaluation within another one has its own.
    static ARENA: Cell<Option<Bump>> = const { Cell::new(None) };
}

impl Targeting {
    /// Compiles a rule; `None` for one that is empty.
    ///
    /// `nodes` is how many values the rules of the document may still have in all.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn compile(
        rule: &Value,
        evaluators: &Map<String, Value>,
        nodes: &mut usize,
    ) -> Result<Option<Self>, String> {
        match rule {
            Value::Null => return Ok(None),
            Value::Object(object) if object.is_empty() => return Ok(None),
            Value::Object(_) => {}
            other @ (Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => {
                return Err(format!(
                    "{} is no rule, which is an object with one operator",
                    shown(other)
                ));
            }
        }
        let mut reading = Reading {
            evaluators,
            paths: Paths::default(),
            nodes: MAX_NODES.min(*nodes),
        };
        let allowed = reading.nodes;
        let rule = reading.rule(rule, 0, Scope::Context);
        *nodes -= allowed - reading.nodes;
        let logic = ENGINE
            .compile(rule?.to_string().as_str())
            .map_err(|error| format!("the rule can't be compiled: {error}"))?;
        Ok(Some(Self {
            logic,
            paths: reading.paths,
        }))
    }

    /// Evaluates the rule, and gives away what it came to.
    pub(crate) fn choose<T>(
        &self,
        flag: &str,
        source: Source<'_>,
        seconds: i64,
        then: impl FnOnce(Choice<'_>) -> T,
    ) -> T {
        let mut arena = ARENA.take().unwrap_or_else(|| Bump::with_capacity(4096));
        let chosen = then(self.choice(flag, source, seconds, &arena));
        arena.reset();
        if arena.allocated_bytes() <= KEPT_BYTES {
            ARENA.set(Some(arena));
        }
        chosen
    }

    fn choice<'a>(&'a self, flag: &'a str, source: Source<'a>, seconds: i64, arena: &'a Bump) -> Choice<'a> {
        let context = self.paths.context(flag, source, seconds, arena);
        match ENGINE.evaluate(&self.logic, context, arena) {
            Err(_) => Choice::Failed,
            Ok(DataValue::Null) => Choice::Nothing,
            Ok(DataValue::String(name)) => Choice::Variant(name),
            // As flagd does, which takes the result's JSON for the name.
            Ok(value) => Choice::Variant(value.to_json_str_in(arena)),
        }
    }
}

/// What a path of `var` leads through.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Scope {
    /// The context.
    Context,
    /// An item of a list, within `map` and the like.
    Item,
}

/// The items of a list, or what is none as the only one.
fn listed(value: &Value) -> &[Value] {
    value
        .as_array()
        .map_or_else(|| slice::from_ref(value), Vec::as_slice)
}

/// A value for a message, cut short.
pub(crate) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

/// A rule being checked, and made ready for the library.
struct Reading<'a> {
    evaluators: &'a Map<String, Value>,
    paths: Paths,
    /// How many more values it may have.
    nodes: usize,
}

impl Reading<'_> {
    fn rule(&mut self, value: &Value, depth: usize, scope: Scope) -> Result<Value, String> {
        if depth > MAX_DEPTH {
            return Err(format!(
                "is nested deeper than {MAX_DEPTH} levels, or refers to itself by `$ref`"
            ));
        }
        self.nodes = self.nodes.checked_sub(1).ok_or_else(|| {
            format!(
                "is too large: at most {MAX_NODES} values, and fewer if the document has many rules before it"
            )
        })?;
        match value {
            Value::Array(items) => {
                let items = items.iter().map(|item| self.rule(item, depth + 1, scope));
                items.collect::<Result<_, _>>().map(Value::Array)
            }
            Value::Object(object) => {
                let mut fields = object.iter();
                match (fields.next(), fields.next()) {
                    (None, _) => Ok(value.clone()),
                    (Some((name, args)), None) => self.operation(name, args, depth, scope),
                    (Some(_), Some(_)) => Err(format!(
                        "{} has {} fields; a rule is an object with one operator",
                        shown(value),
                        object.len()
                    )),
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(value.clone()),
        }
    }

    fn operation(&mut self, name: &str, args: &Value, depth: usize, scope: Scope) -> Result<Value, String> {
        if name == "$ref" {
            let evaluators = self.evaluators;
            let evaluator = args.as_str().and_then(|name| evaluators.get(name));
            return match evaluator {
                Some(rule) => self.rule(rule, depth + 1, scope),
                None => Err(format!(
                    "`$ref` to {}, which is not in `$evaluators`",
                    shown(args)
                )),
            };
        }
        if !OPERATORS.contains(&name) {
            return Err(format!(
                "unknown operator {}; there are {}",
                shown(&Value::from(name)),
                OPERATORS.join(", ")
            ));
        }
        if scope == Scope::Context {
            self.note(name, args);
        }
        let args = match (name, args) {
            ("map" | "filter" | "reduce" | "all" | "none" | "some", Value::Array(args)) => {
                let arg = |(at, arg)| self.rule(arg, depth + 1, if at == 1 { Scope::Item } else { scope });
                Value::Array(args.iter().enumerate().map(arg).collect::<Result<_, _>>()?)
            }
            _ => self.rule(args, depth + 1, scope)?,
        };
        // What JSONLogic lets a single argument do without, the library wants of these.
        let args = if args.is_array() {
            args
        } else {
            Value::Array(vec![args])
        };
        let name = if is_ours(name) {
            format!("{OURS}{name}")
        } else {
            name.to_owned()
        };
        Ok(Value::Object(Map::from_iter([(name, args)])))
    }

    /// Takes down which parts of the context an operation reads.
    fn note(&mut self, name: &str, args: &Value) {
        match (name, listed(args)) {
            ("var", []) => self.paths.whole = true,
            ("var", [path, ..]) => self.note_path(path),
            ("missing", paths) => paths
                .iter()
                .flat_map(listed)
                .for_each(|path| self.note_path(path)),
            ("missing_some", [_, paths]) => listed(paths).iter().for_each(|path| self.note_path(path)),
            ("missing_some", _) => self.paths.whole = true,
            ("fractional", _) => self.paths.add("targetingKey"),
            _ => {}
        }
    }

    fn note_path(&mut self, path: &Value) {
        match path {
            Value::String(path) if !path.is_empty() => self.paths.add(path),
            Value::Number(path) => self.paths.add(&path.to_string()),
            Value::Null | Value::Bool(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
                self.paths.whole = true;
            }
        }
    }
}

//! Which labels are meant: `env=prod,tier!=db,team in (a,b),!legacy`.

use std::collections::BTreeMap;
use std::fmt;

/// Conditions on labels, all of which must hold. The one without conditions matches everything.
///
/// It is written as Kubernetes writes it: `key=value` (or `==`), `key!=value`, `key in (a,b)`, `key notin (a,b)`, `key`,
/// `!key`, set apart by commas. As there, `!=` and `notin` hold, too, where there is no such label.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Selector {
    conditions: Vec<Condition>,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Condition {
    key: Box<str>,
    test: Test,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
enum Test {
    In(Vec<Box<str>>),
    NotIn(Vec<Box<str>>),
    Present,
    Absent,
}

/// Why a text is no selector.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidSelector {
    /// It is too long.
    #[error("is {0} bytes long; want at most {MAX_LEN}")]
    Length(usize),
    /// It has too many conditions.
    #[error("has more than {MAX_CONDITIONS} conditions")]
    Conditions,
    /// One of its conditions can't be read.
    #[error(
        "{0:?} is no condition on labels; want key=value, key!=value, key in (a,b), key notin (a,b), key or !key"
    )]
    Condition(String),
}

/// Longest selector, in bytes.
const MAX_LEN: usize = 1024;
/// Most conditions.
const MAX_CONDITIONS: usize = 64;

impl Selector {
    /// Reads a selector. An empty text matches everything.
    ///
    /// # Errors
    ///
    /// [`InvalidSelector`] names the condition that can't be read.
    pub fn parse(text: &str) -> Result<Self, InvalidSelector> {
        if text.len() > MAX_LEN {
            return Err(InvalidSelector::Length(text.len()));
        }
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let mut conditions = Vec::new();
        for part in parts(text) {
            if conditions.len() == MAX_CONDITIONS {
                return Err(InvalidSelector::Conditions);
            }
            let condition = condition(part.trim());
            conditions.push(condition.ok_or_else(|| InvalidSelector::Condition(part.trim().to_owned()))?);
        }
        Ok(Self { conditions })
    }

    /// Whether labels are meant.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.conditions.iter().all(|condition| {
            let value = labels.get(&*condition.key);
            let is_one_of =
                |values: &[Box<str>]| value.is_some_and(|value| values.iter().any(|v| **v == **value));
            match &condition.test {
                Test::In(values) => is_one_of(values),
                Test::NotIn(values) => !is_one_of(values),
                Test::Present => value.is_some(),
                Test::Absent => value.is_none(),
            }
        })
    }

    /// Whether it matches whatever the labels are.
    pub fn is_empty(&self) -> bool {
        self.conditions.is_empty()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Condition { key, test }) in self.conditions.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            match test {
                Test::In(values) if values.len() == 1 => write!(f, "{key}={}", values.concat())?,
                Test::NotIn(values) if values.len() == 1 => write!(f, "{key}!={}", values.concat())?,
                Test::In(values) => write!(f, "{key} in ({})", values.join(","))?,
                Test::NotIn(values) => write!(f, "{key} notin ({})", values.join(","))?,
                Test::Present => f.write_str(key)?,
                Test::Absent => write!(f, "!{key}")?,
            }
        }
        Ok(())
    }
}

/// The text between commas that stand in no parentheses.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut within = false;
    text.split(move |c| {
        within = match c {
            '(' => true,
            ')' => false,
            _ => within,
        };
        c == ',' && !within
    })
}

fn condition(text: &str) -> Option<Condition> {
    let of = |key: &str, test| {
        let key = key.trim();
        is_key(key).then(|| Condition {
            key: key.into(),
            test,
        })
    };
    if let Some(key) = text.strip_prefix('!') {
        return of(key, Test::Absent);
    }
    if let Some((key, value)) = text.split_once("!=") {
        return of(key, Test::NotIn(vec![plain(value)?]));
    }
    if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return of(key, Test::In(vec![plain(value)?]));
    }
    if let Some((head, values)) = text.strip_suffix(')').and_then(|text| text.split_once('(')) {
        let (key, word) = head.trim_end().rsplit_once(char::is_whitespace)?;
        let values: Vec<Box<str>> = values.split(',').map(plain).collect::<Option<_>>()?;
        return match word {
            "in" => of(key, Test::In(values)),
            "notin" => of(key, Test::NotIn(values)),
            _ => None,
        };
    }
    of(text, Test::Present)
}

/// A key that needs no quoting here. A label may have any other; no selector reaches it.
fn is_key(text: &str) -> bool {
    !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || "=!,()".contains(c))
}

/// A value, which may be empty.
fn plain(text: &str) -> Option<Box<str>> {
    let text = text.trim();
    (!text.contains(|c: char| c.is_whitespace() || "=!,()".contains(c))).then(|| text.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn labels(of: &[(&str, &str)]) -> BTreeMap<String, String> {
        of.iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn conditions_mean_what_they_mean_elsewhere() {
        let shop = labels(&[("env", "prod"), ("team", "a"), ("empty", "")]);
        for (text, want) in [
            ("", true),
            ("env=prod", true),
            ("env == prod", true),
            ("env=test", false),
            ("env!=test", true),
            ("tier!=db", true),
            ("tier=db", false),
            ("team in (a, b)", true),
            ("team in (b,c)", false),
            ("team notin (b,c)", true),
            ("tier notin (b,c)", true),
            ("team notin (a)", false),
            ("env", true),
            ("!env", false),
            ("!tier", true),
            ("tier", false),
            ("empty=", true),
            ("empty", true),
            ("env=prod,tier!=x,team in (a,b)", true),
            ("env=prod,tier!=x,team in (b)", false),
        ] {
            let selector = Selector::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(selector.matches(&shop), want, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for text in [
            ",",
            "=a",
            "a in b",
            "a in (b",
            "a b",
            "a=b=c",
            "in (a)",
            "a has (b)",
            "a=(b)",
            "!",
            "a,,b",
        ] {
            let error = Selector::parse(text).unwrap_err();
            assert!(
                matches!(error, InvalidSelector::Condition(_)),
                "{text}: {error:?}"
            );
        }
        assert_eq!(
            Selector::parse(&"a".repeat(1025)),
            Err(InvalidSelector::Length(1025))
        );
        assert_eq!(
            Selector::parse(&["a"; 65].join(",")),
            Err(InvalidSelector::Conditions)
        );
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_again(text in "(!?[a-c]{1,2}(=|!=| in | notin )?(\\([x-z](,[x-z])?\\)|[x-z])?,?){0,4}") {
            if let Ok(selector) = Selector::parse(&text) {
                prop_assert_eq!(Selector::parse(&selector.to_string()).unwrap(), selector);
            }
        }
    }
}

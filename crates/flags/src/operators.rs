//! The operators of targeting that flagd adds to JSONLogic, and those that the library judges otherwise.
//!
//! An operator that can't make sense of its arguments is null, so that the flag falls back to its default, as
//! flagd's testbed has it.

use bumpalo::Bump;
use bumpalo::collections::String as BumpString;
use datalogic_rs::operator::EvalContext;
use datalogic_rs::{
    ArenaExt, CustomOperator, DataValue, DivisionByZeroHandling, Engine, EvaluationConfig, NanHandling,
};
use semver::{BuildMetadata, Version};
use std::cmp::Ordering;
use std::sync::LazyLock;

/// The most that the weights of a fractional may add up to.
const MAX_WEIGHTS: i64 = i32::MAX as i64;

/// Stands before the name of an operator that is ours although JSONLogic has one of that name.
pub(crate) const OURS: char = '@';

/// The operators that compare, which the library judges otherwise than JSONLogic's reference and flagd: there a
/// missing value equals 0, "" and false, and a text that is no number is an error. See [`is_ours`].
const COMPARING: [(&str, Comparison); 6] = [
    ("==", Comparison::Equal),
    ("!=", Comparison::NotEqual),
    ("<", Comparison::Less),
    ("<=", Comparison::LessOrEqual),
    (">", Comparison::Greater),
    (">=", Comparison::GreaterOrEqual),
];

/// What evaluates all targeting.
pub(crate) static ENGINE: LazyLock<Engine> = LazyLock::new(|| {
    let config = EvaluationConfig::default()
        .with_loose_equality_errors(false)
        .with_arithmetic_nan_handling(NanHandling::ReturnNull)
        .with_division_by_zero(DivisionByZeroHandling::ReturnNull);
    let mut engine = Engine::builder()
        .with_config(config)
        .add_operator("fractional", Fractional)
        .add_operator("sem_ver", SemVer)
        .add_operator("starts_with", OfTwoTexts(|text, part| text.starts_with(part)))
        .add_operator("ends_with", OfTwoTexts(|text, part| text.ends_with(part)))
        .add_operator("lower", OfText(str::to_ascii_lowercase))
        .add_operator("upper", OfText(str::to_ascii_uppercase));
    for (name, comparison) in COMPARING {
        engine = engine.add_operator(format!("{OURS}{name}"), comparison);
    }
    engine.build()
});

/// Whether an operator of JSONLogic is ours, under its name with [`OURS`] before it.
pub(crate) fn is_ours(name: &str) -> bool {
    COMPARING.iter().any(|(ours, _)| *ours == name)
}

type Evaluated<'a> = datalogic_rs::Result<&'a DataValue<'a>>;

/// A share of the keys for each variant, <https://flagd.dev/reference/custom-operations/fractional-operation/>.
struct Fractional;

impl CustomOperator for Fractional {
    fn evaluate<'a>(
        &self,
        args: &[&'a DataValue<'a>],
        ctx: &mut EvalContext<'_, 'a>,
        arena: &'a Bump,
    ) -> Evaluated<'a> {
        Ok(Self::share(args, ctx, arena).unwrap_or_else(|| arena.null()))
    }
}

impl Fractional {
    fn share<'a>(
        args: &[&'a DataValue<'a>],
        ctx: &EvalContext<'_, 'a>,
        arena: &'a Bump,
    ) -> Option<&'a DataValue<'a>> {
        let (first, rest) = args.split_first()?;
        let (key, buckets) = match first {
            DataValue::String(key) => (*key, rest),
            DataValue::Null => (implied_key(ctx, arena)?, rest),
            DataValue::Bool(_) | DataValue::Number(_) | DataValue::Array(_) | DataValue::Object(_) => {
                (implied_key(ctx, arena)?, args)
            }
        };
        let mut total = 0;
        for bucket in buckets {
            total += weight(bucket)?;
        }
        if total == 0 || total > MAX_WEIGHTS {
            return None;
        }
        // The highest hash times the greatest total stays below 2^63.
        let at = (u64::from(hash(key)) * total.unsigned_abs()) >> 32;
        let mut end = 0;
        for bucket in buckets {
            end += weight(bucket)?.unsigned_abs();
            if at < end {
                return bucket.as_array()?.first();
            }
        }
        None
    }
}

/// The key where a rule names none: the flag's and the targeting key.
fn implied_key<'a>(ctx: &EvalContext<'_, 'a>, arena: &'a Bump) -> Option<&'a str> {
    let root = ctx.root_input();
    let targeting = root.get("targetingKey")?.as_str()?;
    let flag = root.get("$flagd")?.get("flagKey")?.as_str()?;
    let mut key = BumpString::with_capacity_in(flag.len() + targeting.len(), arena);
    key.push_str(flag);
    key.push_str(targeting);
    Some(key.into_bump_str())
}

/// A bucket's weight: 1 if it has none, and 0 if that is negative.
fn weight(bucket: &DataValue<'_>) -> Option<i64> {
    let bucket = bucket.as_array()?;
    let (variant, rest) = bucket.split_first()?;
    if matches!(variant, DataValue::Array(_) | DataValue::Object(_)) {
        return None;
    }
    match rest.first() {
        None | Some(DataValue::Null) => Some(1),
        Some(weight) => weight
            .as_i64()
            .filter(|weight| *weight <= MAX_WEIGHTS)
            .map(|w| w.max(0)),
    }
}

/// The hash that flagd takes: 32 bits of MurmurHash3 for x86, with the seed 0.
fn hash(key: &str) -> u32 {
    // Only reading fails, and memory is always read.
    murmur3::murmur3_32(&mut key.as_bytes(), 0).unwrap_or_default()
}

/// A comparison of versions, <https://flagd.dev/reference/custom-operations/semver-operation/>.
struct SemVer;

impl CustomOperator for SemVer {
    fn evaluate<'a>(
        &self,
        args: &[&'a DataValue<'a>],
        _: &mut EvalContext<'_, 'a>,
        arena: &'a Bump,
    ) -> Evaluated<'a> {
        let [left, operator, right] = args else {
            return Ok(arena.null());
        };
        let (Some(left), Some(right)) = (version(left), version(right)) else {
            return Ok(arena.null());
        };
        let order = left.cmp_precedence(&right);
        Ok(arena.bool(match operator.as_str() {
            Some("=") => order == Ordering::Equal,
            Some("!=") => order != Ordering::Equal,
            Some("<") => order == Ordering::Less,
            Some("<=") => order != Ordering::Greater,
            Some(">") => order == Ordering::Greater,
            Some(">=") => order != Ordering::Less,
            Some("^") => left.major == right.major,
            Some("~") => (left.major, left.minor) == (right.major, right.minor),
            _ => return Ok(arena.null()),
        }))
    }
}

/// A version, where `v1` and `1.2` are whole ones too, and what comes after a `+` doesn't count.
fn version(value: &DataValue<'_>) -> Option<Version> {
    let text = value.as_str()?;
    let text = text.strip_prefix(['v', 'V']).unwrap_or(text);
    if let Ok(mut version) = Version::parse(text) {
        version.build = BuildMetadata::EMPTY;
        return Some(version);
    }
    let mut parts = text.split('.').map(|part| {
        let plain = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let plain = plain && (part.len() == 1 || !part.starts_with('0'));
        plain.then(|| part.parse::<u64>().ok()).flatten()
    });
    let major = parts.next()??;
    let minor = parts.next().unwrap_or(Some(0))?;
    parts.next().is_none().then(|| Version::new(major, minor, 0))
}

/// Whether a text begins or ends with another, <https://flagd.dev/reference/custom-operations/string-comparison-operation/>.
struct OfTwoTexts(fn(&str, &str) -> bool);

impl CustomOperator for OfTwoTexts {
    fn evaluate<'a>(
        &self,
        args: &[&'a DataValue<'a>],
        _: &mut EvalContext<'_, 'a>,
        arena: &'a Bump,
    ) -> Evaluated<'a> {
        Ok(match args {
            [DataValue::String(text), DataValue::String(part)] => arena.bool((self.0)(text, part)),
            _ => arena.null(),
        })
    }
}

/// A text in other letters. Only those of ASCII change, so that all of flagd's providers agree.
struct OfText(fn(&str) -> String);

impl CustomOperator for OfText {
    fn evaluate<'a>(
        &self,
        args: &[&'a DataValue<'a>],
        _: &mut EvalContext<'_, 'a>,
        arena: &'a Bump,
    ) -> Evaluated<'a> {
        Ok(match args {
            [DataValue::String(text)] => arena.string(&(self.0)(text)),
            _ => arena.null(),
        })
    }
}

/// A comparison as JSONLogic's reference has it, with flagd's that null equals nothing but null.
#[derive(Clone, Copy)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl CustomOperator for Comparison {
    fn evaluate<'a>(
        &self,
        args: &[&'a DataValue<'a>],
        _: &mut EvalContext<'_, 'a>,
        arena: &'a Bump,
    ) -> Evaluated<'a> {
        let [left, right, rest @ ..] = args else {
            return Ok(arena.bool(false));
        };
        // Of three, the middle one has to be between the others; that is for comparisons of size alone.
        let between = match (self, rest) {
            (Self::Equal | Self::NotEqual, _) | (_, []) => true,
            (_, [third, ..]) => self.holds(right, third),
        };
        Ok(arena.bool(self.holds(left, right) && between))
    }
}

impl Comparison {
    fn holds(self, left: &DataValue<'_>, right: &DataValue<'_>) -> bool {
        match self {
            Self::Equal => equal(left, right),
            Self::NotEqual => !equal(left, right),
            Self::Less => order(left, right) == Some(Ordering::Less),
            Self::LessOrEqual => matches!(order(left, right), Some(Ordering::Less | Ordering::Equal)),
            Self::Greater => order(left, right) == Some(Ordering::Greater),
            Self::GreaterOrEqual => matches!(order(left, right), Some(Ordering::Greater | Ordering::Equal)),
        }
    }
}

fn equal(left: &DataValue<'_>, right: &DataValue<'_>) -> bool {
    match (left, right) {
        (DataValue::Null, DataValue::Null) => true,
        (DataValue::Null, _) | (_, DataValue::Null) => false,
        (DataValue::String(left), DataValue::String(right)) => left == right,
        _ => number(left).partial_cmp(&number(right)) == Some(Ordering::Equal),
    }
}

/// `None` where one of them is neither a number nor the like of one.
fn order(left: &DataValue<'_>, right: &DataValue<'_>) -> Option<Ordering> {
    match (left, right) {
        (DataValue::String(left), DataValue::String(right)) => Some(left.cmp(right)),
        _ => number(left).partial_cmp(&number(right)),
    }
}

/// A value as a number, as ECMAScript converts it.
fn number(value: &DataValue<'_>) -> f64 {
    match value {
        DataValue::Null => 0.0,
        DataValue::Bool(truth) => f64::from(u8::from(*truth)),
        DataValue::Number(number) => number.as_f64(),
        DataValue::String(text) => {
            let text = text.trim();
            // Rust reads words such as `nan` and `inf` as numbers too.
            let plain = text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
            match text {
                "" => 0.0,
                _ if plain => text.parse().unwrap_or(f64::NAN),
                _ => f64::NAN,
            }
        }
        DataValue::Array(_) | DataValue::Object(_) => f64::NAN,
    }
}

//! One flag, and what it comes to.

use crate::context::{Attributes, Source};
use crate::targeting::{Choice, Targeting};
use crate::{ErrorCode, Evaluation, Reason};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// One flag, ready to be evaluated.
#[derive(Debug)]
pub struct Flag {
    pub(crate) key: Box<str>,
    pub(crate) enabled: bool,
    pub(crate) variants: BTreeMap<Box<str>, Value>,
    /// A key of the variants.
    pub(crate) default: Option<Box<str>>,
    pub(crate) targeting: Option<Targeting>,
    pub(crate) metadata: Arc<Map<String, Value>>,
}

impl Flag {
    /// Evaluates it for a request. `wall` is what `$flagd.timestamp` says.
    ///
    /// Only those attributes that its targeting names are asked for.
    pub fn evaluate(&self, about: &dyn Attributes, wall: SystemTime) -> Evaluation<'_> {
        self.evaluate_for(Source::Attributes(about), wall)
    }

    /// Evaluates it for a context as OpenFeature has it: an object, or null for an empty one.
    pub fn evaluate_json(&self, context: &Value, wall: SystemTime) -> Evaluation<'_> {
        if !context.is_object() && !context.is_null() {
            return Evaluation::failed(ErrorCode::InvalidContext);
        }
        self.evaluate_for(Source::Json(context), wall)
    }

    fn evaluate_for(&self, source: Source<'_>, wall: SystemTime) -> Evaluation<'_> {
        if !self.enabled {
            return nothing(Reason::Disabled);
        }
        let Some(targeting) = &self.targeting else {
            return self.fallen_back(Reason::Static);
        };
        let seconds = wall
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX));
        targeting.choose(&self.key, source, seconds, |choice| match choice {
            Choice::Nothing => self.fallen_back(Reason::Default),
            Choice::Failed => Evaluation::failed(ErrorCode::ParseError),
            Choice::Variant(name) => self
                .variant(name, Reason::TargetingMatch)
                .unwrap_or_else(|| Evaluation::failed(ErrorCode::General)),
        })
    }

    /// As if its targeting had chosen this variant, be it switched off or not; `None` if it has no such variant.
    pub fn forced(&self, variant: &str) -> Option<Evaluation<'_>> {
        self.variant(variant, Reason::Static)
    }

    /// What its document and it itself say of it, in `metadata`: texts, numbers and booleans. Where both have a key,
    /// the flag's holds.
    pub fn metadata(&self) -> &Map<String, Value> {
        &self.metadata
    }

    /// The names of its variants, in order.
    pub fn variants(&self) -> impl Iterator<Item = &str> {
        self.variants.keys().map(|name| &**name)
    }

    /// The default variant. Without one the caller's own default is meant, which flagd calls DEFAULT in any case.
    fn fallen_back(&self, reason: Reason) -> Evaluation<'_> {
        let default = self.default.as_deref();
        default
            .and_then(|name| self.variant(name, reason))
            .unwrap_or_else(|| nothing(Reason::Default))
    }

    fn variant(&self, name: &str, reason: Reason) -> Option<Evaluation<'_>> {
        let (name, value) = self.variants.get_key_value(name)?;
        Some(Evaluation {
            variant: Some(name),
            value: Some(value),
            reason,
            error: None,
        })
    }
}

fn nothing(reason: Reason) -> Evaluation<'static> {
    Evaluation {
        variant: None,
        value: None,
        reason,
        error: None,
    }
}

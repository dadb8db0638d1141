//! Feature flags in flagd's format: definitions, and their evaluation.
//!
//! In the path: policy parses a [`FlagSet`] from a document; requests ask a [`Flag`] of it, with their attributes, for
//! an [`Evaluation`].
//!
//! This crate knows no policy, no I/O and no clock.
//!
//! Read first: [`FlagSet`], then [`Flag::evaluate`].

use serde_json::Value;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::SystemTime;

/// The flags of one document, or of several that were merged.
#[derive(Clone, Debug, Default)]
pub struct FlagSet {
    document: Arc<str>,
}

/// One flag, ready to be evaluated.
#[derive(Debug)]
pub struct Flag {}

/// What is wrong with a document.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct InvalidFlag {
    /// The field, as `flags.new-checkout.variants`.
    pub path: String,
    /// What is wrong, and what would be right.
    pub reason: String,
}

/// Where a flag's result comes from, as OpenFeature and flagd name it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reason {
    /// It has no targeting, or something forces it.
    Static,
    /// Its targeting chose.
    TargetingMatch,
    /// Its targeting chose nothing.
    Default,
    /// It is switched off.
    Disabled,
    /// It can't be evaluated.
    Error,
}

/// Why a flag can't be evaluated, as OpenFeature names it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ErrorCode {
    /// There is no such flag.
    FlagNotFound,
    /// The document, or its targeting, is broken.
    ParseError,
    /// The targeting chose something that is no variant, or failed.
    General,
    /// The value is not of the type that was asked for.
    TypeMismatch,
    /// The context is not an object.
    InvalidContext,
    /// The context has no targeting key, and must.
    TargetingKeyMissing,
}

/// What an evaluation came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation<'a> {
    /// The variant, where there is one.
    pub variant: Option<&'a str>,
    /// Its value; `None` is for the caller to have a default of its own.
    pub value: Option<&'a Value>,
    /// Why.
    pub reason: Reason,
    /// What went wrong, with [`Reason::Error`].
    pub error: Option<ErrorCode>,
}

/// What targeting may ask of a request, or of whatever a flag is evaluated for.
pub trait Attributes {
    /// The value at a path such as `targetingKey` or `headers.x-user`; `None` where there is none.
    fn attribute(&self, path: &str) -> Option<Cow<'_, str>>;
}

impl FlagSet {
    /// Reads a document.
    ///
    /// # Errors
    ///
    /// All that is wrong with it.
    pub fn parse(document: &str) -> Result<Self, Vec<InvalidFlag>> {
        Ok(Self {
            document: document.into(),
        })
    }

    /// The flags of several sets; where a key stands in two, the first one holds.
    pub fn merge<'a>(_sets: impl IntoIterator<Item = &'a Self>) -> Self {
        Self::default()
    }

    /// The document it was read from; empty for a merged one.
    pub fn document(&self) -> &str {
        &self.document
    }

    /// A flag by its key.
    pub fn get(&self, _key: &str) -> Option<&Flag> {
        None
    }

    /// The keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        std::iter::empty()
    }
}

impl Flag {
    /// Evaluates it. `wall` is what `$flagd.timestamp` says.
    pub fn evaluate(&self, _about: &dyn Attributes, _wall: SystemTime) -> Evaluation<'_> {
        Evaluation {
            variant: None,
            value: None,
            reason: Reason::Error,
            error: Some(ErrorCode::FlagNotFound),
        }
    }

    /// As if its targeting had chosen this variant; `None` if it has no such variant.
    pub fn forced(&self, _variant: &str) -> Option<Evaluation<'_>> {
        None
    }
}

impl PartialEq for FlagSet {
    fn eq(&self, other: &Self) -> bool {
        self.document == other.document
    }
}

impl Eq for FlagSet {}

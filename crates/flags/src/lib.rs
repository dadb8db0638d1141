//! Feature flags in flagd's format: definitions, and their evaluation.
//!
//! In the path: policy parses a [`FlagSet`] from a document; requests ask a [`Flag`] of it, with their attributes, for
//! an [`Evaluation`]. The format is that of <https://flagd.dev/reference/flag-definitions/> (schema v0), and so are
//! results, reasons and error codes.
//!
//! This crate knows no policy, no I/O and no clock.
//!
//! Read first: [`FlagSet`], then [`Flag::evaluate`].

mod context;
mod flag;
mod operators;
mod parse;
mod set;
mod targeting;

pub use context::Attributes;
pub use flag::Flag;
pub use set::FlagSet;

use serde_json::Value;

/// What is wrong with a document.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct InvalidFlag {
    /// The field, as `flags.new-checkout.variants`; `document` for the whole of it.
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
    /// Its targeting chose nothing, or it has neither targeting nor a default variant.
    Default,
    /// It is switched off.
    Disabled,
    /// It can't be evaluated.
    Error,
}

impl Reason {
    /// The name that OpenFeature has for it, as `TARGETING_MATCH`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Static => "STATIC",
            Self::TargetingMatch => "TARGETING_MATCH",
            Self::Default => "DEFAULT",
            Self::Disabled => "DISABLED",
            Self::Error => "ERROR",
        }
    }
}

/// Why a flag can't be evaluated, as OpenFeature names it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ErrorCode {
    /// There is no such flag.
    FlagNotFound,
    /// The document, or its targeting, is broken.
    ParseError,
    /// The targeting chose something that is no variant.
    General,
    /// The value is not of the type that was asked for.
    TypeMismatch,
    /// The context is not an object.
    InvalidContext,
    /// The context has no targeting key, and must.
    TargetingKeyMissing,
}

impl ErrorCode {
    /// The name that OpenFeature has for it, as `FLAG_NOT_FOUND`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FlagNotFound => "FLAG_NOT_FOUND",
            Self::ParseError => "PARSE_ERROR",
            Self::General => "GENERAL",
            Self::TypeMismatch => "TYPE_MISMATCH",
            Self::InvalidContext => "INVALID_CONTEXT",
            Self::TargetingKeyMissing => "TARGETING_KEY_MISSING",
        }
    }
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

impl Evaluation<'_> {
    /// That there is no result, because of an error.
    pub fn failed(error: ErrorCode) -> Self {
        Self {
            variant: None,
            value: None,
            reason: Reason::Error,
            error: Some(error),
        }
    }
}

//! Who may do what with a service.

use super::HostMatch;
use crate::Name;
use std::sync::Arc;
use std::time::Duration;

/// Rules about requests, and what it means that one matches.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AuthorizationPolicy {
    /// What it is for; empty for every service.
    pub services: Vec<Name>,
    /// What it means that a rule matches.
    pub action: AuthorizationAction,
    /// Whether it is done, or only told.
    pub mode: AuthorizationMode,
    /// It matches if one of these does. Empty only for `Allow`, which then allows nothing.
    pub rules: Arc<[AuthorizationRule]>,
    /// Whose tokens its rules go by, each issuer with each of its places once.
    pub jwt: Vec<Arc<JwtIssuer>>,
}

/// What it means that a rule matches.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum AuthorizationAction {
    /// The request may pass, unless a policy denies it.
    Allow,
    /// It may not.
    Deny,
    /// It is told.
    Audit,
}

/// Whether what a policy says is done.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum AuthorizationMode {
    /// It is.
    Enforce,
    /// It is only told.
    DryRun,
}

/// All that is said must hold; an empty list says nothing.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AuthorizationRule {
    /// Who asks: one of these.
    pub from: Vec<AuthorizationSource>,
    /// For what: one of these.
    pub to: Vec<AuthorizationTarget>,
    /// What else: all of these.
    pub when: Vec<AuthorizationCondition>,
}

/// Who asks.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AuthorizationSource {
    /// SPIFFE ids, with `*` in place of segments.
    pub identities: Vec<Box<str>>,
    /// Zones in those ids.
    pub zones: Vec<Name>,
    /// The opposite of `identities`.
    pub not_identities: Vec<Box<str>>,
    /// The opposite of `zones`.
    pub not_zones: Vec<Name>,
}

/// What is asked for.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AuthorizationTarget {
    /// Methods.
    pub methods: Vec<Box<str>>,
    /// Paths in the form that [`crate::path::for_matching`] makes, with `*` in place of segments.
    pub paths: Vec<Box<str>>,
    /// Hosts.
    pub hostnames: Vec<HostMatch>,
    /// Routes by which requests come.
    pub routes: Vec<Name>,
    /// The opposite of `methods`.
    pub not_methods: Vec<Box<str>>,
    /// The opposite of `paths`.
    pub not_paths: Vec<Box<str>>,
    /// The opposite of `hostnames`.
    pub not_hostnames: Vec<HostMatch>,
    /// The opposite of `routes`.
    pub not_routes: Vec<Name>,
}

/// A condition on a header or on a claim; not without values.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AuthorizationCondition {
    /// What is looked at.
    pub subject: AuthorizationSubject,
    /// One of these.
    pub values: Vec<ValuePattern>,
    /// None of these.
    pub not_values: Vec<ValuePattern>,
}

/// What a condition looks at.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum AuthorizationSubject {
    /// A header, lower case.
    Header(Box<str>),
    /// A claim by its name, or by a JSON pointer where it begins with a slash.
    Claim(Box<str>),
}

/// What a value is to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ValuePattern {
    /// Anything, as long as it is there.
    Any,
    /// This.
    Exact(Box<str>),
    /// Something that begins so.
    Prefix(Box<str>),
    /// Something that ends so.
    Suffix(Box<str>),
}

/// Whose tokens are valid.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct JwtIssuer {
    /// The claim `iss`.
    pub issuer: Box<str>,
    /// One of these is in the claim `aud`.
    pub audiences: Vec<Box<str>>,
    /// The issuer's keys.
    pub keys: JwksSource,
    /// Headers with tokens, lower case; the first that is there counts. At least one.
    pub headers: Vec<Box<str>>,
}

/// Where keys are from.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum JwksSource {
    /// They stand here: JSON that has been read once.
    Inline(Box<str>),
    /// They are to be had.
    Remote {
        /// From here.
        uri: Box<str>,
        /// As often.
        refresh: Duration,
    },
}

impl AuthorizationPolicy {
    /// A policy for every service, without rules.
    pub fn new(action: AuthorizationAction) -> Self {
        Self {
            services: Vec::new(),
            action,
            mode: AuthorizationMode::Enforce,
            rules: Arc::default(),
            jwt: Vec::new(),
        }
    }

    /// Every target of its rules, with its path.
    pub(crate) fn targets(&self) -> impl Iterator<Item = (String, &AuthorizationTarget)> {
        self.rules.iter().enumerate().flat_map(|(i, rule)| {
            let targets = rule.to.iter().enumerate();
            targets.map(move |(j, target)| (format!("spec.rules[{i}].to[{j}]"), target))
        })
    }

    /// Every source of its rules, with its path.
    pub(crate) fn sources(&self) -> impl Iterator<Item = (String, &AuthorizationSource)> {
        self.rules.iter().enumerate().flat_map(|(i, rule)| {
            let sources = rule.from.iter().enumerate();
            sources.map(move |(j, source)| (format!("spec.rules[{i}].from[{j}]"), source))
        })
    }
}

impl AuthorizationCondition {
    /// Whether it looks at a claim.
    pub const fn is_about_claim(&self) -> bool {
        matches!(self.subject, AuthorizationSubject::Claim(_))
    }
}

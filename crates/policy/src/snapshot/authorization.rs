//! Whether a request may pass: the policies of a service, and the decision.
//!
//! What would let a request pass is compared strictly, and what would refuse it leniently: where servers differ in what
//! they take for the same, a request isn't let pass for one reading and served by another.

use crate::model::{
    AuthorizationAction, AuthorizationCondition, AuthorizationMode, AuthorizationPolicy, AuthorizationRule,
    AuthorizationSource, AuthorizationSubject, AuthorizationTarget, HostMatch, JwtIssuer, Protocol, Spec,
    ValuePattern,
};
use crate::{Guards, Name, Snapshot, path};
use serde_json::{Map, Value};
use std::sync::Arc;

/// What rules look at in a request.
pub trait Asking {
    /// The SPIFFE id of whoever asks.
    fn identity(&self) -> Option<&str>;
    /// The zone in that id.
    fn zone(&self) -> Option<&str>;
    /// The host, lower case, without a port.
    fn host(&self) -> &str;
    /// The path as [`path::for_matching`] makes it.
    fn path(&self) -> &str;
    /// The method.
    fn method(&self) -> &str;
    /// The route by which it comes.
    fn route(&self) -> Option<&str>;
    /// Shows every value of a header (lower case).
    fn values(&self, header: &str, show: &mut dyn FnMut(&[u8]));
    /// The claims of a token that this issuer, of [`AuthorizationView::issuers`], has signed and that is valid.
    fn claims(&self, issuer: usize) -> Option<&Map<String, Value>>;
}

/// What a policy said of a request.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Decision {
    /// It lets it pass.
    Allow,
    /// It refuses it.
    Deny,
    /// It tells of it.
    Audit,
    /// It would refuse it if it were enforced.
    WouldDeny,
}

impl Decision {
    /// The word used in traces, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Audit => "audit",
            Self::WouldDeny => "would_deny",
        }
    }
}

/// Why a request may not pass.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Denied {
    /// A policy denies it, or none allows it.
    ByPolicy,
    /// None allows it, and some go by identity, of which there is none.
    NoIdentity,
    /// One that might refuse it can't be used.
    NoPolicy,
}

/// Is told what a policy said, and by which of its rules.
type Note<'a> = &'a mut dyn FnMut(&Arc<str>, Option<u32>, Decision);

/// The policies of a service.
#[derive(Clone, Debug, Default)]
pub struct AuthorizationView {
    /// Whether rules look at paths, so that those of two readings are to be refused.
    pub looks_at_paths: bool,
    /// Whether rules look at routes, of which only the proxy that routes knows.
    pub looks_at_routes: bool,
    /// Whose tokens rules go by, each once.
    pub issuers: Vec<Arc<JwtIssuer>>,
    /// A policy for the service that can't be used, and never could.
    closed_by: Option<Arc<str>>,
    /// There are no requests, only connections: rules that look at requests don't match.
    only_connections: bool,
    policies: Vec<Arc<PolicyView>>,
    /// Of each policy, the positions of its issuers.
    issuers_of: Vec<Box<[usize]>>,
}

/// One policy.
#[derive(Debug)]
pub(super) struct PolicyView {
    name: Arc<str>,
    spec: AuthorizationPolicy,
    looks_at_identity: bool,
}

impl PolicyView {
    pub(super) fn of(name: &Name, spec: &Spec) -> Option<Arc<Self>> {
        let Spec::AuthorizationPolicy(spec) = spec else {
            return None;
        };
        Some(Arc::new(Self {
            name: name.to_shared(),
            spec: spec.clone(),
            looks_at_identity: spec.rules.iter().any(|rule| !rule.from.is_empty()),
        }))
    }

    /// Whether it is for a service, and named it.
    fn is_for(&self, service: &Name) -> Option<bool> {
        let named = self.spec.services.contains(service);
        (named || self.spec.services.is_empty()).then_some(named)
    }
}

impl AuthorizationView {
    /// Of a service; `None` if it has no policies.
    pub(super) fn of(service: &Name, protocol: Protocol, all: &[Arc<PolicyView>]) -> Option<Arc<Self>> {
        let mut view = Self {
            only_connections: protocol == Protocol::Tcp,
            ..Self::default()
        };
        // What names the service says more than what is for all: it is the one to be told of.
        for wanted in [true, false] {
            for policy in all {
                if policy.is_for(service) == Some(wanted) {
                    view.add(policy);
                }
            }
        }
        (!view.policies.is_empty()).then(|| Arc::new(view))
    }

    fn add(&mut self, policy: &Arc<PolicyView>) {
        if self.only_connections {
            self.issuers_of.push(Box::default());
            self.policies.push(Arc::clone(policy));
            return;
        }
        let spec = &policy.spec;
        let mut targets = spec.targets().map(|(_, target)| target);
        self.looks_at_paths |= targets.any(|target| !target.paths.is_empty() || !target.not_paths.is_empty());
        let mut targets = spec.targets().map(|(_, target)| target);
        self.looks_at_routes |=
            targets.any(|target| !target.routes.is_empty() || !target.not_routes.is_empty());
        let issuers = spec.jwt.iter().map(|issuer| {
            let known = self.issuers.iter().position(|known| known == issuer);
            known.unwrap_or_else(|| {
                self.issuers.push(Arc::clone(issuer));
                self.issuers.len() - 1
            })
        });
        let issuers = issuers.collect();
        self.issuers_of.push(issuers);
        self.policies.push(Arc::clone(policy));
    }

    /// The policy on whose account nobody may pass, since it can't be used.
    pub const fn closed_by(&self) -> Option<&Arc<str>> {
        self.closed_by.as_ref()
    }

    /// Decides. `note` is told what each policy that had a say said, with the position of the rule that matched; of a
    /// policy that refuses since none of its rules did there is none.
    ///
    /// # Errors
    ///
    /// Why the request may not pass.
    pub fn decide(&self, asking: &impl Asking, note: Note<'_>) -> Result<(), Denied> {
        use AuthorizationAction::{Allow, Audit, Deny};
        use AuthorizationMode::{DryRun, Enforce};
        for (policy, rule) in self.matching(Audit, Enforce, asking) {
            note(&policy.name, Some(rule), Decision::Audit);
        }
        if let Some(policy) = &self.closed_by {
            note(policy, None, Decision::Deny);
            return Err(Denied::NoPolicy);
        }
        if let Some((policy, rule)) = self.matching(Deny, Enforce, asking).next() {
            note(&policy.name, Some(rule), Decision::Deny);
            return Err(Denied::ByPolicy);
        }
        let allowed = self.matching(Allow, Enforce, asking).next();
        if let Some((policy, rule)) = allowed {
            note(&policy.name, Some(rule), Decision::Allow);
        } else if let Some(policy) = self.those(Allow, Enforce).map(|(policy, _)| policy).next() {
            note(&policy.name, None, Decision::Deny);
            let by_identity = self.those(Allow, Enforce).any(|(p, _)| p.looks_at_identity);
            return Err(if by_identity && asking.identity().is_none() {
                Denied::NoIdentity
            } else {
                Denied::ByPolicy
            });
        }
        for (policy, rule) in self.matching(Deny, DryRun, asking) {
            note(&policy.name, Some(rule), Decision::WouldDeny);
        }
        if allowed.is_none()
            && let Some((policy, _)) = self.those(Allow, DryRun).next()
            && self.matching(Allow, DryRun, asking).next().is_none()
        {
            note(&policy.name, None, Decision::WouldDeny);
        }
        Ok(())
    }

    /// Policies of a kind.
    fn those(
        &self,
        action: AuthorizationAction,
        mode: AuthorizationMode,
    ) -> impl Iterator<Item = (&PolicyView, &[usize])> {
        let all = self.policies.iter().zip(&self.issuers_of);
        all.filter(move |(policy, _)| policy.spec.action == action && policy.spec.mode == mode)
            .map(|(policy, issuers)| (&**policy, &**issuers))
    }

    /// Those of which a rule matches, with the first one that does.
    fn matching(
        &self,
        action: AuthorizationAction,
        mode: AuthorizationMode,
        asking: &impl Asking,
    ) -> impl Iterator<Item = (&PolicyView, u32)> {
        self.those(action, mode).filter_map(move |(policy, issuers)| {
            let rules = (0..).zip(policy.spec.rules.iter());
            let matcher = Matcher {
                asking,
                lets_pass: action == AuthorizationAction::Allow,
            };
            rules
                .filter(|(_, rule)| !(self.only_connections && rule.looks_at_requests()))
                .filter(|(_, rule)| matcher.rule(rule, issuers))
                .map(|(position, _)| (policy, position))
                .next()
        })
    }
}

impl Snapshot {
    /// Refuses every request to the services of a policy that can't be used.
    pub(crate) fn close(&mut self, policy: &Name, guards: &Guards) {
        let policy: Arc<str> = policy.to_shared();
        for view in &mut self.services {
            let service = |name: &Name| *name.as_str() == *view.name;
            let guarded = match guards {
                Guards::All => true,
                Guards::Services(services) => services.iter().any(service),
            };
            if guarded {
                let policies = view.authorization.get_or_insert_default();
                let policies = Arc::make_mut(policies);
                // The first by name, of several, so that all proxies say the same.
                policies.closed_by.get_or_insert_with(|| Arc::clone(&policy));
            }
        }
    }
}

/// Compares a request with rules that let it pass, or that don't.
struct Matcher<'a, A> {
    asking: &'a A,
    lets_pass: bool,
}

impl<A: Asking> Matcher<'_, A> {
    fn rule(&self, rule: &AuthorizationRule, issuers: &[usize]) -> bool {
        let any = |none: bool, found: bool| none || found;
        any(
            rule.from.is_empty(),
            rule.from.iter().any(|source| self.source(source)),
        ) && any(
            rule.to.is_empty(),
            rule.to.iter().any(|target| self.target(target)),
        ) && self.conditions(&rule.when, issuers)
    }

    fn source(&self, source: &AuthorizationSource) -> bool {
        let identity = self.asking.identity();
        let zone = self.asking.zone();
        one_of(&source.identities, |pattern| {
            identity.is_some_and(|id| identity_matches(pattern, id))
        }) && one_of(&source.zones, |wanted| zone == Some(wanted.as_str()))
            && none_of(&source.not_identities, |pattern| match identity {
                Some(id) => identity_matches(pattern, id),
                None => self.lets_pass,
            })
            && none_of(&source.not_zones, |wanted| match zone {
                Some(zone) => zone == wanted.as_str(),
                None => self.lets_pass,
            })
    }

    fn target(&self, target: &AuthorizationTarget) -> bool {
        let asking = self.asking;
        let host = asking.host();
        // Fully qualified or not, it is the same host.
        let host = host.strip_suffix('.').unwrap_or(host);
        let path = asking.path();
        let lenient = !self.lets_pass;
        one_of(&target.methods, |method| **method == *asking.method())
            && one_of(&target.paths, |pattern| path_matches(pattern, path, lenient))
            && one_of(&target.hostnames, |wanted| host_matches(wanted, host))
            && one_of(&target.routes, |route| asking.route() == Some(route.as_str()))
            && none_of(&target.not_methods, |method| **method == *asking.method())
            && none_of(&target.not_paths, |pattern| path_matches(pattern, path, !lenient))
            && none_of(&target.not_hostnames, |wanted| host_matches(wanted, host))
            && none_of(&target.not_routes, |route| match asking.route() {
                Some(by) => by == route.as_str(),
                None => self.lets_pass,
            })
    }

    /// All must hold of one token, where they are about tokens.
    fn conditions(&self, conditions: &[AuthorizationCondition], issuers: &[usize]) -> bool {
        let all = |claims: Option<&Map<String, Value>>| {
            conditions.iter().all(|condition| match &condition.subject {
                AuthorizationSubject::Header(name) => self.header(name, condition),
                AuthorizationSubject::Claim(name) => self.claim(name, claims, condition),
            })
        };
        if !conditions.iter().any(AuthorizationCondition::is_about_claim) {
            return all(None);
        }
        let mut tokens = issuers
            .iter()
            .filter_map(|issuer| self.asking.claims(*issuer))
            .peekable();
        if tokens.peek().is_none() {
            return all(None);
        }
        tokens.any(|claims| all(Some(claims)))
    }

    fn header(&self, name: &str, condition: &AuthorizationCondition) -> bool {
        let lenient = !self.lets_pass;
        let found = |pattern: &[ValuePattern], lenient: bool| {
            let (mut seen, mut matched) = (false, !lenient);
            self.asking.values(name, &mut |value| {
                seen = true;
                let holds = pattern.iter().any(|pattern| pattern.holds(value));
                if lenient {
                    matched |= holds || listed(value).any(|entry| pattern.iter().any(|p| p.holds(entry)));
                } else {
                    matched &= holds;
                }
            });
            seen && matched
        };
        (condition.values.is_empty() || found(&condition.values, lenient))
            && (condition.not_values.is_empty() || !found(&condition.not_values, !lenient))
    }

    fn claim(
        &self,
        name: &str,
        claims: Option<&Map<String, Value>>,
        condition: &AuthorizationCondition,
    ) -> bool {
        let value = claims.and_then(|claims| claim(claims, name));
        let found = |patterns: &[ValuePattern]| {
            value.is_some_and(|value| patterns.iter().any(|pattern| pattern.holds_of(value)))
        };
        (condition.values.is_empty() || found(&condition.values))
            && (condition.not_values.is_empty()
                || match value {
                    Some(_) => !found(&condition.not_values),
                    None => !self.lets_pass,
                })
    }
}

/// A claim by its name, or by a JSON pointer.
fn claim<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let Some(pointer) = name.strip_prefix('/') else {
        return claims.get(name);
    };
    let (first, rest) = match pointer.find('/') {
        Some(at) => pointer.split_at(at),
        None => (pointer, ""),
    };
    claims
        .get(&*first.replace("~1", "/").replace("~0", "~"))?
        .pointer(rest)
}

impl ValuePattern {
    fn holds(&self, value: &[u8]) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(want) => value == want.as_bytes(),
            Self::Prefix(want) => value.starts_with(want.as_bytes()),
            Self::Suffix(want) => value.ends_with(want.as_bytes()),
        }
    }

    /// Of a claim: itself, or an entry of it.
    fn holds_of(&self, value: &Value) -> bool {
        match value {
            Value::Null => false,
            Value::Bool(value) => self.holds(if *value { b"true" } else { b"false" }),
            Value::Number(value) => self.holds(value.to_string().as_bytes()),
            // The claim `scope` is a list with spaces (RFC 8693 §4.2).
            Value::String(text) => {
                self.holds(text.as_bytes()) || text.split(' ').any(|entry| self.holds(entry.as_bytes()))
            }
            Value::Array(entries) => entries.iter().any(|entry| match entry {
                Value::Array(_) | Value::Object(_) | Value::Null => false,
                Value::String(text) => self.holds(text.as_bytes()),
                entry @ (Value::Bool(_) | Value::Number(_)) => self.holds_of(entry),
            }),
            Value::Object(_) => *self == Self::Any,
        }
    }
}

/// The entries of a value that may be a list (RFC 9110 §5.6.1).
fn listed(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(<[u8]>::trim_ascii)
}

fn one_of<T>(wanted: &[T], holds: impl FnMut(&T) -> bool) -> bool {
    wanted.is_empty() || wanted.iter().any(holds)
}

fn none_of<T>(unwanted: &[T], holds: impl FnMut(&T) -> bool) -> bool {
    !unwanted.iter().any(holds)
}

fn host_matches(wanted: &HostMatch, host: &str) -> bool {
    match wanted {
        HostMatch::Any => true,
        HostMatch::Exact(want) => **want == *host,
        HostMatch::Suffix(suffix) => host.len() > suffix.len() && host.ends_with(&**suffix),
    }
}

fn path_matches(pattern: &str, path: &str, lenient: bool) -> bool {
    if !lenient {
        return segments_match(pattern, path, |want, got| want == got);
    }
    let alike = |want: &str, got: &str| want.eq_ignore_ascii_case(got);
    let bare = |path| str::strip_suffix(path, "/").unwrap_or(path);
    segments_match(pattern, path, alike) || segments_match(bare(pattern), bare(path), alike)
}

/// Segment by segment; `*` is one that isn't empty, and at the end whatever follows.
fn segments_match(pattern: &str, text: &str, alike: impl Fn(&str, &str) -> bool) -> bool {
    let mut wanted = pattern.split('/').peekable();
    let mut segments = text.split('/');
    loop {
        match (wanted.next(), segments.next()) {
            (None, None) => return true,
            (Some("*"), Some(_)) if wanted.peek().is_none() => return true,
            (Some("*"), Some(segment)) if !segment.is_empty() => {}
            (Some(want), Some(segment)) if want != "*" && alike(want, segment) => {}
            (Some(_) | None, Some(_) | None) => return false,
        }
    }
}

/// The zone in the id of a proxy: `spiffe://DOMAIN/zone/ZONE/proxy/NAME`.
pub fn zone_of(identity: &str) -> Option<&str> {
    let (_, path) = identity.strip_prefix("spiffe://")?.split_once('/')?;
    let (zone, rest) = path.strip_prefix("zone/")?.split_once('/')?;
    let name = rest.strip_prefix("proxy/")?;
    (!name.contains('/')).then_some(zone)
}

/// Whether a SPIFFE id fits a pattern of a source.
pub(crate) fn identity_matches(pattern: &str, identity: &str) -> bool {
    segments_match(pattern, identity, |want, got| want == got)
}

/// A pattern of paths in the form in which requests' paths are matched.
pub fn path_pattern(text: &str) -> Box<str> {
    path::of_policy(text).into()
}

#[cfg(test)]
mod tests;

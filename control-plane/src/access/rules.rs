//! Who may do what, decided from arguments alone.

use leeward_policy::model::{AccessBinding, AccessPolicy, AccessRole, AccessSubject};
use leeward_policy::{Kind, Resource, Spec};
use std::collections::BTreeMap;

/// Who asks, as far as roles go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Subject {
    /// A control plane of the mesh: whoever holds its key holds everything. The way back in for those who are locked out.
    Control,
    /// A user with a certificate of the mesh, by the name in it.
    Certificate(String),
    /// A user with a token.
    Token {
        /// What the token calls it.
        user: String,
        /// The groups that it says.
        groups: Vec<String>,
    },
}

/// What all AccessPolicies say together.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Rules {
    /// `None`: there is no AccessPolicy, and users with a certificate may do everything.
    bindings: Option<Vec<AccessBinding>>,
}

/// What somebody may do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Grants {
    /// Everything.
    all: bool,
    bindings: Vec<AccessBinding>,
}

/// What something is to be done with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scope<'a> {
    /// Anything: whether there is something that it may be done with at all.
    Some,
    /// The mesh as a whole, or what is no resource.
    Whole,
    /// Some resource of a kind.
    Kind(Kind),
    /// A resource. Labels that can't be read are none, and only a binding that asks for none is for it.
    Resource(Kind, Option<&'a BTreeMap<String, String>>),
}

impl Rules {
    /// Of all AccessPolicies that there are; `None` stands for one that can't be read, and gives nobody anything.
    pub(crate) fn new<'a>(policies: impl IntoIterator<Item = Option<&'a AccessPolicy>>) -> Self {
        let mut bindings = None;
        for policy in policies {
            let all = bindings.get_or_insert_with(Vec::new);
            all.extend(policy.into_iter().flat_map(|policy| &policy.bindings).cloned());
        }
        Self { bindings }
    }

    /// Whether there is no AccessPolicy.
    pub(crate) const fn is_open(&self) -> bool {
        self.bindings.is_none()
    }

    /// What somebody may do, in a call that gives a reason or in one that doesn't.
    pub(crate) fn grants(&self, subject: &Subject, has_reason: bool) -> Grants {
        let bindings = match (&self.bindings, subject) {
            (_, Subject::Control) | (None, Subject::Certificate(_)) => {
                return Grants {
                    all: true,
                    bindings: Vec::new(),
                };
            }
            // Who has a token alone was let in by an issuer, who doesn't know the mesh: it has what policy gives it.
            (None, Subject::Token { .. }) => Vec::new(),
            (Some(bindings), _) => {
                let counts = |binding: &&AccessBinding| has_reason || binding.role != AccessRole::Breakglass;
                let of = bindings
                    .iter()
                    .filter(counts)
                    .filter(|binding| binding.is_of(subject));
                of.cloned().collect()
            }
        };
        Grants { all: false, bindings }
    }

    /// Whether somebody holds breakglass for everything, so that not everybody is locked out; or there is nothing to be
    /// locked out of.
    pub(crate) fn has_a_way_in(&self) -> bool {
        let is_way_in = |binding: &AccessBinding| {
            binding.role == AccessRole::Breakglass && binding.is_for_all() && !binding.subjects.is_empty()
        };
        self.bindings
            .as_ref()
            .is_none_or(|bindings| bindings.iter().any(is_way_in))
    }
}

impl Grants {
    /// Whether a role is had for something.
    pub(crate) fn has(&self, role: AccessRole, scope: Scope<'_>) -> bool {
        let is_for = |binding: &AccessBinding| match scope {
            Scope::Some => true,
            Scope::Whole => binding.is_for_all(),
            Scope::Kind(kind) => binding.covers(kind),
            Scope::Resource(kind, labels) => {
                let matches = match labels {
                    Some(labels) => binding.selector.matches(labels),
                    None => binding.selector.is_empty(),
                };
                binding.covers(kind) && matches
            }
        };
        self.all
            || self
                .bindings
                .iter()
                .any(|binding| binding.role >= role && is_for(binding))
    }

    /// Whether a resource may be seen.
    pub(crate) fn sees(&self, kind: Kind, labels: &BTreeMap<String, String>) -> bool {
        self.has(AccessRole::Reader, Scope::Resource(kind, Some(labels)))
    }

    /// Whether everything may be seen, so that nothing has to be looked at one by one.
    pub(crate) fn sees_all(&self) -> bool {
        self.has(AccessRole::Reader, Scope::Whole)
    }

    /// The role that it lacks to make one of another, if it lacks one. Neither is nothing to be done.
    pub(crate) fn lacks(&self, before: Before<'_>, after: Option<&Resource>) -> Option<AccessRole> {
        let needed = needed(before, after);
        let before = match before {
            Before::Nothing => None,
            Before::Unread(kind) => Some((kind, None)),
            Before::Known(resource) => Some((resource.spec.kind(), Some(&resource.labels))),
        };
        let after = after.map(|resource| (resource.spec.kind(), Some(&resource.labels)));
        let may = |(kind, labels)| {
            // Who may write an AccessPolicy that has some labels could give itself one without.
            let scope = if kind == Kind::AccessPolicy {
                Scope::Whole
            } else {
                Scope::Resource(kind, labels)
            };
            self.has(needed, scope)
        };
        let may = before.into_iter().chain(after).all(may);
        (!may).then_some(needed)
    }
}

/// What stands where something is to be written.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Before<'a> {
    /// Nothing.
    Nothing,
    /// What can't be read.
    Unread(Kind),
    /// This.
    Known(&'a Resource),
}

/// The role that a change takes.
fn needed(before: Before<'_>, after: Option<&Resource>) -> AccessRole {
    let kind = match (before, after) {
        (_, Some(after)) => after.spec.kind(),
        (Before::Known(before), None) => before.spec.kind(),
        (Before::Unread(kind), None) => kind,
        (Before::Nothing, None) => return AccessRole::Reader,
    };
    let role = write_role(kind);
    let drain = |resource: &Resource| {
        if let Spec::Zone(zone) = &resource.spec {
            zone.drain.clone()
        } else {
            None
        }
    };
    let drained_before = match before {
        Before::Known(before) => drain(before),
        Before::Nothing | Before::Unread(_) => None,
    };
    // Taking a zone out of use, or putting it back, is operation whoever the zone's editor is.
    if drained_before != after.and_then(drain) {
        role.max(AccessRole::Operator)
    } else {
        role
    }
}

/// The role that writing resources of a kind takes.
const fn write_role(kind: Kind) -> AccessRole {
    match kind {
        Kind::AccessPolicy => AccessRole::Breakglass,
        // Who gets a certificate is operation, as whose join token it is.
        Kind::Workload
        | Kind::CircuitOverride
        | Kind::DegradationOverride
        | Kind::RolloutPolicy
        | Kind::BackupPolicy
        | Kind::RecoveryObjective => AccessRole::Operator,
        Kind::Zone
        | Kind::Plugin
        | Kind::FeatureFlags
        | Kind::Queue
        | Kind::ResiliencePolicy
        | Kind::Service
        | Kind::FallbackPolicy
        | Kind::Gateway
        | Kind::Route
        | Kind::DegradationPolicy
        | Kind::AuthorizationPolicy => AccessRole::Editor,
    }
}

/// Whether resources of a kind are written by those who operate, one after the other, and so are nobody's own.
pub(crate) const fn is_operation(kind: Kind) -> bool {
    kind.is_for_emergencies()
}

trait Of {
    fn is_of(&self, subject: &Subject) -> bool;
    fn covers(&self, kind: Kind) -> bool;
}

impl Of for AccessBinding {
    fn is_of(&self, subject: &Subject) -> bool {
        self.subjects.iter().any(|of| match (of, subject) {
            (AccessSubject::User(pattern), Subject::Certificate(name)) => pattern.matches(name),
            (AccessSubject::OidcUser(pattern), Subject::Token { user, .. }) => pattern.matches(user),
            (AccessSubject::Group(pattern), Subject::Token { groups, .. }) => {
                groups.iter().any(|group| pattern.matches(group))
            }
            (AccessSubject::User(_), _) | (AccessSubject::OidcUser(_) | AccessSubject::Group(_), _) => false,
        })
    }

    fn covers(&self, kind: Kind) -> bool {
        self.kinds.is_empty() || self.kinds.contains(&kind)
    }
}

#[cfg(test)]
mod tests;

//! Who may do what with the control plane.

use super::Kind;
use crate::Selector;

/// Gives roles to those who use the control plane's API.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AccessPolicy {
    /// Who has which role, for what. At least one.
    pub bindings: Vec<AccessBinding>,
}

/// Some have a role for something.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AccessBinding {
    /// What they may do.
    pub role: AccessRole,
    /// Who. At least one.
    pub subjects: Vec<AccessSubject>,
    /// With resources of these kinds; empty for every kind.
    pub kinds: Vec<Kind>,
    /// With resources that have these labels.
    pub selector: Selector,
}

/// What somebody may do. Each may do what those before it may.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum AccessRole {
    /// See.
    Reader,
    /// Apply and delete resources.
    Editor,
    /// Operate the mesh.
    Operator,
    /// Everything, for a reason.
    Breakglass,
}

/// One or many who use the API.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum AccessSubject {
    /// Users with a certificate, by the name in it.
    User(SubjectPattern),
    /// Users with a token, by what it calls them.
    OidcUser(SubjectPattern),
    /// Users whose token says that they are of a group.
    Group(SubjectPattern),
}

/// Whose name is meant.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SubjectPattern {
    /// This one.
    Exact(Box<str>),
    /// Every one that begins so; everybody, if that is empty.
    Prefix(Box<str>),
}

impl AccessBinding {
    /// Whether it is for everything.
    pub fn is_for_all(&self) -> bool {
        self.kinds.is_empty() && self.selector.is_empty()
    }
}

impl AccessRole {
    /// Its name, for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Editor => "editor",
            Self::Operator => "operator",
            Self::Breakglass => "breakglass",
        }
    }
}

impl SubjectPattern {
    /// Whether a name is meant.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *name,
            Self::Prefix(prefix) => name.starts_with(&**prefix),
        }
    }
}

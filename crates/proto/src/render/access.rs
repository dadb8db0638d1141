//! Who may do what with the control plane, on the wire.

use crate::v1;
use leeward_policy::model::{AccessBinding, AccessPolicy, AccessRole, AccessSubject, SubjectPattern};
use v1::access_subject::Subject;

pub(super) fn policy(policy: &AccessPolicy) -> v1::AccessPolicy {
    v1::AccessPolicy {
        bindings: policy.bindings.iter().map(binding).collect(),
    }
}

fn binding(binding: &AccessBinding) -> v1::AccessBinding {
    let role = match binding.role {
        AccessRole::Reader => v1::AccessRole::Reader,
        AccessRole::Editor => v1::AccessRole::Editor,
        AccessRole::Operator => v1::AccessRole::Operator,
        AccessRole::Breakglass => v1::AccessRole::Breakglass,
    };
    v1::AccessBinding {
        role: role.into(),
        subjects: binding.subjects.iter().map(subject).collect(),
        kinds: binding.kinds.iter().map(ToString::to_string).collect(),
        selector: binding.selector.to_string(),
    }
}

fn subject(subject: &AccessSubject) -> v1::AccessSubject {
    let subject = match subject {
        AccessSubject::User(name) => Subject::User(pattern(name)),
        AccessSubject::OidcUser(name) => Subject::OidcUser(pattern(name)),
        AccessSubject::Group(name) => Subject::Group(pattern(name)),
    };
    v1::AccessSubject {
        subject: Some(subject),
    }
}

fn pattern(pattern: &SubjectPattern) -> String {
    match pattern {
        SubjectPattern::Exact(text) => text.to_string(),
        SubjectPattern::Prefix(text) => format!("{text}*"),
    }
}

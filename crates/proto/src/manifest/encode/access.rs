//! Who may do what with the control plane.

use super::super::words::{self, word};
use super::fields;
use crate::v1;
use serde_json::{Value, json};
use v1::access_subject::Subject;

pub(super) fn policy(policy: &v1::AccessPolicy) -> Value {
    let bindings: Vec<_> = policy.bindings.iter().map(binding).collect();
    fields([("bindings", json!(bindings))])
}

fn binding(binding: &v1::AccessBinding) -> Value {
    let subjects: Vec<_> = binding.subjects.iter().map(subject).collect();
    fields([
        ("role", json!(word(words::ACCESS_ROLE, binding.role))),
        ("subjects", json!(subjects)),
        ("kinds", json!(binding.kinds)),
        ("selector", json!(binding.selector)),
    ])
}

fn subject(subject: &v1::AccessSubject) -> Value {
    match &subject.subject {
        None => json!({}),
        Some(Subject::User(name)) => json!({ "user": name }),
        Some(Subject::OidcUser(name)) => json!({ "oidcUser": name }),
        Some(Subject::Group(name)) => json!({ "group": name }),
    }
}

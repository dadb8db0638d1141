//! Who may do what with the control plane.

use crate::field::Fields;
use crate::v1;
use leeward_policy::model::{AccessBinding, AccessPolicy, AccessRole, AccessSubject, SubjectPattern};
use leeward_policy::{Kind, Selector};
use v1::access_subject::Subject;

/// Bindings of a policy, and subjects of a binding.
const MOST: usize = 256;
/// Kinds of a binding.
const MOST_KINDS: usize = 64;
/// Longest name of a subject, in bytes.
const LONGEST: usize = 253;

pub(super) fn access_policy(f: &mut Fields, wire: &v1::AccessPolicy) -> Option<AccessPolicy> {
    f.count("spec.bindings", wire.bindings.len(), 1..=MOST);
    let bindings: Option<Vec<_>> = wire
        .bindings
        .iter()
        .enumerate()
        .map(|(i, wire)| binding(f, &format!("spec.bindings[{i}]"), wire))
        .collect();
    Some(AccessPolicy { bindings: bindings? })
}

fn binding(f: &mut Fields, path: &str, wire: &v1::AccessBinding) -> Option<AccessBinding> {
    let role = match wire.role() {
        v1::AccessRole::Unspecified => f.reject(
            format!("{path}.role"),
            "is missing or not known; want Reader, Editor, Operator or Breakglass",
        ),
        v1::AccessRole::Reader => Some(AccessRole::Reader),
        v1::AccessRole::Editor => Some(AccessRole::Editor),
        v1::AccessRole::Operator => Some(AccessRole::Operator),
        v1::AccessRole::Breakglass => Some(AccessRole::Breakglass),
    };
    f.count(&format!("{path}.subjects"), wire.subjects.len(), 1..=MOST);
    let subjects = wire.subjects.iter().enumerate();
    let subjects: Vec<_> = subjects
        .filter_map(|(i, wire)| subject(f, &format!("{path}.subjects[{i}]"), wire))
        .collect();
    f.count(&format!("{path}.kinds"), wire.kinds.len(), 0..=MOST_KINDS);
    let mut kinds = Vec::new();
    for (i, text) in wire.kinds.iter().enumerate() {
        let kind = Kind::ALL.into_iter().find(|kind| kind.as_str() == text);
        let kind = kind.or_else(|| {
            let known = Kind::ALL.map(Kind::as_str).join(", ");
            f.reject(
                format!("{path}.kinds[{i}]"),
                format!("{text:?} is no kind; want {known}"),
            )
        });
        kinds.extend(kind);
    }
    f.unique(&format!("{path}.kinds"), "", &wire.kinds);
    let selector = Selector::parse(&wire.selector);
    let selector = selector.map_or_else(|error| f.reject(format!("{path}.selector"), error), Some);
    Some(AccessBinding {
        role: role?,
        subjects,
        kinds,
        selector: selector?,
    })
}

fn subject(f: &mut Fields, path: &str, wire: &v1::AccessSubject) -> Option<AccessSubject> {
    let (field, text, make): (_, _, fn(_) -> _) = match &wire.subject {
        None => return f.reject(path, "is empty; want user, oidcUser or group"),
        Some(Subject::User(text)) => ("user", text, AccessSubject::User),
        Some(Subject::OidcUser(text)) => ("oidcUser", text, AccessSubject::OidcUser),
        Some(Subject::Group(text)) => ("group", text, AccessSubject::Group),
    };
    let bad = |f: &mut Fields, why: &str| f.reject(format!("{path}.{field}"), format!("{text:?} {why}"));
    if text.is_empty() || text.len() > LONGEST {
        return bad(f, "has a length that is none; want 1 to 253 bytes");
    }
    let pattern = match text.strip_suffix('*') {
        Some(prefix) => SubjectPattern::Prefix(prefix.into()),
        None => SubjectPattern::Exact(text.as_str().into()),
    };
    let (SubjectPattern::Prefix(plain) | SubjectPattern::Exact(plain)) = &pattern;
    if plain.contains(|c: char| c == '*' || c.is_control()) {
        return bad(
            f,
            "has a * that isn't at its end, or a control character; want a name, or how names begin and a * at the end",
        );
    }
    Some(make(pattern))
}

//! Who may do what with the control plane.

use super::super::words;
use super::fields::Fields;
use crate::v1;
use v1::access_subject::Subject;

pub(super) fn policy(f: &mut Fields<'_>) -> v1::AccessPolicy {
    v1::AccessPolicy {
        bindings: f.list("bindings", |f| v1::AccessBinding {
            role: f.choice("role", words::ACCESS_ROLE),
            subjects: f.list("subjects", subject),
            // A list that names no kind would be for every kind.
            kinds: f.some_texts("kinds"),
            selector: f.text("selector"),
        }),
    }
}

fn subject(f: &mut Fields<'_>) -> v1::AccessSubject {
    let texts = [
        ("user", Subject::User as fn(String) -> _),
        ("oidcUser", Subject::OidcUser),
        ("group", Subject::Group),
    ];
    let named = texts.map(|(field, make)| Some(f.text(field)).filter(|text| !text.is_empty()).map(make));
    v1::AccessSubject {
        subject: f.exclusive("user, oidcUser and group", named),
    }
}

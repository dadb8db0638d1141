//! Who may do what with the control plane, at random.

use leeward_policy::model::{AccessBinding, AccessPolicy, AccessRole, AccessSubject, SubjectPattern};
use leeward_policy::{Kind, Selector, Spec};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

fn subject() -> impl Strategy<Value = AccessSubject> {
    let exact = "[a-z@.]{1,9}".prop_map(|text| SubjectPattern::Exact(text.into()));
    let prefix = "[a-z@.]{0,9}".prop_map(|text| SubjectPattern::Prefix(text.into()));
    let make = [
        AccessSubject::User as fn(_) -> _,
        AccessSubject::OidcUser,
        AccessSubject::Group,
    ];
    (prop_oneof![exact, prefix], select(make.to_vec())).prop_map(|(pattern, make)| make(pattern))
}

fn binding() -> impl Strategy<Value = AccessBinding> {
    let roles = [
        AccessRole::Reader,
        AccessRole::Editor,
        AccessRole::Operator,
        AccessRole::Breakglass,
    ];
    let selectors = ["", "env=prod", "!a,b", "team in (a,b),tier!=x,c notin (d,)"];
    (
        select(roles.to_vec()),
        vec(subject(), 1..4),
        subsequence(Kind::ALL.to_vec(), 0..4),
        select(selectors.to_vec()),
    )
        .prop_map(|(role, subjects, kinds, selector)| AccessBinding {
            role,
            subjects,
            kinds,
            selector: Selector::parse(selector).unwrap(),
        })
}

pub(super) fn policy() -> impl Strategy<Value = Spec> {
    vec(binding(), 1..4).prop_map(|bindings| Spec::AccessPolicy(AccessPolicy { bindings }))
}

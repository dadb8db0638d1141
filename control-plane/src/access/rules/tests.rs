use super::*;
use leeward_policy::model::{Queue, Service, SubjectPattern, Zone};
use leeward_policy::{Name, Selector};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

const ROLES: [AccessRole; 4] = [
    AccessRole::Reader,
    AccessRole::Editor,
    AccessRole::Operator,
    AccessRole::Breakglass,
];

fn user(name: &str) -> Subject {
    Subject::Certificate(name.to_owned())
}

fn labels(team: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("team".to_owned(), team.to_owned())])
}

fn service(team: &str) -> Resource {
    Resource {
        name: Name::parse("cart").unwrap(),
        revision: 0,
        labels: labels(team),
        spec: Spec::Service(Service::new(vec![])),
    }
}

fn bind(role: AccessRole, user: &str, kinds: &[Kind], selector: &str) -> AccessBinding {
    let pattern = match user.strip_suffix('*') {
        Some(prefix) => SubjectPattern::Prefix(prefix.into()),
        None => SubjectPattern::Exact(user.into()),
    };
    AccessBinding {
        role,
        subjects: vec![AccessSubject::User(pattern)],
        kinds: kinds.to_vec(),
        selector: Selector::parse(selector).unwrap(),
    }
}

fn rules(bindings: Vec<AccessBinding>) -> Rules {
    Rules::new([Some(&AccessPolicy { bindings })])
}

#[test]
fn without_policy_users_of_the_mesh_may_do_everything_and_tokens_nothing() {
    let open = Rules::new([]);
    assert!(open.is_open() && open.has_a_way_in());
    assert!(
        open.grants(&user("ada"), false)
            .has(AccessRole::Breakglass, Scope::Whole)
    );
    let token = Subject::Token {
        user: "ada".into(),
        groups: vec!["admins".into()],
    };
    assert!(!open.grants(&token, true).has(AccessRole::Reader, Scope::Some));
}

#[test]
fn a_policy_that_cannot_be_read_gives_nobody_anything() {
    let closed = Rules::new([None]);
    assert!(!closed.is_open() && !closed.has_a_way_in());
    assert!(
        !closed
            .grants(&user("ada"), true)
            .has(AccessRole::Reader, Scope::Some)
    );
    assert!(
        closed
            .grants(&Subject::Control, false)
            .has(AccessRole::Breakglass, Scope::Whole)
    );
}

#[test]
fn nobody_relabels_out_of_bounds() {
    let grants =
        rules(vec![bind(AccessRole::Editor, "ada", &[Kind::Service], "team=a")]).grants(&user("ada"), false);
    let (ours, theirs) = (service("a"), service("b"));
    assert_eq!(grants.lacks(Before::Known(&ours), Some(&ours)), None);
    assert_eq!(grants.lacks(Before::Nothing, Some(&ours)), None);
    assert_eq!(grants.lacks(Before::Known(&ours), None), None);
    let editor = Some(AccessRole::Editor);
    assert_eq!(grants.lacks(Before::Known(&ours), Some(&theirs)), editor);
    assert_eq!(grants.lacks(Before::Known(&theirs), Some(&ours)), editor);
    assert_eq!(grants.lacks(Before::Known(&theirs), None), editor);
    assert_eq!(grants.lacks(Before::Nothing, Some(&theirs)), editor);
    assert_eq!(grants.lacks(Before::Unread(Kind::Service), Some(&ours)), editor);
    // Nor is a part of the mesh the mesh.
    assert!(!grants.has(AccessRole::Reader, Scope::Whole));
    assert!(
        grants.has(AccessRole::Reader, Scope::Some)
            && grants.has(AccessRole::Editor, Scope::Kind(Kind::Service))
    );
    assert!(!grants.has(AccessRole::Reader, Scope::Kind(Kind::Route)));
}

#[test]
fn a_drain_takes_an_operator_and_access_takes_breakglass() {
    let all = |role| rules(vec![bind(role, "ada", &[], "")]).grants(&user("ada"), true);
    let zone = |drain| Resource {
        name: Name::parse("a").unwrap(),
        revision: 0,
        labels: BTreeMap::new(),
        spec: Spec::Zone(Zone {
            drain,
            ..Zone::new(vec![], vec![])
        }),
    };
    let at = std::time::SystemTime::UNIX_EPOCH;
    let drain = leeward_policy::model::ZoneDrain {
        start_time: at,
        step: 10,
        interval: std::time::Duration::from_secs(1),
        expire_time: at,
        reason: "power".into(),
    };
    let (before, after) = (zone(None), zone(Some(drain)));
    let editor = all(AccessRole::Editor);
    assert_eq!(editor.lacks(Before::Known(&before), Some(&before)), None);
    for (from, to) in [
        (Before::Known(&before), Some(&after)),
        (Before::Known(&after), Some(&before)),
        (Before::Known(&after), None),
        (Before::Nothing, Some(&after)),
    ] {
        assert_eq!(editor.lacks(from, to), Some(AccessRole::Operator));
        assert_eq!(all(AccessRole::Operator).lacks(from, to), None);
    }
    let access = Resource {
        name: Name::parse("a").unwrap(),
        revision: 0,
        labels: BTreeMap::new(),
        spec: Spec::AccessPolicy(AccessPolicy { bindings: vec![] }),
    };
    let operator = all(AccessRole::Operator);
    assert_eq!(
        operator.lacks(Before::Nothing, Some(&access)),
        Some(AccessRole::Breakglass)
    );
    assert_eq!(
        all(AccessRole::Breakglass).lacks(Before::Known(&access), None),
        None
    );
}

#[test]
fn breakglass_takes_a_reason() {
    let rules = rules(vec![
        bind(AccessRole::Breakglass, "ada", &[], ""),
        bind(AccessRole::Reader, "a*", &[], ""),
    ]);
    assert!(rules.has_a_way_in());
    let without = rules.grants(&user("ada"), false);
    assert!(without.has(AccessRole::Reader, Scope::Whole) && !without.has(AccessRole::Editor, Scope::Some));
    assert!(
        rules
            .grants(&user("ada"), true)
            .has(AccessRole::Breakglass, Scope::Whole)
    );
    assert!(
        !rules
            .grants(&user("alan"), true)
            .has(AccessRole::Editor, Scope::Some)
    );
    assert!(
        !rules
            .grants(&user("bob"), true)
            .has(AccessRole::Reader, Scope::Some)
    );
}

fn kinds() -> impl Strategy<Value = Vec<Kind>> {
    subsequence(vec![Kind::Service, Kind::Queue, Kind::FeatureFlags], 0..=3)
}

fn binding() -> impl Strategy<Value = AccessBinding> {
    (
        select(ROLES.to_vec()),
        select(vec!["ada", "bob", "a*", "*"]),
        kinds(),
        select(vec!["", "team=a", "team!=a", "team in (a,b)", "!team", "team"]),
    )
        .prop_map(|(role, user, kinds, selector)| bind(role, user, &kinds, selector))
}

fn resource() -> impl Strategy<Value = Resource> {
    let spec = prop_oneof![
        Just(Spec::Service(Service::new(vec![]))),
        Just(Spec::Queue(queue())),
    ];
    (spec, select(vec!["", "a", "b", "c"])).prop_map(|(spec, team)| Resource {
        name: Name::parse("n").unwrap(),
        revision: 0,
        labels: if team.is_empty() {
            BTreeMap::new()
        } else {
            labels(team)
        },
        spec,
    })
}

fn queue() -> Queue {
    let text = "apiVersion: leeward.dev/v1\nkind: Queue\nmetadata: {name: q}\nspec: {}\n";
    let wire = leeward_proto::manifest::parse("q", text).unwrap();
    let Spec::Queue(queue) = leeward_proto::parse(&wire[0]).unwrap().spec else {
        panic!()
    };
    queue
}

proptest! {
    /// More bindings, a higher role and a reason never take anything away; and what is given is always given by one binding
    /// that has the role, the person, the kind and the labels.
    #[test]
    fn grants_are_what_bindings_say(
        bindings in vec(binding(), 0..5), more in binding(), name in select(vec!["ada", "bob", "cy"]),
        before in proptest::option::of(resource()), after in proptest::option::of(resource()),
    ) {
        let who = user(name);
        let few = rules(bindings.clone()).grants(&who, false);
        let reasoned = rules(bindings.clone()).grants(&who, true);
        let many = rules(bindings.iter().cloned().chain([more]).collect()).grants(&who, false);
        let was = before.as_ref().map_or(Before::Nothing, Before::Known);
        if few.lacks(was, after.as_ref()).is_none() {
            prop_assert!(reasoned.lacks(was, after.as_ref()).is_none() && many.lacks(was, after.as_ref()).is_none());
        }
        for resource in before.iter().chain(&after) {
            let (kind, scope) = (resource.spec.kind(), Scope::Resource(resource.spec.kind(), Some(&resource.labels)));
            for role in ROLES {
                let by_hand = bindings.iter().any(|b| {
                    let is_of = b.subjects.iter().any(|s| matches!(s, AccessSubject::User(p) if p.matches(name)));
                    b.role >= role && b.role != AccessRole::Breakglass && is_of
                        && (b.kinds.is_empty() || b.kinds.contains(&kind)) && b.selector.matches(&resource.labels)
                });
                prop_assert_eq!(few.has(role, scope), by_hand);
                if few.has(role, Scope::Whole) {
                    prop_assert!(few.has(role, scope) && few.has(role, Scope::Kind(kind)));
                }
                if few.has(role, scope) {
                    prop_assert!(few.has(AccessRole::Reader, scope) && few.has(role, Scope::Some));
                }
            }
        }
    }
}

use super::*;
use crate::model::{Endpoint, Service, Spec};
use crate::{Resource, Snapshot, Viewer};
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Clone, Debug, Default)]
struct Request {
    identity: Option<String>,
    host: String,
    path: String,
    method: String,
    route: Option<String>,
    headers: Vec<(String, String)>,
    claims: Option<Map<String, Value>>,
}

impl Asking for Request {
    fn identity(&self) -> Option<&str> {
        self.identity.as_deref()
    }
    fn zone(&self) -> Option<&str> {
        self.identity.as_deref()?.split('/').nth(4)
    }
    fn host(&self) -> &str {
        &self.host
    }
    fn path(&self) -> &str {
        &self.path
    }
    fn method(&self) -> &str {
        &self.method
    }
    fn route(&self) -> Option<&str> {
        self.route.as_deref()
    }
    fn values(&self, header: &str, show: &mut dyn FnMut(&[u8])) {
        for (name, value) in &self.headers {
            if name == header {
                show(value.as_bytes());
            }
        }
    }
    fn claims(&self, _: usize) -> Option<&Map<String, Value>> {
        self.claims.as_ref()
    }
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn resource(text: &str, spec: Spec) -> Resource {
    Resource {
        name: name(text),
        revision: 1,
        labels: BTreeMap::new(),
        spec,
    }
}

fn policy(action: AuthorizationAction, rules: Vec<AuthorizationRule>) -> AuthorizationPolicy {
    AuthorizationPolicy {
        rules: rules.into(),
        ..AuthorizationPolicy::new(action)
    }
}

/// What the policies, in the order of their names, say of a request for the service `pay`.
fn decide(policies: &[AuthorizationPolicy], request: &Request) -> (Result<(), Denied>, Vec<String>) {
    let mut resources: Vec<_> = policies
        .iter()
        .enumerate()
        .map(|(i, policy)| resource(&format!("p{i}"), Spec::AuthorizationPolicy(policy.clone())))
        .collect();
    let endpoint = Endpoint::new(([127, 0, 0, 1], 1).into(), name("a"));
    resources.push(resource("pay", Spec::Service(Service::new(vec![endpoint]))));
    let viewer = Viewer {
        zone: name("a"),
        proxy: name("a1"),
    };
    let snapshot = Snapshot::compile(viewer, 1, &resources);
    let mut told = Vec::new();
    let decided = match &snapshot.services()[0].authorization {
        None => Ok(()),
        Some(view) => view.decide(request, &mut |policy, rule, decision| {
            let rule = rule.map_or_else(|| "-".to_owned(), |rule| rule.to_string());
            told.push(format!("{policy}/{rule} {}", decision.as_str()));
        }),
    };
    (decided, told)
}

fn paths(patterns: &[&str]) -> AuthorizationRule {
    AuthorizationRule {
        to: vec![AuthorizationTarget {
            paths: patterns.iter().map(|p| path_pattern(p)).collect(),
            ..AuthorizationTarget::default()
        }],
        ..AuthorizationRule::default()
    }
}

fn get(path: &str) -> Request {
    Request {
        identity: Some("spiffe://t/zone/a/proxy/a1".to_owned()),
        host: "pay.example".to_owned(),
        path: path.to_owned(),
        method: "GET".to_owned(),
        ..Request::default()
    }
}

#[test]
fn a_service_without_policies_has_none() {
    let mut other = policy(AuthorizationAction::Deny, vec![AuthorizationRule::default()]);
    other.services = vec![name("other")];
    assert_eq!(
        decide(&[other], &get("/")),
        (Ok(()), vec![]),
        "a policy whose service isn't there is for no other"
    );
    assert_eq!(decide(&[], &get("/")), (Ok(()), vec![]));
}

#[test]
fn deny_overrides_allow_and_an_allow_without_rules_refuses() {
    let allow = policy(AuthorizationAction::Allow, vec![AuthorizationRule::default()]);
    let deny = policy(
        AuthorizationAction::Deny,
        vec![paths(&["/x"]), paths(&["/admin"])],
    );
    let none = policy(AuthorizationAction::Allow, vec![]);
    let denied = Err(Denied::ByPolicy);
    let both = [allow.clone(), deny];
    assert_eq!(decide(&both, &get("/admin")), (denied, vec!["p1/1 deny".into()]));
    assert_eq!(decide(&both, &get("/")), (Ok(()), vec!["p0/0 allow".into()]));
    assert_eq!(
        decide(std::slice::from_ref(&none), &get("/")),
        (denied, vec!["p0/- deny".into()])
    );
    assert_eq!(
        decide(&[none.clone(), allow.clone()], &get("/")),
        (Ok(()), vec!["p1/0 allow".into()])
    );
    // What names the service is told of before what is for all.
    let mut own = policy(AuthorizationAction::Allow, vec![paths(&["/pay"])]);
    own.services = vec![name("pay")];
    assert_eq!(
        decide(&[none, own], &get("/")),
        (denied, vec!["p1/- deny".into()])
    );
}

#[test]
fn dry_runs_and_audits_only_tell() {
    let dry = |policy: AuthorizationPolicy| AuthorizationPolicy {
        mode: AuthorizationMode::DryRun,
        ..policy
    };
    let allow = |pattern| policy(AuthorizationAction::Allow, vec![paths(&[pattern])]);
    let deny = policy(AuthorizationAction::Deny, vec![paths(&["/a"])]);
    let audit = policy(AuthorizationAction::Audit, vec![paths(&["/a"])]);
    let would = |policies: &[AuthorizationPolicy]| decide(policies, &get("/a"));
    assert_eq!(
        would(&[dry(deny.clone())]),
        (Ok(()), vec!["p0/0 would_deny".into()])
    );
    assert_eq!(
        would(&[dry(allow("/b"))]),
        (Ok(()), vec!["p0/- would_deny".into()])
    );
    assert_eq!(would(&[dry(allow("/a"))]), (Ok(()), vec![]));
    assert_eq!(
        would(&[dry(allow("/b")), dry(allow("/a"))]),
        (Ok(()), vec![]),
        "they are tried together"
    );
    assert_eq!(
        would(&[allow("/a"), dry(allow("/b"))]),
        (Ok(()), vec!["p0/0 allow".into()]),
        "what is enforced allows it"
    );
    assert_eq!(
        would(&[allow("/b"), dry(allow("/a"))]),
        (Err(Denied::ByPolicy), vec!["p0/- deny".into()]),
        "a dry run lets nothing pass"
    );
    assert_eq!(
        would(&[audit, deny]),
        (
            Err(Denied::ByPolicy),
            vec!["p0/0 audit".into(), "p1/0 deny".into()]
        )
    );
}

#[test]
fn who_has_no_identity_is_told_so_where_it_would_have_counted() {
    let by_zone = AuthorizationRule {
        from: vec![AuthorizationSource {
            zones: vec![name("a")],
            ..AuthorizationSource::default()
        }],
        ..AuthorizationRule::default()
    };
    let unknown = Request {
        identity: None,
        ..get("/")
    };
    let allow = policy(AuthorizationAction::Allow, vec![by_zone]);
    assert_eq!(
        decide(std::slice::from_ref(&allow), &unknown).0,
        Err(Denied::NoIdentity)
    );
    assert_eq!(decide(&[allow], &get("/")).0, Ok(()));
    let by_path = policy(AuthorizationAction::Allow, vec![paths(&["/b"])]);
    assert_eq!(decide(&[by_path], &unknown).0, Err(Denied::ByPolicy));
    // What isn't shown lets nobody in and keeps nobody from being refused.
    let not_b = || AuthorizationRule {
        from: vec![AuthorizationSource {
            not_identities: vec!["spiffe://t/zone/b/*".into()],
            ..AuthorizationSource::default()
        }],
        ..AuthorizationRule::default()
    };
    let allow = policy(AuthorizationAction::Allow, vec![not_b()]);
    let deny = policy(AuthorizationAction::Deny, vec![not_b()]);
    assert_eq!(decide(&[allow], &unknown).0, Err(Denied::NoIdentity));
    assert_eq!(decide(&[deny], &unknown).0, Err(Denied::ByPolicy));
}

#[test]
fn what_refuses_is_lenient_and_what_lets_pass_is_strict() {
    let allow = policy(AuthorizationAction::Allow, vec![paths(&["/pay", "/pay/*"])]);
    let deny = policy(AuthorizationAction::Deny, vec![paths(&["/admin", "/admin/*"])]);
    let passes =
        |policy: &AuthorizationPolicy, path: &str| decide(std::slice::from_ref(policy), &get(path)).0.is_ok();
    for path in ["/pay", "/pay/", "/pay/x/y"] {
        assert!(passes(&allow, path), "{path}");
    }
    for path in ["/PAY", "/payx", "/", "/pa"] {
        assert!(!passes(&allow, path), "{path}");
    }
    for path in ["/admin", "/admin/", "/Admin", "/ADMIN/x", "/admin/x/"] {
        assert!(!passes(&deny, path), "{path}");
    }
    assert!(passes(&deny, "/administrator"));

    let tenant = |action, values: &[&str], not_values: &[&str]| {
        let exact = |values: &[&str]| values.iter().map(|v| ValuePattern::Exact((*v).into())).collect();
        let when = AuthorizationCondition {
            subject: AuthorizationSubject::Header("x-tenant".into()),
            values: exact(values),
            not_values: exact(not_values),
        };
        policy(
            action,
            vec![AuthorizationRule {
                when: vec![when],
                ..AuthorizationRule::default()
            }],
        )
    };
    let with = |policy: &AuthorizationPolicy, values: &[&str]| {
        let headers = values
            .iter()
            .map(|v| ("x-tenant".to_owned(), (*v).to_owned()))
            .collect();
        decide(std::slice::from_ref(policy), &Request { headers, ..get("/") })
            .0
            .is_ok()
    };
    let allow = tenant(AuthorizationAction::Allow, &["t1"], &[]);
    assert!(with(&allow, &["t1"]) && with(&allow, &["t1", "t1"]));
    assert!(!with(&allow, &[]) && !with(&allow, &["t1", "t2"]) && !with(&allow, &["t1, t2"]));
    let deny = tenant(AuthorizationAction::Deny, &["t2"], &[]);
    assert!(with(&deny, &["t1"]) && with(&deny, &[]));
    assert!(!with(&deny, &["t1", "t2"]) && !with(&deny, &["t1,t2"]));
    let allow = tenant(AuthorizationAction::Allow, &[], &["t2"]);
    assert!(
        with(&allow, &[])
            && with(&allow, &["t1"])
            && !with(&allow, &["t1", "t2"])
            && !with(&allow, &["t1 ,t2"])
    );
    let deny = tenant(AuthorizationAction::Deny, &[], &["t1"]);
    assert!(with(&deny, &["t1"]) && !with(&deny, &["t1", "t2"]) && !with(&deny, &[]));
}

#[test]
fn claims_are_of_one_token_and_none_without_one() {
    let exact = |values: &[&str]| values.iter().map(|v| ValuePattern::Exact((*v).into())).collect();
    let rule = |claim: &str, values: &[&str], not_values: &[&str]| AuthorizationRule {
        when: vec![AuthorizationCondition {
            subject: AuthorizationSubject::Claim(claim.into()),
            values: exact(values),
            not_values: exact(not_values),
        }],
        ..AuthorizationRule::default()
    };
    let issuer = Arc::new(JwtIssuer {
        issuer: "i".into(),
        audiences: vec!["a".into()],
        keys: crate::model::JwksSource::Inline("{}".into()),
        headers: vec!["authorization".into()],
    });
    let passes = |action, rule: AuthorizationRule, claims: Option<&str>| {
        let mut policy = policy(action, vec![rule]);
        policy.jwt = vec![Arc::clone(&issuer)];
        let claims = claims.map(|text| serde_json::from_str(text).unwrap());
        decide(&[policy], &Request { claims, ..get("/") }).0.is_ok()
    };
    let allow = |rule, claims| passes(AuthorizationAction::Allow, rule, claims);
    assert!(allow(
        rule("scope", &["pay"], &[]),
        Some(r#"{"scope":"read pay"}"#)
    ));
    assert!(!allow(
        rule("scope", &["pay"], &[]),
        Some(r#"{"scope":"payments"}"#)
    ));
    assert!(allow(
        rule("roles", &["pay"], &[]),
        Some(r#"{"roles":["x","pay"]}"#)
    ));
    assert!(!allow(
        rule("roles", &["pay"], &[]),
        Some(r#"{"roles":["x pay",{"pay":1}]}"#)
    ));
    assert!(allow(
        rule("/realm/roles", &["pay"], &[]),
        Some(r#"{"realm":{"roles":["pay"]}}"#)
    ));
    assert!(allow(rule("/a~1b/0", &["1"], &[]), Some(r#"{"a/b":[1]}"#)));
    assert!(!allow(rule("scope", &["pay"], &[]), None));
    assert!(!allow(rule("scope", &[], &["pay"]), None));
    assert!(!allow(rule("scope", &[], &["pay"]), Some("{}")));
    assert!(allow(rule("scope", &[], &["pay"]), Some(r#"{"scope":"read"}"#)));
    let deny = |rule, claims| passes(AuthorizationAction::Deny, rule, claims);
    assert!(deny(rule("scope", &["pay"], &[]), None));
    assert!(!deny(rule("scope", &[], &["pay"]), None));
    assert!(deny(rule("scope", &[], &["pay"]), Some(r#"{"scope":"pay"}"#)));
}

/// The documented rules once more, said another way: each condition as a set of what it holds for.
mod naive {
    use super::*;

    fn glob(pattern: &str, text: &str) -> bool {
        let (pattern, text): (Vec<_>, Vec<_>) = (pattern.split('/').collect(), text.split('/').collect());
        let ends = pattern.last() == Some(&"*");
        let fixed = pattern.len() - usize::from(ends);
        let long_enough = if ends {
            text.len() > fixed
        } else {
            text.len() == fixed
        };
        long_enough
            && (0..fixed).all(|i| match pattern[i] {
                "*" => !text[i].is_empty(),
                want => want == text[i],
            })
    }

    fn path(pattern: &str, path: &str, lenient: bool) -> bool {
        if !lenient {
            return glob(pattern, path);
        }
        let (pattern, path) = (pattern.to_lowercase(), path.to_lowercase());
        let bare = |text: &str| text.strip_suffix('/').unwrap_or(text).to_owned();
        glob(&pattern, &path) || glob(&bare(&pattern), &bare(&path))
    }

    fn header(values: &[ValuePattern], request: &Request, lenient: bool) -> bool {
        let texts: Vec<&str> = request.headers.iter().map(|(_, v)| v.as_str()).collect();
        let is = |text: &str| {
            values.iter().any(|v| match v {
                ValuePattern::Any => true,
                ValuePattern::Exact(e) => **e == *text,
                ValuePattern::Prefix(p) => text.starts_with(&**p),
                ValuePattern::Suffix(s) => text.ends_with(&**s),
            })
        };
        if lenient {
            texts.iter().any(|t| is(t) || t.split(',').any(|e| is(e.trim())))
        } else {
            !texts.is_empty() && texts.iter().all(|t| is(t))
        }
    }

    pub(super) fn rule(rule: &AuthorizationRule, request: &Request, allow: bool) -> bool {
        let id = request.identity.as_deref();
        let zone = id.and_then(|id| id.split('/').nth(4));
        let from = rule.from.iter().any(|s| {
            let is = |p: &str| id.is_some_and(|id| glob(p, id));
            (s.identities.is_empty() || s.identities.iter().any(|p| is(p)))
                && (s.zones.is_empty() || s.zones.iter().any(|z| Some(z.as_str()) == zone))
                && !s
                    .not_identities
                    .iter()
                    .any(|p| id.map_or(allow, |id| glob(p, id)))
                && !s
                    .not_zones
                    .iter()
                    .any(|z| zone.map_or(allow, |zone| zone == z.as_str()))
        });
        let to = rule.to.iter().any(|t| {
            (t.methods.is_empty() || t.methods.iter().any(|m| **m == *request.method))
                && (t.paths.is_empty() || t.paths.iter().any(|p| path(p, &request.path, !allow)))
                && !t.not_methods.iter().any(|m| **m == *request.method)
                && !t.not_paths.iter().any(|p| path(p, &request.path, allow))
        });
        let when = rule.when.iter().all(|c| {
            (c.values.is_empty() || header(&c.values, request, !allow))
                && (c.not_values.is_empty() || !header(&c.not_values, request, allow))
        });
        (rule.from.is_empty() || from) && (rule.to.is_empty() || to) && when
    }

    pub(super) fn passes(policies: &[AuthorizationPolicy], request: &Request) -> bool {
        let of = |action| {
            let enforced = policies.iter().filter(|p| p.mode == AuthorizationMode::Enforce);
            enforced.filter(move |p| p.action == action)
        };
        let matches = |p: &AuthorizationPolicy| {
            let allow = p.action == AuthorizationAction::Allow;
            p.rules.iter().any(|r| rule(r, request, allow))
        };
        let denied = of(AuthorizationAction::Deny).any(matches);
        let allows = of(AuthorizationAction::Allow).count();
        !denied && (allows == 0 || of(AuthorizationAction::Allow).any(matches))
    }
}

fn few<T: std::fmt::Debug>(of: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    prop::collection::vec(of, 0..3)
}

fn arbitrary_rule() -> impl Strategy<Value = AuthorizationRule> {
    let identity = || "spiffe://t/zone/([ab*])/proxy/([ab]1|\\*)".prop_map(Box::<str>::from);
    let zone = || "[ab]".prop_map(|z| name(&z));
    let source = (few(identity()), few(zone()), few(identity()), few(zone())).prop_map(
        |(identities, zones, not_identities, not_zones)| AuthorizationSource {
            identities,
            zones,
            not_identities,
            not_zones,
        },
    );
    let method = || prop_oneof![Just("GET"), Just("PUT")].prop_map(Box::<str>::from);
    let path = || "(/[xY*]){1,3}/?".prop_map(Box::<str>::from);
    let target = (few(method()), few(path()), few(method()), few(path())).prop_map(
        |(methods, paths, not_methods, not_paths)| AuthorizationTarget {
            methods,
            paths,
            not_methods,
            not_paths,
            ..AuthorizationTarget::default()
        },
    );
    let value = || {
        prop_oneof![
            Just(ValuePattern::Any),
            "[12]{1,2}".prop_map(|v| ValuePattern::Exact(v.into())),
            "[12]".prop_map(|v| ValuePattern::Prefix(v.into())),
            "[12]".prop_map(|v| ValuePattern::Suffix(v.into())),
        ]
    };
    let condition = (few(value()), few(value())).prop_map(|(values, not_values)| AuthorizationCondition {
        subject: AuthorizationSubject::Header("h".into()),
        values,
        not_values,
    });
    (few(source), few(target), few(condition)).prop_map(|(from, to, when)| AuthorizationRule {
        from,
        to,
        when,
    })
}

fn arbitrary_policy() -> impl Strategy<Value = AuthorizationPolicy> {
    use AuthorizationAction::{Allow, Audit, Deny};
    let action = prop_oneof![Just(Allow), Just(Deny), Just(Audit)];
    let mode = prop_oneof![3 => Just(AuthorizationMode::Enforce), 1 => Just(AuthorizationMode::DryRun)];
    (action, mode, few(arbitrary_rule())).prop_map(|(action, mode, rules)| AuthorizationPolicy {
        mode,
        ..policy(action, rules)
    })
}

fn arbitrary_request() -> impl Strategy<Value = Request> {
    (
        prop::option::of("spiffe://t/zone/[ab]/proxy/[ab]1"),
        "(/[xyXY]){1,3}/?",
        prop_oneof![Just("GET"), Just("PUT")],
        prop::collection::vec("[12]{1,2}( ?,[12])?", 0..3),
    )
        .prop_map(|(identity, path, method, values)| Request {
            identity,
            path,
            method: method.to_owned(),
            headers: values.into_iter().map(|v| ("h".to_owned(), v)).collect(),
            ..get("/")
        })
}

proptest! {
    #[test]
    fn decides_as_the_documented_rules_say(
        policies in prop::collection::vec(arbitrary_policy(), 0..4),
        request in arbitrary_request(),
    ) {
        let (decided, told) = decide(&policies, &request);
        prop_assert_eq!(decided.is_ok(), naive::passes(&policies, &request));
        let refused = told.iter().filter(|t| t.ends_with(" deny")).count();
        prop_assert_eq!(refused, usize::from(decided.is_err()), "a refusal has one name: {:?}", told);
    }

    /// One rule alone, so that no other hides a difference.
    #[test]
    fn a_rule_matches_what_it_says(rule in arbitrary_rule(), request in arbitrary_request()) {
        for (action, allow) in [(AuthorizationAction::Allow, true), (AuthorizationAction::Deny, false)] {
            let decided = decide(&[policy(action, vec![rule.clone()])], &request).0;
            prop_assert_eq!(decided.is_ok() == allow, naive::rule(&rule, &request, allow));
        }
    }

    /// What is in dry-run changes nothing, and tells what would be refused.
    #[test]
    fn a_dry_run_tells_what_enforcing_would_do(policies in prop::collection::vec(arbitrary_policy(), 0..4), request in arbitrary_request()) {
        let (decided, told) = decide(&policies, &request);
        if decided.is_ok() {
            let enforced: Vec<_> = policies
                .iter()
                .map(|p| AuthorizationPolicy { mode: AuthorizationMode::Enforce, ..p.clone() })
                .collect();
            let would = told.iter().any(|t| t.ends_with(" would_deny"));
            prop_assert_eq!(would, decide(&enforced, &request).0.is_err(), "{:?}", told);
        }
    }
}

#[test]
fn only_a_proxys_id_has_a_zone() {
    assert_eq!(zone_of("spiffe://leeward.test/zone/a/proxy/a1"), Some("a"));
    for other in [
        "spiffe://leeward.test/x/zone/a/proxy/a1",
        "spiffe://leeward.test/zone/a/proxy/a1/zone/b/proxy/b1",
        "spiffe://leeward.test/zone/a",
        "spiffe://leeward.test/control",
        "leeward.test/zone/a/proxy/a1",
    ] {
        assert_eq!(zone_of(other), None, "{other}");
    }
}

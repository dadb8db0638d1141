//! What is refused of policies about who may do what, and what it means where nothing is said.

use super::check;
use crate::manifest::parse as read;
use crate::{guards, parse, v1};
use leeward_policy::model::{
    AuthorizationMode, AuthorizationPolicy, AuthorizationSubject, HostMatch, JwksSource, ValuePattern,
};
use leeward_policy::{Guards, Name, Spec};
use std::time::Duration;

const SUCH_AS: &str =
    "want one such as spiffe://leeward.test/zone/a/proxy/a1 or spiffe://leeward.test/zone/a/*";
const ED: &str = r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;

#[track_caller]
fn policy(spec: &str) -> AuthorizationPolicy {
    let text = format!(
        "apiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {{name: a}}\nspec: {spec}\n"
    );
    let Spec::AuthorizationPolicy(policy) = parse(&read("f", &text).unwrap()[0]).unwrap().spec else {
        unreachable!()
    };
    policy
}

/// What is said of a rule's part.
#[track_caller]
fn check_part(part: &str, want: &[&str]) {
    let want: Vec<_> = want.iter().map(|line| format!("spec.rules[0].{line}")).collect();
    let want: Vec<_> = want.iter().map(String::as_str).collect();
    check(
        "AuthorizationPolicy",
        &format!("{{action: Deny, rules: [{{{part}}}]}}"),
        &want,
    );
}

#[test]
fn what_is_not_said_is_enforced_for_every_service_and_asks_for_the_usual_header() {
    let all = policy("{action: Allow}");
    assert!(all.services.is_empty() && all.rules.is_empty() && all.mode == AuthorizationMode::Enforce);
    let spec = format!(
        "{{action: Deny, mode: DryRun, rules: [{{to: [{{paths: [\"/a/%62/./*\", \"/x%3Ay\"], hostnames: [\"*.Example\"]}}], when: [{{claim: scope, values: [a, \"b*\", \"*c\", \"*\"]}}, {{header: X-Tenant, notValues: [t]}}]}}], jwt: [{{issuer: i, audiences: [a], jwks: {{uri: \"https://issuer.example/jwks\"}}}}, {{issuer: i, audiences: [a], jwks: {{inline: '{{\"keys\":[{ED}]}}'}}}}]}}"
    );
    let policy = policy(&spec);
    let rule = &policy.rules[0];
    assert_eq!(*rule.to[0].paths, ["/a/b/*".into(), "/x:y".into()]);
    assert_eq!(rule.to[0].hostnames, [HostMatch::Suffix(".example".into())]);
    assert_eq!(
        rule.when[0].values,
        [
            ValuePattern::Exact("a".into()),
            ValuePattern::Prefix("b".into()),
            ValuePattern::Suffix("c".into()),
            ValuePattern::Any
        ]
    );
    assert_eq!(
        rule.when[1].subject,
        AuthorizationSubject::Header("x-tenant".into())
    );
    assert_eq!(*policy.jwt[0].headers, ["authorization".into()]);
    let remote = JwksSource::Remote {
        uri: "https://issuer.example/jwks".into(),
        refresh: Duration::from_secs(300),
    };
    assert_eq!(policy.jwt[0].keys, remote);
}

#[test]
fn fields_that_do_not_go_together_are_refused() {
    check(
        "AuthorizationPolicy",
        "{}",
        &["spec.action: is missing; want Allow, Deny or Audit"],
    );
    check(
        "AuthorizationPolicy",
        "{action: Deny}",
        &[
            "spec.rules: is empty, and a policy of action Deny without rules refuses nothing; want one at least, [{}] for every request",
        ],
    );
    check(
        "AuthorizationPolicy",
        "{action: Audit, mode: DryRun, rules: [{}]}",
        &["spec.mode: DryRun is for policies that refuse; action Audit refuses nothing, so leave mode out"],
    );
    check(
        "AuthorizationPolicy",
        "{action: Allow, rules: [{when: [{claim: a, values: [b]}]}]}",
        &["spec.jwt: is missing, but rules look at claims; want the issuers whose tokens have them"],
    );
    check(
        "AuthorizationPolicy",
        &format!(
            "{{action: Allow, jwt: [{{issuer: i, audiences: [a], jwks: {{inline: '{{\"keys\":[{ED}]}}'}}}}]}}"
        ),
        &[
            "spec.jwt: names issuers, but no rule looks at a claim, so that no token would be asked for; want a condition such as {claim: sub, values: [\"*\"]}",
        ],
    );
    check_part(
        "from: [{zones: [a, b], notZones: [b]}]",
        &["from[0].zones[1]: \"b\" is spec.rules[0].from[0].notZones[0], too; want it in one of them"],
    );
}

#[test]
fn patterns_are_whole_segments() {
    check_part(
        "from: [{identities: [\"a\", \"spiffe://t\", \"spiffe://T/a\", \"spiffe://*/a\", \"spiffe://t/a*\", \"spiffe://t//a\"]}]",
        &[
            &format!(
                "from[0].identities[0]: \"a\" is not a SPIFFE id or a pattern of one: it must begin with spiffe://; {SUCH_AS}"
            ),
            &format!(
                "from[0].identities[1]: \"spiffe://t\" is not a SPIFFE id or a pattern of one: it has no path; {SUCH_AS}"
            ),
            &format!(
                "from[0].identities[2]: \"spiffe://T/a\" is not a SPIFFE id or a pattern of one: the trust domain is 1 to 255 bytes of a-z, 0-9, '-', '.' and '_', and no '*'; {SUCH_AS}"
            ),
            &format!(
                "from[0].identities[3]: \"spiffe://*/a\" is not a SPIFFE id or a pattern of one: the trust domain is 1 to 255 bytes of a-z, 0-9, '-', '.' and '_', and no '*'; {SUCH_AS}"
            ),
            &format!(
                "from[0].identities[4]: \"spiffe://t/a*\" is not a SPIFFE id or a pattern of one: a segment of the path is '*', or letters, digits, '-', '.' and '_', and neither '.' nor '..'; {SUCH_AS}"
            ),
            &format!(
                "from[0].identities[5]: \"spiffe://t//a\" is not a SPIFFE id or a pattern of one: a segment of the path is '*', or letters, digits, '-', '.' and '_', and neither '.' nor '..'; {SUCH_AS}"
            ),
        ],
    );
    check_part(
        "to: [{paths: [a, \"/..\", \"/a//b\", \"/a;b\", \"/a%2fb\", \"/a*\", \"/a/%2a\"], methods: [get]}]",
        &[
            "to[0].methods[0]: \"get\" is not a method; want upper case, such as GET",
            "to[0].paths[0]: \"a\" is not a path; want one that begins with '/', of at most 4096 bytes, without query and spaces",
            "to[0].paths[1]: \"/..\" is a path that leads above its root; want a path that requests can have",
            "to[0].paths[2]: \"/a//b\" has an empty segment in the path, and requests with that are refused where rules look at paths; want another path",
            "to[0].paths[3]: \"/a;b\" has a semicolon in the path, and requests with that are refused where rules look at paths; want another path",
            "to[0].paths[4]: \"/a%2fb\" has an encoded slash in the path, and requests with that are refused where rules look at paths; want another path",
            "to[0].paths[5]: \"/a*\" has a '*' that is not a whole segment; want one such as /charge/* or /users/*/orders",
            "to[0].paths[6]: \"/a/%2a\" has a '*' that is not a whole segment; want one such as /charge/* or /users/*/orders",
        ],
    );
}

#[test]
fn conditions_look_at_what_callers_say() {
    check_part(
        "when: [{values: [a]}, {header: x-user}, {header: leeward-route, values: [a]}, {header: X-Forwarded-Client-Cert, values: [a]}, {header: a, values: [\"\", \"a*b\", \"**\"]}]",
        &[
            "when[0]: looks at nothing; want one of header, claim",
            "when[1]: says nothing of the value; want one of values, notValues, [\"*\"] for any",
            "when[2].header: leeward-route is set by the proxy; want a header that callers set, such as x-user",
            "when[3].header: x-forwarded-client-cert says who asks, and the proxy takes it out of requests; want from.identities",
            "when[4].values[0]: is 0 bytes long; want 1 to 512",
            "when[4].values[1]: \"a*b\" has a '*' in the middle, or two; want one at the beginning or the end",
            "when[4].values[2]: \"**\" has a '*' in the middle, or two; want one at the beginning or the end",
        ],
    );
}

#[test]
fn keys_are_public_and_to_be_had_safely() {
    let of = |jwks: &str, want: &str| {
        check(
            "AuthorizationPolicy",
            &format!(
                "{{action: Allow, rules: [{{when: [{{claim: a, values: [b]}}]}}], jwt: [{{issuer: i, audiences: [a], jwks: {jwks}}}]}}"
            ),
            &[&format!("spec.jwt[0].jwks{want}")],
        );
    };
    let where_from = "want https://HOST/PATH, or http:// and a loopback address";
    for uri in [
        "http://issuer.example/a",
        "ftp://a/b",
        "https://",
        "https://u@h/",
        "https://h/#x",
    ] {
        of(
            &format!("{{uri: \"{uri}\"}}"),
            &format!(".uri: {uri:?} is not where keys can be had; {where_from}"),
        );
    }
    of("{}", ": has no keys; want one of inline, uri");
    of(
        "{inline: '{}'}",
        ".inline: is not a set of keys; want JSON such as {\"keys\": [...]} (RFC 7517)",
    );
    of(
        "{inline: '{\"keys\":[{\"kty\":\"oct\"}]}'}",
        ".inline: has no key that can be used; want one of RSA, of EC with P-256, or of OKP with Ed25519",
    );
    of(
        "{inline: '{\"keys\":[{\"kty\":\"RSA\",\"d\":\"AA\"}]}'}",
        ".inline: holds a secret in keys[0]; want public keys only, and that one replaced",
    );
    check(
        "AuthorizationPolicy",
        "{action: Allow, rules: [{when: [{claim: a, values: [b]}]}], jwt: [{}]}",
        &[
            "spec.jwt[0].audiences: is missing; want what stands in the claim aud of tokens that are for this service, since others are not",
            "spec.jwt[0].issuer: is missing; want what stands in the claim iss of its tokens",
            "spec.jwt[0].jwks: is missing; want {inline: ...} or {uri: ...}",
        ],
    );
}

#[test]
fn what_cannot_be_read_guards_what_it_may_have_guarded() {
    use v1::{AuthorizationAction as Action, AuthorizationMode as Mode};
    let of = |services: &[&str], action: i32, mode: i32| {
        let spec = v1::AuthorizationPolicy {
            services: services.iter().map(|name| (*name).to_owned()).collect(),
            action,
            mode,
            ..v1::AuthorizationPolicy::default()
        };
        guards(&v1::Resource {
            spec: Some(v1::resource::Spec::AuthorizationPolicy(spec)),
            ..v1::Resource::default()
        })
    };
    let pay = || Some(Guards::Services(vec![Name::parse("pay").unwrap()]));
    let (allow, deny, audit) = (Action::Allow as i32, Action::Deny as i32, Action::Audit as i32);
    assert_eq!(of(&["pay"], deny, 0), pay());
    assert_eq!(of(&["pay"], allow, Mode::Enforce as i32), pay());
    assert_eq!(
        of(&["pay"], 99, 0),
        pay(),
        "an action that is not known may refuse"
    );
    assert_eq!(of(&["pay"], deny, 99), pay());
    assert_eq!(of(&[], deny, 0), Some(Guards::All));
    assert_eq!(
        of(&["pay", "p*"], deny, 0),
        Some(Guards::All),
        "which can't be told"
    );
    assert_eq!(of(&["pay"], audit, 0), None);
    assert_eq!(of(&["pay"], deny, Mode::DryRun as i32), None);
    assert_eq!(guards(&v1::Resource::default()), None);
}

#[test]
fn a_list_that_is_empty_is_not_one_that_is_not_there() {
    let text = "apiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {name: a}\nspec: {services: [], action: Deny, rules: [{from: []}]}\n";
    let errors = read("f", text).unwrap_err();
    let told: Vec<_> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(
        told.iter()
            .all(|error| error.contains("is empty, which would be as if it weren't there")),
        "{told:?}"
    );
}

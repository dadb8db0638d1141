//! Who may do what, at random.

use super::degradation::names;
use super::{HOUR, SECOND, within};
use leeward_policy::Spec;
use leeward_policy::model::{
    AuthorizationAction, AuthorizationCondition, AuthorizationMode, AuthorizationPolicy, AuthorizationRule,
    AuthorizationSource, AuthorizationSubject, AuthorizationTarget, HostMatch, JwksSource, JwtIssuer,
    ValuePattern,
};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use std::sync::Arc;

fn texts(of: &[&str]) -> impl Strategy<Value = Vec<Box<str>>> + use<> {
    let of: Vec<Box<str>> = of.iter().map(|text| (*text).into()).collect();
    let most = of.len();
    subsequence(of, 0..=most)
}

fn source() -> impl Strategy<Value = AuthorizationSource> {
    let ids = ["spiffe://t/a", "spiffe://t/zone/*/proxy/a1", "spiffe://t/*"];
    let others = ["spiffe://t.u/b", "spiffe://t/b/*"];
    (texts(&ids), names(3), texts(&others), names(3))
        .prop_map(|(identities, zones, not_identities, mut not_zones)| {
            not_zones.retain(|zone| !zones.contains(zone));
            AuthorizationSource {
                identities,
                zones,
                not_identities,
                not_zones,
            }
        })
        .prop_filter("says something", |source| {
            *source != AuthorizationSource::default()
        })
}

fn hosts(of: &[HostMatch]) -> impl Strategy<Value = Vec<HostMatch>> + use<> {
    let most = of.len();
    subsequence(of.to_vec(), 0..=most)
}

fn target() -> impl Strategy<Value = AuthorizationTarget> {
    let wanted = (
        texts(&["GET", "POST"]),
        texts(&["/", "/a/*", "/a/*/b", "/%C3%A9", "/x:y"]),
        hosts(&[HostMatch::Any, HostMatch::Exact("a.example".into())]),
        names(3),
    );
    let unwanted = (
        texts(&["PUT"]),
        texts(&["/c", "/*"]),
        hosts(&[HostMatch::Suffix(".example".into())]),
        names(3),
    );
    (wanted, unwanted)
        .prop_map(|(wanted, mut unwanted)| {
            unwanted.3.retain(|route| !wanted.3.contains(route));
            AuthorizationTarget {
                methods: wanted.0,
                paths: wanted.1,
                hostnames: wanted.2,
                routes: wanted.3,
                not_methods: unwanted.0,
                not_paths: unwanted.1,
                not_hostnames: unwanted.2,
                not_routes: unwanted.3,
            }
        })
        .prop_filter("says something", |target| {
            *target != AuthorizationTarget::default()
        })
}

fn condition(claim: bool) -> impl Strategy<Value = AuthorizationCondition> {
    let subject = if claim {
        select(vec!["scope", "/realm/roles", "https://x.example/y"])
            .prop_map(|name| AuthorizationSubject::Claim(name.into()))
            .boxed()
    } else {
        Just(AuthorizationSubject::Header("x-user".into())).boxed()
    };
    let values = [
        ValuePattern::Any,
        ValuePattern::Exact("true".into()),
        ValuePattern::Exact("é b".into()),
        ValuePattern::Prefix("a".into()),
        ValuePattern::Suffix("a".into()),
    ];
    let others = [ValuePattern::Exact("1".into()), ValuePattern::Prefix("b".into())];
    (
        subject,
        subsequence(values.to_vec(), 1..=5),
        subsequence(others.to_vec(), 0..=2),
    )
        .prop_map(|(subject, values, not_values)| AuthorizationCondition {
            subject,
            values,
            not_values,
        })
}

fn issuer() -> impl Strategy<Value = JwtIssuer> {
    let remote = (
        select(vec![
            "https://issuer.example/jwks?a=b",
            "http://127.0.0.1:9/k",
            "http://[::1]/",
        ]),
        within(10 * SECOND, 24 * HOUR),
    );
    let keys = prop_oneof![
        Just(JwksSource::Inline(
            r#"{"keys": [{"kty": "RSA", "n": "AA", "e": "AQAB"}]}"#.into()
        )),
        remote.prop_map(|(uri, refresh)| JwksSource::Remote {
            uri: uri.into(),
            refresh
        }),
    ];
    let headers = subsequence(vec!["authorization", "x-token"], 1..=2);
    ("[a-z:/.]{1,20}", texts(&["shop"]), keys, headers).prop_map(|(issuer, mut audiences, keys, headers)| {
        audiences.push("another".into());
        JwtIssuer {
            issuer: issuer.into(),
            audiences,
            keys,
            headers: headers.into_iter().map(Box::from).collect(),
        }
    })
}

fn rule(claims: bool) -> impl Strategy<Value = AuthorizationRule> {
    (
        prop::collection::vec(source(), 0..3),
        prop::collection::vec(target(), 0..3),
        prop::collection::vec(condition(false), 0..3),
        condition(claims),
    )
        .prop_map(|(from, to, mut when, last)| {
            when.push(last);
            AuthorizationRule { from, to, when }
        })
}

pub(super) fn policy() -> impl Strategy<Value = Spec> {
    let action = select(vec![
        (AuthorizationAction::Allow, AuthorizationMode::Enforce),
        (AuthorizationAction::Allow, AuthorizationMode::DryRun),
        (AuthorizationAction::Deny, AuthorizationMode::DryRun),
        (AuthorizationAction::Audit, AuthorizationMode::Enforce),
    ]);
    let of = |claims: bool| {
        let issuers = issuer().prop_map(move |issuer| {
            if claims {
                vec![Arc::new(issuer)]
            } else {
                Vec::new()
            }
        });
        (prop::collection::vec(rule(claims), 1..4), issuers)
    };
    let rules = prop_oneof![of(true), of(false)];
    (names(4), action, rules).prop_map(|(services, (action, mode), (rules, jwt))| {
        Spec::AuthorizationPolicy(AuthorizationPolicy {
            services,
            action,
            mode,
            rules: rules.into(),
            jwt,
        })
    })
}

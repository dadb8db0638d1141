//! Who may do what with a service.

use super::super::words::{self, word};
use super::{duration, fields};
use crate::v1;
use serde_json::{Value, json};

pub(super) fn policy(policy: &v1::AuthorizationPolicy) -> Value {
    let rules: Vec<_> = policy.rules.iter().map(rule).collect();
    let jwt: Vec<_> = policy.jwt.iter().map(issuer).collect();
    fields([
        ("services", json!(policy.services)),
        ("action", json!(word(words::ACTION, policy.action))),
        ("mode", json!(word(words::AUTHORIZATION_MODE, policy.mode))),
        ("rules", json!(rules)),
        ("jwt", json!(jwt)),
    ])
}

fn rule(rule: &v1::AuthorizationRule) -> Value {
    let from: Vec<_> = rule.from.iter().map(source).collect();
    let to: Vec<_> = rule.to.iter().map(target).collect();
    let when: Vec<_> = rule.when.iter().map(condition).collect();
    fields([("from", json!(from)), ("to", json!(to)), ("when", json!(when))])
}

fn source(source: &v1::AuthorizationSource) -> Value {
    fields([
        ("identities", json!(source.identities)),
        ("zones", json!(source.zones)),
        ("notIdentities", json!(source.not_identities)),
        ("notZones", json!(source.not_zones)),
    ])
}

fn target(target: &v1::AuthorizationTarget) -> Value {
    fields([
        ("methods", json!(target.methods)),
        ("paths", json!(target.paths)),
        ("hostnames", json!(target.hostnames)),
        ("routes", json!(target.routes)),
        ("notMethods", json!(target.not_methods)),
        ("notPaths", json!(target.not_paths)),
        ("notHostnames", json!(target.not_hostnames)),
        ("notRoutes", json!(target.not_routes)),
    ])
}

fn condition(condition: &v1::AuthorizationCondition) -> Value {
    use v1::authorization_condition::Subject;
    let (kind, name) = match &condition.subject {
        None => ("", Value::Null),
        Some(Subject::Header(name)) => ("header", json!(name)),
        Some(Subject::Claim(name)) => ("claim", json!(name)),
    };
    fields([
        (kind, name),
        ("values", json!(condition.values)),
        ("notValues", json!(condition.not_values)),
    ])
}

fn issuer(issuer: &v1::JwtIssuer) -> Value {
    let jwks = issuer.jwks.as_ref().map_or(Value::Null, |jwks| {
        let (kind, keys) = match &jwks.source {
            None => ("", Value::Null),
            Some(v1::jwks::Source::Inline(keys)) => ("inline", json!(keys)),
            Some(v1::jwks::Source::Uri(uri)) => ("uri", json!(uri)),
        };
        fields([(kind, keys), ("refresh", duration(jwks.refresh.as_ref()))])
    });
    fields([
        ("issuer", json!(issuer.issuer)),
        ("audiences", json!(issuer.audiences)),
        ("jwks", jwks),
        ("fromHeaders", json!(issuer.from_headers)),
    ])
}

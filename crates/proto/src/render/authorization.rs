//! Who may do what with a service, on the wire. What is a default is written out, too.

use super::{duration, hostname, names};
use crate::v1;
use leeward_policy::model::{
    AuthorizationAction, AuthorizationCondition, AuthorizationMode, AuthorizationPolicy, AuthorizationRule,
    AuthorizationSource, AuthorizationSubject, AuthorizationTarget, JwksSource, JwtIssuer, ValuePattern,
};

pub(super) fn policy(policy: &AuthorizationPolicy) -> v1::AuthorizationPolicy {
    v1::AuthorizationPolicy {
        services: names(&policy.services),
        action: match policy.action {
            AuthorizationAction::Allow => v1::AuthorizationAction::Allow.into(),
            AuthorizationAction::Deny => v1::AuthorizationAction::Deny.into(),
            AuthorizationAction::Audit => v1::AuthorizationAction::Audit.into(),
        },
        mode: match policy.mode {
            AuthorizationMode::Enforce => v1::AuthorizationMode::Enforce.into(),
            AuthorizationMode::DryRun => v1::AuthorizationMode::DryRun.into(),
        },
        rules: policy.rules.iter().map(rule).collect(),
        jwt: policy.jwt.iter().map(|of| issuer(of)).collect(),
    }
}

fn rule(rule: &AuthorizationRule) -> v1::AuthorizationRule {
    v1::AuthorizationRule {
        from: rule.from.iter().map(source).collect(),
        to: rule.to.iter().map(target).collect(),
        when: rule.when.iter().map(condition).collect(),
    }
}

fn source(source: &AuthorizationSource) -> v1::AuthorizationSource {
    v1::AuthorizationSource {
        identities: texts(&source.identities),
        zones: names(&source.zones),
        not_identities: texts(&source.not_identities),
        not_zones: names(&source.not_zones),
    }
}

fn target(target: &AuthorizationTarget) -> v1::AuthorizationTarget {
    v1::AuthorizationTarget {
        methods: texts(&target.methods),
        paths: texts(&target.paths),
        hostnames: target.hostnames.iter().map(hostname).collect(),
        routes: names(&target.routes),
        not_methods: texts(&target.not_methods),
        not_paths: texts(&target.not_paths),
        not_hostnames: target.not_hostnames.iter().map(hostname).collect(),
        not_routes: names(&target.not_routes),
    }
}

fn condition(condition: &AuthorizationCondition) -> v1::AuthorizationCondition {
    use v1::authorization_condition::Subject;
    v1::AuthorizationCondition {
        subject: Some(match &condition.subject {
            AuthorizationSubject::Header(name) => Subject::Header(name.to_string()),
            AuthorizationSubject::Claim(name) => Subject::Claim(name.to_string()),
        }),
        values: condition.values.iter().map(pattern).collect(),
        not_values: condition.not_values.iter().map(pattern).collect(),
    }
}

fn pattern(pattern: &ValuePattern) -> String {
    match pattern {
        ValuePattern::Any => "*".to_owned(),
        ValuePattern::Exact(text) => text.to_string(),
        ValuePattern::Prefix(text) => format!("{text}*"),
        ValuePattern::Suffix(text) => format!("*{text}"),
    }
}

fn issuer(issuer: &JwtIssuer) -> v1::JwtIssuer {
    let (source, refresh) = match &issuer.keys {
        JwksSource::Inline(keys) => (v1::jwks::Source::Inline(keys.to_string()), None),
        JwksSource::Remote { uri, refresh } => (v1::jwks::Source::Uri(uri.to_string()), duration(*refresh)),
    };
    v1::JwtIssuer {
        issuer: issuer.issuer.to_string(),
        audiences: texts(&issuer.audiences),
        jwks: Some(v1::Jwks {
            source: Some(source),
            refresh,
        }),
        from_headers: texts(&issuer.headers),
    }
}

fn texts(texts: &[Box<str>]) -> Vec<String> {
    texts.iter().map(|text| text.to_string()).collect()
}

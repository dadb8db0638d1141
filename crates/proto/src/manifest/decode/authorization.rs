//! Who may do what with a service.

use super::super::words;
use super::fields::Fields;
use crate::v1;

pub(super) fn policy(f: &mut Fields<'_>) -> v1::AuthorizationPolicy {
    v1::AuthorizationPolicy {
        services: f.some_texts("services"),
        action: f.choice("action", words::ACTION),
        mode: f.choice("mode", words::AUTHORIZATION_MODE),
        rules: f.list("rules", |f| v1::AuthorizationRule {
            from: f.some_list("from", source),
            to: f.some_list("to", target),
            when: f.some_list("when", condition),
        }),
        jwt: f.some_list("jwt", |f| v1::JwtIssuer {
            issuer: f.text("issuer"),
            audiences: f.some_texts("audiences"),
            jwks: f.object("jwks", |f| v1::Jwks {
                source: f.one_of([
                    ("inline", v1::jwks::Source::Inline as fn(String) -> _),
                    ("uri", v1::jwks::Source::Uri),
                ]),
                refresh: f.duration("refresh"),
            }),
            from_headers: f.some_texts("fromHeaders"),
        }),
    }
}

fn source(f: &mut Fields<'_>) -> v1::AuthorizationSource {
    v1::AuthorizationSource {
        identities: f.some_texts("identities"),
        zones: f.some_texts("zones"),
        not_identities: f.some_texts("notIdentities"),
        not_zones: f.some_texts("notZones"),
    }
}

fn target(f: &mut Fields<'_>) -> v1::AuthorizationTarget {
    v1::AuthorizationTarget {
        methods: f.some_texts("methods"),
        paths: f.some_texts("paths"),
        hostnames: f.some_texts("hostnames"),
        routes: f.some_texts("routes"),
        not_methods: f.some_texts("notMethods"),
        not_paths: f.some_texts("notPaths"),
        not_hostnames: f.some_texts("notHostnames"),
        not_routes: f.some_texts("notRoutes"),
    }
}

fn condition(f: &mut Fields<'_>) -> v1::AuthorizationCondition {
    v1::AuthorizationCondition {
        subject: f.one_of([
            (
                "header",
                v1::authorization_condition::Subject::Header as fn(String) -> _,
            ),
            ("claim", v1::authorization_condition::Subject::Claim),
        ]),
        values: f.some_texts("values"),
        not_values: f.some_texts("notValues"),
    }
}

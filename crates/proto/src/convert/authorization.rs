//! Who may do what with a service.

use super::route::hostname;
use super::text::{authority, bounded, key_header, method, path_text};
use super::{DAY, KIB, MINUTE, SECOND};
use crate::field::{Fields, Section};
use crate::v1;
use leeward_policy::model::{
    AuthorizationAction, AuthorizationCondition, AuthorizationMode, AuthorizationPolicy, AuthorizationRule,
    AuthorizationSource, AuthorizationSubject, AuthorizationTarget, JwksSource, JwtIssuer, ValuePattern,
};
use leeward_policy::{Guards, Name, claims_identity, path, path_pattern};
use serde_json::Value;
use std::fmt::Display;
use std::net::IpAddr;
use std::sync::Arc;

const LONGEST_URI: usize = 2048;
const LONGEST_VALUE: usize = 512;

pub(super) fn authorization_policy(
    f: &mut Fields,
    wire: &v1::AuthorizationPolicy,
) -> Option<AuthorizationPolicy> {
    let mut s = f.section("spec");
    let services = s.names("services", &wire.services, 256);
    let action = action(&mut s, wire);
    let mode = mode(&mut s, wire);
    f.count("spec.rules", wire.rules.len(), 0..=64);
    let mut rules = Vec::new();
    for (i, wire) in wire.rules.iter().enumerate() {
        rules.push(rule(f, &format!("spec.rules[{i}]"), wire));
    }
    f.count("spec.jwt", wire.jwt.len(), 0..=8);
    let mut jwt: Vec<Arc<JwtIssuer>> = Vec::new();
    for (i, wire) in wire.jwt.iter().enumerate() {
        let mut s = f.section(format!("spec.jwt[{i}]"));
        let Some(issuer) = issuer(&mut s, wire).map(Arc::new) else {
            continue;
        };
        if let Some(first) = jwt.iter().position(|earlier| *earlier == issuer) {
            s.reject_here::<()>(format!("is the same as spec.jwt[{first}]; each must stand once"));
        }
        jwt.push(issuer);
    }
    fit(f, wire);
    Some(AuthorizationPolicy {
        services,
        action: action?,
        mode: mode?,
        rules: rules.into(),
        jwt,
    })
}

/// What an AuthorizationPolicy that can't be read was to guard, as far as that can be; `None` if it refuses nobody, whatever
/// the rest of it says, or is none.
///
/// A list of services that can't be read whole may have meant any.
pub fn guards(wire: &v1::Resource) -> Option<Guards> {
    let Some(v1::resource::Spec::AuthorizationPolicy(spec)) = &wire.spec else {
        return None;
    };
    let audits = spec.action == i32::from(v1::AuthorizationAction::Audit);
    if audits || spec.mode == i32::from(v1::AuthorizationMode::DryRun) {
        return None;
    }
    let services: Result<Vec<Name>, _> = spec.services.iter().map(|name| Name::parse(name)).collect();
    match services {
        Ok(services) if !services.is_empty() => Some(Guards::Services(services)),
        Ok(_) | Err(_) => Some(Guards::All),
    }
}

fn action(s: &mut Section<'_>, wire: &v1::AuthorizationPolicy) -> Option<AuthorizationAction> {
    const WANT: &str = "want Allow, Deny or Audit";
    match v1::AuthorizationAction::try_from(wire.action) {
        Ok(v1::AuthorizationAction::Allow) => Some(AuthorizationAction::Allow),
        Ok(v1::AuthorizationAction::Deny) => Some(AuthorizationAction::Deny),
        Ok(v1::AuthorizationAction::Audit) => Some(AuthorizationAction::Audit),
        Ok(v1::AuthorizationAction::Unspecified) => s.reject("action", format!("is missing; {WANT}")),
        Err(_) => s.reject("action", format!("{} is not known; {WANT}", wire.action)),
    }
}

fn mode(s: &mut Section<'_>, wire: &v1::AuthorizationPolicy) -> Option<AuthorizationMode> {
    match v1::AuthorizationMode::try_from(wire.mode) {
        Ok(v1::AuthorizationMode::Unspecified | v1::AuthorizationMode::Enforce) => {
            Some(AuthorizationMode::Enforce)
        }
        Ok(v1::AuthorizationMode::DryRun) => Some(AuthorizationMode::DryRun),
        Err(_) => s.reject(
            "mode",
            format!("{} is not known; want Enforce or DryRun", wire.mode),
        ),
    }
}

/// Whether the fields go together.
fn fit(f: &mut Fields, wire: &v1::AuthorizationPolicy) {
    let (audit, deny) = (
        wire.action() == v1::AuthorizationAction::Audit,
        wire.action() == v1::AuthorizationAction::Deny,
    );
    if (audit || deny) && wire.rules.is_empty() {
        let (word, does) = if deny {
            ("Deny", "refuses")
        } else {
            ("Audit", "tells")
        };
        f.reject::<()>(
            "spec.rules",
            format!("is empty, and a policy of action {word} without rules {does} nothing; want one at least, [{{}}] for every request"),
        );
    }
    if audit && wire.mode() == v1::AuthorizationMode::DryRun {
        f.reject::<()>(
            "spec.mode",
            "DryRun is for policies that refuse; action Audit refuses nothing, so leave mode out",
        );
    }
    let mut conditions = wire.rules.iter().flat_map(|rule| &rule.when);
    let claims = conditions.any(|condition| {
        matches!(
            condition.subject,
            Some(v1::authorization_condition::Subject::Claim(_))
        )
    });
    if claims && wire.jwt.is_empty() {
        f.reject::<()>(
            "spec.jwt",
            "is missing, but rules look at claims; want the issuers whose tokens have them",
        );
    }
    if !claims && !wire.jwt.is_empty() {
        f.reject::<()>(
            "spec.jwt",
            "names issuers, but no rule looks at a claim, so that no token would be asked for; want a condition such as {claim: sub, values: [\"*\"]}",
        );
    }
}

fn rule(f: &mut Fields, path: &str, wire: &v1::AuthorizationRule) -> AuthorizationRule {
    f.count(&format!("{path}.from"), wire.from.len(), 0..=16);
    f.count(&format!("{path}.to"), wire.to.len(), 0..=16);
    f.count(&format!("{path}.when"), wire.when.len(), 0..=16);
    let mut rule = AuthorizationRule::default();
    for (i, wire) in wire.from.iter().enumerate() {
        rule.from
            .push(source(&mut f.section(format!("{path}.from[{i}]")), wire));
    }
    for (i, wire) in wire.to.iter().enumerate() {
        rule.to
            .push(target(&mut f.section(format!("{path}.to[{i}]")), wire));
    }
    for (i, wire) in wire.when.iter().enumerate() {
        rule.when
            .extend(condition(&mut f.section(format!("{path}.when[{i}]")), wire));
    }
    rule
}

fn source(s: &mut Section<'_>, wire: &v1::AuthorizationSource) -> AuthorizationSource {
    if *wire == v1::AuthorizationSource::default() {
        s.reject_here::<()>("says nothing; want one of identities, zones, notIdentities, notZones");
    }
    apart(
        s,
        ("identities", &wire.identities),
        ("notIdentities", &wire.not_identities),
    );
    apart(s, ("zones", &wire.zones), ("notZones", &wire.not_zones));
    AuthorizationSource {
        identities: each(s, "identities", &wire.identities, 64, identity),
        zones: s.names("zones", &wire.zones, 64),
        not_identities: each(s, "notIdentities", &wire.not_identities, 64, identity),
        not_zones: s.names("notZones", &wire.not_zones, 64),
    }
}

fn target(s: &mut Section<'_>, wire: &v1::AuthorizationTarget) -> AuthorizationTarget {
    if *wire == v1::AuthorizationTarget::default() {
        s.reject_here::<()>(
            "says nothing; want one of methods, paths, hostnames, routes, notMethods, notPaths, notHostnames, notRoutes",
        );
    }
    apart(s, ("methods", &wire.methods), ("notMethods", &wire.not_methods));
    apart(s, ("paths", &wire.paths), ("notPaths", &wire.not_paths));
    apart(
        s,
        ("hostnames", &wire.hostnames),
        ("notHostnames", &wire.not_hostnames),
    );
    apart(s, ("routes", &wire.routes), ("notRoutes", &wire.not_routes));
    let on_method = |f: &mut Fields, at: &str, text: &str| method(f, at, text).map(Box::from);
    AuthorizationTarget {
        methods: each(s, "methods", &wire.methods, 16, on_method),
        paths: each(s, "paths", &wire.paths, 64, on_path),
        hostnames: each(s, "hostnames", &wire.hostnames, 64, hostname),
        routes: s.names("routes", &wire.routes, 64),
        not_methods: each(s, "notMethods", &wire.not_methods, 16, on_method),
        not_paths: each(s, "notPaths", &wire.not_paths, 64, on_path),
        not_hostnames: each(s, "notHostnames", &wire.not_hostnames, 64, hostname),
        not_routes: s.names("notRoutes", &wire.not_routes, 64),
    }
}

fn condition(s: &mut Section<'_>, wire: &v1::AuthorizationCondition) -> Option<AuthorizationCondition> {
    use v1::authorization_condition::Subject;
    let subject = match &wire.subject {
        None => s.reject_here("looks at nothing; want one of header, claim"),
        Some(Subject::Header(name)) => {
            let at = s.at("header");
            header(s.fields(), &at, name).map(AuthorizationSubject::Header)
        }
        Some(Subject::Claim(name)) if name.is_empty() || name.len() > LONGEST_VALUE => s.reject(
            "claim",
            format!(
                "is {} bytes long; want the name of a claim, 1 to {LONGEST_VALUE} bytes",
                name.len()
            ),
        ),
        Some(Subject::Claim(name)) => Some(AuthorizationSubject::Claim(name.as_str().into())),
    };
    if wire.values.is_empty() && wire.not_values.is_empty() {
        s.reject_here::<()>("says nothing of the value; want one of values, notValues, [\"*\"] for any");
    }
    apart(s, ("values", &wire.values), ("notValues", &wire.not_values));
    Some(AuthorizationCondition {
        values: each(s, "values", &wire.values, 64, pattern),
        not_values: each(s, "notValues", &wire.not_values, 64, pattern),
        subject: subject?,
    })
}

/// The entries of a list, each once.
fn each<T>(
    s: &mut Section<'_>,
    field: &str,
    texts: &[String],
    most: usize,
    read: impl Fn(&mut Fields, &str, &str) -> Option<T>,
) -> Vec<T> {
    let path = s.at(field);
    s.fields().count(&path, texts.len(), 0..=most);
    let mut read_so_far = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        read_so_far.extend(read(s.fields(), &format!("{path}[{i}]"), text));
    }
    s.fields().unique(&path, "", texts);
    read_so_far
}

/// What is wanted and what is not can't be the same.
fn apart(s: &mut Section<'_>, (field, wanted): (&str, &[String]), (opposite, unwanted): (&str, &[String])) {
    for (i, text) in wanted.iter().enumerate() {
        if let Some(j) = unwanted.iter().position(|un| un == text) {
            let at = s.at(&format!("{opposite}[{j}]"));
            s.reject::<()>(
                &format!("{field}[{i}]"),
                format!("{text:?} is {at}, too; want it in one of them"),
            );
        }
    }
}

/// The pattern of a SPIFFE id.
fn identity(f: &mut Fields, at: &str, text: &str) -> Option<Box<str>> {
    const SUCH_AS: &str =
        "want one such as spiffe://leeward.test/zone/a/proxy/a1 or spiffe://leeward.test/zone/a/*";
    let mut bad = |why: &dyn Display| {
        f.reject(
            at,
            format!("{text:?} is not a SPIFFE id or a pattern of one: {why}; {SUCH_AS}"),
        )
    };
    let Some(rest) = text.strip_prefix("spiffe://") else {
        return bad(&"it must begin with spiffe://");
    };
    let Some((domain, path)) = rest.split_once('/') else {
        return bad(&"it has no path");
    };
    let in_domain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
    if domain.is_empty() || domain.len() > 255 || !domain.bytes().all(in_domain) {
        return bad(&"the trust domain is 1 to 255 bytes of a-z, 0-9, '-', '.' and '_', and no '*'");
    }
    if text.len() > LONGEST_URI {
        return bad(&format!("it is longer than {LONGEST_URI} bytes"));
    }
    for segment in path.split('/') {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        if segment != "*" && (matches!(segment, "" | "." | "..") || !segment.bytes().all(plain)) {
            return bad(
                &"a segment of the path is '*', or letters, digits, '-', '.' and '_', and neither '.' nor '..'",
            );
        }
    }
    Some(text.into())
}

/// The pattern of a path, in the form in which requests' are matched.
fn on_path(f: &mut Fields, at: &str, text: &str) -> Option<Box<str>> {
    path_text(f, at, text)?;
    if let Err(bad) = path::normalise(text) {
        return f.reject(
            at,
            format!("{text:?} is {bad}; want a path that requests can have"),
        );
    }
    let pattern = path_pattern(text);
    if let Some(what) = path::ambiguity(&pattern) {
        return f.reject(
            at,
            format!("{text:?} has {what}, and requests with that are refused where rules look at paths; want another path"),
        );
    }
    let coded = text
        .as_bytes()
        .windows(3)
        .any(|code| code.eq_ignore_ascii_case(b"%2a"));
    if coded
        || pattern
            .split('/')
            .any(|segment| segment != "*" && segment.contains('*'))
    {
        return f.reject(
            at,
            format!("{text:?} has a '*' that is not a whole segment; want one such as /charge/* or /users/*/orders"),
        );
    }
    Some(pattern)
}

fn header(f: &mut Fields, at: &str, text: &str) -> Option<Box<str>> {
    let name = key_header(f, at, text)?;
    if claims_identity(&name) {
        return f.reject(
            at,
            format!("{name} says who asks, and the proxy takes it out of requests; want from.identities"),
        );
    }
    Some(name)
}

fn pattern(f: &mut Fields, at: &str, text: &str) -> Option<ValuePattern> {
    if text.is_empty() || text.len() > LONGEST_VALUE {
        return f.reject(
            at,
            format!("is {} bytes long; want 1 to {LONGEST_VALUE}", text.len()),
        );
    }
    let pattern = match (text.strip_prefix('*'), text.strip_suffix('*')) {
        (Some(""), _) => return Some(ValuePattern::Any),
        (Some(end), _) => ValuePattern::Suffix(end.into()),
        (None, Some(beginning)) => ValuePattern::Prefix(beginning.into()),
        (None, None) => ValuePattern::Exact(text.into()),
    };
    let (ValuePattern::Suffix(fixed) | ValuePattern::Prefix(fixed) | ValuePattern::Exact(fixed)) = &pattern
    else {
        return Some(pattern);
    };
    if fixed.contains('*') {
        return f.reject(
            at,
            format!("{text:?} has a '*' in the middle, or two; want one at the beginning or the end"),
        );
    }
    Some(pattern)
}

fn issuer(s: &mut Section<'_>, wire: &v1::JwtIssuer) -> Option<JwtIssuer> {
    if wire.issuer.is_empty() {
        s.reject::<()>(
            "issuer",
            "is missing; want what stands in the claim iss of its tokens",
        );
    }
    let at = s.at("issuer");
    bounded(s.fields(), &at, &wire.issuer, LONGEST_VALUE);
    if wire.audiences.is_empty() {
        s.reject::<()>(
            "audiences",
            "is missing; want what stands in the claim aud of tokens that are for this service, since others are not",
        );
    }
    let audience = |f: &mut Fields, at: &str, text: &str| {
        if text.is_empty() || text.len() > LONGEST_VALUE {
            return f.reject(
                at,
                format!("is {} bytes long; want 1 to {LONGEST_VALUE}", text.len()),
            );
        }
        Some(text.into())
    };
    let audiences = each(s, "audiences", &wire.audiences, 16, audience);
    let mut headers = each(s, "fromHeaders", &wire.from_headers, 4, header);
    if wire.from_headers.is_empty() {
        headers.push("authorization".into());
    }
    let keys = match &wire.jwks {
        None => s.reject("jwks", "is missing; want {inline: ...} or {uri: ...}"),
        Some(wire) => keys(&mut s.section("jwks"), wire),
    };
    Some(JwtIssuer {
        issuer: wire.issuer.as_str().into(),
        audiences,
        keys: keys?,
        headers,
    })
}

fn keys(s: &mut Section<'_>, wire: &v1::Jwks) -> Option<JwksSource> {
    match &wire.source {
        None => s.reject_here("has no keys; want one of inline, uri"),
        Some(v1::jwks::Source::Inline(text)) => {
            if wire.refresh.is_some() {
                s.reject::<()>("refresh", "is for keys that are to be had at a uri; leave it out");
            }
            match check_jwks(text) {
                Ok(()) => Some(JwksSource::Inline(text.as_str().into())),
                Err(why) => s.reject("inline", why),
            }
        }
        Some(v1::jwks::Source::Uri(text)) => {
            let refresh = s.duration("refresh", wire.refresh.as_ref(), 5 * MINUTE, 10 * SECOND..=DAY);
            if !can_be_fetched(text) {
                return s.reject(
                    "uri",
                    format!("{text:?} is not where keys can be had; want https://HOST/PATH, or http:// and a loopback address"),
                );
            }
            Some(JwksSource::Remote {
                uri: text.as_str().into(),
                refresh,
            })
        }
    }
}

/// Whether it is an https URL, or an http one of this machine.
fn can_be_fetched(uri: &str) -> bool {
    let (secure, rest) = match (uri.strip_prefix("https://"), uri.strip_prefix("http://")) {
        (Some(rest), _) => (true, rest),
        (None, Some(rest)) => (false, rest),
        (None, None) => return false,
    };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (at, path) = rest.split_at(end);
    let plain = |b: u8| b.is_ascii_graphic() && b != b'#' && b != b'\\';
    if uri.len() > LONGEST_URI || !path.bytes().all(plain) || !(path.is_empty() || path.starts_with('/')) {
        return false;
    }
    authority(at).is_some_and(|(host, _)| {
        let address = host.parse::<IpAddr>();
        secure || host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    })
}

/// Whether a text is a set of public keys, some of which can be used.
fn check_jwks(text: &str) -> Result<(), String> {
    if text.len() > 64 * KIB {
        return Err(format!("is {} bytes long; want at most {}", text.len(), 64 * KIB));
    }
    let set: Value = serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))?;
    let Some(keys) = set.get("keys").and_then(Value::as_array) else {
        return Err("is not a set of keys; want JSON such as {\"keys\": [...]} (RFC 7517)".to_owned());
    };
    if keys.len() > 64 {
        return Err(format!("has {} keys; want at most 64", keys.len()));
    }
    if let Some(at) = keys
        .iter()
        .position(|key| key.get("d").is_some() || key.get("k").is_some())
    {
        return Err(format!(
            "holds a secret in keys[{at}]; want public keys only, and that one replaced"
        ));
    }
    let text = |key: &Value, field| key.get(field).and_then(Value::as_str).map(str::to_owned);
    let usable = |key: &Value| match text(key, "kty").as_deref() {
        Some("RSA") => true,
        Some("EC") => text(key, "crv").as_deref() == Some("P-256"),
        Some("OKP") => text(key, "crv").as_deref() == Some("Ed25519"),
        Some(_) | None => false,
    };
    if keys.iter().any(usable) {
        return Ok(());
    }
    Err("has no key that can be used; want one of RSA, of EC with P-256, or of OKP with Ed25519".to_owned())
}

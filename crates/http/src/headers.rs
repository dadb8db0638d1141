//! Header rules of an intermediary (RFC 9110 §7.6, RFC 9112 §3.2, RFC 9113 §8).

use crate::failure::Failure;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Uri, Version};
use leeward_policy::claims_identity;
use std::time::Duration;

/// Names the endpoint to the proxy in front of it: `SERVICE/IP:PORT`. To a gateway, and by a gateway, it is named as
/// `SERVICE/IP:PORT@PROXY`, if there is a proxy in front of it: an older proxy knows no such endpoint, rather than
/// deciding about the gateway in place of the caller.
pub(crate) const ENDPOINT: HeaderName = HeaderName::from_static("leeward-endpoint");
/// Tells the next proxy how important a request is.
pub(crate) const PRIORITY: HeaderName = HeaderName::from_static("leeward-priority");
/// Names the route of a request to the proxy in front of its endpoint, where policy goes by that.
pub(crate) const ROUTE: HeaderName = HeaderName::from_static("leeward-route");
/// Says that a request is a proxy's own check of an endpoint's health.
pub(crate) const CHECK: HeaderName = HeaderName::from_static("leeward-check");
/// A gateway's word for whose request it passes on: the SPIFFE id that the caller has shown it.
pub(crate) const CALLER: HeaderName = HeaderName::from_static("leeward-caller");
/// Says on a failure why it is one.
pub(crate) const REASON: HeaderName = HeaderName::from_static("leeward-reason");
/// Says that an answer is a fallback's: `POLICY/RUNG`.
pub(crate) const DEGRADED: HeaderName = HeaderName::from_static("leeward-degraded");
/// Says on a refusal which limit of the proxy it was, by its name in policy.
pub(crate) const LIMIT: HeaderName = HeaderName::from_static("leeward-limit");
/// How long whoever sent a request waits for the head of its answer, as `grpc-timeout` has it. Taken from
/// workloads too, since it can only make a wait shorter.
pub(crate) const TIMEOUT: HeaderName = HeaderName::from_static("leeward-timeout");
/// The same, in gRPC.
pub(crate) const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// Makes a request safe to send twice (draft-ietf-httpapi-idempotency-key-header).
pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// How deep in calls of plugins a request is. Workloads that pass it on stop a circle of plugins the sooner.
pub(crate) const PLUGIN_DEPTH: HeaderName = HeaderName::from_static("leeward-plugin-depth");
/// Plugins' calls of plugins' calls.
pub(crate) const MAX_DEPTH: u16 = 5;
/// Say where a request comes from, together with Forwarded.
pub(crate) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub(crate) const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Fields that only the mesh may set.
const OURS: &str = "leeward-";
/// What our part of a Via field begins with.
const PSEUDONYM: &str = "leeward-";
/// More proxies of the mesh than any sane path has.
pub(crate) const MAX_HOPS: usize = 16;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// What one look at a request's fields found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    hop_by_hop: bool,
    connection: bool,
    te: bool,
    upgrade: bool,
    ours: bool,
    /// Somebody speaks for another caller.
    caller: bool,
    /// Fields that would tell a workload who asks.
    identity: bool,
    content_length: usize,
    transfer_encoding: bool,
    /// A transfer coding other than "chunked", or more than one.
    coded: bool,
    host: usize,
    cookies: usize,
    hops: usize,
}

/// Whether [`look`] has to look at a field (lower case); of most fields the first letters say that it hasn't.
fn may_mean_something(name: &str) -> bool {
    match name.as_bytes() {
        [b'c', second, ..] => matches!(second, b'o' | b'l'),
        [b'x', b'-', third, ..] => matches!(third, b'l' | b'f'),
        [b'h', b'o', ..] | [b'u', b'p', ..] => true,
        [first, ..] => matches!(first, b'k' | b'l' | b'p' | b't' | b'v'),
        [] => false,
    }
}

/// Looks at every field once.
pub(crate) fn look(headers: &HeaderMap) -> Found {
    let mut found = Found::default();
    for (name, value) in headers {
        let name = name.as_str();
        if !may_mean_something(name) {
            continue;
        }
        match name {
            "host" => found.host += 1,
            "connection" => found.connection = true,
            "content-length" => found.content_length += 1,
            "transfer-encoding" => {
                found.coded |= found.transfer_encoding || !value.as_bytes().eq_ignore_ascii_case(b"chunked");
                found.transfer_encoding = true;
            }
            "te" => found.te = true,
            "upgrade" => found.upgrade = true,
            "cookie" => found.cookies += 1,
            "keep-alive" | "proxy-connection" | "proxy-authenticate" | "proxy-authorization" => {
                found.hop_by_hop = true;
            }
            "via" => found.hops += hops(value),
            "leeward-caller" => {
                found.ours = true;
                found.caller = true;
            }
            other => {
                found.ours |= other.starts_with(OURS);
                found.identity |= claims_identity(other);
            }
        }
    }
    found
}

/// Proxies of the mesh in one Via field.
fn hops(via: &HeaderValue) -> usize {
    via.as_bytes()
        .windows(PSEUDONYM.len())
        .filter(|w| *w == PSEUDONYM.as_bytes())
        .count()
}

impl Found {
    /// Whether the request is one that every recipient reads alike.
    pub(crate) fn check(&self, version: Version, uri: &Uri) -> Result<(), Failure> {
        if self.content_length > 1 {
            return Err(Failure::BadRequest("more than one Content-Length"));
        }
        if self.content_length > 0 && self.transfer_encoding {
            return Err(Failure::BadRequest("both Content-Length and Transfer-Encoding"));
        }
        if self.coded {
            // Taking off the framing would lose the other coding.
            return Err(Failure::BadRequest("a transfer coding other than chunked"));
        }
        if uri.scheme().is_none() && uri.authority().is_some() {
            // For CONNECT only (RFC 9112 §3.2.3).
            return Err(Failure::BadRequest("a target in authority form"));
        }
        if self.host > 1 {
            return Err(Failure::BadRequest("more than one Host"));
        }
        if version == Version::HTTP_11 && self.host == 0 {
            return Err(Failure::BadRequest("no Host"));
        }
        if version >= Version::HTTP_2 && (self.connection || self.transfer_encoding || self.upgrade) {
            return Err(Failure::BadRequest("a connection-specific field in HTTP/2"));
        }
        if uri.authority().is_some_and(|a| a.as_str().contains('@')) {
            return Err(Failure::BadRequest("user information in the target"));
        }
        if self.hops >= MAX_HOPS {
            return Err(Failure::Loop(self.hops));
        }
        Ok(())
    }

    /// Whether somebody speaks for another caller.
    pub(crate) const fn has_caller(&self) -> bool {
        self.caller
    }

    /// Whether the client asks to change protocols and names one.
    pub(crate) fn wants_upgrade(&self, version: Version, headers: &HeaderMap) -> bool {
        version == Version::HTTP_11
            && self.upgrade
            && self.connection
            && lists(headers, &header::CONNECTION, "upgrade")
    }

    /// Takes out of a request what is not for the next hop. `upgrade`: the wish to change protocols goes on.
    pub(crate) fn strip(&self, headers: &mut HeaderMap, upgrade: bool) {
        let protocol = if upgrade {
            headers.get(header::UPGRADE).cloned()
        } else {
            None
        };
        strip(headers, self.connection, self.hop_by_hop, self.upgrade);
        if let Some(protocol) = protocol {
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, protocol);
        }
        if self.te {
            // "trailers" is the only value that may pass (RFC 9110 §10.1.4); gRPC needs it to.
            let trailers = lists(headers, &header::TE, "trailers");
            headers.remove(header::TE);
            if trailers {
                headers.insert(header::TE, HeaderValue::from_static("trailers"));
            }
        }
        if self.transfer_encoding {
            // The framing of the next hop is the next hop's.
            headers.remove(header::TRANSFER_ENCODING);
        }
        if self.ours {
            strip_ours(headers);
        }
    }

    /// Takes out what claims to say who asks, before anything can go by it.
    pub(crate) fn disown(&mut self, headers: &mut HeaderMap) {
        if !std::mem::take(&mut self.identity) {
            return;
        }
        let claims: Vec<HeaderName> = headers
            .keys()
            .filter(|name| claims_identity(name.as_str()))
            .cloned()
            .collect();
        for name in claims {
            headers.remove(name);
        }
    }

    /// Joins what HTTP/2 may split and HTTP/1.1 may not (RFC 9113 §8.2.3).
    pub(crate) fn join_cookies(&self, headers: &mut HeaderMap) {
        if self.cookies < 2 {
            return;
        }
        let mut joined = Vec::new();
        for value in headers.get_all(header::COOKIE) {
            if !joined.is_empty() {
                joined.extend_from_slice(b"; ");
            }
            joined.extend_from_slice(value.as_bytes());
        }
        if let Ok(joined) = HeaderValue::from_bytes(&joined) {
            headers.insert(header::COOKIE, joined);
        }
    }
}

/// Whether a response has a transfer coding other than chunked. Nobody asked for one, and taking off the
/// framing would lose it.
pub(crate) fn has_other_coding(headers: &HeaderMap) -> bool {
    let codings = headers.get_all(header::TRANSFER_ENCODING);
    codings
        .iter()
        .any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
}

/// Takes out of a response what is not for the next hop. `trusted`: it comes from a proxy of the mesh,
/// whose own fields count.
pub(crate) fn strip_response(headers: &mut HeaderMap, trusted: bool) {
    let (mut connection, mut hop_by_hop, mut upgrade, mut ours, mut framing) =
        (false, false, false, false, false);
    for name in headers.keys() {
        match name.as_str() {
            "connection" => connection = true,
            "keep-alive" | "proxy-connection" | "proxy-authenticate" => hop_by_hop = true,
            "upgrade" => upgrade = true,
            "transfer-encoding" => framing = true,
            other => ours |= other.starts_with(OURS),
        }
    }
    strip(headers, connection, hop_by_hop, upgrade);
    if framing {
        headers.remove(header::TRANSFER_ENCODING);
    }
    if ours && !trusted {
        strip_ours(headers);
    }
}

fn strip(headers: &mut HeaderMap, connection: bool, hop_by_hop: bool, upgrade: bool) {
    if connection {
        let named: Vec<HeaderName> = named_by_connection(headers).collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(header::CONNECTION);
    }
    if hop_by_hop {
        for name in [
            KEEP_ALIVE,
            PROXY_CONNECTION,
            header::PROXY_AUTHENTICATE,
            header::PROXY_AUTHORIZATION,
        ] {
            headers.remove(name);
        }
    }
    if upgrade {
        headers.remove(header::UPGRADE);
    }
}

/// The fields that a message says are for this hop only. A peer can't have us drop what framing, routing or TE depend on, nor
/// what tells the next hop where a request comes from.
fn named_by_connection(headers: &HeaderMap) -> impl Iterator<Item = HeaderName> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|token| HeaderName::try_from(token.trim()).ok())
        .filter(|name| {
            !matches!(
                name.as_str(),
                "host"
                    | "content-length"
                    | "transfer-encoding"
                    | "te"
                    | "connection"
                    | "forwarded"
                    | "x-forwarded-for"
                    | "x-forwarded-proto"
            )
        })
}

/// Whether a request says of a field (lower case) that it is for this hop only, so that it goes no further.
pub(crate) fn dropped_by_connection(headers: &HeaderMap, name: &str) -> bool {
    headers.contains_key(header::CONNECTION) && named_by_connection(headers).any(|named| named == name)
}

/// Whether only the mesh may set a field.
pub(crate) fn is_ours(name: &HeaderName) -> bool {
    name.as_str().starts_with(OURS)
}

pub(crate) fn strip_ours(headers: &mut HeaderMap) {
    let ours: Vec<HeaderName> = headers
        .keys()
        .filter(|n| n.as_str().starts_with(OURS) && **n != PLUGIN_DEPTH)
        .cloned()
        .collect();
    for name in ours {
        headers.remove(name);
    }
}

/// A wait as Retry-After has it: whole seconds, and never none.
pub(crate) fn retry_seconds(wait: Duration) -> Duration {
    Duration::from_secs(wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(Duration::from_secs(1))
}

/// The value of a cookie.
pub(crate) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

/// Whether a comma-separated list field names `token`, in any case.
fn lists(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|item| {
            item.split(';')
                .next()
                .is_some_and(|item| item.trim().eq_ignore_ascii_case(token))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_misses_nothing_for_its_first_letters() {
        for name in [
            "host",
            "connection",
            "content-length",
            "transfer-encoding",
            "te",
            "upgrade",
            "cookie",
            "keep-alive",
            "proxy-connection",
            "proxy-authenticate",
            "proxy-authorization",
            "via",
            "leeward-caller",
            "leeward-x",
            "x-leeward-identity",
            "client-cert",
            "client-cert-chain",
            "l5d-client-id",
            "x-forwarded-client-cert",
        ] {
            let found = look(&map(&[(name, "leeward-a")]));
            assert_ne!(format!("{found:?}"), format!("{:?}", Found::default()), "{name}");
        }
        let others = [
            "accept",
            "user-agent",
            "x-a",
            "x-forwarded-for",
            "cache-control",
            "c",
            "x-",
        ];
        let fields = others.map(|name| (name, "leeward-a"));
        assert_eq!(
            format!("{:?}", look(&map(&fields))),
            format!("{:?}", Found::default())
        );
    }

    #[test]
    fn what_is_taken_for_dropped_is_what_is_dropped() {
        for (connection, dropped) in [
            ("x-a", true),
            ("close, X-A", true),
            ("x-a;b", false),
            ("x-a b", false),
            ("x-b", false),
        ] {
            let mut headers = map(&[("connection", connection), ("x-a", "1")]);
            assert_eq!(dropped_by_connection(&headers, "x-a"), dropped, "{connection}");
            strip(&mut headers, true, false, false);
            assert_eq!(!headers.contains_key("x-a"), dropped, "{connection}");
        }
        let te = map(&[("connection", "te"), ("te", "trailers")]);
        assert!(!dropped_by_connection(&te, "te"));
    }

    fn map(lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(
                HeaderName::try_from(*name).unwrap(),
                HeaderValue::from_str(value).unwrap(),
            );
        }
        headers
    }

    #[track_caller]
    fn check(lines: &[(&str, &str)], upgrade: bool, want: &[(&str, &str)]) {
        let mut headers = map(lines);
        look(&headers).strip(&mut headers, upgrade);
        assert_eq!(headers, map(want));
    }

    #[test]
    fn what_is_for_one_hop_stays_there() {
        check(
            &[
                ("connection", "close, X-Secret"),
                ("x-secret", "1"),
                ("keep-alive", "timeout=5"),
                ("accept", "*/*"),
            ],
            false,
            &[("accept", "*/*")],
        );
        check(&[("te", "gzip, trailers")], false, &[("te", "trailers")]);
        check(&[("te", "gzip")], false, &[]);
        check(&[("transfer-encoding", "chunked")], false, &[]);
        check(
            &[("leeward-endpoint", "x/1.2.3.4:5"), ("leeward-zone", "b")],
            false,
            &[],
        );
    }

    #[test]
    fn nobody_says_who_asks_but_the_mesh() {
        let mut headers = map(&[
            ("x-forwarded-client-cert", "URI=spiffe://t/admin"),
            ("l5d-client-id", "admin"),
            ("client-cert", ":AA==:"),
            ("client-cert-chain", ":AA==:"),
            ("x-leeward-identity", "spiffe://t/admin"),
            ("x-leeward-zone", "a"),
            ("x-user", "1"),
        ]);
        look(&headers).disown(&mut headers);
        assert_eq!(headers, map(&[("x-user", "1")]));
    }

    #[test]
    fn connection_cannot_name_what_framing_depends_on() {
        check(
            &[
                ("connection", "host, content-length"),
                ("host", "a"),
                ("content-length", "3"),
            ],
            false,
            &[("host", "a"), ("content-length", "3")],
        );
    }

    #[test]
    fn connection_cannot_name_what_says_where_a_request_comes_from() {
        let said = [
            ("forwarded", "for=192.0.2.9"),
            ("x-forwarded-for", "192.0.2.9"),
            ("x-forwarded-proto", "https"),
        ];
        let connection = "x-forwarded-for, X-Forwarded-Proto, forwarded, x-forwarded-host";
        let named = ("connection", connection);
        check(
            &[&said[..], &[named, ("x-forwarded-host", "a")]].concat(),
            false,
            &said,
        );
    }

    #[test]
    fn an_upgrade_goes_on_alone() {
        let request = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("keep-alive", "1"),
        ];
        let headers = map(&request);
        assert!(look(&headers).wants_upgrade(Version::HTTP_11, &headers));
        assert!(!look(&headers).wants_upgrade(Version::HTTP_10, &headers));
        check(
            &request,
            true,
            &[("connection", "upgrade"), ("upgrade", "websocket")],
        );
        check(&request, false, &[]);
    }

    #[test]
    fn requests_that_can_be_read_two_ways_are_refused() {
        let uri = Uri::from_static("/");
        let verdict = |lines: &[(&str, &str)]| look(&map(lines)).check(Version::HTTP_11, &uri);
        assert_eq!(verdict(&[("host", "a")]), Ok(()));
        assert!(verdict(&[]).is_err());
        assert!(verdict(&[("host", "a"), ("host", "a")]).is_err());
        assert!(verdict(&[("host", "a"), ("content-length", "1"), ("content-length", "1")]).is_err());
        assert!(
            verdict(&[
                ("host", "a"),
                ("content-length", "1"),
                ("transfer-encoding", "chunked")
            ])
            .is_err()
        );
        assert_eq!(
            verdict(&[("host", "a"), ("transfer-encoding", "Chunked")]),
            Ok(())
        );
        assert!(verdict(&[("host", "a"), ("transfer-encoding", "gzip, chunked")]).is_err());
        let twice = [
            ("host", "a"),
            ("transfer-encoding", "chunked"),
            ("transfer-encoding", "chunked"),
        ];
        assert!(verdict(&twice).is_err());
        assert!(
            look(&map(&[("host", "a")]))
                .check(Version::HTTP_11, &Uri::from_static("a:80"))
                .is_err()
        );
        let via = ("via", "1.1 leeward-x, 1.1 leeward-y");
        let many: Vec<_> = std::iter::once(("host", "a"))
            .chain(std::iter::repeat_n(via, 8))
            .collect();
        assert_eq!(verdict(&many), Err(Failure::Loop(16)));
    }

    #[test]
    fn a_cookie_is_found_among_others() {
        let headers = map(&[("cookie", "a=1; bb=2"), ("cookie", "b=3=4")]);
        assert_eq!(cookie(&headers, "b"), Some("3=4"));
        assert_eq!(cookie(&headers, "c"), None);
    }

    #[test]
    fn cookies_are_one_field_in_http_1() {
        let mut headers = map(&[("cookie", "a=1"), ("cookie", "b=2")]);
        look(&headers).join_cookies(&mut headers);
        assert_eq!(headers, map(&[("cookie", "a=1; b=2")]));
    }
}

//! What a request says of the way that it has come (RFC 7239, and the X-Forwarded fields before it).

use crate::headers::is_ours;
use http::header::{self, HeaderName};
use http::{HeaderMap, HeaderValue};
use std::net::{IpAddr, SocketAddr};

const FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Fields by which proxies tell each other of requests; from anybody else they are made up. The first group says where
/// a request comes from, the second which trace it belongs to.
const TOLD: [&str; 8] = [
    "forwarded",
    "x-real-ip",
    "true-client-ip",
    "traceparent",
    "tracestate",
    "baggage",
    "b3",
    "grpc-trace-bin",
];
const TOLD_PREFIXES: [&str; 3] = ["x-forwarded-", "x-b3-", "x-envoy-"];

/// Takes out what only the mesh may say, and what is from nobody who is believed; then says for whom the request is.
/// `hops` proxies in front are believed: of a list the last `hops` entries, which they have put there. Returns the address of
/// the client: the first of these entries, or `from`, whose request it is, if there are fewer.
pub(super) fn settle(
    headers: &mut HeaderMap,
    hops: usize,
    from: IpAddr,
    scheme: &'static str,
    host: Option<&str>,
) -> IpAddr {
    let chain = last(&entries(headers, &FOR), hops);
    let told = last(&entries(headers, &header::FORWARDED), hops);
    let proto = entries(headers, &PROTO).pop();
    let proto = proto.filter(|proto| hops > 0 && (proto == "http" || proto == "https"));
    let proto = proto.unwrap_or_else(|| scheme.to_owned());
    let made_up: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_ours(name) || hops == 0 && is_told(name.as_str()))
        .cloned()
        .collect();
    for name in made_up {
        headers.remove(name);
    }
    let client = chain.first().filter(|_| chain.len() == hops);
    let client = client.and_then(|entry| address(entry)).unwrap_or(from);
    let mut chain = chain;
    chain.push(from.to_string());
    put(headers, FOR, &chain.join(", "));
    put(headers, PROTO, &proto);
    let mut told = told;
    told.push(element(from, scheme, host));
    put(headers, header::FORWARDED, &told.join(", "));
    client
}

fn is_told(name: &str) -> bool {
    TOLD.contains(&name) || TOLD_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    // What is in it was in fields before, or is an address.
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// One element of Forwarded (RFC 7239 §4).
fn element(from: IpAddr, scheme: &str, host: Option<&str>) -> String {
    let from = match from {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("\"[{v6}]\""),
    };
    match host.filter(|host| !host.contains(['"', '\\'])) {
        Some(host) => format!("for={from};host=\"{host}\";proto={scheme}"),
        None => format!("for={from};proto={scheme}"),
    }
}

fn last(entries: &[String], count: usize) -> Vec<String> {
    entries
        .get(entries.len().saturating_sub(count)..)
        .unwrap_or_default()
        .to_vec()
}

/// The entries of a list field, over all of its lines. A comma in a quoted text is none.
fn entries(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    let mut entries = Vec::new();
    for value in headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
    {
        let (mut quoted, mut escaped) = (false, false);
        let parts = value.split(|c| {
            let ends = c == ',' && !quoted;
            quoted ^= c == '"' && !escaped;
            escaped = c == '\\' && quoted && !escaped;
            ends
        });
        entries.extend(
            parts
                .map(str::trim)
                .filter(|part| !part.is_empty())
                .map(str::to_owned),
        );
    }
    entries
}

/// The address in an entry, which may have a port beside it.
fn address(entry: &str) -> Option<IpAddr> {
    let bare = entry.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    bare.unwrap_or(entry)
        .parse()
        .ok()
        .or_else(|| entry.parse::<SocketAddr>().ok().map(|address| address.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 9));

    /// What is left of these lines, and who asks.
    fn settled(lines: &[(&str, &str)], hops: usize) -> (Vec<(String, String)>, IpAddr) {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(
                HeaderName::try_from(*name).unwrap(),
                HeaderValue::from_str(value).unwrap(),
            );
        }
        let client = settle(&mut headers, hops, PEER, "https", Some("shop.example"));
        let mut left: Vec<_> = headers
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        left.sort();
        (left, client)
    }

    fn lines(lines: &[(&str, &str)]) -> Vec<(String, String)> {
        lines
            .iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect()
    }

    #[test]
    fn nobody_is_believed_who_is_not_named() {
        let said = [
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "admin.example"),
            ("forwarded", "for=10.0.0.1;proto=http"),
            ("x-real-ip", "10.0.0.1"),
            ("leeward-timeout", "1m"),
            ("leeward-plugin-depth", "5"),
            (
                "traceparent",
                "00-11111111111111111111111111111111-2222222222222222-01",
            ),
            ("baggage", "a=1"),
            ("x-user", "1"),
        ];
        let (left, client) = settled(&said, 0);
        let want = [
            ("forwarded", "for=192.0.2.9;host=\"shop.example\";proto=https"),
            ("x-forwarded-for", "192.0.2.9"),
            ("x-forwarded-proto", "https"),
            ("x-user", "1"),
        ];
        assert_eq!((left, client), (lines(&want), PEER));
    }

    #[test]
    fn so_many_entries_are_believed_from_the_right() {
        let said = [
            ("x-forwarded-for", "6.6.6.6, 198.51.100.7"),
            ("x-forwarded-for", "10.0.0.1"),
            ("forwarded", "for=6.6.6.6, for=198.51.100.7;host=\"a,b\""),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "shop.example"),
            ("traceparent", "t"),
            ("leeward-route", "r"),
        ];
        let (left, client) = settled(&said, 2);
        let own = "for=192.0.2.9;host=\"shop.example\";proto=https";
        let want = [
            (
                "forwarded",
                &*format!("for=6.6.6.6, for=198.51.100.7;host=\"a,b\", {own}"),
            ),
            ("traceparent", "t"),
            ("x-forwarded-for", "198.51.100.7, 10.0.0.1, 192.0.2.9"),
            ("x-forwarded-host", "shop.example"),
            ("x-forwarded-proto", "http"),
        ];
        assert_eq!((left, client), (lines(&want), "198.51.100.7".parse().unwrap()));
        // One fewer: what is before is not believed.
        let (left, client) = settled(&said, 1);
        assert_eq!(client, "10.0.0.1".parse::<IpAddr>().unwrap());
        assert!(left.contains(&(
            "forwarded".into(),
            format!("for=198.51.100.7;host=\"a,b\", {own}")
        )));
        // Fewer entries than proxies: who knows where it comes from.
        assert_eq!(settled(&[("x-forwarded-for", "10.0.0.1")], 2).1, PEER);
        assert_eq!(
            settled(&[("x-forwarded-proto", "gopher")], 1).0,
            settled(&[], 1).0
        );
    }

    #[test]
    fn addresses_are_read_in_every_usual_form() {
        for (entry, want) in [
            ("192.0.2.1", Some("192.0.2.1")),
            ("192.0.2.1:80", Some("192.0.2.1")),
            ("2001:db8::1", Some("2001:db8::1")),
            ("[2001:db8::1]", Some("2001:db8::1")),
            ("[2001:db8::1]:80", Some("2001:db8::1")),
            ("unknown", None),
            ("_hidden", None),
        ] {
            assert_eq!(address(entry), want.map(|want| want.parse().unwrap()), "{entry}");
        }
    }
}

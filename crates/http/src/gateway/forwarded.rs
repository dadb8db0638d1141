//! What a request says of the way that it has come (RFC 7239, and the X-Forwarded fields before it).

use crate::headers::{FORWARDED_FOR, FORWARDED_PROTO, is_ours};
use http::header::{self, HeaderName};
use http::{HeaderMap, HeaderValue};
use std::net::{IpAddr, SocketAddr};

/// Fields by which proxies tell each other where a request comes from; from anybody else they are made up. Proxies in
/// front that are believed vouch for those alone that are read here: what else a client says passes them as it is.
const ORIGIN: [&str; 3] = ["forwarded", "x-real-ip", "true-client-ip"];
const ORIGIN_PREFIXES: [&str; 2] = ["x-forwarded-", "x-envoy-"];
/// Fields that say which trace a request belongs to.
const TRACE: [&str; 5] = ["traceparent", "tracestate", "baggage", "b3", "grpc-trace-bin"];
const TRACE_PREFIX: &str = "x-b3-";

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
    let mut chain = last(lines(headers, &FORWARDED_FOR).flat_map(listed), hops);
    let mut told = last(lines(headers, &header::FORWARDED).flat_map(elements), hops);
    let proto = last(lines(headers, &FORWARDED_PROTO).flat_map(listed), 1).pop();
    let proto = proto.filter(|proto| hops > 0 && (proto == b"http" || proto == b"https"));
    let proto = proto.unwrap_or_else(|| scheme.into());
    let made_up: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_ours(name) || is_origin(name.as_str()) || hops == 0 && is_trace(name.as_str()))
        .cloned()
        .collect();
    for name in made_up {
        headers.remove(name);
    }
    let client = chain.first().filter(|_| chain.len() == hops);
    let client = client.and_then(|entry| address(entry)).unwrap_or(from);
    chain.push(from.to_string().into());
    put(headers, FORWARDED_FOR, &chain.join(&b", "[..]));
    put(headers, FORWARDED_PROTO, &proto);
    told.push(element(from, scheme, host).into());
    put(headers, header::FORWARDED, &told.join(&b", "[..]));
    client
}

fn is_origin(name: &str) -> bool {
    ORIGIN.contains(&name) || ORIGIN_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

fn is_trace(name: &str) -> bool {
    TRACE.contains(&name) || name.starts_with(TRACE_PREFIX)
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: &[u8]) {
    // What is in it was in fields before, or is an address.
    if let Ok(value) = HeaderValue::from_bytes(value) {
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

/// The last `count` entries, in their order, of all that come from the last to the first.
fn last<'a>(backwards: impl Iterator<Item = &'a [u8]>, count: usize) -> Vec<Vec<u8>> {
    let mut entries: Vec<Vec<u8>> = backwards.take(count).map(<[u8]>::to_vec).collect();
    entries.reverse();
    entries
}

/// The lines of a field, from the last to the first. As bytes: a line that is no text is one all the same, and were it passed
/// over, so would be what a proxy has put at its end.
fn lines<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    headers.get_all(name).iter().rev().map(HeaderValue::as_bytes)
}

/// The entries of a line of an X-Forwarded field, from the last to the first. Nothing can be quoted in it: every comma ends
/// one.
fn listed(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.rsplit(|byte| *byte == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|entry| !entry.is_empty())
}

/// The elements of a line of Forwarded, from the last to the first. A comma in a quoted text ends none. Read from the end,
/// since that is what proxies write: a quote that a client has left open before takes nothing of it in.
fn elements(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut quoted = false;
    let mut rest = Some(line);
    let elements = std::iter::from_fn(move || {
        let line = rest?;
        for (at, byte) in line.iter().enumerate().rev() {
            let (before, after) = line.split_at(at);
            match byte {
                b'"' if !(quoted && is_escaped(before)) => quoted = !quoted,
                b',' if !quoted => {
                    rest = Some(before);
                    return after.get(1..);
                }
                _ => {}
            }
        }
        rest = None;
        Some(line)
    });
    elements
        .map(<[u8]>::trim_ascii)
        .filter(|element| !element.is_empty())
}

/// Whether what follows on `before` in a quoted text is taken as it is (RFC 9110 §5.6.4).
fn is_escaped(before: &[u8]) -> bool {
    let backslashes = before.iter().rev().take_while(|byte| **byte == b'\\').count();
    backslashes % 2 == 1
}

/// The address in an entry, which may have a port beside it.
fn address(entry: &[u8]) -> Option<IpAddr> {
    let entry = std::str::from_utf8(entry).ok()?;
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

    fn told(lines: &[(&str, &str)]) -> Vec<(String, String)> {
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
        assert_eq!((left, client), (told(&want), PEER));
    }

    #[test]
    fn so_many_entries_are_believed_from_the_right() {
        let said = [
            ("x-forwarded-for", "6.6.6.6, 198.51.100.7"),
            ("x-forwarded-for", "10.0.0.1"),
            ("forwarded", "for=6.6.6.6, for=198.51.100.7;host=\"a,b\""),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "shop.example"),
            ("x-forwarded-port", "1"),
            ("x-real-ip", "6.6.6.6"),
            ("true-client-ip", "6.6.6.6"),
            ("x-envoy-external-address", "6.6.6.6"),
            ("traceparent", "t"),
            ("x-b3-sampled", "1"),
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
            ("x-b3-sampled", "1"),
            ("x-forwarded-for", "198.51.100.7, 10.0.0.1, 192.0.2.9"),
            ("x-forwarded-proto", "http"),
        ];
        assert_eq!((left, client), (told(&want), "198.51.100.7".parse().unwrap()));
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
    fn nothing_that_a_client_writes_hides_what_proxies_add() {
        let proxies = ["198.51.100.7", "10.0.0.1"].map(|ip| ip.parse::<IpAddr>().unwrap());
        for said in [
            &b"6.6.6.6, \""[..],
            b"\"",
            b"\"6.6.6.6",
            b"\\",
            b"\xff",
            b"6.6.6.6, \xff\"",
            b",,",
            b"",
        ] {
            let added = |name: &[u8], hops: usize| {
                let mut line = said.to_vec();
                for ip in proxies.iter().take(hops) {
                    line.extend([b", ", name, ip.to_string().as_bytes()].concat());
                }
                HeaderValue::from_bytes(&line).unwrap()
            };
            for hops in [1, 2] {
                let mut headers = HeaderMap::new();
                headers.insert(FORWARDED_FOR, added(b"", hops));
                headers.insert(header::FORWARDED, added(b"for=", hops));
                let client = settle(&mut headers, hops, PEER, "https", None);
                assert_eq!(client, proxies[0], "{said:?}");
                let (listed, told) = match hops {
                    1 => ("198.51.100.7, 192.0.2.9", "for=198.51.100.7, "),
                    _ => (
                        "198.51.100.7, 10.0.0.1, 192.0.2.9",
                        "for=198.51.100.7, for=10.0.0.1, ",
                    ),
                };
                assert_eq!(headers[FORWARDED_FOR], listed, "{said:?}");
                let told = format!("{told}for=192.0.2.9;proto=https");
                assert_eq!(headers[header::FORWARDED], told, "{said:?}");
            }
        }
    }

    #[test]
    fn elements_end_at_commas_that_nobody_has_quoted() {
        for (line, want) in [
            ("for=a, for=b", &["for=b", "for=a"][..]),
            (
                "for=\"a,b\";host=\"c\",for=d",
                &["for=d", "for=\"a,b\";host=\"c\""],
            ),
            ("host=\"a\\\",b\", for=c", &["for=c", "host=\"a\\\",b\""]),
            ("host=\"a\\\\\", for=c", &["for=c", "host=\"a\\\\\""]),
            (" , ", &[]),
        ] {
            let found: Vec<_> = elements(line.as_bytes()).collect();
            let want: Vec<_> = want.iter().map(|element| element.as_bytes()).collect();
            assert_eq!(found, want, "{line}");
        }
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
            assert_eq!(
                address(entry.as_bytes()),
                want.map(|want| want.parse().unwrap()),
                "{entry}"
            );
        }
    }
}

//! Heads and trailers as bytes.

use crate::frame::{MAX_FIELDS, MAX_HEAD, Violation};
use crate::varint;
use bytes::{Buf, Bytes, BytesMut};
use http::header::{self, CONTENT_LENGTH, HeaderName};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, request, response};

/// Bit of a head's flags: nothing follows, not even an empty body.
const END: u64 = 1;

/// What the peer takes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Limits {
    pub(crate) head: usize,
    pub(crate) fields: usize,
}

impl Limits {
    pub(crate) const OURS: Self = Self {
        head: MAX_HEAD,
        fields: MAX_FIELDS,
    };
}

/// Appends a request's head.
pub(crate) fn put_request(
    buf: &mut BytesMut,
    head: &request::Parts,
    end: bool,
    limits: Limits,
) -> Result<(), Violation> {
    let start = buf.len();
    varint::put(buf, if end { END } else { 0 });
    put_text(buf, head.method.as_str().as_bytes());
    // HTTP/1.1 has it in a field.
    let authority = match (head.uri.authority(), head.headers.get(header::HOST)) {
        (Some(authority), _) => authority.as_str().as_bytes(),
        (None, Some(host)) => host.as_bytes(),
        (None, None) => b"",
    };
    put_text(buf, authority);
    put_text(
        buf,
        head.uri
            .path_and_query()
            .map_or("/", PathAndQuery::as_str)
            .as_bytes(),
    );
    put_fields(buf, start, &head.headers, limits)
}

/// Appends an answer's head.
pub(crate) fn put_response(
    buf: &mut BytesMut,
    head: &response::Parts,
    end: bool,
    limits: Limits,
) -> Result<(), Violation> {
    let start = buf.len();
    varint::put(buf, if end { END } else { 0 });
    varint::put(buf, u64::from(head.status.as_u16()));
    put_fields(buf, start, &head.headers, limits)
}

/// Appends the fields after a body.
pub(crate) fn put_trailers(buf: &mut BytesMut, fields: &HeaderMap, limits: Limits) -> Result<(), Violation> {
    let start = buf.len();
    put_fields(buf, start, fields, limits)
}

fn put_fields(buf: &mut BytesMut, start: usize, fields: &HeaderMap, limits: Limits) -> Result<(), Violation> {
    bound("fields", fields.len(), limits.fields)?;
    for (name, value) in fields {
        if is_for_one_hop(name) {
            continue;
        }
        put_text(buf, name.as_str().as_bytes());
        put_text(buf, value.as_bytes());
    }
    bound("a head", buf.len() - start, limits.head)
}

/// Fields that HTTP/1.1 has for a connection, and Host, which has a place of its own here.
fn is_for_one_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "host" | "connection" | "transfer-encoding" | "upgrade" | "keep-alive" | "proxy-connection"
    )
}

fn put_text(buf: &mut BytesMut, text: &[u8]) {
    varint::put(buf, text.len() as u64);
    buf.extend_from_slice(text);
}

fn bound(what: &'static str, got: usize, limit: usize) -> Result<(), Violation> {
    if got <= limit {
        return Ok(());
    }
    Err(Violation::TooLarge {
        what,
        got: got as u64,
        limit: limit as u64,
    })
}

/// A request's head, and whether that is all.
pub(crate) fn request(mut payload: Bytes) -> Result<(request::Parts, bool), Violation> {
    let flags = number(&mut payload, "flags")?;
    let method = text(&mut payload, "method")?;
    let method = Method::from_bytes(&method).map_err(|_| malformed("method", "no token"))?;
    let authority = text(&mut payload, "authority")?;
    let path = text(&mut payload, "path")?;
    let path = PathAndQuery::from_maybe_shared(path).map_err(|_| malformed("path", "no path"))?;
    let mut uri = http::uri::Parts::default();
    if !authority.is_empty() {
        let authority = Authority::from_maybe_shared(authority)
            .map_err(|_| malformed("authority", "no host with an optional port"))?;
        uri.scheme = Some(Scheme::HTTP);
        uri.authority = Some(authority);
    }
    uri.path_and_query = Some(path);
    let uri = Uri::from_parts(uri).map_err(|_| malformed("path", "no target"))?;
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.method = method;
    parts.uri = uri;
    parts.version = Version::HTTP_2;
    parts.headers = fields(payload)?;
    Ok((parts, flags & END != 0))
}

/// An answer's head, and whether that is all.
pub(crate) fn response(mut payload: Bytes) -> Result<(response::Parts, bool), Violation> {
    let flags = number(&mut payload, "flags")?;
    let status = number(&mut payload, "status")?;
    let status = u16::try_from(status)
        .ok()
        .filter(|status| *status >= 200)
        .and_then(|status| StatusCode::from_u16(status).ok())
        .ok_or_else(|| malformed("status", "no final status of HTTP"))?;
    let (mut parts, ()) = Response::new(()).into_parts();
    parts.status = status;
    parts.version = Version::HTTP_2;
    parts.headers = fields(payload)?;
    Ok((parts, flags & END != 0))
}

/// The fields that fill the rest of a payload.
pub(crate) fn fields(mut payload: Bytes) -> Result<HeaderMap, Violation> {
    // As many as a usual request has, so that the map need not grow.
    let mut fields = HeaderMap::with_capacity(16);
    let mut count = 0;
    while !payload.is_empty() {
        count += 1;
        bound("fields", count, MAX_FIELDS)?;
        let name = text(&mut payload, "field name")?;
        // HTTP/2's own fields, the ones that are for one hop, and upper case have no place here.
        let name =
            HeaderName::from_lowercase(&name).map_err(|_| malformed("field name", "no lower-case token"))?;
        if is_for_one_hop(&name) {
            return Err(malformed("field name", "for one hop only"));
        }
        let value = text(&mut payload, "field value")?;
        let value =
            HeaderValue::from_maybe_shared(value).map_err(|_| malformed("field value", "no text of HTTP"))?;
        fields
            .try_append(name, value)
            .map_err(|_| malformed("fields", "more than can be kept"))?;
    }
    Ok(fields)
}

/// What content-length says, if there is one that can be read.
pub(crate) fn length(fields: &HeaderMap) -> Result<Option<u64>, Violation> {
    let Some(value) = fields.get(CONTENT_LENGTH) else {
        return Ok(None);
    };
    let text = value
        .to_str()
        .ok()
        .filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
    let length = text.and_then(|text| text.parse().ok());
    length
        .map(Some)
        .ok_or_else(|| malformed("content-length", "no number"))
}

/// The next integer of a payload.
pub(crate) fn number(payload: &mut Bytes, part: &'static str) -> Result<u64, Violation> {
    let (value, taken) = varint::get(payload).ok_or_else(|| malformed(part, "cut off"))?;
    payload.advance(taken);
    Ok(value)
}

/// The next text of a payload: a length and that many bytes.
pub(crate) fn text(payload: &mut Bytes, part: &'static str) -> Result<Bytes, Violation> {
    let len = number(payload, part)?;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > payload.len() {
        return Err(malformed(part, "cut off"));
    }
    Ok(payload.split_to(len))
}

pub(crate) fn malformed(part: &'static str, fault: &'static str) -> Violation {
    Violation::Malformed { part, fault }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers() -> impl Strategy<Value = HeaderMap> {
        prop::collection::vec(("[a-z][a-z0-9-]{0,20}", "[ -~]{0,40}"), 0..20).prop_map(|all| {
            let mut map = HeaderMap::new();
            for (name, value) in all {
                map.append(
                    HeaderName::try_from(name).unwrap(),
                    HeaderValue::try_from(value).unwrap(),
                );
            }
            map
        })
    }

    proptest! {
        #[test]
        fn a_request_stays_itself(
            method in "[A-Z]{1,10}",
            authority in "([a-z]{1,20}(:[1-9][0-9]{0,3})?)?",
            path in "/[a-z0-9/._~%-]{0,40}([?][a-z=&]{0,20})?",
            headers in headers(),
            end in any::<bool>(),
        ) {
            let uri = if authority.is_empty() { path } else { format!("http://{authority}{path}") };
            let sent = Request::builder().method(&*method).uri(&uri).version(Version::HTTP_2).body(()).unwrap();
            let (mut want, ()) = sent.into_parts();
            want.headers = headers;
            let mut buf = BytesMut::new();
            put_request(&mut buf, &want, end, Limits::OURS).unwrap();
            let (got, ended) = request(buf.freeze()).unwrap();
            prop_assert_eq!(&got.method, &want.method);
            prop_assert_eq!(got.uri, want.uri);
            prop_assert_eq!(got.headers, want.headers);
            prop_assert_eq!(ended, end);
        }

        #[test]
        fn an_answer_stays_itself(status in 200..1000u16, headers in headers(), end in any::<bool>()) {
            let (mut want, ()) = Response::builder().status(status).body(()).unwrap().into_parts();
            want.headers = headers;
            let mut buf = BytesMut::new();
            put_response(&mut buf, &want, end, Limits::OURS).unwrap();
            let (got, ended) = response(buf.freeze()).unwrap();
            prop_assert_eq!(got.status, want.status);
            prop_assert_eq!(got.headers, want.headers);
            prop_assert_eq!(ended, end);
        }

        #[test]
        fn any_bytes_are_a_head_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let bytes = Bytes::from(bytes);
            let _ = request(bytes.clone());
            let _ = response(bytes.clone());
            let _ = fields(bytes);
        }
    }

    #[test]
    fn what_is_no_http_is_named() {
        let part = |all: &[(&str, &str)]| {
            let mut buf = BytesMut::new();
            for (name, value) in all {
                put_text(&mut buf, name.as_bytes());
                put_text(&mut buf, value.as_bytes());
            }
            fields(buf.freeze()).unwrap_err().to_string()
        };
        assert_eq!(part(&[(":path", "/")]), "field name that is no lower-case token");
        assert_eq!(part(&[("Host", "a")]), "field name that is no lower-case token");
        assert_eq!(part(&[("a", "b\nc")]), "field value that is no text of HTTP");
        let many = vec![("a", "b"); MAX_FIELDS + 1];
        assert_eq!(part(&many), "fields of 2081, want at most 2080");
        let mut cut = BytesMut::new();
        varint::put(&mut cut, 5);
        assert_eq!(
            fields(cut.freeze()).unwrap_err().to_string(),
            "field name that is cut off"
        );
    }

    #[test]
    fn a_head_of_http_1_is_put_as_one_of_http_2() {
        let sent = Request::builder()
            .uri("/a?b")
            .header("host", "shop:80")
            .header("connection", "keep-alive")
            .header("transfer-encoding", "chunked")
            .header("x", "1");
        let (head, ()) = sent.body(()).unwrap().into_parts();
        let mut buf = BytesMut::new();
        put_request(&mut buf, &head, true, Limits::OURS).unwrap();
        let (got, _) = request(buf.freeze()).unwrap();
        assert_eq!(got.uri, "http://shop:80/a?b");
        assert_eq!(got.version, Version::HTTP_2);
        assert_eq!(got.headers.len(), 1);
        let mut buf = BytesMut::new();
        put_text(&mut buf, b"connection");
        put_text(&mut buf, b"close");
        assert!(fields(buf.freeze()).is_err());
    }

    #[test]
    fn a_head_that_the_peer_would_not_take_is_not_sent() {
        let (mut head, ()) = Request::new(()).into_parts();
        head.headers
            .insert("a", HeaderValue::from_bytes(&vec![b'x'; MAX_HEAD]).unwrap());
        let error = put_request(&mut BytesMut::new(), &head, true, Limits::OURS).unwrap_err();
        assert!(
            matches!(error, Violation::TooLarge { what: "a head", .. }),
            "{error}"
        );
    }
}

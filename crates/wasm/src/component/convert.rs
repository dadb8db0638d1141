//! Between the contract's words and HTTP's. What a plugin may answer is valid HTTP, and nothing that frames a message or is
//! the mesh's to say.

use super::bindings::fallback::leeward::plugin::types::{Header, Response};
use super::bindings::first::leeward::plugin::types as first;
use crate::call::Reply;
use bytes::Bytes;
use http::header::AsHeaderName;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

/// Bytes of all names and values together.
pub(crate) const MAX_HEADERS: usize = 64 << 10;
/// Fields of what a plugin makes.
const MAX_FIELDS: usize = 1024;
/// Bytes of a body.
pub(crate) const MAX_BODY: usize = 1 << 20;

/// All values of a field.
pub(crate) fn values(headers: &HeaderMap, name: impl AsHeaderName) -> Vec<Vec<u8>> {
    headers
        .get_all(name)
        .iter()
        .map(|value| value.as_bytes().to_vec())
        .collect()
}

/// All fields.
pub(crate) fn headers(headers: &HeaderMap) -> Vec<Header> {
    headers
        .iter()
        .map(|(name, value)| Header {
            name: name.as_str().to_owned(),
            value: value.as_bytes().to_vec(),
        })
        .collect()
}

/// An answer, for a plugin to see.
pub(crate) fn response(reply: &Reply) -> Response {
    Response {
        status: reply.status.as_u16(),
        headers: headers(&reply.headers),
        body: reply.body.to_vec(),
    }
}

/// Fields that a plugin has made.
///
/// # Errors
///
/// What is wrong with them.
pub(crate) fn fields(headers: Vec<Header>) -> Result<HeaderMap, String> {
    let size: usize = headers.iter().map(|h| h.name.len() + h.value.len()).sum();
    if size > MAX_HEADERS {
        return Err(format!(
            "the headers have {size} bytes; want at most {MAX_HEADERS}"
        ));
    }
    if headers.len() > MAX_FIELDS {
        return Err(format!(
            "there are {} headers; want at most {MAX_FIELDS}",
            headers.len()
        ));
    }
    let mut fields = HeaderMap::with_capacity(headers.len());
    for Header { name, value } in headers {
        let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else {
            return Err(format!("{name:?} is not a header name"));
        };
        if !leeward_policy::may_be_in_an_answer(name.as_str()) {
            return Err(format!("the header {name} is the proxy's to set"));
        }
        let Ok(value) = HeaderValue::from_maybe_shared(Bytes::from(value)) else {
            return Err(format!("the value of {name} has a control character"));
        };
        fields.append(name, value);
    }
    Ok(fields)
}

/// A status that an answer may have.
pub(crate) fn status(status: u16) -> Option<StatusCode> {
    let valid = (200..=599).contains(&status);
    valid.then(|| StatusCode::from_u16(status).ok()).flatten()
}

/// An answer that a plugin has made.
///
/// # Errors
///
/// What is wrong with it.
pub(crate) fn reply(response: Response) -> Result<Reply, String> {
    let Some(status) = status(response.status) else {
        return Err(format!(
            "status {} is out of range; want 200 to 599",
            response.status
        ));
    };
    if response.body.len() > MAX_BODY {
        return Err(format!(
            "the body has {} bytes; want at most {MAX_BODY}",
            response.body.len()
        ));
    }
    Ok(Reply {
        status,
        headers: fields(response.headers)?,
        body: response.body.into(),
        grpc_status: None,
    })
}

impl From<first::Response> for Response {
    fn from(response: first::Response) -> Self {
        let headers = response.headers.into_iter().map(|h| Header {
            name: h.name,
            value: h.value,
        });
        Self {
            status: response.status,
            headers: headers.collect(),
            body: response.body,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, value: &[u8]) -> Header {
        Header {
            name: name.to_owned(),
            value: value.to_vec(),
        }
    }

    #[test]
    fn what_frames_a_message_or_ends_a_line_is_refused() {
        for (name, value) in [
            ("content-length", &b"5"[..]),
            ("Transfer-Encoding", b"chunked"),
            ("connection", b"close"),
            ("leeward-reason", b"x"),
            ("a b", b"x"),
            ("", b"x"),
            (":status", b"200"),
            ("x", b"a\r\nset-cookie: b"),
            ("x", b"a\0"),
        ] {
            assert!(fields(vec![header(name, value)]).is_err(), "{name:?}");
        }
        let good = fields(vec![header("X-A", b"\xff\t"), header("x-a", b"2")]).unwrap();
        assert_eq!(values(&good, "x-a"), [b"\xff\t".to_vec(), b"2".to_vec()]);
    }

    #[test]
    fn headers_are_bounded_in_bytes_and_in_number() {
        let many = |n: usize| (0..n).map(|_| header("a", b"")).collect();
        assert!(fields(many(MAX_FIELDS)).is_ok());
        assert!(fields(many(MAX_FIELDS + 1)).is_err());
        assert!(fields(vec![header("a", &[b'a'; MAX_HEADERS - 1])]).is_ok());
        assert!(fields(vec![header("a", &[b'a'; MAX_HEADERS])]).is_err());
    }
}

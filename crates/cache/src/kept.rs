//! What the cache gives.

use crate::asked::Asked;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use std::time::SystemTime;

/// Fields that a 304 has of the answer that it stands for (RFC 9110 §15.4.5), and how old that is.
const NOT_MODIFIED: [header::HeaderName; 7] = [
    header::AGE,
    header::CACHE_CONTROL,
    header::CONTENT_LOCATION,
    header::DATE,
    header::ETAG,
    header::EXPIRES,
    header::VARY,
];

/// An answer from the cache.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Its status.
    pub status: StatusCode,
    /// Its fields, without those for one hop, with `Age`, and with the `Content-Length` that a GET has.
    pub headers: HeaderMap,
    /// Its body; empty for HEAD.
    pub body: Bytes,
}

impl Kept {
    /// Whether the client that asked has this already: its `If-None-Match` or, without that, its
    /// `If-Modified-Since` says so (RFC 9110 §13.2.2). Then it gets [`Kept::into_not_modified`].
    pub fn not_modified(&self, asked: &Asked<'_>) -> bool {
        if self.status != StatusCode::OK {
            return false;
        }
        let mut wanted = asked.headers.get_all(header::IF_NONE_MATCH).iter().peekable();
        if wanted.peek().is_some() {
            let tag = self.headers.get(header::ETAG).map(HeaderValue::as_bytes);
            return wanted.any(|list| lists(list.as_bytes(), tag));
        }
        let since = asked.headers.get(header::IF_MODIFIED_SINCE).and_then(date);
        let modified = self.headers.get(header::LAST_MODIFIED).and_then(date);
        modified.is_some_and(|modified| since.is_some_and(|since| modified <= since))
    }

    /// The 304 in its place.
    pub fn into_not_modified(mut self) -> Self {
        let mut headers = HeaderMap::with_capacity(NOT_MODIFIED.len());
        for name in NOT_MODIFIED {
            for value in self.headers.get_all(&name) {
                headers.append(&name, value.clone());
            }
        }
        self.status = StatusCode::NOT_MODIFIED;
        self.headers = headers;
        self.body = Bytes::new();
        self
    }
}

/// A date of HTTP, in any of its three forms.
pub(crate) fn date(value: &HeaderValue) -> Option<SystemTime> {
    httpdate::parse_http_date(value.to_str().ok()?).ok()
}

/// Whether an If-None-Match lists a tag, or is for any. Tags may have commas, so that the list isn't split at them.
fn lists(list: &[u8], tag: Option<&[u8]>) -> bool {
    if list.trim_ascii() == b"*" {
        return true;
    }
    let Some(tag) = tag.and_then(opaque) else {
        return false;
    };
    // In a list of quoted tags, every second part is inside quotes.
    list.split(|&byte| byte == b'"')
        .skip(1)
        .step_by(2)
        .any(|listed| listed == tag)
}

/// What is between the quotes of a tag. Weak and strong ones are compared alike (RFC 9110 §8.8.3.2).
pub(crate) fn opaque(tag: &[u8]) -> Option<&[u8]> {
    let tag = tag.trim_ascii();
    let tag = tag.strip_prefix(b"W/").unwrap_or(tag);
    tag.strip_prefix(b"\"")?.strip_suffix(b"\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Method, Uri};

    fn is_not_modified(kept: &[(&'static str, &str)], asked: &[(&'static str, &str)]) -> bool {
        let fields = |fields: &[(&'static str, &str)]| {
            fields
                .iter()
                .map(|(name, value)| {
                    let name = header::HeaderName::from_static(name);
                    (name, HeaderValue::from_str(value).unwrap())
                })
                .collect::<HeaderMap>()
        };
        let kept = Kept {
            status: StatusCode::OK,
            headers: fields(kept),
            body: Bytes::new(),
        };
        kept.not_modified(&Asked {
            method: &Method::GET,
            authority: "a",
            uri: &Uri::from_static("/"),
            headers: &fields(asked),
        })
    }

    #[test]
    fn tags_come_before_dates() {
        let kept = [
            ("etag", "\"a,b\""),
            ("last-modified", "Sun, 06 Nov 1994 08:49:37 GMT"),
        ];
        for (asked, expected) in [
            (&[("if-none-match", "\"a,b\"")][..], true),
            (&[("if-none-match", "W/\"a,b\"")], true),
            (&[("if-none-match", "\"x\", \"a,b\", \"y\"")], true),
            (&[("if-none-match", "*")], true),
            (&[("if-none-match", "\"x\"")], false),
            (&[("if-none-match", "a,b")], false),
            (
                &[
                    ("if-none-match", "\"x\""),
                    ("if-modified-since", "Sun, 06 Nov 1994 08:49:37 GMT"),
                ],
                false,
            ),
            (&[("if-modified-since", "Sun, 06 Nov 1994 08:49:37 GMT")], true),
            (&[("if-modified-since", "Sunday, 06-Nov-94 08:49:38 GMT")], true),
            (&[("if-modified-since", "Sun, 06 Nov 1994 08:49:36 GMT")], false),
            (&[("if-modified-since", "yesterday")], false),
            (&[], false),
        ] {
            assert_eq!(is_not_modified(&kept, asked), expected, "{asked:?}");
        }
        assert!(!is_not_modified(&[], &[("if-none-match", "\"a\"")]));
    }
}

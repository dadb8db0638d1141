//! Texts that go into, or are compared with, HTTP messages.

use crate::field::Fields;
use leeward_policy::may_be_in_an_answer;

const KIB: usize = 1 << 10;

pub(super) fn path_text<'a>(f: &mut Fields, path: &str, text: &'a str) -> Option<&'a str> {
    let plain = |b: u8| b.is_ascii_graphic() && b != b'?' && b != b'#';
    if text.starts_with('/') && text.len() <= 4096 && text.bytes().all(plain) {
        return Some(text);
    }
    f.reject(path, format!("{text:?} is not a path; want one that begins with '/', of at most 4096 bytes, without query and spaces"))
}

pub(super) fn header_name(f: &mut Fields, path: &str, text: &str) -> Option<Box<str>> {
    if is_token(text) && text.len() <= 256 {
        return Some(text.to_ascii_lowercase().into());
    }
    f.reject(
        path,
        format!("{text:?} is not a header name; want one such as x-user"),
    )
}

pub(super) fn header_value<'a>(f: &mut Fields, path: &str, text: &'a str) -> Option<&'a str> {
    let visible = |b: u8| (b' '..=b'~').contains(&b) || b == b'\t' || b >= 0x80;
    if text.len() <= 8 * KIB && text.bytes().all(visible) && text.trim() == text {
        return Some(text);
    }
    f.reject(path, "is not a header value; want at most 8 KiB with no line breaks, no control characters and no spaces at its ends")
}

/// RFC 9110 §5.6.2.
pub(super) fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// The name of a header that a client or a workload sets and policy goes by, lower case. What frames the
/// message, and what the mesh says of itself, is nothing to go by.
pub(super) fn key_header(f: &mut Fields, path: &str, text: &str) -> Option<Box<str>> {
    let name = header_name(f, path, text)?;
    if !may_be_in_an_answer(&name) {
        return f.reject(
            path,
            format!("{name} is set by the proxy; want a header that callers set, such as x-user"),
        );
    }
    Some(name)
}

/// [`key_header`], or nothing.
pub(super) fn optional_key_header(f: &mut Fields, path: &str, text: &str) -> Option<Box<str>> {
    if text.is_empty() {
        None
    } else {
        key_header(f, path, text)
    }
}

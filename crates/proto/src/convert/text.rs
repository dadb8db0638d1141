//! Texts that go into, or are compared with, HTTP messages.

use crate::field::Fields;
use leeward_policy::may_be_in_an_answer;
use leeward_policy::model::{Piece, Template, TemplateField};
use std::net::Ipv6Addr;

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
    if text.len() <= 8 * KIB && text.bytes().all(visible) && text.trim() == text {
        return Some(text);
    }
    bad_header_value(f, path)
}

fn bad_header_value<T>(f: &mut Fields, path: &str) -> Option<T> {
    f.reject(path, "is not a header value; want at most 8 KiB with no line breaks, no control characters and no spaces at its ends")
}

const fn visible(b: u8) -> bool {
    matches!(b, b' '..=b'~' | b'\t' | 0x80..)
}

/// A text with places for what a request has.
pub(super) fn template(f: &mut Fields, path: &str, text: &str) -> Option<Template> {
    match Template::parse(text) {
        Ok(template) => Some(template),
        Err(error) => f.reject(path, error),
    }
}

/// A template whose fixed parts may stand in a header's value; what a request has is looked at when it is put in.
pub(super) fn header_template(f: &mut Fields, path: &str, text: &str) -> Option<Template> {
    let template = template(f, path, text)?;
    // The ends are looked at in the source, where a place has its own first and last character.
    let fixed = template.pieces().iter().all(|piece| match piece {
        Piece::Text(text) => text.bytes().all(visible),
        Piece::Field(_) => true,
    });
    if text.len() <= 8 * KIB && fixed && text.trim() == text {
        return Some(template);
    }
    bad_header_value(f, path)
}

/// Where a client is sent: a path or a URL, whose place is not for the request to say.
pub(super) fn location(f: &mut Fields, path: &str, text: &str) -> Option<Template> {
    if text.is_empty() {
        return f.reject(
            path,
            "is missing; want a path or a URL, such as https://status.example/",
        );
    }
    let template = template(f, path, text)?;
    // RFC 3986 §2: reserved, unreserved, and the percent sign of what is encoded.
    let uri = |b: u8| b.is_ascii_alphanumeric() || b"-._~:/?#[]@!$&'()*+,;=%".contains(&b);
    let fixed = template.pieces().iter().all(|piece| match piece {
        Piece::Text(text) => text.bytes().all(uri),
        Piece::Field(_) => true,
    });
    if text.len() > 8 * KIB || !fixed {
        return f.reject(
            path,
            format!(
                "{:?} is not a path or a URL; want at most 8 KiB of the characters that a URL has, others percent-encoded",
                text.chars().take(80).collect::<String>()
            ),
        );
    }
    let (first, next) = (template.pieces().first(), template.pieces().get(1));
    // What may come right after the host, or the beginning of a path, without being taken for a part of the host.
    let (ends, path_is_next) = (next.is_none(), next == Some(&Piece::Field(TemplateField::Path)));
    let leads = match first {
        Some(Piece::Text(start)) => {
            let url = ["http://", "https://"].iter().find_map(|s| start.strip_prefix(s));
            match (url, start.strip_prefix('/')) {
                (Some(host), _) => {
                    !host.starts_with(['/', '?', '#'])
                        && !host.is_empty()
                        && (ends || path_is_next || host.contains(['/', '?', '#']))
                }
                // Two slashes would begin a host.
                (None, Some(path)) => !path.starts_with('/') && (ends || !path.is_empty()),
                (None, None) => false,
            }
        }
        Some(Piece::Field(_)) | None => false,
    };
    if leads {
        return Some(template);
    }
    f.reject(
        path,
        format!(
            "{text:?} leaves open where it leads; want one that begins with /PATH, http://HOST/ or https://HOST/"
        ),
    )
}

/// The name of a method.
pub(super) fn method<'a>(f: &mut Fields, path: &str, text: &'a str) -> Option<&'a str> {
    if is_token(text) && !text.bytes().any(|b| b.is_ascii_lowercase()) && text.len() <= 32 {
        return Some(text);
    }
    f.reject(
        path,
        format!("{text:?} is not a method; want upper case, such as GET"),
    )
}

/// A file on every node.
pub(super) fn absolute_path<'a>(f: &mut Fields, path: &str, text: &'a str, such_as: &str) -> Option<&'a str> {
    if text.starts_with('/') && text.len() <= 4096 && !text.contains('\0') {
        return Some(text);
    }
    f.reject(
        path,
        format!("{text:?} is not an absolute path, such as {such_as}"),
    )
}

/// A text of bounded size.
pub(super) fn bounded(f: &mut Fields, path: &str, text: &str, most: usize) {
    if text.len() > most {
        f.reject::<()>(path, format!("is {} bytes long; want at most {most}", text.len()));
    }
}

/// Labels of letters, digits, '-' and '_', set apart by dots.
pub(super) fn is_host(text: &str) -> bool {
    let label_ok = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(label_ok)
}

/// A host, without the brackets of an IPv6 address, and its port if it has one.
pub(super) fn authority(text: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        Some(_) | None => (text, None),
    };
    let port = match port {
        None => None,
        // A sign is no part of a port, though it can be parsed.
        Some(port) if !port.bytes().all(|b| b.is_ascii_digit()) => return None,
        Some(port) => Some(port.parse::<u16>().ok().filter(|port| *port != 0)?),
    };
    match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok().then_some((address, port)),
        None => is_host(host).then_some((host, port)),
    }
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

//! Templates of answers, filled in with what a request has.

use crate::admit::Received;
use crate::exchange::Exchange;
use leeward_policy::model::{Cause, Piece, Template, TemplateField};
use std::borrow::Cow;
use std::fmt::Write as _;

/// How values are written, so that a request can't say more than a value.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Escape {
    /// As they are.
    Nothing,
    /// Inside a JSON text.
    Json,
    /// Inside HTML's text or a quoted attribute.
    Html,
    /// Inside a URI (RFC 3986 §2.3: all but the unreserved, and `/` where it can't end a component).
    Uri,
    /// Where a path or a query stands in a URI: what may be there is kept, and what is encoded already.
    Kept,
    /// Inside a header's value: what isn't visible ASCII is left out.
    Header,
}

impl Escape {
    /// How a body of this type wants it.
    pub(crate) fn of_type(content_type: Option<&str>) -> Self {
        let essence = content_type.and_then(|t| t.split(';').next()).map(str::trim);
        match essence.map(str::to_ascii_lowercase).as_deref() {
            Some(
                "text/html" | "application/xhtml+xml" | "text/xml" | "application/xml" | "image/svg+xml",
            ) => Self::Html,
            Some("application/json") => Self::Json,
            Some(other) if other.ends_with("+json") => Self::Json,
            Some(other) if other.ends_with("+xml") => Self::Html,
            Some(_) | None => Self::Nothing,
        }
    }
}

/// A template with everything filled in.
pub(crate) fn fill(
    template: &Template,
    exchange: &Exchange,
    request: &Received,
    cause: Cause,
    escape: Escape,
) -> String {
    if let Some(fixed) = template.as_fixed() {
        return fixed.to_owned();
    }
    let mut out = String::new();
    for piece in template.pieces() {
        match piece {
            Piece::Text(text) => out.push_str(text),
            Piece::Field(field) => write(&mut out, &value(field, exchange, request, cause), escape),
        }
    }
    out
}

/// A template of where a client is sent. A path within the path and a query at the start of the query are what they
/// are in the request, so that a client can be sent on as it came; every other value is percent-encoded whole.
pub(crate) fn locate(template: &Template, exchange: &Exchange, request: &Received, cause: Cause) -> String {
    if let Some(fixed) = template.as_fixed() {
        return fixed.to_owned();
    }
    let mut out = String::new();
    for piece in template.pieces() {
        match piece {
            Piece::Text(text) => out.push_str(text),
            Piece::Field(field) => {
                let escape = in_place(field, &out);
                write(&mut out, &value(field, exchange, request, cause), escape);
            }
        }
    }
    out
}

/// How a value is written behind what is there of a location.
fn in_place(field: &TemplateField, before: &str) -> Escape {
    match field {
        TemplateField::Path if !before.contains(['?', '#']) => Escape::Kept,
        TemplateField::Query if before.ends_with('?') && before.matches('?').count() == 1 => Escape::Kept,
        TemplateField::Method
        | TemplateField::Path
        | TemplateField::Query
        | TemplateField::Host
        | TemplateField::Header(_)
        | TemplateField::Cause
        | TemplateField::Route
        | TemplateField::Service
        | TemplateField::Zone => Escape::Uri,
    }
}

fn value<'a>(
    field: &TemplateField,
    exchange: &'a Exchange,
    request: &'a Received,
    cause: Cause,
) -> Cow<'a, str> {
    let uri = &request.parts.uri;
    let record = &exchange.record;
    match field {
        TemplateField::Method => Cow::Borrowed(request.parts.method.as_str()),
        TemplateField::Path => Cow::Borrowed(uri.path()),
        TemplateField::Query => Cow::Borrowed(uri.query().unwrap_or_default()),
        TemplateField::Host => request.host(),
        TemplateField::Header(name) => {
            let value = request.parts.headers.get(&**name);
            value.map_or(Cow::Borrowed(""), |value| {
                String::from_utf8_lossy(value.as_bytes())
            })
        }
        TemplateField::Cause => Cow::Borrowed(cause.as_str()),
        TemplateField::Route => Cow::Borrowed(record.route.as_deref().unwrap_or_default()),
        TemplateField::Service => Cow::Borrowed(record.service.as_deref().unwrap_or_default()),
        TemplateField::Zone => Cow::Owned(exchange.worker().zone.to_string()),
    }
}

fn write(out: &mut String, value: &str, escape: Escape) {
    match escape {
        Escape::Nothing => out.push_str(value),
        Escape::Json => {
            let quoted = serde_json::Value::from(value).to_string();
            out.push_str(quoted.get(1..quoted.len() - 1).unwrap_or_default());
        }
        Escape::Html => {
            for c in value.chars() {
                match c {
                    '&' => out.push_str("&amp;"),
                    '<' => out.push_str("&lt;"),
                    '>' => out.push_str("&gt;"),
                    '"' => out.push_str("&quot;"),
                    '\'' => out.push_str("&#39;"),
                    other => out.push(other),
                }
            }
        }
        Escape::Uri => percent_encode(out, value, |byte, _| b"-._~/".contains(&byte)),
        // RFC 3986 §3.3 and §3.4.
        Escape::Kept => percent_encode(out, value, |byte, rest| match byte {
            b'%' => matches!(rest, [a, b, ..] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit()),
            other => b"-._~/!$&'()*+,;=:@?".contains(&other),
        }),
        Escape::Header => out.extend(value.chars().filter(|c| matches!(c, ' '..='~'))),
    }
}

/// Percent-encodes all but letters, digits, and what `keep` says of a byte and those behind it.
fn percent_encode(out: &mut String, value: &str, keep: impl Fn(u8, &[u8]) -> bool) {
    let mut rest = value.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        if byte.is_ascii_alphanumeric() || keep(byte, behind) {
            out.push(byte.into());
        } else {
            // Writing to a string can't fail.
            let _ = write!(out, "%{byte:02X}");
        }
        rest = behind;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(escape: Escape, value: &str, want: &str) {
        let mut out = String::new();
        write(&mut out, value, escape);
        assert_eq!(out, want, "{escape:?}");
    }

    #[test]
    fn a_value_cannot_leave_its_place() {
        check(Escape::Json, "a\"b\\\n</script>", "a\\\"b\\\\\\n</script>");
        check(
            Escape::Html,
            "<a href='x'>&\"",
            "&lt;a href=&#39;x&#39;&gt;&amp;&quot;",
        );
        check(Escape::Uri, "/a b?c=\u{e9}#%", "/a%20b%3Fc%3D%C3%A9%23%25");
        check(Escape::Kept, "/a%20b?c=\u{e9}#%zz%", "/a%20b?c=%C3%A9%23%25zz%25");
        check(Escape::Header, "a\r\nx: y\u{e9}", "ax: y");
        check(Escape::Nothing, "a\"<", "a\"<");
    }

    #[test]
    fn paths_and_queries_are_kept_where_their_like_stands() {
        let (path, query) = (TemplateField::Path, TemplateField::Query);
        for (field, before, want) in [
            (&path, "https://a.example", Escape::Kept),
            (&path, "/old", Escape::Kept),
            (&path, "/old?from=", Escape::Uri),
            (&path, "/old#", Escape::Uri),
            (&query, "/old?", Escape::Kept),
            (&query, "/old?q=", Escape::Uri),
            (&query, "/old?q=a?", Escape::Uri),
            (&query, "/old", Escape::Uri),
            (&TemplateField::Host, "/", Escape::Uri),
        ] {
            assert_eq!(in_place(field, before), want, "{field:?} behind {before}");
        }
    }

    #[test]
    fn the_content_type_says_how() {
        for (content_type, want) in [
            (Some("application/json; charset=utf-8"), Escape::Json),
            (Some("application/problem+json"), Escape::Json),
            (Some("Text/HTML"), Escape::Html),
            (Some("image/svg+xml"), Escape::Html),
            (Some("text/plain"), Escape::Nothing),
            (None, Escape::Nothing),
        ] {
            assert_eq!(Escape::of_type(content_type), want, "{content_type:?}");
        }
    }
}

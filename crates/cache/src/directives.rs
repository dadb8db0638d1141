//! The Cache-Control field (RFC 9111 §5.2).
//!
//! `http-cache-semantics` compares the names of directives by case and splits at commas inside quotes, so that it
//! would share what says `Private`. It gets what was read here, written anew.

use http::{HeaderMap, header};
use std::borrow::Cow;
use std::fmt::Write;
use std::time::Duration;

/// What a number that is too large stands for (RFC 9111 §1.2.2).
const LONGEST: u64 = 1 << 31;

/// The directives of a request or of an answer that a shared cache heeds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Directives {
    pub(crate) no_store: bool,
    pub(crate) no_cache: bool,
    pub(crate) private: bool,
    pub(crate) public: bool,
    pub(crate) must_revalidate: bool,
    pub(crate) proxy_revalidate: bool,
    pub(crate) only_if_cached: bool,
    pub(crate) max_age: Option<Duration>,
    pub(crate) s_maxage: Option<Duration>,
    pub(crate) min_fresh: Option<Duration>,
    pub(crate) stale_while_revalidate: Option<Duration>,
    pub(crate) stale_if_error: Option<Duration>,
}

impl Directives {
    /// Reads all lines of the field, or `Pragma: no-cache` where there is none (RFC 9111 §5.4).
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let mut found = Self::default();
        if !headers.contains_key(header::CACHE_CONTROL) {
            found.no_cache = headers.get_all(header::PRAGMA).iter().any(|pragma| {
                pragma
                    .as_bytes()
                    .to_ascii_lowercase()
                    .windows(8)
                    .any(|w| w == b"no-cache")
            });
            return found;
        }
        for line in headers.get_all(header::CACHE_CONTROL) {
            found.read(line.as_bytes());
        }
        found
    }

    fn read(&mut self, line: &[u8]) {
        let mut quoted = false;
        let mut escaped = false;
        for directive in line.split(|&byte| {
            if escaped {
                escaped = false;
            } else if quoted && byte == b'\\' {
                escaped = true;
            } else if byte == b'"' {
                quoted = !quoted;
            }
            byte == b',' && !quoted
        }) {
            self.take(directive);
        }
        // Whatever else it said is inside the quote that doesn't end.
        self.no_store |= quoted;
    }

    fn take(&mut self, directive: &[u8]) {
        let mut parts = directive.splitn(2, |&byte| byte == b'=');
        let name = parts.next().unwrap_or_default().trim_ascii().to_ascii_lowercase();
        let value = parts.next();
        match name.as_slice() {
            b"no-store" => self.no_store = true,
            // With names of fields, these two are about these fields only. A cache may take them for all.
            b"no-cache" => self.no_cache = true,
            b"private" => self.private = true,
            b"public" => self.public = true,
            b"must-revalidate" => self.must_revalidate = true,
            b"proxy-revalidate" => self.proxy_revalidate = true,
            b"only-if-cached" => self.only_if_cached = true,
            b"max-age" => least(&mut self.max_age, value),
            b"s-maxage" => least(&mut self.s_maxage, value),
            b"stale-while-revalidate" => least(&mut self.stale_while_revalidate, value),
            b"stale-if-error" => least(&mut self.stale_if_error, value),
            b"min-fresh" => self.min_fresh = self.min_fresh.max(Some(seconds(value))),
            _ => {}
        }
    }

    /// What of it says whether and how long an answer is kept, for `http-cache-semantics`. Without proxy-revalidate,
    /// which that takes for never fresh.
    pub(crate) fn to_field(self) -> String {
        let mut field = String::new();
        let flags = [
            ("no-store", self.no_store),
            ("no-cache", self.no_cache),
            ("private", self.private),
            ("public", self.public),
            ("must-revalidate", self.must_revalidate),
        ];
        for (name, _) in flags.into_iter().filter(|(_, set)| *set) {
            separate(&mut field);
            field.push_str(name);
        }
        for (name, age) in [("max-age", self.max_age), ("s-maxage", self.s_maxage)] {
            if let Some(age) = age {
                separate(&mut field);
                // Writing to a string doesn't fail.
                let _ = write!(field, "{name}={}", age.as_secs());
            }
        }
        field
    }
}

fn separate(field: &mut String) {
    if !field.is_empty() {
        field.push_str(", ");
    }
}

/// Of a directive that is there more than once, the least counts: the answer is stale for the one that said so.
fn least(slot: &mut Option<Duration>, value: Option<&[u8]>) {
    let value = seconds(value);
    *slot = Some(slot.map_or(value, |other| other.min(value)));
}

/// What is no number of seconds is none (RFC 9111 §4.2.1: such an answer is stale).
fn seconds(value: Option<&[u8]>) -> Duration {
    let value = value.unwrap_or_default().trim_ascii();
    let value = value
        .strip_prefix(b"\"")
        .and_then(|value| value.strip_suffix(b"\""))
        .unwrap_or(value);
    digits(value).unwrap_or_default()
}

/// A number of seconds that is written in digits, at most 2^31.
pub(crate) fn digits(value: &[u8]) -> Option<Duration> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = value.iter().fold(0u64, |number, digit| {
        (number * 10 + u64::from(digit - b'0')).min(LONGEST)
    });
    Some(Duration::from_secs(number))
}

/// The elements of a list field, lower case: names of fields or of connection options.
pub(crate) fn names<'a>(
    headers: &'a HeaderMap,
    field: &header::HeaderName,
) -> impl Iterator<Item = Cow<'a, [u8]>> {
    headers
        .get_all(field)
        .iter()
        .flat_map(|line| line.as_bytes().split(|&byte| byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|name| !name.is_empty())
        .map(|name| {
            if name.iter().any(u8::is_ascii_uppercase) {
                Cow::Owned(name.to_ascii_lowercase())
            } else {
                Cow::Borrowed(name)
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn of(lines: &[&str]) -> Directives {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(header::CACHE_CONTROL, HeaderValue::from_str(line).unwrap());
        }
        Directives::of(&headers)
    }

    #[test]
    fn names_have_no_case_and_lines_are_one_list() {
        let found = of(&["Public, MAX-AGE=60", "S-MaxAge=\"5\""]);
        assert!(found.public);
        assert_eq!(found.max_age, Some(Duration::from_secs(60)));
        assert_eq!(found.s_maxage, Some(Duration::from_secs(5)));
        assert!(of(&["Private=\"set-cookie, x\""]).private);
        assert!(of(&[" , No-Store ,"]).no_store);
    }

    #[test]
    fn what_is_quoted_is_no_directive_and_an_open_quote_keeps_nothing() {
        let found = of(&[r#"ext="a, max-age=100", ext2="\", public""#]);
        assert_eq!(found, Directives::default());
        assert!(of(&[r#"max-age=5, ext="private, x"#]).no_store);
    }

    #[test]
    fn numbers_that_are_none_are_zero_and_large_ones_are_bounded() {
        for (value, expected) in [
            ("max-age", 0),
            ("max-age=", 0),
            ("max-age=-1", 0),
            ("max-age=1.5", 0),
            ("max-age=ten", 0),
            ("max-age=10, max-age=3", 3),
            ("max-age=99999999999999999999999", LONGEST),
        ] {
            assert_eq!(
                of(&[value]).max_age,
                Some(Duration::from_secs(expected)),
                "{value}"
            );
        }
    }

    #[test]
    fn pragma_counts_only_without_cache_control() {
        let mut headers = HeaderMap::new();
        headers.insert(header::PRAGMA, HeaderValue::from_static("No-Cache"));
        assert!(Directives::of(&headers).no_cache);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("max-age=1"));
        assert!(!Directives::of(&headers).no_cache);
    }
}

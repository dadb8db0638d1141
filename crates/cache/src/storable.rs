//! Whether an answer may be kept by a cache that many share, and how long it is fresh.
//!
//! `http-cache-semantics` decides both, of fields that are read here: it knows methods, statuses, `Authorization`,
//! and which of `s-maxage`, `max-age` and `Expires` counts. What it doesn't do, or not for a cache like this one, is
//! done here: cookies, what policy says of answers that don't, and the age that an answer arrives with (its sum may
//! overflow there, with a panic).

use crate::directives::{Directives, digits, names};
use crate::kept::date;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_cache_semantics::{CacheOptions, CachePolicy};
use std::time::{Duration, SystemTime};

/// Says that an answer is a fallback's.
const DEGRADED: &str = "leeward-degraded";

const OPTIONS: CacheOptions = CacheOptions {
    shared: true,
    // Policy says how long an answer is fresh that doesn't say.
    cache_heuristic: 0.0,
    immutable_min_time_to_live: Duration::ZERO,
    ignore_cargo_cult: false,
};

/// An answer's head, and who asked for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answered<'a> {
    pub(crate) asked: &'a HeaderMap,
    pub(crate) status: StatusCode,
    pub(crate) headers: &'a HeaderMap,
    /// When it was asked for, and when it came.
    pub(crate) asked_at: SystemTime,
    pub(crate) now: SystemTime,
}

impl Answered<'_> {
    /// How long it is fresh, counted from when the service made it; `None` if it must not be kept.
    pub(crate) fn lifetime(&self, said: &Directives, default_ttl: Duration) -> Option<Duration> {
        if self.headers.contains_key(header::SET_COOKIE)
            || self.headers.contains_key(header::CONTENT_RANGE)
            || self.headers.contains_key(DEGRADED)
            || !self.varies_by_names()
            || !self.may_be_shared(said)
        {
            return None;
        }
        let policy = self.policy(said);
        if !policy.is_storable() {
            return None;
        }
        let explicit =
            said.max_age.is_some() || said.s_maxage.is_some() || self.headers.contains_key(header::EXPIRES);
        if explicit || said.no_cache {
            return Some(policy.time_to_live(self.now));
        }
        (!default_ttl.is_zero() && lasts_by_default(self.status)).then_some(default_ttl)
    }

    /// How old it is as it comes (RFC 9111 §4.2.3).
    pub(crate) fn age(&self) -> Duration {
        let apparent = self
            .headers
            .get(header::DATE)
            .and_then(date)
            .and_then(|date| self.now.duration_since(date).ok())
            .unwrap_or_default();
        let said = names(self.headers, &header::AGE)
            .next()
            .and_then(|age| digits(&age))
            .unwrap_or_default();
        let delay = self.now.duration_since(self.asked_at).unwrap_or_default();
        apparent.max(said.saturating_add(delay))
    }

    /// A cookie mostly says who asks, and a service that answers by it doesn't always say so. RFC 9111 lets that be
    /// kept nevertheless. Here it isn't, unless the service says that the answer is for all (`public`, `s-maxage`),
    /// or by `Vary` that it is for the same cookie only.
    fn may_be_shared(&self, said: &Directives) -> bool {
        !self.asked.contains_key(header::COOKIE) || for_any_cookie(said, self.headers)
    }

    /// Whether Vary lists names of fields only; `*` is none, and what is no name may hide one.
    fn varies_by_names(&self) -> bool {
        names(self.headers, &header::VARY)
            .all(|name| *name != *b"*" && header::HeaderName::from_bytes(&name).is_ok())
    }

    fn policy(&self, said: &Directives) -> CachePolicy {
        let mut request = Request::new(());
        *request.method_mut() = Method::GET;
        if self.asked.contains_key(header::AUTHORIZATION) {
            // Only that it is there counts; what it says isn't copied.
            request
                .headers_mut()
                .insert(header::AUTHORIZATION, HeaderValue::from_static("-"));
        }
        let mut response = Response::new(());
        *response.status_mut() = self.status;
        let fields = response.headers_mut();
        if let Ok(value) = HeaderValue::from_str(&said.to_field()) {
            fields.insert(header::CACHE_CONTROL, value);
        }
        let mut expires = self.headers.get_all(header::EXPIRES).iter();
        if let Some(first) = expires.next() {
            // More than one, or what is no date, is in the past (RFC 9111 §5.3).
            let at = date(first).filter(|_| expires.next().is_none());
            fields.insert(header::EXPIRES, at.map_or(HeaderValue::from_static("0"), written));
        }
        if let Some(at) = self.headers.get(header::DATE).and_then(date) {
            fields.insert(header::DATE, written(at));
        }
        CachePolicy::new_options(&request, &response, self.now, OPTIONS)
    }
}

/// Whether an answer is for whoever asks, with `Authorization` too (RFC 9111 §3.5).
pub(crate) const fn for_any_authorization(said: &Directives) -> bool {
    said.public || said.s_maxage.is_some() || said.must_revalidate
}

/// Whether an answer is for whoever asks, with a cookie too, or is told apart by cookies.
pub(crate) fn for_any_cookie(said: &Directives, headers: &HeaderMap) -> bool {
    said.public || said.s_maxage.is_some() || names(headers, &header::VARY).any(|name| *name == *b"cookie")
}

/// Statuses that policy's `default_ttl` is for.
fn lasts_by_default(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200 | 203 | 204 | 300 | 301 | 404 | 410)
}

/// A date as all recipients read it.
fn written(at: SystemTime) -> HeaderValue {
    // It was read from a field, so that it can be written into one.
    HeaderValue::from_str(&httpdate::fmt_http_date(at)).unwrap_or_else(|_| HeaderValue::from_static("0"))
}

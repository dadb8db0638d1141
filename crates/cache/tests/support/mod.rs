//! Requests, answers and time for the tests of the cache.

#![allow(dead_code, reason = "each test uses its part")]

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use leeward_cache::{Asked, Caches, Fill, Head, Joined, Look, RuleCache};
use leeward_policy::model::Cache;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub(crate) const SETTINGS: Cache = Cache {
    stale_if_error: Duration::ZERO,
    ..Cache::DEFAULT
};

pub(crate) const DATE: (&str, &str) = ("date", "Fri, 15 Jan 2027 08:00:00 GMT");
pub(crate) const TAG: (&str, &str) = ("etag", "\"1\"");
pub(crate) const MINUTE: (&str, &str) = ("cache-control", "max-age=60");
pub(crate) const ALL: (&str, &str) = ("cache-control", "public, max-age=60");

/// Seconds since the tests' day began: Fri, 15 Jan 2027 08:00:00 GMT.
pub(crate) fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
}

pub(crate) type Fields<'a> = &'a [(&'static str, &'a str)];

pub(crate) fn fields(fields: Fields<'_>) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in fields {
        map.append(
            HeaderName::from_static(name),
            HeaderValue::from_str(value).unwrap(),
        );
    }
    map
}

pub(crate) fn cache(settings: Cache) -> Arc<RuleCache> {
    Caches::new().rule(&"rule".into(), &settings)
}

/// A request that owns what it is made of.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) method: Method,
    pub(crate) authority: String,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
}

impl Ask {
    pub(crate) fn get(target: &str, headers: Fields<'_>) -> Self {
        Self {
            method: Method::GET,
            authority: "shop".into(),
            uri: target.parse().unwrap(),
            headers: fields(headers),
        }
    }

    pub(crate) fn with_method(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    pub(crate) fn asked(&self) -> Asked<'_> {
        Asked {
            method: &self.method,
            authority: &self.authority,
            uri: &self.uri,
            headers: &self.headers,
        }
    }
}

/// The right to ask the service.
#[track_caller]
pub(crate) fn lead(cache: &Arc<RuleCache>, ask: &Ask, now: SystemTime) -> Fill {
    match cache.join(&ask.asked(), now) {
        Joined::Lead(fill) => fill,
        other @ (Joined::Fresh(_) | Joined::Wait(_)) => panic!("not the one to ask: {other:?}"),
    }
}

/// The service answers; true if that is kept.
pub(crate) fn answer(mut fill: Fill, status: u16, headers: Fields<'_>, body: &str, now: SystemTime) -> bool {
    let head = fill.head(StatusCode::from_u16(status).unwrap(), &fields(headers), now);
    fill.data(&Bytes::copy_from_slice(body.as_bytes()));
    fill.finish(now);
    matches!(head, Head::Keep)
}

/// What `look` says, in a word, with the body.
pub(crate) fn look(cache: &Arc<RuleCache>, ask: &Ask, now: SystemTime) -> String {
    let word = |word: &str, body: &Bytes| format!("{word} {}", String::from_utf8_lossy(body));
    match cache.look(&ask.asked(), now) {
        Look::Fresh(kept) => word("fresh", &kept.body),
        Look::Revalidate {
            kept,
            refresh: Some(_),
        } => word("refresh", &kept.body),
        Look::Revalidate { kept, refresh: None } => word("stale", &kept.body),
        Look::Validate { kept, .. } => word("validate", &kept.body),
        Look::Miss => "miss".into(),
        Look::Bypass => "bypass".into(),
    }
}

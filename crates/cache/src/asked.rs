//! What is asked for, as far as a cache looks at it.

use crate::directives::Directives;
use http::{HeaderMap, Method, Uri};
use smallvec::SmallVec;
use std::time::Duration;

/// Bound on what a request asks for, authority and path and query together, in bytes. Longer ones bypass the cache.
pub const MAX_KEY_BYTES: usize = 4096;

/// Most requests ask for less than this.
const SHORT: usize = 128;

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Its method.
    pub method: &'a Method,
    /// The host that it is for, with a port if it has one, in any case.
    pub authority: &'a str,
    /// Its target, of which path and query count.
    pub uri: &'a Uri,
    /// Its fields.
    pub headers: &'a HeaderMap,
}

/// What answers are kept under.
pub(crate) type Key = SmallVec<[u8; SHORT]>;

/// What a request that the cache has a part in wants of it.
#[derive(Debug)]
pub(crate) struct Wish {
    pub(crate) key: Key,
    /// HEAD, not GET.
    pub(crate) head: bool,
    /// The client has a condition of its own, and wants its own 304.
    pub(crate) conditional: bool,
    no_cache: bool,
    max_age: Option<Duration>,
    min_fresh: Option<Duration>,
}

impl Asked<'_> {
    /// Whether the client wants what is kept or nothing (`only-if-cached`, RFC 9111 §5.2.1.7): unless
    /// [`crate::Look`] has something to give, the answer is 504.
    pub fn only_if_cached(&self) -> bool {
        Directives::of(self.headers).only_if_cached
    }

    /// What it wants of the cache; `None` if the cache has no part in it.
    pub(crate) fn wish(&self) -> Option<Wish> {
        let head = self.method == Method::HEAD;
        if !head && self.method != Method::GET {
            return None;
        }
        let mut conditional = false;
        let mut controlled = false;
        for (name, value) in self.headers {
            match name.as_str() {
                // What is kept is whole, and these conditions are the service's to judge (RFC 9110 §13.2.1).
                "range"
                | "if-range"
                | "if-match"
                | "if-unmodified-since"
                | "upgrade"
                | "transfer-encoding" => {
                    return None;
                }
                // A body may mean something to the service that the key doesn't have.
                "content-length" if value.as_bytes() != b"0" => return None,
                "if-none-match" | "if-modified-since" => conditional = true,
                "cache-control" | "pragma" => controlled = true,
                _ => {}
            }
        }
        let directives = if controlled {
            Directives::of(self.headers)
        } else {
            Directives::default()
        };
        if directives.no_store {
            return None;
        }
        Some(Wish {
            key: self.key()?,
            head,
            conditional,
            no_cache: directives.no_cache,
            max_age: directives.max_age,
            min_fresh: directives.min_fresh,
        })
    }

    /// Authority, space, path and query. A target has no space, so that no two pairs have the same key.
    pub(crate) fn key(&self) -> Option<Key> {
        let target = self.uri.path_and_query().map_or("/", |target| target.as_str());
        if self.authority.len() + target.len() > MAX_KEY_BYTES {
            return None;
        }
        let mut key = Key::with_capacity(self.authority.len() + 1 + target.len());
        key.extend(self.authority.bytes().map(|byte| byte.to_ascii_lowercase()));
        key.push(b' ');
        key.extend_from_slice(target.as_bytes());
        Some(key)
    }
}

impl Wish {
    /// Whether the client takes an answer of this age that is fresh for `left` yet (RFC 9111 §5.2.1).
    pub(crate) fn takes(&self, age: Duration, left: Duration) -> bool {
        !self.no_cache
            && self.max_age.is_none_or(|max| age <= max)
            && self.min_fresh.is_none_or(|min| left >= min)
    }

    /// Whether the client asks for more than that an answer be fresh.
    pub(crate) const fn is_particular(&self) -> bool {
        self.no_cache || self.max_age.is_some() || self.min_fresh.is_some()
    }
}

//! An answer's head as it is kept.

use crate::directives::{Directives, names};
use crate::kept::{Kept, opaque};
use crate::storable::{Answered, for_any_authorization, for_any_cookie};
use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderName};
use http::{HeaderMap, HeaderValue, StatusCode};
use leeward_policy::model;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// What a kept field takes beside its name and value, in bytes: a bucket of `HeaderMap` is 104, of which up to half
/// are free, with 4 to 8 of the index for each.
const FIELD: u64 = 208;
/// What a name or a line that selects takes beside its bytes, with what the allocator adds.
const LINE: u64 = 64;
/// What a kept answer takes beside its fields and body, in bytes, with what the allocator adds.
const ANSWER: u64 = 512;

/// Fields of a 304 that say nothing of what is kept (RFC 9111 §3.2).
const NOT_UPDATED: [HeaderName; 3] = [
    header::CONTENT_LENGTH,
    header::CONTENT_ENCODING,
    header::CONTENT_RANGE,
];

/// An answer's head.
#[derive(Debug)]
pub(crate) struct Answer {
    status: StatusCode,
    /// Without those for one hop. `Age` and `Content-Length` are places only.
    headers: HeaderMap,
    selected: Box<[Selected]>,
    lifetime: Duration,
    /// How old it was when it came.
    age: Duration,
    came: SystemTime,
    stale: Stale,
    any_authorization: bool,
    any_cookie: bool,
}

/// A field that Vary names, as it was in the request.
#[derive(Debug)]
struct Selected {
    name: HeaderName,
    /// Its lines; none if it wasn't there. One line with a comma is not two lines, though it means the same.
    lines: Box<[Box<[u8]>]>,
}

/// How long past its freshness it may be given.
#[derive(Clone, Copy, Debug)]
struct Stale {
    permit: Permit,
    while_revalidate: Option<Duration>,
    if_error: Option<Duration>,
}

/// Who may let a stale answer be given (RFC 9111 §4.2.4).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Permit {
    /// Nobody: must-revalidate, proxy-revalidate or no-cache.
    Nobody,
    /// The answer's own directives, of RFC 5861: s-maxage forbids what isn't said there.
    Answer,
    /// Policy and rungs, too.
    Policy,
}

/// An answer, whole.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) answer: Arc<Answer>,
    pub(crate) body: Bytes,
}

impl Answer {
    /// The head as it is kept; `None` if it must not be, or is of no use to anybody.
    pub(crate) fn of(answered: &Answered<'_>, settings: &model::Cache) -> Option<Self> {
        let said = Directives::of(answered.headers);
        let lifetime = answered.lifetime(&said, settings.default_ttl)?;
        let stale = Stale::of(&said);
        let answer = Self {
            status: answered.status,
            headers: compact(answered.headers),
            selected: select(answered.headers, answered.asked),
            lifetime,
            age: answered.age(),
            came: answered.now,
            stale,
            any_authorization: for_any_authorization(&said),
            any_cookie: for_any_cookie(&said, answered.headers),
        };
        let useful =
            answer.is_fresh(answered.now) || answer.has_validator() || stale.permit != Permit::Nobody;
        useful.then_some(answer)
    }

    /// Whether the fields that Vary names are the same in a request.
    pub(crate) fn selects(&self, asked: &HeaderMap) -> bool {
        self.selected.iter().all(|selected| selected.is_in(asked))
    }

    /// Whether it may be given to a request of its key. What was got without credentials may be another thing to
    /// who has some, so that this isn't about whose answer it was only.
    pub(crate) fn serves(&self, asked: &HeaderMap) -> bool {
        (self.any_authorization || !asked.contains_key(header::AUTHORIZATION))
            && (self.any_cookie || !asked.contains_key(header::COOKIE))
            && self.selects(asked)
    }

    /// The fields that Vary names.
    pub(crate) fn selecting(&self) -> impl Iterator<Item = &HeaderName> {
        self.selected.iter().map(|selected| &selected.name)
    }

    pub(crate) fn age(&self, now: SystemTime) -> Duration {
        let resident = now.duration_since(self.came).unwrap_or_default();
        self.age.saturating_add(resident)
    }

    /// How long it is fresh yet.
    pub(crate) fn left(&self, now: SystemTime) -> Duration {
        self.lifetime.saturating_sub(self.age(now))
    }

    pub(crate) fn is_fresh(&self, now: SystemTime) -> bool {
        !self.left(now).is_zero()
    }

    /// Whether it may be given while a fresh one is fetched.
    pub(crate) fn while_revalidate(&self, now: SystemTime, policy: Duration) -> bool {
        let own = self.stale.while_revalidate;
        let window = match self.stale.permit {
            Permit::Nobody => None,
            Permit::Answer => own,
            Permit::Policy => own.or(Some(policy)),
        };
        self.is_within(window, now)
    }

    /// Whether it may be given in place of a failure. `asked` is what a rung says.
    pub(crate) fn if_error(&self, now: SystemTime, asked: Option<Duration>, policy: Duration) -> bool {
        let own = self.stale.if_error;
        let window = match self.stale.permit {
            Permit::Nobody => None,
            Permit::Answer => own.map(|own| asked.map_or(own, |asked| asked.min(own))),
            Permit::Policy => asked.or(own).or(Some(policy)),
        };
        self.is_fresh(now) || self.is_within(window, now)
    }

    fn is_within(&self, window: Option<Duration>, now: SystemTime) -> bool {
        let past = self.age(now).saturating_sub(self.lifetime);
        window.is_some_and(|window| !window.is_zero() && past <= window)
    }

    /// What makes a request one for another answer than this only; empty if nothing does.
    pub(crate) fn conditions(&self) -> HeaderMap {
        let mut conditions = HeaderMap::new();
        if let Some(tag) = self.headers.get(header::ETAG) {
            conditions.insert(header::IF_NONE_MATCH, tag.clone());
        }
        if let Some(modified) = self.headers.get(header::LAST_MODIFIED) {
            conditions.insert(header::IF_MODIFIED_SINCE, modified.clone());
        }
        conditions
    }

    pub(crate) fn has_validator(&self) -> bool {
        self.headers.contains_key(header::ETAG) || self.headers.contains_key(header::LAST_MODIFIED)
    }

    /// Its status and its fields with those of a 304 to [`Answer::conditions`] in their places (RFC 9111 §4.3.4);
    /// `None` if the 304 is about another answer.
    pub(crate) fn merged(&self, not_modified: &HeaderMap) -> Option<(StatusCode, HeaderMap)> {
        let tags = (self.headers.get(header::ETAG), not_modified.get(header::ETAG));
        let dates = (
            self.headers.get(header::LAST_MODIFIED),
            not_modified.get(header::LAST_MODIFIED),
        );
        let same = match (tags, dates) {
            ((Some(own), Some(other)), _) => {
                own == other || opaque(own.as_bytes()) == opaque(other.as_bytes())
            }
            (_, (Some(own), Some(other))) => own == other,
            _ => true,
        };
        if !same {
            return None;
        }
        let mut headers = self.headers.clone();
        // It is as old as the 304, which needn't have the time.
        headers.remove(header::DATE);
        let passed_on = |name: &HeaderName| !NOT_UPDATED.contains(name);
        for name in not_modified.keys().filter(|name| passed_on(name)) {
            headers.remove(name);
        }
        for (name, value) in not_modified.iter().filter(|(name, _)| passed_on(name)) {
            headers.append(name, value.clone());
        }
        Some((self.status, headers))
    }

    /// Its fields' names and values, in bytes.
    pub(crate) fn text(&self) -> u64 {
        self.headers
            .iter()
            .map(|(name, value)| name.as_str().len() + value.len())
            .sum::<usize>() as u64
    }

    /// What it takes in memory, in bytes.
    pub(crate) fn size(&self) -> u64 {
        let selected = self.selected.iter().map(|selected| {
            let lines = selected
                .lines
                .iter()
                .map(|line| line.len() as u64 + LINE)
                .sum::<u64>();
            selected.name.as_str().len() as u64 + LINE + lines
        });
        ANSWER + self.text() + FIELD * self.headers.len() as u64 + selected.sum::<u64>()
    }
}

impl Stored {
    /// Its fields and its body, in bytes.
    pub(crate) fn text(&self) -> u64 {
        self.answer.text() + self.body.len() as u64
    }

    /// What it takes in memory, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.answer.size() + self.body.len() as u64
    }

    /// What is given of it.
    pub(crate) fn kept(&self, head: bool, now: SystemTime) -> Kept {
        kept(
            self.answer.status,
            self.answer.headers.clone(),
            self.body.clone(),
            head,
            self.answer.age(now),
        )
    }
}

/// What is given of an answer.
pub(crate) fn kept(
    status: StatusCode,
    mut headers: HeaderMap,
    body: Bytes,
    head: bool,
    age: Duration,
) -> Kept {
    headers.insert(header::AGE, HeaderValue::from(age.as_secs()));
    if status == StatusCode::NO_CONTENT {
        headers.remove(header::CONTENT_LENGTH);
    } else {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    }
    Kept {
        status,
        headers,
        body: if head { Bytes::new() } else { body },
    }
}

impl Selected {
    fn is_in(&self, asked: &HeaderMap) -> bool {
        let lines = asked.get_all(&self.name).iter().map(HeaderValue::as_bytes);
        lines.eq(self.lines.iter().map(|line| &**line))
    }
}

impl Stale {
    const fn of(said: &Directives) -> Self {
        let permit = if said.must_revalidate || said.proxy_revalidate || said.no_cache {
            Permit::Nobody
        } else if said.s_maxage.is_some() {
            Permit::Answer
        } else {
            Permit::Policy
        };
        Self {
            permit,
            while_revalidate: said.stale_while_revalidate,
            if_error: said.stale_if_error,
        }
    }
}

fn select(headers: &HeaderMap, asked: &HeaderMap) -> Box<[Selected]> {
    let mut selected: Vec<Selected> = Vec::new();
    for name in names(headers, &header::VARY) {
        // That each is one has been checked.
        let Ok(name) = HeaderName::from_bytes(&name) else {
            continue;
        };
        if selected.iter().any(|other| other.name == name) {
            continue;
        }
        let lines = asked
            .get_all(&name)
            .iter()
            .map(|line| line.as_bytes().into())
            .collect();
        selected.push(Selected { name, lines });
    }
    selected.into()
}

/// The fields that are kept, with their values side by side in one buffer of their own: as they came, each holds what
/// was read with it, mostly much more.
pub(crate) fn compact(headers: &HeaderMap) -> HeaderMap {
    let options: Vec<_> = names(headers, &header::CONNECTION).collect();
    let is_kept = |name: &HeaderName| {
        !is_for_one_hop(name.as_str()) && !options.iter().any(|option| **option == *name.as_str().as_bytes())
    };
    let fields = || headers.iter().filter(|(name, _)| is_kept(name));
    let mut values = BytesMut::with_capacity(fields().map(|(_, value)| value.len()).sum());
    for (_, value) in fields() {
        values.extend_from_slice(value.as_bytes());
    }
    let mut values = values.freeze();
    let mut kept = HeaderMap::with_capacity(fields().count() + 2);
    // They have their values when the answer is given, in their places: a copy of a map has no room for more.
    kept.insert(header::AGE, HeaderValue::from_static("0"));
    kept.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    for (name, value) in fields() {
        let copy = HeaderValue::from_maybe_shared(values.split_to(value.len()));
        // A copy of a name and a value is a name and a value.
        if let (Ok(name), Ok(copy)) = (HeaderName::from_bytes(name.as_str().as_bytes()), copy) {
            kept.append(name, copy);
        }
    }
    kept
}

/// Fields for one hop (RFC 9110 §7.6.1), and those that are set anew each time.
fn is_for_one_hop(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authentication-info"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "age"
            | "content-length"
    )
}

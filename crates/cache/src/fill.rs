//! An answer on its way into the cache.

use crate::answer::{Answer, Stored, compact, kept};
use crate::flight::{Flight, Progress};
use crate::kept::Kept;
use crate::rule::RuleCache;
use crate::storable::Answered;
use crate::store::FlightKey;
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use std::sync::Arc;
use std::time::SystemTime;

/// Memory for a body that is taken before any of it is there, in bytes, at most. A length that is said is no promise.
const FIRST: u64 = 256 << 10;

/// An answer on its way into the cache: the service is to be asked for it, and what it answers told here.
///
/// Dropped unfinished, nothing is kept, and who waits goes on without it.
#[derive(Debug)]
#[must_use]
pub struct Fill(Option<Box<Part>>);

/// What an answer's head means.
#[derive(Debug)]
#[must_use]
pub enum Head {
    /// The answer is being kept: tell [`Fill::data`] and [`Fill::finish`] of its body.
    Keep,
    /// It is not, and nothing more need be told. The answer is the client's as it is.
    Pass,
    /// The 304 was to the cache's own conditions. This is the answer, and all is done.
    Freshened(Kept),
    /// The 304 was to the cache's own conditions, but is about something else than what it has. All is done, without
    /// an answer: ask again without conditions.
    Again,
}

/// The cache's part in a request.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) cache: Arc<RuleCache>,
    pub(crate) target: Box<[u8]>,
    pub(crate) hash: u64,
    pub(crate) asked: HeaderMap,
    pub(crate) asked_at: SystemTime,
    pub(crate) head: bool,
    /// What the service is asked to confirm.
    pub(crate) base: Option<Stored>,
    pub(crate) stamp: u64,
    /// What others wait for.
    pub(crate) flight: Option<(FlightKey, Arc<Flight>)>,
    /// Counted in the store.
    pub(crate) held: u64,
    pub(crate) coming: Option<Coming>,
}

#[derive(Debug)]
pub(crate) struct Coming {
    answer: Arc<Answer>,
    body: Vec<u8>,
    /// What Content-Length says.
    expected: Option<u64>,
    /// How large it may be.
    max: u64,
}

impl Fill {
    /// The cache has no part in it.
    pub(crate) const fn idle() -> Self {
        Self(None)
    }

    pub(crate) fn new(part: Part) -> Self {
        Self(Some(Box::new(part)))
    }

    /// Fields that the request to the service must have: If-None-Match and If-Modified-Since, as the cache has them.
    /// Empty where the cache has nothing to confirm, or the client has conditions of its own.
    pub fn conditions(&self) -> HeaderMap {
        self.0
            .as_ref()
            .and_then(|part| part.base.as_ref())
            .map_or_else(HeaderMap::new, |base| base.answer.conditions())
    }

    /// The head of the service's answer, as it came. Degraded answers are not to come here: what the mesh has made up
    /// isn't the service's. If it is not to be kept, who waits goes on at once.
    pub fn head(&mut self, status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Head {
        let Some(part) = self.0.as_mut() else {
            return Head::Pass;
        };
        if part.coming.is_some() {
            // A second head means that the first was of something else.
            return self.give_up();
        }
        if status == StatusCode::NOT_MODIFIED {
            if let (Some(base), Some(part)) = (part.base.take(), self.0.take()) {
                return part.freshen(&base, headers, now);
            }
            return self.give_up();
        }
        if part.head {
            return self.give_up();
        }
        let settings = part.cache.settings();
        let answered = Answered {
            asked: &part.asked,
            status,
            headers,
            asked_at: part.asked_at,
            now,
        };
        let Some(answer) = Answer::of(&answered, &settings) else {
            if !passes_by(status) {
                part.pass(now);
            }
            return self.give_up();
        };
        let expected = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok());
        let Some(max) = settings
            .max_object_bytes
            .checked_sub(answer.text())
            .filter(|max| expected.is_none_or(|expected| expected <= *max))
        else {
            part.pass(now);
            return self.give_up();
        };
        let answer = Arc::new(answer);
        if answer.is_fresh(now) {
            if let Some((_, flight)) = &part.flight {
                flight.tell(Progress::Coming(Arc::clone(&answer)));
            }
        } else {
            // It is for its own request, or to be confirmed by each.
            part.pass(now);
            part.land(Progress::Alone);
        }
        part.coming = Some(Coming {
            answer,
            body: Vec::new(),
            expected,
            max,
        });
        Head::Keep
    }

    /// A part of the body. When it is more than is kept of one answer, the answer is given up.
    pub fn data(&mut self, data: &Bytes) {
        let Some(part) = self.0.as_mut() else {
            return;
        };
        if !part.take(data) {
            let _ = self.give_up();
        }
    }

    /// The body has come to its end, whole, and without trailers that matter: those are not kept. Where it is known to
    /// be cut off, drop the fill instead.
    pub fn finish(mut self, now: SystemTime) {
        let Some(mut part) = self.0.take() else {
            return;
        };
        let Some(Coming {
            answer,
            body,
            expected,
            ..
        }) = part.coming.take()
        else {
            return;
        };
        if expected.is_some_and(|expected| expected != body.len() as u64) {
            return;
        }
        // Exactly as large as it is: what is free at its end would be counted nowhere.
        let body = Bytes::from(body.into_boxed_slice());
        part.keep(Stored { answer, body }, now);
    }

    fn give_up(&mut self) -> Head {
        self.0 = None;
        Head::Pass
    }
}

impl Part {
    fn take(&mut self, data: &Bytes) -> bool {
        let Some(coming) = self.coming.as_mut() else {
            return false;
        };
        let len = (coming.body.len() + data.len()) as u64;
        let most = coming.expected.unwrap_or(coming.max);
        if len > most {
            // It will hardly be smaller in a moment.
            self.pass(self.asked_at);
            return false;
        }
        let capacity = coming.body.capacity() as u64;
        if len > capacity {
            let first = coming.expected.unwrap_or_default().min(FIRST);
            let wanted = len.max(capacity.saturating_mul(2)).max(first).min(most);
            if !self.cache.hold(wanted - capacity) {
                return false;
            }
            self.held += wanted - capacity;
            let more = wanted - coming.body.len() as u64;
            let Ok(more) = usize::try_from(more) else {
                return false;
            };
            coming.body.reserve_exact(more);
        }
        coming.body.extend_from_slice(data);
        true
    }

    /// What is kept is confirmed.
    fn freshen(mut self: Box<Self>, base: &Stored, not_modified: &HeaderMap, now: SystemTime) -> Head {
        let Some((status, headers)) = base.answer.merged(not_modified) else {
            self.forget();
            return Head::Again;
        };
        let answered = Answered {
            asked: &self.asked,
            status,
            headers: &headers,
            asked_at: self.asked_at,
            now,
        };
        let head = self.head;
        if let Some(answer) = Answer::of(&answered, &self.cache.settings()) {
            let stored = Stored {
                answer: Arc::new(answer),
                body: base.body.clone(),
            };
            let kept = stored.kept(head, now);
            if !stored.answer.is_fresh(now) {
                self.pass(now);
                self.land(Progress::Alone);
            }
            self.keep(stored, now);
            return Head::Freshened(kept);
        }
        // The service has changed its mind: it is for this client, and not kept any more.
        let age = answered.age();
        let kept = kept(status, compact(&headers), base.body.clone(), head, age);
        self.forget();
        self.pass(now);
        Head::Freshened(kept)
    }

    fn keep(mut self: Box<Self>, stored: Stored, now: SystemTime) {
        let held = std::mem::take(&mut self.held);
        let gone = self.cache.keep(&self, stored.clone(), held);
        if let Some((_, flight)) = self.flight.take() {
            flight.tell(Progress::Done(stored, now));
        }
        drop(gone);
    }

    fn forget(&self) {
        self.cache.forget(&self.target, &self.asked);
    }

    /// Requests for this don't wait for each other for a while.
    fn pass(&self, now: SystemTime) {
        self.cache.pass(self.hash, now);
    }

    /// Nobody waits for it any more.
    fn land(&mut self, progress: Progress) {
        if let Some((key, flight)) = self.flight.take() {
            self.cache.land(&key, &flight);
            flight.tell(progress);
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // The memory goes before the right to it.
        self.coming = None;
        if self.held > 0 {
            self.cache.release(self.held);
        }
        self.land(Progress::Alone);
    }
}

/// Whether a status comes and goes, and says nothing of whether the next answer is kept.
fn passes_by(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

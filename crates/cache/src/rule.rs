//! The cache of one rule.

use crate::answer::Stored;
use crate::asked::{Asked, Wish};
use crate::caches::CacheReading;
use crate::fill::{Fill, Part};
use crate::flight::{Flight, Waiter};
use crate::kept::Kept;
use crate::store::{FlightKey, Group, Store};
use http::{HeaderMap, StatusCode, header};
use leeward_policy::model;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// How long requests for a target go to the service beside each other after an answer that others could not have.
/// Otherwise each would wait for the one before it, for nothing. Varnish has 120 s; this is how long it takes to
/// notice that a target is cacheable again.
pub const PASS_FOR: Duration = Duration::from_secs(10);

/// The answers that one rule keeps, shared by a proxy's threads.
///
/// Whose answers are given to whom: those to requests with `Authorization`, and any to requests with it, only where
/// they say `public`, `s-maxage` or `must-revalidate` (RFC 9111 §3.5). Those to requests with `Cookie`, and any to
/// requests with it, only where they say `public` or `s-maxage`, or vary by `Cookie`; RFC 9111 would allow more, but
/// a cookie mostly says who asks, and services that answer by it don't always say so. What has `Set-Cookie`,
/// `private`, `no-store`, `Vary: *` or `leeward-degraded` is never kept.
///
/// One lock holds it all, for a search or an insertion, and never while anything is copied or freed.
#[derive(Debug)]
pub struct RuleCache {
    rule: Arc<str>,
    store: Mutex<Store>,
    hasher: RandomState,
    hits: AtomicU64,
    misses: AtomicU64,
    stale: AtomicU64,
    coalesced: AtomicU64,
}

/// What the cache has for a request.
#[derive(Debug)]
#[must_use]
pub enum Look {
    /// An answer that is fresh.
    Fresh(Kept),
    /// A stale one that may be given while a fresh one is fetched.
    Revalidate {
        /// The answer.
        kept: Kept,
        /// For whoever is to fetch it: the request without the client's conditions, but with [`Fill::conditions`].
        /// `None` if somebody does already, and for HEAD.
        refresh: Option<Fill>,
    },
    /// One that must be confirmed: [`RuleCache::join`].
    Validate {
        /// The answer.
        kept: Kept,
        /// The fields that ask for that, which [`Fill::conditions`] has, too. Empty where the client has conditions
        /// of its own.
        conditions: HeaderMap,
    },
    /// None that is of use now: [`RuleCache::join`].
    Miss,
    /// The cache has no part in this request: other methods than GET and HEAD, a body, a range, a change of
    /// protocols, If-Match and its like, `no-store`, or a target that is too long.
    Bypass,
}

/// What becomes of a request that the cache has nothing for.
#[derive(Debug)]
#[must_use]
pub enum Joined {
    /// Somebody else got an answer meanwhile.
    Fresh(Kept),
    /// It is to go to the service, with [`Fill::conditions`].
    Lead(Fill),
    /// It is to wait for one that does.
    Wait(Waiter),
}

/// What is found of a target under the lock, when its service is to be asked.
#[derive(Debug)]
struct Ticket {
    hash: u64,
    stamp: u64,
    flight: Option<(FlightKey, Arc<Flight>)>,
}

impl RuleCache {
    pub(crate) fn new(rule: Arc<str>, settings: model::Cache) -> Self {
        Self {
            rule,
            store: Mutex::new(Store::new(settings)),
            hasher: RandomState::new(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            coalesced: AtomicU64::new(0),
        }
    }

    /// What there is for a request.
    pub fn look(self: &Arc<Self>, asked: &Asked<'_>, now: SystemTime) -> Look {
        let Some(wish) = asked.wish() else {
            return Look::Bypass;
        };
        let (found, window) = {
            let mut store = self.store();
            let found = store.find(&wish.key, asked.headers);
            (found, store.settings().stale_while_revalidate)
        };
        let Some(stored) = found else {
            count(&self.misses);
            return Look::Miss;
        };
        if is_taken(&stored, &wish, now) {
            count(&self.hits);
            return Look::Fresh(stored.kept(wish.head, now));
        }
        if !wish.is_particular() && stored.answer.while_revalidate(now, window) {
            count(&self.stale);
            return Look::Revalidate {
                kept: stored.kept(wish.head, now),
                refresh: self.refresh(asked, wish, stored, now),
            };
        }
        count(&self.misses);
        let conditions = stored.answer.conditions();
        if conditions.is_empty() {
            return Look::Miss;
        }
        Look::Validate {
            kept: stored.kept(wish.head, now),
            conditions: if wish.conditional {
                HeaderMap::new()
            } else {
                conditions
            },
        }
    }

    /// An answer in place of a failure, or of a service that is not to be asked: a fresh one, or one that is past its
    /// freshness no longer than `max_stale`, or else as it says itself, or else as policy says. Those with
    /// must-revalidate, proxy-revalidate or no-cache are not given when stale, those with s-maxage no longer than
    /// their own stale-if-error says (RFC 9111 §4.2.4).
    ///
    /// What the client says of freshness is not heeded: it would get nothing otherwise.
    pub fn stale(&self, asked: &Asked<'_>, max_stale: Option<Duration>, now: SystemTime) -> Option<Kept> {
        let wish = asked.wish()?;
        let (found, window) = {
            let mut store = self.store();
            let found = store.find(&wish.key, asked.headers);
            (found, store.settings().stale_if_error)
        };
        let stored = found.filter(|stored| stored.answer.if_error(now, max_stale, window))?;
        count(&self.stale);
        Some(stored.kept(wish.head, now))
    }

    /// Makes a request the one that asks the service, or one that waits for it.
    ///
    /// Waiting is for requests that may get the same answer; those that want more than a fresh one, and those for
    /// what turned out not to be shared a short while ago, ask beside each other.
    pub fn join(self: &Arc<Self>, asked: &Asked<'_>, now: SystemTime) -> Joined {
        let Some(wish) = asked.wish() else {
            return Joined::Lead(Fill::idle());
        };
        let hash = self.hasher.hash_one(&*wish.key);
        let mut store = self.store();
        let found = store.find(&wish.key, asked.headers);
        if let Some(stored) = found.as_ref().filter(|stored| is_taken(stored, &wish, now)) {
            let stored = stored.clone();
            drop(store);
            count(&self.hits);
            return Joined::Fresh(stored.kept(wish.head, now));
        }
        let stamp = store.stamp(hash);
        let mut flight = None;
        if store.settings().coalesce && !wish.is_particular() && !store.passes(hash, now) {
            let key = flight_key(&store, &wish.key, asked.headers);
            if let Some(other) = store.flights.get(&key).filter(|other| other.stamp == stamp) {
                let other = Arc::clone(other);
                drop(store);
                return Joined::Wait(other.waiter(Arc::clone(self), key, asked.headers.clone(), wish.head));
            }
            // Nobody could use the answer to a HEAD, or a 304.
            if !wish.head && !wish.conditional {
                flight = Some(take_off(&mut store, key, stamp));
            }
        }
        drop(store);
        Joined::Lead(self.begin(asked, &wish, found, Ticket { hash, stamp, flight }, now))
    }

    /// A request was answered with `status`. If it may have changed something (RFC 9111 §4.4: an unsafe method, and
    /// no error), what is kept of its target is forgotten, and what is on its way is not kept. Other targets that the
    /// answer names are not touched.
    pub fn invalidate(&self, asked: &Asked<'_>, status: StatusCode) {
        if asked.method.is_safe() || status.is_client_error() || status.is_server_error() {
            return;
        }
        let Some(key) = asked.key() else {
            return;
        };
        let hash = self.hasher.hash_one(&*key);
        let gone = {
            let mut store = self.store();
            store.invalidate(hash);
            store.take(&key)
        };
        drop(gone);
    }

    pub(crate) fn adopt(&self, settings: &model::Cache) {
        let mut store = self.store();
        if store.settings() != settings {
            let gone = store.adopt(settings);
            drop(store);
            drop(gone);
        }
    }

    pub(crate) fn reading(&self) -> CacheReading {
        let store = self.store();
        let (entries, bytes, evicted) = (store.entries(), store.bytes(), store.evicted());
        drop(store);
        CacheReading {
            rule: Arc::clone(&self.rule),
            entries,
            bytes,
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            stale: self.stale.load(Ordering::Relaxed),
            coalesced: self.coalesced.load(Ordering::Relaxed),
            evicted,
        }
    }

    pub(crate) fn settings(&self) -> model::Cache {
        *self.store().settings()
    }

    pub(crate) fn count_coalesced(&self) {
        count(&self.coalesced);
    }

    /// Ends a flight with an answer that is kept, unless it has become invalid. The result is for the caller to drop.
    pub(crate) fn keep(&self, part: &Part, stored: Stored, held: u64) -> Vec<Group> {
        let mut store = self.store();
        store.release(held);
        let fits = stored.text() <= store.settings().max_object_bytes;
        let gone = if fits && store.stamp(part.hash) == part.stamp {
            store.insert(&part.target, &part.asked, stored)
        } else {
            Vec::new()
        };
        if let Some((key, flight)) = &part.flight {
            end(&mut store, key, flight);
        }
        gone
    }

    pub(crate) fn forget(&self, target: &[u8], asked: &HeaderMap) {
        let gone = self.store().remove(target, asked);
        drop(gone);
    }

    pub(crate) fn hold(&self, bytes: u64) -> bool {
        let mut gone = Vec::new();
        let fits = self.store().hold(bytes, &mut gone);
        drop(gone);
        fits
    }

    pub(crate) fn release(&self, bytes: u64) {
        self.store().release(bytes);
    }

    pub(crate) fn pass(&self, hash: u64, now: SystemTime) {
        if let Some(until) = now.checked_add(PASS_FOR) {
            self.store().pass_until(hash, until);
        }
    }

    pub(crate) fn land(&self, key: &FlightKey, flight: &Arc<Flight>) {
        end(&mut self.store(), key, flight);
    }

    /// The right to fetch a fresh answer, if nobody has it.
    fn refresh(
        self: &Arc<Self>,
        asked: &Asked<'_>,
        mut wish: Wish,
        stored: Stored,
        now: SystemTime,
    ) -> Option<Fill> {
        if wish.head {
            return None;
        }
        let hash = self.hasher.hash_one(&*wish.key);
        let mut store = self.store();
        let stamp = store.stamp(hash);
        let key = flight_key(&store, &wish.key, asked.headers);
        if store.flights.get(&key).is_some_and(|other| other.stamp == stamp) {
            return None;
        }
        let flight = Some(take_off(&mut store, key, stamp));
        drop(store);
        wish.conditional = false;
        Some(self.begin(asked, &wish, Some(stored), Ticket { hash, stamp, flight }, now))
    }

    fn begin(
        self: &Arc<Self>,
        asked: &Asked<'_>,
        wish: &Wish,
        found: Option<Stored>,
        ticket: Ticket,
        now: SystemTime,
    ) -> Fill {
        Fill::new(Part {
            cache: Arc::clone(self),
            target: wish.key.as_slice().into(),
            hash: ticket.hash,
            asked: asked.headers.clone(),
            asked_at: now,
            head: wish.head,
            // Without a validator there is nothing to confirm it by.
            base: found.filter(|stored| !wish.conditional && stored.answer.has_validator()),
            stamp: ticket.stamp,
            flight: ticket.flight,
            held: 0,
            coming: None,
        })
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        // Poison is harmless: nothing in there panics half-way.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_taken(stored: &Stored, wish: &Wish, now: SystemTime) -> bool {
    let left = stored.answer.left(now);
    !left.is_zero() && wish.takes(stored.answer.age(now), left)
}

/// Whom a request may wait for: one for the same target, with the same values of the fields that select among what is
/// kept of it, and credentials of the same kinds, since an answer to the one without is seldom for the one with.
fn flight_key(store: &Store, target: &[u8], asked: &HeaderMap) -> FlightKey {
    let mut selected = std::hash::DefaultHasher::new();
    asked.contains_key(header::AUTHORIZATION).hash(&mut selected);
    asked.contains_key(header::COOKIE).hash(&mut selected);
    if let Some(newest) = store.newest(target) {
        for name in newest.answer.selecting() {
            for value in asked.get_all(name) {
                value.as_bytes().hash(&mut selected);
            }
            selected.write_u8(0xff);
        }
    }
    FlightKey {
        target: target.into(),
        selected: selected.finish(),
    }
}

fn take_off(store: &mut Store, key: FlightKey, stamp: u64) -> (FlightKey, Arc<Flight>) {
    let flight = Arc::new(Flight::new(stamp));
    store.flights.insert(key.clone(), Arc::clone(&flight));
    (key, flight)
}

/// Takes a flight off the list, unless another is in its place.
fn end(store: &mut Store, key: &FlightKey, flight: &Arc<Flight>) {
    if store
        .flights
        .get(key)
        .is_some_and(|other| Arc::ptr_eq(other, flight))
    {
        store.flights.remove(key);
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

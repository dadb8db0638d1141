//! What a rule keeps, and what is on its way, by bytes.

use crate::answer::Stored;
use crate::flight::Flight;
use http::HeaderMap;
use leeward_policy::model;
use lru::LruCache;
use std::collections::HashMap;
use std::hash::RandomState;
use std::sync::Arc;
use std::time::SystemTime;

/// Answers that are kept for the same target, one for each set of values of the fields that Vary names; the oldest
/// goes first.
pub const MAX_VARIANTS: usize = 16;

/// What a target takes beside its answers and the bytes of its name, in bytes.
const TARGET: u64 = 256;
/// Places for what is remembered of targets whether or not anything is kept of them.
const PLACES: usize = 256;

/// The answers for a target, the newest last.
pub(crate) type Group = Vec<Stored>;

/// Not shared: [`crate::RuleCache`] has the lock.
#[derive(Debug)]
pub(crate) struct Store {
    settings: model::Cache,
    groups: LruCache<Box<[u8]>, Group, RandomState>,
    /// What is kept, and what fills hold.
    bytes: u64,
    entries: u64,
    evicted: u64,
    /// Who is asking the service. Each has a [`crate::Fill`], so that requests under way bound them.
    pub(crate) flights: HashMap<FlightKey, Arc<Flight>, RandomState>,
    places: Box<[Place]>,
}

/// Requests that may get the same answer.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) struct FlightKey {
    pub(crate) target: Box<[u8]>,
    /// Of the fields that are known to select among the target's answers.
    pub(crate) selected: u64,
}

/// What is remembered of the targets whose hash leads here. Another target's costs an answer that isn't kept, or
/// requests that don't wait for each other.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Counts what made kept answers invalid.
    invalidated: u64,
    /// Of which target the next is.
    hash: u64,
    /// Until when its requests don't wait for each other.
    pass_until: SystemTime,
}

impl Store {
    pub(crate) fn new(settings: model::Cache) -> Self {
        let place = Place {
            invalidated: 0,
            hash: 0,
            pass_until: SystemTime::UNIX_EPOCH,
        };
        Self {
            settings,
            groups: LruCache::unbounded_with_hasher(RandomState::new()),
            bytes: 0,
            entries: 0,
            evicted: 0,
            flights: HashMap::default(),
            places: vec![place; PLACES].into(),
        }
    }

    pub(crate) const fn settings(&self) -> &model::Cache {
        &self.settings
    }

    /// Takes over settings. The result is what doesn't fit any more, for the caller to drop.
    pub(crate) fn adopt(&mut self, settings: &model::Cache) -> Vec<Group> {
        self.settings = *settings;
        let mut gone = Vec::new();
        self.make_room(0, &mut gone);
        gone
    }

    pub(crate) const fn entries(&self) -> u64 {
        self.entries
    }

    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) const fn evicted(&self) -> u64 {
        self.evicted
    }

    /// The newest answer for a request, which is used with that.
    pub(crate) fn find(&mut self, target: &[u8], asked: &HeaderMap) -> Option<Stored> {
        let group = self.groups.get(target)?;
        group
            .iter()
            .rev()
            .find(|stored| stored.answer.serves(asked))
            .cloned()
    }

    /// The newest answer for a target.
    pub(crate) fn newest(&self, target: &[u8]) -> Option<&Stored> {
        self.groups.peek(target)?.last()
    }

    /// Keeps an answer in place of those for the same request, if there can be room. The result is what had to go,
    /// for the caller to drop.
    pub(crate) fn insert(&mut self, target: &[u8], asked: &HeaderMap, stored: Stored) -> Vec<Group> {
        let mut gone = Vec::new();
        let mut group = self.take(target);
        let (old, mut group): (Group, Group) = group.drain(..).partition(|old| old.answer.selects(asked));
        gone.push(old);
        while group.len() >= MAX_VARIANTS {
            gone.push(vec![group.remove(0)]);
            self.evicted += 1;
        }
        let name = TARGET + target.len() as u64;
        let size = stored.size();
        loop {
            let need = name + size + group.iter().map(Stored::size).sum::<u64>();
            if self.make_room(need, &mut gone) {
                group.push(stored);
                self.bytes += need;
                self.entries += group.len() as u64;
                self.groups.put(target.into(), group);
                return gone;
            }
            if group.is_empty() {
                gone.push(vec![stored]);
                return gone;
            }
            gone.push(vec![group.remove(0)]);
            self.evicted += 1;
        }
    }

    /// Forgets the answers for a request. The result is for the caller to drop.
    pub(crate) fn remove(&mut self, target: &[u8], asked: &HeaderMap) -> Group {
        let mut group = self.take(target);
        let (gone, group): (Group, Group) = group.drain(..).partition(|old| old.answer.selects(asked));
        if !group.is_empty() {
            // It was there a moment ago, so that there is room.
            self.bytes += size(target, &group);
            self.entries += group.len() as u64;
            self.groups.put(target.into(), group);
        }
        gone
    }

    /// Forgets all answers for a target. The result is for the caller to drop.
    pub(crate) fn take(&mut self, target: &[u8]) -> Group {
        let Some(group) = self.groups.pop(target) else {
            return Group::new();
        };
        self.bytes -= size(target, &group);
        self.entries -= group.len() as u64;
        group
    }

    /// Lets a fill hold `bytes` more, if there can be room.
    pub(crate) fn hold(&mut self, bytes: u64, gone: &mut Vec<Group>) -> bool {
        let fits = self.make_room(bytes, gone);
        if fits {
            self.bytes += bytes;
        }
        fits
    }

    /// A fill no longer holds `bytes`.
    pub(crate) const fn release(&mut self, bytes: u64) {
        self.bytes -= bytes;
    }

    /// What is kept and least recently used goes until `bytes` fit.
    fn make_room(&mut self, bytes: u64, gone: &mut Vec<Group>) -> bool {
        let max = self.settings.max_bytes;
        if bytes > max {
            return false;
        }
        while self.bytes > max - bytes {
            let Some((target, group)) = self.groups.pop_lru() else {
                return false;
            };
            self.bytes -= size(&target, &group);
            self.entries -= group.len() as u64;
            self.evicted += group.len() as u64;
            gone.push(group);
        }
        true
    }

    /// A count that is another one once answers of a target have become invalid.
    pub(crate) fn stamp(&self, hash: u64) -> u64 {
        self.places.get(place(hash)).map_or(0, |place| place.invalidated)
    }

    /// Answers of a target that are on their way are invalid.
    pub(crate) fn invalidate(&mut self, hash: u64) {
        if let Some(place) = self.places.get_mut(place(hash)) {
            place.invalidated += 1;
        }
    }

    /// Whether requests for a target don't wait for each other now.
    pub(crate) fn passes(&self, hash: u64, now: SystemTime) -> bool {
        self.places
            .get(place(hash))
            .is_some_and(|place| place.hash == hash && now < place.pass_until)
    }

    /// They don't until then.
    pub(crate) fn pass_until(&mut self, hash: u64, until: SystemTime) {
        if let Some(place) = self.places.get_mut(place(hash)) {
            place.hash = hash;
            place.pass_until = until;
        }
    }
}

/// What a target and its answers take, in bytes.
fn size(target: &[u8], group: &[Stored]) -> u64 {
    TARGET + target.len() as u64 + group.iter().map(Stored::size).sum::<u64>()
}

fn place(hash: u64) -> usize {
    usize::try_from(hash % PLACES as u64).unwrap_or_default()
}

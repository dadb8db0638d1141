//! A plugin's key-value store: bounded, with expiry; what has expired goes first, then the least recently used.

use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

/// Bytes of a key.
const MAX_KEY: usize = 256;
/// What an entry takes beside its key and value, in bytes: its places in three trees.
const OVERHEAD: u64 = 160;

/// What a plugin keeps on a node.
#[derive(Debug)]
pub(crate) struct Store {
    max_bytes: u64,
    max_entries: usize,
    bytes: u64,
    entries: BTreeMap<Arc<str>, Entry>,
    /// By when they were last used.
    recent: BTreeMap<u64, Arc<str>>,
    /// By when they expire.
    expiring: BTreeSet<(Instant, Arc<str>)>,
    /// Uses so far.
    uses: u64,
    /// Changes so far; never 0 for an entry.
    changes: u32,
}

#[derive(Debug)]
struct Entry {
    value: Bytes,
    until: Option<Instant>,
    used: u64,
    change: u32,
}

/// Why an entry isn't kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum StoreError {
    /// It doesn't fit the store by itself, or its key is none.
    #[error("the key has no or more than {MAX_KEY} bytes, or the entry doesn't fit the store by itself")]
    TooLarge,
    /// It is to be counted up, and is no number.
    #[error("the value is not a number")]
    NotANumber,
    /// It has changed since it was read.
    #[error("the entry has changed since it was read")]
    Changed,
}

impl Store {
    /// An empty store.
    pub(crate) const fn new(bytes: u64, entries: u32) -> Self {
        Self {
            max_bytes: bytes,
            max_entries: entries as usize,
            bytes: 0,
            entries: BTreeMap::new(),
            recent: BTreeMap::new(),
            expiring: BTreeSet::new(),
            uses: 0,
            changes: 0,
        }
    }

    /// Has other bounds from now on.
    pub(crate) fn resize(&mut self, bytes: u64, entries: u32) {
        (self.max_bytes, self.max_entries) = (bytes, entries as usize);
        self.make_room(0, 0);
    }

    /// The value under a key, and the number of its last change.
    pub(crate) fn get(&mut self, key: &str, now: Instant) -> Option<(Bytes, u32)> {
        if self.entries.get(key)?.has_expired(now) {
            self.delete(key);
            return None;
        }
        self.uses += 1;
        let entry = self.entries.get_mut(key)?;
        if let Some(key) = self.recent.remove(&entry.used) {
            self.recent.insert(self.uses, key);
        }
        entry.used = self.uses;
        Some((entry.value.clone(), entry.change))
    }

    /// Keeps a value; with `change`, only if what is there (if anything is) was last changed by that.
    ///
    /// # Errors
    ///
    /// [`StoreError::TooLarge`] and [`StoreError::Changed`]; what was there stays.
    pub(crate) fn set(
        &mut self,
        key: &str,
        value: Bytes,
        until: Option<Instant>,
        change: Option<u32>,
        now: Instant,
    ) -> Result<(), StoreError> {
        let size = size(key, &value);
        if key.is_empty() || key.len() > MAX_KEY || size > self.max_bytes || self.max_entries == 0 {
            return Err(StoreError::TooLarge);
        }
        if let (Some(want), Some((_, is))) = (change, self.get(key, now))
            && want != is
        {
            return Err(StoreError::Changed);
        }
        self.delete(key);
        self.expire(now);
        self.make_room(size, 1);
        self.uses += 1;
        self.changes = self.changes.checked_add(1).unwrap_or(1);
        let key = Arc::<str>::from(key);
        self.recent.insert(self.uses, Arc::clone(&key));
        if let Some(until) = until {
            self.expiring.insert((until, Arc::clone(&key)));
        }
        self.bytes += size;
        let entry = Entry {
            value,
            until,
            used: self.uses,
            change: self.changes,
        };
        self.entries.insert(key, entry);
        Ok(())
    }

    /// Forgets a value; whether there was one.
    pub(crate) fn delete(&mut self, key: &str) -> bool {
        let Some((key, entry)) = self.entries.remove_entry(key) else {
            return false;
        };
        self.bytes = self.bytes.saturating_sub(size(&key, &entry.value));
        self.recent.remove(&entry.used);
        if let Some(until) = entry.until {
            self.expiring.remove(&(until, key));
        }
        true
    }

    /// Adds to a number, from 0 where there is none, and gives the sum, which stops at the ends of its range. `until`
    /// is for a number that begins here.
    ///
    /// # Errors
    ///
    /// [`StoreError::NotANumber`] and [`StoreError::TooLarge`]; what was there stays.
    pub(crate) fn increment(
        &mut self,
        key: &str,
        by: i64,
        until: Option<Instant>,
        now: Instant,
    ) -> Result<i64, StoreError> {
        let (before, until) = match self.get(key, now) {
            None => (0, until),
            Some((value, _)) => {
                let text = str::from_utf8(&value).map_err(|_| StoreError::NotANumber)?;
                let number: i64 = text.parse().map_err(|_| StoreError::NotANumber)?;
                (number, self.entries.get(key).and_then(|entry| entry.until))
            }
        };
        let sum = before.saturating_add(by);
        self.set(key, sum.to_string().into(), until, None, now)?;
        Ok(sum)
    }

    /// Keys that begin so, in order.
    pub(crate) fn keys(&self, prefix: &str, limit: usize, now: Instant) -> Vec<Arc<str>> {
        let from = (std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded);
        self.entries
            .range::<str, _>(from)
            .take_while(|(key, _)| key.starts_with(prefix))
            .filter(|(_, entry)| !entry.has_expired(now))
            .take(limit)
            .map(|(key, _)| Arc::clone(key))
            .collect()
    }

    /// All that it has, by key.
    pub(crate) fn entries(&self, now: Instant) -> Vec<(Arc<str>, Bytes)> {
        let entries = self.entries.iter().filter(|(_, entry)| !entry.has_expired(now));
        entries
            .map(|(key, entry)| (Arc::clone(key), entry.value.clone()))
            .collect()
    }

    fn expire(&mut self, now: Instant) {
        while let Some((until, key)) = self.expiring.first()
            && *until <= now
        {
            let key = Arc::clone(key);
            self.delete(&key);
        }
    }

    /// Drops the least recently used until there is room for so much more.
    fn make_room(&mut self, bytes: u64, entries: usize) {
        while self.bytes + bytes > self.max_bytes || self.entries.len() + entries > self.max_entries {
            let Some((_, key)) = self.recent.pop_first() else {
                break;
            };
            self.delete(&key);
        }
    }
}

impl Entry {
    fn has_expired(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}

/// What an entry takes, in bytes.
const fn size(key: &str, value: &Bytes) -> u64 {
    // Lengths fit.
    key.len() as u64 + value.len() as u64 + OVERHEAD
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    #[expect(clippy::disallowed_methods, reason = "an arbitrary beginning of time")]
    fn beginning() -> Instant {
        Instant::now()
    }

    fn store(entries: u32) -> (Store, Instant) {
        (Store::new(1 << 20, entries), beginning())
    }

    fn text(value: Option<(Bytes, u32)>) -> Option<String> {
        value.map(|(value, _)| String::from_utf8(value.to_vec()).unwrap())
    }

    #[test]
    fn what_is_too_large_by_itself_is_refused_and_costs_nothing() {
        let now = beginning();
        let mut store = Store::new(OVERHEAD + 10, 8);
        store.set("a", "123456789".into(), None, None, now).unwrap();
        let large = store.set("a", "1234567890".into(), None, None, now);
        assert_eq!(large, Err(StoreError::TooLarge));
        assert_eq!(text(store.get("a", now)).as_deref(), Some("123456789"));
        for key in ["", &"k".repeat(257)] {
            assert_eq!(
                store.set(key, Bytes::new(), None, None, now),
                Err(StoreError::TooLarge)
            );
        }
        let mut none = Store::new(1 << 20, 0);
        assert_eq!(
            none.set("a", Bytes::new(), None, None, now),
            Err(StoreError::TooLarge)
        );
    }

    #[test]
    fn a_change_that_was_not_seen_is_not_lost() {
        let (mut store, now) = store(8);
        store.set("a", "1".into(), None, Some(77), now).unwrap();
        let (_, change) = store.get("a", now).unwrap();
        store.set("a", "2".into(), None, Some(change), now).unwrap();
        let late = store.set("a", "3".into(), None, Some(change), now);
        assert_eq!(late, Err(StoreError::Changed));
        assert_eq!(text(store.get("a", now)).as_deref(), Some("2"));
    }

    #[test]
    fn numbers_count_and_keep_their_expiry() {
        let (mut store, now) = store(8);
        let later = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(store.increment("n", 5, Some(later(10)), now), Ok(5));
        assert_eq!(store.increment("n", -7, Some(later(99)), later(5)), Ok(-2));
        assert_eq!(store.increment("n", 1, None, later(10)), Ok(1), "begins anew");
        assert_eq!(store.increment("n", i64::MAX, None, later(10)), Ok(i64::MAX));
        store.set("t", "x".into(), None, None, now).unwrap();
        assert_eq!(store.increment("t", 1, None, now), Err(StoreError::NotANumber));
        assert_eq!(text(store.get("t", now)).as_deref(), Some("x"));
    }

    #[test]
    fn smaller_bounds_hold_at_once() {
        let (mut store, now) = store(8);
        for key in ["a", "b", "c"] {
            store.set(key, "1".into(), None, None, now).unwrap();
        }
        store.get("a", now);
        store.resize(1 << 20, 2);
        assert_eq!(store.keys("", 9, now), ["a".into(), "c".into()] as [Arc<str>; 2]);
        store.resize(0, 2);
        assert_eq!((store.bytes, store.entries.len()), (0, 0));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Get(u8),
        Set(u8, u8, Option<u8>),
        Delete(u8),
        Keys(u8),
        Wait(u8),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..12u8).prop_map(Op::Get),
            (0..12u8, any::<u8>(), proptest::option::of(1..20u8)).prop_map(|(k, v, t)| Op::Set(k, v, t)),
            (0..12u8).prop_map(Op::Delete),
            (0..3u8).prop_map(Op::Keys),
            (0..15u8).prop_map(Op::Wait),
        ]
    }

    /// The same in the plainest way: the most recently used last.
    #[derive(Default)]
    struct Model(Vec<(String, u8, Option<Instant>)>);

    impl Model {
        fn expire(&mut self, now: Instant) {
            self.0
                .retain(|(_, _, until)| until.is_none_or(|until| until > now));
        }
    }

    proptest! {
        #[test]
        fn it_is_what_the_model_is(ops in proptest::collection::vec(op(), 1..200)) {
            const ENTRIES: usize = 5;
            let (mut store, mut now) = store(5);
            let mut model = Model::default();
            let name = |key: u8| format!("{}/{key}", key % 3);
            for op in ops {
                match op {
                    Op::Wait(by) => now += Duration::from_millis(by.into()),
                    Op::Get(key) => {
                        let got = store.get(&name(key), now).map(|(value, _)| value[0]);
                        model.expire(now);
                        let at = model.0.iter().position(|(k, ..)| *k == name(key));
                        let want = at.map(|at| {
                            let entry = model.0.remove(at);
                            model.0.push(entry.clone());
                            entry.1
                        });
                        prop_assert_eq!(got, want);
                    }
                    Op::Set(key, value, ttl) => {
                        let until = ttl.map(|ttl| now + Duration::from_millis(ttl.into()));
                        store.set(&name(key), vec![value].into(), until, None, now).unwrap();
                        model.expire(now);
                        model.0.retain(|(k, ..)| *k != name(key));
                        if model.0.len() == ENTRIES {
                            model.0.remove(0);
                        }
                        model.0.push((name(key), value, until));
                    }
                    Op::Delete(key) => {
                        store.delete(&name(key));
                        model.0.retain(|(k, ..)| *k != name(key));
                    }
                    Op::Keys(prefix) => {
                        let prefix = format!("{prefix}/");
                        let got: Vec<_> = store.keys(&prefix, 2, now).iter().map(ToString::to_string).collect();
                        model.expire(now);
                        let mut want: Vec<_> =
                            model.0.iter().map(|(k, ..)| k.clone()).filter(|k| k.starts_with(&prefix)).collect();
                        want.sort();
                        want.truncate(2);
                        prop_assert_eq!(got, want);
                    }
                }
                prop_assert!(store.entries.len() <= ENTRIES);
                prop_assert_eq!(store.entries.len(), store.recent.len());
                let bytes: u64 = store.entries.iter().map(|(k, e)| size(k, &e.value)).sum();
                prop_assert_eq!(bytes, store.bytes);
                let expiring = store.entries.values().filter(|e| e.until.is_some()).count();
                prop_assert_eq!(expiring, store.expiring.len());
            }
        }
    }
}

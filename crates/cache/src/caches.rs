//! The caches of a proxy.

use crate::rule::RuleCache;
use leeward_policy::model;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

/// A cache for each rule that has one, keyed by the rule's id, so that what is kept outlives a snapshot. Shared by a
/// proxy's threads.
#[derive(Debug, Default)]
pub struct Caches(RwLock<HashMap<Arc<str>, Arc<RuleCache>>>);

/// What a rule's cache holds, and what it did since it was made.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CacheReading {
    /// The rule's id.
    pub rule: Arc<str>,
    /// Answers that are kept.
    pub entries: u64,
    /// What they take, and those on their way in, in bytes.
    pub bytes: u64,
    /// Requests that got a fresh answer.
    pub hits: u64,
    /// Requests that had to be answered by the service, or by what it confirmed.
    pub misses: u64,
    /// Requests that got a stale answer.
    pub stale: u64,
    /// Requests that got the answer to another's.
    pub coalesced: u64,
    /// Answers that had to go for others.
    pub evicted: u64,
}

impl Caches {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The cache of a rule. It is made if there is none, and takes over settings that are others: what is kept stays
    /// as far as it fits, and as long as it was to be fresh.
    pub fn rule(&self, id: &Arc<str>, settings: &model::Cache) -> Arc<RuleCache> {
        // Poison is harmless, here and below: caches are added and removed whole.
        let found = self
            .0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)
            .cloned();
        let cache = found.unwrap_or_else(|| {
            let mut caches = self.0.write().unwrap_or_else(PoisonError::into_inner);
            let made = || Arc::new(RuleCache::new(Arc::clone(id), *settings));
            Arc::clone(caches.entry(Arc::clone(id)).or_insert_with(made))
        });
        cache.adopt(settings);
        cache
    }

    /// Forgets the caches of rules that are gone.
    pub fn retain(&self, ids: impl Fn(&str) -> bool) {
        let mut caches = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<_> = caches.extract_if(|id, _| !ids(id)).collect();
        drop(caches);
        // What they hold is freed without the lock.
        drop(gone);
    }

    /// What all caches hold, by rule.
    pub fn readings(&self) -> Vec<CacheReading> {
        let caches: Vec<_> = self
            .0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect();
        let mut readings: Vec<_> = caches.iter().map(|cache| cache.reading()).collect();
        readings.sort_by(|a, b| a.rule.cmp(&b.rule));
        readings
    }
}

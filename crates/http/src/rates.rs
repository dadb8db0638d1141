//! Rate limits at run time: the buckets of every rule, shared by the workers.

use dashmap::DashMap;
use leeward_policy::RuleView;
use leeward_policy::model::{RateLimit, RateLimitKey};
use leeward_resilience::{Gcra, Rate};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The buckets of one proxy. They outlive every snapshot that leaves their limit as it is.
#[derive(Debug)]
pub struct Rates {
    origin: Instant,
    limits: DashMap<(Arc<str>, usize), Arc<Limit>>,
    hasher: RandomState,
}

/// One limit of one rule.
#[derive(Debug)]
struct Limit {
    settings: RateLimit,
    rate: Rate,
    shared: Gcra,
    keyed: DashMap<u64, Gcra>,
    keys: AtomicUsize,
}

/// What of a request limits may be about.
pub(crate) trait Who {
    /// What names the caller.
    fn caller(&self) -> &[u8];
    /// The first value of a header.
    fn header(&self, name: &str) -> Option<&[u8]>;
}

impl Rates {
    /// No buckets; times are counted from `now`.
    pub fn new(now: Instant) -> Self {
        Self {
            origin: now,
            limits: DashMap::new(),
            hasher: RandomState::new(),
        }
    }

    /// Asks every limit of a rule. What limits before the one that refuses have let pass stays taken: a
    /// request that is refused is a request all the same.
    ///
    /// # Errors
    ///
    /// How long it is until the limit that refuses lets one pass.
    pub(crate) fn admit(&self, rule: &RuleView, who: &impl Who, now: Instant) -> Result<(), Duration> {
        let since = now.saturating_duration_since(self.origin).as_nanos();
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        for (position, settings) in rule.rate_limits.iter().enumerate() {
            let limit = self.limit(&rule.id, position, settings);
            let key = match &settings.key {
                RateLimitKey::Rule => None,
                RateLimitKey::Caller { max_keys } => Some((who.caller(), *max_keys)),
                RateLimitKey::Header { name, max_keys } => who.header(name).map(|value| (value, *max_keys)),
            };
            match key {
                None => limit.shared.admit(since, limit.rate)?,
                Some((value, max)) => limit.admit_key(self.hasher.hash_one(value), max, since)?,
            }
        }
        Ok(())
    }

    fn limit(&self, rule: &Arc<str>, position: usize, settings: &RateLimit) -> Arc<Limit> {
        let key = (Arc::clone(rule), position);
        if let Some(limit) = self.limits.get(&key)
            && limit.settings == *settings
        {
            return Arc::clone(&limit);
        }
        let limit = Arc::new(Limit {
            settings: settings.clone(),
            rate: Rate::of(settings),
            shared: Gcra::new(),
            keyed: DashMap::new(),
            keys: AtomicUsize::new(0),
        });
        self.limits.insert(key, Arc::clone(&limit));
        limit
    }

    /// Forgets buckets that are full, which are as good as new, and limits that policy no longer has. Call now
    /// and then.
    pub fn sweep(&self, rules: &[RuleView], now: Instant) {
        let since = now.saturating_duration_since(self.origin).as_nanos();
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        let known: std::collections::HashMap<&str, usize> = rules
            .iter()
            .map(|rule| (&*rule.id, rule.rate_limits.len()))
            .collect();
        self.limits
            .retain(|(rule, position), _| known.get(&**rule).is_some_and(|limits| position < limits));
        for limit in &self.limits {
            limit.keyed.retain(|_, bucket| {
                let used = !bucket.is_full(since);
                if !used {
                    limit.keys.fetch_sub(1, Ordering::Relaxed);
                }
                used
            });
        }
    }
}

impl Limit {
    fn admit_key(&self, key: u64, max: u32, since: u64) -> Result<(), Duration> {
        if let Some(bucket) = self.keyed.get(&key) {
            return bucket.admit(since, self.rate);
        }
        // A key that finds no room shares a bucket with the others that don't, so that no flood of keys passes
        // unlimited.
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        if self.keys.fetch_add(1, Ordering::Relaxed) >= max {
            self.keys.fetch_sub(1, Ordering::Relaxed);
            return self.shared.admit(since, self.rate);
        }
        match self.keyed.entry(key) {
            dashmap::Entry::Occupied(known) => {
                self.keys.fetch_sub(1, Ordering::Relaxed);
                known.get().admit(since, self.rate)
            }
            dashmap::Entry::Vacant(place) => place.insert(Gcra::new()).admit(since, self.rate),
        }
    }
}

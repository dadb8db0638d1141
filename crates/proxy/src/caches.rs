//! Answers that are kept: for metrics.

use leeward_cache::Caches;
use leeward_telemetry::Reading;
use leeward_telemetry::catalogue::{CACHE_BYTES, CACHE_ENTRIES, CACHE_TOTAL};
use std::sync::Arc;

/// Gauges and counts, as of now.
pub(crate) fn readings(caches: &Caches) -> Vec<Reading> {
    let mut readings = Vec::new();
    for cache in caches.readings() {
        let mut add = |metric, result: Option<&str>, count: u64| {
            let labels = std::iter::once(Arc::clone(&cache.rule)).chain(result.map(Arc::from));
            #[expect(clippy::cast_precision_loss, reason = "a metric's value; exact to 2^53")]
            let value = count as f64;
            readings.push(Reading {
                metric,
                labels: labels.collect(),
                value,
            });
        };
        add(CACHE_ENTRIES, None, cache.entries);
        add(CACHE_BYTES, None, cache.bytes);
        for (result, count) in [
            ("hit", cache.hits),
            ("miss", cache.misses),
            ("stale", cache.stale),
            ("coalesced", cache.coalesced),
            ("evicted", cache.evicted),
        ] {
            add(CACHE_TOTAL, Some(result), count);
        }
    }
    readings
}

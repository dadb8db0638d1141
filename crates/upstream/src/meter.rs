//! What triggers look at: calls, failures and latencies, counted only while policy has a trigger for the service.

use leeward_resilience::degrade::{LATENCY_BUCKETS, SignalSample, latency_bucket};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Counts calls since it was last drained. While it is off a call costs one load.
///
/// Relaxed throughout: each count is read for itself. One that is drained in the midst of a call may have its failure
/// in the next sample.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    on: AtomicBool,
    /// Made when it is first turned on: most services have no trigger.
    cells: OnceLock<Box<Cells>>,
}

#[derive(Debug)]
struct Cells {
    calls: AtomicU64,
    failures: AtomicU64,
    latencies: [AtomicU64; LATENCY_BUCKETS],
}

impl Meter {
    /// Counts from now on, or no longer. What was counted before it was off is forgotten.
    pub(crate) fn turn(&self, on: bool) {
        if on && !self.on.load(Ordering::Relaxed) {
            let cells = self.cells.get_or_init(|| Box::new(Cells::new()));
            cells.drain();
        }
        self.on.store(on, Ordering::Relaxed);
    }

    /// A call has ended. `took` is the time to its answer's head, or until it was given up; `None` if it failed
    /// before that says anything.
    pub(crate) fn ended(&self, failed: bool, took: Option<Duration>) {
        if !self.on.load(Ordering::Relaxed) {
            return;
        }
        let Some(cells) = self.cells.get() else {
            return;
        };
        cells.calls.fetch_add(1, Ordering::Relaxed);
        if failed {
            cells.failures.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(bucket) = took.and_then(|took| cells.latencies.get(latency_bucket(took))) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What it has counted since the last time; `None` while it is off.
    pub(crate) fn drain(&self) -> Option<SignalSample> {
        let cells = self.cells.get().filter(|_| self.on.load(Ordering::Relaxed))?;
        Some(cells.drain())
    }
}

impl Cells {
    fn new() -> Self {
        Self {
            calls: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            latencies: [const { AtomicU64::new(0) }; LATENCY_BUCKETS],
        }
    }

    fn drain(&self) -> SignalSample {
        let take = |cell: &AtomicU64| cell.swap(0, Ordering::Relaxed);
        SignalSample {
            calls: take(&self.calls),
            failures: take(&self.failures),
            latencies: std::array::from_fn(|bucket| self.latencies.get(bucket).map_or(0, take)),
            ..SignalSample::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_only_while_it_is_on() {
        let meter = Meter::default();
        meter.ended(true, None);
        assert_eq!(meter.drain(), None);
        meter.turn(true);
        meter.ended(true, None);
        meter.ended(false, Some(Duration::from_millis(2)));
        // What is on already goes on.
        meter.turn(true);
        let sample = meter.drain().unwrap();
        assert_eq!((sample.calls, sample.failures), (2, 1));
        assert_eq!(sample.latencies.iter().sum::<u64>(), 1);
        assert_eq!(sample.latencies[latency_bucket(Duration::from_millis(2))], 1);
        assert_eq!(meter.drain().unwrap().calls, 0);
        meter.ended(true, None);
        meter.turn(false);
        meter.ended(true, None);
        assert_eq!(meter.drain(), None);
        meter.turn(true);
        assert_eq!(meter.drain().unwrap().calls, 0);
    }
}

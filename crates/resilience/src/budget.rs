//! A bound on retries that holds for all of a destination's requests together.

use crate::sync::{Mutex, PoisonError};
use crate::window::Window;
use leeward_policy::model::RetryBudget;
use std::time::{Duration, Instant};

/// Retries (or hedges) as a share of requests, for any number of threads.
///
/// Whenever a retry is allowed, those of the last window, itself included, are at most `percent` of the
/// requests of the last window, or `min_per_second` times the window's seconds if that is more. This holds
/// exactly, whatever the threads do. The slack is all on the other side, and comes from counting in tenths
/// of the window (see [`Window`]): requests are counted for nine tenths of the window at least, retries for
/// ten ninths of it at most.
///
/// The minimum may be spent at one moment: it is an average over the window.
#[derive(Debug)]
pub struct Budget {
    length: Duration,
    requests: Window<1>,
    retries: Window<1>,
    /// Held while spending. The latest time that was spent at: a thread that waited for the lock must not
    /// look at a past in which the others' retries aren't there yet.
    latest: Mutex<Instant>,
}

impl Budget {
    /// Nothing asked and nothing spent. The length of the window is the settings'; when that changes, make
    /// a new one.
    pub fn new(settings: &RetryBudget, origin: Instant) -> Self {
        // Nine tenths of the retries' window are the window: a retry is never forgotten too early.
        let longer = settings.window.saturating_mul(10) / 9;
        Self {
            length: settings.window,
            requests: Window::new(settings.window, origin),
            // A nanosecond for each tenth that division may have cut off.
            retries: Window::new(longer + Duration::from_nanos(20), origin),
            latest: Mutex::new(origin),
        }
    }

    /// Counts a request. Retries and hedges are none, so that they can't pay for each other.
    pub fn note_request(&self, now: Instant) {
        self.requests.add(0, 1, now);
    }

    /// Takes a retry out of the budget, if there is one left in it. What was taken is not given back. It
    /// takes a lock for the time of some forty loads, which only requests that failed do.
    #[must_use]
    pub fn try_spend(&self, now: Instant, settings: &RetryBudget) -> bool {
        // A panic while holding it leaves a time, which is always right.
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        *latest = now.max(*latest);
        if self.left(*latest, settings) == 0 {
            return false;
        }
        self.retries.add(0, 1, *latest);
        true
    }

    /// How many retries are left at `now`; for people to see.
    pub fn left(&self, now: Instant, settings: &RetryBudget) -> u64 {
        let [requests] = self.requests.sums(now);
        let [retries] = self.retries.sums(now);
        let share = requests.saturating_mul(u64::from(settings.percent)) / 100;
        let millis = u64::try_from(self.length.as_millis()).unwrap_or(u64::MAX);
        let least = u64::from(settings.min_per_second).saturating_mul(millis) / 1000;
        share.max(least).saturating_sub(retries)
    }
}

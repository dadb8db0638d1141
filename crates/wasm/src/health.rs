//! How the calls of one version went, by all workers.

use crate::clock::now;
use crate::fault::Fault;
use crate::quarantine::{Admits, Breaker, Change, Standing};
use leeward_policy::model::Quarantine;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Its breaker and its tallies. A version that does well costs a call one look and one addition.
#[derive(Debug)]
pub(crate) struct Health {
    /// The breaker is not closed.
    suspect: AtomicBool,
    // Poison is harmless: its state is replaced in one assignment.
    breaker: Mutex<Breaker>,
    calls: AtomicU64,
    faults: [AtomicU64; Fault::ALL.len()],
    quarantines: AtomicU64,
}

impl Health {
    pub(crate) const fn new() -> Self {
        Self {
            suspect: AtomicBool::new(false),
            breaker: Mutex::new(Breaker::new()),
            calls: AtomicU64::new(0),
            faults: [const { AtomicU64::new(0) }; Fault::ALL.len()],
            quarantines: AtomicU64::new(0),
        }
    }

    /// Whether nothing speaks against a call.
    pub(crate) fn is_good(&self) -> bool {
        !self.suspect.load(Ordering::Relaxed)
    }

    /// Whether a call may be made.
    pub(crate) fn admits(&self, settings: impl FnOnce() -> Quarantine) -> Option<Admits> {
        if self.is_good() {
            return Some(Admits::Freely);
        }
        self.change(|breaker| breaker.admits(&settings(), now()))
    }

    /// A request that tried it is over; returns what that has changed.
    pub(crate) fn tried(&self, round: u64, well: bool) -> Option<Change> {
        self.change(|breaker| breaker.tried(round, well, now()))
    }

    /// A call has ended; returns what that has changed.
    pub(crate) fn report(
        &self,
        outcome: Result<(), Fault>,
        settings: impl FnOnce() -> Quarantine,
    ) -> Option<Change> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let change = match outcome {
            // Of one that is tried the whole request tells.
            Ok(()) => None,
            Err(fault) => {
                if let Some(count) = self.faults.get(fault as usize) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
                if fault.is_of_code() {
                    self.change(|breaker| breaker.fault(&settings(), now()))
                } else {
                    if !self.is_good() {
                        self.change(|breaker| breaker.unsettled(now()));
                    }
                    None
                }
            }
        };
        if change == Some(Change::Quarantined) {
            self.quarantines.fetch_add(1, Ordering::Relaxed);
        }
        change
    }

    fn change<T>(&self, change: impl FnOnce(&mut Breaker) -> T) -> T {
        let mut breaker = self.breaker.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut breaker);
        let suspect = breaker.standing() != Standing::Closed;
        self.suspect.store(suspect, Ordering::Relaxed);
        result
    }

    pub(crate) fn standing(&self) -> Standing {
        self.breaker
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .standing()
    }

    /// Whether it is left alone at this moment.
    pub(crate) fn is_quarantined(&self, now: Instant) -> bool {
        !self.is_good() && matches!(self.standing(), Standing::Quarantined { until } if now < until)
    }

    /// Calls, those that ended in each fault, and times that it was quarantined.
    pub(crate) fn tallies(&self) -> (u64, Vec<(Fault, u64)>, u64) {
        let faults = Fault::ALL.iter().zip(&self.faults);
        let faults = faults.map(|(fault, count)| (*fault, count.load(Ordering::Relaxed)));
        (
            self.calls.load(Ordering::Relaxed),
            faults.filter(|(_, count)| *count > 0).collect(),
            self.quarantines.load(Ordering::Relaxed),
        )
    }
}

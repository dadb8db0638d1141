//! Counts of the recent past.

use crate::sync::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Counts of the last `length`, for any number of threads, without locks.
///
/// Time is cut into *ticks* of a tenth of the length. What was added in the current tick and the nine before
/// it is counted: everything that is younger than nine tenths of the length, and nothing that is older than
/// the length.
///
/// Each cell is one word that says which tick its count is of, so that nobody has to clear it in time and
/// adding is a single atomic operation but for the first in a tick. Counts are exact among threads whose
/// `now` is right. A thread that is held up for a whole length between reading a cell and adding to it adds
/// to the later tick, and what is added with a `now` that is a whole length behind others' is dropped.
///
/// There are `K` counters, told apart by number from 0. Of the same tick, they lie side by side in memory.
#[derive(Debug)]
pub struct Window<const K: usize> {
    origin: Instant,
    /// A tick, in nanoseconds, at least 1.
    tick: u64,
    cells: [[AtomicU64; K]; TICKS],
}

/// Ticks in a window.
const TICKS: usize = 10;
/// Low bits of a cell: its count.
const COUNT_BITS: u32 = 40;
/// High bits of a cell: its tick, modulo this. A mark comes again after 2^24 ticks (19 days of a window of
/// 1 s), but in another cell, as that isn't a multiple of [`TICKS`]: in the same cell after five times that.
const MARKS: u64 = 1 << (64 - COUNT_BITS);
/// Where a cell stops counting. Half of what fits, so that no number of threads that are adding at that
/// moment can carry into the mark.
const FULL: u64 = 1 << (COUNT_BITS - 1);
/// How many ticks a thread may be behind others for its add to be recognised as late. Were it much larger,
/// a cell that lay idle until its mark is about to come again would be taken for one from the future.
const LATE: u64 = 100;

impl<const K: usize> Window<K> {
    /// Counts nothing yet. `length` is that of the window, ticks count from `origin`; a `now` before it is
    /// taken for it.
    pub fn new(length: Duration, origin: Instant) -> Self {
        let tick = nanos(length) / 10;
        Self {
            origin,
            tick: tick.max(1),
            cells: std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))),
        }
    }

    /// Adds to a counter. One that doesn't exist counts nothing, and none counts past 2^39 in one tick.
    pub fn add(&self, counter: usize, by: u32, now: Instant) {
        let tick = self.tick(now);
        let Some(cell) = usize::try_from(tick % 10)
            .ok()
            .and_then(|at| self.cells.get(at)?.get(counter))
        else {
            return;
        };
        let mark = tick % MARKS;
        let by = u64::from(by);
        // Relaxed throughout: a cell is read for itself, and publishes nothing else.
        let mut seen = cell.load(Ordering::Relaxed);
        loop {
            if mark_of(seen) == mark {
                if count_of(seen) < FULL {
                    cell.fetch_add(by, Ordering::Relaxed);
                }
                return;
            }
            let ahead = mark_of(seen).wrapping_sub(mark) % MARKS;
            if ahead <= LATE && count_of(seen) > 0 {
                return;
            }
            let fresh = mark << COUNT_BITS | by;
            match cell.compare_exchange(seen, fresh, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return,
                Err(other) => seen = other,
            }
        }
    }

    /// What each counter counts at `now`.
    pub fn sums(&self, now: Instant) -> [u64; K] {
        let mark = self.tick(now) % MARKS;
        let mut sums = [0; K];
        for cells in &self.cells {
            for (sum, cell) in sums.iter_mut().zip(cells) {
                let seen = cell.load(Ordering::Relaxed);
                let age = mark.wrapping_sub(mark_of(seen)) % MARKS;
                if age < 10 {
                    *sum += count_of(seen);
                }
            }
        }
        sums
    }

    /// Forgets everything. What is added at the same moment may be kept or forgotten.
    pub fn clear(&self) {
        for cell in self.cells.iter().flatten() {
            cell.store(0, Ordering::Relaxed);
        }
    }

    /// Ticks since the origin.
    fn tick(&self, now: Instant) -> u64 {
        nanos(now.saturating_duration_since(self.origin)) / self.tick
    }
}

fn nanos(length: Duration) -> u64 {
    u64::try_from(length.as_nanos()).unwrap_or(u64::MAX)
}

const fn mark_of(cell: u64) -> u64 {
    cell >> COUNT_BITS
}

const fn count_of(cell: u64) -> u64 {
    cell & ((1 << COUNT_BITS) - 1)
}

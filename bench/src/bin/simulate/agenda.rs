//! What happens next: events in the order of their simulated times.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

/// Events to come, and the time that it is. Events of the same time come in the order in which they were
/// entered, so that a run can be repeated.
#[derive(Debug)]
pub(crate) struct Agenda<E> {
    now: Instant,
    entered: u64,
    events: BinaryHeap<Entry<E>>,
}

#[derive(Debug)]
struct Entry<E> {
    at: Instant,
    number: u64,
    event: E,
}

impl<E> Agenda<E> {
    pub(crate) fn new(origin: Instant) -> Self {
        Self {
            now: origin,
            entered: 0,
            events: BinaryHeap::new(),
        }
    }

    /// The time of the last event that came.
    pub(crate) const fn now(&self) -> Instant {
        self.now
    }

    /// Enters an event; one for the past comes next.
    pub(crate) fn at(&mut self, at: Instant, event: E) {
        self.events.push(Entry {
            at: at.max(self.now),
            number: self.entered,
            event,
        });
        self.entered += 1;
    }

    pub(crate) fn after(&mut self, pause: Duration, event: E) {
        self.at(self.now + pause, event);
    }

    /// The next event before `end`, whose time it then is.
    pub(crate) fn next(&mut self, end: Instant) -> Option<E> {
        if self.events.peek()?.at >= end {
            return None;
        }
        let entry = self.events.pop()?;
        self.now = entry.at;
        Some(entry.event)
    }
}

/// The earliest is the greatest, as [`BinaryHeap`] gives the greatest first.
impl<E> Ord for Entry<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<E> Eq for Entry<E> {}

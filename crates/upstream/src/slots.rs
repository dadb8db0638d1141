//! The connections of one service: how many, and which are idle, whichever worker has them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::Waker;
use std::time::{Duration, Instant};

/// Counts the connections of a service.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    count: AtomicU32,
    /// Locked when a connection is opened, and to find an idle one to close.
    slots: Mutex<Vec<Weak<Slot>>>,
}

/// One connection's place; given up when dropped.
#[derive(Debug)]
pub(crate) struct ConnectionSlot {
    connections: Arc<Connections>,
    slot: Arc<Slot>,
}

/// What others may ask of a connection. An idle one belongs to its worker until either the worker takes it for a
/// request or somebody takes it to be closed, whoever is first.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    idle: AtomicBool,
    closing: AtomicBool,
    /// When another is to take its place.
    due: OnceLock<Instant>,
    waker: Mutex<Option<Waker>>,
}

impl Connections {
    pub(crate) fn open(self: &Arc<Self>, max: u32) -> Option<ConnectionSlot> {
        let free = |n: u32| (n < max).then_some(n + 1);
        self.count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, free)
            .ok()?;
        let slot = Arc::<Slot>::default();
        let mut slots = self.slots();
        // Half of them being gone pays for looking at all.
        if slots.len() > 2 * (self.count.load(Ordering::Relaxed) as usize) {
            slots.retain(|slot| slot.strong_count() > 0);
        }
        slots.push(Arc::downgrade(&slot));
        drop(slots);
        Some(ConnectionSlot {
            connections: Arc::clone(self),
            slot,
        })
    }

    pub(crate) fn close_one_idle(&self) -> bool {
        let found = self
            .slots()
            .iter()
            .filter_map(Weak::upgrade)
            .find(|slot| slot.take());
        if let Some(slot) = &found {
            slot.close();
        }
        found.is_some()
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Slot>>> {
        // Poison is harmless: places are added and removed whole.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionSlot {
    pub(crate) const fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }
}

impl Slot {
    /// It is idle from now on.
    pub(crate) fn rest(&self) {
        self.idle.store(true, Ordering::Release);
    }

    /// Takes it, if it is idle: true for one caller.
    pub(crate) fn take(&self) -> bool {
        self.idle
            .compare_exchange(true, false, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    /// It is to be used for so long from now at most, and replaced before.
    pub(crate) fn lasts(&self, lasts: Duration, now: Instant) {
        // It is said once, when it is made.
        let _ = self.due.set(replaced_at(lasts, now));
    }

    /// Whether another is to take its place.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.due.get().is_some_and(|due| now >= *due)
    }

    /// Whether it is to be closed. Its task says once whom to wake for that.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    pub(crate) fn wake_with(&self, waker: &Waker) {
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(waker.clone());
    }

    fn close(&self) {
        self.closing.store(true, Ordering::Release);
        if let Some(waker) = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take() {
            waker.wake();
        }
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.connections.count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// When a connection that may be used for so long from now is to be replaced: after three quarters of that, or a little more, so
/// that those that were made together are not replaced together. The other side asks for it at seven eighths.
pub(crate) fn replaced_at(lasts: Duration, now: Instant) -> Instant {
    let share = 0.75 + 0.0625 * fastrand::f64();
    now + lasts.min(LONG).mul_f64(share)
}

/// Longer than any connection lasts.
const LONG: Duration = Duration::from_secs(365 * 24 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_replaced_well_before_it_ends_and_not_soon() {
        let now = tokio::time::Instant::now().into_std();
        let lasts = Duration::from_secs(1600);
        for _ in 0..1000 {
            let at = replaced_at(lasts, now) - now;
            assert!(
                (Duration::from_secs(1200)..=Duration::from_secs(1300)).contains(&at),
                "{at:?}"
            );
        }
        let slot = Slot::default();
        assert!(!slot.is_due(now + LONG), "who said nothing stays");
        slot.lasts(lasts, now);
        assert!(
            !slot.is_due(now + Duration::from_secs(1199)) && slot.is_due(now + Duration::from_secs(1301))
        );
        // However long it may be.
        assert!(replaced_at(Duration::MAX, now) > now);
    }

    #[test]
    fn connections_are_bounded_and_an_idle_one_makes_room() {
        let connections = Arc::<Connections>::default();
        let first = connections.open(2).unwrap();
        let second = connections.open(2).unwrap();
        assert!(connections.open(2).is_none());
        assert!(!connections.close_one_idle(), "none is idle");
        second.slot().rest();
        assert!(connections.close_one_idle());
        assert!(second.slot().is_closing() && !first.slot().is_closing());
        assert!(!second.slot().take(), "its worker can't use it any more");
        drop(second);
        assert!(connections.open(2).is_some());
    }

    #[test]
    fn an_idle_connection_is_taken_once() {
        let connections = Arc::<Connections>::default();
        let slot = connections.open(1).unwrap();
        slot.slot().rest();
        assert!(slot.slot().take());
        assert!(!connections.close_one_idle());
    }

    #[test]
    fn what_is_gone_is_forgotten() {
        let connections = Arc::<Connections>::default();
        for _ in 0..1000 {
            drop(connections.open(1).unwrap());
        }
        assert!(connections.slots().len() < 5);
    }
}

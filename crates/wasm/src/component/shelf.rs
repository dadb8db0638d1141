//! Instances that nobody uses: where they wait to be used again, and go when they wait too long.

use super::pool::Instance;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How long an instance is kept that nobody uses.
const KEPT: Duration = Duration::from_secs(60);

/// Instances that go at once when there is no room. To end one takes some 20 us, and a request waits for it.
const MAKE_ROOM: usize = 16;

/// The idle instances of one plugin on one worker, the last used at the end.
#[derive(Default)]
pub(crate) struct Shelf {
    // Only the worker takes and puts, so it finds this unlocked but for once a second. Poison is harmless: a push or a
    // pop is all or nothing.
    instances: Mutex<Vec<Instance>>,
}

impl Shelf {
    pub(crate) fn take(&self) -> Option<Instance> {
        self.lock().pop()
    }

    pub(crate) fn put(&self, instance: Instance) {
        self.lock().push(instance);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// When the one was last used that has waited longest.
    fn oldest(&self) -> Option<Instant> {
        self.lock().first().map(|instance| instance.used)
    }

    fn take_oldest(&self) -> Option<Instance> {
        let mut instances = self.lock();
        (!instances.is_empty()).then(|| instances.remove(0))
    }

    fn drop_old(&self, now: Instant) {
        let old: Vec<_> = {
            let mut instances = self.lock();
            let young = instances.partition_point(|instance| instance.used + KEPT <= now);
            instances.drain(..young).collect()
        };
        drop(old);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Instance>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Every shelf of the process.
#[derive(Default)]
pub(crate) struct Shelves {
    // Poison is harmless: a push is all or nothing.
    all: Mutex<Vec<Weak<Shelf>>>,
}

impl Shelves {
    pub(crate) fn add(&self, shelf: &Arc<Shelf>) {
        let mut all = self.lock();
        all.retain(|shelf| shelf.strong_count() > 0);
        all.push(Arc::downgrade(shelf));
    }

    /// Ends a few of the idle instances, those that have waited longest; whether there were any.
    pub(crate) fn make_room(&self) -> bool {
        let mut shelves: Vec<_> = self
            .there()
            .into_iter()
            .filter_map(|shelf| Some((shelf.oldest()?, shelf)))
            .collect();
        shelves.sort_by_key(|(oldest, _)| *oldest);
        let mut gone = Vec::with_capacity(MAKE_ROOM);
        // One of each, and again, since a plugin that is in use may have many.
        while gone.len() < MAKE_ROOM {
            let before = gone.len();
            let room = MAKE_ROOM - before;
            gone.extend(
                shelves
                    .iter()
                    .filter_map(|(_, shelf)| shelf.take_oldest())
                    .take(room),
            );
            if gone.len() == before {
                break;
            }
        }
        !gone.is_empty()
    }

    /// Ends those that nobody has used for long.
    pub(crate) fn drop_old(&self, now: Instant) {
        for shelf in self.there() {
            shelf.drop_old(now);
        }
    }

    fn there(&self) -> Vec<Arc<Shelf>> {
        self.lock().iter().filter_map(Weak::upgrade).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Shelf>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

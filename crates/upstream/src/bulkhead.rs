//! Leave to be under way at a service: a bound, and a queue for when it is reached.

use leeward_policy::model::Priority;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::sync::oneshot;

/// Counts what is under way, and keeps who waits for room, highest priority first, in order within one.
///
/// The counts are changed with sequential consistency: whoever leaves first gives up its place and then looks
/// whether anyone waits, whoever waits first says so and then looks for a place, so one of the two sees the
/// other and nobody waits beside a free place.
#[derive(Debug, Default)]
pub(crate) struct Bulkhead {
    active: AtomicU32,
    max: AtomicU32,
    waiting: AtomicU32,
    /// Most that were under way at once since it was last taken.
    peak: AtomicU32,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    lanes: [VecDeque<Waiter>; Priority::ALL.len()],
    next: u64,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    granted: oneshot::Sender<Place>,
}

/// A place among those under way; given up when dropped.
#[derive(Debug)]
#[must_use = "dropping a place gives it up"]
pub(crate) struct Place(Arc<Bulkhead>);

/// Why there is no place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NoPlace {
    /// As many are under way as may be, and none may wait.
    Full,
    /// As many wait as may.
    QueueFull,
    /// It waited for as long as it may.
    TimedOut,
}

/// How to wait for a place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    /// How many may wait at once.
    pub(crate) max_waiting: u32,
    /// Who goes first.
    pub(crate) priority: Priority,
    /// Until when.
    pub(crate) until: Instant,
}

impl Bulkhead {
    /// Sets how many may be under way. Fewer than are under way now takes effect as they end.
    pub(crate) fn resize(self: &Arc<Self>, max: u32) {
        let before = self.max.swap(max, Ordering::SeqCst);
        if max > before {
            self.grant();
        }
    }

    pub(crate) fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }

    /// The most that were under way at once since the last call.
    pub(crate) fn take_peak(&self) -> u32 {
        let now = self.active();
        self.peak.swap(now, Ordering::Relaxed).max(now)
    }

    pub(crate) fn waiting(&self) -> u32 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// A place, if one is free and nobody waits for it.
    pub(crate) fn try_enter(self: &Arc<Self>) -> Option<Place> {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            return None;
        }
        self.claim()
    }

    /// A place, now or when one becomes free.
    ///
    /// Cancel-safe: a dropped wait leaves the queue, and a place that it was just given goes to the next.
    pub(crate) async fn enter(self: &Arc<Self>, wait: Option<Wait>) -> Result<Place, NoPlace> {
        if let Some(place) = self.try_enter() {
            return Ok(place);
        }
        let Some(wait) = wait.filter(|wait| wait.max_waiting > 0) else {
            return Err(NoPlace::Full);
        };
        let (number, granted) = match self.enqueue(wait)? {
            Queued::Waiting(number, granted) => (number, granted),
            Queued::Entered(place) => return Ok(place),
        };
        let _leave = Leave {
            bulkhead: self,
            priority: wait.priority,
            number,
        };
        match tokio::time::timeout_at(wait.until.into(), granted).await {
            Ok(Ok(place)) => Ok(place),
            // The sender lives in the queue until it grants.
            Ok(Err(_)) | Err(_) => Err(NoPlace::TimedOut),
        }
    }

    fn enqueue(self: &Arc<Self>, wait: Wait) -> Result<Queued, NoPlace> {
        let mut queue = self.locked();
        if self.waiting.load(Ordering::SeqCst) >= wait.max_waiting {
            return Err(NoPlace::QueueFull);
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        // A place may have become free before this one was seen to wait; it is the first one's in the queue.
        if queue.is_empty()
            && let Some(place) = self.claim()
        {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            return Ok(Queued::Entered(place));
        }
        let (granted, place) = oneshot::channel();
        let number = queue.next;
        queue.next += 1;
        if let Some(lane) = queue.lanes.get_mut(wait.priority as usize) {
            lane.push_back(Waiter { number, granted });
        }
        drop(queue);
        Ok(Queued::Waiting(number, place))
    }

    fn claim(self: &Arc<Self>) -> Option<Place> {
        let max = self.max.load(Ordering::SeqCst);
        // Never above the bound, not even for a moment: a count that is taken back could hide a free place
        // from who has just begun to wait.
        let free = |active: u32| (active < max).then_some(active + 1);
        let before = self
            .active
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, free)
            .ok()?;
        // A load, nearly always.
        if before >= self.peak.load(Ordering::Relaxed) {
            self.peak.fetch_max(before + 1, Ordering::Relaxed);
        }
        Some(Place(Arc::clone(self)))
    }

    /// Gives free places to those who wait.
    fn grant(self: &Arc<Self>) {
        loop {
            let mut queue = self.locked();
            if queue.is_empty() {
                return;
            }
            let Some(place) = self.claim() else { return };
            let first = queue.lanes.iter_mut().rev().find_map(VecDeque::pop_front);
            if first.is_some() {
                self.waiting.fetch_sub(1, Ordering::SeqCst);
            }
            // Unlocked before a place can be dropped, which would come back here.
            drop(queue);
            match first {
                // One that no longer waits gives its place back, and the loop goes on.
                Some(waiter) => drop(waiter.granted.send(place)),
                None => return,
            }
        }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Queue> {
        // Poison is harmless: waiters are added and removed whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Queued {
    Waiting(u64, oneshot::Receiver<Place>),
    Entered(Place),
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.lanes.iter().all(VecDeque::is_empty)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::SeqCst);
        if self.0.waiting.load(Ordering::SeqCst) > 0 {
            self.0.grant();
        }
    }
}

/// Takes a waiter out of the queue, if it is still there.
struct Leave<'a> {
    bulkhead: &'a Arc<Bulkhead>,
    priority: Priority,
    number: u64,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        let mut queue = self.bulkhead.locked();
        let Some(lane) = queue.lanes.get_mut(self.priority as usize) else {
            return;
        };
        let before = lane.len();
        lane.retain(|waiter| waiter.number != self.number);
        if lane.len() < before {
            self.bulkhead.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn bulkhead(max: u32) -> Arc<Bulkhead> {
        let bulkhead = Arc::new(Bulkhead::default());
        bulkhead.resize(max);
        bulkhead
    }

    fn wait(priority: Priority, length: Duration) -> Option<Wait> {
        Some(Wait {
            max_waiting: 3,
            priority,
            until: tokio::time::Instant::now().into_std() + length,
        })
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn places_are_bounded_and_come_back() {
        let bulkhead = bulkhead(2);
        let first = bulkhead.enter(None).await.unwrap();
        let second = bulkhead.enter(None).await.unwrap();
        assert_eq!(bulkhead.enter(None).await.unwrap_err(), NoPlace::Full);
        drop(first);
        let third = bulkhead.enter(None).await.unwrap();
        assert_eq!(bulkhead.active(), 2);
        drop((second, third));
        assert_eq!(bulkhead.active(), 0);
        assert_eq!([bulkhead.take_peak(), bulkhead.take_peak()], [2, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_most_important_waits_least() {
        let bulkhead = bulkhead(1);
        let held = bulkhead.enter(None).await.unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut waiting = tokio::task::JoinSet::new();
        for priority in [Priority::Low, Priority::Critical, Priority::Normal] {
            let (bulkhead, order) = (Arc::clone(&bulkhead), Arc::clone(&order));
            waiting.spawn(async move {
                let place = bulkhead.enter(wait(priority, LONG)).await.unwrap();
                order.lock().unwrap().push(priority);
                drop(place);
            });
            tokio::task::yield_now().await;
        }
        assert_eq!(bulkhead.waiting(), 3);
        let full = bulkhead.enter(wait(Priority::Critical, LONG)).await;
        assert_eq!(full.unwrap_err(), NoPlace::QueueFull);
        assert!(bulkhead.try_enter().is_none());
        drop(held);
        while waiting.join_next().await.is_some() {}
        let want = [Priority::Critical, Priority::Normal, Priority::Low];
        assert_eq!(*order.lock().unwrap(), want);
        assert_eq!((bulkhead.active(), bulkhead.waiting()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_leaves_the_queue() {
        let bulkhead = bulkhead(1);
        let held = bulkhead.enter(None).await.unwrap();
        let short = wait(Priority::Normal, Duration::from_millis(50));
        assert_eq!(bulkhead.enter(short).await.unwrap_err(), NoPlace::TimedOut);
        let cancelled = bulkhead.enter(wait(Priority::Normal, LONG));
        assert!(
            tokio::time::timeout(Duration::from_millis(1), cancelled)
                .await
                .is_err()
        );
        assert_eq!(bulkhead.waiting(), 0);
        drop(held);
        assert!(bulkhead.try_enter().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_larger_bound_lets_those_in_who_wait() {
        let bulkhead = bulkhead(1);
        let _held = bulkhead.enter(None).await.unwrap();
        let other = Arc::clone(&bulkhead);
        let waiting = tokio::spawn(async move { other.enter(wait(Priority::Low, LONG)).await });
        tokio::task::yield_now().await;
        bulkhead.resize(2);
        assert!(waiting.await.unwrap().is_ok());
    }

    #[test]
    fn many_threads_never_pass_the_bound_and_nobody_is_forgotten() {
        let bulkhead = bulkhead(3);
        let most = Arc::new(AtomicU32::new(0));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (bulkhead, most) = (Arc::clone(&bulkhead), Arc::clone(&most));
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_time()
                        .build();
                    runtime.unwrap().block_on(async {
                        let mut tasks = tokio::task::JoinSet::new();
                        for i in 0..400 {
                            let (bulkhead, most) = (Arc::clone(&bulkhead), Arc::clone(&most));
                            tasks.spawn(async move {
                                let wait = Wait {
                                    max_waiting: 10_000,
                                    priority: Priority::ALL[i % 4],
                                    until: tokio::time::Instant::now().into_std() + LONG,
                                };
                                let _place = bulkhead.enter(Some(wait)).await.unwrap();
                                most.fetch_max(bulkhead.active(), Ordering::SeqCst);
                                tokio::task::yield_now().await;
                            });
                        }
                        while let Some(ended) = tasks.join_next().await {
                            ended.unwrap();
                        }
                    });
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(most.load(Ordering::SeqCst) <= 3);
        assert_eq!((bulkhead.active(), bulkhead.waiting()), (0, 0));
    }
}

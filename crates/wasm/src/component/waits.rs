//! How long a call may go on: its own time limit, longer by what it waits for the mesh and by what others do when it has given
//! way to them, and never past the deadline.

use crate::clock::now;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::time::Sleep;
use wasmtime::UpdateDeadline;

/// The time of an instance's call under way.
#[derive(Debug)]
pub(crate) struct Waits {
    // Poison is harmless: no lock is held across anything that panics.
    times: Mutex<Times>,
}

#[derive(Debug)]
struct Times {
    /// Tells the call under way from the one before.
    turn: u64,
    began: Instant,
    /// When the guest must have ended.
    until: Instant,
    deadline: Option<Instant>,
    /// How long it has waited for the mesh, or for its turn.
    waited: Duration,
    /// When the guest gave way to others, until it has its turn again.
    gave_way: Option<Instant>,
    /// Calls through the mesh that are under way, and when the last of them ends.
    calls: u32,
    calls_until: Instant,
}

/// A call through the mesh, from when it is sent until all of its answer is there, or nobody wants it.
#[derive(Debug)]
pub(crate) struct Waiting {
    waits: Arc<Waits>,
    turn: u64,
}

impl Waits {
    pub(crate) const fn new(now: Instant) -> Self {
        Self {
            times: Mutex::new(Times {
                turn: 0,
                began: now,
                until: now,
                deadline: None,
                waited: Duration::ZERO,
                gave_way: None,
                calls: 0,
                calls_until: now,
            }),
        }
    }

    /// A call begins that must end at `until`.
    pub(crate) fn begin(&self, began: Instant, until: Instant, deadline: Option<Instant>) {
        let mut times = self.lock();
        times.turn += 1;
        times.began = began;
        times.until = until;
        times.deadline = deadline;
        times.waited = Duration::ZERO;
        times.gave_way = None;
        times.calls = 0;
        times.calls_until = until;
    }

    /// When the guest must have ended, as things are.
    pub(crate) fn until(&self) -> Instant {
        self.lock().until
    }

    /// A guest that runs has met a tick of the clock: it ends if its time is up, and else gives way to the worker's other
    /// work, which is not held against it.
    pub(crate) fn tick(&self) -> UpdateDeadline {
        let now = now();
        let mut times = self.lock();
        if now >= times.until {
            return UpdateDeadline::Interrupt;
        }
        times.gave_way = Some(now);
        // Tokio's own way to yield lets timers and sockets in; wasmtime's goes to the end of the queue, which they are looked
        // at only every 61st time.
        UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now()))
    }

    /// How long the call has taken without what it has waited.
    pub(crate) fn own(&self, now: Instant) -> Duration {
        let times = self.lock();
        now.saturating_duration_since(times.began)
            .saturating_sub(times.waited)
    }

    /// A call through the mesh begins, that has its answer at `until` or never.
    pub(crate) fn enter(self: &Arc<Self>, until: Instant) -> Waiting {
        let mut times = self.lock();
        times.calls += 1;
        times.calls_until = times.calls_until.max(until);
        Waiting {
            waits: Arc::clone(self),
            turn: times.turn,
        }
    }

    /// Carries a call out; `None` if its time is up first. Guests that run notice the time by themselves: this is for
    /// those that wait.
    ///
    /// The call stays where it is, since it is large.
    pub(crate) async fn run<F: Future>(&self, mut call: Pin<&mut F>) -> Option<F::Output> {
        let mut sleep = None;
        let mut waiting_since = None;
        poll_fn(|context| {
            self.lock().has_its_turn(waiting_since.take());
            if let Poll::Ready(output) = call.as_mut().poll(context) {
                return Poll::Ready(Some(output));
            }
            let now = now();
            let limit = {
                let times = self.lock();
                waiting_since = (times.calls > 0).then_some(now);
                times.limit()
            };
            if now >= limit {
                return Poll::Ready(None);
            }
            let sleep = sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(limit.into())));
            if sleep.deadline() != limit.into() {
                Sleep::reset(sleep.as_mut(), limit.into());
            }
            sleep.as_mut().poll(context).map(|()| None)
        })
        .await
    }

    fn lock(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Times {
    /// When a guest that waits is given up.
    fn limit(&self) -> Instant {
        if self.calls > 0 {
            self.until.max(self.calls_until)
        } else {
            self.until
        }
    }

    /// The guest goes on. That it has waited for its turn is not held against it, nor, since then, for the mesh.
    fn has_its_turn(&mut self, waiting_since: Option<Instant>) {
        let waited = match (self.gave_way.take(), waiting_since) {
            (Some(since), _) => now().saturating_duration_since(since),
            (None, Some(since)) => now().min(self.calls_until).saturating_duration_since(since),
            (None, None) => return,
        };
        self.waited += waited;
        let until = self.until + waited;
        self.until = self.deadline.map_or(until, |deadline| deadline.min(until));
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut times = self.waits.lock();
        // What a guest kept of an earlier call says nothing about this one.
        if times.turn == self.turn {
            times.calls = times.calls.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use tokio::time::sleep;

    const MS: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_anything_else_is_given_up() {
        let waits = Arc::new(Waits::new(now()));
        waits.begin(now(), now() + 10 * MS, None);
        assert_eq!(waits.run(pin!(sleep(9 * MS))).await, Some(()));
        waits.begin(now(), now() + 10 * MS, None);
        let began = now();
        assert_eq!(waits.run(pin!(sleep(99 * MS))).await, None);
        assert!(now() - began < 12 * MS);
    }

    #[tokio::test(start_paused = true)]
    async fn what_others_do_meanwhile_is_not_counted() {
        let waits = Arc::new(Waits::new(now()));
        waits.begin(now(), now() + 10 * MS, None);
        let guest = pin!(async {
            for _ in 0..4 {
                if !matches!(waits.tick(), UpdateDeadline::YieldCustom(..)) {
                    return false;
                }
                tokio::task::yield_now().await;
            }
            true
        });
        let mut call = pin!(waits.run(guest));
        let ended = loop {
            match poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await {
                Poll::Ready(ended) => break ended,
                Poll::Pending => tokio::time::advance(50 * MS).await,
            }
        };
        assert_eq!(ended, Some(true));
        assert_eq!(waits.own(now()), Duration::ZERO);
        // The deadline holds all the same.
        waits.begin(now(), now() + 10 * MS, Some(now() + 20 * MS));
        waits.tick();
        tokio::time::advance(50 * MS).await;
        assert_eq!(
            waits
                .run(pin!(async { matches!(waits.tick(), UpdateDeadline::Interrupt) }))
                .await,
            Some(true)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_the_mesh_is_not_counted() {
        let waits = Arc::new(Waits::new(now()));
        waits.begin(now(), now() + 10 * MS, Some(now() + 500 * MS));
        let call = async {
            let waiting = waits.enter(now() + 200 * MS);
            sleep(100 * MS).await;
            drop(waiting);
            sleep(8 * MS).await;
        };
        assert_eq!(waits.run(pin!(call)).await, Some(()));
        waits.begin(now(), now() + 10 * MS, Some(now() + 500 * MS));
        let call = async {
            let waiting = waits.enter(now() + 200 * MS);
            sleep(100 * MS).await;
            drop(waiting);
            sleep(12 * MS).await;
        };
        assert_eq!(waits.run(pin!(call)).await, None);
        assert!(waits.own(now()) < 12 * MS, "{:?}", waits.own(now()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_never_let_go_buys_its_own_time_only() {
        let waits = Arc::new(Waits::new(now()));
        let began = now();
        waits.begin(began, began + 10 * MS, None);
        let waiting = waits.enter(began + 100 * MS);
        assert_eq!(waits.run(pin!(sleep(Duration::from_secs(9)))).await, None);
        assert!(now() - began < 115 * MS, "{:?}", now() - began);
        waits.begin(now(), now() + 10 * MS, None);
        let fresh = waits.enter(now() + 50 * MS);
        drop(waiting);
        assert_eq!(waits.lock().calls, 1, "an earlier call's end is not this one's");
        drop(fresh);
        assert_eq!(waits.lock().calls, 0);
    }
}

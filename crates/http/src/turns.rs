//! One at a time, among the tasks of one thread.

use std::cell::{RefCell, RefMut};
use std::future::poll_fn;
use std::ops::{Deref, DerefMut};
use std::task::{Context, Poll, Waker};

/// What one task at a time has, for as long as it likes. A lock that threads could share, and that keeps a queue, takes
/// several times as long, and few ever wait here: for a filter, the two directions of one request.
#[derive(Debug)]
pub(crate) struct Turns<T> {
    value: RefCell<T>,
    /// Who waits; once each. Whoever has given up since is told, too, and doesn't mind.
    waiting: RefCell<Vec<Waker>>,
}

/// Somebody's turn, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a, T> {
    value: RefMut<'a, T>,
    waiting: &'a RefCell<Vec<Waker>>,
}

impl<T> Turns<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self {
            value: RefCell::new(value),
            waiting: RefCell::new(Vec::new()),
        }
    }

    /// Waits until nobody else has it.
    pub(crate) async fn lock(&self) -> Turn<'_, T> {
        if let Some(turn) = self.try_lock() {
            return turn;
        }
        poll_fn(|cx| self.poll_lock(cx)).await
    }

    /// `None` while somebody else has it.
    pub(crate) fn try_lock(&self) -> Option<Turn<'_, T>> {
        let value = self.value.try_borrow_mut().ok()?;
        Some(Turn {
            value,
            waiting: &self.waiting,
        })
    }

    fn poll_lock(&self, cx: &Context<'_>) -> Poll<Turn<'_, T>> {
        if let Some(turn) = self.try_lock() {
            return Poll::Ready(turn);
        }
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl<T> Deref for Turn<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Turn<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        // They look when they are polled, which is after this turn is over. To wake one may run code of others.
        if !self.waiting.borrow().is_empty() {
            for waker in self.waiting.take() {
                waker.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;
    use tokio::task::{LocalSet, spawn_local, yield_now};

    #[tokio::test]
    async fn each_has_its_turn_and_none_is_cut_short() {
        let turns = Rc::new(Turns::new(Vec::new()));
        let tasks = (0..5).map(|n| {
            let turns = Rc::clone(&turns);
            async move {
                for _ in 0..3 {
                    let mut turn = turns.lock().await;
                    turn.push(n);
                    yield_now().await;
                    turn.push(n);
                }
            }
        });
        let all = LocalSet::new();
        for task in tasks {
            all.spawn_local(task);
        }
        all.await;
        let seen = turns.try_lock().unwrap();
        assert_eq!(seen.len(), 5 * 3 * 2);
        for turn in seen.chunks(2) {
            assert_eq!(turn[0], turn[1]);
        }
    }

    #[tokio::test]
    async fn who_gives_up_waiting_leaves_the_others_their_turn() {
        let turns = Rc::new(Turns::new(()));
        LocalSet::new()
            .run_until(async {
                let turn = turns.lock().await;
                let wait = |turns: &Rc<Turns<()>>| {
                    let turns = Rc::clone(turns);
                    spawn_local(async move { drop(turns.lock().await) })
                };
                let (first, second) = (wait(&turns), wait(&turns));
                yield_now().await;
                assert!(turns.try_lock().is_none());
                first.abort();
                yield_now().await;
                drop(turn);
                second.await.unwrap();
                assert!(first.await.is_err());
                assert!(turns.try_lock().is_some());
            })
            .await;
    }
}

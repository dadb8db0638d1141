//! How many calls of a plugin are under way at once on a worker. Others wait, and whoever came first goes first.
//!
//! One thread has all of it, so that a call which needn't wait pays for no lock.

use std::cell::Cell;
use tokio::sync::Notify;

/// The places that calls take.
#[derive(Debug)]
pub(crate) struct Slots {
    free: Cell<usize>,
    /// Who waits for one.
    waiting: Cell<usize>,
    freed: Notify,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Slot<'a>(&'a Slots);

/// One that waits.
struct Waiting<'a>(&'a Slots);

impl Slots {
    pub(crate) const fn new(max: usize) -> Self {
        Self {
            free: Cell::new(max),
            waiting: Cell::new(0),
            freed: Notify::const_new(),
        }
    }

    /// A place, if there is one that nobody waits for.
    pub(crate) fn try_take(&self) -> Option<Slot<'_>> {
        if self.waiting.get() > 0 {
            return None;
        }
        self.take()
    }

    /// Waits for a place.
    pub(crate) async fn wait(&self) -> Slot<'_> {
        let _waiting = Waiting::new(self);
        loop {
            // Whoever is told and has gone since passes it on.
            self.freed.notified().await;
            if let Some(slot) = self.take() {
                // Of several that were freed before anybody looked, only one is told of.
                if self.free.get() > 0 && self.waiting.get() > 1 {
                    self.freed.notify_one();
                }
                return slot;
            }
        }
    }

    fn take(&self) -> Option<Slot<'_>> {
        self.free.set(self.free.get().checked_sub(1)?);
        Some(Slot(self))
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let Self(slots) = self;
        slots.free.set(slots.free.get() + 1);
        if slots.waiting.get() > 0 {
            slots.freed.notify_one();
        }
    }
}

impl<'a> Waiting<'a> {
    fn new(slots: &'a Slots) -> Self {
        slots.waiting.set(slots.waiting.get() + 1);
        Self(slots)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Self(slots) = self;
        slots.waiting.set(slots.waiting.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    /// What a call does.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Come,
        /// Whoever has a place, by its number, ends.
        End(usize),
        /// Whoever waits gives up.
        GiveUp(usize),
        /// Those that wait look.
        Poll,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Come),
            2 => (0..9usize).prop_map(Step::End),
            1 => (0..9usize).prop_map(Step::GiveUp),
            2 => Just(Step::Poll),
        ]
    }

    type Wait<'a> = Pin<Box<dyn Future<Output = Slot<'a>> + 'a>>;

    /// Those that wait look, until none gets a place any more; in order.
    fn poll<'a>(waiting: &mut VecDeque<(u32, Wait<'a>)>, having: &mut Vec<(u32, Slot<'a>)>) {
        let mut cx = Context::from_waker(Waker::noop());
        let mut still = VecDeque::new();
        for (who, mut wait) in waiting.drain(..) {
            match wait.as_mut().poll(&mut cx) {
                Poll::Ready(slot) => having.push((who, slot)),
                Poll::Pending => still.push_back((who, wait)),
            }
        }
        *waiting = still;
    }

    #[test]
    fn whoever_gets_a_place_tells_the_next_of_another() {
        let slots = Slots::new(3);
        let mut cx = Context::from_waker(Waker::noop());
        let taken: Vec<_> = (0..3).map_while(|_| slots.try_take()).collect();
        let mut first: Wait<'_> = Box::pin(slots.wait());
        assert!(first.as_mut().poll(&mut cx).is_pending());
        drop(taken);
        // They come before the first one looks, which so stands in the way of a place at once.
        let mut got = Vec::new();
        let mut later: Vec<Wait<'_>> = (0..2).map(|_| Box::pin(slots.wait()) as Wait<'_>).collect();
        assert!(slots.try_take().is_none());
        for wait in later.iter_mut().chain([&mut first]) {
            match wait.as_mut().poll(&mut cx) {
                Poll::Ready(slot) => got.push(slot),
                Poll::Pending => panic!("a place is free that one waits for"),
            }
        }
        assert_eq!(got.len(), 3);
    }

    proptest! {
        #[test]
        fn no_more_have_one_than_may_and_none_waits_for_nothing(
            max in 1..4usize,
            steps in proptest::collection::vec(step(), 0..60),
        ) {
            let slots = Slots::new(max);
            let (mut having, mut waiting) = (Vec::new(), VecDeque::<(u32, Wait<'_>)>::new());
            let mut who = 0;
            for step in steps {
                match step {
                    Step::Come => {
                        who += 1;
                        if let Some(slot) = slots.try_take() {
                            prop_assert!(waiting.is_empty(), "nobody is overtaken");
                            having.push((who, slot));
                        } else {
                            let mut wait: Wait<'_> = Box::pin(slots.wait());
                            let mut cx = Context::from_waker(Waker::noop());
                            match wait.as_mut().poll(&mut cx) {
                                Poll::Ready(slot) => having.push((who, slot)),
                                Poll::Pending => waiting.push_back((who, wait)),
                            }
                        }
                    }
                    Step::End(at) if !having.is_empty() => drop(having.remove(at % having.len())),
                    Step::GiveUp(at) if !waiting.is_empty() => drop(waiting.remove(at % waiting.len())),
                    Step::End(_) | Step::GiveUp(_) => {}
                    Step::Poll => poll(&mut waiting, &mut having),
                }
                prop_assert!(having.len() <= max);
            }
            poll(&mut waiting, &mut having);
            prop_assert!(waiting.is_empty() || having.len() == max, "a place is free that one waits for");
            having.clear();
            drop(waiting);
            let all: Vec<_> = (0..max).map_while(|_| slots.try_take()).collect();
            prop_assert_eq!(all.len(), max, "every place came back");
            prop_assert!(slots.try_take().is_none());
        }
    }
}

//! Bodies that stand still: found once a second, so that bodies that move pay for no timer.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::task::{Context, Waker};
use std::time::Duration;

/// Whose body waits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Side {
    /// The client's.
    Request,
    /// The upstream's.
    Response,
}

/// What becomes of a body that has nothing to give.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Parked {
    /// It is woken when there is something, or when its time is up.
    Waiting,
    /// Its time is up.
    Expired,
}

/// Whether the bodies of one exchange move; either of them does for both.
pub(crate) struct Stall {
    house: Rc<House>,
    /// Longest silence, in ticks; 0 is no limit.
    limit: Cell<u32>,
    touched: Cell<u32>,
    expired: Cell<bool>,
    listed: Cell<bool>,
    wakers: RefCell<[Option<Waker>; 2]>,
}

/// The bodies of one worker that wait.
#[derive(Default)]
pub(crate) struct House {
    ticks: Cell<u32>,
    waiting: RefCell<Vec<Weak<Stall>>>,
}

/// The length of a tick.
pub(crate) const TICK: Duration = Duration::from_secs(1);

impl House {
    /// Another tick has passed: ends what has stood still for too long. O(bodies that wait).
    pub(crate) fn tick(&self) {
        let now = self.ticks.get().wrapping_add(1);
        self.ticks.set(now);
        let mut overdue = Vec::new();
        self.waiting.borrow_mut().retain(|stall| {
            let Some(stall) = stall.upgrade() else {
                return false;
            };
            let limit = stall.limit.get();
            let still = limit == 0 || now.wrapping_sub(stall.touched.get()) <= limit;
            if !still {
                stall.expired.set(true);
                overdue.push(stall);
            }
            still
        });
        // Woken with nothing borrowed: who wakes may end its exchange at once.
        for stall in overdue {
            let wakers = std::mem::take(&mut *stall.wakers.borrow_mut());
            for waker in wakers.into_iter().flatten() {
                waker.wake();
            }
        }
    }
}

impl Stall {
    /// No limit yet.
    pub(crate) fn new(house: &Rc<House>) -> Rc<Self> {
        Rc::new(Self {
            house: Rc::clone(house),
            limit: Cell::new(0),
            touched: Cell::new(house.ticks.get()),
            expired: Cell::new(false),
            listed: Cell::new(false),
            wakers: RefCell::default(),
        })
    }

    /// Sets the longest silence; it is kept to about a second.
    pub(crate) fn limit(&self, limit: Option<Duration>) {
        let ticks = limit.map_or(0, |limit| limit.as_millis().div_ceil(TICK.as_millis()));
        self.limit.set(u32::try_from(ticks).unwrap_or(u32::MAX));
    }

    /// A body has moved.
    pub(crate) fn touch(&self) {
        self.touched.set(self.house.ticks.get());
    }

    /// A body waits.
    pub(crate) fn park(self: &Rc<Self>, side: Side, cx: &Context<'_>) -> Parked {
        if self.expired.get() {
            return Parked::Expired;
        }
        if self.limit.get() == 0 {
            return Parked::Waiting;
        }
        let mut wakers = self.wakers.borrow_mut();
        if let Some(slot) = wakers.get_mut(side as usize)
            && !slot.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            *slot = Some(cx.waker().clone());
        }
        if !self.listed.replace(true) {
            self.house.waiting.borrow_mut().push(Rc::downgrade(self));
        }
        Parked::Waiting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(house: &House, n: u32) {
        for _ in 0..n {
            house.tick();
        }
    }

    #[test]
    fn silence_ends_at_its_limit_and_movement_of_either_side_begins_it_anew() {
        let house = Rc::<House>::default();
        let stall = Stall::new(&house);
        stall.limit(Some(Duration::from_millis(2500)));
        let cx = Context::from_waker(Waker::noop());
        assert_eq!(stall.park(Side::Response, &cx), Parked::Waiting);
        ticks(&house, 3);
        assert_eq!(stall.park(Side::Response, &cx), Parked::Waiting);
        stall.touch();
        ticks(&house, 3);
        assert_eq!(stall.park(Side::Request, &cx), Parked::Waiting);
        ticks(&house, 1);
        assert_eq!(stall.park(Side::Request, &cx), Parked::Expired);
    }

    #[test]
    fn without_a_limit_nothing_is_watched() {
        let house = Rc::<House>::default();
        let stall = Stall::new(&house);
        let cx = Context::from_waker(Waker::noop());
        assert_eq!(stall.park(Side::Request, &cx), Parked::Waiting);
        ticks(&house, 100);
        assert_eq!(stall.park(Side::Request, &cx), Parked::Waiting);
        assert!(house.waiting.borrow().is_empty());
    }

    #[test]
    fn what_has_ended_is_forgotten() {
        let house = Rc::<House>::default();
        let stall = Stall::new(&house);
        stall.limit(Some(TICK));
        stall.park(Side::Request, &Context::from_waker(Waker::noop()));
        drop(stall);
        house.tick();
        assert!(house.waiting.borrow().is_empty());
    }
}

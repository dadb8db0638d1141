//! Delivers from one queue: asks the schedule, and does what it says.

use crate::clock::Clock;
use crate::entry::{Deliver, Delivered, Delivery, EntryId, EntryState};
use crate::queues::Handle;
use crate::schedule::{Next, Schedule, Sending, WINDOW};
use crate::store::{Fetched, LoadError, Why};
use crate::verdict::{Before, EXPIRED, Settlement, judge};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use leeward_policy::model::Queue;
use leeward_resilience::Draw;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// How often it looks for entries that another process has accepted.
const LOOK: Duration = Duration::from_millis(500);
/// How often it looks whether entries that hold others back were discarded by another process.
const MISSED: Duration = Duration::from_secs(5);
/// Entries of one such look.
const MAX_MISSED: usize = 64;
/// Entries fetched at once.
const PAGE: usize = 1000;
/// The pause after the store has failed.
const STORE_PAUSE: Duration = Duration::from_secs(1);
/// Entries whose age ends them that are under way beside the deliveries.
const EXPIRING: usize = 256;

/// Tends the store, and delivers whenever it may, until `stop` says otherwise and what is under way has ended.
pub(crate) async fn run(handle: Arc<Handle>, deliver: Arc<dyn Deliver>, stop: watch::Receiver<bool>) {
    let _untended = Untended(&handle);
    tokio::select! {
        () = terms(&handle, &*deliver, stop) => {}
        () = handle.store.tend() => {}
    }
}

/// Says that nobody tends a queue any more, however that has come about.
struct Untended<'a>(&'a Handle);

impl Drop for Untended<'_> {
    fn drop(&mut self) {
        self.0.leading.store(false, Ordering::Relaxed);
        self.0.tended.store(false, Ordering::Relaxed);
    }
}

async fn terms(handle: &Handle, deliver: &dyn Deliver, mut stop: watch::Receiver<bool>) {
    loop {
        let leads = tokio::select! {
            leads = handle.store.lead() => leads,
            () = stopped(&mut stop) => return,
        };
        if leads == Ok(true) {
            tracing::info!(queue = %handle.shared.name, "delivering");
            handle.leading.store(true, Ordering::Relaxed);
            Term::new(handle, deliver).run(&mut stop).await;
            handle.leading.store(false, Ordering::Relaxed);
            handle.store.resign().await;
        }
        // A store that can't be used says so in its state.
        tokio::select! {
            () = tokio::time::sleep(handle.store.lead_again()) => {}
            () = stopped(&mut stop) => return,
        }
    }
}

/// Waits until it says so.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    // Whoever could say so being gone means the same.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// From having become the one that delivers until it is no longer.
struct Term<'a> {
    handle: &'a Handle,
    deliver: &'a dyn Deliver,
    clock: Clock,
    schedule: Schedule,
    /// Of the store's contents that the schedule knows.
    generation: u64,
    /// Place of the last entry that was fetched.
    fetched: u64,
    /// There may be more to fetch.
    more: bool,
    /// It is being fetched.
    fetching: bool,
    flights: FuturesUnordered<BoxFuture<'a, Landed>>,
}

/// Something under way that has ended.
struct Landed {
    generation: u64,
    what: What,
}

enum What {
    /// A page of what is stored, of at most so many entries.
    Fetched(Result<Fetched, Why>, usize),
    /// An attempt.
    Sent(Sending, Delivered),
    /// No attempt, since the entry no longer waits.
    Gone(Sending),
    /// No attempt, since the store did not say what to send.
    Unread(Sending, LoadError),
    /// It is durable what became of it.
    Settled(u64, Settlement),
    /// It could not be made durable in time; who delivers next will send it once more.
    Unsettled(u64),
    /// Entries that are not there any more.
    Missing(Vec<u64>),
}

impl<'a> Term<'a> {
    fn new(handle: &'a Handle, deliver: &'a dyn Deliver) -> Self {
        // What was discarded before is not in the store that is read from here on.
        drop(handle.shared.take_removed());
        Self {
            handle,
            deliver,
            clock: handle.clock,
            schedule: Schedule::default(),
            generation: 0,
            fetched: 0,
            more: true,
            fetching: false,
            flights: FuturesUnordered::new(),
        }
    }

    async fn run(mut self, stop: &mut watch::Receiver<bool>) {
        let handle = self.handle;
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut missed = tokio::time::interval(MISSED);
        missed.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let deposed = handle.store.deposed();
        tokio::pin!(deposed);
        loop {
            let stopping = *stop.borrow();
            let mut wake = Instant::now() + LOOK;
            if stopping {
                if self.flights.is_empty() {
                    return;
                }
            } else {
                self.refill();
                self.forget_removed();
                self.expire(stop);
                wake = wake.min(self.dispatch());
            }
            tokio::select! {
                biased;
                () = &mut deposed => {
                    // Dropping what is under way cuts it off, so that it does not arrive after what the
                    // next one sends.
                    tracing::warn!(queue = %handle.shared.name, "no longer delivering: the lease was lost");
                    return;
                }
                Some(landed) = self.flights.next() => self.land(landed, stop),
                () = handle.shared.changed() => self.more = true,
                _ = look.tick() => self.more = true,
                _ = missed.tick() => self.look_for_missing(),
                () = stopped(stop), if !stopping => {}
                () = tokio::time::sleep_until(wake), if !stopping => {}
            }
        }
    }

    /// Asks for the next page of what is stored, if there may be one. Like all that waits for the store this is
    /// under way beside the rest: flights are only polled together, so one that were waited for alone could wait
    /// for what another holds.
    fn refill(&mut self) {
        let limit = PAGE.min(WINDOW.saturating_sub(self.schedule.len()));
        if !self.more || self.fetching || limit == 0 {
            return;
        }
        (self.more, self.fetching) = (false, true);
        let (handle, generation, after) = (self.handle, self.generation, self.fetched);
        let flight = async move {
            let fetched = handle.store.fetch(after, limit).await;
            let what = What::Fetched(fetched, limit);
            Landed { generation, what }
        };
        self.flights.push(flight.boxed());
    }

    fn fetched(&mut self, fetched: Fetched, limit: usize) {
        if fetched.generation != self.generation {
            // Another file: what is known is void, and what is under way is not of this one.
            self.generation = fetched.generation;
            self.schedule = Schedule::default();
            self.more = true;
            if std::mem::take(&mut self.fetched) > 0 {
                return;
            }
        }
        self.more |= fetched.rows.len() >= limit;
        let (queue, now_ms) = (self.handle.shared.queue(), self.clock.now_ms());
        for row in fetched.rows {
            self.fetched = row.seq;
            self.schedule.add(row, now_ms, &queue);
        }
    }

    fn forget_removed(&mut self) {
        for seq in self.handle.shared.take_removed() {
            if !self.schedule.is_under_way(seq) {
                self.schedule.end(seq, self.clock.now_ms());
            }
        }
    }

    fn expire(&mut self, stop: &watch::Receiver<bool>) {
        let queue = self.handle.shared.queue();
        while self.may_expire(&queue)
            && let Some((seq, id, attempts)) = self.schedule.expired(self.clock.now_ms(), &queue)
        {
            let reason = EXPIRED.into();
            self.settle((seq, id), Settlement::Dead { reason, attempts }, stop.clone());
        }
    }

    /// Whether one more may be under way to its end.
    fn may_expire(&self, queue: &Queue) -> bool {
        let deliveries = usize::try_from(queue.max_concurrency).unwrap_or(usize::MAX);
        self.flights.len() < deliveries.saturating_add(EXPIRING)
    }

    /// Sends what may be sent. Until when there is nothing more to do.
    fn dispatch(&mut self) -> Instant {
        let queue = self.handle.shared.queue();
        loop {
            let now_ms = self.clock.now_ms();
            match self.schedule.next(now_ms, self.clock.nanos(), &queue) {
                Next::Send(sending) => self.send(sending),
                Next::Wait(until_ms) => {
                    // With no room for what has expired, one that lands is what there is to wait for.
                    let expires_ms = if self.may_expire(&queue) {
                        self.schedule.expires_at(&queue)
                    } else {
                        u64::MAX
                    };
                    let until_ms = until_ms.min(expires_ms);
                    let wait = until_ms.saturating_sub(now_ms).min(3_600_000);
                    return Instant::now() + Duration::from_millis(wait.max(1));
                }
            }
        }
    }

    fn send(&self, sending: Sending) {
        let (handle, deliver, generation) = (self.handle, self.deliver, self.generation);
        let flight = async move {
            let what = match handle.store.load(sending.seq, sending.id).await {
                Err(error) => What::Unread(sending, error),
                Ok(None) => What::Gone(sending),
                Ok(Some(request)) => {
                    let delivery = Delivery {
                        id: sending.id,
                        queue: Arc::clone(&handle.shared.name),
                        attempt: sending.attempts.saturating_add(1),
                        request,
                    };
                    // A panic costs one attempt, not the queue. What it leaves behind is the deliverer's own.
                    let sent = AssertUnwindSafe(async { deliver.deliver(delivery).await });
                    let delivered = sent.catch_unwind().await.unwrap_or_else(|_| Delivered::Failed {
                        why: "the delivery panicked".into(),
                        status: None,
                        retry_after: None,
                    });
                    What::Sent(sending, delivered)
                }
            };
            Landed { generation, what }
        };
        self.flights.push(flight.boxed());
    }

    /// Makes durable what became of an entry, however long the store needs. Until then the entry is under way, since
    /// sending it again because its end could not be written down would be a duplicate without need.
    fn settle(&self, place: (u64, EntryId), settlement: Settlement, mut stop: watch::Receiver<bool>) {
        let (handle, generation) = (self.handle, self.generation);
        let flight = async move {
            loop {
                let Err(why) = handle.store.settle(place, settlement.clone()).await else {
                    let what = What::Settled(place.0, settlement);
                    return Landed { generation, what };
                };
                tracing::warn!(queue = %handle.shared.name, entry = %place.1, %why, "can't write down what became of an entry");
                if *stop.borrow() {
                    let what = What::Unsettled(place.0);
                    return Landed { generation, what };
                }
                tokio::select! {
                    () = tokio::time::sleep(STORE_PAUSE) => {}
                    () = stopped(&mut stop) => {}
                }
            }
        };
        self.flights.push(flight.boxed());
    }

    fn look_for_missing(&self) {
        let after = self.clock.now_ms().saturating_add(crate::clock::millis(MISSED));
        let late = self.schedule.long_pauses(after, MAX_MISSED);
        if late.is_empty() {
            return;
        }
        let (handle, generation) = (self.handle, self.generation);
        let flight = async move {
            let mut missing = Vec::new();
            for (seq, id) in late {
                match handle.store.state(id).await {
                    Ok(Some(EntryState::Waiting { .. })) => {}
                    Ok(_) => missing.push(seq),
                    Err(_) => break,
                }
            }
            let what = What::Missing(missing);
            Landed { generation, what }
        };
        self.flights.push(flight.boxed());
    }

    fn land(&mut self, landed: Landed, stop: &watch::Receiver<bool>) {
        // Of a file that is no longer there. What was fetched says itself of which it is.
        if landed.generation != self.generation && !matches!(landed.what, What::Fetched(..)) {
            return;
        }
        let (queue, now_ms) = (self.handle.shared.queue(), self.clock.now_ms());
        match landed.what {
            What::Fetched(fetched, limit) => {
                self.fetching = false;
                // A store that doesn't answer says so in its state, and is asked again at the next look.
                if let Ok(fetched) = fetched {
                    self.fetched(fetched, limit);
                }
            }
            What::Sent(sending, delivered) => {
                let before = Before {
                    attempts: sending.attempts,
                    failures: sending.failures,
                };
                match judge(delivered, before, &queue, now_ms, &mut Chance) {
                    Ok(settlement) => {
                        self.schedule.reached(&sending, &queue);
                        self.settle((sending.seq, sending.id), settlement, stop.clone());
                    }
                    Err(retry_after) => {
                        self.schedule
                            .missed(&sending, retry_after, &queue, now_ms, &mut Chance);
                    }
                }
            }
            What::Gone(sending) => {
                self.schedule.unused(&sending, now_ms, now_ms);
                self.schedule.end(sending.seq, now_ms);
            }
            What::Unread(sending, LoadError::Unavailable(why)) => {
                tracing::debug!(queue = %self.handle.shared.name, entry = %sending.id, %why, "can't read an entry");
                let due_ms = now_ms.saturating_add(crate::clock::millis(STORE_PAUSE));
                self.schedule.unused(&sending, due_ms, now_ms);
            }
            What::Unread(sending, LoadError::Unreadable(reason)) => {
                let attempts = sending.attempts;
                self.schedule.spoilt(&sending);
                self.settle(
                    (sending.seq, sending.id),
                    Settlement::Dead { reason, attempts },
                    stop.clone(),
                );
            }
            What::Settled(seq, settlement) => self.settled(seq, &settlement, now_ms),
            What::Unsettled(seq) => self.schedule.end(seq, now_ms),
            What::Missing(missing) => {
                for seq in missing {
                    if !self.schedule.is_under_way(seq) {
                        self.schedule.end(seq, now_ms);
                    }
                }
            }
        }
    }

    fn settled(&mut self, seq: u64, settlement: &Settlement, now_ms: u64) {
        let counters = &self.handle.shared.counters;
        match settlement {
            Settlement::Delivered { .. } => {
                counters.delivered.fetch_add(1, Ordering::Relaxed);
                self.schedule.end(seq, now_ms);
            }
            Settlement::Dead { reason, .. } => {
                counters.dead.fetch_add(1, Ordering::Relaxed);
                if **reason == *EXPIRED {
                    counters.expired.fetch_add(1, Ordering::Relaxed);
                }
                self.schedule.end(seq, now_ms);
            }
            Settlement::Again { attempts, due_ms, .. } => {
                self.schedule.again(seq, *attempts, *due_ms, now_ms);
            }
        }
    }
}

/// Draws from the thread's generator.
struct Chance;

impl Draw for Chance {
    fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { fastrand::u64(..n) }
    }

    fn unit(&mut self) -> f64 {
        fastrand::f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queues::{Queues, Settings};
    use crate::schedule::Row;
    use std::pin::Pin;

    struct Nobody;

    impl Deliver for Nobody {
        fn deliver(&self, _: Delivery) -> Pin<Box<dyn Future<Output = Delivered> + Send + '_>> {
            Box::pin(std::future::pending())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_expired_is_not_waited_for_while_there_is_no_room_for_it() {
        let settings = Settings {
            data: None,
            proxy: "p".into(),
            zone: "a".into(),
        };
        let queues = Queues::new(settings, Arc::new(Nobody));
        let queue = Arc::new(Queue::DEFAULT);
        queues.reconcile(vec![("orders".into(), Arc::clone(&queue))]);
        let handle = queues.find("orders").unwrap();
        let mut term = Term::new(&handle, &Nobody);
        let most = EXPIRING + usize::try_from(queue.max_concurrency).unwrap();
        for seq in 1..=most as u64 + 1 {
            let row = Row {
                seq,
                id: EntryId::of_bytes([0; 16]),
                service: "payment".into(),
                key: None,
                attempts: 0,
                since_ms: 1,
                due_ms: 0,
            };
            term.schedule.add(row, term.clock.now_ms(), &queue);
        }
        let (_go, stop) = watch::channel(false);
        term.expire(&stop);
        assert_eq!(term.flights.len(), most);
        assert!(term.schedule.expires_at(&queue) < term.clock.now_ms());
        let wait = term.dispatch() - Instant::now();
        assert!(wait > Duration::from_secs(60), "it looks again after {wait:?}");
    }
}

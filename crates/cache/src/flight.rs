//! One request on its way to the service, and those that wait for its answer.

use crate::answer::{Answer, Stored};
use crate::kept::Kept;
use crate::rule::RuleCache;
use crate::store::FlightKey;
use http::HeaderMap;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;

/// Where a request is.
#[derive(Debug)]
pub(crate) enum Progress {
    /// On its way.
    Asking,
    /// The head of its answer is there.
    Coming(Arc<Answer>),
    /// The answer is there, at this time.
    Done(Stored, SystemTime),
    /// Nobody gets anything of it.
    Alone,
}

/// A request that others may wait for.
#[derive(Debug)]
pub(crate) struct Flight {
    progress: watch::Sender<Progress>,
    /// What [`crate::store::Store::stamp`] was when it went.
    pub(crate) stamp: u64,
}

/// Waits for the answer to another's request.
#[derive(Debug)]
#[must_use]
pub struct Waiter {
    progress: watch::Receiver<Progress>,
    cache: Arc<RuleCache>,
    key: FlightKey,
    flight: Arc<Flight>,
    asked: HeaderMap,
    head: bool,
}

impl Flight {
    pub(crate) fn new(stamp: u64) -> Self {
        Self {
            progress: watch::Sender::new(Progress::Asking),
            stamp,
        }
    }

    pub(crate) fn tell(&self, progress: Progress) {
        self.progress.send_replace(progress);
    }

    pub(crate) fn waiter(
        self: &Arc<Self>,
        cache: Arc<RuleCache>,
        key: FlightKey,
        asked: HeaderMap,
        head: bool,
    ) -> Waiter {
        Waiter {
            progress: self.progress.subscribe(),
            cache,
            key,
            flight: Arc::clone(self),
            asked,
            head,
        }
    }
}

impl Waiter {
    /// Returns when the service has answered the other request: from then on it takes as long as that one's client
    /// takes to read. Cancel safe.
    pub async fn head(&mut self) {
        // The other is gone without a word: there is nothing to wait for either.
        let _ = self
            .progress
            .wait_for(|progress| !matches!(progress, Progress::Asking))
            .await;
    }

    /// Gives up, since the other's client reads too slowly: whoever comes doesn't wait for it either.
    pub fn leave(self) {
        self.cache.land(&self.key, &self.flight);
    }

    /// The answer, when it is there. `None`, as soon as it is known that there is none for this request: ask the
    /// service, without the cache.
    ///
    /// It waits as long as the other request takes; whoever has a deadline keeps it. Cancel safe, and works on any
    /// thread and runtime.
    pub async fn wait(&mut self) -> Option<Kept> {
        loop {
            let answer = match &*self.progress.borrow_and_update() {
                Progress::Asking => None,
                Progress::Coming(answer) if answer.serves(&self.asked) => None,
                Progress::Coming(_) | Progress::Alone => Some(None),
                Progress::Done(stored, at) => {
                    let usable = stored.answer.serves(&self.asked) && stored.answer.is_fresh(*at);
                    Some(usable.then(|| stored.kept(self.head, *at)))
                }
            };
            if let Some(answer) = answer {
                if answer.is_some() {
                    self.cache.count_coalesced();
                }
                return answer;
            }
            // The other is gone without a word: it doesn't, but if it did, waiting would be for ever.
            self.progress.changed().await.ok()?;
        }
    }
}

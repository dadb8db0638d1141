//! Active health checks: endpoints are asked how they are, whether or not anybody calls them.
//!
//! In the path: nothing. A [`Checker`] runs beside it, on a runtime of several threads, and tells a
//! [`Verdicts`] what it finds; who chooses endpoints reads it there.
//!
//! What is asked depends on the policy's [`CheckKind`](leeward_policy::model::CheckKind) and on how the
//! endpoint is reached:
//!
//! | kind | straight | through the proxy in front of it |
//! |---|---|---|
//! | HTTP | GET, over the service's protocol | the same, with `leeward-endpoint` |
//! | gRPC | `grpc.health.v1.Health/Check`, over HTTP/2 | the same, with `leeward-endpoint` |
//! | TCP | a connection is made | HEAD `/`, with `leeward-endpoint` |
//!
//! A TCP check through a proxy can't be only a connection: that would be one with the proxy, and pass while the
//! workload is gone. So the proxy is given a request for the workload, and the check passes unless the proxy
//! says that it could not connect, or nothing is said in time: the answer itself, even a failure, shows that
//! something was there to give it.
//!
//! Through a proxy the word in `leeward-reason` counts before anything else, since such an answer is the
//! proxy's own. Its limits (`overflow`, `overloaded`, `rate_limited`, `circuit_open`) say nothing of the
//! endpoint, so that check counts for nothing; any other word is a failure.
//!
//! This module decides when an endpoint is well, and nothing else. It knows no registry, no metrics, and not
//! who is chosen in place of what is not well.
//!
//! Invariants:
//! - At most [`MAX_UNDER_WAY`] checks are under way at once, each for at most its timeout.
//! - Once [`Checker::update`] has returned nothing more is told of what is gone; once a [`Checker`] is dropped,
//!   nothing more at all.

mod ask;
mod failure;
mod grpc;
mod schedule;
mod streak;
#[cfg(test)]
mod tests;

pub use failure::{CheckFailure, ProxyReason};

use ask::{Finding, ask};
use leeward_identity::Identity;
use leeward_policy::model::{HealthCheck, Protocol};
use leeward_policy::{EndpointKey, GatewayView};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use streak::{Outcome, Standing, Streak, Thresholds};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

/// Checks under way at once. What is due beyond that waits its turn, in order: endpoints that all hang are
/// asked this many at a time, each for its timeout, and so less often than their intervals say. It bounds the
/// sockets that checks hold, and what an outage of everything makes of them.
pub const MAX_UNDER_WAY: usize = 256;

/// An endpoint to be asked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Subject {
    /// Which one it is, and how it is reached.
    pub key: EndpointKey,
    /// Where the workload listens, as text, `IP:PORT`: how the proxy in front of it knows it.
    pub address_text: Arc<str>,
    /// What the service speaks. gRPC checks don't look at it.
    pub protocol: Protocol,
    /// The gateways through which it is reached, if it is so.
    pub gateways: Arc<[GatewayView]>,
    /// How it is asked.
    pub check: HealthCheck,
}

/// Where verdicts go.
///
/// Both methods are called on the checker's runtime, for one endpoint never at the same time, and while its
/// state is locked: they must return soon, and not call the [`Checker`].
pub trait Verdicts: Send + Sync + 'static {
    /// A check has ended. Those that a limit of another proxy kept from the endpoint are not told.
    fn checked(&self, key: &EndpointKey, passed: Result<(), &CheckFailure>);

    /// The endpoint is healthy from now on, or unhealthy. Told after [`Self::checked`] of the check that
    /// decided it: for the first verdict on an endpoint, and then whenever it changes.
    ///
    /// `why` is the last failure of an unhealthy one. An endpoint that was unhealthy and is no longer to be
    /// asked is told to be healthy here, without a check: whatever becomes of it, no check holds it back.
    fn verdict(&self, key: &EndpointKey, healthy: bool, why: Option<&CheckFailure>);
}

/// Asks endpoints how they are, until it is dropped. A process has one, or [`MAX_UNDER_WAY`] is no bound of it.
pub struct Checker {
    shared: Arc<Shared>,
    runtime: Handle,
    watches: Mutex<Watches>,
}

/// What all watches use.
struct Shared {
    identity: Option<Arc<Identity>>,
    verdicts: Arc<dyn Verdicts>,
    under_way: Semaphore,
}

#[derive(Default)]
struct Watches {
    by_key: HashMap<EndpointKey, Entry>,
    /// The tasks, which end with it.
    tasks: JoinSet<()>,
}

struct Entry {
    watch: Arc<Watch>,
    task: AbortHandle,
}

/// One endpoint under watch.
struct Watch {
    subject: Subject,
    /// `None` once the endpoint is no longer asked. Held while something is told, so that nothing is told after.
    streak: Mutex<Option<Streak>>,
}

impl Checker {
    /// One that asks nobody yet. It presents `identity` to other proxies; without one, endpoints behind another
    /// proxy fail their checks.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime: the current one is where checks run. Its time and I/O must be enabled.
    pub fn new(identity: Option<Arc<Identity>>, verdicts: Arc<dyn Verdicts>) -> Self {
        Self::bounded(identity, verdicts, MAX_UNDER_WAY)
    }

    fn bounded(identity: Option<Arc<Identity>>, verdicts: Arc<dyn Verdicts>, max_under_way: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                identity,
                verdicts,
                under_way: Semaphore::new(max_under_way),
            }),
            runtime: Handle::current(),
            watches: Mutex::default(),
        }
    }

    /// Says who is to be asked from now on: all of them, each key once (of several, the last counts). What is
    /// as before goes on as before. What is new is asked within a second or its interval, whichever is
    /// shorter. What is gone is no longer asked.
    ///
    /// An endpoint whose check has changed starts anew, but is not taken to be healthy for it: it stands as it
    /// did until the new check has its first verdict, so that a change of an interval puts nothing back that
    /// is broken.
    ///
    /// May be called from any thread. Takes time in proportion to the subjects before and after.
    pub fn update(&self, subjects: Vec<Subject>) {
        let mut watches = self.watches();
        let watches = &mut *watches;
        // Those that have ended are not kept.
        while watches.tasks.try_join_next().is_some() {}
        let mut before = std::mem::take(&mut watches.by_key);
        let wanted: HashMap<_, _> = subjects.into_iter().map(|s| (s.key.clone(), s)).collect();
        for (key, subject) in wanted {
            let stands = match before.remove(&key) {
                Some(entry) if entry.watch.subject == subject => {
                    watches.by_key.insert(key, entry);
                    continue;
                }
                Some(entry) => entry.end(),
                None => Standing::Healthy,
            };
            let watch = Arc::new(Watch {
                subject,
                streak: Mutex::new(Some(Streak::new(stands))),
            });
            let run = run(Arc::clone(&watch), Arc::clone(&self.shared));
            let task = watches.tasks.spawn_on(run, &self.runtime);
            watches.by_key.insert(key, Entry { watch, task });
        }
        for (key, entry) in before {
            match entry.end() {
                Standing::Healthy => {}
                Standing::Unhealthy => self.shared.verdicts.verdict(&key, true, None),
            }
        }
    }

    /// Nothing is half done when a lock's holder panics that the next would trip over, so a poisoned one is
    /// as good.
    fn watches(&self) -> MutexGuard<'_, Watches> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        for (_, entry) in self.watches().by_key.drain() {
            entry.end();
        }
    }
}

impl fmt::Debug for Checker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checker")
            .field("subjects", &self.watches().by_key.len())
            .finish_non_exhaustive()
    }
}

impl Entry {
    /// Ends the watch. How the endpoint stood.
    fn end(self) -> Standing {
        self.task.abort();
        let streak = self.watch.streak().take();
        streak.map_or(Standing::Healthy, Streak::standing)
    }
}

impl Watch {
    /// A streak is replaced whole, so a poisoned lock is as good.
    fn streak(&self) -> MutexGuard<'_, Option<Streak>> {
        self.streak.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in how a check ended, and tells it.
    fn take_in(&self, ended: Result<Finding, CheckFailure>, verdicts: &dyn Verdicts) {
        let (outcome, failure) = match &ended {
            Ok(Finding::Nothing) => return,
            Ok(Finding::Pass) => (Outcome::Pass, None),
            Err(failure) => (Outcome::Fail, Some(failure)),
        };
        let mut state = self.streak();
        let Some(streak) = *state else { return };
        let (key, check) = (&self.subject.key, &self.subject.check);
        let thresholds = Thresholds {
            unhealthy: check.unhealthy_threshold,
            healthy: check.healthy_threshold,
        };
        let (streak, verdict) = streak.on(outcome, thresholds);
        *state = Some(streak);
        verdicts.checked(key, failure.map_or(Ok(()), Err));
        match verdict {
            Some(Standing::Healthy) => verdicts.verdict(key, true, None),
            Some(Standing::Unhealthy) => verdicts.verdict(key, false, failure),
            None => {}
        }
    }
}

/// Asks one endpoint again and again.
async fn run(watch: Arc<Watch>, shared: Arc<Shared>) {
    let subject = &watch.subject;
    let (interval, jitter) = (subject.check.interval, subject.check.interval_jitter);
    let mut due = Instant::now() + schedule::first(interval, fastrand::f64());
    loop {
        tokio::time::sleep_until(due).await;
        // The semaphore is never closed.
        let Ok(permit) = shared.under_way.acquire().await else {
            return;
        };
        // Counted from here, so that what had to wait, or takes longer than its interval, isn't made up for.
        due = Instant::now() + schedule::next(interval, jitter, fastrand::f64());
        let ended = ask(subject, shared.identity.as_deref()).await;
        drop(permit);
        watch.take_in(ended, &*shared.verdicts);
    }
}

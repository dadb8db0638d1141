//! Levels of degradation: what proxies see, judged for each zone and for the mesh as a whole.
//!
//! Proxies say what they have seen (`Signals`), every second it is judged, and each proxy is told the levels that
//! triggers ask for in its zone (`Levels`). What overrides hold, proxies read from policy themselves, with or without
//! a control plane; here they only have their part in the audit and in what people are shown.
//!
//! [`seen`] and [`bench`] decide, and take the time as an argument; the rest carries values between them, the streams
//! and the store.

mod bench;
mod relay;
mod seen;
mod service;

pub(crate) use service::Levels;

use crate::policy::{Policy, wall};
use crate::proxies::Proxies;
use crate::store::Fence;
use bench::{Bench, Told};
use leeward_proto::v1;
use relay::{Collector, Outbox, Poster};
use seen::Seen;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// How often levels are judged, and ends of overrides looked for.
const EVERY: Duration = Duration::from_secs(1);

/// What is led.
const JOB: &str = "degradation";
/// How long the one that led is waited for, once it is gone.
const TTL: Duration = Duration::from_secs(10);

/// Where levels are judged. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Degradation {
    policy: Policy,
    proxies: Arc<Proxies>,
    /// No other lock is taken while this is held.
    // Poison is harmless: the worst is a sample that was added in part.
    seen: Arc<Mutex<Seen>>,
    /// What is for the control plane that judges, where that is another.
    outbox: Arc<Mutex<Outbox>>,
    /// Whether this one judges.
    judges: Arc<AtomicBool>,
    /// What proxies are told; `None` before the first judgement.
    told: watch::Sender<Option<Arc<Told>>>,
}

impl Degradation {
    /// Nothing is judged before [`Degradation::run`].
    pub(crate) fn new(policy: Policy, proxies: Arc<Proxies>) -> Self {
        Self {
            policy,
            proxies,
            seen: Arc::new(Mutex::new(Seen::new(now()))),
            outbox: Arc::default(),
            judges: Arc::default(),
            told: watch::Sender::new(None),
        }
    }

    /// A proxy has said what it saw.
    pub(crate) fn heard(&self, zone: &str, proxy: &str, signals: &v1::Signals) {
        self.seen().add(zone, proxy, signals, now());
        // Relaxed: a sample more or less at the moment of a change makes no difference.
        if !self.judges.load(Ordering::Relaxed) {
            self.outbox().add(zone, proxy, signals);
        }
    }

    /// What proxies are told, now and whenever it changes.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<Arc<Told>>> {
        self.told.subscribe()
    }

    /// Judges while this control plane is the one that does, until stopped.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let (mut bench, mut poster) = (Bench::default(), Poster::default());
            let leadership = {
                let mut led = std::pin::pin!(self.policy.store().lead(JOB, TTL));
                loop {
                    tokio::select! {
                        () = stop.cancelled() => return,
                        leadership = &mut led => break leadership,
                        _ = ticks.tick() => self.follow(&mut bench, &mut poster).await,
                    }
                }
            };
            // Judges that go on from what is written down: what this one's asked for in an earlier time is not it.
            drop(self.outbox().take());
            let (mut bench, mut collector) = (Bench::default(), Collector::default());
            self.judges.store(true, Ordering::Relaxed);
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = leadership.lost() => break,
                    _ = ticks.tick() => Box::pin(self.judge(&mut bench, &mut collector, &leadership.fence())).await,
                }
            }
            self.judges.store(false, Ordering::Relaxed);
            tracing::warn!("another control plane may judge levels now");
        }
    }

    /// Lets a bench have the policy of now.
    async fn refresh(&self, bench: &mut Bench, now: Instant) {
        if bench.is_at(self.policy.revision()) {
            return;
        }
        match self.policy.degradations().await {
            Ok((policies, zones, revision)) => bench.take(&policies, zones, revision),
            Err(error) => tracing::error!(%error, "can't read what is to be judged"),
        }
        self.seen().keep(bench.signals(), now);
        let services = bench.signals().map(|(_, signal)| signal.service().to_string());
        self.outbox().want(services);
    }

    /// Tells proxies what another control plane has judged, and that one what they saw.
    async fn follow(&self, bench: &mut Bench, poster: &mut Poster) {
        let (now, wall) = (now(), wall());
        self.refresh(bench, now).await;
        bench.follow(&self.policy.judgements(), now, wall);
        self.tell(bench);
        let store = self.policy.store();
        let signals = self.outbox().take();
        if bench.has_work() && store.kv().is_shared() {
            let zones = self.proxies.zones();
            let posted = poster.post(store.kv(), store.member(), signals, &zones);
            if let Err(error) = posted.await {
                tracing::warn!(%error, "what proxies saw does not come to the control plane that judges");
            }
        }
    }

    async fn judge(&self, bench: &mut Bench, collector: &mut Collector, fence: &Fence) {
        let (now, wall) = (now(), wall());
        if let Err(error) = self.policy.expire(wall, fence.clone()).await {
            tracing::error!(%error, "can't write down that overrides have ended");
        }
        self.refresh(bench, now).await;
        let kv = self.policy.store().kv();
        if bench.has_work() && kv.is_shared() {
            match collector.collect(kv).await {
                Ok(news) => {
                    let mut seen = self.seen();
                    for (zone, proxy, signals) in news {
                        seen.add(&zone, &proxy, &signals, now);
                    }
                }
                Err(error) => tracing::warn!(%error, "what proxies of other control planes saw is not known"),
            }
        }
        // Both have locks of their own, and while `seen` is held no other is taken.
        let (mut zones, written) = (self.proxies.zones(), self.policy.judgements());
        for (zone, is_connected) in &collector.zones {
            *zones.entry(zone.clone()).or_default() |= is_connected;
        }
        let changes = {
            let mut seen = self.seen();
            if bench.has_work() {
                seen.note(&zones, now);
            }
            bench.judge(&seen, &written, now, wall)
        };
        for change in &changes.changes {
            tracing::info!(
                policy = change.policy,
                zone = change.zone,
                from = change.from,
                to = change.to,
                by = change.by,
                why = change.why,
                "a trigger changed the level"
            );
        }
        if !changes.judged.is_empty()
            && let Err(error) = self.policy.judged(changes, fence.clone()).await
        {
            // The level holds all the same. It is tried again at the next judgement.
            tracing::error!(%error, "can't write down what triggers changed");
        }
        // Told once it is on disk, so that a restart knows what was told; a disk that is full keeps nobody from it.
        self.tell(bench);
    }

    fn tell(&self, bench: &Bench) {
        let told = bench.told();
        self.told.send_if_modified(|last| {
            let differs = last.as_deref() != Some(&told);
            if differs {
                *last = Some(Arc::new(told));
            }
            differs
        });
    }

    /// The zones of which a proxy is connected, and whether what the triggers of a zone ask for is believed.
    fn zones(&self) -> (BTreeSet<String>, impl Fn(&str) -> bool + use<>) {
        let zones = self.proxies.zones();
        let connected = zones.into_iter().filter(|(_, connected)| *connected);
        let (seen, now) = (Arc::clone(&self.seen), now());
        let judges = self.judges.load(Ordering::Relaxed);
        let believed = move |zone: &str| {
            // What another one has judged, it knows of.
            if !judges {
                return true;
            }
            let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.is_present(zone, now)
        };
        (connected.map(|(zone, _)| zone).collect(), believed)
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::Scratch;
    use leeward_proto::manifest;

    const POLICY: &str = "
apiVersion: leeward.dev/v1
kind: Service
metadata: {name: pay}
spec: {endpoints: []}
---
apiVersion: leeward.dev/v1
kind: DegradationPolicy
metadata: {name: shop}
spec:
  levels: [{name: normal}, {name: reduced}]
  triggers:
    - {level: reduced, errorRate: {service: pay, above: 30, window: 10s}}
";

    /// Enough of them that levels are most often being listed when they are judged.
    const ZONES: usize = 200;
    /// How often each of the two does its part.
    const ROUNDS: usize = 1_000;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn levels_are_judged_while_they_are_asked_for() {
        let scratch = Scratch::new();
        let policy = Policy::open(scratch.store().await).await.unwrap();
        let degradation = Degradation::new(policy.clone(), Arc::default());
        let zone = |i| {
            format!("---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: z{i}}}\nspec: {{}}\n")
        };
        let text: String = (0..ZONES).map(zone).collect();
        let resources = manifest::parse("test", &(POLICY.to_owned() + &text)).unwrap();
        policy.apply(resources, false, "spiffe://test").await.unwrap();
        let judge = degradation.clone();
        let judges = tokio::spawn(async move {
            let mut bench = Bench::default();
            let leadership = judge.policy.store().lead(JOB, TTL).await;
            for _ in 0..ROUNDS {
                let mut collector = Collector::default();
                Box::pin(judge.judge(&mut bench, &mut collector, &leadership.fence())).await;
            }
        });
        let asks = tokio::spawn(async move {
            for _ in 0..ROUNDS {
                let (connected, believed) = degradation.zones();
                let levels = policy.levels(connected, believed, wall()).await.unwrap();
                assert_eq!(levels.len(), ZONES);
            }
        });
        let both = async { tokio::try_join!(judges, asks) };
        let Ok(done) = tokio::time::timeout(Duration::from_secs(60), both).await else {
            // Threads that wait for each other would keep the runtime, and with it this test, from ending.
            eprintln!("judging and asking wait for each other");
            std::process::abort();
        };
        done.unwrap();
    }
}

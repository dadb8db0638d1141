//! Changes that go out to proxies in steps, and stop by themselves.
//!
//! Which change that is stands in the log ([`ledger`]); whom it has reached is drawn ([`reach`]) and written down before any
//! proxy gets it; what each proxy is to have follows from the two ([`course`]). One control plane, which holds a lease, decides
//! how it goes on ([`machine`]), from what all of them see of their proxies ([`compare`]). The first two and the last two of
//! these are pure.

pub(crate) mod compare;
pub(crate) mod course;
mod keep;
pub(crate) mod ledger;
pub(crate) mod machine;
mod metrics;
mod peers;
mod progress;
pub(crate) mod reach;
mod service;

pub(crate) use service::{Peer, Service};

use crate::policy::Policy;
use crate::proxies::Proxies;
use crate::store::{Fence, StoreError};
use compare::{BUCKETS, Figures, MAX_ROUTES, Pair, Tally};
use course::{Course, Held};
use ledger::{Ledger, Page};
use leeward_identity::Identity;
use leeward_policy::{Key, Kind, Name, Spec};
use leeward_proto::v1;
use machine::{Phase, Rollout, Sight, Watch};
use peers::Peers;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// How often is looked how a rollout is.
const EVERY: Duration = Duration::from_secs(1);
/// What is led.
const JOB: &str = "rollout";
/// How long the one that led is waited for, once it is gone.
const TTL: Duration = Duration::from_secs(5);
/// Pause after the store failed.
const PAUSE: Duration = Duration::from_secs(1);
/// How long the course is believed where nothing is heard: a watch that was lost without a word.
const STALE: Duration = Duration::from_secs(10);
/// Longest name of a route that is taken from a proxy, in bytes.
const MAX_NAME: usize = 256;

/// Rollouts as one control plane knows them. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Rollouts {
    policy: Policy,
    proxies: Arc<Proxies>,
    ledger: Ledger,
    peers: Peers,
    course: watch::Sender<Arc<Course>>,
    /// How far the last rollout was when that was last read.
    last: watch::Sender<Option<Rollout>>,
    /// Held while the course is set, so that what was read earlier never comes after what was read later. The number of the
    /// last look at the store that ended well.
    setting: Arc<tokio::sync::Mutex<u64>>,
    /// The number of the last look that was begun.
    looks: Arc<AtomicU64>,
    /// What changed with the revision that is under way.
    changed: Arc<Mutex<(u64, Arc<BTreeSet<Key>>)>>,
    // Poison is harmless: the worst is a message that was added in part.
    seen: Arc<Mutex<Seen>>,
    counts: Arc<Counts>,
}

/// What proxies of this control plane told of their requests.
#[derive(Debug, Default)]
struct Seen {
    rollout: u64,
    with: Figures,
    without: Figures,
}

/// What happened since the start, for metrics.
#[derive(Debug, Default)]
struct Counts {
    promoted: AtomicU64,
    rolled_back: AtomicU64,
    refusals: AtomicU64,
}

/// What one control plane said last, by its incarnation: its counts only rise.
type Before = HashMap<String, Pair>;

/// Requests of a route from numbers of somebody else's.
fn tally(requests: u64, failures: u64, times: &[u64]) -> Tally {
    let mut tally = Tally {
        requests,
        failures: failures.min(requests),
        times: [0; BUCKETS],
    };
    // Of more than there are buckets for, the rest is not ours.
    for (bucket, count) in tally.times.iter_mut().zip(times) {
        *bucket = *count;
    }
    tally
}

impl Rollouts {
    /// The policy whose changes go out.
    pub(crate) const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Reads where rollouts are, so that no proxy is sent what is held back.
    ///
    /// # Errors
    ///
    /// If the store can't be read.
    pub(crate) async fn open(
        policy: Policy,
        proxies: Arc<Proxies>,
        identity: Arc<Identity>,
    ) -> Result<Self, StoreError> {
        let ledger = policy.ledger().clone();
        let peers = Peers::new(policy.store().clone(), identity);
        let rollouts = Self {
            policy,
            proxies,
            ledger,
            peers,
            course: watch::Sender::default(),
            last: watch::Sender::default(),
            setting: Arc::default(),
            looks: Arc::default(),
            changed: Arc::default(),
            seen: Arc::default(),
            counts: Arc::default(),
        };
        rollouts.follow().await?;
        Ok(rollouts)
    }

    /// What proxies are to have, now and whenever that changes.
    pub(crate) fn course(&self) -> watch::Receiver<Arc<Course>> {
        self.course.subscribe()
    }

    /// Keeps the course up to date until stopped.
    pub(crate) async fn keep_course(self, stop: CancellationToken) {
        let mut revisions = self.policy.watch();
        loop {
            let kv = self.policy.store().kv();
            let from = match kv.range(ledger::PREFIX, None, 1).await {
                Ok(page) => page.revision + 1,
                Err(error) => {
                    tracing::error!(%error, "can't read how far a rollout is; proxies stay as they are");
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(PAUSE) => continue,
                    }
                }
            };
            let mut kept = kv.watch(ledger::PREFIX, from);
            loop {
                revisions.borrow_and_update();
                let followed = self.follow().await;
                if let Err(error) = &followed {
                    tracing::error!(%error, "can't read how far a rollout is; proxies stay as they are");
                }
                let pause = if followed.is_ok() { STALE } else { PAUSE };
                tokio::select! {
                    () = stop.cancelled() => return,
                    changed = revisions.changed() => if changed.is_err() { return },
                    // Whatever it says, everything is read anew.
                    events = kept.next() => if let Err(error) = events {
                        tracing::debug!(%error, "a watch was lost");
                        tokio::time::sleep(PAUSE.mul_f64(fastrand::f64())).await;
                        break;
                    },
                    () = tokio::time::sleep(pause) => {}
                }
            }
        }
    }

    /// Takes in how far others have let out what is held back here. Those who ask together share a look.
    ///
    /// # Errors
    ///
    /// If the store can't be read.
    pub(crate) async fn bring(&self) -> Result<(), StoreError> {
        if self.course.borrow().held.is_none() {
            return Ok(());
        }
        // Any look that is begun from now on sees what was there before.
        let begun = self.looks.load(Ordering::SeqCst);
        let mut ended = self.setting.lock().await;
        if *ended > begun {
            return Ok(());
        }
        self.look(&mut ended).await
    }

    /// Takes in what is new in the store.
    async fn follow(&self) -> Result<(), StoreError> {
        let mut ended = self.setting.lock().await;
        self.look(&mut ended).await
    }

    /// The same, for whoever holds `setting`.
    async fn look(&self, ended: &mut u64) -> Result<(), StoreError> {
        let this = self.looks.fetch_add(1, Ordering::SeqCst) + 1;
        let page = self.ledger.read().await?;
        self.last.send_replace(page.kept.clone());
        let known = self.course.borrow().clone();
        let course = self.course_of(&page, &known);
        self.proxies.hold(course.held.as_ref().map(|held| held.revision));
        self.course.send_if_modified(|now| {
            let differs = **now != course;
            if differs {
                *now = Arc::new(course);
            }
            differs
        });
        *ended = this;
        Ok(())
    }

    fn course_of(&self, page: &Page, known: &Course) -> Course {
        let mut course = Course {
            head: page.at,
            ..Course::default()
        };
        let Some(last) = page.open() else {
            return course;
        };
        let revision = last.change.revision;
        let same = known.held.as_ref().filter(|held| held.revision == revision);
        let values = match same {
            Some(held) if held.later == last.later.len() => Arc::clone(&held.values),
            Some(_) | None => Arc::new(course::values(&last.change, &last.later)),
        };
        {
            let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
            if changed.0 != revision {
                let keys = last.change.changes.iter().map(|change| change.key.clone());
                *changed = (revision, Arc::new(keys.collect()));
            }
        }
        let watched = last.rollout.as_ref().is_none_or(Rollout::is_watched);
        course.observe = if watched { revision } else { 0 };
        course.held = Some(Held {
            revision,
            reach: last
                .rollout
                .as_ref()
                .map(|rollout| rollout.reach.clone())
                .unwrap_or_default(),
            values,
            later: last.later.len(),
        });
        course
    }

    /// A proxy has told how its requests fared.
    pub(crate) fn heard(&self, hello: &v1::Hello, stream: u64, told: &v1::RequestSignals) {
        let rollout = self.course.borrow().observe;
        if rollout == 0 || told.rollout != rollout {
            return;
        }
        let Some(has) = self.proxies.side(hello, stream, rollout) else {
            return;
        };
        let mut seen = self.seen();
        if seen.rollout != rollout {
            *seen = Seen {
                rollout,
                ..Seen::default()
            };
        }
        let figures = if has { &mut seen.with } else { &mut seen.without };
        for route in told.routes.iter().take(MAX_ROUTES) {
            let known = matches!(route.direction.as_str(), "inbound" | "outbound" | "ingress");
            if known && route.route.len() <= MAX_NAME {
                let tally = tally(route.requests, route.failures, &route.times);
                figures.add(&route.direction, &route.route, &tally);
            }
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What this control plane has seen of a rollout; nothing if it knows of another one, or of none.
    fn count(&self, rollout: u64) -> Option<v1::RolloutCount> {
        let course = self.course.borrow().clone();
        let held = course.held.as_ref().filter(|held| held.revision == rollout)?;
        let changed = {
            let changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(&changed.1)
        };
        let (census, mut count) = self.proxies.count(rollout, &held.reach, &changed);
        count.rollout = rollout;
        count.zones = keep::zones(&census);
        let seen = self.seen();
        if seen.rollout == rollout {
            count.with = keep::routes(&seen.with);
            count.without = keep::routes(&seen.without);
        }
        Some(count)
    }

    /// What all control planes have seen of a rollout. Of the requests, those since `before`.
    async fn sight(&self, rollout: u64, before: Option<&mut Before>) -> Sight {
        let request = v1::GetStandingRequest {
            rollout,
            ..v1::GetStandingRequest::default()
        };
        let heard = self.peers.standing(&request).await;
        let mut sight = Sight {
            missing: heard.missing,
            ..Sight::default()
        };
        let own = (self.policy.store().member().to_owned(), self.count(rollout));
        let others = heard
            .answers
            .into_iter()
            .map(|said| (said.incarnation, said.rollout));
        let mut now = Before::new();
        for (who, count) in others.chain([own]) {
            let Some(count) = count else {
                // It has not heard of it yet.
                sight
                    .missing
                    .push(format!("{who}: it doesn't know of the rollout yet"));
                continue;
            };
            sight.census.merge(&keep::census(&count.zones));
            sight.members += count.members;
            sight.running += count.running;
            let said = |text: String| Some(text).filter(|text| !text.is_empty());
            sight.refusal = sight.refusal.or_else(|| said(count.refusal));
            sight.laggard = sight.laggard.or_else(|| said(count.laggard));
            let pair = Pair {
                with: keep::figures(&count.with),
                without: keep::figures(&count.without),
            };
            match &before {
                None => add(&mut sight.new, &pair),
                // What it saw before it was first asked may be of an earlier stage.
                Some(before) => {
                    if let Some(earlier) = before.get(&who) {
                        let new = Pair {
                            with: pair.with.since(&earlier.with),
                            without: pair.without.since(&earlier.without),
                        };
                        add(&mut sight.new, &new);
                    }
                }
            }
            now.insert(who, pair);
        }
        if let Some(before) = before {
            *before = now;
        }
        sight
    }

    /// Decides, while this control plane is the one that does, until stopped.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let began = now();
        loop {
            let leadership = tokio::select! {
                () = stop.cancelled() => return,
                leadership = self.policy.store().lead(JOB, TTL) => leadership,
            };
            let (mut watch, mut before) = (Watch::default(), Before::new());
            let mut ticks = tokio::time::interval(EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut course = self.course();
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = leadership.lost() => break,
                    _ = ticks.tick() => {}
                    // What was decided, or steered, is followed at once.
                    changed = course.changed() => if changed.is_err() { return },
                }
                let elapsed = now().saturating_duration_since(began);
                match Box::pin(self.turn(&mut watch, &mut before, &leadership.fence(), elapsed)).await {
                    Ok(true) => {}
                    // Nothing is under way: something will be when the course changes.
                    Ok(false) => {
                        before.clear();
                        tokio::select! {
                            () = stop.cancelled() => return,
                            () = leadership.lost() => break,
                            changed = course.changed() => if changed.is_err() { return },
                        }
                    }
                    Err(error) => tracing::error!(%error, "can't go on with a rollout"),
                }
            }
            tracing::warn!("another control plane may decide on rollouts now");
        }
    }

    /// Looks once; whether there is anything to look at.
    async fn turn(
        &self,
        watch: &mut Watch,
        before: &mut Before,
        fence: &Fence,
        elapsed: Duration,
    ) -> Result<bool, crate::policy::Refused> {
        let page = self.ledger.read().await?;
        let Some(last) = &page.last else {
            return Ok(false);
        };
        let wall = self.policy.store().now_ms();
        let mut rollout = match &last.rollout {
            Some(rollout) => rollout.clone(),
            None => self.begin(last, wall).await?,
        };
        if let Some(record) = &last.taken_back {
            if !rollout.is_open() {
                return Ok(false);
            }
            let why = match &rollout.phase {
                Phase::RollingBack { why } => why.clone(),
                Phase::Running | Phase::Paused { .. } | Phase::Promoted { .. } | Phase::RolledBack { .. } => {
                    record.author.message.clone()
                }
            };
            rollout.phase = Phase::RollingBack { why };
            rollout.taken_back(record.revision, wall);
            return self.keep(&page, &rollout, fence).await;
        }
        if !rollout.is_open() {
            return Ok(false);
        }
        if last.rollout.is_none() {
            return self.keep(&page, &rollout, fence).await;
        }
        if let Phase::RollingBack { why } = &rollout.phase {
            let by = self
                .policy
                .take_back(rollout.revision, why, Some(fence.clone()))
                .await?;
            tracing::warn!(revision = rollout.revision, by, why, "a rollout was taken back");
            // The next look finds it in the log.
            return Ok(true);
        }
        if !rollout.is_watched() {
            return Ok(true);
        }
        let sight = self.sight(rollout.revision, Some(before)).await;
        let was = rollout.clone();
        rollout.look(watch, &sight, elapsed, wall);
        if rollout != was {
            self.keep(&page, &rollout, fence).await?;
        }
        Ok(true)
    }

    /// A rollout as it begins.
    async fn begin(&self, last: &ledger::Last, wall: i64) -> Result<Rollout, crate::policy::Refused> {
        let labels = &last.change.author.labels;
        let text = labels.get(ledger::ROLLOUT).map_or("", String::as_str);
        let name = Name::parse(text).map_err(|error| {
            StoreError::Damaged(format!(
                "revision {} names the RolloutPolicy {text:?}, which {error}",
                last.change.revision
            ))
        })?;
        let key = Key {
            kind: Kind::RolloutPolicy,
            name: name.clone(),
        };
        // It was there when the change was written, and may have gone since.
        let there = self.policy.get(key).await.ok();
        let there = there.and_then(|wire| leeward_proto::parse(&wire).ok());
        let policy = match there.map(|resource| resource.spec) {
            Some(Spec::RolloutPolicy(policy)) => policy,
            Some(_) | None => {
                let empty = v1::Resource {
                    metadata: Some(v1::Metadata {
                        name: text.to_owned(),
                        ..v1::Metadata::default()
                    }),
                    status: None,
                    spec: Some(v1::resource::Spec::RolloutPolicy(v1::RolloutPolicy::default())),
                };
                match leeward_proto::parse(&empty).map(|resource| resource.spec) {
                    Ok(Spec::RolloutPolicy(policy)) => policy,
                    Ok(_) | Err(_) => return Err(crate::policy::Refused::Broken),
                }
            }
        };
        let by = last.change.author.who.clone();
        Ok(Rollout::new(last.change.revision, name, policy, by, wall))
    }

    /// Writes down how far it is, and tells of it; whether that was done.
    async fn keep(
        &self,
        page: &Page,
        rollout: &Rollout,
        fence: &Fence,
    ) -> Result<bool, crate::policy::Refused> {
        use std::sync::atomic::Ordering::Relaxed;
        if self
            .ledger
            .keep(rollout, page.modified, Some(fence))
            .await?
            .is_none()
        {
            // Somebody steers, or leads. The next look sees what came of it.
            return Ok(true);
        }
        let revision = rollout.revision;
        let stage = rollout.stage;
        match &rollout.phase {
            Phase::Running => tracing::info!(revision, stage, drawn = rollout.drawn, "a rollout goes on"),
            Phase::Paused { why, .. } => tracing::warn!(revision, stage, why, "a rollout is paused"),
            Phase::RollingBack { why } => {
                if why.starts_with("refused by") {
                    self.counts.refusals.fetch_add(1, Relaxed);
                }
                tracing::warn!(revision, stage, why, "a rollout goes back");
            }
            Phase::Promoted { why } => {
                self.counts.promoted.fetch_add(1, Relaxed);
                tracing::info!(revision, why, "a rollout has reached everybody");
            }
            Phase::RolledBack { why, by } => {
                self.counts.rolled_back.fetch_add(1, Relaxed);
                tracing::warn!(revision, by, why, "nobody is to have a rollout's change any more");
            }
        }
        self.follow().await?;
        Ok(true)
    }
}

fn add(sum: &mut Pair, more: &Pair) {
    sum.with.merge(&more.with);
    sum.without.merge(&more.without);
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

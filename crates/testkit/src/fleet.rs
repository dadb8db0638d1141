//! Proxies that do nothing but follow policy: what a control plane sees of a large mesh, thousands in one process.
//!
//! Each has a certificate of its own and speaks the protocol of push.proto over mutual TLS and HTTP/2, as a proxy does: it
//! says hello with what it has, reads updates, acknowledges those that are complete, says every 10 s that it is there, and
//! comes back with growing pauses and full jitter when its stream ends. What it is sent is counted and not compiled.

mod session;

use anyhow::{Context, bail};
use leeward_identity::authority::Authority;
use leeward_identity::{Identity, SpiffeId};
use session::Seen;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long the certificates of a fleet last.
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// First pause between tries to connect; it doubles with each, with full jitter.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest of them.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// A connection that lasted for so long was good.
const GOOD: Duration = Duration::from_secs(30);
/// How often a fleet that is waited for is looked at.
const EVERY: Duration = Duration::from_millis(5);

/// A number of simulated proxies. Those that run end when it is dropped.
#[derive(Debug)]
pub struct Fleet {
    members: Vec<Arc<Member>>,
    running: Vec<Option<JoinHandle<()>>>,
    /// Counts how often every connection was cut.
    cuts: watch::Sender<u64>,
}

/// One simulated proxy.
#[derive(Debug)]
struct Member {
    zone: String,
    name: String,
    identity: Arc<Identity>,
    control: SpiffeId,
    /// When times of all members begin.
    epoch: Instant,
    /// The store that the generation is of. Poison is harmless: it is replaced whole.
    store_id: Mutex<String>,
    generation: AtomicU64,
    /// When that was acknowledged, in nanoseconds since the epoch.
    acked: AtomicU64,
    connected: AtomicBool,
    tries: AtomicU32,
    sessions: AtomicU32,
    fulls: AtomicU32,
    updates: AtomicU64,
    resources: AtomicU64,
    update_bytes: AtomicU64,
    wire_bytes: Arc<AtomicU64>,
}

/// Where one simulated proxy stands, and what it was sent since it was made.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tallied {
    /// It has a stream.
    pub connected: bool,
    /// The last generation that it has acknowledged.
    pub generation: u64,
    /// Times that it tried to connect.
    pub tries: u32,
    /// Streams that it has opened.
    pub sessions: u32,
    /// Full pushes.
    pub fulls: u32,
    /// Updates.
    pub updates: u64,
    /// Resources and tombstones in them.
    pub resources: u64,
    /// Bytes of the updates as messages, with gRPC's framing.
    pub update_bytes: u64,
    /// Bytes that came from the network: TLS, HTTP/2 and everything.
    pub wire_bytes: u64,
}

impl Fleet {
    /// Makes proxies `p0` and so on, the first of zone `z0`, the next of `z1`, and on in turns; issues a certificate to each.
    ///
    /// # Errors
    ///
    /// If a certificate can't be made.
    pub async fn new(authority: Arc<Authority>, zones: u32, count: u32) -> anyhow::Result<Self> {
        let epoch = Instant::now();
        let control = SpiffeId::control(authority.domain())?;
        // In two halves: nothing else is to be done meanwhile, and it is all computation.
        let half = |range: Range<u32>| {
            let (authority, control) = (Arc::clone(&authority), control.clone());
            tokio::task::spawn_blocking(move || {
                range
                    .map(|i| Member::new(&authority, (i % zones.max(1), i), &control, epoch).map(Arc::new))
                    .collect::<anyhow::Result<Vec<_>>>()
            })
        };
        let (first, second) = tokio::join!(half(0..count / 2), half(count / 2..count));
        let mut members = first??;
        members.extend(second??);
        let running = members.iter().map(|_| None).collect();
        let cuts = watch::Sender::new(0);
        Ok(Self {
            members,
            running,
            cuts,
        })
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Lets some of them connect, and come back whenever they are not connected; those that do already go to this control
    /// plane from now on.
    pub fn connect(&mut self, control: SocketAddr, members: Range<usize>) {
        self.stop(members.clone());
        let Self {
            members: all,
            running,
            cuts,
        } = self;
        let chosen = all.get(members.clone()).into_iter().flatten();
        for (member, running) in chosen.zip(running.get_mut(members).into_iter().flatten()) {
            // Its owner is the fleet.
            *running = Some(tokio::spawn(Arc::clone(member).run(control, cuts.subscribe())));
        }
    }

    /// Ends the streams of some of them, which don't come back.
    pub fn stop(&mut self, members: Range<usize>) {
        for running in self.running.get_mut(members).into_iter().flatten() {
            if let Some(running) = running.take() {
                running.abort();
            }
        }
    }

    /// Cuts every connection at once; the proxies come back as they do.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Lets some of them believe that they have a generation of a store, as if they had read it from their disks when they
    /// started; an empty store and 0 for nothing. For those that have no stream now.
    pub fn adopt(&self, members: Range<usize>, store_id: &str, generation: u64) {
        for member in self.members.get(members).into_iter().flatten() {
            member.keep(store_id, generation);
        }
    }

    /// The store that a member has policy of, and the generation.
    pub fn has(&self, member: usize) -> Option<(String, u64)> {
        let member = self.members.get(member)?;
        let store_id = member.store_id.lock().unwrap_or_else(PoisonError::into_inner);
        Some((store_id.clone(), member.generation.load(Ordering::Acquire)))
    }

    /// Where each of some stands.
    pub fn tallied(&self, members: Range<usize>) -> Vec<Tallied> {
        let members = self.members.get(members).unwrap_or_default();
        members.iter().map(|member| member.tallied()).collect()
    }

    /// Waits until some of them are connected and have acknowledged a generation, or a later one, at a time or after it; and
    /// says when each did so last, in the order of time.
    ///
    /// # Errors
    ///
    /// If that is not so within a time; with how many are missing.
    pub async fn reached(
        &self,
        members: Range<usize>,
        (generation, since): (u64, Instant),
        within: Duration,
    ) -> anyhow::Result<Vec<Instant>> {
        let members = self
            .members
            .get(members.clone())
            .with_context(|| format!("there are no members {members:?}"))?;
        let until = Instant::now() + within;
        loop {
            let there = |member: &&Arc<Member>| member.is_at(generation) && member.acked_at() >= since;
            let missing = members.len() - members.iter().filter(there).count();
            if missing == 0 {
                break;
            }
            if Instant::now() > until {
                let all = members.len();
                bail!("{missing} of {all} proxies have not acknowledged {generation} within {within:?}");
            }
            tokio::time::sleep(EVERY).await;
        }
        let mut acked: Vec<_> = members.iter().map(|member| member.acked_at()).collect();
        acked.sort();
        Ok(acked)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let all = 0..self.running.len();
        self.stop(all);
    }
}

/// Says that a member is not connected, even when its task is aborted.
struct Gone<'a>(&'a Member);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.connected.store(false, Ordering::Release);
    }
}

impl Member {
    fn new(
        authority: &Authority,
        (zone, name): (u32, u32),
        control: &SpiffeId,
        epoch: Instant,
    ) -> anyhow::Result<Self> {
        let (zone, name) = (format!("z{zone}"), format!("p{name}"));
        let id = SpiffeId::proxy(authority.domain(), &zone, &name)?;
        let given = authority.give(&id, LIFE)?;
        Ok(Self {
            identity: Identity::given(format!("the simulated {name}"), given)?,
            control: control.clone(),
            zone,
            name,
            epoch,
            store_id: Mutex::default(),
            generation: AtomicU64::new(0),
            acked: AtomicU64::new(0),
            connected: AtomicBool::new(false),
            tries: AtomicU32::new(0),
            sessions: AtomicU32::new(0),
            fulls: AtomicU32::new(0),
            updates: AtomicU64::new(0),
            resources: AtomicU64::new(0),
            update_bytes: AtomicU64::new(0),
            wire_bytes: Arc::default(),
        })
    }

    /// Follows a control plane for as long as it is not aborted.
    async fn run(self: Arc<Self>, control: SocketAddr, mut cuts: watch::Receiver<u64>) {
        let mut failures = 0u32;
        loop {
            cuts.mark_unchanged();
            let began = Instant::now();
            self.tries.fetch_add(1, Ordering::Relaxed);
            {
                let _gone = Gone(&self);
                tokio::select! {
                    () = session::run(&self, control) => {}
                    changed = cuts.changed() => if changed.is_err() { return },
                }
            }
            failures = if began.elapsed() > GOOD { 0 } else { failures + 1 };
            let bound = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16));
            tokio::time::sleep(bound.min(MAX_PAUSE).mul_f64(fastrand::f64())).await;
        }
    }

    fn keep(&self, store_id: &str, generation: u64) {
        let mut kept = self.store_id.lock().unwrap_or_else(PoisonError::into_inner);
        if *kept != store_id {
            store_id.clone_into(&mut kept);
        }
        self.generation.store(generation, Ordering::Release);
    }

    /// What came with one update.
    fn see(&self, seen: &Seen) {
        // Relaxed: counts, read when nothing comes any more.
        self.updates.fetch_add(1, Ordering::Relaxed);
        self.resources.fetch_add(seen.resources, Ordering::Relaxed);
        self.update_bytes.fetch_add(seen.bytes, Ordering::Relaxed);
        self.fulls.fetch_add(u32::from(seen.full), Ordering::Relaxed);
    }

    /// A generation has been acknowledged.
    fn acked(&self, store_id: &str, generation: u64) {
        let nanos = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.acked.store(nanos, Ordering::Release);
        self.keep(store_id, generation);
        self.connected.store(true, Ordering::Release);
    }

    fn is_at(&self, generation: u64) -> bool {
        self.connected.load(Ordering::Acquire) && self.generation.load(Ordering::Acquire) >= generation
    }

    fn acked_at(&self) -> Instant {
        self.epoch + Duration::from_nanos(self.acked.load(Ordering::Acquire))
    }

    fn tallied(&self) -> Tallied {
        Tallied {
            connected: self.connected.load(Ordering::Acquire),
            generation: self.generation.load(Ordering::Acquire),
            tries: self.tries.load(Ordering::Relaxed),
            sessions: self.sessions.load(Ordering::Relaxed),
            fulls: self.fulls.load(Ordering::Relaxed),
            updates: self.updates.load(Ordering::Relaxed),
            resources: self.resources.load(Ordering::Relaxed),
            update_bytes: self.update_bytes.load(Ordering::Relaxed),
            wire_bytes: self.wire_bytes.load(Ordering::Relaxed),
        }
    }
}

//! Whether this control plane may take writes, where several stores of one mesh exist: [`Contender`] on a place.

use super::epoch::{Ambition, Claim, Contender, KEPT, Moment, Outcome, Step};
use super::error::BackupError;
use super::manifest::EPOCHS;
use super::place::Place;
use crate::kv::{Gate, Kv};
use crate::store::Clock;
use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Largest claim, in bytes.
const MAX_CLAIM: u64 = 64 << 10;
/// The pause after a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// How often old claims are taken away.
const SWEEP: Duration = Duration::from_secs(600);

/// What this control plane is among those that might lead.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Role {
    /// It takes writes.
    Leader,
    /// It follows, or has not led yet.
    Standby,
    /// Another store leads: this one's is behind, and takes no writes any more.
    Fenced,
}

/// This control plane's part in the epochs of a mesh.
#[derive(Debug)]
pub(crate) struct Epochs {
    place: Place,
    contender: Mutex<Contender>,
    /// The store that it has, or will have once it leads.
    store_id: String,
    /// Whether it has that store: then claims for another fence it.
    has_store: AtomicBool,
    /// There were claims up to this number: nobody has to list those before.
    floor: AtomicU64,
    changed: watch::Sender<Role>,
}

/// Whether this control plane leads, among those with stores of their own. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Lead(pub(crate) Arc<Epochs>);

impl Lead {
    /// Of one that leads with a store, as long as no other store does: `place` is where all of them say so.
    ///
    /// # Errors
    ///
    /// If the place can't be used.
    pub fn primary(place: &str, store_id: &str, address: &str, ttl: Duration) -> anyhow::Result<Self> {
        let place = Place::open(place)?;
        Ok(Self(Epochs::primary(place, store_id, address, ttl)))
    }

    /// Whether proxies may have policy from here: not from a store that another has taken the place of, and of a copy that is
    /// behind only those that have no more than it.
    pub(crate) fn may_serve(&self, is_behind: bool) -> bool {
        match self.0.role() {
            Role::Leader => true,
            Role::Standby => !is_behind,
            Role::Fenced => false,
        }
    }

    /// Whether another store has taken the place of this one.
    pub(crate) fn is_fenced(&self) -> bool {
        self.0.role() == Role::Fenced
    }

    /// Waits until another store has taken the place of this one.
    pub(crate) async fn fenced(&self) {
        let mut changed = self.0.changed.subscribe();
        if changed.wait_for(|role| *role == Role::Fenced).await.is_err() {
            // It never will be.
            std::future::pending::<()>().await;
        }
    }

    /// Lets writes to a store by only while it leads.
    pub fn guard(&self, kv: &Kv) {
        kv.guard(self.0.gate());
    }

    /// Claims and renews until it is stopped; then it is given back.
    pub async fn run(self, stop: CancellationToken) {
        self.0.run(stop).await;
    }
}

/// A time that goes on while the machine sleeps, and never jumps.
fn now() -> Moment {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

impl Epochs {
    /// One that leads with the store that it has, as long as no other store does.
    pub(crate) fn primary(place: Place, store_id: &str, address: &str, ttl: Duration) -> Arc<Self> {
        let store_id = store_id.to_owned();
        Self::new(
            place,
            store_id,
            true,
            address,
            ttl,
            Ambition::After(Duration::ZERO),
        )
    }

    /// One that waits: until somebody says so, or nobody has led for `promote_after`.
    pub(crate) fn standby(
        place: Place,
        address: &str,
        ttl: Duration,
        promote_after: Option<Duration>,
    ) -> Arc<Self> {
        let ambition = promote_after.map_or(Ambition::None, Ambition::After);
        Self::new(place, token(), false, address, ttl, ambition)
    }

    fn new(
        place: Place,
        store_id: String,
        has_store: bool,
        address: &str,
        ttl: Duration,
        ambition: Ambition,
    ) -> Arc<Self> {
        let mut contender = Contender::new(token(), address.to_owned(), ttl, ambition);
        contender.set_store(store_id.clone());
        Arc::new(Self {
            place,
            contender: Mutex::new(contender),
            store_id,
            has_store: AtomicBool::new(has_store),
            floor: AtomicU64::new(0),
            changed: watch::Sender::new(Role::Standby),
        })
    }

    fn contender(&self) -> MutexGuard<'_, Contender> {
        // Poison is harmless: every change is whole.
        self.contender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn role(&self) -> Role {
        if self.contender().leads(now()) {
            return Role::Leader;
        }
        match *self.changed.borrow() {
            Role::Fenced => Role::Fenced,
            Role::Leader | Role::Standby => Role::Standby,
        }
    }

    /// The epoch that this one has, or the last that it saw, and where its leader is.
    pub(crate) fn shown(&self) -> (u64, String) {
        let contender = self.contender();
        let seen = contender
            .leader()
            .map(|claim| (claim.epoch, claim.address.clone()));
        match (contender.epoch(), seen) {
            (Some(epoch), Some((_, address))) => (epoch, address),
            (Some(epoch), None) => (epoch, String::new()),
            (None, Some(seen)) => seen,
            (None, None) => (0, String::new()),
        }
    }

    /// The id of the store with which it leads.
    pub(crate) fn store_id(&self) -> &str {
        &self.store_id
    }

    /// Whether a claim is for another store than the one that this has.
    fn is_foreign(&self, claim: &Claim) -> bool {
        self.has_store.load(Ordering::Relaxed) && claim.store_id != self.store_id
    }

    /// Lets it lead as soon as it can be sure that nobody else does.
    pub(crate) fn promote(&self) {
        self.contender().set_ambition(Ambition::Now);
    }

    /// Lets writes by only while it leads.
    pub(crate) fn gate(self: &Arc<Self>) -> Gate {
        let this = Arc::clone(self);
        Gate::new(move || this.may_write())
    }

    /// Lets nothing by, and says who leads: a copy is written only by what it follows.
    pub(crate) fn gate_closed(self: &Arc<Self>) -> Gate {
        let this = Arc::clone(self);
        Gate::new(move || {
            let (_, leader) = this.shown();
            Err(match leader.as_str() {
                "" => "this control plane is a standby: it takes no writes".to_owned(),
                leader => format!("this control plane is a standby: write to the one at {leader}"),
            })
        })
    }

    fn may_write(&self) -> Result<(), String> {
        let contender = self.contender();
        if contender.leads(now()) {
            return Ok(());
        }
        let leader = contender.leader();
        Err(
            match leader.filter(|claim| !claim.released && claim.store_id != self.store_id) {
                Some(claim) if claim.address.is_empty() => "another control plane leads".to_owned(),
                Some(claim) => format!("the control plane at {} leads: write there", claim.address),
                None => "this control plane does not lead (yet): try again".to_owned(),
            },
        )
    }

    /// Claims, renews and looks until it is stopped; then what it holds is given back.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut swept = now();
        while !stop.is_cancelled() {
            let step = self.contender().next(now());
            let done = tokio::select! {
                () = stop.cancelled() => break,
                done = self.step(step) => done,
            };
            if let Err(error) = done {
                tracing::warn!(
                    place = self.place.url(),
                    error = error.chain(),
                    "can't see who leads"
                );
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = tokio::time::sleep(PAUSE) => {}
                }
            }
            self.judge();
            if now() >= swept + SWEEP {
                swept = now();
                if let Err(error) = self.sweep().await {
                    tracing::debug!(error = error.chain(), "old claims stay for now");
                }
            }
        }
        let released = self.contender().release(now());
        self.changed
            .send_if_modified(|role| std::mem::replace(role, Role::Standby) != Role::Standby);
        if let Some((number, claim)) = released {
            // A number that is taken says that somebody else leads already.
            drop(self.place.create(&name(number), encode(&claim)).await);
        }
    }

    /// Sees whether another store leads, and tells of changes.
    fn judge(&self) {
        let role = {
            let mut contender = self.contender();
            let leader = contender.leader();
            let foreign = leader.is_some_and(|claim| self.is_foreign(claim));
            if contender.leads(now()) {
                self.has_store.store(true, Ordering::Relaxed);
                Role::Leader
            } else if foreign {
                contender.set_ambition(Ambition::None);
                Role::Fenced
            } else {
                Role::Standby
            }
        };
        let before = *self.changed.borrow();
        if before != role {
            let (epoch, leader) = self.shown();
            tracing::info!(?role, epoch, leader, "the epoch");
            self.changed.send_replace(role);
        }
    }

    async fn step(&self, step: Step) -> Result<(), BackupError> {
        match step {
            Step::Wait(until) => {
                let wait = until.saturating_sub(now()).min(Duration::from_millis(200));
                tokio::time::sleep(wait.max(Duration::from_millis(1))).await;
                Ok(())
            }
            Step::Read => {
                let begun = now();
                let found = self.last().await?;
                let foreign = found.as_ref().is_some_and(|(_, claim)| self.is_foreign(claim));
                let mut contender = self.contender();
                if foreign {
                    contender.set_ambition(Ambition::None);
                }
                contender.saw(begun, now(), found);
                Ok(())
            }
            Step::Claim { number, claim } => {
                let begun = now();
                let made = self.place.create(&name(number), encode(&claim)).await;
                let (outcome, done) = match made {
                    Ok(true) => (Outcome::Made, Ok(())),
                    Ok(false) => (Outcome::Taken, Ok(())),
                    Err(error) => (Outcome::Unknown, Err(error.into())),
                };
                self.contender().claimed(begun, now(), number, &claim, outcome);
                done
            }
        }
    }

    /// The last claim that stands.
    async fn last(&self) -> Result<Option<(u64, Claim)>, BackupError> {
        // Relaxed: it is one value, and one that is too low costs a longer list.
        let floor = self.floor.load(Ordering::Relaxed);
        let after = floor.checked_sub(1).map(name);
        let Some(found) = self.place.list(EPOCHS, after.as_deref()).await?.pop() else {
            self.floor.store(0, Ordering::Relaxed);
            return match floor {
                0 => Ok(None),
                // The last is never taken away: this is no place where there has been none.
                _ => Err(BackupError::Nothing(
                    "the claims that were there have gone".to_owned(),
                )),
            };
        };
        let bytes = self.place.get(&found.name, MAX_CLAIM).await?;
        let number: Option<u64> = found.name.rsplit('/').next().and_then(|n| n.parse().ok());
        let claim: Option<Claim> = serde_json::from_slice(&bytes).ok();
        let Some((number, claim)) = number.zip(claim) else {
            return Err(BackupError::Content {
                object: found.name,
                what: "is no claim".to_owned(),
            });
        };
        self.floor.store(number, Ordering::Relaxed);
        Ok(Some((number, claim)))
    }

    /// The store of the last claim.
    pub(crate) async fn last_store(&self) -> Result<Option<String>, BackupError> {
        Ok(self.last().await?.map(|(_, claim)| claim.store_id))
    }

    async fn sweep(&self) -> Result<(), BackupError> {
        let found = self.place.list(EPOCHS, None).await?;
        let kept = i64::try_from(KEPT.as_millis()).unwrap_or(i64::MAX);
        let oldest = Clock::System.now_ms().saturating_sub(kept);
        // A claim is old once the one after it is.
        for (this, next) in found.iter().zip(found.iter().skip(1)) {
            if next.modified_ms < oldest {
                self.place.delete(&this.name).await?;
            }
        }
        Ok(())
    }
}

/// A name that nobody else has.
fn token() -> String {
    format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..))
}

fn name(number: u64) -> String {
    format!("{EPOCHS}/{number:020}")
}

fn encode(claim: &Claim) -> Vec<u8> {
    // A value of this type always has a text.
    serde_json::to_vec(claim).unwrap_or_default()
}

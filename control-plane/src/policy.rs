//! Policy as the control plane knows it: the store, and the checks before anything is written to it.

mod apply;
mod certificates;
mod check;
mod levels;
mod modules;
mod rollout;
mod whole;

pub(crate) use apply::check_manager;
pub use apply::{Apply, Prune};
use levels::Book;
pub(crate) use levels::{InForce, by_trigger, ms};
pub(crate) use modules::Image;
pub use rollout::{RolledBack, Way};
pub(crate) use whole::lay_over;

use crate::rollout::ledger::Ledger;

use crate::access::{Caller, Scope};
use crate::store::{
    Author, Change, Changes, Fence, Judged, LevelChange, LevelWrites, Place, Store, StoreError, Stored,
};
use leeward_policy::model::AccessRole;
use leeward_policy::{Key, Kind, Name, Resource};
use leeward_proto::{BadField, parse, v1};
use prost::Message;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::ops::Bound;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};

/// The store and what is in it, parsed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Policy {
    store: Store,
    ledger: Ledger,
    /// What is stored, for the checks of references. Held through a write, so that writes of this control plane are one after
    /// the other; that others wrote in between, the store says, and it is checked anew.
    world: Arc<Mutex<World>>,
}

type Known = BTreeMap<Key, Entry>;

/// What is stored at a revision, parsed.
#[derive(Debug, Default)]
struct World {
    at: u64,
    known: Known,
}

/// A stored resource as the checks need it.
#[derive(Clone, Debug)]
struct Entry {
    revision: u64,
    /// `None` for one that this build can't read. It exists, and can be replaced or deleted; proxies get it
    /// as it is and say what they make of it.
    resource: Option<Arc<Resource>>,
}

impl Entry {
    /// The labels of the resource; of one that can't be read, what it says of them.
    fn labels(&self, store: &Store, key: &Key) -> Cow<'_, BTreeMap<String, String>> {
        match &self.resource {
            Some(resource) => Cow::Borrowed(&resource.labels),
            None => {
                let metadata = store.get(key).and_then(|stored| wire(&stored).metadata);
                Cow::Owned(metadata.unwrap_or_default().labels.into_iter().collect())
            }
        }
    }
}

/// What an apply did.
#[derive(Debug)]
pub struct Applied {
    /// As stored, in the order of the request.
    pub resources: Vec<v1::Resource>,
    /// Whether each changed.
    pub changed: Vec<bool>,
    /// The store's revision after it.
    pub revision: u64,
    /// The RolloutPolicy by which it gets to proxies in steps; `None`: to all at once.
    pub rollout: Option<Name>,
    /// The revision that it was checked at.
    pub(crate) at: u64,
    /// What was deleted.
    pub pruned: Vec<Key>,
    /// What would change, if it was a dry run.
    pub(crate) diffs: Vec<ResourceDiff>,
    /// What was written, with the revisions before and after.
    pub(crate) written: Vec<(Key, u64, u64)>,
}

/// A resource that would change, before and after.
pub(crate) type ResourceDiff = (Key, Option<v1::Resource>, Option<v1::Resource>);

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Fields are bad. Paths begin with the resource's place in the request, as `resources[0].spec…`.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Bad(Vec<BadField>),
    /// A resource that others refer to.
    #[error("{key} is in use by {}", .by.join(", "))]
    InUse {
        /// The resource.
        key: Key,
        /// Who refers to it, with the field.
        by: Vec<String>,
    },
    /// There is no such resource.
    #[error("there is no {0}")]
    NotFound(Key),
    /// There is no such module.
    #[error("there is no module {0}")]
    NoModule(String),
    /// A module that Plugins name.
    #[error("module {sha256} is in use by {}", .by.join(", "))]
    ModuleInUse {
        /// The module.
        sha256: String,
        /// Who names it, with the field.
        by: Vec<String>,
    },
    /// No room for a module.
    #[error("{why}: delete modules with leeward plugin delete, or raise --plugin-store; {unused}")]
    Full {
        /// How much there is.
        why: String,
        /// Which could go.
        unused: String,
    },
    /// Too much at once.
    #[error("{0} resources in one call; want at most {MAX_RESOURCES}")]
    TooMany(usize),
    /// Another change is on its way to proxies.
    #[error(
        "revision {revision} goes out in steps by RolloutPolicy {policy}; wait for its end, promote or abort it \
         (leeward rollout), or take it back first with --supersede"
    )]
    UnderWay {
        /// The revision.
        revision: u64,
        /// The policy.
        policy: String,
    },
    /// The same, and it is to be taken back first.
    #[error("revision {0} has to be taken back first")]
    Supersedes(u64),
    /// There is no such revision any more.
    #[error("there is no revision {0}, or it is not kept any more")]
    NoRevision(u64),
    /// One that is there, and was to be new.
    #[error("there is {0} already, and only new resources were to be made")]
    Exists(Key),
    /// One that is another manager's.
    #[error(
        "{key} is managed by {owner:?}, and {manager:?} would change it: apply as that manager, or take it over with force"
    )]
    Manager {
        /// The resource.
        key: Key,
        /// Whose it is.
        owner: String,
        /// Who would change it.
        manager: String,
    },
    /// More would be pruned than may be.
    #[error("{count} resources would be deleted, such as {}; want at most {limit} (max_deletes)", .keys.join(", "))]
    Prune {
        /// How many would be.
        count: usize,
        /// How many may be.
        limit: usize,
        /// Some of them.
        keys: Vec<String>,
    },
    /// Nobody would get in any more.
    #[error(
        "nobody could change AccessPolicies any more: want a binding with the role Breakglass, without kinds and selector, for somebody (in the first AccessPolicy: for you)"
    )]
    Lockout,
    /// The caller may not.
    #[error("{0}")]
    Denied(Box<tonic::Status>),
    /// The store said no.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The task that did it broke down.
    #[error("the store's task broke down")]
    Broken,
}

/// Resources of one apply.
const MAX_RESOURCES: usize = 10_000;
/// Times that a write is checked anew because others wrote in between.
const MAX_TRIES: u32 = 50;
/// Who writes what triggers ask for.
const TRIGGERS: &str = "triggers";

impl Policy {
    /// Reads what is stored.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub async fn open(store: Store) -> Result<Self, Refused> {
        let policy = Self {
            ledger: Ledger::new(store.clone()),
            store,
            world: Arc::default(),
        };
        drop(policy.world().await?);
        Ok(policy)
    }

    /// What is stored now, parsed. Nobody here writes while it is held.
    async fn world(&self) -> Result<OwnedMutexGuard<World>, Refused> {
        let mut world = Arc::clone(&self.world).lock_owned().await;
        if world.at == self.store.revision() {
            return Ok(world);
        }
        let store = self.store.clone();
        // Thousands of resources, at worst: not on a thread that serves others.
        blocking(move || {
            world.follow(&store);
            Ok(world)
        })
        .await
    }

    /// The store.
    pub const fn store(&self) -> &Store {
        &self.store
    }

    /// What is written down of rollouts.
    pub(crate) const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Distinguishes this store from every other.
    pub fn store_id(&self) -> &str {
        self.store.id()
    }

    /// The revision of the last write.
    pub fn revision(&self) -> u64 {
        self.store.revision()
    }

    /// Tells of every write.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.store.watch()
    }

    /// Writes resources, all or none. A write that has begun is finished even if the caller goes away.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is written then.
    pub async fn apply(
        &self,
        resources: Vec<v1::Resource>,
        dry_run: bool,
        author: impl Into<Author>,
    ) -> Result<Applied, Refused> {
        let what = Apply {
            resources,
            dry_run,
            force: true,
            ..Apply::default()
        };
        self.apply_as(what, author.into()).await
    }

    /// The same, with all that there is to say of it.
    ///
    /// # Errors
    ///
    /// As for [`Policy::apply`].
    pub async fn apply_as(&self, what: Apply, author: Author) -> Result<Applied, Refused> {
        if what.resources.len() > MAX_RESOURCES {
            return Err(Refused::TooMany(what.resources.len()));
        }
        check_manager(&what.manager)?;
        let policy = self.clone();
        detached(async move {
            let mut tries = 0..MAX_TRIES;
            loop {
                // So that it is checked against all that was acknowledged, wherever.
                policy.store.settle().await?;
                match Box::pin(apply::apply(&policy, &what, &author)).await {
                    Err(Refused::Store(StoreError::Moved { .. })) if tries.next().is_some() => {}
                    Err(Refused::Supersedes(revision)) if tries.next().is_some() => {
                        may_take_back(what.caller.as_ref())?;
                        policy.supersede(revision, &author).await?;
                    }
                    applied => return applied,
                }
            }
        })
        .await
    }

    /// Deletes a resource, likewise.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is deleted then.
    pub async fn delete(&self, key: Key, expect: u64, author: impl Into<Author>) -> Result<u64, Refused> {
        let deleted = self
            .delete_as(key, expect, author.into(), None, Way::default())
            .await;
        deleted.map(|(revision, _)| revision)
    }

    /// The same, for a caller, and in the way that it says. Returns the revision of the resource before, too.
    pub(crate) async fn delete_as(
        &self,
        key: Key,
        expect: u64,
        author: Author,
        caller: Option<Caller>,
        way: Way,
    ) -> Result<(u64, u64), Refused> {
        let policy = self.clone();
        detached(async move {
            let mut tries = 0..MAX_TRIES;
            loop {
                policy.store.settle().await?;
                match Box::pin(apply::delete(
                    &policy,
                    (&key, expect),
                    &author,
                    caller.as_ref(),
                    &way,
                ))
                .await
                {
                    Err(Refused::Store(StoreError::Moved { .. })) if tries.next().is_some() => {}
                    Err(Refused::Supersedes(revision)) if tries.next().is_some() => {
                        may_take_back(caller.as_ref())?;
                        policy.supersede(revision, &author).await?;
                    }
                    deleted => return deleted,
                }
            }
        })
        .await
    }

    /// Writes down what triggers have changed, for whoever holds the fence; not of a policy that was deleted meanwhile, which
    /// would be there again for a later one of the same name.
    pub(crate) async fn judged(&self, mut writes: LevelWrites, fence: Fence) -> Result<(), Refused> {
        let policy = self.clone();
        detached(async move {
            let world = policy.world().await?;
            writes
                .judged
                .retain(|(place, _)| levels::is_there(&world.known, &place.policy));
            writes
                .changes
                .retain(|change| levels::is_there(&world.known, &change.policy));
            let change = Change {
                levels: writes,
                author: Author::of(TRIGGERS),
                fence: Some(fence),
                at: Some(world.at),
                ..Change::default()
            };
            policy.store.write(change).await?;
            Ok(())
        })
        .await
    }

    /// Writes down which overrides have come to their end by `now`, if any has, for whoever holds the fence.
    pub(crate) async fn expire(&self, now: SystemTime, fence: Fence) -> Result<(), Refused> {
        if !Book::of(&self.store).is_due(now) {
            return Ok(());
        }
        let policy = self.clone();
        detached(async move {
            let world = policy.world().await?;
            let book = Book::of(&policy.store);
            let change = Change {
                levels: levels::expired(&world.known, &book, now),
                author: Author::of(levels::EXPIRY),
                fence: Some(fence),
                at: Some(world.at),
                levels_at: Some(book.at),
                ..Change::default()
            };
            policy.store.write(change).await?;
            Ok(())
        })
        .await
    }

    /// What triggers asked for when last judged.
    pub(crate) fn judgements(&self) -> BTreeMap<Place, Judged> {
        self.store.judged_levels()
    }

    /// The DegradationPolicies, the zones that have a resource, and the revision that this shows.
    pub(crate) async fn degradations(&self) -> Result<(Vec<Arc<Resource>>, BTreeSet<String>, u64), Refused> {
        let world = self.world().await?;
        Ok((
            levels::policies(&world.known),
            levels::zones(&world.known),
            world.at,
        ))
    }

    /// Every DegradationPolicy's level in every zone that has a resource, and `also` in these. What a zone's own
    /// triggers ask for counts where they are `believed`.
    pub(crate) async fn levels(
        &self,
        also: BTreeSet<String>,
        believed: impl Fn(&str) -> bool + Send + 'static,
        now: SystemTime,
    ) -> Result<Vec<InForce>, Refused> {
        self.store.settle().await?;
        let world = self.world().await?;
        let store = self.store.clone();
        blocking(move || {
            let last = store.last_level_changes();
            let mut zones = levels::zones(&world.known);
            zones.extend(also);
            let zones = zones.into_iter().map(|zone| {
                let is_believed = believed(&zone);
                (zone, is_believed)
            });
            let zones = zones.collect();
            let book = Book::of(&store);
            Ok(levels::in_force(&world.known, &book, &last, &zones, now))
        })
        .await
    }

    /// Changes of levels with their numbers, newest first.
    pub(crate) async fn level_changes(
        &self,
        policy: String,
        before: u64,
        limit: u32,
    ) -> Result<Vec<(u64, LevelChange)>, Refused> {
        self.store.settle().await?;
        Ok(self.store.level_changes(&policy, before, limit))
    }

    /// One resource.
    ///
    /// # Errors
    ///
    /// If there is none, or the store can't be reached.
    pub async fn get(&self, key: Key) -> Result<v1::Resource, Refused> {
        self.store.settle().await?;
        let stored = self.store.get(&key);
        stored.as_ref().map(wire).ok_or(Refused::NotFound(key))
    }

    /// Resources by kind and name, from after a place; and the revision that this shows.
    ///
    /// # Errors
    ///
    /// If the store can't be reached.
    pub async fn list(
        &self,
        kind: Option<Kind>,
        after: Option<Key>,
        limit: usize,
    ) -> Result<(Vec<(Key, v1::Resource)>, u64), Refused> {
        self.store.settle().await?;
        let store = self.store.clone();
        blocking(move || {
            let (stored, revision) = store.list(kind, after.as_ref(), limit);
            Ok((
                stored.iter().map(|s| (s.key.clone(), wire(s))).collect(),
                revision,
            ))
        })
        .await
    }

    /// The same, of resources that have what is wanted, which is asked of their labels.
    pub(crate) async fn list_where(
        &self,
        kind: Option<Kind>,
        after: Option<Key>,
        limit: usize,
        wanted: impl Fn(Kind, &BTreeMap<String, String>) -> bool + Send + 'static,
    ) -> Result<(Vec<(Key, v1::Resource)>, u64), Refused> {
        self.store.settle().await?;
        let world = self.world().await?;
        let store = self.store.clone();
        blocking(move || {
            let from = after.map_or(Bound::Unbounded, Bound::Excluded);
            let of_kind = |key: &Key| kind.is_none_or(|kind| kind == key.kind);
            let mut found = Vec::new();
            for (key, entry) in world
                .known
                .range((from, Bound::Unbounded))
                .filter(|(key, _)| of_kind(key))
            {
                if found.len() == limit {
                    break;
                }
                if wanted(key.kind, &entry.labels(&store, key)) {
                    // One that has gone since is not there any more.
                    found.extend(store.get(key).map(|stored| (key.clone(), wire(&stored))));
                }
            }
            Ok((found, world.at))
        })
        .await
    }

    /// The labels of resources, of those that are there.
    pub(crate) async fn labels(
        &self,
        keys: impl IntoIterator<Item = Key>,
    ) -> Result<BTreeMap<Key, BTreeMap<String, String>>, Refused> {
        let world = self.world().await?;
        let of = |key: Key| {
            let labels = world.known.get(&key)?.labels(&self.store, &key).into_owned();
            Some((key, labels))
        };
        Ok(keys.into_iter().filter_map(of).collect())
    }

    /// The AccessPolicies, from memory: nobody who writes is waited for.
    pub(crate) fn access_policies(&self) -> Vec<Stored> {
        self.store.list(Some(Kind::AccessPolicy), None, usize::MAX).0
    }

    /// What changed after a revision; `None` if changes that old are forgotten. From memory, as is the next.
    pub fn changes_since(&self, after: u64) -> Option<Changes> {
        self.store.changes_since(after)
    }

    /// Everything there is, and every deletion that is remembered.
    pub fn everything(&self) -> Changes {
        self.store.everything()
    }
}

/// Off the runtime's own threads.
async fn blocking<T: Send + 'static>(
    act: impl FnOnce() -> Result<T, Refused> + Send + 'static,
) -> Result<T, Refused> {
    tokio::task::spawn_blocking(act)
        .await
        .map_err(|_| Refused::Broken)?
}

/// To the end, even if whoever waits for it goes away.
async fn detached<T: Send + 'static>(
    act: impl Future<Output = Result<T, Refused>> + Send + 'static,
) -> Result<T, Refused> {
    tokio::spawn(act).await.map_err(|_| Refused::Broken)?
}

impl World {
    /// Comes to where the store is.
    fn follow(&mut self, store: &Store) {
        // A store that was restored may have gone back.
        let changes = store
            .changes_since(self.at)
            .filter(|changes| changes.to >= self.at);
        let changes = changes.unwrap_or_else(|| {
            self.known.clear();
            store.everything()
        });
        for (_, key) in changes.deletes {
            self.known.remove(&key);
        }
        for stored in changes.upserts {
            let resource = match parse(&wire(&stored)) {
                Ok(resource) => Some(Arc::new(resource)),
                Err(bad) => {
                    let reason = Refused::Bad(bad).to_string();
                    tracing::warn!(resource = %stored.key, reason, "this build can't read a stored resource");
                    None
                }
            };
            let revision = stored.revision;
            self.known.insert(stored.key, Entry { revision, resource });
        }
        self.at = changes.to;
    }

    /// Takes over what was just written here, if it is what follows.
    fn wrote(&mut self, revision: u64, entries: impl IntoIterator<Item = (Key, Option<Arc<Resource>>)>) {
        if revision != self.at + 1 {
            return;
        }
        for (key, resource) in entries {
            match resource {
                Some(resource) => {
                    let resource = Some(resource);
                    self.known.insert(key, Entry { revision, resource })
                }
                None => self.known.remove(&key),
            };
        }
        self.at = revision;
    }
}

/// Taking a rollout back is operation, whatever else it is done for.
fn may_take_back(caller: Option<&Caller>) -> Result<(), Refused> {
    let Some(caller) = caller else { return Ok(()) };
    caller
        .require(AccessRole::Operator, Scope::Whole, "take a rollout back")
        .map_err(|status| Refused::Denied(Box::new(status)))
}

pub(crate) fn wall() -> SystemTime {
    #[expect(
        clippy::disallowed_methods,
        reason = "overrides end at a time that people set, and the audit is for people"
    )]
    SystemTime::now()
}

/// Without what the store itself says of a resource.
fn bare(mut wire: v1::Resource) -> v1::Resource {
    wire.status = None;
    if let Some(metadata) = &mut wire.metadata {
        metadata.revision = 0;
        (metadata.create_time, metadata.update_time) = (None, None);
    }
    wire
}

/// A stored resource as it goes on the wire.
pub(crate) fn wire(stored: &Stored) -> v1::Resource {
    // What was written was encoded here; what can't be read shows as a resource without a spec, which the
    // reader refuses by name.
    let mut resource = v1::Resource::decode(&*stored.payload).unwrap_or_default();
    let metadata = resource.metadata.get_or_insert_default();
    metadata.name = stored.key.name.to_string();
    metadata.revision = stored.revision;
    metadata.create_time = Some(timestamp(stored.created_ms));
    metadata.update_time = Some(timestamp(stored.updated_ms));
    resource
}

pub(crate) fn timestamp(ms: i64) -> prost_types::Timestamp {
    let nanos = i32::try_from(ms.rem_euclid(1000)).unwrap_or(0) * 1_000_000;
    prost_types::Timestamp {
        seconds: ms.div_euclid(1000),
        nanos,
    }
}

fn parse_all(resources: &[v1::Resource]) -> Result<Vec<Resource>, Refused> {
    let (mut parsed, mut bad) = (Vec::with_capacity(resources.len()), Vec::new());
    let mut seen = BTreeMap::new();
    for (i, wire) in resources.iter().enumerate() {
        match parse(wire) {
            Ok(resource) => {
                if let Some(first) = seen.insert(resource.key(), i) {
                    bad.push(BadField {
                        path: format!("resources[{i}]"),
                        reason: format!(
                            "{} stands at resources[{first}] already; each must stand once",
                            resource.key()
                        ),
                    });
                }
                parsed.push(resource);
            }
            Err(fields) => {
                let at = |f: BadField| BadField {
                    path: format!("resources[{i}].{}", f.path),
                    reason: f.reason,
                };
                bad.extend(fields.into_iter().map(at));
            }
        }
    }
    if bad.is_empty() {
        Ok(parsed)
    } else {
        Err(Refused::Bad(bad))
    }
}

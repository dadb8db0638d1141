//! Policy as the control plane knows it: the store, and the checks before anything is written to it.

mod certificates;
mod check;
mod levels;
mod modules;
mod rollout;
mod whole;

use levels::Book;
pub(crate) use levels::{InForce, by_trigger, ms};
pub(crate) use modules::Image;
pub use rollout::{RolledBack, Way};
pub(crate) use whole::lay_over;

use crate::rollout::ledger::Ledger;

use crate::store::{
    Author, Change, Changes, Fence, Judged, LevelChange, LevelWrites, Place, Store, StoreError, Stored, Write,
};
use leeward_policy::{Key, Name, Resource};
use leeward_proto::{BadField, parse, v1};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
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
}

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
        self.apply_by(resources, dry_run, author, Way::default()).await
    }

    /// The same, and says how it gets to proxies.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is written then.
    pub async fn apply_by(
        &self,
        resources: Vec<v1::Resource>,
        dry_run: bool,
        author: impl Into<Author>,
        way: Way,
    ) -> Result<Applied, Refused> {
        if resources.len() > MAX_RESOURCES {
            return Err(Refused::TooMany(resources.len()));
        }
        let (policy, author) = (self.clone(), author.into());
        detached(async move {
            let mut tries = 0..MAX_TRIES;
            loop {
                // So that it is checked against all that was acknowledged, wherever.
                policy.store.settle().await?;
                match Box::pin(apply(&policy, resources.clone(), dry_run, &author, &way)).await {
                    Err(Refused::Store(StoreError::Moved { .. })) if tries.next().is_some() => {}
                    Err(Refused::Supersedes(revision)) if tries.next().is_some() => {
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
        self.delete_by(key, expect, author, Way::default()).await
    }

    /// The same, and says how it gets to proxies.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is deleted then.
    pub async fn delete_by(
        &self,
        key: Key,
        expect: u64,
        author: impl Into<Author>,
        way: Way,
    ) -> Result<u64, Refused> {
        let (policy, author) = (self.clone(), author.into());
        detached(async move {
            let mut tries = 0..MAX_TRIES;
            loop {
                policy.store.settle().await?;
                match Box::pin(delete(&policy, &key, expect, &author, &way)).await {
                    Err(Refused::Store(StoreError::Moved { .. })) if tries.next().is_some() => {}
                    Err(Refused::Supersedes(revision)) if tries.next().is_some() => {
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
        kind: Option<leeward_policy::Kind>,
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

pub(crate) fn wall() -> SystemTime {
    #[expect(
        clippy::disallowed_methods,
        reason = "overrides end at a time that people set, and the audit is for people"
    )]
    SystemTime::now()
}

async fn apply(
    policy: &Policy,
    mut resources: Vec<v1::Resource>,
    dry_run: bool,
    author: &Author,
    way: &Way,
) -> Result<Applied, Refused> {
    let store = &policy.store;
    let world = policy.world().await?;
    let now = wall();
    let (mut world, parsed, resources) = blocking(move || {
        modules::carry(&world.known, &mut resources);
        let parsed: Vec<Arc<Resource>> = parse_all(&resources)?.into_iter().map(Arc::new).collect();
        check::overrides(&parsed, now)?;
        check::references(&world.known, &parsed)?;
        Ok((world, parsed, resources))
    })
    .await?;
    let requires = modules::check(store, &world.known, &parsed).await?;
    let mut writes = Vec::new();
    let mut changed = Vec::with_capacity(parsed.len());
    for (resource, wire) in parsed.iter().zip(resources) {
        let key = resource.key();
        let there = world.known.get(&key);
        let (wanted, found) = (resource.revision, there.map_or(0, |entry| entry.revision));
        if wanted != 0 && wanted != found {
            return Err(StoreError::Conflict { key, wanted, found }.into());
        }
        let same = there
            .and_then(|entry| entry.resource.as_ref())
            .is_some_and(|there| there.spec == resource.spec && there.labels == resource.labels);
        changed.push(!same);
        if !same {
            let payload = Some(bare(wire).encode_to_vec());
            writes.push(Write {
                key,
                payload,
                expect: wanted,
            });
        }
    }
    let by = rollout::plan(policy, &world, &writes, way, dry_run).await?;
    if dry_run {
        let resources = parsed
            .iter()
            .map(|resource| leeward_proto::render(resource))
            .collect();
        let revision = world.at + u64::from(!writes.is_empty());
        return Ok(Applied {
            resources,
            changed,
            revision,
            rollout: by,
        });
    }
    let coming: Vec<&Resource> = parsed
        .iter()
        .zip(&changed)
        .filter_map(|(r, c)| c.then_some(&**r))
        .collect();
    let book = Book::of(store);
    let levels = levels::applied(&world.known, &book, &coming, &author.who, now);
    let revision = if writes.is_empty() {
        world.at
    } else {
        let change = Change {
            levels_at: (!levels.is_empty()).then_some(book.at),
            writes,
            levels,
            author: rollout::label(author, by.as_ref()),
            fence: None,
            at: Some(world.at),
            requires,
        };
        store.write(change).await?
    };
    let written = parsed.iter().zip(&changed).filter(|(_, changed)| **changed);
    world.wrote(
        revision,
        written.map(|(resource, _)| (resource.key(), Some(Arc::clone(resource)))),
    );
    let stored = parsed.iter().filter_map(|resource| store.get(&resource.key()));
    let resources = stored.map(|stored| wire(&stored)).collect();
    Ok(Applied {
        resources,
        changed,
        revision,
        rollout: by,
    })
}

async fn delete(policy: &Policy, key: &Key, expect: u64, author: &Author, way: &Way) -> Result<u64, Refused> {
    let mut world = policy.world().await?;
    if !world.known.contains_key(key) {
        return Err(Refused::NotFound(key.clone()));
    }
    let by = check::referrers(&world.known, key);
    if !by.is_empty() {
        let key = key.clone();
        return Err(Refused::InUse { key, by });
    }
    let writes = vec![Write {
        key: key.clone(),
        payload: None,
        expect,
    }];
    let by = rollout::plan(policy, &world, &writes, way, false).await?;
    let book = Book::of(&policy.store);
    let levels = levels::deleted(&world.known, &book, key, &author.who, wall());
    let change = Change {
        writes,
        levels_at: (!levels.is_empty()).then_some(book.at),
        levels,
        author: rollout::label(author, by.as_ref()),
        at: Some(world.at),
        ..Change::default()
    };
    let revision = policy.store.write(change).await?;
    world.wrote(revision, [(key.clone(), None)]);
    Ok(revision)
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

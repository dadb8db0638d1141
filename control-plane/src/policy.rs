//! Policy as the control plane knows it: the store, and the checks before anything is written to it.

mod certificates;
mod check;
mod levels;
mod modules;

use levels::Book;
pub(crate) use levels::{InForce, by_trigger, ms};
pub(crate) use modules::Image;

use crate::store::{Changes, Judged, LevelChange, LevelWrites, Place, Store, StoreError, Stored, Write};
use leeward_policy::{Key, Resource};
use leeward_proto::{BadField, parse, v1};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::SystemTime;
use tokio::sync::{Mutex, watch};

/// The store and what is in it, parsed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Policy {
    store: Arc<Store>,
    /// What is stored, for the checks of references. Held through a write, so that writes are one after the
    /// other and each is checked against what the last one left.
    known: Arc<Mutex<Known>>,
    /// Who holds which levels; changed only by those who hold `known`. No other lock is taken while this is held.
    // Poison is harmless: a write that was committed is followed without a way to fail.
    book: Arc<std::sync::Mutex<Book>>,
}

type Known = BTreeMap<Key, Entry>;

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
    /// The store said no.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The task that did it broke down.
    #[error("the store's task broke down")]
    Broken,
}

/// Resources of one apply.
const MAX_RESOURCES: usize = 10_000;

impl Policy {
    /// Reads what is stored.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub fn open(store: Store) -> Result<Self, Refused> {
        let mut known = Known::new();
        for stored in store.everything()?.upserts {
            let resource = match parse(&wire(&stored)) {
                Ok(resource) => Some(Arc::new(resource)),
                Err(bad) => {
                    let reason = Refused::Bad(bad).to_string();
                    tracing::warn!(resource = %stored.key, reason, "this build can't read a stored resource");
                    None
                }
            };
            let revision = stored.revision;
            known.insert(stored.key, Entry { revision, resource });
        }
        Ok(Self {
            book: Arc::new(std::sync::Mutex::new(Book::open(&store)?)),
            store: Arc::new(store),
            known: Arc::new(Mutex::new(known)),
        })
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

    /// Writes resources, all or none. A write that has begun is finished even if the caller goes away. `who` is the
    /// SPIFFE id of whoever asks for it, for the audit.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is written then.
    pub async fn apply(
        &self,
        resources: Vec<v1::Resource>,
        dry_run: bool,
        who: &str,
    ) -> Result<Applied, Refused> {
        if resources.len() > MAX_RESOURCES {
            return Err(Refused::TooMany(resources.len()));
        }
        let mut known = Arc::clone(&self.known).lock_owned().await;
        let writer = self.writer(who);
        self.blocking(move |store| apply(store, &mut known, &writer, resources, dry_run))
            .await
    }

    /// Deletes a resource, likewise.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is deleted then.
    pub async fn delete(&self, key: Key, expect: u64, who: &str) -> Result<u64, Refused> {
        let mut known = Arc::clone(&self.known).lock_owned().await;
        let writer = self.writer(who);
        self.blocking(move |store| delete(store, &mut known, &writer, key, expect))
            .await
    }

    /// Writes down what triggers have changed; not of a policy that was deleted meanwhile, which would be there again
    /// for a later one of the same name.
    pub(crate) async fn judged(&self, mut writes: LevelWrites) -> Result<(), Refused> {
        let known = Arc::clone(&self.known).lock_owned().await;
        let book = Arc::clone(&self.book);
        self.blocking(move |store| {
            writes
                .judged
                .retain(|(place, _)| levels::is_there(&known, &place.policy));
            writes
                .changes
                .retain(|change| levels::is_there(&known, &change.policy));
            store.write_levels(&writes)?;
            locked(&book).take(writes);
            Ok(())
        })
        .await
    }

    /// Writes down which overrides have come to their end by `now`, if any has.
    pub(crate) async fn expire(&self, now: SystemTime) -> Result<(), Refused> {
        if !locked(&self.book).is_due(now) {
            return Ok(());
        }
        let known = Arc::clone(&self.known).lock_owned().await;
        let book = Arc::clone(&self.book);
        self.blocking(move |store| {
            let writes = levels::expired(&known, &locked(&book), now);
            store.write_levels(&writes)?;
            locked(&book).take(writes);
            Ok(())
        })
        .await
    }

    /// What triggers asked for when last judged.
    pub(crate) fn judgements(&self) -> BTreeMap<Place, Judged> {
        locked(&self.book).judged.clone()
    }

    /// The DegradationPolicies, the zones that have a resource, and the revision that this shows at least.
    pub(crate) async fn degradations(&self) -> (Vec<Arc<Resource>>, BTreeSet<String>, u64) {
        let known = self.known.lock().await;
        (levels::policies(&known), levels::zones(&known), self.revision())
    }

    /// Every DegradationPolicy's level in every zone that has a resource, and `also` in these. What a zone's own
    /// triggers ask for counts where they are `believed`.
    pub(crate) async fn levels(
        &self,
        also: BTreeSet<String>,
        believed: impl Fn(&str) -> bool + Send + 'static,
        now: SystemTime,
    ) -> Result<Vec<InForce>, Refused> {
        let known = Arc::clone(&self.known).lock_owned().await;
        let book = Arc::clone(&self.book);
        self.blocking(move |store| {
            let last = store.last_level_changes()?;
            let mut zones = levels::zones(&known);
            zones.extend(also);
            // Whoever is asked here has locks of its own, so that this must come before the book's.
            let zones = zones.into_iter().map(|zone| {
                let is_believed = believed(&zone);
                (zone, is_believed)
            });
            let zones = zones.collect();
            Ok(levels::in_force(&known, &locked(&book), &last, &zones, now))
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
        self.blocking(move |store| Ok(store.level_changes(&policy, before, limit)?))
            .await
    }

    /// One resource.
    ///
    /// # Errors
    ///
    /// If there is none, or the store fails.
    pub async fn get(&self, key: Key) -> Result<v1::Resource, Refused> {
        let wanted = key.clone();
        let stored = self.blocking(move |store| Ok(store.get(&wanted)?)).await?;
        stored.as_ref().map(wire).ok_or(Refused::NotFound(key))
    }

    /// Resources by kind and name, from after a place; and the revision that this shows.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub async fn list(
        &self,
        kind: Option<leeward_policy::Kind>,
        after: Option<Key>,
        limit: usize,
    ) -> Result<(Vec<(Key, v1::Resource)>, u64), Refused> {
        let (stored, revision) = self
            .blocking(move |store| Ok(store.list(kind, after.as_ref(), limit)?))
            .await?;
        Ok((
            stored.iter().map(|s| (s.key.clone(), wire(s))).collect(),
            revision,
        ))
    }

    /// What changed after a revision; `None` if changes that old are forgotten.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub async fn changes_since(&self, after: u64) -> Result<Option<Changes>, Refused> {
        self.blocking(move |store| Ok(store.changes_since(after)?)).await
    }

    /// Everything there is, and every deletion that is remembered.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub async fn everything(&self) -> Result<Changes, Refused> {
        self.blocking(|store| Ok(store.everything()?)).await
    }

    fn writer(&self, who: &str) -> Writer {
        Writer {
            book: Arc::clone(&self.book),
            who: who.to_owned(),
        }
    }

    /// Off the runtime, and to the end: a task of this kind can't be cancelled.
    async fn blocking<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Store) -> Result<T, Refused> + Send + 'static,
    ) -> Result<T, Refused> {
        let store = Arc::clone(&self.store);
        let task = tokio::task::spawn_blocking(move || act(&store));
        task.await.map_err(|_| Refused::Broken)?
    }
}

/// Who writes, and what has to follow.
struct Writer {
    book: Arc<std::sync::Mutex<Book>>,
    who: String,
}

fn locked(book: &std::sync::Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn wall() -> SystemTime {
    #[expect(
        clippy::disallowed_methods,
        reason = "overrides end at a time that people set, and the audit is for people"
    )]
    SystemTime::now()
}

fn apply(
    store: &Store,
    known: &mut Known,
    writer: &Writer,
    mut resources: Vec<v1::Resource>,
    dry_run: bool,
) -> Result<Applied, Refused> {
    modules::carry(known, &mut resources);
    let parsed: Vec<Arc<Resource>> = parse_all(&resources)?.into_iter().map(Arc::new).collect();
    let now = wall();
    check::overrides(&parsed, now)?;
    check::references(known, &parsed)?;
    modules::check(store, known, &parsed)?;
    let mut writes = Vec::new();
    let mut changed = Vec::with_capacity(parsed.len());
    for (resource, wire) in parsed.iter().zip(resources) {
        let key = resource.key();
        let there = known.get(&key);
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
    if dry_run {
        let resources = parsed
            .iter()
            .map(|resource| leeward_proto::render(resource))
            .collect();
        let revision = store.revision() + u64::from(!writes.is_empty());
        return Ok(Applied {
            resources,
            changed,
            revision,
        });
    }
    let coming: Vec<&Resource> = parsed
        .iter()
        .zip(&changed)
        .filter_map(|(r, c)| c.then_some(&**r))
        .collect();
    let levels = levels::applied(known, &locked(&writer.book), &coming, &writer.who, now);
    let revision = store.write_with(&writes, &levels)?;
    locked(&writer.book).take(levels);
    for (resource, changed) in parsed.iter().zip(&changed) {
        if *changed {
            let entry = Entry {
                revision,
                resource: Some(Arc::clone(resource)),
            };
            known.insert(resource.key(), entry);
        }
    }
    let mut stored = Vec::with_capacity(parsed.len());
    for resource in &parsed {
        stored.extend(store.get(&resource.key())?.as_ref().map(wire));
    }
    Ok(Applied {
        resources: stored,
        changed,
        revision,
    })
}

fn delete(store: &Store, known: &mut Known, writer: &Writer, key: Key, expect: u64) -> Result<u64, Refused> {
    if !known.contains_key(&key) {
        return Err(Refused::NotFound(key));
    }
    let by = check::referrers(known, &key);
    if !by.is_empty() {
        return Err(Refused::InUse { key, by });
    }
    let levels = levels::deleted(known, &locked(&writer.book), &key, &writer.who, wall());
    let write = Write {
        key: key.clone(),
        payload: None,
        expect,
    };
    let revision = store.write_with(&[write], &levels)?;
    locked(&writer.book).take(levels);
    known.remove(&key);
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
    let mut resource = v1::Resource::decode(stored.payload.as_slice()).unwrap_or_default();
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

//! How a write gets to proxies: to all at once, or in steps; and writes that take others back.

use super::{
    Book, Entry, Known, MAX_TRIES, Policy, Refused, World, blocking, check, detached, levels, modules, wall,
    wire,
};
use crate::rollout::course;
use crate::rollout::ledger::{Last, ROLLOUT, TAKES_BACK};
use crate::store::{Author, Change, Fence, LevelWrites, ResourceChange, StoreError, Stored, Write};
use leeward_policy::model::RolloutPolicy;
use leeward_policy::{Key, Kind, Name, Resource};
use leeward_proto::{BadField, parse, v1};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// How a change is to get to proxies.
#[derive(Clone, Debug, Default)]
pub struct Way {
    /// In steps, by this RolloutPolicy. `None`: by the one that holds for all, if there is one.
    pub rollout: Option<Name>,
    /// To all at once, whatever there is.
    pub at_once: bool,
    /// A rollout that is under way is taken back first.
    pub supersede: bool,
}

/// What a rollback did.
#[derive(Debug)]
pub struct RolledBack {
    /// The new revision; the last one if nothing was to change.
    pub revision: u64,
    /// What it changes.
    pub changes: Vec<ResourceChange>,
}

/// Who takes back what made things worse.
const TAKER: &str = "rollout";

/// By which RolloutPolicy a write goes out; `None`: to all at once.
pub(super) async fn plan(
    policy: &Policy,
    world: &World,
    writes: &[Write],
    way: &Way,
    dry_run: bool,
) -> Result<Option<Name>, Refused> {
    let is_emergency = |write: &Write| {
        let before = policy.store.get(&write.key).map(|stored| wire(&stored));
        let after = write.payload.as_ref();
        let after = after.and_then(|payload| v1::Resource::decode(payload.as_slice()).ok());
        course::passes(&write.key, before.as_ref(), after.as_ref())
    };
    if writes.iter().all(is_emergency) {
        return Ok(None);
    }
    let page = policy.ledger.read().await?;
    if page.at != world.at {
        let (wanted, found) = (world.at, page.at);
        return Err(StoreError::Moved { wanted, found }.into());
    }
    if let Some(last) = page.open() {
        if !way.supersede {
            return Err(under_way(last));
        }
        if !dry_run {
            return Err(Refused::Supersedes(last.change.revision));
        }
    }
    if way.at_once {
        return Ok(None);
    }
    let key = |name| Key {
        kind: Kind::RolloutPolicy,
        name,
    };
    let is_there = |key: &Key| world.known.get(key).is_some_and(|entry| entry.resource.is_some());
    match &way.rollout {
        Some(name) => {
            let key = key(name.clone());
            if !is_there(&key) {
                return Err(Refused::NotFound(key));
            }
            Ok(Some(key.name))
        }
        None => {
            let default = Name::parse(RolloutPolicy::DEFAULT).ok().map(key);
            Ok(default.filter(is_there).map(|key| key.name))
        }
    }
}

fn under_way(last: &Last) -> Refused {
    let policy = last
        .change
        .author
        .labels
        .get(ROLLOUT)
        .cloned()
        .unwrap_or_default();
    Refused::UnderWay {
        revision: last.change.revision,
        policy,
    }
}

/// Puts down by which RolloutPolicy a write goes out.
pub(super) fn label(author: &Author, by: Option<&Name>) -> Author {
    let mut author = author.clone();
    // Nobody else says so.
    author.labels.remove(TAKES_BACK);
    match by {
        Some(name) => drop(author.labels.insert(ROLLOUT.to_owned(), name.to_string())),
        None => drop(author.labels.remove(ROLLOUT)),
    }
    author
}

impl Policy {
    /// Writes a revision whose content is that of an old one, but for what people hold now: overrides, and drains of zones.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is written then.
    pub(crate) async fn rollback(
        &self,
        revision: u64,
        dry_run: bool,
        author: Author,
        way: Way,
    ) -> Result<RolledBack, Refused> {
        let policy = self.clone();
        detached(async move {
            policy.store.settle().await?;
            let mut tries = 0..MAX_TRIES;
            loop {
                match Box::pin(rollback(&policy, revision, dry_run, &author, &way)).await {
                    Err(Refused::Store(StoreError::Moved { .. })) if tries.next().is_some() => {
                        policy.store.settle().await?;
                    }
                    Err(Refused::Supersedes(revision)) if tries.next().is_some() => {
                        policy.supersede(revision, &author).await?;
                    }
                    done => return done,
                }
            }
        })
        .await
    }

    /// Takes back a rollout for the sake of another change.
    pub(super) async fn supersede(&self, revision: u64, author: &Author) -> Result<(), Refused> {
        let why = format!("superseded by {}", author.who);
        self.take_back(revision, &why, None).await.map(drop)
    }

    /// Writes a revision that takes a rollout's change back; what was written since, and passed, stays. Returns which
    /// revision that is, also where somebody else has written it.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is written then.
    pub(crate) async fn take_back(
        &self,
        wanted: u64,
        why: &str,
        fence: Option<Fence>,
    ) -> Result<u64, Refused> {
        let (policy, why) = (self.clone(), why.to_owned());
        detached(async move {
            let mut tries = 0..MAX_TRIES;
            loop {
                policy.store.settle().await?;
                let page = policy.ledger.read().await?;
                let Some(last) = page.last.filter(|last| last.change.revision == wanted) else {
                    // Another went out after it: it had been taken back, or reached everybody.
                    return Ok(policy.store.revision());
                };
                if let Some(record) = &last.taken_back {
                    return Ok(record.revision);
                }
                if !last.is_open() {
                    // Somebody has promoted it meanwhile.
                    return Ok(policy.store.revision());
                }
                match Box::pin(take_back(&policy, &last, page.at, &why, fence.clone())).await {
                    Err(Refused::Store(StoreError::Moved { .. })) if tries.next().is_some() => {}
                    done => return done,
                }
            }
        })
        .await
    }
}

/// Resources as they are to be.
#[derive(Default)]
struct Target {
    puts: Vec<(Key, bytes::Bytes)>,
    deletes: Vec<Key>,
}

impl Target {
    fn writes(&self) -> Vec<Write> {
        let puts = self.puts.iter().map(|(key, payload)| Write {
            key: key.clone(),
            payload: Some(payload.to_vec()),
            expect: 0,
        });
        let deletes = self.deletes.iter().map(|key| Write {
            key: key.clone(),
            payload: None,
            expect: 0,
        });
        puts.chain(deletes).collect()
    }

    /// As parsed; what this build can't read isn't.
    fn parsed(&self) -> Vec<Arc<Resource>> {
        let puts = self.puts.iter();
        puts.filter_map(|(key, payload)| {
            let mut resource = v1::Resource::decode(&payload[..]).ok()?;
            resource.metadata.get_or_insert_default().name = key.name.to_string();
            parse(&resource).ok().map(Arc::new)
        })
        .collect()
    }

    /// What all this means for levels of degradation.
    fn levels(&self, known: &Known, book: &Book, parsed: &[Arc<Resource>], who: &str) -> LevelWrites {
        let now = wall();
        let coming: Vec<&Resource> = parsed.iter().map(|resource| &**resource).collect();
        let mut writes = levels::applied(known, book, &coming, who, now);
        for key in &self.deletes {
            let more = levels::deleted(known, book, key, who, now);
            writes.changes.extend(more.changes);
            writes.judged.extend(more.judged);
            writes.holds.extend(more.holds);
        }
        writes
    }
}

async fn take_back(
    policy: &Policy,
    last: &Last,
    at: u64,
    why: &str,
    fence: Option<Fence>,
) -> Result<u64, Refused> {
    let store = &policy.store;
    let world = policy.world().await?;
    if world.at != at {
        let (wanted, found) = (at, world.at);
        return Err(StoreError::Moved { wanted, found }.into());
    }
    let mut target = Target::default();
    for (key, value) in course::before(&last.change, &last.later) {
        let there = store.get(&key);
        match (value, there) {
            (Some(value), Some(there)) if is_same(&value, &there) => {}
            (Some(value), _) => target.puts.push((key, value.payload)),
            (None, Some(_)) => target.deletes.push(key),
            (None, None) => {}
        }
    }
    if target.puts.is_empty() && target.deletes.is_empty() {
        // Everything is as it was: one is written again as it is, so that the log says so.
        let keys = last.change.changes.iter().map(|change| &change.key);
        let there = keys
            .into_iter()
            .find_map(|key| Some((key.clone(), store.get(key)?.payload)));
        let any = || {
            store
                .list(None, None, 1)
                .0
                .pop()
                .map(|stored| (stored.key, stored.payload))
        };
        target.puts.extend(there.or_else(any));
    }
    let mut author = Author::of(TAKER);
    why.clone_into(&mut author.message);
    let revision = last.change.revision.to_string();
    author.labels.insert(TAKES_BACK.to_owned(), revision);
    let book = Book::of(store);
    let levels = target.levels(&world.known, &book, &target.parsed(), TAKER);
    let change = Change {
        writes: target.writes(),
        levels_at: (!levels.is_empty()).then_some(book.at),
        levels,
        author,
        fence,
        at: Some(world.at),
        requires: Vec::new(),
    };
    Ok(Box::pin(store.write(change)).await?)
}

async fn rollback(
    policy: &Policy,
    revision: u64,
    dry_run: bool,
    author: &Author,
    way: &Way,
) -> Result<RolledBack, Refused> {
    let store = &policy.store;
    let then = store.at(revision).await?.ok_or(Refused::NoRevision(revision))?;
    let world = policy.world().await?;
    let now = store.everything();
    if now.to != world.at {
        let (wanted, found) = (world.at, now.to);
        return Err(StoreError::Moved { wanted, found }.into());
    }
    let now: BTreeMap<Key, Stored> = now.upserts.into_iter().map(|s| (s.key.clone(), s)).collect();
    let (world, target, parsed, changes) = blocking(move || {
        let (target, changes) = difference(&now, then);
        let parsed = target.parsed();
        check_target(&world.known, &target, &parsed)?;
        Ok((world, target, parsed, changes))
    })
    .await?;
    let requires = modules::check(store, &world.known, &parsed)
        .await
        .map_err(|refused| by_name(refused, &parsed))?;
    let writes = target.writes();
    if writes.is_empty() {
        return Ok(RolledBack {
            revision: world.at,
            changes,
        });
    }
    let by = plan(policy, &world, &writes, way, dry_run).await?;
    if dry_run {
        return Ok(RolledBack {
            revision: world.at + 1,
            changes,
        });
    }
    let book = Book::of(store);
    let levels = target.levels(&world.known, &book, &parsed, &author.who);
    let change = Change {
        writes,
        levels_at: (!levels.is_empty()).then_some(book.at),
        levels,
        author: label(author, by.as_ref()),
        fence: None,
        at: Some(world.at),
        requires,
    };
    let revision = Box::pin(store.write(change)).await?;
    Ok(RolledBack { revision, changes })
}

/// Whether a rollback leaves what is there now: what people hold in an emergency, and who may do what.
fn stays(kind: Kind) -> bool {
    kind.is_for_emergencies() || kind == Kind::AccessPolicy
}

/// What leads from how everything is to how it was, but for what people hold now.
fn difference(now: &BTreeMap<Key, Stored>, then: Vec<Stored>) -> (Target, Vec<ResourceChange>) {
    let (mut target, mut changes) = (Target::default(), Vec::new());
    let mut kept = BTreeSet::new();
    for stored in then.into_iter().filter(|stored| !stays(stored.key.kind)) {
        let there = now.get(&stored.key);
        let wanted = course::with_drain_of(&stored, there).unwrap_or_else(|| stored.clone());
        kept.insert(stored.key.clone());
        if there.is_some_and(|there| is_same(there, &wanted)) {
            continue;
        }
        target.puts.push((stored.key.clone(), wanted.payload.clone()));
        changes.push(ResourceChange {
            key: stored.key,
            before: there.cloned(),
            after: Some(wanted),
        });
    }
    let gone = now
        .iter()
        .filter(|(key, _)| !stays(key.kind) && !kept.contains(*key));
    for (key, stored) in gone {
        target.deletes.push(key.clone());
        changes.push(ResourceChange {
            key: key.clone(),
            before: Some(stored.clone()),
            after: None,
        });
    }
    (target, changes)
}

/// Whether two say the same. Maps are encoded in any order.
fn is_same(one: &Stored, other: &Stored) -> bool {
    let decode = |stored: &Stored| v1::Resource::decode(&stored.payload[..]).ok();
    one.payload == other.payload || decode(one).is_some_and(|one| Some(one) == decode(other))
}

/// Checks what would be, as any write is checked.
fn check_target(known: &Known, target: &Target, parsed: &[Arc<Resource>]) -> Result<(), Refused> {
    let mut after = known.clone();
    for key in &target.deletes {
        after.remove(key);
    }
    check::references(&after, parsed).map_err(|refused| by_name(refused, parsed))?;
    for resource in parsed {
        let entry = Entry {
            revision: 0,
            resource: Some(Arc::clone(resource)),
        };
        after.insert(resource.key(), entry);
    }
    for key in &target.deletes {
        let by = check::referrers(&after, key);
        if !by.is_empty() {
            let key = key.clone();
            return Err(Refused::InUse { key, by });
        }
    }
    Ok(())
}

/// Bad fields by the names of their resources: nobody has written a list of them.
fn by_name(refused: Refused, parsed: &[Arc<Resource>]) -> Refused {
    let Refused::Bad(fields) = refused else {
        return refused;
    };
    let named = fields.into_iter().map(|field| {
        let rest = field
            .path
            .strip_prefix("resources[")
            .and_then(|rest| rest.split_once(']'));
        let name = rest.and_then(|(at, rest)| Some((parsed.get(at.parse::<usize>().ok()?)?.key(), rest)));
        match name {
            Some((key, rest)) => BadField {
                path: format!("{key}{rest}"),
                reason: field.reason,
            },
            None => field,
        }
    });
    Refused::Bad(named.collect())
}

//! Applying and deleting: everything that is looked at before it is written.

use super::{
    Applied, Book, Entry, Known, Policy, Refused, ResourceDiff, Way, World, bare, blocking, check, levels,
    modules, parse_all, rollout, wall, wire,
};
use crate::access::{Before, Caller, Rules, is_operation};
use crate::store::{Author, Change, Store, StoreError, Stored, Write};
use leeward_policy::{Key, Kind, Name, Resource, Selector, Spec};
use leeward_proto::{BadField, v1};
use prost::Message;
use std::collections::BTreeSet;
use std::sync::Arc;

/// What is to be applied, and how.
#[derive(Clone, Debug, Default)]
pub struct Apply {
    /// The resources.
    pub resources: Vec<v1::Resource>,
    /// Check everything, write nothing.
    pub dry_run: bool,
    /// Only make new ones.
    pub if_absent: bool,
    /// For whom, where the resources don't say; empty: for the author.
    pub manager: String,
    /// Take over what is other managers'.
    pub force: bool,
    /// What else of the manager's is to go.
    pub prune: Option<Prune>,
    /// How it gets to proxies.
    pub way: Way,
    /// Who is to be looked at; `None`: it is the control plane's own doing.
    pub(crate) caller: Option<Caller>,
}

/// What goes with an apply.
#[derive(Clone, Debug)]
pub struct Prune {
    /// Only resources with these labels.
    pub selector: Selector,
    /// No more than this.
    pub max_deletes: usize,
}

/// What becomes of one resource.
struct Coming {
    key: Key,
    resource: Arc<Resource>,
    wire: v1::Resource,
    changed: bool,
    /// Whose it is, where that is somebody else and it would change: the owner, and for whom it is applied.
    conflict: Option<(String, String)>,
}

/// The rules that the AccessPolicies among resources make.
pub(super) fn rules(known: &Known) -> Rules {
    let first = Name::parse("0").ok().map(|name| Key {
        kind: Kind::AccessPolicy,
        name,
    });
    let policies = first.into_iter().flat_map(|first| known.range(first..));
    let policies = policies.take_while(|(key, _)| key.kind == Kind::AccessPolicy);
    Rules::new(policies.map(
        |(_, entry)| match entry.resource.as_deref().map(|resource| &resource.spec) {
            Some(Spec::AccessPolicy(policy)) => Some(policy),
            _ => None,
        },
    ))
}

pub(super) async fn apply(policy: &Policy, what: &Apply, author: &Author) -> Result<Applied, Refused> {
    let store = &policy.store;
    let world = policy.world().await?;
    let now = wall();
    // The longest of ids are longer than a manager may be.
    let end = author.who.floor_char_boundary(leeward_proto::MAX_MANAGER);
    let writer = author.who.get(..end).unwrap_or_default().to_owned();
    let (wanted, kept) = (what.clone(), store.clone());
    let (mut world, coming, pruned, after) = blocking(move || {
        let mut resources = wanted.resources.clone();
        modules::carry(&world.known, &mut resources);
        let parsed: Vec<Arc<Resource>> = parse_all(&resources)?.into_iter().map(Arc::new).collect();
        check::overrides(&parsed, now)?;
        check::references(&world.known, &parsed)?;
        let mut coming = Vec::with_capacity(parsed.len());
        for (resource, wire) in parsed.into_iter().zip(resources) {
            coming.push(come(&kept, &world, &wanted, &writer, resource, wire));
        }
        let pruned = pruned(&kept, &world, &wanted, &writer, &coming)?;
        let after = after(&world.known, &coming, &pruned)?;
        Ok((world, coming, pruned, after))
    })
    .await?;
    let rules = rules(&world.known);
    if let Some(caller) = &what.caller {
        check_access(&world.known, &rules, caller, what.dry_run, &coming, &pruned)?;
    }
    // Whose it is, is told to those who may write it.
    let mut conflicts = coming
        .iter()
        .filter_map(|one| Some((&one.key, one.conflict.clone()?)));
    if let Some((key, (owner, manager))) = conflicts.next() {
        let key = key.clone();
        return Err(Refused::Manager { key, owner, manager });
    }
    if let Some(after) = &after {
        check_way_in(&rules, &self::rules(after), what.caller.as_ref())?;
    }
    let parsed: Vec<_> = coming.iter().map(|coming| Arc::clone(&coming.resource)).collect();
    let requires = modules::check(store, &world.known, &parsed).await?;
    let mut writes = Vec::new();
    for one in &coming {
        let found = world.known.get(&one.key).map_or(0, |entry| entry.revision);
        let wanted = one.resource.revision;
        if wanted != 0 && wanted != found {
            still(policy, &world).await?;
            let key = one.key.clone();
            return Err(StoreError::Conflict { key, wanted, found }.into());
        }
        if what.if_absent && found != 0 {
            still(policy, &world).await?;
            return Err(Refused::Exists(one.key.clone()));
        }
        if one.changed {
            writes.push(Write {
                key: one.key.clone(),
                payload: Some(bare(one.wire.clone()).encode_to_vec()),
                expect: wanted,
            });
        }
    }
    writes.extend(pruned.iter().map(|key| Write {
        key: key.clone(),
        payload: None,
        expect: 0,
    }));
    let changed: Vec<bool> = coming.iter().map(|coming| coming.changed).collect();
    let by = rollout::plan(policy, &world, &writes, &what.way, what.dry_run).await?;
    if what.dry_run {
        let shown = |one: &Coming| {
            let mut shown = leeward_proto::render(&one.resource);
            shown.metadata.get_or_insert_default().manager = manager_in(&one.wire);
            shown
        };
        return Ok(Applied {
            diffs: diffs(store, &world.known, &coming, &pruned),
            resources: coming.iter().map(shown).collect(),
            changed,
            revision: world.at + u64::from(!writes.is_empty()),
            at: world.at,
            pruned,
            written: Vec::new(),
            rollout: by,
        });
    }
    let written: Vec<_> = writes
        .iter()
        .map(|write| {
            let before = world.known.get(&write.key).map_or(0, |entry| entry.revision);
            (write.key.clone(), before, write.payload.is_some())
        })
        .collect();
    let changing: Vec<&Resource> = coming
        .iter()
        .filter(|one| one.changed)
        .map(|one| &*one.resource)
        .collect();
    let book = Book::of(store);
    let levels = levels::applied(&world.known, &book, &changing, &author.who, now);
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
    let put = coming.iter().filter(|one| one.changed);
    let entries = put.map(|one| (one.key.clone(), Some(Arc::clone(&one.resource))));
    world.wrote(
        revision,
        entries.chain(pruned.iter().map(|key| (key.clone(), None))),
    );
    let stored = coming.iter().filter_map(|one| store.get(&one.key));
    let after = |is_put| if is_put { revision } else { 0 };
    Ok(Applied {
        resources: stored.map(|stored| wire(&stored)).collect(),
        changed,
        revision,
        at: revision,
        rollout: by,
        pruned,
        diffs: Vec::new(),
        written: written
            .into_iter()
            .map(|(key, before, is_put)| (key, before, after(is_put)))
            .collect(),
    })
}

/// That others have not written what is not known here yet; then a refusal would be hasty.
async fn still(policy: &Policy, world: &World) -> Result<(), Refused> {
    if policy.store.settle().await? == world.at {
        return Ok(());
    }
    let (wanted, found) = (world.at, policy.store.revision());
    Err(StoreError::Moved { wanted, found }.into())
}

/// Whether a resource changes, and whose it is then.
fn come(
    store: &Store,
    world: &World,
    wanted: &Apply,
    writer: &str,
    resource: Arc<Resource>,
    mut wire: v1::Resource,
) -> Coming {
    let key = resource.key();
    let entry = world.known.get(&key);
    let there = entry.and_then(|entry| entry.resource.as_deref());
    let is_same = there.is_some_and(|there| there.spec == resource.spec && there.labels == resource.labels);
    let metadata = wire.metadata.get_or_insert_default();
    if is_operation(key.kind) {
        // Whoever is on duty writes them.
        metadata.manager.clear();
        return Coming {
            key,
            resource,
            wire,
            changed: !is_same,
            conflict: None,
        };
    }
    let named = [&metadata.manager, &wanted.manager]
        .into_iter()
        .find(|name| !name.is_empty());
    let manager = named.cloned().unwrap_or_else(|| writer.to_owned());
    let owner = entry
        .and_then(|_| store.get(&key))
        .map(|stored| manager_of(&stored))
        .unwrap_or_default();
    let is_other = !owner.is_empty() && owner != manager;
    let mut changed = !is_same;
    let mut conflict = None;
    if is_other && wanted.force {
        changed = true;
        metadata.manager = manager;
    } else if is_other {
        // Taking a zone out of use is operation, whoever's the zone is.
        if !is_same && !there.is_some_and(|there| is_drained(there, &resource)) {
            conflict = Some((owner.clone(), manager));
        }
        metadata.manager = owner;
    } else {
        metadata.manager = manager;
    }
    Coming {
        key,
        resource,
        wire,
        changed,
        conflict,
    }
}

/// Whether two differ in nothing but a zone's drain.
fn is_drained(before: &Resource, after: &Resource) -> bool {
    let (Spec::Zone(before_spec), Spec::Zone(after_spec)) = (&before.spec, &after.spec) else {
        return false;
    };
    let mut with = before_spec.clone();
    with.drain.clone_from(&after_spec.drain);
    with == *after_spec && before.labels == after.labels
}

pub(super) fn manager_of(stored: &Stored) -> String {
    manager_in(&wire(stored))
}

fn manager_in(wire: &v1::Resource) -> String {
    let metadata = wire.metadata.as_ref();
    metadata.map_or_else(String::new, |metadata| metadata.manager.clone())
}

/// What goes.
fn pruned(
    store: &Store,
    world: &World,
    wanted: &Apply,
    writer: &str,
    coming: &[Coming],
) -> Result<Vec<Key>, Refused> {
    let Some(prune) = &wanted.prune else {
        return Ok(Vec::new());
    };
    let manager = if wanted.manager.is_empty() {
        writer
    } else {
        &wanted.manager
    };
    let stays: BTreeSet<&Key> = coming.iter().map(|one| &one.key).collect();
    let mut pruned = Vec::new();
    for (key, entry) in world
        .known
        .iter()
        .filter(|(key, _)| !stays.contains(key) && !is_operation(key.kind))
    {
        let is_meant = match &entry.resource {
            Some(resource) => prune.selector.matches(&resource.labels),
            None => prune.selector.is_empty(),
        };
        if is_meant
            && store
                .get(key)
                .is_some_and(|stored| manager_of(&stored) == manager)
        {
            pruned.push(key.clone());
        }
    }
    if pruned.len() > prune.max_deletes {
        return Err(Refused::Prune {
            count: pruned.len(),
            limit: prune.max_deletes,
            keys: pruned.iter().take(5).map(ToString::to_string).collect(),
        });
    }
    Ok(pruned)
}

/// Everything as it will be, where that has to be looked at: what goes may be named by what stays, and AccessPolicies together
/// say who may do what.
fn after(known: &Known, coming: &[Coming], pruned: &[Key]) -> Result<Option<Known>, Refused> {
    let keys = coming.iter().filter(|one| one.changed).map(|one| &one.key);
    let is_about_access = keys.chain(pruned).any(|key| key.kind == Kind::AccessPolicy);
    if pruned.is_empty() && !is_about_access {
        return Ok(None);
    }
    let mut after = known.clone();
    for one in coming {
        let entry = Entry {
            revision: 0,
            resource: Some(Arc::clone(&one.resource)),
        };
        after.insert(one.key.clone(), entry);
    }
    for key in pruned {
        after.remove(key);
    }
    for key in pruned {
        let by = check::referrers(&after, key);
        if !by.is_empty() {
            let key = key.clone();
            return Err(Refused::InUse { key, by });
        }
    }
    Ok(Some(after))
}

/// That somebody can get in then; and if nobody had to before, that it is whoever closes the door: then the names are right.
fn check_way_in(before: &Rules, after: &Rules, caller: Option<&Caller>) -> Result<(), Refused> {
    let closes = before.is_open() && !after.is_open();
    let stays_out = closes && caller.is_some_and(|caller| !caller.holds_breakglass(after));
    if stays_out || !after.has_a_way_in() {
        return Err(Refused::Lockout);
    }
    Ok(())
}

fn before<'a>(known: &'a Known, key: &Key) -> Before<'a> {
    match known.get(key) {
        None => Before::Nothing,
        Some(entry) => entry
            .resource
            .as_deref()
            .map_or(Before::Unread(key.kind), Before::Known),
    }
}

fn check_access(
    known: &Known,
    rules: &Rules,
    caller: &Caller,
    dry_run: bool,
    coming: &[Coming],
    pruned: &[Key],
) -> Result<(), Refused> {
    let denied = |status| Refused::Denied(Box::new(status));
    let changed = coming.iter().filter(|one| one.changed || dry_run);
    let all = changed
        .map(|one| (&one.key, Some(&*one.resource)))
        .chain(pruned.iter().map(|key| (key, None)));
    for (key, after) in all {
        let there = before(known, key);
        if dry_run {
            caller.check_diff(rules, key, there).map_err(denied)?;
        } else {
            caller.check_write(rules, key, there, after).map_err(denied)?;
        }
    }
    Ok(())
}

/// Both sides of what changes, with their defaults and without what the store says of them.
fn diffs(store: &Store, known: &Known, coming: &[Coming], pruned: &[Key]) -> Vec<ResourceDiff> {
    let side = |resource: &Resource, manager: String| {
        let mut wire = leeward_proto::render(resource);
        let metadata = wire.metadata.get_or_insert_default();
        (metadata.revision, metadata.manager) = (0, manager);
        wire
    };
    let live = |key: &Key| {
        let stored = store.get(key)?;
        let entry = known.get(key)?;
        Some(match &entry.resource {
            Some(resource) => side(resource, manager_of(&stored)),
            None => bare(wire(&stored)),
        })
    };
    let changed = coming.iter().filter(|one| one.changed).map(|one| {
        let after = side(&one.resource, manager_in(&one.wire));
        (one.key.clone(), live(&one.key), Some(after))
    });
    let gone = pruned.iter().map(|key| (key.clone(), live(key), None));
    changed.chain(gone).collect()
}

pub(super) async fn delete(
    policy: &Policy,
    (key, expect): (&Key, u64),
    author: &Author,
    caller: Option<&Caller>,
    way: &Way,
) -> Result<(u64, u64), Refused> {
    let mut world = policy.world().await?;
    let Some(there) = world.known.get(key).map(|entry| entry.revision) else {
        return Err(Refused::NotFound(key.clone()));
    };
    let rules = rules(&world.known);
    if let Some(caller) = caller {
        let checked = caller.check_write(&rules, key, before(&world.known, key), None);
        checked.map_err(|status| Refused::Denied(Box::new(status)))?;
    }
    if key.kind == Kind::AccessPolicy {
        let mut after = world.known.clone();
        after.remove(key);
        check_way_in(&rules, &self::rules(&after), caller)?;
    }
    let by = check::referrers(&world.known, key);
    if !by.is_empty() {
        // What refers to it may have gone, elsewhere.
        still(policy, &world).await?;
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
    Ok((revision, there))
}

/// A name of a manager that can be none.
pub(crate) fn check_manager(manager: &str) -> Result<(), Refused> {
    if manager.len() <= leeward_proto::MAX_MANAGER && !manager.contains(char::is_control) {
        return Ok(());
    }
    Err(Refused::Bad(vec![BadField {
        path: "manager".to_owned(),
        reason: format!(
            "has {} bytes, or control characters; want up to {}",
            manager.len(),
            leeward_proto::MAX_MANAGER
        ),
    }]))
}

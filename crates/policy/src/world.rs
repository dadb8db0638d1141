//! The good resources of a mesh as one proxy (or the control plane) knows them, and those it refuses.

use crate::{Key, Kind, Name, Resource, Snapshot, Spec, Viewer};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A resource that was refused, with what runs in its place.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Quarantine {
    /// The revision refused.
    pub revision: u64,
    /// Why, with the field's path.
    pub reason: String,
    /// The revision that runs instead; `None` if there is none.
    pub running: Option<u64>,
}

/// A version of a resource that can't be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// Which resource.
    pub key: Key,
    /// Which revision of it.
    pub revision: u64,
    /// Why.
    pub reason: String,
    /// What it was to guard, if it is an AuthorizationPolicy that may refuse requests.
    pub guards: Option<Guards>,
}

/// The services of an AuthorizationPolicy that can't be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Guards {
    /// Every one, or nobody can tell which.
    All,
    /// These.
    Services(Vec<Name>),
}

/// Changes on their way in. Build it, warm what needs warming, then [`World::commit`].
#[derive(Debug, Default)]
pub struct Staged {
    /// New versions that parsed.
    pub upserts: Vec<Arc<Resource>>,
    /// New versions that did not parse.
    pub refused: Vec<Refusal>,
    /// Tombstones.
    pub deletes: Vec<Key>,
}

/// Every resource's last good version.
#[derive(Clone, Debug, Default)]
pub struct World {
    good: BTreeMap<Key, Arc<Resource>>,
    quarantined: BTreeMap<Key, Quarantine>,
    /// The newest version seen of what is quarantined for a reference; tried again at each commit, since what it
    /// names may have come.
    waiting: BTreeMap<Key, Arc<Resource>>,
    /// What was refused when it was live already.
    unready: BTreeSet<Key>,
    /// What guards services and has no version that can be used.
    closed: BTreeMap<Key, Guards>,
}

impl World {
    /// Takes changes in. A new version whose references name nothing, or a plugin of a kind that can't be there, is
    /// quarantined alone: its last good version stays, and the new one goes live by itself once what it names is there. An
    /// AuthorizationPolicy goes live at once, and is listed.
    ///
    /// A refusal of a revision that is live leaves it live: what names it is not to fall back on doing without. It is listed
    /// as quarantined until another revision of it is good.
    ///
    /// An AuthorizationPolicy of which no version was ever good refuses whatever it may have been to refuse: what can't be
    /// read must not leave open what it was to close.
    ///
    /// A delete removes the resource even where others still refer to it; those then lose only that
    /// reference (see [`Snapshot::compile`]) and are listed as quarantined.
    ///
    /// A change of a route or of a service's endpoints costs a look at what changes, and not at all that there is.
    pub fn commit(&mut self, staged: Staged) {
        // Where everything was in order and nothing goes, only what comes can be out of it.
        let in_order = self.quarantined.is_empty() && staged.deletes.is_empty() && staged.refused.is_empty();
        for key in staged.deletes {
            self.good.remove(&key);
            self.quarantined.remove(&key);
            self.waiting.remove(&key);
            self.unready.remove(&key);
            self.closed.remove(&key);
        }
        for Refusal {
            key,
            revision,
            reason,
            guards,
        } in staged.refused
        {
            self.waiting.remove(&key);
            let live = self.good.get(&key).map(|r| r.revision);
            match guards.filter(|_| live.is_none()) {
                Some(guards) => drop(self.closed.insert(key.clone(), guards)),
                None => drop(self.closed.remove(&key)),
            }
            if live == Some(revision) {
                self.unready.insert(key.clone());
            }
            let running = live.filter(|live| *live != revision);
            self.quarantined.insert(
                key,
                Quarantine {
                    revision,
                    reason,
                    running,
                },
            );
        }
        let mut candidates = std::mem::take(&mut self.waiting);
        for resource in staged.upserts {
            candidates.insert(resource.key(), resource);
        }
        self.settle(candidates, in_order);
    }

    /// Begins with what was good when it was written down: it runs as it ran then, and nothing of it is held against anything
    /// else. What names what isn't there any more is listed, as after a delete.
    pub fn restore(&mut self, resources: impl IntoIterator<Item = Arc<Resource>>) {
        self.good
            .extend(resources.into_iter().map(|resource| (resource.key(), resource)));
        self.name_orphaned_references();
    }

    /// Admits every candidate whose references are right among the good and the other candidates.
    fn settle(&mut self, mut candidates: BTreeMap<Key, Arc<Resource>>, in_order: bool) {
        // Refusing one can leave another dangling, so go on until nothing changes: at most one round
        // for each candidate.
        let mut dangling = BTreeMap::new();
        loop {
            let bad: Vec<(Key, String)> = candidates
                .iter()
                // What of a policy names nothing protects nothing; but the rest of it does, and isn't to wait.
                .filter(|(key, _)| key.kind != Kind::AuthorizationPolicy)
                .filter_map(|(key, resource)| {
                    let get = |to: &Key| candidates.get(to).or_else(|| self.good.get(to));
                    let bad = misreference(resource, get).or_else(|| self.clash(key, resource, &candidates));
                    Some((key.clone(), bad?))
                })
                .collect();
            if bad.is_empty() {
                break;
            }
            for (key, reason) in bad {
                if let Some(resource) = candidates.remove(&key) {
                    dangling.insert(key, (resource, reason));
                }
            }
        }
        let alone = in_order
            && dangling.is_empty()
            && !candidates
                .iter()
                .any(|(key, resource)| may_move_others(self.good.get(key), resource));
        let came: Vec<Key> = candidates.keys().cloned().collect();
        for (key, resource) in candidates {
            self.quarantined.remove(&key);
            self.unready.remove(&key);
            self.closed.remove(&key);
            self.good.insert(key, resource);
        }
        for (key, (resource, reason)) in dangling {
            let running = self.good.get(&key).map(|r| r.revision);
            self.quarantined.insert(
                key.clone(),
                Quarantine {
                    revision: resource.revision,
                    reason,
                    running,
                },
            );
            self.waiting.insert(key, resource);
        }
        if alone {
            for key in came {
                self.name_orphaned_reference(&key);
            }
        } else {
            self.name_orphaned_references();
        }
    }

    /// What keeps a gateway's listeners from standing beside another's, if anything does. What is live already stays, and of
    /// two that come together the one with the lesser name does.
    fn clash(
        &self,
        key: &Key,
        resource: &Resource,
        candidates: &BTreeMap<Key, Arc<Resource>>,
    ) -> Option<String> {
        let Spec::Gateway(gateway) = &resource.spec else {
            return None;
        };
        let coming = candidates.iter().filter(|(other, _)| *other < key);
        let live = self
            .good
            .iter()
            .filter(|(other, _)| *other != key && !candidates.contains_key(*other));
        let mut others = coming.chain(live);
        others.find_map(|(other, resource)| {
            let Spec::Gateway(theirs) = &resource.spec else {
                return None;
            };
            let (i, why) = gateway.clash(theirs)?;
            Some(format!("spec.listeners[{i}]: {why} ({other})"))
        })
    }

    /// A good resource can lose what it names only by a delete, or by another kind of plugin, that overtook it; say so.
    fn name_orphaned_references(&mut self) {
        let keys: Vec<Key> = self.good.keys().cloned().collect();
        for key in &keys {
            self.name_orphaned_reference(key);
        }
    }

    fn name_orphaned_reference(&mut self, key: &Key) {
        let Some(resource) = self.good.get(key) else {
            return;
        };
        let revision = resource.revision;
        let quarantined = self.quarantined.get(key);
        let newer_refused = quarantined.is_some_and(|q| q.revision != revision);
        if newer_refused || self.unready.contains(key) {
            return;
        }
        match misreference(resource, |to| self.good.get(to)) {
            Some(reason) => {
                let running = Some(revision);
                self.quarantined.insert(
                    key.clone(),
                    Quarantine {
                        revision,
                        reason,
                        running,
                    },
                );
            }
            None => {
                self.quarantined.remove(key);
            }
        }
    }

    /// The good version of a resource.
    pub fn get(&self, key: &Key) -> Option<&Arc<Resource>> {
        self.good.get(key)
    }

    /// Every good resource, by kind and name.
    pub fn resources(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.good.values()
    }

    /// What is refused now, by kind and name.
    pub fn quarantined(&self) -> &BTreeMap<Key, Quarantine> {
        &self.quarantined
    }

    /// What is closed since an AuthorizationPolicy that guards it can't be used.
    pub fn closed(&self, key: &Key) -> Option<&Guards> {
        self.closed.get(key)
    }

    /// The resources that are here and not in `mentioned`.
    pub fn orphans(&self, mentioned: &BTreeSet<Key>) -> usize {
        self.good.keys().filter(|key| !mentioned.contains(*key)).count()
    }

    /// What requests are to read.
    pub fn snapshot(&self, viewer: Viewer, generation: u64) -> Snapshot {
        self.snapshot_after(None, viewer, generation)
    }

    /// The same, made from the one before it as far as things are the same: see [`Snapshot::compile_after`].
    pub fn snapshot_after(&self, previous: Option<&Snapshot>, viewer: Viewer, generation: u64) -> Snapshot {
        let resources = self.good.values().map(|r| &**r);
        let mut snapshot = Snapshot::compile_after(previous, viewer, generation, resources);
        for (key, guards) in &self.closed {
            snapshot.close(&key.name, guards);
        }
        snapshot
    }
}

/// Whether what refers to a resource may be out of order with another version of it, all being in order with this one. What
/// is new can't be missed by what is in order.
fn may_move_others(old: Option<&Arc<Resource>>, new: &Resource) -> bool {
    let Some(old) = old else {
        return false;
    };
    if let (Spec::Service(old), Spec::Service(new)) = (&old.spec, &new.spec) {
        return old.protocol != new.protocol;
    }
    !matches!(new.spec, Spec::Route(_))
}

/// What is wrong with the first bad reference of a resource, if there is one.
fn misreference<'a>(resource: &Resource, get: impl Fn(&Key) -> Option<&'a Arc<Resource>>) -> Option<String> {
    let references = resource.spec.references();
    if let Some((path, to)) = references.iter().find(|(_, to)| get(to).is_none()) {
        return Some(format!("{path}: there is no {to}"));
    }
    let protocol_of = |name: &Name| {
        let key = Key {
            kind: Kind::Service,
            name: name.clone(),
        };
        let Spec::Service(service) = &get(&key)?.spec else {
            return None;
        };
        Some(service.protocol)
    };
    if let Some((path, to, why)) = resource.spec.tcp_misfits(protocol_of).first() {
        return Some(format!("{path}: {to} {why}"));
    }
    if let Spec::Route(route) = &resource.spec {
        let gateway = |name: &Name| {
            let key = Key {
                kind: Kind::Gateway,
                name: name.clone(),
            };
            let Spec::Gateway(gateway) = &get(&key)?.spec else {
                return None;
            };
            Some(gateway)
        };
        if let Some((i, why)) = route.missing_listener(gateway) {
            return Some(format!("spec.parentRefs[{i}].sectionName: {why}"));
        }
    }
    resource
        .spec
        .plugins()
        .into_iter()
        .find_map(|(path, name, place)| {
            let key = Key {
                kind: Kind::Plugin,
                name: name.clone(),
            };
            let Spec::Plugin(plugin) = &get(&key)?.spec else {
                return None;
            };
            Some(format!("{path}: {key} {}", place.misfit(plugin.kind)?))
        })
}

#[cfg(test)]
mod tests;

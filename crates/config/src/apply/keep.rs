//! What is live goes to disk, and is made live again from there.

use super::{
    BTreeMap, BTreeSet, Contact, Duration, Full, Instant, Key, PolicySource, Refusal, Resource, Restored,
    Spec, Staged, State, Warm, World, guards, key_of, one_line, parse, parse_guards, parse_key, v1,
};
use crate::state::{Change, Entry, Slot, StateDir, render_guards, wall_ms};
use leeward_policy::Viewer;
use std::sync::Arc;

/// What goes to disk, and what of it is there.
pub(super) struct Keeping {
    dir: StateDir,
    version: String,
    /// New versions that aren't live, or not yet.
    coming: BTreeMap<Key, Coming>,
    /// What was said of those that are refused.
    told: BTreeMap<Key, (u64, String)>,
    gone: Vec<Key>,
    heard_ms: i64,
}

struct Coming {
    resource: Arc<Resource>,
    wire: v1::Resource,
}

/// How long plugins may take at the start, before policy from disk is live without them: those that were compiled before take
/// milliseconds.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long a proxy that has policy from disk isn't ready, for a control plane to answer that may have a newer one.
const ASKING: Duration = Duration::from_millis(500);
/// Why a version isn't live that was on its way.
const PENDING: &str = "it was not ready yet when this proxy ended";

impl Keeping {
    pub(super) fn new(dir: StateDir, version: String) -> Self {
        Self {
            dir,
            version,
            coming: BTreeMap::new(),
            told: BTreeMap::new(),
            gone: Vec::new(),
            heard_ms: 0,
        }
    }

    /// A control plane says that this is the newest.
    pub(super) fn heard(&mut self) {
        self.heard_ms = wall_ms();
    }

    /// A batch has come; what of it is live is to be seen.
    pub(super) fn came(&mut self, wires: Vec<v1::Resource>, staged: &Staged) {
        for key in staged.deletes.iter().chain(staged.refused.iter().map(|r| &r.key)) {
            self.coming.remove(key);
        }
        self.gone.extend(staged.deletes.iter().cloned());
        let parsed: BTreeMap<Key, &Arc<Resource>> = staged
            .upserts
            .iter()
            .map(|resource| (resource.key(), resource))
            .collect();
        for wire in wires {
            let revision = wire.metadata.as_ref().map_or(0, |metadata| metadata.revision);
            if let Some(key) = key_of(&wire)
                && let Some(resource) = parsed.get(&key).filter(|r| r.revision == revision)
            {
                let resource = Arc::clone(resource);
                self.coming.insert(key, Coming { resource, wire });
            }
        }
    }

    /// What is new on disk now that the world is so.
    fn change(&mut self, world: &World, commit: v1::StateCommit) -> Change {
        let mut puts = BTreeMap::new();
        for key in self.gone.drain(..) {
            puts.insert((key.clone(), Slot::Good), None);
            self.told.remove(&key);
            puts.insert((key, Slot::Refused), None);
        }
        let is_live = |key: &Key, resource: &Arc<Resource>| {
            let live = world.get(key);
            live.is_some_and(|live| Arc::ptr_eq(live, resource) || live == resource)
        };
        let live: Vec<Key> = self
            .coming
            .iter()
            .filter(|(key, coming)| is_live(key, &coming.resource))
            .map(|(key, _)| key.clone())
            .collect();
        for key in live {
            if let Some(coming) = self.coming.remove(&key) {
                puts.insert((key, Slot::Good), Some(Entry::good(coming.wire)));
            }
        }
        let mut refused: BTreeMap<&Key, (u64, &str)> = self
            .coming
            .iter()
            .map(|(key, coming)| (key, (coming.resource.revision, PENDING)))
            .collect();
        for (key, quarantine) in world.quarantined() {
            // What is live is found wanting again by whoever starts with it.
            let is_live = world
                .get(key)
                .is_some_and(|live| live.revision == quarantine.revision);
            if !is_live || refused.contains_key(key) {
                refused.insert(key, (quarantine.revision, &quarantine.reason));
            }
        }
        for key in self.told.keys().filter(|key| !refused.contains_key(key)) {
            puts.insert((key.clone(), Slot::Refused), None);
        }
        for (key, (revision, reason)) in &refused {
            let known = self.told.get(*key);
            if known.is_some_and(|(told, why)| told == revision && why == reason) {
                continue;
            }
            let refused = v1::StateRefused {
                r#ref: Some(leeward_proto::render_key(key)),
                revision: *revision,
                reason: (*reason).to_owned(),
                guards: world.closed(key).map(render_guards),
                resource: self.coming.get(*key).map(|coming| coming.wire.clone()),
            };
            puts.insert(((*key).clone(), Slot::Refused), Some(Entry::refused(refused)));
        }
        self.told = refused
            .into_iter()
            .map(|(key, (revision, reason))| (key.clone(), (revision, reason.to_owned())))
            .collect();
        Change { puts, commit }
    }
}

impl<W: Warm> State<W> {
    /// Keeps in this directory what is live from now on. What is there is made live first, if there is something.
    pub(crate) async fn keep_in(&mut self, dir: StateDir, version: String, now: Instant) {
        let found = dir.restored();
        self.keep = Some(Keeping::new(dir, version));
        if let Some(found) = found {
            self.restore(found, now).await;
        }
    }

    /// Hands to disk what is new.
    pub(super) fn keep(&mut self) {
        let Some(keep) = &mut self.keep else { return };
        let Viewer { zone, proxy } = &self.viewer;
        let commit = v1::StateCommit {
            proxy: proxy.to_string(),
            zone: zone.to_string(),
            // What another build could not keep is missing until everything has come once.
            version: if self.full == Full::Not {
                keep.version.clone()
            } else {
                String::new()
            },
            store_id: self.store_id.clone(),
            generation: self.generation,
            heard_ms: keep.heard_ms,
            orphans: self.orphans.iter().map(leeward_proto::render_key).collect(),
            records: 0,
        };
        let change = keep.change(&self.world, commit);
        keep.dir.change(change);
    }

    /// Where it is kept, if it is.
    pub(crate) fn kept_in(&self) -> Option<StateDir> {
        self.keep.as_ref().map(|keep| keep.dir.clone())
    }

    /// Makes live what was live when it was written. A resource that can't be used is refused alone, as one that comes from a
    /// control plane is.
    async fn restore(&mut self, found: Restored, now: Instant) {
        let Restored {
            good,
            refused,
            commit,
        } = found;
        let (mut staged, mut is_whole) = (Staged::default(), true);
        let mut resources = Vec::with_capacity(good.len());
        for wire in &good {
            match parse(wire) {
                Ok(resource) => resources.push(Arc::new(resource)),
                Err(bad) => {
                    is_whole = false;
                    staged.refused.extend(key_of(wire).map(|key| Refusal {
                        key,
                        revision: wire.metadata.as_ref().map_or(0, |metadata| metadata.revision),
                        reason: one_line(&bad),
                        guards: guards(wire),
                    }));
                }
            }
        }
        let mut again = Vec::new();
        for refused in refused {
            let Some(key) = refused.r#ref.as_ref().and_then(|key| parse_key(key).ok()) else {
                continue;
            };
            let parsed = refused.resource.and_then(|wire| Some((parse(&wire).ok()?, wire)));
            is_whole &= parsed.is_some();
            if let Some((resource, wire)) = parsed {
                let resource = Arc::new(resource);
                again.push(Arc::clone(&resource));
                if let Some(keep) = &mut self.keep {
                    keep.coming.insert(key.clone(), Coming { resource, wire });
                }
            }
            if let Some(keep) = &mut self.keep {
                // It is on disk, and goes from there once it is refused no more.
                keep.told
                    .insert(key.clone(), (refused.revision, refused.reason.clone()));
            }
            staged.refused.push(Refusal {
                guards: parse_guards(&key, refused.guards.as_ref()),
                key,
                revision: refused.revision,
                reason: refused.reason,
            });
        }
        let is_ours = self
            .keep
            .as_ref()
            .is_some_and(|keep| keep.version == commit.version);
        if !(is_whole && is_ours) {
            self.full = Full::Soon;
        }
        self.store_id = commit.store_id;
        self.generation = commit.generation;
        self.orphans = commit
            .orphans
            .iter()
            .filter_map(|key| parse_key(key).ok())
            .collect();
        let begun = self.warming.begin(&self.warm, resources.iter());
        self.world.restore(resources);
        self.world.commit(staged);
        self.try_again(again, &begun).await;
        self.publish(self.generation);
        let age = wall_ms().saturating_sub(commit.heard_ms);
        let age = Duration::from_millis(u64::try_from(age).unwrap_or(0));
        if let Some(keep) = &mut self.keep {
            keep.heard_ms = commit.heard_ms;
        }
        let waits_for = self.waits_for();
        self.live.say(|status| {
            status.waits_for = waits_for;
            status.generation = Some(self.generation);
            status.store_id.clone_from(&self.store_id);
            status.heard = Some(Contact::ago(now, age));
            status.source = PolicySource::Disk;
            status.asking_until = Some(tokio::time::Instant::now().into_std() + ASKING);
            status.orphans = self.orphans.len();
        });
        self.say_quarantined();
        tracing::info!(
            generation = self.generation,
            resources = self.world.resources().count(),
            quarantined = self.world.quarantined().len(),
            age_seconds = age.as_secs(),
            "policy from disk is live"
        );
    }

    /// Waits a moment for plugins, and then takes in what did not run when this was written.
    async fn try_again(&mut self, again: Vec<Arc<Resource>>, begun: &BTreeSet<Key>) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut staged = Staged::default();
        for warmed in self.warming.until(deadline, begun).await {
            self.take_in(warmed, &mut staged);
        }
        let pending = self.warming.pending();
        let mut newer = Vec::new();
        for resource in again {
            let key = resource.key();
            if !matches!(resource.spec, Spec::Plugin(_)) {
                staged.upserts.push(resource);
            } else if pending.contains(&key) {
                // To begin with it would end what runs.
                self.later.insert(key, resource);
            } else {
                newer.push(resource);
            }
        }
        self.warming.begin(&self.warm, newer.iter());
        self.world.commit(staged);
    }
}

#[cfg(test)]
mod tests;

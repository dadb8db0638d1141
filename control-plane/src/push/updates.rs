//! What is sent: changes cut into updates of bounded size, encoded once for all proxies.

use crate::policy::{Policy, Refused, wire};
use crate::rollout::course::{Held, Values};
use crate::store::{Changes, Stored};
use bytes::Bytes;
use leeward_policy::Key;
use leeward_proto::v1;
use leeward_proto::v1::control_message::Message as ToProxy;
use prost::Message;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::Mutex;

/// Bytes of resources in one update, about: a resource is never cut in two.
const UPDATE_BYTES: usize = 1 << 20;
/// Resources in one update.
const UPDATE_RESOURCES: usize = 500;
/// Tombstones in one update: at most about 70 bytes each.
const UPDATE_DELETES: usize = 10_000;
/// Changes that are kept ready. Nearly all proxies are at one revision and need the same one.
const CACHED: usize = 8;
/// The same for full pushes: with what a rollout holds back, and without it.
const CACHED_FULL: usize = 2;

/// Encoded messages, in order; the last is complete.
pub(super) type Frames = Arc<[Bytes]>;

/// Makes updates, and keeps the last ones.
#[derive(Debug)]
pub(super) struct Updates {
    policy: Policy,
    // Held while changes are read: of ten thousand proxies that wake for one write, the first reads it and
    // the others find it. Full pushes take longer and have a lock of their own.
    partial: Mutex<VecDeque<Ready>>,
    full: Mutex<VecDeque<Ready>>,
}

/// What a proxy has been sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Sent {
    /// Everything up to here.
    pub(super) generation: u64,
    /// Everything up to here, but for what is held back.
    pub(super) through: u64,
    /// The revision that a rollout holds back; 0 for none.
    pub(super) held: u64,
}

impl Sent {
    /// Whether that is all that it is to have.
    pub(super) fn is_at(self, head: u64, held: Option<&Held>) -> bool {
        let held = held.map_or(0, |held| held.revision);
        let whole = held != 0 || self.generation >= head;
        self.held == held && self.through >= head && whole
    }

    /// Everything up to a revision.
    pub(super) const fn whole(generation: u64) -> Self {
        Self {
            generation,
            through: generation,
            held: 0,
        }
    }
}

/// The updates from one state to another.
#[derive(Clone, Debug)]
struct Ready {
    from: Option<Sent>,
    to: Sent,
    frames: Frames,
}

impl Ready {
    fn is(&self, from: Option<Sent>, to: Sent) -> bool {
        (self.from, self.to) == (from, to)
    }
}

impl Updates {
    pub(super) fn new(policy: Policy) -> Self {
        Self {
            policy,
            partial: Mutex::default(),
            full: Mutex::default(),
        }
    }

    /// What brings a proxy from where it is (`None`: from nothing that this store knows) to `head`, but for what is held back
    /// from it, and where it is then. Never without a frame. `None` while the store is not at `head`: there will be another
    /// course at once.
    pub(super) async fn bring(
        &self,
        from: Option<Sent>,
        head: u64,
        held: Option<&Held>,
    ) -> Result<Option<(Sent, Frames)>, Refused> {
        let to = Sent {
            generation: held.map_or(head, |held| held.revision - 1),
            through: head,
            held: held.map_or(0, |held| held.revision),
        };
        if let Some(sent) = from {
            let mut kept = self.partial.lock().await;
            if let Some(ready) = kept.iter().find(|ready| ready.is(from, to)) {
                return Ok(Some((to, Arc::clone(&ready.frames))));
            }
            let since = sent.generation.min(to.generation);
            if let Some(changes) = self.policy.changes_since(since) {
                if changes.to != head {
                    return Ok(None);
                }
                let changes = narrow(changes, Some(sent), to, held);
                let ready = self.encode(changes, from, to).await?;
                kept.truncate(CACHED - 1);
                kept.push_front(ready.clone());
                return Ok(Some((to, ready.frames)));
            }
        }
        let mut kept = self.full.lock().await;
        if let Some(ready) = kept.iter().find(|ready| ready.is(None, to)) {
            return Ok(Some((to, Arc::clone(&ready.frames))));
        }
        let changes = self.policy.everything();
        if changes.to != head {
            return Ok(None);
        }
        let changes = narrow(changes, None, to, held);
        let ready = self.encode(changes, None, to).await?;
        kept.truncate(CACHED_FULL - 1);
        kept.push_front(ready.clone());
        Ok(Some((to, ready.frames)))
    }

    async fn encode(&self, changes: Changes, from: Option<Sent>, to: Sent) -> Result<Ready, Refused> {
        let store_id = self.policy.store_id().to_owned();
        // Megabytes, at worst: not on a thread that serves others.
        let task = tokio::task::spawn_blocking(move || Ready {
            from,
            to,
            frames: split(&store_id, changes, to, from.is_none())
                .into_iter()
                .map(|update| frame(ToProxy::Update(update)))
                .collect(),
        });
        task.await.map_err(|_| Refused::Broken)
    }
}

/// Of all changes, those that are for a proxy, with what it is to have in place of what is held back from it.
fn narrow(changes: Changes, from: Option<Sent>, to: Sent, held: Option<&Held>) -> Changes {
    let empty = Values::new();
    let values = held.map_or(&empty, |held| &*held.values);
    let full = from.is_none();
    let from = from.unwrap_or(Sent::whole(0));
    // Where it has what is held back, that has to go.
    let has_more = held.is_some() && from.generation > to.generation;
    // Of what was held back before, and isn't now, it may have nothing.
    let new = if held.is_some() && from.held == to.held {
        from.through
    } else {
        from.generation
    };
    let goes = |key: &Key| key.kind.is_for_proxies() && !values.contains_key(key);
    let mut upserts: Vec<Stored> = changes
        .upserts
        .into_iter()
        .filter(|stored| goes(&stored.key) && stored.revision > new)
        .collect();
    let mut deletes: Vec<(u64, Key)> = changes
        .deletes
        .into_iter()
        .filter(|(revision, key)| goes(key) && (full || *revision > new))
        .collect();
    for (key, value) in values {
        match value {
            Some(stored) if has_more || stored.revision > new => upserts.push(stored.clone()),
            // It may have one of before: what is there again at head has no tombstone.
            None if has_more || from.generation < to.generation && !full => {
                deletes.push((to.through, key.clone()));
            }
            Some(_) | None => {}
        }
    }
    Changes {
        to: changes.to,
        upserts,
        deletes,
    }
}

/// A message as it goes on the wire.
pub(super) fn frame(message: ToProxy) -> Bytes {
    let message = Some(message);
    v1::ControlMessage { message }.encode_to_vec().into()
}

/// Cuts changes into updates of bounded size; the last is complete.
fn split(store_id: &str, changes: Changes, to: Sent, full: bool) -> Vec<v1::Update> {
    let new = || v1::Update {
        store_id: store_id.to_owned(),
        generation: to.generation,
        through: to.through,
        ..v1::Update::default()
    };
    let mut updates = vec![v1::Update { full, ..new() }];
    let mut bytes = 0;
    let for_proxies = |key: &Key| key.kind.is_for_proxies();
    for stored in changes.upserts.iter().filter(|stored| for_proxies(&stored.key)) {
        let resource = wire(stored);
        bytes += resource.encoded_len();
        let in_last = updates.last().map_or(0, |u| u.upserts.len());
        if in_last == UPDATE_RESOURCES || (in_last > 0 && bytes > UPDATE_BYTES) {
            updates.push(new());
            bytes = resource.encoded_len();
        }
        if let Some(last) = updates.last_mut() {
            last.upserts.push(resource);
        }
    }
    let deletes: Vec<_> = changes
        .deletes
        .iter()
        .filter(|(_, key)| for_proxies(key))
        .collect();
    for (i, chunk) in deletes.chunks(UPDATE_DELETES).enumerate() {
        let deletes = chunk.iter().map(|(_, key)| leeward_proto::render_key(key));
        // A few tombstones go with the last resources; many have updates of their own.
        match updates.last_mut() {
            Some(last) if i == 0 && chunk.len() <= UPDATE_RESOURCES => last.deletes.extend(deletes),
            Some(_) | None => updates.push(v1::Update {
                deletes: deletes.collect(),
                ..new()
            }),
        }
    }
    if let Some(last) = updates.last_mut() {
        last.complete = true;
    }
    updates
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Stored;
    use leeward_policy::{Kind, Name};

    fn key(i: usize) -> Key {
        let name = Name::parse(&format!("n{i}")).unwrap();
        Key {
            kind: Kind::Service,
            name,
        }
    }

    fn changes(upserts: usize, bytes: usize, deletes: usize) -> Changes {
        let payload = v1::Resource {
            metadata: Some(v1::Metadata {
                labels: [("l".to_owned(), "x".repeat(bytes))].into(),
                ..v1::Metadata::default()
            }),
            ..v1::Resource::default()
        };
        let payload = payload.encode_to_vec();
        let stored = |i| Stored {
            key: key(i),
            revision: 1,
            payload: payload.clone().into(),
            created_ms: 0,
            updated_ms: 0,
        };
        Changes {
            to: 7,
            upserts: (0..upserts).map(stored).collect(),
            deletes: (0..deletes).map(|i| (1, key(i))).collect(),
        }
    }

    #[track_caller]
    fn check(changes: Changes, sizes: &[(usize, usize)]) {
        let updates = split("s", changes, Sent::whole(7), true);
        let found: Vec<_> = updates
            .iter()
            .map(|u| (u.upserts.len(), u.deletes.len()))
            .collect();
        assert_eq!(found, sizes);
        for (i, update) in updates.iter().enumerate() {
            assert_eq!(update.full, i == 0, "the first says that a full push begins");
            assert_eq!(
                update.complete,
                i + 1 == updates.len(),
                "the last completes the change"
            );
            assert_eq!((update.generation, update.store_id.as_str()), (7, "s"));
        }
    }

    #[test]
    fn what_is_for_the_control_plane_alone_is_not_sent() {
        let mut changes = changes(2, 10, 2);
        changes.upserts[0].key.kind = Kind::AccessPolicy;
        changes.deletes[0].1.kind = Kind::AccessPolicy;
        check(changes, &[(1, 1)]);
    }

    #[test]
    fn changes_are_cut_by_count_and_by_size() {
        check(changes(0, 0, 0), &[(0, 0)]);
        check(changes(3, 10, 2), &[(3, 2)]);
        check(changes(1201, 10, 0), &[(500, 0), (500, 0), (201, 0)]);
        check(changes(5, 400 << 10, 0), &[(2, 0), (2, 0), (1, 0)]);
        check(changes(2, 2 << 20, 1), &[(1, 0), (1, 1)]);
        check(
            changes(1, 10, 25_000),
            &[(1, 0), (0, 10_000), (0, 10_000), (0, 5_000)],
        );
    }

    mod held {
        use super::super::*;
        use crate::rollout::course;
        use crate::rollout::reach::Reach;
        use crate::store::{Author, Record, ResourceChange};
        use leeward_policy::{Kind, Name};
        use proptest::prelude::*;
        use std::collections::BTreeMap;

        type World = BTreeMap<Key, Stored>;

        const KEYS: [(Kind, &str); 5] = [
            (Kind::Service, "s"),
            (Kind::Service, "t"),
            (Kind::CircuitOverride, "o"),
            (Kind::CircuitOverride, "p"),
            (Kind::RolloutPolicy, "r"),
        ];

        /// Every state that there was, and what led from one to the next.
        #[derive(Default)]
        struct History {
            worlds: Vec<World>,
            records: Vec<Record>,
        }

        impl History {
            fn write(&mut self, writes: &[(usize, bool)]) {
                let mut world = self.worlds.last().cloned().unwrap_or_default();
                let revision = self.worlds.len() as u64;
                let mut changes: BTreeMap<Key, ResourceChange> = BTreeMap::new();
                for (which, delete) in writes {
                    let (kind, name) = KEYS[*which];
                    let name = Name::parse(name).unwrap();
                    let key = Key { kind, name };
                    let before = world.get(&key).cloned();
                    let after = (!delete).then(|| Stored {
                        key: key.clone(),
                        revision,
                        payload: revision.to_string().into_bytes().into(),
                        created_ms: 0,
                        updated_ms: 0,
                    });
                    match &after {
                        Some(stored) => drop(world.insert(key.clone(), stored.clone())),
                        None => drop(world.remove(&key)),
                    }
                    if before.is_some() || after.is_some() {
                        changes
                            .entry(key.clone())
                            .and_modify(|change| change.after.clone_from(&after))
                            .or_insert(ResourceChange { key, before, after });
                    }
                }
                self.records.push(Record {
                    revision,
                    time_ms: 0,
                    author: Author::default(),
                    changes: changes.into_values().collect(),
                });
                self.worlds.push(world);
            }

            fn head(&self) -> u64 {
                self.worlds.len() as u64 - 1
            }

            fn since(&self, after: u64) -> Changes {
                let now = self.worlds.last().unwrap();
                let changed = self.records.iter().filter(|record| record.revision > after);
                let mut deletes = BTreeMap::new();
                for change in changed.flat_map(|r| r.changes.iter().map(move |c| (r.revision, c))) {
                    if !now.contains_key(&change.1.key) {
                        deletes.insert(change.1.key.clone(), change.0);
                    }
                }
                Changes {
                    to: self.head(),
                    upserts: now.values().filter(|s| s.revision > after).cloned().collect(),
                    deletes: deletes
                        .into_iter()
                        .map(|(key, revision)| (revision, key))
                        .collect(),
                }
            }

            /// What a proxy is to have while `revision` is held back from it, or isn't, and the log ends at `at`.
            fn wanted(&self, at: u64, held: Option<u64>) -> World {
                let mut world = self.worlds[usize::try_from(at).unwrap()].clone();
                if let Some(values) = held.map(|held| self.values(held, at)) {
                    for (key, value) in values {
                        match value {
                            Some(stored) => drop(world.insert(key, stored)),
                            None => drop(world.remove(&key)),
                        }
                    }
                }
                world.retain(|key, _| key.kind.is_for_proxies());
                world
            }

            fn values(&self, held: u64, at: u64) -> Values {
                let (held, at) = (usize::try_from(held).unwrap(), usize::try_from(at).unwrap());
                course::values(&self.records[held], &self.records[held + 1..=at])
            }
        }

        fn take(mut world: World, changes: Changes) -> World {
            for (_, key) in changes.deletes {
                world.remove(&key);
            }
            for stored in changes.upserts {
                world.insert(stored.key.clone(), stored);
            }
            world
        }

        fn writes(keys: std::ops::Range<usize>) -> impl Strategy<Value = Vec<(usize, bool)>> {
            prop::collection::vec((keys, any::<bool>()), 1..4)
        }

        proptest! {
            /// Wherever a proxy is, and wherever it is to be, it gets there.
            #[test]
            fn every_proxy_has_what_it_is_to_have(
                before in prop::collection::vec(writes(0..5), 1..6),
                change in writes(0..5),
                later in prop::collection::vec(writes(2..5), 0..5),
                from in any::<prop::sample::Index>(),
                was in 0..3u8,
                is_held in any::<bool>(),
            ) {
                let mut history = History::default();
                history.worlds.push(World::new());
                history.records.push(Record {
                    revision: 0,
                    time_ms: 0,
                    author: Author::default(),
                    changes: Vec::new(),
                });
                for writes in &before {
                    history.write(writes);
                }
                history.write(&change);
                let revision = history.head();
                for writes in &later {
                    history.write(writes);
                }
                let head = history.head();
                // It had everything up to some revision, or that but for what is held back, or nothing.
                let at = from.index(usize::try_from(head).unwrap() + 1) as u64;
                let (from, world) = match was {
                    0 => (None, World::new()),
                    1 if at >= revision => {
                        let sent = Sent { generation: revision - 1, through: at, held: revision };
                        (Some(sent), history.wanted(at, Some(revision)))
                    }
                    _ => (Some(Sent::whole(at)), history.wanted(at, None)),
                };
                let held = is_held.then(|| Held {
                    revision,
                    reach: Reach::default(),
                    values: Arc::new(history.values(revision, head)),
                    later: 0,
                });
                let to = Sent {
                    generation: if is_held { revision - 1 } else { head },
                    through: head,
                    held: if is_held { revision } else { 0 },
                };
                let since = from.map_or(0, |sent| sent.generation.min(to.generation));
                let changes = narrow(history.since(since), from, to, held.as_ref());
                let found = take(world, changes);
                prop_assert_eq!(found, history.wanted(head, is_held.then_some(revision)));
            }
        }
    }
}

//! What is sent: changes cut into updates of bounded size, encoded once for all proxies.

use crate::policy::{Policy, Refused, wire};
use crate::store::Changes;
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

/// Encoded messages, in order; the last is complete.
pub(super) type Frames = Arc<[Bytes]>;

/// Makes updates, and keeps the last ones.
#[derive(Debug)]
pub(super) struct Updates {
    policy: Policy,
    // Held while changes are read: of ten thousand proxies that wake for one write, the first reads it and
    // the others find it. Full pushes take longer and have a lock of their own.
    partial: Mutex<VecDeque<Ready>>,
    full: Mutex<Option<Ready>>,
}

/// The updates from one revision to another.
#[derive(Clone, Debug)]
struct Ready {
    from: u64,
    to: u64,
    frames: Frames,
}

impl Updates {
    pub(super) fn new(policy: Policy) -> Self {
        Self {
            policy,
            partial: Mutex::default(),
            full: Mutex::default(),
        }
    }

    /// What brings a proxy from `from` (`None`: from nothing that this store knows) up to date, and to which
    /// revision that is. Never without a frame.
    pub(super) async fn since(&self, from: Option<u64>) -> Result<(u64, Frames), Refused> {
        if let Some(from) = from
            && let Some(ready) = self.partial(from).await?
        {
            return Ok((ready.to, ready.frames));
        }
        let mut kept = self.full.lock().await;
        let current = self.policy.revision();
        if let Some(ready) = kept.as_ref().filter(|ready| ready.to == current) {
            return Ok((ready.to, Arc::clone(&ready.frames)));
        }
        let ready = self.encode(self.policy.everything(), 0, true).await?;
        let ready = kept.insert(ready);
        Ok((ready.to, Arc::clone(&ready.frames)))
    }

    async fn partial(&self, from: u64) -> Result<Option<Ready>, Refused> {
        let mut kept = self.partial.lock().await;
        let current = self.policy.revision();
        if let Some(ready) = kept.iter().find(|r| r.from == from && r.to == current) {
            return Ok(Some(ready.clone()));
        }
        let Some(changes) = self.policy.changes_since(from) else {
            return Ok(None);
        };
        let ready = self.encode(changes, from, false).await?;
        kept.truncate(CACHED - 1);
        kept.push_front(ready.clone());
        Ok(Some(ready))
    }

    async fn encode(&self, changes: Changes, from: u64, full: bool) -> Result<Ready, Refused> {
        let store_id = self.policy.store_id().to_owned();
        // Megabytes, at worst: not on a thread that serves others.
        let task = tokio::task::spawn_blocking(move || Ready {
            from,
            to: changes.to,
            frames: split(&store_id, changes, full)
                .into_iter()
                .map(|update| frame(ToProxy::Update(update)))
                .collect(),
        });
        task.await.map_err(|_| Refused::Broken)
    }
}

/// A message as it goes on the wire.
pub(super) fn frame(message: ToProxy) -> Bytes {
    let message = Some(message);
    v1::ControlMessage { message }.encode_to_vec().into()
}

/// Cuts changes into updates of bounded size; the last is complete.
fn split(store_id: &str, changes: Changes, full: bool) -> Vec<v1::Update> {
    let new = || v1::Update {
        store_id: store_id.to_owned(),
        generation: changes.to,
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
        let updates = split("s", changes, true);
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
        changes.upserts[0].key.kind = Kind::BackupPolicy;
        changes.deletes[0].1.kind = Kind::BackupPolicy;
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
}

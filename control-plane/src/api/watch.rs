//! Changes as they happen, of what a watcher wants and may see.

use super::labels;
use crate::access::{Caller, Grants};
use crate::policy::{Policy, wall, wire};
use crate::refusal::{Reason, compacted, refuse, refuse_for_now, status};
use crate::store::{Changes, Stored};
use leeward_policy::{Key, Kind, Selector};
use leeward_proto::{render_key, v1};
use std::collections::BTreeSet;
use tokio::sync::mpsc;
use tonic::{Code, Status};
use v1::watch_event::Event;

/// Where events go.
type Outbox = mpsc::Sender<Result<v1::WatchEvent, Status>>;

/// One who watches.
pub(super) struct Watcher {
    pub(super) kind: Option<Kind>,
    pub(super) selector: Selector,
    /// What it may see. When that changes, the watch ends: what it was told may not be what it may know.
    pub(super) grants: Grants,
    /// Changes after this revision.
    pub(super) after: u64,
    pub(super) policy: Policy,
    pub(super) caller: Caller,
}

impl Watcher {
    /// Tells until there is nobody to tell, or nothing more to be told.
    pub(super) async fn run(self, outbox: Outbox) {
        let left = self.caller.until().duration_since(wall()).unwrap_or_default();
        let ended = tokio::select! {
            told = self.tell(&outbox) => told,
            () = tokio::time::sleep(left) => {
                let why = "the certificate or the token of the watcher has ended; watch again with another";
                Err(refuse(Code::Unauthenticated, Reason::CertificateEnded, why))
            }
            () = outbox.closed() => return,
        };
        if let Err(status) = ended {
            drop(outbox.send(Err(status)).await);
        }
    }

    async fn tell(&self, outbox: &Outbox) -> Result<(), Status> {
        let mut after = self.after;
        let mut view = self.view().await?;
        let mut revisions = self.policy.watch();
        loop {
            // Marked as seen before reading, so that a write in between is not missed.
            revisions.borrow_and_update();
            if self.caller.grants() != self.grants {
                let why = "what the watcher may see has changed; list again and watch from there";
                return Err(refuse_for_now(Code::Aborted, Reason::AccessChanged, why));
            }
            let changes = match self.policy.changes_since(after) {
                Some(changes) => changes,
                // A watch from the beginning wants what is there, not what was deleted before it looked.
                None if after == 0 => self.policy.everything(),
                None => return Err(compacted(after)),
            };
            let to = changes.to;
            for event in self.events(changes, after == 0, view.as_mut()) {
                if outbox.send(Ok(event)).await.is_err() {
                    return Ok(());
                }
            }
            after = to;
            if revisions.changed().await.is_err() {
                return Ok(());
            }
        }
    }

    /// The resources that it has been told of already, where it isn't told of all.
    async fn view(&self) -> Result<Option<BTreeSet<Key>>, Status> {
        if self.selector.is_empty() && self.grants.sees_all() {
            return Ok(None);
        }
        if self.after == 0 {
            return Ok(Some(BTreeSet::new()));
        }
        let then = self
            .policy
            .store()
            .at(self.after)
            .await
            .map_err(|error| status(error.into()))?;
        let then = then.ok_or_else(|| compacted(self.after))?;
        Ok(Some(
            then.iter()
                .filter(|stored| self.wants(stored))
                .map(|stored| stored.key.clone())
                .collect(),
        ))
    }

    fn wants(&self, stored: &Stored) -> bool {
        let labels = labels(&wire(stored));
        self.kind.is_none_or(|kind| kind == stored.key.kind)
            && self.selector.matches(&labels)
            && self.grants.sees(stored.key.kind, &labels)
    }

    fn events(
        &self,
        changes: Changes,
        first: bool,
        mut view: Option<&mut BTreeSet<Key>>,
    ) -> Vec<v1::WatchEvent> {
        let mut events = Vec::new();
        let mut put = |revision, event| {
            events.push(v1::WatchEvent {
                event: Some(event),
                revision,
            });
        };
        for stored in &changes.upserts {
            let key = &stored.key;
            match &mut view {
                None if self.kind.is_none_or(|kind| kind == key.kind) => {
                    put(stored.revision, Event::Put(wire(stored)));
                }
                None => {}
                Some(view) if self.wants(stored) => {
                    view.insert(key.clone());
                    put(stored.revision, Event::Put(wire(stored)));
                }
                Some(view) => {
                    let was_told = view.remove(key);
                    if was_told {
                        put(stored.revision, Event::Deleted(render_key(key)));
                    }
                }
            }
        }
        for (revision, key) in &changes.deletes {
            let is_told = match &mut view {
                None => !first && self.kind.is_none_or(|kind| kind == key.kind),
                Some(view) => view.remove(key),
            };
            if is_told {
                put(*revision, Event::Deleted(render_key(key)));
            }
        }
        events.sort_by_key(|event| event.revision);
        events.push(v1::WatchEvent {
            event: Some(Event::Synced(changes.to)),
            revision: changes.to,
        });
        events
    }
}

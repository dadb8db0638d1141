//! One write: a record, and the small transaction that moves head to it.

use super::format::{self, HEAD, Head, Log, put_body, wire};
use super::{
    Author, Fence, Inner, LevelWrites, Record, ResourceChange, Store, StoreError, Stored, follow, token,
    unknown,
};
use crate::kv::{Compare, KvError, Txn};
use bytes::Bytes;
use leeward_policy::Key;
use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// One write of a resource.
#[derive(Clone, Debug)]
pub struct Write {
    /// The resource.
    pub key: Key,
    /// What it becomes; `None` deletes it.
    pub payload: Option<Vec<u8>>,
    /// The revision that must be there; 0 for any.
    pub expect: u64,
}

/// What is written in one step, or not at all.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// Resources; each stands once.
    pub writes: Vec<Write>,
    /// What that means for levels of degradation. Without resources it makes no revision.
    pub levels: LevelWrites,
    /// Who writes.
    pub author: Author,
    /// What the writer must hold still.
    pub fence: Option<Fence>,
    /// The revision that all this was checked against: if anybody has written since, it is not done
    /// ([`StoreError::Moved`]).
    pub at: Option<u64>,
    /// The same for levels: the number that [`Store::levels`] gave.
    pub levels_at: Option<u64>,
    /// What else must be so in the kv, at most 20; or it is [`StoreError::Moved`].
    pub requires: Vec<Compare>,
}

/// How often a write is tried against others.
const MAX_TRIES: u32 = 100;
/// How long a write whose answer was lost is asked after.
const RESOLVE: Duration = Duration::from_secs(10);

/// A write as it is tried.
struct Attempt {
    base: Head,
    head: Head,
    record: Option<Record>,
    levels: Option<LevelWrites>,
}

impl Store {
    /// Does all of a change, or nothing. Returns the revision at which it is done.
    ///
    /// # Errors
    ///
    /// [`StoreError::Conflict`] or [`StoreError::Moved`] if a precondition fails, [`StoreError::Fenced`] if the fence does not
    /// hold; nothing is written then. After an error of the kv that is [`KvError::Unknown`] it may have been written.
    pub async fn write(&self, change: Change) -> Result<u64, StoreError> {
        let inner = &self.inner;
        if change.writes.is_empty() && change.levels.is_empty() {
            return Ok(self.revision());
        }
        if let Some(schema) = inner.read_only {
            return Err(StoreError::ReadOnly(schema));
        }
        let _turn = inner.writing.lock().await;
        for tries in 0..MAX_TRIES {
            if tries > 0 {
                // Whoever lost a race waits a little, the longer the more often.
                let most = u64::from(tries.min(10)) * 5;
                tokio::time::sleep(Duration::from_millis(fastrand::u64(0..=most))).await;
                inner.settle().await?;
            }
            let attempt = match inner.attempt(&change) {
                Ok(attempt) => attempt,
                // What is in memory may be behind what is there.
                Err(_) if tries == 0 && inner.kv.is_shared() => {
                    inner.settle().await?;
                    inner.attempt(&change)?
                }
                Err(error) => return Err(error),
            };
            if let Some(revision) = inner.commit(attempt, &change).await? {
                return Ok(revision);
            }
        }
        Err(KvError::Contended(HEAD.to_owned()).into())
    }
}

impl Inner {
    /// Looks at the preconditions, and says what would be written.
    fn attempt(&self, change: &Change) -> Result<Attempt, StoreError> {
        let now = self.clock.now_ms();
        let mirror = self.mirror();
        let base = mirror.head.clone();
        if let Some(wanted) = change.at.filter(|at| *at != base.revision) {
            let found = base.revision;
            return Err(StoreError::Moved { wanted, found });
        }
        if let Some(wanted) = change.levels_at.filter(|at| *at != base.levels) {
            let found = base.levels;
            return Err(StoreError::Moved { wanted, found });
        }
        let mut head = base.clone();
        head.time_ms = now.max(base.time_ms);
        let mut record = None;
        if !change.writes.is_empty() {
            head.revision += 1;
            let mut changes: BTreeMap<&Key, ResourceChange> = BTreeMap::new();
            for write in &change.writes {
                let before = mirror.peek(&write.key).cloned();
                let found = before.as_ref().map_or(0, |stored| stored.revision);
                if write.expect != 0 && write.expect != found {
                    return Err(StoreError::Conflict {
                        key: write.key.clone(),
                        wanted: write.expect,
                        found,
                    });
                }
                let after = write.payload.as_ref().map(|payload| Stored {
                    key: write.key.clone(),
                    revision: head.revision,
                    payload: Bytes::from(payload.clone()),
                    created_ms: before.as_ref().map_or(head.time_ms, |stored| stored.created_ms),
                    updated_ms: head.time_ms,
                });
                let key = write.key.clone();
                changes.insert(&write.key, ResourceChange { key, before, after });
            }
            let new = |change: &&ResourceChange| change.before.is_none() && change.after.is_some();
            let count = mirror.len() + changes.values().filter(new).count();
            let limit = self.bounds.resources;
            if count > limit && changes.values().any(|change| new(&change)) {
                return Err(StoreError::Resources { count, limit });
            }
            record = Some(Record {
                revision: head.revision,
                time_ms: head.time_ms,
                author: change.author.clone(),
                changes: changes.into_values().collect(),
            });
        }
        let levels = (!change.levels.is_empty()).then(|| change.levels.clone());
        if let Some(levels) = &levels {
            head.levels += 1;
            head.lines += levels.changes.len() as u64;
        }
        Ok(Attempt {
            base,
            head,
            record,
            levels,
        })
    }

    /// Writes it; `None` if somebody else was there first.
    async fn commit(&self, attempt: Attempt, change: &Change) -> Result<Option<u64>, StoreError> {
        let Attempt {
            base,
            mut head,
            record,
            levels,
        } = attempt;
        let name = token();
        let mut txn = Txn::default()
            .when(HEAD, base.modified)
            .when(follow::META, self.meta.load(Ordering::Relaxed))
            .put(HEAD, head.render());
        // What tells whose write it was that has the number.
        let mut written: Vec<(Log, u64)> = Vec::new();
        if let Some(record) = &record {
            let author = record.author.clone();
            let mut header = wire::Header {
                number: record.revision,
                time_ms: record.time_ms,
                attempt: name.clone(),
                who: author.who,
                from: author.from,
                message: author.message,
                labels: author.labels.into_iter().collect(),
                ..wire::Header::default()
            };
            written.push((Log::Policy, record.revision));
            let body = format::policy(record).encode_to_vec();
            if let Err(error) = put_body(&self.kv, Log::Policy, &mut header, body).await {
                self.clean(&written, &name).await;
                return Err(error);
            }
            txn = txn.put(Log::Policy.key(record.revision), header.encode_to_vec());
        }
        let first_line = base.lines + 1;
        if let Some(levels) = &levels {
            let mut header = wire::Header {
                number: head.levels,
                time_ms: head.time_ms,
                attempt: name.clone(),
                first_line,
                ..wire::Header::default()
            };
            written.push((Log::Levels, head.levels));
            let body = format::levels(levels).encode_to_vec();
            if let Err(error) = put_body(&self.kv, Log::Levels, &mut header, body).await {
                self.clean(&written, &name).await;
                return Err(error);
            }
            txn = txn.put(Log::Levels.key(head.levels), header.encode_to_vec());
        }
        if let Some(fence) = &change.fence {
            txn = fence.guard(txn);
        }
        txn.compares.extend(change.requires.iter().cloned());
        match self.decide(&txn, &written, &name).await {
            Ok(Some(modified)) => {
                head.modified = modified;
                let revision = head.revision;
                let _following = self.following.lock().await;
                let is_next = self.mirror().head.modified == base.modified;
                if is_next {
                    let mut mirror = self.mirror_mut();
                    if let Some(record) = record {
                        mirror.apply(Arc::new(record), Vec::new());
                    }
                    if let Some(levels) = levels {
                        mirror.apply_levels(head.levels, first_line, head.time_ms, levels);
                    }
                    mirror.head = head;
                    drop(mirror);
                    self.tell();
                } else if let Err(error) = self.follow().await {
                    // It is written; the mirror comes after it.
                    tracing::warn!(%error, "can't read what was just written");
                }
                Ok(Some(revision))
            }
            Ok(None) => {
                self.clean(&written, &name).await;
                if let Some(fence) = &change.fence
                    && !fence.holds(&self.kv).await?
                {
                    return Err(fence.lost());
                }
                let meta = follow::meta(&self.kv).await?;
                if let Some(schema) = meta.read_only {
                    return Err(StoreError::ReadOnly(schema));
                }
                self.meta.store(meta.modified, Ordering::Relaxed);
                if change.requires.is_empty() {
                    return Ok(None);
                }
                // It may be this that isn't so any more.
                let (wanted, found) = (base.revision, self.mirror().head.revision);
                Err(StoreError::Moved { wanted, found })
            }
            Err(error) => {
                if !unknown(&error) {
                    self.clean(&written, &name).await;
                }
                Err(error)
            }
        }
    }

    /// Does the transaction, and finds out whether it was done where the answer is lost.
    async fn decide(&self, txn: &Txn, written: &[(Log, u64)], name: &str) -> Result<Option<u64>, StoreError> {
        let until = Instant::now() + RESOLVE;
        let mut lost = None;
        loop {
            let error = match self.kv.txn(txn.clone()).await {
                Ok(Some(modified)) => return Ok(Some(modified)),
                // The very write that uses up etcd's quota is done, and said to have failed.
                Err(full @ KvError::Full { .. }) => match self.ours(written, name).await {
                    Ok(Some(modified)) => return Ok(Some(modified)),
                    Ok(None) if lost.is_none() => return Err(full.into()),
                    Ok(None) => full,
                    Err(StoreError::Kv(error)) => KvError::Unknown {
                        place: HEAD.to_owned(),
                        reason: format!("{full}; {error}"),
                    },
                    Err(error) => return Err(error),
                },
                // Head has moved, perhaps by what was lost.
                Ok(None) if lost.is_some() => match self.ours(written, name).await {
                    Ok(ours) => return Ok(ours),
                    Err(StoreError::Kv(error)) => error,
                    Err(error) => return Err(error),
                },
                Ok(None) => return Ok(None),
                Err(error @ KvError::Unknown { .. }) => error,
                Err(error) if lost.is_some() => error,
                Err(error) => return Err(error.into()),
            };
            // It may still be done, late; the same again can't be done twice, since both compare head.
            let error = lost.get_or_insert(error);
            if Instant::now() >= until {
                return Err(error.clone().into());
            }
            tokio::time::sleep(Duration::from_millis(fastrand::u64(50..=250))).await;
        }
    }

    /// Whether the record of a number is the one of this attempt; its revision in the kv then.
    async fn ours(&self, written: &[(Log, u64)], name: &str) -> Result<Option<u64>, StoreError> {
        let Some((log, number)) = written.first() else {
            return Ok(None);
        };
        let key = log.key(*number);
        let Some(entry) = self.kv.get(&key).await? else {
            return Ok(None);
        };
        let header: wire::Header = format::decode(&key, &entry.value)?;
        Ok((header.attempt == name).then_some(entry.modified))
    }

    /// Takes away the parts of an attempt that came to nothing. What can't be taken away now, housekeeping finds.
    async fn clean(&self, written: &[(Log, u64)], name: &str) {
        for (log, number) in written {
            let prefix = format!("{}{name}/", log.parts(*number));
            match self.kv.keys(&prefix, None, 1).await {
                Ok(page) if page.entries.is_empty() => {}
                Ok(_) => drop(self.kv.delete_prefix(&prefix).await),
                Err(error) => tracing::debug!(%error, "an attempt's parts are left for housekeeping"),
            }
        }
    }
}

//! What was written, by whom, and how everything was then.

use super::format::{self, Log, wire};
use super::{Inner, Store, StoreError, Stored, snapshot};
use leeward_policy::Key;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of records that one answer has, beside its first.
const MAX_ANSWER: usize = 32 << 20;
/// Records that are read at once.
const PAGE: usize = 32;

/// Who wrote, and what for.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Author {
    /// A SPIFFE id, or the name of what did it by itself.
    pub who: String,
    /// The address that it came from, if it came from one.
    pub from: String,
    /// What it was for, in the words of whoever did it.
    pub message: String,
    /// What tools want to find again, such as the revision that was rolled back to.
    pub labels: BTreeMap<String, String>,
}

impl From<&str> for Author {
    fn from(who: &str) -> Self {
        Self::of(who)
    }
}

impl Author {
    /// One of whom no more is known.
    pub fn of(who: impl Into<String>) -> Self {
        Self {
            who: who.into(),
            ..Self::default()
        }
    }
}

/// A resource before and after a write.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ResourceChange {
    /// The resource.
    pub key: Key,
    /// `None`: there was none.
    pub before: Option<Stored>,
    /// `None`: it was deleted.
    pub after: Option<Stored>,
}

/// One write of policy.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Record {
    /// Its number.
    pub revision: u64,
    /// When it was, in milliseconds since 1970; never before the one before.
    pub time_ms: i64,
    /// Who wrote.
    pub author: Author,
    /// What it changed; a resource stands once.
    pub changes: Vec<ResourceChange>,
}

impl Record {
    /// Its size in memory, about.
    pub(super) fn size(&self) -> usize {
        let bytes = |stored: &Option<Stored>| stored.as_ref().map_or(0, |stored| stored.payload.len());
        let changes = self.changes.iter();
        256 + changes
            .map(|change| 256 + bytes(&change.before) + bytes(&change.after))
            .sum::<usize>()
    }
}

impl Store {
    /// The oldest revision that [`Store::at`] can still tell of. [`Store::record`] can from the one after it on.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn oldest(&self) -> Result<u64, StoreError> {
        snapshot::compacted(&self.inner.kv).await
    }

    /// Every resource as it was at a revision, by kind and name; `None` if there is no such revision, or it is forgotten.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached, or is damaged.
    pub async fn at(&self, revision: u64) -> Result<Option<Vec<Stored>>, StoreError> {
        let inner = &self.inner;
        if revision > self.revision() && revision > self.settle().await? {
            return Ok(None);
        }
        let compacted = snapshot::compacted(&inner.kv).await?;
        if revision < compacted {
            return Ok(None);
        }
        let (mut resources, mut here) = inner.mirror().resources();
        let snapshots = snapshot::list(&inner.kv).await?;
        let nearest = snapshots
            .iter()
            .filter(|manifest| manifest.revision >= compacted)
            .min_by_key(|manifest| manifest.revision.abs_diff(revision));
        if let Some(manifest) = nearest
            && manifest.revision.abs_diff(revision) + 100 < here.abs_diff(revision)
            && let Some(mirror) = snapshot::load(&inner.kv, manifest, inner.bounds).await?
        {
            (resources, here) = (mirror.into_resources(), manifest.revision);
        }
        while here != revision {
            let forward = here < revision;
            let number = if forward { here + 1 } else { here };
            let Some(record) = inner.record(number).await? else {
                // Compacted since.
                return Ok(None);
            };
            for change in &record.changes {
                match if forward { &change.after } else { &change.before } {
                    Some(stored) => drop(resources.insert(change.key.clone(), stored.clone())),
                    None => drop(resources.remove(&change.key)),
                }
            }
            here = if forward { number } else { number - 1 };
        }
        Ok(Some(resources.into_values().collect()))
    }

    /// Records, newest first, from before a revision (0: from the newest on). Fewer than `limit` where they are large: ask
    /// again from before the last; none where there are no more.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached, or is damaged.
    pub async fn history(&self, before: u64, limit: usize) -> Result<Vec<Record>, StoreError> {
        let newest = self.revision();
        let mut next = match before {
            0 => newest,
            before => newest.min(before - 1),
        };
        let (mut records, mut bytes) = (Vec::new(), 0);
        while next > 0 && records.len() < limit && bytes < MAX_ANSWER {
            let Some(record) = self.inner.record(next).await? else {
                break;
            };
            bytes += record.size();
            records.push(Record::clone(&record));
            next -= 1;
        }
        Ok(records)
    }

    /// The record of a revision; `None` if there is none, or it is forgotten.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached, or is damaged.
    pub async fn record(&self, revision: u64) -> Result<Option<Record>, StoreError> {
        let record = self.inner.record(revision).await?;
        Ok(record.map(|record| Record::clone(&record)))
    }
}

impl Inner {
    async fn record(&self, revision: u64) -> Result<Option<Arc<Record>>, StoreError> {
        if let Some(record) = self.mirror().recent(revision) {
            return Ok(Some(Arc::clone(record)));
        }
        let key = Log::Policy.key(revision);
        let Some(entry) = self.kv.get(&key).await? else {
            return Ok(None);
        };
        let header = format::decode(&key, &entry.value)?;
        let (record, _) = read(&self.kv, header).await?;
        Ok(Some(Arc::new(record)))
    }
}

/// A record with its body.
pub(super) async fn read(
    kv: &crate::kv::Kv,
    mut header: wire::Header,
) -> Result<(Record, Vec<wire::Change>), StoreError> {
    let body = format::body(kv, Log::Policy, &mut header).await?;
    let policy = format::decode(&Log::Policy.key(header.number), &body)?;
    Ok(format::record(header, policy))
}

/// Headers of a log after a number, in order, a page of them.
pub(super) async fn page(
    kv: &crate::kv::Kv,
    log: Log,
    after: u64,
) -> Result<(Vec<wire::Header>, bool), StoreError> {
    let page = kv.range(log.prefix(), Some(&log.key(after)), PAGE).await?;
    let headers = page
        .entries
        .iter()
        .map(|entry| format::decode(&entry.key, &entry.value));
    Ok((headers.collect::<Result<_, _>>()?, page.more))
}

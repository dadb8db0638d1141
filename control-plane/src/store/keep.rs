//! Housekeeping, by whichever control plane leads it: snapshots, what is too old, what was cut short.

use super::format::{self, Log, wire};
use super::{Fence, Inner, StoreError, certificates, history, modules, revocations, snapshot};
use crate::kv::{MAX_OPS, Txn};
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const JOB: &str = "housekeeping";
const TTL: Duration = Duration::from_secs(15);
/// How often what was cut short, and what has ended, is looked for; and how long the kv itself remembers what is no more.
const SELDOM: Duration = Duration::from_secs(300);
/// Keys that are deleted in one transaction.
const DELETES: usize = MAX_OPS - 10;
/// Keys on a page.
const PAGE: usize = 1000;

/// Keeps house until the store is closed.
pub(super) async fn run(inner: Arc<Inner>) {
    if inner.read_only.is_some() {
        return;
    }
    let stop = inner.stop.clone();
    loop {
        let leadership = tokio::select! {
            () = stop.cancelled() => return,
            leadership = inner.lead(JOB, TTL) => leadership,
        };
        let mut seldom = Instant::now();
        let mut compact_to = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = leadership.lost() => break,
                () = tokio::time::sleep(inner.every) => {}
            }
            let fence = leadership.fence();
            let mut done = inner.snapshot(&fence).await;
            if done.is_ok() && Instant::now() >= seldom {
                seldom = Instant::now() + SELDOM;
                done = inner.tidy(&fence, &mut compact_to).await;
            }
            match done {
                Ok(()) => {}
                Err(StoreError::Fenced(_)) => break,
                Err(error) => tracing::warn!(%error, "housekeeping failed; it is tried again"),
            }
        }
    }
}

impl Inner {
    /// Writes a snapshot when there is enough since the last, and forgets what the bounds say.
    async fn snapshot(&self, fence: &Fence) -> Result<(), StoreError> {
        let (records, bytes) = self.mirror().since_snapshot;
        let (every, every_bytes) = self.bounds.snapshot_every;
        if records < every && bytes < every_bytes {
            return Ok(());
        }
        let snapshot = self.mirror().snapshot();
        let (revision, levels) = (snapshot.revision, snapshot.levels);
        let there = snapshot::list(&self.kv).await?;
        // Another leader may have written it already.
        let last = there.last().map_or((0, 0), |last| (last.revision, last.levels));
        if (revision, levels) > last {
            let task = tokio::task::spawn_blocking(move || snapshot::render(&snapshot));
            let keys = task
                .await
                .map_err(|_| StoreError::Damaged("the snapshot's task broke down".to_owned()))?;
            snapshot::write(&self.kv, keys, fence).await?;
            tracing::info!(revision, "a snapshot is written");
        }
        {
            let mut mirror = self.mirror_mut();
            let newer = mirror.head.revision.saturating_sub(revision);
            let newer_levels = mirror.head.levels.saturating_sub(levels);
            mirror.since_snapshot = (newer + newer_levels, 0);
        }
        self.compact(fence).await?;
        self.thin_out(fence).await
    }

    /// Forgets records that are too many or too old. A snapshot that is younger must be there.
    async fn compact(&self, fence: &Fence) -> Result<(), StoreError> {
        let compacted = snapshot::compacted(&self.kv).await?;
        let manifests = snapshot::list(&self.kv).await?;
        let Some((newest, known)) = manifests.last().map(|last| (last.revision, last.levels)) else {
            return Ok(());
        };
        let (head, now) = {
            let mirror = self.mirror();
            (mirror.head.clone(), mirror.head.time_ms)
        };
        let mut to = head.revision.saturating_sub(self.bounds.records).max(compacted);
        let age = i64::try_from(self.bounds.age.as_millis()).unwrap_or(i64::MAX);
        let oldest = now.saturating_sub(age);
        'old: while to < newest {
            let (headers, more) = history::page(&self.kv, Log::Policy, to).await?;
            for header in &headers {
                if header.time_ms >= oldest || header.number > newest {
                    break 'old;
                }
                to = header.number;
            }
            if !more {
                break;
            }
        }
        let to = to.min(newest);
        if to > compacted {
            let value = json!({"revision": to}).to_string();
            let txn = fence.guard(Txn::default().put(snapshot::COMPACTED, value));
            if self.kv.txn(txn).await?.is_none() {
                return Err(fence.lost());
            }
            tracing::info!(from = compacted, to, "old records are forgotten");
        }
        // Said first and done after: one that reads meanwhile knows what it may miss.
        self.delete_upto(Log::Policy, to, fence).await?;
        let first_line = self.mirror().lines().front().map(|(number, _)| *number);
        let levels = self.levels_before(first_line.unwrap_or(head.lines + 1)).await?;
        self.delete_upto(Log::Levels, levels.min(known), fence).await
    }

    /// The last record of levels all of whose lines are forgotten.
    async fn levels_before(&self, first_line: u64) -> Result<u64, StoreError> {
        let mut after = 0;
        let mut last: Option<wire::Header> = None;
        loop {
            let (headers, more) = history::page(&self.kv, Log::Levels, after).await?;
            for header in headers {
                // It begins where the one before has ended.
                if header.first_line > first_line {
                    return Ok(last.map_or(0, |last| last.number.saturating_sub(1)));
                }
                after = header.number;
                last = Some(header);
            }
            if !more {
                return Ok(last.map_or(0, |last| last.number.saturating_sub(1)));
            }
        }
    }

    /// Deletes records up to a number, and their parts.
    async fn delete_upto(&self, log: Log, to: u64, fence: &Fence) -> Result<(), StoreError> {
        loop {
            let page = self.kv.keys(log.prefix(), None, DELETES).await?;
            let old = page.entries.iter().map(|entry| entry.key.clone());
            let old: Vec<String> = old
                .take_while(|key| format::number_of(key).is_some_and(|number| number <= to))
                .collect();
            if old.is_empty() {
                return Ok(());
            }
            self.delete(old, fence).await?;
        }
    }

    /// Drops snapshots beyond the bound: the newest stays, and of the others those that are far from each other.
    async fn thin_out(&self, fence: &Fence) -> Result<(), StoreError> {
        let compacted = snapshot::compacted(&self.kv).await?;
        let mut kept: Vec<u64> = Vec::new();
        let mut dropped = Vec::new();
        for manifest in snapshot::list(&self.kv).await? {
            kept.push(manifest.revision);
        }
        while kept.len() > 1 && kept.first().is_some_and(|first| *first < compacted) {
            dropped.push(kept.remove(0));
        }
        while kept.len() > self.bounds.snapshots.max(1) {
            let gap = |i: &usize| {
                let at = |i: usize| kept.get(i).copied().unwrap_or(0);
                at(i + 1).saturating_sub(i.checked_sub(1).map_or(compacted, at))
            };
            let closest = (0..kept.len() - 1).min_by_key(gap).unwrap_or(0);
            dropped.push(kept.remove(closest));
        }
        let keys: Vec<String> = dropped.into_iter().map(snapshot::manifest_key).collect();
        for keys in keys.chunks(DELETES) {
            self.delete(keys.to_vec(), fence).await?;
        }
        Ok(())
    }

    /// Takes away what was cut short, and what has ended.
    async fn tidy(&self, fence: &Fence, compact_to: &mut Option<u64>) -> Result<(), StoreError> {
        self.orphans(fence).await?;
        let now = self.clock.now_ms();
        let mut over = Vec::new();
        for entry in self.kv.all(certificates::CERTIFICATES).await? {
            if certificates::is_over(&entry, now) {
                over.push(entry);
            }
        }
        let revoked = self.kv.all(revocations::REVOKED).await?;
        over.extend(
            revoked
                .into_iter()
                .filter(|entry| revocations::is_over(entry, now)),
        );
        for entry in over {
            let txn = Txn::default()
                .when(&*entry.key, entry.modified)
                .delete(&*entry.key);
            self.kv.txn(fence.guard(txn)).await?;
        }
        // What was no more a while ago is forgotten by the kv, too.
        let revision = self.kv.range(format::HEAD, None, 1).await?.revision;
        if let Some(before) = compact_to.replace(revision).filter(|before| *before > 0) {
            self.kv.compact(before).await?;
        }
        Ok(())
    }

    async fn orphans(&self, fence: &Fence) -> Result<(), StoreError> {
        // Parts of records. Listed before head is read: what is found then for a number that is passed can't be used any more.
        let mut parts = self.names("log/").await?;
        let head = format::Head::read(self.kv.get(format::HEAD).await?.as_ref())?;
        for log in [Log::Policy, Log::Levels] {
            let last = match log {
                Log::Policy => head.revision,
                Log::Levels => head.levels,
            };
            let of_log = log.parts(0);
            let start = of_log.split('-').next().unwrap_or_default().to_owned();
            for prefix in parts.clone() {
                let Some(rest) = prefix.strip_prefix(&format!("{start}-")) else {
                    continue;
                };
                parts.remove(&prefix);
                let mut rest = rest.trim_end_matches('/').split('-');
                let number = rest.next().and_then(|hex| u64::from_str_radix(hex, 16).ok());
                let (Some(number), Some(attempt)) = (number.filter(|n| *n <= last), rest.next()) else {
                    continue;
                };
                let entry = self.kv.get(&log.key(number)).await?;
                let header = entry.map(|entry| format::decode::<wire::Header>(&entry.key, &entry.value));
                let used = header
                    .transpose()?
                    .is_some_and(|header| header.attempt == attempt);
                if !used {
                    self.drop_prefix(&prefix, fence).await?;
                }
            }
        }
        // Parts of snapshots: whoever leads writes them, and that is this one.
        let manifests = snapshot::list(&self.kv).await?;
        let used: BTreeSet<String> = manifests
            .iter()
            .map(|manifest| snapshot::parts_key(manifest.revision, &manifest.attempt))
            .collect();
        for prefix in self.names(snapshot::PARTS).await? {
            if !used.contains(&prefix) {
                self.drop_prefix(&prefix, fence).await?;
            }
        }
        // Pieces of modules, listed before what uses them.
        let pieces = self.names(modules::CHUNKS).await?;
        if pieces.is_empty() {
            return Ok(());
        }
        let uploads = self.kv.all(modules::UPLOADS).await?;
        let uploads = uploads
            .iter()
            .filter_map(|entry| entry.key.strip_prefix(modules::UPLOADS));
        let mut used: BTreeSet<String> = uploads.map(str::to_owned).collect();
        for entry in self.kv.all(modules::MODULES).await? {
            used.extend(modules::attempt_in(&entry.value));
        }
        for prefix in pieces {
            if modules::attempt_of(&prefix).is_some_and(|attempt| !used.contains(attempt)) {
                self.drop_prefix(&prefix, fence).await?;
            }
        }
        Ok(())
    }

    /// The directories, so to speak, right under a prefix, each with its slash.
    async fn names(&self, prefix: &str) -> Result<BTreeSet<String>, StoreError> {
        let mut names = BTreeSet::new();
        let mut after: Option<String> = None;
        loop {
            let page = self.kv.keys(prefix, after.as_deref(), PAGE).await?;
            for entry in &page.entries {
                if let Some((name, _)) = entry.key.rsplit_once('/') {
                    names.insert(format!("{name}/"));
                }
            }
            after = page.entries.last().map(|entry| entry.key.clone());
            if !page.more {
                return Ok(names);
            }
        }
    }

    async fn drop_prefix(&self, prefix: &str, fence: &Fence) -> Result<(), StoreError> {
        tracing::debug!(prefix, "what was cut short is taken away");
        let txn = fence.guard(Txn::default().delete_prefix(prefix));
        match self.kv.txn(txn).await? {
            Some(_) => Ok(()),
            None => Err(fence.lost()),
        }
    }

    async fn delete(&self, keys: Vec<String>, fence: &Fence) -> Result<(), StoreError> {
        let txn = keys.into_iter().fold(Txn::default(), Txn::delete);
        match self.kv.txn(fence.guard(txn)).await? {
            Some(_) => Ok(()),
            None => Err(fence.lost()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::digits;
    use super::*;

    #[test]
    fn the_directory_of_parts_has_the_number_and_the_attempt() {
        let parts = Log::Policy.parts(7);
        assert_eq!(parts, format!("log/rev-{}-", digits(7)));
    }
}

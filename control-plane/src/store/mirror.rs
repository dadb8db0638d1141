//! Everything at head, in memory. Pure: what happened comes in as records.

use super::format::{self, Head, wire};
use super::{Bounds, Changes, Hold, Judged, LevelChange, LevelWrites, Place, Record, Stored};
use leeward_policy::{Key, Kind, Name};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

/// How long a line of the audit is kept, in milliseconds: 90 days.
const LINE_KEPT_MS: i64 = 90 * 24 * 3600 * 1000;

/// The state at `head`.
#[derive(Debug)]
pub(super) struct Mirror {
    bounds: Bounds,
    pub(super) head: Head,
    resources: BTreeMap<Key, Stored>,
    by_revision: BTreeSet<(u64, Key)>,
    tombstones: BTreeMap<Key, u64>,
    by_deletion: BTreeSet<(u64, Key)>,
    /// Deletions up to this revision are forgotten.
    forgotten: u64,
    /// The last records, without a gap up to head.
    recent: VecDeque<Arc<Record>>,
    recent_bytes: usize,
    /// Records since the last snapshot that is known of, and their bytes.
    pub(super) since_snapshot: (u64, usize),
    pub(super) judged: BTreeMap<Place, Judged>,
    pub(super) holds: BTreeMap<String, Hold>,
    /// The audit, by number.
    lines: VecDeque<(u64, LevelChange)>,
    /// Resources of kinds that this build doesn't know. Nobody sees them here, and snapshots have them.
    foreign: BTreeMap<(String, String), wire::Value>,
}

impl Mirror {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            head: Head::default(),
            resources: BTreeMap::new(),
            by_revision: BTreeSet::new(),
            tombstones: BTreeMap::new(),
            by_deletion: BTreeSet::new(),
            forgotten: 0,
            recent: VecDeque::new(),
            recent_bytes: 0,
            since_snapshot: (0, 0),
            judged: BTreeMap::new(),
            holds: BTreeMap::new(),
            lines: VecDeque::new(),
            foreign: BTreeMap::new(),
        }
    }

    pub(super) fn get(&self, key: &Key) -> Option<Stored> {
        self.resources.get(key).cloned()
    }

    pub(super) fn peek(&self, key: &Key) -> Option<&Stored> {
        self.resources.get(key)
    }

    pub(super) fn len(&self) -> usize {
        self.resources.len() + self.foreign.len()
    }

    pub(super) fn list(&self, kind: Option<Kind>, after: Option<&Key>, limit: usize) -> (Vec<Stored>, u64) {
        // Kinds are one after the other, and no name comes before this one.
        let first = kind.zip(Name::parse("0").ok());
        let first = first.map(|(kind, name)| Key { kind, name });
        let from = match (after, &first) {
            (Some(after), Some(first)) if after < first => Bound::Included(first),
            (Some(after), _) => Bound::Excluded(after),
            (None, Some(first)) => Bound::Included(first),
            (None, None) => Bound::Unbounded,
        };
        let found = self.resources.range((from, Bound::Unbounded));
        let found = found.map(|(_, stored)| stored);
        let found = found.take_while(|stored| kind.is_none_or(|kind| stored.key.kind == kind));
        (found.take(limit).cloned().collect(), self.head.revision)
    }

    pub(super) fn changes_since(&self, after: u64) -> Option<Changes> {
        (after >= self.forgotten).then(|| self.changes(after))
    }

    pub(super) fn everything(&self) -> Changes {
        self.changes(0)
    }

    fn changes(&self, after: u64) -> Changes {
        // The first of a revision that is possible at all comes before every key of the next one.
        let young = |index: &BTreeSet<(u64, Key)>| {
            let mut young: Vec<(u64, Key)> = index
                .iter()
                .rev()
                .take_while(|(revision, _)| *revision > after)
                .cloned()
                .collect();
            young.reverse();
            young
        };
        Changes {
            to: self.head.revision,
            upserts: young(&self.by_revision)
                .into_iter()
                .filter_map(|(_, key)| self.get(&key))
                .collect(),
            deletes: young(&self.by_deletion),
        }
    }

    /// The record of a revision, if it is here.
    pub(super) fn recent(&self, revision: u64) -> Option<&Arc<Record>> {
        let first = self.recent.front()?.revision;
        let place = usize::try_from(revision.checked_sub(first)?).ok()?;
        self.recent.get(place)
    }

    pub(super) fn changes_between(&self, from: u64, to: u64) -> Option<Changes> {
        let (low, high) = (from.min(to), from.max(to));
        if high > self.head.revision {
            return None;
        }
        let records: Vec<_> = (low + 1..=high).map(|n| self.recent(n)).collect::<Option<_>>()?;
        let mut net: BTreeMap<&Key, (u64, Option<&Stored>)> = BTreeMap::new();
        let changes = |record: &'_ Arc<Record>| record.revision;
        if from <= to {
            for record in records {
                for change in &record.changes {
                    net.insert(&change.key, (changes(record), change.after.as_ref()));
                }
            }
        } else {
            for record in records.into_iter().rev() {
                for change in &record.changes {
                    net.insert(&change.key, (changes(record), change.before.as_ref()));
                }
            }
        }
        let mut upserts: Vec<Stored> = net.values().filter_map(|(_, stored)| stored.cloned()).collect();
        upserts.sort_by_key(|stored| stored.revision);
        let gone = net.iter().filter(|(_, (_, stored))| stored.is_none());
        let mut deletes: Vec<(u64, Key)> = gone.map(|(key, (at, _))| (*at, (*key).clone())).collect();
        deletes.sort();
        Some(Changes { to, upserts, deletes })
    }

    /// Follows the next record of policy.
    pub(super) fn apply(&mut self, record: Arc<Record>, foreign: Vec<wire::Change>) {
        let revision = record.revision;
        for change in &record.changes {
            match &change.after {
                Some(stored) => self.put(stored.clone()),
                None => self.delete(&change.key, revision),
            }
        }
        for change in foreign {
            let name = (change.kind, change.name);
            match change.after {
                Some(value) => drop(self.foreign.insert(name, value)),
                None => drop(self.foreign.remove(&name)),
            }
        }
        self.head.revision = revision;
        self.head.time_ms = self.head.time_ms.max(record.time_ms);
        self.since_snapshot.0 += 1;
        self.since_snapshot.1 += record.size();
        self.remember(record);
    }

    /// Keeps a record, the one after the last that is kept. What it did is done.
    pub(super) fn remember(&mut self, record: Arc<Record>) {
        let bytes = record.size();
        self.recent_bytes += bytes;
        self.recent.push_back(record);
        let (most, most_bytes) = self.bounds.recent;
        while self.recent.len() > most || self.recent_bytes > most_bytes {
            match self.recent.pop_front() {
                Some(oldest) => self.recent_bytes -= oldest.size(),
                None => break,
            }
        }
    }

    fn put(&mut self, stored: Stored) {
        let key = stored.key.clone();
        // It is back; a tombstone beside it would delete it again for those who come late.
        if let Some(at) = self.tombstones.remove(&key) {
            self.by_deletion.remove(&(at, key.clone()));
        }
        self.by_revision.insert((stored.revision, key.clone()));
        if let Some(old) = self.resources.insert(key.clone(), stored.clone())
            && old.revision != stored.revision
        {
            self.by_revision.remove(&(old.revision, key));
        }
    }

    fn delete(&mut self, key: &Key, revision: u64) {
        if let Some(old) = self.resources.remove(key) {
            self.by_revision.remove(&(old.revision, key.clone()));
        }
        if let Some(at) = self.tombstones.insert(key.clone(), revision) {
            self.by_deletion.remove(&(at, key.clone()));
        }
        self.by_deletion.insert((revision, key.clone()));
        while self.tombstones.len() > self.bounds.tombstones {
            let Some((at, oldest)) = self.by_deletion.pop_first() else {
                break;
            };
            self.tombstones.remove(&oldest);
            self.forgotten = self.forgotten.max(at);
        }
    }

    /// Follows the next record of levels; its lines begin at this number.
    pub(super) fn apply_levels(&mut self, number: u64, first_line: u64, time_ms: i64, writes: LevelWrites) {
        self.head.levels = number;
        self.since_snapshot.0 += 1;
        self.head.time_ms = self.head.time_ms.max(time_ms);
        for (place, judged) in writes.judged {
            match judged {
                Some(judged) => drop(self.judged.insert(place, judged)),
                None => drop(self.judged.remove(&place)),
            }
        }
        for (name, hold) in writes.holds {
            match hold {
                Some(hold) => drop(self.holds.insert(name, hold)),
                None => drop(self.holds.remove(&name)),
            }
        }
        self.add_lines(first_line, time_ms, writes.changes);
    }

    pub(super) fn add_lines(&mut self, first: u64, time_ms: i64, lines: Vec<LevelChange>) {
        if lines.is_empty() {
            return;
        }
        for (number, line) in (first..).zip(lines) {
            self.head.lines = self.head.lines.max(number);
            self.lines.push_back((number, line));
        }
        let excess = self.lines.len().saturating_sub(self.bounds.lines);
        self.lines.drain(..excess);
        let oldest = time_ms.saturating_sub(LINE_KEPT_MS);
        self.lines.retain(|(_, line)| line.time_ms >= oldest);
    }

    pub(super) fn lines(&self) -> &VecDeque<(u64, LevelChange)> {
        &self.lines
    }

    /// Everything, for a snapshot. Lines of the audit have their own log.
    pub(super) fn snapshot(&self) -> wire::Snapshot {
        let known = self.resources.values().map(|stored| wire::Resource {
            kind: stored.key.kind.as_str().to_owned(),
            name: stored.key.name.to_string(),
            value: Some(format::value(stored)),
        });
        let foreign = self.foreign.iter().map(|((kind, name), value)| wire::Resource {
            kind: kind.clone(),
            name: name.clone(),
            value: Some(value.clone()),
        });
        wire::Snapshot {
            revision: self.head.revision,
            levels: self.head.levels,
            lines: self.head.lines,
            time_ms: self.head.time_ms,
            resources: known.chain(foreign).collect(),
            tombstones: self
                .tombstones
                .iter()
                .map(|(key, revision)| wire::Tombstone {
                    kind: key.kind.as_str().to_owned(),
                    name: key.name.to_string(),
                    revision: *revision,
                })
                .collect(),
            forgotten: self.forgotten,
            judged: self
                .judged
                .iter()
                .map(|(place, judged)| format::judged(place, Some(judged)))
                .collect(),
            holds: self
                .holds
                .iter()
                .map(|(name, hold)| format::hold(name, Some(hold)))
                .collect(),
        }
    }

    /// What a snapshot says.
    pub(super) fn of(snapshot: wire::Snapshot, bounds: Bounds) -> Self {
        let mut mirror = Self::new(bounds);
        for resource in snapshot.resources {
            let Some(value) = resource.value else { continue };
            match format::key(&resource.kind, &resource.name) {
                Some(key) => mirror.put(format::stored(key, value)),
                None => drop(mirror.foreign.insert((resource.kind, resource.name), value)),
            }
        }
        mirror.forgotten = snapshot.forgotten;
        for tombstone in snapshot.tombstones {
            if let Some(key) = format::key(&tombstone.kind, &tombstone.name) {
                mirror.delete(&key, tombstone.revision);
            }
        }
        let judged = snapshot.judged.into_iter().map(format::judged_of);
        mirror.judged = judged
            .filter_map(|(place, judged)| Some((place, judged?)))
            .collect();
        let holds = snapshot.holds.into_iter().map(format::hold_of);
        mirror.holds = holds.filter_map(|(name, hold)| Some((name, hold?))).collect();
        mirror.head.revision = snapshot.revision;
        mirror.head.levels = snapshot.levels;
        mirror.head.lines = snapshot.lines;
        mirror.head.time_ms = snapshot.time_ms;
        mirror
    }

    /// Its resources, by key.
    pub(super) fn into_resources(self) -> BTreeMap<Key, Stored> {
        self.resources
    }

    /// A copy of its resources, and the revision they are of.
    pub(super) fn resources(&self) -> (BTreeMap<Key, Stored>, u64) {
        (self.resources.clone(), self.head.revision)
    }
}

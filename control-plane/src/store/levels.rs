//! What holds degradation levels, and what changed them.
//!
//! The control plane's own judgements and the overrides in force are kept so that a restart neither ends a level
//! nor loses the end of one. The audit is a log of bounded length and age.

use super::Store;
use std::collections::BTreeMap;

/// Where a DegradationPolicy is judged.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Place {
    /// The policy.
    pub policy: String,
    /// The zone; empty for the mesh as a whole.
    pub zone: String,
}

/// A level that triggers ask for, other than the normal one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Judged {
    /// Its name.
    pub level: String,
    /// Since when, in milliseconds since 1970.
    pub since_ms: i64,
    /// The trigger.
    pub by: String,
    /// What it saw.
    pub why: String,
}

/// An override whose end has not been written down yet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Hold {
    /// Since when it holds its level, in milliseconds since 1970.
    pub since_ms: i64,
    /// When it ends, likewise.
    pub until_ms: i64,
    /// Who applied it.
    pub by: String,
}

/// A line of the audit.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LevelChange {
    /// When, in milliseconds since 1970.
    pub time_ms: i64,
    /// The policy.
    pub policy: String,
    /// The zone; empty for all.
    pub zone: String,
    /// The level before.
    pub from: String,
    /// The level from then on.
    pub to: String,
    /// Who or what.
    pub by: String,
    /// Why, for people.
    pub why: String,
}

/// What a transaction changes of all this.
#[derive(Clone, Debug, Default)]
pub struct LevelWrites {
    /// Lines that are added to the audit.
    pub changes: Vec<LevelChange>,
    /// Judgements that are new; `None` for the normal level.
    pub judged: Vec<(Place, Option<Judged>)>,
    /// Overrides by name; `None` for one that holds nothing any more.
    pub holds: Vec<(String, Option<Hold>)>,
}

impl LevelWrites {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.judged.is_empty() && self.holds.is_empty()
    }
}

impl Store {
    /// The levels that triggers asked for when last judged.
    pub fn judged_levels(&self) -> BTreeMap<Place, Judged> {
        self.inner.mirror().judged.clone()
    }

    /// The overrides whose end has not been written down, by name.
    pub fn level_holds(&self) -> BTreeMap<String, Hold> {
        self.inner.mirror().holds.clone()
    }

    /// Both, as they are together, and the number of the last write of them.
    pub fn levels(&self) -> (BTreeMap<Place, Judged>, BTreeMap<String, Hold>, u64) {
        let mirror = self.inner.mirror();
        (mirror.judged.clone(), mirror.holds.clone(), mirror.head.levels)
    }

    /// The audit's lines with their numbers, newest first, of one policy or (empty) of all, from before a number
    /// (0: from the newest on).
    pub fn level_changes(&self, policy: &str, before: u64, limit: u32) -> Vec<(u64, LevelChange)> {
        let mirror = self.inner.mirror();
        let lines = mirror.lines().iter().rev();
        lines
            .filter(|(number, _)| before == 0 || *number < before)
            .filter(|(_, line)| policy.is_empty() || line.policy == policy)
            .take(usize::try_from(limit).unwrap_or(usize::MAX))
            .cloned()
            .collect()
    }

    /// When the last change of each place was, in milliseconds since 1970; the place without a zone is for changes
    /// in all of them.
    pub fn last_level_changes(&self) -> BTreeMap<Place, i64> {
        let mirror = self.inner.mirror();
        let mut last = BTreeMap::new();
        for (_, line) in mirror.lines() {
            let place = Place {
                policy: line.policy.clone(),
                zone: line.zone.clone(),
            };
            let at = last.entry(place).or_insert(line.time_ms);
            *at = line.time_ms.max(*at);
        }
        last
    }
}

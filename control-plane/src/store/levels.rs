//! What holds degradation levels, and what changed them, on disk.
//!
//! The control plane's own judgements and the overrides in force are kept so that a restart neither ends a level
//! nor loses the end of one. The audit is a log of bounded length and age.

use super::{Store, StoreError, failed, signed, unsigned};
use rusqlite::{Transaction, params};
use std::collections::BTreeMap;

/// Changes that are kept.
const MAX_CHANGES: u64 = 100_000;
/// How long a change is kept, in milliseconds: 90 days.
const KEPT_MS: i64 = 90 * 24 * 3600 * 1000;

pub(super) const TABLES: &str = "
    CREATE TABLE level_changes (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time_ms INTEGER NOT NULL, policy TEXT NOT NULL, zone TEXT NOT NULL,
        from_level TEXT NOT NULL, to_level TEXT NOT NULL, who TEXT NOT NULL, why TEXT NOT NULL
    );
    CREATE INDEX level_changes_by_time ON level_changes (time_ms);
    CREATE INDEX level_changes_by_place ON level_changes (policy, zone, time_ms);
    CREATE TABLE judged_levels (
        policy TEXT NOT NULL, zone TEXT NOT NULL, level TEXT NOT NULL, since_ms INTEGER NOT NULL,
        who TEXT NOT NULL, why TEXT NOT NULL, PRIMARY KEY (policy, zone)
    ) WITHOUT ROWID;
    CREATE TABLE level_holds (
        name TEXT PRIMARY KEY, since_ms INTEGER NOT NULL, until_ms INTEGER NOT NULL, who TEXT NOT NULL
    ) WITHOUT ROWID;";

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

    pub(super) fn write(&self, tx: &Transaction<'_>, now_ms: i64) -> rusqlite::Result<()> {
        for (place, judged) in &self.judged {
            let (policy, zone) = (&place.policy, &place.zone);
            match judged {
                Some(j) => tx.execute(
                    "INSERT OR REPLACE INTO judged_levels VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                    params![policy, zone, j.level, j.since_ms, j.by, j.why],
                )?,
                None => tx.execute(
                    "DELETE FROM judged_levels WHERE policy=?1 AND zone=?2",
                    params![policy, zone],
                )?,
            };
        }
        for (name, hold) in &self.holds {
            match hold {
                Some(hold) => tx.execute(
                    "INSERT OR REPLACE INTO level_holds VALUES (?1, ?2, ?3, ?4)",
                    params![name, hold.since_ms, hold.until_ms, hold.by],
                )?,
                None => tx.execute("DELETE FROM level_holds WHERE name=?1", [name])?,
            };
        }
        for change in &self.changes {
            tx.execute(
                "INSERT INTO level_changes (time_ms, policy, zone, from_level, to_level, who, why)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                params![
                    change.time_ms,
                    change.policy,
                    change.zone,
                    change.from,
                    change.to,
                    change.by,
                    change.why
                ],
            )?;
        }
        if !self.changes.is_empty() {
            trim(tx, now_ms)?;
        }
        Ok(())
    }
}

/// Forgets what is too old, and the oldest beyond the bound.
fn trim(tx: &Transaction<'_>, now_ms: i64) -> rusqlite::Result<()> {
    let last = unsigned(tx.last_insert_rowid());
    tx.execute(
        "DELETE FROM level_changes WHERE id <= ?1",
        [signed(last.saturating_sub(MAX_CHANGES))],
    )?;
    tx.execute(
        "DELETE FROM level_changes WHERE time_ms < ?1",
        [now_ms.saturating_sub(KEPT_MS)],
    )?;
    Ok(())
}

impl Store {
    /// The levels that triggers asked for when last judged.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn judged_levels(&self) -> Result<BTreeMap<Place, Judged>, StoreError> {
        self.read("read levels", |db| {
            let mut query =
                db.prepare("SELECT policy, zone, level, since_ms, who, why FROM judged_levels")?;
            let rows = query.query_map([], |row| {
                let place = Place {
                    policy: row.get(0)?,
                    zone: row.get(1)?,
                };
                let judged = Judged {
                    level: row.get(2)?,
                    since_ms: row.get(3)?,
                    by: row.get(4)?,
                    why: row.get(5)?,
                };
                Ok((place, judged))
            })?;
            rows.collect()
        })
    }

    /// The overrides whose end has not been written down, by name.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn level_holds(&self) -> Result<BTreeMap<String, Hold>, StoreError> {
        self.read("read levels", |db| {
            let mut query = db.prepare("SELECT name, since_ms, until_ms, who FROM level_holds")?;
            let rows = query.query_map([], |row| {
                let hold = Hold {
                    since_ms: row.get(1)?,
                    until_ms: row.get(2)?,
                    by: row.get(3)?,
                };
                Ok((row.get(0)?, hold))
            })?;
            rows.collect()
        })
    }

    /// The audit's lines with their numbers, newest first, of one policy or (empty) of all, from before a number
    /// (0: from the newest on).
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn level_changes(
        &self,
        policy: &str,
        before: u64,
        limit: u32,
    ) -> Result<Vec<(u64, LevelChange)>, StoreError> {
        let before = if before == 0 { i64::MAX } else { signed(before) };
        self.read("read changes of levels", |db| {
            let mut query = db.prepare(
                "SELECT id, time_ms, policy, zone, from_level, to_level, who, why FROM level_changes
                 WHERE (?1 = '' OR policy = ?1) AND id < ?2 ORDER BY id DESC LIMIT ?3",
            )?;
            let rows = query.query_map(params![policy, before, limit], |row| {
                let change = LevelChange {
                    time_ms: row.get(1)?,
                    policy: row.get(2)?,
                    zone: row.get(3)?,
                    from: row.get(4)?,
                    to: row.get(5)?,
                    by: row.get(6)?,
                    why: row.get(7)?,
                };
                Ok((unsigned(row.get(0)?), change))
            })?;
            rows.collect()
        })
    }

    /// When the last change of each place was, in milliseconds since 1970; the place without a zone is for changes
    /// in all of them.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub fn last_level_changes(&self) -> Result<BTreeMap<Place, i64>, StoreError> {
        self.read("read changes of levels", |db| {
            let mut query =
                db.prepare("SELECT policy, zone, max(time_ms) FROM level_changes GROUP BY policy, zone")?;
            let rows = query.query_map([], |row| {
                let place = Place {
                    policy: row.get(0)?,
                    zone: row.get(1)?,
                };
                Ok((place, row.get(2)?))
            })?;
            rows.collect()
        })
    }

    /// Writes levels and their audit, all or none, without any resource.
    ///
    /// # Errors
    ///
    /// If the database fails; nothing is written then.
    pub fn write_levels(&self, levels: &LevelWrites) -> Result<(), StoreError> {
        let mut writer = self.writer();
        let tx = writer.transaction().map_err(failed("begin"))?;
        levels
            .write(&tx, super::now_ms())
            .map_err(failed("write levels"))?;
        tx.commit().map_err(failed("commit"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Scratch;
    use super::*;

    const DAY_MS: i64 = 24 * 3600 * 1000;

    fn change(policy: &str, time_ms: i64) -> LevelChange {
        LevelChange {
            time_ms,
            policy: policy.into(),
            zone: "a".into(),
            from: "normal".into(),
            to: "reduced".into(),
            by: "trigger 0".into(),
            why: "error rate 62 %".into(),
        }
    }

    fn add(store: &Store, changes: Vec<LevelChange>) {
        let levels = LevelWrites {
            changes,
            ..LevelWrites::default()
        };
        store.write_levels(&levels).unwrap();
    }

    fn ids(found: &[(u64, LevelChange)]) -> Vec<u64> {
        found.iter().map(|(id, _)| *id).collect()
    }

    #[test]
    fn changes_come_newest_first_in_pages() {
        let dir = Scratch::new();
        let store = Store::open(&dir.0).unwrap();
        let now = super::super::now_ms();
        for i in 0..5 {
            add(&store, vec![change("shop", now + i), change("feed", now + i)]);
        }
        let first = store.level_changes("shop", 0, 2).unwrap();
        assert_eq!(ids(&first), [9, 7]);
        assert_eq!(first[0].1, change("shop", now + 4));
        assert_eq!(ids(&store.level_changes("shop", 7, 2).unwrap()), [5, 3]);
        assert_eq!(ids(&store.level_changes("shop", 3, 2).unwrap()), [1]);
        assert_eq!(ids(&store.level_changes("", 0, 3).unwrap()), [10, 9, 8]);
        assert!(store.level_changes("shop", 1, 2).unwrap().is_empty());
        let last = store.last_level_changes().unwrap();
        let place = |policy: &str| Place {
            policy: policy.into(),
            zone: "a".into(),
        };
        assert_eq!(
            (last.get(&place("shop")), last.len()),
            (Some(&(now + 4)), 2),
            "{last:?}"
        );
    }

    #[test]
    fn the_audit_is_bounded_in_length_and_age() {
        let dir = Scratch::new();
        let store = Store::open(&dir.0).unwrap();
        let now = super::super::now_ms();
        add(
            &store,
            vec![
                change("old", now - 91 * DAY_MS),
                change("young", now - 89 * DAY_MS),
            ],
        );
        assert_eq!(ids(&store.level_changes("", 0, 10).unwrap()), [2]);
        let many = usize::try_from(MAX_CHANGES).unwrap();
        add(&store, vec![change("new", now); many - 1]);
        assert_eq!(ids(&store.level_changes("young", 0, 10).unwrap()), [2]);
        add(&store, vec![change("new", now)]);
        assert!(store.level_changes("young", 0, 10).unwrap().is_empty());
        let lowest = store.level_changes("", 4, 10).unwrap();
        assert_eq!(ids(&lowest), [3]);
    }

    #[test]
    fn levels_are_there_after_a_restart_and_those_that_ended_are_not() {
        let dir = Scratch::new();
        let place = Place {
            policy: "shop".into(),
            zone: String::new(),
        };
        let judged = Judged {
            level: "reduced".into(),
            since_ms: 7,
            by: "trigger 1".into(),
            why: "circuit of cart is open".into(),
        };
        let hold = Hold {
            since_ms: 1,
            until_ms: 2,
            by: "spiffe://leeward.test/user/ada".into(),
        };
        {
            let store = Store::open(&dir.0).unwrap();
            let levels = LevelWrites {
                judged: vec![(place.clone(), Some(judged.clone()))],
                holds: vec![("shop".into(), Some(hold.clone()))],
                ..LevelWrites::default()
            };
            store.write_levels(&levels).unwrap();
        }
        let store = Store::open(&dir.0).unwrap();
        assert_eq!(store.judged_levels().unwrap(), [(place.clone(), judged)].into());
        assert_eq!(store.level_holds().unwrap(), [("shop".to_owned(), hold)].into());
        let levels = LevelWrites {
            judged: vec![(place, None)],
            holds: vec![("shop".into(), None)],
            ..LevelWrites::default()
        };
        store.write_levels(&levels).unwrap();
        assert!(store.judged_levels().unwrap().is_empty());
        assert!(store.level_holds().unwrap().is_empty());
    }

    #[test]
    fn a_store_of_the_first_schema_is_brought_up_to_date() {
        let dir = Scratch::new();
        drop(Store::open(&dir.0).unwrap());
        let db = rusqlite::Connection::open(dir.0.join("leeward.db")).unwrap();
        db.execute_batch(
            "DROP TABLE level_changes; DROP TABLE judged_levels; DROP TABLE level_holds;
             DROP TABLE modules; DROP TABLE module_chunks; DROP TABLE module_signatures;
             DROP TABLE join_tokens; DROP TABLE certificates; PRAGMA user_version = 1;",
        )
        .unwrap();
        drop(db);
        let store = Store::open(&dir.0).unwrap();
        add(&store, vec![change("shop", super::super::now_ms())]);
        assert_eq!(ids(&store.level_changes("", 0, 10).unwrap()), [1]);
    }
}

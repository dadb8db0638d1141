//! What is asked of the tables.

use crate::codec;
use crate::entry::{
    EntryDetail, EntryId, EntryState, EntrySummary, Listed, Listing, MAX_LISTED, StoredRequest,
};
use crate::schedule::Row;
use crate::store::{NewEntry, Totals};
use crate::verdict::Settlement;
use bytes::Bytes;
use leeward_policy::model::Queue;
use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, params};
use std::sync::Arc;

/// The version of the tables below.
pub(super) const SCHEMA: i64 = 1;

/// Totals are kept by triggers, in the transaction that changes them, so they are exact however a process ends and
/// however many processes write.
pub(super) const CREATE: &str = "
    CREATE TABLE waiting (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id BLOB NOT NULL UNIQUE, service TEXT NOT NULL, route TEXT NOT NULL,
        key TEXT, method TEXT NOT NULL, target TEXT NOT NULL, size INTEGER NOT NULL, accepted_ms INTEGER NOT NULL,
        since_ms INTEGER NOT NULL, due_ms INTEGER NOT NULL, attempts INTEGER NOT NULL, last_error TEXT,
        request BLOB NOT NULL
    );
    CREATE TABLE dead (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id BLOB NOT NULL UNIQUE, service TEXT NOT NULL, route TEXT NOT NULL,
        key TEXT, method TEXT NOT NULL, target TEXT NOT NULL, size INTEGER NOT NULL, accepted_ms INTEGER NOT NULL,
        at_ms INTEGER NOT NULL, attempts INTEGER NOT NULL, reason TEXT NOT NULL, request BLOB NOT NULL
    );
    CREATE TABLE results (
        seq INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, status INTEGER NOT NULL, attempts INTEGER NOT NULL,
        at_ms INTEGER NOT NULL
    );
    CREATE TABLE totals (waiting INTEGER NOT NULL, bytes INTEGER NOT NULL, dead INTEGER NOT NULL);
    INSERT INTO totals VALUES (0, 0, 0);
    CREATE TRIGGER waiting_in AFTER INSERT ON waiting BEGIN
        UPDATE totals SET waiting = waiting + 1, bytes = bytes + NEW.size;
    END;
    CREATE TRIGGER waiting_out AFTER DELETE ON waiting BEGIN
        UPDATE totals SET waiting = waiting - 1, bytes = bytes - OLD.size;
    END;
    CREATE TRIGGER dead_in AFTER INSERT ON dead BEGIN UPDATE totals SET dead = dead + 1; END;
    CREATE TRIGGER dead_out AFTER DELETE ON dead BEGIN UPDATE totals SET dead = dead - 1; END;
    PRAGMA user_version = 1;
";

/// Results that are kept, whatever policy's time for them; the oldest go first.
const MAX_RESULTS: u64 = 1_000_000;
/// Rows that one statement of tidying up deletes, so that nobody waits for long.
const TIDY: u64 = 10_000;

/// A bound that refuses an entry.
pub(super) type Full = &'static str;

pub(super) fn accept(
    db: &Connection,
    new: &NewEntry,
    queue: &Queue,
    now_ms: u64,
) -> rusqlite::Result<Result<(), Full>> {
    if let Err(full) = room(db, new.size(), queue)? {
        return Ok(Err(full));
    }
    db.prepare_cached(
        "INSERT INTO waiting
         (id, service, route, key, method, target, size, accepted_ms, since_ms, due_ms, attempts, request)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8, 0, 0, ?9)",
    )?
    .execute(params![
        new.id.as_bytes(),
        new.service,
        new.route,
        new.key,
        new.method,
        new.target,
        signed(new.size()),
        signed(now_ms),
        &new.bytes[..],
    ])?;
    Ok(Ok(()))
}

fn room(db: &Connection, size: u64, queue: &Queue) -> rusqlite::Result<Result<(), Full>> {
    let (waiting, bytes): (i64, i64) = db
        .prepare_cached("SELECT waiting, bytes FROM totals")?
        .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(if unsigned(waiting) >= queue.max_entries {
        Err("maxEntries")
    } else if unsigned(bytes).saturating_add(size) > queue.max_bytes {
        Err("maxBytes")
    } else {
        Ok(())
    })
}

/// Entries after a place, in order.
pub(super) fn fetch(db: &Connection, after: u64, limit: usize) -> rusqlite::Result<Vec<Row>> {
    db.prepare_cached(
        "SELECT seq, id, service, key, attempts, since_ms, due_ms FROM waiting WHERE seq > ?1 ORDER BY seq LIMIT ?2",
    )?
    .query_map(params![signed(after), count(limit)], |row| {
        Ok(Row {
            seq: unsigned(row.get(0)?),
            id: id(row, 1)?,
            service: text(row, 2)?,
            key: optional_text(row, 3)?,
            attempts: small(row.get(4)?),
            since_ms: unsigned(row.get(5)?),
            due_ms: unsigned(row.get(6)?),
        })
    })?
    .collect()
}

/// The bytes of an entry's request, if it still waits.
pub(super) fn load(db: &Connection, seq: u64, id: EntryId) -> rusqlite::Result<Option<Bytes>> {
    db.prepare_cached("SELECT request FROM waiting WHERE seq=?1 AND id=?2")?
        .query_row(params![signed(seq), id.as_bytes()], |row| {
            row.get::<_, Vec<u8>>(0)
        })
        .optional()
        .map(|found| found.map(Bytes::from))
}

/// Writes down what became of an entry. False if it no longer waits.
pub(super) fn settle(
    db: &Connection,
    (seq, id): (u64, EntryId),
    settlement: &Settlement,
    queue: &Queue,
    now_ms: u64,
) -> rusqlite::Result<bool> {
    let place = params![signed(seq), id.as_bytes()];
    match settlement {
        Settlement::Delivered { status, attempts } => {
            let waited = db
                .prepare_cached("DELETE FROM waiting WHERE seq=?1 AND id=?2")?
                .execute(place)?;
            if waited > 0 && !queue.keep_results.is_zero() {
                db.prepare_cached(
                    "INSERT OR REPLACE INTO results (id, status, attempts, at_ms) VALUES (?1, ?2, ?3, ?4)",
                )?
                .execute(params![id.as_bytes(), status, attempts, signed(now_ms)])?;
            }
            Ok(waited > 0)
        }
        Settlement::Dead { reason, attempts } => {
            let moved = db
                .prepare_cached(
                    "INSERT OR REPLACE INTO dead
                     (id, service, route, key, method, target, size, accepted_ms, at_ms, attempts, reason, request)
                     SELECT id, service, route, key, method, target, size, accepted_ms, ?3, ?4, ?5, request
                     FROM waiting WHERE seq=?1 AND id=?2",
                )?
                .execute(params![signed(seq), id.as_bytes(), signed(now_ms), attempts, reason])?;
            db.prepare_cached("DELETE FROM waiting WHERE seq=?1 AND id=?2")?
                .execute(place)?;
            bury(db, queue, TIDY)?;
            Ok(moved > 0)
        }
        Settlement::Again {
            attempts,
            due_ms,
            why,
        } => {
            let waits = db
                .prepare_cached(
                    "UPDATE waiting SET attempts=?3, due_ms=?4, last_error=?5 WHERE seq=?1 AND id=?2",
                )?
                .execute(params![
                    signed(seq),
                    id.as_bytes(),
                    attempts,
                    signed(*due_ms),
                    why
                ])?;
            Ok(waits > 0)
        }
    }
}

/// Deletes dead letters beyond the bound, oldest first, at most `limit`.
fn bury(db: &Connection, queue: &Queue, limit: u64) -> rusqlite::Result<()> {
    let dead: i64 = db
        .prepare_cached("SELECT dead FROM totals")?
        .query_row([], |row| row.get(0))?;
    let excess = unsigned(dead).saturating_sub(queue.max_dead_letters).min(limit);
    if excess > 0 {
        db.prepare_cached("DELETE FROM dead WHERE seq IN (SELECT seq FROM dead ORDER BY seq LIMIT ?1)")?
            .execute([signed(excess)])?;
    }
    Ok(())
}

/// Deletes what is kept no longer, a bounded number of rows, and writes in any case.
pub(super) fn tidy(db: &Connection, queue: &Queue, now_ms: u64) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE totals SET waiting = waiting")?
        .execute([])?;
    bury(db, queue, TIDY)?;
    let old = now_ms.saturating_sub(crate::clock::millis(queue.keep_results));
    // Results are in order of time.
    db.prepare_cached(
        "DELETE FROM results WHERE seq IN (SELECT seq FROM results ORDER BY seq LIMIT ?3)
         AND (at_ms < ?1 OR seq <= (SELECT max(seq) FROM results) - ?2)",
    )?
    .execute(params![signed(old), signed(MAX_RESULTS), signed(TIDY)])?;
    Ok(())
}

/// Whether [`tidy`] has anything to do, which costs no write.
pub(super) fn untidy(db: &Connection, queue: &Queue, now_ms: u64) -> rusqlite::Result<bool> {
    let old = now_ms.saturating_sub(crate::clock::millis(queue.keep_results));
    db.prepare_cached(
        "SELECT (SELECT dead FROM totals) > ?1
             OR ifnull((SELECT at_ms FROM results ORDER BY seq LIMIT 1) < ?2, 0)
             OR ifnull((SELECT max(seq) - min(seq) FROM results) >= ?3, 0)",
    )?
    .query_row(
        params![signed(queue.max_dead_letters), signed(old), signed(MAX_RESULTS)],
        |row| row.get(0),
    )
}

pub(super) fn totals(db: &Connection) -> rusqlite::Result<Totals> {
    db.prepare_cached(
        "SELECT waiting, bytes, dead, (SELECT since_ms FROM waiting ORDER BY seq LIMIT 1) FROM totals",
    )?
    .query_row([], |row| {
        Ok(Totals {
            waiting: unsigned(row.get(0)?),
            bytes: unsigned(row.get(1)?),
            dead: unsigned(row.get(2)?),
            oldest_ms: row.get::<_, Option<i64>>(3)?.map(unsigned),
        })
    })
}

/// Where an entry is on its way.
pub(super) fn state(
    db: &Connection,
    id: EntryId,
    queue: &Queue,
    now_ms: u64,
) -> rusqlite::Result<Option<EntryState>> {
    if let Some((_, summary)) = find(db, id)? {
        return Ok(Some(summary.state));
    }
    let found = db
        .prepare_cached("SELECT status, at_ms, attempts FROM results WHERE id=?1")?
        .query_row([id.as_bytes()], |row| {
            Ok((
                row.get(0)?,
                unsigned(row.get::<_, i64>(1)?),
                small(row.get::<_, i64>(2)?),
            ))
        })
        .optional()?;
    let kept = crate::clock::millis(queue.keep_results);
    let fresh = found.filter(|(_, at_ms, _)| now_ms < at_ms.saturating_add(kept));
    Ok(fresh.map(|(status, at_ms, attempts)| EntryState::Delivered {
        status,
        at_ms,
        attempts,
    }))
}

/// An entry that waits or is dead.
pub(super) fn detail(db: &Connection, id: EntryId) -> rusqlite::Result<Option<EntryDetail>> {
    let Some((table, summary)) = find(db, id)? else {
        return Ok(None);
    };
    let bytes: Vec<u8> = db
        .prepare_cached(&format!("SELECT request FROM {table} WHERE id=?1"))?
        .query_row([id.as_bytes()], |row| row.get(0))?;
    let request = readable(bytes)?;
    Ok(Some(EntryDetail { summary, request }))
}

fn readable(bytes: Vec<u8>) -> rusqlite::Result<StoredRequest> {
    codec::decode(bytes.into())
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(0, Type::Blob, Box::new(error)))
}

const WAITING: &str =
    "SELECT seq, id, service, route, key, method, target, size, accepted_ms, attempts, since_ms,
     last_error FROM waiting";
const DEAD: &str = "SELECT seq, id, service, route, key, method, target, size, accepted_ms, attempts, at_ms,
     reason FROM dead";

fn find(db: &Connection, id: EntryId) -> rusqlite::Result<Option<(&'static str, EntrySummary)>> {
    for (table, select, kind) in [
        ("waiting", WAITING, Listed::Waiting),
        ("dead", DEAD, Listed::Dead),
    ] {
        let found = db
            .prepare_cached(&format!("{select} WHERE id=?1"))?
            .query_row([id.as_bytes()], |row| summary(row, kind))
            .optional()?;
        if let Some(summary) = found {
            return Ok(Some((table, summary)));
        }
    }
    Ok(None)
}

pub(super) fn list(db: &Connection, what: Listing) -> rusqlite::Result<Vec<EntrySummary>> {
    let select = match what.kind {
        Listed::Waiting => WAITING,
        Listed::Dead => DEAD,
    };
    db.prepare_cached(&format!("{select} WHERE seq > ?1 ORDER BY seq LIMIT ?2"))?
        .query_map(
            params![signed(what.after), count(what.limit.clamp(1, MAX_LISTED))],
            |row| summary(row, what.kind),
        )?
        .collect()
}

fn summary(row: &rusqlite::Row<'_>, kind: Listed) -> rusqlite::Result<EntrySummary> {
    let attempts = small(row.get(9)?);
    let at_ms = unsigned(row.get(10)?);
    let state = match kind {
        Listed::Waiting => EntryState::Waiting {
            since_ms: at_ms,
            attempts,
            last_error: optional_text(row, 11)?,
        },
        Listed::Dead => EntryState::Dead {
            reason: text(row, 11)?,
            at_ms,
            attempts,
        },
    };
    Ok(EntrySummary {
        place: unsigned(row.get(0)?),
        id: id(row, 1)?,
        state,
        service: text(row, 2)?,
        route: text(row, 3)?,
        key: optional_text(row, 4)?,
        method: row.get(5)?,
        target: row.get(6)?,
        size: unsigned(row.get(7)?),
        accepted_ms: unsigned(row.get(8)?),
    })
}

/// Makes dead letters wait again, at the end of the queue, as many as there is room for. How many these were, and
/// what bound stopped it.
pub(super) fn retry(
    db: &Connection,
    which: Chosen,
    queue: &Queue,
    now_ms: u64,
) -> rusqlite::Result<(u64, Option<Full>)> {
    let chosen = dead_ones(db, which)?;
    let mut moved = 0;
    for (seq, size) in chosen {
        if let Err(full) = room(db, size, queue)? {
            return Ok((moved, Some(full)));
        }
        db.prepare_cached(
            "INSERT INTO waiting
             (id, service, route, key, method, target, size, accepted_ms, since_ms, due_ms, attempts, request)
             SELECT id, service, route, key, method, target, size, accepted_ms, ?2, 0, 0, request
             FROM dead WHERE seq=?1",
        )?
        .execute(params![signed(seq), signed(now_ms)])?;
        db.prepare_cached("DELETE FROM dead WHERE seq=?1")?
            .execute([signed(seq)])?;
        moved += 1;
    }
    Ok((moved, None))
}

/// Entries to act on in one transaction.
#[derive(Clone, Copy, Debug)]
pub(super) enum Chosen {
    /// This one.
    One(EntryId),
    /// The oldest dead letters, at most [`CHUNK`], up to this place: those that come while it is done are not meant.
    Dead {
        /// As [`last_dead`] said at the beginning.
        last: u64,
    },
}

/// Dead letters that one transaction moves or drops.
pub(super) const CHUNK: u64 = 500;

/// The place of the newest dead letter; 0 if there is none.
pub(super) fn last_dead(db: &Connection) -> rusqlite::Result<u64> {
    db.prepare_cached("SELECT ifnull(max(seq), 0) FROM dead")?
        .query_row([], |row| row.get(0).map(unsigned))
}

fn dead_ones(db: &Connection, which: Chosen) -> rusqlite::Result<Vec<(u64, u64)>> {
    let read = |row: &rusqlite::Row<'_>| Ok((unsigned(row.get(0)?), unsigned(row.get(1)?)));
    match which {
        Chosen::One(id) => db
            .prepare_cached("SELECT seq, size FROM dead WHERE id=?1")?
            .query_map([id.as_bytes()], read)?
            .collect(),
        Chosen::Dead { last } => db
            .prepare_cached("SELECT seq, size FROM dead WHERE seq <= ?1 ORDER BY seq LIMIT ?2")?
            .query_map([signed(last), signed(CHUNK)], read)?
            .collect(),
    }
}

/// Drops dead letters, or one entry wherever it is. How many these were, and the place of one that
/// waited.
pub(super) fn discard(db: &Connection, which: Chosen) -> rusqlite::Result<(u64, Option<u64>)> {
    let mut gone = 0;
    for (seq, _) in dead_ones(db, which)? {
        gone += db
            .prepare_cached("DELETE FROM dead WHERE seq=?1")?
            .execute([signed(seq)])?;
    }
    let waited = match which {
        Chosen::Dead { .. } => None,
        Chosen::One(id) => db
            .prepare_cached("DELETE FROM waiting WHERE id=?1 RETURNING seq")?
            .query_row([id.as_bytes()], |row| row.get::<_, i64>(0))
            .optional()?,
    };
    let gone = unsigned(count(gone)) + u64::from(waited.is_some());
    Ok((gone, waited.map(unsigned)))
}

fn id(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<EntryId> {
    row.get(column).map(EntryId::of_bytes)
}

fn text(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Arc<str>> {
    row.get::<_, String>(column).map(Arc::from)
}

fn optional_text(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Option<Arc<str>>> {
    row.get::<_, Option<String>>(column)
        .map(|text| text.map(Arc::from))
}

/// SQLite's integers are signed; what is stored stays far below the difference.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

fn small(value: i64) -> u32 {
    u32::try_from(value.max(0)).unwrap_or(u32::MAX)
}

fn count(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

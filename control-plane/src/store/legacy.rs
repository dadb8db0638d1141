//! Files of builds that had a table for each kind of thing (schemas 1 to 4) become keys, in the transaction that opens them.
//!
//! What was before that is a snapshot: history begins there.

use super::certificates::{self, IssuedRow};
use super::format::{self, HEAD, Log, wire};
use super::modules::{self, chunk_key, chunks_key};
use super::{Author, Hold, Judged, LevelChange, LevelWrites, Place, follow, snapshot};
use crate::kv::sqlite_put as put;
use leeward_module::{Kind as ModuleKind, Module};
use leeward_policy::Kind;
use prost::Message;
use rusqlite::{OptionalExtension, Row, Transaction};
use serde_json::json;
use sha2::{Digest, Sha256};

/// The revision of the migration's own keys in the kv.
const REVISION: u64 = 1;
/// Lines of the audit in one record.
const LINES: usize = 200;

/// Brings a file of schema `found` over. The new tables are there already.
pub(crate) fn migrate(tx: &Transaction<'_>, found: i64) -> rusqlite::Result<()> {
    let id: String = tx.query_row("SELECT value FROM meta WHERE key='id'", [], |row| row.get(0))?;
    put(tx, follow::META, follow::new_meta(&id).as_bytes(), REVISION)?;
    let revision = meta(tx, "revision")?;
    let mut snapshot = wire::Snapshot {
        revision,
        forgotten: meta(tx, "compacted")?,
        resources: resources(tx)?,
        tombstones: tombstones(tx)?,
        ..wire::Snapshot::default()
    };
    if found >= 2 {
        levels(tx, &mut snapshot)?;
    }
    if found >= 3 {
        plugins(tx)?;
    }
    if found >= 4 {
        identities(tx)?;
    }
    let updated = snapshot
        .resources
        .iter()
        .filter_map(|resource| resource.value.as_ref());
    snapshot.time_ms = updated.map(|value| value.updated_ms).max().unwrap_or(0);
    let head = json!({
        "revision": revision,
        "levels": snapshot.levels,
        "lines": snapshot.lines,
        "timeMs": snapshot.time_ms.max(0),
    });
    put(tx, HEAD, head.to_string().as_bytes(), REVISION)?;
    for (key, value) in snapshot::render(&snapshot) {
        put(tx, &key, &value, REVISION)?;
    }
    let compacted = json!({"revision": revision}).to_string();
    put(tx, snapshot::COMPACTED, compacted.as_bytes(), REVISION)?;
    tx.execute_batch(
        "DROP TABLE IF EXISTS level_changes; DROP TABLE IF EXISTS judged_levels; DROP TABLE IF EXISTS level_holds;
         DROP TABLE IF EXISTS modules; DROP TABLE IF EXISTS module_chunks; DROP TABLE IF EXISTS module_signatures;
         DROP TABLE IF EXISTS join_tokens; DROP TABLE IF EXISTS certificates;
         DROP TABLE resources; DROP TABLE tombstones; DROP TABLE meta;",
    )
}

fn meta(tx: &Transaction<'_>, key: &str) -> rusqlite::Result<u64> {
    let value = tx
        .query_row("SELECT value FROM meta WHERE key=?1", [key], |row| {
            row.get::<_, i64>(0)
        })
        .optional()?;
    Ok(value.map_or(0, unsigned))
}

fn resources(tx: &Transaction<'_>) -> rusqlite::Result<Vec<wire::Resource>> {
    let mut query =
        tx.prepare("SELECT kind, name, revision, payload, created_ms, updated_ms FROM resources")?;
    let rows = query.query_map([], |row| {
        Ok(wire::Resource {
            kind: kind(row)?,
            name: row.get(1)?,
            value: Some(wire::Value {
                revision: unsigned(row.get(2)?),
                payload: row.get::<_, Vec<u8>>(3)?.into(),
                created_ms: row.get(4)?,
                updated_ms: row.get(5)?,
            }),
        })
    })?;
    rows.collect()
}

fn tombstones(tx: &Transaction<'_>) -> rusqlite::Result<Vec<wire::Tombstone>> {
    let mut query = tx.prepare("SELECT kind, name, revision FROM tombstones ORDER BY revision")?;
    let rows = query.query_map([], |row| {
        Ok(wire::Tombstone {
            kind: kind(row)?,
            name: row.get(1)?,
            revision: unsigned(row.get(2)?),
        })
    })?;
    rows.collect()
}

fn levels(tx: &Transaction<'_>, snapshot: &mut wire::Snapshot) -> rusqlite::Result<()> {
    let mut query = tx.prepare("SELECT policy, zone, level, since_ms, who, why FROM judged_levels")?;
    let judged = query.query_map([], |row| {
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
        Ok(format::judged(&place, Some(&judged)))
    })?;
    snapshot.judged = judged.collect::<Result<_, _>>()?;
    let mut query = tx.prepare("SELECT name, since_ms, until_ms, who FROM level_holds")?;
    let holds = query.query_map([], |row| {
        let hold = Hold {
            since_ms: row.get(1)?,
            until_ms: row.get(2)?,
            by: row.get(3)?,
        };
        Ok(format::hold(&row.get::<_, String>(0)?, Some(&hold)))
    })?;
    snapshot.holds = holds.collect::<Result<_, _>>()?;
    let mut query = tx.prepare(
        "SELECT id, time_ms, policy, zone, from_level, to_level, who, why FROM level_changes ORDER BY id",
    )?;
    let mut lines: Vec<(u64, LevelChange)> = Vec::new();
    let rows = query.query_map([], |row| {
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
    for row in rows {
        let (id, change) = row?;
        let follows = lines.last().is_none_or(|(last, _)| last + 1 == id);
        if !follows || lines.len() == LINES {
            put_lines(tx, snapshot, std::mem::take(&mut lines))?;
        }
        lines.push((id, change));
    }
    put_lines(tx, snapshot, lines)
}

fn put_lines(
    tx: &Transaction<'_>,
    snapshot: &mut wire::Snapshot,
    lines: Vec<(u64, LevelChange)>,
) -> rusqlite::Result<()> {
    let (Some((first_line, _)), Some((last, newest))) = (lines.first().cloned(), lines.last().cloned())
    else {
        return Ok(());
    };
    let writes = LevelWrites {
        changes: lines.into_iter().map(|(_, line)| line).collect(),
        ..LevelWrites::default()
    };
    snapshot.levels += 1;
    snapshot.lines = last;
    let body = format::levels(&writes).encode_to_vec();
    let header = wire::Header {
        number: snapshot.levels,
        time_ms: newest.time_ms,
        attempt: "migration".to_owned(),
        who: Author::of("migration").who,
        size: body.len() as u64,
        sha256: Sha256::digest(&body).to_vec(),
        body,
        first_line,
        ..wire::Header::default()
    };
    let key = Log::Levels.key(snapshot.levels);
    put(tx, &key, &header.encode_to_vec(), REVISION)
}

fn plugins(tx: &Transaction<'_>) -> rusqlite::Result<()> {
    const ATTEMPT: &str = "migration";
    let (mut used, mut count) = (0, 0);
    let mut query =
        tx.prepare("SELECT sha256, kind, version, imports, exports, size, created_ms, who FROM modules")?;
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        let sha256: [u8; 32] = row.get(0)?;
        let name: String = row.get(1)?;
        let kind = ModuleKind::ALL.into_iter().find(|known| known.as_str() == name);
        let lines = |text: String| text.lines().map(Box::from).collect();
        let module = Module {
            kind: kind.ok_or_else(|| unknown(format!("a module is of the unknown kind {name:?}")))?,
            version: row.get::<_, String>(2)?.into(),
            imports: lines(row.get(3)?),
            exports: lines(row.get(4)?),
            size: usize::try_from(row.get::<_, i64>(5)?).unwrap_or(0),
            sha256,
        };
        let mut query =
            tx.prepare_cached("SELECT signature FROM module_signatures WHERE sha256=?1 ORDER BY signature")?;
        let signatures: Vec<String> = query
            .query_map([sha256], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        let signatures: Vec<&str> = signatures.iter().map(String::as_str).collect();
        let (created_ms, by) = (row.get(6)?, row.get::<_, String>(7)?);
        let value = modules::render(&module, &signatures, created_ms, &by, ATTEMPT);
        put(tx, &modules::module_key(&sha256), value.as_bytes(), REVISION)?;
        let prefix = chunks_key(&sha256, ATTEMPT);
        let mut query =
            tx.prepare_cached("SELECT place, data FROM module_chunks WHERE sha256=?1 ORDER BY place")?;
        let mut chunks = query.query([sha256])?;
        while let Some(chunk) = chunks.next()? {
            let data: Vec<u8> = chunk.get(1)?;
            put(tx, &chunk_key(&prefix, chunk.get(0)?), &data, REVISION)?;
        }
        used += module.size as u64;
        count += 1;
    }
    let totals = modules::render_totals(used, count);
    put(tx, modules::TOTALS, totals.as_bytes(), REVISION)
}

fn identities(tx: &Transaction<'_>) -> rusqlite::Result<()> {
    let mut query = tx.prepare("SELECT hash, id, who, created_ms, expires_ms, used_ms FROM join_tokens")?;
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        let (id, who): (String, String) = (row.get(1)?, row.get(2)?);
        let value = certificates::render_token(&id, &who, row.get(3)?, row.get(4)?, row.get(5)?);
        put(
            tx,
            &certificates::token_key(&row.get(0)?),
            value.as_bytes(),
            REVISION,
        )?;
    }
    let mut query =
        tx.prepare("SELECT id, fingerprint, root, not_after_ms FROM certificates ORDER BY id, seq")?;
    let rows = query.query_map([], |row| {
        Ok(IssuedRow {
            id: row.get(0)?,
            by: None,
            fingerprint: row.get(1)?,
            root: row.get(2)?,
            not_after_ms: row.get(3)?,
        })
    })?;
    let rows: Vec<IssuedRow> = rows.collect::<Result<_, _>>()?;
    for of_id in rows.chunk_by(|a, b| a.id == b.id) {
        let Some(first) = of_id.first() else { continue };
        let key = format!("{}{}", certificates::CERTIFICATES, first.id);
        let value = certificates::render_rows(of_id.iter().map(certificates::render_row).collect());
        put(tx, &key, &value, REVISION)?;
    }
    Ok(())
}

/// The kinds' numbers in those tables.
fn kind(row: &Row<'_>) -> rusqlite::Result<String> {
    let kind = match row.get::<_, i64>(0)? {
        10 => Kind::Zone,
        20 => Kind::Plugin,
        22 => Kind::FeatureFlags,
        24 => Kind::Queue,
        25 => Kind::ResiliencePolicy,
        30 => Kind::Service,
        40 => Kind::FallbackPolicy,
        45 => Kind::Gateway,
        50 => Kind::Route,
        60 => Kind::CircuitOverride,
        65 => Kind::DegradationPolicy,
        70 => Kind::DegradationOverride,
        75 => Kind::AuthorizationPolicy,
        other => return Err(unknown(format!("a resource is of the unknown kind {other}"))),
    };
    Ok(kind.as_str().to_owned())
}

fn unknown(what: String) -> rusqlite::Error {
    rusqlite::Error::ToSqlConversionFailure(what.into())
}

fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

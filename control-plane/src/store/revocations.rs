//! Revocations: whose certificates are refused that were issued before a time. Each is under its id.

use super::certificates::{forget, number};
use super::{Store, StoreError, format};
use crate::kv::{Entry, Step, Watch};
use serde_json::{Map, Value, json};

/// Revocations that there may be. Where several control planes write at once there may be a few more: proxies take those, too.
const MAX_REVOCATIONS: u64 = 10_000;

pub(super) const REVOKED: &str = "revoked/";

/// One revocation.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RevocationRow {
    /// Whose certificates.
    pub id: String,
    /// Those that begin before this are refused, and tokens that were made before it; in milliseconds since 1970, and whole
    /// seconds.
    pub at_ms: i64,
    /// It is forgotten then, likewise.
    pub until_ms: i64,
    /// Why, for people.
    pub reason: String,
    /// Who revoked.
    pub who: String,
}

impl Store {
    /// Keeps a revocation. One that is there already is not taken back by an earlier one, and lasts as long as the longer.
    /// Answers what is kept.
    ///
    /// # Errors
    ///
    /// [`StoreError::Revocations`] if there are as many as may be; or if the kv can't be reached.
    pub async fn put_revocation(
        &self,
        row: &RevocationRow,
        now_ms: i64,
    ) -> Result<RevocationRow, StoreError> {
        let kv = &self.inner.kv;
        let key = key(&row.id);
        let mut others = 0;
        for entry in kv.all(REVOKED).await? {
            if entry.key == key {
                continue;
            }
            if is_over(&entry, now_ms) {
                forget(kv, &entry).await?;
            } else {
                others += 1;
            }
        }
        if others >= MAX_REVOCATIONS {
            return Err(StoreError::Revocations(others));
        }
        let mut damaged = None;
        let kept = kv.update(&key, |value| {
            let known = value.map(|value| parse(&key, value)).transpose();
            let known = match known {
                Ok(known) => known,
                Err(error) => {
                    damaged = Some(error);
                    return Step::Leave(row.clone());
                }
            };
            let kept = known.map_or_else(
                || row.clone(),
                |known| RevocationRow {
                    at_ms: row.at_ms.max(known.at_ms),
                    until_ms: row.until_ms.max(known.until_ms),
                    ..row.clone()
                },
            );
            Step::Put(render(&kept), kept)
        });
        let kept = kept.await?;
        damaged.map_or(Ok(kept), Err)
    }

    /// Takes a revocation back, and answers what it was.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn take_revocation(&self, id: &str) -> Result<Option<RevocationRow>, StoreError> {
        let key = key(id);
        let mut damaged = None;
        let taken = self.inner.kv.update(&key, |value| {
            let Some(value) = value else {
                return Step::Leave(None);
            };
            match parse(&key, value) {
                Ok(row) => Step::Delete(Some(row)),
                Err(error) => {
                    damaged = Some(error);
                    Step::Leave(None)
                }
            }
        });
        let taken = taken.await?;
        damaged.map_or(Ok(taken), Err)
    }

    /// The revocation of an id, whichever control plane wrote it.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn revocation(&self, id: &str) -> Result<Option<RevocationRow>, StoreError> {
        let entry = self.inner.kv.get(&key(id)).await?;
        entry.map(|entry| parse(&entry.key, &entry.value)).transpose()
    }

    /// All that haven't come to their end, by id. One that can't be read is told of and left out: the others are in force all
    /// the same.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn revocations(&self, now_ms: i64) -> Result<Vec<RevocationRow>, StoreError> {
        let mut rows = Vec::new();
        for entry in self.inner.kv.all(REVOKED).await? {
            match parse(&entry.key, &entry.value) {
                Ok(row) if row.until_ms >= now_ms => rows.push(row),
                Ok(_) => {}
                Err(error) => tracing::error!(%error, "a revocation can't be read; revoke the id again"),
            }
        }
        Ok(rows)
    }

    /// Tells whenever one is written from now on. What it tells is to be read anew.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub(crate) async fn watch_revocations(&self) -> Result<Watch, StoreError> {
        let kv = &self.inner.kv;
        let now = kv.range(REVOKED, None, 1).await?.revision;
        Ok(kv.watch(REVOKED, now + 1))
    }
}

/// Whether a revocation has come to its end.
pub(super) fn is_over(entry: &Entry, now_ms: i64) -> bool {
    parse(&entry.key, &entry.value).is_ok_and(|row| row.until_ms < now_ms)
}

fn key(id: &str) -> String {
    format!("{REVOKED}{id}")
}

fn render(row: &RevocationRow) -> Vec<u8> {
    json!({"atMs": row.at_ms, "untilMs": row.until_ms, "reason": row.reason, "who": row.who})
        .to_string()
        .into_bytes()
}

fn parse(key: &str, value: &[u8]) -> Result<RevocationRow, StoreError> {
    let object = format::object(key, value)?;
    let text = |object: &Map<String, Value>, name: &str| {
        let text = object.get(name).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    Ok(RevocationRow {
        id: key.strip_prefix(REVOKED).unwrap_or_default().to_owned(),
        at_ms: number(&object, "atMs"),
        until_ms: number(&object, "untilMs"),
        reason: text(&object, "reason"),
        who: text(&object, "who"),
    })
}

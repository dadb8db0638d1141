//! Join tokens and the certificates that were issued: a restart neither makes a used token good again nor forgets whose
//! certificate leads to an old root.
//!
//! A token is under the hash of its secret; the certificates of an id are together under the id.

use super::{Store, StoreError, format};
use crate::kv::{Entry, Step, Txn};
use leeward_module::hex;
use serde_json::{Map, Value, json};

/// Tokens that may wait to be used.
const MAX_TOKENS: u64 = 10_000;
/// How long one that was used, or has ended, is remembered, so that whoever tries it again hears what became of it; in
/// milliseconds: 7 days.
pub(super) const TOKEN_KEPT_MS: i64 = 7 * 24 * 3600 * 1000;
/// How long after its first use a token is good for the same key again; in milliseconds: an hour. That is enough for one whose
/// answer got lost to ask again, after a restart too, and too little for one that was locked out by another root to come back
/// with a token that lasts for days.
pub(super) const TOKEN_AGAIN_MS: i64 = 3600 * 1000;
/// Certificates of one id, and of one that has asked for them, that are remembered.
const MAX_OF_ID: usize = 4;
/// Stands in a key between an id and who has asked, and in no id.
const BY: char = '@';

pub(super) const TOKENS: &str = "tokens/";
pub(super) const CERTIFICATES: &str = "certificates/";

/// A token that was made.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NewToken {
    /// The hash of its secret.
    pub hash: [u8; 32],
    /// Whom it is for.
    pub id: String,
    /// Who made it.
    pub who: String,
    /// When it ends, in milliseconds since 1970.
    pub expires_ms: i64,
}

/// What came of the use of a token.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TokenUse {
    /// It was good, and is used now.
    Good,
    /// There is none of that hash.
    Unknown,
    /// It was used before, at this time.
    Used(i64),
    /// It ended at this time.
    Ended(i64),
    /// It is for somebody else.
    Other,
    /// It was made at this time, before the id was revoked.
    Revoked(i64),
}

/// A certificate that was issued.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IssuedRow {
    /// Whose it is.
    pub id: String,
    /// The proxy that has asked for it, of a workload's: several may have one of the same id.
    pub by: Option<String>,
    /// SHA-256 of it, in hexadecimal digits.
    pub fingerprint: String,
    /// The root that it leads to.
    pub root: String,
    /// When it ends, in milliseconds since 1970.
    pub not_after_ms: i64,
}

impl Store {
    /// Keeps a token.
    ///
    /// # Errors
    ///
    /// [`StoreError::Tokens`] if there are as many as may be; or if the kv can't be reached.
    pub async fn put_token(&self, token: &NewToken, now_ms: i64) -> Result<(), StoreError> {
        let kv = &self.inner.kv;
        let mut waiting = 0;
        for entry in kv.all(TOKENS).await? {
            let object = format::object(&entry.key, &entry.value)?;
            let ends = number(&object, "expiresMs");
            if ends < now_ms.saturating_sub(TOKEN_KEPT_MS) {
                forget(kv, &entry).await?;
            } else if object.get("usedMs").is_none() && ends >= now_ms {
                waiting += 1;
            }
        }
        if waiting >= MAX_TOKENS {
            return Err(StoreError::Tokens(waiting));
        }
        let value = render_token(&token.id, &token.who, now_ms, token.expires_ms, None);
        let put = |_: Option<&_>| Step::Put(value.clone().into_bytes(), ());
        Ok(kv.update(&token_key(&token.hash), put).await?)
    }

    /// Uses a token up for one key pair, if it is good: of two that come at once with the same, one finds it good. For an hour,
    /// or until it ends if that is sooner, whoever shows the same key again finds it good, too: it is the one whose answer got
    /// lost, and nobody else can use a certificate of that key. One that was made before `since` is no good: whoever has had
    /// the id's key may have had its token, too.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn use_token(
        &self,
        hash: &[u8; 32],
        (id, since): (&str, Option<i64>),
        used_by: &str,
        now_ms: i64,
    ) -> Result<TokenUse, StoreError> {
        let key = token_key(hash);
        let mut damaged = None;
        let used = self.inner.kv.update(&key, |value| {
            let Some(value) = value else {
                return Step::Leave(TokenUse::Unknown);
            };
            let mut object = match format::object(&key, value) {
                Ok(object) => object,
                Err(error) => {
                    damaged = Some(error);
                    return Step::Leave(TokenUse::Unknown);
                }
            };
            if object.get("id").and_then(Value::as_str) != Some(id) {
                return Step::Leave(TokenUse::Other);
            }
            let made = number(&object, "createdMs");
            if since.is_some_and(|since| made < since) {
                return Step::Leave(TokenUse::Revoked(made));
            }
            let ends = number(&object, "expiresMs");
            if object.contains_key("usedMs") {
                let is_same = object.get("usedBy").and_then(Value::as_str) == Some(used_by);
                let at = number(&object, "usedMs");
                let until = ends.min(at.saturating_add(TOKEN_AGAIN_MS));
                return Step::Leave(if is_same && now_ms <= until {
                    TokenUse::Good
                } else {
                    TokenUse::Used(at)
                });
            }
            if ends < now_ms {
                return Step::Leave(TokenUse::Ended(ends));
            }
            object.insert("usedMs".to_owned(), now_ms.into());
            object.insert("usedBy".to_owned(), used_by.into());
            Step::Put(Value::Object(object).to_string().into_bytes(), TokenUse::Good)
        });
        let used = used.await?;
        damaged.map_or(Ok(used), Err)
    }

    /// Remembers a certificate that is about to be given, and forgets those of the same id that have ended.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached; the certificate must not be given then.
    pub async fn put_certificate(&self, row: &IssuedRow, now_ms: i64) -> Result<(), StoreError> {
        let key = certificate_key(row);
        let mut damaged = None;
        let put = self.inner.kv.update(&key, |value| {
            let mut rows = match value.map(|value| rows(&key, value)).transpose() {
                Ok(rows) => rows.unwrap_or_default(),
                Err(error) => {
                    damaged = Some(error);
                    return Step::Leave(());
                }
            };
            rows.retain(|row| number(row, "notAfterMs") >= now_ms);
            rows.push(render_row(row));
            // One that asks again and again has no use for what it asked for before.
            rows.drain(..rows.len().saturating_sub(MAX_OF_ID));
            Step::Put(render_rows(rows), ())
        });
        put.await?;
        damaged.map_or(Ok(()), Err)
    }

    /// Forgets the certificates of an id: they count no more.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn forget_certificates(&self, id: &str) -> Result<(), StoreError> {
        let txn = Txn::default().delete(format!("{CERTIFICATES}{id}"));
        self.inner.kv.txn(txn).await?;
        Ok(())
    }

    /// The certificates that are still good, by id and who has asked for them, for each the oldest first.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn certificates(&self, now_ms: i64) -> Result<Vec<IssuedRow>, StoreError> {
        let mut certificates = Vec::new();
        for entry in self.inner.kv.all(CERTIFICATES).await? {
            let holder = entry.key.strip_prefix(CERTIFICATES).unwrap_or_default();
            let (id, by) = match holder.split_once(BY) {
                Some((id, by)) => (id, Some(by)),
                None => (holder, None),
            };
            let text = |row: &Map<String, Value>, name: &str| {
                row.get(name)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
                    .to_owned()
            };
            let rows = rows(&entry.key, &entry.value)?.into_iter().map(|row| IssuedRow {
                id: id.to_owned(),
                by: by.map(str::to_owned),
                fingerprint: text(&row, "fingerprint"),
                root: text(&row, "root"),
                not_after_ms: number(&row, "notAfterMs"),
            });
            certificates.extend(rows.filter(|row| row.not_after_ms >= now_ms));
        }
        Ok(certificates)
    }
}

/// Deletes an entry, if it is still as it was.
pub(super) async fn forget(kv: &crate::kv::Kv, entry: &Entry) -> Result<(), StoreError> {
    let txn = Txn::default()
        .when(&*entry.key, entry.modified)
        .delete(&*entry.key);
    kv.txn(txn).await?;
    Ok(())
}

/// Whether all certificates of an entry have ended.
pub(super) fn is_over(entry: &Entry, now_ms: i64) -> bool {
    rows(&entry.key, &entry.value).is_ok_and(|rows| rows.iter().all(|row| number(row, "notAfterMs") < now_ms))
}

fn certificate_key(row: &IssuedRow) -> String {
    match &row.by {
        Some(by) => format!("{CERTIFICATES}{}{BY}{by}", row.id),
        None => format!("{CERTIFICATES}{}", row.id),
    }
}

pub(super) fn token_key(hash: &[u8; 32]) -> String {
    format!("{TOKENS}{}", hex(hash))
}

pub(super) fn render_token(
    id: &str,
    who: &str,
    created_ms: i64,
    expires_ms: i64,
    used_ms: Option<i64>,
) -> String {
    let mut object = json!({"id": id, "who": who, "createdMs": created_ms, "expiresMs": expires_ms});
    if let (Some(used_ms), Some(object)) = (used_ms, object.as_object_mut()) {
        object.insert("usedMs".to_owned(), used_ms.into());
    }
    object.to_string()
}

pub(super) fn render_row(row: &IssuedRow) -> Map<String, Value> {
    [
        ("fingerprint".to_owned(), row.fingerprint.as_str().into()),
        ("root".to_owned(), row.root.as_str().into()),
        ("notAfterMs".to_owned(), row.not_after_ms.into()),
    ]
    .into_iter()
    .collect()
}

pub(super) fn render_rows(rows: Vec<Map<String, Value>>) -> Vec<u8> {
    let rows = rows.into_iter().map(Value::Object).collect();
    Value::Array(rows).to_string().into_bytes()
}

fn rows(key: &str, value: &[u8]) -> Result<Vec<Map<String, Value>>, StoreError> {
    serde_json::from_slice(value)
        .map_err(|error| StoreError::Damaged(format!("the key {key} can't be read: {error}")))
}

pub(super) fn number(object: &Map<String, Value>, name: &str) -> i64 {
    object.get(name).and_then(Value::as_i64).unwrap_or_default()
}

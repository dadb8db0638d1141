//! Modules of plugins, each under the SHA-256 of its bytes.
//!
//! The bytes come first, in pieces under a name of this attempt; then one transaction says that the module is there, and counts
//! it. What was cut short in between is found by housekeeping, once the lease is over that an attempt has.

use super::format::{self, HEAD};
use super::{Store, StoreError, token};
use crate::kv::{Compare, Kv, KvError, Step, Txn};
use bytes::Bytes;
use leeward_module::{Kind, Module, hex, parse_hex};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Modules that are kept, however small.
const MAX_MODULES: u64 = 10_000;
/// Signatures of one module.
pub(super) const MAX_SIGNATURES: u64 = 16;
/// A module is stored, and sent, in pieces of so many bytes: a piece is found without reading those before it.
pub const CHUNK: usize = 64 << 10;
/// Pieces that are written at once.
const AT_ONCE: usize = 15;
/// How long an attempt may take.
const UPLOAD: Duration = Duration::from_secs(600);
/// Times that a module is written against others.
const MAX_TRIES: u32 = 20;

pub(super) const MODULES: &str = "modules/";
pub(super) const CHUNKS: &str = "chunks/";
pub(super) const UPLOADS: &str = "uploads/";
/// How many there are, and what they take.
pub(super) const TOTALS: &str = "modules-totals";

/// What is known of a module that is kept.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoredModule {
    /// What it says of itself.
    pub module: Module,
    /// Texts of `.minisig` files.
    pub signatures: Vec<String>,
    /// When it came, in milliseconds since 1970.
    pub created_ms: i64,
    /// Who pushed it, or the image that it is of.
    pub by: String,
}

impl Store {
    /// Keeps a module; one that is there already stays as it is, and gets the signature.
    ///
    /// # Errors
    ///
    /// [`StoreError::Full`] if there is no room, [`StoreError::Signatures`] if it has too many.
    pub async fn put_module(
        &self,
        module: &Module,
        bytes: &[u8],
        signature: Option<&str>,
        by: &str,
    ) -> Result<(), StoreError> {
        let kv = &self.inner.kv;
        let key = module_key(&module.sha256);
        for _ in 0..MAX_TRIES {
            if kv.get(&key).await?.is_some() {
                if !self.sign(&key, signature).await? {
                    // It has just gone.
                    continue;
                }
                return Ok(());
            }
            let totals = kv.get(TOTALS).await?;
            let modified = totals.as_ref().map_or(0, |entry| entry.modified);
            let (used, count) = totals_of(totals.as_ref().map(|entry| &entry.value))?;
            let size = bytes.len() as u64;
            let limit = self.inner.bounds.modules;
            if used.saturating_add(size) > limit || count >= MAX_MODULES {
                return Err(StoreError::Full {
                    size,
                    used,
                    limit,
                    count,
                });
            }
            let attempt = token();
            let lease = kv.grant(UPLOAD).await?;
            let upload = format!("{UPLOADS}{attempt}");
            let marked = kv.txn(Txn::default().put_leased(&*upload, Bytes::new(), lease));
            let marked = marked.await?.unwrap_or_default();
            let prefix = chunks_key(&module.sha256, &attempt);
            upload_chunks(kv, &prefix, bytes).await?;
            let signatures: Vec<&str> = signature.into_iter().collect();
            let value = render(module, &signatures, self.now_ms(), by, &attempt);
            let txn = Txn::default()
                .when(&*key, 0)
                .when(TOTALS, modified)
                .when(&*upload, marked)
                .put(&*key, value)
                .put(TOTALS, render_totals(used + size, count + 1))
                .delete(&*upload);
            let done = kv.txn(txn).await;
            match done {
                Ok(Some(_)) => {
                    kv.revoke(lease).await?;
                    return Ok(());
                }
                // Whether it was done shows in the next round: it is there then, perhaps with these very pieces.
                Err(KvError::Unknown { .. }) => {}
                Ok(None) => kv.delete_prefix(&prefix).await?,
                Err(error) => return Err(error.into()),
            }
        }
        Err(KvError::Contended(key).into())
    }

    /// Adds a signature; `false` if there is no such module.
    async fn sign(&self, key: &str, signature: Option<&str>) -> Result<bool, StoreError> {
        let Some(signature) = signature else {
            return Ok(true);
        };
        let mut refused = None;
        let there = self.inner.kv.update(key, |value| {
            let Some(value) = value else {
                return Step::Leave(false);
            };
            let mut object = match format::object(key, value) {
                Ok(object) => object,
                Err(error) => {
                    refused = Some(error);
                    return Step::Leave(true);
                }
            };
            let mut signatures = texts(&object, "signatures");
            if signatures.iter().any(|there| there == signature) {
                return Step::Leave(true);
            }
            if signatures.len() as u64 >= MAX_SIGNATURES {
                refused = Some(StoreError::Signatures(signatures.len() as u64));
                return Step::Leave(true);
            }
            signatures.push(signature.to_owned());
            signatures.sort_unstable();
            object.insert("signatures".to_owned(), signatures.into());
            Step::Put(Value::Object(object).to_string().into_bytes(), true)
        });
        let there = there.await?;
        refused.map_or(Ok(there), Err)
    }

    /// What is known of a module.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn module(&self, sha256: &[u8; 32]) -> Result<Option<StoredModule>, StoreError> {
        let key = module_key(sha256);
        match self.inner.kv.get(&key).await? {
            Some(entry) => stored(*sha256, &format::object(&key, &entry.value)?).map(Some),
            None => Ok(None),
        }
    }

    /// Every module, newest first, each with the number of its signatures; without imports, exports and signatures.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn modules(&self) -> Result<Vec<(StoredModule, u64)>, StoreError> {
        let mut modules = Vec::new();
        for entry in self.inner.kv.all(MODULES).await? {
            let Some(sha256) = entry.key.strip_prefix(MODULES).and_then(parse_hex) else {
                continue;
            };
            let mut found = stored(sha256, &format::object(&entry.key, &entry.value)?)?;
            let signatures = found.signatures.len() as u64;
            found.signatures.clear();
            (found.module.imports, found.module.exports) = (Vec::new(), Vec::new());
            modules.push((found, signatures));
        }
        modules.sort_by_key(|(found, _)| (std::cmp::Reverse(found.created_ms), found.module.sha256));
        Ok(modules)
    }

    /// What the modules take together, and what they may, in bytes.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn modules_size(&self) -> Result<(u64, u64), StoreError> {
        let entry = self.inner.kv.get(TOTALS).await?;
        let (used, _) = totals_of(entry.as_ref().map(|entry| &entry.value))?;
        Ok((used, self.inner.bounds.modules))
    }

    /// So many pieces of a module from a place on; fewer, or none, where it ends.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn module_chunks(
        &self,
        sha256: &[u8; 32],
        from: u32,
        count: u32,
    ) -> Result<Vec<Bytes>, StoreError> {
        let key = module_key(sha256);
        let Some(entry) = self.inner.kv.get(&key).await? else {
            return Ok(Vec::new());
        };
        let object = format::object(&key, &entry.value)?;
        let attempt = object.get("attempt").and_then(Value::as_str).unwrap_or_default();
        let prefix = chunks_key(sha256, attempt);
        let mut chunks: Vec<Bytes> = Vec::new();
        let mut after = from.checked_sub(1).map(|place| chunk_key(&prefix, place));
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        while chunks.len() < count {
            let most = AT_ONCE.min(count - chunks.len());
            let page = self.inner.kv.range(&prefix, after.as_deref(), most).await?;
            after = page.entries.last().map(|entry| entry.key.clone());
            chunks.extend(page.entries.into_iter().map(|entry| entry.value));
            if !page.more {
                break;
            }
        }
        Ok(chunks)
    }

    /// What a write that names modules requires ([`super::Change::requires`]): that none was dropped since.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn modules_stay(&self) -> Result<Compare, StoreError> {
        let entry = self.inner.kv.get(TOTALS).await?;
        let modified = entry.map_or(0, |entry| entry.modified);
        Ok(Compare::Modified(TOTALS.to_owned(), modified))
    }

    /// Drops a module that nothing names at the revision `at`; whether there was one.
    ///
    /// # Errors
    ///
    /// [`StoreError::Moved`] if the store is at another revision; or if the kv can't be reached.
    pub async fn delete_module(&self, sha256: &[u8; 32], at: u64) -> Result<bool, StoreError> {
        let kv = &self.inner.kv;
        let key = module_key(sha256);
        let mut lost = false;
        for _ in 0..MAX_TRIES {
            self.settle().await?;
            let head = self.inner.mirror().head.clone();
            if head.revision != at {
                let found = head.revision;
                return Err(StoreError::Moved { wanted: at, found });
            }
            let Some(entry) = kv.get(&key).await? else {
                return Ok(lost);
            };
            let object = format::object(&key, &entry.value)?;
            let attempt = object.get("attempt").and_then(Value::as_str).unwrap_or_default();
            let size = object.get("size").and_then(Value::as_u64).unwrap_or(0);
            let totals = kv.get(TOTALS).await?;
            let (used, count) = totals_of(totals.as_ref().map(|entry| &entry.value))?;
            let txn = Txn::default()
                .when(&*key, entry.modified)
                .when(HEAD, head.modified)
                .when(TOTALS, totals.as_ref().map_or(0, |entry| entry.modified))
                .delete(&*key)
                .put(
                    TOTALS,
                    render_totals(used.saturating_sub(size), count.saturating_sub(1)),
                );
            match kv.txn(txn).await {
                Ok(Some(_)) => {
                    kv.delete_prefix(&chunks_key(sha256, attempt)).await?;
                    return Ok(true);
                }
                Ok(None) => {}
                Err(KvError::Unknown { .. }) => lost = true,
                Err(error) => return Err(error.into()),
            }
        }
        Err(KvError::Contended(key).into())
    }
}

async fn upload_chunks(kv: &Kv, prefix: &str, bytes: &[u8]) -> Result<(), StoreError> {
    let mut place = 0;
    for group in bytes.chunks(CHUNK * AT_ONCE) {
        let mut txn = Txn::default();
        for chunk in group.chunks(CHUNK) {
            txn = txn.put(chunk_key(prefix, place), chunk.to_vec());
            place += 1;
        }
        match kv.txn(txn.clone()).await {
            // Under names that nobody else writes: twice makes no difference.
            Err(KvError::Unknown { .. }) => kv.txn(txn).await?,
            done => done?,
        };
    }
    Ok(())
}

pub(super) fn module_key(sha256: &[u8; 32]) -> String {
    format!("{MODULES}{}", hex(sha256))
}

/// Where the pieces of an attempt are.
pub(super) fn chunks_key(sha256: &[u8; 32], attempt: &str) -> String {
    format!("{CHUNKS}{attempt}-{}/", hex(sha256))
}

pub(super) fn chunk_key(prefix: &str, place: u32) -> String {
    format!("{prefix}{place:08x}")
}

/// The attempt in the key of a piece.
pub(super) fn attempt_of(key: &str) -> Option<&str> {
    key.strip_prefix(CHUNKS)?.split('-').next()
}

pub(super) fn render(
    module: &Module,
    signatures: &[&str],
    created_ms: i64,
    by: &str,
    attempt: &str,
) -> String {
    json!({
        "kind": module.kind.as_str(),
        "version": &*module.version,
        "imports": module.imports.iter().map(|name| &**name).collect::<Vec<_>>(),
        "exports": module.exports.iter().map(|name| &**name).collect::<Vec<_>>(),
        "size": module.size,
        "createdMs": created_ms,
        "by": by,
        "signatures": signatures,
        "attempt": attempt,
    })
    .to_string()
}

pub(super) fn render_totals(used: u64, count: u64) -> String {
    json!({"bytes": used, "count": count}).to_string()
}

fn totals_of(value: Option<&Bytes>) -> Result<(u64, u64), StoreError> {
    let Some(value) = value else {
        return Ok((0, 0));
    };
    let object = format::object(TOTALS, value)?;
    let number = |name: &str| object.get(name).and_then(Value::as_u64).unwrap_or(0);
    Ok((number("bytes"), number("count")))
}

/// The attempt that a module's pieces are of.
pub(super) fn attempt_in(value: &Bytes) -> Option<String> {
    let object = format::object(MODULES, value).ok()?;
    object.get("attempt")?.as_str().map(str::to_owned)
}

fn texts(object: &Map<String, Value>, name: &str) -> Vec<String> {
    let texts = object.get(name).and_then(Value::as_array);
    let texts = texts.into_iter().flatten().filter_map(Value::as_str);
    texts.map(str::to_owned).collect()
}

fn stored(sha256: [u8; 32], object: &Map<String, Value>) -> Result<StoredModule, StoreError> {
    let text = |name: &str| object.get(name).and_then(Value::as_str).unwrap_or_default();
    let number = |name: &str| object.get(name).and_then(Value::as_i64).unwrap_or_default();
    let kind = text("kind");
    let known = Kind::ALL.into_iter().find(|known| known.as_str() == kind);
    let names = |name: &str| texts(object, name).into_iter().map(Box::from).collect();
    Ok(StoredModule {
        module: Module {
            kind: known.ok_or_else(|| {
                StoreError::Damaged(format!("module {} is of unknown kind {kind:?}", hex(&sha256)))
            })?,
            version: text("version").into(),
            imports: names("imports"),
            exports: names("exports"),
            size: usize::try_from(number("size")).unwrap_or(0),
            sha256,
        },
        signatures: texts(object, "signatures"),
        created_ms: number("createdMs"),
        by: text("by").to_owned(),
    })
}

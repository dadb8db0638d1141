//! Everything at one revision, from which a store that opens starts.

use super::format::{self, PART, wire};
use super::mirror::Mirror;
use super::{Bounds, Fence, StoreError, digits, token};
use crate::kv::{Kv, KvError, Txn};
use bytes::Bytes;
use prost::Message;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Where a snapshot is.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    pub(super) revision: u64,
    /// Tells the attempts of several writers apart.
    pub(super) attempt: String,
    /// Up to which record it has levels.
    pub(super) levels: u64,
    parts: u64,
    sha256: String,
}

pub(super) const MANIFESTS: &str = "snapshots/";
pub(super) const PARTS: &str = "snap/";
pub(super) const COMPACTED: &str = "compacted";

pub(super) fn manifest_key(revision: u64) -> String {
    format!("{MANIFESTS}{}", digits(revision))
}

/// Where the parts of an attempt are.
pub(super) fn parts_key(revision: u64, attempt: &str) -> String {
    format!("{PARTS}{}-{attempt}/", digits(revision))
}

/// The snapshots that there are, oldest first.
pub(super) async fn list(kv: &Kv) -> Result<Vec<Manifest>, StoreError> {
    let mut manifests = Vec::new();
    for entry in kv.all(MANIFESTS).await? {
        let object = format::object(&entry.key, &entry.value)?;
        let text = |name: &str| object.get(name).and_then(Value::as_str).map(str::to_owned);
        let number = format::number_of(&entry.key);
        let count = |name: &str| object.get(name).and_then(Value::as_u64);
        match (number, text("attempt"), count("parts"), text("sha256")) {
            (Some(revision), Some(attempt), Some(parts), Some(sha256)) => manifests.push(Manifest {
                revision,
                attempt,
                levels: count("levels").unwrap_or(0),
                parts,
                sha256,
            }),
            _ => return Err(StoreError::Damaged(format!("{} is no manifest", entry.key))),
        }
    }
    Ok(manifests)
}

/// What a snapshot says; `None` if it has gone meanwhile.
pub(super) async fn load(kv: &Kv, manifest: &Manifest, bounds: Bounds) -> Result<Option<Mirror>, StoreError> {
    let prefix = parts_key(manifest.revision, &manifest.attempt);
    let mut bytes = Vec::new();
    for part in 0..manifest.parts {
        let key = format!("{prefix}{part:06x}");
        let Some(entry) = kv.get(&key).await? else {
            return Ok(None);
        };
        bytes.extend_from_slice(&entry.value);
    }
    let name = manifest_key(manifest.revision);
    if leeward_module::hex(&Sha256::digest(&bytes).into()) != manifest.sha256 {
        return Err(StoreError::Damaged(format!(
            "{name} has another hash than its parts"
        )));
    }
    // Payloads share what they were read into.
    let snapshot = wire::Snapshot::decode(Bytes::from(bytes))
        .map_err(|error| StoreError::Damaged(format!("{name} can't be read: {error}")))?;
    Ok(Some(Mirror::of(snapshot, bounds)))
}

/// Cuts a snapshot into parts, and says what its manifest says: keys and values, the manifest last.
pub(super) fn render(snapshot: &wire::Snapshot) -> Vec<(String, Bytes)> {
    let attempt = token();
    let bytes = Bytes::from(snapshot.encode_to_vec());
    let prefix = parts_key(snapshot.revision, &attempt);
    let starts = (0..bytes.len()).step_by(PART).enumerate();
    let mut keys: Vec<(String, Bytes)> = starts
        .map(|(i, start)| {
            let part = bytes.slice(start..bytes.len().min(start + PART));
            (format!("{prefix}{i:06x}"), part)
        })
        .collect();
    let manifest = json!({
        "attempt": attempt,
        "levels": snapshot.levels,
        "parts": keys.len(),
        "sha256": leeward_module::hex(&Sha256::digest(&bytes).into()),
    });
    keys.push((manifest_key(snapshot.revision), Bytes::from(manifest.to_string())));
    keys
}

/// Writes a snapshot. One that is cut short leaves parts that housekeeping finds.
pub(super) async fn write(kv: &Kv, keys: Vec<(String, Bytes)>, fence: &Fence) -> Result<(), StoreError> {
    for (key, value) in keys {
        let txn = fence.guard(Txn::default().put(key, value));
        let done = match kv.txn(txn.clone()).await {
            // The same key with the same value: it makes no difference whether it is written twice.
            Err(KvError::Unknown { .. }) => kv.txn(txn).await,
            done => done,
        };
        if done?.is_none() {
            return Err(fence.lost());
        }
    }
    Ok(())
}

/// Records up to this revision are forgotten.
pub(super) async fn compacted(kv: &Kv) -> Result<u64, StoreError> {
    let Some(entry) = kv.get(COMPACTED).await? else {
        return Ok(0);
    };
    let object = format::object(COMPACTED, &entry.value)?;
    let revision = object.get("revision").and_then(Value::as_u64);
    revision.ok_or_else(|| StoreError::Damaged("the key compacted has no number \"revision\"".to_owned()))
}

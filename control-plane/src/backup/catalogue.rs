//! What is in a place: backups, what verification found, how far the log goes.

use super::error::BackupError;
use super::manifest::{
    CHUNKS, LOG, MANIFESTS, MAX_MANIFEST, Manifest, PENDING, VERIFIED, segment_after, short,
};
use super::place::{Found, Place};
use super::retention::{Held, Retention, doomed};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Largest note about a verification, in bytes.
const MAX_NOTE: u64 = 64 << 10;
/// How young what nothing names must be to be left alone: a backup that is being made may count on it.
const GRACE: Duration = Duration::from_secs(3600);
/// How old the sign that a backup is being made must be to be that of one that was cut short.
const CUT_SHORT: Duration = Duration::from_secs(24 * 3600);

/// What a verification found.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Note {
    /// When it was, in milliseconds since 1970.
    pub(crate) time_ms: i64,
    pub(crate) good: bool,
    /// Restored and compared; or only hashes, for want of a secret.
    pub(crate) restored: bool,
    /// What was wrong.
    pub(crate) why: String,
}

/// A backup as it is listed.
#[derive(Debug)]
pub(crate) struct Listed {
    /// The manifest's name.
    pub(crate) name: String,
    /// What people call it.
    pub(crate) short: String,
    pub(crate) manifest: Result<Manifest, BackupError>,
    pub(crate) note: Option<Note>,
}

/// The backups of a place, oldest first. One whose manifest is no good is listed, too.
pub(crate) async fn list(place: &Place) -> Result<Vec<Listed>, BackupError> {
    let notes = notes(place).await?;
    let mut listed = Vec::new();
    for found in place.list(MANIFESTS, None).await? {
        let short = short(&found.name).unwrap_or_else(|| found.name.clone());
        listed.push(Listed {
            note: notes.get(&short).cloned(),
            manifest: manifest(place, &found.name).await,
            name: found.name,
            short,
        });
    }
    Ok(listed)
}

/// The newest backup of a store. Manifests' names sort by time, so that few are read.
pub(crate) async fn newest(place: &Place, store_id: &str) -> Result<Option<Manifest>, BackupError> {
    for found in place.list(MANIFESTS, None).await?.iter().rev() {
        match manifest(place, &found.name).await {
            Ok(manifest) if manifest.store_id == store_id => return Ok(Some(manifest)),
            Ok(_) => {}
            Err(error) => tracing::warn!(error = error.chain(), "a manifest is passed over"),
        }
    }
    Ok(None)
}

async fn notes(place: &Place) -> Result<BTreeMap<String, Note>, BackupError> {
    let mut notes = BTreeMap::new();
    for found in place.list(VERIFIED, None).await? {
        let bytes = place.get(&found.name, MAX_NOTE).await?;
        // One that can't be read says nothing: the backup counts as not verified.
        if let (Ok(note), Some(short)) = (serde_json::from_slice(&bytes), found.name.rsplit('/').next()) {
            notes.insert(short.to_owned(), note);
        }
    }
    Ok(notes)
}

/// One manifest, checked against its name.
pub(crate) async fn manifest(place: &Place, name: &str) -> Result<Manifest, BackupError> {
    let bytes = place.get(name, MAX_MANIFEST).await?;
    Manifest::decode(name, &bytes).map_err(|source| BackupError::Manifest {
        object: name.to_owned(),
        source,
    })
}

/// Writes down what a verification found.
pub(crate) async fn put_note(place: &Place, short: &str, note: &Note) -> Result<(), BackupError> {
    let bytes = serde_json::to_vec(note).unwrap_or_default();
    Ok(place.put(&format!("{VERIFIED}/{short}"), bytes).await?)
}

/// What retention took away.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Swept {
    pub(crate) backups: usize,
    pub(crate) chunks: usize,
    pub(crate) segments: usize,
}

/// Takes away backups beyond what is kept, then what nothing names any more. A manifest that can't be read keeps everything
/// that it may name.
pub(crate) async fn sweep(place: &Place, keep: &Retention, now_ms: i64) -> Result<Swept, BackupError> {
    let listed = list(place).await?;
    let held: Vec<Held> = listed
        .iter()
        .filter_map(|listed| {
            let manifest = listed.manifest.as_ref().ok()?;
            Some(Held {
                name: listed.name.clone(),
                begun_ms: manifest.begun_ms,
                verified: listed.note.as_ref().map(|note| note.good),
            })
        })
        .collect();
    let gone: BTreeSet<String> = doomed(&held, keep, now_ms).into_iter().collect();
    let mut swept = Swept::default();
    for listed in listed.iter().filter(|listed| gone.contains(&listed.name)) {
        // The manifest goes first: what has none is no backup.
        place.delete(&listed.name).await?;
        place.delete(&format!("{VERIFIED}/{}", listed.short)).await?;
        swept.backups += 1;
    }
    let old = |modified_ms: i64, age: Duration| {
        modified_ms < now_ms.saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX))
    };
    for found in place.list(PENDING, None).await? {
        if old(found.modified_ms, CUT_SHORT) {
            place.delete(&found.name).await?;
        } else {
            // It may rest on chunks that nothing names yet.
            return Ok(swept);
        }
    }
    let stays: Vec<&Listed> = listed.iter().filter(|l| !gone.contains(&l.name)).collect();
    if stays.iter().any(|listed| listed.manifest.is_err()) {
        tracing::warn!(
            place = place.url(),
            "a manifest can't be read: chunks are left where they are"
        );
        return Ok(swept);
    }
    let manifests: Vec<&Manifest> = stays.iter().filter_map(|l| l.manifest.as_ref().ok()).collect();
    let named: BTreeSet<&str> = manifests
        .iter()
        .flat_map(|manifest| manifest.pieces())
        .map(|piece| piece.name.as_str())
        .collect();
    for found in place.list(CHUNKS, None).await? {
        if !named.contains(found.name.as_str()) && old(found.modified_ms, GRACE) {
            place.delete(&found.name).await?;
            swept.chunks += 1;
        }
    }
    swept.segments = sweep_log(place, &manifests, keep, &old).await?;
    Ok(swept)
}

/// Takes away the segments that no backup that stays goes on with.
async fn sweep_log(
    place: &Place,
    manifests: &[&Manifest],
    keep: &Retention,
    old: &(dyn Fn(i64, Duration) -> bool + Sync),
) -> Result<usize, BackupError> {
    let mut from: BTreeMap<&str, u64> = BTreeMap::new();
    for manifest in manifests {
        let first = from.entry(&manifest.store_id).or_insert(manifest.position);
        *first = manifest.position.min(*first);
    }
    let mut by_store: BTreeMap<String, Vec<Found>> = BTreeMap::new();
    for found in place.list(LOG, None).await? {
        if let Some(store_id) = found.name.split('/').nth(1) {
            by_store.entry(store_id.to_owned()).or_default().push(found);
        }
    }
    let mut gone = 0;
    for (store_id, segments) in by_store {
        let first = from.get(store_id.as_str());
        // The last shows where to go on.
        for (this, next) in segments.iter().zip(segments.iter().skip(1)) {
            let ends = segment_after(&next.name);
            let unused = match (first, ends) {
                (Some(first), Some(ends)) => ends <= *first,
                (None, _) => keep.max_age.is_some_and(|age| old(this.modified_ms, age)),
                (Some(_), None) => false,
            };
            if unused && old(this.modified_ms, GRACE) {
                place.delete(&this.name).await?;
                gone += 1;
            }
        }
    }
    Ok(gone)
}

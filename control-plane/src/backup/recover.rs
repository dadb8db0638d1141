//! The way back: from a backup and the log after it into an empty store.

use super::catalogue::Listed;
use super::content::{self, CURSOR, Cursor, HEAD, Head, META, RESTORING};
use super::create::hash_entry;
use super::error::BackupError;
use super::format::{self, Entry, Event, Segment};
use super::manifest::{LOG, Manifest, Piece, hex, rfc3339, segment_after, segment_name, sha256};
use super::place::Place;
use super::seal::Opener;
use super::ship::{MAX_SEGMENT, span_of};
use crate::kv::{Kv, KvError, MAX_VALUE, Op, Txn};
use crate::store::StoreError;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use std::io::Write as _;
use std::path::Path;

/// Operations of one transaction, and bytes.
const OPS: usize = 90;
const BYTES: usize = MAX_VALUE;
/// Keys on a page.
const PAGE: usize = 64;

/// Up to where a store is restored.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Until {
    /// Everything that there is.
    Latest,
    /// What a backup shows, and nothing after it; by its short name or the beginning of one.
    Backup(String),
    /// This revision of policy.
    Revision(u64),
    /// What was written up to this time, in milliseconds since 1970.
    Time(i64),
}

/// From what a store is restored.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The backup's name.
    pub(crate) name: String,
    pub(crate) manifest: Manifest,
    pub(crate) until: Until,
}

/// What was restored.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Restored {
    /// Policy's last revision and its time.
    pub(crate) head: Head,
    /// Up to where the log was applied.
    pub(crate) position: u64,
    /// Segments of the log that were applied, at least in part.
    pub(crate) segments: u64,
    /// Keys.
    pub(crate) entries: u64,
    /// The restored store's id.
    pub(crate) store_id: String,
}

/// Chooses the backup to begin with. `store_id` is wanted where a place has backups of several stores.
pub(crate) fn plan(listed: &[Listed], store_id: Option<&str>, until: Until) -> Result<Plan, BackupError> {
    let good = listed.iter().filter_map(|listed| {
        let manifest = listed.manifest.as_ref().ok()?;
        Some((listed, manifest))
    });
    let newest = good.clone().max_by_key(|(_, m)| m.begun_ms);
    let bad = listed.iter().filter(|l| l.manifest.is_err()).count();
    let Some((_, newest)) = newest else {
        return Err(BackupError::Nothing(match bad {
            0 => "there is no backup".to_owned(),
            bad => format!("there is no backup but {bad} whose manifest is no good"),
        }));
    };
    let store_id = store_id.unwrap_or(&newest.store_id);
    let of_store = good.filter(|(_, m)| m.store_id == store_id);
    let chosen = match &until {
        Until::Latest => of_store.clone().max_by_key(|(_, m)| m.position),
        Until::Revision(revision) => of_store
            .clone()
            .filter(|(_, m)| m.revision <= *revision)
            .max_by_key(|(_, m)| m.position),
        Until::Time(ms) => of_store
            .clone()
            .filter(|(_, m)| m.ended_ms <= *ms)
            .max_by_key(|(_, m)| m.position),
        Until::Backup(short) => {
            let named: Vec<_> = listed.iter().filter(|l| l.short.starts_with(short)).collect();
            match named.as_slice() {
                [one] => {
                    let manifest = match &one.manifest {
                        Ok(manifest) => manifest,
                        Err(error) => {
                            return Err(BackupError::Nothing(format!("{}: {}", one.short, error.chain())));
                        }
                    };
                    Some((*one, manifest))
                }
                [] => return Err(BackupError::Nothing(format!("there is no backup {short}"))),
                many => {
                    return Err(BackupError::Nothing(format!(
                        "{} backups begin with {short}; give more of the name",
                        many.len()
                    )));
                }
            }
        }
    };
    let Some((listed, manifest)) = chosen else {
        let oldest = of_store.min_by_key(|(_, m)| m.position).map(|(_, m)| {
            format!(
                "; the oldest is of revision {}, made {}",
                m.revision,
                rfc3339(m.ended_ms)
            )
        });
        return Err(BackupError::Nothing(format!(
            "there is no backup of store {store_id} from before that{}",
            oldest.unwrap_or_default()
        )));
    };
    Ok(Plan {
        name: listed.name.clone(),
        manifest: manifest.clone(),
        until,
    })
}

/// Refuses what a restore that was cut short has left.
///
/// # Errors
///
/// If there is such a thing, or the store can't be reached.
pub async fn refuse_unfinished(kv: &Kv) -> Result<(), StoreError> {
    if kv.get(RESTORING).await?.is_some() {
        return Err(StoreError::Damaged(
            "a restore into it was cut short: restore again".to_owned(),
        ));
    }
    Ok(())
}

/// Reads what a plan is made of.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    pub(crate) place: &'a Place,
    pub(crate) opener: &'a Opener,
}

impl Reader<'_> {
    /// An object that a manifest names, compared with what it says.
    pub(crate) async fn piece(&self, piece: &Piece) -> Result<Vec<u8>, BackupError> {
        let sealed = self.sealed(piece).await?;
        self.opener.open(&sealed).map_err(|source| BackupError::Seal {
            object: piece.name.clone(),
            source,
        })
    }

    /// The same without opening it.
    pub(crate) async fn sealed(&self, piece: &Piece) -> Result<Bytes, BackupError> {
        let bytes = self.place.get(&piece.name, MAX_SEGMENT).await?;
        let found = sha256(&bytes);
        if bytes.len() as u64 != piece.size || found != piece.sha256 {
            return Err(BackupError::Piece {
                object: piece.name.clone(),
                found: format!("{} bytes with hash {found}", bytes.len()),
                wanted: format!("{} bytes with hash {}", piece.size, piece.sha256),
            });
        }
        Ok(bytes)
    }

    pub(crate) async fn chunk(&self, piece: &Piece) -> Result<Vec<Entry>, BackupError> {
        let bytes = self.piece(piece).await?;
        format::decode_chunk(&bytes).map_err(|source| BackupError::Format {
            object: piece.name.clone(),
            source,
        })
    }

    pub(crate) async fn tail(&self, piece: &Piece) -> Result<Segment, BackupError> {
        let bytes = self.piece(piece).await?;
        format::decode_segment(&bytes).map_err(|source| BackupError::Format {
            object: piece.name.clone(),
            source,
        })
    }

    /// The segment of the log that goes on from a position, if there is one.
    pub(crate) async fn after(
        &self,
        names: &[String],
        store_id: &str,
        position: u64,
    ) -> Result<Option<(String, Segment)>, BackupError> {
        // The last that begins there or before.
        let at = names.partition_point(|name| segment_after(name).is_some_and(|after| after <= position));
        let Some(name) = at.checked_sub(1).and_then(|at| names.get(at)) else {
            return Ok(None);
        };
        let sealed = self.place.get(name, MAX_SEGMENT).await?;
        let span = span_of(name, &sealed)?;
        if span.to <= position {
            return Ok(None);
        }
        let bytes = self.opener.open(&sealed).map_err(|source| BackupError::Seal {
            object: name.clone(),
            source,
        })?;
        let segment = format::decode_segment(&bytes).map_err(|source| BackupError::Format {
            object: name.clone(),
            source,
        })?;
        let named = segment_after(name);
        if segment.store_id != store_id
            || Some(segment.after) != named
            || (segment.after, segment.to) != (span.after, span.to)
        {
            return Err(BackupError::Content {
                object: name.clone(),
                what: "holds another stretch of the log than its name and head say".to_owned(),
            });
        }
        Ok(Some((name.clone(), segment)))
    }

    /// The same, without those that are over before a position.
    pub(crate) async fn segments_after(
        &self,
        store_id: &str,
        position: u64,
    ) -> Result<Vec<String>, BackupError> {
        // The one that begins there, or one that begins a little before: two leaders may have shipped at once.
        let from = segment_name(store_id, position.saturating_sub(10_000));
        let found = self.place.list(&format!("{LOG}/{store_id}"), Some(&from)).await?;
        Ok(found.into_iter().map(|found| found.name).collect())
    }

    /// The names of a store's segments, in order.
    pub(crate) async fn segments(&self, store_id: &str) -> Result<Vec<String>, BackupError> {
        let found = self.place.list(&format!("{LOG}/{store_id}"), None).await?;
        Ok(found.into_iter().map(|found| found.name).collect())
    }
}

/// Writes to a store that nobody else uses yet.
pub(crate) struct Writer<'a> {
    kv: &'a Kv,
    txn: Txn,
    bytes: usize,
    head: Head,
    /// Kept for last: what has none is no store.
    meta: Option<Bytes>,
    /// What it follows, if it does, and up to where that goes with the next transaction.
    follows: Option<Cursor>,
}

impl<'a> Writer<'a> {
    /// Begins in an empty store.
    pub(crate) async fn begin(kv: &'a Kv) -> Result<Self, BackupError> {
        if kv.get(RESTORING).await?.is_some() {
            // It was never a store: what is there is of a restore that was cut short.
            clear(kv).await?;
        }
        let page = kv.keys("", None, PAGE).await?;
        let there = page.entries.iter().map(|entry| &entry.key);
        if let Some(key) = there.clone().find(|key| content::is_kept(key)) {
            return Err(BackupError::NotEmpty(format!(
                "the store has something already, such as the key {key}: restore into an empty one, or give --replace"
            )));
        }
        write(kv, Txn::default().put(RESTORING, "begun")).await?;
        Ok(Self::on(kv))
    }

    /// Goes on with what is there.
    pub(crate) fn on(kv: &'a Kv) -> Self {
        Self {
            kv,
            txn: Txn::default(),
            bytes: 0,
            head: Head::default(),
            meta: None,
            follows: None,
        }
    }

    /// Follows a store: each transaction says up to where.
    pub(crate) fn following(kv: &'a Kv, store_id: &str) -> Self {
        Self {
            follows: Some(Cursor {
                store_id: store_id.to_owned(),
                position: 0,
            }),
            ..Self::on(kv)
        }
    }

    /// Says that what was put goes up to a position.
    pub(crate) const fn at(&mut self, position: u64) {
        if let Some(cursor) = &mut self.follows {
            cursor.position = position;
        }
    }

    /// Puts what one transaction of the store did, in one, if it is not too large.
    pub(crate) async fn step(&mut self, events: &[Event]) -> Result<(), BackupError> {
        let size: usize = events.iter().map(size).sum();
        if self.txn.ops.len() + events.len() > OPS || self.bytes + size > BYTES {
            self.flush().await?;
        }
        for event in events {
            self.put(&event.key, event.value.as_ref()).await?;
        }
        if let Some(last) = events.last() {
            self.at(last.position);
        }
        Ok(())
    }

    pub(crate) async fn put(&mut self, key: &str, value: Option<&Bytes>) -> Result<(), BackupError> {
        if !content::is_kept(key) {
            return Ok(());
        }
        match (key, value) {
            (META, value) => {
                self.meta = value.cloned();
                return Ok(());
            }
            (HEAD, Some(value)) => {
                self.head = content::head(value).ok_or_else(|| BackupError::Content {
                    object: format!("the key {HEAD}"),
                    what: "can't be read".to_owned(),
                })?;
            }
            _ => {}
        }
        let size = key.len() + value.map_or(0, Bytes::len);
        // A key stands once in a transaction.
        let again = self.txn.ops.iter().any(|op| writes(op, key));
        if again || self.txn.ops.len() >= OPS || (self.bytes + size > BYTES && self.bytes > 0) {
            self.flush().await?;
        }
        self.bytes += size;
        let txn = std::mem::take(&mut self.txn);
        self.txn = match value {
            Some(value) => txn.put(key, value.clone()),
            None => txn.delete(key),
        };
        Ok(())
    }

    pub(crate) async fn flush(&mut self) -> Result<(), BackupError> {
        self.bytes = 0;
        let txn = std::mem::take(&mut self.txn);
        let (txn, follows) = match &self.follows {
            None => (txn, false),
            Some(cursor) if cursor.position == 0 => (txn, true),
            Some(cursor) => (txn.put(CURSOR, cursor.render()), true),
        };
        if txn.ops.is_empty() {
            return Ok(());
        }
        if follows {
            // Whoever asks for it again finds the cursor where it was, and does the same again.
            self.kv.follow(txn).await?;
            return Ok(());
        }
        write(self.kv, txn).await
    }

    pub(crate) const fn head(&self) -> Head {
        self.head
    }

    /// Says which store it is, under an id of its own or the one that it had: from here on it is one.
    pub(crate) async fn finish(mut self, id: Option<&str>, position: u64) -> Result<String, BackupError> {
        self.flush().await?;
        let damaged = || BackupError::Content {
            object: format!("the key {META}"),
            what: "is not in the backup, or can't be read".to_owned(),
        };
        let meta = self.meta.ok_or_else(damaged)?;
        let (was, _) = content::meta(&meta).ok_or_else(damaged)?;
        let id = id.unwrap_or(&was).to_owned();
        let meta = if id == was {
            meta
        } else {
            content::meta_with_id(&meta, &id).ok_or_else(damaged)?.into()
        };
        let cursor = Cursor {
            store_id: was,
            position,
        };
        let txn = Txn::default()
            .put(META, meta)
            .put(CURSOR, cursor.render())
            .delete(RESTORING);
        write(self.kv, txn).await?;
        Ok(id)
    }
}

fn size(event: &Event) -> usize {
    event.key.len() + event.value.as_ref().map_or(0, Bytes::len)
}

fn writes(op: &Op, wanted: &str) -> bool {
    match op {
        Op::Put { key, .. } | Op::Delete(key) => key == wanted,
        Op::DeletePrefix(prefix) => wanted.starts_with(prefix),
    }
}

/// Takes everything away, what says that it is no store last.
async fn clear(kv: &Kv) -> Result<(), BackupError> {
    loop {
        let page = kv.keys("", None, OPS).await?;
        let keys = page.entries.into_iter().map(|entry| entry.key);
        let keys: Vec<String> = keys.filter(|key| key != RESTORING).collect();
        if keys.is_empty() {
            return write(kv, Txn::default().delete(RESTORING)).await;
        }
        write(kv, keys.into_iter().fold(Txn::default(), Txn::delete)).await?;
    }
}

/// A write of which it makes no difference whether it is done twice.
async fn write(kv: &Kv, txn: Txn) -> Result<(), BackupError> {
    match kv.txn(txn.clone()).await {
        Err(KvError::Unknown { .. }) => kv.txn(txn).await?,
        done => done?,
    };
    Ok(())
}

/// Restores by a plan into an empty store, which has the id `id` then, or the one that it had.
pub(crate) async fn restore(
    kv: &Kv,
    reader: &Reader<'_>,
    plan: &Plan,
    id: Option<&str>,
) -> Result<Restored, BackupError> {
    let manifest = &plan.manifest;
    let mut writer = Writer::begin(kv).await?;
    chunks(&mut writer, reader, manifest).await?;
    tail(&mut writer, reader, manifest).await?;
    let base = writer.head();
    if base.revision != manifest.revision {
        return Err(BackupError::Content {
            object: plan.name.clone(),
            what: format!(
                "says revision {}, and what it names is at {}",
                manifest.revision, base.revision
            ),
        });
    }
    let (position, segments) = match plan.until {
        Until::Backup(_) => (manifest.position, 0),
        Until::Latest | Until::Revision(_) | Until::Time(_) => replay(&mut writer, reader, plan).await?,
    };
    if let Until::Revision(wanted) = plan.until
        && writer.head().revision != wanted
    {
        return Err(BackupError::Nothing(format!(
            "revision {wanted} is in no backup and not in the log: the last before it is {}",
            writer.head().revision
        )));
    }
    let head = writer.head();
    writer.flush().await?;
    let entries = dense(kv, head).await?;
    let store_id = writer.finish(id, position).await?;
    Ok(Restored {
        head,
        position,
        segments,
        entries,
        store_id,
    })
}

/// Writes a backup's chunks, and compares what they hold with what the manifest says.
pub(crate) async fn chunks(
    writer: &mut Writer<'_>,
    reader: &Reader<'_>,
    manifest: &Manifest,
) -> Result<(), BackupError> {
    let (mut hash, mut count, mut last) = (Sha256::new(), 0u64, None::<String>);
    for piece in &manifest.chunks {
        for Entry { key, value } in reader.chunk(piece).await? {
            if last.as_ref().is_some_and(|last| *last >= key) {
                return Err(BackupError::Content {
                    object: piece.name.clone(),
                    what: format!("the key {key} is out of order"),
                });
            }
            hash_entry(&mut hash, &key, &value);
            count += 1;
            writer.put(&key, Some(&value)).await?;
            last = Some(key);
        }
    }
    let found = hex(&hash.finalize());
    if found != manifest.content_sha256 || count != manifest.entries {
        return Err(BackupError::Content {
            object: "the chunks together".to_owned(),
            what: format!(
                "have {count} entries with hash {found}, and the manifest says {} with {}",
                manifest.entries, manifest.content_sha256
            ),
        });
    }
    Ok(())
}

/// Puts on top what changed while the chunks were read.
pub(crate) async fn tail(
    writer: &mut Writer<'_>,
    reader: &Reader<'_>,
    manifest: &Manifest,
) -> Result<(), BackupError> {
    let mut at = 0;
    for piece in &manifest.tail {
        let segment = reader.tail(piece).await?;
        if segment.store_id != manifest.store_id || segment.after < at || segment.to > manifest.position {
            return Err(BackupError::Content {
                object: piece.name.clone(),
                what: "does not belong where the manifest has it".to_owned(),
            });
        }
        at = segment.to;
        for event in &segment.events {
            writer.put(&event.key, event.value.as_ref()).await?;
        }
    }
    writer.flush().await
}

/// Applies the log after the backup. Says up to where, and how many segments that took.
async fn replay(
    writer: &mut Writer<'_>,
    reader: &Reader<'_>,
    plan: &Plan,
) -> Result<(u64, u64), BackupError> {
    let store_id = &plan.manifest.store_id;
    let names = reader.segments(store_id).await?;
    let (mut position, mut segments) = (plan.manifest.position, 0);
    while let Some((_, segment)) = reader.after(&names, store_id, position).await? {
        segments += 1;
        let new = segment.events.iter().skip_while(|e| e.position <= position);
        let new: Vec<&Event> = new.collect();
        for step in new.chunk_by(|a, b| a.position == b.position) {
            if is_beyond(step, &plan.until) {
                writer.flush().await?;
                return Ok((position, segments));
            }
            for event in step {
                writer.put(&event.key, event.value.as_ref()).await?;
            }
            position = step.last().map_or(position, |event| event.position);
        }
        position = position.max(segment.to);
    }
    writer.flush().await?;
    Ok((position, segments))
}

/// Whether a transaction is after what was asked for.
fn is_beyond(step: &[&Event], until: &Until) -> bool {
    let head = step.iter().find(|event| event.key == HEAD);
    let head = head.and_then(|event| content::head(event.value.as_ref()?));
    match until {
        Until::Latest => false,
        Until::Backup(_) => true,
        Until::Revision(revision) => head.is_some_and(|head| head.revision > *revision),
        Until::Time(ms) => match head {
            Some(head) => head.time_ms > *ms,
            None => step.iter().any(|event| event.seen_ms > *ms),
        },
    }
}

/// Every record of policy that must be there is. Says how many keys there are.
pub(crate) async fn dense(kv: &Kv, head: Head) -> Result<u64, BackupError> {
    let number = |key: &str| u64::from_str_radix(key.rsplit('/').next()?, 16).ok();
    let (mut count, mut after, mut last) = (0, None::<String>, None::<u64>);
    loop {
        let page = kv.keys("", after.as_deref(), 1000).await?;
        for entry in &page.entries {
            count += 1;
            let Some(found) = entry.key.strip_prefix("rev/").and_then(|_| number(&entry.key)) else {
                continue;
            };
            if last.is_some_and(|last| last + 1 != found) {
                return Err(BackupError::Content {
                    object: "the log".to_owned(),
                    what: format!("goes from revision {} to {found}", last.unwrap_or(0)),
                });
            }
            last = Some(found);
        }
        after = page.entries.last().map(|entry| entry.key.clone());
        if !page.more {
            break;
        }
    }
    if last.unwrap_or(0) != head.revision && head.revision > 0 {
        return Err(BackupError::Content {
            object: "the log".to_owned(),
            what: format!(
                "ends at revision {}, and head is {}",
                last.unwrap_or(0),
                head.revision
            ),
        });
    }
    Ok(count)
}

/// Writes the certificate authority of a backup into a directory, for its owner only. What is there stays.
pub(crate) async fn restore_authority(
    reader: &Reader<'_>,
    manifest: &Manifest,
    dir: &Path,
) -> Result<(), BackupError> {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    let Some(piece) = &manifest.authority else {
        return Err(BackupError::Nothing(
            "the backup has no certificate authority: it was made without --include-ca".to_owned(),
        ));
    };
    let archive = reader.piece(piece).await?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(BackupError::file("make", dir))?;
    let mut archive = tar::Archive::new(archive.as_slice());
    let bad = |what: String| BackupError::Content {
        object: piece.name.clone(),
        what,
    };
    for entry in archive.entries().map_err(|e| bad(e.to_string()))? {
        let mut entry = entry.map_err(|e| bad(e.to_string()))?;
        let name = entry.path().map_err(|e| bad(e.to_string()))?.into_owned();
        if name.components().count() != 1 || name.extension().is_none_or(|e| e != "pem") {
            return Err(bad(format!("{} is no file of an authority", name.display())));
        }
        let path = dir.join(&name);
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).map_err(|e| bad(e.to_string()))?;
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
            .map_err(BackupError::file("write", &path))?;
    }
    Ok(())
}

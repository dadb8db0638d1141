//! The mirror follows what is written, by whichever control plane.

use super::format::{self, HEAD, Head, Log, wire};
use super::mirror::Mirror;
use super::{Inner, Record, SCHEMA, StoreError, history, snapshot, token};
use crate::kv::{Kv, KvError, Txn, WatchError};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

pub(super) const META: &str = "meta";
/// Times that a store is read anew which changes while it is read.
const MAX_LOADS: u32 = 10;
/// Pause after a failure: a random part of this.
const PAUSE: Duration = Duration::from_secs(1);

/// What `meta` says.
#[derive(Debug)]
pub(super) struct Meta {
    pub(super) id: String,
    pub(super) modified: u64,
    pub(super) read_only: Option<u64>,
}

/// Reads `meta`, and begins a store where there is none.
pub(super) async fn meta(kv: &Kv) -> Result<Meta, StoreError> {
    loop {
        if let Some(entry) = kv.get(META).await? {
            let object = format::object(META, &entry.value)?;
            let number = |name: &str| object.get(name).and_then(Value::as_u64);
            let id = object.get("id").and_then(Value::as_str);
            let (Some(id), Some(found), Some(readable_from)) = (id, number("schema"), number("readableFrom"))
            else {
                return Err(StoreError::Damaged(
                    "the key meta has no id, schema and readableFrom".to_owned(),
                ));
            };
            if readable_from > SCHEMA {
                return Err(StoreError::Schema { found, readable_from });
            }
            return Ok(Meta {
                id: id.to_owned(),
                modified: entry.modified,
                read_only: (found > SCHEMA).then_some(found),
            });
        }
        let txn = Txn::default().when(META, 0).put(META, new_meta(&token()));
        match kv.txn(txn).await {
            // Read it, whoever wrote it.
            Ok(_) | Err(KvError::Unknown { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// `meta` of a store of this build.
pub(super) fn new_meta(id: &str) -> String {
    json!({"id": id, "schema": SCHEMA, "readableFrom": super::READABLE_FROM}).to_string()
}

/// Follows until the store is closed.
pub(super) async fn run(inner: Arc<Inner>) {
    let mut from = inner.mirror().head.modified + 1;
    loop {
        let mut watch = inner.kv.watch(HEAD, from);
        let mut failing = false;
        loop {
            if let Err(error) = inner.settle().await {
                if !failing {
                    tracing::warn!(%error, "can't follow what is written; what is in memory stays");
                }
                failing = true;
                tokio::select! {
                    () = inner.stop.cancelled() => return,
                    () = tokio::time::sleep(PAUSE.mul_f64(0.5 + fastrand::f64())) => continue,
                }
            }
            if failing {
                tracing::info!(revision = inner.mirror().head.revision, "following again");
                failing = false;
            }
            let told = tokio::select! {
                () = inner.stop.cancelled() => return,
                told = watch.next() => told,
                // A watch can die without a word.
                () = tokio::time::sleep(inner.every), if inner.kv.is_shared() => Ok(Vec::new()),
            };
            match told {
                Ok(_) => from = from.max(inner.mirror().head.modified + 1),
                Err(WatchError::Compacted(revision)) => {
                    from = from.max(revision + 1);
                    break;
                }
                Err(WatchError::Lost(error)) => {
                    tracing::debug!(%error, "a watch was lost");
                    tokio::select! {
                        () = inner.stop.cancelled() => return,
                        () = tokio::time::sleep(PAUSE.mul_f64(fastrand::f64())) => break,
                    }
                }
            }
        }
    }
}

impl Inner {
    /// Waits until the mirror has everything that is acknowledged now.
    pub(super) async fn settle(&self) -> Result<(), StoreError> {
        let there = self.kv.get(HEAD).await?.map_or(0, |entry| entry.modified);
        if self.mirror().head.modified >= there {
            return Ok(());
        }
        let _following = self.following.lock().await;
        self.follow().await
    }

    /// Reads what is new. Whoever calls this holds `following`.
    pub(super) async fn follow(&self) -> Result<(), StoreError> {
        let head = Head::read(self.kv.get(HEAD).await?.as_ref())?;
        let (mut revision, mut levels, modified) = {
            let mirror = self.mirror();
            (mirror.head.revision, mirror.head.levels, mirror.head.modified)
        };
        if head.modified == modified {
            return Ok(());
        }
        if head.revision < revision || head.levels < levels {
            tracing::error!(
                from = revision,
                to = head.revision,
                "the store has gone back, as after a restore; what is in memory is read anew"
            );
            return self.load().await;
        }
        while revision < head.revision {
            let (headers, more) = history::page(&self.kv, Log::Policy, revision).await?;
            for header in headers {
                if header.number > head.revision {
                    break;
                }
                if header.number != revision + 1 {
                    return self.load().await;
                }
                let (record, foreign) = history::read(&self.kv, header).await?;
                revision = record.revision;
                self.mirror_mut().apply(Arc::new(record), foreign);
            }
            if !more && revision < head.revision {
                return self.load().await;
            }
        }
        while levels < head.levels {
            let (headers, more) = history::page(&self.kv, Log::Levels, levels).await?;
            for header in headers {
                if header.number > head.levels {
                    break;
                }
                if header.number != levels + 1 {
                    return self.load().await;
                }
                levels = header.number;
                let (header, writes) = read_levels(&self.kv, header).await?;
                self.mirror_mut()
                    .apply_levels(levels, header.first_line, header.time_ms, writes);
            }
            if !more && levels < head.levels {
                return self.load().await;
            }
        }
        self.mirror_mut().head = head;
        self.tell();
        Ok(())
    }

    /// Reads everything anew.
    pub(super) async fn reload(&self) -> Result<(), StoreError> {
        let _following = self.following.lock().await;
        self.load().await
    }

    async fn load(&self) -> Result<(), StoreError> {
        let mut why = String::new();
        for _ in 0..MAX_LOADS {
            match self.try_load().await {
                Ok(mirror) => {
                    *self.mirror_mut() = mirror;
                    self.tell();
                    return Ok(());
                }
                // Records that were there a moment ago may be forgotten now, and a snapshot be in their place.
                Err(StoreError::Damaged(reason)) => why = reason,
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::Damaged(why))
    }

    async fn try_load(&self) -> Result<Mirror, StoreError> {
        let mut mirror = None;
        for manifest in snapshot::list(&self.kv).await?.iter().rev() {
            match snapshot::load(&self.kv, manifest, self.bounds).await {
                Ok(Some(loaded)) => {
                    mirror = Some(loaded);
                    break;
                }
                Ok(None) => {}
                Err(StoreError::Damaged(reason)) => {
                    tracing::error!(reason, "a snapshot can't be used; an older one is taken");
                }
                Err(error) => return Err(error),
            }
        }
        let compacted = snapshot::compacted(&self.kv).await?;
        let mut mirror = mirror.unwrap_or_else(|| Mirror::new(self.bounds));
        if mirror.head.revision < compacted {
            return Err(StoreError::Damaged(format!(
                "records up to revision {compacted} are forgotten, and no snapshot of that or later can be used"
            )));
        }
        let head = Head::read(self.kv.get(HEAD).await?.as_ref())?;
        let mut after = 0;
        loop {
            let (headers, more) = history::page(&self.kv, Log::Levels, after).await?;
            for header in headers {
                after = header.number;
                if after > head.levels {
                    break;
                }
                let (header, writes) = read_levels(&self.kv, header).await?;
                if after <= mirror.head.levels {
                    mirror.add_lines(header.first_line, header.time_ms, writes.changes);
                } else if after == mirror.head.levels + 1 {
                    mirror.apply_levels(after, header.first_line, header.time_ms, writes);
                } else {
                    return Err(missing(Log::Levels, mirror.head.levels + 1));
                }
            }
            if !more || after > head.levels {
                break;
            }
        }
        while mirror.head.revision < head.revision {
            let (headers, _) = history::page(&self.kv, Log::Policy, mirror.head.revision).await?;
            if headers.is_empty() {
                return Err(missing(Log::Policy, mirror.head.revision + 1));
            }
            for header in headers {
                if header.number > head.revision {
                    break;
                }
                if header.number != mirror.head.revision + 1 {
                    return Err(missing(Log::Policy, mirror.head.revision + 1));
                }
                let (record, foreign): (Record, _) = history::read(&self.kv, header).await?;
                mirror.apply(Arc::new(record), foreign);
            }
        }
        if mirror.head.levels < head.levels {
            return Err(missing(Log::Levels, mirror.head.levels + 1));
        }
        mirror.head = head;
        Ok(mirror)
    }
}

fn missing(log: Log, number: u64) -> StoreError {
    StoreError::Damaged(format!("there is no {}", log.key(number)))
}

pub(super) async fn read_levels(
    kv: &Kv,
    mut header: wire::Header,
) -> Result<(wire::Header, super::LevelWrites), StoreError> {
    let body = format::body(kv, Log::Levels, &mut header).await?;
    let levels = format::decode(&Log::Levels.key(header.number), &body)?;
    Ok((header, format::level_writes(levels)))
}

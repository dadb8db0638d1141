//! Makes a backup: everything in the store, read while it is written to.
//!
//! Keys are read page by page, and what changes meanwhile is watched. The chunks together with these changes are the store
//! at the position where the watch was when the last page had been read. One chunk is in memory at a time.

use super::chunker::Chunker;
use super::content::{self, HEAD, Head, MARK, META, SALT};
use super::error::BackupError;
use super::format::{self, Entry, Segment};
use super::manifest::{CHUNKS, FORMAT, Manifest, PENDING, Piece, chunk_id, chunk_name, hex, sha256, stamp};
use super::place::{Found, Place, PlaceError};
use super::seal::Sealer;
use crate::kv::{self, Kv, Step, Txn, Watch, WatchError};
use crate::store::{Clock, Store};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::Read as _;
use std::time::Duration;

/// Keys on a page. A value has at most 1 MiB, most have a thousandth.
const PAGE: usize = 64;
/// Bytes of changes from which on they are stored, while keys are read.
const TAIL: usize = 1 << 20;
/// How long the watch may take to show what was written.
const CATCH_UP: Duration = Duration::from_secs(30);

/// A backup that was made.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    /// The manifest's name.
    pub(crate) name: String,
    pub(crate) manifest: Manifest,
    /// Objects that were there already.
    pub(crate) reused: usize,
    /// Bytes that were stored for it.
    pub(crate) written: u64,
}

/// Makes a backup of a store. `authority` is put beside it, as it is given; `is_held` says whether this control plane is
/// still the one to make it.
pub(crate) async fn create(
    store: &Store,
    place: &Place,
    sealer: &Sealer,
    authority: Option<Vec<u8>>,
    is_held: impl Fn() -> bool + Sync,
) -> Result<Made, BackupError> {
    let clock = Clock::System;
    let begun_ms = clock.now_ms();
    let pending = format!("{PENDING}/{}-{:016x}", stamp(begun_ms), fastrand::u64(..));
    place.put(&pending, Vec::new()).await?;
    let made = Maker::new(store.kv(), place, sealer)
        .await?
        .run(begun_ms, authority, is_held)
        .await;
    // Whether it is whole does not hang on this; one that stays is old one day.
    if let Err(error) = place.delete(&pending).await {
        tracing::warn!(%error, "can't take away the sign that a backup is being made");
    }
    made
}

/// A value that nobody can guess, made once for each store.
async fn salt(kv: &Kv) -> Result<Vec<u8>, BackupError> {
    let mut new = [0u8; 32];
    let path = "/dev/urandom";
    std::fs::File::open(path)
        .and_then(|mut file| file.read_exact(&mut new))
        .map_err(BackupError::file("read", path))?;
    let salt = kv.update(SALT, |found| match found {
        Some(value) => Step::Leave(value.to_vec()),
        None => Step::Put(hex(&new).into_bytes(), hex(&new).into_bytes()),
    });
    Ok(salt.await?)
}

/// Stores pieces under names that tell what they are, once.
pub(crate) struct Depot<'a> {
    place: &'a Place,
    sealer: &'a Sealer,
    key: [u8; 32],
    there: HashMap<String, (String, u64)>,
    pub(crate) reused: usize,
    pub(crate) written: u64,
}

impl<'a> Depot<'a> {
    pub(crate) async fn new(place: &'a Place, sealer: &'a Sealer, salt: &[u8]) -> Result<Self, BackupError> {
        // To others it is something else, whatever is in it.
        let recipients = Sha256::digest(sealer.recipients().join("\n"));
        let mut key = Sha256::new();
        key.update(Sha256::digest(salt));
        key.update(recipients);
        let there = place.list(CHUNKS, None).await?;
        let there = there.into_iter().filter_map(|Found { name, size, .. }| {
            let id = chunk_id(&name)?.to_owned();
            Some((id, (name, size)))
        });
        Ok(Self {
            place,
            sealer,
            key: key.finalize().into(),
            there: there.collect(),
            reused: 0,
            written: 0,
        })
    }

    pub(crate) async fn store(&mut self, content: Vec<u8>) -> Result<Piece, BackupError> {
        let mut id = Sha256::new();
        id.update(self.key);
        id.update(Sha256::digest(&content));
        let id = hex(&id.finalize());
        let id = id.get(..40).unwrap_or_default().to_owned();
        if let Some((name, size)) = self.there.get(&id)
            && let Some((_, sealed)) = name.rsplit_once('-')
        {
            self.reused += 1;
            return Ok(Piece {
                name: name.clone(),
                size: *size,
                sha256: sealed.to_owned(),
            });
        }
        let sealer = self.sealer.clone();
        let sealed = blocking(move || sealer.seal(&[], &content)).await??;
        let (sha256, size) = (sha256(&sealed), sealed.len() as u64);
        let name = chunk_name(&id, &sha256);
        self.place.put(&name, sealed).await?;
        self.written += size;
        self.there.insert(id, (name.clone(), size));
        Ok(Piece { name, size, sha256 })
    }
}

/// Off the runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    act: impl FnOnce() -> T + Send + 'static,
) -> Result<T, BackupError> {
    tokio::task::spawn_blocking(act)
        .await
        .map_err(|_| BackupError::Broken)
}

struct Maker<'a> {
    kv: &'a Kv,
    place: &'a Place,
    depot: Depot<'a>,
    watch: Watch,
    /// Up to where the tail is stored.
    stored_to: u64,
    tail: Vec<format::Event>,
    tail_bytes: usize,
    tail_pieces: Vec<Piece>,
    chunks: Vec<Piece>,
    content: Sha256,
    entries: u64,
    bytes: u64,
    meta: Option<(String, u64)>,
    head: Option<Head>,
}

impl<'a> Maker<'a> {
    async fn new(kv: &'a Kv, place: &'a Place, sealer: &'a Sealer) -> Result<Self, BackupError> {
        let salt = salt(kv).await?;
        let depot = Depot::new(place, sealer, &salt).await?;
        let start = kv.keys("", None, 1).await?.revision;
        Ok(Self {
            kv,
            place,
            depot,
            watch: kv.watch("", start + 1),
            stored_to: start,
            tail: Vec::new(),
            tail_bytes: 0,
            tail_pieces: Vec::new(),
            chunks: Vec::new(),
            content: Sha256::new(),
            entries: 0,
            bytes: 0,
            meta: None,
            head: None,
        })
    }

    async fn run(
        mut self,
        begun_ms: i64,
        authority: Option<Vec<u8>>,
        is_held: impl Fn() -> bool + Sync,
    ) -> Result<Made, BackupError> {
        let mut chunker = Chunker::default();
        let mut after: Option<String> = None;
        loop {
            let page = self.kv.range("", after.as_deref(), PAGE).await?;
            for entry in page.entries {
                after = Some(entry.key.clone());
                if !content::is_kept(&entry.key) {
                    continue;
                }
                self.note(&entry.key, Some(&entry.value));
                let (key, value) = (entry.key, entry.value);
                if let Some(full) = chunker.push(Entry { key, value }) {
                    self.chunk(&full).await?;
                }
            }
            // What has come meanwhile is taken in, so that the watch never falls behind.
            while let Ok(told) = tokio::time::timeout(Duration::ZERO, self.watch.next()).await {
                self.told(told).await?;
            }
            if !is_held() {
                return Err(BackupError::Lost);
            }
            if !page.more {
                break;
            }
        }
        if let Some(last) = chunker.finish() {
            self.chunk(&last).await?;
        }
        let position = self.catch_up().await?;
        self.store_tail(position).await?;
        let authority = match authority {
            None => None,
            Some(authority) => Some(self.depot.store(authority).await?),
        };
        let Some((store_id, schema)) = self.meta.clone() else {
            return Err(BackupError::Nothing(
                "the store does not say which it is".to_owned(),
            ));
        };
        let manifest = Manifest {
            format: FORMAT,
            begun_ms,
            ended_ms: Clock::System.now_ms(),
            store_id,
            revision: self.head.unwrap_or_default().revision,
            position,
            schema,
            tool: format!("leeward-control {}", env!("CARGO_PKG_VERSION")),
            recipients: self.depot.sealer.recipients(),
            entries: self.entries,
            bytes: self.bytes,
            content_sha256: hex(&self.content.clone().finalize()),
            chunks: std::mem::take(&mut self.chunks),
            tail: std::mem::take(&mut self.tail_pieces),
            authority,
        };
        self.check(&manifest).await?;
        if !is_held() {
            return Err(BackupError::Lost);
        }
        let (name, bytes) = manifest.encode();
        self.place.create(&name, bytes).await?;
        Ok(Made {
            name,
            manifest,
            reused: self.depot.reused,
            written: self.depot.written,
        })
    }

    /// Whatever was there before may have gone since it was looked up.
    async fn check(&self, manifest: &Manifest) -> Result<(), BackupError> {
        let there = self.place.list(CHUNKS, None).await?;
        let there: HashMap<&str, u64> = there.iter().map(|f| (f.name.as_str(), f.size)).collect();
        for piece in manifest.pieces() {
            match there.get(piece.name.as_str()) {
                Some(size) if *size == piece.size => {}
                Some(size) => {
                    return Err(BackupError::Piece {
                        object: piece.name.clone(),
                        found: format!("{size} bytes"),
                        wanted: format!("{} bytes", piece.size),
                    });
                }
                None => {
                    let name = piece.name.clone();
                    return Err(PlaceError::Missing { name }.into());
                }
            }
        }
        Ok(())
    }

    async fn chunk(&mut self, entries: &[Entry]) -> Result<(), BackupError> {
        let bytes = format::encode_chunk(entries);
        for entry in entries {
            hash_entry(&mut self.content, &entry.key, &entry.value);
            self.entries += 1;
            self.bytes += (entry.key.len() + entry.value.len()) as u64;
        }
        let piece = self.depot.store(bytes).await?;
        self.chunks.push(piece);
        Ok(())
    }

    fn note(&mut self, key: &str, value: Option<&[u8]>) {
        match (key, value) {
            (META, Some(value)) => self.meta = content::meta(value),
            (HEAD, Some(value)) => self.head = content::head(value),
            _ => {}
        }
    }

    async fn told(&mut self, told: Result<Vec<kv::Event>, WatchError>) -> Result<u64, BackupError> {
        let events = told.map_err(watch_error)?;
        let mut last = 0;
        let seen_ms = Clock::System.now_ms();
        for event in events {
            let (position, event) = convert(event, seen_ms);
            last = position;
            let Some(event) = event else { continue };
            self.note(&event.key, event.value.as_deref());
            self.tail_bytes += event.key.len() + event.value.as_ref().map_or(0, bytes::Bytes::len);
            self.tail.push(event);
        }
        if self.tail_bytes > TAIL {
            self.store_tail(last).await?;
        }
        Ok(last)
    }

    /// Waits until the watch has shown everything that was written up to now, and says up to where.
    async fn catch_up(&mut self) -> Result<u64, BackupError> {
        let mark = format!("{:016x}", fastrand::u64(..));
        let written = self.kv.txn(Txn::default().put(MARK, mark)).await?;
        let wanted = written.unwrap_or(0);
        let catch_up = async {
            loop {
                let told = self.watch.next().await;
                let last = self.told(told).await?;
                if last >= wanted {
                    return Ok(last);
                }
            }
        };
        let reached = tokio::time::timeout(CATCH_UP, catch_up).await;
        reached.unwrap_or_else(|_| {
            Err(BackupError::Nothing(format!(
                "the store did not show its own writes within {CATCH_UP:?}"
            )))
        })
    }

    async fn store_tail(&mut self, to: u64) -> Result<(), BackupError> {
        if self.tail.is_empty() {
            self.stored_to = to.max(self.stored_to);
            return Ok(());
        }
        let store_id = self.meta.as_ref().map(|(id, _)| id.clone());
        let segment = Segment {
            store_id: store_id.unwrap_or_default(),
            after: self.stored_to,
            to,
            shipped_ms: Clock::System.now_ms(),
            events: std::mem::take(&mut self.tail),
        };
        self.tail_bytes = 0;
        let piece = self.depot.store(format::encode_segment(&segment)).await?;
        self.tail_pieces.push(piece);
        self.stored_to = to;
        Ok(())
    }
}

pub(crate) fn hash_entry(hash: &mut Sha256, key: &str, value: &[u8]) {
    let mut bytes = Vec::with_capacity(key.len() + value.len() + 8);
    format::put_entry(&mut bytes, key, value);
    hash.update(&bytes);
}

pub(crate) fn watch_error(error: WatchError) -> BackupError {
    match error {
        WatchError::Compacted(position) => BackupError::Gap(position),
        WatchError::Lost(error) => BackupError::Kv(error),
    }
}

/// A change as backups have it, if they have it; and its position.
pub(crate) fn convert(event: kv::Event, seen_ms: i64) -> (u64, Option<format::Event>) {
    let (position, key, value) = match event {
        kv::Event::Put(entry) => (entry.modified, entry.key, Some(entry.value)),
        kv::Event::Delete { key, modified } => (modified, key, None),
    };
    let event = content::is_kept(&key).then_some(format::Event {
        position,
        seen_ms,
        key,
        value,
    });
    (position, event)
}

/// The certificate authority's files as one, for [`create`].
pub(crate) fn pack_authority(dir: &std::path::Path) -> Result<Vec<u8>, BackupError> {
    let mut archive = tar::Builder::new(Vec::new());
    let listed = std::fs::read_dir(dir).map_err(BackupError::file("list", dir))?;
    let mut files = Vec::new();
    for entry in listed {
        let path = entry.map_err(BackupError::file("list", dir))?.path();
        if path.extension().is_some_and(|e| e == "pem") && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(BackupError::Nothing(format!(
            "{} has no .pem file: it is no certificate authority",
            dir.display()
        )));
    }
    for path in files {
        let name = path.file_name().unwrap_or_default();
        archive
            .append_path_with_name(&path, name)
            .map_err(BackupError::file("read", &path))?;
    }
    archive.into_inner().map_err(BackupError::file("pack", dir))
}

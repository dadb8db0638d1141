//! Whether a backup is one: it is restored into a scratch store, and what that store says is compared.

use super::catalogue::{Listed, Note};
use super::content;
use super::create::hash_entry;
use super::error::BackupError;
use super::manifest::{Manifest, hex};
use super::place::Place;
use super::recover::{self, Plan, Reader, Restored, Until, Writer};
use super::seal::Opener;
use crate::kv::Kv;
use crate::store::{Clock, Options, Store};
use leeward_proto::parse;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Keys on a page.
const PAGE: usize = 64;
/// Pieces of a module that are read at once.
const PIECES: u32 = 8;

/// A directory that is gone when this is.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// One in a directory, for its owner only.
    pub(crate) fn new(within: &Path) -> Result<Self, BackupError> {
        use std::os::unix::fs::DirBuilderExt as _;
        let path = within.join(format!(".leeward-scratch-{:016x}", fastrand::u64(..)));
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(BackupError::file("make", &path))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "can't remove a scratch directory");
        }
    }
}

/// What was verified.
#[derive(Debug)]
pub(crate) struct Verified {
    pub(crate) objects: usize,
    /// What the scratch store had; `None` where only hashes could be compared.
    pub(crate) restored: Option<Restored>,
}

/// Verifies a backup and the log after it. Without a secret for one that is encrypted, `hashes_only` says whether to be
/// content with comparing hashes.
pub(crate) async fn verify(
    place: &Place,
    opener: &Opener,
    listed: &Listed,
    within: &Path,
    hashes_only: bool,
) -> Result<Verified, BackupError> {
    // Read anew: what was listed a while ago proves nothing of what is there now.
    let manifest = super::catalogue::manifest(place, &listed.name).await?;
    let reader = Reader { place, opener };
    let mut objects = 1;
    for piece in manifest.pieces() {
        let sealed = reader.sealed(piece).await?;
        Opener::check(&sealed).map_err(|source| BackupError::Seal {
            object: piece.name.clone(),
            source,
        })?;
        objects += 1;
    }
    for name in reader.segments(&manifest.store_id).await? {
        super::ship::span(place, &name).await?;
        objects += 1;
    }
    if hashes_only {
        return Ok(Verified {
            objects,
            restored: None,
        });
    }
    let scratch = Scratch::new(within)?;
    let kv = Kv::sqlite(scratch.path())?;
    as_it_was(&kv, &reader, &manifest).await?;
    drop(kv);
    let other = Scratch::new(within)?;
    let kv = Kv::sqlite(other.path())?;
    let plan = Plan {
        name: listed.name.clone(),
        manifest,
        until: Until::Latest,
    };
    let restored = recover::restore(&kv, &reader, &plan, None).await?;
    opens(kv, &restored).await?;
    Ok(Verified {
        objects,
        restored: Some(restored),
    })
}

/// Compares what a scratch store gives back, read by its own means, with what was backed up.
async fn as_it_was(kv: &Kv, reader: &Reader<'_>, manifest: &Manifest) -> Result<(), BackupError> {
    let mut writer = Writer::begin(kv).await?;
    recover::chunks(&mut writer, reader, manifest).await?;
    // As in the backup, under the id that it had.
    writer.finish(None, manifest.position).await?;
    let (mut hash, mut after) = (Sha256::new(), None::<String>);
    loop {
        let page = kv.range("", after.as_deref(), PAGE).await?;
        for entry in &page.entries {
            if content::is_kept(&entry.key) {
                hash_entry(&mut hash, &entry.key, &entry.value);
            }
        }
        after = page.entries.last().map(|entry| entry.key.clone());
        if !page.more {
            break;
        }
    }
    let found = hex(&hash.finalize());
    if found == manifest.content_sha256 {
        Ok(())
    } else {
        Err(BackupError::Content {
            object: "the scratch store".to_owned(),
            what: format!(
                "has content with hash {found}, and the manifest says {}",
                manifest.content_sha256
            ),
        })
    }
}

/// Opens what was restored as a control plane would, and looks at everything in it.
async fn opens(kv: Kv, restored: &Restored) -> Result<(), BackupError> {
    let wrong = |what: String| BackupError::Content {
        object: "the scratch store".to_owned(),
        what,
    };
    let store = Store::open(kv, Options::default()).await?;
    let revision = store.settle().await?;
    if (store.id(), revision) != (restored.store_id.as_str(), restored.head.revision) {
        return Err(wrong(format!(
            "is {} at revision {revision}; want {} at {}",
            store.id(),
            restored.store_id,
            restored.head.revision
        )));
    }
    for stored in store.everything().upserts {
        if let Err(bad) = parse(&crate::policy::wire(&stored)) {
            let first = bad.first().map(ToString::to_string).unwrap_or_default();
            return Err(wrong(format!("{}: {first}", stored.key)));
        }
    }
    for number in store.oldest().await? + 1..=revision {
        if store.record(number).await?.is_none() {
            return Err(wrong(format!("has no record of revision {number}")));
        }
    }
    for (module, _) in store.modules().await? {
        let sha256 = module.module.sha256;
        let (mut hash, mut at) = (Sha256::new(), 0u32);
        loop {
            let pieces = store.module_chunks(&sha256, at, PIECES).await?;
            if pieces.is_empty() {
                break;
            }
            for piece in &pieces {
                hash.update(piece);
                at += 1;
            }
        }
        if hash.finalize()[..] != sha256[..] {
            return Err(wrong(format!("module {} has another hash", hex(&sha256))));
        }
    }
    Ok(())
}

/// What a verification came to, for the notes.
pub(crate) fn note(result: &Result<Verified, BackupError>) -> Note {
    let time_ms = Clock::System.now_ms();
    match result {
        Ok(verified) => Note {
            time_ms,
            good: true,
            restored: verified.restored.is_some(),
            why: String::new(),
        },
        Err(error) => Note {
            time_ms,
            good: false,
            restored: false,
            why: error.chain(),
        },
    }
}

/// Whether an error says that a backup is bad, rather than that the place could not be asked.
pub(crate) const fn condemns(error: &BackupError) -> bool {
    match error {
        BackupError::Manifest { .. }
        | BackupError::Seal { .. }
        | BackupError::Format { .. }
        | BackupError::Piece { .. }
        | BackupError::Content { .. }
        | BackupError::Place(super::place::PlaceError::Missing { .. }) => true,
        BackupError::Place(_)
        | BackupError::Kv(_)
        | BackupError::Store(_)
        | BackupError::Sealer(_)
        | BackupError::Nothing(_)
        | BackupError::NotEmpty(_)
        | BackupError::Lost
        | BackupError::Gap(_)
        | BackupError::File { .. }
        | BackupError::Broken => false,
    }
}

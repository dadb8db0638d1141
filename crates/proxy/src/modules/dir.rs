//! The directory of modules: each under its SHA-256, none used that doesn't have it.
//!
//! `SHA256.wasm` is a module, `SHA256.signatures` what the control plane has of signatures for it, as JSON, and
//! `SHA256.corrupt` what was under a module's name and isn't it. Files are written beside their place, synced, and moved there:
//! a crash leaves all of one, or none.

use leeward_module::{MAX_BYTES, hex, verify_any};
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// A module's name for these files, and of its bytes.
pub(crate) type Sha = [u8; 32];

/// Modules that no Plugin names, at most, however small.
pub(super) const MAX_UNNAMED: usize = 256;
/// Files that were set aside, at most; they are for people to look at.
const MAX_CORRUPT: usize = 8;
/// The longest file of signatures: sixteen of 4 KiB, and what JSON adds.
const MAX_SIGNATURES: u64 = 256 << 10;
const MODULE: &str = "wasm";
const SIGNATURES: &str = "signatures";
const CORRUPT: &str = "corrupt";
const TEMPORARY: &str = "tmp";

/// The directory.
#[derive(Debug)]
pub(super) struct Dir {
    path: PathBuf,
    /// What modules that no Plugin names may take, in bytes.
    limit: u64,
    serial: AtomicU64,
}

/// What there is of a module.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Found {
    /// It, here; and a key's signature of it, if one was asked for.
    Good(PathBuf),
    /// It, but none of its signatures holds; why.
    Unsigned(String),
    /// Nothing that could be used.
    Absent,
}

/// A module that comes in. Dropped, it leaves nothing.
pub(super) struct Draft {
    dir: Arc<Dir>,
    beside: Beside,
    file: File,
    digest: Sha256,
    len: usize,
}

/// A file that isn't in its place yet.
struct Beside(PathBuf);

impl Drop for Beside {
    fn drop(&mut self) {
        // It was moved, or is of no use to anybody.
        let _ = fs::remove_file(&self.0);
    }
}

impl Dir {
    /// Opens it, and makes it if it isn't there. What writers left that were ended goes.
    pub(super) fn open(path: PathBuf, limit: u64) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        for entry in fs::read_dir(&path)? {
            let file = entry?.path();
            if has(&file, TEMPORARY) {
                match fs::remove_file(&file) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    Ok(()) | Err(_) => {}
                }
            }
        }
        Ok(Self {
            path,
            limit,
            serial: AtomicU64::new(0),
        })
    }

    /// A module, if its file has the SHA-256 that it is named for; one that doesn't is set aside. With `key`, one of its
    /// signatures must be that key's.
    pub(super) fn find(&self, sha256: &Sha, key: Option<&str>) -> io::Result<Found> {
        let path = self.place(sha256, MODULE);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Absent),
            opened => opened?,
        };
        // In memory as a whole only where the signature wants it.
        let mut bytes = Vec::new();
        let got = digest(&file, key.is_some().then_some(&mut bytes))?;
        if got.as_ref() != Some(sha256) {
            let aside = self.place(sha256, CORRUPT);
            fs::rename(&path, &aside)?;
            let got = got.map_or_else(|| "more than 64 MiB".to_owned(), |got| hex(&got));
            tracing::error!(file = %path.display(), aside = %aside.display(), got, "a module on disk is not what it is named for; it is set aside");
            return Ok(Found::Absent);
        }
        if let Some(key) = key
            && let Err(why) = signed(&bytes, &self.signatures(sha256), key)
        {
            return Ok(Found::Unsigned(why));
        }
        // The last use tells which go first. That it can't be noted is no reason not to use it.
        #[expect(clippy::disallowed_methods, reason = "a stamp of a file")]
        let now = SystemTime::now();
        let _ = File::options()
            .append(true)
            .open(&path)
            .and_then(|file| file.set_modified(now));
        Ok(Found::Good(path))
    }

    /// A place for a module to come in.
    pub(super) fn draft(self: &Arc<Self>, sha256: &Sha) -> io::Result<Draft> {
        let (beside, file) = self.beside(sha256)?;
        Ok(Draft {
            dir: Arc::clone(self),
            beside,
            file,
            digest: Sha256::new(),
            len: 0,
        })
    }

    /// Keeps what there is of signatures for a module.
    pub(super) fn put_signatures(&self, sha256: &Sha, signatures: &[String]) -> io::Result<()> {
        let (beside, mut file) = self.beside(sha256)?;
        file.write_all(serde_json::to_string(signatures)?.as_bytes())?;
        self.settle(&beside, &file, &self.place(sha256, SIGNATURES))
    }

    fn signatures(&self, sha256: &Sha) -> Vec<String> {
        let mut text = String::new();
        let read = File::open(self.place(sha256, SIGNATURES))
            .and_then(|file| file.take(MAX_SIGNATURES).read_to_string(&mut text));
        // What isn't there, or is broken, is asked for again.
        let parsed = read.ok().and_then(|_| serde_json::from_str(&text).ok());
        parsed.unwrap_or_default()
    }

    /// Deletes modules that are not among `named` while there are too many of them, those first that were not used for the
    /// longest time; and what was set aside long ago.
    pub(super) fn prune(&self, named: &HashSet<Sha>) -> io::Result<()> {
        let named: HashSet<String> = named.iter().map(hex).collect();
        let (mut unnamed, mut corrupt) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            // Another process may prune at the same time.
            let Ok(metadata) = fs::symlink_metadata(&path) else {
                continue;
            };
            let stem = path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .unwrap_or_default();
            if has(&path, CORRUPT) {
                corrupt.push((metadata.modified()?, metadata.len(), path));
            } else if named.contains(stem) {
                // It stays, whatever it takes.
            } else if has(&path, MODULE) {
                unnamed.push((metadata.modified()?, metadata.len(), path));
            } else if has(&path, SIGNATURES) && !path.with_extension(MODULE).exists() {
                let _ = fs::remove_file(&path);
            }
        }
        for path in surplus(unnamed, MAX_UNNAMED, self.limit) {
            tracing::info!(file = %path.display(), "a module that no Plugin names is deleted");
            let _ = fs::remove_file(path.with_extension(SIGNATURES));
            fs::remove_file(path)?;
        }
        for path in surplus(corrupt, MAX_CORRUPT, self.limit) {
            fs::remove_file(path)?;
        }
        Ok(())
    }

    fn place(&self, sha256: &Sha, extension: &str) -> PathBuf {
        self.path.join(hex(sha256)).with_extension(extension)
    }

    fn beside(&self, sha256: &Sha) -> io::Result<(Beside, File)> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}.{}-{serial}.{TEMPORARY}", hex(sha256), std::process::id());
        let path = self.path.join(name);
        let mut options = OpenOptions::new();
        let file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)?;
        Ok((Beside(path), file))
    }

    fn settle(&self, beside: &Beside, file: &File, place: &Path) -> io::Result<()> {
        file.sync_all()?;
        fs::rename(&beside.0, place)?;
        File::open(&self.path)?.sync_all()
    }
}

impl Draft {
    /// Takes the next bytes in.
    pub(super) fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.len = self.len.saturating_add(data.len());
        if self.len > MAX_BYTES {
            return Err(io::Error::other(format!(
                "it has more than {MAX_BYTES} bytes (64 MiB)"
            )));
        }
        self.digest.update(data);
        self.file.write_all(data)
    }

    /// All is there: it is kept if it is what was wanted.
    pub(super) fn keep(self, sha256: &Sha, signatures: &[String]) -> io::Result<()> {
        let got: Sha = self.digest.finalize().into();
        if got != *sha256 {
            let (got, len) = (hex(&got), self.len);
            return Err(io::Error::other(format!(
                "what came has {len} bytes and SHA-256 {got}"
            )));
        }
        // First, so that a module that is there has them.
        self.dir.put_signatures(sha256, signatures)?;
        self.dir
            .settle(&self.beside, &self.file, &self.dir.place(sha256, MODULE))
    }
}

/// The SHA-256 of a file, and its bytes for those who want them; `None` if it is too long for a module.
fn digest(file: &File, mut bytes: Option<&mut Vec<u8>>) -> io::Result<Option<Sha>> {
    let mut file = file.take(MAX_BYTES as u64 + 1);
    let mut digest = Sha256::new();
    let (mut piece, mut len) = (vec![0; 64 << 10], 0);
    loop {
        let read = match file.read(&mut piece) {
            Ok(0) => break,
            Ok(read) => piece.get(..read).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        len += read.len();
        digest.update(read);
        if let Some(bytes) = &mut bytes {
            bytes.extend_from_slice(read);
        }
    }
    Ok((len <= MAX_BYTES).then(|| digest.finalize().into()))
}

fn signed(bytes: &[u8], signatures: &[String], key: &str) -> Result<(), String> {
    verify_any(bytes, signatures, key).map_err(|why| {
        why.map_or_else(
            || "the control plane has no signature of it".to_owned(),
            |error| error.to_string(),
        )
    })
}

/// Of files with their times and sizes, the oldest, until the rest is within both bounds.
fn surplus(mut files: Vec<(SystemTime, u64, PathBuf)>, most: usize, limit: u64) -> Vec<PathBuf> {
    files.sort();
    let (mut count, mut bytes) = (files.len(), files.iter().map(|(_, len, _)| len).sum::<u64>());
    let oldest = files.into_iter().take_while(|(_, len, _)| {
        let is_over = count > most || bytes > limit;
        (count, bytes) = (count.saturating_sub(1), bytes.saturating_sub(*len));
        is_over
    });
    oldest.map(|(_, _, path)| path).collect()
}

fn has(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|is| is == extension)
}

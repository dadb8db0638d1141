//! Restoring into a directory: whole, or not at all.
//!
//! The store is built in a directory beside, and its file is renamed to where it belongs when everything in it was checked.
//! Whatever ends the process before that leaves the directory as it was.

use super::error::BackupError;
use super::recover::{self, Plan, Reader, Restored};
use super::verify::Scratch;
use crate::kv::Kv;
use rusqlite::Connection;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// The store's file, and what stands beside it.
pub(super) const FILE: &str = "leeward.db";
const BESIDE: [&str; 3] = ["leeward.db", "leeward.db-wal", "leeward.db-shm"];
const LOCK: &str = "leeward.lock";

/// Restores into a directory that has no store. With `replace`, one that has: the old store is put aside, and it is said
/// where.
pub(crate) async fn directory(
    dir: &Path,
    reader: &Reader<'_>,
    plan: &Plan,
    id: Option<&str>,
    replace: Option<&str>,
) -> Result<(Restored, Option<PathBuf>), BackupError> {
    std::fs::create_dir_all(dir).map_err(BackupError::file("make", dir))?;
    let _lock = lock(dir)?;
    let target = dir.join(FILE);
    let there = target.exists();
    if there && replace.is_none() {
        return Err(BackupError::NotEmpty(format!(
            "{} is a store already: restore into another directory, or give --replace, which puts it aside",
            target.display()
        )));
    }
    clean(dir)?;
    let scratch = Scratch::new(dir)?;
    let built = {
        let kv = Kv::sqlite(scratch.path())?;
        recover::restore(&kv, reader, plan, id).await?
    };
    let from = scratch.path().join(FILE);
    settle(&from)?;
    let aside = match (there, replace) {
        (true, Some(stamp)) => Some(put_aside(dir, stamp)?),
        _ => None,
    };
    std::fs::rename(&from, &target).map_err(BackupError::file("rename to", &target))?;
    sync(dir)?;
    Ok((built, aside))
}

/// As the store does it: nobody else may have it open.
fn lock(dir: &Path) -> Result<File, BackupError> {
    let path = dir.join(LOCK);
    let file = File::create(&path).map_err(BackupError::file("make", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(BackupError::NotEmpty(format!(
            "{} is in use by a control plane: stop it first",
            dir.display()
        ))),
        Err(TryLockError::Error(source)) => Err(BackupError::File {
            act: "lock",
            path,
            source,
        }),
    }
}

/// Takes away what restores that were cut short have left.
fn clean(dir: &Path) -> Result<(), BackupError> {
    for entry in std::fs::read_dir(dir).map_err(BackupError::file("list", dir))? {
        let path = entry.map_err(BackupError::file("list", dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(".leeward-scratch-") {
            std::fs::remove_dir_all(&path).map_err(BackupError::file("remove", &path))?;
        }
    }
    Ok(())
}

/// Brings everything into the one file, and to the disk.
fn settle(path: &Path) -> Result<(), BackupError> {
    let failed = |error: rusqlite::Error| BackupError::Content {
        object: path.display().to_string(),
        what: error.to_string(),
    };
    let db = Connection::open(path).map_err(failed)?;
    let busy: i64 = db
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))
        .map_err(failed)?;
    let sound: String = db
        .query_row("PRAGMA quick_check", [], |row| row.get(0))
        .map_err(failed)?;
    if busy != 0 || sound != "ok" {
        return Err(BackupError::Content {
            object: path.display().to_string(),
            what: format!("can't be closed whole: {sound}"),
        });
    }
    drop(db);
    let file = File::open(path).map_err(BackupError::file("open", path))?;
    file.sync_all().map_err(BackupError::file("sync", path))
}

fn put_aside(dir: &Path, stamp: &str) -> Result<PathBuf, BackupError> {
    let aside = dir.join(format!("replaced-{stamp}"));
    std::fs::create_dir(&aside).map_err(BackupError::file("make", &aside))?;
    for name in BESIDE {
        let from = dir.join(name);
        if from.exists() {
            std::fs::rename(&from, aside.join(name)).map_err(BackupError::file("put aside", &from))?;
        }
    }
    sync(&aside)?;
    Ok(aside)
}

fn sync(dir: &Path) -> Result<(), BackupError> {
    let file = File::open(dir).map_err(BackupError::file("open", dir))?;
    file.sync_all().map_err(BackupError::file("sync", dir))
}

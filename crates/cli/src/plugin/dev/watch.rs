//! Whether something in a project has changed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// How often it is looked.
const EVERY: Duration = Duration::from_millis(300);
/// Files that are looked at.
const MAX_FILES: usize = 10_000;
/// Directories within each other.
const MAX_DEPTH: usize = 16;
/// What tools make, and nobody writes.
const NOT_SOURCES: [&str; 5] = ["build", "target", "node_modules", "__pycache__", "dist"];

/// A project's files as they were last seen.
pub(super) struct Watch {
    dir: PathBuf,
    /// A file outside of it.
    beside: PathBuf,
    seen: Stamps,
}

/// When files were changed, and how long they are.
type Stamps = BTreeMap<PathBuf, (SystemTime, u64)>;

impl Watch {
    pub(super) fn new(dir: &Path, beside: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            beside: beside.to_owned(),
            seen: look(dir, beside),
        }
    }

    /// Waits until a file is another than when this was last called, or made.
    pub(super) async fn changed(&mut self) {
        let mut before = look(&self.dir, &self.beside);
        loop {
            // An editor may write several files: it is waited until nothing changes any more.
            if before != self.seen {
                tokio::time::sleep(EVERY / 3).await;
                let now = look(&self.dir, &self.beside);
                if now == before {
                    self.seen = now;
                    return;
                }
                before = now;
                continue;
            }
            tokio::time::sleep(EVERY).await;
            before = look(&self.dir, &self.beside);
        }
    }
}

fn look(dir: &Path, beside: &Path) -> Stamps {
    let mut stamps = Stamps::new();
    note(beside, &mut stamps);
    within(dir, MAX_DEPTH, &mut stamps);
    stamps
}

fn note(file: &Path, stamps: &mut Stamps) {
    // What is being written anew may not be there for a moment.
    let Ok(metadata) = file.metadata() else { return };
    if let Ok(at) = metadata.modified() {
        stamps.insert(file.to_owned(), (at, metadata.len()));
    }
}

fn within(dir: &Path, depth: usize, stamps: &mut Stamps) {
    let (Some(deeper), Ok(entries)) = (depth.checked_sub(1), std::fs::read_dir(dir)) else {
        return;
    };
    for entry in entries.flatten() {
        if stamps.len() >= MAX_FILES {
            return;
        }
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => {
                if !name.starts_with('.') && !NOT_SOURCES.contains(&&*name) {
                    within(&path, deeper, stamps);
                }
            }
            // Tools write lock files of their own.
            Ok(_) if !name.starts_with('.') && !name.ends_with(".lock") && name != "package-lock.json" => {
                note(&path, stamps);
            }
            Ok(_) | Err(_) => {}
        }
    }
}

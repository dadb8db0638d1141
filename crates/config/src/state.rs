//! What a proxy keeps on disk, so that it starts as it was when no control plane answers.
//!
//! [`image`] says what is in the files, [`disk`] writes them, `frame` has their checksums. Here is who writes when: a task
//! beside the data path, about once a second at most, with what came meanwhile taken together.

mod disk;
mod frame;
mod image;

pub(crate) use image::{Change, Entry, Restored, Slot, parse_guards, render_guards};

use crate::certificates::wall;
use disk::{Damage, Disk, Opened, Written};
use leeward_policy::Viewer;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};
use tokio::sync::{Notify, watch};

/// The pause after a write.
const PAUSE: Duration = Duration::from_secs(1);
/// The pause after a write that failed, or was not this process's to make.
const RETRY: Duration = Duration::from_secs(5);
/// How often it is written that the control plane was heard, while nothing else is new.
const HEARD: Duration = Duration::from_secs(30);
/// How often people are told that nothing can be written.
const REMIND: Duration = Duration::from_secs(60);

/// A directory with a proxy's state. Cheap to clone.
#[derive(Clone, Debug)]
pub struct StateDir(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    // Poison is harmless in all three: what is changed is changed at once.
    pending: Mutex<Pending>,
    found: Mutex<Option<Restored>>,
    report: Mutex<StateReport>,
    disk: Mutex<Disk>,
    wake: Notify,
    hurry: Notify,
    /// How much of what was handed over is on disk, or will not be.
    done: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Pending {
    change: Option<Change>,
    blobs: BTreeMap<Blob, Vec<u8>>,
    /// The last commit, for the times when there is nothing new but that it was heard.
    last: Option<leeward_proto::v1::StateCommit>,
    heard_ms: i64,
    serial: u64,
}

/// What is kept beside policy, each in a file of its own.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Blob {
    /// Levels of degradation.
    Levels,
    /// The node's own file of feature flags, as it was when it was last good.
    Flags,
    /// Whose certificates are refused.
    Revoked,
}

impl Blob {
    const fn file(self) -> &'static str {
        match self {
            Self::Levels => "levels",
            Self::Flags => "flags",
            Self::Revoked => "revoked",
        }
    }
}

/// What there is to say of it.
#[derive(Clone, Debug, Default)]
pub struct StateReport {
    /// Times that something was written.
    pub written: u64,
    /// Times that it could not be.
    pub failed: u64,
    /// Files that were found damaged, by their names.
    pub corrupt: BTreeMap<&'static str, u64>,
}

impl StateDir {
    /// Opens a directory, which is made if it isn't there, and reads what is in it. What can't be used is set aside, and logged.
    /// Reads files: not for a thread that serves requests.
    ///
    /// # Errors
    ///
    /// If the directory can't be made or used. Its files are no reason.
    pub fn open(path: PathBuf, viewer: &Viewer) -> std::io::Result<Self> {
        let Opened {
            disk,
            restored,
            damaged,
        } = Disk::open(path.clone())?;
        let restored = match restored {
            Some(found) if !is_of(viewer, &found) => {
                return Err(std::io::Error::other(format!(
                    "it has the state of proxy {} in zone {}; each needs a directory of its own",
                    found.commit.proxy, found.commit.zone
                )));
            }
            other => other,
        };
        let heard_ms = restored.as_ref().map_or(0, |found| found.commit.heard_ms);
        let pending = Pending {
            last: restored.as_ref().map(|found| found.commit.clone()),
            heard_ms,
            ..Pending::default()
        };
        let state = Self(Arc::new(Inner {
            path,
            pending: Mutex::new(pending),
            found: Mutex::new(restored),
            report: Mutex::default(),
            disk: Mutex::new(disk),
            wake: Notify::new(),
            hurry: Notify::new(),
            done: watch::Sender::new(0),
        }));
        for damage in damaged {
            state.tell(&damage);
        }
        // What is damaged is written anew, what was cut off is cut off.
        state.0.wake.notify_one();
        Ok(state)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// What there is to say of it now.
    pub fn report(&self) -> StateReport {
        locked(&self.0.report).clone()
    }

    /// What was found when it was opened; once.
    pub(crate) fn restored(&self) -> Option<Restored> {
        locked(&self.0.found).take()
    }

    /// What was last kept. Before [`StateDir::run`].
    pub fn blob(&self, blob: Blob) -> Option<Vec<u8>> {
        let read = locked(&self.0.disk).read_blob(blob.file());
        read.unwrap_or_else(|damage| {
            self.tell(&damage);
            None
        })
    }

    /// What was last kept in a directory that isn't opened yet, if it can be read. It is left as it is.
    pub(crate) fn peek(path: &Path, blob: Blob) -> Option<Vec<u8>> {
        let read = disk::peek(path, blob.file());
        read.unwrap_or_else(|why| {
            tracing::warn!(file = %path.join(blob.file()).display(), why, "a file of the state on disk can't be read");
            None
        })
    }

    /// Keeps this from soon on.
    pub fn keep(&self, blob: Blob, bytes: Vec<u8>) {
        let mut pending = locked(&self.0.pending);
        pending.blobs.insert(blob, bytes);
        pending.serial += 1;
        drop(pending);
        self.0.wake.notify_one();
    }

    /// Keeps a change of policy from soon on.
    pub(crate) fn change(&self, change: Change) {
        let mut pending = locked(&self.0.pending);
        pending.last = Some(change.commit.clone());
        pending.heard_ms = pending.heard_ms.max(change.commit.heard_ms);
        match &mut pending.change {
            Some(earlier) => earlier.add(change),
            none => *none = Some(change),
        }
        pending.serial += 1;
        drop(pending);
        self.0.wake.notify_one();
    }

    /// A control plane was heard: what there is, is the newest. On disk half a minute later, at the latest.
    pub(crate) fn heard(&self, now_ms: i64) {
        locked(&self.0.pending).heard_ms = now_ms;
    }

    /// Writes until dropped.
    pub async fn run(self) {
        let mut told: Option<tokio::time::Instant> = None;
        loop {
            tokio::select! {
                () = self.0.wake.notified() => {}
                () = tokio::time::sleep(HEARD) => {}
            }
            let state = self.clone();
            // Its owner is this task. It goes on if this ends, and is soon done.
            let written = tokio::task::spawn_blocking(move || state.write()).await;
            let pause = match written {
                Ok(Ok(Written::Done)) => PAUSE,
                Ok(Ok(Written::Nothing)) => Duration::ZERO,
                Ok(Ok(Written::NotOurs)) => {
                    self.0.wake.notify_one();
                    RETRY
                }
                Ok(Err(error)) => {
                    self.0.wake.notify_one();
                    let now = tokio::time::Instant::now();
                    if told.is_none_or(|at| now - at >= REMIND) {
                        told = Some(now);
                        tracing::error!(
                            directory = %self.0.path.display(),
                            %error,
                            "the state can't be written; after a restart without a control plane this proxy would be as it was before"
                        );
                    }
                    RETRY
                }
                Err(_) => RETRY,
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.0.hurry.notified() => {}
            }
        }
    }

    /// Waits until everything that was handed over is on disk; no longer than `limit`. Something must [run](StateDir::run).
    pub async fn flush(&self, limit: Duration) {
        let serial = locked(&self.0.pending).serial;
        let mut done = self.0.done.subscribe();
        self.0.hurry.notify_one();
        self.0.wake.notify_one();
        // The sender lives as long as `self`.
        drop(tokio::time::timeout(limit, done.wait_for(|done| *done >= serial)).await);
    }

    /// Writes what is new.
    pub(crate) fn write(&self) -> std::io::Result<Written> {
        let mut disk = locked(&self.0.disk);
        let (change, blobs, serial) = {
            let mut pending = locked(&self.0.pending);
            let (heard_ms, last) = (pending.heard_ms, pending.last.clone());
            let change = pending.change.take().or_else(|| {
                let commit = last?;
                Some(Change {
                    commit,
                    ..Change::default()
                })
            });
            let change = change.map(|mut change| {
                change.commit.heard_ms = heard_ms;
                change
            });
            (change, std::mem::take(&mut pending.blobs), pending.serial)
        };
        let (mut ours, mut failed, mut any) = (true, None, false);
        // What was taken in is in memory from here on: the next try has it, too.
        match disk.write(change) {
            Ok(Written::Done) => any = true,
            Ok(Written::Nothing) => {}
            Ok(Written::NotOurs) => ours = false,
            Err(error) => failed = Some(error),
        }
        for (blob, bytes) in blobs {
            match disk.write_blob(blob.file(), &bytes) {
                Ok(Written::Done) => any = true,
                Ok(Written::Nothing) => {}
                Ok(Written::NotOurs) => {
                    ours = false;
                    locked(&self.0.pending).blobs.entry(blob).or_insert(bytes);
                }
                Err(error) => {
                    failed = Some(error);
                    locked(&self.0.pending).blobs.entry(blob).or_insert(bytes);
                }
            }
        }
        let mut report = locked(&self.0.report);
        report.written += u64::from(any);
        report.failed += u64::from(failed.is_some());
        drop(report);
        match failed {
            Some(error) => Err(error),
            None => {
                self.0.done.send_replace(serial);
                Ok(match (ours, any) {
                    (false, _) => Written::NotOurs,
                    (true, true) => Written::Done,
                    (true, false) => Written::Nothing,
                })
            }
        }
    }

    fn tell(&self, damage: &Damage) {
        *locked(&self.0.report).corrupt.entry(damage.file).or_default() += 1;
        let file = self.0.path.join(damage.file);
        let aside = damage.aside.as_deref().map(Path::display);
        tracing::error!(
            file = %file.display(),
            aside = aside.map(tracing::field::display),
            "a file of the state on disk can't be used as it is: {}; this proxy starts with what is good of it",
            damage.why
        );
    }
}

fn is_of(viewer: &Viewer, found: &Restored) -> bool {
    found.commit.proxy == viewer.proxy.as_str() && found.commit.zone == viewer.zone.as_str()
}

/// Now, in milliseconds since 1970.
pub(crate) fn wall_ms() -> i64 {
    let since = wall().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

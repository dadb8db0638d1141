//! The node's own file of feature flags, looked at again and again.

use anyhow::Context;
use arc_swap::ArcSwapOption;
use leeward_flags::{FlagSet, InvalidFlag};
use leeward_telemetry::{Gauge, Hub};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::fs::File;
use tokio::io::AsyncReadExt;

/// A file, as it was seen last.
#[derive(Debug)]
pub(crate) struct FlagsFile {
    path: PathBuf,
    /// `None` while it can't be looked at.
    seen: Option<Version>,
}

/// How often it is looked at.
const WATCH: Duration = Duration::from_millis(500);
/// Mistakes that are logged of those that a file has.
const MAX_TOLD: usize = 10;

/// What tells one version of a file from another without reading it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Version {
    modified: (i64, i64),
    length: u64,
    inode: u64,
}

/// Why a file can't be used.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("can't be read")]
    Io(#[from] std::io::Error),
    #[error("is no text in UTF-8")]
    NoText,
    #[error("{}", told(.0))]
    Invalid(Vec<InvalidFlag>),
}

impl FlagsFile {
    /// Reads the file for the first time, and makes its flags live.
    ///
    /// # Errors
    ///
    /// If it isn't there or is broken.
    pub(crate) async fn open(path: PathBuf, live: &ArcSwapOption<FlagSet>) -> anyhow::Result<Self> {
        let mut file = Self { path, seen: None };
        let wanted = || format!("the flags in {} can't be used", file.path.display());
        let version = file.version().await.with_context(wanted)?;
        let flags = file.read().await.with_context(wanted)?;
        file.seen = Some(version);
        live.store(Some(Arc::new(flags)));
        Ok(file)
    }

    /// Looks at the file until dropped. What is broken changes nothing.
    pub(crate) async fn watch(mut self, live: Arc<ArcSwapOption<FlagSet>>, hub: Arc<Hub>) {
        let mut ticks = tokio::time::interval(WATCH);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Some(changed) = self.changed().await else {
                continue;
            };
            hub.set(Gauge::FlagsFileBroken, changed.is_err().into());
            let path = self.path.display();
            match changed {
                Ok(flags) => {
                    tracing::info!(%path, flags = flags.keys().count(), "flags read anew");
                    live.store(Some(Arc::new(flags)));
                }
                Err(error) => {
                    tracing::error!(%path, error = %format_args!("{:#}", anyhow::Error::from(error)), "the flags are broken; those of before hold");
                }
            }
        }
    }

    /// What the file has become, if it is another version than was seen last.
    async fn changed(&mut self) -> Option<Result<FlagSet, Broken>> {
        // Before it is read, so that what is written meanwhile is another version.
        let version = self.version().await;
        let now = version.as_ref().ok().copied();
        if now == self.seen {
            return None;
        }
        self.seen = now;
        Some(match version {
            Ok(_) => self.read().await,
            Err(error) => Err(error.into()),
        })
    }

    async fn version(&self) -> std::io::Result<Version> {
        tokio::fs::metadata(&self.path)
            .await
            .map(|found| Version::of(&found))
    }

    async fn read(&self) -> Result<FlagSet, Broken> {
        let mut document = Vec::new();
        // One more than is allowed, so that it is found to be too long.
        let limit = FlagSet::MAX_BYTES as u64 + 1;
        let file = File::open(&self.path).await?;
        file.take(limit).read_to_end(&mut document).await?;
        let document = String::from_utf8(document).map_err(|_| Broken::NoText)?;
        FlagSet::parse(&document).map_err(Broken::Invalid)
    }
}

impl Version {
    fn of(found: &Metadata) -> Self {
        Self {
            modified: (found.mtime(), found.mtime_nsec()),
            length: found.len(),
            inode: found.ino(),
        }
    }
}

fn told(errors: &[InvalidFlag]) -> String {
    let mut lines: Vec<String> = errors.iter().take(MAX_TOLD).map(ToString::to_string).collect();
    if let Some(more) = errors.len().checked_sub(MAX_TOLD).filter(|more| *more > 0) {
        lines.push(format!("and {more} more"));
    }
    lines.join("; ")
}

//! The node's own file of feature flags, looked at again and again.

use arc_swap::ArcSwapOption;
use leeward_config::{Blob, StateDir};
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
    /// Where they are kept when they are good.
    state: Option<StateDir>,
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
    /// Reads the file for the first time, and makes its flags live; while it is broken those that were last good, if they are
    /// in `state`, which keeps them from now on.
    ///
    /// # Errors
    ///
    /// If it isn't there or is broken, and there are no others.
    pub(crate) async fn open(
        path: PathBuf,
        live: &ArcSwapOption<FlagSet>,
        state: Option<StateDir>,
        hub: &Hub,
    ) -> anyhow::Result<Self> {
        let mut file = Self {
            path,
            seen: None,
            state,
        };
        let version = file.version().await.ok();
        let flags = match file.read().await {
            Ok(flags) => flags,
            Err(broken) => {
                let broken = anyhow::Error::from(broken)
                    .context(format!("the flags in {} can't be used", file.path.display()));
                let Some(flags) = file.kept().await else {
                    return Err(broken);
                };
                tracing::error!("{broken:#}; those that were last good are in use");
                hub.set(Gauge::FlagsFileBroken, 1);
                flags
            }
        };
        file.seen = version;
        live.store(Some(Arc::new(flags)));
        Ok(file)
    }

    /// The flags that were last good.
    async fn kept(&self) -> Option<FlagSet> {
        let state = self.state.clone()?;
        // Its owner is this call; it ends by itself.
        let document = tokio::task::spawn_blocking(move || state.blob(Blob::Flags)).await;
        FlagSet::parse(&String::from_utf8(document.ok()??).ok()?).ok()
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
        let flags = FlagSet::parse(&document).map_err(Broken::Invalid)?;
        if let Some(state) = &self.state {
            state.keep(Blob::Flags, document.into_bytes());
        }
        Ok(flags)
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

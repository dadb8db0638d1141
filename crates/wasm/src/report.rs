//! What there is to say of plugins.

use crate::fault::Fault;
use crate::precompiled::hex;
use crate::quarantine::Standing;
use crate::version::{Loaded, Version};
use leeward_policy::model::PluginKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// One plugin.
#[derive(Clone, Debug)]
pub struct PluginReport {
    /// Its name.
    pub name: Arc<str>,
    /// What becomes of the newest version that policy names.
    pub progress: Progress,
    /// What requests get; `None` until the first version is ready.
    pub stable: Option<VersionReport>,
    /// What some of the requests get.
    pub canary: Option<VersionReport>,
    /// What takes the stable one's place if that faults while it is new.
    pub previous: Option<VersionReport>,
    /// The digest of the version that policy names, and that was taken back.
    pub returned_from: Option<String>,
    /// Times that a version was taken back.
    pub returns: u64,
    /// Linear memory of its instances, in bytes.
    pub memory: u64,
    /// The most that was at once.
    pub peak_memory: u64,
    /// Its instances.
    pub instances: u64,
}

/// What becomes of the newest version of a plugin.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Progress {
    /// Its module is being fetched; with what went wrong at the last try.
    Fetching(Option<String>),
    /// It is being read, compiled and linked.
    Compiling,
    /// It can be used.
    Ready,
    /// It can't be used.
    Failed(String),
}

impl Progress {
    /// The word of metrics and JSON.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Fetching(_) => "fetching",
            Self::Compiling => "compiling",
            Self::Ready => "ready",
            Self::Failed(_) => "failed",
        }
    }

    /// What went wrong, if anything did.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Fetching(reason) => reason.as_deref(),
            Self::Failed(reason) => Some(reason),
            Self::Compiling | Self::Ready => None,
        }
    }
}

/// One version of a plugin.
#[derive(Clone, Debug)]
pub struct VersionReport {
    /// Its kind.
    pub kind: PluginKind,
    /// SHA-256 of its module, in hex.
    pub digest: String,
    /// The first 12 digits of that, as in metrics and logs.
    pub short: Arc<str>,
    /// Whether it is left alone, or tried again.
    pub state: VersionState,
    /// Calls that ended.
    pub calls: u64,
    /// Those that ended in each fault.
    pub faults: Vec<(Fault, u64)>,
    /// Times that it was quarantined.
    pub quarantines: u64,
    /// How long it took to have its code.
    pub compile: Duration,
    /// The code was compiled before.
    pub cached: bool,
}

/// Whether a version is asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum VersionState {
    /// It is.
    Ready,
    /// It faulted too often, and is left alone for so long yet.
    Quarantined(Duration),
    /// It was left alone long enough: a call tries it.
    Trying,
}

impl VersionState {
    /// The word of metrics and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Quarantined(_) => "quarantined",
            Self::Trying => "trying",
        }
    }
}

impl VersionReport {
    fn of(version: &Version, now: Instant) -> Self {
        let (calls, faults, quarantines) = version.health.tallies();
        Self {
            kind: version.kind,
            digest: hex(&version.digest),
            short: Arc::clone(&version.short),
            state: match version.health.standing() {
                Standing::Closed => VersionState::Ready,
                Standing::Quarantined { until } => {
                    VersionState::Quarantined(until.saturating_duration_since(now))
                }
                Standing::Trying => VersionState::Trying,
            },
            calls,
            faults,
            quarantines,
            compile: version.made.took,
            cached: version.made.cached,
        }
    }
}

impl PluginReport {
    pub(crate) fn of(name: &str, progress: &Progress, loaded: Option<&Loaded>, now: Instant) -> Self {
        let version = |version: &Arc<Version>| VersionReport::of(version, now);
        let shared = loaded.map(|loaded| &loaded.stable.shared);
        Self {
            name: name.into(),
            progress: progress.clone(),
            stable: loaded.map(|loaded| version(&loaded.stable)),
            canary: loaded.and_then(|loaded| loaded.canary.as_ref()).map(version),
            previous: loaded
                .and_then(|loaded| loaded.trial.as_ref())
                .map(|trial| version(&trial.previous)),
            returned_from: loaded
                .and_then(|loaded| loaded.returned.as_ref())
                .map(|returned| hex(&returned.digest)),
            returns: shared.map_or(0, |shared| shared.returns.load(Ordering::Relaxed)),
            memory: shared.map_or(0, |shared| shared.usage.bytes()),
            peak_memory: shared.map_or(0, |shared| shared.usage.peak()),
            instances: shared.map_or(0, |shared| shared.usage.instances()),
        }
    }
}

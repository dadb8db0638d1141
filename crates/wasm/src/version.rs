//! The versions of a plugin that a process has, and what outlives them.

use crate::component;
use crate::counters::Counters;
use crate::fault::Fault;
use crate::health::Health;
use crate::memory::Usage;
use crate::proxy_wasm;
use crate::quarantine::{Admits, Change};
use crate::store::Store;
use crate::worker::{Called, Events};
use leeward_policy::model::{Plugin, PluginKind, Quarantine};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One version of a plugin, ready to be instantiated.
pub(crate) struct Version {
    /// Plugins with the same module share it.
    pub(crate) code: Arc<Code>,
    /// What it was linked as.
    pub(crate) kind: PluginKind,
    /// SHA-256 of the module.
    pub(crate) digest: [u8; 32],
    /// Its first 12 hex digits, for people.
    pub(crate) short: Arc<str>,
    pub(crate) health: Health,
    pub(crate) made: Made,
    pub(crate) shared: Arc<Shared>,
}

/// A version that a request has got.
pub(crate) struct Admitted {
    pub(crate) version: Arc<Version>,
    pub(crate) probe: Option<Arc<Probe>>,
}

/// A request that tries a version which was left alone. What it comes to decides, once the request is over for the plugin: a
/// filter that does well with a head may fault on the body.
pub(crate) struct Probe {
    version: Arc<Version>,
    round: u64,
    went_well: AtomicBool,
}

impl Admitted {
    pub(crate) fn freely(version: &Arc<Version>) -> Self {
        Self {
            version: Arc::clone(version),
            probe: None,
        }
    }
}

impl Probe {
    /// A call of the request's ended well.
    pub(crate) fn went_well(&self) {
        self.went_well.store(true, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probe")
            .field("round", &self.round)
            .field("went_well", &self.went_well)
            .finish_non_exhaustive()
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let version = &self.version;
        let well = self.went_well.load(Ordering::Relaxed);
        if version.health.tried(self.round, well) == Some(Change::Closed) {
            let plugin = &version.shared.name;
            tracing::info!(%plugin, version = %version.short, "plugin is well again");
        }
    }
}

/// How a version's code came to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Made {
    /// How long that took.
    pub(crate) took: Duration,
    /// It was compiled before, by this process or another.
    pub(crate) cached: bool,
}

/// What is compiled, by its contract.
pub(crate) enum Code {
    Component(component::Code),
    ProxyWasm(proxy_wasm::Code),
}

/// What a plugin's versions and workers share.
pub(crate) struct Shared {
    pub(crate) name: Arc<str>,
    /// The names that it counts under.
    pub(crate) counters: Counters,
    /// Its key-value store. Poison is harmless: every change is whole.
    pub(crate) store: Mutex<Store>,
    /// Queues and metrics of a proxy-wasm module.
    pub(crate) proxy_wasm: proxy_wasm::Shared,
    /// What its instances have.
    pub(crate) usage: Arc<Usage>,
    /// Times that a version was taken back.
    pub(crate) returns: AtomicU64,
    /// Policy's; looked at only when something went wrong.
    quarantine: Mutex<Quarantine>,
}

/// The versions of a plugin that requests get.
#[derive(Clone)]
pub(crate) struct Loaded {
    pub(crate) stable: Arc<Version>,
    pub(crate) canary: Option<Arc<Version>>,
    pub(crate) trial: Option<Trial>,
    pub(crate) returned: Option<Returned>,
}

/// While a new version is new.
#[derive(Clone)]
pub(crate) struct Trial {
    /// What takes its place if it proves bad.
    pub(crate) previous: Arc<Version>,
    pub(crate) until: Instant,
}

/// A version that proved bad and was taken back, though policy names it.
#[derive(Clone, Debug)]
pub(crate) struct Returned {
    pub(crate) digest: [u8; 32],
}

/// How long the version before stands by.
pub(crate) const TRIAL: Duration = Duration::from_secs(10 * 60);

impl Version {
    /// A call has ended: its breaker and whoever watches are told. Every call ends here.
    pub(crate) fn ended(
        &self,
        events: &dyn Events,
        function: &'static str,
        outcome: Result<(), Fault>,
        took: Duration,
    ) {
        let (plugin, version) = (&self.shared.name, &self.short);
        if self.health.report(outcome, || self.shared.quarantine()) == Some(Change::Quarantined) {
            tracing::warn!(%plugin, %version, "plugin faults; it is left alone for a while");
        }
        // No more of these than quarantine lets happen; a plugin that isn't asked is told of once, where it comes to that.
        if let Err(fault) = outcome
            && fault.is_of_code()
        {
            tracing::warn!(%plugin, %version, function, fault = fault.as_str(), "plugin fault");
        }
        events.called(&Called {
            plugin,
            version,
            function,
            outcome,
            took,
        });
    }

    /// Whether a request may have it, and what it means for it if it does.
    pub(crate) fn admits(self: &Arc<Self>) -> Option<Admitted> {
        let admitted = self.health.admits(|| self.shared.quarantine())?;
        let probe = match admitted {
            Admits::Freely => None,
            Admits::Try(round) => Some(Arc::new(Probe {
                version: Arc::clone(self),
                round,
                went_well: AtomicBool::new(false),
            })),
        };
        Some(Admitted {
            version: Arc::clone(self),
            probe,
        })
    }
}

impl Shared {
    pub(crate) fn new(name: &str, spec: &Plugin) -> Self {
        Self {
            name: name.into(),
            counters: Counters::default(),
            store: Mutex::new(Store::new(spec.limits.store_bytes, spec.limits.store_entries)),
            proxy_wasm: proxy_wasm::Shared::default(),
            usage: Arc::default(),
            returns: AtomicU64::new(0),
            quarantine: Mutex::new(spec.quarantine),
        }
    }

    /// Policy has other bounds now.
    pub(crate) fn resize(&self, spec: &Plugin) {
        let mut store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        store.resize(spec.limits.store_bytes, spec.limits.store_entries);
        drop(store);
        *self.quarantine.lock().unwrap_or_else(PoisonError::into_inner) = spec.quarantine;
    }

    pub(crate) fn quarantine(&self) -> Quarantine {
        *self.quarantine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Loaded {
    /// A plugin's first versions.
    pub(crate) const fn first(stable: Arc<Version>, canary: Option<Arc<Version>>) -> Self {
        Self {
            stable,
            canary,
            trial: None,
            returned: None,
        }
    }

    /// What a plugin has once policy names these. `wanted` is the module that policy names, which may be one that was taken
    /// back; `stable` is then what runs in its place.
    pub(crate) fn follow(
        &self,
        wanted: &[u8; 32],
        stable: Arc<Version>,
        canary: Option<Arc<Version>>,
        now: Instant,
    ) -> Self {
        let returned = self
            .returned
            .clone()
            .filter(|returned| returned.digest == *wanted);
        let trial = if Arc::ptr_eq(&self.stable, &stable) {
            self.trial.clone()
        } else if !self.stable.health.is_quarantined(now) {
            Some(Trial {
                previous: Arc::clone(&self.stable),
                until: now + TRIAL,
            })
        } else {
            // The last one that was good is what it would have gone back to itself.
            self.trial.clone().map(|trial| Trial {
                until: now + TRIAL,
                ..trial
            })
        };
        Self {
            // One that does other things is no replacement, and one that is itself in use again is no other.
            trial: trial
                .filter(|trial| trial.previous.kind == stable.kind && !Arc::ptr_eq(&trial.previous, &stable)),
            stable,
            canary,
            returned,
        }
    }

    /// What it has instead of a new version that proved bad, if there is anything better.
    pub(crate) fn back(&self, now: Instant) -> Option<Self> {
        let trial = self.trial.as_ref().filter(|trial| now < trial.until)?;
        let bad = self.stable.health.is_quarantined(now) && !trial.previous.health.is_quarantined(now);
        bad.then(|| Self {
            stable: Arc::clone(&trial.previous),
            canary: self.canary.clone(),
            trial: None,
            returned: Some(Returned {
                digest: self.stable.digest,
            }),
        })
    }

    /// All of them.
    pub(crate) fn versions(&self) -> impl Iterator<Item = &Arc<Version>> {
        let previous = self.trial.as_ref().map(|trial| &trial.previous);
        [Some(&self.stable), self.canary.as_ref(), previous]
            .into_iter()
            .flatten()
    }
}

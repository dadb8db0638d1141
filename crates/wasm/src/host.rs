//! One for each process: the engine, and the plugins that policy has.

use crate::clock::{Clock, Running, now};
use crate::component;
use crate::engine::{self, MAX_INSTANCES};
use crate::fault::Fault;
use crate::load::{LoadError, Wanted, form_of};
use crate::memory::{Budget, Lease};
use crate::precompiled::{Artifact, Form, Precompiled};
use crate::releases::Releases;
use crate::report::{PluginReport, Progress};
use crate::version::{Admitted, Code, Loaded, Shared, Version};
use bytes::Bytes;
use leeward_policy::model::{Plugin, PluginKind};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockWriteGuard, Weak};
use std::time::Instant;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use wasmtime::Engine;

/// Why there is no plugin host.
#[derive(Debug, thiserror::Error)]
#[error("the WebAssembly engine can't be made: {reason}")]
pub struct HostError {
    reason: String,
}

impl HostError {
    pub(crate) const fn new(reason: String) -> Self {
        Self { reason }
    }
}

/// What a node lets plugins have.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Linear memory of all instances together, in bytes.
    pub memory: u64,
    /// Where compiled code is kept from one start to the next; made if it isn't there. `None` compiles anew.
    pub compiled: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            memory: 1 << 30,
            compiled: None,
        }
    }
}

/// The engine and the compiled plugins of one process.
pub struct Host {
    engine: Engine,
    // Poison is harmless here and below: what is changed is changed in one assignment.
    plugins: RwLock<HashMap<Box<str>, Entry>>,
    /// Code in use, so that plugins with the same module share it.
    codes: Mutex<HashMap<Linked, Weak<Code>>>,
    /// Tells that a plugin has changed.
    changes: watch::Sender<()>,
    /// Times that one has.
    count_of_changes: AtomicU64,
    instances: Arc<Semaphore>,
    shelves: Arc<component::Shelves>,
    memory: Arc<Budget>,
    /// Who compiles: one at a time.
    compiler: Arc<Semaphore>,
    precompiled: Option<Precompiled>,
    clock: Clock,
}

/// A module, and as what it is linked.
#[derive(Eq, Hash, PartialEq)]
struct Linked {
    kind: PluginKind,
    digest: [u8; 32],
}

/// What a load brings.
struct Brought {
    /// The module that policy names.
    wanted: [u8; 32],
    /// Its version, or what runs in its place.
    stable: Arc<Version>,
    canary: Option<Arc<Version>>,
}

/// A name that policy has.
struct Entry {
    /// The load that began last. What one that began before brings comes too late.
    load: u64,
    progress: Progress,
    releases: Releases,
}

impl Host {
    /// A host that keeps nothing on disk, with as much memory as is usual.
    ///
    /// # Errors
    ///
    /// As [`Host::with`].
    pub fn new() -> Result<Arc<Self>, HostError> {
        Self::with(Settings::default())
    }

    /// Makes the engine, and the clock that lets guests notice the time.
    ///
    /// # Errors
    ///
    /// If this machine can't run it. That code can't be kept on disk is only logged.
    pub fn with(settings: Settings) -> Result<Arc<Self>, HostError> {
        let engine = engine::engine()?;
        let clock = Clock::start(engine.clone()).map_err(|e| HostError::new(e.to_string()))?;
        let precompiled = settings.compiled.and_then(|dir| {
            let shown = dir.display().to_string();
            Precompiled::open(dir, &engine)
                .inspect_err(|error| {
                    tracing::warn!(dir = shown, %error, "compiled plugins are not kept on disk");
                })
                .ok()
        });
        Ok(Arc::new(Self {
            engine,
            plugins: RwLock::default(),
            codes: Mutex::default(),
            changes: watch::Sender::new(()),
            count_of_changes: AtomicU64::new(0),
            instances: Arc::new(Semaphore::new(MAX_INSTANCES as usize)),
            shelves: Arc::default(),
            memory: Arc::new(Budget::new(settings.memory)),
            compiler: Arc::new(Semaphore::new(1)),
            precompiled,
            clock,
        }))
    }

    /// Notes that a plugin's module is being fetched, and what went wrong with that, if anything did.
    pub fn fetching(&self, name: &str, reason: Option<&str>) {
        let mut plugins = self.entries();
        let entry = plugins.entry(name.into()).or_insert_with(Entry::new);
        entry.progress = Progress::Fetching(reason.map(ToOwned::to_owned));
    }

    /// Notes that a plugin's module can't be had.
    pub fn refused(&self, name: &str, reason: &str) {
        let mut plugins = self.entries();
        let entry = plugins.entry(name.into()).or_insert_with(Entry::new);
        entry.progress = Progress::Failed(reason.to_owned());
    }

    /// Makes a plugin ready under its name: reads, checks and compiles its module (and its canary's), off the caller's
    /// thread. Requests that have this policy get it; those that have the one before go on with what they had, until none
    /// has that any more.
    ///
    /// A module that faulted when it was new, and that was taken back, is not tried again while policy names it.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; what had the name before stays.
    pub async fn load(
        self: &Arc<Self>,
        name: &str,
        spec: &Plugin,
        stable: PathBuf,
        canary: Option<PathBuf>,
    ) -> Result<(), LoadError> {
        let (load, known) = self.begin(name);
        let shared = known.as_ref().map_or_else(
            || Arc::new(Shared::new(name, spec)),
            |loaded| Arc::clone(&loaded.stable.shared),
        );
        let stable = Wanted::stable(spec, stable);
        let canary = Wanted::canary(spec, canary);
        let versions = async {
            let (wanted, stable) = stable.version(self, &shared, known.clone()).await?;
            let canary = match canary {
                Some(canary) => Some(canary.version(self, &shared, known).await?.1),
                None => None,
            };
            Ok(Brought {
                wanted,
                stable,
                canary,
            })
        };
        let result = versions.await;
        self.settle(name, load, spec, result)
    }

    fn begin(&self, name: &str) -> (u64, Option<Arc<Loaded>>) {
        let mut plugins = self.entries();
        let entry = plugins.entry(name.into()).or_insert_with(Entry::new);
        entry.load += 1;
        entry.progress = Progress::Compiling;
        let known = entry.releases.current();
        (entry.load, known.map(|release| Arc::clone(&release.loaded)))
    }

    fn settle(
        &self,
        name: &str,
        load: u64,
        spec: &Plugin,
        result: Result<Brought, LoadError>,
    ) -> Result<(), LoadError> {
        let mut plugins = self.entries();
        // Policy may have forgotten it, or named another, while it was compiled.
        let Some(entry) = plugins.get_mut(name).filter(|entry| entry.load == load) else {
            return result.map(|_| ());
        };
        match result {
            Err(error) => {
                entry.progress = Progress::Failed(error.to_string());
                return Err(error);
            }
            Ok(Brought {
                wanted,
                stable,
                canary,
            }) => {
                let loaded = match entry.releases.current() {
                    Some(known) => known.loaded.follow(&wanted, stable, canary, now()),
                    None => Loaded::first(stable, canary),
                };
                entry.progress = Progress::Ready;
                entry.releases.add(spec, loaded);
            }
        }
        drop(plugins);
        self.changed();
        Ok(())
    }

    /// Forgets every plugin whose name isn't among `names`.
    pub fn retain(&self, names: &[&str]) {
        self.entries().retain(|name, _| names.contains(&&**name));
        self.changed();
    }

    /// Lets go of what stood by for long enough. To be called about once a second.
    pub fn tend(&self, now: Instant) {
        self.shelves.drop_old(now);
        let plugins = self.plugins.read().unwrap_or_else(PoisonError::into_inner);
        let any = plugins.values().any(|entry| entry.releases.has_old(now));
        drop(plugins);
        if !any {
            return;
        }
        for entry in self.entries().values_mut() {
            entry.releases.drop_old(now);
        }
        self.changed();
    }

    /// What there is to say of every plugin, by name.
    pub fn report(&self, now: Instant) -> Vec<PluginReport> {
        let plugins = self.plugins.read().unwrap_or_else(PoisonError::into_inner);
        let reports = plugins.iter().map(|(name, entry)| {
            let newest = entry.releases.newest().map(|release| &*release.loaded);
            PluginReport::of(name, &entry.progress, newest, now)
        });
        let mut reports: Vec<_> = reports.collect();
        reports.sort_by(|a, b| a.name.cmp(&b.name));
        reports
    }

    /// Whether a version of a plugin can be used.
    pub fn has(&self, name: &str) -> bool {
        self.newest(name).is_some()
    }

    /// What a plugin keeps in its store, by key.
    pub fn kept(&self, name: &str, now: Instant) -> Vec<(Arc<str>, Bytes)> {
        let Some(loaded) = self.newest(name) else {
            return Vec::new();
        };
        let store = loaded.stable.shared.store.lock();
        store.unwrap_or_else(PoisonError::into_inner).entries(now)
    }

    /// Has a plugin find something in its store, as if it had put it there.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or that there is no such plugin.
    pub fn put(&self, name: &str, key: &str, value: Bytes, now: Instant) -> Result<(), String> {
        let loaded = self
            .newest(name)
            .ok_or_else(|| format!("there is no plugin {name}"))?;
        let store = loaded.stable.shared.store.lock();
        let mut store = store.unwrap_or_else(PoisonError::into_inner);
        store
            .set(key, value, None, None, now)
            .map_err(|error| error.to_string())
    }

    fn newest(&self, name: &str) -> Option<Arc<Loaded>> {
        let plugins = self.plugins.read().unwrap_or_else(PoisonError::into_inner);
        let newest = plugins.get(name)?.releases.newest()?;
        Some(Arc::clone(&newest.loaded))
    }

    /// What a plugin is to a request that has this policy.
    pub(crate) fn loaded(&self, name: &str, spec: &Plugin) -> Option<Arc<Loaded>> {
        let plugins = self.plugins.read().unwrap_or_else(PoisonError::into_inner);
        let releases = &plugins.get(name)?.releases;
        let release = releases.of(spec)?;
        let loaded = Arc::clone(&release.loaded);
        let goes_live = release.begin(now)
            && releases
                .current()
                .is_some_and(|current| std::ptr::eq(current, release));
        drop(plugins);
        if goes_live {
            loaded.stable.shared.resize(spec);
            self.changed();
        }
        Some(loaded)
    }

    /// The version of a plugin for a request that has this policy, and to which the plugin is `loaded`.
    pub(crate) fn choose(
        &self,
        name: &str,
        spec: &Plugin,
        loaded: &Arc<Loaded>,
        canary: bool,
    ) -> Result<Admitted, Fault> {
        if canary
            && let Some(version) = &loaded.canary
            && let Some(admitted) = version.admits()
        {
            return Ok(admitted);
        }
        let stable = &loaded.stable;
        if stable.health.is_good() {
            return Ok(Admitted::freely(stable));
        }
        if let Some(previous) = self.go_back(name, spec, loaded) {
            return Ok(Admitted::freely(&previous));
        }
        stable.admits().ok_or(Fault::Quarantined)
    }

    /// A version that faults while it is new is taken back; returns the one before.
    fn go_back(&self, name: &str, spec: &Plugin, loaded: &Arc<Loaded>) -> Option<Arc<Version>> {
        let back = loaded.back(now())?;
        let mut plugins = self.entries();
        let releases = &mut plugins.get_mut(name)?.releases;
        let Some(release) = releases.with(loaded) else {
            // Another worker was here first, or policy was.
            return releases.of(spec).map(|known| Arc::clone(&known.loaded.stable));
        };
        let stable = Arc::clone(&back.stable);
        release.loaded = Arc::new(back);
        drop(plugins);
        stable.shared.returns.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(
            plugin = name,
            version = %loaded.stable.short,
            last_good = %stable.short,
            "a new version faults; the last good one is back until policy names another"
        );
        self.changed();
        Some(stable)
    }

    fn entries(&self) -> RwLockWriteGuard<'_, HashMap<Box<str>, Entry>> {
        self.plugins.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be told when the change can be seen.
    fn changed(&self) {
        self.count_of_changes.fetch_add(1, Ordering::Release);
        self.changes.send_replace(());
    }

    /// What [`Self::loaded`] gives holds until this is another.
    pub(crate) fn count_of_changes(&self) -> u64 {
        self.count_of_changes.load(Ordering::Acquire)
    }

    /// Whether requests still get this version of a plugin, but for those that have an older policy.
    pub(crate) fn serves(&self, name: &str, version: &Arc<Version>) -> bool {
        let plugins = self.plugins.read().unwrap_or_else(PoisonError::into_inner);
        let entry = plugins.get(name);
        entry.is_some_and(|entry| entry.releases.serve(version))
    }

    /// Tells whenever a plugin has changed.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    pub(crate) const fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(crate) const fn compiler(&self) -> &Arc<Semaphore> {
        &self.compiler
    }

    pub(crate) const fn precompiled(&self) -> Option<&Precompiled> {
        self.precompiled.as_ref()
    }

    /// The code of a module, if a plugin has it.
    pub(crate) fn code(&self, kind: PluginKind, digest: &[u8; 32]) -> Option<Arc<Code>> {
        let codes = self.codes.lock().unwrap_or_else(PoisonError::into_inner);
        let digest = *digest;
        codes.get(&Linked { kind, digest })?.upgrade()
    }

    /// Lets other plugins with the same module have its code.
    pub(crate) fn share(&self, kind: PluginKind, digest: &[u8; 32], code: &Arc<Code>) {
        let mut codes = self.codes.lock().unwrap_or_else(PoisonError::into_inner);
        codes.retain(|_, code| code.strong_count() > 0);
        let digest = *digest;
        codes.insert(Linked { kind, digest }, Arc::downgrade(code));
    }

    /// Keeps what a module was compiled to, and sees to it that what nobody uses any more doesn't fill the disk.
    pub(crate) fn keep(&self, form: Form, digest: &[u8; 32], artifact: &Artifact) {
        let Some(precompiled) = &self.precompiled else {
            return;
        };
        precompiled.put(form, digest, artifact);
        let codes = self.codes.lock().unwrap_or_else(PoisonError::into_inner);
        let in_use: Vec<_> = codes
            .keys()
            .map(|linked| (form_of(linked.kind), linked.digest))
            .collect();
        drop(codes);
        if let Err(error) = precompiled.prune(&in_use) {
            tracing::warn!(%error, "old compiled code can't be deleted");
        }
    }

    /// Room for one more instance in the process, if there is any.
    pub(crate) fn room(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.instances).try_acquire_owned().ok()
    }

    /// The instances of components that nobody uses.
    pub(crate) const fn shelves(&self) -> &Arc<component::Shelves> {
        &self.shelves
    }

    /// What a new instance of a plugin is to ask for memory.
    pub(crate) fn lease(&self, shared: &Shared) -> Lease {
        Lease::new(&self.memory, &shared.usage)
    }

    /// Guests notice the time at least until what this returns is dropped.
    pub(crate) fn run(&self) -> Running<'_> {
        self.clock.enter()
    }
}

impl Entry {
    fn new() -> Self {
        Self {
            load: 0,
            progress: Progress::Compiling,
            releases: Releases::default(),
        }
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

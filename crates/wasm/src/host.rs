//! One for each process: the engine, and the plugins that policy has.

use crate::clock::{Clock, Running};
use crate::component;
use crate::fault::Fault;
use crate::proxy_wasm;
use crate::version::{Code, Shared, Version};
use leeward_policy::model::{Plugin, PluginKind, PluginSource};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wasmtime::component::Component;
use wasmtime::{Config, Engine, InstanceAllocationStrategy, Module, PoolingAllocationConfig};

/// Why a plugin can't be used. Names the file and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file can't be read.
    #[error("spec.source.file: can't read {file}: {source}")]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not the file that policy means.
    #[error("spec.source.sha256: {file} has {got}; want {want}")]
    Digest {
        /// The file.
        file: PathBuf,
        /// Its digest.
        got: String,
        /// The digest in policy.
        want: String,
    },
    /// It is too large.
    #[error("spec.source.file: {file} has {len} bytes; want at most {MAX_MODULE}")]
    Size {
        /// The file.
        file: PathBuf,
        /// Its length.
        len: usize,
    },
    /// It is not what its kind says.
    #[error(
        "spec.source.file: {file} is no module for kind {kind} ({reason}); see docs/plugins.md for how to build one"
    )]
    Module {
        /// The file.
        file: PathBuf,
        /// The kind of the plugin.
        kind: &'static str,
        /// What the compiler or the linker said.
        reason: String,
    },
    /// The task that compiled it broke down.
    #[error("spec.source.file: compiling {file} broke down")]
    Broken {
        /// The file.
        file: PathBuf,
    },
}

/// Why there is no plugin host.
#[derive(Debug, thiserror::Error)]
#[error("the WebAssembly engine can't be made: {reason}")]
pub struct HostError {
    reason: String,
}

/// Largest component, in bytes.
const MAX_MODULE: usize = 64 << 20;
/// Instances alive at once in the process, with or without a pool. Each slot of the pool takes 4 GiB of address
/// space (4 TiB in all, so that guests' accesses need no bounds checks), and memory only as it is used.
const MAX_INSTANCES: u32 = 1024;
/// Linear memory that one instance can have at most; policy's own limit is 256 MiB too.
const MAX_MEMORY: usize = 256 << 20;
/// Address space that a memory takes at first, and when it grows past that, where there is no pool.
const SMALL_RESERVATION: u64 = 2 << 20;
/// Elements that a table can have at most; policy's own limit is the same.
const MAX_TABLE: usize = 1_000_000;
/// A guest's stack, in bytes.
const STACK: usize = 512 << 10;

/// The engine and the compiled plugins of one process.
pub struct Host {
    engine: Engine,
    plugins: RwLock<HashMap<Box<str>, Arc<Loaded>>>,
    generation: AtomicU64,
    instances: Arc<Semaphore>,
    clock: Clock,
}

/// The versions of a plugin that the process has.
struct Loaded {
    stable: Arc<Version>,
    canary: Option<Arc<Version>>,
}

impl Host {
    /// Makes the engine, and the clock that lets guests notice the time.
    ///
    /// # Errors
    ///
    /// If this machine can't run it.
    pub fn new() -> Result<Arc<Self>, HostError> {
        let failed = |e: wasmtime::Error| HostError {
            reason: format!("{e:#}"),
        };
        // Where address space is limited the pool can't be had; instances are then made one by one.
        let engine = match Engine::new(&pooled()) {
            Ok(engine) => engine,
            Err(error) => {
                tracing::warn!(error = %format!("{error:#}"), "no instance pool; plugin instances will cost more");
                Engine::new(&on_demand()).map_err(failed)?
            }
        };
        let clock = Clock::start(engine.clone()).map_err(|e| HostError {
            reason: e.to_string(),
        })?;
        Ok(Arc::new(Self {
            engine,
            plugins: RwLock::default(),
            generation: AtomicU64::new(0),
            instances: Arc::new(Semaphore::new(MAX_INSTANCES as usize)),
            clock,
        }))
    }

    /// Makes a plugin ready under its name: reads, checks and compiles its module (and its canary's) on a thread for such
    /// work. What had the name before goes on until this is done; calls of it that are under way end undisturbed.
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
        let (host, spec, file) = (Arc::clone(self), spec.clone(), stable.clone());
        let name = Box::<str>::from(name);
        let task = tokio::task::spawn_blocking(move || {
            let known = host.loaded(&name);
            let shared = known.as_ref().map_or_else(
                || Arc::new(Shared::new(&spec)),
                |loaded| Arc::clone(&loaded.stable.shared),
            );
            shared.resize(&spec);
            let stable = host.version(&spec, &spec.source, stable, &shared, known.as_deref())?;
            let canary = match (&spec.canary, canary) {
                (Some(of), Some(file)) => {
                    Some(host.version(&spec, &of.source, file, &shared, known.as_deref())?)
                }
                _ => None,
            };
            let mut plugins = host.plugins.write().unwrap_or_else(PoisonError::into_inner);
            plugins.insert(name, Arc::new(Loaded { stable, canary }));
            host.generation.fetch_add(1, Ordering::Release);
            Ok(())
        });
        task.await.map_err(|_| LoadError::Broken { file })?
    }

    /// Forgets every plugin whose name isn't among `names`.
    pub fn retain(&self, names: &[&str]) {
        let mut plugins = self.plugins.write().unwrap_or_else(PoisonError::into_inner);
        plugins.retain(|name, _| names.contains(&&**name));
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// A version: one of those that are known, if it has the same module, or a new one.
    fn version(
        &self,
        spec: &Plugin,
        source: &PluginSource,
        file: PathBuf,
        shared: &Arc<Shared>,
        known: Option<&Loaded>,
    ) -> Result<Arc<Version>, LoadError> {
        let bytes = std::fs::read(&file).map_err(|source| LoadError::Read {
            file: file.clone(),
            source,
        })?;
        if bytes.len() > MAX_MODULE {
            return Err(LoadError::Size {
                file,
                len: bytes.len(),
            });
        }
        let digest: [u8; 32] = Sha256::digest(&bytes).into();
        if let Some(want) = source.sha256
            && want != digest
        {
            return Err(LoadError::Digest {
                file,
                got: hex(&digest),
                want: hex(&want),
            });
        }
        let versions = known
            .into_iter()
            .flat_map(|known| [Some(&known.stable), known.canary.as_ref()])
            .flatten();
        for version in versions {
            if version.digest == digest && version.kind == spec.kind {
                return Ok(Arc::clone(version));
            }
        }
        let code = self.code(spec.kind, &bytes).map_err(|error| {
            // The chain's last link says what is missing; the first may be a page long.
            let reason = error
                .root_cause()
                .to_string()
                .lines()
                .next()
                .unwrap_or_default()
                .to_owned();
            LoadError::Module {
                file,
                kind: spec.kind.as_str(),
                reason,
            }
        })?;
        Ok(Arc::new(Version {
            code,
            kind: spec.kind,
            digest,
            short: hex(&digest).chars().take(12).collect::<String>().into(),
            serial: self.generation.fetch_add(1, Ordering::Relaxed),
            shared: Arc::clone(shared),
        }))
    }

    fn code(&self, kind: PluginKind, bytes: &[u8]) -> Result<Code, wasmtime::Error> {
        Ok(match kind {
            PluginKind::ProxyWasm => Code::ProxyWasm(proxy_wasm::Code::new(
                &self.engine,
                &Module::from_binary(&self.engine, bytes)?,
            )?),
            PluginKind::Fallback | PluginKind::Filter | PluginKind::Router | PluginKind::WasiHttp => {
                let component = Component::from_binary(&self.engine, bytes)?;
                Code::Component(component::Code::new(&self.engine, kind, &component)?)
            }
        })
    }

    fn loaded(&self, name: &str) -> Option<Arc<Loaded>> {
        let plugins = self.plugins.read().unwrap_or_else(PoisonError::into_inner);
        plugins.get(name).cloned()
    }

    /// The version of a plugin for a request.
    pub(crate) fn choose(&self, name: &str, canary: bool) -> Result<Arc<Version>, Fault> {
        let loaded = self.loaded(name).ok_or(Fault::NotLoaded)?;
        Ok(match &loaded.canary {
            Some(version) if canary => Arc::clone(version),
            _ => Arc::clone(&loaded.stable),
        })
    }

    /// Changes whenever a plugin does.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Room for one more instance in the process, if there is any.
    pub(crate) fn room(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.instances).try_acquire_owned().ok()
    }

    /// Guests notice the time at least until what this returns is dropped.
    pub(crate) fn run(&self) -> Running {
        self.clock.enter()
    }
}

fn config() -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .max_wasm_stack(STACK)
        .async_stack_size(STACK * 2)
        .memory_init_cow(true);
    config
}

fn pooled() -> Config {
    let mut pool = PoolingAllocationConfig::default();
    pool.total_component_instances(MAX_INSTANCES)
        .total_core_instances(MAX_INSTANCES * 4)
        .total_memories(MAX_INSTANCES)
        .total_tables(MAX_INSTANCES * 4)
        .total_stacks(MAX_INSTANCES)
        .table_elements(MAX_TABLE)
        .max_memory_size(MAX_MEMORY);
    let mut config = config();
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    config
}

/// For where address space is scarce: little of it for each memory, which may move when it grows.
fn on_demand() -> Config {
    let mut config = config();
    config
        .memory_reservation(SMALL_RESERVATION)
        .memory_reservation_for_growth(SMALL_RESERVATION)
        .memory_guard_size(64 << 10);
    config
}

fn hex(digest: &[u8; 32]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host")
            .field("generation", &self.generation())
            .finish_non_exhaustive()
    }
}

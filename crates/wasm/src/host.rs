//! One for each process: the engine, and the plugins that policy has.

use crate::bindings::FallbackPre;
use crate::clock::{Clock, Running};
use crate::guest::{FailedRequest, State};
use leeward_policy::model::Plugin;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use wasmtime::component::{Component, HasSelf, Linker, ResourceType};
use wasmtime::{Config, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

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
    /// It is not a component of the world `fallback`.
    #[error(
        "spec.source.file: {file} is not a component of the world leeward:plugin/fallback ({reason}); \
         build it with --target wasm32-wasip2 and the leeward-plugin crate"
    )]
    Component {
        /// The file.
        file: PathBuf,
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
/// Instances alive at once in the process. Each takes address space, and memory only as it is used.
const MAX_INSTANCES: u32 = 1024;
/// Linear memory that one instance can have at most; policy's own limit is 256 MiB too.
const MAX_MEMORY: usize = 256 << 20;
/// A guest's stack, in bytes.
const STACK: usize = 512 << 10;

/// The engine and the compiled plugins of one process.
pub struct Host {
    engine: Engine,
    plugins: RwLock<HashMap<Box<str>, Arc<Loaded>>>,
    generation: AtomicU64,
    clock: Clock,
}

/// A plugin, ready to be instantiated.
pub(crate) struct Loaded {
    pub(crate) pre: FallbackPre<State>,
    /// What it was made from, to see whether it is the same.
    pub(crate) digest: [u8; 32],
    /// Distinguishes it from what had the name before and comes after.
    pub(crate) serial: u64,
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
        let mut pool = PoolingAllocationConfig::default();
        pool.total_component_instances(MAX_INSTANCES)
            .total_core_instances(MAX_INSTANCES * 4)
            .total_memories(MAX_INSTANCES)
            .total_tables(MAX_INSTANCES * 4)
            .total_stacks(MAX_INSTANCES)
            .max_memory_size(MAX_MEMORY);
        let mut config = config();
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
        // Where address space is limited the pool can't be had; instances are then made one by one.
        let engine = match Engine::new(&config) {
            Ok(engine) => engine,
            Err(error) => {
                tracing::warn!(error = %format!("{error:#}"), "no instance pool; plugin instances will cost more");
                Engine::new(&self::config()).map_err(failed)?
            }
        };
        let clock = Clock::start(engine.clone()).map_err(|e| HostError {
            reason: e.to_string(),
        })?;
        Ok(Arc::new(Self {
            engine,
            plugins: RwLock::default(),
            generation: AtomicU64::new(0),
            clock,
        }))
    }

    /// Makes a plugin ready under its name: reads, checks and compiles it on a thread for such work. What had
    /// the name before goes on until this is done; instances of it that are under way end undisturbed.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; what had the name before stays.
    pub async fn load(self: &Arc<Self>, name: &str, spec: &Plugin) -> Result<(), LoadError> {
        let (host, spec) = (Arc::clone(self), spec.clone());
        let known = self.loaded(name).map(|loaded| loaded.digest);
        let file = PathBuf::from(&*spec.file);
        let task = tokio::task::spawn_blocking(move || host.compile(&spec, known));
        let compiled = task.await.map_err(|_| LoadError::Broken { file })??;
        if let Some(loaded) = compiled {
            let mut plugins = self.plugins.write().unwrap_or_else(PoisonError::into_inner);
            plugins.insert(name.into(), Arc::new(loaded));
            self.generation.fetch_add(1, Ordering::Release);
        }
        Ok(())
    }

    /// Forgets every plugin whose name isn't among `names`.
    pub fn retain(&self, names: &[&str]) {
        let mut plugins = self.plugins.write().unwrap_or_else(PoisonError::into_inner);
        plugins.retain(|name, _| names.contains(&&**name));
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// `None` if it is what is known already.
    fn compile(&self, spec: &Plugin, known: Option<[u8; 32]>) -> Result<Option<Loaded>, LoadError> {
        let file = PathBuf::from(&*spec.file);
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
        if let Some(want) = spec.sha256
            && want != digest
        {
            return Err(LoadError::Digest {
                file,
                got: hex(&digest),
                want: hex(&want),
            });
        }
        if known == Some(digest) {
            return Ok(None);
        }
        let pre = self.prepare(&bytes).map_err(|error| {
            // The chain's last link says what is missing; the first may be a page long.
            let reason = error
                .root_cause()
                .to_string()
                .lines()
                .next()
                .unwrap_or_default()
                .to_owned();
            LoadError::Component { file, reason }
        })?;
        let serial = self.generation.fetch_add(1, Ordering::Relaxed);
        Ok(Some(Loaded { pre, digest, serial }))
    }

    fn prepare(&self, bytes: &[u8]) -> Result<FallbackPre<State>, wasmtime::Error> {
        let component = Component::from_binary(&self.engine, bytes)?;
        let mut linker = Linker::<State>::new(&self.engine);
        crate::bindings::Fallback::add_to_linker::<_, HasSelf<State>>(&mut linker, |state| state)?;
        // The world names the resource too, beside the interface that has it.
        linker
            .root()
            .resource("failed-request", ResourceType::host::<FailedRequest>(), |_, _| {
                Ok(())
            })?;
        // What a standard library imports without need (wasi:cli and others) has nothing behind it.
        linker.define_unknown_imports_as_traps(&component)?;
        FallbackPre::new(linker.instantiate_pre(&component)?)
    }

    pub(crate) fn loaded(&self, name: &str) -> Option<Arc<Loaded>> {
        self.plugins
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// Changes whenever a plugin does.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
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

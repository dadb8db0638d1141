//! From a file to a version: read, checked, compiled where it wasn't before, linked.

use crate::clock::now;
use crate::component;
use crate::host::Host;
use crate::precompiled::{Artifact, Form, hex};
use crate::proxy_wasm;
use crate::version::{Code, Loaded, Made, Shared, Version};
use leeward_policy::model::{Plugin, PluginFrom, PluginKind, PluginSource};
use sha2::{Digest, Sha256};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a plugin can't be used. Names the field, the file and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file can't be read.
    #[error("{at}: can't read {file}: {source}")]
    Read {
        /// The field.
        at: &'static str,
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is not the file that policy means.
    #[error("{at}.sha256: {file} has {got}; want {want}")]
    Digest {
        /// The field.
        at: &'static str,
        /// The file.
        file: PathBuf,
        /// Its digest.
        got: String,
        /// The digest in policy.
        want: String,
    },
    /// It is too large.
    #[error("{at}: {file} has {len} bytes; want at most {max}", max = leeward_module::MAX_BYTES)]
    Size {
        /// The field.
        at: &'static str,
        /// The file.
        file: PathBuf,
        /// Its length.
        len: u64,
    },
    /// The one who should have signed it hasn't.
    #[error("{at}.minisignKey: {file}: {reason}")]
    Signature {
        /// The field.
        at: &'static str,
        /// The file.
        file: PathBuf,
        /// Why the signature doesn't hold.
        reason: String,
    },
    /// It imports what policy doesn't let it have.
    #[error("spec.access.imports: {file} imports {import}, {why}")]
    Import {
        /// The file.
        file: PathBuf,
        /// The import.
        import: Box<str>,
        /// Why not, and what may be.
        why: Box<str>,
    },
    /// It is not what its kind says.
    #[error("{at}: {file} is no module for kind {kind} ({reason}); see docs/plugins.md for how to build one")]
    Module {
        /// The field.
        at: &'static str,
        /// The file.
        file: PathBuf,
        /// The kind of the plugin.
        kind: &'static str,
        /// What the compiler or the linker said.
        reason: String,
    },
    /// The task that compiled it broke down.
    #[error("{at}: compiling {file} broke down")]
    Broken {
        /// The field.
        at: &'static str,
        /// The file.
        file: PathBuf,
    },
}

/// The module of a plugin, or of its canary, and where policy names it.
#[derive(Clone)]
pub(crate) struct Wanted {
    at: &'static str,
    kind: PluginKind,
    source: PluginSource,
    spec: Arc<Plugin>,
    file: PathBuf,
}

/// A module that has been found good so far.
enum Opened {
    /// It is compiled.
    Ready(Arc<Version>),
    /// It must be.
    New,
}

impl Wanted {
    pub(crate) fn stable(spec: &Plugin, file: PathBuf) -> Self {
        Self::new("spec.source", spec, &spec.source, file)
    }

    /// The canary, if there is one and its file is given.
    pub(crate) fn canary(spec: &Plugin, file: Option<PathBuf>) -> Option<Self> {
        let (canary, file) = (spec.canary.as_ref()?, file?);
        Some(Self::new("spec.canary.source", spec, &canary.source, file))
    }

    fn new(at: &'static str, spec: &Plugin, source: &PluginSource, file: PathBuf) -> Self {
        Self {
            at,
            kind: spec.kind,
            source: source.clone(),
            spec: Arc::new(spec.clone()),
            file,
        }
    }

    /// Its bytes and their digest, if they are what policy says.
    fn read(&self) -> Result<(Vec<u8>, [u8; 32]), LoadError> {
        let (at, file) = (self.at, || self.file.clone());
        let unreadable = |source| LoadError::Read {
            at,
            file: file(),
            source,
        };
        let len = std::fs::metadata(&self.file).map_err(unreadable)?.len();
        if len > leeward_module::MAX_BYTES as u64 {
            return Err(LoadError::Size {
                at,
                file: file(),
                len,
            });
        }
        let bytes = std::fs::read(&self.file).map_err(unreadable)?;
        let digest: [u8; 32] = Sha256::digest(&bytes).into();
        // Of an image nobody but the control plane may have said the digest.
        match self.source.sha256.or_else(|| self.source.stored()) {
            Some(want) if want != digest => Err(LoadError::Digest {
                at,
                file: file(),
                got: hex(&digest),
                want: hex(&want),
            }),
            Some(_) | None => Ok((bytes, digest)),
        }
    }

    /// What the control plane has checked of a module that it has, and can't of one that is on the node. Whoever brings a
    /// module from it sees to the signature, which isn't beside the file.
    fn check(&self, bytes: &[u8]) -> Result<(), LoadError> {
        if let (Some(key), PluginFrom::File(_)) = (&self.source.minisign_key, &self.source.from) {
            let bad = |reason| LoadError::Signature {
                at: self.at,
                file: self.file.clone(),
                reason,
            };
            let beside = leeward_module::signature_path(&self.file);
            let signature =
                read_signature(&beside).map_err(|e| bad(format!("can't read {}: {e}", beside.display())))?;
            leeward_module::verify(bytes, &signature, key).map_err(|e| bad(e.to_string()))?;
        }
        if !self.spec.access.imports.is_empty() {
            let module = leeward_module::inspect(bytes).map_err(|e| self.unfit(e.to_string()))?;
            let refused = leeward_module::audit(&module, &self.spec.access.imports).err();
            if let Some(refused) = refused.into_iter().flatten().next() {
                return Err(LoadError::Import {
                    file: self.file.clone(),
                    import: refused.import,
                    why: refused.why,
                });
            }
        }
        Ok(())
    }

    fn unfit(&self, reason: String) -> LoadError {
        LoadError::Module {
            at: self.at,
            file: self.file.clone(),
            kind: self.kind.as_str(),
            reason,
        }
    }

    const fn form(&self) -> Form {
        form_of(self.kind)
    }

    fn broken(&self) -> LoadError {
        LoadError::Broken {
            at: self.at,
            file: self.file.clone(),
        }
    }

    /// Its version and its digest: one of those that are known, if it has the same module, or a new one. Instead of one that
    /// was taken back it is the one that runs in its place.
    pub(crate) async fn version(
        self,
        host: &Arc<Host>,
        shared: &Arc<Shared>,
        known: Option<Arc<Loaded>>,
    ) -> Result<([u8; 32], Arc<Version>), LoadError> {
        let (digest, opened) = {
            let (wanted, host, shared) = (self.clone(), Arc::clone(host), Arc::clone(shared));
            self.blocking(move || wanted.open(&host, &shared, known.as_deref()))
                .await?
        };
        if let Opened::Ready(version) = opened {
            return Ok((digest, version));
        }
        let turn = Arc::clone(host.compiler()).acquire_owned().await;
        let (wanted, host, shared) = (self.clone(), Arc::clone(host), Arc::clone(shared));
        // The turn ends when the compiler does, which goes on though nobody may be waiting for it any more.
        let compile = move || {
            let _turn = turn;
            wanted.compile(&host, &shared)
        };
        let version = self.blocking(compile).await?;
        Ok((version.digest, version))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, LoadError> + Send + 'static,
    ) -> Result<T, LoadError> {
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|_| self.broken())?
    }

    /// Reads and checks the module, and takes its code from where it is, if it is anywhere.
    fn open(
        &self,
        host: &Arc<Host>,
        shared: &Arc<Shared>,
        known: Option<&Loaded>,
    ) -> Result<([u8; 32], Opened), LoadError> {
        let began = now();
        let (bytes, digest) = self.read()?;
        // One that is known, too: policy may let it have less than before, or want another's signature.
        self.check(&bytes)?;
        if let Some(known) = known {
            let version = known
                .versions()
                .find(|v| v.digest == digest && v.kind == self.kind);
            let returned = known.returned.as_ref().is_some_and(|r| r.digest == digest);
            if let Some(version) = version.or_else(|| returned.then_some(&known.stable)) {
                return Ok((digest, Opened::Ready(Arc::clone(version))));
            }
        }
        let code = match host.code(self.kind, &digest) {
            Some(code) => Some(code),
            None => {
                let kept = host
                    .precompiled()
                    .and_then(|kept| kept.get(host.engine(), self.form(), &digest));
                kept.map(|artifact| self.link(host, shared, &digest, &artifact))
                    .transpose()?
            }
        };
        let Some(code) = code else {
            return Ok((digest, Opened::New));
        };
        let made = Made {
            took: now() - began,
            cached: true,
        };
        let version = self.assemble(shared, digest, code, made);
        Ok((digest, Opened::Ready(version)))
    }

    /// Compiles the module. It is read once more: modules that wait for their turn are not kept in memory.
    fn compile(&self, host: &Arc<Host>, shared: &Arc<Shared>) -> Result<Arc<Version>, LoadError> {
        let began = now();
        let (bytes, digest) = self.read()?;
        self.check(&bytes)?;
        // Another plugin with the same module may have had its turn meanwhile.
        let code = match host.code(self.kind, &digest) {
            Some(code) => code,
            None => {
                let artifact = Artifact::compile(host.engine(), self.form(), &bytes)
                    .map_err(|error| self.unfit(last_link(&error)))?;
                let code = self.link(host, shared, &digest, &artifact)?;
                host.keep(self.form(), &digest, &artifact);
                code
            }
        };
        let made = Made {
            took: now() - began,
            cached: false,
        };
        Ok(self.assemble(shared, digest, code, made))
    }

    fn link(
        &self,
        host: &Arc<Host>,
        shared: &Arc<Shared>,
        digest: &[u8; 32],
        artifact: &Artifact,
    ) -> Result<Arc<Code>, LoadError> {
        let linked = match artifact {
            Artifact::Module(module) => proxy_wasm::Code::new(host.engine(), module).map(Code::ProxyWasm),
            Artifact::Component(component) => {
                component::Code::new(host.engine(), self.kind, component).and_then(|code| {
                    // On a thread that may block, as all of this is.
                    tokio::runtime::Handle::current()
                        .block_on(component::check(host, &self.spec, shared, &code))?;
                    Ok(Code::Component(code))
                })
            }
        };
        let code = Arc::new(linked.map_err(|error| self.unfit(last_link(&error)))?);
        host.share(self.kind, digest, &code);
        Ok(code)
    }

    fn assemble(&self, shared: &Arc<Shared>, digest: [u8; 32], code: Arc<Code>, made: Made) -> Arc<Version> {
        Arc::new(Version {
            code,
            kind: self.kind,
            digest,
            short: hex(digest.get(..6).unwrap_or_default()).into(),
            health: crate::health::Health::new(),
            made,
            shared: Arc::clone(shared),
        })
    }
}

/// The form of a kind's modules.
pub(crate) const fn form_of(kind: PluginKind) -> Form {
    match kind {
        PluginKind::ProxyWasm => Form::Module,
        PluginKind::Fallback | PluginKind::Filter | PluginKind::Router | PluginKind::WasiHttp => {
            Form::Component
        }
    }
}

/// The chain's last link says what is missing; the first may be a page long.
fn last_link(error: &wasmtime::Error) -> String {
    let text = error.root_cause().to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

fn read_signature(path: &Path) -> io::Result<String> {
    let len = std::fs::metadata(path)?.len();
    if len > leeward_module::MAX_SIGNATURE as u64 {
        return Err(io::Error::other("it is too long for a signature"));
    }
    std::fs::read_to_string(path)
}

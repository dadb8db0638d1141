//! WebAssembly plugins.

use super::degradation::FlagCondition;
use crate::Name;
use std::sync::Arc;
use std::time::Duration;

/// A WebAssembly plugin.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Plugin {
    /// What it is for.
    pub kind: PluginKind,
    /// Where its module is.
    pub source: PluginSource,
    /// Its configuration, where the rung or the rule that names it has none; of a proxy-wasm module, the VM's.
    pub config: Arc<str>,
    /// Its bounds.
    pub limits: PluginLimits,
    /// What it may do beside answering.
    pub access: PluginAccess,
    /// What a fault means for the request.
    pub on_fault: OnFault,
    /// When it is left alone for a while.
    pub quarantine: Quarantine,
    /// Every call gets an instance that no other has had.
    pub fresh_instance: bool,
    /// It is asked only for requests for which this holds.
    pub when: Option<FlagCondition>,
    /// Another version, for some of the requests.
    pub canary: Option<PluginCanary>,
}

/// What a plugin is for, and by which contract.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PluginKind {
    /// Answers when a call failed: the world `fallback` of `leeward:plugin`.
    Fallback,
    /// Sees requests and answers on their way: the world `filter`.
    Filter,
    /// Chooses among a rule's backends: the world `router`.
    Router,
    /// Answers when a call failed: any component with `wasi:http/incoming-handler`.
    WasiHttp,
    /// Sees requests and answers on their way: a module with the proxy-wasm ABI.
    ProxyWasm,
}

impl PluginKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [
        Self::Fallback,
        Self::Filter,
        Self::Router,
        Self::WasiHttp,
        Self::ProxyWasm,
    ];

    /// Where it can be named.
    pub const fn place(self) -> PluginPlace {
        match self {
            Self::Fallback | Self::WasiHttp => PluginPlace::Rung,
            Self::Filter | Self::ProxyWasm => PluginPlace::Filter,
            Self::Router => PluginPlace::Router,
        }
    }

    /// Whether a rung of a ladder can ask it.
    pub const fn is_rung(self) -> bool {
        matches!(self.place(), PluginPlace::Rung)
    }

    /// Whether it can stand in a rule's filters.
    pub const fn is_filter(self) -> bool {
        matches!(self.place(), PluginPlace::Filter)
    }

    /// The word of policy, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fallback => "Fallback",
            Self::Filter => "Filter",
            Self::Router => "Router",
            Self::WasiHttp => "WasiHttp",
            Self::ProxyWasm => "ProxyWasm",
        }
    }
}

/// Where policy names a plugin.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PluginPlace {
    /// In a rung of a ladder.
    Rung,
    /// In a rule's filters.
    Filter,
    /// As a rule's router.
    Router,
}

impl PluginPlace {
    /// What is wrong with a plugin of this kind here, and what would be right; nothing if it can be named here.
    pub fn misfit(self, kind: PluginKind) -> Option<String> {
        let want = match self {
            Self::Rung => "Fallback or WasiHttp",
            Self::Filter => "Filter or ProxyWasm",
            Self::Router => "Router",
        };
        (kind.place() != self).then(|| format!("is of kind {}; want one of kind {want}", kind.as_str()))
    }
}

impl Plugin {
    /// Where its modules are, its own first, with the field that says so.
    pub fn sources(&self) -> impl Iterator<Item = (&'static str, &PluginSource)> {
        let canary = self.canary.as_ref();
        std::iter::once(("spec.source", &self.source))
            .chain(canary.map(|canary| ("spec.canary.source", &canary.source)))
    }
}

/// Where a module is.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct PluginSource {
    /// Where it comes from.
    pub from: PluginFrom,
    /// What it must hash to. Always there for [`PluginFrom::Store`].
    pub sha256: Option<[u8; 32]>,
    /// The minisign public key, base64, that must have signed it.
    pub minisign_key: Option<Box<str>>,
}

impl PluginSource {
    /// The SHA-256 of the module that the control plane has for it. `None` for a file, and for an image that it has
    /// not fetched yet.
    pub const fn stored(&self) -> Option<[u8; 32]> {
        match &self.from {
            PluginFrom::File(_) => None,
            PluginFrom::Store => self.sha256,
            PluginFrom::Oci { resolved, .. } => *resolved,
        }
    }
}

/// Where a module comes from.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum PluginFrom {
    /// Absolute path on every node.
    File(Box<str>),
    /// It was pushed to the control plane.
    Store,
    /// A registry, from which the control plane takes it.
    Oci {
        /// `HOST[:PORT]/REPOSITORY[:TAG|@sha256:DIGEST]`.
        image: Box<str>,
        /// How often the control plane looks what the tag means; `None` is only when policy changes.
        refresh: Option<Duration>,
        /// The registry speaks HTTP without TLS.
        insecure: bool,
        /// What the control plane has fetched, by its SHA-256; `None` until it has.
        resolved: Option<[u8; 32]>,
    },
}

/// A plugin's bounds.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct PluginLimits {
    /// Linear memory of one instance, in bytes.
    pub memory_bytes: u64,
    /// Longest time of one call.
    pub call_timeout: Duration,
    /// Instances alive at once on one worker.
    pub max_instances: u32,
    /// Body handed over, at most, in bytes; 0 hands none.
    pub max_body_bytes: u64,
    /// Elements of one table.
    pub table_elements: u32,
    /// Calls through the mesh that one call may make; of a proxy-wasm module, that one request may have under way.
    pub max_calls: u32,
    /// Log lines of one call.
    pub log_lines: u32,
    /// What its key-value store may take of a node's memory, in bytes; 0 is no store.
    pub store_bytes: u64,
    /// Entries of its key-value store.
    pub store_entries: u32,
}

impl PluginLimits {
    /// Where policy doesn't say: a filter is on the way of every request, a fallback only of those that failed.
    pub const fn of(kind: PluginKind) -> Self {
        Self {
            memory_bytes: 16 << 20,
            call_timeout: match kind {
                PluginKind::Filter | PluginKind::Router | PluginKind::ProxyWasm => Duration::from_millis(5),
                PluginKind::Fallback | PluginKind::WasiHttp => Duration::from_millis(50),
            },
            max_instances: 8,
            max_body_bytes: 0,
            table_elements: 20_000,
            max_calls: 4,
            log_lines: 100,
            store_bytes: 1 << 20,
            store_entries: 1024,
        }
    }
}

/// What a plugin may do beside answering.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct PluginAccess {
    /// Services that it may call through the mesh.
    pub services: Vec<Name>,
    /// What its module may import, as `NAMESPACE:PACKAGE/INTERFACE` or `NAMESPACE:PACKAGE/*`, or, of a module that is
    /// no component, `MODULE.FUNCTION` or `MODULE.*`; empty for whatever its kind may have.
    pub imports: Vec<Box<str>>,
}

/// When a plugin is left alone, and for how long.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Quarantine {
    /// So many faults...
    pub faults: u32,
    /// ...in so much time.
    pub window: Duration,
    /// How long it is left alone before one call tries it again.
    pub duration: Duration,
}

impl Default for Quarantine {
    fn default() -> Self {
        Self {
            faults: 5,
            window: Duration::from_secs(60),
            duration: Duration::from_secs(30),
        }
    }
}

/// Another version of a plugin.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct PluginCanary {
    /// Where its module is.
    pub source: PluginSource,
    /// Share of the requests that get it, 0 to 100.
    pub percent: u32,
    /// Requests that get it whatever the share.
    pub when: Option<FlagCondition>,
}

/// A plugin in a rule's way.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FilterRef {
    /// The plugin's name.
    pub plugin: Name,
    /// Handed to it as it stands; empty for the plugin's own.
    pub config: Arc<str>,
    /// The requests that it is for.
    pub when: Option<FlagCondition>,
}

/// The plugin that chooses among a rule's backends.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RouterRef {
    /// The plugin's name.
    pub plugin: Name,
    /// Handed to it as it stands; empty for the plugin's own.
    pub config: Arc<str>,
}

/// What a plugin's fault means.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum OnFault {
    /// Of a rung: the next one is tried.
    NextRung,
    /// Of a rung: the ladder ends.
    Fail,
    /// Of a filter or router: the request goes on as if the plugin weren't there.
    FailOpen,
    /// Of a filter or router: the request is refused.
    FailClosed,
}

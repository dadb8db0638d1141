//! The versions of a plugin that a process has, and what outlives them.

use crate::component;
use crate::counters::Counters;
use crate::proxy_wasm;
use crate::store::Store;
use leeward_policy::model::{Plugin, PluginKind};
use std::sync::{Arc, Mutex, PoisonError};

/// One version of a plugin, ready to be instantiated.
pub(crate) struct Version {
    pub(crate) code: Code,
    /// What it was linked as.
    pub(crate) kind: PluginKind,
    /// SHA-256 of the module.
    pub(crate) digest: [u8; 32],
    /// Its first 12 hex digits, for people.
    pub(crate) short: Arc<str>,
    /// Distinguishes it from what had the name before and comes after.
    pub(crate) serial: u64,
    pub(crate) shared: Arc<Shared>,
}

/// What is compiled, by its contract.
pub(crate) enum Code {
    Component(component::Code),
    ProxyWasm(proxy_wasm::Code),
}

/// What a plugin's versions and workers share.
pub(crate) struct Shared {
    /// The names that it counts under.
    pub(crate) counters: Counters,
    /// Its key-value store. Poison is harmless: every change is whole.
    pub(crate) store: Mutex<Store>,
    /// Queues and metrics of a proxy-wasm module.
    pub(crate) proxy_wasm: proxy_wasm::Shared,
}

impl Shared {
    pub(crate) fn new(spec: &Plugin) -> Self {
        Self {
            counters: Counters::default(),
            store: Mutex::new(Store::new(spec.limits.store_bytes, spec.limits.store_entries)),
            proxy_wasm: proxy_wasm::Shared::default(),
        }
    }

    /// Policy has other bounds now.
    pub(crate) fn resize(&self, spec: &Plugin) {
        let mut store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        store.resize(spec.limits.store_bytes, spec.limits.store_entries);
    }
}

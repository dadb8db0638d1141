//! What a worker's requests got last, by where it is in memory: a request mostly gets what the one before got, and to look
//! that up by name, and compare policies field by field, takes longer than many a plugin does.

use crate::host::Host;
use crate::version::Loaded;
use leeward_policy::model::Plugin;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

/// By the address of what an `Arc` holds. Each value holds the `Arc`, so that no other has its address meanwhile.
pub(crate) type ByAddress<T> = HashMap<usize, T, BuildHasherDefault<Address>>;

/// Policies of plugins that are remembered; more than anybody has at once.
const MAX: usize = 4096;

/// What plugins are under the policies of late.
#[derive(Default)]
pub(crate) struct Known {
    /// When that was, in changes of the host's plugins.
    changes: u64,
    loaded: ByAddress<(Arc<Plugin>, Arc<Loaded>)>,
}

impl Known {
    /// What a plugin is to a request that has this policy.
    pub(crate) fn loaded(&mut self, host: &Host, name: &str, spec: &Arc<Plugin>) -> Option<&Arc<Loaded>> {
        // First, so that a change in between is seen the next time.
        let changes = host.count_of_changes();
        if changes != self.changes || self.loaded.len() > MAX {
            self.loaded.clear();
            self.changes = changes;
        }
        let at = Arc::as_ptr(spec).addr();
        let (_, loaded) = match self.loaded.entry(at) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(room) => room.insert((Arc::clone(spec), host.loaded(name, spec)?)),
        };
        Some(loaded)
    }
}

/// A hash for addresses, which no request can choose: a multiplication (Fibonacci hashing, Knuth vol. 3 §6.4).
#[derive(Debug, Default)]
pub(crate) struct Address(u64);

impl Hasher for Address {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_usize(usize::from(*byte));
        }
    }

    fn write_usize(&mut self, word: usize) {
        self.0 = (self.0 ^ word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

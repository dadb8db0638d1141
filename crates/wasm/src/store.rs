//! A plugin's key-value store: bounded, with expiry; the least recently used entries go first.

/// What a plugin keeps on a node.
#[derive(Debug)]
pub(crate) struct Store {
    bytes: u64,
    entries: u32,
}

impl Store {
    /// An empty store.
    pub(crate) const fn new(bytes: u64, entries: u32) -> Self {
        Self { bytes, entries }
    }

    /// Has other bounds from now on.
    pub(crate) fn resize(&mut self, bytes: u64, entries: u32) {
        (self.bytes, self.entries) = (bytes, entries);
    }
}

//! The names of a plugin's own counters: few, however many calls, workers and versions it has.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// Names for each plugin.
const MAX_NAMES: usize = 32;
/// Bytes of a name.
const MAX_NAME: usize = 63;

/// The names that one plugin has counted under. Metrics are never forgotten while the process runs, so neither
/// are these.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    // Poison is harmless: an insert is all or nothing.
    names: Mutex<BTreeSet<Box<str>>>,
}

impl Counters {
    /// Whether this may be counted under its name: it is valid, and known or there is room for it.
    pub(crate) fn admit(&self, name: &str) -> bool {
        let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(word) {
            return false;
        }
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.contains(name) || (names.len() < MAX_NAMES && names.insert(name.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_few_and_valid() {
        let counters = Counters::default();
        for bad in ["", "A", "a-b", "a b", "\u{e9}", &"a".repeat(64)] {
            assert!(!counters.admit(bad), "{bad:?}");
        }
        assert!(counters.admit(&"a".repeat(63)));
        for n in 1..MAX_NAMES {
            assert!(counters.admit(&format!("n_{n}")));
        }
        assert!(!counters.admit("one_more"));
        assert!(counters.admit("n_1"), "what is known stays");
    }
}

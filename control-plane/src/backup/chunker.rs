//! Which entries go into a chunk together. Pure.
//!
//! Where a chunk ends is read off the keys around it, so that a change here does not move the ends everywhere: chunks
//! that hold what they held before have the same content, and are stored once for all backups. A large value, such as a
//! piece of a module, never shares a chunk with what is under another path.

use super::format::Entry;
use sha2::{Digest, Sha256};

/// Bytes from which on a chunk may end.
const SMALL: usize = 64 << 10;
/// Bytes from which on it ends.
const LARGE: usize = 1 << 20;
/// A value of so many bytes begins a chunk of its own if it is under another path than what was before.
const BULKY: usize = 16 << 10;
/// One of so many keys may end a chunk.
const ONE_IN: u8 = 32;

/// Groups entries that come in the order of their keys.
#[derive(Debug, Default)]
pub(crate) struct Chunker {
    entries: Vec<Entry>,
    bytes: usize,
    bulky: bool,
}

impl Chunker {
    /// Takes the next entry. Gives a chunk if one is full before it.
    pub(crate) fn push(&mut self, entry: Entry) -> Option<Vec<Entry>> {
        let full = self.ends_before(&entry).then(|| self.take());
        self.bytes += entry.key.len() + entry.value.len();
        self.bulky |= entry.value.len() >= BULKY;
        self.entries.push(entry);
        full
    }

    /// What is left at the end.
    pub(crate) fn finish(mut self) -> Option<Vec<Entry>> {
        (!self.entries.is_empty()).then(|| self.take())
    }

    fn take(&mut self) -> Vec<Entry> {
        (self.bytes, self.bulky) = (0, false);
        std::mem::take(&mut self.entries)
    }

    fn ends_before(&self, next: &Entry) -> bool {
        let Some(last) = self.entries.last() else {
            return false;
        };
        let turns = parent(&last.key) != parent(&next.key);
        if turns && (self.bulky || next.value.len() >= BULKY) {
            return true;
        }
        if self.bytes + next.key.len() + next.value.len() > LARGE {
            return true;
        }
        let first = Sha256::digest(&next.key).first().copied().unwrap_or(0);
        self.bytes >= SMALL && first % ONE_IN == 0
    }
}

/// The path that a key is under.
fn parent(key: &str) -> &str {
    key.rsplit_once('/').map_or("", |(parent, _)| parent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn chunks(entries: Vec<Entry>) -> Vec<Vec<Entry>> {
        let mut chunker = Chunker::default();
        let mut chunks: Vec<_> = entries.into_iter().filter_map(|e| chunker.push(e)).collect();
        chunks.extend(chunker.finish());
        chunks
    }

    fn entry(key: String, bytes: usize) -> Entry {
        Entry {
            value: vec![7; bytes].into(),
            key,
        }
    }

    #[test]
    fn every_entry_is_in_one_chunk_and_none_is_larger_than_it_may_be() {
        let entries: Vec<_> = (0..3000)
            .map(|n| entry(format!("res/{n:06}"), n % 3000))
            .collect();
        let chunks = chunks(entries.clone());
        assert!(chunks.len() > 5, "{}", chunks.len());
        for chunk in &chunks {
            let bytes: usize = chunk.iter().map(|e| e.key.len() + e.value.len()).sum();
            assert!(bytes <= LARGE, "{bytes}");
        }
        assert_eq!(chunks.concat(), entries);
    }

    #[test]
    fn a_change_makes_few_new_chunks() {
        let mut entries: Vec<_> = (0..20_000).map(|n| entry(format!("res/{n:06}"), 200)).collect();
        let before: HashSet<_> = chunks(entries.clone())
            .into_iter()
            .map(|c| super::super::format::encode_chunk(&c))
            .collect();
        entries.insert(10_000, entry("res/009999x".into(), 300));
        entries[3].value = vec![1; 201].into();
        let after = chunks(entries);
        let new = after
            .iter()
            .filter(|c| !before.contains(&super::super::format::encode_chunk(c)))
            .count();
        assert!(before.len() > 15 && new <= 6, "{new} new of {}", after.len());
    }

    #[test]
    fn a_module_shares_its_chunks_with_nothing_else() {
        let mut entries = vec![entry("a/1".into(), 10), entry("a/2".into(), 10)];
        entries.extend((0..3).map(|n| entry(format!("module/aa/{n}"), 65_536)));
        entries.extend((0..40).map(|n| entry(format!("module/bb/{n:02}"), 65_536)));
        entries.push(entry("z/1".into(), 10));
        for chunk in chunks(entries) {
            let parents: HashSet<_> = chunk.iter().map(|e| parent(&e.key).to_owned()).collect();
            assert_eq!(parents.len(), 1, "{parents:?}");
        }
    }
}

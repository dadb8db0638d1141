//! The flags of a document.

use crate::{Flag, InvalidFlag, parse};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The flags of one document, or of several that were merged. Cheap to clone.
///
/// Two sets are equal when they were read from the same documents in the same order.
#[derive(Clone, Debug, Default)]
pub struct FlagSet {
    documents: Arc<[Arc<str>]>,
    flags: Arc<BTreeMap<Box<str>, Arc<Flag>>>,
    metadata: Arc<Map<String, Value>>,
}

impl FlagSet {
    /// The longest document that is read: 1 MiB.
    pub const MAX_BYTES: usize = 1 << 20;
    /// The most flags that a document may have.
    pub const MAX_FLAGS: usize = 10_000;

    /// Reads a document.
    ///
    /// # Errors
    ///
    /// All that is wrong with it: it is no JSON, it is too long, it has too many flags, or some of them are broken.
    pub fn parse(document: &str) -> Result<Self, Vec<InvalidFlag>> {
        let (flags, metadata) = parse::document(document)?;
        Ok(Self {
            documents: Arc::new([document.into()]),
            flags: Arc::new(flags),
            metadata,
        })
    }

    /// The flags of several sets; where a key stands in two, the first one holds. The same goes for their metadata.
    pub fn merge<'a>(sets: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut sets = sets.into_iter().peekable();
        let first = sets.next();
        if let (Some(only), None) = (first, sets.peek()) {
            return only.clone();
        }
        let mut documents = Vec::new();
        let mut flags = BTreeMap::new();
        let mut metadata = Map::new();
        for set in first.into_iter().chain(sets) {
            documents.extend(set.documents.iter().cloned());
            for (key, flag) in set.flags.iter() {
                flags.entry(key.clone()).or_insert_with(|| Arc::clone(flag));
            }
            for (key, value) in set.metadata.iter() {
                metadata.entry(key).or_insert_with(|| value.clone());
            }
        }
        Self {
            documents: documents.into(),
            flags: Arc::new(flags),
            metadata: Arc::new(metadata),
        }
    }

    /// The document it was read from; empty for one that was merged from several.
    pub fn document(&self) -> &str {
        match &*self.documents {
            [only] => only,
            _ => "",
        }
    }

    /// The documents that it was read from, the one that goes first before the others.
    pub fn documents(&self) -> impl Iterator<Item = &str> {
        self.documents.iter().map(|document| &**document)
    }

    /// What the document says of itself, in `metadata`: texts, numbers and booleans.
    pub fn metadata(&self) -> &Map<String, Value> {
        &self.metadata
    }

    /// A flag by its key.
    pub fn get(&self, key: &str) -> Option<&Flag> {
        self.flags.get(key).map(|flag| &**flag)
    }

    /// The keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.flags.keys().map(|key| &**key)
    }
}

impl PartialEq for FlagSet {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.documents, &other.documents) || self.documents == other.documents
    }
}

impl Eq for FlagSet {}

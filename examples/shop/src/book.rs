//! The book of charges: what was charged, for which key, kept on disk.

use anyhow::Context;
use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// A line for each charge, and for each call that asked for one that was made before.
#[derive(Debug)]
pub(crate) struct Book(Mutex<Pages>);

#[derive(Debug)]
struct Pages {
    file: File,
    keys: HashSet<String>,
    counts: Counts,
}

/// What is in the book.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Counts {
    /// Different keys.
    pub(crate) keys: usize,
    /// Charges that were made.
    pub(crate) charges: u64,
    /// Calls that asked for one.
    pub(crate) calls: u64,
}

/// Keys that a book has room for.
const MAX_KEYS: usize = 1_000_000;
/// The longest key, in bytes.
const MAX_KEY: usize = 255;
const CHARGED: &str = "charged";
const AGAIN: &str = "again";

/// Why nothing is charged.
#[derive(Debug)]
pub(crate) enum Refused {
    Key,
    Full,
    Io(std::io::Error),
}

impl Book {
    /// Reads a book, or begins one.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let what = || format!("can't read the book {}", path.display());
        let mut file = File::options()
            .create(true)
            .read(true)
            .append(true)
            .open(path)
            .with_context(what)?;
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(what)?;
        // Whoever wrote a line without its end was killed before it answered.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        file.set_len(u64::try_from(whole)?).with_context(what)?;
        let mut pages = Pages {
            file,
            keys: HashSet::new(),
            counts: Counts::default(),
        };
        for line in text.get(..whole).unwrap_or_default().lines() {
            let (word, key) = line
                .split_once(' ')
                .with_context(|| format!("{}: {line:?}", what()))?;
            pages.note(word == CHARGED, key);
        }
        Ok(Self(Mutex::new(pages)))
    }

    /// Charges once for each key; `false` if that was done before. It is on disk when this returns.
    pub(crate) fn charge(&self, key: &str) -> Result<bool, Refused> {
        if key.is_empty() || key.len() > MAX_KEY || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Refused::Key);
        }
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = !pages.keys.contains(key);
        if new && pages.keys.len() >= MAX_KEYS {
            return Err(Refused::Full);
        }
        let word = if new { CHARGED } else { AGAIN };
        let written = pages.file.write_all(format!("{word} {key}\n").as_bytes());
        written
            .and_then(|()| pages.file.sync_data())
            .map_err(Refused::Io)?;
        pages.note(new, key);
        Ok(new)
    }

    pub(crate) fn counts(&self) -> Counts {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).counts
    }
}

impl Pages {
    fn note(&mut self, charged: bool, key: &str) {
        self.keys.insert(key.to_owned());
        self.counts.keys = self.keys.len();
        self.counts.charges += u64::from(charged);
        self.counts.calls += 1;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_key_is_charged_once_also_after_a_death_in_the_middle_of_a_line() {
        let path = std::env::temp_dir().join(format!("leeward-shop-book-{}", std::process::id()));
        std::fs::write(&path, "charged a\nagain a\nchar").unwrap();
        let counts = |keys, charges, calls| Counts { keys, charges, calls };
        let book = Book::open(&path).unwrap();
        assert_eq!(book.counts(), counts(1, 1, 2));
        assert!(!book.charge("a").unwrap());
        assert!(book.charge("b").unwrap());
        assert!(matches!(book.charge("b c"), Err(Refused::Key)));
        drop(book);
        let book = Book::open(&path).unwrap();
        assert_eq!(book.counts(), counts(2, 2, 4));
        assert!(!book.charge("b").unwrap());
        std::fs::remove_file(&path).unwrap();
    }
}

//! Names that have been checked once.

use std::fmt;
use std::sync::Arc;

/// The name of a resource, a zone or a proxy: one DNS label, lower case, 1 to 63 bytes (RFC 1123 §2.1).
///
/// Cheap to clone; equality is by content.
#[derive(Clone, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Name(Arc<str>);

impl Name {
    /// Longest accepted name, in bytes.
    pub const MAX_LEN: usize = 63;

    /// Checks `text` and takes a copy of it.
    ///
    /// # Errors
    ///
    /// [`InvalidName`] says what is wrong and where.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        if text.is_empty() || text.len() > Self::MAX_LEN {
            return Err(InvalidName::Length { len: text.len() });
        }
        match text.char_indices().find(|&(at, ch)| !allowed(text, at, ch)) {
            Some((at, ch)) => Err(InvalidName::Character { at, ch }),
            None => Ok(Self(Arc::from(text))),
        }
    }

    /// The name as it goes on the wire.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The shared text, for records that outlive the snapshot.
    pub fn to_shared(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl std::borrow::Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for Name {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::parse(text)
    }
}

/// Why a text is not a [`Name`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidName {
    /// Outside 1..=63 bytes.
    #[error("is {len} bytes long; a name is 1 to 63 bytes of a-z, 0-9 and '-'")]
    Length {
        /// Length found, in bytes.
        len: usize,
    },
    /// Not `[a-z0-9-]`, or a hyphen at either end.
    #[error("has {ch:?} at byte {at}; a name is a-z, 0-9 and '-', with no '-' at either end")]
    Character {
        /// Byte offset.
        at: usize,
        /// The offender.
        ch: char,
    },
}

fn allowed(text: &str, at: usize, ch: char) -> bool {
    match ch {
        'a'..='z' | '0'..='9' => true,
        '-' => at != 0 && at + 1 != text.len(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_dns_takes() {
        assert_eq!(Name::parse("cart-2").unwrap().as_str(), "cart-2");
        assert_eq!(Name::parse("-a"), Err(InvalidName::Character { at: 0, ch: '-' }));
        assert_eq!(Name::parse("a-"), Err(InvalidName::Character { at: 1, ch: '-' }));
        assert_eq!(
            Name::parse("Cart"),
            Err(InvalidName::Character { at: 0, ch: 'C' })
        );
        assert_eq!(Name::parse(""), Err(InvalidName::Length { len: 0 }));
        assert_eq!(Name::parse(&"a".repeat(64)), Err(InvalidName::Length { len: 64 }));
    }
}

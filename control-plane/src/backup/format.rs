//! What the objects of a backup hold, as bytes. Pure.
//!
//! A *chunk* holds entries of the store, keys and values, in the order of their keys. A *segment* holds changes of the
//! store in the order in which they happened. Both are sealed ([`super::seal`]) before they are stored, and what is
//! sealed ends with its own hash.

use bytes::Bytes;
use std::fmt;

/// A key of the store and its value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) value: Bytes,
}

/// One change of one key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Event {
    /// The position of the store that it made. Changes of one transaction share one.
    pub(crate) position: u64,
    /// When it was seen, in milliseconds since 1970.
    pub(crate) seen_ms: i64,
    pub(crate) key: String,
    /// What the key became; `None`: it was deleted.
    pub(crate) value: Option<Bytes>,
}

/// A stretch of the store's log: every change after one position, up to and with another.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Segment {
    /// Whose it is.
    pub(crate) store_id: String,
    /// It holds what happened after this position,
    pub(crate) after: u64,
    /// up to and with this one.
    pub(crate) to: u64,
    /// When it was shipped, in milliseconds since 1970.
    pub(crate) shipped_ms: i64,
    /// In order.
    pub(crate) events: Vec<Event>,
}

/// Why bytes are not what they should be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum FormatError {
    /// They begin with something else.
    Magic { want: &'static str },
    /// They end too early.
    Short { at: usize },
    /// A key is not after the one before it, or a position before the one before it.
    Order { at: usize },
    /// Something else can't be.
    Value { what: &'static str, at: usize },
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic { want } => write!(f, "does not begin with {want}"),
            Self::Short { at } => write!(f, "ends at byte {at}, in the middle"),
            Self::Order { at } => write!(f, "at byte {at}: out of order"),
            Self::Value { what, at } => write!(f, "at byte {at}: {what}"),
        }
    }
}

impl std::error::Error for FormatError {}

const CHUNK: &[u8; 4] = b"LWC1";
const SEGMENT: &[u8; 4] = b"LWL1";
/// Longest key, in bytes.
const MAX_KEY: usize = 4 << 10;
/// Largest value, in bytes.
const MAX_VALUE: usize = 16 << 20;

/// The bytes of a chunk. The entries are in the order of their keys.
pub(crate) fn encode_chunk(entries: &[Entry]) -> Vec<u8> {
    let size: usize = entries.iter().map(|e| e.key.len() + e.value.len() + 8).sum();
    let mut out = Vec::with_capacity(size + CHUNK.len());
    out.extend_from_slice(CHUNK);
    for entry in entries {
        put_entry(&mut out, &entry.key, &entry.value);
    }
    out
}

/// Appends an entry as chunks have it.
pub(crate) fn put_entry(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    put_bytes(out, key.as_bytes());
    put_bytes(out, value);
}

/// The entries of a chunk.
pub(crate) fn decode_chunk(bytes: &[u8]) -> Result<Vec<Entry>, FormatError> {
    let mut reader = Reader::new(bytes, CHUNK, "LWC1")?;
    let mut entries: Vec<Entry> = Vec::new();
    while !reader.is_done() {
        let at = reader.at;
        let (key, value) = (reader.text()?, Bytes::from(reader.bytes(MAX_VALUE)?));
        if entries.last().is_some_and(|last| last.key >= key) {
            return Err(FormatError::Order { at });
        }
        entries.push(Entry { key, value });
    }
    Ok(entries)
}

/// The bytes of a segment.
pub(crate) fn encode_segment(segment: &Segment) -> Vec<u8> {
    let mut out = SEGMENT.to_vec();
    put_bytes(&mut out, segment.store_id.as_bytes());
    out.extend_from_slice(&segment.after.to_be_bytes());
    out.extend_from_slice(&segment.to.to_be_bytes());
    out.extend_from_slice(&segment.shipped_ms.to_be_bytes());
    for event in &segment.events {
        out.extend_from_slice(&event.position.to_be_bytes());
        out.extend_from_slice(&event.seen_ms.to_be_bytes());
        put_bytes(&mut out, event.key.as_bytes());
        match &event.value {
            None => out.push(0),
            Some(value) => {
                out.push(1);
                put_bytes(&mut out, value);
            }
        }
    }
    out
}

/// A segment from its bytes.
pub(crate) fn decode_segment(bytes: &[u8]) -> Result<Segment, FormatError> {
    let mut reader = Reader::new(bytes, SEGMENT, "LWL1")?;
    let store_id = reader.text()?;
    let (after, to) = (reader.u64()?, reader.u64()?);
    let shipped_ms = reader.i64()?;
    if to < after {
        return Err(FormatError::Order { at: reader.at });
    }
    let (mut events, mut last) = (Vec::new(), after);
    while !reader.is_done() {
        let at = reader.at;
        let (position, seen_ms) = (reader.u64()?, reader.i64()?);
        if position <= after || position < last || position > to {
            return Err(FormatError::Order { at });
        }
        last = position;
        let key = reader.text()?;
        let at = reader.at;
        let value = match reader.u8()? {
            0 => None,
            1 => Some(Bytes::from(reader.bytes(MAX_VALUE)?)),
            _ => {
                return Err(FormatError::Value {
                    what: "neither a value nor a deletion",
                    at,
                });
            }
        };
        events.push(Event {
            position,
            seen_ms,
            key,
            value,
        });
    }
    Ok(Segment {
        store_id,
        after,
        to,
        shipped_ms,
        events,
    })
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    // What is longer than the bounds above does not come out of a store.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(bytes);
}

struct Reader<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn new(all: &'a [u8], magic: &[u8], want: &'static str) -> Result<Self, FormatError> {
        if !all.starts_with(magic) {
            return Err(FormatError::Magic { want });
        }
        Ok(Self { all, at: magic.len() })
    }

    const fn is_done(&self) -> bool {
        self.at == self.all.len()
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let end = self.at.checked_add(count);
        let taken = end.and_then(|end| self.all.get(self.at..end));
        let taken = taken.ok_or(FormatError::Short { at: self.all.len() })?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let at = self.all.len();
        self.take(N)?.try_into().map_err(|_| FormatError::Short { at })
    }

    fn u8(&mut self) -> Result<u8, FormatError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_be_bytes)
    }

    fn i64(&mut self) -> Result<i64, FormatError> {
        self.array().map(i64::from_be_bytes)
    }

    fn text(&mut self) -> Result<String, FormatError> {
        let at = self.at;
        let what = "a key is not text";
        String::from_utf8(self.bytes(MAX_KEY)?).map_err(|_| FormatError::Value { what, at })
    }

    fn bytes(&mut self, most: usize) -> Result<Vec<u8>, FormatError> {
        let at = self.at;
        let length = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if length > most {
            return Err(FormatError::Value {
                what: "longer than anything may be",
                at,
            });
        }
        self.take(length).map(<[u8]>::to_vec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let value = prop::collection::vec(any::<u8>(), 0..40);
        prop::collection::btree_map("[a-z/é]{0,9}", value, 0..20).prop_map(|map| {
            let entry = |(key, value)| Entry {
                key,
                value: Bytes::from(value),
            };
            map.into_iter().map(entry).collect()
        })
    }

    fn segment() -> impl Strategy<Value = Segment> {
        let event = (
            0u64..3,
            any::<i64>(),
            "[a-z/]{0,9}",
            prop::option::of(prop::collection::vec(any::<u8>(), 0..9).prop_map(Bytes::from)),
        );
        (
            "[a-z0-9]{0,12}",
            0u64..1000,
            prop::collection::vec(event, 0..9),
            0u64..5,
        )
            .prop_map(|(store_id, after, steps, more)| {
                let mut position = after + 1;
                let events: Vec<_> = steps
                    .into_iter()
                    .map(|(step, seen_ms, key, value)| {
                        position += step;
                        Event {
                            position,
                            seen_ms,
                            key,
                            value,
                        }
                    })
                    .collect();
                Segment {
                    store_id,
                    after,
                    to: position + more,
                    shipped_ms: 7,
                    events,
                }
            })
    }

    proptest! {
        #[test]
        fn a_chunk_comes_back_as_it_was_and_not_cut_short(entries in entries(), cut in any::<prop::sample::Index>()) {
            let bytes = encode_chunk(&entries);
            prop_assert_eq!(&decode_chunk(&bytes).unwrap(), &entries);
            let short = &bytes[..cut.index(bytes.len())];
            // It may end at an entry's end: what holds a chunk together is its hash. It is never something else.
            if let Ok(fewer) = decode_chunk(short) {
                prop_assert!(entries.starts_with(&fewer));
            }
        }

        #[test]
        fn a_segment_comes_back_as_it_was(segment in segment()) {
            prop_assert_eq!(decode_segment(&encode_segment(&segment)).unwrap(), segment);
        }

        #[test]
        fn nothing_that_is_no_segment_or_chunk_breaks_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            for magic in [&CHUNK[..], &SEGMENT[..]] {
                let bytes = [magic, &bytes].concat();
                let _ = (decode_chunk(&bytes), decode_segment(&bytes));
            }
        }
    }

    #[test]
    fn what_is_out_of_order_is_refused() {
        let entry = |key: &str| Entry {
            key: key.into(),
            value: Bytes::new(),
        };
        let bytes = encode_chunk(&[entry("b"), entry("a")]);
        assert_eq!(
            decode_chunk(&bytes).unwrap_err().to_string(),
            "at byte 13: out of order"
        );
        let event = |position| Event {
            position,
            seen_ms: 0,
            key: "k".into(),
            value: None,
        };
        for positions in [vec![5], vec![9, 8], vec![11]] {
            let segment = Segment {
                store_id: "s".into(),
                after: 5,
                to: 10,
                shipped_ms: 0,
                events: positions.into_iter().map(event).collect(),
            };
            let refused = decode_segment(&encode_segment(&segment)).unwrap_err();
            assert!(matches!(refused, FormatError::Order { .. }), "{refused}");
        }
    }
}

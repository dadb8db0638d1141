//! Frames: each record with its length and a checksum over all of it, so that one that is damaged is known, and costs none
//! but itself. Pure.
//!
//! ```text
//! "LWST"  version u16  length u32  xxh64 of version, length and record u64  record
//! ```
//!
//! Numbers are little-endian. This much is the same in every version, so that a later one is told from damage.

use std::hash::Hasher;
use twox_hash::XxHash64;

/// The version of what is in the frames. Another one means that what is there must not be read as this.
pub(super) const VERSION: u16 = 1;
/// The longest record, in bytes. A control plane's largest message is shorter.
pub(super) const MAX_RECORD: usize = 32 << 20;

const MAGIC: [u8; 4] = *b"LWST";
const HEADER: usize = MAGIC.len() + 2 + 4 + 8;

/// What stands next.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Found<'a> {
    /// A record, and where its frame ends.
    Record(&'a [u8], usize),
    /// A record of a later version of this format.
    Later(u16),
    /// Bytes that are no frame, up to where the next one begins, or to the end.
    Damage(usize),
}

/// A record in its frame; `None` if it is too long.
pub(super) fn framed(record: &[u8]) -> Option<Vec<u8>> {
    framed_as(VERSION, record)
}

pub(super) fn framed_as(version: u16, record: &[u8]) -> Option<Vec<u8>> {
    let length = u32::try_from(record.len())
        .ok()
        .filter(|_| record.len() <= MAX_RECORD)?;
    let mut frame = Vec::with_capacity(HEADER + record.len());
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&version.to_le_bytes());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&checksum(version, length, record).to_le_bytes());
    frame.extend_from_slice(record);
    Some(frame)
}

/// What stands at `at`; `None` at the end.
pub(super) fn next(bytes: &[u8], at: usize) -> Option<Found<'_>> {
    let rest = bytes.get(at..).filter(|rest| !rest.is_empty())?;
    if let Some(found) = frame(rest) {
        return Some(match found {
            (VERSION, record) => Found::Record(record, at + HEADER + record.len()),
            (later, _) => Found::Later(later),
        });
    }
    let begins = |from: usize| {
        let after = rest.get(from..)?;
        let magic = after.windows(MAGIC.len()).position(|window| window == MAGIC)?;
        Some(from + magic)
    };
    let mut from = 1;
    while let Some(candidate) = begins(from) {
        if rest.get(candidate..).and_then(frame).is_some() {
            return Some(Found::Damage(at + candidate));
        }
        from = candidate + 1;
    }
    Some(Found::Damage(bytes.len()))
}

/// The version and record of the whole frame that these bytes begin with.
fn frame(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let rest = bytes.strip_prefix(&MAGIC)?;
    let (version, rest) = rest.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let (sum, rest) = rest.split_first_chunk()?;
    let (version, length) = (u16::from_le_bytes(*version), u32::from_le_bytes(*length));
    let record = rest.get(..usize::try_from(length).ok()?)?;
    let is_right =
        record.len() <= MAX_RECORD && checksum(version, length, record) == u64::from_le_bytes(*sum);
    is_right.then_some((version, record))
}

fn checksum(version: u16, length: u32, record: &[u8]) -> u64 {
    let mut hasher = XxHash64::with_seed(u64::from_le_bytes(*b"leeward1"));
    hasher.write(&version.to_le_bytes());
    hasher.write(&length.to_le_bytes());
    hasher.write(record);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_damaged_costs_none_but_itself() {
        let records = [b"one".as_slice(), b"LWST two", b"", b"four"];
        let frames: Vec<Vec<u8>> = records.iter().map(|record| framed(record).unwrap()).collect();
        let whole = frames.concat();
        let starts: Vec<usize> = frames
            .iter()
            .scan(0, |at, frame| {
                *at += frame.len();
                Some(*at - frame.len())
            })
            .collect();
        for flipped in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[flipped] ^= 0x40;
            let damaged = starts.iter().rposition(|start| *start <= flipped).unwrap();
            let (mut at, mut seen, mut damage) = (0, Vec::new(), 0);
            while let Some(found) = next(&bytes, at) {
                at = match found {
                    Found::Record(record, end) => {
                        seen.push(record);
                        end
                    }
                    Found::Damage(end) => {
                        damage += 1;
                        end
                    }
                    Found::Later(version) => panic!("{flipped}: version {version}"),
                };
            }
            let mut want = records.to_vec();
            want.remove(damaged);
            assert_eq!((seen, damage), (want, 1), "byte {flipped}");
        }
    }

    #[test]
    fn a_later_version_is_told_from_damage() {
        let mut frame = framed(b"what").unwrap();
        frame[4..6].copy_from_slice(&7_u16.to_le_bytes());
        assert_eq!(next(&frame, 0), Some(Found::Damage(frame.len())));
        assert_eq!(next(&framed_as(7, b"what").unwrap(), 0), Some(Found::Later(7)));
    }
}

//! Variable-length integers, as QUIC has them (RFC 9000 §16).

use bytes::{BufMut, BytesMut};

/// The largest value.
pub(crate) const MAX: u64 = (1 << 62) - 1;
/// Bytes that [`put_padded`] takes.
pub(crate) const PADDED: usize = 4;

/// Appends a value in its shortest form. Values above [`MAX`] don't occur; they are written as it.
pub(crate) fn put(buf: &mut BytesMut, value: u64) {
    if value <= 0x3f {
        // Most of a head's.
        return buf.put_u8(value.to_le_bytes()[0]);
    }
    let value = value.min(MAX);
    let bytes = value.to_be_bytes();
    let (mark, from) = match value {
        0..=0x3fff => (0x40, 6),
        0x4000..=0x3fff_ffff => (0x80, 4),
        _ => (0xc0, 0),
    };
    for (i, byte) in bytes.iter().skip(from).enumerate() {
        buf.put_u8(if i == 0 { byte | mark } else { *byte });
    }
}

/// The form of four bytes, for a length that is known only later. Lengths are far below its 2^30.
pub(crate) fn padded(value: usize) -> [u8; PADDED] {
    let value = u32::try_from(value).unwrap_or(u32::MAX) & 0x3fff_ffff;
    (value | 0x8000_0000).to_be_bytes()
}

/// The value at the beginning of `bytes`, and how many bytes it takes. `None` if there are too few.
pub(crate) fn get(bytes: &[u8]) -> Option<(u64, usize)> {
    let first = *bytes.first()?;
    if first <= 0x3f {
        return Some((u64::from(first), 1));
    }
    let len = 1usize << (first >> 6);
    let rest = bytes.get(1..len)?;
    let value = rest.iter().fold(u64::from(first & 0x3f), |value, byte| {
        value << 8 | u64::from(*byte)
    });
    Some((value, len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_put_is_got(value in 0..=MAX, small in 0..70_000u64) {
            for value in [value, small] {
                let mut buf = BytesMut::new();
                put(&mut buf, value);
                prop_assert_eq!(get(&buf), Some((value, buf.len())));
                prop_assert_eq!(get(&buf[..buf.len() - 1]), None);
            }
        }

        #[test]
        fn the_padded_form_is_the_same_number(value in 0..1usize << 30) {
            prop_assert_eq!(get(&padded(value)), Some((value as u64, PADDED)));
        }
    }

    #[test]
    fn takes_the_examples_of_the_standard() {
        // RFC 9000 §A.1.
        assert_eq!(
            get(&[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c]),
            Some((151_288_809_941_952_652, 8))
        );
        assert_eq!(get(&[0x9d, 0x7f, 0x3e, 0x7d]), Some((494_878_333, 4)));
        assert_eq!(get(&[0x7b, 0xbd]), Some((15_293, 2)));
        assert_eq!(get(&[0x40, 0x25]), Some((37, 2)));
        assert_eq!(get(&[]), None);
    }
}

//! The ABI's numbers, and how it writes lists of fields down.

pub(crate) use crate::filter::Way;
use std::ops::Range;

/// What a function of the host answers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Status {
    NotFound = 1,
    BadArgument = 2,
    ParseFailure = 4,
    InvalidMemoryAccess = 6,
    Empty = 7,
    CasMismatch = 8,
    InternalFailure = 10,
    Unimplemented = 12,
}

/// As the guest gets it; 0 is success.
pub(crate) fn answer(result: Result<(), Status>) -> i32 {
    result.map_or_else(|status| status as i32, |()| 0)
}

/// A version of the ABI.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Version {
    V0_1_0,
    V0_2_0,
    V0_2_1,
}

impl Version {
    /// Every version, by the export that says so.
    pub(crate) const ALL: [(&'static str, Self); 3] = [
        ("proxy_abi_version_0_2_1", Self::V0_2_1),
        ("proxy_abi_version_0_2_0", Self::V0_2_0),
        ("proxy_abi_version_0_1_0", Self::V0_1_0),
    ];
}

impl Way {
    /// By the number of a stream.
    pub(crate) const fn of_stream(number: u32) -> Result<Self, Status> {
        match number {
            0 => Ok(Self::Request),
            1 => Ok(Self::Response),
            // Streams of TCP connections, which no plugin has here.
            2 | 3 => Err(Status::Unimplemented),
            _ => Err(Status::BadArgument),
        }
    }
}

/// A map of fields.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Map {
    Headers(Way),
    Trailers(Way),
    GrpcInitial,
    GrpcTrailing,
    CallHeaders,
    CallTrailers,
}

impl Map {
    pub(crate) const fn of(number: u32) -> Result<Self, Status> {
        Ok(match number {
            0 => Self::Headers(Way::Request),
            1 => Self::Trailers(Way::Request),
            2 => Self::Headers(Way::Response),
            3 => Self::Trailers(Way::Response),
            4 => Self::GrpcInitial,
            5 => Self::GrpcTrailing,
            6 => Self::CallHeaders,
            7 => Self::CallTrailers,
            _ => return Err(Status::BadArgument),
        })
    }
}

/// A buffer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Buffer {
    Body(Way),
    CallBody,
    GrpcMessage,
    VmConfig,
    PluginConfig,
    /// Of TCP connections and of foreign functions: never there.
    None,
}

impl Buffer {
    pub(crate) const fn of(number: u32) -> Result<Self, Status> {
        Ok(match number {
            0 => Self::Body(Way::Request),
            1 => Self::Body(Way::Response),
            2 | 3 | 8 => Self::None,
            4 => Self::CallBody,
            5 => Self::GrpcMessage,
            6 => Self::VmConfig,
            7 => Self::PluginConfig,
            _ => return Err(Status::BadArgument),
        })
    }
}

/// A field of a list, by name and value.
pub(crate) type Pair<'a> = (&'a [u8], &'a [u8]);

/// Fields of a list that a guest hands over.
pub(crate) const MAX_FIELDS: usize = 128;
/// Bytes of all their names and values together.
pub(crate) const MAX_HEADERS: usize = 64 << 10;

/// Writes pairs down: how many, the length of each key and value, then each with a zero byte behind it.
pub(crate) fn serialize<'a>(pairs: impl Iterator<Item = Pair<'a>> + Clone) -> Vec<u8> {
    let (count, bytes) = pairs.clone().fold((0, 4), |(count, bytes), (k, v)| {
        (count + 1, bytes + 10 + k.len() + v.len())
    });
    if count == 0 {
        return Vec::new();
    }
    let mut out = Vec::with_capacity(bytes);
    let number = |out: &mut Vec<u8>, n: usize| {
        out.extend_from_slice(&u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes());
    };
    number(&mut out, count);
    for (key, value) in pairs.clone() {
        number(&mut out, key.len());
        number(&mut out, value.len());
    }
    for (key, value) in pairs {
        out.extend_from_slice(key);
        out.push(0);
        out.extend_from_slice(value);
        out.push(0);
    }
    out
}

/// Bytes that [`serialize`] makes of them.
pub(crate) fn serialized_size<'a>(pairs: impl Iterator<Item = Pair<'a>>) -> usize {
    let sum: usize = pairs.map(|(k, v)| 10 + k.len() + v.len()).sum();
    if sum == 0 { 0 } else { 4 + sum }
}

/// Reads pairs that a guest wrote down.
///
/// # Errors
///
/// [`Status::BadArgument`] if they are cut off, too many or too large.
pub(crate) fn parse(bytes: &[u8]) -> Result<Vec<Pair<'_>>, Status> {
    // An empty list is nothing, or one zero byte, or a count of none.
    if bytes.len() <= 1 {
        return Ok(Vec::new());
    }
    let count = number(bytes, 0)?;
    if count > MAX_FIELDS || bytes.len() > MAX_HEADERS + 4 + 10 * MAX_FIELDS {
        return Err(Status::BadArgument);
    }
    let mut at = 4 + 8 * count;
    let mut take = |len: usize| {
        let end = at.checked_add(len).ok_or(Status::BadArgument)?;
        let taken = slice(bytes, at..end)?;
        at = end + 1;
        Ok::<_, Status>(taken)
    };
    let mut pairs = Vec::with_capacity(count);
    for n in 0..count {
        let key = take(number(bytes, 4 + 8 * n)?)?;
        let value = take(number(bytes, 8 + 8 * n)?)?;
        pairs.push((key, value));
    }
    Ok(pairs)
}

fn number(bytes: &[u8], at: usize) -> Result<usize, Status> {
    let four = slice(bytes, at..at + 4)?
        .try_into()
        .map_err(|_| Status::BadArgument)?;
    Ok(u32::from_le_bytes(four) as usize)
}

fn slice(bytes: &[u8], range: Range<usize>) -> Result<&[u8], Status> {
    bytes.get(range).ok_or(Status::BadArgument)
}

/// Bytes of a guest's memory.
pub(crate) fn read(memory: &[u8], at: u32, len: u32) -> Result<&[u8], Status> {
    let at = at as usize;
    let end = at.checked_add(len as usize);
    end.and_then(|end| memory.get(at..end))
        .ok_or(Status::InvalidMemoryAccess)
}

/// Puts bytes into a guest's memory.
pub(crate) fn write(memory: &mut [u8], at: u32, bytes: &[u8]) -> Result<(), Status> {
    let at = at as usize;
    let end = at.checked_add(bytes.len());
    let place = end.and_then(|end| memory.get_mut(at..end));
    place.ok_or(Status::InvalidMemoryAccess)?.copy_from_slice(bytes);
    Ok(())
}

/// Puts a number of 32 bits into a guest's memory.
pub(crate) fn write_u32(memory: &mut [u8], at: u32, number: u32) -> Result<(), Status> {
    write(memory, at, &number.to_le_bytes())
}

/// Puts a number of 64 bits into a guest's memory.
pub(crate) fn write_u64(memory: &mut [u8], at: u32, number: u64) -> Result<(), Status> {
    write(memory, at, &number.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pairs_are_written_as_the_specification_has_them() {
        let pairs: [(&[u8], &[u8]); 2] = [(b"a", b"1"), (b"b", b"22")];
        let bytes = serialize(pairs.iter().copied());
        let want = b"\x02\0\0\0\x01\0\0\0\x01\0\0\0\x01\0\0\0\x02\0\0\0a\x001\0b\x0022\0";
        assert_eq!(bytes, want);
        assert_eq!(parse(&bytes), Ok(pairs.to_vec()));
        assert_eq!(serialized_size(pairs.iter().copied()), bytes.len());
        assert!(serialize(std::iter::empty()).is_empty());
        for empty in [&b""[..], b"\0", b"\0\0\0\0"] {
            assert_eq!(parse(empty), Ok(Vec::new()));
        }
    }

    #[test]
    fn lists_are_bounded() {
        let list = |count: usize, len: usize| {
            let value = vec![b'v'; len];
            serialize(std::iter::repeat_n((&b"k"[..], &value[..]), count))
        };
        assert!(parse(&list(MAX_FIELDS, 1)).is_ok());
        assert_eq!(parse(&list(MAX_FIELDS + 1, 1)), Err(Status::BadArgument));
        assert_eq!(parse(&list(100, 2000)), Err(Status::BadArgument));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(pairs in prop::collection::vec((".{0,9}", ".{0,9}"), 0..9)) {
            let pairs: Vec<_> = pairs.iter().map(|(k, v)| (k.as_bytes(), v.as_bytes())).collect();
            let bytes = serialize(pairs.iter().copied());
            prop_assert_eq!(parse(&bytes), Ok(pairs));
        }

        #[test]
        fn no_bytes_are_too_odd_to_be_read(bytes in prop::collection::vec(any::<u8>(), 0..99)) {
            // Whatever comes of it.
            let _ = parse(&bytes);
        }
    }
}

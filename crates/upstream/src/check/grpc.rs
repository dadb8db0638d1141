//! The two messages of `grpc.health.v1` that a check needs, written and read by hand: each has one field, and
//! this crate names no generated types.
//!
//! ```proto
//! message HealthCheckRequest { string service = 1; }
//! message HealthCheckResponse { ServingStatus status = 1; }   // an enum; SERVING = 1
//! ```
//!
//! On the wire each is one gRPC message: a byte that says whether it is compressed, its length as 4 bytes
//! big-endian, and then the protobuf fields. See <https://github.com/grpc/grpc/blob/master/doc/health-checking.md>,
//! PROTOCOL-HTTP2.md beside it, and <https://protobuf.dev/programming-guides/encoding/>.

use bytes::{BufMut, Bytes, BytesMut};

/// The method's path.
pub(super) const PATH: &str = "/grpc.health.v1.Health/Check";
/// SERVING, the one status that passes.
pub(super) const SERVING: i32 = 1;
/// Longest answer that is read, in bytes. A whole one has 7.
pub(super) const MAX_ANSWER: usize = 4096;

/// Length of what stands before a message.
const PREFIX: usize = 5;
/// Field 1, wire type 2: bytes with their length.
const SERVICE: u8 = 0x0a;
/// Field 1, wire type 0: a varint.
const STATUS: u64 = 0x08;

/// A `HealthCheckRequest` as a gRPC message.
pub(super) fn request(service: &str) -> Bytes {
    let mut fields = BytesMut::new();
    // What is empty is left out, as proto3 does.
    if !service.is_empty() {
        fields.put_u8(SERVICE);
        put_varint(&mut fields, service.len());
        fields.put_slice(service.as_bytes());
    }
    let mut message = BytesMut::with_capacity(PREFIX + fields.len());
    message.put_u8(0);
    // Policy bounds names far below 4 GiB.
    message.put_u32(u32::try_from(fields.len()).unwrap_or(u32::MAX));
    message.put_slice(&fields);
    message.freeze()
}

fn put_varint(to: &mut BytesMut, mut value: usize) {
    while value >= 0x80 {
        to.put_u8(low_bits(value) | 0x80);
        value >>= 7;
    }
    to.put_u8(low_bits(value));
}

fn low_bits(value: usize) -> u8 {
    u8::try_from(value & 0x7f).unwrap_or(0)
}

/// The status in a body that should be one `HealthCheckResponse` as a gRPC message.
///
/// # Errors
///
/// What is wrong with the body, for people.
pub(super) fn status(body: &[u8]) -> Result<i32, &'static str> {
    let (prefix, mut fields) = body
        .split_first_chunk::<PREFIX>()
        .ok_or("the answer has no message")?;
    let [compressed, length @ ..] = *prefix;
    if compressed != 0 {
        return Err("the message is compressed, which was not asked for");
    }
    if usize::try_from(u32::from_be_bytes(length)) != Ok(fields.len()) {
        return Err("the message's length is wrong");
    }
    let mut status = 0;
    while !fields.is_empty() {
        let key = varint(&mut fields)?;
        // The low three bits say how the value is written, the others which field it is.
        match key & 7 {
            0 => {
                let value = varint(&mut fields)?;
                if key == STATUS {
                    // Negative numbers of an enum are written as 64 bits; the last of several counts.
                    status = i32::try_from(value.cast_signed()).map_err(|_| "the status is out of range")?;
                }
            }
            1 => skip(&mut fields, 8)?,
            2 => {
                let length = usize::try_from(varint(&mut fields)?).map_err(|_| CUT_SHORT)?;
                skip(&mut fields, length)?;
            }
            5 => skip(&mut fields, 4)?,
            _ => return Err("the message has a field of an unknown kind"),
        }
    }
    Ok(status)
}

const CUT_SHORT: &str = "the message ends within a field";

fn varint(from: &mut &[u8]) -> Result<u64, &'static str> {
    let mut value = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let (byte, rest) = from.split_first().ok_or(CUT_SHORT)?;
        *from = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("the message has a number of more than 64 bits")
}

fn skip(from: &mut &[u8], length: usize) -> Result<(), &'static str> {
    *from = from.get(length..).ok_or(CUT_SHORT)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn framed(fields: &[u8]) -> Vec<u8> {
        let length = u32::try_from(fields.len()).unwrap();
        [&[0][..], &length.to_be_bytes(), fields].concat()
    }

    #[test]
    fn requests_are_as_protoc_writes_them() {
        assert_eq!(&request("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&request("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        let long = "x".repeat(300);
        assert_eq!(
            request(&long)[..8],
            [0, 0, 0, 1, 0x2f, 0x0a, 0xac, 2],
            "300 in two bytes"
        );
    }

    #[test]
    fn the_status_is_found_among_fields_of_later_versions() {
        assert_eq!(status(&framed(&[])), Ok(0), "left out is UNKNOWN");
        assert_eq!(status(&framed(&[8, 1])), Ok(1));
        assert_eq!(status(&framed(&[8, 1, 8, 2])), Ok(2), "the last counts");
        let minus_one = [8, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1];
        assert_eq!(status(&framed(&minus_one)), Ok(-1));
        let others = [
            0x12, 2, 8, 2, // field 2, bytes
            0x19, 1, 2, 3, 4, 5, 6, 7, 8, // field 3, 64 bits
            0x25, 1, 2, 3, 4, // field 4, 32 bits
            0x28, 0xac, 2, // field 5, varint
            8, 1,
        ];
        assert_eq!(status(&framed(&others)), Ok(1));
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        let cases: [&[u8]; 8] = [
            &[],
            &[0, 0, 0, 0],
            &[1, 0, 0, 0, 2, 8, 1],
            &[0, 0, 0, 0, 3, 8, 1],
            &[0, 0, 0, 0, 1, 8, 1],
            &framed(&[8]),
            &framed(&[0x12, 5, 1]),
            &framed(&[0x0b]),
        ];
        for body in cases {
            assert!(status(body).is_err(), "{body:?}");
        }
        let endless = framed(&[0xff; 12]);
        assert!(status(&endless).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(body in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = status(&body);
            let _ = status(&framed(&body));
        }

        #[test]
        fn every_status_is_read_back(value in any::<i32>()) {
            let mut fields = vec![8];
            let mut rest = i64::from(value).cast_unsigned();
            while rest >= 0x80 {
                fields.push(u8::try_from(rest & 0x7f).unwrap() | 0x80);
                rest >>= 7;
            }
            fields.push(u8::try_from(rest).unwrap());
            prop_assert_eq!(status(&framed(&fields)), Ok(value));
        }
    }
}

//! How much a peer makes us hold in frames.
//!
//! A frame other than DATA is decoded once it is whole, so until then all of it is held; its length says beforehand how
//! much that will be.

/// Watches the bytes of one stream.
#[derive(Debug)]
pub(crate) struct Guard {
    limit: u64,
    state: State,
    /// The beginning of what is read, as much as two numbers can take.
    head: [u8; 16],
    have: usize,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// The type of a stream of one direction comes.
    StreamType,
    /// The type and the length of a frame come.
    Frame,
    /// So much of a frame's payload is to come.
    Payload(u64),
    /// No frames come here, or they are nobody's.
    Off,
}

/// A frame is larger than is good.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct TooLarge;

/// RFC 9114 §7.2.1.
const DATA: u64 = 0x00;
/// RFC 9114 §6.2.1.
const CONTROL: u64 = 0x00;

impl Guard {
    /// Of a stream for a request.
    pub(crate) const fn of_request(limit: u64) -> Self {
        Self::new(limit, State::Frame)
    }

    /// Of a stream of one direction.
    pub(crate) const fn of_uni(limit: u64) -> Self {
        Self::new(limit, State::StreamType)
    }

    const fn new(limit: u64, state: State) -> Self {
        Self {
            limit,
            state,
            head: [0; 16],
            have: 0,
        }
    }

    /// Looks at the next bytes.
    pub(crate) fn see(&mut self, mut bytes: &[u8]) -> Result<(), TooLarge> {
        while !bytes.is_empty() {
            match self.state {
                State::Off => return Ok(()),
                State::Payload(left) => {
                    let seen = left.min(bytes.len() as u64);
                    bytes = usize::try_from(seen)
                        .ok()
                        .and_then(|seen| bytes.get(seen..))
                        .unwrap_or_default();
                    self.state = match left - seen {
                        0 => State::Frame,
                        left => State::Payload(left),
                    };
                }
                State::StreamType | State::Frame => {
                    let Some((byte, rest)) = bytes.split_first() else {
                        return Ok(());
                    };
                    bytes = rest;
                    if let Some(place) = self.head.get_mut(self.have) {
                        *place = *byte;
                    }
                    self.have += 1;
                    self.decide()?;
                }
            }
        }
        Ok(())
    }

    /// What the head says, if it is whole.
    fn decide(&mut self) -> Result<(), TooLarge> {
        let head = self.head.get(..self.have).unwrap_or_default();
        let Some((kind, rest)) = number(head) else {
            return Ok(());
        };
        if self.state == State::StreamType {
            self.have = 0;
            self.state = if kind == CONTROL { State::Frame } else { State::Off };
            return Ok(());
        }
        let Some((length, _)) = number(rest) else {
            return Ok(());
        };
        self.have = 0;
        if kind != DATA && length > self.limit {
            return Err(TooLarge);
        }
        self.state = if length == 0 {
            State::Frame
        } else {
            State::Payload(length)
        };
        Ok(())
    }
}

/// A number (RFC 9000 §16) at the beginning of `bytes`, and what follows it.
fn number(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (first, _) = bytes.split_first()?;
    let (number, rest) = bytes.split_at_checked(1 << (first >> 6))?;
    let value = number
        .iter()
        .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    let mask = u64::MAX >> (66 - 8 * number.len());
    Some((value & mask, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put(into: &mut Vec<u8>, number: u64) {
        match number {
            0..0x40 => into.push(u8::try_from(number).unwrap()),
            0x40..0x4000 => into.extend((u16::try_from(number).unwrap() | 0x4000).to_be_bytes()),
            0x4000..0x4000_0000 => into.extend((u32::try_from(number).unwrap() | 0x8000_0000).to_be_bytes()),
            _ => into.extend((number | 0xc000_0000_0000_0000).to_be_bytes()),
        }
    }

    #[test]
    fn numbers_are_those_of_the_rfc() {
        // RFC 9000 §A.1.
        for (bytes, value) in [
            (&[0x25][..], 37),
            (&[0x40, 0x25], 37),
            (&[0x7b, 0xbd], 15_293),
            (&[0x9d, 0x7f, 0x3e, 0x7d], 494_878_333),
            (
                &[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c],
                151_288_809_941_952_652,
            ),
        ] {
            assert_eq!(number(bytes), Some((value, &[][..])));
            assert_eq!(number(&bytes[..bytes.len() - 1]), None);
        }
    }

    proptest! {
        #[test]
        fn a_frame_that_is_too_large_is_seen_before_it_comes(
            frames in prop::collection::vec((0u64..9, 0usize..300), 0..6),
            kind in 1u64..0x1_0000,
            over in 1u64..1 << 40,
            piece in 1usize..40,
            control in any::<bool>(),
        ) {
            const LIMIT: u64 = 256;
            let mut bytes = Vec::new();
            let mut guard = if control { put(&mut bytes, 0); Guard::of_uni(LIMIT) } else { Guard::of_request(LIMIT) };
            for (kind, length) in frames {
                // Data may have any length.
                let length = if kind == 0 { length } else { length.min(256) };
                put(&mut bytes, kind);
                put(&mut bytes, length as u64);
                bytes.extend(std::iter::repeat_n(0xff, length));
            }
            for piece in bytes.chunks(piece) {
                prop_assert_eq!(guard.see(piece), Ok(()));
            }
            let mut head = Vec::new();
            put(&mut head, kind);
            put(&mut head, LIMIT + over);
            let (last, before) = head.split_last().unwrap();
            prop_assert_eq!(guard.see(before), Ok(()));
            prop_assert_eq!(guard.see(&[*last]), Err(TooLarge));
        }

        #[test]
        fn whatever_comes_is_no_reason_to_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Guard::of_request(100).see(&bytes);
            let _ = Guard::of_uni(100).see(&bytes);
        }
    }
}

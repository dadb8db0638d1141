//! Frames: a type, a length, and that many bytes. See docs/zone-protocol.md.

use crate::varint;
use bytes::{Buf, Bytes, BytesMut};

/// Types of frames, as they are numbered on the wire.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    /// The head of a request or an answer.
    Head,
    /// A piece of a body.
    Data,
    /// The fields after a body.
    Trailers,
    /// Control: what a peer takes.
    Settings,
    /// Control: how the exported services are.
    Health,
    /// Control: no new requests.
    GoAway,
    /// Control: nothing, to be acknowledged.
    Probe,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Head,
        Self::Data,
        Self::Trailers,
        Self::Settings,
        Self::Health,
        Self::GoAway,
        Self::Probe,
    ];

    /// Its number: below 16 those of requests, above those of the control stream.
    pub(crate) const fn number(self) -> u64 {
        match self {
            Self::Head => 0,
            Self::Data => 1,
            Self::Trailers => 2,
            Self::Settings => 16,
            Self::Health => 17,
            Self::GoAway => 18,
            Self::Probe => 19,
        }
    }

    fn of(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.number() == number)
    }
}

/// What a peer did against the protocol.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Violation {
    /// Something has a bound and is larger.
    #[error("{what} of {got}, want at most {limit}")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// How large it is.
        got: u64,
        /// The bound.
        limit: u64,
    },
    /// A frame where it can't be.
    #[error("a frame of type {number} {place}")]
    Misplaced {
        /// Its type.
        number: u64,
        /// Where it was.
        place: &'static str,
    },
    /// A stream ended in the middle of a frame, or before there was a head.
    #[error("the stream ended {place}")]
    Truncated {
        /// Where.
        place: &'static str,
    },
    /// A part of a frame can't be read.
    #[error("{part} that is {fault}")]
    Malformed {
        /// Which part.
        part: &'static str,
        /// What is wrong.
        fault: &'static str,
    },
    /// The body has another length than the head says.
    #[error("a body of {got} bytes, though content-length says {want}")]
    Length {
        /// How much came.
        got: u64,
        /// What was announced.
        want: u64,
    },
}

/// Bytes of a head, of trailers, or of a control frame: what a client may send (64 KiB), and what two proxies add.
pub const MAX_HEAD: usize = 72 << 10;
/// Fields of a head or of trailers: what a client may send, and what two proxies add. HTTP/2 counts 32 bytes for each
/// beside its name and value, so that less than 2048 of them make 64 KiB.
pub const MAX_FIELDS: usize = 2048 + 32;
/// Bytes of one DATA frame.
pub const MAX_DATA: usize = 64 << 10;
/// Bytes of frames of unknown types on one stream. They are for peers of a later revision, which say little.
const MAX_SKIPPED: usize = 1 << 20;
/// The longest header of a frame: two integers of eight bytes.
const MAX_HEADER: usize = 16;

/// Appends a header.
pub(crate) fn put_header(buf: &mut BytesMut, kind: Kind, len: usize) {
    varint::put(buf, kind.number());
    varint::put(buf, len as u64);
}

/// Appends a frame whose payload `write` appends.
pub(crate) fn put_frame<E>(
    buf: &mut BytesMut,
    kind: Kind,
    write: impl FnOnce(&mut BytesMut) -> Result<(), E>,
) -> Result<(), E> {
    let start = buf.len();
    varint::put(buf, kind.number());
    let length = buf.len();
    buf.extend_from_slice(&varint::padded(0));
    let payload = buf.len();
    if let Err(error) = write(buf) {
        buf.truncate(start);
        return Err(error);
    }
    let written = varint::padded(buf.len() - payload);
    if let Some(place) = buf.get_mut(length..payload) {
        place.copy_from_slice(&written);
    }
    Ok(())
}

/// What comes out of a stream's bytes.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Piece {
    /// A frame that is no DATA, whole.
    Whole(Kind, Bytes),
    /// Some or all of a DATA frame's bytes, not copied.
    Data(Bytes),
}

/// Takes frames out of a stream's bytes, however they are cut.
#[derive(Debug, Default)]
pub(crate) struct Deframer {
    input: Bytes,
    state: State,
    skipped: usize,
}

#[derive(Debug, Default)]
enum State {
    /// At a frame's beginning, if nothing of the header is here yet.
    #[default]
    Between,
    Header {
        bytes: [u8; MAX_HEADER],
        len: usize,
    },
    Gather {
        kind: Kind,
        want: usize,
        got: BytesMut,
    },
    Data {
        left: usize,
    },
    Skip {
        left: usize,
    },
}

impl Deframer {
    /// Gives it the next bytes. What was given before must have been taken out.
    pub(crate) fn push(&mut self, bytes: Bytes) {
        debug_assert!(self.input.is_empty(), "what was given before is there");
        self.input = bytes;
    }

    /// The next piece; `None` if more bytes are needed.
    pub(crate) fn next(&mut self) -> Result<Option<Piece>, Violation> {
        loop {
            match &mut self.state {
                State::Between => {
                    if self.input.is_empty() {
                        return Ok(None);
                    }
                    match header(&self.input) {
                        Some((number, len, taken)) => {
                            self.input.advance(taken);
                            self.begin(number, len)?;
                        }
                        None => {
                            self.state = State::Header {
                                bytes: [0; MAX_HEADER],
                                len: 0,
                            };
                        }
                    }
                }
                State::Header { bytes, len } => {
                    let Some(place) = bytes.get_mut(*len) else {
                        // Sixteen bytes always make a header.
                        return Err(Violation::Malformed {
                            part: "a frame's header",
                            fault: "longer than two integers",
                        });
                    };
                    if self.input.is_empty() {
                        return Ok(None);
                    }
                    *place = self.input.get_u8();
                    *len += 1;
                    if let Some((number, length, _)) = bytes.get(..*len).and_then(header) {
                        self.begin(number, length)?;
                    }
                }
                State::Gather { kind, want, got } => {
                    let kind = *kind;
                    if got.is_empty() && self.input.len() >= *want {
                        let payload = self.input.split_to(*want);
                        self.state = State::Between;
                        return Ok(Some(Piece::Whole(kind, payload)));
                    }
                    let take = self.input.len().min(*want - got.len());
                    got.extend_from_slice(&self.input.split_to(take));
                    if got.len() < *want {
                        return Ok(None);
                    }
                    let payload = std::mem::take(got).freeze();
                    self.state = State::Between;
                    return Ok(Some(Piece::Whole(kind, payload)));
                }
                State::Data { left } => {
                    let take = self.input.len().min(*left);
                    *left -= take;
                    if *left == 0 {
                        self.state = State::Between;
                    }
                    if take > 0 {
                        return Ok(Some(Piece::Data(self.input.split_to(take))));
                    }
                    if matches!(self.state, State::Data { .. }) {
                        return Ok(None);
                    }
                }
                State::Skip { left } => {
                    let take = self.input.len().min(*left);
                    *left -= take;
                    self.input.advance(take);
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.state = State::Between;
                }
            }
        }
    }

    fn begin(&mut self, number: u64, length: u64) -> Result<(), Violation> {
        let kind = Kind::of(number);
        let (what, limit) = match kind {
            Some(Kind::Data) => ("a DATA frame", MAX_DATA),
            Some(_) => ("a head", MAX_HEAD),
            None => ("frames of unknown types", MAX_SKIPPED - self.skipped),
        };
        let len = usize::try_from(length).unwrap_or(usize::MAX);
        // Nothing left for unknown ones: not for an empty one either.
        if len > limit || limit == 0 {
            return Err(Violation::TooLarge {
                what,
                got: length,
                limit: limit as u64,
            });
        }
        self.state = match kind {
            Some(Kind::Data) => State::Data { left: len },
            Some(kind) => State::Gather {
                kind,
                want: len,
                got: BytesMut::new(),
            },
            None => {
                // An empty frame counts for its header, so that their number is bounded as well.
                self.skipped = (self.skipped + len + MAX_HEADER).min(MAX_SKIPPED);
                State::Skip { left: len }
            }
        };
        Ok(())
    }

    /// Whether the stream may end here.
    pub(crate) fn is_between(&self) -> bool {
        matches!(self.state, State::Between) && self.input.is_empty()
    }

    /// Whether all that was given has been taken out.
    pub(crate) fn is_drained(&self) -> bool {
        self.input.is_empty()
    }
}

/// Type, length, and how many bytes they take.
fn header(bytes: &[u8]) -> Option<(u64, u64, usize)> {
    let (number, first) = varint::get(bytes)?;
    let (len, second) = varint::get(bytes.get(first..)?)?;
    Some((number, len, first + second))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    #[derive(Clone, Debug)]
    enum Sent {
        Head(Vec<u8>),
        Data(Vec<u8>),
        Unknown(u64, Vec<u8>),
    }

    fn sent() -> impl Strategy<Value = Sent> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..200);
        prop_oneof![
            bytes().prop_map(Sent::Head),
            bytes().prop_map(Sent::Data),
            (64..1u64 << 40, bytes()).prop_map(|(number, bytes)| Sent::Unknown(number, bytes)),
        ]
    }

    fn encode(all: &[Sent]) -> Vec<u8> {
        let mut buf = BytesMut::new();
        for sent in all {
            match sent {
                Sent::Head(bytes) => {
                    let write = |buf: &mut BytesMut| {
                        buf.extend_from_slice(bytes);
                        Ok::<_, Infallible>(())
                    };
                    put_frame(&mut buf, Kind::Head, write).unwrap();
                }
                Sent::Data(bytes) => {
                    put_header(&mut buf, Kind::Data, bytes.len());
                    buf.extend_from_slice(bytes);
                }
                Sent::Unknown(number, bytes) => {
                    varint::put(&mut buf, *number);
                    varint::put(&mut buf, bytes.len() as u64);
                    buf.extend_from_slice(bytes);
                }
            }
        }
        buf.to_vec()
    }

    /// What came out: heads in order, DATA joined, and whether the stream may end there.
    #[derive(Debug, Default, Eq, PartialEq)]
    struct Got {
        heads: Vec<Vec<u8>>,
        data: Vec<u8>,
        whole: bool,
    }

    fn decode(bytes: &[u8], cuts: &[usize]) -> Result<Got, Violation> {
        let mut deframer = Deframer::default();
        let mut got = Got::default();
        let mut rest = bytes;
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let n = cuts.next().map_or(rest.len(), |n| (*n).clamp(1, rest.len()));
            let (now, later) = rest.split_at(n);
            rest = later;
            deframer.push(Bytes::copy_from_slice(now));
            while let Some(piece) = deframer.next()? {
                match piece {
                    Piece::Whole(_, bytes) => got.heads.push(bytes.to_vec()),
                    Piece::Data(bytes) => got.data.extend_from_slice(&bytes),
                }
            }
        }
        got.whole = deframer.is_between();
        Ok(got)
    }

    proptest! {
        #[test]
        fn frames_come_out_however_they_are_cut(
            all in prop::collection::vec(sent(), 0..20),
            cuts in prop::collection::vec(1..50usize, 1..10),
        ) {
            let mut want = Got { whole: true, ..Got::default() };
            for sent in &all {
                match sent {
                    Sent::Head(bytes) => want.heads.push(bytes.clone()),
                    Sent::Data(bytes) => want.data.extend_from_slice(bytes),
                    Sent::Unknown(..) => {}
                }
            }
            prop_assert_eq!(decode(&encode(&all), &cuts), Ok(want));
        }

        #[test]
        fn any_bytes_are_an_answer_or_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            cuts in prop::collection::vec(1..50usize, 1..10),
        ) {
            // Not a panic, and the same whatever the cuts.
            let whole = decode(&bytes, &[usize::MAX]);
            prop_assert_eq!(decode(&bytes, &cuts).is_ok(), whole.is_ok());
        }
    }

    #[test]
    fn what_is_too_large_is_said_at_once() {
        let mut buf = BytesMut::new();
        put_header(&mut buf, Kind::Data, MAX_DATA + 1);
        let mut deframer = Deframer::default();
        deframer.push(buf.freeze());
        let error = deframer.next().unwrap_err();
        assert_eq!(error.to_string(), "a DATA frame of 65537, want at most 65536");
    }

    #[test]
    fn unknown_frames_are_skipped_but_not_for_ever() {
        let mut frame = BytesMut::new();
        varint::put(&mut frame, 99);
        varint::put(&mut frame, 0);
        let frame = frame.freeze();
        let mut deframer = Deframer::default();
        let refused = (0..MAX_SKIPPED).find(|_| {
            deframer.push(frame.clone());
            deframer.next().is_err()
        });
        assert_eq!(
            refused,
            Some(MAX_SKIPPED / MAX_HEADER),
            "empty ones are counted too"
        );
    }
}

//! gRPC as far as plugins need it: what a call of it looks like, the frames of its messages, and its status.

use crate::call::{Reply, RequestHead};
use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode, percent_encode};

/// What a status says.
pub(crate) const OK: u32 = 0;
pub(crate) const UNKNOWN: u32 = 2;
pub(crate) const DEADLINE_EXCEEDED: u32 = 4;
pub(crate) const RESOURCE_EXHAUSTED: u32 = 8;
pub(crate) const INTERNAL: u32 = 13;
pub(crate) const UNAVAILABLE: u32 = 14;

/// The type of a message's body.
pub(crate) const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/grpc");
const STATUS: &str = "grpc-status";
const MESSAGE: &str = "grpc-message";
/// What stands before a message: whether it is compressed, and its length.
const PREFIX: usize = 5;
/// What can't stand in a status message as it is.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');

/// Whether a request is a call.
pub(crate) fn is_call(head: &RequestHead) -> bool {
    let kind = head.headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    kind.and_then(|kind| kind.strip_prefix(b"application/grpc"))
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"+") || rest.starts_with(b";"))
}

/// Makes a plugin's answer one to a call: its body is the message of its status.
pub(crate) fn reply(reply: &mut Reply, message: &[u8], status: Option<u32>) {
    reply.grpc_status = Some(status.unwrap_or_else(|| of_http(reply.status)));
    reply.status = StatusCode::OK;
    reply.headers.insert(header::CONTENT_TYPE, CONTENT_TYPE);
    let message = percent_encode(message, ESCAPED).to_string();
    if !message.is_empty()
        && let Ok(message) = HeaderValue::try_from(message)
    {
        reply.headers.insert(MESSAGE, message);
    }
}

/// What an answer without a status of gRPC means, by that of HTTP.
pub(crate) fn of_http(status: StatusCode) -> u32 {
    match status.as_u16() {
        400 => INTERNAL,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => UNAVAILABLE,
        _ => UNKNOWN,
    }
}

/// Status and message, if these fields have them.
pub(crate) fn status(fields: &HeaderMap) -> Option<(u32, Bytes)> {
    let status = fields.get(STATUS)?.to_str().ok()?.parse().unwrap_or(UNKNOWN);
    let message = fields
        .get(MESSAGE)
        .map(|message| percent_decode(message.as_bytes()).collect());
    Some((status, message.unwrap_or_default()))
}

/// A message as it is sent.
pub(crate) fn frame(message: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(PREFIX + message.len());
    frame.push(0);
    frame.extend_from_slice(&u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
    frame.extend_from_slice(message);
    frame
}

/// Puts messages together again.
#[derive(Debug, Default)]
pub(crate) struct Frames(BytesMut);

/// A message can't be read: it is compressed, or longer than `max`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Unreadable;

impl Frames {
    pub(crate) fn push(&mut self, data: &[u8]) {
        self.0.extend_from_slice(data);
    }

    /// The next message, if all of it is there.
    pub(crate) fn next(&mut self, max: usize) -> Result<Option<Bytes>, Unreadable> {
        let Some((prefix, rest)) = self.0.split_at_checked(PREFIX) else {
            return Ok(None);
        };
        let &[compressed, a, b, c, d] = prefix else {
            return Ok(None);
        };
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        if compressed != 0 || len > max {
            return Err(Unreadable);
        }
        if rest.len() < len {
            return Ok(None);
        }
        self.0.advance(PREFIX);
        Ok(Some(self.0.split_to(len).freeze()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_answer_to_a_call_has_its_status_and_its_message() {
        let mut answer = Reply {
            status: StatusCode::FORBIDDEN,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            grpc_status: None,
        };
        reply(&mut answer, "no\n100% caf\u{e9}".as_bytes(), None);
        assert_eq!((answer.status, answer.grpc_status), (StatusCode::OK, Some(7)));
        assert_eq!(answer.headers[MESSAGE], "no%0A100%25 caf%C3%A9");
        answer.headers.insert(STATUS, HeaderValue::from_static("7"));
        assert_eq!(status(&answer.headers), Some((7, "no\n100% caf\u{e9}".into())));
        assert_eq!(status(&HeaderMap::new()), None);
    }

    proptest! {
        #[test]
        fn messages_come_whole_however_they_are_cut(
            messages in prop::collection::vec(".{0,20}", 0..5), cut in 1usize..30
        ) {
            let all: Vec<u8> = messages.iter().flat_map(|m| frame(m.as_bytes())).collect();
            let mut frames = Frames::default();
            let mut got = Vec::new();
            for piece in all.chunks(cut) {
                frames.push(piece);
                while let Some(message) = frames.next(99).unwrap() {
                    got.push(String::from_utf8(message.to_vec()).unwrap());
                }
            }
            prop_assert_eq!(got, messages);
        }
    }

    #[test]
    fn what_is_compressed_or_too_long_is_not_read() {
        for (frame, want) in [
            (&[1, 0, 0, 0, 0][..], Err(Unreadable)),
            (&[0, 0, 0, 0, 9], Err(Unreadable)),
        ] {
            let mut frames = Frames::default();
            frames.push(frame);
            assert_eq!(frames.next(8), want);
        }
    }
}

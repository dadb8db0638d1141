//! What a guest has a number for: a root context for each configuration, and an HTTP context for each request.

use super::abi::{Status, Way};
use super::fields::{FieldsMut, Undo};
use crate::call::{Facts, Reply, RequestHead, ResponseHead};
use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A context.
pub(crate) enum Context {
    Root(Root),
    Http(Box<Http>),
}

/// The context of one configuration.
pub(crate) struct Root {
    pub(crate) config: Arc<str>,
    /// How often it wants to be called; `None` is never.
    pub(crate) period: Option<Duration>,
    /// That is new.
    pub(crate) period_changed: bool,
}

/// The context of one request.
pub(crate) struct Http {
    pub(crate) root: u32,
    pub(crate) facts: Facts,
    pub(crate) request: Option<RequestHead>,
    pub(crate) response: Option<ResponseHead>,
    pub(crate) ways: [Passing; 2],
    /// The answer that the guest wants given.
    pub(crate) reply: Option<Box<Reply>>,
    /// The request is over, and the guest has yet to say that it is done.
    pub(crate) lingers: bool,
    /// When the request was over.
    pub(crate) ended: Option<Instant>,
    properties: Vec<(Box<[u8]>, Bytes)>,
}

/// A message on its way.
#[derive(Default)]
pub(crate) struct Passing {
    /// The head has gone on, and can't be changed any more.
    pub(crate) sent: bool,
    /// It has been handed over.
    pub(crate) taken: bool,
    /// Where the guest holds it up.
    pub(crate) held_at: Option<At>,
    /// The guest lets it go.
    pub(crate) go: bool,
    /// What has come of the body and not gone on.
    pub(crate) body: Body,
    /// What goes on of it, to be handed over.
    pub(crate) out: Body,
    /// The body is shown to the guest: the call under way is about it, or it is held up there.
    pub(crate) shown: bool,
    /// All of the body has come.
    pub(crate) complete: bool,
    pub(crate) trailers: Option<HeaderMap>,
    /// Bytes of the body that have come.
    pub(crate) size: u64,
    /// What the call under way has changed.
    pub(crate) undo: Vec<Undo>,
    /// Wakes whoever waits for the guest to go on.
    pub(crate) wake: Option<Arc<Notify>>,
}

/// Part of a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum At {
    Head,
    Body,
    Trailers,
}

/// Properties that a guest may set for a request.
const MAX_PROPERTIES: usize = 64;
/// Bytes of all of them, with their names.
const MAX_PROPERTY_BYTES: usize = 64 << 10;

impl Http {
    pub(crate) fn new(root: u32, facts: Facts) -> Self {
        Self {
            root,
            facts,
            request: None,
            response: None,
            ways: Default::default(),
            reply: None,
            lingers: false,
            ended: None,
            properties: Vec::new(),
        }
    }

    pub(crate) const fn way(&mut self, way: Way) -> &mut Passing {
        let [request, response] = &mut self.ways;
        match way {
            Way::Request => request,
            Way::Response => response,
        }
    }

    pub(crate) const fn passing(&self, way: Way) -> &Passing {
        let [request, response] = &self.ways;
        match way {
            Way::Request => request,
            Way::Response => response,
        }
    }

    /// A head that can still be changed, and where to write down how it was.
    pub(crate) fn head_mut(&mut self, way: Way) -> Option<(FieldsMut<'_>, &mut Vec<Undo>)> {
        let [request, response] = &mut self.ways;
        let (head, passing) = match way {
            Way::Request => (self.request.as_mut().map(FieldsMut::Request), request),
            Way::Response => (self.response.as_mut().map(FieldsMut::Response), response),
        };
        head.filter(|_| !passing.sent)
            .map(|head| (head, &mut passing.undo))
    }

    /// What was changed holds.
    pub(crate) fn commit(&mut self) {
        for passing in &mut self.ways {
            passing.undo.clear();
            passing.body.before = None;
        }
    }

    /// The call under way has failed: heads and bodies are as they were.
    pub(crate) fn undo(&mut self) {
        for way in [Way::Request, Way::Response] {
            if let Some((mut head, undo)) = self.head_mut(way) {
                let mut changes = mem::take(undo);
                head.undo(&mut changes);
            }
            let body = &mut self.way(way).body;
            if let Some(before) = body.before.take() {
                body.data = before;
            }
        }
    }

    /// Tells whoever waits that there is something new.
    pub(crate) fn wake(&self) {
        for wake in self.ways.iter().filter_map(|passing| passing.wake.as_ref()) {
            wake.notify_one();
        }
    }

    pub(crate) fn property(&self, path: &[u8]) -> Option<&Bytes> {
        let known = self.properties.iter().find(|(known, _)| **known == *path);
        known.map(|(_, value)| value)
    }

    pub(crate) fn set_property(&mut self, path: &[u8], value: &[u8]) -> Result<(), Status> {
        let others = self.properties.iter().filter(|(known, _)| **known != *path);
        let bytes: usize = others.clone().map(|(path, value)| path.len() + value.len()).sum();
        if others.count() >= MAX_PROPERTIES || bytes + path.len() + value.len() > MAX_PROPERTY_BYTES {
            return Err(Status::BadArgument);
        }
        let value = Bytes::copy_from_slice(value);
        match self.properties.iter_mut().find(|(known, _)| **known == *path) {
            Some((_, kept)) => *kept = value,
            None => self.properties.push((path.into(), value)),
        }
        Ok(())
    }
}

/// A body, or as much of it as is here.
#[derive(Debug, Default)]
pub(crate) struct Body {
    data: Bytes,
    /// As it was before the call under way changed it.
    before: Option<Bytes>,
}

impl Body {
    pub(crate) const fn len(&self) -> usize {
        self.data.len()
    }

    /// Some of it, up to `max` bytes from `start` on; nothing if it doesn't reach so far.
    pub(crate) fn piece(&self, start: usize, max: usize) -> Option<Bytes> {
        let rest = self.len().checked_sub(start)?;
        Some(self.data.slice(start..start + max.min(rest)))
    }

    /// More has come.
    pub(crate) fn push(&mut self, more: Bytes) {
        if self.data.is_empty() {
            self.data = more;
        } else {
            // Copied once, when the second piece comes; from then on it grows in place.
            let mut data = mem::take(&mut self.data)
                .try_into_mut()
                .unwrap_or_else(|shared| BytesMut::from(&shared[..]));
            data.extend_from_slice(&more);
            self.data = data.freeze();
        }
    }

    /// All of it, to go on.
    pub(crate) fn take(&mut self) -> Bytes {
        self.before = None;
        mem::take(&mut self.data)
    }

    /// Puts `value` in the place of `len` bytes from `start` on; behind the last byte if it doesn't reach so far.
    ///
    /// # Errors
    ///
    /// [`Status::BadArgument`] if it were larger than `bound` then.
    pub(crate) fn replace(
        &mut self,
        start: usize,
        len: usize,
        value: &[u8],
        bound: usize,
    ) -> Result<(), Status> {
        let start = start.min(self.len());
        let end = start.saturating_add(len).min(self.len());
        let size = self.len() - (end - start) + value.len();
        if size > bound && size > self.len() {
            return Err(Status::BadArgument);
        }
        let mut data = BytesMut::with_capacity(size);
        for part in [self.data.get(..start), Some(value), self.data.get(end..)] {
            data.extend_from_slice(part.unwrap_or_default());
        }
        let before = mem::replace(&mut self.data, data.freeze());
        self.before.get_or_insert(before);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn body(text: &'static str) -> Body {
        let mut body = Body::default();
        body.push(Bytes::from_static(text.as_bytes()));
        body
    }

    #[test]
    fn a_body_is_replaced_in_part_or_whole() {
        for (start, len, want) in [
            (0, 0, "XYabcdef"),
            (0, usize::MAX, "XY"),
            (0, 6, "XY"),
            (0, 2, "XYcdef"),
            (2, 2, "abXYef"),
            (6, 0, "abcdefXY"),
            (usize::MAX, usize::MAX, "abcdefXY"),
            (4, 99, "abcdXY"),
        ] {
            let mut body = body("abcdef");
            body.replace(start, len, b"XY", 99).unwrap();
            assert_eq!(body.take(), want, "{start} {len}");
        }
        let mut body = body("abc");
        assert_eq!(body.replace(3, 0, b"de", 4), Err(Status::BadArgument));
        assert_eq!(body.take(), "abc");
    }

    proptest! {
        #[test]
        fn a_body_is_its_pieces_joined(pieces in prop::collection::vec(".{0,9}", 0..9), start in 0usize..40, max in 0usize..40) {
            let mut body = Body::default();
            for piece in &pieces {
                body.push(piece.clone().into());
                let _shared = body.piece(0, usize::MAX);
            }
            let all = pieces.concat();
            prop_assert_eq!(body.len(), all.len());
            let want = all.as_bytes().get(start..).map(|rest| &rest[..max.min(rest.len())]);
            let got = body.piece(start, max);
            prop_assert_eq!(got.as_deref(), want);
            prop_assert_eq!(body.take(), all);
        }
    }
}

//! A request's body on its way to a service: JSON comes, gRPC goes on.

use super::question::Question;
use crate::refusal::{Reason, refuse};
use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tonic::body::Body;
use tonic::{Code, Status};

/// Largest message in JSON, in bytes. It is not held before the caller is known: nobody reads here until then.
const MAX_JSON: usize = 24 << 20;

/// Messages as gRPC has them, made of a body as it comes.
#[derive(Debug)]
pub(super) struct Upward {
    from: Body,
    question: Question,
    come: BytesMut,
    /// As far as it was looked at for the end of a line.
    looked: usize,
    ended: bool,
    /// The only message was given on.
    told: bool,
}

impl Upward {
    pub(super) fn new(from: Body, question: Question) -> Self {
        Self {
            from,
            question,
            come: BytesMut::new(),
            looked: 0,
            ended: false,
            told: false,
        }
    }

    /// The next message that is there whole.
    fn next(&mut self) -> Option<Result<Bytes, Status>> {
        if !self.question.is_stream() {
            if !self.ended || std::mem::replace(&mut self.told, true) {
                return None;
            }
            let text = self.come.split();
            return Some(self.frame(&text));
        }
        loop {
            let rest = self.come.get(self.looked..).unwrap_or_default();
            let line = match rest.iter().position(|byte| *byte == b'\n') {
                Some(at) => self.come.split_to(self.looked + at + 1),
                None if self.ended && !self.come.is_empty() => self.come.split(),
                None => {
                    self.looked = self.come.len();
                    return None;
                }
            };
            self.looked = 0;
            if !line.trim_ascii().is_empty() {
                return Some(self.frame(&line));
            }
        }
    }

    fn frame(&self, text: &[u8]) -> Result<Bytes, Status> {
        self.question.message(text).map(|message| framed(&message))
    }
}

/// A message with what gRPC has before it: not compressed, and how long it is.
fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(message.len() + 5);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(message);
    frame.freeze()
}

impl HttpBody for Upward {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if let Some(message) = this.next() {
                return Poll::Ready(Some(message.map(Frame::data)));
            }
            if this.ended {
                return Poll::Ready(None);
            }
            match ready!(Pin::new(&mut this.from).poll_frame(cx)) {
                None => this.ended = true,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else { continue };
                    if this.come.len() + data.len() > MAX_JSON {
                        let why =
                            format!("the request has more than {MAX_JSON} bytes of JSON in one message");
                        return Poll::Ready(Some(Err(refuse(
                            Code::ResourceExhausted,
                            Reason::TooLarge,
                            why,
                        ))));
                    }
                    this.come.extend_from_slice(&data);
                }
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

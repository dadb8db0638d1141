//! What the bytes of an HTTP/1.1 connection show that its parser does not tell.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What was seen since the last request ended. Written and read by one thread; atomic only because an
/// upgraded connection must be `Send`, so relaxed is enough everywhere.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Between requests: what comes is a head.
    expecting: AtomicBool,
    /// A head has begun.
    begun: AtomicBool,
    /// The head has both Content-Length and Transfer-Encoding. The parser drops the first, as it may, but
    /// the connection must not be used again (RFC 9112 §6.1).
    framed_twice: AtomicBool,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            expecting: AtomicBool::new(true),
            begun: AtomicBool::new(false),
            framed_twice: AtomicBool::new(false),
        }
    }
}

impl Watch {
    /// A request's head is whole. True if it was framed twice.
    pub(crate) fn request_began(&self) -> bool {
        self.expecting.store(false, Ordering::Relaxed);
        self.begun.store(false, Ordering::Relaxed);
        self.framed_twice.load(Ordering::Relaxed)
    }

    /// Its answer has ended.
    pub(crate) fn request_ended(&self) {
        self.expecting.store(true, Ordering::Relaxed);
    }

    /// Whether a part of a head has come and the rest has not.
    pub(crate) fn head_is_partial(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    fn see(&self, bytes: &[u8], scan: &mut Scan) {
        if bytes.is_empty() {
            return;
        }
        if !self.expecting.load(Ordering::Relaxed) {
            *scan = Scan::default();
            return;
        }
        self.begun.store(true, Ordering::Relaxed);
        if scan.finds_a_head_framed_twice(bytes) {
            self.framed_twice.store(true, Ordering::Relaxed);
        }
    }
}

const TRANSFER_ENCODING: &[u8] = b"transfer-encoding:";
const CONTENT_LENGTH: &[u8] = b"content-length:";

/// Looks through heads as they come, in whatever pieces.
#[derive(Debug, Default)]
struct Scan {
    /// The beginning of a line, as much as tells what it is.
    line: [u8; TRANSFER_ENCODING.len()],
    kept: usize,
    transfer_encoding: bool,
    content_length: bool,
}

impl Scan {
    fn finds_a_head_framed_twice(&mut self, mut bytes: &[u8]) -> bool {
        let mut found = false;
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let (line, rest) = bytes.split_at_checked(end + 1).unwrap_or_default();
            if self.kept == 0 {
                self.note(line);
            } else {
                self.keep(line);
                let begun = self.line;
                self.note(begun.get(..self.kept).unwrap_or_default());
                self.kept = 0;
            }
            found |= self.transfer_encoding && self.content_length;
            bytes = rest;
        }
        self.keep(bytes);
        found
    }

    /// Keeps the beginning of a line whose end is not here yet.
    fn keep(&mut self, piece: &[u8]) {
        for (into, from) in self.line.iter_mut().skip(self.kept).zip(piece) {
            *into = *from;
            self.kept += 1;
        }
    }

    /// What a line says, of which there is as much as tells what it is.
    fn note(&mut self, line: &[u8]) {
        let is = |field: &[u8]| {
            line.get(..field.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(field))
        };
        if matches!(line, b"\n" | b"\r\n") {
            // What follows is a body, or the next head of a pipeline: none of this head's fields.
            (self.transfer_encoding, self.content_length) = (false, false);
        } else {
            self.transfer_encoding |= is(TRANSFER_ENCODING);
            self.content_length |= is(CONTENT_LENGTH);
        }
    }
}

/// A connection whose incoming bytes are watched.
#[derive(Debug)]
pub(crate) struct Watched<T> {
    io: T,
    watch: Arc<Watch>,
    scan: Scan,
}

impl<T> Watched<T> {
    pub(crate) fn new(io: T, watch: Arc<Watch>) -> Self {
        let scan = Scan::default();
        Self { io, watch, scan }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        this.watch
            .see(buf.filled().get(before..).unwrap_or_default(), &mut this.scan);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_framed_twice_is_seen_in_either_order_and_in_any_pieces() {
        for head in [
            "POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTRANSFER-ENCODING: chunked\r\nX: y\r\ncontent-length: 3\r\n\r\n",
        ] {
            for size in 1..=head.len() {
                let (watch, mut scan) = (Watch::default(), Scan::default());
                for piece in head.as_bytes().chunks(size) {
                    watch.see(piece, &mut scan);
                }
                assert!(watch.head_is_partial());
                assert!(watch.request_began(), "in pieces of {size}: {head:?}");
            }
        }
    }

    #[test]
    fn bodies_and_other_heads_are_not_this_head() {
        let (watch, mut scan) = (Watch::default(), Scan::default());
        watch.see(b"POST / HTTP/1.1\r\nContent-Length: 50\r\n\r\n", &mut scan);
        assert!(!watch.request_began());
        watch.see(b"\nTransfer-Encoding: x\nContent-Length: y", &mut scan);
        assert!(!watch.request_began());

        let (watch, mut scan) = (Watch::default(), Scan::default());
        let pipeline = b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\naPOST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        watch.see(pipeline, &mut scan);
        assert!(!watch.request_began());
    }
}

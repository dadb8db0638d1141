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

    fn see(&self, bytes: &[u8]) {
        if bytes.is_empty() || !self.expecting.load(Ordering::Relaxed) {
            return;
        }
        self.begun.store(true, Ordering::Relaxed);
        if has_field(bytes, b"transfer-encoding:") && has_field(bytes, b"content-length:") {
            self.framed_twice.store(true, Ordering::Relaxed);
        }
    }
}

/// Whether a line begins with this field name and its colon, in any case.
fn has_field(bytes: &[u8], field: &[u8]) -> bool {
    let starts = |line: &[u8]| {
        line.get(..field.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(field))
    };
    bytes.split(|b| *b == b'\n').any(starts)
}

/// A connection whose incoming bytes are watched.
#[derive(Debug)]
pub(crate) struct Watched<T> {
    pub(crate) io: T,
    pub(crate) watch: Arc<Watch>,
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        this.watch.see(buf.filled().get(before..).unwrap_or_default());
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
    fn a_head_framed_twice_is_seen_in_either_order() {
        for head in [
            "POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTRANSFER-ENCODING: chunked\r\ncontent-length: 3\r\n\r\n",
        ] {
            let watch = Watch::default();
            watch.see(head.as_bytes());
            assert!(watch.head_is_partial());
            assert!(watch.request_began());
        }
    }

    #[test]
    fn bodies_are_not_read_for_heads() {
        let watch = Watch::default();
        watch.see(b"POST / HTTP/1.1\r\nContent-Length: 50\r\n\r\n");
        assert!(!watch.request_began());
        watch.see(b"\nTransfer-Encoding: x\nContent-Length: y");
        assert!(!watch.request_began());
    }
}

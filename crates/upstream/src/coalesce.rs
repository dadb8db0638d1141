//! One write for many frames.
//!
//! An HTTP/2 library flushes after every DATA frame that it doesn't copy, and so writes once for each answer,
//! though many are ready at once. Here what it writes is gathered while its connection is polled, and written
//! out when the poll is over. Measured on HTTP/2 with 16 streams, 4000 requests a second: 1.05 writes for each
//! request without, 0.15 with.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes gathered at most; past that they are written out, or wait until they can be.
const LIMIT: usize = 64 << 10;
/// A write of this size or more, with nothing gathered before it, is not worth a copy.
const DIRECT: usize = 8 << 10;

/// A connection that gathers what is written to it. Its flushes do nothing: [`Flushed`] does them.
#[derive(Debug)]
pub struct Coalesced<T>(Rc<Shared<T>>);

/// Writes out what a [`Coalesced`] has gathered.
#[derive(Debug)]
pub struct Flusher<T>(Rc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
    io: RefCell<T>,
    gathered: RefCell<Vec<u8>>,
    /// How much of it has been written.
    written: Cell<usize>,
    /// Why writing it failed, to be told at the next write.
    failed: Cell<Option<io::ErrorKind>>,
}

/// The two halves: what the HTTP library gets, and what its connection is polled with.
pub fn coalesce<T>(io: T) -> (Coalesced<T>, Flusher<T>) {
    let shared = Rc::new(Shared {
        io: RefCell::new(io),
        gathered: RefCell::default(),
        written: Cell::new(0),
        failed: Cell::new(None),
    });
    (Coalesced(Rc::clone(&shared)), Flusher(shared))
}

impl<T: AsyncWrite + Unpin> Shared<T> {
    fn write_out(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut gathered = self.gathered.borrow_mut();
        let mut io = self.io.borrow_mut();
        while let Some(rest) = gathered.get(self.written.get()..).filter(|rest| !rest.is_empty()) {
            let n = ready!(Pin::new(&mut *io).poll_write(cx, rest))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written.set(self.written.get() + n);
        }
        gathered.clear();
        self.written.set(0);
        Pin::new(&mut *io).poll_flush(cx)
    }

    /// Makes room for `len` bytes. True if they are better written directly.
    fn make_room(&self, cx: &mut Context<'_>, len: usize) -> Poll<io::Result<bool>> {
        if let Some(kind) = self.failed.take() {
            return Poll::Ready(Err(kind.into()));
        }
        let before = self.gathered.borrow().len();
        if before > 0 && before + len > LIMIT {
            ready!(self.write_out(cx))?;
        }
        Poll::Ready(Ok(len >= DIRECT && self.gathered.borrow().is_empty()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Coalesced<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.io.borrow_mut()).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Coalesced<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if ready!(self.0.make_room(cx, buf.len()))? {
            return Pin::new(&mut *self.0.io.borrow_mut()).poll_write(cx, buf);
        }
        self.0.gathered.borrow_mut().extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let len = bufs.iter().map(|buf| buf.len()).sum();
        if ready!(self.0.make_room(cx, len))? {
            return Pin::new(&mut *self.0.io.borrow_mut()).poll_write_vectored(cx, bufs);
        }
        let mut gathered = self.0.gathered.borrow_mut();
        bufs.iter().for_each(|buf| gathered.extend_from_slice(buf));
        Poll::Ready(Ok(len))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The poll that this is a part of ends with a flush.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.0.write_out(cx))?;
        Pin::new(&mut *self.0.io.borrow_mut()).poll_shutdown(cx)
    }
}

impl<T: AsyncWrite + Unpin> Flusher<T> {
    /// Writes out what the poll before this one gathered. Pending means that the rest goes when the
    /// connection can take it: the task is woken then, and must poll the connection and this again.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.0.gathered.borrow().is_empty() {
            return Poll::Ready(());
        }
        if let Err(error) = ready!(self.0.write_out(cx)) {
            self.0.gathered.borrow_mut().clear();
            self.0.written.set(0);
            self.0.failed.set(Some(error.kind()));
            // The connection is to notice at its next write or read.
            cx.waker().wake_by_ref();
        }
        Poll::Ready(())
    }
}

/// A connection's future, with a flush after each poll, and one before its end.
#[derive(Debug)]
pub struct Flushed<F, T, O> {
    connection: Pin<Box<F>>,
    flusher: Flusher<T>,
    ended: Option<O>,
}

impl<F: Future, T> Flushed<F, T, F::Output> {
    /// `connection` must be the only future that writes to the other half of `flusher`.
    pub fn new(connection: F, flusher: Flusher<T>) -> Self {
        Self {
            connection: Box::pin(connection),
            flusher,
            ended: None,
        }
    }

    /// The connection itself.
    pub fn connection(&mut self) -> Pin<&mut F> {
        self.connection.as_mut()
    }
}

impl<F, T> Future for Flushed<F, T, F::Output>
where
    F: Future,
    F::Output: Unpin,
    T: AsyncWrite + Unpin,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        if this.ended.is_none()
            && let Poll::Ready(ended) = this.connection.as_mut().poll(cx)
        {
            this.ended = Some(ended);
        }
        let flushed = this.flusher.poll_flush(cx);
        match flushed {
            Poll::Ready(()) => this.ended.take().map_or(Poll::Pending, Poll::Ready),
            Poll::Pending => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Takes everything, and counts the writes.
    struct Counting(Rc<RefCell<Vec<usize>>>);

    impl AsyncWrite for Counting {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.0.borrow_mut().push(buf.len());
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn many_writes_of_a_poll_are_one() {
        let writes = Rc::new(RefCell::new(Vec::new()));
        let (mut io, flusher) = coalesce(Counting(Rc::clone(&writes)));
        let frames = async {
            for _ in 0..3 {
                io.write_all(b"frame").await.unwrap();
                io.flush().await.unwrap();
            }
            tokio::task::yield_now().await;
            io.write_all(&[7; DIRECT]).await.unwrap();
        };
        Flushed::new(frames, flusher).await;
        assert_eq!(*writes.borrow(), [15, DIRECT]);
    }

    #[tokio::test]
    async fn a_reader_that_stops_holds_the_writer_back() {
        let (mut far, near) = tokio::io::duplex(1024);
        let (mut io, flusher) = coalesce(near);
        let sent = Rc::new(Cell::new(0usize));
        let counted = Rc::clone(&sent);
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async move {
                let writing = tokio::task::spawn_local(Flushed::new(
                    async move {
                        for _ in 0..1000 {
                            io.write_all(&[7; 1000]).await.unwrap();
                            counted.set(counted.get() + 1000);
                        }
                        io.shutdown().await.unwrap();
                    },
                    flusher,
                ));
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
                assert!(sent.get() <= LIMIT + 2048, "{} bytes gathered", sent.get());
                let mut all = Vec::new();
                far.read_to_end(&mut all).await.unwrap();
                assert_eq!(all.len(), 1_000_000);
                writing.await.unwrap();
            })
            .await;
    }

    #[tokio::test]
    async fn a_connection_that_broke_is_told() {
        let (far, near) = tokio::io::duplex(16);
        drop(far);
        let (mut io, flusher) = coalesce(near);
        let writes = async {
            io.write_all(b"gathered").await.unwrap();
            tokio::task::yield_now().await;
            io.write_all(b"too late").await.unwrap_err().kind()
        };
        assert_eq!(Flushed::new(writes, flusher).await, io::ErrorKind::BrokenPipe);
    }
}

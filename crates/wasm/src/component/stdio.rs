//! A guest's standard output and error: lines of the log, as many as a call may write.

use crate::log::{self, MAX_LINE};
use bytes::Bytes;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::io::AsyncWrite;
use tracing::Level;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

/// Bytes that are taken at once.
const MAX_WRITE: usize = 4 << 10;

/// Where an instance's lines go.
#[derive(Debug)]
pub(crate) struct Output {
    plugin: Arc<str>,
    /// Lines left in this call.
    lines: AtomicU32,
    /// A line that hasn't ended; no more of it than is kept. Poison is harmless: it is text for people.
    begun: Mutex<Vec<u8>>,
}

impl Output {
    pub(crate) fn new(plugin: &Arc<str>) -> Self {
        Self {
            plugin: Arc::clone(plugin),
            lines: AtomicU32::new(0),
            begun: Mutex::default(),
        }
    }

    /// A call begins that may write so many lines.
    pub(crate) fn begin(&self, lines: u32) {
        self.lines.store(lines, Ordering::Relaxed);
    }

    /// Whether there is a line left.
    pub(crate) fn take_line(&self) -> bool {
        // One thread at a time has the instance.
        let left = self.lines.load(Ordering::Relaxed);
        self.lines.store(left.saturating_sub(1), Ordering::Relaxed);
        left > 0
    }

    /// The call has ended.
    pub(crate) fn end(&self) {
        let mut begun = self.begun();
        if !begun.is_empty() {
            self.line(&mut begun);
        }
    }

    fn write(&self, mut text: &[u8]) {
        let mut begun = self.begun();
        while let Some(at) = text.iter().position(|b| *b == b'\n') {
            let (line, rest) = text.split_at(at);
            keep(&mut begun, line);
            self.line(&mut begun);
            text = rest.get(1..).unwrap_or_default();
        }
        keep(&mut begun, text);
    }

    fn line(&self, line: &mut Vec<u8>) {
        if self.take_line() {
            log::line(&self.plugin, Level::INFO, &String::from_utf8_lossy(line));
        }
        line.clear();
    }

    fn begun(&self) -> MutexGuard<'_, Vec<u8>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds to a line what is kept of it.
fn keep(line: &mut Vec<u8>, more: &[u8]) {
    let room = (MAX_LINE + 1).saturating_sub(line.len());
    line.extend(more.iter().take(room));
}

/// A guest's stream; both end in the same place.
pub(crate) struct Stream(pub(crate) Arc<Output>);

impl IsTerminal for Stream {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Stream {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(Self(Arc::clone(&self.0)))
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(Self(Arc::clone(&self.0)))
    }
}

impl OutputStream for Stream {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.0.write(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(MAX_WRITE)
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Stream {
    async fn ready(&mut self) {}
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, text: &[u8]) -> Poll<io::Result<usize>> {
        self.0.write(text);
        Poll::Ready(Ok(text.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_line_is_bounded_and_ends_with_the_call() {
        let output = Output::new(&"p".into());
        output.begin(2);
        output.write(b"one\ntw");
        assert_eq!(*output.begun(), b"tw");
        output.write(&[b'o'; 100_000]);
        assert_eq!(output.begun().len(), MAX_LINE + 1);
        output.end();
        assert!(output.begun().is_empty());
        assert!(!output.take_line(), "both lines are used up");
    }
}

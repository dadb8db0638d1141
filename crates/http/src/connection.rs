//! Accept, second half: a connection from its first byte to its end.

use crate::gateway::Edge;
use crate::passed::Original;
use crate::serve::serve;
use crate::watch::Watched;
use crate::worker::{Connection, Entered};
use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use leeward_telemetry::{Direction, Peer};
use leeward_upstream::{Flushed, IncomingBody, coalesce};
use std::future::Future;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Who is at the other end of a connection.
pub(crate) struct Client {
    pub(crate) direction: Direction,
    pub(crate) peer: Peer,
    pub(crate) connection: Rc<Connection>,
    /// Where it meant to go, if it doesn't know that it is here.
    pub(crate) original: Option<Original>,
    /// Where it came in, if it is from outside.
    pub(crate) edge: Option<Edge>,
}

impl Client {
    /// One of the mesh's, which knows where it is.
    pub(crate) const fn new(direction: Direction, peer: Peer, connection: Rc<Connection>) -> Self {
        Self {
            direction,
            peer,
            connection,
            original: None,
            edge: None,
        }
    }
}

/// What a client may take up of the proxy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// The largest head of a request, in bytes; a larger one is answered 431.
    pub(crate) head: u32,
    /// Streams at once on one HTTP/2 connection.
    streams: u32,
    /// Flow-control windows of HTTP/2.
    stream_window: u32,
    connection_window: u32,
}

impl Bounds {
    /// Of workloads and proxies.
    pub(crate) const MESH: Self = Self {
        head: 64 << 10,
        streams: 1024,
        // Bounds what one slow upstream can make the proxy hold.
        stream_window: 1 << 20,
        // Bounds nothing of its own: many requests share it, and were it used up by upstreams that don't read, all others
        // would wait for them.
        connection_window: 1 << 30,
    };

    /// Of one client from outside: no more than a browser needs (RFC 9113 §6.5.2 wants 100 streams at least), and 16 MiB for
    /// bodies that nobody reads.
    pub(crate) const fn of_client(head: u32) -> Self {
        Self {
            head,
            streams: 128,
            stream_window: 1 << 20,
            connection_window: 16 << 20,
        }
    }
}

/// Which HTTP a connection speaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Speaks {
    Http1,
    Http2,
}

/// Spawns on the worker's own thread.
#[derive(Clone, Copy, Debug)]
struct Local;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, future: F) {
        // Its owner is the connection that it serves, which ends it.
        tokio::task::spawn_local(future);
    }
}

/// Most header fields of a request; more are answered 431.
const MAX_FIELDS: usize = 128;
/// How often a silent HTTP/2 client is asked whether it is there, and how long it may take to say so.
const PING_EVERY: Duration = Duration::from_secs(60);
const PONG_WITHIN: Duration = Duration::from_secs(20);
/// How long a workload may take to show which HTTP it speaks.
pub(crate) const SNIFF_TIMEOUT: Duration = Duration::from_secs(30);

/// Finds out which HTTP a plain connection speaks (RFC 9113 §3.3: with prior knowledge, the client begins
/// with a preface that no HTTP/1.1 request can), as long as it shows that within `limit`.
pub(crate) async fn sniff(stream: &TcpStream, limit: Duration) -> io::Result<Speaks> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let look = async {
        let mut buffer = [0u8; PREFACE.len()];
        let mut looks = Looks::default();
        loop {
            let n = stream.peek(&mut buffer).await?;
            let seen = buffer.get(..n).unwrap_or_default();
            if seen == PREFACE {
                return Ok(Speaks::Http2);
            }
            if n == 0 || !PREFACE.starts_with(seen) {
                return Ok(Speaks::Http1);
            }
            // A part of the preface.
            tokio::time::sleep(looks.pause(n)).await;
        }
    };
    match tokio::time::timeout(limit, look).await {
        Ok(spoken) => spoken,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Between looks at a connection of which a part of what is to be seen has come, since peeking again would return at once.
/// The longer nothing more comes, the rarer they are: a client must not have the proxy look as often as that can.
#[derive(Debug, Default)]
pub(crate) struct Looks {
    seen: usize,
    pause: Duration,
}

impl Looks {
    const PAUSE: Duration = Duration::from_millis(1);
    const LONGEST_PAUSE: Duration = Duration::from_millis(16);

    /// How long to wait when so many bytes have come in all.
    pub(crate) fn pause(&mut self, seen: usize) -> Duration {
        self.pause = if seen > self.seen {
            Self::PAUSE
        } else {
            (self.pause * 2).min(Self::LONGEST_PAUSE)
        };
        self.seen = seen;
        self.pause
    }
}

/// Serves a connection to its end.
pub(crate) async fn serve_connection<T>(
    entered: Entered,
    client: Client,
    io: T,
    speaks: Speaks,
    bounds: Bounds,
) where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let worker = Rc::clone(&entered.worker);
    let connection = Rc::clone(&entered.connection);
    let client = Rc::new(client);
    let service = {
        let worker = Rc::clone(&worker);
        service_fn(move |request: Request<Incoming>| {
            serve(
                Rc::clone(&worker),
                Rc::clone(&client),
                request.map(IncomingBody::Http),
            )
        })
    };
    let ended = match speaks {
        Speaks::Http1 => {
            let io = TokioIo::new(Watched::new(io, Arc::clone(&connection.watch)));
            let mut http = hyper::server::conn::http1::Builder::new();
            // The sweeper sees to heads that don't come: a timer for each request would cost more.
            http.max_buf_size(bounds.head as usize)
                .max_headers(MAX_FIELDS)
                .header_read_timeout(None);
            let mut serving = pin!(http.serve_connection(io, service).with_upgrades());
            // An idle client is left alone until its time is up: closing under it would lose a request
            // that is on its way. While draining, its next answer asks it to close.
            loop {
                tokio::select! {
                    biased;
                    ended = serving.as_mut() => break ended,
                    () = connection.close.notified() => {
                        if connection.is_over() {
                            break Ok(());
                        }
                        if worker.closes(&connection) {
                            serving.as_mut().graceful_shutdown();
                        }
                    }
                }
            }
        }
        Speaks::Http2 => {
            let mut http = hyper::server::conn::http2::Builder::new(Local);
            http.timer(TokioTimer::new())
                .keep_alive_interval(PING_EVERY)
                .keep_alive_timeout(PONG_WITHIN)
                .max_concurrent_streams(bounds.streams)
                .initial_stream_window_size(bounds.stream_window)
                .initial_connection_window_size(bounds.connection_window)
                .max_header_list_size(bounds.head);
            let (io, flusher) = coalesce(io);
            let mut serving = Flushed::new(http.serve_connection(TokioIo::new(io), service), flusher);
            loop {
                tokio::select! {
                    biased;
                    ended = &mut serving => break ended,
                    () = connection.close.notified() => {
                        if connection.is_abusive() || connection.is_over() {
                            // It needn't listen to GOAWAY.
                            break Ok(());
                        }
                        // GOAWAY loses nothing: what the client had sent before it is still served.
                        serving.connection().graceful_shutdown();
                    }
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "client connection ended");
    }
    drop(entered);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_says_nothing_more_is_looked_at_ever_more_rarely() {
        let mut looks = Looks::default();
        let pauses: Vec<_> = [1, 1, 1, 1, 1, 1, 1, 2, 2]
            .map(|seen| looks.pause(seen).as_millis())
            .into();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 16, 16, 1, 2]);
    }
}

//! Accept, second half: a connection from its first byte to its end.

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

/// The largest head of an HTTP/1.1 request, in bytes; a larger one is answered 431.
const MAX_HEAD: usize = 64 << 10;
/// Most header fields of a request; more are answered 431.
const MAX_FIELDS: usize = 128;
/// Streams at once on one HTTP/2 connection.
const MAX_STREAMS: u32 = 1024;
/// Flow-control windows of HTTP/2: a stream's bounds what one slow upstream can make the proxy hold.
const STREAM_WINDOW: u32 = 1 << 20;
/// A connection's bounds nothing of its own: many requests share it, and were it used up by upstreams that
/// don't read, all others would wait for them.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// How often a silent HTTP/2 client is asked whether it is there, and how long it may take to say so.
const PING_EVERY: Duration = Duration::from_secs(60);
const PONG_WITHIN: Duration = Duration::from_secs(20);
/// How long a client may take to show which HTTP it speaks.
const SNIFF_TIMEOUT: Duration = Duration::from_secs(30);

/// Finds out which HTTP a plain connection speaks (RFC 9113 §3.3: with prior knowledge, the client begins
/// with a preface that no HTTP/1.1 request can).
pub(crate) async fn sniff(stream: &TcpStream) -> io::Result<Speaks> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let look = async {
        let mut buffer = [0u8; PREFACE.len()];
        loop {
            let n = stream.peek(&mut buffer).await?;
            let seen = buffer.get(..n).unwrap_or_default();
            if seen == PREFACE {
                return Ok(Speaks::Http2);
            }
            if n == 0 || !PREFACE.starts_with(seen) {
                return Ok(Speaks::Http1);
            }
            // A part of the preface: rare, and peeking again would return at once.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    match tokio::time::timeout(SNIFF_TIMEOUT, look).await {
        Ok(spoken) => spoken,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Serves a connection to its end.
pub(crate) async fn serve_connection<T>(
    entered: Entered,
    (direction, original): (Direction, Option<Original>),
    peer: Peer,
    io: T,
    speaks: Speaks,
) where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let worker = Rc::clone(&entered.worker);
    let connection = Rc::clone(&entered.connection);
    let client = Rc::new(Client {
        direction,
        peer,
        connection: Rc::clone(&connection),
        original,
    });
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
            http.max_buf_size(MAX_HEAD)
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
                .max_concurrent_streams(MAX_STREAMS)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_header_list_size(64 << 10);
            let (io, flusher) = coalesce(io);
            let mut serving = Flushed::new(http.serve_connection(TokioIo::new(io), service), flusher);
            loop {
                tokio::select! {
                    biased;
                    ended = &mut serving => break ended,
                    // GOAWAY loses nothing: what the client had sent before it is still served.
                    () = connection.close.notified() => serving.connection().graceful_shutdown(),
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "client connection ended");
    }
    drop(entered);
}

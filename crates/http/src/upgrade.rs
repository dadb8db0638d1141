//! After a change of protocol, or where there never was one: bytes both ways.

use crate::exchange::Exchange;
use crate::idle::Stall;
use crate::relay::{End, relay};
use crate::worker::Connections;
use http::{Response, response};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use leeward_upstream::{IncomingBody, Plain};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is behind an answer that says that the protocol changes.
pub(crate) enum Beyond {
    /// A connection of HTTP's, when the change has come about.
    Changing(OnUpgrade),
    /// One that never had a protocol.
    Plain(Box<Plain>),
}

/// The same, ready for bytes.
pub(crate) enum Far {
    Upgraded(Box<TokioIo<Upgraded>>),
    Plain(Box<Plain>),
}

impl Beyond {
    /// Of an answer with the status 101, and its head.
    pub(crate) fn of(answer: Response<IncomingBody>) -> (response::Parts, Self) {
        let (head, body) = answer.into_parts();
        if let IncomingBody::Plain(plain) = body {
            return (head, Self::Plain(plain));
        }
        let mut answer = Response::from_parts(head, body);
        let changing = hyper::upgrade::on(&mut answer);
        (answer.into_parts().0, Self::Changing(changing))
    }

    pub(crate) async fn ready(self) -> hyper::Result<Far> {
        Ok(match self {
            Self::Changing(changing) => Far::Upgraded(Box::new(TokioIo::new(changing.await?))),
            Self::Plain(plain) => Far::Plain(plain),
        })
    }
}

/// Carries bytes between a client and an upstream that have both changed protocols. The exchange ends with
/// the tunnel.
pub(crate) fn tunnel(exchange: Box<Exchange>, client: OnUpgrade, upstream: Beyond) {
    let counted = Connections::hold(exchange.worker());
    // Its owner is the worker, which counts it and ends with its runtime.
    tokio::task::spawn_local(async move {
        let _counted = counted;
        match tokio::try_join!(client, upstream.ready()) {
            Ok((client, upstream)) => {
                let mut client = TokioIo::new(client);
                // Whoever is at the other end of an HTTP connection that breaks off in the middle of TLS, or of what
                // follows a change of protocol, knows that it did.
                carry(exchange, &mut client, upstream).await;
            }
            Err(error) => {
                tracing::debug!(%error, "protocol change failed");
                exchange.cut_short_by_upstream();
            }
        }
    });
}

/// Carries bytes to the end of both ways; the exchange ends with them. Says how that was.
pub(crate) async fn carry<A>(mut exchange: Box<Exchange>, client: &mut A, mut far: Far) -> End
where
    A: AsyncRead + AsyncWrite + Unpin,
{
    // The HTTP/1.1 connection is the tunnel's now; it can't go back to the pool.
    exchange.keep = None;
    let stall = Stall::new(&exchange.worker().house);
    stall.limit(longest_silence(&exchange));
    let relayed = relay(client, &mut far, &stall).await;
    exchange.record.response_bytes = relayed.received;
    exchange.intake.add(relayed.sent);
    if relayed.end != End::Whole {
        // What was cut off must not look as if it were all.
        far.reset();
    }
    match relayed.end {
        End::Whole => exchange.complete(),
        // It went away without a word; the record says so when the exchange is dropped.
        End::Client => drop(exchange),
        End::Far => exchange.cut_short_by_upstream(),
        End::Still => exchange.stood_still(),
    }
    relayed.end
}

/// Of connections of TCP services, of those to where policy knows nobody, and of clients from outside. What WebSockets and
/// their like of the mesh are silent for is for their ends to say.
fn longest_silence(exchange: &Exchange) -> Option<Duration> {
    if let Some(limit) = exchange.client_idle_limit() {
        return Some(limit);
    }
    exchange.record.tcp.as_ref()?;
    let snapshot = &exchange.snapshot;
    let Some(name) = &exchange.record.service else {
        return snapshot.capture().idle_timeout;
    };
    let view = snapshot
        .service_named(name)
        .and_then(|idx| snapshot.service(idx))?;
    view.spec.tcp.idle_timeout
}

impl Far {
    fn reset(&self) {
        match self {
            // Without the end of TLS, which tells the other side.
            Self::Upgraded(_) => {}
            Self::Plain(plain) => plain.reset(),
        }
    }
}

impl AsyncRead for Far {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Upgraded(io) => Pin::new(&mut **io).poll_read(cx, into),
            Self::Plain(io) => Pin::new(&mut **io).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for Far {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Upgraded(io) => Pin::new(&mut **io).poll_write(cx, data),
            Self::Plain(io) => Pin::new(&mut **io).poll_write(cx, data),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Upgraded(io) => Pin::new(&mut **io).poll_flush(cx),
            Self::Plain(io) => Pin::new(&mut **io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Upgraded(io) => Pin::new(&mut **io).poll_shutdown(cx),
            Self::Plain(io) => Pin::new(&mut **io).poll_shutdown(cx),
        }
    }
}

//! Listeners beside those for requests: HTTP/1.1 for few clients on the same node.

use crate::drain::Phase;
use anyhow::Context;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

/// One such listener.
pub(crate) struct Side(TcpListener);

/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

impl Side {
    pub(crate) async fn bind(address: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await;
        Ok(Self(
            listener.with_context(|| format!("can't listen on {address}"))?,
        ))
    }

    /// The listener that a predecessor had.
    pub(crate) fn handed(listener: StdListener) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener).map(Self)
    }

    /// The same listener once more, for a successor.
    pub(crate) fn try_clone(&self) -> std::io::Result<StdListener> {
        self.0.as_fd().try_clone_to_owned().map(StdListener::from)
    }

    pub(crate) fn address(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Answers until dropped, or until a successor has the listener: who asks then is to be answered by that one.
    /// No more than `limit` connections are served at once; more wait.
    pub(crate) async fn serve<A, F>(
        self,
        what: &'static str,
        limit: usize,
        phases: watch::Receiver<Phase>,
        answer: A,
    ) where
        A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
        F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
    {
        let slots = Arc::new(Semaphore::new(limit));
        let mut leaving = phases.clone();
        let mut gone = pin!(left(&mut leaving));
        loop {
            let slot = tokio::select! {
                () = gone.as_mut() => return,
                slot = Arc::clone(&slots).acquire_owned() => slot,
            };
            let Ok(slot) = slot else { return };
            let accepted = tokio::select! {
                biased;
                () = gone.as_mut() => return,
                accepted = self.0.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "can't accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let answer = answer.clone();
            let mut phases = phases.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let response = answer(request);
                    async move { Ok::<_, Infallible>(response.await) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service);
                let mut connection = pin!(connection);
                let served = tokio::select! {
                    served = connection.as_mut() => served,
                    () = left(&mut phases) => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                };
                if let Err(error) = served {
                    tracing::debug!(%error, "{what} connection ended");
                }
                drop(slot);
            });
        }
    }
}

/// Waits until a successor has the listener. A proxy that ends without one answers to the last.
pub(crate) async fn left(phases: &mut watch::Receiver<Phase>) {
    let left = |phase: &Phase| match phase {
        Phase::Leaving => true,
        Phase::Serving | Phase::Asking | Phase::Closing => false,
    };
    if phases.wait_for(left).await.is_err() {
        std::future::pending::<()>().await;
    }
}

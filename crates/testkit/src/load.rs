//! Steady load, and what became of it.

use crate::client::{Client, Protocol, Unsent, get};
use crate::wait::eventually;
use anyhow::ensure;
use http::{HeaderName, HeaderValue};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// What became of requests.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Requests that ended.
    pub sent: u64,
    /// Answered with a status below 500 and without `leeward-degraded`.
    pub served: u64,
    /// Answered by a fallback.
    pub degraded: u64,
    /// Everything else.
    pub failed: u64,
    /// Answers by the backend that gave them.
    pub by_backend: BTreeMap<String, u64>,
    /// What the first failures were.
    pub failures: Vec<String>,
}

/// Clients that call the same thing again and again, each one request at a time.
#[derive(Debug)]
pub struct Load {
    tally: Arc<Mutex<Tally>>,
    stop: CancellationToken,
    clients: JoinSet<()>,
}

/// What a client does about its connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Connections {
    /// Uses them again for as long as the other side lets it.
    Kept,
    /// Makes one for each request.
    Fresh,
}

/// Failures that are told in words.
const TOLD: usize = 20;
/// How often a request that was not sent, since its connection had just closed, is sent on another.
const RESENT: usize = 3;

impl Load {
    /// Starts `clients` clients of `to` that pause after each request.
    pub fn start(
        to: SocketAddr,
        protocol: Protocol,
        (host, path): (&str, &str),
        clients: usize,
        pause: Duration,
    ) -> Self {
        Self::start_with(to, protocol, (host, path), &[], clients, pause)
    }

    /// The same, with header fields in each request.
    pub fn start_with(
        to: SocketAddr,
        protocol: Protocol,
        (host, path): (&str, &str),
        headers: &[(&'static str, &'static str)],
        clients: usize,
        pause: Duration,
    ) -> Self {
        Self::run(
            to,
            protocol,
            (host, path),
            headers,
            clients,
            (pause, Connections::Kept),
        )
    }

    /// Clients that make a new connection for each request.
    pub fn start_fresh(
        to: SocketAddr,
        protocol: Protocol,
        (host, path): (&str, &str),
        clients: usize,
        pause: Duration,
    ) -> Self {
        Self::run(
            to,
            protocol,
            (host, path),
            &[],
            clients,
            (pause, Connections::Fresh),
        )
    }

    fn run(
        to: SocketAddr,
        protocol: Protocol,
        (host, path): (&str, &str),
        headers: &[(&'static str, &'static str)],
        clients: usize,
        (pause, connections): (Duration, Connections),
    ) -> Self {
        let tally = Arc::<Mutex<Tally>>::default();
        let stop = CancellationToken::new();
        let mut set = JoinSet::new();
        for _ in 0..clients {
            let (tally, stop) = (Arc::clone(&tally), stop.clone());
            let (host, path, headers) = (host.to_owned(), path.to_owned(), headers.to_vec());
            set.spawn(async move {
                let mut client = Client::new(to, protocol);
                while !stop.is_cancelled() {
                    if connections == Connections::Fresh {
                        client = Client::new(to, protocol);
                    }
                    one(&client, &host, &path, &headers, &tally).await;
                    // Between requests only: none is cut by the end of the load.
                    stop.run_until_cancelled(tokio::time::sleep(pause)).await;
                }
            });
        }
        Self {
            tally,
            stop,
            clients: set,
        }
    }

    /// Waits for so many answers of a backend's since the last [`Self::take`].
    ///
    /// # Errors
    ///
    /// The tally, if they don't come in that time.
    pub async fn answered_by(&self, backend: &str, answers: u64, within: Duration) -> anyhow::Result<()> {
        let what = format!("{answers} answers of {backend}");
        eventually(&what, within, || async {
            let tally = self.tally();
            let got = tally.by_backend.get(backend).copied().unwrap_or(0);
            ensure!(got >= answers, "{tally:?}");
            Ok(())
        })
        .await
    }

    /// What became of the requests so far.
    pub fn tally(&self) -> Tally {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same, and begins to count anew.
    pub fn take(&self) -> Tally {
        std::mem::take(&mut self.tally.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends after the requests that are under way.
    pub async fn stop(mut self) -> Tally {
        self.stop.cancel();
        while self.clients.join_next().await.is_some() {}
        self.take()
    }
}

async fn one(
    client: &Client,
    host: &str,
    path: &str,
    headers: &[(&'static str, &'static str)],
    tally: &Mutex<Tally>,
) {
    let request = || {
        let mut request = get(host, path);
        for (name, value) in headers {
            request
                .headers_mut()
                .insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        request
    };
    let mut reply = client.call(request()).await;
    for _ in 0..RESENT {
        // As every client does whose connection closes under its hands: nobody has seen the request.
        if !matches!(&reply, Err(error) if error.is::<Unsent>()) {
            break;
        }
        reply = client.call(request()).await;
    }
    let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
    tally.sent += 1;
    let failure = match reply {
        Ok(reply) => {
            let backend = reply.backend().to_owned();
            if reply.headers.contains_key("leeward-degraded") {
                tally.degraded += 1;
                None
            } else if reply.status.is_server_error() || backend.is_empty() {
                Some(format!(
                    "{} {:?} {:?}",
                    reply.status,
                    reply.header("leeward-reason"),
                    reply.text()
                ))
            } else {
                tally.served += 1;
                *tally.by_backend.entry(backend).or_default() += 1;
                None
            }
        }
        Err(error) => Some(format!("{error:#}")),
    };
    if let Some(failure) = failure {
        tally.failed += 1;
        if tally.failures.len() < TOLD {
            tally.failures.push(failure);
        }
    }
}

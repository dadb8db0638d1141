//! Steady requests from every zone to every service, each with an id of its own, and what became of them.

use http::Method;
use leeward_testkit::{Client, Protocol, Reply, Unsent, empty_body, request, with_header};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The header with a request's id, which the backend's answer repeats.
pub(crate) const ID: &str = "x-request-number";
/// Between two requests of a client.
const PAUSE: Duration = Duration::from_millis(50);
/// Failures that are told in words.
const TOLD: usize = 10;
/// How often a request that was not sent, since its connection had just closed, is sent on another.
const RESENT: usize = 3;

/// Requests of one kind from one zone to one service.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Flow {
    pub(crate) from: &'static str,
    pub(crate) to: &'static str,
    pub(crate) kind: Kind,
}

/// Whether a request may be sent twice.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Kind {
    Get,
    Post,
}

/// What became of the requests of a flow that began in a phase.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    pub(crate) served: u64,
    pub(crate) failed: u64,
}

/// What became of the requests that began in a phase.
#[derive(Clone, Debug, Default)]
pub(crate) struct Phase {
    counts: BTreeMap<Flow, Count>,
    /// What the first failures were.
    failures: Vec<String>,
}

impl Phase {
    /// The sum over some flows.
    pub(crate) fn count(&self, of: impl Fn(&Flow) -> bool) -> Count {
        let counts = self.counts.iter().filter(|(flow, _)| of(flow));
        counts.fold(Count::default(), |sum, (_, count)| Count {
            served: sum.served + count.served,
            failed: sum.failed + count.failed,
        })
    }

    pub(crate) fn failures(&self) -> &[String] {
        &self.failures
    }
}

#[derive(Debug, Default)]
struct Seen {
    phases: Vec<Phase>,
    /// Answers that were not to what was asked.
    misdelivered: Vec<String>,
    silent: BTreeSet<&'static str>,
}

/// Clients that go on until they are stopped, one for each flow.
#[derive(Debug)]
pub(crate) struct Traffic {
    seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
    clients: JoinSet<()>,
}

impl Traffic {
    /// Starts two clients, one of each kind, from each zone's proxy to each service.
    pub(crate) fn start(proxies: &[(&'static str, SocketAddr)], services: &[&'static str]) -> Self {
        let first = Seen {
            phases: vec![Phase::default()],
            ..Seen::default()
        };
        let mut traffic = Self {
            seen: Arc::new(Mutex::new(first)),
            stop: CancellationToken::new(),
            clients: JoinSet::new(),
        };
        for (from, proxy) in proxies {
            for to in services {
                for kind in [Kind::Get, Kind::Post] {
                    let flow = Flow { from, to, kind };
                    let (seen, stop) = (Arc::clone(&traffic.seen), traffic.stop.clone());
                    traffic.clients.spawn(keep_on(flow, *proxy, seen, stop));
                }
            }
        }
        traffic
    }

    /// Requests that begin from now on belong to another phase, whose number this is.
    pub(crate) fn next(&self) -> usize {
        let mut seen = lock(&self.seen);
        seen.phases.push(Phase::default());
        seen.phases.len() - 1
    }

    /// What became of the requests of a phase, as far as they have ended.
    pub(crate) fn phase(&self, number: usize) -> Phase {
        lock(&self.seen).phases.get(number).cloned().unwrap_or_default()
    }

    /// No further requests from this zone.
    pub(crate) fn silence(&self, zone: &'static str) {
        lock(&self.seen).silent.insert(zone);
    }

    /// Ends after the requests that are under way; returns all phases, and the answers that were not to what was asked.
    pub(crate) async fn stop(mut self) -> (Vec<Phase>, Vec<String>) {
        self.stop.cancel();
        while self.clients.join_next().await.is_some() {}
        let mut seen = lock(&self.seen);
        (
            std::mem::take(&mut seen.phases),
            std::mem::take(&mut seen.misdelivered),
        )
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn keep_on(flow: Flow, proxy: SocketAddr, seen: Arc<Mutex<Seen>>, stop: CancellationToken) {
    let client = Client::new(proxy, Protocol::Http1);
    let Flow { from, to, kind } = flow;
    let mut number = 0u64;
    while !stop.is_cancelled() {
        let phase = {
            let seen = lock(&seen);
            if seen.silent.contains(from) {
                return;
            }
            seen.phases.len() - 1
        };
        number += 1;
        let id = format!("{kind:?}/{from}/{to}/{number}");
        let reply = ask(&client, flow, &id).await;
        {
            let mut seen = lock(&seen);
            let served = match &reply {
                Ok(reply) if reply.status == 200 => {
                    let right = reply.backend().split('-').next() == Some(to) && reply.text() == id;
                    if !right {
                        let told = format!("{id} was answered by {} {:?}", reply.backend(), reply.text());
                        seen.misdelivered.push(told);
                    }
                    true
                }
                Ok(_) | Err(_) => false,
            };
            if let Some(phase) = seen.phases.get_mut(phase) {
                let count = phase.counts.entry(flow).or_default();
                if served {
                    count.served += 1;
                } else {
                    count.failed += 1;
                    if phase.failures.len() < TOLD {
                        phase.failures.push(told(&id, &reply));
                    }
                }
            }
        }
        stop.run_until_cancelled(tokio::time::sleep(PAUSE)).await;
    }
}

fn told(id: &str, reply: &anyhow::Result<Reply>) -> String {
    match reply {
        Ok(reply) => format!("{id}: {} {:?}", reply.status, reply.header("leeward-reason")),
        Err(error) => format!("{id}: {error:#}"),
    }
}

async fn ask(client: &Client, flow: Flow, id: &str) -> anyhow::Result<Reply> {
    let method = match flow.kind {
        Kind::Get => Method::GET,
        Kind::Post => Method::POST,
    };
    let host = format!("{}.example", flow.to);
    let mut left = RESENT;
    loop {
        let asked = request(method.clone(), &host, "/", empty_body());
        let reply = client.call(with_header(asked, ID, id)).await;
        // As every client does whose connection closes under its hands: nobody has seen the request.
        if left == 0 || !matches!(&reply, Err(error) if error.is::<Unsent>()) {
            return reply;
        }
        left -= 1;
    }
}

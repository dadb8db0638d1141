//! What is large goes by TCP where that works, and never waits for it where QUIC would do.

use super::{Connection, Endpoint, Lease, SendError, Sent, Wants, now};
use crate::connect::{ConnectError, Sender};
use crate::gateways::LEAST_WAIT;
use crate::peers::Peer;
use bytes::Bytes;
use http_body::Body;
use leeward_policy::model::Protocol;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Doubts TCP if a request ends without an answer for long. Whoever gives up sooner says nothing of the path.
struct Trial {
    peer: Rc<Peer>,
    since: Instant,
    passed: bool,
}

/// So long: QUIC finds a dead path in that time.
const LONG: Duration = Duration::from_secs(2);

impl<B> Endpoint<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// A connection by TCP that is there.
    pub(super) fn lease_ready(self: &Rc<Self>, wants: Wants) -> Option<Lease<B>> {
        match wants.protocol {
            Protocol::Http1 | Protocol::Tcp if wants.connection == Connection::Any => {
                let (sender, slot) = self.pop_idle()?;
                Some(self.leased(Sender::Http1(sender, slot), true))
            }
            // An idle connection was closing: QUIC knows better.
            Protocol::Http1 | Protocol::Tcp => None,
            Protocol::Http2 => {
                let sender = self.open_shared()?;
                Some(self.leased(Sender::Http2(sender), false))
            }
        }
    }

    /// A connection by TCP for what is known to be large, unless that takes long.
    pub(super) async fn lease_while_patient(self: &Rc<Self>, peer: &Peer, wants: Wants) -> Option<Lease<B>> {
        let patience = peer.patience();
        match tokio::time::timeout(patience.min(wants.limit), self.lease_tcp(wants)).await {
            Ok(Ok(lease)) => Some(lease),
            Ok(Err(error)) => {
                self.lacks_tcp(peer, &error);
                None
            }
            Err(_) => {
                // Other services may have more time.
                if patience <= wants.limit {
                    peer.block_tcp(now());
                }
                None
            }
        }
    }

    /// Makes a connection by TCP for requests to come, since those whose answers are large don't wait for one: QUIC is there.
    pub(super) fn make_spare(self: &Rc<Self>, peer: &Rc<Peer>, wants: Wants) {
        // Where none is kept, none would be there for the next.
        let is_kept = wants.protocol == Protocol::Http2 || self.bounds.get().max_idle > 0;
        if !wants.large_answer || !is_kept || self.making_spare.replace(true) {
            return;
        }
        let (endpoint, peer) = (Rc::clone(self), Rc::clone(peer));
        let wants = Wants {
            connection: Connection::New,
            // Nobody waits for it.
            limit: wants.limit.max(LEAST_WAIT),
            ..wants
        };
        // The others are for requests that have no other way.
        let max = (self.bounds.get().max_connections / 2).max(1);
        // Its owner is the worker; it ends within the time for a connection. One at a time for an endpoint.
        tokio::task::spawn_local(async move {
            match endpoint.lease_tcp_within(wants, max).await {
                Ok(lease) => lease.give_back(now()),
                Err(error) => endpoint.lacks_tcp(&peer, &error),
            }
            endpoint.making_spare.set(false);
        });
    }

    /// There was no connection by TCP, though QUIC would do.
    fn lacks_tcp(&self, peer: &Peer, error: &ConnectError) {
        tracing::debug!(to = %peer.address(), %error, "what is large goes by QUIC");
        let says_nothing_of_the_path = match error {
            // A bound of this side's, a certificate of this side's, or what another found, maybe a while ago.
            ConnectError::Full { .. } | ConnectError::Identity { .. } | ConnectError::JustFailed { .. } => {
                true
            }
            // One in a hurry says nothing for services that are in none.
            ConnectError::Timeout { limit, .. } => *limit < LEAST_WAIT,
            ConnectError::Tcp { .. }
            | ConnectError::Tls { .. }
            | ConnectError::Http { .. }
            | ConnectError::Peer { .. }
            | ConnectError::Quic { .. }
            | ConnectError::NoGateway { .. } => false,
        };
        if !says_nothing_of_the_path {
            peer.block_tcp(now());
        }
    }
}

/// Waits for the answer to a request that has gone by TCP, though it could have gone by QUIC. While none comes for long, others
/// go by QUIC.
pub(super) async fn tried<B>(
    peer: Rc<Peer>,
    sending: impl Future<Output = Result<Sent<B>, SendError<B>>>,
) -> Result<Sent<B>, SendError<B>> {
    let mut sending = std::pin::pin!(sending);
    let mut trial = Trial {
        peer,
        since: now(),
        passed: false,
    };
    let (sent, doubted) = match tokio::time::timeout(LONG, sending.as_mut()).await {
        Ok(sent) => (sent, false),
        Err(_) => {
            trial.peer.doubt_tcp(now());
            (sending.await, true)
        }
    };
    // What wasn't sent, or was refused, had an answer of a kind.
    trial.passed = !matches!(sent, Err(SendError::Broken { .. }));
    if doubted && sent.is_ok() {
        trial.peer.trust_tcp();
    }
    sent
}

impl Drop for Trial {
    fn drop(&mut self) {
        let now = now();
        if !self.passed && now.saturating_duration_since(self.since) >= LONG {
            self.peer.doubt_tcp(now);
        }
    }
}

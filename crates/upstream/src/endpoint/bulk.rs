//! What is large goes by TCP where that works, and never waits for it where QUIC would do.

use super::{Connection, Endpoint, Lease, Wants, now};
use crate::connect::{ConnectError, Sender};
use crate::peers::Peer;
use bytes::Bytes;
use http_body::Body;
use leeward_policy::model::Protocol;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Doubts TCP if no answer comes for long. Whoever gives up sooner says nothing of the path.
pub(super) struct Trial(Option<(Rc<Peer>, Instant)>);

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
        let wait = peer.patience().min(wants.limit);
        match tokio::time::timeout(wait, self.lease_tcp(wants)).await {
            Ok(Ok(lease)) => Some(lease),
            Ok(Err(error)) => {
                self.lacks_tcp(peer, &error);
                None
            }
            Err(_) => {
                peer.block_tcp(now());
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
            ..wants
        };
        // Its owner is the worker; it ends within the time for a connection. One at a time for an endpoint.
        tokio::task::spawn_local(async move {
            match endpoint.lease_tcp(wants).await {
                Ok(lease) => lease.give_back(now()),
                Err(error) => endpoint.lacks_tcp(&peer, &error),
            }
            endpoint.making_spare.set(false);
        });
    }

    /// There was no connection by TCP, though QUIC would do.
    fn lacks_tcp(&self, peer: &Peer, error: &ConnectError) {
        tracing::debug!(to = %peer.address(), %error, "what is large goes by QUIC");
        // A bound of this side's, or a certificate of this side's, says nothing of the path.
        if !matches!(error, ConnectError::Full { .. } | ConnectError::Identity { .. }) {
            peer.block_tcp(now());
        }
    }
}

impl Trial {
    pub(super) fn of(peer: Option<Rc<Peer>>) -> Self {
        Self(peer.map(|peer| (peer, now())))
    }

    /// It works.
    pub(super) fn passed(mut self) {
        self.0 = None;
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        let Some((peer, since)) = &self.0 else { return };
        let now = now();
        if now.saturating_duration_since(*since) >= LONG {
            peer.doubt_tcp(now);
        }
    }
}

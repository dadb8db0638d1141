//! One worker's links to other proxies: one for each, made once for all who want it, and replaced when it dies.

use crate::connect::ConnectError;
use crate::slots::replaced_at;
use leeward_identity::{Identity, SpiffeId};
use leeward_zone::{Client, Congestion, Link, Losses};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long QUIC has alone before TCP is tried as well (RFC 8305 §5 calls it the connection attempt delay).
pub(crate) const HEAD_START: Duration = Duration::from_millis(250);
/// How long a path that TCP had to be taken on is remembered.
const BLOCKED_FOR: Duration = Duration::from_secs(60);
/// The same, if the peer said itself that it takes no QUIC now: as one does that is being replaced.
const REFUSED_FOR: Duration = Duration::from_secs(5);
/// How long what would be better off by TCP goes by QUIC after a request by TCP had no answer: as long as the kernel takes
/// to close connections on which nothing is acknowledged any more.
const DOUBTED_FOR: Duration = Duration::from_secs(30);
/// From this round trip on what is lost delays TCP so much that it isn't worth what it saves. On a shorter path QUIC slows down
/// for every loss as well (docs/zone-protocol.md, Bounds), and waits as long for it.
const LONG: Duration = Duration::from_millis(5);
/// How long an attempt may go on beside requests that have taken TCP.
const ATTEMPT: Duration = Duration::from_secs(3);
/// Peers that are remembered; past that those without a link are forgotten.
const MAX_PEERS: usize = 16_384;

/// The peers of one worker.
#[derive(Debug)]
pub(crate) struct Peers {
    identity: Arc<Identity>,
    client: Client,
    known: RefCell<HashMap<(SocketAddr, SpiffeId), Rc<Peer>>>,
}

/// Another proxy, and the link to it.
#[derive(Debug)]
pub(crate) struct Peer {
    to: SocketAddr,
    id: SpiffeId,
    link: RefCell<Option<Link>>,
    /// When another link is to take the place of this one.
    due: Cell<Option<Instant>>,
    attempt: RefCell<Option<watch::Receiver<Attempt>>>,
    blocked_until: Cell<Option<Instant>>,
    /// The last link died of silence: the peer may be gone, and TCP knows that sooner.
    died: Cell<bool>,
    /// TCP did not get through.
    tcp_blocked_until: Cell<Option<Instant>>,
    /// TCP gave no answer.
    tcp_doubted_until: Cell<Option<Instant>>,
    /// What is lost on the way there, by the links that there were.
    losses: Cell<Losses>,
}

/// How far the making of a link has come.
#[derive(Clone, Debug)]
pub(crate) enum Attempt {
    Going,
    Done,
    Failed(Arc<leeward_zone::ConnectError>),
    TooLate,
}

/// What is known of the way to a peer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Path {
    /// Nothing speaks against QUIC.
    Open,
    /// It didn't get through lately.
    Blocked,
    /// It didn't get through, but that was a while ago.
    Forgotten,
}

impl Peers {
    pub(crate) fn new(identity: Arc<Identity>) -> Self {
        Self {
            client: Client::new(Arc::clone(&identity), Congestion::default()),
            identity,
            known: RefCell::default(),
        }
    }

    /// The proxy of a zone at an address.
    pub(crate) fn peer(&self, to: SocketAddr, zone: &str, name: &str) -> Result<Rc<Peer>, ConnectError> {
        let id = SpiffeId::proxy(self.identity.id().trust_domain(), zone, name).map_err(|source| {
            ConnectError::Peer {
                to,
                name: format!("zone/{zone}/proxy/{name}").into(),
                source,
            }
        })?;
        let mut known = self.known.borrow_mut();
        if known.len() >= MAX_PEERS {
            known.retain(|_, peer| peer.link.borrow().is_some());
        }
        let peer = known.entry((to, id.clone())).or_insert_with(|| {
            Rc::new(Peer {
                to,
                id,
                link: RefCell::default(),
                due: Cell::new(None),
                attempt: RefCell::default(),
                blocked_until: Cell::new(None),
                died: Cell::new(false),
                tcp_blocked_until: Cell::new(None),
                tcp_doubted_until: Cell::new(None),
                losses: Cell::default(),
            })
        });
        Ok(Rc::clone(peer))
    }

    /// Begins to make a link, or joins whoever does.
    pub(crate) fn attempt(self: &Rc<Self>, peer: &Rc<Peer>) -> watch::Receiver<Attempt> {
        if let Some(going) = &*peer.attempt.borrow() {
            return going.clone();
        }
        let (told, going) = watch::channel(Attempt::Going);
        peer.attempt.replace(Some(going.clone()));
        let (peers, peer) = (Rc::clone(self), Rc::clone(peer));
        // Its owner is the worker; it ends within its time. Nobody who waits for it can break it off, since others
        // may wait as well.
        tokio::task::spawn_local(async move {
            let connecting = peers.client.connect(peer.to, &peer.id);
            let attempt = match tokio::time::timeout(ATTEMPT, connecting).await {
                Ok(Ok(link)) => {
                    let now = tokio::time::Instant::now().into_std();
                    peer.due.set(Some(replaced_at(link.lasts(), now)));
                    // Requests on the one before have it for as long as they need.
                    peer.link.replace(Some(link));
                    peer.blocked_until.set(None);
                    peer.died.set(false);
                    peer.losses.set(peer.losses.get().anew());
                    Attempt::Done
                }
                Ok(Err(error)) => {
                    tracing::debug!(to = %peer.to, peer = %peer.id, %error, "no link by QUIC");
                    Attempt::Failed(Arc::new(error))
                }
                Err(_) => Attempt::TooLate,
            };
            if !matches!(attempt, Attempt::Done) && peer.blocked_until.get().is_some() {
                // It still doesn't get through, so it is not asked for with every request.
                peer.block(tokio::time::Instant::now().into_std(), attempt.was_answered());
            }
            peer.attempt.replace(None);
            told.send_replace(attempt);
        });
        going
    }

    /// Forgets links that are closed, and peers that no endpoint is behind any more; and makes another link in time where the
    /// certificates of one end, which goes on until that is there.
    pub(crate) fn sweep(self: &Rc<Self>, now: Instant) {
        self.known.borrow_mut().retain(|_, peer| {
            peer.look();
            if peer.is_due(now) {
                self.attempt(peer);
            }
            peer.count_losses();
            // One count is the map's own.
            Rc::strong_count(peer) > 1
                || peer
                    .link
                    .borrow()
                    .as_ref()
                    .is_some_and(|link| link.under_way() > 0)
        });
    }

    /// Links that are open.
    pub(crate) fn open(&self) -> usize {
        let known = self.known.borrow();
        known.values().filter(|peer| peer.link.borrow().is_some()).count()
    }
}

impl Peer {
    /// Where it is.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.to
    }

    /// A link that takes requests.
    pub(crate) fn usable(&self) -> Option<Link> {
        if let Some(link) = &*self.link.borrow()
            && link.is_usable()
        {
            return Some(link.clone());
        }
        self.look();
        None
    }

    /// Lets go of a link that takes no more requests. Those that are under way on it keep it for as long as they need.
    fn look(&self) {
        let mut place = self.link.borrow_mut();
        let Some(link) = &*place else { return };
        if link.is_open() && link.is_draining() {
            *place = None;
        } else if !link.is_open() {
            self.died.set(link.found_dead());
            *place = None;
        } else if !link.is_usable() {
            // It has not answered for a while. It may yet, so it stays until another takes its place.
            self.died.set(true);
        }
    }

    /// Whether another link is to take the place of the one that there is; once.
    fn is_due(&self, now: Instant) -> bool {
        let is_due = self.due.get().is_some_and(|due| now >= due);
        if is_due {
            self.due.set(None);
        }
        is_due && self.link.borrow().is_some()
    }

    pub(crate) fn path(&self, now: Instant) -> Path {
        match self.blocked_until.get() {
            None => Path::Open,
            Some(until) if now < until => Path::Blocked,
            Some(_) => Path::Forgotten,
        }
    }

    /// TCP was taken, since QUIC did not get through.
    pub(crate) fn block(&self, now: Instant, refused: bool) {
        let wait = if refused { REFUSED_FOR } else { BLOCKED_FOR };
        self.blocked_until.set(Some(now + wait));
    }

    /// No connection by TCP came about in time, and need not have: for a while what is better off by it goes by QUIC.
    pub(crate) fn block_tcp(&self, now: Instant) {
        self.tcp_blocked_until.set(Some(now + BLOCKED_FOR));
    }

    /// A request by TCP has no answer for long. The service may be slow, but it may be the path.
    pub(crate) fn doubt_tcp(&self, now: Instant) {
        self.tcp_doubted_until.set(Some(now + DOUBTED_FOR));
    }

    /// It was the service: the answer has come.
    pub(crate) fn trust_tcp(&self) {
        self.tcp_doubted_until.set(None);
    }

    /// Whether what is large is better off by TCP now. It is not where TCP didn't get through lately, nor on a long path that
    /// loses packets; and where QUIC isn't used, it is not asked.
    pub(crate) fn prefers_tcp(&self, now: Instant) -> bool {
        let is_over = |until: &Cell<Option<Instant>>| until.get().is_none_or(|until| now >= until);
        self.path(now) == Path::Open
            && is_over(&self.tcp_blocked_until)
            && is_over(&self.tcp_doubted_until)
            && !self.is_lossy()
    }

    fn is_lossy(&self) -> bool {
        // Without a link there is nothing to go by QUIC on. A busy machine makes a path no longer.
        let long = |link: &Link| link.least_round_trip() >= LONG;
        self.losses.get().is_high() && self.link.borrow().as_ref().is_some_and(long)
    }

    fn count_losses(&self) {
        if let Some(link) = &*self.link.borrow() {
            let (sent, lost) = link.losses();
            self.losses.set(self.losses.get().observe(sent, lost));
        }
    }

    /// How long a request that is large waits for a connection by TCP, while it could go by QUIC. Both handshakes take two round
    /// trips, and one packet may be lost.
    pub(crate) fn patience(&self) -> Duration {
        let link = self.link.borrow();
        let needed = link.as_ref().map_or(Duration::ZERO, |link| 4 * link.round_trip());
        needed.max(HEAD_START)
    }

    /// How long QUIC has alone. Nothing, after a link that died: if the peer is gone, TCP is told so at once.
    pub(crate) fn head_start(&self) -> Duration {
        if self.died.get() {
            Duration::ZERO
        } else {
            HEAD_START
        }
    }

    /// Waits for an attempt's end.
    pub(crate) async fn made(&self, going: &mut watch::Receiver<Attempt>) -> Result<Link, Attempt> {
        let attempt = match going.wait_for(|attempt| !matches!(attempt, Attempt::Going)).await {
            Ok(attempt) => attempt.clone(),
            // Whoever made it is gone, with the worker.
            Err(_) => Attempt::TooLate,
        };
        match attempt {
            Attempt::Done => self.usable().ok_or(Attempt::TooLate),
            failed @ (Attempt::Going | Attempt::Failed(_) | Attempt::TooLate) => Err(failed),
        }
    }
}

impl Attempt {
    /// Whether the peer said itself that it takes no QUIC.
    pub(crate) fn was_answered(&self) -> bool {
        matches!(self, Self::Failed(error) if error.was_answered())
    }

    /// The error of a request that had no other way.
    pub(crate) fn into_error(self, to: SocketAddr) -> ConnectError {
        match self {
            Self::Failed(source) => ConnectError::Quic { to, source },
            Self::Going | Self::Done | Self::TooLate => ConnectError::Timeout { to, limit: ATTEMPT },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> Peer {
        Peer {
            to: ([127, 0, 0, 1], 15008).into(),
            id: SpiffeId::proxy("leeward.test", "b", "b1").unwrap(),
            link: RefCell::default(),
            due: Cell::new(None),
            attempt: RefCell::default(),
            blocked_until: Cell::new(None),
            died: Cell::new(false),
            tcp_blocked_until: Cell::new(None),
            tcp_doubted_until: Cell::new(None),
            losses: Cell::default(),
        }
    }

    #[test]
    fn a_path_that_was_blocked_is_looked_at_again_after_a_while() {
        let peer = peer();
        let now = tokio::time::Instant::now().into_std();
        assert_eq!(peer.path(now), Path::Open);
        peer.block(now, false);
        assert_eq!(
            peer.path(now + BLOCKED_FOR - Duration::from_millis(1)),
            Path::Blocked
        );
        assert_eq!(peer.path(now + BLOCKED_FOR), Path::Forgotten);
        // One that said so itself may say otherwise soon.
        peer.block(now, true);
        assert_eq!(peer.path(now + REFUSED_FOR), Path::Forgotten);
    }

    #[test]
    fn what_is_large_leaves_tcp_alone_for_a_while_where_that_does_not_get_through() {
        let peer = peer();
        let now = tokio::time::Instant::now().into_std();
        assert!(peer.prefers_tcp(now));
        peer.block_tcp(now);
        assert!(!peer.prefers_tcp(now + BLOCKED_FOR - Duration::from_millis(1)));
        assert!(peer.prefers_tcp(now + BLOCKED_FOR));
        // An answer takes back a doubt, and no more.
        peer.doubt_tcp(now);
        peer.trust_tcp();
        assert!(!peer.prefers_tcp(now + BLOCKED_FOR - Duration::from_millis(1)));
        let now = now + BLOCKED_FOR;
        peer.doubt_tcp(now);
        assert!(!peer.prefers_tcp(now + DOUBTED_FOR - Duration::from_millis(1)));
        assert!(peer.prefers_tcp(now + DOUBTED_FOR));
        peer.trust_tcp();
        assert!(peer.prefers_tcp(now));
        // Without QUIC everything goes by TCP, and there is nothing to choose.
        peer.block(now, false);
        assert!(!peer.prefers_tcp(now + BLOCKED_FOR));
    }

    #[test]
    fn after_a_link_that_died_nothing_is_waited_for() {
        let peer = peer();
        assert_eq!(peer.head_start(), HEAD_START);
        peer.died.set(true);
        assert_eq!(peer.head_start(), Duration::ZERO);
        assert!(peer.usable().is_none());
    }
}

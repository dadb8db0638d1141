//! The side that sends requests.

use crate::control::{Health, Settings};
use crate::core::{Core, Report, Side};
use crate::error::{BoxError, Close, Code, ConnectError, Lost, SendError, StreamError};
use crate::head;
use crate::incoming::{Abort, Hold, Incoming};
use crate::outgoing::{Progress, Sending, Writer, at_once};
use crate::transport::{ClientConfigs, Congestion, endpoint, shown, socket};
use crate::twice::{self, Twice};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body::Body;
use leeward_identity::{Identity, SpiffeId};
use quinn::{Endpoint, TokioRuntime};
use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Context;

/// Makes connections. Belongs to one thread, as do its connections; all of them share one UDP socket for each
/// family of addresses.
#[derive(Debug)]
pub struct Client {
    configs: ClientConfigs,
    v4: RefCell<Option<Place>>,
    v6: RefCell<Option<Place>>,
}

/// A socket, and what makes connections on it.
#[derive(Clone, Debug)]
struct Place {
    endpoint: Endpoint,
    twice: Arc<Twice>,
}

/// A connection to a peer. Cheap to clone; closed when the last clone and the last body are dropped.
#[derive(Clone)]
pub struct Link(Rc<Core>);

impl Client {
    /// A client that presents an identity. Needs nothing yet: sockets are bound when they are first used.
    pub fn new(identity: Arc<Identity>, congestion: Congestion) -> Self {
        Self {
            configs: ClientConfigs::new(identity, congestion),
            v4: RefCell::default(),
            v6: RefCell::default(),
        }
    }

    /// Connects to exactly this peer. How long that may take is the caller's to say; a peer that isn't there never
    /// answers. Call on the thread of a `LocalSet`.
    ///
    /// Cancel-safe: dropping the future gives up the attempt.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub async fn connect(&self, to: SocketAddr, peer: &SpiffeId) -> Result<Link, ConnectError> {
        let config = self.configs.towards(to, peer)?;
        let Place { endpoint, twice } = self
            .place(to)
            .map_err(|source| ConnectError::Socket { to, source })?;
        // Peers are known by SPIFFE id; the name is not sent, and not looked at.
        let connecting = endpoint
            .connect_with(config, to, "leeward")
            .map_err(|source| ConnectError::Begin { to, source })?;
        let quic = connecting.await.map_err(|source| ConnectError::Handshake {
            to,
            peer: peer.clone(),
            source: Lost(source),
        })?;
        let tie = self.configs.identity().tie(&shown(&quic));
        let tie = tie.map_err(|source| ConnectError::Peer { to, source })?;
        Ok(Link(Core::begin(quic, twice, Side::Client, tie)))
    }

    fn place(&self, to: SocketAddr) -> io::Result<Place> {
        let (known, any) = match to {
            SocketAddr::V4(_) => (&self.v4, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))),
            SocketAddr::V6(_) => (&self.v6, SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))),
        };
        let mut known = known.borrow_mut();
        if let Some(place) = &*known {
            return Ok(place.clone());
        }
        let (socket, twice) = twice::wrap(socket(any, false)?)?;
        let runtime = Arc::new(TokioRuntime);
        let endpoint = Endpoint::new_with_abstract_socket(endpoint()?, None, socket, runtime)?;
        let place = Place { endpoint, twice };
        *known = Some(place.clone());
        Ok(place)
    }
}

impl Link {
    /// Sends a request and waits for the head of the answer. A body that isn't there at once is sent on beside, for as
    /// long as the answer is wanted.
    ///
    /// Dropping the future, or the answer's body, gives up the request.
    ///
    /// # Errors
    ///
    /// [`SendError`] tells what may have reached the peer.
    pub async fn send<B>(&self, request: Box<Request<B>>) -> Result<Response<Incoming>, SendError<B>>
    where
        B: Body<Data = Bytes> + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let core = &self.0;
        if !core.is_usable() {
            return Err(SendError::Unsent(request));
        }
        let under_way = core.enter();
        let Ok((send, recv)) = core.quic.open_bi().await else {
            return Err(SendError::Unsent(request));
        };
        let answers_head = request.method() == Method::HEAD;
        let mut incoming = Incoming::new(recv, Code::Cancelled);
        let writer = Writer::new(send, Code::Cancelled);
        let sending = at_once(|cx| self.begin(cx, writer, *request)).await?;
        let hold = Hold {
            under_way: Some(under_way),
            sending,
        };
        let answered = poll_fn(|cx| incoming.poll_head(cx))
            .await
            .and_then(|payload| Ok(head::response(payload)?))
            .and_then(|(parts, end)| {
                let bodyless = answers_head
                    || parts.status == StatusCode::NO_CONTENT
                    || parts.status == StatusCode::NOT_MODIFIED;
                let length = if bodyless {
                    None
                } else {
                    head::length(&parts.headers)?
                };
                incoming.begin(end, length)?;
                Ok((parts, end))
            });
        match answered {
            Ok((parts, end)) => {
                if !end {
                    incoming.hold(hold);
                }
                Ok(Response::from_parts(parts, incoming))
            }
            Err(error @ StreamError::Reset(Code::Refused)) => Err(SendError::Refused(error)),
            Err(StreamError::Lost(lost)) if self.is_refused(&lost) => {
                Err(SendError::Refused(StreamError::Lost(lost)))
            }
            Err(error) => {
                if matches!(error, StreamError::Violation(_)) {
                    incoming.stop(Code::Protocol);
                }
                Err(SendError::Broken(error))
            }
        }
    }

    /// Sends a request's head, and what of its body is there; the rest is sent by what this returns, if there is any. No part of
    /// a request's future, which is moved whole.
    fn begin<B>(
        &self,
        cx: &mut Context<'_>,
        writer: Writer,
        request: Request<B>,
    ) -> Result<Option<Abort>, SendError<B>>
    where
        B: Body<Data = Bytes> + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let (parts, body) = request.into_parts();
        let mut sending = Sending::new(writer, body, Rc::clone(&self.0));
        let begun = sending.begin(cx, |buf, end, limits| head::put_request(buf, &parts, end, limits));
        match begun {
            Ok(Progress::Whole) => Ok(None),
            Ok(Progress::Part) => {
                // Its owner is the answer's body, which ends it.
                let pump = tokio::task::spawn_local(pump(sending));
                Ok(Some(Abort(pump.abort_handle())))
            }
            // An answer may be on its way for all that.
            Err(StreamError::Reset(_)) => Ok(None),
            Err(StreamError::Lost(lost)) if self.is_refused(&lost) => {
                Err(SendError::Refused(StreamError::Lost(lost)))
            }
            // Not a whole request was sent, but a head may have been.
            Err(error @ (StreamError::Lost(_) | StreamError::Body)) => Err(SendError::Broken(error)),
            Err(error @ StreamError::Violation(_)) => Err(SendError::Refused(error)),
        }
    }

    /// Whether the peer has refused this side's certificate, before it took any request. By TLS 1.3 a client's handshake is over
    /// before the server has looked at its certificate (RFC 8446, section 2), and requests may be on their way; SETTINGS come
    /// once it has.
    fn is_refused(&self, lost: &Lost) -> bool {
        lost.is_alert() && self.settings().is_none()
    }

    /// Whether it takes requests: it is open, the peer has not said that it leaves, and it answers.
    pub fn is_usable(&self) -> bool {
        self.0.is_usable()
    }

    /// Whether it is open: requests that are under way may still be answered.
    pub fn is_open(&self) -> bool {
        self.0.is_open()
    }

    /// Whether the peer has said that it leaves.
    pub fn is_draining(&self) -> bool {
        self.0.is_draining()
    }

    /// Whether the peer did not answer any more, while requests were under way: it died, or the path to it.
    pub fn found_dead(&self) -> bool {
        self.0.found_dead()
    }

    /// For how long from its making it is to be used: so long are the certificates of both sides good. Whoever makes another in
    /// time loses no request.
    pub fn lasts(&self) -> std::time::Duration {
        self.0.lasts()
    }

    /// Requests under way.
    pub fn under_way(&self) -> usize {
        self.0.under_way()
    }

    /// What the peer takes, once it has said so.
    pub fn settings(&self) -> Option<Settings> {
        self.0.settings()
    }

    /// How the services that the peer exports are, once it has said so.
    pub fn health(&self) -> Option<Arc<Health>> {
        self.report().map(|report| report.health)
    }

    /// The same, with the time of the peer's last word on it.
    pub fn report(&self) -> Option<Report> {
        self.0.report()
    }

    /// How long a round trip takes, as the transport sees it.
    pub fn round_trip(&self) -> std::time::Duration {
        self.0.quic.rtt()
    }

    /// How long a round trip takes where nothing queues, here or on the way.
    pub fn least_round_trip(&self) -> std::time::Duration {
        self.0.least_round_trip()
    }

    /// Packets that were sent since it was made, but for those that were sent twice, and those that were lost on the way. What
    /// the peer sends and loses only the peer knows.
    pub fn losses(&self) -> (u64, u64) {
        self.0.losses()
    }

    /// Datagrams that have come from the peer: while requests are under way, a peer that is there is heard of.
    pub fn heard(&self) -> u64 {
        self.0.quic.stats().udp_rx.datagrams
    }

    /// Where the peer is.
    pub fn address(&self) -> SocketAddr {
        self.0.quic.remote_address()
    }

    /// Waits until it is closed, by whichever side.
    pub async fn closed(&self) -> Lost {
        Lost(self.0.quic.closed().await)
    }

    /// Closes it. Requests under way break off.
    pub fn close(&self) {
        self.0.close(Close::Leaving);
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("to", &self.address())
            .finish_non_exhaustive()
    }
}

/// Sends the rest of a request's body, until the peer wants no more.
async fn pump<B>(mut sending: Sending<B>)
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    let stopped = sending.stopped();
    tokio::select! {
        biased;
        sent = sending.go_on() => match sent {
            // What the peer makes of a request without its whole body is seen in the answer.
            Ok(()) => {}
            Err(StreamError::Violation(_)) => sending.reset(Code::TooLarge),
            Err(StreamError::Reset(_) | StreamError::Lost(_) | StreamError::Body) => {}
        },
        _ = stopped => {}
    }
}

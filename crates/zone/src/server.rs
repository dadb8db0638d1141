//! The side that answers requests.

use crate::control::Reports;
use crate::core::{Core, News, Side, UnderWay};
use crate::error::{AcceptError, BoxError, Close, Code, Lost, StreamError};
use crate::head;
use crate::incoming::Incoming;
use crate::outgoing::{Progress, Sending, Writer, at_once};
use crate::transport::{
    CHECK_ADDRESS_FROM, Congestion, MAX_HANDSHAKES, NoServerConfig, ServerConfigs, endpoint, shown, socket,
};
use crate::twice::{self, Twice};
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use leeward_identity::{Identity, Role, SpiffeId};
use quinn::{Endpoint, TokioRuntime};
use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::sync::watch;

/// Takes connections on one UDP socket. Belongs to one thread, as do its connections.
#[derive(Debug)]
pub struct Server {
    endpoint: Endpoint,
    twice: Arc<Twice>,
    configs: Rc<ServerConfigs>,
    health: Option<watch::Receiver<Arc<Reports>>>,
    handshakes: Rc<Cell<usize>>,
}

/// A connection whose handshake is under way.
#[derive(Debug)]
pub struct Arriving {
    incoming: quinn::Incoming,
    twice: Arc<Twice>,
    configs: Rc<ServerConfigs>,
    health: Option<watch::Receiver<Arc<Reports>>>,
    _counted: Counted,
}

/// A connection from a peer. Keep it until [`ServerLink::accept`] says that it has ended: dropped, it is closed, with
/// what was being sent.
#[derive(Debug)]
pub struct ServerLink {
    core: Rc<Core>,
    peer: Caller,
}

/// The proxy at the other end.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Its verified id.
    pub id: SpiffeId,
    /// Where from.
    pub address: SocketAddr,
}

/// A request that has begun.
#[derive(Debug)]
pub struct Exchange {
    writer: Writer,
    incoming: Incoming,
    under_way: UnderWay,
}

/// Sends the answer to one request. Dropped, it tells the client that something failed here.
#[derive(Debug)]
pub struct Responder {
    writer: Writer,
    under_way: UnderWay,
}

/// How long a client may take for a head, once it has begun to send it.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Longest handshake.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// How long the last packets of connections that are closed may take to be sent.
const FAREWELL: Duration = Duration::from_millis(200);

/// One UDP socket for each worker, all bound to the same address: the kernel deals peers out among them by their
/// address and port, and keeps each with its worker.
///
/// # Errors
///
/// What the system says; nothing stays bound.
pub fn bind(address: SocketAddr, workers: usize) -> io::Result<Vec<UdpSocket>> {
    let mut bound = address;
    let mut sockets = Vec::with_capacity(workers);
    for _ in 0..workers {
        let socket = socket(bound, true)?;
        bound = socket.local_addr()?;
        sockets.push(socket);
    }
    Ok(sockets)
}

/// Counts a handshake under way until dropped.
#[derive(Debug)]
struct Counted(Rc<Cell<usize>>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

impl From<NoServerConfig> for AcceptError {
    fn from(none: NoServerConfig) -> Self {
        match none {
            NoServerConfig::Identity(error) => Self::Identity(error),
            NoServerConfig::Suite(error) => Self::Suite(error),
        }
    }
}

impl Server {
    /// A server on a socket, which presents `identity`, and tells its peers of `health`, each what is for its zone,
    /// when that changes, at most once a second. Call on the thread of a `LocalSet`.
    ///
    /// # Errors
    ///
    /// If the socket can't be registered with the runtime.
    pub fn new(
        socket: UdpSocket,
        identity: Arc<Identity>,
        health: Option<watch::Receiver<Arc<Reports>>>,
        congestion: Congestion,
    ) -> io::Result<Self> {
        let configs = ServerConfigs::new(identity, congestion);
        let first = configs.current().map_err(io::Error::other)?;
        let (socket, twice) = twice::wrap(socket)?;
        let endpoint = Endpoint::new_with_abstract_socket(
            endpoint()?,
            Some((*first).clone()),
            socket,
            Arc::new(TokioRuntime),
        )?;
        Ok(Self {
            endpoint,
            twice,
            configs: Rc::new(configs),
            health,
            handshakes: Rc::default(),
        })
    }

    /// The next connection; `None` after [`Self::close`]. Handshakes are the caller's to run side by side.
    ///
    /// Cancel-safe.
    pub async fn accept(&self) -> Option<Arriving> {
        loop {
            let incoming = self.endpoint.accept().await?;
            let under_way = self.handshakes.get();
            if under_way >= MAX_HANDSHAKES {
                incoming.refuse();
                continue;
            }
            if under_way >= CHECK_ADDRESS_FROM && !incoming.remote_address_validated() && incoming.may_retry()
            {
                // It fails only if it may not, which was just asked.
                let _ = incoming.retry();
                continue;
            }
            self.handshakes.set(under_way + 1);
            return Some(Arriving {
                incoming,
                twice: Arc::clone(&self.twice),
                configs: Rc::clone(&self.configs),
                health: self.health.clone(),
                _counted: Counted(Rc::clone(&self.handshakes)),
            });
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Closes all connections, and waits until the peers have been told, for a moment at most.
    pub async fn close(&self) {
        self.endpoint.close(Close::Leaving.var(), b"");
        // Longer only if nobody hears it.
        let _ = tokio::time::timeout(FAREWELL, self.endpoint.wait_idle()).await;
    }
}

impl Arriving {
    /// Says at once that there is no connection to be had, so that the client goes elsewhere. So does dropping it.
    pub fn refuse(self) {
        self.incoming.refuse();
    }

    /// Finishes the handshake: with the identity of now, and only with a proxy of the trust domain.
    ///
    /// # Errors
    ///
    /// [`AcceptError`].
    pub async fn handshake(self) -> Result<ServerLink, AcceptError> {
        let from = self.incoming.remote_address();
        let config = self.configs.towards(from)?;
        let failed = |source| AcceptError::Handshake {
            from,
            source: Lost(source),
        };
        let connecting = self.incoming.accept_with(config).map_err(failed)?;
        let quic = tokio::time::timeout(HANDSHAKE_WITHIN, connecting)
            .await
            .unwrap_or(Err(quinn::ConnectionError::TimedOut))
            .map_err(failed)?;
        let tie = match self.configs.identity().tie(&shown(&quic)) {
            Ok(tie) => tie,
            Err(source) => {
                quic.close(Close::Unwelcome.var(), b"no identity");
                return Err(AcceptError::Peer { from, source });
            }
        };
        let id = tie.id().clone();
        let Role::Proxy { zone, .. } = id.role() else {
            quic.close(Close::Unwelcome.var(), b"not a proxy");
            return Err(AcceptError::Role { id, from });
        };
        let news = self.health.map(|reports| News { reports, zone });
        Ok(ServerLink {
            core: Core::begin(quic, self.twice, Side::Server(news), tie),
            peer: Caller { id, address: from },
        })
    }
}

impl ServerLink {
    /// Who it is.
    pub fn peer(&self) -> &Caller {
        &self.peer
    }

    /// The next request; `None` when the connection has ended. After [`Self::go_away`], requests that were sent before
    /// the client knew still come.
    ///
    /// Cancel-safe.
    pub async fn accept(&self) -> Option<Exchange> {
        let (send, recv) = self.core.quic.accept_bi().await.ok()?;
        Some(Exchange {
            writer: Writer::new(send, Code::Internal),
            // An answer that comes before the request's end is an answer: nobody needs the rest.
            incoming: Incoming::new(recv, Code::Enough),
            under_way: self.core.enter(),
        })
    }

    /// Tells the client to send new requests elsewhere. It closes the connection when those under way are done.
    pub fn go_away(&self) {
        self.core.leave();
    }

    /// Waits until there is no request under way and for a while nothing has come from the client. Of answers that are
    /// still on their way to it there would be acknowledgements.
    pub async fn silent_for(&self, time: Duration) {
        let heard = || self.core.quic.stats().udp_rx.datagrams;
        let mut before = heard();
        loop {
            tokio::time::sleep(time).await;
            let now = heard();
            if std::mem::replace(&mut before, now) == now && self.core.under_way() == 0 {
                return;
            }
        }
    }

    /// For how long from its making it is to be used: so long are the certificates of both sides good.
    pub fn lasts(&self) -> Duration {
        self.core.lasts()
    }

    /// Closes it, since that time has passed. Requests under way break off.
    pub fn end(&self) {
        self.core.close(Close::Ended);
    }

    /// Requests under way.
    pub fn under_way(&self) -> usize {
        self.core.under_way()
    }

    /// What the client takes, once it has said so.
    pub fn settings(&self) -> Option<crate::Settings> {
        self.core.settings()
    }
}

impl Exchange {
    /// Reads the request's head.
    ///
    /// # Errors
    ///
    /// If it breaks off, is none, or takes too long; the client has been told.
    pub async fn read(self) -> Result<(Request<Incoming>, Responder), StreamError> {
        let Self {
            mut writer,
            mut incoming,
            under_way,
        } = self;
        let payload = {
            let mut head = std::pin::pin!(poll_fn(|cx| incoming.poll_head(cx)));
            // It is nearly always here already, and a timer has its price.
            match at_once(|cx| head.as_mut().poll(cx)).await {
                Poll::Ready(read) => read,
                Poll::Pending => tokio::time::timeout(HEAD_WITHIN, head)
                    .await
                    .unwrap_or(Err(StreamError::Reset(Code::Timeout))),
            }
        };
        let read = payload.and_then(|payload| {
            let (parts, end) = head::request(payload)?;
            let length = head::length(&parts.headers)?;
            incoming.begin(end, length)?;
            Ok(parts)
        });
        match read {
            Ok(parts) => Ok((
                Request::from_parts(parts, incoming),
                Responder { writer, under_way },
            )),
            Err(error) => {
                let why = match &error {
                    StreamError::Violation(crate::Violation::TooLarge { .. }) => Code::TooLarge,
                    StreamError::Violation(_) => Code::Protocol,
                    StreamError::Reset(Code::Timeout) => Code::Timeout,
                    StreamError::Reset(_) | StreamError::Lost(_) | StreamError::Body => Code::Cancelled,
                };
                writer.reset(why);
                incoming.stop(why);
                Err(error)
            }
        }
    }
}

impl Responder {
    /// Waits for an answer to be made, unless the client doesn't want it any more, or is gone. Drop what makes it then.
    ///
    /// # Errors
    ///
    /// What the client said, or why it is gone.
    pub async fn unless_stopped<F: Future>(&self, make: Pin<&mut F>) -> Result<F::Output, StreamError> {
        tokio::select! {
            biased;
            made = make => Ok(made),
            stopped = self.writer.stopped() => Err(why_stopped(stopped)),
        }
    }

    /// Sends an answer, to its end. On a connection that is to be left it is waited for until the client has all of it:
    /// a connection that is closed loses what is on its way.
    ///
    /// # Errors
    ///
    /// If it was not sent whole; the client has been told.
    pub async fn respond<B>(self, answer: Response<B>) -> Result<(), StreamError>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        let Self { writer, under_way } = self;
        let mut stopped = std::pin::pin!(writer.stopped());
        // What of the answer is only needed for this has no place in the future.
        let begin = at_once(|cx| {
            let (parts, body) = answer.into_parts();
            let mut sending = Sending::new(writer, body, Rc::clone(under_way.core()));
            let begun = sending.begin(cx, |buf, end, limits| {
                head::put_response(buf, &parts, end, limits)
            });
            (sending, begun)
        });
        let (mut sending, begun) = begin.await;
        let sent = match begun {
            Ok(Progress::Whole) => Ok(()),
            Ok(Progress::Part) => tokio::select! {
                biased;
                sent = sending.go_on() => sent,
                stopped = stopped.as_mut() => Err(why_stopped(stopped)),
            },
            Err(error) => Err(error),
        };
        match &sent {
            // Whether the client wants its end any more is not asked here.
            Ok(()) if under_way.core().is_draining() => drop(stopped.await),
            Ok(()) => {}
            Err(error) => sending.reset(match error {
                StreamError::Violation(_) => Code::TooLarge,
                StreamError::Body | StreamError::Reset(_) | StreamError::Lost(_) => Code::Internal,
            }),
        }
        sent
    }

    /// Says that nothing was done with the request, so that it may be sent elsewhere.
    pub fn refuse(mut self) {
        self.writer.reset(Code::Refused);
    }

    /// Gives it up, and says why.
    pub fn reset(mut self, why: Code) {
        self.writer.reset(why);
    }
}

fn why_stopped(stopped: Result<Option<quinn::VarInt>, quinn::StoppedError>) -> StreamError {
    match stopped {
        Ok(code) => StreamError::Reset(code.map_or(Code::Cancelled, Code::from)),
        Err(quinn::StoppedError::ConnectionLost(error)) => error.into(),
        Err(quinn::StoppedError::ZeroRttRejected) => StreamError::Reset(Code::Internal),
    }
}

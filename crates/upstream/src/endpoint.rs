//! One endpoint as one worker uses it: its idle connections, and the lease of one for a request.

use crate::connect::{ConnectError, Connector, Sender};
use crate::registry::EndpointState;
use crate::service::ServiceState;
use crate::slots::{ConnectionSlot, Slot};
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use leeward_policy::EndpointKey;
use leeward_policy::model::{ConnectionPool, Protocol};
use leeward_resilience::Standing;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;

/// One endpoint and this worker's connections to it.
pub struct Endpoint<B> {
    /// Its identity.
    pub key: EndpointKey,
    /// What all workers know of it.
    pub state: Arc<EndpointState>,
    service: Arc<ServiceState>,
    connector: Rc<Connector>,
    idle: RefCell<Vec<Idle<B>>>,
    bounds: Cell<Bounds>,
    shared: RefCell<Option<http2::SendRequest<B>>>,
    /// Sweeps since the shared connection was asked for.
    quiet: Cell<u32>,
    /// Held while the shared connection is made, so that it is made once.
    making: Mutex<()>,
}

/// Bounds on connections; see [`ConnectionPool`].
#[derive(Clone, Copy)]
struct Bounds {
    max_connections: u32,
    max_idle: usize,
    idle_timeout: Duration,
}

impl From<&ConnectionPool> for Bounds {
    fn from(pool: &ConnectionPool) -> Self {
        Self {
            max_connections: pool.max_connections,
            max_idle: usize::try_from(pool.max_idle_per_endpoint).unwrap_or(usize::MAX),
            idle_timeout: pool.idle_timeout,
        }
    }
}

struct Idle<B> {
    sender: http1::SendRequest<B>,
    slot: Arc<Slot>,
    since: Instant,
}

/// Which connection is wanted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Connection {
    /// An idle one, or a new one.
    Any,
    /// A new one.
    New,
}

/// A connection for one request.
pub struct Lease<B> {
    sender: Sender<B>,
    reused: bool,
    endpoint: Rc<Endpoint<B>>,
}

/// An answer, and the connection that it comes on.
pub struct Sent<B> {
    /// The answer; its body is still coming.
    pub response: Response<Incoming>,
    /// Keep it until the body has ended.
    pub keep: Option<Keep<B>>,
}

/// An HTTP/1.1 connection whose answer is still coming. Give it back with [`Keep::give_back`] once the body
/// has been read to its end; dropped, the connection is closed.
pub struct Keep<B> {
    sender: http1::SendRequest<B>,
    slot: Arc<Slot>,
    endpoint: Rc<Endpoint<B>>,
}

/// Why a request got no answer.
pub enum SendError<B> {
    /// Not a byte of it was written; here it is again.
    Unsent(Box<Request<B>>),
    /// The peer refused it unprocessed (HTTP/2 REFUSED_STREAM or GOAWAY), so another try is safe.
    Refused(hyper::Error),
    /// It was written, wholly or in part. `reused`: on a connection that had served before, which the
    /// peer may have been closing.
    Broken {
        /// What hyper said.
        error: hyper::Error,
        /// Whether the connection had served before.
        reused: bool,
    },
}

impl<B> Endpoint<B>
where
    B: Body + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    pub(crate) fn new(
        key: EndpointKey,
        state: Arc<EndpointState>,
        service: Arc<ServiceState>,
        connector: Rc<Connector>,
        bounds: &ConnectionPool,
    ) -> Self {
        Self {
            key,
            state,
            service,
            connector,
            idle: RefCell::default(),
            bounds: Cell::new(bounds.into()),
            shared: RefCell::default(),
            quiet: Cell::new(0),
            making: Mutex::new(()),
        }
    }

    pub(crate) fn rebound(&self, bounds: &ConnectionPool) {
        self.bounds.set(bounds.into());
    }

    fn slot(&self) -> Result<ConnectionSlot, ConnectError> {
        let max = self.bounds.get().max_connections;
        self.service
            .connection(max)
            .ok_or(ConnectError::Full { to: self.key.address })
    }

    /// A connection: one that is idle, if that is wanted, or a new one within `limit`. HTTP/2 connections that
    /// are closing are known to be, so there it makes no difference.
    ///
    /// Cancel-safe: dropping the future gives up the attempt to connect.
    ///
    /// # Errors
    ///
    /// [`ConnectError`]; nothing was sent.
    pub async fn lease(
        self: &Rc<Self>,
        protocol: Protocol,
        wanted: Connection,
        limit: Duration,
    ) -> Result<Lease<B>, ConnectError> {
        match protocol {
            Protocol::Http1 => {
                if wanted == Connection::Any
                    && let Some((sender, slot)) = self.pop_idle()
                {
                    return Ok(self.leased(Sender::Http1(sender, slot), true));
                }
                // Rare, so it doesn't belong in the size of every request's future.
                let connect =
                    self.connector
                        .connect(self.key.address, &self.key.via, protocol, self.slot()?, limit);
                Ok(self.leased(Box::pin(connect).await?, false))
            }
            Protocol::Http2 => match self.open_shared() {
                // What may be tried again on a new connection, since the peer may have been closing an idle one
                // (RFC 9112 §9.3.1), is HTTP/1.1's matter: HTTP/2 says so itself.
                Some(sender) => Ok(self.leased(Sender::Http2(sender), false)),
                None => Box::pin(self.make_shared(limit)).await,
            },
        }
    }

    async fn make_shared(self: &Rc<Self>, limit: Duration) -> Result<Lease<B>, ConnectError> {
        let waited = self.making.try_lock().is_err();
        let _making = self.making.lock().await;
        if let Some(sender) = self.open_shared() {
            return Ok(self.leased(Sender::Http2(sender), false));
        }
        // The one that was waited for failed: its verdict is this one's, or a crowd of waiters would try
        // one after the other.
        if waited && self.state.standing(tokio::time::Instant::now().into_std()) != Standing::Healthy {
            return Err(ConnectError::JustFailed { to: self.key.address });
        }
        let sender = self
            .connector
            .connect(
                self.key.address,
                &self.key.via,
                Protocol::Http2,
                self.slot()?,
                limit,
            )
            .await?;
        if let Sender::Http2(sender) = &sender {
            *self.shared.borrow_mut() = Some(sender.clone());
        }
        Ok(self.leased(sender, false))
    }

    fn leased(self: &Rc<Self>, sender: Sender<B>, reused: bool) -> Lease<B> {
        Lease {
            sender,
            reused,
            endpoint: Rc::clone(self),
        }
    }

    /// The one used last, since the peer is least likely to be closing it.
    fn pop_idle(&self) -> Option<(http1::SendRequest<B>, Arc<Slot>)> {
        let mut idle = self.idle.borrow_mut();
        std::iter::from_fn(|| idle.pop())
            .find(|idle| !idle.sender.is_closed() && idle.slot.take())
            .map(|idle| (idle.sender, idle.slot))
    }

    fn open_shared(&self) -> Option<http2::SendRequest<B>> {
        self.quiet.set(0);
        let mut shared = self.shared.borrow_mut();
        if shared.as_ref().is_some_and(http2::SendRequest::is_closed) {
            *shared = None;
        }
        shared.clone()
    }

    /// Closes connections that are idle for too long; call about once a second. True if none is left that is
    /// used: a shared one that nobody asked for in a while ends with the streams that it has, once the endpoint is
    /// forgotten.
    pub(crate) fn sweep(&self, now: Instant) -> bool {
        let limit = self.bounds.get().idle_timeout;
        let quiet = self.quiet.get().saturating_add(1);
        self.quiet.set(quiet);
        let forgotten = self.shared.borrow().is_none() || u64::from(quiet) > limit.as_secs();
        let mut idle = self.idle.borrow_mut();
        idle.retain(|idle| !idle.sender.is_closed() && now.saturating_duration_since(idle.since) < limit);
        idle.is_empty() && forgotten
    }
}

impl<B> Lease<B>
where
    B: Body + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Sends a request and waits for the head of the answer.
    ///
    /// Dropping the future abandons the request: an HTTP/1.1 connection is closed, an HTTP/2 stream reset.
    ///
    /// # Errors
    ///
    /// [`SendError`] tells what may have reached the peer.
    pub async fn send(self, request: Request<B>) -> Result<Sent<B>, SendError<B>> {
        let Self {
            sender,
            reused,
            endpoint,
        } = self;
        match sender {
            Sender::Http1(mut sender, slot) => {
                // A connection whose last body has just ended may need one more turn of its task.
                if !sender.is_ready() && sender.ready().await.is_err() {
                    return Err(SendError::Unsent(Box::new(request)));
                }
                match sender.try_send_request(request).await {
                    Ok(response) => Ok(Sent {
                        response,
                        keep: Some(Keep {
                            sender,
                            slot,
                            endpoint,
                        }),
                    }),
                    Err(error) => Err(failed(error, reused)),
                }
            }
            Sender::Http2(mut sender) => match sender.try_send_request(request).await {
                Ok(response) => Ok(Sent { response, keep: None }),
                Err(error) => Err(failed(error, reused)),
            },
        }
    }
}

fn failed<B>(mut error: hyper::client::conn::TrySendError<Request<B>>, reused: bool) -> SendError<B> {
    if let Some(request) = error.take_message() {
        return SendError::Unsent(Box::new(request));
    }
    let error = error.into_error();
    if is_refusal(&error) {
        SendError::Refused(error)
    } else {
        SendError::Broken { error, reused }
    }
}

/// Whether the peer said that it did not process the request (RFC 9113 §8.7).
fn is_refusal(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            return h2.reason() == Some(h2::Reason::REFUSED_STREAM)
                || h2.is_go_away() && h2.is_remote() && h2.reason() == Some(h2::Reason::NO_ERROR);
        }
        source = cause.source();
    }
    false
}

impl<B> Keep<B> {
    /// Gives the connection back for the next request, if it is still open and there is room.
    pub fn give_back(self, now: Instant) {
        if self.sender.is_closed() {
            return;
        }
        let mut idle = self.endpoint.idle.borrow_mut();
        if idle.len() < self.endpoint.bounds.get().max_idle {
            self.slot.rest();
            idle.push(Idle {
                sender: self.sender,
                slot: self.slot,
                since: now,
            });
        }
    }
}

impl<B> std::fmt::Debug for Endpoint<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

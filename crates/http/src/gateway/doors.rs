//! Doors: addresses that are listened on for clients from outside, which come and go with policy.

use super::tls::PortTls;
use super::{Edge, http3};
use crate::connection::{Bounds, Client, Speaks, serve_connection, sniff};
use crate::listener::{Port, Taking};
use crate::worker::{Entered, Worker};
use arc_swap::ArcSwap;
use http::HeaderValue;
use leeward_policy::PortView;
use leeward_telemetry::{Direction, Peer};
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener, UdpSocket};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::rustls::server::Acceptor;

/// One address, shared by the workers.
#[derive(Debug)]
pub struct Door {
    /// Where it listens, as policy has it.
    pub address: SocketAddr,
    settings: ArcSwap<DoorSettings>,
    open: AtomicUsize,
    closed: AtomicBool,
}

/// What holds for connections that are made from now on.
#[derive(Debug)]
pub struct DoorSettings {
    max_connections: usize,
    handshake_timeout: Duration,
    /// Of connections in the clear and by HTTP/3; those by TLS have their listener's.
    pub(super) head: u32,
    pub(super) idle: Duration,
    /// Proxies in front are believed, by every listener.
    pub(super) of_many: bool,
    tls: Option<PortTls>,
    /// Where HTTP/3 is to be had.
    pub(super) alt_svc: Option<HeaderValue>,
}

/// How long clients may remember where HTTP/3 is: a day, as most servers have it.
const ALT_SVC_AGE: u32 = 86_400;

impl DoorSettings {
    /// What policy says of a port. `http3`: its UDP port is listened on, too.
    pub fn new(port: &PortView, tls: Option<PortTls>, http3: bool) -> Self {
        let alt_svc = format!("h3=\":{}\"; ma={ALT_SVC_AGE}", port.address.port());
        Self {
            max_connections: port.max_connections() as usize,
            handshake_timeout: port.handshake_timeout(),
            head: port.max_header_bytes(),
            idle: port.idle_timeout(),
            of_many: port.listeners.iter().all(|listener| listener.trusted_hops > 0),
            tls,
            // Always a valid value.
            alt_svc: http3.then(|| HeaderValue::try_from(alt_svc).ok()).flatten(),
        }
    }

    pub(super) fn tls(&self) -> Option<&PortTls> {
        self.tls.as_ref()
    }

    pub(super) const fn handshake_timeout(&self) -> Duration {
        self.handshake_timeout
    }
}

impl Door {
    /// An address that is listened on.
    pub fn new(address: SocketAddr, settings: DoorSettings) -> Self {
        Self {
            address,
            settings: ArcSwap::from_pointee(settings),
            open: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
        }
    }

    /// It is no more: who comes by it yet is asked to leave.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Other settings, for connections that are made from now on.
    pub fn set(&self, settings: DoorSettings) {
        self.settings.store(Arc::new(settings));
    }

    pub(super) fn settings(&self) -> Arc<DoorSettings> {
        self.settings.load_full()
    }

    /// Connections that are open.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// A place for one more connection, if there is one.
    pub(crate) fn count(self: &Arc<Self>) -> Option<Counted> {
        let before = self.open.fetch_add(1, Ordering::Relaxed);
        // Dropped again at once if it is one too many.
        let counted = Counted(Arc::clone(self));
        (before < self.settings.load().max_connections).then_some(counted)
    }
}

/// A connection of a door, counted until dropped.
#[derive(Debug)]
pub(crate) struct Counted(Arc<Door>);

impl Counted {
    /// The door.
    pub(crate) const fn door(&self) -> &Arc<Door> {
        &self.0
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a worker is told of doors.
#[derive(Debug)]
pub enum DoorNews {
    /// One that is new, with the worker's share of its sockets: a listener, and what all workers that accept from it hold.
    Open {
        /// The door.
        door: Arc<Door>,
        /// At least one.
        sockets: Vec<(StdListener, Arc<()>)>,
    },
    /// The UDP socket of one, for HTTP/3; and what all workers with a socket of the address hold.
    OpenUdp {
        /// The door.
        door: Arc<Door>,
        /// The worker's socket.
        socket: UdpSocket,
        /// Let go of when the worker's last connection has ended: were one of the sockets closed before, the kernel would
        /// deal all packets out anew.
        linked: Arc<()>,
    },
    /// HTTP/3 is no more.
    CloseUdp(SocketAddr),
    /// It is no more at all.
    Close(SocketAddr),
}

/// The way to tell all workers.
#[derive(Debug)]
pub struct Doors {
    workers: Vec<mpsc::Sender<DoorNews>>,
}

/// News that may wait for one worker.
const INBOX: usize = 64;

impl Doors {
    /// A way to each of `workers` workers.
    pub fn new(workers: usize) -> (Self, Vec<mpsc::Receiver<DoorNews>>) {
        let (senders, receivers) = (0..workers).map(|_| mpsc::channel(INBOX)).unzip();
        (Self { workers: senders }, receivers)
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Has the workers accept from the sockets of a port.
    ///
    /// # Errors
    ///
    /// If a socket that several workers need can't be shared, such as for too many open files.
    pub async fn open(&self, door: &Arc<Door>, port: &Port) -> io::Result<()> {
        for (worker, sockets) in self.workers.iter().zip(port.deal(self.workers.len())?) {
            let door = Arc::clone(door);
            // A worker that is gone accepts nothing.
            drop(worker.send(DoorNews::Open { door, sockets }).await);
        }
        Ok(())
    }

    /// Has the workers take HTTP/3, each from one of these sockets.
    pub async fn open_udp(&self, door: &Arc<Door>, sockets: Vec<UdpSocket>) {
        let linked = Arc::new(());
        for (worker, socket) in self.workers.iter().zip(sockets) {
            let (door, linked) = (Arc::clone(door), Arc::clone(&linked));
            drop(worker.send(DoorNews::OpenUdp { door, socket, linked }).await);
        }
    }

    /// Has the workers take no more HTTP/3 at an address.
    pub async fn close_udp(&self, address: SocketAddr) {
        for worker in &self.workers {
            drop(worker.send(DoorNews::CloseUdp(address)).await);
        }
    }

    /// Has the workers let go of an address, and of its connections as soon as nothing is under way on them.
    pub async fn close(&self, address: SocketAddr) {
        for worker in &self.workers {
            drop(worker.send(DoorNews::Close(address)).await);
        }
    }
}

/// The doors that a worker has.
#[derive(Default)]
pub(crate) struct Opened {
    tcp: HashMap<SocketAddr, (Arc<Door>, watch::Sender<Taking>)>,
    udp: HashMap<SocketAddr, watch::Sender<Taking>>,
    accepting: Vec<JoinHandle<()>>,
}

impl Opened {
    /// Takes news in. `accept` begins to accept from a socket.
    pub(crate) fn take(
        &mut self,
        news: DoorNews,
        worker: &Rc<Worker>,
        mut accept: impl FnMut(
            &Arc<Door>,
            (StdListener, Arc<()>),
            watch::Receiver<Taking>,
        ) -> Option<JoinHandle<()>>,
    ) {
        self.accepting.retain(|accepting| !accepting.is_finished());
        match news {
            DoorNews::Open { door, sockets } => {
                let (taking, taken) = watch::channel(Taking::Accept);
                self.tcp.insert(door.address, (Arc::clone(&door), taking));
                let begun = sockets
                    .into_iter()
                    .filter_map(|socket| accept(&door, socket, taken.clone()));
                self.accepting.extend(begun);
            }
            DoorNews::OpenUdp { door, socket, linked } => {
                let (taking, taken) = watch::channel(Taking::Accept);
                self.udp.insert(door.address, taking);
                let address = door.address;
                let serving = http3::serve(door, socket, linked, Rc::clone(worker), taken);
                // Its owner is the worker, which ends with its runtime.
                tokio::task::spawn_local(async move {
                    if let Err(error) = serving.await {
                        tracing::warn!(%address, %error, "no HTTP/3; clients come by TCP");
                    }
                });
            }
            DoorNews::CloseUdp(address) => end(self.udp.remove(&address), Taking::Close),
            DoorNews::Close(address) => {
                end(self.udp.remove(&address), Taking::Close);
                if let Some((door, taking)) = self.tcp.remove(&address) {
                    door.close();
                    taking.send_replace(Taking::Close);
                }
                worker.leave_door(address);
            }
        }
    }

    /// Nothing more is to be accepted anywhere; returns what accepts until that has ended.
    pub(crate) fn end(self, how: Taking) -> Vec<JoinHandle<()>> {
        let tcp = self.tcp.into_values().map(|(_, taking)| taking);
        for taking in tcp.chain(self.udp.into_values()) {
            taking.send_replace(how);
        }
        self.accepting
    }
}

fn end(taking: Option<watch::Sender<Taking>>, how: Taking) {
    if let Some(taking) = taking {
        taking.send_replace(how);
    }
}

/// Serves a connection that came by a door.
pub(crate) async fn serve_tcp(
    stream: TcpStream,
    address: SocketAddr,
    place: Counted,
    entered: Entered,
) -> io::Result<()> {
    let door = Arc::clone(place.door());
    let settings = door.settings();
    let peer = Peer {
        address,
        identity: None,
    };
    let client = |entered: &Entered, secure, place| Client {
        edge: Some(Edge {
            door: Arc::clone(&door),
            secure,
            http3: false,
            _place: place,
        }),
        ..Client::new(Direction::Ingress, peer.clone(), Rc::clone(&entered.connection))
    };
    entered.connection.came_by(&door, settings.idle, settings.of_many);
    let Some(tls) = settings.tls() else {
        let speaks = entered
            .unless_closed(sniff(&stream, settings.handshake_timeout))
            .await?;
        let client = client(&entered, None, place);
        serve_connection(entered, client, stream, speaks, Bounds::of_client(settings.head)).await;
        return Ok(());
    };
    let handshake = async {
        let started = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let host = started
            .client_hello()
            .server_name()
            .map(|host| host.to_ascii_lowercase());
        let (listener, secure) = tls
            .listener(host.as_deref(), false)
            .ok_or_else(|| io::Error::other("there is no certificate"))?;
        let stream = started.into_stream(listener.config()).await?;
        io::Result::Ok((stream, secure, listener))
    };
    let handshake = async { tokio::time::timeout(settings.handshake_timeout, handshake).await? };
    let (stream, secure, listener) = Box::pin(entered.unless_closed(handshake)).await?;
    entered.connection.came_by(&door, listener.idle, listener.of_many);
    let bounds = Bounds::of_client(listener.head);
    let speaks = match stream.get_ref().1.alpn_protocol() {
        Some(b"h2") => Speaks::Http2,
        Some(_) | None => Speaks::Http1,
    };
    let client = client(&entered, Some(secure), place);
    drop(settings);
    serve_connection(entered, client, stream, speaks, bounds).await;
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A door for clients in the clear, of which nobody has the sockets.
    pub(crate) fn door_in_the_clear() -> Arc<Door> {
        let address = SocketAddr::from(([127, 0, 0, 1], 80));
        let port = PortView {
            address,
            listeners: Vec::new(),
        };
        Arc::new(Door::new(address, DoorSettings::new(&port, None, false)))
    }
}

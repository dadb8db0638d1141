//! Accept, first half: sockets, and which worker gets which connection.

use crate::captured::{Meant, serve_captured};
use crate::connection::{Bounds, Client, SNIFF_TIMEOUT, Speaks, serve_connection, sniff};
use crate::gateway::{Counted as Place, Door, DoorNews, Opened, serve_tcp};
use crate::worker::{Connections, Entered, Worker};
use leeward_identity::Tied;
use leeward_telemetry::{Direction, Peer};
use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;

/// What a listener is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// Plain HTTP from the node's own workloads, on its way out.
    Outbound,
    /// Mutual TLS from other proxies, for the node's workloads.
    Inbound,
    /// Whatever the node's workloads meant for somewhere else, which the kernel brings here.
    Capture,
    /// Whatever the node's workloads send to an address that is a service's.
    Tcp,
    /// Whatever a gateway's listeners say, from clients outside of the mesh.
    Gateway,
}

/// Where a connection came in.
#[derive(Clone, Debug)]
enum Entrance {
    Outbound,
    Inbound,
    Capture,
    Tcp,
    Door(Arc<Door>),
}

/// Connections handed from one worker to another that may wait; more stay where they were accepted.
const HANDED_OVER: usize = 256;
/// How many more connections a worker must have than the least loaded one to hand a new one over.
const SLACK: usize = 2;
/// Connections waiting to be accepted; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// Client connections of one worker; more are closed at once.
pub(crate) const MAX_CONNECTIONS: usize = 65_536;
/// Longest TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failure to accept, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long those who have begun to connect to a listener that closes may take for that: as long as a round trip. Who begins
/// meanwhile hears only after a second, when he tries again, that there is nobody any more.
const SETTLE: Duration = Duration::from_millis(250);
/// The same on this host, where a busy machine is what it takes.
const SETTLE_HERE: Duration = Duration::from_millis(50);

/// What is done about connections that are yet to come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Taking {
    /// They are accepted.
    Accept,
    /// Nothing more is accepted, and the sockets are let go of without being closed for good: another process
    /// holds them as well, and accepts what waits in them.
    Leave,
    /// Nothing more comes: the sockets are closed, and what they had taken by then is served.
    Close,
}

/// One listening address: as many sockets as the process that bound it had workers.
#[derive(Debug)]
pub struct Port {
    /// What it is for.
    pub role: Role,
    /// Where it listens, the port known.
    pub address: SocketAddr,
    sockets: Vec<StdListener>,
}

/// Binds one socket for each worker to an address, with SO_REUSEPORT.
///
/// # Errors
///
/// What the system says; nothing stays bound.
pub fn bind(role: Role, address: SocketAddr, workers: usize) -> io::Result<Port> {
    let mut bound = address;
    let mut sockets = Vec::with_capacity(workers);
    for _ in 0..workers {
        let socket = Socket::new(Domain::for_address(bound), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&bound.into())?;
        socket.listen(BACKLOG)?;
        let listener = StdListener::from(socket);
        bound = listener.local_addr()?;
        sockets.push(listener);
    }
    Ok(Port {
        role,
        address: bound,
        sockets,
    })
}

/// The same, unless somebody else listens there: SO_REUSEPORT alone would take a share of his connections.
///
/// # Errors
///
/// What the system says, if somebody does, too.
pub fn bind_alone(role: Role, address: SocketAddr, workers: usize) -> io::Result<Port> {
    let probe = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // What is left of earlier connections is no hindrance; a socket that listens is.
    probe.set_reuse_address(true)?;
    probe.bind(&address.into())?;
    drop(probe);
    bind(role, address, workers)
}

/// A listening socket, and what all workers that accept from it hold.
pub(crate) type Shared = (StdListener, Arc<()>);

impl Port {
    /// The listening sockets of one address, as another process had them.
    ///
    /// # Errors
    ///
    /// If there is none, if they don't listen on one address, or if one is no listening socket: whoever connects
    /// to a socket that nothing is accepted from waits in vain.
    pub fn handed(role: Role, sockets: Vec<StdListener>) -> io::Result<Self> {
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why);
        let first = sockets.first().ok_or_else(|| bad("an address without sockets"))?;
        let address = first.local_addr()?;
        for socket in &sockets {
            if !SockRef::from(socket).is_listener()? {
                return Err(bad("a socket that does not listen"));
            }
            if socket.local_addr()? != address {
                return Err(bad("sockets of more than one address"));
            }
            socket.set_nonblocking(true)?;
        }
        Ok(Self {
            role,
            address,
            sockets,
        })
    }

    /// The same sockets once more. They are closed for good only when this is dropped as well.
    ///
    /// # Errors
    ///
    /// What the system says, such as too many open files.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            role: self.role,
            address: self.address,
            sockets: self
                .sockets
                .iter()
                .map(StdListener::try_clone)
                .collect::<Result<_, _>>()?,
        })
    }

    /// Its sockets, at least one.
    pub fn sockets(&self) -> &[StdListener] {
        &self.sockets
    }

    /// Those that each of so many workers accepts from, each with what all that accept from it hold.
    pub(crate) fn deal(&self, workers: usize) -> io::Result<Vec<Vec<Shared>>> {
        let shared: Vec<_> = self.sockets.iter().map(|socket| (socket, Arc::new(()))).collect();
        let mut dealt: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
        for (worker, socket) in shares(shared.len(), workers) {
            if let (Some(of), Some((socket, share))) = (dealt.get_mut(worker), shared.get(socket)) {
                of.push((socket.try_clone()?, Arc::clone(share)));
            }
        }
        Ok(dealt)
    }
}

/// Which worker accepts from which socket, so that every worker has at least one and no socket has none. A
/// socket of an SO_REUSEPORT group that nothing is accepted from would still be given its share of the
/// connections.
fn shares(sockets: usize, workers: usize) -> impl Iterator<Item = (usize, usize)> {
    let pairs = if sockets == 0 || workers == 0 {
        0
    } else {
        sockets.max(workers)
    };
    (0..pairs).map(move |i| (i % workers.max(1), i % sockets.max(1)))
}

/// How many connections each worker has, and the way to hand one over.
#[derive(Debug)]
pub struct Loads {
    workers: Vec<Load>,
}

#[derive(Debug)]
struct Load {
    connections: AtomicUsize,
    inbox: mpsc::Sender<Handed>,
}

/// A connection on its way to another worker.
#[derive(Debug)]
struct Handed {
    stream: StdStream,
    peer: SocketAddr,
    entrance: Entrance,
}

/// One worker's listening sockets.
#[derive(Debug)]
pub struct Listeners {
    me: usize,
    loads: Arc<Loads>,
    inbox: mpsc::Receiver<Handed>,
    sockets: Vec<Dealt>,
    doors: Option<mpsc::Receiver<DoorNews>>,
}

/// A listening socket as one worker has it.
#[derive(Debug)]
struct Dealt {
    entrance: Entrance,
    socket: StdListener,
    /// One for each worker that accepts from it: only the last of them closes it.
    share: Arc<()>,
}

impl Listeners {
    /// Deals the sockets of `ports` out to `workers` workers. Where there are fewer sockets than workers, as
    /// when a process with fewer workers bound them, several workers accept from the same one. Another socket
    /// is not bound: should this process end before the one that the others are from, the connections in its
    /// queue would be lost.
    ///
    /// # Errors
    ///
    /// If a socket that several workers need can't be shared, such as for too many open files.
    pub fn deal(ports: &[Port], workers: usize) -> io::Result<Vec<Self>> {
        let (inboxes, receivers): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::channel(HANDED_OVER)).unzip();
        let none = inboxes.into_iter().map(|inbox| Load {
            connections: AtomicUsize::new(0),
            inbox,
        });
        let loads = Arc::new(Loads {
            workers: none.collect(),
        });
        let mut dealt: Vec<Self> = receivers
            .into_iter()
            .enumerate()
            .map(|(me, inbox)| Self {
                me,
                loads: Arc::clone(&loads),
                inbox,
                sockets: Vec::new(),
                doors: None,
            })
            .collect();
        for port in ports {
            let entrance = match port.role {
                Role::Outbound => Entrance::Outbound,
                Role::Inbound => Entrance::Inbound,
                Role::Capture => Entrance::Capture,
                Role::Tcp => Entrance::Tcp,
                // They come and go: see `Doors`.
                Role::Gateway => continue,
            };
            for (listeners, sockets) in dealt.iter_mut().zip(port.deal(workers)?) {
                let sockets = sockets.into_iter().map(|(socket, share)| Dealt {
                    entrance: entrance.clone(),
                    socket,
                    share,
                });
                listeners.sockets.extend(sockets);
            }
        }
        Ok(dealt)
    }

    /// Opens and closes doors for clients from outside, too, as it is told.
    pub fn attend(&mut self, doors: mpsc::Receiver<DoorNews>) {
        self.doors = Some(doors);
    }

    /// Accepts and serves until `taking` says to leave or to close the sockets. To close them, it takes what
    /// the kernel has already accepted first. Connections go on after it returns.
    ///
    /// # Errors
    ///
    /// If a socket can't be registered with this worker's runtime.
    pub async fn run(self, worker: Rc<Worker>, mut taking: watch::Receiver<Taking>) -> io::Result<()> {
        let Self {
            me,
            loads,
            mut inbox,
            sockets,
            doors,
        } = self;
        let begin =
            |entrance: Entrance, (socket, share): (StdListener, Arc<()>), taking: watch::Receiver<Taking>| {
                let listener = TcpListener::from_std(socket)?;
                let accept = accept(
                    (listener, share),
                    entrance,
                    me,
                    Arc::clone(&loads),
                    Rc::clone(&worker),
                    taking,
                );
                io::Result::Ok(tokio::task::spawn_local(accept))
            };
        let mut accepting = Vec::new();
        for Dealt {
            entrance,
            socket,
            share,
        } in sockets
        {
            accepting.push(begin(entrance, (socket, share), taking.clone())?);
        }
        let mut opened = Opened::default();
        // Without anybody who would tell of doors there is none to hear of.
        let mut doors = doors.unwrap_or_else(|| mpsc::channel(1).1);
        let how = loop {
            tokio::select! {
                how = ended(&mut taking) => break how,
                Some(handed) = inbox.recv() => take(handed, me, &loads, &worker),
                Some(news) = doors.recv() => opened.take(news, &worker, |door, socket, taking| {
                    match begin(Entrance::Door(Arc::clone(door)), socket, taking) {
                        Ok(accepting) => Some(accepting),
                        Err(error) => {
                            tracing::error!(address = %door.address, %error, "can't accept");
                            None
                        }
                    }
                }),
            }
        };
        accepting.extend(opened.end(how));
        for accept in accepting {
            // A panic in it was reported by the runtime; there is nothing else to learn here.
            drop(accept.await);
        }
        inbox.close();
        while let Some(handed) = inbox.recv().await {
            take(handed, me, &loads, &worker);
        }
        Ok(())
    }
}

impl Loads {
    /// Another worker, if it has so many fewer connections that a new one should be its.
    fn better_than(&self, me: usize) -> Option<&Load> {
        let of = |load: &Load| load.connections.load(Ordering::Relaxed);
        let mine = self.workers.get(me).map(of)?;
        let best = self.workers.iter().min_by_key(|load| of(load))?;
        (of(best) + SLACK <= mine).then_some(best)
    }

    fn counted(self: &Arc<Self>, me: usize) -> Counted {
        if let Some(load) = self.workers.get(me) {
            load.connections.fetch_add(1, Ordering::Relaxed);
        }
        Counted {
            loads: Arc::clone(self),
            me,
        }
    }
}

/// A connection of a worker, counted until dropped.
struct Counted {
    loads: Arc<Loads>,
    me: usize,
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(load) = self.loads.workers.get(self.me) {
            load.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

async fn accept(
    (listener, share): (TcpListener, Arc<()>),
    entrance: Entrance,
    me: usize,
    loads: Arc<Loads>,
    worker: Rc<Worker>,
    mut taking: watch::Receiver<Taking>,
) {
    let mut leaving = taking.clone();
    let how = loop {
        let accepted = tokio::select! {
            biased;
            // At once: what waits in the socket is accepted by the process that has it as well.
            () = left(&mut leaving) => break Taking::Leave,
            accepted = listener.accept() => accepted,
            // Only once nothing is left to accept: a connection that the kernel has taken is ours to serve.
            how = ended(&mut taking) => break how,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "can't accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match hand_over(stream, peer, &entrance, me, &loads) {
            Some(stream) => start(stream, peer, entrance.clone(), me, &loads, &worker),
            None => continue,
        }
    };
    match how {
        // Dropping it takes it out of this worker's poll and no more. A filter, as `close` uses it, would be
        // the other process's too.
        Taking::Accept | Taking::Leave => {}
        // Others accept from it still, and the last of them closes it.
        Taking::Close if Arc::into_inner(share).is_none() => {}
        Taking::Close => {
            let start = |stream, peer| start(stream, peer, entrance.clone(), me, &loads, &worker);
            if let Err(error) = close(&listener, start).await {
                tracing::warn!(%error, "a listener did not close in order; a client may be reset");
            }
        }
    }
}

/// Waits until nothing more is to be accepted, and says how that is to end. Nobody left to say so means the
/// same as closing.
pub(crate) async fn ended(taking: &mut watch::Receiver<Taking>) -> Taking {
    let ended = taking.wait_for(|taking| *taking != Taking::Accept).await;
    ended.map_or(Taking::Close, |how| *how)
}

/// Waits until the sockets are to be left to another process.
async fn left(taking: &mut watch::Receiver<Taking>) {
    if taking.wait_for(|taking| *taking == Taking::Leave).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Closes a listener without resetting anyone. First the kernel is told to drop what begins a connection (a client tries
/// again, and is then refused). Whoever had begun by then takes himself for connected as soon as the kernel's answer is there,
/// and so is waited for and accepted.
async fn close(listener: &TcpListener, mut start: impl FnMut(TcpStream, SocketAddr)) -> io::Result<()> {
    /// Of what comes with SYN and without ACK keep nothing, and all of the rest; packets begin with TCP's header.
    const DROP_SYN: [SockFilter; 5] = [
        // BPF_LD | BPF_B | BPF_ABS: the flags.
        SockFilter::new(0x30, 0, 0, 13),
        // BPF_ALU | BPF_AND | BPF_K: ACK and SYN of them.
        SockFilter::new(0x54, 0, 0, 0x12),
        // BPF_JMP | BPF_JEQ | BPF_K: SYN alone, or over the next.
        SockFilter::new(0x15, 0, 1, 0x02),
        // BPF_RET | BPF_K.
        SockFilter::new(0x06, 0, 0, 0),
        SockFilter::new(0x06, 0, 0, u32::MAX),
    ];
    let socket = SockRef::from(listener);
    socket.attach_filter(&DROP_SYN)?;
    let settle = if listener.local_addr()?.ip().is_loopback() {
        SETTLE_HERE
    } else {
        SETTLE
    };
    let until = tokio::time::Instant::now() + settle;
    while let Ok(accepted) = tokio::time::timeout_at(until, listener.accept()).await {
        let (stream, peer) = accepted?;
        start(stream, peer);
    }
    // What the runtime hasn't heard of.
    loop {
        match socket.accept() {
            Ok((stream, address)) => {
                stream.set_nonblocking(true)?;
                // TCP has no peers without an address.
                if let Some(peer) = address.as_socket() {
                    start(TcpStream::from_std(stream.into())?, peer);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Hands a connection to a worker that has fewer; gives it back if there is none, or its inbox is full.
fn hand_over(
    stream: TcpStream,
    peer: SocketAddr,
    entrance: &Entrance,
    me: usize,
    loads: &Loads,
) -> Option<TcpStream> {
    let Some(other) = loads.better_than(me) else {
        return Some(stream);
    };
    let Ok(permit) = other.inbox.try_reserve() else {
        return Some(stream);
    };
    match stream.into_std() {
        Ok(stream) => permit.send(Handed {
            stream,
            peer,
            entrance: entrance.clone(),
        }),
        Err(error) => tracing::warn!(%error, "connection lost between workers"),
    }
    None
}

fn take(handed: Handed, me: usize, loads: &Arc<Loads>, worker: &Rc<Worker>) {
    match TcpStream::from_std(handed.stream) {
        Ok(stream) => start(stream, handed.peer, handed.entrance, me, loads, worker),
        Err(error) => tracing::warn!(%error, "connection lost between workers"),
    }
}

fn start(
    stream: TcpStream,
    peer: SocketAddr,
    entrance: Entrance,
    me: usize,
    loads: &Arc<Loads>,
    worker: &Rc<Worker>,
) {
    let place = match &entrance {
        _ if worker.busy() >= MAX_CONNECTIONS => None,
        Entrance::Outbound | Entrance::Inbound | Entrance::Capture | Entrance::Tcp => Some(None),
        Entrance::Door(door) => door.count().map(Some),
    };
    let Some(place) = place else {
        worker.recorder.connection_refused();
        return;
    };
    let counted = (loads.counted(me), Connections::hold(worker));
    let worker = Rc::clone(worker);
    // Its owner is the worker, which counts it, waits for it when draining, and ends with its runtime.
    tokio::task::spawn_local(async move {
        let _counted = counted;
        if let Err(error) = serve(stream, peer, (entrance, place), worker).await {
            tracing::debug!(%peer, %error, "client connection ended");
        }
    });
}

async fn serve(
    stream: TcpStream,
    address: SocketAddr,
    (entrance, place): (Entrance, Option<Place>),
    worker: Rc<Worker>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let entered = Connections::enter(&worker);
    let client = |entered: &Entered, direction, identity| {
        let peer = Peer { address, identity };
        Client::new(direction, peer, Rc::clone(&entered.connection))
    };
    match entrance {
        Entrance::Door(_) => {
            if let Some(place) = place {
                Box::pin(serve_tcp(stream, address, place, entered)).await?;
            }
        }
        Entrance::Outbound => {
            let speaks = entered.unless_closed(sniff(&stream, SNIFF_TIMEOUT)).await?;
            let client = client(&entered, Direction::Outbound, None);
            serve_connection(entered, client, stream, speaks, Bounds::MESH).await;
        }
        Entrance::Inbound => {
            let identity = worker.identity.clone().ok_or(io::ErrorKind::NotFound)?;
            let config = identity
                .server_config(&[b"h2", b"http/1.1"])
                .map_err(io::Error::other)?;
            let handshake = TlsAcceptor::from(config).accept(stream);
            let handshake = async { tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await? };
            let tls = entered.unless_closed(handshake).await?;
            let (_, session) = tls.get_ref();
            let speaks = match session.alpn_protocol() {
                Some(b"h2") => Speaks::Http2,
                Some(_) | None => Speaks::Http1,
            };
            let shown = session.peer_certificates().unwrap_or_default();
            let tie = identity.tie(shown).map_err(io::Error::other)?;
            let id = tie.id();
            if !matches!(id.role(), leeward_identity::Role::Proxy { .. }) {
                tracing::warn!(%address, %id, "only proxies may use the inbound listener");
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            entered.connection.lasts(tie.lasts(), worker.now());
            let client = client(&entered, Direction::Inbound, Some(id.to_string().into()));
            serve_connection(entered, client, Tied::new(tls, tie), speaks, Bounds::MESH).await;
        }
        Entrance::Capture => Box::pin(serve_captured(entered, stream, address, Meant::Elsewhere)).await?,
        Entrance::Tcp => Box::pin(serve_captured(entered, stream, address, Meant::Here)).await?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    proptest! {
        #[test]
        fn every_socket_is_accepted_from_and_every_worker_has_one(sockets in 1..300usize, workers in 1..300usize) {
            let mut of_socket = vec![0usize; sockets];
            let mut of_worker = vec![0usize; workers];
            for (worker, socket) in shares(sockets, workers) {
                of_socket[socket] += 1;
                of_worker[worker] += 1;
            }
            prop_assert!(of_socket.iter().all(|n| *n > 0));
            prop_assert!(of_worker.iter().all(|n| *n > 0));
            let spread = |counts: &[usize]| counts.iter().max().unwrap() - counts.iter().min().unwrap();
            prop_assert!(spread(&of_socket) <= 1 && spread(&of_worker) <= 1);
        }
    }

    fn loopback() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    #[tokio::test]
    async fn a_listener_that_closes_takes_who_has_begun_and_nobody_else() {
        let listener = TcpListener::bind(loopback()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut before = TcpStream::connect(address).await.unwrap();
        let mut taken = Vec::new();
        let begun = std::cell::Cell::new(false);
        let closing = close(&listener, |stream, _| taken.push(stream));
        let late = async {
            // The filter is there once the first has been waited for.
            tokio::task::yield_now().await;
            begun.set(true);
            TcpStream::connect(address).await
        };
        let late = tokio::select! {
            biased;
            closed = closing => { closed.unwrap(); None }
            late = late => Some(late),
        };
        assert!(
            begun.get() && late.is_none(),
            "nobody is connected any more: {late:?}"
        );
        drop(listener);
        // What was taken is served: its packets pass the filter that it has inherited.
        assert_eq!(taken.len(), 1);
        for _ in 0..2 {
            before.write_all(b"ping").await.unwrap();
            let mut heard = [0; 4];
            taken[0].read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"ping");
            taken[0].write_all(b"pong").await.unwrap();
            before.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"pong");
        }
        let refused = TcpStream::connect(address).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn what_was_handed_over_is_one_address_that_listens() {
        let port = bind(Role::Outbound, loopback(), 2).unwrap();
        let other = bind(Role::Outbound, loopback(), 1).unwrap();
        let sockets = |port: &Port| port.try_clone().unwrap().sockets;
        let handed = Port::handed(Role::Outbound, sockets(&port)).unwrap();
        assert_eq!(
            (handed.address, handed.sockets().len()),
            (port.address, 2),
            "the same sockets"
        );
        assert!(Port::handed(Role::Outbound, Vec::new()).is_err());
        let mut mixed = sockets(&port);
        mixed.extend(sockets(&other));
        assert!(Port::handed(Role::Outbound, mixed).is_err());
        let deaf = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        deaf.bind(&loopback().into()).unwrap();
        assert!(Port::handed(Role::Outbound, vec![deaf.into()]).is_err());
    }

    #[test]
    fn workers_without_a_socket_of_their_own_share_one() {
        let port = bind(Role::Outbound, loopback(), 1).unwrap();
        let dealt = Listeners::deal(std::slice::from_ref(&port), 3).unwrap();
        let counts: Vec<_> = dealt.iter().map(|listeners| listeners.sockets.len()).collect();
        assert_eq!(counts, [1, 1, 1]);
        let mut dealt = dealt.into_iter().flat_map(|listeners| listeners.sockets);
        let last = dealt.next().unwrap();
        for other in dealt {
            assert!(Arc::into_inner(other.share).is_none(), "it has other users still");
        }
        assert!(Arc::into_inner(last.share).is_some());
    }
}

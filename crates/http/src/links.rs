//! Accept by QUIC: requests of other proxies on links, each on a stream of its own.

use crate::connection::Client;
use crate::listener::{MAX_CONNECTIONS, Taking, ended};
use crate::serve::serve;
use crate::worker::{Connections, Worker};
use leeward_telemetry::{Direction, Peer};
use leeward_upstream::IncomingBody;
use leeward_zone::{AcceptError, Arriving, Congestion, Exchange, Reports, Server, ServerLink};
use std::io;
use std::net::UdpSocket;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// How often a worker that takes no more connections looks whether the last has ended.
const LOOK: Duration = Duration::from_millis(20);
/// A link whose client was told to leave is closed by the client, which knows when it has all of its answers. One that
/// is silent for this long, without a request, is closed from here.
const GRACE: Duration = Duration::from_secs(1);

/// One worker's way to its UDP socket, which may come later than everything else: while another process that is being
/// replaced still has links on the address, sockets of ours would be dealt some of their packets.
#[derive(Debug)]
pub struct Links {
    /// Its socket.
    pub socket: mpsc::Receiver<UdpSocket>,
    /// How the services of this node are, for callers.
    pub health: Option<watch::Receiver<Arc<Reports>>>,
    /// The same for all workers of a proxy; each lets go of it when its last link has ended. Their sockets share an
    /// address, and were one closed, the kernel would deal all packets out anew: those of others' links as well.
    pub linked: Arc<()>,
}

impl Links {
    /// Accepts links and serves them until nothing more is to be taken; then refuses others until the last link of all
    /// workers has ended.
    ///
    /// # Errors
    ///
    /// If the socket can't be registered with this worker's runtime.
    pub async fn run(mut self, worker: Rc<Worker>, mut taking: watch::Receiver<Taking>) -> io::Result<()> {
        let Some(identity) = worker.identity.clone() else {
            return Ok(());
        };
        let socket = tokio::select! {
            _ = ended(&mut taking) => return Ok(()),
            socket = self.socket.recv() => socket,
        };
        let Some(socket) = socket else { return Ok(()) };
        let server = Server::new(socket, identity, self.health, Congestion::default())?;
        let open = Rc::<()>::default();
        loop {
            tokio::select! {
                biased;
                _ = ended(&mut taking) => break,
                arriving = server.accept() => match arriving {
                    Some(arriving) => start(arriving, &worker, Rc::clone(&open)),
                    None => break,
                },
            }
        }
        // Then the sockets are closed: a successor waits for the address.
        outlast(
            (open, self.linked),
            async || server.accept().await,
            Arriving::refuse,
            || true,
        )
        .await;
        server.close().await;
        Ok(())
    }
}

/// Whoever comes now is told at once to go elsewhere, for as long as any worker has connections, and no longer than `waits`
/// says. Of `open` each connection of this worker has one; of `linked` each worker that has connections.
pub(crate) async fn outlast<A>(
    (open, linked): (Rc<()>, Arc<()>),
    accept: impl AsyncFn() -> Option<A>,
    refuse: impl Fn(A),
    waits: impl Fn() -> bool,
) {
    let anybody = Arc::downgrade(&linked);
    let mut linked = Some(linked);
    while waits() {
        if Rc::strong_count(&open) == 1 {
            linked = None;
        }
        if linked.is_none() && anybody.strong_count() == 0 {
            break;
        }
        tokio::select! {
            Some(arriving) = accept() => refuse(arriving),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

fn start(arriving: Arriving, worker: &Rc<Worker>, open: Rc<()>) {
    if worker.is_draining() {
        // A new link would be asked to leave at once.
        return arriving.refuse();
    }
    if worker.busy() >= MAX_CONNECTIONS {
        worker.recorder.connection_refused();
        return;
    }
    let held = Connections::hold(worker);
    let worker = Rc::clone(worker);
    // Its owner is the worker, which counts it, waits for it when draining, and ends with its runtime.
    tokio::task::spawn_local(async move {
        let _held = (held, open);
        match arriving.handshake().await {
            Ok(link) => serve_link(link, worker).await,
            Err(error @ (AcceptError::Peer { .. } | AcceptError::Role { .. })) => {
                tracing::warn!(%error, "a link was refused");
            }
            Err(error) => tracing::debug!(%error, "a link was not made"),
        }
    });
}

/// Serves a link to its end.
async fn serve_link(link: ServerLink, worker: Rc<Worker>) {
    let entered = Connections::enter(&worker);
    let peer = Peer {
        address: link.peer().address,
        identity: Some(link.peer().id.to_string().into()),
    };
    let connection = Rc::clone(&entered.connection);
    connection.lasts(link.lasts(), worker.now());
    let client = Rc::new(Client::new(Direction::Inbound, peer, connection));
    // The handshake may have begun before the drain did.
    let mut leaving = worker.is_draining();
    if leaving {
        link.go_away();
    }
    let mut silent = pin!(link.silent_for(GRACE));
    loop {
        tokio::select! {
            biased;
            exchange = link.accept() => {
                let Some(exchange) = exchange else { return };
                // Its owner is the link, which it keeps open, and which ends it. In a box, since what is spawned is moved whole,
                // several times.
                tokio::task::spawn_local(Box::pin(serve_one(exchange, Rc::clone(&worker), Rc::clone(&client))));
            }
            () = entered.connection.close.notified() => {
                if entered.connection.is_over() {
                    return link.end();
                }
                // As in HTTP/2, nothing is lost: what was sent before the client knew is still served.
                link.go_away();
                leaving = true;
            }
            () = silent.as_mut(), if leaving => return,
        }
    }
}

async fn serve_one(exchange: Exchange, worker: Rc<Worker>, client: Rc<Client>) {
    let (request, responder) = match exchange.read().await {
        Ok(read) => read,
        Err(error) => {
            tracing::debug!(peer = %client.peer.address, %error, "a request was not read");
            return;
        }
    };
    let request = request.map(|body| IncomingBody::Zone(Box::new(body)));
    let made = {
        let mut answer = pin!(serve(worker, Rc::clone(&client), request));
        responder.unless_stopped(answer.as_mut()).await
    };
    let answered = match made {
        Ok(Ok(answer)) => responder.respond(answer).await,
        Ok(Err(never)) => match never {},
        Err(stopped) => Err(stopped),
    };
    if let Err(error) = answered {
        tracing::debug!(peer = %client.peer.address, %error, "an answer was not sent whole");
    }
}

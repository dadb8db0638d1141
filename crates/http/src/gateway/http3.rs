//! HTTP/3: requests of clients from outside, each on a stream of its own.

use super::Edge;
use super::doors::{Counted, Door};
use crate::connection::Client;
use crate::links::outlast;
use crate::listener::{MAX_CONNECTIONS, Taking, ended};
use crate::serve::serve as serve_request;
use crate::worker::{Connections, Entered, Worker};
use leeward_h3::{Arriving, Connection, Exchange, Limits, Server};
use leeward_telemetry::{Direction, Peer};
use leeward_upstream::IncomingBody;
use std::io;
use std::net::UdpSocket;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// A client that was told to leave closes its connection when it has its answers. One that is silent for this long, without
/// a request, is closed from here.
const GRACE: Duration = Duration::from_secs(1);
/// One that isn't silent may still send requests for this long; then it is closed as soon as none is under way.
const LEAVE_WITHIN: Duration = Duration::from_secs(30);
/// How long a port that policy has no more is kept for connections that are yet to end: meanwhile nobody can listen there anew.
const KEEP_PORT: Duration = Duration::from_secs(300);

/// Accepts connections and serves them until nothing more is to be taken; then refuses others until the last connection of
/// all workers has ended.
pub(super) async fn serve(
    door: Arc<Door>,
    socket: UdpSocket,
    linked: Arc<()>,
    worker: Rc<Worker>,
    mut taking: watch::Receiver<Taking>,
) -> io::Result<()> {
    let server = {
        let settings = door.settings();
        let tls = settings.tls().and_then(|tls| tls.http3());
        Server::new(socket, tls.ok_or_else(|| io::Error::other("no TLS for it"))?)?
    };
    let open = Rc::<()>::default();
    loop {
        tokio::select! {
            biased;
            _ = ended(&mut taking) => break,
            arriving = server.accept() => match arriving {
                Some(arriving) => start(arriving, &door, &worker, Rc::clone(&open)),
                None => break,
            },
        }
    }
    // The worker waits until the last packets are sent.
    let _held = Connections::hold(&worker);
    worker.leave_udp(door.address);
    let until = tokio::time::Instant::now() + KEEP_PORT;
    // A drain has its own limit.
    let waits = || worker.is_draining() || tokio::time::Instant::now() < until;
    outlast(
        (open, linked),
        async || server.accept().await,
        Arriving::refuse,
        waits,
    )
    .await;
    server.close().await;
    Ok(())
}

fn start(arriving: Arriving, door: &Arc<Door>, worker: &Rc<Worker>, open: Rc<()>) {
    if worker.is_draining() {
        // It would be asked to leave at once.
        return arriving.refuse();
    }
    let counted = if worker.busy() < MAX_CONNECTIONS {
        door.count()
    } else {
        None
    };
    let Some(counted) = counted else {
        worker.recorder.connection_refused();
        return arriving.refuse();
    };
    let held = (Connections::hold(worker), open);
    let entered = Connections::enter(worker);
    // Before the handshake: what the door is told in the meantime is for this connection, too.
    let settings = door.settings();
    entered.connection.speaks_http3();
    entered.connection.came_by(door, settings.idle, settings.of_many);
    // Its owner is the worker, which counts it, waits for it when draining, and ends with its runtime.
    tokio::task::spawn_local(async move {
        let _held = held;
        let peer = arriving.peer();
        if let Err(error) = Box::pin(serve_connection(arriving, counted, entered)).await {
            tracing::debug!(%peer, %error, "client connection ended");
        }
    });
}

async fn serve_connection(arriving: Arriving, place: Counted, entered: Entered) -> io::Result<()> {
    let (door, worker) = (Arc::clone(place.door()), Rc::clone(&entered.worker));
    let settings = door.settings();
    let none = || io::Error::other("there is no certificate");
    let tls = settings.tls().ok_or_else(none)?;
    let config = tls.http3().ok_or_else(none)?;
    let limits = Limits {
        head: settings.head,
        handshake: settings.handshake_timeout(),
    };
    let handshake = async { arriving.handshake(config, limits).await.map_err(io::Error::other) };
    let connection = Box::pin(entered.unless_closed(handshake)).await?;
    let host = connection.server_name().map(|host| host.to_ascii_lowercase());
    let (listener, secure) = tls.listener(host.as_deref(), true).ok_or_else(none)?;
    entered.connection.came_by(&door, listener.idle, listener.of_many);
    let peer = Peer {
        address: connection.peer(),
        identity: None,
    };
    let client = Rc::new(Client {
        edge: Some(Edge {
            door: Arc::clone(&door),
            secure: Some(secure),
            http3: true,
            _place: place,
        }),
        ..Client::new(Direction::Ingress, peer, Rc::clone(&entered.connection))
    });
    drop(settings);
    serve_requests(connection, &client, &worker).await;
    Ok(())
}

/// Serves a connection to its end.
async fn serve_requests(mut connection: Connection, client: &Rc<Client>, worker: &Rc<Worker>) {
    // The handshake may have begun before the drain did.
    let mut leaving = worker.is_draining() || client.connection.is_leaving();
    let mut silent = pin!(connection.silent_for(GRACE, LEAVE_WITHIN));
    // Its time begins when it is first asked for.
    let mut late = pin!(async { tokio::time::sleep(LEAVE_WITHIN).await });
    let mut accepting = true;
    loop {
        tokio::select! {
            biased;
            () = client.connection.close.notified() => {
                if client.connection.is_abusive() {
                    // It needn't listen to GOAWAY.
                    return connection.cut();
                }
                leaving = true;
            }
            () = late.as_mut(), if leaving && accepting => accepting = false,
            exchange = connection.accept(), if accepting => {
                let Some(exchange) = exchange else { return };
                // Its owner is the connection, which ends it.
                tokio::task::spawn_local(serve_one(exchange, Rc::clone(worker), Rc::clone(client)));
            }
            () = silent.as_mut(), if leaving => return,
        }
        if leaving {
            // As in HTTP/2, nothing is lost: what was sent before the client knew is still served.
            connection.go_away().await;
        }
    }
}

async fn serve_one(exchange: Exchange, worker: Rc<Worker>, client: Rc<Client>) {
    let (request, mut responder) = match exchange.read().await {
        Ok(read) => read,
        Err(error) => {
            tracing::debug!(peer = %client.peer.address, %error, "a request was not read");
            // It has cost something all the same.
            return client.connection.gave_up();
        }
    };
    let request = request.map(|body| IncomingBody::Http3(Box::new(body)));
    let mut answer = pin!(serve_request(worker, Rc::clone(&client), request));
    let answered = match responder.unless_stopped(answer.as_mut()).await {
        Ok(Ok(answer)) => responder.respond(answer).await,
        Ok(Err(never)) => match never {},
        Err(stopped) => Err(stopped),
    };
    if let Err(error) = answered {
        tracing::debug!(peer = %client.peer.address, %error, "an answer was not sent whole");
    }
}

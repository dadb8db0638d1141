//! Captured: connections that their clients meant for somewhere else.
//!
//! A workload knows nothing of the mesh; the kernel brings its connections here (`leeward capture`), and remembers where
//! they were to go. If that is an address of a service, policy has said what it speaks. Else the first bytes tell, and a
//! server's name in TLS, for as long as policy gives them.

use crate::connection::{Bounds, Client, Looks, SNIFF_TIMEOUT, Speaks, serve_connection, sniff};
use crate::detect::{LOOK_AT, Shows, look};
use crate::passed::Original;
use crate::tcp::{Arrived, serve_tcp, serve_unknown};
use crate::worker::Entered;
use leeward_policy::canonical;
use leeward_policy::model::Protocol;
use leeward_telemetry::{Direction, Peer};
use leeward_upstream::reset;
use socket2::SockRef;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::TcpStream;

/// How connections come to a listener.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Meant {
    /// For somewhere else; the kernel knows where.
    Elsewhere,
    /// For here: this address is a service's.
    Here,
}

/// Serves a connection to its end.
pub(crate) async fn serve_captured(
    entered: Entered,
    stream: TcpStream,
    address: SocketAddr,
    meant: Meant,
) -> io::Result<()> {
    let worker = &entered.worker;
    let here = canonical(stream.local_addr()?);
    let refused = || {
        worker.recorder.captured("refused");
        reset(&stream);
        Ok(())
    };
    let destination = match meant {
        Meant::Here => here,
        Meant::Elsewhere => match original(&stream, here) {
            // From this process itself, it would come back once more from wherever it is sent.
            Some(to) if !worker.upstreams.is_own(address, to) => to,
            Some(to) => {
                tracing::warn!(%to, "a connection of this proxy's own was captured, and is refused; see --proxy-uid of leeward capture");
                return refused();
            }
            None => {
                tracing::debug!(%address, "a connection to the capture listener itself is refused");
                return refused();
            }
        },
    };
    let may_pass = meant == Meant::Elsewhere;
    let snapshot = worker.pin();
    let peer = Peer {
        address,
        identity: None,
    };
    if let Some(service) = snapshot.service_at(destination)
        && let Some(view) = snapshot.service(service)
    {
        if view.spec.protocol == Protocol::Tcp {
            worker.recorder.captured("tcp");
            let arrived = Arrived {
                entered,
                stream,
                peer,
                destination,
                server_name: None,
            };
            serve_tcp(arrived, snapshot, service).await;
            return Ok(());
        }
        let speaks = entered.unless_closed(sniff(&stream, SNIFF_TIMEOUT)).await?;
        return serve_http(entered, stream, peer, (destination, may_pass), speaks).await;
    }
    let limit = snapshot.capture().detect_timeout;
    let shown = entered.unless_closed(detect(&stream, limit)).await?;
    let (taken_for, server_name) = match shown {
        Shown::Silent => ("silent", None),
        Shown::Said(Shows::Http1) => {
            return serve_http(entered, stream, peer, (destination, may_pass), Speaks::Http1).await;
        }
        Shown::Said(Shows::Http2) => {
            return serve_http(entered, stream, peer, (destination, may_pass), Speaks::Http2).await;
        }
        Shown::Said(Shows::Tls(name)) => ("tls", name),
        Shown::Said(Shows::Bytes | Shows::More) => ("tcp", None),
    };
    entered.worker.recorder.captured(taken_for);
    let called = server_name
        .as_deref()
        .and_then(|name| snapshot.service_called(name));
    let arrived = Arrived {
        entered,
        stream,
        peer,
        destination,
        server_name,
    };
    match called {
        Some(service) => serve_tcp(arrived, snapshot, service).await,
        None => serve_unknown(arrived, snapshot, may_pass).await,
    }
    Ok(())
}

async fn serve_http(
    entered: Entered,
    stream: TcpStream,
    peer: Peer,
    (destination, may_pass): (SocketAddr, bool),
    speaks: Speaks,
) -> io::Result<()> {
    entered.worker.recorder.captured(match speaks {
        Speaks::Http1 => "http1",
        Speaks::Http2 => "h2",
    });
    let client = Client {
        original: Some(Original::new(destination, may_pass)),
        ..Client::new(Direction::Outbound, peer, Rc::clone(&entered.connection))
    };
    serve_connection(entered, client, stream, speaks, Bounds::MESH).await;
    Ok(())
}

/// What a connection has shown in time.
enum Shown {
    Said(Shows),
    /// Nothing, or nothing that can be told from other things; also one whose client has ended it already, which may only
    /// want to hear.
    Silent,
}

/// Looks at the first bytes, and leaves them where they are.
async fn detect(stream: &TcpStream, limit: Duration) -> io::Result<Shown> {
    let looking = async {
        let mut buffer = vec![0; LOOK_AT];
        let (mut seen, mut looks) = (0, Looks::default());
        loop {
            let n = stream.peek(&mut buffer).await?;
            if n == 0 {
                return Ok(Shown::Silent);
            }
            if n > seen {
                match look(buffer.get(..n).unwrap_or_default()) {
                    Shows::More => {}
                    shows @ (Shows::Http1 | Shows::Http2 | Shows::Tls(_) | Shows::Bytes) => {
                        return Ok(Shown::Said(shows));
                    }
                }
                seen = n;
            }
            tokio::time::sleep(looks.pause(n)).await;
        }
    };
    tokio::time::timeout(limit, looking)
        .await
        .unwrap_or(Ok(Shown::Silent))
}

/// Where a connection was to go when the kernel brought it here; `None` if it was to come here.
fn original(stream: &TcpStream, here: SocketAddr) -> Option<SocketAddr> {
    let socket = SockRef::from(stream);
    let known = if here.is_ipv4() {
        socket.original_dst_v4()
    } else {
        socket.original_dst_v6()
    };
    let to = canonical(known.ok()?.as_socket()?);
    (to != here).then_some(to)
}

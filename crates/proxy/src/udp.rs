//! The UDP sockets for links, on the port that other proxies come to by TCP.
//!
//! They are bound beside the TCP ones at the start, and by a successor only when its predecessor has let go of its own:
//! sockets that share an address are dealt packets by the senders' addresses, so that ours would get some of those that
//! belong to the predecessor's links. Until then the predecessor goes on with its links, asks their clients to leave,
//! and refuses new ones at once, so that those come by TCP, to the successor.

use leeward_zone::Reports;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// How often a successor looks whether the address is free.
const LOOK: Duration = Duration::from_millis(200);

/// The way of the sockets to the workers.
#[derive(Debug)]
pub(crate) struct Sockets {
    address: Option<SocketAddr>,
    bound: Option<Vec<UdpSocket>>,
    ways: Vec<mpsc::Sender<UdpSocket>>,
}

/// Ways for `workers` workers; `address` is where links are accepted, if they are. The sockets are bound at once if
/// nobody else has the address.
pub(crate) fn ways(
    address: Option<SocketAddr>,
    workers: usize,
    health: &watch::Receiver<Arc<Reports>>,
) -> (Sockets, Vec<leeward_http::Links>) {
    let linked = Arc::new(());
    let (ways, links) = (0..workers)
        .map(|_| {
            let (way, socket) = mpsc::channel(1);
            let links = leeward_http::Links {
                socket,
                health: Some(health.clone()),
                linked: Arc::clone(&linked),
            };
            (way, links)
        })
        .unzip();
    let bound = address.and_then(|address| bind_alone(address, workers).ok());
    let sockets = Sockets { address, bound, ways };
    (sockets, links)
}

impl Sockets {
    /// Sends the sockets on their way, now or as soon as nobody else has the address.
    pub(crate) async fn send(self) {
        let Some(address) = self.address else { return };
        let sockets = match self.bound {
            Some(sockets) => sockets,
            None => bind_later(address, self.ways.len()).await,
        };
        tracing::info!(%address, "listening for links by QUIC");
        for (way, socket) in self.ways.into_iter().zip(sockets) {
            // A worker that is gone needs none.
            drop(way.send(socket).await);
        }
    }
}

async fn bind_later(address: SocketAddr, workers: usize) -> Vec<UdpSocket> {
    let mut told = false;
    loop {
        match bind_alone(address, workers) {
            Ok(sockets) => return sockets,
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::info!(%address, %error, "UDP not bound yet; other proxies come by TCP until it is");
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Binds sockets that share an address, if nobody else has it.
pub(crate) fn bind_alone(address: SocketAddr, workers: usize) -> io::Result<Vec<UdpSocket>> {
    // One that doesn't share can be bound only if there is no other; whoever comes in between is one of ours too.
    drop(UdpSocket::bind(address)?);
    leeward_zone::bind(address, workers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_somebody_has_is_waited_for() {
        let health = watch::channel(Arc::default()).1;
        let (first, mut links) = ways(Some(([127, 0, 0, 1], 0).into()), 2, &health);
        let sockets = first.bound.as_ref().unwrap();
        let address = sockets[0].local_addr().unwrap();
        assert_eq!(sockets[1].local_addr().unwrap(), address, "they share it");
        let (second, mut later) = ways(Some(address), 1, &health);
        assert!(second.bound.is_none());
        first.send().await;
        let taken: Vec<_> = links
            .iter_mut()
            .map(|links| links.socket.try_recv().unwrap())
            .collect();
        let sending = tokio::spawn(second.send());
        tokio::time::sleep(LOOK * 2).await;
        assert!(later[0].socket.try_recv().is_err());
        drop(taken);
        assert!(later[0].socket.recv().await.is_some());
        sending.await.unwrap();
    }
}

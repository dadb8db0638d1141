//! A way to a proxy that passes TCP, UDP or both, and loses packets when it is told to.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Stands between two proxies. What passes ends when it is dropped.
#[derive(Debug)]
pub struct Way {
    /// Where it is.
    pub at: SocketAddr,
    to: SocketAddr,
    tasks: JoinSet<()>,
    path: Arc<Path>,
}

/// What becomes of UDP packets.
#[derive(Debug)]
struct Path {
    /// To who sends them on, one after the other, so that none overtakes another.
    under_way: mpsc::Sender<Packet>,
    /// Each so many-th of a direction is lost; 0: none.
    lost_one_in: AtomicU64,
    /// Those that have come from clients, and those for them.
    there: AtomicU64,
    back: AtomicU64,
    /// How long each takes, in milliseconds.
    delay: AtomicU64,
}

/// One on its way.
#[derive(Debug)]
struct Packet {
    due: Instant,
    by: Arc<UdpSocket>,
    bytes: Vec<u8>,
    to: SocketAddr,
}

/// Packets that may be under way; more are lost.
const ROOM: usize = 4096;

impl Way {
    /// One that passes TCP.
    ///
    /// # Errors
    ///
    /// If there is no port.
    pub async fn tcp_only(to: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let mut way = Self::nowhere(listener.local_addr()?, to);
        way.tasks.spawn(async move {
            let mut passing = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                passing.spawn(async move {
                    if let Ok(mut server) = TcpStream::connect(to).await {
                        // What breaks one side off ends both.
                        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                    }
                });
            }
        });
        Ok(way)
    }

    /// One that passes UDP at an address, where TCP does whatever it does.
    ///
    /// # Errors
    ///
    /// If the address is in use.
    pub async fn udp_at(at: SocketAddr, to: SocketAddr) -> anyhow::Result<Self> {
        let mut way = Self::nowhere(at, to);
        way.open_udp().await?;
        Ok(way)
    }

    fn nowhere(at: SocketAddr, to: SocketAddr) -> Self {
        let (under_way, mut coming) = mpsc::channel::<Packet>(ROOM);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Some(packet) = coming.recv().await {
                tokio::time::sleep_until(packet.due).await;
                // What isn't taken is lost, as on any path.
                let _ = packet.by.send_to(&packet.bytes, packet.to).await;
            }
        });
        let path = Path {
            under_way,
            lost_one_in: AtomicU64::new(0),
            there: AtomicU64::new(0),
            back: AtomicU64::new(0),
            delay: AtomicU64::new(0),
        };
        Self {
            at,
            to,
            tasks,
            path: Arc::new(path),
        }
    }

    /// Lets UDP pass as well.
    ///
    /// # Errors
    ///
    /// If the port is in use.
    pub async fn open_udp(&mut self) -> anyhow::Result<()> {
        let front = Arc::new(UdpSocket::bind(self.at).await?);
        let (to, path) = (self.to, Arc::clone(&self.path));
        self.tasks.spawn(async move {
            // One socket for each client, since that is how its answers find back.
            let mut clients: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
            let mut answers = JoinSet::new();
            let mut packet = vec![0; 65_536];
            while let Ok((n, from)) = front.recv_from(&mut packet).await {
                let back = match clients.get(&from) {
                    Some(back) => Arc::clone(back),
                    None => {
                        let Ok(back) = UdpSocket::bind("127.0.0.1:0").await.map(Arc::new) else {
                            return;
                        };
                        clients.insert(from, Arc::clone(&back));
                        let path = Arc::clone(&path);
                        answers.spawn(pass_back(Arc::clone(&back), Arc::clone(&front), from, path));
                        back
                    }
                };
                path.pass(&path.there, &back, packet.get(..n).unwrap_or_default(), to);
            }
        });
        Ok(())
    }

    /// From now on every so many-th packet of UDP is lost, of each direction by itself, and each takes so long; 0 for none.
    pub fn disturb(&self, lost_one_in: u64, delay: Duration) {
        self.path.lost_one_in.store(lost_one_in, Ordering::Relaxed);
        let millis = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.path.delay.store(millis, Ordering::Relaxed);
    }
}

impl Path {
    fn pass(&self, passed: &AtomicU64, by: &Arc<UdpSocket>, bytes: &[u8], to: SocketAddr) {
        let (one_in, nth) = (
            self.lost_one_in.load(Ordering::Relaxed),
            // The first ones pass: without them there is no link.
            passed.fetch_add(1, Ordering::Relaxed) + 1,
        );
        if nth.checked_rem(one_in) == Some(0) {
            return;
        }
        let delay = Duration::from_millis(self.delay.load(Ordering::Relaxed));
        let packet = Packet {
            due: Instant::now() + delay,
            by: Arc::clone(by),
            bytes: bytes.to_vec(),
            to,
        };
        // One too many is lost.
        let _ = self.under_way.try_send(packet);
    }
}

async fn pass_back(back: Arc<UdpSocket>, front: Arc<UdpSocket>, client: SocketAddr, path: Arc<Path>) {
    let mut packet = vec![0; 65_536];
    while let Ok((n, _)) = back.recv_from(&mut packet).await {
        let packet = packet.get(..n).unwrap_or_default();
        path.pass(&path.back, &front, packet, client);
    }
}

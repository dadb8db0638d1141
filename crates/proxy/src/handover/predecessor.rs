//! The old process: hands over what it has, and lets go of it when the new one serves.

use super::place::Place;
use super::wire::{Broken, Channel, MAX_LEVELS, MAX_SOCKETS, Message, Of, Offer, VERSION};
use crate::degrade::{Degradation, Handed};
use crate::drain::Heir;
use crate::gateways::Gateways;
use leeward_config::{Live, StateDir};
use leeward_http::{Port, Role};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

/// Everything that a successor gets. Dropping it closes this process's copies, which the workers' own don't
/// need.
#[derive(Debug)]
pub(crate) struct Estate {
    /// Where it is asked for.
    pub(crate) place: Place,
    /// The sockets for requests.
    pub(crate) ports: Vec<Port>,
    /// The admin listener.
    pub(crate) admin: TcpListener,
    /// The listener for feature flags, if there is one.
    pub(crate) ofrep: Option<TcpListener>,
    /// The socket for the node's workloads, if there is one.
    pub(crate) workloads: Option<UnixListener>,
    /// The sockets for clients from outside.
    pub(crate) gateways: Arc<Gateways>,
    /// The policy that a successor must match.
    pub(crate) live: Live,
    /// The levels that a successor goes on from.
    pub(crate) degradation: Degradation,
    /// Where policy is kept, if it is: a successor begins with what is there.
    pub(crate) state: Option<StateDir>,
    /// How long a successor may take to be ready.
    pub(crate) limit: Duration,
}

/// The estate while it waits for a successor.
#[derive(Debug)]
pub(crate) struct Succession {
    task: JoinHandle<Heir>,
    /// Whether a successor has the sockets and isn't ready yet.
    under_way: watch::Receiver<bool>,
    stop: CancellationToken,
}

/// How long it may take to bring to disk what a successor begins with. Without it that one asks a control plane.
const FLUSH: Duration = Duration::from_secs(2);
/// How long a successor may take to say hello.
const GREETING: Duration = Duration::from_secs(5);
/// Further successors that are being told that they are too many; past that they are told nothing.
const MAX_TURNED_AWAY: usize = 8;
/// Pause after a failure to accept, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why nothing was handed over; this process goes on.
#[derive(Debug, thiserror::Error)]
enum Kept {
    #[error("the other process may not have the sockets: {0}")]
    Stranger(std::io::Error),
    #[error("it did not say hello within {GREETING:?}")]
    Mute,
    #[error("it began with something else than hello: {0}")]
    Rude(String),
    #[error("it hands over by version {theirs} of the protocol, and this build by {VERSION}")]
    Version { theirs: u32 },
    #[error("it was not ready within {0:?}")]
    Late(Duration),
    #[error("it ended before it was ready")]
    Gone,
    #[error("this process was told to end and can't wait any longer")]
    Ending,
    #[error(transparent)]
    Broken(Broken),
}

impl From<Broken> for Kept {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Closed => Self::Gone,
            Broken::Io(_) | Broken::Nonsense(_) => Self::Broken(broken),
        }
    }
}

impl Estate {
    /// Waits for a successor from now on.
    pub(crate) fn wait(self) -> Succession {
        let (under_way, seen) = watch::channel(false);
        let stop = CancellationToken::new();
        Succession {
            task: tokio::spawn(self.pass_on(under_way, stop.clone())),
            under_way: seen,
            stop,
        }
    }

    /// Returns when a successor has taken over, or when this process is to end.
    async fn pass_on(self, under_way: watch::Sender<bool>, stop: CancellationToken) -> Heir {
        let mut turned_away = JoinSet::new();
        loop {
            let asked = tokio::select! {
                biased;
                () = stop.cancelled() => return Heir::Nobody,
                asked = self.place.accept() => asked,
            };
            let channel = match asked {
                Ok(channel) => channel,
                Err(error) => {
                    tracing::warn!(%error, "can't accept a successor");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            under_way.send_replace(true);
            let handed = tokio::select! {
                handed = self.hand_over(channel, &stop) => handed,
                never = self.turn_away(&mut turned_away) => match never {},
            };
            match handed {
                Ok(pid) => {
                    tracing::info!(successor = pid, "a new process has taken over");
                    return Heir::Successor;
                }
                Err(why) => {
                    tracing::warn!(reason = %why, "a new process did not take over; this one goes on");
                }
            }
            under_way.send_replace(false);
        }
    }

    /// Tells every further successor that one is being served.
    async fn turn_away(&self, turned_away: &mut JoinSet<()>) -> std::convert::Infallible {
        loop {
            tokio::select! {
                channel = self.place.accept() => match channel {
                    Ok(channel) if turned_away.len() < MAX_TURNED_AWAY => {
                        turned_away.spawn(refuse_another(channel));
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!(%error, "can't accept a successor");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = turned_away.join_next() => {}
            }
        }
    }

    async fn hand_over(&self, channel: Channel, stop: &CancellationToken) -> Result<u32, Kept> {
        channel.check_peer().map_err(Kept::Stranger)?;
        let handed = tokio::select! {
            handed = tokio::time::timeout(self.limit, self.offer(&channel)) => {
                handed.unwrap_or(Err(Kept::Late(self.limit)))
            }
            () = stop.cancelled() => Err(Kept::Ending),
        };
        let refusal = match handed {
            Ok(pid) => match channel.send(&Message::Yours {}, &[]).await {
                Ok(()) => return Ok(pid),
                Err(broken) => return Err(broken.into()),
            },
            Err(refusal) => refusal,
        };
        // In words, never by closing alone: that is what a process does that dies, and whose sockets are then
        // the successor's. Whoever is gone doesn't hear it.
        let reason = refusal.to_string();
        drop(channel.send(&Message::Refused { reason }, &[]).await);
        Err(refusal)
    }

    /// Hands out the sockets, and waits until the successor serves.
    async fn offer(&self, channel: &Channel) -> Result<u32, Kept> {
        let pid = greet(channel).await?;
        tracing::info!(successor = pid, "a new process asks to take over");
        if let Some(state) = &self.state {
            state.flush(FLUSH).await;
        }
        let status = self.live.status();
        // A copy: policy may close a door meanwhile.
        let gateways = self.gateways.sockets().map_err(Broken::Io)?;
        let packets = self.packets(&gateways);
        let offer = Offer {
            version: VERSION,
            pid: std::process::id(),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            generation: status.generation,
            store_id: status.store_id,
            packets: packets.len(),
            levels: self.levels(),
        };
        channel.send(&Message::Offer(offer), &[]).await?;
        for (of, sockets) in packets {
            channel.send(&Message::Sockets(of), &sockets).await?;
        }
        tracing::info!(
            successor = pid,
            limit = ?self.limit,
            "sockets sent; this process serves until the new one is ready"
        );
        match channel.receive().await? {
            (Message::Ready {}, _) => Ok(pid),
            (other, _) => Err(Kept::Rude(format!("{other:?}"))),
        }
    }

    fn levels(&self) -> Vec<Handed> {
        let mut levels = self.degradation.hand_out(tokio::time::Instant::now().into_std());
        if levels.len() > MAX_LEVELS {
            tracing::warn!(
                levels = levels.len(),
                limit = MAX_LEVELS,
                "more levels of degradation than can be handed over; the others are judged anew"
            );
            levels.truncate(MAX_LEVELS);
        }
        levels
    }

    fn packets<'s>(&'s self, gateways: &'s [Port]) -> Vec<(Of, Vec<BorrowedFd<'s>>)> {
        let mut packets = vec![
            (Of::Place, vec![self.place.as_fd()]),
            (Of::Admin, vec![self.admin.as_fd()]),
        ];
        packets.extend(self.ofrep.iter().map(|ofrep| (Of::Ofrep, vec![ofrep.as_fd()])));
        let workloads = self.workloads.iter();
        packets.extend(workloads.map(|socket| (Of::Workloads, vec![socket.as_fd()])));
        for port in self.ports.iter().chain(gateways) {
            let of = match port.role {
                Role::Outbound => Of::Outbound,
                Role::Inbound => Of::Inbound,
                Role::Capture => Of::Capture,
                Role::Tcp => Of::Tcp,
                Role::Gateway => Of::Gateway,
            };
            for sockets in port.sockets().chunks(MAX_SOCKETS) {
                packets.push((of, sockets.iter().map(AsFd::as_fd).collect()));
            }
        }
        packets
    }
}

impl Succession {
    /// Returns when a successor has taken over. Cancel-safe; not to be called again after it has returned.
    pub(crate) async fn taken_over(&mut self) {
        match (&mut self.task).await {
            Ok(Heir::Successor) => {}
            Ok(Heir::Nobody) | Err(_) => {
                // A panic, which was logged. Nobody can take over any more; nothing else is the matter.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Ends the wait for a successor, and closes the copies of the sockets. A successor that is on its way
    /// gets `limit` to take over: closing its sockets now would lose what waits in them. Returns whose the
    /// sockets are then.
    pub(crate) async fn close(mut self, limit: Duration) -> Heir {
        if *self.under_way.borrow() {
            tracing::info!(?limit, "a new process is on its way to take over; waiting for it");
            let decided = self.under_way.wait_for(|under_way| !under_way);
            // Too late is as good as no; the sender is gone when it has taken over.
            drop(tokio::time::timeout(limit, decided).await);
        }
        self.stop.cancel();
        // A panic was logged, and nobody has taken over.
        self.task.await.unwrap_or(Heir::Nobody)
    }
}

/// The process id that a successor says it has.
async fn greet(channel: &Channel) -> Result<u32, Kept> {
    let hello = tokio::time::timeout(GREETING, channel.receive()).await;
    match hello.map_err(|_| Kept::Mute)?? {
        (
            Message::Hello {
                version: VERSION,
                pid,
                ..
            },
            _,
        ) => Ok(pid),
        (Message::Hello { version, .. }, _) => Err(Kept::Version { theirs: version }),
        (other, _) => Err(Kept::Rude(format!("{other:?}"))),
    }
}

async fn refuse_another(channel: Channel) {
    if channel.check_peer().is_err() {
        return;
    }
    let reason = match greet(&channel).await {
        Ok(pid) => {
            tracing::warn!(
                successor = pid,
                "another process asks to take over while one is on its way; it is refused"
            );
            "another process is taking over already; try again when it is done".to_owned()
        }
        Err(why) => why.to_string(),
    };
    // Whoever is gone doesn't hear it.
    drop(channel.send(&Message::Refused { reason }, &[]).await);
}

#[cfg(test)]
mod tests {
    use super::super::place::Start;
    use super::*;
    use leeward_http::bind;
    use leeward_policy::{Name, Viewer};
    use leeward_testkit::TempDir;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    use std::net::{SocketAddr, TcpStream};
    use std::path::PathBuf;

    const LIMIT: Duration = Duration::from_secs(20);

    fn viewer() -> Viewer {
        Viewer {
            zone: Name::parse("a").unwrap(),
            proxy: Name::parse("a1").unwrap(),
        }
    }

    struct Bench {
        _dir: TempDir,
        path: PathBuf,
        address: SocketAddr,
        succession: Succession,
    }

    /// A process without policy that waits for a successor.
    async fn bench(limit: Duration) -> Bench {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("place");
        let Start::First(place) = Place::ask(&path, LIMIT).await.unwrap() else {
            panic!("there is nobody")
        };
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        // More than one packet holds.
        let port = bind(Role::Outbound, any, MAX_SOCKETS + 1).unwrap();
        let address = port.address;
        let estate = Estate {
            place,
            ports: vec![port],
            admin: TcpListener::bind(any).unwrap(),
            ofrep: Some(TcpListener::bind(any).unwrap()),
            workloads: Some(UnixListener::bind(dir.path().join("workloads")).unwrap()),
            gateways: Gateways::new(None),
            live: Live::new(viewer()),
            degradation: Degradation::default(),
            state: None,
            limit,
        };
        Bench {
            _dir: dir,
            path,
            address,
            succession: estate.wait(),
        }
    }

    impl Bench {
        fn connect(&self) -> Channel {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
            connect(&socket, &SocketAddrUnix::new(&self.path).unwrap()).unwrap();
            Channel::new(socket).unwrap()
        }

        /// Says something first, and returns why it is refused.
        async fn refuses(&self, first: &Message) -> String {
            let channel = self.connect();
            channel.send(first, &[]).await.unwrap();
            let (answer, _) = channel.receive().await.unwrap();
            let Message::Refused { reason } = answer else {
                panic!("{answer:?}")
            };
            reason
        }
    }

    fn hello(version: u32) -> Message {
        Message::Hello {
            version,
            pid: 1,
            build: "test".to_owned(),
        }
    }

    /// Whether anything waits to be accepted from any of these.
    fn accepts(port: &Port) -> bool {
        port.sockets().iter().any(|socket| socket.accept().is_ok())
    }

    #[tokio::test]
    async fn every_socket_is_handed_over_and_let_go_of() {
        let mut bench = bench(LIMIT).await;
        let Start::After(mut inheritance) = Place::ask(&bench.path, LIMIT).await.unwrap() else {
            panic!("there is somebody")
        };
        let elsewhere = SocketAddr::from(([127, 0, 0, 1], 1));
        assert!(inheritance.port(Role::Outbound, elsewhere).is_none());
        assert!(inheritance.port(Role::Inbound, bench.address).is_none());
        let port = inheritance.port(Role::Outbound, bench.address).unwrap();
        assert_eq!(port.sockets().len(), MAX_SOCKETS + 1);
        assert!(inheritance.ofrep(elsewhere).is_none());
        assert!(inheritance.ofrep(SocketAddr::from(([127, 0, 0, 1], 0))).is_some());
        assert!(inheritance.workloads(&bench.path).is_none());
        assert!(
            inheritance
                .workloads(&bench.path.with_file_name("workloads"))
                .is_some()
        );
        let taken = tokio::spawn(inheritance.take_over());
        bench.succession.taken_over().await;
        let place = taken.await.unwrap().unwrap();
        // The old one's copies are closed by now, and it is still listened.
        let _client = TcpStream::connect(bench.address).unwrap();
        assert!(accepts(&port));
        // Whoever asks next asks the new one.
        let asking = bench.connect();
        place.accept().await.unwrap();
        drop(asking);
    }

    #[tokio::test]
    async fn one_successor_of_this_version_that_says_hello() {
        let bench = bench(LIMIT).await;
        assert!(
            bench
                .refuses(&hello(VERSION + 1))
                .await
                .contains("by version 2 of the protocol")
        );
        assert!(
            bench
                .refuses(&Message::Ready {})
                .await
                .contains("something else than hello")
        );
        let first = bench.connect();
        first.send(&hello(VERSION), &[]).await.unwrap();
        assert!(matches!(first.receive().await.unwrap().0, Message::Offer(_)));
        assert!(
            bench
                .refuses(&hello(VERSION))
                .await
                .contains("is taking over already")
        );
        // When that one is gone the next may.
        drop(first);
        let next = Place::ask(&bench.path, LIMIT).await;
        // It may be heard before the old one has noticed.
        match next {
            Ok(Start::After(_)) => {}
            Ok(Start::First(_)) => panic!("there is somebody"),
            Err(error) => assert!(format!("{error:#}").contains("taking over already"), "{error:#}"),
        }
    }

    #[tokio::test]
    async fn a_successor_that_is_late_is_refused() {
        let bench = bench(Duration::from_millis(50)).await;
        let Start::After(mut inheritance) = Place::ask(&bench.path, LIMIT).await.unwrap() else {
            panic!("there is somebody")
        };
        let without_policy = Live::new(viewer());
        let late = inheritance
            .until_ready(&without_policy, &Degradation::default(), LIMIT)
            .await
            .unwrap_err();
        assert!(format!("{late:#}").contains("not ready within 50ms"), "{late:#}");
    }

    #[tokio::test]
    async fn a_process_that_ends_says_so_to_the_successor_on_its_way() {
        let bench = bench(LIMIT).await;
        let Start::After(inheritance) = Place::ask(&bench.path, LIMIT).await.unwrap() else {
            panic!("there is somebody")
        };
        let heir = bench.succession.close(Duration::from_millis(50)).await;
        assert_eq!(heir, Heir::Nobody);
        let error = inheritance.take_over().await.unwrap_err();
        assert!(format!("{error:#}").contains("told to end"), "{error:#}");
    }
}

//! The ways between the members of a cluster, which can be cut: one relay before each member's port for the others.
//!
//! A member that is cut off is neither reached by the others nor reaches them. Nothing is refused and nothing closed: bytes
//! just don't arrive any more, as when a switch dies. Connections that saw this are closed once it is healed.

use crate::port::Port;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The ways of a cluster. They end when this is dropped.
#[derive(Debug)]
pub(super) struct Ways {
    shared: Arc<Shared>,
    fronts: Vec<Port>,
    _relays: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    /// The process of each member that runs.
    pids: Mutex<Vec<Option<u32>>>,
    /// Members that are cut off.
    cut: watch::Sender<BTreeSet<usize>>,
}

impl Ways {
    /// A relay before each of these, which are where members listen for each other.
    pub(super) fn before(members: &[SocketAddr]) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            pids: Mutex::new(vec![None; members.len()]),
            cut: watch::Sender::default(),
        });
        let (mut fronts, mut relays) = (Vec::new(), JoinSet::new());
        for (to, &member) in members.iter().enumerate() {
            let front = Port::reserve()?;
            relays.spawn(relay(front.listen()?, to, member, Arc::clone(&shared)));
            fronts.push(front);
        }
        Ok(Self {
            shared,
            fronts,
            _relays: relays,
        })
    }

    /// Where the others find each member.
    pub(super) fn fronts(&self) -> Vec<SocketAddr> {
        self.fronts.iter().map(Port::address).collect()
    }

    /// Says which process is a member's.
    pub(super) fn runs(&self, member: usize, pid: u32) {
        let mut pids = self.shared.pids.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = pids.get_mut(member) {
            *place = Some(pid);
        }
    }

    pub(super) fn cut(&self, member: usize) {
        self.shared.cut.send_if_modified(|cut| cut.insert(member));
    }

    pub(super) fn heal(&self, member: usize) {
        self.shared.cut.send_if_modified(|cut| cut.remove(&member));
    }
}

impl Shared {
    /// Whose end of a connection has this port.
    fn owner(&self, address: SocketAddr) -> Option<usize> {
        let inode = inode(address.port())?;
        let pids = self.pids.lock().unwrap_or_else(PoisonError::into_inner).clone();
        pids.into_iter()
            .position(|pid| pid.is_some_and(|pid| has_socket(pid, &inode)))
    }

    /// Waits until one of two members is cut off, or until neither is.
    async fn until(&self, (from, to): (Option<usize>, usize), is_cut: bool) {
        let cuts = |cut: &BTreeSet<usize>| cut.contains(&to) || from.is_some_and(|from| cut.contains(&from));
        // The sender is in `self`.
        drop(self.cut.subscribe().wait_for(|cut| cuts(cut) == is_cut).await);
    }
}

async fn relay(listener: TcpListener, to: usize, member: SocketAddr, shared: Arc<Shared>) {
    let mut carried = JoinSet::new();
    while let Ok((stream, from)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        carried.spawn(async move {
            let ends = (shared.owner(from), to);
            carry(stream, member, ends, &shared).await;
        });
        while carried.try_join_next().is_some() {}
    }
}

async fn carry(mut from: TcpStream, member: SocketAddr, ends: (Option<usize>, usize), shared: &Shared) {
    // What comes while the way is cut waits, and is told of its end when there is somebody to tell.
    let passes = async {
        let mut to = TcpStream::connect(member).await?;
        copy_bidirectional(&mut from, &mut to).await
    };
    let mut passes = std::pin::pin!(passes);
    tokio::select! {
        biased;
        () = shared.until(ends, true) => {}
        _ = &mut passes => return,
    }
    // Neither read from nor closed: to both ends it is silence.
    shared.until(ends, false).await;
}

/// The inode of the socket that is this port's on the side that connected.
fn inode(port: u16) -> Option<String> {
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    let mut local = String::new();
    write!(local, "0100007F:{port:04X}").ok()?;
    table.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        (fields.nth(1) == Some(&*local)).then(|| fields.nth(7).map(str::to_owned))?
    })
}

fn has_socket(pid: u32, inode: &str) -> bool {
    let wanted = format!("socket:[{inode}]");
    let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    files
        .flatten()
        .any(|file| std::fs::read_link(file.path()).is_ok_and(|to| to.as_os_str() == wanted.as_str()))
}

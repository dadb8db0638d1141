//! Certificates for processes of this node, by the SPIFFE Workload API on a Unix socket.
//!
//! Who connects is attested ([`peer`]): the kernel says which process it is, and policy which workloads that is. For these
//! this proxy asks a control plane, with keys that it makes; what it gets it keeps in memory ([`stock`]), good for as long as a
//! process has a use for it ([`keep`]), and hands on to whoever is found to be it ([`desk`]), again whenever something changes.

mod desk;
mod keep;
mod peer;
mod places;
mod stock;

use crate::address::Control;
use crate::certificates::Renewal;
use crate::live::Live;
use crate::rota::Timing;
use desk::Refused;
use leeward_identity::{Identity, SpiffeId};
use leeward_policy::Name;
use places::Places;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;
use stock::Stock;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

/// The workloads of a node, and what they are given. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Workloads {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// The proxy's own.
    identity: Arc<Identity>,
    control: Control,
    live: Live,
    timing: Timing,
    stock: Arc<Stock>,
    connections: Arc<Places>,
    streams: Arc<Places>,
    counts: Counts,
}

/// What is counted.
#[derive(Debug, Default)]
struct Counts {
    asked: [AtomicU64; Renewal::ALL.len()],
    refused: [AtomicU64; Refused::WORDS.len()],
}

/// How many of what there were and are.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct WorkloadCounts {
    /// Certificates that are good.
    pub svids: usize,
    /// Calls of processes that are told of changes.
    pub streams: usize,
    /// Times that a control plane was asked, by what came of it.
    pub asked: Vec<(&'static str, u64)>,
    /// Calls of processes that were refused, or ended so, by the reason.
    pub refused: Vec<(&'static str, u64)>,
}

/// What is known of one workload.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct WorkloadStanding {
    /// Its name.
    pub name: Name,
    /// When its certificate ends; `None` if there is none that is good.
    pub not_after: Option<SystemTime>,
    /// Processes that are told of its next one.
    pub processes: usize,
    /// Why there was none when it was last asked for.
    pub failed: Option<String>,
}

/// Connections at once, and those of one user.
const CONNECTIONS: (usize, usize) = (1024, 256);
/// Calls that are told of changes, and those of one user.
const STREAMS: (usize, usize) = (1024, 256);

impl Workloads {
    /// Those of the node of the proxy that `identity` is of. Nothing is asked for before a process wants it.
    pub fn new(identity: Arc<Identity>, control: Control, live: Live, timing: Timing) -> Self {
        let shared = Shared {
            identity,
            control,
            live,
            timing,
            stock: Arc::default(),
            connections: Places::new(CONNECTIONS.0, CONNECTIONS.1),
            streams: Places::new(STREAMS.0, STREAMS.1),
            counts: Counts::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Keeps certificates good until dropped.
    pub async fn keep(self) {
        self.shared.keep().await;
    }

    /// Serves the processes that come, until stopped: then calls are ended, and it returns.
    pub async fn serve(self, listener: UnixListener, stop: CancellationToken) {
        desk::serve(self.shared, listener, stop).await;
    }

    /// How many of what there were and are.
    pub fn counts(&self, now: SystemTime) -> WorkloadCounts {
        let counts = &self.shared.counts;
        let of = |words: &[&'static str], cells: &[AtomicU64]| {
            let cells = cells.iter().map(|cell| cell.load(Ordering::Relaxed));
            words.iter().copied().zip(cells).collect()
        };
        WorkloadCounts {
            svids: self.shared.stock.good(now),
            streams: self.shared.streams.taken(),
            asked: of(&Renewal::ALL.map(Renewal::as_str), &counts.asked),
            refused: of(&Refused::WORDS, &counts.refused),
        }
    }

    /// What is known of each workload that a process has asked for.
    pub fn standing(&self, now: SystemTime) -> Vec<WorkloadStanding> {
        self.shared.stock.standing(now)
    }
}

impl Shared {
    /// The id of a workload of this node.
    fn id(&self, name: &Name) -> Result<SpiffeId, leeward_identity::InvalidSpiffeId> {
        let snapshot = self.live.snapshot().load();
        let domain = self.identity.id().trust_domain();
        SpiffeId::workload(domain, snapshot.viewer.zone.as_str(), name.as_str())
    }
}

impl Counts {
    fn asked(&self, renewal: Renewal) {
        if let Some(cell) = self.asked.get(renewal as usize) {
            cell.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn refused(&self, refused: &Refused) {
        if let Some(cell) = self.refused.get(refused.position()) {
            cell.fetch_add(1, Ordering::Relaxed);
        }
    }
}

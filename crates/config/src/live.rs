//! What is published, and what there is to say about it.

use arc_swap::{ArcSwap, ArcSwapOption};
use leeward_flags::FlagSet;
use leeward_policy::{Key, Levels, Quarantine, Snapshot, Viewer};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;

/// The policy in force, shared with the workers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Live {
    snapshot: Arc<ArcSwap<Snapshot>>,
    levels: Arc<ArcSwap<Levels>>,
    file_flags: Arc<ArcSwapOption<FlagSet>>,
    status: watch::Sender<Status>,
}

/// What there is to say about the policy in force.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// The store's revision that is live; `None` before the first.
    pub generation: Option<u64>,
    /// The store that it is a revision of, which tells whether two generations can be compared; empty for files.
    pub store_id: String,
    /// Whether a control plane is connected.
    pub connected: bool,
    /// When policy was last heard of.
    pub heard: Option<Instant>,
    /// What is refused, with what runs instead.
    pub quarantined: Vec<(Key, Quarantine)>,
    /// Resources that run here and that a full push did not mention.
    pub orphans: usize,
}

impl Live {
    /// An empty policy.
    pub fn new(viewer: Viewer) -> Self {
        Self {
            snapshot: Arc::new(ArcSwap::from_pointee(Snapshot::empty(viewer))),
            levels: Arc::default(),
            file_flags: Arc::default(),
            status: watch::Sender::new(Status::default()),
        }
    }

    /// Where requests read it.
    pub fn snapshot(&self) -> &Arc<ArcSwap<Snapshot>> {
        &self.snapshot
    }

    /// The levels of degradation that hold, which change apart from policy: they are what is seen, not what is
    /// wanted.
    pub fn levels(&self) -> &Arc<ArcSwap<Levels>> {
        &self.levels
    }

    /// The flags of the node's own file, if it has one; they go before policy's.
    pub fn file_flags(&self) -> &Arc<ArcSwapOption<FlagSet>> {
        &self.file_flags
    }

    /// What there is to say now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Tells of every change.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    pub(crate) fn publish(&self, mut snapshot: Snapshot) {
        // Only one task publishes.
        snapshot.sequence = self.snapshot.load().sequence + 1;
        self.snapshot.store(Arc::new(snapshot));
    }

    pub(crate) fn say(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }
}

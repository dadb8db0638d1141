//! What is published, and what there is to say about it.

use arc_swap::{ArcSwap, ArcSwapOption};
use leeward_flags::FlagSet;
use leeward_policy::{Key, Levels, Name, Quarantine, Snapshot, Viewer};
use leeward_proto::v1;
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
    control_levels: watch::Sender<Option<Arc<[ControlLevel]>>>,
    signals: watch::Sender<v1::Signals>,
    trust: watch::Sender<Option<Arc<v1::TrustBundle>>>,
    identity: watch::Sender<Option<v1::IdentityReport>>,
}

/// A level by a control plane's judgement.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ControlLevel {
    /// The policy's name.
    pub policy: Box<str>,
    /// The level's name.
    pub level: Box<str>,
    /// The trigger and what it saw, for people.
    pub why: Box<str>,
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
    /// Plugins that the first policy has, that aren't loaded yet, and without which requests are refused: until they are, or
    /// can't be, and for a while at most, it is better not to be asked.
    pub waits_for: Vec<Name>,
}

impl Live {
    /// An empty policy.
    pub fn new(viewer: Viewer) -> Self {
        Self {
            snapshot: Arc::new(ArcSwap::from_pointee(Snapshot::empty(viewer))),
            levels: Arc::default(),
            file_flags: Arc::default(),
            status: watch::Sender::new(Status::default()),
            control_levels: watch::Sender::new(None),
            signals: watch::Sender::default(),
            trust: watch::Sender::new(None),
            identity: watch::Sender::new(None),
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

    /// The levels of degradation that a control plane says hold here; a policy that is not among them is at its normal
    /// one. `None` while none is connected, and until one that is has
    /// said it.
    pub fn control_levels(&self) -> watch::Receiver<Option<Arc<[ControlLevel]>>> {
        self.control_levels.subscribe()
    }

    /// Tells the control plane what was seen of services. Lost while none is connected that has had the first ack, and
    /// when the next comes before it is sent.
    pub fn tell_signals(&self, signals: v1::Signals) {
        self.signals.send_replace(signals);
    }

    /// What there is to tell a control plane.
    pub(crate) fn signals(&self) -> watch::Receiver<v1::Signals> {
        self.signals.subscribe()
    }

    /// The roots that a control plane last said are to be trusted; `None` until one has.
    pub(crate) fn trust(&self) -> watch::Receiver<Option<Arc<v1::TrustBundle>>> {
        self.trust.subscribe()
    }

    pub(crate) fn say_trust(&self, bundle: v1::TrustBundle) {
        self.trust.send_replace(Some(Arc::new(bundle)));
    }

    /// What the proxy has to say of its own certificate; `None` until it is known.
    pub(crate) fn identity(&self) -> watch::Receiver<Option<v1::IdentityReport>> {
        self.identity.subscribe()
    }

    pub(crate) fn say_identity(&self, report: v1::IdentityReport) {
        self.identity.send_if_modified(|known| {
            let differs = known.as_ref() != Some(&report);
            *known = Some(report);
            differs
        });
    }

    pub(crate) fn say_levels(&self, levels: Option<Arc<[ControlLevel]>>) {
        self.control_levels.send_if_modified(|known| {
            let differs = *known != levels;
            *known = levels;
            differs
        });
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

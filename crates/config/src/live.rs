//! What is published, and what there is to say about it.

use arc_swap::{ArcSwap, ArcSwapOption};
use leeward_flags::FlagSet;
use leeward_policy::{Key, Levels, Name, Quarantine, Snapshot, Viewer};
use leeward_proto::v1;
use std::sync::Arc;
use std::time::{Duration, Instant};
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
    /// The rollout for which the control plane wants to know of requests; 0 for none.
    observed: watch::Sender<u64>,
    requests: watch::Sender<v1::RequestSignals>,
    trust: watch::Sender<Option<Arc<v1::TrustBundle>>>,
    identity: watch::Sender<Option<v1::IdentityReport>>,
    troubles: watch::Sender<Arc<[Trouble]>>,
}

/// What can't be done of a resource that is live, such as listening on a port that somebody else has.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Trouble {
    /// Which resource.
    pub key: Key,
    /// Which revision of it.
    pub revision: u64,
    /// What, with the field's path.
    pub reason: String,
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
    /// When the policy that is live was last known to be the newest; `None` before the first.
    pub heard: Option<Contact>,
    /// Where it is from.
    pub source: PolicySource,
    /// Policy from disk is live, and a control plane is being asked for a newer one: until then it is better not to be asked,
    /// if there is anybody else.
    pub asking_until: Option<Instant>,
    /// What is refused, with what runs instead.
    pub quarantined: Vec<(Key, Quarantine)>,
    /// Resources that run here and that a full push did not mention.
    pub orphans: usize,
    /// Plugins that the first policy has, that aren't loaded yet, and without which requests are refused: until they are, or
    /// can't be, and for a while at most, it is better not to be asked.
    pub waits_for: Vec<Name>,
}

/// The last time that somebody who knows said that policy is the newest. It counts on while the process runs, whatever the time
/// of day does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Contact {
    at: Instant,
    /// How long ago it was at that time.
    before: Duration,
}

/// Where the policy that is live is from.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum PolicySource {
    /// There is none.
    #[default]
    Nowhere,
    /// From this proxy's state on disk: no control plane has answered since it started.
    Disk,
    /// From a control plane, whether one is connected now or not.
    Control,
    /// From a directory of policy files.
    Files,
}

impl Contact {
    pub(crate) const fn now(at: Instant) -> Self {
        Self::ago(at, Duration::ZERO)
    }

    pub(crate) const fn ago(at: Instant, before: Duration) -> Self {
        Self { at, before }
    }

    /// How long ago it was.
    pub fn age(&self, now: Instant) -> Duration {
        self.before.saturating_add(now.saturating_duration_since(self.at))
    }
}

impl PolicySource {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::Nowhere, Self::Disk, Self::Control, Self::Files];

    /// The word used in metrics and reports.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nowhere => "none",
            Self::Disk => "disk",
            Self::Control => "control",
            Self::Files => "file",
        }
    }
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
            observed: watch::Sender::default(),
            requests: watch::Sender::default(),
            trust: watch::Sender::new(None),
            identity: watch::Sender::new(None),
            troubles: watch::Sender::new(Arc::default()),
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
        let mut status = self.status.borrow().clone();
        let troubles = self.troubles.borrow().clone();
        add_troubles(&mut status.quarantined, &troubles);
        status
    }

    /// Says all that can't be done of what is live; it is told as quarantined until it isn't said any more.
    pub fn say_troubles(&self, troubles: Vec<Trouble>) {
        self.troubles.send_if_modified(|known| {
            let differs = **known != *troubles;
            if differs {
                *known = troubles.into();
            }
            differs
        });
    }

    pub(crate) fn troubles(&self) -> watch::Receiver<Arc<[Trouble]>> {
        self.troubles.subscribe()
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

    /// The rollout for which a control plane wants to be told of requests; 0 while none does.
    pub fn observed(&self) -> watch::Receiver<u64> {
        self.observed.subscribe()
    }

    pub(crate) fn say_observed(&self, rollout: u64) {
        self.observed
            .send_if_modified(|known| std::mem::replace(known, rollout) != rollout);
    }

    /// Tells the control plane of requests, as it asked. Lost as [`Live::tell_signals`]' are.
    pub fn tell_requests(&self, requests: v1::RequestSignals) {
        self.requests.send_replace(requests);
    }

    /// What there is to tell of requests.
    pub(crate) fn requests(&self) -> watch::Receiver<v1::RequestSignals> {
        self.requests.subscribe()
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

    /// Makes a snapshot the one that requests read, and returns the one that was.
    pub(crate) fn publish(&self, mut snapshot: Snapshot) -> Arc<Snapshot> {
        // Only one task publishes.
        snapshot.sequence = self.snapshot.load().sequence + 1;
        self.snapshot.swap(Arc::new(snapshot))
    }

    pub(crate) fn say(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }
}

/// First pause between looks at whether a snapshot is still read; it doubles with each.
const FIRST_LOOK: Duration = Duration::from_millis(100);
/// Longest of them.
const LAST_LOOK: Duration = Duration::from_secs(10);

/// Keeps a snapshot until nobody reads it any more, so that it is dropped here: in a large mesh that takes milliseconds, which
/// would otherwise be those of the last request that has it.
pub(crate) async fn let_go(old: Arc<Snapshot>) {
    let mut pause = FIRST_LOOK;
    // Nobody can come to have it who hasn't.
    while Arc::strong_count(&old) > 1 {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_LOOK);
    }
}

/// Lists what can't be done beside what was refused; of a resource whose newer revision was refused, only that.
pub(crate) fn add_troubles(quarantined: &mut Vec<(Key, Quarantine)>, troubles: &[Trouble]) {
    for trouble in troubles {
        match quarantined.iter_mut().find(|(key, _)| *key == trouble.key) {
            None => {
                let quarantine = Quarantine {
                    revision: trouble.revision,
                    reason: trouble.reason.clone(),
                    running: Some(trouble.revision),
                };
                quarantined.push((trouble.key.clone(), quarantine));
            }
            Some((_, told)) if told.revision == trouble.revision => {
                told.reason.push_str("; ");
                told.reason.push_str(&trouble.reason);
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::Kind;

    #[test]
    fn what_cannot_be_done_is_told_beside_what_was_refused() {
        let name = |text: &str| Name::parse(text).unwrap();
        let live = Live::new(Viewer {
            zone: name("a"),
            proxy: name("a1"),
        });
        let trouble = |gateway: &str| Trouble {
            key: Key {
                kind: Kind::Gateway,
                name: name(gateway),
            },
            revision: 7,
            reason: "no".to_owned(),
        };
        let refused = Quarantine {
            revision: 8,
            reason: "bad".to_owned(),
            running: Some(7),
        };
        live.say(|status| status.quarantined = vec![(trouble("g").key, refused)]);
        live.say_troubles(vec![trouble("g"), trouble("h"), trouble("h")]);
        let told = live
            .status()
            .quarantined
            .into_iter()
            .map(|(_, q)| (q.revision, q.reason));
        assert_eq!(
            told.collect::<Vec<_>>(),
            [(8, "bad".to_owned()), (7, "no; no".to_owned())]
        );
        live.say_troubles(Vec::new());
        assert_eq!(live.status().quarantined.len(), 1);
    }
}

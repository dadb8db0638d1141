//! What is written down of rollouts: in the log, which revision goes out in steps and which one takes it back; and beside it how
//! far it is. The log goes first: a change is held back from the moment at which it is written, whatever is known beside it.

use super::keep;
use super::machine::Rollout;
use crate::kv::{KvError, Txn};
use crate::store::{Fence, Record, Store, StoreError};
use std::sync::Arc;
use tokio::sync::Mutex;

/// The label of a record that goes out in steps: the RolloutPolicy's name.
pub(crate) const ROLLOUT: &str = "rollout";
/// The label of a record that takes back what went out: its revision.
pub(crate) const TAKES_BACK: &str = "takes-back";
/// Where it is written how far the last rollout is.
pub(crate) const KEY: &str = "rollout/current";
/// What all keys of rollouts begin with.
pub(crate) const PREFIX: &str = "rollout/";
/// How far back the log is read for a rollout of which nothing else is known.
const LOOK_BACK: u64 = 1000;

/// What is written down. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    store: Store,
    tracker: Arc<Mutex<Tracker>>,
}

/// What the log says, up to a revision.
#[derive(Debug, Default)]
struct Tracker {
    at: Option<u64>,
    /// The last revision that went out in steps, and what was written after it.
    change: Option<Arc<Record>>,
    later: Arc<Vec<Record>>,
    /// The revision that took it back.
    taken_back: Option<Arc<Record>>,
}

/// The last rollout.
#[derive(Clone, Debug)]
pub(crate) struct Last {
    pub(crate) change: Arc<Record>,
    /// What was written since.
    pub(crate) later: Arc<Vec<Record>>,
    pub(crate) taken_back: Option<Arc<Record>>,
    /// How far it is; `None` before that was written down.
    pub(crate) rollout: Option<Rollout>,
}

/// All that is written down.
#[derive(Clone, Debug, Default)]
pub(crate) struct Page {
    /// The revision up to which the log is read.
    pub(crate) at: u64,
    pub(crate) last: Option<Last>,
    /// How far the last one was of which that was written down.
    pub(crate) kept: Option<Rollout>,
    /// Of the key that says how far it is, for who writes it; 0: it is not there.
    pub(crate) modified: u64,
}

impl Last {
    /// Whether it is still on its way.
    pub(crate) fn is_open(&self) -> bool {
        self.taken_back.is_none() && self.rollout.as_ref().is_none_or(Rollout::is_open)
    }
}

impl Page {
    /// The rollout that is under way.
    pub(crate) fn open(&self) -> Option<&Last> {
        self.last.as_ref().filter(|last| last.is_open())
    }
}

impl Ledger {
    pub(crate) fn new(store: Store) -> Self {
        Self {
            store,
            tracker: Arc::default(),
        }
    }

    /// Reads what is new.
    pub(crate) async fn read(&self) -> Result<Page, StoreError> {
        let mut tracker = self.tracker.lock().await;
        // How far it is comes before the log: of an older one nothing is believed of what the log has then.
        let entry = self.store.kv().get(KEY).await?;
        let modified = entry.as_ref().map_or(0, |entry| entry.modified);
        let kept = match &entry {
            Some(entry) => Some(keep::decode(&entry.value).map_err(StoreError::Damaged)?),
            None => None,
        };
        let head = self.store.revision();
        if tracker.at.is_none_or(|at| at > head) {
            // At the start, and where a store that was restored has gone back.
            let mut since = head.saturating_sub(LOOK_BACK);
            if let Some(kept) = kept.as_ref().filter(|kept| kept.is_open()) {
                since = since.min(kept.revision.saturating_sub(1));
            }
            *tracker = Tracker {
                at: Some(since.max(self.store.oldest().await?)),
                ..Tracker::default()
            };
        }
        while let Some(at) = tracker.at.filter(|at| *at < head) {
            // One that is forgotten was nothing that is under way.
            if let Some(record) = self.store.record(at + 1).await? {
                tracker.take(record, kept.as_ref());
            }
            tracker.at = Some(at + 1);
        }
        let last = tracker.change.as_ref().map(|change| Last {
            change: Arc::clone(change),
            later: Arc::clone(&tracker.later),
            taken_back: tracker.taken_back.clone(),
            rollout: kept.clone().filter(|kept| kept.revision == change.revision),
        });
        Ok(Page {
            at: head,
            last,
            kept,
            modified,
        })
    }

    /// Writes down how far a rollout is, if that was last written at `modified`. Returns when it was written now; `None` if
    /// somebody else was faster.
    pub(crate) async fn keep(
        &self,
        rollout: &Rollout,
        modified: u64,
        fence: Option<&Fence>,
    ) -> Result<Option<u64>, StoreError> {
        let value = keep::encode(rollout);
        let mut txn = Txn::default().when(KEY, modified).put(KEY, value.clone());
        if let Some(fence) = fence {
            txn = fence.guard(txn);
        }
        match self.store.kv().txn(txn).await {
            Err(KvError::Unknown { .. }) => {
                let entry = self.store.kv().get(KEY).await?;
                Ok(entry
                    .filter(|entry| entry.modified != modified && entry.value == value)
                    .map(|entry| entry.modified))
            }
            done => Ok(done?),
        }
    }
}

impl Tracker {
    fn take(&mut self, record: Record, kept: Option<&Rollout>) {
        let labels = &record.author.labels;
        if labels.contains_key(ROLLOUT) {
            self.change = Some(Arc::new(record));
            self.later = Arc::default();
            self.taken_back = None;
            return;
        }
        let Some(change) = &self.change else { return };
        if labels.get(TAKES_BACK) == Some(&change.revision.to_string()) {
            self.taken_back = Some(Arc::new(record));
            self.later = Arc::default();
            return;
        }
        let is_over = kept.is_some_and(|kept| kept.revision == change.revision && !kept.is_open());
        if self.taken_back.is_none() && !is_over {
            Arc::make_mut(&mut self.later).push(record);
        }
    }
}

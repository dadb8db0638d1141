//! What was asked of the store, when, and what came of it: the history that the checkers read.

use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// A resource, as `Kind/name`.
pub type Name = String;

/// One write of a resource.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Put {
    pub name: Name,
    /// The revision that must be there; 0 for any.
    pub expect: u64,
}

/// What was asked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Ask {
    /// All of these or none, each with this tag, which no other write has.
    Put {
        tag: String,
        puts: Vec<Put>,
    },
    Delete {
        name: Name,
        expect: u64,
    },
    Get {
        name: Name,
    },
    List,
}

/// A resource as it was read: the revision of its last change, and the tag it had.
pub type Seen = (u64, String);

/// What came of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Done, at this revision.
    Done(u64),
    /// Not done, for certain.
    Refused,
    /// Not done, since this resource is at that revision; 0: it is not there.
    Conflict(Name, u64),
    /// What was there; also of a delete that found nothing.
    Found(Option<Seen>),
    /// Everything, at a revision.
    Listed(u64, BTreeMap<Name, Seen>),
    /// Nobody knows.
    Unknown,
}

/// One operation.
#[derive(Clone, Debug)]
pub struct Op {
    pub who: String,
    pub ask: Ask,
    pub outcome: Outcome,
    /// When it was asked, in nanoseconds of the clock that all processes of this machine have.
    pub begin: u64,
    /// When the answer came.
    pub end: u64,
}

impl Op {
    /// Until when it may take effect.
    pub fn until(&self) -> u64 {
        match self.outcome {
            Outcome::Unknown => u64::MAX,
            _ => self.end,
        }
    }
}

/// Nanoseconds of the clock that never goes back.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap()
}

/// Where everybody writes down what they did.
#[derive(Debug, Default)]
pub struct Recorder(Mutex<Vec<Op>>);

impl Recorder {
    pub fn add(&self, op: Op) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(op);
    }

    pub fn take(&self) -> Vec<Op> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A revision as the log has it.
#[derive(Clone, Debug, Default)]
pub struct Logged {
    /// Who wrote it.
    pub who: String,
    /// The fencing token of the lease that the writer held.
    pub fence: Option<u64>,
    /// What it changed: the tag of what a resource became, or `None` where it was deleted.
    pub changes: BTreeMap<Name, Option<String>>,
}

/// The log, from revision 1 on.
pub type Log = Vec<Logged>;

/// Everything as it was at each revision would be a lot: this goes through them.
#[derive(Debug, Default)]
pub struct Replay {
    pub revision: u64,
    pub state: BTreeMap<Name, Seen>,
}

impl Replay {
    pub fn to(&mut self, revision: u64, log: &Log) {
        while self.revision < revision {
            let Some(logged) = log.get(usize::try_from(self.revision).unwrap()) else {
                return;
            };
            self.revision += 1;
            for (name, after) in &logged.changes {
                match after {
                    Some(tag) => drop(self.state.insert(name.clone(), (self.revision, tag.clone()))),
                    None => drop(self.state.remove(name)),
                }
            }
        }
    }
}

/// What a watch told between two places where it was whole.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Everything up to here had been told before.
    pub after: u64,
    /// And now up to here.
    pub to: u64,
    /// What was told: revision, resource, and its tag where it is not deleted.
    pub events: Vec<(u64, Name, Option<String>)>,
}

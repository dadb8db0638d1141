//! What the files say: a base with everything, and a log of changes since, each whole or not there. Pure.
//!
//! A record of the base that is damaged is lost alone, and the base's head, which is there twice, says what it was. Of a
//! damaged log everything before the damage holds: that is what was live then. A log that breaks off was being written.

use super::frame::{Found, framed, next};
use crate::apply::key_of;
use leeward_policy::{Guards, Key, Kind, Name};
use leeward_proto::v1;
use leeward_proto::v1::state_record::Record;
use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Whether a version of a resource runs.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Slot {
    /// It does.
    Good,
    /// It does not, or not yet.
    Refused,
}

/// Which of the two of which resource.
pub(crate) type Place = (Key, Slot);

/// A record of a base.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    record: Arc<[u8]>,
    revision: u64,
    guards: Option<v1::StateGuards>,
}

/// What is new since the last one, for each place; `None` for what is gone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Change {
    pub(crate) puts: BTreeMap<Place, Option<Entry>>,
    pub(crate) commit: v1::StateCommit,
}

/// Everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    entries: BTreeMap<Place, Entry>,
    pub(super) commit: v1::StateCommit,
    /// Of all records together.
    bytes: usize,
}

/// What was there, for the proxy to start with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Restored {
    pub(crate) good: Vec<v1::Resource>,
    /// Those without a resource can't be tried again: a control plane must be asked for everything.
    pub(crate) refused: Vec<v1::StateRefused>,
    pub(crate) commit: v1::StateCommit,
}

/// A base.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) image: Image,
    pub(super) id: u64,
    pub(super) lost: Vec<v1::StateEntry>,
    pub(super) damage: Option<String>,
}

/// Why a file is of no use.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum Unusable {
    #[error("it is of version {0} of this format, which is later than this build's")]
    Later(u16),
    #[error("it is empty")]
    Empty,
    #[error("it has no head that can be read")]
    NoHead,
}

/// What came of a log. What of it is good is in the image.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Log {
    /// It goes on at this byte; what is after it was cut off while it was written.
    Whole(usize),
    /// It goes with another base.
    Other,
    /// It can't be read from some byte on.
    Damaged(String),
    /// A later build wrote it.
    Later(u16),
}

impl Entry {
    pub(crate) fn good(mut wire: v1::Resource) -> Self {
        wire.status = None;
        let guards = leeward_proto::guards(&wire).as_ref().map(render_guards);
        let revision = wire.metadata.as_ref().map_or(0, |metadata| metadata.revision);
        Self::new(Record::Good(wire), revision, guards)
    }

    pub(crate) fn refused(refused: v1::StateRefused) -> Self {
        let (revision, guards) = (refused.revision, refused.guards.clone());
        Self::new(Record::Refused(refused), revision, guards)
    }

    fn new(record: Record, revision: u64, guards: Option<v1::StateGuards>) -> Self {
        Self {
            record: encoded(record).into(),
            revision,
            guards,
        }
    }

    /// Maps have no order on the wire: the same is not always the same bytes.
    fn says_the_same(&self, other: &Self) -> bool {
        let decoded = |entry: &Self| v1::StateRecord::decode(&*entry.record).ok();
        self.record == other.record || decoded(self).is_some_and(|own| decoded(other) == Some(own))
    }
}

impl Change {
    /// Takes in what came later.
    pub(crate) fn add(&mut self, later: Self) {
        self.puts.extend(later.puts);
        self.commit = later.commit;
    }
}

impl Image {
    /// Takes a change in, and returns what of it is new.
    pub(super) fn take(&mut self, mut change: Change) -> Change {
        let entries = &mut self.entries;
        change.puts.retain(|place, put| match (put, entries.get(place)) {
            (None, None) => false,
            (None, Some(_)) | (Some(_), None) => true,
            (Some(new), Some(old)) => !new.says_the_same(old),
        });
        for (place, put) in &change.puts {
            self.put(place.clone(), put.clone());
        }
        self.commit = change.commit.clone();
        change
    }

    fn put(&mut self, place: Place, entry: Option<Entry>) {
        let more = entry.as_ref().map_or(0, |entry| entry.record.len());
        let old = match entry {
            Some(entry) => self.entries.insert(place, entry),
            None => self.entries.remove(&place),
        };
        let less = old.map_or(0, |old| old.record.len());
        self.bytes = (self.bytes + more).saturating_sub(less);
    }

    /// Of all records together.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.commit == v1::StateCommit::default()
    }

    /// As a base.
    pub(super) fn base(&self, id: u64) -> Option<Vec<u8>> {
        let entries = self.entries.iter().map(|((key, slot), entry)| v1::StateEntry {
            r#ref: Some(leeward_proto::render_key(key)),
            refused: *slot == Slot::Refused,
            revision: entry.revision,
            guards: entry.guards.clone(),
        });
        let head = v1::StateHead {
            id,
            is_log: false,
            commit: Some(self.commit.clone()),
            entries: entries.collect(),
        };
        let head = framed(&encoded(Record::Head(head)))?;
        let mut bytes = Vec::with_capacity(self.bytes + 2 * head.len() + 32 * self.entries.len());
        bytes.extend_from_slice(&head);
        for entry in self.entries.values() {
            bytes.extend_from_slice(&framed(&entry.record)?);
        }
        bytes.extend_from_slice(&head);
        Some(bytes)
    }

    /// What a base had and can't be read is refused, whatever else is known of it.
    pub(super) fn lose(&mut self, lost: Vec<v1::StateEntry>) {
        for entry in lost {
            let Some((key, _)) = place_of(entry.r#ref.as_ref(), entry.refused) else {
                continue;
            };
            tracing::error!(resource = %key, revision = entry.revision, "{LOST}");
            let refused = v1::StateRefused {
                r#ref: entry.r#ref,
                revision: entry.revision,
                reason: LOST.to_owned(),
                guards: entry.guards,
                resource: None,
            };
            self.put((key, Slot::Refused), Some(Entry::refused(refused)));
        }
    }

    pub(super) fn restored(&self) -> Restored {
        let mut restored = Restored {
            commit: self.commit.clone(),
            ..Restored::default()
        };
        for entry in self.entries.values() {
            match v1::StateRecord::decode(&*entry.record).map(|decoded| decoded.record) {
                Ok(Some(Record::Good(wire))) => restored.good.push(wire),
                Ok(Some(Record::Refused(refused))) => restored.refused.push(refused),
                // No entry is made of anything else.
                Ok(_) | Err(_) => {}
            }
        }
        restored
    }
}

/// Why a resource isn't there.
const LOST: &str = "this proxy's copy on disk is damaged, and no control plane has given it another yet";

/// How a log of the base with this id begins.
pub(super) fn log_head(id: u64) -> Option<Vec<u8>> {
    framed(&encoded(Record::Head(v1::StateHead {
        id,
        is_log: true,
        ..v1::StateHead::default()
    })))
}

/// A change as it is added to a log.
pub(super) fn group(change: &Change) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for ((key, slot), put) in &change.puts {
        let gone = || {
            encoded(Record::Gone(v1::StateGone {
                r#ref: Some(leeward_proto::render_key(key)),
                refused: *slot == Slot::Refused,
            }))
        };
        let frame = match put {
            Some(entry) => framed(&entry.record)?,
            None => framed(&gone())?,
        };
        bytes.extend_from_slice(&frame);
    }
    let commit = v1::StateCommit {
        records: u32::try_from(change.puts.len()).ok()?,
        ..change.commit.clone()
    };
    bytes.extend_from_slice(&framed(&encoded(Record::Commit(commit)))?);
    Some(bytes)
}

/// Reads a base.
pub(super) fn read_base(bytes: &[u8]) -> Result<Base, Unusable> {
    if bytes.is_empty() {
        return Err(Unusable::Empty);
    }
    let (mut at, mut head, mut heads) = (0, None, 0);
    let (mut image, mut damaged, mut later) = (Image::default(), None, None);
    while let Some(found) = next(bytes, at) {
        let record = match found {
            Found::Record(record, end) => {
                at = end;
                record
            }
            Found::Damage(end) => {
                damaged.get_or_insert(at);
                at = end;
                continue;
            }
            Found::Later(version) => {
                later = Some(version);
                break;
            }
        };
        match v1::StateRecord::decode(record).map(|decoded| decoded.record) {
            Ok(Some(Record::Head(found))) if !found.is_log => {
                heads += 1;
                head.get_or_insert(found);
            }
            Ok(Some(record)) => {
                if let Some((place, Some(entry))) = put(record) {
                    image.put(place, Some(entry));
                }
            }
            // Of a later build; it is no worse for being passed over.
            Ok(None) => {}
            Err(_) => drop(damaged.get_or_insert(at)),
        }
    }
    if let Some(later) = later {
        return Err(Unusable::Later(later));
    }
    let head = head.ok_or(Unusable::NoHead)?;
    image.commit = head.commit.unwrap_or_default();
    let is_lost = |entry: &v1::StateEntry| {
        // A kind that this build doesn't know isn't lost to it.
        place_of(entry.r#ref.as_ref(), entry.refused).is_some_and(|place| !image.entries.contains_key(&place))
    };
    let lost: Vec<_> = head.entries.into_iter().filter(is_lost).collect();
    let damage = match (damaged, heads) {
        (Some(at), _) => Some(format!("it is damaged at byte {at}")),
        (None, 0 | 1) => Some("it ends too early".to_owned()),
        (None, _) => (!lost.is_empty()).then(|| "records of it are missing".to_owned()),
    };
    Ok(Base {
        image,
        id: head.id,
        lost,
        damage,
    })
}

/// Reads the log of a base into it.
pub(super) fn read_log(bytes: &[u8], base: &mut Base) -> Log {
    let mut at = match next(bytes, 0) {
        None => return Log::Damaged("it is empty".to_owned()),
        Some(Found::Damage(_)) => return Log::Damaged("its head can't be read".to_owned()),
        Some(Found::Later(version)) => return Log::Later(version),
        Some(Found::Record(record, end)) => match v1::StateRecord::decode(record).map(|r| r.record) {
            Ok(Some(Record::Head(head))) if head.is_log && head.id == base.id => end,
            Ok(Some(Record::Head(head))) if head.is_log => return Log::Other,
            Ok(_) | Err(_) => return Log::Damaged("it doesn't begin with its head".to_owned()),
        },
    };
    let (mut end, mut pending, mut records, mut damage) = (at, Vec::new(), 0, None);
    while let Some(found) = next(bytes, at) {
        let (record, after) = match found {
            Found::Record(record, after) => (record, after),
            Found::Damage(after) => {
                damage.get_or_insert(at);
                at = after;
                continue;
            }
            Found::Later(version) => return Log::Later(version),
        };
        match v1::StateRecord::decode(record).map(|decoded| decoded.record) {
            Ok(Some(Record::Commit(commit))) => {
                // Something was written after it, and whole: it is no end that was being written.
                if let Some(at) = damage {
                    return Log::Damaged(format!("it is damaged at byte {at}"));
                }
                if commit.records != records {
                    return Log::Damaged(format!(
                        "at byte {at} a change has {records} records and says that it has {}",
                        commit.records
                    ));
                }
                for (place, entry) in pending.drain(..) {
                    // What the base lost of it was older.
                    base.lost
                        .retain(|lost| place_of(lost.r#ref.as_ref(), lost.refused).as_ref() != Some(&place));
                    base.image.put(place, entry);
                }
                base.image.commit = commit;
                (end, records) = (after, 0);
            }
            Ok(record) => {
                records += 1;
                pending.extend(record.and_then(put));
            }
            Err(_) => return Log::Damaged(format!("at byte {at} there is no record")),
        }
        at = after;
    }
    Log::Whole(end)
}

/// What a record puts where, if it does.
fn put(record: Record) -> Option<(Place, Option<Entry>)> {
    match record {
        Record::Good(wire) => Some(((key_of(&wire)?, Slot::Good), Some(Entry::good(wire)))),
        Record::Refused(refused) => {
            let place = place_of(refused.r#ref.as_ref(), true)?;
            Some((place, Some(Entry::refused(refused))))
        }
        Record::Gone(gone) => Some((place_of(gone.r#ref.as_ref(), gone.refused)?, None)),
        Record::Head(_) | Record::Commit(_) => None,
    }
}

fn place_of(wire: Option<&v1::ResourceRef>, refused: bool) -> Option<Place> {
    let slot = if refused { Slot::Refused } else { Slot::Good };
    Some((leeward_proto::parse_key(wire?).ok()?, slot))
}

fn encoded(record: Record) -> Vec<u8> {
    let record = Some(record);
    v1::StateRecord { record }.encode_to_vec()
}

pub(crate) fn render_guards(guards: &Guards) -> v1::StateGuards {
    match guards {
        Guards::All => v1::StateGuards {
            all: true,
            services: Vec::new(),
        },
        Guards::Services(services) => v1::StateGuards {
            all: false,
            services: services.iter().map(Name::to_string).collect(),
        },
    }
}

/// What an AuthorizationPolicy that isn't there was to guard; what can't be told is everything.
pub(crate) fn parse_guards(key: &Key, wire: Option<&v1::StateGuards>) -> Option<Guards> {
    if key.kind != Kind::AuthorizationPolicy {
        return None;
    }
    let wire = wire?;
    let services: Result<Vec<Name>, _> = wire.services.iter().map(|name| Name::parse(name)).collect();
    match services {
        Ok(services) if !wire.all && !services.is_empty() => Some(Guards::Services(services)),
        Ok(_) | Err(_) => Some(Guards::All),
    }
}

#[cfg(test)]
mod tests;

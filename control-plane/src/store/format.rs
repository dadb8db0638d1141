//! How things are written under keys. Unknown fields are kept: what a later build adds to `meta`, `head` or a token stays
//! when this one writes them, and records are never rewritten.

use super::{Author, Judged, LevelChange, LevelWrites, Place, Record, ResourceChange, StoreError, Stored};
use super::{Hold, digits};
use crate::kv::{Entry, Kv, MAX_VALUE, Txn};
use bytes::Bytes;
use leeward_policy::{Key, Kind, Name};
use prost::Message;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// Generated from `proto/leeward/store`.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated"
)]
pub(super) mod wire {
    include!(concat!(env!("OUT_DIR"), "/leeward.store.v1.rs"));
}

/// Largest body that is in the record itself. Two of them fit into a transaction.
const INLINE: usize = 400 << 10;
/// Size of a part of a larger one.
pub(super) const PART: usize = MAX_VALUE / 2;
/// Largest body of a record, in bytes.
pub(super) const MAX_BODY: usize = 128 << 20;

/// A log.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Log {
    Policy,
    Levels,
}

impl Log {
    pub(super) const fn prefix(self) -> &'static str {
        match self {
            Self::Policy => "rev/",
            Self::Levels => "lev/",
        }
    }

    pub(super) fn key(self, number: u64) -> String {
        format!("{}{}", self.prefix(), digits(number))
    }

    /// Where the parts of all attempts for a number are.
    pub(super) fn parts(self, number: u64) -> String {
        let log = match self {
            Self::Policy => "rev",
            Self::Levels => "lev",
        };
        format!("log/{log}-{}-", digits(number))
    }

    fn part(self, header: &wire::Header, part: usize) -> String {
        format!("{}{}/{part:04x}", self.parts(header.number), header.attempt)
    }
}

/// The number in a key such as `rev/N`.
pub(super) fn number_of(key: &str) -> Option<u64> {
    u64::from_str_radix(key.rsplit('/').next()?, 16).ok()
}

/// Where the store is.
#[derive(Clone, Debug, Default)]
pub(super) struct Head {
    /// The number of the last write of policy.
    pub(super) revision: u64,
    /// The number of the last write of levels.
    pub(super) levels: u64,
    /// The number of the last line of the audit.
    pub(super) lines: u64,
    /// When the last write was.
    pub(super) time_ms: i64,
    /// The key's own revision; 0: nothing was written yet.
    pub(super) modified: u64,
    /// What this build doesn't know.
    rest: Map<String, Value>,
}

pub(super) const HEAD: &str = "head";

impl Head {
    pub(super) fn read(entry: Option<&Entry>) -> Result<Self, StoreError> {
        let Some(entry) = entry else {
            return Ok(Self::default());
        };
        let mut rest = object(&entry.key, &entry.value)?;
        let mut number = |name: &str| rest.remove(name).and_then(|value| value.as_u64());
        let mut wanted = |name: &str| {
            number(name).ok_or_else(|| StoreError::Damaged(format!("the key head has no number {name:?}")))
        };
        Ok(Self {
            revision: wanted("revision")?,
            levels: wanted("levels")?,
            lines: wanted("lines")?,
            time_ms: i64::try_from(wanted("timeMs")?).unwrap_or(i64::MAX),
            modified: entry.modified,
            rest,
        })
    }

    pub(super) fn render(&self) -> Vec<u8> {
        let mut object = self.rest.clone();
        let time_ms = u64::try_from(self.time_ms).unwrap_or(0);
        for (name, value) in [
            ("revision", self.revision),
            ("levels", self.levels),
            ("lines", self.lines),
            ("timeMs", time_ms),
        ] {
            object.insert(name.to_owned(), value.into());
        }
        Value::Object(object).to_string().into_bytes()
    }
}

/// A JSON object as it stands under a key.
pub(super) fn object(key: &str, value: &[u8]) -> Result<Map<String, Value>, StoreError> {
    match serde_json::from_slice(value) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(StoreError::Damaged(format!("the key {key} is no JSON object"))),
        Err(error) => Err(StoreError::Damaged(format!("the key {key} is no JSON: {error}"))),
    }
}

/// Puts a body into a header, or its parts beside it.
pub(super) async fn put_body(
    kv: &Kv,
    log: Log,
    header: &mut wire::Header,
    body: Vec<u8>,
) -> Result<(), StoreError> {
    if body.len() > MAX_BODY {
        let (size, limit) = (body.len(), MAX_BODY);
        return Err(StoreError::TooLarge { size, limit });
    }
    header.size = body.len() as u64;
    header.sha256 = Sha256::digest(&body).to_vec();
    if body.len() <= INLINE {
        header.body = body;
        return Ok(());
    }
    let body = Bytes::from(body);
    let mut parts = 0;
    for (i, start) in (0..body.len()).step_by(PART).enumerate() {
        let part = body.slice(start..body.len().min(start + PART));
        // Alone in its transaction, under a key that nobody else writes: whether it was done twice makes no difference.
        let txn = Txn::default().put(log.part(header, i), part);
        match kv.txn(txn.clone()).await {
            Err(crate::kv::KvError::Unknown { .. }) => kv.txn(txn).await,
            done => done,
        }?;
        parts = i + 1;
    }
    header.parts = u32::try_from(parts).unwrap_or(u32::MAX);
    Ok(())
}

/// The body of a record, read and checked.
pub(super) async fn body(kv: &Kv, log: Log, header: &mut wire::Header) -> Result<Vec<u8>, StoreError> {
    let body = if header.parts == 0 {
        std::mem::take(&mut header.body)
    } else {
        let mut body = Vec::with_capacity(usize::try_from(header.size).unwrap_or(0).min(MAX_BODY));
        for i in 0..header.parts as usize {
            let key = log.part(header, i);
            let part = kv.get(&key).await?;
            body.extend_from_slice(
                &part
                    .ok_or_else(|| StoreError::Damaged(format!("there is no {key}")))?
                    .value,
            );
        }
        body
    };
    if Sha256::digest(&body)[..] != header.sha256[..] {
        let key = log.key(header.number);
        return Err(StoreError::Damaged(format!(
            "{key} has another hash than its body"
        )));
    }
    Ok(body)
}

pub(super) fn decode<M: Message + Default>(key: &str, bytes: &[u8]) -> Result<M, StoreError> {
    M::decode(bytes).map_err(|error| StoreError::Damaged(format!("{key} can't be read: {error}")))
}

/// A resource of a kind that this build doesn't know is left to others; so is a name that can't be.
pub(super) fn key(kind: &str, name: &str) -> Option<Key> {
    let kind = Kind::ALL.into_iter().find(|known| known.as_str() == kind)?;
    let name = Name::parse(name).ok()?;
    Some(Key { kind, name })
}

pub(super) fn value(stored: &Stored) -> wire::Value {
    wire::Value {
        revision: stored.revision,
        created_ms: stored.created_ms,
        updated_ms: stored.updated_ms,
        payload: stored.payload.clone(),
    }
}

pub(super) fn stored(key: Key, value: wire::Value) -> Stored {
    Stored {
        key,
        revision: value.revision,
        payload: value.payload,
        created_ms: value.created_ms,
        updated_ms: value.updated_ms,
    }
}

/// A record of policy, and changes of kinds that this build doesn't know.
pub(super) fn record(header: wire::Header, policy: wire::Policy) -> (Record, Vec<wire::Change>) {
    let (mut changes, mut foreign) = (Vec::with_capacity(policy.changes.len()), Vec::new());
    for change in policy.changes {
        match key(&change.kind, &change.name) {
            Some(key) => changes.push(ResourceChange {
                before: change.before.map(|value| stored(key.clone(), value)),
                after: change.after.map(|value| stored(key.clone(), value)),
                key,
            }),
            None => foreign.push(change),
        }
    }
    let record = Record {
        revision: header.number,
        time_ms: header.time_ms,
        author: Author {
            who: header.who,
            from: header.from,
            message: header.message,
            labels: header.labels.into_iter().collect(),
        },
        changes,
    };
    (record, foreign)
}

pub(super) fn policy(record: &Record) -> wire::Policy {
    let changes = record.changes.iter().map(|change| wire::Change {
        kind: change.key.kind.as_str().to_owned(),
        name: change.key.name.to_string(),
        before: change.before.as_ref().map(value),
        after: change.after.as_ref().map(value),
    });
    wire::Policy {
        changes: changes.collect(),
    }
}

pub(super) fn levels(writes: &LevelWrites) -> wire::Levels {
    wire::Levels {
        lines: writes.changes.iter().map(line).collect(),
        judged: writes
            .judged
            .iter()
            .map(|(place, judged)| self::judged(place, judged.as_ref()))
            .collect(),
        holds: writes
            .holds
            .iter()
            .map(|(name, hold)| self::hold(name, hold.as_ref()))
            .collect(),
    }
}

pub(super) fn line(change: &LevelChange) -> wire::Line {
    let change = change.clone();
    wire::Line {
        time_ms: change.time_ms,
        policy: change.policy,
        zone: change.zone,
        from: change.from,
        to: change.to,
        by: change.by,
        why: change.why,
    }
}

pub(super) fn judged(place: &Place, judged: Option<&Judged>) -> wire::Judged {
    let (policy, zone) = (place.policy.clone(), place.zone.clone());
    match judged.cloned() {
        Some(judged) => wire::Judged {
            policy,
            zone,
            level: judged.level,
            since_ms: judged.since_ms,
            by: judged.by,
            why: judged.why,
        },
        None => wire::Judged {
            policy,
            zone,
            ..wire::Judged::default()
        },
    }
}

pub(super) fn hold(name: &str, hold: Option<&Hold>) -> wire::Hold {
    let name = name.to_owned();
    match hold.cloned() {
        Some(hold) => wire::Hold {
            name,
            since_ms: hold.since_ms,
            until_ms: Some(hold.until_ms),
            by: hold.by,
        },
        None => wire::Hold {
            name,
            ..wire::Hold::default()
        },
    }
}

pub(super) fn level_writes(levels: wire::Levels) -> LevelWrites {
    LevelWrites {
        changes: levels
            .lines
            .into_iter()
            .map(|line| LevelChange {
                time_ms: line.time_ms,
                policy: line.policy,
                zone: line.zone,
                from: line.from,
                to: line.to,
                by: line.by,
                why: line.why,
            })
            .collect(),
        judged: levels.judged.into_iter().map(judged_of).collect(),
        holds: levels.holds.into_iter().map(hold_of).collect(),
    }
}

pub(super) fn judged_of(wire: wire::Judged) -> (Place, Option<Judged>) {
    let place = Place {
        policy: wire.policy,
        zone: wire.zone,
    };
    let judged = (!wire.level.is_empty()).then_some(Judged {
        level: wire.level,
        since_ms: wire.since_ms,
        by: wire.by,
        why: wire.why,
    });
    (place, judged)
}

pub(super) fn hold_of(wire: wire::Hold) -> (String, Option<Hold>) {
    let hold = wire.until_ms.map(|until_ms| Hold {
        since_ms: wire.since_ms,
        until_ms,
        by: wire.by,
    });
    (wire.name, hold)
}

//! Reading the log: its parts, put together by time, newest first.

use super::{AGENT, BREAKGLASS, DONE, METHOD, REASON, REFUSED};
use crate::kv::Kv;
use crate::policy::{timestamp, wire};
use crate::store::{Record, ResourceChange, Store, StoreError};
use leeward_policy::{Key, Kind};
use leeward_proto::{parse_key, render_key, v1};
use prost::Message;
use std::collections::{BTreeMap, VecDeque};

/// Entries that one answer looks at, at most: a filter that few pass ends a page early.
const MAX_LOOKED_AT: usize = 5_000;
/// Entries that are read at once.
const READ: usize = 200;
const READ_RECORDS: usize = 32;

/// How far each part was read.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Cursor {
    /// Records before this revision; 0: from the newest on.
    revision: u64,
    done: Option<String>,
    refused: Option<String>,
}

impl Cursor {
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(Self::default());
        }
        let mut parts = text.split('.');
        let (revision, done, refused) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        let key = |text: &str, prefix: &str| {
            let is_key = text.len() <= 64 && text.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
            is_key.then(|| (!text.is_empty()).then(|| format!("{prefix}{text}")))
        };
        Some(Self {
            revision: revision.parse().ok()?,
            done: key(done, DONE.0)?,
            refused: key(refused, REFUSED.0)?,
        })
    }

    pub(super) fn text(&self) -> String {
        let revision = self.revision;
        let key = |key: &Option<String>| {
            let key = key.as_deref().unwrap_or_default();
            key.rsplit('/').next().unwrap_or_default().to_owned()
        };
        format!("{revision}.{}.{}", key(&self.done), key(&self.refused))
    }
}

/// What is wanted.
pub(super) struct Wanted<'a> {
    pub(super) who: &'a str,
    pub(super) resource: Option<&'a Key>,
    pub(super) since_ms: Option<i64>,
    pub(super) size: usize,
    /// Whether whoever asks sees a resource.
    pub(super) sees: &'a (dyn Fn(Kind, &BTreeMap<String, String>) -> bool + Sync),
    /// Whether they see everything; or else what they did themselves, and what changed resources that they see.
    pub(super) sees_all: bool,
    pub(super) asks: &'a str,
}

/// An entry, with what it takes to know who may see it.
struct Read {
    time_ms: i64,
    entry: v1::AuditEntry,
    /// Which of its changes are seen.
    seen: Vec<bool>,
    at: At,
}

/// Where it was read.
enum At {
    Record(u64),
    Done(String),
    Refused(String),
}

/// A part, as far as it was read.
struct Part {
    read: VecDeque<Read>,
    ended: bool,
}

/// A page, and where the next begins if there is one.
pub(super) async fn page(
    store: &Store,
    mut cursor: Cursor,
    wanted: &Wanted<'_>,
) -> Result<(Vec<v1::AuditEntry>, Option<Cursor>), StoreError> {
    let mut entries = Vec::new();
    let part = || Part {
        read: VecDeque::new(),
        ended: false,
    };
    let (mut records, mut done, mut refused) = (part(), part(), part());
    // Where to read on, which runs ahead of where the page is.
    let mut ahead = cursor.clone();
    for _ in 0..MAX_LOOKED_AT {
        if records.read.is_empty() && !records.ended {
            let found = store.history(ahead.revision, READ_RECORDS).await?;
            records.ended = found.is_empty();
            ahead.revision = found.last().map_or(ahead.revision, |record| record.revision);
            records
                .read
                .extend(found.into_iter().map(|record| of_record(record, wanted)));
        }
        for (part, (prefix, _), at) in [
            (&mut done, DONE, &mut ahead.done),
            (&mut refused, REFUSED, &mut ahead.refused),
        ] {
            if part.read.is_empty() && !part.ended {
                fill(store.kv(), part, prefix, at).await?;
            }
        }
        let parts = [&mut records, &mut done, &mut refused];
        let newest = parts
            .into_iter()
            .max_by_key(|part| part.read.front().map(|read| read.time_ms));
        let Some(read) = newest.and_then(|part| part.read.pop_front()) else {
            return Ok((entries, None));
        };
        if wanted.since_ms.is_some_and(|since| read.time_ms < since) {
            return Ok((entries, None));
        }
        match &read.at {
            At::Record(revision) => cursor.revision = *revision,
            At::Done(key) => cursor.done = Some(key.clone()),
            At::Refused(key) => cursor.refused = Some(key.clone()),
        }
        entries.extend(shown(read, wanted));
        if entries.len() == wanted.size {
            break;
        }
    }
    Ok((entries, Some(cursor)))
}

async fn fill(
    kv: &Kv,
    part: &mut Part,
    prefix: &'static str,
    at: &mut Option<String>,
) -> Result<(), StoreError> {
    let page = kv.range(prefix, at.as_deref(), READ).await?;
    part.ended = !page.more;
    for found in page.entries {
        *at = Some(found.key.clone());
        // What can't be read was written by a later build; it is passed over.
        let Ok(entry) = v1::AuditEntry::decode(&*found.value) else {
            continue;
        };
        let time_ms = entry
            .time
            .map_or(0, |time| time.seconds * 1000 + i64::from(time.nanos / 1_000_000));
        let at = if prefix == DONE.0 {
            At::Done(found.key)
        } else {
            At::Refused(found.key)
        };
        part.read.push_back(Read {
            time_ms,
            seen: vec![false; entry.changes.len()],
            entry,
            at,
        });
    }
    Ok(())
}

fn of_record(record: Record, wanted: &Wanted<'_>) -> Read {
    let author = record.author;
    let label = |name: &str| author.labels.get(name).cloned().unwrap_or_default();
    let sees = |change: &ResourceChange| {
        let versions = change.before.iter().chain(&change.after);
        wanted.sees_all
            || versions.into_iter().any(|stored| {
                let labels = wire(stored).metadata.unwrap_or_default().labels;
                (wanted.sees)(change.key.kind, &labels.into_iter().collect())
            })
    };
    let seen = record.changes.iter().map(sees).collect();
    let change = |change: &ResourceChange| v1::AuditChange {
        r#ref: Some(render_key(&change.key)),
        before: change.before.as_ref().map_or(0, |stored| stored.revision),
        after: change.after.as_ref().map_or(0, |stored| stored.revision),
    };
    Read {
        time_ms: record.time_ms,
        entry: v1::AuditEntry {
            time: Some(timestamp(record.time_ms)),
            method: label(METHOD),
            user_agent: label(AGENT),
            reason: label(REASON),
            breakglass: label(BREAKGLASS) == "true",
            who: author.who,
            from: author.from,
            outcome: "OK".to_owned(),
            message: String::new(),
            changes: record.changes.iter().map(change).collect(),
            revision: record.revision,
        },
        seen,
        at: At::Record(record.revision),
    }
}

/// What of an entry is to be shown, if it is.
fn shown(read: Read, wanted: &Wanted<'_>) -> Option<v1::AuditEntry> {
    let Read { mut entry, seen, .. } = read;
    let is_who = match wanted.who.strip_suffix('*') {
        _ if wanted.who.is_empty() => true,
        Some(prefix) => entry.who.starts_with(prefix),
        None => entry.who == wanted.who,
    };
    if !is_who {
        return None;
    }
    if !wanted.sees_all && entry.who != wanted.asks {
        let mut seen = seen.into_iter();
        entry.changes.retain(|_| seen.next() == Some(true));
        if entry.changes.is_empty() {
            return None;
        }
    }
    let touches = |key: &Key| {
        let is_it = |change: &v1::AuditChange| {
            let named = change.r#ref.as_ref().and_then(|named| parse_key(named).ok());
            named.as_ref() == Some(key)
        };
        entry.changes.iter().any(is_it)
    };
    wanted.resource.is_none_or(touches).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::super::before;
    use super::*;

    #[test]
    fn cursors_are_read_as_they_are_written() {
        let cursors = [
            Cursor::default(),
            Cursor {
                revision: 17,
                done: Some(format!("{}{}-0000000000000001", DONE.0, before(7))),
                refused: None,
            },
            Cursor {
                revision: 1,
                done: None,
                refused: Some(format!("{}{}-00000000000000ff", REFUSED.0, before(9))),
            },
        ];
        for cursor in cursors {
            assert_eq!(Cursor::parse(&cursor.text()), Some(cursor));
        }
        for text in ["x", "1.2", "1..x/y", "1...", "-1..", "1../../meta."] {
            assert_eq!(Cursor::parse(text), None, "{text}");
        }
        assert!(before(5) > before(6), "what is later comes first");
    }
}

//! Ships the store's log as it grows.
//!
//! Each segment is stored under the position after which it begins, if there is none yet: of two control planes that both
//! believe that it is theirs to ship, one does, and the other sees it and goes on from there. A segment's head says up to
//! where it goes, so that whoever continues needs no secret.

use super::create::{blocking, convert, watch_error};
use super::error::BackupError;
use super::format::{self, Segment};
use super::manifest::{LOG, segment_name};
use super::place::Place;
use super::seal::{Opener, Sealer};
use crate::kv::Watch;
use crate::store::{Clock, Store};
use std::time::Duration;

/// How long changes are gathered for one segment.
const GATHER: Duration = Duration::from_millis(500);
/// Bytes of changes from which on they go at once.
const ENOUGH: usize = 1 << 20;
/// Largest segment as it is stored.
pub(crate) const MAX_SEGMENT: u64 = 64 << 20;

/// The head of a segment: after which position it begins, up to where it goes, when it was shipped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Span {
    pub(crate) after: u64,
    pub(crate) to: u64,
    pub(crate) shipped_ms: i64,
}

impl Span {
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut out = self.after.to_be_bytes().to_vec();
        out.extend_from_slice(&self.to.to_be_bytes());
        out.extend_from_slice(&self.shipped_ms.to_be_bytes());
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| -> Option<[u8; 8]> { bytes.get(at..at + 8)?.try_into().ok() };
        if bytes.len() != 24 {
            return None;
        }
        Some(Self {
            after: u64::from_be_bytes(number(0)?),
            to: u64::from_be_bytes(number(8)?),
            shipped_ms: i64::from_be_bytes(number(16)?),
        })
    }
}

/// How shipping stands.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Shipping {
    /// Everything up to here is there.
    pub(crate) position: u64,
    /// Since when a change waits to be shipped, in milliseconds since 1970.
    pub(crate) waiting_since_ms: Option<i64>,
}

/// Ships one store's log to one place.
pub(crate) struct Shipper<'a> {
    store: &'a Store,
    place: &'a Place,
    sealer: &'a Sealer,
    watch: Watch,
    /// Up to here it is there.
    at: u64,
    /// What was seen and is not there yet, and up to where that goes.
    gathered: Vec<format::Event>,
    bytes: usize,
    seen_to: u64,
}

/// The end of what is shipped of a store; `None` if nothing is.
pub(crate) async fn shipped_to(place: &Place, store_id: &str) -> Result<Option<u64>, BackupError> {
    let found = place.list(&format!("{LOG}/{store_id}"), None).await?;
    let Some(last) = found.last() else {
        return Ok(None);
    };
    span(place, &last.name).await.map(|span| Some(span.to))
}

/// The head of a segment that is there.
pub(crate) async fn span(place: &Place, name: &str) -> Result<Span, BackupError> {
    let bytes = place.get(name, MAX_SEGMENT).await?;
    span_of(name, &bytes)
}

pub(crate) fn span_of(name: &str, bytes: &[u8]) -> Result<Span, BackupError> {
    let head = Opener::head(bytes).map_err(|source| BackupError::Seal {
        object: name.to_owned(),
        source,
    })?;
    Span::decode(head).ok_or_else(|| BackupError::Content {
        object: name.to_owned(),
        what: "is no segment of a log".to_owned(),
    })
}

impl<'a> Shipper<'a> {
    /// One that goes on after a position.
    pub(crate) fn new(store: &'a Store, place: &'a Place, sealer: &'a Sealer, after: u64) -> Self {
        Self {
            store,
            place,
            sealer,
            watch: store.kv().watch("", after + 1),
            at: after,
            gathered: Vec::new(),
            bytes: 0,
            seen_to: after,
        }
    }

    /// Ships what comes next, and says how shipping stands. Waits for as long as nothing does. After an error that is not
    /// [`BackupError::Gap`], it can be called again: nothing is lost.
    pub(crate) async fn next(&mut self, tell: &(dyn Fn(Shipping) + Sync)) -> Result<(), BackupError> {
        let mut until: Option<tokio::time::Instant> =
            (!self.gathered.is_empty()).then(tokio::time::Instant::now);
        loop {
            let told = match until {
                None => Some(self.watch.next().await),
                Some(until) => tokio::time::timeout_at(until, self.watch.next()).await.ok(),
            };
            let Some(told) = told else { break };
            let seen_ms = Clock::System.now_ms();
            for event in told.map_err(watch_error)? {
                let (position, event) = convert(event, seen_ms);
                self.seen_to = position;
                if let Some(event) = event {
                    self.bytes += event.key.len() + event.value.as_ref().map_or(0, bytes::Bytes::len);
                    self.gathered.push(event);
                }
            }
            if let Some(first) = self.gathered.first() {
                tell(Shipping {
                    position: self.at,
                    waiting_since_ms: Some(first.seen_ms),
                });
                until.get_or_insert_with(|| tokio::time::Instant::now() + GATHER);
            }
            if self.bytes >= ENOUGH {
                break;
            }
        }
        self.ship().await?;
        tell(Shipping {
            position: self.at,
            waiting_since_ms: None,
        });
        Ok(())
    }

    async fn ship(&mut self) -> Result<(), BackupError> {
        while !self.gathered.is_empty() {
            let span = Span {
                after: self.at,
                to: self.seen_to,
                shipped_ms: Clock::System.now_ms(),
            };
            let segment = Segment {
                store_id: self.store.id().to_owned(),
                after: span.after,
                to: span.to,
                shipped_ms: span.shipped_ms,
                events: self.gathered.clone(),
            };
            let sealer = self.sealer.clone();
            let sealed =
                blocking(move || sealer.seal(&span.encode(), &format::encode_segment(&segment))).await??;
            let name = segment_name(self.store.id(), self.at);
            let made = self.place.create(&name, sealed).await?;
            let to = if made {
                span.to
            } else {
                // Another has shipped from there, or itself with an answer that was lost.
                self::span(self.place, &name).await?.to
            };
            if to <= self.at {
                return Err(BackupError::Content {
                    object: name,
                    what: "ends where it begins".to_owned(),
                });
            }
            self.at = to;
            self.gathered.retain(|event| event.position > to);
            self.seen_to = self.seen_to.max(to);
            self.bytes = self.gathered.iter().map(|e| e.key.len()).sum();
        }
        Ok(())
    }
}

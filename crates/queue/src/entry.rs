//! What goes into a queue, and what is told of it.

use bytes::Bytes;
use leeward_policy::model::Priority;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// An entry's id: 128 random bits, shown as 32 hex digits. Who knows it may read what became of the entry, so it
/// must not be possible to guess one.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct EntryId([u8; 16]);

impl EntryId {
    /// A new one, from the system's secure source of randomness.
    ///
    /// # Errors
    ///
    /// What the system says, which is nothing on Linux once it has booted.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        // Up to 256 bytes come whole or not at all: getrandom(2).
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(bytes))
    }

    pub(crate) const fn of_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    pub(crate) const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no [`EntryId`].
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("an entry's id is 32 hex digits in lower case, which {0:?} is not")]
pub struct InvalidId(Box<str>);

impl FromStr for EntryId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let digits = text.len() == 32
            && text
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        match u128::from_str_radix(text, 16) {
            Ok(value) if digits => Ok(Self(value.to_be_bytes())),
            Ok(_) | Err(_) => Err(InvalidId(text.chars().take(64).collect())),
        }
    }
}

/// A request as it is kept and sent again.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoredRequest {
    /// The service that it is for.
    pub service: Arc<str>,
    /// The rule that it came by: the route's name and the rule's position, as `ROUTE/POSITION`.
    pub route: Arc<str>,
    /// Entries of one key are sent one after the other; `None` has no order.
    pub key: Option<Arc<str>>,
    /// The value of Idempotency-Key with which every attempt is sent.
    pub idempotency_key: Arc<str>,
    /// The method.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Host and port that the client named.
    pub authority: String,
    /// Names in lower case, in the order in which they came.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The whole body.
    pub body: Bytes,
    /// The request's priority.
    pub priority: Priority,
    /// Who sent it: the address.
    pub client: SocketAddr,
    /// Who sent it: the SPIFFE id of its certificate, if it showed one.
    pub identity: Option<Arc<str>>,
    /// Whether who sent it is a client from outside, by a gateway, and none of the mesh.
    pub from_outside: bool,
}

/// An entry that is durable.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Accepted {
    /// By which its status is asked for.
    pub id: EntryId,
}

/// Why a request was not taken in.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refused {
    /// A bound of the queue was met.
    #[error("the queue is full: {limit}")]
    Full {
        /// `maxEntries`, `maxBytes` or `maxEntryBytes`.
        limit: &'static str,
    },
    /// The store can't take anything just now.
    #[error("the queue can't take anything in: {why}")]
    Unavailable {
        /// What the store said.
        why: Arc<str>,
    },
    /// Policy has no such queue.
    #[error("there is no such queue")]
    NoSuchQueue,
}

/// Why a queue could not be read or changed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum QueueError {
    /// Policy has no such queue.
    #[error("there is no queue {queue:?}")]
    NoSuchQueue {
        /// What was asked for.
        queue: Box<str>,
    },
    /// The store doesn't answer.
    #[error("queue {queue:?} can't be used: {why}")]
    Unavailable {
        /// The queue.
        queue: Arc<str>,
        /// What the store said.
        why: Arc<str>,
    },
    /// No dead letter could be made to wait again, since the queue is full.
    #[error("queue {queue:?} is full: {limit}")]
    Full {
        /// The queue.
        queue: Arc<str>,
        /// `maxEntries` or `maxBytes`.
        limit: &'static str,
    },
}

/// One attempt, to be made now.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The entry.
    pub id: EntryId,
    /// Its queue.
    pub queue: Arc<str>,
    /// 1 plus the attempts before it that were answered.
    pub attempt: u32,
    /// What to send.
    pub request: StoredRequest,
}

/// Makes attempts. Everything of an attempt is to be over when its future ends; the future may be dropped at any
/// point, which gives the attempt up.
pub trait Deliver: Send + Sync + 'static {
    /// Sends a request once, without retries and without fallback, and says what came of it.
    fn deliver(&self, delivery: Delivery) -> Pin<Box<dyn Future<Output = Delivered> + Send + '_>>;
}

/// What came of an attempt.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Delivered {
    /// The service answered, and this is its word: 2xx and 3xx end the entry as delivered; 408, 425, 429 and 5xx
    /// are taken for [`Self::Failed`]; any other is a dead letter at once.
    Answered {
        /// The answer's status.
        status: u16,
    },
    /// The request may have arrived.
    Failed {
        /// What happened, for people.
        why: Arc<str>,
        /// The status, if there was an answer. Only then is this one of the attempts that policy counts.
        status: Option<u16>,
        /// The next attempt is not before this.
        retry_after: Option<Duration>,
    },
    /// Nothing has reached the service: an open circuit, no endpoint, no connection, overload. Doesn't count, and
    /// holds back all deliveries to the service.
    NotSent {
        /// What happened, for people.
        why: Arc<str>,
        /// The next attempt is not before this.
        retry_after: Option<Duration>,
    },
}

/// What became of an entry.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EntryStatus {
    /// The entry.
    pub id: EntryId,
    /// Its queue.
    pub queue: Arc<str>,
    /// What became of it.
    pub state: EntryState,
}

/// Where an entry is on its way.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum EntryState {
    /// It waits, or is being sent.
    Waiting {
        /// Since when, in milliseconds since 1970.
        since_ms: u64,
        /// Attempts that were answered.
        attempts: u32,
        /// What came of the last attempt.
        last_error: Option<Arc<str>>,
    },
    /// The service has it.
    Delivered {
        /// With which status it said so.
        status: u16,
        /// When, in milliseconds since 1970.
        at_ms: u64,
        /// Attempts that were answered, the last included.
        attempts: u32,
    },
    /// It will not be sent unless somebody says so.
    Dead {
        /// Why: `expired`, or what came of the last attempt.
        reason: Arc<str>,
        /// When, in milliseconds since 1970.
        at_ms: u64,
        /// Attempts that were answered.
        attempts: u32,
    },
}

/// Which entries to list.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Listing {
    /// Of which kind.
    pub kind: Listed,
    /// From after this place, which is that of the last entry of the listing before; 0 is the beginning.
    pub after: u64,
    /// Entries at most, 1 to [`MAX_LISTED`]; other numbers are brought into this range.
    pub limit: usize,
}

/// Entries of one listing at most.
pub const MAX_LISTED: usize = 1000;

/// The entries that can be listed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Listed {
    /// Those that wait or are being sent, in the order in which they came.
    Waiting,
    /// Dead letters, oldest first.
    Dead,
}

/// An entry in a listing.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EntrySummary {
    /// Its place, for the listing that follows.
    pub place: u64,
    /// What became of it.
    pub id: EntryId,
    /// Where it is on its way: waiting or dead.
    pub state: EntryState,
    /// The service that it is for.
    pub service: Arc<str>,
    /// The rule that it came by.
    pub route: Arc<str>,
    /// Its key.
    pub key: Option<Arc<str>>,
    /// The method.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Bytes that it takes of the queue's bound.
    pub size: u64,
    /// When it came, in milliseconds since 1970.
    pub accepted_ms: u64,
}

/// All of one entry.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EntryDetail {
    /// As in a listing.
    pub summary: EntrySummary,
    /// What is sent.
    pub request: StoredRequest,
}

/// Which entries to act on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Which {
    /// This one.
    One(EntryId),
    /// All dead letters.
    AllDead,
}

/// Whether a status says to come again rather than that the request is wrong: 408 and 429 (RFC 9110, RFC 6585),
/// 425 (RFC 8470) and 5xx.
pub(crate) const fn may_succeed_later(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500..=599)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_they_are_written_and_differ() {
        let ids: std::collections::BTreeSet<_> = (0..1000).map(|_| EntryId::random().unwrap()).collect();
        assert_eq!(ids.len(), 1000);
        for id in &ids {
            assert_eq!(id.to_string().len(), 32);
            assert_eq!(id.to_string().parse(), Ok(*id));
        }
    }

    #[test]
    fn other_texts_are_no_ids() {
        let good = "0123456789abcdef0123456789abcdef";
        assert!(good.parse::<EntryId>().is_ok());
        for bad in [
            "",
            "0",
            &good[1..],
            &format!("{good}0"),
            &good.to_uppercase(),
            &format!("+{}", &good[1..]),
            &good.replace('0', "g"),
            &good.replace('0', "\u{e9}"),
        ] {
            let error = bad.parse::<EntryId>().unwrap_err();
            assert!(error.to_string().contains("32 hex digits"), "{error}");
        }
    }
}

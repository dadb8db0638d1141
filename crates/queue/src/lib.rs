//! Durable queues of requests that were accepted and wait for their service.
//!
//! In the path: where policy's ladder has the rung `queue`, the request path hands a request to [`Queues::accept`], and
//! answers 202 once that has returned. [`Queues::run`] hands it back as a [`Delivery`] when its time has come, until the
//! service has answered it, it is too old, or it was tried often enough.
//!
//! This crate knows nothing of HTTP but statuses, and nothing of services, circuits and endpoints but what a [`Deliver`]
//! says of each attempt. It owns the order, the pauses, the bounds and the stores, of which there are two with one
//! behaviour: SQLite on the node's disk, and NATS JetStream.
//!
//! Read first: [`Queues`], then [`Delivered`], then the module `schedule`, which decides what is sent next.
//!
//! Invariants:
//! - What was accepted is delivered at least once, or is a dead letter, or was dropped by somebody's word, whatever
//!   process is killed when. A file that is found corrupt is the exception: it is kept, and said to be so.
//! - Every attempt of an entry carries the same idempotency key.
//! - Of one key, an entry is sent only once it is durable what became of the one before it.
//! - One process at a time delivers from a queue.
//! - A store that fails makes its queue unavailable, and nothing else.

mod clock;
mod codec;
mod deliver;
mod entry;
mod gate;
mod jetstream;
mod queues;
mod schedule;
mod sqlite;
mod store;
mod verdict;

pub use entry::{
    Accepted, Deliver, Delivered, Delivery, EntryDetail, EntryId, EntryState, EntryStatus, EntrySummary,
    InvalidId, Listed, Listing, MAX_LISTED, QueueError, Refused, StoredRequest, Which,
};
pub use queues::{QueueReading, Queues, Settings};

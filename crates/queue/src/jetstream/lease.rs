//! Which proxy of the mesh delivers from a queue.

use super::layout::{Connected, LEASE, failed};
use crate::store::Why;
use async_nats::jetstream::kv::{CreateErrorKind, Operation, UpdateErrorKind};
use std::time::Duration;
use tokio::time::Instant;

/// How often a lease is renewed.
const RENEW: Duration = Duration::from_secs(3);
/// How often it is tried again when that has failed.
const AGAIN: Duration = Duration::from_millis(500);
/// How long one renewal may take.
const ANSWER: Duration = Duration::from_secs(2);
/// How long before it runs out a lease that could not be renewed is given up. What is under way is cut off then, and
/// so does not arrive after what the next holder sends.
const MARGIN: Duration = Duration::from_secs(2);

/// A lease that is held.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lease {
    /// By which the next renewal proves that nobody else has had it since.
    pub(super) revision: u64,
    /// When the last renewal was sent, which is not after the server's clock for it began.
    pub(super) renewed: Instant,
}

/// Takes the lease of a queue, if nobody has it.
pub(super) async fn take(js: &Connected, queue: &str, owner: &str) -> Result<Option<Lease>, Why> {
    let held = js
        .leases
        .entry(queue)
        .await
        .map_err(failed("read a lease"))?
        .is_some_and(|entry| entry.operation == Operation::Put);
    if held {
        return Ok(None);
    }
    let renewed = Instant::now();
    match js.leases.create(queue, owner.to_owned().into()).await {
        Ok(revision) => Ok(Some(Lease { revision, renewed })),
        Err(error) if error.kind() == CreateErrorKind::AlreadyExists => Ok(None),
        Err(error) => Err(failed("take a lease")(error)),
    }
}

/// Waits until the lease is to be renewed and renews it. `None` if it is lost.
pub(super) async fn renew(
    js: Option<&Connected>,
    queue: &str,
    owner: &str,
    lease: Lease,
    failures: u32,
) -> Renewed {
    let wait = if failures == 0 { RENEW } else { AGAIN };
    tokio::time::sleep(wait).await;
    let sent = Instant::now();
    let until = lease.renewed + LEASE - MARGIN;
    let renewal = async {
        let Some(js) = js else { return Renewed::Failed };
        match js
            .leases
            .update(queue, owner.to_owned().into(), lease.revision)
            .await
        {
            Ok(revision) => Renewed::Held(Lease {
                revision,
                renewed: sent,
            }),
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => Renewed::Lost,
            Err(_) => Renewed::Failed,
        }
    };
    let by = (sent + ANSWER).min(until);
    match tokio::time::timeout_at(by, renewal).await {
        Ok(Renewed::Failed) | Err(_) if Instant::now() + AGAIN >= until => Renewed::Lost,
        Ok(renewed) => renewed,
        Err(_) => Renewed::Failed,
    }
}

/// What came of a renewal.
#[derive(Clone, Copy, Debug)]
pub(super) enum Renewed {
    /// For another while.
    Held(Lease),
    /// Not this time; the lease is still good.
    Failed,
    /// Somebody else may have it.
    Lost,
}

/// Gives it back. If that fails it runs out by itself.
pub(super) async fn give_back(js: &Connected, queue: &str, lease: Lease) {
    let given = js.leases.delete_expect_revision(queue, Some(lease.revision));
    match tokio::time::timeout(ANSWER, given).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(queue, %error, "can't give a lease back"),
        Err(_) => tracing::debug!(queue, "can't give a lease back in time"),
    }
}

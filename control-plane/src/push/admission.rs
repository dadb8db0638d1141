//! How many proxies are let in at once, and how they are sent away: a restart, of this or of another control plane, must not
//! bring all of them together.

use bytes::Bytes;
use leeward_proto::v1;
use leeward_proto::v1::control_message::Message as ToProxy;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt};

/// Streams at once. Each takes some tens of KiB: past that a control plane would rather end than serve.
const MAX_STREAMS: usize = 50_000;
/// Proxies at once that have nothing of this store yet, and get everything: until they have it, each of them may take up to a
/// few MiB of what is on its way.
const FULL_AT_ONCE: usize = 32;
/// Those that wait for that; more are told to come back.
const MAX_WAITING: usize = 256;
/// How long they wait at most. Shorter than a proxy waits for its stream.
const WAIT: Duration = Duration::from_secs(5);
/// How long one that gets everything may take to say that it has; then the next is let in as well.
const FULL_LIMIT: Duration = Duration::from_secs(30);
/// When those are to come back that are sent away: sooner or later by chance, which is theirs.
const RETRY: Duration = Duration::from_secs(2);
/// Over how long proxies spread when this control plane is stopped, for each of them: 500 a second.
const SPREAD: Duration = Duration::from_millis(2);
/// The longest of that.
const MAX_SPREAD: Duration = Duration::from_secs(30);
/// How long a goodbye may take to be read.
const GOODBYE: Duration = Duration::from_secs(1);

/// The door.
#[derive(Debug)]
pub(super) struct Admission {
    streams: Arc<AtomicUsize>,
    full: Arc<Semaphore>,
    waiting: AtomicUsize,
}

/// A stream that was let in; it counts until this is dropped.
#[derive(Debug)]
pub(super) struct Admitted {
    _counted: Counted,
    full: Option<OwnedSemaphorePermit>,
    streams: Arc<AtomicUsize>,
}

/// One of the streams.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

/// One of those that wait.
struct Waiting<'a>(&'a AtomicUsize);

/// What a stream's proxy has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Has {
    /// Nothing of this store: it gets everything.
    Nothing,
    /// Something: it gets what changed.
    Something,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admission {
    pub(super) fn new() -> Self {
        Self {
            streams: Arc::default(),
            full: Arc::new(Semaphore::new(FULL_AT_ONCE)),
            waiting: AtomicUsize::new(0),
        }
    }

    /// Lets a stream in, at once or after a while.
    ///
    /// # Errors
    ///
    /// `RESOURCE_EXHAUSTED`, with when to come back: there are too many.
    pub(super) async fn admit(&self, has: Has) -> Result<Admitted, Status> {
        let streams = Arc::clone(&self.streams);
        let before = streams.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(Arc::clone(&streams));
        if before >= MAX_STREAMS {
            return Err(busy("there are too many streams", MAX_SPREAD));
        }
        let full = match has {
            Has::Something => None,
            Has::Nothing => Some(self.turn().await?),
        };
        Ok(Admitted {
            _counted: counted,
            full,
            streams,
        })
    }

    async fn turn(&self) -> Result<OwnedSemaphorePermit, Status> {
        if let Ok(permit) = Arc::clone(&self.full).try_acquire_owned() {
            return Ok(permit);
        }
        let waiting = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        if waiting >= MAX_WAITING {
            return Err(busy("too many proxies get everything at once", RETRY));
        }
        match tokio::time::timeout(WAIT, Arc::clone(&self.full).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            // The semaphore is never closed.
            Ok(Err(_)) | Err(_) => Err(busy("proxies that get everything take too long", RETRY)),
        }
    }
}

impl Admitted {
    /// Stays for as long as the stream does. When that ends since the control plane is stopped, the proxy is told so first.
    pub(super) async fn stay(
        mut self,
        outbox: mpsc::Sender<Result<Bytes, Status>>,
        acked: CancellationToken,
        ended: CancellationToken,
        stop: CancellationToken,
    ) {
        if let Some(full) = self.full.take() {
            tokio::select! {
                () = acked.cancelled() => {}
                () = ended.cancelled() => {}
                () = tokio::time::sleep(FULL_LIMIT) => {}
            }
            drop(full);
        }
        ended.cancelled().await;
        if stop.is_cancelled() {
            let goodbye = goodbye(self.streams.load(Ordering::Relaxed));
            // One that doesn't read finds out when the connection ends.
            drop(tokio::time::timeout(GOODBYE, outbox.send(Ok(goodbye))).await);
        }
    }
}

/// What the proxies of so many streams are told at the end.
fn goodbye(streams: usize) -> Bytes {
    let streams = u32::try_from(streams).unwrap_or(u32::MAX);
    let spread = SPREAD.saturating_mul(streams).min(MAX_SPREAD);
    super::frame(ToProxy::Goodbye(v1::Goodbye {
        spread: prost_types::Duration::try_from(spread).ok(),
    }))
}

fn busy(why: &str, retry: Duration) -> Status {
    let details = ErrorDetails::with_retry_info(Some(retry));
    Status::with_error_details(tonic::Code::ResourceExhausted, why, details)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn those_that_get_everything_have_turns_and_too_many_are_sent_away() {
        let admission = Arc::new(Admission::new());
        let mut inside = Vec::new();
        for _ in 0..FULL_AT_ONCE {
            inside.push(admission.admit(Has::Nothing).await.unwrap());
        }
        // Those that have something are not held up.
        drop(admission.admit(Has::Something).await.unwrap());
        let waiting: Vec<_> = (0..MAX_WAITING)
            .map(|_| {
                let admission = Arc::clone(&admission);
                tokio::spawn(async move { admission.admit(Has::Nothing).await })
            })
            .collect();
        tokio::task::yield_now().await;
        let refused = admission.admit(Has::Nothing).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        let info = refused.get_details_retry_info().unwrap();
        assert_eq!(info.retry_delay, Some(RETRY));
        // One is done, and another is let in; the others have waited long enough.
        drop(inside.pop());
        let mut let_in = 0;
        for waiting in waiting {
            let_in += usize::from(waiting.await.unwrap().is_ok());
        }
        assert!((1..=MAX_WAITING).contains(&let_in));
        drop(inside);
        assert_eq!(admission.streams.load(Ordering::Relaxed), 0);
        assert_eq!(admission.full.available_permits(), FULL_AT_ONCE);
        assert_eq!(admission.waiting.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_everything_makes_room_and_who_is_sent_away_is_told_how_long_to_spread() {
        let admission = Admission::new();
        let (stop, acked) = (CancellationToken::new(), CancellationToken::new());
        let ended = stop.child_token();
        let (outbox, mut messages) = mpsc::channel(4);
        let admitted = admission.admit(Has::Nothing).await.unwrap();
        let stays = tokio::spawn(admitted.stay(outbox, acked.clone(), ended, stop.clone()));
        acked.cancel();
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        assert_eq!(admission.full.available_permits(), FULL_AT_ONCE);
        stop.cancel();
        stays.await.unwrap();
        let said = messages.recv().await.unwrap().unwrap();
        assert_eq!(said, goodbye(1));
        assert!(messages.recv().await.is_none(), "and the stream ends");
    }

    #[test]
    fn the_more_proxies_there_are_the_longer_they_spread() {
        use prost::Message;
        let spread = |streams| {
            let message = v1::ControlMessage::decode(&*goodbye(streams)).unwrap().message;
            let Some(ToProxy::Goodbye(goodbye)) = message else {
                panic!()
            };
            Duration::try_from(goodbye.spread.unwrap()).unwrap()
        };
        assert_eq!(spread(3_000), Duration::from_secs(6));
        assert_eq!(spread(1_000_000), MAX_SPREAD);
    }
}

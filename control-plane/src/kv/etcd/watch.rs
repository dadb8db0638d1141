//! Watches: a task that goes from member to member, and tells each change once.

use super::{Etcd, MAX_ANSWER, etcdserverpb as pb, led, signed, unsigned};
use crate::kv::{Event, WatchError};
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

/// Batches of changes that wait for whoever watches; etcd keeps the rest.
const WAITING: usize = 64;
/// Pause after a failure: a random part of this, which doubles up to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Longest wait for a member to say that it watches.
const CREATED: Duration = Duration::from_secs(5);

type Batch = Result<Vec<Event>, WatchError>;

/// The changes of a prefix from a revision on.
#[derive(Debug)]
pub(in crate::kv) struct Tail {
    batches: mpsc::Receiver<Batch>,
    /// What it said last, when it has ended.
    ended: Option<WatchError>,
    _task: AbortOnDropHandle<()>,
}

impl Tail {
    pub(super) fn new(etcd: Arc<Etcd>, prefix: &str, from: u64) -> Self {
        let (out, batches) = mpsc::channel(WAITING);
        let task = tokio::spawn(run(etcd, prefix.to_owned(), from, out));
        Self {
            batches,
            ended: None,
            _task: AbortOnDropHandle::new(task),
        }
    }

    pub(in crate::kv) async fn next(&mut self) -> Batch {
        if let Some(ended) = &self.ended {
            return Err(ended.clone());
        }
        match self.batches.recv().await {
            Some(Ok(events)) => Ok(events),
            Some(Err(error)) => {
                self.ended = Some(error.clone());
                Err(error)
            }
            None => std::future::pending().await,
        }
    }
}

async fn run(etcd: Arc<Etcd>, prefix: String, mut from: u64, out: mpsc::Sender<Batch>) {
    let mut pause = PAUSE.0;
    loop {
        let (place, _) = etcd.endpoints.current();
        match watch(&etcd, &prefix, &mut from, &out).await {
            Ok(Ended::Unheard) => return,
            Ok(Ended::Compacted(revision)) => {
                // Nobody is there to hear of it otherwise.
                let _ = out.send(Err(WatchError::Compacted(revision))).await;
                return;
            }
            Ok(Ended::Canceled(reason)) => {
                tracing::debug!(endpoint = etcd.endpoints.url(place), reason, "a watch was ended");
            }
            Err(status) => {
                tracing::debug!(endpoint = etcd.endpoints.url(place), %status, "a watch failed");
            }
        }
        etcd.endpoints.next(place);
        tokio::time::sleep(pause.mul_f64(0.1 + 0.9 * fastrand::f64())).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// How a watch ended.
enum Ended {
    /// Nobody listens any more.
    Unheard,
    /// What was to be told is forgotten, up to this revision.
    Compacted(u64),
    /// The member says why.
    Canceled(String),
}

async fn watch(
    etcd: &Etcd,
    prefix: &str,
    from: &mut u64,
    out: &mpsc::Sender<Batch>,
) -> Result<Ended, Status> {
    let (_, channel) = etcd.endpoints.current();
    let mut client = WatchClient::new(channel).max_decoding_message_size(MAX_ANSWER);
    // Kept to the end: a stream of requests that ends would end the watch.
    let (requests, stream) = mpsc::channel(1);
    let create = pb::WatchCreateRequest {
        key: etcd.full(prefix).into(),
        range_end: etcd.range_end(prefix).into(),
        start_revision: signed(*from),
        progress_notify: true,
        ..pb::WatchCreateRequest::default()
    };
    let create = pb::WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(create)),
    };
    if requests.send(create).await.is_err() {
        return Ok(Ended::Canceled("the stream of requests is closed".to_owned()));
    }
    let opened = tokio::time::timeout(CREATED, client.watch(led(ReceiverStream::new(stream)))).await;
    let opened = opened.map_err(|_| Status::deadline_exceeded(format!("no answer within {CREATED:?}")))?;
    let mut answers = opened?.into_inner();
    let mut is_created = false;
    loop {
        let answer = if is_created {
            answers.message().await?
        } else {
            let answer = tokio::time::timeout(CREATED, answers.message()).await;
            answer.map_err(|_| Status::deadline_exceeded(format!("no watch within {CREATED:?}")))??
        };
        let Some(answer) = answer else {
            return Ok(Ended::Canceled("the stream ended".to_owned()));
        };
        is_created |= answer.created;
        // etcd says `created` first even if it is compacted, and this in its second message.
        if answer.compact_revision > 0 {
            return Ok(Ended::Compacted(
                unsigned(answer.compact_revision).saturating_sub(1),
            ));
        }
        if answer.canceled {
            return Ok(Ended::Canceled(answer.cancel_reason));
        }
        let mut events = Vec::with_capacity(answer.events.len());
        for event in answer.events {
            let is_put = event.r#type() == super::mvccpb::event::EventType::Put;
            let Some(kv) = event.kv else { continue };
            let entry = etcd.entry(kv);
            *from = (*from).max(entry.modified + 1);
            events.push(if is_put {
                Event::Put(entry)
            } else {
                Event::Delete {
                    key: entry.key,
                    modified: entry.modified,
                }
            });
        }
        if !events.is_empty() && out.send(Ok(events)).await.is_err() {
            return Ok(Ended::Unheard);
        }
    }
}

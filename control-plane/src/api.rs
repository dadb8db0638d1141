//! The API for people and tools, over gRPC.

use crate::access::caller;
use crate::policy::{Policy, wire};
use crate::proxies::{Proxies, Standing};
pub(crate) use crate::refusal::{bad, status};
use crate::refusal::compacted;
use leeward_policy::{Key, Name};
use leeward_proto::v1::policy_service_server::PolicyService;
use leeward_proto::{kind_of, parse_key, render_key, v1};
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

/// Serves the API.
#[derive(Clone, Debug)]
pub struct Api {
    policy: Policy,
    proxies: Arc<Proxies>,
    stop: CancellationToken,
}

/// Resources on a page, where the request doesn't say.
const PAGE: u32 = 1000;
/// Resources on a page at most.
const MAX_PAGE: u32 = 10_000;
/// Events to a watcher that may wait; the next are read from the store when there is room.
const OUTBOX: usize = 64;

impl Api {
    /// An API to `policy`. Watches end when `stop` is cancelled.
    pub fn new(policy: Policy, proxies: Arc<Proxies>, stop: CancellationToken) -> Self {
        Self {
            policy,
            proxies,
            stop,
        }
    }

    /// Whether changes after a revision can be told from here.
    fn check_revision(&self, after: u64) -> Result<(), Status> {
        let current = self.policy.revision();
        if after > current {
            return Err(bad(
                "after_revision",
                format!("{after} has not been reached; the store is at {current}"),
            ));
        }
        Ok(())
    }
}

fn with_status(standing: &Standing, key: &Key, mut resource: v1::Resource) -> v1::Resource {
    let revision = resource.metadata.as_ref().map_or(0, |m| m.revision);
    resource.status = Some(standing.of(key, revision));
    resource
}

/// Who called, once the door has let them in. The table of `access/methods.rs` says what each method takes; what a method
/// does with single resources it asks the [`crate::access::Caller`] about.
pub(crate) fn authorize<T>(request: &Request<T>) -> Result<String, Status> {
    caller(request).map(|caller| caller.who().to_owned())
}

type Events = Pin<Box<dyn tokio_stream::Stream<Item = Result<v1::WatchEvent, Status>> + Send>>;

#[tonic::async_trait]
impl PolicyService for Api {
    async fn apply(&self, request: Request<v1::ApplyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let who = authorize(&request)?;
        let v1::ApplyRequest { resources, dry_run } = request.into_inner();
        let count = resources.len();
        let applied = self
            .policy
            .apply(resources, dry_run, &who)
            .await
            .map_err(status)?;
        let changed = applied.changed.iter().filter(|c| **c).count();
        tracing::info!(who, dry_run, count, changed, revision = applied.revision, "apply");
        Ok(Response::new(v1::ApplyResponse {
            resources: applied.resources,
            changed: applied.changed,
            revision: applied.revision,
        }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::Resource>, Status> {
        authorize(&request)?;
        let key = key(request.into_inner().r#ref.as_ref())?;
        let resource = self.policy.get(key.clone()).await.map_err(status)?;
        Ok(Response::new(with_status(
            &self.proxies.standing(),
            &key,
            resource,
        )))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Result<Response<v1::ListResponse>, Status> {
        authorize(&request)?;
        let request = request.into_inner();
        let kind = kind_of(request.kind());
        let size = match request.page_size {
            0 => PAGE,
            size if size <= MAX_PAGE => size,
            size => {
                return Err(bad(
                    "page_size",
                    format!("{size} is out of range; want at most {MAX_PAGE}"),
                ));
            }
        };
        let after = match request.page_token.as_str() {
            "" => None,
            token => {
                Some(place(token).ok_or_else(|| bad("page_token", format!("{token:?} is not one of ours")))?)
            }
        };
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        // One more shows whether there is another page.
        let (mut found, revision) = self.policy.list(kind, after, size + 1).await.map_err(status)?;
        let more = found.len() > size;
        found.truncate(size);
        let last = found.last().filter(|_| more).map(|(key, _)| key.to_string());
        let standing = self.proxies.standing();
        let resources = found
            .into_iter()
            .map(|(key, resource)| with_status(&standing, &key, resource))
            .collect();
        Ok(Response::new(v1::ListResponse {
            resources,
            next_page_token: last.unwrap_or_default(),
            revision,
        }))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        let who = authorize(&request)?;
        let request = request.into_inner();
        let key = key(request.r#ref.as_ref())?;
        let revision = self
            .policy
            .delete(key.clone(), request.revision, &who)
            .await
            .map_err(status)?;
        tracing::info!(who, resource = %key, revision, "delete");
        Ok(Response::new(v1::DeleteResponse { revision }))
    }

    type WatchStream = Events;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Events>, Status> {
        authorize(&request)?;
        let request = request.into_inner();
        self.check_revision(request.after_revision)?;
        let kind = kind_of(request.kind());
        let (outbox, events) = mpsc::channel(OUTBOX);
        let (policy, stop) = (self.policy.clone(), self.stop.clone());
        // Its owner is the receiver: it ends when the watcher is gone, or with the server.
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = watch(policy, request.after_revision, kind, outbox) => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn list_proxies(
        &self,
        request: Request<v1::ListProxiesRequest>,
    ) -> Result<Response<v1::ListProxiesResponse>, Status> {
        authorize(&request)?;
        Ok(Response::new(v1::ListProxiesResponse {
            proxies: self.proxies.list(),
            revision: self.policy.revision(),
        }))
    }
}

async fn watch(
    policy: Policy,
    mut after: u64,
    kind: Option<leeward_policy::Kind>,
    outbox: mpsc::Sender<Result<v1::WatchEvent, Status>>,
) {
    let mut revisions = policy.watch();
    loop {
        // Marked as seen before reading, so that a write in between is not missed.
        revisions.borrow_and_update();
        let changes = match policy.changes_since(after).await {
            Ok(Some(changes)) => changes,
            // A watch from the beginning wants what is there, not what was deleted before it looked.
            Ok(None) if after == 0 => match policy.everything().await {
                Ok(everything) => everything,
                Err(error) => return drop(outbox.send(Err(status(error))).await),
            },
            Ok(None) => {
                return drop(outbox.send(Err(compacted(after))).await);
            }
            Err(error) => return drop(outbox.send(Err(status(error))).await),
        };
        let wanted = |key: &Key| kind.is_none_or(|kind| kind == key.kind);
        let mut events = Vec::new();
        for stored in changes.upserts.iter().filter(|s| wanted(&s.key)) {
            let event = Some(v1::watch_event::Event::Put(wire(stored)));
            events.push(v1::WatchEvent {
                event,
                revision: stored.revision,
            });
        }
        if after > 0 {
            for (revision, key) in changes.deletes.iter().filter(|(_, key)| wanted(key)) {
                let event = Some(v1::watch_event::Event::Deleted(render_key(key)));
                events.push(v1::WatchEvent {
                    event,
                    revision: *revision,
                });
            }
        }
        events.sort_by_key(|event| event.revision);
        let synced = Some(v1::watch_event::Event::Synced(changes.to));
        events.push(v1::WatchEvent {
            event: synced,
            revision: changes.to,
        });
        for event in events {
            if outbox.send(Ok(event)).await.is_err() {
                return;
            }
        }
        after = changes.to;
        if revisions.changed().await.is_err() {
            return;
        }
    }
}

fn key(wire: Option<&v1::ResourceRef>) -> Result<Key, Status> {
    let wire = wire.ok_or_else(|| bad("ref", "is missing".to_owned()))?;
    parse_key(wire).map_err(|field| bad(&format!("ref.{}", field.path), field.reason))
}

/// A page token is the last key of the page before, as `Kind/name`.
fn place(token: &str) -> Option<Key> {
    let (kind, name) = token.split_once('/')?;
    let kind = leeward_policy::Kind::ALL
        .into_iter()
        .find(|k| k.as_str() == kind)?;
    Some(Key {
        kind,
        name: Name::parse(name).ok()?,
    })
}

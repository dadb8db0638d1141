//! The API for people and tools, over gRPC.

use crate::kv::KvError;
use crate::policy::{Policy, Refused, Way, wire};
use crate::proxies::{Proxies, Standing};
use crate::rollout::Rollouts;
use crate::store::{Author, StoreError};
use leeward_identity::{PeerInfo, Role};
use leeward_policy::{Key, Name};
use leeward_proto::v1::policy_service_server::PolicyService;
use leeward_proto::{kind_of, parse_key, render_key, v1};
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// Serves the API.
#[derive(Clone, Debug)]
pub struct Api {
    policy: Policy,
    proxies: Arc<Proxies>,
    rollouts: Rollouts,
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
    pub(crate) fn new(
        policy: Policy,
        proxies: Arc<Proxies>,
        rollouts: Rollouts,
        stop: CancellationToken,
    ) -> Self {
        Self {
            policy,
            proxies,
            rollouts,
            stop,
        }
    }

    /// Whether changes after a revision can be told from here.
    async fn check_revision(&self, after: u64) -> Result<(), Status> {
        let settled = self.policy.store().settle().await;
        let current = settled.map_err(|error| status(error.into()))?;
        if after > current {
            return Err(bad(
                "after_revision",
                format!("{after} has not been reached; the store is at {current}"),
            ));
        }
        Ok(())
    }
}

fn author<T>(request: &Request<T>, who: &str) -> Author {
    let peer = request.extensions().get::<PeerInfo>();
    Author {
        from: peer.map(|peer| peer.address.to_string()).unwrap_or_default(),
        ..Author::of(who)
    }
}

fn with_status(standing: &Standing, key: &Key, mut resource: v1::Resource) -> v1::Resource {
    let revision = resource.metadata.as_ref().map_or(0, |m| m.revision);
    resource.status = Some(standing.of(key, revision));
    resource
}

/// Who may use the API: people and tools, not proxies.
pub(crate) fn authorize<T>(request: &Request<T>) -> Result<String, Status> {
    let peer = request.extensions().get::<PeerInfo>();
    let peer = peer.ok_or_else(|| Status::unauthenticated("no peer certificate"))?;
    if crate::policy::wall() > peer.not_after {
        // The connection has outlived it.
        return Err(Status::unauthenticated(format!(
            "the certificate of {} has ended; connect again with another",
            peer.id
        )));
    }
    match peer.id.role() {
        Role::User { .. } | Role::Control => Ok(peer.id.to_string()),
        Role::Proxy { .. } | Role::Other => Err(Status::permission_denied(format!(
            "{} is not a user; the API is for users",
            peer.id
        ))),
    }
}

type Events = Pin<Box<dyn tokio_stream::Stream<Item = Result<v1::WatchEvent, Status>> + Send>>;

#[tonic::async_trait]
impl PolicyService for Api {
    async fn apply(&self, request: Request<v1::ApplyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let who = authorize(&request)?;
        let author = author(&request, &who);
        let v1::ApplyRequest {
            resources,
            dry_run,
            rollout,
            at_once,
            supersede,
        } = request.into_inner();
        let way = way(&rollout, at_once, supersede)?;
        let count = resources.len();
        let applied = self
            .policy
            .apply_by(resources, dry_run, author, way)
            .await
            .map_err(status)?;
        let changed = applied.changed.iter().filter(|c| **c).count();
        tracing::info!(who, dry_run, count, changed, revision = applied.revision, "apply");
        let warnings = self.policy.warnings(&applied.resources).await;
        Ok(Response::new(v1::ApplyResponse {
            resources: applied.resources,
            changed: applied.changed,
            revision: applied.revision,
            warnings,
            rollout: applied.rollout.map_or_else(String::new, |name| name.to_string()),
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
        let author = author(&request, &who);
        let request = request.into_inner();
        let key = key(request.r#ref.as_ref())?;
        let way = way(&request.rollout, request.at_once, request.supersede)?;
        let revision = self
            .policy
            .delete_by(key.clone(), request.revision, author, way)
            .await
            .map_err(status)?;
        tracing::info!(who, resource = %key, revision, "delete");
        Ok(Response::new(v1::DeleteResponse { revision }))
    }

    type WatchStream = Events;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Events>, Status> {
        authorize(&request)?;
        let request = request.into_inner();
        self.check_revision(request.after_revision).await?;
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
        let (proxies, missing) = self.rollouts.all_proxies().await;
        Ok(Response::new(v1::ListProxiesResponse {
            proxies,
            revision: self.policy.revision(),
            missing,
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
        let changes = match policy.changes_since(after) {
            Some(changes) => changes,
            // A watch from the beginning wants what is there, not what was deleted before it looked.
            None if after == 0 => policy.everything(),
            None => {
                let gone = Status::out_of_range(format!(
                    "changes after revision {after} are no longer known; list again and watch from there"
                ));
                return drop(outbox.send(Err(gone)).await);
            }
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

/// How a change is to get to proxies.
fn way(rollout: &str, at_once: bool, supersede: bool) -> Result<Way, Status> {
    let rollout = match rollout {
        "" => None,
        text => Some(Name::parse(text).map_err(|error| bad("rollout", format!("{text:?} {error}")))?),
    };
    if rollout.is_some() && at_once {
        return Err(bad(
            "at_once",
            "stands beside rollout; want one of them".to_owned(),
        ));
    }
    Ok(Way {
        rollout,
        at_once,
        supersede,
    })
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

pub(crate) fn bad(path: &str, reason: String) -> Status {
    let details = ErrorDetails::with_bad_request_violation(path, reason.as_str());
    Status::with_error_details(Code::InvalidArgument, format!("{path}: {reason}"), details)
}

/// The longest message of a status, in bytes, and the most of details. Both travel in headers, of which
/// clients take 16 KiB, the message twice and once with up to three bytes for one.
const MAX_SHOWN: usize = 1500;
const MAX_DETAILS: usize = 3000;

fn cut(text: &str, bytes: usize) -> String {
    let end = text.floor_char_boundary(bytes);
    text.get(..end).unwrap_or_default().to_owned()
}

/// The one table from what was refused to what the caller sees.
pub(crate) fn status(refused: Refused) -> Status {
    let message = refused.to_string();
    match refused {
        Refused::Bad(fields) => {
            let all = fields.len();
            let mut budget = MAX_DETAILS;
            let fit = fields.into_iter().take_while(|f| {
                let size = f.path.len() + f.reason.len() + 16;
                let fits = size <= budget;
                budget = budget.saturating_sub(size);
                fits
            });
            let violations: Vec<_> = fit.map(|f| FieldViolation::new(f.path, f.reason)).collect();
            let mut shown = cut(&message, MAX_SHOWN);
            if violations.len() < all || shown.len() < message.len() {
                shown.push_str(&format!(" … ({all} bad fields in all)"));
            }
            let details = ErrorDetails::with_bad_request(violations);
            Status::with_error_details(Code::InvalidArgument, shown, details)
        }
        Refused::InUse { .. } => Status::failed_precondition(cut(&message, MAX_SHOWN)),
        Refused::ModuleInUse { .. } => Status::failed_precondition(cut(&message, MAX_SHOWN)),
        Refused::UnderWay { .. } | Refused::Supersedes(_) => {
            Status::failed_precondition(cut(&message, MAX_SHOWN))
        }
        Refused::NotFound(_) | Refused::NoModule(_) | Refused::NoRevision(_) => Status::not_found(message),
        Refused::Full { .. }
        | Refused::TooMany(_)
        | Refused::Store(
            StoreError::Signatures(_)
            | StoreError::Tokens(_)
            | StoreError::Resources { .. }
            | StoreError::TooLarge { .. }
            | StoreError::Kv(KvError::Full { .. } | KvError::TooLarge { .. }),
        ) => Status::resource_exhausted(message),
        Refused::Store(StoreError::Kv(
            KvError::Unavailable { .. } | KvError::Unknown { .. } | KvError::Contended(_),
        )) => Status::unavailable(message),
        Refused::Store(StoreError::ReadOnly(_)) => Status::failed_precondition(message),
        Refused::Store(StoreError::Conflict { .. } | StoreError::Moved { .. } | StoreError::Fenced(_)) => {
            Status::aborted(message)
        }
        Refused::Store(_) | Refused::Broken => {
            tracing::error!(error = message, "the store failed");
            Status::internal(message)
        }
    }
}

//! The API for people and tools, over gRPC.

mod watch;

use crate::access::{Caller, caller};
use crate::audit::Written;
use crate::policy::{Apply, Policy, Prune, Way};
use crate::proxies::{Proxies, Standing};
pub(crate) use crate::refusal::{bad, status};
use crate::rollout::Rollouts;
use leeward_policy::{Key, Name, Selector};
use leeward_proto::v1::policy_service_server::PolicyService;
use leeward_proto::{kind_of, parse_key, render_key, v1};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use watch::Watcher;

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
/// Resources that a prune deletes at most, where the request doesn't say.
const MAX_DELETES: usize = 10;
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

fn with_status(standing: &Standing, key: &Key, mut resource: v1::Resource) -> v1::Resource {
    let revision = resource.metadata.as_ref().map_or(0, |m| m.revision);
    resource.status = Some(standing.of(key, revision));
    resource
}

/// Who called, once the door has let them in. The table of `access/methods.rs` says what each method takes; what a method
/// does with single resources it asks the [`Caller`] about.
pub(crate) fn authorize<T>(request: &Request<T>) -> Result<String, Status> {
    caller(request).map(|caller| caller.who().to_owned())
}

type Events = Pin<Box<dyn tokio_stream::Stream<Item = Result<v1::WatchEvent, Status>> + Send>>;

#[tonic::async_trait]
impl PolicyService for Api {
    async fn apply(&self, request: Request<v1::ApplyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let caller = caller(&request)?;
        let what = what(request.into_inner(), &caller)?;
        if what.dry_run {
            caller.is_dry();
        }
        let author = caller.author();
        let applied = Box::pin(self.policy.apply_as(what, author))
            .await
            .map_err(status)?;
        if !applied.written.is_empty() {
            caller.has_written(Written {
                revision: applied.revision,
                changes: applied.written,
            });
        } else {
            // Everything is as asked already.
            caller.is_dry();
        }
        // They speak of other resources, too.
        let warnings = if caller.grants().sees_all() {
            self.policy.warnings(&applied.resources).await
        } else {
            Vec::new()
        };
        Ok(Response::new(v1::ApplyResponse {
            resources: applied.resources,
            changed: applied.changed,
            revision: applied.revision,
            pruned: applied.pruned.iter().map(render_key).collect(),
            warnings,
            rollout: applied.rollout.map_or_else(String::new, |name| name.to_string()),
        }))
    }

    async fn diff(&self, request: Request<v1::ApplyRequest>) -> Result<Response<v1::DiffResponse>, Status> {
        let caller = caller(&request)?;
        let what = Apply {
            dry_run: true,
            ..what(request.into_inner(), &caller)?
        };
        let author = caller.author();
        let applied = Box::pin(self.policy.apply_as(what, author))
            .await
            .map_err(status)?;
        let change = |(key, before, after)| v1::ResourceDiff {
            r#ref: Some(render_key(&key)),
            before,
            after,
        };
        Ok(Response::new(v1::DiffResponse {
            changes: applied.diffs.into_iter().map(change).collect(),
            revision: applied.at,
        }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::Resource>, Status> {
        let caller = caller(&request)?;
        let key = key(request.into_inner().r#ref.as_ref())?;
        // Whoever sees nothing of the kind is told so, whether there is such a resource or not.
        caller.check_read(&key, None)?;
        let resource = self.policy.get(key.clone()).await.map_err(status)?;
        caller.check_read(&key, Some(&labels(&resource)))?;
        Ok(Response::new(with_status(
            &self.proxies.standing(),
            &key,
            resource,
        )))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Result<Response<v1::ListResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let kind = kind_of(request.kind());
        let selector = selector("selector", &request.selector)?;
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
        let grants = caller.grants();
        // One more shows whether there is another page.
        let listed = if selector.is_empty() && grants.sees_all() {
            self.policy.list(kind, after, size + 1).await
        } else {
            let wanted = move |kind, labels: &_| selector.matches(labels) && grants.sees(kind, labels);
            self.policy.list_where(kind, after, size + 1, wanted).await
        };
        let (mut found, revision) = listed.map_err(status)?;
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
        let caller = caller(&request)?;
        let request = request.into_inner();
        let key = key(request.r#ref.as_ref())?;
        let way = way(&request.rollout, request.at_once, request.supersede)?;
        let there = self.policy.labels([key.clone()]).await.map_err(status)?;
        caller.check_read(&key, there.get(&key))?;
        let author = caller.author();
        let deleted = self
            .policy
            .delete_as(key.clone(), request.revision, author, Some(caller.clone()), way);
        let deleted = Box::pin(deleted).await;
        let (revision, before) = deleted.map_err(status)?;
        caller.has_written(Written {
            revision,
            changes: vec![(key, before, 0)],
        });
        Ok(Response::new(v1::DeleteResponse { revision }))
    }

    type WatchStream = Events;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Events>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        self.check_revision(request.after_revision).await?;
        let watcher = Watcher {
            kind: kind_of(request.kind()),
            selector: selector("selector", &request.selector)?,
            grants: caller.grants(),
            after: request.after_revision,
            policy: self.policy.clone(),
            caller,
        };
        let (outbox, events) = mpsc::channel(OUTBOX);
        let stop = self.stop.clone();
        // Its owner is the receiver: it ends when the watcher is gone, or with the server.
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = watcher.run(outbox) => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn list_proxies(
        &self,
        request: Request<v1::ListProxiesRequest>,
    ) -> Result<Response<v1::ListProxiesResponse>, Status> {
        let caller = caller(&request)?;
        let grants = caller.grants();
        let (mut proxies, missing) = self.rollouts.all_proxies().await;
        if !grants.sees_all() {
            // What proxies refuse is told of resources that the caller sees.
            let named = |q: &v1::Quarantined| q.r#ref.as_ref().and_then(|named| parse_key(named).ok());
            let keys = proxies
                .iter()
                .flat_map(|proxy| &proxy.quarantined)
                .filter_map(named);
            let labels = self
                .policy
                .labels(keys.collect::<Vec<_>>())
                .await
                .map_err(status)?;
            let sees = |q: &v1::Quarantined| {
                let key = named(q);
                let labels = key.as_ref().and_then(|key| labels.get(key));
                key.as_ref()
                    .zip(labels)
                    .is_some_and(|(key, labels)| grants.sees(key.kind, labels))
            };
            for proxy in &mut proxies {
                proxy.quarantined.retain(sees);
            }
        }
        Ok(Response::new(v1::ListProxiesResponse {
            proxies,
            revision: self.policy.revision(),
            missing,
        }))
    }
}

/// What a request wants applied.
fn what(request: v1::ApplyRequest, caller: &Caller) -> Result<Apply, Status> {
    let way = way(&request.rollout, request.at_once, request.supersede)?;
    let prune = match request.prune {
        None => None,
        Some(prune) => Some(Prune {
            selector: selector("prune.selector", &prune.selector)?,
            max_deletes: match prune.max_deletes {
                0 => MAX_DELETES,
                count if count <= MAX_PAGE => usize::try_from(count).unwrap_or(MAX_DELETES),
                count => {
                    let why = format!("{count} is out of range; want at most {MAX_PAGE}");
                    return Err(bad("prune.max_deletes", why));
                }
            },
        }),
    };
    Ok(Apply {
        resources: request.resources,
        dry_run: request.dry_run,
        if_absent: request.if_absent,
        manager: request.manager,
        force: request.force,
        prune,
        way,
        caller: Some(caller.clone()),
    })
}

fn selector(field: &str, text: &str) -> Result<Selector, Status> {
    Selector::parse(text).map_err(|error| bad(field, error.to_string()))
}

fn labels(resource: &v1::Resource) -> BTreeMap<String, String> {
    let metadata = resource.metadata.iter();
    metadata.flat_map(|metadata| metadata.labels.clone()).collect()
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

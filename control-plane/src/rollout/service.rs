//! What people see of changes and do with them, over gRPC; and what control planes tell each other.

use super::ledger::{ROLLOUT, TAKES_BACK};
use super::machine::Command;
use super::{Rollouts, keep, now, peers};
use crate::access::caller;
use crate::api::{authorize, bad, status};
use crate::audit::Written;
use crate::policy::{Refused, Way, timestamp, wire};
use crate::refusal::{Reason, refuse};
use crate::store::{Record, ResourceChange, StoreError, Stored};
use leeward_policy::Name;
use leeward_proto::v1;
use leeward_proto::v1::peer_service_server::PeerService;
use leeward_proto::v1::rollout_service_server::RolloutService;
use leeward_proto::{parse_key, render_key};
use tonic::{Code, Request, Response, Status};

/// What can't be done with a rollout as it is.
fn blocked(why: impl AsRef<str>) -> Status {
    refuse(Code::FailedPrecondition, Reason::NoSuchRollout, why)
}

/// Revisions on a page, where the request doesn't say.
const PAGE: u32 = 20;
/// Revisions on a page at most.
const MAX_PAGE: u32 = 1000;
/// Revisions that are looked through for those that changed one resource.
const LOOKED_THROUGH: usize = 100_000;
/// Revisions that are read at once for it.
const READ: usize = 200;
/// Changes that a page names: past that it ends early.
const MAX_NAMED: usize = 50_000;
/// Bytes of resources in an answer; of more, the names must do.
const MAX_SHOWN: usize = 8 << 20;
/// How often a rollout is steered against others who do.
const TRIES: usize = 20;

/// Serves people.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    rollouts: Rollouts,
}

/// Serves other control planes.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    rollouts: Rollouts,
}

impl Service {
    pub(crate) const fn new(rollouts: Rollouts) -> Self {
        Self { rollouts }
    }
}

impl Peer {
    pub(crate) const fn new(rollouts: Rollouts) -> Self {
        Self { rollouts }
    }
}

fn failed(error: StoreError) -> Status {
    status(Refused::Store(error))
}

impl Rollouts {
    async fn show(&self) -> Result<v1::Rollout, Status> {
        self.policy.store().settle().await.map_err(failed)?;
        let page = self.ledger.read().await.map_err(failed)?;
        let rollout = match &page.last {
            Some(last) => match &last.rollout {
                Some(rollout) => rollout.clone(),
                None => self.begin(last, last.change.time_ms).await.map_err(status)?,
            },
            None => page
                .kept
                .ok_or_else(|| refuse(Code::NotFound, Reason::NoSuchRollout, "there has been no rollout"))?,
        };
        let mut shown = keep::wire(&rollout);
        if rollout.is_open() {
            self.follow().await.map_err(failed)?;
            let sight = self.sight(rollout.revision, None).await;
            let (with, without) = (sight.new.with.total(), sight.new.without.total());
            shown.sight = Some(v1::RolloutSight {
                proxies: sight.census.live(),
                members: sight.members,
                running: sight.running,
                requests_with: with.requests,
                failures_with: with.failures,
                requests_without: without.requests,
                failures_without: without.failures,
                missing: sight.missing,
            });
        }
        Ok(shown)
    }

    async fn steer(&self, request: v1::SteerRequest, who: &str) -> Result<(), Status> {
        let command = match request.command() {
            v1::RolloutCommand::Unspecified => {
                return Err(bad(
                    "command",
                    "is missing; want PAUSE, RESUME, PROMOTE, PROMOTE_FULL or ABORT".to_owned(),
                ));
            }
            v1::RolloutCommand::Pause => Command::Pause,
            v1::RolloutCommand::Resume => Command::Resume,
            v1::RolloutCommand::Promote => Command::Promote,
            v1::RolloutCommand::PromoteFull => Command::PromoteFull,
            v1::RolloutCommand::Abort => Command::Abort,
        };
        let store = self.policy.store();
        for _ in 0..TRIES {
            store.settle().await.map_err(failed)?;
            let page = self.ledger.read().await.map_err(failed)?;
            let Some(last) = page.open() else {
                return Err(blocked("no rollout is under way"));
            };
            let revision = last.change.revision;
            if request.revision != 0 && request.revision != revision {
                return Err(blocked(format!(
                    "the rollout that is under way is that of revision {revision}, not of {}",
                    request.revision
                )));
            }
            let mut rollout = match &last.rollout {
                Some(rollout) => rollout.clone(),
                None => self.begin(last, store.now_ms()).await.map_err(status)?,
            };
            rollout.steer(command, who, store.now_ms()).map_err(blocked)?;
            if self
                .ledger
                .keep(&rollout, page.modified, None)
                .await
                .map_err(failed)?
                .is_some()
            {
                tracing::info!(who, revision, ?command, "a rollout is steered");
                return self.follow().await.map_err(failed);
            }
        }
        Err(refuse(
            Code::Aborted,
            Reason::Contended,
            "the rollout was changed by others again and again; try again",
        ))
    }
}

#[tonic::async_trait]
impl RolloutService for Service {
    async fn get_rollout(
        &self,
        request: Request<v1::GetRolloutRequest>,
    ) -> Result<Response<v1::Rollout>, Status> {
        authorize(&request)?;
        Ok(Response::new(self.rollouts.show().await?))
    }

    async fn steer(&self, request: Request<v1::SteerRequest>) -> Result<Response<v1::Rollout>, Status> {
        let who = authorize(&request)?;
        self.rollouts.steer(request.into_inner(), &who).await?;
        Ok(Response::new(self.rollouts.show().await?))
    }

    async fn get_progress(
        &self,
        request: Request<v1::GetProgressRequest>,
    ) -> Result<Response<v1::Progress>, Status> {
        authorize(&request)?;
        let wanted = request.into_inner().revision;
        let store = self.rollouts.policy.store();
        let head = if wanted == 0 || wanted > store.revision() {
            store.settle().await.map_err(failed)?
        } else {
            store.revision()
        };
        if wanted > head {
            return Err(bad(
                "revision",
                format!("{wanted} is ahead of the store, which is at {head}"),
            ));
        }
        let revision = if wanted == 0 { head } else { wanted };
        Ok(Response::new(self.rollouts.progress(revision).await))
    }

    async fn list_revisions(
        &self,
        request: Request<v1::ListRevisionsRequest>,
    ) -> Result<Response<v1::ListRevisionsResponse>, Status> {
        authorize(&request)?;
        let request = request.into_inner();
        let limit = match request.limit {
            0 => PAGE,
            limit if limit <= MAX_PAGE => limit,
            limit => {
                return Err(bad(
                    "limit",
                    format!("{limit} is out of range; want at most {MAX_PAGE}"),
                ));
            }
        };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let wanted = match &request.resource {
            Some(wire) => {
                let key = parse_key(wire);
                Some(key.map_err(|field| bad(&format!("resource.{}", field.path), field.reason))?)
            }
            None => None,
        };
        let store = self.rollouts.policy.store();
        store.settle().await.map_err(failed)?;
        let (mut revisions, mut before, mut looked, mut named) = (Vec::new(), request.before, 0, 0);
        while revisions.len() < limit && looked < LOOKED_THROUGH {
            let read = if wanted.is_some() {
                READ
            } else {
                limit - revisions.len()
            };
            let records = store.history(before, read).await.map_err(failed)?;
            let Some(oldest) = records.last().map(|record| record.revision) else {
                break;
            };
            looked += records.len();
            before = oldest;
            let touches = |record: &&Record| {
                let wanted = wanted.as_ref();
                wanted.is_none_or(|key| record.changes.iter().any(|change| change.key == *key))
            };
            for record in records.iter().filter(touches).take(limit - revisions.len()) {
                named += record.changes.len();
                revisions.push(revision(record, false));
                if named >= MAX_NAMED {
                    return Ok(Response::new(v1::ListRevisionsResponse { revisions }));
                }
            }
            if before <= 1 {
                break;
            }
        }
        Ok(Response::new(v1::ListRevisionsResponse { revisions }))
    }

    async fn get_revision(
        &self,
        request: Request<v1::GetRevisionRequest>,
    ) -> Result<Response<v1::Revision>, Status> {
        authorize(&request)?;
        let wanted = request.into_inner().revision;
        let store = self.rollouts.policy.store();
        store.settle().await.map_err(failed)?;
        let record = store.record(wanted).await.map_err(failed)?;
        let record = record.ok_or_else(|| status(Refused::NoRevision(wanted)))?;
        Ok(Response::new(revision(&record, true)))
    }

    async fn rollback(
        &self,
        request: Request<v1::RollbackRequest>,
    ) -> Result<Response<v1::RollbackResponse>, Status> {
        let caller = caller(&request)?;
        let who = caller.who().to_owned();
        let request = request.into_inner();
        let rollout = match request.rollout.as_str() {
            "" => None,
            text => Some(Name::parse(text).map_err(|error| bad("rollout", format!("{text:?} {error}")))?),
        };
        let mut author = caller.author();
        author.message = if request.message.is_empty() {
            format!("rollback to revision {}", request.revision)
        } else {
            request.message.clone()
        };
        let way = Way {
            at_once: rollout.is_none(),
            rollout,
            supersede: request.supersede,
        };
        let done = self
            .rollouts
            .policy
            .rollback(request.revision, request.dry_run, author, way)
            .await
            .map_err(status)?;
        if request.dry_run || done.changes.is_empty() {
            caller.is_dry();
        } else {
            let revision = |stored: &Option<Stored>| stored.as_ref().map_or(0, |stored| stored.revision);
            let change = |change: &ResourceChange| {
                let after = if change.after.is_some() { done.revision } else { 0 };
                (change.key.clone(), revision(&change.before), after)
            };
            caller.has_written(Written {
                revision: done.revision,
                changes: done.changes.iter().map(change).collect(),
            });
        }
        let whole = fits(&done.changes);
        tracing::info!(
            who,
            dry_run = request.dry_run,
            to = request.revision,
            revision = done.revision,
            "rollback"
        );
        Ok(Response::new(v1::RollbackResponse {
            revision: done.revision,
            changes: done
                .changes
                .iter()
                .map(|change| self::change(change, whole))
                .collect(),
        }))
    }
}

#[tonic::async_trait]
impl PeerService for Peer {
    async fn get_standing(
        &self,
        request: Request<v1::GetStandingRequest>,
    ) -> Result<Response<v1::Standing>, Status> {
        peers::authorize(&request)?;
        let request = request.into_inner();
        let rollouts = &self.rollouts;
        let mut standing = rollouts.proxies.tell(request.laggards_of, &request.seek, now());
        rollouts
            .policy
            .store()
            .member()
            .clone_into(&mut standing.incarnation);
        if request.rollout != 0 {
            standing.rollout = rollouts.count(request.rollout);
        }
        Ok(Response::new(standing))
    }

    async fn list_own_proxies(
        &self,
        request: Request<v1::ListOwnProxiesRequest>,
    ) -> Result<Response<v1::ListOwnProxiesResponse>, Status> {
        peers::authorize(&request)?;
        let proxies = self.rollouts.proxies.list();
        Ok(Response::new(v1::ListOwnProxiesResponse { proxies }))
    }
}

impl Rollouts {
    /// The proxies of all control planes, by zone and name, and the control planes that didn't answer.
    pub(crate) async fn all_proxies(&self) -> (Vec<v1::ProxyStatus>, Vec<String>) {
        let heard = self.peers.proxies().await;
        let others = heard.answers.into_iter().flat_map(|answer| answer.proxies);
        let mut all = std::collections::BTreeMap::new();
        for proxy in self.proxies.list().into_iter().chain(others) {
            let id = (proxy.zone.clone(), proxy.name.clone());
            let seen = |proxy: &v1::ProxyStatus| {
                let last = proxy.last_seen.unwrap_or_default();
                (proxy.connected, last.seconds, last.nanos)
            };
            match all.entry(id) {
                std::collections::btree_map::Entry::Vacant(place) => drop(place.insert(proxy)),
                std::collections::btree_map::Entry::Occupied(mut place) => {
                    if seen(place.get()) < seen(&proxy) {
                        place.insert(proxy);
                    }
                }
            }
        }
        (all.into_values().collect(), heard.missing)
    }
}

/// Whether changes fit into an answer with what was before and after them.
fn fits(changes: &[ResourceChange]) -> bool {
    let both = changes.iter().flat_map(|change| [&change.before, &change.after]);
    both.flatten().map(|stored| stored.payload.len()).sum::<usize>() <= MAX_SHOWN
}

fn revision(record: &Record, whole: bool) -> v1::Revision {
    let whole = whole && fits(&record.changes);
    let label = |name: &str| record.author.labels.get(name).cloned().unwrap_or_default();
    v1::Revision {
        revision: record.revision,
        time: Some(timestamp(record.time_ms)),
        by: record.author.who.clone(),
        message: record.author.message.clone(),
        changes: record.changes.iter().map(|c| change(c, whole)).collect(),
        rollout: label(ROLLOUT),
        takes_back: label(TAKES_BACK).parse().unwrap_or(0),
    }
}

fn change(change: &ResourceChange, whole: bool) -> v1::RevisionChange {
    let kind = match (&change.before, &change.after) {
        (None, _) => v1::ChangeKind::Created,
        (Some(_), Some(_)) => v1::ChangeKind::Changed,
        (Some(_), None) => v1::ChangeKind::Deleted,
    };
    let shown = |stored: &Option<Stored>| stored.as_ref().filter(|_| whole).map(wire);
    v1::RevisionChange {
        r#ref: Some(render_key(&change.key)),
        before: shown(&change.before),
        after: shown(&change.after),
        kind: kind.into(),
    }
}

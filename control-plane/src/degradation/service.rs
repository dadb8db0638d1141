//! What people see of levels, over gRPC.

use super::Degradation;
use crate::access::{Grants, Scope, caller};
use crate::api::{bad, status};
use crate::policy::Policy;
use crate::policy::{InForce, timestamp, wall};
use crate::store::LevelChange;
use leeward_policy::model::AccessRole;
use leeward_policy::{Key, Kind, Name};
use leeward_proto::v1;
use leeward_proto::v1::degradation_service_server::DegradationService;
use std::collections::BTreeSet;
use tonic::{Request, Response, Status};

/// Changes on a page, where the request doesn't say.
const PAGE: u32 = 100;
/// Changes on a page at most.
const MAX_PAGE: u32 = 1000;

/// Serves levels and their audit.
#[derive(Clone, Debug)]
pub(crate) struct Levels {
    degradation: Degradation,
}

impl Levels {
    pub(crate) const fn new(degradation: Degradation) -> Self {
        Self { degradation }
    }
}

#[tonic::async_trait]
impl DegradationService for Levels {
    async fn list_levels(
        &self,
        request: Request<v1::ListLevelsRequest>,
    ) -> Result<Response<v1::ListLevelsResponse>, Status> {
        let grants = caller(&request)?.grants();
        let wanted = name(&request.into_inner().policy)?;
        let policy = &self.degradation.policy;
        if let Some(name) = wanted.clone() {
            let kind = Kind::DegradationPolicy;
            policy.get(Key { kind, name }).await.map_err(status)?;
        }
        let (connected, believed) = self.degradation.zones();
        let levels = policy.levels(connected, believed, wall()).await.map_err(status)?;
        let is_wanted = |level: &InForce| {
            wanted
                .as_ref()
                .is_none_or(|name| name.as_str() == level.policy.as_str())
        };
        let seen = seen(policy, &grants, levels.iter().map(|level| level.policy.as_str())).await?;
        let levels = levels.into_iter().filter(is_wanted);
        Ok(Response::new(v1::ListLevelsResponse {
            levels: levels
                .filter(|level| seen.contains(&level.policy))
                .map(level)
                .collect(),
        }))
    }

    async fn list_changes(
        &self,
        request: Request<v1::ListChangesRequest>,
    ) -> Result<Response<v1::ListChangesResponse>, Status> {
        let grants = caller(&request)?.grants();
        let request = request.into_inner();
        // One that is not there any more has a past.
        name(&request.policy)?;
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
        let policy = &self.degradation.policy;
        let changes = policy
            .level_changes(request.policy, request.before, size)
            .await
            .map_err(status)?;
        let seen = seen(
            policy,
            &grants,
            changes.iter().map(|(_, change)| change.policy.as_str()),
        )
        .await?;
        let changes = changes
            .into_iter()
            .filter(|(_, change)| seen.contains(&change.policy));
        Ok(Response::new(v1::ListChangesResponse {
            changes: changes.map(|(id, c)| change(id, c)).collect(),
        }))
    }
}

/// The policies among these that a caller may see. One that is not there any more has no labels that it could be seen by.
async fn seen(
    policy: &Policy,
    grants: &Grants,
    names: impl Iterator<Item = &str>,
) -> Result<BTreeSet<String>, Status> {
    let names: BTreeSet<String> = names.map(str::to_owned).collect();
    if grants.sees_all() {
        return Ok(names);
    }
    let kind = Kind::DegradationPolicy;
    let keys = names
        .iter()
        .filter_map(|name| Name::parse(name).ok())
        .map(|name| Key { kind, name });
    let labels = policy.labels(keys.collect::<Vec<_>>()).await.map_err(status)?;
    let sees = |name: &String| {
        let labels = labels
            .iter()
            .find(|(key, _)| key.name.as_str() == name)
            .map(|(_, labels)| labels);
        grants.has(AccessRole::Reader, Scope::Resource(kind, labels))
    };
    Ok(names.into_iter().filter(sees).collect())
}

fn name(text: &str) -> Result<Option<Name>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    let parsed = Name::parse(text);
    parsed.map(Some).map_err(|error| bad("policy", error.to_string()))
}

fn level(level: InForce) -> v1::ZoneLevel {
    v1::ZoneLevel {
        policy: level.policy,
        zone: level.zone,
        level: level.level,
        since: level.since_ms.map(timestamp),
        until: level.until_ms.map(timestamp),
        by: level.by,
        why: level.why,
    }
}

fn change(id: u64, change: LevelChange) -> v1::LevelChange {
    v1::LevelChange {
        id,
        time: Some(timestamp(change.time_ms)),
        policy: change.policy,
        zone: change.zone,
        from: change.from,
        to: change.to,
        by: change.by,
        why: change.why,
    }
}

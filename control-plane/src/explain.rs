//! What policy would make of a request, and what is wrong with it, over gRPC.

use crate::api::{authorize, bad, status};
use crate::policy::{Policy, Refused, lay_over, wall};
use leeward_identity::{Identity, SpiffeId};
use leeward_policy::{Key, Kind, Name, Staged, Viewer, World, explain};
use leeward_proto::v1::explain_service_server::ExplainService;
use leeward_proto::{parse_question, render_finding, v1};
use std::collections::BTreeSet;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Serves explanations and the linter.
#[derive(Clone, Debug)]
pub(crate) struct Explain {
    policy: Policy,
    identity: Arc<Identity>,
}

/// Findings of an answer.
const MAX_FINDINGS: usize = 5000;
/// Resources that are laid over policy.
const MAX_RESOURCES: usize = 10_000;

impl Explain {
    pub(crate) const fn new(policy: Policy, identity: Arc<Identity>) -> Self {
        Self { policy, identity }
    }

    /// Levels as they are in force in a zone, where a question says nothing of them.
    async fn fill_in_levels(
        &self,
        question: &mut v1::Question,
        world: &World,
        zone: &str,
    ) -> Result<(), Status> {
        let is_there = |policy: &str| {
            let name = Name::parse(policy).ok();
            let key = name.map(|name| Key {
                kind: Kind::DegradationPolicy,
                name,
            });
            key.is_some_and(|key| world.get(&key).is_some())
        };
        let levels = self
            .policy
            .levels(BTreeSet::new(), |_| true, wall())
            .await
            .map_err(status)?;
        for level in levels
            .into_iter()
            .filter(|level| level.zone == zone && is_there(&level.policy))
        {
            question.levels.entry(level.policy).or_insert(level.level);
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl ExplainService for Explain {
    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::Explanation>, Status> {
        authorize(&request)?;
        let request = request.into_inner();
        let mut question = request.question.unwrap_or_default();
        // What can't be asked at all needs no policy.
        let parsed = parse_question(&question)
            .map_err(|field| bad(&format!("question.{}", field.path), field.reason))?;
        if request.resources.len() > MAX_RESOURCES {
            return Err(status(Refused::TooMany(request.resources.len())));
        }
        let found = self.policy.whole(request.revision).await.map_err(status)?;
        let (mut whole, revision) = found.ok_or_else(|| status(Refused::NoRevision(request.revision)))?;
        lay_over(&mut whole, &request.resources).map_err(status)?;
        let world = tokio::task::spawn_blocking(move || {
            let mut world = World::default();
            let upserts = whole.into_values().collect();
            world.commit(Staged {
                upserts,
                ..Staged::default()
            });
            world
        });
        let world = world.await.map_err(|_| status(Refused::Broken))?;
        if request.revision == 0 && request.resources.is_empty() {
            let gateway = parsed.gateway.as_ref().map(|(gateway, _)| gateway);
            let viewer = explain::viewer(&world, &question.zone, &question.proxy, gateway);
            // That there is none is told below.
            if let Ok(viewer) = viewer {
                self.fill_in_levels(&mut question, &world, viewer.zone.as_str())
                    .await?;
            }
        }
        let domain = self.identity.id().trust_domain().to_owned();
        let told = tokio::task::spawn_blocking(move || {
            let own = |viewer: &Viewer| {
                let id = SpiffeId::proxy(&domain, viewer.zone.as_str(), viewer.proxy.as_str());
                Some(id.ok()?.as_str().to_owned())
            };
            leeward_proto::explain(&world, &question, revision, wall(), own)
        });
        let told = told.await.map_err(|_| status(Refused::Broken))?;
        told.map(Response::new)
            .map_err(|field| bad(&format!("question.{}", field.path), field.reason))
    }

    async fn lint(&self, request: Request<v1::LintRequest>) -> Result<Response<v1::LintResponse>, Status> {
        authorize(&request)?;
        let resources = request.into_inner().resources;
        if resources.len() > MAX_RESOURCES {
            return Err(status(Refused::TooMany(resources.len())));
        }
        let (report, revision) = self.policy.lint(resources).await.map_err(status)?;
        let most = report.findings.len().min(MAX_FINDINGS);
        let left_out = report.left_out + report.findings.len() - most;
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(v1::LintResponse {
            findings: report.findings.iter().take(most).map(render_finding).collect(),
            left_out: count(left_out),
            ignored: count(report.ignored),
            revision,
        }))
    }
}

//! All of policy at once, for what looks at the whole: the linter, and explanations.

use super::{Policy, Refused, blocking, parse_all, wall, wire};
use leeward_policy::lint::{Report, Severity, lint};
use leeward_policy::{Key, Resource};
use leeward_proto::{parse, render_finding, v1};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Warnings that are told of one write; the worst come first.
const MAX_WARNINGS: usize = 200;

/// Every resource that this build can read.
pub(crate) type Whole = BTreeMap<Key, Arc<Resource>>;

impl Policy {
    /// Policy as it was at a revision, 0 for as it is now, and which revision that is; `None` if it isn't known any more.
    pub(crate) async fn whole(&self, revision: u64) -> Result<Option<(Whole, u64)>, Refused> {
        let now = self.store.settle().await?;
        if revision == 0 || revision == now {
            let world = self.world().await?;
            let resources = world.known.iter();
            let whole = resources
                .filter_map(|(key, entry)| Some((key.clone(), Arc::clone(entry.resource.as_ref()?))));
            return Ok(Some((whole.collect(), world.at)));
        }
        let Some(stored) = self.store.at(revision).await? else {
            return Ok(None);
        };
        let whole = blocking(move || {
            let resources = stored.iter().filter_map(|stored| parse(&wire(stored)).ok());
            Ok(resources
                .map(|resource| (resource.key(), Arc::new(resource)))
                .collect())
        });
        Ok(Some((whole.await?, revision)))
    }

    /// What the linter finds in policy; with some resources laid over it, only what is found for their sake. And the
    /// revision that it is about.
    pub(crate) async fn lint(&self, over: Vec<v1::Resource>) -> Result<(Report, u64), Refused> {
        // There always is a policy now.
        let (mut whole, at) = self.whole(0).await?.unwrap_or_default();
        let report = blocking(move || {
            let keys = lay_over(&mut whole, &over)?;
            let mut report = lint(whole.values().map(|resource| &**resource), wall());
            if !keys.is_empty() {
                report.findings.retain(|found| {
                    keys.contains(&found.resource)
                        || found.related.iter().any(|related| keys.contains(&related.key))
                });
            }
            Ok(report)
        });
        Ok((report.await?, at))
    }

    /// What whoever has written some resources, or is about to, should know. That it can't be found out is no reason to
    /// refuse them.
    pub(crate) async fn warnings(&self, written: &[v1::Resource]) -> Vec<v1::Finding> {
        match self.lint(written.to_vec()).await {
            Ok((report, _)) => {
                let findings = report.findings.iter();
                let warnings = findings.filter(|found| found.rule.severity >= Severity::Warning);
                warnings.take(MAX_WARNINGS).map(render_finding).collect()
            }
            Err(error) => {
                tracing::warn!(%error, "what was written could not be looked at");
                Vec::new()
            }
        }
    }
}

/// Puts resources in the place of those of the same name, as if they were applied. Their keys.
pub(crate) fn lay_over(whole: &mut Whole, over: &[v1::Resource]) -> Result<BTreeSet<Key>, Refused> {
    let parsed = parse_all(over)?;
    let keys = parsed.iter().map(Resource::key).collect();
    whole.extend(
        parsed
            .into_iter()
            .map(|resource| (resource.key(), Arc::new(resource))),
    );
    Ok(keys)
}

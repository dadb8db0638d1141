//! What the linter finds, on the wire.

use super::render_key;
use crate::v1;
use leeward_policy::lint::{Finding, Related, Severity};

/// A finding as it goes on the wire.
pub fn render_finding(found: &Finding) -> v1::Finding {
    let severity = match found.rule.severity {
        Severity::Info => v1::Severity::Info,
        Severity::Warning => v1::Severity::Warning,
        Severity::Error => v1::Severity::Error,
    };
    let related = |related: &Related| v1::FindingRelated {
        r#ref: Some(render_key(&related.key)),
        path: related.path.clone(),
    };
    v1::Finding {
        code: found.rule.code.to_owned(),
        severity: severity.into(),
        r#ref: Some(render_key(&found.resource)),
        path: found.path.clone(),
        problem: found.problem.clone(),
        fix: found.fix.clone(),
        related: found.related.iter().map(related).collect(),
    }
}

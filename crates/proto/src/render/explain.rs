//! Explanations on the wire, and questions from there.

use crate::field::BadField;
use crate::v1;
use leeward_policy::Name;
use leeward_policy::explain::{Explanation, Question, Step};
use serde_json::Value;

/// The longest text of a question, in bytes.
const LONGEST: usize = 16 << 10;
/// Header fields, flags or levels of a question.
const MOST: usize = 256;

/// Findings of an explanation; the worst come first.
const MAX_FINDINGS: usize = 500;

/// An explanation as it goes on the wire; findings are not in it.
pub fn render_explanation(told: &Explanation, revision: u64) -> v1::Explanation {
    v1::Explanation {
        revision,
        zone: told.viewer.zone.to_string(),
        proxy: told.viewer.proxy.to_string(),
        summary: told.summary.clone(),
        steps: told.steps.iter().map(step).collect(),
        findings: Vec::new(),
    }
}

fn step(of: &Step) -> v1::Step {
    let facts = of.facts.iter().map(|(name, value)| v1::Fact {
        name: (*name).to_owned(),
        value: value.clone(),
    });
    v1::Step {
        stage: of.stage.to_owned(),
        says: of.says.clone(),
        resource: of.resource.as_ref().map_or_else(String::new, ToString::to_string),
        path: of.path.clone(),
        facts: facts.collect(),
        steps: of.steps.iter().map(step).collect(),
    }
}

/// Checks a question. Its zone and proxy are for [`leeward_policy::explain::viewer`].
///
/// # Errors
///
/// The first bad field.
pub fn parse_question(wire: &v1::Question) -> Result<Question, BadField> {
    let bad = |path: &str, reason: String| BadField {
        path: path.to_owned(),
        reason,
    };
    let texts = [
        ("method", &wire.method),
        ("path", &wire.path),
        ("host", &wire.host),
        ("identity", &wire.identity),
        ("claims", &wire.claims),
    ];
    if let Some((path, text)) = texts.into_iter().find(|(_, text)| text.len() > LONGEST) {
        return Err(bad(
            path,
            format!("is {} bytes long; want at most {LONGEST}", text.len()),
        ));
    }
    let counts = [
        ("headers", wire.headers.len()),
        ("flags", wire.flags.len()),
        ("levels", wire.levels.len()),
    ];
    if let Some((path, count)) = counts.into_iter().find(|(_, count)| *count > MOST) {
        return Err(bad(path, format!("has {count} entries; want at most {MOST}")));
    }
    let name =
        |path: &str, text: &str| Name::parse(text).map_err(|error| bad(path, format!("{text:?} {error}")));
    let gateway = match wire.gateway.split_once('/') {
        None if wire.gateway.is_empty() => None,
        None => Some((name("gateway", &wire.gateway)?, None)),
        Some((gateway, listener)) => Some((name("gateway", gateway)?, Some(name("gateway", listener)?))),
    };
    let claims = match wire.claims.as_str() {
        "" => None,
        text => match serde_json::from_str(text) {
            Ok(Value::Object(claims)) => Some(claims),
            Ok(_) | Err(_) => {
                return Err(bad(
                    "claims",
                    "is not a JSON object, such as {\"sub\": \"ada\"}".to_owned(),
                ));
            }
        },
    };
    Ok(Question {
        method: wire.method.clone(),
        path: wire.path.clone(),
        host: wire.host.clone(),
        headers: wire
            .headers
            .iter()
            .map(|header| (header.name.clone(), header.value.clone()))
            .collect(),
        identity: (!wire.identity.is_empty()).then(|| wire.identity.clone()),
        gateway,
        flags: wire
            .flags
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
        levels: wire
            .levels
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
        claims,
    })
}

/// Answers a question of the wire from a world, with what the linter finds on the resources that have a part in it.
///
/// `own` gives the identity of a proxy, for questions of the mesh that say nothing of who asks.
///
/// # Errors
///
/// The first bad field.
pub fn explain(
    world: &leeward_policy::World,
    wire: &v1::Question,
    revision: u64,
    now: std::time::SystemTime,
    own: impl Fn(&leeward_policy::Viewer) -> Option<String>,
) -> Result<v1::Explanation, BadField> {
    let mut question = parse_question(wire)?;
    let bad = |error: leeward_policy::explain::BadQuestion| BadField {
        path: error.field.to_owned(),
        reason: error.reason,
    };
    let gateway = question.gateway.as_ref().map(|(gateway, _)| gateway);
    let viewer = leeward_policy::explain::viewer(world, &wire.zone, &wire.proxy, gateway).map_err(bad)?;
    if question.identity.is_none() && question.gateway.is_none() {
        question.identity = own(&viewer);
    }
    let told = leeward_policy::explain::explain(world, &viewer, revision, &question, now).map_err(bad)?;
    let report = leeward_policy::lint::lint(world.resources().map(|resource| &**resource), now);
    let of = report
        .findings
        .iter()
        .filter(|found| told.involved.contains(&found.resource));
    let mut answer = render_explanation(&told, revision);
    answer.findings = of.take(MAX_FINDINGS).map(super::render_finding).collect();
    Ok(answer)
}

//! How changes go out in steps.

use super::super::words::{self, word};
use super::{duration, fields};
use crate::v1;
use serde_json::{Value, json};

pub(super) fn policy(policy: &v1::RolloutPolicy) -> Value {
    let stages: Vec<_> = policy
        .stages
        .iter()
        .map(|stage| {
            fields([
                ("proxies", json!(stage.proxies)),
                ("percent", json!(stage.percent)),
                ("zones", json!(stage.zones)),
                ("zoneCount", json!(stage.zone_count)),
                ("hold", duration(stage.hold.as_ref())),
            ])
        })
        .collect();
    let gates = policy.gates.as_ref().map_or(Value::Null, |gates| {
        let errors = gates.error_rate.as_ref().map_or(Value::Null, |gate| {
            fields([
                ("maxIncrease", json!(gate.max_increase)),
                ("maxRatio", json!(gate.max_ratio)),
                ("minimumRequests", json!(gate.minimum_requests)),
            ])
        });
        let latency = gates.latency.as_ref().map_or(Value::Null, |gate| {
            fields([
                ("percentile", json!(gate.percentile)),
                ("maxRatio", json!(gate.max_ratio)),
                ("minimumRequests", json!(gate.minimum_requests)),
                ("minIncrease", duration(gate.min_increase.as_ref())),
            ])
        });
        fields([("errorRate", errors), ("latency", latency)])
    });
    fields([
        ("stages", json!(stages)),
        ("gates", gates),
        (
            "onFailure",
            json!(word(words::ROLLOUT_FAILURE, policy.on_failure)),
        ),
        ("progressDeadline", duration(policy.progress_deadline.as_ref())),
    ])
}

//! How changes go out in steps.

use super::{duration, names};
use crate::v1;
use leeward_policy::model::{OnFailure, RolloutPolicy, RolloutStage, StageAmount, StageZones};

pub(super) fn policy(policy: &RolloutPolicy) -> v1::RolloutPolicy {
    v1::RolloutPolicy {
        stages: policy.stages.iter().map(stage).collect(),
        gates: Some(v1::RolloutGates {
            error_rate: Some(v1::RolloutErrorGate {
                max_increase: policy.errors.max_increase,
                max_ratio: policy.errors.max_ratio,
                minimum_requests: policy.errors.minimum_requests,
            }),
            latency: Some(v1::RolloutLatencyGate {
                percentile: policy.latency.percentile,
                max_ratio: policy.latency.max_ratio,
                minimum_requests: policy.latency.minimum_requests,
                min_increase: duration(policy.latency.min_increase),
            }),
        }),
        on_failure: match policy.on_failure {
            OnFailure::Rollback => v1::RolloutFailure::Rollback,
            OnFailure::Pause => v1::RolloutFailure::Pause,
        }
        .into(),
        progress_deadline: duration(policy.progress_deadline),
    }
}

fn stage(stage: &RolloutStage) -> v1::RolloutStage {
    let (proxies, percent) = match stage.amount {
        StageAmount::Proxies(proxies) => (proxies, 0),
        StageAmount::Percent(percent) => (0, percent),
    };
    let (zones, zone_count) = match &stage.zones {
        StageZones::All => (Vec::new(), 0),
        StageZones::Named(zones) => (names(zones), 0),
        StageZones::Count(count) => (Vec::new(), *count),
    };
    v1::RolloutStage {
        proxies,
        percent,
        zones,
        zone_count,
        hold: duration(stage.hold),
    }
}

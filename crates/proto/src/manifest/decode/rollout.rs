//! How changes go out in steps.

use super::super::words;
use super::fields::Fields;
use crate::v1;

pub(super) fn policy(f: &mut Fields<'_>) -> v1::RolloutPolicy {
    v1::RolloutPolicy {
        stages: f.list("stages", |f| v1::RolloutStage {
            proxies: f.small("proxies"),
            percent: f.small("percent"),
            zones: f.some_texts("zones"),
            zone_count: f.small("zoneCount"),
            hold: f.duration("hold"),
        }),
        gates: f.object("gates", |f| v1::RolloutGates {
            error_rate: f.object("errorRate", |f| v1::RolloutErrorGate {
                max_increase: f.small("maxIncrease"),
                max_ratio: f.small("maxRatio"),
                minimum_requests: f.small("minimumRequests"),
            }),
            latency: f.object("latency", |f| v1::RolloutLatencyGate {
                percentile: f.small("percentile"),
                max_ratio: f.small("maxRatio"),
                minimum_requests: f.small("minimumRequests"),
                min_increase: f.duration("minIncrease"),
            }),
        }),
        on_failure: f.choice("onFailure", words::ROLLOUT_FAILURE),
        progress_deadline: f.duration("progressDeadline"),
    }
}

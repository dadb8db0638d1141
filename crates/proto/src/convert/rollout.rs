//! How changes go out in steps.

use super::{DAY, MINUTE, MS, SECOND};
use crate::field::{Fields, Section};
use crate::v1;
use leeward_policy::model::{
    ErrorGate, LatencyGate, OnFailure, RolloutPolicy, RolloutStage, StageAmount, StageZones,
};
use std::time::Duration;

/// The range of ratios, in percent.
const RATIOS: std::ops::RangeInclusive<u32> = 100..=100_000;
/// The range of least numbers of requests.
const REQUESTS: std::ops::RangeInclusive<u32> = 10..=1_000_000;

pub(super) fn rollout_policy(f: &mut Fields, wire: &v1::RolloutPolicy) -> Option<RolloutPolicy> {
    f.count("spec.stages", wire.stages.len(), 0..=RolloutPolicy::MAX_STAGES);
    let mut stages = Vec::new();
    for (i, wire) in wire.stages.iter().enumerate() {
        stages.push(stage(&mut f.section(format!("spec.stages[{i}]")), wire));
    }
    if stages.is_empty() {
        stages = RolloutPolicy::default_stages();
    }
    if let Some(last) = stages.last_mut() {
        last.zones = StageZones::All;
        last.amount = StageAmount::Percent(100);
    }
    let none = v1::RolloutGates::default();
    let gates = wire.gates.as_ref().unwrap_or(&none);
    let errors = gates.error_rate.unwrap_or_default();
    let latency = gates.latency.unwrap_or_default();
    let errors = {
        let mut s = f.section("spec.gates.errorRate");
        let default = ErrorGate::DEFAULT;
        ErrorGate {
            max_increase: s.small(
                "maxIncrease",
                errors.max_increase,
                default.max_increase,
                1..=10_000,
            ),
            max_ratio: s.small("maxRatio", errors.max_ratio, default.max_ratio, RATIOS),
            minimum_requests: s.small(
                "minimumRequests",
                errors.minimum_requests,
                default.minimum_requests,
                REQUESTS,
            ),
        }
    };
    let latency = {
        let mut s = f.section("spec.gates.latency");
        let default = LatencyGate::DEFAULT;
        let percentile = s.small("percentile", latency.percentile, default.percentile, 1..=99);
        if !matches!(percentile, 50 | 90 | 95 | 99) {
            s.reject::<()>(
                "percentile",
                format!("{percentile} is none; want 50, 90, 95 or 99"),
            );
        }
        LatencyGate {
            percentile,
            max_ratio: s.small("maxRatio", latency.max_ratio, default.max_ratio, RATIOS),
            minimum_requests: s.small(
                "minimumRequests",
                latency.minimum_requests,
                default.minimum_requests,
                REQUESTS,
            ),
            min_increase: s.duration(
                "minIncrease",
                latency.min_increase.as_ref(),
                default.min_increase,
                MS..=MINUTE,
            ),
        }
    };
    let progress_deadline = f.duration(
        "spec.progressDeadline",
        wire.progress_deadline.as_ref(),
        RolloutPolicy::PROGRESS_DEADLINE,
        10 * SECOND..=DAY,
    );
    let on_failure = match v1::RolloutFailure::try_from(wire.on_failure) {
        Ok(v1::RolloutFailure::Unspecified | v1::RolloutFailure::Rollback) => OnFailure::Rollback,
        Ok(v1::RolloutFailure::Pause) => OnFailure::Pause,
        Err(_) => f.reject(
            "spec.onFailure",
            format!("{} is not known; want Rollback or Pause", wire.on_failure),
        )?,
    };
    Some(RolloutPolicy {
        stages,
        errors,
        latency,
        on_failure,
        progress_deadline,
    })
}

fn stage(s: &mut Section<'_>, wire: &v1::RolloutStage) -> RolloutStage {
    if wire.proxies != 0 && wire.percent != 0 {
        s.reject::<()>(
            "percent",
            "stands beside proxies; want one of them: so many proxies, or a share",
        );
    }
    if !wire.zones.is_empty() && wire.zone_count != 0 {
        s.reject::<()>(
            "zoneCount",
            "stands beside zones; want one of them: these zones, or so many",
        );
    }
    let amount = if wire.proxies == 0 {
        StageAmount::Percent(s.small("percent", wire.percent, 100, 1..=100))
    } else {
        StageAmount::Proxies(s.small("proxies", wire.proxies, 1, 1..=RolloutPolicy::MAX_COUNTED))
    };
    let named = s.names("zones", &wire.zones, 64);
    let zones = if wire.zone_count != 0 {
        StageZones::Count(s.small("zoneCount", wire.zone_count, 1, 1..=64))
    } else if wire.zones.is_empty() {
        StageZones::All
    } else {
        StageZones::Named(named)
    };
    RolloutStage {
        zones,
        amount,
        hold: s.duration(
            "hold",
            wire.hold.as_ref(),
            RolloutPolicy::HOLD,
            Duration::ZERO..=DAY,
        ),
    }
}

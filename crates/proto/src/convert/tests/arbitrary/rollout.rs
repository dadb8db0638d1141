//! RolloutPolicies, at random.

use super::degradation::names;
use super::{HOUR, MINUTE, SECOND, within};
use leeward_policy::Spec;
use leeward_policy::model::{
    ErrorGate, LatencyGate, OnFailure, RolloutPolicy, RolloutStage, StageAmount, StageZones,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

fn stage() -> impl Strategy<Value = RolloutStage> {
    let zones = prop_oneof![
        Just(StageZones::All),
        names(3)
            .prop_filter("names one", |names| !names.is_empty())
            .prop_map(StageZones::Named),
        (1..=64u32).prop_map(StageZones::Count),
    ];
    let amount = prop_oneof![
        (1..=64u32).prop_map(StageAmount::Proxies),
        (1..=100u32).prop_map(StageAmount::Percent),
    ];
    (zones, amount, within(0, 24 * HOUR)).prop_map(|(zones, amount, hold)| RolloutStage {
        zones,
        amount,
        hold,
    })
}

pub(super) fn policy() -> impl Strategy<Value = Spec> {
    let errors = (1..=10_000u32, 100..=100_000u32, 10..=1_000_000u32);
    let latency = (
        select(&[50u32, 90, 95, 99]),
        100..=100_000u32,
        10..=1_000_000u32,
        within(1, MINUTE),
    );
    let on_failure = select(&[OnFailure::Rollback, OnFailure::Pause]);
    let rest = (on_failure, within(10 * SECOND, 24 * HOUR));
    (vec(stage(), 1..5), errors, latency, rest).prop_map(|(mut stages, errors, latency, rest)| {
        if let Some(last) = stages.last_mut() {
            (last.zones, last.amount) = (StageZones::All, StageAmount::Percent(100));
        }
        Spec::RolloutPolicy(RolloutPolicy {
            stages,
            errors: ErrorGate {
                max_increase: errors.0,
                max_ratio: errors.1,
                minimum_requests: errors.2,
            },
            latency: LatencyGate {
                percentile: latency.0,
                max_ratio: latency.1,
                minimum_requests: latency.2,
                min_increase: latency.3,
            },
            on_failure: rest.0,
            progress_deadline: rest.1,
        })
    })
}

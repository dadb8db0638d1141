//! What is wrong with RolloutPolicies, and what they are where nothing is said.

use crate::manifest;
use crate::parse;
use leeward_policy::Spec;
use leeward_policy::model::{
    ErrorGate, LatencyGate, OnFailure, RolloutPolicy, RolloutStage, StageAmount, StageZones,
};
use std::time::Duration;

fn read(spec: &str) -> Result<RolloutPolicy, Vec<String>> {
    let text = format!(
        "apiVersion: leeward.dev/v1\nkind: RolloutPolicy\nmetadata: {{name: default}}\nspec: {spec}\n"
    );
    let resources = match manifest::parse("f", &text) {
        Ok(resources) => resources,
        Err(errors) => {
            let told = errors.iter().map(|e| format!("{}: {}", e.path, e.reason));
            return Err(told.collect());
        }
    };
    match parse(&resources[0]) {
        Ok(resource) => {
            let Spec::RolloutPolicy(policy) = resource.spec else {
                panic!("{:?}", resource.spec);
            };
            Ok(policy)
        }
        Err(bad) => Err(bad.iter().map(ToString::to_string).collect()),
    }
}

#[test]
fn where_nothing_is_said_one_comes_first_and_all_last() {
    let policy = read("{}").unwrap();
    assert_eq!(policy.stages, RolloutPolicy::default_stages());
    assert_eq!(
        (policy.errors, policy.latency),
        (ErrorGate::DEFAULT, LatencyGate::DEFAULT)
    );
    assert_eq!(policy.on_failure, OnFailure::Rollback);
    assert_eq!(policy.progress_deadline, Duration::from_secs(600));
    let policy =
        read("{stages: [{zones: [a, b], percent: 10, hold: 0s}, {proxies: 3}], onFailure: Pause}").unwrap();
    let stage = |zones, amount, hold| RolloutStage { zones, amount, hold };
    let name = |text: &str| leeward_policy::Name::parse(text).unwrap();
    let named = StageZones::Named(vec![name("a"), name("b")]);
    let wanted = [
        stage(named, StageAmount::Percent(10), Duration::ZERO),
        stage(StageZones::All, StageAmount::Percent(100), RolloutPolicy::HOLD),
    ];
    assert_eq!(policy.stages, wanted, "the last is of all");
    assert_eq!(policy.on_failure, OnFailure::Pause);
}

#[test]
fn what_excludes_each_other_and_what_is_out_of_range_is_named() {
    for (spec, want) in [
        (
            "{stages: [{proxies: 1, percent: 2}]}",
            "spec.stages[0].percent: stands beside proxies",
        ),
        (
            "{stages: [{zones: [a], zoneCount: 2}]}",
            "spec.stages[0].zoneCount: stands beside zones",
        ),
        (
            "{stages: [{proxies: 65}]}",
            "spec.stages[0].proxies: 65 is out of range; want 1 to 64",
        ),
        (
            "{stages: [{percent: 101}]}",
            "spec.stages[0].percent: 101 is out of range; want 1 to 100",
        ),
        (
            "{stages: [{hold: 25h}]}",
            "spec.stages[0].hold: 25h is out of range",
        ),
        (
            "{gates: {latency: {percentile: 98}}}",
            "spec.gates.latency.percentile: 98 is none; want 50, 90, 95 or 99",
        ),
        (
            "{gates: {errorRate: {maxRatio: 99}}}",
            "spec.gates.errorRate.maxRatio: 99 is out of range",
        ),
        (
            "{progressDeadline: 1s}",
            "spec.progressDeadline: 1s is out of range; want 10s to 24h",
        ),
    ] {
        let bad = read(spec).unwrap_err();
        assert!(bad.iter().any(|bad| bad.starts_with(want)), "{spec}: {bad:?}");
    }
    let many = format!("{{stages: [{}]}}", vec!["{}"; 17].join(", "));
    assert!(read(&many).unwrap_err()[0].starts_with("spec.stages: has 17 entries; want 0 to 16"));
}

//! A rollout as it is written down and as people see it: the same message.

use super::compare::Figures;
use super::machine::{Phase, Rollout};
use super::reach::{Census, LOWEST, Reach, ZoneCensus};
use crate::policy::timestamp;
use leeward_policy::{Resource, Spec};
use leeward_proto::v1;
use prost::Message;

pub(super) fn encode(rollout: &Rollout) -> Vec<u8> {
    wire(rollout).encode_to_vec()
}

pub(super) fn decode(bytes: &[u8]) -> Result<Rollout, String> {
    let wire = v1::Rollout::decode(bytes).map_err(|error| format!("the rollout can't be read: {error}"))?;
    rollout(wire)
}

/// As people see it, but for what is seen of it.
pub(super) fn wire(rollout: &Rollout) -> v1::Rollout {
    let (phase, why, rolled_back_by, failed) = match &rollout.phase {
        Phase::Running => (v1::RolloutPhase::Running, "", 0, false),
        Phase::Paused { why, failed } => (v1::RolloutPhase::Paused, why.as_str(), 0, *failed),
        Phase::RollingBack { why } => (v1::RolloutPhase::RollingBack, why.as_str(), 0, false),
        Phase::Promoted { why } => (v1::RolloutPhase::Promoted, why.as_str(), 0, false),
        Phase::RolledBack { why, by } => (v1::RolloutPhase::RolledBack, why.as_str(), *by, false),
    };
    let spec = if let Some(v1::resource::Spec::RolloutPolicy(policy)) = policy_of(rollout).spec {
        Some(policy)
    } else {
        None
    };
    v1::Rollout {
        revision: rollout.revision,
        policy: rollout.name.to_string(),
        spec,
        by: rollout.by.clone(),
        phase: phase.into(),
        why: why.to_owned(),
        stage: u32::try_from(rollout.stage).unwrap_or(u32::MAX),
        start_time: Some(timestamp(rollout.started_ms)),
        stage_time: Some(timestamp(rollout.stage_ms)),
        rolled_back_by,
        reach_all: rollout.reach.all,
        reach_zones: rollout.reach.zones.clone().into_iter().collect(),
        drawn: rollout.drawn,
        failed,
        sight: None,
    }
}

fn policy_of(rollout: &Rollout) -> v1::Resource {
    leeward_proto::render(&Resource {
        name: rollout.name.clone(),
        revision: 0,
        labels: std::collections::BTreeMap::new(),
        spec: Spec::RolloutPolicy(rollout.policy.clone()),
    })
}

fn rollout(wire: v1::Rollout) -> Result<Rollout, String> {
    let resource = v1::Resource {
        metadata: Some(v1::Metadata {
            name: wire.policy.clone(),
            ..v1::Metadata::default()
        }),
        status: None,
        spec: wire.spec.clone().map(v1::resource::Spec::RolloutPolicy),
    };
    let parsed = leeward_proto::parse(&resource);
    let (name, policy) = match parsed.map(|resource| (resource.name, resource.spec)) {
        Ok((name, Spec::RolloutPolicy(policy))) => (name, policy),
        Ok((_, other)) => return Err(format!("the rollout has a {}", other.kind())),
        Err(bad) => {
            let bad: Vec<_> = bad.iter().map(ToString::to_string).collect();
            return Err(format!("the rollout's policy can't be read: {}", bad.join("; ")));
        }
    };
    let why = wire.why.clone();
    let phase = match wire.phase() {
        v1::RolloutPhase::Unspecified => return Err(format!("the rollout has the phase {}", wire.phase)),
        v1::RolloutPhase::Running => Phase::Running,
        v1::RolloutPhase::Paused => Phase::Paused {
            why,
            failed: wire.failed,
        },
        v1::RolloutPhase::RollingBack => Phase::RollingBack { why },
        v1::RolloutPhase::Promoted => Phase::Promoted { why },
        v1::RolloutPhase::RolledBack => Phase::RolledBack {
            why,
            by: wire.rolled_back_by,
        },
    };
    Ok(Rollout {
        revision: wire.revision,
        name,
        policy,
        by: wire.by,
        stage: usize::try_from(wire.stage).unwrap_or(usize::MAX),
        drawn: wire.drawn,
        reach: Reach {
            all: wire.reach_all,
            zones: wire.reach_zones.into_iter().collect(),
        },
        phase,
        started_ms: wire.start_time.map_or(0, millis),
        stage_ms: wire.stage_time.map_or(0, millis),
    })
}

fn millis(time: prost_types::Timestamp) -> i64 {
    time.seconds * 1000 + i64::from(time.nanos) / 1_000_000
}

/// Who there is, for other control planes.
pub(super) fn zones(census: &Census) -> Vec<v1::ZoneCount> {
    let zones = census.zones.iter();
    zones
        .map(|(zone, counted)| v1::ZoneCount {
            zone: zone.clone(),
            live: counted.live,
            lowest: counted.lowest.clone(),
        })
        .collect()
}

pub(super) fn census(zones: &[v1::ZoneCount]) -> Census {
    let mut census = Census::default();
    for counted in zones {
        let mut lowest = counted.lowest.clone();
        lowest.sort_unstable();
        lowest.truncate(LOWEST);
        let live = counted.live;
        census
            .zones
            .insert(counted.zone.clone(), ZoneCensus { live, lowest });
    }
    census
}

/// How requests fared, for other control planes.
pub(super) fn routes(figures: &Figures) -> Vec<v1::RouteCount> {
    let routes = figures.routes();
    routes
        .map(|((direction, route), tally)| v1::RouteCount {
            direction: direction.clone(),
            route: route.clone(),
            requests: tally.requests,
            failures: tally.failures,
            times: tally.times.to_vec(),
        })
        .collect()
}

pub(super) fn figures(routes: &[v1::RouteCount]) -> Figures {
    let mut figures = Figures::default();
    for route in routes {
        let tally = super::tally(route.requests, route.failures, &route.times);
        figures.add(&route.direction, &route.route, &tally);
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::Name;
    use leeward_policy::model::{ErrorGate, LatencyGate, OnFailure, RolloutPolicy};

    #[test]
    fn what_is_written_down_is_read_again() {
        let policy = RolloutPolicy {
            stages: RolloutPolicy::default_stages(),
            errors: ErrorGate::DEFAULT,
            latency: LatencyGate::DEFAULT,
            on_failure: OnFailure::Pause,
            progress_deadline: RolloutPolicy::PROGRESS_DEADLINE,
        };
        let why = || "because".to_owned();
        for phase in [
            Phase::Running,
            Phase::Paused {
                why: why(),
                failed: true,
            },
            Phase::RollingBack { why: why() },
            Phase::Promoted { why: why() },
            Phase::RolledBack { why: why(), by: 9 },
        ] {
            let mut rollout = Rollout::new(
                7,
                Name::parse("default").unwrap(),
                policy.clone(),
                "me".into(),
                1_234_567,
            );
            rollout.phase = phase;
            (rollout.stage, rollout.drawn) = (2, true);
            rollout.reach.all = Some(u64::MAX - 3);
            rollout.reach.zones.insert("a".into(), 5);
            assert_eq!(decode(&encode(&rollout)), Ok(rollout));
        }
        assert!(decode(b"\xff").is_err());
        assert!(decode(b"").is_err());
    }

    #[test]
    fn counts_come_through() {
        let mut census = Census::default();
        census.zones.entry("a".into()).or_default().add(9);
        assert_eq!(self::census(&zones(&census)), census);
        let mut figures = Figures::default();
        figures.add("outbound", "r", &super::super::tally(3, 1, &[0, 3]));
        assert_eq!(self::figures(&routes(&figures)), figures);
    }
}

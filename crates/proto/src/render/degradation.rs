//! Flags, what hangs on them, and levels of degradation, on the wire. What is a default is written out, too, so
//! that a reader with other defaults understands the same.

use super::fallback::cause;
use super::resilience::one_priority;
use super::{duration, labels, names, text};
use crate::v1;
use leeward_policy::model::{
    Cache, DegradationLevel, DegradationOverride, DegradationPolicy, DegradationTrigger, Fault,
    FlagCondition, Scope, Signal,
};

pub(super) fn condition(condition: &FlagCondition) -> v1::FlagCondition {
    v1::FlagCondition {
        flag: condition.flag.to_string(),
        variants: condition.variants.iter().map(|v| v.to_string()).collect(),
        targeting_key_header: text(condition.targeting_key_header.as_deref()),
        default: condition.default,
    }
}

pub(super) fn cache(cache: &Cache) -> v1::Cache {
    v1::Cache {
        default_ttl: duration(cache.default_ttl),
        stale_if_error: duration(cache.stale_if_error),
        stale_while_revalidate: duration(cache.stale_while_revalidate),
        max_bytes: cache.max_bytes,
        max_object_bytes: cache.max_object_bytes,
        coalesce: Some(cache.coalesce),
    }
}

pub(super) fn fault(fault: &Fault) -> v1::Fault {
    v1::Fault {
        percent: fault.percent,
        delay: fault.delay.and_then(duration),
        abort: fault.abort.map(|of| cause(of).into()).unwrap_or_default(),
        when: fault.when.as_ref().map(condition),
    }
}

pub(super) fn policy(policy: &DegradationPolicy) -> v1::DegradationPolicy {
    v1::DegradationPolicy {
        levels: policy.levels.iter().map(level).collect(),
        routes: names(&policy.routes),
        triggers: policy.triggers.iter().map(|t| trigger(t, policy)).collect(),
    }
}

fn level(level: &DegradationLevel) -> v1::DegradationLevel {
    v1::DegradationLevel {
        name: level.name.to_string(),
        flags: labels(&level.flags),
        shed_below: level
            .shed_below
            .map(|priority| one_priority(priority).into())
            .unwrap_or_default(),
    }
}

fn trigger(trigger: &DegradationTrigger, policy: &DegradationPolicy) -> v1::DegradationTrigger {
    let level = policy.levels.get(trigger.level);
    v1::DegradationTrigger {
        level: level.map(|level| level.name.to_string()).unwrap_or_default(),
        signal: Some(signal(&trigger.signal)),
        hold_for: duration(trigger.hold_for),
        clear_after: duration(trigger.clear_after),
        min_stay: duration(trigger.min_stay),
        max_stay: trigger.max_stay.and_then(duration),
        scope: match trigger.scope {
            Scope::Zone => v1::DegradationScope::Zone.into(),
            Scope::Mesh => v1::DegradationScope::Mesh.into(),
        },
    }
}

fn signal(signal: &Signal) -> v1::degradation_trigger::Signal {
    use v1::degradation_trigger::Signal as Wire;
    let service = signal.service().to_string();
    match signal {
        Signal::CircuitOpen { .. } => Wire::CircuitOpen(service),
        Signal::ErrorRate {
            above,
            clear_below,
            window,
            minimum_calls,
            ..
        } => Wire::ErrorRate(v1::ErrorRateSignal {
            service,
            above: *above,
            clear_below: Some(*clear_below),
            window: duration(*window),
            minimum_calls: *minimum_calls,
        }),
        Signal::Latency {
            percentile,
            above,
            clear_below,
            window,
            minimum_calls,
            ..
        } => Wire::Latency(v1::LatencySignal {
            service,
            percentile: *percentile,
            above: duration(*above),
            clear_below: duration(*clear_below),
            window: duration(*window),
            minimum_calls: *minimum_calls,
        }),
        Signal::Saturation {
            above, clear_below, ..
        } => Wire::Saturation(v1::SaturationSignal {
            service,
            above: *above,
            clear_below: Some(*clear_below),
        }),
        Signal::BurnRate {
            objective,
            above,
            clear_below,
            long_window,
            short_window,
            minimum_calls,
            ..
        } => Wire::BurnRate(v1::BurnRateSignal {
            service,
            objective: *objective,
            above: *above,
            clear_below: Some(*clear_below),
            long_window: duration(*long_window),
            short_window: duration(*short_window),
            minimum_calls: *minimum_calls,
        }),
    }
}

pub(super) fn held(held: &DegradationOverride) -> v1::DegradationOverride {
    v1::DegradationOverride {
        policy: held.policy.to_string(),
        level: held.level.to_string(),
        expire_time: Some(held.expire_time.into()),
        reason: held.reason.to_string(),
        zones: names(&held.zones),
    }
}

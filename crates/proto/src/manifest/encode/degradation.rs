//! Flags, what hangs on them, levels of degradation, and queues.

use super::super::words::{self, word};
use super::{duration, fields, labels, said};
use crate::v1;
use serde_json::{Value, json};

/// A condition; nothing for none.
pub(super) fn condition(condition: Option<&v1::FlagCondition>) -> Value {
    condition.map_or(Value::Null, |condition| {
        fields([
            ("flag", json!(condition.flag)),
            ("variants", json!(condition.variants)),
            ("targetingKeyHeader", json!(condition.targeting_key_header)),
            ("default", json!(condition.default)),
        ])
    })
}

pub(super) fn cache(cache: &v1::Cache) -> Value {
    let mut object = fields([
        ("defaultTtl", duration(cache.default_ttl.as_ref())),
        ("staleIfError", duration(cache.stale_if_error.as_ref())),
        (
            "staleWhileRevalidate",
            duration(cache.stale_while_revalidate.as_ref()),
        ),
        ("maxBytes", json!(cache.max_bytes)),
        ("maxObjectBytes", json!(cache.max_object_bytes)),
    ]);
    said(&mut object, "coalesce", cache.coalesce);
    object
}

pub(super) fn fault(fault: &v1::Fault) -> Value {
    fields([
        ("percent", json!(fault.percent)),
        ("delay", duration(fault.delay.as_ref())),
        ("abort", json!(word(words::CAUSE, fault.abort))),
        ("when", condition(fault.when.as_ref())),
    ])
}

/// flagd's document stands in the spec itself.
pub(super) fn flags(flags: &v1::FeatureFlags) -> Value {
    // One that isn't JSON was never accepted; it is shown as what it is.
    serde_json::from_str(&flags.document).unwrap_or_else(|_| json!({"document": flags.document}))
}

pub(super) fn policy(policy: &v1::DegradationPolicy) -> Value {
    let levels: Vec<_> = policy
        .levels
        .iter()
        .map(|level| {
            fields([
                ("name", json!(level.name)),
                ("flags", labels(&level.flags)),
                ("shedBelow", json!(word(words::PRIORITY, level.shed_below))),
            ])
        })
        .collect();
    let triggers: Vec<_> = policy.triggers.iter().map(trigger).collect();
    fields([
        ("levels", json!(levels)),
        ("routes", json!(policy.routes)),
        ("triggers", json!(triggers)),
    ])
}

fn trigger(trigger: &v1::DegradationTrigger) -> Value {
    let (kind, signal) = trigger.signal.as_ref().map_or(("", Value::Null), signal);
    fields([
        ("level", json!(trigger.level)),
        (kind, signal),
        ("holdFor", duration(trigger.hold_for.as_ref())),
        ("clearAfter", duration(trigger.clear_after.as_ref())),
        ("minStay", duration(trigger.min_stay.as_ref())),
        ("maxStay", duration(trigger.max_stay.as_ref())),
        ("scope", json!(word(words::SCOPE, trigger.scope))),
    ])
}

fn signal(signal: &v1::degradation_trigger::Signal) -> (&'static str, Value) {
    use v1::degradation_trigger::Signal;
    match signal {
        Signal::CircuitOpen(service) => ("circuitOpen", json!(service)),
        Signal::ErrorRate(signal) => {
            let mut object = fields([
                ("service", json!(signal.service)),
                ("above", json!(signal.above)),
                ("window", duration(signal.window.as_ref())),
                ("minimumCalls", json!(signal.minimum_calls)),
            ]);
            said(&mut object, "clearBelow", signal.clear_below);
            ("errorRate", object)
        }
        Signal::Latency(signal) => {
            let object = fields([
                ("service", json!(signal.service)),
                ("percentile", json!(signal.percentile)),
                ("above", duration(signal.above.as_ref())),
                ("clearBelow", duration(signal.clear_below.as_ref())),
                ("window", duration(signal.window.as_ref())),
                ("minimumCalls", json!(signal.minimum_calls)),
            ]);
            ("latency", object)
        }
        Signal::Saturation(signal) => {
            let mut object = fields([("service", json!(signal.service)), ("above", json!(signal.above))]);
            said(&mut object, "clearBelow", signal.clear_below);
            ("saturation", object)
        }
        Signal::BurnRate(signal) => {
            let mut object = fields([
                ("service", json!(signal.service)),
                ("objective", json!(signal.objective)),
                ("above", json!(signal.above)),
                ("longWindow", duration(signal.long_window.as_ref())),
                ("shortWindow", duration(signal.short_window.as_ref())),
                ("minimumCalls", json!(signal.minimum_calls)),
            ]);
            said(&mut object, "clearBelow", signal.clear_below);
            ("burnRate", object)
        }
    }
}

pub(super) fn held(held: &v1::DegradationOverride) -> Value {
    fields([
        ("policy", json!(held.policy)),
        ("level", json!(held.level)),
        ("expireTime", json!(held.expire_time.map(|t| t.to_string()))),
        ("reason", json!(held.reason)),
        ("zones", json!(held.zones)),
    ])
}

pub(super) fn queue(queue: &v1::Queue) -> Value {
    let (store, kept) = match &queue.store {
        None => ("", Value::Null),
        Some(v1::queue::Store::Sqlite(v1::SqliteStore {})) => ("sqlite", json!({})),
        Some(v1::queue::Store::Jetstream(store)) => (
            "jetstream",
            fields([
                ("servers", json!(store.servers)),
                ("replicas", json!(store.replicas)),
                ("credentialsFile", json!(store.credentials_file)),
            ]),
        ),
    };
    let mut object = fields([
        (store, kept),
        ("maxEntries", json!(queue.max_entries)),
        ("maxBytes", json!(queue.max_bytes)),
        ("maxEntryBytes", json!(queue.max_entry_bytes)),
        ("maxAge", duration(queue.max_age.as_ref())),
        ("keyHeader", json!(queue.key_header)),
        ("baseInterval", duration(queue.base_interval.as_ref())),
        ("maxInterval", duration(queue.max_interval.as_ref())),
        ("maxConcurrency", json!(queue.max_concurrency)),
        ("maxRate", json!(queue.max_rate)),
        ("keepResults", duration(queue.keep_results.as_ref())),
        ("maxDeadLetters", json!(queue.max_dead_letters)),
    ]);
    said(&mut object, "maxAttempts", queue.max_attempts);
    object
}

//! Flags, what hangs on them, levels of degradation, and queues.

use super::super::words;
use super::fields::Fields;
use super::resilience::said;
use crate::v1;

pub(super) fn condition(f: &mut Fields<'_>) -> v1::FlagCondition {
    v1::FlagCondition {
        flag: f.text("flag"),
        variants: f.text_list("variants"),
        targeting_key_header: f.text("targetingKeyHeader"),
        default: f.optional_bool("default").unwrap_or_default(),
    }
}

pub(super) fn cache(f: &mut Fields<'_>) -> v1::Cache {
    v1::Cache {
        default_ttl: f.duration("defaultTtl"),
        stale_if_error: f.duration("staleIfError"),
        stale_while_revalidate: f.duration("staleWhileRevalidate"),
        max_bytes: f.some_size("maxBytes"),
        max_object_bytes: f.some_size("maxObjectBytes"),
        coalesce: f.optional_bool("coalesce"),
    }
}

pub(super) fn fault(f: &mut Fields<'_>) -> v1::Fault {
    v1::Fault {
        percent: f.small("percent"),
        delay: f.duration("delay"),
        abort: f.choice("abort", words::CAUSE),
        when: f.object("when", condition),
    }
}

pub(super) fn policy(f: &mut Fields<'_>) -> v1::DegradationPolicy {
    v1::DegradationPolicy {
        levels: f.list("levels", |f| v1::DegradationLevel {
            name: f.text("name"),
            flags: f.texts("flags"),
            shed_below: f.choice("shedBelow", words::PRIORITY),
        }),
        routes: f.text_list("routes"),
        triggers: f.list("triggers", trigger),
    }
}

fn trigger(f: &mut Fields<'_>) -> v1::DegradationTrigger {
    use v1::degradation_trigger::Signal;
    let level = f.text("level");
    let signals = [
        said(f.text("circuitOpen")).map(Signal::CircuitOpen),
        f.object("errorRate", |f| v1::ErrorRateSignal {
            service: f.text("service"),
            above: f.small("above"),
            clear_below: f.optional_small("clearBelow"),
            window: f.duration("window"),
            minimum_calls: f.small("minimumCalls"),
        })
        .map(Signal::ErrorRate),
        f.object("latency", |f| v1::LatencySignal {
            service: f.text("service"),
            percentile: f.small("percentile"),
            above: f.duration("above"),
            clear_below: f.duration("clearBelow"),
            window: f.duration("window"),
            minimum_calls: f.small("minimumCalls"),
        })
        .map(Signal::Latency),
        f.object("saturation", |f| v1::SaturationSignal {
            service: f.text("service"),
            above: f.small("above"),
            clear_below: f.optional_small("clearBelow"),
        })
        .map(Signal::Saturation),
        f.object("burnRate", |f| v1::BurnRateSignal {
            service: f.text("service"),
            objective: f.small("objective"),
            above: f.small("above"),
            clear_below: f.optional_small("clearBelow"),
            long_window: f.duration("longWindow"),
            short_window: f.duration("shortWindow"),
            minimum_calls: f.small("minimumCalls"),
        })
        .map(Signal::BurnRate),
    ];
    v1::DegradationTrigger {
        level,
        signal: f.exclusive("circuitOpen, errorRate, latency, saturation, burnRate", signals),
        hold_for: f.duration("holdFor"),
        clear_after: f.duration("clearAfter"),
        min_stay: f.duration("minStay"),
        max_stay: f.duration("maxStay"),
        scope: f.choice("scope", words::SCOPE),
    }
}

pub(super) fn held(f: &mut Fields<'_>) -> v1::DegradationOverride {
    v1::DegradationOverride {
        policy: f.text("policy"),
        level: f.text("level"),
        expire_time: f.time("expireTime"),
        reason: f.text("reason"),
        zones: f.text_list("zones"),
    }
}

pub(super) fn queue(f: &mut Fields<'_>) -> v1::Queue {
    use v1::queue::Store;
    let stores = [
        f.object("sqlite", |_| v1::SqliteStore {}).map(Store::Sqlite),
        f.object("jetstream", |f| v1::JetStreamStore {
            servers: f.text_list("servers"),
            replicas: f.small("replicas"),
            credentials_file: f.text("credentialsFile"),
        })
        .map(Store::Jetstream),
    ];
    v1::Queue {
        store: f.exclusive("sqlite, jetstream", stores),
        max_entries: f.large("maxEntries"),
        max_bytes: f.some_size("maxBytes"),
        max_entry_bytes: f.some_size("maxEntryBytes"),
        max_age: f.duration("maxAge"),
        max_attempts: f.optional_small("maxAttempts"),
        key_header: f.text("keyHeader"),
        base_interval: f.duration("baseInterval"),
        max_interval: f.duration("maxInterval"),
        max_concurrency: f.small("maxConcurrency"),
        max_rate: f.small("maxRate"),
        keep_results: f.duration("keepResults"),
        max_dead_letters: f.large("maxDeadLetters"),
    }
}

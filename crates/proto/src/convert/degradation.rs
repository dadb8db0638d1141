//! Flags, what hangs on them, and what a part of the mesh gives up when it is in trouble.

use super::fallback::rung_cause;
use super::resilience::{expire_time, one_priority};
use super::text::{bounded, optional_key_header};
use super::{DAY, HOUR, MINUTE, MS, SECOND};
use crate::field::{BadField, Fields, Section};
use crate::v1;
use leeward_flags::FlagSet;
use leeward_policy::model::{
    Cache, Cause, DegradationLevel, DegradationOverride, DegradationPolicy, DegradationTrigger, Fault,
    FeatureFlags, FlagCondition, RungCause, Scope, Signal,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Longest key of a flag, or name of a variant, in bytes.
const MAX_KEY: usize = 128;

pub(super) fn flag_condition(s: &mut Section<'_>, wire: Option<&v1::FlagCondition>) -> Option<FlagCondition> {
    let wire = wire?;
    key(s, "flag", &wire.flag, "a flag's key");
    let path = s.at("variants");
    s.fields().count(&path, wire.variants.len(), 0..=32);
    for (i, variant) in wire.variants.iter().enumerate() {
        key(s, &format!("variants[{i}]"), variant, "a variant's name");
    }
    s.fields().unique(&path, "", &wire.variants);
    let at = s.at("targetingKeyHeader");
    Some(FlagCondition {
        flag: wire.flag.as_str().into(),
        variants: wire.variants.iter().map(|v| v.as_str().into()).collect(),
        targeting_key_header: optional_key_header(s.fields(), &at, &wire.targeting_key_header),
        default: wire.default,
    })
}

fn key(s: &mut Section<'_>, field: &str, text: &str, what: &str) {
    if text.is_empty() {
        s.reject::<()>(field, format!("is missing; want {what}, 1 to {MAX_KEY} bytes"));
    } else if text.len() > MAX_KEY {
        s.reject::<()>(
            field,
            format!("is {} bytes long; want {what}, 1 to {MAX_KEY} bytes", text.len()),
        );
    }
}

pub(super) fn cache(s: &mut Section<'_>, wire: &v1::Cache) -> Cache {
    let default = Cache::DEFAULT;
    let max_bytes = s.number("maxBytes", wire.max_bytes, default.max_bytes, 64 << 10..=4 << 30);
    Cache {
        default_ttl: s.duration(
            "defaultTtl",
            wire.default_ttl.as_ref(),
            default.default_ttl,
            Duration::ZERO..=DAY,
        ),
        stale_if_error: s.duration(
            "staleIfError",
            wire.stale_if_error.as_ref(),
            default.stale_if_error,
            Duration::ZERO..=7 * DAY,
        ),
        stale_while_revalidate: s.duration(
            "staleWhileRevalidate",
            wire.stale_while_revalidate.as_ref(),
            default.stale_while_revalidate,
            Duration::ZERO..=DAY,
        ),
        max_bytes,
        // One answer can't be larger than all of them may be.
        max_object_bytes: s.number(
            "maxObjectBytes",
            wire.max_object_bytes,
            default.max_object_bytes.min(max_bytes),
            1 << 10..=max_bytes.clamp(64 << 10, 4 << 30),
        ),
        coalesce: wire.coalesce.unwrap_or(default.coalesce),
    }
}

pub(super) fn fault(s: &mut Section<'_>, wire: &v1::Fault) -> Option<Fault> {
    const WANT: &str = "want ConnectFailure, Timeout, Reset, NoEndpoint, Overloaded or CircuitOpen";
    let percent = s.small("percent", wire.percent, 100, 1..=100);
    let delay = s.optional_duration("delay", wire.delay.as_ref(), MS..=HOUR);
    let abort = match rung_cause(wire.abort) {
        None if wire.abort == 0 => None,
        None => s.reject("abort", format!("{} is not known; {WANT}", wire.abort)),
        Some(RungCause::Of(
            cause @ (Cause::ConnectFailure
            | Cause::Timeout
            | Cause::Reset
            | Cause::NoEndpoint
            | Cause::Overloaded
            | Cause::CircuitOpen),
        )) => Some(cause),
        Some(
            RungCause::Of(
                Cause::Overflow
                | Cause::UpstreamStatus
                | Cause::RateLimited
                | Cause::Disabled
                | Cause::AuthorizationDenied
                | Cause::IdentityMissing
                | Cause::AuthorizationUnknown,
            )
            | RungCause::ZoneDown
            | RungCause::PluginFault,
        ) => s.reject(
            "abort",
            format!(
                "{} can't be injected; {WANT}",
                crate::manifest::cause_word(wire.abort)
            ),
        ),
    };
    if wire.delay.is_none() && wire.abort == 0 {
        return s.reject_here("does nothing; want one of delay, abort, or both");
    }
    Some(Fault {
        percent,
        delay,
        abort,
        when: flag_condition(&mut s.section("when"), wire.when.as_ref()),
    })
}

pub(super) fn feature_flags(f: &mut Fields, wire: &v1::FeatureFlags) -> Option<FeatureFlags> {
    match FlagSet::parse(&wire.document) {
        Ok(set) => Some(FeatureFlags { set: Arc::new(set) }),
        Err(invalid) => {
            f.extend(invalid.into_iter().map(|invalid| BadField {
                path: format!("spec.{}", invalid.path),
                reason: invalid.reason,
            }));
            None
        }
    }
}

pub(super) fn degradation_policy(f: &mut Fields, wire: &v1::DegradationPolicy) -> DegradationPolicy {
    f.count("spec.levels", wire.levels.len(), 2..=8);
    let mut levels = Vec::new();
    for (i, level) in wire.levels.iter().enumerate() {
        levels.extend(degradation_level(
            &mut f.section(format!("spec.levels[{i}]")),
            level,
        ));
    }
    let names: Vec<_> = wire.levels.iter().map(|level| level.name.as_str()).collect();
    f.unique("spec.levels", ".name", &names);
    let mut s = f.section("spec");
    let routes = s.names("routes", &wire.routes, 64);
    f.count("spec.triggers", wire.triggers.len(), 0..=32);
    let mut triggers = Vec::new();
    for (i, wire) in wire.triggers.iter().enumerate() {
        triggers.extend(trigger(
            &mut f.section(format!("spec.triggers[{i}]")),
            wire,
            &names,
        ));
    }
    DegradationPolicy {
        levels,
        routes,
        triggers,
    }
}

fn degradation_level(s: &mut Section<'_>, wire: &v1::DegradationLevel) -> Option<DegradationLevel> {
    let name = s.name("name", &wire.name);
    let at = s.at("flags");
    s.fields().count(&at, wire.flags.len(), 0..=64);
    // In order of the keys, so that the same mistakes are told in the same order.
    let flags: BTreeMap<Box<str>, Box<str>> = wire
        .flags
        .iter()
        .map(|(flag, variant)| (flag.as_str().into(), variant.as_str().into()))
        .collect();
    for (flag, variant) in &flags {
        if flag.is_empty() || flag.len() > MAX_KEY {
            s.reject::<()>(
                "flags",
                format!(
                    "has a key of {} bytes; want flags' keys, 1 to {MAX_KEY} bytes",
                    flag.len()
                ),
            );
        } else {
            key(s, &format!("flags.{flag}"), variant, "a variant's name");
        }
    }
    let shed_below = one_priority(s, "shedBelow", wire.shed_below);
    Some(DegradationLevel {
        name: name?,
        flags,
        shed_below,
    })
}

fn trigger(
    s: &mut Section<'_>,
    wire: &v1::DegradationTrigger,
    levels: &[&str],
) -> Option<DegradationTrigger> {
    let level = trigger_level(s, &wire.level, levels);
    let signal = match &wire.signal {
        None => s.reject_here(
            "looks at nothing; want one of circuitOpen, errorRate, latency, saturation, burnRate",
        ),
        Some(wire) => signal(s, wire),
    };
    let hold_for = s.duration(
        "holdFor",
        wire.hold_for.as_ref(),
        10 * SECOND,
        Duration::ZERO..=HOUR,
    );
    let clear_after = s.duration(
        "clearAfter",
        wire.clear_after.as_ref(),
        MINUTE,
        Duration::ZERO..=DAY,
    );
    let min_stay = s.duration("minStay", wire.min_stay.as_ref(), MINUTE, Duration::ZERO..=DAY);
    let max_stay = s.optional_duration("maxStay", wire.max_stay.as_ref(), SECOND..=7 * DAY);
    let scope = match v1::DegradationScope::try_from(wire.scope) {
        Ok(v1::DegradationScope::Unspecified | v1::DegradationScope::Zone) => Some(Scope::Zone),
        Ok(v1::DegradationScope::Mesh) => Some(Scope::Mesh),
        Err(_) => s.reject("scope", format!("{} is not known; want Zone or Mesh", wire.scope)),
    };
    Some(DegradationTrigger {
        level: level?,
        signal: signal?,
        hold_for,
        clear_after,
        min_stay,
        max_stay,
        scope: scope?,
    })
}

fn trigger_level(s: &mut Section<'_>, name: &str, levels: &[&str]) -> Option<usize> {
    let want = either(levels.get(1..).unwrap_or_default());
    if name.is_empty() {
        return s.reject("level", format!("is missing; want {want}"));
    }
    match levels.iter().position(|level| *level == name) {
        Some(0) => s.reject(
            "level",
            format!("{name} is the level that holds when nothing is wrong; want {want}"),
        ),
        Some(position) => Some(position),
        None => s.reject(
            "level",
            format!("{name:?} is not one of spec.levels; want {want}"),
        ),
    }
}

/// Words, as a choice.
fn either(words: &[&str]) -> String {
    match words {
        [] => "a level after the first, which there isn't".to_owned(),
        [only] => (*only).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

fn signal(s: &mut Section<'_>, wire: &v1::degradation_trigger::Signal) -> Option<Signal> {
    use v1::degradation_trigger::Signal as Wire;
    match wire {
        Wire::CircuitOpen(service) => {
            let service = s.name("circuitOpen", service)?;
            Some(Signal::CircuitOpen { service })
        }
        Wire::ErrorRate(wire) => error_rate(&mut s.section("errorRate"), wire),
        Wire::Latency(wire) => latency(&mut s.section("latency"), wire),
        Wire::Saturation(wire) => saturation(&mut s.section("saturation"), wire),
        Wire::BurnRate(wire) => burn_rate(&mut s.section("burnRate"), wire),
    }
}

fn error_rate(s: &mut Section<'_>, wire: &v1::ErrorRateSignal) -> Option<Signal> {
    let service = s.name("service", &wire.service);
    let above = s.required("above", wire.above, 1..=100);
    let clear_below = s.optional("clearBelow", wire.clear_below, above / 2, 0..=above.min(100));
    let window = s.duration("window", wire.window.as_ref(), 30 * SECOND, SECOND..=10 * MINUTE);
    let minimum_calls = s.small("minimumCalls", wire.minimum_calls, 20, 1..=1_000_000);
    Some(Signal::ErrorRate {
        service: service?,
        above,
        clear_below,
        window,
        minimum_calls,
    })
}

fn latency(s: &mut Section<'_>, wire: &v1::LatencySignal) -> Option<Signal> {
    let service = s.name("service", &wire.service);
    let percentile = s.small("percentile", wire.percentile, 95, 1..=99);
    if wire.above.is_none() {
        s.reject::<()>("above", "is missing; want 1ms to 1h");
    }
    let above = s.duration("above", wire.above.as_ref(), HOUR, MS..=HOUR);
    let clear_below = s.duration(
        "clearBelow",
        wire.clear_below.as_ref(),
        above.saturating_mul(4) / 5,
        Duration::ZERO..=above.min(HOUR),
    );
    let window = s.duration("window", wire.window.as_ref(), 30 * SECOND, SECOND..=10 * MINUTE);
    let minimum_calls = s.small("minimumCalls", wire.minimum_calls, 20, 1..=1_000_000);
    Some(Signal::Latency {
        service: service?,
        percentile,
        above,
        clear_below,
        window,
        minimum_calls,
    })
}

fn saturation(s: &mut Section<'_>, wire: &v1::SaturationSignal) -> Option<Signal> {
    let service = s.name("service", &wire.service);
    let above = s.required("above", wire.above, 1..=1000).min(1000);
    let clear_below = s.optional("clearBelow", wire.clear_below, above * 4 / 5, 0..=above);
    Some(Signal::Saturation {
        service: service?,
        above,
        clear_below,
    })
}

fn burn_rate(s: &mut Section<'_>, wire: &v1::BurnRateSignal) -> Option<Signal> {
    let service = s.name("service", &wire.service);
    let objective = s.required("objective", wire.objective, 50_000..=99_999);
    let above = s.small("above", wire.above, 144, 10..=10_000);
    let clear_below = s.optional("clearBelow", wire.clear_below, above / 2, 0..=above.min(10_000));
    let long_window = s.duration("longWindow", wire.long_window.as_ref(), HOUR, MINUTE..=6 * HOUR);
    let short_window = s.duration(
        "shortWindow",
        wire.short_window.as_ref(),
        long_window / 12,
        SECOND..=long_window.clamp(MINUTE, 6 * HOUR),
    );
    let minimum_calls = s.small("minimumCalls", wire.minimum_calls, 20, 1..=1_000_000);
    Some(Signal::BurnRate {
        service: service?,
        objective,
        above,
        clear_below,
        long_window,
        short_window,
        minimum_calls,
    })
}

pub(super) fn degradation_override(
    f: &mut Fields,
    wire: &v1::DegradationOverride,
) -> Option<DegradationOverride> {
    let policy = f.name("spec.policy", &wire.policy);
    let level = f.name("spec.level", &wire.level);
    let expire_time = expire_time(f, wire.expire_time);
    bounded(f, "spec.reason", &wire.reason, 256);
    let zones = f.section("spec").names("zones", &wire.zones, 64);
    Some(DegradationOverride {
        policy: policy?,
        level: level?,
        expire_time: expire_time?,
        reason: wire.reason.as_str().into(),
        zones,
    })
}

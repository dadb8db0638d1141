//! Flags, what hangs on them, fallback ladders, levels of degradation and queues, at random.

use super::{HOUR, MINUTE, SECOND, header, name, statuses, within};
use leeward_flags::FlagSet;
use leeward_policy::model::{
    Act, Cache, Cause, DegradationLevel, DegradationOverride, DegradationPolicy, DegradationTrigger,
    FallbackPolicy, Fault, FeatureFlags, FlagCondition, Priority, Queue, QueueStore, Redirect, Rung,
    RungCause, Scope, Signal, StaticAnswer, Template,
};
use leeward_policy::{Name, Spec};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

const DAY: u64 = 24 * HOUR;

/// A flag's key, or a variant's name: what looks like something else in YAML is a text all the same.
fn key() -> impl Strategy<Value = Box<str>> {
    "(on|true|null|7|1\\.5|[a-zA-Z$._é: -]{1,12})".prop_map(Box::from)
}

pub(super) fn condition() -> impl Strategy<Value = FlagCondition> {
    (key(), btree_set(key(), 0..4), option::of(header()), any::<bool>()).prop_map(
        |(flag, variants, targeting_key_header, default)| FlagCondition {
            flag: (*flag).into(),
            variants: variants.into_iter().collect(),
            targeting_key_header,
            default,
        },
    )
}

pub(super) fn cache() -> impl Strategy<Value = Cache> {
    let sizes = (64u64 << 10..=4 << 30).prop_flat_map(|most| (Just(most), 1u64 << 10..=most));
    let times = (within(0, DAY), within(0, 7 * DAY), within(0, DAY));
    (times, sizes, any::<bool>()).prop_map(
        |((default_ttl, stale_if_error, stale_while_revalidate), (max_bytes, max_object_bytes), coalesce)| {
            Cache {
                default_ttl,
                stale_if_error,
                stale_while_revalidate,
                max_bytes,
                max_object_bytes,
                coalesce,
            }
        },
    )
}

pub(super) fn fault() -> impl Strategy<Value = Fault> {
    let causes = [
        Cause::ConnectFailure,
        Cause::Timeout,
        Cause::Reset,
        Cause::NoEndpoint,
        Cause::Overloaded,
        Cause::CircuitOpen,
    ];
    let delay = || within(1, HOUR);
    let what = prop_oneof![
        (option::of(delay()), select(causes.to_vec())).prop_map(|(delay, abort)| (delay, Some(abort))),
        delay().prop_map(|delay| (Some(delay), None)),
    ];
    (1..=100u32, what, option::of(condition())).prop_map(|(percent, (delay, abort), when)| Fault {
        percent,
        delay,
        abort,
        when,
    })
}

pub(super) fn names(most: usize) -> impl Strategy<Value = Vec<Name>> {
    btree_set(name(), 0..most).prop_map(|names| names.into_iter().collect())
}

/// A text that stands for itself, or a template.
fn text() -> impl Strategy<Value = (&'static str, bool)> {
    let any = ["", "5 $ {off}", "true", "a ${request.path", "{\"a\": [1, 2.5]}"];
    let templates = [
        "",
        "$$",
        "${cause}",
        "for ${request.header.X-User}, $$5",
        "${route}${service}${zone}",
    ];
    prop_oneof![
        select(any.to_vec()).prop_map(|text| (text, false)),
        select(templates.to_vec()).prop_map(|text| (text, true)),
    ]
}

fn static_answer() -> impl Strategy<Value = Act> {
    (200..=599u16, vec((header(), text()), 0..3), text()).prop_map(|(status, headers, (body, template))| {
        let read = |text: &str| match template {
            true => Template::parse(text).unwrap(),
            false => Template::fixed(text),
        };
        let headers = headers
            .into_iter()
            .filter(|(_, (_, is_template))| *is_template == template);
        Act::Static(Arc::new(StaticAnswer {
            status,
            headers: headers.map(|(name, (value, _))| (name, read(value))).collect(),
            body: read(body),
            template,
        }))
    })
}

fn act() -> impl Strategy<Value = Act> {
    let locations = [
        "/",
        "/sorry?of=${request.path}",
        "https://status.example/$$?${request.query}#a",
    ];
    let redirect = (select(locations.to_vec()), select(vec![301, 302, 303, 307, 308]));
    prop_oneof![
        (name(), "[a-z{}: é\n]{0,20}").prop_map(|(plugin, config)| Act::Plugin {
            plugin,
            config: config.into()
        }),
        static_answer(),
        name().prop_map(|service| Act::Service { service }),
        names(4).prop_map(|zones| Act::Zone { zones }),
        option::of(within(SECOND, 7 * DAY)).prop_map(|max_stale| Act::Stale { max_stale }),
        name().prop_map(|queue| Act::Queue { queue }),
        redirect.prop_map(|(location, status)| Act::Redirect(Arc::new(Redirect {
            location: Template::parse(location).unwrap(),
            status,
        }))),
        option::of(400..=599u16).prop_map(|status| Act::Fail { status }),
    ]
}

fn rung() -> impl Strategy<Value = Rung> {
    let mut causes: Vec<_> = Cause::ALL.into_iter().map(RungCause::Of).collect();
    causes.extend([RungCause::ZoneDown, RungCause::PluginFault]);
    let methods: Vec<Box<str>> = ["GET", "POST", "M-SEARCH"].map(Box::from).to_vec();
    (
        act(),
        subsequence(causes, 0..5),
        subsequence(methods, 0..3),
        option::of(condition()),
        1..=100u32,
    )
        .prop_map(|(act, causes, methods, when, deadline_percent)| Rung {
            act,
            causes,
            methods,
            when,
            deadline_percent,
        })
}

pub(super) fn fallback() -> impl Strategy<Value = Spec> {
    let causes: Vec<_> = Cause::ALL
        .into_iter()
        .filter(|cause| *cause != Cause::UpstreamStatus)
        .collect();
    let on = subsequence(causes, 1..=9);
    (on, statuses(400), vec(rung(), 1..5), any::<bool>(), 1..=90u32).prop_map(
        |(on, on_statuses, mut rungs, hide_header, reserve_percent)| {
            // What ends every ladder is last.
            let last = rungs.len() - 1;
            for rung in &mut rungs[..last] {
                if matches!(rung.act, Act::Fail { .. }) {
                    rung.methods = vec!["GET".into()];
                }
            }
            Spec::FallbackPolicy(FallbackPolicy {
                on,
                on_statuses,
                rungs,
                hide_header,
                reserve_percent,
            })
        },
    )
}

/// Any JSON, as a flag's variant may be.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        prop::num::f64::NORMAL.prop_map(Value::from),
        "(|true|~|1e3|\\PC{0,12})".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            btree_map("(null|[a-z$ é:]{1,6})", inner, 0..4).prop_map(|map| map.into_iter().collect()),
        ]
    })
}

pub(super) fn feature_flags() -> impl Strategy<Value = Spec> {
    let flag = (
        any::<bool>(),
        btree_map("[a-z]{1,6}", value().prop_map(|v| json!({"is": v})), 1..4),
    );
    btree_map("[a-zA-Z0-9.-]{1,12}", flag, 0..4).prop_map(|flags| {
        let flags: serde_json::Map<_, _> = flags
            .into_iter()
            .map(|(key, (enabled, variants))| {
                let first = variants.keys().next().cloned();
                let state = if enabled { "ENABLED" } else { "DISABLED" };
                let targeting = json!({"if": [{"==": [{"var": "zone"}, "a"]}, first, null]});
                let flag = json!({
                    "state": state, "variants": variants, "defaultVariant": first, "targeting": targeting,
                });
                (key, flag)
            })
            .collect();
        let document = json!({"flags": flags, "metadata": {"version": 1.5}}).to_string();
        Spec::FeatureFlags(FeatureFlags {
            set: Arc::new(FlagSet::parse(&document).unwrap()),
        })
    })
}

fn signal() -> impl Strategy<Value = Signal> {
    let marks = |low: u32, high: u32| (low..=high).prop_flat_map(|above| (Just(above), 0..=above));
    let (window, calls) = (|| within(SECOND, 10 * MINUTE), 1..=1_000_000u32);
    let latency = within(1, HOUR).prop_flat_map(|above| {
        let below = 0..=u64::try_from(above.as_nanos()).unwrap();
        (Just(above), below.prop_map(Duration::from_nanos))
    });
    let windows = within(MINUTE, 6 * HOUR).prop_flat_map(|long| {
        let short = 1_000_000_000..=u64::try_from(long.as_nanos()).unwrap();
        (Just(long), short.prop_map(Duration::from_nanos))
    });
    let error_rate = (name(), marks(1, 100), window(), calls.clone());
    let latency = (name(), 1..=99u32, latency, window(), calls.clone());
    let burn_rate = (name(), 50_000..=99_999u32, marks(10, 10_000), windows, calls);
    prop_oneof![
        name().prop_map(|service| Signal::CircuitOpen { service }),
        error_rate.prop_map(
            |(service, (above, clear_below), window, minimum_calls)| Signal::ErrorRate {
                service,
                above,
                clear_below,
                window,
                minimum_calls,
            }
        ),
        latency.prop_map(
            |(service, percentile, (above, clear_below), window, minimum_calls)| Signal::Latency {
                service,
                percentile,
                above,
                clear_below,
                window,
                minimum_calls,
            }
        ),
        (name(), marks(1, 1000)).prop_map(|(service, (above, clear_below))| Signal::Saturation {
            service,
            above,
            clear_below,
        }),
        burn_rate.prop_map(
            |(service, objective, (above, clear_below), (long_window, short_window), minimum_calls)| {
                Signal::BurnRate {
                    service,
                    objective,
                    above,
                    clear_below,
                    long_window,
                    short_window,
                    minimum_calls,
                }
            }
        ),
    ]
}

fn trigger(levels: usize) -> impl Strategy<Value = DegradationTrigger> {
    (
        1..levels,
        signal(),
        within(0, HOUR),
        within(0, DAY),
        within(0, DAY),
        option::of(within(SECOND, 7 * DAY)),
        select(vec![Scope::Zone, Scope::Mesh]),
    )
        .prop_map(
            |(level, signal, hold_for, clear_after, min_stay, max_stay, scope)| DegradationTrigger {
                level,
                signal,
                hold_for,
                clear_after,
                min_stay,
                max_stay,
                scope,
            },
        )
}

pub(super) fn degradation_policy() -> impl Strategy<Value = Spec> {
    let flags = btree_map(key(), key(), 0..4);
    let level = (flags, option::of(select(Priority::ALL.to_vec())));
    btree_map(name(), level, 2..=8)
        .prop_flat_map(|levels| {
            let triggers = vec(trigger(levels.len()), 0..4);
            (Just(levels), names(4), triggers)
        })
        .prop_map(|(levels, routes, triggers)| {
            let levels = levels.into_iter();
            let levels = levels.map(|(name, (flags, shed_below))| DegradationLevel {
                name,
                flags,
                shed_below,
            });
            Spec::DegradationPolicy(DegradationPolicy {
                levels: levels.collect(),
                routes,
                triggers,
            })
        })
}

pub(super) fn degradation_override() -> impl Strategy<Value = Spec> {
    let time = (0..=253_402_300_799u64, 0..1_000_000_000u32);
    (name(), name(), time, "[a-zé: ]{0,20}", names(4)).prop_map(
        |(policy, level, (seconds, nanos), reason, zones)| {
            Spec::DegradationOverride(DegradationOverride {
                policy,
                level,
                expire_time: SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos),
                reason: reason.into(),
                zones,
            })
        },
    )
}

fn store() -> impl Strategy<Value = QueueStore> {
    let servers = [
        "nats://10.0.0.1:4222",
        "tls://nats.example",
        "nats://[::1]:4222",
        "nats://n:1",
    ];
    let servers: Vec<Box<str>> = servers.map(Box::from).to_vec();
    let file = option::of(Just(Box::from("/etc/nats.creds")));
    prop_oneof![
        Just(QueueStore::Sqlite),
        (subsequence(servers, 1..=4), 1..=5u32, file).prop_map(|(servers, replicas, credentials_file)| {
            QueueStore::JetStream {
                servers,
                replicas,
                credentials_file,
            }
        }),
    ]
}

pub(super) fn queue() -> impl Strategy<Value = Spec> {
    let sizes = (64u64 << 10..=1 << 40).prop_flat_map(|most| (Just(most), 1u64 << 10..=most.min(16 << 20)));
    let pauses = within(10, HOUR).prop_flat_map(|base| {
        let max = u64::try_from(base.as_nanos()).unwrap()..=DAY * 1_000_000;
        (Just(base), max.prop_map(Duration::from_nanos))
    });
    (
        store(),
        (1..=10_000_000u64, 1..=10_000_000u64),
        sizes,
        (within(SECOND, 30 * DAY), within(0, 30 * DAY)),
        0..=10_000u32,
        option::of(header()),
        pauses,
        (1..=1000u32, 1..=1_000_000u32),
    )
        .prop_map(
            |(store, counts, sizes, (max_age, keep_results), max_attempts, key_header, pauses, pace)| {
                Spec::Queue(Queue {
                    store,
                    max_entries: counts.0,
                    max_bytes: sizes.0,
                    max_entry_bytes: sizes.1,
                    max_age,
                    max_attempts,
                    key_header,
                    base_interval: pauses.0,
                    max_interval: pauses.1,
                    max_concurrency: pace.0,
                    max_rate: pace.1,
                    keep_results,
                    max_dead_letters: counts.1,
                })
            },
        )
}

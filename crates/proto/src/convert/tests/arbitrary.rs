//! Every resource that is valid, at random.

mod access;
mod authorization;
mod capture;
mod degradation;
mod gateway;
mod plugin;
mod rollout;
mod workload;

use leeward_policy::model::{
    AdaptiveConcurrency, AdmissionControl, Backend, BalancePolicy, BreakerMode, CheckKind, CircuitBreaker,
    CircuitOverride, ConnectionPool, DirectCallers, Endpoint, Ewma, FailurePercentageDetection, HashKey,
    HealthCheck, Hedge, Hold, HostMatch, LoadBalancer, LoadShedding, OutlierDetection, OverrideTarget,
    PathMatch, PerCaller, Priority, RateLimit, RateLimitKey, RequestPriority, ResiliencePolicy, Retry,
    RetryBudget, RetryOn, Route, RouteMatch, RouteRule, Selection, Service, SuccessRateDetection, Zone,
    ZoneDrain, ZoneFailover, ZoneGateway, ZoneMode, ZoneProxy, ZoneTransport,
};
use leeward_policy::{Name, Spec};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select, subsequence};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;

/// A duration between two numbers of milliseconds, to the nanosecond.
fn within(low: u64, high: u64) -> impl Strategy<Value = Duration> {
    let whole = (low..=high).prop_map(Duration::from_millis);
    let fine = (low * 1_000_000..=high * 1_000_000).prop_map(Duration::from_nanos);
    prop_oneof![whole, fine]
}

/// A limit, or none.
fn limit(low: u64, high: u64) -> impl Strategy<Value = Option<Duration>> {
    option::of(within(low, high))
}

pub(super) fn name() -> impl Strategy<Value = Name> {
    "[a-z]([a-z0-9-]{0,8}[a-z0-9])?".prop_map(|text| Name::parse(&text).unwrap())
}

fn header() -> impl Strategy<Value = Box<str>> {
    "x-[a-z0-9-]{1,10}".prop_map(Box::from)
}

fn labels() -> impl Strategy<Value = BTreeMap<Box<str>, Box<str>>> {
    // What looks like a number or a boolean is a text all the same.
    let text = |pattern: &'static str| pattern.prop_map(Box::from);
    btree_map(text("[a-z0-9./]{1,9}"), text("(|true|7|[a-zé: ]{1,9})"), 0..4)
}

fn statuses(low: u16) -> impl Strategy<Value = Vec<u16>> {
    vec(low..=599, 0..5).prop_map(|mut statuses| {
        statuses.sort_unstable();
        statuses.dedup();
        statuses
    })
}

fn breaker() -> impl Strategy<Value = CircuitBreaker> {
    let modes = [
        BreakerMode::Enforce,
        BreakerMode::Observe,
        BreakerMode::ForceOpen,
        BreakerMode::ForceClosed,
    ];
    let counts = (
        0..=100u32,
        0..=100u32,
        0..=10_000u32,
        1..=1_000_000u32,
        0..=100u32,
        1..=1000u32,
    );
    let times = (
        within(1, HOUR),
        within(SECOND, 10 * MINUTE),
        within(10, HOUR),
        within(0, 23 * HOUR),
        within(0, HOUR),
    );
    (counts, times, select(modes.to_vec())).prop_map(|(counts, times, mode)| CircuitBreaker {
        failure_rate: counts.0,
        slow_call_rate: counts.1,
        slow_call_duration: times.0,
        consecutive_failures: counts.2,
        minimum_calls: counts.3,
        window: times.1,
        open_time: times.2,
        max_open_time: times.2 + times.3,
        open_jitter: counts.4,
        half_open_probes: counts.5,
        ramp: times.4,
        mode,
    })
}

fn budget() -> impl Strategy<Value = RetryBudget> {
    (0..=100u32, within(SECOND, MINUTE), 0..=1_000_000u32).prop_map(|(percent, window, min_per_second)| {
        RetryBudget {
            percent,
            window,
            min_per_second,
        }
    })
}

fn adaptive() -> impl Strategy<Value = AdaptiveConcurrency> {
    let counts = (
        1..=99u32,
        1..=1_000_000u32,
        1..=10_000u32,
        0..=100u32,
        1..=1000u32,
        0..=1000u32,
    );
    (counts, within(10, 10 * SECOND), within(SECOND, HOUR)).prop_map(|(counts, update, rtt)| {
        AdaptiveConcurrency {
            percentile: counts.0,
            update_interval: update,
            max_limit: counts.1,
            min_rtt_interval: rtt,
            min_rtt_requests: counts.2,
            min_rtt_jitter: counts.3,
            min_limit: counts.4.min(counts.1),
            buffer: counts.5,
        }
    })
}

fn admission() -> impl Strategy<Value = AdmissionControl> {
    let counts = (1..=100u32, 10..=1000u32, 0..=1_000_000u32, 1..=100u32);
    (within(SECOND, 10 * MINUTE), counts).prop_map(|(window, counts)| AdmissionControl {
        window,
        success_threshold: counts.0,
        aggression: counts.1,
        rps_threshold: counts.2,
        max_rejection_probability: counts.3,
    })
}

fn shedding() -> impl Strategy<Value = LoadShedding> {
    [1..=100u32, 1..=100, 1..=100].prop_map(|mut marks| {
        marks.sort_unstable();
        let [low, normal, high] = marks;
        LoadShedding { low, normal, high }
    })
}

fn resilience_policy() -> impl Strategy<Value = Spec> {
    (
        option::of(breaker()),
        option::of(breaker()),
        budget(),
        budget(),
        option::of(adaptive()),
        option::of(admission()),
        option::of(shedding()),
    )
        .prop_map(|parts| {
            Spec::ResiliencePolicy(ResiliencePolicy {
                circuit_breaker: parts.0,
                endpoint_circuit_breaker: parts.1,
                retry_budget: parts.2,
                hedge_budget: parts.3,
                adaptive_concurrency: parts.4,
                admission_control: parts.5,
                load_shedding: parts.6,
            })
        })
}

fn circuit_override() -> impl Strategy<Value = Spec> {
    let target = prop_oneof![
        name().prop_map(OverrideTarget::Service),
        name().prop_map(OverrideTarget::Route)
    ];
    let mode = select(vec![BreakerMode::ForceOpen, BreakerMode::ForceClosed]);
    let time = (0..=253_402_300_799u64, 0..1_000_000_000u32);
    (target, mode, time, "[ -~é]{0,60}").prop_map(|(target, mode, (seconds, nanos), reason)| {
        Spec::CircuitOverride(CircuitOverride {
            target,
            mode,
            expire_time: SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos),
            reason: reason.into(),
        })
    })
}

fn hash_key() -> impl Strategy<Value = HashKey> {
    prop_oneof![
        header().prop_map(HashKey::Header),
        ("[a-zA-Z_]{1,9}", limit(0, 365 * 24 * HOUR), "/[a-z/]{0,9}").prop_map(|(name, ttl, path)| {
            HashKey::Cookie {
                name: name.into(),
                ttl,
                path: path.into(),
            }
        }),
        Just(HashKey::Source),
    ]
}

fn balance_policy() -> impl Strategy<Value = BalancePolicy> {
    let factor = || prop_oneof![Just(0u32), 100..=1000u32];
    prop_oneof![
        (within(1, 10 * SECOND), within(100, 10 * MINUTE)).prop_map(|(default_rtt, decay_time)| {
            BalancePolicy::PeakEwma(Ewma {
                default_rtt,
                decay_time,
            })
        }),
        Just(BalancePolicy::LeastRequest),
        Just(BalancePolicy::RoundRobin),
        Just(BalancePolicy::Random),
        (hash_key(), 1024..=8_388_608u32, factor()).prop_map(|(key, minimum_size, balance_factor)| {
            BalancePolicy::RingHash {
                key,
                minimum_size,
                balance_factor,
            }
        }),
        (hash_key(), select(vec![251u32, 65_537, 5_000_011]), factor()).prop_map(
            |(key, table_size, balance_factor)| BalancePolicy::Maglev {
                key,
                table_size,
                balance_factor,
            }
        ),
    ]
}

fn zones() -> impl Strategy<Value = ZoneFailover> {
    let times = (within(0, HOUR), within(0, HOUR), within(0, HOUR));
    (100..=1000u32, 1..=100u32, 0..=100u32, 1..=100u32, times).prop_map(
        |(factor, leave, above, step, times)| ZoneFailover {
            overprovisioning_factor: factor,
            leave_below: leave,
            leave_after: times.0,
            return_above: (leave + above).min(100),
            return_after: times.1,
            return_step: step,
            return_interval: times.2,
            remote_reports: step % 2 == 0,
        },
    )
}

fn zone_mode() -> impl Strategy<Value = ZoneMode> {
    let named = || proptest::collection::btree_set("[a-z]{1,9}", 1..5);
    let names =
        |set: BTreeSet<String>| -> Vec<Name> { set.iter().map(|zone| Name::parse(zone).unwrap()).collect() };
    prop_oneof![
        Just(ZoneMode::Nearest),
        named().prop_map(move |set| ZoneMode::ActivePassive(names(set))),
        (named(), 1..=1000u32, 0..=1000u32).prop_map(move |(set, first, rest)| {
            let weights = std::iter::once(first).chain(std::iter::repeat(rest));
            ZoneMode::ActiveActive(names(set).into_iter().zip(weights).collect())
        }),
    ]
}

fn load_balancer() -> impl Strategy<Value = LoadBalancer> {
    let times = (within(0, HOUR), within(0, 300 * SECOND));
    let within = option::of("[a-z./-]{1,63}");
    let parts = (balance_policy(), times, 0..=100u32, zones(), within, zone_mode());
    parts.prop_map(|(policy, times, panic_threshold, zones, within, mode)| {
        let hashes = policy.hash_key().is_some();
        let weighs = matches!(policy, BalancePolicy::PeakEwma(_) | BalancePolicy::LeastRequest);
        LoadBalancer {
            policy,
            slow_start_window: if hashes { Duration::ZERO } else { times.0 },
            panic_threshold,
            failure_penalty: if weighs { times.1 } else { Duration::ZERO },
            zones,
            within: within.map(Into::into),
            mode,
        }
    })
}

fn health_check() -> impl Strategy<Value = HealthCheck> {
    let host = "[a-z]{1,9}(:8080)?".prop_map(Box::from);
    let http = ("/[a-z?=/]{0,9}", option::of(host), statuses(100));
    let kind = prop_oneof![
        http.prop_map(|(path, host, expected_statuses)| CheckKind::Http {
            path: path.into(),
            host,
            expected_statuses,
        }),
        "[a-z.]{0,9}".prop_map(|service| CheckKind::Grpc {
            service: service.into()
        }),
        Just(CheckKind::Tcp),
    ];
    let times = (within(100, HOUR), within(10, MINUTE));
    (kind, times, 1..=100u32, 1..=100u32, 0..=50u32).prop_map(|(kind, times, bad, good, jitter)| {
        HealthCheck {
            kind,
            interval: times.0,
            timeout: times.1,
            unhealthy_threshold: bad,
            healthy_threshold: good,
            interval_jitter: jitter,
        }
    })
}

fn outlier() -> impl Strategy<Value = OutlierDetection> {
    let counts = (1..=1000u32, 0..=1000u32, 0..=100u32, 0..=100u32);
    let times = (within(100, HOUR), within(10, HOUR), within(0, 23 * HOUR));
    let rate = (1..=4096u32, 1..=1_000_000u32, 0..=10_000u32);
    let percentage = option::of((1..=100u32, 1..=4096u32, 1..=1_000_000u32));
    (counts, times, rate, percentage).prop_map(|(counts, times, rate, percentage)| OutlierDetection {
        consecutive_5xx: counts.0,
        consecutive_gateway_failure: counts.1,
        interval: times.0,
        base_ejection_time: times.1,
        max_ejection_time: times.1 + times.2,
        max_ejection_percent: counts.2,
        ejection_jitter: counts.3,
        success_rate: SuccessRateDetection {
            minimum_hosts: rate.0,
            request_volume: rate.1,
            stdev_factor: rate.2,
        },
        failure_percentage: percentage.map(|(threshold, minimum_hosts, request_volume)| {
            FailurePercentageDetection {
                threshold,
                minimum_hosts,
                request_volume,
            }
        }),
    })
}

fn pool() -> impl Strategy<Value = ConnectionPool> {
    let counts = (
        1..=1_000_000u32,
        0..=100_000u32,
        1..=1_000_000u32,
        1..=1_000_000u32,
        0..=10_000u32,
    );
    let times = (within(1, MINUTE), within(SECOND, HOUR));
    let caller = option::of((1..=1_000_000u32, option::of(header())));
    (counts, times, caller).prop_map(|(counts, times, caller)| ConnectionPool {
        max_requests: counts.0,
        max_pending_requests: counts.1,
        pending_timeout: times.0,
        max_connections: counts.2,
        max_retries: counts.3,
        max_idle_per_endpoint: counts.4,
        idle_timeout: times.1,
        per_caller: caller.map(|(max_requests, header)| PerCaller { max_requests, header }),
    })
}

fn endpoints() -> impl Strategy<Value = Vec<Endpoint>> {
    let endpoint = (
        any::<([u8; 4], [u16; 8], bool)>(),
        1..=u16::MAX,
        name(),
        option::of(name()),
        1..=1000u32,
        labels(),
    );
    vec(endpoint, 0..4).prop_map(|endpoints| {
        let mut seen = BTreeSet::new();
        endpoints
            .into_iter()
            .map(|((v4, v6, is_v4), port, zone, proxy, weight, labels)| Endpoint {
                address: if is_v4 {
                    SocketAddr::from((v4, port))
                } else {
                    SocketAddr::from((v6, port))
                },
                zone,
                proxy,
                weight,
                labels,
            })
            .filter(|endpoint| seen.insert(endpoint.address))
            .collect()
    })
}

fn selection(kind: &'static str) -> impl Strategy<Value = Selection> {
    let names = vec(any::<u16>(), 0..3).prop_map(move |numbers| {
        let numbers = BTreeSet::from_iter(numbers).into_iter();
        let names = numbers.map(|n| Name::parse(&format!("{kind}-{n}")).unwrap());
        Selection::Only(names.collect())
    });
    prop_oneof![Just(Selection::All), names]
}

fn zone() -> impl Strategy<Value = Spec> {
    let transport = || select(vec![ZoneTransport::Auto, ZoneTransport::Quic, ZoneTransport::Tcp]);
    let named = |kind: &str, n: u16| Name::parse(&format!("{kind}-{n}")).unwrap();
    let proxies = btree_map(any::<u16>(), (any::<[u8; 4]>(), 1..=u16::MAX), 0..4);
    let failover = vec(any::<u16>(), 0..3);
    let time = || (0..4_000_000_000u64).prop_map(|s| SystemTime::UNIX_EPOCH + Duration::from_secs(s));
    let drain = (time(), 1..=100u32, within(SECOND, HOUR), time(), "[a-z ]{0,20}");
    let drain = drain.prop_map(|(start_time, step, interval, expire_time, reason)| ZoneDrain {
        start_time,
        step,
        interval,
        expire_time,
        reason: reason.into(),
    });
    let labels = btree_map("[a-z]{1,9}", "[a-z0-9]{0,9}", 0..3);
    let address = option::of((any::<[u8; 4]>(), 1..=u16::MAX));
    let gateways = (
        vec((any::<Index>(), address), 0..3),
        any::<bool>(),
        selection("service"),
    );
    let more = (labels, option::of(drain), gateways, capture::capture());
    let parts = (proxies, failover, transport(), transport(), more);
    parts.prop_map(
        move |(proxies, failover, transport, within, (labels, drain, between, capture))| {
            let proxies: Vec<_> = proxies
                .into_iter()
                .map(|(n, address)| ZoneProxy {
                    name: named("proxy", n),
                    address: address.into(),
                })
                .collect();
            let (chosen, allow, imports) = between;
            let mut gateways: Vec<ZoneGateway> = Vec::new();
            for (at, address) in chosen.into_iter().filter(|_| !proxies.is_empty()) {
                let name = at.get(&proxies).name.clone();
                if gateways.iter().all(|known| known.name != name) {
                    let address = address.map(Into::into);
                    gateways.push(ZoneGateway { name, address });
                }
            }
            let direct_callers = if allow && !gateways.is_empty() {
                DirectCallers::Allow
            } else {
                DirectCallers::Refuse
            };
            Spec::Zone(Zone {
                gateways,
                direct_callers,
                imports,
                proxies,
                failover: BTreeSet::from_iter(failover)
                    .into_iter()
                    .map(|n| named("zone", n))
                    .collect(),
                transport,
                transport_within: within,
                labels: labels.into_iter().map(|(k, v)| (k.into(), v.into())).collect(),
                drain,
                capture,
            })
        },
    )
}

fn service() -> impl Strategy<Value = Spec> {
    let hold = (0..=100_000u32, within(1, 10 * MINUTE));
    (
        capture::spoken(),
        endpoints(),
        within(1, MINUTE),
        outlier(),
        pool(),
        load_balancer(),
        option::of(health_check()),
        option::of(name()),
        (hold, selection("zone")),
    )
        .prop_map(|parts| {
            let (hold, export_to) = parts.8;
            let (protocol, addresses, server_names, tcp) = parts.0;
            Spec::Service(capture::sensible(Service {
                export_to,
                protocol,
                addresses,
                server_names,
                tcp,
                endpoints: parts.1,
                connect_timeout: parts.2,
                outlier: parts.3,
                pool: parts.4,
                balance: parts.5,
                health_check: parts.6,
                resilience: parts.7,
                hold: Hold {
                    max_requests: hold.0,
                    max_wait: hold.1,
                },
            }))
        })
}

fn retry() -> impl Strategy<Value = Retry> {
    let conditions = vec![
        RetryOn::ConnectFailure,
        RetryOn::RefusedStream,
        RetryOn::Reset,
        RetryOn::GatewayError,
        RetryOn::FiveXx,
        RetryOn::Retriable4xx,
        RetryOn::GrpcCancelled,
        RetryOn::GrpcDeadlineExceeded,
        RetryOn::GrpcInternal,
        RetryOn::GrpcResourceExhausted,
        RetryOn::GrpcUnavailable,
    ];
    let hedge = option::of((within(1, MINUTE), 1..=4u8));
    let times = (within(1, MINUTE), within(0, 4 * MINUTE));
    (
        1..=10u8,
        subsequence(conditions, 1..=11).prop_shuffle(),
        statuses(400),
        times,
        any::<bool>(),
        0..=1u64 << 20,
        hedge,
    )
        .prop_map(
            |(max_attempts, mut on, status_codes, times, non_idempotent, max_body_bytes, hedge)| {
                if !status_codes.is_empty() {
                    on.push(RetryOn::RetriableStatusCodes);
                }
                Retry {
                    max_attempts,
                    on,
                    status_codes,
                    base_interval: times.0,
                    max_interval: times.0 + times.1,
                    non_idempotent,
                    max_body_bytes,
                    hedge: hedge.map(|(delay, max_hedges)| Hedge { delay, max_hedges }),
                }
            },
        )
}

fn rate_limit() -> impl Strategy<Value = RateLimit> {
    let key = prop_oneof![
        Just(RateLimitKey::Rule),
        (1..=1_000_000u32).prop_map(|max_keys| RateLimitKey::Caller { max_keys }),
        (header(), 1..=1_000_000u32).prop_map(|(name, max_keys)| RateLimitKey::Header { name, max_keys }),
    ];
    let count = 1..=1_000_000_000u32;
    (count.clone(), within(10, 24 * HOUR), count, key).prop_map(|(requests, interval, burst, key)| {
        RateLimit {
            requests,
            interval,
            burst,
            key,
        }
    })
}

fn rule() -> impl Strategy<Value = RouteRule> {
    let backend = (
        name(),
        0..=1_000_000u32,
        labels(),
        option::of(degradation::condition()),
    );
    let priority = (select(Priority::ALL.to_vec()), option::of(header()));
    let hangs = (
        option::of(degradation::condition()),
        option::of(degradation::condition()),
        option::of(degradation::cache()),
        option::of(degradation::fault()),
        vec(plugin::filter(), 0..3),
        option::of(plugin::router()),
    );
    (
        vec(backend, 1..3),
        limit(10, HOUR),
        option::of(0..=100u32),
        limit(1, HOUR),
        retry(),
        option::of(name()),
        option::of(breaker()),
        vec(rate_limit(), 0..3),
        priority,
        hangs,
    )
        .prop_map(
            |(backends, request, share, idle, retry, fallback, breaker, limits, priority, hangs)| {
                let mut backends: Vec<_> = backends
                    .into_iter()
                    .map(|(service, weight, subset, when)| Backend {
                        service,
                        weight,
                        subset,
                        when,
                    })
                    .collect();
                backends[0].weight = backends[0].weight.max(1);
                // Any share of what each attempt may have at most, as long as that is a millisecond at least.
                let whole = request.unwrap_or(Duration::from_secs(3600));
                let kept = fallback.as_ref().map_or(Duration::ZERO, |_| whole / 10);
                let most = (whole - kept) / u32::from(retry.max_attempts);
                let attempt = share.map(|share| most * share / 100);
                let matches = vec![RouteMatch {
                    path: PathMatch::Prefix("".into()),
                    method: None,
                    headers: Vec::new(),
                }];
                RouteRule {
                    request_timeout: request,
                    attempt_timeout: attempt.filter(|attempt| *attempt >= Duration::from_millis(1)),
                    idle_timeout: idle,
                    retry,
                    fallback,
                    circuit_breaker: breaker,
                    rate_limits: limits,
                    priority: RequestPriority {
                        default: priority.0,
                        header: priority.1,
                    },
                    when: hangs.0,
                    enabled: hangs.1,
                    cache: hangs.2,
                    fault: hangs.3,
                    filters: hangs.4,
                    router: hangs.5,
                    ..RouteRule::new(matches, backends)
                }
            },
        )
}

pub(super) fn spec() -> impl Strategy<Value = Spec> {
    let route = (vec(rule(), 1..3), gateway::parents()).prop_map(|(rules, parents)| {
        Spec::Route(Route {
            hostnames: vec![HostMatch::Any],
            rules,
            parents,
        })
    });
    prop_oneof![
        zone(),
        service(),
        route,
        degradation::fallback(),
        resilience_policy(),
        circuit_override(),
        plugin::plugin(),
        degradation::feature_flags(),
        degradation::degradation_policy(),
        degradation::degradation_override(),
        degradation::queue(),
        authorization::policy(),
        gateway::gateway(),
        rollout::policy(),
        access::policy(),
        workload::workload(),
    ]
}

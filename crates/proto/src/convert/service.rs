//! Services: their endpoints, and what one of them may take, and is asked, and answers for.

use super::text::{is_token, key_header, optional_key_header};
use super::{DAY, HOUR, MS, SECOND};
use crate::field::{Fields, Section};
use crate::v1;
use leeward_policy::model::{
    BalancePolicy, CheckKind, ConnectionPool, Endpoint, Ewma, FailurePercentageDetection, HashKey,
    HealthCheck, Hold, LoadBalancer, OutlierDetection, PerCaller, Protocol, Service, SuccessRateDetection,
    ZoneFailover, ZoneMode,
};
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);
/// Longest key of a label, in bytes.
const MAX_LABEL_KEY: usize = 63;

pub(super) fn service(f: &mut Fields, wire: &v1::Service) -> Option<Service> {
    let protocol = match v1::Protocol::try_from(wire.protocol) {
        Ok(v1::Protocol::Unspecified | v1::Protocol::Http1) => Some(Protocol::Http1),
        Ok(v1::Protocol::Http2) => Some(Protocol::Http2),
        Err(_) => f.reject(
            "spec.protocol",
            format!("{} is not known; want HTTP1 or HTTP2", wire.protocol),
        ),
    };
    let endpoints = endpoints(f, &wire.endpoints);
    let mut s = f.section("spec");
    let connect_timeout = s.duration(
        "connectTimeout",
        wire.connect_timeout.as_ref(),
        SECOND,
        MS..=MINUTE,
    );
    let outlier = match &wire.outlier_detection {
        None => OutlierDetection::DEFAULT,
        Some(wire) => outlier(&mut s.section("outlierDetection"), wire),
    };
    let pool = match &wire.connection_pool {
        None => ConnectionPool::DEFAULT,
        Some(wire) => pool(&mut s.section("connectionPool"), wire),
    };
    let balance = match &wire.load_balancer {
        None => Some(LoadBalancer::DEFAULT),
        Some(wire) => load_balancer(&mut s.section("loadBalancer"), wire),
    };
    let health_check = match &wire.health_check {
        None => None,
        Some(wire) => health_check(&mut s.section("healthCheck"), wire),
    };
    let hold = match &wire.hold {
        None => Hold::DEFAULT,
        Some(wire) => hold(&mut s.section("hold"), wire),
    };
    let resilience = f.optional_name("spec.resilience", &wire.resilience);
    Some(Service {
        protocol: protocol?,
        endpoints,
        connect_timeout,
        outlier,
        pool,
        balance: balance?,
        health_check,
        resilience,
        hold,
    })
}

fn endpoints(f: &mut Fields, wire: &[v1::Endpoint]) -> Vec<Endpoint> {
    f.count("spec.endpoints", wire.len(), 0..=4096);
    let mut endpoints = Vec::new();
    for (i, endpoint) in wire.iter().enumerate() {
        let path = format!("spec.endpoints[{i}]");
        let address = f.address(&format!("{path}.address"), &endpoint.address);
        let zone = f.name(&format!("{path}.zone"), &endpoint.zone);
        let proxy = f.optional_name(&format!("{path}.proxy"), &endpoint.proxy);
        let weight = f.small(&format!("{path}.weight"), endpoint.weight, 1, 1..=1000);
        let labels = f.labels(&format!("{path}.labels"), &endpoint.labels);
        endpoints.extend(address.zip(zone).map(|(address, zone)| Endpoint {
            address,
            zone,
            proxy,
            weight,
            labels,
        }));
    }
    let places: Vec<_> = wire
        .iter()
        .map(|e| format!("{} in zone {} behind {:?}", e.address, e.zone, e.proxy))
        .collect();
    f.unique("spec.endpoints", "", &places);
    endpoints
}

fn outlier(s: &mut Section<'_>, wire: &v1::OutlierDetection) -> OutlierDetection {
    let default = OutlierDetection::DEFAULT;
    let base = s.duration(
        "baseEjectionTime",
        wire.base_ejection_time.as_ref(),
        default.base_ejection_time,
        10 * MS..=HOUR,
    );
    let longest = s.duration(
        "maxEjectionTime",
        wire.max_ejection_time.as_ref(),
        default.max_ejection_time.max(base),
        base.min(DAY)..=DAY,
    );
    OutlierDetection {
        consecutive_5xx: s.small(
            "consecutive5xx",
            wire.consecutive_5xx,
            default.consecutive_5xx,
            1..=1000,
        ),
        consecutive_gateway_failure: s.small(
            "consecutiveGatewayFailure",
            wire.consecutive_gateway_failure,
            default.consecutive_gateway_failure,
            0..=1000,
        ),
        interval: s.duration(
            "interval",
            wire.interval.as_ref(),
            default.interval,
            100 * MS..=HOUR,
        ),
        base_ejection_time: base,
        max_ejection_time: longest,
        max_ejection_percent: s.optional(
            "maxEjectionPercent",
            wire.max_ejection_percent,
            default.max_ejection_percent,
            0..=100,
        ),
        ejection_jitter: s.optional(
            "ejectionJitter",
            wire.ejection_jitter,
            default.ejection_jitter,
            0..=100,
        ),
        success_rate: match &wire.success_rate {
            None => default.success_rate,
            Some(wire) => success_rate(&mut s.section("successRate"), wire),
        },
        failure_percentage: wire
            .failure_percentage
            .as_ref()
            .map(|wire| failure_percentage(&mut s.section("failurePercentage"), wire)),
    }
}

fn success_rate(s: &mut Section<'_>, wire: &v1::SuccessRateDetection) -> SuccessRateDetection {
    let default = SuccessRateDetection::DEFAULT;
    SuccessRateDetection {
        minimum_hosts: s.small(
            "minimumHosts",
            wire.minimum_hosts,
            default.minimum_hosts,
            1..=4096,
        ),
        request_volume: s.small(
            "requestVolume",
            wire.request_volume,
            default.request_volume,
            1..=1_000_000,
        ),
        stdev_factor: s.optional("stdevFactor", wire.stdev_factor, default.stdev_factor, 0..=10_000),
    }
}

fn failure_percentage(
    s: &mut Section<'_>,
    wire: &v1::FailurePercentageDetection,
) -> FailurePercentageDetection {
    let default = FailurePercentageDetection::DEFAULT;
    FailurePercentageDetection {
        threshold: s.small("threshold", wire.threshold, default.threshold, 1..=100),
        minimum_hosts: s.small(
            "minimumHosts",
            wire.minimum_hosts,
            default.minimum_hosts,
            1..=4096,
        ),
        request_volume: s.small(
            "requestVolume",
            wire.request_volume,
            default.request_volume,
            1..=1_000_000,
        ),
    }
}

fn pool(s: &mut Section<'_>, wire: &v1::ConnectionPool) -> ConnectionPool {
    let default = ConnectionPool::DEFAULT;
    ConnectionPool {
        max_requests: s.small(
            "maxRequests",
            wire.max_requests,
            default.max_requests,
            1..=1_000_000,
        ),
        max_pending_requests: s.small(
            "maxPendingRequests",
            wire.max_pending_requests,
            default.max_pending_requests,
            0..=100_000,
        ),
        pending_timeout: s.duration(
            "pendingTimeout",
            wire.pending_timeout.as_ref(),
            default.pending_timeout,
            MS..=MINUTE,
        ),
        max_connections: s.small(
            "maxConnections",
            wire.max_connections,
            default.max_connections,
            1..=1_000_000,
        ),
        max_retries: s.small("maxRetries", wire.max_retries, default.max_retries, 1..=1_000_000),
        max_idle_per_endpoint: s.optional(
            "maxIdlePerEndpoint",
            wire.max_idle_per_endpoint,
            default.max_idle_per_endpoint,
            0..=10_000,
        ),
        idle_timeout: s.duration(
            "idleTimeout",
            wire.idle_timeout.as_ref(),
            default.idle_timeout,
            SECOND..=HOUR,
        ),
        per_caller: wire.per_caller.as_ref().map(|wire| {
            let mut s = s.section("perCaller");
            let at = s.at("header");
            PerCaller {
                max_requests: s.required("maxRequests", wire.max_requests, 1..=1_000_000),
                header: optional_key_header(s.fields(), &at, &wire.header),
            }
        }),
    }
}

fn load_balancer(s: &mut Section<'_>, wire: &v1::LoadBalancer) -> Option<LoadBalancer> {
    let default = LoadBalancer::DEFAULT;
    let policy = balance_policy(s, wire);
    let hashes = matches!(
        wire.policy(),
        v1::LoadBalancerPolicy::RingHash | v1::LoadBalancerPolicy::Maglev
    );
    let weighs = matches!(
        wire.policy(),
        v1::LoadBalancerPolicy::Unspecified
            | v1::LoadBalancerPolicy::PeakEwma
            | v1::LoadBalancerPolicy::LeastRequest
    );
    // What a policy has no use for is zero in the model, so that nobody acts on it.
    let slow_start = if hashes {
        Duration::ZERO
    } else {
        default.slow_start_window
    };
    let penalty = if weighs {
        default.failure_penalty
    } else {
        Duration::ZERO
    };
    only(
        s,
        "slowStartWindow",
        hashes && wire.slow_start_window.is_some(),
        "PeakEwma, LeastRequest, RoundRobin and Random",
    );
    only(
        s,
        "failurePenalty",
        !weighs && wire.failure_penalty.is_some(),
        "PeakEwma and LeastRequest",
    );
    let slow_start_window = s.duration(
        "slowStartWindow",
        wire.slow_start_window.as_ref(),
        slow_start,
        Duration::ZERO..=HOUR,
    );
    let failure_penalty = s.duration(
        "failurePenalty",
        wire.failure_penalty.as_ref(),
        penalty,
        Duration::ZERO..=300 * SECOND,
    );
    let panic_threshold = s.optional(
        "panicThreshold",
        wire.panic_threshold,
        default.panic_threshold,
        0..=100,
    );
    let zones = match &wire.zone_failover {
        None => default.zones,
        Some(wire) => zone_failover(&mut s.section("zoneFailover"), wire),
    };
    let within = wire.zone_failover.as_ref().map_or("", |wire| &wire.within);
    if within.len() > MAX_LABEL_KEY {
        s.reject::<()>(
            "zoneFailover.within",
            format!(
                "has {} bytes; want the key of a label, of 1 to {MAX_LABEL_KEY}",
                within.len()
            ),
        );
    }
    let mode = wire.zone_failover.as_ref().and_then(|wire| wire.mode.as_ref());
    let mode = mode.map_or(ZoneMode::Nearest, |mode| {
        zone_mode(&mut s.section("zoneFailover"), mode)
    });
    Some(LoadBalancer {
        policy: policy?,
        slow_start_window,
        panic_threshold,
        failure_penalty,
        zones,
        within: (!within.is_empty()).then(|| within.into()),
        mode,
    })
}

/// Refuses a setting that the chosen policy has no use for.
fn only(s: &mut Section<'_>, field: &str, stray: bool, whose: &str) {
    if stray {
        s.reject::<()>(
            field,
            format!("is only for {whose}; leave it out, or choose another policy"),
        );
    }
}

fn balance_policy(s: &mut Section<'_>, wire: &v1::LoadBalancer) -> Option<BalancePolicy> {
    use v1::LoadBalancerPolicy as Wire;
    let Ok(policy) = Wire::try_from(wire.policy) else {
        return s.reject(
            "policy",
            format!(
                "{} is not known; want PeakEwma, LeastRequest, RoundRobin, Random, RingHash or Maglev",
                wire.policy
            ),
        );
    };
    let (ring, table) = (policy == Wire::RingHash, policy == Wire::Maglev);
    let ewma = matches!(policy, Wire::Unspecified | Wire::PeakEwma);
    let hashes = ring || table;
    only(
        s,
        "hashKey",
        !hashes && wire.hash_key.is_some(),
        "RingHash and Maglev",
    );
    only(
        s,
        "hashBalanceFactor",
        !hashes && wire.hash_balance_factor.is_some(),
        "RingHash and Maglev",
    );
    only(
        s,
        "minimumRingSize",
        !ring && wire.minimum_ring_size != 0,
        "RingHash",
    );
    only(s, "tableSize", !table && wire.table_size != 0, "Maglev");
    only(s, "defaultRtt", !ewma && wire.default_rtt.is_some(), "PeakEwma");
    only(s, "decayTime", !ewma && wire.decay_time.is_some(), "PeakEwma");
    match policy {
        Wire::Unspecified | Wire::PeakEwma => {
            let default = Ewma::DEFAULT;
            Some(BalancePolicy::PeakEwma(Ewma {
                default_rtt: s.duration(
                    "defaultRtt",
                    wire.default_rtt.as_ref(),
                    default.default_rtt,
                    MS..=10 * SECOND,
                ),
                decay_time: s.duration(
                    "decayTime",
                    wire.decay_time.as_ref(),
                    default.decay_time,
                    100 * MS..=10 * MINUTE,
                ),
            }))
        }
        Wire::LeastRequest => Some(BalancePolicy::LeastRequest),
        Wire::RoundRobin => Some(BalancePolicy::RoundRobin),
        Wire::Random => Some(BalancePolicy::Random),
        Wire::RingHash => {
            let key = hash_key(s, wire.hash_key.as_ref());
            let minimum_size = s.small("minimumRingSize", wire.minimum_ring_size, 1024, 1024..=8_388_608);
            let balance_factor = balance_factor(s, wire);
            Some(BalancePolicy::RingHash {
                key: key?,
                minimum_size,
                balance_factor,
            })
        }
        Wire::Maglev => {
            let key = hash_key(s, wire.hash_key.as_ref());
            let table_size = s.small("tableSize", wire.table_size, 65_537, 251..=5_000_011);
            if (251..=5_000_011).contains(&table_size) && !is_prime(table_size) {
                s.reject::<()>(
                    "tableSize",
                    format!("{table_size} is not a prime; want one, such as 65537"),
                );
            }
            let balance_factor = balance_factor(s, wire);
            Some(BalancePolicy::Maglev {
                key: key?,
                table_size,
                balance_factor,
            })
        }
    }
}

fn balance_factor(s: &mut Section<'_>, wire: &v1::LoadBalancer) -> u32 {
    let factor = wire.hash_balance_factor.unwrap_or(125);
    if factor != 0 && !(100..=1000).contains(&factor) {
        s.reject::<()>(
            "hashBalanceFactor",
            format!("{factor} is out of range; want 100 to 1000, or 0 for no bound"),
        );
    }
    factor
}

/// Trial division, over at most 1118 odd numbers for the largest table.
fn is_prime(n: u32) -> bool {
    let mut odd = (3..).step_by(2).take_while(|d| d * d <= n);
    n == 2 || (n > 2 && n % 2 == 1 && odd.all(|d| !n.is_multiple_of(d)))
}

fn hash_key(s: &mut Section<'_>, wire: Option<&v1::HashKey>) -> Option<HashKey> {
    let mut s = s.section("hashKey");
    match wire.and_then(|key| key.kind.as_ref()) {
        None => s.reject_here("is missing; RingHash and Maglev want one of header, cookie, source"),
        Some(v1::hash_key::Kind::Header(name)) => {
            let at = s.at("header");
            key_header(s.fields(), &at, name).map(HashKey::Header)
        }
        Some(v1::hash_key::Kind::Cookie(cookie)) => cookie_key(&mut s.section("cookie"), cookie),
        Some(v1::hash_key::Kind::Source(true)) => Some(HashKey::Source),
        Some(v1::hash_key::Kind::Source(false)) => {
            s.reject("source", "is false; want true, or another kind of key")
        }
    }
}

fn cookie_key(s: &mut Section<'_>, wire: &v1::CookieKey) -> Option<HashKey> {
    // RFC 6265 §4.1.1: a cookie's name is a token; its path is visible and has no ';'.
    if !is_token(&wire.name) || wire.name.len() > 256 {
        s.reject::<()>(
            "name",
            format!(
                "{:?} is not a cookie's name; want one such as shop-user",
                wire.name
            ),
        );
    }
    let path = if wire.path.is_empty() { "/" } else { &wire.path };
    let plain = |b: u8| (b' '..=b'~').contains(&b) && b != b';';
    if !path.starts_with('/') || path.len() > 1024 || !path.bytes().all(plain) {
        s.reject::<()>(
            "path",
            format!("{path:?} is not a cookie's path; want one that begins with '/', of at most 1024 bytes, without ';'"),
        );
    }
    let ttl = wire
        .ttl
        .as_ref()
        .map(|ttl| s.duration("ttl", Some(ttl), Duration::ZERO, Duration::ZERO..=365 * DAY));
    Some(HashKey::Cookie {
        name: wire.name.as_str().into(),
        ttl,
        path: path.into(),
    })
}

fn zone_failover(s: &mut Section<'_>, wire: &v1::ZoneFailover) -> ZoneFailover {
    let default = ZoneFailover::DEFAULT;
    // On the wire 0 is "not said", so the smallest share that can be said is 1.
    let leave_below = s.small("leaveBelow", wire.leave_below, default.leave_below, 1..=100);
    ZoneFailover {
        overprovisioning_factor: s.small(
            "overprovisioningFactor",
            wire.overprovisioning_factor,
            default.overprovisioning_factor,
            100..=1000,
        ),
        leave_below,
        leave_after: s.duration(
            "leaveAfter",
            wire.leave_after.as_ref(),
            default.leave_after,
            Duration::ZERO..=HOUR,
        ),
        return_above: s.small(
            "returnAbove",
            wire.return_above,
            default.return_above.max(leave_below),
            leave_below.min(100)..=100,
        ),
        return_after: s.duration(
            "returnAfter",
            wire.return_after.as_ref(),
            default.return_after,
            Duration::ZERO..=HOUR,
        ),
        return_step: s.small("returnStep", wire.return_step, default.return_step, 1..=100),
        return_interval: s.duration(
            "returnInterval",
            wire.return_interval.as_ref(),
            default.return_interval,
            Duration::ZERO..=HOUR,
        ),
        remote_reports: wire.remote_reports.unwrap_or(default.remote_reports),
    }
}

fn zone_mode(s: &mut Section<'_>, wire: &v1::zone_failover::Mode) -> ZoneMode {
    const MOST: usize = 64;
    match wire {
        v1::zone_failover::Mode::ActiveActive(wire) => {
            let path = s.at("activeActive.zones");
            let f = s.fields();
            f.count(&path, wire.zones.len(), 1..=MOST);
            let mut zones = Vec::new();
            for (i, zone) in wire.zones.iter().enumerate() {
                let at = format!("{path}[{i}]");
                let weight = f.optional(&format!("{at}.weight"), zone.weight, 1, 0..=1000);
                zones.extend(
                    f.name(&format!("{at}.zone"), &zone.zone)
                        .map(|name| (name, weight)),
                );
            }
            let named: Vec<&str> = wire.zones.iter().map(|zone| zone.zone.as_str()).collect();
            f.unique(&path, ".zone", &named);
            if !wire.zones.is_empty() && wire.zones.iter().all(|zone| zone.weight == Some(0)) {
                f.reject::<()>(path, "has only weights of 0; want one at least that is above");
            }
            ZoneMode::ActiveActive(zones)
        }
        v1::zone_failover::Mode::ActivePassive(wire) => {
            if wire.zones.is_empty() {
                s.reject::<()>("activePassive.zones", format!("has 0 entries; want 1 to {MOST}"));
            }
            let zones = s.names("activePassive.zones", &wire.zones, MOST);
            ZoneMode::ActivePassive(zones)
        }
    }
}

fn health_check(s: &mut Section<'_>, wire: &v1::HealthCheck) -> Option<HealthCheck> {
    let kind = match &wire.kind {
        None => s.reject_here("says nothing of how to ask; want one of http, grpc, tcp"),
        Some(v1::health_check::Kind::Http(http)) => http_check(&mut s.section("http"), http),
        Some(v1::health_check::Kind::Grpc(grpc)) => Some(CheckKind::Grpc {
            service: grpc.service.as_str().into(),
        }),
        Some(v1::health_check::Kind::Tcp(true)) => Some(CheckKind::Tcp),
        Some(v1::health_check::Kind::Tcp(false)) => {
            s.reject("tcp", "is false; want true, or another kind of check")
        }
    };
    let interval = s.duration("interval", wire.interval.as_ref(), 5 * SECOND, 100 * MS..=HOUR);
    let timeout = s.duration("timeout", wire.timeout.as_ref(), SECOND, 10 * MS..=MINUTE);
    let unhealthy_threshold = s.small("unhealthyThreshold", wire.unhealthy_threshold, 3, 1..=100);
    let healthy_threshold = s.small("healthyThreshold", wire.healthy_threshold, 2, 1..=100);
    let interval_jitter = s.optional("intervalJitter", wire.interval_jitter, 10, 0..=50);
    Some(HealthCheck {
        kind: kind?,
        interval,
        timeout,
        unhealthy_threshold,
        healthy_threshold,
        interval_jitter,
    })
}

fn http_check(s: &mut Section<'_>, wire: &v1::HttpCheck) -> Option<CheckKind> {
    let path = if wire.path.is_empty() { "/" } else { &wire.path };
    // A query is welcome here, unlike in a match.
    let plain = |b: u8| b.is_ascii_graphic() && b != b'#';
    if !path.starts_with('/') || path.len() > 4096 || !path.bytes().all(plain) {
        s.reject::<()>(
            "path",
            format!(
                "{path:?} is not a path; want one that begins with '/', of at most 4096 bytes, without spaces"
            ),
        );
    }
    let part = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b);
    if wire.host.len() > 259 || !wire.host.bytes().all(part) {
        s.reject::<()>(
            "host",
            format!(
                "{:?} is not a host; want one such as shop.example or shop.example:8080",
                wire.host
            ),
        );
    }
    let at = s.at("expectedStatuses");
    Some(CheckKind::Http {
        path: path.into(),
        host: (!wire.host.is_empty()).then(|| wire.host.as_str().into()),
        expected_statuses: s.fields().statuses(&at, &wire.expected_statuses, 16, 100..=599),
    })
}

fn hold(s: &mut Section<'_>, wire: &v1::Hold) -> Hold {
    let default = Hold::DEFAULT;
    Hold {
        max_requests: s.optional(
            "maxRequests",
            wire.max_requests,
            default.max_requests,
            0..=100_000,
        ),
        max_wait: s.duration(
            "maxWait",
            wire.max_wait.as_ref(),
            default.max_wait,
            MS..=10 * MINUTE,
        ),
    }
}

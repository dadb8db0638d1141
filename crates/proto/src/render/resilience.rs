//! How failure and overload are met, on the wire. What is a default is written out, too, so that a reader
//! with other defaults understands the same.

use super::{duration, text};
use crate::v1;
use leeward_policy::model::{
    AdaptiveConcurrency, AdmissionControl, BalancePolicy, BreakerMode, CheckKind, CircuitBreaker,
    CircuitOverride, ConnectionPool, HashKey, HealthCheck, Hold, LoadBalancer, LoadShedding,
    OutlierDetection, OverrideTarget, Priority, RateLimit, RateLimitKey, RequestPriority, ResiliencePolicy,
    Retry, RetryBudget, RetryOn, ZoneMode,
};

pub(super) fn outlier(outlier: &OutlierDetection) -> v1::OutlierDetection {
    v1::OutlierDetection {
        consecutive_5xx: outlier.consecutive_5xx,
        base_ejection_time: duration(outlier.base_ejection_time),
        max_ejection_time: duration(outlier.max_ejection_time),
        consecutive_gateway_failure: outlier.consecutive_gateway_failure,
        interval: duration(outlier.interval),
        max_ejection_percent: Some(outlier.max_ejection_percent),
        ejection_jitter: Some(outlier.ejection_jitter),
        success_rate: Some(v1::SuccessRateDetection {
            minimum_hosts: outlier.success_rate.minimum_hosts,
            request_volume: outlier.success_rate.request_volume,
            stdev_factor: Some(outlier.success_rate.stdev_factor),
        }),
        failure_percentage: outlier
            .failure_percentage
            .map(|detection| v1::FailurePercentageDetection {
                threshold: detection.threshold,
                minimum_hosts: detection.minimum_hosts,
                request_volume: detection.request_volume,
            }),
    }
}

pub(super) fn pool(pool: &ConnectionPool) -> v1::ConnectionPool {
    v1::ConnectionPool {
        max_requests: pool.max_requests,
        max_idle_per_endpoint: Some(pool.max_idle_per_endpoint),
        idle_timeout: duration(pool.idle_timeout),
        max_connections: pool.max_connections,
        max_pending_requests: pool.max_pending_requests,
        pending_timeout: duration(pool.pending_timeout),
        max_retries: pool.max_retries,
        per_caller: pool.per_caller.as_ref().map(|caller| v1::PerCaller {
            max_requests: caller.max_requests,
            header: text(caller.header.as_deref()),
        }),
    }
}

pub(super) fn load_balancer(balance: &LoadBalancer) -> v1::LoadBalancer {
    use v1::LoadBalancerPolicy as Wire;
    let mut wire = v1::LoadBalancer {
        panic_threshold: Some(balance.panic_threshold),
        slow_start_window: duration(balance.slow_start_window),
        failure_penalty: duration(balance.failure_penalty),
        zone_failover: Some(zone_failover(balance)),
        ..v1::LoadBalancer::default()
    };
    // What a policy has no use for can't be said with it.
    match &balance.policy {
        BalancePolicy::PeakEwma(ewma) => {
            wire.set_policy(Wire::PeakEwma);
            wire.default_rtt = duration(ewma.default_rtt);
            wire.decay_time = duration(ewma.decay_time);
        }
        BalancePolicy::LeastRequest => wire.set_policy(Wire::LeastRequest),
        BalancePolicy::RoundRobin => {
            wire.set_policy(Wire::RoundRobin);
            wire.failure_penalty = None;
        }
        BalancePolicy::Random => {
            wire.set_policy(Wire::Random);
            wire.failure_penalty = None;
        }
        BalancePolicy::RingHash {
            key,
            minimum_size,
            balance_factor,
        } => {
            wire.set_policy(Wire::RingHash);
            wire.hash_key = Some(hash_key(key));
            wire.minimum_ring_size = *minimum_size;
            wire.hash_balance_factor = Some(*balance_factor);
            (wire.slow_start_window, wire.failure_penalty) = (None, None);
        }
        BalancePolicy::Maglev {
            key,
            table_size,
            balance_factor,
        } => {
            wire.set_policy(Wire::Maglev);
            wire.hash_key = Some(hash_key(key));
            wire.table_size = *table_size;
            wire.hash_balance_factor = Some(*balance_factor);
            (wire.slow_start_window, wire.failure_penalty) = (None, None);
        }
    }
    wire
}

fn hash_key(key: &HashKey) -> v1::HashKey {
    let kind = match key {
        HashKey::Header(name) => v1::hash_key::Kind::Header(name.to_string()),
        HashKey::Cookie { name, ttl, path } => v1::hash_key::Kind::Cookie(v1::CookieKey {
            name: name.to_string(),
            ttl: ttl.and_then(duration),
            path: path.to_string(),
        }),
        HashKey::Source => v1::hash_key::Kind::Source(true),
    };
    v1::HashKey { kind: Some(kind) }
}

fn zone_failover(balance: &LoadBalancer) -> v1::ZoneFailover {
    let zones = &balance.zones;
    v1::ZoneFailover {
        overprovisioning_factor: zones.overprovisioning_factor,
        leave_below: zones.leave_below,
        leave_after: duration(zones.leave_after),
        return_above: zones.return_above,
        return_after: duration(zones.return_after),
        return_step: zones.return_step,
        return_interval: duration(zones.return_interval),
        within: text(balance.within.as_deref()),
        mode: zone_mode(&balance.mode),
        remote_reports: Some(zones.remote_reports),
    }
}

fn zone_mode(mode: &ZoneMode) -> Option<v1::zone_failover::Mode> {
    match mode {
        ZoneMode::Nearest => None,
        ZoneMode::ActiveActive(zones) => {
            let weighed = zones.iter().map(|(zone, weight)| v1::ZoneWeight {
                zone: zone.to_string(),
                weight: Some(*weight),
            });
            let zones = weighed.collect();
            Some(v1::zone_failover::Mode::ActiveActive(v1::ActiveActive { zones }))
        }
        ZoneMode::ActivePassive(zones) => {
            let zones = zones.iter().map(ToString::to_string).collect();
            Some(v1::zone_failover::Mode::ActivePassive(v1::ActivePassive {
                zones,
            }))
        }
    }
}

pub(super) fn health_check(check: &HealthCheck) -> v1::HealthCheck {
    let kind = match &check.kind {
        CheckKind::Http {
            path,
            host,
            expected_statuses,
        } => v1::health_check::Kind::Http(v1::HttpCheck {
            path: path.to_string(),
            host: text(host.as_deref()),
            expected_statuses: statuses(expected_statuses),
        }),
        CheckKind::Grpc { service } => v1::health_check::Kind::Grpc(v1::GrpcCheck {
            service: service.to_string(),
        }),
        CheckKind::Tcp => v1::health_check::Kind::Tcp(true),
    };
    v1::HealthCheck {
        kind: Some(kind),
        interval: duration(check.interval),
        timeout: duration(check.timeout),
        unhealthy_threshold: check.unhealthy_threshold,
        healthy_threshold: check.healthy_threshold,
        interval_jitter: Some(check.interval_jitter),
    }
}

pub(super) fn hold(hold: &Hold) -> v1::Hold {
    v1::Hold {
        max_requests: Some(hold.max_requests),
        max_wait: duration(hold.max_wait),
    }
}

pub(super) fn resilience_policy(policy: &ResiliencePolicy) -> v1::ResiliencePolicy {
    v1::ResiliencePolicy {
        circuit_breaker: policy.circuit_breaker.as_ref().map(circuit_breaker),
        endpoint_circuit_breaker: policy.endpoint_circuit_breaker.as_ref().map(circuit_breaker),
        retry_budget: Some(budget(&policy.retry_budget)),
        hedge_budget: Some(budget(&policy.hedge_budget)),
        adaptive_concurrency: policy.adaptive_concurrency.as_ref().map(adaptive),
        admission_control: policy.admission_control.as_ref().map(admission),
        load_shedding: policy.load_shedding.map(|marks: LoadShedding| v1::LoadShedding {
            low: marks.low,
            normal: marks.normal,
            high: marks.high,
        }),
    }
}

pub(super) fn circuit_breaker(breaker: &CircuitBreaker) -> v1::CircuitBreaker {
    v1::CircuitBreaker {
        failure_rate: Some(breaker.failure_rate),
        slow_call_rate: breaker.slow_call_rate,
        slow_call_duration: duration(breaker.slow_call_duration),
        consecutive_failures: breaker.consecutive_failures,
        minimum_calls: breaker.minimum_calls,
        window: duration(breaker.window),
        open_time: duration(breaker.open_time),
        max_open_time: duration(breaker.max_open_time),
        open_jitter: Some(breaker.open_jitter),
        half_open_probes: breaker.half_open_probes,
        ramp: duration(breaker.ramp),
        mode: mode(breaker.mode).into(),
    }
}

const fn mode(mode: BreakerMode) -> v1::BreakerMode {
    match mode {
        BreakerMode::Enforce => v1::BreakerMode::Enforce,
        BreakerMode::Observe => v1::BreakerMode::Observe,
        BreakerMode::ForceOpen => v1::BreakerMode::ForceOpen,
        BreakerMode::ForceClosed => v1::BreakerMode::ForceClosed,
    }
}

fn budget(budget: &RetryBudget) -> v1::RetryBudget {
    v1::RetryBudget {
        percent: Some(budget.percent),
        window: duration(budget.window),
        min_per_second: Some(budget.min_per_second),
    }
}

fn adaptive(adaptive: &AdaptiveConcurrency) -> v1::AdaptiveConcurrency {
    v1::AdaptiveConcurrency {
        percentile: adaptive.percentile,
        update_interval: duration(adaptive.update_interval),
        max_limit: adaptive.max_limit,
        min_rtt_interval: duration(adaptive.min_rtt_interval),
        min_rtt_requests: adaptive.min_rtt_requests,
        min_rtt_jitter: Some(adaptive.min_rtt_jitter),
        min_limit: adaptive.min_limit,
        buffer: Some(adaptive.buffer),
    }
}

fn admission(admission: &AdmissionControl) -> v1::AdmissionControl {
    v1::AdmissionControl {
        window: duration(admission.window),
        success_threshold: admission.success_threshold,
        aggression: admission.aggression,
        rps_threshold: admission.rps_threshold,
        max_rejection_probability: admission.max_rejection_probability,
    }
}

pub(super) fn circuit_override(held: &CircuitOverride) -> v1::CircuitOverride {
    let (service, route) = match &held.target {
        OverrideTarget::Service(name) => (name.to_string(), String::new()),
        OverrideTarget::Route(name) => (String::new(), name.to_string()),
    };
    v1::CircuitOverride {
        service,
        route,
        mode: mode(held.mode).into(),
        expire_time: Some(held.expire_time.into()),
        reason: held.reason.to_string(),
    }
}

pub(super) fn retry(retry: &Retry) -> v1::RouteRetry {
    v1::RouteRetry {
        max_attempts: retry.max_attempts.into(),
        retry_on: retry.on.iter().map(|on| condition(*on).into()).collect(),
        retriable_status_codes: statuses(&retry.status_codes),
        base_interval: duration(retry.base_interval),
        max_interval: duration(retry.max_interval),
        retry_non_idempotent: retry.non_idempotent,
        max_body_bytes: Some(retry.max_body_bytes),
        hedge: retry.hedge.map(|hedge| v1::Hedge {
            delay: duration(hedge.delay),
            max_hedges: hedge.max_hedges.into(),
        }),
    }
}

const fn condition(on: RetryOn) -> v1::RetryOn {
    match on {
        RetryOn::ConnectFailure => v1::RetryOn::ConnectFailure,
        RetryOn::RefusedStream => v1::RetryOn::RefusedStream,
        RetryOn::Reset => v1::RetryOn::Reset,
        RetryOn::GatewayError => v1::RetryOn::GatewayError,
        RetryOn::FiveXx => v1::RetryOn::FiveXx,
        RetryOn::RetriableStatusCodes => v1::RetryOn::RetriableStatusCodes,
        RetryOn::Retriable4xx => v1::RetryOn::Retriable4xx,
        RetryOn::GrpcCancelled => v1::RetryOn::GrpcCancelled,
        RetryOn::GrpcDeadlineExceeded => v1::RetryOn::GrpcDeadlineExceeded,
        RetryOn::GrpcInternal => v1::RetryOn::GrpcInternal,
        RetryOn::GrpcResourceExhausted => v1::RetryOn::GrpcResourceExhausted,
        RetryOn::GrpcUnavailable => v1::RetryOn::GrpcUnavailable,
    }
}

pub(super) fn rate_limit(limit: &RateLimit) -> v1::RateLimit {
    let key = match &limit.key {
        RateLimitKey::Rule => None,
        RateLimitKey::Caller { max_keys } => Some(v1::RateLimitKey {
            kind: Some(v1::rate_limit_key::Kind::Caller(true)),
            max_keys: *max_keys,
        }),
        RateLimitKey::Header { name, max_keys } => Some(v1::RateLimitKey {
            kind: Some(v1::rate_limit_key::Kind::Header(name.to_string())),
            max_keys: *max_keys,
        }),
    };
    v1::RateLimit {
        requests: limit.requests,
        interval: duration(limit.interval),
        burst: limit.burst,
        key,
    }
}

pub(super) fn priority(priority: &RequestPriority) -> v1::RequestPriority {
    v1::RequestPriority {
        default: one_priority(priority.default).into(),
        header: text(priority.header.as_deref()),
    }
}

pub(super) const fn one_priority(priority: Priority) -> v1::Priority {
    match priority {
        Priority::Critical => v1::Priority::Critical,
        Priority::High => v1::Priority::High,
        Priority::Normal => v1::Priority::Normal,
        Priority::Low => v1::Priority::Low,
    }
}

fn statuses(statuses: &[u16]) -> Vec<u32> {
    statuses.iter().map(|status| u32::from(*status)).collect()
}

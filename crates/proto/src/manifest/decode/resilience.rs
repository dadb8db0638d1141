//! How failure and overload are met.

use super::super::words;
use super::fields::Fields;
use crate::v1;

pub(super) fn outlier(f: &mut Fields<'_>) -> v1::OutlierDetection {
    v1::OutlierDetection {
        consecutive_5xx: f.small("consecutive5xx"),
        base_ejection_time: f.duration("baseEjectionTime"),
        max_ejection_time: f.duration("maxEjectionTime"),
        consecutive_gateway_failure: f.or_zero("consecutiveGatewayFailure"),
        interval: f.duration("interval"),
        max_ejection_percent: f.optional_small("maxEjectionPercent"),
        ejection_jitter: f.optional_small("ejectionJitter"),
        success_rate: f.object("successRate", |f| v1::SuccessRateDetection {
            minimum_hosts: f.small("minimumHosts"),
            request_volume: f.small("requestVolume"),
            stdev_factor: f.optional_small("stdevFactor"),
        }),
        failure_percentage: f.object("failurePercentage", |f| v1::FailurePercentageDetection {
            threshold: f.small("threshold"),
            minimum_hosts: f.small("minimumHosts"),
            request_volume: f.small("requestVolume"),
        }),
    }
}

pub(super) fn pool(f: &mut Fields<'_>) -> v1::ConnectionPool {
    v1::ConnectionPool {
        max_requests: f.small("maxRequests"),
        max_idle_per_endpoint: f.optional_small("maxIdlePerEndpoint"),
        idle_timeout: f.duration("idleTimeout"),
        max_connections: f.small("maxConnections"),
        max_pending_requests: f.or_zero("maxPendingRequests"),
        pending_timeout: f.duration("pendingTimeout"),
        max_retries: f.small("maxRetries"),
        per_caller: f.object("perCaller", |f| v1::PerCaller {
            max_requests: f.small("maxRequests"),
            header: f.text("header"),
        }),
    }
}

pub(super) fn load_balancer(f: &mut Fields<'_>) -> v1::LoadBalancer {
    v1::LoadBalancer {
        policy: f.choice("policy", words::BALANCE),
        hash_key: f.object("hashKey", hash_key),
        minimum_ring_size: f.small("minimumRingSize"),
        table_size: f.small("tableSize"),
        hash_balance_factor: f.optional_small("hashBalanceFactor"),
        slow_start_window: f.duration("slowStartWindow"),
        panic_threshold: f.optional_small("panicThreshold"),
        default_rtt: f.duration("defaultRtt"),
        decay_time: f.duration("decayTime"),
        failure_penalty: f.duration("failurePenalty"),
        zone_failover: f.object("zoneFailover", zone_failover),
    }
}

fn zone_failover(f: &mut Fields<'_>) -> v1::ZoneFailover {
    use v1::zone_failover::Mode;
    let active_active = f.object("activeActive", |f| v1::ActiveActive {
        zones: f.list("zones", |f| v1::ZoneWeight {
            zone: f.text("zone"),
            weight: f.optional_small("weight"),
        }),
    });
    let active_passive = f.object("activePassive", |f| v1::ActivePassive {
        zones: f.text_list("zones"),
    });
    let modes = [
        active_active.map(Mode::ActiveActive),
        active_passive.map(Mode::ActivePassive),
    ];
    v1::ZoneFailover {
        overprovisioning_factor: f.small("overprovisioningFactor"),
        leave_below: f.small("leaveBelow"),
        leave_after: f.duration("leaveAfter"),
        return_above: f.small("returnAbove"),
        return_after: f.duration("returnAfter"),
        return_step: f.small("returnStep"),
        return_interval: f.duration("returnInterval"),
        within: f.text("within"),
        mode: f.exclusive("activeActive, activePassive", modes),
        remote_reports: f.optional_bool("remoteReports"),
    }
}

fn hash_key(f: &mut Fields<'_>) -> v1::HashKey {
    use v1::hash_key::Kind;
    let header = said(f.text("header"));
    let cookie = f.object("cookie", |f| v1::CookieKey {
        name: f.text("name"),
        ttl: f.duration("ttl"),
        path: f.text("path"),
    });
    let source = f.optional_bool("source");
    let kinds = [
        header.map(Kind::Header),
        cookie.map(Kind::Cookie),
        source.map(Kind::Source),
    ];
    v1::HashKey {
        kind: f.exclusive("header, cookie, source", kinds),
    }
}

pub(super) fn health_check(f: &mut Fields<'_>) -> v1::HealthCheck {
    use v1::health_check::Kind;
    let http = f.object("http", |f| v1::HttpCheck {
        path: f.text("path"),
        host: f.text("host"),
        expected_statuses: f.numbers("expectedStatuses"),
    });
    let grpc = f.object("grpc", |f| v1::GrpcCheck {
        service: f.text("service"),
    });
    let tcp = f.optional_bool("tcp");
    let kinds = [http.map(Kind::Http), grpc.map(Kind::Grpc), tcp.map(Kind::Tcp)];
    v1::HealthCheck {
        kind: f.exclusive("http, grpc, tcp", kinds),
        interval: f.duration("interval"),
        timeout: f.duration("timeout"),
        unhealthy_threshold: f.small("unhealthyThreshold"),
        healthy_threshold: f.small("healthyThreshold"),
        interval_jitter: f.optional_small("intervalJitter"),
    }
}

pub(super) fn resilience_policy(f: &mut Fields<'_>) -> v1::ResiliencePolicy {
    v1::ResiliencePolicy {
        circuit_breaker: f.object("circuitBreaker", circuit_breaker),
        endpoint_circuit_breaker: f.object("endpointCircuitBreaker", circuit_breaker),
        retry_budget: f.object("retryBudget", budget),
        hedge_budget: f.object("hedgeBudget", budget),
        adaptive_concurrency: f.object("adaptiveConcurrency", |f| v1::AdaptiveConcurrency {
            percentile: f.small("percentile"),
            update_interval: f.duration("updateInterval"),
            max_limit: f.small("maxLimit"),
            min_rtt_interval: f.duration("minRttInterval"),
            min_rtt_requests: f.small("minRttRequests"),
            min_rtt_jitter: f.optional_small("minRttJitter"),
            min_limit: f.small("minLimit"),
            buffer: f.optional_small("buffer"),
        }),
        admission_control: f.object("admissionControl", |f| v1::AdmissionControl {
            window: f.duration("window"),
            success_threshold: f.small("successThreshold"),
            aggression: f.small("aggression"),
            rps_threshold: f.or_zero("rpsThreshold"),
            max_rejection_probability: f.small("maxRejectionProbability"),
        }),
        load_shedding: f.object("loadShedding", |f| v1::LoadShedding {
            low: f.small("low"),
            normal: f.small("normal"),
            high: f.small("high"),
        }),
    }
}

pub(super) fn circuit_breaker(f: &mut Fields<'_>) -> v1::CircuitBreaker {
    v1::CircuitBreaker {
        failure_rate: f.optional_small("failureRate"),
        slow_call_rate: f.or_zero("slowCallRate"),
        slow_call_duration: f.duration("slowCallDuration"),
        consecutive_failures: f.or_zero("consecutiveFailures"),
        minimum_calls: f.small("minimumCalls"),
        window: f.duration("window"),
        open_time: f.duration("openTime"),
        max_open_time: f.duration("maxOpenTime"),
        open_jitter: f.optional_small("openJitter"),
        half_open_probes: f.small("halfOpenProbes"),
        ramp: f.duration("ramp"),
        mode: f.choice("mode", words::MODE),
    }
}

fn budget(f: &mut Fields<'_>) -> v1::RetryBudget {
    v1::RetryBudget {
        percent: f.optional_small("percent"),
        window: f.duration("window"),
        min_per_second: f.optional_small("minPerSecond"),
    }
}

pub(super) fn circuit_override(f: &mut Fields<'_>) -> v1::CircuitOverride {
    v1::CircuitOverride {
        service: f.text("service"),
        route: f.text("route"),
        mode: f.choice("mode", words::MODE),
        expire_time: f.time("expireTime"),
        reason: f.text("reason"),
    }
}

pub(super) fn retry(f: &mut Fields<'_>) -> v1::RouteRetry {
    v1::RouteRetry {
        max_attempts: f.small("maxAttempts"),
        retry_on: f.choices("retryOn", words::RETRY_ON),
        retriable_status_codes: f.numbers("retriableStatusCodes"),
        base_interval: f.duration("baseInterval"),
        max_interval: f.duration("maxInterval"),
        retry_non_idempotent: f.optional_bool("retryNonIdempotent").unwrap_or_default(),
        max_body_bytes: f.optional_size("maxBody"),
        hedge: f.object("hedge", |f| v1::Hedge {
            delay: f.duration("delay"),
            max_hedges: f.small("maxHedges"),
        }),
    }
}

pub(super) fn rate_limit(f: &mut Fields<'_>) -> v1::RateLimit {
    v1::RateLimit {
        requests: f.small("requests"),
        interval: f.duration("interval"),
        burst: f.small("burst"),
        key: f.object("key", |f| {
            use v1::rate_limit_key::Kind;
            let caller = f.optional_bool("caller").map(Kind::Caller);
            let header = said(f.text("header")).map(Kind::Header);
            v1::RateLimitKey {
                kind: f.exclusive("caller, header", [caller, header]),
                max_keys: f.small("maxKeys"),
            }
        }),
    }
}

/// A text that says something.
pub(super) fn said(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

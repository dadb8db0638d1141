//! How failure and overload are met.

use super::super::words::{self, word};
use super::{duration, fields, said};
use crate::v1;
use serde_json::{Value, json};

pub(super) fn outlier(outlier: &v1::OutlierDetection) -> Value {
    let success_rate = outlier.success_rate.as_ref().map(|detection| {
        let mut object = fields([
            ("minimumHosts", json!(detection.minimum_hosts)),
            ("requestVolume", json!(detection.request_volume)),
        ]);
        said(&mut object, "stdevFactor", detection.stdev_factor);
        object
    });
    let failure_percentage = outlier.failure_percentage.as_ref().map(|detection| {
        fields([
            ("threshold", json!(detection.threshold)),
            ("minimumHosts", json!(detection.minimum_hosts)),
            ("requestVolume", json!(detection.request_volume)),
        ])
    });
    let mut object = fields([
        ("consecutive5xx", json!(outlier.consecutive_5xx)),
        (
            "consecutiveGatewayFailure",
            json!(outlier.consecutive_gateway_failure),
        ),
        ("interval", duration(outlier.interval.as_ref())),
        ("baseEjectionTime", duration(outlier.base_ejection_time.as_ref())),
        ("maxEjectionTime", duration(outlier.max_ejection_time.as_ref())),
        ("successRate", json!(success_rate)),
        ("failurePercentage", json!(failure_percentage)),
    ]);
    said(&mut object, "maxEjectionPercent", outlier.max_ejection_percent);
    said(&mut object, "ejectionJitter", outlier.ejection_jitter);
    object
}

pub(super) fn pool(pool: &v1::ConnectionPool) -> Value {
    let per_caller = pool.per_caller.as_ref().map(|caller| {
        fields([
            ("maxRequests", json!(caller.max_requests)),
            ("header", json!(caller.header)),
        ])
    });
    let mut object = fields([
        ("maxRequests", json!(pool.max_requests)),
        ("idleTimeout", duration(pool.idle_timeout.as_ref())),
        ("maxConnections", json!(pool.max_connections)),
        ("maxPendingRequests", json!(pool.max_pending_requests)),
        ("pendingTimeout", duration(pool.pending_timeout.as_ref())),
        ("maxRetries", json!(pool.max_retries)),
        ("perCaller", json!(per_caller)),
    ]);
    said(&mut object, "maxIdlePerEndpoint", pool.max_idle_per_endpoint);
    object
}

pub(super) fn load_balancer(balance: &v1::LoadBalancer) -> Value {
    let zones = balance.zone_failover.as_ref().map(|zones| {
        let mut object = fields([
            ("overprovisioningFactor", json!(zones.overprovisioning_factor)),
            ("leaveBelow", json!(zones.leave_below)),
            ("leaveAfter", duration(zones.leave_after.as_ref())),
            ("returnAbove", json!(zones.return_above)),
            ("returnAfter", duration(zones.return_after.as_ref())),
            ("returnStep", json!(zones.return_step)),
            ("returnInterval", duration(zones.return_interval.as_ref())),
            ("within", json!(zones.within)),
            ("activeActive", json!(active_active(zones))),
            ("activePassive", json!(active_passive(zones))),
        ]);
        said(&mut object, "remoteReports", zones.remote_reports);
        object
    });
    let mut object = fields([
        ("policy", json!(word(words::BALANCE, balance.policy))),
        ("hashKey", json!(balance.hash_key.as_ref().map(hash_key))),
        ("minimumRingSize", json!(balance.minimum_ring_size)),
        ("tableSize", json!(balance.table_size)),
        ("slowStartWindow", duration(balance.slow_start_window.as_ref())),
        ("defaultRtt", duration(balance.default_rtt.as_ref())),
        ("decayTime", duration(balance.decay_time.as_ref())),
        ("failurePenalty", duration(balance.failure_penalty.as_ref())),
        ("zoneFailover", json!(zones)),
    ]);
    said(&mut object, "hashBalanceFactor", balance.hash_balance_factor);
    said(&mut object, "panicThreshold", balance.panic_threshold);
    object
}

fn active_active(zones: &v1::ZoneFailover) -> Option<Value> {
    let Some(v1::zone_failover::Mode::ActiveActive(mode)) = &zones.mode else {
        return None;
    };
    let weighed = mode.zones.iter().map(|zone| {
        let mut object = fields([("zone", json!(zone.zone))]);
        said(&mut object, "weight", zone.weight);
        object
    });
    Some(json!({"zones": weighed.collect::<Vec<_>>()}))
}

fn active_passive(zones: &v1::ZoneFailover) -> Option<Value> {
    match &zones.mode {
        Some(v1::zone_failover::Mode::ActivePassive(mode)) => Some(json!({"zones": mode.zones})),
        Some(v1::zone_failover::Mode::ActiveActive(_)) | None => None,
    }
}

fn hash_key(key: &v1::HashKey) -> Value {
    match &key.kind {
        None => json!({}),
        Some(v1::hash_key::Kind::Header(name)) => json!({"header": name}),
        Some(v1::hash_key::Kind::Cookie(cookie)) => {
            let cookie = fields([
                ("name", json!(cookie.name)),
                ("ttl", duration(cookie.ttl.as_ref())),
                ("path", json!(cookie.path)),
            ]);
            json!({"cookie": cookie})
        }
        Some(v1::hash_key::Kind::Source(source)) => json!({"source": source}),
    }
}

pub(super) fn health_check(check: &v1::HealthCheck) -> Value {
    let mut object = fields([
        ("interval", duration(check.interval.as_ref())),
        ("timeout", duration(check.timeout.as_ref())),
        ("unhealthyThreshold", json!(check.unhealthy_threshold)),
        ("healthyThreshold", json!(check.healthy_threshold)),
    ]);
    said(&mut object, "intervalJitter", check.interval_jitter);
    match &check.kind {
        None => {}
        Some(v1::health_check::Kind::Http(http)) => {
            let http = fields([
                ("path", json!(http.path)),
                ("host", json!(http.host)),
                ("expectedStatuses", json!(http.expected_statuses)),
            ]);
            said(&mut object, "http", Some(http));
        }
        Some(v1::health_check::Kind::Grpc(grpc)) => {
            said(
                &mut object,
                "grpc",
                Some(fields([("service", json!(grpc.service))])),
            );
        }
        Some(v1::health_check::Kind::Tcp(tcp)) => said(&mut object, "tcp", Some(*tcp)),
    }
    object
}

pub(super) fn hold(hold: &v1::Hold) -> Value {
    let mut object = fields([("maxWait", duration(hold.max_wait.as_ref()))]);
    said(&mut object, "maxRequests", hold.max_requests);
    object
}

pub(super) fn resilience_policy(policy: &v1::ResiliencePolicy) -> Value {
    fields([
        (
            "circuitBreaker",
            json!(policy.circuit_breaker.as_ref().map(circuit_breaker)),
        ),
        (
            "endpointCircuitBreaker",
            json!(policy.endpoint_circuit_breaker.as_ref().map(circuit_breaker)),
        ),
        ("retryBudget", json!(policy.retry_budget.as_ref().map(budget))),
        ("hedgeBudget", json!(policy.hedge_budget.as_ref().map(budget))),
        (
            "adaptiveConcurrency",
            json!(policy.adaptive_concurrency.as_ref().map(adaptive)),
        ),
        (
            "admissionControl",
            json!(policy.admission_control.as_ref().map(admission)),
        ),
        (
            "loadShedding",
            json!(policy.load_shedding.as_ref().map(|marks| fields([
                ("low", json!(marks.low)),
                ("normal", json!(marks.normal)),
                ("high", json!(marks.high)),
            ]))),
        ),
    ])
}

pub(super) fn circuit_breaker(breaker: &v1::CircuitBreaker) -> Value {
    let mut object = fields([
        ("slowCallRate", json!(breaker.slow_call_rate)),
        ("slowCallDuration", duration(breaker.slow_call_duration.as_ref())),
        ("consecutiveFailures", json!(breaker.consecutive_failures)),
        ("minimumCalls", json!(breaker.minimum_calls)),
        ("window", duration(breaker.window.as_ref())),
        ("openTime", duration(breaker.open_time.as_ref())),
        ("maxOpenTime", duration(breaker.max_open_time.as_ref())),
        ("halfOpenProbes", json!(breaker.half_open_probes)),
        ("ramp", duration(breaker.ramp.as_ref())),
        ("mode", json!(word(words::MODE, breaker.mode))),
    ]);
    said(&mut object, "failureRate", breaker.failure_rate);
    said(&mut object, "openJitter", breaker.open_jitter);
    object
}

fn budget(budget: &v1::RetryBudget) -> Value {
    let mut object = fields([("window", duration(budget.window.as_ref()))]);
    said(&mut object, "percent", budget.percent);
    said(&mut object, "minPerSecond", budget.min_per_second);
    object
}

fn adaptive(adaptive: &v1::AdaptiveConcurrency) -> Value {
    let mut object = fields([
        ("percentile", json!(adaptive.percentile)),
        ("updateInterval", duration(adaptive.update_interval.as_ref())),
        ("maxLimit", json!(adaptive.max_limit)),
        ("minRttInterval", duration(adaptive.min_rtt_interval.as_ref())),
        ("minRttRequests", json!(adaptive.min_rtt_requests)),
        ("minLimit", json!(adaptive.min_limit)),
    ]);
    said(&mut object, "minRttJitter", adaptive.min_rtt_jitter);
    said(&mut object, "buffer", adaptive.buffer);
    object
}

fn admission(admission: &v1::AdmissionControl) -> Value {
    fields([
        ("window", duration(admission.window.as_ref())),
        ("successThreshold", json!(admission.success_threshold)),
        ("aggression", json!(admission.aggression)),
        ("rpsThreshold", json!(admission.rps_threshold)),
        (
            "maxRejectionProbability",
            json!(admission.max_rejection_probability),
        ),
    ])
}

pub(super) fn circuit_override(held: &v1::CircuitOverride) -> Value {
    fields([
        ("service", json!(held.service)),
        ("route", json!(held.route)),
        ("mode", json!(word(words::MODE, held.mode))),
        ("expireTime", json!(held.expire_time.map(|t| t.to_string()))),
        ("reason", json!(held.reason)),
    ])
}

pub(super) fn retry(retry: &v1::RouteRetry) -> Value {
    let on: Vec<_> = retry
        .retry_on
        .iter()
        .map(|on| word(words::RETRY_ON, *on))
        .filter(|word| !word.is_empty())
        .collect();
    let hedge = retry.hedge.as_ref().map(|hedge| {
        fields([
            ("delay", duration(hedge.delay.as_ref())),
            ("maxHedges", json!(hedge.max_hedges)),
        ])
    });
    let mut object = fields([
        ("maxAttempts", json!(retry.max_attempts)),
        ("retryOn", json!(on)),
        ("retriableStatusCodes", json!(retry.retriable_status_codes)),
        ("baseInterval", duration(retry.base_interval.as_ref())),
        ("maxInterval", duration(retry.max_interval.as_ref())),
        ("retryNonIdempotent", json!(retry.retry_non_idempotent)),
        ("hedge", json!(hedge)),
    ]);
    said(&mut object, "maxBody", retry.max_body_bytes);
    object
}

pub(super) fn rate_limit(limit: &v1::RateLimit) -> Value {
    let key = limit.key.as_ref().map(|key| {
        let mut object = fields([("maxKeys", json!(key.max_keys))]);
        match &key.kind {
            None => {}
            Some(v1::rate_limit_key::Kind::Caller(caller)) => said(&mut object, "caller", Some(*caller)),
            Some(v1::rate_limit_key::Kind::Header(name)) => said(&mut object, "header", Some(name.as_str())),
        }
        object
    });
    fields([
        ("requests", json!(limit.requests)),
        ("interval", duration(limit.interval.as_ref())),
        ("burst", json!(limit.burst)),
        ("key", json!(key)),
    ])
}

pub(super) fn priority(priority: &v1::RequestPriority) -> Value {
    fields([
        ("default", json!(word(words::PRIORITY, priority.default))),
        ("header", json!(priority.header)),
    ])
}

//! Circuits, endpoints that are left out, and services' demand: for people and for metrics.

use leeward_policy::Snapshot;
use leeward_policy::model::BreakerMode;
use leeward_resilience::{CircuitState, CircuitWhy, EjectionReason, Standing};
use leeward_telemetry::Reading;
use leeward_telemetry::catalogue::{
    ANSWERS_LARGE, CIRCUIT_STATE, ENDPOINT_OUT, HELD, PANIC, SATURATION, SHED_RATIO, UTILIZATION,
    ZONE_GATEWAY_UP, ZONE_SHARE, ZONE_SPARE,
};
use leeward_upstream::{CircuitReading, EndpointReading, Registry};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// What `/circuits` answers. `until_ms` is what is left of the time.
pub(crate) fn circuits(registry: &Registry, snapshot: &Snapshot, now: Instant) -> Value {
    let circuits: Vec<Value> = registry
        .circuits(snapshot, now, wall())
        .iter()
        .map(circuit)
        .collect();
    let ejections: Vec<Value> = registry
        .left_out(snapshot, now)
        .iter()
        .map(|out| left_out(snapshot, out))
        .collect();
    json!({"circuits": circuits, "ejections": ejections})
}

fn circuit(reading: &CircuitReading) -> Value {
    json!({
        "kind": reading.kind.as_str(),
        "name": &*reading.name,
        "state": reading.state.as_str(),
        "mode": mode(reading.mode),
        "why": reading.why.map(evidence),
        "until_ms": reading.until.map(millis),
        "calls": reading.counts.calls,
        "failures": reading.counts.failures,
        "slow": reading.counts.slow,
    })
}

fn left_out(snapshot: &Snapshot, out: &EndpointReading) -> Value {
    json!({
        "service": &*out.key.service,
        "endpoint": out.key.address.to_string(),
        "zone": &*zone(snapshot, out),
        "standing": standing(out.standing),
        "why": out.why.map(ejection),
        "until_ms": out.until.map(millis),
    })
}

/// Gauges, as of now.
pub(crate) fn readings(registry: &Registry, snapshot: &Snapshot, now: Instant) -> Vec<Reading> {
    let mut readings = Vec::new();
    let mut add = |metric, labels: Vec<Arc<str>>, value: f64| {
        readings.push(Reading {
            metric,
            labels,
            value,
        });
    };
    for c in registry.circuits(snapshot, now, wall()) {
        let value = match c.state {
            CircuitState::Closed => 0.0,
            CircuitState::HalfOpen | CircuitState::Ramping => 1.0,
            CircuitState::Open => 2.0,
        };
        let labels = vec![c.kind.as_str().into(), Arc::clone(&c.name), mode(c.mode).into()];
        add(CIRCUIT_STATE, labels, value);
    }
    for out in registry.left_out(snapshot, now) {
        let labels = vec![
            Arc::clone(&out.key.service),
            out.key.address.to_string().into(),
            zone(snapshot, &out),
            standing(out.standing).into(),
            out.why.map_or("-", |why| why.as_str()).into(),
        ];
        add(ENDPOINT_OUT, labels, 1.0);
    }
    for (gateway, standing) in registry.gateways(snapshot, now) {
        let up = if standing == Standing::Healthy { 1.0 } else { 0.0 };
        add(ZONE_GATEWAY_UP, vec![gateway.zone, gateway.name], up);
    }
    for (kind, name, size) in registry.answer_sizes(snapshot) {
        let large = if size.is_large() { 1.0 } else { 0.0 };
        add(ANSWERS_LARGE, vec![kind.into(), name], large);
    }
    for service in registry.demand(snapshot) {
        let labels = || vec![Arc::clone(&service.name)];
        add(UTILIZATION, labels(), service.utilization);
        add(SATURATION, labels(), service.saturation);
        add(SHED_RATIO, labels(), service.shed_ratio);
        add(HELD, labels(), f64::from(service.held));
        add(PANIC, labels(), if service.panic { 1.0 } else { 0.0 });
        for (metric, zones) in [(ZONE_SHARE, &service.zones), (ZONE_SPARE, &service.spare)] {
            for (zone, value) in zones {
                let labels = vec![Arc::clone(&service.name), Arc::clone(zone)];
                add(metric, labels, *value);
            }
        }
    }
    readings
}

/// People say by the wall clock until when they hold a circuit, or a level of degradation; and targeting may ask for
/// the time of day.
#[expect(clippy::disallowed_methods, reason = "as above")]
pub(crate) fn wall() -> SystemTime {
    SystemTime::now()
}

fn zone(snapshot: &Snapshot, out: &EndpointReading) -> Arc<str> {
    let service = snapshot.service_named(&out.key.service);
    let view = service.and_then(|idx| snapshot.service(idx));
    let seen = view.and_then(|view| view.endpoints.iter().find(|e| e.key == out.key));
    seen.map_or_else(|| Arc::from("-"), |seen| Arc::clone(&seen.zone))
}

fn evidence(why: CircuitWhy) -> String {
    let word = why.as_str();
    match why {
        CircuitWhy::FailureRate { percent, calls } | CircuitWhy::SlowCallRate { percent, calls } => {
            format!("{word} {percent} % of {calls} calls")
        }
        CircuitWhy::ConsecutiveFailures { failures } => format!("{word} {failures}"),
        CircuitWhy::ProbeFailed | CircuitWhy::ProbesSucceeded | CircuitWhy::RampDone | CircuitWhy::TimeUp => {
            word.to_owned()
        }
    }
}

fn ejection(why: EjectionReason) -> String {
    let word = why.as_str();
    match why {
        EjectionReason::Consecutive5xx { failures }
        | EjectionReason::ConsecutiveGatewayFailure { failures } => format!("{word} {failures}"),
        EjectionReason::SuccessRate { rate, threshold } => {
            format!("{word} {} %, below {} %", hundredths(rate), hundredths(threshold))
        }
        EjectionReason::FailurePercentage { percent, requests } => {
            format!("{word} {percent} % of {requests} requests")
        }
    }
}

fn hundredths(value: u32) -> String {
    format!("{}.{:02}", value / 100, value % 100)
}

const fn standing(standing: Standing) -> &'static str {
    match standing {
        Standing::Healthy => "healthy",
        Standing::Ejected => "ejected",
        Standing::ProbeDue | Standing::Unreachable => "unreachable",
        Standing::Unhealthy => "unhealthy",
    }
}

const fn mode(mode: BreakerMode) -> &'static str {
    match mode {
        BreakerMode::Enforce => "enforce",
        BreakerMode::Observe => "observe",
        BreakerMode::ForceOpen => "force_open",
        BreakerMode::ForceClosed => "force_closed",
    }
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

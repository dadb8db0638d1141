use super::*;
use leeward_policy::model::{
    ConnectionPool, DegradationLevel, DegradationPolicy, DegradationTrigger, Endpoint, ResiliencePolicy,
    Scope, Service, Signal, Spec, Zone,
};
use leeward_policy::{Name, Resource, Viewer};
use std::collections::BTreeMap;

#[expect(
    clippy::disallowed_methods,
    reason = "an arbitrary origin; only differences matter"
)]
fn origin() -> Instant {
    Instant::now()
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn resource(text: &str, spec: Spec) -> Resource {
    Resource {
        name: name(text),
        revision: 1,
        labels: BTreeMap::new(),
        spec,
    }
}

/// A policy with two services, and triggers for these.
fn snapshot(watched: &[&str]) -> Snapshot {
    let service = |text| {
        let endpoint = Endpoint::new(([127, 0, 0, 1], 80).into(), name("a"));
        resource(text, Spec::Service(Service::new(vec![endpoint])))
    };
    let level = |text| DegradationLevel {
        name: name(text),
        flags: BTreeMap::new(),
        shed_below: None,
    };
    let trigger = |service: &&str| DegradationTrigger {
        level: 1,
        signal: Signal::CircuitOpen {
            service: name(service),
        },
        hold_for: Duration::ZERO,
        clear_after: Duration::ZERO,
        min_stay: Duration::ZERO,
        max_stay: None,
        scope: Scope::Zone,
    };
    let policy = DegradationPolicy {
        levels: vec![level("normal"), level("core-only")],
        routes: Vec::new(),
        triggers: watched.iter().map(trigger).collect(),
    };
    let resources = [
        resource("a", Spec::Zone(Zone::new(Vec::new(), Vec::new()))),
        service("pay"),
        service("cart"),
        resource("shop", Spec::DegradationPolicy(policy)),
    ];
    let viewer = Viewer {
        zone: name("a"),
        proxy: name("a1"),
    };
    Snapshot::compile(viewer, 1, &resources)
}

fn calls(registry: &Registry, snapshot: &Snapshot, now: Instant) -> Vec<(String, u64, u64)> {
    let signals = registry.signals(snapshot, now, SystemTime::UNIX_EPOCH);
    let of = |(name, sample): (Arc<str>, SignalSample)| (name.to_string(), sample.calls, sample.failures);
    signals.into_iter().map(of).collect()
}

#[test]
fn only_services_with_a_trigger_are_metered() {
    let now = origin();
    let registry = Registry::new(now);
    let (pay, cart) = (registry.service(&"pay".into()), registry.service(&"cart".into()));
    let end = || {
        for service in [&pay, &cart] {
            service.ended(true, Some(Duration::from_millis(3)));
            service.ended(false, None);
        }
    };
    // One that policy hasn't is not looked at.
    let first = snapshot(&["pay", "pay", "nobody"]);
    registry.watch_signals(&first);
    end();
    assert_eq!(calls(&registry, &first, now), [("pay".to_owned(), 2, 1)]);
    assert_eq!(calls(&registry, &first, now), [("pay".to_owned(), 0, 0)]);
    let second = snapshot(&["cart"]);
    registry.watch_signals(&second);
    end();
    assert_eq!(calls(&registry, &second, now), [("cart".to_owned(), 2, 1)]);
    let none = snapshot(&[]);
    registry.watch_signals(&none);
    end();
    assert_eq!(calls(&registry, &none, now), []);
}

#[test]
fn signals_have_the_circuit_the_demand_and_the_limit() {
    let now = origin();
    let registry = Registry::new(now);
    let snapshot = snapshot(&["pay"]);
    registry.watch_signals(&snapshot);
    let pay = registry.service(&"pay".into());
    let policy = Arc::new(ResiliencePolicy {
        circuit_breaker: Some(CircuitBreaker {
            consecutive_failures: 1,
            ..CircuitBreaker::DEFAULT
        }),
        ..ResiliencePolicy::DEFAULT
    });
    let pool = ConnectionPool {
        max_requests: 7,
        ..ConnectionPool::DEFAULT
    };
    let guards = pay.guards(&policy, &pool, true, now);
    let sample = |now| {
        let signals = registry.signals(&snapshot, now, SystemTime::UNIX_EPOCH);
        signals.into_iter().next().unwrap().1
    };
    let closed = sample(now);
    assert_eq!((closed.circuit_open, closed.limit, closed.demand), (false, 7, 0));
    let circuit = guards.circuit.as_ref().unwrap();
    let pass = circuit
        .ask(None, now, &mut crate::Chance, &mut |_, _| {})
        .unwrap();
    let ended = leeward_resilience::Ended::Fail;
    pass.settle(ended, now, &mut crate::Chance, &mut |_, _| {});
    let held = pay.hold(10).unwrap();
    registry.tend(&snapshot, now, &mut crate::Chance, |_, _| {});
    let open = sample(now);
    assert_eq!((open.circuit_open, open.demand), (true, 1000));
    drop(held);
}

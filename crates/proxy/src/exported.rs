//! How the services are whose workloads this node has, for the proxies that ask for them from elsewhere.

use leeward_policy::{EndpointKey, EndpointView, ServiceView, Snapshot, Via};
use leeward_resilience::Standing;
use leeward_upstream::Registry;
use leeward_zone::{Health, ServiceHealth};
use std::time::Instant;

/// What this proxy says of the services with endpoints behind it: how many of these take requests, and how many more
/// requests it would let be under way at them, for each proxy that calls.
pub(crate) fn exported(snapshot: &Snapshot, registry: &Registry, now: Instant) -> Health {
    let mut health = Health::default();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    for view in snapshot.services() {
        let ours: Vec<_> = ours(view, snapshot).collect();
        if ours.is_empty() {
            continue;
        }
        let takes = |endpoint: &&&EndpointView| {
            registry.endpoint(&endpoint.key, now).standing(now) == Standing::Healthy
        };
        let healthy = ours.iter().filter(takes).count();
        let spare = registry
            .service(&view.name)
            .take_spare(view.spec.pool.max_requests);
        let said = ServiceHealth {
            healthy: count(healthy),
            total: count(ours.len()),
            spare: if healthy == 0 { 0 } else { spare },
        };
        health.set(&view.name, said);
    }
    health
}

/// Endpoints behind this proxy that it found unreachable, and that it is time to ask whether they are: nobody else
/// sends them a request while it says that they take none. Those with active checks are asked by these.
pub(crate) fn lost(snapshot: &Snapshot, registry: &Registry, now: Instant) -> Vec<EndpointKey> {
    let unchecked = |view: &&ServiceView| view.spec.health_check.is_none();
    let services = snapshot.services().iter().filter(unchecked);
    let due = |endpoint: &&EndpointView| {
        let state = registry.endpoint(&endpoint.key, now);
        state.standing(now) == Standing::ProbeDue && state.probe(now)
    };
    services
        .flat_map(|view| ours(view, snapshot).filter(due))
        .map(|endpoint| endpoint.key.clone())
        .take(MOST_ASKED)
        .collect()
}

/// Unreachable endpoints that are asked at once.
const MOST_ASKED: usize = 64;

/// A service's endpoints behind this proxy.
fn ours<'a>(view: &'a ServiceView, snapshot: &'a Snapshot) -> impl Iterator<Item = &'a EndpointView> {
    let behind = format!("@{}", snapshot.viewer.proxy);
    view.endpoints.iter().filter(move |endpoint| {
        endpoint.key.via == Via::Direct
            && *endpoint.zone == *snapshot.viewer.zone.as_str()
            && endpoint.id.ends_with(&behind)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::model::{Endpoint, Service, Zone, ZoneProxy};
    use leeward_policy::{Name, Resource, Spec, Viewer};
    use leeward_resilience::{Checked, Event, Seeded};
    use std::collections::BTreeMap;

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

    #[test]
    fn a_node_speaks_for_the_endpoints_behind_it() {
        let endpoint = |port: u16, zone: &str, proxy: Option<&str>| Endpoint {
            proxy: proxy.map(name),
            ..Endpoint::new(([127, 0, 0, 1], port).into(), name(zone))
        };
        let proxy = |text: &str| ZoneProxy {
            name: name(text),
            address: ([127, 0, 0, 1], 15008).into(),
        };
        let endpoints = vec![
            endpoint(1, "a", Some("a1")),
            endpoint(2, "a", Some("a1")),
            endpoint(3, "a", Some("a2")),
            endpoint(4, "a", None),
            endpoint(5, "b", Some("b1")),
        ];
        let world = [
            resource("a", Spec::Zone(Zone::new(vec![proxy("a1"), proxy("a2")], vec![]))),
            resource("b", Spec::Zone(Zone::new(vec![proxy("b1")], vec![]))),
            resource("shop", Spec::Service(Service::new(endpoints))),
            resource(
                "far",
                Spec::Service(Service::new(vec![endpoint(6, "b", Some("b1"))])),
            ),
        ];
        let viewer = Viewer {
            zone: name("a"),
            proxy: name("a1"),
        };
        let snapshot = Snapshot::compile(viewer, 1, &world);
        let now = tokio::time::Instant::now().into_std();
        let registry = Registry::new(now);
        let shop = |registry: &Registry| exported(&snapshot, registry, now).get("shop").unwrap();
        assert_eq!((shop(&registry).healthy, shop(&registry).total), (2, 2));
        assert!(shop(&registry).spare > 0);
        assert_eq!(exported(&snapshot, &registry, now).iter().count(), 1);
        let service = snapshot
            .services()
            .iter()
            .find(|view| *view.name == *"shop")
            .unwrap();
        registry.checked(&service.endpoints[0].key, Checked::Failing, now);
        assert_eq!((shop(&registry).healthy, shop(&registry).total), (1, 2));
        // Where nobody takes requests there is nothing to spare.
        registry.checked(&service.endpoints[1].key, Checked::Failing, now);
        assert_eq!((shop(&registry).healthy, shop(&registry).spare), (0, 0));
    }

    #[test]
    fn what_is_spare_is_shared_by_those_that_call() {
        let now = tokio::time::Instant::now().into_std();
        let registry = Registry::new(now);
        let service = registry.service(&"shop".into());
        // Half of it is for those that don't yet.
        assert_eq!(service.take_spare(100), 50);
        for proxy in 0..5 {
            service.called_by(proxy);
            service.called_by(proxy);
        }
        assert_eq!(service.take_spare(100), 10);
    }

    #[test]
    fn an_endpoint_that_is_lost_is_asked_now_and_then() {
        let endpoint = Endpoint {
            proxy: Some(name("a1")),
            ..Endpoint::new(([127, 0, 0, 1], 1).into(), name("a"))
        };
        let proxy = ZoneProxy {
            name: name("a1"),
            address: ([127, 0, 0, 1], 15008).into(),
        };
        let world = [
            resource("a", Spec::Zone(Zone::new(vec![proxy], vec![]))),
            resource("shop", Spec::Service(Service::new(vec![endpoint]))),
        ];
        let viewer = Viewer {
            zone: name("a"),
            proxy: name("a1"),
        };
        let snapshot = Snapshot::compile(viewer, 1, &world);
        let now = tokio::time::Instant::now().into_std();
        let registry = Registry::new(now);
        assert!(lost(&snapshot, &registry, now).is_empty());
        let view = &snapshot.services()[0];
        let state = registry.endpoint(&view.endpoints[0].key, now);
        state.note(
            Event::FailToConnect,
            now,
            &view.spec.outlier,
            || true,
            &mut Seeded(1),
        );
        assert!(lost(&snapshot, &registry, now).is_empty(), "not at once");
        let later = now + std::time::Duration::from_secs(3);
        assert_eq!(lost(&snapshot, &registry, later).len(), 1);
        assert!(lost(&snapshot, &registry, later).is_empty(), "once");
    }
}

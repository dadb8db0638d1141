//! How the services are whose workloads this node has, for the proxies that ask for them from elsewhere.

use leeward_policy::{EndpointView, Snapshot, Via};
use leeward_resilience::Standing;
use leeward_upstream::Registry;
use leeward_zone::{Health, ServiceHealth};
use std::time::Instant;

/// What this proxy says of the services with endpoints behind it: how many of these take requests, and how many more
/// requests it would let be under way at them.
pub(crate) fn exported(snapshot: &Snapshot, registry: &Registry, now: Instant) -> Health {
    let mut health = Health::default();
    let behind = format!("@{}", snapshot.viewer.proxy);
    let is_ours = |endpoint: &&EndpointView| {
        endpoint.key.via == Via::Direct
            && *endpoint.zone == *snapshot.viewer.zone.as_str()
            && endpoint.id.ends_with(&behind)
    };
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    for view in snapshot.services() {
        let ours: Vec<_> = view.endpoints.iter().filter(is_ours).collect();
        if ours.is_empty() {
            continue;
        }
        let healthy = |endpoint: &&&EndpointView| {
            registry.endpoint(&endpoint.key, now).standing(now) == Standing::Healthy
        };
        let active = registry.service(&view.name).active();
        let said = ServiceHealth {
            healthy: count(ours.iter().filter(healthy).count()),
            total: count(ours.len()),
            spare: view.spec.pool.max_requests.saturating_sub(active),
        };
        health.set(&view.name, said);
    }
    health
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::model::{Endpoint, Service, Zone, ZoneProxy};
    use leeward_policy::{Name, Resource, Spec, Viewer};
    use leeward_resilience::Checked;
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
    }
}

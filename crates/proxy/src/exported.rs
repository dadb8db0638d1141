//! How the services are that this node has workloads of, for the proxies that ask for them from elsewhere.

use leeward_policy::{EndpointView, ExportedTo, ServiceView, Snapshot, Via};
use leeward_resilience::Standing;
use leeward_upstream::Registry;
use leeward_zone::{Health, Reports, ServiceHealth};
use std::sync::Arc;
use std::time::Instant;

/// What this proxy says of services, by the zone of whoever is told: how many endpoints take requests, and how many more
/// requests it would let be under way at them. It speaks for the endpoints behind it; a gateway, to other zones, for all of
/// its zone, as it has seen them. Zones are told only of what they may have.
pub(crate) fn exported(snapshot: &Snapshot, registry: &Registry, now: Instant) -> Reports {
    let own = said(snapshot, registry, now, false);
    let zone_wide = snapshot.gateways().is_one;
    let abroad = if zone_wide {
        said(snapshot, registry, now, true)
    } else {
        own.clone()
    };
    let for_all = abroad.iter().all(|(_, to, _)| to.is_all());
    if for_all && !zone_wide {
        return Reports::from(health(&own, |_| true));
    }
    let here = snapshot.viewer.zone.as_str();
    // A zone that isn't known takes what is for every zone.
    let others = Arc::new(health(&abroad, |to| to.has("")));
    let mut reports = Reports {
        others,
        ..Reports::default()
    };
    for zone in snapshot.zones() {
        let told = if **zone == *here {
            health(&own, |_| true)
        } else {
            health(&abroad, |to| to.has(zone))
        };
        if told != *reports.others {
            reports.zones.insert(Arc::clone(zone), Arc::new(told));
        }
    }
    reports
}

/// What there is to say of one service, and to whom.
type Said<'a> = (&'a Arc<str>, &'a ExportedTo, ServiceHealth);

fn health(said: &[Said<'_>], may_have: impl Fn(&ExportedTo) -> bool) -> Health {
    let mut health = Health::default();
    for (name, _, is) in said.iter().filter(|(_, to, _)| may_have(to)) {
        health.set(name, *is);
    }
    health
}

fn said<'a>(snapshot: &'a Snapshot, registry: &Registry, now: Instant, zone_wide: bool) -> Vec<Said<'a>> {
    let behind = format!("@{}", snapshot.viewer.proxy);
    let is_ours = |endpoint: &&EndpointView| {
        *endpoint.zone == *snapshot.viewer.zone.as_str()
            && (zone_wide || endpoint.key.via == Via::Direct && endpoint.id.ends_with(&behind))
    };
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let of = |view: &'a ServiceView| {
        let ours: Vec<_> = view.endpoints.iter().filter(is_ours).collect();
        if ours.is_empty() {
            return None;
        }
        let healthy = |endpoint: &&&EndpointView| {
            registry.endpoint(&endpoint.key, now).standing(now) == Standing::Healthy
        };
        let active = registry.service(&view.name).active();
        let is = ServiceHealth {
            healthy: count(ours.iter().filter(healthy).count()),
            total: count(ours.len()),
            spare: view.spec.pool.max_requests.saturating_sub(active),
        };
        Some((&view.name, &view.exported_to, is))
    };
    snapshot.services().iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::model::{Endpoint, Selection, Service, Zone, ZoneGateway, ZoneProxy};
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
        let told = |registry: &Registry| Arc::clone(exported(&snapshot, registry, now).to("b"));
        let shop = |registry: &Registry| told(registry).get("shop").unwrap();
        assert_eq!((shop(&registry).healthy, shop(&registry).total), (2, 2));
        assert!(shop(&registry).spare > 0);
        assert_eq!(told(&registry).iter().count(), 1);
        let service = snapshot
            .services()
            .iter()
            .find(|view| *view.name == *"shop")
            .unwrap();
        registry.checked(&service.endpoints[0].key, Checked::Failing, now);
        assert_eq!((shop(&registry).healthy, shop(&registry).total), (1, 2));
    }
    #[test]
    fn zones_are_told_of_what_they_may_have() {
        let endpoint = |port: u16, proxy: &str| Endpoint {
            proxy: Some(name(proxy)),
            ..Endpoint::new(([127, 0, 0, 1], port).into(), name("a"))
        };
        let proxy = |text: &str| ZoneProxy {
            name: name(text),
            address: ([127, 0, 0, 1], 15008).into(),
        };
        let gateway = ZoneGateway {
            name: name("a1"),
            address: None,
        };
        let to_b = Service {
            export_to: Selection::Only(vec![name("b")]),
            ..Service::new(vec![endpoint(1, "a1"), endpoint(2, "a2")])
        };
        let picky = Zone {
            imports: Selection::Only(vec![name("for-b")]),
            ..Zone::new(vec![proxy("c1")], vec![])
        };
        let with_gateway = Zone {
            gateways: vec![gateway],
            ..Zone::new(vec![proxy("a1"), proxy("a2")], vec![])
        };
        let world = [
            resource("a", Spec::Zone(with_gateway)),
            resource("b", Spec::Zone(Zone::new(vec![proxy("b1")], vec![]))),
            resource("c", Spec::Zone(picky)),
            resource("for-b", Spec::Service(to_b)),
            resource("for-all", Spec::Service(Service::new(vec![endpoint(3, "a2")]))),
        ];
        let now = tokio::time::Instant::now().into_std();
        let registry = Registry::new(now);
        let told = |proxy: &str, zone: &str| {
            let viewer = Viewer {
                zone: name("a"),
                proxy: name(proxy),
            };
            let reports = exported(&Snapshot::compile(viewer, 1, &world), &registry, now);
            let health = Arc::clone(reports.to(zone));
            health
                .iter()
                .map(|(name, is)| (name.to_owned(), is.total))
                .collect::<Vec<_>>()
        };
        let entry = |name: &str, total| (name.to_owned(), total);
        // A gateway speaks for its zone to others, and for itself within.
        assert_eq!(told("a1", "b"), [entry("for-all", 1), entry("for-b", 2)]);
        assert_eq!(told("a1", "a"), [entry("for-b", 1)]);
        assert_eq!(told("a2", "b"), [entry("for-all", 1), entry("for-b", 1)]);
        // Another zone is not among those that it is exported to; this one imports nothing else.
        assert_eq!(told("a1", "nowhere"), [entry("for-all", 1)]);
        assert_eq!(told("a1", "c"), []);
    }
}

//! How the services are that this node has workloads of, for the proxies that ask for them from elsewhere.

use leeward_policy::{EndpointKey, EndpointView, ExportedTo, ServiceView, Snapshot, Via};
use leeward_resilience::{Part, Standing, Word};
use leeward_upstream::Registry;
use leeward_zone::{Health, Reports, ServiceHealth};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// What this proxy says of services, by the zone of whoever is told: how many endpoints take requests, and how many more
/// requests it would let be under way at them, for each proxy that calls. It speaks for the endpoints behind it; a gateway,
/// to other zones, for all of its zone, by what it has seen itself and what the proxies there say. Zones are told only of
/// what they may have.
pub(crate) fn exported(snapshot: &Snapshot, registry: &Registry, now: Instant) -> Reports {
    let zone_wide = snapshot.gateways().is_one;
    let said = said(snapshot, registry, now, zone_wide);
    if !zone_wide && said.iter().all(|said| said.to.is_all()) {
        return Reports::from(health(&said, |said| said.own));
    }
    let abroad = |zone: &str| health(&said, |said| said.abroad.filter(|_| said.to.has(zone)));
    let here = snapshot.viewer.zone.as_str();
    // A zone that isn't known takes what is for every zone.
    let others = Arc::new(abroad(""));
    let mut reports = Reports {
        others,
        ..Reports::default()
    };
    for zone in snapshot.zones() {
        let told = if **zone == *here {
            health(&said, |said| said.own)
        } else {
            abroad(zone)
        };
        if told != *reports.others {
            reports.zones.insert(Arc::clone(zone), Arc::new(told));
        }
    }
    reports
}

/// What there is to say of one service.
struct Said<'a> {
    name: &'a Arc<str>,
    /// To whom, outside of the zone.
    to: &'a ExportedTo,
    /// In the zone.
    own: Option<ServiceHealth>,
    /// Outside.
    abroad: Option<ServiceHealth>,
}

fn health(said: &[Said<'_>], of: impl Fn(&Said<'_>) -> Option<ServiceHealth>) -> Health {
    let mut health = Health::default();
    for said in said {
        if let Some(is) = of(said) {
            health.set(said.name, is);
        }
    }
    health
}

fn said<'a>(snapshot: &'a Snapshot, registry: &Registry, now: Instant, zone_wide: bool) -> Vec<Said<'a>> {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let takes =
        |endpoint: &EndpointView| registry.endpoint(&endpoint.key, now).standing(now) == Standing::Healthy;
    let of = |view: &'a ServiceView| {
        let own: Vec<_> = ours(view, snapshot, false).collect();
        let wide: Vec<_> = ours(view, snapshot, zone_wide).collect();
        if wide.is_empty() {
            return None;
        }
        let service = registry.service(&view.name);
        let spare = service.take_spare(view.spec.pool.max_requests);
        let is = |endpoints: &[&EndpointView]| {
            // What is behind each other proxy, and what is behind this one or none.
            let mut parts: BTreeMap<Option<&Arc<str>>, u32> = BTreeMap::new();
            for endpoint in endpoints {
                let healthy = parts.entry(proxy_of(endpoint)).or_default();
                *healthy += u32::from(takes(endpoint));
            }
            let parts = parts.into_iter().map(|(proxy, seen)| Part {
                seen,
                said: proxy.and_then(|proxy| service.word_of(proxy)),
            });
            let word = Word::of_zone(parts, spare);
            (!endpoints.is_empty()).then(|| ServiceHealth {
                healthy: word.healthy,
                total: count(endpoints.len()),
                spare: word.spare,
            })
        };
        Some(Said {
            name: &view.name,
            to: &view.exported_to,
            own: is(&own),
            abroad: is(&wide),
        })
    };
    snapshot.services().iter().filter_map(of).collect()
}

/// The proxy of this one's zone in front of an endpoint, if that is another one.
fn proxy_of(endpoint: &EndpointView) -> Option<&Arc<str>> {
    match &endpoint.key.via {
        Via::Proxy { name, .. } => Some(name),
        Via::Direct | Via::Gateway { .. } => None,
    }
}

/// Endpoints that this proxy speaks for and has found unreachable, and that it is time to ask whether they are: nobody else
/// sends them a request while it says that they take none. Those with active checks are asked by these. With each, where
/// it is asked: itself, or the proxy in front of it, which says more by itself.
pub(crate) fn lost(snapshot: &Snapshot, registry: &Registry, now: Instant) -> Vec<(EndpointKey, SocketAddr)> {
    let unchecked = |view: &&ServiceView| view.spec.health_check.is_none();
    let services = snapshot.services().iter().filter(unchecked);
    let due = |endpoint: &&EndpointView| {
        let state = registry.endpoint(&endpoint.key, now);
        state.standing(now) == Standing::ProbeDue && state.probe(now)
    };
    services
        .flat_map(|view| ours(view, snapshot, snapshot.gateways().is_one).filter(due))
        .filter_map(|endpoint| match &endpoint.key.via {
            Via::Direct => Some((endpoint.key.clone(), endpoint.key.address)),
            Via::Proxy { address, .. } => Some((endpoint.key.clone(), *address)),
            Via::Gateway { .. } => None,
        })
        .take(MOST_ASKED)
        .collect()
}

/// Unreachable endpoints that are asked at once.
const MOST_ASKED: usize = 64;

/// A service's endpoints behind this proxy, or all that are in its zone.
fn ours<'a>(
    view: &'a ServiceView,
    snapshot: &'a Snapshot,
    zone_wide: bool,
) -> impl Iterator<Item = &'a EndpointView> {
    let behind = format!("@{}", snapshot.viewer.proxy);
    view.endpoints.iter().filter(move |endpoint| {
        let is_behind = || endpoint.key.via == Via::Direct && endpoint.id.ends_with(&behind);
        *endpoint.zone == *snapshot.viewer.zone.as_str() && (zone_wide || is_behind())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::model::{Endpoint, Selection, Service, Zone, ZoneGateway, ZoneProxy};
    use leeward_policy::{Name, Resource, Spec, Viewer};
    use leeward_resilience::{Checked, Event, Seeded};

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
        // Less than one for each is one for each now and then, here every second time.
        let told: Vec<u32> = (0..1000).map(|_| service.take_spare(5)).collect();
        assert!(told.iter().all(|each| *each <= 1) && told.iter().sum::<u32>() > 300);
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

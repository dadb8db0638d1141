use super::*;
use crate::model::{HostMatch, PathMatch, Route, RouteMatch, ZoneProxy};
use proptest::prelude::*;

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

fn zone(text: &str, failover: &[&str]) -> Resource {
    let address = ([127, 0, 0, 1], 15008).into();
    let proxies = vec![ZoneProxy {
        name: name(&format!("{text}1")),
        address,
    }];
    resource(
        text,
        Spec::Zone(Zone {
            proxies,
            failover: failover.iter().map(|z| name(z)).collect(),
        }),
    )
}

fn service(endpoints: &[(u16, &str, Option<&str>)]) -> Resource {
    let endpoints = endpoints.iter().map(|(port, zone, proxy)| Endpoint {
        proxy: proxy.map(name),
        ..Endpoint::new(([127, 0, 0, 1], *port).into(), name(zone))
    });
    resource("cart", Spec::Service(Service::new(endpoints.collect())))
}

fn compile(zone: &str, resources: &[Resource]) -> Snapshot {
    let viewer = Viewer {
        zone: name(zone),
        proxy: name(&format!("{zone}1")),
    };
    Snapshot::compile(viewer, 7, resources)
}

fn tiers(snapshot: &Snapshot) -> Vec<(String, Vec<usize>)> {
    let service = &snapshot.services()[0];
    service
        .tiers
        .iter()
        .map(|t| (t.zone.to_string(), t.endpoints.clone()))
        .collect()
}

#[test]
fn zones_are_turned_to_in_the_order_of_the_callers_zone() {
    let world = [
        zone("a", &["c"]),
        zone("b", &[]),
        zone("c", &[]),
        zone("d", &[]),
        service(&[(1, "b", None), (2, "c", None), (3, "a", None), (4, "a", None)]),
    ];
    let of = |zone, members: &[usize]| (String::from(zone), members.to_vec());
    assert_eq!(
        tiers(&compile("a", &world)),
        [of("a", &[2, 3]), of("c", &[1]), of("b", &[0])]
    );
    // Its own has none, and nothing is listed: the others, by name.
    assert_eq!(
        tiers(&compile("d", &world)),
        [of("a", &[2, 3]), of("b", &[0]), of("c", &[1])]
    );
}

#[test]
fn a_proxy_goes_straight_to_its_own_workloads_and_through_others_to_theirs() {
    let world = [
        zone("a", &[]),
        zone("b", &[]),
        service(&[(1, "a", Some("a1")), (2, "b", Some("b1"))]),
    ];
    let via = |snapshot: &Snapshot| -> Vec<Via> {
        snapshot.services()[0]
            .endpoints
            .iter()
            .map(|e| e.key.via.clone())
            .collect()
    };
    let through = |zone: &str| Via::Proxy {
        address: ([127, 0, 0, 1], 15008).into(),
        zone: zone.into(),
        name: format!("{zone}1").into(),
    };
    assert_eq!(via(&compile("a", &world)), [Via::Direct, through("b")]);
    assert_eq!(via(&compile("b", &world)), [through("a"), Via::Direct]);
}

#[test]
fn a_missing_proxy_is_never_bypassed() {
    let world = [zone("a", &[]), service(&[(1, "a", Some("gone")), (2, "a", None)])];
    let snapshot = compile("a", &world);
    let ports: Vec<_> = snapshot.services()[0]
        .endpoints
        .iter()
        .map(|e| e.key.address.port())
        .collect();
    assert_eq!(ports, [2]);
}

proptest! {
    /// A draw belongs to the backend whose share of the line it falls into.
    #[test]
    fn backends_have_their_shares(weights in prop::collection::vec(0u32..5, 1..6)) {
        prop_assume!(weights.iter().any(|w| *w > 0));
        let names: Vec<_> = (0..weights.len()).map(|i| name(&format!("s{i}"))).collect();
        let mut world: Vec<Resource> = names
            .iter()
            .map(|n| Resource { name: n.clone(), ..service(&[]) })
            .collect();
        let backends: Vec<Backend> = names
            .iter()
            .zip(&weights)
            .map(|(service, weight)| Backend::new(service.clone(), *weight))
            .collect();
        let any = RouteMatch { path: PathMatch::Prefix("".into()), method: None, headers: vec![] };
        let rule = RouteRule::new(vec![any], backends.clone());
        world.push(resource("r", Spec::Route(Route { hostnames: vec![HostMatch::Any], rules: vec![rule] })));
        let snapshot = compile("a", &world);
        let rule = &snapshot.rules()[0];
        let line: Vec<&Name> = backends
            .iter()
            .flat_map(|b| std::iter::repeat_n(&b.service, b.weight as usize))
            .collect();
        prop_assert_eq!(rule.total_weight(), line.len() as u64);
        for (draw, service) in (0..).zip(line) {
            let drawn = snapshot.service(rule.backend(draw).unwrap().service).unwrap();
            prop_assert_eq!(&*drawn.name, service.as_str());
        }
        prop_assert_eq!(rule.backend(rule.total_weight()), None);
    }
}

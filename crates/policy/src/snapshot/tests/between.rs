//! What zones let through to each other.

use super::*;
use crate::model::{DirectCallers, Selection, ZoneGateway};
use std::net::SocketAddr;

const ELSEWHERE: &str = "192.0.2.1:443";

fn at(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// Zone b with the proxies b1 to b3, of which some are gateways.
fn gated(gateways: &[(&str, Option<&str>)], direct_callers: DirectCallers) -> Resource {
    let proxies = (1..=3).map(|n| ZoneProxy {
        name: name(&format!("b{n}")),
        address: at(15000 + n),
    });
    let gateways = gateways.iter().map(|(gateway, address)| ZoneGateway {
        name: name(gateway),
        address: address.map(|address| address.parse().unwrap()),
    });
    let zone = Zone {
        gateways: gateways.collect(),
        direct_callers,
        ..Zone::new(proxies.collect(), vec![])
    };
    resource("b", Spec::Zone(zone))
}

fn seen_by(zone: &str, proxy: &str, resources: &[Resource]) -> Snapshot {
    let viewer = Viewer {
        zone: name(zone),
        proxy: name(proxy),
    };
    Snapshot::compile(viewer, 7, resources)
}

fn gateways(snapshot: &Snapshot) -> Vec<Option<Vec<(String, SocketAddr)>>> {
    let view = |gateway: &GatewayView| (gateway.name.to_string(), gateway.address);
    let all = snapshot.services()[0].endpoints.iter();
    all.map(|e| e.gateways.as_ref().map(|all| all.iter().map(view).collect()))
        .collect()
}

#[test]
fn other_zones_go_through_gateways_and_the_zone_itself_does_not() {
    let world = [
        zone("a", &[]),
        gated(&[("b1", None), ("b2", Some(ELSEWHERE))], DirectCallers::Refuse),
        service(&[
            (1, "a", None),
            (2, "b", Some("b3")),
            (3, "b", None),
            (4, "b", Some("b2")),
        ]),
    ];
    let via = |snapshot: &Snapshot| -> Vec<Via> {
        let all = snapshot.services()[0].endpoints.iter();
        all.map(|e| e.key.via.clone()).collect()
    };
    let from_a = seen_by("a", "a1", &world);
    let gateway = |proxy: Option<&str>| Via::Gateway {
        zone: "b".into(),
        proxy: proxy.map(Arc::from),
    };
    // Endpoints without a proxy in front as well.
    assert_eq!(
        via(&from_a),
        [
            Via::Direct,
            gateway(Some("b3")),
            gateway(None),
            gateway(Some("b2"))
        ]
    );
    let (first, second) = (
        ("b1".to_owned(), at(15001)),
        ("b2".to_owned(), ELSEWHERE.parse().unwrap()),
    );
    let both = Some(vec![first, second.clone()]);
    // Whoever is behind a gateway itself is reached by that one.
    assert_eq!(gateways(&from_a), [None, both.clone(), both, Some(vec![second])]);
    let own = from_a.gateways();
    assert!(own.names.is_empty() && !own.is_one && !own.required);

    let proxy = |n: u16| Via::Proxy {
        address: at(15000 + n),
        zone: "b".into(),
        name: format!("b{n}").into(),
    };
    for (viewer, vias) in [
        ("b1", [Via::Direct, proxy(3), Via::Direct, proxy(2)]),
        ("b3", [Via::Direct, Via::Direct, Via::Direct, proxy(2)]),
    ] {
        let within = seen_by("b", viewer, &world);
        assert_eq!(via(&within), vias, "{viewer}");
        assert!(gateways(&within).iter().all(Option::is_none));
        let own = within.gateways();
        assert!(own.has("b1") && own.has("b2") && !own.has("b3"));
        assert_eq!((own.is_one, own.required), (viewer == "b1", viewer != "b1"));
    }
    let lenient = [gated(&[("b1", None)], DirectCallers::Allow)];
    assert!(!seen_by("b", "b3", &lenient).gateways().required);
}

#[test]
fn a_gateway_that_is_missing_is_never_bypassed() {
    let world = [
        zone("a", &[]),
        gated(&[("gone", Some(ELSEWHERE))], DirectCallers::Refuse),
        service(&[(1, "b", Some("b3")), (2, "b", Some("nobody")), (3, "b", None)]),
    ];
    let snapshot = seen_by("a", "a1", &world);
    let ports: Vec<_> = snapshot.services()[0]
        .endpoints
        .iter()
        .map(|e| (e.key.address.port(), e.key.via.clone()))
        .collect();
    let gateway = |proxy: Option<&str>| Via::Gateway {
        zone: "b".into(),
        proxy: proxy.map(Arc::from),
    };
    assert_eq!(ports, [(1, gateway(Some("b3"))), (3, gateway(None))]);
    assert_eq!(gateways(&snapshot), [Some(vec![]), Some(vec![])]);
}

#[test]
fn zones_see_what_they_may_have() {
    let picky = |text: &str, imports: Selection| {
        let mut zone = zone(text, &[]);
        if let Spec::Zone(zone) = &mut zone.spec {
            zone.imports = imports;
        }
        zone
    };
    let mut bound = service(&[
        (1, "a", Some("a1")),
        (2, "b", Some("b1")),
        (3, "c", Some("c1")),
        (4, "d", Some("d1")),
    ]);
    if let Spec::Service(service) = &mut bound.spec {
        service.export_to = Selection::Only(vec![name("d"), name("a"), name("c")]);
    }
    let world = [
        zone("a", &[]),
        zone("b", &[]),
        picky("c", Selection::Only(vec![name("other")])),
        picky("d", Selection::Only(vec![name("cart")])),
        bound,
    ];
    let zones = |viewer: &str| -> Vec<String> {
        let snapshot = compile(viewer, &world);
        let service = &snapshot.services()[0];
        service.endpoints.iter().map(|e| e.zone.to_string()).collect()
    };
    assert_eq!(zones("a"), ["a", "b", "c", "d"]);
    assert_eq!(zones("b"), ["b"], "it isn't exported to b");
    assert_eq!(zones("c"), ["c"], "c doesn't import it");
    assert_eq!(zones("d"), ["a", "b", "c", "d"]);
    assert_eq!(zones("unknown"), Vec::<String>::new());
    let snapshot = compile("a", &world);
    let to = &snapshot.services()[0].exported_to;
    assert!(!to.is_all());
    // By what a certificate says.
    for (zone, may) in [
        ("a", true),
        ("b", false),
        ("c", false),
        ("d", true),
        ("e", false),
        ("", false),
    ] {
        assert_eq!(to.has(zone), may, "{zone}");
    }
    assert!(compile("a", &[service(&[])]).services()[0].exported_to.is_all());
}

proptest! {
    #[test]
    fn what_is_seen_is_what_is_let_in(
        only in proptest::option::of(proptest::collection::btree_set("[a-f]", 0..5)),
        refusers in proptest::collection::btree_set("[a-f]", 0..5),
    ) {
        let mut world: Vec<Resource> = ["a", "b", "c", "d", "e", "f"].map(|z| zone(z, &[])).into();
        for resource in &mut world {
            if refusers.contains(resource.name.as_str())
                && let Spec::Zone(zone) = &mut resource.spec
            {
                zone.imports = Selection::Only(vec![]);
            }
        }
        let mut shared = service(&[(1, "b", None)]);
        if let Spec::Service(service) = &mut shared.spec {
            let names = |set: &std::collections::BTreeSet<String>| set.iter().map(|z| name(z)).collect();
            service.export_to = only.as_ref().map_or(Selection::All, |set| Selection::Only(names(set)));
        }
        world.push(shared);
        let server = compile("b", &world);
        for caller in ["a", "c", "d", "e", "f"] {
            let sees = !compile(caller, &world).services()[0].endpoints.is_empty();
            prop_assert_eq!(sees, server.services()[0].exported_to.has(caller), "{}", caller);
        }
    }
}

use super::*;
use crate::registry::Registry;
use leeward_policy::model::{Endpoint, Service, Spec, Zone, ZoneMode, ZoneProxy};
use leeward_policy::{Name, Resource, Snapshot, Viewer};
use leeward_resilience::{Event, Seeded, Word};
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

/// A service as a proxy of zone a sees it, with an endpoint behind each of these proxies: `b1` is in zone b.
struct Rig {
    snapshot: Snapshot,
    registry: Registry,
    states: Vec<Arc<EndpointState>>,
    field: Field,
    now: Instant,
    draw: Seeded,
}

impl Rig {
    #[expect(
        clippy::disallowed_methods,
        reason = "an arbitrary origin; only differences matter"
    )]
    fn new(proxies: &[&str], mode: ZoneMode) -> Self {
        let now = Instant::now();
        let address = |port: u16| ([127, 0, 0, 1], port).into();
        let zone = |zone: &str| {
            let of = (1..).zip(proxies).filter(|(_, proxy)| proxy.starts_with(zone));
            let proxies = of.map(|(port, proxy)| ZoneProxy {
                name: name(proxy),
                address: address(port),
            });
            resource(zone, Spec::Zone(Zone::new(proxies.collect(), Vec::new())))
        };
        let endpoints = (1001..).zip(proxies).map(|(port, proxy)| Endpoint {
            proxy: Some(name(proxy)),
            ..Endpoint::new(address(port), name(&proxy[..1]))
        });
        let mut service = Service::new(endpoints.collect());
        service.balance.mode = mode;
        let world = [
            zone("a"),
            zone("b"),
            zone("c"),
            resource("shop", Spec::Service(service)),
        ];
        let viewer = Viewer {
            zone: name("a"),
            proxy: name("a1"),
        };
        let snapshot = Snapshot::compile(viewer, 1, &world);
        let registry = Registry::new(now);
        let states = snapshot.services()[0]
            .endpoints
            .iter()
            .map(|endpoint| registry.endpoint(&endpoint.key, now))
            .collect();
        Self {
            snapshot,
            registry,
            states,
            field: Field::default(),
            now,
            draw: Seeded(1),
        }
    }

    /// An endpoint can't be reached from here.
    fn lose(&mut self, endpoint: usize) {
        let settings = &self.snapshot.services()[0].spec.outlier;
        self.states[endpoint].note(Event::FailToConnect, self.now, settings, || true, &mut self.draw);
    }

    /// What the proxy in front of an endpoint says.
    fn report(&self, endpoint: usize, healthy: u32, spare: u32, bound: u32) {
        let said = Word { healthy, spare };
        self.states[endpoint]
            .behind()
            .unwrap()
            .set(Some(said), Some(bound));
        self.registry.service(&"shop".into()).changed();
    }

    /// How often each endpoint is chosen of a hundred times, and how often none is.
    fn choose(&mut self) -> (Vec<u32>, u32) {
        let service = self.registry.service(&"shop".into());
        let states = self.states.clone();
        let seen = Seen {
            view: &self.snapshot.services()[0],
            state: &service,
            now: self.now,
            endpoints: &|i| states.get(i),
            circuits: &|_| None,
            has_way: &|_| true,
            gateway_changes: 0,
        };
        let (mut chosen, mut none) = (vec![0; states.len()], 0);
        for turn in 0..100 {
            self.field.refresh(&seen, None);
            match self.field.choose(&seen, turn, None, &[], &mut self.draw) {
                Some(choice) => chosen[choice.endpoint] += 1,
                None => none += 1,
            }
        }
        (chosen, none)
    }

    fn lacks_room(&self) -> bool {
        self.field.lacks_room(|i| self.states[i].has_room(), &[])
    }
}

#[test]
fn what_finds_no_room_in_one_zone_goes_to_the_next_or_to_nobody() {
    let mut rig = Rig::new(&["a1", "b1", "c1"], ZoneMode::Nearest);
    rig.report(1, 1, 0, 0);
    assert_eq!(rig.choose(), (vec![100, 0, 0], 0), "its own zone is well");
    rig.lose(0);
    rig.report(1, 1, 9, 2);
    let held: Vec<_> = (0..2).map(|_| rig.states[1].begin()).collect();
    assert_eq!(rig.choose(), (vec![0, 0, 100], 0));
    rig.report(2, 1, 0, 0);
    assert_eq!(rig.choose(), (vec![0, 0, 0], 100));
    assert!(rig.lacks_room());
    drop(held);
    assert_eq!(rig.choose(), (vec![0, 100, 0], 0));
}

#[test]
fn a_proxy_that_says_that_its_workloads_are_unwell_is_believed_of_those_alone() {
    let mut rig = Rig::new(&["b1", "b2", "c1"], ZoneMode::Nearest);
    let (chosen, none) = rig.choose();
    assert!(
        chosen[0] > 20 && chosen[1] > 20 && chosen[2] == 0 && none == 0,
        "{chosen:?}"
    );
    rig.report(0, 0, 0, 0);
    let (chosen, none) = rig.choose();
    assert!(
        chosen[0] == 0 && chosen[1] > 50 && chosen[2] > 10 && none == 0,
        "{chosen:?}"
    );
    // What is believed to be well here isn't made so by what is said.
    rig.report(0, u32::MAX, u32::MAX, u32::MAX);
    rig.lose(0);
    assert_eq!(rig.choose().0[0], 0);
}

#[test]
fn the_zone_that_is_turned_to_first_is_not_bounded() {
    let mut rig = Rig::new(&["b1", "c1"], ZoneMode::Nearest);
    rig.report(0, 1, 0, 0);
    assert_eq!(rig.choose(), (vec![100, 0], 0));
    let weights = vec![(name("b"), 1), (name("c"), 1)];
    let mut rig = Rig::new(&["b1", "c1"], ZoneMode::ActiveActive(weights));
    rig.report(0, 1, 0, 0);
    rig.report(1, 1, 0, 0);
    let (chosen, none) = rig.choose();
    assert!(chosen[0] > 25 && chosen[1] > 25 && none == 0, "{chosen:?}");
    // But for what is more than its part.
    rig.lose(0);
    let (chosen, _) = rig.choose();
    assert!(chosen[0] == 0 && chosen[1] < 100, "{chosen:?}");
}

#[test]
fn the_first_of_a_list_serves_wherever_the_caller_is() {
    let order = ZoneMode::ActivePassive(vec![name("c"), name("b")]);
    let mut rig = Rig::new(&["a1", "b1", "c1"], order);
    assert_eq!(rig.choose(), (vec![0, 0, 100], 0));
    rig.lose(2);
    assert_eq!(rig.choose(), (vec![0, 100, 0], 0));
    rig.lose(1);
    assert_eq!(rig.choose(), (vec![100, 0, 0], 0));
}

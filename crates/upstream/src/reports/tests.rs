use super::*;
use leeward_identity::authority::Authority;
use leeward_policy::model::{Endpoint, Service, Spec, Zone, ZoneGateway, ZoneProxy};
use leeward_policy::{Name, Resource, Viewer};
use leeward_zone::{Health, Server};
use std::collections::BTreeMap;
use std::path::PathBuf;
use tokio::sync::watch;
use tokio::task::LocalSet;

#[test]
fn what_is_not_known_bounds_nothing() {
    let reported = Reported::default();
    assert!(reported.has_room() && reported.healthy().is_none() && reported.bound().is_none());
    let said = |healthy, spare| Some(Word { healthy, spare });
    assert!(reported.set(said(2, 7), Some(1)));
    assert_eq!(reported.word(), said(2, 7));
    assert!(reported.has_room());
    reported.begin();
    assert!(!reported.has_room(), "one is under way");
    reported.end();
    assert!(reported.has_room());
    assert_eq!(
        reported.usage(),
        Usage {
            under_way: 0,
            begun: 1
        }
    );
    assert!(!reported.set(said(2, 9), Some(0)), "as many are healthy");
    assert!(!reported.has_room());
    // Numbers that make no sense are large ones.
    reported.set(said(u32::MAX, u32::MAX), Some(u32::MAX));
    assert_eq!(reported.healthy(), Some(UNKNOWN - 1));
    assert!(reported.has_room());
    reported.set(None, None);
    assert!(reported.has_room() && reported.word().is_none());
}

fn gateway(name: &str) -> Source {
    let address = ([127, 0, 0, 1], 15008).into();
    let whom = Whom {
        to: address,
        id: SpiffeId::parse(&format!("spiffe://leeward.test/zone/b/proxy/{name}")).unwrap(),
    };
    let view = GatewayView {
        zone: "b".into(),
        name: name.into(),
        address,
    };
    Source {
        whom,
        gateway: Some(view),
        said: None,
    }
}

/// A service behind the gateways of zone b, and what is made of their reports.
struct Rig {
    told: Told,
    now: Instant,
    open: HashMap<Arc<str>, bool>,
}

impl Rig {
    fn new(gateways: &[&str]) -> Self {
        let now = tokio::time::Instant::now().into_std();
        let wanted = Wanted {
            teller: Teller::Gateways("b".into()),
            state: Arc::new(ServiceState::new("shop".into(), now)),
            others: 1,
            by: Vec::new(),
        };
        let mut told = Told::new(&wanted, Arc::default());
        assert!(told.follow(gateways.iter().map(|name| gateway(name)).collect()));
        let open = gateways.iter().map(|name| (Arc::from(*name), true)).collect();
        Self { told, now, open }
    }

    /// A gateway says how many are healthy, and what is spare; nothing of the service, if `None`.
    fn say(&mut self, name: &str, said: Option<(u32, u32)>) -> Option<Word> {
        let mut health = Health::default();
        if let Some((healthy, spare)) = said {
            let total = 3;
            health.set(
                "shop",
                ServiceHealth {
                    healthy,
                    total,
                    spare,
                },
            );
        }
        let report = Report {
            health: Arc::new(health),
            heard: self.now,
        };
        let Source { whom, .. } = gateway(name);
        self.look(|from| (*from == whom).then_some(&report))
    }

    fn look<'a>(&mut self, news: impl Fn(&Whom) -> Option<&'a Report>) -> Option<Word> {
        let open = &self.open;
        self.told.look(news, |view| open[&view.name], self.now);
        assert_eq!(
            self.told.reported.word().is_some(),
            self.told.reported.bound().is_some()
        );
        self.told.reported.word()
    }

    fn later(&mut self, time: Duration) -> Option<Word> {
        self.now += time;
        self.look(|_| None)
    }
}

const fn word(healthy: u32, spare: u32) -> Option<Word> {
    Some(Word { healthy, spare })
}

#[test]
fn gateways_tell_of_the_same_room() {
    let mut rig = Rig::new(&["g1", "g2"]);
    assert_eq!(rig.later(Duration::ZERO), None);
    assert_eq!(rig.say("g1", Some((3, 10))), word(3, 10), "one is enough");
    assert_eq!(rig.told.reported.bound(), Some(10));
    assert_eq!(rig.say("g2", Some((3, 8))), word(3, 8));
    assert_eq!(rig.told.reported.bound(), Some(8));
    // What a gateway can't reach, the other may.
    assert_eq!(rig.say("g1", Some((0, 0))), word(3, 8));
    assert_eq!(rig.say("g1", None), word(3, 8));
    assert_eq!(rig.say("g2", Some((0, 0))), word(0, 0));
    assert_eq!(rig.say("g2", None), None);
}

#[test]
fn a_lost_gateway_takes_nothing_with_it_and_a_silent_one_is_not_heard_for_long() {
    let mut rig = Rig::new(&["g1", "g2"]);
    rig.say("g1", Some((3, 0)));
    assert_eq!(rig.say("g2", Some((2, 7))), word(3, 0));
    rig.open.insert("g1".into(), false);
    assert_eq!(rig.later(Duration::ZERO), word(2, 7), "it isn't waited for");
    rig.open.insert("g1".into(), true);
    assert_eq!(rig.later(Duration::ZERO), word(3, 0));
    rig.now += FRESH_FOR / 2;
    assert_eq!(rig.say("g2", Some((2, 7))), word(3, 0));
    assert_eq!(rig.later(FRESH_FOR / 2), word(2, 7), "g1 is silent");
    assert_eq!(
        rig.later(FRESH_FOR / 2),
        None,
        "so is g2: all is as without reports"
    );
    // Policy has another in its place.
    rig.say("g1", Some((3, 5)));
    assert!(rig.told.follow(vec![gateway("g1"), gateway("g3")]));
    rig.open.insert("g3".into(), true);
    assert_eq!(rig.later(Duration::ZERO), word(3, 5));
    assert!(!rig.told.follow(vec![gateway("g1")]));
}

#[test]
fn requests_begun_wrap_around_alone() {
    let reported = Reported::default();
    reported
        .usage
        .store(u64::from(UNKNOWN) << 32 | 5, Ordering::Relaxed);
    reported.begin();
    assert_eq!(
        reported.usage(),
        Usage {
            under_way: 6,
            begun: 0
        }
    );
}

/// A directory that goes when the test ends.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Whether it is there is all the same.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A gateway that says of `shop` what it is told to.
fn gateway_server(identity: Arc<Identity>) -> (SocketAddr, watch::Sender<Arc<leeward_zone::Reports>>) {
    let (says, health) = watch::channel(Arc::default());
    let socket = leeward_zone::bind(([127, 0, 0, 1], 0).into(), 1)
        .unwrap()
        .remove(0);
    let address = socket.local_addr().unwrap();
    let server = Server::new(socket, identity, Some(health), Congestion::default()).unwrap();
    tokio::task::spawn_local(async move {
        let mut links = Vec::new();
        while let Some(arriving) = server.accept().await {
            links.push(arriving.handshake().await.unwrap());
        }
    });
    (address, says)
}

fn said(healthy: u32, spare: u32) -> Arc<leeward_zone::Reports> {
    let mut health = Health::default();
    let total = 1;
    health.set(
        "shop",
        ServiceHealth {
            healthy,
            total,
            spare,
        },
    );
    Arc::new(health.into())
}

#[tokio::test]
async fn the_gateways_of_a_zone_are_listened_to_and_no_proxy_behind_them() {
    let scratch = Scratch(std::env::temp_dir().join(format!("leeward-reports-{}", std::process::id())));
    let authority = Authority::create(&scratch.0.join("ca"), "leeward.test").unwrap();
    let identity = |zone: &str, proxy: &str| {
        let id = SpiffeId::proxy("leeward.test", zone, proxy).unwrap();
        let dir = scratch.0.join(proxy);
        authority.issue(&id, Duration::from_secs(3600), &dir).unwrap();
        Identity::load(dir).unwrap()
    };
    let (caller, first, second) = (identity("a", "a1"), identity("b", "g1"), identity("b", "g2"));
    let run = async move {
        let (to_first, first) = gateway_server(first);
        let (to_second, second) = gateway_server(second);
        let name = |text: &str| Name::parse(text).unwrap();
        let resource = |text: &str, spec| Resource {
            name: name(text),
            revision: 1,
            labels: BTreeMap::new(),
            spec,
        };
        let proxy = |text: &str, address| ZoneProxy {
            name: name(text),
            address,
        };
        let gateway = |text: &str| ZoneGateway {
            name: name(text),
            address: None,
        };
        // Nobody is there.
        let nowhere: SocketAddr = ([127, 0, 0, 1], 1).into();
        let proxies = vec![
            proxy("g1", to_first),
            proxy("g2", to_second),
            proxy("b1", nowhere),
        ];
        let endpoint = Endpoint {
            proxy: Some(name("b1")),
            ..Endpoint::new(nowhere, name("b"))
        };
        let world = [
            resource("a", Spec::Zone(Zone::new(vec![proxy("a1", nowhere)], Vec::new()))),
            resource(
                "b",
                Spec::Zone(Zone {
                    gateways: vec![gateway("g1"), gateway("g2")],
                    ..Zone::new(proxies, Vec::new())
                }),
            ),
            resource("shop", Spec::Service(Service::new(vec![endpoint]))),
        ];
        let viewer = Viewer {
            zone: name("a"),
            proxy: name("a1"),
        };
        let snapshot = Arc::new(Snapshot::compile(viewer, 1, &world));
        let now = tokio::time::Instant::now().into_std();
        let registry = Arc::new(Registry::new(now - Duration::from_secs(1)));
        let endpoint = registry.endpoint(&snapshot.services()[0].endpoints[0].key, now);
        registry.service(&"shop".into()).is_called(now);
        let reports = Reports::new(caller, Arc::clone(&registry));
        let followed = Arc::clone(&snapshot);
        tokio::task::spawn_local(reports.run(move || Arc::clone(&followed)));
        let known = async |want: Option<Word>| {
            let known = async {
                while endpoint.behind().unwrap().word() != want {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            let soon = Duration::from_secs(30);
            assert!(
                tokio::time::timeout(soon, known).await.is_ok(),
                "{:?}, want {want:?}",
                endpoint.behind().unwrap().word()
            );
        };
        first.send_replace(said(1, 6));
        known(word(1, 6)).await;
        second.send_replace(said(1, 4));
        known(word(1, 4)).await;
        assert!(endpoint.has_room());
        // One can't reach it; then neither can.
        second.send_replace(said(0, 0));
        known(word(1, 6)).await;
        first.send_replace(said(0, 0));
        known(word(0, 0)).await;
        assert!(!endpoint.has_room());
        second.send_replace(said(1, 3));
        known(word(1, 3)).await;
    };
    LocalSet::new().run_until(run).await;
}

use super::*;
use leeward_proto::manifest;

/// Levels by the errors of `pay`: `reduced` where a zone sees some, `core-only` everywhere if the mesh sees many.
const POLICY: &str = "
apiVersion: leeward.dev/v1
kind: DegradationPolicy
metadata: {name: shop}
spec:
  levels: [{name: normal}, {name: reduced}, {name: core-only}]
  triggers:
    - {level: core-only, errorRate: {service: pay, above: 60, window: 10s}, holdFor: 2s, clearAfter: 5s, minStay: 5s, scope: Mesh}
    - {level: reduced, errorRate: {service: pay, above: 30, window: 10s}, holdFor: 2s, clearAfter: 5s, minStay: 5s}
";

/// A control plane's judges, driven second by second.
struct Court {
    bench: Bench,
    seen: Seen,
    written: BTreeMap<Place, Judged>,
    changes: Vec<LevelChange>,
    connected: BTreeMap<String, bool>,
    now: Instant,
    wall: SystemTime,
}

impl Court {
    fn new() -> Self {
        let now = tokio::time::Instant::now().into_std();
        let mut court = Self {
            bench: Bench::default(),
            seen: Seen::new(now),
            written: BTreeMap::new(),
            changes: Vec::new(),
            connected: [("a".to_owned(), true), ("b".to_owned(), true)].into(),
            now,
            wall: UNIX_EPOCH + Duration::from_secs(1_795_557_600),
        };
        court.apply(POLICY, 1);
        court
    }

    fn apply(&mut self, yaml: &str, revision: u64) {
        let wire = manifest::parse("test", yaml).unwrap();
        let resources: Vec<_> = wire
            .iter()
            .map(|r| Arc::new(leeward_proto::parse(r).unwrap()))
            .collect();
        let zones = ["a".to_owned(), "b".to_owned()].into();
        self.bench.take(&resources, zones, revision);
        self.seen.keep(self.bench.signals(), self.now);
    }

    /// As a restart leaves it: what was seen is forgotten, what was written is there, and nobody is connected yet.
    fn restart(&mut self) {
        self.bench = Bench::default();
        self.seen = Seen::new(self.now);
        self.connected.clear();
        self.apply(POLICY, 1);
    }

    /// A second in which each zone's proxies saw a hundred calls to `pay`, of which this many percent failed.
    fn second(&mut self, failed: &[(&str, u64)]) {
        self.now += Duration::from_secs(1);
        self.wall += Duration::from_secs(1);
        for (zone, failures) in failed {
            for proxy in ["1", "2"] {
                let signals = v1::Signals {
                    services: vec![
                        v1::ServiceSignals {
                            service: "pay".into(),
                            calls: 50,
                            failures: failures / 2,
                            ..v1::ServiceSignals::default()
                        },
                        v1::ServiceSignals {
                            service: "nobody-asked".into(),
                            calls: 50,
                            ..v1::ServiceSignals::default()
                        },
                    ],
                };
                self.seen.add(zone, proxy, &signals, self.now);
            }
        }
        self.judge();
    }

    fn judge(&mut self) {
        self.seen.note(&self.connected, self.now);
        let writes = self.bench.judge(&self.seen, &self.written, self.now, self.wall);
        for (place, judged) in writes.judged {
            match judged {
                Some(judged) => self.written.insert(place, judged),
                None => self.written.remove(&place),
            };
        }
        self.changes.extend(writes.changes);
    }

    fn seconds(&mut self, count: usize, failed: &[(&str, u64)]) {
        for _ in 0..count {
            self.second(failed);
        }
    }

    /// What the proxies of a zone are told.
    fn told(&self, zone: &str) -> String {
        use prost::Message;
        let message = v1::ControlMessage::decode(self.bench.told().to(zone).clone()).unwrap();
        let Some(v1::control_message::Message::Levels(levels)) = message.message else {
            panic!("{message:?}");
        };
        let levels: Vec<_> = levels
            .levels
            .iter()
            .map(|l| format!("{}/{}", l.policy, l.level))
            .collect();
        levels.join(" ")
    }

    /// What was written down since the last look, as `zone: from-to by`.
    fn audit(&mut self) -> Vec<String> {
        let line = |c: LevelChange| format!("{}: {}-{} {}", c.zone, c.from, c.to, c.by);
        self.changes.drain(..).map(line).collect()
    }
}

#[test]
fn the_errors_of_one_zone_degrade_that_zone_only() {
    let mut court = Court::new();
    court.seconds(5, &[("a", 0), ("b", 0)]);
    assert_eq!((court.told("a"), court.told("b")), (String::new(), String::new()));
    court.seconds(10, &[("a", 80), ("b", 0)]);
    assert_eq!(
        (court.told("a").as_str(), court.told("b").as_str()),
        ("shop/reduced", "")
    );
    let why = &court.written.first_key_value().unwrap().1.why;
    assert!(why.starts_with("error rate of pay "), "{why}");
    assert_eq!(court.audit(), ["a: normal-reduced trigger 1"]);
    // It is over once the window is clean and has been for as long as the policy says.
    court.seconds(9, &[("a", 0), ("b", 0)]);
    assert_eq!(court.told("a"), "shop/reduced");
    court.seconds(10, &[("a", 0), ("b", 0)]);
    assert_eq!(court.told("a"), "");
    assert_eq!(court.audit(), ["a: reduced-normal trigger 1"]);
    assert!(court.written.is_empty(), "{:?}", court.written);
}

#[test]
fn what_the_mesh_sees_as_a_whole_degrades_all_zones() {
    let mut court = Court::new();
    court.seconds(10, &[("a", 100), ("b", 40)]);
    // The more degraded of the zone's level and the mesh's.
    for zone in ["a", "b", "one-that-was-never-heard-of"] {
        assert_eq!(court.told(zone), "shop/core-only", "{zone}");
    }
    let mut audit = court.audit();
    audit.sort_unstable();
    assert_eq!(
        audit,
        [
            ": normal-core-only trigger 0",
            "a: normal-reduced trigger 1",
            "b: normal-reduced trigger 1"
        ]
    );
    // The mesh's clears first: a half is not two thirds, but more than what a zone may have.
    court.seconds(20, &[("a", 50), ("b", 0)]);
    assert_eq!(
        (court.told("a").as_str(), court.told("b").as_str()),
        ("shop/reduced", "")
    );
}

#[test]
fn a_restart_ends_no_level_early() {
    let mut court = Court::new();
    court.seconds(10, &[("a", 80), ("b", 0)]);
    court.audit();
    let written = court.written.clone();
    court.restart();
    // Nobody is there to say how things are.
    court.seconds(50, &[]);
    assert_eq!(court.told("a"), "shop/reduced");
    court.connected = [("a".to_owned(), true), ("b".to_owned(), true)].into();
    court.seconds(3, &[("a", 80), ("b", 0)]);
    assert_eq!(
        (court.told("a").as_str(), court.told("b").as_str()),
        ("shop/reduced", "")
    );
    assert_eq!(court.audit(), Vec::<String>::new());
    assert_eq!(court.written, written, "with the time when it began");
    court.seconds(30, &[("a", 0), ("b", 0)]);
    assert_eq!(court.audit(), ["a: reduced-normal trigger 1"]);
}

#[test]
fn a_zone_that_is_cut_off_keeps_its_level_for_a_minute() {
    let mut court = Court::new();
    court.seconds(10, &[("a", 80), ("b", 0)]);
    court.audit();
    court.connected.insert("a".to_owned(), false);
    court.seconds(59, &[("b", 0)]);
    assert_eq!(court.told("a"), "shop/reduced");
    assert!(court.seen.is_present("a", court.now));
    court.seconds(10, &[("b", 0)]);
    assert!(!court.seen.is_present("a", court.now));
    assert_eq!(court.told("a"), "");
    assert_eq!(court.audit(), ["a: reduced-normal trigger 1"]);
}

#[test]
fn a_policy_without_the_trigger_or_the_level_any_more_ends_it() {
    let mut court = Court::new();
    court.seconds(10, &[("a", 80), ("b", 0)]);
    court.audit();
    // A level that has another name now is another level.
    court.apply(&POLICY.replace("reduced", "less"), 2);
    court.judge();
    assert_eq!(court.told("a"), "shop/less");
    assert_eq!(court.audit(), ["a: reduced-less trigger 1"]);
    let (without, _) = POLICY.split_once("  triggers:").unwrap();
    court.apply(without, 3);
    court.judge();
    assert_eq!((court.told("a").as_str(), court.audit().len()), ("", 1));
    assert!(court.written.is_empty(), "{:?}", court.written);
    // And what was written by a policy that is gone meanwhile is nobody's.
    court.apply("", 4);
    court.judge();
    assert!(court.bench.seats.is_empty(), "{:?}", court.bench.seats);
}

#[test]
fn only_what_triggers_look_at_is_kept() {
    let mut court = Court::new();
    court.seconds(2, &[("a", 0)]);
    assert!(court.seen.log("a", "pay").is_some() && court.seen.log("", "pay").is_some());
    assert!(court.seen.log("a", "nobody-asked").is_none() && court.seen.log("", "nobody-asked").is_none());
    let many = v1::Signals {
        services: vec![
            v1::ServiceSignals {
                service: "pay".into(),
                latencies: vec![1; 1000],
                ..v1::ServiceSignals::default()
            };
            20_000
        ],
    };
    court.seen.add("a", "1", &many, court.now);
    court.connected.remove("a");
    court.judge();
    assert!(court.seen.log("a", "pay").is_none());
}

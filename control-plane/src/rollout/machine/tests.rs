//! A mesh of proxies that do as they are told, and a control plane that crashes.

use super::super::compare::{BUCKETS, Tally};
use super::super::reach::rank;
use super::*;
use leeward_policy::model::{ErrorGate, LatencyGate};
use proptest::prelude::*;

const REVISION: u64 = 42;

fn name() -> Name {
    Name::parse("default").unwrap()
}

fn policy(on_failure: OnFailure) -> RolloutPolicy {
    RolloutPolicy {
        stages: RolloutPolicy::default_stages(),
        errors: ErrorGate::DEFAULT,
        latency: LatencyGate::DEFAULT,
        on_failure,
        progress_deadline: Duration::from_secs(60),
    }
}

/// What the change does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Change {
    Good,
    /// Every other request fails.
    Fails,
    /// Requests take ten times as long.
    Slow,
    /// Proxies refuse it.
    Refused,
    /// Proxies don't take it in.
    Hangs,
}

struct Proxy {
    zone: &'static str,
    rank: u64,
    connected: bool,
    has: bool,
}

struct World {
    change: Change,
    proxies: Vec<Proxy>,
    /// Of requests, in thousandths.
    base: u64,
    chance: fastrand::Rng,
    rollout: Rollout,
    watch: Watch,
    second: u64,
    most: usize,
}

impl World {
    fn new(change: Change, proxies: usize, on_failure: OnFailure, seed: u64) -> Self {
        let proxy = |i: usize| {
            let zone = if i.is_multiple_of(2) { "a" } else { "b" };
            Proxy {
                zone,
                rank: rank(REVISION, zone, &format!("p{i}")),
                connected: true,
                has: false,
            }
        };
        Self {
            change,
            proxies: (0..proxies).map(proxy).collect(),
            base: 10,
            chance: fastrand::Rng::with_seed(seed),
            rollout: Rollout::new(REVISION, name(), policy(on_failure), "me".into(), 0),
            watch: Watch::default(),
            second: 0,
            most: 0,
        }
    }

    fn requests(&mut self, has: bool) -> Tally {
        let mut tally = Tally::default();
        for _ in 0..10 {
            let bad = has && self.change == Change::Fails && self.chance.bool();
            let failed = bad || self.chance.u64(0..1000) < self.base;
            let slow = has && self.change == Change::Slow;
            let mut times = [0; BUCKETS];
            times[if slow { 9 } else { self.chance.usize(3..6) }] = 1;
            tally.add(&Tally {
                requests: 1,
                failures: u64::from(failed),
                times,
            });
        }
        tally
    }

    /// A second goes by.
    fn step(&mut self) {
        self.second += 1;
        let mut sight = Sight::default();
        let open = self.rollout.is_open() || matches!(self.rollout.phase, Phase::Promoted { .. });
        for i in 0..self.proxies.len() {
            let Proxy {
                zone,
                rank,
                connected,
                has,
            } = self.proxies[i];
            if !connected {
                continue;
            }
            sight.census.zones.entry(zone.to_owned()).or_default().add(rank);
            let member = open && self.rollout.reach.has(zone, rank);
            assert!(member || !has || !open, "who has it was to have it");
            if member {
                sight.members += 1;
                match self.change {
                    Change::Refused => sight.refusal = Some(format!("p{i}")),
                    Change::Hangs => sight.laggard = Some(format!("p{i}")),
                    Change::Good | Change::Fails | Change::Slow => {
                        // It takes a moment.
                        if has || self.chance.bool() {
                            self.proxies[i].has = true;
                            sight.running += 1;
                        }
                    }
                }
            } else {
                self.proxies[i].has = false;
            }
            let tally = self.requests(has);
            let group = if has {
                &mut sight.new.with
            } else {
                &mut sight.new.without
            };
            group.add("outbound", "r", &tally);
        }
        self.most = self.most.max(usize::try_from(sight.members).unwrap());
        let reach = self.rollout.reach.clone();
        let now = Duration::from_secs(self.second);
        self.rollout.look(
            &mut self.watch,
            &sight,
            now,
            i64::try_from(self.second).unwrap() * 1000,
        );
        for proxy in &self.proxies {
            let had = reach.has(proxy.zone, proxy.rank);
            assert!(
                !had || self.rollout.reach.has(proxy.zone, proxy.rank),
                "reach only grows"
            );
        }
    }

    fn run(&mut self, seconds: u64) {
        for _ in 0..seconds {
            if !self.rollout.is_watched() {
                return;
            }
            self.step();
        }
    }

    /// The control plane loses what it had in memory.
    fn crash(&mut self) {
        self.watch = Watch::default();
    }

    fn is_promoted(&self) -> bool {
        matches!(self.rollout.phase, Phase::Promoted { .. })
    }

    fn why(&self) -> &str {
        match &self.rollout.phase {
            Phase::Running => "",
            Phase::Paused { why, .. }
            | Phase::RollingBack { why }
            | Phase::Promoted { why }
            | Phase::RolledBack { why, .. } => why,
        }
    }

    fn is_taken_back(&self) -> bool {
        matches!(self.rollout.phase, Phase::RollingBack { .. })
    }
}

#[test]
fn what_is_good_reaches_everybody() {
    for seed in 0..8 {
        let mut world = World::new(Change::Good, 150, OnFailure::Rollback, seed);
        world.run(600);
        assert!(world.is_promoted(), "{:?}", world.rollout.phase);
        assert_eq!(world.rollout.reach, Reach::everybody());
        assert!(world.second >= 4 * 30, "each stage is watched");
    }
}

#[test]
fn what_is_bad_stops_at_the_first_proxy() {
    for (change, why) in [
        (Change::Fails, "fail with the change"),
        (Change::Slow, "take more than"),
        (Change::Refused, "refused by p"),
    ] {
        let mut world = World::new(change, 150, OnFailure::Rollback, 3);
        world.run(600);
        assert!(world.is_taken_back(), "{change:?}: {:?}", world.rollout.phase);
        assert_eq!(world.most, 1, "{change:?}");
        assert!(world.why().contains(why), "{}", world.why());
        world.rollout.taken_back(43, 0);
        let Phase::RolledBack { by: 43, .. } = world.rollout.phase else {
            panic!("{:?}", world.rollout.phase);
        };
    }
}

#[test]
fn what_nobody_takes_in_ends_at_its_deadline() {
    let mut world = World::new(Change::Hangs, 50, OnFailure::Rollback, 1);
    world.run(80);
    assert!(world.rollout.is_watched());
    world.run(40);
    assert!(world.is_taken_back());
    assert!(
        world.why().contains("0 of 1 proxies run it (p"),
        "{}",
        world.why()
    );
}

#[test]
fn by_policy_it_only_pauses_and_goes_on_when_somebody_says_so() {
    let mut world = World::new(Change::Fails, 50, OnFailure::Pause, 5);
    world.run(600);
    let Phase::Paused { failed: true, .. } = world.rollout.phase else {
        panic!("{:?}", world.rollout.phase);
    };
    world.rollout.steer(Command::Resume, "me", 1_000_000).unwrap();
    world.change = Change::Good;
    world.run(600);
    assert!(world.is_promoted(), "{:?}", world.rollout.phase);
}

#[test]
fn somebody_who_pauses_is_still_guarded() {
    let mut world = World::new(Change::Good, 50, OnFailure::Rollback, 5);
    world.run(20);
    world.rollout.steer(Command::Pause, "me", 0).unwrap();
    for _ in 0..100 {
        world.step();
    }
    assert_eq!((world.rollout.stage, world.most), (0, 1), "it stays where it is");
    world.change = Change::Refused;
    world.step();
    assert!(world.is_taken_back());
}

#[test]
fn everybody_at_once_is_compared_with_what_was_before() {
    let mut world = World::new(Change::Fails, 50, OnFailure::Rollback, 5);
    world.rollout.policy.stages.drain(..3);
    world.run(9);
    assert_eq!(world.most, 0, "what is normal is seen first");
    world.run(200);
    assert!(world.is_taken_back(), "{:?}", world.rollout.phase);
}

#[test]
fn proxies_that_come_back_one_by_one_are_waited_for() {
    let mut world = World::new(Change::Good, 200, OnFailure::Rollback, 5);
    world.proxies.iter_mut().for_each(|proxy| proxy.connected = false);
    for i in 0..200 {
        world.proxies[i].connected = true;
        if i % 10 == 9 {
            world.step();
        }
    }
    world.run(20);
    assert_eq!((world.rollout.stage, world.most), (0, 1));
}

#[test]
fn while_a_control_plane_is_silent_nobody_is_drawn() {
    let mut rollout = Rollout::new(REVISION, name(), policy(OnFailure::Rollback), String::new(), 0);
    let mut watch = Watch::default();
    let mut sight = Sight::default();
    sight.census.zones.entry("a".into()).or_default().add(7);
    sight.missing = vec!["control-2".into()];
    for second in 0..100 {
        rollout.look(&mut watch, &sight, Duration::from_secs(second), 0);
    }
    assert!(!rollout.drawn);
    sight.missing.clear();
    rollout.look(&mut watch, &sight, Duration::from_secs(100), 0);
    assert!(rollout.drawn);
}

#[test]
fn where_nobody_is_a_change_is_not_stuck() {
    let mut world = World::new(Change::Good, 1, OnFailure::Rollback, 1);
    world.proxies[0].connected = false;
    world.run(50);
    assert_eq!(world.rollout.stage, 0);
    world.run(400);
    assert!(world.is_promoted(), "{:?}", world.rollout.phase);
}

#[test]
fn what_is_over_stays_over() {
    for mut rollout in [
        Phase::Promoted { why: String::new() },
        Phase::RollingBack { why: String::new() },
    ]
    .map(|phase| Rollout {
        phase,
        ..Rollout::new(REVISION, name(), policy(OnFailure::Rollback), String::new(), 0)
    }) {
        let before = rollout.clone();
        for command in COMMANDS {
            assert!(rollout.steer(command, "me", 1).is_err());
        }
        rollout.look(&mut Watch::default(), &Sight::default(), Duration::ZERO, 1);
        assert_eq!(rollout, before);
    }
}

const COMMANDS: [Command; 5] = [
    Command::Pause,
    Command::Resume,
    Command::Promote,
    Command::PromoteFull,
    Command::Abort,
];

#[derive(Clone, Debug)]
enum Event {
    Seconds(u64),
    Crash,
    Command(Command),
    Leave(usize),
    Come(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (1..40u64).prop_map(Event::Seconds),
        2 => Just(Event::Crash),
        1 => prop::sample::select(COMMANDS.to_vec()).prop_map(Event::Command),
        1 => (0..40usize).prop_map(Event::Leave),
        1 => (0..40usize).prop_map(Event::Come),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The invariants are asserted in `step`; and whatever happens, what is refused never gets further than somebody
    /// promoted it.
    #[test]
    fn any_time_is_good_for_anything(
        events in prop::collection::vec(event(), 1..20),
        change in prop::sample::select(vec![Change::Good, Change::Fails, Change::Refused, Change::Hangs]),
        seed in any::<u64>(),
    ) {
        let mut world = World::new(change, 40, OnFailure::Rollback, seed);
        let mut promoted = false;
        for event in events {
            match event {
                Event::Seconds(seconds) => world.run(seconds),
                Event::Crash => world.crash(),
                Event::Command(command) => {
                    let wall = i64::try_from(world.second).unwrap() * 1000 + 1;
                    let done = world.rollout.steer(command, "me", wall).is_ok();
                    promoted |= done && matches!(command, Command::Promote | Command::PromoteFull);
                }
                Event::Leave(i) => world.proxies[i].connected = false,
                Event::Come(i) => world.proxies[i].connected = true,
            }
        }
        if change == Change::Refused && !promoted {
            prop_assert!(!world.is_promoted());
            prop_assert_eq!(world.rollout.stage, 0);
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// A crash at any time changes nothing about how it ends.
    #[test]
    fn crashes_don_t_change_how_it_ends(
        crashes in prop::collection::vec(1..50u64, 0..4),
        bad in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let change = if bad { Change::Fails } else { Change::Good };
        let mut world = World::new(change, 20, OnFailure::Rollback, seed);
        for seconds in crashes {
            world.run(seconds);
            world.crash();
        }
        world.run(1000);
        if bad {
            prop_assert!(world.is_taken_back());
            prop_assert_eq!(world.most, 1);
        } else {
            prop_assert!(world.is_promoted());
        }
    }
}

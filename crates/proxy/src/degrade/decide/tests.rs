use super::*;
use leeward_policy::model::{
    DegradationLevel, DegradationOverride, DegradationPolicy, Endpoint, Service, Spec,
};
use leeward_policy::{Name, Resource, Viewer};

#[expect(
    clippy::disallowed_methods,
    reason = "an arbitrary origin; only differences matter"
)]
fn origin() -> Instant {
    Instant::now()
}

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

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

fn trigger(level: usize, scope: Scope) -> DegradationTrigger {
    DegradationTrigger {
        level,
        signal: Signal::ErrorRate {
            service: name("pay"),
            above: 20,
            clear_below: 10,
            window: secs(5),
            minimum_calls: 10,
        },
        hold_for: secs(2),
        clear_after: secs(10),
        min_stay: secs(10),
        max_stay: None,
        scope,
    }
}

fn policy(levels: &[&str], triggers: Vec<DegradationTrigger>) -> Resource {
    let level = |text: &&str| DegradationLevel {
        name: name(text),
        flags: BTreeMap::new(),
        shed_below: None,
    };
    let spec = DegradationPolicy {
        levels: levels.iter().map(level).collect(),
        routes: Vec::new(),
        triggers,
    };
    resource("shop", Spec::DegradationPolicy(spec))
}

const LEVELS: &[&str] = &["normal", "reduced", "core-only"];

/// A decider and the time that it has.
struct Run {
    decider: Decider,
    snapshot: Snapshot,
    control: Option<Vec<ControlLevel>>,
    now: Instant,
    wall: SystemTime,
}

impl Run {
    fn new(resources: Vec<Resource>) -> Self {
        let mut run = Self {
            decider: Decider::default(),
            snapshot: compile(&[]),
            control: None,
            now: origin(),
            wall: SystemTime::UNIX_EPOCH + secs(1_000_000),
        };
        run.adopt(resources);
        run
    }

    fn adopt(&mut self, mut resources: Vec<Resource>) {
        let endpoint = Endpoint::new(([127, 0, 0, 1], 80).into(), name("a"));
        resources.push(resource("pay", Spec::Service(Service::new(vec![endpoint]))));
        self.snapshot = compile(&resources);
        self.decider.adopt(&self.snapshot, self.now);
    }

    /// A second with ten calls, so many of which fail, and what came of it: to which level, and by whom.
    fn second(&mut self, failures: u64) -> Vec<(String, &'static str)> {
        self.now += secs(1);
        self.wall += secs(1);
        let sample = SignalSample {
            calls: 10,
            failures,
            limit: 10,
            ..SignalSample::default()
        };
        self.decider.see(&[("pay".into(), sample)], self.now);
        let moved = self
            .decider
            .decide(&self.snapshot, self.control.as_deref(), self.now, self.wall);
        moved
            .iter()
            .map(|moved| (moved.to.to_string(), moved.by))
            .collect()
    }

    fn seconds(&mut self, seconds: u32, failures: u64) -> Vec<(String, &'static str)> {
        (0..seconds).flat_map(|_| self.second(failures)).collect()
    }

    fn level(&self) -> usize {
        self.decider.levels(&self.snapshot).standing[0].level
    }

    fn report(&self) -> Value {
        self.decider.report(self.now, self.wall)["policies"][0].clone()
    }

    /// The next process, with the same policy: what is handed over goes by the wire's format.
    fn next(&self, resources: Vec<Resource>) -> Self {
        let mut next = Self::new(resources);
        (next.now, next.wall) = (self.now, self.wall);
        let handed = serde_json::to_string(&self.decider.hand_out(self.now)).unwrap();
        let handed: Vec<Handed> = serde_json::from_str(&handed).unwrap();
        next.decider.inherit(&handed, next.now);
        next
    }

    fn hold(&self, level: &str, length: Duration) -> Resource {
        let held = DegradationOverride {
            policy: name("shop"),
            level: name(level),
            expire_time: self.wall + length,
            reason: "an exercise".into(),
            zones: Vec::new(),
        };
        resource("exercise", Spec::DegradationOverride(held))
    }
}

fn compile(resources: &[Resource]) -> Snapshot {
    let viewer = Viewer {
        zone: name("a"),
        proxy: name("a1"),
    };
    let zone = resource(
        "a",
        Spec::Zone(leeward_policy::model::Zone::new(Vec::new(), Vec::new())),
    );
    Snapshot::compile(viewer, 1, resources.iter().chain([&zone]))
}

fn says(level: &str) -> Option<Vec<ControlLevel>> {
    let level = ControlLevel {
        policy: "shop".into(),
        level: level.into(),
        why: "the zone is bad".into(),
    };
    Some(vec![level])
}

fn moved(to: &str, by: &'static str) -> Vec<(String, &'static str)> {
    vec![(to.to_owned(), by)]
}

#[test]
fn without_a_control_plane_its_own_judgement_is_in_force_whatever_the_scope() {
    for scope in [Scope::Zone, Scope::Mesh] {
        let mut run = Run::new(vec![policy(LEVELS, vec![trigger(2, scope)])]);
        assert_eq!(run.seconds(2, 10), []);
        assert_eq!(run.second(10), moved("core-only", "trigger"));
        assert_eq!(run.level(), 2);
        let report = run.report();
        assert_eq!(report["trigger"], 0);
        assert_eq!(report["why"], "error rate of pay 100.0 %, past 20 %");
        assert_eq!(report["triggers"][0]["stage"], "active");
        assert_eq!(report["triggers"][0]["value"], 100.0);
        let in_force: Vec<Vec<Arc<str>>> = vec![vec!["shop".into(), "core-only".into()]];
        assert_eq!(run.decider.in_force(), in_force);
        assert_eq!(run.seconds(14, 0), []);
        assert_eq!(run.seconds(3, 0), moved("normal", "trigger"));
    }
}

#[test]
fn what_is_held_goes_before_all_else_until_it_ends() {
    let own = || policy(LEVELS, vec![trigger(2, Scope::Zone)]);
    let mut run = Run::new(vec![own()]);
    run.control = says("core-only");
    assert_eq!(run.second(0), moved("core-only", "control"));
    let held = run.hold("reduced", secs(5));
    run.adopt(vec![own(), held]);
    assert_eq!(run.seconds(4, 10), moved("reduced", "override"));
    assert_eq!(run.report()["until_ms"], 1000);
    assert_eq!(run.report()["why"], "an exercise");
    assert_eq!(run.second(10), moved("core-only", "control"), "it ends by itself");
    // So it is where there is no control plane.
    run.control = None;
    let held = run.hold("normal", secs(5));
    run.adopt(vec![own(), held]);
    assert_eq!(run.second(10), moved("normal", "override"));
    assert_eq!(run.seconds(4, 10), moved("core-only", "trigger"));
}

#[test]
fn a_control_planes_word_goes_before_its_own_judgement() {
    let mut run = Run::new(vec![policy(LEVELS, vec![trigger(2, Scope::Zone)])]);
    run.control = Some(Vec::new());
    assert_eq!(
        run.seconds(10, 10),
        [],
        "a policy that is not named is at its normal level"
    );
    assert_eq!(run.report()["own"]["level"], "core-only");
    run.control = says("reduced");
    assert_eq!(run.second(10), moved("reduced", "control"));
    assert_eq!(run.report()["why"], "the zone is bad");
    run.control = says("unheard-of");
    assert_eq!(run.second(10), moved("normal", "control"));
}

#[test]
fn being_cut_off_changes_nothing_by_itself() {
    let triggers = || vec![trigger(1, Scope::Zone), trigger(2, Scope::Zone)];
    // The zone is bad, and this proxy has seen nothing of it.
    let mut run = Run::new(vec![policy(LEVELS, triggers())]);
    run.control = says("reduced");
    run.seconds(20, 0);
    run.control = None;
    assert_eq!(run.seconds(10, 0), []);
    let why = "kept from the control plane, which said: the zone is bad";
    assert_eq!(run.report()["why"], why);
    assert_eq!(run.seconds(2, 0), moved("normal", "trigger"));
    // The zone is well, and this proxy has seen nothing but errors: it is to see them for a while yet.
    let mut run = Run::new(vec![policy(LEVELS, triggers())]);
    run.control = Some(Vec::new());
    run.seconds(20, 10);
    run.control = None;
    assert_eq!(run.seconds(2, 10), []);
    assert_eq!(run.second(10), moved("core-only", "trigger"));
}

#[test]
fn a_control_plane_that_comes_back_has_its_say() {
    let mut run = Run::new(vec![policy(LEVELS, vec![trigger(2, Scope::Zone)])]);
    assert_eq!(run.seconds(3, 10), moved("core-only", "trigger"));
    run.control = Some(Vec::new());
    assert_eq!(run.second(10), moved("normal", "control"));
}

#[test]
fn another_policy_keeps_what_is_still_in_it() {
    let mut run = Run::new(vec![policy(LEVELS, vec![trigger(1, Scope::Zone)])]);
    run.seconds(3, 10);
    assert_eq!(run.level(), 1);
    // The same trigger beside another, and the level has another name.
    let triggers = vec![trigger(2, Scope::Zone), trigger(1, Scope::Zone)];
    run.adopt(vec![policy(&["normal", "less", "least"], triggers)]);
    assert_eq!(run.second(10), moved("less", "trigger"));
    assert_eq!(run.seconds(2, 10), moved("least", "trigger"));
    run.adopt(Vec::new());
    assert_eq!(run.seconds(1, 10), []);
    assert_eq!(run.decider.in_force(), Vec::<Vec<Arc<str>>>::new());
    assert!(run.decider.logs.is_empty());
    run.adopt(vec![policy(LEVELS, vec![trigger(1, Scope::Zone)])]);
    assert_eq!(run.second(10), []);
    assert_eq!(run.level(), 0, "a policy that comes again begins anew");
}

#[test]
fn the_next_process_goes_on_with_min_stay_from_where_this_one_was() {
    let quick = || DegradationTrigger {
        clear_after: secs(1),
        ..trigger(2, Scope::Zone)
    };
    let own = || vec![policy(LEVELS, vec![quick()])];
    let mut run = Run::new(own());
    assert_eq!(run.seconds(3, 10), moved("core-only", "trigger"));
    assert_eq!(run.seconds(4, 10), []);
    let mut next = run.next(own());
    assert_eq!(next.seconds(5, 0), [], "nothing changes by itself");
    assert_eq!(next.level(), 2);
    assert_eq!(next.report()["since_ms"], 9000);
    assert_eq!(next.report()["why"], "kept from the process before this one");
    let mut third = next.next(own());
    // Ten seconds are over with the first, and it has been clear here for a second with the next.
    assert_eq!(third.seconds(2, 0), moved("normal", "trigger"));
}

#[test]
fn what_a_control_plane_said_holds_in_the_next_process_until_it_speaks() {
    let own = || vec![policy(LEVELS, vec![trigger(2, Scope::Mesh)])];
    let mut run = Run::new(own());
    run.control = says("core-only");
    assert_eq!(run.second(0), moved("core-only", "control"));
    let mut next = run.next(own());
    assert_eq!(next.second(0), []);
    assert_eq!(next.level(), 2);
    next.control = says("reduced");
    assert_eq!(next.second(0), moved("reduced", "control"));
}

#[test]
fn what_is_held_or_unknown_is_not_inherited() {
    let own = || policy(LEVELS, vec![trigger(2, Scope::Zone)]);
    let mut run = Run::new(vec![own()]);
    let held = run.hold("core-only", secs(5));
    run.adopt(vec![own(), held]);
    assert_eq!(run.second(0), moved("core-only", "override"));
    assert_eq!(run.decider.hand_out(run.now), []);
    // A policy that has the level no more, and one that comes later.
    let mut run = Run::new(vec![own()]);
    run.seconds(3, 10);
    let mut next = run.next(vec![policy(&["normal", "lean"], vec![trigger(1, Scope::Zone)])]);
    assert_eq!((next.second(0), next.level()), (vec![], 0));
    let mut next = run.next(Vec::new());
    next.decider.forget_inherited();
    next.adopt(vec![own()]);
    assert_eq!((next.second(0), next.level()), (vec![], 0));
}

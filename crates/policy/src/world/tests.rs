use super::*;
use crate::model::{
    self, Act, Backend, DegradationOverride, DegradationPolicy, DegradationTrigger, Endpoint, FallbackPolicy,
    FilterRef, HostMatch, OnFault, PathMatch, Plugin, PluginAccess, PluginFrom, PluginKind, PluginLimits,
    PluginSource, Queue, Route, RouteMatch, RouteRule, RouterRef, Rung, Scope, Service, Signal, Zone,
};
use proptest::prelude::*;
use std::time::{Duration, SystemTime};

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn key(kind: Kind, text: &str) -> Key {
    Key {
        kind,
        name: name(text),
    }
}

fn resource(text: &str, revision: u64, spec: Spec) -> Arc<Resource> {
    Arc::new(Resource {
        name: name(text),
        revision,
        labels: BTreeMap::new(),
        spec,
    })
}

fn zone(text: &str, revision: u64) -> Arc<Resource> {
    resource(text, revision, Spec::Zone(Zone::new(vec![], vec![])))
}

fn service(text: &str, revision: u64, zone: &str) -> Arc<Resource> {
    let endpoint = Endpoint::new(([127, 0, 0, 1], 80).into(), name(zone));
    resource(text, revision, Spec::Service(Service::new(vec![endpoint])))
}

fn route(text: &str, revision: u64, to: &str) -> Arc<Resource> {
    let any = RouteMatch {
        path: PathMatch::Prefix("".into()),
        method: None,
        headers: vec![],
    };
    let rule = RouteRule::new(vec![any], vec![Backend::new(name(to), 1)]);
    resource(
        text,
        revision,
        Spec::Route(Route {
            hostnames: vec![HostMatch::Any],
            rules: vec![rule],
            parents: vec![],
        }),
    )
}

fn queue(text: &str, revision: u64) -> Arc<Resource> {
    resource(text, revision, Spec::Queue(Queue::DEFAULT))
}

fn ladder(text: &str, revision: u64, to: &str) -> Arc<Resource> {
    let queue = Rung::new(Act::Queue { queue: name(to) });
    let elsewhere = Rung::new(Act::Zone {
        zones: vec![name(to)],
    });
    let policy = FallbackPolicy {
        on: vec![],
        on_statuses: vec![503],
        rungs: vec![queue, elsewhere],
        hide_header: false,
        reserve_percent: 10,
    };
    resource(text, revision, Spec::FallbackPolicy(policy))
}

fn levels(text: &str, revision: u64, of: &str) -> Arc<Resource> {
    let trigger = DegradationTrigger {
        level: 1,
        signal: Signal::CircuitOpen { service: name(of) },
        hold_for: Duration::ZERO,
        clear_after: Duration::ZERO,
        min_stay: Duration::ZERO,
        max_stay: None,
        scope: Scope::Zone,
    };
    let policy = DegradationPolicy {
        levels: vec![],
        routes: vec![name(of)],
        triggers: vec![trigger],
    };
    resource(text, revision, Spec::DegradationPolicy(policy))
}

fn held(text: &str, revision: u64, of: &str) -> Arc<Resource> {
    let held = DegradationOverride {
        policy: name(of),
        level: name("reduced"),
        expire_time: SystemTime::UNIX_EPOCH,
        reason: "".into(),
        zones: vec![name(of)],
    };
    resource(text, revision, Spec::DegradationOverride(held))
}

fn plugin(text: &str, revision: u64, kind: PluginKind, calls: &[&str]) -> Arc<Resource> {
    let plugin = Plugin {
        kind,
        source: PluginSource {
            from: PluginFrom::Store,
            sha256: None,
            minisign_key: None,
        },
        config: "".into(),
        limits: PluginLimits::of(kind),
        access: PluginAccess {
            services: calls.iter().map(|service| name(service)).collect(),
            imports: vec![],
        },
        on_fault: OnFault::FailOpen,
        quarantine: model::Quarantine::default(),
        fresh_instance: false,
        when: None,
        canary: None,
    };
    resource(text, revision, Spec::Plugin(plugin))
}

/// A route whose rule has filters and a router.
fn filtered(text: &str, revision: u64, filters: &[&str], router: Option<&str>) -> Arc<Resource> {
    let mut made = (*route(text, revision, text)).clone();
    if let Spec::Route(route) = &mut made.spec {
        let filters = filters.iter().map(|plugin| FilterRef {
            plugin: name(plugin),
            config: "".into(),
            when: None,
        });
        route.rules[0].filters = filters.collect();
        route.rules[0].router = router.map(|plugin| RouterRef {
            plugin: name(plugin),
            config: "".into(),
        });
    }
    Arc::new(made)
}

fn upserts(upserts: Vec<Arc<Resource>>) -> Staged {
    Staged {
        upserts,
        ..Staged::default()
    }
}

#[test]
fn a_dangling_version_waits_and_the_last_good_one_stays() {
    let mut world = World::default();
    world.commit(upserts(vec![
        zone("a", 1),
        service("cart", 2, "a"),
        route("r", 3, "cart"),
    ]));
    world.commit(upserts(vec![route("r", 4, "pay")]));
    assert_eq!(world.get(&key(Kind::Route, "r")).unwrap().revision, 3);
    let refused = &world.quarantined()[&key(Kind::Route, "r")];
    assert_eq!((refused.revision, refused.running), (4, Some(3)));
    assert_eq!(
        refused.reason,
        "spec.rules[0].backendRefs[0].service: there is no Service/pay"
    );
    // What it names comes: it goes live without being sent again.
    world.commit(upserts(vec![service("pay", 5, "a")]));
    assert_eq!(world.get(&key(Kind::Route, "r")).unwrap().revision, 4);
    assert!(world.quarantined().is_empty());
}

#[test]
fn a_route_to_what_speaks_no_http_waits() {
    let speaks = |revision, protocol| {
        let mut made = (*service("db", revision, "a")).clone();
        if let Spec::Service(service) = &mut made.spec {
            service.protocol = protocol;
        }
        Arc::new(made)
    };
    let mut world = World::default();
    world.commit(upserts(vec![
        zone("a", 1),
        speaks(2, model::Protocol::Tcp),
        route("r", 3, "db"),
    ]));
    let refused = &world.quarantined()[&key(Kind::Route, "r")].reason;
    assert!(refused.contains("Service/db is of protocol TCP"), "{refused}");
    world.commit(upserts(vec![speaks(4, model::Protocol::Http1)]));
    assert!(world.quarantined().is_empty());
    // One that is live is named when its service changes under it.
    world.commit(upserts(vec![speaks(5, model::Protocol::Tcp)]));
    assert_eq!(world.quarantined()[&key(Kind::Route, "r")].running, Some(3));
}

#[test]
fn what_degradation_refers_to_is_waited_for() {
    let mut world = World::default();
    world.commit(upserts(vec![
        held("h", 1, "a"),
        levels("a", 2, "a"),
        ladder("f", 3, "a"),
    ]));
    assert_eq!(world.resources().count(), 0);
    let reason = |kind, text| world.quarantined()[&key(kind, text)].reason.clone();
    assert_eq!(
        reason(Kind::DegradationOverride, "h"),
        "spec.zones[0]: there is no Zone/a"
    );
    assert_eq!(
        reason(Kind::DegradationPolicy, "a"),
        "spec.routes[0]: there is no Route/a"
    );
    assert_eq!(
        reason(Kind::FallbackPolicy, "f"),
        "spec.rungs[0].queue.queue: there is no Queue/a"
    );
    // What is quarantined is nothing to refer to.
    world.commit(upserts(vec![zone("a", 4), queue("a", 5)]));
    let reason = |kind, text| world.quarantined()[&key(kind, text)].reason.clone();
    assert_eq!(
        reason(Kind::DegradationOverride, "h"),
        "spec.policy: there is no DegradationPolicy/a"
    );
    assert!(world.get(&key(Kind::FallbackPolicy, "f")).is_some());
    world.commit(upserts(vec![service("a", 6, "a"), route("a", 7, "a")]));
    assert!(world.quarantined().is_empty(), "{:?}", world.quarantined());
    assert_eq!(world.resources().count(), 7);
}

/// A policy for two services.
fn guarded(text: &str, revision: u64, to: &str) -> Arc<Resource> {
    let source = model::AuthorizationSource {
        zones: vec![name(to)],
        not_zones: vec![name("y")],
        ..model::AuthorizationSource::default()
    };
    let target = model::AuthorizationTarget {
        routes: vec![name(to)],
        not_routes: vec![name("y")],
        ..model::AuthorizationTarget::default()
    };
    let rule = model::AuthorizationRule {
        from: vec![source],
        to: vec![target],
        when: Vec::new(),
    };
    let policy = model::AuthorizationPolicy {
        services: vec![name(to), name("y")],
        rules: vec![rule].into(),
        ..model::AuthorizationPolicy::new(model::AuthorizationAction::Allow)
    };
    resource(text, revision, Spec::AuthorizationPolicy(policy))
}

#[test]
fn who_may_do_what_holds_for_what_is_there_and_is_listed() {
    let mut world = World::default();
    world.commit(upserts(vec![guarded("g", 1, "x")]));
    let key = Key {
        kind: Kind::AuthorizationPolicy,
        name: name("g"),
    };
    assert!(
        world.get(&key).is_some(),
        "it isn't waited for with anything that it protects"
    );
    assert_eq!(world.quarantined()[&key].running, Some(1));
}

/// Whether the services `x` and `y` are closed, and by which policy.
fn closed(world: &World) -> [Option<Arc<str>>; 2] {
    let viewer = Viewer {
        zone: name("a"),
        proxy: name("a1"),
    };
    let snapshot = world.snapshot(viewer, 1);
    let by = |service: &str| {
        let view = snapshot.services().iter().find(|view| *view.name == *service)?;
        view.authorization.as_ref()?.closed_by().cloned()
    };
    [by("x"), by("y")]
}

#[test]
fn what_guards_a_service_and_was_never_good_closes_it() {
    let mut world = World::default();
    world.commit(upserts(vec![
        zone("a", 1),
        service("x", 2, "a"),
        service("y", 3, "a"),
    ]));
    let refusal = |revision, guards| Staged {
        refused: vec![Refusal {
            key: key(Kind::AuthorizationPolicy, "g"),
            revision,
            reason: "spec.action: 9 is not known".into(),
            guards,
        }],
        ..Staged::default()
    };
    let by = || Some(Arc::from("g"));
    let only_x = || Some(Guards::Services(vec![name("x")]));
    assert_eq!(closed(&world), [None, None]);
    world.commit(refusal(4, only_x()));
    assert_eq!(closed(&world), [by(), None]);
    // Other changes don't open it, nor does a service that comes later escape.
    world.commit(upserts(vec![service("x", 5, "a")]));
    assert_eq!(closed(&world), [by(), None]);
    world.commit(refusal(6, Some(Guards::All)));
    assert_eq!(closed(&world), [by(), by()]);
    // What refuses nobody closes nothing.
    world.commit(refusal(7, None));
    assert_eq!(closed(&world), [None, None]);
    world.commit(refusal(8, only_x()));
    // A good version opens it, and from then on that is the last good one.
    world.commit(upserts(vec![guarded("g", 9, "x")]));
    assert_eq!(closed(&world), [None, None]);
    world.commit(refusal(10, Some(Guards::All)));
    assert_eq!(closed(&world), [None, None]);
    assert_eq!(
        world.quarantined()[&key(Kind::AuthorizationPolicy, "g")].running,
        Some(9)
    );
    // Gone and back, there is no good one again.
    world.commit(Staged {
        deletes: vec![key(Kind::AuthorizationPolicy, "g")],
        ..Staged::default()
    });
    assert_eq!(closed(&world), [None, None]);
    world.commit(refusal(11, only_x()));
    assert_eq!(closed(&world), [by(), None]);
    world.commit(Staged {
        deletes: vec![key(Kind::AuthorizationPolicy, "g")],
        ..Staged::default()
    });
    assert_eq!(closed(&world), [None, None]);
}

#[test]
fn every_field_that_refers_to_something_is_named() {
    let references = |of: &Resource| -> Vec<String> {
        let references = of.spec.references().into_iter();
        references.map(|(path, to)| format!("{path} {to}")).collect()
    };
    assert_eq!(
        references(&ladder("f", 1, "x")),
        [
            "spec.rungs[0].queue.queue Queue/x",
            "spec.rungs[1].zone.zones[0] Zone/x"
        ]
    );
    assert_eq!(
        references(&levels("d", 1, "x")),
        ["spec.routes[0] Route/x", "spec.triggers[0].circuitOpen Service/x"]
    );
    assert_eq!(
        references(&held("h", 1, "x")),
        ["spec.policy DegradationPolicy/x", "spec.zones[0] Zone/x"]
    );
    assert!(references(&queue("q", 1)).is_empty());
    assert_eq!(
        references(&guarded("g", 1, "x")),
        [
            "spec.services[0] Service/x",
            "spec.services[1] Service/y",
            "spec.rules[0].from[0].zones[0] Zone/x",
            "spec.rules[0].from[0].notZones[0] Zone/y",
            "spec.rules[0].to[0].routes[0] Route/x",
            "spec.rules[0].to[0].notRoutes[0] Route/y"
        ]
    );
    assert_eq!(
        references(&plugin("p", 1, PluginKind::Filter, &["x", "y"])),
        [
            "spec.access.services[0] Service/x",
            "spec.access.services[1] Service/y"
        ]
    );
    assert_eq!(
        references(&filtered("r", 1, &["p", "q"], Some("s"))),
        [
            "spec.rules[0].backendRefs[0].service Service/r",
            "spec.rules[0].filters[0].plugin Plugin/p",
            "spec.rules[0].filters[1].plugin Plugin/q",
            "spec.rules[0].router.plugin Plugin/s"
        ]
    );
}

#[test]
fn a_plugin_of_another_kind_is_waited_for_as_one_that_is_not_there() {
    let mut world = World::default();
    let service = |revision| service("r", revision, "a");
    world.commit(upserts(vec![
        zone("a", 1),
        service(2),
        filtered("r", 3, &[], None),
        plugin("p", 4, PluginKind::Fallback, &["r"]),
    ]));
    assert!(world.quarantined().is_empty(), "{:?}", world.quarantined());
    world.commit(upserts(vec![filtered("r", 5, &["p"], None)]));
    let refused = &world.quarantined()[&key(Kind::Route, "r")];
    assert_eq!((refused.revision, refused.running), (5, Some(3)));
    assert_eq!(
        refused.reason,
        "spec.rules[0].filters[0].plugin: Plugin/p is of kind Fallback; want one of kind Filter or ProxyWasm"
    );
    world.commit(upserts(vec![plugin("p", 6, PluginKind::Filter, &[])]));
    assert_eq!(world.get(&key(Kind::Route, "r")).unwrap().revision, 5);
    assert!(world.quarantined().is_empty(), "{:?}", world.quarantined());
    // A kind that changes under who names it is named there, and what was good goes on.
    world.commit(upserts(vec![plugin("p", 7, PluginKind::Router, &[])]));
    let refused = &world.quarantined()[&key(Kind::Route, "r")];
    assert_eq!((refused.revision, refused.running), (5, Some(5)));
    world.commit(upserts(vec![filtered("r", 8, &[], Some("p"))]));
    assert!(world.quarantined().is_empty(), "{:?}", world.quarantined());
}

#[test]
fn an_empty_change_deletes_nothing() {
    let mut world = World::default();
    world.commit(upserts(vec![zone("a", 1)]));
    world.commit(Staged::default());
    assert!(world.get(&key(Kind::Zone, "a")).is_some());
    world.commit(Staged {
        deletes: vec![key(Kind::Zone, "a")],
        ..Staged::default()
    });
    assert!(world.get(&key(Kind::Zone, "a")).is_none());
}

#[test]
fn what_is_refused_when_it_is_live_stays_and_is_listed() {
    let mut world = World::default();
    world.commit(upserts(vec![service("r", 1, "a"), zone("a", 2)]));
    let p = key(Kind::Plugin, "p");
    world.commit(upserts(vec![plugin("p", 3, PluginKind::Filter, &[])]));
    world.commit(upserts(vec![filtered("r", 4, &["p"], None)]));
    let refusal = || Staged {
        refused: vec![Refusal {
            key: p.clone(),
            revision: 3,
            reason: "x".into(),
            guards: None,
        }],
        ..Staged::default()
    };
    world.commit(refusal());
    assert_eq!(world.get(&p).unwrap().revision, 3);
    // Other changes don't make it a good one.
    world.commit(upserts(vec![zone("b", 5)]));
    let q = &world.quarantined()[&p];
    assert_eq!((q.revision, q.running), (3, None));
    assert_eq!(world.quarantined().len(), 1, "what names it stays as well");
    world.commit(upserts(vec![plugin("p", 3, PluginKind::Filter, &[])]));
    assert!(world.quarantined().is_empty(), "ready after all");
    world.commit(refusal());
    let delete = Staged {
        deletes: vec![key(Kind::Route, "r"), p.clone()],
        ..Staged::default()
    };
    world.commit(delete);
    assert!(world.quarantined().is_empty() && world.unready.is_empty());
}

#[test]
fn a_refused_first_version_has_nothing_running() {
    let mut world = World::default();
    let refused = vec![Refusal {
        key: key(Kind::Plugin, "p"),
        revision: 9,
        reason: "no file".into(),
        guards: None,
    }];
    world.commit(Staged {
        refused,
        ..Staged::default()
    });
    assert_eq!(world.quarantined()[&key(Kind::Plugin, "p")].running, None);
}

proptest! {
    /// Whatever comes in whatever order, what is good resolves, unless a delete overtook it, and then
    /// it is named.
    #[test]
    fn good_resources_resolve_or_are_named(
        steps in prop::collection::vec((0usize..9, 0usize..3, 0usize..3, any::<bool>()), 1..60),
    ) {
        let names = ["a", "b", "c"];
        let mut world = World::default();
        let mut last = Snapshot::empty(Viewer { zone: name("a"), proxy: name("a1") });
        for (revision, (what, which, to, delete)) in (1u64..).zip(steps) {
            let made = match what {
                0 => zone(names[which], revision),
                1 => service(names[which], revision, names[to]),
                2 => route(names[which], revision, names[to]),
                3 => queue(names[which], revision),
                4 => ladder(names[which], revision, names[to]),
                5 => levels(names[which], revision, names[to]),
                6 => {
                    let kind = [PluginKind::Filter, PluginKind::Router, PluginKind::WasiHttp][to];
                    plugin(names[which], revision, kind, &[])
                }
                7 => filtered(names[which], revision, &[names[to]], None),
                _ => held(names[which], revision, names[to]),
            };
            world.commit(if delete {
                Staged { deletes: vec![made.key()], ..Staged::default() }
            } else {
                upserts(vec![made])
            });
            // What is left out of a look, since nothing can have come of it, would have brought nothing new.
            let mut looked = world.clone();
            looked.name_orphaned_references();
            prop_assert_eq!(world.quarantined(), looked.quarantined());
            // What a snapshot takes from the one before it is what it would have made.
            let viewer = Viewer { zone: name("a"), proxy: name("a1") };
            let (next, anew) = (
                world.snapshot_after(Some(&last), viewer.clone(), revision),
                world.snapshot(viewer, revision),
            );
            let shown = |snapshot: &Snapshot| format!("{:?} {:?}", snapshot.services(), snapshot.rules());
            prop_assert_eq!(shown(&next), shown(&anew));
            last = next;
            for resource in world.resources() {
                let whole = misreference(resource, |to| world.get(to)).is_none();
                prop_assert!(whole || world.quarantined().contains_key(&resource.key()));
            }
        }
    }
}

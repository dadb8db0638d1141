mod between;

use super::*;
use crate::model::{
    DegradationLevel, DegradationPolicy, Endpoint, FallbackPolicy, FeatureFlags, FilterRef, HostMatch,
    OnFault, PathMatch, Plugin, PluginAccess, PluginFrom, PluginKind, PluginLimits, PluginSource, Quarantine,
    Queue, Route, RouteMatch, RouterRef, Rung, Service, ZoneProxy, ZoneTransport,
};
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
        Spec::Zone(Zone::new(proxies, failover.iter().map(|z| name(z)).collect())),
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
fn each_zone_says_how_it_is_reached_from_outside_and_within() {
    let mut far = zone("b", &[]);
    let Spec::Zone(spec) = &mut far.spec else {
        panic!("a zone")
    };
    (spec.transport, spec.transport_within) = (ZoneTransport::Quic, ZoneTransport::Auto);
    let world = [
        zone("a", &[]),
        far,
        service(&[(1, "a", Some("a1")), (2, "b", Some("b1"))]),
    ];
    let transports = |from: &str| -> Vec<ZoneTransport> {
        let snapshot = compile(from, &world);
        snapshot.services()[0]
            .endpoints
            .iter()
            .map(|e| e.transport)
            .collect()
    };
    assert_eq!(transports("a"), [ZoneTransport::Tcp, ZoneTransport::Quic]);
    assert_eq!(transports("b"), [ZoneTransport::Auto, ZoneTransport::Auto]);
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

/// A snapshot of a route to some backends.
fn routed(backends: &[Backend]) -> Snapshot {
    let mut world: Vec<Resource> = backends
        .iter()
        .map(|backend| Resource {
            name: backend.service.clone(),
            ..service(&[])
        })
        .collect();
    let any = RouteMatch {
        path: PathMatch::Prefix("".into()),
        method: None,
        headers: vec![],
    };
    let rules = vec![RouteRule::new(vec![any], backends.to_vec())];
    let hostnames = vec![HostMatch::Any];
    world.push(resource(
        "r",
        Spec::Route(Route {
            hostnames,
            rules,
            parents: vec![],
        }),
    ));
    compile("a", &world)
}

fn on_flag(service: &str, weight: u32, flag: &str) -> Backend {
    Backend {
        when: Some(FlagCondition::is_true(flag)),
        ..Backend::new(name(service), weight)
    }
}

/// The service that a draw comes to while only some flags hold, and what it was drawn from.
fn drawn(snapshot: &Snapshot, flags: &[&str], draw: u64) -> (Option<String>, u64) {
    let mut of = 0;
    let target = snapshot.rules()[0].backend_when(
        &mut |when: &FlagCondition| flags.contains(&&*when.flag),
        &mut |total| {
            of = total;
            draw
        },
    );
    let service = target.map(|target| snapshot.service(target.service).unwrap().name.to_string());
    (service, of)
}

#[test]
fn a_backend_has_its_share_only_while_its_condition_holds() {
    let snapshot = routed(&[
        on_flag("canary", 3, "canary"),
        Backend::new(name("cart"), 2),
        on_flag("next", 4, "next"),
    ]);
    assert!(snapshot.rules()[0].has_conditional_backends());
    let to = |service: &str, of| (Some(service.to_owned()), of);
    assert_eq!(drawn(&snapshot, &[], 0), to("cart", 2));
    assert_eq!(drawn(&snapshot, &[], 1), to("cart", 2));
    assert_eq!(drawn(&snapshot, &["canary"], 2), to("canary", 5));
    assert_eq!(drawn(&snapshot, &["canary"], 3), to("cart", 5));
    assert_eq!(drawn(&snapshot, &["next"], 2), to("next", 6));
    assert_eq!(drawn(&snapshot, &["canary", "next"], 8), to("next", 9));
}

#[test]
fn where_no_condition_holds_there_may_be_no_backend() {
    let snapshot = routed(&[on_flag("a", 1, "a"), on_flag("b", 1, "b")]);
    assert_eq!(drawn(&snapshot, &[], 0), (None, 1));
    assert_eq!(drawn(&snapshot, &["b"], 0), (Some("b".to_owned()), 1));
    // One with weight 0 never has a share, and its condition makes nothing conditional.
    let snapshot = routed(&[on_flag("a", 0, "a"), Backend::new(name("b"), 1)]);
    assert!(!snapshot.rules()[0].has_conditional_backends());
}

#[test]
fn rungs_keep_their_positions_when_one_of_them_is_gone() {
    let rungs = vec![
        Rung::new(Act::Service {
            service: name("gone"),
        }),
        Rung::new(Act::Queue {
            queue: name("orders"),
        }),
        Rung::new(Act::Plugin {
            plugin: name("gone"),
            config: "".into(),
        }),
        Rung::new(Act::Queue { queue: name("gone") }),
        Rung {
            methods: vec!["GET".into()],
            deadline_percent: 40,
            ..Rung::new(Act::Stale { max_stale: None })
        },
    ];
    let policy = FallbackPolicy {
        on: vec![],
        on_statuses: vec![503],
        rungs,
        hide_header: false,
        reserve_percent: 30,
    };
    let any = RouteMatch {
        path: PathMatch::Prefix("".into()),
        method: None,
        headers: vec![],
    };
    let rule = RouteRule {
        fallback: Some(name("f")),
        ..RouteRule::new(vec![any], vec![Backend::new(name("cart"), 1)])
    };
    let route = Route {
        hostnames: vec![HostMatch::Any],
        rules: vec![rule],
        parents: vec![],
    };
    let world = [
        resource("f", Spec::FallbackPolicy(policy)),
        resource("orders", Spec::Queue(Queue::DEFAULT)),
        service(&[]),
        resource("r", Spec::Route(route)),
    ];
    let snapshot = compile("a", &world);
    let fallback = snapshot.fallback(snapshot.rules()[0].fallback.unwrap()).unwrap();
    assert_eq!(fallback.reserve_percent, 30);
    let positions: Vec<_> = fallback.rungs.iter().map(|rung| rung.position).collect();
    assert_eq!(positions, [1, 4]);
    let ActView::Queue(queue) = fallback.rungs[0].act else {
        panic!("{:?}", fallback.rungs[0].act)
    };
    assert_eq!(&*snapshot.queue(queue).unwrap().name, "orders");
    let last = &fallback.rungs[1];
    assert_eq!(last.deadline_percent, 40);
    assert!(last.is_for("GET") && !last.is_for("POST"));
    assert!(fallback.rungs[0].is_for("POST"));
}

fn plugin(text: &str, kind: PluginKind) -> Resource {
    let plugin = Plugin {
        kind,
        source: PluginSource {
            from: PluginFrom::Store,
            sha256: None,
            minisign_key: None,
        },
        config: "own".into(),
        limits: PluginLimits::of(kind),
        access: PluginAccess::default(),
        on_fault: OnFault::FailOpen,
        quarantine: Quarantine::default(),
        fresh_instance: false,
        when: None,
        canary: None,
    };
    resource(text, Spec::Plugin(plugin))
}

fn filter(text: &str, config: &str) -> FilterRef {
    FilterRef {
        plugin: name(text),
        config: config.into(),
        when: None,
    }
}

/// A snapshot of every kind of plugin, and of a route whose rule names some and whose ladder asks some.
fn with_plugins(filters: &[(&str, &str)], router: Option<(&str, &str)>, rungs: &[(&str, &str)]) -> Snapshot {
    let any = RouteMatch {
        path: PathMatch::Prefix("".into()),
        method: None,
        headers: vec![],
    };
    let rule = RouteRule {
        filters: filters.iter().map(|(of, config)| filter(of, config)).collect(),
        router: router.map(|(of, config)| RouterRef {
            plugin: name(of),
            config: config.into(),
        }),
        ..RouteRule::new(vec![any], vec![Backend::new(name("cart"), 1)])
    };
    let rungs = rungs.iter().map(|(of, config)| {
        Rung::new(Act::Plugin {
            plugin: name(of),
            config: (*config).into(),
        })
    });
    let policy = FallbackPolicy {
        on: vec![],
        on_statuses: vec![503],
        rungs: rungs.collect(),
        hide_header: false,
        reserve_percent: 10,
    };
    let route = Route {
        hostnames: vec![HostMatch::Any],
        rules: vec![rule],
        parents: vec![],
    };
    let mut world: Vec<_> = PluginKind::ALL
        .iter()
        .map(|kind| plugin(&kind.as_str().to_lowercase(), *kind))
        .collect();
    world.extend([
        service(&[]),
        resource("f", Spec::FallbackPolicy(policy)),
        resource("r", Spec::Route(route)),
    ]);
    compile("a", &world)
}

#[test]
fn a_rules_plugins_are_those_of_a_kind_for_it_with_what_is_handed_to_them() {
    let named = |snapshot: &Snapshot, idx: Option<PluginIdx>| match idx {
        Some(idx) => snapshot.plugin(idx).unwrap().name.to_string(),
        None => "-".to_owned(),
    };
    let of = |text: &str, config: &str| (text.to_owned(), config.to_owned());
    let all = [
        ("proxywasm", ""),
        ("filter", "a"),
        ("router", ""),
        ("fallback", ""),
        ("gone", ""),
        ("filter", ""),
    ];
    let snapshot = with_plugins(&all, Some(("router", "b")), &all);
    let rule = &snapshot.rules()[0];
    let filters = rule.filters.iter();
    let filters: Vec<_> = filters
        .map(|f| of(&named(&snapshot, f.plugin), &f.config))
        .collect();
    assert_eq!(
        filters,
        [
            of("proxywasm", "own"),
            of("filter", "a"),
            of("-", ""),
            of("-", ""),
            of("-", ""),
            of("filter", "own")
        ],
        "what isn't there is not passed over"
    );
    assert_eq!(&*rule.filters[4].name, "gone");
    let router = rule.router.as_ref().unwrap();
    assert_eq!(
        of(&named(&snapshot, router.plugin), &router.config),
        of("router", "b")
    );
    assert!(rule.has_plugins && !rule.extras);

    let rungs = [("fallback", ""), ("filter", ""), ("wasihttp", "c"), ("gone", "")];
    let snapshot = with_plugins(&[], Some(("filter", "")), &rungs);
    let router = snapshot.rules()[0].router.as_ref().unwrap();
    assert_eq!((&*router.name, router.plugin), ("filter", None));
    assert!(snapshot.rules()[0].has_plugins);
    let ladder = snapshot.fallback(FallbackIdx::new(0)).unwrap();
    let rungs: Vec<_> = ladder
        .rungs
        .iter()
        .map(|rung| {
            let ActView::Plugin { plugin, config } = &rung.act else {
                panic!("{:?}", rung.act)
            };
            (rung.position, of(&named(&snapshot, Some(*plugin)), config))
        })
        .collect();
    assert_eq!(rungs, [(0, of("fallback", "own")), (2, of("wasihttp", "c"))]);

    let snapshot = with_plugins(&[], Some(("router", "")), &[]);
    let rule = &snapshot.rules()[0];
    assert!(rule.has_plugins && rule.filters.is_empty());
    assert_eq!(&*rule.router.as_ref().unwrap().config, "own");
}

#[test]
fn a_router_chooses_among_all_backends_in_the_order_of_policy() {
    let snapshot = routed(&[
        Backend::new(name("z"), 7),
        Backend::new(name("off"), 0),
        on_flag("a", 2, "a"),
        Backend::new(name("m"), 1),
    ]);
    let choices = snapshot.rules()[0].choices();
    let choices: Vec<_> = choices
        .map(|(weight, target, when)| {
            let service = snapshot.service(target.service).unwrap();
            (
                weight,
                service.name.to_string(),
                when.map(|when| when.flag.to_string()),
            )
        })
        .collect();
    let of = |weight: u64, text: &str, when: Option<&str>| (weight, text.to_owned(), when.map(str::to_owned));
    assert_eq!(
        choices,
        [
            of(7, "z", None),
            of(0, "off", None),
            of(2, "a", Some("a")),
            of(1, "m", None)
        ]
    );
    // Without a condition they are the same.
    let snapshot = routed(&[Backend::new(name("z"), 7), Backend::new(name("a"), 2)]);
    let weights: Vec<_> = snapshot.rules()[0].choices().map(|(weight, ..)| weight).collect();
    assert_eq!(weights, [7, 2]);
}

#[test]
fn queues_are_found_by_their_index_and_as_policy_has_them() {
    let small = Queue {
        max_entries: 3,
        ..Queue::DEFAULT
    };
    let world = [
        resource("orders", Spec::Queue(small.clone())),
        resource("mails", Spec::Queue(Queue::DEFAULT)),
    ];
    let snapshot = compile("a", &world);
    let queues: Vec<_> = snapshot.queues().iter().map(|queue| &*queue.name).collect();
    assert_eq!(queues, ["mails", "orders"]);
    assert_eq!(*snapshot.queue(QueueIdx::new(1)).unwrap().spec, small);
    assert!(snapshot.queue(QueueIdx::new(2)).is_none());
}

fn level_held(text: &str, level: &str, until: u64, zones: &[&str]) -> Resource {
    let held = DegradationOverride {
        policy: name("shop"),
        level: name(level),
        expire_time: SystemTime::UNIX_EPOCH + Duration::from_secs(until),
        reason: text.into(),
        zones: zones.iter().map(|zone| name(zone)).collect(),
    };
    resource(text, Spec::DegradationOverride(held))
}

#[test]
fn levels_are_held_in_their_zones_until_they_end() {
    let level = |text: &str| DegradationLevel {
        name: name(text),
        flags: BTreeMap::new(),
        shed_below: None,
    };
    let policy = DegradationPolicy {
        levels: ["normal", "reduced", "core-only"].map(level).to_vec(),
        routes: vec![],
        triggers: vec![],
    };
    let mut other = policy.clone();
    other.levels.pop();
    let world = [
        resource("shop", Spec::DegradationPolicy(policy)),
        resource("other", Spec::DegradationPolicy(other)),
        level_held("all", "reduced", 100, &[]),
        level_held("b-only", "core-only", 50, &["b", "c"]),
        level_held("long-gone", "no-such-level", 500, &[]),
    ];
    let held = |zone: &str, at: u64| {
        let snapshot = compile(zone, &world);
        let names: Vec<_> = snapshot.degradations().iter().map(|d| &*d.name).collect();
        assert_eq!(names, ["other", "shop"]);
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(at);
        assert_eq!(snapshot.degradations()[0].held_at(wall), None);
        let held = snapshot.degradations()[1].held_at(wall);
        held.map(|held| (held.level, held.reason.to_string()))
    };
    assert_eq!(held("a", 0), Some((1, "all".to_owned())));
    assert_eq!(held("b", 0), Some((2, "b-only".to_owned())));
    assert_eq!(held("b", 49), Some((2, "b-only".to_owned())));
    assert_eq!(held("b", 50), Some((1, "all".to_owned())));
    assert_eq!(held("b", 100), None);
}

#[test]
fn flags_of_several_sets_are_one_and_the_first_by_name_holds() {
    let set = |text: &str, flags: &[(&str, &str)]| {
        let flags: Vec<_> = flags
            .iter()
            .map(|(key, default)| {
                format!(
                    r#""{key}": {{"state": "ENABLED", "variants": {{"on": true, "off": false}}, "defaultVariant": "{default}"}}"#
                )
            })
            .collect();
        let document = format!(r#"{{"flags": {{{}}}}}"#, flags.join(", "));
        let set = FlagSet::parse(&document).unwrap();
        resource(text, Spec::FeatureFlags(FeatureFlags { set: Arc::new(set) }))
    };
    struct Nobody;
    impl leeward_flags::Attributes for Nobody {
        fn attribute(&self, _: &str) -> Option<std::borrow::Cow<'_, str>> {
            None
        }
    }
    let world = [
        set("b", &[("both", "off"), ("reco", "on")]),
        set("a", &[("both", "on"), ("cart", "off")]),
    ];
    let snapshot = compile("a", &world);
    let keys: Vec<_> = snapshot.flags().keys().collect();
    assert_eq!(keys, ["both", "cart", "reco"]);
    let variant = |key: &str| {
        let flag = snapshot.flags().get(key).unwrap();
        let evaluation = flag.evaluate(&Nobody, SystemTime::UNIX_EPOCH);
        evaluation.variant.map(str::to_owned)
    };
    assert_eq!(variant("both").as_deref(), Some("on"));
    assert_eq!(variant("cart").as_deref(), Some("off"));
    assert_eq!(variant("reco").as_deref(), Some("on"));
    assert!(compile("a", &[]).flags().get("both").is_none());
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
        world.push(resource("r", Spec::Route(Route { hostnames: vec![HostMatch::Any], rules: vec![rule], parents: vec![] })));
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

#[test]
fn requests_stay_within_zones_of_one_label() {
    let labelled = |text: &str, region: Option<&str>| {
        let mut zone = zone(text, &[]);
        if let Spec::Zone(zone) = &mut zone.spec {
            zone.labels
                .extend(region.map(|region| ("region".into(), region.into())));
        }
        zone
    };
    let mut bound = service(&[
        (1, "a", Some("a1")),
        (2, "b", Some("b1")),
        (3, "c", Some("c1")),
        (4, "d", Some("d1")),
        (5, "e", Some("e1")),
    ]);
    if let Spec::Service(service) = &mut bound.spec {
        service.balance.within = Some("region".into());
    }
    let world = [
        labelled("a", Some("eu")),
        labelled("b", Some("us")),
        labelled("c", Some("eu")),
        labelled("d", None),
        labelled("e", None),
        bound,
    ];
    let zones = |viewer: &str| -> Vec<String> {
        let snapshot = compile(viewer, &world);
        let service = &snapshot.services()[0];
        let mut reachable: Vec<_> = service.endpoints.iter().map(|e| e.zone.to_string()).collect();
        let mut turned_to: Vec<_> = service.tiers.iter().map(|t| t.zone.to_string()).collect();
        reachable.sort_unstable();
        turned_to.sort_unstable();
        assert_eq!(reachable, turned_to);
        turned_to
    };
    assert_eq!(zones("a"), ["a", "c"]);
    assert_eq!(zones("b"), ["b"]);
    assert_eq!(zones("c"), ["a", "c"]);
    assert_eq!(zones("d"), ["d"], "no label is no value in common");
    assert_eq!(zones("x"), [""; 0], "a zone that isn't known has none");
}

//! What is explained is what happens, and what is found never to happen doesn't.

use super::*;
use crate::Staged;
use crate::lint::lint;
use crate::model::{
    Backend, HeaderMatch, HostMatch, PathMatch, Route, RouteMatch, RouteRule, Service, ValueMatch,
};
use crate::{Resource, Spec};
use proptest::prelude::*;
use std::cmp::Reverse;
use std::sync::Arc;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn resource(text: &str, spec: Spec) -> Arc<Resource> {
    Arc::new(Resource {
        name: name(text),
        revision: 1,
        labels: BTreeMap::new(),
        spec,
    })
}

/// A route with one hostname, and rules with one match each.
type OneRoute = (HostMatch, Vec<RouteMatch>);

fn world(routes: &[OneRoute]) -> World {
    let mut upserts = vec![
        resource("z", Spec::Zone(Zone::new(vec![], vec![]))),
        resource("s", Spec::Service(Service::new(vec![]))),
    ];
    for (i, (host, matches)) in routes.iter().enumerate() {
        let rules = matches
            .iter()
            .map(|on| RouteRule::new(vec![on.clone()], vec![Backend::new(name("s"), 1)]));
        let route = Route {
            hostnames: vec![host.clone()],
            rules: rules.collect(),
            parents: vec![],
        };
        upserts.push(resource(&format!("r{i}"), Spec::Route(route)));
    }
    let mut world = World::default();
    world.commit(Staged {
        upserts,
        ..Staged::default()
    });
    world
}

/// The rule by the documented order, without an index.
fn naive(routes: &[OneRoute], question: &Question) -> Option<(Name, usize)> {
    let host = |host: &HostMatch| host.fit(&question.host);
    let path = |on: &PathMatch| match on {
        PathMatch::Exact(exact) => (**exact == *question.path).then_some(usize::MAX),
        PathMatch::Prefix(prefix) => question
            .path
            .strip_prefix(&**prefix)
            .filter(|rest| rest.is_empty() || rest.starts_with('/'))
            .map(|_| prefix.len()),
    };
    let header = |on: &HeaderMatch| {
        let mut values = question.headers.iter().filter(|(known, _)| **known == *on.name);
        match &on.value {
            ValueMatch::Exact(want) => values.any(|(_, value)| **value == **want),
            ValueMatch::Prefix(want) => values.any(|(_, value)| value.starts_with(&**want)),
            ValueMatch::Present => values.next().is_some(),
            ValueMatch::Absent => values.next().is_none(),
        }
    };
    let mut all = Vec::new();
    for (i, (of, matches)) in routes.iter().enumerate() {
        for (position, on) in matches.iter().enumerate() {
            let (Some(host), Some(path)) = (host(of), path(&on.path)) else {
                continue;
            };
            let method = on
                .method
                .as_deref()
                .is_none_or(|method| method == question.method);
            if method && on.headers.iter().all(header) {
                let rank = (
                    host,
                    path,
                    on.method.is_some(),
                    on.headers.len(),
                    Reverse((i, position)),
                );
                all.push((rank, (name(&format!("r{i}")), position)));
            }
        }
    }
    all.into_iter()
        .max_by_key(|(rank, _)| *rank)
        .map(|(_, found)| found)
}

fn one_route() -> impl Strategy<Value = OneRoute> {
    let host = prop_oneof![
        Just(HostMatch::Any),
        "[ab]".prop_map(|host| HostMatch::Exact(host.into())),
        "\\.[ab]".prop_map(|host| HostMatch::Suffix(host.into())),
    ];
    let path = prop_oneof![
        "(/[xy]){1,2}".prop_map(|path| PathMatch::Exact(path.into())),
        "(/[xy]){0,2}".prop_map(|path| PathMatch::Prefix(path.into())),
    ];
    let method = prop::option::of(prop_oneof![Just("GET"), Just("PUT")]);
    let value = prop_oneof![
        Just(ValueMatch::Present),
        Just(ValueMatch::Absent),
        "[12]{1,2}".prop_map(|value| ValueMatch::Exact(value.into())),
        "[12]".prop_map(|value| ValueMatch::Prefix(value.into())),
    ];
    let header = ("[hk]", value).prop_map(|(name, value)| HeaderMatch {
        name: name.into(),
        value,
    });
    let on =
        (path, method, prop::collection::vec(header, 0..3)).prop_map(|(path, method, headers)| RouteMatch {
            path,
            method: method.map(Into::into),
            headers,
        });
    (host, prop::collection::vec(on, 1..4))
}

fn question() -> impl Strategy<Value = Question> {
    let headers = prop::collection::vec(("[hk]", "[12]{1,2}"), 0..3);
    let method = prop_oneof![Just("GET"), Just("PUT")];
    ("([ab]\\.)?[ab]", "(/[xy]){1,3}", method, headers).prop_map(|(host, path, method, headers)| Question {
        method: method.to_owned(),
        path,
        host,
        headers,
        ..Question::default()
    })
}

fn asked(world: &World, question: &Question) -> Explanation {
    let viewer = viewer(world, "", "", None).unwrap();
    explain(world, &viewer, 1, question, SystemTime::UNIX_EPOCH).unwrap()
}

proptest! {
    /// What is explained to be taken is taken, and every other rule of the host has a reason.
    #[test]
    fn the_rule_is_the_one_that_the_documented_order_gives(
        routes in prop::collection::vec(one_route(), 0..6),
        question in question(),
    ) {
        let world = world(&routes);
        let told = asked(&world, &question);
        prop_assert_eq!(&told.rule, &naive(&routes, &question), "{}", told.summary);
        let step = told.steps.iter().find(|step| step.stage == "route").unwrap();
        let of_host = routes.iter().filter(|(host, _)| host.fit(&question.host).is_some());
        let rules: usize = of_host.map(|(_, matches)| matches.len()).sum();
        let others = rules - usize::from(told.rule.is_some());
        prop_assert!(step.steps.len() == others.min(21), "{} of {others}", step.steps.len());
        for other in &step.steps {
            prop_assert!(!other.says.is_empty() && !other.says.contains("rules[]"));
        }
    }

    /// No request ever takes a rule of which the linter says so.
    #[test]
    fn what_is_said_never_to_be_reached_never_is(
        routes in prop::collection::vec(one_route(), 0..6),
        questions in prop::collection::vec(question(), 1..40),
    ) {
        let world = world(&routes);
        let report = lint(world.resources().map(|resource| &**resource), SystemTime::UNIX_EPOCH);
        let codes = ["LW201", "LW202", "LW203"];
        let hidden: BTreeSet<(Name, usize)> = report
            .findings
            .iter()
            .filter(|found| codes.contains(&found.rule.code))
            .filter_map(|found| {
                let rule = found.path.strip_prefix("spec.rules[")?.split(']').next()?.parse().ok()?;
                Some((found.resource.name.clone(), rule))
            })
            .collect();
        for question in &questions {
            if let Some(taken) = asked(&world, question).rule {
                prop_assert!(!hidden.contains(&taken), "{taken:?} is taken by {question:?}; {:?}", report.findings);
            }
        }
    }

    /// Two matches of which one implies the other on the same path: the linter sees it.
    #[test]
    fn the_same_match_twice_is_always_found(route in one_route(), again in 0usize..3) {
        let (host, mut matches) = route;
        let at = again.min(matches.len() - 1);
        matches.push(matches[at].clone());
        let world = world(&[(host, matches.clone())]);
        let report = lint(world.resources().map(|resource| &**resource), SystemTime::UNIX_EPOCH);
        let path = format!("spec.rules[{}].matches[0]", matches.len() - 1);
        prop_assert!(report.findings.iter().any(|found| found.rule.code == "LW202" && found.path == path));
    }
}

#[test]
fn a_question_that_is_none_is_refused_by_field() {
    let world = world(&[]);
    let proxy = viewer(&world, "", "", None).unwrap();
    let field = |question: &Question| {
        let told = explain(&world, &proxy, 1, question, SystemTime::UNIX_EPOCH);
        told.err().map(|bad| bad.field)
    };
    let good = Question {
        host: "a:80".to_owned(),
        ..Question::default()
    };
    assert_eq!(field(&good), None);
    assert_eq!(field(&Question::default()), Some("host"));
    let with = |change: fn(&mut Question)| {
        let mut question = good.clone();
        change(&mut question);
        field(&question)
    };
    assert_eq!(with(|q| q.path = "x".to_owned()), Some("path"));
    assert_eq!(with(|q| q.method = "G T".to_owned()), Some("method"));
    assert_eq!(
        with(|q| drop(q.flags.insert("f".to_owned(), "on".to_owned()))),
        Some("flags")
    );
    assert_eq!(
        with(|q| drop(q.levels.insert("d".to_owned(), "on".to_owned()))),
        Some("levels")
    );
    assert_eq!(
        with(|q| q.gateway = Name::parse("g").ok().map(|name| (name, None))),
        Some("gateway")
    );
    assert_eq!(viewer(&world, "y", "", None).unwrap_err().field, "zone");
    // A path that no server should be shown is an answer, not an error.
    let told = asked(
        &world,
        &Question {
            path: "/..".to_owned(),
            ..good.clone()
        },
    );
    assert!(told.summary.contains("400"), "{}", told.summary);
    let told = asked(&world, &good);
    assert!(told.summary.contains("404"), "{}", told.summary);
}

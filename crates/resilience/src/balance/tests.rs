use super::*;
use crate::draw::{Seeded, mix};
use leeward_policy::model::{Ewma, HashKey};
use proptest::prelude::*;
use std::collections::HashMap;

/// Loads by position in the service.
struct Loads(Vec<(u32, f64)>);

impl Load for Loads {
    fn active(&self, endpoint: usize) -> u32 {
        self.0[endpoint].0
    }
    fn latency(&self, endpoint: usize) -> f64 {
        self.0[endpoint].1
    }
}

impl Loads {
    fn idle(n: usize) -> Self {
        Self(vec![(0, 0.001); n])
    }
}

const EWMA: BalancePolicy = BalancePolicy::PeakEwma(Ewma::DEFAULT);

fn ring_of(balance_factor: u32) -> BalancePolicy {
    BalancePolicy::RingHash {
        key: HashKey::Source,
        minimum_size: 1024,
        balance_factor,
    }
}

fn table_of(balance_factor: u32) -> BalancePolicy {
    BalancePolicy::Maglev {
        key: HashKey::Source,
        table_size: 1009,
        balance_factor,
    }
}

fn any_policy() -> impl Strategy<Value = BalancePolicy> {
    prop_oneof![
        Just(EWMA),
        Just(BalancePolicy::LeastRequest),
        Just(BalancePolicy::RoundRobin),
        Just(BalancePolicy::Random),
        prop_oneof![Just(0), Just(100), Just(125)].prop_map(ring_of),
        prop_oneof![Just(0), Just(100), Just(125)].prop_map(table_of),
    ]
}

fn hashing_policy() -> impl Strategy<Value = fn(u32) -> BalancePolicy> {
    prop_oneof![
        Just(ring_of as fn(u32) -> BalancePolicy),
        Just(table_of as fn(u32) -> BalancePolicy)
    ]
}

/// A group of endpoints `0..weights.len()`.
fn group(weights: &[f64], policy: &BalancePolicy) -> Group {
    let members = weights
        .iter()
        .enumerate()
        .map(|(endpoint, weight)| Member {
            endpoint,
            weight: *weight,
        })
        .collect();
    grouped(members, policy)
}

fn grouped(members: Vec<Member>, policy: &BalancePolicy) -> Group {
    let most = members.iter().map(|m| m.endpoint).max().unwrap_or(0);
    let ids: Vec<String> = (0..=most).map(|i| format!("endpoint-{i}")).collect();
    Group::new(members, policy, |i| &ids[i])
}

/// How often each endpoint is chosen in so many turns.
fn counts(group: &Group, loads: &Loads, turns: u64) -> HashMap<usize, u64> {
    let mut draw = Seeded(7);
    let mut counts = HashMap::new();
    for turn in 0..turns {
        let chosen = group.pick(turn, Some(mix(turn)), loads, |_| false, &mut draw);
        *counts.entry(chosen.unwrap()).or_insert(0) += 1;
    }
    counts
}

#[track_caller]
fn check_shares(group: &Group, loads: &Loads, weights: &[f64], tolerance: f64) {
    let counts = counts(group, loads, 40_000);
    let total: f64 = weights.iter().sum();
    for (endpoint, weight) in weights.iter().enumerate() {
        let got = counts.get(&endpoint).copied().unwrap_or(0) as f64 / 40_000.0;
        let expected = weight / total;
        assert!(
            (got - expected).abs() < tolerance,
            "endpoint {endpoint} has {got}, not {expected}"
        );
    }
}

/// Fails on any draw.
struct NoChance;

impl Draw for NoChance {
    fn below(&mut self, _: u64) -> u64 {
        panic!("nothing is to be drawn")
    }
    fn unit(&mut self) -> f64 {
        panic!("nothing is to be drawn")
    }
}

#[test]
fn the_only_member_is_chosen_without_chance_or_load() {
    for policy in [EWMA, BalancePolicy::Random, ring_of(125)] {
        let one = grouped(
            vec![Member {
                endpoint: 3,
                weight: 0.5,
            }],
            &policy,
        );
        let none = Loads(vec![]);
        assert_eq!(one.pick(9, Some(1), &none, |_| false, &mut NoChance), Some(3));
        assert_eq!(one.pick(9, Some(1), &none, |e| e == 3, &mut NoChance), None);
    }
}

#[test]
fn idle_endpoints_share_by_weight() {
    let weights = [1.0, 2.0, 5.0, 0.5];
    for policy in [EWMA, BalancePolicy::LeastRequest, BalancePolicy::Random] {
        check_shares(&group(&weights, &policy), &Loads::idle(4), &weights, 0.015);
    }
    for policy in [EWMA, BalancePolicy::LeastRequest] {
        check_shares(
            &group(&weights[..2], &policy),
            &Loads::idle(2),
            &weights[..2],
            0.015,
        );
    }
}

#[test]
fn under_load_requests_under_way_settle_by_weight() {
    // Each turn one request comes and the oldest ends, 140 of them being under way.
    let weights = [1.0, 2.0, 4.0];
    let group = group(&weights, &BalancePolicy::LeastRequest);
    let mut loads = Loads::idle(3);
    let mut draw = Seeded(3);
    let mut under_way = std::collections::VecDeque::new();
    for turn in 0..20_000 {
        let chosen = group.pick(turn, None, &loads, |_| false, &mut draw).unwrap();
        loads.0[chosen].0 += 1;
        under_way.push_back(chosen);
        if under_way.len() > 140 {
            loads.0[under_way.pop_front().unwrap()].0 -= 1;
        }
    }
    for (load, weight) in loads.0.iter().zip(weights) {
        let expected = 140.0 * weight / 7.0;
        assert!(
            (f64::from(load.0) - expected).abs() <= 0.25 * expected,
            "{:?}",
            loads.0
        );
    }
}

#[test]
fn latency_repels_requests_only_where_it_is_the_measure() {
    let mut loads = Loads::idle(3);
    loads.0[1].1 = 5.0;
    assert_eq!(counts(&group(&[1.0; 3], &EWMA), &loads, 1000).get(&1), None);
    check_shares(
        &group(&[1.0; 3], &BalancePolicy::LeastRequest),
        &loads,
        &[1.0; 3],
        0.015,
    );
}

#[test]
fn requests_without_a_key_go_anywhere_by_weight() {
    let weights = [1.0, 3.0];
    for policy in [ring_of(0), table_of(0)] {
        let group = group(&weights, &policy);
        let mut draw = Seeded(1);
        let to_first = (0..20_000)
            .filter(|_| group.pick(0, None, &Loads::idle(2), |_| false, &mut draw) == Some(0))
            .count();
        assert!((4700..5300).contains(&to_first), "{to_first}");
    }
}

#[test]
fn turns_are_spread_evenly() {
    let group = group(&[1.0, 3.0], &BalancePolicy::RoundRobin);
    let order: Vec<_> = (0..8)
        .map(|turn| {
            group
                .pick(turn, None, &Loads::idle(2), |_| false, &mut NoChance)
                .unwrap()
        })
        .collect();
    assert_eq!(order, [1, 0, 1, 1, 1, 0, 1, 1]);
}

#[test]
fn slow_start_begins_at_a_tenth_and_ends_with_the_window() {
    let window = Duration::from_secs(30);
    assert!((slow_start(Duration::ZERO, window) - 0.1).abs() < 1e-9);
    assert!((slow_start(Duration::from_secs(15), window) - 0.5).abs() < 1e-9);
    assert!((slow_start(window, window) - 1.0).abs() < 1e-9);
    assert!((slow_start(Duration::ZERO, Duration::ZERO) - 1.0).abs() < 1e-9);
}

proptest! {
    #[test]
    fn slow_start_never_falls(a in 0u64..100_000, b in 0u64..100_000, window in 0u64..100_000) {
        let factor = |ms| slow_start(Duration::from_millis(ms), Duration::from_millis(window));
        let (younger, older) = (a.min(b), a.max(b));
        prop_assert!(factor(younger) <= factor(older));
        prop_assert!((0.1..=1.0).contains(&factor(younger)));
    }

    #[test]
    fn only_members_that_were_not_tried_are_chosen_and_one_is_if_there_is_one(
        policy in any_policy(),
        endpoints in prop::collection::btree_map(0usize..30, (0.05f64..10.0, any::<bool>(), 0u32..20), 0..12),
        turn: u64, hash: Option<u64>, seed: u64,
    ) {
        let members: Vec<Member> =
            endpoints.iter().map(|(e, (weight, _, _))| Member { endpoint: *e, weight: *weight }).collect();
        let group = grouped(members, &policy);
        prop_assert_eq!(group.len(), endpoints.len());
        let mut loads = Loads::idle(30);
        for (e, (_, _, active)) in &endpoints {
            loads.0[*e].0 = *active;
        }
        let skipped = |e: usize| endpoints.get(&e).is_none_or(|(_, tried, _)| *tried);
        let chosen = group.pick(turn, hash, &loads, skipped, &mut Seeded(seed));
        match chosen {
            Some(endpoint) => prop_assert!(!skipped(endpoint)),
            None => prop_assert!(endpoints.keys().all(|e| skipped(*e))),
        }
    }

    #[test]
    fn of_members_alike_never_the_unique_worst(
        loads in prop::collection::vec((0u32..100, 1u32..100), 3..20),
        skipped in prop::option::of(any::<prop::sample::Index>()),
        latency: bool, seed: u64,
    ) {
        let policy = if latency { EWMA } else { BalancePolicy::LeastRequest };
        let skipped = skipped.map(|i| i.index(loads.len())).filter(|_| loads.len() > 3);
        let measure = |e: usize| u64::from(loads[e].0 + 1) * if latency { u64::from(loads[e].1) } else { 1 };
        let left: Vec<usize> = (0..loads.len()).filter(|e| Some(*e) != skipped).collect();
        let worst = left.iter().map(|e| measure(*e)).max().unwrap();
        let unique = left.iter().filter(|e| measure(**e) == worst).count() == 1;
        let known = Loads(loads.iter().map(|(active, ms)| (*active, f64::from(*ms))).collect());
        let group = group(&vec![2.5; loads.len()], &policy);
        let mut draw = Seeded(seed);
        for _ in 0..50 {
            let chosen = group.pick(0, None, &known, |e| Some(e) == skipped, &mut draw).unwrap();
            prop_assert!(!unique || measure(chosen) != worst, "{chosen} of {known:?}", known = known.0);
        }
    }

    #[test]
    fn turns_are_exact_over_a_period(weights in prop::collection::vec(1u32..20, 2..10), start in 0u64..1000, scale in 0.1f64..10.0) {
        let period: u32 = weights.iter().sum();
        let scaled: Vec<f64> = weights.iter().map(|w| f64::from(*w) * scale).collect();
        let group = group(&scaled, &BalancePolicy::RoundRobin);
        let mut counts = vec![0u32; weights.len()];
        for turn in start..start + u64::from(period) {
            counts[group.pick(turn, None, &Loads::idle(10), |_| false, &mut NoChance).unwrap()] += 1;
        }
        prop_assert_eq!(counts, weights);
    }

    #[test]
    fn turns_are_never_far_from_the_share(weights in prop::collection::vec(0.1f64..10.0, 2..10)) {
        let total: f64 = weights.iter().sum();
        let group = group(&weights, &BalancePolicy::RoundRobin);
        let mut counts = vec![0.0f64; weights.len()];
        for turn in 0..1000u32 {
            counts[group.pick(u64::from(turn), None, &Loads::idle(10), |_| false, &mut NoChance).unwrap()] += 1.0;
            for (count, weight) in counts.iter().zip(&weights) {
                let due = f64::from(turn + 1) * weight / total;
                prop_assert!((count - due).abs() < 3.0, "{count} turns of {due}");
            }
        }
    }

    #[test]
    fn draws_follow_weights(weights in prop::collection::vec(0.1f64..10.0, 2..8)) {
        check_shares(&group(&weights, &BalancePolicy::Random), &Loads::idle(8), &weights, 0.02);
    }

    #[test]
    fn a_key_stays_with_its_endpoint_whatever_order_members_are_listed_in(
        policy in hashing_policy(),
        order in Just((0usize..12).collect::<Vec<_>>()).prop_shuffle(),
        hash: u64, seed: u64,
    ) {
        let listed = |order: Vec<usize>| {
            grouped(order.into_iter().map(|endpoint| Member { endpoint, weight: 1.0 }).collect(), &policy(0))
        };
        let pick = |group: &Group, seed| group.pick(seed, Some(hash), &Loads::idle(12), |_| false, &mut Seeded(seed));
        prop_assert_eq!(
            pick(&listed((0..12).collect()), seed),
            pick(&listed(order), !seed)
        );
    }

    #[test]
    fn nobody_is_over_its_bound_while_another_is_below(
        policy in hashing_policy(),
        active in prop::collection::vec(0u32..20, 2..12),
        factor in 100u32..200, hash: u64,
    ) {
        let group = group(&vec![1.0; active.len()], &policy(factor));
        let n = u32::try_from(active.len()).unwrap();
        let total: u32 = active.iter().sum();
        // ceil(factor / 100 * (total + 1) / n), in whole numbers.
        let bound = (factor * (total + 1)).div_ceil(100 * n);
        let loads = Loads(active.iter().map(|a| (*a, 0.001)).collect());
        let chosen = group.pick(0, Some(hash), &loads, |_| false, &mut NoChance).unwrap();
        prop_assert!(active[chosen] < bound, "{chosen} has {} of {bound}", active[chosen]);
        let unbound = self::group(&vec![1.0; active.len()], &policy(0));
        let own = unbound.pick(0, Some(hash), &loads, |_| false, &mut NoChance).unwrap();
        prop_assert!(active[own] >= bound || own == chosen, "its own endpoint had room");
    }

    #[test]
    fn where_a_key_goes_when_its_endpoint_was_tried_is_where_it_goes_without_it(
        n in 3usize..20, hash: u64,
    ) {
        let members: Vec<Member> = (0..n).map(|endpoint| Member { endpoint, weight: 1.0 }).collect();
        let all = grouped(members.clone(), &ring_of(0));
        let pick = |group: &Group, not: Option<usize>| {
            group.pick(0, Some(hash), &Loads::idle(n), |e| Some(e) == not, &mut NoChance)
        };
        let own = pick(&all, None);
        let rest = grouped(members.into_iter().filter(|m| Some(m.endpoint) != own).collect(), &ring_of(0));
        prop_assert_eq!(pick(&all, own), pick(&rest, None));
    }
}

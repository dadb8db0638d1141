use super::*;
use crate::draw::mix;
use proptest::prelude::*;
use std::collections::HashMap;

/// Keys that are asked for.
const KEYS: u64 = 20_000;

fn ids(n: usize) -> Vec<String> {
    (0..n)
        .map(|i| format!("10.0.{}.{}:8080", i / 256, i % 256))
        .collect()
}

fn alike(ids: &[String]) -> Vec<Owner<'_>> {
    ids.iter().map(|id| Owner { id, weight: 1.0 }).collect()
}

/// Whom each key belongs to.
fn map<'a>(slots: &Slots, owners: &[Owner<'a>]) -> Vec<&'a str> {
    let owner = |key| owners[slots.owners()[slots.of_key(mix(key))] as usize].id;
    (0..KEYS).map(owner).collect()
}

/// Of the keys that were not the removed member's, the share that moved when it was removed.
fn moved(make: impl Fn(&[Owner<'_>]) -> Slots, n: usize, removed: usize) -> f64 {
    let ids = ids(n);
    let all = alike(&ids);
    let mut rest = all.clone();
    let gone = rest.remove(removed).id;
    let (before, after) = (map(&make(&all), &all), map(&make(&rest), &rest));
    let pairs = || before.iter().zip(&after).filter(|(b, _)| **b != gone);
    pairs().filter(|(b, a)| b != a).count() as f64 / pairs().count() as f64
}

fn shares(slots: &Slots, owners: &[Owner<'_>]) -> HashMap<String, f64> {
    let mut shares = HashMap::new();
    for id in map(slots, owners) {
        *shares.entry(id.to_owned()).or_insert(0.0) += 1.0 / KEYS as f64;
    }
    shares
}

#[test]
fn the_hash_is_the_same_everywhere() {
    // From the specification of xxHash64.
    assert_eq!(hash_of(b""), 0xef46_db37_51d8_e999);
    assert_eq!(hash_of(b"abc"), 0x44bc_2cf5_ad77_0999);
}

#[test]
fn a_ring_has_the_points_that_were_asked_for_and_not_too_many() {
    for (n, weight, minimum) in [
        (2, 1.0, 1024),
        (3, 0.001, 1024),
        (500, 1.0, 1024),
        (20, 100.0, 1024),
        (3, 1.0, 100_000),
    ] {
        let ids = ids(n);
        let owners: Vec<_> = ids.iter().map(|id| Owner { id, weight }).collect();
        let points = ring(&owners, minimum).owners().len();
        assert!(points >= minimum as usize, "{n} of {weight}: {points}");
        let most = (2 * minimum as usize).max(65_536) + n;
        assert!(points <= most, "{n} of {weight}: {points}");
    }
}

#[test]
fn a_map_of_nobody_is_empty() {
    assert!(ring(&[], 1024).owners().is_empty());
    let table = maglev(&[], 251);
    assert_eq!(table.owners().len(), 251, "and nobody's");
}

#[test]
fn a_member_of_a_ring_has_keys_in_proportion_to_its_weight() {
    let ids = ids(4);
    let owners: Vec<_> = ids
        .iter()
        .zip([1.0, 1.0, 2.0, 4.0])
        .map(|(id, weight)| Owner { id, weight })
        .collect();
    let shares = shares(&ring(&owners, 8192), &owners);
    for owner in &owners {
        let expected = owner.weight / 8.0;
        let got = shares[owner.id];
        assert!((got / expected - 1.0).abs() < 0.15, "{got} is not {expected}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_key_of_a_ring_moves_but_those_of_the_member_that_left(n in 2usize..100, removed: prop::sample::Index) {
        let moved = moved(|owners| ring(owners, 1024), n, removed.index(n));
        prop_assert!(moved == 0.0, "{moved}");
    }

    #[test]
    fn few_keys_of_a_table_move_but_those_of_the_member_that_left(n in 2usize..100, removed: prop::sample::Index) {
        let moved = moved(|owners| maglev(owners, 65_537), n, removed.index(n));
        prop_assert!(moved < 0.02, "{moved}");
    }

    #[test]
    fn a_table_is_even_and_follows_weights(weights in prop::collection::vec(1u32..10, 1..20)) {
        let ids = ids(weights.len());
        let owners: Vec<_> = ids.iter().zip(&weights)
            .map(|(id, weight)| Owner { id, weight: f64::from(*weight) }).collect();
        let table = maglev(&owners, 65_537);
        let total: f64 = owners.iter().map(|o| o.weight).sum();
        for (owner, position) in owners.iter().zip(0u32..) {
            let entries = table.owners().iter().filter(|o| **o == position).count() as f64;
            let expected = 65_537.0 * owner.weight / total;
            prop_assert!((entries / expected - 1.0).abs() < 0.01, "{entries} is not {expected}");
        }
    }
}
